//! Never silent: each result in one line on standard error, in the system's log and, longer, in the ledger.

pub mod journal;
pub mod json;
mod table;
pub mod text;

use std::io::Write;

use journal::Priority;

/// Prints to standard output. A reader that went away is no error of ours.
pub fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Prints over what is on the terminal; one after the other where standard output is none. False if the reader is gone.
pub fn print_in_place(text: &str) -> bool {
    let mut output = std::io::stdout();
    // ECMA-48: cursor to the top left, then erase to the end of the line or screen as the new text goes.
    let page = match std::io::IsTerminal::is_terminal(&output) {
        true => format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")),
        false => format!("{text}\n"),
    };
    output.write_all(page.as_bytes()).and_then(|()| output.flush()).is_ok()
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
