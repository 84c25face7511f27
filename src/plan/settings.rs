//! The settings: scope, policy, other people's claims, and what to write.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow, bail};

use super::{Clash, Draft, HOLDERS_MAX, HostSetting, Input, named, routes, scope, undo};
use crate::error::usage;
use crate::kernel::{Change, Seen, SeenSetting};
use crate::ledger::record::{Conflict, ConflictOutcome, Outcome, OwnedSetting, Scope};
use crate::ledger::setting::{HostClaim, Written};
use crate::request::setting::{self, SettingKey};
use crate::request::{OnConflict, Wish};

/// One wish for a setting and what is known about it.
struct Case<'a> {
    key: SettingKey,
    value: String,
    wish: &'a Wish,
    seen: SeenSetting,
    /// Whether it comes with another wish, which was allowed already.
    follows_from: bool,
}

impl Case<'_> {
    fn owned(&self, scope: Scope, outcome: Outcome, original: Option<String>, claimed: bool) -> OwnedSetting {
        OwnedSetting {
            key: self.key.clone(),
            value: self.value.clone(),
            scope,
            outcome,
            original,
            claimed,
            source: self.wish.source.place.clone(),
        }
    }

    fn says(&self) -> String {
        format!("{} asks for {} = {}", self.wish.source, self.key, setting::describe(&self.key, &self.value))
    }
}

pub fn plan(draft: &mut Draft) -> Result<()> {
    runtime_against_siblings(draft);
    let cases = cases(draft)?;
    // Host-wide values first, module parameters after them (a module appears once a path manager needs it), the
    // namespace's own last.
    let order = |case: &Case, scope: Scope| (scope == Scope::Netns, case.key.sysctl_path().is_none());
    let mut scoped = Vec::new();
    let modules_may_come = cases.iter().any(|case| {
        let differs = case.seen.host.value().is_some_and(|now| !setting::same(&case.key, now, &case.value));
        differs && names_a_module(&case.key)
    });
    for case in cases {
        let is_parameter = matches!(case.key, SettingKey::Module(..));
        if is_parameter && case.seen.host == Seen::Absent && modules_may_come {
            draft.plan.deferred.push(case.key.clone());
            continue;
        }
        let scope = scope::of(&case.key, draft.input.facts.kind, &draft.input.facts.release, &case.seen)
            .map_err(|e| anyhow!("{}: {e}", case.says()))?;
        scoped.push((case, scope));
    }
    scoped.sort_by_key(|(case, scope)| order(case, *scope));
    for (case, scope) in scoped {
        match scope {
            Scope::Netns => netns(draft, &case)?,
            Scope::Host => host(draft, &case)?,
        }
    }
    give_back_others(draft);
    Ok(())
}

/// Gives the values of the namespace back that this container relied on before and does not any more.
fn give_back_others(draft: &mut Draft) {
    let input = draft.input;
    let Some(previous) = input.previous else { return };
    for owned in previous.all_netns_claims() {
        if draft.plan.settings.iter().any(|own| own.key == owned.key && own.claimed) {
            continue;
        }
        let conflicts = &mut draft.plan.conflicts;
        let change = undo::setting(previous, owned, input.siblings, input.facts, input.time, conflicts);
        let Some(change @ Change::NetnsSysctl { .. }) = change else { continue };
        let now = input.facts.settings.get(&owned.key).and_then(|seen| seen.target.value());
        let reverse = match (&change, now) {
            (Change::NetnsSysctl { key, host, .. }, Some(now)) => {
                Some(Change::NetnsSysctl { key: key.clone(), value: now.into(), host: host.clone() })
            }
            _ => None,
        };
        draft.step(change, reverse, format!("{} is no longer asked for", owned.key));
    }
}

/// The wishes, `pm_type` and `path_manager` brought under the name that this kernel has.
fn cases<'a>(draft: &Draft<'a>) -> Result<Vec<Case<'a>>> {
    let facts = draft.input.facts;
    let there = |key: &SettingKey| facts.settings.get(key).is_some_and(|seen| seen.target != Seen::Absent);
    let mut cases: BTreeMap<SettingKey, Case> = BTreeMap::new();
    for (key, (wish, value)) in draft.input.request.settings() {
        let (key, value) = one_name(key, value, there);
        let seen = facts.settings.get(&key).cloned().unwrap_or_default();
        let case = Case { key: key.clone(), value, wish, seen, follows_from: false };
        match cases.get_mut(&key) {
            None => {
                cases.insert(key, case);
            }
            Some(other) if setting::same(&key, &other.value, &case.value) => {}
            Some(other) if other.wish.source.rank == wish.source.rank => {
                return Err(usage(format!(
                    "pm_type and path_manager are one setting: {}, and {}",
                    other.says(),
                    case.says()
                )));
            }
            Some(other) if other.wish.source.rank < wish.source.rank => *other = case,
            Some(_) => {}
        }
    }
    for (link, wish) in routes::relaxed(draft.input) {
        let [_, key] = routes::rp_filters(&link.name);
        let seen = facts.settings.get(&key).cloned().unwrap_or_default();
        let case = Case { key: key.clone(), value: routes::LOOSE.into(), wish, seen, follows_from: true };
        // What is asked for by name counts.
        cases.entry(key).or_insert(case);
    }
    Ok(cases.into_values().collect())
}

/// `net.mptcp.pm_type` (deprecated in 6.15) and `net.mptcp.path_manager` are one setting with two names.
fn one_name(key: &SettingKey, value: &str, there: impl Fn(&SettingKey) -> bool) -> (SettingKey, String) {
    const NAMES: [(&str, i128); 2] = [("kernel", 0), ("userspace", 1)];
    let path = |name: &str| SettingKey::Sysctl(format!("net/mptcp/{name}"));
    if *key == path("pm_type") && there(&path("path_manager")) {
        if let Some((name, _)) = NAMES.iter().find(|(_, number)| setting::integer(value) == Some(*number)) {
            return (path("path_manager"), (*name).into());
        }
    }
    if *key == path("path_manager") && !there(&path("path_manager")) && there(&path("pm_type")) {
        if let Some((_, number)) = NAMES.iter().find(|(name, _)| *name == value) {
            return (path("pm_type"), number.to_string());
        }
    }
    (key.clone(), value.into())
}

/// What the runtime writes, under the name that this kernel has for it.
fn runtime_settings<'a>(input: &'a Input) -> impl Iterator<Item = (SettingKey, &'a Wish, String)> {
    let facts = input.facts;
    let there = |key: &SettingKey| facts.settings.get(key).is_some_and(|seen| seen.target != Seen::Absent);
    input.request.runtime_settings().map(move |(key, wish, value)| {
        let (key, value) = one_name(key, value, there);
        (key, wish, value)
    })
}

/// What the runtime will write into a namespace in which others rely on something else.
fn runtime_against_siblings(draft: &mut Draft) {
    let input = draft.input;
    for (key, wish, value) in runtime_settings(input) {
        let holders: Vec<(String, String)> = input
            .siblings
            .iter()
            .flat_map(|record| {
                let held = record
                    .settings
                    .iter()
                    .filter(|s| s.claimed && s.key == key && !setting::same(&key, &s.value, &value));
                held.map(|s| (record.instance.container.id.clone(), s.value.clone()))
            })
            .collect();
        let Some((_, kept)) = holders.first().cloned() else { continue };
        let ids: Vec<String> = holders.into_iter().map(|(id, _)| id).collect();
        let reason =
            format!("{} sets {key} = {value}, and {} in the same namespace rely on {kept}", wish.source, named(&ids));
        draft.clash(Clash {
            key: key.to_string(),
            wanted: value,
            kept,
            holders: ids,
            reason,
            can_override: false,
            source: &wish.source,
            setting: None,
        });
    }
}

/// The value that the runtime writes (runc after the hook, crun before it) stands against ours. True if that has settled the case.
fn runtime_differs(draft: &mut Draft, case: &Case, scope: Scope) -> bool {
    let input = draft.input;
    let twin = runtime_settings(input).find(|(key, ..)| *key == case.key);
    let Some((_, wish, value)) = twin.filter(|(key, _, value)| !setting::same(key, value, &case.value)) else {
        return false;
    };
    let reason = format!(
        "{}, but {} has {}, which the runtime writes whatever the hook does; make them agree",
        case.says(),
        wish.source,
        setting::describe(&case.key, &value)
    );
    draft.clash(Clash {
        key: case.key.to_string(),
        wanted: case.value.clone(),
        kept: value,
        holders: Vec::new(),
        reason,
        can_override: false,
        source: &case.wish.source,
        setting: Some((&case.key, &case.value)),
    });
    draft.plan.settings.push(case.owned(scope, Outcome::Kept, None, false));
    true
}

/// The present value, checked against the form of the wished one.
fn present<'a>(case: &Case, seen: &'a Seen) -> Result<&'a str> {
    let Some(present) = seen.value() else {
        bail!("{}: its present value cannot be read, so it could not be put back", case.says());
    };
    setting::fits(&case.key, &case.value, present).map_err(|e| usage(format!("{}: {e}", case.says())))?;
    Ok(present)
}

fn netns(draft: &mut Draft, case: &Case) -> Result<()> {
    let input = draft.input;
    let present = present(case, &case.seen.target)?.to_string();
    let equal = setting::same(&case.key, &present, &case.value);
    if runtime_differs(draft, case, Scope::Netns) {
        return Ok(());
    }
    let allowed = match case.follows_from {
        true => Ok(()),
        false => input.policy.allows_setting(&case.wish.source, &case.key, &case.value, Scope::Netns),
    };
    if let Err(reason) = allowed {
        if !equal {
            not_allowed(draft, case, &present, reason);
        }
        let outcome = if equal { Outcome::Shared } else { Outcome::Kept };
        draft.plan.settings.push(case.owned(Scope::Netns, outcome, None, false));
        return Ok(());
    }
    if loads_a_module(draft, case) {
        if !input.facts.initial_user_namespace {
            let reason = format!("{}: that loads a kernel module, which only host root may cause", case.says());
            not_allowed(draft, case, &present, reason);
            draft.plan.settings.push(case.owned(Scope::Netns, Outcome::Kept, None, false));
            return Ok(());
        }
        draft.warn(format!("{} = {} loads a kernel module, which stays on the host", case.key, case.value));
    }
    let relied_on = |claimed_only: bool| {
        input.siblings.iter().filter_map(move |record| {
            let own = record.settings.iter().find(|s| s.key == case.key && (s.claimed || !claimed_only))?;
            Some((record.instance.container.id.clone(), own))
        })
    };
    let holders: Vec<(String, String)> = relied_on(true)
        .filter(|(_, own)| !setting::same(&case.key, &own.value, &case.value))
        .map(|(id, own)| (id, own.value.clone()))
        .collect();
    let first = if equal && relied_on(true).next().is_some() { Outcome::Shared } else { Outcome::Applied };
    let mut outcome = outcome_before(draft, case).filter(|_| equal).unwrap_or(first);
    if let Some((_, kept)) = holders.first() {
        let ids: Vec<String> = holders.iter().map(|(id, _)| id.clone()).collect();
        let reason = format!("{}, and {} in the same network namespace rely on {kept}", case.says(), named(&ids));
        let decided = draft.clash(Clash {
            key: case.key.to_string(),
            wanted: case.value.clone(),
            kept: kept.clone(),
            holders: ids,
            reason,
            can_override: true,
            source: &case.wish.source,
            setting: Some((&case.key, &case.value)),
        });
        if decided != OnConflict::Override {
            draft.plan.settings.push(case.owned(Scope::Netns, Outcome::Kept, None, false));
            return Ok(());
        }
        outcome = Outcome::Overrode;
    }
    // The value before the first of ours: it is ours as long as it is what one of us wrote.
    let ours = input.ours().flat_map(|record| &record.settings);
    let original = ours
        .filter(|own| own.key == case.key && own.scope == Scope::Netns)
        .find_map(|own| own.original.clone().filter(|_| setting::same(&case.key, &own.value, &present)))
        .unwrap_or_else(|| present.clone());
    if !equal {
        let host = case.seen.host.value().map(String::from);
        let write = |value: String| Change::NetnsSysctl { key: case.key.clone(), value, host: host.clone() };
        draft.step(write(case.value.clone()), Some(write(present)), case.wish.source.place.clone());
    }
    draft.plan.settings.push(case.owned(Scope::Netns, outcome, Some(original), true));
    Ok(())
}

/// The kernel loads `tcp_NAME` when a congestion control is chosen that it does not have yet.
fn loads_a_module(draft: &Draft, case: &Case) -> bool {
    case.key.sysctl_path() == Some("net/ipv4/tcp_congestion_control")
        && !draft.input.facts.congestion_controls.contains(&case.value)
}

fn not_allowed(draft: &mut Draft, case: &Case, present: &str, reason: String) {
    draft.clash(Clash {
        key: case.key.to_string(),
        wanted: case.value.clone(),
        kept: present.into(),
        holders: Vec::new(),
        reason,
        can_override: false,
        source: &case.wish.source,
        setting: Some((&case.key, &case.value)),
    });
}

fn host(draft: &mut Draft, case: &Case) -> Result<()> {
    let input = draft.input;
    let facts = input.facts;
    if !facts.initial_user_namespace {
        return host_of_user_namespace(draft, case);
    }
    if !facts.host_reachable && case.key.sysctl_path().is_some() {
        return host_out_of_reach(draft, case);
    }
    let actual = present(case, &case.seen.host)?.to_string();
    if runtime_differs(draft, case, Scope::Host) {
        return Ok(());
    }
    let nobody = HostSetting { original: actual.clone(), value: actual.clone(), ..HostSetting::default() };
    let page = input.host.get(&case.key).unwrap_or(&nobody);
    // Somebody else's later change is what there was before ours.
    let is_ours = setting::same(&case.key, &actual, &page.value);
    let original = if is_ours { page.original.clone() } else { actual.clone() };
    let equal = setting::same(&case.key, &actual, &case.value);
    let allowed = input.policy.allows_setting(&case.wish.source, &case.key, &case.value, Scope::Host);

    let mut outcome;
    let mut overridden = Vec::new();
    if equal {
        if allowed.is_err() {
            // It is as asked; nobody is held back by it.
            draft.plan.settings.push(case.owned(Scope::Host, Outcome::Shared, None, false));
            return Ok(());
        }
        // Asked again, it is still this container that changed it.
        outcome = outcome_before(draft, case).unwrap_or(Outcome::Shared);
    } else {
        let holders: Vec<_> =
            page.claims.iter().filter(|claim| !setting::same(&case.key, &claim.value, &case.value)).collect();
        let ids: Vec<String> = holders.iter().map(|holder| holder.id.clone()).collect();
        let clash = match (allowed, holders.first()) {
            (Err(reason), _) => Some((reason, false)),
            (Ok(()), Some(first)) => Some((
                format!(
                    "{} for the whole host, and {} relied on by {} (on-conflict=warn would start it at that value)",
                    case.says(),
                    format_args!("{} is", setting::describe(&case.key, &first.value)),
                    named(&ids)
                ),
                true,
            )),
            (Ok(()), None) => None,
        };
        outcome = Outcome::Applied;
        if let Some((reason, can_override)) = clash {
            let decided = draft.clash(Clash {
                key: case.key.to_string(),
                wanted: case.value.clone(),
                kept: actual.clone(),
                holders: ids,
                reason,
                can_override,
                source: &case.wish.source,
                setting: Some((&case.key, &case.value)),
            });
            if decided != OnConflict::Override {
                draft.plan.settings.push(case.owned(Scope::Host, Outcome::Kept, None, false));
                return Ok(());
            }
            outcome = Outcome::Overrode;
            overridden = holders.iter().map(|holder| holder.container.clone()).collect();
        }
    }
    if outcome == Outcome::Applied {
        draft.warn(format!(
            "{} = {} changes the whole host (it was {})",
            case.key,
            setting::describe(&case.key, &case.value),
            setting::describe(&case.key, &original)
        ));
    }
    let changed = matches!(outcome, Outcome::Applied | Outcome::Overrode);
    if changed && names_a_module(&case.key) && case.value != "default" {
        draft.warn(format!(
            "{} = {} may load the kernel module mptcp_{1}, which stays on the host",
            case.key, case.value
        ));
    }
    let mut written = None;
    if !setting::same(&case.key, &actual, &case.value) {
        if !matches!(case.seen.host, Seen::Writable(_)) {
            bail!(
                "{}: it is {actual} and read-only here; it can be changed in the initial network namespace alone",
                case.says()
            );
        }
        let write = |value: &str| Change::HostSetting { key: case.key.clone(), value: value.into() };
        draft.step(write(&case.value), Some(write(&actual)), case.wish.source.place.clone());
        written = Some(Written { before: actual.clone() });
    }
    if !is_ours {
        drifted(draft, case, page, &actual);
    }
    // The page's original counts; the record's is for the repair of a lost page.
    draft.plan.settings.push(case.owned(Scope::Host, outcome, Some(original.clone()), true));
    draft.plan.claims.push(HostClaim {
        key: case.key.clone(),
        value: case.value.clone(),
        original,
        is_foreign: !is_ours,
        written,
        overridden,
        dead: page.dead.clone(),
    });
    Ok(())
}

/// Records that somebody else has changed what others rely on: from now on it is that which is put back.
fn drifted(draft: &mut Draft, case: &Case, page: &HostSetting, actual: &str) {
    let others = page.claims.iter().filter(|claim| !setting::same(&case.key, &claim.value, actual));
    let ids: Vec<String> = others.map(|holder| holder.id.clone()).collect();
    if ids.is_empty() {
        return;
    }
    let (key, ours) = (&case.key, &page.value);
    draft.plan.conflicts.push(Conflict {
        time: draft.input.time,
        container: draft.input.container.into(),
        key: key.to_string(),
        wanted: ours.clone(),
        kept: actual.into(),
        reason: format!(
            "{key} was set to {ours} and somebody has changed it to {actual} since, which is not what {} asked for; from now \
             on {actual} is what is put back",
            named(&ids)
        ),
        holders: ids.into_iter().take(HOLDERS_MAX).collect(),
        outcome: ConflictOutcome::Drift,
    });
}

/// Settings of multipath-tcp.org kernels whose values are modules.
fn names_a_module(key: &SettingKey) -> bool {
    key.sysctl_path().is_some_and(|path| ["net/mptcp/mptcp_path_manager", "net/mptcp/mptcp_scheduler"].contains(&path))
}

/// What became of the same wish when this container asked before.
fn outcome_before(draft: &Draft, case: &Case) -> Option<Outcome> {
    let settings = &draft.input.previous?.settings;
    let same =
        |own: &&OwnedSetting| own.claimed && own.key == case.key && setting::same(&own.key, &own.value, &case.value);
    settings.iter().find(same).map(|own| own.outcome)
}

/// In a user namespace the host's values can be looked at and not changed.
fn host_of_user_namespace(draft: &mut Draft, case: &Case) -> Result<()> {
    let seen = if case.seen.host == Seen::Absent { &case.seen.target } else { &case.seen.host };
    let actual = present(case, seen)?.to_string();
    let equal = setting::same(&case.key, &actual, &case.value);
    if !equal {
        let reason = format!(
            "{}: it is {} for the whole host, which a hook in a user namespace cannot change",
            case.says(),
            setting::describe(&case.key, &actual)
        );
        not_allowed(draft, case, &actual, reason);
    }
    let outcome = if equal { Outcome::Shared } else { Outcome::Kept };
    draft.plan.settings.push(case.owned(Scope::Host, outcome, None, false));
    Ok(())
}

/// From inside a container only the shared read-only values can be seen, and none can be changed.
fn host_out_of_reach(draft: &mut Draft, case: &Case) -> Result<()> {
    match case.seen.target.value() {
        Some(value) if setting::same(&case.key, value, &case.value) => {
            draft.plan.settings.push(case.owned(Scope::Host, Outcome::Shared, None, false));
            Ok(())
        }
        _ => bail!(
            "{}: it is the whole host's, which a createContainer hook cannot reach; use createRuntime or prestart",
            case.says()
        ),
    }
}
