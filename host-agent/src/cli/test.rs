//! `host-agent test`: deploys a service, probes it, stops it, and reports.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::args::{OnNoKvm, ServiceArgs, TestArgs};
use super::config;
use super::deploy::MORE_SPACE;
use super::endpoint_probe::{EndpointProbe, UnresolvedEndpoint};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::output::Output;
use super::report::{
    self, HostFacts, InstanceReport, Outcome, ReportFile, StepReport, TestReport, rfc3339, stages,
};
use super::run::{not_ready, tails};
use super::running::{Running, WaitEnd, interrupted};
use super::ticker::Ticker;
use super::watch::RunError;
use super::{deploy, environment, evidence, runtime};
use crate::doctor::{HostReport, Scope, Verdict};
use crate::printable::printable;
use crate::service::model::ServiceModel;
use crate::shell::quoted;
use crate::store::deployment::Retention;
use crate::supervisor::event::TimelineEvent;

/// Lines of the serial console in a report.
const SERIAL_TAIL: usize = 20;

/// Runs the test, writes the reports even if it failed, and prints the result.
pub fn run(args: &TestArgs, output: &Output) -> Exit {
    let started = (SystemTime::now(), Instant::now());
    let mut report = blank(args, started.0);
    let result = attempt(args, output, &mut report);
    report.duration_ms = millis(started.1.elapsed());
    let exit = match &result {
        Ok(()) => Exit::Success,
        Err(error) => error.exit(),
    };
    report.exit_code = exit.code();
    report.result = match exit {
        Exit::Success => Outcome::Ok,
        Exit::Skipped => Outcome::Skip,
        _ => Outcome::Fail,
    };
    report.error = result.as_ref().err().map(CliError::json);
    // After an error the other reports and the result are written all the same.
    let mut unwritten = None;
    for file in &args.reports {
        if let Err(error) = write_report(file, &report) {
            output.error(&error);
            unwritten.get_or_insert(error.exit());
        }
    }
    if let Err(error) = result {
        output.error(&error);
    }
    if let Err(error) = output.answer(&report.verdict(), || report.json()) {
        // SIGPIPE: the reader of the output has exited.
        if error.exit() != Exit::Signal(13) {
            output.error(&error);
        }
        unwritten.get_or_insert(error.exit());
    }
    match (exit, unwritten) {
        (Exit::Success, Some(unwritten)) => unwritten,
        _ => exit,
    }
}

fn blank(args: &TestArgs, started: SystemTime) -> TestReport {
    TestReport {
        result: Outcome::Fail,
        exit_code: Exit::Unclassified.code(),
        service: args.service.service.display().to_string(),
        started: rfc3339(started),
        duration_ms: 0,
        host: HostFacts {
            kvm: None,
            exit_us: None,
            timeout_scale: 1,
        },
        instances: Vec::new(),
        probes: Vec::new(),
        stop: None,
        error: None,
    }
}

fn write_report(file: &ReportFile, report: &TestReport) -> Result<(), CliError> {
    let path = file.path();
    let written = match path.parent() {
        Some(parent) => std::fs::create_dir_all(parent),
        None => Ok(()),
    };
    written
        .and_then(|()| std::fs::write(path, file.render(report)))
        .map_err(|error| deploy::cannot_write(path, &error))
}

fn attempt(args: &TestArgs, output: &Output, report: &mut TestReport) -> Result<(), CliError> {
    let unblocked = output.never_block();
    unblocked.map_err(|error| CliError::chain(Code::Unclassified, &error))?;
    let config = config::load(None)?;
    let model = deploy::load(&args.service, &config.rules(), output)?;
    report.service.clone_from(&model.name);
    let probes = resolve(&args.probes, &model)?;
    let on_no_kvm = match args.on_no_kvm {
        Some(given) => given,
        None => environment::choice("HOST_AGENT_ON_NO_KVM")?.unwrap_or(OnNoKvm::Fail),
    };
    let host = deploy::host(&config, Scope::Guests)?;
    report.host = HostFacts {
        kvm: host.kind.map(str::to_owned),
        exit_us: host.exit_us,
        timeout_scale: host.timeout_scale(),
    };
    if !host.is_usable() {
        let error = CliError::host(&host, &args.service.service);
        // A machine without free memory or disk space does have KVM.
        let no_kvm = !matches!(host.verdict, Verdict::NoMemory | Verdict::NoDisk);
        return Err(match on_no_kvm {
            OnNoKvm::Skip if no_kvm => error.exit_with(Exit::Skipped),
            OnNoKvm::Fail | OnNoKvm::Skip => error,
        });
    }
    output.progress(&format!("host-agent: {}", host.summary()));
    let options = deploy::options(&host, &config, None)?;
    let data_dir = options.data_dir.clone();
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let deadline = Instant::now() + host.scaled(args.timeout);
        let mut running =
            Running::start(model, options, Retention::Ephemeral, output, |_, line| {
                output.progress(&line);
                Ok(())
            })
            .await?;
        let mut result = drive(&mut running, &probes, &host, deadline, output, report).await;
        describe(&running, &mut result, report);
        result = preserve(&running, args, &data_dir, result, report);
        running.finish(output).await;
        result.map_err(|failed| failed.error)
    });
    runtime.shutdown_background();
    result
}

/// A probe with the names of its role and endpoint.
type ResolvedProbe<'a> = (&'a EndpointProbe, (String, String));

/// Finds the endpoint of each probe. A probe that does not name one is a usage error.
fn resolve<'a>(
    probes: &'a [EndpointProbe],
    model: &ServiceModel,
) -> Result<Vec<ResolvedProbe<'a>>, CliError> {
    let mut targets = Vec::new();
    for probe in probes {
        let error = match probe.resolve(model) {
            Ok((role, endpoint)) => {
                targets.push((probe, (role.definition.name.clone(), endpoint.name.clone())));
                continue;
            }
            Err(UnresolvedEndpoint::Unknown(names)) => {
                let what = format!("the service has no endpoint {}", probe.endpoint);
                CliError::new(Code::Usage, format!("probe {probe}: {what}")).hint(
                    if names.is_empty() {
                        "the definition declares no InputEndpoint".to_owned()
                    } else {
                        format!("endpoints: {}", names.join(", "))
                    },
                )
            }
            Err(UnresolvedEndpoint::Ambiguous(names)) => {
                let what = format!("several roles have an endpoint {}", probe.endpoint);
                CliError::new(Code::Usage, format!("probe {probe}: {what}"))
                    .hint(format!("name one of: {}", names.join(", ")))
            }
        };
        return Err(error);
    }
    Ok(targets)
}

/// Ready, probes, still Ready, clean stop.
async fn drive(
    running: &mut Running,
    probes: &[ResolvedProbe<'_>],
    host: &HostReport,
    deadline: Instant,
    output: &Output,
    report: &mut TestReport,
) -> Result<(), RunError> {
    let show = |_: &TimelineEvent, line: String| {
        output.progress(&line);
        Ok(())
    };
    let ended = running.wait(Some(deadline), show).await?;
    let mut result = ready(running, ended);
    for target in probes {
        let name = target.0.to_string();
        if result.is_err() {
            report.probes.push(StepReport::new(name, Outcome::Skip, 0));
            continue;
        }
        let step = run_probe(running, target, host.timeout_scale(), deadline, output).await;
        let step = match step {
            Ok(step) => step,
            Err(failed) => {
                report.probes.push(StepReport::new(name, Outcome::Fail, 0));
                result = Err(failed);
                continue;
            }
        };
        let detail = step.detail.clone().unwrap_or_default();
        output.progress(&format!(
            "probe {name}  {}  {detail} in {} ms",
            step.result, step.ms
        ));
        if step.result == Outcome::Fail {
            let error = CliError::new(Code::Probe, format!("probe {name} failed"));
            let mut error = error.cause(detail);
            if running.watch.lacks_space() {
                error = error
                    .cause(running.watch.waiting().join("; "))
                    .hint(MORE_SPACE);
            }
            result = Err(RunError {
                error,
                instance: running.suspect(&target.1.0).cloned(),
            });
        }
        report.probes.push(step);
    }
    if result.is_ok() {
        let ended = running.steady(Some(deadline), show).await?;
        result = ready(running, ended);
    }
    let took = running.stop(output, show).await?;
    let left = running.watch.unclean();
    let mut stop = StepReport::new("stop", Outcome::Ok, millis(took));
    if let Some(first) = left.first() {
        let what = format!("{} had to be stopped by force", left.join(", "));
        stop.result = Outcome::Fail;
        stop.code = Some(Code::Unclean.name());
        stop.detail = Some(what.clone());
        if result.is_ok() {
            result = Err(RunError {
                error: CliError::new(Code::Unclean, what),
                instance: Some(first.clone()),
            });
        }
    }
    report.stop = Some(stop);
    result
}

/// An error unless a wait ended with Ready.
fn ready(running: &Running, ended: WaitEnd) -> Result<(), RunError> {
    match ended {
        WaitEnd::Ready => Ok(()),
        WaitEnd::Failed(error) => Err(error),
        WaitEnd::Deadline => Err(not_ready(running)),
        WaitEnd::Signal(number) => Err(interrupted(number).into()),
        WaitEnd::Finished => {
            Err(CliError::new(Code::Start, "the service ended before it was Ready").into())
        }
    }
}

/// Runs a probe and ends it early if the service fails meanwhile.
async fn run_probe(
    running: &mut Running,
    (probe, endpoint): &ResolvedProbe<'_>,
    scale: u32,
    deadline: Instant,
    output: &Output,
) -> Result<StepReport, RunError> {
    let show = |_: &TimelineEvent, line: String| {
        output.progress(&line);
        Ok(())
    };
    let address = running
        .address(&endpoint.0, &endpoint.1)
        .expect("probes were resolved by the definition");
    let broken = async {
        loop {
            match running.wait(None, show).await {
                Ok(WaitEnd::Ready) => {}
                ended => return ended,
            }
        }
    };
    let mut ticker = Ticker::start(output);
    let last = RefCell::new(format!("probe {probe}"));
    let note = |why: &str| {
        last.replace(format!("probe {probe}: {}", printable(why)));
    };
    let probing = probe.run(address, deadline, scale, note);
    let (mut broken, mut probing) = (pin!(broken), pin!(probing));
    let outcome = loop {
        tokio::select! {
            outcome = &mut probing => break outcome,
            ended = &mut broken => {
                return Err(match ended? {
                    WaitEnd::Failed(error) => error,
                    WaitEnd::Signal(number) => interrupted(number).into(),
                    _ => CliError::new(Code::Role, "the service ended while it was probed").into(),
                });
            }
            () = ticker.due() => ticker.show(&last.borrow()),
        }
    };
    drop(ticker);
    let (result, detail, code) = match outcome.result {
        Ok(seen) => (Outcome::Ok, seen, None),
        Err(why) => (
            Outcome::Fail,
            format!("{why} ({} attempts)", outcome.attempts),
            Some(Code::Probe.name()),
        ),
    };
    Ok(StepReport {
        detail: Some(detail),
        code,
        ..StepReport::new(probe.to_string(), result, millis(outcome.took))
    })
}

/// Adds each instance with its steps to the report, and the end of its logs to the error
/// of the one that failed.
fn describe(running: &Running, result: &mut Result<(), RunError>, report: &mut TestReport) {
    let directory = running.deployment().directory();
    let failed = result.as_ref().err();
    let of_instance = failed.and_then(|failed| failed.instance.clone());
    for name in &running.names {
        let mine = failed
            .filter(|failed| failed.instance.as_ref() == Some(name))
            .map(|failed| report::StageFailure {
                detail: failed.error.what().to_owned(),
                code: failed.error.code().name(),
            });
        let serial = directory.join(name).join("serial.log");
        report.instances.push(InstanceReport {
            name: name.clone(),
            state: running.watch.state(name).to_owned(),
            stages: stages(&running.seen, name, mine.as_ref()),
            logs: Vec::new(),
            serial_tail: match mine {
                Some(_) => evidence::tail(&serial, SERIAL_TAIL),
                None => Vec::new(),
            },
        });
    }
    if let (Err(failed), Some(name)) = (result, of_instance) {
        let error = std::mem::replace(&mut failed.error, CliError::new(Code::Unclassified, ""));
        failed.error = tails(error, &directory.join(&name), &name);
    }
}

/// Copies the logs before they are removed: to the directory that the user gave, or after
/// a failure to one in the data directory.
fn preserve(
    running: &Running,
    args: &TestArgs,
    data_dir: &Path,
    result: Result<(), RunError>,
    report: &mut TestReport,
) -> Result<(), RunError> {
    let deployment = running.deployment();
    let target: PathBuf = match (&args.artifacts, &result) {
        (Some(directory), _) => directory.clone(),
        (None, Ok(())) => return result,
        (None, Err(_)) => evidence::failed_dir(data_dir, deployment.id()),
    };
    let mut copy_error = None;
    for instance in &mut report.instances {
        let from = deployment.directory().join(&instance.name);
        match evidence::copy_logs(&from, &target.join(&instance.name)) {
            Ok(copies) => instance.logs = copies,
            Err(error) => copy_error = Some(error),
        }
    }
    match (result, copy_error) {
        (Ok(()), None) => Ok(()),
        (Ok(()), Some(error)) => Err(deploy::cannot_write(&target, &error).into()),
        (Err(mut failed), copy_error) => {
            let mut error = failed.error.logs(target.display().to_string());
            if let Some(why) = copy_error {
                error = error.cause(format!("not all logs could be copied: {why}"));
            }
            if error.hint_text().is_none() {
                error = error.hint(run_and_keep(&args.service));
            }
            failed.error = error;
            Err(failed)
        }
    }
}

/// The command that runs the service and keeps disks and logs.
fn run_and_keep(service: &ServiceArgs) -> String {
    let mut command = format!("host-agent run {}", quoted(&service.service));
    if let Some(config) = &service.config {
        command.push_str(&format!(" --config {}", quoted(config)));
    }
    command + " --keep"
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{CommandLine, Verb};
    use crate::cli::report::TestReport;
    use clap::Parser as _;

    fn args(line: &[&str]) -> TestArgs {
        let line = ["host-agent", "test"].iter().chain(line);
        match CommandLine::try_parse_from(line).unwrap().verb {
            Verb::Test(args) => args,
            _ => panic!("not test"),
        }
    }

    #[test]
    fn a_missing_service_still_gives_reports() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let json = format!("json={}", path("new/a.json").display());
        let junit = format!("junit={}", path("a.xml").display());
        let args = args(&["/no/such/service", "--report", &json, "--report", &junit]);
        let output = Output::before_flags(true);
        assert_eq!(run(&args, &output), Exit::NotFound);
        let text = std::fs::read_to_string(path("new/a.json")).unwrap();
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["exit_code"], 4);
        assert_eq!(report["error"]["code"], "HA-0102");
        let xml = std::fs::read_to_string(path("a.xml")).unwrap();
        assert!(xml.contains("<failure message=\"HA-0102"), "{xml}");
    }

    #[test]
    fn the_hint_after_a_failure_runs_the_same_service() {
        let args = args(&["my service", "--config", "a's.cscfg"]);
        let wanted = r"host-agent run 'my service' --config 'a'\''s.cscfg' --keep";
        assert_eq!(run_and_keep(&args.service), wanted);
    }

    #[test]
    fn a_report_begins_as_failed() {
        let report: TestReport = blank(&args(&["x"]), SystemTime::UNIX_EPOCH);
        assert_eq!(report.started, "1970-01-01T00:00:00Z");
        assert_eq!(report.result, Outcome::Fail);
    }
}
