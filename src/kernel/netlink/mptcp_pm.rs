//! The in-kernel MPTCP path manager's endpoints and limits: generic netlink family `mptcp_pm`, version 1
//! (`include/uapi/linux/mptcp_pm.h`, `Documentation/netlink/specs/mptcp_pm.yaml`).

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use netlink_sys::protocols::NETLINK_GENERIC;
use nix::errno::Errno;

use super::{Body, Connection, array, attributes, errno, header, ip};
use crate::deadline::Deadline;

const FAMILY_NAME: &[u8] = b"mptcp_pm\0";
const VERSION: u8 = 1;

const CMD_ADD_ADDR: u8 = 1;
const CMD_DEL_ADDR: u8 = 2;
const CMD_GET_ADDR: u8 = 3;
const CMD_SET_LIMITS: u8 = 5;
const CMD_GET_LIMITS: u8 = 6;
const CMD_SET_FLAGS: u8 = 7;

const ATTR_ADDR: u16 = 1;
const ATTR_RCV_ADD_ADDRS: u16 = 2;
const ATTR_SUBFLOWS: u16 = 3;

const ADDR_FAMILY: u16 = 1;
const ADDR_ID: u16 = 2;
const ADDR_ADDR4: u16 = 3;
const ADDR_ADDR6: u16 = 4;
const ADDR_PORT: u16 = 5;
const ADDR_FLAGS: u16 = 6;
const ADDR_IF_IDX: u16 = 7;

/// One endpoint, as the kernel keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The MPTCP address id; 0 in [`PathManager::add`] lets the kernel choose.
    pub id: u8,
    /// The local address.
    pub address: IpAddr,
    /// The TCP port of a `signal` endpoint that has its own.
    pub port: Option<u16>,
    /// The interface that subflows are bound to; 0 for none.
    pub ifindex: u32,
    /// The values of [`EndpointFlags`](crate::request::flags::EndpointFlags); unknown bits are kept.
    pub flags: u32,
}

impl Endpoint {
    /// Reads the answer to a GET_ADDR request (after `struct nlmsghdr`); `None` if it holds no endpoint.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>> {
        let (_, rest) = header::<4>(payload)?;
        for attribute in attributes(rest) {
            if let (ATTR_ADDR, value) = attribute? {
                return Self::parse_address(value).map(Some);
            }
        }
        Ok(None)
    }

    fn parse_address(value: &[u8]) -> Result<Self> {
        let (mut id, mut address, mut port, mut ifindex, mut flags) = (0, None, None, 0, 0);
        for attribute in attributes(value) {
            let (kind, value) = attribute?;
            match kind {
                ADDR_ID => id = u8::from_ne_bytes(array(value)?),
                ADDR_ADDR4 | ADDR_ADDR6 => address = Some(ip(value)?),
                // Host byte order, unlike nearly everywhere else.
                ADDR_PORT => port = Some(u16::from_ne_bytes(array(value)?)).filter(|&p| p != 0),
                ADDR_FLAGS => flags = u32::from_ne_bytes(array(value)?),
                ADDR_IF_IDX => ifindex = u32::from_ne_bytes(array(value)?),
                _ => {}
            }
        }
        Ok(Self { id, address: address.context("malformed MPTCP endpoint: it has no address")?, port, ifindex, flags })
    }

    fn emit(&self) -> Body {
        let mut body = identity(self.id, self.address).attribute(ADDR_FLAGS, &self.flags.to_ne_bytes());
        if self.ifindex != 0 {
            body = body.attribute(ADDR_IF_IDX, &self.ifindex.to_ne_bytes());
        }
        if let Some(port) = self.port {
            body = body.attribute(ADDR_PORT, &port.to_ne_bytes());
        }
        body
    }
}

/// How much the path manager may do per connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Additional subflows, 0 to 8.
    pub subflows: u32,
    /// Announced addresses of the peer that are used, 0 to 8.
    pub add_addr_accepted: u32,
}

impl Limits {
    /// Reads the answer to a GET_LIMITS request (after `struct nlmsghdr`).
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let (_, rest) = header::<4>(payload)?;
        let (mut subflows, mut add_addr_accepted) = (None, None);
        for attribute in attributes(rest) {
            match attribute? {
                (ATTR_SUBFLOWS, value) => subflows = Some(u32::from_ne_bytes(array(value)?)),
                (ATTR_RCV_ADD_ADDRS, value) => {
                    add_addr_accepted = Some(u32::from_ne_bytes(array(value)?));
                }
                _ => {}
            }
        }
        let missing = "malformed MPTCP limits: one is missing";
        Ok(Self { subflows: subflows.context(missing)?, add_addr_accepted: add_addr_accepted.context(missing)? })
    }
}

/// The path manager of the network namespace in which it was opened.
pub struct PathManager {
    connection: Connection,
    family: u16,
}

impl PathManager {
    /// Looks for the path manager in the calling thread's network namespace; `None` if the kernel has none.
    pub fn open(deadline: Deadline) -> Result<Option<Self>> {
        let attempt = "cannot look for the kernel's MPTCP path manager";
        let mut connection = Connection::open(NETLINK_GENERIC, deadline).context(attempt)?;
        let family = family_id(&mut connection, FAMILY_NAME).context(attempt)?;
        Ok(family.map(|family| Self { connection, family }))
    }

    /// All endpoints.
    pub fn endpoints(&mut self) -> Result<Vec<Endpoint>> {
        self.connection
            .dump(self.family, &command(CMD_GET_ADDR), Endpoint::parse)
            .context("cannot read the MPTCP endpoints")
    }

    /// The limits in force.
    pub fn limits(&mut self) -> Result<Limits> {
        let attempt = "cannot read the MPTCP limits";
        self.connection
            .request(self.family, &command(CMD_GET_LIMITS), |payload| Limits::parse(payload).map(Some))
            .context(attempt)?
            .first()
            .copied()
            .with_context(|| format!("{attempt}: the kernel's answer is empty"))
    }

    /// Sets both limits; the kernel refuses more than 8.
    pub fn set_limits(&mut self, limits: Limits) -> Result<()> {
        let body = command(CMD_SET_LIMITS)
            .attribute(ATTR_RCV_ADD_ADDRS, &limits.add_addr_accepted.to_ne_bytes())
            .attribute(ATTR_SUBFLOWS, &limits.subflows.to_ne_bytes());
        self.connection.command(self.family, &body).with_context(|| {
            format!(
                "cannot set the MPTCP limits subflows={} add_addr_accepted={}",
                limits.subflows, limits.add_addr_accepted
            )
        })
    }

    /// Adds an endpoint. The kernel accepts addresses and interfaces that do not exist and drops flags that it does not
    /// know: compare with [`PathManager::endpoints`] afterwards. Only with a port does the address have to be there
    /// (EADDRNOTAVAIL), because the kernel listens on it.
    pub fn add(&mut self, endpoint: &Endpoint) -> Result<()> {
        let body = command(CMD_ADD_ADDR).nested(ATTR_ADDR, &endpoint.emit());
        self.connection.command(self.family, &body).with_context(|| {
            format!(
                "cannot add the MPTCP endpoint {} (interface index {}, flags {:#x})",
                endpoint.address, endpoint.ifindex, endpoint.flags
            )
        })
    }

    /// Deletes the endpoint with this id and address. This waits for an RCU grace period (8 to 24 ms). For id 0 the
    /// kernel reports success even if it found nothing.
    pub fn delete(&mut self, id: u8, address: IpAddr) -> Result<()> {
        let body = command(CMD_DEL_ADDR).nested(ATTR_ADDR, &identity(id, address));
        self.connection
            .command(self.family, &body)
            .with_context(|| format!("cannot delete the MPTCP endpoint {address} (id {id})"))
    }

    /// Changes `backup` and `fullmesh` of the endpoint `id` to what `flags` says, on live connections too (Linux 5.12);
    /// the kernel ignores all other bits. A bit left out is cleared, so pass all that are to stay.
    pub fn set_flags(&mut self, id: u8, flags: u32) -> Result<()> {
        let attempt = || format!("cannot set the flags of MPTCP endpoint {id} to {flags:#x}");
        ensure!(id != 0, "{}: id 0 belongs to no endpoint", attempt());
        // No family: with one, the kernel looks for the address and not for the id.
        let address = Body::new(&[]).attribute(ADDR_ID, &[id]).attribute(ADDR_FLAGS, &flags.to_ne_bytes());
        let body = command(CMD_SET_FLAGS).nested(ATTR_ADDR, &address);
        self.connection.command(self.family, &body).with_context(attempt)
    }
}

/// `struct genlmsghdr`.
fn command(command: u8) -> Body {
    Body::new(&[command, VERSION, 0, 0])
}

fn identity(id: u8, address: IpAddr) -> Body {
    let (family, kind) = match address {
        IpAddr::V4(_) => (libc::AF_INET as u16, ADDR_ADDR4),
        IpAddr::V6(_) => (libc::AF_INET6 as u16, ADDR_ADDR6),
    };
    let body = Body::new(&[]).attribute(ADDR_FAMILY, &family.to_ne_bytes()).address(kind, address);
    match id {
        0 => body,
        id => body.attribute(ADDR_ID, &[id]),
    }
}

/// The message type of the generic netlink family `name` (with its NUL byte); `None` if the kernel does not know it.
fn family_id(connection: &mut Connection, name: &[u8]) -> Result<Option<u16>> {
    let body =
        Body::new(&[libc::CTRL_CMD_GETFAMILY as u8, 1, 0, 0]).attribute(libc::CTRL_ATTR_FAMILY_NAME as u16, name);
    match connection.request(libc::GENL_ID_CTRL as u16, &body, parse_family_id) {
        Err(error) if errno(&error) == Some(Errno::ENOENT) => Ok(None),
        found => found?.first().copied().map(Some).context("the kernel's answer holds no family id"),
    }
}

/// Reads the family's message type from the answer to CTRL_CMD_GETFAMILY.
pub(crate) fn parse_family_id(payload: &[u8]) -> Result<Option<u16>> {
    let (_, rest) = header::<4>(payload)?;
    for attribute in attributes(rest) {
        let (kind, value) = attribute?;
        if kind == libc::CTRL_ATTR_FAMILY_ID as u16 {
            return Ok(Some(u16::from_ne_bytes(array(value)?)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::super::KernelError;
    use super::super::testing::{in_namespace, ip, ip_output, payload, soon, torment};
    use super::*;
    use crate::request::flags::EndpointFlags;

    const FLAG_BACKUP: u32 = EndpointFlags::BACKUP.0;
    const FLAG_FULLMESH: u32 = EndpointFlags::FULLMESH.0;
    const FLAG_SIGNAL: u32 = EndpointFlags::SIGNAL.0;
    const FLAG_SUBFLOW: u32 = EndpointFlags::SUBFLOW.0;

    fn open() -> PathManager {
        PathManager::open(soon()).unwrap().expect("these tests need a kernel with MPTCP")
    }

    fn endpoint(address: &str, flags: u32) -> Endpoint {
        Endpoint { id: 0, address: address.parse().unwrap(), port: None, ifindex: 0, flags }
    }

    fn refusal(outcome: Result<()>) -> (Errno, String) {
        let error = outcome.unwrap_err();
        let refusal: &KernelError = error.downcast_ref().expect("not the kernel's error");
        (refusal.errno, refusal.message.clone().expect("the kernel gave no reason"))
    }

    #[test]
    fn what_is_sent_is_what_is_read() {
        for (address, port) in [("10.0.1.2", None), ("fd00::2", Some(4711))] {
            let endpoint = Endpoint {
                id: 5,
                address: address.parse().unwrap(),
                port,
                ifindex: 3,
                flags: FLAG_BACKUP | 0x8000_0000,
            };
            let message = payload(command(CMD_ADD_ADDR).nested(ATTR_ADDR, &endpoint.emit()));
            assert_eq!(Endpoint::parse(&message).unwrap(), Some(endpoint));
            torment(&message, |message| drop(Endpoint::parse(message)));
        }
    }

    #[test]
    fn incomplete_answers_are_errors() {
        let only_id = Body::new(&[]).attribute(ADDR_ID, &[1]);
        assert!(Endpoint::parse(&payload(command(CMD_ADD_ADDR).nested(ATTR_ADDR, &only_id))).is_err());
        assert_eq!(Endpoint::parse(&payload(command(CMD_ADD_ADDR))).unwrap(), None);
        let one_limit = payload(command(CMD_GET_LIMITS).attribute(ATTR_SUBFLOWS, &[1, 0, 0, 0]));
        assert!(Limits::parse(&one_limit).is_err());
        assert!(Limits::parse(&[]).is_err());
        assert!(parse_family_id(&[0; 3]).is_err());
    }

    #[test]
    fn an_unknown_family_is_no_error() {
        in_namespace(|| {
            let mut connection = Connection::open(NETLINK_GENERIC, soon()).unwrap();
            assert_eq!(family_id(&mut connection, b"no-such-family\0").unwrap(), None);
            assert!(family_id(&mut connection, FAMILY_NAME).unwrap().is_some());
        });
    }

    #[test]
    fn life_of_an_endpoint() {
        in_namespace(|| {
            // The address of an endpoint with a port has to be there: the kernel listens on it.
            ip("link add eth1 index 40 type veth peer name peer1\n\
                addr add 10.0.1.2/24 dev eth1\naddr add fd00::2/64 dev eth1 nodad\n\
                link set peer1 up\nlink set eth1 up\n");
            let mut manager = open();
            assert_eq!(manager.endpoints().unwrap(), []);
            let first = Endpoint { ifindex: 40, ..endpoint("10.0.1.2", FLAG_SUBFLOW | FLAG_BACKUP) };
            let second = Endpoint { id: 9, port: Some(4711), ..endpoint("fd00::2", FLAG_SIGNAL) };
            manager.add(&first).unwrap();
            manager.add(&second).unwrap();
            assert_eq!(manager.endpoints().unwrap(), [Endpoint { id: 1, ..first.clone() }, second.clone()]);
            let shown = ip_output("mptcp endpoint show");
            assert!(shown.contains("10.0.1.2 id 1 subflow backup dev eth1"), "{shown}");
            assert!(shown.contains("fd00::2 port 4711 id 9 signal"), "{shown}");

            manager.set_flags(1, FLAG_SUBFLOW | FLAG_FULLMESH).unwrap();
            assert_eq!(manager.endpoints().unwrap()[0].flags, FLAG_SUBFLOW | FLAG_FULLMESH);
            assert!(manager.set_flags(0, FLAG_BACKUP).unwrap_err().to_string().contains("id 0"));
            assert!(manager.set_flags(77, FLAG_BACKUP).is_err());

            assert!(manager.delete(77, first.address).is_err());
            manager.delete(0, "10.9.9.9".parse().unwrap()).unwrap();
            manager.delete(1, first.address).unwrap();
            assert_eq!(manager.endpoints().unwrap(), [second]);
        });
    }

    #[test]
    fn a_duplicate_is_refused_with_the_kernels_reason() {
        in_namespace(|| {
            let mut manager = open();
            manager.add(&endpoint("10.0.1.2", FLAG_SUBFLOW)).unwrap();
            let (errno, message) = refusal(manager.add(&endpoint("10.0.1.2", FLAG_SUBFLOW)));
            assert_eq!(errno, Errno::EEXIST);
            assert!(message.contains("duplicate"), "{message}");
            let (errno, _) = refusal(manager.add(&endpoint("10.0.1.3", FLAG_SIGNAL | FLAG_FULLMESH)));
            assert_eq!(errno, Errno::EINVAL);
        });
    }

    #[test]
    fn eight_endpoints_and_no_more() {
        in_namespace(|| {
            let mut manager = open();
            for i in 1..=8 {
                manager.add(&endpoint(&format!("10.0.1.{i}"), FLAG_SUBFLOW)).unwrap();
            }
            assert_eq!(manager.endpoints().unwrap().len(), 8);
            let error = manager.add(&endpoint("10.0.1.9", FLAG_SUBFLOW)).unwrap_err();
            assert!(matches!(errno(&error), Some(Errno::ERANGE | Errno::EINVAL)), "{error:#}");
            assert!(format!("{error:#}").starts_with("cannot add the MPTCP endpoint 10.0.1.9"), "{error:#}");
        });
    }

    #[test]
    fn limits_are_set_and_bounded() {
        in_namespace(|| {
            let mut manager = open();
            assert_eq!(manager.limits().unwrap(), Limits { subflows: 2, add_addr_accepted: 0 });
            let limits = Limits { subflows: 8, add_addr_accepted: 3 };
            manager.set_limits(limits).unwrap();
            assert_eq!(manager.limits().unwrap(), limits);
            let (errno, message) = refusal(manager.set_limits(Limits { subflows: 9, add_addr_accepted: 0 }));
            assert_eq!(errno, Errno::EINVAL);
            assert!(message.contains("limit greater than maximum"), "{message}");
            assert_eq!(manager.limits().unwrap(), limits);
        });
    }
}
