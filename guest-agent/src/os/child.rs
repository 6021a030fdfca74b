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
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use tokio::process::Command;
use vmbus::message::ExitCause;

use super::cgroup::Group;
use super::limits::{self, USUAL_FILES};
use super::system_calls::Filters;

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

/// The child gives up the agents' limits (`limits`), and its signals have default dispositions
/// and none is blocked.
pub fn drop_agent_privileges(command: &mut Command) {
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
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
            if favoured {
                let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                let score = open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
                nix::unistd::write(&score, b"0")?;
            }
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            setrlimit(Resource::RLIMIT_NOFILE, hard.min(USUAL_FILES), hard)?;
            Ok(())
        });
    }
}

/// The child runs as `user`, without the system calls that a role is denied. To be called after
/// [`drop_agent_privileges`]: a value of oom_score_adj that root wrote is also the least that a
/// process without privileges may set later.
pub fn confine(command: &mut Command, user: u32) -> io::Result<()> {
    let filters = Filters::new()?;
    // SAFETY: between fork and exec the closure makes system calls and allocates
    // nothing.
    unsafe {
        command.pre_exec(move || {
            setgroups(&[])?;
            setgid(Gid::from_raw(user))?;
            setuid(Uid::from_raw(user))?;
            filters.install()
        });
    }
    Ok(())
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
    use crate::os::terminal;
    use nix::sys::signal::Signal;
    use std::process::Stdio;

    #[tokio::test(flavor = "current_thread")]
    async fn a_child_can_trap_a_signal_that_this_process_ignores() {
        // SAFETY: no other test depends on the disposition of SIGHUP.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let mut command = Command::new("sh");
        command.args(["-c", "trap 'exit 7' HUP; kill -HUP $$; exit 1"]);
        drop_agent_privileges(&mut command);
        let status = command.status().await.unwrap();
        assert_eq!(exit_cause(status), ExitCause::Code(7));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_child_ignores_and_blocks_no_signal() {
        // SAFETY: no other test depends on the disposition of SIGUSR2.
        unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) };
        let mut blocked = SigSet::empty();
        blocked.add(Signal::SIGTERM);
        blocked.thread_block().unwrap();
        for with_terminal in [false, true] {
            let mut command = Command::new("grep");
            command.args(["-E", "^Sig(Blk|Ign):", "/proc/self/status"]);
            drop_agent_privileges(&mut command);
            let terminal = terminal::open((24, 80)).unwrap();
            if with_terminal {
                command.stdin(Stdio::from(terminal.theirs.try_clone().unwrap()));
                take_terminal(&mut command);
            }
            let output = command.output().await.unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let sets: Vec<u64> = text
                .lines()
                .map(|line| u64::from_str_radix(line[7..].trim(), 16).unwrap())
                .collect();
            // The C library has 32 and 33 to itself, and leaves nobody else change them.
            let others = !(0b11 << 31);
            assert_eq!(sets.len(), 2, "{text}");
            assert!(sets.iter().all(|set| set & others == 0), "{text}");
        }
    }

    /// Runs `check` in a thread of its own with the filters of a role.
    fn with_filters<T: Send>(check: impl FnOnce() -> T + Send) -> T {
        let filters = Filters::new().unwrap();
        let run = || {
            filters.install().unwrap();
            check()
        };
        std::thread::scope(|scope| scope.spawn(run).join().unwrap())
    }

    #[test]
    fn a_role_has_no_vsock_no_projects_and_no_rings() {
        let denied = with_filters(|| {
            let errno = |result: i64| (result < 0).then(Errno::last_raw);
            // SAFETY: the calls take numbers and null pointers.
            unsafe {
                [
                    errno(libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0).into()),
                    errno(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).into()),
                    errno(libc::ioctl(0, 0x401c_5820, 0).into()),
                    errno(libc::ioctl(0, 0x4008_6602, 0).into()),
                    errno(libc::ioctl(-1, libc::FIONREAD, 0).into()),
                    errno(libc::syscall(libc::SYS_io_uring_setup, 1, 0)),
                    errno(libc::syscall(469, 0, 0, 0, 0, 0)),
                ]
            }
        });
        let (family, permission) = (Some(libc::EAFNOSUPPORT), Some(libc::EPERM));
        let file = Some(libc::EBADF);
        let expected = [
            family, None, permission, permission, file, permission, permission,
        ];
        assert_eq!(denied, expected);
    }

    #[test]
    fn the_filters_of_a_role_hold_for_what_it_starts() {
        let status = with_filters(|| {
            let shell = std::process::Command::new("sh")
                .args(["-c", "cat /proc/self/status"])
                .output();
            String::from_utf8(shell.unwrap().stdout).unwrap()
        });
        for line in ["NoNewPrivs:\t1\n", "Seccomp:\t2\n"] {
            assert!(status.contains(line), "{status}");
        }
    }
}
