//! The server without guests: clients that misbehave, stale sockets.

use super::super::client::{self, Client, ClientError, InstanceTarget};
use super::super::listener::MAX_CONNECTIONS;
use super::super::types::{Deployments, EventQuery, LogFile, LogQuery, RefusalKind};
use super::*;
use crate::controller::Policy;
use crate::store::services::ServiceStore;
use crate::supervisor::event::EventKind;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[tokio::test(flavor = "current_thread")]
async fn only_stale_sockets_without_a_listener_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let [dead, live, file] =
        ["dead.sock", "live.sock", "file.sock"].map(|name| dir.path().join(name));
    drop(UnixListener::bind(&dead).unwrap());
    let _listener = UnixListener::bind(&live).unwrap();
    fs::write(&file, b"").unwrap();
    sweep(dir.path(), STALE).await;
    assert!(dead.exists());
    sweep(dir.path(), Duration::ZERO).await;
    assert!(!dead.exists() && live.exists() && file.exists());
}

/// A served host without deployments.
fn served(limit: Duration) -> (tempfile::TempDir, Server, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let host = crate::supervisor::host::tests::empty(dir.path(), dir.path());
    let server = serve_within(&host, None, Router::new(), Access::default(), limit).unwrap();
    let socket = host.socket();
    (dir, server, socket)
}

#[tokio::test(flavor = "current_thread")]
async fn only_its_user_can_reach_the_socket() {
    let (dir, server, socket) = served(REQUEST_LIMIT);
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(server);
    // Others could replace the socket.
    for mode in [0o701, 0o770, 0o1777] {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        let host = crate::supervisor::host::tests::empty(dir.path(), dir.path());
        let refused = serve(&host, None).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }
    // A group may have passed through it to the socket of an earlier daemon.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o710)).unwrap();
    let host = crate::supervisor::host::tests::empty(dir.path(), dir.path());
    let _server = serve(&host, None).unwrap();
    let mode = fs::metadata(dir.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

/// Sends `bytes` and reads until the server closes.
async fn raw(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = String::new();
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_string(&mut answer));
    read.await.expect("the server closes").unwrap();
    answer
}

#[tokio::test(flavor = "current_thread")]
async fn a_client_that_sends_no_whole_request_is_disconnected() {
    let (_dir, _server, socket) = served(Duration::from_millis(50));
    assert_eq!(raw(&socket, b"GET /v1/dep").await, "");
    let path = "/v1/deployments/d/instances/i/pause";
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
    // The instance is looked for first.
    let answer = raw(
        &socket,
        format!("{head}content-length: 9\r\n\r\n{{").as_bytes(),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_malformed_request_is_answered_with_what_is_wrong() {
    let (_dir, _server, socket) = served(REQUEST_LIMIT);
    let request = |line: &str| format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    for (line, status, text) in [
        ("GET /v9/deployments", "404", "no-such-path"),
        ("PUT /v1/deployments", "405", "has no PUT /v1/deployments"),
        (
            "GET /v1/deployments/d/instances/i/logs?source=dreams",
            "400",
            "unknown variant `dreams`",
        ),
        (
            "GET /v1/deployments/d/instances/i/logs?source=role",
            "404",
            "no instance i of deployment d",
        ),
    ] {
        let answer = raw(&socket, request(line).as_bytes()).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
        assert!(answer.contains(text), "{answer}");
        assert!(answer.contains("host-agent-version: "), "{answer}");
    }
    let frame = b"\x0f\0\0\0{\"request\":\"ps\"}";
    assert!(raw(&socket, frame).await.starts_with("HTTP/1.1 400 "));
    let mut client = Client::connect(&socket).await.unwrap();
    let found: Deployments = client.get("deployments").await.unwrap();
    assert!(found.deployments.is_empty());
}

#[tokio::test(flavor = "current_thread")]
async fn every_documented_path_is_served() {
    let (_dir, _server, socket) = served(REQUEST_LIMIT);
    let mut client = Client::connect(&socket).await.unwrap();
    let document: serde_json::Value = client.get("openapi.json").await.unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 13, "{document}");
    for (path, operations) in paths {
        for method in operations.as_object().unwrap().keys() {
            let method = method.to_uppercase();
            let line = format!("{method} {} HTTP/1.1", path.replace(['{', '}'], "x"));
            let head = format!("{line}\r\nhost: x\r\nconnection: close\r\n\r\n");
            let answer = raw(&socket, head.as_bytes()).await;
            // The document itself names every kind.
            let refused = answer.contains(r#""kind":"no-such-"#);
            assert!(!refused, "{line}: {answer}");
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_client_learns_that_the_host_agent_is_of_another_version() {
    let (_dir, _server, socket) = served(REQUEST_LIMIT);
    let mut client = Client::connect(&socket).await.unwrap();
    let refused = client
        .get::<Deployments>("no-such-thing")
        .await
        .unwrap_err();
    assert!(matches!(refused, ClientError::Version { .. }), "{refused}");
    // A host agent of before HTTP answers with a frame.
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("old.sock");
    let listener = UnixListener::bind(&old).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 4];
        stream.read_exact(&mut head).await.unwrap();
        let frame = b"\x14\0\0\0{\"response\":\"error\"}";
        stream.write_all(frame).await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.unwrap();
    });
    let mut client = Client::connect(&old).await.unwrap();
    let refused = client.get::<Deployments>("deployments").await.unwrap_err();
    assert!(
        matches!(refused, ClientError::Version { .. }),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "current_thread")]
async fn a_missing_instance_is_refused_by_name() {
    let (dir, _server, socket) = served(REQUEST_LIMIT);
    assert_eq!(client::list(dir.path()).await.unwrap(), []);
    let target = InstanceTarget {
        socket: socket.clone(),
        deployment: "d".into(),
        instance: "A_IN_0".into(),
    };
    let query = LogQuery {
        source: LogFile::Role,
        follow: false,
    };
    let client = Client::connect(&socket).await.unwrap();
    let Err(ClientError::Refused { kind, message }) = client.logs(&target, query).await else {
        panic!("it has a log");
    };
    assert_eq!(kind, RefusalKind::NotFound);
    assert!(message.contains("A_IN_0"), "{message}");
}

#[tokio::test(flavor = "current_thread")]
async fn clients_beyond_the_cap_are_refused_until_one_ends() {
    let (_dir, _server, socket) = served(Duration::from_secs(600));
    let mut clients = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        clients.push(UnixStream::connect(&socket).await.unwrap());
    }
    let answer = raw(&socket, b"").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("256 commands"), "{answer}");
    clients.pop();
    loop {
        let mut client = Client::connect(&socket).await.unwrap();
        match client.get::<Deployments>("deployments").await {
            Ok(_) => return,
            Err(ClientError::Refused {
                kind: RefusalKind::Busy,
                ..
            }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
}

const EVENTS: EventQuery = EventQuery {
    after: None,
    follow: true,
    service: None,
    deployment: None,
    instance: None,
};

/// A served host that keeps services and records events.
async fn keeping(dir: &Path) -> (Host, Controller, Server) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
    let host = crate::supervisor::host::tests::empty(dir, dir);
    let store = ServiceStore::open(dir).unwrap();
    let events = host.timeline().subscribe();
    let controller = Controller::start(host.clone(), store, events, Policy::default(), None)
        .await
        .unwrap();
    let server = serve(&host, Some(controller.clone())).unwrap();
    (host, controller, server)
}

#[tokio::test(flavor = "current_thread")]
async fn events_are_sent_in_order_and_resumed_after_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let (host, controller, server) = keeping(dir.path()).await;
    let socket = host.socket();
    let client = Client::connect(&socket).await.unwrap();
    let mut followed = client.events(&EVENTS).await.unwrap();
    let text = "a\n\nid: 99\ndata: \u{2028}b\r\u{1b}".to_owned();
    let kind = EventKind::Warning { text };
    host.timeline().of("0123").report(Some("A_IN_0"), kind);
    host.timeline()
        .of_service("shop")
        .report(None, EventKind::Resumed);
    let first = followed.next().await.unwrap().unwrap();
    assert_eq!(first.number, 1);
    assert_eq!(first.text, "warning: a\n\nid: 99\ndata: \u{2028}b\r\u{1b}");
    assert_eq!(first.event["event"], "warning");
    assert_eq!(first.instance.as_deref(), Some("A_IN_0"));
    assert!(
        first.at.ends_with('Z') && first.at.len() == 24,
        "{}",
        first.at
    );
    let second = followed.next().await.unwrap().unwrap();
    assert_eq!(
        (second.number, second.service.as_deref()),
        (2, Some("shop"))
    );

    let events = |path: &str, header: &str| {
        let path = format!("GET /v1/events{path} HTTP/1.1\r\n");
        let request = format!("{path}host: x\r\nconnection: close\r\n{header}\r\n");
        let socket = socket.clone();
        async move { raw(&socket, request.as_bytes()).await }
    };
    let all = events("?follow=false", "").await;
    assert!(all.contains("content-type: text/event-stream\r\n"), "{all}");
    assert!(
        all.contains("\nid: 1\n") && all.contains("\nid: 2\n"),
        "{all}"
    );
    assert!(!all.contains("\nid: 99"), "{all}");
    let resumed = events("?follow=false&after=0", "Last-Event-ID: 1\r\n").await;
    assert!(
        !resumed.contains("id: 1\n") && resumed.contains("id: 2\n"),
        "{resumed}"
    );
    for (path, header, text) in [
        (
            "?after=3",
            "",
            "no event 3 in this store, whose newest event has number 2",
        ),
        ("?after=-1", "", "invalid digit"),
        ("?after=1&since=2", "", "unknown field `since`"),
        ("", "Last-Event-ID: x\r\n", "Last-Event-ID is not a number"),
    ] {
        let refused = events(path, header).await;
        assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
        assert!(refused.contains(text), "{refused}");
    }

    // The last events, then the end.
    host.timeline().report(None, EventKind::Resumed);
    controller.close().await;
    server.close().await;
    assert_eq!(followed.next().await.unwrap().unwrap().number, 3);
    assert_eq!(followed.next().await.unwrap(), None);
}

#[tokio::test(flavor = "current_thread")]
async fn a_host_agent_without_a_store_has_no_events() {
    let (_dir, _server, socket) = served(REQUEST_LIMIT);
    let client = Client::connect(&socket).await.unwrap();
    let Err(ClientError::Refused { kind, message }) = client.events(&EVENTS).await else {
        panic!("it has events");
    };
    assert_eq!(kind, RefusalKind::NotFound);
    assert!(message.contains("start host-agent serve"), "{message}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_client_that_does_not_read_delays_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let (host, _controller, _server) = keeping(dir.path()).await;
    let socket = host.socket();
    let slow = Client::connect(&socket).await.unwrap();
    let mut slow = slow.events(&EVENTS).await.unwrap();
    let quick = Client::connect(&socket).await.unwrap();
    let mut quick = quick.events(&EVENTS).await.unwrap();
    // More than socket buffers hold.
    let text = "x".repeat(32 * 1024);
    for number in 1..=300 {
        let text = text.clone();
        host.timeline().report(None, EventKind::Warning { text });
        assert_eq!(quick.next().await.unwrap().unwrap().number, number);
    }
    for number in 1..=300 {
        assert_eq!(slow.next().await.unwrap().unwrap().number, number);
    }
}
