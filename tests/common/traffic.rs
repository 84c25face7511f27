//! Real Multipath TCP with a known number of bytes, by `examples/mptcp-traffic.rs`.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::sandbox::{Netns, Running, Sandbox};
use super::{LIMIT, traffic_program, wait_for};

/// Where a container's root filesystem has the program.
pub const PROGRAM: &str = "/mptcp-traffic";

/// The port of the servers; every server has a namespace of its own.
pub const PORT: u16 = 5000;

/// After how many seconds a sender ends itself: longer than any test waits, a slow guest's included.
const SENDER_TIMEOUT: &str = "600";

/// A server that receives, counts and acknowledges until it is dropped.
pub struct Server {
    process: Running,
}

impl Server {
    /// Starts a server in `netns` and waits until it listens.
    pub fn start(sandbox: &Sandbox, netns: &Netns) -> Self {
        Self::with(sandbox, netns, &[])
    }

    /// A server that hangs up after so many bytes of a connection.
    pub fn hanging_up_after(sandbox: &Sandbox, netns: &Netns, bytes: u64) -> Self {
        Self::with(sandbox, netns, &["--bytes", &bytes.to_string()])
    }

    /// A server that accepts one connection; others wait.
    pub fn of_one(sandbox: &Sandbox, netns: &Netns) -> Self {
        Self::with(sandbox, netns, &["--once"])
    }

    fn with(sandbox: &Sandbox, netns: &Netns, arguments: &[&str]) -> Self {
        let program = traffic_program().display().to_string();
        let port = PORT.to_string();
        let argv = [&[program.as_str(), "serve", "--port", &port], arguments].concat();
        Self::attach(sandbox.spawn_in(netns, &argv))
    }

    /// A server that something else started, such as a runtime inside a container.
    pub fn attach(mut process: Running) -> Self {
        wait_for("a server that listens", LIMIT, || {
            assert!(process.is_running(), "the server ended: {}{}", process.stdout(), process.stderr());
            process.stdout().contains("listening").then_some(())
        });
        Self { process }
    }

    /// Stops it: what is sent from now on stays unread.
    pub fn stop_reading(&self) {
        self.process.signal(Signal::SIGSTOP);
    }

    /// Lets it go on: nothing was over meanwhile, however long that was.
    pub fn go_on_reading(&self) {
        self.process.signal(Signal::SIGCONT);
    }

    /// [`Server::received`] when there are as many lines: they can come later than the sender's end.
    #[track_caller]
    pub fn wait_received(&self, lines: usize) -> Vec<String> {
        wait_for("the server's word", LIMIT, || Some(self.received()).filter(|all| all.len() >= lines))
    }

    /// The lines `received N bytes ...` until now, one per finished connection.
    pub fn received(&self) -> Vec<String> {
        self.process.lines().into_iter().filter(|line| line.starts_with("received")).collect()
    }
}

/// The arguments, program first, that send `bytes` to `to`; `rate` in bytes per second.
pub fn send_arguments(program: &str, to: IpAddr, bytes: u64, rate: Option<u64>) -> Vec<String> {
    let to = SocketAddr::new(to, PORT).to_string();
    let bytes = bytes.to_string();
    let mut argv = [program, "send", &to, "--bytes", &bytes, "--timeout", SENDER_TIMEOUT].map(str::to_owned).to_vec();
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

    /// A client that connects and says nothing.
    pub fn idle(sandbox: &Sandbox, netns: &Netns, to: IpAddr) -> Self {
        let program = traffic_program().display().to_string();
        let hold = ["--hold", SENDER_TIMEOUT].map(str::to_owned);
        let mut sender =
            Self::attach(sandbox.spawn_in(netns, &[&send_arguments(&program, to, 0, None)[..], &hold].concat()));
        sender.wait_holding();
        sender
    }

    /// A sender that something else started, such as `runc exec`.
    pub fn attach(process: Running) -> Self {
        Self { process }
    }

    /// How many bytes are on their way.
    pub fn sent(&self) -> u64 {
        let out = self.process.stdout();
        let sent = out.lines().filter_map(|line| line.strip_prefix("sent ")?.parse().ok()).next_back();
        sent.unwrap_or(0)
    }

    /// Waits until `bytes` are on their way.
    #[track_caller]
    pub fn wait_sent(&mut self, bytes: u64) {
        wait_for("progress of the transfer", LIMIT, || {
            let running = self.process.is_running();
            if self.sent() >= bytes {
                return Some(());
            }
            let (out, errors) = (self.process.stdout(), self.process.stderr());
            assert!(running, "the transfer ended early: {out}{errors}");
            None
        });
    }

    /// Waits until nothing more can be sent, because nobody reads it: there is no word of progress, which comes twice a
    /// second.
    #[track_caller]
    pub fn wait_blocked(&mut self) {
        let mut last = (self.sent(), Instant::now());
        wait_for("a sender that is kept waiting", LIMIT, || {
            assert!(self.process.is_running(), "{}{}", self.process.stdout(), self.process.stderr());
            let now = self.sent();
            if now != last.0 {
                last = (now, Instant::now());
            }
            (last.1.elapsed() > Duration::from_secs(2)).then_some(())
        });
    }

    /// Waits until every byte is written and the connection only held open (`--hold`).
    #[track_caller]
    pub fn wait_holding(&mut self) {
        wait_for("the end of the transfer's bytes", LIMIT, || {
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
