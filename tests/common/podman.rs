//! podman with netavark and conmon, on crun and runc, as an administrator installs the hook: the shipped hooks.d file,
//! named in containers.conf.
//!
//! podman joins the containers to bridges in the sandbox's own namespace, which is the server of these tests: eth0 of
//! a container is behind br0, eth1 behind br1, and the server's address 10.0.0.1 is reachable over both.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::oci::Runtime;
use super::paths::{TwoPaths, Wiring};
use super::proof::{assert_only_endpoint, eth1_of};
use super::sandbox::{Netns, Outcome, Running, Sandbox};
use super::traffic::Sender;
use super::{ENGINE_LIMIT, hook, oci, readable_hook, require, traffic, user, wait_for};

/// What is shipped for podman and CRI-O.
const HOOKS_D: &str = include_str!("../../hooks/oci/hooks.d/mptcp-hook.json");

/// Where the shipped file expects the program.
const INSTALLED: &str = "/usr/local/bin/mptcp-hook";

/// The networks, with the names that the interfaces get in the container.
pub const NETWORKS: [&str; 2] = ["--network=net0:interface_name=eth0", "--network=net1:interface_name=eth1"];

/// The usual wish.
pub const BACKUP: &str = "--annotation=mptcp-hook/interface.eth1=backup";

/// The default route by a network.
#[derive(Clone, Copy, Debug)]
pub enum DefaultRoute {
    /// As netavark makes them: with the same metric for every network, so that it is left to chance which of two
    /// carries the first subflow.
    OfPodman,
    /// With netavark's option `metric`.
    Metric(u32),
    /// None: podman 4.3 cannot be asked for that but with `--internal`.
    None,
}

/// A podman of its own below the sandbox's directory.
pub struct Podman<'a> {
    pub sandbox: &'a Sandbox,
    runtime: Runtime,
}

impl<'a> Podman<'a> {
    /// Installs the hook as shipped; the default route by net0 is preferred to that by net1.
    pub fn new(sandbox: &'a Sandbox, runtime: Runtime) -> Self {
        Self::with_hook_arguments(sandbox, runtime, &[])
    }

    /// Installs the hook with further `arguments` in its hooks.d file.
    pub fn with_hook_arguments(sandbox: &'a Sandbox, runtime: Runtime, arguments: &[&str]) -> Self {
        for (program, package) in [("podman", "podman"), ("conmon", "conmon"), (runtime.program(), runtime.program())] {
            require(program, package);
        }
        let netavark = ["/usr/lib/podman/netavark", "/usr/libexec/podman/netavark"].map(PathBuf::from);
        assert!(
            netavark.iter().any(|path| path.exists()),
            "netavark is missing: apt-get install --no-install-recommends -y netavark"
        );
        // What podman knows about images goes there, wherever its storage is.
        sandbox.sh("mkdir -p /var/lib/containers; mount -t tmpfs -o mode=700 tmpfs /var/lib/containers");
        let dir = sandbox.dir();
        for (network, octet) in [("net0", 1), ("net1", 2)] {
            write_network(sandbox, network, octet, DefaultRoute::Metric(octet * 100));
        }
        write_hooks_d(&dir.join("hooks.d"), &hook(), arguments);
        sandbox.write("/etc/containers/containers.conf", &containers_conf(dir, runtime));
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{}\"\nrunroot = \"/run/containers\"\n",
            dir.join("storage").display()
        );
        sandbox.write("/etc/containers/storage.conf", &storage);
        Self { sandbox, runtime }
    }

    /// Another hook in hooks.d, for all containers at createRuntime; podman runs hooks in the order of their files'
    /// names.
    pub fn add_hook(&self, file: &str, program: &Path) {
        let entry = json!({
            "version": "1.0.0",
            "hook": { "path": program },
            "when": { "always": true },
            "stages": ["createRuntime"],
        });
        let path = self.sandbox.dir().join("hooks.d").join(file);
        std::fs::write(path, entry.to_string()).expect("writing a hooks.d file");
    }

    /// Runs podman with `arguments`.
    #[track_caller]
    pub fn podman(&self, arguments: &[&str]) -> Outcome {
        self.sandbox.spawn(&[&["podman"], arguments].concat()).wait(ENGINE_LIMIT)
    }

    /// The option for an annotation, with blanks for commas: podman before 5.0 splits there, as it does with a line of CSV.
    pub fn annotation(&self, key: &str, value: &str) -> String {
        format!("--annotation={key}={}", value.replace(',', " "))
    }

    /// Where crun puts what hooks of the container `name` print; elsewhere it would go to /dev/null.
    pub fn hook_messages(&self, name: &str) -> PathBuf {
        self.sandbox.dir().join(format!("{name}.hooks"))
    }

    /// `podman run` of a container that sleeps.
    #[track_caller]
    pub fn run(&self, name: &str, options: &[&str]) -> Outcome {
        self.run_from(None, name, options)
    }

    /// [`Podman::run`] from an image instead of a directory.
    #[track_caller]
    fn run_from(&self, image: Option<&str>, name: &str, options: &[&str]) -> Outcome {
        let messages = format!("--annotation=run.oci.hooks.stderr={}", self.hook_messages(name).display());
        let cgroup = format!("--cgroup-parent=/{}", self.sandbox.unique());
        let root = oci::root_filesystem(self.sandbox).display().to_string();
        let mut arguments = vec!["run", "--detach", "--name", name, &messages];
        if self.runtime == Runtime::Runc {
            arguments.push(&cgroup);
        }
        arguments.extend(options);
        match image {
            Some(image) => arguments.push(image),
            None => arguments.extend(["--rootfs", &root]),
        }
        arguments.extend(["/bin/busybox", "sleep", "1000"]);
        self.podman(&arguments)
    }

    /// Starts a container with `options`.
    #[track_caller]
    pub fn start(&'a self, name: &str, options: &[&str]) -> Member<'a> {
        self.start_from(None, name, options)
    }

    /// [`Podman::start`] from an image instead of a directory.
    #[track_caller]
    pub fn start_from(&'a self, image: Option<&str>, name: &str, options: &[&str]) -> Member<'a> {
        let outcome = self.run_from(image, name, options);
        let messages = std::fs::read_to_string(self.hook_messages(name)).unwrap_or_default();
        assert_eq!(outcome.code, Some(0), "{outcome}\n{messages}");
        Member { podman: self, name: name.to_owned(), id: outcome.ok() }
    }

    /// Starts a container with both networks and `options`.
    #[track_caller]
    pub fn start_on_both(&'a self, name: &str, options: &[&str]) -> Member<'a> {
        self.start(name, &[&NETWORKS[..], options].concat())
    }

    /// A container that the hook has to keep from starting with exit `status`; gives all that was printed and its id.
    #[track_caller]
    pub fn refused(&self, name: &str, options: &[&str], status: i32) -> (String, String) {
        let outcome = self.run(name, options);
        let hooks = std::fs::read_to_string(self.hook_messages(name)).unwrap_or_default();
        let message = format!("{outcome}\n{hooks}");
        assert_ne!(outcome.code, Some(0), "it was started: {message}");
        let said = [format!("exit status {status}"), format!("exit code: {status}")];
        assert!(said.iter().any(|words| message.contains(words)), "not exit {status}: {message}");
        assert_eq!(self.inspect(name, "{{.State.Pid}}"), "0", "it runs: {message}");
        let id = self.inspect(name, "{{.Id}}");
        self.podman(&["rm", "--force", "--time=0", name]).ok();
        (message, id)
    }

    #[track_caller]
    pub fn inspect(&self, name: &str, format: &str) -> String {
        self.podman(&["inspect", "--format", format, name]).ok()
    }

    /// A pod with both networks, whose first container is of an image made here.
    #[track_caller]
    pub fn pod(&self, name: &str) {
        let root = oci::root_filesystem(self.sandbox).display().to_string();
        self.sandbox.sh(&format!("tar -C {root} -c . | podman import --quiet - localhost/infra"));
        let cgroup = format!("--cgroup-parent=/{}", self.sandbox.unique());
        let mut arguments = vec!["pod", "create", "--name", name, "--share=net", "--infra-image=localhost/infra"];
        arguments.push("--infra-command=/bin/busybox sleep 1000");
        if self.runtime == Runtime::Runc {
            // podman 4.3 forbids every device in a pod's own cgroup, /dev/null included.
            arguments.extend([cgroup.as_str(), "--share-parent=false"]);
        }
        arguments.extend(NETWORKS);
        self.podman(&arguments).ok();
    }
}

/// A container of podman.
pub struct Member<'a> {
    podman: &'a Podman<'a>,
    name: String,
    id: String,
}

impl Member<'_> {
    pub fn id(&self) -> &str {
        &self.id
    }

    #[track_caller]
    pub fn netns(&self) -> Netns {
        let pid = self.podman.inspect(&self.name, "{{.State.Pid}}").parse().expect("a pid");
        assert_ne!(pid, 0, "{} does not run", self.name);
        Netns::Pid(pid)
    }

    /// A command in the container.
    pub fn exec(&self, argv: &[&str]) -> Running {
        self.podman.sandbox.spawn(&[&["podman", "exec", &self.name], argv].concat())
    }

    pub fn send(&self, to: IpAddr, bytes: u64, rate: u64) -> Sender {
        let argv = traffic::send_arguments(traffic::PROGRAM, to, bytes, Some(rate));
        Sender::attach(self.exec(&argv.iter().map(String::as_str).collect::<Vec<_>>()))
    }

    /// `podman rm --force`, which runs poststop and waits for it.
    #[track_caller]
    pub fn remove(&self) {
        self.podman.podman(&["rm", "--force", "--time=0", &self.name]).ok();
    }

    /// eth1's IPv4 address: podman gives every life of a container another one. Waits for it.
    #[track_caller]
    pub fn eth1_address(&self) -> IpAddr {
        let (sandbox, netns) = (self.podman.sandbox, self.netns());
        wait_for("eth1's address", ENGINE_LIMIT, || {
            let outcome = sandbox.run_in(&netns, &["ip", "-j", "-4", "address", "show", "eth1"]);
            let links: Value = serde_json::from_str(&outcome.stdout).ok()?;
            links[0]["addr_info"][0]["local"].as_str()?.parse().ok()
        })
    }

    /// The container's namespace has one endpoint, eth1's backup, and `status` says so.
    #[track_caller]
    pub fn assert_backup_on_eth1(&self) {
        let sandbox = self.podman.sandbox;
        assert_only_endpoint(sandbox, &self.netns(), self.eth1_address(), &["backup", "subflow"]);
        let eth1 = eth1_of(&sandbox.status_of(&self.id), "applied");
        assert_eq!(eth1["flags"], json!(["subflow", "backup"]));
        assert_eq!(eth1["route"], "ok");
    }
}

/// A network as podman 4 keeps it. The file, because `podman network create` cannot name the bridge (before 4.6) nor
/// pass `metric` on.
pub fn write_network(sandbox: &Sandbox, name: &str, octet: u32, default_route: DefaultRoute) {
    let bridge = name.replace("net", "br");
    let mut network = json!({
        "name": name,
        "id": format!("{octet:064x}"),
        "driver": "bridge",
        "network_interface": bridge,
        "created": "2024-01-01T00:00:00Z",
        "subnets": [{ "subnet": format!("10.0.{octet}.0/24"), "gateway": format!("10.0.{octet}.1") }],
        "ipv6_enabled": false,
        "internal": matches!(default_route, DefaultRoute::None),
        "dns_enabled": false,
        "ipam_options": { "driver": "host-local" },
    });
    if let DefaultRoute::Metric(metric) = default_route {
        network["options"] = json!({ "metric": metric.to_string() });
    }
    let networks = sandbox.dir().join("networks");
    std::fs::create_dir_all(&networks).expect("the directory of the networks");
    std::fs::write(networks.join(format!("{name}.json")), network.to_string()).expect("writing a network");
}

/// The shipped hooks.d file for the program under test and a sandbox's policy.
pub fn write_hooks_d(directory: &Path, program: &Path, arguments: &[&str]) {
    let mut entry: Value = serde_json::from_str(HOOKS_D).expect("the shipped file is JSON");
    assert_eq!(entry["hook"]["path"], INSTALLED);
    entry["hook"]["path"] = json!(program);
    // As hooks/README.md says to do with a longer deadline.
    entry["hook"]["timeout"] = json!(oci::TIMEOUT);
    entry["hook"]["args"].as_array_mut().expect("args is a list").extend(arguments.iter().map(|a| json!(a)));
    std::fs::create_dir_all(directory).expect("the hooks directory");
    std::fs::write(directory.join("mptcp-hook.json"), entry.to_string()).expect("writing the hooks.d file");
}

/// containers.conf with hooks and networks below `directory`; the limits are what a root without CAP_SYS_RESOURCE may
/// set.
pub fn containers_conf(directory: &Path, runtime: Runtime) -> String {
    let cgroups = match runtime {
        Runtime::Crun => "disabled",
        Runtime::Runc => "enabled",
    };
    format!(
        r#"[engine]
runtime = "{runtime}"
hooks_dir = ["{dir}/hooks.d"]
cgroup_manager = "cgroupfs"
events_logger = "none"
[network]
network_backend = "netavark"
network_config_dir = "{dir}/networks"
[containers]
cgroups = "{cgroups}"
pids_limit = 0
log_driver = "k8s-file"
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
"#,
        runtime = runtime.program(),
        dir = directory.display(),
    )
}

/// podman of the user of [`user`], with a network namespace of the user's, `ctr`, that joins the two paths.
pub struct Rootless<'a> {
    sandbox: &'a Sandbox,
    home: PathBuf,
    /// Lives in the network namespace `ctr`.
    _holder: Running,
}

impl<'a> Rootless<'a> {
    pub fn new(paths: &TwoPaths<'_>, sandbox: &'a Sandbox, runtime: Runtime) -> Self {
        for (program, package) in [("podman", "podman"), (runtime.program(), runtime.program())] {
            require(program, package);
        }
        let home = sandbox.dir().join("home");
        user::add(sandbox, &home);
        let config = home.join(".config/containers");
        std::fs::create_dir_all(&config).expect("the user's configuration");
        std::fs::write(config.join("containers.conf"), containers_conf(&home, runtime)).expect("containers.conf");
        std::fs::write(config.join("storage.conf"), "[storage]\ndriver = \"vfs\"\n").expect("storage.conf");
        write_hooks_d(&home.join("hooks.d"), &readable_hook(sandbox), &[]);
        let root = oci::root_filesystem(sandbox);
        let uid = user::UID;
        sandbox.sh(&format!("cp -a {} {1}/rootfs; chown -R {uid}:{uid} {1}", root.display(), home.display()));
        let script =
            format!("touch {0}/ctr; unshare --net={0}/ctr sh -c 'echo $$ >{0}/pid; exec sleep 1000'", home.display());
        let mut holder = sandbox.spawn(&user::command(&home, &["podman", "unshare", "sh", "-ec", &script]));
        let pid = wait_for("the user's network namespace", ENGINE_LIMIT, || {
            assert!(holder.is_running(), "podman unshare ended: {}{}", holder.stdout(), holder.stderr());
            std::fs::read_to_string(home.join("pid")).ok()?.trim().parse::<u32>().ok()
        });
        sandbox.sh(&format!("ip netns attach ctr {pid}"));
        paths.join(&Wiring::new(), &Netns::named("ctr"));
        Self { sandbox, home, _holder: holder }
    }

    /// Runs a program as the user.
    #[track_caller]
    pub fn run(&self, argv: &[&str]) -> Outcome {
        self.sandbox.spawn(&user::command(&self.home, argv)).wait(ENGINE_LIMIT)
    }

    /// `podman run` of a container in the namespace `ctr` that sleeps.
    #[track_caller]
    pub fn start(&self, name: &str, options: &[&str]) -> Outcome {
        let network = format!("--network=ns:{}/ctr", self.home.display());
        let messages = format!("--annotation=run.oci.hooks.stderr={}", self.messages_file(name).display());
        let root = self.home.join("rootfs").display().to_string();
        let mut argv = vec!["podman", "run", "--detach", "--name", name, &network, &messages];
        argv.extend(options);
        argv.extend(["--rootfs", &root, "/bin/busybox", "sleep", "1000"]);
        self.run(&argv)
    }

    fn messages_file(&self, name: &str) -> PathBuf {
        self.home.join(format!("{name}.hooks"))
    }

    /// What hooks of the container `name` have printed under crun.
    pub fn messages(&self, name: &str) -> String {
        std::fs::read_to_string(self.messages_file(name)).unwrap_or_default()
    }

    /// Sends from inside the container `name`.
    pub fn send(&self, name: &str, to: IpAddr, bytes: u64, rate: u64) -> Sender {
        let program = traffic::send_arguments(traffic::PROGRAM, to, bytes, Some(rate));
        let argv = ["podman", "exec", name].into_iter().chain(program.iter().map(String::as_str));
        Sender::attach(self.sandbox.spawn(&user::command(&self.home, &argv.collect::<Vec<_>>())))
    }

    /// What the user's ledger says, to the user.
    #[track_caller]
    pub fn status(&self) -> Value {
        let program = readable_hook(self.sandbox).display().to_string();
        let json = self.run(&[&program, "status", "--json"]).ok();
        serde_json::from_str(&json).unwrap_or_else(|e| panic!("status --json gave {json}: {e}"))
    }

    #[track_caller]
    pub fn remove(&self, name: &str) {
        self.run(&["podman", "rm", "--force", "--time=0", name]).ok();
    }
}
