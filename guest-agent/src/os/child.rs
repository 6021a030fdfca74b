//! What a child does between fork and exec that the standard library has no
//! word for: join a control group, be no agent any more, take a terminal.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use tokio::process::Command;

use super::cgroup::Group;
use super::limits::{self, USUAL_FILES};

/// The child starts in `group`.
pub fn join(command: &mut Command, group: &Group) -> io::Result<()> {
    let door = group.door()?;
    // SAFETY: between fork and exec the closure only writes to a file that is
    // open already, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::write(&door, b"0")?;
            Ok(())
        });
    }
    Ok(())
}

/// The child has nothing of an agent's share (`limits`) and runs as `user`, or as
/// this process does. Only root can give up its place at the end of the OOM
/// killer's list in a way that cannot be taken back, so the user comes last.
pub fn ordinary(command: &mut Command, user: Option<u32>) {
    let favoured = limits::favoured();
    // SAFETY: between fork and exec the closure makes system calls and allocates
    // nothing.
    unsafe {
        command.pre_exec(move || {
            if favoured {
                let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                let score = open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
                nix::unistd::write(&score, b"0")?;
            }
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            setrlimit(Resource::RLIMIT_NOFILE, hard.min(USUAL_FILES), hard)?;
            if let Some(id) = user {
                setgroups(&[])?;
                setgid(Gid::from_raw(id))?;
                setuid(Uid::from_raw(id))?;
            }
            Ok(())
        });
    }
}

/// The child leads a session of its own, whose terminal is its standard input.
pub fn take_terminal(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes two system calls and
    // allocates nothing.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            // SAFETY: TIOCSCTTY takes a number and touches no memory.
            let result = libc::ioctl(io::stdin().as_raw_fd(), libc::TIOCSCTTY, 0);
            Errno::result(result)?;
            Ok(())
        });
    }
}
