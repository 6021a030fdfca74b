//! The long-lived part of the host agent: keeps each instance at its goal.

pub mod event;
pub mod heartbeat;
pub mod restart;
