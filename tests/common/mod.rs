//! What the tests with real containers stand on.
//!
//! | module | what it gives |
//! |---|---|
//! | [`sandbox`] | [`Sandbox`]: private namespaces in which runtimes and the hook run and which vanish with their last process |
//! | [`enter`] | [`Namespaces`]: programs started in other namespaces, and ended with what started them |
//! | [`bare`] | [`Bare`]: a process in a namespace and the state of a container for it, without a runtime |
//! | [`paths`] | [`TwoPaths`]: a server namespace joined to a container by two links, either of which can be cut |
//! | [`world`] | [`World`]: a [`Bare`] container on [`TwoPaths`] |
//! | [`proof`] | what every runtime has to show of a backup path, in `status`, in the kernel and on the wire |
//! | [`oci`] | [`Bundle`], [`Container`]: a `config.json` with hooks, run by crun or runc |
//! | [`lxc`] | [`Lxc`]: a container by its configuration file |
//! | [`podman`] | [`Podman`], [`Member`], [`Rootless`]: a podman with the shipped hooks.d file, and its containers |
//! | [`user`] | a user without rights |
//! | [`diagnosis`] | [`Diagnosis`]: what `mptcp-hook doctor` found |
//! | [`traffic`] | [`Server`], [`Sender`]: real Multipath TCP with a known number of bytes |
//! | [`tracer`] | [`tracer::Launcher`]: programs that are killed at a chosen system call |
//! | [`capture`] | [`Capture`]: packets as they were on the wire, their MPTCP options decoded |
//! | [`observe`] | what the kernel, the hook's `status` and its log say |
//! | [`expectations`] | what each version of the kernel is expected to be like |
//!
//! Nothing here trusts what the hook says about itself: endpoints come from ip-mptcp(8), backup bits from packets,
//! byte counts from the interfaces. Nothing waits for a fixed time: [`wait_for`] polls until a deadline.
//! A missing component is a failing test that names the command which installs it.

#![allow(dead_code, unused_imports, reason = "every test file uses a part of it")]

pub mod bare;
pub mod capture;
pub mod diagnosis;
pub mod enter;
#[path = "../kernels/expectations.rs"]
pub mod expectations;
pub mod lxc;
pub mod observe;
pub mod oci;
pub mod paths;
pub mod podman;
pub mod proof;
pub mod sandbox;
pub mod tracer;
pub mod traffic;
pub mod user;
pub mod world;

use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use bare::{Bare, in_user_namespace};
pub use capture::{Capture, MptcpOption, Packet, Prio};
pub use diagnosis::Diagnosis;
pub use enter::{Namespaces, Process};
pub use lxc::{Lxc, Starter, two_bridges};
pub use observe::{Endpoint, HostValue, Journal};
pub use oci::{Bundle, Container, HookEntry, Runtime, Stage};
pub use paths::{TwoPaths, Wiring};
pub use podman::{BACKUP, DefaultRoute, Member, NETWORKS, Podman, Rootless};
pub use proof::{RATE, assert_backup_path, assert_fails_over, assert_only_endpoint, assert_switches, eth1_of};
pub use sandbox::{Netns, Outcome, Running, Sandbox};
pub use traffic::{Sender, Server};
pub use world::{World, ctr};

/// How the test programs are built: a container's root filesystem has no C library.
const BUILD: &str = "RUSTFLAGS='-C target-feature=+crt-static' cargo test --target $(rustc --print host-tuple)";

/// How long anything may take that is not measured, on a machine with much else to do.
pub const LIMIT: Duration = Duration::from_secs(180);

/// How long an engine may take for anything. One that waited for an agent would wait longer: it stays a minute.
pub const ENGINE_LIMIT: Duration = Duration::from_secs(55);

/// What stands before a command so that it sees no MPTCP: an empty /proc/sys.
pub const WITHOUT_MPTCP: &[&str] = &[
    "unshare",
    "--mount",
    "sh",
    "-ec",
    "mkdir -p /run/sys/kernel/random
     for file in kernel/random/boot_id kernel/osrelease kernel/overflowuid; do cat /proc/sys/$file >/run/sys/$file; done
     mount --bind /run/sys /proc/sys
     exec \"$@\"",
    "sh",
];

/// The hook under test.
pub fn hook() -> PathBuf {
    static_program(Path::new(env!("CARGO_BIN_EXE_mptcp-hook")))
}

/// A copy of the hook that everybody can read: where the tests are built, others need not be able to.
pub fn readable_hook(sandbox: &Sandbox) -> PathBuf {
    let program = sandbox.dir().join("mptcp-hook");
    if !program.exists() {
        sandbox.copy_program(&hook(), &program);
    }
    program
}

/// The program that moves bytes over Multipath TCP, `examples/mptcp-traffic.rs`.
pub fn traffic_program() -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test program");
    let profile = test.ancestors().nth(2).expect("the test program lies in target/PROFILE/deps");
    static_program(&profile.join("examples/mptcp-traffic"))
}

/// `path`, if there is a program without a dynamic loader.
fn static_program(path: &Path) -> PathBuf {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|program| program.take(4096).read_to_end(&mut start));
    assert!(read.is_ok(), "{} is not built; build everything with\n  {BUILD}", path.display());
    // PT_INTERP, the path of the loader, stands right behind the headers.
    let loader = [&b"/lib64/ld-"[..], b"/lib/ld-"].into_iter();
    let dynamic = loader.into_iter().any(|loader| start.windows(loader.len()).any(|bytes| bytes == loader));
    assert!(!dynamic, "{} is linked dynamically and cannot run in a container; build with\n  {BUILD}", path.display());
    path.to_owned()
}

/// Fails with the command that installs `program` where it is missing.
pub fn require(program: &str, package: &str) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .any(|directory| directory.join(program).exists());
    assert!(found, "{program} is missing: apt-get install --no-install-recommends -y {package}");
}

/// Asks `condition` again and again until it gives a value; panics with `what` when `limit` has passed.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    wait_for_or(what, limit, || condition().ok_or("there was nothing of it"))
}

/// [`wait_for`] that says what the last look has found instead.
#[track_caller]
pub fn wait_for_or<T, E: Display>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T, E>) -> T {
    let begin = Instant::now();
    loop {
        match look() {
            Ok(value) => return value,
            Err(instead) => assert!(begin.elapsed() < limit, "not within {limit:?}: {what}; {instead:#}"),
        }
        pause_since(begin);
    }
}

/// The pause between two looks at what has been waited for since `begin`: short at first, then a tenth of the time, so
/// that the programs that look do not take the processor from what they wait for.
pub fn pause_since(begin: Instant) {
    std::thread::sleep((begin.elapsed() / 10).clamp(Duration::from_millis(10), Duration::from_millis(100)));
}

/// [`wait_for`] for a plain condition.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, limit, || condition().then_some(()));
}
