//! A report as JUnit XML: suite = service, case = step of an instance, probe.

use std::time::Duration;

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite, XmlString};

use super::{Outcome, TestReport};
use crate::printable::printable_lines;

/// The document.
pub fn junit(report: &TestReport) -> String {
    let duration = Duration::from_millis(report.duration_ms);
    let mut suite = TestSuite::new(xml_string(&report.service));
    suite.set_time(duration);
    let started = xml_string(&report.started);
    suite.extra.insert("timestamp".into(), started);
    let mut has_failure = false;
    for (instance, step) in report.steps() {
        let class = instance.map_or("service", |instance| instance.name.as_str());
        let code = step.code.as_deref().unwrap_or_default();
        let detail = step.detail.as_deref().unwrap_or_default();
        let mut case = TestCase::new(xml_string(&step.name), status(step.result, code, detail));
        case.set_classname(xml_string(&format!("{}.{class}", report.service)));
        case.set_time(Duration::from_millis(step.ms));
        if step.result == Outcome::Fail {
            has_failure = true;
            let tail = instance.map_or(&[][..], |instance| &instance.serial_tail);
            if !tail.is_empty() {
                case.set_system_out(xml_string(&tail.join("\n")));
            }
        }
        suite.add_test_case(case);
    }
    // An error that ended the command outside of all steps.
    if !has_failure && report.result != Outcome::Ok {
        let field = |name: &str| {
            let error = report.error.as_ref();
            error.and_then(|error| error[name].as_str()).unwrap_or("")
        };
        let status = status(report.result, field("code"), field("error"));
        let mut case = TestCase::new("test", status);
        case.set_classname(xml_string(&format!("{}.service", report.service)));
        case.set_time(duration);
        suite.add_test_case(case);
    }
    let mut document = Report::new("host-agent");
    document.set_time(duration).add_test_suite(suite);
    document
        .to_string()
        .expect("the document is UTF-8 and written to memory")
}

fn status(outcome: Outcome, code: &str, detail: &str) -> TestCaseStatus {
    let mut status = match outcome {
        Outcome::Ok => return TestCaseStatus::success(),
        Outcome::Fail => TestCaseStatus::non_success(NonSuccessKind::Failure),
        Outcome::Skip => TestCaseStatus::skipped(),
    };
    status.set_message(xml_string(format!("{code} {detail}").trim()));
    status
}

/// Characters that XML 1.0 cannot hold (2.2) become the replacement character:
/// logs of guests have them, and [`XmlString`] removes only some.
fn xml_string(text: &str) -> XmlString {
    XmlString::new(printable_lines(text).replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::failed;
    use super::*;

    #[test]
    fn the_document_has_suites_cases_and_failures() {
        let mut report = failed();
        report.instances[0].stages.truncate(1);
        assert_eq!(
            junit(&report),
            r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="host-agent" tests="4" skipped="0" failures="1" errors="0" time="4.120">
    <testsuite name="redis" tests="4" skipped="0" errors="0" failures="1" time="4.120" timestamp="2026-01-02T03:04:05Z">
        <testcase name="boot" classname="redis.Cache_IN_0" time="1.290"/>
        <testcase name="tcp://redis" classname="redis.service" time="0.006"/>
        <testcase name="http://www/=200" classname="redis.service" time="2.000">
            <failure message="HA-0402 GET / returned 503, not &quot;200&quot;"/>
        </testcase>
        <testcase name="stop" classname="redis.service" time="0.300"/>
    </testsuite>
</testsuites>
"#
        );
    }

    #[test]
    fn output_of_a_guest_cannot_break_the_document() {
        let mut report = failed();
        report.instances[0].stages[0].result = Outcome::Fail;
        report.instances[0].serial_tail = vec!["</system-out>]]>\u{1b}[1m\u{0}\u{ffff}&".into()];
        let text = junit(&report);
        let document = roxmltree::Document::parse(&text).unwrap();
        let out = document
            .descendants()
            .find(|node| node.has_tag_name("system-out"))
            .and_then(|node| node.text().map(str::to_owned));
        assert_eq!(out.unwrap(), "</system-out>]]>\u{fffd}[1m\u{fffd}\u{fffd}&");
    }

    #[test]
    fn a_skipped_test_has_one_skipped_case_with_the_code() {
        let mut report = failed();
        report.result = Outcome::Skip;
        report.instances.clear();
        report.probes.clear();
        report.stop = None;
        report.error = Some(serde_json::json!({"code": "HA-0201", "error": "no /dev/kvm"}));
        let text = junit(&report);
        assert!(text.contains("tests=\"1\" skipped=\"1\" failures=\"0\""));
        assert!(text.contains("<skipped message=\"HA-0201 no /dev/kvm\"/>"));
    }
}
