//! The benchmark's program in a guest.
//!
//! As PID 1 of an initrd without modules it prints a line and waits. With modules it
//! loads them, makes the first disk its root and serves on vsock. As a role it serves
//! on its endpoint. Each connection begins with a letter:
//!
//! - `s`, a length: reads that many bytes, then sends one byte
//! - `z`: sends without end
//! - `e`: sends back what it receives
//! - `x`, a length, a shell line of that length: runs the line and sends its output

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::thread;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket,
};

/// What PID 1 writes to the console; the benchmark waits for it.
const MARK: &str = "bench: init runs\n";
/// The vsock port.
const PORT: u32 = 7000;

fn main() -> io::Result<()> {
    if std::process::id() != 1 {
        return serve_role();
    }
    if !Path::new("/modules").exists() {
        print_and_wait()
    }
    if let Err(error) = serve_guest() {
        println!("bench: {error}");
    }
    loop {
        thread::park();
    }
}

fn print_and_wait() -> ! {
    // Without a console the line cannot be printed.
    let _ = io::stdout().write_all(MARK.as_bytes());
    loop {
        thread::park();
    }
}

fn serve_role() -> io::Result<()> {
    let port = std::env::var("ECHO_PORT").ok();
    let port = port.and_then(|port| port.parse().ok()).unwrap_or(7000);
    for stream in TcpListener::bind((Ipv4Addr::LOCALHOST, port))?.incoming() {
        let stream = stream?;
        stream.set_nodelay(true)?;
        let stream = OwnedFd::from(stream);
        // An error ends only this connection.
        thread::spawn(move || serve(stream.into()));
    }
    Ok(())
}

fn serve_guest() -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/dev", Some("devtmpfs"), MsFlags::empty(), none)?;
    for name in fs::read_to_string("/modules/order")?.lines() {
        let module = File::open(Path::new("/modules").join(name))?;
        finit_module(module, c"", ModuleInitFlags::empty())?;
    }
    fs::create_dir_all("/disk")?;
    mount(
        Some("/dev/vda"),
        "/disk",
        Some("ext4"),
        MsFlags::MS_NOATIME,
        none,
    )?;
    // No sysfs: fio reads the size of a cache line from it and fails where the VMM
    // describes no caches. Without sysfs fio assumes 64 bytes.
    for (kind, at) in [("proc", "/disk/proc"), ("devtmpfs", "/disk/dev")] {
        mount(none, at, Some(kind), MsFlags::empty(), none)?;
    }
    nix::unistd::chroot("/disk")?;
    nix::unistd::chdir("/")?;
    let listener = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(
        listener.as_raw_fd(),
        &VsockAddr::new(libc::VMADDR_CID_ANY, PORT),
    )?;
    listen(&listener, Backlog::new(16)?)?;
    io::stdout().write_all(MARK.as_bytes())?;
    loop {
        let stream = owned(accept(listener.as_raw_fd())?);
        thread::spawn(move || serve(stream.into()));
    }
}

#[allow(unsafe_code)]
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: `accept` has just returned the descriptor, and no other code owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn serve(mut stream: File) -> io::Result<()> {
    let mut mode = [0];
    stream.read_exact(&mut mode)?;
    let mut block = vec![0; 256 * 1024];
    match mode[0] {
        b's' => {
            let mut left = length(&mut stream)?;
            while left > 0 {
                match stream.read(&mut block)? {
                    0 => return Ok(()),
                    count => left = left.saturating_sub(count as u64),
                }
            }
            stream.write_all(b"!")
        }
        b'z' => loop {
            stream.write_all(&block)?;
        },
        b'x' => {
            let mut line = vec![0; usize::try_from(length(&mut stream)?).unwrap_or(0)];
            stream.read_exact(&mut line)?;
            let line = String::from_utf8_lossy(&line).into_owned();
            let output = Command::new("/bin/sh")
                .args(["-c", &line])
                .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
                .output()?;
            stream.write_all(&output.stdout)?;
            stream.write_all(&output.stderr)
        }
        _ => loop {
            match stream.read(&mut block)? {
                0 => return Ok(()),
                count => stream.write_all(&block[..count])?,
            }
        },
    }
}

fn length(stream: &mut File) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
