//! A report as JUnit XML: suite = service, case = step of an instance, probe.

use std::fmt::Write as _;

use super::{Outcome, TestReport};

/// The document.
pub fn junit(report: &TestReport) -> String {
    let suite = escape(&report.service);
    let mut cases = String::new();
    let mut counts = [0_u32; 3];
    let mut case = |class: &str, name: &str, ms: u64, outcome: Outcome, text: &str, out: &str| {
        counts[outcome as usize] += 1;
        let _ = write!(
            cases,
            "    <testcase classname=\"{suite}.{}\" name=\"{}\" time=\"{}\"",
            escape(class),
            escape(name),
            seconds(ms)
        );
        let text = escape(text);
        let inner = match outcome {
            Outcome::Ok => String::new(),
            Outcome::Fail => format!("      <failure message=\"{text}\"/>\n"),
            Outcome::Skip => format!("      <skipped message=\"{text}\"/>\n"),
        };
        let out = match out {
            "" => String::new(),
            out => format!("      <system-out>{}</system-out>\n", escape(out)),
        };
        if inner.is_empty() && out.is_empty() {
            cases.push_str("/>\n");
        } else {
            let _ = write!(cases, ">\n{inner}{out}    </testcase>\n");
        }
    };
    let mut told = false;
    for (instance, step) in report.steps() {
        let class = instance.map_or("service", |instance| instance.name.as_str());
        let code = step.code.as_deref().unwrap_or_default();
        let detail = step.detail.as_deref().unwrap_or_default();
        let text = format!("{code} {detail}");
        let failed = step.result == Outcome::Fail;
        told |= failed;
        let tail = match instance {
            Some(instance) if failed => instance.serial_tail.join("\n"),
            _ => String::new(),
        };
        case(class, &step.name, step.ms, step.result, text.trim(), &tail);
    }
    // What ended the command before, between or beside the steps.
    if !told && report.result != Outcome::Ok {
        let field = |name: &str| {
            let error = report.error.as_ref();
            error.and_then(|error| error[name].as_str()).unwrap_or("")
        };
        let text = format!("{} {}", field("code"), field("error"));
        case(
            "service",
            "test",
            report.duration_ms,
            report.result,
            text.trim(),
            "",
        );
    }
    let [passed, failures, skipped] = counts;
    let tests = passed + failures + skipped;
    let time = seconds(report.duration_ms);
    let totals = format!(
        "tests=\"{tests}\" failures=\"{failures}\" skipped=\"{skipped}\" errors=\"0\" \
         time=\"{time}\""
    );
    let started = escape(&report.started);
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"host-agent\" {totals}>\n  \
         <testsuite name=\"{suite}\" {totals} timestamp=\"{started}\">\n{cases}  </testsuite>\n\
         </testsuites>\n"
    )
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

/// For attributes and text. Characters that XML 1.0 cannot hold (2.2) become
/// the replacement character: logs of guests have them.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push('\n'),
            '\t' => escaped.push('\t'),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::tests::failed;
    use super::*;

    #[test]
    fn the_document_keeps_its_form() {
        let mut report = failed();
        report.instances[0].stages.truncate(1);
        assert_eq!(
            junit(&report),
            r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="host-agent" tests="4" failures="1" skipped="0" errors="0" time="4.120">
  <testsuite name="redis" tests="4" failures="1" skipped="0" errors="0" time="4.120" timestamp="2026-01-02T03:04:05Z">
    <testcase classname="redis.Cache_IN_0" name="boot" time="1.290"/>
    <testcase classname="redis.service" name="tcp://redis" time="0.006"/>
    <testcase classname="redis.service" name="http://www/=200" time="2.000">
      <failure message="HA-0402 GET / returned 503, not &quot;200&quot;"/>
    </testcase>
    <testcase classname="redis.service" name="stop" time="0.300"/>
  </testsuite>
</testsuites>
"#
        );
    }

    #[test]
    fn what_a_guest_printed_cannot_break_the_document() {
        let mut report = failed();
        report.instances[0].stages[0].result = Outcome::Fail;
        report.instances[0].serial_tail = vec!["</system-out>]]>\u{1b}[1m\u{0}&".into()];
        let text = junit(&report);
        let document = roxmltree::Document::parse(&text).unwrap();
        let out = document
            .descendants()
            .find(|node| node.has_tag_name("system-out"))
            .and_then(|node| node.text().map(str::to_owned));
        assert_eq!(out.unwrap(), "</system-out>]]>\u{fffd}[1m\u{fffd}&");
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
        assert!(text.contains("tests=\"1\" failures=\"0\" skipped=\"1\""));
        assert!(text.contains("<skipped message=\"HA-0201 no /dev/kvm\"/>"));
    }
}
