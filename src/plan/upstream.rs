//! Endpoints and limits of upstream kernels.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail};

use super::{ADDRESSES_MAX, Clash, Draft, Wanted, following, listed, routes};
use crate::error::usage;
use crate::kernel::upstream::backup_bug;
use crate::kernel::{Address, Change, ENDPOINTS_MAX, Endpoint};
use crate::ledger::record::{Interface, LimitPair, OwnedEndpoint, OwnedLimits, Record, State};
use crate::request::flags::{EndpointFlags, InterfaceFlags};
use crate::request::pattern::Pattern;
use crate::request::setting::{self, SettingKey};
use crate::request::{LIMIT_MAX, Limit, OnConflict, What};

pub fn plan(draft: &mut Draft) -> Result<()> {
    let wanted = draft.wanted_interfaces()?;
    if wanted.iter().any(|one| matches!(one.flags, InterfaceFlags::Endpoint(_))) {
        check_mptcp_works(draft)?;
    }
    let mut kept = Vec::new();
    for one in wanted {
        if let InterfaceFlags::Handover(bits) = one.flags {
            return Err(usage(format!(
                "{} asks for {bits:#x} on {}: the handover bit 0x200000 exists on OpenMPTCProuter's kernels alone",
                one.wish.source, one.name
            )));
        }
        if !draft.is_held_otherwise(&one) {
            kept.push(one);
        }
    }
    let asked = kept.iter().filter_map(|one| match one.flags {
        InterfaceFlags::Endpoint(flags) if flags.contains(EndpointFlags::BACKUP) => Some(flags),
        _ => None,
    });
    let release = &draft.input.facts.release;
    let bugs: Vec<&str> = asked.filter_map(|flags| backup_bug(release, flags)).collect();
    for bug in bugs {
        draft.warn(format!("this kernel ({release}) {bug}"));
    }
    let mut places = places(draft, &kept);
    choose(draft, &mut places);
    let chosen = places.iter().flat_map(|place| &place.candidates).filter(|candidate| candidate.chosen);
    let desired: Vec<IpAddr> = chosen.map(|candidate| candidate.address).collect();
    leave(draft, &desired);
    // Limits before endpoints: a subflow that a limit forbids is not tried again.
    let chosen: Vec<(EndpointFlags, usize)> =
        places.iter().map(|place| (place.flags, place.candidates.iter().filter(|c| c.chosen).count())).collect();
    limits(draft, &chosen)?;
    let asked = routes::asked(draft);
    let mut ways = Vec::new();
    for place in &places {
        let chosen: Vec<IpAddr> = place.candidates.iter().filter(|c| c.chosen).map(|c| c.address).collect();
        ways.push(place.index.map(|index| routes::plan(draft, &place.wanted.name, index, &chosen, asked)));
    }
    for (place, ways) in places.iter().zip(ways) {
        let mut entry = endpoints(draft, place)?;
        ways.unwrap_or_default().enter(draft.input, &mut entry);
        draft.plan.interfaces.push(entry);
    }
    for one in &kept {
        match one.flags {
            InterfaceFlags::Off => off(draft, one),
            InterfaceFlags::Default => {
                let entry = one.entry(if one.index.is_some() { State::Applied } else { State::Pending }, None);
                draft.plan.interfaces.push(entry);
            }
            _ => {}
        }
    }
    Ok(())
}

fn mptcp_value<'a>(draft: &'a Draft, name: &str) -> Option<&'a str> {
    let key = SettingKey::Sysctl(format!("net/mptcp/{name}"));
    let asked = draft.plan.settings.iter().find(|s| s.key == key && s.claimed).map(|s| s.value.as_str());
    // What the runtime writes is what counts, if it writes it after the hook.
    let mut runtime = draft.input.request.runtime_settings();
    let written = runtime.find(|(k, ..)| **k == key).map(|(.., value)| value);
    asked.or(written).or_else(|| draft.input.facts.settings.get(&key)?.target.value())
}

fn check_mptcp_works(draft: &mut Draft) -> Result<()> {
    if mptcp_value(draft, "enabled").and_then(setting::integer) == Some(0) {
        bail!(
            "net.mptcp.enabled is 0 in the container's namespace: endpoints would do nothing; ask for --sysctl enabled=1 too"
        );
    }
    let userspace = mptcp_value(draft, "path_manager").map(|name| name != "kernel") == Some(true)
        || mptcp_value(draft, "pm_type").and_then(setting::integer).is_some_and(|n| n != 0);
    if userspace {
        draft.warn("the path manager of the namespace is not the kernel's: endpoints are left to the daemon (mptcpd) that runs it");
    }
    Ok(())
}

/// An interface that shall have endpoints.
struct Place<'a> {
    wanted: Wanted<'a>,
    flags: EndpointFlags,
    index: Option<u32>,
    candidates: Vec<Candidate>,
}

/// One of its usable addresses.
struct Candidate {
    address: IpAddr,
    /// Whether an earlier one of the same family stands before it on this interface.
    extra: bool,
    /// Whether its turn comes only when those before it wait no more: nobody has looked for its way out.
    is_behind: bool,
    chosen: bool,
}

impl Place<'_> {
    fn is_glob(&self) -> bool {
        match &self.wanted.wish.what {
            What::Interface(pattern, _) => !Pattern::is_exact(pattern),
            _ => false,
        }
    }
}

fn places<'a>(draft: &mut Draft<'a>, wanted: &[Wanted<'a>]) -> Vec<Place<'a>> {
    let mut places = Vec::new();
    for one in wanted {
        let InterfaceFlags::Endpoint(flags) = one.flags else { continue };
        let mut candidates: Vec<Candidate> = Vec::new();
        for address in draft.input.facts.addresses.iter().filter(|a| Some(a.ifindex) == one.index && a.is_usable()) {
            if following::waits(draft.input, address) {
                draft.plan.put_off.push(address.ip);
                continue;
            }
            let extra = candidates.iter().any(|c| c.address.is_ipv4() == address.ip.is_ipv4());
            let is_behind = following::is_behind(draft.input, address);
            candidates.push(Candidate { address: address.ip, extra, is_behind, chosen: false });
        }
        places.push(Place { wanted: one.clone(), flags, index: one.index, candidates });
    }
    places
}

/// Our endpoint for an address: of this instance, else of a sibling.
fn owned<'a>(draft: &Draft<'a>, address: IpAddr) -> Option<&'a OwnedEndpoint> {
    let now = present(draft, address);
    let is_there = |own: &&OwnedEndpoint| now.is_some_and(|now| now.flags == own.flags && now.id == own.id);
    let living = draft.input.previous.into_iter().chain(draft.input.siblings);
    let departed = draft.input.departed.iter().flat_map(Record::endpoints).filter(is_there);
    let mut all = living.flat_map(Record::endpoints).chain(departed);
    all.find(|endpoint| endpoint.address == address)
}

/// The present endpoint for an address; one with a port of its own is another one.
fn present<'a>(draft: &Draft<'a>, address: IpAddr) -> Option<&'a Endpoint> {
    draft.input.facts.endpoint(address)
}

/// Whether a sibling has an endpoint for the address, too.
fn is_relied_on(draft: &Draft, address: IpAddr) -> bool {
    let theirs = draft.input.siblings.iter().flat_map(|record| &record.interfaces).flat_map(|i| &i.endpoints);
    theirs.into_iter().any(|endpoint| endpoint.address == address)
}

/// Deletes or gives back what this instance had and no longer wants.
fn leave(draft: &mut Draft, desired: &[IpAddr]) {
    let input = draft.input;
    let Some(previous) = input.previous else { return };
    let mut seen: Vec<IpAddr> = desired.to_vec();
    for endpoint in previous.endpoints() {
        if seen.contains(&endpoint.address) {
            continue;
        }
        seen.push(endpoint.address);
        let Some(now) = present(draft, endpoint.address).cloned() else { continue };
        // Somebody else's change since then is theirs.
        let is_ours = previous.endpoints().any(|own| own.address == now.address && own.flags == now.flags);
        if is_relied_on(draft, endpoint.address) || !is_ours {
            continue;
        }
        let why = format!("{} is no longer asked for or no longer there", endpoint.address);
        match endpoint.original {
            None => {
                draft.step(Change::DeleteEndpoint(now.clone()), Some(Change::AddEndpoint(now)), why);
            }
            Some(original) if original != now.flags => {
                let back = Endpoint { flags: original, ..now.clone() };
                draft.step(Change::SetEndpointFlags(back), Some(Change::SetEndpointFlags(now)), why);
            }
            Some(_) => {}
        }
        draft.plan.leaving.push(endpoint.clone());
    }
}

/// Picks the addresses that get an endpoint when there are more than places: one per interface and family before any
/// second one, exact names before globs. What is there already and not ours to delete takes its place in any case.
fn choose(draft: &Draft, places: &mut [Place]) {
    let is_ours = |endpoint: &Endpoint| {
        let mut owned = draft.input.previous.into_iter().flat_map(Record::endpoints);
        let same = |own: &OwnedEndpoint| own.address == endpoint.address && own.flags == endpoint.flags;
        endpoint.port.is_none()
            && owned.any(|own| own.original.is_none() && same(own))
            && !is_relied_on(draft, endpoint.address)
    };
    let staying: Vec<&Endpoint> = draft.input.facts.endpoints.iter().filter(|endpoint| !is_ours(endpoint)).collect();
    let mut free = ENDPOINTS_MAX.saturating_sub(staying.len());
    for candidate in places.iter_mut().flat_map(|place| &mut place.candidates) {
        candidate.chosen = staying.iter().any(|e| e.port.is_none() && e.address == candidate.address);
    }
    for (extra, glob) in [(false, false), (false, true), (true, false), (true, true)] {
        for place in places.iter_mut() {
            if place.is_glob() != glob {
                continue;
            }
            for candidate in place.candidates.iter_mut().filter(|c| c.extra == extra && !c.chosen && !c.is_behind) {
                if free > 0 {
                    candidate.chosen = true;
                    free -= 1;
                }
            }
        }
    }
}

fn limits(draft: &mut Draft, chosen: &[(EndpointFlags, usize)]) -> Result<()> {
    let input = draft.input;
    let Some(now) = input.facts.limits.map(LimitPair::from) else { return Ok(()) };
    let count =
        |flag: EndpointFlags| chosen.iter().filter(|(f, _)| f.contains(flag)).map(|(_, n)| *n as u32).sum::<u32>();
    let fullmesh = count(EndpointFlags::FULLMESH) > 0;
    let mut needed = LimitPair {
        subflows: count(EndpointFlags::SUBFLOW).max(count(EndpointFlags::SIGNAL)).min(LIMIT_MAX),
        add_addr_accepted: u32::from(fullmesh),
    };
    // What was there before the first of us, as long as it is still what we set.
    let ours: Vec<OwnedLimits> = input.ours().filter_map(|record| record.limits).collect();
    let original = ours.iter().find(|own| own.set == now).map_or(now, |own| own.original);
    let siblings = input
        .siblings
        .iter()
        .filter_map(|record| record.limits)
        .fold(LimitPair::default(), |all, own| all.max(own.set));
    let floor = original.max(siblings);
    let mut lowered = floor;
    let mut is_asked = false;
    for limit in [Limit::Subflows, Limit::AddAddrAccepted] {
        let Some((wish, asked)) = input.request.limit(limit) else { continue };
        let (present, needs) = match limit {
            Limit::Subflows => (floor.subflows, needed.subflows),
            Limit::AddAddrAccepted => (floor.add_addr_accepted, needed.add_addr_accepted),
        };
        if let Err(reason) = input.policy.allows_limit(&wish.source) {
            if asked != present {
                clash(draft, limit, &wish.source, asked, present, reason, false);
            }
            continue;
        }
        if asked < present {
            let reason = format!(
                "{} asks for the limit {limit} = {asked}, below the present {present}; connections that use more would lose by it",
                wish.source
            );
            if clash(draft, limit, &wish.source, asked, present, reason, true) != OnConflict::Override {
                continue;
            }
            match limit {
                Limit::Subflows => lowered.subflows = asked,
                Limit::AddAddrAccepted => lowered.add_addr_accepted = asked,
            }
        }
        is_asked = true;
        if asked < needs {
            draft.warn(format!("the limit {limit} = {asked} is raised to {needs}, which the endpoints asked for need"));
        }
        match limit {
            Limit::Subflows => needed.subflows = needs.max(asked),
            Limit::AddAddrAccepted => needed.add_addr_accepted = needs.max(asked),
        }
    }
    if !is_asked && needed == LimitPair::default() && input.previous.is_none_or(|record| record.limits.is_none()) {
        return Ok(());
    }
    let set = lowered.max(needed);
    let before = following::recorded_limits(input);
    let mut corrected = before.and_then(|own| own.corrected);
    if let Some(own) = before.filter(|_| set != now && !ours.iter().any(|own| own.set == now)) {
        if corrected.is_some() {
            following::leave_limits(draft, own, now);
            return Ok(());
        }
        corrected = Some(input.time);
    }
    if set != now {
        let why = "the endpoints and limits asked for";
        draft.step(Change::Limits(set.into()), Some(Change::Limits(now.into())), why);
    }
    draft.plan.limits = Some(OwnedLimits { original, needed, set, corrected });
    Ok(())
}

fn clash(
    draft: &mut Draft,
    limit: Limit,
    source: &crate::request::Source,
    asked: u32,
    present: u32,
    reason: String,
    can_override: bool,
) -> OnConflict {
    let holders = draft
        .input
        .siblings
        .iter()
        .filter(|record| record.limits.is_some())
        .map(|record| record.instance.container.id.clone())
        .collect();
    draft.clash(Clash {
        key: format!("limit.{limit}"),
        wanted: asked.to_string(),
        kept: present.to_string(),
        holders,
        reason,
        can_override,
        source,
        setting: None,
    })
}

/// The steps for one interface's endpoints, and its entry.
fn endpoints(draft: &mut Draft, place: &Place) -> Result<Interface> {
    let Some(index) = place.index else {
        return Ok(place.wanted.entry(State::Pending, Some("no such interface yet".into())));
    };
    let mut entry = place.wanted.entry(State::Applied, None);
    let mut left_out = Vec::new();
    let mut impossible = Vec::new();
    for candidate in &place.candidates {
        if candidate.chosen {
            let owned = match left_alone(draft, &mut entry, candidate.address) {
                Some(owned) => owned,
                None => match endpoint(draft, place, candidate.address, index) {
                    // The container runs: what is possible is done.
                    Err(error) if draft.input.follows => {
                        entry.corrected = None;
                        impossible.push(format!("{error:#}"));
                        continue;
                    }
                    owned => owned.context(place.wanted.name.clone())?,
                },
            };
            entry.endpoints.push(owned);
        } else {
            left_out.push(candidate.address.to_string());
        }
    }
    if place.candidates.is_empty() {
        entry.state = State::Pending;
        let waits = |address: &&Address| address.ifindex == index && draft.plan.put_off.contains(&address.ip);
        entry.reason = Some(match duplicate(draft, index) {
            _ if draft.input.facts.addresses.iter().any(|address| waits(&address)) => {
                "its link or its way out is not there yet".into()
            }
            Some(address) => format!("{address} is a duplicate address (DAD failed), and there is no other yet"),
            None => "no usable address yet (global, not temporary, deprecated or failed)".into(),
        });
    } else if !impossible.is_empty() {
        let reason = impossible.join("; ");
        draft.warn(format!("{}: {reason}", place.wanted.name));
        entry.reason = Some(reason);
        if entry.endpoints.is_empty() {
            entry.state = State::Ignored;
        }
    } else if !left_out.is_empty() {
        let left_out = listed(&left_out, ADDRESSES_MAX);
        let reason = format!("no endpoint for {left_out}: a namespace has at most {ENDPOINTS_MAX}");
        draft.warn(format!("{}: {reason}", place.wanted.name));
        entry.reason = Some(reason);
        if entry.endpoints.is_empty() {
            entry.state = State::Ignored;
        }
    }
    Ok(entry)
}

/// Our endpoint for an address, if somebody else changed it and that is not undone any more.
fn left_alone(draft: &Draft, entry: &mut Interface, address: IpAddr) -> Option<OwnedEndpoint> {
    if draft.input.previous.is_some_and(|record| record.at_work.is_some()) {
        // After interrupted work, a difference may be a half of our own.
        return None;
    }
    let own = following::recorded(draft.input, &entry.name)?.endpoints.iter().find(|own| own.address == address)?;
    let changed = present(draft, address).is_none_or(|now| now.flags != own.flags);
    let stays = changed && !following::puts_back(draft.input, entry, &format!("the endpoint {address}"));
    stays.then(|| own.clone())
}

/// An address of an interface that some other machine has, too.
fn duplicate(draft: &Draft, index: u32) -> Option<IpAddr> {
    let mut addresses = draft.input.facts.addresses.iter();
    addresses.find(|address| address.ifindex == index && address.is_duplicate()).map(|address| address.ip)
}

fn endpoint(draft: &mut Draft, place: &Place, address: IpAddr, index: u32) -> Result<OwnedEndpoint> {
    let mut flags = place.flags.0;
    let why = place.wanted.wish.source.place.clone();
    let name = &place.wanted.name;
    let known = owned(draft, address);
    // Under the id by which siblings know it, where that is free: also of what is added before it, to which the kernel may
    // give any free id.
    let id = known.map_or(0, |known| known.id);
    let is_in_use = draft.input.facts.endpoints.iter().any(|e| e.id == id)
        || draft.plan.steps.iter().any(|step| match &step.change {
            Change::AddEndpoint(other) => other.id == id || other.id == 0,
            _ => false,
        });
    let id = if is_in_use { 0 } else { id };
    let fresh = Endpoint { id, address, port: None, ifindex: index, flags };
    let now = present(draft, address).cloned();
    let (id, original) = match now {
        // The kernel replaces one that it made by itself.
        Some(now) if EndpointFlags(now.flags).contains(EndpointFlags::IMPLICIT) => {
            draft.step(Change::AddEndpoint(fresh.clone()), Some(Change::DeleteEndpoint(fresh)), why);
            (id, None)
        }
        None => {
            draft.step(Change::AddEndpoint(fresh.clone()), Some(Change::DeleteEndpoint(fresh)), why);
            (id, None)
        }
        Some(now) => {
            let original = match known {
                Some(known) => known.original,
                None => Some(now.flags),
            };
            if original.is_some() {
                // Leaving fullmesh out would close live subflows of somebody else's endpoint.
                flags |= now.flags & EndpointFlags::FULLMESH.0;
            }
            let changeable = (now.flags ^ flags) & !EndpointFlags::CHANGEABLE.0 == 0;
            // Somebody else's without an interface can be used as it is; it may leave by another one.
            let fits = now.ifindex == index || original.is_some() && now.ifindex == 0;
            if fits && changeable {
                if now.ifindex != index {
                    draft.warn(format!("{name}: the endpoint {address} was there before and is bound to no interface; its subflows may leave by another one"));
                }
                if now.flags != flags {
                    let wanted = Endpoint { flags, ..now.clone() };
                    draft.step(Change::SetEndpointFlags(wanted), Some(Change::SetEndpointFlags(now.clone())), why);
                }
                (now.id, original)
            } else if original.is_none() {
                // Under the same id, by which siblings know it.
                let fresh = Endpoint { id: now.id, ..fresh };
                draft.step(Change::DeleteEndpoint(now.clone()), Some(Change::AddEndpoint(now)), why.clone());
                draft.step(Change::AddEndpoint(fresh.clone()), Some(Change::DeleteEndpoint(fresh.clone())), why);
                (fresh.id, None)
            } else {
                bail!(
                    "somebody else made the endpoint {address} (id {}) as {}, which cannot be changed to {}; delete it first: ip mptcp endpoint delete id {}",
                    now.id,
                    EndpointFlags(now.flags).names().join(","),
                    place.flags.names().join(","),
                    now.id
                );
            }
        }
    };
    Ok(OwnedEndpoint { id, address, index, flags, original })
}

/// `off`: no endpoint of ours is left by now; what others do is only said.
fn off(draft: &mut Draft, one: &Wanted) {
    let Some(index) = one.index else {
        let entry = one.entry(State::Pending, Some("no such interface yet".into()));
        draft.plan.interfaces.push(entry);
        return;
    };
    let facts = draft.input.facts;
    let on_it = |endpoint: &Endpoint| {
        endpoint.ifindex == index || facts.addresses.iter().any(|a| a.ifindex == index && a.ip == endpoint.address)
    };
    let leaving: Vec<IpAddr> = draft.plan.leaving.iter().map(|endpoint| endpoint.address).collect();
    for endpoint in facts.endpoints.iter().filter(|e| on_it(e) && !leaving.contains(&e.address)) {
        draft.warn(format!(
            "{} is off, but somebody else's endpoint {} (id {}) still uses it",
            one.name, endpoint.address, endpoint.id
        ));
    }
    if facts.default_route_links.contains(&index) {
        draft.warn(format!(
            "{} is off, but the default route leaves by it: first subflows will use it all the same",
            one.name
        ));
    }
    let entry = one.entry(State::Applied, None);
    draft.plan.interfaces.push(entry);
}
