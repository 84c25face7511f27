//! The agent with real engines: what comes only after the hook is followed, crashed engines leave nothing behind, and
//! nobody waits for it. LXC containers get their addresses from a real DHCP server; podman's networks are attached late.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::*;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use serde_json::{Value, json};

/// From the address to the endpoint.
const LEASE_AIM: Duration = Duration::from_millis(100);

/// What a loaded machine may add to a time, and how long the observer itself needs to see an endpoint.
const ALLOWANCE: Duration = Duration::from_millis(100);

/// How often each engine is started with and without an agent.
const PAIRS: usize = 4;

/// Slow enough to last through a test, in bytes per second.
const SLOW: u64 = 1_000_000;

/// Our hook's arguments under LXC.
const LXC_BACKUP: &str = "--interface eth1=backup";

/// Like busybox's own example for udhcpc, with a metric for each interface. The way out comes before the address: live
/// connections open their subflows once, and the agent waits no longer than 50 ms for a way that would come after it.
const DHCP_SCRIPT: &str = r#"#!/bin/busybox sh
case $interface in eth0) metric=100 ;; *) metric=200 ;; esac
case $1 in
  deconfig) /bin/busybox ifconfig $interface 0.0.0.0 ;;
  bound | renew)
    /bin/busybox ip route replace default via $router dev $interface metric $metric onlink
    /bin/busybox ip address replace $ip/$mask dev $interface
    ;;
esac
"#;

/// A container's first process: a DHCP client for each interface, which asks until somebody answers.
const DHCP_INIT: &str = r#"#!/bin/busybox sh
for interface in eth0 eth1; do
  /bin/busybox udhcpc -b -t 1 -T 1 -A 1 -i $interface -s /dhcp -p /tmp/$interface.pid >/dev/null 2>&1
done
exec /bin/busybox sleep 100000
"#;

with_each_runtime! {
    agent_keeps_neither_runtime_nor_podman_waiting,
    agent_releases_what_a_crashed_runtime_left,
    agent_attaches_what_podman_attaches_late,
    agent_follows_podman_network_connect_and_disconnect,
    agent_releases_what_a_crashed_conmon_left,
    agent_of_a_rootless_podman,
}

// --- what is seen from outside --------------------------------------------------------------------------------------

/// The agent's pid in the sandbox, by its file in the state directory; none if none runs. That of a user namespace has
/// the namespace's number in the file's name.
fn agent_in(sandbox: &Sandbox, state_dir: &str) -> Option<u32> {
    std::fs::read_dir(sandbox.outside(state_dir)).ok()?.find_map(|entry| {
        let entry = entry.ok()?;
        let name = entry.file_name().into_string().ok()?;
        if name != "agent" && !name.starts_with("agent.") {
            return None;
        }
        let agent: Value = serde_json::from_str(&std::fs::read_to_string(entry.path()).ok()?).ok()?;
        let pid = u32::try_from(agent["pid"].as_u64()?).ok()?;
        sandbox.outside(&format!("/proc/{pid}/stat")).exists().then_some(pid)
    })
}

/// The agents of a sandbox that hooks have forked, also one that has just become another process and not said so yet.
fn forked_agents(sandbox: &Sandbox) -> Vec<u32> {
    let entries = std::fs::read_dir(sandbox.outside("/proc")).expect("the sandbox's /proc").filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let name = |pid: &u32| std::fs::read_to_string(sandbox.outside(&format!("/proc/{pid}/comm"))).unwrap_or_default();
    pids.filter(|pid| name(pid) == "mptcp-agent\n").collect()
}

/// root's agent.
fn agent_of(sandbox: &Sandbox) -> Option<u32> {
    agent_in(sandbox, "/run/mptcp-hook")
}

/// Waits until root's agent has come up.
#[track_caller]
fn wait_for_agent(sandbox: &Sandbox) -> u32 {
    wait_for("an agent", LIMIT, || agent_of(sandbox))
}

/// Ends root's agent, so that the next hook has to fork another.
#[track_caller]
fn end_agent(sandbox: &Sandbox) {
    wait_until("the agent's end", LIMIT, || {
        for pid in forked_agents(sandbox) {
            sandbox.sh(&format!("kill -9 {pid} || :"));
        }
        forked_agents(sandbox).is_empty() && agent_of(sandbox).is_none()
    });
}

/// The engine is done with the container, and `before`, the agent that its hook has started, goes on; as another process
/// perhaps.
#[track_caller]
fn assert_agent_lives_on(sandbox: &Sandbox, before: Option<u32>) {
    if before.is_some() {
        // Nobody would have started another.
        wait_for_agent(sandbox);
    } else {
        assert_eq!(agent_of(sandbox), None);
    }
}

/// The agent is out of the reach of whoever started it: a session of its own, nothing of theirs open, in none of the
/// cgroups that belong to the sandbox's containers, in no container's namespace.
#[track_caller]
fn assert_detached(sandbox: &Sandbox, agent: u32) {
    let proc = sandbox.outside(&format!("/proc/{agent}"));
    // The hook says who the agent is before it has come so far; its name is the last that it changes.
    wait_until("an agent that is itself", LIMIT, || forked_agents(sandbox).contains(&agent));
    let stat = std::fs::read_to_string(proc.join("stat")).expect("the agent lives");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a command's name").1.split_whitespace().collect();
    assert_eq!(fields[3], agent.to_string(), "not the leader of a session: {stat}");
    let descriptors: BTreeMap<u32, String> = std::fs::read_dir(proc.join("fd"))
        .expect("the agent's descriptors")
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let target = std::fs::read_link(entry.path()).ok()?;
            Some((entry.file_name().to_string_lossy().parse().ok()?, target.display().to_string()))
        })
        .collect();
    for standard in 0..3 {
        assert_eq!(descriptors.get(&standard).map(String::as_str), Some("/dev/null"), "{descriptors:#?}");
    }
    let foreign = descriptors.values().any(|target| target.starts_with("pipe:") || target.contains("/tmp/"));
    assert!(!foreign, "{descriptors:#?}");
    wait_until("the agent to leave the container's cgroup", LIMIT, || {
        let cgroups = std::fs::read_to_string(proc.join("cgroup")).expect("the agent's cgroups");
        ![sandbox.unique(), "libpod", "lxc."].iter().any(|name| cgroups.contains(name))
    });
    assert_eq!(std::fs::read_link(proc.join("cwd")).expect("its directory"), Path::new("/"));
    // It goes into a container's namespace for moments only.
    let home = std::fs::read_link(sandbox.netns_path(&Netns::Host)).expect("the sandbox's namespace");
    wait_until("the agent at home", LIMIT, || std::fs::read_link(proc.join("ns/net")).is_ok_and(|own| own == home));
}

/// Waits until the kernel has exactly one endpoint there, `address` on eth1 as a backup.
#[track_caller]
fn wait_for_backup(sandbox: &Sandbox, netns: &Netns, address: IpAddr) {
    wait_until(&format!("the endpoint {address}"), LIMIT, || {
        let endpoints = sandbox.endpoints(netns);
        endpoints.len() == 1 && endpoints[0].address == address
    });
    assert_only_endpoint(sandbox, netns, address, &["backup", "subflow"]);
}

/// Waits until eth1 of a container has `state` in root's ledger, and gives the entry.
#[track_caller]
fn wait_for_state(sandbox: &Sandbox, id: &str, state: &str) -> Value {
    wait_for(&format!("eth1 {state}"), LIMIT, || {
        let container = sandbox.status_of(id);
        let interfaces = container["interfaces"].as_array()?;
        interfaces.iter().find(|interface| interface["name"] == "eth1" && interface["state"] == state)?;
        Some(container)
    })
}

/// Waits until root's ledger knows no container and nobody is followed.
#[track_caller]
fn wait_until_released(sandbox: &Sandbox) {
    wait_until("the release of everything", LIMIT, || sandbox.status()["containers"] == json!([]));
    sandbox.assert_ledger_is_empty();
    assert_eq!(sandbox.sh("ls /run/mptcp-hook/follow"), "");
    wait_until_no_file_is_left(sandbox, "/run/mptcp-hook");
}

/// Waits until nothing but the agent's own files and what people may read later is in a state directory.
#[track_caller]
fn wait_until_no_file_is_left(sandbox: &Sandbox, state_dir: &str) {
    let find =
        format!("find {state_dir} -type f ! -name 'conflicts*' ! -name 'failures*' ! -name agent ! -name 'agent.*'");
    // The agent may still be looking at what a hook has just released.
    wait_for_or("no file left behind", LIMIT, || {
        let left = sandbox.sh(&find);
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// When addresses and endpoints of a namespace came, as the kernel tells an observer.
struct Observer {
    addresses: Arc<Mutex<Vec<(IpAddr, Instant)>>>,
    endpoints: Arc<Mutex<Vec<(IpAddr, Instant)>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Observer {
    fn start(sandbox: &Sandbox, netns: &Netns) -> Self {
        let addresses = Arc::new(Mutex::new(Vec::new()));
        let endpoints = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let path = sandbox.netns_path(netns);
        // setns concerns the thread only.
        let enter = move || {
            let namespace = File::open(&path).expect("opening a container's namespace");
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("entering a container's namespace");
        };
        let listener = {
            let (enter, addresses, stop) = (enter.clone(), Arc::clone(&addresses), Arc::clone(&stop));
            std::thread::spawn(move || {
                enter();
                listen(&addresses, &stop);
            })
        };
        let looker = {
            let (endpoints, stop) = (Arc::clone(&endpoints), Arc::clone(&stop));
            std::thread::spawn(move || {
                enter();
                look(&endpoints, &stop);
            })
        };
        Self { addresses, endpoints, stop, threads: vec![listener, looker] }
    }

    /// How long after the address the endpoint was seen.
    #[track_caller]
    fn delay(&self, address: IpAddr) -> Duration {
        let came = |list: &Mutex<Vec<(IpAddr, Instant)>>| {
            let list = list.lock().expect("no observer panics");
            list.iter().find(|(seen, _)| *seen == address).map(|(_, when)| *when)
        };
        let address = wait_for("the lease", LIMIT, || came(&self.addresses));
        let endpoint = wait_for("the endpoint", LIMIT, || came(&self.endpoints));
        endpoint.saturating_duration_since(address)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "an observer panicked");
        }
    }
}

/// RTM_NEWADDR of IPv4, with the moment of its arrival.
fn listen(addresses: &Mutex<Vec<(IpAddr, Instant)>>, stop: &AtomicBool) {
    const RTM_NEWADDR: u16 = 20;
    const RTMGRP_IPV4_IFADDR: u32 = 0x10;
    /// nlmsghdr and ifaddrmsg.
    const HEADERS: usize = 16 + 8;
    const IFA_LOCAL: u16 = 2;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
        .expect("a netlink socket");
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, RTMGRP_IPV4_IFADDR)).expect("listening for addresses");
    let u16_at = |bytes: &[u8], at: usize| bytes.get(at..at + 2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        if poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], 20_u16).unwrap_or(0) == 0 {
            continue;
        }
        let length = recv(socket.as_raw_fd(), &mut buffer, nix::sys::socket::MsgFlags::empty()).expect("a message");
        let (message, now) = (&buffer[..length], Instant::now());
        if u16_at(message, 4) != Some(RTM_NEWADDR) {
            continue;
        }
        let mut at = HEADERS;
        while let (Some(size @ 4..), Some(kind)) = (u16_at(message, at), u16_at(message, at + 2)) {
            if let (IFA_LOCAL, Some(&[a, b, c, d])) = (kind, message.get(at + 4..at + 8)) {
                addresses.lock().expect("nobody panics with it").push((Ipv4Addr::new(a, b, c, d).into(), now));
            }
            at += usize::from(size).next_multiple_of(4);
        }
    }
}

/// Asks for the endpoints again and again; the moment is that after the answer.
fn look(endpoints: &Mutex<Vec<(IpAddr, Instant)>>, stop: &AtomicBool) {
    let mut before = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let output = std::process::Command::new("ip").args(["mptcp", "endpoint", "show"]).output();
        let now = Instant::now();
        let text = String::from_utf8(output.expect("running ip").stdout).expect("ip prints text");
        let present: Vec<IpAddr> = text.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect();
        let new = present.iter().filter(|address| !before.contains(*address));
        endpoints.lock().expect("nobody panics with it").extend(new.map(|&address| (address, now)));
        before = present;
        std::thread::sleep(Duration::from_millis(2));
    }
}

// --- LXC ------------------------------------------------------------------------------------------------------------

impl Lxc<'_> {
    /// Both interfaces without an address, and a DHCP client for each. `host_end` is the name of eth1's other end.
    fn with_dhcp(self, host_end: &str) -> Self {
        let lines = |number| format!("hwaddr = {}", hardware_address(number));
        self.program("dhcp", DHCP_SCRIPT)
            .program("init", DHCP_INIT)
            .line("lxc.init.cmd = /init")
            .hook_version(1)
            .veth(0, &[&lines(0)])
            .veth(1, &[&lines(1), &format!("veth.pair = {host_end}")])
    }

    /// eth0 as it shall be, and eth1 without an address.
    fn with_pending_eth1(self) -> Self {
        self.hook_version(1).veth(0, &["ipv4.address = 10.0.1.2/24", "ipv4.gateway = 10.0.1.1"]).veth(1, &[])
    }

    /// Signals for eth1's DHCP client: USR1 renews, USR2 releases.
    #[track_caller]
    fn signal_client(&self, signals: &[&str]) {
        for signal in signals {
            self.sh(&format!("/bin/busybox kill -{signal} $(/bin/busybox cat /tmp/eth1.pid)"));
        }
    }
}

/// By which the DHCP server knows ethN.
fn hardware_address(number: u8) -> String {
    format!("02:00:00:00:00:1{number}")
}

/// A DHCP server on brN that gives the container's ethN the address 10.0.(N+1).`last` and nobody anything else.
struct Dhcp {
    _server: Running,
    address: IpAddr,
}

impl Dhcp {
    fn start(sandbox: &Sandbox, number: u8, last: u8) -> Self {
        require("dnsmasq", "dnsmasq-base");
        let net = format!("10.0.{}", number + 1);
        let arguments = [
            "--keep-in-foreground --log-facility=- --conf-file=/dev/null --user=root --port=0 --no-ping".to_owned(),
            format!("--pid-file= --bind-interfaces --except-interface=lo --interface=br{number}"),
            format!("--dhcp-authoritative --dhcp-range={net}.{last},{net}.{last},255.255.255.0,1h"),
            format!("--dhcp-host={},{net}.{last} --dhcp-option=3,{net}.1", hardware_address(number)),
            format!("--dhcp-leasefile=/run/leases-{number}-{last}"),
        ];
        let argv: Vec<_> = ["dnsmasq"].into_iter().chain(arguments.iter().flat_map(|a| a.split(' '))).collect();
        let mut server = sandbox.spawn(&argv);
        wait_until("a DHCP server", LIMIT, || {
            assert!(server.is_running(), "{}", server.stderr());
            server.stderr().contains("IP range")
        });
        Self { _server: server, address: IpAddr::from([10, 0, number + 1, last]) }
    }
}

/// Traffic keeps to the rule: a new connection joins from `source` with the backup bit, and next to nothing of its
/// payload goes over br1.
#[track_caller]
fn assert_backup_rule(container: &Lxc, paths: &TwoPaths, source: IpAddr) {
    let capture = Capture::start(container.sandbox, paths.server());
    assert!(container.send(paths.address(), 2_000_000, Some(SLOW)).finish(LIMIT).mptcp);
    let joins = || capture.joins().into_iter().filter(|join| join.interface == "br1").collect::<Vec<_>>();
    let joins = wait_for("a join over br1", LIMIT, || Some(joins()).filter(|joins| !joins.is_empty()));
    assert!(joins.iter().all(|join| join.backup && join.source == source), "{joins:?}");
    let (main, backup) = (capture.payload_received("br0"), capture.payload_received("br1"));
    assert!(backup * 20 < main, "payload over the backup path: {backup} bytes, over the other: {main}");
}

/// With no address in its configuration everything comes from DHCP: each lease of eth1 is a backup endpoint soon after
/// its address is there, and goes with it, while a connection over eth0 lives on.
#[test]
fn agent_makes_a_backup_endpoint_of_each_dhcp_lease() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let _server = Server::start(&sandbox, paths.server());
    let _first = Dhcp::start(&sandbox, 0, 10);
    let container = Lxc::new(&sandbox, "dhcp").with_dhcp(&sandbox.interface_name()).start_host(LXC_BACKUP).post_stop();
    container.start();
    let netns = container.netns();
    let agent = wait_for_agent(&sandbox);
    assert_detached(&sandbox, agent);
    assert_eq!(sandbox.endpoints(&netns), []);
    let in_status = wait_for_state(&sandbox, &container.name, "pending");
    assert_eq!(in_status["followed"], true);

    let observer = Observer::start(&sandbox, &netns);
    wait_until("eth0's lease", LIMIT, || sandbox.sh_in(&netns, "ip -4 route").contains("metric 100"));
    let capture = Capture::start(&sandbox, paths.server());
    let mut live = container.send(paths.address(), 600 * SLOW, Some(SLOW));
    live.wait_sent(SLOW / 10);
    // Load makes everything later and nothing sooner, so the best of several blocks counts.
    const BLOCK: usize = 7;
    const BLOCKS: usize = 3;
    let mut times = Vec::new();
    let mut joined = 0;
    let mut last = 50;
    loop {
        let dhcp = Dhcp::start(&sandbox, 1, last);
        match last {
            50 => {}
            // The server refuses to renew the old one: the client begins anew, without a word from anybody else.
            51 => container.signal_client(&["USR1"]),
            _ => container.signal_client(&["USR2", "USR1"]),
        }
        times.push(observer.delay(dhcp.address));
        wait_for_backup(&sandbox, &netns, dhcp.address);
        let eth1 = wait_for("the way out in status", LIMIT, || {
            let eth1 = eth1_of(&sandbox.status_of(&container.name), "applied");
            (eth1["route"] == "ok").then_some(eth1)
        });
        assert_eq!(eth1["endpoints"][0]["address"], json!(dhcp.address));
        assert!(eth1["last"]["what"].as_str().is_some_and(|what| what.contains(&dhcp.address.to_string())), "{eth1:#}");
        // The open connection learns it: no other reason for a new subflow is there.
        let begin = Instant::now();
        joined = loop {
            let joins: Vec<_> = capture.joins().into_iter().filter(|join| join.interface == "br1").collect();
            assert!(joins.iter().all(|join| join.backup), "{joins:?}");
            if joins.len() > joined && joins.iter().any(|join| join.source == dhcp.address) {
                break joins.len();
            }
            if begin.elapsed() > LIMIT {
                let seen = "ip mptcp endpoint show; ip route; ss -tn; nstat -az | grep MPJoinSynTx";
                panic!("no join from {}: {joins:?}\n{}", dhcp.address, sandbox.sh_in(&netns, seen));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        if times.len() % BLOCK == 0 {
            let median = median(times[times.len() - BLOCK..].to_vec());
            println!("from the address to the endpoint: {times:?}, median of the last {BLOCK} {median:?}");
            if median < LEASE_AIM + ALLOWANCE {
                break;
            }
            assert!(times.len() < BLOCKS * BLOCK, "{times:?}");
        }
        last += 1;
    }
    drop(observer);

    let (main, backup) = (capture.payload_received("br0"), capture.payload_received("br1"));
    assert!(main > SLOW && backup * 20 < main, "payload over the backup path: {backup} bytes, over the other: {main}");
    drop(live);
    drop(capture);
    assert_backup_rule(&container, &paths, IpAddr::from([10, 0, 2, last]));
    assert_eq!(agent_of(&sandbox), Some(agent), "it is still the same agent");

    container.stop();
    wait_until_released(&sandbox);
}

/// The address of a link that is down or without a carrier stays, and so does the endpoint.
#[test]
fn agent_keeps_the_endpoint_of_a_link_that_flaps() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let _server = Server::start(&sandbox, paths.server());
    let _dhcp = [Dhcp::start(&sandbox, 0, 10), Dhcp::start(&sandbox, 1, 20)];
    let host_end = sandbox.interface_name();
    let container = Lxc::new(&sandbox, "flap").with_dhcp(&host_end).start_host(LXC_BACKUP).post_stop();
    container.start();
    let netns = container.netns();
    let address = IpAddr::from([10, 0, 2, 20]);
    wait_until("the leases", LIMIT, || {
        let leased = |number: u8| {
            let last = 10 * (number + 1);
            let shown = sandbox.sh_in(&netns, &format!("ip -4 address show eth{number}"));
            shown.contains(&format!("10.0.{}.{last}/", number + 1))
        };
        leased(0) && leased(1)
    });
    wait_for_backup(&sandbox, &netns, address);
    let id = sandbox.endpoints(&netns)[0].id;
    assert_backup_rule(&container, &paths, address);

    // The kernel notices when it gets to it, and drops until then what is sent.
    let wait_for_carrier = || {
        sandbox.wait_up(&netns, &["eth1"]);
        sandbox.wait_up(&Netns::Host, &[&host_end]);
    };
    let eth1 = |what: &str| container.sh(&format!("/bin/busybox ip link set eth1 {what}"));
    let unchanged = |when: &str| {
        assert_only_endpoint(&sandbox, &netns, address, &["backup", "subflow"]);
        assert_eq!(sandbox.endpoints(&netns)[0].id, id, "another endpoint after {when}");
        eth1_of(&sandbox.status_of(&container.name), "applied");
    };
    for _ in 0..2 {
        eth1("down");
        assert!(sandbox.sh_in(&netns, "ip -4 address show eth1").contains("10.0.2.20"));
        unchanged("down");
        assert!(container.send(paths.address(), 1_000_000, Some(10 * SLOW)).finish(LIMIT).mptcp);
        eth1("up");
        wait_for_carrier();
        // The kernel has thrown the route away; the client brings it back.
        container.signal_client(&["USR1"]);
        wait_until("the default route", LIMIT, || {
            sandbox.sh_in(&netns, "ip -4 route show default").contains("metric 200")
        });
        unchanged("up");
        assert_backup_rule(&container, &paths, address);
    }
    for _ in 0..2 {
        sandbox.sh(&format!("ip link set {host_end} down"));
        wait_until("the loss of the carrier", LIMIT, || {
            sandbox.sh_in(&netns, "ip link show eth1").contains("NO-CARRIER")
        });
        unchanged("the loss of the carrier");
        sandbox.sh(&format!("ip link set {host_end} up"));
        wait_for_carrier();
        unchanged("the carrier came back");
        assert_backup_rule(&container, &paths, address);
    }
    // A name that goes takes the endpoint with it, and brings it when it comes back.
    sandbox.sh_in(&netns, "ip link set eth1 down; ip link set eth1 name other; ip link set other up");
    wait_until("no endpoint", LIMIT, || sandbox.endpoints(&netns).is_empty());
    wait_for_state(&sandbox, &container.name, "pending");
    sandbox.sh_in(&netns, "ip link set other down; ip link set other name eth1; ip link set eth1 up");
    wait_for_backup(&sandbox, &netns, address);
    container.stop();
    wait_until_released(&sandbox);
}

/// Nobody was left to run post-stop.
#[test]
fn agent_releases_what_a_crashed_lxc_left() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    for pending in [true, false] {
        let container = Lxc::new(&sandbox, &format!("crash-{pending}"));
        let container = container.with_pending_eth1().start_host(LXC_BACKUP).post_stop();
        container.start();
        if !pending {
            sandbox.sh_in(&container.netns(), "ip addr add 10.0.2.2/24 dev eth1");
            wait_for_backup(&sandbox, &container.netns(), IpAddr::from([10, 0, 2, 2]));
        }
        wait_for_agent(&sandbox);
        assert_eq!(sandbox.status_of(&container.name)["followed"], true);
        assert_eq!(sandbox.sh("ls /sys/class/net/br0/brif /sys/class/net/br1/brif").matches("veth").count(), 2);
        container.kill_at_once();
        let killed = Instant::now();
        wait_until("the end of the container's interfaces", LIMIT, || {
            sandbox.sh("ls /sys/class/net/br0/brif /sys/class/net/br1/brif").matches("veth").count() == 0
        });
        println!("the interfaces were gone {:?} after the kill", killed.elapsed());
        wait_until_released(&sandbox);
        assert!(!container.end_mark().exists(), "the post-stop hooks did run");
    }
}

/// Its init ends and another one comes at once, by the same name: the end of the one life and the start of the next do
/// not get in each other's way.
#[test]
fn agent_follows_an_lxc_container_through_its_reboots() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let _dhcp = [Dhcp::start(&sandbox, 0, 10), Dhcp::start(&sandbox, 1, 20)];
    let container = Lxc::new(&sandbox, "reboot");
    let container = container.with_dhcp(&sandbox.interface_name()).start_host(LXC_BACKUP).post_stop();
    container.start();
    let agent = wait_for_agent(&sandbox);
    let address = IpAddr::from([10, 0, 2, 20]);
    wait_for_backup(&sandbox, &container.netns(), address);
    for _ in 0..3 {
        let before = container.pid();
        // The program that asks for it ends with the container.
        let _ = container.attach(&["/bin/busybox", "reboot", "-f"]).wait(ENGINE_LIMIT);
        let netns = wait_for("the container after its reboot", ENGINE_LIMIT, || {
            let outcome = container.sandbox.run(&container.lxc("lxc-info", &["-H", "-p"]));
            outcome.stdout.trim().parse().ok().filter(|&pid: &u32| pid != before).map(Netns::Pid)
        });
        wait_until("the new lease", LIMIT, || sandbox.sh_in(&netns, "ip -4 address").contains("10.0.2.20"));
        wait_for_backup(&sandbox, &netns, address);
        let in_status = wait_for_state(&sandbox, &container.name, "applied");
        assert_eq!((&in_status["followed"], &in_status["pid"]), (&json!(true), &json!(container.pid())));
    }
    assert_eq!(agent_of(&sandbox), Some(agent), "it is still the same agent");
    // The hooks of a reboot have left this mark, too.
    let _ = std::fs::remove_file(container.end_mark());
    container.stop();
    wait_until_released(&sandbox);
}

/// lxc-start waits for everybody who has a descriptor of its hooks' output.
#[test]
fn agent_keeps_lxc_start_not_waiting() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let mut table = Table::default();
    for pair in 0..PAIRS {
        for follow in in_turn(pair) {
            let container = Lxc::new(&sandbox, &format!("{follow}{pair}"));
            let container =
                container.with_pending_eth1().start_host(&format!("{LXC_BACKUP} --follow {follow}")).post_stop();
            end_agent(&sandbox);
            table.add("lxc-start", follow, container.start());
            let agent = agent_after(&sandbox, follow);
            let begin = Instant::now();
            container.stop();
            table.add("lxc-stop", follow, begin.elapsed());
            assert_agent_lives_on(&sandbox, agent);
            wait_until_released(&sandbox);
        }
    }
    table.print();
}

/// Each comes first in every other pair.
fn in_turn(pair: usize) -> [&'static str; 2] {
    if pair % 2 == 0 { ["auto", "never"] } else { ["never", "auto"] }
}

/// Times of engines with and without an agent to start.
#[derive(Default)]
struct Table(BTreeMap<String, BTreeMap<String, Vec<Duration>>>);

impl Table {
    fn add(&mut self, what: &str, follow: &str, time: Duration) {
        self.0.entry(what.to_owned()).or_default().entry(follow.to_owned()).or_default().push(time);
    }

    fn print(self) {
        for (what, columns) in self.0 {
            for (follow, times) in columns {
                println!("{what}, follow={follow}: median {:?} of {times:?}", median(times.clone()));
            }
        }
    }
}

/// The agent that an engine's start has left, detached; none with `never`.
#[track_caller]
fn agent_after(sandbox: &Sandbox, follow: &str) -> Option<u32> {
    if follow == "never" {
        assert_eq!(agent_of(sandbox), None);
        return None;
    }
    let agent = wait_for_agent(sandbox);
    assert_detached(sandbox, agent);
    Some(agent)
}

// --- OCI runtimes and podman ----------------------------------------------------------------------------------------

/// The engines return, stop and remove while the agent lives on, and it is in nobody's cgroup.
fn agent_keeps_neither_runtime_nor_podman_waiting(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::at_host(&sandbox);
    let podman = Podman::new(&sandbox, runtime);
    let program = runtime.program();
    let mut table = Table::default();
    let cgroup_left = |id: &str| sandbox.sh(&format!("find /sys/fs/cgroup -type d -path '*{id}*' 2>/dev/null || true"));
    for pair in 0..PAIRS {
        for follow in in_turn(pair) {
            for verb in ["create", "run"] {
                end_agent(&sandbox);
                let bundle = Bundle::new(&sandbox, &format!("{verb}{follow}{pair}"))
                    .annotation("mptcp-hook/interface.eth1", "backup")
                    .annotation("mptcp-hook/follow", follow)
                    .mptcp_hook(Stage::CreateRuntime);
                let container = bundle.write(runtime);
                let directory = container.bundle().display().to_string();
                let begin = Instant::now();
                if verb == "run" {
                    container.runtime(&["run", "--detach", "--bundle", &directory, container.id()]).ok();
                } else {
                    container.create().unwrap_or_else(|message| panic!("{program} {verb}: {message}"));
                }
                table.add(&format!("{program} {verb}"), follow, begin.elapsed());
                let agent = agent_after(&sandbox, follow);
                assert_eq!(sandbox.status_of(container.id())["followed"], follow == "auto");
                container.delete();
                assert_agent_lives_on(&sandbox, agent);
                assert_eq!(cgroup_left(container.id()), "");
                wait_until_released(&sandbox);
            }

            end_agent(&sandbox);
            let follow_option = format!("--annotation=mptcp-hook/follow={follow}");
            let begin = Instant::now();
            let web = podman.start("web", &[NETWORKS[0], BACKUP, &follow_option]);
            table.add(&format!("podman run with {program}"), follow, begin.elapsed());
            let agent = agent_after(&sandbox, follow);
            assert_eq!(sandbox.status_of(web.id())["followed"], follow == "auto");
            let begin = Instant::now();
            podman.podman(&["stop", "--time=0", "web"]).ok();
            table.add(&format!("podman stop with {program}"), follow, begin.elapsed());
            let begin = Instant::now();
            web.remove();
            table.add(&format!("podman rm with {program}"), follow, begin.elapsed());
            assert_agent_lives_on(&sandbox, agent);
            assert_eq!(cgroup_left(web.id()), "");
            // It waits for whatever has become a child of its own.
            wait_until("conmon's end", LIMIT, || sandbox.run(&["pgrep", "-x", "conmon"]).code == Some(1));
            wait_until_released(&sandbox);
        }
    }
    table.print();
}

/// The runtime never comes back: no poststop.
fn agent_releases_what_a_crashed_runtime_left(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::new(&sandbox);
    let wiring = Wiring::new();
    let container = Bundle::new(&sandbox, "crash")
        .annotation("mptcp-hook/interface.eth1", "backup")
        .annotation("mptcp-hook/follow", "always")
        .hook(Stage::CreateRuntime, paths.joining_hook(&wiring))
        .mptcp_hook(Stage::CreateRuntime)
        .start(runtime);
    wait_for_agent(&sandbox);
    let netns = container.netns();
    wait_for_backup(&sandbox, &netns, IpAddr::from([10, 0, 2, 2]));
    assert_eq!(sandbox.status_of(container.id())["followed"], true);
    let ends = || sandbox.sh_in(paths.server(), "ip -o link show").matches("eth").count();
    let before = ends();
    let pid = container.pid();
    sandbox.sh(&format!("kill -9 {pid}"));
    let killed = Instant::now();
    wait_until("the end of the container's interfaces", LIMIT, || ends() < before);
    println!("the interfaces were gone {:?} after the kill", killed.elapsed());
    wait_until_released(&sandbox);
    // What the runtime itself has kept of it is all that is left, and its poststop has nothing to do.
    container.delete();
    wait_until_released(&sandbox);
}

/// With a user namespace of its own a container of podman 4.3's gets its networks only after the hooks: that with
/// explicit mappings, and that of `--userns=auto`.
fn agent_attaches_what_podman_attaches_late(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::at_host(&sandbox);
    let podman = Podman::new(&sandbox, runtime);
    let server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    // Where the ids of `auto` come from.
    sandbox.sh("for file in /etc/subuid /etc/subgid; do echo containers:200000:65536 >>$file; done");
    // podman 4.3 maps the ids of `auto` for images only, and crun cannot make mount points where it has other ids.
    let rootfs = oci::root_filesystem(&sandbox);
    sandbox.sh(&format!(
        "cd {}; mkdir -p etc run dev/pts; touch etc/hosts etc/hostname etc/resolv.conf run/.containerenv
         tar -c . | podman import --quiet - localhost/busybox
         chown -R 200000:200000 .",
        rootfs.display()
    ));
    let mapping = ["--uidmap=0:200000:65536", "--gidmap=0:200000:65536"];
    let modes = [(None, &mapping[..]), (Some("localhost/busybox"), &["--userns=auto:size=65536"])];
    for (number, (image, mode)) in modes.into_iter().enumerate() {
        let name = format!("late{number}");
        let container = podman.start_from(image, &name, &[&NETWORKS[..], &[BACKUP], mode].concat());
        let netns = container.netns();
        let mapped = sandbox.sh(&format!("cat {}", netns.path().replace("ns/net", "uid_map")));
        assert!(mapped.contains("200000"), "no user namespace of its own: {mapped}");
        wait_for_backup(&sandbox, &netns, container.eth1_address());
        let in_status = wait_for_state(&sandbox, container.id(), "applied");
        assert_eq!(in_status["followed"], true, "it was not late: {in_status:#}");
        let (joins, received) = (capture.joins().len(), server.received().len());
        assert!(container.send(paths.address(), 5_000_000, 5_000_000).finish(LIMIT).mptcp);
        assert_eq!(server.wait_received(received + 1).len(), received + 1);
        let of_this = || capture.joins().into_iter().skip(joins).find(|join| join.interface == "br1");
        assert!(wait_for("a join over br1", LIMIT, of_this).backup);
        // Its next life has other namespaces and other addresses.
        podman.podman(&["restart", "--time=0", &name]).ok();
        wait_for_backup(&sandbox, &container.netns(), container.eth1_address());
        assert_eq!(wait_for_state(&sandbox, container.id(), "applied")["followed"], true);
        // Not `rm`: of a container with `auto` podman 4.3 often takes /dev/shm for unmounted already, and then now and
        // then fails to remove the mount point (EBUSY), without any hook as well.
        podman.podman(&["stop", "--time=0", &name]).ok();
        wait_until_released(&sandbox);
    }
}

/// No hook runs for either.
fn agent_follows_podman_network_connect_and_disconnect(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::at_host(&sandbox);
    let podman = Podman::new(&sandbox, runtime);
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let web = podman.start("web", &[NETWORKS[0], BACKUP]);
    let netns = web.netns();
    assert_eq!(sandbox.endpoints(&netns), []);
    wait_for_state(&sandbox, web.id(), "pending");
    let agent = wait_for_agent(&sandbox);
    let mut live = web.send(paths.address(), 600 * SLOW, SLOW);
    live.wait_sent(SLOW / 10);
    for round in 1..=2 {
        // The way out comes after the address, and the agent waits for it no longer than 50 ms: that it is there in time
        // is seen to.
        sandbox.sh(&format!("kill -STOP {agent}"));
        podman.podman(&["network", "connect", "net1", "web"]).ok();
        sandbox.sh(&format!("kill -CONT {agent}"));
        let address = web.eth1_address();
        wait_for_backup(&sandbox, &netns, address);
        wait_for_state(&sandbox, web.id(), "applied");
        // The open connection of eth0 joins over it.
        let joins = || capture.joins().into_iter().filter(|j| j.interface == "br1").collect::<Vec<_>>();
        let joins = wait_for("a join over br1", LIMIT, || Some(joins()).filter(|joins| joins.len() >= round));
        assert!(joins.iter().all(|join| join.backup), "{joins:?}");

        podman.podman(&["network", "disconnect", "net1", "web"]).ok();
        wait_until("no endpoint", LIMIT, || sandbox.endpoints(&netns).is_empty());
        wait_for_state(&sandbox, web.id(), "pending");
    }
    drop(live);
    let (main, backup) = (capture.payload_received("br0"), capture.payload_received("br1"));
    assert!(backup * 20 < main, "payload over the backup path: {backup} bytes, over the other: {main}");
    web.remove();
    wait_until_released(&sandbox);
}

/// conmon would have started the clean-up.
fn agent_releases_what_a_crashed_conmon_left(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let _paths = TwoPaths::at_host(&sandbox);
    let podman = Podman::new(&sandbox, runtime);
    let web = podman.start_on_both("web", &[BACKUP, "--annotation=mptcp-hook/follow=always"]);
    wait_for_backup(&sandbox, &web.netns(), web.eth1_address());
    let agent = wait_for_agent(&sandbox);
    assert_eq!(sandbox.status_of(web.id())["followed"], true);
    let pids = podman.inspect("web", "{{.State.ConmonPid}} {{.State.Pid}}");
    sandbox.sh(&format!("kill -9 {pids}"));
    wait_until_released(&sandbox);
    assert_agent_lives_on(&sandbox, Some(agent));
    // podman tidies up after itself, and its poststop has nothing to do.
    web.remove();
    wait_until_released(&sandbox);
}

// --- without root ---------------------------------------------------------------------------------------------------

/// Waits until the user's ledger holds nothing any more.
#[track_caller]
fn wait_until_user_is_released(sandbox: &Sandbox) {
    wait_until_no_file_is_left(sandbox, &user::state_directory());
}

/// The agent is uid 0 of podman's user namespace and keeps to the user's own state directory.
fn agent_of_a_rootless_podman(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let paths = TwoPaths::new(&sandbox);
    // A network namespace of the user's, joined to the two paths; eth1 has lost its address.
    let rootless = Rootless::new(&paths, &sandbox, runtime);
    let ctr = Netns::named("ctr");
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    for crashes in [false, true] {
        sandbox.sh_in(&ctr, "ip address flush dev eth1");
        let outcome = rootless.start("web", &[BACKUP]);
        assert_eq!(outcome.code, Some(0), "{outcome}\n{}", rootless.messages("web"));
        assert_eq!(sandbox.endpoints(&ctr), []);
        let container = rootless.status()["containers"][0].clone();
        eth1_of(&container, "pending");
        assert_eq!(container["followed"], true, "{container:#}\n{}", rootless.messages("web"));
        let agent = wait_for("the user's agent", LIMIT, || agent_in(&sandbox, &user::state_directory()));
        let uid = sandbox.sh(&format!("stat -c %u /proc/{agent}; stat -c '%u %a' {}", user::state_directory()));
        assert_eq!(uid, format!("{0}\n{0} 700", user::UID));
        assert!(!sandbox.outside("/run/mptcp-hook").exists(), "it wrote to root's ledger");

        sandbox.sh_in(&ctr, "ip addr add 10.0.2.2/24 dev eth1; ip route add default via 10.0.2.1 dev eth1 metric 200");
        wait_for_backup(&sandbox, &ctr, IpAddr::from([10, 0, 2, 2]));
        let joins = capture.joins().len();
        assert!(rootless.send("web", paths.address(), 3_000_000, SLOW).finish(LIMIT).mptcp);
        let join = wait_for("a join", LIMIT, || capture.joins().get(joins).cloned());
        assert_eq!((join.interface.as_str(), join.backup), ("eth1", true));

        sandbox.sh_in(&ctr, "ip address del 10.0.2.2/24 dev eth1");
        wait_until("no endpoint", LIMIT, || sandbox.endpoints(&ctr).is_empty());
        sandbox.sh_in(&ctr, "ip addr add 10.0.2.3/24 dev eth1");
        wait_for_backup(&sandbox, &ctr, IpAddr::from([10, 0, 2, 3]));
        if crashes {
            let pids =
                rootless.run(&["podman", "inspect", "--format", "{{.State.ConmonPid}} {{.State.Pid}}", "web"]).ok();
            sandbox.sh(&format!("kill -9 {pids}"));
            wait_until_user_is_released(&sandbox);
        }
        rootless.remove("web");
        wait_until_user_is_released(&sandbox);
        assert_eq!(sandbox.endpoints(&ctr), []);
        // Nobody would have started another.
        wait_for("the user's agent, still", LIMIT, || agent_in(&sandbox, &user::state_directory()));
    }
}

/// Each hook starts what its container needs.
#[test]
fn agent_of_an_unprivileged_user_of_lxc() {
    follow_containers_of_an_unprivileged_user(false);
}

/// As a unit of the user's own systemd would start it, for all containers.
#[test]
fn agent_started_by_an_unprivileged_user_of_lxc() {
    follow_containers_of_an_unprivileged_user(true);
}

/// Each container of an unprivileged user of LXC is followed, and nobody keeps a dead one's namespace. `by_hand`: the
/// agent runs before any of them.
fn follow_containers_of_an_unprivileged_user(by_hand: bool) {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let _server = Server::start(&sandbox, paths.server());
    let make = |what: &str, last: u8| {
        let static_eth0 = [format!("ipv4.address = 10.0.1.{last}/24"), "ipv4.gateway = 10.0.1.1".to_owned()];
        let container = Lxc::started_by(&sandbox, what, Starter::User)
            .hook_version(1)
            .veth(0, &static_eth0.each_ref().map(String::as_str))
            .veth(1, &[]);
        container.start_host(LXC_BACKUP).post_stop()
    };
    let give = |container: &Lxc, last: u8| {
        let netns = container.netns();
        let user = format!("nsenter --target {} --user --net ip", container.pid());
        sandbox.sh(&format!(
            "{user} address add 10.0.2.{last}/24 dev eth1; {user} route replace default via 10.0.2.1 dev eth1 metric 200"
        ));
        wait_for_backup(&sandbox, &netns, IpAddr::from([10, 0, 2, last]));
    };
    let veths = || sandbox.sh("ls /sys/class/net/br0/brif /sys/class/net/br1/brif").matches("veth").count();

    let (first, second) = (make("first", 2), make("second", 3));
    let program = readable_hook(&sandbox).display().to_string();
    let mut agent = by_hand.then(|| sandbox.spawn(&user::command(Path::new("/"), &[&program, "agent"])));
    if by_hand {
        wait_for("the user's agent", LIMIT, || agent_in(&sandbox, &user::state_directory()));
    }
    for container in [&first, &second] {
        container.start();
        let in_status = container.in_status();
        eth1_of(&in_status, "pending");
        assert_eq!(in_status["followed"], true, "{in_status:#}\n{}", container.log());
    }
    assert!(!sandbox.outside("/run/mptcp-hook").exists(), "it wrote to root's ledger");
    give(&first, 2);
    assert_backup_rule(&first, &paths, IpAddr::from([10, 0, 2, 2]));
    give(&second, 3);
    assert_backup_rule(&second, &paths, IpAddr::from([10, 0, 2, 3]));
    for container in [&first, &second] {
        wait_until("the way out in status", LIMIT, || eth1_of(&container.in_status(), "applied")["route"] == "ok");
        assert_eq!(container.in_status()["followed"], true);
    }

    // The first is gone with everything of it, whoever has begun to follow with it.
    assert_eq!(veths(), 4);
    first.kill_at_once();
    wait_until("the end of the first one's interfaces", LIMIT, || veths() == 2);
    wait_until("the release of the first one", LIMIT, || {
        first.status()["containers"].as_array().is_some_and(|containers| containers.len() == 1)
    });
    let user = format!("nsenter --target {} --user --net ip", second.pid());
    sandbox.sh(&format!("{user} address del 10.0.2.3/24 dev eth1"));
    wait_until("no endpoint", LIMIT, || sandbox.endpoints(&second.netns()).is_empty());
    give(&second, 4);
    // Started again it is another container, and followed anew.
    first.start();
    give(&first, 5);
    for container in [&first, &second] {
        container.stop();
    }
    wait_until("the end of all interfaces", LIMIT, || veths() == 0);
    wait_until_user_is_released(&sandbox);
    if let Some(agent) = &mut agent {
        assert!(agent.is_running(), "{}", agent.stderr());
    }
}
