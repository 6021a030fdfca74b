//! Random numbers for hostile guests, reproducible by their seed.

/// The generator xorshift64*.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that repeats what others of this seed give.
    pub const fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.any() >> 16) % bound
    }

    /// True one time in `count`.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// A number below `bound`, or any number one time in `rarity`.
    pub fn mostly_below(&mut self, bound: u64, rarity: u64) -> u16 {
        if self.one_in(rarity) {
            self.any() as u16
        } else {
            self.below(bound) as u16
        }
    }

    /// Length of a buffer: often one that a driver uses, or none.
    pub fn length(&mut self) -> u32 {
        match self.below(8) {
            0 => self.any() as u32,
            1 => 0,
            2 => 44,
            3 => 16,
            4 => 512,
            _ => self.below(1 << 16) as u32,
        }
    }
}
