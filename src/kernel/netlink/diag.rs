//! The sockets of a network namespace: inet_diag (sock_diag(7), `include/uapi/linux/inet_diag.h`), with what the kernel
//! says of a TCP socket's part in an MPTCP connection (`include/uapi/linux/mptcp.h`). To those without CAP_NET_ADMIN
//! kernels show less of it or nothing.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use nix::errno::Errno;

use super::{Body, Connection, array, attributes, errno, header, text};
use crate::deadline::Deadline;

/// `SOCK_DIAG_BY_FAMILY`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `INET_DIAG_INFO`: `struct tcp_info`, or `struct mptcp_info` of an MPTCP socket.
const INET_DIAG_INFO: u16 = 2;
/// `INET_DIAG_ULP_INFO` (Linux 5.4).
const INET_DIAG_ULP_INFO: u16 = 19;
/// `INET_ULP_INFO_NAME`, `INET_ULP_INFO_MPTCP`.
const ULP_NAME: u16 = 1;
const ULP_MPTCP: u16 = 3;
/// `MPTCP_SUBFLOW_ATTR_*`.
const SUBFLOW_TOKEN_LOCAL: u16 = 2;
const SUBFLOW_FLAGS: u16 = 8;
const SUBFLOW_ID_LOCAL: u16 = 10;
/// `INET_DIAG_REQ_PROTOCOL`: protocols that do not fit into a byte (Linux 5.9).
const REQ_PROTOCOL: u16 = 3;
/// One for experiments (RFC 3692), whose sockets no kernel lists.
const NOBODYS_PROTOCOL: u8 = 253;
/// `IPPROTO_MPTCP` (`include/uapi/linux/in.h`).
const IPPROTO_MPTCP: u32 = 262;
/// Where `struct tcp_info` has `tcpi_bytes_acked` and, behind it, `tcpi_bytes_received`.
const TCP_INFO_BYTES: usize = 120;
/// Where it has `tcpi_bytes_sent` (Linux 4.19).
const TCP_INFO_SENT: usize = 200;
/// Where `struct mptcp_info` has `mptcpi_token`.
const MPTCP_INFO_TOKEN: usize = 12;

/// The states of a socket that matters here (`include/net/tcp_states.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    /// Both sides agreed.
    Established,
    /// The SYN is on its way, or lost.
    SynSent,
    /// The SYN/ACK is.
    SynReceived,
    /// The other side has ended.
    CloseWait,
    /// It waits for connections.
    Listen,
}

impl TcpState {
    const ALL: [(u8, Self); 5] =
        [(1, Self::Established), (2, Self::SynSent), (3, Self::SynReceived), (8, Self::CloseWait), (10, Self::Listen)];

    /// The name that ss(8) shows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Established => "ESTAB",
            Self::SynSent => "SYN-SENT",
            Self::SynReceived => "SYN-RECV",
            Self::CloseWait => "CLOSE-WAIT",
            Self::Listen => "LISTEN",
        }
    }
}

/// What a TCP socket is to an MPTCP connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subflow {
    /// The connection's number on this side; 0 where the kernel does not say.
    pub token: u32,
    /// `MPTCP_SUBFLOW_FLAG_*`.
    pub flags: u32,
    /// The id of its local address; 0 for that of the first subflow.
    pub local_id: u8,
}

impl Subflow {
    const AGREED: u32 = 1 << 0 | 1 << 2;
    const STARTED_HERE: u32 = 1 << 1;
    const JOINED: u32 = 1 << 2 | 1 << 3;
    const BACKUP_REMOTE: u32 = 1 << 4;
    const BACKUP_LOCAL: u32 = 1 << 5;
    const FULLY_ESTABLISHED: u32 = 1 << 6;

    /// Whether it is a further path of its connection, not the first.
    pub fn is_join(&self) -> bool {
        self.flags & Self::JOINED != 0
    }

    /// Whether it is the first path, and this side opened it.
    pub fn opened_connection(&self) -> bool {
        !self.is_join() && self.flags & Self::STARTED_HERE != 0
    }

    /// Whether the other side took MPTCP up. If it did not, the established connection is plain TCP.
    pub fn is_agreed(&self) -> bool {
        self.flags & Self::AGREED != 0
    }

    /// Whether the other side has acknowledged or sent something since the handshake. Before, the kernel makes no
    /// further path of the connection.
    pub fn is_fully_established(&self) -> bool {
        self.flags & Self::FULLY_ESTABLISHED != 0
    }

    /// Whether this side asked for a backup path.
    pub fn is_backup(&self) -> bool {
        self.flags & Self::BACKUP_LOCAL != 0
    }

    /// Whether the other side asked for a backup path.
    pub fn is_peers_backup(&self) -> bool {
        self.flags & Self::BACKUP_REMOTE != 0
    }

    /// The flags as ss(8) shows them: `Jjbec`.
    pub fn letters(&self) -> String {
        let letters = "MmJjBbecv".chars().enumerate();
        letters.filter(|(bit, _)| self.flags & 1 << bit != 0).map(|(_, letter)| letter).collect()
    }
}

/// A TCP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// Its state.
    pub state: TcpState,
    /// This side.
    pub local: SocketAddr,
    /// The other side.
    pub peer: SocketAddr,
    /// The interface that it is bound to; 0 for none.
    pub device: u32,
    /// How often the kernel has repeated what waits for an answer.
    pub retransmits: u8,
    /// The file's inode number. All subflows of a connection have that of its socket; 0 before accept(2).
    pub inode: u32,
    /// Whether MPTCP stands above it.
    pub is_mptcp: bool,
    /// What it is to its connection; none of a listening socket, or where the kernel does not say.
    pub subflow: Option<Subflow>,
    /// Bytes that were sent; before Linux 4.19 those that the other side has acknowledged, the SYN counted as one.
    pub sent: u64,
    /// Bytes that have arrived.
    pub received: u64,
}

impl TcpSocket {
    /// Reads a `struct inet_diag_msg` and its attributes; None for states that do not matter here.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>> {
        let (info, rest) = header::<72>(payload)?;
        let &[family, state, _, retransmits, ..] = info;
        let Some((_, state)) = TcpState::ALL.into_iter().find(|(number, _)| *number == state) else { return Ok(None) };
        let (local, peer) = (side(info, family, 4, 8)?, side(info, family, 6, 24)?);
        let mut socket = Self {
            state,
            local,
            peer,
            device: word(info, 40),
            retransmits,
            inode: word(info, 68),
            is_mptcp: false,
            subflow: None,
            sent: 0,
            received: 0,
        };
        for attribute in attributes(rest) {
            match attribute? {
                (INET_DIAG_INFO, value) => {
                    let number =
                        |at: usize| value.get(at..at + 8).map_or(Ok(0), |bytes| array(bytes).map(u64::from_ne_bytes));
                    let has_sent = value.len() >= TCP_INFO_SENT + 8;
                    socket.sent = number(if has_sent { TCP_INFO_SENT } else { TCP_INFO_BYTES })?;
                    socket.received = number(TCP_INFO_BYTES + 8)?;
                }
                (INET_DIAG_ULP_INFO, value) => socket.read_ulp(value)?,
                _ => {}
            }
        }
        Ok(Some(socket))
    }

    fn read_ulp(&mut self, value: &[u8]) -> Result<()> {
        for attribute in attributes(value) {
            match attribute? {
                (ULP_NAME, name) => self.is_mptcp |= text(name) == "mptcp",
                (ULP_MPTCP, inner) => {
                    let mut subflow = Subflow::default();
                    for attribute in attributes(inner) {
                        match attribute? {
                            (SUBFLOW_TOKEN_LOCAL, value) => subflow.token = u32::from_ne_bytes(array(value)?),
                            (SUBFLOW_FLAGS, value) => subflow.flags = u32::from_ne_bytes(array(value)?),
                            (SUBFLOW_ID_LOCAL, value) => subflow.local_id = u8::from_ne_bytes(array(value)?),
                            _ => {}
                        }
                    }
                    self.subflow = Some(subflow);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether both sockets are subflows of one connection.
    pub fn is_sibling_of(&self, other: &Self) -> bool {
        let (Some(this), Some(that)) = (self.subflow, other.subflow) else { return false };
        match this.token {
            0 => self.inode != 0 && self.inode == other.inode,
            token => token == that.token,
        }
    }
}

/// An MPTCP connection, as its own socket has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MptcpSocket {
    /// Its number on this side.
    pub token: u32,
    /// How many subflows the kernel counts besides the first; those included that hang.
    pub subflows: u8,
}

impl MptcpSocket {
    /// Reads a `struct inet_diag_msg` of an MPTCP socket; None if it has no `struct mptcp_info` (it listens).
    pub fn parse(payload: &[u8]) -> Result<Option<Self>> {
        let (_, rest) = header::<72>(payload)?;
        for attribute in attributes(rest) {
            if let (INET_DIAG_INFO, value) = attribute? {
                let (info, _) = header::<16>(value)?;
                return Ok(Some(Self { token: word(info, MPTCP_INFO_TOKEN), subflows: info[0] }));
            }
        }
        Ok(None)
    }
}

/// One side of `struct inet_diag_sockid`: its port, in network byte order, and its address.
fn side(info: &[u8; 72], family: u8, port: usize, address: usize) -> Result<SocketAddr> {
    let port = u16::from_be_bytes([info[port], info[port + 1]]);
    let bytes: [u8; 16] = array(&info[address..address + 16])?;
    let ip: IpAddr = match i32::from(family) {
        libc::AF_INET => <[u8; 4]>::try_from(&bytes[..4]).map(IpAddr::from)?,
        libc::AF_INET6 => IpAddr::from(bytes).to_canonical(),
        other => bail!("malformed socket message: address family {other}"),
    };
    Ok(SocketAddr::new(ip, port))
}

fn word<const N: usize>(info: &[u8; N], at: usize) -> u32 {
    u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]])
}

/// An inet_diag connection to the network namespace in which it was opened.
pub struct Diag {
    connection: Connection,
}

impl Diag {
    /// Connects to the calling thread's network namespace.
    pub fn open(deadline: Deadline) -> Result<Self> {
        Ok(Self { connection: Connection::open(NETLINK_SOCK_DIAG, deadline)? })
    }

    /// All TCP sockets, IPv4 and IPv6; None if the kernel cannot list them (tcp_diag is neither built in nor loaded).
    pub fn tcp(&mut self) -> Result<Option<Vec<TcpSocket>>> {
        let attempt = "cannot list the TCP sockets";
        let mut all = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            match self.dump(family, None, TcpSocket::parse) {
                Ok(found) => all.extend(found),
                Err(error) if is_unknown(&error) => return Ok(None),
                Err(error) => return Err(error).context(attempt),
            }
        }
        Ok(Some(all))
    }

    /// All MPTCP connections; None if the kernel cannot list them (mptcp_diag is neither built in nor loaded).
    pub fn mptcp(&mut self) -> Result<Option<Vec<MptcpSocket>>> {
        let mut all = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            match self.dump(family, Some(IPPROTO_MPTCP), MptcpSocket::parse) {
                Ok(found) => all.extend(found),
                Err(error) if is_unknown(&error) => return Ok(None),
                Err(error) => return Err(error).context("cannot list the MPTCP sockets"),
            }
        }
        Ok(Some(all))
    }

    /// `struct inet_diag_req_v2`, for any socket.
    fn dump<T>(
        &mut self,
        family: i32,
        protocol: Option<u32>,
        parse: impl Fn(&[u8]) -> Result<Option<T>>,
    ) -> Result<Vec<T>> {
        let mut request = [0; 56];
        request[0] = u8::try_from(family)?;
        // Where the attribute counts, an older kernel looks here: not at TCP's sockets, as the number's lower byte says.
        request[1] = if protocol.is_some() { NOBODYS_PROTOCOL } else { libc::IPPROTO_TCP as u8 };
        request[2] = 1 << (INET_DIAG_INFO - 1);
        let states = TcpState::ALL.iter().fold(0u32, |states, (number, _)| states | 1 << number);
        request[4..8].copy_from_slice(&states.to_ne_bytes());
        let mut body = Body::new(&request);
        if let Some(protocol) = protocol {
            body = body.attribute(REQ_PROTOCOL, &protocol.to_ne_bytes());
        }
        self.connection.dump(SOCK_DIAG_BY_FAMILY, &body, parse)
    }
}

/// Whether the kernel has nothing that could list these sockets.
fn is_unknown(error: &anyhow::Error) -> bool {
    matches!(errno(error), Some(Errno::ENOENT | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::super::testing::{in_namespace, ip, payload, soon, torment};
    use super::*;

    fn message(state: u8) -> Vec<u8> {
        let mut info = [0u8; 72];
        (info[0], info[1], info[3]) = (libc::AF_INET as u8, state, 2);
        info[4..8].copy_from_slice(&[0x13, 0x88, 0, 80]);
        info[8..12].copy_from_slice(&[10, 0, 2, 2]);
        info[24..28].copy_from_slice(&[10, 0, 0, 1]);
        info[40..44].copy_from_slice(&7u32.to_ne_bytes());
        info[68..72].copy_from_slice(&99u32.to_ne_bytes());
        let subflow = Body::new(&[])
            .attribute(SUBFLOW_TOKEN_LOCAL, &0x312d_5bc5u32.to_ne_bytes())
            .attribute(SUBFLOW_FLAGS, &0b110_1100u32.to_ne_bytes())
            .attribute(SUBFLOW_ID_LOCAL, &[1]);
        let ulp = Body::new(&[]).attribute(ULP_NAME, b"mptcp\0").nested(ULP_MPTCP, &subflow);
        let mut tcp_info = [0; 208];
        tcp_info[120] = 5;
        tcp_info[128] = 6;
        tcp_info[200] = 4;
        payload(Body::new(&info).attribute(INET_DIAG_INFO, &tcp_info).nested(INET_DIAG_ULP_INFO, &ulp))
    }

    #[test]
    fn a_subflow_is_read() {
        let socket = TcpSocket::parse(&message(2)).unwrap().unwrap();
        let subflow = Subflow { token: 0x312d_5bc5, flags: 0b110_1100, local_id: 1 };
        assert_eq!(
            socket,
            TcpSocket {
                state: TcpState::SynSent,
                local: "10.0.2.2:5000".parse().unwrap(),
                peer: "10.0.0.1:80".parse().unwrap(),
                device: 7,
                retransmits: 2,
                inode: 99,
                is_mptcp: true,
                subflow: Some(subflow),
                sent: 4,
                received: 6,
            }
        );
        assert_eq!(subflow.letters(), "Jjbe");
        assert!(subflow.is_join() && subflow.is_backup() && !subflow.is_peers_backup());
        assert!(subflow.is_fully_established() && !Subflow { flags: 0b11, ..subflow }.is_fully_established());
        assert_eq!(TcpSocket::parse(&message(6)).unwrap(), None, "TIME-WAIT");
        assert!(TcpSocket::parse(&[0; 71]).is_err());
        torment(&message(1), |message| drop(TcpSocket::parse(message)));
    }

    #[test]
    fn a_connection_is_read() {
        let mut info = [0; 16];
        info[0] = 3;
        info[12..].copy_from_slice(&0xabcdu32.to_ne_bytes());
        let message = payload(Body::new(&[0; 72]).attribute(INET_DIAG_INFO, &info));
        assert_eq!(MptcpSocket::parse(&message).unwrap(), Some(MptcpSocket { token: 0xabcd, subflows: 3 }));
        assert_eq!(MptcpSocket::parse(&[0; 72]).unwrap(), None);
        torment(&message, |message| drop(MptcpSocket::parse(message)));
    }

    #[test]
    fn plain_sockets_of_a_namespace() {
        in_namespace(|| {
            ip("link set lo up\n");
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            client.write_all(b"x").unwrap();
            server.read_exact(&mut [0]).unwrap();
            let mut diag = Diag::open(soon()).unwrap();
            let sockets = diag.tcp().unwrap().unwrap();
            assert_eq!(sockets.len(), 3, "{sockets:#?}");
            let found = sockets.iter().find(|s| s.local == client.local_addr().unwrap()).unwrap();
            assert_eq!((found.state, found.peer), (TcpState::Established, client.peer_addr().unwrap()));
            assert!(!found.is_mptcp && found.subflow.is_none());
            assert_eq!(sockets.iter().filter(|s| s.state == TcpState::Listen).count(), 1);
            assert_eq!(diag.mptcp().unwrap().unwrap_or_default(), []);
        });
    }
}
