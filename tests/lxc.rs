//! The hook under LXC, with real containers and real Multipath TCP on this machine's kernel: hook versions 0 and 1,
//! started by root, by root with mapped ids, and by a user without rights.

mod common;

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::*;
use serde_json::{Value, json};

/// How long LXC may take to start, restart or end a container.
const LXC_LIMIT: Duration = Duration::from_secs(15);

/// A value of the host alone: it stands in the initial network namespace and in no other.
const HOST_KEY: &str = "net/core/netdev_max_backlog";

/// A user of the machine who is not root: no real one has this uid.
const USER: u32 = 61_234;

/// The first of the uids that the user's containers may use.
const USER_FIRST_MAPPED: u32 = 2_000_000;

/// The first of the uids that root's containers with mapped ids use.
const ROOT_FIRST_MAPPED: u32 = 3_000_000;

/// Who starts a container.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Starter {
    /// Root, and the container's root is the machine's.
    Root,
    /// Root, and the container's users are mapped to others.
    RootMapped,
    /// A user who has nothing but a range of uids and the right to two veths (lxc-user-nic(1)).
    User,
}

/// A container that LXC knows by its configuration file.
struct Lxc<'a> {
    sandbox: &'a Sandbox,
    starter: Starter,
    lxcpath: PathBuf,
    name: String,
    config: String,
}

impl<'a> Lxc<'a> {
    /// A container of root's with busybox and the traffic program and no network.
    fn new(sandbox: &'a Sandbox, what: &str) -> Self {
        Self::in_lxcpath(sandbox, "lxc", what, Starter::Root)
    }

    /// A container in a directory of containers of its own.
    fn in_lxcpath(sandbox: &'a Sandbox, lxcpath: &str, what: &str, starter: Starter) -> Self {
        for program in ["lxc-start", "lxc-stop", "lxc-attach", "lxc-info"] {
            require(program, "lxc");
        }
        require("busybox", "busybox-static");
        let (lxcpath, name) = (sandbox.dir().join(lxcpath), sandbox.name(what));
        let rootfs = lxcpath.join(&name).join("rootfs");
        for directory in ["bin", "dev", "proc", "sys", "tmp"] {
            std::fs::create_dir_all(rootfs.join(directory)).expect("a directory of a root filesystem");
        }
        std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox for a root filesystem");
        std::fs::copy(traffic_program(), rootfs.join("mptcp-traffic")).expect("a program for a root filesystem");
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
                add_user(sandbox);
                let directory = container.directory();
                sandbox.sh(&format!("chown {USER} {}", directory.display()));
                container.mapped(USER_FIRST_MAPPED)
            }
        }
    }

    /// Ids as in the distributions' own unprivileged containers.
    fn mapped(self, first: u32) -> Self {
        let rootfs = self.directory().join("rootfs");
        self.sandbox.sh(&format!("chown -R {first}:{first} {}", rootfs.display()));
        self.line("lxc.include = /usr/share/lxc/config/userns.conf")
            .line("lxc.mount.auto = proc:mixed")
            .line(&format!("lxc.idmap = u 0 {first} 65536"))
            .line(&format!("lxc.idmap = g 0 {first} 65536"))
    }

    /// LXCPATH/NAME.
    fn directory(&self) -> PathBuf {
        self.lxcpath.join(&self.name)
    }

    /// Adds a line to the configuration.
    fn line(mut self, line: &str) -> Self {
        self.config += line;
        self.config += "\n";
        self
    }

    /// eth0 and eth1 on the bridges of [`two_bridges`]. LXC can give a default route to one of them only; that of eth1
    /// comes from a hook of the administrator's own, which stands before ours.
    fn two_paths(self, version: u8) -> Self {
        let route = "ip route add default via 10.0.2.1 dev eth1 metric 200";
        self.hook_version(version)
            .veth(0, &["ipv4.address = 10.0.1.2/24", "ipv4.gateway = 10.0.1.1"])
            .veth(1, &["ipv4.address = 10.0.2.2/24"])
            .script("start-host", route)
    }

    fn hook_version(self, version: u8) -> Self {
        self.line(&format!("lxc.hook.version = {version}"))
    }

    /// ethN on the bridge brN.
    fn veth(mut self, number: u8, lines: &[&str]) -> Self {
        let name = format!("name = eth{number}");
        let link = format!("link = br{number}");
        for line in ["type = veth", link.as_str(), name.as_str(), "flags = up"].iter().chain(lines) {
            self = self.line(&format!("lxc.net.{number}.{line}"));
        }
        self
    }

    /// A hook of the administrator's own that runs a script in the container's network namespace.
    fn script(self, kind: &str, script: &str) -> Self {
        let user = if self.starter == Starter::User { "--user" } else { "" };
        let lines = self.config.lines().count();
        let file = self.directory().join(format!("{kind}-{lines}"));
        let text = format!("#!/bin/sh\nexec nsenter --target $LXC_PID {user} --net sh -ec '{script}'\n");
        std::fs::write(&file, text).expect("writing a hook script");
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).expect("a hook script's mode");
        self.line(&format!("lxc.hook.{kind} = {}", file.display()))
    }

    /// Our hook at start-host, with arguments as they stand on the line.
    fn start_host(self, arguments: &str) -> Self {
        let program = self.hook_program();
        self.line(&format!("lxc.hook.start-host = {} lxc {arguments}", program.display()))
    }

    /// Our hook at post-stop.
    fn post_stop(self) -> Self {
        let program = self.hook_program();
        self.line(&format!("lxc.hook.post-stop = {} lxc", program.display()))
    }

    /// The hook, where whoever starts the container can read it.
    fn hook_program(&self) -> PathBuf {
        let program = self.sandbox.dir().join("mptcp-hook");
        if !program.exists() {
            std::fs::copy(hook(), &program).expect("copying the hook");
        }
        program
    }

    /// Where the container's end is noted, after everything else of post-stop.
    fn end_mark(&self) -> PathBuf {
        self.directory().join("ended")
    }

    fn log_file(&self) -> PathBuf {
        self.directory().join("log")
    }

    /// LXC's log.
    fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn write(&self) {
        let mark = format!("lxc.hook.post-stop = touch {}\n", self.end_mark().display());
        std::fs::write(self.directory().join("config"), self.config.clone() + &mark).expect("writing a configuration");
        let _ = std::fs::remove_file(self.end_mark());
    }

    /// A command line of LXC's about this container, as its starter runs it.
    fn lxc(&self, program: &str, arguments: &[&str]) -> Vec<String> {
        let lxcpath = self.lxcpath.display().to_string();
        let argv = [&[program, "-P", &lxcpath, "-n", &self.name], arguments].concat();
        self.as_starter(&argv)
    }

    /// A command line as the container's starter runs it.
    fn as_starter(&self, argv: &[&str]) -> Vec<String> {
        let mut whole: Vec<String> = Vec::new();
        if self.starter == Starter::User {
            let enter = format!("echo $$ >{}/cgroup.procs; exec \"$@\"", user_cgroup(self.sandbox));
            let runtime_directory = format!("XDG_RUNTIME_DIR=/run/user/{USER}");
            let home = format!("HOME={}", self.directory().display());
            let (user, group) = (format!("--reuid={USER}"), format!("--regid={USER}"));
            let as_user = ["sh", "-ec", &enter, "user", "setpriv", &user, &group, "--clear-groups"];
            let environment = ["env", "-i", &home, &runtime_directory, "PATH=/usr/sbin:/usr/bin:/sbin:/bin"];
            whole.extend(as_user.iter().chain(&environment).map(|&word| word.to_owned()));
        }
        whole.extend(argv.iter().map(|&word| word.to_owned()));
        whole
    }

    /// `lxc-start`, which returns when the container runs.
    fn try_start(&self) -> Outcome {
        self.write();
        let log = self.log_file().display().to_string();
        self.sandbox.run(&self.lxc("lxc-start", &["-l", "DEBUG", "-o", &log]))
    }

    #[track_caller]
    fn start(&self) {
        let outcome = self.try_start();
        assert_eq!(outcome.code, Some(0), "{outcome}\n--- log\n{}", self.log());
        assert_eq!(self.state(), "RUNNING");
    }

    /// Tries to start it and gives LXC's log; panics if it starts. What has to be done after a failed start is over.
    #[track_caller]
    fn refused(&self) -> String {
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
    fn state(&self) -> String {
        self.info("-s")
    }

    /// The container's first process, as seen in the sandbox.
    #[track_caller]
    fn pid(&self) -> u32 {
        self.info("-p").parse().expect("a running container's pid")
    }

    fn netns(&self) -> Netns {
        Netns::Pid(self.pid())
    }

    /// The process of LXC's that watches over the container.
    fn monitor(&self) -> u32 {
        let status = self.sandbox.sh(&format!("cat /proc/{}/status", self.pid()));
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("a process has a parent");
        parent.trim().parse().expect("the parent's pid")
    }

    /// A command in the container.
    fn attach(&self, argv: &[&str]) -> Running {
        self.sandbox.spawn(&self.lxc("lxc-attach", &[&["--"], argv].concat()))
    }

    /// A script of busybox's in the container, run to its end.
    #[track_caller]
    fn sh(&self, script: &str) -> String {
        self.attach(&["/bin/busybox", "sh", "-ec", script]).wait(LXC_LIMIT).ok()
    }

    /// Sends from inside the container.
    fn send(&self, to: IpAddr, bytes: u64, rate: Option<u64>) -> Sender {
        let argv = traffic::send_arguments(traffic::PROGRAM, to, bytes, rate);
        Sender::attach(self.attach(&argv.iter().map(String::as_str).collect::<Vec<_>>()))
    }

    /// Ends it and waits until LXC has done everything that comes after.
    #[track_caller]
    fn stop(&self) {
        self.sandbox.run(&self.lxc("lxc-stop", &["-k"])).ok();
        self.wait_ended();
    }

    #[track_caller]
    fn wait_ended(&self) {
        wait_until("the last post-stop hook", LXC_LIMIT, || self.end_mark().exists());
    }

    /// Ends container and monitor without a chance for any of the hooks.
    #[track_caller]
    fn kill(&self) {
        let (monitor, pid) = (self.monitor(), self.pid());
        // The container's first process dies with its monitor (PR_SET_PDEATHSIG), perhaps before kill(1) comes to it.
        self.sandbox.sh(&format!("kill -9 {monitor} {pid} || :"));
        for process in [monitor, pid] {
            wait_until("the end of the container's processes", LXC_LIMIT, || {
                self.sandbox.run(&["test", "-e", &format!("/proc/{process}")]).code == Some(1)
            });
        }
        assert!(!self.end_mark().exists(), "the post-stop hooks did run");
    }

    /// `mptcp-hook` as the container's starter.
    #[track_caller]
    fn hook(&self, arguments: &[&str]) -> Outcome {
        let program = self.hook_program().display().to_string();
        self.sandbox.run(&self.as_starter(&[&[program.as_str()], arguments].concat()))
    }

    /// The starter's `status --json`.
    #[track_caller]
    fn status(&self) -> Value {
        let json = self.hook(&["status", "--json"]).ok();
        serde_json::from_str(&json).unwrap_or_else(|e| panic!("status --json gave {json}: {e}"))
    }

    /// The container in the starter's `status --json`; panics unless it is there exactly once.
    #[track_caller]
    fn in_status(&self) -> Value {
        let status = self.status();
        let containers = status["containers"].as_array().expect("containers is a list");
        let mut found = containers.iter().filter(|container| container["id"] == self.name.as_str());
        let (first, second) = (found.next(), found.next());
        assert!(first.is_some() && second.is_none(), "{} is not there once in {status:#}", self.name);
        first.cloned().unwrap_or_default()
    }

    /// eth1 of the container in the starter's `status --json`, which has it in `state`.
    #[track_caller]
    fn eth1_in_status(&self, state: &str) -> Value {
        eth1_of(&self.in_status(), state)
    }

    /// The kernel has exactly one endpoint in the container: eth1's address with `names` as its flags.
    #[track_caller]
    fn assert_only_endpoint(&self, address: &str, names: &[&str]) {
        let address: IpAddr = address.parse().expect("an address");
        assert_only_endpoint(self.sandbox, &self.netns(), address, names);
    }

    /// The starter's ledger knows nothing any more.
    #[track_caller]
    fn assert_ledger_is_empty(&self) {
        let status = self.status();
        assert_eq!((&status["containers"], &status["settings"]), (&json!([]), &json!([])), "{status:#}");
    }
}

/// The user who is not root, with what an administrator gives to somebody who shall run containers.
fn add_user(sandbox: &Sandbox) {
    require("setpriv", "util-linux");
    require("newuidmap", "uidmap");
    for file in ["/etc/subuid", "/etc/subgid"] {
        sandbox.write(file, &format!("lxcuser:{USER_FIRST_MAPPED}:65536\n"));
    }
    sandbox.write("/etc/lxc/lxc-usernet", "lxcuser veth br0 4\nlxcuser veth br1 4\n");
    sandbox.sh(&format!(
        "echo 'lxcuser:x:{USER}:{USER}::/:/bin/sh' >>/etc/passwd
         echo 'lxcuser:x:{USER}:' >>/etc/group
         mkdir -p /run/user/{USER} {cgroup}
         chmod 700 /run/user/{USER}
         chown {USER}:{USER} /run/user/{USER} {cgroup} {cgroup}/cgroup.procs {cgroup}/cgroup.subtree_control",
        cgroup = user_cgroup(sandbox)
    ));
}

/// The cgroup that belongs to the user, as systemd would give one.
fn user_cgroup(sandbox: &Sandbox) -> String {
    format!("/sys/fs/cgroup/{}", sandbox.name("user"))
}

/// A server behind two bridges, br0 and br1, in the sandbox's own network namespace.
fn two_bridges(sandbox: &Sandbox) -> TwoPaths<'_> {
    let paths = TwoPaths::at_host(sandbox);
    paths.bridge("br0", "10.0.1.1/24");
    paths.bridge("br1", "10.0.2.1/24");
    paths
}

/// The whole life of a container whose eth1 shall be a backup path: it is one from the first connection on, really
/// carries nothing while eth0 works, takes over when eth0 is cut, and nothing stays behind.
fn backup_join_traffic_failover(container: &Lxc, paths: &TwoPaths) {
    let sandbox = container.sandbox;
    let server = Server::start(sandbox, paths.server());
    let capture = Capture::start(sandbox, paths.server());
    container.start();

    container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    let in_status = container.in_status();
    assert_eq!(in_status["live"], true);
    assert_eq!(in_status["runtime"], "lxc");
    assert_eq!(in_status["pid"], container.pid());
    let eth1 = container.eth1_in_status("applied");
    assert_eq!(eth1["flags"], json!(["subflow", "backup"]));
    assert_eq!(eth1["route"], "ok");
    assert_eq!(eth1["endpoints"][0]["address"], "10.0.2.2");

    let send = |to, bytes, rate| container.send(to, bytes, rate);
    assert_backup_path(paths, &server, &capture, ["br0", "br1"], [10, 0, 2, 2], send);

    container.stop();
    container.assert_ledger_is_empty();
    assert_eq!(sandbox.endpoints(&Netns::Host), []);
}

/// LXC appends NAME, `lxc` and `start-host` to the line.
#[test]
fn start_host_version_0_upstream_backup_join_traffic_failover() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let container = Lxc::new(&sandbox, "v0").two_paths(0).start_host("--interface eth1=backup").post_stop();
    backup_join_traffic_failover(&container, &paths);
}

/// LXC says everything by its environment variables.
#[test]
fn start_host_version_1_upstream_backup_join_traffic_failover() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let container = Lxc::new(&sandbox, "v1").two_paths(1).start_host("--interface eth1=backup").post_stop();
    backup_join_traffic_failover(&container, &paths);
}

/// The container's users are others on the machine, but the hook runs as its root.
#[test]
fn start_host_mapped_ids_upstream_backup_join_traffic_failover() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let container = Lxc::in_lxcpath(&sandbox, "lxc", "mapped", Starter::RootMapped)
        .two_paths(1)
        .start_host("--interface eth1=backup")
        .post_stop();
    backup_join_traffic_failover(&container, &paths);
}

/// The hook has no capability and has to get them in the user namespace of the container.
#[test]
fn start_host_unprivileged_user_upstream_backup_join_traffic_failover() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let container = Lxc::in_lxcpath(&sandbox, "lxc", "rootless", Starter::User)
        .two_paths(1)
        .start_host("--interface eth1=backup --sysctl stale_loss_cnt=2")
        .post_stop();
    backup_join_traffic_failover(&container, &paths);
    // The user's ledger is the user's alone, and root's was never touched.
    assert!(sandbox.outside(&format!("/run/user/{USER}/mptcp-hook")).is_dir());
    assert!(!sandbox.outside("/run/mptcp-hook").exists());
    assert_eq!(container.status()["rootless"], true);
}

/// A user may set what belongs to the container's namespace, and share what the host has; nothing more.
#[test]
fn start_host_unprivileged_user_changes_its_own_values_alone() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let host_value = || sandbox.sysctl(&Netns::Host, "net/core/rmem_max").expect("every namespace shows this value");
    let present: u32 = host_value().parse().expect("a number");
    let make = |what, wish: String| {
        let container = Lxc::in_lxcpath(&sandbox, "lxc", what, Starter::User).two_paths(1);
        container.start_host(&format!("--interface eth1=backup {wish}")).post_stop()
    };

    let own = make("own", format!("--sysctl stale_loss_cnt=2 --limit subflows=4 --sysctl net.core.rmem_max={present}"));
    own.start();
    assert_eq!(sandbox.sysctl(&own.netns(), "net/mptcp/stale_loss_cnt").as_deref(), Some("2"));
    assert!(sandbox.sh_in(&own.netns(), "ip mptcp limits show").contains("subflows 4"));
    let settings = own.in_status()["settings"].clone();
    let outcome =
        |key| settings.as_array().into_iter().flatten().find(|s| s["key"] == key).map(|s| s["outcome"].clone());
    assert_eq!(outcome("net.mptcp.stale_loss_cnt"), Some(json!("applied")), "{settings:#}");
    assert_eq!(outcome("net.core.rmem_max"), Some(json!("shared")), "{settings:#}");
    own.hook(&["apply", &own.name, "--interface", "eth1=subflow"]).ok();
    own.assert_only_endpoint("10.0.2.2", &["subflow"]);
    own.hook(&["release", &own.name]).ok();
    assert_eq!(sandbox.endpoints(&own.netns()), []);
    assert_ne!(sandbox.sysctl(&own.netns(), "net/mptcp/stale_loss_cnt").as_deref(), Some("2"));
    own.assert_ledger_is_empty();
    own.stop();
    own.start();
    own.kill();
    assert_eq!(own.in_status()["live"], false);
    own.hook(&["release", "--stale"]).ok();
    own.assert_ledger_is_empty();

    let greedy = make("greedy", format!("--sysctl net.core.rmem_max={}", present + 4096));
    let log = greedy.refused();
    let ours = log.lines().find(|line| line.contains("produced output: mptcp-hook: ")).unwrap_or_default();
    for part in ["net.core.rmem_max", &greedy.name, "user namespace"] {
        assert!(ours.contains(part), "`{part}` is not in: {log}");
    }
    assert!(log.contains("status 3"), "{log}");
    assert_eq!(host_value(), present.to_string());
    greedy.assert_ledger_is_empty();
}

/// The key is not even there in the container: it is the host's alone, and no user's to change.
#[test]
fn host_value_is_refused_to_an_unprivileged_user() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let container = Lxc::in_lxcpath(&sandbox, "lxc", "greedy", Starter::User)
        .hook_version(1)
        .line("lxc.net.0.type = empty")
        .start_host(&format!("--sysctl net.core.netdev_max_backlog={}", original + 1000))
        .post_stop();
    let log = container.refused();
    let ours = log.lines().find(|line| line.contains("produced output: mptcp-hook: ")).unwrap_or_default();
    for part in ["net.core.netdev_max_backlog", &container.name, "user namespace"] {
        assert!(ours.contains(part), "`{part}` is not in: {log}");
    }
    assert!(log.contains("status 3"), "{log}");
    assert_eq!(value.current(), value.original());
    container.assert_ledger_is_empty();
}

/// hooks/lxc/mptcp-hook.conf as it is shipped, and what the container wants in a file of its own.
#[test]
fn start_host_shipped_include_with_a_per_container_file() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("hooks/lxc/mptcp-hook.conf");
    let text = std::fs::read_to_string(&shipped).unwrap_or_else(|e| panic!("{}: {e}", shipped.display()));
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    // The path in the file exists in this sandbox alone.
    let installed = "/usr/local/bin/mptcp-hook";
    assert!(text.contains(&format!("lxc.hook.start-host = {installed} lxc\n")), "{text}");
    sandbox.sh(&format!("mount -t tmpfs -o mode=755 tmpfs /usr/local/bin; cp {} {installed}", hook().display()));
    let include = format!("lxc.include = {}", shipped.display());
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("filed{version}")).two_paths(version).line(&include);
        let file = format!("/etc/mptcp-hook/containers.d/{}.toml", container.name);
        sandbox.write(&file, "[interfaces]\neth1 = \"backup\"\n");
        container.start();
        container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
        let source = container.eth1_in_status("applied")["source"].as_str().unwrap_or_default().to_owned();
        assert!(source.contains(&file), "{source}");
        container.stop();
        container.assert_ledger_is_empty();
    }

    // The file is for those containers alone: nobody else notices the hook.
    let other = Lxc::new(&sandbox, "other").two_paths(1).line(&include);
    other.start();
    assert_eq!(sandbox.endpoints(&other.netns()), []);
    other.assert_ledger_is_empty();
    other.stop();

    let last = Lxc::new(&sandbox, "last").two_paths(0).line(&include);
    sandbox.write(
        &format!("/etc/mptcp-hook/containers.d/{}.toml", last.name),
        "[interfaces]\neth0 = \"subflow\"\neth1 = \"backup\"\n",
    );
    let capture = Capture::start(&sandbox, paths.server());
    let _server = Server::start(&sandbox, paths.server());
    last.start();
    assert_eq!(sandbox.endpoints_on(&last.netns(), "eth0").len(), 1);
    last.send(paths.address(), 5_000_000, Some(RATE)).finish(TRANSFER_LIMIT);
    assert!(capture.wait_join("br1").backup);
    last.stop();
    last.assert_ledger_is_empty();
}

/// A container without a network of its own would change the host's paths.
#[test]
fn start_host_in_the_hosts_namespace_is_refused() {
    let sandbox = Sandbox::new();
    let journal = Journal::listen(&sandbox);
    sandbox.sh("ip link add eth1 type veth peer name far; ip addr add 10.0.2.2/24 dev eth1; ip link set eth1 up");
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("hostnet{version}"))
            .hook_version(version)
            .line("lxc.net.0.type = none")
            .start_host("--interface eth1=backup")
            .line(&format!("lxc.hook.stop = touch {}", sandbox.dir().join("stop-hook-ran").display()))
            .post_stop();
        let log = container.refused();
        assert!(log.contains("status 3"), "{log}");
        let ours = log.lines().find(|line| line.contains("produced output: mptcp-hook: "));
        let ours = ours.unwrap_or_else(|| panic!("not a word of the hook in {log}"));
        assert!(ours.contains(&container.name) && ours.contains("host"), "{ours}");
        let entries = journal.entries().join("\n");
        assert!(entries.contains(&container.name) && entries.contains("refused"), "the journal has: {entries}");
        container.assert_ledger_is_empty();
        assert_eq!(sandbox.endpoints(&Netns::Host), []);
        let stop_hook_ran = sandbox.dir().join("stop-hook-ran");
        wait_until("the stop hook", LXC_LIMIT, || stop_hook_ran.exists());
        std::fs::remove_file(stop_hook_ran).expect("removing a mark");
    }
}

/// What stands on the line is the administrator's mistake to mend: the start says so, and nothing has happened.
#[test]
fn start_host_bad_arguments_stop_the_container() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    for (number, (arguments, status, words)) in [
        ("--interface eth1=bakup", 2, &["bakup", "backup"][..]),
        ("--interface eth1=signal,fullmesh", 2, &["signal", "fullmesh"]),
        ("--interface eth1=0xZZ", 2, &["0xZZ"]),
        ("--inteface eth1=backup", 2, &["--interface"]),
        ("eth1=backup", 2, &["eth1=backup"]),
        ("--interface eth1=backup --limit subflows=9", 2, &["subflows", "8"]),
        ("--interface eth1=backup --sysctl net.core.../x=1", 2, &["sysctl"]),
        ("--interface eth1=backup --sysctl kernel.hostname=x", 2, &["kernel.hostname"]),
        ("--interface eth1=backup --limit subflows=1", 3, &["subflows"]),
        ("--interface eth1=backup --sysctl net.mptcp.no_such_key=1", 1, &["no_such_key"]),
    ]
    .into_iter()
    .enumerate()
    {
        let container =
            Lxc::new(&sandbox, &format!("bad{number}")).two_paths((number % 2) as u8).start_host(arguments).post_stop();
        let log = container.refused();
        assert!(log.contains(&format!("status {status}")), "{arguments}: {log}");
        let ours = log.lines().find_map(|line| line.split_once("produced output: mptcp-hook: ")).map(|(_, text)| text);
        let ours = ours.unwrap_or_else(|| panic!("{arguments}: not a word of the hook in {log}"));
        for word in words {
            assert!(ours.contains(word), "{arguments}: `{word}` is not in: {ours}");
        }
        container.assert_ledger_is_empty();
    }
}

/// The administrator may want containers to start in any case: then without anything of ours. A refusal stays one.
#[test]
fn start_host_on_error_continue_starts_the_container_as_it_is() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    sandbox.policy("on-error = \"continue\"\n");
    let make = |what, wish: &str| {
        let container = Lxc::new(&sandbox, what).two_paths(1);
        container.start_host(&format!("--interface eth1=backup {wish}")).post_stop()
    };
    let failing = make("failing", "--sysctl net.mptcp.no_such_key=1");
    failing.start();
    assert_eq!(sandbox.endpoints(&failing.netns()), []);
    let log = failing.log();
    assert!(log.lines().any(|line| line.contains("mptcp-hook: ") && line.contains("no_such_key")), "{log}");
    failing.assert_ledger_is_empty();
    failing.stop();

    let log = make("lowering", "--limit subflows=1").refused();
    assert!(log.contains("status 3"), "{log}");
}

/// With DHCP in the container eth1 has no address at start-host: that is no mistake, and said; what was asked for
/// comes into force when somebody asks again.
#[test]
fn start_host_without_an_address_is_pending_until_apply() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    for (number, again) in [&[][..], &["--interface", "eth1=backup"]].into_iter().enumerate() {
        let container = Lxc::new(&sandbox, &format!("dhcp{number}"))
            .hook_version(1)
            .veth(0, &["ipv4.address = 10.0.1.2/24", "ipv4.gateway = 10.0.1.1"])
            .veth(1, &[])
            .start_host("--interface eth1=backup")
            .post_stop();
        container.start();
        container.eth1_in_status("pending");
        assert_eq!(sandbox.endpoints(&container.netns()), []);
        let log = container.log();
        assert!(log.lines().any(|line| line.contains("eth1") && line.contains("pending")), "{log}");

        container.sh("/bin/busybox ip addr add 10.0.2.2/24 dev eth1
             /bin/busybox ip route add default via 10.0.2.1 dev eth1 metric 200");
        container.hook(&[&["apply", container.name.as_str()], again].concat()).ok();
        assert_eq!(container.eth1_in_status("applied")["route"], "ok");
        container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
        let joins = capture.joins().len();
        container.send(paths.address(), 5_000_000, Some(RATE)).finish(TRANSFER_LIMIT);
        assert!(capture.wait_join("br1").backup);
        assert!(capture.joins().len() > joins);
        container.stop();
        container.assert_ledger_is_empty();
    }
}

/// `apply` by the container's name: its open connection learns it by MP_PRIO, in both directions of the switch.
#[test]
fn apply_switches_the_live_connections_of_an_lxc_container() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let container = Lxc::new(&sandbox, "live").two_paths(1).start_host("--interface eth1=backup").post_stop();
    container.start();
    let mut transfer = container.send(paths.address(), 60_000_000, Some(RATE));
    transfer.wait_sent(1_000_000);
    assert!(capture.wait_join("br1").backup);
    // The bridges' ports see every packet once more.
    let prios = || capture.prios().into_iter().filter(|p| p.interface.starts_with("br")).collect::<Vec<_>>();
    assert_eq!(prios(), []);
    let id = sandbox.endpoints(&container.netns())[0].id;
    for (wish, names, backup) in
        [("eth1=subflow", &["subflow"][..], false), ("eth1=backup", &["backup", "subflow"], true)]
    {
        let seen = prios().len();
        container.hook(&["apply", &container.name, "--interface", wish]).ok();
        container.assert_only_endpoint("10.0.2.2", names);
        let prio = wait_for("an MP_PRIO option", Duration::from_secs(5), || prios().get(seen).cloned());
        assert_eq!(prio.backup, backup, "after {wish}: {prio:?}");
        assert!(prio.source.to_string().ends_with(".2"), "the container sends it: {prio:?}");
    }
    assert_eq!(sandbox.endpoints(&container.netns())[0].id, id, "the endpoint was replaced");
    assert!(transfer.finish(TRANSFER_LIMIT).mptcp);
    container.stop();
    container.assert_ledger_is_empty();
}

/// As when an include file and the container's own configuration both have the hook.
#[test]
fn start_host_several_lines_that_agree_are_merged() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("agree{version}"))
            .two_paths(version)
            .start_host("")
            .start_host("--interface eth1=backup")
            .start_host("--interface eth1=backup --limit subflows=5")
            .start_host("--interface 'eth*=subflow' --sysctl stale_loss_cnt=3")
            .start_host("")
            .post_stop()
            .post_stop();
        container.start();
        let netns = container.netns();
        let flags =
            |interface| sandbox.endpoints_on(&netns, interface).into_iter().map(|e| e.flags).collect::<Vec<_>>();
        assert_eq!(flags("eth0"), [["subflow"]]);
        assert_eq!(flags("eth1"), [["backup", "subflow"]]);
        assert!(sandbox.sh_in(&netns, "ip mptcp limits show").contains("subflows 5"));
        assert_eq!(sandbox.sysctl(&netns, "net/mptcp/stale_loss_cnt").as_deref(), Some("3"));
        let interfaces = container.in_status()["interfaces"].clone();
        let names: Vec<_> = interfaces.as_array().into_iter().flatten().map(|i| i["name"].clone()).collect();
        assert_eq!(names, ["eth0", "eth1"]);
        container.stop();
        // The second post-stop line finds nothing left to do, which is no mistake.
        assert!(!container.log().contains("exited with status"), "{}", container.log());
        container.assert_ledger_is_empty();
    }
}

/// The second line stops the container, and post-stop takes back what the first did.
#[test]
fn start_host_several_lines_that_disagree_stop_the_container() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let seen = sandbox.dir().join("seen");
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("split{version}"))
            .two_paths(version)
            .start_host("--interface eth1=backup")
            .script("start-host", &format!("ip mptcp endpoint show >{}", seen.display()))
            .start_host("--interface eth1=subflow")
            .post_stop();
        let log = container.refused();
        assert!(log.contains("status 2"), "{log}");
        let first = std::fs::read_to_string(&seen).expect("what stood between the two lines has run");
        assert!(first.contains("10.0.2.2") && first.contains("backup"), "{first}");
        let ours = log.lines().filter(|line| line.contains("produced output: mptcp-hook: ")).collect::<Vec<_>>();
        assert!(ours.iter().any(|line| line.contains("eth1=subflow") && line.contains("eth1=backup")), "{ours:#?}");
        container.assert_ledger_is_empty();
    }
}

/// LXC adds the addresses just before the hook runs: duplicate address detection is not over yet then.
#[test]
fn start_host_tentative_ipv6_is_added_at_once() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    sandbox.sh("ip addr add fd00:1::1/64 dev br0 nodad; ip addr add fd00:2::1/64 dev br1 nodad");
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    let seen = sandbox.dir().join("tentative");
    let container = Lxc::new(&sandbox, "v6")
        .hook_version(1)
        .veth(0, &["ipv6.address = fd00:1::2/64", "ipv6.gateway = fd00:1::1"])
        .veth(1, &["ipv6.address = fd00:2::2/64"])
        .script(
            "start-host",
            &format!(
                "ip -6 route add default via fd00:2::1 dev eth1 metric 2048
                 ip -6 addr show dev eth1 tentative >{}",
                seen.display()
            ),
        )
        .start_host("--interface eth1=backup")
        .script("start-host", &format!("ip -6 addr show dev eth1 tentative >>{}", seen.display()))
        .post_stop();
    container.start();
    let seen = std::fs::read_to_string(seen).expect("what the scripts saw");
    assert_eq!(seen.matches("fd00:2::2/64").count(), 2, "not tentative before and after the hook: {seen}");
    container.assert_only_endpoint("fd00:2::2", &["backup", "subflow"]);
    container.eth1_in_status("applied");

    wait_until("the end of duplicate address detection", Duration::from_secs(5), || {
        let left = sandbox.sh_in(&container.netns(), "ip -6 addr show scope global tentative");
        left.is_empty()
    });
    container.assert_only_endpoint("fd00:2::2", &["backup", "subflow"]);
    let mut transfer = container.send(paths.address6(), 8_000_000, Some(4_000_000));
    transfer.wait_sent(1_000_000);
    let join = capture.wait_join("br1");
    assert_eq!((join.source, join.backup), ("fd00:2::2".parse().expect("an address"), true));
    paths.cut("br0");
    assert!(transfer.finish(TRANSFER_LIMIT).mptcp);
    container.stop();
    container.assert_ledger_is_empty();
}

/// LXC starts it again under the same monitor: another pid, another namespace, the hooks once more.
#[test]
fn a_reboot_from_inside_sets_the_container_up_again() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let _server = Server::start(&sandbox, paths.server());
    let capture = Capture::start(&sandbox, paths.server());
    for version in [0, 1] {
        let container = Lxc::new(&sandbox, &format!("reboot{version}"))
            .two_paths(version)
            .start_host("--interface eth1=backup --sysctl stale_loss_cnt=3")
            .post_stop();
        container.start();
        let before = container.pid();
        for round in 1..=2 {
            let pid = container.pid();
            // The program that asks for it ends with the container.
            let _ = container.attach(&["/bin/busybox", "reboot", "-f"]).wait(LXC_LIMIT);
            wait_until("the container after its reboot", LXC_LIMIT, || {
                let now = sandbox.run(&container.lxc("lxc-info", &["-H", "-p"]));
                now.stdout.trim().parse().is_ok_and(|now: u32| now != pid) && container.state() == "RUNNING"
            });
            let runs = container.log().matches("subflow,backup 10.0.2.2").count();
            assert_eq!(runs, round + 1, "{}", container.log());
        }
        assert_ne!(container.pid(), before);
        container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
        assert_eq!(sandbox.sysctl(&container.netns(), "net/mptcp/stale_loss_cnt").as_deref(), Some("3"));
        let in_status = container.in_status();
        assert_eq!((&in_status["pid"], &in_status["live"]), (&json!(container.pid()), &json!(true)));
        let joins = capture.joins().len();
        container.send(paths.address(), 5_000_000, Some(RATE)).finish(TRANSFER_LIMIT);
        assert!(capture.wait_join("br1").backup && capture.joins().len() > joins);
        // The hooks of a reboot have left this mark, too.
        let _ = std::fs::remove_file(container.end_mark());
        container.stop();
        container.assert_ledger_is_empty();
    }
}

/// Nobody was left to run post-stop.
#[test]
fn killed_with_its_monitor_is_released_as_stale_or_settled_by_the_next_start() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let container = Lxc::new(&sandbox, "killed").two_paths(1).start_host("--interface eth1=backup").post_stop();
    container.start();
    container.kill();
    assert_eq!(container.in_status()["live"], false);
    container.hook(&["release", "--stale"]).ok();
    container.assert_ledger_is_empty();

    container.start();
    container.kill();
    let dead = container.in_status();
    assert_eq!(dead["live"], false);
    container.start();
    let alive = container.in_status();
    assert_eq!((&alive["live"], &alive["pid"]), (&json!(true), &json!(container.pid())));
    container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    container.hook(&["release", "--stale"]).ok();
    container.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    container.stop();
    container.assert_ledger_is_empty();
}

/// Two containers may have one name in two directories.
#[test]
fn one_name_in_two_lxcpaths_is_two_containers() {
    let sandbox = Sandbox::new();
    let _paths = two_bridges(&sandbox);
    let make = |lxcpath, flags: &str| {
        let container = Lxc::in_lxcpath(&sandbox, lxcpath, "twin", Starter::Root).hook_version(1);
        let container = container.veth(0, &[]).veth(1, &["ipv4.address = 10.0.2.2/24"]);
        container.start_host(&format!("--interface eth1={flags}")).post_stop()
    };
    let (first, second) = (make("here", "backup"), make("there", "subflow"));
    first.start();
    second.start();
    first.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    second.assert_only_endpoint("10.0.2.2", &["subflow"]);
    // Which of them is meant cannot be told.
    let message = first.hook(&["apply", &first.name, "--interface", "eth1=subflow"]).fails_with(2);
    assert!(message.contains(&first.name), "{message}");
    first.stop();
    second.assert_only_endpoint("10.0.2.2", &["subflow"]);
    assert_eq!(second.in_status()["pid"], second.pid());
    second.stop();
    second.assert_ledger_is_empty();
}

/// A value that the kernel has once is changed for one container, shared with the next, refused to a third that wants
/// another, and brought back by the last to leave.
#[test]
fn host_value_is_shared_refused_and_restored() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let (wanted, other) = ((original + 1000).to_string(), (original + 2000).to_string());
    let make = |what, value: &str| {
        let container = Lxc::new(&sandbox, what).hook_version(1).line("lxc.net.0.type = empty");
        container.start_host(&format!("--sysctl net.core.netdev_max_backlog={value}")).post_stop()
    };
    let (first, second, third) = (make("first", &wanted), make("second", &wanted), make("third", &other));
    first.start();
    assert_eq!(value.current(), wanted);
    let setting = first.status()["settings"][0].clone();
    assert_eq!((&setting["scope"], &setting["key"]), (&json!("host"), &json!("net.core.netdev_max_backlog")));
    assert_eq!((&setting["value"], &setting["original"]), (&json!(wanted), &json!(original.to_string())));

    let log = third.refused();
    assert!(log.contains("status 3"), "{log}");
    let ours = log.lines().find(|line| line.contains("produced output: mptcp-hook: ")).unwrap_or_default();
    for part in ["net.core.netdev_max_backlog", &first.name, &third.name, &wanted, &other] {
        assert!(ours.contains(part), "`{part}` is not in: {ours}");
    }
    assert_eq!(value.current(), wanted);
    let conflicts = sandbox.conflicts();
    assert_eq!(conflicts.len(), 1, "{conflicts:#?}");
    assert_eq!((&conflicts[0]["outcome"], &conflicts[0]["container"]), (&json!("refused"), &json!(third.name)));
    assert_eq!(conflicts[0]["holders"], json!([first.name]));

    second.start();
    assert_eq!(second.in_status()["settings"][0]["outcome"], "shared");
    first.stop();
    assert_eq!(value.current(), wanted);
    assert_eq!(second.status()["settings"][0]["claims"], json!([{"container": second.name, "value": wanted}]));
    second.stop();
    assert_eq!(value.current(), value.original());
    third.start();
    assert_eq!(value.current(), other);
    third.stop();
    assert_eq!(value.current(), value.original());
    third.assert_ledger_is_empty();
}

/// What the hook's line can say about a value that another container relies on: leave it, or take it.
#[test]
fn host_value_warned_about_and_overridden() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let (wanted, other) = ((original + 1000).to_string(), (original + 2000).to_string());
    let make = |what, value: &str, more: &str| {
        let container = Lxc::new(&sandbox, what).hook_version(1).line("lxc.net.0.type = empty");
        container.start_host(&format!("--sysctl net.core.netdev_max_backlog={value} {more}")).post_stop()
    };
    let holder = make("holder", &wanted, "");
    let modest = make("modest", &other, "--on-conflict warn");
    let bold = make("bold", &other, "--on-conflict override");
    let outcome = |container: &Lxc| container.in_status()["settings"][0]["outcome"].clone();
    holder.start();

    modest.start();
    assert_eq!(value.current(), wanted);
    assert_eq!(outcome(&modest), "kept");
    let log = modest.log();
    assert!(log.lines().any(|line| line.contains("warning") && line.contains(&holder.name)), "{log}");
    modest.stop();
    assert_eq!(value.current(), wanted);

    bold.start();
    assert_eq!(value.current(), other);
    assert_eq!((outcome(&bold), outcome(&holder)), (json!("overrode"), json!("overridden")));
    let log = bold.log();
    assert!(log.lines().any(|line| line.contains("warning") && line.contains(&holder.name)), "{log}");
    bold.stop();
    assert_eq!(value.current(), wanted);
    assert_ne!(outcome(&holder), "overridden");
    holder.stop();
    assert_eq!(value.current(), value.original());
    let outcomes: Vec<_> = sandbox.conflicts().iter().map(|conflict| conflict["outcome"].clone()).collect();
    assert_eq!(outcomes, ["warned", "overrode"]);
    holder.assert_ledger_is_empty();
}

/// The first line of the hook has changed the host already when the second stops the container.
#[test]
fn host_value_is_restored_after_a_failed_start() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let seen = sandbox.dir().join("seen");
    let container = Lxc::new(&sandbox, "failing")
        .hook_version(0)
        .line("lxc.net.0.type = empty")
        .start_host(&format!("--sysctl net.core.netdev_max_backlog={}", original + 1000))
        .line(&format!("lxc.hook.start-host = cp /proc/sys/{HOST_KEY} {}; :", seen.display()))
        .start_host("--interface eth1=nonsense")
        .post_stop();
    container.refused();
    let seen = std::fs::read_to_string(seen).expect("what stood between the two lines has run");
    assert_eq!(seen.trim(), (original + 1000).to_string());
    assert_eq!(value.current(), value.original());
    container.assert_ledger_is_empty();
}

/// A dead container holds nothing back, and what it found on the host is not forgotten.
#[test]
fn host_value_of_a_killed_container() {
    let value = HostValue::of_sysctl(HOST_KEY);
    let sandbox = Sandbox::host_network();
    let original: u32 = value.original().parse().expect("a number");
    let (wanted, other) = ((original + 1000).to_string(), (original + 2000).to_string());
    let make = |what, value: &str| {
        let container = Lxc::new(&sandbox, what).hook_version(1).line("lxc.net.0.type = empty");
        container.start_host(&format!("--sysctl net.core.netdev_max_backlog={value}")).post_stop()
    };
    let (killed, next) = (make("killed", &wanted), make("next", &other));

    // The same container again: its new life takes the place of the old one.
    killed.start();
    killed.kill();
    assert_eq!(value.current(), wanted);
    killed.start();
    assert_eq!(value.current(), wanted);
    let settings = killed.status()["settings"].clone();
    assert_eq!(settings[0]["original"], original.to_string(), "{settings:#}");
    assert_eq!(settings[0]["claims"].as_array().map(Vec::len), Some(1), "{settings:#}");

    // Another one, that wants another value, is not held back by it.
    killed.kill();
    next.start();
    assert_eq!(value.current(), other);
    assert_eq!(next.status()["settings"][0]["original"], original.to_string());
    next.hook(&["release", "--stale"]).ok();
    assert_eq!(value.current(), other);
    next.stop();
    assert_eq!(value.current(), value.original());
    next.assert_ledger_is_empty();

    // Nobody comes after it.
    killed.start();
    killed.kill();
    killed.hook(&["release", "--stale"]).ok();
    assert_eq!(value.current(), value.original());
    killed.assert_ledger_is_empty();
}

/// lxc-start waits for everybody who has a descriptor of the hook's output.
#[test]
fn the_hook_keeps_nobody_waiting() {
    let sandbox = Sandbox::new();
    let paths = two_bridges(&sandbox);
    let start = |container: &Lxc| {
        let begin = Instant::now();
        container.start();
        begin.elapsed()
    };
    let without = Lxc::new(&sandbox, "without").two_paths(1);
    let with = Lxc::new(&sandbox, "with").two_paths(1).start_host("--interface eth1=backup").post_stop();
    let bare = start(&without);
    without.stop();
    let hooked = start(&with);
    assert!(hooked < bare + Duration::from_secs(3), "{hooked:?} with the hook, {bare:?} without");
    let program = with.hook_program();
    let left = sandbox.sh(&format!(
        "for process in /proc/[0-9]*; do
           [ \"$(readlink $process/exe)\" != {} ] || echo $process
         done",
        program.display()
    ));
    assert_eq!(left, "", "processes of the hook are still there");
    with.stop();

    // In the foreground LXC lives as long as the container, and the hook's words go to the log all the same.
    let foreground = Lxc::new(&sandbox, "front").two_paths(1).start_host("--interface eth1=backup").post_stop();
    foreground.write();
    let log = foreground.log_file().display().to_string();
    let running = sandbox.spawn(&foreground.lxc("lxc-start", &["-F", "-l", "DEBUG", "-o", &log]));
    wait_until("the container in the foreground", LXC_LIMIT, || foreground.state() == "RUNNING");
    foreground.assert_only_endpoint("10.0.2.2", &["backup", "subflow"]);
    let _server = Server::start(&sandbox, paths.server());
    assert!(foreground.send(paths.address(), 1_000_000, None).finish(TRANSFER_LIMIT).mptcp);
    foreground.stop();
    let outcome = running.wait(LXC_LIMIT);
    assert!(!outcome.stdout.contains("mptcp-hook") && !outcome.stderr.contains("mptcp-hook"), "{outcome}");
    assert!(foreground.log().contains("produced output: mptcp-hook: "), "{}", foreground.log());
    foreground.assert_ledger_is_empty();
}
