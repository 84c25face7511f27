//! Source routing (`routes=auto`): what leaves by an interface's address finds its way out by that interface, by a table of
//! the interface's own and rules that lead there. Nothing of the main table is touched.
//!
//! A strict `rp_filter` (1) asks which way an answer from the packet's destination to its source would take, bound to no
//! interface (`__fib_validate_source` in net/ipv4/fib_frontend.c): our rules by source address serve for that, too, so
//! that it can stay as it is. Only where a rule of somebody else comes before ours does it have to be loose (2).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{Clash, Draft, Input, following, named};
use crate::kernel::netlink::routing::{Gateway, PROTOCOL, gateways_of_others, has_direct_default};
use crate::kernel::{Change, ENDPOINTS_MAX, Facts, Link, RouteState, Routing, Rule, TableRoute};
use crate::ledger::record::{Interface, OwnedRouting, Record, State};
use crate::policy::{Barred, Policy};
use crate::request::flags::InterfaceFlags;
use crate::request::setting::{self, SettingKey};
use crate::request::{Rank, Request, Routes, What, Wish};

/// The first table that may be ours; the smaller numbers are what people give theirs.
const FIRST_TABLE: u32 = 7800;
/// Our rules come before the main table's (32766), and after what people number by hand.
const PRIORITY: u32 = 32_000;

/// `rp_filter`: the source has to be reachable by some interface (RFC 3704, "loose").
pub const LOOSE: &str = "2";

/// The values that make `rp_filter` what it is on an interface: the larger one counts.
pub fn rp_filters(interface: &str) -> [SettingKey; 2] {
    ["all", interface].map(|name| SettingKey::Sysctl(format!("net/ipv4/conf/{name}/rp_filter")))
}

/// What `rp_filter` is on an interface, where it was asked about.
fn strictest(input: &Input, interface: &str) -> Option<i128> {
    let value = |key: &SettingKey| setting::integer(input.facts.settings.get(key)?.target.value()?);
    rp_filters(interface).iter().filter_map(value).max()
}

/// Whether an interface drops packets whose answers would leave by another one, but for what we have done about it.
fn is_strict(input: &Input, interface: &str) -> bool {
    let strictest = strictest(input, interface);
    // What we have written ourselves is 1 without us.
    let relaxed = |record: &Record| record.all_netns_claims().any(|own| own.key == rp_filters(interface)[1]);
    strictest == Some(1) || strictest == Some(2) && input.previous.is_some_and(relaxed)
}

/// The interfaces whose `rp_filter` would drop the answers to what leaves by them, although our rules are there: a rule of
/// somebody else comes before them. With the wish that it comes from.
pub fn relaxed<'a>(input: &Input<'a>) -> Vec<(&'a Link, &'a Wish)> {
    let (Some(now), Some((wish, Routes::Auto))) = (&input.facts.routing, input.request.asked_routes()) else {
        return Vec::new();
    };
    if input.policy.allows_routes(&wish.source).is_err() {
        return Vec::new();
    }
    let mut links: Vec<(&Link, &Wish)> = Vec::new();
    for (address, index) in input.facts.elsewhere.iter().filter(|(address, _)| address.is_ipv4()) {
        let Some(link) = input.facts.links.iter().find(|link| link.index == *index) else { continue };
        let has_rule = now.rules.iter().any(|rule| rule.protocol == PROTOCOL && rule.from == Some(*address));
        let is_path = matches!(input.request.interface(&link.name), Ok(Some((_, InterfaceFlags::Endpoint(_)))));
        let is_known = links.iter().any(|(known, _)| known.index == *index);
        if has_rule && is_path && is_strict(input, &link.name) && !is_known {
            links.push((link, wish));
        }
    }
    links
}

/// The agent writes no setting. Where a filter stands against a way out that came after somebody asked, it says what does.
pub fn warn_of_filters(draft: &mut Draft) {
    let input = draft.input;
    for (link, wish) in relaxed(input) {
        let [_, key] = rp_filters(&link.name);
        if strictest(input, &link.name) != Some(1) || input.request.settings().contains_key(&key) {
            continue;
        }
        draft.warn(format!(
            "{}: {} makes it a way out, but somebody's rule comes first and rp_filter is strict: the kernel drops the answers that come in by it; mptcp-hook apply {} --routes auto makes it loose",
            link.name, wish.source, input.container
        ));
    }
}

/// The addresses whose ways out a plan may need: on each interface of which something is asked those that have an endpoint,
/// and of each family as many of the others as can get one. A container may have any number of them.
pub fn to_look_up(request: &Request, facts: &Facts) -> Vec<(IpAddr, u32)> {
    let is_asked = |name: &str| matches!(request.interface(name), Ok(Some((_, flags))) if !flags.is_off());
    let asked: BTreeSet<u32> = facts.links.iter().filter(|link| is_asked(&link.name)).map(|link| link.index).collect();
    let mut taken: BTreeMap<(u32, bool), usize> = BTreeMap::new();
    let usable = facts.addresses.iter().filter(|address| asked.contains(&address.ifindex) && address.is_usable());
    let needed = usable.filter(|address| {
        if facts.has_endpoint(address.ip) {
            return true;
        }
        let taken = taken.entry((address.ifindex, address.ip.is_ipv4())).or_default();
        *taken += 1;
        *taken <= ENDPOINTS_MAX
    });
    needed.map(|address| (address.ip, address.ifindex)).collect()
}

/// What was planned for one interface.
#[derive(Debug, Default)]
pub struct Ways {
    /// What is ours then.
    pub owned: Option<OwnedRouting>,
    /// Why some addresses have no way out.
    pub lacking: Option<String>,
    /// Whether somebody else has changed it.
    pub is_foreign: bool,
}

impl Ways {
    /// Enters them into the interface's record.
    pub fn enter(self, input: &Input, entry: &mut Interface) {
        entry.routing = self.owned;
        if self.is_foreign {
            following::puts_back(input, entry, "the rules of its way out");
        }
        if let (Some(lacking), State::Applied) = (self.lacking, entry.state) {
            entry.state = State::Pending;
            entry.reason = Some(lacking);
        }
    }
}

/// What of a table is ours: all that bears our mark there, whichever plan it is of. A record does not have all of it where
/// somebody else in the namespace, or a plan whose work was interrupted, made it.
pub fn ours(now: &Routing, table: u32) -> OwnedRouting {
    let is_ours = |rule: &&Rule| {
        rule.table == table && rule.protocol == PROTOCOL && [PRIORITY, PRIORITY + 1].contains(&rule.priority)
    };
    let routes = now.routes.iter().filter(|route| route.table == table && route.protocol == PROTOCOL);
    // The way to everywhere after what is on the link, which it stands on.
    let (everywhere, near): (Vec<_>, Vec<_>) = routes.cloned().partition(TableRoute::is_default);
    let routes = near.into_iter().chain(everywhere).collect();
    OwnedRouting { table, routes, rules: now.rules.iter().filter(is_ours).cloned().collect() }
}

/// Whether an interface has a way out by a gateway that nobody has named: the agent hears of routes for it.
pub fn is_learnt(policy: &Policy, request: &Request, interface: &Interface) -> bool {
    let routes = interface.routing.iter().flat_map(|routing| &routing.routes);
    let mut families = routes.filter(|route| route.is_default()).map(|route| route.destination.is_ipv4());
    families.any(|is_v4| policy.gateway(request, &interface.name, is_v4).is_none())
}

/// Takes back the ways out that no interface has any more: it is gone, nobody asks anything of it, or it needs none.
pub fn give_back_others(draft: &mut Draft) {
    let input = draft.input;
    let (Some(now), Some(previous)) = (&input.facts.routing, input.previous) else { return };
    let mut left = previous.tables();
    for kept in draft.plan.interfaces.iter().filter_map(|interface| interface.routing.as_ref()) {
        left.remove(&kept.table);
    }
    for table in &left {
        let why = format!("the way out in table {table}, which is not needed any more");
        change(draft, &ours(now, *table), &OwnedRouting::default(), &why);
    }
    draft.plan.leaving_tables = left;
}

/// Whether interfaces shall get ways out, and may. What the policy does not allow is settled here.
pub fn asked(draft: &mut Draft) -> bool {
    let input = draft.input;
    let Some((wish, Routes::Auto)) = input.request.asked_routes() else {
        if input
            .request
            .wishes()
            .iter()
            .any(|wish| matches!(wish.what, What::Gateway(..)) && wish.source.rank != Rank::Runtime)
        {
            draft.warn("gateway= does nothing without routes=auto");
        }
        return false;
    };
    let Err(reason) = input.policy.allows_routes(&wish.source) else {
        bar_gateways(draft);
        return true;
    };
    draft.clash(Clash {
        key: "routes".into(),
        wanted: Routes::Auto.to_string(),
        kept: Routes::Off.to_string(),
        holders: Vec::new(),
        reason,
        can_override: false,
        source: &wish.source,
        setting: None,
    });
    false
}

/// Settles the gateways that the policy does not allow. They are left out of the plan in any case.
fn bar_gateways(draft: &mut Draft) {
    let input = draft.input;
    for Barred { wish, pattern, gateway, reason } in input.policy.barred_gateways(input.request) {
        draft.clash(Clash {
            key: format!("gateway.{pattern}"),
            wanted: gateway.to_string(),
            kept: "unchanged".into(),
            holders: Vec::new(),
            reason: format!("{} names the gateway {gateway} for {pattern}, and {reason}", wish.source),
            can_override: false,
            source: &wish.source,
            setting: None,
        });
    }
}

/// Plans the way out of these addresses of an interface; `asked`: whether it shall have one.
pub fn plan(draft: &mut Draft, name: &str, index: u32, addresses: &[IpAddr], asked: bool) -> Ways {
    let input = draft.input;
    let mut ways = Ways::default();
    let Some(now) = input.facts.routing.as_ref().filter(|_| asked) else { return ways };
    let known = known(input, name, index);
    let before = known.map(|owned| ours(now, owned.table)).unwrap_or_default();
    let table = known.map_or_else(|| free_table(draft, now), |owned| owned.table);
    let is_down = input.facts.link(name).is_some_and(|link| link.flags & libc::IFF_UP as u32 == 0);
    let mut wanted = OwnedRouting { table, ..OwnedRouting::default() };
    for is_v4 in [true, false] {
        let sources: Vec<IpAddr> = addresses.iter().copied().filter(|address| address.is_ipv4() == is_v4).collect();
        let is_missing = |address: &IpAddr| input.facts.routes.get(&(*address, index)) == Some(&RouteState::Missing);
        let is_missing = sources.iter().any(is_missing);
        let is_elsewhere = sources.iter().any(|address| input.facts.elsewhere.contains(&(*address, index)));
        let is_there = before.rules.iter().any(|rule| rule.is_v4 == is_v4);
        if sources.is_empty() || !(is_there || is_missing || is_elsewhere) {
            continue;
        }
        if is_down {
            // The kernel takes no route by it, and has dropped those that were there. What is known of them is kept.
            ways.owned = known.cloned();
            ways.lacking = Some(format!("{name} is down; it gets its way out when it is up"));
            return ways;
        }
        let recorded = known.and_then(|owned| default_by(&owned.routes, index, is_v4));
        let gateway = gateway(input, now, recorded, name, index, is_v4);
        match gateway.map(|gateway| agreed(draft, name, index, gateway)) {
            None if needs_none(now, recorded, index, is_v4) => lead(draft, &mut wanted, name, index, &sources, None),
            Some(gateway) => lead(draft, &mut wanted, name, index, &sources, Some(gateway)),
            // Sockets that are bound get out, by routes that do not lead everywhere.
            None if !is_there && !is_missing => {}
            None => {
                let family = if is_v4 { "IPv4" } else { "IPv6" };
                ways.lacking = Some(format!(
                    "no {family} gateway is known for {name}: say --interface {name}=...,gateway=ADDRESS, or give it a default route"
                ));
            }
        }
    }
    ways.is_foreign = is_foreign(input, name, &before, &wanted);
    if ways.is_foreign && !following::is_first(input, name) {
        ways.owned = known.cloned();
        return ways;
    }
    // What was there before goes with the tables that nobody has any more.
    if !wanted.rules.is_empty() {
        change(draft, &before, &wanted, &format!("routes=auto of {name}"));
        ways.owned = Some(wanted);
    }
    ways
}

/// What is recorded of an interface's way out: this container's, else a sibling's.
fn known<'a>(input: &Input<'a>, name: &str, index: u32) -> Option<&'a OwnedRouting> {
    let of = |interface: &'a Interface| {
        let routing = interface.routing.as_ref()?;
        (interface.name == name || routing.routes.iter().any(|route| route.ifindex == index)).then_some(routing)
    };
    let records = input.previous.into_iter().flat_map(Record::versions).chain(input.siblings);
    records.flat_map(|record| &record.interfaces).find_map(of)
}

/// Whether somebody has deleted rules that are still wanted. The routes are another matter: the kernel itself drops them
/// with the link.
fn is_foreign(input: &Input, name: &str, before: &OwnedRouting, wanted: &OwnedRouting) -> bool {
    // After interrupted work, a difference may be a half of our own.
    let is_interrupted = input.previous.is_some_and(|record| record.at_work.is_some());
    let own = following::recorded(input, name).and_then(|entry| entry.routing.as_ref());
    let is_gone = |rule: &Rule| wanted.rules.contains(rule) && !before.rules.contains(rule);
    !is_interrupted && own.is_some_and(|own| own.rules.iter().any(is_gone))
}

/// A table that neither a route nor a rule knows, nor a record, nor the plan so far.
fn free_table(draft: &Draft, now: &Routing) -> u32 {
    let input = draft.input;
    let mut taken: BTreeSet<u32> = input.previous.into_iter().chain(input.siblings).flat_map(Record::tables).collect();
    taken.extend(draft.plan.steps.iter().filter_map(|step| match &step.change {
        Change::AddRule(rule) => Some(rule.table),
        _ => None,
    }));
    (FIRST_TABLE..).find(|table| !now.tables.contains(table) && !taken.contains(table)).unwrap_or(FIRST_TABLE)
}

/// The next hop: what is asked for, else what somebody's default route by this interface has, else what served until now
/// (the kernel drops all routes with the link, and a DHCP client may delete one before it adds the next), else what the
/// engine has written down. It is never guessed.
fn gateway(
    input: &Input,
    now: &Routing,
    recorded: Option<&TableRoute>,
    name: &str,
    index: u32,
    is_v4: bool,
) -> Option<Gateway> {
    let theirs = gateways_of_others(&now.routes, index, is_v4);
    let recorded = recorded.and_then(TableRoute::next_hop);
    // One that is on no link of an address that went cannot be used.
    let learnt = theirs.chain(recorded).filter(|gateway| gateway.onlink || is_near(input.facts, now, index, gateway));
    let learnt: Vec<Gateway> = learnt.collect();
    let named = |address: IpAddr| {
        let onlink = learnt.iter().any(|gateway| gateway.address == address && gateway.onlink);
        Gateway { address, onlink }
    };
    let asked = input.policy.gateway(input.request, name, is_v4).map(named);
    asked.or_else(|| learnt.first().copied()).or_else(|| input.request.engines_gateway(name, is_v4).map(named))
}

/// Whether packets to everywhere need no next hop by an interface: somebody has a default route by it that has none, or it
/// had one until now.
fn needs_none(now: &Routing, recorded: Option<&TableRoute>, index: u32, is_v4: bool) -> bool {
    has_direct_default(&now.routes, index, is_v4) || recorded.is_some_and(|route| route.gateway.is_none())
}

/// Whether an interface's addresses or routes say that a machine is on its link.
fn is_near(facts: &Facts, now: &Routing, index: u32, gateway: &Gateway) -> bool {
    let address = gateway.address;
    let is_in = |other: IpAddr, prefix| {
        other.is_ipv4() == address.is_ipv4() && network(address, prefix) == network(other, prefix)
    };
    let mut addresses = facts.addresses.iter().filter(|own| own.ifindex == index);
    let on_link = |route: &&TableRoute| route.ifindex == index && route.gateway.is_none() && route.protocol != PROTOCOL;
    matches!(address, IpAddr::V6(ip) if ip.is_unicast_link_local())
        || addresses.any(|own| is_in(own.ip, own.prefix))
        || now.routes.iter().filter(on_link).any(|route| is_in(route.destination, route.prefix))
}

/// The default route by an interface among these.
fn default_by(routes: &[TableRoute], index: u32, is_v4: bool) -> Option<&TableRoute> {
    let leads =
        |route: &&TableRoute| route.is_default() && route.ifindex == index && route.destination.is_ipv4() == is_v4;
    routes.iter().find(leads)
}

/// The next hop of the default route by an interface among these.
fn next_hop(routes: &[TableRoute], index: u32, is_v4: bool) -> Option<Gateway> {
    default_by(routes, index, is_v4).and_then(TableRoute::next_hop)
}

/// The next hop that a sibling relies on, if it is another one: a namespace has one way out by an interface. A gateway that
/// is learnt may be another one by now; then it counts only against one that the sibling has named.
fn agreed(draft: &mut Draft, name: &str, index: u32, gateway: Gateway) -> Gateway {
    let input = draft.input;
    let is_v4 = gateway.address.is_ipv4();
    let is_named_by = |request: &Request| input.policy.gateway(request, name, is_v4).is_some();
    let is_named = is_named_by(input.request);
    let of = |record: &Record| {
        let routing = record.interfaces.iter().filter_map(|interface| interface.routing.as_ref());
        let held = routing.into_iter().find_map(|routing| next_hop(&routing.routes, index, is_v4))?;
        (is_named || is_named_by(&record.request)).then_some(held)
    };
    let held: Vec<(String, Gateway)> = input
        .siblings
        .iter()
        .filter_map(|record| Some((record.instance.container.id.clone(), of(record)?)))
        .filter(|(_, theirs)| theirs.address != gateway.address)
        .collect();
    let Some((_, kept)) = held.first() else { return gateway };
    let kept = *kept;
    let ids: Vec<String> = held.into_iter().map(|(id, _)| id).collect();
    if let Some((wish, _)) = input.request.asked_routes() {
        draft.clash(Clash {
            key: format!("gateway.{name}"),
            wanted: gateway.address.to_string(),
            kept: kept.address.to_string(),
            reason: format!(
                "{name} shall leave by {}, and {} in the same network namespace rely on {}",
                gateway.address,
                named(&ids),
                kept.address
            ),
            holders: ids,
            can_override: false,
            source: &wish.source,
            setting: None,
        });
    }
    kept
}

/// Rules for these addresses, all of one family, and a table with what is on the link and the way to everywhere else.
fn lead(
    draft: &Draft,
    wanted: &mut OwnedRouting,
    name: &str,
    index: u32,
    sources: &[IpAddr],
    gateway: Option<Gateway>,
) {
    let Some(first) = sources.first() else { return };
    let (table, is_v4) = (wanted.table, first.is_ipv4());
    for address in &draft.input.facts.addresses {
        if address.ifindex != index || !sources.contains(&address.ip) {
            continue;
        }
        let route = TableRoute {
            table,
            destination: network(address.ip, address.prefix),
            prefix: address.prefix,
            gateway: None,
            onlink: false,
            ifindex: index,
            protocol: PROTOCOL,
        };
        if !wanted.routes.contains(&route) {
            wanted.routes.push(route);
        }
    }
    wanted.routes.push(TableRoute {
        table,
        destination: network(*first, 0),
        prefix: 0,
        gateway: gateway.map(|gateway| gateway.address),
        onlink: gateway.is_some_and(|gateway| gateway.onlink),
        ifindex: index,
        protocol: PROTOCOL,
    });
    let rule = |from, oif, priority| Rule { is_v4, priority, from, oif, table, protocol: PROTOCOL };
    wanted.rules.extend(sources.iter().map(|source| rule(Some(*source), None, PRIORITY)));
    // For sockets that are bound to the interface before they have an address.
    wanted.rules.push(rule(None, Some(name.to_string()), PRIORITY + 1));
}

/// The network of an address.
fn network(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(ip) => {
            IpAddr::V4((u32::from(ip) & u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)).into())
        }
        IpAddr::V6(ip) => {
            IpAddr::V6((u128::from(ip) & u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0)).into())
        }
    }
}

/// The steps from what is ours in a table to what shall be. A rule never leads to a table that is empty.
fn change(draft: &mut Draft, before: &OwnedRouting, wanted: &OwnedRouting, why: &str) {
    let input = draft.input;
    let siblings = input.siblings.iter().flat_map(Record::versions).flat_map(|record| &record.interfaces);
    let theirs: Vec<&OwnedRouting> = siblings.filter_map(|interface| interface.routing.as_ref()).collect();
    // Of two routes to the same destination a table has one.
    let gives_way = |route: &TableRoute| {
        let same = |new: &TableRoute| (new.destination, new.prefix) == (route.destination, route.prefix);
        wanted.routes.iter().any(same) || !theirs.iter().any(|routing| routing.routes.contains(route))
    };
    for rule in before.rules.iter().filter(|rule| !wanted.rules.contains(rule)) {
        if !theirs.iter().any(|routing| routing.rules.contains(rule)) {
            draft.step(Change::DeleteRule(rule.clone()), Some(Change::AddRule(rule.clone())), why);
        }
    }
    let both = |route: &TableRoute| {
        let by = link_name(input.facts, route.ifindex);
        (Change::AddRoute(route.clone(), by.clone()), Change::DeleteRoute(route.clone(), by))
    };
    for route in before.routes.iter().rev().filter(|route| !wanted.routes.contains(route) && gives_way(route)) {
        let (add, delete) = both(route);
        draft.step(delete, Some(add), why);
    }
    for route in wanted.routes.iter().filter(|route| !before.routes.contains(route)) {
        let (add, delete) = both(route);
        draft.step(add, Some(delete), why);
    }
    for rule in wanted.rules.iter().filter(|rule| !before.rules.contains(rule)) {
        let is_strict = || wanted.routes.iter().any(|route| is_strict(input, &link_name(input.facts, route.ifindex)));
        draft.plan.looks_again |= rule.is_v4 && is_strict();
        draft.step(Change::AddRule(rule.clone()), Some(Change::DeleteRule(rule.clone())), why);
    }
}

/// The name of an interface, for people.
pub fn link_name(facts: &Facts, index: u32) -> String {
    facts.link_at(index).map_or_else(|| format!("index {index}"), |link| link.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let of = |address: &str, prefix| network(address.parse().unwrap(), prefix).to_string();
        assert_eq!(of("10.0.2.77", 24), "10.0.2.0");
        assert_eq!(of("10.0.2.77", 32), "10.0.2.77");
        assert_eq!(of("10.0.2.77", 0), "0.0.0.0");
        assert_eq!(of("fd00:1:2:3:4::5", 64), "fd00:1:2:3::");
        assert_eq!(of("fd00::5", 128), "fd00::5");
        assert_eq!(of("fd00::5", 0), "::");
    }
}
