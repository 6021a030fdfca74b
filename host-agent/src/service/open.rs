//! Opens what must be a regular file. Opening a pipe would wait for whoever
//! writes into it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;

use super::error::ServiceError;

/// Opens `path` for reading; `cannot` is said where the system does not let it.
pub(super) fn open_regular(path: &Path, cannot: &str) -> Result<File, ServiceError> {
    let refused = |source| ServiceError::io(path, cannot, source);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(refused)?;
    if !file.metadata().map_err(refused)?.is_file() {
        return Err(ServiceError::new(path, "is not a regular file").with_hint("name a file"));
    }
    Ok(file)
}
