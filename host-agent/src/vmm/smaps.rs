//! The mappings of the test process, from `/proc/self/smaps` (proc(5)).

use std::ops::Range;

/// A mapping.
pub(crate) struct Mapping {
    pub(crate) range: Range<usize>,
    /// Its lines, such as `Rss:` and `VmFlags:`.
    lines: Vec<String>,
}

impl Mapping {
    /// What follows `name` and a colon.
    pub(crate) fn field(&self, name: &str) -> &str {
        let lines = self.lines.iter();
        let mut values = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        values.next().expect("smaps has this field").trim()
    }
}

/// Every mapping.
pub(crate) fn mappings() -> Vec<Mapping> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|word| word.split_once('-'));
        let number = |text| usize::from_str_radix(text, 16).ok();
        if let Some((Some(start), Some(end))) = range.map(|(a, b)| (number(a), number(b))) {
            mappings.push(Mapping {
                range: start..end,
                lines: Vec::new(),
            });
        } else if let Some(mapping) = mappings.last_mut() {
            mapping.lines.push(line.to_owned());
        }
    }
    mappings
}
