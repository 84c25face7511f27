//! The system's log: the journal's native protocol where it listens, else syslog. A hook's output is shown by no
//! runtime when the hook succeeds, so that this is where people look.

use std::os::unix::net::UnixDatagram;

const JOURNAL: &str = "/run/systemd/journal/socket";
/// The longest message, in characters.
const LENGTH_MAX: usize = 2000;
const SYSLOG: &str = "/dev/log";

/// How much it matters (syslog(3)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// It failed or was refused.
    Error = 3,
    /// It worked, with a warning.
    Warning = 4,
    /// It worked.
    Info = 6,
}

/// Sends one line. That nobody listens is no reason to keep a container from starting: the ledger has it, too.
pub fn send(priority: Priority, container: Option<&str>, message: &str) {
    let Ok(socket) = UnixDatagram::unbound() else { return };
    // A full queue must not hold a container's start up.
    if socket.set_nonblocking(true).is_err() {
        return;
    }
    if socket.send_to(&journal_fields(priority, container, message), JOURNAL).is_ok() {
        return;
    }
    // Facility daemon (3).
    let line = format!("<{}>mptcp-hook[{}]: {}", 3 << 3 | priority as u8, std::process::id(), one_line(message));
    let _ = socket.send_to(line.as_bytes(), SYSLOG);
}

/// The fields in the journal's native protocol (systemd, "Native Journal Protocol"). A line break ends a field.
fn journal_fields(priority: Priority, container: Option<&str>, message: &str) -> Vec<u8> {
    let mut fields = format!(
        "PRIORITY={}\nSYSLOG_FACILITY=3\nSYSLOG_IDENTIFIER=mptcp-hook\nSYSLOG_PID={}\nMESSAGE={}\n",
        priority as u8,
        std::process::id(),
        one_line(message)
    );
    if let Some(container) = container {
        fields += &format!("CONTAINER_ID={}\n", one_line(container));
    }
    fields.into_bytes()
}

/// A message on one line and of a length that people read, whatever a container's author put into it.
pub fn one_line(message: &str) -> String {
    message.chars().take(LENGTH_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_cannot_forge_a_field() {
        let fields = journal_fields(Priority::Info, Some("web\nPRIORITY=0"), "a\nMESSAGE=b\r");
        let text = String::from_utf8(fields).unwrap();
        assert_eq!(text.matches("MESSAGE=a MESSAGE=b ").count(), 1);
        assert!(text.lines().any(|line| line == "CONTAINER_ID=web PRIORITY=0"));
        assert_eq!(text.lines().count(), 6);
    }
}
