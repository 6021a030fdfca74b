//! Tests of the program that need no guest: they run on any machine.

mod costly_files;
mod disk_full;
mod first_service;
mod memory;
mod no_kvm;
mod packages;
mod signals;
mod unsupported;
