//! virtio-rng (virtio 1.2, 5.4): the host kernel's random bytes.

use std::io::{self, Read};
use std::thread::JoinHandle;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::queue::{CheckedQueue, EVENT_IDX, QueueError};
use super::{ActivateError, Activation, Device, borrow_event};

const QUEUE_SIZE: u16 = 64;
/// Most bytes given per chain, so that overlapping buffers amplify nothing.
const MOST_BYTES: usize = 64 * 1024;

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker>,
}

#[derive(Debug)]
struct Worker {
    stop: EventFd,
    thread: JoinHandle<()>,
}

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn features(&self) -> u64 {
        EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            features,
            mut queues,
            interrupt,
        } = activation;
        let queue = match (queues.pop(), queues.len()) {
            (Some(queue), 0) => queue,
            (_, rest) => {
                return Err(ActivateError::QueueCount {
                    expected: 1,
                    actual: rest,
                });
            }
        };
        let host = |what| move |source| ActivateError::Host { what, source };
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("eventfd"))?;
        let stopped = stop.try_clone().map_err(host("eventfd"))?;
        let source = std::fs::File::from(random_source().map_err(host("random source"))?);
        let queue = CheckedQueue::new(queue, memory, features);
        let thread = std::thread::Builder::new()
            .name("rng".into())
            .spawn(move || run(queue, &interrupt, &stopped, source))
            .map_err(host("thread"))?;
        self.worker = Some(Worker { stop, thread });
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(Worker { stop, thread }) = self.worker.take() {
            // The counter was 0: the write cannot fail.
            let _ = stop.write(1);
            let _ = thread.join();
        }
    }
}

/// The random source as a file: opened once, when the guest's driver starts.
fn random_source() -> io::Result<std::os::fd::OwnedFd> {
    Ok(std::fs::File::open("/dev/urandom")?.into())
}

fn run(mut queue: CheckedQueue, interrupt: &Interrupt, stop: &EventFd, mut source: std::fs::File) {
    let mut buffer = vec![0; MOST_BYTES];
    loop {
        if wait(&[queue.kick(), stop]).is_err() || stop.read().is_ok() {
            return;
        }
        // Draining the counter fails only when another kick raced: then the
        // queue is looked at anyway.
        let _ = queue.kick().read();
        if let Err(error) = serve(&mut queue, interrupt, &mut source, &mut buffer) {
            interrupt.needs_reset(&error);
            let _ = wait(&[stop]);
            return;
        }
    }
}

fn serve(
    queue: &mut CheckedQueue,
    interrupt: &Interrupt,
    source: &mut std::fs::File,
    buffer: &mut [u8],
) -> Result<(), QueueError> {
    loop {
        while let Some(chain) = queue.pop()? {
            let wanted = (chain.writable_len() as usize).min(buffer.len());
            let given = source.read(&mut buffer[..wanted]).unwrap_or(0);
            let written = chain.write_at(queue.memory(), 0, &buffer[..given]);
            queue.push_used(chain, written as u32)?;
        }
        if queue.notify_needed()? {
            interrupt.used();
        }
        if !queue.enable_kicks()? {
            return Ok(());
        }
    }
}

/// Waits until one of the eventfds is signalled.
fn wait(events: &[&EventFd]) -> io::Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds: Vec<PollFd<'_>> = events
        .iter()
        .map(|event| PollFd::new(borrow_event(event), PollFlags::POLLIN))
        .collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return other.map(drop).map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::virtio::test_driver::{BUFFERS, RAM, TestDriver, alone, memory_for};

    #[test]
    fn buffers_that_overlap_get_64_kib_and_cost_no_memory() {
        // Alone, so that nothing else takes any.
        if !alone("rng::tests::buffers_that_overlap_get_64_kib_and_cost_no_memory") {
            return;
        }
        let mut rng = Rng::default();
        let mut driver = TestDriver::new(&[QUEUE_SIZE]);
        rng.activate(driver.activation(EVENT_IDX)).unwrap();
        let used = memory_for(&driver.memory.clone(), || {
            // A page, and what is left of RAM.
            for len in [4096, (RAM - BUFFERS) as u32].repeat(20) {
                driver.chain(0, 0, &[(BUFFERS, len, true); QUEUE_SIZE as usize]);
                driver.offer(0, 0);
                driver.kick(0);
                assert_eq!(driver.wait_used(0), (0, MOST_BYTES as u32));
            }
        });
        assert!(used <= 1 << 20, "{used} bytes");
        rng.reset();
    }
}
