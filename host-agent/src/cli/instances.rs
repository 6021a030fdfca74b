//! `host-agent ps`, `freeze` and `thaw`; finding an instance by its name.

use std::time::Duration;

use serde_json::json;

use super::args::InstanceArg;
use super::error::CliError;
use super::exit::Exit;
use super::output::Output;
use super::runtime;
use crate::api::client::{self, Client, InstanceTarget, RunningDeployment};
use crate::api::types::PauseRequest;
use crate::printable::printable;
use crate::store::paths;

/// Lists what runs.
pub fn list(output: &Output) -> Result<Exit, CliError> {
    let running = runtime()?.block_on(client::list(&paths::runtime_dir()))?;
    output.answer(&table(&running), || {
        let infos: Vec<_> = running.iter().map(|running| &running.info).collect();
        json!({"schema": "host-agent.ps/1", "deployments": infos})
    })?;
    Ok(Exit::Success)
}

/// Stops the vCPUs of an instance, or lets them run again.
pub fn pause(args: &InstanceArg, paused: bool, output: &Output) -> Result<Exit, CliError> {
    runtime()?.block_on(async {
        let target = find(&args.instance).await?;
        let mut client = Client::connect(&target.socket).await?;
        let path = format!("{}/pause", target.path());
        let _: PauseRequest = client.post(&path, &PauseRequest { paused }).await?;
        let what = if paused { "stopped" } else { "running" };
        output.answer(&format!("{}: vCPUs {what}", target.instance), || {
            json!({"schema": "host-agent.pause/1", "instance": target.instance, "paused": paused})
        })?;
        Ok(Exit::Success)
    })
}

/// The running instance called `name`.
pub async fn find(name: &str) -> Result<InstanceTarget, CliError> {
    let running = client::list(&paths::runtime_dir()).await?;
    Ok(client::find(&running, name)?)
}

fn table(running: &[RunningDeployment]) -> String {
    let mut rows = vec![
        [
            "DEPLOYMENT",
            "SERVICE",
            "INSTANCE",
            "STATE",
            "BOOT",
            "UPTIME",
            "ENDPOINTS",
        ]
        .map(str::to_owned),
    ];
    for RunningDeployment { info, .. } in running {
        for instance in &info.instances {
            let endpoints = instance.endpoints.iter();
            let endpoints: Vec<_> = endpoints
                .map(|e| format!("{} {} -> {}", e.name, e.address, e.local_port))
                .collect();
            let row = [
                info.deployment.get(..8).unwrap_or(&info.deployment).into(),
                info.service.clone(),
                instance.name.clone(),
                instance.state.clone(),
                instance.generation.to_string(),
                uptime(Duration::from_millis(instance.uptime_ms)),
                endpoints.join(", "),
            ];
            // A newline in a cell would forge a row.
            rows.push(row.map(|cell| printable(&cell)));
        }
    }
    if rows.len() == 1 {
        return "nothing runs".into();
    }
    columns(&rows)
}

/// Left-aligned columns, two blanks apart.
pub fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width: [usize; N] = std::array::from_fn(|column| {
        let lengths = rows.iter().map(|row| row[column].chars().count());
        lengths.max().unwrap_or(0)
    });
    let lines: Vec<_> = rows
        .iter()
        .map(|row| {
            let cells: Vec<_> = row
                .iter()
                .zip(width)
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            cells.join("  ").trim_end().to_owned()
        })
        .collect();
    lines.join("\n")
}

fn uptime(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{DeploymentInfo, EndpointInfo, InstanceInfo};
    use crate::supervisor::status::InstanceStatus;

    #[test]
    fn the_table_is_aligned_or_says_that_nothing_runs() {
        assert_eq!(table(&[]), "nothing runs");
        let info = DeploymentInfo {
            deployment: "0123456789abcdef".into(),
            service: "redis".into(),
            pid: 7,
            instances: vec![InstanceInfo {
                name: "Cache_IN_0".into(),
                state: "Ready".into(),
                status: InstanceStatus::default(),
                generation: 2,
                incarnation: 1,
                uptime_ms: 61_000,
                vmm_pid: Some(9),
                endpoints: vec![EndpointInfo {
                    name: "redis".into(),
                    address: ([127, 0, 0, 1], 6379).into(),
                    local_port: 6379,
                }],
            }],
        };
        let running = RunningDeployment {
            socket: "/x.sock".into(),
            info,
        };
        assert_eq!(
            table(&[running]),
            "DEPLOYMENT  SERVICE  INSTANCE    STATE  BOOT  UPTIME     ENDPOINTS\n\
             01234567    redis    Cache_IN_0  Ready  2     1 min 1 s  \
             redis 127.0.0.1:6379 -> 6379"
        );
    }

    #[test]
    fn uptimes_are_short() {
        let text = |seconds| uptime(Duration::from_secs(seconds));
        assert_eq!(text(59), "59 s");
        assert_eq!(text(3_700), "1 h 1 min");
        assert_eq!(text(90_000), "1 d 1 h");
    }
}
