//! The VMM process: one guest and its devices.
//!
//! The process receives open file descriptors and a [`spec::GuestSpec`] on an
//! inherited socket ([`control`]) and opens nothing itself. [`process`] starts it,
//! [`sandbox`] is what it gives up, `event_loop` is its main thread, `peers` are its
//! supervisors.

mod acpi;
mod boot;
mod bus;
pub mod control;
mod cpu;
pub mod disk;
mod disk_watch;
mod event_loop;
mod exit_report;
mod guest_events;
mod layout;
mod machine;
mod memory;
mod outbox;
mod peers;
pub mod process;
pub mod sandbox;
mod serial;
#[cfg(test)]
mod smaps;
pub mod spec;
mod start_code;
mod teardown;
mod vcpu;
mod vcpu_pause;
pub mod virtio;
mod vm;
pub mod wire;
