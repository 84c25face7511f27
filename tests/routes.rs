//! `routes=auto`: interfaces get ways out of their own, by rules and tables that are the hook's; what exactly is made,
//! what works by it, and that nothing of it stays behind.

mod common;

use std::cell::Cell;
use std::net::IpAddr;

use common::*;
use serde_json::{Value, json};

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

/// All rules and routes of a namespace, one in each line, without what differs from call to call.
#[track_caller]
fn routing(sandbox: &Sandbox, netns: &Netns) -> Vec<String> {
    let show = |family: &str, commands: &str| {
        let text = sandbox.run_in_with_input(netns, &["ip", family, "-batch", "-"], commands.as_bytes()).ok();
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    let mut all = show("-4", "rule show\nroute show table all\n");
    all.extend(show("-6", "rule show\nroute show table all\nmptcp endpoint show\n"));
    // The rules first; those of a family keep their order.
    let is_rule = |line: &String| line.split_once(':').is_some_and(|(number, _)| number.parse::<u32>().is_ok());
    let (rules, others): (Vec<String>, Vec<String>) = all.into_iter().partition(is_rule);
    [rules, others].concat()
}

/// Takes the kernel's own IPv6 addresses away: they would come to the routes at any moment, when nobody else has them.
#[track_caller]
fn settle(sandbox: &Sandbox) {
    let commands =
        ["eth0", "eth1"].map(|name| format!("link set {name} addrgenmode none\naddr flush dev {name} scope link\n"));
    sandbox.run_in_with_input(&ctr(), &["ip", "-6", "-batch", "-"], commands.concat().as_bytes()).ok();
    sandbox.settle(&ctr());
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
        let common::World { web, .. } = common::World::wired(sandbox, &wiring.clone().without_second_route());
        settle(sandbox);
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
        self.sandbox.settle(&ctr());
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

    /// Waits until the agent has brought rules and routes to these, and eth1 to `state`, with a route if that is "applied".
    /// A slow machine is left in peace.
    #[track_caller]
    fn wait_ours(&self, expected: &[String], state: &str) {
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        wait_for_or("rules and routes of the hook", LIMIT, || {
            let mut now = self.routing();
            now.retain(|line| line.contains("proto 109"));
            now.sort_unstable();
            let entry = self.eth1();
            // While the agent is at work the record has what it is about to do, and no word of the route.
            let is_done = match state {
                "applied" => entry["route"] == "ok",
                "pending" => true,
                _ => entry["route"] != "unknown",
            };
            if now == expected && entry["state"] == state && is_done {
                return Ok(());
            }
            Err(format!("{now:#?} instead of {expected:#?}; {entry:#}"))
        });
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
    without.send(paths.address(), 5_000_000, Some(10_000_000)).finish(LIMIT);
    assert!(capture.joins().iter().all(|join| join.interface != "eth1"), "{:?}", capture.joins());
    without.delete();
    assert_eq!(routing(&sandbox, &ctr()), before);

    let with = bundle("with", &[GATEWAY, AUTO].concat());
    let entry = eth1(&sandbox, with.id());
    assert_eq!((&entry["state"], &entry["route"]), (&json!("applied"), &json!("ok")), "{entry:#}");
    let at_start = Cell::new((0, 0));
    let send = |bytes, rate| {
        at_start.set((capture.payload_received("eth1"), paths.received("eth1")));
        with.send(paths.address(), bytes, Some(rate))
    };
    let looks = || assert_eq!(capture.payload_received("eth1"), at_start.get().0);
    let seen = assert_fails_over(&paths, &capture, ["eth0", "eth1"], send, looks);
    let join = capture.wait_join("eth1");
    assert_eq!((join.source, join.backup), (IpAddr::from([10, 0, 2, 2]), true));
    let counted = paths.received("eth1") - at_start.get().1;
    assert!(counted >= seen, "{counted} bytes counted by the interface, {seen} seen");
    assert!(server.received().iter().any(|line| line.starts_with("received 8000000 bytes mptcp=yes")));
    paths.mend("eth0");
    sandbox.settle(&ctr());

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
    paths.knows_neighbour("eth1", &ctr(), "eth1", [10, 0, 2, 2].into());
    sandbox.sh_in(&ctr(), "for i in all eth0 eth1; do echo 1 >/proc/sys/net/ipv4/conf/$i/rp_filter; done");
    settle(&sandbox);
    sandbox.patient_policy("");
    let before = routing(&sandbox, &ctr());
    let server = Server::start(&sandbox, &ctr());
    let web = Bare::in_netns(&sandbox, "server", &ctr());
    let signal = ["--interface", "eth0=signal", "--interface", "eth1=signal,gateway=10.0.2.1"];
    let send = |bytes, rate| {
        let first = IpAddr::from([10, 0, 1, 2]);
        Sender::start(&sandbox, paths.server(), first, bytes, Some(rate))
    };

    web.oci(&signal).ok();
    assert_eq!(eth1(&sandbox, web.id())["route"], "missing");
    send(3_000_000, 3_000_000).finish(LIMIT);
    assert_eq!(server.wait_received(1), ["received 3000000 bytes mptcp=yes subflows=1"]);
    sandbox.hook(&["release", web.id()]).ok();

    web.oci(&[&signal[..], &AUTO].concat()).ok();
    assert_eq!(eth1(&sandbox, web.id())["route"], "ok");
    // Its first SYN may get lost, so that the transfer goes on until it is there.
    let transfer = send(1 << 30, 20_000);
    let established = "ss -tanH state established src 10.0.2.2";
    wait_until("the second subflow", LIMIT, || !sandbox.sh_in(&ctr(), established).is_empty());
    drop(transfer);
    assert_eq!(sandbox.sysctl(&ctr(), "net/ipv4/conf/all/rp_filter").as_deref(), Some("1"));
    sandbox.hook(&["release", web.id()]).ok();
    assert_eq!(routing(&sandbox, &ctr()), before);
    for interface in ["eth0", "eth1"] {
        let value = sandbox.sysctl(&ctr(), &format!("net/ipv4/conf/{interface}/rp_filter"));
        assert_eq!(value.as_deref(), Some("1"), "{interface}");
    }
    sandbox.assert_ledger_is_empty();
}

/// A strict rp_filter asks for the way from the packet's destination to its source: the rule by source address answers
/// that, wherever the peer is, so that the filter stays as it is.
#[test]
fn a_strict_rp_filter_needs_no_relaxing() {
    for (which, second_default) in [("all eth0 eth1", false), ("all", false), ("eth1", true)] {
        let sandbox = Sandbox::new();
        let strict = Strict::new(&sandbox, which, second_default);
        strict.web.oci(&[GATEWAY, AUTO].concat()).ok();
        let filters = strict.filters();
        strict.joins();
        // Nothing was dropped by the filter, and nobody touched it.
        assert_eq!((strict.dropped(), strict.filters()), (0, filters), "{which}");
        sandbox.hook(&["release", strict.web.id()]).ok();
        sandbox.assert_ledger_is_empty();
    }
}

/// Unless somebody else's rule comes before ours: what is bound to the interface leaves by it all the same, and the
/// answers are dropped. Then the filter becomes loose, on this interface alone, and is restored.
#[test]
fn rp_filter_is_relaxed_where_somebodys_rule_comes_first() {
    let theirs = "ip route add default via 10.0.1.1 dev eth0 table 55; ip rule add lookup 55 priority 100";
    for (before, after) in [(["1", "0", "0"], ["1", "0", "2"]), (["0", "1", "1"], ["0", "1", "2"])] {
        let sandbox = Sandbox::new();
        let strict = Strict::new(&sandbox, "", false);
        for (name, value) in ["all", "eth0", "eth1"].iter().zip(before) {
            strict.sh(&format!("echo {value} >/proc/sys/net/ipv4/conf/{name}/rp_filter"));
        }
        strict.sh(theirs);
        let before_all = routing(&sandbox, &ctr());
        // As it would be without: the same rules, and the filter as it was.
        strict.web.oci(&[GATEWAY, AUTO].concat()).ok();
        assert_eq!(strict.filters(), after);
        let entry = eth1(&sandbox, strict.web.id());
        assert_eq!((&entry["state"], &entry["route"]), (&json!("applied"), &json!("ok")), "{entry:#}");
        let settings = sandbox.status_of(strict.web.id())["settings"].clone();
        assert_eq!(settings[0]["key"], "net.ipv4.conf.eth1.rp_filter", "{settings:#}");
        let again = strict.web.oci(&[GATEWAY, AUTO].concat());
        assert!(again.stderr.contains("nothing had to be changed"), "{again}");
        strict.joins();
        assert_eq!(strict.dropped(), 0);

        // It is this that does it.
        strict.sh(&format!("echo {} >/proc/sys/net/ipv4/conf/eth1/rp_filter", before[2]));
        strict.hangs();
        let doctor = sandbox.hook(&["doctor", strict.web.id(), "--json"]);
        let doctor: Value = serde_json::from_str(&doctor.stdout).expect("JSON");
        let finding = doctor["findings"].as_array().expect("a list").iter().find(|f| f["id"] == "rp-filter-strict");
        let command =
            finding.unwrap_or_else(|| panic!("{doctor:#}"))["command"].as_str().expect("a command").to_owned();
        assert_eq!(command, format!("mptcp-hook apply {} --routes auto", strict.web.id()));
        sandbox.hook(&["apply", strict.web.id(), "--routes", "auto"]).ok();
        assert_eq!(strict.filters(), after);

        // Without their rule there is no need any more, and the filter is as before.
        strict.sh("ip rule del lookup 55 priority 100");
        sandbox.hook(&["apply", strict.web.id(), "--routes", "auto"]).ok();
        assert_eq!(strict.filters(), before);
        strict.joins();
        strict.sh("ip rule add lookup 55 priority 100");
        sandbox.hook(&["apply", strict.web.id(), "--routes", "auto"]).ok();
        assert_eq!(strict.filters(), after);
        sandbox.hook(&["release", strict.web.id()]).ok();
        assert_eq!((strict.filters(), routing(&sandbox, &ctr())), (before.map(String::from), before_all));
        sandbox.assert_ledger_is_empty();
    }
}

/// The agent writes no setting: of an interface that comes after the hook it says what `apply` makes of it.
#[test]
fn the_agent_says_where_a_strict_rp_filter_stands_against_a_late_way_out() {
    let sandbox = Sandbox::new();
    let strict = Strict::new(&sandbox, "eth0 eth1", false);
    strict.sh("ip route add default via 10.0.1.1 dev eth0 table 55; ip rule add lookup 55 priority 100");
    strict.sh("ip link set eth1 down; ip link set eth1 name late");
    strict.web.oci(&[GATEWAY, AUTO].concat()).ok();
    strict.sh("ip link set late name eth1; ip link set eth1 up");
    let command = format!("mptcp-hook apply {} --routes auto", strict.web.id());
    let warnings = || sandbox.status_of(strict.web.id())["warnings"].to_string();
    wait_until("a warning of the filter", LIMIT, || warnings().contains("rp_filter") && warnings().contains(&command));
    wait_until("a way out", LIMIT, || {
        let entry = eth1(&sandbox, strict.web.id());
        entry["state"] == "applied" && entry["route"] == "ok"
    });
    assert!(sandbox.hook(&["status"]).ok().contains(&command));
    assert_eq!(strict.filters(), ["0", "1", "1"]);
    strict.hangs();

    // It does what it says, and the agent has nothing to say then.
    sandbox.hook(&command.split(' ').skip(1).collect::<Vec<_>>()).ok();
    assert_eq!(strict.filters(), ["0", "1", "2"]);
    strict.joins();
    strict.sh("ip address add 10.0.2.77/24 dev eth1");
    wait_until("another endpoint", LIMIT, || sandbox.endpoints_on(&ctr(), "eth1").len() == 2);
    wait_until("its record", LIMIT, || {
        let entry = eth1(&sandbox, strict.web.id());
        entry["endpoints"].as_array().map(Vec::len) == Some(2)
    });
    assert!(!warnings().contains("rp_filter"), "{}", warnings());
    sandbox.hook(&["release", strict.web.id()]).ok();
    assert_eq!(strict.filters(), ["0", "1", "1"]);
    sandbox.assert_ledger_is_empty();
}

/// Whoever asks for a value by name gets that, and the doctor says what comes of it.
#[test]
fn rp_filter_asked_for_by_name_stays() {
    let sandbox = Sandbox::new();
    let strict = Strict::new(&sandbox, "all eth1", false);
    strict.sh("ip route add default via 10.0.1.1 dev eth0 table 55; ip rule add lookup 55 priority 100");
    strict.web.oci(&[&GATEWAY[..], &AUTO, &["--sysctl", "net/ipv4/conf/eth1/rp_filter=1"]].concat()).ok();
    assert_eq!(strict.filters(), ["1", "0", "1"]);
    let doctor = sandbox.hook(&["doctor", strict.web.id()]);
    assert!(doctor.stdout.contains("rp-filter-strict"), "{doctor}");
    sandbox.hook(&["release", strict.web.id()]).ok();
    assert_eq!(strict.filters(), ["1", "0", "1"]);
    sandbox.assert_ledger_is_empty();
}

/// Two paths with filters that are strict in the container, and a server.
struct Strict<'a> {
    sandbox: &'a Sandbox,
    paths: TwoPaths<'a>,
    web: Bare<'a>,
    _server: Server,
}

impl<'a> Strict<'a> {
    fn new(sandbox: &'a Sandbox, which: &str, second_default: bool) -> Self {
        let wiring = if second_default { Wiring::new() } else { Wiring::new().without_second_route() };
        let common::World { paths, web, .. } = common::World::wired(sandbox, &wiring);
        let none = "for i in all eth0 eth1; do echo 0 >/proc/sys/net/ipv4/conf/$i/rp_filter; done";
        sandbox.sh_in(&ctr(), none);
        sandbox.sh_in(&ctr(), &format!("for i in {which}; do echo 1 >/proc/sys/net/ipv4/conf/$i/rp_filter; done"));
        settle(sandbox);
        let _server = Server::start(sandbox, paths.server());
        Self { sandbox, web, paths, _server }
    }

    #[track_caller]
    fn sh(&self, script: &str) -> String {
        self.sandbox.sh_in(&ctr(), script)
    }

    /// Of all, eth0 and eth1.
    #[track_caller]
    fn filters(&self) -> [String; 3] {
        ["all", "eth0", "eth1"].map(|name| {
            let key = format!("net/ipv4/conf/{name}/rp_filter");
            self.sandbox.sysctl(&ctr(), &key).expect("rp_filter")
        })
    }

    /// How many packets the filter has dropped in the container.
    #[track_caller]
    fn dropped(&self) -> u64 {
        let text = self.sandbox.inside(&ctr(), || std::fs::read_to_string("/proc/thread-self/net/netstat"));
        let text = text.expect("the counters");
        let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:")).map(|line| line.split_whitespace());
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let counter = names.zip(values).find(|(name, _)| *name == "IPReversePathFilter");
        counter.and_then(|(_, value)| value.parse().ok()).unwrap_or_else(|| panic!("no counter in {text:?}"))
    }

    /// A connection from the container, and whether its second subflow came up when that is decided.
    #[track_caller]
    fn subflow(&self, is_decided: impl Fn(&str) -> bool) {
        let sender = Sender::start(self.sandbox, &ctr(), self.paths.address(), 1 << 30, Some(20_000));
        let sockets = || self.sandbox.run_in(&ctr(), &["ss", "-tanH", "src", "10.0.2.2"]).ok();
        wait_until("the second subflow's state", LIMIT, || sockets().lines().any(&is_decided));
        drop(sender);
        // The connection's sockets are the next one's trouble.
        wait_until("the end of the sockets", LIMIT, || {
            let left = self.sh("ss -tanH state established state syn-sent");
            if !left.is_empty() {
                self.sh("ss -K state established state syn-sent >/dev/null");
            }
            left.is_empty()
        });
    }

    #[track_caller]
    fn joins(&self) {
        self.subflow(|socket| socket.starts_with("ESTAB"));
    }

    /// Its SYN is repeated, and the filter drops the answers.
    #[track_caller]
    fn hangs(&self) {
        let before = self.dropped();
        self.subflow(|socket| socket.starts_with("SYN-SENT") && self.dropped() > before + 1);
    }
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

/// The next hop of a default route that somebody else has by the interface: in a table that nothing leads to, or as a
/// second choice, which serves the sockets that are bound to the interface and not the answers of those that listen.
#[test]
fn the_gateway_of_an_existing_default_route_is_used() {
    for place in ["table 42", "metric 200"] {
        let sandbox = Sandbox::new();
        let mut world = World::new(&sandbox);
        world.sh(&format!("ip route add default via 10.0.2.1 dev eth1 {place}"));
        world.remember();
        world.web.oci(&[BACKUP, AUTO].concat()).ok();
        assert_eq!(world.ours(), way_out(7800), "{place}");
        world.assert_eth1("applied", "ok");
        world.release_restores();
    }
}

/// A tunnel's far end is no machine on a link: the default route by it has no next hop, and a way out by it needs none.
#[test]
fn a_default_route_without_a_gateway_is_used() {
    let sandbox = Sandbox::new();
    let mut world = World::wired(&sandbox, &Wiring::new().dual_stack());
    world.sh("ip link add tun0 type veth peer name far0
         ip link set far0 addrgenmode none
         ip link set tun0 addrgenmode none
         ip link set far0 up
         ip address add 10.9.0.2/32 dev tun0
         ip -6 address add fd00:9::2/128 dev tun0 nodad
         ip link set tun0 up
         ip route add default dev tun0 metric 900
         ip -6 route add default dev tun0 table 42");
    world.remember();
    world.web.oci(&[&["--interface", "tun0=signal", "--follow", "never"], &AUTO[..]].concat()).ok();
    let ours = world.ours();
    for line in [
        "32000: from 10.9.0.2 lookup 7800 proto 109",
        "default dev tun0 table 7800 proto 109 scope link",
        "32000: from fd00:9::2 lookup 7800 proto 109",
        "default dev tun0 table 7800 proto 109 metric 1024 pref medium",
    ] {
        assert!(ours.iter().any(|other| other == line), "no {line} in {ours:#?}");
    }
    assert!(world.sh("ip route get 198.51.100.1 from 10.9.0.2").contains("dev tun0"));
    let again = world.web.oci(&[&["--interface", "tun0=signal", "--follow", "never"], &AUTO[..]].concat());
    assert!(again.stderr.contains("nothing had to be changed"), "{again}");
    world.release_restores();
}

/// What the kernel has learnt of the way to one peer is shown as a route of our table, and is none of ours.
#[test]
fn a_path_mtu_learnt_by_a_way_out_of_ours_hinders_nothing() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().dual_stack());
    let gateways = ["--interface", "eth1=backup,gateway=10.0.2.1,gateway=fd00:2::1"];
    world.web.oci(&[&gateways, &AUTO[..]].concat()).ok();
    // Behind the gateway the path is narrower.
    sandbox.sh_in(
        &Netns::named("srv"),
        "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
         ip link add narrow0 mtu 1300 type veth peer name far0
         ip link set narrow0 up
         ip link set far0 up
         ip -6 route add fd00:99::/64 dev narrow0",
    );
    let learn =
        "busybox ping6 -c 1 -W 1 -s 1400 -I fd00:2::2 fd00:99::2 >&2 || true; ip -6 route show cache table 7800";
    wait_for("the path MTU", LIMIT, || Some(world.sh(learn)).filter(|learnt| learnt.contains("mtu 1300")));

    let again = world.by_hand(&[&gateways, &AUTO]);
    assert!(again.stderr.contains("nothing had to be changed"), "{again}");
    world.assert_eth1("applied", "ok");
    sandbox.hook(&["release", world.web.id()]).ok();
    assert!(!world.sh("ip -6 rule; ip -6 route show table all").contains("proto 109"));
    sandbox.assert_ledger_is_empty();
}

/// A provider's router that is on no network of the interface's addresses.
#[test]
fn a_gateway_that_is_on_the_link_by_somebodys_word_is_used() {
    let sandbox = Sandbox::new();
    let mut world = World::wired(&sandbox, &Wiring::new().dual_stack());
    world.sh("ip route add default via 203.0.113.9 dev eth1 onlink table 42
         ip -6 route add default via 2001:db8::9 dev eth1 onlink table 42");
    world.remember();
    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    world.assert_eth1("applied", "ok");
    let ours = world.ours();
    for line in [
        "default via 203.0.113.9 dev eth1 table 7800 proto 109 onlink",
        "default via 2001:db8::9 dev eth1 table 7800 proto 109 metric 1024 onlink pref medium",
    ] {
        assert!(ours.iter().any(|other| other == line), "no {line} in {ours:#?}");
    }
    let again = world.web.oci(&[BACKUP, AUTO].concat());
    assert!(again.stderr.contains("nothing had to be changed"), "{again}");
    world.release_restores();
}

/// What CNI's plugins have answered comes last, and only from files that nobody but root can have written.
#[test]
fn the_gateway_of_cnis_cached_result_comes_last() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    let result = |container: &str, gateway: &str| {
        let ips = json!([{ "address": "10.0.2.2/24", "gateway": gateway }]);
        let result = json!({ "cniVersion": "1.0.0", "ips": ips });
        json!({ "kind": "cniCacheV1", "containerId": container, "ifName": "eth1", "networkName": "lte", "result": result }).to_string()
    };
    let file = format!("/var/lib/cni/results/lte-{}-eth1", world.web.id());
    sandbox.sh(&format!(
        "mount -t tmpfs -o mode=755 none /var/lib; mkdir -p /var/lib/cni/results
         echo '{}' >/var/lib/cni/results/lte-other-{id}-eth1; echo '{}' >{file}; chmod 666 {file}",
        result(&format!("other-{}", world.web.id()), "10.0.2.66"),
        result(world.web.id(), "10.0.2.1"),
        id = world.web.id(),
    ));
    // Anybody could have written it.
    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    world.assert_eth1("pending", "missing");
    world.release_restores();

    sandbox.sh(&format!("chmod 600 {file}"));
    let planned = sandbox
        .hook(&[
            "apply",
            "--netns",
            "/run/netns/ctr",
            "--name",
            world.web.id(),
            BACKUP[0],
            BACKUP[1],
            AUTO[0],
            AUTO[1],
            "--dry-run",
        ])
        .ok();
    for part in [file.as_str(), "IPv4 gateway of eth1 = 10.0.2.1", "default via 10.0.2.1 dev eth1 table 7800"] {
        assert!(planned.contains(part), "no {part} in {planned}");
    }
    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    assert_eq!(world.ours(), way_out(7800));
    world.release_restores();

    // A default route by the interface is the newer word, and what is asked for counts before both.
    world.sh("ip route add default via 10.0.2.9 dev eth1 table 42");
    world.remember();
    let via = |gateway: &str| format!("default via {gateway} dev eth1 table 7800 proto 109");
    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    assert!(world.ours().contains(&via("10.0.2.9")), "{:#?}", world.ours());
    world.release_restores();
    world.web.oci(&[&["--interface", "eth1=backup,gateway=10.0.2.7"], &AUTO[..]].concat()).ok();
    assert!(world.ours().contains(&via("10.0.2.7")), "{:#?}", world.ours());
    world.release_restores();
}

/// What LXC's configuration names, where that is root's.
#[test]
fn the_gateway_of_lxcs_configuration_is_used() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    sandbox.sh("mkdir -p /run/lxc/web");
    let config =
        "lxc.net.0.name = eth0\nlxc.net.1.type = veth\nlxc.net.1.name = eth1\nlxc.net.1.ipv4.gateway = 10.0.2.1\n";
    sandbox.write("/run/lxc/web/config", config);
    world.remember();
    let call = || {
        let variables = [
            "LXC_NAME=web".to_owned(),
            format!("LXC_PID={}", world.web.pid()),
            "LXC_CONFIG_FILE=/run/lxc/web/config".into(),
            "LXC_HOOK_VERSION=1".into(),
            "LXC_HOOK_TYPE=start-host".into(),
        ];
        let program = hook().display().to_string();
        let words = [&program, "lxc", BACKUP[0], BACKUP[1], AUTO[0], AUTO[1]];
        let variables = variables.iter().map(String::as_str);
        sandbox.run(&["env"].into_iter().chain(variables).chain(words).collect::<Vec<_>>())
    };
    call().ok();
    assert_eq!(world.ours(), way_out(7800));
    assert_eq!(eth1(&sandbox, "web")["state"], "applied");
    sandbox.hook(&["release", "web"]).ok();
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();
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

/// The routes of two uplinks that share the traffic, as podman makes them.
#[test]
fn gateways_of_routes_that_share_the_traffic_are_used() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip route replace default metric 100 nexthop via 10.0.1.1 dev eth0 nexthop via 10.0.2.1 dev eth1");
    world.remember();
    world.web.oci(&["--interface", "eth0=subflow", "--interface", "eth1=backup", "--routes", "auto"]).ok();
    let ours = world.ours();
    assert!(way_out(7801).iter().all(|line| ours.contains(line)), "{ours:#?}");
    assert!(ours.contains(&"32000: from 10.0.1.2 lookup 7800 proto 109".to_owned()), "{ours:#?}");
    world.release_restores();
}

/// Where packets leave by the right interface already, there is nothing to do.
#[test]
fn a_route_that_serves_needs_no_other() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip route add default via 10.0.2.1 dev eth1 table 42; ip rule add from 10.0.2.2 table 42");
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
         ip rule add from 10.0.2.77 lookup 7800 priority 31999
         ip rule add fwmark 7 lookup 7803 priority 31998
         ip rule add iif eth0 lookup 7804 priority 31997
         ip route add blackhole 198.51.100.0/24 table 7805
         ip -6 route add unreachable 2001:db8::/64 table 7806");
    world.remember();
    world.web.oci(&[GATEWAY, AUTO].concat()).ok();
    let mut ours = world.ours();
    ours.sort();
    let mut expected = way_out(7807);
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

    sandbox.patient_policy("[annotations]\nroutes = true\n");
    asking.oci(&[]).ok();
    assert_eq!(world.ours(), way_out(7800));
    sandbox.hook(&["release", asking.id()]).ok();
    world.assert_as_before();

    // Nor does the administrator's word for ways out let the author say where they lead.
    let stray =
        Bare::in_netns(&sandbox, "stray", &ctr()).annotation("mptcp-hook/interface.eth1", "backup,gateway=10.0.2.66");
    for (policy, arguments) in [("[defaults]\nroutes = \"auto\"\n", &[][..]), ("", &AUTO)] {
        sandbox.patient_policy(policy);
        let refused = stray.oci(arguments);
        assert_eq!(refused.code, Some(3), "{refused}");
        assert!(refused.stderr.contains("names the gateway 10.0.2.66 for eth1"), "{refused}");
        assert!(refused.stderr.contains("routes = true"), "{refused}");
        world.assert_as_before();
        sandbox.assert_ledger_is_empty();
        let conflicts = sandbox.conflicts();
        assert!(conflicts.iter().any(|conflict| conflict["key"] == "gateway.eth1"), "{conflicts:#?}");
        // Beside it stands whoever may name one; and a warning starts it without.
        world.web.oci(&[GATEWAY, AUTO].concat()).ok();
        let warned = stray.oci(&[arguments, &["--on-conflict", "warn"]].concat());
        warned.ok();
        assert_eq!(world.ours(), way_out(7800));
        let named = sandbox.hook(&[&["apply", stray.id()], &GATEWAY[..], &AUTO].concat());
        named.ok();
        assert_eq!(world.ours(), way_out(7800));
        sandbox.hook(&["release", stray.id()]).ok();
        world.release_restores();
        sandbox.assert_ledger_is_empty();
    }

    sandbox.patient_policy("[defaults]\nroutes = \"auto\"\n");
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

/// The kernel deletes an interface's routes with its link; rules it leaves. Nothing but that can happen to this container,
/// and it is followed all the same.
#[test]
fn the_agent_makes_the_way_out_again_after_the_link_was_down() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&[GATEWAY, AUTO].concat()).ok();
    for _ in 0..3 {
        world.sh("ip link set eth1 down");
        assert!(!world.routing().contains(&way_out(7800)[2]));
        world.wait_ours(&way_out(7800)[..2], "pending");
        world.sh("ip link set eth1 up");
        world.wait_ours(&way_out(7800), "applied");
    }
    world.release_restores();
}

/// It hears of rules that somebody deletes, and undoes that once.
#[test]
fn the_agent_puts_deleted_rules_back_once() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&[&GATEWAY, &AUTO, &["--follow", "always"][..]].concat()).ok();
    world.wait_ours(&way_out(7800), "applied");
    world.sh("ip rule del priority 32000");
    world.wait_ours(&way_out(7800), "applied");
    world.sh("ip rule del priority 32000");
    world.wait_ours(&way_out(7800)[1..], "drifted");
    // Whatever else happens.
    world.sh("ip address add 10.0.2.3/24 dev eth1; ip address del 10.0.2.3/24 dev eth1");
    world.wait_ours(&way_out(7800)[1..], "drifted");
    world.by_hand(&[&GATEWAY, &AUTO]).ok();
    world.wait_ours(&way_out(7800), "applied");
    world.release_restores();
}

/// Without an agent, `status` looks.
#[test]
fn a_way_out_that_somebody_took_away_is_shown_as_drift() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&[&GATEWAY, &AUTO, &["--follow", "never"][..]].concat()).ok();
    world.assert_eth1("applied", "ok");
    for (taken, said) in [
        ("ip rule del priority 32000", "the IPv4 rule from 10.0.2.2 lookup 7800 (priority 32000) is gone"),
        ("ip route del default table 7800", "the route default via 10.0.2.1 dev eth1 table 7800 is gone"),
    ] {
        world.sh(taken);
        let entry = world.eth1();
        assert_eq!((&entry["state"], &entry["reason"]), (&json!("drifted"), &json!(said)), "{entry:#}");
        world.by_hand(&[&GATEWAY, &AUTO]).ok();
        world.assert_eth1("applied", "ok");
    }
    sandbox.hook(&["release", world.web.id()]).ok();
    sandbox.assert_ledger_is_empty();
}

/// The kernel takes no route by a link that is down: that is nothing to stop a container for.
#[test]
fn an_interface_that_is_down_gets_its_way_out_when_it_is_up() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip link set eth1 down");
    world.remember();
    world.web.oci(&[GATEWAY, AUTO].concat()).ok();
    world.assert_eth1("pending", "missing");
    assert!(
        world.eth1()["reason"].as_str().is_some_and(|reason| reason.contains("eth1 is down")),
        "{:#}",
        world.eth1()
    );
    assert_eq!(world.ours(), [""; 0]);
    world.sh("ip link set eth1 up");
    world.wait_ours(&way_out(7800), "applied");
    sandbox.hook(&["release", world.web.id()]).ok();
    world.sh("ip link set eth1 down");
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();
}

/// As with a DHCP client whose router is another one with the next lease: nobody has named it.
#[test]
fn the_agent_follows_a_gateway_that_is_replaced() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip route add default via 10.0.2.1 dev eth1 table 42");
    world.remember();
    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    assert_eq!(world.ours(), way_out(7800));
    let by = |gateway: &str| {
        let mut expected = way_out(7800);
        expected[2] = format!("default via {gateway} dev eth1 table 7800 proto 109");
        expected
    };
    world.sh("ip route replace default via 10.0.2.9 dev eth1 table 42");
    world.wait_ours(&by("10.0.2.9"), "applied");
    // Between the two there is none.
    world.sh("ip route del default table 42; ip route add default via 10.0.2.7 dev eth1 table 42");
    world.wait_ours(&by("10.0.2.7"), "applied");
    world.sh("ip route replace default via 203.0.113.1 dev eth1 onlink table 42");
    let mut expected = by("203.0.113.1");
    expected[2] += " onlink";
    world.wait_ours(&expected, "applied");
    world.sh("ip route replace default via 10.0.2.8 dev eth1 table 42");
    world.wait_ours(&by("10.0.2.8"), "applied");
    // Theirs goes with the link for good; what is known of it does not.
    world.sh("ip link set eth1 down");
    world.wait_ours(&way_out(7800)[..2], "pending");
    world.sh("ip link set eth1 up");
    world.wait_ours(&by("10.0.2.8"), "applied");
    assert!(!world.routing().iter().any(|line| line.contains("table 42")), "{:#?}", world.routing());
    sandbox.hook(&["release", world.web.id()]).ok();
    world.sh("ip route add default via 10.0.2.1 dev eth1 table 42");
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();
}

/// A default route by a gateway that was on the link of the address before is of no use, and no error.
#[test]
fn the_agent_follows_to_another_network() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.sh("ip route add default via 10.0.2.1 dev eth1 table 42");
    world.remember();
    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    assert_eq!(world.ours(), way_out(7800));
    world.sh("ip addr add 10.0.3.2/24 dev eth1; ip addr del 10.0.2.2/24 dev eth1");
    world.wait_ours(&[], "pending");
    world.sh("ip route replace default via 10.0.3.1 dev eth1 table 42");
    let moved: Vec<String> = way_out(7800).iter().map(|line| line.replace("10.0.2.", "10.0.3.")).collect();
    world.wait_ours(&moved, "applied");
    sandbox.hook(&["release", world.web.id()]).ok();
    world.sh("ip addr add 10.0.2.2/24 dev eth1; ip addr del 10.0.3.2/24 dev eth1
         ip route replace default via 10.0.2.1 dev eth1 table 42");
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();
}

/// Both are followed, and neither takes what only the other's record still has for his.
#[test]
fn the_agent_follows_changes_for_two_in_one_namespace() {
    for first_leaves_first in [true, false] {
        let sandbox = Sandbox::new();
        let mut world = World::new(&sandbox);
        let other = Bare::in_netns(&sandbox, "other", &ctr());
        world.sh("echo 1 >/proc/sys/net/ipv4/conf/eth1/promote_secondaries
             ip route add default via 10.0.2.1 dev eth1 table 42");
        world.remember();
        world.web.oci(&[BACKUP, AUTO].concat()).ok();
        other.oci(&[BACKUP, AUTO].concat()).ok();
        assert_eq!(world.ours(), way_out(7800));
        world.sh("ip addr add 10.0.2.9/24 dev eth1; ip addr del 10.0.2.2/24 dev eth1
             ip route replace default via 10.0.2.8 dev eth1 table 42");
        let mut expected = way_out(7800);
        expected[0] = "32000: from 10.0.2.9 lookup 7800 proto 109".into();
        expected[2] = "default via 10.0.2.8 dev eth1 table 7800 proto 109".into();
        world.wait_ours(&expected, "applied");
        let (first, last) =
            if first_leaves_first { (world.web.id(), other.id()) } else { (other.id(), world.web.id()) };
        sandbox.hook(&["release", first]).ok();
        wait_until("the last one's way out", LIMIT, || eth1(&sandbox, last)["route"] == "ok");
        sandbox.hook(&["release", last]).ok();
        world.sh("ip addr add 10.0.2.2/24 dev eth1; ip addr del 10.0.2.9/24 dev eth1
             ip route replace default via 10.0.2.1 dev eth1 table 42");
        world.assert_as_before();
        sandbox.assert_ledger_is_empty();
    }
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
    sandbox.hook(&["release", world.web.id()]).ok();
    world.sh("ip route del default via 10.0.2.1 dev eth1 table 42");
    world.assert_as_before();
    sandbox.assert_ledger_is_empty();

    world.web.oci(&[BACKUP, AUTO].concat()).ok();
    world.assert_eth1("pending", "missing");
    world.sh("ip route add default via 10.0.2.1 dev eth1 metric 200");
    wait_until("eth1 to be applied", LIMIT, || {
        let entry = world.eth1();
        entry["state"] == "applied" && entry["route"] == "ok"
    });
    sandbox.hook(&["release", world.web.id()]).ok();
    world.sh("ip route del default via 10.0.2.1 dev eth1 metric 200");
    world.assert_as_before();
}
