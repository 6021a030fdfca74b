//! Peak memory and processor time of one command, by `wait4`, for which the standard library has no
//! function.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::time::Duration;

/// What a command used.
#[derive(Debug, Clone, Copy)]
pub struct Used {
    /// How it ended.
    pub status: ExitStatus,
    /// Peak resident memory in KiB.
    pub peak_kib: i64,
    /// Processor time, of user and system.
    pub cpu: Duration,
}

/// Runs `command` to its end.
pub fn run(command: &mut Command) -> io::Result<Used> {
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
    let time = |time: libc::timeval| {
        let part = |part: i64| u64::try_from(part).unwrap_or_default();
        Duration::from_secs(part(time.tv_sec)) + Duration::from_micros(part(time.tv_usec))
    };
    Ok(Used {
        status: ExitStatus::from_raw(status),
        peak_kib: usage.ru_maxrss,
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
    })
}
