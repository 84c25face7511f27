//! What to do: a pure function of the request, the policy, the kernel's facts and the ledger. Nothing here reads or
//! changes anything; `--dry-run` prints the result.

mod following;
mod mptcp_org;
mod routes;
pub mod scope;
mod settings;
#[cfg(test)]
mod tests;
pub mod undo;
mod upstream;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Result, bail};
use serde::Serialize;

pub use routes::{is_learnt, rp_filters, to_look_up};

use crate::kernel::{Change, Facts, GET_MPTCP, Kind, Link};
use crate::ledger::record::{
    Conflict, ConflictOutcome, Interface, OwnedEndpoint, OwnedLimits, OwnedSetting, Record, State,
};
use crate::ledger::setting::HostClaim;
use crate::policy::Policy;
use crate::request::flags::InterfaceFlags;
use crate::request::setting::SettingKey;
use crate::request::{OnConflict, Rank, Request, Source, What, Wish};

/// Everything that the plan depends on.
pub struct Input<'a> {
    /// What is asked for.
    pub request: &'a Request,
    /// What is allowed.
    pub policy: &'a Policy,
    /// What the kernel is like.
    pub facts: &'a Facts,
    /// The container's id, for the records of conflicts.
    pub container: &'a str,
    /// What the ledger has of this instance.
    pub previous: Option<&'a Record>,
    /// The records of the others that are alive in the same namespace.
    pub siblings: &'a [Record],
    /// The records of the dead in the same namespace: they hold nobody, but what is still as they set it is not
    /// somebody else's. More is not believed: where the kernel has no cookies, it may have been another namespace.
    pub departed: &'a [Record],
    /// What the ledger has of the host-wide settings that are asked for.
    pub host: &'a BTreeMap<SettingKey, HostSetting>,
    /// Seconds since 1970, for the records of conflicts.
    pub time: u64,
    /// Whether this is the agent's plan: interfaces alone, as they were decided on when somebody asked.
    pub follows: bool,
    /// Whether a new address is used although its link or its way out is not there yet.
    pub hurries: bool,
}

impl<'a> Input<'a> {
    /// The records of what we did in this namespace: this instance's, its siblings', and those of the dead.
    fn ours(&self) -> impl Iterator<Item = &'a Record> + use<'a> {
        self.previous.into_iter().chain(self.siblings).chain(self.departed).flat_map(Record::versions)
    }
}

/// What the ledger has of a host-wide setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostSetting {
    /// The value before the first of ours.
    pub original: String,
    /// The value that we wrote last, or relied on.
    pub value: String,
    /// The live claims of others.
    pub claims: Vec<Holder>,
    /// The containers that have a claim and are dead.
    pub dead: Vec<String>,
}

/// A container that relies on a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The name of its record.
    pub container: String,
    /// Its id, for people.
    pub id: String,
    /// The value that it relies on.
    pub value: String,
}

/// What to do.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The changes, in order.
    pub steps: Vec<Step>,
    /// The interfaces, as they will be recorded.
    pub interfaces: Vec<Interface>,
    /// Endpoints of ours that the steps delete or give back.
    pub leaving: Vec<OwnedEndpoint>,
    /// Tables of ours that the steps empty.
    pub leaving_tables: BTreeSet<u32>,
    /// The limits, as they will be recorded.
    pub limits: Option<OwnedLimits>,
    /// The settings, as they will be recorded.
    pub settings: Vec<OwnedSetting>,
    /// What to enter into the ledger's pages on host-wide settings.
    pub claims: Vec<HostClaim>,
    /// What did not fit; to be recorded whatever happens.
    pub conflicts: Vec<Conflict>,
    /// What people should know.
    pub warnings: Vec<String>,
    /// How many of the warnings, from the first on, are about settings.
    pub lasting_warnings: usize,
    /// Whether an interface or address is not there yet, or may go or change.
    pub unsettled: bool,
    /// The addresses that wait for their link or their way out.
    pub put_off: Vec<IpAddr>,
    /// Module parameters that may appear with the steps' path manager or scheduler: to be planned again after them.
    pub deferred: Vec<SettingKey>,
    /// Whether a strict `rp_filter` has to be looked at again once the steps' rules are there.
    pub looks_again: bool,
}

/// A change and how to undo it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The change.
    pub change: Change,
    /// Its reverse. None where nothing is to be undone (a deletion that only tidies up).
    pub undo: Option<Change>,
    /// Whose wish it is, and why it is needed.
    pub why: String,
}

/// The plan as `--dry-run --json` prints it.
#[derive(Serialize)]
pub struct Shown<'a> {
    wishes: Vec<ShownWish<'a>>,
    steps: Vec<ShownStep<'a>>,
    interfaces: &'a [Interface],
    settings: &'a [OwnedSetting],
    conflicts: &'a [Conflict],
    warnings: &'a [String],
    refused: bool,
}

#[derive(Serialize)]
struct ShownWish<'a> {
    wish: String,
    value: String,
    source: &'a str,
    rank: Rank,
}

#[derive(Serialize)]
struct ShownStep<'a> {
    step: String,
    why: &'a str,
}

impl Plan {
    /// Makes the plan. An error means that the wishes cannot be had: nothing has been changed.
    pub fn make(input: &Input) -> Result<Self> {
        let mut draft = Draft { input, plan: Self::default() };
        match input.previous.filter(|_| input.follows) {
            Some(previous) => following::keep_settings(&mut draft, previous),
            None => settings::plan(&mut draft)?,
        }
        draft.plan.lasting_warnings = draft.plan.warnings.len();
        match input.facts.kind {
            Kind::Upstream => upstream::plan(&mut draft)?,
            Kind::MptcpOrg => mptcp_org::plan(&mut draft)?,
            Kind::None => bail!("this kernel (Linux {}) has no MPTCP; {GET_MPTCP}", input.facts.release),
        }
        routes::give_back_others(&mut draft);
        if input.follows {
            routes::warn_of_filters(&mut draft);
        }
        following::finish(&mut draft);
        Ok(draft.plan)
    }

    /// Why the container must not start, if it must not.
    pub fn refusal(&self) -> Option<String> {
        let reasons: Vec<String> = self
            .conflicts
            .iter()
            .filter(|conflict| conflict.outcome == ConflictOutcome::Refused)
            .map(|conflict| conflict.reason.clone())
            .collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    /// The plan beside the request, for `--json`.
    pub fn shown<'a>(&'a self, request: &'a Request) -> Shown<'a> {
        Shown {
            wishes: request
                .wishes()
                .iter()
                .map(|wish| ShownWish {
                    wish: wish.what.subject(),
                    value: wish.what.value(),
                    source: &wish.source.place,
                    rank: wish.source.rank,
                })
                .collect(),
            steps: self.steps.iter().map(|s| ShownStep { step: s.change.to_string(), why: &s.why }).collect(),
            interfaces: &self.interfaces,
            settings: &self.settings,
            conflicts: &self.conflicts,
            warnings: &self.warnings,
            refused: self.refusal().is_some(),
        }
    }
}

/// A plan in the making.
struct Draft<'a> {
    input: &'a Input<'a>,
    plan: Plan,
}

/// Of how many holders the record of a conflict has the ids: the history is bounded.
const HOLDERS_MAX: usize = 100;

/// How many addresses a message names: a container may have as many as it likes.
const ADDRESSES_MAX: usize = 16;

/// The ids of containers for a message; of very many the first.
fn named(ids: &[String]) -> String {
    listed(ids, HOLDERS_MAX)
}

/// The first `max` of these words for a message, and how many more there are.
fn listed(words: &[String], max: usize) -> String {
    let mut text = words.iter().take(max).cloned().collect::<Vec<_>>().join(", ");
    if let Some(more) = words.len().checked_sub(max).filter(|more| *more > 0) {
        text += &format!(" and {more} more");
    }
    text
}

/// Something asked for that others or the policy stand against.
struct Clash<'a> {
    key: String,
    wanted: String,
    kept: String,
    holders: Vec<String>,
    reason: String,
    /// Whether an override could carry it through at all.
    can_override: bool,
    source: &'a Source,
    setting: Option<(&'a SettingKey, &'a str)>,
}

impl<'a> Draft<'a> {
    fn step(&mut self, change: Change, undo: Option<Change>, why: impl Into<String>) {
        self.plan.steps.push(Step { change, undo, why: why.into() });
    }

    fn warn(&mut self, warning: impl Into<String>) {
        let warning = warning.into();
        if !self.plan.warnings.contains(&warning) {
            self.plan.warnings.push(warning);
        }
    }

    /// Decides a conflict and records it.
    fn clash(&mut self, clash: Clash) -> OnConflict {
        let asked = self.input.policy.on_conflict(self.input.request, clash.source, clash.setting);
        let decided = if asked == OnConflict::Override && !clash.can_override { OnConflict::Refuse } else { asked };
        let outcome = match decided {
            OnConflict::Refuse => ConflictOutcome::Refused,
            OnConflict::Warn => ConflictOutcome::Warned,
            OnConflict::Override => ConflictOutcome::Overrode,
        };
        if decided != OnConflict::Refuse {
            let what = if decided == OnConflict::Warn { "kept as it is" } else { "overridden" };
            self.warn(format!("{} ({what})", clash.reason));
        }
        if self.input.follows {
            // It was recorded when somebody asked; the container runs, so that nothing can be refused any more.
            return if decided == OnConflict::Refuse { OnConflict::Warn } else { decided };
        }
        self.plan.conflicts.push(Conflict {
            time: self.input.time,
            container: self.input.container.into(),
            key: clash.key,
            wanted: clash.wanted,
            kept: clash.kept,
            holders: clash.holders.into_iter().take(HOLDERS_MAX).collect(),
            outcome,
            reason: clash.reason,
        });
        decided
    }

    /// The interfaces that are there and asked for, each with its wish, and the wishes that match none. What the policy
    /// does not allow is settled here.
    fn wanted_interfaces(&mut self) -> Result<Vec<Wanted<'a>>> {
        let input = self.input;
        let mut wanted = Vec::new();
        let links: Vec<&Link> =
            input.facts.links.iter().filter(|link| link.flags & libc::IFF_LOOPBACK as u32 == 0).collect();
        for link in &links {
            let found = match input.request.interface(&link.name) {
                Err(error) if input.follows => {
                    self.plan.interfaces.push(following::ignored(input.request, &link.name, &error));
                    continue;
                }
                found => found?,
            };
            let Some((wish, flags)) = found else { continue };
            wanted.push(Wanted { name: link.name.clone(), index: Some(link.index), wish, flags });
        }
        for (pattern, (wish, flags)) in input.request.patterns() {
            let matching: Vec<_> = links.iter().filter(|link| pattern.matches(&link.name)).collect();
            let is_given = |link: &&&Link| input.policy.allows_interface(&wish.source, &link.name).is_ok();
            // What the policy does not give is no match of a glob that it gives something to.
            let waits = matching.is_empty()
                || input.policy.allows_pattern(&wish.source, pattern).is_ok() && !matching.iter().any(is_given);
            // A default says how an interface shall be if there is one.
            if waits && wish.source.rank != Rank::PolicyDefault {
                wanted.push(Wanted { name: pattern.to_string(), index: None, wish, flags });
            }
        }
        let mut allowed = Vec::new();
        for one in wanted {
            if self.is_allowed(&one) {
                allowed.push(one);
            }
        }
        Ok(allowed)
    }

    fn is_allowed(&mut self, wanted: &Wanted<'a>) -> bool {
        let source = &wanted.wish.source;
        let allowed = match (wanted.index, &wanted.wish.what) {
            (None, What::Interface(pattern, _)) => self.input.policy.allows_pattern(source, pattern),
            _ => self.input.policy.allows_interface(source, &wanted.name),
        };
        let Err(reason) = allowed else { return true };
        self.clash(Clash {
            key: format!("interface.{}", wanted.name),
            wanted: wanted.flags.to_string(),
            kept: "unchanged".into(),
            holders: Vec::new(),
            reason: reason.clone(),
            can_override: false,
            source,
            setting: None,
        });
        let ignored = wanted.entry(State::Ignored, Some(reason));
        self.plan.interfaces.push(ignored);
        false
    }

    /// Whether a sibling in the same namespace stands against these flags; it has been settled if so.
    fn is_held_otherwise(&mut self, wanted: &Wanted<'a>) -> bool {
        let names = wanted.flags.names();
        let holders: Vec<&Record> = self
            .input
            .siblings
            .iter()
            .filter(|record| {
                record.interfaces.iter().any(|interface| {
                    interface.name == wanted.name && interface.state != State::Ignored && interface.flags != names
                })
            })
            .collect();
        let Some(first) = holders.first() else { return false };
        let kept =
            first.interfaces.iter().find(|i| i.name == wanted.name).map(|i| i.flags.join(",")).unwrap_or_default();
        let ids: Vec<String> = holders.iter().map(|record| record.instance.container.id.clone()).collect();
        let reason = format!(
            "{} is {kept} for {} in the same network namespace, and {} asks for {}",
            wanted.name,
            named(&ids),
            wanted.wish.source,
            wanted.flags
        );
        let decided = self.clash(Clash {
            key: format!("interface.{}", wanted.name),
            wanted: wanted.flags.to_string(),
            kept,
            holders: ids,
            reason: reason.clone(),
            can_override: true,
            source: &wanted.wish.source,
            setting: None,
        });
        if decided == OnConflict::Override {
            return false;
        }
        let ignored = wanted.entry(State::Ignored, Some(reason));
        self.plan.interfaces.push(ignored);
        true
    }
}

/// An interface and what is asked of it.
#[derive(Clone)]
struct Wanted<'a> {
    name: String,
    /// None while it is not there.
    index: Option<u32>,
    wish: &'a Wish,
    flags: InterfaceFlags,
}

impl Wanted<'_> {
    /// Its entry in the record.
    fn entry(&self, state: State, reason: Option<String>) -> Interface {
        Interface::new(&self.name, self.flags.names(), &self.wish.source.place, state, reason)
    }
}
