//! Routing tables and rules of a network namespace (rtnetlink(7), `include/uapi/linux/rtnetlink.h`, `fib_rules.h`): what
//! the kernel says of routes, in tables and in answers to questions ([`Entry`]), and what the hook makes of its own.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::route::Route;
use super::{Body, array, attributes, errno, header, ip, text};

/// What marks our routes and rules (`rtm_protocol`, `FRA_PROTOCOL`): free in iproute2's `rt_protos`.
pub const PROTOCOL: u8 = 109;

/// `RTNH_F_ONLINK`, of a route's flags and of a next hop's.
const ONLINK: u32 = 4;
const FR_ACT_TO_TBL: u8 = 1;
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_OIFNAME: u16 = 17;
const FRA_L3MDEV: u16 = 19;
const FRA_PROTOCOL: u16 = 21;

/// Where a packet goes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The interface that it leaves by.
    pub ifindex: u32,
    /// The machine that it goes to; none if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Whether that machine is taken to be on the link, whatever the routes say (`onlink`).
    pub onlink: bool,
}

/// A machine that packets go to next, on an interface's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Its address.
    pub address: IpAddr,
    /// Whether it is taken to be on the link, whatever the routes say.
    pub onlink: bool,
}

/// A route as the kernel shows it, in a table or in the answer to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The table.
    pub table: u32,
    /// Where to; `0.0.0.0/0` and `::/0` are everywhere.
    pub destination: IpAddr,
    /// The prefix length of the destination.
    pub prefix: u8,
    /// What happens to the packets (`RTN_*`).
    pub kind: u8,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
    /// Where packets go; several share the traffic.
    pub hops: Vec<Hop>,
}

impl Entry {
    /// Reads an RTM_NEWROUTE message (after `struct nlmsghdr`); None for families other than IPv4 and IPv6.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>> {
        let (head, rest) = header::<12>(payload)?;
        let &[family, prefix, _, _, short_table, protocol, _, kind, flags @ ..] = head;
        let everywhere = match i32::from(family) {
            libc::AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            libc::AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => return Ok(None),
        };
        let (mut table, mut destination) = (u32::from(short_table), everywhere);
        let (mut ifindex, mut gateway, mut hops) = (None, None, Vec::new());
        for attribute in attributes(rest) {
            match attribute? {
                (libc::RTA_TABLE, value) => table = u32::from_ne_bytes(array(value)?),
                (libc::RTA_DST, value) => destination = ip(value)?,
                (libc::RTA_OIF, value) => ifindex = Some(u32::from_ne_bytes(array(value)?)),
                (libc::RTA_MULTIPATH, value) => hops = next_hops(value)?,
                (kind, value) => gateway = gateway_of(kind, value)?.or(gateway),
            }
        }
        let onlink = u32::from_ne_bytes(flags) & ONLINK != 0;
        hops.extend(ifindex.map(|ifindex| Hop { ifindex, gateway, onlink }));
        Ok(Some(Self { table, destination, prefix, kind, protocol, hops }))
    }

    /// Whether it leads everywhere.
    pub fn is_default(&self) -> bool {
        self.prefix == 0
    }

    /// Its way by an interface.
    pub fn hop_by(&self, ifindex: u32) -> Option<&Hop> {
        self.hops.iter().find(|hop| hop.ifindex == ifindex)
    }
}

/// Whether a listed route is no entry of its table (`RTM_F_CLONED`). In answers to questions it may be set for any.
fn is_cached(payload: &[u8]) -> Result<bool> {
    let (head, _) = header::<12>(payload)?;
    Ok(u32::from_ne_bytes(array(&head[8..])?) & libc::RTM_F_CLONED != 0)
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
        let onlink = u32::from(hop[2]) & ONLINK != 0;
        hops.push(Hop { ifindex: u32::from_ne_bytes([hop[4], hop[5], hop[6], hop[7]]), gateway, onlink });
        value = value.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(hops)
}

/// A way of one table by one interface. Ours are routes as a whole; those of others may share their traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRoute {
    /// The table's number.
    pub table: u32,
    /// Where to; `0.0.0.0/0` and `::/0` are everywhere.
    pub destination: IpAddr,
    /// The prefix length of the destination.
    pub prefix: u8,
    /// The next hop, unless the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Whether the next hop is taken to be on the link, whatever the routes say.
    #[serde(default)]
    pub onlink: bool,
    /// By which interface.
    pub ifindex: u32,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
}

impl TableRoute {
    /// The routes of an entry, one for each of its hops; none for what is not unicast.
    pub fn of(entry: &Entry) -> impl Iterator<Item = Self> + use<'_> {
        let &Entry { table, destination, prefix, kind, protocol, ref hops } = entry;
        hops.iter().filter(move |_| kind == libc::RTN_UNICAST).map(move |hop| {
            // IPv4 by a gateway of IPv6 is somebody else's idea.
            let gateway = hop.gateway.filter(|gateway| gateway.is_ipv4() == destination.is_ipv4());
            Self { table, destination, prefix, gateway, onlink: hop.onlink, ifindex: hop.ifindex, protocol }
        })
    }

    /// Whether it leads everywhere.
    pub fn is_default(&self) -> bool {
        self.prefix == 0
    }

    /// Its next hop.
    pub fn next_hop(&self) -> Option<Gateway> {
        self.gateway.map(|address| Gateway { address, onlink: self.onlink })
    }

    /// For people, who know the interface by this name.
    pub fn by(&self, interface: &str) -> String {
        let destination = match self.is_default() {
            true => "default".into(),
            false => format!("{}/{}", self.destination, self.prefix),
        };
        let via = self.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        let onlink = if self.onlink { " onlink" } else { "" };
        format!("{destination}{via} dev {interface}{onlink} table {}", self.table)
    }
}

/// Somebody else's default routes by an interface, in any table.
fn defaults_of_others(routes: &[TableRoute], ifindex: u32, is_v4: bool) -> impl Iterator<Item = &TableRoute> {
    routes.iter().filter(move |route| {
        route.is_default()
            && route.ifindex == ifindex
            && route.protocol != PROTOCOL
            && route.destination.is_ipv4() == is_v4
    })
}

/// Whether somebody else has a default route by an interface, in any table, that needs no next hop, as tunnels have.
pub fn has_direct_default(routes: &[TableRoute], ifindex: u32, is_v4: bool) -> bool {
    defaults_of_others(routes, ifindex, is_v4).any(|route| route.gateway.is_none())
}

/// The next hops of somebody else's default routes by an interface, in any table.
pub fn gateways_of_others(routes: &[TableRoute], ifindex: u32, is_v4: bool) -> impl Iterator<Item = Gateway> {
    defaults_of_others(routes, ifindex, is_v4).filter_map(TableRoute::next_hop)
}

/// A rule that says which table to look into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Whether it is about IPv4.
    pub is_v4: bool,
    /// Lower numbers come first.
    pub priority: u32,
    /// Packets from this address.
    pub from: Option<IpAddr>,
    /// Packets of sockets that are bound to this interface.
    pub oif: Option<String>,
    /// The table.
    pub table: u32,
    /// Who made it.
    pub protocol: u8,
}

impl Rule {
    /// Reads an RTM_NEWRULE message: the table that it leads to, and the rule, if it has no conditions but what ours have.
    pub fn parse(payload: &[u8]) -> Result<(u32, Option<Self>)> {
        let (head, rest) = header::<12>(payload)?;
        let &[family, to_bits, from_bits, tos, short_table, _, _, action, ..] = head;
        let is_v4 = i32::from(family) == libc::AF_INET;
        let mut rule = Self { is_v4, priority: 0, from: None, oif: None, table: u32::from(short_table), protocol: 0 };
        let mut is_plain = action == FR_ACT_TO_TBL && to_bits == 0 && tos == 0;
        for attribute in attributes(rest) {
            match attribute? {
                (FRA_PRIORITY, value) => rule.priority = u32::from_ne_bytes(array(value)?),
                (FRA_TABLE, value) => rule.table = u32::from_ne_bytes(array(value)?),
                (FRA_SRC, value) => rule.from = Some(ip(value)?),
                (FRA_OIFNAME, value) => rule.oif = Some(text(value)),
                (FRA_PROTOCOL, value) => rule.protocol = array::<1>(value)?[0],
                // No prefix is suppressed: what every rule says.
                (FRA_SUPPRESS_PREFIXLEN, value) => is_plain &= value == u32::MAX.to_ne_bytes(),
                (FRA_L3MDEV, _) | (FRA_DST | FRA_IIFNAME | FRA_FWMARK, _) => is_plain = false,
                _ => {}
            }
        }
        is_plain &= rule.from.is_none() || from_bits == bits(is_v4);
        Ok((rule.table, is_plain.then_some(rule)))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", if self.is_v4 { "IPv4 rule" } else { "IPv6 rule" })?;
        if let Some(from) = self.from {
            write!(f, " from {from}")?;
        }
        if let Some(oif) = &self.oif {
            write!(f, " oif {oif}")?;
        }
        write!(f, " lookup {} (priority {})", self.table, self.priority)
    }
}

fn family(is_v4: bool) -> u8 {
    (if is_v4 { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn bits(is_v4: bool) -> u8 {
    if is_v4 { 32 } else { 128 }
}

impl Route {
    /// The routes of all tables, of both families.
    pub fn entries(&mut self) -> Result<Vec<Entry>> {
        // Since Linux 5.3 `inet6_dump_fib` also lists what the kernel has learnt of single destinations (a path MTU, a
        // redirect), with the table and the protocol of the route that it is an exception of.
        let entry = |message: &[u8]| if is_cached(message)? { Ok(None) } else { Entry::parse(message) };
        self.connection().dump(libc::RTM_GETROUTE, &Body::new(&[0; 12]), entry).context("cannot list the routes")
    }

    /// The rules of both families, as [`Rule::parse`] reads them.
    pub fn rules(&mut self) -> Result<Vec<(u32, Option<Rule>)>> {
        let mut rules = Vec::new();
        for is_v4 in [true, false] {
            let mut head = [0; 12];
            head[0] = family(is_v4);
            match self.connection().dump(libc::RTM_GETRULE, &Body::new(&head), |rule| Rule::parse(rule).map(Some)) {
                Ok(found) => rules.extend(found),
                // A kernel without policy routing, or without IPv6.
                Err(error) if matches!(errno(&error), Some(Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT)) => {}
                Err(error) => return Err(error).context("cannot list the routing rules"),
            }
        }
        Ok(rules)
    }

    /// Adds a route; one that is there already is an error.
    pub fn add_route(&mut self, route: &TableRoute) -> Result<()> {
        self.connection().command_with(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &route_body(route))
    }

    /// Deletes exactly this route.
    pub fn delete_route(&mut self, route: &TableRoute) -> Result<()> {
        self.connection().command(libc::RTM_DELROUTE, &route_body(route))
    }

    /// Adds a rule; one that is there already is an error.
    pub fn add_rule(&mut self, rule: &Rule) -> Result<()> {
        self.connection().command_with(libc::RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, &rule_body(rule))
    }

    /// Deletes exactly this rule.
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<()> {
        self.connection().command(libc::RTM_DELRULE, &rule_body(rule))
    }
}

fn route_body(route: &TableRoute) -> Body {
    let on_link = route.gateway.is_none();
    // struct rtmsg
    let mut head = [0; 12];
    head[0] = family(route.destination.is_ipv4());
    head[1] = route.prefix;
    head[5] = route.protocol;
    head[6] = if on_link && route.destination.is_ipv4() { libc::RT_SCOPE_LINK } else { libc::RT_SCOPE_UNIVERSE };
    head[7] = libc::RTN_UNICAST;
    let flags = if route.onlink { ONLINK } else { 0 };
    head[8..].copy_from_slice(&flags.to_ne_bytes());
    let mut body = Body::new(&head)
        .attribute(libc::RTA_TABLE, &route.table.to_ne_bytes())
        .attribute(libc::RTA_OIF, &route.ifindex.to_ne_bytes());
    if !route.is_default() {
        body = body.address(libc::RTA_DST, route.destination);
    }
    if let Some(gateway) = route.gateway {
        body = body.address(libc::RTA_GATEWAY, gateway);
    }
    body
}

fn rule_body(rule: &Rule) -> Body {
    // struct fib_rule_hdr
    let mut head = [0; 12];
    head[0] = family(rule.is_v4);
    head[2] = if rule.from.is_some() { bits(rule.is_v4) } else { 0 };
    head[7] = FR_ACT_TO_TBL;
    let mut body = Body::new(&head)
        .attribute(FRA_PRIORITY, &rule.priority.to_ne_bytes())
        .attribute(FRA_TABLE, &rule.table.to_ne_bytes())
        .attribute(FRA_PROTOCOL, &[rule.protocol]);
    if let Some(from) = rule.from {
        body = body.address(FRA_SRC, from);
    }
    if let Some(oif) = &rule.oif {
        body = body.attribute(FRA_OIFNAME, &[oif.as_bytes(), &[0]].concat());
    }
    body
}

#[cfg(test)]
mod tests {
    use super::super::testing::{payload, torment};
    use super::*;

    fn parse(message: &[u8]) -> Entry {
        Entry::parse(message).unwrap().unwrap()
    }

    #[test]
    fn routes_are_read() {
        let mut info = [0; 12];
        (info[0], info[4], info[5], info[7]) = (libc::AF_INET as u8, 254, 4, libc::RTN_UNICAST);
        let gateway = payload(Body::new(&[]).attribute(libc::RTA_GATEWAY, &[10, 0, 1, 1]));
        let hop = |index: u32, onlink: u8, rest: &[u8]| {
            [&(8 + rest.len() as u16).to_ne_bytes()[..], &[onlink, 0], &index.to_ne_bytes(), rest].concat()
        };
        let hops = [hop(5, ONLINK as u8, &gateway), hop(6, 0, &[])].concat();
        let message = payload(
            Body::new(&info).attribute(libc::RTA_TABLE, &1000u32.to_ne_bytes()).attribute(libc::RTA_MULTIPATH, &hops),
        );
        let expected = vec![
            Hop { ifindex: 5, gateway: Some([10, 0, 1, 1].into()), onlink: true },
            Hop { ifindex: 6, gateway: None, onlink: false },
        ];
        let entry = parse(&message);
        assert_eq!((entry.table, entry.protocol, entry.is_default()), (1000, 4, true));
        assert_eq!(entry.destination, IpAddr::from([0, 0, 0, 0]));
        assert_eq!((entry.hop_by(6), entry.hop_by(7)), (Some(&expected[1]), None));
        assert_eq!(entry.hops, expected);
        let routes: Vec<(u32, Option<Gateway>)> =
            TableRoute::of(&entry).map(|route| (route.ifindex, route.next_hop())).collect();
        let first = Gateway { address: [10, 0, 1, 1].into(), onlink: true };
        assert_eq!(routes, [(5, Some(first)), (6, None)]);
        for length in [0, 40] {
            let hops = [&[length, 0, 0, 0][..], &5u32.to_ne_bytes(), &[0; 8]].concat();
            let message = payload(Body::new(&info).attribute(libc::RTA_MULTIPATH, &hops));
            assert!(Entry::parse(&message).is_err(), "would never advance, or goes beyond the attribute");
        }
        torment(&message, |message| drop(Entry::parse(message)));
        let via = [&(libc::AF_INET6 as u16).to_ne_bytes()[..], &[0xfd; 16]].concat();
        let message =
            payload(Body::new(&info).attribute(libc::RTA_OIF, &3u32.to_ne_bytes()).attribute(libc::RTA_VIA, &via));
        let entry = parse(&message);
        assert_eq!(entry.hops, [Hop { ifindex: 3, gateway: Some([0xfd; 16].into()), onlink: false }]);
        let route = TableRoute {
            table: 254,
            destination: entry.destination,
            prefix: 0,
            gateway: None,
            onlink: false,
            ifindex: 3,
            protocol: 4,
        };
        assert_eq!(TableRoute::of(&entry).collect::<Vec<_>>(), [route], "a gateway of the other family is not taken");
        assert_eq!(TableRoute::of(&Entry { kind: libc::RTN_BLACKHOLE, ..entry }).count(), 0);
        torment(&message, |message| drop(Entry::parse(message)));
        info[0] = libc::AF_PHONET as u8;
        assert_eq!(Entry::parse(&info).unwrap(), None);
    }

    #[test]
    fn rules_are_read() {
        let rule = Rule {
            is_v4: true,
            priority: 32_000,
            from: Some([10, 0, 2, 2].into()),
            oif: None,
            table: 7800,
            protocol: PROTOCOL,
        };
        let message = payload(rule_body(&rule));
        assert_eq!(Rule::parse(&message).unwrap(), (7800, Some(rule.clone())));
        torment(&message, |message| drop(Rule::parse(message)));
        let bound = Rule { from: None, oif: Some("eth1".into()), ..rule.clone() };
        assert_eq!(Rule::parse(&payload(rule_body(&bound))).unwrap(), (7800, Some(bound)));
        // With a condition that ours never have, it is another rule; the table is taken all the same.
        let marked = payload(rule_body(&rule).attribute(FRA_FWMARK, &[1, 0, 0, 0]));
        assert_eq!(Rule::parse(&marked).unwrap(), (7800, None));
    }
}
