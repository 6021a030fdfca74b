//! The status page: HTML from the state of the host and from the store, beside the API on the
//! socket of `serve`, and when asked on loopback TCP.

mod action;
mod actions;
mod assets;
mod data;
mod gate;
mod plot;
mod routes;
mod samples;
mod sessions;
mod states;
pub mod tcp;
mod views;

pub use routes::router;
