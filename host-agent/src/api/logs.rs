//! `GET …/logs`: the bytes of a log, to its end or as they are appended.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::try_unfold;
use tokio::sync::watch;

use super::request::{Failure, Named};
use super::routes::Api;
use super::types::{LogQuery, Problem};
use crate::blocking::blocking;
use crate::store::log_tail::LogTail;

/// Interval at which a followed log is read.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

/// Most bytes of a log that are read at once.
const CHUNK: usize = 64 * 1024;

/// Answers with a log. A chunked body that is cut off shows the client that bytes are missing.
#[utoipa::path(
    get,
    path = "/logs",
    params(("deployment" = String, Path), ("instance" = String, Path), LogQuery),
    responses(
        (status = 200, description = "The log", body = String, content_type = "application/octet-stream"),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such instance on this host", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
pub(super) async fn logs(
    State(api): State<Api>,
    Named((deployment, instance)): Named<(String, String)>,
    query: Result<Query<LogQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(query) = query?;
    let instance = api.instance(&deployment, &instance)?;
    let path = instance.directory().join(query.source.file_name());
    let body = Body::from_stream(lines(path, query.follow, api.ended()).await?);
    let headers = [(CONTENT_TYPE, "application/octet-stream")];
    Ok((headers, body).into_response())
}

/// A log that is being sent.
struct Sending {
    log: LogTail,
    follow: bool,
    ended: watch::Receiver<bool>,
    /// `ended` was set before the last look, which has seen everything.
    last: bool,
}

/// The bytes of the log at `path`. With `follow` the stream goes on until `ended` is true
/// or has no sender.
pub(super) async fn lines(
    path: PathBuf,
    follow: bool,
    ended: watch::Receiver<bool>,
) -> io::Result<impl Stream<Item = io::Result<Bytes>> + Send> {
    let log = blocking(move || LogTail::open(&path)).await;
    let sending = Sending {
        log: log.map_err(io::Error::other)?,
        follow,
        ended,
        last: false,
    };
    Ok(try_unfold(sending, next))
}

async fn next(mut this: Sending) -> io::Result<Option<(Bytes, Sending)>> {
    loop {
        // Checked before the file is read, so that its last lines are sent too.
        this.last |= !this.follow || *this.ended.borrow() || this.ended.has_changed().is_err();
        let mut log = this.log;
        let read = blocking(move || {
            let bytes = log.read(CHUNK);
            (log, bytes)
        });
        let (log, bytes) = read.await.map_err(io::Error::other)?;
        this.log = log;
        let bytes = bytes?;
        if !bytes.is_empty() {
            return Ok(Some((bytes.into(), this)));
        }
        if this.last {
            return Ok(None);
        }
        tokio::select! {
            _ = this.ended.wait_for(|ended| *ended) => {}
            () = tokio::time::sleep(FOLLOW_EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;
    use std::fs;
    use std::io::Write as _;

    #[tokio::test]
    async fn a_followed_log_ends_with_its_last_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("role.log");
        let mut log = fs::File::create(&path).unwrap();
        log.write_all(b"first\n").unwrap();
        let ended = watch::Sender::new(false);
        let stream = lines(path.clone(), true, ended.subscribe()).await.unwrap();
        let mut stream = std::pin::pin!(stream);
        assert_eq!(stream.next().await.unwrap().unwrap(), "first\n");
        log.write_all(b"last\n").unwrap();
        // As at the end of a deployment that is not kept.
        fs::remove_file(&path).unwrap();
        ended.send_replace(true);
        assert_eq!(stream.next().await.unwrap().unwrap(), "last\n");
        assert!(stream.next().await.is_none());
    }
}
