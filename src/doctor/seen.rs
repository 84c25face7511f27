//! What the doctor has read about one container: in its namespace, and in the ledger.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::cli::Globals;
use crate::kernel::netlink::diag::{MptcpSocket, Subflow, TcpSocket, TcpState};
use crate::kernel::netlink::neighbours::Neighbour;
use crate::kernel::netlink::routing::{Entry, Hop};
use crate::kernel::{Endpoint, Facts, Link};
use crate::ledger::record::Record;
use crate::policy::Policy;
use crate::request::flags::EndpointFlags;
use crate::request::setting::SettingKey;

/// Everything that was read.
pub struct Seen {
    /// What commands are made of.
    pub names: Names,
    /// What the ledger has of it, if it is known.
    pub known: Option<Known>,
    /// What the administrator allows.
    pub policy: Policy,
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
    pub sockets: Option<Sockets>,
    /// The namespace's counters of connections that fell back to plain TCP.
    pub fallbacks: Vec<(String, u64)>,
    /// Other programs in the namespace that manage endpoints: name and pid.
    pub managers: Vec<(String, u32)>,
}

/// What stands in a command that a person is to run.
pub struct Names {
    /// How the hook is called with the same global options.
    pub hook: String,
    /// How the target is named on our command line: `web`, `--pid 12`.
    pub target: String,
    /// What stands before a command that is to run in its namespace; empty in our own.
    pub enter: String,
}

/// How a person calls the hook with these global options: another policy or ledger would not have what was seen.
pub fn hook_command(globals: &Globals) -> String {
    let options = [("--config", &globals.config), ("--state-dir", &globals.state_dir)];
    let given = options.iter().filter_map(|(name, path)| path.as_ref().map(|path| (name, path)));
    let words = given.map(|(name, path)| format!(" {name} {}", shell_word(&path.display().to_string())));
    format!("mptcp-hook{}", words.collect::<String>())
}

/// A word as a shell has to be told it.
pub fn shell_word(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
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

/// The ways of packets from one address: to the world outside, and to somebody who is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Bound to the interface that has the address.
    pub bound: Option<Hop>,
    /// Bound to none; several, where a route shares the traffic.
    pub free: Vec<Hop>,
    /// A peer that is reached by the interface that has the address.
    pub reached: Option<Reached>,
}

/// A peer of an established subflow, or the probe's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// Its address.
    pub peer: IpAddr,
    /// Whether packets that are bound to no interface take the same way.
    pub answers: bool,
}

impl Seen {
    /// The interface of that index.
    pub fn link(&self, index: u32) -> Option<&Link> {
        self.facts.link_at(index)
    }

    /// An interface's name, for people.
    pub fn link_name(&self, index: u32) -> String {
        self.link(index).map_or_else(|| format!("interface {index}"), |link| link.name.clone())
    }

    /// A machine on a link, as ip-neighbour(8) shows it.
    pub fn shown(&self, neighbour: &Neighbour) -> String {
        format!("{} dev {} {}", neighbour.address, self.link_name(neighbour.ifindex), neighbour.state_name())
    }

    /// The interface that has the address.
    pub fn home(&self, address: IpAddr) -> Option<&Link> {
        let assigned = self.facts.addresses.iter().find(|assigned| assigned.ip == address)?;
        self.link(assigned.ifindex)
    }

    /// Whether packets to the address stay in the namespace.
    pub fn is_own(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.facts.addresses.iter().any(|assigned| assigned.ip == address)
    }

    /// A command as it runs in the namespace; whatever comes from there, such as an interface's name, has to be a
    /// [`shell_word`] in it. Several stand in one shell, or the prefix would be for the first alone.
    pub fn inside(&self, commands: &[String]) -> String {
        let all = commands.join(" && ");
        match (self.names.enter.as_str(), commands.len()) {
            ("", _) => all,
            (enter, 1) => format!("{enter} {all}"),
            (enter, _) => format!("{enter} sh -ec {}", shell_word(&all)),
        }
    }

    /// The words that have the hook do again what was asked for.
    pub fn apply_again(&self) -> String {
        format!("{} apply {}", self.names.hook, self.names.target)
    }

    /// The commands that make an endpoint anew, on this interface and with these flags.
    pub fn rebuilt(&self, endpoint: &Endpoint, device: &str, flags: EndpointFlags) -> String {
        let &Endpoint { id, address, port, .. } = endpoint;
        let port = port.map(|port| format!(" port {port}")).unwrap_or_default();
        let (device, words) = (shell_word(device), flags.names().join(" "));
        self.inside(&[
            format!("ip mptcp endpoint delete id {id}"),
            format!("ip mptcp endpoint add {address} id {id}{port} dev {device} {words}"),
        ])
    }
}

/// The sockets, as they were read.
pub struct Sockets {
    /// All of TCP's.
    pub tcp: Vec<TcpSocket>,
    /// MPTCP's connections, where the kernel lists them. Those that this side has closed are not among them.
    pub connections: Option<Vec<MptcpSocket>>,
    /// For each of `tcp` that is a subflow: where its packets go next.
    pub hops: Vec<Option<Hop>>,
}

impl Sockets {
    /// The peers of established subflows from an address.
    pub fn peers_of(&self, address: IpAddr) -> impl Iterator<Item = IpAddr> {
        let from_there =
            move |s: &&TcpSocket| s.subflow.is_some() && s.state == TcpState::Established && s.local.ip() == address;
        self.tcp.iter().filter(from_there).map(|socket| socket.peer.ip())
    }

    /// Whether this side has closed the subflow's connection: the peer that has not keeps its subflows established for up
    /// to a minute.
    pub fn is_closed(&self, subflow: &Subflow) -> bool {
        let is_listed = |all: &Vec<MptcpSocket>| all.iter().any(|connection| connection.token == subflow.token);
        subflow.token != 0 && !self.connections.as_ref().is_none_or(is_listed)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! What is seen of a container that is well.

    use std::collections::BTreeSet;

    use super::*;
    use crate::kernel::{Address, Kind, Limits};

    const SUBFLOW: u32 = 2;
    const BACKUP: u32 = 4;

    /// eth0 (index 1) with a way out, eth1 (index 2) with the endpoint 10.0.2.2 and one, too.
    pub(crate) fn healthy() -> Seen {
        let address: IpAddr = [10, 0, 2, 2].into();
        let link = |index, name: &str| Link {
            index,
            name: name.into(),
            flags: (libc::IFF_UP | libc::IFF_LOWER_UP) as u32,
            kind: None,
            mtu: 1500,
        };
        let hop = |ifindex, gateway: [u8; 4]| Hop { ifindex, gateway: Some(gateway.into()), onlink: false };
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
            elsewhere: BTreeSet::new(),
            routing: None,
        };
        let way = Way { bound: Some(hop(2, [10, 0, 2, 1])), free: vec![hop(1, [10, 0, 1, 1])], reached: None };
        Seen {
            names: Names { hook: "mptcp-hook".into(), target: "web".into(), enter: "nsenter --net=/x".into() },
            known: None,
            policy: Policy::default(),
            facts,
            ways: BTreeMap::from([(address, way)]),
            routes: Vec::new(),
            neighbours: Vec::new(),
            rp_filter: (0, BTreeMap::new()),
            sockets: Some(Sockets { tcp: Vec::new(), connections: None, hops: Vec::new() }),
            fallbacks: Vec::new(),
            managers: Vec::new(),
        }
    }
}
