//! Each kind of bad input gives one clear error and leaves nothing behind.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use e2e::service::Service;
use e2e::{Place, text};

const ROLE: &str = "#!/bin/sh\nexec sleep 100000\n";

/// Runs `test` on a changed service and expects this code and these words.
fn refused(
    change: impl Fn(&std::path::Path) -> Result<()>,
    code: i32,
    words: &[&str],
) -> Result<()> {
    let place = Place::new()?;
    let service = Service::script(ROLE).write(&place.file("service"))?;
    change(&service)?;
    let output = place.output(&["test", &service.to_string_lossy()])?;
    let text = text(&output);
    ensure!(output.status.code() == Some(code), "want {code}: {text}");
    for word in words.iter().chain([&"\n  hint "]) {
        ensure!(text.contains(word), "`{word}` is not in: {text}");
    }
    place.assert_nothing_left()
}

fn edit(service: &std::path::Path, file: &str, from: &str, to: &str) -> Result<()> {
    let path = service.join(file);
    let text = fs::read_to_string(&path)?;
    ensure!(text.contains(from), "{from}");
    Ok(fs::write(path, text.replace(from, to))?)
}

#[test]
fn a_malformed_or_foreign_document_names_file_and_line() -> Result<()> {
    let definition = "ServiceDefinition.csdef";
    refused(
        |dir| edit(dir, definition, "</WorkerRole>", ""),
        3,
        &["ServiceDefinition.csdef:15:", "error["],
    )?;
    refused(
        |dir| {
            edit(
                dir,
                definition,
                "2008/10/ServiceDefinition",
                "2011/ServiceDefinition",
            )
        },
        3,
        &["ServiceDefinition.csdef:2:", "namespace"],
    )?;
    refused(
        |dir| edit(dir, definition, "<Runtime", "<Wibble/><Runtime"),
        3,
        &["ServiceDefinition.csdef:4:", "Wibble"],
    )?;
    refused(
        |dir| {
            edit(
                dir,
                definition,
                r#"<Setting name="Greeting" />"#,
                r#"<Setting name="Greeting" /><Setting name="Greeting" />"#,
            )
        },
        3,
        &["ServiceDefinition.csdef:11:", "Greeting"],
    )
}

#[test]
fn an_entry_point_that_is_missing_or_not_executable_names_the_path() -> Result<()> {
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
fn an_image_that_does_not_exist_or_was_changed_is_refused_by_name() -> Result<()> {
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
        &["ServiceConfiguration.cscfg:2:", "nosuch", "images/build"],
    )?;
    let place = Place::new()?;
    fs::remove_file(place.data().join("images"))?;
    let copy = place.data().join("images/minimal");
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
    let service = Service::script(ROLE).write(&place.file("service"))?;
    let output = place.output(&["test", &service.to_string_lossy()])?;
    let text = text(&output);
    ensure!(output.status.code() == Some(3), "{text}");
    ensure!(
        text.contains("initrd") && text.contains("SHA-256") && text.contains("\n  hint "),
        "{text}"
    );
    ensure!(text.contains("ServiceConfiguration.cscfg:2:"), "{text}");
    Ok(())
}

#[test]
fn a_port_in_use_is_a_conflict_that_names_endpoint_and_address() -> Result<()> {
    let place = Place::new()?;
    let service = Service::echo()?;
    let port = service.port.context("the echo service has a port")?;
    let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let service = service.write(&place.file("service"))?;
    let output = place.output(&["test", &service.to_string_lossy()])?;
    let text = text(&output);
    ensure!(output.status.code() == Some(5), "{text}");
    ensure!(
        text.contains("Echo") && text.contains(&port.to_string()) && text.contains("\n  hint "),
        "{text}"
    );
    ensure!(text.contains("ServiceDefinition.csdef:13:"), "{text}");
    place.assert_nothing_left()
}
