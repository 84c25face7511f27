//! The door for people: `apply` and `release` by hand, on a container that the ledger knows, a process or a path.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Apply, ContainerFiles, Place, gateways};
use crate::cli::Target;
use crate::error::{shown, usage};
use crate::instance::{ContainerId, Door, Process};
use crate::ledger::Ledger;
use crate::ledger::record::Record;
use crate::policy::Policy;
use crate::policy::container_file::Name;
use crate::request::{Request, Wish};

/// Turns a person's words into a call.
pub fn apply(
    target: &Target,
    wishes: Vec<Wish>,
    policy: &Policy,
    containers: &ContainerFiles,
    ledger: Option<&Ledger>,
) -> Result<Apply> {
    let mut request = Request::default();
    request.extend(wishes)?;
    let (container, place, netns_path) = match target {
        Target::Known(name) => {
            let record = find(ledger, name, Purpose::Change)?;
            // What it was asked for before is asked for again: an interface may have come since.
            request = request.on_top_of(&record.request)?;
            let place = place_of(&record)?;
            let instance = record.instance;
            (instance.container, place, instance.netns_path)
        }
        Target::Pid(pid) => {
            let place = Place::Process(*pid);
            match known_process(ledger, *pid)? {
                Some(record) => {
                    request = request.on_top_of(&record.request)?;
                    (record.instance.container, place, record.instance.netns_path)
                }
                None => (own_id(&request, &format!("pid-{pid}"))?, place, None),
            }
        }
        Target::Netns(path) => {
            let path =
                std::fs::canonicalize(path).with_context(|| format!("there is no namespace {}", path.display()))?;
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let shown = path.to_string_lossy().into_owned();
            (own_id(&request, &name)?, Place::Path(path), Some(shown))
        }
    };
    if container.door == Door::Command {
        let mut names = vec![Name::Trusted(&container.id)];
        let given = request.name().map(String::from);
        names.extend(given.as_deref().map(Name::Trusted));
        let found = containers.load(&names, |_| None)?;
        request.extend(found.wishes)?;
        request.extend(policy.defaults.iter().cloned())?;
    }
    gateways::add(&mut request, &container, &[], containers.initial_user_namespace);
    Ok(Apply { container, place, netns_path, request, notes: Vec::new() })
}

/// Where the namespace is that a person wants to look into, and what to call it.
pub fn look(target: &Target, ledger: Option<&Ledger>) -> Result<(String, Place)> {
    Ok(match target {
        Target::Known(name) => {
            let record = find(ledger, name, Purpose::Look)?;
            let place = place_of(&record)?;
            (record.name, place)
        }
        Target::Pid(pid) => (format!("pid {pid}"), Place::Process(*pid)),
        Target::Netns(path) => (path.display().to_string(), Place::Path(path.clone())),
    })
}

/// Where the namespace of a container of the ledger is, if it is still there.
fn place_of(record: &Record) -> Result<Place> {
    let instance = &record.instance;
    match (instance.pid, &instance.netns_path) {
        (Some(pid), _) => {
            // The plan compares the whole instance; this is for a plain message.
            if Process::read(pid).ok().map(|p| p.start_time) != instance.start_time {
                bail!("container {} is not running any more (pid {pid} is gone)", instance.container.id);
            }
            Ok(Place::Process(pid))
        }
        (None, Some(path)) => Ok(Place::Path(path.into())),
        (None, None) => {
            bail!("the ledger knows no process and no namespace of {}; use --pid or --netns", record.name)
        }
    }
}

/// The container that a person wants to let go.
pub fn release(target: &Target, ledger: Option<&Ledger>) -> Result<ContainerId> {
    match (known(target, ledger, Purpose::Change)?, target) {
        (Some(record), _) => Ok(record.instance.container),
        (None, Target::Known(name)) => bail!("the ledger knows no container \"{}\"", shown(name)),
        (None, Target::Pid(pid)) => bail!("the ledger knows no container with the process {pid}"),
        (None, Target::Netns(path)) => bail!("the ledger knows no container with the namespace {}", path.display()),
    }
}

/// What the ledger has of the container that a person names. A name that it does not know is an error; a process or a
/// namespace may be anybody's.
pub fn known(target: &Target, ledger: Option<&Ledger>, purpose: Purpose) -> Result<Option<Record>> {
    match target {
        Target::Known(name) => find(ledger, name, purpose).map(Some),
        Target::Pid(pid) => known_process(ledger, *pid),
        Target::Netns(path) => {
            let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            let known =
                |record: &Record| record.instance.netns_path.as_deref().is_some_and(|known| Path::new(known) == real);
            let mut records = records(ledger)?;
            records.sort_by_key(|record| record.instance.container.door != Door::Command);
            Ok(records.into_iter().find(known))
        }
    }
}

/// A container without engine gets the name that it was given, or one made from what it was named by.
fn own_id(request: &Request, otherwise: &str) -> Result<ContainerId> {
    ContainerId::new(Door::Command, "", request.name().unwrap_or(otherwise))
}

fn records(ledger: Option<&Ledger>) -> Result<Vec<Record>> {
    let Some(ledger) = ledger else { return Ok(Vec::new()) };
    // A damaged record is `status`'s to report; the others can be found all the same.
    Ok(ledger.records()?.into_iter().filter_map(Result::ok).collect())
}

fn known_process(ledger: Option<&Ledger>, pid: u32) -> Result<Option<Record>> {
    let start_time = Process::read(pid)?.start_time;
    let same = |record: &Record| record.instance.pid == Some(pid) && record.instance.start_time == Some(start_time);
    Ok(records(ledger)?.into_iter().find(same))
}

/// What a container is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Only to look at it.
    Look,
    /// To change it: a name that its author gave it in an annotation is not enough, or an author could have another
    /// container's place taken by its own.
    Change,
}

/// The record of the container that `name` means: its id or its record's name in the ledger, else the name that it was
/// given, else the unique beginning of an id that an engine has made up. One that is a name may begin with another's.
pub fn find(ledger: Option<&Ledger>, name: &str, purpose: Purpose) -> Result<Record> {
    let records = records(ledger)?;
    let by = |test: &dyn Fn(&Record) -> bool| records.iter().filter(|record| test(record)).collect::<Vec<_>>();
    let is_named = |record: &Record| record.name == name;
    // Both at once: an id can look like the name of another one's record.
    let mut found = by(&|record| {
        let container = &record.instance.container;
        container.id == name || container.key() == name
    });
    if found.is_empty() {
        found = by(&|record| is_named(record) && !record.request.is_named_by_annotation());
    }
    if found.is_empty() {
        found = by(&is_named);
        if let ([record, ..], Purpose::Change) = (found.as_slice(), purpose) {
            return Err(usage(format!(
                "only its own annotation calls a container \"{}\"; to change it, give its id: {}",
                shown(name),
                record.instance.container.id
            )));
        }
    }
    if found.is_empty() {
        found = by(&|record| {
            let id = record.instance.container.id.as_str();
            name.len() >= 4 && is_made_up(id) && id.starts_with(name)
        });
    }
    match found.as_slice() {
        [one] => Ok((*one).clone()),
        [] => {
            let known: Vec<&str> = records.iter().map(|record| record.name.as_str()).take(8).collect();
            let hint = match crate::request::nearest(name, known.iter().copied()) {
                Some(near) => format!("did you mean {near}?"),
                None => "see mptcp-hook status, or name it by --pid or --netns".into(),
            };
            Err(usage(format!("the ledger knows no container \"{}\"; {hint}", shown(name))))
        }
        several => {
            let listed = several.iter().map(|record| match &record.instance.container {
                container if container.engine.is_empty() => container.key(),
                container => format!("{} ({})", container.key(), shown(&container.engine)),
            });
            let keys = listed.collect::<Vec<_>>().join(", ");
            Err(usage(format!("\"{}\" could be any of {keys}; give one of these names instead", shown(name))))
        }
    }
}

/// Whether an id is one that engines make up (64 hexadecimal digits), which people shorten.
fn is_made_up(id: &str) -> bool {
    id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}
