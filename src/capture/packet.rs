//! From a frame to the MPTCP options in it: link layer, VLAN tags, IPv4 or IPv6 with extension headers, TCP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::option::{self, MptcpOption, SUBTYPE_DSS};

/// `ARPHRD_ETHER`, `ARPHRD_LOOPBACK` (`include/uapi/linux/if_arp.h`): the types of interfaces with an Ethernet header.
pub const ETHERNET_TYPES: [u16; 2] = [1, 772];
/// Two MAC addresses stand before the type of an Ethernet frame.
pub const ETHERNET_ADDRESSES: usize = 12;
/// 802.1Q and 802.1ad (`include/uapi/linux/if_ether.h`).
pub const VLAN_TYPES: [u16; 2] = [0x8100, 0x88a8];
/// How many tags are looked through that stand in the frame. The kernel takes the outermost out of it.
pub const TAGS_MAX: usize = 2;
/// The protocol number of TCP.
pub const TCP: u8 = 6;
/// IPv6 extension headers of the common form: hop-by-hop, routing and destination options (RFC 8200, section 4).
pub const EXTENSION_HEADERS: [u8; 3] = [0, 43, 60];
/// IPv6's fragment header.
pub const FRAGMENT_HEADER: u8 = 44;
/// How many extension headers are looked through. Packets with more do not occur.
pub const EXTENSION_HEADERS_MAX: usize = 4;
/// A TCP header without options.
pub const TCP_HEADER: usize = 20;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const FLAGS: [&str; 8] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];

/// A VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The tag's protocol, one of [`VLAN_TYPES`].
    pub protocol: u16,
    /// Priority, drop eligibility and, in the lower 12 bits, the VLAN's id.
    pub control: u16,
}

/// A frame as a packet socket gives it.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// The interface's type, `ARPHRD_*`.
    pub hardware: u16,
    /// The tag that the kernel has taken out of it.
    pub tag: Option<Tag>,
    /// What was captured, from the link layer's header on.
    pub bytes: &'a [u8],
    /// How long it was before it was cut, in bytes.
    pub length: usize,
}

/// What is in a frame beneath the link layer.
#[derive(Debug, PartialEq, Eq)]
pub struct Network<'a> {
    /// The VLAN tags, the outermost first.
    pub tags: Vec<Tag>,
    /// The type of what follows, as in an Ethernet header.
    pub protocol: u16,
    /// From the IP header on.
    pub bytes: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Takes link layer and VLAN tags off. None if it is not IP.
    pub fn network(&self) -> Option<Network<'a>> {
        let mut tags: Vec<Tag> = self.tag.into_iter().collect();
        let mut bytes = self.bytes;
        if ETHERNET_TYPES.contains(&self.hardware) {
            bytes = bytes.get(ETHERNET_ADDRESSES..)?;
            let mut protocol = be16(bytes, 0)?;
            for _ in 0..TAGS_MAX {
                if VLAN_TYPES.contains(&protocol) {
                    tags.push(Tag { protocol, control: be16(bytes, 2)? });
                    bytes = &bytes[4..];
                    protocol = be16(bytes, 0)?;
                }
            }
            if ![ETHERTYPE_IPV4, ETHERTYPE_IPV6].contains(&protocol) {
                return None;
            }
            bytes = &bytes[2..];
        }
        // Other interfaces on which TCP is to be seen (tun, WireGuard, tunnels) have no header.
        let protocol = match bytes.first()? >> 4 {
            4 => ETHERTYPE_IPV4,
            6 => ETHERTYPE_IPV6,
            _ => return None,
        };
        Some(Network { tags, protocol, bytes })
    }
}

/// A TCP packet with MPTCP options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The ids of the VLANs that it is tagged for, the outermost first.
    pub vlans: Vec<u16>,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it goes to.
    pub destination: SocketAddr,
    /// TCP's flags as a byte.
    flags: u8,
    /// How much data it has, in bytes.
    pub payload: usize,
    /// Its MPTCP options.
    pub options: Vec<MptcpOption>,
}

impl Packet {
    /// Reads a frame. None if it is no TCP packet with a whole header, or has no MPTCP option.
    pub fn parse(frame: &Frame) -> Option<Self> {
        let network = frame.network()?;
        let bytes = network.bytes;
        let (source, destination, start) = match network.protocol {
            ETHERTYPE_IPV4 => ipv4(bytes)?,
            _ => ipv6(bytes)?,
        };
        let tcp = bytes.get(start..)?;
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        let flags = *tcp.get(13)?;
        let options = option::all(tcp.get(TCP_HEADER..header)?);
        if options.is_empty() {
            return None;
        }
        // Offloaded packets can be longer than the IP header can say; it has 0 there.
        let whole = match network.protocol {
            ETHERTYPE_IPV4 => usize::from(be16(bytes, 2)?),
            _ => usize::from(be16(bytes, 4)?).checked_add(40).filter(|whole| *whole > 40).unwrap_or(0),
        };
        let whole = if whole == 0 { frame.length - (frame.bytes.len() - bytes.len()).min(frame.length) } else { whole };
        Some(Self {
            vlans: network.tags.iter().map(|tag| tag.control & 0x0fff).collect(),
            source: SocketAddr::new(source, be16(tcp, 0)?),
            destination: SocketAddr::new(destination, be16(tcp, 2)?),
            flags,
            payload: whole.saturating_sub(start + header),
            options,
        })
    }

    /// Whether it is worth a line: it says more than which data it has. `dss`: that is enough.
    pub fn matters(&self, dss: bool) -> bool {
        dss || self.options.iter().any(|option| option.number() != Some(SUBTYPE_DSS))
    }

    /// TCP's flags by name.
    pub fn flags(&self) -> Vec<&'static str> {
        FLAGS.iter().enumerate().filter(|(bit, _)| self.flags >> bit & 1 != 0).map(|(_, name)| *name).collect()
    }
}

/// Source, destination, and where the TCP header begins.
fn ipv4(bytes: &[u8]) -> Option<(IpAddr, IpAddr, usize)> {
    let header = usize::from(bytes.first()? & 0x0f) * 4;
    let is_later_fragment = be16(bytes, 6)? & 0x1fff != 0;
    if header < 20 || is_later_fragment || *bytes.get(9)? != TCP {
        return None;
    }
    let address = |at: usize| Some(IpAddr::V4(Ipv4Addr::from(*bytes.get(at..)?.first_chunk::<4>()?)));
    Some((address(12)?, address(16)?, header))
}

/// As [`ipv4`].
fn ipv6(bytes: &[u8]) -> Option<(IpAddr, IpAddr, usize)> {
    let (mut next, mut start) = (*bytes.get(6)?, 40);
    for _ in 0..EXTENSION_HEADERS_MAX {
        if EXTENSION_HEADERS.contains(&next) {
            let header = bytes.get(start..start + 2)?;
            next = header[0];
            start += (usize::from(header[1]) + 1) * 8;
        } else if next == FRAGMENT_HEADER {
            let is_later_fragment = be16(bytes, start + 2)? & 0xfff8 != 0;
            if is_later_fragment {
                return None;
            }
            next = bytes[start];
            start += 8;
        }
    }
    if next != TCP {
        return None;
    }
    let address = |at: usize| Some(IpAddr::V6(Ipv6Addr::from(*bytes.get(at..)?.first_chunk::<16>()?)));
    Some((address(8)?, address(24)?, start))
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{PRIO, bytes, ethernet, extension, fragment, frame, ipv4, ipv6, tcp, vlan};
    use super::*;
    use crate::kernel::netlink::testing::torment;

    fn parse(bytes: &[u8]) -> Option<Packet> {
        Packet::parse(&frame(bytes))
    }

    #[test]
    fn ethernet_and_bare_ip_of_both_families() {
        for (packet, source) in [(ipv4(&tcp(PRIO, 9)), "10.0.2.2:40000"), (ipv6(&tcp(PRIO, 9)), "[fd00:2::2]:40000")] {
            let framed = ethernet(&packet);
            let found = parse(&framed).unwrap();
            assert_eq!(found.source.to_string(), source);
            assert_eq!(found.destination.port(), 5000);
            assert_eq!((found.payload, found.flags()), (9, vec!["SYN", "ACK"]));
            assert_eq!(found.options, [MptcpOption::Prio { backup: true, address_id: None }]);
            assert!(found.vlans.is_empty());
            // A tun interface: no link layer at all.
            let bare = Frame { hardware: 65534, ..frame(&packet) };
            assert_eq!(Packet::parse(&bare).unwrap(), found);
            assert_eq!(parse(&packet), None, "no Ethernet frame");
        }
    }

    #[test]
    fn tags_in_the_frame_and_beside_it() {
        let inside = ethernet(&ipv4(&tcp(PRIO, 0)));
        let once = vlan(&inside, 0x8100, 0x6005);
        assert_eq!(parse(&once).unwrap().vlans, [5]);
        let twice = vlan(&once, 0x88a8, 7);
        assert_eq!(parse(&twice).unwrap().vlans, [7, 5]);
        let beside = Frame { tag: Some(Tag { protocol: 0x88a8, control: 9 }), ..frame(&twice) };
        assert_eq!(Packet::parse(&beside).unwrap().vlans, [9, 7, 5]);
        assert_eq!(parse(&vlan(&twice, 0x8100, 1)), None, "more than anybody nests");
    }

    #[test]
    fn extension_headers() {
        let plain = tcp(PRIO, 4);
        let mut packet = (TCP, plain.clone());
        for number in 0..EXTENSION_HEADERS_MAX {
            packet = extension(EXTENSION_HEADERS[number % 3], &packet, number * 8);
            let found = parse(&ethernet(&testing_ipv6(&packet))).unwrap();
            assert_eq!(found.payload, 4);
        }
        let more = extension(60, &packet, 0);
        assert_eq!(parse(&ethernet(&testing_ipv6(&more))), None);
        let first = fragment(0, &(TCP, plain.clone()));
        assert!(parse(&ethernet(&testing_ipv6(&first))).is_some());
        let later = fragment(8, &(TCP, plain));
        assert_eq!(parse(&ethernet(&testing_ipv6(&later))), None);
    }

    fn testing_ipv6((next, rest): &(u8, Vec<u8>)) -> Vec<u8> {
        super::super::testing::ipv6_with(*next, rest)
    }

    #[test]
    fn what_is_not_ours() {
        let good = ethernet(&ipv4(&tcp(PRIO, 0)));
        let change = |at: usize, value: u8| {
            let mut changed = good.clone();
            changed[at] = value;
            parse(&changed)
        };
        assert!(parse(&good).is_some());
        assert_eq!(change(14 + 9, 17), None, "UDP");
        assert_eq!(change(14 + 7, 1), None, "a later fragment");
        assert_eq!(change(14, 0x44), None, "an IP header of 16 bytes");
        assert_eq!(change(14, 0x55), None, "IP version 5");
        assert_eq!(change(12, 0x09), None, "not IP");
        assert_eq!(change(14 + 20 + 12, 0x40), None, "a TCP header of 16 bytes");
        assert_eq!(parse(&ethernet(&ipv4(&tcp("", 0)))), None, "no options");
        assert_eq!(parse(&ethernet(&ipv4(&tcp("020405b4", 0)))), None, "others' options");
    }

    #[test]
    fn only_dss_does_not_matter() {
        for (options, matters) in [
            ("1e08 2001 00000007", false),
            ("1e08 2001 00000007 1e035101", true),
            ("1e0c 1101 1a2b3c4d 00000005", true),
            ("1e09 2001 00000007 000000", false),
            ("1e02 0101", true),
        ] {
            let packet = parse(&ethernet(&ipv4(&tcp(options, 0)))).unwrap();
            assert_eq!(packet.matters(false), matters, "{options}");
            assert!(packet.matters(true));
        }
    }

    #[test]
    fn packets_longer_than_the_header_can_say() {
        let mut long = ethernet(&ipv4(&tcp(PRIO, 0)));
        long[14 + 2..14 + 4].copy_from_slice(&[0, 0]);
        let found = Packet::parse(&Frame { length: long.len() + 100_000, ..frame(&long) }).unwrap();
        assert_eq!(found.payload, 100_000);
    }

    #[test]
    fn torn_and_flipped_frames_are_survived() {
        let v4 = vlan(&ethernet(&ipv4(&tcp(PRIO, 3))), 0x8100, 5);
        let v6 = ethernet(&testing_ipv6(&extension(0, &(TCP, tcp("1e0c 1101 1a2b3c4d 00000005", 3)), 0)));
        for good in [v4, v6, bytes("00")] {
            torment(&good, |bytes| {
                for hardware in [1, 65534] {
                    for length in [0, bytes.len(), usize::MAX] {
                        Packet::parse(&Frame { hardware, length, ..frame(bytes) });
                    }
                }
            });
        }
    }
}
