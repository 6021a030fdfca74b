//! `host-agent service`: what an operator does with the services that `serve` keeps.

mod changes;
mod update;

use std::fs::File;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::{ApplyArgs, BeginArgs, DeleteArgs, ServiceVerb};
use super::config;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::instances::columns;
use super::interrupt::Interrupts;
use super::meter::Meter;
use super::output::Output;
use super::running::interrupted;
use super::runtime;
use crate::api::client::{Client, ClientError};
use crate::api::types::{
    ApplyAnswer, ApplyRequest, History, PackageInfo, RefusalKind, ServiceInfo, Services,
};
use crate::digest::Digest;
use crate::printable::printable;
use crate::service::{self, ServiceRules};
use crate::store::paths;
use crate::store::services::{Expected, Operation, OperationKind, OperationState};

/// Longest wait in one request.
const WAIT: Duration = Duration::from_secs(10);

/// Runs the verb.
pub fn run(verb: &ServiceVerb, no_input: bool, output: &Output) -> Result<Exit, CliError> {
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let mut interrupts = Interrupts::listen()?;
        let work = async {
            match verb {
                ServiceVerb::Apply(args) => apply(args, no_input, output).await,
                ServiceVerb::List => list(output).await,
                ServiceVerb::Show(args) => show(&args.service, output).await,
                ServiceVerb::History(args) => history(&args.service, output).await,
                ServiceVerb::Update(args) => update::update(args, no_input, output).await,
                ServiceVerb::Rollback(args) => update::rollback(args, no_input, output).await,
                ServiceVerb::Resume(args) => update::resume(args, output).await,
                ServiceVerb::Stop(args) => changes::stop(args, no_input, output).await,
                ServiceVerb::Start(args) => changes::start(args, output).await,
                ServiceVerb::Delete(args) => delete(args, no_input, output).await,
            }
        };
        tokio::select! {
            result = work => result,
            number = interrupts.next() => Err(interrupted(number)),
        }
    });
    // A thread may still wait for standard input.
    runtime.shutdown_background();
    result
}

pub(super) async fn connect() -> Result<Client, CliError> {
    let socket = paths::serve_socket();
    let connected = Client::connect(&socket).await;
    connected.map_err(|error| not_serving(&error))
}

/// No daemon answers.
pub(super) fn not_serving(error: &ClientError) -> CliError {
    let what = "no host-agent serve of this user runs";
    CliError::new(Code::NotServing, what)
        .cause(vmbus::text::chain(error))
        .hint("host-agent serve   (in another terminal)")
}

async fn apply(args: &ApplyArgs, no_input: bool, output: &Output) -> Result<Exit, CliError> {
    let started = Instant::now();
    let name = &args.service;
    let config = args.config.as_deref();
    let meter = Meter::start(output);
    // Checked here too, so that errors name the user's files.
    let rules = config::load(None)?.rules();
    rules.load(&args.package, config, meter.progress())?;
    let configuration = service::configuration_text(&args.package, config)?;
    drop(meter);
    let mut client = connect().await?;
    let package = package_of(&mut client, &rules, &args.package, output).await?;
    let path = format!("services/{name}");
    let mut request = ApplyRequest {
        package,
        configuration,
        publish: args.publish.clone(),
        policy: (&args.policy).into(),
        dry_run: true,
    };
    let plan: ApplyAnswer = client.put(&path, &request).await?;
    let text = match &plan.update {
        Some(plan) => update::plan_text(plan),
        None => plan_text(&plan),
    };
    if args.dry_run {
        output.answer(
            &text,
            || json!({"schema": "host-agent.service-apply/1", "service": name, "plan": plan}),
        )?;
        return Ok(Exit::Success);
    }
    for line in text.lines() {
        output.progress(line);
    }
    confirm("apply?", &args.begin, no_input).await?;
    request.dry_run = false;
    let answer: ApplyAnswer = client.put(&path, &request).await?;
    let operation = match answer.operation {
        Some(operation) => operation,
        // As wanted already: what may still run is waited for all the same.
        None => match client.get::<ServiceInfo>(&path).await?.operation {
            Some(operation) => operation,
            None => return unchanged(name, output),
        },
    };
    let operation = finish(&mut client, operation, &args.begin).await?;
    let info: ServiceInfo = client.get(&path).await?;
    if info.expected == Expected::Stopped {
        return stopped(name, output);
    }
    let took = started.elapsed().as_secs_f64();
    if matches!(
        operation.kind,
        OperationKind::Update | OperationKind::Rollback | OperationKind::Resume
    ) {
        let text = update::result_text(&operation, &info);
        output.answer(
            &text,
            || json!({"schema": "host-agent.service-apply/1", "service": info, "operation": operation}),
        )?;
        return Ok(Exit::Success);
    }
    let (ready, all) = (
        info.ready,
        info.deployment.as_ref().map_or(0, |it| it.instances.len()),
    );
    let text = if operation.state == OperationState::Running {
        format!(
            "{name} generation {}: begun, operation {}",
            info.generation, operation.id
        )
    } else {
        format!(
            "{name} generation {}: {ready}/{all} Ready in {took:.1} s",
            info.generation
        )
    };
    output.answer(
        &text,
        || json!({"schema": "host-agent.service-apply/1", "service": info, "operation": operation}),
    )?;
    Ok(Exit::Success)
}

fn stopped(name: &str, output: &Output) -> Result<Exit, CliError> {
    output.answer(
        &format!("{name}: stopped; host-agent service start {name} starts it"),
        || json!({"schema": "host-agent.service-apply/1", "service": name, "operation": null}),
    )?;
    Ok(Exit::Success)
}

fn unchanged(name: &str, output: &Output) -> Result<Exit, CliError> {
    output.answer(
        &format!("{name}: nothing to do"),
        || json!({"schema": "host-agent.service-apply/1", "service": name, "operation": null}),
    )?;
    Ok(Exit::Success)
}

/// SHA-256 of a package that is on the host, where it is uploaded unless it is there.
async fn package_of(
    client: &mut Client,
    rules: &ServiceRules,
    package: &Path,
    output: &Output,
) -> Result<Digest, CliError> {
    let meter = Meter::start(output);
    let packed = pack(rules, package, &meter)?;
    let package = packed.as_ref().map_or(package, |packed| &**packed);
    let cannot = |error: io::Error| {
        let what = format!("cannot read {}", package.display());
        CliError::new(Code::ServiceFile, what).cause(error.to_string())
    };
    let mut file = File::open(package).map_err(cannot)?;
    let digest = Digest::of(&file).map_err(cannot)?.0;
    let place = format!("packages/{}", digest.hex());
    match client.get::<PackageInfo>(&place).await {
        Ok(_) => {}
        Err(ClientError::Refused {
            kind: RefusalKind::NotFound,
            ..
        }) => {
            io::Seek::rewind(&mut file).map_err(cannot)?;
            client.upload::<PackageInfo>(&place, file).await?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(digest)
}

/// The package of a directory, in a temporary file.
fn pack(
    rules: &ServiceRules,
    package: &Path,
    meter: &Meter,
) -> Result<Option<tempfile::TempPath>, CliError> {
    if !package.is_dir() {
        return Ok(None);
    }
    let cannot = |error: io::Error| {
        CliError::new(Code::Output, "cannot make a temporary package").cause(error.to_string())
    };
    let file = tempfile::Builder::new().suffix(".cspkg").tempfile();
    let path = file.map_err(cannot)?.into_temp_path();
    rules.pack(package, &path, meter.progress())?;
    Ok(Some(path))
}

async fn delete(args: &DeleteArgs, no_input: bool, output: &Output) -> Result<Exit, CliError> {
    let name = &args.service;
    let mut client = connect().await?;
    let path = format!("services/{name}");
    let info: ServiceInfo = client.get(&path).await?;
    let instances = info.deployment.as_ref().map_or(0, |it| it.instances.len());
    let instances = counted(instances, "instance");
    output.progress(&format!(
        "plan: stop {instances} of {name} and remove everything of it"
    ));
    confirm("delete?", &args.begin, no_input).await?;
    let operation: Operation = client.delete(&path).await?;
    let operation = finish(&mut client, operation, &args.begin).await?;
    let text = match operation.state {
        OperationState::Running => format!("{name}: deletion begun, operation {}", operation.id),
        _ => format!("{name}: deleted"),
    };
    output.answer(
        &text,
        || json!({"schema": "host-agent.service-delete/1", "operation": operation}),
    )?;
    Ok(Exit::Success)
}

/// Asks on a terminal.
pub(super) async fn confirm(
    question: &str,
    begin: &BeginArgs,
    no_input: bool,
) -> Result<(), CliError> {
    if begin.yes || no_input || !io::stdin().is_terminal() {
        return Ok(());
    }
    let question = format!("{question} [y/N] ");
    let asked = tokio::task::spawn_blocking(move || {
        let mut screen = io::stderr();
        screen.write_all(question.as_bytes())?;
        screen.flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        Ok::<_, io::Error>(answer)
    });
    let answer = asked
        .await
        .map_err(io::Error::from)
        .and_then(|answer| answer);
    match answer.as_deref().map(str::trim) {
        Ok("y" | "Y" | "yes") => Ok(()),
        _ => Err(CliError::new(Code::Usage, "nothing was changed")
            .cause("the question was not answered with y")
            .hint("--yes does not ask")),
    }
}

/// Waits for an operation if it is to be waited for; one that failed is an error.
async fn finish(
    client: &mut Client,
    mut operation: Operation,
    begin: &BeginArgs,
) -> Result<Operation, CliError> {
    let started = Instant::now();
    while begin.wait && operation.state == OperationState::Running {
        let left = begin
            .timeout
            .map(|limit| limit.saturating_sub(started.elapsed()));
        if left == Some(Duration::ZERO) {
            let what = format!(
                "operation {} of {} goes on",
                operation.id, operation.service
            );
            return Err(CliError::new(Code::Timeout, what)
                .cause("--timeout has passed")
                .hint(format!("host-agent service show {}", operation.service)));
        }
        let wait = left.map_or(WAIT, |left| left.min(WAIT)).as_millis();
        let path = format!("operations/{}?wait_ms={wait}", operation.id);
        operation = client.get(&path).await?;
    }
    match operation.state {
        OperationState::Running | OperationState::Succeeded | OperationState::Paused => {
            return Ok(operation);
        }
        OperationState::Halted | OperationState::RolledBack => {
            return Err(update::failed(&operation));
        }
        OperationState::Failed => {}
    }
    let what = match operation.kind {
        OperationKind::Apply => "was not started",
        OperationKind::Delete => "was not deleted",
        OperationKind::Stop => "was not stopped",
        OperationKind::Start => "was not started again",
        OperationKind::Update | OperationKind::Rollback | OperationKind::Resume => {
            "was not updated"
        }
    };
    let error = CliError::new(
        Code::Operation,
        format!("service {} {what}", operation.service),
    );
    let cause = operation.error.unwrap_or_default();
    Err(error
        .cause(cause)
        .hint(format!("host-agent service show {}", operation.service)))
}

fn plan_text(plan: &ApplyAnswer) -> String {
    let mut lines = vec![format!(
        "plan: create {}",
        counted(plan.create.len(), "instance")
    )];
    let create = plan.create.iter();
    lines.extend(
        create.map(|it| format!("  {}  {} vCPU  {} MiB", it.name, it.vcpus, it.memory_mib)),
    );
    let endpoints = plan.endpoints.iter();
    lines.extend(endpoints.map(|it| {
        let instances = counted(it.instances as usize, "instance");
        format!("  endpoint {}  port {} -> {instances}", it.name, it.port)
    }));
    lines.join("\n")
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

async fn list(output: &Output) -> Result<Exit, CliError> {
    let found: Services = connect().await?.get("services").await?;
    let head = ["SERVICE", "GENERATION", "READY", "EXPECTED", "OPERATION"].map(str::to_owned);
    let rows = found.services.iter().map(row);
    let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
    let text = match rows.len() {
        1 => "no services".to_owned(),
        _ => columns(&rows),
    };
    output.answer(
        &text,
        || json!({"schema": "host-agent.services/1", "services": found.services}),
    )?;
    Ok(Exit::Success)
}

fn row(info: &ServiceInfo) -> [String; 5] {
    let all = info.deployment.as_ref().map_or(0, |it| it.instances.len());
    let row = [
        info.name.clone(),
        info.generation.to_string(),
        format!("{}/{all}", info.ready),
        info.expected.name().to_owned(),
        info.operation
            .as_ref()
            .map_or_else(String::new, operation_text),
    ];
    row.map(|cell| printable(&cell))
}

fn operation_text(operation: &Operation) -> String {
    let mut text = format!("{} {}", operation.kind.name(), operation.state.name());
    if let Some(error) = &operation.error {
        text.push_str(": ");
        text.push_str(error);
    }
    text
}

async fn show(name: &str, output: &Output) -> Result<Exit, CliError> {
    let info: ServiceInfo = connect().await?.get(&format!("services/{name}")).await?;
    let mut rows = vec![["INSTANCE", "STATE", "BOOT", "ENDPOINTS"].map(str::to_owned)];
    for instance in info.deployment.iter().flat_map(|it| &it.instances) {
        let endpoints = instance.endpoints.iter();
        let endpoints: Vec<_> = endpoints
            .map(|it| format!("{} {} -> {}", it.name, it.address, it.local_port))
            .collect();
        let row = [
            instance.name.clone(),
            instance.state.clone(),
            instance.generation.to_string(),
            endpoints.join(", "),
        ];
        rows.push(row.map(|cell| printable(&cell)));
    }
    let mut text = format!("{} generation {}", info.name, info.generation);
    if let Some(operation) = &info.operation {
        text.push_str(&format!(", {}", operation_text(operation)));
    }
    if rows.len() > 1 {
        text.push_str(&format!("\n{}", columns(&rows)));
    }
    output.answer(
        &text,
        || json!({"schema": "host-agent.service/1", "service": info}),
    )?;
    Ok(Exit::Success)
}

async fn history(name: &str, output: &Output) -> Result<Exit, CliError> {
    let path = format!("services/{name}/history");
    let found: History = connect().await?.get(&path).await?;
    let head = ["WHEN", "BY USER", "WHAT", "GENERATION", "PACKAGE", "RESULT"];
    let mut rows = vec![head.map(str::to_owned)];
    for operation in &found.operations {
        let took = operation
            .ended_ms
            .map(|ended| ended.saturating_sub(operation.started_ms));
        let mut result = operation.state.name().to_owned();
        if let Some(took) = took {
            result.push_str(&format!(" after {:.1} s", took as f64 / 1000.0));
        }
        if let Some(error) = &operation.error {
            result.push_str(&format!(": {error}"));
        }
        let row = [
            time(operation.started_ms),
            operation.user.to_string(),
            operation.kind.name().to_owned(),
            operation.generation.to_string(),
            package_text(&found, operation.generation),
            result,
        ];
        rows.push(row.map(|cell| printable(&cell)));
    }
    let mut text = columns(&rows);
    for revision in &found.revisions {
        text.push_str(&format!(
            "\ngeneration {}: package sha256:{}",
            revision.generation,
            revision.package.hex()
        ));
    }
    output.answer(
        &text,
        || json!({"schema": "host-agent.service-history/1", "history": found}),
    )?;
    Ok(Exit::Success)
}

/// The first digits of the package of a generation; nothing if the service was deleted.
fn package_text(history: &History, generation: u64) -> String {
    let mut revisions = history.revisions.iter();
    let found = revisions.find(|revision| revision.generation == generation);
    found.map_or_else(String::new, |found| found.package.hex()[..12].to_owned())
}

/// A time as RFC 3339 in UTC.
pub(super) fn time(ms: u64) -> String {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |it| format!("{it:.0}"))
}
