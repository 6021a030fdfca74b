//! Everything inside a VMM process: one guest, its devices, its exits.
//!
//! The process receives open file descriptors and a [`spec::GuestSpec`] on an
//! inherited socket ([`control`]) and opens nothing itself.

pub mod control;
pub mod spec;
pub mod virtio;
pub mod wire;
