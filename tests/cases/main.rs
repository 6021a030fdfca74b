//! End-to-end tests. `scripts/test` gives them a machine with a usable KVM.

mod adoption;
mod agent;
mod bad_input;
mod boot;
mod commands;
mod debian;
mod disk;
mod disk_full;
mod exits;
mod heartbeat;
mod killed;
mod limits;
mod machine;
mod many_guests;
mod output;
mod probe;
mod role_limits;
mod rollout;
mod sandbox;
mod serve;
mod service;
mod stop;
mod terminal;
mod tunnel;
mod updates;
