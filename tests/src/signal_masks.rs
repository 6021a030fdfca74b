//! The signals that a process ignores, blocks or handles.

use std::fs;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

/// A mask of signals of a process (proc(5)), such as `SigIgn`.
pub fn mask(pid: u32, name: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(u64::from_str_radix(line.context("a mask")?.trim(), 16)?)
}

/// The mask of these signals.
pub fn mask_of(signals: &[Signal]) -> u64 {
    signals.iter().map(|signal| 1 << (*signal as u64 - 1)).sum()
}
