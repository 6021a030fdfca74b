//! Section `io`: vsock and disks of three guests: one of our VMM on a diff, one of our
//! VMM on a raw file, and one of Firecracker on a raw file. The guests run at the same
//! time, and each sample is taken from one after the other. They have the same kernel,
//! initrd, RAM and disk contents. Each test file is written before, so that reads and
//! writes use clusters that the diff has.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::measure::{Found, median, percentile};
use crate::vmm::{self, Running, Vmm};
use crate::{Findings, Setting, client, first_line};
use e2e::bare::{BareGuest, Disk};

/// The vsock port of `tests/bench/guest.rs`.
const PORT: u32 = 7000;
/// RAM of each guest.
const MEMORY_MIB: u32 = 512;
/// fio on a test file of this size.
const FIO: &str = "fio --name=bench --filename=/bench.fio --size=128M --direct=1";

/// Line of the table, bytes per request, requests in flight.
const PATTERNS: [(&str, &str, u32); 4] = [
    ("randread", "4k", 16),
    ("randwrite", "4k", 16),
    ("read", "1M", 4),
    ("write", "1M", 4),
];

/// Measures.
pub fn measure(setting: &Setting, findings: &mut Findings) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("ha").tempdir()?;
    let base = setting.image().join("base.ext4");
    let initrd = dir.path().join("initrd");
    initrd_with_modules(setting, &initrd)?;
    let start = |name: &str, vmm: &Vmm, diff: bool| -> Result<Running> {
        let files = dir.path().join(name);
        let disk = if diff {
            Disk::Diff(base.clone())
        } else {
            Disk::Raw(raw_copy(&base, &files)?)
        };
        let guest = BareGuest {
            disks: vec![disk],
            ..setting.guest(initrd.clone(), MEMORY_MIB)
        };
        let (running, _) = vmm::boot(vmm, &guest, &files)?;
        let line = format!("{FIO} --rw=write --bs=1M --end_fsync=1 --output-format=json");
        rate(&client::shell(running.connect(PORT)?, &line)?, "write")
            .with_context(|| name.to_owned())?;
        Ok(running)
    };
    let ours = Vmm::Ours(e2e::program());
    let mut guests = vec![start("diff", &ours, true)?, start("raw", &ours, false)?];
    let peer = match vmm::find("firecracker") {
        None => Err("firecracker is not on PATH".to_owned()),
        Some(program) => {
            let started = start("firecracker", &Vmm::Firecracker(program), false);
            started.map_err(|error| {
                setting.progress(&format!("io: {error:#}"));
                first_line(&error)
            })
        }
    };
    let peer = peer.map(|running| guests.push(running));
    setting.progress("io: guests are up");
    // vsock does not depend on the disk, so our guest on the raw file is left out.
    let ends = || guests.iter().enumerate().filter(|(number, _)| *number != 1);
    for (id, ask) in [
        ("vsock-in", client::send as fn(_) -> Result<f64>),
        ("vsock-out", client::receive),
    ] {
        let mut samples = vec![vec![]; guests.len()];
        for _ in 0..setting.pick(7, 3) {
            for (number, guest) in ends() {
                samples[number].push(ask(guest.connect(PORT)?)?);
            }
        }
        against(findings, id, &samples, &peer, None);
        setting.progress(&format!("io: {id}"));
    }
    let mut trips = vec![vec![]; guests.len()];
    for _ in 0..setting.pick(8, 2) {
        for (number, guest) in ends() {
            trips[number].extend(client::round_trips(guest.connect(PORT)?, 250)?);
        }
    }
    let tails: Vec<_> = trips.iter().map(|trips| percentile(trips, 99.0)).collect();
    against(
        findings,
        "vsock-rtt",
        &trips,
        &peer,
        Some(json!({ "p99_us": tails })),
    );

    let seconds = setting.pick(4, 2);
    for (id, block, depth) in PATTERNS {
        let mut samples = vec![vec![]; guests.len()];
        for round in 0..setting.pick(5, 2) {
            // A different guest comes first in each round, so that drift affects all alike.
            for turn in 0..guests.len() {
                let number = (turn + usize::try_from(round)?) % guests.len();
                let line = format!(
                    "{FIO} --rw={id} --bs={block} --iodepth={depth} --ioengine=libaio --time_based \
                     --runtime={seconds} --ramp_time=1 --norandommap --output-format=json"
                );
                let text = client::shell(guests[number].connect(PORT)?, &line)?;
                samples[number].push(rate(&text, id)?);
            }
        }
        let how = json!({ "bytes": block, "depth": depth, "seconds": seconds,
            "raw": samples[1], "raw_median": median(&samples[1]) });
        findings.add(
            &format!("{id}-vs-raw"),
            Ok(Found::ratio(&samples[0], &samples[1])),
        );
        against(findings, id, &samples, &peer, Some(how));
        setting.progress(&format!("io: {id}"));
    }
    Ok(())
}

/// Adds line `id`, the samples of our first guest, and their ratio to those of the peer,
/// the last guest.
fn against(
    findings: &mut Findings,
    id: &str,
    samples: &[Vec<f64>],
    peer: &Result<(), String>,
    details: Option<Value>,
) {
    let ratio = match (peer, samples) {
        (Ok(()), [ours, .., theirs]) => {
            let theirs_are = json!({ "firecracker": theirs, "firecracker_median": median(theirs) });
            Ok(Found::ratio(ours, theirs).with(theirs_are))
        }
        (Err(reason), _) => Err(reason.clone()),
        (Ok(()), _) => Err("no samples".into()),
    };
    findings.add(&format!("{id}-vs-firecracker"), ratio);
    let found = Found::samples(samples[0].clone()).with(details.unwrap_or_default());
    findings.add(id, Ok(found));
}

/// Writes the image's initrd with the benchmark's `/init`: the kernel unpacks two
/// concatenated archives, and a file of the second replaces one of the first.
pub fn initrd_with_modules(setting: &Setting, to: &Path) -> Result<()> {
    let mut bytes = fs::read(setting.image().join("initrd"))?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(fs::read(&setting.initrd).context("the benchmark's initrd")?);
    Ok(fs::write(to, bytes)?)
}

/// Copies `base` to a file in `dir`, which is created.
pub fn raw_copy(base: &Path, dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir)?;
    let copy = dir.join("disk.raw");
    let output = std::process::Command::new("cp")
        .args(["--sparse=always", "--no-preserve=mode"])
        .args([base, &copy])
        .output()?;
    ensure!(output.status.success(), "{}", e2e::text(&output));
    Ok(copy)
}

/// The figure of a fio report: requests per second of a random pattern, MiB per second
/// of a sequential one.
fn rate(fio: &str, id: &str) -> Result<f64> {
    // fio may print notes before and after the report.
    let start = fio
        .find('{')
        .with_context(|| format!("no report of fio: {fio}"))?;
    let mut reports = serde_json::Deserializer::from_str(&fio[start..]).into_iter::<Value>();
    let report = reports.next().context("no report of fio")??;
    let job = &report["jobs"][0];
    ensure!(job["error"] == 0, "fio failed: {fio}");
    let direction = &job[if id.ends_with("read") {
        "read"
    } else {
        "write"
    }];
    let value = if id.starts_with("rand") {
        direction["iops"].as_f64()
    } else {
        direction["bw_bytes"]
            .as_f64()
            .map(|bytes| bytes / f64::from(1 << 20))
    };
    value
        .filter(|value| *value > 0.0)
        .with_context(|| format!("no figures of fio: {fio}"))
}
