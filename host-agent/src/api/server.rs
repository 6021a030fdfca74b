//! Answers requests on the socket of a host.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{self, MsgFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio::time::error::Elapsed;
use vmbus::frame;
use vmbus::message::ExecRequest;
use vmbus::stream::{FrameReader, StreamError, join, send};
use vmbus::text::chain;

use super::types::{
    Call, DeploymentInfo, EndpointInfo, InstanceInfo, MAX_CHUNK, PROGRAM, RefusalKind, Request,
    Response, Speaker, VERSION,
};
use crate::blocking::blocking;
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

/// Most time for a client to send its request. A client sends it at once.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// Most connections. Each command of a user has one, for as long as it runs.
const MAX_CONNECTIONS: usize = 256;

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
    serve_within(host, REQUEST_LIMIT)
}

fn serve_within(host: &Host, request_limit: Duration) -> io::Result<Server> {
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
        request_limit,
    });
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let task = tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Descriptors or memory are short: wait until connections close.
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                refuse(&stream);
                continue;
            };
            let shared = Arc::clone(&shared);
            tokio::spawn(async move {
                let _place = place;
                // An error ends only this connection.
                let _ = shared.answer(stream).await;
            });
        }
    });
    Ok(Server { path, task, ended })
}

/// Answers a client for which there is no place. Never waits.
fn refuse(stream: &UnixStream) {
    let text = format!("this host agent serves {MAX_CONNECTIONS} commands already; end one");
    let answer = frame::encode(&failed(RefusalKind::Internal, text));
    // The buffer of a new connection is empty.
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = answer.map(|bytes| socket::send(stream.as_raw_fd(), &bytes, flags));
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
    request_limit: Duration,
}

impl Api {
    async fn answer(&self, mut stream: UnixStream) -> Result<(), StreamError> {
        let mut reader = FrameReader::new(&mut stream);
        let call = tokio::time::timeout(self.request_limit, reader.next::<Call>()).await;
        let (_, early) = reader.into_parts();
        let request = match call {
            Ok(Ok(Some(Call::Request(request)))) => request,
            Ok(Ok(None)) => return Ok(()),
            other => return send(&mut stream, &invalid(other)).await,
        };
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

/// The answer to a client that sent no request of this version.
fn invalid(call: Result<Result<Option<Call>, StreamError>, Elapsed>) -> Response {
    let text = match call {
        Err(_) => "the request did not arrive in time".to_owned(),
        Ok(Ok(Some(Call::OtherVersion(Speaker { version, program })))) => format!(
            "the host agent is version {PROGRAM} and speaks version {VERSION} of its protocol, \
             this program is {} and speaks version {version}: use the same program for both",
            match program.as_str() {
                "" => "an older version",
                other => other,
            }
        ),
        Ok(Err(error)) => format!("the request is not valid: {}", chain(&error)),
        Ok(Ok(_)) => "no request".to_owned(),
    };
    failed(RefusalKind::Invalid, text)
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
    let mut log = blocking(move || LogTail::open(&path))
        .await
        .map_err(io::Error::other)?;
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
        let read = blocking(move || {
            let bytes = log.read(MAX_CHUNK);
            (log, bytes)
        });
        let (back, bytes) = read.await.map_err(io::Error::other)?;
        log = back;
        let bytes = bytes?;
        if bytes.is_empty() {
            return Ok(log);
        }
        send(stream, &Response::LogChunk { bytes }).await?;
    }
}

#[cfg(test)]
mod tests;
