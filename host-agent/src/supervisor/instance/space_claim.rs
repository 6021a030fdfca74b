//! Is it true that the host has no space for a guest's writes? A guest paused for space is
//! not condemned for its silence, so its VMM process could claim a shortage for ever.
//!
//! A VMM process tries its write again each second. If the file system of the disks has
//! plenty of space in several looks and the shortage does not end, the claim is false.

use std::path::Path;
use std::time::Duration;

use nix::fcntl::posix_fallocate;
use tokio::task::JoinHandle;

use super::super::event::EventKind;
use super::Instance;
use super::space::free_on;

/// Time between two looks. Short in tests, of which some wait for it.
const EVERY: Duration = Duration::from_millis(if cfg!(test) { 300 } else { 30_000 });
/// Looks in a row that find space.
const LOOKS: u32 = 3;
/// Space beyond what is needed: less may be taken again before the write is tried.
const PLENTY: u64 = 64 << 20;

/// The claim of the current boot.
#[derive(Debug, Default)]
pub(super) struct SpaceClaim {
    /// Bytes that a write needs, and whether a quota is said to be used up.
    pub(super) claimed: Option<(u64, bool)>,
    /// It was found false in this boot: no claim is believed any more.
    pub(super) is_false: bool,
    last: Option<Duration>,
    found: u32,
    look: Option<JoinHandle<bool>>,
}

impl SpaceClaim {
    /// The shortage has ended.
    pub(super) fn end(&mut self) {
        self.claimed = None;
        self.found = 0;
        self.last = None;
    }

    /// Looks for space at `now` (`CLOCK_MONOTONIC`) if that is due. Each look is on a
    /// blocking thread, one at a time.
    fn look(&mut self, dir: &Path, now: Duration) {
        let Some((needed, quota)) = self.claimed else {
            return;
        };
        let since = *self.last.get_or_insert(now);
        if now.saturating_sub(since) < EVERY || self.look.is_some() {
            return;
        }
        self.last = Some(now);
        let dir = dir.to_owned();
        let look = move || has_space(&dir, needed, quota);
        self.look = Some(tokio::task::spawn_blocking(look));
    }

    /// Waits for the end of a look; whether the claim is false. Cancelling loses nothing.
    pub(super) async fn checked(&mut self) -> bool {
        let Some(look) = &mut self.look else {
            return std::future::pending().await;
        };
        let found = look.await.unwrap_or(false);
        self.look = None;
        self.note(found)
    }

    fn note(&mut self, found: bool) -> bool {
        if self.claimed.is_none() {
            return false;
        }
        self.found = if found { self.found + 1 } else { 0 };
        self.found >= LOOKS
    }
}

impl Instance {
    pub(super) fn check_space_claim(&mut self, now: Duration) {
        self.space_claim.look(&self.parts.dir, now);
    }

    /// The claim was checked. The silence of a guest whose claim is false counts.
    pub(super) fn space_checked(&mut self, is_false: bool) {
        if !is_false || self.boot.is_none() {
            return;
        }
        self.space_claim.end();
        self.space_claim.is_false = true;
        let text = "the VMM process says that the host has no space for a write, but there is: \
                    the guest's silence counts again";
        self.report(EventKind::Warning { text: text.into() });
        self.liveness
            .space_back(super::clock(super::ClockId::CLOCK_MONOTONIC));
    }
}

/// Whether the file system of `dir` has plenty of space for a write of `needed` bytes. Of a
/// quota only a write tells. Blocking.
fn has_space(dir: &Path, needed: u64, quota: bool) -> bool {
    if quota {
        let length = i64::try_from(needed).unwrap_or(i64::MAX);
        let file = tempfile::tempfile_in(dir);
        return file.is_ok_and(|file| posix_fallocate(&file, 0, length).is_ok());
    }
    free_on(dir).is_some_and(|free| free >= needed.saturating_add(PLENTY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_looks_in_a_row_that_find_space_refute_a_claim() {
        let mut claim = SpaceClaim::default();
        assert!(!claim.note(true));
        claim.claimed = Some((1 << 20, false));
        let looks = [true, true, false, true, true];
        assert!(looks.into_iter().all(|found| !claim.note(found)));
        assert!(claim.note(true));
        claim.end();
        assert!(!claim.note(true));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_shortage_that_lasts_is_looked_at_every_half_minute() {
        let dir = tempfile::tempdir().unwrap();
        let mut claim = SpaceClaim {
            // More than any file system has.
            claimed: Some((u64::MAX / 2, false)),
            ..SpaceClaim::default()
        };
        // As if `EVERY` had 30 s.
        let at = |seconds: u32| EVERY / 30 * seconds;
        claim.look(dir.path(), at(100));
        claim.look(dir.path(), at(129));
        assert!(claim.look.is_none());
        claim.look(dir.path(), at(130));
        assert!(!claim.checked().await);
        claim.look(dir.path(), at(159));
        assert!(claim.look.is_none());
        // A claim of a byte is false after three looks.
        claim.claimed = Some((1, true));
        for look in 2..4 {
            claim.look(dir.path(), at(100 + 30 * look));
            assert!(!claim.checked().await);
        }
        claim.look(dir.path(), at(220));
        assert!(claim.checked().await);
    }
}
