//! The hook under LXC, with real containers and real Multipath TCP on this machine's kernel: hook versions 0 and 1,
//! started by root, by root with mapped ids, and by a user without rights.

mod common;

use std::path::Path;
use std::time::Duration;

use common::*;
use serde_json::json;

/// A value of the host alone: it stands in the initial network namespace and in no other.
const HOST_KEY: &str = "net/core/netdev_max_backlog";

/// The whole life of a container whose eth1 shall be a backup path: it is one from the first connection on, really
/// carries nothing while eth0 works, takes over when eth0 is cut, and nothing stays behind.
fn backup_join_traffic_failover(container: &Lxc, paths: &TwoPaths) {
    let sandbox = container.sandbox;
    let server = Server::start(sandbox, paths.server());
    let capture = Capture::start(sandbox, paths.server());
    container.start();

    container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    let in_status = container.in_status();
    assert_eq!(in_status["live"], true);
    assert_eq!(in_status["runtime"], "lxc");
    assert_eq!(in_status["pid"], container.pid());
    let eth1 = container.eth1_in_status("applied");
    assert_eq!(eth1["flags"], json!(["subflow", "backup"]));
    assert_eq!(eth1["route"], "ok");
    assert_eq!(eth1["endpoints"][0]["address"], "10.0.2.2");

    let send = |to, bytes, rate| container.send(to, bytes, rate);
    assert_backup_path(paths, &server, &capture, ["br0", "br1"], [10, 0, 2, 2], send);

    container.stop();
    container.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&Netns::Host), []);
}

/// LXC appends NAME, `lxc` and `start-host` to the line.
#[test]
fn start_host_version_0_upstream_backup_join_traffic_failover() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let container = Lxc::new(&sandbox, "v0").two_paths(0).start_host("--interface eth1=backup").post_stop();
    backup_join_traffic_failover(&container, &paths);
}

/// LXC says everything by its environment variables.
#[test]
fn start_host_version_1_upstream_backup_join_traffic_failover() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let container = Lxc::new(&sandbox, "v1").two_paths(1).start_host("--interface eth1=backup").post_stop();
    backup_join_traffic_failover(&container, &paths);
}

/// The container's users are others on the machine, but the hook runs as its root.
#[test]
fn start_host_mapped_ids_upstream_backup_join_traffic_failover() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let container = Lxc::started_by(&sandbox, "mapped", Starter::RootMapped)
        .two_paths(1)
        .start_host("--interface eth1=backup")
        .post_stop();
    backup_join_traffic_failover(&container, &paths);
}

/// The hook has no capability and has to get them in the user namespace of the container.
#[test]
fn start_host_unprivileged_user_upstream_backup_join_traffic_failover() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let container = Lxc::started_by(&sandbox, "rootless", Starter::User)
        .two_paths(1)
        .start_host("--interface eth1=backup --sysctl stale_loss_cnt=2")
        .post_stop();
    backup_join_traffic_failover(&container, &paths);
    // The user's ledger is the user's alone, and root's was never touched.
    assert!(sandbox.outside(&user::state_directory()).is_dir());
    assert!(!sandbox.outside("/run/mptcp-hook").exists());
    assert_eq!(container.status()["rootless"], true);
}

/// A user may set what belongs to the container's namespace, and share what the host has; nothing more.
#[test]
fn start_host_unprivileged_user_changes_its_own_values_alone() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let host_value = || sandbox.sysctl(&Netns::Host, "net/core/rmem_max").expect("every namespace shows this value");
    let present: u32 = host_value().parse().expect("a number");
    let make = |what, wish: String| {
        let container = Lxc::started_by(&sandbox, what, Starter::User).two_paths(1);
        container.start_host(&format!("--interface eth1=backup {wish}")).post_stop()
    };

    let own = make("own", format!("--sysctl stale_loss_cnt=2 --limit subflows=4 --sysctl net.core.rmem_max={present}"));
    own.start();
    assert_eq!(sandbox.sysctl(&own.netns(), "net/mptcp/stale_loss_cnt").as_deref(), Some("2"));
    assert!(sandbox.sh_in(&own.netns(), "ip mptcp limits show").contains("subflows 4"));
    let settings = own.in_status()["settings"].clone();
    let outcome =
        |key| settings.as_array().into_iter().flatten().find(|s| s["key"] == key).map(|s| s["outcome"].clone());
    assert_eq!(outcome("net.mptcp.stale_loss_cnt"), Some(json!("applied")), "{settings:#}");
    assert_eq!(outcome("net.core.rmem_max"), Some(json!("shared")), "{settings:#}");
    own.hook(&["apply", &own.name, "--interface", "eth1=subflow"]).ok();
    own.assert_only_endpoint("10.0.2.2", &["subflow"]);
    own.hook(&["release", &own.name]).ok();
    assert_eq!(sandbox.endpoints(&own.netns()), []);
    assert_ne!(sandbox.sysctl(&own.netns(), "net/mptcp/stale_loss_cnt").as_deref(), Some("2"));
    own.assert_ledger_is_empty();
    own.stop();
    own.start();
    own.kill();
    assert_eq!(own.in_status()["live"], false);
    own.hook(&["release", "--stale"]).ok();
    own.assert_ledger_is_empty();

    let greedy = make("greedy", format!("--sysctl net.core.rmem_max={}", present + 4096));
    let log = greedy.refused();
    let ours = log.lines().find(|line| line.contains("produced output: mptcp-hook: ")).unwrap_or_default();
    for part in ["net.core.rmem_max", &greedy.name, "user namespace"] {
        assert!(ours.contains(part), "`{part}` is not in: {log}");
    }
    assert!(log.contains("status 3"), "{log}");
    assert_eq!(host_value(), present.to_string());
    greedy.assert_ledger_is_empty();
}

/// The key is not even there in the container: it is the host's alone, and no user's to change.
#[test]
fn host_value_is_refused_to_an_unprivileged_user() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let container = Lxc::started_by(&sandbox, "greedy", Starter::User)
        .hook_version(1)
        .line("lxc.net.0.type = empty")
        .start_host(&format!("--sysctl net.core.netdev_max_backlog={}", original + 1000))
        .post_stop();
    let log = container.refused();
    let ours = log.lines().find(|line| line.contains("produced output: mptcp-hook: ")).unwrap_or_default();
    for part in ["net.core.netdev_max_backlog", &container.name, "user namespace"] {
        assert!(ours.contains(part), "`{part}` is not in: {log}");
    }
    assert!(log.contains("status 3"), "{log}");
    assert_eq!(value.current(), value.original());
    container.assert_ledger_is_empty();
}

/// hooks/lxc/mptcp-hook.conf as it is shipped, and what the container wants in a file of its own.
#[test]
fn start_host_shipped_include_with_a_per_container_file() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("hooks/lxc/mptcp-hook.conf");
    let text = std::fs::read_to_string(&shipped).unwrap_or_else(|e| panic!("{}: {e}", shipped.display()));
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    // The path in the file exists in this sandbox alone.
    let installed = "/usr/local/bin/mptcp-hook";
    assert!(text.contains(&format!("lxc.hook.start-host = {installed} lxc\n")), "{text}");
    sandbox.sh(&format!("mount -t tmpfs -o mode=755 tmpfs /usr/local/bin; cp {} {installed}", hook().display()));
    let include = format!("lxc.include = {}", shipped.display());
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("filed{version}")).two_paths(version).line(&include);
        let file = format!("/etc/mptcp-hook/containers.d/{}.toml", container.name);
        sandbox.write(&file, "[interfaces]\neth1 = \"backup\"\n");
        container.start();
        container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
        let source = container.eth1_in_status("applied")["source"].as_str().unwrap_or_default().to_owned();
        assert!(source.contains(&file), "{source}");
        container.stop();
        container.assert_ledger_is_empty();
    }

    // The file is for those containers alone: nobody else notices the hook.
    let other = Lxc::new(&sandbox, "other").two_paths(1).line(&include);
    other.start();
    assert_eq!(sandbox.endpoints(&other.netns()), []);
    other.assert_ledger_is_empty();
    other.stop();

    let last = Lxc::new(&sandbox, "last").two_paths(0).line(&include);
    sandbox.write(
        &format!("/etc/mptcp-hook/containers.d/{}.toml", last.name),
        "[interfaces]\neth0 = \"subflow\"\neth1 = \"backup\"\n",
    );
    let capture = Capture::start(&sandbox, paths.server());
    let _server = Server::start(&sandbox, paths.server());
    last.start();
    assert_eq!(sandbox.endpoints_on(&last.netns(), "eth0").len(), 1);
    last.send(paths.address(), 5_000_000, Some(5_000_000)).finish(LIMIT);
    assert!(capture.wait_join("br1").backup);
    last.stop();
    last.assert_ledger_is_empty();
}

/// A container without a network of its own would change the host's paths.
#[test]
fn start_host_in_the_hosts_namespace_is_refused() {
    let sandbox = Sandbox::new();
    let journal = Journal::listen(&sandbox);
    sandbox.sh("ip link add eth1 type veth peer name far; ip addr add 10.0.2.2/24 dev eth1; ip link set eth1 up");
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("hostnet{version}"))
            .hook_version(version)
            .line("lxc.net.0.type = none")
            .start_host("--interface eth1=backup")
            .line(&format!("lxc.hook.stop = touch {}", sandbox.dir().join("stop-hook-ran").display()))
            .post_stop();
        let log = container.refused();
        assert!(log.contains("status 3"), "{log}");
        let ours = log.lines().find(|line| line.contains("produced output: mptcp-hook: "));
        let ours = ours.unwrap_or_else(|| panic!("not a word of the hook in {log}"));
        assert!(ours.contains(&container.name) && ours.contains("host"), "{ours}");
        let entries = journal.entries().join("\n");
        assert!(entries.contains(&container.name) && entries.contains("refused"), "the journal has: {entries}");
        container.assert_ledger_is_empty();
        assert_eq!(sandbox.endpoints(&Netns::Host), []);
        let stop_hook_ran = sandbox.dir().join("stop-hook-ran");
        wait_until("the stop hook", ENGINE_LIMIT, || stop_hook_ran.exists());
        std::fs::remove_file(stop_hook_ran).expect("removing a mark");
    }
}

/// What stands on the line is the administrator's mistake to mend: the start says so, and nothing has happened.
#[test]
fn start_host_bad_arguments_stop_the_container() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    for (number, (arguments, status, words)) in [
        ("--interface eth1=bakup", 2, &["bakup", "backup"][..]),
        ("--interface eth1=signal,fullmesh", 2, &["signal", "fullmesh"]),
        ("--interface eth1=0xZZ", 2, &["0xZZ"]),
        ("--inteface eth1=backup", 2, &["--interface"]),
        ("eth1=backup", 2, &["eth1=backup"]),
        ("--interface eth1=backup --limit subflows=9", 2, &["subflows", "8"]),
        ("--interface eth1=backup --sysctl net.core.../x=1", 2, &["sysctl"]),
        ("--interface eth1=backup --sysctl kernel.hostname=x", 2, &["kernel.hostname"]),
        ("--interface eth1=backup --limit subflows=1", 3, &["subflows"]),
        ("--interface eth1=backup --sysctl net.mptcp.no_such_key=1", 1, &["no_such_key"]),
    ]
    .into_iter()
    .enumerate()
    {
        let container =
            Lxc::new(&sandbox, &format!("bad{number}")).two_paths((number % 2) as u8).start_host(arguments).post_stop();
        let log = container.refused();
        assert!(log.contains(&format!("status {status}")), "{arguments}: {log}");
        let ours = log.lines().find_map(|line| line.split_once("produced output: mptcp-hook: ")).map(|(_, text)| text);
        let ours = ours.unwrap_or_else(|| panic!("{arguments}: not a word of the hook in {log}"));
        for word in words {
            assert!(ours.contains(word), "{arguments}: `{word}` is not in: {ours}");
        }
        container.assert_ledger_is_empty();
    }
}

/// The administrator may want containers to start in any case: then without anything of ours. A refusal stays one.
#[test]
fn start_host_on_error_continue_starts_the_container_as_it_is() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    sandbox.patient_policy("on-error = \"continue\"\n");
    let make = |what, wish: &str| {
        let container = Lxc::new(&sandbox, what).two_paths(1);
        container.start_host(&format!("--interface eth1=backup {wish}")).post_stop()
    };
    let failing = make("failing", "--sysctl net.mptcp.no_such_key=1");
    failing.start();
    assert_eq!(sandbox.endpoints(&failing.netns()), []);
    let log = failing.log();
    assert!(log.lines().any(|line| line.contains("mptcp-hook: ") && line.contains("no_such_key")), "{log}");
    failing.assert_ledger_is_empty();
    failing.stop();

    let log = make("lowering", "--limit subflows=1").refused();
    assert!(log.contains("status 3"), "{log}");
}

/// With DHCP in the container eth1 has no address at start-host: that is no mistake, and said; what was asked for
/// comes into force when somebody asks again.
#[test]
fn start_host_without_an_address_is_pending_until_apply() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    for (number, again) in [&[][..], &["--interface", "eth1=backup"]].into_iter().enumerate() {
        let container = Lxc::new(&sandbox, &format!("dhcp{number}"))
            .hook_version(1)
            .veth(0, &["ipv4.address = 10.0.1.2/24", "ipv4.gateway = 10.0.1.1"])
            .veth(1, &[])
            .start_host("--interface eth1=backup")
            .post_stop();
        container.start();
        container.eth1_in_status("pending");
        assert_eq!(sandbox.endpoints(&container.netns()), []);
        let log = container.log();
        assert!(log.lines().any(|line| line.contains("eth1") && line.contains("pending")), "{log}");

        container.sh("/bin/busybox ip addr add 10.0.2.2/24 dev eth1
             /bin/busybox ip route add default via 10.0.2.1 dev eth1 metric 200");
        container.hook(&[&["apply", container.name.as_str()], again].concat()).ok();
        assert_eq!(container.eth1_in_status("applied")["route"], "ok");
        container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
        let joins = capture.joins().len();
        container.send(paths.address(), 5_000_000, Some(5_000_000)).finish(LIMIT);
        assert!(capture.wait_join("br1").backup);
        assert!(capture.joins().len() > joins);
        container.stop();
        container.assert_ledger_is_empty();
    }
}

/// `apply` by the container's name: its open connection learns it by MP_PRIO, in both directions of the switch.
#[test]
fn apply_switches_the_live_connections_of_an_lxc_container() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let container = Lxc::new(&sandbox, "live").two_paths(1).start_host("--interface eth1=backup").post_stop();
    container.start();
    // What the server does not read is not over before the switches.
    server.stop_reading();
    let transfer = container.send(paths.address(), 60_000_000, None);
    assert!(capture.wait_join("br1").backup);
    // The bridges' ports see every packet once more.
    let prios = || capture.prios().into_iter().filter(|p| p.interface.starts_with("br")).collect::<Vec<_>>();
    let apply = |wish: &str| container.hook(&["apply", &container.name, "--interface", wish]);
    assert_switches(&sandbox, &container.netns(), ENGINE_LIMIT, prios, apply);
    server.go_on_reading();
    assert!(transfer.finish(LIMIT).mptcp);
    container.stop();
    container.assert_ledger_is_empty();
}

/// As when an include file and the container's own configuration both have the hook.
#[test]
fn start_host_several_lines_that_agree_are_merged() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("agree{version}"))
            .two_paths(version)
            .start_host("")
            .start_host("--interface eth1=backup")
            .start_host("--interface eth1=backup --limit subflows=5")
            .start_host("--interface 'eth*=subflow' --sysctl stale_loss_cnt=3")
            .start_host("")
            .post_stop()
            .post_stop();
        container.start();
        let netns = container.netns();
        let flags =
            |interface| sandbox.endpoints_on(&netns, interface).into_iter().map(|e| e.flags).collect::<Vec<_>>();
        assert_eq!(flags("eth0"), [["subflow"]]);
        assert_eq!(flags("eth1"), [["backup", "subflow"]]);
        assert!(sandbox.sh_in(&netns, "ip mptcp limits show").contains("subflows 5"));
        assert_eq!(sandbox.sysctl(&netns, "net/mptcp/stale_loss_cnt").as_deref(), Some("3"));
        let interfaces = container.in_status()["interfaces"].clone();
        let names: Vec<_> = interfaces.as_array().into_iter().flatten().map(|i| i["name"].clone()).collect();
        assert_eq!(names, ["eth0", "eth1"]);
        container.stop();
        // The second post-stop line finds nothing left to do, which is no mistake.
        assert!(!container.log().contains("exited with status"), "{}", container.log());
        container.assert_ledger_is_empty();
    }
}

/// The second line stops the container, and post-stop takes back what the first did.
#[test]
fn start_host_several_lines_that_disagree_stop_the_container() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let seen = sandbox.dir().join("seen");
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("split{version}"))
            .two_paths(version)
            .start_host("--interface eth1=backup")
            .script("start-host", &format!("ip mptcp endpoint show >{}", seen.display()))
            .start_host("--interface eth1=subflow")
            .post_stop();
        let log = container.refused();
        assert!(log.contains("status 2"), "{log}");
        let first = std::fs::read_to_string(&seen).expect("what stood between the two lines has run");
        assert!(first.contains("10.0.2.2") && first.contains("backup"), "{first}");
        let ours = log.lines().filter(|line| line.contains("produced output: mptcp-hook: ")).collect::<Vec<_>>();
        assert!(ours.iter().any(|line| line.contains("eth1=subflow") && line.contains("eth1=backup")), "{ours:#?}");
        container.assert_ledger_is_empty();
    }
}

/// LXC adds the addresses just before the hook runs: duplicate address detection, which takes a hundred probes here, is not
/// over yet then.
#[test]
fn start_host_tentative_ipv6_is_added_at_once() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    sandbox.sh("ip addr add fd00:1::1/64 dev br0 nodad; ip addr add fd00:2::1/64 dev br1 nodad");
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let seen = sandbox.dir().join("tentative");
    let container = Lxc::new(&sandbox, "v6")
        .hook_version(1)
        .veth(0, &["ipv6.address = fd00:1::2/64", "ipv6.gateway = fd00:1::1"])
        .veth(1, &["ipv6.address = fd00:2::2/64"])
        .script_before_set_up("for file in /proc/sys/net/ipv6/conf/*/dad_transmits; do echo 100 >$file; done")
        .script(
            "start-host",
            &format!(
                "ip -6 route add default via fd00:2::1 dev eth1 metric 2048
                 ip -6 addr show dev eth1 tentative >{0}; echo hook >>{0}",
                seen.display()
            ),
        )
        .start_host("--interface eth1=backup")
        .script("start-host", &format!("ip -6 addr show dev eth1 tentative >>{}", seen.display()))
        .post_stop();
    container.start();
    let seen = std::fs::read_to_string(&seen).expect("what the scripts saw");
    let (before, after) = seen.split_once("hook\n").expect("both scripts have run");
    assert!(before.contains("fd00:2::2/64"), "not tentative before the hook: {seen}");
    assert!(after.contains("fd00:2::2/64"), "not tentative after the hook: {seen}");
    container.assert_only_endpoint("fd00:2::2", &["backup", "subflow"]);
    container.eth1_in_status("applied");

    // In time: what is left of the probes comes quickly.
    let probe_each = |milliseconds: u32| {
        let script =
            format!("for file in /proc/sys/net/ipv6/neigh/*/retrans_time_ms; do echo {milliseconds} >$file; done");
        sandbox.sh_in(&container.netns(), &script);
    };
    probe_each(20);
    wait_until("the end of duplicate address detection", LIMIT, || {
        let left = sandbox.sh_in(&container.netns(), "ip -6 addr show scope global tentative");
        left.is_empty()
    });
    probe_each(1000);
    container.assert_only_endpoint("fd00:2::2", &["backup", "subflow"]);
    let send = |bytes, rate| container.send(paths.address6(), bytes, Some(rate));
    assert_fails_over(&paths, &capture, ["br0", "br1"], send, || {});
    let join = capture.wait_join("br1");
    assert_eq!((join.source, join.backup), ("fd00:2::2".parse().expect("an address"), true));
    container.stop();
    container.assert_ledger_is_empty();
}

/// LXC starts it again under the same monitor: another pid, another namespace, the hooks once more.
#[test]
fn a_reboot_from_inside_sets_the_container_up_again() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("reboot{version}"))
            .two_paths(version)
            .start_host("--interface eth1=backup --sysctl stale_loss_cnt=3")
            .post_stop();
        container.start();
        let before = container.pid();
        for round in 1..=2 {
            let pid = container.pid();
            // The program that asks for it ends with the container.
            let _ = container.attach(&["/bin/busybox", "reboot", "-f"]).wait(ENGINE_LIMIT);
            wait_until("the container after its reboot", ENGINE_LIMIT, || {
                let now = sandbox.run(&container.lxc("lxc-info", &["-H", "-p"]));
                now.stdout.trim().parse().is_ok_and(|now: u32| now != pid) && container.state() == "RUNNING"
            });
            let runs = container.log().matches("subflow,backup 10.0.2.2").count();
            assert_eq!(runs, round + 1, "{}", container.log());
        }
        assert_ne!(container.pid(), before);
        container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
        assert_eq!(sandbox.sysctl(&container.netns(), "net/mptcp/stale_loss_cnt").as_deref(), Some("3"));
        let in_status = container.in_status();
        assert_eq!((&in_status["pid"], &in_status["live"]), (&json!(container.pid()), &json!(true)));
        let joins = capture.joins().len();
        container.send(paths.address(), 5_000_000, Some(5_000_000)).finish(LIMIT);
        assert!(capture.wait_join("br1").backup && capture.joins().len() > joins);
        // The hooks of a reboot have left this mark, too.
        let _ = std::fs::remove_file(container.end_mark());
        container.stop();
        container.assert_ledger_is_empty();
    }
}

/// Nobody was left to run post-stop.
#[test]
fn killed_with_its_monitor_is_released_as_stale_or_settled_by_the_next_start() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let container = Lxc::new(&sandbox, "killed").two_paths(1).start_host("--interface eth1=backup").post_stop();
    container.start();
    container.kill();
    assert_eq!(container.in_status()["live"], false);
    container.hook(&["release", "--stale"]).ok();
    container.assert_ledger_is_empty();

    container.start();
    container.kill();
    let dead = container.in_status();
    assert_eq!(dead["live"], false);
    container.start();
    let alive = container.in_status();
    assert_eq!((&alive["live"], &alive["pid"]), (&json!(true), &json!(container.pid())));
    container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    container.hook(&["release", "--stale"]).ok();
    container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    container.stop();
    container.assert_ledger_is_empty();
}

/// Two containers may have one name in two directories.
#[test]
fn one_name_in_two_lxcpaths_is_two_containers() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let make = |lxcpath, flags: &str| {
        let container = Lxc::in_lxcpath(&sandbox, lxcpath, "twin", Starter::Root).hook_version(1);
        let container = container.veth(0, &[]).veth(1, &["ipv4.address = 10.0.2.2/24"]);
        container.start_host(&format!("--interface eth1={flags}")).post_stop()
    };
    let (first, second) = (make("here", "backup"), make("there", "subflow"));
    first.start();
    second.start();
    first.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    second.assert_only_endpoint("10.0.2.2", &["subflow"]);
    // Which of them is meant cannot be told.
    let message = first.hook(&["apply", &first.name, "--interface", "eth1=subflow"]).fails_with(2);
    assert!(message.contains(&first.name), "{message}");
    // The message names each by its lxcpath.
    let words: Vec<&str> = message.split_whitespace().collect();
    let of_second = words.iter().position(|word| word.contains("/there)")).map(|place| words[place - 1]);
    second.hook(&["apply", of_second.expect("the second's"), "--interface", "eth1=backup"]).ok();
    second.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    second.hook(&["apply", of_second.expect("the second's"), "--interface", "eth1=subflow"]).ok();
    first.stop();
    second.assert_only_endpoint("10.0.2.2", &["subflow"]);
    assert_eq!(second.in_status()["pid"], second.pid());
    second.stop();
    second.assert_ledger_is_empty();
}

/// A value that the kernel has once is changed for one container, shared with the next, refused to a third that wants
/// another, and brought back by the last to leave.
#[test]
fn host_value_is_shared_refused_and_restored() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let (wanted, other) = ((original + 1000).to_string(), (original + 2000).to_string());
    let make = |what, value: &str| {
        let container = Lxc::new(&sandbox, what).hook_version(1).line("lxc.net.0.type = empty");
        container.start_host(&format!("--sysctl net.core.netdev_max_backlog={value}")).post_stop()
    };
    let (first, second, third) = (make("first", &wanted), make("second", &wanted), make("third", &other));
    first.start();
    assert_eq!(value.current(), wanted);
    let setting = first.status()["settings"][0].clone();
    assert_eq!((&setting["scope"], &setting["key"]), (&json!("host"), &json!("net.core.netdev_max_backlog")));
    assert_eq!((&setting["value"], &setting["original"]), (&json!(wanted), &json!(original.to_string())));

    let log = third.refused();
    assert!(log.contains("status 3"), "{log}");
    let ours = log.lines().find(|line| line.contains("produced output: mptcp-hook: ")).unwrap_or_default();
    for part in ["net.core.netdev_max_backlog", &first.name, &third.name, &wanted, &other] {
        assert!(ours.contains(part), "`{part}` is not in: {ours}");
    }
    assert_eq!(value.current(), wanted);
    let conflicts = sandbox.conflicts();
    assert_eq!(conflicts.len(), 1, "{conflicts:#?}");
    assert_eq!((&conflicts[0]["outcome"], &conflicts[0]["container"]), (&json!("refused"), &json!(third.name)));
    assert_eq!(conflicts[0]["holders"], json!([first.name]));

    second.start();
    assert_eq!(second.in_status()["settings"][0]["outcome"], "shared");
    first.stop();
    assert_eq!(value.current(), wanted);
    assert_eq!(second.status()["settings"][0]["claims"], json!([{"container": second.name, "value": wanted}]));
    second.stop();
    assert_eq!(value.current(), value.original());
    third.start();
    assert_eq!(value.current(), other);
    third.stop();
    assert_eq!(value.current(), value.original());
    third.assert_ledger_is_empty();
}

/// What the hook's line can say about a value that another container relies on: leave it, or take it.
#[test]
fn host_value_warned_about_and_overridden() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let (wanted, other) = ((original + 1000).to_string(), (original + 2000).to_string());
    let make = |what, value: &str, more: &str| {
        let container = Lxc::new(&sandbox, what).hook_version(1).line("lxc.net.0.type = empty");
        container.start_host(&format!("--sysctl net.core.netdev_max_backlog={value} {more}")).post_stop()
    };
    let holder = make("holder", &wanted, "");
    let modest = make("modest", &other, "--on-conflict warn");
    let bold = make("bold", &other, "--on-conflict override");
    let outcome = |container: &Lxc| container.in_status()["settings"][0]["outcome"].clone();
    holder.start();

    modest.start();
    assert_eq!(value.current(), wanted);
    assert_eq!(outcome(&modest), "kept");
    let log = modest.log();
    assert!(log.lines().any(|line| line.contains("warning") && line.contains(&holder.name)), "{log}");
    modest.stop();
    assert_eq!(value.current(), wanted);

    bold.start();
    assert_eq!(value.current(), other);
    assert_eq!((outcome(&bold), outcome(&holder)), (json!("overrode"), json!("overridden")));
    let log = bold.log();
    assert!(log.lines().any(|line| line.contains("warning") && line.contains(&holder.name)), "{log}");
    bold.stop();
    assert_eq!(value.current(), wanted);
    assert_ne!(outcome(&holder), "overridden");
    holder.stop();
    assert_eq!(value.current(), value.original());
    let outcomes: Vec<_> = sandbox.conflicts().iter().map(|conflict| conflict["outcome"].clone()).collect();
    assert_eq!(outcomes, ["warned", "overrode"]);
    holder.assert_ledger_is_empty();
}

/// The first line of the hook has changed the host already when the second stops the container.
#[test]
fn host_value_is_restored_after_a_failed_start() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let seen = sandbox.dir().join("seen");
    let container = Lxc::new(&sandbox, "failing")
        .hook_version(0)
        .line("lxc.net.0.type = empty")
        .start_host(&format!("--sysctl net.core.netdev_max_backlog={}", original + 1000))
        .line(&format!("lxc.hook.start-host = cp /proc/sys/{HOST_KEY} {}; :", seen.display()))
        .start_host("--interface eth1=nonsense")
        .post_stop();
    container.refused();
    let seen = std::fs::read_to_string(seen).expect("what stood between the two lines has run");
    assert_eq!(seen.trim(), (original + 1000).to_string());
    assert_eq!(value.current(), value.original());
    container.assert_ledger_is_empty();
}

/// A dead container holds nothing back, and what it found on the host is not forgotten.
#[test]
fn host_value_of_a_killed_container() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let (wanted, other) = ((original + 1000).to_string(), (original + 2000).to_string());
    let make = |what, value: &str| {
        let container = Lxc::new(&sandbox, what).hook_version(1).line("lxc.net.0.type = empty");
        container.start_host(&format!("--sysctl net.core.netdev_max_backlog={value}")).post_stop()
    };
    let (killed, next) = (make("killed", &wanted), make("next", &other));

    // The same container again: its new life takes the place of the old one.
    killed.start();
    killed.kill();
    assert_eq!(value.current(), wanted);
    killed.start();
    assert_eq!(value.current(), wanted);
    let settings = killed.status()["settings"].clone();
    assert_eq!(settings[0]["original"], original.to_string(), "{settings:#}");
    assert_eq!(settings[0]["claims"].as_array().map(Vec::len), Some(1), "{settings:#}");

    // Another one, that wants another value, is not held back by it.
    killed.kill();
    next.start();
    assert_eq!(value.current(), other);
    assert_eq!(next.status()["settings"][0]["original"], original.to_string());
    next.hook(&["release", "--stale"]).ok();
    assert_eq!(value.current(), other);
    next.stop();
    assert_eq!(value.current(), value.original());
    next.assert_ledger_is_empty();

    // Nobody comes after it.
    killed.start();
    killed.kill();
    killed.hook(&["release", "--stale"]).ok();
    assert_eq!(value.current(), value.original());
    killed.assert_ledger_is_empty();
}

/// lxc-start waits for everybody who has a descriptor of the hook's output.
#[test]
fn the_hook_keeps_nobody_waiting() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let without = Lxc::new(&sandbox, "without").two_paths(1);
    let with = Lxc::new(&sandbox, "with").two_paths(1).start_host("--interface eth1=backup").post_stop();
    // A machine may have no processor for one of them for seconds.
    let is_quick = |_| {
        let bare = without.start();
        without.stop();
        let hooked = with.start();
        let is_quick = hooked < bare + Duration::from_secs(3);
        if !is_quick {
            with.stop();
        }
        is_quick
    };
    assert!((0..10).any(is_quick), "LXC waits for something that the hook has left");
    let program = with.hook_program();
    let left = sandbox.sh(&format!(
        "for process in /proc/[0-9]*; do
           [ \"$(readlink $process/exe)\" != {} ] || echo $process
         done",
        program.display()
    ));
    assert_eq!(left, "", "processes of the hook are still there");
    with.stop();

    // In the foreground LXC lives as long as the container, and the hook's words go to the log all the same.
    let foreground = Lxc::new(&sandbox, "front").two_paths(1).start_host("--interface eth1=backup").post_stop();
    foreground.write();
    let log = foreground.log_file().display().to_string();
    let running = sandbox.spawn(&foreground.lxc("lxc-start", &["-F", "-l", "DEBUG", "-o", &log]));
    wait_until("the container in the foreground", ENGINE_LIMIT, || foreground.state() == "RUNNING");
    foreground.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    let _server = Server::start(&sandbox, paths.server());
    assert!(foreground.send(paths.address(), 1_000_000, None).finish(LIMIT).mptcp);
    foreground.stop();
    let outcome = running.wait(ENGINE_LIMIT);
    assert!(!outcome.stdout.contains("mptcp-hook") && !outcome.stderr.contains("mptcp-hook"), "{outcome}");
    assert!(foreground.log().contains("produced output: mptcp-hook: "), "{}", foreground.log());
    foreground.assert_ledger_is_empty();
}
