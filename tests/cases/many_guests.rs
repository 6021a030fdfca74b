//! How long a host agent needs to adopt many guests, of a few instructions each.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::bare::{BareGuest, elf};
use e2e::run::Run;
use e2e::service::Service;
use e2e::{Sandbox, limit, program};
use host_agent::digest::Digest;
use host_agent::progress::Progress;
use host_agent::service;
use host_agent::store::deployment::{DeploymentDir, Retention};
use host_agent::store::services::{ServiceStore, Wanted};
use host_agent::supervisor::instance::record::InstanceRecord;
use host_agent::supervisor::lifecycle::RestartHistory;
use host_agent::supervisor::plan::{Placement, plan};
use host_agent::supervisor::spec::{ImageRef, InstanceSpec};
use host_agent::vmm::control::Event;
use host_agent::vmm::wire;
use nix::sys::signal::Signal;

const GUESTS: usize = 32;
const DEPLOYMENT: &str = "0123456789abcdef0123456789abcdef";
/// Waits for an interrupt that never comes.
const IDLE: &[u8] = &[
    0xfa, // cli
    0xf4, // hlt
    0xeb, 0xfd, // jmp (hlt)
];

/// VMM processes, killed on drop.
struct Guests(Vec<Child>);

impl Drop for Guests {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Writes an image of small files, which no guest of this test boots.
fn write_image(dir: &Path) -> Result<ImageRef> {
    fs::create_dir_all(dir)?;
    let mut files = BTreeMap::new();
    for name in [
        "kernel",
        "initrd",
        "base.ext4",
        "resource.ext4",
        "guest-agent",
    ] {
        let content = name.repeat(1 << 16);
        fs::write(dir.join(name), &content)?;
        let sha256 = Digest::of(content.as_bytes())?.0.hex();
        files.insert(name, BTreeMap::from([("sha256", sha256)]));
    }
    let manifest = serde_json::json!({
        "schema": "host-agent.image/1",
        "name": "minimal",
        "files": files,
    });
    let manifest = manifest.to_string();
    fs::write(dir.join("manifest.json"), &manifest)?;
    Ok(ImageRef {
        name: "minimal".into(),
        manifest: Digest::of(manifest.as_bytes())?.0,
    })
}

/// The specs of the instances.
fn specs(sandbox: &Sandbox, image: &ImageRef) -> Result<Vec<InstanceSpec>> {
    let service = Service::idle().write(&sandbox.file("service"))?;
    let model = service::load(&service, None, &Progress::default())?;
    let application = Digest::of(&b"application"[..])?.0;
    let placement = Placement {
        deployment: DEPLOYMENT,
        incarnation: 1,
        image,
        applications: &BTreeMap::from([("Role".to_owned(), application)]),
        address: Ipv4Addr::LOCALHOST.into(),
        stop_timeout: Duration::ZERO,
    };
    let specs = plan(&model, &placement);
    let first = specs.first().context("the role has an instance")?;
    let numbered = (0..GUESTS).map(|number| {
        let mut spec = first.clone();
        spec.goal.instance = format!("Role_IN_{number}");
        spec
    });
    Ok(numbered.collect())
}

/// Starts the guests of a host agent that is gone when this returns.
fn start(sandbox: &Sandbox, specs: Vec<InstanceSpec>) -> Result<Guests> {
    let deployment = DeploymentDir::create(&sandbox.data(), DEPLOYMENT, "a host agent")?;
    let (kernel, initrd) = (sandbox.file("kernel"), sandbox.file("initrd"));
    fs::write(&kernel, elf(IDLE))?;
    fs::write(&initrd, "")?;
    let guest = BareGuest {
        kernel,
        initrd,
        command_line: String::new(),
        vcpus: 1,
        memory_mib: 64,
        disks: vec![],
    };
    let mut guests = Guests(Vec::new());
    let mut controls = Vec::new();
    for spec in specs {
        let dir = deployment.instance(spec.name())?;
        let prepared = guest.prepare(&dir)?.named(spec.name());
        let (child, control) = prepared.spawn_in(&program(), &dir)?;
        guests.0.push(child);
        controls.push(control);
        let record = InstanceRecord {
            spec,
            history: RestartHistory {
                generation: 1,
                running: true,
                ..RestartHistory::default()
            },
            process: None,
        };
        record.write(&dir)?;
    }
    for control in &controls {
        let (running, _) = wire::recv::<Event>(control.as_fd())?.context("an event")?;
        ensure!(matches!(running, Event::Running { .. }), "{running:?}");
    }
    deployment.retain(Retention::Durable)?;
    Ok(guests)
}

#[test]
fn a_host_agent_adopts_32_guests_within_two_seconds() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let images = sandbox.data().join("images");
    fs::remove_file(&images)?;
    let image = write_image(&images.join("minimal"))?;
    let mut guests = start(&sandbox, specs(&sandbox, &image)?)?;

    let mut store = ServiceStore::open(&sandbox.data())?;
    let wanted = Wanted {
        package: image.manifest,
        configuration: String::new(),
        publish: vec![],
    };
    store.apply("many", &wanted, 0)?;
    store.deploying("many", DEPLOYMENT)?;
    drop(store);

    let mut command = sandbox.command();
    command.args(["serve", "--format", "jsonl"]);
    let began = Instant::now();
    let mut adopted = Run::from_command(&sandbox, command)?;
    let mut pids = Vec::new();
    for _ in 0..GUESTS {
        let event = adopted.event("guest-adopted", |event| event["generation"] == 1)?;
        pids.push(event["pid"].as_u64().context("a process id")?);
    }
    let took = began.elapsed();
    println!("{GUESTS} guests adopted in {took:?}");
    ensure!(took < limit(2), "{took:?}");

    // The same processes, and none was restarted.
    pids.sort_unstable();
    let mut expected: Vec<u64> = guests.0.iter().map(|child| child.id().into()).collect();
    expected.sort_unstable();
    ensure!(pids == expected, "{pids:?} and not {expected:?}");
    adopted.signal(Signal::SIGKILL)?;
    let (_, seen) = adopted.wait()?;
    ensure!(!seen.contains("guest-starting"), "{seen}");
    for child in &mut guests.0 {
        ensure!(child.try_wait()?.is_none(), "a guest ended");
    }
    Ok(())
}
