//! Answers requests on the socket of a host.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use vmbus::message::ExecRequest;
use vmbus::stream::{FrameReader, StreamError, join, send};

use super::types::{
    DeploymentInfo, EndpointInfo, InstanceInfo, MAX_CHUNK, RefusalKind, Request, Response,
};
use crate::store::log_tail::LogTail;
use crate::store::paths;
use crate::supervisor::host::{DeploymentHandle, Host};
use crate::supervisor::instance::InstanceHandle;

/// Interval at which a followed log is read.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

/// A refusing socket older than this is stale and may be removed.
const STALE: Duration = Duration::from_mins(1);

/// Most time at the end for clients to receive the rest of a log.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Pause after `accept` failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A socket that is being served; dropping it stops and removes it.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    task: JoinHandle<()>,
    ended: Arc<watch::Sender<bool>>,
}

/// Serves `host` on its socket.
pub fn serve(host: &Host) -> io::Result<Server> {
    let runtime_dir = &host.options().runtime_dir;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(runtime_dir)?;
    paths::check_own(runtime_dir)?;
    let path = host.socket();
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let directory = runtime_dir.clone();
    tokio::spawn(async move { sweep(&directory, STALE).await });
    let ended = Arc::new(watch::Sender::new(false));
    let shared = Arc::new(Api {
        host: host.clone(),
        ended: Arc::clone(&ended),
        started: Instant::now(),
    });
    let task = tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Descriptors or memory are short: wait until connections close.
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            };
            let shared = Arc::clone(&shared);
            tokio::spawn(async move {
                // An error ends only this connection.
                let _ = shared.answer(stream).await;
            });
        }
    });
    Ok(Server { path, task, ended })
}

impl Server {
    /// Stops the server when the deployment has ended: clients that follow a log get the
    /// rest of it and its end.
    pub async fn close(self) {
        self.task.abort();
        self.ended.send_replace(true);
        // A client that does not read misses the end.
        let _ = tokio::time::timeout(DRAIN_LIMIT, self.ended.closed()).await;
    }
}

/// Removes sockets on which no process listens, because their host agent and its janitor
/// were killed. A socket younger than `stale` may be bound and not listen yet.
async fn sweep(runtime_dir: &Path, stale: Duration) {
    let entries = fs::read_dir(runtime_dir).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let age = metadata.modified().map(|time| time.elapsed());
        let old = matches!(age, Ok(Ok(age)) if age >= stale);
        if !old || !metadata.file_type().is_socket() {
            continue;
        }
        // A socket with a full queue returns another error.
        if let Err(error) = UnixStream::connect(&path).await
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        let _ = fs::remove_file(&self.path);
    }
}

struct Api {
    host: Host,
    /// Whether the deployment has ended. Each request for a log has a receiver.
    ended: Arc<watch::Sender<bool>>,
    started: Instant,
}

impl Api {
    async fn answer(&self, mut stream: UnixStream) -> Result<(), StreamError> {
        let mut reader = FrameReader::new(&mut stream);
        let Some(request) = reader.next::<Request>().await? else {
            return Ok(());
        };
        let (_, early) = reader.into_parts();
        match request {
            Request::Ps {} => {
                let deployments = self.host.deployments();
                let deployments = deployments.iter().map(|found| self.info(found)).collect();
                send(&mut stream, &Response::Deployments { deployments }).await
            }
            Request::Exec { instance, exec } => {
                self.with(&instance, &mut stream, |it, stream| {
                    Box::pin(exec_in(it, stream, exec, early))
                })
                .await
            }
            Request::Logs {
                instance,
                source,
                follow,
            } => {
                let ended = self.ended.subscribe();
                self.with(&instance, &mut stream, |it, stream| {
                    let path = it.directory().join(source.file_name());
                    Box::pin(logs(path, follow, ended, stream))
                })
                .await
            }
            Request::Pause { instance, paused } => {
                self.with(&instance, &mut stream, |it, stream| {
                    Box::pin(async move {
                        let response = match it.pause(paused).await {
                            Ok(()) => Response::Ok {},
                            Err(message) => failed(RefusalKind::Unreachable, message),
                        };
                        send(stream, &response).await
                    })
                })
                .await
            }
        }
    }

    async fn with<F>(&self, name: &str, stream: &mut UnixStream, work: F) -> Result<(), StreamError>
    where
        F: for<'s> FnOnce(
            InstanceHandle,
            &'s mut UnixStream,
        ) -> std::pin::Pin<
            Box<dyn Future<Output = Result<(), StreamError>> + Send + 's>,
        >,
    {
        let deployments = self.host.deployments();
        match deployments.iter().find_map(|found| found.instance(name)) {
            Some(instance) => work(instance.clone(), stream).await,
            None => {
                let message = format!("no instance {name} on this host");
                send(stream, &failed(RefusalKind::NotFound, message)).await
            }
        }
    }

    fn info(&self, deployment: &DeploymentHandle) -> DeploymentInfo {
        let instances = deployment.instances().iter().map(|instance| {
            let (spec, status) = (instance.spec(), instance.status());
            let endpoints = spec.endpoints.iter().map(|endpoint| EndpointInfo {
                name: endpoint.name.clone(),
                address: endpoint.address,
                local_port: endpoint.local_port,
            });
            InstanceInfo {
                name: spec.name().to_owned(),
                state: status.word().to_owned(),
                generation: status.generation,
                uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
                vmm_pid: status.vmm_pid,
                endpoints: endpoints.collect(),
                status,
            }
        });
        DeploymentInfo {
            deployment: deployment.id().to_owned(),
            service: deployment.service().to_owned(),
            pid: std::process::id(),
            instances: instances.collect(),
        }
    }
}

fn failed(kind: RefusalKind, message: impl Into<String>) -> Response {
    Response::Error {
        kind,
        message: message.into(),
    }
}

async fn exec_in(
    instance: InstanceHandle,
    stream: &mut UnixStream,
    request: ExecRequest,
    early: Vec<u8>,
) -> Result<(), StreamError> {
    let mut guest = match instance.exec().await {
        Ok(guest) => guest,
        Err(message) => return send(stream, &failed(RefusalKind::Unreachable, message)).await,
    };
    send(&mut guest, &request).await?;
    guest.write_all(&early).await?;
    send(stream, &Response::Ok {}).await?;
    join(stream.split(), tokio::io::split(guest), MAX_CHUNK).await;
    Ok(())
}

async fn logs(
    path: PathBuf,
    follow: bool,
    mut ended: watch::Receiver<bool>,
    stream: &mut UnixStream,
) -> Result<(), StreamError> {
    let mut log = blocking(move || Ok(LogTail::open(&path))).await?;
    loop {
        // Checked before the file is read, so that its last lines are sent too.
        let last = !follow || *ended.borrow() || ended.has_changed().is_err();
        log = send_log(log, stream).await?;
        if last {
            return send(stream, &Response::LogEnd {}).await;
        }
        tokio::select! {
            // A client sends no more: the read ends when it has closed the connection.
            _ = stream.read_u8() => return Ok(()),
            _ = ended.wait_for(|ended| *ended) => {}
            () = tokio::time::sleep(FOLLOW_EVERY) => {}
        }
    }
}

/// Sends what is in the log.
async fn send_log(mut log: LogTail, stream: &mut UnixStream) -> Result<LogTail, StreamError> {
    loop {
        let (back, bytes) = blocking(move || {
            let bytes = log.read(MAX_CHUNK)?;
            Ok((log, bytes))
        })
        .await?;
        log = back;
        if bytes.is_empty() {
            return Ok(log);
        }
        send(stream, &Response::LogChunk { bytes }).await?;
    }
}

/// Runs file I/O on a blocking thread, so that a slow disk delays no guest.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
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
}
