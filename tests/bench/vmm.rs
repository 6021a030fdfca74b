//! Starts one bare guest in a VMM: ours, or a peer found on `PATH`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_agent::vmm::control::Command;
use host_agent::vmm::disk::create_diff;
use host_agent::vmm::spec::{DiskBacking, DiskSpec, FileIndex, GuestSpec, SerialSpec};
use host_agent::vmm::wire;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;

/// Command line of every VMM: the product's. `nomodule` and `i8042` save the
/// peers a probe of hardware that only they have.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=acpi pci=off tsc=reliable \
    no_timer_check 8250.nr_uarts=1 random.trust_cpu=on i8042.noaux i8042.nomux i8042.dumbkbd";

/// RAM of the guest.
pub const MEMORY_MIB: u32 = 128;

/// Serial output turns over far beyond what a boot writes.
const SERIAL_BYTES: u64 = 1 << 20;

/// What is booted, by all alike.
#[derive(Debug)]
pub struct Guest {
    /// ELF kernel.
    pub kernel: PathBuf,
    /// Its `/init` writes the mark.
    pub initrd: PathBuf,
    /// Base of a diff disk. Ours only: a guest of the product always has disks.
    pub base: PathBuf,
}

/// Who boots it.
#[derive(Debug, Clone)]
pub enum Vmm {
    /// `host-agent vmm`.
    Ours(PathBuf),
    /// Firecracker, configured by a file, without its API.
    Firecracker(PathBuf),
    /// QEMU with its machine for this purpose.
    Qemu(PathBuf),
}

impl Vmm {
    /// The program and its version, as it says itself.
    pub fn version(&self) -> Option<String> {
        let (Self::Ours(program) | Self::Firecracker(program) | Self::Qemu(program)) = self;
        let output = Program::new(program).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.trim().to_owned())
    }
}

/// A guest that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// Keeps our VMM alive: it ends with its control socket.
    _control: Option<OwnedFd>,
}

impl Running {
    /// Process id of the VMM.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Boots `guest` with its files in `dir`; the guest, and the time from the
/// start of the VMM process until the guest's init wrote `mark`.
pub fn boot(
    vmm: &Vmm,
    guest: &Guest,
    dir: &Path,
    mark: &str,
    limit: Duration,
) -> Result<(Running, Duration)> {
    let console = dir.join("console");
    fs::write(&console, "")?;
    let notify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    notify.add_watch(&console, AddWatchFlags::IN_MODIFY)?;
    let prepared = prepare(vmm, guest, dir, &console)?;
    let started = Instant::now();
    let mut running = prepared()?;
    loop {
        let passed = started.elapsed();
        if fs::read(&console)?
            .windows(mark.len())
            .any(|part| part == mark.as_bytes())
        {
            return Ok((running, passed));
        }
        if let Some(status) = running.child.try_wait()? {
            bail!(
                "{vmm:?} ended with {status}; console:\n{}",
                fs::read_to_string(&console)?
            );
        }
        let Some(rest) = limit.checked_sub(passed) else {
            bail!(
                "{vmm:?}: no init in time; console:\n{}",
                fs::read_to_string(&console)?
            );
        };
        // Also wakes each second, to see whether the process has ended.
        let wait = rest.min(Duration::from_secs(1)).as_millis();
        let mut fds = [PollFd::new(notify.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, u16::try_from(wait)?)? > 0 {
            notify.read_events()?;
        }
    }
}

type Start = Box<dyn FnOnce() -> Result<Running>>;

/// Everything that is ready before the clock starts.
fn prepare(vmm: &Vmm, guest: &Guest, dir: &Path, console: &Path) -> Result<Start> {
    let mut program = match vmm {
        Vmm::Ours(program) => return prepare_ours(program, guest, dir, console),
        Vmm::Firecracker(program) => {
            let file = dir.join("firecracker.json");
            let config = json!({
                "boot-source": {
                    "kernel_image_path": guest.kernel, "initrd_path": guest.initrd,
                    "boot_args": COMMAND_LINE,
                },
                "drives": [],
                "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
            });
            fs::write(&file, config.to_string())?;
            let mut command = Program::new(program);
            command.args(["--no-api", "--config-file"]).arg(file);
            command.stdout(OpenOptions::new().append(true).open(console)?);
            command
        }
        Vmm::Qemu(program) => {
            let mut command = Program::new(program);
            command
                .args([
                    "-M",
                    "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on",
                ])
                .args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m"])
                .arg(MEMORY_MIB.to_string())
                .args([
                    "-nodefaults",
                    "-no-user-config",
                    "-display",
                    "none",
                    "-no-reboot",
                ])
                .arg("-kernel")
                .arg(&guest.kernel)
                .arg("-initrd")
                .arg(&guest.initrd)
                .args(["-append", COMMAND_LINE, "-serial"])
                .arg(format!("file:{}", console.display()));
            command
        }
    };
    program.stdin(Stdio::null());
    if !matches!(vmm, Vmm::Firecracker(_)) {
        program.stdout(Stdio::null());
    }
    Ok(Box::new(move || {
        Ok(Running {
            child: program.spawn()?,
            _control: None,
        })
    }))
}

fn prepare_ours(program: &Path, guest: &Guest, dir: &Path, console: &Path) -> Result<Start> {
    let write = |path: &Path| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
    };
    let diff = dir.join("diff.qcow2");
    if !diff.exists() {
        let size = fs::metadata(&guest.base)?.len();
        create_diff(write(&diff)?, size, &guest.base.to_string_lossy())?;
    }
    let resource = write(&dir.join("resource.raw"))?;
    resource.set_len(512 << 20)?;
    let files: Vec<OwnedFd> = vec![
        write(Path::new("/dev/kvm"))?.into(),
        File::open(&guest.kernel)?.into(),
        File::open(&guest.initrd)?.into(),
        OpenOptions::new()
            .read(true)
            .append(true)
            .open(console)?
            .into(),
        write(&dir.join("console.1"))?.into(),
        write(&diff)?.into(),
        File::open(&guest.base).context("base")?.into(),
        resource.into(),
    ];
    let spec = GuestSpec {
        name: "bench".into(),
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        cmdline: COMMAND_LINE.into(),
        kvm: FileIndex(0),
        kernel: FileIndex(1),
        initrd: FileIndex(2),
        serial: SerialSpec {
            current: FileIndex(3),
            previous: FileIndex(4),
            max_bytes: SERIAL_BYTES,
        },
        disks: vec![
            DiskSpec {
                serial: "os".into(),
                backing: DiskBacking::Diff {
                    diff: FileIndex(5),
                    base: FileIndex(6),
                },
            },
            DiskSpec {
                serial: "resource".into(),
                backing: DiskBacking::Raw {
                    file: FileIndex(7),
                    read_only: false,
                },
            },
        ],
        outlive_supervisor: false,
    };
    let mut command = Program::new(program);
    command.arg("vmm");
    Ok(Box::new(move || {
        let (ours, theirs) = wire::pair()?;
        let child = command.stdin(Stdio::from(theirs)).spawn()?;
        // The child has its end; a copy here would hide its death.
        drop(command);
        let passed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        wire::send(ours.as_fd(), &Command::Start(Box::new(spec)), &passed)?;
        Ok(Running {
            child,
            _control: Some(ours),
        })
    }))
}

/// A program on `PATH`.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| is_program(file).unwrap_or(false))
}

fn is_program(file: &Path) -> io::Result<bool> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = fs::metadata(file)?;
    Ok(metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
