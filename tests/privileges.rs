//! What the hook may do while it runs, and what of its caller reaches it: capabilities at each phase, descriptors,
//! the environment, programs.
//!
//! A hook is held in a phase by what it waits for: standard input that does not end, a lock that somebody has, a
//! standard error that nobody reads. Then /proc tells what it has.

mod common;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::*;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// CAP_DAC_READ_SEARCH, CAP_NET_BROADCAST, CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN (`include/uapi/linux/capability.h`).
const WORKING: u64 = 1 << 2 | 1 << 11 | 1 << 12 | 1 << 19 | 1 << 21;

/// An ordinary user, for rootless containers.
const USER: &str = "61235";

/// Runs the rest of the line with more than the hook needs: inheritable and ambient capabilities, open files.
const GENEROUS: [&str; 9] = [
    "setpriv",
    "--inh-caps",
    "+net_raw,+net_admin",
    "--ambient-caps",
    "+net_raw",
    "bash",
    "-ec",
    "exec 7</etc/hostname 8<>/dev/null 700</proc; exec \"$@\"",
    "generous",
];

/// What /proc/PID/status says of a process's rights.
#[derive(Debug, PartialEq, Eq)]
struct Rights {
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
    bounding: u64,
    no_new_privs: bool,
}

impl Rights {
    /// Those in force, and no way to any others.
    fn only(capabilities: u64) -> Self {
        Self {
            effective: capabilities,
            permitted: capabilities,
            inheritable: 0,
            ambient: 0,
            bounding: 0,
            no_new_privs: true,
        }
    }

    fn parse(status: &str) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {name} in {status}")).trim()
        };
        let set = |name| u64::from_str_radix(field(name), 16).expect("a set of capabilities");
        Self {
            effective: set("CapEff"),
            permitted: set("CapPrm"),
            inheritable: set("CapInh"),
            ambient: set("CapAmb"),
            bounding: set("CapBnd"),
            no_new_privs: field("NoNewPrivs") == "1",
        }
    }
}

/// A hook that waits for something. Dropping it ends it.
struct Held {
    /// The hook, or the program that starts it.
    child: Process,
    pid: i32,
}

impl Held {
    /// Starts `BEFORE mptcp-hook ARGUMENTS` and waits until the hook sleeps.
    fn start(sandbox: &Sandbox, before: &[&str], arguments: &[&str], streams: [Stdio; 3]) -> Self {
        let program = hook().display().to_string();
        Self::start_program(sandbox, &[before, &[&program], arguments].concat(), streams)
    }

    fn start_program(sandbox: &Sandbox, argv: &[&str], streams: [Stdio; 3]) -> Self {
        let [stdin, stdout, stderr] = streams;
        let child = sandbox.start_in(&sandbox.open_netns(&Netns::Host), argv, |command| {
            command.stdin(stdin).stdout(stdout).stderr(stderr);
        });
        let mut held = Self { child, pid: 0 };
        held.pid = held.child.id() as i32;
        // One that has ended already may be gone from below what started it.
        held.pid = wait_for("the hook's process", LIMIT, || {
            find_hook(held.pid).or_else(|| held.has_ended().then_some(held.pid))
        });
        held.wait_asleep();
        held
    }

    /// Waits until the hook sleeps: for input, a lock, a reader of what it says. Or until it has ended, which whoever looks
    /// at it notices.
    fn wait_asleep(&self) {
        wait_until("a hook that sleeps", LIMIT, || {
            let stat = self.read("stat");
            self.has_ended() || stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('S'))
        });
    }

    /// What `look` sees of a hook that waits for its standard input. It does that for five seconds, whatever the policy
    /// says: on a slow machine a look may come too late, and another hook is looked at.
    fn while_reading<T>(sandbox: &Sandbox, before: &[&str], look: impl Fn(&Self) -> Option<T>) -> T {
        wait_for("a look at a hook that reads", LIMIT, || {
            let (stdin, runtime) = UnixStream::pair().expect("two joined sockets");
            let streams = [Stdio::from(OwnedFd::from(stdin)), Stdio::null(), Stdio::null()];
            let hook = Self::start(sandbox, before, &["oci"], streams);
            let seen = look(&hook);
            drop(runtime);
            match hook.wait() {
                // A state that is empty: it has been reading until now.
                2 => Some(seen.expect("a hook that is there")),
                1 => None,
                status => panic!("it ended with status {status}"),
            }
        })
    }

    /// Waits until it writes what nobody reads.
    fn wait_writing(&self) {
        let write = libc::SYS_write.to_string();
        wait_until("a hook that reports", LIMIT, || {
            // "running", or the system call's number and what it was given (proc(5)).
            let call = self.read("syscall");
            assert!(!call.is_empty(), "the hook has ended");
            call.split(' ').next() == Some(&write)
        });
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.pid)).unwrap_or_default()
    }

    fn rights(&self) -> Rights {
        Rights::parse(&self.read("status"))
    }

    /// Its descriptors and what they lead to; none if it has ended.
    fn descriptors(&self) -> Option<Vec<(i32, String)>> {
        let directory = std::fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?;
        let mut descriptors: Vec<_> = directory
            .filter_map(|entry| {
                let entry = entry.expect("a descriptor");
                let target = std::fs::read_link(entry.path()).ok()?;
                Some((entry.file_name().to_str()?.parse().ok()?, target.display().to_string()))
            })
            .collect();
        descriptors.sort();
        Some(descriptors)
    }

    /// Its network namespace.
    fn netns(&self) -> PathBuf {
        self.netns_if_there().expect("the hook's network namespace")
    }

    /// Its network namespace; none if it has ended.
    fn netns_if_there(&self) -> Option<PathBuf> {
        std::fs::read_link(format!("/proc/{}/ns/net", self.pid)).ok()
    }

    /// Whether it is over. It is not waited for, so /proc has it still.
    fn has_ended(&self) -> bool {
        self.read("stat").rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
    }

    /// Waits for its end; gives the exit status.
    fn wait(mut self) -> i32 {
        let status = wait_for("the end of the hook", LIMIT, || self.child.try_wait().expect("waiting for the hook"));
        status.code().expect("an exit status")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // What started it is ended after it.
        if matches!(self.child.try_wait(), Ok(None)) && self.pid != 0 {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

/// The process that runs the hook by now: `pid`, or one below it.
fn find_hook(pid: i32) -> Option<i32> {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    if name.trim() == "mptcp-hook" {
        return Some(pid);
    }
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find_map(find_hook)
}

/// A stream that takes nothing until it is read.
struct Full {
    reader: UnixStream,
    filled: usize,
}

impl Full {
    fn new() -> (Self, Stdio) {
        let (reader, mut writer) = UnixStream::pair().expect("two joined sockets");
        writer.set_nonblocking(true).expect("a non-blocking socket");
        let mut filled = 0;
        loop {
            match writer.write(&[b'.'; 4096]) {
                Ok(written) => filled += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("filling a socket: {error}"),
            }
        }
        writer.set_nonblocking(false).expect("a blocking socket");
        (Self { reader, filled }, Stdio::from(OwnedFd::from(writer)))
    }

    /// Lets the writer go on; gives what it has written.
    fn drain(mut self) -> String {
        self.reader.set_read_timeout(Some(LIMIT)).expect("a time limit for a socket");
        let mut bytes = Vec::new();
        self.reader.read_to_end(&mut bytes).expect("what the hook writes");
        String::from_utf8_lossy(&bytes[self.filled..]).into_owned()
    }
}

/// Takes every lock of the ledger.
fn hold_locks(sandbox: &Sandbox, state_directory: &str) -> Vec<Flock<File>> {
    let directory = sandbox.outside(&format!("{state_directory}/locks"));
    let take = |path: PathBuf| {
        let file = File::options().read(true).write(true).open(&path).expect("a lock of the ledger");
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno).expect("a lock that is free")
    };
    let entries = std::fs::read_dir(directory).expect("the ledger's locks");
    let locks: Vec<_> = entries.map(|entry| take(entry.expect("a lock of the ledger").path())).collect();
    assert!(locks.len() >= 2, "one for the container and one for its namespace");
    locks
}

fn stdin_of(state: &Value) -> Stdio {
    let (reader, mut writer) = UnixStream::pair().expect("two joined sockets");
    writer.write_all(state.to_string().as_bytes()).expect("writing a state");
    Stdio::from(OwnedFd::from(reader))
}

/// From the first moment to the last: reading, working in the container's namespace, reporting.
#[test]
fn each_phase_has_the_capabilities_that_it_needs() {
    require("setpriv", "util-linux");
    let sandbox = Sandbox::new();
    let container = Bare::new(&sandbox, "web");
    container.oci(&["--limit", "subflows=6"]).ok();

    // The caller has much more, and the means to tell.
    let caller = Rights::parse(&sandbox.run(&[&GENEROUS[..], &["cat", "/proc/self/status"]].concat()).ok());
    assert_eq!(caller.effective & WORKING, WORKING, "{caller:?}");
    for more in [caller.effective & !WORKING, caller.inheritable, caller.ambient, caller.bounding] {
        assert_ne!(more, 0, "{caller:?}");
    }
    assert!(!caller.no_new_privs);

    let (rights, host) = Held::while_reading(&sandbox, &GENEROUS, |hook| Some((hook.rights(), hook.netns_if_there()?)));
    assert_eq!(rights, Rights::only(WORKING), "while it reads the state");

    let (stderr, full) = Full::new();
    let streams = [stdin_of(&container.state()), Stdio::null(), full];
    let locks = hold_locks(&sandbox, "/run/mptcp-hook");
    let hook = Held::start(&sandbox, &GENEROUS, &["oci", "--sysctl", "stale_loss_cnt=9"], streams);
    let inside = std::fs::read_link(sandbox.netns_path(&container.netns())).expect("the container's namespace");
    assert_ne!(inside, host);
    wait_until("a hook in the container's namespace", LIMIT, || hook.netns() == inside);
    hook.wait_asleep();
    assert_eq!(hook.rights(), Rights::only(WORKING), "while it works");

    drop(locks);
    wait_until("a hook that has come back", LIMIT, || hook.netns() == host);
    hook.wait_writing();
    assert_eq!(hook.rights(), Rights::only(0), "while it reports");
    let said = stderr.drain();
    assert!(said.starts_with("mptcp-hook: "), "{said}");
    assert_eq!(hook.wait(), 0);
    assert_eq!(sandbox.status_of(container.id())["live"], true);
}

/// As the hook has them, for as long as it runs.
#[test]
fn the_agent_has_the_capabilities_that_it_needs() {
    require("setpriv", "util-linux");
    let sandbox = Sandbox::new();
    let container = Bare::new(&sandbox, "web");
    let streams = [Stdio::null(), Stdio::null(), Stdio::null()];
    let agent = Held::start(&sandbox, &GENEROUS, &["agent"], streams);
    container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    // It has been in the container's namespace by then.
    wait_until("it is followed", LIMIT, || sandbox.status_of(container.id())["followed"] == true);
    agent.wait_asleep();
    assert_eq!(agent.rights(), Rights::only(WORKING));
}

/// A probe makes a connection that a container's peer answers: next to nothing can be done by it.
#[test]
fn a_probe_has_one_capability() {
    require("setpriv", "util-linux");
    let sandbox = Sandbox::new();
    let World { paths, web, .. } = World::wired(&sandbox, &Wiring::new().without_second_route());
    web.oci(&["--interface", "eth1=backup", "--follow", "never"]).ok();
    // Its second path hangs, which is waited for.
    let _server = Server::start(&sandbox, paths.server());
    let probe = ["doctor", web.id(), "--probe", "10.0.0.1:5000"];
    let inside = std::fs::read_link(sandbox.netns_path(&web.netns())).expect("the container's namespace");
    let connected = || {
        let sockets = sandbox.inside(&ctr(), || std::fs::read_to_string("/proc/thread-self/net/tcp"));
        // The server's address, and the state: established.
        sockets.expect("the sockets").lines().any(|line| line.contains(" 0100000A:1388 01 "))
    };
    // For some seconds: on a slow machine a look may come too late, and another probe is looked at.
    let rights = wait_for("a look at a probe", LIMIT, || {
        let streams = [Stdio::null(), Stdio::null(), Stdio::null()];
        let doctor = Held::start(&sandbox, &GENEROUS, &probe, streams);
        let is_under_way = || doctor.netns_if_there().as_ref() == Some(&inside) && connected();
        wait_until("a probe that is under way, or over", LIMIT, || is_under_way() || doctor.has_ended());
        let rights = doctor.rights();
        is_under_way().then_some(rights)
    });
    assert_eq!(rights, Rights::only(1 << 12), "CAP_NET_ADMIN");
}

/// Whatever there is to report, nobody needs a right for it.
#[test]
fn every_report_is_made_without_capabilities() {
    let sandbox = Sandbox::new();
    let container = Bare::new(&sandbox, "web");
    let stale = Bare::new(&sandbox, "stale");
    for container in [&container, &stale] {
        container.oci(&["--limit", "subflows=6"]).ok();
    }
    let host = Bare::in_netns(&sandbox, "host", &Netns::Host);
    let mut gone = container.state();
    gone["pid"] = json!(4_000_000);
    let mut stopped = container.state();
    stopped["status"] = json!("stopped");

    let report = |state: &Value, arguments: &[&str], code: i32, says: &str| {
        let (out, full) = Full::new();
        let streams = match arguments[0] {
            "status" => [Stdio::null(), full, Stdio::null()],
            _ => [stdin_of(state), Stdio::null(), full],
        };
        let hook = Held::start(&sandbox, &[], arguments, streams);
        hook.wait_writing();
        assert_eq!(hook.rights(), Rights::only(0), "{arguments:?}");
        let said = out.drain();
        assert!(said.contains(says), "`{says}` is not in {said}");
        assert_eq!(hook.wait(), code, "{arguments:?}: {said}");
    };
    let nothing = json!({});
    report(&container.state(), &["oci", "--sysctl", "stale_loss_cnt=9"], 0, container.id());
    report(&host.state(), &["oci", "--limit", "subflows=7"], 3, "refused");
    report(&gone, &["oci", "--limit", "subflows=7"], 1, "4000000");
    report(&container.state(), &["oci", "--limit", "subflows=9000"], 2, "9000");
    report(&nothing, &["status", "--json"], 0, "\"containers\"");
    report(&nothing, &["apply", container.id(), "--limit", "subflows=8"], 0, container.id());
    report(&nothing, &["release", "nobody-knows-it"], 2, "nobody-knows-it");
    report(&nothing, &["release", stale.id()], 0, "released");
    // Its process is there, for as long as it is waited for: the id is in use.
    sandbox.policy("deadline = 0.5\n");
    report(&stopped, &["oci"], 0, "alive");
    let mut container = container;
    container.kill();
    report(&nothing, &["release", "--stale"], 0, "released");
    sandbox.assert_ledger_is_empty();
}

/// Entering an unprivileged user's container gives all capabilities of its user namespace, and they are dropped, too.
#[test]
fn an_unprivileged_users_hook_has_the_capabilities_that_it_needs() {
    require("setpriv", "util-linux");
    let sandbox = Sandbox::new();
    sandbox.sh(&format!("mkdir -p /run/user/{USER}; chmod 700 /run/user/{USER}; chown {USER}:{USER} /run/user/{USER}"));
    let program = readable_hook(&sandbox).display().to_string();
    let as_user = ["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"];
    let child = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo $$; exec sleep 1000"];
    let process = sandbox.spawn(&[&as_user[..], &child].concat());
    let pid: u32 = wait_for("the pid of a process", LIMIT, || {
        let out = process.stdout();
        out.ends_with('\n').then(|| out.trim().parse().expect("a pid"))
    });
    let id = sandbox.name("rootless");
    let state = json!({ "ociVersion": "1.0.2", "id": id, "status": "created", "pid": pid, "bundle": sandbox.dir() });

    let (stderr, full) = Full::new();
    let argv = [&as_user[..], &[&program, "oci", "--limit", "subflows=6"]].concat();
    // The ledger's locks are there from then on.
    sandbox.run_with_input(&argv, state.to_string().as_bytes()).ok();
    let locks = hold_locks(&sandbox, &format!("/run/user/{USER}/mptcp-hook"));
    let hook = Held::start_program(&sandbox, &argv, [stdin_of(&state), Stdio::null(), full]);
    let inside = std::fs::read_link(sandbox.netns_path(&Netns::Pid(pid))).expect("the container's namespace");
    wait_until("a hook in the container's namespace", LIMIT, || hook.netns() == inside);
    hook.wait_asleep();
    assert_eq!(hook.rights(), Rights::only(WORKING), "while it works");
    drop(locks);
    hook.wait_writing();
    assert_eq!(hook.netns(), inside, "there is no way back for a user's hook");
    assert_eq!(hook.rights(), Rights::only(0));
    let said = stderr.drain();
    assert_eq!(hook.wait(), 0, "{said}");
    assert_eq!(sandbox.sh_in(&Netns::Pid(pid), "ip mptcp limits show | grep -o 'subflows [0-9]*'"), "subflows 6");
}

/// What the caller has open is closed before anything is read, also where close_range(2) is missing.
#[test]
fn descriptors_of_the_caller_are_closed() {
    require("strace", "strace");
    let sandbox = Sandbox::new();
    let listed = sandbox.run(&[&GENEROUS[..], &["ls", "/proc/self/fd"]].concat()).ok();
    for descriptor in ["7", "8", "700"] {
        assert!(listed.lines().any(|line| line == descriptor), "{listed}");
    }
    let trace = sandbox.dir().join("trace").display().to_string();
    let old_kernel =
        ["strace", "-qq", "-o", &trace, "-e", "trace=close_range", "-e", "inject=close_range:error=ENOSYS"];
    for tracer in [&[][..], &old_kernel] {
        let before = [&GENEROUS[..], tracer].concat();
        let descriptors = Held::while_reading(&sandbox, &before, Held::descriptors);
        let numbers: Vec<i32> = descriptors.into_iter().map(|(number, _)| number).collect();
        assert_eq!(numbers, [0, 1, 2], "with {tracer:?}");
    }
    let trace = std::fs::read_to_string(&trace).expect("the trace");
    assert!(trace.contains("ENOSYS"), "{trace}");
}

/// A caller without standard streams: no file of ours may take their place, or messages would be written to it.
#[test]
fn closed_standard_streams_are_replaced() {
    let sandbox = Sandbox::new();
    let container = Bare::new(&sandbox, "web");
    container.oci(&["--limit", "subflows=6"]).ok();
    let locks = hold_locks(&sandbox, "/run/mptcp-hook");
    let before = ["sh", "-ec", "exec \"$@\" <&- >&- 2>&-", "closed"];
    let arguments = ["apply", container.id(), "--limit", "subflows=7"];
    let hook = Held::start(&sandbox, &before, &arguments, [Stdio::null(), Stdio::null(), Stdio::null()]);
    let null = |number| (number, "/dev/null".to_owned());
    assert_eq!(hook.descriptors().expect("a hook that waits")[..3], [null(0), null(1), null(2)]);
    drop(locks);
    assert_eq!(hook.wait(), 0);
    assert_eq!(sandbox.status_of(container.id())["live"], true);
}

/// The traced calls of one `mptcp-hook oci` with these variables and no others, and what the hook printed.
fn traced(sandbox: &Sandbox, state: &Value, variables: &[String]) -> (Vec<String>, String) {
    let trace = sandbox.dir().join("trace").display().to_string();
    let program = hook().display().to_string();
    let calls = "trace=%file,%process,socket,socketpair,pipe,pipe2,dup,dup2,dup3,memfd_create,epoll_create1,eventfd2";
    let mut argv = vec!["strace", "-qq", "-f", "-o", &trace, "-e", calls];
    for variable in variables {
        argv.extend(["-E", variable]);
    }
    argv.extend([program.as_str(), "oci", "--limit", "subflows=6", "--sysctl", "stale_loss_cnt=9"]);
    let outcome = sandbox.run_with_input(&argv, state.to_string().as_bytes());
    let said = outcome.stderr.clone();
    outcome.ok();
    let trace = std::fs::read_to_string(&trace).expect("the trace");
    let own = trace.split_once(' ').expect("a pid in front of each call").0;
    let calls = trace.lines().map(|line| line.split_once(' ').expect("a call").1.trim());
    // Its own pid is in the names of temporary files and of its own entry in /proc.
    let own = [(format!(".tmp-{own}-"), ".tmp-PID-"), (format!("/proc/{own}/"), "/proc/PID/")];
    (calls.map(|call| own.iter().fold(call.to_owned(), |call, (from, to)| call.replace(from, to))).collect(), said)
}

/// Nothing in the environment is looked for, run or believed, and nothing is ever executed.
#[test]
fn a_poisoned_environment_has_no_effect() {
    require("strace", "strace");
    let sandbox = Sandbox::new();
    let container = Bare::new(&sandbox, "web");
    let other = Bare::new(&sandbox, "other");
    for name in ["bin/ip", "bin/sh", "bin/mptcp-hook", "lib/evil.so", "lib/libc.so.6", "lib/libnss_files.so.2"] {
        sandbox.write(&format!("/run/poison/{name}"), "#!/bin/sh\necho poisoned >/run/poison/ran\n");
    }
    sandbox.sh("chmod -R 755 /run/poison");
    sandbox.write("/run/poison/config.toml", "on-error = \"continue\"\nhost-namespace = \"allow\"\n");
    let other_pid = format!("LXC_PID={}", other.pid());
    let variables = [
        "LD_PRELOAD=/run/poison/lib/evil.so",
        "LD_LIBRARY_PATH=/run/poison/lib",
        "LD_AUDIT=/run/poison/lib/evil.so",
        "LD_DEBUG=all",
        "GCONV_PATH=/run/poison/lib",
        "LOCPATH=/run/poison/lib",
        "PATH=/run/poison/bin",
        "HOME=/run/poison",
        "TMPDIR=/run/poison",
        "XDG_RUNTIME_DIR=/run/poison",
        "XDG_CONFIG_HOME=/run/poison",
        "NOTIFY_SOCKET=/run/poison/notify",
        "RUST_BACKTRACE=full",
        "RUST_LOG=trace",
        "MPTCP_HOOK_CONFIG=/run/poison/config.toml",
        "MPTCP_HOOK_STATE_DIR=/run/poison/state",
        "MPTCP_HOOK_ON_CONFLICT=override",
        "LXC_NAME=poisoned",
        &other_pid,
        "LXC_CONFIG_FILE=/run/poison/config.toml",
        "LXC_HOOK_VERSION=1",
        "LXC_HOOK_TYPE=post-stop",
    ]
    .map(str::to_owned);
    // Errors, too: RUST_BACKTRACE would make them longer.
    let wrong = ["env", "-i"].into_iter().chain(variables.iter().map(String::as_str));
    let program = hook().display().to_string();
    let wrong: Vec<&str> = wrong.chain([program.as_str(), "oci"]).collect();
    let said = sandbox.run_with_input(&wrong, b"{").fails_with(2);
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    assert!(!said.contains("poison"), "{said}");

    // The ledger's directories are there from then on.
    container.oci(&["--limit", "subflows=6"]).ok();
    sandbox.hook(&["release", container.id()]).ok();
    let mut runs = Vec::new();
    for variables in [&[][..], &variables] {
        let (calls, said) = traced(&sandbox, &container.state(), variables);
        assert!(said.contains(container.id()) && !said.contains("poison"), "{said}");
        assert_eq!(sandbox.sysctl(&container.netns(), "net/mptcp/stale_loss_cnt").as_deref(), Some("9"));
        assert_eq!(sandbox.status_of(container.id())["pid"], container.pid());
        sandbox.hook(&["release", container.id()]).ok();
        sandbox.assert_ledger_is_empty();
        runs.push((calls, said));
    }
    assert!(!sandbox.outside("/run/poison/ran").exists());

    let (poisoned, clean) = (runs.pop().expect("two runs"), runs.pop().expect("two runs"));
    assert_eq!(poisoned.1, clean.1);
    for (calls, _) in [&poisoned, &clean] {
        assert!(calls[0].starts_with("execve("), "{calls:#?}");
        for call in &calls[1..] {
            assert!(!["exec", "fork", "vfork", "clone"].iter().any(|name| call.starts_with(name)), "{call}");
            assert!(!call.contains("poison"), "{call}");
        }
    }
    // The same files in the same order.
    let paths = |calls: &[String]| -> Vec<String> {
        let names = calls[1..].iter().filter_map(|call| Some((call.split_once('(')?.0, call.split('"').nth(1)?)));
        names.map(|(call, path)| format!("{call} {path}")).collect()
    };
    let (poisoned, clean) = (paths(&poisoned.0), paths(&clean.0));
    assert!(clean.iter().any(|call| call.contains("/run/mptcp-hook")), "{clean:#?}");
    assert_eq!(poisoned, clean);
}

/// Every descriptor of the hook's own is closed by whatever would be executed.
#[test]
fn descriptors_of_the_hook_are_close_on_exec() {
    require("strace", "strace");
    let sandbox = Sandbox::new();
    let container = Bare::new(&sandbox, "web");
    let (calls, _) = traced(&sandbox, &container.state(), &[]);
    let mut opened = 0;
    for call in &calls {
        let name = call.split('(').next().unwrap_or_default();
        match name {
            "open" | "openat" | "openat2" | "socket" | "socketpair" | "pipe" | "pipe2" | "dup" | "dup2" | "dup3"
            | "memfd_create" | "epoll_create1" | "eventfd2" => {
                assert!(call.contains("CLOEXEC"), "{call}");
                opened += 1;
            }
            _ => {}
        }
    }
    assert!(opened > 10, "{calls:#?}");
}

/// No dynamic loader, which would read LD_PRELOAD and LD_LIBRARY_PATH, and no library (elf(5)).
#[test]
fn the_program_is_static() {
    const PT_DYNAMIC: u64 = 2;
    const PT_INTERP: u64 = 3;
    const DT_NEEDED: u64 = 1;
    let program = std::fs::read(Path::new(env!("CARGO_BIN_EXE_mptcp-hook"))).expect("the program");
    let number = |at: usize, length: usize| {
        program[at..at + length].iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
    };
    assert_eq!(program[..6], [0x7f, b'E', b'L', b'F', 2, 1], "64 bits, little-endian");
    let (table, size, count) = (number(32, 8) as usize, number(54, 2) as usize, number(56, 2) as usize);
    assert!(count > 1);
    for header in (0..count).map(|index| table + index * size) {
        assert_ne!(number(header, 4), PT_INTERP, "there is a dynamic loader");
        if number(header, 4) == PT_DYNAMIC {
            let (start, length) = (number(header + 8, 8) as usize, number(header + 32, 8) as usize);
            for entry in (start..start + length).step_by(16) {
                assert_ne!(number(entry, 8), DT_NEEDED, "there is a shared library");
            }
        }
    }
}
