//! The last channel events of a guest whose VMM process ended.

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::channels::ChannelEvent;

/// Gives `take` every event that the guest sent before its end. Each channel is
/// a socket of its own, so that a last status may still be unread when the
/// control socket has already reported the power-off. Returns when `connections`
/// closes, which it does with the last connection, or at `limit`; false as soon
/// as `take` returns false.
pub(super) async fn drain(
    events: &mut mpsc::Receiver<(u64, ChannelEvent)>,
    connections: &mut mpsc::Receiver<Infallible>,
    limit: Duration,
    mut take: impl FnMut(u64, ChannelEvent) -> bool,
) -> bool {
    let limit = tokio::time::sleep(limit);
    tokio::pin!(limit);
    loop {
        tokio::select! {
            biased;
            () = &mut limit => break,
            Some((generation, event)) = events.recv() => {
                if !take(generation, event) {
                    return false;
                }
            }
            _ = connections.recv() => break,
        }
    }
    while let Ok((generation, event)) = events.try_recv() {
        if !take(generation, event) {
            return false;
        }
    }
    true
}
