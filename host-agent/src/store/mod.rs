//! The files of the host agent: images, deployments, logs.

pub mod content;
pub mod deployment;
pub mod image;
pub mod janitor;
pub mod log_tail;
pub mod paths;
