//! Where things live: data directory and run-time directory.

use std::env;
use std::path::PathBuf;

use nix::unistd::Uid;

/// Images and deployments: `HOST_AGENT_DATA_DIR`, else `host-agent` under
/// `XDG_DATA_HOME` or `~/.local/share`.
pub fn data_dir() -> PathBuf {
    if let Some(dir) = set("HOST_AGENT_DATA_DIR") {
        return dir;
    }
    if let Some(dir) = set("XDG_DATA_HOME") {
        return dir.join("host-agent");
    }
    let home = set("HOME").unwrap_or_else(|| PathBuf::from("/"));
    home.join(".local/share/host-agent")
}

/// Sockets: `host-agent` under `XDG_RUNTIME_DIR`, `/run` for root, else a
/// directory of the user's own in `/tmp`. Short, since socket paths are.
pub fn runtime_dir() -> PathBuf {
    if let Some(dir) = set("XDG_RUNTIME_DIR") {
        return dir.join("host-agent");
    }
    let uid = Uid::effective();
    if uid.is_root() {
        PathBuf::from("/run/host-agent")
    } else {
        PathBuf::from(format!("/tmp/host-agent-{uid}"))
    }
}

fn set(name: &str) -> Option<PathBuf> {
    env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}
