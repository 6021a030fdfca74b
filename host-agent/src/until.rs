//! Waits for a time, or for ever if there is none.

use tokio::time::{Instant, sleep_until};

/// Waits until `at`.
pub async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
