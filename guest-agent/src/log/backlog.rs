//! A bounded queue that drops its oldest items and counts them. Pure.

use std::collections::VecDeque;

/// A queue that never grows beyond a number of bytes.
#[derive(Debug)]
pub struct Backlog<T> {
    queue: VecDeque<(T, usize)>,
    bytes: usize,
    limit: usize,
    lost: u64,
}

impl<T> Backlog<T> {
    /// An empty queue of at most `limit` bytes.
    pub const fn new(limit: usize) -> Self {
        Self {
            queue: VecDeque::new(),
            bytes: 0,
            limit,
            lost: 0,
        }
    }

    /// Adds an item of `bytes`. If the queue is then over its limit, the oldest items that
    /// have a size are dropped; an item of size 0 is never dropped.
    pub fn push(&mut self, item: T, bytes: usize) {
        self.queue.push_back((item, bytes));
        self.bytes += bytes;
        while self.bytes > self.limit {
            let Some(oldest) = self.queue.iter().position(|(_, bytes)| *bytes > 0) else {
                return;
            };
            if let Some((_, bytes)) = self.queue.remove(oldest) {
                self.bytes -= bytes;
                self.lost += 1;
            }
        }
    }

    /// Takes the oldest item.
    pub fn pop(&mut self) -> Option<T> {
        let (item, bytes) = self.queue.pop_front()?;
        self.bytes -= bytes;
        Some(item)
    }

    /// How many items were dropped since the last call. All of them were older than each
    /// item with a size that is in the queue.
    pub const fn take_lost(&mut self) -> u64 {
        std::mem::replace(&mut self.lost, 0)
    }

    /// Whether the queue is empty.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Keeps only items that satisfy `keep`; the others are not counted as dropped.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.queue.retain(|(item, _)| keep(item));
        self.bytes = self.queue.iter().map(|(_, bytes)| bytes).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_oldest_items_with_a_size_are_dropped_and_counted() {
        let mut backlog = Backlog::new(100);
        for number in 0..1000_usize {
            backlog.push(
                number,
                if number % 300 == 0 {
                    0
                } else {
                    1 + number % 40
                },
            );
            assert!(backlog.bytes <= 100);
        }
        backlog.push(1000, 101);
        assert_eq!(backlog.bytes, 0);
        let lost = backlog.take_lost();
        assert_eq!(backlog.take_lost(), 0);
        let left: Vec<usize> = std::iter::from_fn(|| backlog.pop()).collect();
        assert_eq!(left, [0, 300, 600, 900]);
        assert_eq!(lost, 1001 - 4);

        backlog.push(1, 60);
        backlog.push(2, 60);
        backlog.push(3, 40);
        assert_eq!(backlog.take_lost(), 1);
        backlog.retain(|number| *number != 2);
        assert_eq!((backlog.pop(), backlog.bytes), (Some(3), 0));
        assert!(backlog.is_empty());
    }
}
