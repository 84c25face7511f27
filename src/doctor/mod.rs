//! The verb `doctor`: what is wrong with the host, or with one container's paths, and what mends it. It takes no lock and
//! changes nothing.
//!
//! [`mod@host`] and [`container`] judge what was read ([`seen`]), as pure functions; [`sockets`] judges what the kernel shows of live
//! connections, [`probe`] opens one. What can be found stands in one table, [`finding`].

pub mod container;
pub mod finding;
pub mod host;
pub mod probe;
pub mod seen;
pub mod sockets;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::cli::{Globals, Target};
use crate::context::Context;
use crate::front::command::{self, Purpose};
use crate::instance::{Instance, open_netns_of};
use crate::kernel::netlink::diag::Diag;
use crate::kernel::netlink::route::Route;
use crate::kernel::netlink::routing::Hop;
use crate::kernel::netns::{Namespace, Visit};
use crate::kernel::sysctl::read_text;
use crate::kernel::{self, Facts, Kernel, Kind};
use crate::ledger::Ledger;
use crate::ledger::record::{LimitPair, Record};
use crate::privileges;
use crate::request::setting::SettingKey;
use crate::status::{self, Status};
use finding::{Finding, Severity};
use seen::{Known, Names, Reached, Seen, Sockets, Way, shell_word};

/// How many peers of an address are looked at for one that it reaches.
const PEERS_MAX: usize = 16;

/// What the doctor says.
pub struct Diagnosis {
    /// Which container, as a person names it; none for the host.
    pub target: Option<String>,
    /// What was read and is fine, by what it is about.
    pub facts: Vec<(&'static str, String)>,
    /// What was found, problems first.
    pub findings: Vec<Finding>,
    /// The subflows of live connections.
    pub subflows: Vec<sockets::Shown>,
    /// What became of the probe.
    pub probe: Option<probe::Outcome>,
}

impl Diagnosis {
    /// How many findings are of this severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }
}

/// Looks at the host, or at one container; with `peer` also opens a connection from inside.
pub fn doctor(
    target: Option<&Target>,
    peer: Option<SocketAddr>,
    context: &Context,
    globals: &Globals,
) -> Result<Diagnosis> {
    let hook = seen::hook_command(globals);
    match target {
        Some(target) => one(target, peer, context, hook),
        None => the_host(context, hook),
    }
}

fn the_host(context: &Context, hook: String) -> Result<Diagnosis> {
    let status = status::status(context, None)?;
    let own = Namespace::own().ok().map(|namespace| namespace.inode());
    let seen = host::look(running_agent(context)?, own, hook);
    let mut facts = seen.kernel.clone();
    for hook in &seen.hooks {
        facts.push(("hook", format!("{}: {}", hook.engine, hook.file.display())));
    }
    if status.rootless {
        facts.push(("ledger", "one user's: it cannot protect host-wide values from others".into()));
    }
    let findings = host::judge(&seen, &status);
    Ok(Diagnosis { target: None, facts, findings, subflows: Vec::new(), probe: None })
}

/// The agent's pid, if it runs.
fn running_agent(context: &Context) -> Result<Option<u32>> {
    Ok(Ledger::open(&context.state_dir)?.and_then(|ledger| ledger.agent()).map(|agent| agent.pid))
}

fn one(target: &Target, peer: Option<SocketAddr>, context: &Context, hook: String) -> Result<Diagnosis> {
    let ledger = Ledger::open(&context.state_dir)?;
    let record = command::known(target, ledger.as_ref(), Purpose::Look)?;
    let status = if record.is_some() { Some(status::status(context, None)?) } else { None };
    let words = match (target, &record) {
        (_, Some(record)) => record.instance.container.id.clone(),
        (Target::Known(name), None) => name.clone(),
        (Target::Pid(pid), None) => format!("--pid {pid}"),
        (Target::Netns(path), None) => format!("--netns {}", shell_word(&path.display().to_string())),
    };
    let mut diagnosis = Diagnosis {
        target: Some(words.clone()),
        facts: Vec::new(),
        findings: Vec::new(),
        subflows: Vec::new(),
        probe: None,
    };
    let known = match (record, status) {
        (Some(record), Some(status)) => match living(record, status, &hook) {
            Ok(known) => Some(known),
            Err(dead) => {
                diagnosis.findings.push(*dead);
                return Ok(diagnosis);
            }
        },
        _ => None,
    };
    let (visit, enter) = way_in(target, known.as_ref().map(|known| &known.record.instance))?;
    let netns = visit.inode();
    let Some((kind, mut kernel)) = kernel::open(visit, context.deadline)? else {
        let evidence = format!("no /proc/sys/net/mptcp/enabled on {}", kernel::release());
        let finding = Finding::new(&finding::KERNEL_WITHOUT, "this kernel has no MPTCP", evidence);
        diagnosis.findings.push(finding.mend(kernel::GET_MPTCP));
        return Ok(diagnosis);
    };
    let peer_address = peer.map(|peer| peer.ip());
    let seen = look(kernel.as_mut(), known, Names { hook, target: words, enter }, netns, peer_address, context)?;
    diagnosis.facts = facts(kind, &seen);
    diagnosis.subflows = sockets::shown(&seen);
    diagnosis.findings = container::judge(&seen);
    if let Some(peer) = peer {
        if let Some(finding) = probe::impossible(peer, &seen) {
            diagnosis.findings.push(finding);
        } else {
            // Strangers answer from here on; the kernel shows subflows to those with CAP_NET_ADMIN.
            privileges::keep_network()?;
            let (outcome, found) = probe::run(peer, &seen)?;
            diagnosis.findings.extend(found);
            diagnosis.probe = Some(outcome);
        }
        finding::sort(&mut diagnosis.findings);
    }
    Ok(diagnosis)
}

/// What the ledger has of the container now, or that it is dead.
fn living(record: Record, status: Status, hook: &str) -> Result<Known, Box<Finding>> {
    let is_it = |found: &status::Container| found.record.instance.container == record.instance.container;
    match status.containers.into_iter().find(is_it) {
        Some(found) if found.live => Ok(Known {
            record: *found.record,
            interrupted: found.interrupted,
            not_followed: found.not_followed,
            drifted: found.drifted,
        }),
        _ => {
            let pid = record.instance.pid.map_or("its namespace".into(), |pid| format!("pid {pid}"));
            let what = format!("{} is dead, and nobody has let it go", record.name);
            let finding = Finding::new(&finding::CONTAINER_DEAD, what, format!("{pid} is gone"));
            Err(Box::new(finding.mend("let it go").by(format!("{hook} release {}", record.instance.container.id))))
        }
    }
}

/// The namespace, and what stands before a command that is to run there.
fn way_in(target: &Target, instance: Option<&Instance>) -> Result<(Visit, String)> {
    let (namespace, pid, place) = match (instance, target) {
        (Some(instance), _) => {
            let open = |place: &String| {
                let namespace = Namespace::open(Path::new(place)).ok()?;
                (namespace.inode() == instance.netns.inode).then(|| (namespace, place.clone()))
            };
            let Some((namespace, place)) = instance.netns_places().iter().find_map(open) else {
                bail!("cannot open the network namespace of {} (run as root)", instance.container.id);
            };
            (namespace, instance.pid, place)
        }
        (None, Target::Pid(pid)) => (open_netns_of(*pid)?.0, Some(*pid), format!("/proc/{pid}/ns/net")),
        (None, Target::Netns(path)) => {
            let attempt = || format!("cannot open the network namespace {}", path.display());
            (Namespace::open(path).with_context(attempt)?, None, path.display().to_string())
        }
        (None, Target::Known(name)) => bail!("the ledger knows no container \"{name}\""),
    };
    let visit = Visit::to(namespace, pid)?;
    let enter = match (visit.target_is_host(), pid) {
        (true, _) => String::new(),
        // Only its own user namespace gives an ordinary user the right.
        (false, Some(pid)) if !nix::unistd::geteuid().is_root() => {
            format!("nsenter --preserve-credentials --user --net --target {pid}")
        }
        (false, _) => format!("nsenter --net={}", shell_word(&place)),
    };
    Ok((visit, enter))
}

/// The settings that have to be looked at.
fn keys(known: Option<&Known>) -> Vec<SettingKey> {
    known.iter().flat_map(|known| known.record.netns_claims()).map(|own| own.key.clone()).collect()
}

/// Reads everything in the namespace. The thread stays there.
fn look(
    kernel: &mut dyn Kernel,
    known: Option<Known>,
    names: Names,
    netns: u64,
    peer: Option<IpAddr>,
    context: &Context,
) -> Result<Seen> {
    let mut facts = kernel.facts(&keys(known.as_ref()))?;
    facts.default_route_links = kernel.default_route_links()?;
    facts.routing = Some(kernel.routing()?);
    let mut ways = Route::open(context.deadline)?;
    let sockets = match facts.kind {
        Kind::Upstream => look_at_sockets(&mut ways, context)?,
        Kind::MptcpOrg | Kind::None => None,
    };
    let addresses = ways_out(&mut ways, &facts, sockets.as_ref(), peer)?;
    let rp_filter = |name: &str| {
        let text = read_text(&format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"));
        text.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    let each = facts.links.iter().map(|link| (link.index, rp_filter(&link.name))).collect();
    let netstat = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap_or_default();
    Ok(Seen {
        names,
        known,
        policy: context.policy.clone(),
        ways: addresses,
        routes: ways.entries()?,
        neighbours: ways.neighbours()?,
        rp_filter: (rp_filter("all"), each),
        sockets,
        fallbacks: sockets::fallbacks(&netstat),
        managers: host::managers(netns),
        facts,
    })
}

/// The ways out of the endpoints' addresses.
fn ways_out(
    ways: &mut Route,
    facts: &Facts,
    sockets: Option<&Sockets>,
    probed: Option<IpAddr>,
) -> Result<BTreeMap<IpAddr, Way>> {
    let mut all = BTreeMap::new();
    for endpoint in &facts.endpoints {
        let address = endpoint.address;
        let Some(home) = facts.addresses.iter().find(|assigned| assigned.ip == address) else { continue };
        let mut way = Way {
            bound: ways.next_hop(address, None, Some(home.ifindex))?,
            free: ways.next_hops(address)?,
            reached: None,
        };
        let connected = sockets.into_iter().flat_map(|sockets| sockets.peers_of(address));
        let peers: BTreeSet<IpAddr> = connected.chain(probed).filter(|p| p.is_ipv4() == address.is_ipv4()).collect();
        for peer in peers.into_iter().take(PEERS_MAX) {
            let is_home = |hop: Option<Hop>| hop.is_some_and(|hop| hop.ifindex == home.ifindex);
            if is_home(ways.next_hop(address, Some(peer), Some(home.ifindex))?) {
                let answers = is_home(ways.next_hop(address, Some(peer), None)?);
                way.reached = Some(Reached { peer, answers });
                break;
            }
        }
        all.insert(address, way);
    }
    Ok(all)
}

fn look_at_sockets(ways: &mut Route, context: &Context) -> Result<Option<Sockets>> {
    let mut diag = Diag::open(context.deadline)?;
    let Some(tcp) = diag.tcp()? else { return Ok(None) };
    let connections = diag.mptcp()?;
    // Thousands of connections to one peer ask the same.
    let mut known: BTreeMap<(IpAddr, IpAddr, u32), Option<Hop>> = BTreeMap::new();
    let mut hops = Vec::with_capacity(tcp.len());
    for socket in &tcp {
        let (local, peer) = (socket.local.ip(), socket.peer.ip());
        if socket.subflow.is_none() || local.is_ipv4() != peer.is_ipv4() {
            hops.push(None);
            continue;
        }
        let hop = match known.get(&(local, peer, socket.device)) {
            Some(hop) => hop.clone(),
            None => sockets::next_hop(ways, local, peer, socket.device)?,
        };
        hops.push(hop.clone());
        known.insert((local, peer, socket.device), hop);
    }
    Ok(Some(Sockets { tcp, connections, hops }))
}

/// What is worth knowing of a namespace when nothing is wrong.
fn facts(kind: Kind, seen: &Seen) -> Vec<(&'static str, String)> {
    use crate::request::flags::EndpointFlags;
    let mut facts = vec![("kernel", format!("{} MPTCP, Linux {}", kind.name(), seen.facts.release))];
    if let Some(limits) = seen.facts.limits {
        facts.push(("limits", LimitPair::from(limits).to_string()));
    }
    for endpoint in &seen.facts.endpoints {
        let way = seen.ways.get(&endpoint.address).and_then(|way| way.bound.as_ref());
        let way = match way {
            Some(Hop { ifindex, gateway: Some(gateway), .. }) => {
                format!(" via {gateway} dev {}", seen.link_name(*ifindex))
            }
            Some(Hop { ifindex, gateway: None, .. }) => format!(" dev {}", seen.link_name(*ifindex)),
            None => String::new(),
        };
        let names = EndpointFlags(endpoint.flags).names().join(",");
        facts.push(("endpoint", format!("{} id {} {names}{way}", endpoint.address, endpoint.id)));
    }
    if let Some(sockets) = &seen.sockets {
        let plain = sockets.tcp.iter().filter(|socket| !socket.is_mptcp).count();
        let mptcp = sockets.tcp.len() - plain;
        facts.push((
            "sockets",
            format!(
                "{} MPTCP connections; {mptcp} TCP sockets of MPTCP, {plain} plain",
                sockets.connections.as_ref().map_or(0, Vec::len)
            ),
        ));
    }
    facts
}
