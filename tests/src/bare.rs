//! A VMM process without a supervisor: one guest that is no service.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use host_agent::vmm::control::{Command, Event, ExitReason};
use host_agent::vmm::disk::create_diff;
use host_agent::vmm::spec::{DiskBacking, DiskSpec, FileIndex, GuestSpec, SerialSpec};
use host_agent::vmm::wire;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{limit, program};

/// What is booted.
#[derive(Debug)]
pub struct Bare {
    /// ELF file or bzImage.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: PathBuf,
    /// Kernel command line.
    pub command_line: String,
    /// Processors.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Disks in order.
    pub disks: Vec<Disk>,
}

/// A disk of a guest that is no service.
#[derive(Debug, Clone)]
pub enum Disk {
    /// A fresh diff over this base, `diffN.qcow2` in the guest's directory.
    Diff(PathBuf),
    /// This file.
    Raw(PathBuf),
}

impl Disk {
    /// Opens disk number `number` of the guest whose directory is `dir`. Its files
    /// are added to those that the VMM is given.
    pub fn open(&self, number: usize, dir: &Path, files: &mut Vec<OwnedFd>) -> Result<DiskSpec> {
        let mut add = |file: File| -> Result<FileIndex> {
            files.push(file.into());
            Ok(FileIndex(u8::try_from(files.len() - 1)?))
        };
        let mut write = OpenOptions::new();
        write.read(true).write(true);
        let backing = match self {
            Self::Diff(base) => {
                let diff = dir.join(format!("diff{number}.qcow2"));
                let fresh = write.clone().create(true).truncate(true).open(&diff)?;
                let size = fs::metadata(base)?.len();
                create_diff(fresh, size, &base.to_string_lossy())?;
                DiskBacking::Diff {
                    diff: add(write.open(&diff)?)?,
                    base: add(File::open(base)?)?,
                }
            }
            Self::Raw(file) => DiskBacking::Raw {
                file: add(write.open(file)?)?,
                read_only: false,
            },
        };
        Ok(DiskSpec {
            serial: format!("disk{number}"),
            backing,
        })
    }
}

/// A guest that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    control: OwnedFd,
    dir: PathBuf,
    /// Every event so far.
    pub events: Vec<Event>,
}

impl Bare {
    /// Starts it, with its console and the process's messages in `dir`.
    pub fn start(&self, dir: &Path) -> Result<Guest> {
        let write = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .with_context(|| format!("open {}", path.display()))
        };
        let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
        let mut files: Vec<OwnedFd> = vec![
            write(Path::new("/dev/kvm"))?.into(),
            open(&self.kernel)?.into(),
            open(&self.initrd)?.into(),
            write(&dir.join("console"))?.into(),
            write(&dir.join("console.1"))?.into(),
        ];
        let mut disks = Vec::new();
        for (number, disk) in self.disks.iter().enumerate() {
            disks.push(disk.open(number, dir, &mut files)?);
        }
        let spec = GuestSpec {
            name: "bare".into(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            cmdline: self.command_line.clone(),
            kvm: FileIndex(0),
            kernel: FileIndex(1),
            initrd: FileIndex(2),
            serial: SerialSpec {
                current: FileIndex(3),
                previous: FileIndex(4),
                max_bytes: 1 << 20,
            },
            disks,
            dial_limit_ms: 2000,
            outlive_supervisor: false,
        };
        let (control, theirs) = wire::pair()?;
        let child = Program::new(program())
            .arg("vmm")
            .stdin(Stdio::from(theirs))
            .stderr(File::create(dir.join("messages"))?)
            .spawn()?;
        let passed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        wire::send(control.as_fd(), &Command::Start(Box::new(spec)), &passed)?;
        Ok(Guest {
            child,
            control,
            dir: dir.to_owned(),
            events: Vec::new(),
        })
    }
}

impl Guest {
    /// Sends a command.
    pub fn tell(&self, command: &Command) -> Result<()> {
        Ok(wire::send(self.control.as_fd(), command, &[])?)
    }

    /// Waits for an event that satisfies `wanted`.
    pub fn event(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        let deadline = Instant::now() + limit(30);
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::try_from(rest)?)? == 0 {
                bail!("no {what} in time: {:?}\n{}", self.events, self.console());
            }
            let Some((event, _)) = wire::recv::<Event>(self.control.as_fd())? else {
                bail!("ended before {what}: {:?}\n{}", self.events, self.console());
            };
            self.events.push(event.clone());
            if wanted(&event) {
                return Ok(event);
            }
        }
    }

    /// Waits for its end; the reason that it told and its exit code.
    pub fn end(&mut self) -> Result<(ExitReason, ExitStatus)> {
        let event = self.event("exit", |event| matches!(event, Event::Exited(_)))?;
        let Event::Exited(reason) = event else {
            bail!("{event:?} is no exit");
        };
        Ok((reason, self.child.wait()?))
    }

    /// Memory of the process, guest RAM and all, in MiB.
    pub fn resident_mib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line
            .and_then(|text| text.trim().strip_suffix(" kB"))
            .context("VmRSS")?
            .parse()?;
        Ok(kib / 1024)
    }

    /// What the guest wrote to its serial line.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.dir.join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What the VMM process wrote to standard error.
    pub fn messages(&self) -> String {
        fs::read_to_string(self.dir.join("messages")).unwrap_or_default()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An initial RAM file system that holds `/init` alone (cpio "newc",
/// `Documentation/driver-api/early-userspace/buffer-format.rst`).
pub fn initrd(init: &Path) -> Result<Vec<u8>> {
    let program = fs::read(init).with_context(|| init.display().to_string())?;
    let mut archive = Vec::new();
    for (name, mode, data) in [
        ("init", 0o100_755, program.as_slice()),
        ("TRAILER!!!", 0, &[]),
    ] {
        let mut header = String::from("070701");
        let size = u32::try_from(data.len())?;
        let name_size = u32::try_from(name.len() + 1)?;
        // ino, mode, uid, gid, nlink, mtime, filesize, device numbers of file
        // and special file, namesize, check
        for field in [0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            header.push_str(&format!("{field:08x}"));
        }
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    Ok(archive)
}
