//! Section `tunnel`: bytes through a published endpoint, by way of the host's
//! listener, the VMM, the guest agent and the role's own socket.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use e2e::Place;
use e2e::run::{Run, eventually};
use e2e::service::Service;
use serde_json::json;

use crate::measure::{Found, percentile};
use crate::{Findings, Setting};

const MIB: usize = 1 << 20;
/// Bytes per throughput sample.
const AMOUNT: usize = 64 * MIB;
/// Bytes per round trip.
const MESSAGE: usize = 64;

/// Measures.
pub fn measure(setting: &Setting, findings: &mut Findings) -> Result<()> {
    let place = Place::new()?;
    let mut service = Service::echo()?;
    service.image.clone_from(&setting.image_name);
    let port = service.port.context("the echo service has a port")?;
    let service = service.write(&place.file("service"))?;
    // A server that is no bottleneck, in place of the script.
    let entry = service.join("Role/entry");
    std::fs::copy(&setting.guest_program, &entry)
        .with_context(|| format!("copy {}", setting.guest_program.display()))?;
    std::fs::set_permissions(&entry, std::fs::Permissions::from_mode(0o755))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    eventually("the role answers", || {
        let answer = connect(port, b'e').and_then(|mut stream| round_trip(&mut stream));
        Ok(answer.is_ok())
    })?;
    let (mut inward, mut outward) = (vec![], vec![]);
    for round in 0..=setting.pick(5, 2) {
        let (to, from) = (send(port)?, receive(port)?);
        if round > 0 {
            inward.push(to);
            outward.push(from);
        }
        setting.progress(&format!(
            "tunnel: round {round}, {to:.1} and {from:.1} MiB/s"
        ));
    }
    let mut stream = connect(port, b'e')?;
    let mut trips = vec![];
    for round in 0..setting.pick(2000, 500) + 50 {
        let time = round_trip(&mut stream)?;
        if round >= 50 {
            trips.push(time);
        }
    }
    run.stop()?;
    let amount = json!({ "bytes_per_sample": AMOUNT });
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

/// A connection in one mode of `tests/bench/guest.rs`.
fn connect(port: u16, mode: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    let limit = Some(e2e::limit(30));
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    stream.set_nodelay(true)?;
    stream.write_all(&[mode])?;
    Ok(stream)
}

/// MiB per second into the guest, counted when its program has them all.
fn send(port: u16) -> Result<f64> {
    let block = vec![0xa5; MIB];
    let mut stream = connect(port, b's')?;
    let started = Instant::now();
    for _ in 0..AMOUNT / MIB {
        stream.write_all(&block)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut came = [0; 8];
    stream.read_exact(&mut came)?;
    let seconds = started.elapsed().as_secs_f64();
    let came = u64::from_le_bytes(came);
    ensure!(came == AMOUNT as u64, "{came} of {AMOUNT} bytes came");
    Ok((AMOUNT / MIB) as f64 / seconds)
}

/// MiB per second out of the guest.
fn receive(port: u16) -> Result<f64> {
    let mut block = vec![0; MIB];
    let mut stream = connect(port, b'z')?;
    // What the guest had ready before the clock started is not counted.
    stream.read_exact(&mut block)?;
    let started = Instant::now();
    for _ in 0..AMOUNT / MIB {
        stream.read_exact(&mut block)?;
    }
    Ok((AMOUNT / MIB) as f64 / started.elapsed().as_secs_f64())
}

/// Microseconds until a small message is back.
fn round_trip(stream: &mut TcpStream) -> Result<f64> {
    let mut message = [0x5a; MESSAGE];
    let started = Instant::now();
    stream.write_all(&message)?;
    stream.read_exact(&mut message)?;
    Ok(started.elapsed().as_secs_f64() * 1e6)
}
