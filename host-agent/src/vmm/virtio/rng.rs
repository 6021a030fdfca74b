//! virtio-rng (virtio 1.2, 5.4): random bytes of the host kernel.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::queue::{CheckedQueue, EVENT_IDX, QueueError};
use super::{ActivateError, Activation, Device, Identity, borrow_event, new_event};
use crate::vmm::sandbox::{self, ThreadClass};

const QUEUE_SIZE: u16 = 64;
/// Most bytes per chain: a chain that lists one buffer many times must not make
/// the worker fill it many times.
const MAX_BYTES: usize = 64 * 1024;

/// The device. Dropping it ends the worker.
#[derive(Debug)]
pub struct Rng {
    identity: Identity,
    commands: Sender<WorkerCommand>,
    stop: Arc<Stop>,
    active: bool,
}

/// A command of the front.
#[derive(Debug)]
enum WorkerCommand {
    /// Serve this queue.
    Activate(Box<(CheckedQueue, Interrupt)>),
    /// Answer: the queue is dropped.
    Reset(Sender<()>),
}

/// Takes the worker from its queue. `wake` ends its wait, `wanted` its work.
#[derive(Debug)]
struct Stop {
    wanted: AtomicBool,
    wake: EventFd,
}

impl Stop {
    fn set(&self) {
        self.wanted.store(true, Ordering::Release);
        // Cannot fail: the counter is 0.
        let _ = self.wake.write(1);
    }
}

impl Rng {
    /// The device, with its worker.
    pub fn new() -> io::Result<Self> {
        let stop = Arc::new(Stop {
            wanted: AtomicBool::new(false),
            wake: new_event()?,
        });
        let (commands, received) = channel();
        let of_worker = Arc::clone(&stop);
        sandbox::spawn(ThreadClass::Rng, "rng", move || {
            work(&received, &of_worker);
        })?;
        let identity = Identity {
            id: VIRTIO_ID_RNG,
            name: "rng".into(),
            features: EVENT_IDX,
            queue_sizes: &[QUEUE_SIZE],
            config: Vec::new(),
        };
        Ok(Self {
            identity,
            commands,
            stop,
            active: false,
        })
    }
}

impl Device for Rng {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt.clone();
        let [queue] = activation.checked_queues()?;
        self.stop.wanted.store(false, Ordering::Release);
        let command = WorkerCommand::Activate(Box::new((queue, interrupt)));
        self.commands
            .send(command)
            .map_err(|_| ActivateError::ThreadGone)?;
        self.active = true;
        Ok(())
    }

    /// Waits for at most one chain, even if the driver keeps offering chains.
    fn reset(&mut self) {
        if !std::mem::take(&mut self.active) {
            return;
        }
        self.stop.set();
        let (done, wait) = channel();
        if self.commands.send(WorkerCommand::Reset(done)).is_ok() {
            // An error means that the worker is gone, and with it the queue.
            let _ = wait.recv();
        }
    }
}

impl Drop for Rng {
    /// The worker ends when it sees that the commands end.
    fn drop(&mut self) {
        self.stop.set();
    }
}

fn work(commands: &Receiver<WorkerCommand>, stop: &Stop) {
    for command in commands {
        match command {
            WorkerCommand::Activate(active) => {
                let (queue, interrupt) = *active;
                run(queue, &interrupt, stop);
            }
            WorkerCommand::Reset(done) => {
                // Fails only on an empty counter.
                let _ = stop.wake.read();
                let _ = done.send(());
            }
        }
    }
}

fn run(mut queue: CheckedQueue, interrupt: &Interrupt, stop: &Stop) {
    let mut buffer = vec![0; MAX_BYTES];
    loop {
        let events = [queue.kick(), &stop.wake];
        let mut fds = events.map(|event| PollFd::new(borrow_event(event), PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return interrupt.needs_reset(&error),
        }
        if stop.wanted.load(Ordering::Acquire) {
            return;
        }
        // Fails only on an empty counter; the queue is polled in any case.
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
            let filled = fill(&mut buffer[..wanted]);
            let written = chain.write_at(queue.memory(), 0, &buffer[..filled]);
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

/// Fills `buffer` from its start; returns the number of random bytes.
#[allow(unsafe_code)]
fn fill(buffer: &mut [u8]) -> usize {
    // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`, which
    // is borrowed for the call.
    let filled = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    // An error means EINTR before the kernel's generator is initialised.
    usize::try_from(filled).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::{ProptestConfig, prop, prop_assert_eq, proptest};

    use super::*;
    use crate::vmm::virtio::test_driver::{
        BUFFERS, RAM, RingAction, TestDriver, alone, memory_for, open_files_and_threads,
        ring_action,
    };

    /// Longest time that a driver keeps offering chains.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn start(features: u64) -> (Rng, TestDriver) {
        let mut driver = TestDriver::new(&[QUEUE_SIZE]);
        let mut rng = Rng::new().unwrap();
        rng.activate(driver.activation(features)).unwrap();
        (rng, driver)
    }

    #[test]
    fn a_chain_is_filled_up_to_the_limit_per_chain() {
        let (mut rng, mut driver) = start(EVENT_IDX);
        driver.submit(&[(BUFFERS, 16, false), (BUFFERS + 16, 100, true)]);
        assert_eq!(driver.wait_used(0), (0, 100));
        assert_eq!(driver.read(BUFFERS, 16), [0; 16]);
        assert_ne!(driver.read(BUFFERS + 16, 100), [0; 100]);
        assert_eq!(driver.read(BUFFERS + 116, 16), [0; 16]);

        // One buffer, listed once per descriptor.
        driver.submit(&vec![(BUFFERS, 1 << 20, true); usize::from(QUEUE_SIZE)]);
        assert_eq!(driver.wait_used(0), (0, MAX_BYTES as u32));
        let rest = driver.read(BUFFERS + MAX_BYTES as u64, 1 << 16);
        assert!(rest.iter().all(|byte| *byte == 0));

        // No writable buffer.
        driver.submit(&[(BUFFERS, 16, false)]);
        assert_eq!(driver.wait_used(0), (0, 0));
        rng.reset();
    }

    #[test]
    fn a_ring_violation_is_counted_and_a_reset_recovers() {
        let (mut rng, mut driver) = start(0);
        for _ in 0..3 {
            driver.jump(0, QUEUE_SIZE + 1);
            driver.kick(0);
            driver.wait_until("violation", |driver| driver.interrupt.is_broken());
            rng.reset();
            rng.activate(driver.activation(0)).unwrap();
        }
        assert_eq!(driver.interrupt.violations(), 3);
        driver.submit(&[(BUFFERS, 8, true)]);
        assert_eq!(driver.wait_used(0), (0, 8));
        rng.reset();
    }

    #[test]
    fn a_reset_returns_while_the_driver_keeps_offering() {
        let mut driver = TestDriver::new(&[QUEUE_SIZE]);
        let mut rng = Rng::new().unwrap();
        let length = MAX_BYTES as u32;
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
            // From here on the device must not write to guest memory.
            let zeros = vec![0; MAX_BYTES];
            driver.write(BUFFERS, &zeros);
            driver.kick(0);
            assert_eq!(driver.read(BUFFERS, MAX_BYTES), zeros);
        }
        assert_eq!(driver.interrupt.violations(), 0);
    }

    #[test]
    fn a_reset_waits_until_the_queue_is_dropped() {
        // In a process of its own, because it counts descriptors.
        if !alone("rng::tests::a_reset_waits_until_the_queue_is_dropped") {
            return;
        }
        let mut driver = TestDriver::new(&[QUEUE_SIZE]);
        let mut rng = Rng::new().unwrap();
        let [before, _] = open_files_and_threads();
        for round in 0..200 {
            rng.activate(driver.activation(EVENT_IDX)).unwrap();
            driver.chain(0, 0, &[(BUFFERS, MAX_BYTES as u32, true)]);
            for _ in 0..QUEUE_SIZE {
                driver.offer(0, 0);
            }
            driver.kick(0);
            // The worker fills the next buffer when the reset begins.
            driver.wait_used(0);
            rng.reset();
            // The queue holds a descriptor of its kick.
            let [after, _] = open_files_and_threads();
            assert_eq!(after, before, "round {round}");
        }
    }

    #[test]
    fn chains_are_filled_while_the_16_bit_indices_wrap() {
        for features in [0, EVENT_IDX] {
            let (mut rng, mut driver) = start(features);
            for head in 0..QUEUE_SIZE {
                let at = BUFFERS + 8 * u64::from(head);
                driver.chain(0, head, &[(at, 8, true)]);
            }
            let mut done = 0;
            while done < 3 * (1 << 16) {
                let batch = 1 + done % 60;
                (0..batch).for_each(|head| driver.offer(0, head as u16));
                driver.kick(0);
                for head in 0..batch {
                    assert_eq!(driver.wait_used(0), (head, 8));
                }
                done += batch;
            }
            assert_eq!(driver.interrupt.violations(), 0);
            rng.reset();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            max_shrink_iters: 200,
            failure_persistence: None,
            ..crate::property::cases(100)
        })]

        #[test]
        fn a_reset_recovers_from_any_ring_content(
            actions in prop::collection::vec(ring_action(QUEUE_SIZE), 1..150),
            event_idx: bool,
        ) {
            let features = if event_idx { EVENT_IDX } else { 0 };
            let (mut rng, mut driver) = start(features);
            for action in &actions {
                match action {
                    RingAction::Reset => {
                        rng.reset();
                        rng.activate(driver.activation(features)).unwrap();
                    }
                    action => driver.act(action),
                }
            }
            rng.reset();
            rng.activate(driver.activation(features)).unwrap();
            driver.submit(&[(BUFFERS, 8, true)]);
            prop_assert_eq!(driver.wait_used(0), (0, 8));
            rng.reset();
        }
    }

    #[test]
    fn overlapping_buffers_get_64_kib_and_cost_no_memory() {
        // In a process of its own, because it measures the memory of the process.
        if !alone("rng::tests::overlapping_buffers_get_64_kib_and_cost_no_memory") {
            return;
        }
        let (mut rng, mut driver) = start(EVENT_IDX);
        let used = memory_for(&driver.memory.clone(), || {
            // One page, or the rest of RAM.
            for len in [4096, (RAM - BUFFERS) as u32].repeat(20) {
                driver.submit(&[(BUFFERS, len, true); QUEUE_SIZE as usize]);
                assert_eq!(driver.wait_used(0), (0, MAX_BYTES as u32));
            }
        });
        assert!(used <= 1 << 20, "{used} bytes");
        rng.reset();
    }
}
