//! Endpoint tunnels: each connection from the host is joined with a connection to the role's
//! TCP port that its first frame names. Either side may close its half first.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use vmbus::channel::{HOST_CID, TUNNEL_PORT};
use vmbus::message::{Goal, TunnelRequest};
use vmbus::stream::{self, FrameReader};

use crate::bus;

/// Bytes copied at once, each way.
const BUFFER: usize = 64 * 1024;

/// Local ports of the role's endpoints: connections to others are closed.
#[derive(Debug, Clone, Default)]
pub struct Endpoints(Arc<RwLock<BTreeSet<u16>>>);

impl Endpoints {
    /// The endpoints are those of `goal`; connections to others stay until they end.
    pub fn set(&self, goal: &Goal) {
        let ports = goal.role.endpoints.iter().map(|it| it.local_port);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = ports.collect();
    }

    fn have(&self, port: u16) -> bool {
        let ports = self.0.read().unwrap_or_else(PoisonError::into_inner);
        ports.contains(&port)
    }
}

/// Serves the tunnels of `endpoints` for the life of the process.
pub async fn serve(endpoints: Endpoints) {
    let listener = bus::listen_when_free(TUNNEL_PORT).await;
    loop {
        match listener.accept().await {
            Ok((host, peer)) if peer.cid() == HOST_CID => {
                let endpoints = endpoints.clone();
                tokio::spawn(async move {
                    let (reader, writer) = host.into_split();
                    join(reader, writer, &endpoints).await;
                });
            }
            Ok(_) => {}
            Err(_) => tokio::time::sleep(bus::ACCEPT_PAUSE).await,
        }
    }
}

/// Joins the host's connection with the role's. A role that does not listen refuses: the
/// client of the endpoint sees a close.
async fn join<R, W>(reader: R, writer: W, endpoints: &Endpoints)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut frames = FrameReader::new(reader);
    let Ok(Some(TunnelRequest { local_port })) = frames.next().await else {
        return;
    };
    if !endpoints.have(local_port) {
        return;
    }
    let Ok(role) = TcpStream::connect((Ipv4Addr::LOCALHOST, local_port)).await else {
        return;
    };
    // Without it Nagle's algorithm delays small messages until an acknowledgement.
    let _ = role.set_nodelay(true);
    let (reader, early) = frames.into_parts();
    let reader = Cursor::new(early).chain(reader);
    stream::join((reader, writer), role.into_split(), BUFFER).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::{TcpListener, UnixStream};

    /// What a client sees whose connection begins with `request`, then `text`.
    async fn client(endpoints: &Endpoints, request: &TunnelRequest, text: &str) -> String {
        let (mut client, tunnel) = UnixStream::pair().unwrap();
        let mut bytes = vmbus::frame::encode(request).unwrap();
        bytes.extend(text.as_bytes());
        client.write_all(&bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let (reader, writer) = tunnel.into_split();
        join(reader, writer, endpoints).await;
        let mut seen = String::new();
        client.read_to_string(&mut seen).await.unwrap();
        seen
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_first_frame_chooses_among_the_endpoints_of_the_goal() {
        let role = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let local_port = role.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let mut seen = String::new();
            let (mut socket, _) = role.accept().await.unwrap();
            socket.read_to_string(&mut seen).await.unwrap();
            socket
                .write_all(seen.to_uppercase().as_bytes())
                .await
                .unwrap();
        });
        let request = TunnelRequest { local_port };
        let endpoints = Endpoints::default();
        assert_eq!(client(&endpoints, &request, "no endpoint").await, "");
        let mut goal = crate::environment::tests::goal(&[]);
        goal.role.endpoints[0].local_port = local_port;
        endpoints.set(&goal);
        assert_eq!(client(&endpoints, &request, "hello").await, "HELLO");
        server.await.unwrap();
    }
}
