//! The API of a host agent: HTTP with JSON on a Unix socket.

pub mod agents;
pub mod changes;
pub mod client;
pub mod event_stream;
mod events;
mod exec;
pub mod gc;
pub mod guard;
pub(crate) mod listener;
mod logs;
pub(crate) mod metrics;
pub(crate) mod request;
mod routes;
pub mod server;
mod services;
pub mod types;
