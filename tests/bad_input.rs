//! Bad input gets a clear error of one line, and nothing is changed: not by a broken state, a hostile annotation, a wrong
//! flag, a policy or state directory that others could have written, nor by a kernel that says no.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use common::expectations::Running;
use common::*;
use serde_json::{Value, json};

/// A container on two paths, and what it looks like before anything is asked for.
struct World<'a> {
    sandbox: &'a Sandbox,
    container: Bare<'a>,
    before: String,
}

impl<'a> World<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        let _paths = TwoPaths::with_container_netns(sandbox, &Wiring::new());
        let container = Bare::in_netns(sandbox, "web", &Netns::named("ctr"));
        let mut world = Self { sandbox, container, before: String::new() };
        world.remember();
        world
    }

    /// What the kernel and the ledger have, in the container's namespace and in the host's.
    fn observe(&self) -> String {
        let script = "ip mptcp endpoint show; ip mptcp limits show; grep -r '' /proc/sys/net/mptcp /proc/sys/net/core
                      cat /proc/sys/net/ipv4/tcp_rmem /proc/sys/net/ipv4/tcp_ecn; ip -o link show";
        let kernel = [self.container.netns(), Netns::Host].map(|netns| self.sandbox.sh_in(&netns, script));
        // Not by the hook: its policy or state directory may be the bad input.
        let ledger = self.sandbox.sh("for part in containers settings namespaces; do
               [ ! -d /run/mptcp-hook/$part ] || grep -r '' /run/mptcp-hook/$part || :
             done");
        format!("{}\n{}\n{ledger}", kernel[0], kernel[1])
    }

    /// From now on this is what must not change.
    fn remember(&mut self) {
        self.before = self.observe();
    }

    /// The hook failed with `code` and one line that has all `parts`, and nothing was changed.
    #[track_caller]
    fn assert_failed(&self, outcome: &Outcome, code: i32, parts: &[&str]) {
        assert_eq!(outcome.code, Some(code), "{outcome}");
        assert_eq!(outcome.stdout, "", "{outcome}");
        assert_eq!(outcome.stderr.lines().count(), 1, "not one line: {outcome}");
        assert!(outcome.stderr.starts_with("mptcp-hook: ") && outcome.stderr.ends_with('\n'), "{outcome}");
        assert!(outcome.stderr.len() < 1500, "nobody reads that much: {outcome}");
        for part in parts {
            assert!(outcome.stderr.contains(part), "`{part}` is not in: {outcome}");
        }
        let now = self.observe();
        let only = |a: &str, b: &str| -> Vec<String> {
            a.lines().filter(|line| !b.lines().any(|other| other == *line)).map(str::to_owned).collect()
        };
        let (gone, new) = (only(&self.before, &now), only(&now, &self.before));
        assert!(now == self.before, "gone: {gone:#?}\nnew: {new:#?}\nby {outcome}");
    }

    /// The container's hook with a state of which `change` has made something else.
    #[track_caller]
    fn state_fails(&self, change: impl FnOnce(&mut Value), code: i32, parts: &[&str]) {
        let mut state = self.container.state();
        state["annotations"] = json!({ "mptcp-hook/interface.eth1": "backup" });
        change(&mut state);
        let outcome = self.sandbox.hook_with_input(&["oci"], state.to_string().as_bytes());
        self.assert_failed(&outcome, code, parts);
    }

    /// A wish by annotation fails, and the line names container and annotation.
    #[track_caller]
    fn annotation_fails(&self, key: &str, value: &str, code: i32, parts: &[&str]) {
        let mut all = vec![self.container.id()];
        all.extend(parts);
        self.state_fails(|state| state["annotations"][key] = json!(value), code, &all);
    }

    /// The same flags on a hook's line and by hand.
    #[track_caller]
    fn flags_fail(&self, flags: &[&str], code: i32, parts: &[&str]) {
        self.assert_failed(&self.container.oci(flags), code, parts);
        let pid = self.container.pid().to_string();
        let arguments = [&["apply", "--pid", pid.as_str()], flags].concat();
        self.assert_failed(&self.sandbox.hook(&arguments), code, parts);
    }
}

// --- the state on standard input ------------------------------------------------------------------------------------

#[test]
fn a_state_that_is_none() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let whole = world.container.state().to_string();
    let large = format!("{whole}{}", " ".repeat(2 * 1024 * 1024));
    let nested = "[".repeat(200_000);
    let cases: [(&str, &str); 12] = [
        ("", "empty"),
        ("  \n\t", "empty"),
        (&whole[..whole.len() / 2], "runtime-spec"),
        (&whole[..whole.len() - 1], "runtime-spec"),
        ("{}", "has no "),
        ("[]", "standard input"),
        ("null", "standard input"),
        ("5", "standard input"),
        ("\u{0}\u{1}\u{2}", "standard input"),
        (&nested, "standard input"),
        (&large, "larger than 1048576"),
        ("{\"id\":\"a\",\"id\":\"b\"}", "standard input"),
    ];
    for (text, says) in cases {
        let outcome = sandbox.hook_with_input(&["oci", "--interface", "eth1=backup"], text.as_bytes());
        world.assert_failed(&outcome, 2, &[says]);
    }
    let not_utf8 = sandbox.hook_with_input(&["oci"], b"{\"id\":\"\xff\xfe\"}");
    world.assert_failed(&not_utf8, 2, &["standard input"]);
}

#[test]
fn a_state_that_lacks_something_or_has_it_wrong() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let id = world.container.id();
    world.state_fails(|s| s["pid"] = json!(0), 2, &[id, "pid is 0", "createRuntime"]);
    world.state_fails(|s| s["pid"] = json!(-7), 2, &[id, "pid is -7"]);
    world.state_fails(|s| s["pid"] = json!(1u64 << 40), 2, &["standard input"]);
    world.state_fails(|s| s["pid"] = json!("12"), 2, &["standard input"]);
    for (name, says) in [("pid", "pid"), ("id", "id"), ("bundle", "bundle"), ("status", "status")] {
        let remove =
            |s: &mut Value| s.as_object_mut().expect("an object").remove(name).map(drop).expect("it was there");
        world.state_fails(remove, 2, &[says]);
    }
    world.state_fails(|s| s["status"] = json!("dancing"), 2, &["standard input", "dancing"]);
    world.state_fails(|s| s["annotations"]["mptcp-hook/interface.eth1"] = json!(5), 2, &["standard input"]);
}

#[test]
fn hostile_ids() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let long = "x".repeat(4096);
    for id in [
        "../../etc/cron.d/x",
        "a/b",
        "/",
        "..",
        ".",
        "a\nb",
        "two\nlines\n",
        "a b",
        "a\u{0}b",
        "a\u{1b}[2Jb",
        "\u{202e}gpj",
        &long,
    ] {
        world.state_fails(|s| s["id"] = json!(id), 2, &["id"]);
    }
    // The same names by other doors.
    for name in ["../x", "a\nb", "a/b", &long] {
        world.assert_failed(&sandbox.hook(&["apply", name, "--interface", "eth1=backup"]), 2, &["ledger knows no"]);
        world.assert_failed(&sandbox.hook(&["release", name]), 2, &["ledger knows no"]);
        world.assert_failed(&sandbox.hook(&["status", name]), 2, &["ledger knows no"]);
        world.flags_fail(&["--name", name, "--interface", "eth1=backup"], 2, &["--name"]);
        world.annotation_fails("mptcp-hook/name", name, 2, &["mptcp-hook/name"]);
    }
}

#[test]
fn a_process_that_is_dead() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    // The shell becomes a program that never waits for its child.
    let parent = sandbox.spawn(&["sh", "-c", "/bin/sh -c 'echo $$' & exec sleep 1000"]);
    let zombie = wait_for("a zombie", LIMIT, || {
        let pid: u32 = parent.stdout().trim().parse().ok()?;
        let stat = std::fs::read_to_string(sandbox.outside(&format!("/proc/{pid}/stat"))).ok()?;
        stat.contains(") Z ").then_some(pid)
    });
    let id = world.container.id().to_owned();
    world.state_fails(|s| s["pid"] = json!(zombie), 1, &[&id, &zombie.to_string(), "dead"]);
    let by_hand = sandbox.hook(&["apply", "--pid", &zombie.to_string(), "--interface", "eth1=backup"]);
    world.assert_failed(&by_hand, 1, &[&zombie.to_string(), "dead"]);

    let mut gone = Bare::new(&sandbox, "gone");
    gone.kill();
    world.remember();
    let pid = gone.pid().to_string();
    world.state_fails(|s| s["pid"] = json!(gone.pid()), 1, &[&id, "no process", &pid]);
    let by_hand = sandbox.hook(&["apply", "--pid", &pid, "--interface", "eth1=backup"]);
    world.assert_failed(&by_hand, 1, &["no process", &pid]);
    world.assert_failed(&sandbox.hook(&["release", "--pid", &pid]), 1, &["no process", &pid]);
}

/// A new process with the pid of a container's dead one: it is not taken for the container, and keeps what it has.
#[test]
fn a_recycled_pid_is_another_process() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.container.oci(&["--interface", "eth1=backup", "--sysctl", "stale_loss_cnt=9"]).ok();
    let pid = world.container.pid();
    let id = world.container.id().to_owned();
    world.container.kill();
    let paths = TwoPaths::at_host(&sandbox);
    drop(paths);
    // The other namespace has the very same address and endpoint, by somebody else's hand.
    sandbox.sh("ip netns add other
         ip -n other link set lo up
         ip -n other link add eth1 type veth peer name far
         ip -n other addr add 10.0.2.2/24 dev eth1
         ip -n other link set eth1 up
         ip -n other link set far up
         ip -n other mptcp endpoint add 10.0.2.2 id 1 dev eth1 subflow backup
         ip netns exec other sh -c 'echo 9 >/proc/sys/net/mptcp/stale_loss_cnt'");
    // What is compared has the links' states.
    sandbox.wait_up(&Netns::named("other"), &["eth1", "far"]);
    // Others start processes, too, and may be given the pid first.
    let script = format!(
        "got=
         until [ \"$got\" = {pid} ]; do
           [ -z \"$got\" ] || kill \"$got\"
           echo {} >/proc/sys/kernel/ns_last_pid
           exec nsenter --net=/run/netns/other sleep 1000 &
           got=$!
         done
         there=$(stat -L -c %i /run/netns/other)
         until [ \"$(stat -L -c %i /proc/{pid}/ns/net)\" = \"$there\" ]; do sleep 0.02; done
         echo ready; wait",
        pid - 1
    );
    let other = sandbox.spawn(&["sh", "-ec", &script]);
    wait_until("a process with the old pid", LIMIT, || other.stdout().contains("ready"));
    let theirs = || {
        let netns = Netns::named("other");
        (sandbox.endpoints(&netns), sandbox.sysctl(&netns, "net/mptcp/stale_loss_cnt"))
    };
    let before = theirs();
    assert_eq!(before.0.len(), 1);
    world.remember();

    assert_eq!(sandbox.status_of(&id)["live"], false);
    let by_hand = sandbox.hook(&["apply", &id, "--interface", "eth1=subflow"]);
    world.assert_failed(&by_hand, 1, &[&id, &pid.to_string(), "not running"]);
    assert_eq!(theirs(), before);
    let by_pid = sandbox.hook(&["release", "--pid", &pid.to_string()]);
    world.assert_failed(&by_pid, 1, &[&pid.to_string()]);

    world.container.poststop().ok();
    assert_eq!(theirs(), before);
    sandbox.assert_ledger_is_empty();
}

#[test]
fn the_hosts_own_namespace() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let host = Bare::in_netns(&sandbox, "hostnet", &Netns::Host);
    world.assert_failed(&host.oci(&["--interface", "eth1=backup"]), 3, &[host.id(), "host", "host-namespace"]);
    world.assert_failed(&host.oci(&["--limit", "subflows=8"]), 3, &[host.id(), "host"]);
    let by_hand = sandbox.hook(&["apply", "--pid", &host.pid().to_string(), "--limit", "subflows=8"]);
    world.assert_failed(&by_hand, 3, &["host"]);
    sandbox.sh("touch /run/netns/here; mount --bind /proc/self/ns/net /run/netns/here");
    let by_path = sandbox.hook(&["apply", "--netns", "/run/netns/here", "--limit", "subflows=8"]);
    world.assert_failed(&by_path, 3, &["host"]);
}

#[test]
fn a_namespace_path_that_is_none() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    sandbox.sh("mkfifo /run/fifo; echo x >/run/plain; ln -s /proc/1/ns/mnt /run/mnt");
    for (path, says) in [
        ("/run/netns/none", "/run/netns/none"),
        ("/run/fifo", "namespace"),
        ("/run/plain", "namespace"),
        ("/run", "namespace"),
        ("/proc/1/ns/pid", "namespace"),
        ("/dev/null", "namespace"),
    ] {
        let outcome = sandbox.hook(&["apply", "--netns", path, "--interface", "eth1=backup"]);
        world.assert_failed(&outcome, 1, &[says]);
    }
}

/// A runtime that does not close its end must not hang the container's start for ever.
#[test]
fn standard_input_that_never_ends_is_given_up() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    // Open for reading and writing, the fifo never ends.
    let script = format!("mkfifo /run/fifo; exec {} oci --interface eth1=backup <>/run/fifo", hook().display());
    let start = Instant::now();
    let outcome = sandbox.spawn(&["sh", "-c", &script]).wait(LIMIT);
    assert!(start.elapsed() > Duration::from_secs(1), "it did not wait at all");
    world.assert_failed(&outcome, 1, &["standard input was not closed in time"]);
}

/// A runtime that gets EPIPE while it writes the state fails the container's start with a message about a pipe. So stdin
/// is read to its end whatever else is wrong.
#[test]
fn standard_input_is_drained_whatever_else_is_wrong() {
    let sandbox = Sandbox::new();
    sandbox.write("/run/bad.toml", "nonsense = 1\n");
    sandbox.sh("ln -s /run /run/link");
    let program = hook().display().to_string();
    let reasons = [
        ("oci", 2),
        ("oci --interface eth1=nonsense", 2),
        ("oci --nonsense", 2),
        ("oci --watch", 2),
        ("oci word", 2),
        ("oci --interface", 2),
        ("oci --config /run/bad.toml", 2),
        ("oci --config /run/none.toml", 2),
        ("--state-dir /run/link oci", 2),
        ("--config=/run/bad.toml oci --limit subflows=99", 2),
    ];
    for (arguments, code) in reasons {
        // The writer's own status is the first of the two; 10 runs of each make 100 of all. A writer that gets no processor
        // for five seconds is not waited for, which is right: those runs do not count.
        let script = format!(
            "runs=0
             for run in $(seq 50); do
               read -r begin rest </proc/uptime
               {{ head -c 524288 /dev/zero; echo $? >/run/writer; }} | {program} {arguments} 2>/run/said
               status=$?
               read -r end rest </proc/uptime
               if [ $status = 1 ] && [ $((${{end%.*}} - ${{begin%.*}})) -ge 4 ] && grep -q 'not closed in time' /run/said; then
                 continue
               fi
               echo $(cat /run/writer) $status
               runs=$((runs + 1))
               [ $runs -lt 10 ] || break
             done"
        );
        let out = sandbox.run(&["sh", "-c", &script]).ok();
        assert_eq!(out.lines().count(), 10, "{arguments}: {out}");
        assert!(out.lines().all(|line| line == format!("0 {code}")), "mptcp-hook {arguments}: {out}");
    }
}

// --- annotations ----------------------------------------------------------------------------------------------------

#[test]
fn annotations_that_mean_nothing() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    for (key, value, near) in [
        ("mptcp-hook/interfaec.eth1", "backup", "mptcp-hook/interface"),
        ("mptcp-hook/limits.subflows", "4", "mptcp-hook/limit"),
        ("mptcp-hook/sysctl", "scheduler=default", "mptcp-hook/sysctls"),
        ("mptcp-hook/on_conflict", "warn", "mptcp-hook/on-conflict"),
        ("mptcp-hook/nonsense", "1", "mptcp-hook/interface"),
        ("mptcp-hok/interface.eth1", "backup", "mptcp-hook/interface.eth1"),
        ("mptcp_hook/interface.eth1", "backup", "mptcp-hook/interface.eth1"),
        ("mptcp-hook/", "1", "mptcp-hook/"),
        ("mptcp-hook/limit.subflow", "4", "subflows"),
        ("mptcp-hook/interfaces", "eth1", "NAME=FLAGS"),
        ("mptcp-hook/interfaces", "eth1=backup; eth1=subflow", "eth1"),
        ("mptcp-hook/interface.eth1", "bakup", "backup"),
        ("mptcp-hook/interface.lo", "backup", "loopback"),
        ("mptcp-hook/interface.a/b", "backup", "interface name"),
        ("mptcp-hook/interface.averyveryverylongname", "backup", "longer"),
        ("mptcp-hook/on-conflict", "maybe", "refuse, warn or override"),
        ("mptcp-hook/routes", "always", "is not auto or off"),
        ("mptcp-hook/mptcp", "force", "not in this version yet"),
        ("mptcp-hook/follow", "sometimes", "is not auto, always or never"),
        ("mptcp-hook/mptcp", "sometimes", "default"),
        ("mptcp-hook/interface.eth1", "backup,gateway=10.0.2", "is not an IP address"),
        ("mptcp-hook/interface.eth1", "backup,gateway=127.0.0.1", "cannot be a next hop"),
        ("mptcp-hook/interface.eth1", "backup,gateway=10.0.2.1,gateway=10.0.2.9", "two gateways"),
    ] {
        world.annotation_fails(key, value, 2, &[key, near]);
    }
    // Others' annotations are not ours, near as they may look.
    world.container.oci(&[]).ok();
    let outcome = sandbox.hook_with_input(
        &["oci"],
        {
            let mut state = world.container.state();
            state["annotations"] = json!({ "mptcp.example/interface.eth1": "nonsense", "hook/x": "y" });
            state.to_string()
        }
        .as_bytes(),
    );
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{outcome}");
}

/// What everybody can say wrongly: annotations, hook arguments and the command line are read by the same code.
#[test]
fn flags_limits_keys_and_values_that_cannot_be() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let interfaces = [
        ("signal,fullmesh", "exclude"),
        ("off,backup", "off"),
        ("default,subflow", "default"),
        ("", "empty"),
        ("backup,", "empty"),
        ("nonsense", "known are"),
        ("implicit", "kernel"),
        ("0xZZ", "0x101003"),
        ("0x", "0x101003"),
        ("-1", "unknown flag"),
        ("0x180000", "exclude"),
        ("0x1000000000", "32 bits"),
        ("0x101003,subflow", "mixes"),
    ];
    for (flags, says) in interfaces {
        world.annotation_fails("mptcp-hook/interface.eth1", flags, 2, &["mptcp-hook/interface.eth1", says]);
        world.flags_fail(&["--interface", &format!("eth1={flags}")], 2, &["--interface", says]);
    }
    for value in ["9", "-1", "99999999999999999999", "x", "", "4 5", "0x9", "1e1"] {
        world.annotation_fails("mptcp-hook/limit.subflows", value, 2, &["subflows", "8"]);
        world.flags_fail(&["--limit", &format!("subflows={value}")], 2, &["--limit", "8"]);
    }
    let keys = [
        ("net/../kernel/hostname", ".."),
        ("net.ipv4..conf", "empty"),
        ("../../etc/passwd", "sysctl key"),
        ("/etc/passwd", "net.*"),
        ("kernel.core_pattern", "net.*"),
        ("vm.swappiness", "net.*"),
        ("net.mptcp.sched uler", "character"),
        ("net.ipv4.conf.eth0.100.rp_filter", "net/ipv4/conf/eth0.100/rp_filter"),
    ];
    for (key, says) in keys {
        world.annotation_fails(&format!("mptcp-hook/sysctl.{key}"), "1", 2, &[says]);
        world.flags_fail(&["--sysctl", &format!("{key}=1")], 2, &["--sysctl", says]);
    }
    for (value, says) in
        [("5\n6", "line break"), ("5\n", "line break"), ("", "empty"), ("  ", "empty"), ("5\u{1b}", "control")]
    {
        world.annotation_fails("mptcp-hook/sysctl.net.mptcp.stale_loss_cnt", value, 2, &["stale_loss_cnt", says]);
        world.flags_fail(&["--sysctl", &format!("stale_loss_cnt={value}")], 2, &["stale_loss_cnt", says]);
    }
    let id = world.container.id();
    // These need a look at the present value.
    for value in ["0x10 junk", "5 junk", "5 6", "junk"] {
        world.annotation_fails("mptcp-hook/sysctl.net.mptcp.stale_loss_cnt", value, 2, &["stale_loss_cnt"]);
        world.assert_failed(&world.container.oci(&["--sysctl", &format!("stale_loss_cnt={value}")]), 2, &[id, value]);
    }
    world.flags_fail(&["--sysctl", "net.ipv4.tcp_rmem=4096 131072"], 2, &["tcp_rmem"]);
    for (module, says) in
        [("tcp_bbr.x=1", "MPTCP"), ("mptcp_fullmesh=1", "MODULE.PARAM"), ("mptcp_x/../y.z=1", "MODULE.PARAM")]
    {
        world.flags_fail(&["--module", module], 2, &["--module", says]);
    }
}

/// What only the kernel can reject; everything before it is undone.
#[test]
fn values_that_the_kernel_rejects() {
    let kernel = Running::look();
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let id = world.container.id();
    for (wish, says) in [
        ("scheduler=none_such", "scheduler"),
        ("path_manager=none_such", "path_manager"),
        ("stale_loss_cnt=99999999999999999999", "stale_loss_cnt"),
        ("checksum_enabled=7", "checksum_enabled"),
    ] {
        // add_addr_timeout comes first, endpoint and limits after it.
        let arguments = [
            "--sysctl",
            "add_addr_timeout=77",
            "--sysctl",
            wish,
            "--interface",
            "eth1=backup",
            "--limit",
            "subflows=6",
        ];
        // A key that the kernel does not have is found out before anything is tried.
        let how = if kernel.has_sysctl(says) { "nothing was changed" } else { "exists since Linux" };
        world.assert_failed(&world.container.oci(&arguments), 1, &[id, says, how]);
    }
    for (key, says) in [
        ("net.mptcp.mptcp_path_manager", "multipath-tcp.org"),
        ("net.mptcp.schedular", "net.mptcp.scheduler"),
        ("net.core.netdev_max_backlogg", "initial network namespace"),
    ] {
        world.assert_failed(&world.container.oci(&["--sysctl", &format!("{key}=1")]), 1, &[id, key, says]);
    }
}

/// A read-back that differs from what was asked for, after the endpoints were made: all of it is undone.
#[test]
fn a_value_that_reads_back_otherwise_undoes_everything() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let key = "net/ipv4/ip_local_reserved_ports";
    let netns = world.container.netns();
    assert_eq!(sandbox.sysctl(&netns, key).as_deref(), Some(""));
    // The kernel stores a bit map and shows 9000-9001.
    let arguments = ["--sysctl", "net.ipv4.ip_local_reserved_ports=9000,9001", "--interface", "eth1=backup"];
    world.assert_failed(&world.container.oci(&arguments), 1, &[world.container.id(), "ip_local_reserved_ports"]);
    assert_eq!(sandbox.sysctl(&netns, key).as_deref(), Some(""), "an empty value was not put back");

    sandbox.sh_in(&netns, &format!("echo 7000-7001 >/proc/sys/{key}"));
    let outcome = world.container.oci(&arguments);
    world.assert_failed(&outcome, 1, &["9000-9001"]);
    assert_eq!(sandbox.sysctl(&netns, key).as_deref(), Some("7000-7001"));
}

// --- rights and the kernel ------------------------------------------------------------------------------------------

/// `mptcp-hook oci ARGUMENTS` for the container, with `before` in front of it.
#[track_caller]
fn hook_behind(world: &World, before: &[&str], arguments: &[&str]) -> Outcome {
    let program = readable_hook(world.sandbox).display().to_string();
    let argv: Vec<&str> = [before, &[program.as_str(), "oci"], arguments].concat();
    world.sandbox.run_with_input(&argv, world.container.state().to_string().as_bytes())
}

#[test]
fn without_the_capabilities() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let id = world.container.id();
    let without = |capability| ["setpriv", "--bounding-set", capability];
    for wish in [["--interface", "eth1=backup"], ["--limit", "subflows=6"]] {
        world.assert_failed(&hook_behind(&world, &without("-net_admin"), &wish), 1, &[id, "CAP_NET_ADMIN"]);
        world.assert_failed(&hook_behind(&world, &without("-sys_admin"), &wish), 1, &[id, "CAP_SYS_ADMIN"]);
    }
    let nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let outcome = hook_behind(&world, &nobody, &["--interface", "eth1=backup"]);
    world.assert_failed(&outcome, 1, &[id, "root"]);
}

#[test]
fn mptcp_is_switched_off_in_the_namespace() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    sandbox.sh_in(&world.container.netns(), "echo 0 >/proc/sys/net/mptcp/enabled");
    world.remember();
    let outcome = world.container.oci(&["--interface", "eth1=backup"]);
    world.assert_failed(&outcome, 1, &[world.container.id(), "net.mptcp.enabled is 0", "--sysctl enabled=1"]);
    // What the message says to do works.
    world.container.oci(&["--interface", "eth1=backup", "--sysctl", "enabled=1"]).ok();
    assert_eq!(sandbox.endpoints_on(&world.container.netns(), "eth1").len(), 1);
    world.container.poststop();
    sandbox.hook(&["release", world.container.id()]).ok();
    assert_eq!(world.observe(), world.before);
}

/// A kernel without MPTCP has no net.mptcp at all.
#[test]
fn a_kernel_without_mptcp() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let outcome = hook_behind(&world, WITHOUT_MPTCP, &["--interface", "eth1=backup"]);
    world.assert_failed(&outcome, 1, &[world.container.id(), "no MPTCP", "kernel"]);
}

#[test]
fn proc_sys_mounted_read_only_is_an_error_and_never_host_scope() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let read_only = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; exec \"$@\"";
    let before = ["unshare", "--mount", "sh", "-ec", read_only, "sh"];
    let arguments = ["--sysctl", "stale_loss_cnt=9", "--interface", "eth1=backup", "--limit", "subflows=6"];
    let outcome = hook_behind(&world, &before, &arguments);
    world.assert_failed(&outcome, 1, &[world.container.id(), "stale_loss_cnt", "/proc/sys is mounted read-only here"]);
}

// --- the policy -----------------------------------------------------------------------------------------------------

const CONFIG: &str = "/etc/mptcp-hook/config.toml";

#[test]
fn a_policy_with_mistakes() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    for (text, parts) in [
        ("on-conflct = \"warn\"\n", &["config.toml:1", "on-conflict"][..]),
        ("\n\n[annotations]\noverrides = true\n", &["config.toml:4", "override"]),
        ("on-conflict = \"sometimes\"\n", &["config.toml:1", "refuse, warn or override"]),
        ("deadline = 0\n", &["config.toml:1", "deadline"]),
        ("deadline = \"soon\"\n", &["config.toml:1", "deadline"]),
        ("on-error = true\n", &["config.toml:1", "on-error"]),
        ("[defaults.interfaces]\neth1 = \"bakup\"\n", &["config.toml:2", "backup"]),
        ("[annotations.sysctls]\n\"kernel.core_pattern\" = \"*\"\n", &["config.toml:2", "net.*"]),
        ("[defaults\n", &["config.toml:1"]),
        ("a = 1\na = 2\n", &["config.toml:"]),
    ] {
        sandbox.policy(text);
        for outcome in [world.container.oci(&["--interface", "eth1=backup"]), world.container.oci(&[])] {
            world.assert_failed(&outcome, 2, parts);
            // The person at 3 a.m. wants to know which container did not start.
            world.assert_failed(&outcome, 2, &[world.container.id()]);
        }
    }
    sandbox.write(CONFIG, "");
    std::fs::write(sandbox.outside(CONFIG), b"on-error = \"\xff\"\n").expect("writing the policy");
    world.assert_failed(&world.container.oci(&[]), 2, &["config.toml:1", "UTF-8"]);
    world.assert_failed(&sandbox.hook(&["status", "--config", "/etc/none.toml"]), 2, &["/etc/none.toml", "exist"]);
}

#[test]
fn a_policy_that_others_can_write() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    sandbox.policy("on-conflict = \"override\"\n");
    let fails = |parts: &[&str]| {
        world.assert_failed(&world.container.oci(&["--interface", "eth1=backup"]), 2, parts);
    };
    for (spoil, mend, parts) in [
        ("chmod 666 /etc/mptcp-hook/config.toml", "chmod 644 /etc/mptcp-hook/config.toml", &[CONFIG, "chmod go-w"][..]),
        ("chmod 664 /etc/mptcp-hook/config.toml", "chmod 644 /etc/mptcp-hook/config.toml", &[CONFIG, "group"]),
        ("chown 1000 /etc/mptcp-hook/config.toml", "chown 0 /etc/mptcp-hook/config.toml", &[CONFIG, "uid 1000"]),
        ("chmod 777 /etc/mptcp-hook", "chmod 755 /etc/mptcp-hook", &["/etc/mptcp-hook", "chmod go-w"]),
        ("chown 1000 /etc/mptcp-hook", "chown 0 /etc/mptcp-hook", &["/etc/mptcp-hook", "uid 1000"]),
        ("chmod 777 /etc", "chmod 755 /etc", &["/etc", "chmod go-w"]),
    ] {
        sandbox.sh(spoil);
        fails(parts);
        sandbox.sh(mend);
    }
    sandbox.sh("mkdir -m 777 /run/open; mv /etc/mptcp-hook/config.toml /run/open/c; ln -s /run/open/c /etc/mptcp-hook/config.toml");
    fails(&["/run/open"]);
    sandbox.sh("rm /etc/mptcp-hook/config.toml; mkfifo /etc/mptcp-hook/config.toml");
    fails(&["not a regular file"]);
    sandbox.sh("rm /etc/mptcp-hook/config.toml; mkdir /etc/mptcp-hook/config.toml");
    fails(&["not a regular file"]);
}

#[test]
fn a_containers_file_that_is_wrong() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let path = format!("/etc/mptcp-hook/containers.d/{}.toml", world.container.id());
    let name = format!("{}.toml:2", world.container.id());
    sandbox.write(&path, "[interfaces]\neth1 = \"bakup\"\n");
    world.assert_failed(&world.container.oci(&[]), 2, &[world.container.id(), &name, "backup"]);
    sandbox.write(&path, "[interfaces]\neth1 = \"backup\"\n");
    sandbox.sh(&format!("chmod 666 {path}"));
    world.assert_failed(&world.container.oci(&[]), 2, &[world.container.id(), &path, "chmod go-w"]);
}

// --- the state directory --------------------------------------------------------------------------------------------

#[test]
fn a_state_directory_that_is_not_safe() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let id = world.container.id();
    for (make, path, says) in [
        ("mkdir -m 700 /run/real; ln -s /run/real /run/link", "/run/link", "symbolic link"),
        ("mkdir -m 700 /run/real/below", "/run/link/below", "symbolic link"),
        ("mkdir -m 755 /run/readable", "/run/readable", "chmod 0700"),
        ("mkdir -m 770 /run/group", "/run/group", "chmod 0700"),
        ("mkdir -m 700 /run/theirs; chown 1000 /run/theirs", "/run/theirs", "uid 1000"),
        ("echo x >/run/file", "/run/file", "not a directory"),
        ("mkdir -m 777 /run/open; mkdir -m 700 /run/open/state", "/run/open/state", "/run/open"),
        (
            "mkdir -m 755 /run/parent; chown 1000 /run/parent; mkdir -m 700 /run/parent/state",
            "/run/parent/state",
            "/run/parent",
        ),
        (":", "relative", "absolute"),
        (":", "/run/none/below/none", "/run/none"),
    ] {
        sandbox.sh(make);
        let outcome = world.container.oci(&["--state-dir", path, "--interface", "eth1=backup"]);
        world.assert_failed(&outcome, 1, &[id, says]);
        let left = sandbox.sh("find /run/real /run/open /run/theirs /run/parent -type f 2>/dev/null || :");
        assert_eq!(left, "", "{path}");
    }
}

/// The default place, prepared by somebody who came first.
#[test]
fn a_prepared_default_state_directory() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    sandbox.sh("mkdir -m 700 /run/trap; echo keep >/run/trap/containers; ln -s /run/trap /run/mptcp-hook");
    let outcome = world.container.oci(&["--interface", "eth1=backup"]);
    world.assert_failed(&outcome, 1, &[world.container.id(), "/run/mptcp-hook", "symbolic link"]);
    assert_eq!(sandbox.sh("cat /run/trap/containers"), "keep");
    world.assert_failed(&sandbox.hook(&["status"]), 1, &["symbolic link"]);
    world.assert_failed(&sandbox.hook(&["release", "--stale"]), 1, &["symbolic link"]);
}

#[test]
fn a_damaged_record_is_named_and_the_others_are_shown() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    let other = Bare::new(&sandbox, "other");
    other.oci(&["--limit", "subflows=4"]).ok();
    world.container.oci(&["--interface", "eth1=backup"]).ok();
    let record = sandbox.sh(&format!("ls /run/mptcp-hook/containers/*{}*", world.container.id()));
    for damage in ["", "{", "{}", "null", "{\"version\":1}", "\u{0}\u{0}\u{0}"] {
        std::fs::write(sandbox.outside(&record), damage).expect("damaging a record");
        world.remember();
        world.assert_failed(
            &world.container.oci(&["--interface", "eth1=subflow"]),
            1,
            &[world.container.id(), &record, "mptcp-hook repair"],
        );
        world.assert_failed(&world.container.poststop(), 1, &[world.container.id(), &record]);
        let status = sandbox.status();
        let problems = status["problems"].to_string();
        assert!(problems.contains(&record), "{status:#}");
        assert_eq!(status["containers"].as_array().map(Vec::len), Some(1), "{status:#}");
        assert_eq!(status["containers"][0]["id"], other.id());
    }
    std::fs::write(sandbox.outside(&record), "{\"version\":99,\"new\":true}").expect("a newer record");
    world.remember();
    world.assert_failed(&world.container.oci(&["--interface", "eth1=subflow"]), 1, &["version 99", "newer"]);
}

/// A file of the ledger that others could have written is shown, and nothing is done on its word.
#[test]
fn a_ledgers_file_that_others_could_have_written() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    world.container.oci(&["--interface", "eth1=backup"]).ok();
    let record = sandbox.sh(&format!("ls /run/mptcp-hook/containers/*{}*", world.container.id()));
    world.remember();
    for (spoil, says) in [
        ("chmod 620", "mode 620"),
        ("chmod 602", "mode 602"),
        ("chown 1000", "uid 1000"),
        ("chown 1000:1000", "uid 1000"),
    ] {
        sandbox.sh(&format!("{spoil} {record}"));
        let parts = [world.container.id(), &record, says, "run mptcp-hook repair"];
        world.assert_failed(&world.container.oci(&["--interface", "eth1=subflow"]), 1, &parts);
        world.assert_failed(&world.container.poststop(), 1, &parts);
        let status = sandbox.status();
        assert_eq!(status["containers"][0]["id"], world.container.id(), "{status:#}");
        let problems = status["problems"].as_array().expect("problems is a list");
        assert_eq!(problems.len(), 1, "{status:#}");
        assert!(parts[1..].iter().all(|part| problems[0].to_string().contains(part)), "{status:#}");
        sandbox.hook(&["repair"]).ok();
        assert_eq!(sandbox.sh(&format!("stat -c %u:%a {record}")), "0:600");
    }
    // Nor does it follow what lies in a file's place, or wait for it.
    for (make, says) in [("ln -s /run/real", "mptcp-hook repair"), ("mkfifo", "not a plain file")] {
        sandbox.sh(&format!("mv {record} /run/real; {make} {record}"));
        let said = world.container.oci(&["--interface", "eth1=subflow"]).fails_with(1);
        assert!(said.contains(&record) && said.contains(says), "{said}");
        sandbox.sh(&format!("rm {record}; mv /run/real {record}"));
    }
    world.container.oci(&["--interface", "eth1=backup"]).ok();
}

/// A hook was killed before it had anything to say about an interface: the container itself is shown as interrupted.
#[test]
fn a_container_without_interfaces_is_shown_as_interrupted() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    world.container.oci(&["--limit", "subflows=6"]).ok();
    let shown = |interrupted: bool| {
        let status = sandbox.status();
        assert_eq!(status["containers"][0]["interrupted"], interrupted, "{status:#}");
        assert_eq!(status["containers"][0]["interfaces"], json!([]), "{status:#}");
        assert_eq!(sandbox.hook(&["status"]).ok().contains("interrupted"), interrupted);
    };
    shown(false);
    let record = sandbox.sh(&format!("ls /run/mptcp-hook/containers/*{}*", world.container.id()));
    let work = json!({ "pid": world.container.pid(), "start_time": 1, "before": null });
    sandbox.sh(&format!("jq -c '.at_work = {work}' {record} >/run/edited; cat /run/edited >{record}"));
    shown(true);
    world.container.oci(&["--limit", "subflows=6"]).ok();
    shown(false);
}

/// Whatever the file at which the disk is full, of files or of bytes: the container does not start half done, and later it
/// starts.
#[test]
fn a_full_disk_undoes_everything() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let wish = ["--interface", "eth1=backup", "--limit", "subflows=6", "--sysctl", "stale_loss_cnt=9"];
    let arguments = [&["--state-dir", "/run/small"], &wish[..]].concat();
    for (limit, least) in [("nr_inodes", 5), ("nr_blocks", 1)] {
        let mut failures = 0;
        for size in 2.. {
            sandbox.sh(&format!("mkdir -p /run/small; mount -t tmpfs -o mode=700,{limit}={size} tmpfs /run/small"));
            let outcome = world.container.oci(&arguments);
            if outcome.code == Some(0) {
                sandbox.hook(&["--state-dir", "/run/small", "release", world.container.id()]).ok();
                break;
            }
            world.assert_failed(&outcome, 1, &[world.container.id(), "/run/small", "No space left"]);
            sandbox.sh(&format!("mount -o remount,{limit}=1000 /run/small"));
            world.container.oci(&arguments).ok();
            assert_eq!(sandbox.endpoints_on(&world.container.netns(), "eth1").len(), 1);
            sandbox.hook(&["--state-dir", "/run/small", "release", world.container.id()]).ok();
            assert_eq!(world.observe(), world.before);
            sandbox.sh("umount /run/small");
            failures += 1;
        }
        assert!(failures > least, "{limit}: the disk was full {failures} times only");
        sandbox.sh("umount /run/small");
    }
}

/// A state directory that cannot be written: nothing starts and nothing is changed, what is known is shown, and a release
/// succeeds once it can be written again. The policy may let containers start, not refused ones.
#[test]
fn a_read_only_state_directory() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    let mut other = Bare::new(&sandbox, "other");
    sandbox.sh("mkdir -m 700 /run/mptcp-hook; mount -t tmpfs -o mode=700 tmpfs /run/mptcp-hook");
    other.oci(&["--limit", "subflows=4"]).ok();
    sandbox.sh("mount -o remount,ro /run/mptcp-hook");
    world.remember();
    let id = world.container.id();
    let wish = ["--interface", "eth1=backup"];
    world.assert_failed(&world.container.oci(&wish), 1, &[id, "/run/mptcp-hook", "Read-only file system"]);
    assert_eq!(sandbox.status_of(other.id())["live"], true);
    let released = sandbox.hook(&["release", other.id()]);
    world.assert_failed(&released, 1, &[other.id(), "Read-only file system"]);
    sandbox.patient_policy("on-error = \"continue\"\n");
    world.assert_failed(&world.container.oci(&wish), 0, &[id, "Read-only file system"]);
    // Refused stays refused: the host's own namespace is nobody's to set up.
    let host = Bare::in_netns(&sandbox, "host", &Netns::Host);
    let said = host.oci(&wish).fails_with(3);
    assert!(said.contains("host-namespace") && said.contains("could not be recorded"), "{said}");
    sandbox.sh("mount -o remount,rw /run/mptcp-hook");
    other.stop().ok();
    sandbox.assert_ledger_is_empty();
}

/// What the caller's limits leave to the hook: too few descriptors, or files of half a kilobyte, and it fails like any other,
/// with a word and without a trace.
#[test]
fn limits_of_the_caller() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    let other = Bare::new(&sandbox, "other");
    other.oci(&["--limit", "subflows=4"]).ok();
    world.remember();
    let locks = || sandbox.sh("ls /run/mptcp-hook/locks");
    let before = locks();
    let id = world.container.id();
    // Host-wide settings take a lock each, before it is known whether they exist.
    let keys: Vec<String> = (0..40).map(|n| format!("net.core.none{n}=1")).collect();
    let many: Vec<&str> = keys.iter().flat_map(|key| ["--sysctl", key]).collect();
    let few = ["--interface", "eth1=backup", "--limit", "subflows=6", "--sysctl", "stale_loss_cnt=9"];
    let limited = |limit: &str, wish: &[&str]| {
        let script = format!("ulimit {limit}; exec \"$@\"");
        hook_behind(&world, &["sh", "-c", &script, "sh"], wish)
    };
    world.assert_failed(&limited("-n 24", &many), 1, &[id, "Too many open files"]);
    assert_eq!(locks(), before);
    let mut failures = 0;
    for descriptors in 4.. {
        let outcome = limited(&format!("-n {descriptors}"), &few);
        if outcome.code == Some(0) {
            break;
        }
        world.assert_failed(&outcome, 1, &[id, "Too many open files"]);
        assert_eq!(locks(), before, "with {descriptors} descriptors");
        failures += 1;
    }
    assert!(failures > 2, "{failures} limits were too low");
    sandbox.hook(&["release", id]).ok();
    world.assert_failed(&limited("-f 1", &few), 1, &[id, "/run/mptcp-hook", "File too large"]);
    assert_eq!(locks(), before);
    world.container.oci(&few).ok();
}

#[test]
fn the_ledgers_files_are_for_root_alone() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    sandbox.sh("umask 0");
    let outcome = hook_behind(&world, &["sh", "-c", "umask 0; exec \"$@\"", "sh"], &["--interface", "eth1=backup"]);
    outcome.ok();
    let refused = world.container.oci(&["--sysctl", "net.core.rmem_max=4097"]);
    assert_ne!(refused.code, Some(0));
    let open = sandbox.sh("find /run/mptcp-hook -perm /077");
    assert_eq!(open, "", "these are open to others");
    let mode = std::fs::metadata(sandbox.outside("/run/mptcp-hook")).expect("the state directory").permissions().mode();
    assert_eq!(mode & 0o7777, 0o700);
}

// --- the command line -----------------------------------------------------------------------------------------------

#[test]
fn command_lines_that_mean_nothing() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let cases: [(&[&str], &str); 20] = [
        (&[], "--help"),
        (&["aply"], "apply"),
        (&["nonsense"], "--help"),
        (&["apply"], "NAME"),
        (&["apply", "web"], "ledger knows no"),
        (&["apply", "--pid", "0"], "--pid"),
        (&["apply", "--pid", "x"], "--pid"),
        (&["apply", "--pid", "1", "--netns", "/run/netns/ctr"], "one TARGET"),
        (&["apply", "--inteface", "eth1=backup"], "--interface"),
        (&["apply", "--pid", "1", "--interface", "eth1"], "NAME=FLAG"),
        (&["apply", "--pid", "1", "--interface"], "needs a value"),
        (&["apply", "--pid", "1", "--json=yes", "--interface", "eth1=off"], "json"),
        (&["status", "--dry-run"], "--dry-run"),
        (&["status", "a", "b"], "unexpected"),
        (&["release"], "NAME"),
        (&["release", "web", "--stale"], "--stale"),
        (&["release", "--stale", "--interface", "eth1=off"], "--interface"),
        (&["-x"], "-x"),
        (&["lxc"], "LXC"),
        (&["apply", "--netns", "/run/netns/ctr", "--interface", "eth1=backup", "--interface", "eth1=off"], "eth1"),
    ];
    for (arguments, says) in cases {
        world.assert_failed(&sandbox.hook(arguments), 2, &[says]);
    }
}

#[test]
fn what_is_not_built_says_so() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let cases: [&[&str]; 5] = [
        &["install", "podman", "--dry-run"],
        &["install", "systemd", "--uninstall"],
        &["status", "--prometheus"],
        &["apply", "--netns", "/run/netns/ctr", "--mptcp", "force"],
        &["apply", "--netns", "/run/netns/ctr", "--mptcp", "off"],
    ];
    for arguments in cases {
        world.assert_failed(&sandbox.hook(arguments), 2, &["not in this version yet"]);
    }
    // What is the same as not asking for it is allowed.
    world.container.oci(&["--routes", "off", "--mptcp", "default", "--follow", "never"]).ok();
}

#[test]
fn every_verb_has_help_with_an_example() {
    let sandbox = Sandbox::new();
    for verb in ["oci", "lxc", "apply", "release", "status", "doctor", "capture"] {
        for help in ["--help", "-h"] {
            let outcome = sandbox.hook(&[verb, help]);
            assert_eq!(outcome.stderr, "", "{outcome}");
            let text = outcome.ok();
            assert!(text.starts_with(&format!("usage: mptcp-hook {verb}")), "{text}");
            assert!(text.contains("Example") && text.contains("--config FILE"), "{text}");
            assert!(text.lines().all(|line| line.len() <= 120), "{text}");
        }
    }
    let all = sandbox.hook(&["--help"]).ok();
    assert!(["oci", "lxc", "apply", "release", "status"].iter().all(|verb| all.contains(verb)), "{all}");
    assert!(sandbox.hook(&["--version"]).ok().starts_with("mptcp-hook "));
}

// --- on-error -------------------------------------------------------------------------------------------------------

/// `continue` lets a container start without what failed. It is no way around a refusal, nor around a wrong request.
#[test]
fn on_error_continue_touches_failures_alone() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let id = world.container.id();
    sandbox.patient_policy("on-error = \"continue\"\n");
    let failing = ["--sysctl", "scheduler=none_such", "--interface", "eth1=backup"];
    let outcome = world.container.oci(&failing);
    world.assert_failed(&outcome, 0, &[id, "scheduler", "starts without", "on-error"]);
    sandbox.assert_ledger_is_empty();

    world.annotation_fails("mptcp-hook/sysctl.net.ipv4.tcp_ecn", "1", 3, &["tcp_ecn"]);
    world.annotation_fails("mptcp-hook/interface.eth1", "bakup", 2, &["backup"]);
    world.assert_failed(&world.container.oci(&["--interface", "eth1=nonsense"]), 2, &["nonsense"]);
    // A person at the command line is told the truth.
    let pid = world.container.pid().to_string();
    let by_hand = [&["apply", "--pid", &pid], &failing[..]].concat();
    world.assert_failed(&sandbox.hook(&by_hand), 1, &["scheduler"]);

    sandbox.patient_policy("on-error = \"fail\"\n");
    world.assert_failed(&world.container.oci(&failing), 1, &[id, "scheduler"]);
}

/// No variable of the environment, the container's own perhaps, changes what the hook does or says.
#[test]
fn the_environment_says_nothing() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let hostile = [
        "env",
        "RUST_BACKTRACE=full",
        "RUST_LOG=trace",
        "RUST_LIB_BACKTRACE=1",
        "LD_PRELOAD=/tmp/evil.so",
        "NO_COLOR=1",
        "LXC_NAME=evil",
        "LXC_PID=1",
        "LXC_HOOK_TYPE=start-host",
        "TMPDIR=/evil",
        "HOME=/evil",
        "XDG_RUNTIME_DIR=/evil",
    ];
    let outcome = hook_behind(&world, &hostile, &["--sysctl", "scheduler=none_such"]);
    world.assert_failed(&outcome, 1, &[world.container.id(), "scheduler"]);
    let bare = hook_behind(&world, &["env", "-i"], &["--sysctl", "scheduler=none_such"]);
    assert_eq!(outcome.stderr, bare.stderr);
}
