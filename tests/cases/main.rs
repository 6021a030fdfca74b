//! End-to-end tests. `scripts/test` gives them a machine with a usable KVM.

mod agent;
mod bad_input;
mod boot;
mod disk;
mod exits;
mod heartbeat;
mod limits;
mod machine;
mod output;
mod terminal;
mod tunnel;
