//! The packet socket (packet(7)): all interfaces of a namespace, those that come later included.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockType, recvmsg, setsockopt, socket, sockopt,
};
use serde::Serialize;

use super::filter;
use super::packet::{Frame, Tag};
use crate::sys;

/// Room for packets that wait to be read, in bytes as the kernel counts them: each as if it were kept whole.
const BUFFER: usize = 32 << 20;
/// `struct tpacket_auxdata` (`include/uapi/linux/if_packet.h`), and where its members are.
const AUXDATA: usize = 20;
const AUXDATA_LENGTH: usize = 4;
const AUXDATA_TAG: usize = 16;
const AUXDATA_TAG_PROTOCOL: usize = 18;
/// 802.1Q, where the kernel does not say (before Linux 3.14).
const VLAN: u16 = 0x8100;

/// Which way a packet goes, seen from the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To this host, by its address or to all.
    In,
    /// From this host.
    Out,
    /// To somebody else: a bridge's port, or a promiscuous interface.
    Other,
}

impl Direction {
    /// `PACKET_*` (`include/uapi/linux/if_packet.h`).
    pub fn number(self) -> u8 {
        match self {
            Self::In => libc::PACKET_HOST,
            Self::Other => libc::PACKET_OTHERHOST,
            Self::Out => libc::PACKET_OUTGOING,
        }
    }

    /// The word that `capture` prints.
    pub fn word(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
            Self::Other => "other",
        }
    }

    fn of(number: u8) -> Self {
        match number {
            libc::PACKET_OUTGOING => Self::Out,
            libc::PACKET_OTHERHOST => Self::Other,
            _ => Self::In,
        }
    }
}

/// A packet as the kernel gave it.
#[derive(Debug)]
pub struct Captured {
    /// When it passed: seconds since 1970.
    pub seconds: u64,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// The interface's index.
    pub ifindex: u32,
    /// The interface's type, `ARPHRD_*`.
    pub hardware: u16,
    /// Which way it goes.
    pub direction: Direction,
    /// The sender's link-layer address.
    pub address: [u8; 8],
    /// How much of it is in use, in bytes.
    pub address_length: u8,
    /// The VLAN tag that the kernel has taken out of it.
    pub tag: Option<Tag>,
    /// How long it was before it was cut, in bytes.
    pub length: usize,
    /// What was kept of it.
    pub bytes: Vec<u8>,
}

impl Captured {
    /// What the parsers take.
    pub fn frame(&self) -> Frame<'_> {
        Frame { hardware: self.hardware, tag: self.tag, bytes: &self.bytes, length: self.length }
    }
}

/// A socket that receives what passes the filter.
pub struct PacketSocket {
    socket: OwnedFd,
}

impl PacketSocket {
    /// Opens it in the calling thread's network namespace, for which CAP_NET_RAW is needed there.
    pub fn open(dss: bool) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Without a protocol it receives nothing yet: no packet comes by before the filter is there.
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)
            .context("cannot open a packet socket (CAP_NET_RAW is needed; run as root)")?;
        // The larger buffer needs CAP_NET_ADMIN in the initial user namespace; without it the default has to do.
        if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
            let _ = setsockopt(&socket, sockopt::RcvBuf, &BUFFER);
        }
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)
            .context("cannot have packets' times (SO_TIMESTAMPNS)")?;
        sys::set_packet_auxdata(socket.as_fd()).context("cannot have packets' VLAN tags (PACKET_AUXDATA)")?;
        sys::attach_filter(socket.as_fd(), &filter::program(dss))
            .context("cannot give the kernel the packet filter (SO_ATTACH_FILTER)")?;
        sys::bind_to_all_interfaces(socket.as_fd()).context("cannot listen on the interfaces")?;
        Ok(Self { socket })
    }

    /// The next packet that waits. None if there is none.
    pub fn receive(&self) -> io::Result<Option<Captured>> {
        let mut bytes = vec![0; filter::KEPT as usize];
        let mut space = nix::cmsg_space!(libc::timespec, [u8; AUXDATA]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = loop {
            match recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()) {
                Ok(message) => break message,
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        };
        let from = message.address.ok_or_else(|| io::Error::other("the kernel did not say from which interface"))?;
        let (mut time, mut auxdata) = (None, None);
        for part in message.cmsgs()? {
            match part {
                ControlMessageOwned::ScmTimestampns(at) => time = Some(at),
                ControlMessageOwned::Unknown(part)
                    if part.cmsg_header.cmsg_level == libc::SOL_PACKET
                        && part.cmsg_header.cmsg_type == libc::PACKET_AUXDATA =>
                {
                    auxdata = Some(part.data_bytes);
                }
                _ => {}
            }
        }
        let received = message.bytes;
        let time = time.unwrap_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().into());
        let mut address = [0; 8];
        let known = from.addr().unwrap_or_default();
        address[..known.len()].copy_from_slice(&known);
        let captured = Captured {
            seconds: time.tv_sec().try_into().unwrap_or_default(),
            nanoseconds: time.tv_nsec().try_into().unwrap_or_default(),
            ifindex: from.ifindex().try_into().unwrap_or_default(),
            hardware: from.hatype(),
            direction: Direction::of(from.pkttype()),
            address,
            address_length: from.halen().min(8) as u8,
            tag: auxdata.as_deref().and_then(tag),
            length: auxdata.as_deref().and_then(length).unwrap_or(received).max(received),
            bytes: Vec::new(),
        };
        bytes.truncate(received);
        Ok(Some(Captured { bytes, ..captured }))
    }

    /// How many packets the kernel had to drop since the last call, because nobody read them fast enough.
    pub fn dropped(&self) -> u32 {
        sys::dropped_packets(self.socket.as_fd()).unwrap_or_default()
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The tag in the auxiliary data.
fn tag(auxdata: &[u8]) -> Option<Tag> {
    let status = u32::from_ne_bytes(*auxdata.first_chunk()?);
    let half = |at: usize| Some(u16::from_ne_bytes(*auxdata.get(at..)?.first_chunk()?));
    if status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let is_said = status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
    Some(Tag { control: half(AUXDATA_TAG)?, protocol: if is_said { half(AUXDATA_TAG_PROTOCOL)? } else { VLAN } })
}

/// The length of the whole packet.
fn length(auxdata: &[u8]) -> Option<usize> {
    Some(u32::from_ne_bytes(*auxdata.get(AUXDATA_LENGTH..)?.first_chunk()?) as usize)
}
