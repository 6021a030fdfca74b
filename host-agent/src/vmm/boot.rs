//! Loads kernel, initrd and command line, and fills the zero page of the Linux
//! boot protocol (`Documentation/arch/x86/boot.rst`).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, load_cmdline};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::layout;

/// `boot_flag`, `header`, `type_of_loader` and `kernel_alignment` of the setup
/// header (boot.rst, "The Real-Mode Kernel Header").
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
/// Offset of the 64-bit entry point from the load address (boot.rst, "64-bit Boot
/// Protocol").
const ENTRY_64: u64 = 0x200;
/// First version of the boot protocol with `xloadflags`.
const PROTOCOL_64: u16 = 0x020c;
/// Bit 0 of `xloadflags`: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// Types of the E820 map (ACPI 6.5, chapter 15).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Bytes of an initrd that are copied at once.
const COPY: usize = 1 << 20;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image is neither ELF nor bzImage, or has no 64-bit entry point.
    #[error("kernel: {0}")]
    Kernel(String),
    /// The initrd does not fit or cannot be read.
    #[error("initrd: {0}")]
    Initrd(String),
    /// The command line is too long or has invalid bytes.
    #[error("kernel command line: {0}")]
    CommandLine(String),
    /// Guest RAM is too small for the boot structures.
    #[error("boot structures: {0}")]
    Structures(String),
}

/// Address at which the boot vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryPoint(pub GuestAddress);

/// Writes everything that the kernel needs and returns its entry point.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &mut File,
    initrd: &mut File,
    command_line: &str,
    acpi: &[u8],
) -> Result<EntryPoint, BootError> {
    let (entry, header, kernel_end) = load_kernel(memory, kernel)?;
    let (initrd_start, initrd_size) = load_initrd(memory, initrd, kernel_end)?;
    let mut line = linux_loader::cmdline::Cmdline::new(layout::COMMAND_LINE_MAX)
        .map_err(|e| BootError::CommandLine(e.to_string()))?;
    line.insert_str(command_line)
        .map_err(|e| BootError::CommandLine(e.to_string()))?;
    load_cmdline(memory, GuestAddress(layout::COMMAND_LINE), &line)
        .map_err(|e| BootError::CommandLine(e.to_string()))?;
    memory
        .write_slice(acpi, GuestAddress(layout::ACPI_TABLES))
        .map_err(|e| BootError::Structures(e.to_string()))?;

    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size =
        u32::try_from(command_line.len() + 1).map_err(|e| BootError::CommandLine(e.to_string()))?;
    params.hdr.ramdisk_image = initrd_start;
    params.hdr.ramdisk_size = initrd_size;
    params.acpi_rsdp_addr = layout::ACPI_TABLES;
    let map = e820(memory);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    let params = BootParams::new(&params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory)
        .map_err(|e| BootError::Structures(e.to_string()))?;
    Ok(entry)
}

fn load_kernel(
    memory: &GuestMemoryMmap,
    kernel: &mut File,
) -> Result<(EntryPoint, setup_header, u64), BootError> {
    let error = |e: &dyn std::fmt::Display| BootError::Kernel(e.to_string());
    let mut magic = [0; 4];
    kernel.seek(SeekFrom::Start(0)).map_err(|e| error(&e))?;
    kernel.read_exact(&mut magic).map_err(|e| error(&e))?;
    kernel.seek(SeekFrom::Start(0)).map_err(|e| error(&e))?;
    let start = Some(GuestAddress(layout::HIGH_MEMORY));
    if &magic == b"\x7fELF" {
        // With an offset, even of 0, the loader does not parse the ELF notes, whose
        // PVH entry point is not used.
        let offset = Some(GuestAddress(0));
        let loaded = Elf::load(memory, offset, kernel, start).map_err(|e| error(&e))?;
        let header = setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..Default::default()
        };
        return Ok((EntryPoint(loaded.kernel_load), header, loaded.kernel_end));
    }
    let loaded = BzImage::load(memory, None, kernel, start).map_err(|e| error(&e))?;
    let header = loaded
        .setup_header
        .ok_or_else(|| BootError::Kernel("no setup header".into()))?;
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_64 || flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Kernel(format!(
            "boot protocol {version:#06x} has no 64-bit entry point"
        )));
    }
    let overflow = || BootError::Kernel("an address of the setup header overflows".into());
    // The kernel decompresses itself into `init_size` bytes (boot.rst).
    let mut end = loaded.kernel_end;
    for start in [loaded.kernel_load.raw_value(), header.pref_address] {
        let used = start.checked_add(u64::from(header.init_size));
        end = end.max(used.ok_or_else(overflow)?);
    }
    let entry = loaded.kernel_load.checked_add(ENTRY_64);
    Ok((EntryPoint(entry.ok_or_else(overflow)?), header, end))
}

/// Copies the initrd to the end of low RAM, aligned to a page and above the kernel.
fn load_initrd(
    memory: &GuestMemoryMmap,
    initrd: &mut File,
    kernel_end: u64,
) -> Result<(u32, u32), BootError> {
    let error = |e: &dyn std::fmt::Display| BootError::Initrd(e.to_string());
    let size = initrd.metadata().map_err(|e| error(&e))?.len();
    let low_end = memory
        .find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len);
    let start = low_end
        .checked_sub(size)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= kernel_end.max(layout::HIGH_MEMORY))
        .ok_or_else(|| {
            BootError::Initrd(format!(
                "{size} bytes do not fit between the kernel's end at {kernel_end:#x} and {low_end:#x}"
            ))
        })?;
    initrd.seek(SeekFrom::Start(0)).map_err(|e| error(&e))?;
    let mut done = 0;
    while done < size {
        let count = (size - done).min(COPY as u64) as usize;
        memory
            .read_exact_volatile_from(GuestAddress(start + done), initrd, count)
            .map_err(|e| error(&e))?;
        done += count as u64;
    }
    let narrow = |value: u64| u32::try_from(value).map_err(|e| error(&e));
    Ok((narrow(start)?, narrow(size)?))
}

fn e820(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, r#type| boot_e820_entry {
        addr,
        size: end - addr,
        r#type,
    };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, E820_RAM),
        entry(layout::LOW_RAM_END, layout::HIGH_MEMORY, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(layout::HIGH_MEMORY);
        // Cannot overflow: the last byte of a region has an address.
        let end = region.last_addr().raw_value() + 1;
        if end > start {
            map.push(entry(start, end, E820_RAM));
        }
    }
    map
}

#[cfg(test)]
mod tests;
