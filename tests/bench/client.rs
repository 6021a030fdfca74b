//! Client of `tests/bench/guest.rs`.

use std::io::{Read, Write};
use std::time::Instant;

use anyhow::Result;

const MIB: usize = 1 << 20;
/// Bytes per throughput sample.
pub const AMOUNT: usize = 64 * MIB;
/// Bytes per round trip.
const MESSAGE: usize = 64;
/// Round trips that are not counted, before those that are.
const WARM_UP: usize = 50;

/// MiB per second into the guest, until its program has read all bytes.
pub fn send(mut stream: impl Read + Write) -> Result<f64> {
    let block = vec![0xa5; MIB];
    stream.write_all(b"s")?;
    let started = Instant::now();
    stream.write_all(&(AMOUNT as u64).to_le_bytes())?;
    for _ in 0..AMOUNT / MIB {
        stream.write_all(&block)?;
    }
    stream.read_exact(&mut [0])?;
    Ok((AMOUNT / MIB) as f64 / started.elapsed().as_secs_f64())
}

/// MiB per second out of the guest.
pub fn receive(mut stream: impl Read + Write) -> Result<f64> {
    let mut block = vec![0; MIB];
    stream.write_all(b"z")?;
    // The clock starts after the first block, which the guest may have sent before.
    stream.read_exact(&mut block)?;
    let started = Instant::now();
    for _ in 0..AMOUNT / MIB {
        stream.read_exact(&mut block)?;
    }
    Ok((AMOUNT / MIB) as f64 / started.elapsed().as_secs_f64())
}

/// Microseconds until a small message comes back, `count` times.
pub fn round_trips(mut stream: impl Read + Write, count: usize) -> Result<Vec<f64>> {
    stream.write_all(b"e")?;
    let mut trips = vec![];
    for number in 0..count + WARM_UP {
        let mut message = [0x5a; MESSAGE];
        let started = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        if number >= WARM_UP {
            trips.push(started.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(trips)
}

/// The output of a shell line in the guest.
pub fn shell(mut stream: impl Read + Write, line: &str) -> Result<String> {
    stream.write_all(b"x")?;
    stream.write_all(&(line.len() as u64).to_le_bytes())?;
    stream.write_all(line.as_bytes())?;
    let mut output = vec![];
    stream.read_to_end(&mut output)?;
    Ok(String::from_utf8_lossy(&output).into_owned())
}
