//! A real MPTCP connection from inside a namespace: which of its paths come up.
//!
//! The kernel makes further subflows only once the peer has acknowledged data: where the peer says nothing by itself,
//! one line break is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use super::finding::{self, Finding};
use super::seen::Seen;
use super::sockets::{self, Shown};
use crate::deadline::Deadline;
use crate::kernel::netlink::diag::{Diag, Subflow, TcpSocket, TcpState};
use crate::kernel::netlink::neighbours::Neighbour;
use crate::kernel::netlink::route::Route;
use crate::kernel::{Endpoint, Kind};
use crate::request::flags::EndpointFlags;

/// How long the first path may take: a SYN and two repetitions (RFC 6298).
pub const CONNECT_TIME: Duration = Duration::from_secs(5);
/// How long the further paths may take once this side has spoken, all of them at once.
pub const PATH_TIME: Duration = Duration::from_secs(4);
/// How long the peer has to speak first.
const PEER_SPEAKS: Duration = Duration::from_millis(250);
/// How soon the first SYN of a path is answered, or the kernel repeats it (RFC 6298).
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// How often the sockets are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What became of it.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// To where.
    pub peer: String,
    /// Whether there was a connection.
    pub connected: bool,
    /// Whether it was seen to be MPTCP.
    pub mptcp: bool,
    /// The milliseconds that the first path took.
    pub milliseconds: u64,
    /// Its subflows, those included that did not come up.
    pub subflows: Vec<Shown>,
}

/// What was seen of the connection.
#[derive(Default)]
struct Watched {
    /// Its first path, as it was seen last; none if it was gone before the first look.
    own: Option<TcpSocket>,
    /// How long it lasted, if the peer has ended it.
    ended: Option<Duration>,
    /// The addresses from which further paths were up.
    up: BTreeSet<IpAddr>,
    /// Those from which one was tried, from when to when. The kernel gives a path up whose next hop does not answer, and
    /// leaves nothing of it behind.
    tried: BTreeMap<IpAddr, (Duration, Duration)>,
}

impl Watched {
    /// For how long the kernel was seen to wait for an answer to a path's SYN.
    fn waited(&self, address: IpAddr) -> Option<Duration> {
        self.tried.get(&address).map(|(since, until)| *until - *since)
    }
}

/// Why no connection can be probed, if so.
pub fn impossible(peer: SocketAddr, seen: &Seen) -> Option<Finding> {
    let what = format!("no connection to {peer} was opened");
    let finding = |evidence: String| Finding::new(&finding::PROBE_IMPOSSIBLE, what, evidence);
    if seen.facts.kind != Kind::Upstream {
        let evidence = format!("the kernel's MPTCP is {}, and a probe is for upstream's", seen.facts.kind.name());
        let look = "cat /proc/net/mptcp_net/mptcp".to_owned();
        Some(finding(evidence).mend("have a program inside open one, and look at it").by(seen.inside(&[look])))
    } else if seen.sockets.is_none() {
        let evidence = "the kernel cannot list the sockets".to_owned();
        Some(finding(evidence).mend("load tcp_diag first, see sockets-unreadable"))
    } else {
        None
    }
}

/// Connects, looks, and hangs up. The thread is in the namespace.
pub fn run(peer: SocketAddr, seen: &Seen) -> Result<(Outcome, Vec<Finding>)> {
    let deadline = Deadline::after(CONNECT_TIME + PATH_TIME + Duration::from_secs(2));
    let (mut diag, mut ways) = (Diag::open(deadline)?, Route::open(deadline)?);
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
    let mut spoken: Option<Instant> = None;
    let mut watched = Watched::default();
    let mut all;
    loop {
        // Before the look, so that what was there in time is seen however late this process goes on; and from when the
        // kernel could begin, or a process that was not let go on would find that nothing was tried.
        let is_late = spoken.is_some_and(|since| since.elapsed() > PATH_TIME);
        all = diag.tcp()?.unwrap_or_default();
        let now = first(&all);
        let is_over = now.as_ref().is_none_or(|s| s.state != TcpState::Established) || has_hung_up(&stream)?;
        watched.ended = is_over.then(|| begin.elapsed());
        watched.own = now.or(watched.own);
        let Some(own) = watched.own.as_ref().filter(|s| s.subflow.is_some_and(|subflow| subflow.is_agreed())) else {
            break;
        };
        outcome.mptcp = true;
        for socket in all.iter().filter(|s| s.state == TcpState::SynSent && is_part_of(s, own)) {
            let now = begin.elapsed();
            watched.tried.entry(socket.local.ip()).or_insert((now, now)).1 = now;
        }
        if is_over {
            break;
        }
        watched.up = expected.iter().map(|endpoint| endpoint.address).filter(|ip| is_up(&all, own, *ip)).collect();
        if watched.up.len() == expected.len() || is_late {
            break;
        }
        if spoken.is_none() && begin.elapsed() > PEER_SPEAKS {
            // Whether the peer has hung up is looked at next.
            let _ = stream.write_all(b"\n");
            spoken = Some(Instant::now());
        }
        std::thread::sleep(LOOK);
    }
    for socket in all.iter().filter(|s| watched.own.as_ref().is_some_and(|own| is_part_of(s, own))) {
        let hop = sockets::next_hop(&mut ways, socket.local.ip(), socket.peer.ip(), socket.device)?;
        let interface = hop.map(|hop| seen.link_name(hop.ifindex));
        let plain = || TcpSocket { subflow: Some(Subflow::default()), ..socket.clone() };
        outcome
            .subflows
            .extend(sockets::show(socket, interface.clone()).or_else(|| sockets::show(&plain(), interface)));
    }
    let neighbours = ways.neighbours()?;
    let mut silent = BTreeMap::new();
    for &&Endpoint { address, ifindex, .. } in &expected {
        let hop = sockets::next_hop(&mut ways, address, peer.ip(), ifindex)?;
        let next = hop.and_then(|hop| sockets::silent_next(&neighbours, &hop, peer.ip()));
        silent.extend(next.map(|next| (address, next.clone())));
    }
    let found = judge(&outcome, seen, &expected, &watched, &silent);
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

/// Whether the peer has ended the connection. Its subflows stay established until this side ends it, too.
fn has_hung_up(stream: &TcpStream) -> Result<bool> {
    // Data that waits is nothing, its end is.
    let mut sockets = [PollFd::new(stream.as_fd(), PollFlags::from_bits_retain(libc::POLLRDHUP))];
    let ready = poll(&mut sockets, PollTimeout::ZERO).context("cannot tell whether the connection lasts")?;
    Ok(ready > 0)
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
fn is_part_of(socket: &TcpSocket, own: &TcpSocket) -> bool {
    own.local == socket.local && own.peer == socket.peer || socket.is_sibling_of(own)
}

/// Whether a further subflow from the address is established.
fn is_up(all: &[TcpSocket], own: &TcpSocket, address: IpAddr) -> bool {
    all.iter().any(|s| {
        s.state == TcpState::Established && s.local.ip() == address && s.is_sibling_of(own) && s.local != own.local
    })
}

/// What that says; `silent` are the next machines that have not answered, by the address that they were asked for.
fn judge(
    outcome: &Outcome,
    seen: &Seen,
    expected: &[&Endpoint],
    watched: &Watched,
    silent: &BTreeMap<IpAddr, Neighbour>,
) -> Vec<Finding> {
    let peer = &outcome.peer;
    let closed = |what: String| {
        let evidence = format!("it ended {} ms after it had come up", watched.ended.unwrap_or_default().as_millis());
        let mend = "probe a port whose service keeps a connection that says no more than one line break";
        Finding::new(&finding::PROBE_CLOSED, what, evidence).mend(mend)
    };
    let Some(own) = &watched.own else {
        return vec![closed(format!("{peer} ended the connection before it could be looked at"))];
    };
    if !outcome.mptcp {
        let evidence = own.subflow.map_or("the socket is plain TCP now".into(), |s| {
            format!("flags {}: no MP_CAPABLE in the SYN/ACK", s.letters())
        });
        let mend =
            "have the peer's program listen with IPPROTO_MPTCP; if it does, something on the way removes TCP option 30";
        return vec![Finding::new(&finding::PROBE_PLAIN, format!("{peer} speaks plain TCP only"), evidence).mend(mend)];
    }
    let (mut found, mut unknown) = (Vec::new(), Vec::new());
    for endpoint in expected {
        let address = endpoint.address;
        let waited = watched.waited(address);
        if watched.up.contains(&address) {
            continue;
        }
        if watched.ended.is_some() && waited.is_none_or(|time| time < ANSWER_TIME) {
            unknown.push(address.to_string());
            continue;
        }
        let home = seen.home(address);
        let name = home.map(|home| home.name.clone());
        let silent = silent.get(&address).map(|neighbour| format!("; {}", seen.shown(neighbour)));
        let evidence = match waited {
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
    if !unknown.is_empty() {
        let from = unknown.join(", ");
        found.push(closed(format!("{peer} ended the connection before a further path came up from {from}")));
    }
    if found.is_empty() {
        let up = outcome.subflows.iter().filter(|s| s.state != TcpState::SynSent.name()).count();
        let what = format!("an MPTCP connection to {peer} came up with {up} subflows");
        let evidence = format!("the first path took {} ms", outcome.milliseconds);
        found.push(Finding::new(&finding::PROBE_FINE, what, evidence));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::seen::testing::healthy;
    use super::*;

    fn peer() -> SocketAddr {
        ([10, 0, 0, 1], 80).into()
    }

    /// The findings' names, where a path from 10.0.2.2 is due.
    fn ids(watched: &Watched, mptcp: bool) -> Vec<&'static str> {
        let outcome =
            Outcome { peer: peer().to_string(), connected: true, mptcp, milliseconds: 1, subflows: Vec::new() };
        let seen = healthy();
        let expected: Vec<&Endpoint> = seen.facts.endpoints.iter().collect();
        judge(&outcome, &seen, &expected, watched, &BTreeMap::new()).iter().map(|finding| finding.id).collect()
    }

    #[test]
    fn the_end_of_a_connection_says_nothing_of_its_paths() {
        let address: IpAddr = [10, 0, 2, 2].into();
        let own = TcpSocket {
            state: TcpState::Established,
            local: ([10, 0, 1, 2], 40_000).into(),
            peer: peer(),
            device: 0,
            retransmits: 0,
            inode: 5,
            is_mptcp: true,
            subflow: Some(Subflow { token: 7, flags: 0b11, local_id: 0 }),
            sent: 0,
            received: 0,
        };
        let ended = Some(Duration::from_millis(300));
        let watched = || Watched { own: Some(own.clone()), ..Watched::default() };
        let tried = |seconds| BTreeMap::from([(address, (Duration::ZERO, Duration::from_secs(seconds)))]);
        // Gone before anybody looked: it may have been MPTCP.
        assert_eq!(ids(&Watched { ended, ..Watched::default() }, false), ["probe-peer-closed"]);
        assert_eq!(ids(&watched(), false), ["probe-plain-tcp"]);
        assert_eq!(ids(&watched(), true), ["probe-subflow-missing"]);
        assert_eq!(ids(&Watched { ended, ..watched() }, true), ["probe-peer-closed"]);
        assert_eq!(ids(&Watched { ended, tried: tried(0), ..watched() }, true), ["probe-peer-closed"]);
        // Long enough for an answer.
        assert_eq!(ids(&Watched { ended, tried: tried(1), ..watched() }, true), ["probe-subflow-missing"]);
        assert_eq!(ids(&Watched { ended, up: BTreeSet::from([address]), ..watched() }, true), ["probe-established"]);
    }

    #[test]
    fn where_nothing_can_be_probed() {
        let what =
            |seen: &Seen| impossible(peer(), seen).map(|finding| (finding.id, finding.evidence, finding.command));
        assert_eq!(what(&healthy()), None);
        let mut seen = healthy();
        seen.facts.kind = Kind::MptcpOrg;
        let (id, evidence, command) = what(&seen).unwrap();
        assert!(id == "probe-impossible" && evidence.contains("mptcp.org"), "{evidence}");
        assert_eq!(command.unwrap(), "nsenter --net=/x cat /proc/net/mptcp_net/mptcp");
        let (id, evidence, _) = what(&Seen { sockets: None, ..healthy() }).unwrap();
        assert!(id == "probe-impossible" && evidence.contains("cannot list"), "{evidence}");
    }
}
