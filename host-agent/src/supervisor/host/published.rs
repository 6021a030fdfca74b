//! The public endpoints of a deployment: their listening sockets, and the rotation of each
//! role.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::super::event::EventKind;
use super::super::spec::PublicEndpoint;
use super::super::timeline::Timeline;
use super::HostError;
use crate::endpoints::{Endpoint, HandedOver, HeldListeners, Rotation, listen};

/// The endpoints of a deployment. Drop closes their sockets in this process; VMM processes
/// that hold them keep them open.
#[derive(Debug, Default)]
pub struct Published {
    roles: Vec<PublishedRole>,
    tasks: JoinSet<()>,
}

/// What the instances of a role share. Clones are of the same role.
#[derive(Debug, Clone, Default)]
pub(super) struct RoleEndpoints {
    /// The instances that take connections.
    pub(super) rotation: Rotation,
    /// The listening sockets.
    pub(super) listeners: HeldListeners,
}

#[derive(Debug)]
struct PublishedRole {
    name: String,
    shared: RoleEndpoints,
    /// Those that are not served yet.
    endpoints: Vec<(PublicEndpoint, Option<TcpListener>)>,
}

impl Published {
    /// Listens on the public addresses of roles, each given by its name and endpoints.
    ///
    /// # Errors
    /// An address is in use or not permitted.
    pub fn listen<'a>(
        roles: impl IntoIterator<Item = (&'a str, &'a [PublicEndpoint])>,
    ) -> Result<Self, HostError> {
        let mut this = Self::of(roles);
        for role in &mut this.roles {
            for (endpoint, listener) in &mut role.endpoints {
                let opened = listen(&endpoint.label, endpoint.address);
                *listener = Some(opened.map_err(|source| HostError::Listen {
                    role: role.name.clone(),
                    name: endpoint.name.clone(),
                    source,
                })?);
            }
        }
        Ok(this)
    }

    /// The endpoints of roles, none of which listens.
    pub(super) fn of<'a>(roles: impl IntoIterator<Item = (&'a str, &'a [PublicEndpoint])>) -> Self {
        let mut this = Self::default();
        for (name, endpoints) in roles {
            if this.roles.iter().any(|role| role.name == name) {
                continue;
            }
            let endpoints = endpoints.iter().map(|endpoint| (endpoint.clone(), None));
            this.roles.push(PublishedRole {
                name: name.to_owned(),
                shared: RoleEndpoints::default(),
                endpoints: endpoints.collect(),
            });
        }
        this
    }

    /// Takes the listening sockets that a VMM process of `role` held, where no other one has
    /// given them. The number of descriptors that are none of these.
    pub(super) fn take_over(&mut self, role: &str, mut handed_over: HandedOver) -> usize {
        let role = self.roles.iter_mut().find(|found| found.name == role);
        let Some(role) = role else {
            return handed_over.foreign(&[]);
        };
        let endpoints = role.endpoints.iter();
        let addresses: Vec<SocketAddr> = endpoints.map(|(it, _)| it.address).collect();
        let foreign = handed_over.foreign(&addresses);
        for (endpoint, listener) in &mut role.endpoints {
            if listener.is_none() {
                *listener = handed_over.take(endpoint.address);
            }
        }
        foreign
    }

    /// Accepts clients. An endpoint that does not listen yet does so as soon as its address
    /// is free. `patience` as in [`Endpoint::serve`].
    pub(super) fn serve(&mut self, timeline: &Timeline, patience: Duration) {
        for role in &mut self.roles {
            for (public, listener) in role.endpoints.drain(..) {
                let endpoint = Endpoint {
                    label: public.label,
                    address: public.address,
                    local_port: public.local_port,
                    rotation: role.shared.rotation.clone(),
                    held: role.shared.listeners.clone(),
                };
                // Before an instance starts, which then holds it.
                let listener = listener.or_else(|| endpoint.listen().ok());
                if let Some(listener) = &listener {
                    endpoint.hold(listener);
                }
                let timeline = timeline.clone();
                let warn = move |text| timeline.report(None, EventKind::Warning { text });
                self.tasks.spawn(endpoint.serve(listener, patience, warn));
            }
        }
    }

    /// What the instances of `role` share.
    pub(super) fn of_role(&self, role: &str) -> RoleEndpoints {
        let role = self.roles.iter().find(|found| found.name == role);
        role.map(|role| role.shared.clone()).unwrap_or_default()
    }

    /// Waits until every listener is closed in this process.
    pub(super) async fn close(mut self) {
        self.tasks.shutdown().await;
        for role in &self.roles {
            role.shared.listeners.clear();
        }
    }
}
