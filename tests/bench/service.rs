//! Section `service`: time from an accepted deployment to Ready, memory of every
//! process of the product, and CPU time of an idle guest.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use e2e::Sandbox;
use e2e::run::Run;
use e2e::service::Service;
use serde_json::json;

use crate::measure::Found;
use crate::{Findings, Setting, process};

/// RAM of the smallest VM size.
const EXTRA_SMALL_MIB: u32 = 768;

/// Measures.
pub fn measure(setting: &Setting, findings: &mut Findings) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service {
        image: setting.image_name.clone(),
        ..Service::idle()
    };
    let service = service.write(&sandbox.file("service"))?;
    let mut ready = vec![];
    let mut stages = vec![];
    // Round 0 verifies every digest of the image and is not counted.
    let rounds = setting.pick(5, 2);
    for round in 0..=rounds {
        let mut run = Run::start(&sandbox, &service, &[])?;
        let starting = run.event("guest-starting", |_| true)?;
        let mut at = |kind: &str, wanted: fn(&serde_json::Value) -> bool| -> Result<f64> {
            let event = run.event(kind, wanted)?;
            event["at_ms"].as_f64().context("at_ms")
        };
        let running = at("guest-running", |_| true)?;
        let agent = at("agent-connected", |_| true)?;
        let started = at("guest-agent", |_| true)?;
        let done = at("role", |event| event["state"] == "ready")?;
        if round > 0 {
            ready.push(done);
            stages.push(
                json!({ "guest-starting": starting["at_ms"], "guest-running": running,
                "app-agent": agent, "guest-agent": started, "ready": done }),
            );
        }
        setting.progress(&format!("service: round {round}, Ready after {done} ms"));
        if round == rounds {
            let vmm = starting["pid"].as_u64().context("pid of the VMM")?;
            let vmm = u32::try_from(vmm)?;
            measure_idle(setting, &run, vmm, findings)?;
        }
        run.stop()?;
    }
    for peer in ["firecracker", "qemu"] {
        let boots = findings.samples(&format!("boot-{peer}"));
        let found = boots.map(|boots| Found {
            // The boots of the peer were measured in section `boot`.
            samples: vec![],
            value: crate::measure::median(&ready)
                .zip(crate::measure::median(&boots))
                .map(|(ours, theirs)| ours / theirs),
            details: json!(null),
        });
        findings.add(&format!("ready-vs-{peer}"), found);
    }
    findings.add(
        "ready",
        Ok(Found::samples(ready).with(json!({ "stages_ms": stages }))),
    );
    Ok(())
}

/// Measures a Ready instance whose role does nothing.
fn measure_idle(setting: &Setting, run: &Run<'_>, vmm: u32, findings: &mut Findings) -> Result<()> {
    let guest = run.shell("for p in /proc/[0-9]*; do cat $p/status 2>/dev/null; echo; done")?;
    for (id, name) in [
        ("app-agent-rss", "init"),
        ("guest-agent-rss", "guest-agent"),
        ("bootstrapper-rss", "bootstrapper"),
    ] {
        // A process that ended meanwhile has printed an empty line.
        let first = |status: &str| status.trim_start().lines().next().map(str::to_owned);
        let of = |status: &&str| first(status) == Some(format!("Name:\t{name}"));
        let size = guest.split("\n\n").find(of).and_then(process::resident_of);
        let found = match size {
            Some(size) => Ok(Found::samples(vec![size])),
            None => Err(format!("no process {name} in the guest")),
        };
        findings.add(id, found);
    }
    let seconds = setting.pick(60, 20);
    let before = (process::cpu_seconds(vmm)?, process::cpu_seconds(run.pid())?);
    let started = Instant::now();
    std::thread::sleep(Duration::from_secs(seconds));
    let after = (process::cpu_seconds(vmm)?, process::cpu_seconds(run.pid())?);
    let passed = started.elapsed().as_secs_f64();
    for (id, before, after) in [
        ("idle-cpu", before.0, after.0),
        ("idle-cpu-supervisor", before.1, after.1),
    ] {
        let threads: std::collections::BTreeMap<_, _> = after
            .into_iter()
            .map(|(name, time)| {
                let earlier = before.get(&name).copied().unwrap_or(0.0);
                (name, (time - earlier) / passed * 100.0)
            })
            .collect();
        let all = threads.values().sum();
        let details = json!({ "seconds": passed, "threads_percent": threads });
        findings.add(id, Ok(Found::samples(vec![all]).with(details)));
    }
    let memory = process::memory(vmm, EXTRA_SMALL_MIB)?;
    let found = Found::samples(vec![memory.beyond]).with(serde_json::to_value(memory)?);
    findings.add("vmm-rss-ready", Ok(found));
    findings.add(
        "supervisor-rss",
        Ok(Found::samples(vec![process::resident(run.pid())?])),
    );
    Ok(())
}
