//! Things that wait to be sent: bounded, the oldest makes room, losses are
//! counted. Pure.

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

    /// Adds what takes `bytes`. The oldest of what has a size makes room; what
    /// has none stays until it is taken.
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

    /// Takes the oldest.
    pub fn pop(&mut self) -> Option<T> {
        let (item, bytes) = self.queue.pop_front()?;
        self.bytes -= bytes;
        Some(item)
    }

    /// How many were lost since the last call: all of them were older than
    /// whatever with a size is in the queue.
    pub const fn take_lost(&mut self) -> u64 {
        std::mem::replace(&mut self.lost, 0)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Keeps only what satisfies `keep`; the rest is not counted as lost.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.queue.retain(|(item, _)| keep(item));
        self.bytes = self.queue.iter().map(|(_, bytes)| bytes).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_fit_the_limit_in_order_the_rest_is_counted_and_what_has_no_size_stays() {
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
