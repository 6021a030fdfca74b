//! The header of a vsock packet, parsed from a single copy of the guest's memory.

use super::connection::Shutdown;

/// Bytes of a header (virtio 1.2, 5.10.6, `struct virtio_vsock_hdr`).
pub const HEADER_SIZE: usize = 44;

/// Largest payload of one packet, in bytes. Linux sends no more in either
/// direction (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type offered (virtio 1.2, 5.10.6).
pub const TYPE_STREAM: u16 = 1;

/// Operation of a packet (virtio 1.2, 5.10.6, `enum virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Requests a connection.
    Request,
    /// Accepts a connection.
    Response,
    /// Ends or refuses a connection at once.
    Reset,
    /// Ends the directions in the flags.
    Shutdown,
    /// Carries payload.
    Data,
    /// Carries only the sender's credit.
    CreditUpdate,
    /// Requests a credit update.
    CreditRequest,
}

impl Operation {
    /// The operation with this code.
    pub const fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    /// Its code in a header.
    pub const fn code(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// The fields of a header. Parsing accepts every bit pattern; the connection table
/// and the connection validate them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// Socket type (`type`).
    pub kind: u16,
    /// Operation code; see [`Operation::from_code`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// The sender's buffer for the connection, in bytes.
    pub buf_alloc: u32,
    /// Bytes consumed from the sender's buffer since the connection began, modulo
    /// 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Parses the little-endian layout.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// The little-endian layout.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The operation, if its code is known.
    pub const fn operation(&self) -> Option<Operation> {
        Operation::from_code(self.op)
    }

    /// The flags of a [`Operation::Shutdown`].
    pub const fn shutdown(&self) -> Shutdown {
        Shutdown::from_flags(self.flags)
    }

    /// The reset that answers `self`. It has the same socket type, even one that
    /// the device does not offer.
    pub const fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Operation::Reset.code(),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_has_the_layout_of_the_specification() {
        let header = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 0x100f_0e0d_0c0b_0a09,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1c1b_1a19,
            kind: 0x1e1d,
            op: 0x201f,
            flags: 0x2423_2221,
            buf_alloc: 0x2827_2625,
            fwd_cnt: 0x2c2b_2a29,
        };
        let expected: Vec<u8> = (1..=44).collect();
        assert_eq!(header.to_bytes().as_slice(), expected);
    }

    proptest! {
        #[test]
        fn every_bit_pattern_is_parsed_without_loss(
            bytes in proptest::array::uniform32(any::<u8>()),
            tail in proptest::array::uniform12(any::<u8>()),
        ) {
            let mut raw = [0; HEADER_SIZE];
            raw[..32].copy_from_slice(&bytes);
            raw[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::parse(&raw).to_bytes(), raw);
        }
    }

    #[test]
    fn operations_and_codes_map_one_to_one() {
        for code in 0..=u16::MAX {
            if let Some(operation) = Operation::from_code(code) {
                assert_eq!(operation.code(), code);
            }
        }
        assert_eq!((0..=u16::MAX).filter_map(Operation::from_code).count(), 7);
    }
}
