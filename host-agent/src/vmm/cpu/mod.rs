//! Initial state of a vCPU, as the 64-bit boot protocol of Linux requires.

pub mod cpuid;
pub mod regs;
