//! Containers without a runtime: a process in a network namespace, and the state that a runtime would write for it.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use super::enter::{self, Process};
use super::sandbox::{Netns, Outcome, Sandbox};
use super::{LIMIT, wait_until};

/// A sleeping process as a container.
pub struct Bare<'a> {
    sandbox: &'a Sandbox,
    id: String,
    pid: u32,
    bundle: PathBuf,
    annotations: Value,
    /// Ends the process when it is dropped.
    process: Option<Process>,
}

impl<'a> Bare<'a> {
    /// A process in a new, empty network namespace.
    pub fn new(sandbox: &'a Sandbox, what: &str) -> Self {
        Self::start(sandbox, what, None)
    }

    /// A process in the namespace `netns`.
    pub fn in_netns(sandbox: &'a Sandbox, what: &str, netns: &Netns) -> Self {
        Self::start(sandbox, what, Some(netns))
    }

    fn start(sandbox: &'a Sandbox, what: &str, netns: Option<&Netns>) -> Self {
        let network = netns.map_or_else(enter::new_network, |netns| sandbox.open_netns(netns));
        let process = sandbox.start_in(&network, &["sleep", "1000"], |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        });
        let pid = process.inner_pid();
        let id = sandbox.name(what);
        let bundle = sandbox.dir().join(format!("{id}.bundle"));
        std::fs::create_dir_all(&bundle).expect("the bundle's directory");
        if let Some(netns @ Netns::Named(_)) = netns {
            // As an engine does that made the namespace: it outlives the process, and poststop finds it by this.
            let config = json!({ "linux": { "namespaces": [{ "type": "network", "path": netns.path() }] } });
            std::fs::write(bundle.join("config.json"), config.to_string()).expect("writing config.json");
        }
        Self { sandbox, id, pid, bundle, annotations: json!({}), process: Some(process) }
    }

    /// Adds an annotation to its state.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations[key] = json!(value);
        self
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its pid in the sandbox.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its network namespace.
    pub fn netns(&self) -> Netns {
        Netns::Pid(self.pid)
    }

    /// The state of the OCI runtime specification, as at createRuntime.
    pub fn state(&self) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "id": self.id,
            "status": "created",
            "pid": self.pid,
            "bundle": self.bundle,
            "annotations": self.annotations,
        })
    }

    /// Runs `mptcp-hook oci ARGUMENTS` as at createRuntime.
    #[track_caller]
    pub fn oci(&self, arguments: &[&str]) -> Outcome {
        self.oci_with(arguments, &self.state())
    }

    /// Runs the hook as at poststop, where the state has no pid.
    #[track_caller]
    pub fn poststop(&self) -> Outcome {
        let mut state = self.state();
        state["status"] = json!("stopped");
        state.as_object_mut().expect("a state is an object").remove("pid");
        self.oci_with(&[], &state)
    }

    #[track_caller]
    fn oci_with(&self, arguments: &[&str], state: &Value) -> Outcome {
        let arguments: Vec<&str> = ["oci"].iter().chain(arguments).copied().collect();
        self.sandbox.hook_with_input(&arguments, state.to_string().as_bytes())
    }

    /// Ends the process by SIGKILL, without a word to the hook.
    #[track_caller]
    pub fn kill(&mut self) {
        self.process.take();
        wait_until("the end of a killed process", LIMIT, || {
            !self.sandbox.outside(&format!("/proc/{}", self.pid)).exists()
        });
    }

    /// The regular end: the process first, then poststop.
    #[track_caller]
    pub fn stop(&mut self) -> Outcome {
        self.kill();
        self.poststop()
    }

    /// Another life of the same container: a new process in a namespace of its own, the old one killed.
    pub fn restarted(mut self) -> Self {
        self.kill();
        let name = self.id[self.sandbox.unique().len() + 1..].to_owned();
        let new = Self::new(self.sandbox, &name);
        Self { annotations: std::mem::take(&mut self.annotations), ..new }
    }
}

/// How a script begins that an unprivileged engine runs as root of a user namespace: `$pid` is a process in a network
/// namespace of its own, in which `inside` runs a command; eth1 there has 10.0.2.2.
const CONTAINER: &str = r#"unshare --net sh -c 'echo $$; exec sleep 1000' >/run/pid &
while ! [ -s /run/pid ]; do sleep 0.02; done
pid=$(cat /run/pid)
inside() { nsenter --target $pid --net "$@"; }
inside ip -batch - <<COMMANDS
link add eth1 type veth peer name far
addr add 10.0.2.2/24 dev eth1
link set eth1 up
COMMANDS
"#;

/// Runs `script` so.
#[track_caller]
pub fn in_user_namespace(sandbox: &Sandbox, script: &str) -> Outcome {
    sandbox.no_policy();
    sandbox.run(&["unshare", "--user", "--map-root-user", "sh", "-ec", &format!("{CONTAINER}{script}")])
}
