//! The virtual machine without a supervisor: bare guests, some of them hostile.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use e2e::bare::{BareGuest, Disk, RunningGuest, initrd};
use e2e::disks::{WriterEnd, verify};
use e2e::{images, program};
use host_agent::vmm::control::{Command, Event, ExitReason};

/// A panic resets at once.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=acpi 8250.nr_uarts=1";

fn built(name: &str) -> Result<PathBuf> {
    let dir = program();
    Ok(dir
        .parent()
        .context("the program is in a directory")?
        .join(name))
}

/// A guest whose PID 1 is `tests/evil`.
fn evil(dir: &std::path::Path, kernel: PathBuf, vcpus: u8, memory_mib: u32) -> Result<BareGuest> {
    let file = dir.join("initrd");
    fs::write(&file, initrd(&built("evil-guest")?)?)?;
    let disk = dir.join("disk");
    fs::write(&disk, "honest!!".repeat(1 << 17))?;
    // The hostile driver has 16 MiB at the end of RAM for rings and buffers, which the
    // kernel does not use.
    let window = u64::from(memory_mib.min(3 << 10) - 16) << 20;
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)?
        .as_micros();
    Ok(BareGuest {
        kernel,
        initrd: file,
        command_line: format!(
            "{COMMAND_LINE} iomem=relaxed memmap=16M${window:#x} window={window:#x} \
             registers=0xd0000000 seed={seed} rounds=300"
        ),
        vcpus,
        memory_mib,
        disks: vec![Disk::Raw(disk)],
    })
}

fn violations(guest: &mut RunningGuest) -> Result<u64> {
    guest.send(&Command::Stats {})?;
    match guest.event("statistics", |event| matches!(event, Event::Stats(_)))? {
        Event::Stats(stats) => Ok(stats.violations),
        other => anyhow::bail!("{other:?}"),
    }
}

#[test]
fn a_hostile_driver_breaks_only_its_device_until_a_reset() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let kernel = images().join("minimal/kernel");
    let mut guest = evil(dir.path(), kernel, 1, 128)?.start(dir.path())?;
    // Each broken device sends one event.
    let mut broken = BTreeSet::new();
    while broken.len() < 3 {
        let event = guest.event("broken device", |event| {
            matches!(event, Event::DeviceNeedsReset { .. })
        })?;
        if let Event::DeviceNeedsReset { device, .. } = event {
            broken.insert(device);
        }
    }
    ensure!(
        broken
            .iter()
            .map(String::as_str)
            .eq(["blk-0", "rng", "vsock"]),
        "{broken:?}"
    );
    ensure!(violations(&mut guest)? >= 3);
    // The process answers while the guest runs.
    guest.send(&Command::Ping { id: 7 })?;
    guest.event("answer", |event| matches!(event, Event::Pong { id: 7 }))?;
    let (reason, status) = guest.end()?;
    let console = guest.console();
    ensure!(
        reason == ExitReason::PowerOff && status.success(),
        "{reason:?}\n{console}"
    );
    for kind in [2, 4, 19] {
        let answered = format!("evil: device {kind}: 8 of 8 violations answered");
        ensure!(console.contains(&answered), "{console}");
        let honest = format!("evil: device {kind}: honest request answered");
        ensure!(console.matches(&honest).count() == 2, "{console}");
    }
    ensure!(
        console.matches("honest request answered honest!!").count() == 2,
        "{console}"
    );
    ensure!(console.contains("300 random rounds over"), "{console}");
    // Thousands of violations, but the log and the number of events are limited.
    ensure!(
        guest.messages().lines().count() < 100,
        "{}",
        guest.messages()
    );
    let events = guest.events.len();
    ensure!(events < 1000, "{events} events");
    Ok(())
}

#[test]
fn hostile_writes_never_reach_the_base_image() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut bare = evil(dir.path(), images().join("minimal/kernel"), 1, 128)?;
    // The base ends within a cluster of the diff.
    let base = dir.path().join("base");
    let content = "honest!!".repeat(((8 << 20) + 3 * 512) / 8);
    fs::write(&base, &content)?;
    bare.disks = vec![Disk::Diff(base.clone())];
    bare.command_line = bare.command_line.replace("rounds=300", "rounds=50 fill=1");
    let mut guest = bare.start(dir.path())?;
    let (reason, _) = guest.end()?;
    let console = guest.console();
    ensure!(reason == ExitReason::PowerOff, "{reason:?}\n{console}");
    let sectors = content.len() as u64 / 512;
    let written = format!("evil: device 2: {sectors} of {sectors} sectors written");
    ensure!(console.contains(&written), "{console}");

    ensure!(fs::read(&base)? == content.as_bytes(), "the base changed");
    let reference = dir.path().join("reference");
    verify(
        &dir.path().join("diff0.qcow2"),
        &reference,
        WriterEnd::Clean,
    )?;
    // The hostile driver fills each sector with its number, 64 times.
    let filled: Vec<u8> = (0..sectors)
        .flat_map(|sector| sector.to_le_bytes().repeat(64))
        .collect();
    ensure!(
        fs::read(&reference)? == filled,
        "the guest wrote other bytes"
    );
    Ok(())
}

#[test]
fn a_triple_fault_has_its_own_exit_reason() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // lidt [rip+1]; int3; an empty interrupt descriptor table.
    let code = [
        0x0f, 0x01, 0x1d, 1, 0, 0, 0, 0xcc, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, elf(&code))?;
    let file = dir.path().join("initrd");
    fs::write(&file, [0; 4096])?;
    let bare = BareGuest {
        kernel,
        initrd: file,
        command_line: COMMAND_LINE.into(),
        vcpus: 1,
        memory_mib: 64,
        disks: vec![],
    };
    let mut guest = bare.start(dir.path())?;
    let (reason, status) = guest.end()?;
    ensure!(reason == ExitReason::TripleFault, "{reason:?}");
    ensure!(status.code() == Some(11), "{status}");
    Ok(())
}

#[test]
fn a_bzimage_boots_on_8_vcpus_and_uses_only_ram_it_touches() -> Result<()> {
    let kernel = std::env::var_os("HOST_AGENT_TEST_BZIMAGE")
        .context("HOST_AGENT_TEST_BZIMAGE names no kernel: run scripts/test")?;
    let dir = tempfile::tempdir()?;
    let mut bare = evil(dir.path(), kernel.into(), 8, 14 << 10)?;
    bare.command_line = bare.command_line.replace("quiet", "loglevel=7");
    let mut guest = bare.start(dir.path())?;
    guest.event("broken device", |event| {
        matches!(event, Event::DeviceNeedsReset { .. })
    })?;
    let resident = guest.resident_mib()?;
    let (reason, _) = guest.end()?;
    let console = guest.console();
    ensure!(reason == ExitReason::PowerOff, "{reason:?}\n{console}");
    ensure!(console.contains("Brought up 1 node, 8 CPUs"), "{console}");
    // "ACPI Error", "ACPI BIOS Error" and their warnings.
    let complaint = console
        .lines()
        .find(|line| line.contains("ACPI") && (line.contains("Error") || line.contains("Warning")));
    ensure!(complaint.is_none(), "{complaint:?}\n{console}");
    // `struct page` has 64 bytes for each page of RAM: 224 MiB for 14 GiB.
    ensure!(resident < 1024, "{resident} MiB are resident");
    Ok(())
}

/// An ELF file with one segment, `code`, loaded at 16 MiB and entered in 64-bit mode.
fn elf(code: &[u8]) -> Vec<u8> {
    const AT: u64 = 16 << 20;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let word = |file: &mut Vec<u8>, value: u64, size: usize| {
        file.extend_from_slice(&value.to_le_bytes()[..size]);
    };
    // e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize,
    // e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    for (value, size) in [
        (2, 2),
        (62, 2),
        (1, 4),
        (AT, 8),
        (64, 8),
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (1, 2),
        (64, 2),
        (0, 2),
        (0, 2),
    ] {
        word(&mut file, value, size);
    }
    // PT_LOAD, readable and executable, p_offset 0x1000
    let length = code.len() as u64;
    for (value, size) in [
        (1, 4),
        (5, 4),
        (0x1000, 8),
        (AT, 8),
        (AT, 8),
        (length, 8),
        (length, 8),
        (0x1000, 8),
    ] {
        word(&mut file, value, size);
    }
    file.resize(0x1000, 0);
    file.extend_from_slice(code);
    file
}
