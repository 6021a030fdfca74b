//! A guest that falls silent is restarted on its disks.

use anyhow::{Result, ensure};
use e2e::Place;
use e2e::run::{INSTANCE, Run};
use e2e::service::Service;

#[test]
fn a_frozen_guest_is_restarted_at_the_limit_as_the_next_generation_with_its_data() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &["--heartbeat-limit", "20"])?;
    run.ready()?;
    let data = run.shell("for d in /mnt/resource/Resources/directory/*; do echo $d; done")?;
    run.shell(&format!("echo kept > {}/mark && sync", data.trim()))?;
    run.shell("echo kept > /root-mark && sync")?;
    let frozen = place.output(&["freeze", INSTANCE])?;
    ensure!(frozen.status.success(), "{}", e2e::text(&frozen));
    let verdict = run.event("verdict", |event| event["verdict"]["kind"] == "silent")?;
    let silence = verdict["verdict"]["silence_ms"].as_u64().unwrap_or(0);
    ensure!((20_000..21_000).contains(&silence), "{verdict}");
    // The end is our doing, and told as that.
    let ended = run.event("guest-exited", |_| true)?;
    let because = ended["because"].as_str().unwrap_or_default();
    ensure!(
        ended["reason"] == "killed" && because.starts_with("no heartbeat for 20."),
        "{ended}"
    );
    run.event("restarting", |event| event["generation"] == 2)?;
    run.ready()?;
    ensure!(run.shell(&format!("cat {}/mark /root-mark", data.trim()))? == "kept\nkept\n");
    run.stop()?;
    place.assert_nothing_left()
}
