//! A tar stream of a guest as files of this machine. The guest is hostile: every entry stays
//! below the destination, since each directory on its way is opened without following a link.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmod, fchmodat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat};
use tar::{Archive, Entry, EntryType};
use tokio::sync::mpsc;

use super::Copied;
use crate::progress::Progress;

/// Under which names the entries of the stream are created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rename {
    /// What is in the directory `.` of the stream.
    Contents,
    /// The same below a new directory of this name.
    ContentsInto(OsString),
    /// The entry of the first name and what is below it, under the second one.
    To(OsString, OsString),
}

impl Rename {
    /// The entry `name` under its own name.
    pub fn as_is(name: &str) -> Self {
        Self::To(name.into(), name.into())
    }

    /// The names of a path of the stream below the destination.
    fn apply(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => names.push(name.to_owned()),
                Component::CurDir => {}
                _ => return Err(escapes(path)),
            }
        }
        match self {
            Self::Contents => {}
            Self::ContentsInto(new) => names.insert(0, new.clone()),
            Self::To(old, new) => match names.first_mut() {
                Some(first) if first == old => first.clone_from(new),
                _ => return Err(escapes(path)),
            },
        }
        Ok(names)
    }
}

fn escapes(path: &Path) -> io::Error {
    let text = format!(
        "the guest sends {}, which is not below what was asked for",
        path.display()
    );
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Creates the entries of `stream` in the directory `root`.
pub fn unpack(
    stream: impl Read,
    root: &File,
    rename: &Rename,
    progress: &Progress,
) -> io::Result<Copied> {
    let ended = Cell::new(false);
    let stream = SeesEnd {
        inner: progress.watch(stream),
        ended: &ended,
    };
    let mut archive = Archive::new(stream);
    let mut copied = Copied::default();
    for entry in archive.entries()? {
        let mut entry = entry.map_err(|error| {
            if ended.get() {
                io::ErrorKind::UnexpectedEof.into()
            } else {
                io::Error::new(io::ErrorKind::InvalidData, error)
            }
        })?;
        let path = PathBuf::from(OsStr::from_bytes(&entry.path_bytes()));
        let names = rename.apply(&path)?;
        let of =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        match create(&mut entry, root, &names, rename).map_err(of)? {
            Some(bytes) => {
                copied.entries += 1;
                copied.bytes += bytes;
            }
            None => copied.skipped += 1,
        }
    }
    if copied == Copied::default() {
        // An archive has at least the entry that was asked for.
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // An archive is padded: who writes it is to come to its end.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    Ok(copied)
}

/// Notes that its reader has come to the end of the stream.
struct SeesEnd<'a, R> {
    inner: R,
    ended: &'a Cell<bool>,
}

impl<R: Read> Read for SeesEnd<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.ended.set(count == 0 && !buffer.is_empty());
        Ok(count)
    }
}

/// Creates one entry; its bytes, or nothing if it is of a kind that is not copied.
fn create<R: Read>(
    entry: &mut Entry<'_, R>,
    root: &File,
    names: &[OsString],
    rename: &Rename,
) -> io::Result<Option<u64>> {
    // Without the bits that give a program the rights of its owner.
    let mode = Mode::from_bits_truncate(entry.header().mode()? & 0o777);
    let kind = entry.header().entry_type();
    let Some((name, parents)) = names.split_last() else {
        // The destination itself.
        return Ok(Some(0));
    };
    let parent = descend(root, parents)?;
    let name = name.as_os_str();
    match kind {
        EntryType::Directory => {
            make_directory(parent.as_fd(), name)?;
            // Stays writable for what is to come.
            let mode = mode | Mode::S_IRWXU;
            fchmodat(parent.as_fd(), name, mode, FchmodatFlags::NoFollowSymlink).or_else(
                |errno| {
                    // Kernels before 6.6 know no such flag for modes; the directory was just opened
                    // without following a link.
                    match errno {
                        Errno::EOPNOTSUPP | Errno::ENOSYS => {
                            fchmod(&step(parent.as_fd(), name)?, mode)
                        }
                        errno => Err(errno),
                    }
                },
            )?;
            Ok(Some(0))
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            remove(parent.as_fd(), name)?;
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW;
            let new = openat(
                parent.as_fd(),
                name,
                flags | OFlag::O_CLOEXEC,
                Mode::S_IRUSR | Mode::S_IWUSR,
            )?;
            let mut file = File::from(new);
            let bytes = io::copy(entry, &mut file)?;
            if bytes != entry.size() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            fchmod(&file, mode)?;
            Ok(Some(bytes))
        }
        EntryType::Symlink => {
            let target = entry.link_name_bytes().unwrap_or_default();
            remove(parent.as_fd(), name)?;
            symlinkat(OsStr::from_bytes(&target), parent.as_fd(), name)?;
            Ok(Some(0))
        }
        EntryType::Link => {
            let target = entry.link_name_bytes().unwrap_or_default();
            let target = rename.apply(Path::new(OsStr::from_bytes(&target)))?;
            let Some((old, parents)) = target.split_last() else {
                return Err(escapes(Path::new("")));
            };
            let of = descend(root, parents)?;
            let found = fstatat(of.as_fd(), old.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
            if found.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
                return Err(escapes(Path::new(old)));
            }
            if target != names {
                remove(parent.as_fd(), name)?;
                linkat(
                    of.as_fd(),
                    old.as_os_str(),
                    parent.as_fd(),
                    name,
                    AtFlags::empty(),
                )?;
            }
            Ok(Some(0))
        }
        _ => Ok(None),
    }
}

/// Opens the directory `parents` below `root`; what is missing is created.
fn descend(root: &File, parents: &[OsString]) -> io::Result<OwnedFd> {
    let mut directory = root.as_fd().try_clone_to_owned()?;
    for name in parents {
        make_directory(directory.as_fd(), name)?;
        directory = step(directory.as_fd(), name)?;
    }
    Ok(directory)
}

/// Opens a directory in a directory, not through a link.
fn step(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// Makes a directory unless it exists.
fn make_directory(parent: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    match mkdirat(parent, name, Mode::S_IRWXU) {
        // A link, or a file, is refused.
        Err(Errno::EEXIST) => step(parent, name).map(drop),
        made => made,
    }
}

/// Removes a file or link of this name, so that nothing is written through it.
fn remove(parent: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::ENOENT) => Ok(()),
        removed => removed,
    }
}

/// The bytes of a session's output. They end when its sender is dropped.
pub struct Received {
    pieces: mpsc::Receiver<Vec<u8>>,
    piece: io::Cursor<Vec<u8>>,
}

impl From<mpsc::Receiver<Vec<u8>>> for Received {
    fn from(pieces: mpsc::Receiver<Vec<u8>>) -> Self {
        Self {
            pieces,
            piece: io::Cursor::default(),
        }
    }
}

impl Read for Received {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = io::Cursor::new(piece),
                None => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use tar::{Builder, Header};

    type Entries<'a> = &'a [(EntryType, &'a str, &'a str)];

    /// The third part is the content, or the target of a link.
    fn stream(entries: Entries<'_>) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (kind, name, rest) in entries {
            let mut header = Header::new_old();
            header.set_entry_type(*kind);
            header.set_mode(0o6751);
            // As it stands: `Builder` refuses paths that escape.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            let content = if *kind == EntryType::Regular {
                *rest
            } else {
                ""
            };
            header.as_old_mut().linkname[..rest.len()].copy_from_slice(rest.as_bytes());
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn take(directory: &Path, rename: &Rename, entries: Entries<'_>) -> io::Result<Copied> {
        let root = File::open(directory).unwrap();
        unpack(&*stream(entries), &root, rename, &Progress::default())
    }

    #[test]
    fn a_tree_comes_out_as_it_went_in() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir_all(source.join("a/b")).unwrap();
        fs::write(source.join("a/program"), "run").unwrap();
        fs::set_permissions(source.join("a/program"), fs::Permissions::from_mode(0o750)).unwrap();
        fs::write(source.join("a/b/large"), vec![7; 100_000]).unwrap();
        symlink("/etc/shadow", source.join("link")).unwrap();
        nix::unistd::mkfifo(&source.join("pipe"), Mode::S_IRWXU).unwrap();
        let mut bytes = Vec::new();
        let progress = Progress::default();
        let packed = super::super::pack::pack(&source, Path::new("x"), &mut bytes, &progress);
        let packed = packed.unwrap();
        assert_eq!((packed.entries, packed.skipped), (6, 1));
        let root = File::open(dir.path()).unwrap();
        let rename = Rename::To("x".into(), "copy".into());
        let unpacked = unpack(&*bytes, &root, &rename, &progress).unwrap();
        assert_eq!((unpacked.entries, unpacked.bytes), (6, packed.bytes));
        let copy = dir.path().join("copy");
        assert_eq!(fs::read(copy.join("a/b/large")).unwrap(), vec![7; 100_000]);
        let mode = fs::metadata(copy.join("a/program"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o750);
        assert_eq!(
            fs::read_link(copy.join("link")).unwrap(),
            Path::new("/etc/shadow")
        );
        // Again: what exists is replaced.
        unpack(&*bytes, &root, &rename, &progress).unwrap();
        // A stream that breaks off is not taken for a whole one.
        for cut in [600, 2000, 60_000] {
            let broken = unpack(&bytes[..cut], &root, &rename, &progress).unwrap_err();
            assert_eq!(
                broken.kind(),
                io::ErrorKind::UnexpectedEof,
                "{cut}: {broken}"
            );
        }
    }

    #[test]
    fn nothing_is_written_outside_the_destination() {
        use EntryType::{Directory, Link, Regular, Symlink};
        let outer = tempfile::tempdir().unwrap();
        let victim = outer.path().join("victim");
        fs::write(&victim, "mine").unwrap();
        let into = outer.path().join("into");
        let out = outer.path().to_str().unwrap();
        let name = Rename::as_is("x");
        let through = format!("{out}/victim");
        let attacks: &[Entries<'_>] = &[
            &[(Regular, "../victim", "bad")],
            &[(Regular, "x/../../victim", "bad")],
            &[(Regular, &through, "bad")],
            &[(Regular, "other", "bad")],
            &[(Symlink, "x", out), (Regular, "x/victim", "bad")],
            &[
                (Directory, "x", ""),
                (Symlink, "x/l", out),
                (Regular, "x/l/victim", "bad"),
            ],
            &[(Symlink, "x", out), (Directory, "x", "")],
            &[(Link, "x", "../victim"), (Regular, "x", "bad")],
            &[
                (Directory, "x", ""),
                (Symlink, "x/l", &through),
                (Link, "x/h", "x/l"),
            ],
        ];
        for attack in attacks {
            fs::create_dir(&into).unwrap();
            take(&into, &name, attack).unwrap_err();
            assert_eq!(fs::read_to_string(&victim).unwrap(), "mine", "{attack:?}");
            let left = fs::read_dir(outer.path()).unwrap().count();
            assert_eq!(left, 2, "{attack:?}");
            fs::remove_dir_all(&into).unwrap();
        }
        // A link that was there is replaced, and not written through.
        fs::create_dir(&into).unwrap();
        symlink(&victim, into.join("x")).unwrap();
        take(&into, &name, &[(Regular, "./x", "new")]).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "mine");
        let file = into.join("x");
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        // No program of the guest's gets its owner's rights here.
        let mode = file.symlink_metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o751);
    }

    #[test]
    fn entries_are_renamed_to_the_destination() {
        let apply = |rename: &Rename, path: &str| -> Option<String> {
            let names = rename.apply(Path::new(path)).ok()?;
            let names: Vec<_> = names.iter().map(|it| it.to_str().unwrap()).collect();
            Some(names.join("/"))
        };
        let to = Rename::To("a".into(), "b".into());
        assert_eq!(apply(&to, "./a/c").as_deref(), Some("b/c"));
        assert_eq!(apply(&to, "a").as_deref(), Some("b"));
        assert_eq!(apply(&to, "c/a"), None);
        assert_eq!(apply(&Rename::Contents, "./c").as_deref(), Some("c"));
        assert_eq!(apply(&Rename::Contents, "./"), Some(String::new()));
        let into = Rename::ContentsInto("n".into());
        assert_eq!(apply(&into, "./").as_deref(), Some("n"));
        assert_eq!(apply(&into, "c/../d"), None);
    }
}
