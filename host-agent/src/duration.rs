//! Times as people write them.

use std::time::Duration;

/// Longest time accepted: a longer one is a mistake, and `now` + it may overflow.
const LONGEST: Duration = Duration::from_hours(366 * 24);

/// Parses a time: seconds, or a number with `ms`, `s`, `m` or `h`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        other => return Err(format!("{other} is not a unit: write ms, s, m or h")),
    };
    let number: f64 = digits
        .parse()
        .map_err(|_| "write a time like 90, 90s, 1.5m or 500ms".to_owned())?;
    let time = Duration::try_from_secs_f64(number * unit)
        .map_err(|_| "the time is negative or too long".to_owned())?;
    if time.is_zero() || time > LONGEST {
        return Err("the time must be over 0 and at most a year".into());
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_parsed_with_and_without_units() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["", "s", "-1", "0", "1d", "nan", "inf", "1e30h", "1 s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
