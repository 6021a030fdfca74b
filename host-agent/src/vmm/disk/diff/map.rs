//! Maps clusters of the virtual disk to clusters of the file. Pure.

use std::ops::Range;

use super::layout::{CLUSTER, COPIED, L2_ENTRIES, Layout, LayoutError};

/// L2 entries per sector, the unit in which tables are written.
const ENTRIES_PER_SECTOR: usize = 64;

/// Consecutive clusters of the virtual disk that one read or write serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// Clusters of the base.
    Base {
        /// Their number.
        clusters: u64,
    },
    /// Clusters that are consecutive in the file too.
    Allocated {
        /// Cluster of the file for the first of them.
        first: u32,
        /// Their number.
        clusters: u64,
    },
}

/// The mapping as the tables in the file will be after the next flush.
#[derive(Debug)]
pub struct ClusterMap {
    /// The L2 tables; `None` for one without entries.
    tables: Vec<Option<L2Table>>,
}

#[derive(Debug)]
struct L2Table {
    /// Cluster of the file for each cluster of the virtual disk; 0, which is the
    /// header, for a cluster of the base.
    clusters: Box<[u32]>,
    /// Entries that may differ from those in the file.
    dirty: Range<usize>,
}

impl L2Table {
    fn new() -> Self {
        Self {
            clusters: vec![0; L2_ENTRIES as usize].into_boxed_slice(),
            dirty: 0..0,
        }
    }
}

impl ClusterMap {
    /// A map of a disk that has only clusters of the base.
    pub fn new(layout: &Layout) -> Self {
        Self {
            tables: (0..layout.l2_tables).map(|_| None).collect(),
        }
    }

    /// Loads L2 table `table` from its content in the file, and marks the clusters
    /// of its entries in `used`.
    pub fn load(
        &mut self,
        layout: &Layout,
        used: &mut UsedClusters,
        table: usize,
        bytes: &[u8],
    ) -> Result<(), LayoutError> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let clusters = layout.virtual_size.div_ceil(CLUSTER);
        let mut new = L2Table::new();
        for (entry, bytes) in bytes.chunks_exact(8).enumerate() {
            let found = u64::from_be_bytes(bytes.try_into().expect("the chunk has eight bytes"));
            if found == 0 {
                continue;
            }
            let index = table as u64 * L2_ENTRIES + entry as u64;
            let offset = found & !COPIED;
            let cluster = u32::try_from(offset / CLUSTER).unwrap_or(u32::MAX);
            let valid = found & COPIED != 0
                && offset.is_multiple_of(CLUSTER)
                && index < clusters
                && (layout.first_data..layout.end).contains(&cluster)
                && used.mark(cluster);
            if !valid {
                return Err(LayoutError::Entry {
                    table: "L2 tables",
                    index,
                    found,
                });
            }
            new.clusters[entry] = cluster;
        }
        self.tables[table] = Some(new);
        Ok(())
    }

    fn get(&self, cluster: u64) -> u32 {
        let (table, entry) = split(cluster);
        self.tables[table]
            .as_ref()
            .map_or(0, |table| table.clusters[entry])
    }

    /// The longest run from `cluster` on, at most `max` clusters.
    pub fn run(&self, cluster: u64, max: u64) -> Run {
        let first = self.get(cluster);
        let mut clusters = 1;
        while clusters < max {
            let next = self.get(cluster + clusters);
            let follows = if first == 0 {
                next == 0
            } else {
                u64::from(next) == u64::from(first) + clusters
            };
            if !follows {
                break;
            }
            clusters += 1;
        }
        if first == 0 {
            Run::Base { clusters }
        } else {
            Run::Allocated { first, clusters }
        }
    }

    /// Maps `cluster` of the virtual disk to cluster `allocated` of the file.
    pub fn set(&mut self, cluster: u64, allocated: u32) {
        let (table, entry) = split(cluster);
        let table = self.tables[table].get_or_insert_with(L2Table::new);
        debug_assert_eq!(table.clusters[entry], 0, "a cluster is mapped once");
        table.clusters[entry] = allocated;
        table.dirty = if table.dirty.is_empty() {
            entry..entry + 1
        } else {
            table.dirty.start.min(entry)..table.dirty.end.max(entry + 1)
        };
    }

    /// Whether an entry is not yet in the file.
    pub fn is_dirty(&self) -> bool {
        let mut tables = self.tables.iter().flatten();
        tables.any(|table| !table.dirty.is_empty())
    }

    /// Calls `write` for each table with new entries, with the table's index, the
    /// offset in the table, and the bytes. A table whose write fails stays dirty.
    pub fn write_back<E>(
        &mut self,
        mut write: impl FnMut(u64, u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for (index, table) in self.tables.iter_mut().enumerate() {
            let Some(table) = table else { continue };
            if table.dirty.is_empty() {
                continue;
            }
            let start = table.dirty.start / ENTRIES_PER_SECTOR * ENTRIES_PER_SECTOR;
            let end = table.dirty.end.next_multiple_of(ENTRIES_PER_SECTOR);
            let mut bytes: Vec<u8> = table.clusters[start..end]
                .iter()
                .flat_map(|cluster| {
                    match cluster {
                        0 => 0,
                        cluster => (u64::from(*cluster) * CLUSTER) | COPIED,
                    }
                    .to_be_bytes()
                })
                .collect();
            write(index as u64, start as u64 * 8, &mut bytes)?;
            table.dirty = 0..0;
        }
        Ok(())
    }
}

fn split(cluster: u64) -> (usize, usize) {
    (
        (cluster / L2_ENTRIES) as usize,
        (cluster % L2_ENTRIES) as usize,
    )
}

/// The clusters of a file that its tables use.
#[derive(Debug)]
pub struct UsedClusters {
    bits: Vec<u64>,
    end: u32,
}

impl UsedClusters {
    /// No cluster is used.
    pub fn new(layout: &Layout) -> Self {
        Self {
            bits: vec![0; (layout.end as usize).div_ceil(64)],
            end: layout.first_data,
        }
    }

    /// Marks `cluster`. False if it was marked before.
    fn mark(&mut self, cluster: u32) -> bool {
        let (word, bit) = (cluster as usize / 64, 1 << (cluster % 64));
        let new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        self.end = self.end.max(cluster + 1);
        new
    }

    /// The cluster after the last used one.
    pub fn end(&self) -> u32 {
        self.end
    }
}

/// Unused clusters. A cluster in use is never freed, so it is allocated once.
#[derive(Debug)]
pub struct FreeClusters {
    /// Left by a crash or a failed write; the last is allocated first.
    holes: Vec<u32>,
    /// Never allocated.
    rest: Range<u32>,
}

impl FreeClusters {
    /// The clusters that are not in `used`.
    pub fn new(layout: &Layout, used: &UsedClusters) -> Self {
        let is_free = |cluster: &u32| used.bits[*cluster as usize / 64] >> (cluster % 64) & 1 == 0;
        Self {
            holes: (layout.first_data..used.end)
                .rev()
                .filter(is_free)
                .collect(),
            rest: used.end..layout.end,
        }
    }

    /// Allocates up to `want` consecutive clusters. Returns the first and their
    /// number.
    pub fn allocate(&mut self, want: u32) -> Option<(u32, u32)> {
        if let Some(first) = self.holes.pop() {
            let mut count = 1;
            while count < want && self.holes.last() == Some(&(first + count)) {
                self.holes.pop();
                count += 1;
            }
            return Some((first, count));
        }
        let count = want.min(self.rest.end - self.rest.start);
        let first = self.rest.start;
        self.rest.start += count;
        (count > 0).then_some((first, count))
    }

    /// Undoes [`FreeClusters::allocate`] for clusters that no table uses.
    pub fn give_back(&mut self, first: u32, count: u32) {
        self.holes.extend((first..first + count).rev());
    }
}
