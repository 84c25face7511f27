//! Never silent: each result in one line on standard error, in the system's log and, longer, in the ledger.

pub mod journal;
pub mod json;
mod table;
pub mod terminal;
pub mod text;

use std::io::Write;

use journal::Priority;

/// Prints to standard output. A reader that went away is no error of ours.
pub fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// One line on standard error and in the log.
pub fn say(priority: Priority, container: Option<&str>, message: &str) {
    let line = match container {
        Some(container) => format!("{container}: {message}"),
        None => message.to_string(),
    };
    let line = journal::one_line(&line);
    let _ = std::io::stderr().write_all(format!("mptcp-hook: {line}\n").as_bytes());
    journal::send(priority, container, &line);
}
