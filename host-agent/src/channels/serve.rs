//! The messages of each channel after its hello.

use std::time::Duration;

use tokio::io::{ReadHalf, WriteHalf};
use tokio::time::Instant;
use vmbus::channel::Channel;
use vmbus::message::{LogRecord, MAX_DETAIL, Status, ToGuest, ToHost};
use vmbus::stream::{FrameReader, send};
use vmbus::version::Hello;

use super::{ChannelError, ChannelEvent, GuestChannels};
use crate::guest_stream::GuestStream;
use crate::printable::{escaped, is_printable};
use crate::token_bucket::{Rate, TokenBucket};

/// Longest guest text taken into an event, in characters.
pub(super) const MAX_TEXT: usize = MAX_DETAIL;
/// Longest name of an agent taken into an event, in characters.
const MAX_AGENT_NAME: usize = 100;
/// Status reports of a connection. A guest that sends more waits on its own
/// connection.
const STATUS_RATE: Rate = Rate::new(20, STATUS_PAUSE);
const STATUS_PAUSE: Duration = Duration::from_millis(50);

type Reader = FrameReader<ReadHalf<GuestStream>>;
type Writer = WriteHalf<GuestStream>;

impl GuestChannels {
    pub(super) async fn serve(
        &self,
        channel: Channel,
        hello: &Hello,
        reader: Reader,
        writer: Writer,
    ) -> Result<(), ChannelError> {
        match channel {
            Channel::Control => self.control(hello, reader).await,
            Channel::Heartbeat => self.heartbeat(reader, writer).await,
            Channel::Goal => self.goal(reader, writer).await,
            Channel::Status => self.status(reader).await,
            Channel::Agent => self.agent(reader, writer).await,
            Channel::Log => self.log_records(reader).await,
            Channel::Shutdown => self.shutdown(reader, writer).await,
        }
    }

    async fn control(&self, hello: &Hello, mut reader: Reader) -> Result<(), ChannelError> {
        while let Some(message) = reader.next().await? {
            let ToHost::Booted { init_ms, .. } = message else {
                return Err(unexpected(&message));
            };
            let agent = clean(&hello.agent, MAX_AGENT_NAME);
            self.report_caused(ChannelEvent::Booted { init_ms, agent })
                .await;
        }
        Ok(())
    }

    async fn heartbeat(&self, mut reader: Reader, mut writer: Writer) -> Result<(), ChannelError> {
        loop {
            let sequence = self.next_sequence();
            self.report(ChannelEvent::Asked(sequence)).await;
            send(&mut writer, &ToGuest::Ask { sequence }).await?;
            let pause = tokio::time::sleep(self.interval.mul_f64(jitter(sequence)));
            tokio::pin!(pause);
            // The host causes one answer.
            let mut is_due = true;
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    message = reader.next() => match message? {
                        Some(ToHost::Beat(beat)) if std::mem::take(&mut is_due) => {
                            self.report(ChannelEvent::Beat(beat)).await;
                        }
                        Some(ToHost::Beat(beat)) => {
                            self.report_caused(ChannelEvent::Beat(beat)).await;
                        }
                        Some(other) => return Err(unexpected(&other)),
                        None => return Ok(()),
                    },
                }
            }
        }
    }

    async fn goal(&self, mut reader: Reader, mut writer: Writer) -> Result<(), ChannelError> {
        let mut goal = self.goal.clone();
        loop {
            let current = goal.borrow_and_update().clone();
            send(&mut writer, &ToGuest::Goal(Box::new(current))).await?;
            tokio::select! {
                changed = goal.changed() => if changed.is_err() { return Ok(()) },
                message = reader.next::<ToHost>() => match message? {
                    Some(other) => return Err(unexpected(&other)),
                    None => return Ok(()),
                },
            }
        }
    }

    async fn status(&self, mut reader: Reader) -> Result<(), ChannelError> {
        let mut bucket = TokenBucket::new(STATUS_RATE);
        while let Some(message) = reader.next().await? {
            let ToHost::Status(status) = message else {
                return Err(unexpected(&message));
            };
            let detail = clean(&status.detail, MAX_TEXT);
            self.report_caused(ChannelEvent::Status(Status { detail, ..status }))
                .await;
            while !bucket.take(Instant::now()) {
                tokio::time::sleep(STATUS_PAUSE).await;
            }
        }
        Ok(())
    }

    async fn log_records(&self, mut reader: Reader) -> Result<(), ChannelError> {
        while let Some(message) = reader.next().await? {
            let ToHost::Log(record) = message else {
                return Err(unexpected(&message));
            };
            let LogRecord {
                source,
                stream,
                uptime_ms,
                dropped,
                text,
            } = record;
            if dropped > 0 {
                self.log(source, &format!("[{dropped} lines lost by the guest]"));
            }
            let stream = clean(&stream, MAX_AGENT_NAME);
            let (seconds, millis) = (uptime_ms / 1000, uptime_ms % 1000);
            self.log(
                source,
                &format!("[{seconds:>6}.{millis:03}] {stream}: {}", escaped(&text)),
            );
        }
        Ok(())
    }

    async fn shutdown(&self, mut reader: Reader, mut writer: Writer) -> Result<(), ChannelError> {
        let mut wanted = self.shutdown.clone();
        let mut sent = false;
        loop {
            let request = *wanted.borrow_and_update();
            if let (Some(request), false) = (request, sent) {
                let message = ToGuest::Shutdown {
                    then: request.then,
                    deadline_ms: u64::try_from(request.deadline.as_millis()).unwrap_or(u64::MAX),
                };
                send(&mut writer, &message).await?;
                sent = true;
            }
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return Ok(()) },
                message = reader.next() => match message? {
                    Some(ToHost::ShutdownBegun {}) => {
                        self.report_caused(ChannelEvent::ShutdownBegun).await;
                    }
                    Some(other) => return Err(unexpected(&other)),
                    None => return Ok(()),
                },
            }
        }
    }
}

pub(super) fn unexpected(message: &ToHost) -> ChannelError {
    let name = format!("{message:?}");
    let name: String = name.chars().take_while(|c| c.is_alphanumeric()).collect();
    ChannelError::Protocol(format!("message {name} does not belong on this channel"))
}

/// Spreads questions over four fifths to six fifths of the interval without a
/// source of randomness: consecutive questions fall in different places.
fn jitter(sequence: u64) -> f64 {
    let spread = (sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
    0.8 + 0.4 * f64::from(spread) / f64::from(u32::MAX)
}

/// Text that may quote the guest, short enough for an event.
pub(super) fn bounded(text: &str) -> String {
    clean(text, MAX_TEXT)
}

/// Guest text with blanks for characters that are not printable, cut at `most` characters.
pub(super) fn clean(text: &str, most: usize) -> String {
    let printable = |c| if is_printable(c) { c } else { ' ' };
    text.chars().map(printable).take(most).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_spread_by_a_fifth_each_way() {
        let all: Vec<f64> = (0..1000).map(jitter).collect();
        assert!(all.iter().all(|f| (0.8..=1.2).contains(f)));
        assert!(all.iter().any(|f| *f < 0.85) && all.iter().any(|f| *f > 1.15));
    }

    #[test]
    fn guest_text_cannot_forge_lines_or_drive_a_terminal() {
        assert_eq!(clean("a\nb\x1b[2J", 5), "a b [");
        assert_eq!(clean("a\u{202e}b\u{2028}c", 5), "a b c");
    }
}
