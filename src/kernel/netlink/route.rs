//! Links and addresses of a network namespace: rtnetlink (rtnetlink(7), `include/uapi/linux/rtnetlink.h`,
//! `if_link.h`, `if_addr.h`). Only the attributes that are needed are looked at, so that neither an older nor a newer
//! kernel's set of them matters.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{Body, Connection, array, attributes, header, ip, text};
use crate::deadline::Deadline;

/// Leave the counters out of the dump: they are the largest part of it, and not needed.
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;

const IFA_F_TEMPORARY: u32 = 0x01;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_DEPRECATED: u32 = 0x20;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFA_F_PERMANENT: u32 = 0x80;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The interface index, unique in its namespace.
    pub index: u32,
    /// The name.
    pub name: String,
    /// `IFF_*`, all 32 bits, those of a multipath-tcp.org kernel (0x180000) included.
    pub flags: u32,
    /// What sort of virtual interface it is (`veth`, `macvlan`, ...); `None` for a physical one and for `lo`.
    pub kind: Option<String>,
    /// The largest packet, in bytes.
    pub mtu: u32,
}

impl Link {
    /// Whether packets can pass: it is up, and so is its other end. IFF_RUNNING would tell as well, but up to a second later
    /// (kernel `net/core/link_watch.c`).
    pub fn is_running(&self) -> bool {
        let needed = (libc::IFF_UP | libc::IFF_LOWER_UP) as u32;
        self.flags & needed == needed
    }

    /// Reads an RTM_NEWLINK message (after `struct nlmsghdr`).
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let (info, rest) = header::<16>(payload)?;
        let (mut name, mut kind, mut mtu) = (None, None, 0);
        for attribute in attributes(rest) {
            let (attribute, value) = attribute?;
            match attribute {
                libc::IFLA_IFNAME => name = Some(text(value)),
                libc::IFLA_MTU => mtu = u32::from_ne_bytes(array(value)?),
                libc::IFLA_LINKINFO => {
                    for attribute in attributes(value) {
                        if let (libc::IFLA_INFO_KIND, value) = attribute? {
                            kind = Some(text(value));
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(Self {
            index: word(info, 4),
            name: name.context("malformed link message: it has no name")?,
            flags: word(info, 8),
            kind,
            mtu,
        })
    }
}

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's index.
    pub ifindex: u32,
    /// The interface's own address, also where it has a peer's beside it.
    pub ip: IpAddr,
    /// The prefix length.
    pub prefix: u8,
    /// `RT_SCOPE_*`; 0 is global.
    pub scope: u8,
    /// `IFA_F_*`.
    pub flags: u32,
}

impl Address {
    /// Reads an RTM_NEWADDR message (after `struct nlmsghdr`); `None` for families other than IPv4 and IPv6.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>> {
        let (info, rest) = header::<8>(payload)?;
        let &[family, prefix, short_flags, scope, ..] = info;
        if ![libc::AF_INET, libc::AF_INET6].contains(&family.into()) {
            return Ok(None);
        }
        let (mut local, mut address, mut flags) = (None, None, u32::from(short_flags));
        for attribute in attributes(rest) {
            match attribute? {
                (libc::IFA_LOCAL, value) => local = Some(ip(value)?),
                (libc::IFA_ADDRESS, value) => address = Some(ip(value)?),
                // Has the bits that do not fit into the header.
                (libc::IFA_FLAGS, value) => flags = u32::from_ne_bytes(array(value)?),
                _ => {}
            }
        }
        Ok(Some(Self {
            ifindex: word(info, 4),
            // On a point-to-point interface IFA_ADDRESS is the peer's.
            ip: local.or(address).context("malformed address message: it has no address")?,
            prefix,
            scope,
            flags,
        }))
    }

    /// Whether subflows can use the address: it is global, and neither loopback, link-local, multicast, a duplicate
    /// (dadfailed), deprecated nor temporary. A tentative one counts if it is permanent: it is expected to pass.
    pub fn is_usable(&self) -> bool {
        let has = |flag| self.flags & flag != 0;
        let ordinary = match self.ip {
            IpAddr::V4(ip) => !ip.is_link_local(),
            // For IPv4 the same bit marks the second address of a subnet.
            IpAddr::V6(ip) => !ip.is_unicast_link_local() && !has(IFA_F_TEMPORARY),
        };
        ordinary
            && self.scope == libc::RT_SCOPE_UNIVERSE
            && !self.ip.is_loopback()
            && !self.ip.is_multicast()
            && !self.ip.is_unspecified()
            && !has(IFA_F_DADFAILED | IFA_F_DEPRECATED)
            && (!has(IFA_F_TENTATIVE) || has(IFA_F_PERMANENT))
    }

    /// Whether it stays as it is until somebody changes it: it has no lifetime, and has been found to be unique.
    pub fn is_settled(&self) -> bool {
        self.flags & IFA_F_PERMANENT != 0 && self.flags & IFA_F_TENTATIVE == 0
    }

    /// Whether duplicate address detection found another machine that has it (RFC 4862).
    pub fn is_duplicate(&self) -> bool {
        self.flags & IFA_F_DADFAILED != 0
    }
}

/// An rtnetlink connection to the network namespace in which it was opened.
pub struct Route {
    connection: Connection,
}

impl Route {
    /// Connects to the calling thread's network namespace.
    pub fn open(deadline: Deadline) -> Result<Self> {
        let connection = Connection::open(NETLINK_ROUTE, deadline)?;
        Ok(Self { connection })
    }

    /// The socket, for the ways out, the tables and the rules.
    pub(super) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// All interfaces.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let body = Body::new(&[0; 16]).attribute(libc::IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
        self.connection
            .dump(libc::RTM_GETLINK, &body, |payload| Link::parse(payload).map(Some))
            .context("cannot list the network interfaces")
    }

    /// All IPv4 and IPv6 addresses.
    pub fn addresses(&mut self) -> Result<Vec<Address>> {
        self.connection
            .dump(libc::RTM_GETADDR, &Body::new(&[0; 8]), Address::parse)
            .context("cannot list the addresses")
    }

    /// Sets the interface flags selected by `mask` to `value` and leaves all others alone. An upstream kernel reports
    /// success and drops the bits of the multipath-tcp.org kernel: read [`Route::links`] afterwards.
    pub fn set_link_flags(&mut self, index: u32, value: u32, mask: u32) -> Result<()> {
        let attempt = || format!("cannot set flags {value:#x} of interface index {index}");
        // To the kernel, an empty mask means every flag: the interface would go down.
        ensure!(mask != 0, "{}: no flag is selected", attempt());
        let mut info = [0; 16];
        info[4..8].copy_from_slice(&index.to_ne_bytes());
        info[8..12].copy_from_slice(&(value & mask).to_ne_bytes());
        info[12..16].copy_from_slice(&mask.to_ne_bytes());
        self.connection.command(libc::RTM_SETLINK, &Body::new(&info)).with_context(attempt)
    }
}

/// The 32 bit number at `offset` of a fixed header.
fn word<const N: usize>(header: &[u8; N], offset: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&header[offset..offset + 4]);
    u32::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use nix::errno::Errno;

    use super::super::errno;
    use super::super::testing::{in_namespace, ip, payload, soon, torment};
    use super::*;

    /// IFF_MPBACKUP of a multipath-tcp.org kernel.
    const MPBACKUP: u32 = 0x10_0000;

    fn address(ip: &str, flags: u32) -> Address {
        Address { ifindex: 2, ip: ip.parse().unwrap(), prefix: 24, scope: 0, flags }
    }

    fn link_message() -> Vec<u8> {
        let kind = Body::new(&[]).attribute(libc::IFLA_INFO_KIND, b"veth\0").attribute(99, &[1; 7]);
        let header = [[0u8; 4], 12u32.to_ne_bytes(), 0x10_1003u32.to_ne_bytes(), [0; 4]].concat();
        payload(
            Body::new(&header)
                .attribute(libc::IFLA_IFNAME, b"eth1\0")
                .attribute(libc::IFLA_MTU, &1400u32.to_ne_bytes())
                .attribute(9999, &[0xff; 5])
                .nested(libc::IFLA_LINKINFO, &kind),
        )
    }

    fn address_message(family: i32, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let header = [[family as u8, 32, 0x80, 0], 7u32.to_ne_bytes()].concat();
        payload(attributes.iter().fold(Body::new(&header), |body, (kind, value)| body.attribute(*kind, value)))
    }

    #[test]
    fn links_are_read_with_all_their_flags() {
        let link = Link::parse(&link_message()).unwrap();
        let kind = Some("veth".to_owned());
        assert_eq!(link, Link { index: 12, name: "eth1".to_owned(), flags: 0x10_1003, kind, mtu: 1400 });
        assert!(Link::parse(&payload(Body::new(&[0; 16]))).is_err(), "no name");
        torment(&link_message(), |message| drop(Link::parse(message)));
    }

    #[test]
    fn own_address_and_wide_flags_are_preferred() {
        let (peer, own): (&[u8], &[u8]) = (&[10, 0, 0, 1], &[10, 0, 0, 2]);
        let message = address_message(
            libc::AF_INET,
            &[(libc::IFA_ADDRESS, peer), (libc::IFA_LOCAL, own), (libc::IFA_FLAGS, &0x280u32.to_ne_bytes())],
        );
        let parsed = Address::parse(&message).unwrap().unwrap();
        assert_eq!(parsed, Address { ifindex: 7, ip: [10, 0, 0, 2].into(), prefix: 32, scope: 0, flags: 0x280 });
        let short = address_message(libc::AF_INET, &[(libc::IFA_ADDRESS, peer)]);
        let short = Address::parse(&short).unwrap().unwrap();
        assert_eq!((short.ip, short.flags), ([10, 0, 0, 1].into(), 0x80));
        assert!(Address::parse(&address_message(libc::AF_INET6, &[])).is_err(), "no address");
        assert_eq!(Address::parse(&address_message(libc::AF_PHONET, &[])).unwrap(), None);
        torment(&message, |message| drop(Address::parse(message)));
    }

    #[test]
    fn usable_addresses() {
        let permanent = IFA_F_PERMANENT;
        for (ip, flags) in [
            ("10.0.0.2", permanent),
            ("10.0.0.3", permanent | IFA_F_TEMPORARY), // the second of its subnet
            ("10.0.0.4", 0),                           // from DHCP
            ("fd00::2", permanent),
            ("fd00::3", 0),
            ("fd00::4", permanent | IFA_F_TENTATIVE),
        ] {
            assert!(address(ip, flags).is_usable(), "{ip} {flags:#x}");
        }
        for (ip, flags) in [
            ("127.0.0.1", permanent),
            ("169.254.1.1", permanent),
            ("224.0.0.1", permanent),
            ("0.0.0.0", permanent),
            ("10.0.0.2", permanent | IFA_F_DEPRECATED),
            ("::1", permanent),
            ("fe80::1", permanent),
            ("ff02::1", permanent),
            ("fd00::2", IFA_F_TENTATIVE),
            ("fd00::2", permanent | IFA_F_TENTATIVE | IFA_F_DADFAILED),
            ("fd00::2", permanent | IFA_F_DEPRECATED),
            ("fd00::2", IFA_F_TEMPORARY),
        ] {
            assert!(!address(ip, flags).is_usable(), "{ip} {flags:#x}");
        }
        assert!(!Address { scope: libc::RT_SCOPE_LINK, ..address("10.0.0.2", permanent) }.is_usable());
    }

    #[test]
    fn a_namespace_is_listed() {
        in_namespace(|| {
            ip("link add eth0 index 40 mtu 1400 type veth peer name peer0\n\
                addr add 10.0.0.2 peer 10.0.0.1/32 dev eth0\n\
                addr add fd00::2/64 dev eth0\nlink set eth0 up\n");
            let mut route = Route::open(soon()).unwrap();
            let links = route.links().unwrap();
            let names: Vec<_> = links.iter().map(|l| (l.name.as_str(), l.kind.as_deref())).collect();
            assert!(names.contains(&("lo", None)) && names.contains(&("peer0", Some("veth"))), "{names:?}");
            let link = links.iter().find(|l| l.name == "eth0").unwrap();
            assert_eq!((link.index, link.mtu, link.kind.as_deref()), (40, 1400, Some("veth")));
            assert_eq!(link.flags & 1, 1, "up: {:#x}", link.flags);

            let addresses = route.addresses().unwrap();
            let of = |ip: &str| addresses.iter().find(|a| a.ip == ip.parse::<IpAddr>().unwrap()).unwrap();
            assert_eq!((of("10.0.0.2").ifindex, of("10.0.0.2").prefix), (40, 32));
            assert!(of("10.0.0.2").is_usable());
            assert_eq!((of("fd00::2").ifindex, of("fd00::2").prefix), (40, 64));
            // The peer is down: the address stays tentative.
            assert_eq!(of("fd00::2").flags & (IFA_F_TENTATIVE | IFA_F_PERMANENT), IFA_F_TENTATIVE | IFA_F_PERMANENT);
            assert!(of("fd00::2").is_usable());
        });
    }

    #[test]
    fn tables_larger_than_one_datagram() {
        in_namespace(|| {
            let mut script = String::new();
            for i in 0..1000 {
                writeln!(script, "addr add 10.1.{}.{}/32 dev lo", i / 250, i % 250 + 1).unwrap();
            }
            ip(&script);
            assert_eq!(Route::open(soon()).unwrap().addresses().unwrap().len(), 1000);
        });
    }

    #[test]
    fn link_flags() {
        in_namespace(|| {
            // With a carrier, which is told late where there is none.
            ip("link add eth0 type veth peer name peer0\nlink set peer0 up\nlink set eth0 up\n");
            let mut route = Route::open(soon()).unwrap();
            let link = |route: &mut Route| route.links().unwrap().into_iter().find(|l| l.name == "eth0").unwrap();
            let before = link(&mut route);
            // Only a multipath-tcp.org kernel keeps the bit; this one says yes and forgets it.
            route.set_link_flags(before.index, MPBACKUP, 0x18_0000).unwrap();
            assert_eq!(link(&mut route), before);
            let multicast = libc::IFF_MULTICAST as u32;
            route.set_link_flags(before.index, multicast, multicast).unwrap();
            assert_eq!(link(&mut route).flags, before.flags | multicast);
            assert!(route.set_link_flags(before.index, MPBACKUP, 0).is_err());
            assert_eq!(link(&mut route).flags, before.flags | multicast, "still up");
            let error = route.set_link_flags(999, MPBACKUP, MPBACKUP).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::ENODEV), "{error:#}");
        });
    }
}
