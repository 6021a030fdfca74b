//! Small plots as points of SVG lines. Pure.

/// Width of a plot in its own units.
pub(super) const WIDTH: u32 = 300;
/// Height of a plot.
pub(super) const HEIGHT: u32 = 60;

/// A plot of one figure over time.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plot {
    /// What is plotted.
    pub(super) title: &'static str,
    /// The newest value, for people.
    pub(super) now: String,
    /// The highest value, for people.
    pub(super) highest: String,
    /// `points` of each `polyline`: a time without the figure leaves a gap.
    pub(super) lines: Vec<String>,
}

/// The plot of `values`, the oldest first; `None` without any value.
pub(super) fn plot(
    title: &'static str,
    values: &[Option<f64>],
    text: impl Fn(f64) -> String,
) -> Option<Plot> {
    let known = values.iter().flatten().copied();
    let highest = known.clone().fold(f64::NEG_INFINITY, f64::max);
    let now = known.last()?;
    let top = if highest > 0.0 { highest } else { 1.0 };
    let step = f64::from(WIDTH) / (values.len().max(2) - 1) as f64;
    let mut lines = Vec::new();
    for part in values
        .iter()
        .enumerate()
        .collect::<Vec<_>>()
        .split(|(_, value)| value.is_none())
    {
        let points = part.iter().filter_map(|(index, value)| {
            let y = f64::from(HEIGHT) * (1.0 - value.as_ref()? / top);
            Some(format!("{:.1},{y:.1}", *index as f64 * step))
        });
        let points: Vec<_> = points.collect();
        match &points[..] {
            [] => {}
            // A line of one point is invisible.
            [one] => lines.push(format!("{one} {one}")),
            _ => lines.push(points.join(" ")),
        }
    }
    Some(Plot {
        title,
        now: text(now),
        highest: text(highest),
        lines,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_splits_the_line_and_the_highest_value_is_at_the_top() {
        let values = [Some(1.0), Some(2.0), None, Some(0.0)];
        let plot = plot("CPU", &values, |value| format!("{value} %")).unwrap();
        assert_eq!(plot.lines, ["0.0,30.0 100.0,0.0", "300.0,60.0 300.0,60.0"]);
        assert_eq!((&*plot.now, &*plot.highest), ("0 %", "2 %"));
        assert_eq!(super::plot("CPU", &[None], |it| it.to_string()), None);
    }
}
