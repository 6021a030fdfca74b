//! VMM processes and the janitor ignore a signal to every process of a session or
//! unit, so that the command can stop the roles while their guests run.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use e2e::Sandbox;
use e2e::run::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ENDS: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];

/// The mask of signals that a process ignores or blocks (proc(5), SigIgn and SigBlk).
fn ignored_signals(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut mask = 0;
    for name in ["SigBlk:", "SigIgn:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        mask |= u64::from_str_radix(line.context("a mask")?.trim(), 16)?;
    }
    Ok(mask)
}

#[test]
fn guests_and_janitor_ignore_signals_and_end_with_the_command() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let nowhere = sandbox.file("nowhere").display().to_string();
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
        let ignored = eventually("the process ignores the signals", || {
            Ok(ignored_signals(pid)? & wanted == wanted)
        });
        for end in ENDS {
            kill(Pid::from_raw(i32::try_from(pid)?), end)?;
        }
        drop(ours);
        let status = child.wait()?;
        ignored?;
        // An exit code: no signal ended it.
        ensure!(status.code().is_some(), "{arguments:?}: {status}");
    }
    Ok(())
}
