//! Which cluster of the file holds which cluster of the virtual disk. Pure.

use std::ops::Range;

use super::layout::{CLUSTER, COPIED, L2_ENTRIES, Layout, LayoutError};

/// L2 entries per disk sector: the least that is ever written.
const ENTRIES_PER_SECTOR: usize = 64;

/// A stretch of virtual clusters that one read or write can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// `clusters` that still come from the base.
    Base {
        /// Length of the stretch.
        clusters: u64,
    },
    /// `clusters` that follow each other in the file too.
    Allocated {
        /// Cluster of the file that holds the first.
        first: u32,
        /// Length of the stretch.
        clusters: u64,
    },
}

/// The mapping, as the tables in the file are going to say after a flush.
#[derive(Debug)]
pub struct ClusterMap {
    /// L2 tables that have entries.
    tables: Vec<Option<L2Table>>,
}

#[derive(Debug)]
struct L2Table {
    /// Cluster of the file by cluster of the virtual disk; 0 (the header) for
    /// those that come from the base.
    own: Box<[u32]>,
    /// Entries that may differ from the file.
    dirty: Range<usize>,
}

impl L2Table {
    fn new() -> Self {
        Self {
            own: vec![0; L2_ENTRIES as usize].into_boxed_slice(),
            dirty: 0..0,
        }
    }
}

impl ClusterMap {
    /// A map in which everything comes from the base.
    pub fn new(layout: &Layout) -> Self {
        Self {
            tables: (0..layout.l2_tables).map(|_| None).collect(),
        }
    }

    /// Takes over the contents of L2 table `table` as they are in the file,
    /// marking each cluster it refers to in `used`.
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
            let found = u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
            if found == 0 {
                continue;
            }
            let index = table as u64 * L2_ENTRIES + entry as u64;
            let offset = found & !COPIED;
            let cluster = u32::try_from(offset / CLUSTER).unwrap_or(u32::MAX);
            let known = found & COPIED != 0
                && offset.is_multiple_of(CLUSTER)
                && index < clusters
                && (layout.first_data..layout.end).contains(&cluster)
                && used.mark(cluster);
            if !known {
                return Err(LayoutError::Entry {
                    table: "L2 tables",
                    index,
                    found,
                });
            }
            new.own[entry] = cluster;
        }
        self.tables[table] = Some(new);
        Ok(())
    }

    fn get(&self, cluster: u64) -> u32 {
        let (table, entry) = split(cluster);
        self.tables[table]
            .as_ref()
            .map_or(0, |table| table.own[entry])
    }

    /// The longest stretch from `cluster` on, at most `max` clusters.
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

    /// From now on `cluster` of the virtual disk is in cluster `own` of the file.
    pub fn set(&mut self, cluster: u64, own: u32) {
        let (table, entry) = split(cluster);
        let table = self.tables[table].get_or_insert_with(L2Table::new);
        debug_assert_eq!(table.own[entry], 0, "a mapping never changes");
        table.own[entry] = own;
        table.dirty = if table.dirty.is_empty() {
            entry..entry + 1
        } else {
            table.dirty.start.min(entry)..table.dirty.end.max(entry + 1)
        };
    }

    /// Whether the tables in the file lack an entry.
    pub fn is_dirty(&self) -> bool {
        let mut tables = self.tables.iter().flatten();
        tables.any(|table| !table.dirty.is_empty())
    }

    /// Calls `write` with index of the table, byte offset in the table, and
    /// bytes, for each table with new entries. A table stays dirty when its
    /// write fails.
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
            let mut bytes: Vec<u8> = table.own[start..end]
                .iter()
                .flat_map(|own| {
                    match own {
                        0 => 0,
                        own => (u64::from(*own) * CLUSTER) | COPIED,
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

/// Clusters of a file that its tables refer to.
#[derive(Debug)]
pub struct UsedClusters {
    bits: Vec<u64>,
    end: u32,
}

impl UsedClusters {
    /// None yet.
    pub fn new(layout: &Layout) -> Self {
        Self {
            bits: vec![0; (layout.end as usize).div_ceil(64)],
            end: layout.first_data,
        }
    }

    /// `false` if `cluster` was marked before.
    fn mark(&mut self, cluster: u32) -> bool {
        let (word, bit) = (cluster as usize / 64, 1 << (cluster % 64));
        let new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        self.end = self.end.max(cluster + 1);
        new
    }

    /// The cluster after the last that is used.
    pub fn end(&self) -> u32 {
        self.end
    }
}

/// Clusters that no table has ever referred to. What was given out and came
/// into use is never given out again: nothing is freed.
#[derive(Debug)]
pub struct FreeClusters {
    /// Left over by a crash or a failed write; the last is given out first.
    holes: Vec<u32>,
    /// Never given out.
    rest: Range<u32>,
}

impl FreeClusters {
    /// What `used` leaves.
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

    /// Takes up to `want` clusters that follow each other: first, count.
    pub fn take(&mut self, want: u32) -> Option<(u32, u32)> {
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

    /// Gives back what came from [`FreeClusters::take`] and no table refers to.
    pub fn give_back(&mut self, first: u32, count: u32) {
        self.holes.extend((first..first + count).rev());
    }
}
