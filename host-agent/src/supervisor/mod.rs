//! The long-lived part of the host agent: keeps each instance at its goal.
//!
//! Policy is in the pure files ([`lifecycle`], [`heartbeat`], [`restart`],
//! [`goal`]).

pub mod event;
pub mod goal;
pub mod heartbeat;
pub mod lifecycle;
pub mod process;
pub mod restart;
