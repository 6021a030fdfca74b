//! What a child does between fork and exec that the standard library has no
//! word for: join a control group, take a terminal.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use tokio::process::Command;

use super::cgroup::Group;

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
