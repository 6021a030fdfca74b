//! Removes what is in a directory, however deep it is.
//!
//! A role can make a tree that is deeper than the stack of a recursion or than a process may
//! have open files, and whose paths are longer than `PATH_MAX`. The walk has one directory open
//! at a time, and goes up through `..`.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Most subdirectories that a level remembers; the directory is read again for more.
const REMEMBERED: usize = 256;
/// Never through a symbolic link.
const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// A directory above the one that is open.
struct Level {
    identity: (u64, u64),
    /// Subdirectories that are not empty; the walk is in the last one.
    full: Vec<CString>,
    /// `full` names all of them.
    complete: bool,
}

/// Removes everything in `directory`. Nothing else may change the tree meanwhile; a tree that
/// is changed gives an error.
pub fn empty(directory: &Path) -> io::Result<()> {
    let mut here = open(directory, DIRECTORY, Mode::empty())?;
    let mut above: Vec<Level> = Vec::new();
    loop {
        let mut level = remove_simple(&here)?;
        // Goes up from directories in which nothing is left.
        while level.full.is_empty() {
            if !level.complete {
                level = remove_simple(&here)?;
                continue;
            }
            let Some(mut parent) = above.pop() else {
                return Ok(());
            };
            let up = openat(&here, c"..", DIRECTORY, Mode::empty())?;
            if identity(&fstat(&up)?) != parent.identity {
                return Err(io::Error::other("a directory was moved during its removal"));
            }
            here = up;
            if let Some(name) = parent.full.pop() {
                unlinkat(&here, name.as_c_str(), UnlinkatFlags::RemoveDir)?;
            }
            level = parent;
        }
        if let Some(name) = level.full.last() {
            let down = openat(&here, name.as_c_str(), DIRECTORY, Mode::empty())?;
            above.push(level);
            here = down;
        }
    }
}

/// Removes files and empty directories of a directory; what remains.
fn remove_simple(directory: &OwnedFd) -> io::Result<Level> {
    let mut level = Level {
        identity: identity(&fstat(directory)?),
        full: Vec::new(),
        complete: true,
    };
    // A description of its own: its offset is at the start.
    let again = openat(directory, c".", DIRECTORY, Mode::empty())?;
    for entry in Dir::from_fd(again)?.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        if !is_directory(directory, name, entry.file_type())? {
            unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)?;
            continue;
        }
        match unlinkat(directory, name, UnlinkatFlags::RemoveDir) {
            Ok(()) => {}
            Err(Errno::ENOTEMPTY | Errno::EEXIST) if level.full.len() < REMEMBERED => {
                level.full.push(name.to_owned());
            }
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => level.complete = false,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(level)
}

fn is_directory(directory: &OwnedFd, name: &CStr, kind: Option<Type>) -> io::Result<bool> {
    match kind {
        Some(kind) => Ok(kind == Type::Directory),
        // The file system does not keep types in its directories.
        None => {
            let status = fstatat(directory.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            Ok(SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR)
        }
    }
}

const fn identity(status: &FileStat) -> (u64, u64) {
    (status.st_dev, status.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::mkdirat;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn entries(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn a_tree_deeper_than_any_stack_or_path_is_removed() {
        // A file system in memory: the directories of this one need not reach a disk.
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut here = open(root.path(), DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..23_000 {
            mkdirat(&here, c"d", Mode::S_IRWXU).unwrap();
            here = openat(&here, c"d", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(here);
        empty(root.path()).unwrap();
        assert_eq!(entries(root.path()), 0);
    }

    #[test]
    fn a_wide_tree_is_removed_and_links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "").unwrap();
        for number in 0..REMEMBERED + 10 {
            let directory = root.path().join(number.to_string()).join("full");
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("file"), "").unwrap();
            symlink(outside.path(), directory.join("link")).unwrap();
        }
        symlink(outside.path(), root.path().join("link")).unwrap();
        fs::create_dir(root.path().join("empty")).unwrap();
        empty(root.path()).unwrap();
        assert_eq!(entries(root.path()), 0);
        assert_eq!(entries(outside.path()), 1);
        assert!(empty(&root.path().join("missing")).is_err());
    }
}
