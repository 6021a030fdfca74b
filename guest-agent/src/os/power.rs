//! The last steps of PID 1: end all processes, write all data, power off or reboot.

use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, sync};
use vmbus::message::PowerAction;

use crate::clock::eventually;
use crate::environment::ROLE_ROOT;
use crate::setup::RESOURCE;

/// Most time after SIGTERM for processes that no agent stopped.
const LAST_PROCESSES: Duration = Duration::from_secs(2);
/// Most time for killed processes to end and to close their files.
const KILLED: Duration = Duration::from_secs(2);
/// Time between two looks for processes that are left.
const POLL_EVERY: Duration = Duration::from_millis(5);

/// Powers off or reboots. Blocking; another thread must reap children meanwhile. Returns only
/// if the kernel refuses.
pub fn leave(then: PowerAction) {
    // All processes but this one.
    let everyone = Pid::from_raw(-1);
    // Every process in user space descends from PID 1. The result of kill(-1) cannot tell
    // whether one is left: the call reaches kernel threads too, which always exist.
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let none_left = || waitid(Id::All, look) == Err(Errno::ECHILD);
    let _ = kill(everyone, Signal::SIGTERM);
    if !eventually(LAST_PROCESSES, POLL_EVERY, none_left) {
        let _ = kill(everyone, Signal::SIGKILL);
        if !eventually(KILLED, POLL_EVERY, none_left) {
            eprintln!("app-agent: killed processes are still there");
        }
    }
    sync();
    for target in [ROLE_ROOT, RESOURCE] {
        match umount2(target, MntFlags::empty()) {
            // Not mounted, or the directory does not exist.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => {
                eprintln!("app-agent: unmount {target}: {error}");
                read_only(target);
            }
        }
    }
    read_only("/");
    sync();
    let mode = match then {
        PowerAction::PowerOff => RebootMode::RB_POWER_OFF,
        PowerAction::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let error = reboot(mode).err();
    eprintln!("app-agent: cannot power off or reboot: {error:?}");
}

/// Remounts a file system read-only, which writes it out whole: the next mount has nothing
/// to recover.
fn read_only(target: &str) {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(error) = mount(None::<&str>, target, None::<&str>, flags, None::<&str>) {
        eprintln!("app-agent: make {target} read-only: {error}");
    }
}
