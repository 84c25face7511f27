//! Endpoints, limits and settings of one network namespace on an upstream kernel, driven by states and by hand, without
//! a container runtime: what exactly is made, adopted, left alone, shown, undone.

mod common;

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use common::expectations::Running;
use common::*;
use mptcp_hook::deadline::Deadline;
use mptcp_hook::kernel::mptcp_org::MptcpOrg;
use mptcp_hook::kernel::netns::{Namespace, Visit};
use mptcp_hook::kernel::{Change, Kernel};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

impl World<'_> {
    /// All that the hook could have changed there.
    #[track_caller]
    fn kernel(&self) -> String {
        let shown = self.sandbox.ip_in(&ctr(), "mptcp endpoint show\nmptcp limits show\nroute show\n");
        let routes6 = self.sandbox.run_in(&ctr(), &["ip", "-6", "route", "show"]).ok();
        let settings = self.sandbox.inside(&ctr(), || {
            let entries =
                |directory: &str| fs::read_dir(directory).expect("settings").map(|entry| entry.expect("one").path());
            let tcp = |path: &PathBuf| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"tcp_"));
            let paths = entries("/proc/sys/net/mptcp").chain(entries("/proc/sys/net/ipv4").filter(tcp));
            // Some can be written and not be read.
            let line = |path: PathBuf| Some(format!("{} {}", path.display(), fs::read_to_string(&path).ok()?.trim()));
            paths.filter_map(line).collect::<Vec<_>>().join("\n")
        });
        [shown, settings, routes6].join("\n")
    }

    /// Nothing of [`World::kernel`] is different from `before`.
    #[track_caller]
    fn assert_kernel(&self, before: &str) {
        let now = self.kernel();
        let only = |a: &str, b: &str| -> Vec<String> {
            a.lines().filter(|line| !b.lines().any(|other| other == *line)).map(str::to_owned).collect()
        };
        assert!(now == before, "gone: {:#?}\nnew: {:#?}", only(before, &now), only(&now, before));
    }

    /// The endpoints as `ADDRESS FLAG FLAG... DEV`, sorted.
    #[track_caller]
    fn endpoints(&self) -> Vec<String> {
        let show = |e: Endpoint| format!("{} {} {}", e.address, e.flags.join(" "), e.dev.unwrap_or_default());
        let mut shown: Vec<String> = self.sandbox.endpoints(&ctr()).into_iter().map(show).collect();
        shown.sort();
        shown
    }

    /// `[subflows, add_addr_accepted]`.
    #[track_caller]
    fn limits(&self) -> [u64; 2] {
        let text = self.sandbox.ip_in(&ctr(), "mptcp limits show");
        let value = |name: &str| {
            let after = text.split(name).nth(1).unwrap_or_else(|| panic!("no {name} in {text}"));
            after.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{text}"))
        };
        [value("subflows"), value("add_addr_accepted")]
    }

    #[track_caller]
    fn sysctl(&self, key: &str) -> String {
        self.sandbox.sysctl(&ctr(), key).unwrap_or_else(|| panic!("no {key}"))
    }

    /// `mptcp-hook apply web ...` by hand.
    #[track_caller]
    fn by_hand(&self, arguments: &[&str]) -> Outcome {
        self.sandbox.hook(&[&["apply", self.web.id()], arguments].concat())
    }

    /// The entry of an interface in `status --json`.
    #[track_caller]
    fn interface(&self, name: &str) -> Value {
        let container = self.sandbox.status_of(self.web.id());
        let interfaces = container["interfaces"].as_array().expect("interfaces is a list");
        let found = interfaces.iter().find(|interface| interface["name"] == name);
        found.unwrap_or_else(|| panic!("no {name} in {container:#}")).clone()
    }

    /// Lets the container go; the namespace must be as `before` and the ledger empty.
    #[track_caller]
    fn release_restores(&self, before: &str) {
        self.sandbox.hook(&["release", self.web.id()]).ok();
        self.assert_kernel(before);
        self.sandbox.assert_ledger_is_empty();
    }
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

// --- endpoints and their flags --------------------------------------------------------------------------------------

#[test]
fn each_flag_becomes_an_endpoint_and_release_takes_it_back() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    for (flags, expected) in [
        ("backup", "10.0.2.2 backup subflow eth1"),
        ("subflow", "10.0.2.2 subflow eth1"),
        ("signal", "10.0.2.2 signal eth1"),
        ("signal,backup", "10.0.2.2 backup signal eth1"),
        ("subflow,signal", "10.0.2.2 signal subflow eth1"),
        ("subflow,fullmesh", "10.0.2.2 fullmesh subflow eth1"),
        ("subflow,backup,fullmesh", "10.0.2.2 backup fullmesh subflow eth1"),
        ("0x101003", "10.0.2.2 backup subflow eth1"),
        ("1052675", "10.0.2.2 backup subflow eth1"),
    ] {
        world.web.oci(&["--interface", &format!("eth1={flags}")]).ok();
        assert_eq!(world.endpoints(), [expected], "{flags}");
        assert_eq!(world.interface("eth1")["state"], "applied");
        world.release_restores(&before);
    }
    // iproute2 may not know the newest flag by name.
    let outcome = world.web.oci(&["--interface", "eth1=laminar"]);
    if Running::look().has_flag("laminar") {
        outcome.ok();
        assert_eq!(world.interface("eth1")["flags"], json!(["laminar"]));
        assert_eq!(sandbox.endpoints(&ctr()).len(), 1);
        world.release_restores(&before);
    } else {
        // The kernel has said yes.
        let message = outcome.fails_with(1);
        assert!(message.contains("laminar") && message.contains("nothing was changed"), "{message}");
        world.assert_kernel(&before);
        sandbox.assert_ledger_is_empty();
    }
}

#[test]
fn flags_that_make_no_endpoint() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    for (flags, shown) in [
        ("off", "off"),
        ("default", "default"),
        ("0x80000", "off"),
        ("0x81003", "off"),
        ("0x1003", "default"),
        ("0", "default"),
    ] {
        world.web.oci(&["--interface", &format!("eth1={flags}")]).ok();
        world.assert_kernel(&before);
        let interface = world.interface("eth1");
        assert_eq!((&interface["flags"], &interface["state"]), (&json!([shown]), &json!("applied")), "{flags}");
        world.release_restores(&before);
    }
    let handover = world.web.oci(&["--interface", "eth1=0x201003"]);
    assert!(handover.stderr.contains("handover") && handover.stderr.contains("eth1"), "{handover}");
    assert_eq!(handover.code, Some(2), "{handover}");
    world.assert_kernel(&before);
}

#[test]
fn off_takes_our_endpoint_away_and_warns_of_others() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    world.web.oci(&["--interface", "eth1=backup", "--interface", "eth0=subflow"]).ok();
    assert_eq!(world.endpoints().len(), 2);
    world.by_hand(&["--interface", "eth1=off"]).ok();
    assert_eq!(world.endpoints(), ["10.0.1.2 subflow eth0"]);
    assert_eq!(world.interface("eth1")["flags"], json!(["off"]));
    world.by_hand(&["--interface", "eth0=default"]).ok();
    assert_eq!(world.endpoints(), [""; 0]);
    world.release_restores(&before);

    world.sh("ip mptcp endpoint add 10.0.2.2 id 7 dev eth1 subflow");
    let outcome = world.web.oci(&["--interface", "eth1=off", "--interface", "eth0=off"]);
    for part in ["eth1 is off", "10.0.2.2", "id 7", "eth0 is off", "default route"] {
        assert!(outcome.stderr.contains(part), "`{part}` is not in {outcome}");
    }
    outcome.ok();
    assert_eq!(world.endpoints(), ["10.0.2.2 subflow eth1"]);
    sandbox.hook(&["release", world.web.id()]).ok();
    assert_eq!(world.endpoints(), ["10.0.2.2 subflow eth1"]);
}

#[test]
fn names_and_globs() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    world.web.oci(&["--interface", "eth*=subflow", "--interface", "eth1=backup"]).ok();
    assert_eq!(world.endpoints(), ["10.0.1.2 subflow eth0", "10.0.2.2 backup subflow eth1"]);
    world.release_restores(&before);

    world.web.oci(&["--interface", "e?h1=backup"]).ok();
    assert_eq!(world.endpoints(), ["10.0.2.2 backup subflow eth1"]);
    world.release_restores(&before);

    let two = world.web.oci(&["--interface", "eth*=subflow", "--interface", "*1=backup"]);
    assert_eq!(two.code, Some(2), "{two}");
    assert!(two.stderr.contains("eth*") && two.stderr.contains("*1") && two.stderr.contains("eth1"), "{two}");
    world.assert_kernel(&before);
    sandbox.assert_ledger_is_empty();
}

#[test]
fn the_weightier_source_wins() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    sandbox.patient_policy("[defaults.interfaces]\n\"eth*\" = \"fullmesh\"\n[defaults.limits]\nsubflows = 3\n");
    let web = Bare::in_netns(&sandbox, "author", &ctr()).annotation("mptcp-hook/interface.eth1", "signal");
    web.oci(&[]).ok();
    assert_eq!(world.endpoints(), ["10.0.1.2 fullmesh subflow eth0", "10.0.2.2 signal eth1"]);
    sandbox.hook(&["release", web.id()]).ok();
    web.oci(&["--interface", "eth*=subflow"]).ok();
    assert_eq!(world.endpoints(), ["10.0.1.2 subflow eth0", "10.0.2.2 subflow eth1"]);
    sandbox.hook(&["release", web.id()]).ok();

    let file = format!("/etc/mptcp-hook/containers.d/{}.toml", web.id());
    sandbox.write(&file, "[interfaces]\neth1 = \"backup\"\n");
    web.oci(&["--interface", "eth*=subflow"]).ok();
    assert_eq!(world.endpoints(), ["10.0.1.2 subflow eth0", "10.0.2.2 backup subflow eth1"]);
    sandbox.hook(&["apply", web.id(), "--interface", "eth1=off"]).ok();
    assert_eq!(world.endpoints(), ["10.0.1.2 subflow eth0"]);
    sandbox.hook(&["release", web.id()]).ok();
    assert_eq!(world.endpoints(), [""; 0]);
}

// --- what was there before ------------------------------------------------------------------------------------------

#[test]
fn an_equal_endpoint_of_somebody_else_is_adopted_and_stays() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.sh("ip mptcp endpoint add 10.0.2.2 id 5 dev eth1 subflow backup");
    let before = world.kernel();
    let outcome = world.web.oci(&["--interface", "eth1=backup"]);
    assert!(outcome.stderr.contains("nothing had to be changed") || outcome.code == Some(0), "{outcome}");
    world.assert_kernel(&before);
    assert_eq!(world.interface("eth1")["endpoints"], json!([{ "id": 5, "address": "10.0.2.2" }]));
    world.release_restores(&before);
}

#[test]
fn another_flag_is_changed_in_place_and_given_back() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    for (theirs, wish, changed) in [
        ("subflow", "backup", "10.0.2.2 backup subflow eth1"),
        ("subflow backup", "subflow", "10.0.2.2 subflow eth1"),
        // Leaving fullmesh out would close their live subflows.
        ("subflow fullmesh", "backup", "10.0.2.2 backup fullmesh subflow eth1"),
        ("subflow", "subflow,backup,fullmesh", "10.0.2.2 backup fullmesh subflow eth1"),
        ("signal", "signal,backup", "10.0.2.2 backup signal eth1"),
    ] {
        world.sh(&format!(
            "ip mptcp endpoint add 10.0.2.2 id 9 dev eth1 {theirs}; ip mptcp limits set subflows 4 add_addr_accepted 2"
        ));
        let before = world.kernel();
        world.web.oci(&["--interface", &format!("eth1={wish}")]).ok();
        assert_eq!(world.endpoints(), [changed], "{theirs} to {wish}");
        assert_eq!(sandbox.endpoints(&ctr())[0].id, 9, "it was replaced");
        world.release_restores(&before);
        world.sh("ip mptcp endpoint flush; ip mptcp limits set subflows 2 add_addr_accepted 0");
    }
}

#[test]
fn an_endpoint_that_cannot_be_changed_is_named_and_nothing_is_changed() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    for (theirs, wish) in [
        ("10.0.2.2 id 3 dev eth1 signal", "backup"),
        ("10.0.2.2 id 3 dev eth1 subflow", "signal"),
        ("10.0.2.2 id 3 dev eth0 subflow", "subflow"),
    ] {
        world.sh(&format!("ip mptcp endpoint add {theirs}"));
        let before = world.kernel();
        let arguments =
            ["--interface", &format!("eth1={wish}"), "--interface", "eth0=subflow", "--sysctl", "stale_loss_cnt=9"];
        let outcome = world.web.oci(&arguments);
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        for part in [world.web.id(), "eth1", "10.0.2.2", "id 3", "delete"] {
            assert!(outcome.stderr.contains(part), "`{part}` is not in {outcome}");
        }
        world.assert_kernel(&before);
        sandbox.assert_ledger_is_empty();
        world.sh("ip mptcp endpoint flush");
    }
}

#[test]
fn endpoints_beside_ours_are_left_alone() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    // One without an interface, one with a port of its own, one for an address that nobody has.
    world.sh("ip mptcp endpoint add 10.0.1.2 id 1 subflow
         ip mptcp endpoint add 10.0.2.2 port 5001 id 2 dev eth1 signal
         ip mptcp endpoint add 192.0.2.1 id 3 subflow");
    let before = world.kernel();
    let outcome = world.web.oci(&["--interface", "eth0=subflow", "--interface", "eth1=backup"]);
    assert!(outcome.stderr.contains("bound to no interface"), "{outcome}");
    outcome.ok();
    let now = world.endpoints();
    assert_eq!(now.len(), 4, "{now:?}");
    assert!(now.contains(&"10.0.2.2 backup subflow eth1".to_owned()), "{now:?}");
    world.release_restores(&before);
}

/// Nothing is flushed, nothing that somebody did since is undone.
#[test]
fn what_somebody_did_since_stays() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let arguments = ["--interface", "eth1=backup", "--sysctl", "stale_loss_cnt=9", "--limit", "subflows=5"];
    world.web.oci(&arguments).ok();
    world.sh("ip mptcp endpoint delete id $(ip mptcp endpoint show | sed -n 's/.*id \\([0-9]*\\).*/\\1/p')
         ip mptcp endpoint add 10.0.2.2 id 77 dev eth1 signal
         ip mptcp limits set subflows 6 add_addr_accepted 3
         echo 12 >/proc/sys/net/mptcp/stale_loss_cnt");
    let theirs = world.kernel();
    let outcome = sandbox.hook(&["release", world.web.id()]);
    assert!(outcome.stderr.contains("stale_loss_cnt") && outcome.stderr.contains("12"), "{outcome}");
    outcome.ok();
    world.assert_kernel(&theirs);
    sandbox.assert_ledger_is_empty();
    let conflicts = sandbox.conflicts();
    let drift = conflicts.iter().find(|c| c["outcome"] == "drift" && c["key"] == "net.mptcp.stale_loss_cnt");
    let drift = drift.unwrap_or_else(|| panic!("no drift in {conflicts:#?}"));
    assert_eq!((&drift["wanted"], &drift["kept"]), (&json!("9"), &json!("12")));
}

// --- which addresses ------------------------------------------------------------------------------------------------

/// Ten interfaces: the exactly named one has its place although it is the last.
#[test]
fn of_more_than_eight_exact_names_come_before_globs() {
    let sandbox = Sandbox::new();
    sandbox.sh("ip netns add ctr; ip netns add far; ip -n ctr link set lo up");
    let mut batch = String::new();
    for n in 0..10 {
        batch += &format!(
            "link add eth{n} type veth peer name far{n} netns far\naddr add 10.1.{n}.2/24 dev eth{n}\nlink set eth{n} up\n"
        );
    }
    sandbox.sh(&format!("ip -n ctr -batch - <<'END'\n{batch}END"));
    let web = Bare::in_netns(&sandbox, "web", &ctr());
    let outcome = web.oci(&["--interface", "eth*=subflow", "--interface", "eth9=backup"]);
    outcome.ok();
    let mut on: Vec<String> = sandbox.endpoints(&ctr()).into_iter().filter_map(|e| e.dev).collect();
    on.sort();
    assert_eq!(on, ["eth0", "eth1", "eth2", "eth3", "eth4", "eth5", "eth6", "eth9"]);
    let container = sandbox.status_of(web.id());
    let state_of = |name: &str| {
        let interfaces = container["interfaces"].as_array().expect("a list");
        let found = interfaces.iter().find(|i| i["name"] == name).unwrap_or_else(|| panic!("{container:#}"));
        (found["state"].as_str().unwrap_or_default().to_owned(), found["reason"].to_string())
    };
    for name in ["eth7", "eth8"] {
        let (state, reason) = state_of(name);
        assert_eq!(state, "ignored");
        assert!(reason.contains("at most 8"), "{reason}");
    }
    assert_eq!(state_of("eth9").0, "applied");
    assert!(sandbox.sh_in(&ctr(), "ip mptcp limits show").contains("subflows 8"));

    // One leaves: its place is free for the next.
    sandbox.hook(&["apply", web.id(), "--interface", "eth0=off"]).ok();
    assert_eq!(sandbox.endpoints_on(&ctr(), "eth0"), []);
    assert_eq!(sandbox.endpoints_on(&ctr(), "eth7").len(), 1);
    sandbox.hook(&["release", web.id()]).ok();
    assert_eq!(sandbox.endpoints(&ctr()), []);
    sandbox.assert_ledger_is_empty();
}

/// One interface with many addresses must not take the places of the other, nor IPv4 those of IPv6.
#[test]
fn of_more_than_eight_each_interface_and_family_gets_one_first() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().dual_stack());
    for n in 1..=10 {
        world.sh(&format!("ip addr add 10.7.{n}.2/24 dev eth0"));
    }
    let outcome = world.web.oci(&["--interface", "eth*=subflow"]);
    assert!(outcome.stderr.contains("at most 8"), "{outcome}");
    outcome.ok();
    let endpoints = world.endpoints();
    assert_eq!(endpoints.len(), 8);
    for one in ["10.0.1.2 subflow eth0", "fd00:1::2 subflow eth0", "10.0.2.2 subflow eth1", "fd00:2::2 subflow eth1"] {
        assert!(endpoints.contains(&one.to_owned()), "no {one} in {endpoints:?}");
    }
    let eth0 = world.interface("eth0");
    assert_eq!((&eth0["state"], eth0["endpoints"].as_array().map(Vec::len)), (&json!("applied"), Some(6)));
    assert!(eth0["reason"].as_str().is_some_and(|reason| reason.contains("10.7.10.2")), "{eth0:#}");
}

/// Other people's endpoints count, too.
#[test]
fn foreign_endpoints_take_places() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    for n in 1..=7 {
        world.sh(&format!("ip mptcp endpoint add 192.0.2.{n} subflow"));
    }
    world.web.oci(&["--interface", "eth*=subflow", "--interface", "eth1=backup"]).ok();
    assert_eq!(sandbox.endpoints_on(&ctr(), "eth1").len(), 1);
    assert_eq!(world.interface("eth0")["state"], "ignored");
    sandbox.hook(&["release", world.web.id()]).ok();
    assert_eq!(world.endpoints().len(), 7);
}

#[test]
fn addresses_that_no_subflow_can_use_are_left_out() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    // The peer answers for fd00:5::9: a duplicate.
    sandbox.sh_in(world.paths.server(), "ip addr add fd00:5::9/64 dev eth1 nodad");
    world.sh("ip addr add 169.254.7.7/16 dev eth1
         ip addr add 10.8.8.8/32 dev eth1 scope link
         ip addr add 10.8.8.9/32 dev eth1 scope host
         ip addr add 10.8.7.2/24 dev eth1 valid_lft 1000 preferred_lft 0
         ip addr add fd00:6::2/64 dev eth1 nodad valid_lft 1000 preferred_lft 0
         echo 2 >/proc/sys/net/ipv6/conf/eth1/use_tempaddr
         ip addr add fd00:7::2/64 dev eth1 nodad mngtmpaddr valid_lft 100000 preferred_lft 50000
         ip addr add fd00:5::9/64 dev eth1");
    wait_until("the duplicate and the temporary address", LIMIT, || {
        let addresses = world.sh("ip -6 addr show dev eth1");
        addresses.contains("dadfailed") && addresses.contains("temporary")
    });
    let outcome = world.web.oci(&["--interface", "eth1=backup"]);
    outcome.ok();
    assert_eq!(world.endpoints(), ["10.0.2.2 backup subflow eth1", "fd00:7::2 backup subflow eth1"]);
}

#[test]
fn a_tentative_address_that_is_permanent_is_used_at_once() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.sh("echo 1000 >/proc/sys/net/ipv6/conf/eth1/dad_transmits; ip addr add fd00:9::2/64 dev eth1");
    assert!(world.sh("ip -6 addr show dev eth1").contains("tentative"));
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    assert!(world.endpoints().contains(&"fd00:9::2 backup subflow eth1".to_owned()), "{:?}", world.endpoints());
    assert!(world.sh("ip -6 addr show dev eth1").contains("tentative"), "the address was not tentative any more");
}

#[test]
fn an_address_that_was_replaced_takes_its_endpoint_with_it() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.endpoints();
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    world.sh("ip addr del 10.0.2.2/24 dev eth1; ip addr add 10.0.2.77/24 dev eth1; ip route add default via 10.0.2.1 dev eth1 metric 200");
    let eth1 = world.interface("eth1");
    assert_eq!(eth1["state"], "drifted", "{eth1:#}");
    assert!(eth1["reason"].as_str().is_some_and(|reason| reason.contains("10.0.2.2")), "{eth1:#}");

    world.web.oci(&["--interface", "eth1=backup"]).ok();
    assert_eq!(world.endpoints(), ["10.0.2.77 backup subflow eth1"]);
    let eth1 = world.interface("eth1");
    assert_eq!((&eth1["state"], &eth1["route"]), (&json!("applied"), &json!("ok")), "{eth1:#}");
    sandbox.hook(&["release", world.web.id()]).ok();
    assert_eq!(world.endpoints(), before);
}

// --- not there yet --------------------------------------------------------------------------------------------------

#[test]
fn what_is_not_there_yet_is_pending_and_applied_later() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.sh("ip addr del 10.0.2.2/24 dev eth1");
    let arguments = ["--interface", "eth1=backup", "--interface", "wlan0=subflow", "--interface", "wwan*=backup"];
    let outcome = world.web.oci(&arguments);
    for part in ["eth1", "wlan0", "wwan*", "pending"] {
        assert!(outcome.stderr.contains(part), "`{part}` is not in {outcome}");
    }
    outcome.ok();
    assert_eq!(world.endpoints(), [""; 0]);
    for (name, why) in [("eth1", "no usable address"), ("wlan0", "no such interface"), ("wwan*", "no such interface")] {
        let interface = world.interface(name);
        assert_eq!((&interface["state"], &interface["route"]), (&json!("pending"), &json!("unknown")), "{interface:#}");
        assert!(interface["reason"].as_str().is_some_and(|reason| reason.contains(why)), "{interface:#}");
    }
    world.sh("ip addr add 10.0.2.2/24 dev eth1
         ip link add wlan0 type veth peer name far0; ip addr add 10.3.0.2/24 dev wlan0; ip link set wlan0 up
         ip link add wwan3 type veth peer name far3; ip addr add 10.4.0.2/24 dev wwan3; ip link set wwan3 up");
    world.web.oci(&arguments).ok();
    assert_eq!(
        world.endpoints(),
        ["10.0.2.2 backup subflow eth1", "10.3.0.2 subflow wlan0", "10.4.0.2 backup subflow wwan3"]
    );
    for name in ["eth1", "wlan0", "wwan3"] {
        assert_eq!(world.interface(name)["state"], "applied");
    }
    sandbox.hook(&["release", world.web.id()]).ok();
    assert_eq!(world.endpoints(), [""; 0]);
}

#[test]
fn an_interface_that_goes_away_and_comes_back() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    world.sh("ip link del eth1");
    assert_eq!(world.interface("eth1")["state"], "drifted");
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    assert_eq!(world.interface("eth1")["state"], "pending");
    assert_eq!(world.endpoints(), [""; 0], "the endpoint of an address that is gone");
    world.sh("ip link add eth1 type veth peer name far1; ip addr add 10.0.2.2/24 dev eth1; ip link set eth1 up");
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    assert_eq!(world.endpoints(), ["10.0.2.2 backup subflow eth1"]);
    sandbox.hook(&["release", world.web.id()]).ok();
    assert_eq!(world.endpoints(), [""; 0]);
}

// --- routes ---------------------------------------------------------------------------------------------------------

#[test]
fn a_missing_route_is_said_everywhere_and_seen_when_it_comes() {
    let sandbox = Sandbox::new();
    let journal = Journal::listen(&sandbox);
    let world = World::wired(&sandbox, &Wiring::new().without_second_route());
    let outcome = world.web.oci(&["--interface", "eth1=backup", "--interface", "eth0=subflow"]);
    assert!(outcome.stderr.contains("eth1: no route out"), "{outcome}");
    outcome.ok();
    assert!(journal.entries().iter().any(|entry| entry.contains("eth1: no route out")));
    assert_eq!(
        (&world.interface("eth1")["route"], &world.interface("eth0")["route"]),
        (&json!("missing"), &json!("ok"))
    );
    assert_eq!(world.interface("eth1")["state"], "applied");
    let table = sandbox.hook(&["status"]).ok();
    assert!(table.contains("missing") && table.contains("no route out"), "{table}");

    // A rule for the address with a table of its own serves as well as a default route.
    world.sh("ip rule add from 10.0.2.2 table 42; ip route add default via 10.0.2.1 dev eth1 table 42");
    assert_eq!(world.interface("eth1")["route"], "ok");
    let table = sandbox.hook(&["status"]).ok();
    assert!(!table.contains("no route out"), "{table}");
    world.sh("ip rule del from 10.0.2.2 table 42");
    assert_eq!(world.interface("eth1")["route"], "missing");
    world.sh("ip route add default via 10.0.2.1 dev eth1 metric 200");
    assert_eq!(world.interface("eth1")["route"], "ok");
}

// --- limits ---------------------------------------------------------------------------------------------------------

#[test]
fn limits_are_what_the_endpoints_need_and_never_less_than_before() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.sh("ip mptcp limits set subflows 1 add_addr_accepted 0");
    let before = world.kernel();
    world.web.oci(&["--interface", "eth*=subflow"]).ok();
    assert_eq!(world.limits(), [2, 0]);
    world.release_restores(&before);
    world.web.oci(&["--interface", "eth*=signal"]).ok();
    assert_eq!(world.limits(), [2, 0]);
    world.release_restores(&before);
    world.web.oci(&["--interface", "eth1=fullmesh"]).ok();
    assert_eq!(world.limits(), [1, 1]);
    world.release_restores(&before);
    world.web.oci(&["--limit", "subflows=7", "--limit", "add_addr_accepted=0x4"]).ok();
    assert_eq!(world.limits(), [7, 4]);
    world.release_restores(&before);

    world.sh("ip mptcp limits set subflows 6 add_addr_accepted 5");
    let before = world.kernel();
    world.web.oci(&["--interface", "eth*=fullmesh"]).ok();
    assert_eq!(world.limits(), [6, 5]);
    world.release_restores(&before);
}

#[test]
fn a_limit_below_the_present_one_is_a_conflict() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.sh("ip mptcp limits set subflows 6 add_addr_accepted 5");
    let before = world.kernel();
    let wish = ["--limit", "subflows=3", "--interface", "eth1=backup"];
    let outcome = world.web.oci(&wish);
    assert_eq!(outcome.code, Some(3), "{outcome}");
    assert!(outcome.stderr.contains("subflows = 3") && outcome.stderr.contains('6'), "{outcome}");
    world.assert_kernel(&before);
    let conflict = sandbox.conflicts().pop().expect("a conflict");
    assert_eq!(conflict["key"], "limit.subflows");
    assert_eq!(
        (&conflict["wanted"], &conflict["kept"], &conflict["outcome"]),
        (&json!("3"), &json!("6"), &json!("refused"))
    );

    world.web.oci(&[&wish[..], &["--on-conflict", "warn"]].concat()).ok();
    assert_eq!(world.limits(), [6, 5]);
    world.release_restores(&before);
    world.web.oci(&[&wish[..], &["--on-conflict", "override"]].concat()).ok();
    assert_eq!(world.limits(), [3, 5]);
    world.release_restores(&before);
}

// --- settings of the namespace --------------------------------------------------------------------------------------

#[test]
fn everything_is_put_back_exactly() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().dual_stack());
    world.sh("ip mptcp endpoint add 10.0.1.2 id 4 dev eth0 subflow; ip mptcp endpoint add 192.0.2.9 id 8 signal");
    let before = world.kernel();
    world
        .web
        .oci(&[
            "--interface",
            "eth0=backup",
            "--interface",
            "eth1=fullmesh",
            "--limit",
            "subflows=7",
            "--sysctl",
            "stale_loss_cnt=0x10",
            "--sysctl",
            "net.mptcp.add_addr_timeout=010",
            "--sysctl",
            "net/mptcp/allow_join_initial_addr_port=0",
            "--sysctl",
            "net.ipv4.tcp_rmem=8192  131072\t8388608",
            "--sysctl",
            "net.ipv4.tcp_ecn=1",
            "--sysctl",
            "path_manager=kernel",
        ])
        .ok();
    assert_eq!(world.sysctl("net/mptcp/stale_loss_cnt"), "16");
    assert_eq!(world.sysctl("net/mptcp/add_addr_timeout"), "8");
    assert_eq!(world.sysctl("net/ipv4/tcp_rmem"), "8192\t131072\t8388608");
    assert_eq!(world.endpoints().len(), 5);
    let settings = sandbox.status_of(world.web.id())["settings"].clone();
    let settings = settings.as_array().expect("settings is a list");
    assert_eq!(settings.len(), 6, "{settings:#?}");
    assert!(settings.iter().all(|s| s["scope"] == "netns" && s["outcome"] == "applied"), "{settings:#?}");
    assert_eq!(sandbox.status()["settings"], json!([]), "a namespace's own value is no host setting");
    world.release_restores(&before);
}

#[test]
fn an_empty_value_is_put_back() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let key = "net/ipv4/ip_local_reserved_ports";
    assert_eq!(world.sysctl(key), "");
    world.web.oci(&["--sysctl", "net.ipv4.ip_local_reserved_ports=9000"]).ok();
    assert_eq!(world.sysctl(key), "9000");
    sandbox.hook(&["release", world.web.id()]).ok();
    assert_eq!(world.sysctl(key), "");
    sandbox.assert_ledger_is_empty();
}

#[test]
fn pm_type_and_path_manager_are_one_setting() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    let split = world.web.oci(&["--sysctl", "pm_type=1", "--sysctl", "path_manager=kernel"]);
    assert_eq!(split.code, Some(2), "{split}");
    world.assert_kernel(&before);
    world.web.oci(&["--sysctl", "pm_type=1", "--sysctl", "path_manager=userspace"]).ok();
    assert_eq!(world.sysctl("net/mptcp/pm_type"), "1");
    if Running::look().has_sysctl("path_manager") {
        assert_eq!(world.sysctl("net/mptcp/path_manager"), "userspace");
    }
    world.release_restores(&before);
    let outcome = world.web.oci(&["--sysctl", "pm_type=1", "--interface", "eth1=backup"]);
    assert!(outcome.stderr.contains("path manager"), "{outcome}");
    outcome.ok();
    world.release_restores(&before);
}

/// What others rely on in a shared namespace: the first to leave takes nothing away, and a different wish is a conflict.
#[test]
fn siblings_in_one_namespace() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    let mut first = Bare::in_netns(&sandbox, "first", &ctr());
    let mut second = Bare::in_netns(&sandbox, "second", &ctr());
    first.oci(&["--interface", "eth1=backup", "--limit", "subflows=4", "--sysctl", "stale_loss_cnt=9"]).ok();
    second.oci(&["--interface", "eth1=backup", "--limit", "subflows=6", "--sysctl", "stale_loss_cnt=9"]).ok();
    assert_eq!(world.limits(), [6, 0]);
    for (wish, key) in [
        (["--interface", "eth1=subflow"], "interface.eth1"),
        (["--sysctl", "stale_loss_cnt=5"], "net.mptcp.stale_loss_cnt"),
    ] {
        let state = world.kernel();
        let outcome = world.web.oci(&wish);
        assert_eq!(outcome.code, Some(3), "{outcome}");
        assert!(outcome.stderr.contains(first.id()) && outcome.stderr.contains(second.id()), "{outcome}");
        let conflict = sandbox.conflicts().pop().expect("a conflict");
        assert_eq!((&conflict["key"], &conflict["outcome"]), (&json!(key), &json!("refused")), "{conflict:#}");
        assert_eq!(conflict["holders"].as_array().map(Vec::len), Some(2), "{conflict:#}");
        world.assert_kernel(&state);
    }
    first.stop().ok();
    assert_eq!(world.endpoints(), ["10.0.2.2 backup subflow eth1"]);
    assert_eq!(world.limits(), [6, 0]);
    assert_eq!(world.sysctl("net/mptcp/stale_loss_cnt"), "9");
    second.stop().ok();
    world.assert_kernel(&before);
    sandbox.assert_ledger_is_empty();
}

/// One overrides what a sibling relies on, and leaves: the sibling has its own back.
#[test]
fn an_override_among_siblings_is_given_back() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    let mut first = Bare::in_netns(&sandbox, "first", &ctr());
    let mut second = Bare::in_netns(&sandbox, "second", &ctr());
    first.oci(&["--interface", "eth1=backup", "--sysctl", "stale_loss_cnt=9"]).ok();
    let held = world.kernel();
    second.oci(&["--interface", "eth1=subflow", "--sysctl", "stale_loss_cnt=5", "--on-conflict", "override"]).ok();
    assert_eq!(world.endpoints(), ["10.0.2.2 subflow eth1"]);
    assert_eq!(world.sysctl("net/mptcp/stale_loss_cnt"), "5");
    assert!(sandbox.conflicts().iter().all(|conflict| conflict["outcome"] == "overrode"));
    second.stop().ok();
    world.assert_kernel(&held);
    first.stop().ok();
    world.assert_kernel(&before);
    sandbox.assert_ledger_is_empty();
}

/// The overridden one leaves first: what is left is the overrider's, and in the end everything is as before.
#[test]
fn an_overridden_sibling_that_leaves_first_takes_nothing_along() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    let mut first = Bare::in_netns(&sandbox, "first", &ctr());
    let mut second = Bare::in_netns(&sandbox, "second", &ctr());
    first.oci(&["--interface", "eth1=backup", "--sysctl", "stale_loss_cnt=9"]).ok();
    second.oci(&["--interface", "eth1=subflow", "--sysctl", "stale_loss_cnt=5", "--on-conflict", "override"]).ok();
    first.stop().ok();
    assert_eq!(world.endpoints(), ["10.0.2.2 subflow eth1"]);
    assert_eq!(world.sysctl("net/mptcp/stale_loss_cnt"), "5");
    assert!(sandbox.conflicts().iter().all(|conflict| conflict["outcome"] == "overrode"), "{:#?}", sandbox.conflicts());
    second.stop().ok();
    world.assert_kernel(&before);
    sandbox.assert_ledger_is_empty();
}

/// Three that override one another within a second: the newest that is left comes back, whatever they are called.
#[test]
fn of_several_siblings_the_newest_comes_back() {
    for names in [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]] {
        let sandbox = Sandbox::new();
        let world = World::new(&sandbox);
        let before = world.kernel();
        let mut members = names.map(|name| Bare::in_netns(&sandbox, name, &ctr()));
        let mut states = Vec::new();
        for (member, (flags, value)) in members.iter().zip([("subflow", "5"), ("backup", "7"), ("subflow", "9")]) {
            let wish = ["--interface", &format!("eth1={flags}"), "--sysctl", &format!("stale_loss_cnt={value}")];
            member.oci(&[&wish[..], &["--on-conflict", "override"]].concat()).ok();
            assert_eq!(world.sysctl("net/mptcp/stale_loss_cnt"), value);
            states.push(world.kernel());
        }
        let conflicts = sandbox.conflicts();
        members[2].stop().ok();
        world.assert_kernel(&states[1]);
        // The one whose value is not in force takes nothing along, nor is that anybody's drift.
        members[0].stop().ok();
        world.assert_kernel(&states[1]);
        assert_eq!(sandbox.conflicts(), conflicts);
        members[1].stop().ok();
        world.assert_kernel(&before);
        sandbox.assert_ledger_is_empty();
    }
}

/// The clock was an hour ahead when the first one was set up, and has been set right since.
#[test]
fn of_several_siblings_the_newest_comes_back_whatever_the_clock_says() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    let mut members = ["a", "b", "c"].map(|name| Bare::in_netns(&sandbox, name, &ctr()));
    let mut states = Vec::new();
    for (member, (flags, value)) in members.iter().zip([("subflow", "5"), ("backup", "7"), ("subflow", "9")]) {
        let wish = ["--interface", &format!("eth1={flags}"), "--sysctl", &format!("stale_loss_cnt={value}")];
        member.oci(&[&wish[..], &["--on-conflict", "override"]].concat()).ok();
        if states.is_empty() {
            sandbox.sh("f=$(ls /run/mptcp-hook/containers/*)
                jq -c '.time += 3600000000000' $f >/run/edited; cat /run/edited >$f");
        }
        states.push(world.kernel());
    }
    members[2].stop().ok();
    world.assert_kernel(&states[1]);
    members[1].stop().ok();
    world.assert_kernel(&states[0]);
    members[0].stop().ok();
    world.assert_kernel(&before);
    sandbox.assert_ledger_is_empty();
}

/// Somebody else's endpoint that two siblings have adopted goes back to its owner's flags with the last of them.
#[test]
fn an_adopted_endpoint_of_two_siblings_is_given_back_by_the_last() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world
        .sh("ip mptcp endpoint add 10.0.2.2 id 5 dev eth1 subflow; ip mptcp limits set subflows 4 add_addr_accepted 1");
    let before = world.kernel();
    let mut members = ["first", "second", "third"].map(|name| Bare::in_netns(&sandbox, name, &ctr()));
    for member in &members {
        member.oci(&["--interface", "eth1=backup", "--limit", "subflows=6"]).ok();
    }
    members[1].stop().ok();
    assert_eq!((world.endpoints(), world.limits()), (strings(&["10.0.2.2 backup subflow eth1"]), [6, 1]));
    members[0].stop().ok();
    assert_eq!((world.endpoints(), world.limits()), (strings(&["10.0.2.2 backup subflow eth1"]), [6, 1]));
    members[2].stop().ok();
    world.assert_kernel(&before);
    sandbox.assert_ledger_is_empty();
}

/// The one who asked for the highest limit leaves: what the others asked for is left.
#[test]
fn limits_shrink_to_what_the_remaining_siblings_asked_for() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    let mut members = ["a", "b", "c"].map(|name| Bare::in_netns(&sandbox, name, &ctr()));
    for (member, n) in members.iter().zip([4, 8, 6]) {
        member.oci(&["--limit", &format!("subflows={n}"), "--on-conflict", "warn"]).ok();
    }
    assert_eq!(world.limits(), [8, 0]);
    members[1].stop().ok();
    let after_the_highest = world.limits();
    members[2].stop().ok();
    members[0].stop().ok();
    world.assert_kernel(&before);
    sandbox.assert_ledger_is_empty();
    // c asked for 6 while 8 was there: a lower one is a conflict, so it has no say; a has.
    assert_eq!(after_the_highest, [4, 0]);
}

// --- again, and by hand ---------------------------------------------------------------------------------------------

/// The same apply twice: no write to the kernel, none to the ledger.
#[test]
fn the_same_apply_twice_changes_nothing() {
    require("strace", "strace");
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let arguments = ["--interface", "eth*=backup", "--limit", "subflows=5", "--sysctl", "stale_loss_cnt=9"];
    world.web.oci(&arguments).ok();
    let kernel = world.kernel();
    let files = || sandbox.sh("find /run/mptcp-hook -path '*/locks/*' -prune -o -printf '%p %i %T@ %s\\n' | sort");
    let ledger = files();
    for _ in 0..2 {
        let program = hook().display().to_string();
        let trace = sandbox.dir().join("trace").display().to_string();
        let strace =
            ["strace", "-qq", "-f", "-o", &trace, "-e", "trace=rename,unlink,mkdir,sendto,openat", &program, "oci"];
        let argv = [&strace[..], &arguments].concat();
        let outcome = sandbox.run_with_input(&argv, world.web.state().to_string().as_bytes());
        assert!(outcome.stderr.contains("nothing had to be changed"), "{outcome}");
        outcome.ok();
        let trace = std::fs::read_to_string(&trace).expect("the trace");
        for forbidden in ["rename(", "unlink(", "mkdir(\"/run/mptcp-hook/containers/"] {
            assert!(!trace.contains(forbidden), "{forbidden} in\n{trace}");
        }
        let written = trace.lines().filter(|line| line.contains("/proc/sys/") && line.contains("O_WRONLY"));
        assert_eq!(written.count(), 0, "{trace}");
        world.assert_kernel(&kernel);
        assert_eq!(files(), ledger);
    }
}

/// A step that replaces an endpoint is undone as well: the old one is there again, with its id.
#[test]
fn a_failure_after_an_endpoint_was_replaced_brings_it_back() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup", "--interface", "eth0=subflow", "--limit", "subflows=5"]).ok();
    let before = world.kernel();
    let status = sandbox.status();
    // The kernel shows this list otherwise than it was written, which the read-back at the very end takes for a failure.
    let failing = ["--sysctl", "net.ipv4.ip_local_reserved_ports=9000,9001"];
    for wish in [["--interface", "eth1=signal"], ["--interface", "eth1=off"], ["--limit", "subflows=8"]] {
        let outcome = world.by_hand(&[wish, failing].concat());
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert!(outcome.stderr.contains("nothing was changed"), "{outcome}");
        world.assert_kernel(&before);
        assert_eq!(sandbox.status(), status);
    }
}

#[test]
fn a_list_may_follow_a_single_number() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let key = "net/ipv4/ip_local_reserved_ports";
    world.sh(&format!("echo 7000 >/proc/sys/{key}"));
    world.web.oci(&["--sysctl", "net.ipv4.ip_local_reserved_ports=9000,9100"]).ok();
    assert_eq!(world.sysctl(key), "9000,9100");
    sandbox.hook(&["release", world.web.id()]).ok();
    assert_eq!(world.sysctl(key), "7000");
}

/// The system calls by which the hook changes kernel and ledger.
const CHANGING: [&str; 4] = ["write", "rename", "unlink", "sendto"];

/// Kills a hook at every moment, lets `recover` run, and wants namespace and ledger as before the container came.
fn killed_at_any_moment(victim: &[&str], recover: impl Fn(&World)) {
    require("strace", "strace");
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.sh("ip mptcp endpoint add 10.0.1.2 id 4 dev eth0 subflow");
    let before = world.kernel();
    let first = ["--interface", "eth*=backup", "--limit", "subflows=5", "--sysctl", "stale_loss_cnt=9"];
    let program = hook().display().to_string();
    let (mut moments, mut interrupted) = (0, 0);
    for call in CHANGING {
        for count in 1.. {
            let inject = format!("inject={call}:signal=KILL:when={count}");
            let strace = ["strace", "-qq", "-o", "/dev/null", "-e", &inject, &program];
            let outcome = if victim.is_empty() {
                // The first apply of all is the one that is killed.
                let argv = [&strace[..], &["oci"], &first].concat();
                sandbox.run_with_input(&argv, world.web.state().to_string().as_bytes())
            } else {
                world.web.oci(&first).ok();
                sandbox.run(&[&strace[..], &["apply", world.web.id()], victim].concat())
            };
            let status = sandbox.hook(&["status", "--json"]).ok();
            interrupted += u32::from(status.contains("\"interrupted\",\"reason\""));
            recover(&world);
            let (now, after) = (world.kernel(), sandbox.status());
            let changed: Vec<&str> = now.lines().filter(|line| !before.lines().any(|old| old == *line)).collect();
            assert!(now == before, "killed at {call} {count}, new is {changed:#?}; {after:#}");
            sandbox.assert_ledger_is_empty();
            if outcome.code == Some(0) {
                break;
            }
            moments += 1;
        }
    }
    assert!(moments > 10 && interrupted > 0, "killed at {moments} moments, {interrupted} of them shown");
}

/// The container may be unknown to the ledger, if the hook was killed early enough.
fn release(world: &World) {
    let outcome = world.sandbox.hook(&["release", world.web.id()]);
    assert!(outcome.code == Some(0) || outcome.stderr.contains("knows no container"), "{outcome}");
}

#[test]
fn a_first_apply_killed_at_any_moment_is_undone_by_release() {
    killed_at_any_moment(&[], release);
}

#[test]
fn a_first_apply_killed_at_any_moment_is_finished_by_the_next() {
    killed_at_any_moment(&[], |world| {
        world.web.oci(&["--interface", "eth*=backup", "--limit", "subflows=5", "--sysctl", "stale_loss_cnt=9"]).ok();
        assert_eq!(world.endpoints(), ["10.0.1.2 backup subflow eth0", "10.0.2.2 backup subflow eth1"]);
        assert_eq!((world.limits(), world.sysctl("net/mptcp/stale_loss_cnt")), ([5, 0], "9".into()));
        assert_eq!(world.interface("eth1")["state"], "applied");
        release(world);
    });
}

/// A change by hand of what is set up already: flags in place, a replaced endpoint, limits, a value.
const CHANGE: [&str; 8] = [
    "--interface",
    "eth0=subflow",
    "--interface",
    "eth1=signal",
    "--limit",
    "subflows=7",
    "--sysctl",
    "stale_loss_cnt=12",
];

#[test]
fn a_change_killed_at_any_moment_is_undone_by_release() {
    killed_at_any_moment(&CHANGE, release);
}

#[test]
fn a_change_killed_at_any_moment_is_finished_by_the_next() {
    killed_at_any_moment(&CHANGE, |world| {
        world
            .by_hand(&[
                "--interface",
                "eth*=subflow",
                "--interface",
                "eth0=subflow",
                "--interface",
                "eth1=subflow",
                "--limit",
                "subflows=8",
                "--sysctl",
                "stale_loss_cnt=15",
            ])
            .ok();
        assert_eq!(world.endpoints(), ["10.0.1.2 subflow eth0", "10.0.2.2 subflow eth1"]);
        assert_eq!((world.limits(), world.sysctl("net/mptcp/stale_loss_cnt")), ([8, 0], "15".into()));
        release(world);
    });
}

#[test]
fn by_hand_on_a_namespace_by_path_and_by_pid() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let before = world.kernel();
    sandbox.hook(&["apply", "--netns", "/run/netns/ctr", "--interface", "eth1=backup"]).ok();
    let container = sandbox.status_of("ctr");
    assert_eq!(
        (&container["live"], &container["pid"], &container["runtime"]),
        (&json!(true), &Value::Null, &json!("command"))
    );
    assert_eq!(world.endpoints(), ["10.0.2.2 backup subflow eth1"]);
    sandbox.hook(&["apply", "ctr", "--interface", "eth1=subflow"]).ok();
    assert_eq!(world.endpoints(), ["10.0.2.2 subflow eth1"]);
    sandbox.hook(&["release", "--netns", "/run/netns/ctr"]).ok();
    world.assert_kernel(&before);
    sandbox.assert_ledger_is_empty();

    let pid = world.web.pid().to_string();
    sandbox.hook(&["apply", "--pid", &pid, "--interface", "eth1=backup", "--name", "by-hand"]).ok();
    assert_eq!(sandbox.status_of("by-hand")["pid"], world.web.pid());
    sandbox.hook(&["release", "--pid", &pid]).ok();
    world.assert_kernel(&before);
    sandbox.assert_ledger_is_empty();
}

#[test]
fn a_namespace_that_is_gone_leaves_nothing_behind() {
    let sandbox = Sandbox::new();
    sandbox.sh("ip netns add short; ip -n short link add eth1 type dummy 2>/dev/null || ip -n short link add eth1 type veth peer name far");
    sandbox.sh("ip -n short addr add 10.6.0.2/24 dev eth1; ip -n short link set eth1 up");
    sandbox.hook(&["apply", "--netns", "/run/netns/short", "--interface", "eth1=backup"]).ok();
    assert_eq!(sandbox.status_of("short")["live"], true);
    sandbox.sh("ip netns del short");
    assert_eq!(sandbox.status_of("short")["live"], false);
    sandbox.hook(&["release", "--stale"]).ok();
    sandbox.assert_ledger_is_empty();
    let left = sandbox.sh("find /run/mptcp-hook -type f ! -name 'conflicts*'");
    assert_eq!(left, "", "files of a container that is gone");
}

// --- what is shown --------------------------------------------------------------------------------------------------

#[test]
fn status_shows_drift() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let id = sandbox.endpoints(&ctr())[0].id;
    world.sh(&format!("ip mptcp endpoint change id {id} nobackup"));
    let eth1 = world.interface("eth1");
    assert_eq!(eth1["state"], "drifted", "{eth1:#}");
    assert!(eth1["reason"].as_str().is_some_and(|reason| reason.contains("subflow")), "{eth1:#}");
    world.sh(&format!("ip mptcp endpoint delete id {id}"));
    let eth1 = world.interface("eth1");
    assert_eq!(eth1["state"], "drifted", "{eth1:#}");
    assert!(eth1["reason"].as_str().is_some_and(|reason| reason.contains("gone")), "{eth1:#}");
    let table = sandbox.hook(&["status"]).ok();
    assert!(table.contains("drifted"), "{table}");

    // Asked for again, it is mended.
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    assert_eq!(world.interface("eth1")["state"], "applied");
    assert_eq!(world.endpoints(), ["10.0.2.2 backup subflow eth1"]);
}

/// The fields of the contract, with their types.
#[test]
fn status_json_has_every_field() {
    // Every kernel has the refused value there.
    let sandbox = Sandbox::host_network();
    let world = World::new(&sandbox);
    let empty = sandbox.status();
    assert_eq!(empty["kernel"], "upstream");
    for list in ["containers", "settings", "conflicts"] {
        assert_eq!(empty[list], json!([]), "{empty:#}");
    }
    assert!(!sandbox.outside("/run/mptcp-hook").exists(), "status made the state directory");

    let web = Bare::in_netns(&sandbox, "named", &ctr())
        .annotation("mptcp-hook/name", "shop")
        .annotation("mptcp-hook/interface.eth1", "backup")
        .annotation("mptcp-hook/sysctl.net.mptcp.stale_loss_cnt", "9");
    web.oci(&[]).ok();
    let refused = Bare::new(&sandbox, "greedy").annotation("mptcp-hook/sysctl.net.core.rmem_max", "4097");
    assert_eq!(refused.oci(&[]).code, Some(3));
    let status = sandbox.status();
    let container = &status["containers"][0];
    assert_eq!((&container["id"], &container["name"]), (&json!(web.id()), &json!("shop")));
    assert_eq!(
        (&container["runtime"], &container["pid"], &container["live"]),
        (&json!("oci"), &json!(web.pid()), &json!(true))
    );
    let inode = sandbox.sh_in(&ctr(), "readlink /proc/self/ns/net | tr -dc 0-9");
    assert_eq!(container["netns"], json!(inode));
    let interface = &container["interfaces"][0];
    let endpoint = sandbox.endpoints(&ctr()).remove(0);
    assert_eq!(interface["name"], "eth1");
    assert_eq!(interface["flags"], json!(["subflow", "backup"]));
    assert_eq!((&interface["state"], &interface["route"]), (&json!("applied"), &json!("ok")));
    assert_eq!(interface["endpoints"], json!([{ "id": endpoint.id, "address": endpoint.address.to_string() }]));
    let setting = &container["settings"][0];
    assert_eq!((&setting["key"], &setting["value"]), (&json!("net.mptcp.stale_loss_cnt"), &json!("9")));
    assert_eq!((&setting["scope"], &setting["outcome"]), (&json!("netns"), &json!("applied")));
    let conflict = &status["conflicts"][0];
    for field in ["container", "key", "wanted", "kept", "outcome", "reason"] {
        assert!(conflict[field].is_string(), "{field} of {conflict:#}");
    }
    assert!(conflict["time"].is_u64() && conflict["holders"].is_array(), "{conflict:#}");

    // By id and by name: the same container and nothing else.
    for name in [web.id(), "shop"] {
        let one: Value = serde_json::from_str(&sandbox.hook(&["status", name, "--json"]).ok()).expect("JSON");
        assert_eq!(one["containers"], status["containers"], "{name}");
        assert_eq!(one["conflicts"], json!([]), "{name}");
    }
    drop(world);
}

#[test]
fn dry_run_says_whose_wish_it_is_and_does_nothing() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    sandbox.policy("[defaults.limits]\nsubflows = 6\n");
    sandbox.write("/etc/mptcp-hook/containers.d/shop.toml", "[interfaces]\neth0 = \"subflow\"\n");
    let before = world.kernel();
    let pid = world.web.pid().to_string();
    let arguments = [
        "apply",
        "--pid",
        &pid,
        "--name",
        "shop",
        "--interface",
        "eth1=backup",
        "--sysctl",
        "stale_loss_cnt=9",
        "--dry-run",
    ];
    let text = sandbox.hook(&arguments).ok();
    for part in [
        "/etc/mptcp-hook/config.toml:2",
        "/etc/mptcp-hook/containers.d/shop.toml:2",
        "--interface eth1=backup",
        "--sysctl stale_loss_cnt=9",
        "add endpoint 10.0.2.2 subflow backup",
        "add endpoint 10.0.1.2 subflow",
        "subflows 6",
        "net.mptcp.stale_loss_cnt = 9",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    let json = sandbox.hook(&[&arguments[..], &["--json"]].concat()).ok();
    let plan: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(
        plan["wishes"].as_array().map(|wishes| wishes.iter().filter(|w| w["source"].is_string()).count()),
        Some(5),
        "{plan:#}"
    );
    assert!(plan["steps"].as_array().is_some_and(|steps| steps.len() == 4), "{plan:#}");
    assert_eq!(plan["refused"], false);
    world.assert_kernel(&before);
    assert!(!sandbox.outside("/run/mptcp-hook").exists(), "a dry run made the state directory");

    // What would be refused says so in its exit status.
    let low = sandbox.hook(&["apply", "--pid", &pid, "--limit", "subflows=1", "--dry-run"]);
    assert_eq!(low.code, Some(3), "{low}");
    assert!(!sandbox.outside("/run/mptcp-hook").exists(), "a dry run made the state directory");

    // On a container that is set up: as if it were applied on top.
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    let ledger = sandbox.sh("find /run/mptcp-hook -printf '%p %i %T@ %s\\n' | sort");
    let kernel = world.kernel();
    let text = world.by_hand(&["--interface", "eth1=subflow", "--dry-run"]).ok();
    assert!(text.contains("change endpoint 10.0.2.2"), "{text}");
    assert_eq!(sandbox.sh("find /run/mptcp-hook -printf '%p %i %T@ %s\\n' | sort"), ledger);
    world.assert_kernel(&kernel);
}

#[test]
fn apply_json_says_what_was_done() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().without_second_route());
    let pid = world.web.pid().to_string();
    let arguments = ["apply", "--pid", &pid, "--interface", "eth1=backup", "--sysctl", "stale_loss_cnt=9", "--json"];
    let json = sandbox.hook(&arguments).ok();
    let done: Value = serde_json::from_str(&json).unwrap_or_else(|e| panic!("{e}: {json}"));
    let eth1 = &done["interfaces"][0];
    assert_eq!((&eth1["name"], &eth1["state"], &eth1["route"]), (&json!("eth1"), &json!("applied"), &json!("missing")));
    assert_eq!(eth1["flags"], json!(["subflow", "backup"]));
    assert_eq!(eth1["endpoints"][0]["address"], "10.0.2.2");
    assert_eq!(eth1["endpoints"][0]["id"], sandbox.endpoints(&ctr())[0].id);
    assert_eq!(
        (&done["settings"][0]["key"], &done["settings"][0]["outcome"]),
        (&json!("net.mptcp.stale_loss_cnt"), &json!("applied"))
    );
    assert!(done["warnings"].to_string().contains("no route out"), "{done:#}");
}

/// As under rootless podman: the hook is root of a user namespace, its own network namespace is the host's, and the
/// container's is a child of it.
#[test]
fn in_a_user_namespace_the_containers_own_settings_work() {
    let sandbox = Sandbox::new();
    let script = format!(
        "printf '{{\"ociVersion\":\"1.0.2\",\"id\":\"rootless\",\"status\":\"created\",\"pid\":%s,\"bundle\":\"/b\"}}' $pid |
           {0} oci --state-dir /run/ledger --interface eth1=backup --limit subflows=5 --sysctl stale_loss_cnt=9
         inside ip mptcp endpoint show; inside ip mptcp limits show; inside cat /proc/sys/net/mptcp/stale_loss_cnt
         {0} status --state-dir /run/ledger --json
         {0} release rootless --state-dir /run/ledger
         echo released
         inside ip mptcp endpoint show; inside ip mptcp limits show; inside cat /proc/sys/net/mptcp/stale_loss_cnt",
        hook().display()
    );
    let out = in_user_namespace(&sandbox, &script).ok();
    let (applied, released) = out.split_once("released").expect("both halves");
    for part in ["10.0.2.2 id 1 subflow backup dev eth1", "subflows 5", "\"state\":\"applied\"", "\"rootless\":true"] {
        assert!(applied.contains(part), "`{part}` is not in {applied}");
    }
    assert!(
        !released.contains("10.0.2.2") && released.contains("subflows 2") && released.trim().ends_with('4'),
        "{released}"
    );
    assert_eq!(sandbox.endpoints(&Netns::Host), []);
}

/// No program is run, and no file is opened but the kernel's, the policy's, the bundle's config.json and the ledger's.
#[test]
fn the_hook_runs_no_program_and_opens_nothing_else() {
    require("strace", "strace");
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    sandbox.patient_policy("on-error = \"fail\"\n");
    let program = hook().display().to_string();
    let trace = sandbox.dir().join("trace").display().to_string();
    let calls = "trace=execve,execveat,open,openat,openat2,fork,vfork,clone,clone3";
    let argv = [
        "strace",
        "-qq",
        "-f",
        "-o",
        &trace,
        "-e",
        calls,
        &program,
        "oci",
        "--interface",
        "eth1=backup",
        "--sysctl",
        "stale_loss_cnt=9",
    ];
    sandbox.run_with_input(&argv, world.web.state().to_string().as_bytes()).ok();
    let trace = std::fs::read_to_string(&trace).expect("the trace");
    let lines: Vec<&str> = trace.lines().filter_map(|line| line.split_once(' ').map(|(_, call)| call.trim())).collect();
    assert!(lines[0].starts_with("execve("), "{trace}");
    let config = format!("{}/config.json", world.web.state()["bundle"].as_str().expect("a bundle"));
    let allowed = ["/proc/", "/etc/mptcp-hook/", "/run/mptcp-hook/", config.as_str()];
    for line in &lines[1..] {
        assert!(line.starts_with("open"), "{line}");
        let path = line.split('"').nth(1).unwrap_or_else(|| panic!("{line}"));
        assert!(allowed.iter().any(|prefix| path.starts_with(prefix)), "{line}");
        assert!(!path.contains("/root/") && !path.contains("/cwd"), "{line}");
    }
}

// --- interface flags of the other kernel kind -----------------------------------------------------------------------

/// An upstream kernel takes multipath-tcp.org's interface flags with success and drops them. The read-back notices.
#[test]
fn interface_flags_that_the_kernel_drops_are_not_believed() {
    let sandbox = Sandbox::new();
    let _world = World::new(&sandbox);
    let path = sandbox.netns_path(&ctr());
    let checked = std::thread::spawn(move || {
        let home = File::open("/proc/thread-self/ns/net").expect("the namespace of this thread");
        let namespace = Namespace::open(&path).expect("the container's namespace");
        let mut visit = Visit::to(namespace, None).expect("a visit");
        visit.inside().expect("going in");
        let mut kernel = MptcpOrg::open(visit, Deadline::after(Duration::from_secs(5))).expect("a kernel");
        let eth1 = kernel.facts(&[]).expect("the facts").link("eth1").expect("eth1").clone();
        let errors = [0x10_0000, 0x8_0000].map(|bits| {
            let change = Change::LinkFlags { index: eth1.index, name: eth1.name.clone(), bits, mask: 0x18_0000 };
            // Success, says the kernel.
            kernel.perform(&change).expect("the kernel takes the flags");
            kernel.confirm(&[&change]).expect_err("flags that are not kept").to_string()
        });
        let after = kernel.facts(&[]).expect("the facts").link("eth1").expect("eth1").clone();
        assert_eq!(after.flags, eth1.flags, "the write touched other flags");
        let clear = Change::LinkFlags { index: eth1.index, name: eth1.name.clone(), bits: 0, mask: 0x18_0000 };
        kernel.perform(&clear).expect("the kernel takes the flags");
        kernel.confirm(&[&clear]).expect("bits that are clear anyway");
        drop(kernel);
        setns(home.as_fd(), CloneFlags::CLONE_NEWNET).expect("coming back");
        errors
    });
    for (error, bits) in checked.join().expect("the thread in the namespace").iter().zip(["0x100000", "0x80000"]) {
        for part in ["eth1", bits, "reads back as 0x0", "does not keep"] {
            assert!(error.replace("read back", "reads back").contains(part), "`{part}` is not in {error}");
        }
    }
}

/// Addresses are compared as addresses, whatever their notation.
#[test]
fn an_ipv6_endpoint_is_the_same_in_any_notation() {
    let sandbox = Sandbox::new();
    let world = World::wired(&sandbox, &Wiring::new().ipv6_only());
    world.sh("ip mptcp endpoint add fd00:0002:0:0::0002 id 6 dev eth1 subflow backup");
    let before = world.kernel();
    world.web.oci(&["--interface", "eth1=backup"]).ok();
    world.assert_kernel(&before);
    assert_eq!(sandbox.endpoints(&ctr())[0].address, "fd00:2::2".parse::<IpAddr>().expect("an address"));
    world.release_restores(&before);
    assert_eq!(world.endpoints(), strings(&["fd00:2::2 backup subflow eth1"]));
}
