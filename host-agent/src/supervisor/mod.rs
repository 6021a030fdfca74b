//! The long-lived part of the host agent: keeps each instance at its goal.
//!
//! Policy is in the pure files ([`lifecycle`], [`liveness`], [`restart`],
//! [`goal`]); the `instance` actor performs what they decide.

pub mod deploy;
pub mod event;
pub mod goal;
pub mod guest;
pub mod host;
pub mod instance;
pub mod lifecycle;
pub mod liveness;
pub mod plan;
pub mod process;
pub mod restart;
pub mod spec;
pub mod status;
pub mod timeline;
