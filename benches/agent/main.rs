//! The agent with 1,000 containers: memory, how soon an address has its endpoint, what it costs when nothing happens, how
//! soon a killed container's interfaces are gone; and what following adds until lxc-start, crun and podman return. Needs
//! root; run it by `benches/run`, which builds what is needed.
//!
//! Everything happens in mount, network, pid and ipc namespaces of its own and is gone with them.

mod containers;
mod engines;
#[path = "../start_path/process.rs"]
#[expect(dead_code, reason = "the other benchmark uses the rest")]
mod process;

use std::collections::BTreeSet;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use containers::Containers;

/// Containers that are followed at once.
const FOLLOWED: usize = 1000;

/// Addresses that are given to containers.
const CHANGES: usize = 1000;

/// Containers of each kind that are killed.
const KILLS: usize = 100;

/// How soon a killed container's veth should be gone.
const SOON: Duration = Duration::from_millis(50);

/// How long the kernel is left alone after a container was killed. One worker takes all namespaces down (`cleanup_net`), and
/// still waits for RCU when the veth is gone already: the next one would wait for that, too.
const BETWEEN_KILLS: Duration = Duration::from_millis(60);

/// How long the idle agent is watched.
const IDLE: Duration = Duration::from_secs(10);

/// Nothing that is waited for may take longer.
const LIMIT: Duration = Duration::from_secs(30);

/// The ledger.
const STATE: &str = "/run/ledger";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let inside = arguments.iter().any(|argument| argument == "inside");
    if !inside && !arguments.iter().any(|argument| argument == "--bench") {
        // `cargo test --all-targets` starts benchmarks, too.
        println!("nothing is measured; use benches/run");
        return;
    }
    let path = |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name}: use benches/run")));
    let (hook, init, sleep) = (path("BENCH_HOOK"), path("BENCH_DRAIN"), path("BENCH_SLEEP"));
    if !inside {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--net", "--pid", "--ipc", "--uts", "--propagation=private", "--mount-proc"]);
        unshare.args(["--fork", "--kill-child", "--"]).arg(std::env::current_exe().expect("the program's own path"));
        panic!("cannot run unshare: {}", unshare.arg("inside").exec());
    }
    prepare();
    println!("\n## The agent\n");
    let mut table = Table::new();
    follow_many(&hook, &init, &mut table);
    table.print();
    engines::compare(&hook, &sleep);
}

/// A /run, a /sys and a policy's directory of its own, and a journal that listens.
fn prepare() {
    sh("mount -t tmpfs -o mode=755 tmpfs /run && mkdir -p /run/systemd/journal");
    sh("[ ! -d /etc/mptcp-hook ] || mount -t tmpfs -o mode=755 tmpfs /etc/mptcp-hook");
    sh("mount -t sysfs sysfs /sys && mount -t cgroup2 cgroup2 /sys/fs/cgroup; ip link set lo up");
    let journal = UnixDatagram::bind("/run/systemd/journal/socket").expect("a socket for the journal");
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while journal.recv(&mut buffer).is_ok() {}
    });
}

fn follow_many(hook: &Path, init: &Path, table: &mut Table) {
    std::fs::DirBuilder::new().mode(0o700).create(STATE).expect("a state directory");
    let mut agent = Agent::start(hook, STATE);
    agent.wait_until_quiet();
    let before = agent.status();

    // All of them have eth1, up, without an address: pending, therefore followed. The others are nobody's.
    let mut containers = Containers::new(FOLLOWED + KILLS, init);
    for container in containers.followed(FOLLOWED) {
        process::run(hook, &container.apply(STATE), b"");
    }
    wait("the agent follows all of them", || agent.follows(FOLLOWED));
    agent.wait_until_quiet();

    // Once more from nothing, all in the ledger already: as after a crash or an update.
    agent.kill();
    let begin = Instant::now();
    agent = Agent::start(hook, STATE);
    wait("the agent follows all of them", || agent.follows(FOLLOWED));
    let listening = begin.elapsed();
    let cpu = agent.wait_until_quiet();
    let status = agent.status();
    table.row("start with 1,000 containers in the ledger, until it listens to all", ms(listening), "");
    table.row("CPU time of that, all of them looked at", ms(cpu), "");
    table.row("memory, nobody followed", mib(before.memory), "");
    table.row("memory, 1,000 followed", mib(status.memory), "");

    let (idle_cpu, woken) = agent.watch(IDLE);
    table.row("CPU time, idle for 10 s", ms(idle_cpu), "");
    table.row("wake-ups, idle for 10 s", woken.to_string(), "");

    let (came, went) = change_addresses(&mut containers);
    table.times("RTM_NEWADDR until the endpoint is there", &came);
    table.times("RTM_DELADDR until the endpoint is gone", &went);
    agent.wait_until_quiet();
    let status = agent.status();
    table.row("memory after these changes", mib(status.memory), "");
    table.row("highest memory (VmHWM)", mib(status.peak), "");
    let (idle_cpu_after, woken_after) = agent.watch(IDLE);
    table.row("wake-ups, idle for 10 s after these changes", woken_after.to_string(), "");

    let (mut with, mut without) = (Vec::new(), Vec::new());
    for number in 0..KILLS {
        let mut followed = (number, &mut with);
        let mut other = (FOLLOWED + number, &mut without);
        // Each comes first in every other pair.
        if number % 2 == 0 {
            std::mem::swap(&mut followed, &mut other);
        }
        for (number, times) in [other, followed] {
            times.push(containers.kill(number));
            std::thread::sleep(BETWEEN_KILLS);
        }
    }
    table.kills(&with, &without);

    table.aim("memory with 1,000 followed under 16 MiB", status.peak < 16 << 10);
    table.aim("RTM_NEWADDR to endpoint under 20 ms (p99)", quantile(&came, 0.99) < Duration::from_millis(20));
    table.aim("no periodic wake-ups", woken == 0 && woken_after == 0 && (idle_cpu + idle_cpu_after).is_zero());
    table.aim("a killed container's veth gone within 50 ms (p99)", quantile(&with, 0.99) < SOON);
    let ratio = engines::paired_ratio(&with, &without);
    table.aim("and as soon as one's that nobody follows (paired, within a tenth)", ratio < 1.1);
    agent.kill();
}

/// Gives addresses to containers by chance; one that has one already loses it first. How long the endpoints took.
fn change_addresses(containers: &mut Containers) -> (Vec<Duration>, Vec<Duration>) {
    let (mut came, mut went) = (Vec::new(), Vec::new());
    let mut have = BTreeSet::new();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..CHANGES {
        let number = (random.next() % FOLLOWED as u64) as usize;
        let container = containers.get(number);
        if !have.insert(number) {
            went.push(container.change_address(false));
        }
        came.push(container.change_address(true));
    }
    (came, went)
}

/// Numbers that look like chance and are the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// An agent that was started by hand.
pub struct Agent(Child);

/// What /proc says of it, in KiB.
struct Status {
    memory: u64,
    peak: u64,
}

impl Agent {
    /// Starts it and waits until it says that it runs.
    pub fn start(hook: &Path, state: &str) -> Self {
        let mut command = Command::new(hook);
        command.args(["agent", "--state-dir", state]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("starting the agent");
        let own = format!("\"pid\":{}", child.id());
        wait("the agent runs", || {
            std::fs::read_to_string(format!("{state}/agent")).is_ok_and(|text| {
                text.split(',').any(|part| part.trim_matches(['{', '}', ' ', '\n']).replace(' ', "") == own)
            })
        });
        Self(child)
    }

    /// Its pid.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        self.0.kill().expect("ending the agent");
        self.0.wait().expect("waiting for the agent's end");
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.0.id())).expect("the agent runs")
    }

    fn number(&self, name: &str) -> u64 {
        let status = self.file("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line of /proc/PID/status");
        line.trim_matches([':', ' ', '\t']).trim_end_matches(" kB").trim().parse().expect("a number")
    }

    fn status(&self) -> Status {
        Status { memory: self.number("VmRSS"), peak: self.number("VmHWM") }
    }

    /// Processor time, in the nanoseconds of the scheduler.
    fn cpu(&self) -> Duration {
        let stat = self.file("schedstat");
        Duration::from_nanos(stat.split(' ').next().and_then(|n| n.parse().ok()).expect("a time"))
    }

    /// How often it went to sleep.
    fn sleeps(&self) -> u64 {
        self.number("voluntary_ctxt_switches")
    }

    /// Whether it has the descriptor that each container takes, its pidfd.
    fn follows(&self, containers: usize) -> bool {
        let directory = std::fs::read_dir(format!("/proc/{}/fd", self.0.id())).expect("the agent's descriptors");
        directory.count() > containers
    }

    /// Waits until it has done nothing for two seconds: it looks at the settings a second time after one. Gives its
    /// processor time.
    fn wait_until_quiet(&self) -> Duration {
        let (mut last, mut since) = (self.cpu(), Instant::now());
        wait("the agent comes to rest", || {
            let now = self.cpu();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(20));
            since.elapsed() > Duration::from_secs(2)
        });
        last
    }

    /// Leaves it alone; gives its processor time and how often it woke up.
    fn watch(&self, time: Duration) -> (Duration, u64) {
        let before = (self.cpu(), self.sleeps());
        std::thread::sleep(time);
        (self.cpu() - before.0, self.sleeps() - before.1)
    }
}

/// The report.
struct Table {
    lines: Vec<String>,
    kills: Vec<String>,
    aims: Vec<String>,
}

impl Table {
    fn new() -> Self {
        let lines = vec!["| | median or value | p99 |".into(), "|---|---:|---:|".into()];
        let (kills, aims) = (Vec::new(), Vec::new());
        Self { lines, kills, aims }
    }

    fn row(&mut self, what: &str, value: String, p99: &str) {
        self.lines.push(format!("| {what} | {value} | {p99} |"));
    }

    fn times(&mut self, what: &str, times: &[Duration]) {
        let what = format!("{what} ({} samples)", times.len());
        self.row(&what, ms(quantile(times, 0.5)), &ms(quantile(times, 0.99)));
    }

    /// A table of its own: containers that were killed in pairs.
    fn kills(&mut self, followed: &[Duration], others: &[Duration]) {
        let what = "from SIGKILL of an init until its veth, and with it its namespace, is gone";
        self.kills.push(format!("| {what} | pairs | median | p99 | within 50 ms | times not followed |"));
        self.kills.push("|---|---:|---:|---:|---:|---:|".into());
        for (who, times) in [("followed by the agent", followed), ("not followed", others)] {
            let (count, median, p99) = (times.len(), ms(quantile(times, 0.5)), ms(quantile(times, 0.99)));
            let soon = times.iter().filter(|time| **time < SOON).count();
            let ratio = engines::paired_ratio(times, others);
            self.kills.push(format!("| {who} | {count} | {median} | {p99} | {soon} | {ratio:.2} |"));
        }
    }

    fn aim(&mut self, what: &str, reached: bool) {
        self.aims.push(format!("{} {what}", if reached { "reached:" } else { "MISSED: " }));
    }

    fn print(&self) {
        println!("{}\n\n{}\n\n{}", self.lines.join("\n"), self.kills.join("\n"), self.aims.join("\n"));
    }
}

/// The value that `part` of the times do not exceed.
pub fn quantile(times: &[Duration], part: f64) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[((times.len() - 1) as f64 * part).round() as usize]
}

/// Milliseconds, for people.
pub fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1000.0)
}

fn mib(kib: u64) -> String {
    format!("{:.2} MiB", kib as f64 / 1024.0)
}

/// Asks again and again, as often as is possible without taking the processor from the agent.
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Runs a shell script that must succeed; gives its output.
pub fn sh(script: &str) -> String {
    process::output(Path::new("/bin/sh"), &["-ec".into(), script.into()], b"")
}
