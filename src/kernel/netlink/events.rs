//! The kernel's word that a link, an address, a rule or a route has come, gone or changed (rtnetlink(7), multicast
//! groups). What exactly is read from the tables afterwards: a message may be lost (ENOBUFS), the tables are complete.
//!
//! A socket inside a namespace keeps it alive, and when it is closed for another RCU grace period (about 16 ms).
//! [`EventsOfMany`] has none there.

use std::collections::BTreeSet;
use std::io::{ErrorKind, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::{Context, Result, ensure};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};

use super::{Body, Connection, array, attributes, errno, header};
use crate::deadline::Deadline;

/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_IFADDR`, `RTNLGRP_IPV6_IFADDR`, `RTNLGRP_IPV4_RULE` and `RTNLGRP_IPV6_RULE`
/// (`include/uapi/linux/rtnetlink.h`).
const GROUPS: u32 = 1 << 0 | 1 << 4 | 1 << 8 | 1 << 7 | 1 << 18;
/// `RTNLGRP_IPV4_ROUTE` and `RTNLGRP_IPV6_ROUTE`.
const ROUTE_GROUPS: [u32; 2] = [7, 11];
/// `NETNSA_NSID` and `NETNSA_PID` (`include/uapi/linux/net_namespace.h`).
const ATTR_NSID: u16 = 1;
const ATTR_PID: u16 = 2;
/// `NETNSA_NSID_NOT_ASSIGNED`.
const NO_NSID: i32 = -1;
/// Room for the messages of all namespaces, in bytes; the kernel takes it only while they wait.
const RECEIVE_BUFFER: usize = 2 << 20;

/// A socket that becomes readable when links, addresses or routes of its network namespace change. It keeps the namespace
/// alive.
pub struct Events {
    socket: Socket,
    routes: bool,
}

impl Events {
    /// Listens in the calling thread's network namespace.
    pub fn open() -> Result<Self> {
        Self::listen_on(Socket::new(NETLINK_ROUTE).context("cannot open a netlink socket")?)
    }

    fn listen_on(mut socket: Socket) -> Result<Self> {
        socket.set_non_blocking(true).context("cannot make a netlink socket non-blocking")?;
        socket.bind(&SocketAddr::new(0, GROUPS)).context("cannot listen for changes of links, addresses and routes")?;
        let mut events = Self { socket, routes: false };
        events.hear_of_routes(true)?;
        Ok(events)
    }

    /// Whether routes are heard of, too. A routing daemon changes them all the time, so that they are left out where
    /// none is missing.
    pub fn hear_of_routes(&mut self, hear: bool) -> Result<()> {
        if hear != self.routes {
            let set = if hear { Socket::add_membership } else { Socket::drop_membership };
            for group in ROUTE_GROUPS {
                set(&self.socket, group).context("cannot choose what to hear of routes")?;
            }
            self.routes = hear;
        }
        Ok(())
    }

    /// Throws away what has arrived, and tells whether anything has.
    pub fn drain(&mut self) -> bool {
        let mut any = false;
        // The messages are not looked at: a cut one is as good as a whole one.
        let mut buffer = Vec::with_capacity(256);
        loop {
            buffer.clear();
            match self.socket.recv_from(&mut buffer, libc::MSG_DONTWAIT) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return any,
                // ENOBUFS: so many that some were dropped.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(_) => return true,
                Ok(_) => any = true,
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A number that stands for a network namespace within another one (`nsid`, ip-netns(8)), while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nsid(i32);

/// What has arrived from other namespaces.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Where something has changed. Some may be nobody's.
    pub namespaces: BTreeSet<Nsid>,
    /// There may be more of them: messages were dropped.
    pub lost: bool,
}

/// One socket that becomes readable when links, addresses or routes of any namespace change that has a number in this
/// one (`NETLINK_LISTEN_ALL_NSID`, Linux 4.2). It keeps none of them alive.
pub struct EventsOfMany {
    events: Events,
}

impl EventsOfMany {
    /// Listens to the namespaces that have a number in the calling thread's one, now or later. CAP_NET_BROADCAST is needed
    /// over this one and over each of those.
    pub fn open() -> Result<Self> {
        let socket = Socket::new(NETLINK_ROUTE).context("cannot open a netlink socket")?;
        socket.set_listen_all_namespaces(true).context("cannot listen to other namespaces")?;
        let events = Events::listen_on(socket)?;
        // The larger buffer needs CAP_NET_ADMIN in the initial user namespace; without it the default has to do.
        if setsockopt(&events, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            let _ = setsockopt(&events, sockopt::RcvBuf, &RECEIVE_BUFFER);
        }
        Ok(Self { events })
    }

    /// The number of a process's network namespace in the calling thread's one, which has to be where this was opened; it
    /// is given one if it has none.
    pub fn number_of(&self, pid: u32, deadline: Deadline) -> Result<Nsid> {
        let mut connection = Connection::open(NETLINK_ROUTE, deadline)?;
        // `struct rtgenmsg`.
        let process = || Body::new(&[0; 4]).attribute(ATTR_PID, &pid.to_ne_bytes());
        let any = process().attribute(ATTR_NSID, &NO_NSID.to_ne_bytes());
        match connection.command(libc::RTM_NEWNSID, &any) {
            Err(error) if errno(&error) == Some(Errno::EEXIST) => {}
            done => done.with_context(|| format!("cannot number the network namespace of process {pid}"))?,
        }
        let answers = connection
            .request(libc::RTM_GETNSID, &process(), |payload| {
                let (_, rest) = header::<4>(payload)?;
                for attribute in attributes(rest) {
                    if let (ATTR_NSID, value) = attribute? {
                        return Ok(Some(i32::from_ne_bytes(array(value)?)));
                    }
                }
                Ok(None)
            })
            .with_context(|| format!("cannot read the number of the network namespace of process {pid}"))?;
        let number = answers.first().copied().unwrap_or(NO_NSID);
        ensure!(number >= 0, "the kernel gives the network namespace of process {pid} no number");
        Ok(Nsid(number))
    }

    /// Whether routes are heard of, too; see [`Events::hear_of_routes`].
    pub fn hear_of_routes(&mut self, hear: bool) -> Result<()> {
        self.events.hear_of_routes(hear)
    }

    /// Throws away what has arrived, and tells where from.
    pub fn drain(&self) -> Heard {
        let mut heard = Heard::default();
        let mut control = nix::cmsg_space!(i32);
        loop {
            // The messages are not looked at: a cut one is as good as a whole one.
            let mut start = [0; 1];
            let mut buffer = [IoSliceMut::new(&mut start)];
            let socket = self.events.as_fd().as_raw_fd();
            match recvmsg::<()>(socket, &mut buffer, Some(&mut control), MsgFlags::MSG_DONTWAIT) {
                Ok(message) => heard.namespaces.extend(message.cmsgs().into_iter().flatten().find_map(nsid)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return heard,
                Err(Errno::ENOBUFS) => heard.lost = true,
                Err(_) => return Heard { lost: true, ..heard },
            }
        }
    }
}

/// The kernel's word where a message comes from; it says nothing of those from the socket's own namespace.
fn nsid(message: ControlMessageOwned) -> Option<Nsid> {
    let ControlMessageOwned::Unknown(message) = message else { return None };
    let header = message.cmsg_header;
    let is_it = header.cmsg_level == libc::SOL_NETLINK && header.cmsg_type == libc::NETLINK_LISTEN_ALL_NSID;
    let value = message.data_bytes.get(..size_of::<i32>()).filter(|_| is_it)?;
    Some(Nsid(i32::from_ne_bytes(value.try_into().ok()?)))
}

impl AsFd for EventsOfMany {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{in_namespace, ip};
    use super::*;

    const SOON: std::time::Duration = std::time::Duration::from_secs(600);

    #[test]
    fn links_addresses_and_routes_are_heard_of() {
        in_namespace(|| {
            let mut events = Events::open().unwrap();
            assert!(!events.drain());
            ip("link add eth0 type veth peer name peer");
            assert!(events.drain());
            assert!(!events.drain());
            for change in [
                "link set eth0 up",
                "address add 10.0.0.1/24 dev eth0",
                "address add fd00::1/64 dev eth0",
                "route add 10.1.0.0/24 via 10.0.0.2",
                "-6 route add fd01::/64 via fd00::2",
            ] {
                ip(change);
                assert!(events.drain(), "{change}");
            }
        });
        // Without a veth, of which there may be late news.
        in_namespace(|| {
            ip("link set lo up");
            let mut events = Events::open().unwrap();
            events.hear_of_routes(false).unwrap();
            ip("route add unreachable 10.2.0.0/24");
            assert!(!events.drain());
            events.hear_of_routes(true).unwrap();
            ip("route add unreachable 10.3.0.0/24");
            assert!(events.drain());
        });
    }

    #[test]
    fn more_than_fits_is_heard_of_too() {
        in_namespace(|| {
            let mut events = Events::open().unwrap();
            ip("link add eth0 type veth peer name peer");
            let flood: String = (0..1500).map(|n| format!("link set eth0 mtu {}\n", 1000 + n % 2)).collect();
            ip(&flood);
            assert!(events.drain());
            assert!(!events.drain());
            ip("link set eth0 mtu 1400");
            assert!(events.drain());
        });
    }

    /// A namespace of its own, held by a process.
    fn elsewhere() -> std::process::Child {
        let mut command = std::process::Command::new("sleep");
        command.arg("100").stdin(std::process::Stdio::null());
        std::thread::scope(|scope| {
            let start = || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                command.spawn().unwrap()
            };
            scope.spawn(start).join().unwrap()
        })
    }

    /// ip(8) in its namespace.
    fn ip_in(child: &std::process::Child, batch: &str) {
        let target = crate::kernel::netns::Namespace::open(format!("/proc/{}/ns/net", child.id()).as_ref()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                target.enter().unwrap();
                ip(batch);
            });
        });
    }

    #[test]
    fn many_namespaces_are_told_apart_by_one_socket() {
        in_namespace(|| {
            let mut events = EventsOfMany::open().unwrap();
            let mut children = [elsewhere(), elsewhere(), elsewhere()];
            let number = |child: &std::process::Child| events.number_of(child.id(), Deadline::after(SOON)).unwrap();
            let [first, second] = [number(&children[0]), number(&children[1])];
            assert_ne!(first, second);
            assert_eq!(number(&children[0]), first);
            let of = |numbers: &[Nsid]| Heard { namespaces: numbers.iter().copied().collect(), lost: false };
            assert_eq!(events.drain(), of(&[]));
            ip_in(&children[1], "link set lo up");
            assert_eq!(events.drain(), of(&[second]));
            // Nothing of one without a number, and nothing of home.
            ip_in(&children[2], "link set lo up");
            ip("link set lo up");
            assert_eq!(events.drain(), of(&[]));
            for child in &children[..2] {
                ip_in(child, "address add 10.0.0.1/24 dev lo");
            }
            assert_eq!(events.drain(), of(&[first, second]));
            ip_in(&children[0], "route add unreachable 10.1.0.0/24");
            assert_eq!(events.drain(), of(&[first]));
            events.hear_of_routes(false).unwrap();
            ip_in(&children[0], "route add unreachable 10.2.0.0/24");
            assert_eq!(events.drain(), of(&[]));
            for child in &mut children {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        });
    }

    #[test]
    fn more_than_fits_of_many_is_known_to_be_lost() {
        in_namespace(|| {
            let events = EventsOfMany::open().unwrap();
            let mut child = elsewhere();
            let number = events.number_of(child.id(), Deadline::after(SOON)).unwrap();
            let flood: String = (0..8000).map(|n| format!("link set lo mtu {}\n", 1000 + n % 2)).collect();
            ip_in(&child, &flood);
            let heard = events.drain();
            assert!(heard.lost && heard.namespaces.contains(&number), "{heard:?}");
            ip_in(&child, "link set lo mtu 1400");
            assert_eq!(events.drain(), Heard { namespaces: [number].into(), lost: false });
            child.kill().unwrap();
            child.wait().unwrap();
        });
    }
}
