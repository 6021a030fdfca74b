//! A child process enters the sandbox and tries what it forbids.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, geteuid, getppid};

use super::*;

/// Runs `test` in a child process with one thread; its panic fails the test.
fn in_child(test: impl FnOnce()) {
    assert_eq!(status_of(test), Ok(0));
}

/// The exit code of a child process that runs `test`, or the signal that killed it.
pub(super) fn status_of(test: impl FnOnce()) -> Result<i32, Signal> {
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
            WaitStatus::Signaled(_, signal, _) => Err(signal),
            other => panic!("{other:?}"),
        },
    }
}

/// Whether the kernel offers a layer to this process.
fn offered(layer: Layer) -> bool {
    match layer {
        Layer::NoPrivileges => true,
        Layer::OwnUser => geteuid().is_root(),
        // SAFETY: a query without a ruleset (`landlock_create_ruleset(2)`).
        Layer::Landlock => unsafe { libc::syscall(444, 0, 0, 1) > 0 },
        Layer::Filters => filter::available().is_ok(),
        Layer::Namespaces => {
            let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET;
            let root = || unshare(CloneFlags::CLONE_NEWNET).is_ok();
            status_of(|| assert!(root() || unshare(flags).is_ok())) == Ok(0)
        }
    }
}

/// Whether a layer is in force in a child, which is so if the kernel offers it. What
/// is not checked is written past the test harness, which hides it otherwise.
fn has(report: &SandboxReport, layer: Layer, offered: bool) -> bool {
    let state = report.layers().iter().find(|state| state.layer == layer);
    let in_force = state.is_some_and(|state| state.missing.is_none());
    assert_eq!(in_force, offered, "{report}");
    if !in_force {
        let _ = writeln!(std::io::stderr(), "not checked, not offered here: {layer}");
    }
    in_force
}

#[test]
fn a_sandboxed_process_has_no_privileges() {
    let own_user = offered(Layer::OwnUser);
    in_child(|| {
        leave_session();
        let report = enter();
        assert!(has(&report, Layer::NoPrivileges, true));
        assert_eq!(nix::unistd::getsid(None).unwrap(), nix::unistd::getpid());
        assert!(nix::sys::prctl::get_no_new_privs().unwrap());
        assert!(!nix::sys::prctl::get_dumpable().unwrap());
        let held = rustix::thread::capabilities(None).unwrap();
        let none = rustix::thread::CapabilitySet::empty();
        assert_eq!((held.permitted, held.effective), (none, none));
        if has(&report, Layer::OwnUser, own_user) {
            let id = nix::unistd::getresuid().unwrap();
            assert!(!id.real.is_root() && id.real == id.saved, "{id:?}");
            assert_eq!(nix::unistd::setuid(0.into()), Err(Errno::EPERM));
            assert_eq!(nix::unistd::getgroups().unwrap(), []);
        }
    });
}

/// Tries to write to the file of a descriptor that is open for reading.
fn open_again(file: &File) -> std::io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().write(true).open(path)
}

#[test]
fn landlock_alone_allows_no_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let file = File::create(&path).unwrap();
    let dir_file = File::open(dir.path()).unwrap();
    let offered = offered(Layer::Landlock);
    in_child(|| {
        nix::sys::prctl::set_no_new_privs().unwrap();
        let mut report = SandboxReport::default();
        report.add(Layer::Landlock, ruleset::apply());
        if has(&report, Layer::Landlock, offered) {
            let denied = Some(ErrorKind::PermissionDenied);
            let kind = |result: std::io::Result<File>| result.err().map(|error| error.kind());
            assert_eq!(kind(File::open(&path)), denied);
            assert_eq!(kind(File::create(dir.path().join("new"))), denied);
            assert_eq!(kind(open_again(&file)), denied);
            let (flags, mode) = (OFlag::O_RDONLY, Mode::empty());
            let opened = openat(&dir_file, "file", flags, mode);
            assert_eq!(opened.map(drop), Err(Errno::EACCES));
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
    let [own_user, namespaces, landlock] =
        [Layer::OwnUser, Layer::Namespaces, Layer::Landlock].map(offered);
    in_child(|| {
        let report = enter();
        let namespaces = has(&report, Layer::Namespaces, namespaces);
        let landlock = has(&report, Layer::Landlock, landlock);
        if namespaces {
            let kind = File::open(&file).map_err(|error| error.kind());
            assert_eq!(kind.map(drop), Err(ErrorKind::NotFound));
            let root: Vec<_> = fs::read_dir("/").map_or(vec![], |entries| entries.collect());
            assert!(root.is_empty(), "{root:?}");
            assert!(TcpStream::connect(address).is_err());
        }
        if namespaces || landlock {
            assert!(UnixStream::connect(&socket).is_err());
            assert!(open_again(&read_only).is_err());
        }
        // A descriptor keeps its rights.
        writable.write_all(b", after").unwrap();
        let parent = getppid();
        for request in [libc::PTRACE_ATTACH, libc::PTRACE_SEIZE] {
            // SAFETY: neither request has an address or data.
            let attached = unsafe { libc::ptrace(request, parent.as_raw(), 0, 0) };
            assert_eq!(Errno::result(attached), Err(Errno::EPERM));
        }
        let none: Option<Signal> = None;
        if has(&report, Layer::OwnUser, own_user) {
            assert_eq!(nix::sys::signal::kill(parent, none), Err(Errno::EPERM));
            assert_eq!(
                nix::sys::signal::kill(Pid::from_raw(1), none),
                Err(Errno::EPERM)
            );
        }
    });
    assert_eq!(fs::read_to_string(&file).unwrap(), "before, after");
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
