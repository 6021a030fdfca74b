//! A hostile guest: PID 1 on a stock kernel without virtio drivers. It drives the
//! virtio devices itself, with valid and invalid requests, prints the results on
//! the console and powers off.
//!
//! Its environment comes from the kernel command line: `window=ADDRESS` (16 MiB of
//! RAM that `memmap=` reserves), `registers=ADDRESS`, `seed=N`, `rounds=N`, and
//! `fill=1` to write every sector of the disks at the end.

mod device;
/// The source and not the library, whose debug information would fill the guest's RAM.
#[path = "../src/random.rs"]
mod generator;
mod physical;
mod random;

use std::time::Duration;

use device::{Device, INDIRECT, NEXT, WRITE, register, wait};
use generator::Random;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use physical::Physical;

const WINDOW: u64 = 16 << 20;
/// Most devices; each has a page of registers.
const DEVICES: u64 = 16;
/// An address beyond RAM.
const FAR: u64 = 1 << 40;
/// Longest time for a device to answer, even on an emulated machine.
const LIMIT: Duration = Duration::from_secs(20);

fn main() {
    if let Err(error) = run() {
        println!("evil: failed: {error}");
    }
    let error = reboot(RebootMode::RB_POWER_OFF);
    println!("evil: still here: {error:?}");
}

fn run() -> std::io::Result<()> {
    std::fs::create_dir_all("/dev")?;
    let no_data = None::<&str>;
    mount(no_data, "/dev", Some("devtmpfs"), MsFlags::empty(), no_data)?;
    let window = Physical::map(number("window"), WINDOW, false)?;
    let start = number("registers");
    let registers = Physical::map(start, DEVICES << 12, true)?;
    let mut devices: Vec<_> = (0..DEVICES)
        .filter_map(|n| Device::find(&registers, &window, start + (n << 12)))
        .collect();
    println!(
        "evil: devices {:?}",
        devices.iter().map(|d| d.kind).collect::<Vec<_>>()
    );
    for device in &mut devices {
        violate(device);
    }
    honest(&mut devices, &window);
    let rounds = number("rounds");
    let mut random = Random::new(number("seed"));
    for _ in 0..rounds {
        let chosen = random.below(devices.len() as u64) as usize;
        random::round(&mut devices[chosen], &window, &mut random);
    }
    println!("evil: {rounds} random rounds over");
    honest(&mut devices, &window);
    if std::env::var_os("fill").is_some() {
        for device in devices.iter_mut().filter(|device| device.kind == 2) {
            fill(device, &window);
        }
    }
    Ok(())
}

/// A number from the environment, hexadecimal with the prefix `0x`.
fn number(name: &str) -> u64 {
    let text = std::env::var(name).unwrap_or_default();
    let parsed = text
        .strip_prefix("0x")
        .map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    parsed.unwrap_or_else(|_| panic!("{name}={text} is not a number"))
}

/// Offers a chain of three buffers at `address`.
fn offer_at(device: &Device<'_>, queue: u32, address: u64) {
    for index in 0..3 {
        let flags = if index < 2 { NEXT } else { WRITE };
        device.describe(queue, index, address, 64, flags, index + 1);
    }
    device.offer(queue, 0, 0, 1);
}

/// Commits each violation, which must set `DEVICE_NEEDS_RESET`; a reset must then
/// recover the device.
fn violate(device: &mut Device<'_>) {
    let queue = device.busy_queue();
    type Violation = fn(&Device<'_>, u32, u16);
    let violations: [(&str, Violation); 7] = [
        ("a chain that is a loop", |d, q, _| {
            d.describe(q, 0, d.buffer(0), 16, NEXT, 0);
            d.offer(q, 0, 0, 1);
        }),
        ("a head beyond the queue", |d, q, size| {
            d.offer(q, 0, size, 1);
        }),
        ("a next beyond the queue", |d, q, size| {
            d.describe(q, 0, d.buffer(0), 16, NEXT, size);
            d.offer(q, 0, 0, 1);
        }),
        ("an index that jumps", |d, q, size| {
            d.offer(q, 0, 0, size + 1);
        }),
        ("a buffer beyond RAM", |d, q, _| offer_at(d, q, FAR)),
        ("a buffer that wraps around", |d, q, _| {
            offer_at(d, q, u64::MAX - 8);
        }),
        ("an indirect table not negotiated", |d, q, _| {
            d.describe(q, 0, d.buffer(0), 64, INDIRECT, 0);
            d.offer(q, 0, 0, 1);
        }),
    ];
    let mut answered = 0;
    let mut check = |device: &Device<'_>, name: &str| {
        if device.broke(LIMIT) && device.reset() {
            answered += 1;
        } else {
            println!("evil: device {}: {name}: no answer", device.kind);
        }
    };
    for (name, commit) in violations {
        device.start(|at| at);
        let size = device.queues[queue as usize];
        commit(device, queue, size);
        check(device, name);
    }
    device.start(|_| FAR);
    check(device, "rings beyond RAM");
    println!(
        "evil: device {}: {answered} of 8 violations answered",
        device.kind
    );
}

/// Sends a valid request to each device, which must answer it.
fn honest(devices: &mut [Device<'_>], window: &Physical) {
    for device in devices {
        device.start(|at| at);
        let queue = device.busy_queue();
        let data = device.buffer(1);
        window.write(data, 0_u64);
        match device.kind {
            // Reads sector 0 (virtio 1.2, 5.2.6).
            2 => {
                let request = device.buffer(0);
                window.write(request, 0_u64);
                window.write(request + 8, 0_u64);
                device.describe(queue, 0, request, 16, NEXT, 1);
                device.describe(queue, 1, data, 512, NEXT | WRITE, 2);
                device.describe(queue, 2, device.buffer(2), 1, WRITE, 0);
            }
            // Entropy (virtio 1.2, 5.4.6).
            4 => device.describe(queue, 0, data, 8, WRITE, 0),
            // A reset of an unknown connection (virtio 1.2, 5.10.6): from this
            // guest (3) to the host (2), type stream, operation 3.
            _ => {
                let packet = device.buffer(0);
                let words: [u64; 6] = [3, 2, 0, 1 << 32 | 3 << 48, 0, 0];
                for (word, at) in words.iter().zip((packet..).step_by(8)) {
                    window.write(at, *word);
                }
                device.describe(queue, 0, packet, 44, 0, 0);
                window.write(data, u64::MAX);
            }
        }
        device.offer(queue, 0, 0, 1);
        let done = wait(LIMIT, || device.used(queue) == 1);
        let text = if device.kind == 2 {
            String::from_utf8_lossy(&window.read::<u64>(data).to_le_bytes()).into_owned()
        } else {
            String::new()
        };
        let word = if done { "answered" } else { "ignored" };
        println!("evil: device {}: honest request {word} {text}", device.kind);
    }
}

/// Writes its number to every sector of a block device. In each cluster of the diff
/// disk it first writes the first sector, then the last, then all of them.
fn fill(device: &mut Device<'_>, window: &Physical) {
    /// Sectors per cluster.
    const CLUSTER: u64 = 128;
    device.start(|at| at);
    let high = u64::from(device.get(register::CAPACITY + 4));
    let sectors = high << 32 | u64::from(device.get(register::CAPACITY));
    let size = device.queues[0];
    let (request, status, data) = (device.buffer(0), device.buffer(1), device.buffer(2));
    let mut requests = 0_u16;
    let mut write = |first: u64, count: u64| {
        for sector in first..first + count {
            let at = data + (sector - first) * 512;
            (at..at + 512)
                .step_by(8)
                .for_each(|word| window.write(word, sector));
        }
        // VIRTIO_BLK_T_OUT (virtio 1.2, 5.2.6).
        window.write(request, 1_u64);
        window.write(request + 8, first);
        window.write(status, 0xff_u8);
        device.describe(0, 0, request, 16, NEXT, 1);
        device.describe(0, 1, data, 512 * count as u32, NEXT, 2);
        device.describe(0, 2, status, 1, WRITE, 0);
        let position = requests % size;
        requests = requests.wrapping_add(1);
        device.offer(0, position, 0, requests);
        wait(LIMIT, || device.used(0) == requests) && window.read::<u8>(status) == 0
    };
    let mut written = 0;
    for first in (0..sectors).step_by(CLUSTER as usize) {
        let count = CLUSTER.min(sectors - first);
        if write(first, 1) && write(first + count - 1, 1) && write(first, count) {
            written += count;
        }
    }
    println!("evil: device 2: {written} of {sectors} sectors written");
}
