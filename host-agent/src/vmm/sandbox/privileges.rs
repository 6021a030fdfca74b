//! Session, user, capabilities and limits of the process.

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{
    Gid, Pid, Uid, getpgid, getppid, setgroups, setpgid, setresgid, setresuid, setsid,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

/// First of the users of VMM processes; each has the one at its process id, which
/// is below 2^22 (`PID_MAX_LIMIT`). The range is between those of containers and of
/// systemd's foreign users (systemd, `UIDS-GIDS.md`), so no file belongs to one.
const FIRST_USER: u32 = 0x7000_0000;

/// Makes the process the leader of a new session, which has no terminal: `TIOCSTI`
/// on the supervisor's terminal would type commands as the operator.
pub fn leave_session() {
    if setsid().is_ok() {
        return;
    }
    // The supervisor made this process the leader of a process group, so that a
    // Ctrl-C did not reach it before it blocked the signal. A group leader cannot
    // begin a session: join the supervisor's group first.
    if let Ok(group) = getpgid(Some(getppid())) {
        let _ = setpgid(Pid::from_raw(0), group);
    }
    // Fails only if the supervisor has ended; then this process ends too.
    let _ = setsid();
}

/// Lets the process write no file beyond `bytes` (`RLIMIT_FSIZE`). A write beyond
/// fails with `EFBIG`.
#[allow(unsafe_code)]
pub fn limit_file_size(bytes: u64) -> nix::Result<()> {
    // SAFETY: an ignored signal runs no handler.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
    setrlimit(Resource::RLIMIT_FSIZE, bytes, bytes)
}

/// Becomes a user that owns no file and no other process. Needs root.
pub(super) fn take_own_user() -> Result<Option<String>, String> {
    let id = FIRST_USER + std::process::id();
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    // The user last: only root may do the others.
    let taken = setgroups(&[])
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user));
    taken.map_err(|errno| format!("setresuid: {errno}"))?;
    Ok(None)
}

/// Empties the bounding set: no program that the process could execute has a
/// capability. Comes before the change of user, because it needs `CAP_SETPCAP`.
pub(super) fn empty_bounding_set() {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        // EINVAL after the last one; EPERM without CAP_SETPCAP: no_new_privs keeps
        // such a process from getting one.
        if remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
}

/// Gives up every capability for good, hides the process's memory from its user,
/// and locks no memory.
pub(super) fn drop_all() -> Result<Option<String>, String> {
    // EINVAL before Linux 4.3, which has no ambient capabilities.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    let none = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    set_capabilities(None, none).map_err(|errno| format!("capset: {errno}"))?;
    let failed = |what| move |errno| format!("{what}: {errno}");
    prctl::set_no_new_privs().map_err(failed("PR_SET_NO_NEW_PRIVS"))?;
    // No process of the same user attaches to this one, and /proc/PID is root's. A
    // change of user resets it, so it comes after that.
    prctl::set_dumpable(false).map_err(failed("PR_SET_DUMPABLE"))?;
    setrlimit(Resource::RLIMIT_MEMLOCK, 0, 0).map_err(failed("RLIMIT_MEMLOCK"))?;
    Ok(None)
}
