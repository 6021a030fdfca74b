//! The server without guests: clients that misbehave, stale sockets.

use super::super::client::{self, Client, ClientError, InstanceTarget};
use super::super::listener::MAX_CONNECTIONS;
use super::super::types::{Deployments, LogFile, LogQuery, RefusalKind};
use super::*;
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
    let server = serve_within(&host, None, limit).unwrap();
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
    for mode in [0o710, 0o701, 0o770, 0o1777] {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        let host = crate::supervisor::host::tests::empty(dir.path(), dir.path());
        let refused = serve(&host, None).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }
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
        ("PUT /v1/deployments", "404", "has no PUT /v1/deployments"),
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
