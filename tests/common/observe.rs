//! What the kernel, the hook's `status` and its log say, read independently of the hook's own code.

use std::fmt::Display;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use super::sandbox::{Netns, Sandbox};
use super::{LIMIT, wait_for, wait_until};

/// Whether the kernel has put its IPv6 routes for all links and addresses of this thread's network namespace.
fn is_settled() -> bool {
    /// IFA_F_DADFAILED and IFA_F_TENTATIVE.
    const FAILED: u8 = 0x08;
    const TENTATIVE: u8 = 0x40;
    let lines = |file: &str| -> Vec<Vec<String>> {
        let text = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).expect("the namespace's IPv6");
        text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
    };
    // The routes last: what is settled before has its own by then.
    let links = getifaddrs().expect("the namespace's links");
    let links = links.filter(|link| {
        link.flags.contains(InterfaceFlags::IFF_UP) && !link.flags.contains(InterfaceFlags::IFF_LOOPBACK)
    });
    let links: Vec<_> = links.collect();
    // Address, interface index, length of the prefix, scope, flags, name.
    let addresses = lines("if_inet6");
    // Destination, length of its prefix, source, length of its prefix, next hop, metric, two counters, flags, name.
    let routes = lines("ipv6_route");
    let has_route = |address: &str, length: &str, name: &str| {
        routes.iter().any(|route| route[0] == address && route[1] == length && route[9] == name)
    };
    let multicast = format!("ff{:030}", 0);
    let is_up = |link: &InterfaceAddress| {
        let name = &link.interface_name;
        link.flags.contains(InterfaceFlags::IFF_RUNNING) && has_route(&multicast, "08", name)
    };
    let is_proved = |address: &Vec<String>| {
        let flags = u8::from_str_radix(&address[4], 16).expect("flags");
        flags & FAILED != 0 || flags & TENTATIVE == 0 && has_route(&address[0], "80", &address[5])
    };
    links.iter().all(is_up) && addresses.iter().all(is_proved)
}

/// Waits for the end of stdin, then brings the value `$2` of `$1` back.
const RESTORE: &str = r#"read -r end; [ "$(cat "$1")" = "$2" ] || printf '%s\n' "$2" >"$1""#;

/// How long a test waits for the others that need the same value of the machine.
const LOCK_LIMIT: Duration = Duration::from_secs(3600);

/// An endpoint of the in-kernel path manager, as ip-mptcp(8) shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its id.
    pub id: u64,
    /// Its flags by name, sorted.
    pub flags: Vec<String>,
    /// Its interface.
    pub dev: Option<String>,
}

/// Bytes that went through an interface, headers included.
#[derive(Clone, Copy, Debug)]
pub struct Counters {
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
}

impl Sandbox {
    /// The endpoints of a namespace.
    #[track_caller]
    pub fn endpoints(&self, netns: &Netns) -> Vec<Endpoint> {
        let json = self.run_in(netns, &["ip", "-j", "mptcp", "endpoint", "show"]).ok();
        if json.is_empty() {
            return Vec::new();
        }
        let value: Value = serde_json::from_str(&json).unwrap_or_else(|e| panic!("endpoints {json}: {e}"));
        value.as_array().expect("a list of endpoints").iter().map(endpoint).collect()
    }

    /// The endpoints of an interface of a namespace.
    #[track_caller]
    pub fn endpoints_on(&self, netns: &Netns, interface: &str) -> Vec<Endpoint> {
        self.endpoints(netns).into_iter().filter(|e| e.dev.as_deref() == Some(interface)).collect()
    }

    /// The value of a sysctl, in slash form, in a namespace; none if there is no such key.
    pub fn sysctl(&self, netns: &Netns, key: &str) -> Option<String> {
        let value = self.inside(netns, || std::fs::read_to_string(format!("/proc/sys/{key}")));
        value.ok().map(|value| value.trim().to_owned())
    }

    /// The byte counters of an interface of a namespace.
    #[track_caller]
    pub fn counters(&self, netns: &Netns, interface: &str) -> Counters {
        let table = self.inside(netns, || std::fs::read_to_string("/proc/thread-self/net/dev"));
        let table = table.expect("the namespace's interfaces");
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'))
            .unwrap_or_else(|| panic!("no interface {interface} in {table}"));
        let numbers: Vec<u64> = line.split_whitespace().map(|n| n.parse().expect("a counter")).collect();
        // Eight columns of what was received, then eight of what was sent, each beginning with the bytes.
        Counters { received: numbers[0], sent: numbers[8] }
    }

    /// The interfaces of a namespace that have an IPv6 address which is tentative still.
    pub fn tentative(&self, netns: &Netns) -> Vec<String> {
        /// IFA_F_TENTATIVE.
        const TENTATIVE: u8 = 0x40;
        let table = self.inside(netns, || std::fs::read_to_string("/proc/thread-self/net/if_inet6"));
        // Address, interface index, length of the prefix, scope, flags, name.
        let lines =
            table.as_deref().unwrap_or_default().lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let is_tentative = |fields: &Vec<&str>| u8::from_str_radix(fields[4], 16).expect("flags") & TENTATIVE != 0;
        lines.filter(is_tentative).map(|fields| fields[5].to_owned()).collect()
    }

    /// Waits until a namespace's links are up and its IPv6 addresses have proved themselves: the kernel puts routes of its
    /// own by that when it gets to it, and tests compare all routes before with all routes after.
    #[track_caller]
    pub fn settle(&self, netns: &Netns) {
        wait_until("links and addresses that are settled", LIMIT, || self.inside(netns, is_settled));
    }

    /// Waits until the kernel has noticed that these links are up, ready to send: it does that when it gets to it.
    #[track_caller]
    pub fn wait_up(&self, netns: &Netns, links: &[impl Display]) {
        let show: String = links.iter().map(|link| format!("link show dev {link}\n")).collect();
        let are_up = || self.ip_in(netns, &show).matches("state UP").count() == links.len();
        wait_until("links that are up", LIMIT, are_up);
    }

    /// `mptcp-hook status --json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        let json = self.hook(&["status", "--json"]).ok();
        serde_json::from_str(&json).unwrap_or_else(|e| panic!("status --json gave {json}: {e}"))
    }

    /// The container `id` in `status --json`; panics if it is not there.
    #[track_caller]
    pub fn status_of(&self, id: &str) -> Value {
        let status = self.status();
        let containers = status["containers"].as_array().expect("containers is a list");
        let found = containers.iter().find(|container| container["id"] == id);
        found.unwrap_or_else(|| panic!("{id} is not in {status:#}")).clone()
    }

    /// Panics if the ledger still knows a container, holds a setting, or is half done with something.
    #[track_caller]
    pub fn assert_ledger_is_empty(&self) {
        let status = self.status();
        for list in ["containers", "settings"] {
            assert_eq!(status[list].as_array().map(Vec::len), Some(0), "{list} of {status:#}");
        }
    }

    /// The conflicts in `status --json`.
    #[track_caller]
    pub fn conflicts(&self) -> Vec<Value> {
        self.status()["conflicts"].as_array().expect("conflicts is a list").clone()
    }
}

fn endpoint(value: &Value) -> Endpoint {
    let fields = value.as_object().expect("an endpoint is an object");
    // Old versions of ip print each flag as a member, new ones all of them as a list.
    let listed = value["flags"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let members = fields.iter().filter(|(_, value)| **value == Value::Bool(true)).map(|(name, _)| name.as_str());
    let mut flags: Vec<String> = listed.chain(members).map(str::to_owned).collect();
    flags.sort();
    Endpoint {
        address: value["address"].as_str().and_then(|a| a.parse().ok()).expect("an endpoint's address"),
        id: value["id"].as_u64().expect("an endpoint's id"),
        flags,
        dev: value["dev"].as_str().map(str::to_owned),
    }
}

/// A journal socket in a sandbox, where systemd's would be: what the hook logs arrives here.
pub struct Journal {
    socket: UnixDatagram,
}

impl Journal {
    /// Begins to listen at /run/systemd/journal/socket.
    pub fn listen(sandbox: &Sandbox) -> Self {
        let path = sandbox.outside("/run/systemd/journal/socket");
        std::fs::create_dir_all(path.parent().expect("an absolute path")).expect("the journal's directory");
        // In a network namespace of its own the queue may be long: what comes to a full one is lost.
        let bind = move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            std::fs::write("/proc/sys/net/unix/max_dgram_qlen", "100000").expect("the length of the journal's queue");
            UnixDatagram::bind(&path)
        };
        let socket = std::thread::spawn(bind).join().expect("the journal's thread").expect("the journal's socket");
        socket.set_nonblocking(true).expect("a non-blocking socket");
        Self { socket }
    }

    /// The entries that came since the last call, as text.
    pub fn entries(&self) -> Vec<String> {
        let mut buffer = vec![0; 256 * 1024];
        std::iter::from_fn(|| {
            let length = self.socket.recv(&mut buffer).ok()?;
            Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
        })
        .collect()
    }
}

/// A value of the machine itself: only one test at a time has one, and the value comes back when it is dropped.
pub struct HostValue {
    path: PathBuf,
    original: String,
    /// Writes the original back when its stdin ends: also after Ctrl-C or when the test is killed.
    restorer: Child,
    /// An abstract socket's name belongs to one at a time and ends with it, also when the test is killed.
    _lock: UnixDatagram,
}

impl HostValue {
    /// Takes the sysctl `key` (slash form) of the machine's own network namespace.
    pub fn of_sysctl(key: &str) -> Self {
        let name = format!("mptcp-hook-test {key}");
        let address = SocketAddr::from_abstract_name(name).expect("the name of a host value's lock");
        let lock =
            wait_for("another test that uses this host value", LOCK_LIMIT, || UnixDatagram::bind_addr(&address).ok());
        let path = PathBuf::from("/proc/sys").join(key);
        let original = std::fs::read_to_string(&path)
            .unwrap_or_else(|e| panic!("reading {} of the machine: {e}", path.display()))
            .trim()
            .to_owned();
        let restorer = Command::new("sh")
            .args(["-c", RESTORE, "restore"])
            .args([&path, Path::new(&original)])
            .stdin(Stdio::piped())
            // The lock, too: the next test, of another program perhaps, must not take for the original what is not back yet.
            .stdout(OwnedFd::from(lock.try_clone().expect("a second descriptor of a lock")))
            .process_group(0)
            .spawn()
            .expect("starting sh");
        Self { path, original, restorer, _lock: lock }
    }

    /// What it was when the test began.
    pub fn original(&self) -> &str {
        &self.original
    }

    /// What it is now.
    pub fn current(&self) -> String {
        std::fs::read_to_string(&self.path).expect("reading a value of the machine").trim().to_owned()
    }

    /// Changes it, as somebody other than the hook would.
    pub fn set(&self, value: &str) {
        std::fs::write(&self.path, value).expect("writing a value of the machine");
    }
}

impl Drop for HostValue {
    fn drop(&mut self) {
        drop(self.restorer.stdin.take());
        let restored = self.restorer.wait();
        if !std::thread::panicking() {
            assert!(restored.is_ok_and(|status| status.success()), "{} was not restored", self.path.display());
        }
    }
}
