//! The agent under systemd, a real one that is the first process of a sandbox: the shipped units start it, keep it
//! running, and no hook forks one.

mod common;

use std::time::{Duration, Instant};

use common::*;
use serde_json::Value;

/// Starts systemd with `$1` as its cgroup, `$2` as /usr/local/bin/mptcp-hook and `$3` as its units, besides the few targets
/// that it needs itself. Nothing of the machine's own services is visible, and nothing is written outside the sandbox.
const BOOT: &str = r#"
mkdir "/sys/fs/cgroup/$1"
echo 0 >"/sys/fs/cgroup/$1/cgroup.procs"
exec unshare --mount --cgroup --pid --fork --kill-child --mount-proc sh -ec '
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /run/units
for unit in basic sysinit shutdown paths sockets slices timers multi-user; do
  cp "/lib/systemd/system/$unit.target" /run/units
done
mount --bind /run/units /lib/systemd/system
for hidden in /etc/systemd /etc/init.d /lib/systemd/system-generators /usr/local/bin; do
  mount -t tmpfs -o mode=755 tmpfs "$hidden"
done
mkdir -p /etc/systemd/system /run/user/0
cp "$2" /usr/local/bin/mptcp-hook
cp "$3"/*.path "$3"/*.service /etc/systemd/system
# A machine may have no processor for it for seconds.
mkdir /etc/systemd/system/mptcp-hook-agent.service.d
printf "[Service]\nTimeoutStopSec=infinity\n" >/etc/systemd/system/mptcp-hook-agent.service.d/patient.conf
cp -r "$3/user" /run/user-units
mount -t tmpfs tmpfs /tmp
mount -o remount,bind,ro /
export container=test
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=no
' boot "$@"
"#;

/// Prints the pid of systemd. What it has just forked has its name, too.
const FIND: &str = r#"grep -lx systemd /proc/[0-9]*/comm | sed 's|/proc/\([0-9]*\)/comm|\1|' | sort -n | head -n 1"#;

/// A sandbox in a sandbox, with systemd.
struct Booted<'a> {
    sandbox: &'a Sandbox,
    pid: String,
    _systemd: Running,
}

impl<'a> Booted<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        for program in ["systemctl", "systemd-analyze"] {
            require(program, "systemd");
        }
        let units = concat!(env!("CARGO_MANIFEST_DIR"), "/hooks/systemd");
        let program = hook().display().to_string();
        let argv = ["sh", "-ec", BOOT, "boot", sandbox.unique(), &program, units];
        let mut systemd = sandbox.spawn(&argv);
        let pid = wait_for("systemd", LIMIT, || {
            assert!(systemd.is_running(), "systemd has ended: {}{}", systemd.stdout(), systemd.stderr());
            let pid = sandbox.run(&["sh", "-c", FIND]).stdout.trim().to_owned();
            (!pid.is_empty()).then_some(pid)
        });
        let booted = Self { sandbox, pid, _systemd: systemd };
        wait_until("the end of the boot", LIMIT, || {
            booted.run(&["systemctl", "is-active", "multi-user.target"]).stdout.trim() == "active"
        });
        booted
    }

    fn argv(&self, argv: &[&str]) -> Vec<String> {
        let enter = ["nsenter", "--target", &self.pid, "--mount", "--pid", "--"];
        enter.iter().chain(argv).map(|argument| (*argument).to_owned()).collect()
    }

    #[track_caller]
    fn run(&self, argv: &[&str]) -> Outcome {
        self.sandbox.run(&self.argv(argv))
    }

    /// A process in a network namespace of its own, with eth1 that has no address; and its pid.
    fn container(&self) -> (Running, String) {
        let process = self.sandbox.spawn(&self.argv(&["unshare", "--net", "sh", "-c", "echo $$; exec sleep 1000"]));
        let pid = wait_for("the pid of a process", LIMIT, || {
            let out = process.stdout();
            out.ends_with('\n').then(|| out.trim().to_owned())
        });
        self.ip(&pid, "link add eth1 type veth peer name peer");
        self.ip(&pid, "link set peer up");
        self.ip(&pid, "link set eth1 up");
        (process, pid)
    }

    #[track_caller]
    fn ip(&self, pid: &str, arguments: &str) -> String {
        let enter = ["nsenter", "--target", pid, "--net", "ip"];
        self.run(&enter.into_iter().chain(arguments.split(' ')).collect::<Vec<_>>()).ok()
    }

    #[track_caller]
    fn apply(&self, name: &str, pid: &str) -> String {
        let outcome = self.run(&["mptcp-hook", "apply", "--pid", pid, "--name", name, "--interface", "eth1=backup"]);
        assert_eq!(outcome.code, Some(0), "{outcome}");
        outcome.stdout + &outcome.stderr
    }

    #[track_caller]
    fn wait_for_endpoint(&self, pid: &str, address: &str) {
        let wanted = format!("{address} id ");
        wait_until(&format!("the endpoint {address}"), LIMIT, || {
            let endpoints = self.ip(pid, "mptcp endpoint show");
            endpoints.lines().count() == 1 && endpoints.starts_with(&wanted) && endpoints.contains("backup dev eth1")
        });
    }

    /// The pids of all processes whose program is the hook's.
    fn agents(&self) -> Vec<String> {
        let list = r#"for exe in /proc/[0-9]*/exe; do
            case "$(readlink "$exe")" in */mptcp-hook) p=${exe#/proc/}; echo "${p%/exe}" ;; esac; done"#;
        self.run(&["sh", "-c", list]).stdout.lines().map(str::to_owned).collect()
    }

    /// Waits until the unit runs an agent that is not `before`; gives its pid.
    #[track_caller]
    fn wait_for_agent(&self, before: &str) -> String {
        let show = ["systemctl", "show", "--property=MainPID", "--value", "mptcp-hook-agent.service"];
        wait_for("an agent that systemd has started", LIMIT, || {
            let pid = self.run(&show).ok();
            (pid != "0" && pid != before && self.agents() == [pid.as_str()]).then_some(pid)
        })
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.run(&["mptcp-hook", "status", "--json"]).ok()).expect("status --json")
    }
}

#[test]
fn systemd_starts_the_agent_by_the_shipped_units_and_keeps_it() {
    let s = Sandbox::new();
    let journal = Journal::listen(&s);
    let b = Booted::new(&s);

    // Not enabled: it stays pending, and the hook says what to do instead of starting anything.
    let (_one, one) = b.container();
    let said = b.apply("one", &one);
    assert!(said.contains("mptcp-hook-agent.path is not enabled"), "{said}");
    assert!(said.contains("systemctl enable --now mptcp-hook-agent.path"), "{said}");
    assert_eq!(b.agents(), Vec::<String>::new(), "the hook has forked an agent");

    // Who was listed before is followed from then on.
    b.run(&["systemctl", "enable", "--now", "mptcp-hook-agent.path"]).ok();
    let first = b.wait_for_agent("0");
    let cgroup = b.run(&["cat", &format!("/proc/{first}/cgroup")]).ok();
    assert!(cgroup.ends_with("/system.slice/mptcp-hook-agent.service"), "{cgroup}");
    b.ip(&one, "address add 10.0.1.2/24 dev eth1");
    b.wait_for_endpoint(&one, "10.0.1.2");

    // The next container goes to the same agent.
    let (_two, two) = b.container();
    let said = b.apply("two", &two);
    assert!(!said.contains("no agent"), "{said}");
    assert_eq!(b.agents(), [first.as_str()]);
    b.ip(&two, "address add 10.0.2.2/24 dev eth1");
    b.wait_for_endpoint(&two, "10.0.2.2");

    // Killed: systemd starts another one, which finds what has changed meanwhile.
    b.run(&["kill", "-KILL", &first]).ok();
    b.ip(&one, "address del 10.0.1.2/24 dev eth1");
    b.ip(&one, "address add 10.0.1.3/24 dev eth1");
    let second = b.wait_for_agent(&first);
    b.wait_for_endpoint(&one, "10.0.1.3");

    // Stopped while containers need it: the path unit starts it again.
    b.run(&["systemctl", "stop", "mptcp-hook-agent.service"]).ok();
    let third = b.wait_for_agent(&second);
    b.ip(&two, "address del 10.0.2.2/24 dev eth1");
    b.ip(&two, "address add 10.0.2.3/24 dev eth1");
    b.wait_for_endpoint(&two, "10.0.2.3");

    // The unit's restrictions leave it everything that it needs to let a dead container go.
    b.run(&["kill", "-KILL", &two]).ok();
    wait_until("the release of a dead container", LIMIT, || {
        let status = b.status();
        let names: Vec<_> = status["containers"].as_array().expect("a list").iter().map(|c| &c["name"]).collect();
        names == ["one"]
    });
    assert_eq!(b.agents(), [third]);

    // With the path unit it stops for good, and the hook starts none instead of it.
    b.run(&["systemctl", "stop", "mptcp-hook-agent.path", "mptcp-hook-agent.service"]).ok();
    b.apply("one", &one);
    assert_eq!(b.agents(), Vec::<String>::new());
    let failed = b.run(&["systemctl", "--failed", "--plain", "--no-legend"]).ok();
    assert_eq!(failed, "", "{:#?}", journal.entries());
}

/// The path unit starts its service again for as long as somebody is listed: the service must not end while an agent that was
/// started by hand has what it came for.
#[test]
fn systemd_has_its_agent_wait_for_the_end_of_one_by_hand() {
    let s = Sandbox::new();
    let journal = Journal::listen(&s);
    let b = Booted::new(&s);
    let _by_hand = s.spawn(&b.argv(&["mptcp-hook", "agent"]));
    let announced = || {
        let file = std::fs::read(s.outside("/run/mptcp-hook/agent")).ok()?;
        let file: Value = serde_json::from_slice(&file).ok()?;
        file["pid"].as_u64().map(|pid| pid.to_string())
    };
    let first = wait_for("the agent by hand", LIMIT, announced);
    b.run(&["systemctl", "enable", "--now", "mptcp-hook-agent.path"]).ok();
    let (_one, one) = b.container();
    b.apply("one", &one);
    let main_pid = || b.run(&["systemctl", "show", "--property=MainPID", "--value", "mptcp-hook-agent.service"]).ok();
    let started = || {
        wait_for("the service", LIMIT, || {
            let pid = main_pid();
            (pid != "0" && b.agents().contains(&pid)).then_some(pid)
        })
    };

    // It is started once, and stays.
    let waiting = started();
    assert_ne!(waiting, first);
    let mut said = Vec::new();
    let mut hear = || {
        said.extend(journal.entries().into_iter().filter(|entry| entry.contains("an agent runs already")));
        said.clone()
    };
    wait_until("its word", LIMIT, || !hear().is_empty());
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(4) {
        assert_eq!(main_pid(), waiting, "started again: {:#?}", hear());
        let path = b.run(&["systemctl", "is-active", "mptcp-hook-agent.path"]);
        assert_eq!(path.stdout.trim(), "active", "{path}");
        pause_since(begin);
    }
    let said = hear();
    assert!(said.len() == 1 && said[0].contains(&format!("(pid {first})")), "{said:?}");
    b.ip(&one, "address add 10.0.1.2/24 dev eth1");
    b.wait_for_endpoint(&one, "10.0.1.2");

    // It can be stopped, which changes nothing for the other one.
    b.run(&["systemctl", "stop", "mptcp-hook-agent.path", "mptcp-hook-agent.service"]).ok();
    assert_eq!(b.agents(), [first.as_str()]);
    b.run(&["systemctl", "start", "mptcp-hook-agent.path"]).ok();
    let waiting = started();

    // And it takes over.
    b.run(&["kill", "-KILL", &first]).ok();
    wait_until("the agent of the service", LIMIT, || announced().as_ref() == Some(&waiting));
    b.ip(&one, "address del 10.0.1.2/24 dev eth1");
    b.ip(&one, "address add 10.0.1.3/24 dev eth1");
    b.wait_for_endpoint(&one, "10.0.1.3");
    assert_eq!(main_pid(), waiting);
}

#[test]
fn systemd_finds_nothing_wrong_with_the_shipped_units() {
    let s = Sandbox::new();
    let b = Booted::new(&s);
    for name in ["mptcp-hook-agent.path", "mptcp-hook-agent.service"] {
        for (scope, file) in
            [("--system", format!("/etc/systemd/system/{name}")), ("--user", format!("/run/user-units/{name}"))]
        {
            let environment = ["env", "HOME=/run", "XDG_RUNTIME_DIR=/run/user/0"];
            let verify = ["systemd-analyze", scope, "--man=no", "--recursive-errors=no", "verify", &file];
            let outcome = b.run(&[&environment[..], &verify].concat());
            assert!(outcome.code == Some(0) && outcome.stderr.is_empty(), "{outcome}");
        }
    }
}
