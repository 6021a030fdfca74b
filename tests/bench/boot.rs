//! Section `boot`: from the start of a VMM to init, in turns with the peers, and
//! the memory of ours with a small guest.

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::measure::Found;
use crate::vmm::{self, Guest, Vmm};
use crate::{Findings, Setting, process};
use e2e::bare::Disk;

/// RAM of the guest.
const MEMORY_MIB: u32 = 128;

/// Measures.
pub fn measure(setting: &Setting, findings: &mut Findings) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("ha").tempdir()?;
    let guest = Guest {
        kernel: setting.image().join("kernel"),
        initrd: setting.initrd.clone(),
        memory_mib: MEMORY_MIB,
        disks: vec![],
    };
    // A guest of the product always has disks; a peer's need not.
    let with_disks = Guest {
        disks: vec![Disk::Diff(setting.image().join("base.ext4"))],
        ..guest.clone()
    };
    let mut makes: Vec<_> = [("boot", Some(Vmm::Ours(e2e::program())))].into();
    makes.push((
        "boot-firecracker",
        vmm::find("firecracker").map(Vmm::Firecracker),
    ));
    makes.push(("boot-qemu", vmm::find("qemu-system-x86_64").map(Vmm::Qemu)));
    let mut times: Vec<Vec<f64>> = vec![vec![]; makes.len()];
    let mut beyond = vec![];
    let mut made_of = json!(null);
    let mut failed: Vec<Option<String>> = vec![None; makes.len()];
    for (number, (id, make)) in makes.iter().enumerate() {
        if make.is_none() {
            failed[number] = Some(format!("{} is not on PATH", id.trim_start_matches("boot-")));
        }
    }
    // The first round warms the caches and is not counted.
    for round in 0..=setting.pick(10, 3) {
        for (number, (id, make)) in makes.iter().enumerate() {
            let (Some(make), None) = (make, &failed[number]) else {
                continue;
            };
            let guest = if number == 0 { &with_disks } else { &guest };
            match vmm::boot(make, guest, &dir.path().join(id)) {
                Ok((running, time)) if round > 0 => {
                    times[number].push(time.as_secs_f64() * 1000.0);
                    if matches!(make, Vmm::Ours(_)) {
                        let memory = process::memory(running.pid(), MEMORY_MIB)?;
                        beyond.push(memory.beyond);
                        made_of = serde_json::to_value(memory)?;
                    }
                }
                Ok(_) => {}
                // A peer that does not run here is left out.
                Err(error) if number > 0 => failed[number] = Some(one_line(&error)),
                Err(error) => return Err(error).context("boot to init"),
            }
        }
        setting.progress(&format!("boot: round {round}"));
    }
    for (number, (id, make)) in makes.iter().enumerate() {
        let version = make.as_ref().and_then(Vmm::version);
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
    findings.add("vmm-rss-init", Ok(Found::samples(beyond).with(made_of)));
    Ok(())
}

fn one_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}
