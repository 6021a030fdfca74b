//! The messages on the socket of a host.
//!
//! A connection carries one [`Call`] as a VMBus frame, then [`Response`] frames. After
//! [`Response::Ok`] to [`Request::Exec`] the connection carries
//! [`vmbus::message::ExecInput`] frames to the host and [`vmbus::message::ExecOutput`]
//! frames back.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use vmbus::frame::{self, FrameError, Message};
use vmbus::message::ExecRequest;
use vmbus::piece;

use crate::supervisor::status::InstanceStatus;

/// Version of the messages on this socket, those of exec included. A program of another
/// version is refused, in words that both versions know: [`Response::Error`].
pub const VERSION: u32 = 1;

/// Version of this program, for messages.
pub const PROGRAM: &str = env!("CARGO_PKG_VERSION");

/// Most bytes in one [`Response::LogChunk`].
pub const MAX_CHUNK: usize = 64 * 1024;

/// A request of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// List the deployments. Answered by [`Response::Deployments`].
    Ps {},
    /// Run a program in a guest. Answered by [`Response::Ok`] or
    /// [`Response::Error`]; see the module.
    Exec {
        /// Instance name.
        instance: String,
        /// What to run.
        exec: ExecRequest,
    },
    /// Read a log from its beginning. Answered by [`Response::LogChunk`]s and
    /// [`Response::LogEnd`].
    Logs {
        /// Instance name.
        instance: String,
        /// Which log.
        source: LogFile,
        /// Continue with what is appended, until the deployment ends.
        follow: bool,
    },
    /// Stop the vCPUs, or let them run again. Answered by [`Response::Ok`].
    Pause {
        /// Instance name.
        instance: String,
        /// Whether to stop them.
        paused: bool,
    },
}

/// A log of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFile {
    /// Standard output and error of the role.
    Role,
    /// The agents in the guest.
    Agent,
    /// The guest's serial console.
    Serial,
}

impl LogFile {
    /// Name of the file in the instance's directory.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Role => "role.log",
            Self::Agent => "agent.log",
            Self::Serial => "serial.log",
        }
    }
}

/// An answer of the host: JSON, except for the bytes of a log, which are a
/// [`vmbus::piece`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// The request succeeded, or has started.
    Ok {},
    /// The request failed. The last frame.
    Error {
        /// Class of the error.
        kind: RefusalKind,
        /// The error chain.
        message: String,
    },
    /// Answer to [`Request::Ps`].
    Deployments {
        /// Every deployment of this host.
        deployments: Vec<DeploymentInfo>,
    },
    /// A piece of a log, 1 to [`MAX_CHUNK`] bytes.
    #[serde(skip)]
    LogChunk {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The log ends here.
    LogEnd {},
}

/// The first frame of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Call {
    /// A request of this version.
    Request(Request),
    /// The client speaks another version.
    OtherVersion(Speaker),
}

/// What a client speaks. Later versions keep both fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speaker {
    /// Its [`VERSION`]; 0 of programs that sent none.
    #[serde(default)]
    pub version: u32,
    /// Its [`PROGRAM`].
    #[serde(default)]
    pub program: String,
}

#[derive(Serialize)]
struct Sent<'a> {
    #[serde(flatten)]
    speaker: Speaker,
    #[serde(flatten)]
    request: &'a Request,
}

impl Speaker {
    /// This program.
    pub fn own() -> Self {
        Self {
            version: VERSION,
            program: PROGRAM.to_owned(),
        }
    }
}

impl Message for Call {
    fn write(&self, body: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Request(request) => {
                let speaker = Speaker::own();
                frame::write_json(&Sent { speaker, request }, body)
            }
            Self::OtherVersion(speaker) => frame::write_json(speaker, body),
        }
    }

    fn read(body: &[u8]) -> Result<Self, FrameError> {
        let speaker: Speaker = frame::parse(body)?;
        if speaker.version != VERSION {
            return Ok(Self::OtherVersion(speaker));
        }
        frame::parse(body).map(Self::Request)
    }
}

impl Message for Response {
    fn write(&self, body: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::LogChunk { bytes } => piece::write(body, piece::LOG, bytes, MAX_CHUNK),
            other => frame::write_json(other, body),
        }
    }

    fn read(body: &[u8]) -> Result<Self, FrameError> {
        if let Some(bytes) = piece::read(body, piece::LOG, MAX_CHUNK)? {
            return Ok(Self::LogChunk { bytes });
        }
        frame::parse(body)
    }
}

/// Classes of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// No such instance on this host.
    NotFound,
    /// The instance or its agent cannot be reached now.
    Unreachable,
    /// The request is invalid.
    Invalid,
    /// Anything else.
    Internal,
}

/// A deployment that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentInfo {
    /// 32 hexadecimal digits.
    pub deployment: String,
    /// Name of the service.
    pub service: String,
    /// Process id of the host agent.
    pub pid: u32,
    /// Its instances.
    pub instances: Vec<InstanceInfo>,
}

/// An instance of a running deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// `<Role>_IN_<n>`.
    pub name: String,
    /// [`InstanceStatus::word`].
    pub state: String,
    /// The whole state.
    pub status: InstanceStatus,
    /// Number of the guest's boot.
    pub generation: u64,
    /// Milliseconds since the deployment was accepted.
    pub uptime_ms: u64,
    /// Process id of the VMM, while there is one.
    pub vmm_pid: Option<u32>,
    /// Published endpoints.
    pub endpoints: Vec<EndpointInfo>,
}

/// A published endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointInfo {
    /// Endpoint name.
    pub name: String,
    /// Address on the host.
    pub address: SocketAddr,
    /// Port in the guest.
    pub local_port: u16,
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_of_a_log_are_sent_unchanged(bytes in vec(any::<u8>(), 1..200)) {
            let chunk = Response::LogChunk { bytes: bytes.clone() };
            let frame = frame::encode(&chunk).unwrap();
            prop_assert_eq!(&frame[frame::HEADER + 1..], &bytes);
            prop_assert_eq!(Response::read(&frame[frame::HEADER..]).unwrap(), chunk);
        }

        #[test]
        fn no_input_makes_the_readers_of_the_socket_panic(body in vec(any::<u8>(), 0..200)) {
            let _ = Call::read(&body);
            let _ = Response::read(&body);
        }
    }

    #[test]
    fn chunks_are_bounded_and_never_json() {
        let encode = |length| {
            let bytes = vec![255; length];
            frame::encode(&Response::LogChunk { bytes })
        };
        assert!(encode(MAX_CHUNK).is_ok());
        assert!(encode(MAX_CHUNK + 1).is_err() && encode(0).is_err());
        let long = vec![piece::LOG; MAX_CHUNK + 2];
        assert!(Response::read(&long).is_err());
        let json = br#"{"response":"log-chunk","bytes":[1]}"#;
        assert!(Response::read(json).is_err());
    }

    #[test]
    fn the_wire_format_does_not_change() {
        let call = Call::Request(Request::Logs {
            instance: "Cache_IN_0".into(),
            source: LogFile::Serial,
            follow: true,
        });
        let mut body = Vec::new();
        call.write(&mut body).unwrap();
        let sent = format!(
            r#"{{"version":1,"program":"{PROGRAM}","request":"logs","instance":"Cache_IN_0","source":"serial","follow":true}}"#
        );
        assert_eq!(String::from_utf8_lossy(&body), sent);
        assert_eq!(Call::read(&body).unwrap(), call);
        let answer = Response::Error {
            kind: RefusalKind::NotFound,
            message: "no".into(),
        };
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"response":"error","kind":"not-found","message":"no"}"#
        );
    }

    #[test]
    fn a_request_of_another_version_is_recognized_whatever_it_asks() {
        for (body, version) in [
            (r#"{"request":"ps"}"#, 0),
            (r#"{"version":2,"program":"9.9","request":"future"}"#, 2),
        ] {
            let Call::OtherVersion(speaker) = Call::read(body.as_bytes()).unwrap() else {
                panic!("{body} was taken");
            };
            assert_eq!(speaker.version, version);
        }
    }
}
