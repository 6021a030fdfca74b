//! Limits events that a guest can cause with an instruction or a packet. The
//! supervisor's one thread handles the events of all guests.
//!
//! A panic is level state ([`super::bus::Bus`]), and so is a lack of space.

use std::time::Instant;

use super::control::Event;
use super::outbox::Outbox;
use super::virtio::vsock::{EventSink, VsockEvent};
use crate::token_bucket::{GUEST_CONNECTS, TokenBucket};

/// Sends events of the vsock device to the supervisor. If the guest connects too
/// often, or the outbox does not take the event, its descriptor is dropped and the
/// guest's connection closes; its agents dial again, with back-off.
pub fn vsock_sink(outbox: Outbox) -> EventSink {
    let mut connects = TokenBucket::new(GUEST_CONNECTS);
    Box::new(move |event| {
        match event {
            VsockEvent::Opened {
                port,
                source_port,
                fd,
            } => {
                connects.take(Instant::now()) && {
                    outbox.send(&Event::Opened { port, source_port }, vec![fd])
                }
            }
            // One for each dial of the supervisor.
            VsockEvent::Dialed { id, outcome } => outbox.dialed(id, outcome),
        };
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::vmm::control::DialOutcome;
    use crate::vmm::wire;

    #[test]
    fn a_flood_of_connects_causes_few_events_and_delays_no_dial() {
        let (ours, theirs) = wire::pair().unwrap();
        for socket in [&ours, &theirs] {
            wire::set_nonblocking(socket).unwrap();
        }
        let outbox = Outbox::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        outbox.attach(Arc::new(ours), None).unwrap();
        let dial = outbox.dial(7);
        let mut sink = vsock_sink(outbox.clone());
        let begin = Instant::now();
        for source_port in 0..50_000 {
            let (fd, guest) = wire::pair().unwrap();
            sink(VsockEvent::Opened {
                port: 10,
                source_port,
                fd,
            });
            drop(guest);
        }
        sink(VsockEvent::Dialed {
            id: dial,
            outcome: DialOutcome::Connected,
        });
        let ticks = begin.elapsed().as_millis() / 50;
        let mut opened = 0;
        loop {
            outbox.flush();
            let (event, files) = wire::recv::<Event>(theirs.as_fd()).unwrap().unwrap();
            match event {
                Event::Opened { .. } => opened += files.len() as u128,
                Event::Dialed { id: 7, .. } => break,
                other => panic!("{other:?}"),
            }
        }
        assert!(
            (128..=129 + ticks).contains(&opened),
            "{opened} in {ticks} ticks"
        );
    }
}
