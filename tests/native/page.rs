//! The status page in a real browser, on a machine that need not run guests: its services are
//! in the store, and the guests of their instances have no kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use e2e::run::{Run, eventually};
use e2e::service::Service;
use e2e::{Sandbox, limit, text};
use host_agent::digest::Digest;
use host_agent::store::packages::PackageStore;
use host_agent::store::services::{ServiceStore, Wanted};
use serde_json::{Value, json};

/// A name that no API takes, as HTML.
const HOSTILE: &str = "<script>alert(1)</script>&\"'/%2F";

/// An image whose files have the digests of its manifest, and no kernel.
fn write_image(data: &Path) -> Result<()> {
    fs::remove_file(data.join("images"))?;
    let image = data.join("images/minimal");
    fs::create_dir_all(&image)?;
    let mut files = serde_json::Map::new();
    let names = [
        "kernel",
        "initrd",
        "base.ext4",
        "resource.ext4",
        "guest-agent",
    ];
    for name in names {
        let content = name.repeat(1 << 16);
        fs::write(image.join(name), &content)?;
        let (digest, _) = Digest::of(content.as_bytes())?;
        files.insert(name.into(), json!({"sha256": digest.hex(), "version": "1"}));
    }
    let manifest = json!({"schema": "host-agent.image/1", "name": "minimal", "files": files});
    Ok(fs::write(
        image.join("manifest.json"),
        manifest.to_string(),
    )?)
}

/// Puts `service` into the store under each of `names`. A daemon that cannot run guests takes
/// no new service, but keeps what it has.
fn store(sandbox: &Sandbox, service: &Service, names: &[&str]) -> Result<()> {
    let directory = service.write(&sandbox.file("service"))?;
    let file = sandbox.file("shop.cspkg");
    let packed = sandbox
        .command()
        .arg("pack")
        .arg(&directory)
        .arg("-o")
        .arg(&file)
        .output()?;
    ensure!(packed.status.success(), "{}", text(&packed));
    let bytes = fs::read(&file)?;
    let (package, _) = Digest::of(&bytes[..])?;
    let mut partial = PackageStore::new(&sandbox.data()).begin()?;
    partial.write(&bytes)?;
    partial.finish(&package)?;
    let mut store = ServiceStore::open(&sandbox.data())?;
    for name in names {
        let wanted = Wanted {
            package,
            configuration: fs::read_to_string(directory.join("ServiceConfiguration.cscfg"))?,
            publish: Vec::new(),
        };
        store.apply(name, &wanted, 7)?;
    }
    Ok(())
}

fn in_path(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").context("PATH")?;
    let mut found = std::env::split_paths(&path).map(|directory| directory.join(program));
    let found = found.find(|path| path.exists());
    found.with_context(|| format!("there is no {program}: run scripts/setup"))
}

#[test]
fn a_browser_sees_services_follows_them_and_acts() -> Result<()> {
    let modules = std::env::var_os("HOST_AGENT_TEST_BROWSER_MODULES");
    let modules =
        modules.context("HOST_AGENT_TEST_BROWSER_MODULES is not set: run scripts/test")?;
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    write_image(&sandbox.data())?;
    store(&sandbox, &Service::idle(), &["shop", "old", HOSTILE])?;
    let mut command = sandbox.command();
    command.args(["serve", "--page", "127.0.0.1:0", "--format", "jsonl"]);
    let mut daemon = Run::from_command(&sandbox, command)?;
    let line = daemon.line_with("page http://")?;
    let (_, url) = line.split_once("page ").context("an address")?;
    // The daemon says which instance belongs to the service.
    let shop = || -> Result<Value> {
        let shown = sandbox.output(&["service", "show", "shop", "--json"])?;
        let shown: Value = serde_json::from_slice(&shown.stdout)?;
        Ok(shown["service"].clone())
    };
    eventually("an instance of the service", || {
        Ok(shop()?["deployment"]["instances"][0]["name"].is_string())
    })?;
    let shop = shop()?;
    let deployment = &shop["deployment"];
    let (id, instance) = (
        &deployment["deployment"],
        &deployment["instances"][0]["name"],
    );
    let (id, instance) = (
        id.as_str().context("id")?,
        instance.as_str().context("name")?,
    );
    let log = sandbox.data().join("deployments").join(id).join(instance);
    let settings = json!({
        "url": url,
        "browser": in_path("chromium")?,
        "program": e2e::program(),
        "limit_ms": u64::try_from(limit(5).as_millis())?,
        "service": "shop",
        "old": "old",
        "hostile": HOSTILE,
        "instance": instance,
        "log": log.join("role.log"),
        "pictures": std::env::var("HOST_AGENT_TEST_PICTURES").ok(),
    });
    let file = sandbox.file("settings.json");
    fs::write(&file, settings.to_string())?;
    let mut driver = Command::new("node");
    sandbox.set_environment(&mut driver);
    let driven = driver
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("page/drive.cjs"))
        .arg(&file)
        .env("NODE_PATH", modules)
        .output()
        .context("node drives the browser")?;
    let printed = text(&driven);
    ensure!(
        driven.status.success(),
        "{printed}\n{}",
        daemon.seen().join("\n")
    );
    ensure!(printed.contains("first paint: "), "{printed}");
    println!("{printed}");
    let listed = text(&sandbox.output(&["service", "list"])?);
    ensure!(!listed.contains("shop"), "{listed}");
    daemon.stop()?;
    Ok(())
}
