//! Takes numbers from the bytes of an input.

/// What is left of an input. Each method returns `None` at its end.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    pub fn byte(&mut self) -> Option<u8> {
        self.take().map(|[byte]| byte)
    }

    pub fn word(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub fn double(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    /// The next `most` bytes, or fewer at the end.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        first
    }
}
