//! `service update`, `service rollback` and `service resume`; what an update of `apply` prints.

use serde_json::json;

use super::{confirm, connect, counted, finish, package_of};
use crate::api::changes::{ChangeAnswer, RollbackRequest, UpdateAnswer, UpdateRequest};
use crate::api::client::Client;
use crate::api::types::ServiceInfo;
use crate::cli::args::{BeginArgs, PolicyArgs, ResumeArgs, RollbackArgs, UpdateArgs};
use crate::cli::config;
use crate::cli::error::{CliError, Code};
use crate::cli::exit::Exit;
use crate::cli::output::Output;
use crate::controller::plan::{Change, RolePlan, UpdatePlan};
use crate::store::rollouts::{OnFailure, RolloutPolicy};
use crate::store::services::{Operation, OperationState};

impl From<&PolicyArgs> for RolloutPolicy {
    fn from(args: &PolicyArgs) -> Self {
        let ms = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let default = Self::default();
        Self {
            on_failure: args.on_failure.unwrap_or_default(),
            pause_after: args.pause_after.or(args.manual.then_some(1)),
            limit_ms: args.ready_limit.map_or(default.limit_ms, ms),
            stable_ms: args.stable_for.map_or(default.stable_ms, ms),
        }
    }
}

/// `service update`.
pub(super) async fn update(
    args: &UpdateArgs,
    no_input: bool,
    output: &Output,
) -> Result<Exit, CliError> {
    let name = &args.service;
    if args.package.is_none() && args.config.is_none() {
        let error = CliError::new(Code::Usage, "nothing to update");
        return Err(error.hint(format!(
            "host-agent service update {name} --package F --config F"
        )));
    }
    let configuration = args.config.as_ref().map(|path| {
        std::fs::read_to_string(path).map_err(|error| {
            let what = format!("cannot read {}", path.display());
            CliError::new(Code::ServiceFile, what).cause(error.to_string())
        })
    });
    let mut client = connect().await?;
    let rules = config::load(None)?.rules();
    let package = match &args.package {
        Some(package) => Some(package_of(&mut client, &rules, package, output).await?),
        None => None,
    };
    let mut request = UpdateRequest {
        package,
        configuration: configuration.transpose()?,
        policy: RolloutPolicy::from(&args.policy),
        dry_run: true,
    };
    let path = format!("services/{name}/update");
    let planned: UpdateAnswer = client.post(&path, &request).await?;
    let text = plan_text(&planned.update);
    if args.dry_run {
        let plan = &planned.update;
        output.answer(
            &text,
            || json!({"schema": "host-agent.service-update/1", "service": name, "plan": plan}),
        )?;
        return Ok(Exit::Success);
    }
    for line in text.lines() {
        output.progress(line);
    }
    confirm("update?", &args.begin, no_input).await?;
    request.dry_run = false;
    let answer: UpdateAnswer = client.post(&path, &request).await?;
    let operation = wait(&mut client, name, answer.operation, &args.begin).await?;
    answer_with("update", name, operation, output).await
}

/// `service rollback`.
pub(super) async fn rollback(
    args: &RollbackArgs,
    no_input: bool,
    output: &Output,
) -> Result<Exit, CliError> {
    let name = &args.service;
    let mut client = connect().await?;
    let to = match args.to {
        Some(number) => format!("generation {number}"),
        None => "the generation before".to_owned(),
    };
    output.progress(&format!("plan: take {name} back to {to}"));
    confirm("roll back?", &args.begin, no_input).await?;
    let request = RollbackRequest {
        to: args.to,
        policy: RolloutPolicy::from(&args.policy),
    };
    let path = format!("services/{name}/rollback");
    let answer: ChangeAnswer = client.post(&path, &request).await?;
    let operation = wait(&mut client, name, answer.operation, &args.begin).await?;
    answer_with("rollback", name, operation, output).await
}

/// `service resume`.
pub(super) async fn resume(args: &ResumeArgs, output: &Output) -> Result<Exit, CliError> {
    let name = &args.service;
    let mut client = connect().await?;
    let path = format!("services/{name}/resume");
    let answer: ChangeAnswer = client.post(&path, &json!({})).await?;
    let operation = wait(&mut client, name, answer.operation, &args.begin).await?;
    answer_with("resume", name, operation, output).await
}

/// Waits for what was begun; else for the same that runs already.
async fn wait(
    client: &mut Client,
    name: &str,
    begun: Option<Operation>,
    begin: &BeginArgs,
) -> Result<Option<Operation>, CliError> {
    let operation = match begun {
        Some(operation) => operation,
        None => match client
            .get::<ServiceInfo>(&format!("services/{name}"))
            .await?
            .operation
        {
            Some(running) if running.state == OperationState::Running => running,
            _ => return Ok(None),
        },
    };
    finish(client, operation, begin).await.map(Some)
}

async fn answer_with(
    verb: &str,
    name: &str,
    operation: Option<Operation>,
    output: &Output,
) -> Result<Exit, CliError> {
    let info: ServiceInfo = connect().await?.get(&format!("services/{name}")).await?;
    let text = match &operation {
        None => format!("{name} generation {}: nothing to do", info.generation),
        Some(operation) => result_text(operation, &info),
    };
    let schema = format!("host-agent.service-{verb}/1");
    output.answer(
        &text,
        || json!({"schema": schema, "service": info, "operation": operation}),
    )?;
    Ok(Exit::Success)
}

/// How an update that has not failed stands.
pub(super) fn result_text(operation: &Operation, info: &ServiceInfo) -> String {
    let (name, generation) = (&info.name, info.generation);
    let all = info.deployment.as_ref().map_or(0, |it| it.instances.len());
    let ready = format!("{}/{all} Ready", info.ready);
    match operation.state {
        OperationState::Running => {
            format!(
                "{name} generation {generation}: begun, operation {}",
                operation.id
            )
        }
        OperationState::Paused => format!(
            "{name} generation {generation}: paused, {ready}; host-agent service resume {name} \
             goes on"
        ),
        _ => {
            let ended = operation.ended_ms.unwrap_or(operation.started_ms);
            let took = ended.saturating_sub(operation.started_ms) as f64 / 1000.0;
            format!("{name} generation {generation}: {ready} in {took:.1} s")
        }
    }
}

/// The plan of an update for people.
pub(super) fn plan_text(plan: &UpdatePlan) -> String {
    let mut lines = vec![format!("plan: update generation {}", plan.from)];
    if plan.roles.is_empty() {
        lines.push("  no instance runs: all are created".to_owned());
    }
    lines.extend(plan.roles.iter().map(role_text));
    lines.join("\n")
}

fn role_text(plan: &RolePlan) -> String {
    let domains = match plan.domains {
        1 => "1 upgrade domain".to_owned(),
        domains => format!("{domains} upgrade domains, one after the other"),
    };
    let mut parts = Vec::new();
    match plan.change {
        Change::None => {}
        Change::Configuration => parts.push(format!(
            "configuration only, guests keep running, {domains}"
        )),
        Change::Application => {
            parts.push(format!("application, disks and logs are kept, {domains}"));
        }
        Change::Recreate => parts.push(format!("made anew, LOCAL STORAGE IS LOST, {domains}")),
    }
    if plan.instances != plan.wanted {
        let wanted = counted(plan.wanted, "instance");
        parts.push(format!("{} -> {wanted}", plan.instances));
    }
    if parts.is_empty() {
        parts.push("nothing".to_owned());
    }
    format!("  {}: {}", plan.role, parts.join("; "))
}

/// An update that has failed, as an error with its own exit code.
pub(super) fn failed(operation: &Operation) -> CliError {
    let (service, generation) = (&operation.service, operation.generation);
    let cause = operation.error.clone().unwrap_or_default();
    if operation.state == OperationState::RolledBack {
        let what = format!("the update of {service} to generation {generation} was rolled back");
        return CliError::new(Code::RolledBack, what)
            .cause(cause)
            .hint(format!("host-agent service history {service}"))
            .logs(format!("host-agent events --service {service}"));
    }
    let what = format!("the update of {service} to generation {generation} is halted");
    CliError::new(Code::Halted, what)
        .cause(cause)
        .hint(format!(
            "host-agent service resume {service}, service rollback {service}, or another update"
        ))
        .logs(format!("host-agent events --service {service}"))
}

impl clap::ValueEnum for OnFailure {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Halt, Self::Rollback]
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(match self {
            Self::Halt => "halt".into(),
            Self::Rollback => "rollback".into(),
        })
    }
}
