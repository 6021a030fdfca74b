//! The long-lived part of the host agent: keeps each instance at its goal.
//!
//! Policy is pure: [`plan`], [`lifecycle`], [`liveness`], [`restart`]. The `instance`
//! actor performs what it decides.

pub mod admission;
pub mod agents;
pub mod deploy;
pub mod event;
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
