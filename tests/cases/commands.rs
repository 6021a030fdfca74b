//! The verbs of an operator on a running guest: wait, cp, init.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use anyhow::{Context, Result, ensure};
use e2e::run::{INSTANCE, Run};
use e2e::service::{Service, free_port};
use e2e::{Sandbox, text};
use serde_json::Value;

/// Runs a verb with `--json`; its exit code, and its answer or error.
fn json(sandbox: &Sandbox, arguments: &[&str]) -> Result<(i32, Value)> {
    let mut all = arguments.to_vec();
    all.push("--json");
    let output = sandbox.output(&all)?;
    let code = output.status.code().context("an exit code")?;
    let json = if code == 0 {
        output.stdout
    } else {
        let errors = String::from_utf8_lossy(&output.stderr);
        errors.lines().last().unwrap_or_default().into()
    };
    let json = serde_json::from_slice(&json);
    Ok((
        code,
        json.with_context(|| format!("{arguments:?}: {code}"))?,
    ))
}

fn in_guest(path: &str) -> String {
    format!("{INSTANCE}:{path}")
}

#[test]
fn files_are_copied_into_a_guest_and_back() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    // While it boots: wait is how a script knows when cp works.
    run.event("guest-starting", |_| true)?;
    let (code, waited) = json(&sandbox, &["wait", INSTANCE, "--for", "agent"])?;
    ensure!(
        code == 0 && waited["schema"] == "host-agent.wait/1",
        "{waited}"
    );
    let (code, waited) = json(&sandbox, &["wait", "Test", "--for", "applied"])?;
    ensure!(code == 0, "{waited}");
    run.ready()?;
    let (code, waited) = json(&sandbox, &["wait", INSTANCE])?;
    ensure!(
        code == 0 && waited["instances"][0]["state"] == "Ready",
        "{waited}"
    );
    let (code, late) = json(
        &sandbox,
        &["wait", INSTANCE, "--for", "gone", "--timeout", "1"],
    )?;
    ensure!(code == 7 && late["code"] == "HA-0302", "{late}");

    // A tree goes in and comes back the same.
    let tree = sandbox.file("tree");
    fs::create_dir_all(tree.join("a/b"))?;
    fs::write(tree.join("a/program"), "#!/bin/sh\necho from $0\n")?;
    fs::set_permissions(tree.join("a/program"), fs::Permissions::from_mode(0o750))?;
    let large: Vec<u8> = (0..3_000_000_u32).map(|n| ((n * 7) >> 3) as u8).collect();
    fs::write(tree.join("a/b/large"), &large)?;
    symlink("/etc/passwd", tree.join("link"))?;
    let here = tree.to_string_lossy().into_owned();
    let copy = |from: &str, to: &str| json(&sandbox, &["cp", from, to]);
    let (code, copied) = copy(&here, &in_guest("/srv/new"))?;
    ensure!(code == 0 && copied["files"] == 6, "{copied}");
    let ran = run.shell("/srv/new/a/program; stat -c '%u %a' /srv/new/a/program")?;
    ensure!(ran == "from /srv/new/a/program\n0 750\n", "{ran}");
    // Into a directory that exists, under its own name.
    let (code, copied) = copy(&here, &in_guest("/srv"))?;
    ensure!(code == 0, "{copied}");
    let linked = run.shell("readlink /srv/tree/link")?;
    ensure!(linked == "/etc/passwd\n", "{linked}");
    let back = sandbox.file("back");
    let shown = back.to_string_lossy().into_owned();
    let (code, copied) = copy(&in_guest("/srv/tree"), &shown)?;
    ensure!(code == 0 && copied["bytes"] == large.len() + 23, "{copied}");
    ensure!(fs::read(back.join("a/b/large"))? == large);
    ensure!(fs::read_link(back.join("link"))?.to_str() == Some("/etc/passwd"));
    // What is in a directory, and a file under another name.
    let (code, copied) = copy(&in_guest("/srv/tree/a/."), &format!("{shown}2"))?;
    ensure!(code == 0, "{copied}");
    ensure!(sandbox.file("back2").join("b/large").exists());
    let (code, copied) = copy(&in_guest("/etc/hostname"), &format!("{shown}2/name"))?;
    ensure!(code == 0, "{copied}");
    let name = fs::read_to_string(sandbox.file("back2").join("name"))?;
    ensure!(name == run.shell("cat /etc/hostname")?);

    // Errors.
    for (from, to, exit) in [
        (in_guest("/no/such"), shown.clone(), 4),
        (here.clone(), in_guest("/no/such/place/"), 4),
        (here.clone(), in_guest("/no/such/place"), 4),
        ("/no/such".to_owned(), in_guest("/srv"), 4),
        (in_guest("/srv"), "/no/such/place".to_owned(), 4),
        (here.clone(), in_guest("/proc/x"), 4),
    ] {
        let (code, error) = copy(&from, &to)?;
        ensure!(
            code == exit && error["code"] == "HA-0530",
            "{from} {to}: {code} {error}"
        );
    }
    let (code, error) = copy(&here, &shown)?;
    ensure!(code == 2, "{error}");
    let (code, error) = copy("Nobody_IN_0:/etc", &shown)?;
    ensure!(code == 4 && error["code"] == "HA-0501", "{error}");

    run.stop()?;
    let (code, gone) = json(&sandbox, &["wait", INSTANCE, "--for", "gone"])?;
    ensure!(code == 0, "{gone}");
    let missing = sandbox.output(&["wait", INSTANCE])?;
    ensure!(missing.status.code() == Some(4), "{}", text(&missing));
    Ok(())
}

#[test]
fn a_wait_ends_when_the_role_fails() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script("#!/bin/sh\nexit 3\n").write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.event("guest-starting", |_| true)?;
    let (code, error) = json(&sandbox, &["wait", "Test", "--timeout", "300"])?;
    ensure!(code == 9 && error["code"] == "HA-0401", "{error}");
    ensure!(
        error["causes"].to_string().contains("exited with code 3"),
        "{error}"
    );
    run.stop()?;
    Ok(())
}

#[test]
fn the_templates_of_init_run_as_they_are() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let port = format!("{}:Http", free_port()?);
    for (template, probe) in [("worker", None), ("web", Some("http://Http/health=200"))] {
        let dir = sandbox.file(template);
        let dir = dir.to_string_lossy();
        let (code, written) = json(&sandbox, &["init", &dir, "--template", template])?;
        ensure!(code == 0, "{written}");
        let mut arguments = vec!["test", &*dir];
        if let Some(probe) = probe {
            arguments.extend(["-p", &port, "--probe", probe]);
        }
        let tested = sandbox.output(&arguments)?;
        ensure!(tested.status.success(), "{}", text(&tested));
    }
    Ok(())
}
