//! Opens regular files only. A blocking `open` of a FIFO would wait for its
//! writer.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;

use super::error::ServiceError;

/// Opens `path` for reading; `cannot` is the message if a system call fails.
pub(super) fn open_regular(path: &Path, cannot: &str) -> Result<File, ServiceError> {
    let failed = |source| ServiceError::io(path, cannot, source);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(ServiceError::new(path, "is not a regular file").with_hint("name a file"));
    }
    Ok(file)
}
