//! A service of two roles and several instances, as a user sees it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use e2e::run::{Run, eventually};
use e2e::web::WebService;
use e2e::{Sandbox, text};
use serde_json::Value;

const ALL: [&str; 3] = ["Web_IN_0", "Web_IN_1", "Worker_IN_0"];

/// The environment variables that the role printed to its log.
fn variables(sandbox: &Sandbox, instance: &str) -> Result<BTreeMap<String, String>> {
    let logs = sandbox.output(&["logs", instance])?;
    ensure!(logs.status.success(), "{}", text(&logs));
    Ok(String::from_utf8_lossy(&logs.stdout)
        .lines()
        .filter_map(|line| {
            // A log line has a time, a stream and a text.
            let (name, value) = line.split_once('=')?;
            let name = name.rsplit([' ', '\t']).next()?;
            Some((name.to_owned(), value.to_owned()))
        })
        .collect())
}

#[test]
fn instances_of_two_roles_are_balanced_and_stop_on_ctrl_c() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let web = WebService::new(2, 1)?;
    let service = web.write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &["--keep"])?;
    run.all_ready(&ALL)?;
    eventually("both web servers listen", || {
        Ok(web
            .answering_instance()
            .is_ok_and(|name| name.starts_with("Web_IN_"))
            && web
                .answering_instance()
                .is_ok_and(|name| name.starts_with("Web_IN_")))
    })?;

    // `ps` and `exec` find each instance by its name.
    let ps = sandbox.output(&["ps", "--json"])?;
    let ps: Value = serde_json::from_slice(&ps.stdout)?;
    let deployment = &ps["deployments"][0];
    let id = deployment["deployment"].as_str().context("deployment")?;
    ensure!(id.len() == 32 && deployment["service"] == "Shop", "{ps}");
    let instances = deployment["instances"].as_array().context("instances")?;
    ensure!(
        instances.iter().map(|it| &it["name"]).eq(ALL.iter()),
        "{ps}"
    );
    for instance in instances {
        ensure!(
            instance["state"] == "Ready" && instance["generation"] == 1,
            "{ps}\n{}",
            run.seen().join("\n")
        );
        let published = instance["endpoints"].as_array().context("endpoints")?;
        if instance["name"] == "Worker_IN_0" {
            ensure!(published.is_empty(), "{ps}");
        } else {
            let address = format!("127.0.0.1:{}", web.port);
            ensure!(
                published.len() == 1 && published[0]["address"] == address,
                "{ps}"
            );
        }
    }
    let table = sandbox.output(&["ps"])?;
    ensure!(
        ALL.iter().all(|name| text(&table).contains(name)),
        "{}",
        text(&table)
    );
    for name in ALL {
        let long = format!("{}/{name}", &id[..8]);
        let output = sandbox.output(&["exec", &long, "--", "hostname"])?;
        let seen = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        ensure!(seen == name.replace('_', "-"), "{}", text(&output));
    }

    // Each role has its variables and settings.
    let role_variables = variables(&sandbox, "Web_IN_1")?;
    let resources = "/mnt/resource/Resources/";
    let cache = format!("{resources}directory/{id}.Web.Cache/");
    let temp = format!("{resources}temp/{id}.Web/RoleTemp");
    for (name, wanted) in [
        ("RoleRoot", "/mnt/e"),
        ("RdRoleRoot", "/mnt/e/"),
        ("RoleName", "Web"),
        ("RoleInstanceID", "Web_IN_1"),
        ("RoleDeploymentID", id),
        ("RdRoleId", &format!("{id}.Web_IN_1")),
        ("RdRoleLogRootPath", resources),
        ("RdRoleResourcesRootPath", resources),
        ("COMPUTERNAME", "Web-IN-1"),
        ("TEMP", &temp),
        ("TMP", &temp),
        ("Cache", &cache),
        ("CACHE", &cache),
        ("CACHE_SIZE", "8"),
        ("LITERAL", "a < b & \"c\""),
        ("SETTING", "übermäßig & günstig"),
        ("WWW_ADDRESS", "127.0.0.1"),
        ("WWW_PORT", "8080"),
        ("WWW_PROTOCOL", "tcp"),
        ("ID", "Web_IN_1"),
        ("ROLE", "Web"),
        ("UPDATE_DOMAIN", "1"),
        ("FAULT_DOMAIN", "1"),
        ("DEPLOYMENT", id),
        ("EMULATED", "false"),
    ] {
        let seen = role_variables.get(name).map(String::as_str);
        ensure!(seen == Some(wanted), "{name}: {seen:?}, not {wanted}");
    }
    let worker = variables(&sandbox, "Worker_IN_0")?;
    ensure!(worker.get("RoleName").map(String::as_str) == Some("Worker"));
    ensure!(
        !worker.contains_key("SETTING") && !worker.contains_key("CACHE"),
        "{worker:?}"
    );

    // Connections go in turn to the Ready instances, and to no other.
    let mut answers = BTreeMap::new();
    for _ in 0..8 {
        *answers.entry(web.answering_instance()?).or_insert(0) += 1;
    }
    ensure!(
        answers == BTreeMap::from([("Web_IN_0".into(), 4), ("Web_IN_1".into(), 4)]),
        "{answers:?}"
    );
    let _ = sandbox.output(&[
        "exec",
        "Web_IN_0",
        "--",
        "sh",
        "-c",
        "echo o >/proc/sysrq-trigger",
    ])?;
    run.event("guest-exited", |event| event["instance"] == "Web_IN_0")?;
    for _ in 0..4 {
        ensure!(web.answering_instance()? == "Web_IN_1");
    }
    run.event("role", |event| {
        event["instance"] == "Web_IN_0" && event["state"] == "ready"
    })?;
    eventually("the new guest takes its turn", || {
        Ok(web
            .answering_instance()
            .is_ok_and(|name| name == "Web_IN_0"))
    })?;

    // After one Ctrl-C every role stops, every guest powers off, and files are kept.
    let directory = run.instance_dir()?;
    let directory = directory.parent().context("deployment's directory")?;
    let seen = run.stop()?;
    for name in ALL {
        let log = std::fs::read_to_string(directory.join(name).join("role.log"))?;
        ensure!(log.contains("asked to stop"), "{name}: {log}");
        let events: Vec<Value> = seen
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|event: &Value| event["instance"] == name)
            .collect();
        let last = |kind: &str| events.iter().rev().find(|event| event["event"] == kind);
        ensure!(
            last("stopped").is_some_and(|event| event["clean"] == true),
            "{name} was not stopped cleanly:\n{}",
            seen
        );
        ensure!(
            last("guest-exited").is_some_and(|event| event["reason"] == "power-off"),
            "{name}: {events:?}"
        );
        for file in ["diff.qcow2", "resource.raw", "app.squashfs", "serial.log"] {
            ensure!(directory.join(name).join(file).exists(), "{name}/{file}");
        }
        // `logs` also finds the log of a kept deployment.
        let logs = sandbox.output(&["logs", name])?;
        ensure!(
            String::from_utf8_lossy(&logs.stdout) == log,
            "{}",
            text(&logs)
        );
    }
    std::fs::remove_dir_all(directory)?;
    sandbox.assert_nothing_left()
}
