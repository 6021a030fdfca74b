//! Operations on lists of buffers, without copies.

use vm_memory::VolatileSlice;

/// Total length of `slices` in bytes.
pub fn total(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Appends to `into` the `len` bytes of `slices` from `skip` on, or fewer if
/// `slices` is shorter.
pub fn push_part<'a>(
    into: &mut Vec<VolatileSlice<'a>>,
    slices: &[VolatileSlice<'a>],
    mut skip: u64,
    mut len: u64,
) {
    for slice in slices {
        if len == 0 {
            break;
        }
        let size = slice.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        let count = (size - skip).min(len);
        let part = slice
            .subslice(skip as usize, count as usize)
            .expect("the part is within the slice");
        into.push(part);
        skip = 0;
        len -= count;
    }
}

/// Fills `slices` with zeros.
pub fn zero(slices: &[VolatileSlice<'_>]) {
    const ZEROS: [u8; 4096] = [0; 4096];
    for slice in slices {
        let mut at = 0;
        while at < slice.len() {
            let count = (slice.len() - at).min(ZEROS.len());
            slice
                .subslice(at, count)
                .expect("the part is within the slice")
                .copy_from(&ZEROS[..count]);
            at += count;
        }
    }
}
