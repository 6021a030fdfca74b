//! Who may see the page on TCP: the secret of its address, and the sessions of browsers that
//! had it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::digest::Digest;
use crate::store::deployment::random_id;

/// Most sessions: the oldest ends when there would be one more.
const MOST: usize = 32;

/// A session ends after this time: a working day.
pub(super) const LASTS: Duration = Duration::from_secs(12 * 60 * 60);

/// The sessions of one listener. Secrets are kept as digests, so that the time of a comparison
/// says nothing about them.
#[derive(Debug)]
pub(super) struct Sessions {
    token: Digest,
    open: Mutex<VecDeque<Open>>,
}

#[derive(Debug)]
struct Open {
    id: Digest,
    csrf: String,
    since: Instant,
}

/// A session, as handlers see it.
#[derive(Debug, Clone)]
pub(super) struct Session {
    /// Every form sends it back: another site cannot know it.
    pub(super) csrf: String,
}

impl Sessions {
    /// No session yet, and the token that opens one.
    pub(super) fn new() -> io::Result<(Self, String)> {
        let token = random_id()?;
        let this = Self {
            token: digest(&token),
            open: Mutex::default(),
        };
        Ok((this, token))
    }

    /// Opens a session for a client with `token`; the id of the session.
    pub(super) fn open(&self, token: &str, now: Instant) -> io::Result<Option<String>> {
        if digest(token) != self.token {
            return Ok(None);
        }
        let (id, csrf) = (random_id()?, random_id()?);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= MOST {
            open.pop_front();
        }
        open.push_back(Open {
            id: digest(&id),
            csrf,
            since: now,
        });
        Ok(Some(id))
    }

    /// The session `id`, unless it is over.
    pub(super) fn find(&self, id: &str, now: Instant) -> Option<Session> {
        let id = digest(id);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|session| now.saturating_duration_since(session.since) < LASTS);
        let found = open.iter().find(|session| session.id == id)?;
        Some(Session {
            csrf: found.csrf.clone(),
        })
    }
}

fn digest(secret: &str) -> Digest {
    let (digest, _) = Digest::of(secret.as_bytes()).expect("memory can be read");
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_opens_a_session_which_ends_after_a_time() {
        let now = Instant::now();
        let (sessions, token) = Sessions::new().unwrap();
        assert_eq!(sessions.open("", now).unwrap(), None);
        assert_eq!(sessions.open(&token[1..], now).unwrap(), None);
        let id = sessions.open(&token, now).unwrap().unwrap();
        assert_ne!(sessions.find(&id, now).unwrap().csrf, id);
        assert!(sessions.find(&token, now).is_none());
        assert!(sessions.find(&id, now + LASTS).is_none());
        let first = sessions.open(&token, now).unwrap().unwrap();
        for _ in 0..MOST {
            sessions.open(&token, now).unwrap().unwrap();
        }
        assert!(sessions.find(&first, now).is_none());
    }
}
