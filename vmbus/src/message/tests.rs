//! Property tests: every message through frames.

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::frame::{self, Decoder, FrameError, HEADER, MAX_BODY};
use crate::role::{Endpoint, EntryPoint, InstanceValue, LocalStorage, MAX_ENCODED, VariableValue};

/// Any text: every plane of Unicode, control characters, quotes.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => ".{0,30}",
        2 => vec(any::<char>(), 0..20).prop_map(String::from_iter),
        1 => Just("\0\"\\\u{7f}\u{2028}\n".to_owned()),
    ]
}

fn pairs() -> impl Strategy<Value = Vec<(String, String)>> {
    vec((text(), text()), 0..4)
}

fn role_state() -> impl Strategy<Value = RoleState> {
    prop::sample::select(vec![
        RoleState::Unknown,
        RoleState::Creating,
        RoleState::Starting,
        RoleState::Ready,
        RoleState::Busy,
        RoleState::Recycling,
        RoleState::Cycling,
        RoleState::Stopping,
        RoleState::Stopped,
        RoleState::Failed,
    ])
}

fn exit_cause() -> impl Strategy<Value = ExitCause> {
    prop_oneof![
        any::<i32>().prop_map(ExitCause::Code),
        any::<i32>().prop_map(ExitCause::Signal),
    ]
}

fn beat() -> impl Strategy<Value = Beat> {
    let health = prop::sample::select(vec![
        Health::Unknown,
        Health::Healthy,
        Health::Critical,
        Health::Stopped,
    ]);
    (any::<u64>(), text(), health).prop_map(|(sequence, boot_id, health)| Beat {
        sequence,
        boot_id,
        health,
    })
}

fn status() -> impl Strategy<Value = Status> {
    let rest = (
        option::of(exit_cause()),
        option::of(any::<u64>()),
        any::<bool>(),
    );
    (any::<[u64; 2]>(), role_state(), text(), any::<u32>(), rest).prop_map(
        |(incarnations, state, detail, recycles, (last_exit, retry_in_ms, killed))| Status {
            incarnation: incarnations[0],
            applied: incarnations[1],
            state,
            detail,
            recycles,
            last_exit,
            retry_in_ms,
            killed,
        },
    )
}

fn log_record() -> impl Strategy<Value = LogRecord> {
    let source = prop::sample::select(vec![LogSource::Role, LogSource::Agent]);
    (source, text(), any::<[u64; 2]>(), text()).prop_map(
        |(source, stream, [uptime_ms, dropped], text)| LogRecord {
            source,
            stream,
            uptime_ms,
            dropped,
            text,
        },
    )
}

fn agent_versions() -> impl Strategy<Value = AgentVersions> {
    let bad = (text(), text(), text()).prop_map(|(version, sha256, reason)| BadAgent {
        version,
        sha256,
        reason,
    });
    let all = (text(), option::of(text()), any::<bool>(), vec(bad, 0..4));
    all.prop_map(|(version, sha256, watched, bad)| AgentVersions {
        version,
        sha256,
        watched,
        bad,
    })
}

fn agent_update() -> impl Strategy<Value = AgentUpdate> {
    let step = prop::sample::select(vec![
        UpdateStep::Refused,
        UpdateStep::Installed,
        UpdateStep::Confirmed,
        UpdateStep::WentBack,
    ]);
    (text(), text(), step, text()).prop_map(|(version, sha256, step, detail)| AgentUpdate {
        version,
        sha256,
        step,
        detail,
    })
}

fn agent_offer() -> impl Strategy<Value = AgentOffer> {
    let all = ([text(), text(), text()], vec(text(), 0..3), any::<bool>());
    all.prop_map(
        |([version, sha256, signature], keys, allow_downgrade)| AgentOffer {
            version,
            sha256,
            signature,
            keys,
            allow_downgrade,
        },
    )
}

fn to_host() -> impl Strategy<Value = ToHost> {
    prop_oneof![
        beat().prop_map(ToHost::Beat),
        status().prop_map(ToHost::Status),
        option::of(text()).prop_map(|sha256| ToHost::AgentRequest { sha256 }),
        agent_versions().prop_map(ToHost::AgentVersions),
        agent_update().prop_map(ToHost::AgentUpdate),
        option::of(text()).prop_map(|error| ToHost::AgentResult { error }),
        log_record().prop_map(ToHost::Log),
        Just(ToHost::ShutdownBegun {}),
        any::<u64>().prop_map(|init_ms| ToHost::Booted { init_ms }),
    ]
}

fn instance_value() -> impl Strategy<Value = InstanceValue> {
    prop_oneof![
        prop::sample::select(vec![
            InstanceValue::DeploymentId,
            InstanceValue::Emulated,
            InstanceValue::InstanceId,
            InstanceValue::RoleName,
            InstanceValue::UpdateDomain,
            InstanceValue::FaultDomain,
        ]),
        text().prop_map(InstanceValue::Setting),
        text().prop_map(InstanceValue::LocalStoragePath),
        text().prop_map(InstanceValue::LocalStorageSize),
        text().prop_map(InstanceValue::EndpointProtocol),
        text().prop_map(InstanceValue::EndpointAddress),
        text().prop_map(InstanceValue::EndpointPort),
    ]
}

fn role_definition() -> impl Strategy<Value = RoleDefinition> {
    let value = prop_oneof![
        text().prop_map(VariableValue::Literal),
        instance_value().prop_map(VariableValue::Instance),
    ];
    let storage =
        (text(), any::<u64>(), any::<bool>()).prop_map(|(name, size_mib, clean)| LocalStorage {
            name,
            size_mib,
            clean_on_role_recycle: clean,
        });
    let endpoint =
        (text(), text(), any::<u16>()).prop_map(|(name, protocol, local_port)| Endpoint {
            name,
            protocol,
            local_port,
        });
    let entry_point = (vec(text(), 0..4), any::<bool>()).prop_map(|(command, ready_on_start)| {
        EntryPoint::Program {
            command,
            ready_on_start,
        }
    });
    (
        (text(), entry_point, any::<bool>()),
        btree_map(text(), text(), 0..4),
        vec((text(), value), 0..4),
        vec(storage, 0..3),
        vec(endpoint, 0..3),
    )
        .prop_map(
            |((name, entry_point, elevated), settings, environment, local_storage, endpoints)| {
                RoleDefinition {
                    name,
                    entry_point,
                    elevated,
                    settings,
                    environment,
                    local_storage,
                    endpoints,
                }
            },
        )
}

fn goal() -> impl Strategy<Value = Goal> {
    let expected = prop::sample::select(vec![ExpectedState::Started, ExpectedState::Stopped]);
    (
        (any::<[u64; 2]>(), any::<[u32; 2]>(), expected),
        [text(), text(), text(), text()],
        role_definition(),
    )
        .prop_map(|((numbers, domains, expected), names, role)| {
            let [deployment_id, instance, application_disk, resource_disk] = names;
            Goal {
                incarnation: numbers[0],
                expected,
                deployment_id,
                instance,
                update_domain: domains[0],
                fault_domain: domains[1],
                role,
                application_disk,
                resource_disk,
                stop_timeout_ms: numbers[1],
            }
        })
}

fn to_guest() -> impl Strategy<Value = ToGuest> {
    let power = prop::sample::select(vec![PowerAction::PowerOff, PowerAction::Reboot]);
    prop_oneof![
        any::<u64>().prop_map(|sequence| ToGuest::Ask { sequence }),
        goal().prop_map(|goal| ToGuest::Goal(Box::new(goal))),
        (text(), any::<u64>(), text()).prop_map(|(version, size, sha256)| {
            ToGuest::AgentProgram {
                version,
                size,
                sha256,
            }
        }),
        option::of(agent_offer()).prop_map(|offer| ToGuest::AgentOffer { offer }),
        (power, any::<u64>())
            .prop_map(|(then, deadline_ms)| ToGuest::Shutdown { then, deadline_ms }),
    ]
}

fn exec_request() -> impl Strategy<Value = ExecRequest> {
    let terminal = option::of(any::<(u16, u16)>());
    (vec(text(), 0..4), pairs(), terminal).prop_map(|(command, environment, terminal)| {
        ExecRequest {
            command,
            environment,
            terminal,
        }
    })
}

fn exec_input() -> impl Strategy<Value = ExecInput> {
    prop_oneof![
        vec(any::<u8>(), 1..100).prop_map(|bytes| ExecInput::Stdin { bytes }),
        Just(ExecInput::StdinEnd {}),
        any::<i32>().prop_map(|number| ExecInput::Signal { number }),
        any::<(u16, u16)>().prop_map(|(rows, columns)| ExecInput::Resize { rows, columns }),
    ]
}

fn exec_output() -> impl Strategy<Value = ExecOutput> {
    prop_oneof![
        vec(any::<u8>(), 1..100).prop_map(|bytes| ExecOutput::Stdout { bytes }),
        vec(any::<u8>(), 1..100).prop_map(|bytes| ExecOutput::Stderr { bytes }),
        any::<usize>().prop_map(|bytes| ExecOutput::Consumed { bytes }),
        exit_cause().prop_map(|cause| ExecOutput::Exited { cause }),
        (text(), any::<i32>()).prop_map(|(reason, code)| ExecOutput::NotStarted { reason, code }),
    ]
}

/// A message of any type, so that a frame of one type is given to the decoders of the
/// others.
#[derive(Debug, Clone)]
enum Any {
    Host(ToHost),
    Guest(ToGuest),
    Request(ExecRequest),
    Input(ExecInput),
    Output(ExecOutput),
    Tunnel(TunnelRequest),
}

fn any_message() -> impl Strategy<Value = Any> {
    prop_oneof![
        to_host().prop_map(Any::Host),
        to_guest().prop_map(Any::Guest),
        exec_request().prop_map(Any::Request),
        exec_input().prop_map(Any::Input),
        exec_output().prop_map(Any::Output),
        any::<u16>().prop_map(|local_port| Any::Tunnel(TunnelRequest { local_port })),
    ]
}

impl Any {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Host(message) => frame::encode(message),
            Self::Guest(message) => frame::encode(message),
            Self::Request(message) => frame::encode(message),
            Self::Input(message) => frame::encode(message),
            Self::Output(message) => frame::encode(message),
            Self::Tunnel(message) => frame::encode(message),
        }
        .unwrap()
    }

    /// Takes the next frame as a message of the same type; whether it is equal.
    fn returns(&self, decoder: &mut Decoder) -> bool {
        match self {
            Self::Host(sent) => decoder.take_frame().unwrap().as_ref() == Some(sent),
            Self::Guest(sent) => decoder.take_frame().unwrap().as_ref() == Some(sent),
            Self::Request(sent) => decoder.take_frame().unwrap().as_ref() == Some(sent),
            Self::Input(sent) => decoder.take_frame().unwrap().as_ref() == Some(sent),
            Self::Output(sent) => decoder.take_frame().unwrap().as_ref() == Some(sent),
            Self::Tunnel(sent) => decoder.take_frame().unwrap().as_ref() == Some(sent),
        }
    }
}

proptest! {
    #[test]
    fn every_message_survives_its_frame(
        messages in vec(any_message(), 1..5),
    ) {
        let mut decoder = Decoder::new();
        for message in &messages {
            let bytes = message.encode();
            let header = *bytes.first_chunk::<HEADER>().unwrap();
            prop_assert_eq!(frame::body_length(header).unwrap(), bytes.len() - HEADER);
            decoder.push(&bytes);
        }
        for message in &messages {
            prop_assert!(message.returns(&mut decoder), "{:?}", message);
        }
        prop_assert!(decoder.is_empty());
    }

    /// A frame that is nearly valid gets further into a parser than random bytes.
    #[test]
    fn a_damaged_frame_never_panics(
        message in any_message(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = message.encode();
        for (at, value) in damage {
            let at = HEADER + at.index(bytes.len() - HEADER);
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            let len = cut.index(bytes.len() - HEADER);
            bytes.truncate(HEADER + len);
            let len = u32::try_from(len).unwrap();
            bytes[..HEADER].copy_from_slice(&len.to_le_bytes());
        }
        fn take<T: Message>(bytes: &[u8]) -> Result<Option<T>, FrameError> {
            let mut decoder = Decoder::new();
            decoder.push(bytes);
            let taken = decoder.take_frame();
            assert!(decoder.is_empty(), "a whole frame is always taken");
            taken
        }
        // A message that was taken can be sent again.
        if let Ok(Some(taken)) = take::<ToHost>(&bytes) {
            prop_assert!(Any::Host(taken.clone()).encode().len() <= HEADER + MAX_BODY);
        }
        let _ = take::<ToGuest>(&bytes);
        let _ = take::<ExecRequest>(&bytes);
        let _ = take::<ExecInput>(&bytes);
        let _ = take::<ExecOutput>(&bytes);
        let _ = take::<crate::version::Hello>(&bytes);
        let _ = take::<crate::version::Welcome>(&bytes);
    }

    #[test]
    fn fields_of_a_later_version_are_ignored(message in to_host(), value in text()) {
        let mut json = serde_json::to_value(&message).unwrap();
        json.as_object_mut().unwrap().insert("later".into(), value.into());
        let taken: ToHost = frame::parse(json.to_string().as_bytes()).unwrap();
        prop_assert_eq!(taken, message);
    }
}

#[test]
fn the_longest_piece_of_each_kind_fits_into_a_frame() {
    let bytes = vec![255; EXEC_PIECE];
    for frame in [
        Any::Output(ExecOutput::Stdout {
            bytes: bytes.clone(),
        }),
        Any::Output(ExecOutput::Stderr {
            bytes: bytes.clone(),
        }),
        Any::Input(ExecInput::Stdin { bytes }),
    ] {
        assert_eq!(frame.encode().len(), HEADER + 1 + EXEC_PIECE);
    }
    // JSON writes a control character in six.
    Any::Host(ToHost::Log(LogRecord {
        source: LogSource::Role,
        stream: "out".into(),
        uptime_ms: u64::MAX,
        dropped: u64::MAX,
        text: "\u{1}".repeat(8 * 1024),
    }))
    .encode();
    let long = ToHost::AgentResult {
        error: Some("\u{1}".repeat(MAX_BODY / 6)),
    };
    assert!(matches!(
        frame::encode(&long),
        Err(FrameError::TooLong { .. })
    ));
}

#[test]
fn a_goal_with_the_longest_definition_fits_into_a_frame() {
    let role = |padding| RoleDefinition {
        name: "r".repeat(64),
        entry_point: EntryPoint::Program {
            command: vec!["x".repeat(padding)],
            ready_on_start: true,
        },
        elevated: false,
        settings: std::collections::BTreeMap::new(),
        environment: Vec::new(),
        local_storage: Vec::new(),
        endpoints: Vec::new(),
    };
    let rest = frame::encoded_length(&role(0)).unwrap();
    let longest = role(MAX_ENCODED - rest);
    longest.check_length().unwrap();
    let goal = Goal {
        incarnation: u64::MAX,
        expected: ExpectedState::Started,
        deployment_id: "d".repeat(32),
        instance: "i".repeat(100),
        update_domain: u32::MAX,
        fault_domain: u32::MAX,
        role: longest,
        application_disk: "a".repeat(20),
        resource_disk: "r".repeat(20),
        stop_timeout_ms: u64::MAX,
    };
    assert!(frame::encode(&ToGuest::Goal(Box::new(goal))).is_ok());
    assert!(role(MAX_ENCODED - rest + 1).check_length().is_err());
}

#[test]
fn bytes_of_streams_are_not_accepted_as_json_or_in_bad_lengths() {
    let read = |body: &[u8]| {
        let refused = ExecInput::read(body).is_err();
        refused && ExecOutput::read(body).is_err()
    };
    for kind in ["stdin", "stdout", "stderr"] {
        let json = format!(r#"{{"type":"{kind}","bytes":[1]}}"#);
        assert!(read(json.as_bytes()), "{kind}");
    }
    for stream in [STDIN, STDOUT, STDERR] {
        assert!(read(&[stream]));
        let mut body = vec![b' '; EXEC_PIECE + 2];
        body[0] = stream;
        assert!(read(&body));
    }
    assert!(read(&[]));
    // A piece of another stream.
    assert!(read(&[piece::LOG, 1]));
    assert!(ExecInput::read(&[STDOUT, 1]).is_err());
    assert!(ExecOutput::read(&[STDIN, 1]).is_err());
    let long = ExecInput::Stdin {
        bytes: vec![0; EXEC_PIECE + 1],
    };
    assert!(frame::encode(&long).is_err());
}
