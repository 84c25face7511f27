//! The verb `apply`: from a call to a kernel that is as asked for and a ledger that says so, or to nothing changed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::context::Context;
use crate::deadline::Deadline;
use crate::error::{exit_status, refused, usage};
use crate::front::{Apply, Place};
use crate::instance::{self, Instance, Process};
use crate::kernel::netns::{Namespace, NetnsId, Visit};
use crate::kernel::{self, Change, Facts, Kernel, RouteState, Seen, sysctl};
use crate::ledger::record::{Conflict, ConflictOutcome, OwnedSetting, Record, Scope, VERSION, Writer};
use crate::ledger::setting::{Claim, Setting};
use crate::ledger::{self, Ledger, Locks};
use crate::plan::{Holder, HostSetting, Input, Plan, is_learnt, rp_filters, scope, to_look_up};
use crate::release::{self, Whose};
use crate::request::setting::{self, SettingKey};
use crate::request::{Request, Routes};

/// How long the agent looks for ways out in one container: some sixteen look-ups for each interface, which take less than a
/// millisecond in all.
const WAYS_PATIENCE: Duration = Duration::from_millis(500);

/// What came of it.
pub enum Done {
    /// Nobody asked for anything.
    Nothing(Option<String>),
    /// `--dry-run`.
    Planned(Box<Request>, Box<Plan>),
    /// It is in force; whether anything had to be changed for it.
    Applied(Box<Record>, bool),
}

/// Sets the container up. The error says what went wrong; everything has been undone then.
pub fn apply(call: Apply, context: &Context, dry_run: bool) -> Result<Done> {
    if call.request.is_empty() {
        return Ok(Done::Nothing(None));
    }
    let (mut visit, process) = open(&call.place)?;
    if visit.target_is_host() && !context.policy.host_namespace {
        if call.request.is_only_defaults() {
            return Ok(Done::Nothing(Some(
                "it uses the host's network, which the policy's defaults leave alone".into(),
            )));
        }
        let reason = "it uses the host's own network namespace, which is not a container's to set up; host-namespace = \"allow\" in the policy would allow it";
        if !dry_run {
            let conflict = Conflict {
                time: ledger::now(),
                container: call.container.id,
                key: "host-namespace".into(),
                wanted: "allow".into(),
                kept: "refuse".into(),
                holders: Vec::new(),
                outcome: ConflictOutcome::Refused,
                reason: reason.into(),
            };
            return Err(refusal(
                reason,
                Ledger::create(&context.state_dir).and_then(|l| l.record_conflicts(&[conflict])),
            ));
        }
        return Err(refused(reason));
    }
    sysctl::look_before(&mut visit, call.request.settings().into_keys().cloned());
    // Before going in: in another user namespace nobody's files look like ours.
    let ledger = match dry_run {
        true => Ledger::open(&context.state_dir)?,
        false => Some(Ledger::create(&context.state_dir)?),
    };
    let instance = Instance {
        container: call.container.clone(),
        boot_id: instance::boot_id()?,
        pid: process.map(|(pid, _)| pid),
        start_time: process.map(|(_, process)| process.start_time),
        netns: visit.id()?,
        netns_path: call.netns_path.clone(),
    };
    let Some((kind, kernel)) = kernel::open(visit, context.deadline)? else {
        bail!(kernel::without_mptcp());
    };
    let work = Work { call, context, instance, kernel, kind, follows: None };
    match ledger {
        Some(ledger) if !dry_run => work.run(&ledger),
        ledger => work.only_plan(ledger.as_ref()),
    }
}

/// A refusal stays one where it could not be recorded: `on-error` must not start the container.
fn refusal(reason: &str, recorded: Result<()>) -> anyhow::Error {
    match recorded {
        Ok(()) => refused(reason),
        Err(error) => refused(format!("{reason}; it could not be recorded: {error:#}")),
    }
}

/// What came of following a container.
pub enum Followed {
    /// It is as it was asked for, or says why not.
    Kept {
        /// What happened since, for people.
        news: Vec<String>,
        /// Whether an address waits for its link or its way out.
        waits: bool,
        /// Whether a route that comes would make a difference.
        wants_routes: bool,
    },
    /// The ledger has another life of it by now, or none.
    Gone,
    /// A hook was killed while it worked on it: an apply or a release has to finish that.
    Interrupted,
}

/// The agent's part: brings the interfaces of a container back to what was asked for, as links and addresses are now.
/// Settings are not touched. `visit` is one to the namespace of the instance; in a hurry, no address waits for its way
/// out.
pub fn follow(
    instance: &Instance,
    mut visit: Visit,
    hurries: bool,
    context: &Context,
    ledger: &Ledger,
) -> Result<Followed> {
    if visit.id()? != instance.netns {
        return Ok(Followed::Gone);
    }
    let Some((kind, kernel)) = kernel::open(visit, context.deadline)? else { bail!(kernel::without_mptcp()) };
    let call = Apply {
        container: instance.container.clone(),
        place: Place::Inside(instance.pid),
        netns_path: instance.netns_path.clone(),
        // The record's, once its lock is held.
        request: Request::default(),
        notes: Vec::new(),
    };
    let pace = Some(Pace { hurries, ways_patience: WAYS_PATIENCE });
    Work { call, context, instance: instance.clone(), kernel, kind, follows: pace }.follow(ledger)
}

/// Opens the namespace. The pid comes with what tells its process from a later one of the same pid.
pub fn open(place: &Place) -> Result<(Visit, Option<(u32, Process)>)> {
    match place {
        Place::Process(pid) => {
            let (namespace, process) = instance::open_netns_of(*pid)?;
            Ok((Visit::to(namespace, Some(*pid))?, Some((*pid, process))))
        }
        Place::Inside(pid) => {
            let process = pid.and_then(|pid| Some((pid, Process::read(pid).ok()?)));
            Ok((Visit::already_inside()?, process))
        }
        Place::Path(path) => {
            let namespace = Namespace::open(path)
                .with_context(|| format!("cannot open the network namespace {}", path.display()))?;
            Ok((Visit::to(namespace, None)?, None))
        }
    }
}

/// One apply under way.
struct Work<'a> {
    call: Apply,
    context: &'a Context,
    instance: Instance,
    kernel: Box<dyn Kernel>,
    kind: kernel::Kind,
    /// The agent's part: it keeps to interfaces and takes no lock of a setting.
    follows: Option<Pace>,
}

/// How the agent follows.
#[derive(Clone, Copy)]
struct Pace {
    /// Whether no address waits any more.
    hurries: bool,
    /// How long it looks for ways out.
    ways_patience: Duration,
}

/// The container that is followed has ended in the middle of the work.
#[derive(Debug)]
struct Ended;

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the container's init has ended")
    }
}

impl std::error::Error for Ended {}

/// How far the steps have come.
#[derive(Default)]
struct Progress {
    begun: usize,
    finished: usize,
}

/// What was read before the plan was made.
struct Known {
    request: Request,
    /// The ledger's record of this container, of whichever life.
    record: Option<Record>,
    /// The same, if it speaks of this namespace.
    previous: Option<Record>,
    host: HostSide,
    /// When the one of the siblings was written that was written last.
    newest_sibling: u64,
    plan: Plan,
}

impl Known {
    /// What was in force before this work, and what hooks were about since then that were killed, each once.
    fn earlier(&self) -> (Option<Record>, Vec<Record>) {
        let mut versions: Vec<Record> = Vec::new();
        for version in self.record.iter().flat_map(Record::versions) {
            let mut version = Record { at_work: None, ..version.clone() };
            if self.previous.is_none() {
                // Of another namespace: only its claims on the host's values are there to be settled.
                version.interfaces.clear();
                version.leaving.clear();
                version.leaving_tables.clear();
                version.limits = None;
                version.settings.retain(|owned| owned.scope == Scope::Host);
            }
            versions.push(version);
        }
        let before = versions.pop();
        let mut killed: Vec<Record> = Vec::new();
        for version in versions {
            if !killed.iter().any(|newer| newer.owns_the_same(&version)) {
                killed.push(version);
            }
        }
        (before, killed)
    }
}

/// What the ledger has of the host-wide settings that are asked for.
#[derive(Default)]
struct HostSide {
    /// For the plan.
    settings: BTreeMap<SettingKey, HostSetting>,
    /// The pages as they were read.
    pages: BTreeMap<SettingKey, Setting>,
    /// The container's own present claims.
    own_claims: BTreeMap<SettingKey, Claim>,
}

impl Work<'_> {
    fn only_plan(mut self, ledger: Option<&Ledger>) -> Result<Done> {
        let known = self.plan(ledger, None)?;
        Ok(Done::Planned(Box::new(known.request), Box::new(known.plan)))
    }

    fn run(mut self, ledger: &Ledger) -> Result<Done> {
        let container = self.instance.container.key();
        // Which settings are the host's is known only once the kernel was read; their locks come before that.
        let mut keys = self.host_keys(ledger.record(&container)?.as_ref());
        let (known, locks) = loop {
            let locks = ledger.lock(&container, Some(&self.instance.netns), &keys, self.context.deadline)?;
            let known = match self.plan(Some(ledger), Some(&keys)) {
                Ok(known) => known,
                Err(error) => {
                    self.forget_locks(ledger, &locks, &keys);
                    return Err(error);
                }
            };
            let missing: Vec<SettingKey> = self.unlocked(&known, &keys);
            if missing.is_empty() {
                break (known, locks);
            }
            drop(locks);
            keys.extend(missing);
        };
        self.carry_out(ledger, &locks, &keys, known)
    }

    fn follow(mut self, ledger: &Ledger) -> Result<Followed> {
        let container = self.instance.container.key();
        let locks = ledger.lock(&container, Some(&self.instance.netns), &[], self.context.deadline)?;
        let Some(record) = ledger.record(&container)? else {
            self.forget_locks(ledger, &locks, &[]);
            return Ok(Followed::Gone);
        };
        if !record.instance.is_same_life(&self.instance) {
            ledger.discard_netns_lock(&locks, &self.instance.netns)?;
            return Ok(Followed::Gone);
        }
        if record.at_work.as_ref().is_some_and(|work| !work.follows) {
            return Ok(Followed::Interrupted);
        }
        self.call.request = record.request;
        let known = self.plan(Some(ledger), None)?;
        let before = known.record.clone();
        let done = match self.round(ledger, &[], &known, false) {
            // The release finishes what is half done.
            Err(error) if error.is::<Ended>() => return Ok(Followed::Gone),
            done => done?,
        };
        match done {
            Done::Applied(record, _) => {
                let waits = !known.plan.put_off.is_empty();
                let lacks_route = record.interfaces.iter().any(|interface| interface.route == RouteState::Missing);
                let learns = |interface| is_learnt(&self.context.policy, &record.request, interface);
                let learns = record.interfaces.iter().any(learns);
                let wants_routes = waits || lacks_route || learns;
                let mut news = news(before.as_ref(), &record);
                news.extend(known.plan.conflicts.into_iter().map(|conflict| conflict.reason));
                Ok(Followed::Kept { news, waits, wants_routes })
            }
            Done::Nothing(_) | Done::Planned(..) => Ok(Followed::Gone),
        }
    }

    /// The settings that may be the host's, before anything was read.
    fn host_keys(&self, record: Option<&Record>) -> Vec<SettingKey> {
        let may_be_host = |key: &&SettingKey| scope::may_be_host(key, self.kind);
        let asked = self.call.request.settings().into_keys().filter(may_be_host).cloned();
        let before = record.into_iter().flat_map(Record::host_claims).cloned();
        let mut keys: Vec<SettingKey> = asked.chain(before).collect();
        keys.sort();
        keys.dedup();
        keys
    }

    fn unlocked(&self, known: &Known, locked: &[SettingKey]) -> Vec<SettingKey> {
        let claimed = known.plan.claims.iter().map(|claim| &claim.key);
        let before = known.record.iter().flat_map(Record::host_claims);
        claimed.chain(before).filter(|key| !locked.contains(key)).cloned().collect()
    }

    /// Reads everything and makes the plan. With `locked` keys, what a killed hook left half done is finished first.
    fn plan(&mut self, ledger: Option<&Ledger>, locked: Option<&[SettingKey]>) -> Result<Known> {
        let container = self.instance.container.key();
        let record = match ledger {
            Some(ledger) => ledger.record(&container)?,
            None => None,
        };
        let same_life = record.as_ref().is_some_and(|record| record.instance.is_same_life(&self.instance));
        if let Some(record) =
            record.as_ref().filter(|record| !same_life && record.instance.is_alive(&self.instance.boot_id))
        {
            bail!(
                "the id {} belongs to another container that is alive (pid {})",
                record.instance.container.id,
                record.instance.pid.map_or("unknown".into(), |pid| pid.to_string())
            );
        }
        let request = match &record {
            Some(record) if same_life && self.follows.is_none() => {
                self.call.request.clone().on_top_of(&record.request)?
            }
            _ => self.call.request.clone(),
        };
        // The agent leaves the settings alone.
        let mut keys: Vec<SettingKey> = match self.follows {
            Some(_) => Vec::new(),
            None => request.settings().into_keys().cloned().collect(),
        };
        if self.follows.is_none() {
            // What an earlier apply of this container set and this one does not ask for goes back.
            let before = record.iter().flat_map(Record::versions).flat_map(|version| &version.settings);
            keys.extend(before.filter(|owned| owned.scope == Scope::Netns).map(|owned| owned.key.clone()));
            keys.sort();
            keys.dedup();
        }
        let mut facts = self.kernel.facts(&keys)?;
        if request.patterns().into_values().any(|(_, flags)| flags.is_off()) {
            facts.default_route_links = self.kernel.default_route_links()?;
        }
        let wants_routes = request.asked_routes().is_some_and(|(_, routes)| routes == Routes::Auto);
        if wants_routes || record.as_ref().is_some_and(Record::has_routing) {
            facts.routing = Some(self.kernel.routing()?);
        }
        if self.follows.is_some_and(|pace| !pace.hurries) || wants_routes {
            self.look_up_ways(&request, wants_routes, &mut facts)?;
        }
        if !facts.elsewhere.is_empty() {
            let names = facts.links.iter().filter(|link| facts.elsewhere.iter().any(|(_, index)| *index == link.index));
            let mut filters: Vec<SettingKey> = names.flat_map(|link| rp_filters(&link.name)).collect();
            filters.sort();
            filters.dedup();
            for (key, seen) in self.kernel.settings(&filters)? {
                facts.settings.entry(key).or_insert(seen);
            }
        }
        let (siblings, mut departed) = match ledger {
            Some(ledger) => ledger.others(&container, &self.instance.netns, &self.instance.boot_id)?,
            None => Default::default(),
        };
        let host = match ledger {
            Some(ledger) => self.host_side(ledger, locked, &request, &mut facts)?,
            None => HostSide::default(),
        };
        // An earlier life in this very namespace; without a cookie the inode may be another one's by now.
        let same_netns = record.as_ref().is_some_and(|record| record.instance.netns == self.instance.netns);
        let is_sure = same_life || same_netns && self.instance.netns.cookie.is_some();
        let previous = record.clone().filter(|_| is_sure);
        departed.extend(record.clone().filter(|_| same_netns && !is_sure));
        let plan = Plan::make(&Input {
            request: &request,
            policy: &self.context.policy,
            facts: &facts,
            container: &self.instance.container.id,
            previous: previous.as_ref(),
            siblings: &siblings,
            departed: &departed,
            host: &host.settings,
            time: ledger::now(),
            follows: self.follows.is_some(),
            hurries: self.follows.is_some_and(|pace| pace.hurries),
        })?;
        let newest_sibling = siblings.iter().map(|sibling| sibling.time).max().unwrap_or_default();
        Ok(Known { request, record, previous, host, newest_sibling, plan })
    }

    /// Looks for the ways out of the addresses that may get an endpoint, or have one and get a way out.
    fn look_up_ways(&mut self, request: &Request, wants_routes: bool, facts: &mut Facts) -> Result<()> {
        let deadline = match self.follows {
            // Others wait for the agent.
            Some(pace) => Deadline::after(pace.ways_patience),
            None => self.context.deadline,
        };
        let is_known = |ip| !wants_routes && facts.has_endpoint(ip);
        let addresses: Vec<_> = to_look_up(request, facts).into_iter().filter(|(ip, _)| !is_known(*ip)).collect();
        for (done, (ip, index)) in addresses.iter().enumerate() {
            if deadline.over() {
                bail!(
                    "the ways out of {} addresses could not be looked up in time ({done} were); ask for fewer interfaces",
                    addresses.len()
                );
            }
            facts.routes.insert((*ip, *index), self.kernel.route(*ip, *index)?);
            if wants_routes && self.kernel.leaves_elsewhere(*ip, *index)? {
                facts.elsewhere.insert((*ip, *index));
            }
        }
        Ok(())
    }

    /// Reads the ledger's pages on the host-wide settings of the request. What a killed hook or dead containers left
    /// behind is settled, if the setting's lock is held; `facts` are as the kernel is, or would be, after that.
    fn host_side(
        &mut self,
        ledger: &Ledger,
        locked: Option<&[SettingKey]>,
        request: &Request,
        facts: &mut Facts,
    ) -> Result<HostSide> {
        let container = self.instance.container.key();
        let is_locked = |key: &SettingKey| locked.is_some_and(|locked| locked.contains(key));
        let mut side = HostSide::default();
        let mut left_behind = Vec::new();
        for (key, (wish, wanted)) in request.settings() {
            let Some(seen) = facts.settings.get(key) else { continue };
            if scope::of(key, facts.kind, &facts.release, seen) != Ok(Scope::Host) {
                continue;
            }
            let page = ledger.setting(key);
            let actual = seen.host.value();
            if let Some(actual) = actual.filter(|_| is_locked(key)) {
                page.recover(actual)?;
            }
            // Who else relies on it matters only where it has to change: a shared start reads one small file.
            let equal = actual.is_some_and(|actual| setting::same(key, actual, wanted));
            let own = page.claim_of(&container)?;
            // A value that is there only because of an earlier life, and that this one may not ask for, is on its way out.
            let is_leaving = own.as_ref().is_some_and(|own| !own.instance.is_same_life(&self.instance))
                && self.context.policy.allows_setting(&wish.source, key, wanted, Scope::Host).is_err();
            let as_wanted = equal && !is_leaving;
            let Some(mut setting) = (if as_wanted { page.read_value()? } else { page.read()? }) else { continue };
            if as_wanted && actual.is_some_and(|actual| !setting.is(actual)) {
                // It is as wanted by somebody else's change, which concerns whoever relies on ours.
                setting = page.read()?.unwrap_or(setting);
            }
            side.own_claims.extend(own.map(|claim| (key.clone(), claim)));
            if let Some(back) = setting.left_behind(&self.instance.boot_id).filter(|_| !as_wanted) {
                left_behind.push((key.clone(), back.to_string()));
            }
            side.settings.insert(key.clone(), self.host_setting(&setting));
            side.pages.insert(key.clone(), setting);
        }
        // What dead containers left behind holds nobody from the moment that anybody looks.
        for (key, back) in left_behind {
            if is_locked(&key) {
                let keys = std::slice::from_ref(&key);
                let drifted = release::give_up_claims(ledger, self.kernel.as_mut(), &self.instance, keys, Whose::Dead)?;
                ledger.record_conflicts(&drifted)?;
                facts.settings.extend(self.kernel.settings(keys)?);
                side.settings.remove(&key);
                side.pages.remove(&key);
                if let Some(setting) = ledger.setting(&key).read()? {
                    side.settings.insert(key.clone(), self.host_setting(&setting));
                    side.pages.insert(key, setting);
                }
            } else if let Some(seen) = facts.settings.get_mut(&key) {
                if let Some(page) = side.settings.get_mut(&key) {
                    page.value.clone_from(&back);
                }
                seen.host = Seen::Writable(back);
            }
        }
        Ok(side)
    }

    fn host_setting(&self, setting: &Setting) -> HostSetting {
        let own = self.instance.container.key();
        let (live, dead): (Vec<&Claim>, Vec<&Claim>) = setting
            .claims
            .iter()
            .filter(|claim| claim.instance.container.key() != own)
            .partition(|claim| claim.instance.is_alive(&self.instance.boot_id));
        HostSetting {
            original: setting.original.clone(),
            value: setting.value.clone(),
            claims: live
                .into_iter()
                .map(|claim| Holder {
                    container: claim.instance.container.key(),
                    id: claim.instance.container.id.clone(),
                    value: claim.value.clone(),
                })
                .collect(),
            dead: dead.into_iter().map(|claim| claim.instance.container.key()).collect(),
        }
    }

    /// Removes the locks' files of a container that the ledger does not get to know. They are only names: if they
    /// cannot be removed, they lie there.
    fn forget_locks(&self, ledger: &Ledger, locks: &Locks, keys: &[SettingKey]) {
        let container = self.instance.container.key();
        let _ = ledger.discard_setting_locks(locks, keys);
        if !ledger.has_record(&container) {
            let _ = ledger.discard_locks(locks, &container, &self.instance.netns);
        }
    }

    /// The record as it will be.
    fn record(&self, known: &Known, at_work: Option<Writer>) -> Record {
        let mut warnings = self.call.notes.clone();
        warnings.extend(known.plan.warnings.iter().cloned());
        let lasting_warnings = self.call.notes.len() + known.plan.lasting_warnings;
        Record {
            version: VERSION,
            name: known.request.name().unwrap_or(&self.instance.container.id).into(),
            runtime: self.instance.container.door.name().into(),
            kernel: self.kind,
            instance: self.instance.clone(),
            request: known.request.clone(),
            leaving: if at_work.is_some() { known.plan.leaving.clone() } else { Vec::new() },
            leaving_tables: if at_work.is_some() { known.plan.leaving_tables.clone() } else { BTreeSet::new() },
            at_work,
            interfaces: known.plan.interfaces.clone(),
            limits: known.plan.limits,
            settings: known.plan.settings.clone(),
            warnings,
            lasting_warnings,
            unsettled: known.plan.unsettled,
            time: ledger::nanoseconds_after(known.newest_sibling),
        }
    }

    fn carry_out(mut self, ledger: &Ledger, locks: &Locks, keys: &[SettingKey], known: Known) -> Result<Done> {
        let done = self.round(ledger, keys, &known, false);
        if done.is_err() {
            self.forget_locks(ledger, locks, keys);
        }
        done
    }

    /// Carries a plan out or undoes it. Module parameters that come with its path manager take a second round, and so
    /// does a strict `rp_filter`, which is looked at with the rules in place.
    fn round(&mut self, ledger: &Ledger, keys: &[SettingKey], known: &Known, is_last: bool) -> Result<Done> {
        if let Some(reason) = known.plan.refusal() {
            return Err(refusal(&reason, ledger.record_conflicts(&known.plan.conflicts)));
        }
        if known.plan.steps.is_empty() {
            // Perhaps there is nothing to do at all: the same start twice.
            let mut same = self.record(known, None);
            self.complete(&mut same)?;
            // A release that was killed may have struck claims and left the record; or somebody else has written the value.
            let claims_stand = known.plan.claims.iter().all(|claim| {
                let own = known.host.own_claims.get(&claim.key);
                !claim.is_foreign && own.is_some_and(|own| setting::same(&claim.key, &own.value, &claim.value))
            });
            if claims_stand && known.record.as_ref().is_some_and(|record| record.says_the_same(&same)) {
                return Ok(Done::Applied(Box::new(same), false));
            }
        }
        let (pid, process) = Process::own()?;
        let (before, killed) = known.earlier();
        let follows = self.follows.is_some();
        let at_work = Writer { pid, start_time: process.start_time, follows, before: before.map(Box::new), killed };
        let mut progress = Progress::default();
        let done = self.work(ledger, known, at_work, &mut progress).and_then(|record| {
            let changed = !known.plan.steps.is_empty();
            if known.plan.deferred.is_empty() && (is_last || !known.plan.looks_again) {
                return Ok(Done::Applied(Box::new(record), changed));
            }
            let second = self.plan(Some(ledger), Some(keys))?;
            Ok(match self.round(ledger, keys, &second, true)? {
                Done::Applied(record, _) => Done::Applied(record, changed),
                other => other,
            })
        });
        done.map_err(|error| if error.is::<Ended>() { error } else { self.undo(ledger, known, &progress, error) })
    }

    /// Announces, does, reads back, writes down.
    fn work(&mut self, ledger: &Ledger, known: &Known, at_work: Writer, progress: &mut Progress) -> Result<Record> {
        let plan = &known.plan;
        ledger.write_record(&self.record(known, Some(at_work)))?;
        for claim in &plan.claims {
            if let Some(written) = &claim.written {
                let newest = known.host.pages.get(&claim.key).map_or(0, Setting::newest);
                let overtook = claim.is_foreign.then_some(newest);
                let page = ledger.setting(&claim.key);
                page.intend(&self.instance, &claim.key, &written.before, &claim.value, overtook)?;
            }
        }
        // Before the kernel is changed: whoever finishes it after a kill sees no conflict any more.
        ledger.record_conflicts(&plan.conflicts)?;
        for step in &plan.steps {
            // A deletion takes some 15 ms each, in a namespace that is kept by nothing but our being there.
            if self.follows.is_some() && !self.instance.is_alive(&self.instance.boot_id) {
                return Err(Ended.into());
            }
            progress.begun += 1;
            self.kernel.perform(&step.change).with_context(|| format!("asked for by {}", step.why))?;
            progress.finished += 1;
        }
        let changes: Vec<&Change> = plan.steps.iter().map(|step| &step.change).collect();
        self.kernel.confirm(&changes)?;
        let mut record = self.record(known, None);
        self.complete(&mut record)?;
        for claim in &plan.claims {
            let page = ledger.setting(&claim.key);
            page.enter(claim, &self.instance)?;
        }
        // Before the record forgets it.
        if let Err(error) = self.forget_earlier_life(ledger, known) {
            record.warnings.push(format!("what an earlier life of this container held is left: {error:#}"));
            // It stays on record, so that the next apply or the release tries again.
            record.settings.extend(self.still_claimed(ledger, known)?);
        }
        ledger.write_record(&record)?;
        Ok(record)
    }

    /// The kernel's ids of our endpoints and the routes of their packets.
    fn complete(&mut self, record: &mut Record) -> Result<()> {
        if record.interfaces.iter().all(|interface| interface.endpoints.is_empty()) {
            return Ok(());
        }
        let endpoints = self.kernel.endpoints()?;
        for interface in &mut record.interfaces {
            let mut routes = Vec::new();
            for owned in &mut interface.endpoints {
                if let Some(found) = endpoints.iter().find(|e| e.address == owned.address && e.port.is_none()) {
                    owned.id = found.id;
                }
                let route = self.kernel.route(owned.address, owned.index)?;
                if route == RouteState::Missing {
                    record.warnings.push(format!(
                        "{}: no route out for packets from {}; subflows there will hang (--routes auto gives {0} one, or add a default route by {0} with a higher metric, or ip rule from {1})",
                        interface.name, owned.address
                    ));
                }
                routes.push(route);
            }
            interface.route = RouteState::worst(&routes);
        }
        Ok(())
    }

    /// Undoes what was performed, in reverse, and puts the ledger back.
    fn undo(&mut self, ledger: &Ledger, known: &Known, progress: &Progress, error: anyhow::Error) -> anyhow::Error {
        let mut failures = Vec::new();
        let mut reverses = Vec::new();
        for (number, step) in known.plan.steps.iter().enumerate().take(progress.begun).rev() {
            let Some(reverse) = &step.undo else { continue };
            let failed_itself = number >= progress.finished;
            if failed_itself && matches!(step.change, Change::AddEndpoint(_)) {
                // Refused as a whole; what is there under that address is somebody else's.
                continue;
            }
            reverses.push(reverse);
            if let Err(failure) = self.kernel.perform(reverse) {
                failures.push(format!("cannot {reverse}: {failure:#}"));
            }
        }
        // What counts is how it is now: a change that had no effect cannot be reversed and need not be.
        match self.kernel.confirm(&reverses) {
            Ok(()) => failures.clear(),
            Err(failure) => failures.push(format!("{failure:#}")),
        }
        let settle = || -> Result<()> {
            for claim in &known.plan.claims {
                let page = ledger.setting(&claim.key);
                let (before, own) = (known.host.pages.get(&claim.key), known.host.own_claims.get(&claim.key));
                page.leave_as_before(&self.instance, before, own)?;
            }
            match &known.record {
                Some(record) => {
                    if record.instance.netns != self.instance.netns {
                        ledger.leave_namespace(&self.instance.container.key(), &self.instance.netns)?;
                    }
                    ledger.write_record(record)
                }
                None => ledger.remove_record(&self.record(known, None)),
            }
        };
        if failures.is_empty() {
            // If the ledger cannot be put back, its record stays `interrupted` and the next release finishes it.
            if let Err(failure) = settle() {
                failures.push(format!("{failure:#}"));
            }
        }
        if failures.is_empty() {
            let message = format!("{error:#}; nothing was changed");
            match exit_status(&error) {
                3 => refused(message),
                2 => usage(message),
                _ => anyhow!(message),
            }
        } else {
            anyhow!("{error:#}; undoing it failed as well: {}; run mptcp-hook release", failures.join("; "))
        }
    }

    /// What is recorded of an earlier life and could not be given up.
    fn still_claimed(&self, ledger: &Ledger, known: &Known) -> Result<Vec<OwnedSetting>> {
        let container = self.instance.container.key();
        let earlier = known.record.iter().flat_map(Record::versions).flat_map(|version| &version.settings);
        let mut left: Vec<OwnedSetting> = Vec::new();
        for owned in earlier.filter(|owned| owned.scope == Scope::Host && owned.claimed) {
            let is_known = known.plan.claims.iter().map(|claim| &claim.key).chain(left.iter().map(|own| &own.key));
            if is_known.into_iter().any(|key| *key == owned.key) {
                continue;
            }
            let page = ledger.setting(&owned.key);
            // A hook that was killed early has left a value without any claim.
            let is_nobodys = || page.read().map(|setting| setting.is_some_and(|setting| setting.claims.is_empty()));
            if page.claim_of(&container)?.is_some() || is_nobodys()? {
                left.push(owned.clone());
            }
        }
        Ok(left)
    }

    /// The claims of an earlier life that this one does not have any more.
    fn forget_earlier_life(&mut self, ledger: &Ledger, known: &Known) -> Result<()> {
        let Some(record) = known.record.as_ref().filter(|_| self.follows.is_none()) else { return Ok(()) };
        let kept: Vec<&SettingKey> = known.plan.claims.iter().map(|claim| &claim.key).collect();
        let gone: Vec<SettingKey> = record.host_claims().filter(|key| !kept.contains(key)).cloned().collect();
        let kernel = self.kernel.as_mut();
        let drifted = release::give_up_claims(ledger, kernel, &self.instance, &gone, Whose::OwnAndDead)?;
        ledger.record_conflicts(&drifted)?;
        let netns: &NetnsId = &record.instance.netns;
        if *netns != self.instance.netns {
            ledger.leave_namespace(&self.instance.container.key(), netns)?;
        }

        Ok(())
    }
}

/// What the record has of its interfaces and limits that was not there before: `eth1: 10.0.2.7 came (applied)`.
fn news(before: Option<&Record>, now: &Record) -> Vec<String> {
    let last = |record: &Record, name: &str| {
        record.interfaces.iter().find(|interface| interface.name == name).and_then(|interface| interface.last.clone())
    };
    let is_new = |name: &str| last(now, name) != before.and_then(|before| last(before, name));
    let changed = now.interfaces.iter().filter(|interface| is_new(&interface.name));
    let interfaces = changed.filter_map(|interface| {
        let what = &interface.last.as_ref()?.what;
        Some(format!("{}: {what} ({})", interface.name, interface.state.name()))
    });
    let corrected = |record: &Record| record.limits.and_then(|limits| limits.corrected);
    let put_back = now.limits.filter(|_| corrected(now).is_some() && corrected(now) != before.and_then(corrected));
    let limits =
        put_back.map(|limits| format!("the limits were put back to {} after somebody changed them", limits.set));
    interfaces.chain(limits).collect()
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "properties.rs"]
mod properties;
