//! `routes=auto`: interfaces get ways out of their own, by rules and tables that are the hook's; what exactly is made,
//! what works by it, and that nothing of it stays behind.

mod common;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::*;
use serde_json::{Value, json};

/// What the agent may take on a machine with much else to do.
const LIMIT: Duration = Duration::from_secs(15);

/// How long a transfer may take.
const TRANSFER_LIMIT: Duration = Duration::from_secs(30);

/// eth1 as a backup path, with the next hop that it has on [`TwoPaths`].
const GATEWAY: [&str; 2] = ["--interface", "eth1=backup,gateway=10.0.2.1"];

/// The same without a word about the next hop.
const BACKUP: [&str; 2] = ["--interface", "eth1=backup"];

const AUTO: [&str; 2] = ["--routes", "auto"];

/// The rules and routes of IPv4 that eth1 gets in `table`.
fn way_out(table: u32) -> Vec<String> {
    vec![
        format!("32000: from 10.0.2.2 lookup {table} proto 109"),
        format!("32001: from all oif eth1 lookup {table} proto 109"),
        format!("default via 10.0.2.1 dev eth1 table {table} proto 109"),
        format!("10.0.2.0/24 dev eth1 table {table} proto 109 scope link"),
    ]
}

fn ctr() -> Netns {
    Netns::named("ctr")
}

/// All rules and routes of a namespace, one in each line, without what differs from call to call.
#[track_caller]
fn routing(sandbox: &Sandbox, netns: &Netns) -> Vec<String> {
    let text = sandbox.sh_in(
        netns,
        "ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all; ip mptcp endpoint show",
    );
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// Takes the kernel's own IPv6 addresses away: they would come to the routes at any moment, when nobody else has them.
#[track_caller]
fn settle(sandbox: &Sandbox) {
    let script = "for i in eth0 eth1; do ip link set $i addrgenmode none; ip -6 addr flush dev $i scope link; done";
    sandbox.sh_in(&ctr(), script);
}

/// What of `now` was not in `before`; nothing may be gone.
#[track_caller]
fn added(before: &[String], now: &[String]) -> Vec<String> {
    let mut left = now.to_vec();
    for line in before {
        let position = left.iter().position(|other| other == line);
        left.remove(position.unwrap_or_else(|| panic!("{line} is gone: {now:#?}")));
    }
    left
}

/// A container on two paths, of which the second has no default route.
struct World<'a> {
    sandbox: &'a Sandbox,
    web: Bare<'a>,
    before: Vec<String>,
}

impl<'a> World<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        Self::wired(sandbox, &Wiring::new())
    }

    fn wired(sandbox: &'a Sandbox, wiring: &Wiring) -> Self {
        TwoPaths::with_container_netns(sandbox, &wiring.clone().without_second_route());
        settle(sandbox);
        let web = Bare::in_netns(sandbox, "web", &ctr());
        let before = routing(sandbox, &ctr());
        Self { sandbox, web, before }
    }

    #[track_caller]
    fn sh(&self, script: &str) -> String {
        self.sandbox.sh_in(&ctr(), script)
    }

    /// From now on this is what release shall leave.
    #[track_caller]
    fn remember(&mut self) {
        self.before = self.routing();
    }

    #[track_caller]
    fn routing(&self) -> Vec<String> {
        routing(self.sandbox, &ctr())
    }

    /// The rules and routes that came, without the endpoints.
    #[track_caller]
    fn ours(&self) -> Vec<String> {
        let mut added = added(&self.before, &self.routing());
        added.retain(|line| !line.contains(" id "));
        added
    }

    /// `mptcp-hook apply web ...` by hand.
    #[track_caller]
    fn by_hand(&self, arguments: &[&[&str]]) -> Outcome {
        self.sandbox.hook(&[&["apply", self.web.id()], &*arguments.concat()].concat())
    }

    #[track_caller]
    fn eth1(&self) -> Value {
        eth1(self.sandbox, self.web.id())
    }

    /// eth1's `state` and `route` in `status`.
    #[track_caller]
    fn assert_eth1(&self, state: &str, route: &str) {
        let entry = self.eth1();
        assert_eq!((&entry["state"], &entry["route"]), (&json!(state), &json!(route)), "{entry:#}");
    }

    /// Waits until the agent has brought rules and routes to these, and eth1 to `state`.
    #[track_caller]
    fn wait_ours(&self, expected: &[String], state: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let now = self.routing();
            let is_there = |line: &String| now.contains(line);
            let ours = now.iter().filter(|line| line.contains("109")).count();
            let entry = self.eth1();
            if expected.iter().all(is_there) && ours == expected.len() && entry["state"] == state {
                return;
            }
            assert!(Instant::now() < deadline, "not within {LIMIT:?}: {expected:#?}; but {now:#?}; {entry:#}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    fn assert_as_before(&self) {
        assert_eq!(self.routing(), self.before);
    }

    /// Lets the container go: rules and routes are as before, in the same order, and the ledger is empty.
    #[track_caller]
    fn release_restores(&self) {
        self.sandbox.hook(&["release", self.web.id()]).ok();
        self.assert_as_before();
        self.sandbox.assert_ledger_is_empty();
    }
}

/// The entry of eth1 in `status --json`.
#[track_caller]
fn eth1(sandbox: &Sandbox, id: &str) -> Value {
    let container = sandbox.status_of(id);
    let interfaces = container["interfaces"].as_array().expect("interfaces is a list");
    let found = interfaces.iter().find(|interface| interface["name"] == "eth1");
    found.unwrap_or_else(|| panic!("no eth1 in {container:#}")).clone()
}

// --- what it is for -------------------------------------------------------------------------------------------------

/// Two uplinks and one default route: the second path is dead without routes, and takes over with them.
#[test]
fn crun_second_uplink_without_default_route_carries_the_failover() {
    let sandbox = Sandbox::new();
    let wiring = Wiring::new().without_second_route();
    let paths = TwoPaths::with_container_netns(&sandbox, &wiring);
    let server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    settle(&sandbox);
    let before = routing(&sandbox, &ctr());
    let bundle = |what: &str, arguments: &[&str]| {
        Bundle::new(&sandbox, what)
            .in_netns("ctr")
            .hook(Stage::CreateRuntime, HookEntry::oci(arguments))
            .hook(Stage::Poststop, HookEntry::oci(&[]))
            .start(Runtime::Crun)
    };

    let without = bundle("without", &BACKUP);
    assert_eq!(eth1(&sandbox, without.id())["route"], "missing");
    without.send(paths.address(), 5_000_000, Some(10_000_000)).finish(TRANSFER_LIMIT);
    assert!(capture.joins().iter().all(|join| join.interface != "eth1"), "{:?}", capture.joins());
    without.delete();
    assert_eq!(routing(&sandbox, &ctr()), before);

    let with = bundle("with", &[GATEWAY, AUTO].concat());
    let entry = eth1(&sandbox, with.id());
    assert_eq!((&entry["state"], &entry["route"]), (&json!("applied"), &json!("ok")), "{entry:#}");
    let mut transfer = with.send(paths.address(), 8_000_000, Some(4_000_000));
    transfer.wait_sent(1_000_000);
    let join = capture.wait_join("eth1");
    assert_eq!((join.source, join.backup), (IpAddr::from([10, 0, 2, 2]), true));
    assert_eq!(capture.payload_received("eth1"), 0);
    let counted = paths.received("eth1");
    paths.cut("eth0");
    assert!(transfer.finish(TRANSFER_LIMIT).mptcp);
    let (seen, counted) = (capture.payload_received("eth1"), paths.received("eth1") - counted);
    assert!(seen > 2_000_000, "after the cut only {seen} bytes went over eth1");
    assert!(counted >= seen, "{counted} bytes counted by the interface, {seen} seen");
    assert!(server.received().iter().any(|line| line.starts_with("received 8000000 bytes mptcp=yes")));
    paths.mend("eth0");

    with.delete();
    assert_eq!(routing(&sandbox, &ctr()), before);
    sandbox.assert_ledger_is_empty();
}

/// A server whose interfaces drop what they would not answer by the same way: the subflow to the announced address
/// stands only with a way out by it.
#[test]
fn a_server_that_signals_under_strict_rp_filter_gets_its_second_subflow() {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new().without_second_route());
    // The client asks from an address that is on neither link, as clients do that are further away.
    sandbox.sh_in(
        paths.server(),
        "for n in 1 2; do
           ip route change 10.0.$n.0/24 dev eth$((n - 1)) proto kernel scope link src 10.0.0.1
         done",
    );
    sandbox.sh_in(&ctr(), "for i in all eth0 eth1; do echo 1 >/proc/sys/net/ipv4/conf/$i/rp_filter; done");
    settle(&sandbox);
    let before = routing(&sandbox, &ctr());
    let server = Server::start(&sandbox, &ctr());
    let web = Bare::in_netns(&sandbox, "server", &ctr());
    let signal = ["--interface", "eth0=signal", "--interface", "eth1=signal,gateway=10.0.2.1"];
    let transfer = || {
        let first = IpAddr::from([10, 0, 1, 2]);
        Sender::start(&sandbox, paths.server(), first, 3_000_000, Some(3_000_000)).finish(TRANSFER_LIMIT);
        server.received().pop().expect("a finished connection")
    };

    web.oci(&signal).ok();
    assert_eq!(eth1(&sandbox, web.id())["route"], "missing");
    assert_eq!(transfer(), "received 3000000 bytes mptcp=yes subflows=1");
    sandbox.hook(&["release", web.id()]).ok();

    web.oci(&[&signal[..], &AUTO].concat()).ok();
    assert_eq!(eth1(&sandbox, web.id())["route"], "ok");
    assert_eq!(transfer(), "received 3000000 bytes mptcp=yes subflows=2");
    assert_eq!(sandbox.sysctl(&ctr(), "net/ipv4/conf/all/rp_filter").as_deref(), Some("1"));
    sandbox.hook(&["release", web.id()]).ok();
    assert_eq!(routing(&sandbox, &ctr()), before);
    for interface in ["eth0", "eth1"] {
        let value = sandbox.sysctl(&ctr(), &format!("net/ipv4/conf/{interface}/rp_filter"));
        assert_eq!(value.as_deref(), Some("1"), "{interface}");
    }
    sandbox.assert_ledger_is_empty();
}

// --- what is made ---------------------------------------------------------------------------------------------------

#[test]
fn by_hand_twice_and_back() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let pid = world.web.pid().to_string();
    for target in [["--netns", "/run/netns/ctr"], ["--pid", &pid]] {
        let arguments = [&["apply"], &target[..], &["--name", "hand"], &GATEWAY, &AUTO].concat();
        sandbox.hook(&arguments).ok();
        assert_eq!(world.ours(), way_out(7800));
        let first = world.routing();
        let again = sandbox.hook(&arguments);
        assert!(again.stderr.contains("nothing had to be changed"), "{again}");
        again.ok();
        assert_eq!(world.routing(), first);
        assert_eq!(eth1(&sandbox, "hand")["route"], "ok");
        sandbox.hook(&["release", "hand"]).ok();
        world.assert_as_before();
        sandbox.assert_ledger_is_empty();
    }
}

#[test]
fn each_family_has_its_own_gateway() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().dual_stack());
    world.web.oci(&[GATEWAY, AUTO].concat()).ok();
    world.assert_eth1("pending", "missing");
    assert!(world.eth1()["reason"].as_str().is_some_and(|reason| reason.contains("IPv6 gateway")));
    assert_eq!(world.ours(), way_out(7800));

    world.by_hand(&[&["--interface", "eth1=backup,gateway=10.0.2.1,gateway=fd00:2::1"], &AUTO]).ok();
    world.assert_eth1("applied", "ok");
    let ours = world.ours();
    let of_ipv6 = [
        "32000: from fd00:2::2 lookup 7800 proto 109",
        "32001: from all oif eth1 lookup 7800 proto 109",
        "fd00:2::/64 dev eth1 table 7800 proto 109 metric 1024 pref medium",
        "default via fd00:2::1 dev eth1 table 7800 proto 109 metric 1024 pref medium",
    ];
    for line in way_out(7800).iter().map(String::as_str).chain(of_ipv6) {
        assert!(ours.iter().any(|other| other == line), "no {line} in {ours:#?}");
    }
    assert_eq!(ours.len(), 8, "{ours:#?}");
    world.release_restores();
}

/// The next hop of a default route that somebody else has by the interface, in a table that nothing leads to.
#[test]
fn the_gateway_of_an_existing_default_route_is_used() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip route add default via 10.0.2.1 dev eth1 table 42");
    world.remember();
    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    assert_eq!(world.ours(), way_out(7800));
    world.assert_eth1("applied", "ok");
    world.release_restores();
}

#[test]
fn without_a_gateway_it_is_pending_and_never_guessed() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let outcome = world.web.oci(&[BACKUP, AUTO].concat());
    for part in ["eth1", "no IPv4 gateway is known", "gateway=ADDRESS"] {
        assert!(outcome.stderr.contains(part), "`{part}` is not in {outcome}");
    }
    outcome.ok();
    assert_eq!(world.ours(), [""; 0]);
    world.assert_eth1("pending", "missing");
    assert!(world.eth1()["reason"].as_str().is_some_and(|reason| reason.contains("no IPv4 gateway is known for eth1")));
    world.release_restores();
}

/// Where packets leave by the right interface already, there is nothing to do.
#[test]
fn a_route_that_serves_needs_no_other() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip route add default via 10.0.2.1 dev eth1 metric 200");
    world.remember();
    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    assert_eq!(world.ours(), [""; 0]);
    world.assert_eth1("applied", "ok");
    world.release_restores();
}

#[test]
fn off_by_hand_takes_it_back() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&[GATEWAY, AUTO].concat()).ok();
    assert_eq!(world.ours(), way_out(7800));
    world.by_hand(&[&["--routes", "off"]]).ok();
    assert_eq!(world.ours(), [""; 0]);
    world.assert_eth1("applied", "missing");
    world.by_hand(&[&AUTO]).ok();
    assert_eq!(world.ours(), way_out(7800));
    world.by_hand(&[&["--interface", "eth1=off"]]).ok();
    world.assert_as_before();
    world.release_restores();
}

/// Tables are taken that neither a route nor a rule of anybody knows.
#[test]
fn numbers_of_others_are_neither_taken_nor_touched() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip route add 192.0.2.0/24 via 10.0.1.1 table 7800
         ip rule add from 198.51.100.1 lookup 7801 priority 32000
         ip -6 rule add from 2001:db8::1 lookup 7802 priority 32001
         ip rule add from 10.0.2.77 lookup 7800 priority 31999");
    world.remember();
    world.web.oci(&[GATEWAY, AUTO].concat()).ok();
    let mut ours = world.ours();
    ours.sort();
    let mut expected = way_out(7803);
    expected.sort();
    assert_eq!(ours, expected);
    world.assert_eth1("applied", "ok");
    world.release_restores();
}

#[test]
fn another_gateway_replaces_the_first() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&[GATEWAY, AUTO].concat()).ok();
    world.by_hand(&[&["--interface", "eth1=backup,gateway=10.0.2.7"]]).ok();
    let mut expected = way_out(7800);
    expected[2] = "default via 10.0.2.7 dev eth1 table 7800 proto 109".into();
    assert_eq!(world.ours(), expected);
    world.release_restores();
}

/// What somebody deleted is not missed by release, and comes again with the next apply.
#[test]
fn what_somebody_deleted_hinders_nothing() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let arguments = [&GATEWAY[..], &AUTO, &["--follow", "never"]].concat();
    world.web.oci(&arguments).ok();
    world.sh("ip rule del priority 32000; ip route flush table 7800");
    assert_eq!(world.eth1()["route"], "missing");
    world.web.oci(&arguments).ok();
    let mut ours = world.ours();
    ours.sort();
    let mut expected = way_out(7800);
    expected.sort();
    assert_eq!(ours, expected);
    world.sh("ip rule del priority 32000; ip route flush table 7800");
    world.release_restores();
}

/// Each interface has a table of its own.
#[test]
fn two_interfaces_have_two_tables() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip route del default");
    world.remember();
    world.web.oci(&[&["--interface", "eth0=subflow,gateway=10.0.1.1"], &GATEWAY[..], &AUTO].concat()).ok();
    let mut ours = world.ours();
    ours.sort();
    let of_eth0 = way_out(7800).into_iter().map(|line| line.replace("10.0.2.", "10.0.1.").replace("eth1", "eth0"));
    let mut expected: Vec<String> = of_eth0.chain(way_out(7801)).collect();
    expected.sort();
    assert_eq!(ours, expected);
    world.assert_eth1("applied", "ok");
    world.release_restores();
}

// --- who may ask ----------------------------------------------------------------------------------------------------

#[test]
fn an_annotation_needs_the_policys_word() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let asking = Bare::in_netns(&sandbox, "author", &ctr())
        .annotation("mptcp-hook/interface.eth1", "backup,gateway=10.0.2.1")
        .annotation("mptcp-hook/routes", "auto");
    let refused = asking.oci(&[]);
    assert_eq!(refused.code, Some(3), "{refused}");
    assert!(refused.stderr.contains("routes = true"), "{refused}");
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();
    let conflicts = sandbox.conflicts();
    let conflict = conflicts.iter().find(|conflict| conflict["key"] == "routes");
    let conflict = conflict.unwrap_or_else(|| panic!("no conflict about routes in {conflicts:#?}"));
    assert_eq!((&conflict["outcome"], &conflict["wanted"]), (&json!("refused"), &json!("auto")));

    sandbox.policy("[annotations]\nroutes = true\n");
    asking.oci(&[]).ok();
    assert_eq!(world.ours(), way_out(7800));
    sandbox.hook(&["release", asking.id()]).ok();
    world.assert_as_before();

    sandbox.policy("[defaults]\nroutes = \"auto\"\n");
    world.web.oci(&GATEWAY).ok();
    assert_eq!(world.ours(), way_out(7800));
    world.release_restores();
}

// --- what fails -----------------------------------------------------------------------------------------------------

#[test]
fn a_failure_undoes_rules_and_routes() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    // The kernel shows this list otherwise than it was written, which the read-back at the very end takes for a failure.
    let late =
        world.web.oci(&[&GATEWAY[..], &AUTO, &["--sysctl", "net.ipv4.ip_local_reserved_ports=9000,9001"]].concat());
    assert_eq!(late.code, Some(1), "{late}");
    world.assert_as_before();
    // The table's first route can be added, the way to everywhere cannot: that next hop is on no link.
    let early = world.web.oci(&[&["--interface", "eth1=backup,gateway=203.0.113.1"], &AUTO[..]].concat());
    assert_eq!(early.code, Some(1), "{early}");
    assert!(early.stderr.contains("203.0.113.1"), "{early}");
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();
}

#[test]
fn an_endpoint_of_somebody_else_that_cannot_be_used_leaves_no_routes() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip mptcp endpoint add 10.0.2.2 id 7 dev eth1 signal");
    world.remember();
    let outcome = world.web.oci(&[GATEWAY, AUTO].concat());
    assert!(outcome.code != Some(0) && outcome.stderr.contains("10.0.2.2"), "{outcome}");
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();
}

// --- two containers -------------------------------------------------------------------------------------------------

#[test]
fn the_first_of_two_containers_to_leave_takes_nothing_away() {
    for first_leaves_first in [true, false] {
        let sandbox = Sandbox::new();
        let world = World::new(&sandbox);
        let other = Bare::in_netns(&sandbox, "other", &ctr());
        world.web.oci(&[GATEWAY, AUTO].concat()).ok();
        other.oci(&[GATEWAY, AUTO].concat()).ok();
        assert_eq!(world.ours(), way_out(7800));
        let (first, last) =
            if first_leaves_first { (world.web.id(), other.id()) } else { (other.id(), world.web.id()) };
        sandbox.hook(&["release", first]).ok();
        assert_eq!(world.ours(), way_out(7800));
        assert_eq!(eth1(&sandbox, last)["route"], "ok");
        sandbox.hook(&["release", last]).ok();
        world.assert_as_before();
        sandbox.assert_ledger_is_empty();
    }
}

// --- the agent ------------------------------------------------------------------------------------------------------

/// The kernel deletes an interface's routes with its link; rules it leaves.
#[test]
fn the_agent_makes_the_way_out_again_after_the_link_was_down() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&[&GATEWAY[..], &AUTO, &["--follow", "always"]].concat()).ok();
    for _ in 0..3 {
        world.sh("ip link set eth1 down");
        assert!(!world.routing().contains(&way_out(7800)[2]));
        world.sh("ip link set eth1 up");
        world.wait_ours(&way_out(7800), "applied");
        assert_eq!(world.eth1()["route"], "ok");
    }
    world.release_restores();
}

/// As with a DHCP client that gets another address: the first one runs out.
#[test]
fn the_agent_follows_an_address_that_is_replaced() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&[&GATEWAY[..], &AUTO, &["--follow", "always"]].concat()).ok();
    assert_eq!(world.ours(), way_out(7800));
    world.sh("echo 1 >/proc/sys/net/ipv4/conf/eth1/promote_secondaries
         ip addr add 10.0.2.9/24 dev eth1
         ip addr change 10.0.2.2/24 dev eth1 valid_lft 1 preferred_lft 1");
    let mut expected = way_out(7800);
    expected[0] = "32000: from 10.0.2.9 lookup 7800 proto 109".into();
    world.wait_ours(&expected, "applied");
    assert_eq!(world.eth1()["route"], "ok");
    sandbox.hook(&["release", world.web.id()]).ok();
    world.sh("ip addr add 10.0.2.2/24 dev eth1; ip addr del 10.0.2.9/24 dev eth1");
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();
}

/// A default route by eth1 that is not preferred says where the next hop is, and it is enough itself.
#[test]
fn a_gateway_that_comes_later_ends_the_waiting() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    world.assert_eth1("pending", "missing");
    // In a table that nothing leads to, it is of use by its next hop alone.
    world.sh("ip route add default via 10.0.2.1 dev eth1 table 42");
    world.wait_ours(&way_out(7800), "applied");
    assert_eq!(world.eth1()["route"], "ok");
    sandbox.hook(&["release", world.web.id()]).ok();
    world.sh("ip route del default via 10.0.2.1 dev eth1 table 42");
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();

    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    world.assert_eth1("pending", "missing");
    world.sh("ip route add default via 10.0.2.1 dev eth1 metric 200");
    wait_until("eth1 to be applied", LIMIT, || world.eth1()["state"] == "applied");
    assert_eq!(world.eth1()["route"], "ok");
    sandbox.hook(&["release", world.web.id()]).ok();
    world.sh("ip route del default via 10.0.2.1 dev eth1 metric 200");
    world.assert_as_before();
}
