//! A guest that accesses ports, registers and rings at random, while its VMM process
//! pauses and resumes it. It has no kernel, so any KVM runs it that runs 64-bit code.

mod payload;
mod script;

use std::fs;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use e2e::bare::{BareGuest, Disk, MESSAGES, RunningGuest, elf};
use e2e::limit;
use host_agent::vmm::control::{Command, Event, ExitReason, Stats};

use script::DISK_BYTES;

/// Random actions of each boot.
const ACTIONS: usize = 10_000;
/// Boots of a run without a given seed.
const BOOTS: u64 = 4;
/// RAM of the guest, and what its VMM process may use besides, in MiB.
const RAM_MIB: u32 = 64;
const OVERHEAD_MIB: u64 = 24;
/// Exits between a resume and the next pause.
const EXITS: u64 = 60;
/// Most bytes of `vmm.log`: lines that a guest causes are limited in rate.
const LOG_BYTES: u64 = 64 << 10;
/// Most events that are no answer to a command: a burst of connects, and of reports
/// about devices.
const EVENTS: usize = 300;

#[test]
fn random_accesses_neither_end_nor_block_the_vmm() -> Result<()> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        // The guest tests run in a lab then, and have an evil guest of their own.
        println!("not run: /dev/kvm: {error}");
        return Ok(());
    }
    let seeds = match std::env::var("HOST_AGENT_TEST_SEED") {
        Ok(seed) => vec![seed.parse()?],
        Err(_) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
            (0..BOOTS).map(|boot| now * BOOTS + boot).collect()
        }
    };
    for seed in seeds {
        println!("HOST_AGENT_TEST_SEED={seed}");
        boot(seed).with_context(|| format!("HOST_AGENT_TEST_SEED={seed}"))?;
    }
    Ok(())
}

fn boot(seed: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name| dir.path().join(name);
    let program = payload::program(&script::actions(seed, ACTIONS));
    fs::write(path("kernel"), elf(&program))?;
    fs::write(path("initrd"), "")?;
    fs::write(path("base"), content())?;
    fs::write(path("raw"), content())?;
    let guest = BareGuest {
        kernel: path("kernel"),
        initrd: path("initrd"),
        command_line: String::new(),
        vcpus: 1,
        memory_mib: RAM_MIB,
        disks: vec![Disk::Diff(path("base")), Disk::Raw(path("raw"))],
    };
    let mut guest = guest.start(dir.path())?;
    let result = harass(&mut guest, dir.path());
    let messages = guest.messages();
    result.with_context(|| format!("events {:?}\n{messages}", guest.events))?;
    ensure!(!messages.contains("panicked"), "{messages}");
    ensure!(
        fs::read(path("base"))? == content(),
        "the base image changed"
    );
    Ok(())
}

/// What both disks contain at first.
fn content() -> Vec<u8> {
    (0..DISK_BYTES).map(|at| (at % 251) as u8).collect()
}

/// Pauses and resumes the guest until it has done everything, and stops it.
fn harass(guest: &mut RunningGuest, dir: &Path) -> Result<()> {
    guest.event("start", |event| matches!(event, Event::Running { .. }))?;
    let deadline = Instant::now() + limit(20);
    let (mut id, mut pauses) = (0, 0);
    while !is_done(guest) {
        ensure!(Instant::now() < deadline, "the guest is not done");
        id += 1;
        guest.send(&Command::Pause {})?;
        let paused = |paused| move |event: &Event| *event == Event::Paused { paused };
        guest.event("pause", paused(true))?;
        pauses += 1;
        let before = exits(guest)?;
        ensure!(exits(guest)? == before, "a paused guest runs");
        guest.send(&Command::Ping { id })?;
        guest.event("pong", |event| *event == Event::Pong { id })?;
        guest.send(&Command::Resume {})?;
        guest.event("resume", paused(false))?;
        while exits(guest)? < before + EXITS && !is_done(guest) {
            ensure!(Instant::now() < deadline, "a resumed guest does not run");
        }
        let resident = guest.resident_mib()?;
        let most = u64::from(RAM_MIB) + OVERHEAD_MIB;
        ensure!(resident <= most, "{resident} MiB");
    }
    ensure!(pauses > 10, "{pauses} pauses");
    let stats = stats(guest)?;
    println!("{pauses} pauses, {stats:?}");
    // The actions are neither all valid nor all nonsense.
    ensure!(stats.violations > 0 && stats.refused > 0, "{stats:?}");
    let written = fs::read(dir.join("raw"))? != content();
    ensure!(written, "no request of the guest reached a disk");
    let answers = |event: &&Event| {
        matches!(
            event,
            Event::Paused { .. } | Event::Pong { .. } | Event::Stats(_)
        )
    };
    let ended = |event: &Event| matches!(event, Event::Exited(_) | Event::StartFailed { .. });
    ensure!(!guest.events.iter().any(ended), "the guest ended");
    let caused = guest.events.iter().filter(|event| !answers(event)).count();
    ensure!(caused <= EVENTS, "{caused} events");
    let log = fs::metadata(dir.join(MESSAGES))?.len();
    ensure!(log <= LOG_BYTES, "{log} bytes in the log");
    guest.send(&Command::Stop {})?;
    let (reason, status) = guest.end()?;
    ensure!(
        reason == ExitReason::Stopped && status.success(),
        "{reason:?}, {status}"
    );
    Ok(())
}

/// Whether the guest has done all of its actions.
fn is_done(guest: &RunningGuest) -> bool {
    guest.console().contains(script::DONE)
}

/// Exits that the VMM process has handled.
fn exits(guest: &mut RunningGuest) -> Result<u64> {
    Ok(stats(guest)?.exits[0])
}

fn stats(guest: &mut RunningGuest) -> Result<Stats> {
    guest.send(&Command::Stats {})?;
    let event = guest.event("counters", |event| matches!(event, Event::Stats(_)))?;
    let Event::Stats(stats) = event else {
        bail!("{event:?}");
    };
    Ok(stats)
}
