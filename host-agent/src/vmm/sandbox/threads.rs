//! Threads of the VMM process, each with its filter.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use super::filter::{self, Filter, FilterError};
use super::rules::ThreadClass;

/// Set once, by [`require_filters`]: threads that start from then on are filtered.
/// Unset in other processes, such as unit tests of devices.
static FILTERED: AtomicBool = AtomicBool::new(false);

/// Filters every thread that [`spawn`] starts from here on, if the kernel can.
#[allow(unsafe_code)]
pub(super) fn require_filters() -> Result<Option<String>, String> {
    filter::available()?;
    // One heap for all threads: glibc gives back the memory of the others after a
    // look at /proc/sys/vm/overcommit_memory, and no filter allows `open`.
    // SAFETY: `mallopt` only sets a parameter; the process has one thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    FILTERED.store(true, Ordering::Release);
    Ok(None)
}

/// Starts a thread. When this returns, the thread's filter is in force.
pub fn spawn(
    class: ThreadClass,
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let builder = Builder::new().name(name.to_owned());
    if !FILTERED.load(Ordering::Acquire) {
        return builder.spawn(work);
    }
    let filter = Filter::of(class)?;
    let (report, installed) = mpsc::sync_channel(1);
    let thread = builder.spawn(move || {
        let result = filter.install();
        let failed = result.is_err();
        let _ = report.send(result);
        drop((report, filter));
        if !failed {
            work();
        }
    })?;
    let result = installed.recv();
    result.map_err(|_| io::Error::other("a thread ended at its start"))??;
    Ok(thread)
}

/// Filters the calling thread, which starts no other thread from here on.
pub fn filter_this(class: ThreadClass) -> Result<(), FilterError> {
    if FILTERED.load(Ordering::Acquire) {
        Filter::of(class)?.install()?;
    }
    Ok(())
}
