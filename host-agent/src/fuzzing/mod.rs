//! Fuzz targets: functions that take any bytes, and panic only if there is a bug.
//!
//! `fuzz/` calls them with libFuzzer, and a unit test with the inputs of
//! `fuzz/corpus` and mutations of them.

// As in tests: what does not fail outside of a bug may panic.
#![allow(clippy::unwrap_used)]

mod devices;
mod files;
mod input;
mod messages;
#[cfg(test)]
mod tests;

pub use devices::{block_requests, mmio_state, queue_chains, vsock_packets};
pub use files::{agent_package, package, qcow2_open, xml};
pub use messages::{bus_frames, control_events};
