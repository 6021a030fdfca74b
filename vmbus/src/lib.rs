//! The VMBus: what the host agent and the agents in a guest agree on.
//!
//! The bus is a set of named [`channel`]s over one virtio-vsock device. Control
//! channels carry [`frame`]s (a length and a JSON document) of one typed
//! [`message`] set each; the streams of `exec` are [`piece`]s of raw bytes in frames;
//! tunnels carry raw bytes. A channel begins with
//! [`version`] negotiation. Bytes in, values out: this crate opens nothing. Only
//! `stream` (feature `tokio`) and `agent_signature` (feature `agent-package`) read or write
//! what they are given.
#![forbid(unsafe_code)]

pub mod agent_package;
#[cfg(feature = "agent-package")]
pub mod agent_signature;
pub mod channel;
pub mod environment;
pub mod frame;
pub mod launch;
pub mod message;
pub mod piece;
pub mod role;
#[cfg(feature = "tokio")]
pub mod stream;
pub mod text;
pub mod version;
