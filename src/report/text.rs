//! Text for people: one line for a result, tables for `status`, a list for `--dry-run`.

use std::borrow::Cow;

use crate::doctor::Diagnosis;
use crate::doctor::finding::Severity;
use crate::doctor::sockets::Shown;
use crate::error::plain;
use crate::kernel::RouteState;
use crate::ledger::Following;
use crate::ledger::record::{Conflict, Event, Failure, Outcome, Record, State};
use crate::plan::Plan;
use crate::request::{Request, setting};
use crate::status::{INTERRUPTED, Status};

/// What an apply came to, in one line: `eth1 subflow,backup 10.0.2.2 id 1; limits ...; warning: ...`.
pub fn applied(record: &Record, changed: bool, following: &Following) -> String {
    let mut parts: Vec<String> = Vec::new();
    for interface in &record.interfaces {
        let mut part = format!("{} {}", interface.name, interface.flags.join(","));
        for endpoint in &interface.endpoints {
            part += &format!(" {} id {}", endpoint.address, endpoint.id);
        }
        if interface.state != State::Applied {
            part += &format!(" {}", interface.state.name());
        }
        if let Some(reason) = &interface.reason {
            part += &format!(" ({reason})");
        }
        if interface.state == State::Pending {
            part += &match following {
                Following::Yes => ": the agent sees to it when it is there".into(),
                Following::NotNeeded => ": run mptcp-hook apply again when it is there".to_string(),
                Following::No(why) => format!(": run mptcp-hook apply again when it is there ({why})"),
            };
        }
        parts.push(part);
    }
    for owned in &record.settings {
        let value = setting::describe(&owned.key, &owned.value);
        parts.push(format!("{} = {value} {}", owned.key, owned.outcome.name()));
    }
    if parts.is_empty() {
        parts.push("nothing matches what is asked for".into());
    }
    if !changed {
        parts.push("nothing had to be changed".into());
    }
    let is_pending = record.interfaces.iter().any(|interface| interface.state == State::Pending);
    if let (false, Following::No(why), true) = (is_pending, following, record.needs_agent()) {
        parts.push(format!("it is not followed when its addresses change: {why}"));
    }
    parts.extend(record.warnings.iter().map(|warning| format!("warning: {warning}")));
    parts.join("; ")
}

/// The plan, for `--dry-run`.
pub fn plan(request: &Request, plan: &Plan) -> String {
    let mut text = String::from("Asked for:\n");
    for wish in request.wishes() {
        line(&mut text, format!("  {} = {}    ({})", wish.what.subject(), wish.what.value(), wish.source));
    }
    text += "Would be done:\n";
    for step in &plan.steps {
        line(&mut text, format!("  {}    ({})", step.change, step.why));
    }
    if plan.steps.is_empty() {
        text += "  nothing: it is as asked for\n";
    }
    for key in &plan.deferred {
        line(&mut text, format!("  {key}: as asked for, once its module is loaded by the steps above"));
    }
    for interface in plan.interfaces.iter().filter(|interface| interface.state != State::Applied) {
        let reason = interface.reason.as_deref().unwrap_or_default();
        line(&mut text, format!("  {} stays {}: {reason}", interface.name, interface.state.name()));
    }
    for owned in plan.settings.iter().filter(|owned| owned.outcome != Outcome::Applied) {
        line(&mut text, format!("  {} = {}: {}", owned.key, owned.value, owned.outcome.name()));
    }
    for conflict in &plan.conflicts {
        line(&mut text, format!("Conflict ({}): {}", conflict.outcome.name(), conflict.reason));
    }
    for warning in &plan.warnings {
        line(&mut text, format!("Warning: {warning}"));
    }
    text
}

/// The tables of `status`.
pub fn status(status: &Status) -> String {
    let mut text = format!("MPTCP of this kernel: {}\n", status.kernel.name());
    if status.rootless {
        text += "This ledger is one user's: it cannot protect host-wide values from others.\n";
    }
    text += &containers(status);
    if !status.settings.is_empty() {
        text += "\nHost-wide settings that containers rely on\n";
        let mut table = Table::new(["SETTING", "VALUE", "BEFORE", "RELIED ON BY"]);
        for setting in &status.settings {
            let claims: Vec<Cow<str>> = setting
                .claims
                .iter()
                .map(|claim| match setting::same(&setting.key, &claim.value, &setting.value) {
                    true => claim.container.as_str().into(),
                    false => format!("{} (at {}, overridden)", claim.container, claim.value).into(),
                })
                .collect();
            let mut value = setting::describe(&setting.key, &setting.value);
            if setting.drifted {
                value += &format!(", changed by somebody to {}", setting.present.as_deref().unwrap_or("?"));
            }
            if setting.interrupted {
                value += ", interrupted";
            }
            let claims = or_dash(claims.join(", "));
            table.add([setting.key.to_string().into(), value.into(), setting.original.as_str().into(), claims]);
        }
        text += &table.text();
    }
    if !status.conflicts.is_empty() {
        text += "\nConflicts\n";
        let mut table =
            Table::new(["TIME (UTC)", "CONTAINER", "SETTING", "WANTED", "KEPT", "HOLDERS", "OUTCOME", "REASON"]);
        for conflict in &status.conflicts {
            table.add(conflict_row(conflict));
        }
        text += &table.text();
        dropped(&mut text, status.conflicts_dropped);
    }
    if !status.failures.is_empty() {
        text += "\nHooks that failed\n";
        let mut table = Table::new(["TIME (UTC)", "CONTAINER", "EXIT", "REASON"]);
        for failure in &status.failures {
            let Failure { time, container, status, reason } = failure;
            table.add([utc(*time).into(), short(container).into(), status.to_string().into(), reason.as_str().into()]);
        }
        text += &table.text();
        dropped(&mut text, status.failures_dropped);
    }
    for problem in &status.problems {
        text.push('\n');
        line(&mut text, format!("Problem: {problem}"));
    }
    text
}

/// Says that a history had older lines.
fn dropped(text: &mut String, number: usize) {
    if number > 0 {
        line(text, format!("({number} older ones were dropped: the history is bounded)"));
    }
}

fn containers(status: &Status) -> String {
    if status.containers.is_empty() {
        return "No container is set up.\n".into();
    }
    let mut text = String::new();
    let mut rows =
        Table::new(["CONTAINER", "BY", "PID", "FOLLOWED", "INTERFACE", "FLAGS", "STATE", "ROUTE", "ENDPOINTS"]);
    for container in &status.containers {
        let record = &container.record;
        let pid = match (record.instance.pid, container.live) {
            (Some(pid), true) => pid.to_string(),
            (Some(pid), false) => format!("{pid} (dead)"),
            (None, true) => "-".into(),
            (None, false) => "(dead)".into(),
        };
        let followed = if container.followed { "yes" } else { "no" };
        let mut first = [short(&record.name).into(), record.runtime.as_str().into(), pid.into(), followed.into()];
        if record.interfaces.is_empty() {
            let [name, runtime, pid, followed] = first;
            // Else each of its interfaces says so.
            let state = if container.interrupted { State::Interrupted.name() } else { "-" };
            rows.add([name, runtime, pid, followed, "-".into(), "-".into(), state.into(), "-".into(), "-".into()]);
            continue;
        }
        for interface in &record.interfaces {
            let endpoints: Vec<String> =
                interface.endpoints.iter().map(|e| format!("{} id {}", e.address, e.id)).collect();
            let route = match interface.route {
                RouteState::Ok => "ok",
                RouteState::Missing => "missing",
                RouteState::Unknown => "-",
            };
            let [name, runtime, pid, followed] = std::mem::take(&mut first);
            rows.add([
                name,
                runtime,
                pid,
                followed,
                interface.name.as_str().into(),
                interface.flags.join(",").into(),
                interface.state.name().into(),
                route.into(),
                or_dash(endpoints.join(", ")),
            ]);
        }
    }
    text += &rows.text();
    let settings: Vec<_> = status.containers.iter().filter(|container| !container.record.settings.is_empty()).collect();
    if !settings.is_empty() {
        text += "\nSettings of containers\n";
        let mut rows = Table::new(["CONTAINER", "SETTING", "VALUE", "SCOPE", "OUTCOME"]);
        for container in settings {
            for owned in &container.record.settings {
                let mut value = setting::describe(&owned.key, &owned.value);
                if let Some(now) = container.drifted(&owned.key) {
                    value += &format!(", changed by somebody to {}", setting::describe(&owned.key, now));
                }
                rows.add([
                    short(&container.record.name).into(),
                    owned.key.to_string().into(),
                    value.into(),
                    owned.scope.name().into(),
                    owned.outcome.name().into(),
                ]);
            }
        }
        text += &rows.text();
    }
    for container in &status.containers {
        let name = short(&container.record.name);
        if container.interrupted && container.record.interfaces.is_empty() {
            line(&mut text, format!("{name}: {INTERRUPTED}"));
        }
        if let Some(why) = &container.not_followed {
            line(&mut text, format!("{name}: nobody follows it: {why}"));
        }
        for interface in &container.record.interfaces {
            if let Some(Event { time, what }) = &interface.last {
                line(&mut text, format!("{name}: {} at {} UTC: {what}", interface.name, utc(*time)));
            }
        }
        for warning in &container.record.warnings {
            line(&mut text, format!("Warning: {}: {warning}", short(&container.record.name)));
        }
        for interface in container.record.interfaces.iter().filter(|interface| interface.state != State::Applied) {
            if let Some(reason) = &interface.reason {
                line(
                    &mut text,
                    format!(
                        "{}: {} is {}: {reason}",
                        short(&container.record.name),
                        interface.name,
                        interface.state.name()
                    ),
                );
            }
        }
    }
    text
}

/// What the doctor found, each with what was read, why it matters and what mends it.
pub fn doctor(diagnosis: &Diagnosis) -> String {
    let mut text = String::new();
    line(&mut text, diagnosis.target.clone().unwrap_or_else(|| "This host".into()));
    for (about, value) in &diagnosis.facts {
        line(&mut text, format!("  {about}: {value}"));
    }
    for finding in &diagnosis.findings {
        let place = finding.interface.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
        text.push('\n');
        line(&mut text, format!("{} {}{place}: {}", finding.severity.name().to_uppercase(), finding.id, finding.what));
        let parts = [
            ("read:", Some(finding.evidence.as_str()).filter(|evidence| !evidence.is_empty())),
            ("why: ", Some(finding.why)),
            ("mend:", finding.mend.as_deref()),
            ("run: ", finding.command.as_deref()),
        ];
        for (name, part) in parts {
            if let Some(part) = part {
                line(&mut text, format!("  {name:<5} {part}"));
            }
        }
    }
    subflows(&mut text, "Subflows", &diagnosis.subflows);
    if let Some(probe) = &diagnosis.probe {
        subflows(&mut text, &format!("Subflows of the probe to {}", probe.peer), &probe.subflows);
    }
    let counted = |severity: Severity| match diagnosis.count(severity) {
        1 => format!("1 {}", severity.name()),
        n => format!("{n} {}s", severity.name()),
    };
    text.push('\n');
    line(
        &mut text,
        match (diagnosis.count(Severity::Problem), diagnosis.count(Severity::Warning)) {
            (0, 0) => "Nothing is wrong.".into(),
            (0, _) => format!("No problem, {}.", counted(Severity::Warning)),
            (_, 0) => format!("{}.", counted(Severity::Problem)),
            _ => format!("{}, {}.", counted(Severity::Problem), counted(Severity::Warning)),
        },
    );
    text
}

fn subflows(text: &mut String, title: &str, subflows: &[Shown]) {
    if subflows.is_empty() {
        return;
    }
    text.push('\n');
    line(text, title.into());
    let mut table =
        Table::new(["CONNECTION", "LOCAL", "PEER", "LEAVES BY", "STATE", "FLAGS", "BACKUP", "SENT", "RECEIVED"]);
    for subflow in subflows {
        let backup = match (subflow.backup, subflow.peer_backup) {
            (true, true) => "both",
            (true, false) => "ours",
            (false, true) => "peer's",
            (false, false) => "-",
        };
        table.add([
            subflow.connection.as_str().into(),
            subflow.local.as_str().into(),
            subflow.peer.as_str().into(),
            subflow.interface.as_deref().unwrap_or("-").into(),
            subflow.state.into(),
            subflow.flags.as_str().into(),
            backup.into(),
            subflow.sent.to_string().into(),
            subflow.received.to_string().into(),
        ]);
    }
    *text += &table.text();
}

/// Appends a line. A container's author may have had a word in it: it stays one line, without control characters.
fn line(text: &mut String, line: String) {
    *text += &plain(line);
    text.push('\n');
}

fn conflict_row(conflict: &Conflict) -> [Cow<'_, str>; 8] {
    [
        utc(conflict.time).into(),
        short(&conflict.container).into(),
        conflict.key.as_str().into(),
        conflict.wanted.as_str().into(),
        conflict.kept.as_str().into(),
        or_dash(conflict.holders.iter().map(|id| short(id)).collect::<Vec<_>>().join(", ")),
        conflict.outcome.name().into(),
        conflict.reason.as_str().into(),
    ]
}

/// Columns under their headings, the cells aligned to the left. Its own few lines, because ten thousand containers make
/// more cells than what can draw every kind of table gets through in a second.
struct Table<'a, const N: usize> {
    rows: Vec<[Cow<'a, str>; N]>,
}

impl<'a, const N: usize> Table<'a, N> {
    fn new(header: [&'a str; N]) -> Self {
        Self { rows: vec![header.map(Cow::Borrowed)] }
    }

    fn add(&mut self, row: [Cow<'a, str>; N]) {
        self.rows.push(row.map(|cell| match cell.contains(char::is_control) {
            true => cell.replace(char::is_control, " ").into(),
            false => cell,
        }));
    }

    /// The lines, without the blanks at their ends.
    fn text(&self) -> String {
        let mut widths = [0; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell_width(cell).max(*width);
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut blanks = 0;
            for (cell, width) in row.iter().zip(widths) {
                if !cell.is_empty() {
                    text.extend(std::iter::repeat_n(' ', blanks));
                    text.push_str(cell);
                    blanks = 0;
                }
                blanks += width - cell_width(cell) + 2;
            }
            text.push('\n');
        }
        text
    }
}

fn cell_width(cell: &str) -> usize {
    if cell.is_ascii() { cell.len() } else { cell.chars().count() }
}

/// Engines' ids have 64 digits; twelve are what they show themselves.
fn short(id: &str) -> &str {
    let is_hash = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    if is_hash { &id[..12] } else { id }
}

fn or_dash(text: String) -> Cow<'static, str> {
    if text.is_empty() { "-".into() } else { text.into() }
}

/// `2026-01-31 12:34:56`. The civil date from days since 1970 (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms").
pub fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_stays_on_its_line() {
        let mut text = String::new();
        line(&mut text, "Warning: a\n\u{1b}[2Jb".into());
        assert_eq!(text, "Warning: a\\n\\u{1b}[2Jb\n");
    }

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(utc(1_798_761_599), "2026-12-31 23:59:59");
    }

    #[test]
    fn only_hashes_are_shortened() {
        assert_eq!(short(&"ab".repeat(32)), "abababababab");
        assert_eq!(short("a-name-of-a-container"), "a-name-of-a-container");
    }
}
