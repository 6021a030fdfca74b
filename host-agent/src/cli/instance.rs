//! `host-agent instance`: what an operator does with one instance.

use std::time::{Duration, Instant};

use serde_json::json;

use super::args::{InstanceChangeArgs, InstanceVerb};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::instances::{self, columns, find};
use super::interrupt::Interrupts;
use super::output::Output;
use super::running::interrupted;
use super::runtime;
use super::service::ask;
use crate::api::client::{Client, InstanceTarget};
use crate::api::instances::InstanceChange;
use crate::api::types::InstanceInfo;
use crate::printable::printable;
use crate::supervisor::instance::Accepted;

/// How often the host agent is asked: a fifth of the second within which a person expects
/// an answer.
const POLL: Duration = Duration::from_millis(200);

/// Runs the verb.
pub fn run(verb: &InstanceVerb, no_input: bool, output: &Output) -> Result<Exit, CliError> {
    let (args, what) = match verb {
        InstanceVerb::List => return instances::list(output),
        InstanceVerb::Show(args) => return show(&args.instance, output),
        InstanceVerb::Restart(args) => (args, InstanceChange::Restart),
        InstanceVerb::Recycle(args) => (args, InstanceChange::Recycle),
        InstanceVerb::Reimage(args) => (args, InstanceChange::Reimage),
        InstanceVerb::Rebuild(args) => (args, InstanceChange::Rebuild),
    };
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let mut interrupts = Interrupts::listen()?;
        tokio::select! {
            result = change(args, what, no_input, output) => result,
            number = interrupts.next() => Err(interrupted(number)),
        }
    });
    // A thread may still wait for standard input.
    runtime.shutdown_background();
    result
}

fn show(name: &str, output: &Output) -> Result<Exit, CliError> {
    runtime()?.block_on(async {
        let target = find(name).await?;
        let info = get(&target).await?;
        output.answer(&text(&info), || {
            json!({
                "schema": "host-agent.instance/1",
                "deployment": target.deployment,
                "instance": info,
            })
        })?;
        Ok(Exit::Success)
    })
}

async fn get(target: &InstanceTarget) -> Result<InstanceInfo, CliError> {
    let mut client = Client::connect(&target.socket).await?;
    Ok(client.get(&target.path()).await?)
}

fn text(info: &InstanceInfo) -> String {
    let pid = info.vmm_pid.map_or_else(String::new, |pid| pid.to_string());
    let mut rows = vec![
        ["instance".into(), info.name.clone()],
        ["state".into(), info.state.clone()],
        ["boot".into(), info.generation.to_string()],
        ["VMM process".into(), pid],
        ["goal".into(), info.incarnation.to_string()],
        ["goal applied".into(), info.status.applied.to_string()],
    ];
    rows.extend(info.endpoints.iter().map(|it| {
        let text = format!("{} -> {}", it.address, it.local_port);
        [format!("endpoint {}", it.name), text]
    }));
    // A newline in a cell would forge a row.
    let rows: Vec<_> = rows
        .into_iter()
        .map(|row| row.map(|cell| printable(&cell)))
        .collect();
    columns(&rows)
}

const fn plan(change: InstanceChange) -> &'static str {
    match change {
        InstanceChange::Restart => "reboot the guest, keep its OS disk and local storage",
        InstanceChange::Recycle => "stop the role and start it again, keep the guest",
        InstanceChange::Reimage => "reboot with a new OS disk, keep local storage",
        InstanceChange::Rebuild => "reboot with new disks: local storage is lost",
    }
}

async fn change(
    args: &InstanceChangeArgs,
    what: InstanceChange,
    no_input: bool,
    output: &Output,
) -> Result<Exit, CliError> {
    let started = Instant::now();
    let target = find(&args.instance).await?;
    let (name, verb) = (&target.instance, what.name());
    output.progress(&format!("plan: {name}: {}", plan(what)));
    ask(&format!("{verb}?"), args.yes, no_input).await?;
    let mut client = Client::connect(&target.socket).await?;
    let path = format!("{}/{verb}", target.path());
    let accepted: Accepted = client.post(&path, &json!({})).await?;
    let ready = if args.wait {
        Some(wait(&target, accepted, args.timeout, started).await?)
    } else {
        None
    };
    let took = started.elapsed().as_secs_f64();
    let line = match &ready {
        Some(_) => format!("{name}: {verb}, Ready in {took:.1} s"),
        None => format!("{name}: {verb} begun"),
    };
    output.answer(&line, || {
        json!({
            "schema": format!("host-agent.instance-{verb}/1"),
            "deployment": target.deployment,
            "name": name,
            "accepted": accepted,
            "instance": ready,
        })
    })?;
    Ok(Exit::Success)
}

/// The instance when the change is done.
async fn wait(
    target: &InstanceTarget,
    accepted: Accepted,
    timeout: Option<Duration>,
    started: Instant,
) -> Result<InstanceInfo, CliError> {
    let name = &target.instance;
    loop {
        let info = get(target).await?;
        if accepted.is_settled(&info.status) {
            if info.status.is_ready() {
                return Ok(info);
            }
            let mut error = CliError::new(Code::Role, format!("{name} is {}", info.state));
            if let Some(cause) = info.status.cause {
                error = error.cause(cause);
            }
            return Err(error.logs(format!("host-agent logs {name}")));
        }
        if timeout.is_some_and(|limit| started.elapsed() >= limit) {
            let what = format!("{name} is not Ready in time: {}", info.state);
            let hint = format!("host-agent wait {name}");
            return Err(CliError::new(Code::Timeout, what).hint(hint));
        }
        tokio::time::sleep(POLL).await;
    }
}
