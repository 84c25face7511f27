//! The doctor's findings on real namespaces: each way in which a second path can be broken is built, has to be named,
//! and is mended by the command that comes with it.

mod common;

use std::time::{Duration, Instant};

use common::expectations::Running;
use common::*;
use serde_json::Value;

impl World<'_> {
    #[track_caller]
    fn doctor(&self) -> Diagnosis {
        Diagnosis::of(self.sandbox, &[self.web.id()])
    }

    /// Looks again and again until the finding is there.
    #[track_caller]
    fn wait_for(&self, id: &str) -> Diagnosis {
        wait_for(&format!("the finding {id}"), LIMIT, || Some(self.doctor()).filter(|found| found.has(id)))
    }

    /// Where nobody answers on eth1's link, the kernel asks so many times, once in a second, and gives a join up then: after
    /// three, which a doctor may miss, if it is not told otherwise.
    #[track_caller]
    fn ask(&self, times: u32) {
        self.sh(&format!("echo {times} >/proc/sys/net/ipv4/neigh/eth1/mcast_solicit"));
    }

    /// Looks again and again until nothing is wrong where a subflow hung: it comes up by itself with a repeated SYN, or the
    /// kernel has given it up, and the doctor says how it is tried again.
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
        wait_for_or("nothing wrong", LIMIT, || {
            let found = self.doctor();
            if found.ids().is_empty() { Ok(found) } else { Err(found.json) }
        })
    }

    /// Runs a command that the doctor named, as a person on the host would, with the gateway filled in.
    #[track_caller]
    fn mend(&self, command: &str) {
        run(self.sandbox, &command.replace("GATEWAY", "10.0.2.1"));
    }

    /// A slow transfer from the container to the server, under way.
    fn transfer(&self) -> Sender {
        let mut sender = Sender::start(self.sandbox, &ctr(), self.paths.address(), 1 << 30, Some(20_000));
        sender.wait_sent(1);
        sender
    }
}

/// Machines on eth1's link that have not answered, as a container leaves them that looked for them once.
const STRANGERS: &str = "for i in 71 72 73 74 75 76 77; do ip neigh add 10.0.2.$i dev eth1 nud failed; done";

/// Runs a command that the doctor named.
#[track_caller]
fn run(sandbox: &Sandbox, command: &str) {
    sandbox.sh(&command.replace("mptcp-hook ", &format!("{} ", hook().display())));
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
    sandbox.settle(&ctr());
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
    for way in ["command", "by_hand"] {
        let sandbox = Sandbox::new();
        let world = World::wired(&sandbox, &Wiring::new().dual_stack().without_second_route());
        world.web.oci(&["--interface", "eth1=subflow"]).ok();
        let found = world.doctor();
        found.is(&["route-missing", "route-missing"], 1);
        mend_both(&sandbox, &found, way);
        world.doctor().is_clean();
    }
}

/// Runs what mends each missing way, with the gateway of its family.
#[track_caller]
fn mend_both(sandbox: &Sandbox, found: &Diagnosis, way: &str) {
    for finding in found.findings().iter().filter(|finding| finding["severity"] != "note") {
        let (what, command) = (finding["what"].as_str().unwrap(), finding[way].as_str().expect("a command"));
        let gateway = if what.contains("fd00:") { "fd00:2::1" } else { "10.0.2.1" };
        run(sandbox, &command.replace("GATEWAY", gateway));
    }
}

/// Whatever way out is missing, however the target is named, and whether the hook has set it up or not: the command that
/// is named mends it, and what came by it goes with a release.
#[test]
fn doctor_names_the_command_that_gives_ways_out() {
    for (flags, strict, expected, problems) in [
        ("subflow,backup", false, ["route-missing"; 2], 1),
        ("signal", false, ["route-missing"; 2], 1),
        ("signal", true, ["rp-filter-strict", "route-missing"], 1),
    ] {
        for known in [true, false] {
            let sandbox = Sandbox::new();
            let world = World::wired(&sandbox, &Wiring::new().dual_stack().without_second_route());
            let pid = world.web.pid().to_string();
            if strict {
                world.sh("for i in all eth1; do echo 1 >/proc/sys/net/ipv4/conf/$i/rp_filter; done");
            }
            let looks = || {
                let script = "ip rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all";
                world.sh(script).lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>()
            };
            sandbox.settle(&ctr());
            let before = looks();
            let targets: &[&[&str]] = if known {
                world.web.oci(&["--interface", &format!("eth1={flags}")]).ok();
                &[&[world.web.id()]]
            } else {
                let words = flags.replace(',', " ");
                world.sh(&format!("ip mptcp endpoint add 10.0.2.2 dev eth1 {words}; ip mptcp endpoint add fd00:2::2 dev eth1 {words}; ip mptcp limits set subflows 2"));
                &[&["--pid", &pid], &["--netns", "/run/netns/ctr"]]
            };
            for target in targets {
                let found = Diagnosis::of(&sandbox, target);
                found.is(&expected, problems);
                for finding in found.findings().iter().filter(|finding| finding["severity"] != "note") {
                    let command = finding["command"].as_str().expect("a command");
                    let begin = format!("mptcp-hook apply {} --interface eth1={flags},gateway=", target.join(" "));
                    assert!(command.starts_with(&begin) && command.ends_with(" --routes auto"), "{command}");
                }
                mend_both(&sandbox, &found, "command");
                Diagnosis::of(&sandbox, target).is_clean();
                let release: Vec<&str> = [&["release"], *target].concat();
                sandbox.hook(&release).ok();
                assert_eq!(looks(), before);
                sandbox.assert_ledger_is_empty();
            }
        }
    }
}

/// A way is there that answers do not take: the gateway is known by it, and the command complete.
#[test]
fn doctor_names_a_whole_command_where_a_gateway_is_known() {
    for strict in [false, true] {
        let sandbox = Sandbox::new();
        let world = World::wired(&sandbox, &Wiring::new().dual_stack());
        if strict {
            world.sh("echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter");
        }
        world.web.oci(&["--interface", "eth1=signal"]).ok();
        let found = world.doctor();
        match strict {
            true => found.is(&["rp-filter-strict", "reply-elsewhere"], 1),
            false => found.is(&["reply-elsewhere", "reply-elsewhere"], 0),
        }
        let command = format!("mptcp-hook apply {} --routes auto", world.web.id());
        for finding in found.findings().iter().filter(|finding| finding["severity"] != "note") {
            assert_eq!(finding["command"], command.as_str());
        }
        world.mend(&command);
        world.doctor().is_clean();
    }
}

// --- source routing ---------------------------------------------------------------------------------------------------

/// Endpoint `dev eth1`, no route through eth1: the subflow stays in SYN-SENT.
#[test]
fn doctor_names_a_missing_route() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().without_second_route());
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let _server = Server::start(&sandbox, world.paths.server());
    // Others on the link that were asked for once are no evidence.
    world.sh(STRANGERS);
    world.ask(1000);
    let _sender = world.transfer();
    let found = world.wait_for("subflow-stuck");
    found.is(&["route-missing", "subflow-stuck"], 1);
    assert_eq!(found.finding("route-missing")["interface"], "eth1");
    found.says("subflow-stuck", "evidence", "SYN-SENT");
    // The kernel asks the link for the server's own address.
    found.says("subflow-stuck", "evidence", "; 10.0.0.1 dev eth1");
    let host = Diagnosis::of(&sandbox, &[]);
    host.says("container-amiss", "evidence", "eth1: route missing");
    let command =
        format!("mptcp-hook apply {} --interface eth1=subflow,backup,gateway=GATEWAY --routes auto", world.web.id());
    assert_eq!(found.command("route-missing"), command);
    assert!(found.by_hand("route-missing").contains("ip rule add from 10.0.2.2 table "), "{:#}", found.json);
    world.mend(&command);
    world.ask(3);
    world.wait_mended();
    wait_until("the subflow", LIMIT, || world.sh("ss -tinH").contains("Jj"));
}

/// The gateway that only the container's author has named is nobody's advice, and the command that is works.
#[test]
fn doctor_takes_no_gateway_from_an_annotation() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().without_second_route());
    let web = Bare::in_netns(&sandbox, "author", &Netns::named("ctr"))
        .annotation("mptcp-hook/interface.eth1", "backup,gateway=10.0.2.66");
    web.oci(&[]).ok();
    let found = Diagnosis::of(&sandbox, &[web.id()]);
    found.is(&["route-missing"], 1);
    let command =
        format!("mptcp-hook apply {} --interface eth1=subflow,backup,gateway=GATEWAY --routes auto", web.id());
    assert_eq!(found.command("route-missing"), command);
    // One that a route knows is named: without it the annotation's would be refused.
    world.sh("ip route add default via 10.0.2.1 dev eth1 table 77");
    let found = Diagnosis::of(&sandbox, &[web.id()]);
    assert_eq!(found.command("route-missing"), command.replace("GATEWAY", "10.0.2.1"));
    world.mend(found.command("route-missing"));
    Diagnosis::of(&sandbox, &[web.id()]).is_clean();
    let routes = world.sh("ip route show table all");
    assert!(!routes.contains("10.0.2.66"), "{routes}");
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
    assert!(found.by_hand("rp-filter-strict").contains("via 10.0.2.1"), "{}", found.by_hand("rp-filter-strict"));
    assert_eq!(found.command("rp-filter-strict"), format!("mptcp-hook apply {} --routes auto", world.web.id()));
    world.mend(found.by_hand("rp-filter-strict"));
    drop(sender);
    let _sender = world.transfer();
    world.wait_clean();
    // The rule alone does as well.
    world.sh("ip route del default dev eth1 metric 200");
    world.doctor().is_clean();
}

/// Default routes that share the traffic: a strict filter takes what comes by any of them, in whatever order they stand.
#[test]
fn doctor_knows_routes_that_share_the_traffic() {
    for (first, second) in [(1, 2), (2, 1)] {
        let sandbox = Sandbox::new();
        let world = World::wired(&sandbox, &Wiring::new().without_second_route());
        let hop = |path: u8| format!("nexthop via 10.0.{path}.1 dev eth{}", path - 1);
        world.sh(&format!(
            "ip route replace default metric 100 {} {}; echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter",
            hop(first),
            hop(second)
        ));
        // The first subflow leaves by either.
        world.web.oci(&["--interface", "eth*=subflow"]).ok();
        world.doctor().is_clean();
        let _server = Server::start(&sandbox, world.paths.server());
        let _sender = world.transfer();
        wait_until("both subflows", LIMIT, || {
            let found = world.doctor();
            assert!(!found.has("rp-filter-strict"), "{:#}", found.json);
            let mut up: Vec<&str> = found.json["subflows"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|s| s["state"] == "ESTAB")
                .map(|s| s["local"].as_str().unwrap().split(':').next().unwrap())
                .collect();
            up.sort_unstable();
            // Its SYN/ACK came through the filter.
            up == ["10.0.1.2", "10.0.2.2"] && !found.has("subflow-stuck")
        });
    }
}

/// A route by eth1 that leads to the server and not everywhere: whoever has a subflow there, or probes it, misses nothing.
#[test]
fn doctor_knows_routes_that_lead_to_the_peer_alone() {
    for routes in ["10.0.0.0/8 via 10.0.2.1 dev eth1", "10.0.0.0/8 via 10.0.2.1 dev eth1 metric 900"] {
        let sandbox = Sandbox::new();
        let world = World::wired(&sandbox, &Wiring::new().without_second_route());
        // With the second route the first subflow leaves by eth0.
        world.sh(&format!("ip route add {routes}; ip route add 10.0.0.0/8 via 10.0.1.1 dev eth0 metric 100"));
        world.web.oci(&["--interface", "eth*=subflow"]).ok();
        world.doctor().is(&["route-missing"], 1);
        let _server = Server::start(&sandbox, world.paths.server());
        let target = world.web.id();
        let probed = Diagnosis::of(&sandbox, &[target, "--probe", "10.0.0.1:5000"]);
        probed.is(&["route-partial"], 0);
        assert!(probed.has("probe-established"), "{:#}", probed.json);
        let sender = world.transfer();
        // Those of the probe may be there still.
        let found = wait_for("both subflows", LIMIT, || {
            let found = world.doctor();
            let up = found.json["subflows"].as_array()?.iter().filter(|s| s["state"] == "ESTAB").count();
            (up >= 2 && !found.has("connection-lacks-subflow")).then_some(found)
        });
        found.is(&["route-partial"], 0);
        found.says("route-partial", "what", "10.0.0.1");
        // Established as it may still be, the route is gone.
        world.sh(&format!("ip route del {routes}"));
        assert!(world.doctor().has("route-missing"));
        drop(sender);
    }
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
    let by_hand = found.by_hand("route-missing");
    assert!(by_hand.ends_with("ip rule add from 10.0.2.2 table 1000") && !by_hand.contains("GATEWAY"), "{by_hand}");
    world.mend(found.command("route-missing"));
    world.doctor().is_clean();
    world.mend(&format!("mptcp-hook apply {} --routes off", world.web.id()));
    world.doctor().is(&["route-missing"], 1);
    world.mend(by_hand);
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
    world.paths.knows_neighbour("eth1", &ctr(), "eth1", [10, 0, 2, 2].into());
    let client =
        |bytes| Sender::start(&sandbox, world.paths.server(), "10.0.1.2".parse().unwrap(), bytes, Some(20_000));
    let mut sender = client(1 << 30);
    sender.wait_sent(1);
    let stuck =
        || sandbox.run_in(world.paths.server(), &["ss", "-tanH"]).ok().lines().any(|line| line.starts_with("SYN-SENT"));
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

/// A default route without a gateway, as tunnels have: nobody has to name one.
#[test]
fn doctor_asks_for_no_gateway_where_none_is_needed() {
    for way in ["command", "by_hand"] {
        let sandbox = Sandbox::new();
        let world = World::new(&sandbox);
        world.sh("echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter; echo 0 >/proc/sys/net/ipv4/conf/eth1/rp_filter
             ip route replace default dev eth1 metric 200");
        world.web.oci(&["--interface", "eth1=signal", "--follow", "never"]).ok();
        let found = world.doctor();
        found.is(&["reply-elsewhere"], 0);
        let finding = found.finding("reply-elsewhere");
        assert!(!finding.to_string().contains("GATEWAY"), "{finding:#}");
        let command = finding[way].as_str().expect("a command");
        run(&sandbox, command);
        world.doctor().is_clean();
        let table = world.sh("ip route show table all default dev eth1");
        assert_eq!(table.lines().count(), 2, "{command}: {table}");
    }
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

/// A client that has said nothing has one subflow, and nothing is wrong with that.
#[test]
fn doctor_misses_no_path_of_a_connection_that_has_said_nothing() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let _server = Server::start(&sandbox, world.paths.server());
    let _client = Sender::idle(&sandbox, &ctr(), world.paths.address());
    let found = world.doctor();
    found.is_clean();
    let subflows = found.json["subflows"].as_array().unwrap();
    assert!(subflows.len() == 1 && subflows[0]["state"] == "ESTAB", "{subflows:#?}");
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

/// Whatever a container calls its interface: in a command that a person on the host pastes it is a word, and nothing runs.
#[test]
fn doctor_quotes_interface_names_in_commands() {
    for name in ["$(touch${IFS}x)", "';>x;'", "a'b"] {
        let sandbox = Sandbox::new();
        let world = World::wired(&sandbox, &Wiring::new().without_second_route());
        world.sh("ip mptcp endpoint add 10.0.2.2 subflow; ip mptcp limits set subflows 2; ip link set eth1 down");
        sandbox.run_in(&ctr(), &["ip", "link", "set", "dev", "eth1", "name", name]).ok();
        let target = ["--netns", "/run/netns/ctr"];
        sandbox.sh("mkdir /run/here");
        let paste = |command: &str| run(&sandbox, &format!("cd /run/here; {}", command.replace("GATEWAY", "10.0.2.1")));
        let wait_is = |ids: &[&str]| {
            wait_for(&format!("{ids:?} of {name}"), LIMIT, || {
                Some(Diagnosis::of(&sandbox, &target)).filter(|found| found.ids() == ids)
            })
        };
        let found = wait_is(&["interface-down"]);
        let command = found.command("interface-down");
        let text = sandbox.hook(&[&["doctor"], &target[..]].concat()).fails_with(1);
        assert!(text.contains(&format!("run:  {command}\n")), "{command}: {text}");
        paste(command);
        let found = wait_is(&["endpoint-unbound", "route-missing"]);
        paste(found.command("endpoint-unbound"));
        let found = wait_is(&["route-missing"]);
        paste(found.command("route-missing"));
        wait_is(&[]);
        // The hook does not take every name.
        let by_hand = found.finding("route-missing")["by_hand"].as_str();
        assert_eq!(by_hand.is_some(), !name.contains(';'));
        if let Some(by_hand) = by_hand {
            sandbox.hook(&[&["release"], &target[..]].concat()).ok();
            wait_is(&["route-missing"]);
            paste(by_hand);
            wait_is(&[]);
        }
        assert_eq!(sandbox.sh("ls /run/here"), "", "{name} was run");
    }
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
    // The port that is announced stays.
    world.sh("ip mptcp endpoint flush; ip mptcp endpoint add 10.0.2.2 dev eth0 port 5001 signal");
    world.mend(Diagnosis::of(&sandbox, &target).command("endpoint-wrong-device"));
    let endpoint = world.sh("ip mptcp endpoint");
    assert!(endpoint.contains("port 5001") && endpoint.contains("dev eth1"), "{endpoint}");
    world
        .sh("ip mptcp endpoint flush; ip mptcp endpoint add 10.0.2.2 dev eth1 subflow; ip mptcp limits set subflows 0");
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

/// The limits count for a connection, and a connection's subflows are of one family.
#[test]
fn doctor_counts_the_limits_that_each_family_needs() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().dual_stack());
    world.sh("for e in '10.0.1.2 dev eth0' '10.0.2.2 dev eth1' 'fd00:1::2 dev eth0' 'fd00:2::2 dev eth1'; do
           ip mptcp endpoint add $e subflow
         done; ip mptcp limits set subflows 1 add_addr_accepted 0");
    let target = ["--netns", "/run/netns/ctr"];
    let _server = Server::start(&sandbox, world.paths.server());
    let mut senders = [world.paths.address(), world.paths.address6()]
        .map(|to| Sender::start(&sandbox, &ctr(), to, 1 << 30, Some(20_000)));
    senders.iter_mut().for_each(|sender| sender.wait_sent(1));
    let found = wait_for("both paths of both connections", LIMIT, || {
        let found = Diagnosis::of(&sandbox, &target);
        let up = found.json["subflows"].as_array()?.iter().filter(|s| s["state"] == "ESTAB").count();
        (up == 4).then_some(found)
    });
    found.is_clean();
    world.sh("ip mptcp limits set subflows 0 add_addr_accepted 0");
    assert!(Diagnosis::of(&sandbox, &target).has("limits-low"));
}

/// What hooks had to say when they ran stays to be read, and who was left alone.
#[test]
fn doctor_says_again_what_hooks_said() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    // Eight endpoints are the most, and these are somebody else's.
    world.sh("for i in 2 3 4 5 6 7 8 9; do ip addr add 10.0.1.1$i/24 dev eth0; ip mptcp endpoint add 10.0.1.1$i dev eth0 subflow; done");
    world.web.oci(&["--interface", "eth1=subflow"]).ok();
    let found = world.doctor();
    assert_eq!(found.finding("interface-ignored")["interface"], "eth1");
    let said = world.web.oci(&["--sysctl", "net.mptcp.nonesuch=1"]).fails_with(1);
    let host = Diagnosis::of(&sandbox, &[]);
    let reason = host.finding("hook-failed")["evidence"].as_str().unwrap().to_owned();
    assert!(reason.contains("nonesuch") && said.contains(&reason), "{reason}: {said}");
}

#[test]
fn doctor_names_interfaces_that_are_not_there_yet() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth7=backup", "--follow", "never"]).ok();
    world.doctor().is(&["interface-missing"], 1);
    world.sh("ip link add eth7 type veth peer name peer7; ip link set eth7 up; ip link set peer7 up");
    sandbox.settle(&ctr());
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

/// The commands are for the ledger and the policy that the doctor was told of.
#[test]
fn doctor_names_commands_with_its_own_global_options() {
    let sandbox = Sandbox::new();
    let mut world = World::wired(&sandbox, &Wiring::new().without_second_route());
    sandbox.write("/run/o ther.toml", "");
    let globals = ["--config", "/run/o ther.toml", "--state-dir", "/run/other"];
    let doctor = |target: &[&str]| Diagnosis::of(&sandbox, &[&globals, target].concat());
    // An agent would let it go before the doctor sees that it is dead.
    world.web.oci(&[&globals[..], &["--interface", "eth1=backup", "--follow", "never"]].concat()).ok();
    let id = world.web.id().to_owned();
    let found = doctor(&[&id]);
    found.is(&["route-missing"], 1);
    let command = found.command("route-missing");
    let begin = format!("mptcp-hook --config '/run/o ther.toml' --state-dir /run/other apply {id} ");
    assert!(command.starts_with(&begin), "{command}");
    world.mend(command);
    doctor(&[&id]).is_clean();
    world.web.kill();
    doctor(&[&id]).says("container-dead", "command", &format!("--state-dir /run/other release {id}"));
    world.mend(doctor(&[]).command("ledger-stale"));
    assert!(!doctor(&[]).has("ledger-stale"));
}

// --- sockets ----------------------------------------------------------------------------------------------------------

#[test]
fn doctor_tells_plain_tcp_from_mptcp() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    require("busybox", "busybox-static");
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let listener = sandbox.spawn_in(&ctr(), &["busybox", "nc", "-l", "-p", "7000"]);
    // A service that waits has nothing to do with a path from here.
    let found = world.wait_for("tcp-mixed");
    found.is_clean();
    found.says("tcp-mixed", "evidence", ":7000 LISTEN");
    // An address that is announced is there for it.
    world.sh("ip mptcp endpoint add 10.0.1.2 id 77 dev eth0 signal");
    let found = world.doctor();
    found.is(&["tcp-only"], 1);
    found.says("tcp-only", "evidence", ":7000 LISTEN");
    world.sh("ip mptcp endpoint delete id 77");
    world.doctor().is_clean();
    // Of a half-open connection nothing is known.
    world.sh("ip neigh replace 10.0.1.1 lladdr 02:00:00:00:00:99 dev eth0 nud permanent");
    let client = sandbox.spawn_in(world.paths.server(), &["busybox", "nc", "10.0.1.2", "7000"]);
    wait_until("a half-open connection", LIMIT, || !world.sh("ss -tnH state syn-recv").is_empty());
    let found = world.doctor();
    found.is_clean();
    found.says("tcp-mixed", "what", "1 sockets are plain TCP");
    drop(client);
    world.sh("ip neigh del 10.0.1.1 dev eth0");
    // A client of plain TCP has one path.
    let peer = sandbox.spawn_in(world.paths.server(), &["busybox", "nc", "-l", "-p", "7002", "-e", "sleep", "1000"]);
    let listens = || sandbox.sh_in(world.paths.server(), "ss -tnlH").contains(":7002");
    wait_until("a listener", LIMIT, listens);
    let client = sandbox.spawn_in(&ctr(), &["busybox", "nc", "10.0.0.1", "7002", "-e", "sleep", "1000"]);
    let is_up = || world.sh("ss -tnH state established").contains("10.0.0.1:7002");
    wait_until("a connection of plain TCP", LIMIT, is_up);
    let found = world.doctor();
    found.is(&["tcp-only"], 1);
    found.says("tcp-only", "evidence", "10.0.0.1:7002 ESTAB");
    drop((client, peer));
    wait_until("the client's end", LIMIT, || !world.doctor().has("tcp-only"));
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

/// Programs of one container that talk to each other by its address: packets stay inside, and no second path is missed.
#[test]
fn doctor_asks_nothing_of_connections_to_the_containers_own_address() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth0=subflow", "--interface", "eth1=backup"]).ok();
    let _server = Server::start(&sandbox, &ctr());
    let mut sender = Sender::start(&sandbox, &ctr(), [10, 0, 1, 2].into(), 1 << 30, Some(20_000));
    sender.wait_sent(1);
    let found = world.doctor();
    found.is_clean();
    let subflows = found.json["subflows"].as_array().unwrap();
    assert!(subflows.iter().any(|s| s["interface"] == "lo" && s["state"] == "ESTAB"), "{subflows:#?}");
    // Nor where a kernel opens one from eth1 that hangs.
    let hung = || world.sh("ss -tinH state syn-sent").contains("retrans:");
    let begin = Instant::now();
    while !hung() && begin.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(50));
    }
    world.doctor().is_clean();
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
        let found = Diagnosis::of(&sandbox, &target);
        found.json["subflows"].as_array().unwrap().iter().filter(|s| s["state"] == "ESTAB").count() == 2
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
    // The same peer, in IPv6's words.
    let found = Diagnosis::of(&sandbox, &[target, "--probe", "[::ffff:10.0.0.1]:5000"]);
    found.is_clean();
    assert!(found.has("probe-established"), "{:#}", found.json);
    assert_eq!(found.json["probe"]["subflows"].as_array().map(Vec::len), Some(2));
    let refused = sandbox.hook(&["doctor", target, "--probe", "[fe80::1%2]:5000"]).fails_with(2);
    assert!(refused.contains("link-local"), "{refused}");
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
    world.sh(STRANGERS);
    world.ask(1000);
    // IPv6 says no at once, IPv4 asks the link for the peer's own address.
    for (peer, evidence) in
        [("10.0.0.1:5000", "without an answer; 10.0.0.1 dev eth1"), ("[fd00::1]:5000", "no subflow from there")]
    {
        // What a probe has left hangs until the peer ends it, too.
        wait_until("an end of the last probe", LIMIT, || !world.doctor().has("subflow-stuck"));
        let found = Diagnosis::of(&sandbox, &[target, "--probe", peer]);
        found.is(&["route-missing", "route-missing", "probe-subflow-missing"], 1);
        assert_eq!(found.finding("probe-subflow-missing")["interface"], "eth1");
        found.says("probe-subflow-missing", "evidence", evidence);
    }
}

/// A peer that answers nothing is given up long before the kernel would.
#[test]
fn doctor_probes_a_peer_that_does_not_answer() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    // Nobody has this link address.
    world.sh("ip neigh replace 10.0.1.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent");
    let begin = Instant::now();
    let found = Diagnosis::of(&sandbox, &[world.web.id(), "--probe", "10.0.1.77:5000"]);
    let took = begin.elapsed();
    found.is(&["probe-failed"], 1);
    assert_eq!(found.json["probe"]["connected"], false);
    // Five seconds are given to it; the kernel would try for more than two minutes.
    assert!((Duration::from_secs(5)..Duration::from_secs(60)).contains(&took), "{took:?}");
}

/// A peer that hangs up before the second path is up: nothing is said of the path, nor of MPTCP.
#[test]
fn doctor_probes_a_peer_that_hangs_up() {
    fn world(sandbox: &Sandbox) -> World<'_> {
        let world = World::new(sandbox);
        world.web.oci(&["--interface", "eth1=backup"]).ok();
        // The path is never up: nobody has this link address, and nothing else is wrong with the gateway.
        world.sh("ip neigh replace 10.0.2.1 lladdr 02:00:00:00:00:77 dev eth1 nud permanent");
        world
    }
    let judge = |found: Diagnosis| {
        found.is(&["probe-peer-closed"], 0);
        found.says("probe-peer-closed", "what", "10.0.2.2");
        assert_eq!((&found.json["probe"]["connected"], &found.json["probe"]["mptcp"]), (&true.into(), &true.into()));
    };
    // A machine that is so slow that the path had its time before the peer hung up tries again, when nothing of that is left.
    let probe = |world: &World| {
        wait_for("a peer that hangs up first", LIMIT, || {
            world.wait_clean();
            let found = Diagnosis::of(world.sandbox, &[world.web.id(), "--probe", "10.0.0.1:5000"]);
            (!found.has("probe-subflow-missing")).then_some(found)
        })
    };
    // At once, and when it has got the line break.
    for bytes in [0, 1] {
        let sandbox = Sandbox::new();
        let world = world(&sandbox);
        let _server = Server::hanging_up_after(&sandbox, world.paths.server(), bytes);
        judge(probe(&world));
    }
    // By RST: the end of a server that has not accepted it.
    let sandbox = Sandbox::new();
    let world = world(&sandbox);
    let program = hook().display().to_string();
    let probe = || sandbox.spawn(&[&program, "doctor", "--json", world.web.id(), "--probe", "10.0.0.1:5000"]);
    // Not before a join is tried: then the probe has seen that the connection is MPTCP. The peer has a second from there
    // on, and a program that looked would take its time on a slow machine.
    let is_joining = || {
        let sockets = sandbox.inside(&ctr(), || std::fs::read_to_string("/proc/thread-self/net/tcp"));
        // From eth1's address to the server's, and the state: SYN sent.
        let is_join = |line: &str| line.contains(" 0202000A:") && line.contains(" 0100000A:1388 02 ");
        sockets.expect("the sockets").lines().any(is_join)
    };
    judge(wait_for("a peer that hangs up first", LIMIT, || {
        world.wait_clean();
        let server = Server::of_one(&sandbox, world.paths.server());
        let _accepted = Sender::idle(&sandbox, world.paths.server(), world.paths.address());
        let mut probe = probe();
        // Or it is over before anybody has seen the join, which is a try like one that was too slow.
        wait_until("a join", LIMIT, || is_joining() || !probe.is_running());
        drop(server);
        let found = Diagnosis::read(probe.wait(LIMIT));
        (!found.has("probe-subflow-missing")).then_some(found)
    }));
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
const ETC_HOOKS_D: &str = "/etc/containers/oci/hooks.d";

#[test]
fn doctor_of_a_host() {
    let sandbox = Sandbox::new();
    bare_host(&sandbox);
    let host = || Diagnosis::of(&sandbox, &[]);
    host().is(&["hook-none"], 0);
    let facts = host();
    let about: Vec<&str> =
        facts.json["facts"].as_array().unwrap().iter().map(|f| f["about"].as_str().unwrap()).collect();
    for fact in ["kernel", "MPTCP", "enabled", "congestion controls"] {
        assert!(about.contains(&fact), "{about:?}");
    }
    let kernel = Running::look();
    for (fact, sysctl) in [("schedulers", "available_schedulers"), ("path managers", "available_path_managers")] {
        assert_eq!(about.contains(&fact), kernel.has_sysctl(sysctl), "{fact}: {about:?}");
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
    // The administrator's directory alone, into which podman does not look by itself.
    sandbox.sh(&format!("mkdir -p {ETC_HOOKS_D} && mv {HOOKS_D}/mptcp-hook.json {ETC_HOOKS_D}"));
    let found = host();
    found.is(&["hook-dir-unseen"], 1);
    found.says("hook-dir-unseen", "what", ETC_HOOKS_D);
    found.says("hook-dir-unseen", "mend", HOOKS_D);
    // A stale one of the distribution's, which the administrator's of the same name overrides where podman is told of both.
    sandbox.sh(&format!("sed s,/usr/local/bin,/nowhere, {ETC_HOOKS_D}/mptcp-hook.json >{HOOKS_D}/mptcp-hook.json"));
    host().is(&["hook-path-missing", "hook-dir-unseen"], 1);
    let both = format!("[engine]\nhooks_dir = [\"{HOOKS_D}\", \"{ETC_HOOKS_D}\"]\n");
    sandbox.write("/etc/containers/containers.conf", &both);
    host().is_clean();
    sandbox.sh("rm -r /etc/containers/oci");
    host().is(&["hook-path-missing"], 1);
    sandbox.sh(&format!("rm -r /etc/containers; sed -i s,/nowhere,/usr/local/bin, {HOOKS_D}/mptcp-hook.json"));
    host().is_clean();
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
    // Elsewhere as well (podman 5), and so do the files that come later, until one says otherwise.
    sandbox.sh("mkdir -p /etc/containers/containers.conf.d");
    let tell = |file: &str, list: &str| sandbox.write(file, &format!("[engine]\nhooks_dir = [{list}]\n"));
    tell("/etc/containers/containers.conf", "\"/opt/hooks\", {append = true}");
    host().is_clean();
    tell("/etc/containers/containers.conf.d/1.conf", "\"/opt/more\"");
    host().is_clean();
    tell("/etc/containers/containers.conf.d/2.conf", "\"/opt/others\", {append = false}");
    let found = host();
    found.is(&["hook-dir-unseen"], 1);
    found.says("hook-dir-unseen", "evidence", "[\"/opt/others\"] in /etc/containers/containers.conf.d/2.conf");
    sandbox.sh("rm -r /etc/containers/containers.conf /etc/containers/containers.conf.d");
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

/// The host's own switch is no container's, but for one that is in the host's network namespace.
#[test]
fn doctor_of_a_host_that_has_mptcp_switched_off_for_itself() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let host = || Diagnosis::of(&sandbox, &[]);
    let off = || sandbox.sh("echo 0 >/proc/sys/net/mptcp/enabled");
    sandbox.patient_policy("host-namespace = \"allow\"\n");
    sandbox.sh("ip link add eth7 type veth peer name far7; ip addr add 10.0.7.2/24 dev eth7; ip link set eth7 up");
    let inside = Bare::in_netns(&sandbox, "inside", &Netns::Host);
    inside.oci(&["--interface", "eth7=subflow", "--follow", "never"]).ok();
    off();
    let found = host();
    assert!(found.has("mptcp-disabled") && !found.has("host-mptcp-disabled"), "{:#}", found.json);
    found.says("mptcp-disabled", "what", inside.id());
    assert_eq!(found.code, Some(1));
    world.mend(found.command("mptcp-disabled"));
    let found = host();
    assert!(!found.has("mptcp-disabled") && !found.has("host-mptcp-disabled"), "{:#}", found.json);
    sandbox.hook(&["release", inside.id()]).ok();
    off();
    let found = host();
    assert!(found.has("host-mptcp-disabled") && !found.has("mptcp-disabled"), "{:#}", found.json);
    world.doctor().is_clean();
}

#[test]
fn doctor_of_a_host_with_other_managers_and_a_damaged_ledger() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let program = sandbox.dir().join("mptcpd");
    // A program that goes by its arguments alone.
    sandbox.copy_program(&traffic_program(), &program);
    let program = program.display().to_string();
    let daemon = sandbox.spawn_in(&ctr(), &[program.as_str(), "serve", "--port", "5999"]);
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
    sandbox.no_policy();
    let program = hook().display().to_string();
    let script = format!(
        "ip link set lo up; ip link add eth1 type veth peer name peer1; ip link set eth1 up; ip link set peer1 up
         until ip -o link show dev eth1 | grep -q 'state UP'; do sleep 0.02; done
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
