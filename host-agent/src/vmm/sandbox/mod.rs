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

mod filter;
#[cfg(test)]
mod filter_tests;
mod namespaces;
mod privileges;
pub mod probe;
mod report;
mod rules;
mod ruleset;
#[cfg(test)]
mod tests;
mod threads;

pub use filter::FilterError;
pub use privileges::{leave_session, limit_file_size};
pub use report::{Layer, LayerState, SandboxReport};
pub use rules::ThreadClass;
pub use threads::{filter_this, spawn};

/// Gives up privileges and the view of the host. Call this in a process with one
/// thread that needs no path any more. Every thread is then started by [`spawn`]
/// and has a filter from its start; the calling one gets its own by [`filter_this`]
/// when it has started the last of them.
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
    let user = own_user.then(privileges::take_own_user);
    report.add(Layer::NoPrivileges, privileges::drop_all());
    if let Some(user) = user {
        report.add(Layer::OwnUser, user);
    }
    report.add(Layer::Namespaces, separated.map(|_| None));
    // After the namespaces: it forbids mounts.
    report.add(Layer::Landlock, ruleset::apply());
    report.add(Layer::Filters, threads::require_filters());
    report
}
