//! Gives back the memory of code that only the start of a VMM process needs.

use std::ffi::c_void;
use std::ptr::{NonNull, addr_of};

use nix::unistd::{SysconfVar, sysconf};

/// Removes the program's read-only data and code from this process's page table.
/// The start reads and runs most of the program once: relocations, JSON, the
/// loader. What the process needs again comes back from the page cache at its next
/// use, without the rest.
pub fn release() {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    let page = page.and_then(|bytes| usize::try_from(bytes).ok());
    let Some((start, length)) = page.and_then(program) else {
        return;
    };
    release_range(start, length);
}

#[allow(unsafe_code)]
mod symbols {
    unsafe extern "C" {
        /// First byte of the program in memory, from the linker.
        pub(super) safe static __executable_start: u8;
        /// First byte after the code, from the linker.
        pub(super) safe static etext: u8;
    }
}

/// The whole pages from the program's start to the end of its code. The segments
/// there are not writable, and relocated data follows after them.
fn program(page: usize) -> Option<(NonNull<c_void>, usize)> {
    let start = addr_of!(symbols::__executable_start);
    let length = addr_of!(symbols::etext).addr().checked_sub(start.addr())?;
    Some((NonNull::new(start.cast_mut().cast())?, length / page * page))
}

#[allow(unsafe_code)]
fn release_range(start: NonNull<c_void>, length: usize) {
    // SAFETY: the range holds private mappings of the program's file that are never
    // written (`program`), so every page of it is read from the file again, with the
    // same content. A failure changes nothing that matters.
    unsafe { libc::madvise(start.as_ptr(), length, libc::MADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::smaps::mappings;

    /// KiB of this program's code in the page table.
    fn resident() -> u64 {
        let last = addr_of!(symbols::etext).addr() - 1;
        let code = mappings().into_iter().find(|it| it.range.contains(&last));
        let code = code.expect("the code is mapped");
        code.field("Rss").trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn released_code_leaves_memory_and_still_runs() {
        let before = resident();
        release();
        let after = resident();
        assert!(after < before, "{after} KiB, {before} before");
    }
}
