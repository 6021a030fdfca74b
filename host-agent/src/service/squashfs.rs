//! Builds the application disk of a role: a read-only squashfs with the role's
//! files under `/approot`.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::rc::Rc;

use backhand::compression::{CompressionOptions, Compressor, Zstd};
use backhand::{FilesystemCompressor, FilesystemWriter, NodeHeader};
use thiserror::Error;

use super::error::ServiceError;
use super::model::Role;
use super::payload::{Files, RoleFile};
use crate::progress::Progress;

/// A fast level; programs and text shrink to a third or a half of their size.
const ZSTD_LEVEL: u32 = 3;

/// Time of every file, so that the image does not depend on when it was built: 1980-01-01,
/// the first day that a package can hold.
const FILE_TIME: u32 = 315_532_800;

/// An application image that could not be built.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The role's files are refused.
    #[error("the files of role {role} were refused")]
    Payload {
        /// Role name.
        role: String,
        /// Why.
        #[source]
        source: ServiceError,
    },
    /// A file could not be read, or changed meanwhile.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image could not be written.
    #[error("cannot write the application image of role {role}")]
    Write {
        /// Role name.
        role: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image could not be put together.
    #[error("cannot build the application image of role {role}")]
    Build {
        /// Role name.
        role: String,
        /// Why.
        #[source]
        source: backhand::BackhandError,
    },
}

/// Writes the application image of `role` to `out`, an empty file, and
/// returns its length in bytes. Memory does not grow with the size of files.
///
/// Everything belongs to root and can be read by all; a file can be executed
/// when it can be in the payload. The same files give the same bytes.
///
/// # Errors
/// [`ImageError`]; `out` then holds an unusable part of the image.
pub fn build_application_image(
    role: &Role,
    out: &File,
    progress: &Progress,
) -> Result<u64, ImageError> {
    let name = &role.definition.name;
    let files = Files::open(&role.payload).map_err(|source| ImageError::Payload {
        role: name.clone(),
        source,
    })?;
    let total = files.entries().iter().map(|entry| entry.size).sum();
    let what = format!("building the application disk of role {name}");
    let _step = progress.step(what, Some(total));
    let failed = |source| ImageError::Build {
        role: name.clone(),
        source,
    };
    let broken: Broken = Rc::default();

    let mut image = FilesystemWriter::default();
    let options = CompressionOptions::Zstd(Zstd {
        compression_level: ZSTD_LEVEL,
    });
    image.set_compressor(
        FilesystemCompressor::new(Compressor::Zstd, Some(options)).map_err(failed)?,
    );
    image.set_time(FILE_TIME);
    image.set_only_root_id();
    image.set_root_mode(0o755);
    // The writer compares files by a 64-bit hash alone, and a payload could be made to
    // collide.
    image.set_no_duplicate_files(false);

    let header = |mode| NodeHeader::new(mode, 0, 0, FILE_TIME);
    image.push_dir("approot", header(0o755)).map_err(failed)?;
    for directory in files.directories() {
        image
            .push_dir(format!("approot/{directory}"), header(0o755))
            .map_err(failed)?;
    }
    for entry in files.entries() {
        let reader = Lazy {
            files: &files,
            entry,
            open: None,
            broken: Rc::clone(&broken),
            progress,
        };
        let mode = if entry.executable { 0o755 } else { 0o644 };
        image
            .push_file(reader, format!("approot/{}", entry.path), header(mode))
            .map_err(failed)?;
    }

    let cannot_write = |source| ImageError::Write {
        role: name.clone(),
        source,
    };
    let mut out = BufWriter::with_capacity(1 << 20, ErrorKeeping { out, failed: None });
    let written = image.write(&mut out);
    if let Some((path, source)) = broken.borrow_mut().take() {
        return Err(ImageError::Read { path, source });
    }
    if let Some(source) = out.get_mut().failed.take() {
        return Err(cannot_write(source));
    }
    let (_, length) = written.map_err(failed)?;
    out.flush().map_err(cannot_write)?;
    Ok(length)
}

/// Writes to a file and keeps the first error, which the writer of the image does not pass
/// on.
struct ErrorKeeping<'a> {
    out: &'a File,
    failed: Option<io::Error>,
}

impl ErrorKeeping<'_> {
    fn keep<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            let kind = error.kind();
            if kind != io::ErrorKind::Interrupted {
                self.failed.get_or_insert(error);
            }
            kind.into()
        })
    }
}

impl Write for ErrorKeeping<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let result = self.out.write(buffer);
        self.keep(result)
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.out.flush();
        self.keep(result)
    }
}

impl Seek for ErrorKeeping<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        let result = self.out.seek(position);
        self.keep(result)
    }
}

/// The first file that could not be read, and why.
type Broken = Rc<RefCell<Option<(PathBuf, io::Error)>>>;

/// Opens its file at the first read and closes it at the end, so that an image
/// of many files needs one descriptor.
struct Lazy<'a> {
    files: &'a Files,
    entry: &'a RoleFile,
    open: Option<Box<dyn Read + 'a>>,
    broken: Broken,
    progress: &'a Progress,
}

impl Read for Lazy<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.open {
            Some(open) => open.read(buffer),
            None => self.files.read(self.entry).and_then(|open| {
                let open = self.progress.watch(open);
                self.open.insert(Box::new(open)).read(buffer)
            }),
        };
        match read {
            Ok(0) if !buffer.is_empty() => {
                self.open = Some(Box::new(io::empty()));
                Ok(0)
            }
            Err(source) if source.kind() != io::ErrorKind::Interrupted => {
                let kind = source.kind();
                let place = self.files.locate(&self.entry.path);
                self.broken.borrow_mut().get_or_insert((place, source));
                Err(kind.into())
            }
            read => read,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use backhand::{FilesystemReader, InnerNode};

    use super::*;
    use crate::service::{SAMPLE, load};

    fn redis() -> Role {
        let mut service = load(Path::new(SAMPLE), None, &Progress::default()).unwrap();
        service.roles.remove(0)
    }

    #[test]
    fn a_full_disk_is_reported_as_such() {
        let role = redis();
        let out = File::options().write(true).open("/dev/full").unwrap();
        let error = build_application_image(&role, &out, &Progress::default()).unwrap_err();
        let ImageError::Write { source, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn the_image_holds_the_payload_with_its_executable_bits() {
        let role = redis();
        let mut out = tempfile::tempfile().unwrap();
        let length = build_application_image(&role, &out, &Progress::default()).unwrap();
        assert_eq!(length, out.metadata().unwrap().len());

        out.seek(SeekFrom::Start(0)).unwrap();
        let image = FilesystemReader::from_reader(io::BufReader::new(&out)).unwrap();
        let mut seen = Vec::new();
        for node in image.files() {
            let header = node.header;
            let path = node.fullpath.to_str().unwrap().to_owned();
            // The writer gives the root directory time 0 and no way to set it.
            let time = if path == "/" { 0 } else { FILE_TIME };
            assert_eq!((header.uid, header.gid, header.mtime), (0, 0, time));
            seen.push((
                path,
                header.permissions,
                matches!(node.inner, InnerNode::Dir(_)),
            ));
            if let InnerNode::File(file) = &node.inner
                && node.fullpath.ends_with("run.sh")
            {
                let mut content = Vec::new();
                image.file(file).reader().read_to_end(&mut content).unwrap();
                assert_eq!(
                    content,
                    std::fs::read(Path::new(SAMPLE).join("Cache/run.sh")).unwrap()
                );
            }
        }
        let expected = [
            ("/", 0o755, true),
            ("/approot", 0o755, true),
            ("/approot/run.sh", 0o755, false),
        ];
        assert_eq!(
            seen,
            expected.map(|(path, mode, dir)| (path.to_owned(), mode, dir))
        );
    }

    #[test]
    fn a_file_that_changes_meanwhile_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, [7; 100]).unwrap();
        let payload = crate::service::model::Payload::Directory(directory.path().into());
        let files = Files::open(&payload).unwrap();
        for size in [99, 101] {
            std::fs::write(&path, vec![7; size]).unwrap();
            let broken: Broken = Rc::default();
            let mut reader = Lazy {
                files: &files,
                entry: &files.entries()[0],
                open: None,
                broken: Rc::clone(&broken),
                progress: &Progress::default(),
            };
            assert!(reader.read_to_end(&mut Vec::new()).is_err());
            assert_eq!(broken.borrow().as_ref().unwrap().0, path);
        }
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(files.read(&files.entries()[0]).is_err());
    }
}
