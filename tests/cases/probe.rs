//! `test` on a directory and on the package made of it, with HTTP probes; and
//! what it says when a probe fails.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::web::Web;
use e2e::{Place, text};
use serde_json::Value;

/// The report in both forms, which must agree.
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

/// The steps of the report without their times.
fn steps(report: &Value) -> Vec<String> {
    report["instances"][0]["stages"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|step| format!("{} {}", step["name"], step["result"]))
        .collect()
}

/// What the role found when it started: its files, their modes, its variables.
fn found(artifacts: &Path, report: &Value) -> Result<String> {
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
fn a_package_is_the_same_service_as_its_directory_and_a_wrong_status_is_reported() -> Result<()> {
    let place = Place::new()?;
    let service = Web::new(1, 0)?.write(&place.file("service"))?;
    let path = |name: &str| place.file(name).to_string_lossy().into_owned();
    let directory = service.to_string_lossy();
    let report = |name: &str| {
        [
            format!("json={}", path(&format!("{name}.json"))),
            format!("junit={}", path(&format!("{name}.xml"))),
        ]
    };

    let [json, junit] = report("directory");
    let output = place.output(&[
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
    let of_directory = reports(&place.file("directory.json"), &place.file("directory.xml"))?;
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
    let packed = place.output(&["pack", &directory, "-o", &package, "--json"])?;
    ensure!(packed.status.success(), "{}", text(&packed));
    let valid = place.output(&["validate", &package])?;
    ensure!(valid.status.success(), "{}", text(&valid));
    let config = place.file("elsewhere.cscfg");
    std::fs::copy(service.join("ServiceConfiguration.cscfg"), &config)?;
    std::fs::remove_dir_all(&service)?;

    // The package serves the same; the last probe wants what does not come.
    let [json, junit] = report("package");
    let output = place
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
    let said = text(&output);
    ensure!(output.status.code() == Some(9), "{said}");
    let of_package = reports(&place.file("package.json"), &place.file("package.xml"))?;
    ensure!(
        steps(&of_package) == steps(&of_directory),
        "{of_package}\n{of_directory}"
    );
    ensure!(
        found(&place.file("of-package"), &of_package)?
            == found(&place.file("of-directory"), &of_directory)?
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

    // Which step, why, the last lines, where the rest is, what to type next.
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
        ensure!(said.contains(wanted), "`{wanted}` is not in: {said}");
    }
    place.assert_nothing_left()
}
