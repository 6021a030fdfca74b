//! `service stop` and `service start`.

use serde_json::json;

use super::{confirm, connect, counted, finish};
use crate::api::changes::ChangeAnswer;
use crate::api::types::ServiceInfo;
use crate::cli::args::ChangeArgs;
use crate::cli::error::CliError;
use crate::cli::exit::Exit;
use crate::cli::output::Output;
use crate::store::services::OperationState;

/// Stops a service.
pub(super) async fn stop(
    args: &ChangeArgs,
    no_input: bool,
    output: &Output,
) -> Result<Exit, CliError> {
    let name = &args.service;
    let info: ServiceInfo = connect().await?.get(&format!("services/{name}")).await?;
    let instances = info.deployment.as_ref().map_or(0, |it| it.instances.len());
    let instances = counted(instances, "instance");
    output.progress(&format!(
        "plan: stop {instances} of {name}, keep their disks and logs"
    ));
    confirm("stop?", &args.begin, no_input).await?;
    change(args, "stop", "stopped", output).await
}

/// Starts a service that was stopped.
pub(super) async fn start(args: &ChangeArgs, output: &Output) -> Result<Exit, CliError> {
    change(args, "start", "started", output).await
}

async fn change(
    args: &ChangeArgs,
    verb: &str,
    done: &str,
    output: &Output,
) -> Result<Exit, CliError> {
    let name = &args.service;
    let mut client = connect().await?;
    let path = format!("services/{name}/{verb}");
    let answer: ChangeAnswer = client.post(&path, &json!({})).await?;
    let operation = match answer.operation {
        Some(operation) => Some(finish(&mut client, operation, &args.begin).await?),
        None => None,
    };
    let text = match &operation {
        None => format!("{name}: {done} already"),
        Some(operation) if operation.state == OperationState::Running => {
            format!("{name}: {verb} begun, operation {}", operation.id)
        }
        Some(_) => format!("{name}: {done}"),
    };
    let schema = format!("host-agent.service-{verb}/1");
    output.answer(
        &text,
        || json!({"schema": schema, "service": name, "operation": operation}),
    )?;
    Ok(Exit::Success)
}
