//! Creates an empty diff.

use std::fs::File;

use super::diff::layout::Layout;
use super::storage::{Storage, write_bytes};
use super::{Access, DiskError, lock_as};

/// Writes an empty diff of `virtual_size` bytes to `file`, which must be empty and
/// open for writing. The size is a multiple of 512 and at least that of the base.
/// The diff is on stable storage on return.
///
/// `base_name` is for `qemu-img`, which opens it relative to the directory of the
/// diff. This program never opens it.
pub fn create_diff(mut file: File, virtual_size: u64, base_name: &str) -> Result<(), DiskError> {
    lock_as("the diff disk", &file, Access::Exclusive)?;
    let io = |source| DiskError::Io {
        action: "create the diff disk",
        source,
    };
    if !file.is_empty().map_err(io)? {
        return Err(io(std::io::ErrorKind::AlreadyExists.into()));
    }
    let layout = Layout::new(virtual_size)?;
    let mut head = layout.head(base_name)?;
    file.set_len(layout.metadata_bytes()).map_err(io)?;
    write_metadata(&mut file, &layout, &mut head).map_err(io)?;
    file.sync_all().map_err(io)
}

/// Writes the metadata of an empty diff. The rest of the file must be zero.
pub(super) fn write_metadata(
    storage: &mut impl Storage,
    layout: &Layout,
    head: &mut [u8],
) -> std::io::Result<()> {
    let (offset, mut l1) = layout.l1();
    write_bytes(storage, offset, &mut l1)?;
    let (offset, mut table) = layout.refcounts();
    write_bytes(storage, offset, &mut table)?;
    let mut counts: Vec<u8> = [0, 1].repeat(layout.first_data as usize);
    write_bytes(storage, layout.refcount_offset(0), &mut counts)?;
    write_bytes(storage, 0, head)
}
