//! What a VMM process gives up before its guest runs.
//!
//! A guest that takes over its VMM process finds no privileges ([`privileges`]), an
//! empty file system and network ([`namespaces`]), no right to open or connect to
//! anything ([`ruleset`]), and in each thread only the system calls that the
//! thread's duty needs ([`filter`]). The process has received every descriptor
//! before, so it needs no path.
//!
//! [`enter`] comes first and covers the whole process: threads inherit it, so it is
//! called while there is one thread. Where the kernel refuses a layer, the process
//! runs without it and [`SandboxReport`] names the layer and the reason.

mod namespaces;
mod privileges;
mod report;
mod ruleset;
#[cfg(test)]
mod tests;

pub use privileges::{leave_session, limit_file_size};
pub use report::{Layer, LayerState, SandboxReport};

/// Gives up privileges and the view of the host. Call this in a process with one
/// thread that needs no path any more.
pub fn enter() -> SandboxReport {
    let mut report = SandboxReport::default();
    let separated = namespaces::enter();
    privileges::empty_bounding_set();
    // Only root has several users to choose from, and only in the host's own user
    // namespace does the choice take something away.
    let own_user = match &separated {
        Ok(namespaces::Separated { new_user: true }) => false,
        _ => nix::unistd::Uid::effective().is_root(),
    };
    if own_user {
        report.add(Layer::OwnUser, privileges::take_own_user());
    }
    report.add(Layer::NoPrivileges, privileges::drop_all());
    report.add(Layer::Namespaces, separated.map(|_| None));
    // Last: it forbids mounts.
    report.add(Layer::Landlock, ruleset::apply());
    report
}
