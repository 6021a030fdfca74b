//! Probes `/dev/kvm`: runs some guest instructions in kernel mode and times exits.
//!
//! On some machines `/dev/kvm` opens and creates virtual machines that cannot run
//! an unmodified kernel: the first `XRSTOR` or `INT3` ends in
//! `KVM_EXIT_INTERNAL_ERROR`. Only execution of such instructions shows it.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{FromRawFd as _, IntoRawFd as _};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

/// Guest RAM: 2 MiB, which one large page maps.
const RAM_SIZE: usize = 2 << 20;
const GDT: u64 = 0x500;
const IDT: u64 = 0x800;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
const HANDLER: u64 = 0x5000;
const STACK: u64 = 0x8000;

const CODE_SELECTOR: u16 = 0x8;
const DATA_SELECTOR: u16 = 0x10;
/// Descriptor of a 64-bit code segment (Intel SDM volume 3, 3.4.5; AMD APM
/// volume 2, 4.8.1).
const GDT_CODE: u64 = 0x00af_9b00_0000_ffff;
/// Descriptor of a flat data segment (Intel SDM volume 3, 3.4.5).
const GDT_DATA: u64 = 0x00cf_9300_0000_ffff;

/// `CR0`: PE, MP, ET, NE, WP, PG (Intel SDM volume 3, 2.5).
const CR0: u64 = 0x8001_0033;
/// `CR4`: PAE, OSFXSR, OSXMMEXCPT, OSXSAVE (Intel SDM volume 3, 2.5).
const CR4: u64 = 0x0004_0620;
/// `IA32_EFER`: LME, LMA (Intel SDM volume 3, 2.2.1).
const EFER: u64 = 0x500;

/// Port to which the program writes its progress marks.
const MARK_PORT: u16 = 0xf0;
/// Port whose writes cause the timed exits.
const EXIT_PORT: u16 = 0xf1;
/// Rounds of the timed loop of two instructions.
const LOOP_ROUNDS: u32 = 50_000;
/// Number of timed exits.
const TIMED_EXITS: u32 = 500;
/// Exits timed together. The result is the median of the groups' means.
const GROUP: u32 = 25;
/// The last mark. The marks are: start, after XSETBV, XRSTOR, INT3 and the loop.
const LAST_MARK: u8 = 5;
/// Most exits that the program can cause: with more it runs other code.
const MOST_EXITS: u32 = TIMED_EXITS + 64;
/// Limit of a run, which takes less than 100 ms, or 500 ms in an emulator.
const LIMIT: Duration = Duration::from_secs(2);

/// Result of a probe.
#[derive(Debug, Clone, PartialEq)]
pub enum KvmProbe {
    /// The program ran to its end.
    Ran(KvmFigures),
    /// The virtual machine could not be created, or lacks a required feature.
    Lacking {
        /// The failed call or missing feature.
        what: String,
    },
    /// The virtual machine stopped at an instruction that kernels use.
    Stopped {
        /// The instruction that the guest ran or was about to run.
        at: &'static str,
        /// The exit or error of `KVM_RUN`.
        how: String,
    },
    /// `KVM_RUN` did not return within the limit.
    Hung,
}

/// Measurements of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvmFigures {
    /// Microseconds for an exit to this process and back.
    pub exit_us: f64,
    /// Millions of guest instructions per second, in a loop of two instructions.
    pub loop_mips: f64,
}

/// Probes the open device `kvm`. Takes at most [`LIMIT`].
pub fn probe(kvm: File) -> KvmProbe {
    // The hypervisor of this machine may never return from `KVM_RUN`. Then the
    // thread ends with the process.
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("kvm-probe".into());
    let started = thread.spawn(move || {
        let result = run(kvm).unwrap_or_else(|what| KvmProbe::Lacking { what });
        // Fails only after the limit.
        let _ = sender.send(result);
    });
    match started {
        Ok(_) => receiver.recv_timeout(LIMIT).unwrap_or(KvmProbe::Hung),
        Err(error) => KvmProbe::Lacking {
            what: format!("a thread for the probe ({error})"),
        },
    }
}

fn run(kvm: File) -> Result<KvmProbe, String> {
    // SAFETY: the descriptor is open, is /dev/kvm, and `into_raw_fd` gave up
    // its ownership.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let api = kvm.get_api_version();
    if api != 12 {
        return Err(format!("KVM API version 12 (this is {api})"));
    }
    for (capability, name) in [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(name.into());
        }
    }
    let machine = kvm
        .create_vm()
        .map_err(|error| format!("KVM_CREATE_VM ({error})"))?;
    let memory = guest_memory()?;
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|error| format!("memory of the guest ({error})"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: RAM_SIZE as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the range is the whole mapping owned by `memory`, which is
    // dropped after `machine` and its vCPU at the end of this function.
    unsafe { machine.set_user_memory_region(region) }
        .map_err(|error| format!("KVM_SET_USER_MEMORY_REGION ({error})"))?;
    let mut vcpu = machine
        .create_vcpu(0)
        .map_err(|error| format!("KVM_CREATE_VCPU ({error})"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| format!("KVM_GET_SUPPORTED_CPUID ({error})"))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(|error| format!("KVM_SET_CPUID2 ({error})"))?;
    set_registers(&vcpu).map_err(|error| format!("64-bit mode with XSAVE ({error})"))?;
    let outcome = execute(&mut vcpu);
    drop(vcpu);
    drop(machine);
    drop(memory);
    Ok(outcome)
}

/// The machine code of the program, which ends with `hlt`.
fn program() -> Vec<u8> {
    const MARK: u8 = MARK_PORT as u8;
    const EXIT: u8 = EXIT_PORT as u8;
    let rounds = LOOP_ROUNDS.to_le_bytes();
    let exits = TIMED_EXITS.to_le_bytes();
    let instructions: &[(&[u8], &str)] = &[
        (&[0x31, 0xdb], "xor ebx, ebx"),
        (&[0xb8, 1, 0, 0, 0], "mov eax, 1"),
        (&[0xe6, MARK], "out MARK, al"),
        (&[0x31, 0xc9], "xor ecx, ecx"),
        (&[0x31, 0xd2], "xor edx, edx"),
        (&[0xb8, 3, 0, 0, 0], "mov eax, 3: x87 and SSE state"),
        (&[0x0f, 0x01, 0xd1], "xsetbv"),
        (&[0xb8, 2, 0, 0, 0], "mov eax, 2"),
        (&[0xe6, MARK], "out MARK, al"),
        (&[0xb8, 0xff, 0xff, 0xff, 0xff], "mov eax, -1"),
        (&[0xba, 0xff, 0xff, 0xff, 0xff], "mov edx, -1"),
        (&[0xbf, 0x00, 0x70, 0x00, 0x00], "mov edi, 0x7000"),
        (&[0x0f, 0xae, 0x2f], "xrstor [rdi]"),
        (&[0x0f, 0xae, 0x27], "xsave [rdi]"),
        (&[0xb8, 3, 0, 0, 0], "mov eax, 3"),
        (&[0xe6, MARK], "out MARK, al"),
        (&[0xcc], "int3: the handler counts in ebx"),
        (&[0x8d, 0x43, 0x03], "lea eax, [rbx + 3]"),
        (&[0xe6, MARK], "out MARK, al"),
        (&[0xb9], "mov ecx,"),
        (&rounds, "LOOP_ROUNDS"),
        (&[0xff, 0xc9], "dec ecx"),
        (&[0x75, 0xfc], "jnz to the dec"),
        (&[0xb8, LAST_MARK, 0, 0, 0], "mov eax, LAST_MARK"),
        (&[0xe6, MARK], "out MARK, al"),
        (&[0xb9], "mov ecx,"),
        (&exits, "TIMED_EXITS"),
        (&[0xe6, EXIT], "out EXIT, al"),
        (&[0xff, 0xc9], "dec ecx"),
        (&[0x75, 0xfa], "jnz to the out"),
        (&[0xf4], "hlt"),
    ];
    let bytes = instructions.iter().flat_map(|(bytes, _)| *bytes);
    bytes.copied().collect()
}

/// The instruction that follows the progress mark `mark`.
fn stage(mark: u8) -> &'static str {
    match mark {
        0 => "the first instruction",
        1 => "XSETBV",
        2 => "XRSTOR",
        3 => "INT3",
        4 => "a plain loop",
        _ => "port output",
    }
}

fn guest_memory() -> Result<GuestMemoryMmap, String> {
    let failed = |error: &dyn std::fmt::Display| format!("2 MiB of memory ({error})");
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM_SIZE)])
        .map_err(|error| failed(&error))?;
    // A 64-bit interrupt gate: present, type 14 (Intel SDM volume 3, 6.14.1).
    let gate = (HANDLER & 0xffff) | (u64::from(CODE_SELECTOR) << 16) | (0x8e00 << 32);
    let words = [
        (GDT + 8, GDT_CODE),
        (GDT + 16, GDT_DATA),
        (IDT + 3 * 16, gate),
        // Present and writable; the last entry maps 2 MiB (Intel SDM volume 3, 4.5).
        (PML4, PDPT | 3),
        (PDPT, PD | 3),
        (PD, 0x83),
    ];
    for (address, word) in words {
        memory
            .write_obj(word, GuestAddress(address))
            .map_err(|error| failed(&error))?;
    }
    // inc ebx; iretq
    let handler = [0xff, 0xc3, 0x48, 0xcf];
    for (address, bytes) in [(CODE, program().as_slice()), (HANDLER, &handler)] {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|error| failed(&error))?;
    }
    Ok(memory)
}

fn set_registers(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let segment = |selector: u16, type_: u8, long: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let mut special = vcpu.get_sregs()?;
    special.cs = segment(CODE_SELECTOR, 0xb, 1);
    let data = segment(DATA_SELECTOR, 0x3, 0);
    (special.ds, special.es, special.fs) = (data, data, data);
    (special.gs, special.ss) = (data, data);
    special.gdt = kvm_dtable {
        base: GDT,
        limit: 3 * 8 - 1,
        ..kvm_dtable::default()
    };
    special.idt = kvm_dtable {
        base: IDT,
        limit: 32 * 16 - 1,
        ..kvm_dtable::default()
    };
    special.cr0 = CR0;
    special.cr3 = PML4;
    special.cr4 = CR4;
    special.efer = EFER;
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        ..kvm_regs::default()
    })
}

fn execute(vcpu: &mut VcpuFd) -> KvmProbe {
    let mut mark = 0;
    let mut marked = Instant::now();
    let mut loop_time = Duration::ZERO;
    let mut groups = Vec::new();
    let mut timed = 0;
    for _ in 0..MOST_EXITS {
        let stopped = |how: String| KvmProbe::Stopped {
            at: stage(mark),
            how,
        };
        match vcpu.run() {
            Ok(VcpuExit::IoOut(EXIT_PORT, _)) => {
                timed += 1;
                if timed % GROUP == 0 {
                    groups.push(marked.elapsed() / GROUP);
                    marked = Instant::now();
                }
            }
            Ok(VcpuExit::IoOut(MARK_PORT, &[value])) if value == mark + 1 => {
                if value == LAST_MARK {
                    loop_time = marked.elapsed();
                }
                mark = value;
                marked = Instant::now();
            }
            Ok(VcpuExit::Hlt) if timed == TIMED_EXITS => {
                return KvmProbe::Ran(measured(loop_time, groups));
            }
            Ok(VcpuExit::InternalError) => return stopped("KVM_EXIT_INTERNAL_ERROR".into()),
            Ok(other) => return stopped(format!("unexpected exit {other:?}")),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return stopped(format!("KVM_RUN: {error}")),
        }
    }
    KvmProbe::Stopped {
        at: stage(mark),
        how: "more exits than the program has".into(),
    }
}

fn measured(loop_time: Duration, mut groups: Vec<Duration>) -> KvmFigures {
    groups.sort_unstable();
    let exit = groups.get(groups.len() / 2).copied().unwrap_or_default();
    KvmFigures {
        exit_us: exit.as_secs_f64() * 1e6,
        loop_mips: f64::from(2 * LOOP_ROUNDS) / loop_time.as_secs_f64().max(1e-9) / 1e6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_slow_groups_do_not_change_the_exit_time() {
        let mut groups = vec![Duration::from_micros(2); 18];
        groups.extend([Duration::from_millis(9), Duration::from_millis(70)]);
        let figures = measured(Duration::from_millis(1), groups);
        assert!((figures.exit_us - 2.0).abs() < 1e-9);
        assert!((figures.loop_mips - 100.0).abs() < 1e-6);
    }

    #[test]
    fn tables_and_code_of_the_probe_do_not_overlap() {
        assert!(CODE + program().len() as u64 <= HANDLER);
        const { assert!(IDT + 32 * 16 <= PML4 && GDT + 24 <= IDT) };
    }
}
