//! The verb `repair`: the ledger's index is rebuilt from its records, which are the truth. What cannot be read is moved
//! aside and named, never deleted.
//!
//! The containers are seen to one at a time, then all settings at once under their locks: whoever changes a record's
//! claims holds the lock of the setting, so that the records cannot change meanwhile. Dead containers stay in the ledger
//! for `release --stale`; only what no record speaks of is settled here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::instance::{self, ContainerId, Door, Instance, Process};
use crate::kernel::netns::{Namespace, NetnsId, Visit};
use crate::kernel::{self, sysctl};
use crate::ledger::record::{Record, Scope, VERSION};
use crate::ledger::setting::{Claim, Page, Setting, Survey};
use crate::ledger::{Fault, Ledger, Trouble};
use crate::release::{self, Whose};
use crate::request::setting::{self, SettingKey};

/// Nobody takes this long over one small file, however busy the machine is.
const TEMPORARY_AGE: Duration = Duration::from_secs(10);

/// What came of it.
#[derive(Debug, Default)]
pub struct Repaired {
    /// What was mended, a line each.
    pub lines: Vec<String>,
    /// What could not be, a line each.
    pub failures: Vec<String>,
    containers: usize,
    dead: usize,
    settings: usize,
}

impl Repaired {
    /// The whole in one line.
    pub fn summary(&self) -> String {
        let many = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let mended = match self.lines.len() {
            0 => "nothing had to be mended".into(),
            n => format!("{} mended", many(n, "thing")),
        };
        let dead = match self.dead {
            0 => String::new(),
            n => format!(
                "; {} dead, which mptcp-hook release --stale lets go",
                if n == 1 { "1 is".into() } else { format!("{n} are") }
            ),
        };
        let (containers, settings) = (many(self.containers, "container"), many(self.settings, "host-wide setting"));
        format!("the ledger is in order: {mended}; {containers}, {settings}{dead}")
    }
}

/// Mends the ledger. What fails is in the answer, and the rest is done all the same.
pub fn repair(context: &Context) -> Result<Repaired> {
    let mut work = Work { done: Repaired::default(), unknown: BTreeSet::new() };
    let Some(ledger) = Ledger::open(&context.state_dir)? else { return Ok(work.done) };
    ledger.make_directories()?;
    work.files(&ledger, context)?;
    work.containers(&ledger, context)?;
    work.namespaces(&ledger, context)?;
    work.settings(&ledger, context)?;
    Ok(work.done)
}

struct Work {
    done: Repaired,
    /// Containers whose records are there and cannot be read: nothing is known about their claims.
    unknown: BTreeSet<String>,
}

impl Work {
    fn say(&mut self, line: String) {
        self.done.lines.push(line);
    }

    /// Moves a damaged file aside. What is wrong with it is already in words.
    fn aside(&mut self, ledger: &Ledger, path: &std::path::Path, why: &str) {
        // The advice to run this very verb has had its effect.
        let why = why.trim_end_matches("; run mptcp-hook repair");
        match ledger.move_aside(path) {
            Ok(moved) => self.say(format!("{why}: {moved}")),
            Err(error) => self.done.failures.push(format!("{why}; {error:#}")),
        }
    }

    /// Owners, modes, things that do not belong there, and what killed writers left.
    fn files(&mut self, ledger: &Ledger, context: &Context) -> Result<()> {
        for odd in ledger.oddities()? {
            let lock = ledger.lock_of(&odd.path);
            let _locks = ledger.lock_by_name(lock.as_slice(), "repair", context.deadline)?;
            match odd.trouble {
                Trouble::Stranger => self.aside(ledger, &odd.path, &odd.to_string()),
                Trouble::NotOurs(_) => match ledger.take_back(&odd.path) {
                    Ok(()) => self.say(format!("{odd}: taken back")),
                    Err(error) => self.done.failures.push(format!("{odd}; {error:#}")),
                },
            }
        }
        let removed = ledger.remove_temporaries(&[], TEMPORARY_AGE)?;
        self.temporaries(removed);
        Ok(())
    }

    fn temporaries(&mut self, removed: usize) {
        if removed > 0 {
            self.say(format!("{removed} half-written files of killed hooks were removed"));
        }
    }

    /// Reads a record; one whose name and content disagree is damaged.
    fn read(ledger: &Ledger, name: &str) -> Result<Option<Record>> {
        let record = ledger.record(name)?;
        match record {
            Some(record) if record.instance.container.key() != name => {
                let id = &record.instance.container.id;
                let path = ledger.record_path(name);
                Err(Fault::Damaged(format!("the ledger's file {} is another container's ({id})", path.display()))
                    .into())
            }
            other => Ok(other),
        }
    }

    /// The records: damaged ones aside, the others on their namespaces' lists.
    fn containers(&mut self, ledger: &Ledger, context: &Context) -> Result<()> {
        let boot_id = instance::boot_id()?;
        for name in ledger.containers()? {
            // Nearly all are well; those that are not are looked at again under their locks.
            let netns = match Self::read(ledger, &name) {
                Ok(None) => continue,
                Ok(Some(record)) => Some(record.instance.netns),
                Err(_) => None,
            };
            let _locks = ledger.lock(&name, netns.as_ref(), &[], context.deadline)?;
            match Self::read(ledger, &name) {
                Ok(None) => {}
                Ok(Some(record)) => {
                    self.done.containers += 1;
                    let shown = &record.instance.container.id;
                    if !record.instance.is_alive(&boot_id) {
                        self.done.dead += 1;
                    }
                    let writer = record.at_work.as_ref();
                    let killed = writer.is_some_and(|writer| !Process::lives(writer.pid, writer.start_time));
                    if killed {
                        self.say(format!("a hook was killed while it set {shown} up; apply or release finishes it"));
                    }
                    let is_listed = ledger.members(&record.instance.netns)?.contains(&name);
                    if netns.as_ref() == Some(&record.instance.netns) && !is_listed {
                        ledger.enter_namespace(&record)?;
                        self.say(format!("{shown} was missing on its network namespace's list: entered"));
                    }
                }
                Err(error) if Fault::is_damaged(&error) => {
                    self.aside(ledger, &ledger.record_path(&name), &format!("{error:#}"));
                }
                Err(error) => {
                    self.done.failures.push(format!("{error:#}"));
                    self.unknown.insert(name);
                }
            }
        }
        Ok(())
    }

    /// The lists of the namespaces: nobody who is not there.
    fn namespaces(&mut self, ledger: &Ledger, context: &Context) -> Result<()> {
        for (netns, members) in ledger.namespaces()? {
            let belongs = |member: &str| match ledger.record(member) {
                Ok(record) => record.is_some_and(|record| record.instance.netns.file_name() == netns),
                // Whatever it says.
                Err(_) => true,
            };
            let is_empty = members.is_empty();
            for member in members.iter().filter(|member| !belongs(member)) {
                let names = [format!("container:{member}"), format!("netns:{netns}")];
                let locks = ledger.lock_by_name(&names, "repair", context.deadline)?;
                if !belongs(member) {
                    ledger.strike_member(&netns, Some(member))?;
                    self.say(format!(
                        "{member} was on the list of the network namespace {netns} without a record: struck"
                    ));
                }
                if matches!(ledger.record(member), Ok(None)) {
                    locks.discard(&names[0])?;
                }
            }
            if is_empty {
                let _lock = ledger.lock_by_name(&[format!("netns:{netns}")], "repair", context.deadline)?;
                ledger.strike_member(&netns, None)?;
            }
        }
        Ok(())
    }

    /// The pages of the host-wide settings.
    fn settings(&mut self, ledger: &Ledger, context: &Context) -> Result<()> {
        let records = || -> Result<Vec<Record>> { Ok(ledger.records()?.into_iter().filter_map(Result::ok).collect()) };
        let claimed = |record: &Record| record.host_claims().cloned().collect::<Vec<_>>();
        let mut keys: BTreeSet<SettingKey> = ledger.setting_keys()?.into_iter().collect();
        keys.extend(records()?.iter().flat_map(claimed));
        if keys.is_empty() {
            return Ok(());
        }
        let keys: Vec<SettingKey> = keys.into_iter().collect();
        let names: Vec<String> =
            keys.iter().map(|key| format!("setting:{}", crate::ledger::setting::directory_name(key))).collect();
        let locks = ledger.lock_by_name(&names, "repair", context.deadline)?;
        // Again, now that they cannot change.
        let mut relied: BTreeMap<SettingKey, Vec<Relied>> = BTreeMap::new();
        for record in records()? {
            for (key, said) in Relied::of(&record) {
                relied.entry(key).or_default().push(said);
            }
        }
        let mut abandoned = Vec::new();
        for key in &keys {
            if self.setting(ledger, key, relied.remove(key).unwrap_or_default())? {
                abandoned.push(key.clone());
            }
        }
        self.settle(ledger, context, &abandoned)?;
        self.done.settings = ledger.settings()?.0.len();
        ledger.discard_setting_locks(&locks, &keys)
    }

    /// One page. True if a value is in force that nobody relies on any more.
    fn setting(&mut self, ledger: &Ledger, key: &SettingKey, relied: Vec<Relied>) -> Result<bool> {
        let boot_id = instance::boot_id()?;
        let page = ledger.setting(key);
        let survey = page.survey();
        if survey.faults.iter().any(|(_, error)| !Fault::is_damaged(error)) {
            self.done.failures.extend(survey.faults.iter().map(|(_, error)| format!("{error:#}")));
            return Ok(false);
        }
        let removed = ledger.remove_temporaries(&page.directories(), Duration::ZERO)?;
        self.temporaries(removed);
        let lost = |name: &str| survey.faults.iter().any(|(path, _)| path.ends_with(name));
        let (value_lost, intent_lost) = (lost("value"), lost("intent"));
        for (path, error) in &survey.faults {
            self.aside(ledger, path, &format!("{error:#}"));
        }
        let present = sysctl::look(key).value().map(String::from);
        let newest = relied.iter().filter(|said| said.original.is_some()).max_by_key(|said| said.time);
        let original = newest.and_then(|said| said.original.clone());
        let is_empty = !survey.has_value && survey.intent.is_none() && survey.claims.is_empty();
        if let (true, true, Some(now), Some(original)) = (is_empty, survey.faults.is_empty(), &present, &original) {
            let relies_on_it = |said: &Relied| said.values.iter().any(|value| setting::same(key, value, now));
            if setting::same(key, original, now) && !relied.iter().any(relies_on_it) {
                // A release that was killed has put it back, and has only left the record.
                page.tidy()?;
                return Ok(false);
            }
        }

        // The claims, as the records have them.
        let mut there: BTreeMap<&str, &Claim> = BTreeMap::new();
        let mut struck = false;
        for (name, claim) in &survey.claims {
            if claim.instance.container.key() == *name {
                there.insert(name, claim);
            } else {
                let path = page.directories()[1].join(name);
                self.aside(ledger, &path, &format!("the ledger's file {} is another container's", path.display()));
                struck = true;
            }
        }
        let mut values: Vec<(u64, String)> = Vec::new();
        for said in &relied {
            let container = said.instance.container.key();
            let id = &said.instance.container.id;
            let found = there.remove(container.as_str());
            let agrees = found.is_some_and(|claim| {
                said.lives.contains(&claim.instance) && said.values.iter().any(|v| setting::same(key, v, &claim.value))
            });
            match (found, &said.firm) {
                (Some(claim), _) if agrees => values.push((claim.time, claim.value.clone())),
                (found, Some(value)) => {
                    let time = found.map_or(said.time, |claim| claim.time);
                    page.make()?;
                    page.claim(&Claim {
                        version: VERSION,
                        instance: said.instance.clone(),
                        value: value.clone(),
                        time,
                        overridden: false,
                    })?;
                    self.say(format!("the claim of {id} on {key} = {value} was written anew from its record"));
                    values.push((time, value.clone()));
                }
                // Of an apply that was killed before it made the claim.
                (Some(_), None) => page.unclaim(&container)?,
                (None, None) => {}
            }
        }
        for (name, claim) in there {
            let id = &claim.instance.container.id;
            let has_record = matches!(ledger.record(name), Ok(Some(_)));
            if self.unknown.contains(name) {
                values.push((claim.time, claim.value.clone()));
            } else if !has_record && claim.instance.is_alive(&boot_id) {
                self.say(format!(
                    "{id} is alive and relies on {key} = {}, and its record is lost: the claim stays; apply it again",
                    claim.value
                ));
                values.push((claim.time, claim.value.clone()));
            } else {
                page.unclaim(name)?;
                struck = true;
                self.say(format!("the claim of {id} on {key} = {} had no record: struck", claim.value));
            }
        }
        values.sort();
        let planned = relied.iter().filter(|said| said.firm.is_none()).flat_map(|said| said.values.clone()).collect();
        let found = Found { values, planned, original, present, value_lost, intent_lost };
        self.value(key, &page, &survey, &found)?;
        if let Some(actual) = &found.present {
            if page.survey().intent.is_some() {
                page.recover(actual)?;
                self.say(format!("a hook was killed while it wrote {key}: settled, it is {actual}"));
            }
        }
        let Some(now) = page.read()? else {
            page.tidy()?;
            return Ok(false);
        };
        page.mark_overridden(key, &now.claims, &now.value)?;
        // An interrupted apply is finished or undone as a whole, by the next one or by a release.
        let is_interrupted = relied.iter().any(|said| said.firm.is_none());
        Ok(!is_interrupted && (struck || now.claims.is_empty()) && now.left_behind(&boot_id).is_some())
    }
}

impl Work {
    /// The value's own file: kept if it can be read, else put together from what the records, the claims and the kernel
    /// say. Nothing is invented: an original that nobody knows is said to be lost.
    fn value(&mut self, key: &SettingKey, page: &Page, survey: &Survey, found: &Found) -> Result<()> {
        let present = found.present.as_deref();
        if survey.has_value {
            let Some(setting) = &survey.setting else { return Ok(()) };
            // The write whose intent is lost may have happened: then the value in force is one of ours.
            let ours = present.filter(|now| {
                found.values.iter().any(|(_, value)| setting::same(key, value, now))
                    || found.planned.iter().any(|value| setting::same(key, value, now))
                    || setting::same(key, &setting.original, now)
            });
            if let Some(now) = ours.filter(|now| found.intent_lost && !setting.is(now)) {
                page.set_value(&setting.at(now))?;
            }
            return Ok(());
        }
        let intent = survey.intent.as_ref();
        let (claimed, planned) = (&found.values, &found.planned);
        if claimed.is_empty() && planned.is_empty() && (intent.is_none() || !found.value_lost) {
            if found.value_lost {
                let now = present.unwrap_or("unknown");
                self.say(format!("{key}: what it was before is lost with its file; nobody relies on it; it is {now}"));
            }
            // The intent of the first write of all says everything itself.
            return Ok(());
        }
        let known = |value: &str| {
            let intended = intent.into_iter().flat_map(|intent| [intent.original.as_str(), intent.wanted.as_str()]);
            claimed.iter().map(|(_, value)| value.as_str()).chain(intended).any(|ours| setting::same(key, ours, value))
        };
        let newest = claimed.last().map(|(_, value)| value.as_str());
        let before = intent.map(|intent| intent.original.as_str());
        let Some(value) = present.filter(|now| known(now)).or(newest).or(before).or(present) else {
            self.done
                .failures
                .push(format!("{key}: its page is lost, and it cannot be read; load its module and try again"));
            return Ok(());
        };
        // The intent's is the first one's only if nobody relied on the setting before.
        let original = found.original.as_deref().or(before.filter(|_| claimed.is_empty()));
        page.make()?;
        page.set_value(&Setting {
            key: key.clone(),
            original: original.unwrap_or(value).into(),
            value: value.into(),
            since: claimed.last().map_or(0, |(time, _)| *time),
            original_since: 0,
            claims: Vec::new(),
            intent: None,
        })?;
        self.say(match original {
            Some(original) => format!("{key}: the page was written anew: it is {value}, and was {original} before"),
            None => format!(
                "{key}: the page was written anew: it is {value}; what it was before is lost, so it stays at that when the last container leaves"
            ),
        });
        Ok(())
    }

    /// Values that nobody relies on any more go back to what they were.
    fn settle(&mut self, ledger: &Ledger, context: &Context, keys: &[SettingKey]) -> Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        let namespace = Namespace::own()?;
        let (pid, process) = Process::own()?;
        let myself = Instance {
            container: ContainerId::new(Door::Command, "", "repair")?,
            boot_id: instance::boot_id()?,
            pid: Some(pid),
            start_time: Some(process.start_time),
            netns: NetnsId { inode: namespace.inode(), cookie: None },
            netns_path: None,
        };
        let Some((_, mut kernel)) = kernel::open(Visit::to(namespace, None)?, context.deadline)? else {
            self.done.failures.push(format!("values that nobody relies on were left: {}", kernel::without_mptcp()));
            return Ok(());
        };
        for key in keys {
            let settled =
                release::give_up_claims(ledger, kernel.as_mut(), &myself, std::slice::from_ref(key), Whose::Dead);
            match settled.with_context(|| format!("{key} could not be put back")) {
                Ok(conflicts) => {
                    ledger.record_conflicts(&conflicts)?;
                    match sysctl::look(key).value() {
                        Some(now) => {
                            self.say(format!("nobody relied on the value of {key} any more; it is {now} now"));
                        }
                        None => self.done.failures.extend(conflicts.into_iter().map(|conflict| conflict.reason)),
                    }
                }
                Err(error) => self.done.failures.push(format!("{error:#}")),
            }
        }
        Ok(())
    }
}

/// What was found out about one setting.
struct Found {
    /// The values of the claims, the oldest first.
    values: Vec<(u64, String)>,
    /// The values of applies that were killed.
    planned: Vec<String>,
    /// The value before the first claim, as the newest record has it.
    original: Option<String>,
    /// The value now.
    present: Option<String>,
    value_lost: bool,
    intent_lost: bool,
}

/// What a record says about its reliance on one setting.
struct Relied {
    instance: Instance,
    /// The life of the record, and the one before while a hook is at work.
    lives: Vec<Instance>,
    /// The value that was relied on before anything was interrupted; none if there was none.
    firm: Option<String>,
    /// All values that it may rely on.
    values: Vec<String>,
    original: Option<String>,
    time: u64,
}

impl Relied {
    /// By setting.
    fn of(record: &Record) -> Vec<(SettingKey, Self)> {
        let mut keys: Vec<&SettingKey> = record.host_claims().collect();
        keys.sort();
        keys.dedup();
        let own = |version: &Record, key: &SettingKey| {
            version.settings.iter().find(|own| own.scope == Scope::Host && own.claimed && own.key == *key).cloned()
        };
        let steady = match &record.at_work {
            None => Some(record),
            Some(writer) => writer.before.as_deref(),
        };
        let relied = keys.into_iter().map(|key| {
            let firm = steady.and_then(|version| own(version, key));
            let all: Vec<_> = record.versions().filter_map(|version| own(version, key)).collect();
            let said = Self {
                instance: steady.unwrap_or(record).instance.clone(),
                lives: record.versions().map(|version| version.instance.clone()).collect(),
                firm: firm.map(|own| own.value),
                original: all.iter().find_map(|own| own.original.clone()),
                values: all.into_iter().map(|own| own.value).collect(),
                time: record.time,
            };
            (key.clone(), said)
        });
        relied.collect()
    }
}
