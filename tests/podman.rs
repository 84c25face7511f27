//! The hook under podman with netavark and conmon, on crun and runc, as an administrator installs it: the shipped
//! hooks.d file, named in containers.conf.
//!
//! podman joins the containers to bridges in the sandbox's own namespace, which is the server of these tests: eth0 of
//! a container is behind br0, eth1 behind br1, and the server's address 10.0.0.1 is reachable over both.
//!
//! netavark gives every default route the metric 100, so it is left to chance which of two networks carries the first
//! subflow. Where that matters, the networks of a test have netavark's option `metric`: 100 for net0, 200 for net1.

mod common;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::*;
use serde_json::{Value, json};

/// How long the clean-up that conmon starts after a container's end may take.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(10);

/// What is shipped for podman and CRI-O.
const HOOKS_D: &str = include_str!("../hooks/oci/hooks.d/mptcp-hook.json");

/// Where the shipped file expects the program.
const INSTALLED: &str = "/usr/local/bin/mptcp-hook";

/// The networks, with the names that the interfaces get in the container.
const NETWORKS: [&str; 2] = ["--network=net0:interface_name=eth0", "--network=net1:interface_name=eth1"];

/// The usual wish.
const BACKUP: &str = "--annotation=mptcp-hook/interface.eth1=backup";
/// Nobody is to see to it later.
const NEVER: &str = "--annotation=mptcp-hook/follow=never";

/// An unprivileged user who has no other processes.
const USER: u32 = 54_242;

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
    podman_user_namespace_gets_its_network_later,
    podman_rootless_upstream_backup_join_traffic,
    podman_rootless_cannot_change_the_host,
}

/// A podman of its own below the sandbox's directory.
struct Podman<'a> {
    sandbox: &'a Sandbox,
    runtime: Runtime,
}

impl<'a> Podman<'a> {
    /// Installs the hook as shipped.
    fn new(sandbox: &'a Sandbox, runtime: Runtime) -> Self {
        Self::with_hook_arguments(sandbox, runtime, &[])
    }

    /// Installs the hook with further `arguments` in its hooks.d file.
    fn with_hook_arguments(sandbox: &'a Sandbox, runtime: Runtime, arguments: &[&str]) -> Self {
        for (program, package) in [("podman", "podman"), ("conmon", "conmon"), (runtime.program(), runtime.program())] {
            require(program, package);
        }
        let netavark = ["/usr/lib/podman/netavark", "/usr/libexec/podman/netavark"].map(PathBuf::from);
        assert!(
            netavark.iter().any(|path| path.exists()),
            "netavark is missing: apt-get install --no-install-recommends -y netavark"
        );
        let dir = sandbox.dir();
        for (network, octet) in [("net0", 1), ("net1", 2)] {
            write_network(sandbox, network, octet, Some(octet * 100));
        }
        write_hooks_d(&dir.join("hooks.d"), &hook(), arguments);
        sandbox.write("/etc/containers/containers.conf", &containers_conf(dir, runtime));
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{}\"\nrunroot = \"/run/containers\"\n",
            dir.join("storage").display()
        );
        sandbox.write("/etc/containers/storage.conf", &storage);
        Self { sandbox, runtime }
    }

    /// Runs podman with `arguments`.
    #[track_caller]
    fn podman(&self, arguments: &[&str]) -> Outcome {
        self.sandbox.run(&[&["podman"], arguments].concat())
    }

    /// Where crun puts what hooks of the container `name` print; elsewhere it would go to /dev/null.
    fn hook_messages(&self, name: &str) -> PathBuf {
        self.sandbox.dir().join(format!("{name}.hooks"))
    }

    /// `podman run` of a container that sleeps.
    #[track_caller]
    fn run(&self, name: &str, options: &[&str]) -> Outcome {
        let messages = format!("--annotation=run.oci.hooks.stderr={}", self.hook_messages(name).display());
        let cgroup = format!("--cgroup-parent=/{}", self.sandbox.unique());
        let root = oci::root_filesystem(self.sandbox).display().to_string();
        let mut arguments = vec!["run", "--detach", "--name", name, &messages];
        if self.runtime == Runtime::Runc {
            arguments.push(&cgroup);
        }
        arguments.extend(options);
        arguments.extend(["--rootfs", &root, "/bin/busybox", "sleep", "1000"]);
        self.podman(&arguments)
    }

    /// Starts a container with `options`.
    #[track_caller]
    fn start(&'a self, name: &'a str, options: &[&str]) -> Member<'a> {
        let outcome = self.run(name, options);
        let messages = std::fs::read_to_string(self.hook_messages(name)).unwrap_or_default();
        assert_eq!(outcome.code, Some(0), "{outcome}\n{messages}");
        Member { podman: self, name, id: outcome.ok() }
    }

    /// Starts a container with both networks and `options`.
    #[track_caller]
    fn start_on_both(&'a self, name: &'a str, options: &[&str]) -> Member<'a> {
        self.start(name, &[&NETWORKS[..], options].concat())
    }

    /// A container that the hook has to keep from starting with exit `status`; gives all that was printed and its id.
    #[track_caller]
    fn refused(&self, name: &str, options: &[&str], status: i32) -> (String, String) {
        let outcome = self.run(name, options);
        let hooks = std::fs::read_to_string(self.hook_messages(name)).unwrap_or_default();
        let message = format!("{outcome}\n{hooks}");
        assert_ne!(outcome.code, Some(0), "it was started: {message}");
        let said = [format!("exit status {status}"), format!("exit code: {status}")];
        assert!(said.iter().any(|words| message.contains(words)), "not exit {status}: {message}");
        assert_eq!(self.inspect(name, "{{.State.Pid}}"), "0", "it runs: {message}");
        let id = self.inspect(name, "{{.Id}}");
        self.podman(&["rm", "--force", "--time=0", name]).ok();
        (message, id)
    }

    #[track_caller]
    fn inspect(&self, name: &str, format: &str) -> String {
        self.podman(&["inspect", "--format", format, name]).ok()
    }

    /// A pod with both networks, whose first container is of an image made here.
    #[track_caller]
    fn pod(&self, name: &str) {
        let root = oci::root_filesystem(self.sandbox).display().to_string();
        self.sandbox.sh(&format!("tar -C {root} -c . | podman import --quiet - localhost/infra"));
        let cgroup = format!("--cgroup-parent=/{}", self.sandbox.unique());
        let mut arguments = vec!["pod", "create", "--name", name, "--share=net", "--infra-image=localhost/infra"];
        arguments.push("--infra-command=/bin/busybox sleep 1000");
        if self.runtime == Runtime::Runc {
            // podman 4.3 forbids every device in a pod's own cgroup, /dev/null included.
            arguments.extend([cgroup.as_str(), "--share-parent=false"]);
        }
        arguments.extend(NETWORKS);
        self.podman(&arguments).ok();
    }
}

/// A container of podman.
struct Member<'a> {
    podman: &'a Podman<'a>,
    name: &'a str,
    id: String,
}

impl Member<'_> {
    fn id(&self) -> &str {
        &self.id
    }

    #[track_caller]
    fn netns(&self) -> Netns {
        let pid = self.podman.inspect(self.name, "{{.State.Pid}}").parse().expect("a pid");
        assert_ne!(pid, 0, "{} does not run", self.name);
        Netns::Pid(pid)
    }

    fn send(&self, to: IpAddr, bytes: u64, rate: u64) -> Sender {
        let program = traffic::send_arguments(traffic::PROGRAM, to, bytes, Some(rate));
        let mut argv = vec!["podman".to_owned(), "exec".to_owned(), self.name.to_owned()];
        argv.extend(program);
        Sender::attach(self.podman.sandbox.spawn(&argv))
    }

    /// `podman rm --force`, which runs poststop and waits for it.
    #[track_caller]
    fn remove(&self) {
        self.podman.podman(&["rm", "--force", "--time=0", self.name]).ok();
    }

    /// eth1's address: podman gives every life of a container another one.
    #[track_caller]
    fn eth1_address(&self) -> IpAddr {
        let json = self.podman.sandbox.run_in(&self.netns(), &["ip", "-j", "-4", "address", "show", "eth1"]).ok();
        let links: Value = serde_json::from_str(&json).unwrap_or_else(|e| panic!("addresses {json}: {e}"));
        links[0]["addr_info"][0]["local"].as_str().and_then(|a| a.parse().ok()).expect("eth1 has an address")
    }

    /// The container's namespace has one endpoint, eth1's backup, and `status` says so.
    #[track_caller]
    fn assert_backup_on_eth1(&self) {
        let sandbox = self.podman.sandbox;
        assert_only_endpoint(sandbox, &self.netns(), self.eth1_address(), &["backup", "subflow"]);
        let eth1 = eth1_of(&sandbox.status_of(&self.id), "applied");
        assert_eq!(eth1["flags"], json!(["subflow", "backup"]));
        assert_eq!(eth1["route"], "ok");
    }
}

/// A network as podman 4 keeps it. The file, because `podman network create` cannot name the bridge (before 4.6) nor
/// pass `metric` on.
fn write_network(sandbox: &Sandbox, name: &str, octet: u32, metric: Option<u32>) {
    let bridge = name.replace("net", "br");
    let mut network = json!({
        "name": name,
        "id": format!("{octet:064x}"),
        "driver": "bridge",
        "network_interface": bridge,
        "created": "2024-01-01T00:00:00Z",
        "subnets": [{ "subnet": format!("10.0.{octet}.0/24"), "gateway": format!("10.0.{octet}.1") }],
        "ipv6_enabled": false,
        "internal": false,
        "dns_enabled": false,
        "ipam_options": { "driver": "host-local" },
    });
    if let Some(metric) = metric {
        network["options"] = json!({ "metric": metric.to_string() });
    }
    let networks = sandbox.dir().join("networks");
    std::fs::create_dir_all(&networks).expect("the directory of the networks");
    std::fs::write(networks.join(format!("{name}.json")), network.to_string()).expect("writing a network");
}

/// The shipped hooks.d file for the program under test.
fn write_hooks_d(directory: &Path, program: &Path, arguments: &[&str]) {
    let mut entry: Value = serde_json::from_str(HOOKS_D).expect("the shipped file is JSON");
    assert_eq!(entry["hook"]["path"], INSTALLED);
    entry["hook"]["path"] = json!(program);
    entry["hook"]["args"].as_array_mut().expect("args is a list").extend(arguments.iter().map(|a| json!(a)));
    std::fs::create_dir_all(directory).expect("the hooks directory");
    std::fs::write(directory.join("mptcp-hook.json"), entry.to_string()).expect("writing the hooks.d file");
}

/// containers.conf with hooks and networks below `directory`; the limits are what a root without CAP_SYS_RESOURCE may
/// set.
fn containers_conf(directory: &Path, runtime: Runtime) -> String {
    let cgroups = match runtime {
        Runtime::Crun => "disabled",
        Runtime::Runc => "enabled",
    };
    format!(
        r#"[engine]
runtime = "{runtime}"
hooks_dir = ["{dir}/hooks.d"]
cgroup_manager = "cgroupfs"
events_logger = "none"
[network]
network_backend = "netavark"
network_config_dir = "{dir}/networks"
[containers]
cgroups = "{cgroups}"
pids_limit = 0
log_driver = "k8s-file"
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
"#,
        runtime = runtime.program(),
        dir = directory.display(),
    )
}

/// Nothing stays behind: no container, no setting, no endpoint of the host, no file in the state directory.
#[track_caller]
fn assert_nothing_is_left(sandbox: &Sandbox) {
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&Netns::Host), []);
    assert_eq!(
        sandbox.sh("[ ! -e /run/mptcp-hook ] || find /run/mptcp-hook -type f ! -name 'conflicts*' ! -name 'failures*'"),
        ""
    );
}

/// conmon runs the clean-up, and with it poststop, some time after the container's end.
#[track_caller]
fn wait_for_empty_ledger(sandbox: &Sandbox) {
    wait_until("an empty ledger", CLEAN_UP_LIMIT, || sandbox.status()["containers"] == json!([]));
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
        write_network(&sandbox, network, octet, None);
    }
    let _server = Server::start(&sandbox, paths.server());
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
        assert!(container.send(paths.address(), 10_000_000, RATE).finish(TRANSFER_LIMIT).mptcp);
        let join = capture.wait_join(&second.replace("eth", "br"));
        assert_eq!(join.backup, second == "eth1", "the first route is {first}'s");
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
    wait_until("the clean-up of the owner", CLEAN_UP_LIMIT, || {
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
    let pid = wait_for("the holder's pid", CLEAN_UP_LIMIT, || std::fs::read_to_string(&pid_file).ok());
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
    sandbox.policy("[defaults.interfaces]\n\"eth1\" = \"backup\"\n[defaults.limits]\nsubflows = 4\n");
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
    sandbox.policy("[defaults.interfaces]\n\"eth1\" = \"backup\"\n");
    let defaults = podman.start("defaults", &["--network=host"]);
    assert_nothing_is_left(&sandbox);
    for container in [plain, defaults] {
        container.remove();
    }
    assert_nothing_is_left(&sandbox);

    sandbox.policy("host-namespace = \"allow\"\n");
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
    sandbox.policy("[annotations.sysctls]\n\"net.ipv4.tcp_ecn\" = [1]\n");
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

/// podman of an unprivileged user, with a network namespace of the user's that joins the two paths.
struct Rootless<'a> {
    sandbox: &'a Sandbox,
    home: PathBuf,
    /// Lives in the network namespace `ctr`.
    _holder: Running,
}

impl<'a> Rootless<'a> {
    fn new(paths: &TwoPaths<'_>, sandbox: &'a Sandbox, runtime: Runtime) -> Self {
        for (program, package) in
            [("podman", "podman"), (runtime.program(), runtime.program()), ("newuidmap", "uidmap")]
        {
            require(program, package);
        }
        let home = sandbox.dir().join("home");
        let program = home.join("mptcp-hook");
        std::fs::create_dir_all(&home).expect("the user's home");
        // Where the tests are built, others need not be able to read.
        std::fs::copy(hook(), &program).expect("copying the hook");
        write_hooks_d(&home.join("hooks.d"), &program, &[]);
        let config = home.join(".config/containers");
        std::fs::create_dir_all(&config).expect("the user's configuration");
        std::fs::write(config.join("containers.conf"), containers_conf(&home, runtime)).expect("containers.conf");
        std::fs::write(config.join("storage.conf"), "[storage]\ndriver = \"vfs\"\n").expect("storage.conf");
        let root = oci::root_filesystem(sandbox);
        sandbox.sh(&format!(
            "echo 'mptcp-test:x:{USER}:{USER}::{home}:/bin/sh' >>/etc/passwd
             echo 'mptcp-test:x:{USER}:' >>/etc/group
             echo 'mptcp-test:300000:65536' >/etc/subuid
             echo 'mptcp-test:300000:65536' >/etc/subgid
             install -d -m 700 -o {USER} -g {USER} /run/user /run/user/{USER}
             chmod 755 /run/user
             cp -a {root} {home}/rootfs
             chown -R {USER}:{USER} {home}",
            home = home.display(),
            root = root.display(),
        ));
        let script =
            format!("touch {0}/ctr; unshare --net={0}/ctr sh -c 'echo $$ >{0}/pid; exec sleep 1000'", home.display());
        let mut holder = sandbox.spawn(&as_user(&home, &["podman", "unshare", "sh", "-ec", &script]));
        let pid_file = home.join("pid");
        let pid = wait_for("the user's network namespace", CLEAN_UP_LIMIT, || {
            assert!(holder.is_running(), "podman unshare ended: {}{}", holder.stdout(), holder.stderr());
            std::fs::read_to_string(&pid_file).ok()?.trim().parse::<u32>().ok()
        });
        sandbox.sh(&format!("ip netns attach ctr {pid}"));
        paths.join(&Wiring::new(), &Netns::named("ctr"));
        Self { sandbox, home, _holder: holder }
    }

    /// Runs a program as the user.
    #[track_caller]
    fn run(&self, argv: &[&str]) -> Outcome {
        self.sandbox.run(&as_user(&self.home, argv))
    }

    /// `podman run` of a container in the namespace `ctr` that sleeps.
    #[track_caller]
    fn start(&self, name: &str, options: &[&str]) -> Outcome {
        let network = format!("--network=ns:{}/ctr", self.home.display());
        let messages = format!("--annotation=run.oci.hooks.stderr={}", self.messages(name).display());
        let root = self.home.join("rootfs").display().to_string();
        let mut argv = vec!["podman", "run", "--detach", "--name", name, &network, &messages];
        argv.extend(options);
        argv.extend(["--rootfs", &root, "/bin/busybox", "sleep", "1000"]);
        self.run(&argv)
    }

    fn messages(&self, name: &str) -> PathBuf {
        self.home.join(format!("{name}.hooks"))
    }

    /// What the user's ledger says, to the user.
    #[track_caller]
    fn status(&self) -> Value {
        let program = self.home.join("mptcp-hook").display().to_string();
        let json = self.run(&[&program, "status", "--json"]).ok();
        serde_json::from_str(&json).unwrap_or_else(|e| panic!("status --json gave {json}: {e}"))
    }

    #[track_caller]
    fn remove(&self, name: &str) {
        self.run(&["podman", "rm", "--force", "--time=0", name]).ok();
    }
}

/// A command line that runs `argv` as the user without privileges.
fn as_user(home: &Path, argv: &[&str]) -> Vec<String> {
    let user = USER.to_string();
    let home = format!("HOME={}", home.display());
    let runtime_dir = format!("XDG_RUNTIME_DIR=/run/user/{USER}");
    let mut all = vec!["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "env", "--ignore-environment"];
    all.extend(["--chdir=/", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", &home, &runtime_dir]);
    all.extend(argv);
    all.into_iter().map(str::to_owned).collect()
}

/// The hook is uid 0 in podman's user namespace: it may change what belongs to that, and keeps the ledger in the
/// user's own runtime directory.
fn podman_rootless_upstream_backup_join_traffic(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::new(&sandbox);
    // Host root's policy, which shows as the overflow uid's in there.
    sandbox.policy("[defaults.limits]\nsubflows = 4\n");
    let rootless = Rootless::new(&paths, &sandbox, runtime);
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let outcome = rootless.start("web", &[BACKUP]);
    let said = std::fs::read_to_string(rootless.messages("web")).unwrap_or_default();
    assert_eq!(outcome.code, Some(0), "{outcome}\n{said}");

    let ctr = Netns::named("ctr");
    assert_only_endpoint(&sandbox, &ctr, IpAddr::from([10, 0, 2, 2]), &["backup", "subflow"]);
    assert!(sandbox.sh_in(&ctr, "ip mptcp limits show").contains("subflows 4"));
    let status = rootless.status();
    assert_eq!(status["containers"][0]["id"], outcome.stdout.trim());
    assert_eq!(status["containers"][0]["interfaces"][0]["state"], "applied");
    let owner = sandbox.sh(&format!("stat -c '%u %a' /run/user/{USER}/mptcp-hook"));
    assert_eq!(owner, format!("{USER} 700"));
    assert_eq!(sandbox.run(&["test", "-e", "/run/mptcp-hook"]).code, Some(1), "it wrote to root's ledger");

    let mut argv = vec!["podman".to_owned(), "exec".to_owned(), "web".to_owned()];
    argv.extend(traffic::send_arguments(traffic::PROGRAM, paths.address(), 5_000_000, Some(RATE)));
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let transfer = Sender::attach(sandbox.spawn(&as_user(&rootless.home, &argv)));
    assert!(transfer.finish(TRANSFER_LIMIT).mptcp);
    assert!(capture.wait_join("eth1").backup);
    let (first, second) = (capture.payload_received("eth0"), capture.payload_received("eth1"));
    assert!(second * 20 < first, "payload over the backup path eth1: {second} bytes, over eth0: {first}");

    rootless.remove("web");
    assert_eq!(sandbox.endpoints(&ctr), []);
    assert_eq!(rootless.status()["containers"], json!([]));
    assert_eq!(sandbox.sh(&format!("find /run/user/{USER}/mptcp-hook -type f")), "");
}

/// Host-wide values are not a user's to change, even if the policy lists them.
fn podman_rootless_cannot_change_the_host(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::new(&sandbox);
    sandbox.policy("[annotations.sysctls]\n\"net.core.rmem_max\" = \"*\"\n");
    let rootless = Rootless::new(&paths, &sandbox, runtime);
    let before = sandbox.sysctl(&Netns::Host, "net/core/rmem_max").expect("there is such a value");
    let wish = "--annotation=mptcp-hook/sysctl.net.core.rmem_max=7654321";
    let outcome = rootless.start("greedy", &[BACKUP, wish]);
    let hooks = std::fs::read_to_string(rootless.messages("greedy")).unwrap_or_default();
    let message = format!("{outcome}\n{hooks}");
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
