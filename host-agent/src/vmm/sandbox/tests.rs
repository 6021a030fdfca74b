//! A child process enters the sandbox and tries what it forbids.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid};

use super::*;

/// Runs `test` in a child process with one thread; its panic fails the test.
pub(super) fn in_child(test: impl FnOnce()) {
    assert_eq!(status_of(test), Ok(0));
}

/// The exit code of a child process that runs `test`, or the signal that killed it.
pub(super) fn status_of(test: impl FnOnce()) -> Result<i32, String> {
    // SAFETY: the child uses the allocator, which glibc makes usable after a fork,
    // and no lock that another thread of this process may hold.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test));
            // SAFETY: ends the process without the parent's exit handlers.
            unsafe { libc::_exit(i32::from(result.is_err())) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, code) => Ok(code),
            other => Err(format!("{other:?}")),
        },
    }
}

/// The states of the layers that this kernel has, as they are in a child.
fn has(report: &SandboxReport, layer: Layer) -> bool {
    let state = report.layers().iter().find(|state| state.layer == layer);
    let in_force = state.is_some_and(|state| state.missing.is_none());
    if !in_force {
        eprintln!("NOT CHECKED, this kernel lacks it: {layer}: {state:?}");
    }
    in_force
}

#[test]
fn a_sandboxed_process_has_no_privileges() {
    in_child(|| {
        leave_session();
        let report = enter();
        assert!(has(&report, Layer::NoPrivileges));
        assert_eq!(nix::unistd::getsid(None).unwrap(), nix::unistd::getpid());
        assert!(nix::sys::prctl::get_no_new_privs().unwrap());
        assert!(!nix::sys::prctl::get_dumpable().unwrap());
        let held = rustix::thread::capabilities(None).unwrap();
        let none = rustix::thread::CapabilitySet::empty();
        assert_eq!((held.permitted, held.effective), (none, none));
        if has(&report, Layer::OwnUser) {
            let id = nix::unistd::getresuid().unwrap();
            assert!(!id.real.is_root() && id.real == id.saved, "{id:?}");
            assert_eq!(nix::unistd::setuid(0.into()), Err(Errno::EPERM));
            assert_eq!(nix::unistd::getgroups().unwrap(), []);
        }
    });
}

#[test]
fn a_sandboxed_process_reaches_nothing_outside() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "before").unwrap();
    let read_only = File::open(&file).unwrap();
    let mut writable = OpenOptions::new().append(true).open(&file).unwrap();
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    in_child(|| {
        let own = fs::File::open("/proc/self/fd").unwrap();
        let report = enter();
        let namespaces = has(&report, Layer::Namespaces);
        let landlock = has(&report, Layer::Landlock);
        if namespaces {
            let root: Vec<_> = fs::read_dir("/").map_or(vec![], |entries| entries.collect());
            assert!(root.is_empty(), "{root:?}");
            assert!(TcpStream::connect(address).is_err());
            assert_eq!(File::open(&file).unwrap_err().kind(), denied(landlock));
            // From the descriptor of a directory too.
            let up = nix::fcntl::openat(
                &own,
                "../../../etc/passwd",
                nix::fcntl::OFlag::O_RDONLY,
                nix::sys::stat::Mode::empty(),
            );
            assert!(!landlock || up.is_err(), "{up:?}");
        }
        if landlock {
            assert_eq!(File::open(&file).unwrap_err().kind(), denied(true));
            assert!(fs::read_dir("/").is_err() || namespaces);
            assert!(File::create("/file").is_err());
        }
        if namespaces || landlock {
            assert!(UnixStream::connect(&socket).is_err());
            // A descriptor keeps its rights and gets no others.
            let path = format!("/proc/self/fd/{}", read_only.as_raw_fd());
            let again = OpenOptions::new().write(true).open(path);
            assert!(again.is_err(), "{again:?}");
        }
        writable.write_all(b", after").unwrap();
        let parent = getppid();
        for request in [libc::PTRACE_ATTACH, libc::PTRACE_SEIZE] {
            // SAFETY: neither request has an address or data.
            let attached = unsafe { libc::ptrace(request, parent.as_raw(), 0, 0) };
            assert_eq!(Errno::result(attached), Err(Errno::EPERM));
        }
        let none: Option<nix::sys::signal::Signal> = None;
        if has(&report, Layer::OwnUser) || landlock {
            assert_eq!(nix::sys::signal::kill(parent, none), Err(Errno::EPERM));
            assert_eq!(
                nix::sys::signal::kill(Pid::from_raw(1), none),
                Err(Errno::EPERM)
            );
        }
    });
    assert_eq!(fs::read_to_string(&file).unwrap(), "before, after");
}

/// How an open fails: Landlock refuses it, or there is no such file.
fn denied(landlock: bool) -> ErrorKind {
    if landlock {
        ErrorKind::PermissionDenied
    } else {
        ErrorKind::NotFound
    }
}

#[test]
fn a_write_beyond_the_largest_file_fails() {
    let mut file = tempfile::tempfile().unwrap();
    in_child(|| {
        limit_file_size(10).unwrap();
        file.write_all(b"0123456789").unwrap();
        let error = file.write_all(b"0").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
    });
}
