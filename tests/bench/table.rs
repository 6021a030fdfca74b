//! The lines of the table and its layout.

use crate::measure::Budget::{AtLeast, AtMost};
use crate::measure::{Definition, Measure, Verdict};

const fn line(
    id: &'static str,
    title: &'static str,
    unit: &'static str,
    budget: Option<crate::measure::Budget>,
) -> Definition {
    Definition {
        id,
        title,
        unit,
        budget,
    }
}

/// A section: its lines, measured together.
#[derive(Debug)]
pub struct Section {
    /// Name, as `--only` takes it.
    pub name: &'static str,
    /// Its lines.
    pub lines: &'static [Definition],
}

/// Every section.
pub const SECTIONS: &[Section] = &[
    Section {
        name: "boot",
        lines: &[
            line("boot", "VMM start to guest init", "ms", None),
            line("boot-firecracker", "  Firecracker", "ms", None),
            line("boot-qemu", "  QEMU microvm", "ms", None),
            line(
                "boot-vs-firecracker",
                "  against Firecracker",
                "ratio",
                Some(AtMost(0.9)),
            ),
            line("boot-vs-qemu", "  against QEMU microvm", "ratio", None),
            line(
                "vmm-rss-init",
                "VMM RSS beyond guest RAM, 1 vCPU, 128 MiB, at init",
                "MiB",
                Some(AtMost(5.0)),
            ),
        ],
    },
    Section {
        name: "service",
        lines: &[
            line("ready", "deploy accepted to role Ready", "ms", None),
            line(
                "ready-vs-firecracker",
                "  against Firecracker's boot to init",
                "ratio",
                Some(AtMost(1.5)),
            ),
            line(
                "ready-vs-qemu",
                "  against QEMU microvm's boot to init",
                "ratio",
                None,
            ),
            line(
                "vmm-rss-ready",
                "VMM RSS beyond guest RAM, Ready instance",
                "MiB",
                Some(AtMost(5.0)),
            ),
            line(
                "supervisor-rss",
                "supervisor RSS, one guest",
                "MiB",
                Some(AtMost(30.0 + 64.0 / 1024.0)),
            ),
            line("app-agent-rss", "app-agent RSS in the guest", "MiB", None),
            line(
                "guest-agent-rss",
                "guest-agent RSS in the guest",
                "MiB",
                None,
            ),
            line(
                "bootstrapper-rss",
                "bootstrapper RSS in the guest",
                "MiB",
                None,
            ),
            line(
                "idle-cpu",
                "idle guest, CPU on the host",
                "% of a core",
                Some(AtMost(0.3)),
            ),
            line(
                "idle-cpu-supervisor",
                "  its supervisor",
                "% of a core",
                None,
            ),
        ],
    },
    Section {
        name: "idle",
        lines: &[
            line("idle-exits", "idle guest, VM exits", "1/s", None),
            line(
                "idle-exits-vs-firecracker",
                "  against Firecracker",
                "ratio",
                Some(AtMost(1.0)),
            ),
            line(
                "idle-vmm-cpu",
                "idle guest, CPU of its VMM process",
                "% of a core",
                None,
            ),
            line(
                "idle-vmm-cpu-vs-firecracker",
                "  against Firecracker",
                "ratio",
                Some(AtMost(1.0)),
            ),
        ],
    },
    Section {
        name: "tunnel",
        lines: &[
            line("tunnel-in", "endpoint tunnel, host to guest", "MiB/s", None),
            line(
                "tunnel-out",
                "endpoint tunnel, guest to host",
                "MiB/s",
                None,
            ),
            line(
                "tunnel-rtt",
                "endpoint tunnel, 64 B round trip, median",
                "us",
                None,
            ),
            line("tunnel-rtt-p99", "  99th percentile", "us", None),
        ],
    },
    Section {
        name: "io",
        lines: &[
            line("vsock-in", "vsock, host to guest", "MiB/s", None),
            line(
                "vsock-in-vs-firecracker",
                "  against Firecracker",
                "ratio",
                Some(AtLeast(1.2)),
            ),
            line("vsock-out", "vsock, guest to host", "MiB/s", None),
            line(
                "vsock-out-vs-firecracker",
                "  against Firecracker",
                "ratio",
                Some(AtLeast(1.2)),
            ),
            line("vsock-rtt", "vsock, 64 B round trip, median", "us", None),
            line(
                "vsock-rtt-vs-firecracker",
                "  against Firecracker",
                "ratio",
                Some(AtMost(1.0)),
            ),
            line("randread", "4 KiB random read, diff disk", "IOPS", None),
            line("randread-vs-raw", "  against a raw file", "ratio", None),
            line(
                "randread-vs-firecracker",
                "  against Firecracker on a raw file",
                "ratio",
                Some(AtLeast(1.0)),
            ),
            line("randwrite", "4 KiB random write, diff disk", "IOPS", None),
            line("randwrite-vs-raw", "  against a raw file", "ratio", None),
            line(
                "randwrite-vs-firecracker",
                "  against Firecracker on a raw file",
                "ratio",
                Some(AtLeast(1.0)),
            ),
            line("read", "1 MiB sequential read, diff disk", "MiB/s", None),
            line("read-vs-raw", "  against a raw file", "ratio", None),
            line(
                "read-vs-firecracker",
                "  against Firecracker on a raw file",
                "ratio",
                Some(AtLeast(1.0)),
            ),
            line("write", "1 MiB sequential write, diff disk", "MiB/s", None),
            line("write-vs-raw", "  against a raw file", "ratio", None),
            line(
                "write-vs-firecracker",
                "  against Firecracker on a raw file",
                "ratio",
                Some(AtLeast(1.0)),
            ),
        ],
    },
];

/// The table as text.
pub fn render(measures: &[Measure]) -> String {
    let mut rows = vec![["measure", "value", "min .. max", "budget", ""].map(String::from)];
    for measure in measures {
        let number = |value: f64| number(value, measure.unit);
        rows.push([
            measure.title.to_owned(),
            measure.value.map_or_else(
                || "-".into(),
                |value| match measure.unit {
                    "ratio" => number(value),
                    unit => format!("{} {unit}", number(value)),
                },
            ),
            match (measure.min, measure.max) {
                (Some(min), Some(max)) if measure.samples.len() > 1 => {
                    format!("{} .. {}", number(min), number(max))
                }
                _ => String::new(),
            },
            match measure.budget {
                Some(AtMost(most)) => format!("<= {}", number(most)),
                Some(AtLeast(least)) => format!(">= {}", number(least)),
                None => String::new(),
            },
            match (measure.verdict, &measure.reason) {
                (Verdict::Met, _) => "met".into(),
                (Verdict::NotMet, _) => "NOT met".into(),
                (Verdict::NoBudget, _) => String::new(),
                (Verdict::NotMeasured, Some(reason)) => format!("not measured: {reason}"),
                (Verdict::NotMeasured, None) => "not measured".into(),
            },
        ]);
    }
    let widths: Vec<usize> = (0..5)
        .map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0))
        .collect();
    let lines = rows.iter().map(|row| {
        let text: String = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, width))| match column {
                0 | 4 => format!("{cell:<width$}  "),
                _ => format!("{cell:>width$}  "),
            })
            .collect();
        format!("{}\n", text.trim_end())
    });
    lines.collect()
}

fn number(value: f64, unit: &str) -> String {
    match unit {
        "ratio" | "MiB" | "% of a core" => format!("{value:.2}"),
        _ if value >= 100.0 => format!("{value:.0}"),
        _ => format!("{value:.1}"),
    }
}
