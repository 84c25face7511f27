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
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::expectations::{Kind, Running};
use super::oci::HookEntry;
use super::sandbox::{Netns, Sandbox};
use super::{LIMIT, wait_until};

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

    /// What wires the namespace `netns` (a name, or a pid): commands of ip(8) for the server's namespace, and then for
    /// it. The server's ends are up first, so that no route is ever seen without a carrier.
    fn commands(&self, netns: &str) -> [String; 2] {
        let n = self.number;
        let mut inside = "link set lo up\n".to_owned();
        let mut outside = String::new();
        for (index, interface) in ["eth0", "eth1"].into_iter().enumerate() {
            let path = index + 1;
            let peer = self.server_end(interface);
            let metric = path * 100;
            let default = index == 0 || self.second_route;
            // Where both ends have the same index the kernel tells the news of a link once in a second only.
            let ifindex = 1000 + 2 * usize::from(n) + index;
            outside += &format!("link add {peer} index {ifindex} type veth peer name {interface} netns {netns}\n");
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
        [outside, inside]
    }
}

/// Waits, in a namespace and on a thread of its own, until the kernel has noticed that these links are up and has given them
/// its own addresses: it does that by itself at some time. Tests compare what was before and after, and what is sent by a
/// link of which it has not noticed gets lost.
fn wait_for_links(names: &[String]) {
    // /sys shows the links of the namespace that it was mounted in.
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).expect("a sysfs");
    let read = |path: String| std::fs::read_to_string(path).unwrap_or_default();
    let is_ready = |name: &str| {
        let by_itself = read(format!("/proc/sys/net/ipv6/conf/{name}/addr_gen_mode")).trim() == "0"
            && read(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6")).trim() == "0";
        let addresses = read("/proc/thread-self/net/if_inet6".into());
        let own =
            addresses.lines().any(|line| line.starts_with("fe80") && line.split_whitespace().last() == Some(name));
        read(format!("/sys/class/net/{name}/operstate")).trim() == "up" && (own || !by_itself)
    };
    wait_until("links that are up", LIMIT, || names.iter().all(|name| is_ready(name)));
}

/// The server's side of two paths; see the module's description.
pub struct TwoPaths<'a> {
    sandbox: &'a Sandbox,
    server: Netns,
}

impl<'a> TwoPaths<'a> {
    /// The server namespace `srv`, joined to nothing yet.
    pub fn new(sandbox: &'a Sandbox) -> Self {
        sandbox.ip_in(&Netns::Host, "netns add srv");
        Self::serving_in(sandbox, Netns::named("srv"))
    }

    /// The sandbox's own namespace as the server, for engines that make bridges there: the container's gateways are
    /// the bridges' addresses, and the interfaces of captures, counters and [`TwoPaths::cut`] are the bridges.
    pub fn at_host(sandbox: &'a Sandbox) -> Self {
        Self::serving_in(sandbox, Netns::Host)
    }

    fn serving_in(sandbox: &'a Sandbox, server: Netns) -> Self {
        sandbox.inside(&server, || {
            for (key, value) in [("rp_filter", "0"), ("arp_ignore", "1")] {
                for conf in ["all", "default"] {
                    let path = format!("/proc/sys/net/ipv4/conf/{conf}/{key}");
                    std::fs::write(&path, value).unwrap_or_else(|e| panic!("writing {path}: {e}"));
                }
            }
        });
        let commands = "link set lo up
                        addr add 10.0.0.1/32 dev lo
                        addr add fd00::1/128 dev lo nodad";
        sandbox.ip_in(&server, commands);
        let paths = Self { sandbox, server };
        paths.raise_limits(&paths.server);
        paths
    }

    /// The highest limits in a namespace, where the kernel has any.
    pub fn raise_limits(&self, netns: &Netns) {
        if Running::look().kind == Kind::Upstream {
            self.sandbox.ip_in(netns, "mptcp limits set subflows 8 add_addr_accepted 8");
        }
    }

    /// A bridge in the server's namespace with `address` (ADDRESS/PREFIX), for an engine to plug containers into.
    pub fn bridge(&self, name: &str, address: &str) {
        let commands = format!("link add {name} type bridge\naddr add {address} dev {name}\nlink set {name} up");
        self.sandbox.ip_in(&self.server, &commands);
    }

    /// A server and the namespace `ctr` (/run/netns/ctr) for a container, wired as `wiring` says.
    pub fn with_container_netns(sandbox: &'a Sandbox, wiring: &Wiring) -> Self {
        let paths = Self::new(sandbox);
        paths.join_new(wiring, "ctr");
        paths
    }

    /// Makes the namespace /run/netns/`name` and joins it to the server `srv`.
    pub fn join_new(&self, wiring: &Wiring, name: &str) -> Netns {
        self.sandbox.ip_in(&Netns::Host, &format!("netns add {name}"));
        let netns = Netns::named(name);
        self.join(wiring, &netns);
        netns
    }

    /// Joins a namespace to the server `srv`.
    pub fn join(&self, wiring: &Wiring, netns: &Netns) {
        let name = match netns {
            Netns::Host => panic!("the sandbox's own namespace is no container's"),
            Netns::Named(name) => name.clone(),
            Netns::Pid(pid) => pid.to_string(),
        };
        let [outside, inside] = wiring.commands(&name);
        let server = Netns::named("srv");
        self.sandbox.ip_in(&server, &outside);
        self.sandbox.ip_in(netns, &inside);
        let ends = ["eth0", "eth1"];
        self.sandbox.inside(netns, || wait_for_links(&ends.map(str::to_owned)));
        self.sandbox.inside(&server, || wait_for_links(&ends.map(|end| wiring.server_end(end))));
    }

    /// An OCI hook that joins the container's own namespace, for runtimes that make it themselves. It has to stand
    /// before the hook under test, as an engine's network set-up does.
    pub fn joining_hook(&self, wiring: &Wiring) -> HookEntry {
        let file = self.sandbox.dir().join(format!("wire-{}", wiring.number));
        let [outside, inside] = wiring.commands("$pid");
        let script = format!(
            "#!/bin/sh\nset -e\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
             pid=$(tr -d '\\n' | sed -n 's/.*\"pid\" *: *\\([0-9]*\\).*/\\1/p')\n\
             nsenter --net=/run/netns/srv ip -batch - <<OUTSIDE\n{outside}OUTSIDE\n\
             nsenter --net=/proc/$pid/ns/net ip -batch - <<INSIDE\n{inside}INSIDE\n"
        );
        self.sandbox.write_program(&file, &script);
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

    /// Gives the server's side the link address behind `end` for the container's `address`, as a router would know it. A
    /// strict rp_filter at the container also drops what a foreign address asks by ARP; the kernel then gives up a join
    /// after three seconds, one that has only begun meanwhile included, and does not try again.
    #[track_caller]
    pub fn knows_neighbour(&self, end: &str, container: &Netns, interface: &str, address: IpAddr) {
        let link = self.sandbox.run_in(container, &["ip", "-o", "link", "show", "dev", interface]).ok();
        let (_, rest) = link.split_once("link/ether ").expect("a link address");
        let link_address = rest.split_whitespace().next().expect("a link address");
        let command = format!("neigh replace {address} lladdr {link_address} dev {end} nud permanent");
        self.sandbox.ip_in(&self.server, &command);
    }

    /// Takes the server's end of `interface` down: the container sees its carrier go.
    pub fn cut(&self, interface: &str) {
        self.sandbox.ip_in(&self.server, &format!("link set {interface} down"));
    }

    /// Takes the server's end of `interface` up again, and waits until the kernel has noticed.
    pub fn mend(&self, interface: &str) {
        self.sandbox.ip_in(&self.server, &format!("link set {interface} up"));
        self.sandbox.wait_up(&self.server, &[interface]);
    }

    /// Bytes that came in at the server over `interface`, headers included.
    pub fn received(&self, interface: &str) -> u64 {
        self.sandbox.counters(&self.server, interface).received
    }
}
