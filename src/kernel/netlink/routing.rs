//! Routing tables and rules of a network namespace (rtnetlink(7), `include/uapi/linux/rtnetlink.h`, `fib_rules.h`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::route::Route;
use super::{Body, array, attributes, errno, header, ip, text};

/// What marks our routes and rules (`rtm_protocol`, `FRA_PROTOCOL`): free in iproute2's `rt_protos`.
pub const PROTOCOL: u8 = 109;

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

/// A route of one table.
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
    /// By which interface.
    pub ifindex: u32,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
}

impl TableRoute {
    /// Whether it leads everywhere.
    pub fn is_default(&self) -> bool {
        self.prefix == 0
    }
}

impl fmt::Display for TableRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_default() {
            true => write!(f, "default")?,
            false => write!(f, "{}/{}", self.destination, self.prefix)?,
        }
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " dev index {} table {}", self.ifindex, self.table)
    }
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
    /// The routes of all tables that lead by one interface each; of all others nothing is ours.
    pub fn table_routes(&mut self) -> Result<Vec<TableRoute>> {
        self.connection().dump(libc::RTM_GETROUTE, &Body::new(&[0; 12]), parse_route).context("cannot list the routes")
    }

    /// The rules of both families.
    pub fn rules(&mut self) -> Result<Vec<Rule>> {
        let mut rules = Vec::new();
        for is_v4 in [true, false] {
            let mut head = [0; 12];
            head[0] = family(is_v4);
            match self.connection().dump(libc::RTM_GETRULE, &Body::new(&head), parse_rule) {
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
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.connection()
            .command_with(libc::RTM_NEWROUTE, flags, &route_body(route))
            .with_context(|| format!("cannot add the route {route}"))
    }

    /// Deletes exactly this route.
    pub fn delete_route(&mut self, route: &TableRoute) -> Result<()> {
        self.connection()
            .command(libc::RTM_DELROUTE, &route_body(route))
            .with_context(|| format!("cannot delete the route {route}"))
    }

    /// Adds a rule; one that is there already is an error.
    pub fn add_rule(&mut self, rule: &Rule) -> Result<()> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.connection()
            .command_with(libc::RTM_NEWRULE, flags, &rule_body(rule))
            .with_context(|| format!("cannot add the {rule}"))
    }

    /// Deletes exactly this rule.
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<()> {
        self.connection()
            .command(libc::RTM_DELRULE, &rule_body(rule))
            .with_context(|| format!("cannot delete the {rule}"))
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

/// Reads an RTM_NEWROUTE message; None for what is neither a unicast route nor by one interface.
pub(crate) fn parse_route(payload: &[u8]) -> Result<Option<TableRoute>> {
    let (head, rest) = header::<12>(payload)?;
    let &[family, prefix, _, _, short_table, protocol, _, kind, ..] = head;
    let is_v4 = i32::from(family) == libc::AF_INET;
    if kind != libc::RTN_UNICAST || !is_v4 && i32::from(family) != libc::AF_INET6 {
        return Ok(None);
    }
    let everywhere = if is_v4 { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let (mut table, mut destination, mut gateway, mut ifindex) = (u32::from(short_table), everywhere, None, None);
    for attribute in attributes(rest) {
        match attribute? {
            (libc::RTA_TABLE, value) => table = u32::from_ne_bytes(array(value)?),
            (libc::RTA_DST, value) => destination = ip(value)?,
            (libc::RTA_GATEWAY, value) => gateway = Some(ip(value)?),
            (libc::RTA_OIF, value) => ifindex = Some(u32::from_ne_bytes(array(value)?)),
            _ => {}
        }
    }
    let Some(ifindex) = ifindex else { return Ok(None) };
    Ok(Some(TableRoute { table, destination, prefix, gateway, ifindex, protocol }))
}

/// Reads an RTM_NEWRULE message; None for a rule with conditions that ours never have.
pub(crate) fn parse_rule(payload: &[u8]) -> Result<Option<Rule>> {
    let (head, rest) = header::<12>(payload)?;
    let &[family, to_bits, from_bits, tos, short_table, _, _, action, ..] = head;
    let is_v4 = i32::from(family) == libc::AF_INET;
    let mut rule = Rule { is_v4, priority: 0, from: None, oif: None, table: u32::from(short_table), protocol: 0 };
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
    Ok(is_plain.then_some(rule))
}
