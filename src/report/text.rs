//! Text for people: one line for a result, tables for `status`, a list for `--dry-run`.

use comfy_table::{Table, presets};

use crate::kernel::RouteState;
use crate::ledger::record::{Conflict, Failure, Outcome, Record, State};
use crate::plan::Plan;
use crate::request::{Request, setting};
use crate::status::Status;

/// What an apply came to, in one line: `eth1 subflow,backup 10.0.2.2 id 1; limits ...; warning: ...`.
pub fn applied(record: &Record, changed: bool) -> String {
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
            part += ": run mptcp-hook apply again when it is there";
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
    parts.extend(record.warnings.iter().map(|warning| format!("warning: {warning}")));
    parts.join("; ")
}

/// The plan, for `--dry-run`.
pub fn plan(request: &Request, plan: &Plan) -> String {
    let mut text = String::from("Asked for:\n");
    for wish in request.wishes() {
        text += &format!("  {} = {}    ({})\n", wish.what.subject(), wish.what.value(), wish.source);
    }
    text += "Would be done:\n";
    for step in &plan.steps {
        text += &format!("  {}    ({})\n", step.change, step.why);
    }
    if plan.steps.is_empty() {
        text += "  nothing: it is as asked for\n";
    }
    for key in &plan.deferred {
        text += &format!("  {key}: as asked for, once its module is loaded by the steps above\n");
    }
    for interface in plan.interfaces.iter().filter(|interface| interface.state != State::Applied) {
        let reason = interface.reason.as_deref().unwrap_or_default();
        text += &format!("  {} stays {}: {reason}\n", interface.name, interface.state.name());
    }
    for owned in plan.settings.iter().filter(|owned| owned.outcome != Outcome::Applied) {
        text += &format!("  {} = {}: {}\n", owned.key, owned.value, owned.outcome.name());
    }
    for conflict in &plan.conflicts {
        text += &format!("Conflict ({}): {}\n", conflict.outcome.name(), conflict.reason);
    }
    for warning in &plan.warnings {
        text += &format!("Warning: {warning}\n");
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
        let mut table = table(["SETTING", "VALUE", "BEFORE", "RELIED ON BY"]);
        for setting in &status.settings {
            let claims: Vec<String> = setting
                .claims
                .iter()
                .map(|claim| match setting::same(&setting.key, &claim.value, &setting.value) {
                    true => claim.container.clone(),
                    false => format!("{} (at {}, overridden)", claim.container, claim.value),
                })
                .collect();
            let mut value = setting::describe(&setting.key, &setting.value);
            if setting.drifted {
                value += &format!(", changed by somebody to {}", setting.present.as_deref().unwrap_or("?"));
            }
            if setting.interrupted {
                value += ", interrupted";
            }
            table.add_row([setting.key.to_string(), value, setting.original.clone(), or_dash(&claims.join(", "))]);
        }
        text += &lines(&table);
    }
    if !status.conflicts.is_empty() {
        text += "\nConflicts\n";
        let mut table = table(["TIME (UTC)", "CONTAINER", "SETTING", "WANTED", "KEPT", "HOLDERS", "OUTCOME", "REASON"]);
        for conflict in &status.conflicts {
            table.add_row(conflict_row(conflict));
        }
        text += &lines(&table);
    }
    if !status.failures.is_empty() {
        text += "\nHooks that failed\n";
        let mut table = table(["TIME (UTC)", "CONTAINER", "EXIT", "REASON"]);
        for failure in &status.failures {
            let Failure { time, container, status, reason } = failure;
            table.add_row([utc(*time), short(container), status.to_string(), reason.clone()]);
        }
        text += &lines(&table);
    }
    for problem in &status.problems {
        text += &format!("\nProblem: {problem}\n");
    }
    text
}

fn containers(status: &Status) -> String {
    if status.containers.is_empty() {
        return "No container is set up.\n".into();
    }
    let mut text = String::new();
    let mut rows = table(["CONTAINER", "BY", "PID", "INTERFACE", "FLAGS", "STATE", "ROUTE", "ENDPOINTS"]);
    for container in &status.containers {
        let record = &container.record;
        let pid = match (record.instance.pid, container.live) {
            (Some(pid), true) => pid.to_string(),
            (Some(pid), false) => format!("{pid} (dead)"),
            (None, true) => "-".into(),
            (None, false) => "(dead)".into(),
        };
        let mut first = vec![short(&record.name), record.runtime.clone(), pid];
        if record.interfaces.is_empty() {
            first.extend(["-", "-", "-", "-", "-"].map(String::from));
            rows.add_row(first);
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
            let cells = [
                interface.name.clone(),
                interface.flags.join(","),
                interface.state.name().into(),
                route.into(),
                or_dash(&endpoints.join(", ")),
            ];
            rows.add_row(first.iter().cloned().chain(cells));
            first = vec![String::new(); 3];
        }
    }
    text += &lines(&rows);
    let settings: Vec<_> = status.containers.iter().filter(|container| !container.record.settings.is_empty()).collect();
    if !settings.is_empty() {
        text += "\nSettings of containers\n";
        let mut rows = table(["CONTAINER", "SETTING", "VALUE", "SCOPE", "OUTCOME"]);
        for container in settings {
            for owned in &container.record.settings {
                let value = setting::describe(&owned.key, &owned.value);
                rows.add_row([
                    short(&container.record.name),
                    owned.key.to_string(),
                    value,
                    owned.scope.name().into(),
                    owned.outcome.name().into(),
                ]);
            }
        }
        text += &lines(&rows);
    }
    for container in &status.containers {
        for warning in &container.record.warnings {
            text += &format!("Warning: {}: {warning}\n", short(&container.record.name));
        }
        for interface in container.record.interfaces.iter().filter(|interface| interface.state != State::Applied) {
            if let Some(reason) = &interface.reason {
                text += &format!(
                    "{}: {} is {}: {reason}\n",
                    short(&container.record.name),
                    interface.name,
                    interface.state.name()
                );
            }
        }
    }
    text
}

fn conflict_row(conflict: &Conflict) -> [String; 8] {
    [
        utc(conflict.time),
        short(&conflict.container),
        conflict.key.clone(),
        conflict.wanted.clone(),
        conflict.kept.clone(),
        or_dash(&conflict.holders.iter().map(|id| short(id)).collect::<Vec<_>>().join(", ")),
        conflict.outcome.name().into(),
        conflict.reason.clone(),
    ]
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// A table's lines, without the blanks at their ends.
fn lines(table: &Table) -> String {
    table.trim_fmt() + "\n"
}

/// Engines' ids have 64 digits; twelve are what they show themselves.
fn short(id: &str) -> String {
    let is_hash = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    if is_hash { id[..12].into() } else { id.into() }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

/// `2026-01-31 12:34:56`. The civil date from days since 1970 (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn utc(seconds: u64) -> String {
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
