//! The table of public listeners of a host.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use tokio::task::JoinHandle;

use super::{ListenError, Rotation, listen, serve};

/// Every public address that is in use, and for whom.
#[derive(Debug, Default)]
pub struct Listeners(BTreeMap<SocketAddr, Listener>);

#[derive(Debug)]
struct Listener {
    deployment: String,
    task: JoinHandle<()>,
}

impl Listeners {
    /// Listens on `address` for `deployment`; connections go round the instances of
    /// `rotation` to their port `local_port`. A client that connects while the rotation
    /// is empty is closed at once.
    ///
    /// # Errors
    /// The address is in use or not permitted.
    pub fn add(
        &mut self,
        deployment: &str,
        endpoint: &str,
        address: SocketAddr,
        rotation: Rotation,
        local_port: u16,
    ) -> Result<(), ListenError> {
        let listener = listen(endpoint, address)?;
        let task = tokio::spawn(serve(listener, rotation, local_port));
        let deployment = deployment.to_owned();
        let replaced = self.0.insert(address, Listener { deployment, task });
        debug_assert!(replaced.is_none(), "the kernel gives an address once");
        Ok(())
    }

    /// Stops listening for `deployment`.
    pub fn remove(&mut self, deployment: &str) {
        self.0.retain(|_, listener| {
            let stays = listener.deployment != deployment;
            if !stays {
                listener.task.abort();
            }
            stays
        });
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        for listener in self.0.values() {
            listener.task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::net::{Ipv4Addr, TcpListener};

    #[tokio::test(flavor = "current_thread")]
    async fn an_address_is_free_again_after_its_deployment_left() {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let mut table = Listeners::default();
        let add = |table: &mut Listeners, deployment| {
            table.add(deployment, "web", address, Rotation::default(), 80)
        };
        add(&mut table, "a").unwrap();
        let taken = add(&mut table, "b").unwrap_err();
        assert_eq!(taken.source.kind(), ErrorKind::AddrInUse);
        table.remove("a");
        // The aborted task drops its socket when the runtime next runs it.
        while add(&mut table, "b").is_err() {
            tokio::task::yield_now().await;
        }
    }
}
