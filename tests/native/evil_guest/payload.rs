//! The program in the guest: carries out a list of actions, in 64-bit mode, without
//! interrupts and without a stack.

// For the program, which is written in assembly language.
#![allow(unsafe_code)]

use std::arch::global_asm;

/// Own page tables, which no action writes to: those of the loader are in low memory.
/// They map the first and the fourth GiB, where the device registers are.
const PAGE_TABLES: u64 = 0x110_0000;

/// An action. Addresses are physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Stores the lowest 1, 2, 4 or 8 bytes of a value.
    Store(Width, u64, u64),
    /// Loads from an address.
    Load(Width, u64),
    /// Writes to a port; not 8 bytes.
    Out(Width, u16, u32),
    /// Reads from a port; not 8 bytes.
    In(Width, u16),
    /// Writes this many bytes of the program to a port with one instruction.
    OutString(u16, u8),
}

/// Bytes of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    One,
    Two,
    Four,
    Eight,
}

/// Handlers of [`SLOT`] bytes each, in the order of [`encode`]. The first one ends the
/// program.
const SLOT: u32 = 5;

global_asm!(
    ".pushsection .rodata.evil_guest, \"a\"",
    ".p2align {slot}",
    ".global evil_guest_start",
    ".global evil_guest_end",
    "evil_guest_start:",
    // Clears level 4, level 3 and two tables of level 2 with pages of 2 MiB.
    "mov rdi, {tables}",
    "mov rbx, rdi",
    "xor eax, eax",
    "mov ecx, 2048",
    "rep stosq",
    "lea rax, [rbx + 0x1003]",
    "mov [rbx], rax",
    "lea rax, [rbx + 0x2003]",
    "mov [rbx + 0x1000], rax",
    "lea rax, [rbx + 0x3003]",
    "mov [rbx + 0x1018], rax",
    "mov eax, 0x83",
    "mov edx, 0xc0000083",
    "xor ecx, ecx",
    "2:",
    "mov [rbx + rcx*8 + 0x2000], rax",
    "mov [rbx + rcx*8 + 0x3000], rdx",
    "add rax, 0x200000",
    "add rdx, 0x200000",
    "inc ecx",
    "cmp ecx, 512",
    "jne 2b",
    "mov cr3, rbx",
    // The actions follow the program: handler, address or port, value.
    "lea rsi, [rip + evil_guest_end]",
    "lea rdi, [rip + 4f]",
    "3:",
    "mov rax, [rsi]",
    "mov rbx, [rsi + 8]",
    "mov rcx, [rsi + 16]",
    "add rsi, 24",
    "mov edx, ebx",
    "shl eax, {slot}",
    "add rax, rdi",
    "jmp rax",
    ".p2align {slot}",
    "4:",
    "pause",
    "jmp 4b",
    ".p2align {slot}",
    "mov [rbx], cl",
    "jmp 3b",
    ".p2align {slot}",
    "mov [rbx], cx",
    "jmp 3b",
    ".p2align {slot}",
    "mov [rbx], ecx",
    "jmp 3b",
    ".p2align {slot}",
    "mov [rbx], rcx",
    "jmp 3b",
    ".p2align {slot}",
    "mov al, [rbx]",
    "jmp 3b",
    ".p2align {slot}",
    "mov ax, [rbx]",
    "jmp 3b",
    ".p2align {slot}",
    "mov eax, [rbx]",
    "jmp 3b",
    ".p2align {slot}",
    "mov rax, [rbx]",
    "jmp 3b",
    ".p2align {slot}",
    "mov eax, ecx",
    "out dx, al",
    "jmp 3b",
    ".p2align {slot}",
    "mov eax, ecx",
    "out dx, ax",
    "jmp 3b",
    ".p2align {slot}",
    "mov eax, ecx",
    "out dx, eax",
    "jmp 3b",
    ".p2align {slot}",
    "in al, dx",
    "jmp 3b",
    ".p2align {slot}",
    "in ax, dx",
    "jmp 3b",
    ".p2align {slot}",
    "in eax, dx",
    "jmp 3b",
    ".p2align {slot}",
    "mov r8, rsi",
    "mov rsi, rdi",
    "rep outsb",
    "mov rsi, r8",
    "jmp 3b",
    ".p2align 3",
    "evil_guest_end:",
    ".popsection",
    slot = const SLOT,
    tables = const PAGE_TABLES,
);

/// The program above.
fn code() -> &'static [u8] {
    unsafe extern "C" {
        static evil_guest_start: u8;
        static evil_guest_end: u8;
    }
    // SAFETY: both symbols are in one block of read-only bytes, which is a part of
    // this program, and the first one comes first.
    unsafe {
        let start = &raw const evil_guest_start;
        let end = &raw const evil_guest_end;
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

/// The program with its actions, to be loaded anywhere in the first GiB.
pub fn program(actions: &[Action]) -> Vec<u8> {
    let mut program = code().to_vec();
    let words = actions.iter().flat_map(|action| encode(*action));
    // Handler 0 ends the program.
    program.extend(words.chain([0; 3]).flat_map(u64::to_le_bytes));
    program
}

fn encode(action: Action) -> [u64; 3] {
    let port = u64::from;
    match action {
        Action::Store(width, at, value) => [1 + width as u64, at, value],
        Action::Load(width, at) => [5 + width as u64, at, 0],
        Action::Out(width, at, value) => [9 + (width as u64).min(2), port(at), value.into()],
        Action::In(width, at) => [12 + (width as u64).min(2), port(at), 0],
        Action::OutString(at, count) => [15, port(at), count.into()],
    }
}
