//! The kernel's word that a link, an address or a route has come, gone or changed (rtnetlink(7), multicast groups). What exactly
//! is read from the tables afterwards: a message may be lost (ENOBUFS), the tables are complete.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// `RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` (`include/uapi/linux/rtnetlink.h`).
const GROUPS: u32 = 0x1 | 0x10 | 0x100;
/// `RTNLGRP_IPV4_ROUTE` and `RTNLGRP_IPV6_ROUTE`.
const ROUTE_GROUPS: [u32; 2] = [7, 11];

/// A socket that becomes readable when links, addresses or routes of its network namespace change. It keeps the namespace
/// alive.
pub struct Events {
    socket: Socket,
    routes: bool,
}

impl Events {
    /// Listens in the calling thread's network namespace.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("cannot open a netlink socket")?;
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

#[cfg(test)]
mod tests {
    use super::super::testing::{in_namespace, ip};
    use super::*;

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
            events.hear_of_routes(false).unwrap();
            ip("route add 10.2.0.0/24 via 10.0.0.2");
            assert!(!events.drain());
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
}
