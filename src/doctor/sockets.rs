//! What the sockets of a namespace show: whether they are MPTCP at all, and what has become of their subflows.

use std::net::IpAddr;

use anyhow::Result;
use serde::Serialize;

use super::finding::{self, Finding};
use super::seen::{Seen, Sockets};
use crate::kernel::Link;
use crate::kernel::netlink::diag::{TcpSocket, TcpState};
use crate::kernel::netlink::neighbours::Neighbour;
use crate::kernel::netlink::route::Route;
use crate::kernel::netlink::routing::Hop;
use crate::request::flags::EndpointFlags;

/// How many sockets stand in one finding's evidence.
const EXAMPLES: usize = 3;

/// A subflow, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// The connection's number on this side, in hexadecimal.
    pub connection: String,
    /// This side.
    pub local: String,
    /// The other side.
    pub peer: String,
    /// The interface by which its packets leave.
    pub interface: Option<String>,
    /// As ss(8) names it.
    pub state: &'static str,
    /// The flags as ss(8) shows them.
    pub flags: String,
    /// Whether this side has it for a backup path.
    pub backup: bool,
    /// Whether the other side has.
    pub peer_backup: bool,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
}

/// The subflows as they are shown.
pub fn shown(seen: &Seen) -> Vec<Shown> {
    let Some(sockets) = &seen.sockets else { return Vec::new() };
    let mut all: Vec<Shown> = sockets
        .tcp
        .iter()
        .zip(&sockets.hops)
        .filter_map(|(socket, hop)| show(socket, hop.as_ref().map(|hop| seen.link_name(hop.ifindex))))
        .collect();
    all.sort_by(|a, b| (&a.connection, &a.local).cmp(&(&b.connection, &b.local)));
    all
}

/// A subflow as it is shown; None for any other socket.
pub fn show(socket: &TcpSocket, interface: Option<String>) -> Option<Shown> {
    let subflow = socket.subflow?;
    Some(Shown {
        connection: format!("{:08x}", subflow.token),
        local: socket.local.to_string(),
        peer: socket.peer.to_string(),
        interface,
        state: socket.state.name(),
        flags: subflow.letters(),
        backup: subflow.is_backup(),
        peer_backup: subflow.is_peers_backup(),
        sent: socket.sent,
        received: socket.received,
    })
}

/// Where packets of a socket that is bound to `device`, or to none (0), go next. Where no route leads there by that
/// interface, the kernel asks its link for the peer itself.
pub fn next_hop(ways: &mut Route, local: IpAddr, peer: IpAddr, device: u32) -> Result<Option<Hop>> {
    let bound = (device != 0).then_some(device);
    let hop = ways.next_hop(local, Some(peer), bound)?.filter(|hop| bound.is_none_or(|index| index == hop.ifindex));
    Ok(hop.or(bound.map(|ifindex| Hop { ifindex, gateway: None, onlink: false })))
}

/// The machine to which packets to `peer` go next, if it was asked for and has not answered.
pub fn silent_next<'a>(neighbours: &'a [Neighbour], hop: &Hop, peer: IpAddr) -> Option<&'a Neighbour> {
    let next = hop.gateway.unwrap_or(peer);
    neighbours.iter().find(|n| n.ifindex == hop.ifindex && n.address == next && n.is_silent())
}

/// All that is wrong with them.
pub fn judge(seen: &Seen, found: &mut Vec<Finding>) {
    let Some(sockets) = &seen.sockets else {
        let evidence = "tcp_diag is neither built in nor loaded";
        let finding = Finding::new(&finding::SOCKETS_UNREADABLE, "the kernel cannot list the sockets", evidence);
        found.push(finding.mend("load the modules").by("modprobe tcp_diag && modprobe mptcp_diag"));
        return;
    };
    plain(seen, sockets, found);
    for (socket, hop) in sockets.tcp.iter().zip(&sockets.hops) {
        let leaves_by = hop.as_ref().map(|hop| hop.ifindex);
        let Some(subflow) = socket.subflow else { continue };
        let is_loopback = |link: &Link| link.flags & libc::IFF_LOOPBACK as u32 != 0;
        // Between programs of one container no path leads out; a join from another address is never answered.
        if seen.is_own(socket.peer.ip()) || leaves_by.and_then(|index| seen.link(index)).is_some_and(is_loopback) {
            continue;
        }
        let home = seen.home(socket.local.ip()).filter(|home| !is_loopback(home));
        let ends = format!("{} to {}", socket.local.ip(), socket.peer);
        if socket.state == TcpState::SynSent && subflow.is_join() && socket.retransmits > 0 {
            found.push(stuck(seen, socket, hop.as_ref(), &ends, found));
        }
        let Some(home) = home else { continue };
        let name = home.name.as_str();
        if socket.state != TcpState::Established {
            continue;
        }
        if let Some(other) = leaves_by.filter(|index| *index != home.index) {
            let other = seen.link_name(other);
            let what = format!("the subflow {ends} leaves by {other}, and its address is {name}'s");
            let bound = if socket.device == 0 {
                "bound to no interface".into()
            } else {
                format!("bound to {}", seen.link_name(socket.device))
            };
            let evidence = format!("{bound}; route from {} to {}: dev {other}", socket.local.ip(), socket.peer.ip());
            let mend = format!(
                "mend what else is found about {name}; the subflow stays where it is until its connection ends"
            );
            found.push(Finding::new(&finding::SUBFLOW_ELSEWHERE, what, evidence).on(name).mend(mend));
        }
        if let Some(endpoint) = seen.facts.endpoint(socket.local.ip()).filter(|_| subflow.is_join()) {
            let wanted = EndpointFlags(endpoint.flags).contains(EndpointFlags::BACKUP);
            if wanted != subflow.is_backup() {
                let word = |is: bool| if is { "a backup path" } else { "a normal path" };
                let what =
                    format!("the subflow {ends} is {}, and its endpoint {}", word(subflow.is_backup()), word(wanted));
                // A change that does not name it takes it away, and closes live subflows.
                let fullmesh =
                    if EndpointFlags(endpoint.flags).contains(EndpointFlags::FULLMESH) { " fullmesh" } else { "" };
                let flip = |to: &str| format!("ip mptcp endpoint change id {} {to}{fullmesh}", endpoint.id);
                let (away, back) = if wanted { ("nobackup", "backup") } else { ("backup", "nobackup") };
                let finding = Finding::new(&finding::SUBFLOW_BACKUP, what, format!("flags {}", subflow.letters()));
                found.push(
                    finding
                        .on(name)
                        .mend("change the endpoint there and back: its live subflows follow")
                        .by(seen.inside(&[flip(away), flip(back)])),
                );
            }
        }
    }
    lacking(seen, sockets, found);
}

/// A subflow that gets no answer.
fn stuck(seen: &Seen, socket: &TcpSocket, hop: Option<&Hop>, ends: &str, found: &[Finding]) -> Finding {
    let home = seen.home(socket.local.ip());
    let name = hop.map(|hop| hop.ifindex).or(home.map(|home| home.index)).map(|index| seen.link_name(index));
    let asked = hop.and_then(|hop| silent_next(&seen.neighbours, hop, socket.peer.ip()));
    let asked = asked.map(|neighbour| format!("; {}", seen.shown(neighbour)));
    let evidence = format!("SYN-SENT, repeated {} times{}", socket.retransmits, asked.unwrap_or_default());
    let mut finding = Finding::new(&finding::SUBFLOW_STUCK, format!("the subflow {ends} gets no answer"), evidence);
    let path = name.clone().unwrap_or_else(|| "this path".into());
    finding.interface = name;
    match found.iter().any(|other| other.interface.is_some() && other.interface == finding.interface) {
        true => finding.mend(format!("mend what else is found about {path}; the kernel then gets through by itself or gives up")),
        false => finding.mend(format!(
            "the way out by {path} is there: look at the peer's way back (a rule for its address, its rp_filter), at filters that drop TCP option 30, and at the peer's limit of subflows"
        )),
    }
}

/// Plain TCP against MPTCP.
fn plain(seen: &Seen, sockets: &Sockets, found: &mut Vec<Finding>) {
    // The kernel does not say of a half-open connection what it will be.
    let is_outward =
        |s: &&TcpSocket| !s.local.ip().is_loopback() && !seen.is_own(s.peer.ip()) && s.state != TcpState::SynReceived;
    let (mptcp, plain): (Vec<&TcpSocket>, Vec<&TcpSocket>) =
        sockets.tcp.iter().filter(is_outward).partition(|socket| socket.is_mptcp);
    let first = |all: &[&TcpSocket]| {
        let one = |s: &&TcpSocket| match s.state {
            TcpState::Listen => format!("{} LISTEN", s.local),
            state => format!("{} to {} {}", s.local, s.peer, state.name()),
        };
        let mut text = all.iter().take(EXAMPLES).map(one).collect::<Vec<_>>().join(", ");
        if all.len() > EXAMPLES {
            text += &format!(" and {} more", all.len() - EXAMPLES);
        }
        text
    };
    // A service that waits has no use for the addresses from which paths are opened.
    let is_announced = seen.facts.endpoints.iter().any(|e| EndpointFlags(e.flags).contains(EndpointFlags::SIGNAL));
    let concerned = plain.iter().filter(|s| is_announced || s.state != TcpState::Listen);
    let concerned: Vec<&TcpSocket> = concerned.copied().collect();
    if !concerned.is_empty() && mptcp.is_empty() && !seen.facts.endpoints.is_empty() {
        let what = format!("no socket is MPTCP, {} are plain TCP", concerned.len());
        let mend = "open the sockets with IPPROTO_MPTCP (262); a program that does not know it can be started by";
        let finding = Finding::new(&finding::TCP_ONLY, what, first(&concerned));
        found.push(finding.mend(mend).by("mptcpize run PROGRAM"));
    } else if !plain.is_empty() {
        let what = format!("{} sockets are plain TCP, {} belong to MPTCP", plain.len(), mptcp.len());
        found.push(Finding::new(&finding::TCP_MIXED, what, first(&plain)));
    }
    let fallen =
        |s: &&&TcpSocket| s.state == TcpState::Established && s.subflow.is_some_and(|subflow| !subflow.is_agreed());
    let fallen: Vec<&TcpSocket> = mptcp.iter().filter(fallen).copied().collect();
    if !fallen.is_empty() || !seen.fallbacks.is_empty() {
        let counters: Vec<String> = seen.fallbacks.iter().map(|(name, n)| format!("{name} {n}")).collect();
        let evidence = match (first(&fallen), counters.join(", ")) {
            (live, counters) if live.is_empty() => counters,
            (live, counters) if counters.is_empty() => live,
            (live, counters) => format!("{live}; {counters}"),
        };
        let total: u64 = seen.fallbacks.iter().map(|(_, n)| n).sum();
        let what = format!(
            "{} connections fell back to plain TCP, {} of them live",
            total.max(fallen.len() as u64),
            fallen.len()
        );
        let mend = "ask the peer for MPTCP (mptcp-hook doctor TARGET --probe HOST:PORT tells), or look for a proxy or firewall that removes TCP option 30";
        found.push(Finding::new(&finding::FALLBACKS, what, evidence).mend(mend));
    }
}

/// Connections that were opened here and have no subflow from an endpoint that could have one. A client that has neither
/// sent nor got anything has none yet, and one that has closed its side gets none any more.
fn lacking(seen: &Seen, sockets: &Sockets, found: &mut Vec<Finding>) {
    let Some(limits) = seen.facts.limits else { return };
    let opened = |s: &&TcpSocket| {
        s.state == TcpState::Established
            && !seen.is_own(s.peer.ip())
            && s.subflow.is_some_and(|s| {
                s.opened_connection() && s.is_agreed() && s.is_fully_established() && !sockets.is_closed(&s)
            })
    };
    for first in sockets.tcp.iter().filter(opened) {
        let all: Vec<&TcpSocket> = sockets.tcp.iter().filter(|s| s.is_sibling_of(first)).collect();
        let joins = all.iter().filter(|s| s.subflow.is_some_and(|subflow| subflow.is_join())).count();
        if joins >= limits.subflows as usize {
            continue;
        }
        for endpoint in &seen.facts.endpoints {
            let address: IpAddr = endpoint.address;
            let Some(home) = seen.home(address) else { continue };
            let name = home.name.as_str();
            let is_able = EndpointFlags(endpoint.flags).contains(EndpointFlags::SUBFLOW)
                && address.is_ipv4() == first.peer.is_ipv4()
                && home.is_running();
            let is_explained = found.iter().any(|other| {
                other.interface.as_deref() == Some(name)
                    && (other.severity == finding::Severity::Problem || other.id == finding::ROUTE_PARTIAL.id)
                    && other.id != finding::SUBFLOW_LACKING.id
            });
            if !is_able || is_explained || all.iter().any(|s| s.local.ip() == address) {
                continue;
            }
            let what =
                format!("the connection {} to {} has no subflow from {address} ({name})", first.local, first.peer);
            let mut listed = sockets.connections.iter().flatten();
            let counted = first.subflow.and_then(|s| listed.find(|connection| connection.token == s.token));
            let counted = counted.map(|c| format!("; the kernel counts {}", c.subflows)).unwrap_or_default();
            let evidence = format!("{joins} further subflows, none from there{counted}");
            let command = seen.rebuilt(endpoint, name, EndpointFlags(endpoint.flags));
            let mend =
                "make the endpoint anew: live connections try it again (or the peer refused the join: see its limits)";
            found.push(Finding::new(&finding::SUBFLOW_LACKING, what, evidence).on(name).mend(mend).by(command));
        }
    }
}

/// The counters of MPTcpExt in `/proc/net/netstat` that count connections which fell back, those that are not 0.
pub fn fallbacks(netstat: &str) -> Vec<(String, u64)> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("MPTcpExt:"));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { return Vec::new() };
    let counters = names.split_whitespace().zip(values.split_whitespace());
    counters
        // FallbackFailed counts those that could not.
        .filter(|(name, _)| name.contains("Fallback") && *name != "FallbackFailed")
        .filter_map(|(name, value)| Some((name.to_string(), value.parse().ok()?)))
        .filter(|(_, value)| *value > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fallbacks_that_happened_are_counted() {
        let netstat = "TcpExt: A Fallback\nTcpExt: 1 2\n\
                       MPTcpExt: MPCapableSYNTX MPCapableFallbackSYNACK MPCapableFallbackACK FallbackFailed DssFallback\n\
                       MPTcpExt: 9 3 0 4 x\n";
        assert_eq!(fallbacks(netstat), [("MPCapableFallbackSYNACK".to_string(), 3)]);
        assert_eq!(fallbacks("MPTcpExt: A\n"), []);
        assert_eq!(fallbacks(""), []);
    }
}
