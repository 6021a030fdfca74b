//! Validation of virtio-blk requests by their header and lengths alone.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use crate::vmm::disk::SECTOR;

/// Bytes of the header: type, reserved, sector (virtio 1.2, 5.2.6).
pub const HEADER: u32 = 16;

/// A valid request: its range lies in the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Fill the first `len` writable bytes from `offset` on the disk.
    Read {
        /// Byte offset on the disk.
        offset: u64,
        /// Bytes, a multiple of [`SECTOR`].
        len: u32,
    },
    /// Write the `len` readable bytes after the header to `offset`.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// Bytes, a multiple of [`SECTOR`].
        len: u32,
    },
    /// Make all completed writes durable.
    Flush,
    /// Fill in `len` bytes of the serial number.
    Serial {
        /// At most [`VIRTIO_BLK_ID_BYTES`].
        len: u32,
    },
}

/// Why a request is invalid. The driver gets an error status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The header is incomplete.
    #[error("header of {0} bytes")]
    ShortHeader(u32),
    /// A type whose feature is not offered: discard, write zeroes, SCSI, …
    #[error("unsupported request type {0}")]
    Type(u32),
    /// The data is not a multiple of the sector size.
    #[error("data of {0} bytes")]
    Unaligned(u32),
    /// The range ends beyond the end of the disk.
    #[error("{len} bytes at sector {sector}, beyond the end")]
    Range {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// A write to a read-only disk, even if the driver did not accept
    /// `VIRTIO_BLK_F_RO`.
    #[error("write to a read-only disk")]
    ReadOnly,
    /// The chain has data of the wrong direction for the type.
    #[error("{0} bytes in the wrong direction")]
    Direction(u32),
}

/// The properties of a disk that decide about requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// Validates a request with `readable` bytes, including the header, and
/// `writable` bytes, without the status byte. `header` is the only copy of the
/// guest's memory, padded with zeros.
pub fn parse(
    header: &[u8; HEADER as usize],
    readable: u32,
    writable: u32,
    disk: Geometry,
) -> Result<Request, Refusal> {
    let Some(data) = readable.checked_sub(HEADER) else {
        return Err(Refusal::ShortHeader(readable));
    };
    let [kind, _reserved, low, high] = words(header);
    let sector = u64::from(low) | u64::from(high) << 32;
    match kind {
        VIRTIO_BLK_T_IN => {
            none(data)?;
            let offset = range(sector, writable, disk.size)?;
            Ok(Request::Read {
                offset,
                len: writable,
            })
        }
        VIRTIO_BLK_T_OUT => {
            none(writable)?;
            if disk.read_only {
                return Err(Refusal::ReadOnly);
            }
            let offset = range(sector, data, disk.size)?;
            Ok(Request::Write { offset, len: data })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID => {
            none(data)?;
            Ok(Request::Serial {
                len: writable.min(VIRTIO_BLK_ID_BYTES),
            })
        }
        other => Err(Refusal::Type(other)),
    }
}

fn words(header: &[u8; HEADER as usize]) -> [u32; 4] {
    std::array::from_fn(|i| {
        let bytes = header[4 * i..4 * i + 4].try_into();
        u32::from_le_bytes(bytes.expect("four bytes"))
    })
}

fn none(len: u32) -> Result<(), Refusal> {
    if len == 0 {
        Ok(())
    } else {
        Err(Refusal::Direction(len))
    }
}

/// Byte offset of `sector`, if `len` bytes from there lie in a disk of `size` bytes.
fn range(sector: u64, len: u32, size: u64) -> Result<u64, Refusal> {
    if !u64::from(len).is_multiple_of(SECTOR) {
        return Err(Refusal::Unaligned(len));
    }
    let beyond = Refusal::Range { sector, len };
    let offset = sector.checked_mul(SECTOR).ok_or(beyond)?;
    match offset.checked_add(u64::from(len)) {
        Some(end) if end <= size => Ok(offset),
        _ => Err(beyond),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK: Geometry = Geometry {
        size: 100 * SECTOR,
        read_only: false,
    };

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    #[test]
    fn a_range_that_ends_beyond_the_disk_is_refused() {
        let sectors = [
            0,
            1,
            99,
            100,
            101,
            1 << 54,
            1 << 55,
            u64::MAX / 512,
            u64::MAX,
        ];
        let lengths = [
            0,
            1,
            511,
            512,
            513,
            51_200,
            51_712,
            u32::MAX - 511,
            u32::MAX - 16,
        ];
        for (sector, len) in sectors.iter().flat_map(|s| lengths.map(|l| (*s, l))) {
            let fits = len % 512 == 0
                && u128::from(sector) * 512 + u128::from(len) <= u128::from(DISK.size);
            let read = parse(&header(VIRTIO_BLK_T_IN, sector), 16, len, DISK);
            assert_eq!(read.is_ok(), fits, "read {len} at {sector}");
            let write = parse(&header(VIRTIO_BLK_T_OUT, sector), len + 16, 0, DISK);
            assert_eq!(write.is_ok(), fits, "write {len} at {sector}");
            if fits {
                let offset = sector * 512;
                assert_eq!(read, Ok(Request::Read { offset, len }));
                assert_eq!(write, Ok(Request::Write { offset, len }));
            }
        }
    }

    #[test]
    fn unknown_types_and_short_headers_are_refused() {
        for kind in (0..64).chain([u32::MAX, 0x8000_0000]) {
            let result = parse(&header(kind, 0), 16, 512, DISK);
            match kind {
                0 | 4 | 8 => assert!(result.is_ok(), "{kind}"),
                1 => assert_eq!(result, Err(Refusal::Direction(512))),
                _ => assert_eq!(result, Err(Refusal::Type(kind))),
            }
            for len in 0..16 {
                let result = parse(&header(kind, 0), len, 512, DISK);
                assert_eq!(result, Err(Refusal::ShortHeader(len)));
            }
        }
    }

    #[test]
    fn a_read_only_disk_refuses_only_writes() {
        let disk = Geometry {
            read_only: true,
            ..DISK
        };
        let write = parse(&header(VIRTIO_BLK_T_OUT, 0), 528, 0, disk);
        assert_eq!(write, Err(Refusal::ReadOnly));
        assert!(parse(&header(VIRTIO_BLK_T_IN, 0), 16, 512, disk).is_ok());
        assert!(parse(&header(VIRTIO_BLK_T_FLUSH, 0), 16, 0, disk).is_ok());
        let serial = parse(&header(VIRTIO_BLK_T_GET_ID, 0), 16, 4096, disk);
        assert_eq!(serial, Ok(Request::Serial { len: 20 }));
    }

    proptest! {
        #[test]
        fn no_header_causes_an_overflow(
            header: [u8; 16], readable: u32, writable: u32, sectors in 0..u64::MAX / 512,
            read_only: bool,
        ) {
            let disk = Geometry { size: sectors * 512, read_only };
            match parse(&header, readable, writable, disk) {
                Ok(Request::Read { offset, len }) => {
                    prop_assert!(offset + u64::from(len) <= disk.size);
                    prop_assert!(len <= writable);
                }
                Ok(Request::Write { offset, len }) => {
                    prop_assert!(!read_only && offset + u64::from(len) <= disk.size);
                    prop_assert!(len + 16 <= readable);
                }
                Ok(Request::Serial { len }) => prop_assert!(len <= writable.min(20)),
                Ok(Request::Flush) | Err(_) => {}
            }
        }
    }
}
