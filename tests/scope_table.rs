//! The table of settings that belong to a network namespace, held against this machine's kernel: every key that the
//! table claims and that can be written in a fresh namespace is written there, and the host's value must not follow.

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::expectations::{RMEM_IN_NAMESPACES_SINCE, Running};
use mptcp_hook::kernel::sysctl::look;
use mptcp_hook::kernel::{Kind, Seen, SeenSetting};
use mptcp_hook::ledger::record::Scope;
use mptcp_hook::plan::scope;
use mptcp_hook::request::setting::SettingKey;
use nix::sched::{CloneFlags, setns, unshare};

/// No kernel with Multipath TCP has fewer of them in a namespace that holds nothing but `lo`.
const KEYS_AT_LEAST: usize = 200;

/// Keys that cannot be read before they were written once, so that the hook does not touch them.
const UNREADABLE: &[&str] = &["stable_secret"];

/// This thread's network namespace and a fresh one. `/proc/sys/net` is looked up in the thread's namespace at each open.
struct Namespaces {
    home: File,
    fresh: File,
}

impl Namespaces {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes a network namespace");
        let own = || File::open("/proc/thread-self/ns/net").expect("the namespace of this thread");
        let home = own();
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        let namespaces = Self { fresh: own(), home };
        namespaces.enter(&namespaces.home);
        namespaces
    }

    fn enter(&self, namespace: &File) {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).expect("entering a network namespace");
    }

    fn in_fresh<T>(&self, work: impl FnOnce() -> T) -> T {
        self.enter(&self.fresh);
        let result = work();
        self.enter(&self.home);
        result
    }
}

/// The sysctls below net/ in this thread's namespace, in slash form.
fn keys() -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    let mut directories = vec![PathBuf::from("/proc/sys/net")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("a directory of /proc/sys") {
            let entry = entry.expect("an entry of /proc/sys");
            if entry.file_type().expect("the type of an entry").is_dir() {
                directories.push(entry.path());
            } else {
                let path = entry.path();
                let key = path.strip_prefix("/proc/sys").expect("a path below /proc/sys");
                keys.insert(key.to_str().expect("sysctl names are ASCII").to_owned());
            }
        }
    }
    keys
}

fn path(key: &str) -> PathBuf {
    Path::new("/proc/sys").join(key)
}

fn read(key: &str) -> Option<String> {
    fs::read_to_string(path(key)).ok().map(|value| value.trim().to_owned())
}

fn is_writable(key: &str) -> bool {
    fs::metadata(path(key)).is_ok_and(|meta| meta.permissions().mode() & 0o222 != 0)
}

fn setting(key: &str) -> SettingKey {
    SettingKey::sysctl(&format!("/{key}")).unwrap_or_else(|e| panic!("{key}: {e}"))
}

/// Values that are worth a try where `present` stands now.
fn others(key: &str, present: &str) -> Vec<String> {
    let list = |name: &str| read(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    if key.ends_with("tcp_congestion_control") {
        return list("net/ipv4/tcp_available_congestion_control");
    }
    if key.ends_with("mptcp/path_manager") {
        return list("net/mptcp/available_path_managers");
    }
    if key.ends_with("mptcp/scheduler") {
        return list("net/mptcp/available_schedulers");
    }
    if key.ends_with("tcp_fastopen_key") {
        return vec!["00000001-00000002-00000003-00000004".into()];
    }
    let fields: Option<Vec<i64>> = present.split_whitespace().map(|field| field.parse().ok()).collect();
    let mut values: Vec<String> = Vec::new();
    if let Some(fields) = fields.filter(|fields| !fields.is_empty()) {
        let each =
            |change: &dyn Fn(i64) -> i64| fields.iter().map(|n| change(*n).to_string()).collect::<Vec<_>>().join(" ");
        values.extend([each(&|n| n + 1), each(&|n| n - 1), each(&|n| n * 2), each(&|n| n / 2)]);
        values.extend((0..4).map(|n| each(&|_| n)));
    }
    // Bit maps and lists of ports, which may be empty now.
    values.extend(["1", "1234", "0"].map(String::from));
    values
}

/// Every key of the table that is present in a fresh namespace with a write bit there is the namespace's alone.
#[test]
fn what_the_table_gives_to_the_namespace_never_reaches_the_host() {
    let namespaces = Namespaces::new();
    let present = namespaces.in_fresh(keys);
    let claimed: Vec<&String> =
        present.iter().filter(|key| scope::is_known_per_namespace(key, Kind::Upstream)).collect();
    let mut checked = 0;
    let mut global = Vec::new();
    let mut not_written = Vec::new();
    for key in claimed {
        if !namespaces.in_fresh(|| is_writable(key)) {
            continue;
        }
        let Some(before) = namespaces.in_fresh(|| read(key)) else {
            let name = key.rsplit('/').next().unwrap_or_default();
            assert!(UNREADABLE.contains(&name), "{key} cannot be read");
            continue;
        };
        let host_before = read(key);
        let changed = namespaces.in_fresh(|| {
            others(key, &before)
                .into_iter()
                .any(|value| fs::write(path(key), &value).is_ok() && read(key).as_deref() != Some(before.as_str()))
        });
        let host_after = read(key);
        // An empty list is written as a line break.
        let back = if before.is_empty() { "\n" } else { &before };
        namespaces.in_fresh(|| fs::write(path(key), back)).unwrap_or_else(|e| panic!("putting {key} back: {e}"));
        if host_after != host_before {
            if let Some(value) = &host_before {
                fs::write(path(key), value).unwrap_or_else(|e| panic!("putting the host's {key} back: {e}"));
            }
            global.push(format!("{key}: {host_before:?} became {host_after:?}"));
        } else if changed {
            checked += 1;
        } else if others(key, &before) != [before.as_str()] {
            // Where the kernel offers one name (a lone scheduler) there is nothing else to write.
            not_written.push(format!("{key} = {before}"));
        }
    }
    assert!(global.is_empty(), "the table calls these the namespace's, and the host's value changed:\n{global:#?}");
    assert!(not_written.is_empty(), "no other valid value was found for {not_written:#?}");
    assert!(checked >= KEYS_AT_LEAST, "only {checked} keys were checked");
    println!("{checked} keys were written in a fresh namespace; the host's stayed as they were");
}

/// The scope of every net.* key is what the two namespaces show: the host's where the fresh one lacks it, has it without
/// a write bit, or the table does not know it.
#[test]
fn the_scope_of_every_key_is_what_the_kernel_shows() {
    let kernel = Running::look();
    let namespaces = Namespaces::new();
    let home = keys();
    let fresh = namespaces.in_fresh(keys);
    let (mut absent, mut read_only, mut unknown, mut own) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for key in home.union(&fresh) {
        let seen = SeenSetting { host: look(&setting(key)), target: namespaces.in_fresh(|| look(&setting(key))) };
        let readable = |there: bool| !there || read(key).is_some();
        if !readable(home.contains(key)) || !namespaces.in_fresh(|| readable(fresh.contains(key))) {
            // Write-only ones (net/ipv4/route/flush) could not be checked after writing.
            assert!(
                scope::of(&setting(key), Kind::Upstream, &kernel.release, &seen).is_err(),
                "{key} cannot be read: {seen:?}"
            );
            continue;
        }
        let (expected, list) = if !fresh.contains(key) {
            (Scope::Host, &mut absent)
        } else if !namespaces.in_fresh(|| is_writable(key)) {
            (Scope::Host, &mut read_only)
        } else if scope::is_known_per_namespace(key, Kind::Upstream) {
            (Scope::Netns, &mut own)
        } else {
            (Scope::Host, &mut unknown)
        };
        assert_eq!(scope::of(&setting(key), Kind::Upstream, &kernel.release, &seen), Ok(expected), "{key}: {seen:?}");
        list.push(key.as_str());
    }
    for (key, list) in [
        ("net/core/netdev_max_backlog", &absent),
        ("net/ipv4/tcp_mem", &absent),
        ("net/core/rmem_max", if kernel.has(RMEM_IN_NAMESPACES_SINCE) { &read_only } else { &absent }),
        ("net/ipv4/tcp_allowed_congestion_control", &read_only),
        ("net/mptcp/enabled", &own),
        ("net/ipv4/tcp_rmem", &own),
        ("net/ipv4/conf/lo/rp_filter", &own),
    ] {
        assert!(list.contains(&key), "{key} is not where it should be: {list:?}");
    }
    // Global although it can be written in every namespace (one way only, so nobody writes it here).
    if fresh.contains("net/netfilter/nf_hooks_lwtunnel") {
        assert!(unknown.contains(&"net/netfilter/nf_hooks_lwtunnel"), "{unknown:?}");
    }
    println!(
        "host alone {}, read-only in a namespace {}, writable there and unknown {}, the namespace's {}",
        absent.len(),
        read_only.len(),
        unknown.len(),
        own.len()
    );
}

/// What no namespace has is an error that says where it would be.
#[test]
fn a_key_that_is_nowhere_is_an_error() {
    for (key, says) in [
        ("net.core.netdev_max_backlogg", "initial network namespace"),
        ("net.mptcp.mptcp_path_manager", "multipath-tcp.org"),
        ("net.mptcp.schedular", "net.mptcp.scheduler"),
        ("net.netfilter.nf_conntrack_nope", "module"),
    ] {
        let key = SettingKey::sysctl(key).expect("a well-formed key");
        let seen = SeenSetting { host: look(&key), target: look(&key) };
        assert_eq!(seen.host, Seen::Absent, "{key}");
        let error =
            scope::of(&key, Kind::Upstream, &Running::look().release, &seen).expect_err("a key that does not exist");
        assert!(error.contains(says), "{error}");
    }
}
