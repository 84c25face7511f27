//! Bundles with hooks, and containers run from them by crun and runc.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::sandbox::{Netns, Outcome, Running, Sandbox};
use super::{hook, require, traffic, traffic_program};

/// Makes the tests `crun::SCENARIO` and `runc::SCENARIO` of functions of the runtime.
#[macro_export]
macro_rules! with_each_runtime {
    ($($scenario:ident),* $(,)?) => {
        mod crun {
            $(#[test] fn $scenario() { super::$scenario(super::Runtime::Crun) })*
        }
        mod runc {
            $(#[test] fn $scenario() { super::$scenario(super::Runtime::Runc) })*
        }
    };
}

/// A low-level runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// crun, podman's default.
    Crun,
    /// runc, the reference.
    Runc,
}

impl Runtime {
    /// Its program and Debian package.
    pub fn program(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Runc => "runc",
        }
    }
}

/// The stages of the OCI runtime specification ("POSIX-platform Hooks").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Deprecated, still what engines use.
    Prestart,
    /// After the namespaces are there, in the runtime's own.
    CreateRuntime,
    /// In the container's namespaces.
    CreateContainer,
    /// After the container's process has started.
    Poststart,
    /// After the container is deleted.
    Poststop,
}

impl Stage {
    /// Its key in `hooks` of config.json.
    pub fn key(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }
}

/// After how many seconds a runtime kills a hook: more than the deadline in a sandbox's policy.
pub const TIMEOUT: u32 = 90;

/// An entry of `hooks` in config.json.
#[derive(Clone, Debug)]
pub struct HookEntry {
    entry: Value,
}

impl HookEntry {
    /// The hook under test: `mptcp-hook oci ARGUMENTS`, with an empty environment.
    pub fn oci(arguments: &[&str]) -> Self {
        let path = hook();
        let mut args = vec!["mptcp-hook", "oci"];
        args.extend(arguments);
        Self { entry: json!({ "path": path, "args": args, "env": [], "timeout": TIMEOUT }) }
    }

    /// [`HookEntry::oci`], started by the command `before`.
    pub fn oci_behind(before: &[&str]) -> Self {
        let program = hook().display().to_string();
        // The runtimes look for no program themselves.
        let args = [&["env"], before, &[&program, "oci"]].concat();
        Self { entry: json!({ "path": "/usr/bin/env", "args": args, "timeout": TIMEOUT }) }
    }

    /// Any other program, which inherits the runtime's environment.
    pub fn program(path: &str) -> Self {
        Self { entry: json!({ "path": path }) }
    }

    /// Environment variables, `NAME=VALUE`.
    pub fn env(mut self, env: &[&str]) -> Self {
        self.entry["env"] = json!(env);
        self
    }

    /// No `env`: the hook inherits what the runtime has.
    pub fn inherited_env(mut self) -> Self {
        self.entry.as_object_mut().expect("an entry is an object").remove("env");
        self
    }
}

/// A bundle in the making.
pub struct Bundle<'a> {
    sandbox: &'a Sandbox,
    id: String,
    config: Value,
}

impl<'a> Bundle<'a> {
    /// A container `what` with a network namespace of its own and nothing in it; its process sleeps.
    pub fn new(sandbox: &'a Sandbox, what: &str) -> Self {
        let id = sandbox.name(what);
        // No linux.resources: crun wants CAP_SYS_RESOURCE for them, which root does not have everywhere.
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": { "uid": 0, "gid": 0 },
                "args": ["/bin/busybox", "sleep", "1000"],
                "env": ["PATH=/bin:/"],
                "cwd": "/",
                "noNewPrivileges": true,
            },
            "root": { "path": root_filesystem(sandbox), "readonly": true },
            "hostname": what,
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
            ],
            "annotations": {},
            "hooks": {},
            "linux": {
                "cgroupsPath": format!("/{}/{id}", sandbox.unique()),
                "namespaces": [
                    { "type": "pid" }, { "type": "mount" }, { "type": "uts" }, { "type": "ipc" },
                    { "type": "network" },
                ],
            },
        });
        Self { sandbox, id, config }
    }

    /// Its id, unique on the machine.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Lets the container join the namespace /run/netns/`name` of the sandbox instead of a new one.
    pub fn in_netns(mut self, name: &str) -> Self {
        let namespaces = self.config["linux"]["namespaces"].as_array_mut().expect("namespaces is a list");
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(json!({ "type": "network", "path": Netns::named(name).path() }));
        self
    }

    /// No network namespace: the container uses the sandbox's own.
    pub fn in_host_netns(mut self) -> Self {
        let namespaces = self.config["linux"]["namespaces"].as_array_mut().expect("namespaces is a list");
        namespaces.retain(|namespace| namespace["type"] != "network");
        self
    }

    /// Adds an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config["annotations"][key] = json!(value);
        self
    }

    /// Adds a hook after those that the stage has already.
    pub fn hook(mut self, stage: Stage, entry: HookEntry) -> Self {
        let entries = &mut self.config["hooks"][stage.key()];
        if entries.is_null() {
            *entries = json!([]);
        }
        entries.as_array_mut().expect("a stage is a list").push(entry.entry);
        self
    }

    /// The hook under test without arguments at `stage`, and at poststop.
    pub fn mptcp_hook(self, stage: Stage) -> Self {
        self.hook(stage, HookEntry::oci(&[])).hook(Stage::Poststop, HookEntry::oci(&[]))
    }

    /// A sysctl that the runtime itself writes, `linux.sysctl` (dotted key).
    pub fn runtime_sysctl(mut self, key: &str, value: &str) -> Self {
        self.config["linux"]["sysctl"][key] = json!(value);
        self
    }

    /// The container's process; the root filesystem has /bin/busybox and [`traffic::PROGRAM`].
    pub fn process(mut self, argv: &[impl AsRef<str>]) -> Self {
        let argv: Vec<_> = argv.iter().map(AsRef::as_ref).collect();
        self.config["process"]["args"] = json!(argv);
        self
    }

    /// Changes anything else in config.json.
    pub fn edit(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.config);
        self
    }

    /// Writes the bundle for `runtime`.
    pub fn write(mut self, runtime: Runtime) -> Container<'a> {
        let program = runtime.program();
        require(program, program);
        let dir = self.sandbox.dir().join(&self.id);
        fs::create_dir_all(&dir).expect("the bundle's directory");
        if runtime == Runtime::Crun {
            // Elsewhere crun sends what hooks print to /dev/null.
            self.config["annotations"]["run.oci.hooks.stderr"] = json!(dir.join("hooks.stderr"));
        }
        let config = serde_json::to_vec_pretty(&self.config).expect("config.json as text");
        fs::write(dir.join("config.json"), config).expect("writing config.json");
        Container { sandbox: self.sandbox, runtime, id: self.id, dir, process: RefCell::new(None) }
    }

    /// Writes the bundle, creates the container (hooks up to createContainer run here) and starts it.
    #[track_caller]
    pub fn start(self, runtime: Runtime) -> Container<'a> {
        let container = self.write(runtime);
        container.create().unwrap_or_else(|message| panic!("{} does not create it: {message}", runtime.program()));
        container.start();
        container
    }

    /// Writes the bundle and lets the runtime create the container, which must fail; gives all that was printed.
    #[track_caller]
    pub fn refused(self, runtime: Runtime) -> String {
        let container = self.write(runtime);
        match container.create() {
            Ok(()) => panic!("{} created the container in spite of its hook", runtime.program()),
            Err(message) => message,
        }
    }
}

/// A bundle on disk, and what became of it.
pub struct Container<'a> {
    sandbox: &'a Sandbox,
    runtime: Runtime,
    id: String,
    dir: PathBuf,
    /// `create`, whose output files the container's process has inherited.
    process: RefCell<Option<(PathBuf, PathBuf)>>,
}

impl Container<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bundle's directory.
    pub fn bundle(&self) -> &Path {
        &self.dir
    }

    /// Runs the runtime with `arguments`.
    #[track_caller]
    pub fn runtime(&self, arguments: &[&str]) -> Outcome {
        let mut argv = vec![self.runtime.program()];
        argv.extend(arguments);
        self.sandbox.run(&argv)
    }

    /// Creates the container. When that fails: what runtime and hooks printed.
    #[track_caller]
    pub fn create(&self) -> Result<(), String> {
        let out = self.dir.join("stdout");
        let err = self.dir.join("stderr");
        // The container inherits these descriptors, so its process's output can be read afterwards.
        let script = format!(
            "exec {} create --bundle {} {} >{} 2>{}",
            self.runtime.program(),
            self.dir.display(),
            self.id,
            out.display(),
            err.display()
        );
        let outcome = self.sandbox.run(&["sh", "-c", &script]);
        self.process.replace(Some((out, err)));
        if outcome.code == Some(0) { Ok(()) } else { Err(self.messages()) }
    }

    /// Starts the created container.
    #[track_caller]
    pub fn start(&self) {
        self.runtime(&["start", &self.id]).ok();
    }

    /// What the container's process, the runtime's `create`, and on crun the hooks have printed.
    pub fn messages(&self) -> String {
        let mut all = String::new();
        let files = self.process.borrow();
        let files = files.iter().flat_map(|(out, err)| [out.clone(), err.clone()]);
        for file in files.chain([self.dir.join("hooks.stderr")]) {
            all += &fs::read_to_string(file).unwrap_or_default();
        }
        all
    }

    /// What the container's process has printed on stdout.
    pub fn stdout(&self) -> String {
        let files = self.process.borrow();
        files.as_ref().map(|(out, _)| fs::read_to_string(out).unwrap_or_default()).unwrap_or_default()
    }

    /// The runtime's view of it.
    #[track_caller]
    pub fn state(&self) -> Value {
        let json = self.runtime(&["state", &self.id]).ok();
        serde_json::from_str(&json).unwrap_or_else(|e| panic!("state {json}: {e}"))
    }

    /// The pid of its first process, in the sandbox.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.state()["pid"].as_u64().expect("the state has a pid") as u32
    }

    /// Its network namespace.
    #[track_caller]
    pub fn netns(&self) -> Netns {
        Netns::Pid(self.pid())
    }

    /// Starts a program inside the running container.
    pub fn exec(&self, argv: &[impl AsRef<str>]) -> Running {
        let mut whole = vec![self.runtime.program(), "exec", &self.id];
        whole.extend(argv.iter().map(AsRef::as_ref));
        self.sandbox.spawn(&whole)
    }

    /// Sends `bytes` to `to` from inside the container, at `rate` bytes per second.
    pub fn send(&self, to: std::net::IpAddr, bytes: u64, rate: Option<u64>) -> traffic::Sender {
        traffic::Sender::attach(self.exec(&traffic::send_arguments(traffic::PROGRAM, to, bytes, rate)))
    }

    /// Ends the container's processes and deletes it; poststop hooks run here.
    #[track_caller]
    pub fn delete(&self) {
        self.runtime(&["delete", "--force", &self.id]).ok();
    }
}

/// The root filesystem that all containers of a sandbox share, read-only.
pub fn root_filesystem(sandbox: &Sandbox) -> PathBuf {
    let root = sandbox.dir().join("rootfs");
    if root.exists() {
        return root;
    }
    for directory in ["bin", "proc", "dev", "sys", "tmp"] {
        fs::create_dir_all(root.join(directory)).expect("a directory of the root filesystem");
    }
    require("busybox", "busybox-static");
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from).into_iter().find(|p| p.exists());
    let busybox = busybox.expect("busybox lies in /bin or /usr/bin");
    sandbox.copy_program(&super::static_program(&busybox), &root.join("bin/busybox"));
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).expect("linking sh to busybox");
    sandbox.copy_program(&traffic_program(), &root.join(traffic::PROGRAM.trim_start_matches('/')));
    root
}
