//! Text in messages: errors as one line, bounded length.

/// An error and its sources in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// At most the first `most` characters of `text`.
pub fn clip(mut text: String, most: usize) -> String {
    if let Some((end, _)) = text.char_indices().nth(most) {
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipped_text_ends_between_characters() {
        assert_eq!(clip("äöü".into(), 2), "äö");
        assert_eq!(clip("äöü".into(), 3), "äöü");
        assert_eq!(clip(String::new(), 3), "");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Link(&'static str, #[source] Option<Box<Link>>);

    #[test]
    fn each_cause_follows_a_colon_once() {
        let root = Link("no such file", None);
        let same = Link("cannot open x: no such file", Some(Box::new(root)));
        let top = Link("disk", Some(Box::new(same)));
        assert_eq!(chain(&top), "disk: cannot open x: no such file");
    }
}
