//! Endpoint tunnels: each connection from the host is joined with a connection to the role's
//! TCP port. Either side may close its half first.

use std::io;
use std::net::Ipv4Addr;

use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_vsock::VsockStream;
use vmbus::channel::{HOST_CID, tunnel_port};
use vmbus::stream;

use crate::bus;

/// Bytes copied at once, each way.
const BUFFER: usize = 64 * 1024;

/// Serves the tunnel of `local_port` until the task is aborted.
pub fn serve(local_port: u16) -> io::Result<JoinHandle<()>> {
    let listener = bus::listen(tunnel_port(local_port))?;
    Ok(tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((host, peer)) if peer.cid() == HOST_CID => {
                    tokio::spawn(join(host, local_port));
                }
                Ok(_) => {}
                Err(_) => tokio::time::sleep(bus::ACCEPT_PAUSE).await,
            }
        }
    }))
}

async fn join(host: VsockStream, local_port: u16) {
    // A role that does not listen refuses; the client of the endpoint sees a close.
    let Ok(role) = TcpStream::connect((Ipv4Addr::LOCALHOST, local_port)).await else {
        return;
    };
    // Without it Nagle's algorithm delays small messages until an acknowledgement.
    let _ = role.set_nodelay(true);
    stream::join(host.into_split(), role.into_split(), BUFFER).await;
}
