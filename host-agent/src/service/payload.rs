//! The files of one role, whether they come from a directory or a package:
//! listed once, checked, then read one at a time.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

use super::error::ServiceError;
use super::model::Payload;
use super::open::open_regular;
use super::package::Package;

/// Most files of all roles of a service.
pub const MAX_FILES: usize = 50_000;

/// Most bytes of the files of all roles of a service, and of a package unpacked: 2 GiB.
pub const MAX_UNPACKED: u64 = 2 << 30;

/// Most bytes of the paths of all files of a service: 16 MiB. The list of files is kept in
/// memory.
pub const MAX_PATHS: usize = 16 << 20;

/// Deepest directory below approot.
pub const MAX_DEPTH: usize = 32;

/// Longest name in a directory (Linux and squashfs).
const MAX_NAME: usize = 255;

/// Longest path below approot. Linux accepts 4,095 bytes (`PATH_MAX`), among them the path
/// of approot.
const MAX_PATH: usize = 4000;

/// A file of a role, below approot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleFile {
    /// Path below approot, `/` between its parts.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Has an executable bit.
    pub executable: bool,
}

/// The files of one role. Directories without files are not kept: a package cannot hold
/// them, and a packed service must equal its directory.
pub struct Files {
    entries: Arc<[RoleFile]>,
    origin: Origin,
}

enum Origin {
    Directory { path: PathBuf, root: OwnedFd },
    Package { package: Arc<Package>, role: String },
}

impl Files {
    /// Lists and checks the files of `payload`, sorted by path.
    pub fn open(payload: &Payload) -> Result<Self, ServiceError> {
        match payload {
            Payload::Directory(path) => Self::of_directory(path, &mut Total::default()),
            Payload::Package { package, role } => Self::of_package(Arc::clone(&package.0), role),
        }
    }

    /// The files of `role` in `package`.
    pub(super) fn of_package(package: Arc<Package>, role: &str) -> Result<Self, ServiceError> {
        let entries = package.entries(role).ok_or_else(|| {
            let what = format!("the package has no files for role \"{role}\"");
            ServiceError::new(package.path(), what)
        })?;
        Ok(Self {
            entries,
            origin: Origin::Package {
                package,
                role: role.to_owned(),
            },
        })
    }

    /// The files of the directory `path`, which are added to `total`.
    pub(super) fn of_directory(path: &Path, total: &mut Total) -> Result<Self, ServiceError> {
        let root = File::open(path)
            .map_err(|source| ServiceError::io(path, "cannot open the directory", source))?;
        let mut walk = Walk {
            root: path,
            entries: Vec::new(),
            total,
        };
        walk.directory(path, "", 0).map_err(|error| {
            error.or_hint("take out of the directory what the role does not need")
        })?;
        let mut entries = walk.entries;
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        check_paths(&entries).map_err(|what| {
            ServiceError::new(path, what)
                .with_hint("rename one: a package on Windows could not hold both")
        })?;
        Ok(Self {
            entries: entries.into(),
            origin: Origin::Directory {
                path: path.to_owned(),
                root: root.into(),
            },
        })
    }

    /// The files, sorted by path.
    pub fn entries(&self) -> &[RoleFile] {
        &self.entries
    }

    /// The file at `path` below approot.
    pub fn find(&self, path: &str) -> Option<&RoleFile> {
        let found = self
            .entries
            .binary_search_by(|entry| entry.path.as_str().cmp(path));
        found.ok().map(|index| &self.entries[index])
    }

    /// Every directory below approot that leads to a file, parents first.
    pub fn directories(&self) -> BTreeSet<&str> {
        let mut directories = BTreeSet::new();
        for entry in &*self.entries {
            let mut rest = entry.path.as_str();
            while let Some(slash) = rest.rfind('/') {
                rest = &rest[..slash];
                if !directories.insert(rest) {
                    break;
                }
            }
        }
        directories
    }

    /// Where a person finds `entry`.
    pub fn locate(&self, entry: &str) -> PathBuf {
        match &self.origin {
            Origin::Directory { path, .. } => path.join(entry),
            Origin::Package { package, role } => package.locate(role, entry),
        }
    }

    /// Opens the content of `entry`, which must be of this list. Reading fails if the file
    /// changed since it was listed.
    pub fn read(&self, entry: &RoleFile) -> io::Result<Box<dyn Read + '_>> {
        match &self.origin {
            Origin::Directory { root, .. } => {
                // A symbolic link made since the listing must not lead out of the root.
                let how = OpenHow::new()
                    .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                    .mode(Mode::empty())
                    .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
                let file = File::from(openat2(root, entry.path.as_str(), how)?);
                if !file.metadata()?.is_file() {
                    return Err(io::Error::other("is not a regular file any more"));
                }
                Ok(Box::new(Exact {
                    inner: file,
                    left: entry.size,
                }))
            }
            Origin::Package { package, role } => {
                let missing = || io::Error::from(io::ErrorKind::NotFound);
                let content = package.open_file(role, &entry.path).ok_or_else(missing)?;
                Ok(Box::new(content))
            }
        }
    }
}

/// Walks a directory whose owner may change it meanwhile.
struct Walk<'a> {
    root: &'a Path,
    entries: Vec<RoleFile>,
    total: &'a mut Total,
}

impl Walk<'_> {
    fn directory(&mut self, path: &Path, prefix: &str, depth: usize) -> Result<(), ServiceError> {
        let cannot = |source| ServiceError::io(path, "cannot list the directory", source);
        if depth > MAX_DEPTH {
            let what = format!("directories nested deeper than {MAX_DEPTH}");
            return Err(ServiceError::new(path, what));
        }
        for entry in fs::read_dir(path).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            let here = entry.path();
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                return Err(ServiceError::new(&here, "the file name is not UTF-8")
                    .with_hint("rename the file"));
            };
            check_name(name)
                .map_err(|what| ServiceError::new(&here, what).with_hint("rename the file"))?;
            let relative = if prefix.is_empty() {
                name.to_owned()
            } else {
                format!("{prefix}/{name}")
            };
            let metadata = fs::symlink_metadata(&here)
                .map_err(|source| ServiceError::io(&here, "cannot read the file", source))?;
            let kind = metadata.file_type();
            if kind.is_dir() {
                self.directory(&here, &relative, depth + 1)?;
            } else if kind.is_file() {
                self.file(&here, relative, &metadata)?;
            } else if kind.is_symlink() {
                return Err(ServiceError::new(
                    &here,
                    "symbolic links are not allowed in a role's files",
                )
                .with_hint("replace the link by the file it points to"));
            } else {
                return Err(
                    ServiceError::new(&here, "is neither a regular file nor a directory")
                        .with_hint("remove it from the role's directory"),
                );
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        here: &Path,
        path: String,
        metadata: &fs::Metadata,
    ) -> Result<(), ServiceError> {
        check_path(&path).map_err(|what| ServiceError::new(here, what))?;
        self.total
            .add(&path, metadata.len())
            .map_err(|what| ServiceError::new(self.root, what))?;
        open_regular(here, "cannot read the file")?;
        self.entries.push(RoleFile {
            path,
            size: metadata.len(),
            executable: metadata.mode() & 0o111 != 0,
        });
        Ok(())
    }
}

/// What the files of all roles of a service add up to.
#[derive(Debug, Default)]
pub(super) struct Total {
    files: usize,
    bytes: u64,
    paths: usize,
}

impl Total {
    /// Adds the file at `path` with `size` bytes; fails with the limit that is exceeded.
    pub fn add(&mut self, path: &str, size: u64) -> Result<(), String> {
        self.files += 1;
        self.bytes = self.bytes.saturating_add(size);
        self.paths += path.len();
        if self.files > MAX_FILES {
            return Err(format!(
                "the roles hold more than {MAX_FILES} files together"
            ));
        }
        if self.bytes > MAX_UNPACKED {
            return Err(format!(
                "the files of the roles are larger than {MAX_UNPACKED} bytes together"
            ));
        }
        if self.paths > MAX_PATHS {
            return Err(format!(
                "the paths of the files have more than {MAX_PATHS} bytes together"
            ));
        }
        Ok(())
    }
}

/// Whether a file of a role can have `path`, whose parts [`check_name`] accepts.
pub(super) fn check_path(path: &str) -> Result<(), String> {
    if path.len() > MAX_PATH {
        return Err(format!(
            "the path below approot is longer than {MAX_PATH} bytes"
        ));
    }
    Ok(())
}

/// Refuses two files at one path, a file that is also a directory, and paths that differ
/// only in case: a package comes from a platform that ignores it.
pub(super) fn check_paths(files: &[RoleFile]) -> Result<(), String> {
    let mut paths: HashMap<String, &str> = HashMap::with_capacity(files.len());
    for file in files {
        let path = file.path.as_str();
        match paths.insert(path.to_lowercase(), path) {
            None => {}
            Some(other) if other == path => return Err(format!("duplicate file \"{path}\"")),
            Some(other) => {
                return Err(format!("\"{other}\" and \"{path}\" differ only in case"));
            }
        }
    }
    for path in paths.keys() {
        let mut parent = path.as_str();
        while let Some(slash) = parent.rfind('/') {
            parent = &parent[..slash];
            if let Some(file) = paths.get(parent) {
                return Err(format!("\"{file}\" is a file and a directory"));
            }
        }
    }
    Ok(())
}

/// Whether `name` can be one part of a path here, in a package and in a guest.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name == "." || name == ".." {
        return Err(format!("\"{name}\" is not the name of a file"));
    }
    if name.len() > MAX_NAME {
        return Err(format!("the file name is longer than {MAX_NAME} bytes"));
    }
    // The separators of Linux and Windows, and characters that XML cannot hold.
    let bad =
        |c: char| c == '/' || c == '\\' || c.is_control() || c == '\u{FFFE}' || c == '\u{FFFF}';
    match name.chars().find(|c| bad(*c)) {
        Some(c) => Err(format!(
            "the file name \"{}\" holds {c:?}",
            name.escape_debug()
        )),
        None => Ok(()),
    }
}

/// Reads exactly `left` bytes: a file that grew or shrank is an error.
struct Exact<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Exact<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        if read as u64 > self.left || (read == 0 && self.left > 0 && !buffer.is_empty()) {
            return Err(io::Error::other("changed while it was read"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}
