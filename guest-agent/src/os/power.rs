//! The last steps of PID 1: end what still runs, write everything, leave.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, sync};
use vmbus::message::PowerAction;

use crate::setup::{RESOURCE, ROLE_ROOT};

/// Time for processes that no agent stopped.
const LAST_PROCESSES: Duration = Duration::from_secs(2);
/// Time for killed processes to be gone, and with them their open files.
const KILLED: Duration = Duration::from_secs(2);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Leaves the machine. Blocking; somebody must reap meanwhile. Returns only if
/// the kernel refuses.
pub fn leave(then: PowerAction) {
    // To everyone but this process.
    let everyone = Pid::from_raw(-1);
    // All that run in user space descend from PID 1. To signal everyone says
    // nothing here: it reaches the kernel's own threads, which are always there.
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let nobody = || waitid(Id::All, look) == Err(Errno::ECHILD);
    let _ = kill(everyone, Signal::SIGTERM);
    if !eventually(LAST_PROCESSES, nobody) {
        let _ = kill(everyone, Signal::SIGKILL);
        if !eventually(KILLED, nobody) {
            eprintln!("app-agent: killed processes are still there");
        }
    }
    sync();
    for target in [ROLE_ROOT, RESOURCE] {
        match umount2(target, MntFlags::empty()) {
            // Not mounted, or not even made.
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
    eprintln!("app-agent: cannot leave the machine: {error:?}");
}

/// Has a file system write itself out whole, so that its next mount has nothing
/// to recover.
fn read_only(target: &str) {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(error) = mount(None::<&str>, target, None::<&str>, flags, None::<&str>) {
        eprintln!("app-agent: make {target} read-only: {error}");
    }
}

fn eventually(limit: Duration, condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    true
}
