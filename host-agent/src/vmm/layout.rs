//! All guest-physical addresses, ports and interrupt numbers of the machine.

/// Device registers start here, so RAM below 4 GiB ends here at most.
pub const MMIO_START: u64 = 0xd000_0000;
/// RAM above [`MMIO_START`] continues at 4 GiB.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Distance between the registers of two virtio devices; the first are at
/// [`MMIO_START`].
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Most virtio devices: each has its own interrupt line.
pub const MAX_VIRTIO: usize = 16;
/// Interrupt line of virtio device 0; the next devices have the next lines. KVM's
/// I/O APIC has 24 lines (0 to 23), and the serial port has line 4.
pub const VIRTIO_GSI: u32 = 5;

/// The page for `KVM_SET_IDENTITY_MAP_ADDR` (KVM API), below a PC's BIOS.
pub const KVM_IDENTITY: u64 = 0xfffb_c000;
/// The three pages for `KVM_SET_TSS_ADDR` (KVM API), which Intel VMX needs to run
/// real mode.
pub const KVM_TSS: usize = 0xfffb_d000;
/// I/O APIC registers (Intel 82093AA).
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers (Intel SDM volume 3, 11.4.1).
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Global descriptor table of the boot vCPU.
pub const GDT: u64 = 0x500;
/// Empty interrupt descriptor table.
pub const IDT: u64 = 0x520;
/// Zero page, `struct boot_params` (Linux `Documentation/arch/x86/zero-page.rst`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the boot stack.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Level 4 page table; levels 3 and 2 follow.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line (x86 `COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of conventional memory; a PC has its extended BIOS data area here.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, in the area that is searched for the RSDP (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Start of the RAM for kernel and initrd.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// First register of the serial port COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of registers of the serial port (16550 UART).
pub const SERIAL_PORTS: u16 = 8;
/// Interrupt line of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register (ACPI 6.5, 4.8.3.6).
pub const RESET: u16 = 0x602;
/// Value of the reset register that resets the machine.
pub const RESET_VALUE: u8 = 1;
/// Port of the panic notifier (QEMU's pvpanic, `docs/specs/pvpanic.rst`).
pub const PANIC: u16 = 0x505;
