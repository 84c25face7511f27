//! A real MPTCP connection from inside a namespace: which of its paths come up.
//!
//! The kernel makes further subflows only once the peer has acknowledged data: where the peer says nothing by itself,
//! one line break is sent.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use super::container::Seen;
use super::finding::{self, Finding};
use super::sockets::{self, Shown};
use crate::deadline::Deadline;
use crate::kernel::Endpoint;
use crate::kernel::netlink::diag::{Diag, Subflow, TcpSocket, TcpState};
use crate::kernel::netlink::ways::{Neighbour, Ways};
use crate::request::flags::EndpointFlags;

/// How long the first path may take: a SYN and two repetitions (RFC 6298).
pub const CONNECT_TIME: Duration = Duration::from_secs(5);
/// How long the further paths may take after that, all of them at once.
pub const PATH_TIME: Duration = Duration::from_secs(4);
/// How long the peer has to speak first.
const PEER_SPEAKS: Duration = Duration::from_millis(250);
/// How often the sockets are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What became of it.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// To where.
    pub peer: String,
    /// Whether there was a connection.
    pub connected: bool,
    /// Whether it was MPTCP.
    pub mptcp: bool,
    /// The milliseconds that the first path took.
    pub milliseconds: u64,
    /// Its subflows, those included that did not come up.
    pub subflows: Vec<Shown>,
}

/// Connects, looks, and hangs up. The thread is in the namespace.
pub fn run(peer: SocketAddr, seen: &Seen) -> Result<(Outcome, Vec<Finding>)> {
    let deadline = Deadline::after(CONNECT_TIME + PATH_TIME + Duration::from_secs(2));
    let (mut diag, mut ways) = (Diag::open(deadline)?, Ways::open(deadline)?);
    let begin = Instant::now();
    let mut outcome =
        Outcome { peer: peer.to_string(), connected: false, mptcp: false, milliseconds: 0, subflows: Vec::new() };
    let mut stream = match connect(peer) {
        Ok(stream) => stream,
        Err(error) => {
            let what = format!("no connection to {peer}");
            let finding = Finding::new(&finding::PROBE_FAILED, what, format!("{error}"));
            let mend = "see that the service listens, and that a route leads there";
            return Ok((outcome, vec![finding.mend(mend)]));
        }
    };
    outcome.connected = true;
    outcome.milliseconds = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    let local = stream.local_addr().context("cannot tell the probe's own address")?;
    let first = |sockets: &[TcpSocket]| sockets.iter().find(|s| s.local == local && s.peer == peer).cloned();
    let expected = expected(seen, peer, local);
    let begin = Instant::now();
    let mut has_spoken = false;
    // The kernel gives a path up whose next hop does not answer, and leaves nothing of it behind.
    let mut tried: BTreeMap<IpAddr, Duration> = BTreeMap::new();
    let (mut own, mut all);
    loop {
        all = diag.tcp()?.unwrap_or_default();
        own = first(&all);
        let is_agreed = own.as_ref().and_then(|s| s.subflow).is_some_and(|subflow| subflow.is_agreed());
        if !is_agreed {
            break;
        }
        outcome.mptcp = true;
        let is_up = |endpoint: &&Endpoint| established(&all, own.as_ref(), endpoint).is_some();
        for socket in all.iter().filter(|s| s.state == TcpState::SynSent && is_part_of(s, own.as_ref())) {
            tried.insert(socket.local.ip(), begin.elapsed());
        }
        if expected.iter().all(is_up) || begin.elapsed() > PATH_TIME {
            break;
        }
        if !has_spoken && begin.elapsed() > PEER_SPEAKS {
            has_spoken = true;
            // A peer that has hung up shows in the sockets.
            let _ = stream.write_all(b"\n");
        }
        std::thread::sleep(LOOK);
    }
    for socket in all.iter().filter(|s| is_part_of(s, own.as_ref())) {
        let bound = (socket.device != 0).then_some(socket.device);
        let hop = ways.next_hop(socket.local.ip(), Some(socket.peer.ip()), bound)?;
        let interface = bound.or(hop.map(|hop| hop.ifindex)).map(|index| seen.link_name(index));
        let plain = || TcpSocket { subflow: Some(Subflow::default()), ..socket.clone() };
        outcome
            .subflows
            .extend(sockets::show(socket, interface.clone()).or_else(|| sockets::show(&plain(), interface)));
    }
    let neighbours = ways.neighbours()?;
    let found = judge(&outcome, seen, &expected, &all, own.as_ref(), &neighbours, &tried);
    Ok((outcome, found))
}

fn connect(peer: SocketAddr) -> Result<TcpStream> {
    let stream = crate::sys::mptcp_connect(peer).context("cannot open an MPTCP socket")?;
    let timeout = PollTimeout::try_from(CONNECT_TIME).unwrap_or(PollTimeout::MAX);
    let mut sockets = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut sockets, timeout).context("cannot wait for the connection")? == 0 {
        anyhow::bail!("no answer within {} s", CONNECT_TIME.as_secs());
    }
    match stream.take_error().context("cannot tell what became of the connection")? {
        Some(error) => Err(error.into()),
        None => Ok(stream),
    }
}

/// The endpoints from which a further path is due: not the first one's address, as many as the limit lets pass.
fn expected(seen: &Seen, peer: SocketAddr, local: SocketAddr) -> Vec<&Endpoint> {
    let limit = seen.facts.limits.map_or(0, |limits| limits.subflows) as usize;
    let is_due = |endpoint: &&Endpoint| {
        EndpointFlags(endpoint.flags).contains(EndpointFlags::SUBFLOW)
            && endpoint.address.is_ipv4() == peer.is_ipv4()
            && endpoint.address != local.ip()
    };
    seen.facts.endpoints.iter().filter(is_due).take(limit).collect()
}

/// Whether a socket belongs to the connection whose first subflow is `own`.
fn is_part_of(socket: &TcpSocket, own: Option<&TcpSocket>) -> bool {
    own.is_some_and(|own| own.local == socket.local && own.peer == socket.peer || socket.is_sibling_of(own))
}

/// The established subflow from an endpoint's address.
fn established<'a>(all: &'a [TcpSocket], own: Option<&TcpSocket>, endpoint: &Endpoint) -> Option<&'a TcpSocket> {
    let own = own?;
    all.iter().find(|s| {
        s.state == TcpState::Established
            && s.local.ip() == endpoint.address
            && s.is_sibling_of(own)
            && s.local != own.local
    })
}

/// What that says.
fn judge(
    outcome: &Outcome,
    seen: &Seen,
    expected: &[&Endpoint],
    all: &[TcpSocket],
    own: Option<&TcpSocket>,
    neighbours: &[Neighbour],
    tried: &BTreeMap<IpAddr, Duration>,
) -> Vec<Finding> {
    let peer = &outcome.peer;
    if !outcome.mptcp {
        let evidence = own.and_then(|s| s.subflow).map_or("the socket is plain TCP now".into(), |s| {
            format!("flags {}: no MP_CAPABLE in the SYN/ACK", s.letters())
        });
        let mend =
            "have the peer's program listen with IPPROTO_MPTCP; if it does, something on the way removes TCP option 30";
        return vec![Finding::new(&finding::PROBE_PLAIN, format!("{peer} speaks plain TCP only"), evidence).mend(mend)];
    }
    let mut found = Vec::new();
    for endpoint in expected {
        if established(all, own, endpoint).is_some() {
            continue;
        }
        let address = endpoint.address;
        let home = seen.home(address);
        let name = home.map(|home| home.name.clone());
        let silent = home.and_then(|home| neighbours.iter().find(|n| n.ifindex == home.index && n.is_silent()));
        let silent = silent.map(|n| format!("; {} dev {} {}", n.address, seen.link_name(n.ifindex), n.state_name()));
        let evidence = match tried.get(&address) {
            Some(time) => {
                format!("SYN-SENT for {:.1} s without an answer{}", time.as_secs_f64(), silent.unwrap_or_default())
            }
            None if home.is_none() => "the address is not assigned".into(),
            None => "the kernel has no subflow from there: no route, refused by the peer (its limits), or never tried"
                .into(),
        };
        let what = format!("no subflow from {address} to {peer}");
        let mut finding =
            Finding::new(&finding::PROBE_SUBFLOW, what, evidence).mend("see what else is found about this path");
        finding.interface = name;
        found.push(finding);
    }
    if found.is_empty() {
        let up = outcome.subflows.iter().filter(|s| s.state == TcpState::Established.name()).count();
        let what = format!("an MPTCP connection to {peer} came up with {up} subflows");
        let evidence = format!("the first path took {} ms", outcome.milliseconds);
        found.push(Finding::new(&finding::PROBE_FINE, what, evidence));
    }
    found
}
