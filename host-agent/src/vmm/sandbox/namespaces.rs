//! Namespaces of the process: an empty root, no network, no System V IPC.

use std::fs;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, chdir, chroot, pivot_root};

/// Where the empty root is mounted: a directory that every host has.
const PLACE: &str = "/dev";

/// What [`enter`] did.
#[derive(Debug)]
pub(super) struct Separated {
    /// The process is in a user namespace of its own.
    pub(super) new_user: bool,
}

/// Enters new namespaces and leaves the host's file systems. Root needs no user
/// namespace. For another user one is made, in which its user and group have the
/// numbers that they have outside: the numbers in `SO_PEERCRED` stay comparable.
pub(super) fn enter() -> Result<Separated, String> {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    let new_user = match unshare(flags) {
        Ok(()) => false,
        Err(Errno::EPERM) => {
            let (user, group) = (Uid::effective(), Gid::effective());
            unshare(flags | CloneFlags::CLONE_NEWUSER).map_err(failed("unshare"))?;
            map(user, group).map_err(|error| format!("map the user: {error}"))?;
            true
        }
        Err(errno) => return Err(failed("unshare")(errno)),
    };
    empty_root().map_err(failed("empty root"))?;
    Ok(Separated { new_user })
}

fn failed(what: &str) -> impl Fn(Errno) -> String {
    move |errno| format!("{what}: {errno}")
}

/// Maps one user and one group to themselves (`user_namespaces(7)`).
fn map(user: Uid, group: Gid) -> std::io::Result<()> {
    fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    // A group may be mapped without privileges only if none can be given up.
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
}

/// Replaces the root by an empty, read-only file system.
fn empty_root() -> nix::Result<()> {
    let none = None::<&str>;
    // No change here reaches the host.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("empty"),
        PLACE,
        Some("tmpfs"),
        flags,
        Some("size=4k,mode=555"),
    )?;
    chdir(PLACE)?;
    // Both in one directory: the old root then covers the new one, until it is
    // unmounted (`pivot_root(2)`).
    match pivot_root(".", ".") {
        Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
        // The initial RAM file system cannot be unmounted: cover it.
        Err(Errno::EINVAL) => {
            mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
            chroot(".")?;
        }
        Err(errno) => return Err(errno),
    }
    chdir("/")
}
