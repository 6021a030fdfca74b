//! Channels with guests that are silent, flood the host, or break the protocol.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as Blocking;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use vmbus::frame;
use vmbus::message::{ExpectedState, Health, LogRecord, RoleState, Status, ToGuest, ToHost};
use vmbus::role::{EntryPoint, RoleDefinition};

use super::*;
use crate::closer::tests::{busy, is_open};
use crate::token_bucket::Rate;

const HELLO_LIMIT: Duration = Duration::from_millis(500);

struct Host {
    channels: Arc<GuestChannels>,
    events: mpsc::Receiver<(u64, ChannelEvent)>,
    dir: tempfile::TempDir,
    _goal: watch::Sender<Goal>,
    _shutdown: watch::Sender<Option<ShutdownRequest>>,
}

fn host(interval: Duration) -> Host {
    let dir = tempfile::tempdir().unwrap();
    let log = |name| Arc::new(QueuedWriter::open_log(&dir.path().join(name)).unwrap());
    let (sender, events) = mpsc::channel(256);
    let (goal, of_goal) = watch::channel(Goal {
        incarnation: 1,
        expected: ExpectedState::Started,
        deployment_id: String::new(),
        instance: String::new(),
        update_domain: 0,
        fault_domain: 0,
        role: RoleDefinition {
            name: String::new(),
            entry_point: EntryPoint::Program {
                command: Vec::new(),
                ready_on_start: true,
            },
            elevated: false,
            settings: std::collections::BTreeMap::new(),
            environment: Vec::new(),
            local_storage: Vec::new(),
            endpoints: Vec::new(),
        },
        application_disk: String::new(),
        resource_disk: String::new(),
        stop_timeout_ms: 0,
    });
    let (shutdown, of_shutdown) = watch::channel(None);
    let channels = GuestChannels {
        generation: 1,
        interval,
        hello_limit: HELLO_LIMIT,
        events: sender,
        goal: of_goal,
        shutdown: of_shutdown,
        program: Arc::new(AgentProgram {
            version: String::new(),
            sha256: String::new(),
            size: 0,
            file: Arc::new(tempfile::tempfile().unwrap()),
        }),
        offers: watch::channel(None).1,
        role_log: log("role.log"),
        agent_log: log("agent.log"),
        alive: mpsc::channel(1).0,
        sequence: AtomicU64::new(0),
        budget: Arc::default(),
        closer: Closer::default(),
    };
    Host {
        channels: Arc::new(channels),
        events,
        dir,
        _goal: goal,
        _shutdown: shutdown,
    }
}

impl Host {
    /// The guest's end of a connection to `channel`.
    fn dial(&self, channel: Channel) -> Blocking {
        let (ours, theirs) = Blocking::pair().unwrap();
        self.channels.accept(channel.port(), 700, theirs.into());
        ours
    }
}

fn hello(channel: Channel) -> Vec<u8> {
    let hello = Hello {
        channel,
        versions: SUPPORTED.to_vec(),
        boot_id: "boot".into(),
        agent: "test".into(),
    };
    frame::encode(&hello).unwrap()
}

#[tokio::test]
async fn a_connection_without_a_hello_is_closed_at_the_limit() {
    let host = host(Duration::from_secs(5));
    let started = Instant::now();
    let silent = host.dial(Channel::Control);
    let mut slow = host.dial(Channel::Log);
    slow.write_all(&hello(Channel::Log)[..9]).unwrap();
    for mut guest in [silent, slow] {
        let end = tokio::task::spawn_blocking(move || guest.read(&mut [0]));
        assert_eq!(end.await.unwrap().unwrap(), 0);
        assert!(started.elapsed() >= HELLO_LIMIT);
    }
}

#[tokio::test]
async fn a_malformed_message_is_quoted_in_short_and_without_escapes() {
    let mut host = host(Duration::from_secs(5));
    let long = format!("{{\"type\":\"\\u001b[2J{}\"}}", "x".repeat(500_000));
    let versions = format!(
        "{{\"channel\":\"log\",\"agent\":\"a\",\"boot_id\":\"\",\"versions\":[{}7]}}",
        "7,".repeat(100_000)
    );
    for (greeting, body) in [(hello(Channel::Status), long), (Vec::new(), versions)] {
        let channel = if greeting.is_empty() {
            Channel::Log
        } else {
            Channel::Status
        };
        let mut guest = host.dial(channel);
        let writer = std::thread::spawn(move || {
            let length = u32::try_from(body.len()).unwrap().to_le_bytes();
            // Fails when the host closes the connection before it has read all.
            let _ = guest.write_all(&[&greeting, &length[..], body.as_bytes()].concat());
            guest.read_to_end(&mut Vec::new())
        });
        let (_, event) = host.events.recv().await.unwrap();
        let ChannelEvent::Violation { reason, .. } = event else {
            panic!("{event:?}");
        };
        assert!((10..=2000).contains(&reason.chars().count()), "{reason}");
        assert!(!reason.contains(char::is_control), "{reason}");
        let _ = writer.join().unwrap();
    }
}

/// No question waits for two intervals while other channels send without pause.
#[tokio::test]
async fn a_flood_on_other_channels_delays_no_heartbeat() {
    let mut host = host(Duration::from_secs(1));
    let started = Instant::now();
    let over = Arc::new(AtomicBool::new(false));
    let mut floods = Vec::new();
    let record = ToHost::Log(LogRecord {
        source: LogSource::Role,
        stream: "out".into(),
        uptime_ms: 0,
        dropped: 0,
        text: "flood ".repeat(100),
    });
    let result = ToHost::AgentResult { error: None };
    for (channel, message) in [
        (Channel::Log, &record),
        (Channel::Log, &record),
        (Channel::Agent, &result),
    ] {
        let mut guest = host.dial(channel);
        let frames = frame::encode(message).unwrap().repeat(50);
        let over = Arc::clone(&over);
        floods.push(std::thread::spawn(move || {
            guest.write_all(&hello(channel)).unwrap();
            let mut written = 0;
            while !over.load(Ordering::Relaxed) && guest.write_all(&frames).is_ok() {
                written += frames.len();
            }
            (channel, written)
        }));
    }
    let mut guest = host.dial(Channel::Heartbeat);
    std::thread::spawn(move || {
        guest.write_all(&hello(Channel::Heartbeat)).unwrap();
        let mut decoder = frame::Decoder::new();
        let mut bytes = [0; 4096];
        let mut welcomed = false;
        while let Ok(count @ 1..) = guest.read(&mut bytes) {
            decoder.push(&bytes[..count]);
            if !welcomed {
                welcomed = decoder.take_frame::<Welcome>().unwrap().is_some();
            }
            while welcomed && let Some(asked) = decoder.take_frame().unwrap() {
                let ToGuest::Ask { sequence } = asked else {
                    continue;
                };
                let beat = ToHost::Beat(Beat {
                    boot_id: "boot".into(),
                    sequence,
                    health: Health::Healthy,
                });
                let _ = guest.write_all(&frame::encode(&beat).unwrap());
            }
        }
    });
    let (mut asked, mut answered, mut others) = (0, 0, 0u64);
    while answered < 8 {
        match host.events.recv().await.unwrap().1 {
            ChannelEvent::Asked(sequence) => asked = sequence,
            ChannelEvent::Beat(beat) => {
                assert!(
                    asked - beat.sequence < 2,
                    "{} is answered at {asked}",
                    beat.sequence
                );
                answered = beat.sequence;
            }
            ChannelEvent::AgentResult { .. } => others += 1,
            event => panic!("{event:?}"),
        }
        assert!(asked - answered <= 2, "{answered} of {asked} answered");
    }
    let took = started.elapsed();
    over.store(true, Ordering::Relaxed);
    drop(host.events);
    for flood in floods {
        // The host read megabytes of each log meanwhile. The runtime goes on reading until
        // the writers have seen `over`.
        let written = tokio::task::spawn_blocking(|| flood.join().unwrap());
        let (channel, written) = written.await.unwrap();
        assert!(channel == Channel::Agent || written > 1 << 20);
    }
    // Events of one connection: the burst, then one each 10 ms, and those of the refill.
    let most = 512 + 2 * u64::try_from(took.as_millis()).unwrap() / 10;
    assert!((512..=most).contains(&others), "{others} in {took:?}");
    drop(host.dir);
}

#[tokio::test]
async fn a_burst_of_states_arrives_at_once_and_a_flood_slowly() {
    let mut host = host(Duration::from_secs(5));
    let mut guest = host.dial(Channel::Status);
    let status = frame::encode(&ToHost::Status(Status {
        incarnation: 1,
        applied: 0,
        state: RoleState::Starting,
        detail: String::new(),
        recycles: 0,
        last_exit: None,
        retry_in_ms: None,
        killed: false,
    }));
    let started = Instant::now();
    guest.write_all(&hello(Channel::Status)).unwrap();
    guest.write_all(&status.unwrap().repeat(30)).unwrap();
    for number in 1..=30 {
        let (_, event) = host.events.recv().await.unwrap();
        assert!(matches!(event, ChannelEvent::Status(_)), "{event:?}");
        if number == 20 {
            assert!(started.elapsed() < Duration::from_millis(500));
        }
    }
    assert!(started.elapsed() >= Duration::from_millis(450));
}

#[tokio::test]
async fn every_channel_counts_in_the_one_budget_of_a_boot() {
    let mut host = host(Duration::from_secs(3600));
    let rate = |burst| Rate::new(burst, Duration::from_secs(3600));
    let channels = Arc::get_mut(&mut host.channels).unwrap();
    channels.budget = Arc::new(EventBudget::new(rate(12), rate(1)));
    let beat = ToHost::Beat(Beat {
        boot_id: "boot".into(),
        sequence: 1,
        health: Health::Healthy,
    });
    let booted = ToHost::Booted { init_ms: 1 };
    let garbage = ToHost::ShutdownBegun {};
    for (channel, message, events) in [
        (Channel::Control, booted, 3),
        // The host asked for one of them.
        (Channel::Heartbeat, beat, 3),
        (Channel::Agent, ToHost::AgentResult { error: None }, 3),
        (Channel::Shutdown, ToHost::ShutdownBegun {}, 3),
        // Ends the connection.
        (Channel::Status, garbage, 1),
    ] {
        let mut guest = host.dial(channel);
        let message = frame::encode(&message).unwrap().repeat(3);
        guest
            .write_all(&[hello(channel), message].concat())
            .unwrap();
        let mut seen = 0;
        while seen < events {
            let (_, event) = host.events.recv().await.unwrap();
            seen += i32::from(!matches!(event, ChannelEvent::Asked(_)));
        }
    }
    assert!(!host.channels.budget.floods());
    // The budget is spent to the last token: one more is an excess, two are a flood.
    assert!(!host.channels.budget.spend(tokio::time::Instant::now()));
    assert!(!host.channels.budget.spend(tokio::time::Instant::now()));
    assert!(host.channels.budget.floods());
}

#[tokio::test]
async fn a_hello_for_another_channel_is_refused() {
    let mut host = host(Duration::from_secs(5));
    let mut guest = host.dial(Channel::Log);
    guest.write_all(&hello(Channel::Control)).unwrap();
    let (_, event) = host.events.recv().await.unwrap();
    let ChannelEvent::Violation { channel, reason } = event else {
        panic!("{event:?}");
    };
    assert_eq!(channel, Channel::Log);
    assert!(reason.contains("hello for channel Control"), "{reason}");
    let mut answer = Vec::new();
    let answer =
        tokio::task::spawn_blocking(move || guest.read_to_end(&mut answer).map(|_| answer));
    let mut decoder = frame::Decoder::new();
    decoder.push(&answer.await.unwrap().unwrap());
    let welcome = decoder.take_frame::<Welcome>().unwrap();
    assert!(matches!(welcome, Some(Welcome::Refused { .. })));
}

#[tokio::test]
async fn a_connection_from_an_unprivileged_port_is_closed() {
    let host = host(Duration::from_secs(5));
    for (source_port, served) in [(PRIVILEGED_PORTS - 1, true), (PRIVILEGED_PORTS, false)] {
        let (mut guest, theirs) = Blocking::pair().unwrap();
        let port = Channel::Heartbeat.port();
        host.channels.accept(port, source_port, theirs.into());
        // Fails if the connection is closed already.
        let _ = guest.write_all(&hello(Channel::Heartbeat));
        let read = tokio::task::spawn_blocking(move || guest.read(&mut [0; 64]));
        let count = read.await.unwrap().unwrap_or(0);
        assert_eq!(count > 0, served);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn only_the_closer_closes_a_refused_connection() {
    let host = host(Duration::from_secs(5));
    let busy = busy(&host.channels.closer);
    for (port, source_port) in [
        (Channel::Heartbeat.port(), PRIVILEGED_PORTS),
        (9999, PRIVILEGED_PORTS - 1),
    ] {
        let (guest, theirs) = Blocking::pair().unwrap();
        host.channels.accept(port, source_port, theirs.into());
        assert!(is_open(&guest));
    }
    drop(busy);
}

#[tokio::test]
async fn a_line_of_a_guest_is_one_printable_line_of_its_log() {
    let host = host(Duration::from_secs(5));
    let mut guest = host.dial(Channel::Log);
    guest.write_all(&hello(Channel::Log)).unwrap();
    let record = LogRecord {
        source: LogSource::Role,
        stream: "std\u{9b}out".into(),
        uptime_ms: 1500,
        dropped: 0,
        text: "a\u{1b}[2J\nb\u{202e}c\u{2028}d".into(),
    };
    let record = frame::encode(&ToHost::Log(record)).unwrap();
    guest.write_all(&record).unwrap();
    let path = host.dir.path().join("role.log");
    let logged = async {
        loop {
            let log = std::fs::read_to_string(&path).unwrap();
            if log.ends_with('\n') {
                return log;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let limit = Duration::from_secs(20);
    let log = tokio::time::timeout(limit, logged).await.unwrap();
    let line = "[     1.500] std out: a\\u{1b}[2J\\nb\\u{202e}c\\u{2028}d\n";
    assert_eq!(log, line);
}
