//! What the sockets of a namespace show: whether they are MPTCP at all, and what has become of their subflows.

use std::net::IpAddr;

use serde::Serialize;

use super::container;
use super::finding::{self, Finding};
use crate::kernel::netlink::diag::{MptcpSocket, TcpSocket, TcpState};
use crate::request::flags::EndpointFlags;

/// How many sockets stand in one finding's evidence.
const EXAMPLES: usize = 3;

/// The sockets, as they were read.
pub struct Seen {
    /// All of TCP's.
    pub tcp: Vec<TcpSocket>,
    /// MPTCP's connections, where the kernel lists them.
    pub connections: Vec<MptcpSocket>,
    /// For each of `tcp` that is a subflow: the interface by which its packets leave.
    pub leaves_by: Vec<Option<u32>>,
}

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
    /// Bytes sent and acknowledged.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
}

/// The subflows as they are shown.
pub fn shown(seen: &container::Seen) -> Vec<Shown> {
    let Some(sockets) = &seen.sockets else { return Vec::new() };
    let mut all: Vec<Shown> = sockets
        .tcp
        .iter()
        .zip(&sockets.leaves_by)
        .filter_map(|(socket, interface)| show(socket, interface.map(|index| seen.link_name(index))))
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
        sent: socket.acknowledged,
        received: socket.received,
    })
}

/// All that is wrong with them.
pub fn judge(seen: &container::Seen, found: &mut Vec<Finding>) {
    let Some(sockets) = &seen.sockets else {
        let evidence = "tcp_diag is neither built in nor loaded";
        let finding = Finding::new(&finding::SOCKETS_UNREADABLE, "the kernel cannot list the sockets", evidence);
        found.push(finding.mend("load the modules").by("modprobe tcp_diag && modprobe mptcp_diag"));
        return;
    };
    plain(seen, sockets, found);
    for (socket, leaves_by) in sockets.tcp.iter().zip(&sockets.leaves_by) {
        let Some(subflow) = socket.subflow else { continue };
        let home = seen.home(socket.local.ip()).filter(|home| home.flags & libc::IFF_LOOPBACK as u32 == 0);
        let ends = format!("{} to {}", socket.local.ip(), socket.peer);
        if socket.state == TcpState::SynSent && subflow.is_join() && socket.retransmits > 0 {
            found.push(stuck(seen, socket, leaves_by.or(home.map(|home| home.index)), &ends, found));
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
        let endpoint = seen.facts.endpoints.iter().find(|e| e.address == socket.local.ip() && e.port.is_none());
        if let Some(endpoint) = endpoint.filter(|_| subflow.is_join()) {
            let wanted = EndpointFlags(endpoint.flags).contains(EndpointFlags::BACKUP);
            if wanted != subflow.is_backup() {
                let word = |is: bool| if is { "a backup path" } else { "a normal path" };
                let what =
                    format!("the subflow {ends} is {}, and its endpoint {}", word(subflow.is_backup()), word(wanted));
                let flip = |to: &str| format!("ip mptcp endpoint change id {} {to}", endpoint.id);
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
fn stuck(seen: &container::Seen, socket: &TcpSocket, leaves_by: Option<u32>, ends: &str, found: &[Finding]) -> Finding {
    let name = leaves_by.map(|index| seen.link_name(index));
    let asked = seen.neighbours.iter().find(|n| Some(n.ifindex) == leaves_by && n.is_silent());
    let asked = asked.map(|n| format!("; {} dev {} {}", n.address, seen.link_name(n.ifindex), n.state_name()));
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
fn plain(seen: &container::Seen, sockets: &Seen, found: &mut Vec<Finding>) {
    let outward: Vec<&TcpSocket> =
        sockets.tcp.iter().filter(|s| !s.local.ip().is_loopback() && !s.peer.ip().is_loopback()).collect();
    let (mptcp, plain): (Vec<&TcpSocket>, Vec<&TcpSocket>) = outward.into_iter().partition(|socket| socket.is_mptcp);
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
    if !plain.is_empty() {
        let evidence = first(&plain);
        if mptcp.is_empty() && !seen.facts.endpoints.is_empty() {
            let what = format!("no socket is MPTCP, {} are plain TCP", plain.len());
            let mend = "open the sockets with IPPROTO_MPTCP (262); a program that does not know it can be started by";
            found.push(Finding::new(&finding::TCP_ONLY, what, evidence).mend(mend).by("mptcpize run PROGRAM"));
        } else {
            let what = format!("{} sockets are plain TCP, {} belong to MPTCP", plain.len(), mptcp.len());
            found.push(Finding::new(&finding::TCP_MIXED, what, evidence));
        }
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

/// Connections that were opened here and have no subflow from an endpoint that could have one.
fn lacking(seen: &container::Seen, sockets: &Seen, found: &mut Vec<Finding>) {
    let Some(limits) = seen.facts.limits else { return };
    let opened = |s: &&TcpSocket| {
        s.state == TcpState::Established
            && !s.peer.ip().is_loopback()
            && s.subflow.is_some_and(|subflow| subflow.opened_connection() && subflow.is_agreed())
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
                    && other.severity == finding::Severity::Problem
                    && other.id != finding::SUBFLOW_LACKING.id
            });
            if !is_able || is_explained || all.iter().any(|s| s.local.ip() == address) {
                continue;
            }
            let what =
                format!("the connection {} to {} has no subflow from {address} ({name})", first.local, first.peer);
            let counted = first.subflow.and_then(|s| sockets.connections.iter().find(|c| c.token == s.token));
            let counted = counted.map(|c| format!("; the kernel counts {}", c.subflows)).unwrap_or_default();
            let evidence = format!("{joins} further subflows, none from there{counted}");
            let words = EndpointFlags(endpoint.flags).names().join(" ");
            let id = endpoint.id;
            let command = seen.inside(&[
                format!("ip mptcp endpoint delete id {id}"),
                format!("ip mptcp endpoint add {address} id {id} dev {name} {words}"),
            ]);
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
