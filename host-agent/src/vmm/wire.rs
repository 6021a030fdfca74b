//! Packets on the control socket: one JSON message and its file descriptors.
//!
//! Both ends use these functions. Whether a call waits depends on `O_NONBLOCK` of
//! the socket; `WouldBlock` is returned for the caller's event loop.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, accept4, recvmsg, sendmsg,
    socketpair,
};
use serde::{Serialize, de::DeserializeOwned};

/// Bytes before the descriptors in a control message.
const CMSG_HEADER: usize = 16;
/// Most descriptors that the kernel puts into one packet (`SCM_MAX_FD`). All are taken,
/// also where none belong: those without space the kernel drops on the thread that
/// receives, and their close may wait.
const KERNEL_FILES: usize = 253;
/// Bytes of a control message with that many descriptors.
const CONTROL: usize = CMSG_HEADER + (KERNEL_FILES * size_of::<RawFd>()).next_multiple_of(8);

/// A direction of the control socket, and its bounds.
pub trait Packet: Serialize {
    /// Longest packet in bytes.
    const MAX_BYTES: usize;
    /// Most file descriptors beside this message.
    fn max_files(&self) -> usize;
}

/// One packet.
#[derive(Debug)]
pub struct Received<T> {
    /// The message. `InvalidData` if the packet is longer or carries more files than the
    /// protocol allows, or is not a `T`.
    pub message: io::Result<T>,
    /// Every file of the packet, whatever the message is. They are close-on-exec. Files for
    /// which this process has no descriptor left are missing at the end: the caller must
    /// check that they are there.
    pub files: Vec<OwnedFd>,
}

thread_local! {
    /// The last packet that this thread received.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

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
/// `InvalidInput` if the message is longer or carries more files than a `T` may;
/// otherwise the error of the socket.
pub fn send<T: Packet>(
    socket: BorrowedFd<'_>,
    message: &T,
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = encode(message)?;
    if files.len() > message.max_files() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "control message with {} files, the limit is {}",
                files.len(),
                message.max_files()
            ),
        ));
    }
    send_bytes(socket, &bytes, files)
}

/// The bytes of a message, for a caller that may have to send them later.
pub fn encode<T: Packet>(message: &T) -> io::Result<Vec<u8>> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > T::MAX_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "control message of {} bytes, the limit is {}",
                bytes.len(),
                T::MAX_BYTES
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

/// Receives one message and its files, and closes the files of a packet that is not
/// valid; `None` when the other end is closed. See [`receive`].
///
/// # Errors
/// That of the message or of the socket.
pub fn recv<T: Packet + DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    match receive(socket)? {
        Some(Received { message, files }) => Ok(Some((message?, files))),
        None => Ok(None),
    }
}

/// Receives one packet; `None` when the other end is closed.
///
/// # Errors
/// That of the socket. After a packet that is not valid the next call receives the next
/// packet.
pub fn receive<T: Packet + DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> io::Result<Option<Received<T>>> {
    receive_with(socket, &mut [0; CONTROL])
}

fn receive_with<T: Packet + DeserializeOwned>(
    socket: BorrowedFd<'_>,
    control: &mut [u8],
) -> io::Result<Option<Received<T>>> {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < T::MAX_BYTES {
            buffer.resize(T::MAX_BYTES, 0);
        }
        let bytes = &mut buffer[..T::MAX_BYTES];
        let (length, flags) = receive_into(socket, bytes, control)?;
        let files = installed(control);
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text);
        let message = if flags.contains(MsgFlags::MSG_TRUNC) {
            Err(invalid("control packet is longer than the protocol allows"))
        } else if length == 0 && files.is_empty() {
            return Ok(None);
        } else {
            match serde_json::from_slice::<T>(&bytes[..length]) {
                Ok(message) if files.len() > message.max_files() => Err(invalid(
                    "control packet carries more files than the protocol allows",
                )),
                message => {
                    message.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
                }
            }
        };
        Ok(Some(Received { message, files }))
    })
}

/// Accepts a connection, which is close-on-exec and does not block: no further call sets
/// that, which the filter of the thread would have to allow for every descriptor.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(owned(accept4(listener.as_raw_fd(), flags)?))
}

/// Receives bytes of a stream socket, and the descriptors beside them.
pub fn recv_bytes(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = [0; CONTROL];
    let (length, _) = receive_into(socket, bytes, &mut control)?;
    Ok((length, installed(&control)))
}

/// One `recvmsg(2)`. `control` must be all zeros.
fn receive_into(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    control: &mut [u8],
) -> io::Result<(usize, MsgFlags)> {
    loop {
        let mut parts = [IoSliceMut::new(bytes)];
        match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut *control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(message) => return Ok((message.bytes, message.flags)),
            // The other end closed with a packet unread: reported once, before the
            // packets that it sent.
            Err(Errno::EINTR | Errno::ECONNRESET) => {}
            Err(error) => return Err(error.into()),
        }
    }
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
    // SAFETY: the kernel has just installed this descriptor for the caller;
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
        Attached, Command, DialOutcome, DiskFailed, Event, ExitReason, MAX_COMMAND, MAX_EVENT,
        MAX_FILES, MAX_TEXT, NoSpace, Stats,
    };

    /// A packet of a stranger.
    impl Packet for &str {
        const MAX_BYTES: usize = MAX_COMMAND;

        fn max_files(&self) -> usize {
            MAX_FILES
        }
    }

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
        let error = send(a.as_fd(), &&*"x".repeat(MAX_COMMAND), &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let file = tempfile::tempfile().unwrap();
        let files = vec![file.as_fd(); MAX_FILES + 1];
        let error = send(a.as_fd(), &"x", &files).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);

        let long = vec![b' '; MAX_COMMAND + 1];
        for (length, is_event) in [(MAX_COMMAND + 1, false), (MAX_EVENT + 1, true)] {
            send_bytes(a.as_fd(), &long[..length], &[]).unwrap();
            let error = if is_event {
                recv::<Event>(b.as_fd()).unwrap_err()
            } else {
                recv::<Command>(b.as_fd()).unwrap_err()
            };
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(error.to_string().contains("longer"), "{error}");
        }
    }

    #[test]
    fn the_longest_reason_of_an_exit_fits_into_an_event() {
        let detail = "\u{1}".repeat(10 * MAX_TEXT);
        let reason = ExitReason::Failed { detail }.bounded();
        encode(&Event::Exited(reason.clone())).unwrap();
        let attached = Attached {
            exit: Some(reason),
            ..Attached::default()
        };
        let length = encode(&Event::Attached(Box::new(attached))).unwrap().len();
        assert!(MAX_EVENT - length > 2048, "{length}");
        let detail = "\u{10ffff}".repeat(MAX_TEXT);
        let ExitReason::Failed { detail } = ExitReason::Failed { detail }.bounded() else {
            panic!("it became another reason");
        };
        assert_eq!(detail.len(), MAX_TEXT);
    }

    #[test]
    fn missing_files_cost_neither_the_others_nor_the_message() {
        let (a, b) = pair().unwrap();
        let (carried, far) = pair().unwrap();
        let stop = Command::Stop {};
        send(a.as_fd(), &stop, &[carried.as_fd(); 3]).unwrap();
        // As if this process had two descriptors left.
        let mut control = nix::cmsg_space!([RawFd; 2]);
        let next = |control: &mut [u8]| receive_with::<Command>(b.as_fd(), control);
        let Received { message, files } = next(&mut control).unwrap().unwrap();
        assert_eq!((message.unwrap(), files.len()), (stop.clone(), 2));
        send(a.as_fd(), &stop, &[carried.as_fd()]).unwrap();
        let none = next(&mut []).unwrap().unwrap();
        assert_eq!((none.message.unwrap(), none.files.len()), (stop, 0));
        drop((carried, files));
        assert!(recv::<Event>(far.as_fd()).unwrap().is_none());
    }

    #[test]
    fn every_file_of_a_packet_with_too_many_is_taken() {
        let (a, b) = pair().unwrap();
        let (carried, far) = pair().unwrap();
        let bytes = encode(&Event::Pong { id: 7 }).unwrap();
        for count in [2, KERNEL_FILES] {
            send_bytes(a.as_fd(), &bytes, &vec![carried.as_fd(); count]).unwrap();
            let Received { message, files } = receive::<Event>(b.as_fd()).unwrap().unwrap();
            assert_eq!(message.unwrap_err().kind(), io::ErrorKind::InvalidData);
            assert_eq!(files.len(), count);
        }
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
            any::<u64>().prop_map(|setup_us| Event::Running {
                setup_us,
                sandbox: crate::vmm::sandbox::SandboxReport::default(),
            }),
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
            files in 0..=1_usize,
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
