//! What an operator does with one instance, and which of its disks each change keeps.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::run::Run;
use e2e::service::Service;
use e2e::{Sandbox, limit, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Counts its starts in its local storage.
const COUNTING: &str = "#!/bin/sh\necho start >> ${DATA}starts\nexec sleep 100000\n";
/// Sets `$data` to the role's local storage.
const DATA: &str = "data=$(echo /mnt/resource/Resources/directory/*.Role.Data)";

fn serve(sandbox: &Sandbox) -> Result<Run<'_>> {
    let mut command = sandbox.command();
    command.args(["serve", "--format", "jsonl"]);
    let mut run = Run::from_command(sandbox, command)?;
    run.line_with("serving ")?;
    Ok(run)
}

/// Runs a verb with `--json`; its answer.
fn answer(sandbox: &Sandbox, arguments: &[&str]) -> Result<Value> {
    let mut all = arguments.to_vec();
    all.push("--json");
    let output = sandbox.output(&all)?;
    ensure!(output.status.success(), "{arguments:?}: {}", text(&output));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Changes the instance and waits until it is Ready.
fn change(sandbox: &Sandbox, verb: &str) -> Result<Value> {
    let seconds = limit(60).as_secs().to_string();
    let arguments = ["instance", verb, "Role_IN_0", "--yes", "--wait"];
    let answer = answer(
        sandbox,
        &[&arguments[..], &["--timeout", &seconds]].concat(),
    )?;
    ensure!(answer["instance"]["state"] == "Ready", "{answer}");
    Ok(answer)
}

/// Leaves a mark in memory, on the OS disk and in local storage.
fn mark(run: &Run<'_>) -> Result<()> {
    run.shell(&format!(
        "{DATA}; for f in /run/mark /var/mark $data/mark; do echo x > $f; done; sync"
    ))?;
    Ok(())
}

/// What is left of the marks: `memory`, `os`, `local`; and how often the role has started on
/// this resource disk.
fn left(run: &Run<'_>) -> Result<(String, usize)> {
    let marks = run.shell(&format!(
        "{DATA}; [ ! -e /run/mark ] || echo memory; [ ! -e /var/mark ] || echo os; \
         [ ! -e $data/mark ] || echo local"
    ))?;
    let starts = run.shell(&format!("{DATA}; cat $data/starts"))?;
    let marks: Vec<_> = marks.lines().collect();
    Ok((marks.join(" "), starts.lines().count()))
}

#[test]
fn each_change_of_an_instance_keeps_the_disks_of_the_role_model() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let package = Service::script(COUNTING).write(&sandbox.file("service"))?;
    let package = package.to_str().context("a path in UTF-8")?;
    let mut daemon = serve(&sandbox)?;
    answer(
        &sandbox,
        &["service", "apply", "shop", "--package", package, "--wait"],
    )?;
    let shown = answer(&sandbox, &["instance", "show", "Role_IN_0"])?;
    ensure!(shown["instance"]["generation"] == 1, "{shown}");

    // Only the role.
    mark(&daemon)?;
    let recycled = change(&sandbox, "recycle")?;
    ensure!(recycled["instance"]["generation"] == 1, "{recycled}");
    ensure!(
        recycled["instance"]["status"]["applied"] == recycled["accepted"]["incarnation"],
        "{recycled}"
    );
    ensure!(left(&daemon)? == ("memory os local".into(), 2));

    // From inside the guest: every disk.
    let _ = daemon.exec(&["sh", "-c", "echo b > /proc/sysrq-trigger"]);
    daemon.event("guest-starting", |event| event["generation"] == 2)?;
    daemon.ready()?;
    ensure!(left(&daemon)? == ("os local".into(), 3));

    // By the operator: every disk, and it is no failure.
    mark(&daemon)?;
    let restarted = change(&sandbox, "restart")?;
    ensure!(restarted["instance"]["generation"] == 3, "{restarted}");
    ensure!(left(&daemon)? == ("os local".into(), 4));

    mark(&daemon)?;
    change(&sandbox, "reimage")?;
    ensure!(left(&daemon)? == ("local".into(), 5));

    // A daemon that is killed in between: the next one goes on.
    mark(&daemon)?;
    let begun = answer(&sandbox, &["instance", "rebuild", "Role_IN_0", "--yes"])?;
    ensure!(begun["accepted"]["generation"] == 5, "{begun}");
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait()?;
    let mut daemon = serve(&sandbox)?;
    let started = daemon.event("guest-starting", |event| event["generation"] == 5)?;
    daemon.ready()?;
    ensure!(left(&daemon)? == (String::new(), 1));

    // A power cycle of the node: the OS disk is new.
    mark(&daemon)?;
    let record = daemon.instance_dir()?.join("instance.json");
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait()?;
    let vmm = started["pid"].as_i64().context("a process id")?;
    kill(Pid::from_raw(i32::try_from(vmm)?), Signal::SIGKILL)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let recorded = fs::read_to_string(&record)?;
    ensure!(recorded.contains(boot.trim_end()), "{recorded}");
    fs::write(&record, recorded.replace(boot.trim_end(), "another boot"))?;
    let mut daemon = serve(&sandbox)?;
    daemon.ready()?;
    ensure!(left(&daemon)? == ("local".into(), 2));

    answer(&sandbox, &["service", "delete", "shop", "--yes", "--wait"])?;
    daemon.stop()?;
    sandbox.assert_nothing_left()
}
