//! A machine whose `/dev/kvm` is missing, closed to the user or no KVM says
//! so, says what mends it, and is skipped only where that was asked for.

use std::process::Output;

use anyhow::{Context, Result, ensure};
use e2e::mounts::Mounts;
use e2e::service::Service;
use e2e::{Place, text};
use serde_json::Value;

const ROLE: &str = "#!/bin/sh\nexec sleep 100000\n";

/// What is expected of a machine.
struct Case {
    /// Shell lines that make its `/dev/kvm`.
    kvm: &'static str,
    /// In `doctor --json`.
    verdict: &'static str,
    /// Of the error.
    code: &'static str,
    /// Exit code of `doctor`, `run` and `test`.
    exit: i32,
    /// Part of the mending command.
    hints: &'static [&'static str],
}

fn parsed(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).with_context(|| text(output))
}

fn check(case: &Case) -> Result<()> {
    let place = Place::new()?;
    let machine = Mounts::devices(&place, case.kvm)?;
    let service = Service::script(ROLE).write(&place.file("service"))?;
    let service = service.to_string_lossy();
    let before = e2e::files(&place.data())?;
    let run = |arguments: &[&str]| -> Result<Output> {
        let output = machine.command(&place, false).args(arguments).output()?;
        ensure!(
            !text(&output).contains("panicked"),
            "{arguments:?}: {}",
            text(&output)
        );
        Ok(output)
    };
    let mends = |hint: Option<&str>| {
        let hint = hint.unwrap_or_default();
        case.hints.iter().any(|wanted| hint.contains(wanted))
    };

    let doctor = run(&["doctor", "--json"])?;
    ensure!(doctor.status.code() == Some(case.exit), "{}", text(&doctor));
    let report = parsed(&doctor)?;
    ensure!(report["verdict"] == case.verdict, "{report}");
    let failed: Vec<_> = report["checks"]
        .as_array()
        .context("checks")?
        .iter()
        .filter(|check| check["level"] == "fail")
        .collect();
    ensure!(
        failed.len() == 1 && mends(failed[0]["hint"].as_str()),
        "{report}"
    );

    for verb in ["test", "run"] {
        let output = run(&[verb, &service])?;
        let said = text(&output);
        ensure!(output.status.code() == Some(case.exit), "{said}");
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(error.contains(&format!("error[{}]", case.code)), "{said}");
        ensure!(error.contains("/dev/kvm"), "{said}");
        let hint = error.lines().find_map(|line| line.strip_prefix("  hint "));
        ensure!(mends(hint), "{said}");
    }

    let (json, junit) = (place.file("out/report.json"), place.file("out/report.xml"));
    let reports = [
        format!("json={}", json.display()),
        format!("junit={}", junit.display()),
    ];
    let skipped = run(&[
        "test",
        &service,
        "--on-no-kvm",
        "skip",
        "--report",
        &reports[0],
        "--report",
        &reports[1],
    ])?;
    ensure!(skipped.status.code() == Some(77), "{}", text(&skipped));
    let report: Value = serde_json::from_slice(&std::fs::read(json)?)?;
    ensure!(
        report["result"] == "skip" && report["exit_code"] == 77,
        "{report}"
    );
    ensure!(report["error"]["code"] == case.code, "{report}");
    let junit = std::fs::read_to_string(junit)?;
    let document = roxmltree::Document::parse(&junit)?;
    let count = |name| {
        document
            .descendants()
            .filter(|n| n.has_tag_name(name))
            .count()
    };
    ensure!(
        (count("testcase"), count("skipped"), count("failure")) == (1, 1, 0),
        "{junit}"
    );

    // By the environment too, but never against a broken service.
    let by_environment = machine
        .command(&place, false)
        .env("HOST_AGENT_ON_NO_KVM", "skip")
        .args(["test", &service, "--json"])
        .output()?;
    ensure!(
        by_environment.status.code() == Some(77),
        "{}",
        text(&by_environment)
    );
    ensure!(parsed(&by_environment)?["result"] == "skip");
    std::fs::remove_file(place.file("service/Role/entry"))?;
    let broken = run(&["test", &service, "--on-no-kvm", "skip"])?;
    ensure!(broken.status.code() == Some(3), "{}", text(&broken));
    ensure!(
        e2e::files(&place.data())? == before,
        "the data directory changed"
    );
    place.assert_nothing_left()
}

#[test]
fn without_a_device_the_error_says_how_to_get_one() -> Result<()> {
    check(&Case {
        kvm: "",
        verdict: "no-device",
        code: "HA-0201",
        exit: 6,
        hints: &["modprobe", "--device /dev/kvm", "firmware"],
    })
}

#[test]
fn without_permission_the_error_says_how_to_give_it() -> Result<()> {
    check(&Case {
        kvm: ": >kvm; chmod 000 kvm",
        verdict: "no-permission",
        code: "HA-0202",
        exit: 11,
        hints: &["udevadm", "--device /dev/kvm"],
    })
}

#[test]
fn a_device_that_is_no_kvm_is_told_apart() -> Result<()> {
    check(&Case {
        kvm: ": >kvm; mount --bind /dev/null kvm",
        verdict: "cannot-run-kernel",
        code: "HA-0203",
        exit: 6,
        hints: &["hardware virtualization"],
    })
}
