//! Memory and CPU time of a process, from /proc.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

const KIB_PER_MIB: f64 = 1024.0;

/// Resident memory of a VMM process by kind, in MiB.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Memory {
    /// Guest RAM that the guest has touched.
    pub guest: f64,
    /// Everything except guest RAM.
    pub beyond: f64,
    /// The part of `beyond` that no other process shares.
    pub private: f64,
    /// `beyond` by mapping: program, heap, stacks and other anonymous memory.
    pub parts: BTreeMap<String, f64>,
}

/// Memory of VMM process `pid` whose guest has `guest_mib` of RAM.
pub fn memory(pid: u32, guest_mib: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    memory_of(&text, u64::from(guest_mib) * 1024).with_context(|| path)
}

/// The mapping of guest RAM may be this much larger, for alignment.
const ALIGNMENT_KIB: u64 = 2 * 2048;

/// Guest RAM is the anonymous mapping with MADV_DONTDUMP (`dd`) and MAP_NORESERVE
/// (`nr`). The size of the mapping is checked against that of the guest.
fn memory_of(smaps: &str, guest_kib: u64) -> Result<Memory> {
    let mut memory = Memory::default();
    let mut mapped = 0;
    let mut mapping = (String::new(), BTreeMap::new());
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let kib = |key: &str| mapping.1.get(key).copied().unwrap_or(0);
            let flag = |name| flags.split_whitespace().any(|flag| flag == name);
            let resident = kib("Rss") as f64 / KIB_PER_MIB;
            if mapping.0.is_empty() && flag("dd") && flag("nr") {
                mapped += kib("Size");
                memory.guest += resident;
            } else {
                memory.beyond += resident;
                memory.private +=
                    (kib("Private_Clean") + kib("Private_Dirty")) as f64 / KIB_PER_MIB;
                let name = match mapping.0.rsplit('/').next() {
                    Some("") | None => "[anonymous]",
                    Some(name) => name,
                };
                *memory.parts.entry(name.to_owned()).or_default() += resident;
            }
        } else if let Some(key) = first.strip_suffix(':') {
            let kib = words.next().and_then(|word| word.parse::<u64>().ok());
            mapping.1.insert(key.to_owned(), kib.unwrap_or(0));
        } else {
            // A new mapping: range, permissions, offset, device, inode, name.
            mapping = (words.skip(4).collect::<Vec<_>>().join(" "), BTreeMap::new());
        }
    }
    ensure!(
        (guest_kib..=guest_kib + ALIGNMENT_KIB).contains(&mapped),
        "guest RAM is {guest_kib} KiB, but mappings of {mapped} KiB look like it"
    );
    Ok(memory)
}

/// Resident memory of a process, in MiB.
pub fn resident(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    resident_of(&text).context("VmRSS")
}

/// `VmRSS` of a `/proc/PID/status`, in MiB.
pub fn resident_of(status: &str) -> Option<f64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / KIB_PER_MIB)
}

/// CPU time of each thread of a process in seconds, guest code included.
pub fn cpu_seconds(pid: u32) -> Result<BTreeMap<String, f64>> {
    let mut threads = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        let name = fs::read_to_string(path.join("comm"))?;
        let text = fs::read_to_string(path.join("schedstat"))?;
        let first = text.split_whitespace().next();
        let nanoseconds: f64 = first.context("schedstat")?.parse()?;
        *threads.entry(name.trim().to_owned()).or_insert(0.0) += nanoseconds / 1e9;
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 fe:00 7      /opt/host agent
Size:               1024 kB
Rss:                 512 kB
Private_Clean:         0 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                2048 kB
Private_Dirty:      2048 kB
VmFlags: rd wr mr mw me ac nr dd
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
Size:               1024 kB
Rss:                 256 kB
Private_Dirty:       256 kB
VmFlags: rd wr mr mw me ac
";

    #[test]
    fn guest_ram_is_recognised_and_its_size_is_checked() {
        let memory = memory_of(SMAPS, 4096).unwrap();
        let parts = (memory.parts["host agent"], memory.parts["[anonymous]"]);
        let sums = (memory.guest, memory.beyond, memory.private);
        assert_eq!((sums, parts), ((2.0, 0.75, 0.25), (0.5, 0.25)));
        assert!(memory_of(SMAPS, 4100).is_err());
        assert_eq!(resident_of("Name: x\nVmRSS:\t  2048 kB\n"), Some(2.0));
    }
}
