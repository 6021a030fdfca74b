//! Every guest-physical address, port and interrupt number of the machine.

/// RAM below 4 GiB ends here at the latest; device registers follow.
pub const MMIO_START: u64 = 0xd000_0000;
/// RAM that did not fit below continues here.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Registers of virtio device `n` start at [`MMIO_START`] + n * this.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Most virtio devices: one interrupt line each.
pub const MAX_VIRTIO: usize = 16;
/// Interrupt line of virtio device 0; the following devices count up. The
/// I/O APIC has 24 lines; 4 is the serial port's.
pub const VIRTIO_GSI: u32 = 5;

/// Where kvm keeps its own pages (below the BIOS area of a PC).
pub const KVM_IDENTITY: u64 = 0xfffb_c000;
/// Three pages that Intel processors need for real mode.
pub const KVM_TSS: usize = 0xfffb_d000;
/// I/O APIC registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Global descriptor table of the boot processor.
pub const GDT: u64 = 0x500;
/// Empty interrupt descriptor table.
pub const IDT: u64 = 0x520;
/// Linux's zero page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the boot stack.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Level 4 page table; levels 3 and 2 follow.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line (x86 `COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of conventional memory, where a PC's extended BIOS data would be.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, in the area that operating systems search for the RSDP.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// RAM from here on is free for kernel and initrd.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Registers of the serial port.
pub const SERIAL_PORTS: u16 = 8;
/// Its interrupt line.
pub const SERIAL_GSI: u32 = 4;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register.
pub const RESET: u16 = 0x602;
/// Value that resets.
pub const RESET_VALUE: u8 = 1;
/// Port of the panic notifier (QEMU's pvpanic, `docs/specs/pvpanic.rst`).
pub const PANIC: u16 = 0x505;
