//! State of a virtual processor at power-on, as Linux's 64-bit boot protocol
//! wants it.

pub mod cpuid;
pub mod regs;
