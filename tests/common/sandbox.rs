//! A world of its own for container runtimes: mount, pid, ipc, uts and (usually) network namespaces.
//!
//! Inside, /run is an empty tmpfs, /etc a copy that may be changed, with a policy of a long deadline, /sys belongs to the
//! sandbox's network namespace and /sys/fs/cgroup is a cgroup2 view also where the machine's cgroups are hybrid. Bridges,
//! firewall rules, mounts, state directories and processes are gone when the sandbox is dropped, on a panic and when the
//! test is killed too: its first process lives only as long as the test holds the other end of a pipe.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::enter::{self, Namespaces, Process};
use super::{LIMIT, hook};

/// The policy of every sandbox until a test writes another one: the longest deadline. Where none is tested, a machine may
/// have no processor for a hook for seconds.
const PATIENT: &str = "deadline = 60.0\n";

/// How long a command in a sandbox may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(600);

/// The first process, with the kind of network as `$1` and the sandbox's unique string as `$2`: stays until its stdin
/// ends. Then it ends everything else and removes what outlives the namespaces. While the shell waits for cat it also
/// reaps the orphans of the runtimes (monitors, containers' inits).
const INIT: &str = r#"
cat >/dev/null
kill -s KILL -- -1 2>/dev/null || :
if [ "$1" = host-network ]; then
  for name in $(ip -o link show | sed -n "s/^[0-9]*: \($2[^:@]*\).*/\1/p"); do
    ip link del "$name" 2>/dev/null || : # gone with its peer
  done
fi
[ -n "$(find /sys/fs/cgroup -type d \( -path "*$2*" -o -name libpod_parent -o -name lxc.pivot \) -print -quit 2>/dev/null)" ] || exit 0
for try in $(seq 1000); do
  # A cgroup is busy until its last process is gone, and a killed one needs a processor for that.
  find /sys/fs/cgroup -depth -type d \( -path "*$2*" -o -name libpod_parent -o -name lxc.pivot \) -exec rmdir {} + 2>/dev/null || :
  # Others' come and go meanwhile.
  left=$(find /sys/fs/cgroup -type d -path "*$2*" 2>/dev/null) || :
  [ -n "$left" ] || exit 0
  sleep 0.05
done
echo "left over: $left" >&2
exit 1
"#;

/// A network namespace, as seen from a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Netns {
    /// Where runtimes and hook run: the host, from a container's point of view.
    Host,
    /// /run/netns/NAME in the sandbox.
    Named(String),
    /// That of a process, by its pid in the sandbox.
    Pid(u32),
}

impl Netns {
    /// /run/netns/`name` in the sandbox.
    pub fn named(name: &str) -> Self {
        Self::Named(name.to_owned())
    }

    /// The path by which programs in the sandbox can open it.
    pub fn path(&self) -> String {
        match self {
            Self::Host => "/proc/self/ns/net".to_owned(),
            Self::Named(name) => format!("/run/netns/{name}"),
            Self::Pid(pid) => format!("/proc/{pid}/ns/net"),
        }
    }
}

/// How a command ended and what it printed.
#[derive(Debug)]
pub struct Outcome {
    /// What was run, for messages.
    pub command: String,
    /// Exit status; none after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Standard output without white space at its ends; panics unless the command succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self}");
        self.stdout.trim().to_owned()
    }

    /// Standard output and error; panics unless the command ended with `code`.
    #[track_caller]
    pub fn fails_with(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self}");
        format!("{}\n{}", self.stdout.trim(), self.stderr.trim())
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}\nexit status {:?}", self.command, self.code)?;
        writeln!(f, "--- stdout\n{}\n--- stderr\n{}", self.stdout.trim(), self.stderr.trim())
    }
}

/// A started command with its output in files, so that daemons which keep the descriptors open delay nobody.
pub struct Running {
    command: String,
    process: Process,
    stdout: File,
    stderr: File,
}

impl Running {
    #[track_caller]
    fn start(sandbox: &Sandbox, netns: &Netns, argv: &[impl AsRef<str>], stdin: Option<&[u8]>) -> Self {
        let stdout = tempfile::tempfile().expect("a file for a command's output");
        let stderr = tempfile::tempfile().expect("a file for a command's output");
        let input = match stdin {
            Some(bytes) => {
                let mut file = tempfile::tempfile().expect("a file for a command's input");
                std::io::Write::write_all(&mut file, bytes).expect("writing a command's input");
                file.rewind().expect("rewinding a command's input");
                Stdio::from(file)
            }
            None => Stdio::null(),
        };
        let process = sandbox.start_in(&sandbox.open_netns(netns), argv, |command| {
            command.stdin(input);
            command.stdout(stdout.try_clone().expect("a second descriptor of the output"));
            command.stderr(stderr.try_clone().expect("a second descriptor of the output"));
        });
        Self { command: shown(argv), process, stdout, stderr }
    }

    /// What it has printed on stdout until now.
    pub fn stdout(&self) -> String {
        contents(&self.stdout)
    }

    /// The lines of that; the last one may be half written, and is left out then.
    pub fn lines(&self) -> Vec<String> {
        let out = self.stdout();
        let whole = out.rfind('\n').map_or("", |end| &out[..end]);
        whole.lines().map(str::to_owned).collect()
    }

    /// What it has printed on stderr until now.
    pub fn stderr(&self) -> String {
        contents(&self.stderr)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).expect("a command that has not ended");
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().expect("waiting for a command").is_none()
    }

    /// Waits for the end; panics, and ends the command, when `limit` has passed.
    #[track_caller]
    pub fn wait(mut self, limit: Duration) -> Outcome {
        let deadline = Instant::now() + limit;
        let mut pause = Duration::from_micros(500);
        let status = loop {
            if let Some(status) = self.process.try_wait().expect("waiting for a command") {
                break status;
            }
            if Instant::now() >= deadline {
                panic!(
                    "not finished within {limit:?}: {}\n--- stdout\n{}\n--- stderr\n{}",
                    self.command,
                    self.stdout(),
                    self.stderr()
                );
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        };
        Outcome { command: self.command.clone(), code: status.code(), stdout: self.stdout(), stderr: self.stderr() }
    }
}

/// Private namespaces; see the module's description. What was started in it has to be dropped before it is.
pub struct Sandbox {
    /// The first process. The namespaces end with it.
    holder: Child,
    /// The first process ends when this does. Taken by drop.
    lifeline: Option<ChildStdin>,
    namespaces: Namespaces,
    unique: String,
    counter: Cell<u32>,
    dir: TempDir,
}

impl Sandbox {
    /// A sandbox with a network namespace of its own.
    pub fn new() -> Self {
        Self::start(true)
    }

    /// A sandbox that keeps the machine's own network namespace, for settings that exist nowhere else. Make network
    /// interfaces there only with names from [`Sandbox::interface_name`]; they are removed when it is dropped.
    pub fn host_network() -> Self {
        Self::start(false)
    }

    fn start(private_network: bool) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        assert!(nix::unistd::geteuid().is_root(), "these tests need root: namespaces, mounts and real containers");
        super::require("ip", "iproute2");
        let dir = tempfile::Builder::new().prefix("mptcp-hook-test.").tempdir().expect("a temporary directory");
        // Readable on the way in: mapped container users have to reach the root filesystem.
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755))
            .expect("the mode of a temporary directory");
        // The letter at the end keeps it from being the beginning of another.
        let unique = format!("mh{}n{}x", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        // Namespaces belong to threads: this one's end with it, but for the first process that it starts in them.
        let of_init = unique.clone();
        let prepared = std::thread::spawn(move || first_process(private_network, &of_init)).join();
        let mut holder = prepared.expect("preparing a sandbox");
        let lifeline = holder.stdin.take();
        Self { lifeline, unique, counter: Cell::new(0), dir, namespaces: Namespaces::of(holder.id()), holder }
    }

    /// What the first process has to say; it must have ended.
    fn holder_stderr(&mut self) -> String {
        let mut message = String::new();
        if let Some(mut stderr) = self.holder.stderr.take() {
            let _ = stderr.read_to_string(&mut message);
        }
        message.trim().to_owned()
    }

    /// A string that no other sandbox has; cgroups whose path holds it are removed when the sandbox is dropped.
    pub fn unique(&self) -> &str {
        &self.unique
    }

    /// A container name that no other sandbox uses.
    pub fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.unique)
    }

    /// An interface name that nothing else uses, removed when the sandbox is dropped.
    pub fn interface_name(&self) -> String {
        let number = self.counter.replace(self.counter.get() + 1);
        format!("{}i{number}", self.unique)
    }

    /// A directory with the same path inside and outside, removed in the end.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// How the test itself opens the sandbox's absolute `path`, such as one below /run or /etc.
    pub fn outside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.holder.id()))
    }

    /// Writes `contents` to the sandbox's absolute `path`, making its directories.
    pub fn write(&self, path: &str, contents: &str) {
        let outside = self.outside(path);
        std::fs::create_dir_all(outside.parent().expect("an absolute path"))
            .and_then(|()| std::fs::write(&outside, contents))
            .unwrap_or_else(|e| panic!("writing {path} in the sandbox: {e}"));
    }

    /// Writes an executable file. A process of the sandbox does it: while this one had it open for writing, another test's
    /// thread could fork, and whoever executes the file meanwhile gets ETXTBSY.
    #[track_caller]
    pub fn write_program(&self, path: &Path, text: &str) {
        let path = path.display().to_string();
        self.run_with_input(&["sh", "-ec", "cat >\"$1\"; chmod 755 \"$1\"", "sh", &path], text.as_bytes()).ok();
    }

    /// Copies a program, as [`Sandbox::write_program`] writes one.
    #[track_caller]
    pub fn copy_program(&self, from: &Path, to: &Path) {
        self.run(&["cp", &from.display().to_string(), &to.display().to_string()]).ok();
    }

    /// The policy file of this sandbox, /etc/mptcp-hook/config.toml: this text, and so the hook's own deadline if it does
    /// not say another one.
    pub fn policy(&self, toml: &str) {
        self.write("/etc/mptcp-hook/config.toml", toml);
    }

    /// [`Sandbox::policy`] that begins with the longest deadline, as without a policy of the test's.
    pub fn patient_policy(&self, toml: &str) {
        self.policy(&format!("{PATIENT}{toml}"));
    }

    /// Takes the policy file away. Whoever maps the machine's root into a user namespace cannot be told from a user there,
    /// and a hook of theirs trusts no file.
    pub fn no_policy(&self) {
        std::fs::remove_file(self.outside("/etc/mptcp-hook/config.toml")).expect("removing the policy");
    }

    /// A path, for the test itself, of a network namespace.
    pub fn netns_path(&self, netns: &Netns) -> PathBuf {
        match netns {
            Netns::Host => PathBuf::from(format!("/proc/{}/ns/net", self.holder.id())),
            // /proc/PID there is the sandbox's own procfs.
            Netns::Named(_) | Netns::Pid(_) => self.outside(&netns.path()),
        }
    }

    /// A network namespace, open.
    pub fn open_netns(&self, netns: &Netns) -> File {
        let path = self.netns_path(netns);
        File::open(&path).unwrap_or_else(|e| panic!("opening {}: {e}", path.display()))
    }

    /// Its namespaces, opened anew.
    pub fn namespaces(&self) -> Namespaces {
        Namespaces::of(self.holder.id())
    }

    /// Starts a program in the sandbox, in the network namespace `network`, with the streams that `prepare` gives it.
    #[track_caller]
    pub fn start_in(&self, network: &File, argv: &[impl AsRef<str>], prepare: impl FnOnce(&mut Command)) -> Process {
        let mut command = Command::new(argv[0].as_ref());
        command.args(argv[1..].iter().map(AsRef::as_ref));
        prepare(&mut command);
        // A process group of its own, so that Ctrl-C leaves the end of it to the sandbox.
        let child = self.namespaces.start(command.process_group(0), Some(network));
        child.unwrap_or_else(|e| panic!("starting {}: {e}", shown(argv))).into()
    }

    /// Starts a command in the sandbox and does not wait for it.
    pub fn spawn(&self, argv: &[impl AsRef<str>]) -> Running {
        self.spawn_in(&Netns::Host, argv)
    }

    /// [`Sandbox::spawn`] in another of its network namespaces.
    pub fn spawn_in(&self, netns: &Netns, argv: &[impl AsRef<str>]) -> Running {
        Running::start(self, netns, argv, None)
    }

    /// Runs a command in the sandbox to its end.
    #[track_caller]
    pub fn run(&self, argv: &[impl AsRef<str>]) -> Outcome {
        self.run_in(&Netns::Host, argv)
    }

    /// [`Sandbox::run`] in another of its network namespaces.
    #[track_caller]
    pub fn run_in(&self, netns: &Netns, argv: &[impl AsRef<str>]) -> Outcome {
        self.spawn_in(netns, argv).wait(COMMAND_LIMIT)
    }

    /// [`Sandbox::run`] with `stdin`.
    #[track_caller]
    pub fn run_with_input(&self, argv: &[impl AsRef<str>], stdin: &[u8]) -> Outcome {
        self.run_in_with_input(&Netns::Host, argv, stdin)
    }

    /// [`Sandbox::run_in`] with `stdin`.
    #[track_caller]
    pub fn run_in_with_input(&self, netns: &Netns, argv: &[impl AsRef<str>], stdin: &[u8]) -> Outcome {
        Running::start(self, netns, argv, Some(stdin)).wait(COMMAND_LIMIT)
    }

    /// ip(8) in a network namespace of the sandbox, with a command in each line; gives its stdout, panics when one fails.
    #[track_caller]
    pub fn ip_in(&self, netns: &Netns, commands: &str) -> String {
        let outcome = self.run_in_with_input(netns, &["ip", "-batch", "-"], commands.as_bytes());
        assert_eq!(outcome.code, Some(0), "{commands}\n{outcome}");
        outcome.ok()
    }

    /// Runs `work` on a thread of its own in a network namespace of the sandbox, where it sees that one's /proc/sys/net,
    /// /proc/thread-self/net and sockets. Mounts and pids are the test's.
    pub fn inside<T: Send>(&self, netns: &Netns, work: impl FnOnce() -> T + Send) -> T {
        let namespace = self.open_netns(netns);
        let enter = move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("entering a network namespace");
            work()
        };
        std::thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs a shell script in the sandbox; gives its stdout, panics when it fails.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.sh_in(&Netns::Host, script)
    }

    /// [`Sandbox::sh`] in another of its network namespaces.
    #[track_caller]
    pub fn sh_in(&self, netns: &Netns, script: &str) -> String {
        self.run_in(netns, &["sh", "-ec", script]).ok()
    }

    /// Runs the hook program with `arguments` in the sandbox.
    #[track_caller]
    pub fn hook(&self, arguments: &[impl AsRef<str>]) -> Outcome {
        self.hook_with_input(arguments, b"")
    }

    /// [`Sandbox::hook`] with `stdin`, as an OCI runtime calls it.
    #[track_caller]
    pub fn hook_with_input(&self, arguments: &[impl AsRef<str>], stdin: &[u8]) -> Outcome {
        let mut argv = vec![hook().display().to_string()];
        argv.extend(arguments.iter().map(|argument| argument.as_ref().to_owned()));
        self.run_with_input(&argv, stdin)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            match self.holder.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                _ => break None,
            }
        };
        if status.is_none() {
            // Nobody waits for it any longer: it ends when the last process that this test has started in it is reaped.
            let _ = self.holder.kill();
        }
        if !std::thread::panicking() {
            let clean = status.is_some_and(|status| status.success());
            assert!(clean, "the sandbox did not end well: {}", self.holder_stderr());
        }
    }
}

/// Makes namespaces, prepares their mounts and starts their first process. The thread that runs it is of no further use.
fn first_process(private_network: bool, unique: &str) -> Child {
    let mut namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    if private_network {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    unshare(namespaces).expect("making namespaces");
    let mount = |source: &str, target: &str, kind: Option<&str>, flags, data: Option<&str>| {
        mount(Some(source), target, kind, flags, data).unwrap_or_else(|e| panic!("mounting {source} at {target}: {e}"));
    };
    let none = MsFlags::empty();
    mount("none", "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None);
    if private_network {
        mount("sysfs", "/sys", Some("sysfs"), none, None);
        // The flag of if.h that takes it up; the others stay as they are.
        std::fs::write("/sys/class/net/lo/flags", "0x1").expect("taking lo up");
    }
    if statfs("/sys/fs/cgroup").expect("the cgroups").filesystem_type() != CGROUP2_SUPER_MAGIC {
        mount("cgroup2", "/sys/fs/cgroup", Some("cgroup2"), none, None);
    }
    mount("tmpfs", "/run", Some("tmpfs"), none, Some("mode=755"));
    for directory in ["/run/lock", "/run/netns"] {
        std::fs::create_dir(directory).expect("a directory below /run");
    }
    // podman's locks.
    std::fs::create_dir_all("/dev/shm").expect("/dev/shm");
    mount("tmpfs", "/dev/shm", Some("tmpfs"), none, Some("mode=1777"));
    let copied = Command::new("cp").args(["-a", "/etc", "/run/etc"]).output().expect("starting cp");
    assert!(copied.status.success(), "copying /etc: {}", String::from_utf8_lossy(&copied.stderr));
    let _ = std::fs::remove_dir_all("/run/etc/mptcp-hook");
    // Whatever the umask: the hook takes nobody's word that others could have written.
    let writable_by_owner = |path: &str, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode));
    std::fs::create_dir("/run/etc/mptcp-hook")
        .and_then(|()| writable_by_owner("/run/etc/mptcp-hook", 0o755))
        .and_then(|()| std::fs::write("/run/etc/mptcp-hook/config.toml", PATIENT))
        .and_then(|()| writable_by_owner("/run/etc/mptcp-hook/config.toml", 0o644))
        .expect("writing the policy");
    mount("/run/etc", "/etc", None, MsFlags::MS_BIND, None);

    let network = if private_network { "private-network" } else { "host-network" };
    let mut init = Command::new("sh");
    init.args(["-ec", INIT, "sandbox", network, unique]);
    // Ctrl-C ends the test, and by that the sandbox, but must not keep it from cleaning up.
    init.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    unshare(CloneFlags::CLONE_NEWPID).expect("making a pid namespace");
    enter::with_proc(&mut init);
    init.spawn().expect("starting the first process of a sandbox")
}

fn shown(argv: &[impl AsRef<str>]) -> String {
    argv.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" ")
}

fn contents(file: &File) -> String {
    use std::os::unix::fs::FileExt;
    let len = file.metadata().expect("the size of an output file").len();
    let mut bytes = vec![0; len as usize];
    // The descriptors share one offset with the writer, so reading must not move it.
    file.read_exact_at(&mut bytes, 0).expect("reading an output file");
    String::from_utf8_lossy(&bytes).into_owned()
}
