//! The API of a host agent: messages, server and client.

pub mod client;
pub mod server;
pub mod types;
