//! Each kind of bad input is refused with one error and leaves nothing behind.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use e2e::service::Service;
use e2e::{Sandbox, text};

const DEFINITION: &str = "ServiceDefinition.csdef";

/// Runs `test` on a changed service and expects this exit code and these words.
fn refused(
    change: impl Fn(&std::path::Path) -> Result<()>,
    code: i32,
    words: &[&str],
) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    change(&service)?;
    let output = sandbox.output(&["test", &service.to_string_lossy()])?;
    let text = text(&output);
    ensure!(output.status.code() == Some(code), "want {code}: {text}");
    for word in words.iter().chain([&"\n  hint "]) {
        ensure!(text.contains(word), "`{word}` is not in: {text}");
    }
    sandbox.assert_nothing_left()
}

fn edit(service: &std::path::Path, file: &str, from: &str, to: &str) -> Result<()> {
    let path = service.join(file);
    let text = fs::read_to_string(&path)?;
    ensure!(text.contains(from), "{from}");
    Ok(fs::write(path, text.replace(from, to))?)
}

#[test]
fn a_document_error_names_file_and_line() -> Result<()> {
    let setting = r#"<Setting name="Greeting" />"#;
    for (from, to, words) in [
        (
            "</WorkerRole>",
            "",
            ["ServiceDefinition.csdef:15:", "error["],
        ),
        (
            "2008/10/ServiceDefinition",
            "2011/ServiceDefinition",
            ["ServiceDefinition.csdef:2:", "namespace"],
        ),
        (
            "<Runtime",
            "<Wibble/><Runtime",
            ["ServiceDefinition.csdef:4:", "Wibble"],
        ),
        (
            setting,
            &setting.repeat(2),
            ["ServiceDefinition.csdef:11:", "Greeting"],
        ),
    ] {
        refused(|dir| edit(dir, DEFINITION, from, to), 3, &words)?;
    }
    Ok(())
}

#[test]
fn a_missing_or_not_executable_entry_point_is_refused() -> Result<()> {
    refused(
        |dir| Ok(fs::remove_file(dir.join("Role/entry"))?),
        3,
        &["ServiceDefinition.csdef:9:", "entry"],
    )?;
    refused(
        |dir| {
            let mode = fs::Permissions::from_mode(0o644);
            Ok(fs::set_permissions(dir.join("Role/entry"), mode)?)
        },
        3,
        &["ServiceDefinition.csdef:9:", "entry", "chmod"],
    )
}

#[test]
fn a_missing_or_changed_image_is_refused_by_name() -> Result<()> {
    refused(
        |dir| {
            edit(
                dir,
                "ServiceConfiguration.cscfg",
                r#"osFamily="minimal""#,
                r#"osFamily="nosuch""#,
            )
        },
        4,
        &[
            "ServiceConfiguration.cscfg:2:",
            "images/build nosuch --out /",
        ],
    )?;
    let sandbox = Sandbox::new()?;
    fs::remove_file(sandbox.data().join("images"))?;
    let copy = sandbox.data().join("images/minimal");
    fs::create_dir_all(&copy)?;
    for name in [
        "manifest.json",
        "kernel",
        "initrd",
        "base.ext4",
        "guest-agent",
    ] {
        std::os::unix::fs::symlink(e2e::images().join("minimal").join(name), copy.join(name))?;
    }
    fs::remove_file(copy.join("initrd"))?;
    fs::write(copy.join("initrd"), b"not the initrd")?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let output = sandbox.output(&["test", &service.to_string_lossy()])?;
    let text = text(&output);
    ensure!(output.status.code() == Some(3), "{text}");
    ensure!(
        text.contains("initrd") && text.contains("SHA-256"),
        "{text}"
    );
    let place = sandbox.data().join("images");
    let hint = format!("images/build minimal --out {}", place.display());
    ensure!(text.contains(&hint), "{hint:?} is not in {text}");
    ensure!(text.contains("ServiceConfiguration.cscfg:2:"), "{text}");
    Ok(())
}

#[test]
fn a_port_in_use_is_reported_with_endpoint_and_address() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (service, port) = Service::echo()?;
    let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let service = service.write(&sandbox.file("service"))?;
    let output = sandbox.output(&["test", &service.to_string_lossy()])?;
    let text = text(&output);
    ensure!(output.status.code() == Some(5), "{text}");
    ensure!(
        text.contains("Echo") && text.contains(&port.to_string()) && text.contains("\n  hint "),
        "{text}"
    );
    ensure!(text.contains("ServiceDefinition.csdef:13:"), "{text}");
    sandbox.assert_nothing_left()
}
