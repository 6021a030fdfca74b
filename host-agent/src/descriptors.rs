//! How many files this process may have open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard one. Each connection of a guest takes a
/// descriptor of the VMM process and two of the supervisor, and the usual soft
/// limit of 1,024 is there for programs that call `select`, which none of ours
/// does. If it cannot be raised, connections are refused earlier.
pub fn raise_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
