//! What a process that the host agent starts for itself does first: it is its
//! own only in what it was given, and ends only by the end of that.

use nix::sys::signal::{SigSet, Signal};

/// Makes this process one that ends when its standard input does. To be called
/// before it opens anything or has a second thread.
pub fn begin() {
    close_strays();
    leave_ends_to_parent();
}

/// Closes what the parent's own parent may have left open: a descriptor held
/// here would outlive both.
#[allow(unsafe_code)]
fn close_strays() {
    // SAFETY: this is the first act of the process. Nothing in it has opened
    // a descriptor besides the three standard ones, which are kept.
    unsafe {
        libc::close_range(3, libc::c_uint::MAX, 0);
    }
}

/// A signal to a whole session or unit (its end, the host's shutdown) reaches
/// this process too. It is the parent's to stop what runs here, or to end,
/// which closes our standard input.
fn leave_ends_to_parent() {
    let mut ends = SigSet::empty();
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        ends.add(signal);
    }
    // It fails for an argument that is none of the three. Every later thread
    // is born with it.
    let _ = ends.thread_block();
}
