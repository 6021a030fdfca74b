//! `/dev/kvm` is missing, not accessible or not KVM: the error names the cause and the
//! remedy, and `test` is skipped only if the user asks for that.

use std::process::Output;

use anyhow::{Context, Result, ensure};
use e2e::mount_namespace::MountNamespace;
use e2e::service::Service;
use e2e::{Sandbox, text};
use serde_json::Value;

/// A `/dev/kvm` and the expected results.
struct Case {
    /// Shell lines that make `/dev/kvm`.
    kvm: &'static str,
    /// Verdict in `doctor --json`.
    verdict: &'static str,
    /// Code of the error.
    code: &'static str,
    /// Exit code of `doctor`, `run` and `test`.
    exit: i32,
    /// The hint contains at least one of these.
    hints: &'static [&'static str],
}

fn parsed(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).with_context(|| text(output))
}

fn check(case: &Case) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let namespace = MountNamespace::with_kvm(&sandbox, case.kvm)?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let service = service.to_string_lossy();
    let before = e2e::files(&sandbox.data())?;
    let run = |arguments: &[&str]| -> Result<Output> {
        let output = namespace
            .command(&sandbox, false)
            .args(arguments)
            .output()?;
        ensure!(
            !text(&output).contains("panicked"),
            "{arguments:?}: {}",
            text(&output)
        );
        Ok(output)
    };
    let is_wanted_hint = |hint: Option<&str>| {
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
        failed.len() == 1 && is_wanted_hint(failed[0]["hint"].as_str()),
        "{report}"
    );

    for verb in ["test", "run"] {
        let output = run(&[verb, &service])?;
        let printed = text(&output);
        ensure!(output.status.code() == Some(case.exit), "{printed}");
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            error.contains(&format!("error[{}]", case.code)),
            "{printed}"
        );
        ensure!(error.contains("/dev/kvm"), "{printed}");
        let hint = error.lines().find_map(|line| line.strip_prefix("  hint "));
        ensure!(is_wanted_hint(hint), "{printed}");
    }

    let (json, junit) = (
        sandbox.file("out/report.json"),
        sandbox.file("out/report.xml"),
    );
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

    // The environment variable has the same effect. An invalid service still fails.
    let by_environment = namespace
        .command(&sandbox, false)
        .env("HOST_AGENT_ON_NO_KVM", "skip")
        .args(["test", &service, "--json"])
        .output()?;
    ensure!(
        by_environment.status.code() == Some(77),
        "{}",
        text(&by_environment)
    );
    ensure!(parsed(&by_environment)?["result"] == "skip");
    std::fs::remove_file(sandbox.file("service/Role/entry"))?;
    let broken = run(&["test", &service, "--on-no-kvm", "skip"])?;
    ensure!(broken.status.code() == Some(3), "{}", text(&broken));
    ensure!(
        e2e::files(&sandbox.data())? == before,
        "the data directory changed"
    );
    sandbox.assert_nothing_left()
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
fn a_device_that_is_not_kvm_is_recognised() -> Result<()> {
    check(&Case {
        kvm: ": >kvm; mount --bind /dev/null kvm",
        verdict: "cannot-run-kernel",
        code: "HA-0203",
        exit: 6,
        hints: &["hardware virtualization"],
    })
}
