//! ACPI tables: the only description of the machine that the guest gets.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate,
    ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::layout;

const OEM: [u8; 6] = *b"HOSTAG";
const TABLE: [u8; 8] = *b"HAGENT01";

/// FADT `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.11): VGA not present, CMOS RTC not
/// present.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS: u16 = 1 << 5;

/// A byte-wide I/O port (ACPI 6.5, 5.2.3.2).
fn port(number: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(number),
    )
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// All tables as one block for [`layout::ACPI_TABLES`]; the RSDP is first.
pub fn tables(vcpus: u8, virtio_devices: usize) -> Vec<u8> {
    let mut block = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: Vec<u8>| {
        let address = layout::ACPI_TABLES + block.len() as u64;
        block.extend(table);
        block.resize(block.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = place(dsdt(virtio_devices));
    let fadt = place(bytes(&fadt(dsdt).finalize()));
    let madt = place(bytes(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    block[..rsdp.len()].copy_from_slice(&rsdp);
    block
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS).into();
    fadt.reset_reg = port(layout::RESET);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(TABLE).into();
    fadt
}

fn madt(vcpus: u8) -> MADT {
    let apic = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, TABLE, 1, apic);
    for cpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt(virtio_devices: usize) -> Vec<u8> {
    let mut aml = Vec::new();
    for number in 0..virtio_devices {
        virtio(number, &mut aml);
    }
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    &IO::new(
                        layout::SERIAL_PORT,
                        layout::SERIAL_PORT,
                        0,
                        layout::SERIAL_PORTS as u8,
                    ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    Device::new(
        "_SB_.PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &0xfu8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(layout::PANIC, layout::PANIC, 1, 1)]),
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    // Sleep type 5 of the sleep control register powers off (ACPI 6.5, 7.4.2.6).
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&5u8, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    dsdt.append_slice(&aml);
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

fn virtio(number: usize, sink: &mut dyn AmlSink) {
    let base = layout::MMIO_START + number as u64 * layout::VIRTIO_STRIDE;
    Device::new(
        Path::new(&format!("_SB_.V{number:03}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(number as u8)),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, base as u32, layout::VIRTIO_STRIDE as u32),
                    &Interrupt::new(true, true, false, false, layout::VIRTIO_GSI + number as u32),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn tables_have_valid_checksums_and_iasl_reads_the_dsdt() {
        let block = tables(8, 6);
        assert_eq!(&block[..8], b"RSD PTR ");
        assert!(block.len() < 0x2_0000);
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum(&block[..20]), 0);
        assert_eq!(sum(&block[..36]), 0);
        let mut at = Rsdp::len().next_multiple_of(16);
        let mut names = Vec::new();
        while at < block.len() {
            let length = u32::from_le_bytes(block[at + 4..at + 8].try_into().unwrap()) as usize;
            let table = &block[at..at + length];
            assert_eq!(sum(table), 0, "{:?}", &table[..4]);
            names.push(String::from_utf8_lossy(&table[..4]).into_owned());
            if &table[..4] == b"DSDT" {
                disassemble(table);
            }
            at = (at + length).next_multiple_of(16);
        }
        assert_eq!(names, ["DSDT", "FACP", "APIC", "XSDT"]);
    }

    fn disassemble(dsdt: &[u8]) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("dsdt.aml");
        std::fs::write(&file, dsdt).unwrap();
        let output = match Command::new("iasl").arg("-d").arg(&file).output() {
            Ok(output) => output,
            Err(_) if std::env::var_os("HOST_AGENT_TEST_TOOLS").is_none() => return,
            Err(error) => panic!("iasl, which scripts/setup installs: {error}"),
        };
        assert!(output.status.success(), "{output:?}");
        let source = std::fs::read_to_string(dir.path().join("dsdt.dsl")).unwrap();
        for name in ["LNRO0005", "PNP0501", "QEMU0001", "_S5"] {
            assert!(source.contains(name), "{source}");
        }
    }
}
