//! Section `boot`: time from the start of a VMM process to the guest's init, for the
//! product and its peers in turns, and the memory of our VMM process.

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::measure::Found;
use crate::vmm::{self, Vmm};
use crate::{Findings, Setting, first_line, process};
use e2e::bare::{BareGuest, Disk};

/// RAM of the guest.
const MEMORY_MIB: u32 = 128;

/// Measures.
pub fn measure(setting: &Setting, findings: &mut Findings) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("ha").tempdir()?;
    let guest = setting.guest(setting.initrd.clone(), MEMORY_MIB);
    // Every guest of the product has disks; the peers boot without.
    let with_disks = BareGuest {
        disks: vec![Disk::Diff(setting.image().join("base.ext4"))],
        ..guest.clone()
    };
    let mut vmms: Vec<_> = [("boot", Some(Vmm::Ours(e2e::program())))].into();
    vmms.push((
        "boot-firecracker",
        vmm::find("firecracker").map(Vmm::Firecracker),
    ));
    vmms.push(("boot-qemu", vmm::find("qemu-system-x86_64").map(Vmm::Qemu)));
    let mut times: Vec<Vec<f64>> = vec![vec![]; vmms.len()];
    let mut beyond = vec![];
    let mut parts = json!(null);
    let mut failed: Vec<Option<String>> = vec![None; vmms.len()];
    for (number, (id, vmm)) in vmms.iter().enumerate() {
        if vmm.is_none() {
            failed[number] = Some(format!("{} is not on PATH", id.trim_start_matches("boot-")));
        }
    }
    // Round 0 fills the caches and is not counted.
    for round in 0..=setting.pick(10, 3) {
        for (number, (id, vmm)) in vmms.iter().enumerate() {
            let (Some(vmm), None) = (vmm, &failed[number]) else {
                continue;
            };
            let guest = if number == 0 { &with_disks } else { &guest };
            match vmm::boot(vmm, guest, &dir.path().join(id)) {
                Ok((running, time)) if round > 0 => {
                    times[number].push(time.as_secs_f64() * 1000.0);
                    if matches!(vmm, Vmm::Ours(_)) {
                        let memory = process::memory(running.pid(), MEMORY_MIB)?;
                        beyond.push(memory.beyond);
                        parts = serde_json::to_value(memory)?;
                    }
                }
                Ok(_) => {}
                // The table shows why a peer was not measured.
                Err(error) if number > 0 => failed[number] = Some(first_line(&error)),
                Err(error) => return Err(error).context("boot to init"),
            }
        }
        setting.progress(&format!("boot: round {round}"));
    }
    for (number, (id, vmm)) in vmms.iter().enumerate() {
        let version = vmm.as_ref().and_then(Vmm::version);
        let found = match &failed[number] {
            None => Ok(Found::samples(times[number].clone()).with(json!({ "program": version }))),
            Some(reason) => Err(reason.clone()),
        };
        findings.add(id, found);
        if number > 0 {
            let against = match &failed[number] {
                None => Ok(Found::ratio(&times[0], &times[number])),
                Some(reason) => Err(reason.clone()),
            };
            findings.add(&id.replace("boot-", "boot-vs-"), against);
        }
    }
    findings.add("vmm-rss-init", Ok(Found::samples(beyond).with(parts)));
    Ok(())
}
