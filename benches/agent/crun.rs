//! What following adds to a whole `crun run`: rows that take turns.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::{Agent, ms, process, quantile};

/// Samples per row.
const ROUNDS: usize = 100;

/// Rounds that are not counted.
const WARM_UP: usize = 3;

/// The rows. Each has a ledger of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    NoHook,
    Never,
    Running,
    First,
}

const ROWS: [(Which, &str, &str); 4] = [
    (Which::NoHook, "none", "crun run without a hook"),
    (Which::Never, "never", "with the hook, eth1 pending, follow=never"),
    (Which::Running, "running", "with the hook, eth1 pending, an agent runs"),
    (Which::First, "first", "with the hook, eth1 pending, the hook forks the agent"),
];

/// Measures and prints, if crun is there.
pub fn compare(hook: &Path, empty: &Path) {
    let Some(crun) = find("crun") else {
        println!("\ncrun is not installed (apt-get install crun): its starts are not measured");
        return;
    };
    for (which, name, _) in ROWS {
        bundle(which, name, hook, empty);
    }
    let mut agent = Agent::start(hook, "/run/state-running");
    let mut times: [Vec<Duration>; ROWS.len()] = Default::default();
    for round in 0..WARM_UP + ROUNDS {
        // What ran just before counts; nobody may always come after the same one.
        for position in 0..ROWS.len() {
            let row = (round + position) % ROWS.len();
            let (which, name, _) = ROWS[row];
            let arguments = ["--cgroup-manager=disabled", "run", "--bundle", &format!("/run/{name}"), name];
            let arguments = arguments.map(String::from);
            if round == 0 {
                // What it says is shown if it fails.
                process::output(&crun, &arguments, b"");
                if which == Which::First {
                    end_forked_agent();
                }
            }
            let run = process::run(&crun, &arguments, b"");
            if round >= WARM_UP {
                times[row].push(run.time);
            }
            if which == Which::First {
                end_forked_agent();
            }
        }
    }
    agent.kill();
    let never = quantile(&times[1], 0.5).as_secs_f64();
    println!("\n{ROUNDS} samples of each, taking turns\n");
    println!("| from before crun starts until its end | median | p95 | times follow=never |");
    println!("|---|---:|---:|---:|");
    for ((_, _, what), times) in ROWS.iter().zip(&times) {
        let median = quantile(times, 0.5);
        let ratio = median.as_secs_f64() / never;
        println!("| {what} | {} | {} | {ratio:.2} |", ms(median), ms(quantile(times, 0.95)));
    }
}

/// A container without interfaces: what is asked for eth1 stays pending.
fn bundle(which: Which, name: &str, hook: &Path, empty: &Path) {
    let (directory, state) = (format!("/run/{name}"), format!("/run/state-{name}"));
    for inside in ["dev", "proc"] {
        std::fs::create_dir_all(format!("{directory}/rootfs/{inside}")).expect("a root filesystem");
    }
    std::fs::copy(empty, format!("{directory}/rootfs/empty")).expect("copying the container's program");
    std::fs::DirBuilder::new().mode(0o700).create(&state).expect("a state directory");
    let follow = if which == Which::Never { "never" } else { "auto" };
    let hook = json!([{ "path": hook, "args": ["mptcp-hook", "oci", "--state-dir", state, "--follow", follow] }]);
    let hooks = json!({ "createRuntime": hook, "poststop": hook });
    let namespaces = ["pid", "mount", "uts", "ipc", "network"].map(|kind| json!({ "type": kind }));
    let config = json!({
        "ociVersion": "1.0.2",
        "process": { "args": ["/empty"], "cwd": "/", "user": { "uid": 0, "gid": 0 }, "noNewPrivileges": true },
        "root": { "path": "rootfs", "readonly": true },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "annotations": { "mptcp-hook/interface.eth1": "backup" },
        "hooks": if which == Which::NoHook { json!({}) } else { hooks },
        "linux": { "namespaces": namespaces },
    });
    std::fs::write(format!("{directory}/config.json"), config.to_string()).expect("config.json");
}

/// Ends the agent that the hook has forked, if it has not ended with the container: crun would have waited for it.
fn end_forked_agent() {
    let file = "/run/state-first/agent";
    let Ok(text) = std::fs::read_to_string(file) else { return };
    let agent: serde_json::Value = serde_json::from_str(&text).expect("what the agent says of itself");
    let pid = agent["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("the agent's pid");
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("ending the forked agent");
    // This program is the first process of its pid namespace: orphans are its own.
    nix::sys::wait::waitpid(pid, None).expect("waiting for the forked agent's end");
    std::fs::remove_file(file).expect("removing what it said");
}

fn find(program: &str) -> Option<std::path::PathBuf> {
    ["/usr/local/bin", "/usr/bin", "/usr/local/sbin", "/usr/sbin", "/bin"]
        .map(|directory| Path::new(directory).join(program))
        .into_iter()
        .find(|path| path.exists())
}
