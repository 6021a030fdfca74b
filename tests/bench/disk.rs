//! Section `disk`: fio in the guest on the diff disk and, in turns, on a raw file.
//!
//! The raw file is the instance's resource disk. Both are virtio-blk disks of the
//! same guest with ext4, on the same file system of the host; both test files are
//! written before, so reads and writes hit clusters that the diff has.

use anyhow::{Context as _, Result};
use e2e::Place;
use e2e::run::Run;
use e2e::service::Service;
use serde_json::{Value, json};

use crate::measure::Found;
use crate::{Findings, Setting};

/// Size of each test file.
const SIZE: &str = "128M";
const DIFF: &str = "/bench.fio";
const RAW: &str = "/mnt/resource/bench.fio";

/// Line of the table, pattern, bytes per request, requests in flight.
const PATTERNS: [(&str, &str, &str, u32); 4] = [
    ("randread", "randread", "4k", 16),
    ("randwrite", "randwrite", "4k", 16),
    ("read", "read", "1M", 4),
    ("write", "write", "1M", 4),
];

/// Measures.
pub fn measure(setting: &Setting, findings: &mut Findings) -> Result<()> {
    let place = Place::new()?;
    let service = Service {
        image: setting.image_name.clone(),
        ..Service::script("#!/bin/sh\nexec sleep 1000000\n")
    };
    let service = service.write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    for file in [DIFF, RAW] {
        run.shell(&format!("{} --rw=write --bs=1M --end_fsync=1", fio(file)))?;
    }
    let seconds = setting.pick(4, 2);
    for (id, pattern, block, depth) in PATTERNS {
        let (mut diff, mut raw) = (vec![], vec![]);
        for round in 0..setting.pick(5, 2) {
            let sample = |file| -> Result<f64> {
                let text = run.shell(&format!(
                    "{} --rw={pattern} --bs={block} --iodepth={depth} --ioengine=libaio \
                     --time_based --runtime={seconds} --ramp_time=1 --norandommap \
                     --output-format=json",
                    fio(file)
                ))?;
                rate(&text, id)
            };
            // Who goes first changes, so that a drift favours nobody.
            if round % 2 == 0 {
                diff.push(sample(DIFF)?);
                raw.push(sample(RAW)?);
            } else {
                raw.push(sample(RAW)?);
                diff.push(sample(DIFF)?);
            }
        }
        setting.progress(&format!("disk: {id}"));
        let how = json!({ "bytes": block, "depth": depth, "seconds": seconds,
            "raw": "the instance's resource disk", "raw_samples": raw });
        findings.add(&format!("{id}-vs-raw"), Ok(Found::ratio(&diff, &raw)));
        findings.add(id, Ok(Found::samples(diff).with(how)));
    }
    run.stop()?;
    Ok(())
}

fn fio(file: &str) -> String {
    format!("fio --name=bench --filename={file} --size={SIZE} --direct=1")
}

/// Requests per second of a random pattern, MiB per second of a sequential one.
fn rate(fio: &str, id: &str) -> Result<f64> {
    // Notes of fio may come before the report.
    let start = fio.find('{').context("no report of fio")?;
    let report: Value = serde_json::from_str(&fio[start..]).context("report of fio")?;
    let job = &report["jobs"][0];
    let way = &job[if id.ends_with("read") {
        "read"
    } else {
        "write"
    }];
    let value = if id.starts_with("rand") {
        way["iops"].as_f64()
    } else {
        way["bw_bytes"]
            .as_f64()
            .map(|bytes| bytes / f64::from(1 << 20))
    };
    value.context("figures of fio")
}
