//! `host-agent top`: state, processor time, memory and heartbeat of every instance, from the
//! status and the metrics of each host agent of this user.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::args::duration;
use super::error::CliError;
use super::exit::Exit;
use super::instances::columns;
use super::interrupt::Interrupts;
use super::output::{self, Output};
use super::runtime;
use super::terminal::window_size;
use crate::api::client::{self, Client, RunningDeployment};
use crate::api::types::InstanceInfo;
use crate::doctor::iec;
use crate::printable::printable;
use crate::store::paths;

/// Time between the two looks of a single table: processor time is counted in hundredths of a
/// second, so that a share is exact to 2 %.
const ONCE: Duration = Duration::from_millis(500);

/// Shows the alternate screen; leaves it and shows the cursor.
const ENTER: &str = "\u{1b}[?1049h\u{1b}[?25l";
const LEAVE: &str = "\u{1b}[?1049l\u{1b}[?25h";
/// To the first cell, and erases the screen.
const CLEAR: &str = "\u{1b}[H\u{1b}[J";

/// `top`.
#[derive(Debug, Clone, Args)]
pub struct TopArgs {
    /// Time between two looks, on a terminal
    #[arg(long, value_name = "S", value_parser = duration, default_value = "2s")]
    pub interval: Duration,
}

/// Deployment and instance.
type Key = (String, String);

/// Values of one metric by instance.
type Values = BTreeMap<Key, f64>;

/// Everything at one moment.
#[derive(Debug)]
struct Look {
    at: Instant,
    running: Vec<RunningDeployment>,
    cpu_seconds: Values,
    resident_bytes: Values,
    heartbeat_age: Values,
}

/// One instance.
#[derive(Debug)]
struct Row<'a> {
    service: &'a str,
    deployment: &'a str,
    instance: &'a InstanceInfo,
    /// Of one processor.
    cpu_percent: Option<f64>,
    resident_bytes: Option<u64>,
    heartbeat_age: Option<f64>,
}

/// Shows the table: again and again on a terminal, else once.
pub fn run(args: &TopArgs, output: &Output) -> Result<Exit, CliError> {
    runtime()?.block_on(async {
        let mut interrupts = Interrupts::listen()?;
        if io::stdout().is_terminal() && output.is_table() {
            let _screen = Screen::enter()?;
            tokio::select! {
                never = live(args.interval) => never,
                // The normal end.
                _ = interrupts.next() => Ok(Exit::Success),
            }
        } else {
            tokio::select! {
                done = once(output) => done,
                number = interrupts.next() => Ok(Exit::Signal(number)),
            }
        }
    })
}

async fn once(output: &Output) -> Result<Exit, CliError> {
    let before = look().await?;
    tokio::time::sleep(ONCE).await;
    let now = look().await?;
    let rows = rows(&before, &now);
    output.answer(&table(&rows), || {
        let rows: Vec<_> = rows.iter().map(row_json).collect();
        json!({"schema": "host-agent.top/1", "instances": rows})
    })?;
    Ok(Exit::Success)
}

async fn live(interval: Duration) -> Result<Exit, CliError> {
    let mut before = look().await?;
    let mut wait = ONCE.min(interval);
    loop {
        tokio::time::sleep(wait).await;
        let now = look().await?;
        let (height, width) = window_size();
        let text = table(&rows(&before, &now));
        let lines = text.lines().take(usize::from(height).saturating_sub(1));
        let lines: Vec<String> = lines
            .map(|line| line.chars().take(width.into()).collect())
            .collect();
        // In raw bytes, as the cursor is moved; every cell was made printable.
        output::write(format!("{CLEAR}{}\r\n", lines.join("\r\n")).as_bytes())?;
        before = now;
        wait = interval;
    }
}

/// The alternate screen, until this is dropped.
struct Screen;

impl Screen {
    fn enter() -> Result<Self, CliError> {
        output::write(ENTER.as_bytes())?;
        Ok(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Fails only if the terminal is gone.
        let _ = output::write(LEAVE.as_bytes());
    }
}

async fn look() -> Result<Look, CliError> {
    let running = client::list(&paths::runtime_dir()).await?;
    let mut look = Look {
        at: Instant::now(),
        cpu_seconds: Values::new(),
        resident_bytes: Values::new(),
        heartbeat_age: Values::new(),
        running,
    };
    let mut sockets: Vec<_> = look.running.iter().map(|it| it.socket.clone()).collect();
    sockets.dedup();
    for socket in sockets {
        // A host agent that ended a moment ago has no figures.
        let Ok(text) = metrics(&socket).await else {
            continue;
        };
        for (metric, values) in [
            ("host_agent_vmm_cpu_seconds_total", &mut look.cpu_seconds),
            (
                "host_agent_vmm_resident_memory_bytes",
                &mut look.resident_bytes,
            ),
            (
                "host_agent_instance_heartbeat_age_seconds",
                &mut look.heartbeat_age,
            ),
        ] {
            values.extend(values_of(&text, metric));
        }
    }
    Ok(look)
}

async fn metrics(socket: &Path) -> Result<String, CliError> {
    let client = Client::connect(socket).await?;
    Ok(client.metrics().await?)
}

/// The samples of `metric` in Prometheus text, by instance.
fn values_of(text: &str, metric: &str) -> Values {
    let samples = text.lines().filter_map(|line| {
        let (labels, value) = line
            .strip_prefix(metric)?
            .strip_prefix('{')?
            .rsplit_once("} ")?;
        let key = (label(labels, "deployment")?, label(labels, "instance")?);
        Some((key, value.parse().ok()?))
    });
    samples.collect()
}

/// The value of a label. Ids and names of instances have no character that is escaped.
fn label(labels: &str, name: &str) -> Option<String> {
    let (_, value) = labels.split_once(&format!("{name}=\""))?;
    Some(value.split_once('"')?.0.to_owned())
}

fn rows<'a>(before: &Look, now: &'a Look) -> Vec<Row<'a>> {
    let passed = now.at.duration_since(before.at).as_secs_f64();
    let mut rows = Vec::new();
    for RunningDeployment { info, .. } in &now.running {
        for instance in &info.instances {
            let key = (info.deployment.clone(), instance.name.clone());
            // Of a new process it begins anew.
            let cpu = now.cpu_seconds.get(&key).map(|seconds| {
                let earlier = before.cpu_seconds.get(&key).filter(|it| *it <= seconds);
                (seconds - earlier.copied().unwrap_or(0.0)) / passed * 100.0
            });
            rows.push(Row {
                service: &info.service,
                deployment: &info.deployment,
                instance,
                cpu_percent: cpu,
                resident_bytes: now.resident_bytes.get(&key).map(|bytes| *bytes as u64),
                heartbeat_age: now.heartbeat_age.get(&key).copied(),
            });
        }
    }
    let cpu = |row: &Row<'_>| row.cpu_percent.unwrap_or(0.0);
    rows.sort_by(|a, b| cpu(b).total_cmp(&cpu(a)));
    rows
}

fn table(rows: &[Row<'_>]) -> String {
    if rows.is_empty() {
        return "nothing runs".into();
    }
    let head = [
        "SERVICE",
        "INSTANCE",
        "STATE",
        "BOOT",
        "CPU",
        "MEMORY",
        "HEARTBEAT",
    ];
    let cells = rows.iter().map(|row| {
        let cells = [
            row.service.to_owned(),
            row.instance.name.clone(),
            row.instance.state.clone(),
            row.instance.generation.to_string(),
            row.cpu_percent.map_or_else(dash, |it| format!("{it:.0} %")),
            row.resident_bytes.map_or_else(dash, iec),
            row.heartbeat_age
                .map_or_else(dash, |it| format!("{it:.0} s ago")),
        ];
        // A newline in a cell would forge a row.
        cells.map(|cell| printable(&cell))
    });
    let all: Vec<_> = std::iter::once(head.map(str::to_owned))
        .chain(cells)
        .collect();
    columns(&all)
}

fn dash() -> String {
    "-".into()
}

fn row_json(row: &Row<'_>) -> Value {
    json!({
        "service": row.service,
        "deployment": row.deployment,
        "instance": row.instance.name,
        "state": row.instance.state,
        "generation": row.instance.generation,
        "cpu_percent": row.cpu_percent,
        "memory_bytes": row.resident_bytes,
        "heartbeat_age_s": row.heartbeat_age,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::DeploymentInfo;
    use crate::supervisor::status::InstanceStatus;

    const TEXT: &str = "# HELP host_agent_vmm_cpu_seconds Time.\n\
        host_agent_vmm_cpu_seconds_total{service=\"a\\\"b\",deployment=\"d1\",instance=\"A_IN_0\"} 3.5\n\
        host_agent_vmm_cpu_seconds_total{service=\"s\",deployment=\"d1\",instance=\"A_IN_1\"} 1\n\
        host_agent_vmm_resident_memory_bytes{service=\"s\",deployment=\"d1\",instance=\"A_IN_0\"} 1048576\n";

    fn at(at: Instant, cpu: &[f64]) -> Look {
        let instance = |n: usize| InstanceInfo {
            name: format!("A_IN_{n}"),
            state: "Ready".into(),
            status: InstanceStatus::default(),
            generation: 1,
            incarnation: 1,
            uptime_ms: 1,
            vmm_pid: None,
            endpoints: Vec::new(),
        };
        let key = |n| ("d1".to_owned(), format!("A_IN_{n}"));
        Look {
            at,
            running: vec![RunningDeployment {
                socket: "/s".into(),
                info: DeploymentInfo {
                    deployment: "d1".into(),
                    service: "shop".into(),
                    pid: 1,
                    instances: (0..3).map(instance).collect(),
                },
            }],
            cpu_seconds: cpu
                .iter()
                .enumerate()
                .map(|(n, it)| (key(n), *it))
                .collect(),
            resident_bytes: values_of(TEXT, "host_agent_vmm_resident_memory_bytes"),
            heartbeat_age: Values::new(),
        }
    }

    #[test]
    fn figures_are_read_by_instance() {
        let found = values_of(TEXT, "host_agent_vmm_cpu_seconds_total");
        let found: Vec<_> = found.into_iter().collect();
        let key = |n| ("d1".to_owned(), format!("A_IN_{n}"));
        assert_eq!(found, [(key(0), 3.5), (key(1), 1.0)]);
    }

    #[test]
    fn the_busiest_instance_comes_first() {
        let start = Instant::now();
        let before = at(start, &[5.0, 4.0]);
        // The process of the second one is a new one.
        let now = at(start + Duration::from_secs(2), &[5.5, 1.0]);
        let text = table(&rows(&before, &now));
        assert_eq!(
            text,
            "SERVICE  INSTANCE  STATE  BOOT  CPU   MEMORY   HEARTBEAT\n\
             shop     A_IN_1    Ready  1     50 %  -        -\n\
             shop     A_IN_0    Ready  1     25 %  1.0 MiB  -\n\
             shop     A_IN_2    Ready  1     -     -        -"
        );
    }
}
