//! The ways out of a network namespace: by which interface and gateway packets from an address leave (rtnetlink(7),
//! `include/uapi/linux/rtnetlink.h`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::route::Route;
use super::routing::{Entry, Hop};
use super::{Body, errno};

/// Answer with the routing table's entry (Linux 4.13).
const RTM_F_FIB_MATCH: u32 = 0x2000;

/// Public addresses that no interface's own network contains: the abandoned 6to4 anycast prefix (RFC 7526) and the
/// newer documentation prefix (RFC 9637). What leads there is a default route, or as good as one. The well-known
/// documentation networks do not serve: people number their test networks with them. Nothing is ever sent.
const ELSEWHERE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 88, 99, 1));
const ELSEWHERE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 1));

/// Whether packets from an endpoint's address find a way out by its interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteState {
    /// They do.
    Ok,
    /// No usable route: a subflow from there would hang in SYN-SENT.
    Missing,
    /// Not an endpoint, or the kernel could not say.
    #[default]
    Unknown,
}

impl RouteState {
    /// The state of an interface with endpoints of these states.
    pub fn worst(states: &[Self]) -> Self {
        if states.contains(&Self::Missing) {
            Self::Missing
        } else if states.contains(&Self::Ok) {
            Self::Ok
        } else {
            Self::Unknown
        }
    }
}

impl Route {
    /// The next hop of packets from `source` to `destination`, or to the world outside where none is said; bound to
    /// `interface` if there is one. None if there is no route.
    pub fn next_hop(
        &mut self,
        source: IpAddr,
        destination: Option<IpAddr>,
        interface: Option<u32>,
    ) -> Result<Option<Hop>> {
        match self.look_up(source, destination, interface) {
            // No route, or one that forbids it.
            Err(error) if errno(&error).is_some() => Ok(None),
            found => found.with_context(|| format!("cannot look up the route from {source}")),
        }
    }

    /// The next hops of packets from `source` to the world outside that are bound to no interface: several, where a route
    /// shares the traffic among them; none if there is no route.
    pub fn next_hops(&mut self, source: IpAddr) -> Result<Vec<Hop>> {
        match self.hops(source, true, None, None) {
            // No route, or one that forbids it.
            Err(error) if errno(&error).is_some() => Ok(Vec::new()),
            found => found.with_context(|| format!("cannot look up the route from {source}")),
        }
    }

    /// Whether a packet from `source`, bound to the interface `ifindex`, has a route to the world outside. None is there,
    /// either, while the interface is down or the address not assigned.
    pub fn usable_route(&mut self, source: IpAddr, ifindex: u32) -> Result<RouteState> {
        match self.look_up(source, None, Some(ifindex)) {
            Ok(Some(hop)) if hop.ifindex == ifindex => Ok(RouteState::Ok),
            Ok(Some(_)) => Ok(RouteState::Missing),
            Ok(None) => Ok(RouteState::Unknown),
            Err(error) => match errno(&error) {
                Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES | Errno::ENODEV) => {
                    Ok(RouteState::Missing)
                }
                Some(_) => Ok(RouteState::Unknown),
                None => Err(error).with_context(|| format!("cannot look up the route from {source}")),
            },
        }
    }

    /// Whether packets from `source` to the world outside leave by another interface than `ifindex`, at least some of
    /// them, or not at all, where no socket is bound to one.
    pub fn leaves_elsewhere(&mut self, source: IpAddr, ifindex: u32) -> Result<bool> {
        let hops = self.next_hops(source)?;
        Ok(hops.is_empty() || hops.iter().any(|hop| hop.ifindex != ifindex))
    }

    /// The interfaces by which packets to the world outside leave when nobody says by which (IPv4, IPv6); empty where
    /// there is no such route.
    pub fn default_interfaces(&mut self) -> Result<Vec<u32>> {
        let mut interfaces = Vec::new();
        for elsewhere in [ELSEWHERE_V4, ELSEWHERE_V6] {
            match self.hops(elsewhere, false, Some(elsewhere), None) {
                Ok(hops) => interfaces.extend(hops.iter().map(|hop| hop.ifindex)),
                // No route, or a family that the kernel does not have.
                Err(error) if errno(&error).is_some() => {}
                Err(error) => return Err(error).context("cannot look up the default route"),
            }
        }
        interfaces.sort_unstable();
        interfaces.dedup();
        Ok(interfaces)
    }

    fn look_up(&mut self, source: IpAddr, destination: Option<IpAddr>, interface: Option<u32>) -> Result<Option<Hop>> {
        let found = self.ask(source, true, destination, interface)?;
        match interface {
            // Given a source address, the kernel takes the interface for a preference (`ip6_route_output_flags`), while
            // it binds a subflow's socket; without one it looks at this interface's routes only. The first question
            // serves for rules by source address.
            Some(index) if source.is_ipv6() && found.as_ref().is_none_or(|hop| hop.ifindex != index) => {
                self.ask(source, false, destination, interface)
            }
            _ => Ok(found),
        }
    }

    /// The hop by `interface` of the route that the kernel finds, else its first; None if it names none.
    fn ask(
        &mut self,
        source: IpAddr,
        with_source: bool,
        destination: Option<IpAddr>,
        interface: Option<u32>,
    ) -> Result<Option<Hop>> {
        let hops = self.hops(source, with_source, destination, interface)?;
        let bound = interface.and_then(|index| hops.iter().find(|hop| hop.ifindex == index));
        Ok(bound.or(hops.first()).cloned())
    }

    /// The hops of the route that the kernel finds.
    fn hops(
        &mut self,
        source: IpAddr,
        with_source: bool,
        destination: Option<IpAddr>,
        interface: Option<u32>,
    ) -> Result<Vec<Hop>> {
        let body = question(source, with_source, destination, interface);
        let entries = self.connection().request(libc::RTM_GETROUTE, &body, Entry::parse)?;
        Ok(entries.into_iter().flat_map(|entry| entry.hops).collect())
    }
}

/// The question for the route of a packet from `source`, to `destination` or else to the world outside, bound to the
/// interface or to none.
fn question(source: IpAddr, with_source: bool, destination: Option<IpAddr>, ifindex: Option<u32>) -> Body {
    let (family, bits, elsewhere, flags) = match source {
        // Between two addresses that both are known the kernel says which of a route's hops it takes.
        IpAddr::V4(_) if destination.is_some() && ifindex.is_none() => (libc::AF_INET, 32, ELSEWHERE_V4, 0),
        // Asked for the table's entry, the kernel cannot answer with the one that it makes up where an interface
        // is given and no route found ("assume, that the destination is on link", `ip_route_output_key_hash_rcu`).
        IpAddr::V4(_) => (libc::AF_INET, 32, ELSEWHERE_V4, RTM_F_FIB_MATCH),
        // All hops of the entry, and not the one that the hash of these two addresses falls on.
        IpAddr::V6(_) if destination.is_none() && ifindex.is_none() => {
            (libc::AF_INET6, 128, ELSEWHERE_V6, RTM_F_FIB_MATCH)
        }
        IpAddr::V6(_) => (libc::AF_INET6, 128, ELSEWHERE_V6, 0),
    };
    let mut info = [0; 12];
    info[0] = family as u8;
    info[1] = bits;
    info[2] = if with_source { bits } else { 0 };
    info[8..12].copy_from_slice(&u32::to_ne_bytes(flags));
    let mut body = Body::new(&info).address(libc::RTA_DST, destination.unwrap_or(elsewhere));
    if let Some(ifindex) = ifindex {
        body = body.attribute(libc::RTA_OIF, &ifindex.to_ne_bytes());
    }
    if with_source {
        body = body.address(libc::RTA_SRC, source);
    }
    body
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::super::testing::{in_namespace, ip as run_ip, soon};
    use super::*;
    use RouteState::{Missing, Ok as Usable};

    #[test]
    fn ways_out_of_a_namespace() {
        in_namespace(|| {
            run_ip(
                "link add eth0 index 40 type veth peer name peer0\nlink add eth1 index 41 type veth peer name peer1\n\
                 link set eth0 up\nlink set peer0 up\nlink set eth1 up\nlink set peer1 up\n\
                 addr add 10.0.0.2/24 dev eth0\naddr add 10.0.1.2/24 dev eth1\n\
                 route add default via 10.0.0.1 dev eth0\nroute add default via 10.0.1.1 dev eth1 table 1000\n\
                 neigh add 10.0.0.1 dev eth0 nud permanent lladdr 02:00:00:00:00:01\n",
            );
            let mut ways = Route::open(soon()).unwrap();
            let second = IpAddr::from([10, 0, 1, 2]);
            let first_hop = Some(Hop { ifindex: 40, gateway: Some([10, 0, 0, 1].into()), onlink: false });
            assert_eq!(ways.next_hop(second, None, None).unwrap(), first_hop);
            assert_eq!(ways.next_hop(second, None, Some(41)).unwrap(), None);
            let on_link = Some(Hop { ifindex: 41, gateway: None, onlink: false });
            assert_eq!(ways.next_hop(second, Some([10, 0, 1, 9].into()), Some(41)).unwrap(), on_link);
            run_ip("rule add from 10.0.1.2 table 1000\n");
            let second_hop = Some(Hop { ifindex: 41, gateway: Some([10, 0, 1, 1].into()), onlink: false });
            assert_eq!(ways.next_hop(second, None, None).unwrap(), second_hop);
            let defaults: Vec<u32> = ways
                .entries()
                .unwrap()
                .iter()
                .filter(|e| e.is_default() && e.destination.is_ipv4())
                .map(|e| e.table)
                .collect();
            assert!(defaults.contains(&254) && defaults.contains(&1000), "{defaults:?}");
            let neighbours = ways.neighbours().unwrap();
            let gateway = neighbours.iter().find(|n| n.address == IpAddr::from([10, 0, 0, 1])).unwrap();
            assert!(!gateway.is_silent() && gateway.state_name() == "PERMANENT");
        });
    }

    #[test]
    fn hops_that_share_the_traffic() {
        in_namespace(|| {
            run_ip(
                "link add eth0 index 40 type veth peer name peer0\nlink add eth1 index 41 type veth peer name peer1\n\
                 link set eth0 up\nlink set peer0 up\nlink set eth1 up\nlink set peer1 up\n\
                 addr add 10.0.0.2/24 dev eth0\naddr add 10.0.1.2/24 dev eth1\n\
                 route add default nexthop via 10.0.0.1 dev eth0 nexthop via 10.0.1.1 dev eth1\n\
                 addr add fd00::2/64 dev eth0 nodad\naddr add fd00:1::2/64 dev eth1 nodad\n\
                 route add ::/0 nexthop via fd00::1 dev eth0 nexthop via fd00:1::1 dev eth1\n",
            );
            let mut ways = Route::open(soon()).unwrap();
            // Whatever the hash of the source would choose.
            for i in 2..18 {
                let source: IpAddr = format!("fd00:1::{i}").parse().unwrap();
                if i > 2 {
                    run_ip(&format!("addr add {source}/64 dev eth1 nodad\n"));
                }
                let mut all: Vec<u32> = ways.next_hops(source).unwrap().iter().map(|hop| hop.ifindex).collect();
                all.sort_unstable();
                assert_eq!(all, [40, 41], "{source}");
            }
            let (first, second) = (IpAddr::from([10, 0, 0, 2]), IpAddr::from([10, 0, 1, 2]));
            let all: Vec<u32> = ways.next_hops(second).unwrap().iter().map(|hop| hop.ifindex).collect();
            assert_eq!(all, [40, 41]);
            assert!(ways.leaves_elsewhere(first, 40).unwrap() && ways.leaves_elsewhere(second, 41).unwrap());
            // Each pair of addresses has one of them; newer kernels take the one on the source's own network.
            for i in 0..16 {
                let peer = format!("198.18.0.{i}");
                let hop = ways.next_hop(second, Some(peer.parse().unwrap()), None).unwrap().unwrap();
                let ip = std::process::Command::new("ip").args(["route", "get", &peer, "from", "10.0.1.2"]).output();
                let told = String::from_utf8(ip.unwrap().stdout).unwrap();
                assert!(told.contains(&format!("dev eth{} ", hop.ifindex - 40)), "{hop:?}: {told}");
                let bound = ways.next_hop(second, Some(peer.parse().unwrap()), Some(41)).unwrap();
                assert_eq!(bound, Some(Hop { ifindex: 41, gateway: Some([10, 0, 1, 1].into()), onlink: false }));
            }
        });
    }

    /// A namespace with eth0 and eth1, where eth0 has the default routes and `more` is done; checks what is answered
    /// for (eth0 IPv4, eth0 IPv6, eth1 IPv4, eth1 IPv6).
    fn two_paths(more: &'static str, expected: [RouteState; 4]) {
        in_namespace(move || {
            let mut script = String::new();
            for i in 0..2 {
                writeln!(
                    script,
                    "link add eth{i} index {} type veth peer name peer{i}\n\
                     link set eth{i} up\nlink set peer{i} up\n\
                     addr add 10.0.{i}.2/24 dev eth{i}\naddr add fd00:{i}::2/64 dev eth{i}",
                    40 + i
                )
                .unwrap();
            }
            run_ip(&script);
            run_ip("route add default via 10.0.0.1 dev eth0\nroute add ::/0 via fd00::1 dev eth0\n");
            run_ip(more);
            let mut route = Route::open(soon()).unwrap();
            let mut ask = |ip: &str, index| route.usable_route(ip.parse().unwrap(), index).unwrap();
            let answers = [ask("10.0.0.2", 40), ask("fd00:0::2", 40), ask("10.0.1.2", 41), ask("fd00:1::2", 41)];
            assert_eq!(answers, expected, "{more}");
        });
    }

    #[test]
    fn route_missing_on_the_second_interface() {
        two_paths("", [Usable, Usable, Missing, Missing]);
    }

    #[test]
    fn a_test_network_is_not_the_world_outside() {
        two_paths(
            "addr add 192.0.2.2/24 dev eth1\naddr add 2001:db8::2/32 dev eth1 nodad\n",
            [Usable, Usable, Missing, Missing],
        );
    }

    #[test]
    fn route_by_a_second_default_of_higher_metric() {
        two_paths(
            "route add default via 10.0.1.1 dev eth1 metric 200\n\
             route add ::/0 via fd00:1::1 dev eth1 metric 2000\n",
            [Usable; 4],
        );
    }

    #[test]
    fn route_by_source_address() {
        two_paths(
            "rule add from 10.0.1.2 table 101\nroute add default via 10.0.1.1 dev eth1 table 101\n\
             -6 rule add from fd00:1::2 table 101\nroute add ::/0 via fd00:1::1 dev eth1 table 101\n",
            [Usable; 4],
        );
    }

    #[test]
    fn route_with_several_next_hops() {
        two_paths(
            "route replace default nexthop via 10.0.0.1 dev eth0 nexthop via 10.0.1.1 dev eth1\n\
             route append ::/0 via fd00:1::1 dev eth1\n",
            [Usable; 4],
        );
    }

    #[test]
    fn route_forbidden_by_a_rule() {
        two_paths(
            "route add default via 10.0.1.1 dev eth1 metric 200\n\
             route add ::/0 via fd00:1::1 dev eth1 metric 2000\n\
             rule add from 10.0.1.2 unreachable\n-6 rule add from fd00:1::2 prohibit\n",
            [Usable, Usable, Missing, Missing],
        );
    }

    #[test]
    fn route_through_an_interface_that_is_down() {
        two_paths(
            "route add default via 10.0.1.1 dev eth1 metric 200\nlink set eth1 down\n",
            [Usable, Usable, Missing, Missing],
        );
    }

    #[test]
    fn route_of_an_address_that_is_not_there() {
        in_namespace(|| {
            let mut route = Route::open(soon()).unwrap();
            for source in ["10.0.0.2", "fd00::2"] {
                assert_ne!(route.usable_route(source.parse().unwrap(), 40).unwrap(), Usable);
            }
        });
    }
}
