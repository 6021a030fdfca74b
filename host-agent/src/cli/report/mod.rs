//! The report of a test: one value, printed as text, JSON and JUnit.

mod junit;
mod stages;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

pub use junit::junit;
pub use stages::{StageFailure, stages};

use crate::printable::printable_json;

/// A report file to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportFile {
    /// The whole report.
    Json(PathBuf),
    /// JUnit XML, as CI systems read it.
    Junit(PathBuf),
}

impl FromStr for ReportFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((_, "")) | None => Err("write json=FILE or junit=FILE".into()),
            Some(("json", file)) => Ok(Self::Json(file.into())),
            Some(("junit", file)) => Ok(Self::Junit(file.into())),
            Some((other, _)) => Err(format!(
                "{other} is not a kind of report: write json=FILE or junit=FILE"
            )),
        }
    }
}

impl ReportFile {
    /// Path of the file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Json(path) | Self::Junit(path) => path,
        }
    }

    /// Content of the file.
    pub fn render(&self, report: &TestReport) -> String {
        match self {
            Self::Json(_) => printable_json(&format!("{:#}\n", report.json())),
            Self::Junit(_) => junit(report),
        }
    }
}

/// How a test, or a part of it, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Passed.
    Ok,
    /// Failed.
    Fail,
    /// Not tried.
    Skip,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Fail => "fail",
            Self::Skip => "skip",
        })
    }
}

/// Schema `host-agent.test/1`: grows only by new fields.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TestReport {
    /// Result of the whole test.
    pub result: Outcome,
    /// Exit code of the command.
    pub exit_code: u8,
    /// Service name, or the argument when it could not be read.
    pub service: String,
    /// RFC 3339, UTC.
    pub started: String,
    /// Of the whole command.
    pub duration_ms: u64,
    /// Facts about the machine.
    pub host: HostFacts,
    /// The instances, in the order of the definition.
    pub instances: Vec<InstanceReport>,
    /// The probes, in the order given.
    pub probes: Vec<StepReport>,
    /// The stop of the service, if it was reached.
    pub stop: Option<StepReport>,
    /// What failed: schema `host-agent.error/1`.
    pub error: Option<Value>,
}

/// Facts about the machine that affect timing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostFacts {
    /// `bare metal`, `nested`, …; absent when guests cannot run.
    pub kvm: Option<String>,
    /// Microseconds per VM exit.
    pub exit_us: Option<f64>,
    /// Factor of every timeout.
    pub timeout_scale: u32,
}

/// One instance.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct InstanceReport {
    /// `<Role>_IN_<n>`.
    pub name: String,
    /// Its last state before the stop.
    pub state: String,
    /// The steps of its start.
    pub stages: Vec<StepReport>,
    /// Copies of its logs that outlive the deployment.
    #[serde(serialize_with = "as_strings")]
    pub logs: Vec<PathBuf>,
    /// The last lines of its serial console, if it failed.
    pub serial_tail: Vec<String>,
}

/// One step of a test.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepReport {
    /// Name of the step, or the probe.
    pub name: String,
    /// Its result.
    pub result: Outcome,
    /// Duration in milliseconds.
    pub ms: u64,
    /// What was observed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// `HA-nnnn`, if it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
}

impl StepReport {
    /// A step without detail.
    pub fn new(name: impl Into<String>, result: Outcome, ms: u64) -> Self {
        Self {
            name: name.into(),
            result,
            ms,
            detail: None,
            code: None,
        }
    }
}

/// `2026-01-02T03:04:05Z`; the epoch for times that RFC 3339 cannot hold.
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let time = i64::try_from(seconds).map(jiff::Timestamp::from_second);
    time.ok()
        .and_then(Result::ok)
        .unwrap_or_default()
        .to_string()
}

/// Paths as JSON strings, which must be UTF-8.
fn as_strings<S: serde::Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

impl TestReport {
    /// As a JSON document with the name of its schema.
    pub fn json(&self) -> Value {
        let mut value = serde_json::json!({"schema": "host-agent.test/1"});
        let fields = serde_json::to_value(self).expect("the report has string keys only");
        if let (Value::Object(all), Value::Object(fields)) = (&mut value, fields) {
            all.extend(fields);
        }
        value
    }

    /// Every step, with its instance if it has one.
    pub fn steps(&self) -> impl Iterator<Item = (Option<&InstanceReport>, &StepReport)> {
        let instances = self.instances.iter().flat_map(|instance| {
            instance
                .stages
                .iter()
                .map(move |step| (Some(instance), step))
        });
        let rest = self.probes.iter().chain(&self.stop);
        instances.chain(rest.map(|step| (None, step)))
    }

    /// The last line of the output: the result and the number of checks.
    pub fn verdict(&self) -> String {
        let count = |outcome| {
            let steps = self.steps();
            steps.filter(|(_, step)| step.result == outcome).count()
        };
        let seconds = self.duration_ms as f64 / 1000.0;
        let passed = count(Outcome::Ok);
        match self.result {
            Outcome::Ok => format!("PASS {passed} checks in {seconds:.1} s"),
            Outcome::Skip => "SKIP this machine cannot run guests".into(),
            Outcome::Fail => format!(
                "FAIL {} of {} checks in {seconds:.1} s",
                count(Outcome::Fail).max(1),
                passed + count(Outcome::Skip) + count(Outcome::Fail).max(1)
            ),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::time::Duration;

    /// The report of a test in which the second probe failed.
    pub fn failed() -> TestReport {
        let step = |name: &str, result, ms| StepReport::new(name, result, ms);
        TestReport {
            result: Outcome::Fail,
            exit_code: 9,
            service: "redis".into(),
            started: "2026-01-02T03:04:05Z".into(),
            duration_ms: 4120,
            host: HostFacts {
                kvm: Some("nested".into()),
                exit_us: Some(11.8),
                timeout_scale: 4,
            },
            instances: vec![InstanceReport {
                name: "Cache_IN_0".into(),
                state: "Ready".into(),
                stages: vec![
                    step("boot", Outcome::Ok, 1290),
                    step("agent", Outcome::Ok, 120),
                    step("role", Outcome::Ok, 90),
                ],
                logs: vec!["out/Cache_IN_0/serial.log".into()],
                serial_tail: vec!["[ 1.0] <up> & \u{1}running".into()],
            }],
            probes: vec![
                step("tcp://redis", Outcome::Ok, 6),
                StepReport {
                    detail: Some("GET / returned 503, not \"200\"".into()),
                    code: Some("HA-0402".into()),
                    ..step("http://www/=200", Outcome::Fail, 2000)
                },
            ],
            stop: Some(step("stop", Outcome::Ok, 300)),
            error: Some(serde_json::json!({"code": "HA-0402"})),
        }
    }

    #[test]
    fn the_json_report_keeps_its_form() {
        let value = failed().json();
        assert_eq!(value["schema"], "host-agent.test/1");
        assert_eq!(value["result"], "fail");
        assert_eq!(value["exit_code"], 9);
        assert_eq!(value["host"]["timeout_scale"], 4);
        let stage = &value["instances"][0]["stages"][0];
        assert_eq!(
            stage.to_string(),
            r#"{"ms":1290,"name":"boot","result":"ok"}"#
        );
        assert_eq!(value["probes"][1]["code"], "HA-0402");
    }

    #[test]
    fn a_log_path_that_is_not_utf8_is_reported() {
        let mut report = failed();
        let name = std::os::unix::ffi::OsStrExt::from_bytes(b"out/\xff/role.log");
        report.instances[0].logs = vec![PathBuf::from(std::ffi::OsStr::to_owned(name))];
        let logs = &report.json()["instances"][0]["logs"];
        assert_eq!(logs[0], "out/\u{fffd}/role.log");
    }

    #[test]
    fn the_last_line_counts_the_checks() {
        let mut report = failed();
        assert_eq!(report.verdict(), "FAIL 1 of 6 checks in 4.1 s");
        report.probes.pop();
        report.result = Outcome::Ok;
        assert_eq!(report.verdict(), "PASS 5 checks in 4.1 s");
    }

    #[test]
    fn times_have_the_form_of_rfc_3339_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (1 << 40, "1970-01-01T00:00:00Z"),
        ] {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(rfc3339(time), text);
        }
    }

    #[test]
    fn report_files_are_parsed_with_their_kind() {
        assert_eq!("json=a=b".parse(), Ok(ReportFile::Json("a=b".into())));
        assert_eq!("junit=x.xml".parse(), Ok(ReportFile::Junit("x.xml".into())));
        for bad in ["json", "json=", "html=x", "x.xml"] {
            assert!(bad.parse::<ReportFile>().is_err(), "{bad}");
        }
    }
}
