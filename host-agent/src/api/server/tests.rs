//! The server without guests: clients that misbehave, logs, stale sockets.

use super::*;
use std::io::Write as _;

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

#[tokio::test(flavor = "current_thread")]
async fn following_a_log_ends_when_the_client_closes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("role.log");
    fs::write(&path, "all there is\n").unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let (_going_on, ended) = watch::channel(false);
    let following = tokio::spawn(async move { logs(path, true, ended, &mut ours).await });
    let mut client = FrameReader::new(theirs);
    let first = client.next::<Response>().await.unwrap();
    assert!(matches!(first, Some(Response::LogChunk { .. })));
    drop(client);
    let ended = tokio::time::timeout(Duration::from_secs(20), following);
    ended.await.expect("it ends").unwrap().unwrap();
}

#[tokio::test]
async fn a_followed_log_ends_with_its_last_lines_and_an_end_frame() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("role.log");
    let mut log = fs::File::create(&path).unwrap();
    log.write_all(b"first\n").unwrap();
    let ended = watch::Sender::new(false);
    let receiver = ended.subscribe();
    let (mut near, far) = UnixStream::pair().unwrap();
    let of_task = path.clone();
    let sending = tokio::spawn(async move { logs(of_task, true, receiver, &mut near).await });
    let mut reader = FrameReader::new(far);
    let first = reader.next().await.unwrap();
    let chunk = |text: &str| {
        Some(Response::LogChunk {
            bytes: text.as_bytes().to_vec(),
        })
    };
    assert_eq!(first, chunk("first\n"));
    log.write_all(b"last\n").unwrap();
    // As at the end of a deployment that is not kept.
    fs::remove_file(&path).unwrap();
    ended.send_replace(true);
    assert_eq!(reader.next().await.unwrap(), chunk("last\n"));
    let end: Option<Response> = reader.next().await.unwrap();
    assert_eq!(end, Some(Response::LogEnd {}));
    sending.await.unwrap().unwrap();
    // No receiver is left.
    ended.closed().await;
}

/// A served host without deployments.
fn served(limit: Duration) -> (tempfile::TempDir, Server, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let host = crate::supervisor::host::tests::empty(dir.path(), dir.path());
    let server = serve_within(&host, limit).unwrap();
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
        let refused = serve(&host).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }
}

async fn answer(stream: UnixStream) -> Option<Response> {
    let mut reader = FrameReader::new(stream);
    let answer = tokio::time::timeout(Duration::from_secs(20), reader.next());
    answer.await.expect("an answer").unwrap()
}

fn refusal(answer: Option<Response>) -> String {
    match answer {
        Some(Response::Error { message, .. }) => message,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_client_without_a_request_is_answered_at_the_limit() {
    let (_dir, _server, socket) = served(Duration::from_millis(50));
    let mut slow = UnixStream::connect(&socket).await.unwrap();
    slow.write_all(&[9]).await.unwrap();
    let message = refusal(answer(slow).await);
    assert!(message.contains("in time"), "{message}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_malformed_request_is_answered_with_what_is_wrong() {
    let (_dir, _server, socket) = served(REQUEST_LIMIT);
    let body = |text: &str| {
        let length = u32::try_from(text.len()).unwrap().to_le_bytes();
        [&length, text.as_bytes()].concat()
    };
    for (bytes, text) in [
        (vec![255; 8], "not valid"),
        (body("}"), "not valid"),
        (body(r#"{"version":1,"request":"fly"}"#), "fly"),
        (body(r#"{"request":"ps"}"#), "an older version"),
        (
            body(r#"{"version":7,"program":"9.9","request":"ps"}"#),
            "this program is 9.9 and speaks version 7",
        ),
    ] {
        let mut client = UnixStream::connect(&socket).await.unwrap();
        client.write_all(&bytes).await.unwrap();
        let message = refusal(answer(client).await);
        assert!(message.contains(text), "{message}");
    }
    let mut client = UnixStream::connect(&socket).await.unwrap();
    send(&mut client, &Call::Request(Request::Ps {}))
        .await
        .unwrap();
    let deployments = Vec::new();
    let expected = Response::Deployments { deployments };
    assert_eq!(answer(client).await, Some(expected));
}

#[tokio::test(flavor = "current_thread")]
async fn clients_beyond_the_cap_are_refused_until_one_ends() {
    let (_dir, _server, socket) = served(Duration::from_secs(600));
    let mut clients = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        clients.push(UnixStream::connect(&socket).await.unwrap());
    }
    let refused = UnixStream::connect(&socket).await.unwrap();
    let message = refusal(answer(refused).await);
    assert!(message.contains("256 commands"), "{message}");
    clients.pop();
    loop {
        let mut client = UnixStream::connect(&socket).await.unwrap();
        // Fails if the connection is refused already.
        let _ = send(&mut client, &Call::Request(Request::Ps {})).await;
        if let Some(Response::Deployments { .. }) = answer(client).await {
            return;
        }
    }
}
