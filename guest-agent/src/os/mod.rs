//! The guest's operating system: mounts, modules, disks, users, quotas.

pub mod boot;
pub mod cgroup;
pub mod child;
pub mod disk;
pub mod limits;
pub mod loopback;
pub mod power;
pub mod quota;
pub mod remove;
pub mod system_calls;
pub mod terminal;
pub mod user;
