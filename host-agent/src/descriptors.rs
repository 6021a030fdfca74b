//! The limit of open descriptors of this process (`RLIMIT_NOFILE`).

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard limit. Each connection of a guest takes one
/// descriptor of the VMM process and two of the supervisor. The usual soft limit
/// of 1,024 protects programs that call `select(2)`, and this one does not. If
/// the limit cannot be raised, connections are refused earlier.
pub fn raise_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
