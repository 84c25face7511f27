//! The verb `status`: the ledger, held against what is alive and what the kernel says now. Takes no lock, changes nothing.

use std::cell::LazyCell;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;

use crate::agent::start::{self, Starter};
use crate::context::Context;
use crate::deadline::Deadline;
use crate::error::{shown, usage};
use crate::front::command::{self, Purpose};
use crate::instance::{self, Instance, Process};
use crate::kernel::netns::{Namespace, Visit, in_initial_user_namespace};
use crate::kernel::{self, Facts, Kernel, Kind, RouteState, Routing, TableRoute, sysctl};
use crate::ledger::record::{Conflict, Failure, Outcome, OwnedRouting, OwnedSetting, Record, State, Writer};
use crate::ledger::{History, Ledger, parallel};
use crate::request::setting::{self, SettingKey};

/// To look at more processes than this, one by one, takes longer than to list those that there are.
const LISTING: usize = 100;

/// What is said of what a hook was killed at.
pub const INTERRUPTED: &str = "a hook was killed while it worked; apply or release finishes it";

/// Everything that there is to show.
pub struct Status {
    /// Which MPTCP the kernel has.
    pub kernel: Kind,
    /// The containers that the ledger knows.
    pub containers: Vec<Container>,
    /// The host-wide settings that they rely on.
    pub settings: Vec<HostSetting>,
    /// Who was refused, warned or overridden, and why.
    pub conflicts: Vec<Conflict>,
    /// How many older ones were dropped from the history.
    pub conflicts_dropped: usize,
    /// Hooks that failed.
    pub failures: Vec<Failure>,
    /// How many older ones were dropped from the history.
    pub failures_dropped: usize,
    /// What could not be read.
    pub problems: Vec<String>,
    /// Whether the ledger is one user's, who cannot protect host-wide values.
    pub rootless: bool,
}

impl Status {
    /// That of an empty ledger.
    pub fn of_nobody(kernel: Kind, rootless: bool) -> Self {
        Self {
            kernel,
            containers: Vec::new(),
            settings: Vec::new(),
            conflicts: Vec::new(),
            conflicts_dropped: 0,
            failures: Vec::new(),
            failures_dropped: 0,
            problems: Vec::new(),
            rootless,
        }
    }
}

/// A container, as it is now.
pub struct Container {
    /// The ledger's record, brought up to date.
    pub record: Box<Record>,
    /// Whether it is alive.
    pub live: bool,
    /// Whether a hook was killed while it worked for it.
    pub interrupted: bool,
    /// Whether the agent follows it.
    pub followed: bool,
    /// Why not, if it should be.
    pub not_followed: Option<String>,
    /// The settings of its namespace that somebody has changed, with their values now.
    pub drifted: Vec<(SettingKey, String)>,
}

impl Container {
    /// What somebody has set a setting of its namespace to.
    pub fn drifted(&self, key: &SettingKey) -> Option<&str> {
        self.drifted.iter().find(|(drifted, _)| drifted == key).map(|(_, value)| value.as_str())
    }
}

/// A host-wide setting, as it is now.
pub struct HostSetting {
    /// Which.
    pub key: SettingKey,
    /// The value that we wrote last or relied on.
    pub value: String,
    /// The value before the first of ours.
    pub original: String,
    /// The value now.
    pub present: Option<String>,
    /// Whether somebody else has changed it.
    pub drifted: bool,
    /// Whether a hook was killed while it wrote.
    pub interrupted: bool,
    /// Who relies on it.
    pub claims: Vec<Claim>,
}

/// A container's claim.
pub struct Claim {
    /// The container's id.
    pub container: String,
    /// The value that it relies on.
    pub value: String,
}

/// Reads it all. With a name, only what concerns that container.
pub fn status(context: &Context, name: Option<&str>) -> Result<Status> {
    let rootless = !in_initial_user_namespace() || !nix::unistd::geteuid().is_root();
    let mut status = Status::of_nobody(Kind::detect(), rootless);
    let Some(ledger) = Ledger::open(&context.state_dir)? else {
        return match name {
            Some(name) => Err(usage(format!("the ledger knows no container \"{}\": it is empty", shown(name)))),
            None => Ok(status),
        };
    };
    let boot_id = instance::boot_id()?;
    let (mut records, errors) = ledger.records_to_show().unwrap_or_else(|error| (Vec::new(), vec![error]));
    status.problems.extend(errors.iter().map(|error| format!("{error:#}")));
    let (settings, errors) = ledger.settings().unwrap_or_else(|error| (Vec::new(), vec![error]));
    status.problems.extend(errors.iter().map(|error| format!("{error:#}")));
    let claims = settings.iter().flat_map(|setting| &setting.claims).map(|claim| &claim.instance);
    let living = Living::look(&boot_id, records.iter().map(|record| &record.instance).chain(claims));
    let mut overridden: HashMap<String, Vec<SettingKey>> = HashMap::new();
    for setting in settings {
        let present = sysctl::look(&setting.key).value().map(String::from);
        for claim in setting.claims.iter().filter(|claim| claim.overridden) {
            overridden.entry(claim.instance.container.key()).or_default().push(setting.key.clone());
        }
        status.settings.push(HostSetting {
            drifted: setting.intent.is_none() && present.as_deref().is_some_and(|present| !setting.is(present)),
            interrupted: setting.intent.is_some(),
            claims: setting
                .claims
                .into_iter()
                .filter(|claim| living.has(&claim.instance))
                .map(|claim| Claim { container: claim.instance.container.id, value: claim.value })
                .collect(),
            key: setting.key,
            value: setting.value,
            original: setting.original,
            present,
        });
    }
    for record in records.iter_mut().filter(|_| !overridden.is_empty()) {
        if let Some(keys) = overridden.get(&record.instance.container.key()) {
            for owned in record.settings.iter_mut().filter(|owned| keys.contains(&owned.key)) {
                owned.outcome = Outcome::Overridden;
            }
        }
    }
    let followed = ledger.followers()?;
    let starter = LazyCell::new(|| Starter::of(ledger.directory()));
    let containers = records.into_iter().map(|record| {
        let live = living.has(&record.instance);
        let followed = live && !followed.is_empty() && followed.contains(&record.instance.container.key());
        let should_be = live && !followed && record.needs_agent();
        Container {
            live,
            interrupted: record.at_work.as_ref().is_some_and(|writer| !is_working(writer)),
            followed,
            not_followed: should_be.then(|| start::why_not(&ledger, &record, &starter)),
            drifted: Vec::new(),
            record,
        }
    });
    let (containers, problems) = bring_up_to_date(containers.collect(), context);
    status.containers = containers;
    status.problems.extend(problems);
    match ledger.oddities_at_a_glance() {
        Ok(odd) => status.problems.extend(odd.iter().map(|odd| format!("{odd}; run mptcp-hook repair"))),
        Err(error) => status.problems.push(format!("{error:#}")),
    }
    match ledger.conflicts() {
        Ok(History { items, dropped }) => (status.conflicts, status.conflicts_dropped) = (items, dropped),
        Err(error) => status.problems.push(format!("{error:#}")),
    }
    match ledger.failures() {
        Ok(History { items, dropped }) => (status.failures, status.failures_dropped) = (items, dropped),
        Err(error) => status.problems.push(format!("{error:#}")),
    }
    if let Some(name) = name {
        only(&mut status, &ledger, name)?;
    }
    Ok(status)
}

/// Leaves what concerns one container.
fn only(status: &mut Status, ledger: &Ledger, name: &str) -> Result<()> {
    let found = command::find(Some(ledger), name, Purpose::Look)?;
    let id = found.instance.container.id.clone();
    status.containers.retain(|container| container.record.instance.container == found.instance.container);
    status.settings.retain(|setting| setting.claims.iter().any(|claim| claim.container == id));
    status.conflicts.retain(|conflict| conflict.container == id || conflict.holders.contains(&id));
    status.failures.retain(|failure| failure.container == id);
    Ok(())
}

/// Who is alive. Each is looked at once: a container stands in the ledger once more for each of its claims.
struct Living<'a> {
    boot_id: &'a str,
    alive: HashMap<Life, bool>,
}

/// What decides whether an instance of this boot is alive.
#[derive(PartialEq, Eq, Hash)]
struct Life {
    pid: Option<u32>,
    start_time: Option<u64>,
    netns: u64,
    netns_path: Option<String>,
}

impl Life {
    fn of(instance: &Instance) -> Self {
        // The path counts only where there is no process.
        let netns_path = if instance.pid.is_some() { None } else { instance.netns_path.clone() };
        Self { pid: instance.pid, start_time: instance.start_time, netns: instance.netns.inode, netns_path }
    }
}

impl<'a> Living<'a> {
    fn look<'i>(boot_id: &'a str, instances: impl Iterator<Item = &'i Instance>) -> Self {
        let of_this_boot = instances.filter(|instance| instance.boot_id == boot_id);
        let lives: HashMap<Life, &Instance> = of_this_boot.map(|instance| (Life::of(instance), instance)).collect();
        let exists = if lives.len() > LISTING { instance::processes() } else { None };
        let look = |(life, instance): (Life, &Instance)| {
            let may_live = match (life.pid, &exists) {
                (Some(pid), Some(exists)) => exists.contains(&pid),
                _ => true,
            };
            (life, may_live && instance.is_alive(boot_id))
        };
        Self { boot_id, alive: parallel::map(lives.into_iter().collect(), look).into_iter().collect() }
    }

    fn has(&self, instance: &Instance) -> bool {
        instance.boot_id == self.boot_id && self.alive.get(&Life::of(instance)).is_some_and(|alive| *alive)
    }
}

fn is_working(writer: &Writer) -> bool {
    Process::lives(writer.pid, writer.start_time)
}

/// Holds the containers that are alive against their namespaces: endpoints that are gone or changed, routes that came or
/// went. Each namespace is visited once. Also gives what went wrong.
fn bring_up_to_date(mut containers: Vec<Container>, context: &Context) -> (Vec<Container>, Vec<String>) {
    for container in containers.iter_mut().filter(|container| container.live && container.interrupted) {
        for interface in &mut container.record.interfaces {
            interface.state = State::Interrupted;
            interface.reason = Some(INTERRUPTED.into());
        }
    }
    if !nix::unistd::geteuid().is_root() {
        return (containers, Vec::new());
    }
    let mut namespaces: BTreeMap<u64, Vec<&mut Container>> = BTreeMap::new();
    for container in containers.iter_mut().filter(|container| container.live) {
        let record = &container.record;
        // As long as a hook is at work, nothing is as the record says.
        if record.at_work.is_none() && !(record.interfaces.is_empty() && record.netns_claims().next().is_none()) {
            namespaces.entry(record.instance.netns.inode).or_default().push(container);
        }
    }
    let problems = parallel::map(namespaces.into_values().collect(), |mut sharing| visit(&mut sharing, context));
    let problems = problems.into_iter().flatten().collect();
    (containers, problems)
}

/// Looks into the one namespace of these containers.
fn visit(containers: &mut [&mut Container], context: &Context) -> Vec<String> {
    let visit = containers.iter().map(|container| &container.record).find_map(|record| {
        record.instance.netns_places().iter().find_map(|place| {
            let namespace = Namespace::open(Path::new(place)).ok()?;
            let is_it = namespace.inode() == record.instance.netns.inode;
            is_it.then(|| Visit::to(namespace, record.instance.pid).ok())?
        })
    });
    let Some(visit) = visit else { return Vec::new() };
    let keys = containers.iter().flat_map(|container| container.record.netns_claims()).map(|own| &own.key);
    let keys: Vec<SettingKey> = keys.collect::<BTreeSet<_>>().into_iter().cloned().collect();
    // For each one: there may be thousands.
    let opened = kernel::open(visit, Deadline::after(context.policy.deadline)).and_then(|kernel| {
        let Some((_, mut kernel)) = kernel else { return Ok(None) };
        let mut facts = kernel.facts(&keys)?;
        if containers.iter().any(|container| container.record.has_routing()) {
            facts.routing = Some(kernel.routing()?);
        }
        Ok(Some((facts, kernel)))
    });
    let problem = |record: &Record, error: &anyhow::Error| format!("{}: {error:#}", record.name);
    match opened {
        Ok(None) => Vec::new(),
        Ok(Some((facts, mut kernel))) => {
            let mut routes = HashMap::new();
            let compare = |container: &mut &mut Container| {
                let record = &mut container.record;
                let now = |own: &OwnedSetting| {
                    let value = facts.settings.get(&own.key)?.target.value()?;
                    (!setting::same(&own.key, value, &own.value)).then(|| (own.key.clone(), value.to_string()))
                };
                container.drifted = record.netns_claims().filter_map(now).collect();
                compare(record, &facts, kernel.as_mut(), &mut routes).err().map(|error| problem(record, &error))
            };
            containers.iter_mut().filter_map(compare).collect()
        }
        Err(error) => containers.iter().map(|container| problem(&container.record, &error)).collect(),
    }
}

/// What is gone of an interface's way out. Its routes may lead by another gateway meanwhile.
fn missing_way(now: &Routing, owned: &OwnedRouting, name: &str) -> Option<String> {
    let rule = owned.rules.iter().find(|rule| !now.rules.contains(rule));
    let is_there = |own: &&TableRoute| {
        let same = |route: &&TableRoute| {
            (route.table, route.destination, route.prefix, route.ifindex)
                == (own.table, own.destination, own.prefix, own.ifindex)
        };
        now.routes.iter().any(|route| same(&route))
    };
    let route = owned.routes.iter().find(|route| !is_there(route));
    rule.map(|rule| format!("the {rule} is gone"))
        .or_else(|| route.map(|route| format!("the route {} is gone", route.by(name))))
}

/// What is known of the ways out, by address and interface.
type Routes = HashMap<(IpAddr, u32), RouteState>;

fn compare(record: &mut Record, facts: &Facts, kernel: &mut dyn Kernel, known: &mut Routes) -> Result<()> {
    for interface in &mut record.interfaces {
        let mut routes = Vec::new();
        let mut drift = None;
        for owned in &interface.endpoints {
            let place = (owned.address, owned.index);
            let route = match known.entry(place) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(unknown) => *unknown.insert(kernel.route(owned.address, owned.index)?),
            };
            routes.push(route);
            match facts.endpoint(owned.address) {
                None => drift = Some(format!("the endpoint {} is gone", owned.address)),
                Some(now) if now.flags != owned.flags => {
                    let names = crate::request::flags::EndpointFlags(now.flags).names().join(",");
                    drift = Some(format!("the endpoint {} is {names} now", owned.address));
                }
                Some(_) => {}
            }
            if !facts.addresses.iter().any(|a| a.ip == owned.address && a.ifindex == owned.index) {
                drift = Some(format!("the address {} is not on the interface any more", owned.address));
            }
        }
        if let Some(link) = &interface.link {
            let now = facts.link_at(link.index).map(|l| l.flags & link.mask);
            if now != Some(link.bits) {
                drift = Some("the interface's flags were changed, or it is gone".into());
            }
        }
        // While it is pending its way out need not be whole.
        let is_applied = interface.state == State::Applied;
        if let (Some(now), Some(owned)) = (&facts.routing, interface.routing.as_ref().filter(|_| is_applied)) {
            drift = missing_way(now, owned, &interface.name).or(drift);
        }
        if let Some(reason) = drift {
            interface.state = State::Drifted;
            interface.reason = Some(reason);
        }
        if !routes.is_empty() {
            interface.route = RouteState::worst(&routes);
        }
    }
    // The route is shown as it is now; what was said about it then may be mended.
    let all_ok = record.interfaces.iter().all(|interface| interface.route != RouteState::Missing);
    record.warnings.retain(|warning| !(all_ok && warning.contains("no route out")));
    Ok(())
}
