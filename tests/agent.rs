//! The agent: containers stay as they were asked for while links and addresses come and go, and are let go when their
//! init has ended. The containers are processes in namespaces, joined to the sandbox's own one by veth pairs.

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Where the hook keeps its ledger in a sandbox.
const STATE_DIR: &str = "/run/mptcp-hook";

/// How long something may take that is not measured, on a machine with much else to do.
const LIMIT: Duration = Duration::from_secs(20);

/// How long something is watched that shall not happen: the agent needs a few milliseconds.
const QUIET: Duration = Duration::from_millis(500);

/// What the containers here ask for, if nothing else is said.
const BACKUP: [&str; 2] = ["--interface", "eth1=backup"];

// --- containers -----------------------------------------------------------------------------------------------------

/// A container in a namespace of its own; see [`wire`].
fn wired<'a>(sandbox: &'a Sandbox, name: &str) -> Bare<'a> {
    let container = Bare::new(sandbox, name);
    wire(sandbox, name, &container.pid().to_string());
    container
}

/// A container in the namespace /run/netns/`netns`, which stays when it ends; see [`wire`].
fn wired_in<'a>(sandbox: &'a Sandbox, name: &str, netns: &str) -> Bare<'a> {
    sandbox.sh(&format!("ip netns add {netns}"));
    wire(sandbox, name, netns);
    Bare::in_netns(sandbox, name, &Netns::named(netns))
}

/// Gives a namespace (a pid, or a name as of ip-netns(8)) eth0 with 10.0.1.2 and eth1 without an address. Their other
/// ends, NAME0 and NAME1, are the sandbox's. All are up with a way out, and none has an address of the kernel's own.
fn wire(sandbox: &Sandbox, name: &str, netns: &str) {
    let inside = match netns.parse() {
        Ok(pid) => Netns::Pid(pid),
        Err(_) => Netns::named(netns),
    };
    // 1 is none: no link-local addresses.
    let no_addresses = "echo 1 >/proc/sys/net/ipv6/conf/default/addr_gen_mode";
    sandbox.sh_in(&inside, no_addresses);
    sandbox.sh(&format!(
        "{no_addresses}
         for n in 0 1; do
           ip link add {name}$n type veth peer name eth$n netns {netns}
           ip link set {name}$n up
         done"
    ));
    // With its last IPv4 address an interface would lose its routes, too; the one here is nothing to make use of.
    sandbox.sh_in(
        &inside,
        "ip link set lo up; ip link set eth0 up; ip link set eth1 up; ip addr add 10.0.1.2/24 dev eth0
         ip addr add 169.254.9.9/32 dev eth1 scope link
         ip route add default via 10.0.1.1 dev eth0 metric 100
         ip route add default dev eth1 metric 200; ip -6 route add default dev eth1 metric 200",
    );
}

/// ip-address(8) in a container.
#[track_caller]
fn address(sandbox: &Sandbox, container: &Bare, arguments: &str) {
    sandbox.sh_in(&container.netns(), &format!("ip address {arguments}"));
}

/// The addresses of the endpoints on eth1.
fn addresses(sandbox: &Sandbox, netns: &Netns) -> BTreeSet<IpAddr> {
    sandbox.endpoints_on(netns, "eth1").into_iter().map(|endpoint| endpoint.address).collect()
}

fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
    addresses.iter().map(|address| address.parse().expect("an address")).collect()
}

/// Waits until eth1's endpoints are those for `expected`, and `status` says so too.
#[track_caller]
fn wait_endpoints(sandbox: &Sandbox, container: &Bare, expected: &[&str]) {
    wait_set(sandbox, container, &set(expected));
}

#[track_caller]
fn wait_set(sandbox: &Sandbox, container: &Bare, expected: &BTreeSet<IpAddr>) {
    let mut found = BTreeSet::new();
    let deadline = Instant::now() + LIMIT;
    loop {
        let in_kernel = addresses(sandbox, &container.netns());
        let recorded = recorded(&sandbox.status_of(container.id()));
        if in_kernel == *expected && recorded == *expected {
            return;
        }
        if Instant::now() >= deadline {
            found.extend(in_kernel);
            panic!("endpoints {found:?}, recorded {recorded:?}, not {expected:?}; status {:#}", sandbox.status());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The endpoints' addresses as `status` has them.
fn recorded(container: &Value) -> BTreeSet<IpAddr> {
    recorded_in(&container["interfaces"][0])
}

fn recorded_in(interface: &Value) -> BTreeSet<IpAddr> {
    let endpoints = interface["endpoints"].as_array().into_iter().flatten();
    endpoints.map(|endpoint| endpoint["address"].as_str().and_then(|a| a.parse().ok()).expect("an address")).collect()
}

/// The first interface of a container in `status --json`.
#[track_caller]
fn interface(sandbox: &Sandbox, container: &Bare) -> Value {
    sandbox.status_of(container.id())["interfaces"][0].clone()
}

/// Waits until `status` says `state` of the container's interface, and gives the whole entry.
#[track_caller]
fn wait_state(sandbox: &Sandbox, container: &Bare, state: &str) -> Value {
    wait_entry(sandbox, container, &format!("state {state}"), |entry| entry["state"] == state)
}

/// Waits until the last event of the container's interface has `words`.
#[track_caller]
fn wait_last(sandbox: &Sandbox, container: &Bare, words: &str) -> Value {
    let is_it = |entry: &Value| entry["last"]["what"].as_str().is_some_and(|what| what.contains(words));
    wait_entry(sandbox, container, words, is_it)
}

#[track_caller]
fn wait_entry(sandbox: &Sandbox, container: &Bare, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + LIMIT;
    loop {
        let entry = interface(sandbox, container);
        if is_it(&entry) {
            return entry;
        }
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}; {entry:#}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

// --- agents ---------------------------------------------------------------------------------------------------------

/// The agents of a sandbox, forked or started by hand.
fn agents(sandbox: &Sandbox) -> Vec<u32> {
    let entries = std::fs::read_dir(sandbox.outside("/proc")).expect("the sandbox's /proc").filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| is_agent(sandbox, *pid)).collect()
}

fn is_agent(sandbox: &Sandbox, pid: u32) -> bool {
    let read = |file: &str| std::fs::read(sandbox.outside(&format!("/proc/{pid}/{file}"))).unwrap_or_default();
    let command_line = read("cmdline");
    let mut words = command_line.split(|byte| *byte == 0);
    let by_hand =
        words.next().is_some_and(|program| program.ends_with(b"/mptcp-hook")) && words.next() == Some(b"agent");
    // A zombie has no command line any more.
    !command_line.is_empty() && (by_hand || read("comm") == b"mptcp-agent\n")
}

/// The one agent of a sandbox; waits until it says who it is.
#[track_caller]
fn agent(sandbox: &Sandbox) -> u32 {
    wait_for("an agent that says who it is", LIMIT, || {
        let file = std::fs::read(sandbox.outside(&format!("{STATE_DIR}/agent"))).ok()?;
        let file: Value = serde_json::from_slice(&file).ok()?;
        let pid = u32::try_from(file["pid"].as_u64()?).ok()?;
        (agents(sandbox) == [pid]).then_some(pid)
    })
}

/// The pid, for the test itself, of a process of the sandbox.
fn outer(sandbox: &Sandbox, pid: u32) -> Pid {
    let namespace = |path: PathBuf| std::fs::read_link(path).ok();
    let wanted = namespace(sandbox.outside(&format!("/proc/{pid}/ns/pid"))).expect("a process of the sandbox");
    let processes = std::fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    let found = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).find(|outer| {
        let status = std::fs::read_to_string(format!("/proc/{outer}/status")).unwrap_or_default();
        let inner = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        inner.split_whitespace().last() == Some(&pid.to_string())
            && namespace(format!("/proc/{outer}/ns/pid").into()).as_ref() == Some(&wanted)
    });
    Pid::from_raw(found.unwrap_or_else(|| panic!("no process has the pid {pid} in the sandbox")))
}

#[track_caller]
fn signal(sandbox: &Sandbox, pid: u32, signal: Signal) {
    kill(outer(sandbox, pid), signal).expect("a signal for a process of the sandbox");
}

/// Ends the agent by SIGKILL, and waits for that.
#[track_caller]
fn kill_agent(sandbox: &Sandbox) {
    let pid = agent(sandbox);
    signal(sandbox, pid, Signal::SIGKILL);
    wait_ended(sandbox, pid);
}

/// Waits for the end of a process: its command line goes first, its descriptors and their locks later.
#[track_caller]
fn wait_ended(sandbox: &Sandbox, pid: u32) {
    wait_until("the end of a process", LIMIT, || {
        let stat = std::fs::read_to_string(sandbox.outside(&format!("/proc/{pid}/stat"))).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
}

/// Stops the agent and waits until it stands still.
#[track_caller]
fn stop_agent(sandbox: &Sandbox) -> u32 {
    let pid = agent(sandbox);
    signal(sandbox, pid, Signal::SIGSTOP);
    wait_until("a stopped agent", LIMIT, || {
        let stat = std::fs::read_to_string(sandbox.outside(&format!("/proc/{pid}/stat"))).unwrap_or_default();
        stat.contains(") T ")
    });
    pid
}

/// Whether the agent follows the container, as `status` says.
fn is_followed(sandbox: &Sandbox, container: &Bare) -> bool {
    sandbox.status_of(container.id())["followed"] == true
}

/// `status` knows of nothing that is wrong with the ledger.
#[track_caller]
fn assert_sound(sandbox: &Sandbox) {
    let status = sandbox.status();
    assert_eq!(status["problems"], json!([]), "{status:#}");
}

/// Runs `work` in a thread in a network namespace: programs that it starts are there, too.
fn inside<T: Send>(sandbox: &Sandbox, netns: &Netns, work: impl FnOnce() -> T + Send) -> T {
    let file = File::open(sandbox.netns_path(netns)).expect("a network namespace");
    let enter = move || {
        setns(file, CloneFlags::CLONE_NEWNET).expect("entering a network namespace");
        work()
    };
    std::thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// ip(8) where the calling thread is.
fn ip(arguments: &str) -> String {
    let done = Command::new("ip").args(arguments.split_whitespace()).output().expect("running ip");
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Whether there is an endpoint for the address where the calling thread is.
fn has_endpoint(address: &str) -> bool {
    ip("mptcp endpoint show").lines().any(|line| line.split_whitespace().next() == Some(address))
}

/// Asks as fast as it can until `condition` holds; how long that took since `begin`.
#[track_caller]
fn time_until(what: &str, begin: Instant, condition: impl Fn() -> bool) -> Duration {
    while !condition() {
        assert!(begin.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
    }
    begin.elapsed()
}

/// The median, after the figures were printed.
fn median(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort();
    let median = times[times.len() / 2];
    let (first, last) = (times[0], times[times.len() - 1]);
    println!("{what}: {} times, median {median:?}, from {first:?} to {last:?}", times.len());
    median
}

// --- on demand ------------------------------------------------------------------------------------------------------

/// The hook's caller waits until its pipe is closed, ends what is in its cgroup, and may kill its session.
#[test]
fn a_pending_interface_starts_an_agent_that_holds_nothing_of_its_caller() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    assert!(agents(&sandbox).is_empty());
    let cgroup = format!("/sys/fs/cgroup/{}", sandbox.name("caller"));
    let enter = format!("mkdir {cgroup}; echo $$ >{cgroup}/cgroup.procs; exec \"$@\"");
    let program = hook().display().to_string();
    let argv = ["sh", "-ec", &enter, "sh", &program, "oci", "--interface", "eth1=backup"];
    let state = sandbox.dir().join("state.json");
    std::fs::write(&state, container.state().to_string()).expect("the state's file");
    let begin = Instant::now();
    let mut command = sandbox.command_in(&Netns::Host, &argv);
    command.stdin(File::open(&state).expect("the state's file")).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Returns when both pipes are closed, by everybody who has them.
    let done = command.output().expect("running the hook");
    let took = begin.elapsed();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    assert!(said.contains("pending") && said.contains("the agent sees to it when it is there"), "{said}");
    assert!(took < LIMIT, "the caller waited for {took:?}");

    let pid = agent(&sandbox);
    let of_agent = |file: &str| sandbox.outside(&format!("/proc/{pid}/{file}"));
    let stat = std::fs::read_to_string(of_agent("stat")).expect("the agent's stat");
    // proc(5): after the name in parentheses: state, ppid, pgrp, session.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    assert_eq!(fields[3], pid.to_string(), "the agent's session: {stat}");
    for descriptor in std::fs::read_dir(of_agent("fd")).expect("the agent's descriptors") {
        let descriptor = descriptor.expect("a descriptor");
        let target = std::fs::read_link(descriptor.path()).map(|t| t.display().to_string()).unwrap_or_default();
        let number: u32 = descriptor.file_name().to_str().and_then(|n| n.parse().ok()).expect("a number");
        assert_eq!(target == "/dev/null", number < 3, "descriptor {number}: {target}");
        assert!(!target.starts_with("pipe:"), "descriptor {number}: {target}");
    }
    wait_until("the agent to leave its caller's cgroup", LIMIT, || {
        let cgroups = std::fs::read_to_string(of_agent("cgroup")).expect("the agent's cgroups");
        !cgroups.contains(sandbox.unique())
    });
    assert_eq!(std::fs::read_link(of_agent("cwd")).expect("its directory").to_str(), Some("/"));
    assert!(is_followed(&sandbox, &container));
}

#[test]
fn there_is_one_agent_for_all() {
    let sandbox = Sandbox::new();
    let web = wired(&sandbox, "web");
    web.oci(&BACKUP).ok();
    let pid = agent(&sandbox);
    // The same one again, another one, and one by a person's hand.
    let said = web.oci(&BACKUP);
    assert!(said.stderr.contains("the agent sees to it"), "{said}");
    let shop = wired(&sandbox, "shop");
    shop.oci(&BACKUP).ok();
    let cart = wired(&sandbox, "cart");
    let pid_of_cart = cart.pid().to_string();
    sandbox.hook(&["apply", "--pid", &pid_of_cart, "--interface", "eth1=backup", "--name", cart.id()]).ok();
    assert_eq!(agent(&sandbox), pid);
    let said = sandbox.hook(&["agent"]);
    assert!(said.stderr.contains(&format!("an agent runs already (pid {pid})")), "{said}");
    said.ok();
    assert_eq!(agent(&sandbox), pid);
    for container in [&web, &shop, &cart] {
        assert!(is_followed(&sandbox, container));
        address(&sandbox, container, "add 10.0.2.2/24 dev eth1");
    }
    for container in [&web, &shop, &cart] {
        wait_endpoints(&sandbox, container, &["10.0.2.2"]);
    }
}

/// Many hooks at once find no agent: one of them starts it.
#[test]
fn hooks_at_once_start_one_agent() {
    let sandbox = Sandbox::new();
    let containers: Vec<Bare> = (0..8).map(|n| wired(&sandbox, &format!("c{n}"))).collect();
    let pids: Vec<String> = containers.iter().map(|container| container.pid().to_string()).collect();
    let program = hook().display().to_string();
    let started: Vec<Running> = pids
        .iter()
        .zip(&containers)
        .map(|(pid, c)| sandbox.spawn(&[&program, "apply", "--pid", pid, BACKUP[0], BACKUP[1], "--name", c.id()]))
        .collect();
    for apply in started {
        apply.wait(LIMIT).ok();
    }
    agent(&sandbox);
    for container in &containers {
        address(&sandbox, container, "add 10.0.2.2/24 dev eth1");
    }
    for container in &containers {
        wait_endpoints(&sandbox, container, &["10.0.2.2"]);
        assert!(is_followed(&sandbox, container));
    }
}

/// The agent leaves the directory that it is called in.
#[test]
fn paths_from_the_callers_directory_hold_for_the_agent() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    sandbox.write("/run/here/policy.toml", "[defaults]\nfollow = \"always\"\n");
    let program = hook().display().to_string();
    let with_paths = |verb: &str| {
        let script = format!("cd /run/here; exec {program} {verb} --config policy.toml");
        sandbox.sh(&script)
    };
    with_paths(&format!("apply --pid {} --interface eth1=backup", container.pid()));
    agent(&sandbox);
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    wait_until("the endpoint", LIMIT, || addresses(&sandbox, &container.netns()) == set(&["10.0.2.2"]));
    let status: Value = serde_json::from_str(&with_paths("status --json")).expect("its status");
    assert_eq!(status["containers"][0]["followed"], true, "{status:#}");
}

#[test]
fn what_is_settled_starts_no_agent() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    address(&sandbox, &container, "add fd00:2::2/64 dev eth1 nodad");
    let said = container.oci(&BACKUP);
    assert!(!said.stderr.contains("agent"), "{said}");
    said.ok();
    let status = sandbox.status_of(container.id());
    assert_eq!((&status["followed"], &status["not_followed"]), (&json!(false), &Value::Null), "{status:#}");
    assert!(agents(&sandbox).is_empty());
}

/// As a DHCP client sets it: with a lifetime.
#[test]
fn an_address_with_a_lifetime_is_followed() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1 valid_lft 600 preferred_lft 600");
    container.oci(&BACKUP).ok();
    agent(&sandbox);
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    assert!(is_followed(&sandbox, &container));
    // The lease is renewed, then it is another one.
    let id = sandbox.endpoints_on(&container.netns(), "eth1")[0].id;
    address(&sandbox, &container, "change 10.0.2.2/24 dev eth1 valid_lft 900 preferred_lft 900");
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    assert_eq!(sandbox.endpoints_on(&container.netns(), "eth1")[0].id, id, "a renewal of the same address");
    address(&sandbox, &container, "del 10.0.2.2/24 dev eth1");
    address(&sandbox, &container, "add 10.0.2.77/24 dev eth1 valid_lft 600 preferred_lft 600");
    wait_endpoints(&sandbox, &container, &["10.0.2.77"]);
    // It runs out without anybody doing anything.
    address(&sandbox, &container, "change 10.0.2.77/24 dev eth1 valid_lft 2 preferred_lft 2");
    wait_endpoints(&sandbox, &container, &[]);
    wait_state(&sandbox, &container, "pending");
}

/// The systemd unit that is not there, and why.
const TROUBLE: &str = "mptcp-hook-agent.path is not enabled";

#[test]
fn under_systemd_the_unit_starts_it_and_nobody_else() {
    let sandbox = Sandbox::new();
    sandbox.sh("mkdir -p /run/systemd/system");
    let web = wired(&sandbox, "web");
    let said = web.oci(&BACKUP);
    assert!(said.stderr.contains("pending"), "{said}");
    assert!(said.stderr.contains(TROUBLE) && said.stderr.contains("systemctl enable --now"), "{said}");
    said.ok();
    let status = sandbox.status_of(web.id());
    assert_eq!(status["followed"], false);
    let reason = status["not_followed"].as_str().expect("why nobody follows it");
    assert!(reason.contains(TROUBLE) && reason.contains("enable --now"), "{reason}");
    let text = sandbox.hook(&["status"]).ok();
    assert!(text.contains(TROUBLE) && text.contains("nobody follows it"), "{text}");
    // With all addresses there the wish is the same.
    let shop = wired(&sandbox, "shop");
    address(&sandbox, &shop, "add 10.0.2.2/24 dev eth1");
    let said = shop.oci(&["--interface", "eth1=backup", "--follow", "always"]);
    assert!(said.stderr.contains(TROUBLE), "{said}");
    // Another directory is none that the unit watches.
    let cart = wired(&sandbox, "cart");
    let said = cart.oci(&["--interface", "eth1=backup", "--state-dir", "/run/elsewhere"]);
    assert!(said.stderr.contains("mptcp-hook agent --state-dir /run/elsewhere"), "{said}");
    assert!(agents(&sandbox).is_empty());

    // Enabled, it is systemd's to start it.
    sandbox.sh("mkdir -p /etc/systemd/system/paths.target.wants
         ln -s /lib/systemd/system/mptcp-hook-agent.path /etc/systemd/system/paths.target.wants/");
    let said = web.oci(&BACKUP);
    assert!(said.stderr.contains("the agent sees to it when it is there"), "{said}");
    assert!(!said.stderr.contains(TROUBLE), "{said}");
    assert!(agents(&sandbox).is_empty());
    let list = sandbox.sh(&format!("ls {STATE_DIR}/follow"));
    assert_eq!(list.lines().count(), 2, "the list that the unit watches: {list}");
    // What systemd does then.
    let mut by_unit = sandbox.spawn(&[&hook().display().to_string(), "agent"]);
    agent(&sandbox);
    address(&sandbox, &web, "add 10.0.2.2/24 dev eth1");
    wait_endpoints(&sandbox, &web, &["10.0.2.2"]);
    wait_until("both followed", LIMIT, || is_followed(&sandbox, &web) && is_followed(&sandbox, &shop));
    assert!(by_unit.is_running(), "{}", by_unit.stderr());
}

#[test]
fn whoever_asks_for_follow_gets_it_or_not() {
    let sandbox = Sandbox::new();
    sandbox.policy("[defaults]\nfollow = \"never\"\n");
    // The policy's default.
    let shop = wired(&sandbox, "shop");
    let said = shop.oci(&BACKUP);
    assert!(said.stderr.contains("run mptcp-hook apply again when it is there (follow=never)"), "{said}");
    // An annotation has more to say than a default.
    let cart = wired(&sandbox, "cart").annotation("mptcp-hook/follow", "always");
    cart.oci(&BACKUP).ok();
    let pid = agent(&sandbox);
    let noted = |container: &Bare| {
        let status = sandbox.status_of(container.id());
        (status["followed"] == true, status["not_followed"].as_str().map(String::from))
    };
    assert_eq!(noted(&shop), (false, None));
    assert_eq!(noted(&cart), (true, None));
    // With everything settled it goes on: always.
    address(&sandbox, &cart, "add 10.0.2.2/24 dev eth1");
    wait_endpoints(&sandbox, &cart, &["10.0.2.2"]);
    address(&sandbox, &cart, "del 10.0.2.2/24 dev eth1");
    wait_endpoints(&sandbox, &cart, &[]);
    // A flag has more to say than either, and a later one is heard by the agent that runs.
    let said = cart.oci(&["--interface", "eth1=backup", "--follow", "never"]);
    assert!(said.stderr.contains("(follow=never)"), "{said}");
    wait_until("the agent leaves it", LIMIT, || noted(&cart) == (false, None));
    address(&sandbox, &cart, "add 10.0.2.3/24 dev eth1");
    address(&sandbox, &shop, "add 10.0.2.3/24 dev eth1");
    std::thread::sleep(QUIET);
    assert_eq!(addresses(&sandbox, &cart.netns()), set(&[]));
    assert_eq!(addresses(&sandbox, &shop.netns()), set(&[]));
    shop.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    wait_endpoints(&sandbox, &shop, &["10.0.2.3"]);
    wait_until("the agent follows it", LIMIT, || noted(&shop) == (true, None));
    assert_eq!(agent(&sandbox), pid);
}

#[test]
fn the_policy_can_have_all_followed() {
    let sandbox = Sandbox::new();
    sandbox.policy("[defaults]\nfollow = \"always\"\n");
    let container = wired(&sandbox, "web");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    container.oci(&BACKUP).ok();
    agent(&sandbox);
    wait_until("it is followed", LIMIT, || is_followed(&sandbox, &container));
    address(&sandbox, &container, "del 10.0.2.2/24 dev eth1");
    wait_endpoints(&sandbox, &container, &[]);
    // A default alone is no wish.
    let idle = wired(&sandbox, "idle");
    idle.oci(&[]).ok();
    let status = sandbox.status();
    assert_eq!(status["containers"].as_array().map(Vec::len), Some(1), "{status:#}");
}

#[test]
fn a_namespace_without_a_process_is_not_followed() {
    let sandbox = Sandbox::new();
    sandbox.sh("ip netns add bare");
    wire(&sandbox, "bare", "bare");
    let said = sandbox.hook(&["apply", "--netns", "/run/netns/bare", "--interface", "eth1=backup"]);
    let why = "only containers with a process can be followed";
    assert!(said.stderr.contains(why), "{said}");
    said.ok();
    let status = sandbox.status();
    assert_eq!(status["containers"][0]["not_followed"], why, "{status:#}");
    assert!(agents(&sandbox).is_empty());
}

// --- addresses and links --------------------------------------------------------------------------------------------

/// Rounds of an address that comes, is replaced and goes, each time from the start of ip(8), which is before
/// RTM_NEWADDR, to what ip-mptcp(8) shows. None may take longer than `limit` in the median, beside what it takes to
/// change an address and to look for an endpoint at all: on a loaded machine most of the time.
fn measure_addresses(sandbox: &Sandbox, container: &Bare, limit: Duration) {
    const ROUNDS: usize = 20;
    container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    agent(sandbox);
    wait_until("it is followed", LIMIT, || is_followed(sandbox, container));
    let (looked, came, moved, went) = inside(sandbox, &container.netns(), || {
        let (mut looked, mut came, mut moved, mut went) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let begin = Instant::now();
            ip("address replace 10.3.3.3/32 dev lo");
            has_endpoint("10.3.3.3");
            looked.push(begin.elapsed());
            let (first, second) = (format!("10.0.2.{}", round + 2), format!("10.0.2.{}", round + 102));
            let begin = Instant::now();
            ip(&format!("address add {first}/24 dev eth1"));
            came.push(time_until("an endpoint for a new address", begin, || has_endpoint(&first)));
            let begin = Instant::now();
            ip(&format!("address del {first}/24 dev eth1"));
            ip(&format!("address add {second}/24 dev eth1"));
            moved.push(time_until("it moves", begin, || has_endpoint(&second) && !has_endpoint(&first)));
            let begin = Instant::now();
            ip(&format!("address del {second}/24 dev eth1"));
            went.push(time_until("it goes", begin, || !has_endpoint(&second)));
        }
        (looked, came, moved, went)
    });
    let limit = limit + median("changing and looking alone", looked);
    for (what, times) in [("address came", came), ("address replaced", moved), ("address went", went)] {
        let median = median(what, times);
        assert!(median < limit, "{what}: {median:?}");
    }
    assert_sound(sandbox);
}

/// 100 ms are the aim; a loaded machine has them in the median, too.
#[test]
fn an_address_is_an_endpoint_within_milliseconds() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    measure_addresses(&sandbox, &container, Duration::from_millis(100));
}

/// Its route does not come: the agent waits for it no longer than 50 ms.
#[test]
fn an_address_without_a_way_out_waits_a_moment() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    sandbox.sh_in(&container.netns(), "ip route del default dev eth1");
    measure_addresses(&sandbox, &container, Duration::from_millis(150));
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    let entry = interface(&sandbox, &container);
    assert_eq!((&entry["state"], &entry["route"]), (&json!("applied"), &json!("missing")), "{entry:#}");
}

#[test]
fn addresses_of_both_families_come_move_and_go() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    container.oci(&BACKUP).ok();
    agent(&sandbox);
    let entry = interface(&sandbox, &container);
    assert_eq!((&entry["state"], &entry["last"]), (&json!("pending"), &Value::Null), "{entry:#}");
    let steps: [(&str, &[&str], &str); 7] = [
        ("add 10.0.2.2/24 dev eth1", &["10.0.2.2"], "10.0.2.2 came"),
        ("add fd00:2::2/64 dev eth1 nodad", &["10.0.2.2", "fd00:2::2"], "fd00:2::2 came"),
        ("add 10.0.2.3/24 dev eth1", &["10.0.2.2", "10.0.2.3", "fd00:2::2"], "10.0.2.3 came"),
        ("del fd00:2::2/64 dev eth1", &["10.0.2.2", "10.0.2.3"], "fd00:2::2 went"),
        ("add fd00:2::9/64 dev eth1 nodad", &["10.0.2.2", "10.0.2.3", "fd00:2::9"], "fd00:2::9 came"),
        // With the first of a subnet all go (promote_secondaries is off).
        ("del 10.0.2.2/24 dev eth1", &["fd00:2::9"], "10.0.2.3 went"),
        ("flush dev eth1", &[], "fd00:2::9 went"),
    ];
    sandbox.sh_in(&container.netns(), "echo 0 >/proc/sys/net/ipv4/conf/eth1/promote_secondaries");
    let begin = sandbox.sh("date +%s").parse::<u64>().expect("seconds");
    for (step, expected, last) in steps {
        address(&sandbox, &container, step);
        wait_endpoints(&sandbox, &container, expected);
        let entry = wait_last(&sandbox, &container, last);
        assert!(entry["last"]["time"].as_u64().is_some_and(|time| time >= begin && time < begin + 300), "{entry:#}");
        for endpoint in sandbox.endpoints_on(&container.netns(), "eth1") {
            assert_eq!(endpoint.flags, ["backup", "subflow"], "{endpoint:?}");
        }
    }
    let entry = wait_state(&sandbox, &container, "pending");
    assert!(entry["reason"].as_str().is_some_and(|reason| reason.contains("no usable address")), "{entry:#}");
    // eth0 was never anybody's business.
    assert_eq!(sandbox.endpoints_on(&container.netns(), "eth0"), []);
}

#[test]
fn addresses_that_apply_would_not_use_are_not_used() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    container.oci(&BACKUP).ok();
    agent(&sandbox);
    sandbox.sh_in(
        &container.netns(),
        "echo 2 >/proc/sys/net/ipv6/conf/eth1/use_tempaddr
         ip address add fe80::2/64 dev eth1 nodad
         ip address add 169.254.7.7/16 dev eth1
         ip address add fd00:3::3/64 dev eth1 nodad preferred_lft 0
         ip address add fd00:4::4/64 dev eth1 nodad mngtmpaddr valid_lft 90000 preferred_lft 80000",
    );
    let temporary = wait_for("a temporary address", LIMIT, || {
        let shown = sandbox.sh_in(&container.netns(), "ip -6 -o address show dev eth1 temporary");
        (!shown.is_empty()).then_some(shown)
    });
    assert!(temporary.contains("fd00:4:"), "{temporary}");
    wait_endpoints(&sandbox, &container, &["fd00:4::4"]);
    std::thread::sleep(QUIET);
    assert_eq!(addresses(&sandbox, &container.netns()), set(&["fd00:4::4"]));
    // What is deprecated later is left, and taken up again.
    address(&sandbox, &container, "change fd00:4::4/64 dev eth1 valid_lft 90000 preferred_lft 0");
    wait_endpoints(&sandbox, &container, &[]);
    address(&sandbox, &container, "change fd00:3::3/64 dev eth1 valid_lft forever preferred_lft forever");
    wait_endpoints(&sandbox, &container, &["fd00:3::3"]);
    wait_state(&sandbox, &container, "applied");
}

#[test]
fn an_ipv6_address_is_used_while_it_is_tentative() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    container.oci(&BACKUP).ok();
    agent(&sandbox);
    let netns = container.netns();
    // DAD takes long here, so that there is no doubt that it is under way.
    sandbox.sh_in(&netns, "echo 4 >/proc/sys/net/ipv6/conf/eth1/dad_transmits; ip address add fd00:2::2/64 dev eth1");
    wait_endpoints(&sandbox, &container, &["fd00:2::2"]);
    let tentative = || !sandbox.sh_in(&netns, "ip -6 -o address show dev eth1 tentative").is_empty();
    assert!(tentative(), "DAD was over before the endpoint was there");
    let id = sandbox.endpoints_on(&netns, "eth1")[0].id;
    wait_until("the end of DAD", LIMIT, || !tentative());
    std::thread::sleep(QUIET);
    let endpoints = sandbox.endpoints_on(&netns, "eth1");
    assert_eq!((endpoints.len(), endpoints[0].id), (1, id), "{endpoints:?}");
    assert_eq!(interface(&sandbox, &container)["state"], "applied");
}

/// One of autoconfiguration or a DHCP client may turn out to be a duplicate sooner than anybody could use it.
#[test]
fn an_ipv6_address_with_a_lifetime_is_used_after_dad() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    container.oci(&BACKUP).ok();
    agent(&sandbox);
    let netns = container.netns();
    sandbox.sh_in(
        &netns,
        "echo 3 >/proc/sys/net/ipv6/conf/eth1/dad_transmits
         ip address add fd00:2::2/64 dev eth1 valid_lft 900 preferred_lft 900",
    );
    let (before, after) = inside(&sandbox, &netns, || {
        let tentative = || !ip("-6 -o address show dev eth1 tentative").is_empty();
        assert!(tentative(), "DAD was over at once");
        let mut before = 0;
        while !has_endpoint("fd00:2::2") {
            before += u32::from(tentative());
        }
        (before, tentative())
    });
    assert!(before > 0 && !after, "used while it was tentative");
    wait_endpoints(&sandbox, &container, &["fd00:2::2"]);
}

#[test]
fn a_duplicate_address_is_reported_and_not_used() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    // The other end has it already.
    sandbox.sh("ip address add fd00:2::2/64 dev web1 nodad");
    container.oci(&BACKUP).ok();
    agent(&sandbox);
    let netns = container.netns();
    sandbox.sh_in(&netns, "ip address add fd00:2::2/64 dev eth1");
    wait_until("DAD fails", LIMIT, || !sandbox.sh_in(&netns, "ip -6 -o address show dev eth1 dadfailed").is_empty());
    let is_reported = |entry: &Value| {
        let reason = entry["reason"].as_str().unwrap_or_default();
        entry["state"] == "pending" && reason.contains("fd00:2::2 is a duplicate address (DAD failed)")
    };
    wait_entry(&sandbox, &container, "the duplicate is reported", is_reported);
    assert_eq!(addresses(&sandbox, &netns), set(&[]));
    wait_last(&sandbox, &container, "fd00:2::2 is a duplicate");
    let text = sandbox.hook(&["status"]).ok();
    assert!(text.contains("fd00:2::2 is a duplicate"), "{text}");
    // Another one beside it is used; what is wrong stays said as long as nothing better has happened.
    address(&sandbox, &container, "add fd00:2::3/64 dev eth1 nodad");
    wait_endpoints(&sandbox, &container, &["fd00:2::3"]);
    wait_state(&sandbox, &container, "applied");
}

/// As documented: an IPv4 address stays on an interface that is down, and its endpoint with it; IPv6 ones go.
#[test]
fn a_link_that_goes_down_and_comes_back() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    agent(&sandbox);
    let netns = container.netns();
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    address(&sandbox, &container, "add fd00:2::2/64 dev eth1 nodad");
    wait_endpoints(&sandbox, &container, &["10.0.2.2", "fd00:2::2"]);
    let id = |address: &str| {
        let endpoints = sandbox.endpoints_on(&netns, "eth1");
        endpoints.iter().find(|e| e.address.to_string() == address).map(|e| e.id).expect("an endpoint")
    };
    let (first, second) = (id("10.0.2.2"), id("fd00:2::2"));
    // The peer loses its carrier: all addresses stay.
    sandbox.sh("ip link set web1 down");
    wait_until("no carrier", LIMIT, || sandbox.sh_in(&netns, "ip -o link show eth1").contains("NO-CARRIER"));
    std::thread::sleep(QUIET);
    assert_eq!((id("10.0.2.2"), id("fd00:2::2")), (first, second));
    sandbox.sh("ip link set web1 up");
    wait_until("a carrier", LIMIT, || !sandbox.sh_in(&netns, "ip -o link show eth1").contains("NO-CARRIER"));
    std::thread::sleep(QUIET);
    assert_eq!((id("10.0.2.2"), id("fd00:2::2")), (first, second));
    wait_state(&sandbox, &container, "applied");
    // Down and up in the container.
    for _ in 0..3 {
        sandbox.sh_in(&netns, "ip link set eth1 down");
        wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
        assert_eq!(id("10.0.2.2"), first);
        sandbox.sh_in(&netns, "ip link set eth1 up; ip address add fd00:2::2/64 dev eth1 nodad");
        wait_endpoints(&sandbox, &container, &["10.0.2.2", "fd00:2::2"]);
        assert_eq!(id("10.0.2.2"), first);
        wait_state(&sandbox, &container, "applied");
    }
}

#[test]
fn an_interface_that_is_renamed_moved_or_made_anew() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    agent(&sandbox);
    let netns = container.netns();
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    // Under another name nothing was asked for it.
    sandbox.sh_in(&netns, "ip link set eth1 down; ip link set eth1 name wan; ip link set wan up");
    let entry = wait_state(&sandbox, &container, "pending");
    assert!(entry["reason"].as_str().is_some_and(|reason| reason.contains("no such interface")), "{entry:#}");
    wait_until("its endpoint goes", LIMIT, || sandbox.endpoints(&netns).is_empty());
    sandbox.sh_in(&netns, "ip link set wan down; ip link set wan name eth1; ip link set eth1 up");
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    // Into the host's namespace and back, where it has lost its address.
    let host = sandbox.spawn(&["sh", "-c", "echo $$; exec sleep 1000"]);
    let pid = wait_for("a pid", LIMIT, || host.stdout().trim().parse::<u32>().ok());
    sandbox.sh_in(&netns, &format!("ip link set eth1 netns {pid}"));
    wait_state(&sandbox, &container, "pending");
    wait_until("its endpoint goes", LIMIT, || sandbox.endpoints(&netns).is_empty());
    sandbox.sh(&format!("ip link set eth1 netns {}", container.pid()));
    sandbox.sh_in(&netns, "ip address add 10.0.2.2/24 dev eth1; ip link set eth1 up");
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    // Deleted, and made anew under the same name with another index, also while the agent does not look.
    let again = "ip link del web1
         ip link add web1 type veth peer name eth1 netns PID; ip link set web1 up
         nsenter --net=/proc/PID/ns/net ip address add 10.0.2.2/24 dev eth1
         nsenter --net=/proc/PID/ns/net ip link set eth1 up";
    let again = again.replace("PID", &container.pid().to_string());
    let index = || sandbox.sh_in(&netns, "cat /proc/net/if_inet6 >/dev/null; ip -o link show eth1 | cut -d: -f1");
    let before = index();
    sandbox.sh(&again);
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    let stopped = stop_agent(&sandbox);
    sandbox.sh(&again);
    signal(&sandbox, stopped, Signal::SIGCONT);
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    assert_ne!(index(), before);
    wait_state(&sandbox, &container, "applied");
    let endpoints = sandbox.endpoints(&netns);
    assert_eq!(endpoints.len(), 1, "{endpoints:?}");
    assert_eq!(endpoints[0].flags, ["backup", "subflow"]);
}

#[test]
fn interfaces_that_match_a_pattern_come_and_go() {
    let sandbox = Sandbox::new();
    let container = Bare::new(&sandbox, "web");
    container.oci(&["--interface", "wan*=backup"]).ok();
    agent(&sandbox);
    let netns = container.netns();
    wait_state(&sandbox, &container, "pending");
    let found = |expected: &[&str]| {
        let addresses: BTreeSet<IpAddr> = sandbox.endpoints(&netns).iter().map(|endpoint| endpoint.address).collect();
        addresses == set(expected)
    };
    let add = |n: u32| {
        sandbox.sh_in(
            &netns,
            &format!(
                "ip link add wan{n} type veth peer name peer{n}; ip address add 10.0.{n}.2/24 dev wan{n}
                 ip link set wan{n} up; ip link set peer{n} up"
            ),
        );
    };
    add(1);
    wait_until("the first", LIMIT, || found(&["10.0.1.2"]));
    add(2);
    wait_until("the second", LIMIT, || found(&["10.0.1.2", "10.0.2.2"]));
    sandbox.sh_in(&netns, "ip link del wan1");
    wait_until("the first goes", LIMIT, || found(&["10.0.2.2"]));
    sandbox.sh_in(&netns, "ip link del wan2");
    wait_until("the second goes", LIMIT, || found(&[]));
    wait_state(&sandbox, &container, "pending");
}

#[test]
fn more_addresses_than_endpoints_take_turns() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    agent(&sandbox);
    let all: Vec<String> = (2..13).map(|n| format!("10.0.2.{n}")).collect();
    let add: String = all.iter().map(|a| format!("ip address add {a}/32 dev eth1\n")).collect();
    sandbox.sh_in(&container.netns(), &add);
    // The kernel has room for eight.
    let used = || addresses(&sandbox, &container.netns());
    let reason = |entry: &Value| entry["reason"].as_str().is_some_and(|reason| reason.contains("at most 8"));
    wait_entry(&sandbox, &container, "the rest is named", |entry| recorded_in(entry).len() == 8 && reason(entry));
    let first = used();
    assert_eq!(first.len(), 8);
    let gone: String = first.iter().take(5).map(|a| format!("ip address del {a}/32 dev eth1\n")).collect();
    sandbox.sh_in(&container.netns(), &gone);
    let left: BTreeSet<IpAddr> = all
        .iter()
        .map(|a| a.parse().expect("an address"))
        .filter(|a| !first.iter().take(5).any(|gone| gone == a))
        .collect();
    wait_set(&sandbox, &container, &left);
    assert_eq!(interface(&sandbox, &container)["reason"], Value::Null);
    assert_sound(&sandbox);
}

// --- what others do -------------------------------------------------------------------------------------------------

#[test]
fn a_foreign_change_is_put_back_once_and_then_reported() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    let follow = ["--interface", "eth1=backup", "--follow", "always"];
    container.oci(&follow).ok();
    agent(&sandbox);
    wait_until("it is followed", LIMIT, || is_followed(&sandbox, &container));
    let netns = container.netns();
    let flags = || sandbox.endpoints_on(&netns, "eth1").first().map(|endpoint| endpoint.flags.clone());
    let backup = || flags().is_some_and(|flags| flags == ["backup", "subflow"]);
    // The kernel says nothing of endpoints: it is seen when the agent looks next.
    let mtu = std::cell::Cell::new(1400);
    let change = |command: &str| {
        sandbox.sh_in(&netns, command);
        mtu.set(mtu.get() - 1);
        sandbox.sh_in(&netns, &format!("ip link set eth1 mtu {}", mtu.get()));
    };
    let nobackup = || {
        let id = sandbox.endpoints_on(&netns, "eth1")[0].id;
        change(&format!("ip mptcp endpoint change id {id} nobackup"));
    };
    let delete = || {
        let id = sandbox.endpoints_on(&netns, "eth1")[0].id;
        change(&format!("ip mptcp endpoint delete id {id}"));
    };
    let orders: [[&dyn Fn(); 2]; 2] = [[&nobackup, &delete], [&delete, &nobackup]];
    for [first, second] in orders {
        first();
        wait_until("it is put back", LIMIT, backup);
        let entry = wait_last(&sandbox, &container, "put back after somebody changed it");
        assert_eq!(entry["state"], "applied", "{entry:#}");
        second();
        let entry = wait_last(&sandbox, &container, "left alone");
        assert_eq!(entry["state"], "drifted", "{entry:#}");
        change("true");
        std::thread::sleep(QUIET);
        assert!(!backup(), "it was put back twice");
        assert_eq!(interface(&sandbox, &container)["state"], "drifted");
        // Whoever asks again gets it again.
        container.oci(&follow).ok();
        assert!(backup(), "{:?}", flags());
        assert_eq!(interface(&sandbox, &container)["state"], "applied");
    }
}

#[test]
fn foreign_endpoints_are_never_touched() {
    let sandbox = Sandbox::new();
    let mut container = wired_in(&sandbox, "web", "pod");
    let netns = Netns::named("pod");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    sandbox.sh_in(
        &netns,
        "ip mptcp limits set subflows 3
         ip mptcp endpoint add 10.0.1.2 dev eth0 id 11 signal
         ip mptcp endpoint add 10.9.9.9 id 12 subflow fullmesh
         ip mptcp endpoint add 10.0.2.2 dev eth1 id 13 subflow",
    );
    let foreign = || {
        let endpoints = sandbox.endpoints(&netns);
        endpoints.into_iter().filter(|endpoint| endpoint.id == 11 || endpoint.id == 12).collect::<Vec<_>>()
    };
    let adopted = || sandbox.endpoints(&netns).into_iter().find(|endpoint| endpoint.id == 13);
    let before = (foreign(), adopted());
    assert_eq!(before.0.len(), 2, "{before:?}");
    container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    agent(&sandbox);
    assert_eq!(adopted().map(|endpoint| endpoint.flags), Some(vec!["backup".into(), "subflow".into()]));
    address(&sandbox, &container, "add 10.0.3.2/24 dev eth1");
    wait_endpoints(&sandbox, &container, &["10.0.2.2", "10.0.3.2"]);
    address(&sandbox, &container, "del 10.0.3.2/24 dev eth1");
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    // The adopted one's address goes: it is its owner's to delete it, and as it was.
    address(&sandbox, &container, "del 10.0.2.2/24 dev eth1");
    wait_until("given back", LIMIT, || adopted() == before.1);
    wait_state(&sandbox, &container, "pending");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    wait_state(&sandbox, &container, "applied");
    wait_until("adopted again", LIMIT, || adopted().is_some_and(|e| e.flags == ["backup", "subflow"]));
    address(&sandbox, &container, "add 10.0.4.2/24 dev eth1");
    wait_endpoints(&sandbox, &container, &["10.0.2.2", "10.0.4.2"]);
    // Its process is killed and nobody calls the hook. The namespace is an engine's, and stays.
    container.kill();
    wait_until("the release", LIMIT, || sandbox.status()["containers"] == json!([]));
    assert_eq!((foreign(), adopted()), before);
    assert_eq!(sandbox.endpoints(&netns).len(), 3, "{:?}", sandbox.endpoints(&netns));
    assert!(sandbox.sh_in(&netns, "ip mptcp limits show").contains("subflows 3"));
    sandbox.assert_ledger_is_empty();
}

/// The runtime writes `linux.sysctl` after its hooks.
#[test]
fn a_setting_that_is_overwritten_after_the_hook_is_reported() {
    const KEY: &str = "net/mptcp/add_addr_timeout";
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    let sysctl = format!("{KEY}=60");
    let wish = ["--interface", "eth1=backup", "--sysctl", &sysctl, "--follow", "always"];
    container.oci(&wish).ok();
    let netns = container.netns();
    sandbox.sh_in(&netns, &format!("echo 77 >/proc/sys/{KEY}"));
    let drift = wait_for("the drift is recorded", LIMIT, || {
        sandbox.conflicts().into_iter().find(|conflict| conflict["outcome"] == "drift")
    });
    assert_eq!(
        (&drift["container"], &drift["wanted"], &drift["kept"]),
        (&json!(container.id()), &json!("60"), &json!("77"))
    );
    assert!(drift["reason"].as_str().is_some_and(|reason| reason.contains("linux.sysctl")), "{drift:#}");
    let owned = sandbox.status_of(container.id())["settings"][0].clone();
    assert_eq!((&owned["value"], &owned["drifted"]), (&json!("60"), &json!("77")), "{owned:#}");
    assert_eq!(sandbox.sysctl(&netns, KEY).as_deref(), Some("77"), "it is left as it is");
    // Said once, also by an agent that was killed and comes back.
    kill_agent(&sandbox);
    let _by_hand = sandbox.spawn(&[&hook().display().to_string(), "agent"]);
    agent(&sandbox);
    address(&sandbox, &container, "add 10.0.2.3/24 dev eth1");
    wait_endpoints(&sandbox, &container, &["10.0.2.2", "10.0.2.3"]);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(sandbox.conflicts().len(), 1, "{:#}", sandbox.status());
    assert_eq!(sandbox.sysctl(&netns, KEY).as_deref(), Some("77"));
    container.oci(&wish).ok();
    assert_eq!(sandbox.sysctl(&netns, KEY).as_deref(), Some("60"), "whoever asks again gets it again");
    assert_eq!(sandbox.status_of(container.id())["settings"][0]["drifted"], Value::Null);
}

#[test]
fn whoever_stays_in_a_shared_namespace_is_looked_at_when_the_first_leaves() {
    const KEY: &str = "net/mptcp/add_addr_timeout";
    let sandbox = Sandbox::new();
    let mut first = wired_in(&sandbox, "first", "pod");
    let netns = Netns::named("pod");
    address(&sandbox, &first, "add 10.0.2.2/24 dev eth1");
    address(&sandbox, &first, "add 10.0.3.2/24 dev eth1");
    let second = Bare::in_netns(&sandbox, "second", &netns);
    let sysctl = format!("{KEY}=60");
    first.oci(&["--interface", "eth1=backup", "--limit", "subflows=4", "--follow", "never"]).ok();
    second
        .oci(&["--interface", "eth1=backup", "--limit", "subflows=5", "--sysctl", &sysctl, "--follow", "always"])
        .ok();
    agent(&sandbox);
    wait_until("it is followed", LIMIT, || is_followed(&sandbox, &second));
    assert!(!is_followed(&sandbox, &first));
    // After both looks at what the runtime may have written, so that it is the departure that makes it look.
    std::thread::sleep(Duration::from_millis(2500));
    sandbox.sh_in(
        &netns,
        &format!(
            "echo 77 >/proc/sys/{KEY}
             ip mptcp limits set subflows 2
             ip mptcp endpoint delete id $(ip mptcp endpoint show | sed -n 's/^10.0.3.2 id \\([0-9]*\\).*/\\1/p')"
        ),
    );
    assert_eq!(addresses(&sandbox, &netns), set(&["10.0.2.2"]));
    std::thread::sleep(QUIET);
    assert_eq!(addresses(&sandbox, &netns), set(&["10.0.2.2"]), "nothing has happened that the agent hears of");
    first.stop().ok();
    wait_endpoints(&sandbox, &second, &["10.0.2.2", "10.0.3.2"]);
    wait_last(&sandbox, &second, "put back after somebody changed it");
    let drift = wait_for("the drift is recorded", LIMIT, || sandbox.conflicts().into_iter().next());
    assert_eq!((&drift["outcome"], &drift["container"]), (&json!("drift"), &json!(second.id())), "{drift:#}");
    let limits = sandbox.sh_in(&netns, "ip mptcp limits show");
    assert!(limits.contains("subflows 5"), "{limits}");
    assert_eq!(sandbox.sysctl(&netns, KEY).as_deref(), Some("77"), "a setting is reported, not changed");
    assert_sound(&sandbox);
}

#[test]
fn two_in_one_namespace_are_followed_together() {
    let sandbox = Sandbox::new();
    let mut first = wired_in(&sandbox, "first", "pod");
    let netns = Netns::named("pod");
    let mut second = Bare::in_netns(&sandbox, "second", &netns);
    for container in [&first, &second] {
        container.oci(&BACKUP).ok();
    }
    agent(&sandbox);
    for (change, expected) in [
        ("add 10.0.2.2/32 dev eth1", &["10.0.2.2"][..]),
        ("add 10.0.2.3/32 dev eth1", &["10.0.2.2", "10.0.2.3"]),
        ("del 10.0.2.2/32 dev eth1", &["10.0.2.3"]),
    ] {
        address(&sandbox, &first, change);
        for container in [&first, &second] {
            wait_endpoints(&sandbox, container, expected);
        }
    }
    assert_eq!(sandbox.endpoints_on(&netns, "eth1").len(), 1);
    first.kill();
    wait_until("the first is let go", LIMIT, || sandbox.status()["containers"].as_array().map(Vec::len) == Some(1));
    wait_endpoints(&sandbox, &second, &["10.0.2.3"]);
    second.kill();
    wait_until("the second is let go", LIMIT, || sandbox.status()["containers"] == json!([]));
    assert_eq!(sandbox.endpoints(&netns), []);
    sandbox.assert_ledger_is_empty();
}

/// Hooks and people work on a container while the agent does.
#[test]
fn hooks_and_the_agent_do_not_get_in_each_others_way() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    let follow = ["--interface", "eth1=backup", "--follow", "always"];
    container.oci(&follow).ok();
    agent(&sandbox);
    let (commands, expected) = changes(42, 200);
    let script: String = commands.iter().map(|command| format!("ip {command}; sleep 0.01\n")).collect();
    let mut changing = sandbox.spawn_in(&container.netns(), &["sh", "-ec", &script]);
    let mut rounds = 0;
    while changing.is_running() {
        container.oci(&follow).ok();
        assert_sound(&sandbox);
        let state = interface(&sandbox, &container)["state"].as_str().map(String::from);
        // Between a change and the agent's answer to it the ledger and the kernel may differ, no more.
        assert_ne!(state.as_deref(), Some("interrupted"));
        rounds += 1;
    }
    changing.wait(LIMIT).ok();
    assert!(rounds > 5, "{rounds} hooks among 200 changes");
    wait_set(&sandbox, &container, &expected);
    assert_eq!(addresses(&sandbox, &container.netns()), expected);
}

#[test]
fn whoever_is_released_by_hand_is_left_alone() {
    let sandbox = Sandbox::new();
    let web = wired(&sandbox, "web");
    let shop = wired(&sandbox, "shop");
    for container in [&web, &shop] {
        container.oci(&BACKUP).ok();
        address(&sandbox, container, "add 10.0.2.2/24 dev eth1");
        wait_endpoints(&sandbox, container, &["10.0.2.2"]);
    }
    sandbox.hook(&["release", web.id()]).ok();
    for container in [&web, &shop] {
        address(&sandbox, container, "add 10.0.2.3/24 dev eth1");
    }
    wait_endpoints(&sandbox, &shop, &["10.0.2.2", "10.0.2.3"]);
    std::thread::sleep(QUIET);
    assert_eq!(sandbox.endpoints(&web.netns()), []);
    let list = sandbox.sh(&format!("ls {STATE_DIR}/follow"));
    assert_eq!(list.lines().count(), 1, "{list}");
}

/// The same id, another process and namespace: an engine's restart.
#[test]
fn another_life_of_a_container_is_followed_instead() {
    let sandbox = Sandbox::new();
    let mut container = wired(&sandbox, "web");
    container.oci(&BACKUP).ok();
    let pid = agent(&sandbox);
    for (round, while_stopped) in [false, true, false, true].into_iter().enumerate() {
        address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
        wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
        if while_stopped {
            stop_agent(&sandbox);
        }
        container = container.restarted();
        // A stopped agent keeps the old namespace.
        wire(&sandbox, &format!("life{round}n"), &container.pid().to_string());
        container.oci(&BACKUP).ok();
        if while_stopped {
            signal(&sandbox, pid, Signal::SIGCONT);
        }
        address(&sandbox, &container, &format!("add 10.0.3.{}/24 dev eth1", round + 2));
        wait_endpoints(&sandbox, &container, &[&format!("10.0.3.{}", round + 2)]);
        std::thread::sleep(QUIET);
        let status = sandbox.status_of(container.id());
        assert_eq!((&status["live"], &status["followed"]), (&json!(true), &json!(true)), "{status:#}");
        address(&sandbox, &container, &format!("del 10.0.3.{}/24 dev eth1", round + 2));
        let old = if round == 0 { "web1".into() } else { format!("life{}n1", round - 1) };
        wait_until("the end of the old namespace", LIMIT, || {
            sandbox.run(&["ip", "link", "show", &old]).code != Some(0)
        });
    }
    assert_eq!(agent(&sandbox), pid);
    assert_sound(&sandbox);
}

/// A mistake in the policy file holds it up as long as it is there.
#[test]
fn a_mistake_in_the_policy_is_waited_out() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    let journal = Journal::listen(&sandbox);
    container.oci(&BACKUP).ok();
    let pid = agent(&sandbox);
    sandbox.policy("on-conflct = \"warn\"\n");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    let mut said = Vec::new();
    wait_until("the agent complains", LIMIT, || {
        said.extend(journal.entries());
        said.iter()
            .any(|entry| entry.contains("nothing is followed until this is mended") && entry.contains("on-conflct"))
    });
    assert_eq!(sandbox.endpoints_on(&container.netns(), "eth1"), []);
    sandbox.policy("on-conflict = \"warn\"\n");
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    // However long it takes to find it; who ends meanwhile is not forgotten either.
    let mut other = wired(&sandbox, "shop");
    other.oci(&BACKUP).ok();
    wait_until("it is followed", LIMIT, || is_followed(&sandbox, &other));
    sandbox.policy("on-conflct = \"warn\"\n");
    address(&sandbox, &container, "add 10.0.2.3/24 dev eth1");
    other.kill();
    std::thread::sleep(LIMIT);
    sandbox.policy("on-conflict = \"warn\"\n");
    wait_endpoints(&sandbox, &container, &["10.0.2.2", "10.0.2.3"]);
    wait_until("the release", LIMIT, || sandbox.status()["containers"].as_array().map(Vec::len) == Some(1));
    assert_eq!(agent(&sandbox), pid);
}

// --- the end of a container -----------------------------------------------------------------------------------------

/// How long the host's end of a killed container's veth stays, with the agent and without, turn by turn. `busy`: the
/// agent has always something to do for another container.
fn measure_ends(busy: bool) {
    const ROUNDS: usize = 12;
    let sandbox = Sandbox::new();
    let keeper = wired(&sandbox, "keep");
    keeper.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    let pid = agent(&sandbox);
    let changes = "while :; do ip address add 10.0.2.2/32 dev eth1; ip address del 10.0.2.2/32 dev eth1; done";
    let _changing = busy.then(|| sandbox.spawn_in(&keeper.netns(), &["sh", "-ec", changes]));
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS * 2 {
        let (follow, times) = match round % 2 {
            0 => ("always", &mut with),
            _ => ("never", &mut without),
        };
        let name = format!("r{round}");
        let mut container = wired(&sandbox, &name);
        container.oci(&["--interface", "eth1=backup", "--follow", follow]).ok();
        if follow == "always" {
            address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
            wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
        }
        let init = outer(&sandbox, container.pid());
        let link = format!("{name}1");
        times.push(inside(&sandbox, &Netns::Host, || {
            assert!(if_nametoindex(link.as_str()).is_ok());
            let begin = Instant::now();
            kill(init, Signal::SIGKILL).expect("killing a container");
            while if_nametoindex(link.as_str()).is_ok() {
                assert!(begin.elapsed() < LIMIT, "{link} is still there");
                std::thread::sleep(Duration::from_micros(200));
            }
            begin.elapsed()
        }));
        container.kill();
    }
    let busy = if busy { "busy" } else { "idle" };
    let with = median(&format!("gone with an agent that is {busy}"), with);
    let without = median("gone without one", without);
    // The kernel itself takes its time for a namespace, above all on a loaded machine; the agent has 50 ms beside.
    assert!(with < without + Duration::from_millis(50), "with an agent {with:?}, without {without:?}");
    // Those without an agent wait for somebody to clean up; the others are let go.
    wait_until("the dead are let go", LIMIT, || {
        sandbox.status()["containers"].as_array().map(Vec::len) == Some(ROUNDS + 1)
    });
    let status = sandbox.status();
    let containers = status["containers"].as_array().expect("a list");
    assert_eq!(containers.iter().filter(|container| container["live"] == false).count(), ROUNDS, "{status:#}");
    assert_eq!(agent(&sandbox), pid);
    assert_sound(&sandbox);
}

/// The agent's sockets must not keep a namespace: the host's end of its veth goes as fast as without an agent.
#[test]
fn a_killed_containers_namespace_is_gone_at_once() {
    measure_ends(false);
}

#[test]
fn a_killed_containers_namespace_is_gone_at_once_while_the_agent_is_busy() {
    measure_ends(true);
}

/// An engine's poststop comes while the agent lets the same container go, and the next start right after it.
#[test]
fn the_agent_and_poststop_let_the_same_container_go() {
    let sandbox = Sandbox::new();
    let mut container = wired_in(&sandbox, "web", "pod");
    let netns = Netns::named("pod");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    for _ in 0..15 {
        container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
        assert_eq!(addresses(&sandbox, &netns), set(&["10.0.2.2"]));
        let said = container.stop();
        assert!(!said.stderr.contains("in use") && !said.stderr.contains("cannot"), "{said}");
        said.ok();
        assert_eq!(sandbox.endpoints(&netns), []);
        sandbox.assert_ledger_is_empty();
        container = Bare::in_netns(&sandbox, "web", &netns);
    }
    assert_sound(&sandbox);
}

#[test]
fn a_killed_containers_claims_on_the_host_are_restored() {
    let value = HostValue::of_sysctl("net/core/wmem_max");
    let sandbox = Sandbox::host_network();
    let another = (value.original().parse::<u64>().expect("a number") + 4096).to_string();
    let wish = format!("net.core.wmem_max={another}");
    let mut first = Bare::new(&sandbox, "first");
    let mut second = Bare::new(&sandbox, "second");
    for container in [&first, &second] {
        container.oci(&["--sysctl", &wish, "--follow", "always"]).ok();
    }
    agent(&sandbox);
    assert_eq!(value.current(), another);
    first.kill();
    wait_until("the first is let go", LIMIT, || sandbox.status()["containers"].as_array().map(Vec::len) == Some(1));
    assert_eq!(value.current(), another, "the second one relies on it");
    second.kill();
    wait_until("the value before the first", LIMIT, || value.current() == value.original());
    wait_until("an empty ledger", LIMIT, || sandbox.status()["containers"] == json!([]));
    sandbox.assert_ledger_is_empty();
}

/// Nobody needs it for a minute; whoever comes meanwhile has the same one.
#[test]
fn it_ends_a_minute_after_the_last_container() {
    let sandbox = Sandbox::new();
    let mut web = wired(&sandbox, "web");
    web.oci(&BACKUP).ok();
    let pid = agent(&sandbox);
    web.kill();
    wait_until("the release", LIMIT, || sandbox.status()["containers"] == json!([]));
    let mut shop = wired(&sandbox, "shop");
    shop.oci(&BACKUP).ok();
    address(&sandbox, &shop, "add 10.0.2.2/24 dev eth1");
    wait_endpoints(&sandbox, &shop, &["10.0.2.2"]);
    assert_eq!(agent(&sandbox), pid);
    shop.kill();
    wait_until("the release", LIMIT, || sandbox.status()["containers"] == json!([]));
    let begin = Instant::now();
    wait_until("the end of an agent that nobody needs", Duration::from_secs(75), || agents(&sandbox).is_empty());
    let took = begin.elapsed();
    println!("the agent ended {took:?} after the last container");
    assert!(took > Duration::from_secs(55), "{took:?}");
    assert!(!sandbox.outside(&format!("{STATE_DIR}/agent")).exists());
    assert_eq!(sandbox.sh(&format!("find {STATE_DIR} -type f ! -path '*/locks/agent'")), "");
    sandbox.assert_ledger_is_empty();
    // The next one finds nothing in its way.
    let cart = wired(&sandbox, "cart");
    cart.oci(&BACKUP).ok();
    assert_ne!(agent(&sandbox), pid);
}

// --- killed, stopped, deafened --------------------------------------------------------------------------------------

/// A number of changes, each one pseudo-random but the same in each run, and what there is afterwards.
fn changes(seed: u64, count: usize) -> (Vec<String>, BTreeSet<IpAddr>) {
    let pool = ["10.0.2.2/32", "10.0.2.3/32", "10.0.2.4/32", "10.0.2.5/32", "fd00:2::2/128", "fd00:2::3/128"];
    let mut random = seed;
    let mut present = BTreeSet::new();
    let mut commands = Vec::new();
    for _ in 0..count {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let prefix = pool[(random >> 33) as usize % pool.len()];
        let address: IpAddr = prefix.split('/').next().and_then(|a| a.parse().ok()).expect("an address");
        let nodad = if address.is_ipv6() { "nodad" } else { "" };
        if present.remove(&address) {
            commands.push(format!("address del {prefix} dev eth1"));
        } else {
            present.insert(address);
            commands.push(format!("address add {prefix} dev eth1 {nodad}"));
        }
    }
    (commands, present)
}

#[test]
fn an_agent_killed_among_200_changes_comes_to_the_same_state() {
    const CONTAINERS: usize = 4;
    let sandbox = Sandbox::new();
    let containers: Vec<Bare> = (0..CONTAINERS).map(|n| wired(&sandbox, &format!("c{n}"))).collect();
    for container in &containers {
        sandbox.sh_in(&container.netns(), "ip mptcp endpoint add 10.0.1.2 dev eth0 id 99 signal");
        container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    }
    agent(&sandbox);
    for (round, by_apply) in [false, true].into_iter().enumerate() {
        let plans: Vec<_> = (0..CONTAINERS).map(|n| changes((round * CONTAINERS + n) as u64, 50)).collect();
        let all: Vec<Running> = containers
            .iter()
            .zip(&plans)
            .map(|(container, (commands, _))| {
                let script: String = commands.iter().map(|c| format!("ip {c}; echo; sleep 0.01\n")).collect();
                sandbox.spawn_in(&container.netns(), &["sh", "-ec", &script])
            })
            .collect();
        let done = || all.iter().map(|changing| changing.stdout().lines().count()).sum::<usize>();
        wait_until("the first half of the changes", LIMIT, || done() >= 80);
        kill_agent(&sandbox);
        let at_kill = done();
        assert!(at_kill < 200, "all changes were over");
        wait_until("changes that no agent sees", LIMIT, || done() >= at_kill + 20);
        let mut by_hand = None;
        if by_apply {
            containers[0].oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
        } else {
            by_hand = Some(sandbox.spawn(&[&hook().display().to_string(), "agent"]));
        }
        println!("killed after {at_kill} changes, started again after {}", done());
        for changing in all {
            changing.wait(LIMIT).ok();
        }
        for (container, (_, expected)) in containers.iter().zip(&plans) {
            wait_set(&sandbox, container, expected);
            let endpoints = sandbox.endpoints(&container.netns());
            for endpoint in endpoints.iter().filter(|endpoint| endpoint.id != 99) {
                assert_eq!(endpoint.flags, ["backup", "subflow"], "{endpoint:?}");
            }
            assert_eq!(endpoints.len(), expected.len() + 1, "{endpoints:?}");
            let expected = if expected.is_empty() { "pending" } else { "applied" };
            wait_state(&sandbox, container, expected);
            sandbox.sh_in(&container.netns(), "ip address flush dev eth1");
            wait_endpoints(&sandbox, container, &[]);
        }
        assert_sound(&sandbox);
        if !by_apply {
            kill_agent(&sandbox);
            drop(by_hand);
            containers[0].oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
            agent(&sandbox);
        }
    }
}

#[test]
fn whenever_it_is_killed_the_ledger_is_sound() {
    const ROUNDS: u32 = 20;
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    let netns = container.netns();
    let follow = ["--interface", "eth1=backup", "--follow", "always"];
    container.oci(&follow).ok();
    let mut seen = [0; 3];
    for round in 0..ROUNDS {
        let pid = agent(&sandbox);
        // It has begun to listen when it has done something.
        address(&sandbox, &container, "add 10.0.2.2/32 dev eth1");
        wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
        let process = outer(&sandbox, pid);
        inside(&sandbox, &netns, || {
            ip("address add 10.0.2.3/32 dev eth1");
            ip("address del 10.0.2.2/32 dev eth1");
            // From 0 to 36 ms, most of them short.
            std::thread::sleep(Duration::from_micros(100) * round * round);
            kill(process, Signal::SIGKILL).expect("killing the agent");
        });
        wait_ended(&sandbox, pid);
        assert_sound(&sandbox);
        let state = interface(&sandbox, &container)["state"].as_str().expect("a state").to_owned();
        let kind = match state.as_str() {
            "applied" => 0,
            "interrupted" => 1,
            "drifted" => 2,
            other => panic!("round {round}: {other}"),
        };
        seen[kind] += 1;
        container.oci(&follow).ok();
        wait_endpoints(&sandbox, &container, &["10.0.2.3"]);
        wait_state(&sandbox, &container, "applied");
        assert_sound(&sandbox);
        agent(&sandbox);
        address(&sandbox, &container, "del 10.0.2.3/32 dev eth1");
        wait_endpoints(&sandbox, &container, &[]);
        assert_eq!(sandbox.endpoints(&netns), []);
    }
    println!("killed after its work {} times, at work {}, before it {}", seen[0], seen[1], seen[2]);
}

/// An endpoint that the agent itself had deleted when it was killed is not taken for somebody else's change, which
/// would be put back once and no more.
#[test]
fn what_a_killed_agent_left_half_done_is_nobody_elses_change() {
    const ROUNDS: u32 = 20;
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    let netns = container.netns();
    address(&sandbox, &container, "add 10.0.2.2/32 dev eth1");
    container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    let mut half_done = 0;
    for round in 0..ROUNDS {
        let pid = agent(&sandbox);
        let another = ["10.0.2.3", "10.0.2.4"][round as usize % 2];
        address(&sandbox, &container, &format!("add {another}/32 dev eth1"));
        wait_endpoints(&sandbox, &container, &["10.0.2.2", another]);
        let process = outer(&sandbox, pid);
        inside(&sandbox, &netns, || {
            ip("address del 10.0.2.2/32 dev eth1");
            std::thread::sleep(Duration::from_micros(400) * round);
            kill(process, Signal::SIGKILL).expect("killing the agent");
        });
        wait_ended(&sandbox, pid);
        let is_interrupted = interface(&sandbox, &container)["state"] == "interrupted";
        half_done += u32::from(
            is_interrupted && !addresses(&sandbox, &netns).contains(&"10.0.2.2".parse::<IpAddr>().expect("one")),
        );
        address(&sandbox, &container, "add 10.0.2.2/32 dev eth1");
        let by_hand = sandbox.spawn(&[&hook().display().to_string(), "agent"]);
        let pid = agent(&sandbox);
        wait_endpoints(&sandbox, &container, &["10.0.2.2", another]);
        wait_state(&sandbox, &container, "applied");
        let entry = interface(&sandbox, &container);
        assert_eq!(entry["state"], "applied", "round {round}: {entry:#}");
        let what = entry["last"]["what"].as_str().unwrap_or_default();
        assert!(!what.contains("put back") && !what.contains("somebody"), "round {round}: {entry:#}");
        assert_sound(&sandbox);
        signal(&sandbox, pid, Signal::SIGKILL);
        wait_ended(&sandbox, pid);
        drop(by_hand);
        address(&sandbox, &container, &format!("del {another}/32 dev eth1"));
        container.oci(&["--follow", "always", "--interface", "eth1=backup"]).ok();
    }
    println!("killed {half_done} of {ROUNDS} times when it had deleted an endpoint and not written so");
}

#[test]
fn a_container_that_ends_while_no_agent_runs_is_let_go_by_the_next() {
    let sandbox = Sandbox::new();
    let mut web = wired(&sandbox, "web");
    let shop = wired(&sandbox, "shop");
    web.oci(&BACKUP).ok();
    shop.oci(&BACKUP).ok();
    agent(&sandbox);
    kill_agent(&sandbox);
    web.kill();
    let status = sandbox.status_of(shop.id());
    assert_eq!(status["followed"], false);
    let reason = status["not_followed"].as_str().unwrap_or_default();
    assert!(reason.contains("no agent runs; start mptcp-hook agent"), "{status:#}");
    shop.oci(&BACKUP).ok();
    agent(&sandbox);
    wait_until("the dead one is let go", LIMIT, || {
        let status = sandbox.status();
        let ids: Vec<_> = status["containers"].as_array().into_iter().flatten().map(|c| c["id"].clone()).collect();
        ids == [json!(shop.id())]
    });
    address(&sandbox, &shop, "add 10.0.2.2/24 dev eth1");
    wait_endpoints(&sandbox, &shop, &["10.0.2.2"]);
}

/// How many messages the sockets of a namespace have lost: the column Drops of /proc/net/netlink.
fn drops(sandbox: &Sandbox, netns: &Netns) -> u64 {
    let table = sandbox.run_in(netns, &["cat", "/proc/net/netlink"]).ok();
    let column = table.lines().next().and_then(|head| head.split_whitespace().position(|word| word == "Drops"));
    let column = column.expect("a column Drops");
    table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(column)?.parse::<u64>().ok()).sum()
}

#[test]
fn lost_messages_of_the_kernel_lose_nothing() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    let netns = container.netns();
    address(&sandbox, &container, "add 10.0.2.2/32 dev eth1");
    wait_endpoints(&sandbox, &container, &["10.0.2.2"]);
    let pid = stop_agent(&sandbox);
    let (mut commands, mut expected) = changes(7, 3000);
    // The last changes are the ones that are lost.
    expected.insert("10.0.2.99".parse().expect("an address"));
    commands.insert(0, "address del 10.0.2.2/32 dev eth1".into());
    commands.push("address add 10.0.2.99/32 dev eth1".into());
    std::fs::write(sandbox.dir().join("batch"), commands.join("\n")).expect("a batch for ip");
    sandbox.sh_in(&netns, &format!("ip -batch {}/batch", sandbox.dir().display()));
    let lost = drops(&sandbox, &netns);
    assert!(lost > 0, "nothing was lost");
    signal(&sandbox, pid, Signal::SIGCONT);
    wait_set(&sandbox, &container, &expected);
    println!("{lost} messages were lost");
    // It hears the next ones again.
    address(&sandbox, &container, "flush dev eth1");
    wait_endpoints(&sandbox, &container, &[]);
    assert_eq!(agent(&sandbox), pid);
    assert_sound(&sandbox);
}

/// The kernel queues so few changes of the ledger for an agent that was started meanwhile that they are lost.
#[test]
fn lost_messages_of_the_ledger_lose_nothing() {
    let sandbox = Sandbox::new();
    let mut old: Vec<Bare> = (0..4).map(|n| wired(&sandbox, &format!("old{n}"))).collect();
    let pid = {
        let queue = HostValue::of_sysctl("fs/inotify/max_queued_events");
        queue.set("2");
        for container in &old {
            container.oci(&BACKUP).ok();
        }
        agent(&sandbox)
    };
    for container in &old {
        wait_until("it is followed", LIMIT, || is_followed(&sandbox, container));
        address(&sandbox, container, "add 10.0.2.2/24 dev eth1");
        wait_endpoints(&sandbox, container, &["10.0.2.2"]);
    }
    stop_agent(&sandbox);
    let new: Vec<Bare> = (0..6).map(|n| wired(&sandbox, &format!("new{n}"))).collect();
    for container in &new {
        container.oci(&BACKUP).ok();
        address(&sandbox, container, "add 10.0.2.2/24 dev eth1");
    }
    // Two leave: one by its hook, one without a word. One is to be left alone.
    old[0].stop().ok();
    old[1].kill();
    old[2].oci(&["--interface", "eth1=backup", "--follow", "never"]).ok();
    address(&sandbox, &old[2], "add 10.0.3.2/24 dev eth1");
    address(&sandbox, &old[3], "add 10.0.3.2/24 dev eth1");
    signal(&sandbox, pid, Signal::SIGCONT);
    for container in &new {
        wait_endpoints(&sandbox, container, &["10.0.2.2"]);
        assert!(is_followed(&sandbox, container));
    }
    wait_endpoints(&sandbox, &old[3], &["10.0.2.2", "10.0.3.2"]);
    wait_until("the dead are let go", LIMIT, || {
        sandbox.status()["containers"].as_array().map(Vec::len) == Some(new.len() + 2)
    });
    std::thread::sleep(QUIET);
    assert!(!is_followed(&sandbox, &old[2]));
    assert_eq!(addresses(&sandbox, &old[2].netns()), set(&["10.0.2.2"]));
    assert_eq!(agent(&sandbox), pid);
    assert_sound(&sandbox);
}

// --- without root, and what people see ------------------------------------------------------------------------------

/// A user's container, with the ledger of that user: no privilege of the machine is needed.
#[test]
fn in_a_user_namespace_it_works_for_that_users_containers() {
    const USER: u32 = 1000;
    let sandbox = Sandbox::new();
    let user = USER.to_string();
    sandbox.sh(&format!("install -d -m 755 /run/user; install -d -m 700 -o {user} -g {user} /run/user/{user}"));
    let sleep = ["sh", "-c", "echo $$; exec sleep 1000"];
    let pid = |process: &Running| wait_for("a pid", LIMIT, || process.stdout().trim().parse::<u32>().ok());
    let become_user = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"];
    let user_namespace = ["unshare", "--user", "--map-root-user", "--net"];
    let home = sandbox.spawn(&[&become_user[..], &user_namespace, &sleep].concat());
    let home_pid = pid(&home).to_string();
    // As an unprivileged engine calls it: as the user who is root there.
    let enter = ["nsenter", "--target", &home_pid, "--user", "--net", "--"];
    let mut containers = Vec::new();
    for _ in 0..2 {
        let init = sandbox.spawn(&[&enter[..], &["unshare", "--net"], &sleep].concat());
        let pid = pid(&init);
        let wiring =
            "ip link set lo up; ip link add eth1 type veth peer name peer1; ip link set peer1 up; ip link set eth1 up";
        sandbox
            .run(&[&enter[..], &["nsenter", &format!("--net=/proc/{pid}/ns/net"), "sh", "-ec", wiring]].concat())
            .ok();
        containers.push((pid, init));
    }
    let program = hook().display().to_string();
    for (pid, _) in &containers {
        let (pid, name) = (pid.to_string(), format!("c{pid}"));
        let apply = [&program, "apply", "--pid", &pid, "--interface", "eth1=backup", "--name", &name];
        let said = sandbox.run(&[&enter[..], &apply].concat());
        assert!(said.stderr.contains("the agent sees to it when it is there"), "{said}");
        said.ok();
    }
    let status = || {
        let json = sandbox.run(&[&enter[..], &[&program, "status", "--json"]].concat()).ok();
        serde_json::from_str::<Value>(&json).expect("the user's status")
    };
    wait_until("both are followed", LIMIT, || {
        status()["containers"].as_array().is_some_and(|all| all.len() == 2 && all.iter().all(|c| c["followed"] == true))
    });
    assert_eq!(agents(&sandbox).len(), 1);
    let owners = sandbox.sh(&format!("stat -c %u /run/user/{user}/mptcp-hook/agent.*"));
    assert_eq!(owners, user, "the user's own ledger has its name");
    assert!(!sandbox.outside(STATE_DIR).exists());
    for (pid, _) in &containers {
        let in_container = |command: &str| {
            let inside = ["nsenter", &format!("--net=/proc/{pid}/ns/net"), "sh", "-ec", command];
            sandbox.run(&[&enter[..], &inside].concat()).ok()
        };
        in_container("ip address add 10.0.2.2/24 dev eth1");
        wait_until("its endpoint", LIMIT, || {
            let shown = in_container("ip mptcp endpoint show");
            shown.contains("10.0.2.2") && shown.contains("backup") && shown.contains("eth1")
        });
        in_container("ip address del 10.0.2.2/24 dev eth1");
        wait_until("it goes", LIMIT, || in_container("ip mptcp endpoint show").is_empty());
    }
    // Their ends are seen, and the ledger says so.
    for (left, (pid, init)) in containers.into_iter().enumerate().rev() {
        signal(&sandbox, pid, Signal::SIGKILL);
        drop(init);
        wait_until("it is let go", LIMIT, || status()["containers"].as_array().map(Vec::len) == Some(left));
    }
    assert_eq!(status()["problems"], json!([]));
    assert_eq!(agents(&sandbox).len(), 1);
}

#[test]
fn status_is_shown_again_and_again_until_nobody_reads_it() {
    let sandbox = Sandbox::new();
    let container = wired(&sandbox, "web");
    container.oci(&BACKUP).ok();
    let mut command = sandbox.command_in(&Netns::Host, &[&hook().display().to_string(), "status", "--watch"]);
    let mut watch = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("starting status --watch");
    let mut lines = BufReader::new(watch.stdout.take().expect("stdout is a pipe")).lines();
    let mut next = |words: &str| {
        let begin = Instant::now();
        let found = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(words)));
        assert!(found.is_some() && begin.elapsed() < LIMIT, "status --watch did not say {words}");
    };
    next("pending");
    next("pending");
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    next("10.0.2.2 came");
    next("10.0.2.2 came");
    drop(lines);
    wait_until("the end of status --watch", LIMIT, || watch.try_wait().expect("waiting for it").is_some());
    let ended = watch.wait().expect("waiting for it");
    assert!(ended.success(), "{ended}");
    let refused = sandbox.hook(&["status", "--watch", "--json"]);
    assert_eq!(refused.code, Some(2), "{refused}");
}

/// What happens is in the journal, with the container's name.
#[test]
fn the_journal_says_what_happened_to_whom() {
    let sandbox = Sandbox::new();
    let journal = Journal::listen(&sandbox);
    let mut container = wired(&sandbox, "web");
    sandbox.sh("ip address add fd00:2::2/64 dev web1 nodad");
    container.oci(&["--interface", "eth1=backup", "--name", "the-shop"]).ok();
    agent(&sandbox);
    let mut said = Vec::new();
    let mut hear = |words: &str| {
        wait_until(words, LIMIT, || {
            said.extend(journal.entries());
            said.iter().any(|entry| entry.contains(words) && entry.contains("the-shop"))
        });
    };
    address(&sandbox, &container, "add 10.0.2.2/24 dev eth1");
    hear("eth1: 10.0.2.2 came (applied)");
    address(&sandbox, &container, "add fd00:2::2/64 dev eth1");
    hear("fd00:2::2 is a duplicate (DAD failed) and is not used");
    address(&sandbox, &container, "del 10.0.2.2/24 dev eth1");
    hear("eth1: 10.0.2.2 went");
    container.kill();
    hear("its init has ended: released");
}

/// With nothing to do it sleeps: nothing wakes it from time to time, nor does it wake itself.
#[test]
fn with_nothing_to_do_it_sleeps() {
    let sandbox = Sandbox::new();
    let first = wired_in(&sandbox, "first", "pod");
    let second = Bare::in_netns(&sandbox, "second", &Netns::named("pod"));
    let third = wired(&sandbox, "third");
    address(&sandbox, &first, "add 10.0.2.2/24 dev eth1");
    for container in [&first, &second, &third] {
        container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    }
    let pid = agent(&sandbox);
    for container in [&first, &second] {
        wait_until("it is followed", LIMIT, || is_followed(&sandbox, container));
    }
    let switches = || {
        let status = std::fs::read_to_string(sandbox.outside(&format!("/proc/{pid}/status"))).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.and_then(|count| count.trim().parse::<u64>().ok()).expect("a count of context switches")
    };
    // The settings are looked at twice: at once and after the runtime had its time.
    std::thread::sleep(Duration::from_millis(2500));
    let before = switches();
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(switches(), before, "the agent woke up");
}
