//! Section `tunnel`: bytes through a published endpoint: the host's listener, the VMM,
//! the guest agent and the role's socket.

use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context as _, Result};
use e2e::Sandbox;
use e2e::run::{Run, eventually};
use e2e::service::Service;
use serde_json::json;

use crate::measure::{Found, percentile};
use crate::{Findings, Setting, client};

/// Measures.
pub fn measure(setting: &Setting, findings: &mut Findings) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (mut service, port) = Service::echo()?;
    service.image.clone_from(&setting.image_name);
    let service = service.write(&sandbox.file("service"))?;
    // The Perl script would be the bottleneck.
    let entry = service.join("Role/entry");
    std::fs::copy(&setting.guest_program, &entry)
        .with_context(|| format!("copy {}", setting.guest_program.display()))?;
    std::fs::set_permissions(&entry, std::fs::Permissions::from_mode(0o755))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    eventually("the role answers", || {
        let answer = connect(port).and_then(|stream| client::round_trips(stream, 1));
        Ok(answer.is_ok())
    })?;
    let (mut inward, mut outward) = (vec![], vec![]);
    for round in 0..=setting.pick(5, 2) {
        let (to, from) = (
            client::send(connect(port)?)?,
            client::receive(connect(port)?)?,
        );
        if round > 0 {
            inward.push(to);
            outward.push(from);
        }
        setting.progress(&format!(
            "tunnel: round {round}, {to:.1} and {from:.1} MiB/s"
        ));
    }
    let count = usize::try_from(setting.pick(2000, 500))?;
    let trips = client::round_trips(connect(port)?, count)?;
    run.stop()?;
    let amount = json!({ "bytes_per_sample": client::AMOUNT });
    findings.add("tunnel-in", Ok(Found::samples(inward).with(amount.clone())));
    findings.add("tunnel-out", Ok(Found::samples(outward).with(amount)));
    let worst = Found {
        samples: vec![],
        value: percentile(&trips, 99.0),
        details: json!({ "trips": trips.len() }),
    };
    findings.add("tunnel-rtt-p99", Ok(worst));
    findings.add("tunnel-rtt", Ok(Found::samples(trips)));
    Ok(())
}

fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    let limit = Some(e2e::limit(30));
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
