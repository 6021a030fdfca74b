//! Channels with guests that are silent, flood the host, or break the protocol.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as Blocking;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use vmbus::frame;
use vmbus::message::{ExpectedState, Health, LogRecord, RoleState, Status, ToGuest, ToHost};
use vmbus::role::{EntryPoint, RoleDefinition};

use super::*;

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
            bytes: Vec::new(),
        }),
        role_log: log("role.log"),
        agent_log: log("agent.log"),
        alive: mpsc::channel(1).0,
        sequence: AtomicU64::new(0),
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
            written
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
    over.store(true, Ordering::Relaxed);
    drop(host.events);
    for flood in floods {
        // The host read megabytes of each meanwhile. The runtime goes on reading until the
        // writers have seen `over`.
        let written = tokio::task::spawn_blocking(|| flood.join().unwrap());
        assert!(written.await.unwrap() > 1 << 20);
    }
    assert!(others > 1000);
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
