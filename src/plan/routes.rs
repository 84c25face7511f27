//! Source routing (`routes=auto`): what leaves by an interface's address finds its way out by that interface, by a table of
//! the interface's own and rules that lead there. Nothing of the main table is touched.

use std::net::IpAddr;

use super::{Clash, Draft, named};
use crate::kernel::netlink::routing::PROTOCOL;
use crate::kernel::{Change, RouteState, Routing, Rule, TableRoute};
use crate::ledger::record::{Interface, OwnedRouting, Record, State};
use crate::request::{Routes, What};

/// The first table that may be ours; the smaller numbers are what people give theirs.
const FIRST_TABLE: u32 = 7800;
/// Our rules come before the main table's (32766), and after what people number by hand.
const PRIORITY: u32 = 32_000;

/// What was planned for one interface.
#[derive(Debug, Default)]
pub struct Ways {
    /// What is ours then.
    pub owned: Option<OwnedRouting>,
    /// Why some addresses have no way out.
    pub lacking: Option<String>,
}

impl Ways {
    /// Enters them into the interface's record.
    pub fn enter(self, entry: &mut Interface) {
        entry.routing = self.owned;
        if let (Some(lacking), State::Applied) = (self.lacking, entry.state) {
            entry.state = State::Pending;
            entry.reason = Some(lacking);
        }
    }
}

/// Takes back the ways out of interfaces that are gone, or that nobody asks anything of any more.
pub fn give_back_others(draft: &mut Draft) {
    let input = draft.input;
    let (Some(now), Some(previous)) = (&input.facts.routing, input.previous) else { return };
    let mut done: Vec<u32> = draft
        .plan
        .interfaces
        .iter()
        .filter_map(|interface| interface.routing.as_ref())
        .map(|owned| owned.table)
        .collect();
    for interface in previous.versions().flat_map(|record| &record.interfaces) {
        let Some(owned) = interface.routing.as_ref().filter(|owned| !done.contains(&owned.table)) else { continue };
        done.push(owned.table);
        let planned = |change: &Change| draft.plan.steps.iter().any(|step| step.change == *change);
        let left = OwnedRouting {
            table: owned.table,
            routes: owned.routes.iter().filter(|r| !planned(&Change::DeleteRoute((*r).clone()))).cloned().collect(),
            rules: owned.rules.iter().filter(|r| !planned(&Change::DeleteRule((*r).clone()))).cloned().collect(),
        };
        change(draft, &interface.name, now, &left, &OwnedRouting::default());
    }
}

/// Whether interfaces shall get ways out, and may. What the policy does not allow is settled here.
pub fn asked(draft: &mut Draft) -> bool {
    let input = draft.input;
    let Some((wish, Routes::Auto)) = input.request.asked_routes() else {
        if input.request.wishes().iter().any(|wish| matches!(wish.what, What::Gateway(..))) {
            draft.warn("gateway= does nothing without routes=auto");
        }
        return false;
    };
    let Err(reason) = input.policy.allows_routes(&wish.source) else { return true };
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

/// Plans the way out of these addresses of an interface; `asked`: whether it shall have one.
pub fn plan(draft: &mut Draft, name: &str, index: u32, addresses: &[IpAddr], asked: bool) -> Ways {
    let input = draft.input;
    let Some(now) = &input.facts.routing else { return Ways::default() };
    let before = known(draft, name, index);
    let mut ways = Ways::default();
    let mut wanted = OwnedRouting {
        table: before.map_or_else(|| free_table(draft, now), |owned| owned.table),
        ..OwnedRouting::default()
    };
    if asked {
        for is_v4 in [true, false] {
            let sources: Vec<IpAddr> = addresses.iter().copied().filter(|address| address.is_ipv4() == is_v4).collect();
            let state = |address: &IpAddr| input.facts.routes.get(&(*address, index)).copied().unwrap_or_default();
            let ours = before.is_some_and(|owned| owned.rules.iter().any(|rule| rule.is_v4 == is_v4));
            if sources.is_empty() || !ours && !sources.iter().any(|address| state(address) == RouteState::Missing) {
                continue;
            }
            let gateway = gateway(draft, now, name, index, is_v4);
            match gateway.map(|gateway| agreed(draft, name, index, gateway)) {
                Some(gateway) => lead(draft, &mut wanted, name, index, &sources, gateway),
                None => {
                    let family = if is_v4 { "IPv4" } else { "IPv6" };
                    ways.lacking = Some(format!(
                        "no {family} gateway is known for {name}: say --interface {name}=...,gateway=ADDRESS, or give it a default route"
                    ));
                }
            }
        }
    }
    let none = OwnedRouting::default();
    change(draft, name, now, before.unwrap_or(&none), &wanted);
    ways.owned = (!wanted.rules.is_empty()).then_some(wanted);
    ways
}

/// What of an interface's routing is ours: this container's, else a sibling's.
fn known<'a>(draft: &Draft<'a>, name: &str, index: u32) -> Option<&'a OwnedRouting> {
    let input = draft.input;
    let of = |interface: &'a Interface| {
        let routing = interface.routing.as_ref()?;
        (interface.name == name || routing.routes.iter().any(|route| route.ifindex == index)).then_some(routing)
    };
    let records = input.previous.into_iter().flat_map(Record::versions).chain(input.siblings);
    records.flat_map(|record| &record.interfaces).find_map(of)
}

/// A table that neither a route nor a rule knows, nor the plan so far.
fn free_table(draft: &Draft, now: &Routing) -> u32 {
    let planned = |table: u32| {
        draft.plan.steps.iter().any(|step| matches!(&step.change, Change::AddRule(rule) if rule.table == table))
    };
    let taken = |table: &u32| {
        now.routes.iter().any(|route| route.table == *table)
            || now.rules.iter().any(|rule| rule.table == *table)
            || planned(*table)
    };
    (FIRST_TABLE..).find(|table| !taken(table)).unwrap_or(FIRST_TABLE)
}

/// The next hop: what is asked for, else what somebody's default route by this interface has. It is never guessed.
fn gateway(draft: &Draft, now: &Routing, name: &str, index: u32, is_v4: bool) -> Option<IpAddr> {
    let asked = draft.input.request.gateway(name, is_v4);
    let theirs = || {
        let mut defaults = now.routes.iter().filter(|route| {
            route.is_default()
                && route.ifindex == index
                && route.protocol != PROTOCOL
                && route.destination.is_ipv4() == is_v4
        });
        defaults.find_map(|route| route.gateway)
    };
    asked.or_else(theirs)
}

/// The next hop that a sibling relies on, if it is another one: a namespace has one way out by an interface.
fn agreed(draft: &mut Draft, name: &str, index: u32, gateway: IpAddr) -> IpAddr {
    let input = draft.input;
    let of = |record: &Record| {
        let routing = record.interfaces.iter().filter_map(|interface| interface.routing.as_ref());
        let mut routes = routing.flat_map(|routing| &routing.routes);
        let same = |route: &&TableRoute| {
            route.is_default() && route.ifindex == index && route.destination.is_ipv4() == gateway.is_ipv4()
        };
        routes.find(same).and_then(|route| route.gateway)
    };
    let held: Vec<(String, IpAddr)> = input
        .siblings
        .iter()
        .filter_map(|record| Some((record.instance.container.id.clone(), of(record)?)))
        .filter(|(_, theirs)| *theirs != gateway)
        .collect();
    let Some((_, kept)) = held.first() else { return gateway };
    let kept = *kept;
    let ids: Vec<String> = held.into_iter().map(|(id, _)| id).collect();
    if let Some((wish, _)) = input.request.asked_routes() {
        draft.clash(Clash {
            key: format!("gateway.{name}"),
            wanted: gateway.to_string(),
            kept: kept.to_string(),
            reason: format!(
                "{name} shall leave by {gateway}, and {} in the same network namespace rely on {kept}",
                named(&ids)
            ),
            holders: ids,
            can_override: false,
            source: &wish.source,
            setting: None,
        });
    }
    kept
}

/// Rules for these addresses, and a table with what is on the link and the way to everywhere else.
fn lead(draft: &Draft, wanted: &mut OwnedRouting, name: &str, index: u32, sources: &[IpAddr], gateway: IpAddr) {
    let (table, is_v4) = (wanted.table, gateway.is_ipv4());
    for address in &draft.input.facts.addresses {
        if address.ifindex != index || !sources.contains(&address.ip) {
            continue;
        }
        let route = TableRoute {
            table,
            destination: network(address.ip, address.prefix),
            prefix: address.prefix,
            gateway: None,
            ifindex: index,
            protocol: PROTOCOL,
        };
        if !wanted.routes.contains(&route) {
            wanted.routes.push(route);
        }
    }
    let everywhere = network(gateway, 0);
    wanted.routes.push(TableRoute {
        table,
        destination: everywhere,
        prefix: 0,
        gateway: Some(gateway),
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

/// The steps from what is ours to what shall be. A rule never leads to a table that is empty.
fn change(draft: &mut Draft, name: &str, now: &Routing, before: &OwnedRouting, wanted: &OwnedRouting) {
    let input = draft.input;
    let theirs = |owned: &OwnedRouting| {
        let mut siblings = input.siblings.iter().flat_map(|record| &record.interfaces);
        siblings.any(|interface| interface.routing.as_ref().is_some_and(|routing| routing.table == owned.table))
    };
    if !theirs(before) {
        let why = format!("{name}, which does not need it any more");
        for rule in before.rules.iter().filter(|rule| !wanted.rules.contains(rule) && now.rules.contains(rule)) {
            draft.step(Change::DeleteRule(rule.clone()), Some(Change::AddRule(rule.clone())), why.clone());
        }
        for route in
            before.routes.iter().rev().filter(|route| !wanted.routes.contains(route) && now.routes.contains(route))
        {
            draft.step(Change::DeleteRoute(route.clone()), Some(Change::AddRoute(route.clone())), why.clone());
        }
    }
    let why = format!("routes=auto of {name}");
    for route in wanted.routes.iter().filter(|route| !now.routes.contains(route)) {
        draft.step(Change::AddRoute(route.clone()), Some(Change::DeleteRoute(route.clone())), why.clone());
    }
    for rule in wanted.rules.iter().filter(|rule| !now.rules.contains(rule)) {
        draft.step(Change::AddRule(rule.clone()), Some(Change::DeleteRule(rule.clone())), why.clone());
    }
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
