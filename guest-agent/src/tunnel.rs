//! Endpoint tunnels: each connection from the host is joined with the role's
//! TCP port; either side may close its half first.

use std::io;
use std::net::Ipv4Addr;

use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use vmbus::channel::{HOST_CID, tunnel_port};

use crate::bus;

/// Bytes copied at once, each way.
const BUFFER: usize = 64 * 1024;

/// Serves the tunnel of `local_port` until the task is dropped.
pub fn serve(local_port: u16) -> io::Result<JoinHandle<()>> {
    let listener = bus::listen(tunnel_port(local_port))?;
    Ok(tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) if peer.cid() == HOST_CID => {
                    tokio::spawn(join(stream, local_port));
                }
                Ok(_) => {}
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }))
}

async fn join(mut host: tokio_vsock::VsockStream, local_port: u16) {
    // A role that does not listen refuses: the host's client sees a close.
    let Ok(mut role) = TcpStream::connect((Ipv4Addr::LOCALHOST, local_port)).await else {
        return;
    };
    // Small messages must not wait for acknowledgements that never come alone.
    let _ = role.set_nodelay(true);
    let _ = copy_bidirectional_with_sizes(&mut host, &mut role, BUFFER, BUFFER).await;
}
