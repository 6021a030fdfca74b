//! Each thread class in a child process that makes one system call.
#![allow(unsafe_code)]

use libc::c_long;
use nix::sys::signal::Signal;

use super::filter::{self, Filter};
use super::rules::{Allowed, Argument, ThreadClass};
use super::tests::status_of;

/// No address, length or descriptor.
const BAD: u64 = u64::MAX;
/// Stands for the id of the child process.
const SELF: u64 = BAD - 1;

/// How a child ends that installs the filter and makes the call.
fn call(class: ThreadClass, number: c_long, arguments: [u64; 6]) -> Result<i32, Signal> {
    status_of(|| {
        Filter::of(class).unwrap().install().unwrap();
        let own = u64::from(std::process::id());
        let value = |index: usize| match arguments[index] {
            SELF => own,
            other => other,
        };
        // SAFETY: the arguments name no memory of this process, so the call fails,
        // is killed or ends the process.
        unsafe {
            libc::syscall(
                number,
                value(0),
                value(1),
                value(2),
                value(3),
                value(4),
                value(5),
            )
        };
    })
}

/// Arguments that fulfil the conditions, and are invalid otherwise.
fn fitting(allowed: &Allowed) -> [u64; 6] {
    let mut arguments = [BAD; 6];
    for condition in allowed.when {
        match *condition {
            Argument::Is(index, value) => arguments[usize::from(index)] = value,
            Argument::Has(index, bits) => arguments[usize::from(index)] |= bits,
            Argument::Lacks(index, bits) => arguments[usize::from(index)] &= !bits,
            Argument::OwnProcess(index) => arguments[usize::from(index)] = SELF,
        }
    }
    arguments
}

/// Calls that end the process, or do so with these arguments.
fn ends(allowed: &Allowed) -> bool {
    let calls = [
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_rt_sigreturn,
        libc::SYS_tgkill,
    ];
    calls.contains(&allowed.call)
}

#[test]
fn each_allowed_call_passes_its_filter() {
    filter::available().expect("the tests run on Linux 4.14 or later");
    for class in ThreadClass::ALL {
        for allowed in class.allowed().filter(|allowed| !ends(allowed)) {
            let result = call(class, allowed.call, fitting(allowed));
            assert_eq!(result, Ok(0), "{class:?}: {}", allowed.call);
        }
        assert_eq!(call(class, libc::SYS_exit_group, [7; 6]), Ok(7));
    }
}

#[test]
fn an_argument_outside_of_its_rule_is_killed() {
    for class in ThreadClass::ALL {
        for allowed in class.allowed() {
            for condition in allowed.when {
                let mut arguments = fitting(allowed);
                match *condition {
                    Argument::Is(index, value) => {
                        // No alternative of the same call has this value.
                        arguments[usize::from(index)] = value ^ 0x4000_0000;
                    }
                    Argument::Has(index, bits) => arguments[usize::from(index)] &= !bits,
                    Argument::Lacks(index, bits) => arguments[usize::from(index)] |= bits,
                    Argument::OwnProcess(index) => {
                        arguments[usize::from(index)] = u64::from(std::process::id());
                    }
                }
                let result = call(class, allowed.call, arguments);
                let what = format!("{class:?}: {} {condition:?}", allowed.call);
                assert_eq!(result, Err(Signal::SIGSYS), "{what}");
            }
        }
    }
}

/// Ways out of the process, and to more privileges.
const FORBIDDEN: &[(&str, c_long, [u64; 6])] = &[
    ("execve", libc::SYS_execve, [0; 6]),
    ("execveat", libc::SYS_execveat, [0; 6]),
    ("open", libc::SYS_open, [0; 6]),
    ("openat", libc::SYS_openat, [0; 6]),
    ("openat2", libc::SYS_openat2, [0; 6]),
    ("open_by_handle_at", libc::SYS_open_by_handle_at, [0; 6]),
    ("creat", libc::SYS_creat, [0; 6]),
    ("stat", libc::SYS_stat, [0; 6]),
    ("statx", libc::SYS_statx, [0; 6]),
    ("unlink", libc::SYS_unlink, [0; 6]),
    ("socket", libc::SYS_socket, [0; 6]),
    (
        "socketpair(AF_INET)",
        libc::SYS_socketpair,
        [2, 1, 0, 0, 0, 0],
    ),
    ("connect", libc::SYS_connect, [BAD; 6]),
    ("bind", libc::SYS_bind, [BAD; 6]),
    ("listen", libc::SYS_listen, [BAD; 6]),
    ("setsockopt", libc::SYS_setsockopt, [BAD; 6]),
    (
        "setsockopt SO_ATTACH_FILTER",
        libc::SYS_setsockopt,
        [BAD, 1, 26, BAD, BAD, 0],
    ),
    (
        "setsockopt TCP_ULP",
        libc::SYS_setsockopt,
        [BAD, 6, 31, BAD, BAD, 0],
    ),
    ("ptrace", libc::SYS_ptrace, [BAD; 6]),
    ("process_vm_readv", libc::SYS_process_vm_readv, [BAD; 6]),
    ("process_vm_writev", libc::SYS_process_vm_writev, [BAD; 6]),
    ("pidfd_open", libc::SYS_pidfd_open, [1, 0, 0, 0, 0, 0]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, [BAD; 6]),
    ("clone", libc::SYS_clone, [BAD; 6]),
    ("clone3", libc::SYS_clone3, [0; 6]),
    ("fork", libc::SYS_fork, [0; 6]),
    ("vfork", libc::SYS_vfork, [0; 6]),
    ("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
    ("tkill", libc::SYS_tkill, [1, 0, 0, 0, 0, 0]),
    (
        "tgkill of another process",
        libc::SYS_tgkill,
        [1, 1, 6, 0, 0, 0],
    ),
    ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, [BAD; 6]),
    // What `accept` of the supervisor would wait for.
    (
        "ioctl FIONBIO",
        libc::SYS_ioctl,
        [BAD, 0x5421, BAD, 0, 0, 0],
    ),
    ("fcntl F_SETFL", libc::SYS_fcntl, [BAD, 4, 0, 0, 0, 0]),
    ("ioctl TIOCSTI", libc::SYS_ioctl, [BAD, 0x5412, 0, 0, 0, 0]),
    (
        "ioctl KVM_CREATE_VM",
        libc::SYS_ioctl,
        [BAD, 0xae01, 0, 0, 0, 0],
    ),
    (
        "ioctl KVM_CREATE_VCPU",
        libc::SYS_ioctl,
        [BAD, 0xae41, 0, 0, 0, 0],
    ),
    (
        "ioctl KVM_SET_USER_MEMORY_REGION",
        libc::SYS_ioctl,
        [BAD, 0x4020_ae46, 0, 0, 0, 0],
    ),
    ("mmap PROT_EXEC", libc::SYS_mmap, [0, 4096, 5, 0x22, BAD, 0]),
    ("mmap of a file", libc::SYS_mmap, [0, 4096, 1, 2, 0, 0]),
    (
        "mprotect PROT_EXEC",
        libc::SYS_mprotect,
        [0, 4096, 5, 0, 0, 0],
    ),
    ("pkey_mprotect", libc::SYS_pkey_mprotect, [0; 6]),
    (
        "madvise MADV_DODUMP",
        libc::SYS_madvise,
        [0, 4096, 17, 0, 0, 0],
    ),
    ("memfd_create", libc::SYS_memfd_create, [BAD; 6]),
    ("prctl", libc::SYS_prctl, [BAD; 6]),
    ("seccomp", libc::SYS_seccomp, [BAD; 6]),
    ("prlimit64", libc::SYS_prlimit64, [0; 6]),
    ("setuid", libc::SYS_setuid, [0; 6]),
    ("setsid", libc::SYS_setsid, [0; 6]),
    ("unshare", libc::SYS_unshare, [0; 6]),
    ("setns", libc::SYS_setns, [BAD; 6]),
    ("mount", libc::SYS_mount, [0; 6]),
    ("chroot", libc::SYS_chroot, [0; 6]),
    ("bpf", libc::SYS_bpf, [BAD; 6]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [BAD; 6]),
    ("perf_event_open", libc::SYS_perf_event_open, [BAD; 6]),
    ("userfaultfd", libc::SYS_userfaultfd, [BAD; 6]),
    ("keyctl", libc::SYS_keyctl, [BAD; 6]),
    ("dup2", libc::SYS_dup2, [BAD; 6]),
    ("fallocate", libc::SYS_fallocate, [BAD; 6]),
    // The same number in the table of another architecture (`__X32_SYSCALL_BIT`).
    ("x32 write", libc::SYS_write | 0x4000_0000, [BAD; 6]),
];

#[test]
fn calls_that_no_thread_needs_are_killed_in_each() {
    for class in ThreadClass::ALL {
        for (name, number, arguments) in FORBIDDEN {
            let result = call(class, *number, *arguments);
            assert_eq!(result, Err(Signal::SIGSYS), "{class:?}: {name}");
        }
    }
}

#[test]
fn calls_of_one_class_are_killed_in_the_others() {
    let own: [(ThreadClass, c_long, [u64; 6]); 9] = [
        (
            ThreadClass::Vcpu,
            libc::SYS_ioctl,
            [BAD, 0xae80, 0, 0, 0, 0],
        ),
        (ThreadClass::Main, libc::SYS_accept4, [BAD; 6]),
        (
            ThreadClass::Vsock,
            libc::SYS_socketpair,
            [1, BAD, BAD, BAD, 0, 0],
        ),
        (ThreadClass::Vsock, libc::SYS_sendto, [BAD; 6]),
        (
            ThreadClass::Vsock,
            libc::SYS_setsockopt,
            [BAD, 1, 13, BAD, BAD, 0],
        ),
        (ThreadClass::Block, libc::SYS_pwritev, [BAD; 6]),
        (ThreadClass::Block, libc::SYS_fdatasync, [BAD; 6]),
        (ThreadClass::Log, libc::SYS_ftruncate, [BAD; 6]),
        (ThreadClass::Log, libc::SYS_lseek, [BAD; 6]),
    ];
    for (owner, number, arguments) in own {
        for class in ThreadClass::ALL {
            let expected = if class == owner {
                Ok(0)
            } else {
                Err(Signal::SIGSYS)
            };
            let result = call(class, number, arguments);
            assert_eq!(result, expected, "{class:?}: {number} of {owner:?}");
        }
    }
}

#[test]
fn an_abort_is_an_abort_under_each_filter() {
    for class in ThreadClass::ALL {
        let aborted = status_of(|| {
            Filter::of(class).unwrap().install().unwrap();
            std::process::abort();
        });
        assert_eq!(aborted, Err(Signal::SIGABRT), "{class:?}");
    }
}
