//! Text for people: one line for a result, tables for `status`, a list for `--dry-run`.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use crate::doctor::Diagnosis;
use crate::doctor::finding::Severity;
use crate::doctor::sockets::Shown;
use crate::error::plain;
use crate::kernel::{self, Kind, RouteState};
use crate::ledger::Following;
use crate::ledger::record::{Event, Failure, Outcome, Record, State};
use crate::plan::Plan;
use crate::report::table::{List, Table};
use crate::request::setting::SettingKey;
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
        parts.push(format!("it is not followed when its addresses, links or routes change: {why}"));
    }
    parts.extend(record.warnings.iter().map(|warning| format!("warning: {warning}")));
    parts.join("; ")
}

/// The plan, for `--dry-run`.
pub fn plan(request: &Request, plan: &Plan) -> String {
    let mut text = String::from("Asked for:\n");
    for wish in request.wishes() {
        line(&mut text, format_args!("  {} = {}    ({})", wish.what.subject(), wish.what.value(), wish.source));
    }
    text += "Would be done:\n";
    for step in &plan.steps {
        line(&mut text, format_args!("  {}    ({})", step.change, step.why));
    }
    if plan.steps.is_empty() {
        text += "  nothing: it is as asked for\n";
    }
    for key in &plan.deferred {
        line(&mut text, format_args!("  {key}: as asked for, once its module is loaded by the steps above"));
    }
    if plan.looks_again {
        text += "  rp_filter is looked at once these rules are there, and made loose where another rule comes before them\n";
    }
    for interface in plan.interfaces.iter().filter(|interface| interface.state != State::Applied) {
        let reason = interface.reason.as_deref().unwrap_or_default();
        line(&mut text, format_args!("  {} stays {}: {reason}", interface.name, interface.state.name()));
    }
    for owned in plan.settings.iter().filter(|owned| owned.outcome != Outcome::Applied) {
        line(&mut text, format_args!("  {} = {}: {}", owned.key, owned.value, owned.outcome.name()));
    }
    for conflict in &plan.conflicts {
        line(&mut text, format_args!("Conflict ({}): {}", conflict.outcome.name(), conflict.reason));
    }
    for warning in &plan.warnings {
        line(&mut text, format_args!("Warning: {warning}"));
    }
    text
}

/// The tables of `status`.
pub fn status(status: &Status) -> String {
    let mut text = format!("MPTCP of this kernel: {}\n", status.kernel.name());
    if status.kernel == Kind::None {
        text += &format!("{}.\n", kernel::without_mptcp());
    }
    if status.rootless {
        text += "This ledger is one user's: it cannot protect host-wide values from others.\n";
    }
    containers(&mut text, status);
    if !status.settings.is_empty() {
        text += "\nHost-wide settings that containers rely on\n";
        let mut table = Table::new(["SETTING", "VALUE", "BEFORE", "RELIED ON BY"]);
        for setting in &status.settings {
            let mut value = setting::describe(&setting.key, &setting.value);
            if setting.drifted {
                value += &format!(", changed by somebody to {}", setting.present.as_deref().unwrap_or("?"));
            }
            if setting.interrupted {
                value += ", interrupted";
            }
            let claims = List(&setting.claims, ", ", |claim, f| {
                match setting::same(&setting.key, &claim.value, &setting.value) {
                    true => f.write_str(&claim.container),
                    false => write!(f, "{} (at {}, overridden)", claim.container, claim.value),
                }
            });
            table.add([&setting.key, &value, &setting.original, &claims]);
        }
        table.write(&mut text);
    }
    if !status.conflicts.is_empty() {
        text += "\nConflicts\n";
        let mut table =
            Table::new(["TIME (UTC)", "CONTAINER", "SETTING", "WANTED", "KEPT", "HOLDERS", "OUTCOME", "REASON"]);
        for conflict in &status.conflicts {
            table.add([
                &utc(conflict.time),
                &short(&conflict.container),
                &conflict.key,
                &conflict.wanted,
                &conflict.kept,
                &List(&conflict.holders, ", ", |id, f| f.write_str(short(id))),
                &conflict.outcome.name(),
                &conflict.reason,
            ]);
        }
        table.write(&mut text);
        dropped(&mut text, status.conflicts_dropped);
    }
    if !status.failures.is_empty() {
        text += "\nHooks that failed\n";
        let mut table = Table::new(["TIME (UTC)", "CONTAINER", "EXIT", "REASON"]);
        for failure in &status.failures {
            let Failure { time, container, status, reason } = failure;
            table.add([&utc(*time), &short(container), status, reason]);
        }
        table.write(&mut text);
        dropped(&mut text, status.failures_dropped);
    }
    for problem in &status.problems {
        text.push('\n');
        line(&mut text, format_args!("Problem: {problem}"));
    }
    text
}

/// Says that a history had older lines.
fn dropped(text: &mut String, number: usize) {
    if number > 0 {
        line(text, format_args!("({number} older ones were dropped: the history is bounded)"));
    }
}

fn containers(text: &mut String, status: &Status) {
    if status.containers.is_empty() {
        *text += "No container is set up.\n";
        return;
    }
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
        let name = short(&record.name);
        if record.interfaces.is_empty() {
            // Else each of its interfaces says so.
            let state = if container.interrupted { State::Interrupted.name() } else { "-" };
            rows.add([&name, &record.runtime, &pid, &followed, &"-", &"-", &state, &"-", &"-"]);
            continue;
        }
        let nothing: [&dyn Display; 4] = [&"", &"", &"", &""];
        let mut first: [&dyn Display; 4] = [&name, &record.runtime, &pid, &followed];
        for interface in &record.interfaces {
            let route = match interface.route {
                RouteState::Ok => "ok",
                RouteState::Missing => "missing",
                RouteState::Unknown => "-",
            };
            let [name, runtime, pid, followed] = std::mem::replace(&mut first, nothing);
            rows.add([
                name,
                runtime,
                pid,
                followed,
                &interface.name,
                &List(&interface.flags, ",", |flag, f| f.write_str(flag)),
                &interface.state.name(),
                &route,
                &List(&interface.endpoints, ", ", |e, f| write!(f, "{} id {}", e.address, e.id)),
            ]);
        }
    }
    rows.write(text);
    let settings: Vec<_> = status.containers.iter().filter(|container| !container.record.settings.is_empty()).collect();
    if !settings.is_empty() {
        *text += "\nSettings of containers\n";
        let mut rows = Table::new(["CONTAINER", "SETTING", "VALUE", "SCOPE", "OUTCOME"]);
        let keys = settings.iter().flat_map(|container| &container.record.settings).map(|owned| &owned.key);
        let mut names: BTreeMap<&SettingKey, String> = BTreeMap::new();
        for key in keys {
            names.entry(key).or_insert_with(|| key.to_string());
        }
        for container in settings {
            for owned in &container.record.settings {
                let mut value = setting::describe(&owned.key, &owned.value);
                if let Some(now) = container.drifted(&owned.key) {
                    value += &format!(", changed by somebody to {}", setting::describe(&owned.key, now));
                }
                let name = short(&container.record.name);
                rows.add([&name, &names[&owned.key], &value, &owned.scope.name(), &owned.outcome.name()]);
            }
        }
        rows.write(text);
    }
    for container in &status.containers {
        let name = short(&container.record.name);
        if container.interrupted && container.record.interfaces.is_empty() {
            line(text, format_args!("{name}: {INTERRUPTED}"));
        }
        if let Some(why) = &container.not_followed {
            line(text, format_args!("{name}: nobody follows it: {why}"));
        }
        for interface in &container.record.interfaces {
            if let Some(Event { time, what }) = &interface.last {
                line(text, format_args!("{name}: {} at {} UTC: {what}", interface.name, utc(*time)));
            }
        }
        for warning in &container.record.warnings {
            line(text, format_args!("Warning: {}: {warning}", short(&container.record.name)));
        }
        for interface in container.record.interfaces.iter().filter(|interface| interface.state != State::Applied) {
            if let Some(reason) = &interface.reason {
                line(
                    text,
                    format_args!(
                        "{}: {} is {}: {reason}",
                        short(&container.record.name),
                        interface.name,
                        interface.state.name()
                    ),
                );
            }
        }
    }
}

/// What the doctor found, each with what was read, why it matters and what mends it.
pub fn doctor(diagnosis: &Diagnosis) -> String {
    let mut text = String::new();
    line(&mut text, diagnosis.target.as_deref().unwrap_or("This host"));
    for (about, value) in &diagnosis.facts {
        line(&mut text, format_args!("  {about}: {value}"));
    }
    for finding in &diagnosis.findings {
        let place = finding.interface.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
        text.push('\n');
        line(
            &mut text,
            format_args!("{} {}{place}: {}", finding.severity.name().to_uppercase(), finding.id, finding.what),
        );
        let parts = [
            ("read:", Some(finding.evidence.as_str()).filter(|evidence| !evidence.is_empty())),
            ("why: ", Some(finding.why)),
            ("mend:", finding.mend.as_deref()),
            ("run: ", finding.command.as_deref()),
            ("or:  ", finding.by_hand.as_deref()),
        ];
        for (name, part) in parts {
            if let Some(part) = part {
                line(&mut text, format_args!("  {name:<5} {part}"));
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
    line(text, title);
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
            &subflow.connection,
            &subflow.local,
            &subflow.peer,
            &subflow.interface.as_deref().unwrap_or("-"),
            &subflow.state,
            &subflow.flags,
            &backup,
            &subflow.sent,
            &subflow.received,
        ]);
    }
    table.write(text);
}

/// Appends a line. A container's author may have had a word in it: it stays one line, without control characters.
fn line(text: &mut String, line: impl Display) {
    let begin = text.len();
    // Writing to a string never fails.
    let _ = write!(text, "{line}");
    if text[begin..].contains(char::is_control) {
        let plain = plain(&text[begin..]);
        text.truncate(begin);
        *text += &plain;
    }
    text.push('\n');
}

/// Engines' ids have 64 digits; twelve are what they show themselves.
fn short(id: &str) -> &str {
    let is_hash = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    if is_hash { &id[..12] } else { id }
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
        line(&mut text, "Warning: a\n\u{1b}[2Jb");
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
