//! Section `idle`: VM exits and CPU time of an idle guest, in our VMM and in Firecracker.
//! Both guests have the same kernel, initrd, RAM and kinds of devices. They run at the
//! same time, and each sample covers the same interval for both.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use e2e::bare::{BareGuest, Disk};
use serde_json::{Value, json};

use crate::exits::ExitCounter;
use crate::measure::{Found, median};
use crate::vmm::{self, Running, Vmm};
use crate::{Findings, Setting, first_line, io, process};

/// RAM of each guest.
const MEMORY_MIB: u32 = 512;
/// Length of a sample.
const INTERVAL: Duration = Duration::from_secs(10);

/// An idle guest with its samples.
struct Idle {
    running: Running,
    exits: Result<ExitCounter, String>,
    exits_per_second: Vec<f64>,
    cpu_percent: Vec<f64>,
    /// KVM's counters at the start of the first sample, and their growth a second
    /// up to the last.
    start: Option<(Instant, BTreeMap<String, u64>)>,
    causes: BTreeMap<String, f64>,
}

impl Idle {
    fn boot(vmm: &Vmm, guest: &BareGuest, dir: &std::path::Path) -> Result<Self> {
        let (running, _) = vmm::boot(vmm, guest, dir)?;
        // CPU time can be measured without debugfs.
        let exits = ExitCounter::of(running.pid()).map_err(|error| first_line(&error));
        Ok(Self {
            running,
            exits,
            exits_per_second: vec![],
            cpu_percent: vec![],
            start: None,
            causes: BTreeMap::new(),
        })
    }

    /// The counters now: time, exits if they are counted, CPU seconds.
    fn counters(&self) -> Result<(Instant, Option<u64>, f64)> {
        let exits = self.exits.as_ref().ok().map(ExitCounter::read);
        let cpu = process::cpu_seconds(self.running.pid())?;
        Ok((Instant::now(), exits.transpose()?, cpu.values().sum()))
    }

    /// Adds the sample since `before`.
    fn sample(&mut self, before: (Instant, Option<u64>, f64)) -> Result<()> {
        let after = self.counters()?;
        let seconds = after.0.duration_since(before.0).as_secs_f64();
        if let (Some(before), Some(after)) = (before.1, after.1) {
            let exits = after.checked_sub(before).context("exits went backwards")?;
            self.exits_per_second.push(exits as f64 / seconds);
        }
        self.cpu_percent
            .push((after.2 - before.2) / seconds * 100.0);
        self.count_causes();
        Ok(())
    }

    /// Notes KVM's counters the first time, and after that what was added to them.
    fn count_causes(&mut self) {
        let Ok(exits) = &self.exits else { return };
        let now = exits.all();
        let Some((since, start)) = &self.start else {
            self.start = Some((Instant::now(), now));
            return;
        };
        let seconds = since.elapsed().as_secs_f64();
        let grown = now.into_iter().filter_map(|(name, value)| {
            let more = value.checked_sub(*start.get(&name)?)?;
            (more > 0).then(|| (name, more as f64 / seconds))
        });
        self.causes = grown.collect();
    }
}

/// Measures.
pub fn measure(setting: &Setting, findings: &mut Findings) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("ha").tempdir()?;
    let initrd = dir.path().join("initrd");
    io::initrd_with_modules(setting, &initrd)?;
    let base = setting.image().join("base.ext4");
    let guest = |disk| BareGuest {
        disks: vec![disk],
        ..setting.guest(initrd.clone(), MEMORY_MIB)
    };
    let ours = Vmm::Ours(e2e::program());
    let diff = Disk::Diff(base.clone());
    let mut guests = vec![Idle::boot(&ours, &guest(diff), &dir.path().join("ours"))?];
    let peer = match vmm::find("firecracker") {
        None => Err("firecracker is not on PATH".to_owned()),
        Some(program) => {
            let peer_dir = dir.path().join("firecracker");
            let booted = io::raw_copy(&base, &peer_dir).and_then(|raw| {
                let vmm = Vmm::Firecracker(program);
                Idle::boot(&vmm, &guest(Disk::Raw(raw)), &peer_dir)
            });
            booted.map_err(|error| {
                setting.progress(&format!("idle: {error:#}"));
                first_line(&error)
            })
        }
    };
    let peer = peer.map(|booted| guests.push(booted));
    let rounds = setting.pick(6, 2);
    // Round 0 has the end of the boots and is not counted.
    for round in 0..=rounds {
        let before: Vec<_> = guests.iter().map(Idle::counters).collect::<Result<_>>()?;
        sleep(INTERVAL);
        if round == 0 {
            guests.iter_mut().for_each(Idle::count_causes);
        } else {
            for (guest, before) in guests.iter_mut().zip(before) {
                guest.sample(before)?;
            }
        }
        setting.progress(&format!("idle: round {round} of {rounds}"));
    }
    let exits = guests.iter().map(|guest| match &guest.exits {
        Ok(_) => Ok(guest.exits_per_second.clone()),
        Err(reason) => Err(reason.clone()),
    });
    let cpu = guests.iter().map(|guest| Ok(guest.cpu_percent.clone()));
    let causes: Vec<_> = guests.iter().map(|guest| &guest.causes).collect();
    let causes = json!({ "causes": causes });
    add(findings, "idle-exits", exits.collect(), &peer, &causes);
    add(findings, "idle-vmm-cpu", cpu.collect(), &peer, &json!({}));
    Ok(())
}

/// Adds line `id`, the samples of our guest, and their ratio to those of the peer, which
/// are the last. `details` of all guests are added to the line.
fn add(
    findings: &mut Findings,
    id: &str,
    samples: Vec<Result<Vec<f64>, String>>,
    peer: &Result<(), String>,
    details: &Value,
) {
    let ours = samples.first().cloned().unwrap_or(Ok(vec![]));
    let theirs = samples.last().cloned().unwrap_or(Ok(vec![]));
    let ratio = peer.clone().and_then(|()| {
        let (ours, theirs) = (ours.clone()?, theirs?);
        let details = json!({ "firecracker": theirs, "firecracker_median": median(&theirs) });
        Ok(Found::ratio(&ours, &theirs).with(details))
    });
    findings.add(&format!("{id}-vs-firecracker"), ratio);
    let mut details = details.clone();
    details["seconds"] = json!(INTERVAL.as_secs());
    findings.add(id, ours.map(|ours| Found::samples(ours).with(details)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Budget, Definition, Measure, Verdict};

    fn verdict(findings: &Findings, id: &'static str) -> (Verdict, Option<f64>) {
        let definition = Definition {
            id,
            title: id,
            unit: "ratio",
            budget: Some(Budget::AtMost(1.0)),
        };
        let measure = Measure::new(definition, findings.0[id].clone());
        (measure.verdict, measure.value)
    }

    #[test]
    fn the_ratio_is_of_our_median_to_the_peers() {
        let mut findings = Findings::default();
        let samples = vec![Ok(vec![30.0, 32.0]), Ok(vec![62.0, 62.0])];
        add(&mut findings, "x", samples, &Ok(()), &json!({}));
        let ratio = verdict(&findings, "x-vs-firecracker");
        assert_eq!(ratio, (Verdict::Met, Some(0.5)));
        assert_eq!(verdict(&findings, "x").1, Some(31.0));
    }

    #[test]
    fn without_a_peer_or_a_counter_the_line_has_a_reason() {
        let mut findings = Findings::default();
        let absent = Err("firecracker is not on PATH".to_owned());
        add(
            &mut findings,
            "x",
            vec![Ok(vec![30.0])],
            &absent,
            &json!({}),
        );
        assert_eq!(verdict(&findings, "x").1, Some(30.0));
        let ratio = findings.0["x-vs-firecracker"].clone();
        assert_eq!(ratio.unwrap_err(), "firecracker is not on PATH");
        let uncounted = || Err("no debugfs".to_owned());
        add(
            &mut findings,
            "y",
            vec![uncounted(), uncounted()],
            &Ok(()),
            &json!({}),
        );
        for id in ["y", "y-vs-firecracker"] {
            assert_eq!(findings.0[id].clone().unwrap_err(), "no debugfs");
        }
    }
}
