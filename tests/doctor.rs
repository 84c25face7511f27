//! The doctor's findings on real namespaces: each way in which a second path can be broken is built, has to be named,
//! and is mended by the command that comes with it.

mod common;

use std::time::{Duration, Instant};

use common::*;
use serde_json::Value;

/// How long a subflow may take to come up, or to show that it hangs.
const LIMIT: Duration = Duration::from_secs(15);

fn ctr() -> Netns {
    Netns::named("ctr")
}

/// What `mptcp-hook doctor ... --json` said.
struct Diagnosis {
    code: Option<i32>,
    json: Value,
}

impl Diagnosis {
    #[track_caller]
    fn of(sandbox: &Sandbox, arguments: &[&str]) -> Self {
        let arguments: Vec<&str> = ["doctor", "--json"].iter().chain(arguments).copied().collect();
        Self::read(sandbox.hook(&arguments))
    }

    #[track_caller]
    fn read(outcome: Outcome) -> Self {
        let json = serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {outcome}"));
        assert_eq!(outcome.stderr, "", "{outcome}");
        Self { code: outcome.code, json }
    }

    fn findings(&self) -> &[Value] {
        self.json["findings"].as_array().expect("findings is a list")
    }

    /// The names of the findings that are no notes.
    fn ids(&self) -> Vec<&str> {
        let wrong = self.findings().iter().filter(|finding| finding["severity"] != "note");
        wrong.map(|finding| finding["id"].as_str().expect("a name")).collect()
    }

    fn has(&self, id: &str) -> bool {
        self.findings().iter().any(|finding| finding["id"] == id)
    }

    #[track_caller]
    fn finding(&self, id: &str) -> &Value {
        let found = self.findings().iter().find(|finding| finding["id"] == id);
        found.unwrap_or_else(|| panic!("no {id} in {:#}", self.json))
    }

    /// The command that mends a finding.
    #[track_caller]
    fn command(&self, id: &str) -> &str {
        self.finding(id)["command"].as_str().unwrap_or_else(|| panic!("{id} has no command: {:#}", self.json))
    }

    #[track_caller]
    fn says(&self, id: &str, key: &str, word: &str) {
        let text = self.finding(id)[key].as_str().unwrap_or_default();
        assert!(text.contains(word), "{id}: no {word:?} in {key}: {:#}", self.json);
    }

    /// No problem and no warning.
    #[track_caller]
    fn is_clean(&self) {
        assert!(self.ids().is_empty() && self.code == Some(0), "{:#}", self.json);
    }

    /// Exactly these, and the exit status that goes with them.
    #[track_caller]
    fn is(&self, ids: &[&str], code: i32) {
        assert_eq!((self.ids().as_slice(), self.code), (ids, Some(code)), "{:#}", self.json);
    }
}

/// A container on two paths with the server's side, as in the module `paths`.
struct World<'a> {
    sandbox: &'a Sandbox,
    paths: TwoPaths<'a>,
    web: Bare<'a>,
}

impl<'a> World<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        Self::wired(sandbox, &Wiring::new())
    }

    fn wired(sandbox: &'a Sandbox, wiring: &Wiring) -> Self {
        let paths = TwoPaths::with_container_netns(sandbox, wiring);
        Self { sandbox, paths, web: Bare::in_netns(sandbox, "web", &ctr()) }
    }

    /// A shell script in the container's namespace.
    #[track_caller]
    fn sh(&self, script: &str) -> String {
        self.sandbox.sh_in(&ctr(), script)
    }

    #[track_caller]
    fn doctor(&self) -> Diagnosis {
        Diagnosis::of(self.sandbox, &[self.web.id()])
    }

    /// Looks again and again until the finding is there.
    #[track_caller]
    fn wait_for(&self, id: &str) -> Diagnosis {
        wait_for(&format!("the finding {id}"), LIMIT, || Some(self.doctor()).filter(|found| found.has(id)))
    }

    /// The same where a subflow hung: it comes up by itself with a repeated SYN, or the kernel has given it up, and the
    /// doctor says how it is tried again.
    #[track_caller]
    fn wait_mended(&self) {
        let settled = wait_for("an end of the subflow that hung", LIMIT, || {
            Some(self.doctor()).filter(|found| found.ids().is_empty() || found.ids() == ["connection-lacks-subflow"])
        });
        if settled.has("connection-lacks-subflow") {
            self.mend(settled.command("connection-lacks-subflow"));
        }
        self.wait_clean();
    }

    /// Looks again and again until nothing is wrong.
    #[track_caller]
    fn wait_clean(&self) -> Diagnosis {
        let begin = Instant::now();
        loop {
            let found = self.doctor();
            if found.ids().is_empty() {
                return found;
            }
            assert!(begin.elapsed() < LIMIT, "not clean within {LIMIT:?}: {:#}", found.json);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs a command that the doctor named, as a person on the host would, with the gateway filled in.
    #[track_caller]
    fn mend(&self, command: &str) {
        let hook = hook();
        let command = command.replace("GATEWAY", "10.0.2.1").replace("mptcp-hook ", &format!("{} ", hook.display()));
        self.sandbox.sh(&command);
    }

    /// A slow transfer from the container to the server, under way.
    fn transfer(&self) -> Sender {
        let mut sender = Sender::start(self.sandbox, &ctr(), self.paths.address(), 1 << 30, Some(20_000));
        sender.wait_sent(1);
        sender
    }
}

// --- a container that is well -----------------------------------------------------------------------------------------

#[test]
fn doctor_finds_nothing_wrong_with_a_healthy_container() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth0=subflow", "--interface", "eth1=backup"]).ok();
    world.doctor().is_clean();
    let _server = Server::start(&sandbox, world.paths.server());
    let _sender = world.transfer();
    let found = wait_for("both subflows", LIMIT, || {
        let found = world.doctor();
        let up = found.json["subflows"].as_array()?.iter().filter(|s| s["state"] == "ESTAB").count();
        (up == 2).then_some(found)
    });
    found.is_clean();
    let subflows = found.json["subflows"].as_array().unwrap();
    let by = |interface: &str| {
        subflows.iter().find(|s| s["interface"] == interface).unwrap_or_else(|| panic!("{subflows:#?}"))
    };
    assert_eq!((&by("eth0")["backup"], &by("eth1")["backup"]), (&Value::Bool(false), &Value::Bool(true)));
    assert_eq!(by("eth0")["connection"], by("eth1")["connection"]);
    assert!(by("eth0")["sent"].as_u64() > by("eth1")["sent"].as_u64());
    let text = sandbox.hook(&["doctor", world.web.id()]).ok();
    assert!(text.contains("Nothing is wrong.") && text.contains("eth1") && text.contains("ESTAB"), "{text}");
    // The server's side of the same connection.
    let server = Diagnosis::of(&sandbox, &["--netns", "/run/netns/srv"]);
    server.is_clean();
    assert!(server.json["subflows"].as_array().unwrap().iter().any(|s| s["peer_backup"] == true), "{:#}", server.json);
}

#[test]
fn doctor_changes_nothing_and_takes_no_lock() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().dual_stack());
    world.web.oci(&["--interface", "eth*=subflow"]).ok();
    let look = || {
        let kernel = world.sh("ip mptcp endpoint; ip mptcp limits; ip route show table all; ip -6 route show table all; ip rule; grep -r '' /proc/sys/net/mptcp /proc/sys/net/ipv4/conf");
        (kernel, sandbox.sh("cd /run/mptcp-hook && find . -type f -exec sha256sum {} + | sort"))
    };
    let before = look();
    // Locks that somebody holds are no reason to wait.
    let _holder = sandbox.spawn(&[
        "sh",
        "-c",
        "for f in $(find /run/mptcp-hook -name '*lock*' -type f); do exec 9<>$f; flock 9 || exit 1; done; sleep 1000",
    ]);
    world.doctor().is_clean();
    sandbox.hook(&["doctor"]);
    assert_eq!(look(), before);
}

#[test]
fn doctor_of_both_families() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().dual_stack().without_second_route());
    world.web.oci(&["--interface", "eth1=subflow"]).ok();
    let found = world.doctor();
    found.is(&["route-missing", "route-missing"], 1);
    let commands: Vec<String> = found
        .findings()
        .iter()
        .filter(|f| f["id"] == "route-missing")
        .map(|f| f["command"].as_str().unwrap().to_owned())
        .collect();
    for command in &commands {
        let gateway = if command.contains("ip -6") { "fd00:2::1" } else { "10.0.2.1" };
        world.mend(&command.replace("GATEWAY", gateway));
    }
    world.doctor().is_clean();
}

// --- source routing ---------------------------------------------------------------------------------------------------

/// Endpoint `dev eth1`, no route through eth1: the subflow stays in SYN-SENT.
#[test]
fn doctor_names_a_missing_route() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().without_second_route());
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let _server = Server::start(&sandbox, world.paths.server());
    let _sender = world.transfer();
    let found = world.wait_for("subflow-stuck");
    found.is(&["route-missing", "subflow-stuck"], 1);
    assert_eq!(found.finding("route-missing")["interface"], "eth1");
    found.says("subflow-stuck", "evidence", "SYN-SENT");
    // The kernel asks the link for the server's own address.
    found.says("subflow-stuck", "evidence", "10.0.0.1 dev eth1");
    let host = Diagnosis::of(&sandbox, &[]);
    host.says("container-amiss", "evidence", "eth1: route missing");
    world.mend(found.command("route-missing"));
    world.wait_mended();
    assert!(world.sh("ss -tinH").contains("Jj"), "{}", world.sh("ss -tin"));
}

/// Endpoint without `dev`: established, but leaves by eth0; everything looks healthy.
#[test]
fn doctor_names_a_subflow_that_leaves_by_another_interface() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().without_second_route());
    world.sh("ip mptcp endpoint add 10.0.2.2 subflow; ip mptcp limits set subflows 2");
    let _server = Server::start(&sandbox, world.paths.server());
    let target = ["--netns", "/run/netns/ctr"];
    let sender = world.transfer();
    let found = wait_for("the wrong subflow", LIMIT, || {
        Some(Diagnosis::of(&sandbox, &target)).filter(|found| found.has("subflow-wrong-interface"))
    });
    found.is(&["endpoint-unbound", "route-missing", "subflow-wrong-interface"], 1);
    found.says("endpoint-unbound", "evidence", "via 10.0.1.1 dev eth0");
    found.says("subflow-wrong-interface", "evidence", "dev eth0");
    drop(sender);
    world.mend(found.command("endpoint-unbound"));
    world.mend(found.command("route-missing"));
    let _sender = world.transfer();
    let found = wait_for("a clean doctor", LIMIT, || {
        let found = Diagnosis::of(&sandbox, &target);
        let up = found.json["subflows"].as_array()?.iter().any(|s| s["interface"] == "eth1" && s["state"] == "ESTAB");
        (found.ids().is_empty() && up).then_some(found)
    });
    found.is_clean();
}

/// `dev eth1` and a second default route at a higher metric, or a rule with a table: both work. A strict rp_filter drops
/// the answers to the first.
#[test]
fn doctor_knows_the_routes_that_work() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    world.doctor().is_clean();
    world.sh("echo 1 >/proc/sys/net/ipv4/conf/eth1/rp_filter");
    let _server = Server::start(&sandbox, world.paths.server());
    let sender = world.transfer();
    let found = world.wait_for("subflow-stuck");
    found.is(&["rp-filter-strict", "subflow-stuck"], 1);
    found.says("rp-filter-strict", "evidence", "conf.eth1 1");
    // The gateway is known, from the route that is there.
    assert!(found.command("rp-filter-strict").contains("via 10.0.2.1"), "{}", found.command("rp-filter-strict"));
    world.mend(found.command("rp-filter-strict"));
    drop(sender);
    let _sender = world.transfer();
    world.wait_clean();
    // The rule alone does as well.
    world.sh("ip route del default dev eth1 metric 200");
    world.doctor().is_clean();
}

/// A table is there, and no rule leads to it.
#[test]
fn doctor_names_the_rule_that_is_missing() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().without_second_route());
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    world.sh("ip route add default via 10.0.2.1 dev eth1 table 1000");
    let found = world.doctor();
    found.is(&["route-missing"], 1);
    let command = found.command("route-missing");
    assert!(command.ends_with("ip rule add from 10.0.2.2 table 1000") && !command.contains("GATEWAY"), "{command}");
    world.mend(command);
    world.doctor().is_clean();
}

/// A server with `signal` on eth1, no source rule, strict rp_filter: the client's join stays in SYN-SENT.
#[test]
fn doctor_names_a_strict_rp_filter_at_a_server() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().without_second_route());
    world.sh("echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter");
    world.web.oci(&["--interface", "eth1=signal"]).ok();
    let _server = Server::start(&sandbox, &ctr());
    // The client is where the server usually is, with an address of which both links' networks know nothing.
    sandbox.sh_in(
        world.paths.server(),
        "ip route add 10.0.1.2/32 dev eth0 src 10.0.0.1; ip route add 10.0.2.2/32 dev eth1 src 10.0.0.1",
    );
    let client =
        |bytes| Sender::start(&sandbox, world.paths.server(), "10.0.1.2".parse().unwrap(), bytes, Some(20_000));
    let mut sender = client(1 << 30);
    sender.wait_sent(1);
    let stuck = || sandbox.sh_in(world.paths.server(), "ss -tanH").lines().any(|line| line.starts_with("SYN-SENT"));
    wait_until("a join that hangs", LIMIT, stuck);
    let found = world.doctor();
    found.is(&["rp-filter-strict"], 1);
    found.says("rp-filter-strict", "evidence", "conf.all 1");
    found.says("rp-filter-strict", "evidence", "via 10.0.1.1 dev eth0");
    let by_client = wait_for("a SYN that is repeated", LIMIT, || {
        Some(Diagnosis::of(&sandbox, &["--netns", "/run/netns/srv"])).filter(|found| found.has("subflow-stuck"))
    });
    by_client.says("subflow-stuck", "mend", "rp_filter");
    world.mend(found.command("rp-filter-strict"));
    world.doctor().is_clean();
    drop(sender);
    let mut sender = client(1 << 30);
    sender.wait_sent(1);
    wait_until("a join that came up", LIMIT, || {
        let found = world.doctor();
        found.json["subflows"].as_array().unwrap().iter().any(|s| s["interface"] == "eth1" && s["state"] == "ESTAB")
    });
}

/// The same without the filter: it works here, and not behind a network that checks sources.
#[test]
fn doctor_warns_of_answers_that_leave_elsewhere() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.sh("echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter; echo 0 >/proc/sys/net/ipv4/conf/eth1/rp_filter");
    world.web.oci(&["--interface", "eth1=signal"]).ok();
    let found = world.doctor();
    found.is(&["reply-elsewhere"], 0);
    world.mend(found.command("reply-elsewhere"));
    world.doctor().is_clean();
}

/// An address is replaced (DHCP): the stale endpoint stays, the new address is unused.
#[test]
fn doctor_names_a_stale_endpoint_and_an_unused_address() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup", "--follow", "never"]).ok();
    world.sh("ip addr del 10.0.2.2/24 dev eth1; ip addr add 10.0.2.7/24 dev eth1; ip route add default via 10.0.2.1 dev eth1 metric 200");
    let found = world.doctor();
    found.is(&["address-missing", "address-unused"], 1);
    found.says("address-missing", "what", "10.0.2.2");
    found.says("address-unused", "what", "10.0.2.7");
    world.mend(found.command("address-missing"));
    world.doctor().is_clean();
    assert_eq!(sandbox.endpoints(&ctr()).len(), 1);
}

/// An endpoint before its address: taken, and existing connections never try again.
#[test]
fn doctor_names_an_endpoint_without_address_and_connections_without_path() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.sh("ip addr del 10.0.2.2/24 dev eth1; ip mptcp endpoint add 10.0.2.2 dev eth1 subflow; ip mptcp limits set subflows 2");
    let _server = Server::start(&sandbox, world.paths.server());
    let _sender = world.transfer();
    let target = ["--netns", "/run/netns/ctr"];
    Diagnosis::of(&sandbox, &target).is(&["address-missing"], 1);
    world.sh("ip addr add 10.0.2.2/24 dev eth1; ip route add default via 10.0.2.1 dev eth1 metric 200");
    let found = Diagnosis::of(&sandbox, &target);
    found.is(&["connection-lacks-subflow"], 1);
    assert_eq!(found.finding("connection-lacks-subflow")["interface"], "eth1");
    world.mend(found.command("connection-lacks-subflow"));
    let found = wait_for("a clean doctor", LIMIT, || {
        Some(Diagnosis::of(&sandbox, &target)).filter(|found| found.ids().is_empty())
    });
    found.is_clean();
    assert_eq!(found.json["subflows"].as_array().unwrap().len(), 2, "{:#}", found.json);
}

// --- links and gateways -----------------------------------------------------------------------------------------------

#[test]
fn doctor_names_a_gateway_that_does_not_answer() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    sandbox.sh_in(world.paths.server(), "ip addr del 10.0.2.1/24 dev eth1");
    let _server = Server::start(&sandbox, world.paths.server());
    let _sender = world.transfer();
    let found = world.wait_for("gateway-silent");
    found.says("gateway-silent", "evidence", "10.0.2.1 dev eth1");
    sandbox.sh_in(world.paths.server(), "ip addr add 10.0.2.1/24 dev eth1");
    world.mend(found.command("gateway-silent"));
    world.wait_mended();
}

#[test]
fn doctor_names_links_that_are_down_and_mtus_that_differ() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    world.sh("ip link set eth1 mtu 1400");
    let found = world.doctor();
    found.is_clean();
    found.says("mtu-differs", "evidence", "eth0 1500, eth1 1400");
    world.paths.cut("eth1");
    // The kernel takes up to a second to see it.
    world.wait_for("interface-down").is(&["interface-down"], 1);
    world.paths.mend("eth1");
    wait_until("a carrier", LIMIT, || world.doctor().ids().is_empty());
}

// --- what was asked for -----------------------------------------------------------------------------------------------

#[test]
fn doctor_names_what_somebody_changed() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup", "--sysctl", "stale_loss_cnt=7"]).ok();
    world.doctor().is_clean();
    let id = sandbox.endpoints(&ctr())[0].id;
    for (change, finding) in [
        (format!("ip mptcp endpoint change id {id} nobackup"), "endpoint-flags"),
        (format!("ip mptcp endpoint delete id {id}"), "endpoint-missing"),
        ("ip mptcp limits set subflows 0 add_addr_accepted 0".into(), "limits-low"),
        ("echo 9 >/proc/sys/net/mptcp/stale_loss_cnt".into(), "setting-drifted"),
        ("echo 0 >/proc/sys/net/mptcp/enabled".into(), "mptcp-disabled"),
    ] {
        world.sh(&change);
        let found = world.doctor();
        found.is(&[finding], 1);
        world.mend(found.command(finding));
        world.doctor().is_clean();
    }
}

#[test]
fn doctor_names_endpoints_that_do_nothing() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let target = ["--netns", "/run/netns/ctr"];
    for (endpoint, finding, code) in
        [("10.0.2.2 dev eth1 backup", "endpoint-inert", 0), ("10.0.2.2 dev eth0 subflow", "endpoint-wrong-device", 1)]
    {
        world.sh(&format!("ip mptcp endpoint flush; ip mptcp limits set subflows 2; ip mptcp endpoint add {endpoint}"));
        let found = Diagnosis::of(&sandbox, &target);
        found.is(&[finding], code);
        world.mend(found.command(finding));
        Diagnosis::of(&sandbox, &target).is_clean();
    }
    world.sh("ip mptcp limits set subflows 0");
    let found = Diagnosis::of(&sandbox, &target);
    found.is(&["limits-low"], 1);
    assert!(found.has("container-unknown"));
    world.sh("ip mptcp limits set subflows 2");
    world.sh("echo 1 >/proc/sys/net/mptcp/pm_type");
    let found = Diagnosis::of(&sandbox, &target);
    assert!(found.has("path-manager-userspace"), "{:#}", found.json);
    world.mend(found.command("path-manager-userspace"));
    Diagnosis::of(&sandbox, &target).is_clean();
}

#[test]
fn doctor_names_interfaces_that_are_not_there_yet() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth7=backup", "--follow", "never"]).ok();
    world.doctor().is(&["interface-missing"], 1);
    world.sh("ip link add eth7 type veth peer name peer7; ip link set eth7 up; ip link set peer7 up");
    world.doctor().is(&["address-none"], 1);
    world.sh("ip addr add 10.0.7.2/24 dev eth7; ip route add default via 10.0.7.1 dev eth7 metric 300");
    let found = world.doctor();
    found.is(&["address-unused"], 1);
    world.mend(found.command("address-unused"));
    world.doctor().is_clean();
}

#[test]
fn doctor_says_that_nobody_follows() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    // As if systemd were there: the hook leaves the agent to a unit, and there is none.
    sandbox.sh("mkdir -p /run/systemd/system");
    world.web.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    world.doctor().is(&["agent-needed"], 1);
    assert!(Diagnosis::of(&sandbox, &[]).has("agent-needed"));
    sandbox.sh("rmdir /run/systemd/system");
    world.web.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    wait_until("an agent", LIMIT, || Diagnosis::of(&sandbox, &[]).has("agent-running"));
    world.wait_clean();
}

#[test]
fn doctor_of_the_dead_and_the_unknown() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let id = world.web.id().to_owned();
    world.web.kill();
    let found = Diagnosis::of(&sandbox, &[&id]);
    found.is(&["container-dead"], 1);
    let host = Diagnosis::of(&sandbox, &[]);
    host.says("ledger-stale", "evidence", &id);
    world.mend(found.command("container-dead"));
    sandbox.assert_ledger_is_empty();
    for arguments in [&["doctor", "nobody"][..], &["doctor", "nobody", "--json"]] {
        let outcome = sandbox.hook(arguments);
        assert!(outcome.stderr.contains("nobody") && outcome.stdout.is_empty(), "{outcome}");
        outcome.fails_with(2);
    }
    sandbox.hook(&["doctor", "--probe", "10.0.0.1:80"]).fails_with(2);
    sandbox.hook(&["doctor", "--netns", "/etc/hostname"]).fails_with(1);
    sandbox.hook(&["doctor", "--pid", "999999"]).fails_with(1);
}

// --- sockets ----------------------------------------------------------------------------------------------------------

#[test]
fn doctor_tells_plain_tcp_from_mptcp() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    require("busybox", "busybox-static");
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let listener = sandbox.spawn_in(&ctr(), &["busybox", "nc", "-l", "-p", "7000"]);
    let found = world.wait_for("tcp-only");
    found.is(&["tcp-only"], 1);
    found.says("tcp-only", "evidence", ":7000 LISTEN");
    // Beside MPTCP it is only worth a note.
    let _server = Server::start(&sandbox, world.paths.server());
    let sender = world.transfer();
    let found = world.wait_for("tcp-mixed");
    wait_until("the join", LIMIT, || world.doctor().ids().is_empty());
    assert!(!found.has("tcp-only"));
    drop((listener, sender));
    // A peer that speaks plain TCP only.
    let _plain = sandbox.spawn_in(world.paths.server(), &["busybox", "nc", "-l", "-p", "7001", "-e", "sleep", "1000"]);
    let found = wait_for("a listener", LIMIT, || {
        let found = Diagnosis::of(&sandbox, &[world.web.id(), "--probe", "10.0.0.1:7001"]);
        found.has("probe-plain-tcp").then_some(found)
    });
    assert_eq!(found.code, Some(1));
    assert_eq!(found.json["probe"]["mptcp"], false);
    let found = world.doctor();
    found.is(&["fallbacks"], 0);
    found.says("fallbacks", "evidence", "MPCapableFallbackSYNACK");
}

#[test]
fn doctor_sees_the_backup_flag_of_a_live_subflow_change() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.sh("ip mptcp endpoint add 10.0.2.2 dev eth1 subflow; ip mptcp limits set subflows 2");
    let _server = Server::start(&sandbox, world.paths.server());
    let _sender = world.transfer();
    let target = ["--netns", "/run/netns/ctr"];
    wait_until("the join", LIMIT, || {
        Diagnosis::of(&sandbox, &target).json["subflows"].as_array().is_some_and(|s| s.len() == 2)
    });
    let id = sandbox.endpoints(&ctr())[0].id;
    world.sh(&format!("ip mptcp endpoint change id {id} backup"));
    wait_until("the backup bit", LIMIT, || {
        let found = Diagnosis::of(&sandbox, &target);
        found.ids().is_empty()
            && found.json["subflows"].as_array().is_some_and(|s| s.iter().any(|s| s["backup"] == true))
    });
}

// --- the probe --------------------------------------------------------------------------------------------------------

#[test]
fn doctor_probes_every_path() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth0=subflow", "--interface", "eth1=backup"]).ok();
    let _server = Server::start(&sandbox, world.paths.server());
    let target = world.web.id();
    let found = Diagnosis::of(&sandbox, &[target, "--probe", "10.0.0.1:5000"]);
    found.is_clean();
    assert!(found.has("probe-established"));
    let subflows = found.json["probe"]["subflows"].as_array().unwrap();
    assert_eq!(subflows.len(), 2, "{subflows:#?}");
    let by = |interface: &str| {
        subflows.iter().find(|s| s["interface"] == interface).unwrap_or_else(|| panic!("{subflows:#?}"))
    };
    assert_eq!((&by("eth0")["backup"], &by("eth1")["backup"]), (&Value::Bool(false), &Value::Bool(true)));
    let text = sandbox.hook(&["doctor", target, "--probe", "10.0.0.1:5000"]).ok();
    assert!(text.contains("Subflows of the probe to 10.0.0.1:5000") && text.contains("Nothing is wrong."), "{text}");
    // A peer that takes no joins.
    sandbox.sh_in(world.paths.server(), "ip mptcp limits set subflows 0");
    let found = Diagnosis::of(&sandbox, &[target, "--probe", "10.0.0.1:5000"]);
    found.is(&["probe-subflow-missing"], 1);
    // Nobody there.
    let found = Diagnosis::of(&sandbox, &[target, "--probe", "10.0.0.1:5999"]);
    found.is(&["probe-failed"], 1);
    found.says("probe-failed", "evidence", "refused");
}

#[test]
fn doctor_probes_a_broken_path_and_ipv6() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().dual_stack().without_second_route());
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let _server = Server::start(&sandbox, world.paths.server());
    let target = world.web.id();
    // IPv6 says no at once, IPv4 asks the link for the peer's own address.
    for (peer, evidence) in [("10.0.0.1:5000", "SYN-SENT"), ("[fd00::1]:5000", "no subflow from there")] {
        let found = Diagnosis::of(&sandbox, &[target, "--probe", peer]);
        found.is(&["route-missing", "route-missing", "probe-subflow-missing"], 1);
        assert_eq!(found.finding("probe-subflow-missing")["interface"], "eth1");
        found.says("probe-subflow-missing", "evidence", evidence);
    }
}

// --- the host ---------------------------------------------------------------------------------------------------------

/// An empty /usr/share/containers and common.conf.d, and nothing in /etc that could be an engine's hook.
fn bare_host(sandbox: &Sandbox) {
    sandbox.sh(
        "for d in /usr/share/containers /usr/share/lxc/config/common.conf.d; do mkdir -p $d; mount -t tmpfs tmpfs $d; done
         mount -t tmpfs tmpfs /usr/local/bin
         rm -rf /etc/containers /etc/crio /etc/lxc",
    );
}

const HOOKS_D: &str = "/usr/share/containers/oci/hooks.d";

#[test]
fn doctor_of_a_host() {
    let sandbox = Sandbox::new();
    bare_host(&sandbox);
    let host = || Diagnosis::of(&sandbox, &[]);
    host().is(&["hook-none"], 0);
    let facts = host();
    let about: Vec<&str> =
        facts.json["facts"].as_array().unwrap().iter().map(|f| f["about"].as_str().unwrap()).collect();
    for fact in ["kernel", "MPTCP", "enabled", "schedulers", "path managers", "congestion controls"] {
        assert!(about.contains(&fact), "{about:?}");
    }
    // The shipped hook, and no program where it says.
    let repository = env!("CARGO_MANIFEST_DIR");
    sandbox.sh(&format!("mkdir -p {HOOKS_D} && cp {repository}/hooks/oci/hooks.d/mptcp-hook.json {HOOKS_D}"));
    let found = host();
    found.is(&["hook-path-missing"], 1);
    found.says("hook-path-missing", "what", "/usr/local/bin/mptcp-hook");
    sandbox.sh(found.command("hook-path-missing"));
    host().is_clean();
    let text = sandbox.hook(&["doctor"]).ok();
    assert!(text.contains("Nothing is wrong.") && text.contains("hooks.d/mptcp-hook.json"), "{text}");
    // podman is told to look elsewhere.
    sandbox.sh("mkdir -p /etc/containers");
    sandbox.write("/etc/containers/containers.conf", "[engine]\nhooks_dir = [\"/opt/hooks\"]\n");
    let found = host();
    found.is(&["hook-dir-unseen"], 1);
    found.says("hook-dir-unseen", "evidence", "/opt/hooks");
    found.says("hook-dir-unseen", "mend", HOOKS_D);
    sandbox
        .write("/etc/containers/containers.conf", &format!("[engine]\nhooks_dir = [\"/opt/hooks\", \"{HOOKS_D}\"]\n"));
    host().is_clean();
    sandbox.write("/etc/containers/containers.conf", "[engine\n");
    host().is(&["hook-unreadable"], 1);
    sandbox.sh("rm /etc/containers/containers.conf");
    // CRI-O as well.
    sandbox.sh("mkdir -p /etc/crio/crio.conf.d");
    sandbox.write("/etc/crio/crio.conf.d/10-hooks.conf", "[crio.runtime]\nhooks_dir = [\"/opt/hooks\"]\n");
    let found = host();
    found.says("hook-dir-unseen", "what", "CRI-O");
    sandbox.sh("rm -r /etc/crio");
    // A stage is missing; the file is broken.
    sandbox.sh(&format!("sed -i 's/, \"poststop\"//' {HOOKS_D}/mptcp-hook.json"));
    let found = host();
    found.is(&["hook-incomplete"], 0);
    found.says("hook-incomplete", "mend", "poststop");
    sandbox.sh(&format!("echo '{{' >{HOOKS_D}/mptcp-hook.json"));
    assert!(host().has("hook-unreadable"));
    // LXC's.
    sandbox.sh(&format!(
        "rm {HOOKS_D}/mptcp-hook.json; cp {repository}/hooks/lxc/mptcp-hook.conf /usr/share/lxc/config/common.conf.d"
    ));
    host().is_clean();
    sandbox.sh(
        "sed -i /post-stop/d /usr/share/lxc/config/common.conf.d/mptcp-hook.conf; chmod -x /usr/local/bin/mptcp-hook",
    );
    host().is(&["hook-path-missing", "hook-incomplete"], 1);
}

#[test]
fn doctor_of_a_host_with_other_managers_and_a_damaged_ledger() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let program = sandbox.dir().join("mptcpd");
    std::fs::copy("/bin/busybox", &program).expect("apt-get install busybox-static");
    let script = format!("exec -a sleep {} 1000", program.display());
    let daemon = sandbox.spawn_in(&ctr(), &["bash", "-c", &script]);
    let found = world.wait_for("other-manager");
    found.is(&["other-manager"], 0);
    // Only where it is.
    assert!(!Diagnosis::of(&sandbox, &[]).has("other-manager"));
    drop(daemon);
    sandbox.sh("for f in /run/mptcp-hook/containers/*; do echo nonsense >$f; done");
    let found = Diagnosis::of(&sandbox, &[]);
    assert_eq!(found.code, Some(1));
    assert!(found.has("ledger-problem"), "{:#}", found.json);
    world.mend(found.command("ledger-problem"));
    assert!(!Diagnosis::of(&sandbox, &[]).has("ledger-problem"));
}

#[test]
fn doctor_names_an_interrupted_hook() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    // A writer that is gone, as a hook that was killed leaves it.
    sandbox.sh(
        r#"for f in /run/mptcp-hook/containers/*; do
             jq -c '.at_work = {"pid": 999999, "start_time": 1, "follows": false, "before": null}' $f >/run/x && cat /run/x >$f
           done"#,
    );
    let found = world.doctor();
    found.is(&["container-interrupted"], 1);
    world.mend(found.command("container-interrupted"));
    world.doctor().is_clean();
}

#[test]
fn doctor_in_a_user_namespace() {
    let sandbox = Sandbox::new();
    let program = hook().display().to_string();
    let script = format!(
        "ip link set lo up; ip link add eth1 type veth peer name peer1; ip link set eth1 up; ip link set peer1 up
         ip addr add 10.0.2.2/24 dev eth1; ip mptcp endpoint add 10.0.2.2 dev eth1 subflow
         {program} doctor --state-dir /run/ledger --netns /proc/self/ns/net --json || echo status $?"
    );
    let out = sandbox.run(&["unshare", "--user", "--map-root-user", "--net", "sh", "-ec", &script]).ok();
    let (json, status) = out.trim().split_once('\n').expect("JSON and the status");
    let found = Diagnosis { code: Some(1), json: serde_json::from_str(json).unwrap() };
    found.is(&["route-missing"], 1);
    assert_eq!(status, "status 1");
    let host = sandbox.run(&[
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        &program,
        "doctor",
        "--state-dir",
        "/run/ledger",
    ]);
    assert!(host.stdout.contains("one user's"), "{host}");
}

/// An IPv6 path whose gateway is a link-local address, as router advertisements make them.
#[test]
fn doctor_of_gateways_that_are_link_local() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().ipv6_only().without_second_route());
    world.sh("ip -6 route add default via fe80::1 dev eth1 metric 900");
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    world.doctor().is_clean();
}
