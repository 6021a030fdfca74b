//! The fixed layout of a diff: a subset of qcow2.
//!
//! The file is qcow2 version 3 with 64 KiB clusters, 16-bit reference counts and
//! no feature bits (QEMU's `docs/interop/qcow2.txt`, below qcow2.txt). The virtual
//! size determines the position of all metadata, which is complete, though sparse,
//! from the start:
//!
//! ```text
//! header | L1 table | refcount table | refcount blocks | L2 tables | data …
//! ```
//!
//! So no table is allocated, moved or extended later. An image with another layout
//! is refused.

/// `cluster_bits`: log2 of the cluster size (qcow2.txt, header).
const CLUSTER_BITS: u32 = 16;
/// Bytes of a cluster, the unit of allocation and of tables.
pub const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of an L2 table, which maps 512 MiB.
pub const L2_ENTRIES: u64 = CLUSTER / 8;
/// Reference counts in a refcount block, which covers 2 GiB of the file.
const REFCOUNTS: u64 = CLUSTER / 2;
/// Largest virtual size in bytes: 256 GiB. It bounds the time to open a diff and
/// the memory of its map.
pub const MAX_VIRTUAL_SIZE: u64 = 256 << 30;
/// Longest backing file name (qcow2.txt, `backing_file_size`).
pub const MAX_NAME: usize = 1023;

/// Bit 63 of L1 and L2 entries: the reference count is exactly 1 (qcow2.txt, cluster
/// mapping).
pub const COPIED: u64 = 1 << 63;

/// Values of header fields (qcow2.txt, header).
const MAGIC: u32 = 0x5146_49fb; // "QFI\xfb"
const VERSION: u32 = 3;
const HEADER_LENGTH: u32 = 104;
const REFCOUNT_ORDER: u32 = 4;
/// Header extension type "backing file format name" (qcow2.txt, header extensions).
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension type "feature name table", which QEMU writes and this program
/// ignores.
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const RAW: &[u8] = b"raw";

/// Bytes of the file with the header, its extensions and the backing file name.
pub const HEAD: usize = 4096;

/// How an image differs from a diff that this program creates.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// A header field has another value.
    #[error("header field {field} is {found:#x}, expected {expected:#x}")]
    Field {
        /// Its name in qcow2.txt.
        field: &'static str,
        /// Its value.
        found: u64,
        /// The only accepted value.
        expected: u64,
    },
    /// The virtual size is not supported.
    #[error("virtual size of {0} bytes; supported are multiples of 512 up to {MAX_VIRTUAL_SIZE}")]
    VirtualSize(u64),
    /// An unsupported header extension.
    #[error("header extension {0:#010x}")]
    Extension(u32),
    /// The format of the backing file is not raw.
    #[error("the backing file has another format than raw")]
    BackingFormat,
    /// The name of the base is empty, too long, or contains a control character.
    #[error("the name of the base image is not usable")]
    BackingName,
    /// The file ends before the end of its metadata, or of a cluster in use.
    #[error("the file has {found} bytes and refers to {expected}")]
    Truncated {
        /// Length of the file.
        found: u64,
        /// Its least length.
        expected: u64,
    },
    /// A table entry has an invalid value.
    #[error("entry {index} of the {table} is {found:#x}")]
    Entry {
        /// Which table.
        table: &'static str,
        /// Index of the entry: in L2 tables the cluster of the virtual disk.
        index: u64,
        /// Its value.
        found: u64,
    },
}

/// Positions of all parts of the file, in clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Number of L2 tables.
    pub l2_tables: u64,
    /// Number of refcount blocks.
    refcount_blocks: u64,
    refcount_table: u64,
    refcount_table_clusters: u64,
    first_refcount_block: u64,
    first_l2: u64,
    /// The first data cluster.
    pub first_data: u32,
    /// The cluster after the last possible data cluster.
    pub end: u32,
}

/// Cluster of the L1 table, which follows the header.
const L1_TABLE: u64 = 1;

impl Layout {
    /// The only layout of a disk of `virtual_size` bytes.
    pub fn new(virtual_size: u64) -> Result<Self, LayoutError> {
        if virtual_size == 0
            || !virtual_size.is_multiple_of(super::super::SECTOR)
            || virtual_size > MAX_VIRTUAL_SIZE
        {
            return Err(LayoutError::VirtualSize(virtual_size));
        }
        let data = virtual_size.div_ceil(CLUSTER);
        let l2_tables = data.div_ceil(L2_ENTRIES);
        let l1_clusters = (l2_tables * 8).div_ceil(CLUSTER);
        // Refcount blocks also count themselves: increase their number until they
        // cover the whole file.
        let mut refcount_blocks = 1_u64;
        loop {
            let refcount_table_clusters = (refcount_blocks * 8).div_ceil(CLUSTER);
            let refcount_table = L1_TABLE + l1_clusters;
            let first_refcount_block = refcount_table + refcount_table_clusters;
            let first_l2 = first_refcount_block + refcount_blocks;
            let first_data = first_l2 + l2_tables;
            let end = first_data + data;
            let needed = end.div_ceil(REFCOUNTS);
            if needed <= refcount_blocks {
                let fits = "MAX_VIRTUAL_SIZE is less than 2^32 clusters";
                return Ok(Self {
                    virtual_size,
                    l2_tables,
                    refcount_blocks,
                    refcount_table,
                    refcount_table_clusters,
                    first_refcount_block,
                    first_l2,
                    first_data: u32::try_from(first_data).expect(fits),
                    end: u32::try_from(end).expect(fits),
                });
            }
            refcount_blocks = needed;
        }
    }

    /// Bytes of metadata; data follows.
    pub fn metadata_bytes(&self) -> u64 {
        u64::from(self.first_data) * CLUSTER
    }

    /// Position in bytes of L2 table `table`.
    pub fn l2_offset(&self, table: u64) -> u64 {
        (self.first_l2 + table) * CLUSTER
    }

    /// Position in bytes of the reference count of `cluster`. The blocks are
    /// contiguous, so all counts are one array.
    pub fn refcount_offset(&self, cluster: u32) -> u64 {
        self.first_refcount_block * CLUSTER + 2 * u64::from(cluster)
    }

    /// Position in bytes and content of the L1 table.
    pub fn l1(&self) -> (u64, Vec<u8>) {
        let entries = (0..self.l2_tables).map(|table| self.l2_offset(table) | COPIED);
        (L1_TABLE * CLUSTER, big_endian(entries))
    }

    /// Position in bytes and content of the refcount table.
    pub fn refcounts(&self) -> (u64, Vec<u8>) {
        let blocks = 0..self.refcount_blocks;
        let entries = blocks.map(|block| (self.first_refcount_block + block) * CLUSTER);
        (self.refcount_table * CLUSTER, big_endian(entries))
    }

    /// The first [`HEAD`] bytes of the file, with `base_name` as the raw base's name.
    pub fn head(&self, base_name: &str) -> Result<Vec<u8>, LayoutError> {
        if base_name.is_empty()
            || base_name.len() > MAX_NAME
            || base_name.chars().any(char::is_control)
        {
            return Err(LayoutError::BackingName);
        }
        let name_at = HEADER_LENGTH + 8 + 8 + 8; // extension (padded), end of extensions
        let mut head = Vec::with_capacity(HEAD);
        for field in self.fields() {
            let value = match field.name {
                BACKING_OFFSET => u64::from(name_at),
                BACKING_SIZE => base_name.len() as u64,
                _ => field.value,
            };
            head.extend_from_slice(&value.to_be_bytes()[8 - field.bytes..]);
        }
        head.extend_from_slice(&EXT_BACKING_FORMAT.to_be_bytes());
        head.extend_from_slice(&(RAW.len() as u32).to_be_bytes());
        head.extend_from_slice(RAW);
        head.resize(name_at as usize, 0);
        head.extend_from_slice(base_name.as_bytes());
        head.resize(HEAD, 0);
        Ok(head)
    }

    /// The header's fields in order, with their only accepted values.
    fn fields(&self) -> [HeaderField; 18] {
        let field = |name, bytes, value| HeaderField { name, bytes, value };
        [
            field("magic", 4, u64::from(MAGIC)),
            field("version", 4, u64::from(VERSION)),
            field(BACKING_OFFSET, 8, 0),
            field(BACKING_SIZE, 4, 0),
            field("cluster_bits", 4, u64::from(CLUSTER_BITS)),
            field("size", 8, self.virtual_size),
            field("crypt_method", 4, 0),
            field("l1_size", 4, self.l2_tables),
            field("l1_table_offset", 8, L1_TABLE * CLUSTER),
            field("refcount_table_offset", 8, self.refcount_table * CLUSTER),
            field("refcount_table_clusters", 4, self.refcount_table_clusters),
            field("nb_snapshots", 4, 0),
            field("snapshots_offset", 8, 0),
            field("incompatible_features", 8, 0),
            field("compatible_features", 8, 0),
            field("autoclear_features", 8, 0),
            field("refcount_order", 4, u64::from(REFCOUNT_ORDER)),
            field(LENGTH, 4, u64::from(HEADER_LENGTH)),
        ]
    }

    /// Reads the layout from the first bytes of a file and refuses any other layout.
    /// The backing file name is not returned: no file may be opened by it.
    pub fn parse(head: &[u8; HEAD]) -> Result<Self, LayoutError> {
        // Checked first, because the other fields depend on them.
        for (field, at, expected) in [("magic", 0, MAGIC), ("version", 4, VERSION)] {
            let found = be32(head, at);
            if found != expected {
                return Err(LayoutError::Field {
                    field,
                    found: u64::from(found),
                    expected: u64::from(expected),
                });
            }
        }
        let layout = Self::new(be64(head, 24))?;
        let (mut at, mut name_at, mut name_len, mut length) = (0, 0, 0, 0);
        for field in layout.fields() {
            let mut value = [0; 8];
            value[8 - field.bytes..].copy_from_slice(&head[at..at + field.bytes]);
            let found = u64::from_be_bytes(value);
            at += field.bytes;
            match field.name {
                BACKING_OFFSET => name_at = found,
                BACKING_SIZE => name_len = found,
                // Since version 5.1 QEMU writes the compression type too (one byte
                // and padding; 0 is the default).
                LENGTH if found == 112 => {
                    length = 112;
                    if be64(head, 104) != 0 {
                        return Err(LayoutError::Field {
                            field: "compression_type",
                            found: be64(head, 104),
                            expected: 0,
                        });
                    }
                }
                _ if found != field.value => {
                    return Err(LayoutError::Field {
                        field: field.name,
                        found,
                        expected: field.value,
                    });
                }
                _ => {}
            }
        }
        let length = if length == 0 { HEADER_LENGTH } else { length };
        parse_extensions(head, length as usize)?;
        let name_end = name_at.saturating_add(name_len);
        if name_len == 0 || name_len > MAX_NAME as u64 || name_end > HEAD as u64 {
            return Err(LayoutError::BackingName);
        }
        Ok(layout)
    }
}

/// One field of the header.
struct HeaderField {
    name: &'static str,
    bytes: usize,
    value: u64,
}

const BACKING_OFFSET: &str = "backing_file_offset";
const BACKING_SIZE: &str = "backing_file_size";
const LENGTH: &str = "header_length";

fn parse_extensions(head: &[u8; HEAD], start: usize) -> Result<(), LayoutError> {
    let mut at = start;
    let mut raw = false;
    // Terminates: every extension has at least 8 bytes.
    while at + 8 <= HEAD {
        let (kind, len) = (be32(head, at), be32(head, at + 4) as usize);
        let data = head.get(at + 8..(at + 8).saturating_add(len));
        match (kind, data) {
            (0, _) => break,
            (EXT_BACKING_FORMAT, Some(data)) if data == RAW => raw = true,
            (EXT_BACKING_FORMAT, _) => return Err(LayoutError::BackingFormat),
            (EXT_FEATURE_NAMES, Some(_)) => {}
            _ => return Err(LayoutError::Extension(kind)),
        }
        at += 8 + len.next_multiple_of(8);
    }
    if raw {
        Ok(())
    } else {
        Err(LayoutError::BackingFormat)
    }
}

fn be32(head: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(
        head[at..at + 4]
            .try_into()
            .expect("the range has four bytes"),
    )
}

fn be64(head: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(
        head[at..at + 8]
            .try_into()
            .expect("the range has eight bytes"),
    )
}

/// Table entries in the byte order of the file.
pub fn big_endian(entries: impl Iterator<Item = u64>) -> Vec<u8> {
    entries.flat_map(u64::to_be_bytes).collect()
}
