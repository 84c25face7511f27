//! What is wrong with a container's paths: a pure function of what was read in its namespace and in the ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::finding::{self, Finding};
use super::sockets;
use crate::kernel::netlink::ways::{Entry, Hop, Neighbour};
use crate::kernel::{Address, ENDPOINTS_MAX, Endpoint, Facts, Kind, Limits, Link, upstream};
use crate::ledger::record::{Interface, Record, State};
use crate::request::flags::EndpointFlags;
use crate::request::setting::{self, SettingKey};

/// The first number that is tried for a table of our own making: far from those that the kernel names.
const FIRST_TABLE: u32 = 101;

/// Everything that was read.
pub struct Seen {
    /// How a person names the target on our command line: `web`, `--pid 12`.
    pub target: String,
    /// What stands before a command that is to run in its namespace; empty in our own.
    pub enter: String,
    /// What the ledger has of it, if it is known.
    pub known: Option<Known>,
    /// What the kernel is like.
    pub facts: Facts,
    /// The ways out, by address.
    pub ways: BTreeMap<IpAddr, Way>,
    /// The routes of all tables.
    pub routes: Vec<Entry>,
    /// Who was asked on the links.
    pub neighbours: Vec<Neighbour>,
    /// `rp_filter` of `conf.all`, and of each interface by index.
    pub rp_filter: (u8, BTreeMap<u32, u8>),
    /// The sockets, where the kernel lists them.
    pub sockets: Option<sockets::Seen>,
    /// The namespace's counters of connections that fell back to plain TCP.
    pub fallbacks: Vec<(String, u64)>,
    /// Other programs in the namespace that manage endpoints: name and pid.
    pub managers: Vec<(String, u32)>,
}

/// What the ledger has of the container, brought up to date.
pub struct Known {
    /// Its record.
    pub record: Record,
    /// Whether a hook was killed while it worked for it.
    pub interrupted: bool,
    /// Why nobody follows it, if somebody should.
    pub not_followed: Option<String>,
    /// The settings that somebody has changed, with their values now.
    pub drifted: Vec<(SettingKey, String)>,
}

/// The ways of packets from one address to the world outside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Bound to the interface that has the address.
    pub bound: Option<Hop>,
    /// Bound to none.
    pub free: Option<Hop>,
}

impl Seen {
    /// The interface of that index.
    pub fn link(&self, index: u32) -> Option<&Link> {
        self.facts.links.iter().find(|link| link.index == index)
    }

    /// An interface's name, for people.
    pub fn link_name(&self, index: u32) -> String {
        self.link(index).map_or_else(|| format!("interface {index}"), |link| link.name.clone())
    }

    /// The interface that has the address.
    pub fn home(&self, address: IpAddr) -> Option<&Link> {
        let assigned = self.facts.addresses.iter().find(|assigned| assigned.ip == address)?;
        self.link(assigned.ifindex)
    }

    /// A command as it runs in the namespace. Several stand in one shell, or the prefix would be for the first alone.
    pub fn inside(&self, commands: &[String]) -> String {
        let all = commands.join(" && ");
        match (self.enter.as_str(), commands.len()) {
            ("", _) => all,
            (enter, 1) => format!("{enter} {all}"),
            (enter, _) => format!("{enter} sh -ec '{all}'"),
        }
    }

    /// The words that have the hook do again what was asked for.
    fn apply_again(&self) -> String {
        format!("mptcp-hook apply {}", self.target)
    }
}

/// All that is wrong.
pub fn judge(seen: &Seen) -> Vec<Finding> {
    let mut found = Vec::new();
    known(seen, &mut found);
    if seen.facts.kind == Kind::Upstream {
        works(seen, &mut found);
        for endpoint in
            seen.facts.endpoints.iter().filter(|e| !EndpointFlags(e.flags).contains(EndpointFlags::IMPLICIT))
        {
            judge_endpoint(seen, endpoint, &mut found);
        }
        limits(seen, &mut found);
        mtu(seen, &mut found);
        let flags = seen.facts.endpoints.iter().map(|endpoint| EndpointFlags(endpoint.flags));
        let bug = flags
            .filter(|f| f.contains(EndpointFlags::BACKUP))
            .find_map(|f| upstream::backup_bug(&seen.facts.release, f));
        if let Some(bug) = bug {
            let what = format!("this kernel {bug}");
            found.push(Finding::new(&finding::BACKUP_BUG, what, &seen.facts.release).mend("run Linux 6.11 or newer"));
        }
        sockets::judge(seen, &mut found);
    } else {
        let what = format!("only the interfaces' flags were looked at: the kernel is {}", seen.facts.kind.name());
        found.push(Finding::new(&finding::NOT_JUDGED, what, &seen.facts.release));
    }
    for (name, pid) in &seen.managers {
        found.push(
            Finding::new(
                &finding::OTHER_MANAGER,
                format!("{name} runs in this network namespace"),
                format!("pid {pid}"),
            )
            .mend(manager_advice(name)),
        );
    }
    finding::sort(&mut found);
    found.dedup();
    found
}

/// How another manager is kept away from endpoints.
pub fn manager_advice(name: &str) -> &'static str {
    match name {
        "NetworkManager" => {
            "set connection.mptcp-flags=disabled (0x1) for the interfaces that are ours, or leave them to it"
        }
        _ => "stop it, or ask for no interfaces here",
    }
}

/// What the ledger has against what the kernel has.
fn known(seen: &Seen, found: &mut Vec<Finding>) {
    let Some(known) = &seen.known else {
        let evidence = "no record of it in the ledger";
        found.push(Finding::new(&finding::CONTAINER_UNKNOWN, "the hook has not set this namespace up", evidence));
        return;
    };
    let record = &known.record;
    if known.interrupted {
        let evidence = record.at_work.as_ref().map_or(String::new(), |work| format!("pid {} is gone", work.pid));
        found.push(
            Finding::new(&finding::INTERRUPTED, crate::status::INTERRUPTED, evidence)
                .mend("finish it")
                .by(seen.apply_again()),
        );
        return;
    }
    for (key, now) in &known.drifted {
        let asked = record.netns_claims().find(|own| own.key == *key).map(|own| own.value.as_str()).unwrap_or_default();
        let what =
            format!("{key} is {} and not {}, as asked for", setting::describe(key, now), setting::describe(key, asked));
        let finding = Finding::new(&finding::SETTING_DRIFTED, what, format!("{key} = {now}"));
        let path = key.sysctl_path().unwrap_or_default();
        found.push(finding.mend("write it again").by(seen.inside(&[format!("sysctl -w {path}='{asked}'")])));
    }
    if let Some(why) = &known.not_followed {
        let finding = Finding::new(&finding::NOT_FOLLOWED, "nobody follows this container", why);
        found.push(finding.mend("start the agent: enable its unit where systemd runs, else").by("mptcp-hook agent &"));
    }
    for warning in record.warnings.iter().take(record.lasting_warnings) {
        found.push(Finding::new(&finding::HOOK_WARNING, warning, "in the container's record"));
    }
    for interface in &record.interfaces {
        judge_interface(seen, interface, found);
    }
}

fn judge_interface(seen: &Seen, interface: &Interface, found: &mut Vec<Finding>) {
    let name = interface.name.as_str();
    let reason = interface.reason.clone().unwrap_or_default();
    let add = |found: &mut Vec<Finding>, finding: Finding, mend: &str| {
        found.push(finding.on(name).mend(mend).by(seen.apply_again()));
    };
    if interface.state == State::Ignored {
        found.push(Finding::new(&finding::INTERFACE_IGNORED, format!("{name} is left alone"), reason).on(name));
        return;
    }
    let Some(link) = seen.facts.link(name) else {
        let finding =
            Finding::new(&finding::INTERFACE_MISSING, format!("there is no interface {name}"), "not among the links");
        add(found, finding, "attach it; unless the agent follows the container, then");
        return;
    };
    let before = found.len();
    for own in &interface.endpoints {
        let now = seen.facts.endpoints.iter().find(|e| e.address == own.address && e.port.is_none());
        let names = |flags: u32| EndpointFlags(flags).names().join(",");
        match now {
            _ if seen.home(own.address).is_none() => {
                let what = format!("the address {} is not on {name} any more", own.address);
                let evidence = match now {
                    Some(now) => format!("endpoint id {} is still there, the address is not", now.id),
                    None => "neither endpoint nor address is there".into(),
                };
                add(found, Finding::new(&finding::ADDRESS_MISSING, what, evidence), "bring the endpoints up to date");
            }
            None => {
                let what = format!("somebody deleted the endpoint {}", own.address);
                add(found, Finding::new(&finding::ENDPOINT_MISSING, what, "not among the endpoints"), "make it again");
            }
            Some(now) if now.flags != own.flags => {
                let what = format!("the endpoint {} is {} and not {}", own.address, names(now.flags), names(own.flags));
                let evidence = format!("flags {:#x}, asked for {:#x}", now.flags, own.flags);
                add(found, Finding::new(&finding::ENDPOINT_FLAGS, what, evidence), "give it its flags back");
            }
            Some(_) => {}
        }
    }
    let wants_endpoints = interface.flags.iter().all(|flag| flag != "off" && flag != "default");
    if wants_endpoints && seen.facts.kind == Kind::Upstream {
        let usable: Vec<&Address> =
            seen.facts.addresses.iter().filter(|a| a.ifindex == link.index && a.is_usable()).collect();
        if usable.is_empty() {
            let what = format!("{name} has no address that can be used");
            let finding = Finding::new(&finding::ADDRESS_NONE, what, "no global address on it");
            add(found, finding, "give it one; unless the agent follows the container, then");
        }
        let has_room = seen.facts.endpoints.len() < ENDPOINTS_MAX;
        for address in usable {
            let has_one = seen.facts.endpoints.iter().any(|e| e.address == address.ip);
            let is_ours = interface.endpoints.iter().any(|own| own.address == address.ip);
            if !has_one && !is_ours && has_room {
                let what = format!("the address {} of {name} has no endpoint", address.ip);
                let mend = "make one; with --follow always the agent does when addresses change";
                add(found, Finding::new(&finding::ADDRESS_UNUSED, what, "not among the endpoints"), mend);
            }
        }
    }
    if interface.state == State::Drifted && found.len() == before {
        add(found, Finding::new(&finding::INTERFACE_DRIFTED, format!("{name} was changed"), reason), "set it again");
    }
}

/// Whether MPTCP is on and the kernel's path manager at work.
fn works(seen: &Seen, found: &mut Vec<Finding>) {
    let value = |name: &str| {
        let key = SettingKey::Sysctl(format!("net/mptcp/{name}"));
        seen.facts.settings.get(&key).and_then(|s| s.target.value()).map(String::from)
    };
    if let Some(off) = value("enabled").filter(|v| setting::integer(v) == Some(0)) {
        found.push(
            Finding::new(
                &finding::MPTCP_OFF,
                "MPTCP is switched off in this network namespace",
                format!("net.mptcp.enabled = {off}"),
            )
            .mend("switch it on; programs have to open new sockets")
            .by(seen.inside(&["sysctl -w net.mptcp.enabled=1".into()])),
        );
    }
    let by_name = value("path_manager").filter(|name| name != "kernel").map(|name| ("path_manager", "kernel", name));
    let by_type = value("pm_type").filter(|n| setting::integer(n).is_some_and(|n| n != 0)).map(|n| ("pm_type", "0", n));
    if let Some((key, wanted, now)) = by_name.or(by_type) {
        found.push(
            Finding::new(
                &finding::PM_USERSPACE,
                "the path manager is not the kernel's",
                format!("net.mptcp.{key} = {now}"),
            )
            .mend("give it back to the kernel, or run the daemon (mptcpd)")
            .by(seen.inside(&[format!("sysctl -w net.mptcp.{key}={wanted}")])),
        );
    }
}

fn judge_endpoint(seen: &Seen, endpoint: &Endpoint, found: &mut Vec<Finding>) {
    let flags = EndpointFlags(endpoint.flags);
    let (id, address) = (endpoint.id, endpoint.address);
    let words = flags.names().join(" ");
    let shown = format!("{address} id {id} {}", flags.names().join(","));
    let Some(home) = seen.home(address) else {
        let is_ours = seen.known.iter().flat_map(|known| known.record.endpoints()).any(|own| own.address == address);
        if !is_ours {
            found.push(
                Finding::new(
                    &finding::ADDRESS_MISSING,
                    format!("the endpoint {shown} has no address"),
                    "no interface has it",
                )
                .mend("add the address, or delete the endpoint")
                .by(seen.inside(&[format!("ip mptcp endpoint delete id {id}")])),
            );
        }
        return;
    };
    let name = home.name.as_str();
    let rebuilt = |device: &str| {
        seen.inside(&[
            format!("ip mptcp endpoint delete id {id}"),
            format!("ip mptcp endpoint add {address} id {id} dev {device} {words}"),
        ])
    };
    let purposes = EndpointFlags::SIGNAL.0 | EndpointFlags::SUBFLOW.0 | EndpointFlags::LAMINAR.0;
    if endpoint.flags & purposes == 0 {
        let what = format!("the endpoint {shown} is neither subflow nor signal");
        let command = seen.inside(&[
            format!("ip mptcp endpoint delete id {id}"),
            format!("ip mptcp endpoint add {address} id {id} dev {name} subflow {words}").trim_end().into(),
        ]);
        let finding = Finding::new(&finding::ENDPOINT_INERT, what, format!("flags {:#x}", endpoint.flags));
        found.push(finding.on(name).mend("make it a subflow endpoint").by(command));
    }
    if home.flags & libc::IFF_LOOPBACK as u32 != 0 {
        return;
    }
    if endpoint.ifindex != 0 && endpoint.ifindex != home.index {
        let what = format!(
            "the endpoint {shown} is bound to {} and its address is on {name}",
            seen.link_name(endpoint.ifindex)
        );
        let finding = Finding::new(&finding::ENDPOINT_DEVICE, what, format!("interface index {}", endpoint.ifindex));
        found.push(finding.on(name).mend("bind it to the interface of its address").by(rebuilt(name)));
        return;
    }
    if !home.is_running() {
        let what = format!("{name}, with the endpoint {shown}, is down or has no carrier");
        found.push(
            Finding::new(&finding::INTERFACE_DOWN, what, format!("flags {:#x}", home.flags))
                .on(name)
                .mend("set both of its ends up")
                .by(seen.inside(&[format!("ip link set {name} up")])),
        );
        return;
    }
    judge_way(seen, endpoint, home, &rebuilt, found);
}

/// Whether packets from the endpoint's address leave by its interface, to somebody who answers.
fn judge_way(
    seen: &Seen,
    endpoint: &Endpoint,
    home: &Link,
    rebuilt: &dyn Fn(&str) -> String,
    found: &mut Vec<Finding>,
) {
    let (name, address) = (home.name.as_str(), endpoint.address);
    let way = seen.ways.get(&address).cloned().unwrap_or_default();
    let here = |hop: &Option<Hop>| hop.as_ref().is_some_and(|hop| hop.ifindex == home.index);
    let show = |hop: &Option<Hop>| match hop {
        Some(Hop { ifindex, gateway: Some(gateway) }) => format!("via {gateway} dev {}", seen.link_name(*ifindex)),
        Some(Hop { ifindex, gateway: None }) => format!("dev {}", seen.link_name(*ifindex)),
        None => "unreachable".into(),
    };
    let (mend, command) = source_rule(seen, endpoint, home, &way);
    if endpoint.ifindex == 0 && !here(&way.free) {
        let what = format!("the endpoint {address} is bound to no interface, and its packets leave not by {name}");
        let evidence = format!("endpoint without dev; route from {address}: {}", show(&way.free));
        let finding = Finding::new(&finding::ENDPOINT_UNBOUND, what, evidence).on(name);
        found.push(finding.mend("bind it (and see that there is a route)").by(rebuilt(name)));
    }
    let (all, own) = (seen.rp_filter.0, seen.rp_filter.1.get(&home.index).copied().unwrap_or(0));
    let is_strict = address.is_ipv4() && all.max(own) == 1;
    let is_signal = EndpointFlags(endpoint.flags).contains(EndpointFlags::SIGNAL);
    if is_strict && !here(&way.free) && (is_signal || here(&way.bound)) {
        let what = format!("rp_filter is strict on {name}, and answers from {address} do not leave by it");
        let evidence =
            format!("rp_filter: conf.all {all}, conf.{name} {own}; route from {address}: {}", show(&way.free));
        found.push(Finding::new(&finding::RP_FILTER, what, evidence).on(name).mend(mend).by(command));
        return;
    }
    if !here(&way.bound) {
        let what = format!("packets from {address} find no way out through {name}");
        let evidence = format!("route from {address} by {name}: {}; by any: {}", show(&way.bound), show(&way.free));
        found.push(Finding::new(&finding::ROUTE_MISSING, what, evidence).on(name).mend(mend).by(command));
        return;
    }
    if is_signal && !here(&way.free) {
        let what = format!("answers from {address} leave not by {name}");
        let evidence = format!("route from {address}: {}", show(&way.free));
        found.push(Finding::new(&finding::REPLY_ELSEWHERE, what, evidence).on(name).mend(mend).by(command));
    }
    let asked = way.bound.as_ref().and_then(|hop| hop.gateway);
    let silent = asked.and_then(|gateway| {
        seen.neighbours.iter().find(|n| n.ifindex == home.index && n.address == gateway && n.is_silent())
    });
    if let Some(neighbour) = silent {
        let gateway = neighbour.address;
        let what = format!("the gateway {gateway} on {name} does not answer");
        let finding =
            Finding::new(&finding::GATEWAY_SILENT, what, format!("{gateway} dev {name} {}", neighbour.state_name()));
        let mend = "look at the gateway, the cable, the bridge or VLAN behind the interface; then have it asked again";
        found.push(finding.on(name).mend(mend).by(seen.inside(&[format!("ip neigh flush to {gateway} dev {name}")])));
    }
}

/// What makes packets from an address leave by its interface: a rule by source address, and a table with the way. The
/// gateway is one that some table names already; it is never guessed.
fn source_rule(seen: &Seen, endpoint: &Endpoint, home: &Link, way: &Way) -> (String, String) {
    let address = endpoint.address;
    let (family, whole) = if address.is_ipv6() { (" -6", 128) } else { ("", 32) };
    let through = |entry: &&Entry| {
        let hops = || entry.hops.iter().any(|hop| hop.ifindex == home.index);
        entry.prefix == 0 && entry.is_ipv6 == address.is_ipv6() && hops()
    };
    let defaults: Vec<&Entry> = seen.routes.iter().filter(through).collect();
    let of_entry =
        |entry: &&&Entry| entry.hops.iter().find(|hop| hop.ifindex == home.index).and_then(|hop| hop.gateway);
    // A table of its own that no rule leads to yet.
    const MAIN: [u32; 3] = [0, 254, 255];
    if let Some(table) = defaults.iter().map(|entry| entry.table).find(|table| !MAIN.contains(table)) {
        let rule = format!("ip{family} rule add from {address} table {table}");
        return ("lead its packets to the table that has the way".into(), seen.inside(&[rule]));
    }
    let gateway = way
        .bound
        .as_ref()
        .and_then(|hop| hop.gateway)
        .filter(|_| way.bound.as_ref().is_some_and(|hop| hop.ifindex == home.index));
    let gateway = gateway.or_else(|| defaults.iter().find_map(|entry| of_entry(&entry)));
    let taken: BTreeSet<u32> = seen.routes.iter().map(|entry| entry.table).collect();
    // One table for each interface, so that the commands for several can all be run.
    let table = (FIRST_TABLE.saturating_add(home.index)..).find(|table| !taken.contains(table)).unwrap_or(FIRST_TABLE);
    let prefix = seen.facts.addresses.iter().find(|a| a.ip == address).map_or(whole, |a| a.prefix);
    let via = gateway.map_or_else(|| "GATEWAY".to_string(), |gateway| gateway.to_string());
    let mut commands = Vec::new();
    if prefix < whole {
        let network = network(address, prefix);
        commands.push(format!("ip{family} route add {network}/{prefix} dev {} table {table}", home.name));
    }
    commands.push(format!("ip{family} route add default via {via} dev {} table {table}", home.name));
    commands.push(format!("ip{family} rule add from {address} table {table}"));
    let mend = match gateway {
        Some(_) => "give it a table with a default route of its own".into(),
        None => {
            format!("give it a table with a default route of its own; GATEWAY is the router on {}'s network", home.name)
        }
    };
    (mend, seen.inside(&commands))
}

/// The address with everything behind its prefix cleared.
fn network(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4((u32::from(ip) & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6((u128::from(ip) & mask).into())
        }
    }
}

fn limits(seen: &Seen, found: &mut Vec<Finding>) {
    let Some(now) = seen.facts.limits else { return };
    let count = |flag| seen.facts.endpoints.iter().filter(|e| EndpointFlags(e.flags).contains(flag)).count() as u32;
    let recorded = seen.known.as_ref().and_then(|known| known.record.limits).map(|limits| limits.needed);
    // One of the endpoints' addresses may be the first subflow's, which does not count.
    let needed = match recorded {
        Some(needed) => Limits { subflows: needed.subflows, add_addr_accepted: needed.add_addr_accepted },
        None => {
            let subflows = count(EndpointFlags::SUBFLOW);
            let subflows = if subflows > 1 { subflows - 1 } else { subflows };
            Limits { subflows, add_addr_accepted: u32::from(count(EndpointFlags::FULLMESH) > 0) }
        }
    };
    if now.subflows >= needed.subflows && now.add_addr_accepted >= needed.add_addr_accepted {
        return;
    }
    let (subflows, accepted) = (now.subflows.max(needed.subflows), now.add_addr_accepted.max(needed.add_addr_accepted));
    let show = |limits: Limits| format!("subflows {} add_addr_accepted {}", limits.subflows, limits.add_addr_accepted);
    let what = format!("the limits are lower than the endpoints need: {}", show(needed));
    let command = format!("ip mptcp limits set subflows {subflows} add_addr_accepted {accepted}");
    found.push(Finding::new(&finding::LIMITS_LOW, what, show(now)).mend("raise them").by(seen.inside(&[command])));
}

/// The paths' largest packets.
fn mtu(seen: &Seen, found: &mut Vec<Finding>) {
    let with_endpoint = seen.facts.endpoints.iter().filter_map(|endpoint| seen.home(endpoint.address));
    let by_default = seen.facts.default_route_links.iter().filter_map(|index| seen.link(*index));
    let paths: BTreeMap<&str, u32> =
        with_endpoint.chain(by_default).map(|link| (link.name.as_str(), link.mtu)).collect();
    let sizes: BTreeSet<u32> = paths.values().copied().collect();
    if sizes.len() > 1 {
        let list: Vec<String> = paths.iter().map(|(name, mtu)| format!("{name} {mtu}")).collect();
        found.push(Finding::new(&finding::MTU_DIFFERS, "the paths' MTUs differ", list.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::diag::{Subflow, TcpSocket, TcpState};

    const SUBFLOW: u32 = 2;
    const BACKUP: u32 = 4;

    /// eth0 (index 1) with a way out, eth1 (index 2) with the endpoint 10.0.2.2 and one, too.
    fn healthy() -> Seen {
        let address: IpAddr = [10, 0, 2, 2].into();
        let link = |index, name: &str| Link {
            index,
            name: name.into(),
            flags: (libc::IFF_UP | libc::IFF_RUNNING) as u32,
            kind: None,
            mtu: 1500,
        };
        let hop = |ifindex, gateway: [u8; 4]| Some(Hop { ifindex, gateway: Some(gateway.into()) });
        let facts = Facts {
            kind: Kind::Upstream,
            release: "6.18.0".into(),
            initial_user_namespace: true,
            host_reachable: true,
            target_is_host: false,
            links: vec![link(1, "eth0"), link(2, "eth1")],
            addresses: vec![Address { ifindex: 2, ip: address, prefix: 24, scope: 0, flags: 0x80 }],
            endpoints: vec![Endpoint { id: 1, address, port: None, ifindex: 2, flags: SUBFLOW | BACKUP }],
            limits: Some(Limits { subflows: 2, add_addr_accepted: 0 }),
            default_route_links: vec![1],
            settings: BTreeMap::new(),
            congestion_controls: Vec::new(),
            routes: BTreeMap::new(),
            routing: None,
        };
        let way = Way { bound: hop(2, [10, 0, 2, 1]), free: hop(1, [10, 0, 1, 1]) };
        Seen {
            target: "web".into(),
            enter: "nsenter --net=/x".into(),
            known: None,
            facts,
            ways: BTreeMap::from([(address, way)]),
            routes: Vec::new(),
            neighbours: Vec::new(),
            rp_filter: (0, BTreeMap::new()),
            sockets: Some(sockets::Seen { tcp: Vec::new(), connections: Vec::new(), leaves_by: Vec::new() }),
            fallbacks: Vec::new(),
            managers: Vec::new(),
        }
    }

    fn wrong(seen: &Seen) -> Vec<&'static str> {
        let findings = judge(seen).into_iter().filter(|finding| finding.severity != finding::Severity::Note);
        findings.map(|finding| finding.id).collect()
    }

    /// A join from 10.0.2.2 with these flags, leaving by the interface.
    fn join(flags: u32, state: TcpState, leaves_by: u32) -> sockets::Seen {
        let socket = TcpSocket {
            state,
            local: ([10, 0, 2, 2], 40_000).into(),
            peer: ([10, 0, 0, 1], 80).into(),
            device: 2,
            retransmits: 1,
            inode: 5,
            is_mptcp: true,
            subflow: Some(Subflow { token: 7, flags, local_id: 1 }),
            acknowledged: 0,
            received: 0,
        };
        sockets::Seen { tcp: vec![socket], connections: Vec::new(), leaves_by: vec![Some(leaves_by)] }
    }

    #[test]
    fn a_healthy_path_and_each_way_to_break_it() {
        let address: IpAddr = [10, 0, 2, 2].into();
        assert_eq!(wrong(&healthy()), [""; 0]);
        let mut seen = healthy();
        seen.rp_filter = (0, BTreeMap::from([(2, 1)]));
        assert_eq!(wrong(&seen), ["rp-filter-strict"]);
        // The larger of both counts, and 2 is loose.
        seen.rp_filter.0 = 2;
        assert_eq!(wrong(&seen), [""; 0]);
        let mut seen = healthy();
        let state = 0x20;
        seen.neighbours = vec![Neighbour { ifindex: 1, address: [10, 0, 2, 1].into(), state }];
        assert_eq!(wrong(&seen), [""; 0], "on another link");
        seen.neighbours[0].ifindex = 2;
        assert_eq!(wrong(&seen), ["gateway-silent"]);
        let mut seen = healthy();
        seen.ways.insert(address, Way { bound: None, free: healthy().ways[&address].free.clone() });
        assert_eq!(wrong(&seen), ["route-missing"]);
        let mut seen = healthy();
        seen.facts.limits = Some(Limits { subflows: 0, add_addr_accepted: 0 });
        assert_eq!(wrong(&seen), ["limits-low"]);
        let mut seen = healthy();
        seen.facts.links[1].flags = 0;
        assert_eq!(wrong(&seen), ["interface-down"]);
        let old = Facts { release: "6.1.0-37".into(), ..healthy().facts };
        assert_eq!(wrong(&Seen { facts: old, ..healthy() }), ["kernel-backup-bug"]);
    }

    #[test]
    fn subflows_are_held_against_their_endpoints() {
        let with = |sockets| Seen { sockets: Some(sockets), ..healthy() };
        let backup = 0b10_1100;
        assert_eq!(wrong(&with(join(backup, TcpState::Established, 2))), [""; 0]);
        assert_eq!(wrong(&with(join(0b1100, TcpState::Established, 2))), ["subflow-backup-differs"]);
        assert_eq!(wrong(&with(join(backup, TcpState::Established, 1))), ["subflow-wrong-interface"]);
        assert_eq!(wrong(&with(join(0b10_1000, TcpState::SynSent, 2))), ["subflow-stuck"]);
    }

    #[test]
    fn commands_run_in_the_namespace_as_a_whole() {
        let seen = healthy();
        assert_eq!(seen.inside(&["a b".into()]), "nsenter --net=/x a b");
        assert_eq!(seen.inside(&["a".into(), "b".into()]), "nsenter --net=/x sh -ec 'a && b'");
        assert_eq!(Seen { enter: String::new(), ..seen }.inside(&["a".into(), "b".into()]), "a && b");
    }

    #[test]
    fn networks_of_addresses() {
        assert_eq!(network([10, 0, 2, 2].into(), 24), IpAddr::from([10, 0, 2, 0]));
        assert_eq!(network([10, 0, 2, 2].into(), 0), IpAddr::from([0, 0, 0, 0]));
        assert_eq!(network([10, 0, 2, 2].into(), 32), IpAddr::from([10, 0, 2, 2]));
        assert_eq!(network("fd00:2::2".parse().unwrap(), 64), "fd00:2::".parse::<IpAddr>().unwrap());
    }
}
