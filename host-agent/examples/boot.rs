//! Boots a kernel and an initrd in a VMM process and prints its events: for
//! work on the VMM itself, without images, agents or a supervisor.
//!
//! `boot PROGRAM KERNEL INITRD VCPUS MIB COMMAND-LINE`

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command as Program, Stdio};

use anyhow::{Context, Result};
use host_agent::vmm::control::{Command, Event};
use host_agent::vmm::spec::{FileIndex, GuestSpec, SerialSpec};
use host_agent::vmm::wire;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [program, kernel, initrd, vcpus, mib, line] = <[String; 6]>::try_from(arguments)
        .ok()
        .context("boot PROGRAM KERNEL INITRD VCPUS MIB COMMAND-LINE")?;
    let (ours, theirs) = wire::pair()?;
    let mut child = Program::new(program)
        .arg("vmm")
        .stdin(Stdio::from(theirs))
        .spawn()?;
    let log = tempfile::tempfile()?;
    let files: Vec<OwnedFd> = vec![
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")?
            .into(),
        File::open(kernel)?.into(),
        File::open(initrd)?.into(),
        log.try_clone()?.into(),
        tempfile::tempfile()?.into(),
    ];
    let spec = GuestSpec {
        name: "boot".into(),
        vcpus: vcpus.parse()?,
        memory_mib: mib.parse()?,
        cmdline: line,
        kvm: FileIndex(0),
        kernel: FileIndex(1),
        initrd: FileIndex(2),
        serial: SerialSpec {
            current: FileIndex(3),
            previous: FileIndex(4),
            max_bytes: 1 << 20,
        },
        disks: vec![],
        outlive_supervisor: false,
    };
    let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    wire::send(ours.as_fd(), &Command::Start(Box::new(spec)), &borrowed)?;
    while let Some((event, _)) = wire::recv::<Event>(ours.as_fd())? {
        println!("{event:?}");
    }
    println!("{}", child.wait()?);
    let mut log = log;
    std::io::Seek::rewind(&mut log)?;
    std::io::copy(&mut log, &mut std::io::stdout())?;
    Ok(())
}
