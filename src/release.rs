//! The verb `release`: what was set up for a container is undone, as far as it is still ours and nobody else's.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::deadline::Deadline;
use crate::instance::{self, ContainerId, Instance};
use crate::kernel::netns::{Namespace, Visit};
use crate::kernel::{self, Change, Kernel, Seen};
use crate::ledger::record::{Conflict, Record};
use crate::ledger::setting::{Claim, Setting};
use crate::ledger::{self, Ledger, Locks};
use crate::plan::undo;
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
    /// The same, as the agent sees it: whoever reaches the host's values that it cannot put back may come yet.
    Agent,
}

/// What the agent leaves alone: a value of the host that has to be put back and cannot be from where we are.
#[derive(Debug)]
pub struct OutOfReach(SettingKey);

impl std::fmt::Display for OutOfReach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} cannot be put back from this network namespace", self.0)
    }
}

impl std::error::Error for OutOfReach {}

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
        Cause::Stale | Cause::Agent => true,
        Cause::Person => false,
    };
    if cause == Cause::Hook && may_be_alive(&seen) && !seen.instance.is_gone_soon(&boot_id, context.deadline) {
        return Ok(Done::Alive(Box::new(seen)));
    }
    let claims: Vec<SettingKey> = seen.host_claims().cloned().collect();
    let locks = ledger.lock(&key, Some(&seen.instance.netns), &claims, context.deadline)?;
    // It may have changed before the locks were ours.
    let Some(record) = ledger.record(&key)? else {
        // Somebody else has released it meanwhile, and these locks are new ones.
        ledger.discard_locks(&locks, &key, &seen.instance.netns)?;
        ledger.discard_setting_locks(&locks, &claims)?;
        return Ok(Done::Unknown);
    };
    if record.instance != seen.instance || !record.host_claims().eq(claims.iter()) {
        ledger.discard_netns_lock(&locks, &seen.instance.netns)?;
        drop(locks);
        return release_by(container, context, cause, find);
    }
    if may_be_alive(&record) && record.instance.is_alive(&boot_id) {
        return Ok(Done::Alive(Box::new(record)));
    }
    let notes = let_go(&ledger, &locks, &record, &boot_id, cause, find)?;
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

fn let_go(
    ledger: &Ledger,
    locks: &Locks,
    record: &Record,
    boot_id: &str,
    cause: Cause,
    find: Find,
) -> Result<Vec<String>> {
    let key = record.instance.container.key();
    let (siblings, _) = ledger.others(&key, &record.instance.netns, boot_id)?;
    let mut conflicts = Vec::new();
    let claims: Vec<SettingKey> = record.host_claims().cloned().collect();
    if let Some(Reach { mut kernel, inside }) = find(record, &siblings)? {
        if cause == Cause::Agent {
            if let Some(key) = out_of_reach(ledger, kernel.as_mut(), &record.instance, &claims)? {
                return Err(OutOfReach(key).into());
            }
        }
        if inside {
            let keys: Vec<SettingKey> = record.all_netns_claims().map(|owned| owned.key.clone()).collect();
            let mut facts = kernel.facts(&keys)?;
            if record.has_routing() {
                facts.routing = Some(kernel.routing()?);
            }
            let changes = undo::in_namespace(record, &siblings, &facts, ledger::now(), &mut conflicts);
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

/// Whose claims are struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The instance's, and those of the dead.
    OwnAndDead,
    /// Those of the dead.
    Dead,
}

/// The first of these settings whose value has to be put back and cannot be from here, where it is absent or read-only.
fn out_of_reach(
    ledger: &Ledger,
    kernel: &mut dyn Kernel,
    instance: &Instance,
    keys: &[SettingKey],
) -> Result<Option<SettingKey>> {
    if keys.is_empty() {
        return Ok(None);
    }
    let seen = kernel.settings(keys)?;
    let (boot_id, own) = (instance::boot_id()?, instance.container.key());
    for key in keys {
        let host = seen.get(key).map_or(&Seen::Absent, |seen| &seen.host);
        if matches!(host, Seen::Writable(_)) {
            continue;
        }
        let Some(setting) = ledger.setting(key).read()? else { continue };
        let (left, _) = settle(&setting, &own, &boot_id, Whose::OwnAndDead);
        let is_ours = host.value().is_none_or(|actual| setting.is(actual));
        if is_ours && !setting.is(setting.back_to(&left)) {
            return Ok(Some(key.clone()));
        }
    }
    Ok(None)
}

/// The claims on a setting that stay, and those that are struck.
fn settle<'a>(setting: &'a Setting, own: &str, boot_id: &str, whose: Whose) -> (Vec<&'a Claim>, Vec<&'a Claim>) {
    setting.claims.iter().partition(|claim| {
        let leaves = whose == Whose::OwnAndDead && claim.instance.container.key() == own;
        !leaves && claim.instance.is_alive(boot_id)
    })
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
    let seen = kernel.settings(keys)?;
    let boot_id = instance::boot_id()?;
    let own = instance.container.key();
    for key in keys {
        let page = ledger.setting(key);
        let actual = seen.get(key).and_then(|seen| seen.host.value());
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
        let (left, struck) = settle(&setting, &own, &boot_id, whose);
        let back = setting.back_to(&left);
        let mut is_settled = true;
        match actual {
            Some(actual) if !setting.is(actual) => {
                conflicts.push(undo::drift(instance, key, &setting.value, actual, ledger::now()));
            }
            Some(actual) => {
                if !setting::same(key, back, actual) {
                    page.intend(instance, key, actual, back, None)?;
                    let change = Change::HostSetting { key: key.clone(), value: back.into() };
                    kernel.perform(&change)?;
                    kernel.confirm(&[&change])?;
                }
                page.set_value(&setting.at(back))?;
                page.mark_overridden(key, left.iter().copied(), back)?;
                page.fulfil()?;
            }
            // The page keeps the original for whoever can put it back.
            None if !setting.is(back) => {
                conflicts.push(undo::out_of_reach(instance, key, &setting.value, back, ledger::now()));
                is_settled = false;
            }
            None => {}
        }
        for claim in &struck {
            page.unclaim(&claim.instance.container.key())?;
        }
        if left.is_empty() && is_settled {
            page.forget()?;
        }
    }
    Ok(conflicts)
}
