//! The older of the two Debian releases that `images/build` makes guests of. The other
//! tests run on the default, Debian 13.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use anyhow::{Result, ensure};
use e2e::run::{Run, eventually};
use e2e::service::Service;
use e2e::{Sandbox, limit};

/// One service has what depends on the kernel: tunnels, quotas, a panic, power-off.
#[test]
fn a_service_runs_in_a_guest_of_debian_12() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (mut service, port) = Service::echo()?;
    service.image = "bookworm".into();
    let service = service.write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    ensure!(run.release()?.starts_with("12\n6.1."), "{}", run.release()?);
    eventually("the echo server answers", || {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(limit(5)))?;
        stream.write_all(b"echo")?;
        let mut back = [0; 4];
        Ok(stream.read_exact(&mut back).is_ok() && back == *b"echo")
    })?;
    let storage = run.shell(
        "cd /mnt/resource/Resources/directory/*; \
         setpriv --reuid=$(stat -c %u .) --clear-groups \
         dd if=/dev/zero of=full bs=1M count=100 2>&1; rm -f full",
    )?;
    ensure!(storage.contains("quota exceeded"), "{storage}");
    let _ = run.exec(&["sh", "-c", "sync; echo c > /proc/sysrq-trigger"])?;
    let exited = run.event("guest-exited", |_| true)?;
    ensure!(exited["reason"] == "panic", "{exited}");
    run.ready()?;
    let seen = run.stop()?;
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    sandbox.assert_nothing_left()
}
