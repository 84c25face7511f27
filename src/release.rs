//! The verb `release`: what was set up for a container is undone, as far as it is still ours and nobody else's.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::deadline::Deadline;
use crate::instance::{self, ContainerId, Instance};
use crate::kernel::netns::{Namespace, Visit};
use crate::kernel::{self, Change, Endpoint, Facts, Kernel};
use crate::ledger::record::{
    Conflict, ConflictOutcome, LimitPair, OwnedEndpoint, OwnedLink, OwnedSetting, Record, Scope,
};
use crate::ledger::setting::Claim;
use crate::ledger::{self, Ledger, Locks};
use crate::request::flags::EndpointFlags;
use crate::request::setting::{self, SettingKey};

/// Why a container is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A hook says that it has stopped. If it is alive, its id is used again.
    Hook,
    /// A person wants it.
    Person,
    /// It is dead and nobody said so.
    Stale,
}

/// What came of it.
pub enum Done {
    /// The ledger does not know it.
    Unknown,
    /// It is alive, and so was left alone.
    Alive(Box<Record>),
    /// It is let go; what people should know about it.
    Released(Box<Record>, Vec<String>),
}

/// The kernel, to undo things with.
pub(crate) struct Reach {
    pub(crate) kernel: Box<dyn Kernel>,
    /// Whether it is seen from the container's namespace. If that is gone, only the host's values are left to undo.
    pub(crate) inside: bool,
}

/// Finds the kernel for a record and the records of its siblings. None if there is nothing to undo with it.
pub(crate) type Find<'a> = &'a dyn Fn(&Record, &[Record]) -> Result<Option<Reach>>;

/// Lets one container go.
pub fn release(container: &ContainerId, context: &Context, cause: Cause) -> Result<Done> {
    release_by(container, context, cause, &|record, siblings| reach(record, siblings, context.deadline))
}

/// Lets one container go by the kernel that `find` finds.
pub(crate) fn release_by(container: &ContainerId, context: &Context, cause: Cause, find: Find) -> Result<Done> {
    let Some(ledger) = Ledger::open(&context.state_dir)? else { return Ok(Done::Unknown) };
    let key = container.key();
    let Some(seen) = ledger.record(&key)? else { return Ok(Done::Unknown) };
    let boot_id = instance::boot_id()?;
    // Without a pid (a createContainer hook that did not learn it) there is nothing to hold a hook's word against.
    let may_be_alive = |record: &Record| match cause {
        Cause::Hook => record.instance.pid.is_some(),
        Cause::Stale => true,
        Cause::Person => false,
    };
    if cause == Cause::Hook && may_be_alive(&seen) && !seen.instance.is_gone_soon(&boot_id, context.deadline) {
        return Ok(Done::Alive(Box::new(seen)));
    }
    let claims: Vec<SettingKey> = seen.host_claims().cloned().collect();
    let locks = ledger.lock(&key, Some(&seen.instance.netns), &claims, context.deadline)?;
    // It may have changed before the locks were ours.
    let Some(record) = ledger.record(&key)? else { return Ok(Done::Unknown) };
    if record.instance != seen.instance || !record.host_claims().eq(claims.iter()) {
        drop(locks);
        return release_by(container, context, cause, find);
    }
    if may_be_alive(&record) && record.instance.is_alive(&boot_id) {
        return Ok(Done::Alive(Box::new(record)));
    }
    let notes = let_go(&ledger, &locks, &record, &boot_id, find)?;
    Ok(Done::Released(Box::new(record), notes))
}

/// Lets all containers go that are dead. What cannot be let go comes as its error, and the rest all the same.
pub fn stale(context: &Context) -> Result<Vec<Result<Done>>> {
    let Some(ledger) = Ledger::open(&context.state_dir)? else { return Ok(Vec::new()) };
    let boot_id = instance::boot_id()?;
    let mut done = Vec::new();
    for record in ledger.records()? {
        match record {
            Ok(record) if record.instance.is_alive(&boot_id) => {}
            Ok(record) => done.push(release(&record.instance.container, context, Cause::Stale)),
            Err(error) => done.push(Err(error)),
        }
    }
    Ok(done)
}

fn let_go(ledger: &Ledger, locks: &Locks, record: &Record, boot_id: &str, find: Find) -> Result<Vec<String>> {
    let key = record.instance.container.key();
    let (siblings, _) = ledger.others(&key, &record.instance.netns, boot_id)?;
    let mut conflicts = Vec::new();
    let claims: Vec<SettingKey> = record.host_claims().cloned().collect();
    if let Some(Reach { mut kernel, inside }) = find(record, &siblings)? {
        if inside {
            let keys: Vec<SettingKey> = record.settings.iter().map(|owned| owned.key.clone()).collect();
            let facts = kernel.facts(&keys)?;
            let changes = undo_in_namespace(record, &siblings, &facts, &mut conflicts);
            for change in &changes {
                kernel.perform(change)?;
            }
            kernel.confirm(&changes.iter().collect::<Vec<_>>())?;
        }
        conflicts.extend(give_up_claims(ledger, kernel.as_mut(), &record.instance, &claims, Whose::OwnAndDead)?);
    }
    ledger.record_conflicts(&conflicts)?;
    ledger.remove_record(record)?;
    ledger.discard_locks(locks, &key, &record.instance.netns)?;
    ledger.discard_setting_locks(locks, &claims)?;
    Ok(conflicts.into_iter().map(|conflict| conflict.reason).collect())
}

/// The kernel, seen from the container's namespace while that is there, else from our own if the host's values matter.
fn reach(record: &Record, siblings: &[Record], deadline: Deadline) -> Result<Option<Reach>> {
    let (visit, inside) = match find_namespace(record, siblings, &instance::boot_id()?)? {
        Some(visit) => (visit, true),
        None if record.host_claims().next().is_none() => return Ok(None),
        None => (Visit::to(Namespace::own()?, None)?, false),
    };
    Ok(kernel::open(visit, deadline)?.map(|(_, kernel)| Reach { kernel, inside }))
}

/// The container's namespace, if it is still there: by its own process, by a sibling's, or by its path.
fn find_namespace(record: &Record, siblings: &[Record], boot_id: &str) -> Result<Option<Visit>> {
    if record.instance.boot_id != boot_id {
        return Ok(None);
    }
    let alive = record.instance.pid.is_none() || record.instance.is_alive(boot_id);
    // The dead process's own entry may be another's by now. Other places are told by the cookie, where there is one.
    let dead = record.instance.pid.filter(|_| !alive).map(|pid| format!("/proc/{pid}/ns/net"));
    let sure = record.instance.netns.cookie.is_some();
    let places = record.instance.netns_places().into_iter();
    let own = places.filter(|place| Some(place) != dead.as_ref() && (alive || sure || !place.starts_with("/proc/")));
    // With `host-namespace = "allow"` it is the one that we are in.
    let here = (Namespace::own()?.inode() == record.instance.netns.inode).then(|| "/proc/thread-self/ns/net".into());
    let pids = |place: &str| place.strip_prefix("/proc/").and_then(|rest| rest.split('/').next()?.parse().ok());
    for place in here.into_iter().chain(own).chain(siblings.iter().flat_map(|sibling| sibling.instance.netns_places()))
    {
        let Ok(namespace) = Namespace::open(Path::new(&place)) else { continue };
        if namespace.inode() != record.instance.netns.inode {
            continue;
        }
        let mut visit = Visit::to(namespace, pids(&place))?;
        // The inode may be another one's by now; the cookie cannot.
        if visit.id().with_context(|| format!("cannot enter {place}"))? == record.instance.netns {
            return Ok(Some(visit));
        }
    }
    Ok(None)
}

/// What puts the namespace back to what it would be without this container: to what a sibling relies on, else to what
/// was there before. What somebody else changed since is theirs.
pub fn undo_in_namespace(
    record: &Record,
    siblings: &[Record],
    facts: &Facts,
    conflicts: &mut Vec<Conflict>,
) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut addresses = Vec::new();
    for owned in record.endpoints() {
        if !addresses.contains(&owned.address) {
            addresses.push(owned.address);
            undo_endpoint(record, owned, siblings, facts, &mut changes);
        }
    }
    for interface in record.interfaces.iter().rev() {
        let Some(link) = &interface.link else { continue };
        changes.extend(undo_link(record, &interface.name, link, siblings, facts));
    }
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
    for owned in record.settings.iter().rev().filter(|owned| owned.scope == Scope::Netns && owned.claimed) {
        changes.extend(undo_setting(record, owned, siblings, facts, conflicts));
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

fn undo_endpoint(
    record: &Record,
    owned: &OwnedEndpoint,
    siblings: &[Record],
    facts: &Facts,
    changes: &mut Vec<Change>,
) {
    let Some(now) = facts.endpoints.iter().find(|e| e.address == owned.address && e.port.is_none()) else { return };
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

fn undo_link(record: &Record, name: &str, link: &OwnedLink, siblings: &[Record], facts: &Facts) -> Option<Change> {
    let of = |record: &Record| {
        let mut links = record.interfaces.iter().filter_map(|interface| interface.link.clone());
        links.find(|other| other.index == link.index)
    };
    let theirs = newest(siblings, |sibling| of(sibling).map(|other| other.bits));
    let back = theirs.unwrap_or(link.original) & link.mask;
    let now = facts.links.iter().find(|l| l.index == link.index)?.flags & link.mask;
    let is_ours = record.versions().filter_map(of).any(|own| own.bits == now & own.mask);
    let change = Change::LinkFlags { index: link.index, name: name.into(), bits: back, mask: link.mask };
    (is_ours && back != now).then_some(change)
}

fn undo_setting(
    record: &Record,
    owned: &OwnedSetting,
    siblings: &[Record],
    facts: &Facts,
    conflicts: &mut Vec<Conflict>,
) -> Option<Change> {
    let key = &owned.key;
    let seen = facts.settings.get(key)?;
    let now = seen.target.value()?;
    let of = |record: &Record| record.settings.iter().find(|s| s.key == *key && s.claimed).map(|s| s.value.clone());
    let back = newest(siblings, of).or_else(|| owned.original.clone())?;
    if setting::same(key, now, &back) {
        return None;
    }
    if !record.versions().filter_map(of).any(|ours| setting::same(key, now, &ours)) {
        conflicts.push(drift(&record.instance, key, &owned.value, now));
        return None;
    }
    let host = seen.host.value().map(String::from);
    Some(Change::NetnsSysctl { key: key.clone(), value: back, host })
}

fn drift(instance: &Instance, key: &SettingKey, ours: &str, now: &str) -> Conflict {
    Conflict {
        time: ledger::now(),
        container: instance.container.id.clone(),
        key: key.to_string(),
        wanted: ours.into(),
        kept: now.into(),
        holders: Vec::new(),
        outcome: ConflictOutcome::Drift,
        reason: format!("{key} was set to {ours} and somebody has changed it to {now} since; it is left alone"),
    }
}

/// Whose claims are struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The instance's, and those of the dead.
    OwnAndDead,
    /// Those of the dead.
    Dead,
}

/// Strikes claims on host-wide settings. A value that nobody else relies on goes back: to the newest
/// claim that is left, else to what was there before the first of ours. The locks of the settings are held.
pub fn give_up_claims(
    ledger: &Ledger,
    kernel: &mut dyn Kernel,
    instance: &Instance,
    keys: &[SettingKey],
    whose: Whose,
) -> Result<Vec<Conflict>> {
    let mut conflicts = Vec::new();
    if keys.is_empty() {
        return Ok(conflicts);
    }
    let facts = kernel.facts(keys)?;
    let boot_id = instance::boot_id()?;
    let own = instance.container.key();
    for key in keys {
        let page = ledger.setting(key);
        let actual = facts.settings.get(key).and_then(|seen| seen.host.value());
        if let Some(actual) = actual {
            page.recover(actual)?;
        }
        let relies_on_it = |claim: &Claim| {
            actual.is_some_and(|actual| setting::same(key, &claim.value, actual)) && claim.instance.is_alive(&boot_id)
        };
        let in_force = page.read_value()?.is_some_and(|setting| actual.is_some_and(|actual| setting.is(actual)));
        if whose == Whose::OwnAndDead && in_force && page.any_other_claim(&own, relies_on_it)? {
            page.unclaim(&own)?;
            continue;
        }
        let Some(setting) = page.read()? else { continue };
        let (left, struck): (Vec<_>, Vec<_>) = setting.claims.iter().partition(|claim| {
            let leaves = whose == Whose::OwnAndDead && claim.instance.container.key() == own;
            !leaves && claim.instance.is_alive(&boot_id)
        });
        if let Some(actual) = actual {
            if !setting.is(actual) {
                conflicts.push(drift(instance, key, &setting.value, actual));
            } else {
                let back = left.last().map_or(&setting.original, |claim| &claim.value);
                if !setting::same(key, back, actual) {
                    page.intend(instance, key, actual, back)?;
                    let change = Change::HostSetting { key: key.clone(), value: back.clone() };
                    kernel.perform(&change)?;
                    kernel.confirm(&[&change])?;
                }
                page.set_value(key, &setting.original, back)?;
                page.mark_overridden(&left, back)?;
                page.fulfil()?;
            }
        }
        for claim in &struck {
            page.unclaim(&claim.instance.container.key())?;
        }
        if left.is_empty() {
            page.forget()?;
        }
    }
    Ok(conflicts)
}
