//! Messages of guests on the bus, and of VMM processes on the control socket.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::de::DeserializeOwned;
use vmbus::frame::{Decoder, Message, encode};
use vmbus::message::{ExecInput, ExecOutput, ExecRequest, ToGuest, ToHost};
use vmbus::version::{Hello, Welcome};

use super::input::Input;
use crate::vmm::control::{Command, Event};
use crate::vmm::wire::{self, Packet};

/// Most descriptors in a packet of [`control_events`].
const FILES: u8 = 40;

/// A stream of frames, in pieces of any size, read as each type of message.
pub fn bus_frames(data: &[u8]) {
    let mut input = Input(data);
    let Some([kind, piece]) = input.take() else {
        return;
    };
    let read = match kind % 7 {
        0 => decode::<ToHost>,
        1 => decode::<ToGuest>,
        2 => decode::<ExecRequest>,
        3 => decode::<ExecInput>,
        4 => decode::<ExecOutput>,
        5 => decode::<Hello>,
        _ => decode::<Welcome>,
    };
    read(input.0, usize::from(piece) + 1);
}

fn decode<T: Message>(bytes: &[u8], piece: usize) {
    let mut decoder = Decoder::new();
    for piece in bytes.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.take_frame::<T>() {
                Ok(Some(message)) => check_message(&message),
                Ok(None) => break,
                // No frame boundary is known any more.
                Err(_) => return,
            }
        }
    }
}

/// A message that was read can be sent, and is the same when it is read again.
fn check_message<T: Message>(message: &T) {
    // Escapes can make it longer than the one that was read.
    let Ok(frame) = encode(message) else {
        return;
    };
    let mut decoder = Decoder::new();
    decoder.push(&frame);
    let again = decoder.take_frame::<T>().unwrap().unwrap();
    assert!(decoder.is_empty());
    assert_eq!(encode(&again).unwrap(), frame);
}

/// Packets of a VMM process or of a supervisor, each with some descriptors.
pub fn control_events(data: &[u8]) {
    let mut input = Input(data);
    let Some(kind) = input.byte() else {
        return;
    };
    if kind % 2 == 0 {
        exchange::<Event>(&mut input);
    } else {
        exchange::<Command>(&mut input);
    }
}

fn exchange<T: Packet + DeserializeOwned>(input: &mut Input<'_>) {
    let (ours, theirs) = wire::pair().unwrap();
    while let (Some(files), Some(length)) = (input.byte(), input.word()) {
        let bytes = input.bytes(length.into());
        if bytes.is_empty() {
            // An empty packet is the end of the stream.
            return;
        }
        send(&theirs, bytes, files % FILES);
        let received = wire::receive::<T>(ours.as_fd()).unwrap().unwrap();
        match received.message {
            Ok(message) => {
                assert!(received.files.len() <= message.max_files());
                if let Ok(again) = wire::encode(&message) {
                    send(&theirs, &again, 0);
                    let again = wire::receive::<T>(ours.as_fd()).unwrap().unwrap();
                    let again = again.message.unwrap();
                    assert_eq!(
                        serde_json::to_value(&message).unwrap(),
                        serde_json::to_value(&again).unwrap()
                    );
                }
            }
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidData),
        }
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], files: u8) {
    let raw = vec![socket.as_raw_fd(); files.into()];
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[_] = if raw.is_empty() { &[] } else { &rights };
    let bytes = [io::IoSlice::new(bytes)];
    sendmsg::<()>(socket.as_raw_fd(), &bytes, control, MsgFlags::empty(), None).unwrap();
}
