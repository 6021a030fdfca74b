//! A VMM process without a supervisor, for guests that are not services.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use host_agent::supervisor::process::prepare_adoption;
use host_agent::vmm::control::{Adoption, Command, Event, ExitReason, Start};
use host_agent::vmm::disk::create_diff;
use host_agent::vmm::spec::{DiskBacking, DiskSpec, FileIndex, GuestSpec, SerialSpec};
use host_agent::vmm::wire;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{limit, program};

/// The serial log in a guest's directory.
pub const CONSOLE: &str = "console";
/// Standard error of the VMM process, in the same directory.
pub const MESSAGES: &str = "messages";
/// Size at which the serial log is rotated: far more than a boot writes.
const CONSOLE_BYTES: u64 = 1 << 20;

/// Where a program of [`elf`] is loaded.
const LOAD: u64 = 0x10_0000;
/// Size of an ELF header and of one program header.
const HEADERS: u64 = 64 + 56;

/// A guest to boot.
#[derive(Debug, Clone)]
pub struct BareGuest {
    /// ELF file or bzImage.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: PathBuf,
    /// Kernel command line.
    pub command_line: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Disks in order.
    pub disks: Vec<Disk>,
}

/// A disk of a bare guest.
#[derive(Debug, Clone)]
pub enum Disk {
    /// A fresh diff over this base, `diffN.qcow2` in the guest's directory.
    Diff(PathBuf),
    /// This file.
    Raw(PathBuf),
}

/// The descriptors that are sent to the VMM process.
#[derive(Debug, Default)]
struct Files(Vec<OwnedFd>);

impl Files {
    fn add(&mut self, file: impl Into<OwnedFd>) -> Result<FileIndex> {
        self.0.push(file.into());
        Ok(FileIndex(u8::try_from(self.0.len() - 1)?))
    }
}

impl Disk {
    /// Opens disk number `number` of the guest whose directory is `dir`.
    fn open(&self, number: usize, dir: &Path, files: &mut Files) -> Result<DiskSpec> {
        let backing = match self {
            Self::Diff(base) => {
                let diff = dir.join(format!("diff{number}.qcow2"));
                let size = fs::metadata(base)?.len();
                create_diff(read_write(&diff, true)?, size, &base.to_string_lossy())?;
                DiskBacking::Diff {
                    diff: files.add(read_write(&diff, false)?)?,
                    base: files.add(read(base)?)?,
                }
            }
            Self::Raw(file) => DiskBacking::Raw {
                file: files.add(read_write(file, false)?)?,
                read_only: false,
            },
        };
        Ok(DiskSpec {
            serial: format!("disk{number}"),
            backing,
        })
    }
}

fn read(path: &Path) -> Result<File> {
    File::open(path).with_context(|| path.display().to_string())
}

/// Opens a file for reading and writing, after emptying or creating it if it is to be `fresh`.
fn read_write(path: &Path, fresh: bool) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(fresh)
        .truncate(fresh)
        .open(path)
        .with_context(|| path.display().to_string())
}

/// A guest whose files are open and whose VMM process has not started.
#[derive(Debug)]
pub struct Prepared {
    spec: GuestSpec,
    files: Files,
    messages: File,
    /// Whether no guest starts if a layer of the sandbox is missing.
    pub require_sandbox: bool,
}

impl Prepared {
    /// The same, of an instance with this name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.spec.name = name.into();
        self
    }

    /// Starts `program` as a VMM process; the process and its control socket.
    pub fn spawn(self, program: &Path) -> Result<(Child, OwnedFd)> {
        self.spawn_with(program, None)
    }

    /// The same, of a VMM process that outlives its supervisor: another one can
    /// attach to it in `dir`.
    pub fn spawn_in(mut self, program: &Path, dir: &Path) -> Result<(Child, OwnedFd)> {
        let (listener, exit) = prepare_adoption(dir)?;
        let adoption = Adoption {
            listener: self.files.add(listener)?,
            exit: self.files.add(exit)?,
        };
        self.spawn_with(program, Some(adoption))
    }

    fn spawn_with(self, program: &Path, adoption: Option<Adoption>) -> Result<(Child, OwnedFd)> {
        let (control, theirs) = wire::pair()?;
        let child = Program::new(program)
            .arg("vmm")
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stderr(self.messages)
            .spawn()?;
        let passed: Vec<_> = self.files.0.iter().map(AsFd::as_fd).collect();
        let start = Start {
            generation: 1,
            guest: self.spec,
            adoption,
            require_sandbox: self.require_sandbox,
        };
        wire::send(control.as_fd(), &Command::Start(Box::new(start)), &passed)?;
        Ok((child, control))
    }
}

impl BareGuest {
    /// Opens the guest's files, with its serial log and the messages of its VMM
    /// process in `dir`.
    pub fn prepare(&self, dir: &Path) -> Result<Prepared> {
        let mut files = Files::default();
        let mut disks = Vec::new();
        for (number, disk) in self.disks.iter().enumerate() {
            disks.push(disk.open(number, dir, &mut files)?);
        }
        let spec = GuestSpec {
            name: "bare".into(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            cmdline: self.command_line.clone(),
            kvm: files.add(read_write(Path::new("/dev/kvm"), false)?)?,
            kernel: files.add(read(&self.kernel)?)?,
            initrd: files.add(read(&self.initrd)?)?,
            serial: SerialSpec {
                current: files.add(read_write(&dir.join(CONSOLE), true)?)?,
                previous: files.add(read_write(&dir.join("console.1"), true)?)?,
                max_bytes: CONSOLE_BYTES,
            },
            disks,
            dial_limit_ms: 2000,
        };
        Ok(Prepared {
            spec,
            files,
            messages: File::create(dir.join(MESSAGES))?,
            require_sandbox: false,
        })
    }

    /// Starts the guest.
    pub fn start(&self, dir: &Path) -> Result<RunningGuest> {
        let (child, control) = self.prepare(dir)?.spawn(&program())?;
        Ok(RunningGuest {
            child,
            control,
            dir: dir.to_owned(),
            events: Vec::new(),
        })
    }
}

/// A guest and its VMM process, which is killed on drop.
#[derive(Debug)]
pub struct RunningGuest {
    child: Child,
    control: OwnedFd,
    dir: PathBuf,
    /// Every event so far.
    pub events: Vec<Event>,
}

impl RunningGuest {
    /// Sends a command to the VMM process.
    pub fn send(&self, command: &Command) -> Result<()> {
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

    /// Waits for the guest's end; the reported reason and the exit status of the process.
    pub fn end(&mut self) -> Result<(ExitReason, ExitStatus)> {
        let event = self.event("exit", |event| matches!(event, Event::Exited(_)))?;
        let Event::Exited(reason) = event else {
            bail!("{event:?} is not an exit");
        };
        Ok((reason, self.child.wait()?))
    }

    /// Resident memory of the VMM process, guest RAM included, in MiB.
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
        let bytes = fs::read(self.dir.join(CONSOLE)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What the VMM process wrote to standard error.
    pub fn messages(&self) -> String {
        fs::read_to_string(self.dir.join(MESSAGES)).unwrap_or_default()
    }
}

impl Drop for RunningGuest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A kernel of `code` alone, which starts at its first byte in 64-bit mode.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let size = HEADERS + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // Executable, x86-64, version 1.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry, program headers, section headers.
    for field in [LOAD + HEADERS, 64, 0] {
        file.extend(u64::to_le_bytes(field));
    }
    // Flags; sizes and counts of headers.
    file.extend([0; 4]);
    for field in [64u16, 56, 1, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    // One loaded segment: the whole file.
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for field in [0, LOAD, LOAD, size, size, 0x1000] {
        file.extend(u64::to_le_bytes(field));
    }
    file.extend_from_slice(code);
    file
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
