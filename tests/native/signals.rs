//! A signal to every process of a session or unit is the command's to obey:
//! it asks the roles to stop, which takes guests that still run.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use e2e::Place;
use e2e::run::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ENDS: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];

/// Signals that a process ignores or keeps from itself, as the kernel has them.
fn not_taken(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut mask = 0;
    for name in ["SigBlk:", "SigIgn:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        mask |= u64::from_str_radix(line.context("a mask")?.trim(), 16)?;
    }
    Ok(mask)
}

#[test]
fn guests_and_janitor_outlast_a_signal_to_all_and_end_with_their_command() -> Result<()> {
    let place = Place::new()?;
    let nowhere = place.file("nowhere").display().to_string();
    let processes: [&[&str]; 2] = [&["vmm"], &["janitor", &nowhere, &nowhere]];
    for arguments in processes {
        let (ours, theirs) = host_agent::vmm::wire::pair()?;
        let mut child = Command::new(e2e::program())
            .args(arguments)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pid = child.id();
        let wanted = ENDS.iter().map(|end| 1 << (*end as u64 - 1)).sum::<u64>();
        let taken = eventually("the process takes none of the signals", || {
            Ok(not_taken(pid)? & wanted == wanted)
        });
        for end in ENDS {
            kill(Pid::from_raw(i32::try_from(pid)?), end)?;
        }
        drop(ours);
        let status = child.wait()?;
        taken?;
        // By itself: a code, not a signal.
        ensure!(status.code().is_some(), "{arguments:?}: {status}");
    }
    Ok(())
}
