//! What is wrong with a container's paths: a pure function of what was read in its namespace and in the ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::finding::{self, Finding};
use super::seen::{Reached, Seen, Way, shell_word};
use super::sockets;
use crate::kernel::netlink::neighbours::Neighbour;
use crate::kernel::netlink::routing::{Entry, Hop, PROTOCOL, gateways_of_others, has_direct_default};
use crate::kernel::{Address, ENDPOINTS_MAX, Endpoint, Kind, Link, TableRoute, upstream};
use crate::ledger::record::{Interface, LimitPair, State};
use crate::request::flags::EndpointFlags;
use crate::request::pattern::Pattern;
use crate::request::setting::{self, SettingKey};

/// How long ago a gateway may have been asked for in vain to count as silent: a subflow that is up has something sent again
/// about that often.
const SILENCE: Duration = Duration::from_secs(60);

/// The first number that is tried for a table of our own making: far from those that the kernel names.
const FIRST_TABLE: u32 = 101;

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
        let mut backups = flags.filter(|flags| flags.contains(EndpointFlags::BACKUP));
        found.extend(backups.find_map(|flags| backup_bug(&seen.facts.release, flags)));
        sockets::judge(seen, &mut found);
    } else {
        let what = format!("only the interfaces' flags were looked at: the kernel is {}", seen.facts.kind.name());
        found.push(Finding::new(&finding::NOT_JUDGED, what, &seen.facts.release));
    }
    found.extend(seen.managers.iter().map(other_manager));
    finding::sort(&mut found);
    found.dedup();
    found
}

/// A program that manages endpoints, too, and how it is kept away from them.
pub fn other_manager((name, pid): &(String, u32)) -> Finding {
    let mend = match name.as_str() {
        "NetworkManager" => {
            "set connection.mptcp-flags=disabled (0x1) for the interfaces that are ours, or leave them to it"
        }
        _ => "stop it, or ask for no interfaces here",
    };
    let what = format!("{name} runs in this network namespace");
    Finding::new(&finding::OTHER_MANAGER, what, format!("pid {pid}")).mend(mend)
}

/// Nobody follows a container, and why.
pub fn not_followed(whom: &str, why: &str, hook: &str) -> Finding {
    let finding = Finding::new(&finding::NOT_FOLLOWED, format!("nobody follows {whom}"), why);
    finding.mend("start the agent: enable its unit where systemd runs, else").by(format!("{hook} agent &"))
}

/// What this kernel does not do about `backup`.
pub fn backup_bug(release: &str, flags: EndpointFlags) -> Option<Finding> {
    let what = format!("this kernel {}", upstream::backup_bug(release, flags)?);
    Some(Finding::new(&finding::BACKUP_BUG, what, release).mend("run Linux 6.11 or newer"))
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
        let assignment = shell_word(&format!("{path}={asked}"));
        found.push(finding.mend("write it again").by(seen.inside(&[format!("sysctl -w {assignment}")])));
    }
    found.extend(known.not_followed.as_ref().map(|why| not_followed("this container", why, &seen.names.hook)));
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
        let now = seen.facts.endpoint(own.address);
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
    let purposes = EndpointFlags::SIGNAL.0 | EndpointFlags::SUBFLOW.0 | EndpointFlags::LAMINAR.0;
    if endpoint.flags & purposes == 0 {
        let what = format!("the endpoint {shown} is neither subflow nor signal");
        let command = seen.rebuilt(endpoint, name, flags.union(EndpointFlags::SUBFLOW));
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
        found.push(
            finding.on(name).mend("bind it to the interface of its address").by(seen.rebuilt(endpoint, name, flags)),
        );
        return;
    }
    if !home.is_running() {
        let what = format!("{name}, with the endpoint {shown}, is down or has no carrier");
        found.push(
            Finding::new(&finding::INTERFACE_DOWN, what, format!("flags {:#x}", home.flags))
                .on(name)
                .mend("set both of its ends up")
                .by(seen.inside(&[format!("ip link set dev {} up", shell_word(name))])),
        );
        return;
    }
    judge_way(seen, endpoint, home, found);
}

/// Whether packets from the endpoint's address leave by its interface, to somebody who answers.
fn judge_way(seen: &Seen, endpoint: &Endpoint, home: &Link, found: &mut Vec<Finding>) {
    let (name, address) = (home.name.as_str(), endpoint.address);
    let way = seen.ways.get(&address).cloned().unwrap_or_default();
    let is_here = |hop: &Hop| hop.ifindex == home.index;
    let show = |hops: &[Hop]| {
        let one = |Hop { ifindex, gateway, .. }: &Hop| match gateway {
            Some(gateway) => format!("via {gateway} dev {}", seen.link_name(*ifindex)),
            None => format!("dev {}", seen.link_name(*ifindex)),
        };
        if hops.is_empty() { "unreachable".into() } else { hops.iter().map(one).collect::<Vec<_>>().join(" or ") }
    };
    // Of a route that shares the traffic, some packets leave here; the reverse path filter is content with that.
    let (some_free, all_free) = (way.free.iter().any(is_here), !way.free.is_empty() && way.free.iter().all(is_here));
    let not_here = if some_free { format!("leave not always by {name}") } else { format!("leave not by {name}") };
    let is_bound_here = way.bound.as_ref().is_some_and(is_here);
    // Without a way to the world outside there may be one to those that matter.
    let reached = way.reached.filter(|_| !is_bound_here);
    let has_answers = reached.is_some_and(|reached| reached.answers);
    let way_out = WayOut::new(seen, endpoint, home, &way);
    if endpoint.ifindex == 0 && !all_free && !has_answers {
        let what = format!("the endpoint {address} is bound to no interface, and its packets {not_here}");
        let evidence = format!("endpoint without dev; route from {address}: {}", show(&way.free));
        let finding = Finding::new(&finding::ENDPOINT_UNBOUND, what, evidence).on(name);
        let command = seen.rebuilt(endpoint, name, EndpointFlags(endpoint.flags));
        found.push(finding.mend("bind it (and see that there is a route)").by(command));
    }
    let is_strict = is_strict(seen, home, address);
    let is_signal = EndpointFlags(endpoint.flags).contains(EndpointFlags::SIGNAL);
    if is_strict && !some_free && !has_answers && (is_signal || is_bound_here) {
        let what = format!("rp_filter is strict on {name}, and answers from {address} do not leave by it");
        let (all, own) = rp_filter(seen, home);
        let evidence =
            format!("rp_filter: conf.all {all}, conf.{name} {own}; route from {address}: {}", show(&way.free));
        found.push(way_out.mends(Finding::new(&finding::RP_FILTER, what, evidence).on(name)));
        return;
    }
    if !is_bound_here {
        let (cause, what) = match reached {
            Some(Reached { peer, .. }) => {
                let what = format!(
                    "packets from {address} find a way through {name} to {peer}, and none to the world outside"
                );
                (&finding::ROUTE_PARTIAL, what)
            }
            None => (&finding::ROUTE_MISSING, format!("packets from {address} find no way out through {name}")),
        };
        let evidence =
            format!("route from {address} by {name}: {}; by any: {}", show(way.bound.as_slice()), show(&way.free));
        found.push(way_out.mends(Finding::new(cause, what, evidence).on(name)));
        return;
    }
    if is_signal && !all_free {
        let what = format!("answers from {address} {not_here}");
        let evidence = format!("route from {address}: {}", show(&way.free));
        found.push(way_out.mends(Finding::new(&finding::REPLY_ELSEWHERE, what, evidence).on(name)));
    }
    let asked = way.bound.as_ref().and_then(|hop| sockets::silent_next(&seen.neighbours, hop, hop.gateway?));
    found.extend(asked.map(|asked| judge_silence(seen, name, asked)));
}

/// A gateway that was asked for in vain. The kernel keeps that in mind until there is something to send again, or until
/// it knows many machines (`gc_thresh1`).
fn judge_silence(seen: &Seen, name: &str, neighbour: &Neighbour) -> Finding {
    let gateway = neighbour.address;
    let evidence = seen.shown(neighbour);
    let command = seen.inside(&[format!("ip neigh flush to {gateway} dev {}", shell_word(name))]);
    let finding = match neighbour.age.filter(|age| *age > SILENCE && !neighbour.is_being_asked()) {
        Some(age) => {
            let what = format!("the gateway {gateway} on {name} had not answered {} s ago", age.as_secs());
            Finding::new(&finding::GATEWAY_WAS_SILENT, what, evidence)
                .mend("have the kernel forget that; it asks again with the next packet")
        }
        None => {
            let what = format!("the gateway {gateway} on {name} does not answer");
            Finding::new(&finding::GATEWAY_SILENT, what, evidence).mend(
                "look at the gateway, the cable, the bridge or VLAN behind the interface; then have it asked again",
            )
        }
    };
    finding.on(name).by(command)
}

/// `rp_filter` of `conf.all` and of an interface: the larger one counts.
fn rp_filter(seen: &Seen, home: &Link) -> (u8, u8) {
    (seen.rp_filter.0, seen.rp_filter.1.get(&home.index).copied().unwrap_or(0))
}

/// Whether the interface drops packets whose answers would leave by another one. IPv6 has no such thing.
fn is_strict(seen: &Seen, home: &Link, address: IpAddr) -> bool {
    let (all, own) = rp_filter(seen, home);
    address.is_ipv4() && all.max(own) == 1
}

/// Whether the hook has given the address a rule, and the rule's table a default route by the interface.
fn leads_by_hook(seen: &Seen, address: IpAddr, home: &Link) -> bool {
    let Some(routing) = &seen.facts.routing else { return false };
    let mut rules = routing.rules.iter().filter(|rule| rule.protocol == PROTOCOL && rule.from == Some(address));
    let leads = |table: u32| {
        let mut routes = routing.routes.iter();
        routes.any(|route| route.table == table && route.is_default() && route.ifindex == home.index)
    };
    rules.any(|rule| leads(rule.table))
}

/// What makes packets from an address leave by its interface.
struct WayOut {
    /// In words.
    how: String,
    /// By the hook, which takes it back when the container ends; None where it has no business.
    by_hook: Option<String>,
    /// The same with ip(8).
    by_hand: String,
}

impl WayOut {
    fn new(seen: &Seen, endpoint: &Endpoint, home: &Link, way: &Way) -> Self {
        let by_hook = hook_routes(seen, endpoint, home);
        let (how, by_hand) = source_rule(seen, endpoint, home, way);
        let how = match &by_hook {
            Some(command) if command.contains(GATEWAY) => format!(
                "let the hook give {0} a way out of its own; {GATEWAY} is the router on {0}'s network",
                home.name
            ),
            Some(_) => format!("let the hook give {} a way out of its own", home.name),
            None => how,
        };
        Self { how, by_hook, by_hand }
    }

    fn mends(&self, finding: Finding) -> Finding {
        let finding = finding.mend(&self.how);
        match &self.by_hook {
            Some(command) => finding.by(command).or_by_hand(&self.by_hand),
            None => finding.by(&self.by_hand),
        }
    }
}

/// What stands for a gateway that nobody has named.
const GATEWAY: &str = "GATEWAY";

/// `apply --routes auto` for the endpoint's interface.
fn hook_routes(seen: &Seen, endpoint: &Endpoint, home: &Link) -> Option<String> {
    let address = endpoint.address;
    let is_usable = seen.facts.addresses.iter().any(|a| a.ip == address && a.is_usable());
    // Where the hook's rule and table are there already, a rule that comes before them leads elsewhere; what the hook can
    // do about that is to make a strict filter loose.
    let is_led = leads_by_hook(seen, address, home) && !is_strict(seen, home, address);
    // An endpoint with a port of its own is not one that the hook makes, and the host's namespace not a container's.
    if !is_usable || is_led || endpoint.port.is_some() || seen.facts.target_is_host {
        return None;
    }
    let record = seen.known.as_ref().map(|known| &known.record);
    let asked = record.and_then(|record| record.interfaces.iter().find(|interface| interface.name == home.name));
    let request = record.map(|record| &record.request);
    let is_v4 = address.is_ipv4();
    let routes: Vec<TableRoute> = seen.routes.iter().flat_map(TableRoute::of).collect();
    let gateway = request.and_then(|request| seen.policy.gateway(request, &home.name, is_v4)).or_else(|| {
        let mut theirs = gateways_of_others(&routes, home.index, is_v4).map(|gateway| gateway.address);
        theirs.next().or_else(|| request?.engines_gateway(&home.name, is_v4))
    });
    // A tunnel's default route has none.
    let is_known = gateway.is_some() || has_direct_default(&routes, home.index, is_v4);
    // Without a word about the gateway the hook would refuse the one that the container's author has named.
    let is_barred = request.is_some_and(|request| {
        let barred = seen.policy.barred_gateways(request);
        barred.iter().any(|barred| barred.pattern.matches(&home.name) && barred.gateway.is_ipv4() == is_v4)
    });
    if is_known && asked.is_some() && !is_barred {
        return Some(format!("{} --routes auto", seen.apply_again()));
    }
    let flags = match asked {
        Some(interface) => interface.flags.join(","),
        None => EndpointFlags(endpoint.flags).names().join(","),
    };
    // Our command line takes some names for patterns, and does not take some at all.
    let is_nameable = home.name.parse().is_ok_and(|name: Pattern| name.is_exact());
    if !is_nameable || flags.is_empty() || flags == "off" || flags == "default" {
        return None;
    }
    let gateway = match gateway {
        Some(gateway) if is_barred => format!(",gateway={gateway}"),
        None if !is_known => format!(",gateway={GATEWAY}"),
        _ => String::new(),
    };
    let wish = shell_word(&format!("{}={flags}{gateway}", home.name));
    Some(format!("{} --interface {wish} --routes auto", seen.apply_again()))
}

/// The same by hand: a rule by source address, and a table with the way. The gateway is one that some table names
/// already; it is never guessed.
fn source_rule(seen: &Seen, endpoint: &Endpoint, home: &Link, way: &Way) -> (String, String) {
    let address = endpoint.address;
    let (family, whole) = if address.is_ipv6() { (" -6", 128) } else { ("", 32) };
    let through = |entry: &&Entry| {
        let hops = || entry.hops.iter().any(|hop| hop.ifindex == home.index);
        // The hook's own tables come and go with it.
        let is_theirs = entry.protocol != PROTOCOL;
        is_theirs && entry.is_default() && entry.destination.is_ipv6() == address.is_ipv6() && hops()
    };
    let defaults: Vec<&Entry> = seen.routes.iter().filter(through).collect();
    // A table of its own that no rule leads to yet.
    const MAIN: [u32; 3] = [0, 254, 255];
    if let Some(table) = defaults.iter().map(|entry| entry.table).find(|table| !MAIN.contains(table)) {
        let rule = format!("ip{family} rule add from {address} table {table}");
        return ("lead its packets to the table that has the way".into(), seen.inside(&[rule]));
    }
    let bound = way.bound.as_ref().filter(|hop| hop.ifindex == home.index);
    let mut hops = bound.into_iter().chain(defaults.iter().filter_map(|entry| entry.hop_by(home.index)));
    let hop = hops.find(|hop| hop.gateway.is_some());
    let gateway = hop.and_then(|hop| hop.gateway);
    let onlink = if hop.is_some_and(|hop| hop.onlink) { " onlink" } else { "" };
    let taken: BTreeSet<u32> = seen.routes.iter().map(|entry| entry.table).collect();
    // One table for each interface, so that the commands for several can all be run.
    let table = (FIRST_TABLE.saturating_add(home.index)..).find(|table| !taken.contains(table)).unwrap_or(FIRST_TABLE);
    let prefix = seen.facts.addresses.iter().find(|a| a.ip == address).map_or(whole, |a| a.prefix);
    let routes: Vec<TableRoute> = seen.routes.iter().flat_map(TableRoute::of).collect();
    let is_known = gateway.is_some() || has_direct_default(&routes, home.index, address.is_ipv4());
    let via = match gateway {
        Some(gateway) => format!(" via {gateway}"),
        None if is_known => String::new(),
        None => format!(" via {GATEWAY}"),
    };
    let device = shell_word(&home.name);
    let mut commands = Vec::new();
    if prefix < whole {
        let network = network(address, prefix);
        commands.push(format!("ip{family} route add {network}/{prefix} dev {device} table {table}"));
    }
    commands.push(format!("ip{family} route add default{via} dev {device}{onlink} table {table}"));
    commands.push(format!("ip{family} rule add from {address} table {table}"));
    let mut mend = "give it a table with a default route of its own".to_string();
    if !is_known {
        mend = format!("{mend}; {GATEWAY} is the router on {}'s network", home.name);
    }
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
    let Some(now) = seen.facts.limits.map(LimitPair::from) else { return };
    let with = |flag| seen.facts.endpoints.iter().filter(move |e| EndpointFlags(e.flags).contains(flag));
    let recorded = seen.known.as_ref().and_then(|known| known.record.limits).map(|limits| limits.needed);
    let needed = recorded.unwrap_or_else(|| {
        // The kernel joins addresses of one family alone (`mptcp_pm_addr_families_match`). One of the endpoints' may be
        // the first subflow's, which does not count.
        let of_family = |is_v4| with(EndpointFlags::SUBFLOW).filter(|e| e.address.is_ipv4() == is_v4).count() as u32;
        let subflows = of_family(true).max(of_family(false));
        let subflows = if subflows > 1 { subflows - 1 } else { subflows };
        let has_fullmesh = with(EndpointFlags::FULLMESH).next().is_some();
        LimitPair { subflows, add_addr_accepted: u32::from(has_fullmesh) }
    });
    let raised = now.max(needed);
    if raised == now {
        return;
    }
    let what = format!("the limits are lower than the endpoints need: {needed}");
    let finding = Finding::new(&finding::LIMITS_LOW, what, now.to_string());
    found.push(finding.mend("raise them").by(seen.inside(&[format!("ip mptcp limits set {raised}")])));
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
    use super::super::seen::testing::healthy;
    use super::super::seen::{Known, Names, Sockets, hook_command};
    use super::*;
    use crate::cli::Globals;
    use crate::instance::{ContainerId, Door, Instance};
    use crate::kernel::netlink::diag::{MptcpSocket, Subflow, TcpSocket, TcpState};
    use crate::kernel::netns::NetnsId;
    use crate::kernel::{Facts, Limits, RouteState};
    use crate::ledger::record::{Record, VERSION};
    use crate::request::Request;

    /// `MPTCP_PM_ADDR_FLAG_SIGNAL`.
    const SIGNAL: u32 = 1;

    /// 10.0.2.LAST on eth1, which was asked for and has not answered.
    fn failed(last: u8) -> Neighbour {
        Neighbour { ifindex: 2, address: [10, 0, 2, last].into(), state: 0x20, age: None }
    }

    fn wrong(seen: &Seen) -> Vec<&'static str> {
        let findings = judge(seen).into_iter().filter(|finding| finding.severity != finding::Severity::Note);
        findings.map(|finding| finding.id).collect()
    }

    /// A join from 10.0.2.2 with these flags, leaving by the interface.
    fn join(flags: u32, state: TcpState, leaves_by: u32) -> Sockets {
        let socket = TcpSocket {
            state,
            local: ([10, 0, 2, 2], 40_000).into(),
            peer: ([10, 0, 0, 1], 80).into(),
            device: 2,
            retransmits: 1,
            inode: 5,
            is_mptcp: true,
            subflow: Some(Subflow { token: 7, flags, local_id: 1 }),
            sent: 0,
            received: 0,
        };
        let hop = Hop { ifindex: leaves_by, gateway: Some([10, 0, 2, 1].into()), onlink: false };
        Sockets { tcp: vec![socket], connections: None, hops: vec![Some(hop)] }
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
        // A way that is one of several is enough for the filter, and not for answers.
        let way = seen.ways.get_mut(&address).unwrap();
        way.free.extend(way.bound.clone());
        seen.rp_filter.0 = 1;
        assert_eq!(wrong(&seen), [""; 0]);
        seen.facts.endpoints[0].flags = SIGNAL;
        assert_eq!(wrong(&seen), ["reply-elsewhere"]);
        seen.ways.get_mut(&address).unwrap().free.remove(0);
        assert_eq!(wrong(&seen), [""; 0]);
        let mut seen = healthy();
        seen.neighbours = vec![Neighbour { age: Some(Duration::from_secs(2)), ..failed(1) }];
        seen.neighbours[0].ifindex = 1;
        assert_eq!(wrong(&seen), [""; 0], "on another link");
        seen.neighbours[0].ifindex = 2;
        assert_eq!(wrong(&seen), ["gateway-silent"]);
        // Since then it was not asked for again.
        seen.neighbours[0].age = Some(Duration::from_secs(6 * 3600));
        assert_eq!(wrong(&seen), [""; 0]);
        let past = judge(&seen).into_iter().find(|finding| finding.id == "gateway-was-silent").unwrap();
        assert_eq!(past.what, "the gateway 10.0.2.1 on eth1 had not answered 21600 s ago");
        let incomplete = 1;
        seen.neighbours[0].state = incomplete;
        assert_eq!(wrong(&seen), ["gateway-silent"]);
        let mut seen = healthy();
        seen.ways.get_mut(&address).unwrap().bound = None;
        assert_eq!(wrong(&seen), ["route-missing"]);
        // To somebody who is known there is a way; answers may take another one.
        let peer = [10, 0, 0, 1].into();
        seen.ways.get_mut(&address).unwrap().reached = Some(Reached { peer, answers: true });
        assert_eq!(wrong(&seen), ["route-partial"]);
        seen.facts.endpoints[0].flags = SIGNAL;
        seen.rp_filter.0 = 1;
        assert_eq!(wrong(&seen), ["route-partial"]);
        seen.ways.get_mut(&address).unwrap().reached = Some(Reached { peer, answers: false });
        assert_eq!(wrong(&seen), ["rp-filter-strict"]);
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
        // What the link says of others is no evidence.
        let mut stuck = with(join(0b10_1000, TcpState::SynSent, 2));
        stuck.neighbours = vec![failed(77)];
        let evidence = |seen: &Seen| judge(seen).into_iter().find(|f| f.id == "subflow-stuck").unwrap().evidence;
        assert_eq!(evidence(&stuck), "SYN-SENT, repeated 1 times");
        stuck.neighbours.push(failed(1));
        assert_eq!(evidence(&stuck), "SYN-SENT, repeated 1 times; 10.0.2.1 dev eth1 FAILED");
        // The container's own address, whichever way that is said.
        let inside = |mut sockets: Sockets| {
            sockets.tcp[0].peer = ([10, 0, 2, 2], 80).into();
            with(sockets)
        };
        assert_eq!(wrong(&inside(join(backup, TcpState::Established, 1))), [""; 0]);
        assert_eq!(wrong(&inside(join(0b10_1000, TcpState::SynSent, 2))), [""; 0]);
        let mut any = with(join(backup, TcpState::Established, 1));
        any.facts.links[0].flags |= libc::IFF_LOOPBACK as u32;
        assert_eq!(wrong(&any), [""; 0]);
        let mut opened = join(0b100_0011, TcpState::Established, 2);
        opened.tcp[0].local = ([10, 0, 1, 2], 40_000).into();
        opened.connections = Some(vec![MptcpSocket { token: 7, subflows: 0 }]);
        assert_eq!(wrong(&with(opened)), ["connection-lacks-subflow"]);
        // This side has closed it.
        let mut opened = join(0b100_0011, TcpState::Established, 2);
        opened.tcp[0].local = ([10, 0, 1, 2], 40_000).into();
        opened.connections = Some(Vec::new());
        assert_eq!(wrong(&with(opened)), [""; 0]);
        let mut opened = join(0b100_0011, TcpState::Established, 2);
        opened.tcp[0].local = ([10, 0, 1, 2], 40_000).into();
        assert_eq!(wrong(&inside(opened)), [""; 0]);
    }

    /// A record that asks nothing of anybody, with eth1 in this state.
    fn known(state: State, reason: &str) -> Known {
        let instance = Instance {
            container: ContainerId::new(Door::Oci, "", "web").unwrap(),
            boot_id: "this".into(),
            pid: Some(1),
            start_time: Some(1),
            netns: NetnsId { inode: 1, cookie: Some(1) },
            netns_path: None,
        };
        let eth1 = Interface {
            name: "eth1".into(),
            flags: vec!["backup".into()],
            source: "the hook's arguments".into(),
            state,
            reason: Some(reason.into()),
            route: RouteState::Ok,
            endpoints: Vec::new(),
            link: None,
            routing: None,
            corrected: None,
            last: None,
        };
        let record = Record {
            version: VERSION,
            instance,
            name: "web".into(),
            runtime: "oci".into(),
            kernel: Kind::Upstream,
            request: Request::default(),
            at_work: None,
            interfaces: vec![eth1],
            leaving: Vec::new(),
            leaving_tables: BTreeSet::new(),
            limits: None,
            settings: Vec::new(),
            warnings: vec!["loaded a module".into(), "no route out".into()],
            lasting_warnings: 1,
            unsettled: false,
            time: 1,
        };
        Known { record, interrupted: false, not_followed: None, drifted: Vec::new() }
    }

    #[test]
    fn what_the_ledger_has_against_an_interface() {
        let found = |kind, state| {
            let mut seen = Seen { known: Some(known(state, "somebody was there")), ..healthy() };
            seen.facts.kind = kind;
            judge(&seen)
        };
        let ids = |found: &[Finding]| found.iter().map(|finding| finding.id).collect::<Vec<_>>();
        let applied = found(Kind::Upstream, State::Applied);
        assert_eq!(ids(&applied), ["hook-warning"]);
        // What depends on routes is looked at anew.
        assert_eq!(applied[0].what, "loaded a module");
        let ignored = found(Kind::Upstream, State::Ignored);
        assert_eq!(ids(&ignored), ["interface-ignored", "hook-warning"]);
        assert_eq!(
            (ignored[0].interface.as_deref(), ignored[0].evidence.as_str()),
            (Some("eth1"), "somebody was there")
        );
        let drifted = found(Kind::MptcpOrg, State::Drifted);
        assert_eq!(ids(&drifted), ["interface-drifted", "hook-warning", "not-judged"]);
        assert_eq!(drifted[0].command.as_deref(), Some("mptcp-hook apply web"));
        assert!(drifted[2].what.contains("mptcp.org"), "{}", drifted[2].what);
    }

    #[test]
    fn what_else_is_in_the_namespace() {
        let managers = vec![("NetworkManager".into(), 7), ("mptcpd".into(), 8)];
        let found = judge(&Seen { managers, sockets: None, ..healthy() });
        let ids: Vec<&str> = found.iter().map(|finding| finding.id).collect();
        assert_eq!(ids, ["other-manager", "other-manager", "container-unknown", "sockets-unreadable"]);
        assert!(found[0].mend.as_ref().unwrap().contains("connection.mptcp-flags"), "{:?}", found[0].mend);
        assert!(found[1].mend.as_ref().unwrap().contains("stop it"), "{:?}", found[1].mend);
        assert_eq!(found[3].command.as_deref(), Some("modprobe tcp_diag && modprobe mptcp_diag"));
    }

    #[test]
    fn commands_run_in_the_namespace_as_a_whole() {
        let seen = healthy();
        assert_eq!(seen.inside(&["a b".into()]), "nsenter --net=/x a b");
        assert_eq!(seen.inside(&["a".into(), "b".into()]), "nsenter --net=/x sh -ec 'a && b'");
        let names = Names { enter: String::new(), ..seen.names };
        assert_eq!(Seen { names, ..healthy() }.inside(&["a".into(), "b".into()]), "a && b");
    }

    /// The kernel lets a container name its interfaces almost as it likes.
    #[test]
    fn names_of_interfaces_are_words_in_commands() {
        let mut seen = healthy();
        let endpoint = &seen.facts.endpoints[0];
        let delete = "nsenter --net=/x sh -ec 'ip mptcp endpoint delete id 1 && ";
        // A word in the inner shell, and that within a word in the outer one.
        let add = r"ip mptcp endpoint add 10.0.2.2 id 1 dev '\''a'\''\'\'''\''b'\'' subflow'";
        let expected = format!("{delete}{add}");
        assert_eq!(seen.rebuilt(endpoint, "a'b", EndpointFlags(2)), expected);
        seen.facts.links[1].name = "$(reboot)".into();
        seen.neighbours = vec![failed(1)];
        let silent = judge(&seen).into_iter().find(|finding| finding.id == "gateway-silent").unwrap();
        assert_eq!(silent.command.unwrap(), "nsenter --net=/x ip neigh flush to 10.0.2.1 dev '$(reboot)'");
        // Names that our command line would take for something else.
        seen.ways.get_mut(&IpAddr::from([10, 0, 2, 2])).unwrap().bound = None;
        for (name, by_hook) in [("eth1", true), ("eth*", false), ("e=1", false)] {
            seen.facts.links[1].name = name.into();
            let missing = judge(&seen).into_iter().find(|finding| finding.id == "route-missing").unwrap();
            assert_eq!(missing.command.unwrap().starts_with("mptcp-hook apply"), by_hook, "{name}");
        }
    }

    #[test]
    fn commands_are_for_the_same_policy_and_ledger() {
        assert_eq!(hook_command(&Globals::default()), "mptcp-hook");
        let globals = Globals { config: Some("/a b/it's".into()), state_dir: Some("/run/x".into()) };
        let hook = hook_command(&globals);
        assert_eq!(hook, r"mptcp-hook --config '/a b/it'\''s' --state-dir /run/x");
        let mut seen = healthy();
        seen.names.hook = hook.clone();
        assert_eq!(seen.apply_again(), format!("{hook} apply web"));
    }

    #[test]
    fn endpoints_are_made_anew_as_a_whole() {
        let mut seen = healthy();
        seen.facts.endpoints[0] = Endpoint { port: Some(5001), flags: SIGNAL, ifindex: 1, ..seen.facts.endpoints[0] };
        let found = judge(&seen);
        let wrong = found.iter().find(|finding| finding.id == "endpoint-wrong-device").unwrap();
        let expected = "nsenter --net=/x sh -ec 'ip mptcp endpoint delete id 1 && \
                        ip mptcp endpoint add 10.0.2.2 id 1 port 5001 dev eth1 signal'";
        assert_eq!(wrong.command.as_deref(), Some(expected));
        // A change that does not name fullmesh would take it away.
        let mut seen = Seen { sockets: Some(join(0b1100, TcpState::Established, 2)), ..healthy() };
        seen.facts.endpoints[0].flags |= EndpointFlags::FULLMESH.0;
        let found = judge(&seen);
        let differs = found.iter().find(|finding| finding.id == "subflow-backup-differs").unwrap();
        let expected = "nsenter --net=/x sh -ec 'ip mptcp endpoint change id 1 nobackup fullmesh && \
                        ip mptcp endpoint change id 1 backup fullmesh'";
        assert_eq!(differs.command.as_deref(), Some(expected));
    }

    #[test]
    fn networks_of_addresses() {
        assert_eq!(network([10, 0, 2, 2].into(), 24), IpAddr::from([10, 0, 2, 0]));
        assert_eq!(network([10, 0, 2, 2].into(), 0), IpAddr::from([0, 0, 0, 0]));
        assert_eq!(network([10, 0, 2, 2].into(), 32), IpAddr::from([10, 0, 2, 2]));
        assert_eq!(network("fd00:2::2".parse().unwrap(), 64), "fd00:2::".parse::<IpAddr>().unwrap());
    }
}
