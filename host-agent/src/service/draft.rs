//! A file that has its name only when it is complete, and that is not left
//! behind whatever ends the program before.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::linkat;
use tempfile::TempPath;

/// Names of drafts begin so, where they must have one.
const PREFIX: &str = ".pack-";
/// Readable as any new file is, not only by its owner.
const MODE: u32 = 0o666;

/// A file in the making.
#[derive(Debug)]
pub(super) struct Draft {
    file: File,
    /// Where the file system has no files without a name. Only that of a
    /// program that is killed stays.
    name: Option<TempPath>,
    directory: PathBuf,
}

impl Draft {
    /// A file for `directory`.
    pub fn in_directory(directory: &Path) -> io::Result<Self> {
        match unnamed(directory) {
            Ok(file) => Ok(Self {
                file,
                name: None,
                directory: directory.to_owned(),
            }),
            Err(_) => Self::with_name(directory),
        }
    }

    fn with_name(directory: &Path) -> io::Result<Self> {
        let (file, name) = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(PermissionsExt::from_mode(MODE))
            .tempfile_in(directory)?
            .into_parts();
        Ok(Self {
            file,
            name: Some(name),
            directory: directory.to_owned(),
        })
    }

    /// To write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives it the name `out`, in its directory; a file of that name goes.
    pub fn publish(self, out: &Path) -> io::Result<()> {
        if let Some(name) = self.name {
            return name.persist(out).map_err(|error| error.error);
        }
        let source = handle(&self.file);
        let link = |name: &Path| {
            let follow = AtFlags::AT_SYMLINK_FOLLOW;
            linkat(AT_FDCWD, &source, AT_FDCWD, name, follow).map_err(io::Error::from)
        };
        match link(out) {
            // A link replaces nothing, a new name does.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => tempfile::Builder::new()
                .prefix(PREFIX)
                .make_in(&self.directory, link)?
                .persist(out)
                .map_err(|error| error.error),
            linked => linked,
        }
    }
}

/// A file without a name, which can be given one.
fn unnamed(directory: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(MODE)
        .custom_flags(OFlag::O_TMPFILE.bits())
        .open(directory)?;
    // It gets its name by way of /proc, which may be missing.
    fs::metadata(handle(&file))?;
    Ok(file)
}

/// The open `file` as a path.
fn handle(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_draft_appears_whole_replaces_what_was_there_and_else_leaves_nothing() {
        for make in [Draft::in_directory, Draft::with_name] {
            let directory = tempfile::tempdir().unwrap();
            let out = directory.path().join("out");
            let count = || fs::read_dir(directory.path()).unwrap().count();
            for content in ["first", "second"] {
                let before = count();
                let draft = make(directory.path()).unwrap();
                draft.file().write_all(content.as_bytes()).unwrap();
                assert_eq!(count(), before + usize::from(draft.name.is_some()));
                draft.publish(&out).unwrap();
                assert_eq!(fs::read_to_string(&out).unwrap(), content);
                assert_eq!(count(), 1);
            }
            let mode = fs::metadata(&out).unwrap().permissions().mode();
            let plain = directory.path().join("plain");
            fs::write(&plain, "").unwrap();
            assert_eq!(mode, fs::metadata(&plain).unwrap().permissions().mode());
            drop(make(directory.path()).unwrap());
            assert_eq!(count(), 2);
        }
    }
}
