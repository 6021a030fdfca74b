//! The client's side of `GET /v1/events`: the query, and the events in the answer.

use super::client::{BodyBytes, ClientError};
use super::types::{EventInfo, EventQuery};

/// Most bytes of an event.
const MAX_EVENT: usize = 4 << 20;

/// `query` as it stands in a URI.
pub(super) fn query_text(query: &EventQuery) -> String {
    let mut text = format!("follow={}", query.follow);
    let after = query.after.map(|after| after.to_string());
    for (name, value) in [
        ("after", &after),
        ("service", &query.service),
        ("deployment", &query.deployment),
        ("instance", &query.instance),
    ] {
        if let Some(value) = value {
            text.push_str(&format!("&{name}="));
            push_encoded(&mut text, value);
        }
    }
    text
}

/// Percent-encodes all but the unreserved characters (RFC 3986, 2.3).
fn push_encoded(text: &mut String, value: &str) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
}

/// The events of an answer as they arrive.
#[derive(Debug)]
pub struct EventStream {
    body: BodyBytes,
    frames: Frames,
}

impl EventStream {
    pub(super) fn new(body: BodyBytes) -> Self {
        Self {
            body,
            frames: Frames::default(),
        }
    }

    /// The next event; `None` at the end of the answer. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<EventInfo>, ClientError> {
        loop {
            if let Some(data) = self.frames.next() {
                let event = serde_json::from_str(&data);
                return event.map(Some).map_err(|_| self.body.version());
            }
            let Some(bytes) = self.body.next().await? else {
                return Ok(None);
            };
            if self.frames.waiting.len() + bytes.len() > MAX_EVENT {
                return Err(self.body.version());
            }
            self.frames.waiting.extend_from_slice(&bytes);
        }
    }
}

/// Cuts `text/event-stream` into its events.
#[derive(Debug, Default)]
struct Frames {
    /// Bytes after the last line.
    waiting: Vec<u8>,
    /// Lines of the event that has not ended.
    data: Vec<String>,
}

impl Frames {
    /// The data of the next whole event.
    fn next(&mut self) -> Option<String> {
        while let Some(end) = self.waiting.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.waiting.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            // The number is in the data too. A line that begins with a colon is a comment.
            if let Some(data) = line.strip_prefix("data:") {
                self.data
                    .push(data.strip_prefix(' ').unwrap_or(data).into());
            } else if line.is_empty() && !self.data.is_empty() {
                return Some(std::mem::take(&mut self.data).join("\n"));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_value_stays_one_part_of_the_query() {
        let query = EventQuery {
            after: Some(7),
            follow: false,
            service: Some("a&after=9 \u{e9}%#".into()),
            deployment: None,
            instance: Some("A_IN_0".into()),
        };
        assert_eq!(
            query_text(&query),
            "follow=false&after=7&service=a%26after%3D9%20%C3%A9%25%23&instance=A_IN_0"
        );
    }

    proptest! {
        #[test]
        fn events_are_whole_however_their_bytes_arrive(
            texts in proptest::collection::vec("[ -~\n\u{e9}]{0,20}", 1..5),
            cuts in proptest::collection::vec(1usize..9, 1..20),
        ) {
            let mut bytes = Vec::new();
            for text in &texts {
                bytes.extend_from_slice(b": comment\n\nid: 7\n");
                for line in text.split('\n') {
                    bytes.extend_from_slice(format!("data: {line}\r\n").as_bytes());
                }
                bytes.extend_from_slice(b"\n");
            }
            let (mut frames, mut found) = (Frames::default(), Vec::new());
            let mut cuts = cuts.iter().cycle();
            while !bytes.is_empty() {
                let cut = bytes.len().min(*cuts.next().unwrap());
                frames.waiting.extend(bytes.drain(..cut));
                while let Some(data) = frames.next() {
                    found.push(data);
                }
            }
            prop_assert_eq!(found, texts);
        }
    }
}
