//! Finds the deployments of this user and sends them requests.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use vmbus::stream::{FrameReader, StreamError, send};

use super::types::{Call, DeploymentInfo, PROGRAM, RefusalKind, Request, Response};
use crate::store::paths;

/// A host agent that does not answer within this is passed over. It is a local process
/// whose loop never blocks.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

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
        source: StreamError,
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
    /// Its answer to [`Request::Ps`].
    pub info: DeploymentInfo,
}

/// An instance by its deployment's socket and its full name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceTarget {
    /// The deployment's socket.
    pub socket: PathBuf,
    /// Instance name within the deployment.
    pub instance: String,
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
        let asked = tokio::time::timeout(ANSWER_LIMIT, ask_ps(&socket)).await;
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

async fn ask_ps(socket: &Path) -> Result<Vec<DeploymentInfo>, ClientError> {
    let mut connection = Connection::open(socket, &Request::Ps {}).await?;
    match connection.answer().await? {
        Response::Deployments { deployments } => Ok(deployments),
        _ => Err(connection.broken("answered with something else")),
    }
}

/// An open request.
#[derive(Debug)]
pub struct Connection {
    socket: PathBuf,
    reader: FrameReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Connection {
    /// Connects to `socket` and sends `request`.
    pub async fn open(socket: &Path, request: &Request) -> Result<Self, ClientError> {
        let unreachable = |source| ClientError::Unreachable {
            socket: socket.to_owned(),
            source,
        };
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|error| unreachable(error.into()))?;
        let (reader, mut writer) = stream.into_split();
        // A host agent that refuses at once may close before it has read the call: its answer
        // says why.
        let call = Call::Request(request.clone());
        match send(&mut writer, &call).await {
            Err(StreamError::Io(_)) | Ok(()) => {}
            Err(error) => return Err(unreachable(error)),
        }
        Ok(Self {
            socket: socket.to_owned(),
            reader: FrameReader::new(reader),
            writer,
        })
    }

    /// The next answer; [`Response::Error`] becomes [`ClientError::Refused`].
    pub async fn answer(&mut self) -> Result<Response, ClientError> {
        match self.reader.next().await {
            Ok(Some(Response::Error { kind, message })) => {
                Err(ClientError::Refused { kind, message })
            }
            Ok(Some(response)) => Ok(response),
            Ok(None) => Err(self.broken("closed the connection")),
            Err(StreamError::Frame(_)) => Err(ClientError::Version {
                socket: self.socket.clone(),
            }),
            Err(source) => Err(self.unreachable(source)),
        }
    }

    /// Waits for [`Response::Ok`].
    pub async fn accepted(&mut self) -> Result<(), ClientError> {
        match self.answer().await? {
            Response::Ok {} => Ok(()),
            _ => Err(self.broken("answered with something else")),
        }
    }

    /// The two halves, for what follows an accepted [`Request::Exec`].
    pub fn into_parts(self) -> (FrameReader<OwnedReadHalf>, OwnedWriteHalf) {
        (self.reader, self.writer)
    }

    fn broken(&self, what: &'static str) -> ClientError {
        self.unreachable(io::Error::new(io::ErrorKind::UnexpectedEof, what).into())
    }

    fn unreachable(&self, source: StreamError) -> ClientError {
        ClientError::Unreachable {
            socket: self.socket.clone(),
            source,
        }
    }
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
