//! The host agent: reads a service, runs one guest per role instance, and
//! keeps each at its goal state.
//!
//! Dependencies point one way: `cli` → `api` → `controller` → `supervisor` → `channels`,
//! `endpoints`, `store`, `service`. `vmm` is everything inside a VMM process
//! and imports nothing above it; the two sides meet in [`vmm::spec`],
//! [`vmm::control`] and [`vmm::wire`], and `supervisor` makes disks with
//! [`vmm::disk::create_diff`].

pub mod api;
mod blocking;
pub mod cgroup;
pub mod channels;
pub mod child;
pub mod cli;
mod closer;
pub mod config;
pub mod controller;
pub mod descriptors;
pub mod digest;
pub mod dispositions;
pub mod doctor;
mod duration;
pub mod endpoints;
mod event_budget;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod guest_stream;
pub mod page;
pub mod printable;
pub mod progress;
#[cfg(test)]
mod property;
mod queued_writer;
pub mod service;
pub mod shell;
pub mod store;
pub mod supervisor;
pub mod token_bucket;
mod until;
pub mod vmm;
mod wall_clock;
