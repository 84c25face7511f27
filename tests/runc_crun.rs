//! The hook under crun and runc, with real containers and real Multipath TCP on this machine's kernel.
//!
//! Every scenario is a function of the runtime; [`with_each_runtime`] makes the tests `crun::SCENARIO` and
//! `runc::SCENARIO` of it.

mod common;

use std::net::IpAddr;

use common::*;
use serde_json::{Value, json};

with_each_runtime! {
    prestart_upstream_backup_join_traffic_failover,
    createruntime_upstream_backup_join_traffic_failover,
    createruntime_ipv6_in_a_namespace_of_the_runtime,
    createcontainer_works_in_the_containers_namespace,
    createcontainer_works_without_a_pid_namespace,
    createcontainer_in_the_hosts_namespace_is_refused,
    poststart_twice_changes_nothing,
    createruntime_signal_server_announces_its_backup_address,
    createruntime_two_entries_that_agree_are_merged,
    createruntime_two_entries_that_disagree_stop_the_container,
    createruntime_annotation_without_policy_stops_the_container,
    createruntime_value_of_linux_sysctl_conflicts,
    createruntime_missing_route_is_said_and_mended,
    createruntime_missing_interface_is_pending,
    createruntime_in_the_hosts_namespace_is_refused,
    createruntime_without_mptcp_does_as_on_error_says,
    createruntime_shared_namespace_is_left_by_one_then_the_other,
    createruntime_without_a_wish_does_nothing,
    apply_switches_the_live_connections_of_a_container,
    poststop_after_the_container_was_killed,
}

fn container_netns() -> Netns {
    Netns::named("ctr")
}

fn prestart_upstream_backup_join_traffic_failover(runtime: Runtime) {
    backup_join_traffic_failover(runtime, Stage::Prestart);
}

fn createruntime_upstream_backup_join_traffic_failover(runtime: Runtime) {
    backup_join_traffic_failover(runtime, Stage::CreateRuntime);
}

/// The whole life: eth1 is a backup path from the first connection on, really carries nothing while eth0 works,
/// takes over when eth0 is cut, and nothing stays behind.
fn backup_join_traffic_failover(runtime: Runtime, stage: Stage) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let bundle = Bundle::new(&sandbox, "web").in_netns("ctr").mptcp_hook(stage);
    let container = bundle.annotation("mptcp-hook/interface.eth1", "backup").start(runtime);

    assert_only_endpoint(&sandbox, &container_netns(), [10, 0, 2, 2], &["backup", "subflow"]);
    let container_in_status = sandbox.status_of(container.id());
    assert_eq!(container_in_status["live"], true);
    assert_eq!(container_in_status["pid"], container.pid());
    let eth1 = eth1_of(&sandbox.status_of(container.id()), "applied");
    assert_eq!(eth1["flags"], json!(["subflow", "backup"]));
    assert_eq!(eth1["route"], "ok");
    assert_eq!(eth1["endpoints"][0]["address"], "10.0.2.2");

    let send = |to, bytes, rate| container.send(to, bytes, rate);
    assert_backup_path(&paths, &server, &capture, ["eth0", "eth1"], [10, 0, 2, 2], send);

    container.delete();
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&container_netns()), []);
    assert_eq!(sandbox.endpoints(&Netns::Host), []);
}

/// The runtime makes the namespace, an engine's hook brings the interfaces, ours comes next; addresses are IPv6 alone.
fn createruntime_ipv6_in_a_namespace_of_the_runtime(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::new(&sandbox);
    let server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let joining = paths.joining_hook(&Wiring::new().ipv6_only());
    let container = Bundle::new(&sandbox, "v6")
        .hook(Stage::CreateRuntime, joining)
        .mptcp_hook(Stage::CreateRuntime)
        .annotation("mptcp-hook/interface.eth1", "backup")
        .start(runtime);

    assert_only_endpoint(
        &sandbox,
        &container.netns(),
        "fd00:2::2".parse::<IpAddr>().expect("an address"),
        &["backup", "subflow"],
    );
    assert!(container.send(paths.address6(), 2_000_000, Some(2_000_000)).finish(LIMIT).mptcp);
    let join = capture.wait_join("eth1");
    assert_eq!((join.source, join.backup), ("fd00:2::2".parse().expect("an address"), true));
    let (main, backup) = (capture.payload_received("eth0"), capture.payload_received("eth1"));
    assert!(main >= 2_000_000 && backup * 20 < main, "{main} bytes over eth0, {backup} over eth1");

    // What the server does not read is not over before the cut.
    server.stop_reading();
    let joins = capture.joins().len();
    let transfer = container.send(paths.address6(), 20_000_000, None);
    wait_until("a join of the second connection", LIMIT, || capture.joins().len() > joins);
    paths.cut("eth0");
    let before = capture.payload_received("eth1");
    server.go_on_reading();
    assert!(transfer.finish(LIMIT).mptcp);
    let over_backup = capture.payload_received("eth1") - before;
    assert!(over_backup > 2_000_000, "after the cut only {over_backup} bytes went over eth1");

    container.delete();
    sandbox.assert_ledger_is_empty();
}

/// There the state's pid is 1 or 0 and means nothing, and on runc without `env` the environment is the container's.
fn createcontainer_works_in_the_containers_namespace(runtime: Runtime) {
    createcontainer_works(runtime, |_| {});
}

/// As with `--pid=host`: the state's pid (runc) is the host's own number for the container's init, or 0 (crun).
fn createcontainer_works_without_a_pid_namespace(runtime: Runtime) {
    createcontainer_works(runtime, |config| drop_namespace(config, "pid"));
}

fn drop_namespace(config: &mut Value, kind: &str) {
    let namespaces = config["linux"]["namespaces"].as_array_mut().expect("namespaces is a list");
    namespaces.retain(|namespace| namespace["type"] != kind);
}

fn createcontainer_works(runtime: Runtime, edit: impl FnOnce(&mut Value)) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let container = Bundle::new(&sandbox, "inside")
        .in_netns("ctr")
        .hook(Stage::CreateContainer, HookEntry::oci(&[]).inherited_env())
        .hook(Stage::Poststop, HookEntry::oci(&[]))
        .annotation("mptcp-hook/interface.eth1", "backup")
        .edit(|config| {
            config["process"]["env"] = json!(["PATH=/bin:/", "LD_PRELOAD=/tmp/evil.so", "RUST_LOG=trace"]);
            edit(config);
        })
        .start(runtime);

    assert_only_endpoint(&sandbox, &container_netns(), [10, 0, 2, 2], &["backup", "subflow"]);
    assert_eq!(sandbox.endpoints(&Netns::Host), []);
    assert_eq!(sandbox.status_of(container.id())["pid"], container.pid());
    let report = container.send(paths.address(), 5_000_000, Some(5_000_000)).finish(LIMIT);
    assert!(report.mptcp);
    assert!(capture.wait_join("eth1").backup);

    container.delete();
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&container_netns()), []);
}

/// Also where a path in the bundle leads there, with a pid namespace and without.
fn createcontainer_in_the_hosts_namespace_is_refused(runtime: Runtime) {
    let sandbox = Sandbox::new();
    sandbox.sh("ip link add eth1 type veth peer name far; ip addr add 10.0.2.2/24 dev eth1; ip link set eth1 up");
    sandbox.sh("touch /run/netns/own; mount --bind /proc/self/ns/net /run/netns/own");
    for by_path in [false, true] {
        for pid_namespace in [true, false] {
            let bundle = Bundle::new(&sandbox, "hostnet").mptcp_hook(Stage::CreateContainer);
            let bundle = if by_path { bundle.in_netns("own") } else { bundle.in_host_netns() };
            let bundle = bundle.edit(|config| {
                if !pid_namespace {
                    drop_namespace(config, "pid");
                }
            });
            let message = bundle.annotation("mptcp-hook/interface.eth1", "backup").refused(runtime);
            assert!(
                message.contains("mptcp-hook: ") && message.contains("the host's"),
                "{by_path} {pid_namespace}: {message}"
            );
            assert_eq!(sandbox.endpoints(&Netns::Host), [], "{by_path} {pid_namespace}");
            sandbox.assert_ledger_is_empty();
        }
    }
}

/// createRuntime has applied it; two poststart entries and two more calls find everything as it should be.
fn poststart_twice_changes_nothing(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let container = Bundle::new(&sandbox, "again")
        .in_netns("ctr")
        .mptcp_hook(Stage::CreateRuntime)
        .hook(Stage::Poststart, HookEntry::oci(&[]))
        .hook(Stage::Poststart, HookEntry::oci(&[]))
        .annotation("mptcp-hook/interface.eth1", "backup")
        .annotation("mptcp-hook/limit.subflows", "4")
        .annotation("mptcp-hook/sysctl.net.mptcp.stale_loss_cnt", "3")
        .start(runtime);
    let observed = || {
        let netns = container_netns();
        let limits = sandbox.sh_in(&netns, "ip mptcp limits show");
        (sandbox.endpoints(&netns), limits, sandbox.sysctl(&netns, "net/mptcp/stale_loss_cnt"))
    };

    assert_only_endpoint(&sandbox, &container_netns(), [10, 0, 2, 2], &["backup", "subflow"]);
    let first = observed();
    assert!(first.1.contains("subflows 4"), "{}", first.1);
    assert_eq!(first.2.as_deref(), Some("3"));
    let state = serde_json::to_vec(&container.state()).expect("the state as text");
    for _ in 0..2 {
        sandbox.hook_with_input(&["oci"], &state).ok();
        assert_eq!(observed(), first);
    }
    let status = sandbox.status();
    assert_eq!(status["containers"].as_array().map(Vec::len), Some(1), "{status:#}");
    assert_eq!(status["conflicts"], json!([]));

    container.delete();
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&container_netns()), []);
}

/// A server in the container: its second address is announced, and says of itself that it is a backup.
fn createruntime_signal_server_announces_its_backup_address(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let capture = Capture::start(&sandbox, paths.server());
    let bundle = Bundle::new(&sandbox, "server").in_netns("ctr").mptcp_hook(Stage::CreateRuntime);
    let container = bundle.annotation("mptcp-hook/interface.eth1", "signal,backup").start(runtime);
    assert_only_endpoint(&sandbox, &container_netns(), [10, 0, 2, 2], &["backup", "signal"]);

    let port = traffic::PORT.to_string();
    let server = Server::attach(container.exec(&[traffic::PROGRAM, "serve", "--port", &port]));
    let first_address = IpAddr::from([10, 0, 1, 2]);
    let report = Sender::start(&sandbox, paths.server(), first_address, 5_000_000, Some(5_000_000)).finish(LIMIT);
    assert!(report.mptcp);
    assert_eq!(server.wait_received(1), ["received 5000000 bytes mptcp=yes subflows=2"]);
    let packets = capture.packets();
    let from_container = |packet: &&Packet| !packet.outgoing;
    let announced = packets.iter().filter(from_container).flat_map(|packet| &packet.options);
    assert!(announced.clone().any(|option| matches!(option, MptcpOption::AddAddr { echo: false, .. })));
    let answer = packets.iter().filter(from_container).find(|p| p.interface == "eth1" && p.syn && p.ack);
    let answer = answer.expect("a SYN/ACK of the container on eth1");
    assert_eq!(answer.source.ip(), IpAddr::from([10, 0, 2, 2]));
    assert!(
        answer.options.iter().any(|option| matches!(option, MptcpOption::Join { backup: true, .. })),
        "{:?}",
        answer.options
    );

    container.delete();
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&container_netns()), []);
}

/// As when hooks.d and CDI both name the hook: the second adds to what the first did and takes nothing back.
fn createruntime_two_entries_that_agree_are_merged(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let container = Bundle::new(&sandbox, "two")
        .in_netns("ctr")
        .hook(Stage::CreateRuntime, HookEntry::oci(&["--interface", "eth1=backup"]))
        .hook(Stage::CreateRuntime, HookEntry::oci(&["--interface", "eth1=backup", "--limit", "subflows=5"]))
        .hook(Stage::CreateRuntime, HookEntry::oci(&["--interface", "eth0=subflow"]))
        .hook(Stage::Poststop, HookEntry::oci(&[]))
        .start(runtime);

    let netns = container_netns();
    let endpoints_on = |interface| sandbox.endpoints_on(&netns, interface).into_iter().map(|e| e.flags);
    assert_eq!(endpoints_on("eth0").collect::<Vec<_>>(), [["subflow"]]);
    assert_eq!(endpoints_on("eth1").collect::<Vec<_>>(), [["backup", "subflow"]]);
    assert!(sandbox.sh_in(&netns, "ip mptcp limits show").contains("subflows 5"));
    let names: Vec<_> = sandbox.status_of(container.id())["interfaces"]
        .as_array()
        .expect("interfaces is a list")
        .iter()
        .map(|interface| interface["name"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(names, ["eth0", "eth1"]);

    container.delete();
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&netns), []);
}

fn createruntime_two_entries_that_disagree_stop_the_container(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let container = Bundle::new(&sandbox, "split")
        .in_netns("ctr")
        .hook(Stage::CreateRuntime, HookEntry::oci(&["--interface", "eth1=backup"]))
        .hook(Stage::CreateRuntime, HookEntry::oci(&["--interface", "eth1=subflow"]))
        .hook(Stage::Poststop, HookEntry::oci(&[]))
        .write(runtime);
    let message = container.create().expect_err("two entries that disagree");
    assert!(exit_status(&message, 2), "{message}");
    assert!(message.contains("eth1"), "{message}");
    assert_not_there(&container);
    // crun runs no poststop after a failed start: what the first entry did goes when it is asked for.
    sandbox.hook(&["release", "--stale"]).ok();
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&container_netns()), []);
}

/// A container's author alone cannot change host-wide values, nor values outside net.mptcp in the namespace.
fn createruntime_annotation_without_policy_stops_the_container(runtime: Runtime) {
    for (key, value) in [("net.core.rmem_max", "5000001"), ("net.ipv4.tcp_ecn", "1")] {
        let sandbox = Sandbox::new();
        let _paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
        let container = Bundle::new(&sandbox, "greedy")
            .in_netns("ctr")
            .mptcp_hook(Stage::CreateRuntime)
            .annotation("mptcp-hook/interface.eth1", "backup")
            .annotation(&format!("mptcp-hook/sysctl.{key}"), value)
            .write(runtime);
        let before = sandbox.sysctl(&container_netns(), &key.replace('.', "/"));

        let message = container.create().expect_err("a sysctl that the policy does not give");
        assert!(exit_status(&message, 3), "{message}");
        for part in [key, container.id(), "config.toml"] {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
        assert_not_there(&container);
        assert_eq!(sandbox.sysctl(&container_netns(), &key.replace('.', "/")), before);
        assert_eq!(sandbox.endpoints(&container_netns()), []);
        sandbox.assert_ledger_is_empty();
        let conflicts = sandbox.conflicts();
        let conflict = conflicts.iter().find(|conflict| conflict["key"] == key);
        let conflict = conflict.unwrap_or_else(|| panic!("no conflict about {key} in {conflicts:#?}"));
        assert_eq!(conflict["outcome"], "refused");
        assert_eq!(conflict["wanted"], value);
        assert_eq!(conflict["container"], container.id());
    }
}

/// The runtime writes `linux.sysctl` after the hook and would undo the hook's value.
fn createruntime_value_of_linux_sysctl_conflicts(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let bundle = |what, wish| {
        Bundle::new(&sandbox, what)
            .in_netns("ctr")
            .mptcp_hook(Stage::CreateRuntime)
            .annotation("mptcp-hook/interface.eth1", "backup")
            .annotation("mptcp-hook/sysctl.net.mptcp.stale_loss_cnt", wish)
            .runtime_sysctl("net.mptcp.stale_loss_cnt", "7")
    };
    let value = || sandbox.sysctl(&container_netns(), "net/mptcp/stale_loss_cnt");
    let original = value();

    let message = bundle("differs", "2").refused(runtime);
    assert!(exit_status(&message, 3), "{message}");
    for part in ["stale_loss_cnt", "7", "2"] {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    // crun (1.8) has written its own value by the time of the hook, runc has not; the hook never wrote.
    let unchanged = if runtime == Runtime::Crun { Some("7".to_string()) } else { original };
    assert_eq!(value(), unchanged);
    assert_eq!(sandbox.endpoints(&container_netns()), []);

    let container = bundle("equal", "7").start(runtime);
    assert_eq!(value().as_deref(), Some("7"));
    assert_only_endpoint(&sandbox, &container_netns(), [10, 0, 2, 2], &["backup", "subflow"]);
    container.delete();
    sandbox.assert_ledger_is_empty();
}

/// The usual mistake: everything looks healthy and the path is dead. Said at once; mended by a later route.
fn createruntime_missing_route_is_said_and_mended(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let journal = Journal::listen(&sandbox);
    let paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new().without_second_route());
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let bundle = Bundle::new(&sandbox, "lost").in_netns("ctr").mptcp_hook(Stage::CreateRuntime);
    let container = bundle.annotation("mptcp-hook/interface.eth1", "backup").start(runtime);

    assert_eq!(eth1_of(&sandbox.status_of(container.id()), "applied")["route"], "missing");
    let log = journal.entries().join("\n");
    assert!(log.contains("eth1") && log.contains("route"), "the journal has: {log}");
    container.send(paths.address(), 5_000_000, Some(5_000_000)).finish(LIMIT);
    assert_eq!(capture.joins(), []);

    sandbox.sh_in(&container_netns(), "ip route add default via 10.0.2.1 dev eth1 metric 200");
    sandbox.hook(&["apply", container.id(), "--interface", "eth1=backup"]).ok();
    assert_eq!(eth1_of(&sandbox.status_of(container.id()), "applied")["route"], "ok");
    container.send(paths.address(), 5_000_000, Some(5_000_000)).finish(LIMIT);
    assert!(capture.wait_join("eth1").backup);

    container.delete();
    sandbox.assert_ledger_is_empty();
}

fn createruntime_missing_interface_is_pending(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::new(&sandbox);
    sandbox.sh("ip netns add ctr");
    let bundle = Bundle::new(&sandbox, "early").in_netns("ctr").mptcp_hook(Stage::CreateRuntime);
    let container = bundle.annotation("mptcp-hook/interface.eth1", "backup").start(runtime);
    eth1_of(&sandbox.status_of(container.id()), "pending");
    assert_eq!(sandbox.endpoints(&container_netns()), []);

    paths.join(&Wiring::new(), &container_netns());
    let state = serde_json::to_vec(&container.state()).expect("the state as text");
    sandbox.hook_with_input(&["oci"], &state).ok();
    eth1_of(&sandbox.status_of(container.id()), "applied");
    assert_only_endpoint(&sandbox, &container_netns(), [10, 0, 2, 2], &["backup", "subflow"]);

    container.delete();
    sandbox.assert_ledger_is_empty();
}

/// A kernel without MPTCP stops the container, or it starts without; its end is silent.
fn createruntime_without_mptcp_does_as_on_error_says(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let write = |what: &str| {
        Bundle::new(&sandbox, what)
            .in_netns("ctr")
            .hook(Stage::CreateRuntime, HookEntry::oci_behind(WITHOUT_MPTCP))
            .hook(Stage::Poststop, HookEntry::oci_behind(WITHOUT_MPTCP))
            .annotation("mptcp-hook/interface.eth1", "backup")
            .write(runtime)
    };
    let strict = write("strict");
    let message = strict.create().expect_err("a kernel without MPTCP");
    assert!(exit_status(&message, 1) && message.contains("has no MPTCP"), "{message}");
    assert_not_there(&strict);

    sandbox.patient_policy("on-error = \"continue\"\n");
    let tolerant = write("tolerant");
    tolerant.create().unwrap_or_else(|message| panic!("not created: {message}"));
    tolerant.start();
    assert_eq!(tolerant.state()["status"], "running");
    assert_eq!(sandbox.endpoints(&container_netns()), []);
    let messages = tolerant.messages();
    if runtime == Runtime::Crun {
        assert!(messages.contains("has no MPTCP") && messages.contains("the container starts without"), "{messages}");
    }
    tolerant.delete();
    assert_eq!(tolerant.messages(), messages);
    sandbox.assert_ledger_is_empty();
}

/// A container without a network namespace of its own would change the host's paths.
fn createruntime_in_the_hosts_namespace_is_refused(runtime: Runtime) {
    let sandbox = Sandbox::new();
    sandbox.sh("ip link add eth1 type veth peer name far; ip addr add 10.0.2.2/24 dev eth1; ip link set eth1 up");
    let bundle = Bundle::new(&sandbox, "hostnet").in_host_netns().mptcp_hook(Stage::CreateRuntime);
    let message = bundle.annotation("mptcp-hook/interface.eth1", "backup").refused(runtime);
    assert!(exit_status(&message, 3), "{message}");
    assert!(message.contains("host"), "{message}");
    assert_eq!(sandbox.endpoints(&Netns::Host), []);
    sandbox.assert_ledger_is_empty();
}

/// As in a pod: the first to leave takes nothing away from the other.
fn createruntime_shared_namespace_is_left_by_one_then_the_other(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let start = |what| {
        let bundle = Bundle::new(&sandbox, what).in_netns("ctr").mptcp_hook(Stage::CreateRuntime);
        bundle.annotation("mptcp-hook/interface.eth1", "backup").start(runtime)
    };
    let first = start("first");
    let second = start("second");
    assert_only_endpoint(&sandbox, &container_netns(), [10, 0, 2, 2], &["backup", "subflow"]);

    first.delete();
    assert_only_endpoint(&sandbox, &container_netns(), [10, 0, 2, 2], &["backup", "subflow"]);
    eth1_of(&sandbox.status_of(second.id()), "applied");
    second.delete();
    assert_eq!(sandbox.endpoints(&container_netns()), []);
    sandbox.assert_ledger_is_empty();
}

/// Hooks.d entries stand in front of every container; those that ask for nothing must not notice.
fn createruntime_without_a_wish_does_nothing(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let bundle = Bundle::new(&sandbox, "plain").in_netns("ctr").mptcp_hook(Stage::CreateRuntime);
    let container = bundle.annotation("org.example/unrelated", "yes").start(runtime);
    assert_eq!(sandbox.endpoints(&container_netns()), []);
    assert_eq!(container.messages().trim(), "");
    sandbox.assert_ledger_is_empty();
    container.delete();
}

/// `apply` on a running container: its open connection learns it by MP_PRIO, in both directions of the switch.
fn apply_switches_the_live_connections_of_a_container(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let bundle = Bundle::new(&sandbox, "live").in_netns("ctr").mptcp_hook(Stage::CreateRuntime);
    let container = bundle.annotation("mptcp-hook/interface.eth1", "backup").start(runtime);
    // What the server does not read is not over before the switches.
    server.stop_reading();
    let transfer = container.send(paths.address(), 60_000_000, None);
    assert!(capture.wait_join("eth1").backup);
    let apply = |wish: &str| sandbox.hook(&["apply", container.id(), "--interface", wish]);
    assert_switches(&sandbox, &container_netns(), ENGINE_LIMIT, || capture.prios(), apply);
    server.go_on_reading();
    assert!(transfer.finish(LIMIT).mptcp);

    container.delete();
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&container_netns()), []);
}

/// The state of poststop has no `pid` (runc) or `"pid":0` (crun), and the process died long ago.
fn poststop_after_the_container_was_killed(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let original = sandbox.sysctl(&container_netns(), "net/mptcp/stale_loss_cnt");
    let bundle = Bundle::new(&sandbox, "killed").in_netns("ctr").mptcp_hook(Stage::CreateRuntime);
    let container = bundle
        .annotation("mptcp-hook/interface.eth1", "backup")
        .annotation("mptcp-hook/sysctl.net.mptcp.stale_loss_cnt", "3")
        .start(runtime);
    sandbox.sh(&format!("kill -9 {}", container.pid()));
    wait_until("the end of the container's process", ENGINE_LIMIT, || container.state()["status"] == "stopped");
    assert_eq!(sandbox.status_of(container.id())["live"], false);

    container.delete();
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&container_netns()), []);
    assert_eq!(sandbox.sysctl(&container_netns(), "net/mptcp/stale_loss_cnt"), original);
}

/// Both runtimes say how a hook ended, each in its own words.
fn exit_status(message: &str, status: i32) -> bool {
    message.contains(&format!("exit status {status}")) || message.contains(&format!("exit code: {status}"))
}

/// The runtime knows no such container.
#[track_caller]
fn assert_not_there(container: &Container) {
    let state = container.runtime(&["state", container.id()]);
    assert_ne!(state.code, Some(0), "the container exists: {state}");
}
