//! Tests of the program that need no guest image: they run on any machine.

mod access;
mod api;
mod configuration;
mod costly_files;
mod daemon;
mod descriptors;
mod disk_full;
mod evil_guest;
mod exhausted;
mod first_service;
mod hangup;
mod memory;
mod no_kvm;
mod packages;
mod page;
mod processes;
mod security_page;
mod signals;
mod terminal_output;
mod test_runner;
mod unsupported;
