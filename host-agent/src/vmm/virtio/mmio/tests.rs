//! The registers against a reference model of virtio 1.2, 2.1 and 4.2.2.

use std::sync::{Arc, mpsc};

use proptest::prelude::*;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::vmm::virtio::{Identity, new_event};

const SIZES: [u16; 3] = [8, 4, 256];
const CONFIG: [u8; 6] = [1, 2, 3, 4, 5, 6];
const ID: u32 = 4711;
const OFFERED: u64 = 1 << 29 | 1 << 9 | 1 << 32;
const RAM: u64 = 0x1_0000;

/// A call of the transport to its device: `None` for a reset, else the features
/// and each queue's size and rings at activation.
type Call = Option<(u64, Vec<(u16, [u64; 3])>)>;

/// The identity of a test device; the transport adds VERSION_1 by itself.
fn identity() -> Identity {
    Identity {
        id: ID,
        name: "test".into(),
        features: OFFERED & !(1 << 32),
        queue_sizes: &SIZES,
        config: CONFIG.to_vec(),
    }
}

/// A device that records the calls of the transport.
struct Recorder {
    identity: Identity,
    calls: Arc<Mutex<Vec<Call>>>,
    fails: bool,
}

impl Device for Recorder {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let rings = |active: &ActiveQueue| {
            let queue = &active.queue;
            assert!(queue.ready());
            let addresses = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
            (queue.size(), addresses)
        };
        let queues = activation.queues.iter().map(rings).collect();
        let call = Some((activation.features, queues));
        self.calls.lock().unwrap().push(call);
        if self.fails {
            Err(ActivateError::ThreadGone)
        } else {
            Ok(())
        }
    }

    fn reset(&mut self) {
        self.calls.lock().unwrap().push(None);
    }
}

/// One access of the driver, or one signal of the device.
#[derive(Debug, Clone)]
enum TransportEvent {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    /// The device used a buffer, or met a violation.
    Used,
    Broken,
}

#[derive(Debug, Clone, Copy, Default)]
struct Ring {
    size: u32,
    ready: bool,
    /// Addresses of the descriptor table, driver area and device area.
    at: [u64; 3],
}

/// The reference model of the registers.
struct RegisterModel {
    status: u32,
    broken: bool,
    interrupt: u32,
    /// The interrupt line was signalled.
    raised: bool,
    select: [u32; 2],
    accepted: u64,
    queue: u32,
    rings: [Ring; 3],
    kicks: [u64; 3],
    calls: Vec<Call>,
    fails: bool,
}

impl RegisterModel {
    fn new(fails: bool) -> Self {
        let mut model = Self {
            status: 0,
            broken: false,
            interrupt: 0,
            raised: false,
            select: [0; 2],
            accepted: 0,
            queue: 0,
            rings: [Ring::default(); 3],
            kicks: [0; 3],
            calls: Vec::new(),
            fails,
        };
        model.power_on();
        model
    }

    fn power_on(&mut self) {
        (self.status, self.broken, self.interrupt) = (0, false, 0);
        (self.select, self.accepted, self.queue) = ([0; 2], 0, 0);
        self.rings = SIZES.map(|size| Ring {
            size: size.into(),
            ..Ring::default()
        });
    }

    fn read(&self, offset: u64, width: usize) -> Vec<u8> {
        if offset >= 0x100 {
            let byte = |n: usize| {
                let at = (offset - 0x100).checked_add(n as u64);
                let at = at.and_then(|at| usize::try_from(at).ok());
                at.and_then(|at| CONFIG.get(at)).copied().unwrap_or(0)
            };
            return (0..width).map(byte).collect();
        }
        if width != 4 {
            return vec![0; width];
        }
        let ring = self.rings.get(self.queue as usize);
        let value = match offset {
            0x00 => 0x7472_6976,
            0x04 => 2,
            0x08 => ID,
            0x10 if self.select[0] < 2 => (OFFERED >> (32 * self.select[0])) as u32,
            0x34 if ring.is_some() => SIZES[self.queue as usize].into(),
            0x44 => ring.is_some_and(|ring| ring.ready).into(),
            0x60 => self.interrupt,
            0x70 => self.status | u32::from(self.broken) << 6,
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            _ => 0,
        };
        value.to_le_bytes().to_vec()
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(bytes) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        let negotiating = self.status & 0xa == 2;
        let configuring = self.status & 0xc == 8;
        match offset {
            0x14 => self.select[0] = value,
            0x24 => self.select[1] = value,
            0x20 if negotiating && self.select[1] < 2 => {
                let shift = 32 * self.select[1];
                let kept = self.accepted & !(0xffff_ffff << shift);
                self.accepted = kept | u64::from(value) << shift;
            }
            0x30 => self.queue = value,
            0x50 => {
                if let Some(kicks) = self.kicks.get_mut(value as usize) {
                    *kicks += 1;
                }
            }
            0x64 => self.interrupt &= !value,
            0x70 => self.set_status(value),
            _ if configuring => self.configure(offset, value),
            _ => {}
        }
    }

    fn configure(&mut self, offset: u64, value: u32) {
        let number = self.queue as usize;
        let Some(ring) = self.rings.get_mut(number) else {
            return;
        };
        match offset {
            0x44 => ring.ready = value == 1,
            _ if ring.ready => {}
            0x38 if value.is_power_of_two() && value <= SIZES[number].into() => ring.size = value,
            0x80 | 0x90 | 0xa0 | 0x84 | 0x94 | 0xa4 => {
                let at = &mut ring.at[(offset as usize >> 4) - 8];
                let mut bytes = at.to_le_bytes();
                let half = offset as usize & 4;
                bytes[half..half + 4].copy_from_slice(&value.to_le_bytes());
                *at = u64::from_le_bytes(bytes);
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.power_on();
            self.calls.push(None);
            return;
        }
        if value & 0x80 != 0 {
            self.status |= 0x80;
            return;
        }
        let value = value & !0x40;
        match (self.status, value) {
            (0, 1) | (1, 3) => self.status = value,
            (3, 0xb) if self.accepted & !OFFERED == 0 && self.accepted >> 32 == 1 => {
                self.status = value;
            }
            (0xb, 0xf) => {
                self.status = value;
                self.start();
            }
            _ => {}
        }
    }

    fn start(&mut self) {
        let fine = |ring: &Ring| {
            let size = u64::from(ring.size);
            let needs = [(16, 16 * size), (2, 6 + 2 * size), (4, 6 + 8 * size)];
            ring.ready
                && ring.at.iter().zip(needs).all(|(at, (align, len))| {
                    at % align == 0 && at.checked_add(len).is_some_and(|end| end <= RAM)
                })
        };
        if self.rings.iter().all(fine) {
            let rings = self.rings.iter().map(|ring| (ring.size as u16, ring.at));
            self.calls.push(Some((self.accepted, rings.collect())));
            if !self.fails {
                self.kicks = self.kicks.map(|count| count + 1);
                return;
            }
        }
        self.fault();
    }

    fn fault(&mut self) {
        self.broken = true;
        self.interrupt |= 2;
        self.raised = true;
    }
}

fn word(offset: u64, value: u32) -> TransportEvent {
    TransportEvent::Write(offset, value.to_le_bytes().to_vec())
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        12 => (0..0x44_u64).prop_map(|register| register * 4),
        3 => 0..0x120_u64,
        1 => any::<u64>(),
        1 => u64::MAX - 8..=u64::MAX,
    ]
}

/// Any one event.
fn any_event() -> impl Strategy<Value = Vec<TransportEvent>> {
    let value = prop_oneof![
        4 => 0..5_u32,
        3 => prop::sample::select(vec![0xb, 0xf, 0x40, 0x43, 0x80, 0x8f, 0x4f]),
        1 => Just(OFFERED as u32),
        1 => any::<u32>(),
    ];
    let width = prop_oneof![8 => Just(4_usize), 1 => 0..=9_usize];
    let bytes = prop::collection::vec(any::<u8>(), 0..9);
    prop_oneof![
        6 => (offset(), value).prop_map(|(offset, value)| vec![word(offset, value)]),
        2 => (offset(), bytes).prop_map(|(offset, bytes)| vec![TransportEvent::Write(offset, bytes)]),
        3 => (offset(), width).prop_map(|(offset, width)| vec![TransportEvent::Read(offset, width)]),
        1 => Just(vec![TransportEvent::Used]),
        1 => Just(vec![TransportEvent::Broken]),
    ]
}

/// A driver that initialises the device, sometimes with an error.
fn start() -> impl Strategy<Value = Vec<TransportEvent>> {
    let features = prop_oneof![
        4 => Just(OFFERED),
        2 => Just(1_u64 << 32),
        1 => Just(OFFERED & 0xffff_ffff),
        1 => any::<u64>(),
    ];
    // Some rings are misaligned, end beyond RAM, or lie far above RAM.
    let place = |align: u64| {
        let good = (1..0xe000 / align).prop_map(move |n| n * align);
        prop_oneof![40 => good, 1 => 1..0xe000_u64, 1 => Just(RAM - 4), 1 => any::<u64>()]
    };
    let ring = |max: u16| {
        let size = prop_oneof![
            8 => (0..=max.ilog2()).prop_map(|log| 1_u32 << log),
            1 => any::<u32>(),
        ];
        let ready = prop_oneof![30 => Just(1_u32), 1 => 0..4_u32];
        (size, place(16), place(2), place(4), ready)
    };
    let again = prop::bool::weighted(0.9);
    (again, features, SIZES.map(ring)).prop_map(|(again, features, rings)| {
        let mut events = Vec::new();
        if again {
            events.push(word(0x70, 0));
        }
        events.extend([word(0x70, 1), word(0x70, 3)]);
        for half in 0..2 {
            events.push(word(0x24, half));
            events.push(word(0x20, (features >> (32 * half)) as u32));
        }
        events.push(word(0x70, 0xb));
        for (number, (size, desc, driver, device, ready)) in (0..).zip(rings) {
            events.extend([word(0x30, number), word(0x38, size)]);
            for (offset, at) in [(0x80, desc), (0x90, driver), (0xa0, device)] {
                events.push(word(offset, at as u32));
                events.push(word(offset + 4, (at >> 32) as u32));
            }
            events.push(word(0x44, ready));
        }
        events.push(word(0x70, 0xf));
        events
    })
}

fn events() -> impl Strategy<Value = Vec<TransportEvent>> {
    let part = prop_oneof![4 => any_event(), 1 => start()];
    prop::collection::vec(part, 1..30).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..crate::property::cases(400) })]

    #[test]
    fn every_access_behaves_as_in_the_reference_model(
        events in events(),
        fails in prop::bool::weighted(0.1),
    ) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let device = Recorder { identity: identity(), calls: Arc::clone(&calls), fails };
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap(), "recorder", new_event().unwrap());
        let transport = Transport::new(Box::new(device), memory, interrupt.clone()).unwrap();
        let kicks = transport.kicks().unwrap();
        let mut model = RegisterModel::new(fails);
        for event in &events {
            match event {
                TransportEvent::Read(offset, width) => {
                    let mut bytes = vec![0xa5; *width];
                    transport.read(*offset, &mut bytes);
                    prop_assert_eq!(bytes, model.read(*offset, *width));
                }
                TransportEvent::Write(offset, bytes) => {
                    transport.write(*offset, bytes);
                    model.write(*offset, bytes);
                }
                TransportEvent::Used => {
                    interrupt.used();
                    model.interrupt |= 1;
                    model.raised = true;
                }
                TransportEvent::Broken => {
                    interrupt.needs_reset(&ActivateError::ThreadGone);
                    model.fault();
                }
            }
            for offset in (0..0x10c).step_by(4) {
                let mut bytes = [0; 4];
                transport.read(offset, &mut bytes);
                prop_assert_eq!(bytes.to_vec(), model.read(offset, 4), "register {:#x}", offset);
            }
            let kicked: Vec<u64> = kicks.iter().map(|kick| kick.read().unwrap_or(0)).collect();
            prop_assert_eq!(kicked, std::mem::take(&mut model.kicks));
            prop_assert_eq!(&*calls.lock().unwrap(), &model.calls);
            let raised = line.read().is_ok();
            prop_assert_eq!(raised, std::mem::take(&mut model.raised), "{:?}", event);
        }
    }
}

/// A device that waits in each reset, as a device with a slow disk does.
struct Slow {
    identity: Identity,
    begun: mpsc::Sender<()>,
    goes_on: mpsc::Receiver<()>,
}

impl Device for Slow {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn reset(&mut self) {
        self.begun.send(()).unwrap();
        // An error means that the test is over.
        let _ = self.goes_on.recv();
    }
}

#[test]
fn a_slow_reset_blocks_only_the_vcpu_that_requests_it() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let (begun, has_begun) = mpsc::channel();
    let (go_on, goes_on) = mpsc::channel();
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupt = Interrupt::new(line, "slow", new_event().unwrap());
    let device = Box::new(Slow {
        identity: identity(),
        begun,
        goes_on,
    });
    let transport = Arc::new(Transport::new(device, memory, interrupt).unwrap());
    let vcpu = std::thread::spawn({
        let transport = Arc::clone(&transport);
        move || transport.write(register::STATUS, &0_u32.to_le_bytes())
    });
    has_begun.recv().unwrap();
    // The main thread reads the interrupt without the transport's lock.
    let interrupt = transport.interrupt();
    assert_eq!((interrupt.name(), interrupt.violations()), ("slow", 0));
    // `stop` waits for the vCPU thread's reset, then resets the device again.
    let stopping = std::thread::spawn({
        let transport = Arc::clone(&transport);
        move || transport.stop()
    });
    assert!(has_begun.try_recv().is_err());
    go_on.send(()).unwrap();
    vcpu.join().unwrap();
    has_begun.recv().unwrap();
    assert!(!stopping.is_finished());
    go_on.send(()).unwrap();
    stopping.join().unwrap();
}

#[test]
fn a_queue_size_of_more_than_16_bits_is_refused() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let device = Recorder {
        identity: identity(),
        calls: Arc::clone(&calls),
        fails: false,
    };
    let interrupt = Interrupt::new(
        EventFd::new(EFD_NONBLOCK).unwrap(),
        "recorder",
        new_event().unwrap(),
    );
    let transport = Transport::new(Box::new(device), memory, interrupt).unwrap();
    let write = |offset, value: u32| transport.write(offset, &value.to_le_bytes());
    for status in [1, 3] {
        write(register::STATUS, status);
    }
    write(register::DRIVER_FEATURES_SEL, 1);
    write(register::DRIVER_FEATURES, 1);
    write(register::STATUS, 0xb);
    for queue in 0..3 {
        write(register::QUEUE_SEL, queue);
        write(register::QUEUE_SIZE, 4);
        // The lower 16 bits alone would be valid.
        for size in [0x1_0002, 0x8000_0001, 0xffff_0002] {
            write(register::QUEUE_SIZE, size);
        }
        let base = 0x1000 * queue;
        write(register::QUEUE_DESC_LOW, base);
        write(register::QUEUE_DRIVER_LOW, base + 0x400);
        write(register::QUEUE_DEVICE_LOW, base + 0x800);
        write(register::QUEUE_READY, 1);
    }
    write(register::STATUS, 0xf);
    let calls = calls.lock().unwrap();
    let [Some((_, queues))] = &calls[..] else {
        panic!("{calls:?}");
    };
    assert!(queues.iter().all(|(size, _)| *size == 4), "{queues:?}");
}
