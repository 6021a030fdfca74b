//! virtio-rng (virtio 1.2, 5.4): the host kernel's random bytes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::queue::{CheckedQueue, EVENT_IDX, QueueError};
use super::{ActivateError, Activation, ActiveQueue, Device, borrow_event};

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
    stop: Arc<Stop>,
    thread: JoinHandle<()>,
}

/// How the thread is told to end, whether it waits or is at work.
#[derive(Debug)]
struct Stop {
    wanted: AtomicBool,
    wake: EventFd,
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
            queues,
            interrupt,
        } = activation;
        let [queue] =
            <[ActiveQueue; 1]>::try_from(queues).map_err(|queues| ActivateError::QueueCount {
                expected: 1,
                actual: queues.len(),
            })?;
        let host = |what| move |source| ActivateError::Host { what, source };
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("eventfd"))?;
        let stop = Arc::new(Stop {
            wanted: AtomicBool::new(false),
            wake,
        });
        let stopped = Arc::clone(&stop);
        let queue = CheckedQueue::new(queue, memory, features);
        let thread = std::thread::Builder::new()
            .name("rng".into())
            .spawn(move || run(queue, &interrupt, &stopped))
            .map_err(host("thread"))?;
        self.worker = Some(Worker { stop, thread });
        Ok(())
    }

    /// Waits for one chain at most, however many the driver goes on to offer.
    fn reset(&mut self) {
        if let Some(Worker { stop, thread }) = self.worker.take() {
            stop.wanted.store(true, Ordering::Release);
            // The counter was 0: the write cannot fail.
            let _ = stop.wake.write(1);
            let _ = thread.join();
        }
    }
}

fn run(mut queue: CheckedQueue, interrupt: &Interrupt, stop: &Stop) {
    let mut buffer = vec![0; MOST_BYTES];
    loop {
        if wait(&[queue.kick(), &stop.wake]).is_err() || stop.wanted.load(Ordering::Acquire) {
            return;
        }
        // Draining the counter fails only when another kick raced: then the
        // queue is looked at anyway.
        let _ = queue.kick().read();
        if let Err(error) = serve(&mut queue, interrupt, stop, &mut buffer) {
            interrupt.needs_reset(&error);
            return;
        }
    }
}

fn serve(
    queue: &mut CheckedQueue,
    interrupt: &Interrupt,
    stop: &Stop,
    buffer: &mut [u8],
) -> Result<(), QueueError> {
    loop {
        while let Some(chain) = queue.pop()? {
            if stop.wanted.load(Ordering::Acquire) {
                return Ok(());
            }
            let wanted = (chain.writable_len() as usize).min(buffer.len());
            let given = random(&mut buffer[..wanted]);
            let written = chain.write_at(queue.memory(), 0, &buffer[..given]);
            queue.push_used(chain, written as u32)?;
        }
        if queue.notify_needed()? {
            interrupt.used();
        }
        if !queue.enable_kicks()? || stop.wanted.load(Ordering::Acquire) {
            return Ok(());
        }
    }
}

/// Fills `buffer` from its beginning; how many bytes there were.
#[allow(unsafe_code)]
fn random(buffer: &mut [u8]) -> usize {
    // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`, which
    // is borrowed for the call.
    let given = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    // It fails only before the host has gathered any randomness.
    usize::try_from(given).unwrap_or(0)
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
    use std::time::{Duration, Instant};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::vmm::virtio::test_driver::{BUFFERS, RAM, TestDriver, alone, memory_for};

    /// Longest time that a driver goes on offering.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn bytes(driver: &TestDriver, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        driver
            .memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    #[test]
    fn a_chain_gets_what_it_has_room_for_and_no_more_than_the_cap() {
        let mut driver = TestDriver::new(&[QUEUE_SIZE]);
        let mut rng = Rng::default();
        rng.activate(driver.activation(EVENT_IDX)).unwrap();
        driver.chain(0, 0, &[(BUFFERS, 16, false), (BUFFERS + 16, 100, true)]);
        driver.offer(0, 0);
        driver.kick(0);
        assert_eq!(driver.wait_used(0), (0, 100));
        assert_eq!(bytes(&driver, BUFFERS, 16), [0; 16]);
        assert_ne!(bytes(&driver, BUFFERS + 16, 100), [0; 100]);
        assert_eq!(bytes(&driver, BUFFERS + 116, 16), [0; 16]);

        // One buffer under many names is not filled more often than its size
        // is worth.
        let many = vec![(BUFFERS, 1 << 20, true); usize::from(QUEUE_SIZE)];
        driver.chain(0, 0, &many);
        driver.offer(0, 0);
        driver.kick(0);
        assert_eq!(driver.wait_used(0), (0, MOST_BYTES as u32));
        let rest = bytes(&driver, BUFFERS + MOST_BYTES as u64, 1 << 16);
        assert!(rest.iter().all(|byte| *byte == 0));

        // Nothing to fill is nothing to get.
        driver.chain(0, 0, &[(BUFFERS, 16, false)]);
        driver.offer(0, 0);
        driver.kick(0);
        assert_eq!(driver.wait_used(0), (0, 0));
        rng.reset();
    }

    #[test]
    fn a_driver_that_breaks_the_ring_is_reported_and_can_start_again() {
        let mut driver = TestDriver::new(&[QUEUE_SIZE]);
        let mut rng = Rng::default();
        for _ in 0..3 {
            rng.activate(driver.activation(0)).unwrap();
            driver.jump(0, QUEUE_SIZE + 1);
            driver.kick(0);
            driver.wait_until("violation", |driver| driver.interrupt.is_broken());
            rng.reset();
        }
        assert_eq!(driver.interrupt.violations(), 3);
        rng.activate(driver.activation(0)).unwrap();
        driver.chain(0, 0, &[(BUFFERS, 8, true)]);
        driver.offer(0, 0);
        driver.kick(0);
        assert_eq!(driver.wait_used(0), (0, 8));
        rng.reset();
    }

    #[test]
    fn a_reset_comes_through_while_the_driver_goes_on_offering() {
        let mut driver = TestDriver::new(&[QUEUE_SIZE]);
        let mut rng = Rng::default();
        let length = MOST_BYTES as u32;
        for round in 0..200 {
            rng.activate(driver.activation(EVENT_IDX)).unwrap();
            driver.chain(0, 0, &[(BUFFERS, length, true)]);
            for _ in 0..QUEUE_SIZE {
                driver.offer(0, 0);
            }
            let over = AtomicBool::new(false);
            driver.kick(0);
            driver.wait_used(0);
            driver.offer(0, 0);
            std::thread::scope(|scope| {
                let offering = scope.spawn(|| {
                    let start = Instant::now();
                    while !over.load(Ordering::Acquire) && start.elapsed() < PATIENCE {
                        if driver.used(0).is_some() {
                            driver.offer(0, 0);
                        }
                    }
                    start.elapsed()
                });
                rng.reset();
                over.store(true, Ordering::Release);
                let took = offering.join().unwrap();
                assert!(took < PATIENCE, "round {round}: {took:?}");
            });
            // From here on nobody writes to the guest's memory.
            let zeros = vec![0; MOST_BYTES];
            driver
                .memory
                .write_slice(&zeros, GuestAddress(BUFFERS))
                .unwrap();
            driver.kick(0);
            assert_eq!(bytes(&driver, BUFFERS, MOST_BYTES), zeros);
        }
        assert_eq!(driver.interrupt.violations(), 0);
    }

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
