//! A qcow2 diff over a raw base. A power cut at any time loses no flushed data.
//!
//! The order of writes guarantees this. An L2 entry stays in memory until a sync
//! has made the cluster's data (all 64 KiB) and its reference count durable. So on
//! stable storage every entry points to a complete and counted cluster, in whatever
//! order the host wrote the rest. A cluster in use is never freed or moved. A crash
//! can leave counted clusters without an entry (`qemu-img check` calls them leaked),
//! which are allocated again.

pub mod layout;
mod map;

use std::io;

use vm_memory::VolatileSlice;

use super::raw::{check_range, earlier_sync_failed, sync_failed};
use super::storage::{Storage, read_bytes, write_bytes};
use super::{Disk, DiskError, slices};
use layout::{CLUSTER, HEAD, Layout, LayoutError};
use map::{ClusterMap, FreeClusters, Run, UsedClusters};

/// A diff disk: `S` is the file of the diff, `B` the base.
#[derive(Debug)]
pub struct Diff<S: Storage, B: Storage> {
    storage: S,
    base: B,
    base_len: u64,
    layout: Layout,
    map: ClusterMap,
    free: FreeClusters,
    /// Clusters in use whose reference counts are not in the file yet: first, count.
    uncounted: Vec<(u32, u32)>,
    sync_failed: bool,
    /// Buffer of two clusters, for the parts of a new cluster that come from the base.
    scratch: Vec<u8>,
}

impl<S: Storage, B: Storage> Diff<S, B> {
    /// Opens a diff that [`super::create_diff`] created: reads all of its tables and
    /// writes nothing.
    pub fn open(storage: S, base: B) -> Result<Self, DiskError> {
        let diff_io = |source| DiskError::Io {
            action: "read the diff disk",
            source,
        };
        let base_len = base.len().map_err(|source| DiskError::Io {
            action: "measure the base image",
            source,
        })?;
        let len = storage.len().map_err(diff_io)?;
        check_length(len, HEAD as u64)?;
        let mut head = [0; HEAD];
        read_bytes(&storage, 0, &mut head).map_err(diff_io)?;
        let layout = Layout::parse(&head)?;
        check_length(len, layout.metadata_bytes())?;
        check_table(&storage, "L1 table", layout.l1())?;
        check_table(&storage, "refcount table", layout.refcounts())?;

        let mut scratch = vec![0; 2 * CLUSTER as usize];
        let (mut map, mut used) = (ClusterMap::new(&layout), UsedClusters::new(&layout));
        for table in 0..layout.l2_tables {
            let bytes = &mut scratch[..CLUSTER as usize];
            read_bytes(&storage, layout.l2_offset(table), bytes).map_err(diff_io)?;
            map.load(&layout, &mut used, table as usize, bytes)?;
        }
        check_length(len, u64::from(used.end()) * CLUSTER)?;
        Ok(Self {
            storage,
            base,
            base_len,
            free: FreeClusters::new(&layout, &used),
            layout,
            map,
            uncounted: Vec::new(),
            sync_failed: false,
            scratch,
        })
    }

    /// The run at byte `at` of the virtual disk, and how many of the next `left`
    /// bytes are in it.
    fn run_at(&self, at: u64, left: u64) -> (Run, u64) {
        let inside = at % CLUSTER;
        let run = self
            .map
            .run(at / CLUSTER, (inside + left).div_ceil(CLUSTER));
        let (Run::Base { clusters } | Run::Allocated { clusters, .. }) = run;
        (run, (clusters * CLUSTER - inside).min(left))
    }

    /// Writes the first part of `from` to new clusters for `offset`. Returns the
    /// number of bytes written.
    fn write_new(&mut self, offset: u64, from: &[VolatileSlice<'_>], len: u64) -> io::Result<u64> {
        let inside = offset % CLUSTER;
        let want = (inside + len).div_ceil(CLUSTER);
        let want = u32::try_from(want).unwrap_or(u32::MAX);
        let Some((first, count)) = self.free.allocate(want) else {
            // Not `is_full`: waiting would not help.
            return Err(io::Error::other("no cluster is left in the diff"));
        };
        let end = (u64::from(count) * CLUSTER - inside).min(len);
        let tail = (inside + end).next_multiple_of(CLUSTER) - (inside + end);
        let result = self.write_clusters(offset, from, first, (inside, end, tail));
        if let Err(error) = result {
            self.free.give_back(first, count);
            return Err(error);
        }
        for index in 0..count {
            let cluster = offset / CLUSTER + u64::from(index);
            self.map.set(cluster, first + index);
        }
        match self.uncounted.last_mut() {
            Some((start, before)) if *start + *before == first => *before += count,
            _ => self.uncounted.push((first, count)),
        }
        Ok(end)
    }

    /// Writes whole clusters of the file from `first` on: `head` bytes of the base,
    /// `body` bytes of `from`, `tail` bytes of the base.
    fn write_clusters(
        &mut self,
        offset: u64,
        from: &[VolatileSlice<'_>],
        first: u32,
        (head, body, tail): (u64, u64, u64),
    ) -> io::Result<()> {
        let (before, after) = self.scratch.split_at_mut(CLUSTER as usize);
        let before = VolatileSlice::from(&mut before[..head as usize]);
        let after = VolatileSlice::from(&mut after[..tail as usize]);
        let mut all = Vec::with_capacity(from.len() + 2);
        if head > 0 {
            read_padded(&self.base, self.base_len, offset - head, &[before])?;
            all.push(before);
        }
        slices::push_part(&mut all, from, 0, body);
        if tail > 0 {
            read_padded(&self.base, self.base_len, offset + body, &[after])?;
            all.push(after);
        }
        self.storage.write_at(u64::from(first) * CLUSTER, &all)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.storage.sync().map_err(|error| {
            self.sync_failed = true;
            sync_failed(&error)
        })
    }
}

/// Reads from a base of `len` bytes, after which the disk reads as zero.
fn read_padded(
    base: &impl Storage,
    len: u64,
    offset: u64,
    to: &[VolatileSlice<'_>],
) -> io::Result<()> {
    let wanted = slices::total(to);
    let inside = len.saturating_sub(offset).min(wanted);
    if inside == wanted {
        return base.read_at(offset, to);
    }
    let mut parts = Vec::with_capacity(to.len() + 1);
    slices::push_part(&mut parts, to, 0, inside);
    if inside > 0 {
        base.read_at(offset, &parts)?;
    }
    parts.clear();
    slices::push_part(&mut parts, to, inside, wanted - inside);
    slices::zero(&parts);
    Ok(())
}

fn check_length(found: u64, expected: u64) -> Result<(), LayoutError> {
    if found < expected {
        return Err(LayoutError::Truncated { found, expected });
    }
    Ok(())
}

fn check_table(
    storage: &impl Storage,
    table: &'static str,
    (offset, expected): (u64, Vec<u8>),
) -> Result<(), DiskError> {
    let mut found = vec![0; expected.len()];
    read_bytes(storage, offset, &mut found).map_err(|source| DiskError::Io {
        action: "read a table of the diff disk",
        source,
    })?;
    let entries = found.chunks_exact(8).zip(expected.chunks_exact(8));
    for (index, (found, expected)) in entries.enumerate() {
        if found != expected {
            return Err(LayoutError::Entry {
                table,
                index: index as u64,
                found: u64::from_be_bytes(found.try_into().expect("the chunk has eight bytes")),
            }
            .into());
        }
    }
    Ok(())
}

impl<S: Storage, B: Storage> Disk for Diff<S, B> {
    fn size(&self) -> u64 {
        self.layout.virtual_size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn max_file_size(&self) -> u64 {
        u64::from(self.layout.end) * CLUSTER
    }

    fn read(&mut self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        check_range(self.size(), offset, to)?;
        let len = slices::total(to);
        let mut parts = Vec::new();
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let (run, count) = self.run_at(at, len - done);
            let to = if count == len {
                to
            } else {
                parts.clear();
                slices::push_part(&mut parts, to, done, count);
                &parts
            };
            match run {
                Run::Base { .. } => read_padded(&self.base, self.base_len, at, to)?,
                Run::Allocated { first, .. } => {
                    let at = u64::from(first) * CLUSTER + at % CLUSTER;
                    self.storage.read_at(at, to)?;
                }
            }
            done += count;
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        check_range(self.size(), offset, from)?;
        if self.sync_failed {
            return Err(earlier_sync_failed());
        }
        let len = slices::total(from);
        let mut parts = Vec::new();
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let (run, count) = self.run_at(at, len - done);
            let from = if count == len {
                from
            } else {
                parts.clear();
                slices::push_part(&mut parts, from, done, count);
                &parts
            };
            done += match run {
                Run::Base { .. } => self.write_new(at, from, count)?,
                Run::Allocated { first, .. } => {
                    let at = u64::from(first) * CLUSTER + at % CLUSTER;
                    self.storage.write_at(at, from)?;
                    count
                }
            };
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.sync_failed {
            return Err(earlier_sync_failed());
        }
        while let Some((first, count)) = self.uncounted.last().copied() {
            let mut ones: Vec<u8> = [0, 1].repeat(count as usize);
            let at = self.layout.refcount_offset(first);
            write_bytes(&mut self.storage, at, &mut ones)?;
            self.uncounted.pop();
        }
        // Data and reference counts first, then the entries that point to them.
        self.sync()?;
        if self.map.is_dirty() {
            let (storage, layout) = (&mut self.storage, &self.layout);
            self.map.write_back(|table, at, bytes| {
                write_bytes(storage, layout.l2_offset(table) + at, bytes)
            })?;
            self.sync()?;
        }
        Ok(())
    }
}

impl<S: Storage, B: Storage> Drop for Diff<S, B> {
    /// Flushes the tables, so that a regular end loses no completed write.
    fn drop(&mut self) {
        if self.map.is_dirty() && !self.sync_failed {
            let _ = self.flush();
        }
    }
}

#[cfg(test)]
mod tests;
