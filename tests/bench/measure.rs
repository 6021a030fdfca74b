//! Lines of the table: definition, samples, budget and verdict. Pure.

use serde::Serialize;
use serde_json::Value;

/// The bound of a value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "bound", content = "value", rename_all = "kebab-case")]
pub enum Budget {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

/// The result of comparing a value with its budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The value is within the budget.
    Met,
    /// The value is outside the budget.
    NotMet,
    /// The line has no budget.
    NoBudget,
    /// The line has no value.
    NotMeasured,
}

/// A line of the table before it is measured.
#[derive(Debug, Clone, Copy)]
pub struct Definition {
    /// Stable name in `bench.json`.
    pub id: &'static str,
    /// Name in the table.
    pub title: &'static str,
    /// Unit of value and samples; `ratio` if it has none.
    pub unit: &'static str,
    /// Budget, if there is one.
    pub budget: Option<Budget>,
}

/// What a section measured for one definition.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// Every sample, in the order in which they were taken.
    pub samples: Vec<f64>,
    /// The value, if it is not the median of the samples.
    pub value: Option<f64>,
    /// Parameters of the measurement, and parts of the value.
    pub details: Value,
}

impl Found {
    /// The median of these samples.
    pub fn samples(samples: Vec<f64>) -> Self {
        Self {
            samples,
            ..Self::default()
        }
    }

    /// The ratio of the medians of samples that were taken in turns. Its samples are the
    /// ratios of the pairs.
    pub fn ratio(ours: &[f64], theirs: &[f64]) -> Self {
        Self {
            samples: ours.iter().zip(theirs).map(|(a, b)| a / b).collect(),
            value: median(ours).zip(median(theirs)).map(|(a, b)| a / b),
            details: Value::Null,
        }
    }

    /// With these details.
    pub fn with(mut self, details: Value) -> Self {
        self.details = details;
        self
    }
}

/// A line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Measure {
    /// Stable name.
    pub id: &'static str,
    /// Name in the table.
    pub title: &'static str,
    /// Unit of value and samples.
    pub unit: &'static str,
    /// The value that is compared with the budget.
    pub value: Option<f64>,
    /// Smallest sample.
    pub min: Option<f64>,
    /// Median of the samples.
    pub median: Option<f64>,
    /// Largest sample.
    pub max: Option<f64>,
    /// Budget, if there is one.
    pub budget: Option<Budget>,
    /// Result of the comparison.
    pub verdict: Verdict,
    /// Why there is no value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Parameters of the measurement, and parts of the value.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub details: Value,
    /// Every sample.
    pub samples: Vec<f64>,
}

impl Measure {
    /// The line for `definition` with what was measured, or why nothing was.
    pub fn new(definition: Definition, found: Result<Found, String>) -> Self {
        let (found, reason) = match found {
            Ok(found) => (found, None),
            Err(reason) => (Found::default(), Some(reason)),
        };
        let middle = median(&found.samples);
        let value = found.value.or(middle);
        let least = found.samples.iter().copied().reduce(f64::min);
        let greatest = found.samples.iter().copied().reduce(f64::max);
        Self {
            id: definition.id,
            title: definition.title,
            unit: definition.unit,
            value,
            min: least,
            median: middle,
            max: greatest,
            budget: definition.budget,
            verdict: verdict(value, definition.budget),
            reason,
            details: found.details,
            samples: found.samples,
        }
    }
}

fn verdict(value: Option<f64>, budget: Option<Budget>) -> Verdict {
    match (value, budget) {
        (None, _) => Verdict::NotMeasured,
        (Some(_), None) => Verdict::NoBudget,
        (Some(value), Some(Budget::AtMost(most))) if value <= most => Verdict::Met,
        (Some(value), Some(Budget::AtLeast(least))) if value >= least => Verdict::Met,
        _ => Verdict::NotMet,
    }
}

/// The median; for an even number of samples the mean of the middle two.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[half]),
        _ => Some(f64::midpoint(sorted[half - 1], sorted[half])),
    }
}

/// The percentile by the nearest-rank method.
pub fn percentile(samples: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_percentile_ignore_the_order_of_samples() {
        let samples: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(median(&samples), Some(50.5));
        assert_eq!(percentile(&samples, 99.0), Some(99.0));
        assert_eq!(percentile(&[7.0], 99.0), Some(7.0));
        assert_eq!((median(&[]), percentile(&[], 50.0)), (None, None));
    }

    #[test]
    fn a_budget_is_met_at_its_bound_and_never_without_a_value() {
        let line = |found, budget| {
            let definition = Definition {
                id: "x",
                title: "x",
                unit: "ratio",
                budget,
            };
            Measure::new(definition, found).verdict
        };
        let one = || Ok(Found::ratio(&[1.0, 3.0, 9.0], &[3.0, 3.0, 3.0]));
        assert_eq!(line(one(), Some(Budget::AtMost(1.0))), Verdict::Met);
        assert_eq!(line(one(), Some(Budget::AtLeast(1.0))), Verdict::Met);
        assert_eq!(line(one(), Some(Budget::AtMost(0.9))), Verdict::NotMet);
        assert_eq!(line(one(), None), Verdict::NoBudget);
        let none = || Err("why".into());
        assert_eq!(
            line(none(), Some(Budget::AtMost(1.0))),
            Verdict::NotMeasured
        );
        assert_eq!(line(none(), None), Verdict::NotMeasured);
    }
}
