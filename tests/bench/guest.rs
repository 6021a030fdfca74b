//! The benchmark's program in a guest. As PID 1 it says that it runs and waits;
//! as a role it serves bytes: `s` swallows them and says at the end how many
//! came, `z` sends without end, `e` sends back what comes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;

/// What PID 1 writes to the console; the benchmark waits for it.
const MARK: &str = "bench: init runs\n";

fn main() -> std::io::Result<()> {
    if std::process::id() == 1 {
        std::io::stdout().write_all(MARK.as_bytes())?;
        loop {
            thread::park();
        }
    }
    let port = std::env::var("ECHO_PORT").ok();
    let port = port.and_then(|port| port.parse().ok()).unwrap_or(7000);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    for stream in listener.incoming() {
        let stream = stream?;
        // A client that goes away ends its own connection.
        thread::spawn(move || serve(stream));
    }
    Ok(())
}

fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut mode = [0];
    stream.read_exact(&mut mode)?;
    let mut block = vec![0; 256 * 1024];
    match mode[0] {
        b's' => {
            let mut total = 0u64;
            loop {
                match stream.read(&mut block)? {
                    0 => return stream.write_all(&total.to_le_bytes()),
                    count => total += count as u64,
                }
            }
        }
        b'z' => loop {
            stream.write_all(&block)?;
        },
        _ => loop {
            match stream.read(&mut block)? {
                0 => return Ok(()),
                count => stream.write_all(&block[..count])?,
            }
        },
    }
}
