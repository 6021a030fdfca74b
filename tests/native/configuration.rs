//! The configuration of the program, as an operator writes it and sees it.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::run::Run;
use e2e::service::Service;
use e2e::{Sandbox, text};
use serde_json::Value;

#[test]
fn each_value_is_printed_with_the_place_that_sets_it() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let user = sandbox.file(".config/host-agent");
    fs::create_dir_all(&user)?;
    fs::write(
        user.join("config.toml"),
        "[quotas]\nservices = 3\ninstances = 9\n",
    )?;
    let named = sandbox.file("named.toml");
    fs::write(&named, "# later\n[quotas]\nservices = 5\n")?;
    let output = sandbox
        .command()
        .args(["config", "--json"])
        .env("HOST_AGENT_CONFIG", &named)
        .env_remove("XDG_CONFIG_HOME")
        .output()?;
    ensure!(output.status.success(), "{}", text(&output));
    let printed: Value = serde_json::from_slice(&output.stdout)?;
    let found = |key: &str| -> Result<(Value, String)> {
        let mut values = printed["values"].as_array().context("values")?.iter();
        let found = values.find(|it| it["key"] == key).context("a key")?;
        let origin = found["origin"].as_str().context("an origin")?;
        Ok((found["value"].clone(), origin.to_owned()))
    };
    let (value, origin) = found("quotas.services")?;
    ensure!(value == 5 && origin.ends_with("named.toml:3"), "{origin}");
    let (value, origin) = found("quotas.instances")?;
    ensure!(
        value == 9 && origin.ends_with(".config/host-agent/config.toml:3"),
        "{origin}"
    );
    ensure!(found("directories.data")?.1 == "HOST_AGENT_DATA_DIR");
    ensure!(found("admission.overcommit")?.1 == "default");
    Ok(())
}

#[test]
fn a_bad_file_refuses_every_verb_with_its_line() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let path = sandbox.file("config.toml");
    fs::write(&path, "[quotas]\nservces = 3\n")?;
    for verb in [&["serve"][..], &["ps"], &["config"], &["service", "list"]] {
        let output = sandbox
            .command()
            .args(verb)
            .env("HOST_AGENT_CONFIG", &path)
            .output()?;
        let printed = text(&output);
        ensure!(output.status.code() == Some(3), "{verb:?}: {printed}");
        for wanted in ["HA-0520", "config.toml:2:1", "did you mean \"services\"?"] {
            ensure!(printed.contains(wanted), "{verb:?}: {printed}");
        }
    }
    let version = sandbox
        .command()
        .arg("version")
        .env("HOST_AGENT_CONFIG", &path)
        .output()?;
    ensure!(version.status.success());
    Ok(())
}

/// A daemon that cannot run guests plans services too.
#[test]
fn the_daemon_plans_by_the_sizes_ports_and_quotas_of_its_file() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (service, port) = Service::echo()?;
    let service = service.write(&sandbox.file("service"))?;
    let path = sandbox.file("config.toml");
    let sizes = ["ExtraSmall", "Small"]
        .map(|name| format!("[sizes.{name}]\nvcpus = 2\nmemory_mib = 300\nresource_mib = 9000\n"));
    let text_of = |quota: u32| {
        let sizes = sizes.concat();
        format!("{sizes}[ports]\n{port} = 45678\n[quotas]\nmemory_mib = {quota}\n")
    };
    fs::write(&path, text_of(400))?;
    let mut command = sandbox.command();
    command
        .args(["serve", "--format", "jsonl", "--config"])
        .arg(&path);
    let mut daemon = Run::from_command(&sandbox, command)?;
    daemon.line_with("serving ")?;
    let plan = || {
        let package = service.to_string_lossy();
        sandbox.output(&[
            "service",
            "apply",
            "a",
            "--package",
            &package,
            "--dry-run",
            "--json",
        ])
    };
    let planned = plan()?;
    let printed = text(&planned);
    ensure!(planned.status.success(), "{printed}");
    for wanted in ["\"port\": 45678", "\"vcpus\": 2", "\"memory_mib\": 300"] {
        ensure!(printed.contains(wanted), "{wanted}: {printed}");
    }
    daemon.stop()?;
    fs::write(&path, text_of(200))?;
    let mut command = sandbox.command();
    command
        .args(["serve", "--format", "jsonl", "--config"])
        .arg(&path);
    let mut daemon = Run::from_command(&sandbox, command)?;
    daemon.line_with("serving ")?;
    let refused = plan()?;
    let printed = text(&refused);
    ensure!(refused.status.code() == Some(6), "{printed}");
    ensure!(
        printed.contains("HA-0204") && printed.contains("of the 200"),
        "{printed}"
    );
    daemon.stop()?;
    Ok(())
}
