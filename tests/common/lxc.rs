//! LXC containers by a configuration file, as root, root with mapped ids, or a user without rights starts them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::paths::TwoPaths;
use super::proof::{assert_only_endpoint, eth1_of};
use super::sandbox::{Netns, Outcome, Running, Sandbox};
use super::traffic::Sender;
use super::{ENGINE_LIMIT, oci, readable_hook, require, traffic, user, wait_until};

/// The first of the uids that root's containers with mapped ids use.
const ROOT_FIRST_MAPPED: u32 = 3_000_000;

/// Who starts a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// Root, and the container's root is the machine's.
    Root,
    /// Root, and the container's users are mapped to others.
    RootMapped,
    /// The user of [`user`].
    User,
}

/// A container that LXC knows by its configuration file.
pub struct Lxc<'a> {
    pub sandbox: &'a Sandbox,
    pub name: String,
    starter: Starter,
    lxcpath: PathBuf,
    config: String,
}

impl<'a> Lxc<'a> {
    /// A container of root's with busybox and the traffic program and no network.
    pub fn new(sandbox: &'a Sandbox, what: &str) -> Self {
        Self::started_by(sandbox, what, Starter::Root)
    }

    /// The same of somebody else's.
    pub fn started_by(sandbox: &'a Sandbox, what: &str, starter: Starter) -> Self {
        Self::in_lxcpath(sandbox, "lxc", what, starter)
    }

    /// A container in a directory of containers of its own.
    pub fn in_lxcpath(sandbox: &'a Sandbox, lxcpath: &str, what: &str, starter: Starter) -> Self {
        for program in ["lxc-start", "lxc-stop", "lxc-attach", "lxc-info"] {
            require(program, "lxc");
        }
        let (lxcpath, name) = (sandbox.dir().join(lxcpath), sandbox.name(what));
        let directory = lxcpath.join(&name);
        std::fs::create_dir_all(&directory).expect("a container's directory");
        let rootfs = directory.join("rootfs");
        sandbox.sh(&format!("cp -a {} {}", oci::root_filesystem(sandbox).display(), rootfs.display()));
        let config = format!(
            "lxc.uts.name = {name}\n\
             lxc.rootfs.path = dir:{}\n\
             lxc.init.cmd = /bin/busybox sleep 100000\n\
             lxc.apparmor.profile = unconfined\n",
            rootfs.display()
        );
        let container = Self { sandbox, starter, lxcpath, name, config };
        match starter {
            Starter::Root => container.line("lxc.mount.auto = proc:mixed sys:ro"),
            Starter::RootMapped => {
                for file in ["/etc/subuid", "/etc/subgid"] {
                    sandbox.write(file, &format!("root:{ROOT_FIRST_MAPPED}:65536\n"));
                }
                container.mapped(ROOT_FIRST_MAPPED)
            }
            Starter::User => {
                user::add(sandbox, Path::new("/"));
                sandbox.sh(&format!("chown {} {}", user::UID, directory.display()));
                container.mapped(user::FIRST_MAPPED)
            }
        }
    }

    /// Ids as in the distributions' own unprivileged containers.
    fn mapped(self, first: u32) -> Self {
        self.sandbox.sh(&format!("chown -R {first}:{first} {}", self.rootfs().display()));
        self.line("lxc.include = /usr/share/lxc/config/userns.conf")
            .line("lxc.mount.auto = proc:mixed")
            .line(&format!("lxc.idmap = u 0 {first} 65536"))
            .line(&format!("lxc.idmap = g 0 {first} 65536"))
    }

    /// LXCPATH/NAME.
    pub fn directory(&self) -> PathBuf {
        self.lxcpath.join(&self.name)
    }

    fn rootfs(&self) -> PathBuf {
        self.directory().join("rootfs")
    }

    /// Adds a line to the configuration.
    pub fn line(mut self, line: &str) -> Self {
        self.config += line;
        self.config += "\n";
        self
    }

    pub fn hook_version(self, version: u8) -> Self {
        self.line(&format!("lxc.hook.version = {version}"))
    }

    /// ethN on the bridge brN.
    pub fn veth(mut self, number: u8, lines: &[&str]) -> Self {
        let name = format!("name = eth{number}");
        let link = format!("link = br{number}");
        for line in ["type = veth", link.as_str(), name.as_str(), "flags = up"].iter().chain(lines) {
            self = self.line(&format!("lxc.net.{number}.{line}"));
        }
        self
    }

    /// eth0 and eth1 on the bridges of [`two_bridges`]. LXC gives a default route to one of them only.
    pub fn two_uplinks(self, version: u8) -> Self {
        self.hook_version(version)
            .veth(0, &["ipv4.address = 10.0.1.2/24", "ipv4.gateway = 10.0.1.1"])
            .veth(1, &["ipv4.address = 10.0.2.2/24"])
    }

    /// The same with a default route by eth1 as well, from a hook of the administrator's own, which stands before ours.
    pub fn two_paths(self, version: u8) -> Self {
        self.two_uplinks(version).script("start-host", "ip route add default via 10.0.2.1 dev eth1 metric 200")
    }

    /// A hook of the administrator's own that runs a script in the container's network namespace.
    pub fn script(self, kind: &str, script: &str) -> Self {
        let user = if self.starter == Starter::User { "--user" } else { "" };
        let lines = self.config.lines().count();
        let file = self.directory().join(format!("{kind}-{lines}"));
        let text = format!("#!/bin/sh\nexec nsenter --target $LXC_PID {user} --net sh -ec '{script}'\n");
        self.sandbox.write_program(&file, &text);
        self.line(&format!("lxc.hook.{kind} = {}", file.display()))
    }

    /// A hook of the administrator's own that runs a script in the container's namespaces before LXC sets them up.
    pub fn script_before_set_up(self, script: &str) -> Self {
        let file = self.directory().join("pre-mount");
        self.sandbox.write_program(&file, &format!("#!/bin/sh\nset -e\n{script}\n"));
        self.line(&format!("lxc.hook.pre-mount = {}", file.display()))
    }

    /// A program in the container's root filesystem.
    pub fn program(self, name: &str, text: &str) -> Self {
        self.sandbox.write_program(&self.rootfs().join(name), text);
        self
    }

    /// Our hook at start-host, with arguments as they stand on the line.
    pub fn start_host(self, arguments: &str) -> Self {
        let program = self.hook_program();
        self.line(&format!("lxc.hook.start-host = {} lxc {arguments}", program.display()))
    }

    /// Our hook at post-stop.
    pub fn post_stop(self) -> Self {
        let program = self.hook_program();
        self.line(&format!("lxc.hook.post-stop = {} lxc", program.display()))
    }

    /// The hook, where whoever starts the container can read it.
    pub fn hook_program(&self) -> PathBuf {
        readable_hook(self.sandbox)
    }

    /// Where the container's end is noted, after everything else of post-stop.
    pub fn end_mark(&self) -> PathBuf {
        self.directory().join("ended")
    }

    pub fn log_file(&self) -> PathBuf {
        self.directory().join("log")
    }

    /// LXC's log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// Writes the configuration file.
    pub fn write(&self) {
        let mark = format!("lxc.hook.post-stop = touch {}\n", self.end_mark().display());
        std::fs::write(self.directory().join("config"), self.config.clone() + &mark).expect("writing a configuration");
        let _ = std::fs::remove_file(self.end_mark());
    }

    /// A command line of LXC's about this container, as its starter runs it.
    pub fn lxc(&self, program: &str, arguments: &[&str]) -> Vec<String> {
        let lxcpath = self.lxcpath.display().to_string();
        let argv = [&[program, "-P", &lxcpath, "-n", &self.name], arguments].concat();
        self.as_starter(&argv)
    }

    /// A command line as the container's starter runs it.
    pub fn as_starter(&self, argv: &[&str]) -> Vec<String> {
        if self.starter != Starter::User {
            return argv.iter().map(|&word| word.to_owned()).collect();
        }
        let enter = format!("echo $$ >{}/cgroup.procs; exec \"$@\"", user::cgroup(self.sandbox));
        let mut whole: Vec<String> = ["sh", "-ec", &enter, "user"].map(str::to_owned).into();
        whole.extend(user::command(&self.directory(), argv));
        whole
    }

    /// `lxc-start`, which returns when the container runs.
    pub fn try_start(&self) -> Outcome {
        self.write();
        let log = self.log_file().display().to_string();
        self.sandbox.spawn(&self.lxc("lxc-start", &["-l", "DEBUG", "-o", &log])).wait(ENGINE_LIMIT)
    }

    /// Starts it and gives the time that this took.
    #[track_caller]
    pub fn start(&self) -> Duration {
        let begin = Instant::now();
        let outcome = self.try_start();
        let time = begin.elapsed();
        assert_eq!(outcome.code, Some(0), "{outcome}\n--- log\n{}", self.log());
        assert_eq!(self.state(), "RUNNING");
        time
    }

    /// Tries to start it and gives LXC's log; panics if it starts. What has to be done after a failed start is over.
    #[track_caller]
    pub fn refused(&self) -> String {
        let outcome = self.try_start();
        assert!(outcome.code.is_some_and(|code| code != 0), "the container started: {outcome}");
        self.wait_ended();
        assert_eq!(self.state(), "STOPPED");
        self.log()
    }

    #[track_caller]
    fn info(&self, what: &str) -> String {
        self.sandbox.run(&self.lxc("lxc-info", &["-H", what])).ok()
    }

    #[track_caller]
    pub fn state(&self) -> String {
        self.info("-s")
    }

    /// The container's first process, as seen in the sandbox.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.info("-p").parse().expect("a running container's pid")
    }

    #[track_caller]
    pub fn netns(&self) -> Netns {
        Netns::Pid(self.pid())
    }

    /// The process of LXC's that watches over the container.
    fn monitor(&self) -> u32 {
        let status = self.sandbox.sh(&format!("cat /proc/{}/status", self.pid()));
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("a process has a parent");
        parent.trim().parse().expect("the parent's pid")
    }

    /// A command in the container.
    pub fn attach(&self, argv: &[&str]) -> Running {
        self.sandbox.spawn(&self.lxc("lxc-attach", &[&["--"], argv].concat()))
    }

    /// A script of busybox's in the container, run to its end.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.attach(&["/bin/busybox", "sh", "-ec", script]).wait(ENGINE_LIMIT).ok()
    }

    /// Sends from inside the container.
    pub fn send(&self, to: IpAddr, bytes: u64, rate: Option<u64>) -> Sender {
        let argv = traffic::send_arguments(traffic::PROGRAM, to, bytes, rate);
        Sender::attach(self.attach(&argv.iter().map(String::as_str).collect::<Vec<_>>()))
    }

    /// Ends it and waits until LXC has done everything that comes after.
    #[track_caller]
    pub fn stop(&self) {
        self.sandbox.run(&self.lxc("lxc-stop", &["-k"])).ok();
        self.wait_ended();
    }

    #[track_caller]
    fn wait_ended(&self) {
        wait_until("the last post-stop hook", ENGINE_LIMIT, || self.end_mark().exists());
    }

    /// Ends container and monitor without a chance for any of the hooks; gives their pids.
    #[track_caller]
    pub fn kill_at_once(&self) -> [u32; 2] {
        let (monitor, pid) = (self.monitor(), self.pid());
        // The container's first process dies with its monitor (PR_SET_PDEATHSIG), perhaps before kill(1) comes to it.
        self.sandbox.sh(&format!("kill -9 {monitor} {pid} || :"));
        [monitor, pid]
    }

    /// [`Lxc::kill_at_once`], and waits until nothing is left of them.
    #[track_caller]
    pub fn kill(&self) {
        for process in self.kill_at_once() {
            wait_until("the end of the container's processes", ENGINE_LIMIT, || {
                self.sandbox.run(&["test", "-e", &format!("/proc/{process}")]).code == Some(1)
            });
        }
        assert!(!self.end_mark().exists(), "the post-stop hooks did run");
    }

    /// `mptcp-hook` as the container's starter.
    #[track_caller]
    pub fn hook(&self, arguments: &[&str]) -> Outcome {
        self.spawn_hook(arguments).wait(ENGINE_LIMIT)
    }

    /// [`Lxc::hook`] without waiting for its end.
    pub fn spawn_hook(&self, arguments: &[&str]) -> Running {
        let program = self.hook_program().display().to_string();
        self.sandbox.spawn(&self.as_starter(&[&[program.as_str()], arguments].concat()))
    }

    /// The starter's `status --json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        let json = self.hook(&["status", "--json"]).ok();
        serde_json::from_str(&json).unwrap_or_else(|e| panic!("status --json gave {json}: {e}"))
    }

    /// The container in the starter's `status --json`; panics unless it is there exactly once.
    #[track_caller]
    pub fn in_status(&self) -> Value {
        let status = self.status();
        let containers = status["containers"].as_array().expect("containers is a list");
        let mut found = containers.iter().filter(|container| container["id"] == self.name.as_str());
        let (first, second) = (found.next(), found.next());
        assert!(first.is_some() && second.is_none(), "{} is not there once in {status:#}", self.name);
        first.cloned().unwrap_or_default()
    }

    /// eth1 of the container in the starter's `status --json`, which has it in `state`.
    #[track_caller]
    pub fn eth1_in_status(&self, state: &str) -> Value {
        eth1_of(&self.in_status(), state)
    }

    /// The kernel has exactly one endpoint in the container: eth1's address with `names` as its flags.
    #[track_caller]
    pub fn assert_only_endpoint(&self, address: &str, names: &[&str]) {
        let address: IpAddr = address.parse().expect("an address");
        assert_only_endpoint(self.sandbox, &self.netns(), address, names);
    }

    /// The starter's ledger knows nothing any more.
    #[track_caller]
    pub fn assert_ledger_is_empty(&self) {
        let status = self.status();
        assert_eq!((&status["containers"], &status["settings"]), (&json!([]), &json!([])), "{status:#}");
    }
}

/// A server behind two bridges, br0 and br1, in the sandbox's own network namespace.
pub fn two_bridges(sandbox: &Sandbox) -> TwoPaths<'_> {
    let paths = TwoPaths::at_host(sandbox);
    paths.bridge("br0", "10.0.1.1/24");
    paths.bridge("br1", "10.0.2.1/24");
    paths
}
