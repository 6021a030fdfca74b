//! Start of a helper process of the host agent: a VMM process or the janitor.

use nix::sys::signal::{SigSet, Signal};

use crate::dispositions;

/// Prepares a helper process, which ends when its standard input closes. Call
/// this before the process opens a file or starts a thread.
pub fn begin() {
    close_inherited();
    dispositions::begin_helper();
    block_termination_signals();
}

/// Closes descriptors that the host agent itself inherited. A copy here would
/// keep their files open after the host agent has ended.
#[allow(unsafe_code)]
fn close_inherited() {
    // SAFETY: this is the first call of the process. No descriptor but the
    // three standard ones, which are kept, has an owner in it.
    unsafe {
        libc::close_range(3, libc::c_uint::MAX, 0);
    }
}

/// Blocks the signals that end a session or a service unit as a whole: the host
/// agent receives them too, stops its guests first, and then closes the standard
/// input of this process.
fn block_termination_signals() {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        signals.add(signal);
    }
    // Cannot fail: the arguments are valid. Later threads inherit the mask.
    let _ = signals.thread_block();
}
