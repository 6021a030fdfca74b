//! A host without KVM: what stays of a deployment that cannot be created, and adoption of
//! deployments whose guests do not run.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;

use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use super::*;
use crate::digest::Digest;
use crate::store::deployment::Retention;
use crate::supervisor::guest;
use crate::supervisor::instance::record::InstanceRecord;
use crate::supervisor::timeline::Events;

const ID: &str = "0123456789abcdef0123456789abcdef";

struct TestHost {
    host: Host,
    events: Events,
    dir: TempDir,
}

fn host() -> TestHost {
    let dir = tempfile::tempdir().unwrap();
    guest::tests::image(dir.path());
    let host = empty(dir.path(), &dir.path().join("run"));
    let events = host.0.timeline.subscribe();
    TestHost { host, events, dir }
}

/// A host without a cgroup, a janitor and deployments.
pub(crate) fn empty(data_dir: &Path, runtime_dir: &Path) -> Host {
    Host(Arc::new(HostState {
        id: "f".repeat(32),
        options: HostOptions {
            data_dir: data_dir.to_owned(),
            runtime_dir: runtime_dir.to_owned(),
            socket: None,
            rule: HeartbeatRule::DEFAULT,
            admission: AdmissionLimits::default(),
            timeout_scale: 1.0,
            require_sandbox: false,
        },
        content: ContentStore::new(data_dir),
        timeline: Timeline::start(),
        group: None,
        images: Mutex::default(),
        deployments: Mutex::default(),
        capacity: Mutex::new(Capacity::of_machine(AdmissionLimits::default())),
        offers: watch::Sender::new(None),
        claimed: Mutex::default(),
        _janitor: Janitor::none(),
    }))
}

impl TestHost {
    /// Two instances, of roles `A` and `B`, whose application disk is in the content.
    fn deployment(&self, retention: Retention, hold: &HeldContent) -> NewDeployment {
        let image = guest::tests::image(self.dir.path());
        let spec = guest::tests::spec(&self.host.0.content, hold, &image);
        let specs = ["A", "B"].map(|role| {
            let mut spec = spec.clone();
            spec.goal.role.name = role.into();
            spec.goal.instance = format!("{role}_IN_0");
            spec.endpoints[0].address = free_address();
            spec
        });
        NewDeployment {
            id: ID.into(),
            service: "redis".into(),
            retention,
            specs: specs.into(),
        }
    }

    /// Waits until no file of a deployment is left.
    async fn emptied(&self) {
        let is_empty = || {
            names(&self.dir.path().join("deployments")).is_empty()
                && names(&self.dir.path().join("content")) == ["lock"]
        };
        until(is_empty).await;
    }
}

async fn until(condition: impl Fn() -> bool) {
    let reached = async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let limit = Duration::from_secs(20);
    timeout(limit, reached).await.expect("it becomes true");
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.collect()
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap()
}

fn listen(specs: &[InstanceSpec]) -> Result<Published, HostError> {
    Published::listen(specs.iter().map(|spec| (spec.role(), &spec.endpoints[..])))
}

#[tokio::test(flavor = "current_thread")]
async fn an_endpoint_in_use_closes_the_listeners_before_it() {
    let test = host();
    let hold = test.host.hold_content().await.unwrap();
    let new = test.deployment(Retention::Ephemeral, &hold);
    let [first, second] = [0, 1].map(|role| new.specs[role].endpoints[0].address);
    let _in_use = TcpListener::bind(second).unwrap();
    let Err(HostError::Listen { role, .. }) = listen(&new.specs) else {
        panic!("an address in use was published");
    };
    assert_eq!(role, "B");
    // The runtime drops the listener of an aborted task when it next runs the task.
    until(|| TcpListener::bind(first).is_ok()).await;
    drop(hold);
    test.emptied().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_deployment_without_all_disks_leaves_nothing() {
    for retention in [Retention::Ephemeral, Retention::Kept, Retention::Durable] {
        let mut test = host();
        let hold = test.host.hold_content().await.unwrap();
        let mut new = test.deployment(retention, &hold);
        new.specs[1].application = Digest::of(&b"missing"[..]).unwrap().0;
        let address = new.specs[0].endpoints[0].address;
        let published = listen(&new.specs).unwrap();
        let error = test.host.create(new, published, &hold).await.unwrap_err();
        assert!(matches!(&error, HostError::Guest { instance, .. } if instance == "B_IN_0"));
        assert!(names(&test.dir.path().join("deployments")).is_empty());
        TcpListener::bind(address).unwrap();
        assert!(test.host.deployments().is_empty());
        drop(hold);
        test.emptied().await;
        drop(test.host);
        // The bus closes, so no actor has a clone of it.
        while let Some(event) = test.events.next().await {
            let prepared = matches!(
                event.kind,
                EventKind::ImageVerified { .. } | EventKind::DisksReady { .. }
            );
            assert!(prepared, "{event:?}");
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_creation_that_is_cancelled_leaves_nothing() {
    let mut test = host();
    let hold = test.host.hold_content().await.unwrap();
    let new = test.deployment(Retention::Durable, &hold);
    let published = listen(&new.specs).unwrap();
    tokio::select! {
        biased;
        () = async {
            while let Some(event) = test.events.next().await {
                if matches!(event.kind, EventKind::DisksReady { .. }) {
                    break;
                }
            }
        } => {}
        _ = test.host.create(new, published, &hold) => panic!("it was not cancelled"),
    }
    drop(hold);
    test.emptied().await;
    assert!(test.host.deployments().is_empty());
}

#[tokio::test(flavor = "current_thread")]
async fn an_instance_that_cannot_be_adopted_keeps_its_files() {
    let mut test = host();
    let hold = test.host.hold_content().await.unwrap();
    let new = test.deployment(Retention::Durable, &hold);
    let record = |spec: &InstanceSpec| InstanceRecord {
        spec: spec.clone(),
        history: crate::supervisor::lifecycle::RestartHistory::default(),
        process: None,
    };
    let dir = DeploymentDir::create(test.dir.path(), ID, "another host").unwrap();
    let [first, second] = ["A_IN_0", "B_IN_0"].map(|name| dir.instance(name).unwrap());
    record(&new.specs[0]).write(&first).unwrap();
    fs::write(second.join("instance.json"), "{}").unwrap();
    dir.retain(Retention::Durable).unwrap();
    // As if another host agent had them.
    assert!(test.host.adopt(|_| true).await.unwrap().is_empty());
    drop(dir);
    let adopted = test.host.adopt(|_| true).await.unwrap();
    let [deployment] = &adopted[..] else {
        panic!("{adopted:?}");
    };
    assert_eq!(deployment.instances().len(), 1);
    deployment.kill().await;
    test.host.remove(ID).await.unwrap();
    assert!(first.exists() && second.exists());
    let mut reported = false;
    drop(test.host);
    while let Some(event) = test.events.next().await {
        reported |= event.instance.as_deref() == Some("B_IN_0")
            && event.kind.to_string().starts_with("warning: not adopted");
    }
    assert!(reported);
}

#[tokio::test(flavor = "current_thread")]
async fn an_address_in_use_prevents_no_adoption() {
    let mut test = host();
    let hold = test.host.hold_content().await.unwrap();
    let new = test.deployment(Retention::Durable, &hold);
    let spec = &new.specs[0];
    let record = InstanceRecord {
        spec: spec.clone(),
        history: crate::supervisor::lifecycle::RestartHistory::default(),
        process: None,
    };
    let dir = DeploymentDir::create(test.dir.path(), ID, "another host").unwrap();
    record.write(&dir.instance("A_IN_0").unwrap()).unwrap();
    dir.retain(Retention::Durable).unwrap();
    drop(dir);
    let address = spec.endpoints[0].address;
    // As a VMM process that was not attached holds it.
    let in_use = TcpListener::bind(address).unwrap();
    let adopted = test.host.adopt(|_| true).await.unwrap();
    let [deployment] = &adopted[..] else {
        panic!("{adopted:?}");
    };
    while let Some(event) = test.events.next().await {
        if event.kind.to_string().contains("cannot listen on") {
            break;
        }
    }
    drop(in_use);
    until(|| std::net::TcpStream::connect(address).is_ok()).await;
    deployment.kill().await;
    test.host.remove(ID).await.unwrap();
    TcpListener::bind(address).unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_newer_goal_reaches_the_record_of_its_instance() {
    let test = host();
    let hold = test.host.hold_content().await.unwrap();
    let new = test.deployment(Retention::Durable, &hold);
    let mut spec = new.specs[0].clone();
    let published = listen(&new.specs).unwrap();
    let deployment = test.host.create(new, published, &hold).await.unwrap();
    spec.goal.incarnation = 7;
    test.host.apply(spec.clone()).await.unwrap();
    let dir = deployment.directory().join("A_IN_0");
    // The record has the goal that the channels send to the guest.
    until(|| InstanceRecord::read(&dir).unwrap().spec.goal.incarnation == 7).await;
    spec.goal.instance = "C_IN_0".into();
    let missing = test.host.apply(spec).await;
    assert!(matches!(missing, Err(HostError::NotFound { .. })));
    deployment.kill().await;
    test.host.remove(ID).await.unwrap();
    drop(hold);
    test.emptied().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_released_deployment_keeps_its_files_until_it_is_discarded() {
    let test = host();
    let hold = test.host.hold_content().await.unwrap();
    let new = test.deployment(Retention::Durable, &hold);
    let address = new.specs[0].endpoints[0].address;
    let published = listen(&new.specs).unwrap();
    let deployment = test.host.create(new, published, &hold).await.unwrap();
    deployment.kill().await;
    deployment.ended().await;
    test.host.release(ID).await;
    TcpListener::bind(address).unwrap();
    assert!(test.host.deployment(ID).is_none());
    assert!(!test.host.may_run(ID).await.unwrap());
    // It can be adopted, and released again.
    assert_eq!(test.host.adopt(|_| true).await.unwrap().len(), 1);
    assert!(matches!(
        test.host.discard(ID).await,
        Err(HostError::NotAdopted { .. })
    ));
    let deployment = test.host.deployment(ID).unwrap();
    deployment.kill().await;
    deployment.ended().await;
    test.host.release(ID).await;
    // A record that cannot be read says nothing of its guest.
    let record = deployment.directory().join("A_IN_0/instance.json");
    fs::write(record, "{}").unwrap();
    assert!(test.host.may_run(ID).await.unwrap());
    test.host.discard(ID).await.unwrap();
    drop(hold);
    test.emptied().await;
}
