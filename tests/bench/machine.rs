//! Facts about the machine that a figure depends on.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

/// The facts; `location` tells this machine from a lab on it.
pub fn facts(location: &str) -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        let value = line.and_then(|line| line.split_once(':'));
        value.map(|(_, value)| value.trim().to_owned())
    };
    let doctor = Command::new(e2e::program())
        .args(["doctor", "--json"])
        .output();
    let doctor = doctor
        .ok()
        .and_then(|output| serde_json::from_slice::<Value>(&output.stdout).ok());
    let cpuinfo = read("/proc/cpuinfo");
    json!({
        "place": location,
        "processor": field(&cpuinfo, "model name"),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "files": { "dir": std::env::temp_dir(), "kind": file_system(&std::env::temp_dir()) },
        "doctor": doctor,
    })
}

/// Type of the file system that holds `path`.
fn file_system(path: &std::path::Path) -> Option<String> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let held = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?, words.next()?);
        path.starts_with(at).then_some((at.len(), kind))
    });
    held.max_by_key(|(length, _)| *length)
        .map(|(_, kind)| kind.to_owned())
}

/// The line above the table. It has the cost of a VM exit, which determines most
/// figures.
pub fn headline(facts: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    format!(
        "{}: {} x {}, {}, Linux {}, VM exit {} us ({}), disks on {}",
        text(&facts["place"]),
        facts["processors"],
        text(&facts["processor"]),
        text(&facts["memory"]),
        text(&facts["kernel"]),
        facts["doctor"]["exit_us"],
        text(&facts["doctor"]["kind"]),
        text(&facts["files"]["kind"]),
    )
}
