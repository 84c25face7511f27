//! The ways out of a network namespace in detail: by which interface and gateway, through which table, and whether the
//! gateway answers (rtnetlink(7), `include/uapi/linux/rtnetlink.h`, `neighbour.h`).

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::route::look_up_body;
use super::{Body, Connection, array, attributes, errno, header, ip};
use crate::deadline::Deadline;

/// `NUD_*`: states in which a neighbour was asked and has not answered.
const NUD_INCOMPLETE: u16 = 0x01;
const NUD_FAILED: u16 = 0x20;

/// The names of the `NUD_*` bits, from the lowest.
const NUD_NAMES: [&str; 8] = ["INCOMPLETE", "REACHABLE", "STALE", "DELAY", "PROBE", "FAILED", "NOARP", "PERMANENT"];

/// `NDA_DST`.
const NDA_DST: u16 = 1;

/// Where a packet goes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The interface that it leaves by.
    pub ifindex: u32,
    /// The machine that it goes to; none if the destination is on the link.
    pub gateway: Option<IpAddr>,
}

/// A route, as a table or a lookup has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Whether it leads to addresses of IPv6.
    pub is_ipv6: bool,
    /// The length of its destination's prefix; 0 for a default route.
    pub prefix: u8,
    /// The table.
    pub table: u32,
    /// Where packets go; several share the traffic.
    pub hops: Vec<Hop>,
}

impl Entry {
    /// Reads an RTM_NEWROUTE message (after `struct nlmsghdr`).
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let (info, rest) = header::<12>(payload)?;
        let mut table = u32::from(info[4]);
        let (mut ifindex, mut gateway, mut hops) = (None, None, Vec::new());
        for attribute in attributes(rest) {
            match attribute? {
                (libc::RTA_OIF, value) => ifindex = Some(u32::from_ne_bytes(array(value)?)),
                (libc::RTA_TABLE, value) => table = u32::from_ne_bytes(array(value)?),
                (libc::RTA_MULTIPATH, value) => hops = next_hops(value)?,
                (kind, value) => gateway = gateway_of(kind, value)?.or(gateway),
            }
        }
        hops.extend(ifindex.map(|ifindex| Hop { ifindex, gateway }));
        Ok(Self { is_ipv6: i32::from(info[0]) == libc::AF_INET6, prefix: info[1], table, hops })
    }
}

/// The gateway in an attribute, if it holds one.
fn gateway_of(kind: u16, value: &[u8]) -> Result<Option<IpAddr>> {
    match kind {
        libc::RTA_GATEWAY => ip(value).map(Some),
        // struct rtvia: the family in two bytes, then the address.
        libc::RTA_VIA => header::<2>(value).and_then(|(_, address)| ip(address)).map(Some),
        _ => Ok(None),
    }
}

/// Each struct rtnexthop: length, flags, hops, interface; its own attributes follow within the length.
fn next_hops(mut value: &[u8]) -> Result<Vec<Hop>> {
    let mut hops = Vec::new();
    while !value.is_empty() {
        let (hop, _) = header::<8>(value)?;
        let length = usize::from(u16::from_ne_bytes([hop[0], hop[1]]));
        ensure!((8..=value.len()).contains(&length), "malformed route message: a next hop of {length} bytes");
        let mut gateway = None;
        for attribute in attributes(&value[8..length]) {
            let (kind, value) = attribute?;
            gateway = gateway_of(kind, value)?.or(gateway);
        }
        hops.push(Hop { ifindex: u32::from_ne_bytes([hop[4], hop[5], hop[6], hop[7]]), gateway });
        value = value.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(hops)
}

/// What the kernel knows of another machine on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The link.
    pub ifindex: u32,
    /// The machine's address.
    pub address: IpAddr,
    /// `NUD_*`.
    pub state: u16,
}

impl Neighbour {
    /// Reads an RTM_NEWNEIGH message (after `struct nlmsghdr`); None for those that are no IP address (bridges).
    pub fn parse(payload: &[u8]) -> Result<Option<Self>> {
        let (info, rest) = header::<12>(payload)?;
        if ![libc::AF_INET, libc::AF_INET6].contains(&i32::from(info[0])) {
            return Ok(None);
        }
        for attribute in attributes(rest) {
            if let (NDA_DST, value) = attribute? {
                return Ok(Some(Self {
                    ifindex: u32::from_ne_bytes([info[4], info[5], info[6], info[7]]),
                    address: ip(value)?,
                    state: u16::from_ne_bytes([info[8], info[9]]),
                }));
            }
        }
        Ok(None)
    }

    /// Whether it was asked and has not answered.
    pub fn is_silent(&self) -> bool {
        self.state & (NUD_INCOMPLETE | NUD_FAILED) != 0
    }

    /// The state as ip-neighbour(8) shows it.
    pub fn state_name(&self) -> String {
        let names = NUD_NAMES.iter().enumerate().filter(|(bit, _)| self.state & 1 << bit != 0);
        let names: Vec<&str> = names.map(|(_, name)| *name).collect();
        if names.is_empty() { "NONE".into() } else { names.join("|") }
    }
}

/// An rtnetlink connection to the network namespace in which it was opened.
pub struct Ways {
    connection: Connection,
}

impl Ways {
    /// Connects to the calling thread's network namespace.
    pub fn open(deadline: Deadline) -> Result<Self> {
        Ok(Self { connection: Connection::open(NETLINK_ROUTE, deadline)? })
    }

    /// The next hop of packets from `source` to `destination`, or to the world outside where none is said; bound to
    /// `interface` if there is one. None if there is no route.
    pub fn next_hop(
        &mut self,
        source: IpAddr,
        destination: Option<IpAddr>,
        interface: Option<u32>,
    ) -> Result<Option<Hop>> {
        let found = self.look_up(source, true, destination, interface)?;
        match (interface, &found) {
            // As in `Route::usable_route`: IPv6 takes an interface beside a source for a preference.
            (Some(index), hop) if source.is_ipv6() && hop.as_ref().is_none_or(|hop| hop.ifindex != index) => {
                self.look_up(source, false, destination, interface)
            }
            _ => Ok(found),
        }
    }

    fn look_up(
        &mut self,
        source: IpAddr,
        with_source: bool,
        destination: Option<IpAddr>,
        interface: Option<u32>,
    ) -> Result<Option<Hop>> {
        let body = look_up_body(source, with_source, destination, interface);
        let entries = self.connection.request(libc::RTM_GETROUTE, &body, |payload| Entry::parse(payload).map(Some));
        let entries = match entries {
            Ok(entries) => entries,
            // No route, or one that forbids it.
            Err(error) if errno(&error).is_some() => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot look up the route from {source}")),
        };
        let hops: Vec<Hop> = entries.into_iter().flat_map(|entry| entry.hops).collect();
        let bound = interface.and_then(|index| hops.iter().find(|hop| hop.ifindex == index));
        Ok(bound.or(hops.first()).cloned())
    }

    /// The routes of all tables, of both families.
    pub fn routes(&mut self) -> Result<Vec<Entry>> {
        self.both(libc::RTM_GETROUTE, |payload| Entry::parse(payload).map(Some)).context("cannot list the routes")
    }

    /// The other machines that the kernel has asked for.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>> {
        self.both(libc::RTM_GETNEIGH, Neighbour::parse).context("cannot list the neighbours")
    }

    fn both<T>(&mut self, kind: u16, parse: impl Fn(&[u8]) -> Result<Option<T>>) -> Result<Vec<T>> {
        let mut all = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut info = [0; 12];
            info[0] = u8::try_from(family)?;
            match self.connection.dump(kind, &Body::new(&info), &parse) {
                Ok(found) => all.extend(found),
                // A kernel without IPv6.
                Err(error) if family == libc::AF_INET6 && errno(&error).is_some() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{in_namespace, ip as run_ip, payload, soon, torment};
    use super::*;

    #[test]
    fn routes_are_read() {
        let mut info = [0; 12];
        (info[0], info[4]) = (libc::AF_INET as u8, 254);
        let gateway = payload(Body::new(&[]).attribute(libc::RTA_GATEWAY, &[10, 0, 1, 1]));
        let hop = |index: u32, rest: &[u8]| {
            [&(8 + rest.len() as u16).to_ne_bytes()[..], &[0, 0], &index.to_ne_bytes(), rest].concat()
        };
        let hops = [hop(5, &gateway), hop(6, &[])].concat();
        let message = payload(
            Body::new(&info).attribute(libc::RTA_TABLE, &1000u32.to_ne_bytes()).attribute(libc::RTA_MULTIPATH, &hops),
        );
        let expected = vec![Hop { ifindex: 5, gateway: Some([10, 0, 1, 1].into()) }, Hop { ifindex: 6, gateway: None }];
        assert_eq!(Entry::parse(&message).unwrap(), Entry { is_ipv6: false, prefix: 0, table: 1000, hops: expected });
        torment(&message, |message| drop(Entry::parse(message)));
        let via = [&(libc::AF_INET6 as u16).to_ne_bytes()[..], &[0xfd; 16]].concat();
        let message =
            payload(Body::new(&info).attribute(libc::RTA_OIF, &3u32.to_ne_bytes()).attribute(libc::RTA_VIA, &via));
        assert_eq!(Entry::parse(&message).unwrap().hops, [Hop { ifindex: 3, gateway: Some([0xfd; 16].into()) }]);
        torment(&message, |message| drop(Entry::parse(message)));
    }

    #[test]
    fn neighbours_are_read() {
        let mut info = [0; 12];
        (info[0], info[4], info[8]) = (libc::AF_INET as u8, 7, 0x20);
        let message = payload(Body::new(&info).attribute(NDA_DST, &[10, 0, 2, 1]));
        let found = Neighbour::parse(&message).unwrap().unwrap();
        assert_eq!((found.ifindex, found.address, found.state_name().as_str()), (7, [10, 0, 2, 1].into(), "FAILED"));
        assert!(found.is_silent());
        torment(&message, |message| drop(Neighbour::parse(message)));
    }

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
            let mut ways = Ways::open(soon()).unwrap();
            let second = IpAddr::from([10, 0, 1, 2]);
            let first_hop = Some(Hop { ifindex: 40, gateway: Some([10, 0, 0, 1].into()) });
            assert_eq!(ways.next_hop(second, None, None).unwrap(), first_hop);
            assert_eq!(ways.next_hop(second, None, Some(41)).unwrap(), None);
            let on_link = Some(Hop { ifindex: 41, gateway: None });
            assert_eq!(ways.next_hop(second, Some([10, 0, 1, 9].into()), Some(41)).unwrap(), on_link);
            run_ip("rule add from 10.0.1.2 table 1000\n");
            let second_hop = Some(Hop { ifindex: 41, gateway: Some([10, 0, 1, 1].into()) });
            assert_eq!(ways.next_hop(second, None, None).unwrap(), second_hop);
            let defaults: Vec<u32> =
                ways.routes().unwrap().iter().filter(|e| e.prefix == 0 && !e.is_ipv6).map(|e| e.table).collect();
            assert!(defaults.contains(&254) && defaults.contains(&1000), "{defaults:?}");
            let neighbours = ways.neighbours().unwrap();
            let gateway = neighbours.iter().find(|n| n.address == IpAddr::from([10, 0, 0, 1])).unwrap();
            assert!(!gateway.is_silent() && gateway.state_name() == "PERMANENT");
        });
    }
}
