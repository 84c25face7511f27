//! Real Multipath TCP with a known number of bytes, by `examples/mptcp-traffic.rs`.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::sandbox::{Netns, Running, Sandbox};
use super::{traffic_program, wait_for};

/// Where a container's root filesystem has the program.
pub const PROGRAM: &str = "/mptcp-traffic";

/// The port of the servers; every server has a namespace of its own.
pub const PORT: u16 = 5000;

/// How long a server may take to start and a connection to show progress.
const PROGRESS_LIMIT: Duration = Duration::from_secs(10);

/// A server that receives, counts and acknowledges until it is dropped.
pub struct Server {
    process: Running,
}

impl Server {
    /// Starts a server in `netns` and waits until it listens.
    pub fn start(sandbox: &Sandbox, netns: &Netns) -> Self {
        let program = traffic_program().display().to_string();
        Self::attach(sandbox.spawn_in(netns, &[program.as_str(), "serve", "--port", &PORT.to_string()]))
    }

    /// A server that something else started, such as a runtime inside a container.
    pub fn attach(mut process: Running) -> Self {
        wait_for("a server that listens", PROGRESS_LIMIT, || {
            assert!(process.is_running(), "the server ended: {}{}", process.stdout(), process.stderr());
            process.stdout().contains("listening").then_some(())
        });
        Self { process }
    }

    /// The lines `received N bytes ...` until now, one per finished connection.
    pub fn received(&self) -> Vec<String> {
        self.process.stdout().lines().filter(|line| line.starts_with("received")).map(str::to_owned).collect()
    }
}

/// The arguments, program first, that send `bytes` to `to`; `rate` in bytes per second.
pub fn send_arguments(program: &str, to: IpAddr, bytes: u64, rate: Option<u64>) -> Vec<String> {
    let to = SocketAddr::new(to, PORT).to_string();
    let mut argv = vec![program.to_owned(), "send".to_owned(), to, "--bytes".to_owned(), bytes.to_string()];
    if let Some(rate) = rate {
        argv.extend(["--rate".to_owned(), rate.to_string()]);
    }
    argv
}

/// What a finished transfer said about itself.
#[derive(Debug)]
pub struct Report {
    /// Whether Multipath TCP was really in use to the end.
    pub mptcp: bool,
    /// Subflows at the end, the first one included.
    pub subflows: u32,
}

/// A transfer under way.
pub struct Sender {
    process: Running,
}

impl Sender {
    /// Sends from the sandbox's namespace `netns`.
    pub fn start(sandbox: &Sandbox, netns: &Netns, to: IpAddr, bytes: u64, rate: Option<u64>) -> Self {
        let program = traffic_program().display().to_string();
        Self::attach(sandbox.spawn_in(netns, &send_arguments(&program, to, bytes, rate)))
    }

    /// A sender that something else started, such as `runc exec`.
    pub fn attach(process: Running) -> Self {
        Self { process }
    }

    /// Waits until `bytes` are on their way.
    #[track_caller]
    pub fn wait_sent(&mut self, bytes: u64) {
        wait_for("progress of the transfer", PROGRESS_LIMIT, || {
            let running = self.process.is_running();
            let out = self.process.stdout();
            let sent = out.lines().filter_map(|line| line.strip_prefix("sent ")?.parse::<u64>().ok()).next_back();
            if sent.is_some_and(|sent| sent >= bytes) {
                return Some(());
            }
            assert!(running, "the transfer ended early: {out}{}", self.process.stderr());
            None
        });
    }

    /// Waits until every byte is written and the connection only held open (`--hold`).
    #[track_caller]
    pub fn wait_holding(&mut self) {
        wait_for("the end of the transfer's bytes", PROGRESS_LIMIT, || {
            assert!(self.process.is_running(), "{}{}", self.process.stdout(), self.process.stderr());
            self.process.stdout().contains("holding ").then_some(())
        });
    }

    /// Waits for the end; panics unless the receiver confirmed every byte.
    #[track_caller]
    pub fn finish(self, limit: Duration) -> Report {
        let out = self.process.wait(limit).ok();
        let done = out.lines().find(|line| line.starts_with("done ")).unwrap_or_else(|| panic!("no `done` in: {out}"));
        let subflows = done.split("subflows=").nth(1).and_then(|n| n.trim().parse().ok()).unwrap_or(1);
        Report { mptcp: done.contains("mptcp=yes"), subflows }
    }
}
