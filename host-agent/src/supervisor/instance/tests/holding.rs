//! Which VMM processes hold the listening sockets of their role.

use std::net::Ipv4Addr;

use super::*;
use crate::endpoints::{Endpoint, listen};

/// Commands until the guest is to be paused, each with the number of its files.
async fn commands(started: &Started, theirs: &OwnedFd) -> Vec<(Command, usize)> {
    wire::set_nonblocking(theirs).unwrap();
    let handle = started.handle.clone();
    let pause = tokio::spawn(async move { handle.pause(true).await });
    let mut found = Vec::new();
    while !matches!(found.last(), Some((Command::Pause {}, _))) {
        match wire::recv::<Command>(theirs.as_fd()) {
            Ok(Some((command, files))) => found.push((command, files.len())),
            _ => tokio::task::yield_now().await,
        }
    }
    pause.abort();
    found
}

#[tokio::test(flavor = "current_thread")]
async fn an_adopted_vmm_process_holds_new_sockets_if_it_can() {
    for (durable, holds_listeners) in [(true, true), (true, false), (false, true)] {
        let (ours, theirs) = wire::pair().unwrap();
        let state = Attached {
            holds_listeners,
            ..Attached::default()
        };
        let adopt = |prepared| adopting(prepared, limited(ours), state);
        let started = started_as(HeartbeatRule::DEFAULT, durable, |_| {}, adopt);
        tokio::task::yield_now().await;
        // Its address was in use until now.
        let listener = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let endpoint = Endpoint {
            label: "ep".into(),
            address: listener.local_addr().unwrap(),
            local_port: 80,
            rotation: Rotation::default(),
            held: started.listeners.clone(),
        };
        endpoint.hold(&listener);
        // The actor has seen the change.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let commands = commands(&started, &theirs).await;
        let hold = commands
            .iter()
            .rfind(|(command, _)| *command == Command::HoldListeners {});
        let expected = (durable && holds_listeners).then_some(1);
        assert_eq!(hold.map(|(_, files)| *files), expected, "{commands:?}");
        started.end().await;
    }
}
