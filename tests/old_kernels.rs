//! Kernels that this machine does not run: the system calls and socket options that came after Linux 4.14 are missing, or
//! MPTCP is. strace(1) answers in the kernel's place; everything else is real.

mod common;

use common::*;
use serde_json::Value;

/// A user of the machine who is not root: no real one has this uid.
const USER: u32 = 61_234;

/// The system calls that came with Linux 4.11 (statx) or after 4.14, which had none of its own. Those that strace does not
/// know, it need not answer.
const NEWER: &str = "statx,rseq,io_pgetevents,pidfd_send_signal,io_uring_setup,io_uring_enter,io_uring_register,open_tree,\
    move_mount,fsopen,fsconfig,fsmount,fspick,pidfd_open,clone3,close_range,openat2,pidfd_getfd,faccessat2,\
    process_madvise,epoll_pwait2,mount_setattr,quotactl_fd,landlock_create_ruleset,landlock_add_rule,\
    landlock_restrict_self,memfd_secret,process_mrelease,futex_waitv,set_mempolicy_home_node,?cachestat,?fchmodat2,\
    ?map_shadow_stack,?futex_wake,?futex_wait,?futex_requeue,?statmount,?listmount,?mseal,?setxattrat,?getxattrat,\
    ?open_tree_attr,?file_getattr,?file_setattr";

/// What a container asks for that uses most of the kernel.
const WISH: [&str; 8] = [
    "--interface",
    "eth1=backup,gateway=10.0.2.1",
    "--routes",
    "auto",
    "--sysctl",
    "stale_loss_cnt=9",
    // strace would wait for an agent's end.
    "--follow",
    "never",
];

/// The words before a program that has them answered with `error`; what was answered goes to `trace`.
fn answered(calls: &[&str], error: &str, trace: &str) -> Vec<String> {
    require("strace", "strace");
    let mut argv: Vec<String> = ["strace", "-f", "-qq", "-o", trace].map(String::from).to_vec();
    argv.extend(["-e".into(), format!("trace={}", calls.join(","))]);
    argv.extend(["-e".into(), format!("inject={}:error={error}", calls.join(","))]);
    argv
}

/// An old kernel.
struct Old<'a> {
    sandbox: &'a Sandbox,
    error: &'a str,
}

impl Old<'_> {
    fn trace(&self) -> String {
        self.sandbox.dir().join("trace").display().to_string()
    }

    /// `mptcp-hook ARGUMENTS` where all [`NEWER`] calls end in the error.
    fn argv(&self, arguments: &[&str]) -> Vec<String> {
        let mut argv = answered(&[NEWER], self.error, &self.trace());
        argv.push(hook().display().to_string());
        argv.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        argv
    }

    #[track_caller]
    fn run(&self, arguments: &[&str]) -> Outcome {
        let outcome = self.sandbox.run(&self.argv(arguments));
        // Those that it would use are answered so.
        self.assert_answered("close_range");
        outcome
    }

    #[track_caller]
    fn assert_answered(&self, call: &str) {
        let trace = std::fs::read_to_string(self.trace()).expect("the trace");
        let answered = |line: &str| line.contains(&format!("{call}(")) && line.contains(&format!("{} ", self.error));
        assert!(trace.lines().any(answered), "{call} was not tried: {trace}");
    }
}

/// A container on two paths, of which the second has no default route.
fn container(sandbox: &Sandbox) -> Bare<'_> {
    World::wired(sandbox, &Wiring::new().without_second_route()).web
}

/// What a container can change in `ctr`.
fn state(sandbox: &Sandbox) -> String {
    sandbox.sh_in(
        &ctr(),
        "ip -4 rule; ip -4 route show table all; ip mptcp endpoint; ip mptcp limits; cat /proc/sys/net/mptcp/stale_loss_cnt",
    )
}

/// ENOSYS is the kernel's own answer; EPERM that of a filter of system calls which is older than the program.
#[test]
fn every_verb_works_without_newer_system_calls() {
    for error in ["ENOSYS", "EPERM"] {
        let sandbox = Sandbox::new();
        let old = Old { sandbox: &sandbox, error };
        let mut web = container(&sandbox);
        let before = state(&sandbox);
        let pid = web.pid().to_string();
        old.run(&[&["apply", "--pid", &pid, "--dry-run"], &WISH[..]].concat()).ok();
        assert_eq!(state(&sandbox), before);

        let hook = |web: &Bare, status: &str| {
            let mut given = web.state();
            given["status"] = status.into();
            let arguments = if status == "created" { &WISH[..] } else { &[] };
            sandbox.run_with_input(&old.argv(&[&["oci"], arguments].concat()), given.to_string().as_bytes()).ok()
        };
        hook(&web, "created");
        old.assert_answered("close_range");
        let set_up = state(&sandbox);
        for words in ["lookup 7800 proto 109", "10.0.2.2 id 1 subflow backup dev eth1", "\n9"] {
            assert!(set_up.contains(words), "{words}: {set_up}");
        }
        // The same again, and from a person.
        hook(&web, "created");
        old.run(&[&["apply", web.id()], &WISH[..]].concat()).ok();
        assert_eq!(state(&sandbox), set_up);

        let status: Value = serde_json::from_str(&old.run(&["status", "--json"]).ok()).expect("status --json");
        assert_eq!(status["containers"][0]["live"], true, "{status:#}");
        assert_eq!(status["containers"][0]["interfaces"][0]["state"], "applied", "{status:#}");
        assert_eq!(status["problems"], serde_json::json!([]), "{status:#}");
        let diagnosis: Value =
            serde_json::from_str(&old.run(&["doctor", "--json", web.id()]).ok()).expect("doctor --json");
        assert_eq!(diagnosis["findings"], serde_json::json!([]), "{diagnosis:#}");
        let host = old.run(&["doctor", "--json"]).stdout;
        assert!(serde_json::from_str::<Value>(&host).is_ok(), "{host}");
        old.run(&["repair"]).ok();
        assert_eq!(state(&sandbox), set_up);

        web.kill();
        hook(&web, "stopped");
        assert_eq!(state(&sandbox), before);
        sandbox.assert_ledger_is_empty();
    }
}

/// Several threads read a large ledger; where no thread can be had, one does it all.
#[test]
fn a_large_ledger_is_read_without_clone3() {
    let sandbox = Sandbox::new();
    let program = hook().display().to_string();
    sandbox.sh(&format!(
        "ip netns add ctr
         for n in $(seq 140); do {program} apply --netns /run/netns/ctr --name c$n --limit subflows=4 2>/dev/null; done"
    ));
    for error in ["ENOSYS", "EPERM"] {
        let old = Old { sandbox: &sandbox, error };
        let status: Value = serde_json::from_str(&old.run(&["status", "--json"]).ok()).expect("status --json");
        assert_eq!(status["containers"].as_array().map(Vec::len), Some(140), "{error}");
        if std::thread::available_parallelism().expect("the processors").get() > 1 {
            old.assert_answered("clone3");
        }
    }
}

/// Before 5.14 a namespace has no cookie, before 4.12 netlink has no extended acknowledgement.
#[test]
fn socket_options_that_are_missing_are_done_without() {
    for call in ["getsockopt", "setsockopt"] {
        let sandbox = Sandbox::new();
        let mut web = container(&sandbox);
        let before = state(&sandbox);
        let trace = sandbox.dir().join("trace").display().to_string();
        let program = hook().display().to_string();
        let run_with_input = |arguments: &[&str], stdin: &str| {
            let mut argv = answered(&[call], "ENOPROTOOPT", &trace);
            argv.push(program.clone());
            argv.extend(arguments.iter().map(|argument| (*argument).to_owned()));
            sandbox.run_with_input(&argv, stdin.as_bytes())
        };
        let run = |arguments: &[&str]| run_with_input(arguments, "");
        let pid = web.pid().to_string();
        run(&[&["apply", "--pid", &pid], &WISH[..]].concat()).ok();
        let traced = std::fs::read_to_string(&trace).expect("the trace");
        assert!(traced.contains("ENOPROTOOPT"), "{traced}");
        let set_up = state(&sandbox);
        assert!(set_up.contains("10.0.2.2 id 1 subflow backup dev eth1"), "{set_up}");
        run(&[&["apply", "--pid", &pid], &WISH[..]].concat()).ok();
        assert_eq!(state(&sandbox), set_up);
        let status: Value = serde_json::from_str(&run(&["status", "--json"]).ok()).expect("status --json");
        assert_eq!(status["containers"][0]["interfaces"][0]["state"], "applied", "{status:#}");
        run(&["doctor", "--pid", &pid]).ok();
        run(&["release", "--pid", &pid]).ok();
        assert_eq!(state(&sandbox), before, "{call}");
        sandbox.assert_ledger_is_empty();

        // A namespace that outlives its container, whose runtime says so in the end.
        let mut given = web.state();
        run_with_input(&[&["oci"], &WISH[..]].concat(), &given.to_string()).ok();
        assert_eq!(state(&sandbox), set_up);
        web.kill();
        given["status"] = "stopped".into();
        run_with_input(&["oci"], &given.to_string()).ok();
        assert_eq!(state(&sandbox), before, "{call}");
        sandbox.assert_ledger_is_empty();
    }
}

/// The agent has to look for the end of a container's first process by itself.
#[test]
fn the_agent_lets_a_container_go_without_pidfd() {
    for error in ["ENOSYS", "EPERM"] {
        let sandbox = Sandbox::new();
        let old = Old { sandbox: &sandbox, error };
        let _agent = sandbox.spawn(&old.argv(&["agent"]));
        wait_until("an agent", LIMIT, || sandbox.outside("/run/mptcp-hook/agent").exists());
        let mut containers: Vec<Bare> = ["one", "two"].into_iter().map(|name| Bare::new(&sandbox, name)).collect();
        for container in &containers {
            container.oci(&["--interface", "eth1=backup"]).ok();
            wait_until("a followed container", LIMIT, || sandbox.status_of(container.id())["followed"] == true);
            sandbox.sh_in(
                &container.netns(),
                "ip link add eth1 type veth peer name peer; ip link set peer up; ip link set eth1 up
                 ip addr add 10.0.2.2/24 dev eth1; ip route add default dev eth1",
            );
            wait_until("an endpoint", LIMIT, || sandbox.endpoints_on(&container.netns(), "eth1").len() == 1);
        }
        old.assert_answered("pidfd_open");
        let mut gone = containers.remove(0);
        gone.kill();
        let ids = || -> Vec<String> {
            let status = sandbox.status();
            let containers = status["containers"].as_array().expect("containers is a list");
            containers.iter().map(|container| container["id"].as_str().expect("an id").to_owned()).collect()
        };
        wait_until("the release of the one that ended", LIMIT, || ids().iter().all(|id| id != gone.id()));
        assert_eq!(ids(), [containers[0].id()]);
        assert_eq!(sandbox.status_of(containers[0].id())["followed"], true);
        containers[0].kill();
        wait_until("an empty ledger", LIMIT, || ids().is_empty());
        sandbox.assert_ledger_is_empty();
    }
}

/// The namespace would live on with a capture that does not notice.
#[test]
fn a_capture_ends_with_its_container_without_pidfd() {
    for error in ["ENOSYS", "EPERM"] {
        let sandbox = Sandbox::new();
        let old = Old { sandbox: &sandbox, error };
        let mut web = Bare::new(&sandbox, "web");
        let mut capture = sandbox.spawn(&old.argv(&["capture", "--pid", &web.pid().to_string()]));
        wait_until("a capture that listens", LIMIT, || capture.stderr().contains("capturing"));
        assert!(capture.is_running());
        web.kill();
        let outcome = capture.wait(LIMIT);
        assert!(outcome.stderr.contains("has ended"), "{outcome}");
        outcome.ok();
        old.assert_answered("pidfd_open");
    }
}

/// Before 6.1 the path manager belongs to the initial user namespace. Here it refuses because the network namespace does;
/// to the hook it is the same answer, of a kernel that says it is an old one.
#[test]
fn in_a_user_namespace_an_old_kernel_is_named() {
    require("strace", "strace");
    let sandbox = Sandbox::new();
    sandbox.sh("ip link add eth1 type veth peer name peer; ip addr add 10.0.2.2/24 dev eth1; ip link set eth1 up");
    sandbox.policy("host-namespace = \"allow\"\n");
    let program = readable_hook(&sandbox).display().to_string();
    let directory = sandbox.dir().join("user");
    std::fs::create_dir(&directory).expect("a directory");
    std::os::unix::fs::chown(&directory, Some(USER), Some(USER)).expect("giving a directory away");
    let (directory, user) = (directory.display().to_string(), USER.to_string());
    let apply = |release: &str| {
        // struct utsname: the name of the system, of the machine, and the release, of 65 bytes each.
        let names = ["Linux", "old", release].map(|name| {
            let mut bytes = name.as_bytes().to_vec();
            bytes.resize(65, 0);
            bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        });
        let inject = format!("inject=uname:poke_exit=@arg1={}", names.concat());
        let script = format!(
            "exec strace -qq -o /dev/null -e '{inject}' {program} --state-dir {directory}/state \\
             apply --pid $$ --interface eth1=backup"
        );
        let become_user = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"];
        let argv = [&become_user[..], &["unshare", "--user", "--map-root-user", "sh", "-c", &script]].concat();
        let said = sandbox.run(&argv).fails_with(1);
        assert_eq!(said.trim().lines().count(), 1, "{said}");
        assert!(said.contains("cannot add the MPTCP endpoint 10.0.2.2") && said.contains("EPERM"), "{said}");
        assert!(said.contains("nothing was changed"), "{said}");
        said
    };
    let said = apply("5.15.0-91-generic");
    for words in ["Linux 5.15.0-91-generic", "initial user namespace", "run Linux 6.1 or later", "the engine as root"] {
        assert!(said.contains(words), "no {words}: {said}");
    }
    let said = apply("6.1.0-37-amd64");
    assert!(!said.contains("run Linux") && said.contains("CAP_NET_ADMIN is needed in the user namespace"), "{said}");
}

// --- a kernel without MPTCP -----------------------------------------------------------------------------------------

/// A kernel without MPTCP: the file that tells is not there.
struct Without<'a>(&'a Sandbox);

impl Without<'_> {
    fn argv(&self, arguments: &[&str]) -> Vec<String> {
        require("strace", "strace");
        let mut argv: Vec<String> =
            ["strace", "-f", "-qq", "-o", "/dev/null", "-P", "/proc/sys/net/mptcp/enabled"].map(String::from).to_vec();
        argv.extend(["-e", "inject=%file:error=ENOENT"].map(String::from));
        argv.push(hook().display().to_string());
        argv.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        argv
    }

    #[track_caller]
    fn run(&self, arguments: &[&str]) -> Outcome {
        self.0.run(&self.argv(arguments))
    }

    #[track_caller]
    fn oci(&self, container: &Bare, arguments: &[&str]) -> Outcome {
        let argv = self.argv(&[&["oci"], arguments].concat());
        self.0.run_with_input(&argv, container.state().to_string().as_bytes())
    }
}

/// The one line: which kernel, what is missing, what to do.
#[track_caller]
fn assert_clear(text: &str) {
    let line = text.trim_end();
    assert_eq!(line.lines().count(), 1, "{text}");
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    for words in [release.trim(), "has no MPTCP", "/proc/sys/net/mptcp/enabled", "boot one that has it"] {
        assert!(line.contains(words), "no {words}: {line}");
    }
}

#[test]
fn without_mptcp_each_verb_says_so_in_one_line() {
    let sandbox = Sandbox::new();
    let kernel = Without(&sandbox);
    let web = container(&sandbox);
    let before = state(&sandbox);
    let pid = web.pid().to_string();

    for outcome in [
        kernel.run(&[&["apply", "--pid", &pid], &WISH[..]].concat()),
        kernel.run(&[&["apply", "--pid", &pid, "--dry-run"], &WISH[..]].concat()),
        kernel.oci(&web, &WISH),
        kernel.run(&["agent"]),
    ] {
        assert_eq!(outcome.stdout, "", "{outcome}");
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert_clear(&outcome.stderr);
    }
    let mut argv = kernel.argv(&["lxc", "--interface", "eth1=backup"]);
    let variables = [
        "LXC_NAME=web",
        &format!("LXC_PID={pid}"),
        "LXC_HOOK_TYPE=start-host",
        "LXC_HOOK_SECTION=lxc",
        "LXC_HOOK_VERSION=1",
        "LXC_CONFIG_FILE=/var/lib/lxc/web/config",
    ];
    argv.splice(1..1, variables.iter().flat_map(|variable| ["-E".to_owned(), (*variable).to_owned()]));
    let outcome = sandbox.run(&argv);
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert_clear(&outcome.stderr);

    let mut capture = sandbox.spawn(&kernel.argv(&["capture", "--pid", &pid]));
    wait_until("a capture that listens", LIMIT, || capture.stderr().contains("capturing"));
    assert!(capture.is_running());
    assert_clear(capture.stderr().lines().next().expect("a line"));
    drop(capture);

    // They need no kernel.
    kernel.run(&["repair"]).ok();
    kernel.run(&["release", "--stale"]).ok();
    let status = kernel.run(&["status"]);
    assert_eq!(status.stderr, "", "{status}");
    let said = status.ok();
    assert!(said.starts_with("MPTCP of this kernel: none\n"), "{said}");
    assert_clear(said.lines().nth(1).expect("a second line"));
    let status: Value = serde_json::from_str(&kernel.run(&["status", "--json"]).ok()).expect("status --json");
    assert_eq!(status["kernel"], "none", "{status:#}");

    for target in [&[][..], &["--pid", &pid]] {
        let outcome = kernel.run(&[&["doctor", "--json"], target].concat());
        assert_eq!(outcome.code, Some(1), "{outcome}");
        let diagnosis: Value = serde_json::from_str(&outcome.stdout).expect("doctor --json");
        let findings = diagnosis["findings"].as_array().expect("findings is a list");
        let found = findings.iter().find(|finding| finding["id"] == "kernel-without-mptcp");
        let found = found.unwrap_or_else(|| panic!("{diagnosis:#}"));
        assert!(found["mend"].to_string().contains("boot one that has it"), "{found:#}");
    }
    assert_eq!(state(&sandbox), before);
    sandbox.assert_ledger_is_empty();
}

#[test]
fn without_mptcp_the_policy_lets_the_container_start() {
    let sandbox = Sandbox::new();
    let kernel = Without(&sandbox);
    let web = container(&sandbox);
    let before = state(&sandbox);
    sandbox.policy("on-error = \"continue\"\n");
    let outcome = kernel.oci(&web, &WISH);
    assert_clear(&outcome.stderr);
    assert!(outcome.stderr.contains("the container starts without"), "{outcome}");
    outcome.ok();
    assert_eq!(state(&sandbox), before);
}

#[test]
fn without_mptcp_a_container_that_asks_for_nothing_is_left_alone() {
    let sandbox = Sandbox::new();
    let kernel = Without(&sandbox);
    let mut web = Bare::new(&sandbox, "web");
    let outcome = kernel.oci(&web, &[]);
    assert_eq!((&*outcome.stdout, &*outcome.stderr), ("", ""), "{outcome}");
    outcome.ok();
    let state = web.state();
    web.kill();
    let mut stopped = state;
    stopped["status"] = "stopped".into();
    let outcome = sandbox.run_with_input(&kernel.argv(&["oci"]), stopped.to_string().as_bytes());
    assert_eq!((&*outcome.stdout, &*outcome.stderr), ("", ""), "{outcome}");
    outcome.ok();
}

/// A ledger that outlived a boot: what it knows is gone with the kernel that had it.
#[test]
fn without_mptcp_containers_of_an_earlier_boot_are_let_go() {
    let sandbox = Sandbox::new();
    let kernel = Without(&sandbox);
    let web = container(&sandbox);
    let db = Bare::in_netns(&sandbox, "db", &ctr());
    // With systemd no hook starts an agent.
    sandbox.sh("mkdir -p /run/systemd/system");
    for container in [&web, &db] {
        container.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    }
    sandbox.sh("cd /run/mptcp-hook/containers; sed -i 's/\"boot_id\":\"[^\"]*\"/\"boot_id\":\"before\"/' *");
    kernel.run(&["release", web.id()]).ok();
    assert_eq!(sandbox.status()["containers"].as_array().map(Vec::len), Some(1));
    // There is somebody to let go: the agent works.
    let _agent = sandbox.spawn(&kernel.argv(&["agent"]));
    wait_until("an empty ledger", LIMIT, || sandbox.status()["containers"].as_array().is_some_and(Vec::is_empty));
}
