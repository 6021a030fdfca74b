//! Makes the disks of an instance: all of them for a new one, some anew for one that exists.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::{APPLICATION, DIFF, GuestError, RESOURCE, create};
use crate::store::content::{ContentHold, ContentStore};
use crate::store::image::Image;
use crate::supervisor::lifecycle::Renewal;
use crate::supervisor::spec::InstanceSpec;
use crate::vmm::disk;

/// Space on the resource disk beyond the local storage of the role, for logs
/// and temporary files.
const RESOURCE_RESERVE_MIB: u64 = 512;

/// Buffer size of a copy, in bytes.
const COPY_BUFFER: usize = 64 << 10;

/// Suffix of a disk that has not replaced the one before it yet.
const NEW: &str = "new";

/// Creates the disks of an instance in `dir`. The application disk is a link to the content
/// that the spec names, since guests only read it. Blocking.
pub fn create_disks(
    dir: &Path,
    spec: &InstanceSpec,
    image: &Image,
    content: &ContentStore,
    hold: &ContentHold,
) -> Result<(), GuestError> {
    create_os(&dir.join(DIFF), image)?;
    create_resource(&dir.join(RESOURCE), spec, image)?;
    link_application(&dir.join(APPLICATION), spec, content, hold)
}

/// Makes the disks of `renewal` anew. No VMM process uses them. Each is whole before it
/// replaces the one before it, so that what fails can be repeated. Blocking.
pub fn renew_disks(
    dir: &Path,
    spec: &InstanceSpec,
    image: &Image,
    content: &ContentStore,
    renewal: Renewal,
) -> Result<(), GuestError> {
    if renewal.os {
        replace(&dir.join(DIFF), |path| create_os(path, image))?;
    }
    if renewal.resource {
        replace(&dir.join(RESOURCE), |path| {
            create_resource(path, spec, image)
        })?;
    }
    if renewal.application {
        let hold = content.hold()?;
        replace(&dir.join(APPLICATION), |path| {
            link_application(path, spec, content, &hold)
        })?;
    }
    Ok(())
}

/// Replaces the file `path` with one that `make` makes.
fn replace(
    path: &Path,
    make: impl FnOnce(&Path) -> Result<(), GuestError>,
) -> Result<(), GuestError> {
    let failed = |source| GuestError::File {
        what: "replace",
        path: path.to_owned(),
        source,
    };
    let new = path.with_added_extension(NEW);
    remove(&new).map_err(failed)?;
    make(&new)?;
    fs::rename(&new, path).map_err(failed)?;
    // `rename(2)` leaves both names if both are links to the same file.
    remove(&new).map_err(failed)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn create_os(path: &Path, image: &Image) -> Result<(), GuestError> {
    let diff = create(path)?;
    let base = image.base_path.to_string_lossy();
    disk::create_diff(diff, image.base_size, &base).map_err(|source| GuestError::Diff {
        path: path.to_owned(),
        source: source.into(),
    })
}

fn create_resource(path: &Path, spec: &InstanceSpec, image: &Image) -> Result<(), GuestError> {
    let storage = spec.goal.role.local_storage.iter();
    let storage: u64 = storage.map(|storage| storage.size_mib).sum();
    let size = (storage + RESOURCE_RESERVE_MIB).min(spec.size.resource_mib.max(1)) << 20;
    let disk = create(path)?;
    copy_sparse(&image.resource, &disk)
        .and_then(|()| disk.set_len(size))
        .map_err(|source| GuestError::File {
            what: "fill",
            path: path.to_owned(),
            source,
        })
}

fn link_application(
    path: &Path,
    spec: &InstanceSpec,
    content: &ContentStore,
    hold: &ContentHold,
) -> Result<(), GuestError> {
    content
        .link(hold, &spec.application, path)
        .map_err(|source| GuestError::File {
            what: "link the content to",
            path: path.to_owned(),
            source,
        })
}

/// Copies `from` to the empty file `to`, without its holes.
pub(super) fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    let end = from.metadata()?.len();
    let mut buffer = vec![0; COPY_BUFFER];
    let mut at = 0;
    loop {
        let start = match lseek(from, offset(at)?, Whence::SeekData) {
            Ok(start) => start.cast_unsigned(),
            // The rest is a hole.
            Err(Errno::ENXIO) => return to.set_len(end),
            Err(errno) => return Err(errno.into()),
        };
        let hole = lseek(from, offset(start)?, Whence::SeekHole)?.cast_unsigned();
        at = start;
        while at < hole {
            let part = &mut buffer[..COPY_BUFFER.min((hole - at) as usize)];
            from.read_exact_at(part, at)?;
            to.write_all_at(part, at)?;
            at += part.len() as u64;
        }
    }
}

fn offset(at: u64) -> io::Result<i64> {
    i64::try_from(at).map_err(io::Error::other)
}
