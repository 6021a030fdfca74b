//! The files of the host agent: images, packages, deployments, logs, and what was asked for.

pub mod agents;
pub mod audit;
pub mod changes;
pub mod content;
pub mod database;
pub mod deployment;
pub mod events;
pub mod garbage;
pub mod good_copy;
pub mod image;
pub mod janitor;
pub mod log_tail;
pub mod packages;
pub mod paths;
pub mod rollouts;
pub mod services;
