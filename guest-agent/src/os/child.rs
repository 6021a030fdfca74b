//! What a child does between fork and exec beyond what the standard library offers: join a
//! control group, drop the privileges of an agent, take a controlling terminal. And how a
//! child ended, in the words of the protocol.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use tokio::process::Command;
use vmbus::message::ExitCause;

use super::cgroup::Group;
use super::limits::{self, USUAL_FILES};

/// The child starts in `group`.
pub fn join(command: &mut Command, group: &Group) -> io::Result<()> {
    let procs = group.procs_file()?;
    // SAFETY: between fork and exec the closure only writes to a file that is
    // open already, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::write(&procs, b"0")?;
            Ok(())
        });
    }
    Ok(())
}

/// The child gives up the agents' limits (`limits`) and ignored signals, and runs as `user`,
/// or as the user of this process. The user is set last: a value of oom_score_adj that root
/// wrote is also the least that a process without privileges may set later.
pub fn drop_agent_privileges(command: &mut Command, user: Option<u32>) {
    let favoured = limits::favoured();
    // SAFETY: between fork and exec the closure makes system calls and allocates
    // nothing.
    unsafe {
        command.pre_exec(move || {
            // An ignored signal stays ignored over exec(2), and a shell cannot trap it: a
            // background job of a script ignores SIGINT and SIGQUIT, nohup SIGHUP.
            for signal in 1..=libc::SIGRTMAX() {
                // Fails for SIGKILL, SIGSTOP and the C library's own signals.
                libc::signal(signal, libc::SIG_DFL);
            }
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

/// How a process ended.
pub fn exit_cause(status: ExitStatus) -> ExitCause {
    match status.signal() {
        Some(signal) => ExitCause::Signal(signal),
        None => ExitCause::Code(status.code().unwrap_or(-1)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_child_can_trap_a_signal_that_this_process_ignores() {
        // SAFETY: no other test depends on the disposition of SIGHUP.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let mut command = Command::new("sh");
        command.args(["-c", "trap 'exit 7' HUP; kill -HUP $$; exit 1"]);
        drop_agent_privileges(&mut command, None);
        let status = command.status().await.unwrap();
        assert_eq!(exit_cause(status), ExitCause::Code(7));
    }
}
