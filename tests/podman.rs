//! The hook under podman with netavark and conmon, on crun and runc, as an administrator installs it.

mod common;

use std::net::IpAddr;

use common::*;
use serde_json::{Value, json};

/// Nobody is to see to it later.
const NEVER: &str = "--annotation=mptcp-hook/follow=never";

with_each_runtime! {
    podman_upstream_backup_join_traffic_failover,
    podman_either_default_route_first_with_both_interfaces_named,
    podman_restart_stop_and_start_apply_again,
    podman_kill_is_cleaned_up,
    podman_pod_is_left_by_one_member_then_the_other,
    podman_network_of_another_container,
    podman_network_of_another_container_whose_owner_stops_first,
    podman_members_that_disagree,
    podman_network_by_the_path_of_a_process,
    podman_defaults_of_the_policy_without_annotations,
    podman_file_for_a_container_by_name,
    podman_host_network_is_refused_only_if_asked_for,
    podman_misspelt_annotation_stops_the_container,
    podman_sysctl_that_the_policy_does_not_list_stops_the_container,
    podman_sysctl_option_conflicts_with_the_annotation,
    podman_sysctl_option_that_turns_mptcp_off,
    podman_without_network_is_pending,
    podman_that_is_told_of_no_directory_looks_into_one,
    podman_user_namespace_gets_its_network_later,
    podman_rootless_upstream_backup_join_traffic,
    podman_rootless_cannot_change_the_host,
}

/// Lists the ledger's files but for what has happened.
const FILES_OF_CONTAINERS: &str =
    "[ ! -e /run/mptcp-hook ] || find /run/mptcp-hook -type f ! -name 'conflicts*' ! -name 'failures*'";

/// Nothing stays behind: no container, no setting, no endpoint of the host, no file in the state directory.
#[track_caller]
fn assert_nothing_is_left(sandbox: &Sandbox) {
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&Netns::Host), []);
    assert_eq!(sandbox.sh(FILES_OF_CONTAINERS), "");
}

/// conmon runs the clean-up, and with it poststop, some time after the container's end.
#[track_caller]
fn wait_for_empty_ledger(sandbox: &Sandbox) {
    // The container's locks go after its record, which is what `status` knows of; some go while it is looked for them.
    wait_until("an empty ledger", LIMIT, || {
        let outcome = sandbox.run(&["sh", "-ec", FILES_OF_CONTAINERS]);
        outcome.code == Some(0) && outcome.stdout.is_empty()
    });
    assert_nothing_is_left(sandbox);
}

/// The whole life: eth1 is a backup path from the first connection on, really carries nothing while eth0 works,
/// takes over when eth0's bridge goes down, and nothing stays behind.
fn podman_upstream_backup_join_traffic_failover(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::at_host(&sandbox);
    let podman = Podman::new(&sandbox, runtime);
    let server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let container = podman.start_on_both("web", &[BACKUP]);

    container.assert_backup_on_eth1();
    let in_status = sandbox.status_of(container.id());
    assert_eq!((&in_status["live"], &in_status["name"]), (&json!(true), &json!(container.id())));

    let send = |to, bytes, rate: Option<u64>| container.send(to, bytes, rate.expect("a rate"));
    assert_backup_path(&paths, &server, &capture, ["br0", "br1"], container.eth1_address(), send);

    podman.podman(&["stop", "--time=0", "web"]).ok();
    wait_for_empty_ledger(&sandbox);
    container.remove();
    assert_nothing_is_left(&sandbox);
}

/// With podman's own routes either network may carry the first subflow. With both interfaces named it does not
/// matter: begun on the backup path, the connection moves to eth0 at once.
fn podman_either_default_route_first_with_both_interfaces_named(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::at_host(&sandbox);
    let podman = Podman::new(&sandbox, runtime);
    for (network, octet) in [("net0", 1), ("net1", 2)] {
        podman::write_network(&sandbox, network, octet, DefaultRoute::OfPodman);
    }
    let server = Server::start(&sandbox, paths.server());
    let container = podman.start_on_both("web", &["--annotation=mptcp-hook/interfaces=eth0=subflow; eth1=backup"]);
    let netns = container.netns();
    assert_eq!(eth1_of(&sandbox.status_of(container.id()), "applied")["route"], "ok");
    let routes = sandbox.sh_in(&netns, "ip -4 route show default");
    let metrics = routes.lines().filter(|route| route.contains("metric 100")).count();
    assert_eq!(metrics, 2, "podman's own routes: {routes}");

    for (first, second) in [("eth0", "eth1"), ("eth1", "eth0")] {
        // The routes stay podman's, only their order is made certain.
        let add = |interface: &str, how: &str| {
            let octet = if interface == "eth0" { 1 } else { 2 };
            format!("ip route {how} default via 10.0.{octet}.1 dev {interface} proto static metric 100; ")
        };
        let script = format!("ip -4 route flush default; {}{}", add(first, "add"), add(second, "append"));
        sandbox.sh_in(&netns, &script);
        let capture = Capture::start(&sandbox, paths.server());
        // Next to nothing is sent, however long it takes, before there are both.
        server.stop_reading();
        let transfer = container.send(paths.address(), 10_000_000, RATE);
        let bridge = second.replace("eth", "br");
        let join = capture.wait_join(&bridge);
        assert_eq!(join.backup, second == "eth1", "the first route is {first}'s");
        wait_until("an answer to the join", LIMIT, || {
            capture.packets().iter().any(|packet| packet.interface == bridge && packet.syn && packet.outgoing)
        });
        server.go_on_reading();
        assert!(transfer.finish(LIMIT).mptcp);
        let (over_0, over_1) = (capture.payload_received("br0"), capture.payload_received("br1"));
        assert!(over_1 * 20 < over_0, "the first route is {first}'s: {over_0} bytes over eth0, {over_1} over eth1");
    }
    container.remove();
    assert_nothing_is_left(&sandbox);
}

/// The old life's poststop comes before the new life's createRuntime, and the new one has another address.
fn podman_restart_stop_and_start_apply_again(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    let container = podman.start_on_both("web", &[BACKUP]);
    container.assert_backup_on_eth1();
    let first = sandbox.status_of(container.id())["pid"].clone();

    podman.podman(&["restart", "--time=0", "web"]).ok();
    container.assert_backup_on_eth1();
    assert_ne!(sandbox.status_of(container.id())["pid"], first);

    podman.podman(&["stop", "--time=0", "web"]).ok();
    wait_for_empty_ledger(&sandbox);
    podman.podman(&["start", "web"]).ok();
    container.assert_backup_on_eth1();

    container.remove();
    assert_nothing_is_left(&sandbox);
    assert_eq!(sandbox.conflicts(), Vec::<Value>::new());
}

fn podman_kill_is_cleaned_up(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    let container = podman.start_on_both("web", &[BACKUP]);
    container.assert_backup_on_eth1();
    podman.podman(&["kill", "web"]).ok();
    wait_for_empty_ledger(&sandbox);
    container.remove();
}

/// In a pod the interfaces belong to none of the members. The member that made the endpoint leaves first.
fn podman_pod_is_left_by_one_member_then_the_other(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    podman.pod("pod");
    let first = podman.start("first", &["--pod=pod", BACKUP]);
    let second = podman.start("second", &["--pod=pod", BACKUP]);
    let namespace = second.netns();
    first.assert_backup_on_eth1();
    let endpoint = sandbox.endpoints(&namespace);

    first.remove();
    second.assert_backup_on_eth1();
    assert_eq!(sandbox.endpoints(&namespace), endpoint, "the endpoint was replaced");
    assert_eq!(sandbox.status()["containers"].as_array().map(Vec::len), Some(1));

    let infra = podman.podman(&["pod", "inspect", "--format", "{{.InfraContainerID}}", "pod"]).ok();
    let infra = Netns::Pid(podman.inspect(&infra, "{{.State.Pid}}").parse().expect("a pid"));
    second.remove();
    assert_eq!(sandbox.endpoints(&infra), []);
    let limits = sandbox.sh_in(&infra, "ip mptcp limits show");
    assert!(limits.contains("subflows 2"), "not the kernel's default any more: {limits}");
    assert_nothing_is_left(&sandbox);
    podman.podman(&["pod", "rm", "--force", "--time=0", "pod"]).ok();
}

/// `--network container:X`: who joined last leaves first.
fn podman_network_of_another_container(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    let owner = podman.start_on_both("owner", &[BACKUP]);
    let guest = podman.start("guest", &["--network=container:owner", BACKUP]);
    guest.assert_backup_on_eth1();
    guest.remove();
    owner.assert_backup_on_eth1();
    owner.remove();
    assert_nothing_is_left(&sandbox);
}

/// podman takes the interfaces away with the container that they were made for; its guest goes on with lo alone, and
/// `status` does not pretend.
fn podman_network_of_another_container_whose_owner_stops_first(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    podman.start_on_both("owner", &[BACKUP]);
    let guest = podman.start("guest", &["--network=container:owner", BACKUP]);
    podman.podman(&["stop", "--time=0", "owner"]).ok();
    wait_until("the clean-up of the owner", LIMIT, || {
        sandbox.status()["containers"].as_array().map(Vec::len) == Some(1)
    });
    eth1_of(&sandbox.status_of(guest.id()), "drifted");
    guest.remove();
    assert_nothing_is_left(&sandbox);
    podman.podman(&["rm", "owner"]).ok();
}

/// Two containers in one namespace that want eth1 differently: the second does not start, unless it says `warn`.
fn podman_members_that_disagree(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    let first = podman.start_on_both("first", &[BACKUP]);
    let joined = ["--network=container:first", "--annotation=mptcp-hook/interface.eth1=subflow"];

    let (message, id) = podman.refused("second", &joined, 3);
    assert!(message.contains("eth1") && message.contains(first.id()), "{message}");
    first.assert_backup_on_eth1();
    let conflicts = sandbox.conflicts();
    assert_eq!(conflicts.len(), 1, "{conflicts:#?}");
    let conflict = &conflicts[0];
    assert_eq!((&conflict["outcome"], &conflict["container"]), (&json!("refused"), &json!(id)));
    assert_eq!(conflict["holders"], json!([first.id()]));
    assert_eq!((&conflict["wanted"], &conflict["kept"]), (&json!("subflow"), &json!("subflow,backup")));

    let override_it = "--annotation=mptcp-hook/on-conflict=override";
    podman.refused("second", &[&joined[..], &[override_it]].concat(), 3);
    first.assert_backup_on_eth1();

    let warn = "--annotation=mptcp-hook/on-conflict=warn";
    let third = podman.start("third", &[&joined[..], &[warn]].concat());
    first.assert_backup_on_eth1();
    let conflicts = sandbox.conflicts();
    let warned = conflicts.iter().filter(|conflict| conflict["outcome"] == "warned").collect::<Vec<_>>();
    assert_eq!(warned.len(), 1, "{conflicts:#?}");
    assert_eq!(warned[0]["container"], third.id());

    third.remove();
    first.assert_backup_on_eth1();
    first.remove();
    assert_nothing_is_left(&sandbox);
}

/// `--network ns:PATH` may name another process's namespace, which lives on: it must be left as it was found.
fn podman_network_by_the_path_of_a_process(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::with_container_netns(&sandbox, &Wiring::new());
    let podman = Podman::new(&sandbox, runtime);
    let ctr = Netns::named("ctr");
    let pid_file = sandbox.dir().join("holder.pid");
    let script = format!("echo $$ >{0}.new; mv {0}.new {0}; exec sleep 1000", pid_file.display());
    let _holder = sandbox.spawn_in(&ctr, &["sh", "-c", &script]);
    let pid = wait_for("the holder's pid", LIMIT, || std::fs::read_to_string(&pid_file).ok());
    let network = format!("--network=ns:/proc/{}/ns/net", pid.trim());

    let container = podman.start("web", &[&network, BACKUP]);
    container.assert_backup_on_eth1();
    assert_eq!(sandbox.endpoints(&ctr), sandbox.endpoints(&container.netns()));
    container.remove();
    assert_eq!(sandbox.endpoints(&ctr), []);
    assert_eq!(sandbox.endpoints(paths.server()), []);
    assert_nothing_is_left(&sandbox);
}

/// The administrator says it once for all containers; those without such an interface do not notice.
fn podman_defaults_of_the_policy_without_annotations(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    sandbox.patient_policy("[defaults.interfaces]\n\"eth1\" = \"backup\"\n[defaults.limits]\nsubflows = 4\n");
    let both = podman.start_on_both("both", &[]);
    both.assert_backup_on_eth1();
    assert!(sandbox.sh_in(&both.netns(), "ip mptcp limits show").contains("subflows 4"));

    let own_mind = podman.start_on_both("own", &["--annotation=mptcp-hook/interface.eth1=subflow"]);
    assert_only_endpoint(&sandbox, &own_mind.netns(), own_mind.eth1_address(), &["subflow"]);

    let one = podman.start("one", &NETWORKS[..1]);
    assert_eq!(sandbox.endpoints(&one.netns()), []);
    for container in [both, own_mind, one] {
        container.remove();
    }
    assert_nothing_is_left(&sandbox);
}

/// The 64-digit id cannot be known before; `--name` in the hook's arguments, or a file that says which annotations it
/// is for, can.
fn podman_file_for_a_container_by_name(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    let directory = "/etc/mptcp-hook/containers.d";
    let file = "[match]\n\"org.example.tier\" = \"web*\"\n[interfaces]\n\"eth1\" = \"backup\"\n";
    sandbox.write(&format!("{directory}/front.toml"), file);
    sandbox.write(&format!("{directory}/loose.toml"), "[interfaces]\n\"eth1\" = \"backup\"\n");
    let name = |name: &str| format!("--annotation=mptcp-hook/name={name}");

    let meant = podman.start_on_both("meant", &[&name("front"), "--annotation=org.example.tier=web-1"]);
    meant.assert_backup_on_eth1();
    assert_eq!(sandbox.status_of(meant.id())["name"], "front");
    let others = [
        ("tier", vec![name("front"), "--annotation=org.example.tier=db".to_owned()]),
        ("untiered", vec![name("front")]),
        ("loose", vec![name("loose")]),
    ];
    for (what, options) in &others {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let container = podman.start_on_both(what, &options);
        assert_eq!(sandbox.endpoints(&container.netns()), [], "{what}");
        container.remove();
    }
    meant.remove();
    assert_nothing_is_left(&sandbox);

    let podman = Podman::with_hook_arguments(&sandbox, runtime, &["--name", "loose"]);
    let named = podman.start_on_both("named", &[]);
    named.assert_backup_on_eth1();
    named.remove();
    assert_nothing_is_left(&sandbox);
}

/// The host's own network is nobody's container: refused if asked for, left alone if only the defaults ask.
fn podman_host_network_is_refused_only_if_asked_for(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    sandbox.sh("ip link add eth1 type veth peer name far; ip addr add 10.0.2.2/24 dev eth1; ip link set eth1 up");
    let (message, _) = podman.refused("asks", &["--network=host", BACKUP], 3);
    assert!(message.contains("host") && message.contains("policy"), "{message}");
    assert_nothing_is_left(&sandbox);

    let plain = podman.start("plain", &["--network=host"]);
    sandbox.patient_policy("[defaults.interfaces]\n\"eth1\" = \"backup\"\n");
    let defaults = podman.start("defaults", &["--network=host"]);
    assert_nothing_is_left(&sandbox);
    for container in [plain, defaults] {
        container.remove();
    }
    assert_nothing_is_left(&sandbox);

    sandbox.patient_policy("host-namespace = \"allow\"\n");
    let allowed = podman.start("allowed", &["--network=host", BACKUP]);
    assert_only_endpoint(&sandbox, &Netns::Host, IpAddr::from([10, 0, 2, 2]), &["backup", "subflow"]);
    allowed.remove();
    assert_nothing_is_left(&sandbox);
}

fn podman_misspelt_annotation_stops_the_container(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    for (misspelt, right) in [
        ("mptcp_hook/interface.eth1", "mptcp-hook/interface"),
        ("mptcp-hook/interfacs", "mptcp-hook/interfaces"),
        ("mptcp-hook/limit.subflow", "subflows"),
    ] {
        let annotation = format!("--annotation={misspelt}=backup");
        let (message, _) = podman.refused("typo", &[&NETWORKS[..], &[&annotation]].concat(), 2);
        assert!(message.contains(misspelt) && message.contains(right), "{message}");
        assert_nothing_is_left(&sandbox);
    }
}

fn podman_sysctl_that_the_policy_does_not_list_stops_the_container(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    sandbox.patient_policy("[annotations.sysctls]\n\"net.ipv4.tcp_ecn\" = [1]\n");
    let options = |wish: &str| format!("--annotation=mptcp-hook/sysctl.{wish}");
    for (wish, key) in [("net.ipv4.tcp_ecn=0", "net.ipv4.tcp_ecn"), ("net.ipv4.tcp_sack=0", "net.ipv4.tcp_sack")] {
        let (message, id) = podman.refused("greedy", &[&NETWORKS[..], &[BACKUP, &options(wish)]].concat(), 3);
        assert!(message.contains(key) && message.contains("config.toml"), "{message}");
        assert!(sandbox.conflicts().iter().any(|c| c["key"] == key && c["container"] == id), "{message}");
        assert_nothing_is_left(&sandbox);
    }
    let modest = podman.start_on_both("modest", &[BACKUP, &options("net.ipv4.tcp_ecn=1")]);
    modest.assert_backup_on_eth1();
    assert_eq!(sandbox.sysctl(&modest.netns(), "net/ipv4/tcp_ecn").as_deref(), Some("1"));
    modest.remove();
    assert_nothing_is_left(&sandbox);
}

/// What `--sysctl` says is written by runc after the hook and would undo it; crun 1.8 writes it before.
fn podman_sysctl_option_conflicts_with_the_annotation(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    // A namespace that stays, to see that nothing was applied to it.
    podman.pod("pod");
    podman.podman(&["pod", "start", "pod"]).ok();
    let infra = podman.podman(&["pod", "inspect", "--format", "{{.InfraContainerID}}", "pod"]).ok();
    let netns = Netns::Pid(podman.inspect(&infra, "{{.State.Pid}}").parse().expect("a pid"));
    let options = |enabled: &str| {
        let wish = format!("--annotation=mptcp-hook/sysctl.enabled={enabled}");
        ["--sysctl=net.mptcp.enabled=0".to_owned(), wish, "--annotation=mptcp-hook/limit.subflows=5".to_owned()]
    };
    let in_pod = |name: &str, enabled: &str| {
        let network = format!("--network=ns:{}", netns.path());
        let options = options(enabled);
        let mut all = vec![network.as_str()];
        all.extend(options.iter().map(String::as_str));
        podman.refused(name, &all, 3).0
    };
    let message = in_pod("differs", "1");
    for part in ["net.mptcp.enabled", "linux.sysctl"] {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    assert!(sandbox.sh_in(&netns, "ip mptcp limits show").contains("subflows 2"), "half applied");
    assert_nothing_is_left(&sandbox);
    podman.podman(&["pod", "rm", "--force", "--time=0", "pod"]).ok();

    let options = options("0");
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let agrees = podman.start_on_both("agrees", &options);
    assert_eq!(sandbox.sysctl(&agrees.netns(), "net/mptcp/enabled").as_deref(), Some("0"));
    agrees.remove();
    assert_nothing_is_left(&sandbox);
}

/// Without MPTCP in the container the endpoints would do nothing, whenever the runtime writes it.
fn podman_sysctl_option_that_turns_mptcp_off(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    let outcome = podman.run("off", &[&NETWORKS[..], &["--sysctl=net.mptcp.enabled=0", BACKUP]].concat());
    let hooks = std::fs::read_to_string(podman.hook_messages("off")).unwrap_or_default();
    let message = format!("{outcome}\n{hooks}");
    assert_ne!(outcome.code, Some(0), "it was started: {message}");
    assert!(message.contains("net.mptcp.enabled"), "{message}");
    podman.podman(&["rm", "--force", "--time=0", "off"]).ok();
    assert_nothing_is_left(&sandbox);
}

fn podman_without_network_is_pending(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    let container = podman.start("alone", &["--network=none", BACKUP, NEVER]);
    eth1_of(&sandbox.status_of(container.id()), "pending");
    assert_eq!(sandbox.endpoints(&container.netns()), []);
    container.remove();
    assert_nothing_is_left(&sandbox);
}

/// Told of no directory, podman takes the hooks of /usr/share and passes over those of /etc; the doctor goes by that.
fn podman_that_is_told_of_no_directory_looks_into_one(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    sandbox.sh(&format!(
        "sed -i /^hooks_dir/d /etc/containers/containers.conf
         mkdir -p /usr/share/containers && mount -t tmpfs tmpfs /usr/share/containers
         mkdir -p /usr/share/containers/oci /etc/containers/oci
         mv {} /etc/containers/oci",
        sandbox.dir().join("hooks.d").display()
    ));
    let options = ["--network=none", BACKUP, NEVER];
    let passed_over = podman.start("passed-over", &options);
    assert_eq!(sandbox.status()["containers"], json!([]));
    assert!(Diagnosis::of(&sandbox, &[]).has("hook-dir-unseen"));
    passed_over.remove();
    sandbox.sh("mv /etc/containers/oci/hooks.d /usr/share/containers/oci");
    let taken = podman.start("taken", &options);
    eth1_of(&sandbox.status_of(taken.id()), "pending");
    assert!(!Diagnosis::of(&sandbox, &[]).has("hook-dir-unseen"));
    taken.remove();
    assert_nothing_is_left(&sandbox);
}

/// With a user namespace podman joins the container to its networks only after the hooks. (What the agent does about it
/// is tested with the agent.)
fn podman_user_namespace_gets_its_network_later(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let podman = Podman::new(&sandbox, runtime);
    // crun cannot make the mount points there, having the container's ids by then.
    sandbox.sh(&format!(
        "cd {}; mkdir etc run; touch etc/hosts etc/hostname etc/resolv.conf run/.containerenv
         chown -R 200000:200000 .",
        oci::root_filesystem(&sandbox).display()
    ));
    let mapping = ["--uidmap=0:200000:65536", "--gidmap=0:200000:65536", BACKUP, NEVER];
    let container = podman.start_on_both("mapped", &mapping);
    eth1_of(&sandbox.status_of(container.id()), "pending");

    sandbox.hook(&["apply", container.id(), "--interface", "eth1=backup"]).ok();
    container.assert_backup_on_eth1();
    container.remove();
    assert_nothing_is_left(&sandbox);
}

/// The hook is uid 0 in podman's user namespace: it may change what belongs to that, and keeps the ledger in the
/// user's own runtime directory.
fn podman_rootless_upstream_backup_join_traffic(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::new(&sandbox);
    // Host root's policy, which shows as the overflow uid's in there.
    sandbox.patient_policy("[defaults.limits]\nsubflows = 4\n");
    let rootless = Rootless::new(&paths, &sandbox, runtime);
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let outcome = rootless.start("web", &[BACKUP]);
    assert_eq!(outcome.code, Some(0), "{outcome}\n{}", rootless.messages("web"));

    let ctr = Netns::named("ctr");
    assert_only_endpoint(&sandbox, &ctr, IpAddr::from([10, 0, 2, 2]), &["backup", "subflow"]);
    assert!(sandbox.sh_in(&ctr, "ip mptcp limits show").contains("subflows 4"));
    let status = rootless.status();
    assert_eq!(status["containers"][0]["id"], outcome.stdout.trim());
    assert_eq!(status["containers"][0]["interfaces"][0]["state"], "applied");
    let owner = sandbox.sh(&format!("stat -c '%u %a' {}", user::state_directory()));
    assert_eq!(owner, format!("{} 700", user::UID));
    assert_eq!(sandbox.run(&["test", "-e", "/run/mptcp-hook"]).code, Some(1), "it wrote to root's ledger");

    let transfer = rootless.send("web", paths.address(), 5_000_000, 5_000_000);
    assert!(transfer.finish(LIMIT).mptcp);
    assert!(capture.wait_join("eth1").backup);
    let (first, second) = (capture.payload_received("eth0"), capture.payload_received("eth1"));
    assert!(second * 20 < first, "payload over the backup path eth1: {second} bytes, over eth0: {first}");

    rootless.remove("web");
    assert_eq!(sandbox.endpoints(&ctr), []);
    assert_eq!(rootless.status()["containers"], json!([]));
    assert_eq!(sandbox.sh(&format!("find {} -type f", user::state_directory())), "");
}

/// Host-wide values are not a user's to change, even if the policy lists them.
fn podman_rootless_cannot_change_the_host(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::new(&sandbox);
    sandbox.patient_policy("[annotations.sysctls]\n\"net.core.rmem_max\" = \"*\"\n");
    let rootless = Rootless::new(&paths, &sandbox, runtime);
    let before = sandbox.sysctl(&Netns::Host, "net/core/rmem_max").expect("there is such a value");
    let wish = "--annotation=mptcp-hook/sysctl.net.core.rmem_max=7654321";
    let outcome = rootless.start("greedy", &[BACKUP, wish]);
    let message = format!("{outcome}\n{}", rootless.messages("greedy"));
    assert_ne!(outcome.code, Some(0), "it was started: {message}");
    assert!(message.contains("exit status 3") || message.contains("exit code: 3"), "{message}");
    assert!(message.contains("net.core.rmem_max") && message.contains("user namespace"), "{message}");
    assert_eq!(sandbox.sysctl(&Netns::Host, "net/core/rmem_max"), Some(before));
    assert_eq!(sandbox.endpoints(&Netns::named("ctr")), []);
    let status = rootless.status();
    assert_eq!(status["containers"], json!([]));
    assert_eq!(status["conflicts"][0]["outcome"], "refused");
    rootless.remove("greedy");
}
