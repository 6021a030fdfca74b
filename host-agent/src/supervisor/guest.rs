//! The files of an instance's guest, and the specification for its VMM process.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::{Whence, lseek};

use super::plan::{APPLICATION_DISK, OS_DISK, RESOURCE_DISK};
use super::spec::InstanceSpec;
use crate::queued_writer::previous;
use crate::store::content::{ContentHold, ContentStore};
use crate::store::image::Image;
use crate::vmm::disk;
use crate::vmm::spec::{DiskBacking, DiskSpec, FileIndex, GuestSpec, SerialSpec};

/// Kernel command line. ACPI describes the devices; `quiet`, because each byte on the
/// serial port is a VM exit; a panic resets at once, so that it is reported; the kernel's
/// tests of its ciphers would delay each boot.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=acpi pci=off tsc=reliable \
    no_timer_check 8250.nr_uarts=1 random.trust_cpu=on cryptomgr.notests";

/// Space on the resource disk beyond the local storage of the role, for logs
/// and temporary files.
const RESOURCE_RESERVE_MIB: u64 = 512;

/// Size at which the serial log is rotated, in bytes.
const SERIAL_BYTES: u64 = 10 << 20;
/// Size at which the log of the VMM processes is rotated, in bytes.
const VMM_LOG_BYTES: u64 = 1 << 20;

/// Buffer size of a copy, in bytes.
const COPY_BUFFER: usize = 64 << 10;

/// File name of the OS disk, a diff over the image's base.
const DIFF: &str = "diff.qcow2";
/// File name of the resource disk.
const RESOURCE: &str = "resource.raw";
/// File name of the application disk.
const APPLICATION: &str = "app.squashfs";
/// File name of an application disk that is about to replace it.
const NEXT_APPLICATION: &str = "app.squashfs.next";

/// An error with the files of a guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A file cannot be opened or created.
    #[error("cannot {what} {}", path.display())]
    File {
        /// The failed step.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The application disk cannot be built.
    #[error("cannot build the application disk of role {role} in {}", directory.display())]
    Application {
        /// Role name.
        role: String,
        /// Directory of the content.
        directory: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The content store cannot be written.
    #[error("cannot add the application disk to the content")]
    Content(#[source] io::Error),
    /// The diff disk cannot be created.
    #[error("cannot create the diff disk {}", path.display())]
    Diff {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl From<io::Error> for GuestError {
    fn from(source: io::Error) -> Self {
        Self::Content(source)
    }
}

impl GuestError {
    /// The application disk of `role` could not be built, for `map_err`.
    pub(super) fn application<E: std::error::Error + Send + Sync + 'static>(
        role: &str,
        directory: &Path,
    ) -> impl FnOnce(E) -> Self {
        let (role, directory) = (role.to_owned(), directory.to_owned());
        move |source| Self::Application {
            role,
            directory,
            source: source.into(),
        }
    }
}

/// Creates the disks of an instance in `dir`. The application disk is a link to the content
/// that the spec names, since guests only read it. Blocking.
pub fn create_disks(
    dir: &Path,
    spec: &InstanceSpec,
    image: &Image,
    content: &ContentStore,
    hold: &ContentHold,
) -> Result<(), GuestError> {
    let path = dir.join(DIFF);
    let diff = create(&path)?;
    disk::create_diff(diff, image.base_size, &image.base_path.to_string_lossy()).map_err(
        |source| GuestError::Diff {
            path: path.clone(),
            source: source.into(),
        },
    )?;
    let path = dir.join(RESOURCE);
    let storage = spec.goal.role.local_storage.iter();
    let storage: u64 = storage.map(|storage| storage.size_mib).sum();
    let size = (storage + RESOURCE_RESERVE_MIB).min(spec.size.resource_mib.max(1)) << 20;
    let disk = create(&path)?;
    copy_sparse(&image.resource, &disk)
        .and_then(|()| disk.set_len(size))
        .map_err(|source| GuestError::File {
            what: "fill",
            path,
            source,
        })?;
    let path = dir.join(APPLICATION);
    content
        .link(hold, &spec.application, &path)
        .map_err(|source| GuestError::File {
            what: "link the content to",
            path,
            source,
        })
}

/// Replaces the application disk of an instance whose guest does not run by the content that
/// `spec` names. Blocking.
pub fn swap_application(
    dir: &Path,
    spec: &InstanceSpec,
    content: &ContentStore,
    hold: &ContentHold,
) -> Result<(), GuestError> {
    let (path, next) = (dir.join(APPLICATION), dir.join(NEXT_APPLICATION));
    let swap = || {
        match fs::remove_file(&next) {
            // Left by a host agent that died.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        content.link(hold, &spec.application, &next)?;
        fs::rename(&next, &path)?;
        // Both may be links to the same file: then rename(2) does nothing.
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => File::open(dir)?.sync_all(),
        }
    };
    swap().map_err(|source| GuestError::File {
        what: "link the content to",
        path: path.clone(),
        source,
    })
}

/// Opens everything that the guest of an instance needs.
pub fn prepare(
    dir: &Path,
    spec: &InstanceSpec,
    image: &Image,
    dial_limit: Duration,
) -> Result<(GuestSpec, Vec<OwnedFd>), GuestError> {
    let kvm = open(Path::new("/dev/kvm"), true)?;
    prepare_on(kvm, dir, spec, image, dial_limit)
}

fn prepare_on(
    kvm: File,
    dir: &Path,
    spec: &InstanceSpec,
    image: &Image,
    dial_limit: Duration,
) -> Result<(GuestSpec, Vec<OwnedFd>), GuestError> {
    let mut files: Vec<OwnedFd> = Vec::new();
    let mut add = |file: File| {
        files.push(file.into());
        FileIndex(u8::try_from(files.len() - 1).expect("a guest has fewer than 256 files"))
    };
    // The verified file, even if its name now refers to another one: a diff disk is only
    // valid over its base. A new open file description, because each guest needs its own
    // file position and locks.
    let reopen = |file: &File| {
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        // Without O_NOFOLLOW, because this is a symbolic link.
        File::open(&path).map_err(|source| GuestError::File {
            what: "open",
            path,
            source,
        })
    };
    let kvm = add(kvm);
    let kernel = add(reopen(&image.kernel)?);
    let initrd = add(reopen(&image.initrd)?);
    let current = add(open_or_create(&dir.join("serial.log"))?);
    let older = add(open_or_create(&dir.join("serial.log.1"))?);
    let diff = add(open(&dir.join(DIFF), true)?);
    let base = add(reopen(&image.base)?);
    let resource = add(open(&dir.join(RESOURCE), true)?);
    let application = add(open(&dir.join(APPLICATION), false)?);
    let guest = GuestSpec {
        name: spec.name().to_owned(),
        vcpus: spec.size.vcpus,
        memory_mib: spec.size.memory_mib,
        cmdline: COMMAND_LINE.to_owned(),
        kvm,
        kernel,
        initrd,
        serial: SerialSpec {
            current,
            previous: older,
            max_bytes: SERIAL_BYTES,
        },
        disks: vec![
            DiskSpec {
                serial: OS_DISK.into(),
                backing: DiskBacking::Diff { diff, base },
            },
            DiskSpec {
                serial: RESOURCE_DISK.into(),
                backing: DiskBacking::Raw {
                    file: resource,
                    read_only: false,
                },
            },
            DiskSpec {
                serial: APPLICATION_DISK.into(),
                backing: DiskBacking::Raw {
                    file: application,
                    read_only: true,
                },
            },
        ],
        dial_limit_ms: u32::try_from(dial_limit.as_millis()).unwrap_or(u32::MAX),
    };
    Ok((guest, files))
}

/// The OS disk of the instance in `dir`.
pub fn diff_path(dir: &Path) -> PathBuf {
    dir.join(DIFF)
}

/// The resource disk of the instance in `dir`.
pub fn resource_path(dir: &Path) -> PathBuf {
    dir.join(RESOURCE)
}

/// File name of the disk with this serial number.
pub fn disk_file(serial: &str) -> Option<&'static str> {
    match serial {
        OS_DISK => Some(DIFF),
        RESOURCE_DISK => Some(RESOURCE),
        APPLICATION_DISK => Some(APPLICATION),
        _ => None,
    }
}

/// Opens the log of the VMM processes' messages, to which each boot appends. It is only
/// rotated between two boots, because the messages of one process are limited.
pub fn vmm_log(dir: &Path) -> Result<File, GuestError> {
    let path = dir.join("vmm.log");
    if fs::metadata(&path).is_ok_and(|metadata| metadata.len() > VMM_LOG_BYTES) {
        // If this fails, the log continues to grow.
        let _ = fs::rename(&path, previous(&path));
    }
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    open_with(&mut options, "open", &path)
}

fn create(path: &Path) -> Result<File, GuestError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    open_with(&mut options, "create", path)
}

fn open_or_create(path: &Path) -> Result<File, GuestError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    open_with(&mut options, "open", path)
}

fn open(path: &Path, write: bool) -> Result<File, GuestError> {
    open_with(OpenOptions::new().read(true).write(write), "open", path)
}

/// Most bytes of memory that the disks in `dir` can use: zero, except on tmpfs, where
/// what a guest writes is charged to its VMM process and cannot be reclaimed.
pub fn disks_in_memory(dir: &Path, image: &Image) -> u64 {
    if !statfs(dir).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC) {
        return 0;
    }
    let resource = fs::metadata(dir.join(RESOURCE)).map_or(0, |metadata| metadata.len());
    image.base_size.saturating_add(resource)
}

/// Copies `from` to the empty file `to`, without its holes.
fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
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

fn open_with(
    options: &mut OpenOptions,
    what: &'static str,
    path: &Path,
) -> Result<File, GuestError> {
    options
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|source| GuestError::File {
            what,
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::progress::Progress;
    use crate::service;
    use crate::store::image;
    use crate::supervisor::plan::{Placement, plan};
    use crate::supervisor::spec::ImageRef;
    use std::collections::BTreeMap;
    use std::net::Ipv4Addr;
    use std::os::unix::fs::{FileExt, MetadataExt};

    /// An image whose files contain their own names.
    pub(crate) fn image(data_dir: &Path) -> Image {
        let dir = data_dir.join("images/minimal");
        fs::create_dir_all(&dir).unwrap();
        let file = |name: &str| {
            let content = name.repeat(1 << 16);
            fs::write(dir.join(name), &content).unwrap();
            let sum = Digest::of(content.as_bytes()).unwrap().0.hex();
            format!(r#""{name}":{{"sha256":"{sum}"}}"#)
        };
        let files = [
            "kernel",
            "initrd",
            "base.ext4",
            "resource.ext4",
            "guest-agent",
        ]
        .map(file);
        let manifest = format!(
            r#"{{"schema":"host-agent.image/1","name":"minimal","files":{{{}}}}}"#,
            files.join(",")
        );
        fs::write(dir.join("manifest.json"), manifest).unwrap();
        image::open(data_dir, "minimal", &Progress::default()).unwrap()
    }

    /// A spec whose application disk is in the content.
    pub(crate) fn spec(content: &ContentStore, hold: &ContentHold, image: &Image) -> InstanceSpec {
        let model = service::load(Path::new(service::SAMPLE), None, &Progress::default()).unwrap();
        let write = |file: &File| file.write_all_at(b"application", 0);
        let application = content.add::<io::Error>(hold, write).unwrap();
        let placement = Placement {
            deployment: "0123456789abcdef0123456789abcdef",
            incarnation: 1,
            image: &ImageRef {
                name: "minimal".into(),
                manifest: image.digest,
            },
            applications: &BTreeMap::from([("Cache".to_owned(), application)]),
            address: Ipv4Addr::LOCALHOST.into(),
            stop_timeout: Duration::ZERO,
        };
        plan(&model, &placement).remove(0)
    }

    #[test]
    fn instances_of_a_role_share_only_the_application_disk() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path());
        let content = ContentStore::new(dir.path());
        let hold = content.hold().unwrap();
        let spec = spec(&content, &hold, &image);
        let [first, second] = ["a", "b"].map(|name| dir.path().join(name));
        for instance in [&first, &second] {
            fs::create_dir(instance).unwrap();
            create_disks(instance, &spec, &image, &content, &hold).unwrap();
        }
        let inode = |dir: &Path, name| fs::metadata(dir.join(name)).unwrap().ino();
        assert_eq!(inode(&first, APPLICATION), inode(&second, APPLICATION));
        for private in ["diff.qcow2", "resource.raw"] {
            assert_ne!(inode(&first, private), inode(&second, private));
        }
    }

    #[test]
    fn the_log_keeps_the_messages_of_earlier_boots() {
        use std::io::Write as _;
        let dir = tempfile::tempdir().unwrap();
        for boot in 1..=3 {
            let mut log = vmm_log(dir.path()).unwrap();
            writeln!(log, "boot {boot}").unwrap();
        }
        let path = dir.path().join("vmm.log");
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "boot 1\nboot 2\nboot 3\n");
        let long = vec![b'x'; VMM_LOG_BYTES as usize + 1];
        vmm_log(dir.path()).unwrap().write_all(&long).unwrap();
        assert_eq!(vmm_log(dir.path()).unwrap().metadata().unwrap().len(), 0);
        assert!(
            fs::read_to_string(previous(&path))
                .unwrap()
                .starts_with(&text)
        );
    }

    #[test]
    fn a_boot_gets_the_verified_base_even_if_it_was_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path());
        let content = ContentStore::new(dir.path());
        let hold = content.hold().unwrap();
        let spec = spec(&content, &hold, &image);
        create_disks(dir.path(), &spec, &image, &content, &hold).unwrap();
        let boot = || {
            let kvm = tempfile::tempfile().unwrap();
            let limit = Duration::from_secs(2);
            let (spec, mut files) = prepare_on(kvm, dir.path(), &spec, &image, limit).unwrap();
            let DiskBacking::Diff { base, .. } = spec.disks[0].backing else {
                panic!("the OS disk has a base");
            };
            File::from(files.swap_remove(usize::from(base.0)))
        };
        let first = boot();
        let other = dir.path().join("other");
        fs::write(&other, "another base").unwrap();
        fs::rename(&other, &image.base_path).unwrap();
        let second = boot();
        let inode = |file: &File| file.metadata().unwrap().ino();
        assert_eq!(inode(&second), inode(&first));
        let mut content = vec![0; "base.ext4".len()];
        second.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(content, b"base.ext4");
    }

    #[test]
    fn a_resource_disk_has_the_template_and_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let template = tempfile::tempfile_in(dir.path()).unwrap();
        template.set_len(8 << 20).unwrap();
        for at in [0, 3 << 20, (8 << 20) - 5] {
            template.write_all_at(b"here!", at).unwrap();
        }
        let disk = create(&dir.path().join("disk")).unwrap();
        copy_sparse(&template, &disk).unwrap();
        let bytes = |file: &File| {
            let mut bytes = vec![0; 8 << 20];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(bytes(&template) == bytes(&disk));
        assert_eq!(disk.metadata().unwrap().len(), 8 << 20);
        assert!(disk.metadata().unwrap().blocks() * 512 < 1 << 20);
        disk.set_len(16 << 20).unwrap();
    }
}
