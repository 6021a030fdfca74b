//! Finds the deployments of this user and sends them requests.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderName, UPGRADE};
use axum::http::{Method, Request, Response as Answer, StatusCode};
use bytes::Bytes;
use futures_util::stream::try_unfold;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use vmbus::message::ExecRequest;
use vmbus::stream::FrameReader;

use super::event_stream::{EventStream, query_text};
use super::types::{
    DeploymentInfo, Deployments, EXEC_PROTOCOL, EventQuery, LogQuery, PROGRAM, Problem,
    RefusalKind, VERSION,
};
use crate::blocking::blocking;
use crate::store::paths;

/// A host agent that does not answer within this is passed over. It is a local process
/// whose loop never blocks.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Most bytes of an answer in JSON: a host with 2,000 instances needs 2 MiB.
const MAX_ANSWER: usize = 16 << 20;

/// Bytes of a package that are sent at once.
const CHUNK: usize = 64 * 1024;

/// Body of a request.
type Body = UnsyncBoxBody<Bytes, io::Error>;

type BoxedError = Box<dyn std::error::Error + Send + Sync>;

/// Why a deployment could not be found or a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The runtime directory cannot be read, or others can write to it: no socket in it is
    /// trusted then.
    #[error("cannot list running deployments in {}", directory.display())]
    List {
        /// The directory.
        directory: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No running deployment has the instance.
    #[error("no running instance is named {name}")]
    NotFound {
        /// The given name.
        name: String,
        /// Running instances, as `<deployment prefix>/<instance>`.
        running: Vec<String>,
    },
    /// Several deployments have it.
    #[error("{name} runs in {} deployments", matches.len())]
    Ambiguous {
        /// The given name.
        name: String,
        /// The candidates, as `<deployment prefix>/<instance>`.
        matches: Vec<String>,
    },
    /// The host agent has ended or does not answer.
    #[error("the host agent behind {} does not answer", socket.display())]
    Unreachable {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: BoxedError,
    },
    /// The answer is not one of this version: the host agent is older than the versions.
    #[error(
        "the host agent behind {} answers in another version of the protocol than this program \
         ({PROGRAM})", socket.display()
    )]
    Version {
        /// Its socket.
        socket: PathBuf,
    },
    /// The request cannot be written.
    #[error("the request cannot be sent: {0}")]
    Invalid(String),
    /// The host agent refused the request.
    #[error("{message}")]
    Refused {
        /// Class of the error.
        kind: RefusalKind,
        /// The error chain of the host agent.
        message: String,
    },
}

/// A deployment that runs, and the socket to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningDeployment {
    /// The socket.
    pub socket: PathBuf,
    /// What its host agent says about it.
    pub info: DeploymentInfo,
}

/// An instance by its deployment's socket and its full name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceTarget {
    /// The deployment's socket.
    pub socket: PathBuf,
    /// The deployment's id.
    pub deployment: String,
    /// Instance name within the deployment.
    pub instance: String,
}

impl InstanceTarget {
    /// Its path below the version.
    pub fn path(&self) -> String {
        format!(
            "deployments/{}/instances/{}",
            self.deployment, self.instance
        )
    }
}

/// Every deployment of this user whose host agent answers, sorted by its id. Sockets of host
/// agents that are gone are passed over.
pub async fn list(runtime: &Path) -> Result<Vec<RunningDeployment>, ClientError> {
    let failed = |source| ClientError::List {
        directory: runtime.to_owned(),
        source,
    };
    match paths::check_own(runtime) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    }
    let entries = std::fs::read_dir(runtime).map_err(failed)?;
    let mut running = Vec::new();
    for entry in entries {
        let socket = entry.map_err(failed)?.path();
        if socket
            .extension()
            .is_none_or(|extension| extension != "sock")
        {
            continue;
        }
        let asked = tokio::time::timeout(ANSWER_LIMIT, ask_deployments(&socket)).await;
        match asked {
            Ok(Ok(found)) => running.extend(found.into_iter().map(|info| RunningDeployment {
                socket: socket.clone(),
                info,
            })),
            // It runs, but speaks another version.
            Ok(Err(error @ (ClientError::Refused { .. } | ClientError::Version { .. }))) => {
                tracing::warn!(socket = %socket.display(), "skipped: {error}");
            }
            Ok(Err(error)) => {
                tracing::debug!(socket = %socket.display(), %error, "skipped");
            }
            Err(_) => {
                tracing::warn!(socket = %socket.display(), "does not answer; skipped");
            }
        }
    }
    running.sort_by(|a, b| a.info.deployment.cmp(&b.info.deployment));
    Ok(running)
}

/// Finds `name`: an instance, or `<deployment prefix>/<instance>`.
pub fn find(running: &[RunningDeployment], name: &str) -> Result<InstanceTarget, ClientError> {
    let (prefix, instance) = name.split_once('/').unwrap_or(("", name));
    let all = || {
        running.iter().flat_map(|deployment| {
            let instances = deployment.info.instances.iter();
            instances.map(move |instance| (deployment, instance.name.as_str()))
        })
    };
    let label = |(deployment, instance): (&RunningDeployment, &str)| {
        let id = &deployment.info.deployment;
        format!("{}/{instance}", id.get(..8).unwrap_or(id))
    };
    let matches: Vec<_> = all()
        .filter(|(deployment, candidate)| {
            *candidate == instance && deployment.info.deployment.starts_with(prefix)
        })
        .collect();
    match matches.as_slice() {
        [(deployment, instance)] => Ok(InstanceTarget {
            socket: deployment.socket.clone(),
            deployment: deployment.info.deployment.clone(),
            instance: (*instance).to_owned(),
        }),
        [] => Err(ClientError::NotFound {
            name: name.to_owned(),
            running: all().map(label).collect(),
        }),
        _ => Err(ClientError::Ambiguous {
            name: name.to_owned(),
            matches: matches.into_iter().map(label).collect(),
        }),
    }
}

/// The protocol's reading half after an upgrade.
pub type ExecReader = FrameReader<ReadHalf<TokioIo<Upgraded>>>;
/// The protocol's writing half after an upgrade.
pub type ExecWriter = WriteHalf<TokioIo<Upgraded>>;

async fn ask_deployments(socket: &Path) -> Result<Vec<DeploymentInfo>, ClientError> {
    let mut client = Client::connect(socket).await?;
    let found: Deployments = client.get("deployments").await?;
    Ok(found.deployments)
}

/// A connection to a host agent.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    sender: SendRequest<Body>,
}

/// The bytes of a long answer, such as a log, as they arrive.
#[derive(Debug)]
pub struct BodyBytes {
    socket: PathBuf,
    body: Incoming,
    // The connection ends with it.
    _client: Client,
}

impl Client {
    /// Connects to `socket`.
    pub async fn connect(socket: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|error| ClientError::unreachable(socket, error))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| ClientError::unreachable(socket, error))?;
        tokio::spawn(async move {
            // What uses the connection reports its error.
            let _ = connection.with_upgrades().await;
        });
        Ok(Self {
            socket: socket.to_owned(),
            sender,
        })
    }

    /// `GET`s a resource below the version.
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ClientError> {
        let answer = self.call(Method::GET, path, empty(), &[]).await?;
        self.read(answer).await
    }

    /// `DELETE`s a resource below the version.
    pub async fn delete<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ClientError> {
        let answer = self.call(Method::DELETE, path, empty(), &[]).await?;
        self.read(answer).await
    }

    /// `PUT`s `body` to a resource below the version.
    pub async fn put<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let answer = self.call(Method::PUT, path, json(body), &JSON).await?;
        self.read(answer).await
    }

    /// `PUT`s the content of a file to a resource below the version.
    pub async fn upload<T: DeserializeOwned>(
        &mut self,
        path: &str,
        file: File,
    ) -> Result<T, ClientError> {
        let body = StreamBody::new(try_unfold(file, next_chunk)).boxed_unsync();
        let answer = self.call(Method::PUT, path, body, &[]).await?;
        self.read(answer).await
    }

    /// `POST`s `body` to a resource below the version.
    pub async fn post<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let answer = self.call(Method::POST, path, json(body), &JSON).await?;
        self.read(answer).await
    }

    /// Opens the events of the host.
    pub async fn events(mut self, query: &EventQuery) -> Result<EventStream, ClientError> {
        let path = format!("events?{}", query_text(query));
        let answer = self.call(Method::GET, &path, empty(), &[]).await?;
        Ok(EventStream::new(self.body(answer)))
    }

    /// The metrics of the host, as Prometheus text.
    pub async fn metrics(mut self) -> Result<String, ClientError> {
        let answer = self.send(Method::GET, "/metrics", empty(), &[]).await?;
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| ClientError::unreachable(&self.socket, error))?;
        Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
    }

    /// Opens a log of an instance.
    pub async fn logs(
        mut self,
        target: &InstanceTarget,
        query: LogQuery,
    ) -> Result<BodyBytes, ClientError> {
        let LogQuery { source, follow } = query;
        let path = format!(
            "{}/logs?source={}&follow={follow}",
            target.path(),
            source.name()
        );
        let answer = self.call(Method::GET, &path, empty(), &[]).await?;
        Ok(self.body(answer))
    }

    fn body(self, answer: Answer<Incoming>) -> BodyBytes {
        BodyBytes {
            socket: self.socket.clone(),
            body: answer.into_body(),
            _client: self,
        }
    }

    /// Starts a program in a guest. The frames of its session follow.
    pub async fn exec(
        mut self,
        target: &InstanceTarget,
        exec: &ExecRequest,
    ) -> Result<(ExecReader, ExecWriter), ClientError> {
        let path = format!("{}/exec", target.path());
        let [content] = JSON;
        let headers = [(CONNECTION, "upgrade"), (UPGRADE, EXEC_PROTOCOL), content];
        let answer = self.call(Method::POST, &path, json(exec), &headers).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.version());
        }
        let upgraded = hyper::upgrade::on(answer).await;
        let upgraded = upgraded.map_err(|error| ClientError::unreachable(&self.socket, error))?;
        let (reader, writer) = tokio::io::split(TokioIo::new(upgraded));
        Ok((FrameReader::new(reader), writer))
    }

    /// Sends a request; an answer that is not a success becomes an error.
    async fn call(
        &mut self,
        method: Method,
        path: &str,
        body: Body,
        headers: &[(HeaderName, &'static str)],
    ) -> Result<Answer<Incoming>, ClientError> {
        let uri = format!("/{VERSION}/{path}");
        self.send(method, &uri, body, headers).await
    }

    /// The same of a path that has no version.
    async fn send(
        &mut self,
        method: Method,
        uri: &str,
        body: Body,
        headers: &[(HeaderName, &'static str)],
    ) -> Result<Answer<Incoming>, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(uri)
            .header(HOST, "host-agent");
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let request = request
            .body(body)
            .map_err(|error| ClientError::Invalid(error.to_string()))?;
        let sent = self.sender.send_request(request).await;
        let answer = sent.map_err(|error| self.lost(error))?;
        let status = answer.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(answer);
        }
        let Problem { kind, message, .. } = self.read(answer).await?;
        Err(match kind {
            RefusalKind::NoSuchPath | RefusalKind::NoSuchMethod => self.version(),
            kind => ClientError::Refused { kind, message },
        })
    }

    async fn read<T: DeserializeOwned>(&self, answer: Answer<Incoming>) -> Result<T, ClientError> {
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| ClientError::unreachable(&self.socket, error))?;
        serde_json::from_slice(&body.to_bytes()).map_err(|_| self.version())
    }

    /// The connection was lost. A host agent of a version without HTTP answers with bytes
    /// that are not HTTP.
    fn lost(&self, error: hyper::Error) -> ClientError {
        if error.is_parse() {
            return self.version();
        }
        ClientError::unreachable(&self.socket, error)
    }

    fn version(&self) -> ClientError {
        ClientError::Version {
            socket: self.socket.clone(),
        }
    }
}

impl BodyBytes {
    /// The error of bytes that are not what this version answers.
    pub(super) fn version(&self) -> ClientError {
        ClientError::Version {
            socket: self.socket.clone(),
        }
    }

    /// The next bytes; `None` at the end. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let Some(frame) = self.body.frame().await else {
                return Ok(None);
            };
            let frame = frame.map_err(|error| ClientError::unreachable(&self.socket, error))?;
            if let Ok(bytes) = frame.into_data() {
                return Ok(Some(bytes));
            }
        }
    }
}

impl ClientError {
    fn unreachable(socket: &Path, source: impl Into<BoxedError>) -> Self {
        Self::Unreachable {
            socket: socket.to_owned(),
            source: source.into(),
        }
    }
}

/// Header of a body in JSON.
const JSON: [(HeaderName, &str); 1] = [(CONTENT_TYPE, "application/json")];

fn json(body: &impl Serialize) -> Body {
    let text = serde_json::to_vec(body).expect("requests are JSON");
    whole(text.into())
}

fn empty() -> Body {
    whole(Bytes::new())
}

fn whole(bytes: Bytes) -> Body {
    let body = Full::new(bytes);
    body.map_err(|never| match never {}).boxed_unsync()
}

/// Reads the next bytes of a file.
async fn next_chunk(mut file: File) -> io::Result<Option<(Frame<Bytes>, File)>> {
    let read = blocking(move || {
        let mut bytes = Vec::with_capacity(CHUNK);
        let read = file.by_ref().take(CHUNK as u64).read_to_end(&mut bytes);
        read.map(|_| (bytes, file))
    });
    let (bytes, file) = read.await.map_err(io::Error::other)??;
    Ok((!bytes.is_empty()).then(|| (Frame::data(bytes.into()), file)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::InstanceInfo;
    use crate::supervisor::status::InstanceStatus;

    fn running(deployment: &str, instances: &[&str]) -> RunningDeployment {
        let instances = instances.iter().map(|name| InstanceInfo {
            status: InstanceStatus::default(),
            name: (*name).into(),
            state: "Ready".into(),
            generation: 1,
            incarnation: 1,
            uptime_ms: 1,
            vmm_pid: None,
            endpoints: Vec::new(),
        });
        RunningDeployment {
            socket: format!("/run/{deployment}.sock").into(),
            info: DeploymentInfo {
                deployment: deployment.into(),
                service: "s".into(),
                pid: 1,
                instances: instances.collect(),
            },
        }
    }

    #[test]
    fn an_instance_is_found_by_name_and_deployment_prefix() {
        let all = [
            running("aaaaaaaabbbb", &["Web_IN_0", "Cache_IN_0"]),
            running("aaaaccccdddd", &["Cache_IN_0"]),
        ];
        let found = find(&all, "Web_IN_0").unwrap();
        assert_eq!(found.socket, Path::new("/run/aaaaaaaabbbb.sock"));
        let found = find(&all, "aaaac/Cache_IN_0").unwrap();
        assert_eq!(found.socket, Path::new("/run/aaaaccccdddd.sock"));
        assert_eq!(found.instance, "Cache_IN_0");
        for name in ["Cache_IN_0", "aaaa/Cache_IN_0"] {
            let Err(ClientError::Ambiguous { matches, .. }) = find(&all, name) else {
                panic!("{name} is not ambiguous");
            };
            assert_eq!(matches, ["aaaaaaaa/Cache_IN_0", "aaaacccc/Cache_IN_0"]);
        }
        let Err(ClientError::NotFound { running, .. }) = find(&all, "Web_IN_1") else {
            panic!("Web_IN_1 was found");
        };
        assert_eq!(running.len(), 3);
    }

    fn with_mode(mode: u32) -> tempfile::TempDir {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        let mut builder = tempfile::Builder::new();
        builder.permissions(mode).tempdir().unwrap()
    }

    #[tokio::test]
    async fn a_socket_without_a_server_is_passed_over() {
        let directory = with_mode(0o700);
        let socket = directory.path().join("dead.sock");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        assert_eq!(list(directory.path()).await.unwrap(), []);
        let absent = directory.path().join("absent");
        assert_eq!(list(&absent).await.unwrap(), []);
    }

    #[tokio::test]
    async fn sockets_in_a_directory_open_to_others_are_not_tried() {
        let directory = with_mode(0o755);
        let socket = directory.path().join("theirs.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let Err(ClientError::List { source, .. }) = list(directory.path()).await else {
            panic!("it was read");
        };
        assert_eq!(source.kind(), io::ErrorKind::PermissionDenied);
        let asked = listener.accept().map_err(|error| error.kind());
        assert_eq!(asked.unwrap_err(), io::ErrorKind::WouldBlock);
    }
}
