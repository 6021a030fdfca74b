//! Bytes through the tunnels of a published endpoint.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use e2e::run::{Run, eventually};
use e2e::service::Service;
use e2e::{Sandbox, limit};
use sha2::{Digest, Sha256};

const MIB: usize = 1 << 20;
/// Short, so that missing heartbeats lead to a verdict while this test runs.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(30);

fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(limit(30)))?;
    stream.set_write_timeout(Some(limit(30)))?;
    Ok(stream)
}

/// Sends `size` pseudo-random bytes and reads them back; the hashes of both.
fn echo(port: u16, seed: u64, size: usize) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut reader = connect(port)?;
    let mut writer = reader.try_clone()?;
    let sender = thread::spawn(move || -> Result<Vec<u8>> {
        let mut hash = Sha256::new();
        let mut state = seed;
        let mut block = vec![0; 64 * 1024];
        let mut left = size;
        while left > 0 {
            for byte in &mut block {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            let part = &block[..left.min(block.len())];
            writer.write_all(part)?;
            hash.update(part);
            left -= part.len();
        }
        writer.shutdown(Shutdown::Write)?;
        Ok(hash.finalize().to_vec())
    });
    let mut hash = Sha256::new();
    let mut block = vec![0; 64 * 1024];
    loop {
        let count = reader.read(&mut block)?;
        if count == 0 {
            break;
        }
        hash.update(&block[..count]);
    }
    let sent = sender.join().map_err(|_| anyhow!("sender panicked"))??;
    Ok((sent, hash.finalize().to_vec()))
}

#[test]
fn tunnels_carry_bulk_and_crowds_beside_a_stalled_reader() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (service, port) = Service::echo()?;
    let service = service.write(&sandbox.file("service"))?;
    let seconds = HEARTBEAT_LIMIT.as_secs().to_string();
    let mut run = Run::start(&sandbox, &service, &["--heartbeat-limit", &seconds])?;
    run.ready()?;
    eventually("the echo server listens", || {
        Ok(matches!(echo(port, 1, 1), Ok((sent, back)) if sent == back))
    })?;

    let (sent, back) = echo(port, 2, 64 * MIB)?;
    ensure!(sent == back, "64 MiB came back changed");

    // A reader that never reads blocks only its own connection.
    let mut stalled = connect(port)?;
    stalled.set_nonblocking(true)?;
    let block = vec![0; 64 * 1024];
    while stalled.write(&block).is_ok() {}
    let began = Instant::now();

    let mut open = Vec::new();
    for _ in 0..200 {
        open.push(connect(port)?);
    }
    for (number, stream) in open.iter_mut().enumerate() {
        stream.write_all(format!("{number:08}").as_bytes())?;
    }
    for (number, stream) in open.iter_mut().enumerate() {
        let mut back = [0; 8];
        stream.read_exact(&mut back)?;
        ensure!(
            back == format!("{number:08}").as_bytes(),
            "connection {number}"
        );
    }
    drop(open);
    let (sent, back) = echo(port, 3, MIB)?;
    ensure!(sent == back, "after the 200 connections");
    // Long enough for a verdict if the stalled connection delayed the heartbeats, which
    // the host requests every five seconds.
    while began.elapsed() < HEARTBEAT_LIMIT + limit(5) {
        let (sent, back) = echo(port, 4, 64)?;
        ensure!(sent == back, "beside the stalled reader");
        thread::sleep(Duration::from_millis(200));
    }
    // The device resets the connection of the stalled reader when the guest ends.
    let seen = run.stop()?;
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    drop(stalled);
    ensure!(
        !seen.contains("\"verdict\""),
        "heartbeats were missing:\n{seen}"
    );
    sandbox.assert_nothing_left()
}
