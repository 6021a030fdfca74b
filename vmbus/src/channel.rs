//! The one table of channels: name, vsock port, and who opens the connection.

use serde::{Deserialize, Serialize};

/// Context id of the host on every virtio-vsock device (virtio 1.2, 5.10.4).
pub const HOST_CID: u32 = 2;

/// Context id given to every guest. Each guest has a device of its own, so the
/// number identifies nothing: a guest's identity is its device.
pub const GUEST_CID: u32 = 3;

/// Source ports below this need `CAP_NET_BIND_SERVICE` in the guest. The host accepts control
/// channels from such ports only, so that a role without privileges cannot pose as an agent.
pub const PRIVILEGED_PORTS: u32 = 1024;

/// Guest port on which the guest agent accepts connections to the role's endpoints. A
/// [`crate::message::TunnelRequest`] is the first frame of each; raw bytes follow.
///
/// Agents listen on [`PRIVILEGED_PORTS`] alone: a role without privileges could bind any other
/// port while no agent listens, and take the connections of clients.
pub const TUNNEL_PORT: u32 = 21;

/// Guest port on which the guest agent accepts `exec` connections from the host. They speak
/// the version of the guest agent's channels.
pub const EXEC_PORT: u32 = 20;

const _: () = assert!(EXEC_PORT < PRIVILEGED_PORTS && TUNNEL_PORT < PRIVILEGED_PORTS);

/// A channel that the guest dials on [`HOST_CID`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// The app agent reports its boot; stays open.
    Control,
    /// The host asks, the app agent answers.
    Heartbeat,
    /// Goal states, host to guest agent.
    Goal,
    /// Role status, guest agent to host.
    Status,
    /// Delivers the guest-agent program to the app agent.
    Agent,
    /// Log records, both agents to host; several connections may be open.
    Log,
    /// The host tells the app agent to power off or reboot.
    Shutdown,
}

impl Channel {
    /// Every channel, in the order of its port.
    pub const ALL: [Self; 7] = [
        Self::Control,
        Self::Heartbeat,
        Self::Goal,
        Self::Status,
        Self::Agent,
        Self::Log,
        Self::Shutdown,
    ];

    /// The host port on which the channel is served.
    pub const fn port(self) -> u32 {
        match self {
            Self::Control => 10,
            Self::Heartbeat => 11,
            Self::Goal => 12,
            Self::Status => 13,
            Self::Agent => 14,
            Self::Log => 15,
            Self::Shutdown => 16,
        }
    }

    /// The channel served on host port `port`, if there is one.
    pub fn from_port(port: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|channel| channel.port() == port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_port_of_a_channel_finds_it() {
        for channel in Channel::ALL {
            assert_eq!(Channel::from_port(channel.port()), Some(channel));
        }
        let known: Vec<u32> = Channel::ALL.iter().map(|c| c.port()).collect();
        for port in (0..70_000).chain([u32::MAX]) {
            assert_eq!(Channel::from_port(port).is_some(), known.contains(&port));
        }
    }
}
