//! What is measured in: a container with two interfaces, and a host that is nobody's real one.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, setns};
use serde_json::json;

/// The sysctl of the container's own namespace that is asked for, in file form, and its default and wished values.
pub const NETNS_SYSCTL: (&str, &str, &str) = ("net/mptcp/add_addr_timeout", "120", "30");

/// The host-wide sysctl that all containers ask for: visible and shared in every network namespace.
pub const HOST_SYSCTL: &str = "net/core/rmem_max";

/// Where network namespaces are named (ip-netns(8)).
const NETNS: &str = "/run/netns/";

/// Makes /run and the policy's directory empty, and lets a journal listen, as far as this process and its children can
/// see. The caller is in mount and network namespaces of its own.
pub fn prepare() -> UnixDatagram {
    sh("mount -t tmpfs -o mode=755 tmpfs /run && mkdir -p /run/netns /run/systemd/journal");
    sh("[ ! -d /etc/mptcp-hook ] || mount -t tmpfs -o mode=755 tmpfs /etc/mptcp-hook");
    sh("ip link set lo up");
    let journal = UnixDatagram::bind("/run/systemd/journal/socket").expect("a socket for the journal");
    journal.set_nonblocking(true).expect("a socket that does not block");
    journal
}

/// Throws away what came to the journal; gives the number of messages.
pub fn empty_journal(journal: &UnixDatagram) -> usize {
    let mut buffer = [0; 4096];
    std::iter::from_fn(|| journal.recv(&mut buffer).ok()).count()
}

/// A network namespace with eth0 and eth1, both with a default route, and a process that lives in it.
pub struct Container {
    name: &'static str,
    netns: File,
    init: Child,
    init_program: PathBuf,
    bundle: PathBuf,
}

impl Container {
    /// Makes the namespace `name`, in which `init` (a program that waits for the end of its input) lives.
    pub fn new(name: &'static str, subnet: u8, init: &Path) -> Self {
        let mut script = format!("ip netns add {name}\n");
        for (number, metric) in [(0, 100), (1, 200)] {
            let net = format!("10.{subnet}.{number}");
            script += &format!(
                "ip link add {name}{number} type veth peer name eth{number} netns {name}\n\
                 ip addr add {net}.1/24 dev {name}{number}\n\
                 ip link set {name}{number} up\n\
                 ip -n {name} addr add {net}.2/24 dev eth{number}\n\
                 ip -n {name} link set eth{number} up\n\
                 ip -n {name} route add default via {net}.1 dev eth{number} metric {metric}\n"
            );
        }
        sh(&script);
        let bundle = PathBuf::from(format!("/run/bundle-{name}"));
        fs::create_dir(&bundle).expect("a bundle's directory");
        fs::write(bundle.join("config.json"), include_str!("config.json")).expect("config.json");
        let netns = File::open(format!("{NETNS}{name}")).expect("the container's network namespace");
        let init_process = start(&netns, init);
        Self { name, netns, init: init_process, init_program: init.into(), bundle }
    }

    /// Its init's pid.
    pub fn pid(&self) -> u32 {
        self.init.id()
    }

    /// Ends its init and starts another one in the same namespace: another life.
    pub fn restart(&mut self) {
        self.stop();
        self.init = start(&self.netns, &self.init_program);
    }

    /// Ends its init.
    pub fn stop(&mut self) {
        drop(self.init.stdin.take());
        self.init.wait().expect("waiting for a container's init");
    }

    /// Puts the namespace back to how it was made.
    pub fn reset(&self) {
        let (key, default, _) = NETNS_SYSCTL;
        sh(&format!(
            "ip -n {name} -batch - <<END\n\
             mptcp endpoint flush\nmptcp limits set subflows 2 add_addr_accepted 0\n\
             END\n",
            name = self.name
        ));
        self.inside(|| fs::write(format!("/proc/sys/{key}"), default)).expect("resetting a sysctl");
    }

    /// The state that a runtime writes at createRuntime.
    pub fn state(&self) -> Vec<u8> {
        let (key, _, value) = NETNS_SYSCTL;
        self.state_with(json!({
            "mptcp-hook/interface.eth0": "subflow",
            "mptcp-hook/interface.eth1": "backup",
            (format!("mptcp-hook/sysctl.{}", key.replace('/', "."))): value,
            "org.opencontainers.image.title": "bench",
        }))
    }

    /// The same of a container that asks for nothing.
    pub fn state_without_wishes(&self) -> Vec<u8> {
        self.state_with(json!({ "org.opencontainers.image.title": "bench" }))
    }

    fn state_with(&self, annotations: serde_json::Value) -> Vec<u8> {
        let state = json!({
            "ociVersion": "1.0.2",
            "id": self.id(),
            "status": "created",
            "pid": self.pid(),
            "bundle": self.bundle,
            "annotations": annotations,
        });
        state.to_string().into_bytes()
    }

    /// The state that a runtime writes at poststop.
    pub fn stopped_state(&self) -> Vec<u8> {
        let state = json!({ "ociVersion": "1.0.2", "id": self.id(), "status": "stopped", "bundle": self.bundle });
        state.to_string().into_bytes()
    }

    /// The container's id, as long as an engine's.
    pub fn id(&self) -> String {
        format!("{:-<64}", self.name)
    }

    /// Checks with ip-mptcp(8) and the sysctl's file that everything asked for is in force.
    pub fn check(&self, who: &str) {
        let endpoints = sh(&format!("ip -n {} mptcp endpoint show", self.name));
        let has = |what: &str| endpoints.lines().any(|line| line.trim_end().ends_with(what));
        assert!(has("subflow dev eth0") && has("subflow backup dev eth1"), "after {who}: {endpoints}");
        let (key, _, value) = NETNS_SYSCTL;
        let now = self.inside(|| fs::read_to_string(format!("/proc/sys/{key}"))).expect("reading a sysctl");
        assert_eq!(now.trim(), value, "after {who}: {key}");
    }

    /// Does something in its network namespace, on a thread of its own.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        inside(&self.netns, work)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.stop();
    }
}

fn inside<T: Send>(netns: &File, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET).expect("entering the container's network namespace");
            work()
        });
        work.join().expect("the thread in the container's network namespace")
    })
}

fn start(netns: &File, init: &Path) -> Child {
    inside(netns, || Command::new(init).stdin(Stdio::piped()).spawn()).expect("starting a container's init")
}

/// An empty ledger at `path`.
pub fn state_directory(path: &str) -> PathBuf {
    fs::DirBuilder::new().mode(0o700).create(path).expect("a state directory");
    path.into()
}

/// Runs a shell script that must succeed; gives its output.
pub fn sh(script: &str) -> String {
    super::process::output(Path::new("/bin/sh"), &["-ec".into(), script.into()], b"")
}
