//! What a VMM process has given up while its guest, a few instructions, runs.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use e2e::service::Service;
use e2e::{Sandbox, program, text};
use host_agent::vmm::control::Event;
use host_agent::vmm::sandbox::{Layer, SandboxReport};
use host_agent::vmm::wire;

use crate::adoption::{DOTS, Guest};

/// A guest that runs, the report of its VMM process, and the process in /proc.
type Started = (Guest, SandboxReport, PathBuf);

fn start() -> Result<Started> {
    running(Guest::start(DOTS)?)
}

fn running(guest: Guest) -> Result<Started> {
    let (event, _) = wire::recv::<Event>(guest.control.as_fd())?.context("an event")?;
    let Event::Running { sandbox, .. } = event else {
        anyhow::bail!("{event:?}");
    };
    guest.runs_on()?;
    // Past the test harness, which hides the output of tests that pass.
    let _ = writeln!(std::io::stderr(), "sandbox on this machine: {sandbox}");
    let process = PathBuf::from(format!("/proc/{}", guest.child.id()));
    Ok((guest, sandbox, process))
}

/// Whether a layer is in force. Each is, if the kernel offers it.
fn in_force(report: &SandboxReport, layer: Layer) -> Result<bool> {
    let state = report.layers().iter().find(|state| state.layer == layer);
    let in_force = state.is_some_and(|state| state.missing.is_none());
    let offered = match layer {
        Layer::NoPrivileges | Layer::Filters => true,
        Layer::OwnUser => nix::unistd::geteuid().is_root(),
        // These tests are root.
        Layer::Namespaces => Path::new("/proc/self/ns/net").exists(),
        Layer::Landlock => landlock(),
    };
    ensure!(in_force == offered, "{layer}: offered {offered}; {report}");
    Ok(in_force)
}

/// Whether the kernel has Landlock (`landlock_create_ruleset(2)`).
#[allow(unsafe_code)]
fn landlock() -> bool {
    // SAFETY: a query of the version, without a ruleset.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) > 0 }
}

/// The lines of `status` by their names.
fn status(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(path.join("status"))?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    let fields = fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    Ok(fields.collect())
}

#[test]
fn every_thread_of_a_vmm_process_is_sealed() -> Result<()> {
    let (_guest, report, process) = start()?;
    ensure!(in_force(&report, Layer::NoPrivileges)? && in_force(&report, Layer::Filters)?);
    if report.is_complete() {
        running(Guest::start_by(DOTS, &program(), true)?)?;
    }
    let mut names = Vec::new();
    for task in fs::read_dir(process.join("task"))? {
        let status = status(&task?.path())?;
        let field = |name: &str| status.get(name).map_or("", String::as_str);
        let name = field("Name").to_owned();
        ensure!(field("NoNewPrivs") == "1", "{name}: {status:?}");
        ensure!(field("Seccomp") == "2", "{name}: {status:?}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(
                field(set).trim_start_matches('0').is_empty(),
                "{name}: {status:?}"
            );
        }
        if in_force(&report, Layer::OwnUser)? {
            let users: Vec<_> = field("Uid").split_whitespace().collect();
            ensure!(
                !users.contains(&"0") && users.len() == 4,
                "{name}: {status:?}"
            );
            ensure!(field("Groups").is_empty(), "{name}: {status:?}");
        }
        names.push(name);
    }
    // The device's threads are there before the guest activates a device.
    for name in [
        "bare", "log", "serial", "vsock", "rng", "vcpu-0", "teardown",
    ] {
        ensure!(
            names.iter().any(|found| found == name),
            "no {name}: {names:?}"
        );
    }
    Ok(())
}

#[test]
fn a_vmm_process_has_no_terminal_and_no_view_of_the_host() -> Result<()> {
    let (guest, report, process) = start()?;
    let stat = fs::read_to_string(process.join("stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("stat")?;
    // Session and terminal are the fields 6 and 7 (`proc_pid_stat(5)`).
    let fields: Vec<_> = fields.split(' ').collect();
    ensure!(
        fields[3] == guest.child.id().to_string() && fields[4] == "0",
        "{stat}"
    );
    if in_force(&report, Layer::Namespaces)? {
        for kind in ["mnt", "net", "ipc", "uts"] {
            let theirs = fs::read_link(process.join("ns").join(kind))?;
            ensure!(
                theirs != fs::read_link(format!("/proc/self/ns/{kind}"))?,
                "{kind}"
            );
        }
        let root: Vec<_> = fs::read_dir(process.join("root"))?.collect();
        ensure!(root.is_empty(), "{root:?}");
        let mounts = fs::read_to_string(process.join("mountinfo"))?;
        ensure!(mounts.lines().count() == 1, "{mounts}");
    }
    Ok(())
}

#[test]
fn a_vmm_process_keeps_few_descriptors_and_low_limits() -> Result<()> {
    let (_guest, _, process) = start()?;
    for entry in fs::read_dir(process.join("fd"))? {
        let entry = entry?;
        let target = fs::read_link(entry.path())?;
        ensure!(target != Path::new("/dev/kvm"), "{target:?}");
        let name = entry.file_name().into_string().unwrap_or_default();
        let info = fs::read_to_string(process.join("fdinfo").join(&name))?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = i32::from_str_radix(flags.context("flags")?.trim(), 8)?;
        let number: u32 = name.parse()?;
        let closes = flags & libc::O_CLOEXEC != 0;
        ensure!(closes || number <= 2, "{target:?} stays open over execve");
    }
    let limits = fs::read_to_string(process.join("limits"))?;
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let value = line.and_then(|line| line.split_whitespace().next());
        value.and_then(|value| value.parse::<u64>().ok())
    };
    ensure!(limit("Max core file size") == Some(0), "{limits}");
    ensure!(limit("Max locked memory") == Some(0), "{limits}");
    // It has no disk: the largest file is a log.
    ensure!(limit("Max file size") == Some(64 << 20), "{limits}");
    Ok(())
}

/// Runs the program as a user who may make no network namespace, so that a layer of
/// the sandbox is missing. The limit is that of a user namespace of its own. Where none
/// can be made, as in a chroot, the program has no CAP_SYS_ADMIN instead.
const LIMITED: &str = "if unshare -Ur true; then exec unshare -Ur sh -c 'echo 0 > /proc/sys/user/max_net_namespaces; exec PROGRAM \"$@\"' sh \"$@\"; fi; exec setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin PROGRAM \"$@\"";

/// Whether [`LIMITED`] runs the program in a user namespace.
fn is_nested() -> Result<bool> {
    let output = Command::new("unshare").args(["-Ur", "true"]).output()?;
    Ok(output.status.success())
}

/// A script in `dir` that becomes the program under test.
fn script(dir: &Path, command: &str) -> Result<PathBuf> {
    let path = dir.join("program");
    let command = command.replace("PROGRAM", &program().to_string_lossy());
    fs::write(&path, format!("#!/bin/sh\n{command}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn a_missing_layer_is_reported_and_the_others_hold() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let limited = script(dir.path(), LIMITED)?;
    let (_guest, report, process) = running(Guest::start_by(DOTS, &limited, false)?)?;
    let missing: Vec<_> = report.missing().map(|state| state.layer).collect();
    // The root of a user namespace is no root of the host, so it has one user only.
    let expected: &[Layer] = if is_nested()? {
        &[Layer::OwnUser, Layer::Namespaces]
    } else {
        &[Layer::Namespaces]
    };
    ensure!(missing == expected, "{report}");
    ensure!(
        report.to_string().contains("namespaces (unshare: E"),
        "{report}"
    );
    let status = status(&process)?;
    ensure!(
        status["Seccomp"] == "2" && status["NoNewPrivs"] == "1",
        "{status:?}"
    );
    ensure!(
        status["CapEff"].trim_start_matches('0').is_empty(),
        "{status:?}"
    );
    Ok(())
}

#[test]
fn a_required_sandbox_that_is_incomplete_starts_no_guest() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let limited = script(dir.path(), LIMITED)?;
    let mut guest = Guest::start_by(DOTS, &limited, true)?;
    let (event, _) = wire::recv::<Event>(guest.control.as_fd())?.context("an event")?;
    let expected = "the sandbox is required and incomplete: no privileges";
    let refused = matches!(&event, Event::StartFailed { reason } if reason.starts_with(expected));
    ensure!(refused, "{event:?}");
    ensure!(!guest.child.wait()?.success());
    Ok(())
}

#[test]
fn run_with_require_sandbox_names_the_missing_layer() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let limited = script(&sandbox.file("."), LIMITED)?;
    let mut command = Command::new(limited);
    sandbox.set_environment(&mut command);
    let output = command
        .arg("run")
        .arg(&service)
        .arg("--require-sandbox")
        .output()?;
    let text = text(&output);
    ensure!(output.status.code() == Some(6), "{text}");
    for wanted in ["error[HA-0209]", "namespaces (unshare: E", "  hint "] {
        ensure!(text.contains(wanted), "`{wanted}` is not in: {text}");
    }
    sandbox.assert_nothing_left()
}

#[test]
fn a_vmm_process_of_a_user_is_in_its_own_user_namespace() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let user = "setpriv --reuid 1000 --regid 1000 --clear-groups";
    let unshare = format!("{user} unshare -Un true");
    let offered = Command::new("sh").args(["-c", &unshare]).output()?;
    let offered = offered.status.success();
    let as_user = script(dir.path(), &format!("exec {user} PROGRAM \"$@\""))?;
    let (_guest, report, process) = running(Guest::start_by(DOTS, &as_user, false)?)?;
    let namespaces = report
        .layers()
        .iter()
        .find(|state| state.layer == Layer::Namespaces);
    let in_force = namespaces.is_some_and(|state| state.missing.is_none());
    ensure!(in_force == offered, "offered {offered}; {report}");
    if in_force {
        ensure!(report.is_complete() || !landlock(), "{report}");
        let theirs = fs::read_link(process.join("ns/user"))?;
        ensure!(theirs != fs::read_link("/proc/self/ns/user")?, "{theirs:?}");
        let map = fs::read_to_string(process.join("uid_map"))?;
        let map: Vec<_> = map.split_whitespace().collect();
        ensure!(map == ["1000", "1000", "1"], "{map:?}");
        let root: Vec<_> = fs::read_dir(process.join("root"))?.collect();
        ensure!(root.is_empty(), "{root:?}");
    }
    let status = status(&process)?;
    ensure!(
        status["Uid"].split_whitespace().all(|user| user == "1000"),
        "{status:?}"
    );
    ensure!(
        status["CapEff"].trim_start_matches('0').is_empty(),
        "{status:?}"
    );
    Ok(())
}
