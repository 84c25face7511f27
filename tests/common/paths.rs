//! Two paths between a container and a server.
//!
//! ```text
//!   container                         server namespace
//!   eth0 10.0.1.2/24 --------------- eth0 10.0.1.1/24 \
//!                                                      lo 10.0.0.1 (and fd00::1)
//!   eth1 10.0.2.2/24 --------------- eth1 10.0.2.1/24 /
//! ```
//!
//! The server's address is on its loopback interface, so it survives the loss of either link, and it answers ARP on
//! each link for that link's address alone: a path without a route really does not work. The container's default
//! routes go over eth0 (metric 100) and eth1 (metric 200).

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;

use super::oci::HookEntry;
use super::sandbox::{Netns, Sandbox};

/// How a container is wired to the server.
#[derive(Clone, Debug)]
pub struct Wiring {
    ipv4: bool,
    ipv6: bool,
    second_route: bool,
    number: u8,
}

impl Wiring {
    /// IPv4 with a default route over each of the two links.
    pub fn new() -> Self {
        Self { ipv4: true, ipv6: false, second_route: true, number: 0 }
    }

    /// IPv6 as well: fd00:1::2/64 on eth0, fd00:2::2/64 on eth1.
    pub fn dual_stack(mut self) -> Self {
        self.ipv6 = true;
        self
    }

    /// IPv6 alone.
    pub fn ipv6_only(mut self) -> Self {
        self.ipv4 = false;
        self.ipv6 = true;
        self
    }

    /// No default route over eth1: the usual mistake, which leaves the path dead.
    pub fn without_second_route(mut self) -> Self {
        self.second_route = false;
        self
    }

    /// For further containers at the same server: networks 10.N.1.0/24 and 10.N.2.0/24, N from 1 to 9; the server's
    /// ends are then called eth0nN and eth1nN.
    pub fn number(mut self, number: u8) -> Self {
        assert!((1..=9).contains(&number), "wiring numbers go from 1 to 9");
        self.number = number;
        self
    }

    /// The name of the server's end of the container's `interface`, as it stands in captures.
    fn server_end(&self, interface: &str) -> String {
        match self.number {
            0 => interface.to_owned(),
            number => format!("{interface}n{number}"),
        }
    }

    /// A script that wires the network namespace at the path `$1`.
    fn script(&self, server: &str) -> String {
        let n = self.number;
        let mut inside = String::new();
        let mut outside = String::new();
        for (index, interface) in ["eth0", "eth1"].into_iter().enumerate() {
            let path = index + 1;
            let peer = self.server_end(interface);
            let metric = path * 100;
            let default = index == 0 || self.second_route;
            inside += &format!("link add {interface} type veth peer name {peer} netns {server}\n");
            outside += &format!("link set {peer} up\n");
            if self.ipv4 {
                inside += &format!("addr add 10.{n}.{path}.2/24 dev {interface}\n");
                outside += &format!("addr add 10.{n}.{path}.1/24 dev {peer}\n");
            }
            if self.ipv6 {
                inside += &format!("addr add fd00:{n}{path}::2/64 dev {interface} nodad\n");
                outside += &format!("addr add fd00:{n}{path}::1/64 dev {peer} nodad\n");
            }
            inside += &format!("link set {interface} up\n");
            if self.ipv4 && default {
                inside += &format!("route add default via 10.{n}.{path}.1 dev {interface} metric {metric}\n");
            }
            if self.ipv6 && default {
                inside += &format!("route add default via fd00:{n}{path}::1 dev {interface} metric {metric}\n");
            }
        }
        format!(
            "nsenter --net=\"$1\" ip -batch - <<'INSIDE'\nlink set lo up\n{inside}INSIDE\n\
             nsenter --net=/run/netns/{server} ip -batch - <<'OUTSIDE'\n{outside}OUTSIDE\n"
        )
    }
}

/// The server's side of two paths; see the module's description.
pub struct TwoPaths<'a> {
    sandbox: &'a Sandbox,
    server: Netns,
}

impl<'a> TwoPaths<'a> {
    /// The server namespace `srv`, joined to nothing yet.
    pub fn new(sandbox: &'a Sandbox) -> Self {
        sandbox.sh("ip netns add srv");
        Self::serving_in(sandbox, Netns::named("srv"))
    }

    /// The sandbox's own namespace as the server, for engines that make bridges there: the container's gateways are
    /// the bridges' addresses, and the interfaces of captures, counters and [`TwoPaths::cut`] are the bridges.
    pub fn at_host(sandbox: &'a Sandbox) -> Self {
        Self::serving_in(sandbox, Netns::Host)
    }

    fn serving_in(sandbox: &'a Sandbox, server: Netns) -> Self {
        sandbox.sh_in(
            &server,
            "ip link set lo up
             ip addr add 10.0.0.1/32 dev lo
             ip addr add fd00::1/128 dev lo nodad
             for conf in all default; do
               echo 0 >/proc/sys/net/ipv4/conf/$conf/rp_filter
               echo 1 >/proc/sys/net/ipv4/conf/$conf/arp_ignore
             done
             ip mptcp limits set subflows 8 add_addr_accepted 8",
        );
        Self { sandbox, server }
    }

    /// A bridge in the server's namespace with `address` (ADDRESS/PREFIX), for an engine to plug containers into.
    pub fn bridge(&self, name: &str, address: &str) {
        let script = format!("ip link add {name} type bridge; ip addr add {address} dev {name}; ip link set {name} up");
        self.sandbox.sh_in(&self.server, &script);
    }

    /// A server and the namespace `ctr` (/run/netns/ctr) for a container, wired as `wiring` says.
    pub fn with_container_netns(sandbox: &'a Sandbox, wiring: &Wiring) -> Self {
        let paths = Self::new(sandbox);
        paths.join_new(wiring, "ctr");
        paths
    }

    /// Makes the namespace /run/netns/`name` and joins it to the server `srv`.
    pub fn join_new(&self, wiring: &Wiring, name: &str) -> Netns {
        self.sandbox.sh(&format!("ip netns add {name}"));
        let netns = Netns::named(name);
        self.join(wiring, &netns);
        netns
    }

    /// Joins a namespace to the server `srv`.
    pub fn join(&self, wiring: &Wiring, netns: &Netns) {
        let script = wiring.script("srv");
        self.sandbox.run(&["sh", "-ec", &script, "wire", &netns.path()]).ok();
    }

    /// An OCI hook that joins the container's own namespace, for runtimes that make it themselves. It has to stand
    /// before the hook under test, as an engine's network set-up does.
    pub fn joining_hook(&self, wiring: &Wiring) -> HookEntry {
        let file = self.sandbox.dir().join(format!("wire-{}", wiring.number));
        let script = format!(
            "#!/bin/sh\nset -e\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
             pid=$(tr -d '\\n' | sed -n 's/.*\"pid\" *: *\\([0-9]*\\).*/\\1/p')\nset -- /proc/$pid/ns/net\n{}",
            wiring.script("srv")
        );
        std::fs::write(&file, script).expect("writing the wiring hook");
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).expect("the wiring hook's mode");
        HookEntry::program(&file.display().to_string())
    }

    /// The server's network namespace.
    pub fn server(&self) -> &Netns {
        &self.server
    }

    /// The server's address, reachable over both paths.
    pub fn address(&self) -> IpAddr {
        IpAddr::from([10, 0, 0, 1])
    }

    /// The server's IPv6 address, reachable over both paths.
    pub fn address6(&self) -> IpAddr {
        IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1])
    }

    /// Takes the server's end of `interface` down: the container sees its carrier go.
    pub fn cut(&self, interface: &str) {
        self.sandbox.sh_in(&self.server, &format!("ip link set {interface} down"));
    }

    /// Takes the server's end of `interface` up again.
    pub fn mend(&self, interface: &str) {
        self.sandbox.sh_in(&self.server, &format!("ip link set {interface} up"));
    }

    /// Bytes that came in at the server over `interface`, headers included.
    pub fn received(&self, interface: &str) -> u64 {
        self.sandbox.counters(&self.server, interface).received
    }
}
