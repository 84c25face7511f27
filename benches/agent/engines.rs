//! What following adds until lxc-start, crun and podman return: starts that take turns.
//!
//! The containers have no interfaces: what is asked for eth1 stays pending, and needs the agent.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;

use crate::{Agent, ms, process, quantile, sh, wait};

/// Rounds that are not counted.
const WARM_UP: usize = 2;

/// No more rounds are begun after this time; on a fast machine it is not reached.
const PATIENCE: Duration = Duration::from_secs(25);

/// Where everything of a variant lies.
const DIRECTORY: &str = "/run/engines";

/// What is compared. Each has a ledger of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Variant {
    NoHook,
    Never,
    Running,
    Forked,
}

const VARIANTS: [Variant; 4] = [Variant::NoHook, Variant::Never, Variant::Running, Variant::Forked];

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Self::NoHook => "none",
            Self::Never => "never",
            Self::Running => "running",
            Self::Forked => "forked",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::NoHook => "no hook",
            Self::Never => "hook, follow=never",
            Self::Running => "hook, an agent runs",
            Self::Forked => "hook that forks the agent",
        }
    }

    fn directory(self) -> String {
        format!("{DIRECTORY}/{}", self.name())
    }

    fn state(self) -> String {
        format!("{DIRECTORY}/{}/state", self.name())
    }

    fn follow(self) -> &'static str {
        if self == Self::Never { "never" } else { "always" }
    }
}

/// A way to start a container.
#[derive(Clone, Copy)]
enum Start {
    /// `crun run` until the container has ended; for how long it lives, in milliseconds.
    Crun(&'static str),
    CrunDetached,
    CrunInTwoSteps,
    Lxc,
    Podman,
    PodmanDetached,
}

/// What is measured, how often, what the row says, and the program that it needs.
const STARTS: [(Start, usize, &str, &str); 7] = [
    (Start::Lxc, 40, "lxc-start", "lxc-start"),
    (Start::CrunDetached, 60, "crun run --detach", "crun"),
    (Start::CrunInTwoSteps, 60, "crun create, crun start", "crun"),
    (Start::Crun("0"), 60, "crun run, the container ends at once", "crun"),
    (Start::Crun("100"), 30, "crun run, the container lives for 100 ms", "crun"),
    (Start::PodmanDetached, 20, "podman run --detach", "podman"),
    (Start::Podman, 20, "podman run --rm, the container ends at once", "podman"),
];

/// A container that is ended by hand.
const LONG: &str = "100000";

/// Measures and prints, as far as the engines are there.
pub fn compare(hook: &Path, sleep: &Path) {
    let engines = Engines::new(hook, sleep);
    let mut agent = Agent::start(hook, &Variant::Running.state());
    let mut lines = Vec::new();
    let mut missing = Vec::new();
    for (start, rounds, what, program) in STARTS {
        if find(program).is_none() {
            missing.push(what);
            continue;
        }
        let times = engines.measure(start, rounds, agent.id());
        for (variant, own) in VARIANTS.iter().zip(&times) {
            let [none, never] = [&times[0], &times[1]].map(|other| format!("{:.2}", paired_ratio(own, other)));
            let (median, p95) = (ms(quantile(own, 0.5)), ms(quantile(own, 0.95)));
            let title = variant.title();
            lines.push(format!("| {what} | {title} | {} | {median} | {p95} | {none} | {never} |", own.len()));
        }
    }
    agent.kill();
    drop(engines);
    println!("\n## Starts\n");
    println!("| until this returns | with | samples | median | p95 | times no hook | times follow=never |");
    println!("|---|---|---:|---:|---:|---:|---:|");
    println!("{}", lines.join("\n"));
    if !missing.is_empty() {
        println!("\nnot installed (apt-get install lxc crun podman) and not measured: {}", missing.join("; "));
    }
}

/// The median of the quotients of what was measured in the same round.
pub fn paired_ratio(times: &[Duration], others: &[Duration]) -> f64 {
    let mut ratios: Vec<f64> = times.iter().zip(others).map(|(a, b)| a.as_secs_f64() / b.as_secs_f64()).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    ratios[(ratios.len() - 1) / 2]
}

/// The containers' files.
struct Engines {
    /// Of LXC's containers, whose cgroups everybody on the machine can see.
    prefix: String,
    /// Cgroups of LXC that were there before.
    cgroups: Vec<PathBuf>,
}

impl Engines {
    fn new(hook: &Path, sleep: &Path) -> Self {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
        let engines = Self { prefix: format!("mptcp-bench-{}", time.as_nanos()), cgroups: lxc_cgroups() };
        for variant in VARIANTS {
            let (directory, state) = (variant.directory(), variant.state());
            for inside in ["dev", "proc", "sys", "tmp"] {
                fs::create_dir_all(format!("{directory}/rootfs/{inside}")).expect("a root filesystem");
            }
            fs::copy(sleep, format!("{directory}/rootfs/sleep")).expect("copying the container's program");
            fs::DirBuilder::new().mode(0o700).create(&state).expect("a state directory");
            let arguments = ["mptcp-hook", "oci", "--state-dir", &state, "--follow", variant.follow()];
            let entry = json!({ "path": hook, "args": arguments });
            engines.lxc_container(variant, hook);
            fs::create_dir_all(format!("{directory}/hooks.d")).expect("a directory of hooks");
            if variant != Variant::NoHook {
                let hooks_d = json!({
                    "version": "1.0.0",
                    "hook": entry,
                    "when": { "always": true },
                    "stages": ["createRuntime", "poststop"],
                });
                fs::write(format!("{directory}/hooks.d/hook.json"), hooks_d.to_string()).expect("a file of hooks");
            }
            let hooks = match variant {
                Variant::NoHook => json!({}),
                _ => json!({ "createRuntime": [entry], "poststop": [entry] }),
            };
            for (name, time) in [("0", "0"), ("100", "100"), ("long", LONG)] {
                let namespaces = ["pid", "mount", "uts", "ipc", "network"].map(|kind| json!({ "type": kind }));
                let user = json!({ "uid": 0, "gid": 0 });
                let config = json!({
                    "ociVersion": "1.0.2",
                    "process": { "args": ["/sleep", time], "cwd": "/", "user": user, "noNewPrivileges": true },
                    "root": { "path": format!("{directory}/rootfs"), "readonly": true },
                    "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
                    "annotations": { "mptcp-hook/interface.eth1": "backup" },
                    "hooks": hooks,
                    "linux": { "namespaces": namespaces },
                });
                let bundle = format!("{directory}/bundle-{name}");
                fs::create_dir(&bundle).expect("a bundle");
                fs::write(format!("{bundle}/config.json"), config.to_string()).expect("config.json");
            }
        }
        if find("podman").is_some() {
            podman_configuration();
        }
        engines
    }

    fn lxc_name(&self, variant: Variant) -> String {
        format!("{}-{}", self.prefix, variant.name())
    }

    fn lxc_container(&self, variant: Variant, hook: &Path) {
        let (directory, name) = (variant.directory(), self.lxc_name(variant));
        let mut config = format!(
            "lxc.uts.name = bench\n\
             lxc.rootfs.path = dir:{directory}/rootfs\n\
             lxc.init.cmd = /sleep {LONG}\n\
             lxc.apparmor.profile = unconfined\n\
             lxc.mount.auto = proc:mixed sys:ro\n\
             lxc.hook.version = 1\n\
             lxc.net.0.type = empty\n"
        );
        if variant != Variant::NoHook {
            let (hook, state, follow) = (hook.display(), variant.state(), variant.follow());
            let common = format!("{hook} lxc --state-dir {state} --follow {follow}");
            config += &format!("lxc.hook.start-host = {common} --interface eth1=backup\n");
            config += &format!("lxc.hook.post-stop = {common}\n");
        }
        fs::create_dir_all(format!("{directory}/lxc/{name}")).expect("a directory of LXC's");
        fs::write(format!("{directory}/lxc/{name}/config"), config).expect("a configuration of LXC's");
    }

    /// The times of each variant, one of each per round.
    fn measure(&self, start: Start, rounds: usize, agent: u32) -> [Vec<Duration>; VARIANTS.len()] {
        let mut times: [Vec<Duration>; VARIANTS.len()] = Default::default();
        let begin = Instant::now();
        for round in 0..WARM_UP + rounds {
            // What ran just before counts; nobody may always come after the same one.
            for position in 0..VARIANTS.len() {
                let forth = (round + position) % VARIANTS.len();
                let index = if round / VARIANTS.len() % 2 == 0 { forth } else { VARIANTS.len() - 1 - forth };
                let variant = VARIANTS[index];
                let time = self.start(start, variant);
                if variant == Variant::Forked {
                    let file = format!("{}/agent", variant.state());
                    // It may have come and gone with `crun run`.
                    let may_be_gone = matches!(start, Start::Crun(_));
                    wait("the hook's agent says that it runs", || may_be_gone || Path::new(&file).exists());
                }
                self.end(start, variant);
                end_all_but(agent);
                if round >= WARM_UP {
                    times[index].push(time);
                }
            }
            if begin.elapsed() > PATIENCE && !times[0].is_empty() {
                break;
            }
        }
        times
    }

    /// The time until whatever starts it has returned.
    fn start(&self, start: Start, variant: Variant) -> Duration {
        let (directory, name) = (variant.directory(), variant.name());
        let run = |line: &str| command(line, process::run).time;
        let bundle = |which: &str| format!("--bundle {directory}/bundle-{which} {name}");
        match start {
            Start::Crun(time) => run(&format!("crun --cgroup-manager=disabled run {}", bundle(time))),
            Start::CrunDetached => run(&format!("crun --cgroup-manager=disabled run --detach {}", bundle("long"))),
            Start::CrunInTwoSteps => {
                run(&format!("crun --cgroup-manager=disabled create {}", bundle("long")))
                    + run(&format!("crun --cgroup-manager=disabled start {name}"))
            }
            Start::Lxc => run(&format!("lxc-start --daemon -P {directory}/lxc -n {}", self.lxc_name(variant))),
            Start::Podman => run(&podman_run(variant, "--rm", "0")),
            Start::PodmanDetached => run(&podman_run(variant, "--detach", LONG)),
        }
    }

    /// Ends and removes the container.
    fn end(&self, start: Start, variant: Variant) {
        let (directory, name) = (variant.directory(), variant.name());
        let line = match start {
            Start::Crun(_) | Start::Podman => return,
            Start::CrunDetached | Start::CrunInTwoSteps => {
                format!("crun --cgroup-manager=disabled delete --force {name}")
            }
            Start::Lxc => format!("lxc-stop --kill -P {directory}/lxc -n {}", self.lxc_name(variant)),
            Start::PodmanDetached => format!("podman rm --force --time 0 {name}"),
        };
        command(&line, process::output);
    }
}

impl Drop for Engines {
    /// Removes the cgroups that LXC has left.
    fn drop(&mut self) {
        assert_eq!(std::process::id(), 1, "the first process of a pid namespace");
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        wait("everything has ended", || {
            reap();
            others().is_empty()
        });
        for cgroup in lxc_cgroups().iter().filter(|cgroup| !self.cgroups.contains(cgroup)) {
            // One of somebody else's container is busy.
            let _ = fs::remove_dir(cgroup);
        }
    }
}

fn lxc_cgroups() -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/fs/cgroup").expect("the cgroups").filter_map(Result::ok);
    let names = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("lxc."));
    names.map(|entry| entry.path()).collect()
}

fn podman_run(variant: Variant, options: &str, time: &str) -> String {
    let (directory, name) = (variant.directory(), variant.name());
    format!(
        "podman --hooks-dir {directory}/hooks.d run {options} --name {name} --network none --annotation \
         mptcp-hook/interface.eth1=backup --rootfs {directory}/rootfs /sleep {time}"
    )
}

/// Everything of podman's below /run, in memory; the limits are what a root without CAP_SYS_RESOURCE may set.
fn podman_configuration() {
    sh("mount -t tmpfs tmpfs /etc/containers");
    let storage = "[storage]\ndriver = \"vfs\"\ngraphroot = \"/run/podman/storage\"\nrunroot = \"/run/podman/run\"\n";
    let containers = "[engine]\nruntime = \"crun\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n\
                      [containers]\ncgroups = \"disabled\"\npids_limit = 0\nlog_driver = \"k8s-file\"\n\
                      default_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\n";
    fs::write("/etc/containers/storage.conf", storage).expect("storage.conf");
    fs::write("/etc/containers/containers.conf", containers).expect("containers.conf");
}

/// Runs a command line without quotes; no name in it has a space.
fn command<T>(line: &str, how: impl FnOnce(&Path, &[String], &[u8]) -> T) -> T {
    let mut words = line.split_whitespace();
    let program = words.next().and_then(find).expect("an installed program");
    how(&program, &words.map(String::from).collect::<Vec<_>>(), b"")
}

/// Ends the agent that a hook has forked, and waits until nobody else is left but the other one.
fn end_all_but(agent: u32) {
    wait("the container's processes are gone", || {
        reap();
        let others: Vec<u32> = others().into_iter().filter(|pid| *pid != agent).collect();
        for pid in others.iter().filter(|pid| is_agent(**pid)) {
            // It may just have ended.
            let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
        }
        others.is_empty()
    });
    let _ = fs::remove_file(format!("{}/agent", Variant::Forked.state()));
}

/// This program is the first process of its pid namespace: orphans are its own.
fn reap() {
    while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
}

/// The processes in this pid namespace, without this one.
fn others() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()));
    pids.filter(|pid| *pid != std::process::id()).collect()
}

/// Whether a hook has forked it.
fn is_agent(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "mptcp-agent")
}

fn find(program: &str) -> Option<PathBuf> {
    ["/usr/local/bin", "/usr/bin", "/usr/local/sbin", "/usr/sbin", "/bin"]
        .map(|directory| Path::new(directory).join(program))
        .into_iter()
        .find(|path| path.exists())
}
