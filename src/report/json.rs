//! `status --json` and `doctor --json`: the fields that others may rely on, and some more beside them.

use serde::Serialize;

use crate::doctor::finding::{Finding, Severity};
use crate::doctor::sockets::Shown;
use crate::doctor::{Diagnosis, probe};
use crate::kernel::{Kind, RouteState};
use crate::ledger::record::{Conflict, Event, Failure, Outcome, Scope, State};
use crate::request::setting::SettingKey;
use crate::status::Status;

#[derive(Serialize)]
struct Root<'a> {
    kernel: Kind,
    containers: Vec<Container<'a>>,
    settings: Vec<Setting<'a>>,
    conflicts: &'a [Conflict],
    conflicts_dropped: usize,
    failures: &'a [Failure],
    failures_dropped: usize,
    problems: &'a [String],
    rootless: bool,
}

#[derive(Serialize)]
struct Container<'a> {
    id: &'a str,
    name: &'a str,
    runtime: &'a str,
    pid: Option<u32>,
    /// A string: namespace inodes do not fit into every JSON reader's numbers.
    netns: String,
    live: bool,
    interrupted: bool,
    /// Whether the agent keeps it as it was asked for.
    followed: bool,
    not_followed: Option<&'a str>,
    interfaces: Vec<Interface<'a>>,
    settings: Vec<ContainerSetting<'a>>,
    limits: Option<crate::ledger::record::LimitPair>,
    warnings: &'a [String],
}

#[derive(Serialize)]
struct Interface<'a> {
    name: &'a str,
    flags: &'a [String],
    state: State,
    reason: Option<&'a str>,
    source: &'a str,
    route: RouteState,
    endpoints: Vec<Endpoint>,
    last: Option<&'a Event>,
}

#[derive(Serialize)]
struct Endpoint {
    id: u8,
    address: std::net::IpAddr,
}

#[derive(Serialize)]
struct ContainerSetting<'a> {
    key: &'a SettingKey,
    value: &'a str,
    scope: Scope,
    outcome: Outcome,
    source: &'a str,
    /// The value now, if somebody has changed it.
    drifted: Option<&'a str>,
}

#[derive(Serialize)]
struct Setting<'a> {
    scope: Scope,
    key: &'a SettingKey,
    value: &'a str,
    original: &'a str,
    present: Option<&'a str>,
    drifted: bool,
    interrupted: bool,
    claims: Vec<Claim<'a>>,
}

#[derive(Serialize)]
struct Claim<'a> {
    container: &'a str,
    value: &'a str,
}

#[derive(Serialize)]
struct Doctor<'a> {
    target: Option<&'a str>,
    facts: Vec<Fact<'a>>,
    findings: &'a [Finding],
    subflows: &'a [Shown],
    probe: Option<&'a probe::Outcome>,
    problems: usize,
    warnings: usize,
}

#[derive(Serialize)]
struct Fact<'a> {
    about: &'a str,
    value: &'a str,
}

/// The diagnosis as one JSON object with a line break at its end.
pub fn doctor(diagnosis: &Diagnosis) -> anyhow::Result<String> {
    let root = Doctor {
        target: diagnosis.target.as_deref(),
        facts: diagnosis.facts.iter().map(|(about, value)| Fact { about, value }).collect(),
        findings: &diagnosis.findings,
        subflows: &diagnosis.subflows,
        probe: diagnosis.probe.as_ref(),
        problems: diagnosis.count(Severity::Problem),
        warnings: diagnosis.count(Severity::Warning),
    };
    Ok(serde_json::to_string(&root)? + "\n")
}

/// The status as one JSON object with a line break at its end.
pub fn status(status: &Status) -> anyhow::Result<String> {
    let containers = status.containers.iter().map(|container| {
        let record = &container.record;
        Container {
            id: &record.instance.container.id,
            name: &record.name,
            runtime: &record.runtime,
            pid: record.instance.pid,
            netns: record.instance.netns.inode.to_string(),
            live: container.live,
            interrupted: container.interrupted,
            followed: container.followed,
            not_followed: container.not_followed.as_deref(),
            interfaces: record
                .interfaces
                .iter()
                .map(|interface| Interface {
                    name: &interface.name,
                    flags: &interface.flags,
                    state: interface.state,
                    reason: interface.reason.as_deref(),
                    source: &interface.source,
                    route: interface.route,
                    endpoints: interface.endpoints.iter().map(|e| Endpoint { id: e.id, address: e.address }).collect(),
                    last: interface.last.as_ref(),
                })
                .collect(),
            settings: record
                .settings
                .iter()
                .map(|owned| ContainerSetting {
                    key: &owned.key,
                    value: &owned.value,
                    scope: owned.scope,
                    outcome: owned.outcome,
                    source: &owned.source,
                    drifted: container.drifted(&owned.key),
                })
                .collect(),
            limits: record.limits.map(|limits| limits.set),
            warnings: &record.warnings,
        }
    });
    let settings = status.settings.iter().map(|setting| Setting {
        scope: Scope::Host,
        key: &setting.key,
        value: &setting.value,
        original: &setting.original,
        present: setting.present.as_deref(),
        drifted: setting.drifted,
        interrupted: setting.interrupted,
        claims: setting.claims.iter().map(|c| Claim { container: &c.container, value: &c.value }).collect(),
    });
    let root = Root {
        kernel: status.kernel,
        containers: containers.collect(),
        settings: settings.collect(),
        conflicts: &status.conflicts,
        conflicts_dropped: status.conflicts_dropped,
        failures: &status.failures,
        failures_dropped: status.failures_dropped,
        problems: &status.problems,
        rootless: status.rootless,
    };
    // About as much as it will be: growing step by step copies it all, again and again.
    let mut text = Vec::with_capacity(4096 + 1280 * status.containers.len());
    serde_json::to_writer(&mut text, &root)?;
    text.push(b'\n');
    Ok(String::from_utf8(text)?)
}
