//! The running kernel, held against the table of what each version is expected to be like (`kernels/expectations.rs`);
//! real traffic with the backup bit, failover and MP_PRIO without any engine; what the program says without MPTCP.
//!
//! `kernels/run` boots other kernels and runs this program and those of `kernels/suite.rs` in them.

mod common;
#[path = "kernels/document.rs"]
mod document;
#[path = "kernels/either.rs"]
mod either;
#[path = "kernels/suite.rs"]
mod suite;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use common::expectations::{
    Access, BACKUP_BUG, BackupBug, ENDPOINTS_MAX, FLAGS, GUESTS, Kind, LIMIT_MAX, LIMITS, MPTCP_ORG_LINK_FLAGS,
    MPTCP_ORG_SYSCTLS, REFUSALS, RMEM_IN_NAMESPACES_SINCE, Refused, Running, SET_FLAGS_SINCE, SYSCTLS, UNKNOWN_FLAG,
    USER_NAMESPACE_SINCE, Unknown, accepted,
};
use common::*;
use mptcp_hook::deadline::Deadline;
use mptcp_hook::kernel::netlink;
use mptcp_hook::kernel::netlink::mptcp_pm::{Endpoint as KernelEndpoint, Limits, PathManager};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

/// Runs `work` on a thread of its own in a fresh network namespace.
fn in_a_fresh_namespace<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        work()
    });
    thread.join().expect("the thread in the namespace")
}

fn path_manager() -> PathManager {
    PathManager::open(Deadline::after(Duration::from_secs(10))).expect("netlink").expect("the family mptcp_pm")
}

fn endpoint(number: u16, flags: u32) -> KernelEndpoint {
    let [high, low] = number.to_be_bytes();
    KernelEndpoint { id: 0, address: [10, 0, high, low].into(), port: None, ifindex: 0, flags }
}

/// Differences between the kernel and the table.
#[derive(Default)]
struct Differences(Vec<String>);

impl Differences {
    fn compare<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, found: T, expected: &[T]) {
        if !expected.contains(&found) {
            self.0.push(format!("{what}: found {found:?}, expected {expected:?}"));
        }
    }
}

/// Kind, sysctls, flags, errors, limits: all as the table says for this version. It fails with every difference.
#[test]
fn the_kernel_is_as_the_table_says() {
    let running = Running::look();
    println!("{} {:?}", running.release, running.kind);
    let mut differences = Differences::default();
    if let Some(guest) = GUESTS.iter().find(|guest| guest.version == running.version) {
        differences.compare("the kind of MPTCP", running.kind, &[guest.kind]);
    }
    let kernel = running.clone();
    let found = in_a_fresh_namespace(move || {
        let mut differences = Differences::default();
        match kernel.kind {
            Kind::Upstream => {
                differences.compare("the kind in a fresh namespace", Running::look().kind, &[Kind::Upstream]);
                sysctls(&kernel, &mut differences);
                flags(&kernel, &mut differences);
                refusals(&kernel, &mut differences);
            }
            Kind::MptcpOrg => {
                differences.compare("the kind in a fresh namespace", Running::look().kind, &[Kind::MptcpOrg]);
                let there = Path::new("/proc/sys/net/mptcp").exists();
                differences.compare("net.mptcp in a fresh namespace", there, &[false]);
            }
            Kind::None => differences.compare("the kind in a fresh namespace", Running::look().kind, &[Kind::None]),
        }
        let rmem = Path::new("/proc/sys/net/core/rmem_max").exists();
        differences.compare("net.core.rmem_max is there", rmem, &[kernel.has(RMEM_IN_NAMESPACES_SINCE)]);
        differences.0
    });
    differences.0.extend(found);
    if running.kind == Kind::Upstream {
        backup_bug(&running, &mut differences);
    }
    if running.kind == Kind::MptcpOrg {
        for key in MPTCP_ORG_SYSCTLS {
            let there = Path::new("/proc/sys/net/mptcp").join(key).exists();
            differences.compare(&format!("net.mptcp.{key} on the host"), there, &[true]);
        }
        link_flags(&mut differences);
    }
    assert!(differences.0.is_empty(), "{} is not as the table says:\n{:#?}", running.release, differences.0);
}

/// The keys of net.mptcp, each with its default and mode.
fn sysctls(kernel: &Running, differences: &mut Differences) {
    let directory = Path::new("/proc/sys/net/mptcp");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).expect("net.mptcp") {
        let path = entry.expect("an entry of net.mptcp").path();
        let value = fs::read_to_string(&path).expect("a value of net.mptcp").trim().to_owned();
        let writable = fs::metadata(&path).expect("a mode").permissions().mode() & 0o222 != 0;
        let access = if writable { Access::Write } else { Access::Read };
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        found.insert(name, (access, value));
    }
    for sysctl in SYSCTLS {
        let expected = kernel.has(sysctl.since).then(|| (sysctl.access, sysctl.default.to_owned()));
        differences.compare(&format!("net.mptcp.{}", sysctl.name), found.remove(sysctl.name), &[expected]);
    }
    for (name, value) in found {
        differences.0.push(format!("net.mptcp.{name} is not in the table: {value:?}"));
    }
}

/// What becomes of each flag, of a bit that nobody knows, and of a change.
fn flags(kernel: &Running, differences: &mut Differences) {
    let mut manager = path_manager();
    let limits = manager.limits().expect("the limits");
    differences.compare("the limits", [limits.subflows, limits.add_addr_accepted], &[LIMITS]);
    let kept = |manager: &mut PathManager, flags| {
        manager.add(&endpoint(1, flags)).expect("an endpoint");
        let kept = manager.endpoints().expect("the endpoints")[0].clone();
        manager.delete(kept.id, kept.address).expect("deleting an endpoint");
        kept.flags
    };
    let unknown = accepted(UNKNOWN_FLAG, kernel.version);
    let fate = |bit, kept| if kept & bit == 0 { Unknown::Dropped } else { Unknown::Stored };
    for flag in FLAGS {
        let kept = kept(&mut manager, flag.bit);
        if kernel.has(flag.since) {
            differences.compare(&format!("the flag {}", flag.name), kept, &[flag.bit]);
        } else {
            differences.compare(&format!("the unknown flag {}", flag.name), fate(flag.bit, kept), &unknown);
        }
    }
    let bit = 1 << 14;
    differences.compare("an unknown flag", fate(bit, kept(&mut manager, 2 | bit)), &unknown);
    // SET_FLAGS changes backup and nothing else, and takes what it ignores.
    manager.add(&endpoint(1, 2)).expect("an endpoint");
    let id = manager.endpoints().expect("the endpoints")[0].id;
    let has_it = kernel.has(SET_FLAGS_SINCE);
    for (what, asked, changed) in [("backup", 2 | 4, 2 | 4), ("signal", 2 | 1, 2)] {
        let outcome = manager.set_flags(id, asked);
        let errno = outcome.err().map(|error| netlink::errno(&error).expect("an error of the kernel"));
        differences.compare(&format!("SET_FLAGS {what}"), errno, &[(!has_it).then_some(Errno::EOPNOTSUPP)]);
        let flags = manager.endpoints().expect("the endpoints")[0].flags;
        differences.compare(&format!("the flags after SET_FLAGS {what}"), flags, &[if has_it { changed } else { 2 }]);
    }
    manager.delete(id, [10, 0, 0, 1].into()).expect("deleting an endpoint");
}

/// The errors of what is refused.
fn refusals(kernel: &Running, differences: &mut Differences) {
    let mut manager = path_manager();
    // An id is a byte, so that no kernel can have more than 255.
    let mut too_many = (1..=300).find_map(|number| manager.add(&endpoint(number, 2)).err());
    let all = manager.endpoints().expect("the endpoints");
    let number = u32::try_from(all.len()).expect("a small number");
    differences.compare("the most endpoints", number, &accepted(ENDPOINTS_MAX, kernel.version));
    // Below the limit of their number.
    for endpoint in &all[1..] {
        manager.delete(endpoint.id, endpoint.address).expect("deleting an endpoint");
    }
    let mut highest = 0;
    let mut too_high = (1..=u32::from(u8::MAX) + 1).find_map(|subflows| {
        let refused = manager.set_limits(Limits { subflows, add_addr_accepted: 0 }).err();
        highest = if refused.is_none() { subflows } else { highest };
        refused
    });
    differences.compare("the highest limit", highest, &accepted(LIMIT_MAX, kernel.version));
    for &(refused, what, errors) in REFUSALS {
        let outcome = match refused {
            Refused::EndpointTooMany => too_many.take().map_or(Ok(()), Err),
            Refused::LimitTooHigh => too_high.take().map_or(Ok(()), Err),
            Refused::Duplicate => manager.add(&endpoint(1, 2)),
            Refused::SignalFullmesh => manager.add(&endpoint(2, 1 | 8)),
            Refused::Implicit => manager.add(&endpoint(2, 16)),
            Refused::PortWithoutSignal => manager.add(&KernelEndpoint { port: Some(7000), ..endpoint(2, 2) }),
        };
        let errno = outcome.err().map(|error| netlink::errno(&error).expect("an error of the kernel"));
        let expected: Vec<Option<Errno>> = accepted(errors, kernel.version).into_iter().map(Some).collect();
        differences.compare(what, errno, &expected);
    }
}

/// What the doctor of the host says of backup paths.
fn backup_bug(kernel: &Running, differences: &mut Differences) {
    let found = Diagnosis::of(&Sandbox::new(), &[]);
    let said = found.findings().iter().find(|finding| finding["id"] == "kernel-backup-bug");
    let named = match said.map(|finding| finding["what"].as_str().expect("what is wrong")) {
        None => BackupBug::None,
        Some(what) if what.contains("backup together with signal") => BackupBug::Signal,
        Some(what) if what.contains("its own backup flag") => BackupBug::Sender,
        Some(other) => panic!("{other}"),
    };
    let expected: Vec<BackupBug> =
        accepted(BACKUP_BUG, kernel.version).into_iter().map(|bug| bug.of(kernel.patch)).collect();
    differences.compare("the doctor's bug with backup paths", named, &expected);
}

/// A multipath-tcp.org kernel keeps the interface flags, one at a time.
fn link_flags(differences: &mut Differences) {
    let sandbox = Sandbox::new();
    sandbox.sh("ip link add mp0 type dummy || ip link add mp0 type veth peer name mp1");
    for flag in MPTCP_ORG_LINK_FLAGS {
        let script = format!("echo {:#x} >/sys/class/net/mp0/flags; cat /sys/class/net/mp0/flags", 0x1002 | flag);
        let kept = sandbox.sh(&script);
        let kept = u32::from_str_radix(kept.trim_start_matches("0x"), 16).expect("flags of an interface");
        differences.compare(&format!("the interface flag {flag:#x}"), kept & 0x18_0000, &[flag]);
    }
}

/// Who may change endpoints: root of a user namespace from 6.1 on. Before, the message says who may.
#[test]
fn permissions_in_a_user_namespace() {
    let sandbox = Sandbox::new();
    let script = format!(
        "{} apply --pid $pid --state-dir /run/ledger --interface eth1=backup || echo status $?
         inside ip mptcp endpoint show || :
         kill $pid",
        hook().display()
    );
    let outcome = in_user_namespace(&sandbox, &script);
    let running = Running::look();
    let shown = outcome.to_string();
    let out = outcome.ok();
    let expected: &[&str] = match running.kind {
        Kind::Upstream if running.has(USER_NAMESPACE_SINCE) => &["10.0.2.2 id 1 subflow backup dev eth1"],
        Kind::Upstream => &["status 1", "run Linux 6.1 or later", "run the engine as root"],
        Kind::MptcpOrg => &[],
        Kind::None => &["status 1", "no MPTCP"],
    };
    for part in expected {
        assert!(shown.contains(part), "`{part}` is not in {shown}");
    }
    let refused = running.kind == Kind::None || running.kind == Kind::Upstream && !running.has(USER_NAMESPACE_SINCE);
    assert_eq!(out.contains("status "), refused, "{shown}");
}

/// Applied by the hook with a state, the join on the second path has the backup bit, and the path takes over.
#[test]
fn a_backup_path_joins_with_the_backup_bit_and_takes_over() {
    let sandbox = Sandbox::new();
    let World { paths, web, .. } = World::new(&sandbox);
    web.oci(&["--interface", "eth1=backup"]).ok();
    let server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let send = |_, bytes, rate| Sender::start(&sandbox, &ctr(), paths.address(), bytes, rate);
    assert_backup_path(&paths, &server, &capture, ["eth0", "eth1"], [10, 0, 2, 2], send);
    paths.mend("eth0");
    sandbox.hook(&["release", web.id()]).ok();
    assert_eq!(sandbox.endpoints(&ctr()), []);
    sandbox.assert_ledger_is_empty();
}

/// Live connections learn of each change by MP_PRIO, and the endpoint stays the same.
#[test]
fn a_live_connection_learns_of_each_change_by_mp_prio() {
    let sandbox = Sandbox::new();
    let World { paths, web, .. } = World::new(&sandbox);
    web.oci(&["--interface", "eth1=backup"]).ok();
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    // It goes on for as long as it is needed.
    let mut transfer = Sender::start(&sandbox, &ctr(), paths.address(), 1 << 30, Some(200_000));
    transfer.wait_sent(1);
    assert!(capture.wait_join("eth1").backup);
    let apply = |wish: &str| sandbox.hook(&["apply", web.id(), "--interface", wish]);
    assert_switches(&sandbox, &ctr(), LIMIT, || capture.prios(), apply);
    let sent = transfer.sent();
    transfer.wait_sent(sent + 200_000);
    sandbox.hook(&["release", web.id()]).ok();
}

// --- without MPTCP --------------------------------------------------------------------------------------------------

/// What stands before a command so that it sees no MPTCP: nothing on a kernel that has none, else an empty /proc/sys.
fn without_mptcp() -> &'static [&'static str] {
    match Running::look().kind {
        Kind::None => &[],
        Kind::Upstream | Kind::MptcpOrg => WITHOUT_MPTCP,
    }
}

/// `mptcp-hook ARGUMENTS` where there is no MPTCP.
#[track_caller]
fn hook_without(sandbox: &Sandbox, arguments: &[&str], stdin: &[u8]) -> Outcome {
    let program = hook().display().to_string();
    let argv: Vec<&str> = [without_mptcp(), &[program.as_str()], arguments].concat();
    sandbox.run_with_input(&argv, stdin)
}

/// A container without MPTCP, and a process in it.
fn plain_world(sandbox: &Sandbox) -> Bare<'_> {
    sandbox.sh("ip netns add ctr; nsenter --net=/run/netns/ctr ip link add eth1 type veth peer name far");
    sandbox.sh_in(&ctr(), "ip addr add 10.0.2.2/24 dev eth1; ip link set eth1 up; ip link set lo up");
    Bare::in_netns(sandbox, "web", &ctr())
}

/// Every verb ends with one clear line; those that only look have nothing to say against it.
#[test]
fn without_mptcp_every_verb_ends_with_one_line() {
    let sandbox = Sandbox::new();
    let web = plain_world(&sandbox);
    let state = web.state().to_string();
    let pid = web.pid().to_string();
    let release = Running::look().release;
    let wish = ["--interface", "eth1=backup"];
    for (arguments, stdin) in [
        ([&["oci"][..], &wish].concat(), state.as_str()),
        ([&["oci"][..], &["--limit", "subflows=4"]].concat(), &state),
        ([&["oci"][..], &["--sysctl", "enabled=1"]].concat(), &state),
        ([&["apply", "--pid", &pid][..], &wish].concat(), ""),
        ([&["apply", "--netns", "/run/netns/ctr"][..], &wish].concat(), ""),
        ([&["apply", "--pid", &pid, "--dry-run"][..], &wish].concat(), ""),
    ] {
        let outcome = hook_without(&sandbox, &arguments, stdin.as_bytes());
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert_eq!(outcome.stdout, "", "{outcome}");
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        for part in ["no MPTCP", release.as_str()] {
            assert!(outcome.stderr.contains(part), "`{part}` is not in {outcome}");
        }
    }
    for (arguments, code, says) in [
        (&["release", "nobody"][..], 2, "nobody"),
        (&["release", "--stale"], 0, ""),
        (&["repair"], 0, ""),
        (&["status"], 0, ""),
        (&["status", "--json"], 0, "\"none\""),
        (&["doctor"], 1, "this kernel has no MPTCP"),
        (&["doctor", "--pid", &pid], 1, "no MPTCP"),
        (&["capture", "--pid", &pid, "--duration", "1"], 0, ""),
    ] {
        let outcome = hook_without(&sandbox, arguments, b"");
        assert_eq!(outcome.code, Some(code), "{outcome}");
        assert!(outcome.stderr.lines().count() <= 1, "{outcome}");
        assert!(outcome.to_string().contains(says), "`{says}` is not in {outcome}");
    }
    sandbox.assert_ledger_is_empty();
}

/// With `on-error = "continue"` the hook says so and the container starts; poststop is silent.
#[test]
fn without_mptcp_a_container_starts_where_the_policy_says_continue() {
    let sandbox = Sandbox::new();
    let web = plain_world(&sandbox);
    sandbox.policy("on-error = \"continue\"\n");
    let arguments = ["oci", "--interface", "eth1=backup", "--limit", "subflows=4"];
    let outcome = hook_without(&sandbox, &arguments, web.state().to_string().as_bytes());
    assert_eq!(outcome.code, Some(0), "{outcome}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    for part in [web.id(), "no MPTCP"] {
        assert!(outcome.stderr.contains(part), "`{part}` is not in {outcome}");
    }
    let mut state = web.state();
    state["status"] = "stopped".into();
    let outcome = hook_without(&sandbox, &["oci"], state.to_string().as_bytes());
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{outcome}");
    sandbox.assert_ledger_is_empty();
}
