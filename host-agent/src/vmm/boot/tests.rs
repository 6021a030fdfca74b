//! Kernels whose headers are wrong.

use std::io::Write;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// Offsets in a bzImage (boot.rst, "The Real-Mode Kernel Header").
const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
const HEADER_END: usize = 0x270;
/// Bytes of an ELF header and of one program header.
const ELF_HEADERS: usize = 64 + 56;
/// RAM of the guest, and the longest time that a load may take.
const RAM: usize = 64 << 20;
const LOAD_LIMIT: Duration = Duration::from_secs(20);

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage with 2 KiB of setup code and 4 KiB of kernel.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 5 * 512 + 4096];
    image[SETUP_SECTS] = 4;
    put(&mut image, 0x1fe, &BOOT_FLAG.to_le_bytes());
    put(&mut image, MAGIC, &HEADER_MAGIC.to_le_bytes());
    put(&mut image, VERSION, &0x20f_u16.to_le_bytes());
    // LOADED_HIGH, code32_start and xloadflags.
    image[0x211] = 1;
    put(&mut image, 0x214, &0x10_0000_u32.to_le_bytes());
    put(&mut image, 0x236, &XLF_KERNEL_64.to_le_bytes());
    put(&mut image, PREF_ADDRESS, &0x100_0000_u64.to_le_bytes());
    put(&mut image, INIT_SIZE, &0x10_0000_u32.to_le_bytes());
    image
}

/// An ELF kernel with one segment of 4 KiB that takes 8 KiB.
fn elf() -> Vec<u8> {
    let mut image = vec![0; ELF_HEADERS + 4096];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    // Executable, x86-64, version 1.
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    // Entry and program headers, then sizes of both headers and their number.
    put(&mut image, 24, &0x10_0000_u64.to_le_bytes());
    put(&mut image, 32, &64_u64.to_le_bytes());
    put(&mut image, 52, &[64, 0, 56, 0, 1, 0]);
    put(&mut image, 64, &[1, 0, 0, 0, 5, 0, 0, 0]);
    let segment = [ELF_HEADERS as u64, 0x10_0000, 0x10_0000, 4096, 8192, 4096];
    for (index, field) in segment.into_iter().enumerate() {
        put(&mut image, 72 + 8 * index, &field.to_le_bytes());
    }
    image
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn load_image(kernel: &[u8], initrd: u64) -> Result<(EntryPoint, GuestMemoryMmap), BootError> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let initrd_file = file(b"");
    initrd_file.set_len(initrd).unwrap();
    let entry = load(
        &memory,
        &mut file(kernel),
        &mut { initrd_file },
        "quiet",
        &[0; 64],
    )?;
    Ok((entry, memory))
}

#[test]
fn kernels_of_both_formats_are_loaded() {
    for (image, entry) in [(bzimage(), 0x10_0200), (elf(), 0x10_0000)] {
        let (found, memory) = load_image(&image, 5000).unwrap();
        assert_eq!(found, EntryPoint(GuestAddress(entry)));
        let params: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        let (at, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((at, size), (RAM as u32 - 0x2000, 5000));
        let [low, reserved, high] = [0, 1, 2].map(|index| {
            let entry = params.e820_table[index];
            (entry.addr, entry.addr + entry.size, entry.r#type)
        });
        assert_eq!(low, (0, layout::LOW_RAM_END, E820_RAM));
        assert_eq!(
            reserved,
            (layout::LOW_RAM_END, layout::HIGH_MEMORY, E820_RESERVED)
        );
        assert_eq!(high, (layout::HIGH_MEMORY, RAM as u64, E820_RAM));
        assert_eq!(params.e820_entries, 3);
    }
}

#[test]
fn addresses_of_the_setup_header_that_overflow_are_refused() {
    for address in [u64::MAX, u64::MAX - 0x10_0000 + 1] {
        let mut image = bzimage();
        put(&mut image, PREF_ADDRESS, &address.to_le_bytes());
        let error = load_image(&image, 0).unwrap_err().to_string();
        assert!(error.contains("overflows"), "{error}");
    }
    // The kernel would decompress itself over the initrd, or beyond RAM.
    for (address, size) in [(u64::MAX - u64::from(u32::MAX), u32::MAX), (0, RAM as u32)] {
        let mut image = bzimage();
        put(&mut image, PREF_ADDRESS, &address.to_le_bytes());
        put(&mut image, INIT_SIZE, &size.to_le_bytes());
        let error = load_image(&image, 4096).unwrap_err();
        assert!(matches!(error, BootError::Initrd(_)), "{error}");
    }
}

#[test]
fn an_initrd_never_overlaps_the_boot_structures() {
    let mut image = elf();
    // No segment is loaded.
    image[64] = 0;
    let most = RAM as u64 - layout::HIGH_MEMORY;
    assert!(load_image(&image, most).is_ok());
    let error = load_image(&image, most + 1).unwrap_err();
    assert!(matches!(error, BootError::Initrd(_)), "{error}");
}

#[test]
fn a_command_line_that_is_too_long_or_not_text_is_refused() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let load = |line: &str| {
        let (mut kernel, mut initrd) = (file(&elf()), file(b""));
        super::load(&memory, &mut kernel, &mut initrd, line, &[])
    };
    assert!(load(&"x".repeat(layout::COMMAND_LINE_MAX - 1)).is_ok());
    for line in [&*"x".repeat(layout::COMMAND_LINE_MAX), "a\0b", "\u{e9}"] {
        let error = load(line).unwrap_err();
        assert!(matches!(error, BootError::CommandLine(_)), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_kernel_header_never_panics_the_loader(
        is_elf: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        word in prop_oneof![
            Just(0),
            Just(u64::MAX),
            Just(1 << 63),
            (0..RAM as u64 + 2),
            any::<u64>(),
        ],
        at in any::<prop::sample::Index>(),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let (mut image, header) = if is_elf {
            (elf(), 4..ELF_HEADERS)
        } else {
            (bzimage(), SETUP_SECTS..HEADER_END)
        };
        for (at, byte) in changes {
            image[header.start + at.index(header.len())] = byte;
        }
        put(&mut image, header.start + at.index(header.len() - 8), &word.to_le_bytes());
        if !is_elf {
            // Without these the rest of the header is not read.
            put(&mut image, MAGIC, &HEADER_MAGIC.to_le_bytes());
            put(&mut image, VERSION, &0x20f_u16.to_le_bytes());
        }
        if let Some(cut) = cut {
            image.truncate(cut.index(image.len()));
        }
        let begin = Instant::now();
        // An error is as good as a kernel that is loaded.
        let _ = load_image(&image, 4096);
        prop_assert!(begin.elapsed() < LOAD_LIMIT);
    }
}
