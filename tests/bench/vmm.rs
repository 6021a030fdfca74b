//! Starts a bare guest in our VMM, or in a peer found on `PATH`.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use e2e::bare::{BareGuest, CONSOLE, Disk, MESSAGES};
use host_agent::vmm::control::{Command, DialOutcome, Event};
use host_agent::vmm::wire;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;

/// Added to the command line of the peers, whose guests would otherwise probe a
/// keyboard controller that ours do not have.
const ONLY_PEERS: &str = "i8042.noaux i8042.nomux i8042.dumbkbd";

/// What the init of `tests/bench/guest.rs` writes.
const MARK: &str = "bench: init runs";

/// Limit for a boot, as `e2e::limit` takes it.
const BOOT_SECONDS: u64 = 30;

/// A VMM.
#[derive(Debug, Clone)]
pub enum Vmm {
    /// `host-agent vmm`.
    Ours(PathBuf),
    /// Firecracker, configured by a file, without its API.
    Firecracker(PathBuf),
    /// QEMU with machine type microvm.
    Qemu(PathBuf),
}

impl Vmm {
    /// The first line of the output of `--version`.
    pub fn version(&self) -> Option<String> {
        let (Self::Ours(program) | Self::Firecracker(program) | Self::Qemu(program)) = self;
        let output = Program::new(program).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.trim().to_owned())
    }
}

/// A running guest. On drop its VMM process is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    dialer: Dialer,
}

/// How connections into the guest are opened.
#[derive(Debug)]
enum Dialer {
    /// The control socket of our VMM, which ends when the socket closes.
    Control(OwnedFd),
    /// The Unix socket of Firecracker's vsock.
    Socket(PathBuf),
    None,
}

impl Running {
    /// Connects to a vsock port of the guest.
    pub fn connect(&self, port: u32) -> Result<UnixStream> {
        match &self.dialer {
            Dialer::Control(control) => {
                let (ours, theirs) = UnixStream::pair()?;
                let first = Vec::new();
                let dial = Command::Dial { id: 1, port, first };
                wire::send(control.as_fd(), &dial, &[theirs.as_fd()])?;
                drop(theirs);
                while let Some((event, _)) = wire::recv::<Event>(control.as_fd())? {
                    if let Event::Dialed { outcome, .. } = event {
                        ensure!(outcome == DialOutcome::Connected, "dial: {outcome:?}");
                        return Ok(ours);
                    }
                }
                bail!("the VMM ended");
            }
            Dialer::Socket(path) => {
                let mut stream = UnixStream::connect(path)?;
                stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
                // `OK <port>`, byte by byte: the bytes after it come from the guest.
                let mut answer = vec![];
                while answer.last() != Some(&b'\n') {
                    let mut byte = [0];
                    stream.read_exact(&mut byte)?;
                    answer.push(byte[0]);
                }
                ensure!(answer.starts_with(b"OK "), "Firecracker's vsock refused");
                Ok(stream)
            }
            Dialer::None => bail!("this guest has no vsock"),
        }
    }

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

/// Boots `guest` with its files in `dir`; the guest, and the time from the start of
/// the VMM process until the guest's init printed its line.
pub fn boot(vmm: &Vmm, guest: &BareGuest, dir: &Path) -> Result<(Running, Duration)> {
    let limit = e2e::limit(BOOT_SECONDS);
    fs::create_dir_all(dir)?;
    let console = dir.join(CONSOLE);
    fs::write(&console, "")?;
    let notify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    notify.add_watch(&console, AddWatchFlags::IN_MODIFY)?;
    let prepared = prepare(vmm, guest, dir, &console)?;
    let started = Instant::now();
    let mut running = prepared()?;
    loop {
        let passed = started.elapsed();
        if fs::read(&console)?
            .windows(MARK.len())
            .any(|part| part == MARK.as_bytes())
        {
            return Ok((running, passed));
        }
        if let Some(status) = running.child.try_wait()? {
            bail!(
                "{vmm:?} ended with {status}; console:\n{}\n{}",
                fs::read_to_string(&console)?,
                fs::read_to_string(dir.join(MESSAGES)).unwrap_or_default()
            );
        }
        let Some(rest) = limit.checked_sub(passed) else {
            bail!(
                "{vmm:?}: no init in time; console:\n{}",
                fs::read_to_string(&console)?
            );
        };
        // Wakes each second to find out whether the process has ended.
        let wait = rest.min(Duration::from_secs(1)).as_millis();
        let mut fds = [PollFd::new(notify.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, u16::try_from(wait)?)? > 0 {
            notify.read_events()?;
        }
    }
}

type Start = Box<dyn FnOnce() -> Result<Running>>;

/// Prepares everything that is not part of the measured time.
fn prepare(vmm: &Vmm, guest: &BareGuest, dir: &Path, console: &Path) -> Result<Start> {
    match vmm {
        Vmm::Ours(program) => prepare_ours(program, guest, dir),
        Vmm::Firecracker(program) => prepare_firecracker(program, guest, dir, console),
        Vmm::Qemu(program) => prepare_qemu(program, guest, console),
    }
}

fn prepare_qemu(program: &Path, guest: &BareGuest, console: &Path) -> Result<Start> {
    ensure!(guest.disks.is_empty(), "QEMU is not given disks");
    let machine = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on";
    let memory = guest.memory_mib.to_string();
    let vcpus = guest.vcpus.to_string();
    let mut command = Program::new(program);
    command
        .args([
            "-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", &vcpus, "-m", &memory,
        ])
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
        .args([
            "-append",
            &format!("{} {ONLY_PEERS}", guest.command_line),
            "-serial",
        ])
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    Ok(Box::new(move || {
        Ok(Running {
            child: command.spawn()?,
            dialer: Dialer::None,
        })
    }))
}

fn prepare_firecracker(
    program: &Path,
    guest: &BareGuest,
    dir: &Path,
    console: &Path,
) -> Result<Start> {
    let mut drives = vec![];
    for (number, disk) in guest.disks.iter().enumerate() {
        let Disk::Raw(file) = disk else {
            bail!("Firecracker has no qcow2");
        };
        // "Writeback" gives the disk a flush, as our disks have.
        drives.push(
            json!({ "drive_id": format!("disk{number}"), "path_on_host": file,
            "is_root_device": false, "is_read_only": false, "cache_type": "Writeback" }),
        );
    }
    let mut config = json!({
        "boot-source": { "kernel_image_path": guest.kernel, "initrd_path": guest.initrd,
            "boot_args": format!("{} {ONLY_PEERS}", guest.command_line) },
        "drives": drives,
        "machine-config": { "vcpu_count": guest.vcpus, "mem_size_mib": guest.memory_mib },
    });
    let socket = dir.join("vsock");
    if !guest.disks.is_empty() {
        config["vsock"] = json!({ "guest_cid": 3, "uds_path": socket });
        // The driver reads from it now and then, and our guests have one.
        config["entropy"] = json!({});
    }
    let file = dir.join("firecracker.json");
    fs::write(&file, config.to_string())?;
    let mut command = Program::new(program);
    command
        .args(["--no-api", "--config-file"])
        .arg(file)
        .stdin(Stdio::null())
        .stdout(OpenOptions::new().append(true).open(console)?);
    Ok(Box::new(move || {
        Ok(Running {
            child: command.spawn()?,
            dialer: Dialer::Socket(socket),
        })
    }))
}

fn prepare_ours(program: &Path, guest: &BareGuest, dir: &Path) -> Result<Start> {
    let prepared = guest.prepare(dir)?;
    let program = program.to_owned();
    Ok(Box::new(move || {
        let (child, control) = prepared.spawn(&program)?;
        Ok(Running {
            child,
            dialer: Dialer::Control(control),
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
