//! Replays the corpora, and mutations of them, without a fuzzer.

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

use super::*;
use crate::property::Random;

/// Mutates inputs, reproducible by its seed.
struct Mutator(Random);

impl Mutator {
    fn below(&mut self, bound: usize) -> usize {
        self.0.below(bound as u64) as usize
    }

    /// Changes `bytes` as a fuzzer does: other bytes, a cut, a part of another input.
    fn mutate(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(6) {
                0 => bytes.truncate(at),
                1 => {
                    let from = self.below(other.len() + 1);
                    let length = self.below(64).min(other.len() - from);
                    bytes.splice(at..at, other[from..from + length].iter().copied());
                }
                2 => {
                    let value = [0, 1, 0x7f, 0x80, 0xff][self.below(5)];
                    let end = (at + self.below(9)).min(bytes.len());
                    bytes[at..end].fill(value);
                }
                3 => bytes.insert(at, self.below(256) as u8),
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.below(8);
                    }
                }
            }
        }
    }
}

/// Runs `target` with its corpus, and with `mutations` of it. `HOST_AGENT_TEST_SEED`
/// repeats a run.
fn replay(name: &str, target: fn(&[u8]), mutations: usize) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut paths: Vec<_> = fs::read_dir(&corpus)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    // The order is a part of what a seed repeats.
    paths.sort();
    let inputs: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(inputs.len() >= 3, "{} has few inputs", corpus.display());
    let run = |bytes: &[u8]| {
        if catch_unwind(|| target(bytes)).is_err() {
            let (mut file, path) = tempfile::NamedTempFile::new().unwrap().keep().unwrap();
            std::io::Write::write_all(&mut file, bytes).unwrap();
            panic!("{name} panicked; its input is {}", path.display());
        }
    };
    for bytes in &inputs {
        run(bytes);
    }
    let seed = std::env::var("HOST_AGENT_TEST_SEED").map_or(4711, |text| text.parse().unwrap());
    let mut random = Mutator(Random(seed));
    for _ in 0..mutations {
        let mut bytes = inputs[random.below(inputs.len())].clone();
        let other = random.below(inputs.len());
        random.mutate(&mut bytes, &inputs[other]);
        run(&bytes);
    }
}

#[test]
fn mmio_state_survives_its_corpus_and_mutations() {
    replay("mmio_state", mmio_state, 5000);
}

#[test]
fn queue_chains_survives_its_corpus_and_mutations() {
    replay("queue_chains", queue_chains, 5000);
}

#[test]
fn block_requests_survives_its_corpus_and_mutations() {
    replay("block_requests", block_requests, 500);
}

#[test]
fn vsock_packets_survives_its_corpus_and_mutations() {
    replay("vsock_packets", vsock_packets, 500);
}

#[test]
fn bus_frames_survives_its_corpus_and_mutations() {
    replay("bus_frames", bus_frames, 5000);
}

#[test]
fn control_events_survives_its_corpus_and_mutations() {
    replay("control_events", control_events, 5000);
}

#[test]
fn qcow2_open_survives_its_corpus_and_mutations() {
    replay("qcow2_open", qcow2_open, 2000);
}

#[test]
fn package_survives_its_corpus_and_mutations() {
    replay("package", package, 2000);
}

#[test]
fn agent_package_survives_its_corpus_and_mutations() {
    replay("agent_package", agent_package, 2000);
}

#[test]
fn xml_survives_its_corpus_and_mutations() {
    replay("xml", xml, 2000);
}
