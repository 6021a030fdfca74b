//! The system calls of each class of threads, and why each is needed.
//!
//! The program is a static one of glibc, so some calls are those of glibc and of
//! Rust's standard library on behalf of an innocent-looking function. No table has
//! `execve`, `open`, `socket`, `connect`, `clone`, `ptrace` or another way to reach
//! something that the thread has no descriptor of.

use libc::{
    AF_UNIX, F_DUPFD_CLOEXEC, MADV_DONTNEED, MAP_ANONYMOUS, PROT_EXEC, SIGABRT, SIGBUS, SIGSEGV,
    SO_LINGER, SO_PEERCRED, SOL_SOCKET,
};

/// `KVM_RUN` (`linux/kvm.h`): `_IO(KVMIO, 0x80)`.
const KVM_RUN: u64 = 0xae80;
/// `KVM_KVMCLOCK_CTRL`: `_IO(KVMIO, 0xad)`.
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
/// `SIGRTMIN` of glibc, which kicks a vCPU out of the guest. glibc keeps 32 and 33.
const KICK: u64 = 34;

/// Threads with the same duty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadClass {
    /// Control socket, supervisors, pause and end of the guest.
    Main,
    /// Runs one vCPU and handles its exits.
    Vcpu,
    /// The vsock device.
    Vsock,
    /// One disk.
    Block,
    /// The entropy device.
    Rng,
    /// Writes `vmm.log` or the serial log.
    Log,
    /// Stops vCPUs and devices at the end.
    Teardown,
}

/// A system call that a thread may make.
pub(super) struct Allowed {
    /// Its number.
    pub(super) call: i64,
    /// What its arguments must be: all of it. Two entries for one call are
    /// alternatives.
    pub(super) when: &'static [Argument],
}

/// A condition on the argument with this index.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument {
    /// It has this value.
    Is(u8, u64),
    /// It has all of these bits.
    Has(u8, u64),
    /// It has none of these bits.
    Lacks(u8, u64),
    /// It is the id of this process.
    OwnProcess(u8),
}

use Argument::{Has, Is, Lacks, OwnProcess};

/// A table: `call: "why"` or `call if conditions: "why"`.
macro_rules! calls {
    ($($call:ident $(if $($when:expr),+)? => $why:literal;)*) => {
        &[$(Allowed {
            call: libc::$call,
            when: &[$($($when),+)?],
        }),*]
    };
}

/// What every thread needs: locks, memory, its end, and the end of the process.
const EVERY: &[Allowed] = calls! {
    SYS_futex => "locks, condition variables, joins";
    SYS_sched_yield => "locks that spin for a moment";
    SYS_brk => "memory of the allocator";
    SYS_mmap if Has(3, MAP_ANONYMOUS as u64), Lacks(2, PROT_EXEC as u64) => "large allocations";
    SYS_munmap => "their end, and that of a thread's signal stack";
    SYS_mremap => "large vectors that grow";
    SYS_mprotect if Lacks(2, PROT_EXEC as u64) => "memory of the allocator";
    SYS_madvise if Is(2, MADV_DONTNEED as u64) => "the stack of a thread that ends";
    SYS_close => "descriptors that are dropped";
    SYS_clock_gettime => "the time, where the vDSO has no usable clock";
    SYS_clock_nanosleep => "sleep";
    SYS_getrandom => "seeds of hash maps";
    SYS_rt_sigreturn => "end of a signal handler";
    SYS_restart_syscall => "a wait that a stop of the process interrupted";
    SYS_rt_sigprocmask => "end of a thread, abort";
    SYS_sigaltstack => "end of a thread";
    SYS_exit => "end of a thread";
    SYS_exit_group => "end of the process";
    SYS_gettid => "message of a panic, abort";
    SYS_getpid => "abort";
    SYS_rt_sigaction if Is(0, SIGABRT as u64) => "abort";
    SYS_rt_sigaction if Is(0, SIGSEGV as u64) => "a fault that is not a stack overflow";
    SYS_rt_sigaction if Is(0, SIGBUS as u64) => "the same";
    SYS_tgkill if OwnProcess(0), Is(2, SIGABRT as u64) => "abort";
    SYS_write => "eventfds; the exit file and the message of a panic";
    SYS_writev => "message of the allocator before an abort";
    SYS_sendmsg => "events to the supervisor, also that of a panic";
    SYS_poll => "waits, also that for the supervisor after a panic";
};

/// No call that changes `O_NONBLOCK`: the listening sockets that the process holds share it
/// with the supervisor, whose accept would wait.
const MAIN: &[Allowed] = calls! {
    SYS_recvmsg => "commands";
    SYS_read => "the eventfd that wakes the thread";
    SYS_accept4 => "a supervisor that attaches";
    SYS_getsockopt if Is(1, SOL_SOCKET as u64), Is(2, SO_PEERCRED as u64) => "its user";
    SYS_tgkill if OwnProcess(0), Is(2, KICK) => "takes vCPUs out of the guest";
};

const VCPU: &[Allowed] = calls! {
    SYS_ioctl if Is(1, KVM_RUN) => "runs the guest";
    SYS_ioctl if Is(1, KVM_KVMCLOCK_CTRL) => "a pause";
    SYS_fcntl if Is(1, F_DUPFD_CLOEXEC as u64) => "kicks of a device that is activated";
};

const VSOCK: &[Allowed] = calls! {
    SYS_epoll_wait => "waits";
    SYS_epoll_ctl => "kicks and sockets to wait for";
    SYS_read => "eventfds";
    SYS_socketpair if Is(0, AF_UNIX as u64) => "a connection that the guest opens";
    SYS_recvmsg => "bytes for the guest";
    SYS_sendto => "bytes from the guest that had to wait";
    SYS_shutdown => "half-closed connections";
    SYS_setsockopt if Is(1, SOL_SOCKET as u64), Is(2, SO_LINGER as u64) => "reset of a client";
};

const BLOCK: &[Allowed] = calls! {
    SYS_epoll_wait => "waits";
    SYS_epoll_ctl => "the kick to wait for";
    SYS_read => "eventfds";
    SYS_preadv => "reads of the guest, and tables of the diff";
    SYS_pwritev => "writes of the guest, and tables of the diff";
    SYS_fdatasync => "flushes of the guest";
};

const RNG: &[Allowed] = calls! {
    SYS_read => "eventfds";
};

const LOG: &[Allowed] = calls! {
    SYS_read => "the log that is copied at its rotation";
    SYS_lseek => "the same";
    SYS_ftruncate => "the same";
};

const TEARDOWN: &[Allowed] = calls! {
    SYS_tgkill if OwnProcess(0), Is(2, KICK) => "takes vCPUs out of the guest";
};

impl ThreadClass {
    /// Every class.
    #[cfg(test)]
    pub(super) const ALL: [Self; 7] = [
        Self::Main,
        Self::Vcpu,
        Self::Vsock,
        Self::Block,
        Self::Rng,
        Self::Log,
        Self::Teardown,
    ];

    /// The calls of the class.
    pub(super) fn allowed(self) -> impl Iterator<Item = &'static Allowed> {
        let own = match self {
            Self::Main => MAIN,
            Self::Vcpu => VCPU,
            Self::Vsock => VSOCK,
            Self::Block => BLOCK,
            Self::Rng => RNG,
            Self::Log => LOG,
            Self::Teardown => TEARDOWN,
        };
        EVERY.iter().chain(own)
    }
}
