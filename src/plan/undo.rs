//! How to take back what was set up for a container, as far as it is still ours and nobody else's. Pure, like the plan.

use std::collections::BTreeSet;

use super::routes;
use crate::instance::Instance;
use crate::kernel::{Change, Endpoint, Facts, TableRoute};
use crate::ledger::record::{Conflict, ConflictOutcome, LimitPair, OwnedEndpoint, OwnedLink, OwnedSetting, Record};
use crate::request::flags::EndpointFlags;
use crate::request::setting::{SettingKey, same};

/// What puts the namespace back to what it would be without this container: to what a sibling relies on, else to what
/// was there before. What somebody else changed since is theirs.
pub fn in_namespace(
    record: &Record,
    siblings: &[Record],
    facts: &Facts,
    time: u64,
    conflicts: &mut Vec<Conflict>,
) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut addresses = Vec::new();
    for owned in record.endpoints() {
        if !addresses.contains(&owned.address) {
            addresses.push(owned.address);
            endpoint(record, owned, siblings, facts, &mut changes);
        }
    }
    changes.extend(routing(record, siblings, facts));
    changes.extend(record.all_links().filter_map(|(name, owned)| link(record, name, owned, siblings, facts)));
    if let (Some(limits), Some(now)) = (record.limits, facts.limits) {
        // No lower than what a sibling has recorded: it would take the lower one for somebody else's.
        let theirs = siblings.iter().filter_map(|sibling| sibling.limits).map(|limits| limits.set);
        let back = theirs.reduce(LimitPair::max).unwrap_or(limits.original);
        let now = LimitPair::from(now);
        let is_ours = record.versions().filter_map(|version| version.limits).any(|limits| limits.set == now);
        if is_ours && back != now {
            changes.push(Change::Limits(back.into()));
        }
    }
    for owned in record.all_netns_claims() {
        changes.extend(setting(record, owned, siblings, facts, time, conflicts));
    }
    changes
}

/// What the sibling that was set up last has to say.
fn newest<T>(siblings: &[Record], what: impl Fn(&Record) -> Option<T>) -> Option<T> {
    siblings
        .iter()
        .filter_map(|sibling| Some((sibling.time, what(sibling)?)))
        .max_by_key(|(time, _)| *time)
        .map(|(_, t)| t)
}

fn endpoint(record: &Record, owned: &OwnedEndpoint, siblings: &[Record], facts: &Facts, changes: &mut Vec<Change>) {
    let Some(now) = facts.endpoint(owned.address) else { return };
    // One with another id is somebody else's, made after ours was deleted.
    if owned.id != 0 && owned.id != now.id {
        return;
    }
    let theirs = newest(siblings, |sibling| {
        let mut endpoints = sibling.interfaces.iter().flat_map(|interface| &interface.endpoints);
        endpoints.find(|e| e.address == owned.address).map(|e| e.flags)
    });
    let is_ours = record.endpoints().any(|own| own.address == now.address && own.flags == now.flags);
    match theirs.or(owned.original) {
        Some(flags) if flags == now.flags || !is_ours => {}
        Some(flags) => {
            let back = Endpoint { flags, ..now.clone() };
            if (flags ^ now.flags) & !EndpointFlags::CHANGEABLE.0 == 0 {
                changes.push(Change::SetEndpointFlags(back));
            } else {
                // A sibling's, which was overridden with another purpose.
                changes.extend([Change::DeleteEndpoint(now.clone()), Change::AddEndpoint(back)]);
            }
        }
        None => changes.push(Change::DeleteEndpoint(now.clone())),
    }
}

/// What takes our rules away, and then the tables to which they led, unless a sibling uses them.
fn routing(record: &Record, siblings: &[Record], facts: &Facts) -> Vec<Change> {
    let Some(now) = &facts.routing else { return Vec::new() };
    let theirs: BTreeSet<u32> = siblings.iter().flat_map(Record::tables).collect();
    let ours =
        record.tables().into_iter().filter(|table| !theirs.contains(table)).map(|table| routes::ours(now, table));
    let (mut rules, mut routes) = (Vec::new(), Vec::new());
    for owned in ours {
        rules.extend(owned.rules.into_iter().map(Change::DeleteRule));
        let name = |route: &TableRoute| routes::link_name(facts, route.ifindex);
        routes.extend(owned.routes.into_iter().rev().map(|route| Change::DeleteRoute(route.clone(), name(&route))));
    }
    rules.into_iter().chain(routes).collect()
}

/// What puts an interface's flags back, if they are still ours.
pub fn link(record: &Record, name: &str, link: &OwnedLink, siblings: &[Record], facts: &Facts) -> Option<Change> {
    let of = |record: &Record| {
        let mut links = record.interfaces.iter().filter_map(|interface| interface.link.clone());
        links.find(|other| other.index == link.index)
    };
    let theirs = newest(siblings, |sibling| of(sibling).map(|other| other.bits));
    let back = theirs.unwrap_or(link.original) & link.mask;
    let now = facts.link_at(link.index)?.flags & link.mask;
    let is_ours = record.versions().filter_map(of).any(|own| own.bits == now & own.mask);
    let change = Change::LinkFlags { index: link.index, name: name.into(), bits: back, mask: link.mask };
    (is_ours && back != now).then_some(change)
}

/// What puts one value of the namespace back, if it is still ours.
pub fn setting(
    record: &Record,
    owned: &OwnedSetting,
    siblings: &[Record],
    facts: &Facts,
    time: u64,
    conflicts: &mut Vec<Conflict>,
) -> Option<Change> {
    let key = &owned.key;
    let seen = facts.settings.get(key)?;
    let now = seen.target.value()?;
    let of = |record: &Record| record.settings.iter().find(|s| s.key == *key && s.claimed).map(|s| s.value.clone());
    let back = newest(siblings, of).or_else(|| owned.original.clone())?;
    if same(key, now, &back) {
        return None;
    }
    if !record.versions().filter_map(of).any(|ours| same(key, now, &ours)) {
        conflicts.push(drift(&record.instance, key, &owned.value, now, time));
        return None;
    }
    let host = seen.host.value().map(String::from);
    Some(Change::NetnsSysctl { key: key.clone(), value: back, host })
}

/// The record of a value of ours that could not be put back, because the setting cannot be read from here.
pub fn out_of_reach(instance: &Instance, key: &SettingKey, ours: &str, back: &str, time: u64) -> Conflict {
    Conflict {
        wanted: back.into(),
        kept: ours.into(),
        reason: format!(
            "{key} cannot be read from here (another network namespace than the host's, or its module is gone), so that it \
             was not put back from {ours} to {back}; run mptcp-hook repair in the host's network namespace"
        ),
        ..drift(instance, key, ours, back, time)
    }
}

/// The record of a value that somebody else has changed.
pub fn drift(instance: &Instance, key: &SettingKey, ours: &str, now: &str, time: u64) -> Conflict {
    Conflict {
        time,
        container: instance.container.id.clone(),
        key: key.to_string(),
        wanted: ours.into(),
        kept: now.into(),
        holders: Vec::new(),
        outcome: ConflictOutcome::Drift,
        reason: format!("{key} was set to {ours} and somebody has changed it to {now} since; it is left alone"),
    }
}
