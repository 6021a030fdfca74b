//! Measures the product and prints each figure beside its budget. `scripts/bench`
//! prepares what it needs.
//!
//! `bench --initrd FILE --guest-program FILE --json FILE [--image NAME] [--where TEXT] [--quick]
//! [--only SECTION] [--enforce]`

mod boot;
mod client;
mod exits;
mod idle;
mod io;
mod machine;
mod measure;
mod process;
mod service;
mod table;
mod tunnel;
mod vmm;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use e2e::bare::BareGuest;
use host_agent::supervisor::guest::COMMAND_LINE;
use serde_json::json;

use crate::measure::{Found, Measure, Verdict};

/// Options of the command line.
#[derive(Debug)]
pub struct Setting {
    initrd: PathBuf,
    guest_program: PathBuf,
    json: PathBuf,
    image_name: String,
    location: String,
    quick: bool,
    only: Option<String>,
    enforce: bool,
    started: Instant,
}

impl Setting {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut setting = Self {
            initrd: PathBuf::new(),
            guest_program: PathBuf::new(),
            json: PathBuf::from("bench.json"),
            image_name: "bench".into(),
            location: "this machine".into(),
            quick: false,
            only: None,
            enforce: false,
            started: Instant::now(),
        };
        while let Some(flag) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .with_context(|| format!("{flag} needs a value"))
            };
            match flag.as_str() {
                "--initrd" => setting.initrd = value()?.into(),
                "--guest-program" => setting.guest_program = value()?.into(),
                "--json" => setting.json = value()?.into(),
                "--image" => setting.image_name = value()?,
                "--where" => setting.location = value()?,
                "--only" => setting.only = Some(value()?),
                "--quick" => setting.quick = true,
                "--enforce" => setting.enforce = true,
                _ => bail!("unknown argument {flag}"),
            }
        }
        let names: Vec<_> = table::SECTIONS.iter().map(|section| section.name).collect();
        if let Some(only) = &setting.only {
            ensure!(
                names.contains(&only.as_str()),
                "unknown section {only}: --only takes one of {}",
                names.join(", ")
            );
        }
        Ok(setting)
    }

    fn image(&self) -> PathBuf {
        e2e::images().join(&self.image_name)
    }

    /// The image's kernel with this initrd and one vCPU, without disks.
    fn guest(&self, initrd: PathBuf, memory_mib: u32) -> BareGuest {
        BareGuest {
            kernel: self.image().join("kernel"),
            initrd,
            command_line: COMMAND_LINE.into(),
            vcpus: 1,
            memory_mib,
            disks: vec![],
        }
    }

    /// `usual`, or `quick` with `--quick`.
    fn pick(&self, usual: u64, quick: u64) -> u64 {
        if self.quick { quick } else { usual }
    }

    fn progress(&self, text: &str) {
        eprintln!("{:7.1} s  {text}", self.started.elapsed().as_secs_f64());
    }
}

/// What the sections found, by the id of the line.
#[derive(Debug, Default)]
pub struct Findings(BTreeMap<String, Result<Found, String>>);

impl Findings {
    fn add(&mut self, id: &str, found: Result<Found, String>) {
        self.0.insert(id.to_owned(), found);
    }

    /// The samples of an earlier section, or why there are none.
    fn samples(&self, id: &str) -> Result<Vec<f64>, String> {
        match self.0.get(id) {
            Some(Ok(found)) => Ok(found.samples.clone()),
            Some(Err(reason)) => Err(reason.clone()),
            None => Err(format!("{id} was not measured")),
        }
    }
}

/// The first line of an error, for a cell of the table.
fn first_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}

fn main() -> Result<ExitCode> {
    let setting = Setting::parse(std::env::args().skip(1))?;
    let mut findings = Findings::default();
    let mut whole = true;
    let mut measures = vec![];
    for section in table::SECTIONS {
        if setting
            .only
            .as_deref()
            .is_some_and(|only| only != section.name)
        {
            continue;
        }
        let done = match section.name {
            "boot" => boot::measure(&setting, &mut findings),
            "service" => service::measure(&setting, &mut findings),
            "idle" => idle::measure(&setting, &mut findings),
            "tunnel" => tunnel::measure(&setting, &mut findings),
            "io" => io::measure(&setting, &mut findings),
            name => Err(anyhow::anyhow!("no section {name}")),
        };
        if let Err(error) = &done {
            whole = false;
            setting.progress(&format!("{}: {error:#}", section.name));
        }
        let missing = done
            .err()
            .map_or_else(|| "no figure".into(), |error| first_line(&error));
        for definition in section.lines {
            let found = findings.0.get(definition.id).cloned();
            let found = found.unwrap_or_else(|| Err(missing.clone()));
            measures.push(Measure::new(*definition, found));
        }
    }
    let machine = machine::facts(&setting.location);
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let report = json!({
        "schema": "host-agent.bench/1",
        "at_unix_seconds": since_1970.as_secs(),
        "took_seconds": setting.started.elapsed().as_secs_f64(),
        "quick": setting.quick,
        "machine": machine,
        "measures": measures,
    });
    std::fs::write(&setting.json, format!("{report:#}\n"))
        .with_context(|| format!("write {}", setting.json.display()))?;
    print!(
        "{}\n{}",
        machine::headline(&machine),
        table::render(&measures)
    );
    let broken = measures
        .iter()
        .any(|measure| measure.verdict == Verdict::NotMet);
    Ok(if !whole || (setting.enforce && broken) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
