//! The signal state that a process inherits: a script starts background jobs with SIGINT
//! and SIGQUIT ignored, and some programs start others with signals blocked or SIGCHLD
//! ignored.
#![allow(unsafe_code)]

use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};

/// For the command line: every signal is delivered, and ended children can be waited for,
/// which an ignored SIGCHLD prevents (wait(2), ECHILD).
pub fn begin_command() {
    unblock_all();
    set_default(Signal::SIGCHLD);
}

/// For a helper process: no signal is blocked or ignored. `main` has not installed a handler
/// yet; those of the run-time library, for stack overflows, stay.
pub fn begin_helper() {
    unblock_all();
    for signal in Signal::iterator() {
        // The run-time library ignores SIGPIPE, so that a write fails with EPIPE. The
        // disposition of the other two cannot change.
        let kept = [Signal::SIGPIPE, Signal::SIGKILL, Signal::SIGSTOP];
        if !kept.contains(&signal) && is_ignored(signal) {
            set_default(signal);
        }
    }
}

fn unblock_all() {
    // Cannot fail: the arguments are valid.
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

fn set_default(number: Signal) {
    // SAFETY: the default action is no handler, so that no code runs in a signal's context.
    // It cannot fail for the signals that the callers pass.
    let _ = unsafe { signal(number, SigHandler::SigDfl) };
}

/// Whether this process ignores the signal.
pub fn is_ignored(number: Signal) -> bool {
    // SAFETY: zero is a valid value of every field of `sigaction`.
    let mut current: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action the call only writes the current one to the pointer,
    // which is to a live value of that type.
    let found = unsafe { libc::sigaction(number as i32, std::ptr::null(), &raw mut current) };
    found == 0 && current.sa_sigaction == libc::SIG_IGN
}
