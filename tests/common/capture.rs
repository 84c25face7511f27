//! Packets as they were on the wire of a namespace, their MPTCP options decoded (RFC 8684 section 3).
//!
//! A packet socket of our own rather than tcpdump: what it has seen can be asked at any moment, without buffers to
//! flush, and it counts what the kernel had to drop.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};

use super::sandbox::{Netns, Sandbox};
use super::{LIMIT, wait_for, wait_until};

/// The number of MPTCP among TCP's options.
const OPTION_MPTCP: u8 = 30;
const IPPROTO_TCP: u8 = 6;
/// Room for all packets of a test's transfer, so that none is lost when the reader gets no processor for a while.
const BUFFER: usize = 64 << 20;

/// An MPTCP option, by the subtypes of RFC 8684 section 8.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MptcpOption {
    /// MP_CAPABLE.
    Capable,
    /// MP_JOIN on a SYN (12 bytes) or SYN/ACK (16 bytes): its B bit and address id.
    Join { backup: bool, address_id: u8 },
    /// MP_JOIN on the third packet, which carries neither.
    JoinAck,
    /// DSS: data sequence numbers.
    Dss,
    /// ADD_ADDR.
    AddAddr { address_id: u8, echo: bool },
    /// REMOVE_ADDR.
    RemoveAddr,
    /// MP_PRIO: the new B bit, and the address id where one is given.
    Prio { backup: bool, address_id: Option<u8> },
    /// Any other subtype.
    Other(u8),
}

/// A TCP packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// The interface, in the namespace of the capture.
    pub interface: String,
    /// Whether the namespace of the capture sent it.
    pub outgoing: bool,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it goes to.
    pub destination: SocketAddr,
    /// The SYN bit.
    pub syn: bool,
    /// The ACK bit.
    pub ack: bool,
    /// Bytes of payload.
    pub payload: u64,
    /// Its MPTCP options.
    pub options: Vec<MptcpOption>,
}

/// The first packet of an additional subflow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// The interface, in the namespace of the capture.
    pub interface: String,
    /// The address from which the subflow is opened.
    pub source: IpAddr,
    /// The B bit: "use me only if nothing else works".
    pub backup: bool,
    /// The id of the address.
    pub address_id: u8,
}

/// A change of priority of a live subflow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prio {
    /// The interface, in the namespace of the capture.
    pub interface: String,
    /// The address that sent it.
    pub source: IpAddr,
    /// The new B bit.
    pub backup: bool,
    /// The id of the address, where the option has one.
    pub address_id: Option<u8>,
}

/// Records the TCP packets of a namespace until it is dropped.
pub struct Capture {
    packets: Arc<Mutex<Vec<Packet>>>,
    socket: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    /// Starts to record everything that `netns` sends and receives, on all of its interfaces.
    pub fn start(sandbox: &Sandbox, netns: &Netns) -> Self {
        let namespace = sandbox.open_netns(netns);
        let packets = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, opened) = mpsc::channel();
        let reader = {
            let (packets, stop) = (Arc::clone(&packets), Arc::clone(&stop));
            // setns concerns this thread only.
            std::thread::spawn(move || {
                setns(&namespace, CloneFlags::CLONE_NEWNET).expect("entering the namespace of a capture");
                drop(namespace);
                let socket = Arc::new(open_socket());
                ready.send(Arc::clone(&socket)).expect("the test waits for the socket");
                read_packets(&socket, &packets, &stop);
            })
        };
        let socket = opened.recv().expect("the capture's socket");
        Self { packets, socket, stop, reader: Some(reader) }
    }

    /// All packets until now; panics if the kernel had to drop some.
    #[track_caller]
    pub fn packets(&self) -> Vec<Packet> {
        let dropped = dropped_packets(&self.socket);
        assert_eq!(dropped, 0, "the capture lost packets");
        // What has come is all recorded when the socket holds nothing and the reader is not busy with what it took.
        let waits = || poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], 0u16).unwrap_or(0) != 0;
        wait_until("an end of the packets", LIMIT, || !waits());
        self.packets.lock().expect("the reader does not panic").clone()
    }

    /// The MP_JOIN SYNs until now.
    pub fn joins(&self) -> Vec<Join> {
        self.packets().iter().filter_map(join_of).collect()
    }

    /// The MP_JOIN SYN that came from, or went to, `interface`; waits for it.
    #[track_caller]
    pub fn wait_join(&self, interface: &str) -> Join {
        wait_for("an MP_JOIN SYN", LIMIT, || self.joins().into_iter().find(|join| join.interface == interface))
    }

    /// The MP_PRIO options until now.
    pub fn prios(&self) -> Vec<Prio> {
        let packets = self.packets();
        let options = packets.iter().flat_map(|packet| packet.options.iter().map(move |option| (packet, option)));
        options
            .filter_map(|(packet, option)| match *option {
                MptcpOption::Prio { backup, address_id } => {
                    Some(Prio { interface: packet.interface.clone(), source: packet.source.ip(), backup, address_id })
                }
                _ => None,
            })
            .collect()
    }

    /// TCP payload that came in over `interface`, in bytes.
    pub fn payload_received(&self, interface: &str) -> u64 {
        let packets = self.packets();
        packets.iter().filter(|p| p.interface == interface && !p.outgoing).map(|p| p.payload).sum()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let ended = reader.join();
            if !std::thread::panicking() {
                ended.expect("the capture's reader ended well");
            }
        }
    }
}

/// The MP_JOIN of a packet that opens a subflow.
fn join_of(packet: &Packet) -> Option<Join> {
    if !packet.syn || packet.ack {
        return None;
    }
    packet.options.iter().find_map(|option| match *option {
        MptcpOption::Join { backup, address_id } => {
            Some(Join { interface: packet.interface.clone(), source: packet.source.ip(), backup, address_id })
        }
        _ => None,
    })
}

/// A packet socket for all interfaces of this thread's namespace. SOCK_DGRAM: the link header is taken off.
fn open_socket() -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Packet, SockType::Datagram, flags, SockProtocol::EthAll)
        .expect("a packet socket (AF_PACKET)");
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).expect("the packet socket's buffer");
    socket
}

fn read_packets(socket: &OwnedFd, packets: &Mutex<Vec<Packet>>, stop: &AtomicBool) {
    // The headers are enough; payload lengths stand in them.
    let mut buffer = [0; 256];
    let mut names = HashMap::new();
    while !stop.load(Ordering::Relaxed) {
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, 20u16).unwrap_or(0) == 0 {
            continue;
        }
        let mut packets = packets.lock().expect("nobody panics with the lock");
        while let Ok((length, Some(link))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            let Some(packet) = decode(&buffer[..length]) else {
                continue;
            };
            let index = link.ifindex() as u32;
            let interface = names.entry(index).or_insert_with(|| interface_name(index)).clone();
            let outgoing = i32::from(link.pkttype()) == i32::from(libc::PACKET_OUTGOING);
            packets.push(Packet { interface, outgoing, ..packet });
        }
    }
}

fn interface_name(index: u32) -> String {
    nix::net::if_::if_indextoname(index).map_or_else(|_| format!("#{index}"), |n| n.to_string_lossy().into_owned())
}

/// Packets that did not fit into the socket's buffer since the last call.
#[allow(unsafe_code)]
fn dropped_packets(socket: &OwnedFd) -> u32 {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `statistics`; both are live and of the type it expects.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    assert_eq!(rc, 0, "PACKET_STATISTICS: {}", std::io::Error::last_os_error());
    statistics.tp_drops
}

/// A TCP packet from its IP header on, without interface and direction; none for anything else.
fn decode(bytes: &[u8]) -> Option<Packet> {
    let (source, destination, tcp, length): (IpAddr, IpAddr, _, _) = match bytes.first()? >> 4 {
        4 => {
            let header = usize::from(bytes[0] & 0x0f) * 4;
            let total = usize::from(be16(bytes, 2)?);
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
            if *bytes.get(9)? != IPPROTO_TCP {
                return None;
            }
            (address(12)?.into(), address(16)?.into(), bytes.get(header..)?, total.checked_sub(header)?)
        }
        6 => {
            let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?));
            if *bytes.get(6)? != IPPROTO_TCP {
                return None;
            }
            (address(8)?.into(), address(24)?.into(), bytes.get(40..)?, usize::from(be16(bytes, 4)?))
        }
        _ => return None,
    };
    let header = usize::from(tcp.get(12)? >> 4) * 4;
    let flags = *tcp.get(13)?;
    Some(Packet {
        interface: String::new(),
        outgoing: false,
        source: SocketAddr::new(source, be16(tcp, 0)?),
        destination: SocketAddr::new(destination, be16(tcp, 2)?),
        syn: flags & 0x02 != 0,
        ack: flags & 0x10 != 0,
        payload: length.checked_sub(header)? as u64,
        options: mptcp_options(tcp.get(20..header)?),
    })
}

/// Walks TCP's options: kind, length, value; kinds 0 (end) and 1 (padding) have no length.
fn mptcp_options(mut options: &[u8]) -> Vec<MptcpOption> {
    let mut found = Vec::new();
    loop {
        match *options {
            [] | [0, ..] => return found,
            [1, ref rest @ ..] => options = rest,
            [kind, length, ..] if (2..=options.len()).contains(&usize::from(length)) => {
                let (option, rest) = options.split_at(usize::from(length));
                if kind == OPTION_MPTCP {
                    found.extend(mptcp_option(option));
                }
                options = rest;
            }
            // A length beyond the header: no sender of ours makes it.
            _ => return found,
        }
    }
}

fn mptcp_option(option: &[u8]) -> Option<MptcpOption> {
    let first = *option.get(2)?;
    let bit0 = first & 1 != 0;
    Some(match (first >> 4, option.len()) {
        (0, _) => MptcpOption::Capable,
        (1, 12 | 16) => MptcpOption::Join { backup: bit0, address_id: option[3] },
        (1, _) => MptcpOption::JoinAck,
        (2, _) => MptcpOption::Dss,
        (3, _) => MptcpOption::AddAddr { address_id: *option.get(3)?, echo: bit0 },
        (4, _) => MptcpOption::RemoveAddr,
        (5, _) => MptcpOption::Prio { backup: bit0, address_id: option.get(3).copied() },
        (other, _) => MptcpOption::Other(other),
    })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}
