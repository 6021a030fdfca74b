//! How commands talk to a running deployment: types and client, no decisions.

pub mod client;
pub mod server;
pub mod types;
