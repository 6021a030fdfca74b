//! Packets on the control socket: one JSON message and its file descriptors.
//!
//! Both ends use these functions. Whether a call waits depends on `O_NONBLOCK` of
//! the socket; `WouldBlock` is returned for the caller's event loop.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};

use super::control::{MAX_FILES, MAX_PACKET};

/// Bytes before the descriptors in a control message.
const CMSG_HEADER: usize = 16;

/// A connected pair of control sockets, both close-on-exec and blocking.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

/// Makes calls on `socket` fail with `WouldBlock` instead of waiting.
pub fn set_nonblocking(socket: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Sends one message with its files. Atomic: several threads may send on one
/// socket.
///
/// # Errors
/// `InvalidInput` if the message is longer than [`MAX_PACKET`] or carries more
/// than [`MAX_FILES`] files; otherwise the error of the socket.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    send_bytes(socket, &encode(message)?, files)
}

/// The bytes of a message, for a caller that may have to send them later.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_PACKET {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "control message of {} bytes, the limit is {MAX_PACKET}",
                bytes.len()
            ),
        ));
    }
    Ok(bytes)
}

/// Sends a message made by [`encode`].
pub fn send_bytes(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    if files.len() > MAX_FILES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "control message with {} files, the limit is {MAX_FILES}",
                files.len()
            ),
        ));
    }
    let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one message and its files; `None` when the other end is closed.
/// The files are close-on-exec. Files for which this process has no descriptor
/// left are missing at the end: the caller must check that they are there.
///
/// # Errors
/// `InvalidData` if the packet is longer or carries more files than the
/// protocol allows, or is not a `T`; its files are closed, and the next call
/// receives the next packet. Otherwise the error of the socket.
pub fn recv<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    recv_with(socket, &mut nix::cmsg_space!([RawFd; MAX_FILES]))
}

fn recv_with<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    control: &mut [u8],
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_PACKET];
    control.fill(0);
    let (length, flags) = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut *control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(message) => break (message.bytes, message.flags),
            // The other end closed with a packet unread: reported once, before the
            // packets that it sent.
            Err(Errno::EINTR | Errno::ECONNRESET) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let files = installed(control);
    let many = flags.contains(MsgFlags::MSG_CTRUNC) && files.len() == MAX_FILES;
    if many || flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "control packet is longer or carries more files than the protocol allows",
        ));
    }
    if length == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&bytes[..length])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, files)))
}

/// The files in a control buffer that was all zeros before `recvmsg(2)`. `nix`
/// returns none of a truncated message (`MSG_CTRUNC`), and those that the kernel
/// has installed would stay open. One `cmsghdr` (`cmsg(3)`, x86-64: length, level,
/// type) holds all of them.
fn installed(control: &[u8]) -> Vec<OwnedFd> {
    let Some((header, data)) = control.split_first_chunk::<CMSG_HEADER>() else {
        return Vec::new();
    };
    let [l0, l1, l2, l3, l4, l5, l6, l7, kind @ ..] = *header;
    let length = u64::from_ne_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
    let length = usize::try_from(length).unwrap_or(0);
    let rights = [libc::SOL_SOCKET, libc::SCM_RIGHTS].map(i32::to_ne_bytes);
    if kind != *rights.as_flattened() {
        return Vec::new();
    }
    let count = length.saturating_sub(CMSG_HEADER) / size_of::<RawFd>();
    let (numbers, _) = data.as_chunks();
    let numbers = numbers.iter().take(count);
    numbers
        .map(|number| owned(RawFd::from_ne_bytes(*number)))
        .collect()
}

#[allow(unsafe_code)]
fn owned(raw: RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the kernel has just installed this descriptor for this message;
    // nothing else in the process knows its number.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use nix::fcntl::FdFlag;

    use proptest::prelude::*;

    use super::*;
    use crate::vmm::control::{
        Attached, Command, DialOutcome, DiskFailed, Event, ExitReason, NoSpace, Stats,
    };

    #[test]
    fn files_arrive_with_their_message_and_close_on_exec() {
        let (a, b) = pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        let opened = Event::Opened {
            port: 1,
            source_port: 2,
        };
        send(a.as_fd(), &opened, &[file.as_fd()]).unwrap();
        let (event, files) = recv::<Event>(b.as_fd()).unwrap().unwrap();
        assert_eq!(event, opened);
        assert_eq!(files.len(), 1);
        let flags = fcntl(&files[0], FcntlArg::F_GETFD).unwrap();
        assert!(FdFlag::from_bits_truncate(flags).contains(FdFlag::FD_CLOEXEC));
        let mut back = std::fs::File::from(files.into_iter().next().unwrap());
        std::io::Seek::rewind(&mut back).unwrap();
        let mut text = String::new();
        back.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn end_of_stream_would_block_and_invalid_data_differ() {
        let (a, b) = pair().unwrap();
        send(a.as_fd(), &"not a command", &[]).unwrap();
        let error = recv::<Command>(b.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        fcntl(&b, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let error = recv::<Command>(b.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert!(recv::<Command>(b.as_fd()).unwrap().is_none());
    }

    #[test]
    fn both_ends_refuse_packets_over_the_limits() {
        let (a, b) = pair().unwrap();
        let error = send(a.as_fd(), &"x".repeat(MAX_PACKET), &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let file = tempfile::tempfile().unwrap();
        let files = vec![file.as_fd(); MAX_FILES + 1];
        let error = send(a.as_fd(), &"x", &files).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);

        let long = vec![b' '; MAX_PACKET + 1];
        nix::sys::socket::send(a.as_raw_fd(), &long, MsgFlags::empty()).unwrap();
        let error = recv::<Command>(b.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn missing_files_cost_neither_the_others_nor_the_message() {
        let (a, b) = pair().unwrap();
        let (carried, far) = pair().unwrap();
        let pong = Event::Pong { id: 7 };
        send(a.as_fd(), &pong, &[carried.as_fd(); 3]).unwrap();
        // As if this process had two descriptors left.
        let mut control = nix::cmsg_space!([RawFd; 2]);
        let (event, files) = recv_with::<Event>(b.as_fd(), &mut control)
            .unwrap()
            .unwrap();
        assert_eq!((event, files.len()), (pong.clone(), 2));
        send(a.as_fd(), &pong, &[carried.as_fd()]).unwrap();
        let (event, none) = recv_with::<Event>(b.as_fd(), &mut []).unwrap().unwrap();
        assert_eq!((event, none.len()), (pong, 0));
        drop((carried, files));
        assert!(recv::<Event>(far.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_packet_with_too_many_files_leaves_none_open() {
        let (a, b) = pair().unwrap();
        let (carried, far) = pair().unwrap();
        let raw = [carried.as_raw_fd(); MAX_FILES + 1];
        let bytes = encode(&Event::Pong { id: 7 }).unwrap();
        sendmsg::<()>(
            a.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        let error = recv::<Event>(b.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(carried);
        assert!(recv::<Event>(far.as_fd()).unwrap().is_none());
        // The next packet is received as usual.
        let pong = Event::Pong { id: 8 };
        send(a.as_fd(), &pong, &[]).unwrap();
        assert_eq!(recv::<Event>(b.as_fd()).unwrap().unwrap().0, pong);
    }

    fn event() -> impl Strategy<Value = Event> {
        let outcome = prop::sample::select(vec![
            DialOutcome::Connected,
            DialOutcome::Refused,
            DialOutcome::TimedOut,
            DialOutcome::Unavailable,
        ]);
        let text = || prop::collection::vec(any::<char>(), 0..20).prop_map(String::from_iter);
        let reason = prop_oneof![
            prop::sample::select(vec![
                ExitReason::PowerOff,
                ExitReason::Reboot,
                ExitReason::TripleFault,
                ExitReason::Panic,
                ExitReason::Stopped,
                ExitReason::Killed,
            ]),
            text().prop_map(|detail| ExitReason::Failed { detail }),
        ];
        let stats = (
            prop::collection::vec(any::<u64>(), 0..8),
            any::<Option<u64>>(),
            any::<(u64, u64, u64, u32)>(),
        );
        prop_oneof![
            any::<u64>().prop_map(|setup_us| Event::Running { setup_us }),
            text().prop_map(|reason| Event::StartFailed { reason }),
            any::<(u32, u32)>().prop_map(|(port, source_port)| Event::Opened { port, source_port }),
            (any::<u64>(), outcome).prop_map(|(id, outcome)| Event::Dialed { id, outcome }),
            any::<bool>().prop_map(|paused| Event::Paused { paused }),
            any::<u64>().prop_map(|id| Event::Pong { id }),
            stats.prop_map(|(exits, first_serial_us, counts)| {
                Event::Stats(Stats {
                    exits,
                    first_serial_us,
                    serial_dropped: counts.0,
                    violations: counts.1,
                    refused: counts.2,
                    vsock_connections: counts.3,
                })
            }),
            (text(), text())
                .prop_map(|(device, reason)| Event::DeviceNeedsReset { device, reason }),
            (text(), any::<u32>(), any::<bool>()).prop_map(|(disk, needed, quota)| {
                Event::NoSpace(NoSpace {
                    disk,
                    needed,
                    quota,
                })
            }),
            Just(Event::SpaceBack {}),
            (text(), text(), any::<bool>()).prop_map(|(disk, error, full)| {
                Event::DiskFailed(DiskFailed { disk, error, full })
            }),
            (prop::collection::vec(any::<u32>(), 0..4), any::<bool>())
                .prop_map(|(versions, busy)| Event::Refused { versions, busy }),
            (text(), any::<u64>(), any::<[bool; 3]>()).prop_map(|(name, generation, flags)| {
                Event::Attached(Box::new(Attached {
                    name,
                    generation,
                    paused: flags[0],
                    panicked: flags[1],
                    exit: flags[2].then_some(ExitReason::PowerOff),
                    ..Attached::default()
                }))
            }),
            Just(Event::GuestPanicked {}),
            reason.prop_map(Event::Exited),
        ]
    }

    proptest! {
        #[test]
        fn damaged_events_never_leak_files(
            event in event(),
            files in 0..=MAX_FILES,
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        ) {
            let (a, b) = pair().unwrap();
            let sent = vec![a.as_fd(); files];
            send(a.as_fd(), &event, &sent).unwrap();
            let (taken, carried) = recv::<Event>(b.as_fd()).unwrap().unwrap();
            prop_assert_eq!(&taken, &event);
            prop_assert_eq!(carried.len(), files);
            drop(carried);

            let mut bytes = encode(&event).unwrap();
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            send_bytes(a.as_fd(), &bytes, &sent).unwrap();
            match recv::<Event>(b.as_fd()) {
                Ok(taken) => prop_assert!(taken.is_some_and(|(_, carried)| carried.len() == files)),
                Err(error) => prop_assert_eq!(error.kind(), io::ErrorKind::InvalidData),
            }
            // No copy of the carried files is left open.
            drop(a);
            prop_assert!(recv::<Event>(b.as_fd()).unwrap().is_none());
        }
    }
}
