//! Peak memory of one command, by `wait4`, for which the standard library has no
//! function.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

/// Runs `command` to its end; its peak resident memory in KiB.
pub fn run(command: &mut Command) -> io::Result<(ExitStatus, i64)> {
    let child = command.spawn()?;
    let pid = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    let mut status = 0;
    // SAFETY: every field of `rusage` is an integer, for which zero is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to values that outlive the call. The child is this
    // process's, and no other code waits for it: `child` is not used again.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    if waited != pid {
        return Err(io::Error::last_os_error());
    }
    Ok((ExitStatus::from_raw(status), usage.ru_maxrss))
}
