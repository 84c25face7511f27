//! How an error becomes an exit status: 1 failed and undone, 2 wrong usage, 3 refused.

use std::fmt;

/// Wrong usage: of the command line, an annotation, a file. Nothing was changed. Exit 2.
#[derive(Debug)]
pub struct Usage(pub String);

/// Refused by the policy or by a conflict. Nothing was changed. Exit 3.
#[derive(Debug)]
pub struct Refused(pub String);

/// What a verb looked for and found, and has said already. Exit 1.
#[derive(Debug)]
pub struct Found;

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("something is wrong")
    }
}

impl std::error::Error for Found {}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}
impl std::error::Error for Refused {}

/// An error that ends in exit 2.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

/// An error that ends in exit 3.
pub fn refused(message: impl Into<String>) -> anyhow::Error {
    Refused(message.into()).into()
}

/// Somebody else's message in one of ours: on one line, without control characters.
pub fn plain(message: impl fmt::Display) -> String {
    let mut plain = String::new();
    for c in message.to_string().chars() {
        if c.is_control() { plain.extend(c.escape_debug()) } else { plain.push(c) }
    }
    plain
}

/// What somebody wrote, for a message: without control characters, and cut where it is long.
pub fn shown(text: &str) -> String {
    const LENGTH: usize = 80;
    let mut shown: String = text.chars().take(LENGTH).flat_map(char::escape_debug).collect();
    if text.chars().nth(LENGTH).is_some() {
        shown.push('…');
    }
    shown
}

/// The beginning of a text, at most `max` bytes of whole characters. (`str::floor_char_boundary` is newer than the oldest Rust
/// that we build with.)
pub fn beginning(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

/// A text that is cut, and shows it, where it is longer than `max` bytes.
pub fn shortened(text: &str, max: usize) -> String {
    if text.len() <= max { text.into() } else { format!("{}…", beginning(text, max)) }
}

/// The exit status that stands for `error`.
pub fn exit_status(error: &anyhow::Error) -> u8 {
    if error.is::<Refused>() {
        3
    } else if error.is::<Usage>() {
        2
    } else {
        1
    }
}
