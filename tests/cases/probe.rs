//! `test` with HTTP probes, on a directory and on the package made from it, and its
//! report of a failed probe.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::web::WebService;
use e2e::{Sandbox, text};
use serde_json::Value;

/// The JSON report. Fails unless the JUnit report agrees with it.
fn reports(json: &Path, junit: &Path) -> Result<Value> {
    let report: Value = serde_json::from_slice(&std::fs::read(json)?)?;
    let xml = std::fs::read_to_string(junit)?;
    let document = roxmltree::Document::parse(&xml)?;
    let mut steps = Vec::new();
    for instance in report["instances"].as_array().context("instances")? {
        steps.extend(instance["stages"].as_array().context("stages")?);
    }
    steps.extend(report["probes"].as_array().context("probes")?);
    steps.extend(report.get("stop").filter(|stop| !stop.is_null()));
    let cases: Vec<_> = document
        .descendants()
        .filter(|node| node.has_tag_name("testcase"))
        .collect();
    ensure!(cases.len() == steps.len(), "{xml}\n{report}");
    for (case, step) in cases.iter().zip(&steps) {
        ensure!(case.attribute("name") == step["name"].as_str(), "{xml}");
        let result = case
            .children()
            .find_map(|child| match child.tag_name().name() {
                "failure" => Some("fail"),
                "skipped" => Some("skip"),
                _ => None,
            });
        ensure!(step["result"] == result.unwrap_or("ok"), "{step}\n{xml}");
    }
    let suite = document
        .descendants()
        .find(|node| node.has_tag_name("testsuite"))
        .context("testsuite")?;
    for (attribute, result) in [("failures", "fail"), ("skipped", "skip")] {
        let count = steps.iter().filter(|step| step["result"] == result).count();
        ensure!(
            suite.attribute(attribute) == Some(&count.to_string()),
            "{xml}"
        );
    }
    ensure!(
        suite.attribute("tests") == Some(&steps.len().to_string()),
        "{xml}"
    );
    Ok(report)
}

/// The boot stages of the report without their times.
fn steps(report: &Value) -> Vec<String> {
    report["instances"][0]["stages"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|step| format!("{} {}", step["name"], step["result"]))
        .collect()
}

/// The digests and variables that the role printed when it started.
fn role_printed(artifacts: &Path, report: &Value) -> Result<String> {
    let log = artifacts.join("Web_IN_0/role.log");
    ensure!(
        report["instances"][0]["logs"]
            .as_array()
            .is_some_and(|logs| logs.iter().any(|path| path.as_str() == log.to_str())),
        "{report}"
    );
    let log = std::fs::read_to_string(log)?;
    let wanted: Vec<_> = log
        .lines()
        .filter_map(|line| {
            ["files: ", "modes: ", "SETTING=", "LITERAL="]
                .iter()
                .find_map(|mark| line.find(mark))
                .map(|at| &line[at..])
        })
        .collect();
    ensure!(wanted.len() == 4, "{log}");
    Ok(wanted.join("\n"))
}

#[test]
fn a_package_tests_like_its_directory_and_reports_a_bad_probe() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = WebService::new(1, 0)?.write(&sandbox.file("service"))?;
    let path = |name: &str| sandbox.file(name).to_string_lossy().into_owned();
    let directory = service.to_string_lossy();
    let report = |name: &str| {
        [
            format!("json={}", path(&format!("{name}.json"))),
            format!("junit={}", path(&format!("{name}.xml"))),
        ]
    };

    let [json, junit] = report("directory");
    let output = sandbox.output(&[
        "test",
        &directory,
        "--probe",
        "tcp://Www",
        "--probe",
        "http://Www/",
        "--probe",
        "http://Www/index.html=200",
        "--probe",
        "http://Www/missing=404",
        "--report",
        &json,
        "--report",
        &junit,
        "--artifacts",
        &path("of-directory"),
    ])?;
    ensure!(output.status.code() == Some(0), "{}", text(&output));
    let of_directory = reports(
        &sandbox.file("directory.json"),
        &sandbox.file("directory.xml"),
    )?;
    ensure!(
        of_directory["result"] == "ok" && of_directory["exit_code"] == 0,
        "{of_directory}"
    );
    let probes = of_directory["probes"].as_array().context("probes")?;
    ensure!(
        probes.len() == 4 && probes[3]["detail"] == "GET /missing 404",
        "{of_directory}"
    );

    let package = path("elsewhere.cspkg");
    let packed = sandbox.output(&["pack", &directory, "-o", &package, "--json"])?;
    ensure!(packed.status.success(), "{}", text(&packed));
    let valid = sandbox.output(&["validate", &package])?;
    ensure!(valid.status.success(), "{}", text(&valid));
    let config = sandbox.file("elsewhere.cscfg");
    std::fs::copy(service.join("ServiceConfiguration.cscfg"), &config)?;
    std::fs::remove_dir_all(&service)?;

    // The package serves the same files; the second probe expects a wrong status.
    let [json, junit] = report("package");
    let output = sandbox
        .command()
        .args([
            "test",
            &package,
            "--config",
            &config.to_string_lossy(),
            "--probe",
            "http://Www/",
            "--probe",
            "http://Www/missing=200",
            "--probe",
            "tcp://Www",
            "--timeout",
            &e2e::limit(3).as_secs().to_string(),
            "--report",
            &json,
            "--report",
            &junit,
            "--artifacts",
            &path("of-package"),
        ])
        .env("HOST_AGENT_TIMEOUT_SCALE", "1")
        .output()?;
    let printed = text(&output);
    ensure!(output.status.code() == Some(9), "{printed}");
    let of_package = reports(&sandbox.file("package.json"), &sandbox.file("package.xml"))?;
    ensure!(
        steps(&of_package) == steps(&of_directory),
        "{of_package}\n{of_directory}"
    );
    ensure!(
        role_printed(&sandbox.file("of-package"), &of_package)?
            == role_printed(&sandbox.file("of-directory"), &of_directory)?
    );
    let results: Vec<_> = of_package["probes"]
        .as_array()
        .context("probes")?
        .iter()
        .map(|probe| probe["result"].as_str().unwrap_or_default())
        .collect();
    ensure!(results == ["ok", "fail", "skip"], "{of_package}");
    ensure!(
        of_package["result"] == "fail"
            && of_package["exit_code"] == 9
            && of_package["error"]["code"] == "HA-0402"
            && of_package["stop"]["result"] == "ok",
        "{of_package}"
    );

    // The failed step, its cause, the last lines, the logs, and the next command.
    for wanted in [
        "error[HA-0402]: probe http://Www/missing=200 failed",
        "  cause  GET /missing returned 404, not 200",
        "  last   lines of the role's log of Web_IN_0",
        "files: ",
        "  last   lines of the serial console of Web_IN_0",
        &format!("  hint   host-agent run {package}"),
        &format!("  logs   {}", path("of-package")),
        "FAIL 1 of ",
    ] {
        ensure!(printed.contains(wanted), "`{wanted}` is not in: {printed}");
    }
    sandbox.assert_nothing_left()
}
