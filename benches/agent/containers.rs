//! Processes in network namespaces of their own, each with one end of a veth.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mptcp_hook::deadline::Deadline;
use mptcp_hook::kernel::netlink::mptcp_pm::PathManager;
use mptcp_hook::kernel::netlink::{Body, Connection};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};

use crate::{sh, wait};

/// How many interfaces are made by one ip(8).
const BATCH: usize = 100;

/// The route of an address that comes with it reaches so far that it is a way out (192.0.2.0/24, documentation): the
/// agent waits a moment for one.
const PREFIX: u8 = 8;

/// A container: `eth1` in it, `hN` outside.
pub struct Container {
    number: usize,
    init: Child,
}

/// All of them.
pub struct Containers(Vec<Container>);

impl Containers {
    /// Makes `count` containers, in which `init` (a program that waits for the end of its input) runs. Interfaces are up
    /// and have no addresses.
    pub fn new(count: usize, init: &Path) -> Self {
        raise_descriptor_limit();
        let start = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            Command::new(init).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("starting an init")
        };
        let on_a_thread =
            || std::thread::scope(|scope| scope.spawn(start).join().expect("the thread that starts an init"));
        let inits = (0..count).map(|_| on_a_thread());
        let containers: Vec<_> = inits.enumerate().map(|(number, init)| Container { number, init }).collect();
        for some in containers.chunks(BATCH) {
            let lines: String = some
                .iter()
                .map(|Container { number, init }| {
                    format!("link add h{number} type veth peer name eth1 netns {}\nlink set h{number} up\n", init.id())
                })
                .collect();
            sh(&format!("ip -batch - <<END\n{lines}END\n"));
        }
        for container in &containers {
            container.inside(|| Link::open().set_up());
        }
        Self(containers)
    }

    /// The first `count` of them.
    pub fn followed(&self, count: usize) -> &[Container] {
        &self.0[..count]
    }

    /// One of them.
    pub fn get(&self, number: usize) -> &Container {
        &self.0[number]
    }

    /// Kills an init; the time until the interface outside is gone.
    pub fn kill(&mut self, number: usize) -> Duration {
        let container = &mut self.0[number];
        let name = format!("h{number}");
        let begin = Instant::now();
        container.init.kill().expect("killing an init");
        wait("the veth of a killed container is gone", || if_nametoindex(name.as_str()).is_err());
        let time = begin.elapsed();
        container.init.wait().expect("waiting for an init's end");
        time
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        for container in &mut self.0 {
            let _ = container.init.kill();
            let _ = container.init.wait();
        }
    }
}

impl Container {
    /// The arguments that set it up.
    pub fn apply(&self, state: &str) -> Vec<String> {
        let (pid, name) = (self.init.id().to_string(), format!("c{}", self.number));
        ["apply", "--state-dir", state, "--pid", &pid, "--name", &name, "--interface", "eth1=backup"]
            .map(String::from)
            .into()
    }

    /// Adds or removes its address; the time from just before that until its endpoint is, or is no more, in the
    /// kernel's list.
    pub fn change_address(&self, add: bool) -> Duration {
        let address = Ipv4Addr::new(192, 10 + (self.number / 250) as u8, (self.number % 250) as u8, 2);
        self.inside(|| {
            let deadline = Deadline::after(Duration::from_secs(60));
            let mut link = Link::open();
            let mut manager = PathManager::open(deadline).expect("a netlink socket").expect("Multipath TCP");
            let mut there = || {
                let endpoints = manager.endpoints().expect("the endpoints");
                endpoints.iter().any(|endpoint| endpoint.address == IpAddr::V4(address))
            };
            assert_eq!(there(), !add, "{address} before the change");
            let begin = Instant::now();
            link.change_address(address, add);
            wait("the endpoint follows its address", || there() == add);
            begin.elapsed()
        })
    }

    /// Does something in its network namespace, on a thread of its own. Nothing of the namespace stays open.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let netns = File::open(format!("/proc/{}/ns/net", self.init.id())).expect("a network namespace");
        std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                setns(netns, CloneFlags::CLONE_NEWNET).expect("entering a network namespace");
                work()
            });
            work.join().expect("the thread in a network namespace")
        })
    }
}

/// `eth1` of the calling thread's namespace.
struct Link {
    connection: Connection,
    index: u32,
}

impl Link {
    fn open() -> Self {
        let deadline = Deadline::after(Duration::from_secs(60));
        let connection = Connection::open(libc::NETLINK_ROUTE as isize, deadline).expect("a netlink socket");
        Self { connection, index: if_nametoindex("eth1").expect("eth1") }
    }

    /// A `struct ifinfomsg` (rtnetlink(7)): family, type, index, flags, change.
    fn set_up(&mut self) {
        let up = libc::IFF_UP as u32;
        let header = [[0; 4], self.index.to_ne_bytes(), up.to_ne_bytes(), up.to_ne_bytes()].concat();
        self.connection.command(libc::RTM_NEWLINK, &Body::new(&header)).expect("setting a link up");
    }

    /// A `struct ifaddrmsg`: family, prefix length, flags, scope, index.
    fn change_address(&mut self, address: Ipv4Addr, add: bool) {
        let mut header = vec![libc::AF_INET as u8, PREFIX, 0, 0];
        header.extend(self.index.to_ne_bytes());
        let body = Body::new(&header).attribute(libc::IFA_LOCAL, &address.octets());
        let body = body.attribute(libc::IFA_ADDRESS, &address.octets());
        let kind = if add { libc::RTM_NEWADDR } else { libc::RTM_DELADDR };
        self.connection.command(kind, &body).expect("changing an address");
    }
}

/// Each container's init has a pipe.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of descriptors");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("raising the limit of descriptors");
    let watches = fs::read_to_string("/proc/sys/fs/inotify/max_user_watches").expect("the limit of inotify watches");
    println!("limits: {hard} descriptors (RLIMIT_NOFILE), {} watches (fs.inotify.max_user_watches)\n", watches.trim());
}
