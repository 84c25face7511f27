//! The verb `status`: the ledger, held against what is alive and what the kernel says now. Takes no lock, changes nothing.

use anyhow::Result;

use crate::context::Context;
use crate::error::{shown, usage};
use crate::instance::{self, Process};
use crate::kernel::netns::{Visit, in_initial_user_namespace};
use crate::kernel::{self, Facts, Kernel, Kind, RouteState, sysctl};
use crate::ledger::Ledger;
use crate::ledger::record::{Conflict, Failure, Outcome, Record, State};
use crate::request::setting::SettingKey;

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
    /// Hooks that failed.
    pub failures: Vec<Failure>,
    /// What could not be read.
    pub problems: Vec<String>,
    /// Whether the ledger is one user's, who cannot protect host-wide values.
    pub rootless: bool,
}

/// A container, as it is now.
pub struct Container {
    /// The ledger's record, brought up to date.
    pub record: Record,
    /// Whether it is alive.
    pub live: bool,
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
    let mut status = Status {
        kernel: Kind::detect(),
        containers: Vec::new(),
        settings: Vec::new(),
        conflicts: Vec::new(),
        failures: Vec::new(),
        problems: Vec::new(),
        rootless: !in_initial_user_namespace() || !nix::unistd::geteuid().is_root(),
    };
    let Some(ledger) = Ledger::open(&context.state_dir)? else {
        return match name {
            Some(name) => Err(usage(format!("the ledger knows no container \"{}\": it is empty", shown(name)))),
            None => Ok(status),
        };
    };
    let boot_id = instance::boot_id()?;
    let mut overridden = Vec::new();
    let (settings, errors) = ledger.settings().unwrap_or_else(|error| (Vec::new(), vec![error]));
    status.problems.extend(errors.iter().map(|error| format!("{error:#}")));
    for setting in settings {
        let present = sysctl::look(&setting.key).value().map(String::from);
        for claim in setting.claims.iter().filter(|claim| claim.overridden) {
            overridden.push((claim.instance.container.key(), setting.key.clone()));
        }
        status.settings.push(HostSetting {
            drifted: setting.intent.is_none() && present.as_deref().is_some_and(|present| !setting.is(present)),
            interrupted: setting.intent.is_some(),
            claims: setting
                .claims
                .iter()
                .filter(|claim| claim.instance.is_alive(&boot_id))
                .map(|claim| Claim { container: claim.instance.container.id.clone(), value: claim.value.clone() })
                .collect(),
            key: setting.key,
            value: setting.value,
            original: setting.original,
            present,
        });
    }
    for record in ledger.records().unwrap_or_else(|error| vec![Err(error)]) {
        match record {
            Ok(mut record) => {
                let live = record.instance.is_alive(&boot_id);
                if live {
                    if let Err(error) = bring_up_to_date(&mut record, context) {
                        status.problems.push(format!("{}: {error:#}", record.name));
                    }
                }
                let key = record.instance.container.key();
                for owned in &mut record.settings {
                    if overridden.iter().any(|(container, setting)| *container == key && *setting == owned.key) {
                        owned.outcome = Outcome::Overridden;
                    }
                }
                status.containers.push(Container { record, live });
            }
            Err(error) => status.problems.push(format!("{error:#}")),
        }
    }
    match ledger.oddities() {
        Ok(odd) => status.problems.extend(odd.iter().map(|odd| format!("{odd}; run mptcp-hook repair"))),
        Err(error) => status.problems.push(format!("{error:#}")),
    }
    match ledger.conflicts() {
        Ok(conflicts) => status.conflicts = conflicts,
        Err(error) => status.problems.push(format!("{error:#}")),
    }
    match ledger.failures() {
        Ok(failures) => status.failures = failures,
        Err(error) => status.problems.push(format!("{error:#}")),
    }
    if let Some(name) = name {
        only(&mut status, &ledger, name)?;
    }
    Ok(status)
}

/// Leaves what concerns one container.
fn only(status: &mut Status, ledger: &Ledger, name: &str) -> Result<()> {
    let found = crate::front::command::find(Some(ledger), name)?;
    let id = found.instance.container.id.clone();
    status.containers.retain(|container| container.record.instance.container == found.instance.container);
    status.settings.retain(|setting| setting.claims.iter().any(|claim| claim.container == id));
    status.conflicts.retain(|conflict| conflict.container == id || conflict.holders.contains(&id));
    status.failures.retain(|failure| failure.container == id);
    Ok(())
}

/// Looks into the container's namespace: endpoints that are gone or changed, routes that came or went.
fn bring_up_to_date(record: &mut Record, context: &Context) -> Result<()> {
    if let Some(writer) = &record.at_work {
        let working = Process::read(writer.pid).is_ok_and(|p| p.alive && p.start_time == writer.start_time);
        if !working {
            for interface in &mut record.interfaces {
                interface.state = State::Interrupted;
                interface.reason = Some("a hook was killed while it worked; apply or release finishes it".into());
            }
        }
        return Ok(());
    }
    if record.interfaces.is_empty() || !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let pid = record.instance.pid;
    let Some(visit) = record.instance.netns_places().iter().find_map(|place| {
        let namespace = kernel::netns::Namespace::open(std::path::Path::new(place)).ok()?;
        (namespace.inode() == record.instance.netns.inode).then(|| Visit::to(namespace, pid).ok())?
    }) else {
        return Ok(());
    };
    let Some((_, mut kernel)) = kernel::open(visit, context.deadline)? else { return Ok(()) };
    let facts = kernel.facts(&[])?;
    compare(record, &facts, kernel.as_mut())
}

fn compare(record: &mut Record, facts: &Facts, kernel: &mut dyn Kernel) -> Result<()> {
    for interface in &mut record.interfaces {
        let mut routes = Vec::new();
        let mut drift = None;
        for owned in &interface.endpoints {
            routes.push(kernel.route(owned.address, owned.index)?);
            match facts.endpoints.iter().find(|e| e.address == owned.address && e.port.is_none()) {
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
            let now = facts.links.iter().find(|l| l.index == link.index).map(|l| l.flags & link.mask);
            if now != Some(link.bits) {
                drift = Some("the interface's flags were changed, or it is gone".into());
            }
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
