//! Compares chunks with a parser of the whole file, also on damaged documents.

use super::*;
use proptest::prelude::*;

const FILE: &str = "m.xml";
const ROOT: (&str, &str) = ("R", "urn:r");
const LISTS: &[&[&str]] = &[&["R", "A", "I"], &["R", "B", "C", "I"]];

/// Records that were read: kind, index of the list, name.
type Seen = Vec<(usize, usize, String)>;

fn take(
    seen: &mut Seen,
    kind: usize,
    list: Element<'_>,
    number: usize,
) -> Result<(), ServiceError> {
    for record in list.children("I") {
        let name = record.leaf("N")?;
        if name == "bad" {
            return Err(record.refuse("bad"));
        }
        seen.push((kind, number, name.to_owned()));
    }
    Ok(())
}

/// Returns a few bytes per read.
struct ShortReads<'a>(&'a [u8], usize);

impl Read for ShortReads<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = buffer.len().min(self.1);
        self.0.read(&mut buffer[..most])
    }
}

fn in_chunks(text: &str, at_most: usize) -> Result<Seen, ServiceError> {
    let large = LargeXml {
        file: Path::new(FILE),
        open: || ShortReads(text.as_bytes(), at_most),
        root: ROOT,
        records: LISTS,
    };
    let rest = large.rest()?;
    large.read_rest(&rest, |root| {
        let others = root.children("A").chain(root.children("B"));
        let lists = others.flat_map(|list| [list].into_iter().chain(list.children("C")));
        // No record is left in the lists.
        for list in lists.filter(|list| list.name() != "B") {
            assert_eq!(list.children("I").count(), 0);
        }
        Ok(())
    })?;
    let mut seen = Seen::new();
    for kind in 0..LISTS.len() {
        large.read_records(kind, |list, number| take(&mut seen, kind, list, number))?;
    }
    Ok(seen)
}

fn as_a_whole(text: &str) -> Result<Seen, ServiceError> {
    let file = Path::new(FILE);
    let text = xml::text_of(file, text.into(), 1 << 20)?;
    let document = xml::parse(file, &text, 1 << 20)?;
    let root = xml::root(file, &text, &document, ROOT.0, ROOT.1)?;
    let mut seen = Seen::new();
    for (number, list) in root.children("A").enumerate() {
        take(&mut seen, 0, list, number)?;
    }
    let lists = root.children("B").flat_map(|list| list.children("C"));
    for (number, list) in lists.enumerate() {
        take(&mut seen, 1, list, number)?;
    }
    Ok(seen)
}

fn item() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => "[a-z]{1,9}".prop_map(|name| format!("<I><N>{name}</N></I>")),
        2 => Just("<I b='/>'\n c=\"a'>\" ><!-- </I> --><N>&lt;I></N></I>".to_owned()),
        2 => Just("<I><N><![CDATA[</I>]]></N><?x </I>?></I >".to_owned()),
        1 => Just("<p:I xmlns:p='urn:r'><p:N>p</p:N></p:I>".to_owned()),
        1 => Just("<I><N/><I><N>inner</N></I></I>".to_owned()),
        6 => Just("\n  ".to_owned()),
        1 => Just("<!-- <I> -->".to_owned()),
        1 => Just("<J/>é".to_owned()),
    ]
}

fn list() -> impl Strategy<Value = String> {
    let items = || proptest::collection::vec(item(), 0..20).prop_map(|items| items.concat());
    prop_oneof![
        3 => items().prop_map(|items| format!("<A x='-->' >{items}</A>")),
        3 => (items(), items()).prop_map(|(a, b)| format!("<B><C\ny='1'>{a}</C><C>{b}</C>\n</B>")),
        1 => items().prop_map(|items| format!("<p:A xmlns:p='urn:r' xmlns='urn:r'>{items}</p:A>")),
        1 => items().prop_map(|items| format!("<O><A>{items}</A></O>")),
        1 => Just("<A/><B/><B><C/></B>".to_owned()),
        1 => Just("\n<!-- <A><I/></A> -->\n".to_owned()),
    ]
}

fn document() -> impl Strategy<Value = String> {
    proptest::collection::vec(list(), 0..6).prop_map(|lists| {
        let lists = lists.concat();
        format!("<?xml version='1.0'?>\n<R\txmlns='urn:r'>{lists}</R>\n")
    })
}

proptest! {
    #![proptest_config(crate::property::cases(3000))]

    /// Chunks are accepted if and only if the parser accepts the whole file, and
    /// give the same records.
    #[test]
    fn chunks_agree_with_the_whole_file(
        document in document(),
        damage in proptest::collection::vec(
            (any::<prop::sample::Index>(), 0usize..3, r#"[<>/&'"!?=a-cI \n-]{1,3}"#), 0..3),
        at_most in prop_oneof![Just(1usize), 2usize..40, Just(1000)],
    ) {
        let mut text = document;
        for (at, length, new) in damage {
            let places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            let at = at.index(places.len());
            let end = (at + length).min(places.len() - 1);
            text.replace_range(places[at]..places[end], &new);
        }
        match (in_chunks(&text, at_most), as_a_whole(&text)) {
            (Ok(mut chunks), Ok(mut whole)) => {
                chunks.sort();
                whole.sort();
                prop_assert_eq!(chunks, whole);
            }
            (Err(_), Err(_)) => {}
            (Ok(_), Err(error)) => prop_assert!(false, "accepted: {error}\n{text}"),
            (Err(error), Ok(_)) => prop_assert!(false, "refused: {error}\n{text}"),
        }
    }

    #[test]
    fn an_error_in_a_record_has_its_position(
        before in proptest::collection::vec(item(), 0..60),
        after in proptest::collection::vec(item(), 0..30),
        at_most in 1usize..100,
    ) {
        let (before, after) = (before.concat(), after.concat());
        let text = format!(
            "<R\nxmlns='urn:r'><A>{before}\n</A><B><C>{after}é<I><N>bad</N></I></C></B></R>"
        );
        let chunks = in_chunks(&text, at_most).unwrap_err();
        let whole = as_a_whole(&text).unwrap_err();
        prop_assert_eq!(chunks.position(), whole.position(), "{}", text);
    }
}

#[test]
fn input_that_needs_too_much_memory_is_refused() {
    let list = |content: &str| format!("<R xmlns='urn:r'><A>{content}</A></R>");
    let namespaces =
        |count: usize| -> String { (0..count).map(|n| format!(" xmlns:n{n}='u{n}'")).collect() };
    let depth = 100;
    let deep = "<d>".repeat(depth) + &"</d>".repeat(depth);
    let cases = [
        (
            list(&format!("<I>{}</I>", "<x/>".repeat(100_000))),
            "larger than 131072 bytes",
        ),
        (
            list(&format!("<!--{}-->", "x".repeat(200_000))),
            "longer than 65536 bytes",
        ),
        (list(&"<x/>".repeat(600_000)), "outside its lists"),
        (list(&deep), "nested deeper"),
        (list(&format!("<I>{deep}</I>")), "nested deeper"),
        (
            format!("<R xmlns='urn:r'><A b='{}'><I/></A></R>", "x".repeat(3000)),
            "around a list are longer than 2048 bytes",
        ),
        (
            format!("<R xmlns='urn:r'{}><A/></R>", namespaces(70)),
            "more than 64",
        ),
        (list(&format!("<I{}/>", namespaces(70))), "more than 64"),
        (format!("<!DOCTYPE x>{}", list("")), "DTD"),
        (list("<I><!DOCTYPE x></I>"), "DTD"),
    ];
    for (text, why) in cases {
        let error = in_chunks(&text, 10_000).unwrap_err().to_string();
        assert!(error.contains(why), "{why}: {error}");
    }
    let mut utf16 = vec![0xFF, 0xFE];
    utf16.extend(list("").encode_utf16().flat_map(u16::to_le_bytes));
    let large = LargeXml {
        file: Path::new(FILE),
        open: || ShortReads(&utf16, 7),
        root: ROOT,
        records: LISTS,
    };
    assert!(large.rest().unwrap_err().what().contains("UTF-16"));
}
