//! Walks a TOML document and says of everything that is wrong in which line it stands.
//!
//! serde would stop at the first mistake, name a line only for some, and never the nearest known key.

use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::usage;
use crate::request::{self, Rank, Source, What, Wish};

/// A document's place on disk, its lines, and the mistakes found in it.
pub struct Document {
    path: String,
    /// Offset of each line's first byte but the first line's.
    lines: Vec<usize>,
    mistakes: Vec<(usize, String)>,
}

/// One `key = value`.
pub struct Entry<'d> {
    /// The key, dotted ones joined.
    pub key: String,
    /// Where the key stands, as an offset in bytes.
    pub at: usize,
    value: &'d Spanned<DeValue<'d>>,
}

impl Document {
    /// Parses `text`, which came from `path`. A syntax error is a wrong usage (exit 2).
    pub fn parse<'t>(path: &Path, text: &'t str) -> anyhow::Result<(Self, DeTable<'t>)> {
        let document = Self {
            path: path.display().to_string(),
            lines: text.match_indices('\n').map(|(at, _)| at + 1).collect(),
            mistakes: Vec::new(),
        };
        let first = match DeTable::parse(text) {
            Ok(table) => return Ok((document, table.into_inner())),
            Err(first) => first,
        };
        // The parser reports an unclosed string only after what it made of the lines below.
        let start = |e: &toml::de::Error| e.span().map_or(usize::MAX, |span| span.start);
        let (_, all) = DeTable::parse_recoverable(text);
        let error = all.into_iter().min_by_key(start).unwrap_or(first);
        let words: Vec<&str> = error.message().split_whitespace().collect();
        // Where the parser's limit of depth is reached, it names no place.
        let place = error.span().map_or(document.path.clone(), |span| document.place(span.start));
        Err(usage(format!("{place}: not TOML: {}", words.join(" "))))
    }

    /// `PATH:LINE` of an offset.
    pub fn place(&self, at: usize) -> String {
        let line = self.lines.partition_point(|start| *start <= at) + 1;
        format!("{}:{line}", self.path)
    }

    /// Notes that something at the offset `at` is wrong.
    pub fn mistake(&mut self, at: usize, message: impl Into<String>) {
        self.mistakes.push((at, message.into()));
    }

    /// The end of the walk: the first mistake in the file, and how many there are, as a wrong usage (exit 2).
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.mistakes.sort_by_key(|(at, _)| *at);
        let Some((at, message)) = self.mistakes.first() else { return Ok(()) };
        let more = match self.mistakes.len() - 1 {
            0 => String::new(),
            1 => format!(" (1 more mistake below, at {})", self.place(self.mistakes[1].0)),
            n => format!(" ({n} more mistakes below, the next at {})", self.place(self.mistakes[1].0)),
        };
        Err(usage(format!("{}: {message}{more}", self.place(*at))))
    }

    /// The string of an entry; `instead` says what to write where it is none.
    pub fn string<'d>(&mut self, entry: &Entry<'d>, instead: &str) -> Option<&'d str> {
        match entry.value.get_ref() {
            DeValue::String(text) => Some(text),
            _ => self.wrong_type(entry, instead),
        }
    }

    /// A string that `read` understands.
    pub fn parsed<T>(
        &mut self,
        entry: &Entry<'_>,
        instead: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.string(entry, instead)?;
        match read(text) {
            Ok(value) => Some(value),
            Err(e) => {
                self.mistake(entry.value.span().start, e);
                None
            }
        }
    }

    /// True or false.
    pub fn boolean(&mut self, entry: &Entry<'_>) -> Option<bool> {
        match entry.value.get_ref() {
            DeValue::Boolean(value) => Some(*value),
            _ => self.wrong_type(entry, "true or false"),
        }
    }

    /// A number, whole or with a fraction.
    pub fn number(&mut self, entry: &Entry<'_>, instead: &str) -> Option<f64> {
        match entry.value.get_ref() {
            DeValue::Integer(n) if n.radix() == 10 => n.as_str().parse().ok(),
            DeValue::Float(n) => n.as_str().parse().ok(),
            _ => self.wrong_type(entry, instead),
        }
    }

    /// The text of a string or a whole number.
    pub fn scalar(&mut self, entry: &Entry<'_>) -> Option<String> {
        match scalar(entry.value.get_ref()) {
            Some(text) => Some(text),
            None => self.wrong_type(
                entry,
                match entry.value.get_ref() {
                    DeValue::Boolean(_) => "1 or 0",
                    _ => "one string or whole number",
                },
            ),
        }
    }

    /// The texts of a string, a whole number, or a list of them, each with its offset.
    pub fn scalars(&mut self, entry: &Entry<'_>) -> Vec<(usize, String)> {
        let instead = "a string, a whole number or a list of them";
        let DeValue::Array(items) = entry.value.get_ref() else {
            return match scalar(entry.value.get_ref()) {
                Some(text) => vec![(entry.value.span().start, text)],
                None => self.wrong_type(entry, instead).unwrap_or_default(),
            };
        };
        let mut texts = Vec::new();
        for item in items {
            match scalar(item.get_ref()) {
                Some(text) => texts.push((item.span().start, text)),
                None => {
                    let message = format!(
                        "{} has {} in its list; write {instead}",
                        entry.key.escape_debug(),
                        type_name(item.get_ref())
                    );
                    self.mistake(item.span().start, message);
                }
            }
        }
        texts
    }

    /// The entries of a table, in the order of the file.
    pub fn entries<'d>(&mut self, entry: &Entry<'d>) -> Vec<Entry<'d>> {
        match entry.value.get_ref() {
            DeValue::Table(table) => entries(table),
            _ => self.wrong_type(entry, "a table").unwrap_or_default(),
        }
    }

    /// The same for keys that have dots of their own: `net.mptcp.enabled = 1` without quotes, which TOML reads as
    /// tables in tables, is what `"net.mptcp.enabled" = 1` is.
    pub fn dotted_entries<'d>(&mut self, entry: &Entry<'d>) -> Vec<Entry<'d>> {
        let mut found = Vec::new();
        flatten(self.entries(entry), &mut found);
        found
    }

    /// The wishes of the tables `interfaces`, `limits`, `sysctls` and `modules`, which mean the same in every file.
    /// None if the entry is none of them.
    pub fn wishes(&mut self, entry: &Entry<'_>, rank: Rank) -> Option<Vec<Wish>> {
        type Reader = fn(&str, &str) -> Result<Vec<What>, String>;
        let (entries, read): (Vec<Entry<'_>>, Reader) = match entry.key.as_str() {
            "interfaces" => (self.entries(entry), request::interface),
            "limits" => (self.entries(entry), |name, value| Ok(vec![request::limit(name, value)?])),
            "sysctls" => (self.dotted_entries(entry), |key, value| Ok(vec![request::sysctl(key, value)?])),
            "modules" => (self.dotted_entries(entry), |key, value| Ok(vec![request::module(key, value)?])),
            _ => return None,
        };
        let mut wishes = Vec::new();
        for inner in entries {
            if entry.key == "interfaces" && matches!(inner.value.get_ref(), DeValue::Table(_)) {
                // Not flattened: `[interfaces.eth1] flags = ...` must not become an interface "eth1.flags".
                let name = inner.key.escape_debug();
                let message =
                    format!("{name} is a table; write \"{name}\" = \"backup\", and quote a name that has a dot");
                self.mistake(inner.at, message);
                continue;
            }
            let Some(value) = self.scalar(&inner) else { continue };
            match read(&inner.key, &value) {
                Ok(asked) => {
                    let source = Source::new(rank, self.place(inner.at));
                    wishes.extend(asked.into_iter().map(|what| Wish::new(what, source.clone())));
                }
                Err(e) => self.mistake(inner.at, e),
            }
        }
        Some(wishes)
    }

    fn wrong_type<T>(&mut self, entry: &Entry<'_>, instead: &str) -> Option<T> {
        let message = format!("{} is {}; write {instead}", entry.key.escape_debug(), type_name(entry.value.get_ref()));
        self.mistake(entry.value.span().start, message);
        None
    }
}

/// The entries of a table, in the order of the file.
pub fn entries<'d>(table: &'d DeTable<'_>) -> Vec<Entry<'d>> {
    let mut entries: Vec<Entry<'d>> = table
        .iter()
        .map(|(key, value)| Entry { key: key.get_ref().to_string(), at: key.span().start, value })
        .collect();
    entries.sort_by_key(|entry| entry.at);
    entries
}

/// Tables in tables as dotted keys. The parser bounds the depth.
fn flatten<'d>(from: Vec<Entry<'d>>, found: &mut Vec<Entry<'d>>) {
    for entry in from {
        match entry.value.get_ref() {
            DeValue::Table(table) => {
                let mut inner = entries(table);
                inner.iter_mut().for_each(|leaf| leaf.key = format!("{}.{}", entry.key, leaf.key));
                flatten(inner, found);
            }
            _ => found.push(entry),
        }
    }
}

/// The text of a string or a whole number, the latter in a form that the kernel's base 0 reads alike: TOML writes
/// octal as `0o17`, which the kernel does not know.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(n) if n.radix() == 10 => Some(n.as_str().to_string()),
        DeValue::Integer(n) => {
            let number = i128::from_str_radix(n.as_str(), n.radix()).ok()?;
            Some(if n.radix() == 16 { format!("{number:#x}") } else { number.to_string() })
        }
        _ => None,
    }
}

fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes(text: &str) -> Result<Vec<String>, String> {
        let (mut document, table) = Document::parse(Path::new("f.toml"), text).map_err(|e| e.to_string())?;
        let mut found = Vec::new();
        for entry in entries(&table) {
            found.extend(document.wishes(&entry, Rank::PolicyDefault).expect("a table of wishes"));
        }
        document.finish().map_err(|e| e.to_string())?;
        Ok(found.iter().map(|wish| format!("{} {:?}", wish.source, wish.what)).collect())
    }

    #[test]
    fn numbers_keep_their_meaning() {
        let same = |toml: &str, text: &str| {
            let toml = wishes(&format!("[sysctls]\nx = {toml}")).unwrap();
            assert_eq!(toml, wishes(&format!("[sysctls]\nx = \"{text}\"")).unwrap());
        };
        same("1_000", "1000");
        same("+7", "+7");
        same("-1", "-1");
        same("0o17", "15");
        same("0b101", "5");
        same("0xFF", "0xff");
        assert!(wishes("[interfaces]\neth1 = 0x101003").unwrap()[0].contains("EndpointFlags(6)"));
    }

    #[test]
    fn dotted_keys_need_no_quotes_and_keep_their_line() {
        let quoted = wishes("[sysctls]\n\n\"net.mptcp.enabled\" = 1\n\"net.mptcp.scheduler\" = \"default\"\n").unwrap();
        assert!(quoted[0].starts_with("f.toml:3 ") && quoted[1].starts_with("f.toml:4 "), "{quoted:?}");
        assert_eq!(quoted, wishes("[sysctls]\n\nnet.mptcp.enabled = 1\nnet.mptcp.scheduler = \"default\"\n").unwrap());
        assert_eq!(quoted, wishes("\n[sysctls.net.mptcp]\nenabled = 1\nscheduler = \"default\"\n").unwrap());
        let module = wishes("[modules.mptcp_fullmesh]\nnum_subflows = 2").unwrap();
        assert_eq!(module, wishes("[modules]\nmptcp_fullmesh.num_subflows = 2").unwrap());
    }

    #[test]
    fn an_interface_is_never_a_table() {
        for text in ["[interfaces]\neth0.100 = \"backup\"", "[interfaces.eth0]\nflags = \"backup\""] {
            let error = wishes(text).unwrap_err();
            assert!(error.contains("eth0 is a table") && error.contains("quote"), "{error}");
        }
        assert!(wishes("[interfaces]\n\"eth0.100\" = \"backup\"").unwrap()[0].contains("\"eth0.100\""));
    }

    #[test]
    fn wrong_types_say_what_to_write() {
        for (text, expected) in [
            ("interfaces = 1", "f.toml:1: interfaces is a whole number; write a table"),
            ("[sysctls]\n\nx = true", "f.toml:3: x is true or false; write 1 or 0"),
            ("[sysctls]\nx = [1]", "f.toml:2: x is a list; write one string or whole number"),
            (
                "[modules]\nmptcp_rr.x = 1.5",
                "f.toml:2: mptcp_rr.x is a number with a fraction; write one string or whole number",
            ),
            ("[limits]\nsubflows = 1979-05-27", "f.toml:2: subflows is a date; write one string or whole number"),
        ] {
            assert_eq!(wishes(text).unwrap_err(), expected);
        }
    }

    #[test]
    fn the_first_mistake_of_the_file_comes_first() {
        let error = wishes("[sysctls]\nx = \"\"\n[limits]\nsubflows = 9\n[interfaces]\neth1 = \"bakup\"").unwrap_err();
        assert!(error.starts_with("f.toml:2: the value for net.mptcp.x is empty"), "{error}");
        assert!(error.ends_with("(2 more mistakes below, the next at f.toml:4)"), "{error}");
        let error = wishes("[limits]\nsubflow = 2\n[interfaces]\neth1 = \"bakup\"").unwrap_err();
        assert!(error.starts_with("f.toml:2: unknown limit \"subflow\"; did you mean subflows?"), "{error}");
        assert!(error.ends_with("(1 more mistake below, at f.toml:4)"), "{error}");
    }

    #[test]
    fn syntax_errors_are_one_line_with_their_place() {
        for (text, line) in [("\n\nx = ", 3), ("[limits\nx=1", 1), ("a = 1\na = 2\n", 2), ("x = \"a\n\"", 1)] {
            let error = wishes(text).unwrap_err();
            assert!(error.starts_with(&format!("f.toml:{line}: not TOML: ")), "{error}");
            assert!(!error.contains('\n') && error.len() < 200, "{error}");
        }
        // A depth that would overflow the stack of a recursive walk.
        let deep = format!("[sysctls]\n{}x = 1", "a.".repeat(100_000));
        assert_eq!(wishes(&deep).unwrap_err(), "f.toml: not TOML: recursion limit");
        let deep = format!("[sysctls]\nx = {}", "[".repeat(100_000));
        assert!(wishes(&deep).unwrap_err().contains("not TOML: "));
    }
}
