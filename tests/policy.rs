//! The container's author against the policy: whatever annotations say, they reach no setting, no path and no override
//! that the administrator's files do not give them. Each rule has somebody who tries, with the real hook.
//!
//! What others rely on host-wide, with values that really change, is in `host_scope.rs`.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use common::*;
use serde_json::{Value, json};

const CONFIG: &str = "/etc/mptcp-hook/config.toml";

/// A file in the place of a module's parameter: this kernel has no MPTCP module that could be loaded.
const PARAMETER: &str = "/sys/module/mptcp_fullmesh/parameters/num_subflows";

/// A key that the namespace owns and that is none of net.mptcp.
const ECN: &str = "net.ipv4.tcp_ecn";

/// A key that every namespace shows and none but the initial one can change.
const RMEM: &str = "net.core.rmem_max";

/// A container on two paths and the world that its author must not change.
struct World<'a> {
    sandbox: &'a Sandbox,
    web: Bare<'a>,
    before: String,
}

impl<'a> World<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        let _paths = TwoPaths::with_container_netns(sandbox, &Wiring::new());
        sandbox.sh("mkdir /run/modules
             mount --bind /run/modules /sys/module
             mkdir -p /sys/module/mptcp_fullmesh/parameters");
        sandbox.write(PARAMETER, "1\n");
        let web = Bare::in_netns(sandbox, "web", &Netns::named("ctr"));
        let mut world = Self { sandbox, web, before: String::new() };
        world.remember();
        world
    }

    /// What the kernel has, for the container and for the host, and what the ledger knows beside the conflicts.
    fn observe(&self) -> String {
        let values = "ip mptcp endpoint show; ip mptcp limits show
            cd /proc/sys/net
            grep -rs . mptcp core/rmem_max ipv4/conf/all/forwarding ipv4/tcp_ecn ipv4/tcp_rmem \
                ipv4/tcp_congestion_control ipv4/conf/eth1/rp_filter ipv4/conf/eth1/forwarding || :";
        self.sandbox.sh(&format!(
            "nsenter --net=/run/netns/ctr sh -c '{values}'
             {values}
             grep -rs . {PARAMETER} /proc/sys/kernel/hostname /proc/sys/kernel/core_pattern \
                 /run/mptcp-hook/containers /run/mptcp-hook/settings /run/mptcp-hook/namespaces || :"
        ))
    }

    /// How many conflicts the ledger has.
    fn conflicts(&self) -> usize {
        let history = std::fs::read_to_string(self.sandbox.outside("/run/mptcp-hook/conflicts"));
        history.map_or(0, |history| history.lines().count())
    }

    /// From now on this is what must not change.
    fn remember(&mut self) {
        self.before = self.observe();
    }

    /// The hook for the container with these annotations and arguments.
    #[track_caller]
    fn ask(&self, annotations: &[(&str, &str)], arguments: &[&str]) -> Outcome {
        let mut state = self.web.state();
        for (key, value) in annotations {
            state["annotations"][*key] = json!(value);
        }
        let arguments = [&["oci"], arguments].concat();
        self.sandbox.hook_with_input(&arguments, state.to_string().as_bytes())
    }

    /// One line that names the container and says all `parts`; neither kernel nor ledger is another.
    #[track_caller]
    fn assert_unmoved(&self, outcome: &Outcome, code: i32, parts: &[&str]) {
        assert_eq!(outcome.code, Some(code), "{outcome}");
        assert_eq!(outcome.stdout, "", "{outcome}");
        assert_eq!(outcome.stderr.lines().count(), 1, "not one line: {outcome}");
        assert!(!outcome.stderr.trim_end().contains(char::is_control), "{outcome}");
        for part in [self.web.id()].iter().chain(parts) {
            assert!(outcome.stderr.contains(part), "`{part}` is not in: {outcome}");
        }
        let now = self.observe();
        assert!(now == self.before, "before:\n{}\n\nnow:\n{now}\n\nby {outcome}", self.before);
    }

    /// The policy does not give it (exit 3): the line and the recorded conflict name the rule and its file.
    #[track_caller]
    fn refused(&self, annotations: &[(&str, &str)], arguments: &[&str], subject: &str, parts: &[&str]) {
        let known = self.conflicts();
        let outcome = self.ask(annotations, arguments);
        self.assert_unmoved(&outcome, 3, parts);
        let conflicts = self.sandbox.conflicts();
        assert_eq!(conflicts.len(), known + 1, "{conflicts:#?}");
        let conflict = conflicts.last().expect("a conflict");
        assert_eq!(conflict["container"], self.web.id(), "{conflict:#}");
        assert_eq!(conflict["key"], subject, "{conflict:#}");
        assert_eq!(conflict["outcome"], "refused", "{conflict:#}");
        let reason = conflict["reason"].as_str().expect("a reason");
        assert!(parts.iter().all(|part| reason.contains(part)), "{conflict:#}");
    }

    /// It means nothing that could be allowed (exit 2).
    #[track_caller]
    fn nonsense(&self, key: &str, value: &str, parts: &[&str]) {
        let known = self.conflicts();
        self.assert_unmoved(&self.ask(&[(key, value)], &[]), 2, parts);
        assert_eq!(self.conflicts(), known);
    }

    /// The policy gives it: `file` is `value` in the container's namespace until it is released.
    #[track_caller]
    fn allowed(&self, annotations: &[(&str, &str)], arguments: &[&str], file: &str, value: &str) {
        self.ask(annotations, arguments).ok();
        assert_eq!(self.sandbox.sysctl(&Netns::named("ctr"), file).as_deref(), Some(value), "{annotations:?}");
        self.release();
    }

    /// The container's endpoints, as `ADDRESS FLAGS`.
    fn endpoints(&self) -> Vec<String> {
        let endpoints = self.sandbox.endpoints(&Netns::named("ctr"));
        endpoints.iter().map(|endpoint| format!("{} {}", endpoint.address, endpoint.flags.join(" "))).collect()
    }

    /// Its endpoints are these with that wish, and none after its release.
    #[track_caller]
    fn gets(&self, annotations: &[(&str, &str)], arguments: &[&str], endpoints: &[&str]) {
        self.ask(annotations, arguments).ok();
        assert_eq!(self.endpoints(), endpoints, "{annotations:?} {arguments:?}");
        self.release();
    }

    /// By hand, and nothing is left of it.
    #[track_caller]
    fn release(&self) {
        self.sandbox.hook(&["release", self.web.id()]).ok();
        assert_eq!(self.observe(), self.before);
    }
}

fn sysctl(key: &str) -> String {
    format!("mptcp-hook/sysctl.{key}")
}

// --- interfaces and limits ------------------------------------------------------------------------------------------

#[test]
fn interfaces_that_the_policy_does_not_list() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let says = |name: &str| format!("annotations may not ask for {name}: [annotations] interfaces in {CONFIG}");
    let eth1 = "mptcp-hook/interface.eth1";
    for policy in
        ["interfaces = []", "interfaces = [\"eth0\", \"wlan*\"]", "interfaces = [\"eth?0\", \"th1\", \"eth\"]"]
    {
        sandbox.patient_policy(&format!("[annotations]\n{policy}\n"));
        for flags in ["backup", "subflow", "signal", "off", "0x101003"] {
            world.refused(&[(eth1, flags)], &[], "interface.eth1", &[&says("eth1")]);
        }
    }
    sandbox.patient_policy("[annotations]\ninterfaces = [\"eth0\"]\n");
    // A glob reaches no further than the list, whatever else it finds there.
    for wish in ["eth*=backup", "*=backup", "eth?=backup", "eth0=subflow; e*1=backup", "eth0=subflow;eth1=backup;"] {
        world.refused(&[("mptcp-hook/interfaces", wish)], &[], "interface.eth1", &[&says("eth1")]);
    }
    // Nor does the administrator's word for one interface open another.
    world.refused(&[(eth1, "backup")], &["--interface", "eth0=subflow"], "interface.eth1", &[&says("eth1")]);
    // What is listed is given, and an administrator is not limited by it.
    world.gets(&[("mptcp-hook/interface.eth0", "subflow")], &[], &["10.0.1.2 subflow"]);
    world.gets(&[], &["--interface", "eth1=backup"], &["10.0.2.2 backup subflow"]);
}

#[test]
fn limits_that_the_policy_does_not_give() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    sandbox.patient_policy("[annotations]\nlimits = false\n");
    let says = format!("annotations may not ask for limits: [annotations] limits = false in {CONFIG}");
    for limit in ["subflows", "add_addr_accepted"] {
        world.refused(&[(&format!("mptcp-hook/limit.{limit}"), "8")], &[], &format!("limit.{limit}"), &[&says]);
    }
    world.ask(&[], &["--limit", "subflows=8"]).ok();
    assert_ne!(world.observe(), world.before);
    world.release();
}

// --- settings -------------------------------------------------------------------------------------------------------

#[test]
fn mptcp_keys_that_the_policy_keeps_back() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let key = "net.mptcp.stale_loss_cnt";
    let file = "net/mptcp/stale_loss_cnt";
    // Without a policy they are the author's.
    world.allowed(&[(&sysctl(key), "9")], &[], file, "9");
    sandbox.patient_policy("[annotations]\nmptcp-sysctls = false\n");
    let says = format!("annotations may not set {key} = 9: [annotations.sysctls] in {CONFIG} does not list it");
    for spelling in [key, file, "stale_loss_cnt", "/proc/sys/net/mptcp/stale_loss_cnt"] {
        world.refused(&[(&sysctl(spelling), "9")], &[], key, &[&says]);
        world.refused(&[("mptcp-hook/sysctls", &format!("{spelling} = 9;"))], &[], key, &[&says]);
    }
    // Those that are listed still are, with their values.
    sandbox.patient_policy("[annotations]\nmptcp-sysctls = false\n[annotations.sysctls]\nstale_loss_cnt = [8, 9]\n");
    world.allowed(&[(&sysctl(key), "0x9")], &[], file, "9");
    let says = says.replace("= 9", "= 7");
    world.refused(&[(&sysctl(key), "7")], &[], key, &[&says]);
    world.refused(&[(&sysctl("add_addr_timeout"), "9")], &[], "net.mptcp.add_addr_timeout", &["[annotations.sysctls]"]);
}

#[test]
fn sysctls_and_values_that_the_policy_does_not_list() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let rp_filter = "net.ipv4.conf.eth1.rp_filter";
    let rmem = "net.ipv4.tcp_rmem";
    // Without a policy; the namespace's own and the host's alike.
    sandbox.no_policy();
    for (key, value) in [(ECN, "1"), (RMEM, "4097"), (rp_filter, "1"), (rmem, "4096 131072 6291457")] {
        let says = format!("[annotations.sysctls] in {CONFIG} (which does not exist) does not list it");
        world.refused(&[(&sysctl(key), value)], &[], key, &[&says]);
    }
    // A star of the policy stays within its part of the key, and covers no key beside it.
    sandbox.patient_policy(
        "[annotations.sysctls]\n\"net.ipv4.conf.*.rp_filter\" = \"*\"\n\"net.ipv4.*\" = \"*\"\n\"net.*\" = \"*\"\n",
    );
    let says = format!("[annotations.sysctls] in {CONFIG} does not list it");
    for key in ["net.ipv4.conf.eth1.forwarding", "net.ipv4.conf.all.forwarding", RMEM] {
        world.refused(&[(&sysctl(key), "4097")], &[], key, &[&says]);
    }
    sandbox.patient_policy(
        "[annotations.sysctls]\n\"net.ipv4.conf.*.rp_filter\" = [0, 2]\n\"net.ipv4.tcp_rm*\" = \"4096 131072 6291457\"\n\
         \"net.ipv4.*\" = \"none\"\n\"net.core.*\" = 5000\n",
    );
    for (key, value, subject) in [
        // The key is listed, the value is another.
        (rp_filter, "1", rp_filter),
        ("net/ipv4/conf/eth1/rp_filter", "0x1", rp_filter),
        (rmem, "4096 131072 6291458", rmem),
        (ECN, "1", ECN),
        (RMEM, "4097", RMEM),
    ] {
        world.refused(&[(&sysctl(key), value)], &[], subject, &[&says]);
        world.refused(&[("mptcp-hook/sysctls", &format!("{key}={value}"))], &[], subject, &[&says]);
    }
    // What is given beside it comes no more than that.
    let both = [("mptcp-hook/interface.eth1", "backup"), (&sysctl(rp_filter), "2"), (&sysctl(ECN), "1")];
    world.refused(&both, &[], ECN, &[&says]);
    world.allowed(&[(&sysctl(rp_filter), "2")], &[], "net/ipv4/conf/eth1/rp_filter", "2");
    world.allowed(&[(&sysctl("net/ipv4/conf/eth1/rp_filter"), "0x2")], &[], "net/ipv4/conf/eth1/rp_filter", "2");
    world.allowed(&[(&sysctl(rmem), "4096  0x20000\t6291457")], &[], "net/ipv4/tcp_rmem", "4096\t131072\t6291457");
}

/// What is as asked already is no wish that anybody could be held back by.
#[test]
fn an_equal_value_that_the_policy_does_not_list_is_shared_without_a_claim() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    for key in [ECN, RMEM] {
        let value = sandbox.sysctl(&Netns::named("ctr"), &key.replace('.', "/")).expect("the present value");
        world.ask(&[(&sysctl(key), &value)], &[]).ok();
        let own = &sandbox.status_of(world.web.id())["settings"][0];
        assert_eq!((&own["key"], &own["outcome"]), (&json!(key), &json!("shared")), "{own:#}");
        assert_eq!(sandbox.status()["settings"], json!([]), "a claim without the policy's word");
        // A sibling is not held back by it.
        if key == ECN {
            let sibling = Bare::in_netns(&sandbox, "sibling", &Netns::named("ctr"));
            sibling.oci(&["--sysctl", &format!("{key}=1")]).ok();
            sandbox.hook(&["release", sibling.id()]).ok();
        }
        world.release();
    }
    assert_eq!(sandbox.conflicts(), [] as [Value; 0]);
}

/// A congestion control that the kernel does not have yet makes it load a module, for all.
#[test]
fn a_congestion_control_by_name_needs_the_policy() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let key = "net.ipv4.tcp_congestion_control";
    for policy in
        ["", "[annotations]\nmptcp-sysctls = true\n", "[annotations.sysctls]\n\"net.ipv4.tcp_*\" = [\"reno\", 1]\n"]
    {
        sandbox.patient_policy(policy);
        for name in ["mptcp-hook_none", "cdg", "../../x"] {
            world.refused(&[(&sysctl(key), name)], &[], key, &["[annotations.sysctls]", CONFIG, name]);
        }
    }
    world.allowed(&[(&sysctl(key), "reno")], &[], "net/ipv4/tcp_congestion_control", "reno");
}

#[test]
fn module_parameters_and_values_that_the_policy_does_not_list() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    let key = "mptcp-hook/module.mptcp_fullmesh.num_subflows";
    let subject = "module:mptcp_fullmesh.num_subflows";
    for (policy, value) in [
        ("", "2"),
        ("[annotations.modules]\n\"mptcp_*.create_on_err\" = \"*\"\n\"mptcp_full.*\" = 2\n", "2"),
        ("[annotations.modules]\n\"mptcp_fullmesh.num_subflows\" = [2, 3]\n", "4"),
        ("[annotations.modules]\n\"mptcp_*.*\" = [2, 3]\n", "0x4"),
        // Sysctls' list is not theirs.
        ("[annotations.sysctls]\nnum_subflows = \"*\"\n", "2"),
    ] {
        sandbox.patient_policy(policy);
        let says = format!("annotations may not set {subject} = {value}: [annotations.modules] in {CONFIG}");
        world.refused(&[(key, value)], &[], subject, &[&says]);
    }
    for (module, says) in [
        ("tcp_bbr.x", "not an MPTCP module"),
        ("mptcpx.y", "not an MPTCP module"),
        ("mptcp_fullmesh", "MODULE.PARAM"),
        ("mptcp_fullmesh/../../../proc/sys/kernel.hostname", "MODULE.PARAM"),
        ("mptcp_fullmesh.../num_subflows", "MODULE.PARAM"),
        ("mptcp_*.num_subflows", "MODULE.PARAM"),
    ] {
        world.nonsense(&format!("mptcp-hook/module.{module}"), "2", &[says]);
    }
    sandbox.patient_policy("[annotations.modules]\n\"mptcp_*.num_subflows\" = [2, 3]\n");
    world.ask(&[(key, "2")], &[]).ok();
    assert_eq!(sandbox.sh(&format!("cat {PARAMETER}")), "2");
    world.web.stop().ok();
    assert_eq!(world.observe(), world.before);
}

// --- paths ----------------------------------------------------------------------------------------------------------

/// A key is a name below /proc/sys/net, and no way out of it.
#[test]
fn keys_that_lead_elsewhere() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    // Nor does a policy that lists everything.
    sandbox.patient_policy("[annotations.sysctls]\n\"net.*\" = \"*\"\n\"net.*.*\" = \"*\"\n\"net.*.*.*.*\" = \"*\"\n");
    let long = format!("net/mptcp/{}", "x".repeat(300));
    let deep = format!("net{}", "/a".repeat(5000));
    for (key, says) in [
        ("kernel.hostname", "net.*"),
        ("kernel/core_pattern", "net.*"),
        ("/proc/sys/kernel/hostname", "net.*"),
        ("/proc/sys//proc/sys/kernel/hostname", "sysctl key"),
        ("vm.overcommit_memory", "net.*"),
        ("fs.suid_dumpable", "net.*"),
        ("user.max_user_namespaces", "net.*"),
        ("network.x", "net.*"),
        ("net/../kernel/hostname", "\"..\""),
        ("net.mptcp.//", "part"),
        ("net/./mptcp/enabled", "part"),
        ("net//mptcp/enabled", "part"),
        ("net/mptcp/enabled/", "part"),
        ("net...kernel.hostname", "part"),
        ("net.mptcp.enabled\u{0}x", "character"),
        ("net/mptcp/ena bled", "character"),
        ("net/mptcp/%2e%2e/x", "character"),
        ("net/mptcp/*", "character"),
        ("net.ipv4.conf.*.rp_filter", "character"),
        ("net.ipv4.conf.eth?.rp_filter", "character"),
        ("net/mptcp/\u{2024}\u{2024}/x", "character"),
        ("~/x", "character"),
        (&long, "longer"),
        (&deep, "longer"),
    ] {
        world.nonsense(&sysctl(key), "1", &[says]);
        world.nonsense("mptcp-hook/sysctls", &format!("{key}=1"), &[says]);
    }
    for value in ["1\n2", "1\u{0}", "1\u{1b}[2J", &"1".repeat(5000)] {
        world.nonsense(&sysctl("stale_loss_cnt"), value, &["stale_loss_cnt"]);
    }
    for name in ["../x", "a/b", "..", ".", "a b", "lo", &"e".repeat(16)] {
        world.nonsense(&format!("mptcp-hook/interface.{name}"), "backup", &["mptcp-hook/interface."]);
    }
}

/// Nothing but a container's wishes can be said by an annotation: none of the policy's own keys, no place, no file.
#[test]
fn annotations_that_would_be_the_policy() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    for (key, value) in [
        ("config", "/tmp/mine.toml"),
        ("state-dir", "/tmp/mine"),
        ("netns", "/proc/1/ns/net"),
        ("pid", "1"),
        ("on-error", "continue"),
        ("deadline", "60"),
        ("host-namespace", "allow"),
        ("override", "true"),
        ("limits", "true"),
        ("mptcp-sysctls", "true"),
        ("annotations.override", "true"),
        ("annotations.sysctls", "*"),
        ("annotations/override", "true"),
        ("defaults.interfaces", "*=off"),
        ("modules", "mptcp_fullmesh.num_subflows=2"),
        ("match", "*"),
        ("../config", "x"),
        ("", "x"),
    ] {
        world.nonsense(&format!("mptcp-hook/{key}"), value, &["mptcp-hook/", "annotation"]);
    }
    for (key, value) in [("mptcp", "force"), ("mptcp", "off")] {
        world.nonsense(&format!("mptcp-hook/{key}"), value, &["not in this version yet"]);
    }
    world.nonsense("mptcp-hook/routes", "on", &["is not auto or off"]);
    world.nonsense("mptcp-hook/interface.eth1", "backup,gateway=x", &["gateway"]);
}

/// The file for a container is found by a name that its author did not choose, unless the file itself asks for it.
#[test]
fn a_name_by_annotation_opens_no_file_that_does_not_ask_for_it() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let name = "mptcp-hook/name";
    let file = "/etc/mptcp-hook/containers.d/shop.toml";
    let wish = "[sysctls]\n\"net.ipv4.tcp_ecn\" = 1\n[interfaces]\neth1 = \"backup\"\n";
    let nothing = |annotations: &[(&str, &str)]| {
        let outcome = world.ask(annotations, &[]);
        world.assert_unmoved(&outcome, 0, &[file, "does not apply"]);
    };
    sandbox.write(file, wish);
    nothing(&[(name, "shop")]);
    sandbox.write(file, &format!("[match]\ntier = \"front*\"\n{wish}"));
    nothing(&[(name, "shop")]);
    nothing(&[(name, "shop"), ("tier", "back")]);
    world.allowed(&[(name, "shop"), ("tier", "front-1")], &[], "net/ipv4/tcp_ecn", "1");
    sandbox.write(file, wish);
    world.allowed(&[], &["--name", "shop"], "net/ipv4/tcp_ecn", "1");
    // The author's name beside the administrator's does not take that one's place.
    world.allowed(&[(name, "other")], &["--name", "shop"], "net/ipv4/tcp_ecn", "1");

    sandbox.write("/etc/mptcp-hook/secret.toml", wish);
    sandbox.write("/etc/mptcp-hook/containers.d/.hidden.toml", wish);
    for path in ["../secret", "/etc/mptcp-hook/secret", "x/../../secret", "shop\n", "shop\u{0}", "", &"x".repeat(201)] {
        world.nonsense(name, path, &["mptcp-hook/name"]);
    }
    for path in ["..", ".hidden", "*", "sho?", "shop.toml"] {
        let outcome = world.ask(&[(name, path)], &[]);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{path}: {outcome}");
        assert_eq!(world.observe(), world.before, "{path}");
    }
}

// --- overrides and other people -------------------------------------------------------------------------------------

/// A sibling in the same namespace relies on a value, on an interface and on a limit.
#[test]
fn overrides_that_the_policy_does_not_give() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    let key = "net.mptcp.stale_loss_cnt";
    let holder = Bare::in_netns(&sandbox, "holder", &Netns::named("ctr"));
    holder.oci(&["--sysctl", "stale_loss_cnt=9", "--interface", "eth1=backup", "--limit", "subflows=6"]).ok();
    world.remember();
    let word = ("mptcp-hook/on-conflict", "override");
    let setting = sysctl(key);
    let wishes = [
        ((setting.as_str(), "5"), key),
        (("mptcp-hook/interface.eth1", "subflow"), "interface.eth1"),
        (("mptcp-hook/limit.subflows", "1"), "limit.subflows"),
    ];
    for (policy, arguments) in [
        ("", &[][..]),
        ("[annotations]\noverride = false\n", &[]),
        // What the administrator wants for his own wishes is not for the author's.
        ("on-conflict = \"override\"\n", &[]),
        ("", &["--on-conflict", "override"]),
    ] {
        sandbox.patient_policy(policy);
        for (wish, subject) in wishes {
            world.refused(&[wish, word], arguments, subject, &[subject.rsplit('.').next().unwrap_or(subject)]);
            world.refused(&[wish], arguments, subject, &[]);
        }
    }
    // The word alone is not enough for a setting: the policy has to list it, with this value.
    for listed in ["", "stale_loss_cnt = [4, 6]\n", "\"net.ipv4.*\" = \"*\"\n"] {
        sandbox.patient_policy(&format!("[annotations]\noverride = true\n[annotations.sysctls]\n{listed}"));
        world.refused(&[(&setting, "5"), word], &[], key, &[holder.id()]);
    }
    // `warn` is the author's own loss.
    world.ask(&[(&setting, "5"), ("mptcp-hook/on-conflict", "warn")], &[]).ok();
    assert_eq!(sandbox.sysctl(&Netns::named("ctr"), "net/mptcp/stale_loss_cnt").as_deref(), Some("9"));
    assert_eq!(sandbox.status_of(world.web.id())["settings"][0]["outcome"], "kept");
    assert_eq!(sandbox.conflicts().last().expect("a conflict")["outcome"], "warned");
    world.release();

    sandbox.patient_policy("[annotations]\noverride = true\n[annotations.sysctls]\nstale_loss_cnt = 5\n");
    world.allowed(&[(&setting, "5"), word], &[], "net/mptcp/stale_loss_cnt", "5");
    assert_eq!(sandbox.conflicts().last().expect("a conflict")["outcome"], "overrode");
}

/// An author's word on conflicts settles none of the administrator's.
#[test]
fn an_authors_word_on_conflicts_is_for_the_authors_wishes() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    sandbox.patient_policy("[annotations]\noverride = true\n");
    let holder = Bare::in_netns(&sandbox, "holder", &Netns::named("ctr"));
    holder.oci(&["--sysctl", "stale_loss_cnt=9"]).ok();
    world.remember();
    for word in ["override", "warn"] {
        let annotation = ("mptcp-hook/on-conflict", word);
        let says = ["--sysctl stale_loss_cnt", holder.id()];
        world.refused(&[annotation], &["--sysctl", "stale_loss_cnt=5"], "net.mptcp.stale_loss_cnt", &says[1..]);
    }
    world.nonsense("mptcp-hook/on-conflict", "force", &["refuse, warn or override"]);
}

// --- whose wish it is -----------------------------------------------------------------------------------------------

#[test]
fn an_authors_wish_gives_way_to_every_administrators() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let eth1 = "mptcp-hook/interface.eth1";
    let file = format!("/etc/mptcp-hook/containers.d/{}.toml", world.web.id());
    // The exact name of an author against a glob of each.
    sandbox.patient_policy("[defaults.interfaces]\n\"eth*\" = \"subflow\"\n");
    world.gets(&[], &[], &["10.0.1.2 subflow", "10.0.2.2 subflow"]);
    world.gets(&[(eth1, "signal")], &[], &["10.0.1.2 subflow", "10.0.2.2 signal"]);
    world.gets(
        &[(eth1, "signal")],
        &["--interface", "eth*=backup"],
        &["10.0.1.2 backup subflow", "10.0.2.2 backup subflow"],
    );
    sandbox.write(&file, "[interfaces]\n\"e*\" = \"fullmesh\"\n");
    let fullmesh = ["10.0.1.2 fullmesh subflow", "10.0.2.2 fullmesh subflow"];
    world.gets(&[(eth1, "signal")], &["--interface", "eth*=backup"], &fullmesh);
    world.ask(&[(eth1, "signal")], &[]).ok();
    sandbox.hook(&["apply", world.web.id(), "--interface", "eth*=off"]).ok();
    assert_eq!(world.endpoints(), [""; 0]);
    world.release();
    // The same of settings, of which the policy would give the author none.
    sandbox.write(&file, "[sysctls]\n\"net.ipv4.tcp_ecn\" = 1\n");
    world.allowed(&[(&sysctl(ECN), "0")], &[], "net/ipv4/tcp_ecn", "1");
    sandbox.sh(&format!("rm {file}"));
    world.allowed(&[(&sysctl(ECN), "0")], &["--sysctl", "net.ipv4.tcp_ecn=1"], "net/ipv4/tcp_ecn", "1");
    // The defaults' value does not open the key.
    sandbox.patient_policy("[defaults.sysctls]\n\"net.ipv4.tcp_ecn\" = 1\n");
    world.allowed(&[], &["--interface", "eth1=default"], "net/ipv4/tcp_ecn", "1");
    world.refused(&[(&sysctl(ECN), "0")], &[], ECN, &["[annotations.sysctls]", CONFIG]);
}

#[test]
fn wishes_that_contradict_themselves() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    for (annotations, parts) in [
        (&[("mptcp-hook/interfaces", "eth*=backup; *1=subflow")][..], &["eth1", "name it exactly"][..]),
        (
            &[("mptcp-hook/interface.eth*", "backup"), ("mptcp-hook/interface.?th1", "off")],
            &["eth1", "name it exactly"],
        ),
        (&[("mptcp-hook/interface.eth1", "backup"), ("mptcp-hook/interfaces", "eth1=off")], &["eth1", "agree"]),
        (
            &[("mptcp-hook/sysctl.stale_loss_cnt", "9"), ("mptcp-hook/sysctls", "net/mptcp/stale_loss_cnt=8")],
            &["stale_loss_cnt", "agree"],
        ),
        (&[("mptcp-hook/sysctl.pm_type", "1"), ("mptcp-hook/sysctl.path_manager", "kernel")], &["one setting"]),
    ] {
        let known = world.conflicts();
        world.assert_unmoved(&world.ask(annotations, &[]), 2, parts);
        assert_eq!(world.conflicts(), known);
    }
    // Two hook entries of one container, each with the author's annotations.
    let author = ("mptcp-hook/interface.eth0", "subflow");
    world.ask(&[author], &["--interface", "eth1=backup"]).ok();
    world.remember();
    world.assert_unmoved(&world.ask(&[author], &["--interface", "eth1=off"]), 2, &["eth1", "agree"]);
    // The second takes nothing back of what the first did.
    world.ask(&[author], &["--limit", "subflows=5"]).ok();
    assert_eq!(world.endpoints(), ["10.0.1.2 subflow", "10.0.2.2 backup subflow"]);
}

// --- the host's own namespace and the policy's files ----------------------------------------------------------------

#[test]
fn the_hosts_namespace_needs_the_policys_word() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    sandbox.sh("ip link add eth9 type veth peer name far9; ip addr add 10.9.0.2/24 dev eth9; ip link set eth9 up");
    let host = Bare::in_netns(&sandbox, "hostnet", &Netns::Host)
        .annotation("mptcp-hook/interface.eth9", "subflow")
        .annotation("mptcp-hook/on-conflict", "override");
    for policy in ["", "host-namespace = \"refuse\"\n[annotations]\noverride = true\n", "on-conflict = \"warn\"\n"] {
        sandbox.patient_policy(policy);
        let outcome = host.oci(&[]);
        assert_eq!(outcome.code, Some(3), "{outcome}");
        assert!(outcome.stderr.contains(host.id()) && outcome.stderr.contains("host-namespace"), "{outcome}");
        let conflict = sandbox.conflicts().pop().expect("a conflict");
        assert_eq!((&conflict["key"], &conflict["outcome"]), (&json!("host-namespace"), &json!("refused")));
        assert_eq!(world.observe(), world.before);
    }
    // With it the author still has no more than the lists say.
    sandbox.patient_policy("host-namespace = \"allow\"\n[annotations]\ninterfaces = [\"eth1\"]\n");
    let outcome = host.oci(&[]);
    assert_eq!(outcome.code, Some(3), "{outcome}");
    assert!(outcome.stderr.contains("[annotations] interfaces"), "{outcome}");
    assert_eq!(world.observe(), world.before);
    sandbox.patient_policy("host-namespace = \"allow\"\n");
    host.oci(&[]).ok();
    assert_eq!(sandbox.endpoints_on(&Netns::Host, "eth9").len(), 1);
    sandbox.hook(&["release", host.id()]).ok();
    assert_eq!(world.observe(), world.before);
}

/// Whoever can write the administrator's files, or lay others in their place, is not believed.
#[test]
fn files_that_are_not_the_administrators_alone() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let directory = "/etc/mptcp-hook/containers.d";
    let file = format!("{directory}/{}.toml", world.web.id());
    let wish = "[sysctls]\n\"net.ipv4.tcp_ecn\" = 1\n";
    sandbox.write("/run/theirs.toml", wish);
    sandbox.sh("chown 1000 /run/theirs.toml");
    sandbox.patient_policy("");
    sandbox.write(&file, wish);
    for (spoil, mend, says) in [
        (format!("chmod 777 {directory}"), format!("chmod 755 {directory}"), directory),
        (format!("chown 1000 {directory}"), format!("chown 0 {directory}"), "uid 1000"),
        (format!("chown 1000 {file}"), format!("chown 0 {file}"), "uid 1000"),
        (format!("chmod 660 {file}"), format!("chmod 644 {file}"), "chmod go-w"),
        (format!("chmod 646 {CONFIG}"), format!("chmod 644 {CONFIG}"), CONFIG),
        (format!("ln -sf /run/theirs.toml {file}"), format!("rm {file}"), "uid 1000"),
        (format!("mkfifo {file}"), format!("rm {file}"), "not a regular file"),
    ] {
        sandbox.sh(&spoil);
        world.assert_unmoved(&world.ask(&[("mptcp-hook/interface.eth1", "backup")], &[]), 2, &[says]);
        sandbox.sh(&mend);
    }
}

/// An author who is refused for ever fills no disk, and what was recorded last can still be read.
#[test]
fn refusals_without_end_fill_nothing() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let wish = [("mptcp-hook/sysctls", "net.ipv4.tcp_ecn=1")];
    world.refused(&wish, &[], ECN, &[ECN]);
    let bytes = || -> u64 {
        let size = |name| std::fs::metadata(sandbox.outside(name)).map_or(0, |metadata| metadata.len());
        size("/run/mptcp-hook/conflicts") + size("/run/mptcp-hook/conflicts.old")
    };
    let mut most = 0;
    for _ in 0..4 {
        // Thousands of refusals at once, as the hook itself writes them.
        sandbox.sh("cd /run/mptcp-hook; line=$(tail -n 1 conflicts)
             yes \"$line\" | head -c 2097152 | head -n -1 >>conflicts");
        world.assert_unmoved(&world.ask(&wish, &[]), 3, &[CONFIG]);
        most = bytes().max(most);
    }
    assert!(most < 3 * 2_097_152, "{most} bytes of history");
    assert!(bytes() < most + 4096);
    let mode = std::fs::metadata(sandbox.outside("/run/mptcp-hook/conflicts")).expect("a history").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(sandbox.conflicts().last().expect("a conflict")["key"], ECN);
    // Of four histories the two that are there, and the number of the lines of the others.
    let dropped = sandbox.status()["conflicts_dropped"].as_u64().expect("a number");
    assert!(dropped > 5000, "{dropped}");
    assert!(sandbox.hook(&["status"]).ok().contains(&format!("({dropped} older ones were dropped")));
}

/// An annotation has room for thousands of wishes: they are refused as a whole, at once, and nothing is left of them.
#[test]
fn more_wishes_than_a_container_may_have() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let list = |number, form: &dyn Fn(usize) -> String| (0..number).map(form).collect::<Vec<_>>().join(";");
    let too_many = |wishes: &str, key| {
        // A machine may have no processor for one of them for seconds.
        let is_at_once = |_| {
            let begin = std::time::Instant::now();
            world.nonsense(key, wishes, &["more than 256 things", "annotation"]);
            begin.elapsed() < std::time::Duration::from_secs(4)
        };
        assert!((0..10).any(is_at_once), "it takes its time");
        assert_eq!(sandbox.sh("find /run/mptcp-hook/locks -type f 2>/dev/null || :"), "");
    };
    too_many(&list(257, &|n| format!("a{n}=off")), "mptcp-hook/interfaces");
    too_many(&list(40_000, &|n| format!("a{n}=off")), "mptcp-hook/interfaces");
    too_many(&list(300, &|n| format!("net.mptcp.k{n}={}", "9".repeat(2000))), "mptcp-hook/sysctls");
    // As many as there may be, with the longest values.
    let most = list(256, &|n| format!("net.ipv4.k{n}={}", "9".repeat(3500)));
    let outcome = world.ask(&[("mptcp-hook/sysctls", &most)], &[]);
    world.assert_unmoved(&outcome, 1, &["net.ipv4.k0", "annotation"]);
    assert!(outcome.stderr.len() < 1500, "nobody reads that much: {outcome}");
    assert_eq!(sandbox.sh("find /run/mptcp-hook/locks -type f 2>/dev/null || :"), "");
}

/// A container's author gives it the name or the id of another one: whoever changes something by that word means the other,
/// and is asked for the id where there is no other.
#[test]
fn a_name_by_annotation_takes_no_others_place() {
    let sandbox = Sandbox::new();
    let mut world = World::new(&sandbox);
    let victim = Bare::new(&sandbox, "victim");
    victim.oci(&["--limit", "subflows=5", "--name", "database"]).ok();
    for (name, target) in [(victim.id(), victim.id()), ("database", "database")] {
        world.ask(&[("mptcp-hook/limit.subflows", "4"), ("mptcp-hook/name", name)], &[]).ok();
        world.remember();
        sandbox.hook(&["apply", target, "--limit", "subflows=6"]).ok();
        assert!(sandbox.sh_in(&victim.netns(), "ip mptcp limits show").contains("subflows 6"));
        let status: Value = serde_json::from_str(&sandbox.hook(&["status", target, "--json"]).ok()).expect("JSON");
        assert_eq!(status["containers"].as_array().map(Vec::len), Some(1), "{status:#}");
        assert_eq!(status["containers"][0]["id"], victim.id());
        sandbox.hook(&["apply", target, "--limit", "subflows=5"]).ok();
        sandbox.hook(&["release", world.web.id()]).ok();
        world.remember();
    }
    // Nobody else has the name: it serves for looking alone.
    world.ask(&[("mptcp-hook/limit.subflows", "4"), ("mptcp-hook/name", "mail")], &[]).ok();
    world.remember();
    for arguments in [&["apply", "mail", "--limit", "subflows=8"][..], &["release", "mail"]] {
        world.assert_unmoved(&sandbox.hook(arguments), 2, &["annotation", "mail"]);
    }
    assert!(sandbox.hook(&["status", "mail"]).ok().contains("mail"));
    sandbox.hook(&["release", world.web.id()]).ok();
}

/// An id that is a name stands for itself alone, whatever it begins with; one that an engine made up can be shortened.
#[test]
fn the_beginning_of_a_name_is_no_containers_name() {
    let sandbox = Sandbox::new();
    let world = World::new(&sandbox);
    let archive = world.web.id();
    world.web.oci(&["--limit", "subflows=5"]).ok();
    let with = sandbox.sh_in(&world.web.netns(), "ip mptcp limits show");
    let beginning = &archive[..archive.len() - 1];
    for arguments in
        [&["release", beginning][..], &["apply", beginning, "--limit", "subflows=8"], &["status", beginning]]
    {
        let outcome = sandbox.hook(arguments);
        assert_eq!(outcome.code, Some(2), "{outcome}");
        assert!(outcome.stderr.contains("knows no container"), "{outcome}");
        assert_eq!(sandbox.sh_in(&world.web.netns(), "ip mptcp limits show"), with);
        assert_eq!(sandbox.status_of(archive)["live"], true);
    }
    let made_up = "4f".repeat(32);
    let engines = Bare::new(&sandbox, "engines");
    let mut state = engines.state();
    state["id"] = json!(made_up);
    sandbox.hook_with_input(&["oci", "--limit", "subflows=5"], state.to_string().as_bytes()).ok();
    assert!(sandbox.hook(&["status", &made_up[..12]]).ok().contains(&made_up[..12]));
    sandbox.hook(&["apply", &made_up[..12], "--limit", "subflows=6"]).ok();
    assert!(sandbox.sh_in(&engines.netns(), "ip mptcp limits show").contains("subflows 6"));
    sandbox.hook(&["release", &made_up[..12]]).ok();
    world.release();
    sandbox.assert_ledger_is_empty();
}

/// Two containers of one id, and a third whose id is the name of another's record: what the message says tells them apart,
/// also the dead ones, which nothing else can name.
#[test]
fn containers_of_one_id_are_told_apart_by_their_records_names() {
    let sandbox = Sandbox::new();
    let start = |what: &str, id: Option<&str>| {
        let container = Bare::new(&sandbox, what);
        let mut state = container.state();
        if let Some(id) = id {
            state["id"] = json!(id);
        }
        sandbox.hook_with_input(&["oci", "--limit", "subflows=4"], state.to_string().as_bytes()).ok();
        container
    };
    let limits = |container: &Bare| sandbox.sh_in(&container.netns(), "ip mptcp limits show");
    let first = start("first", None);
    let mut twin = start("twin", Some(first.id()));
    // The names of records that a refusal lists, by the container's bundle.
    let listed = |target: &str| {
        let outcome = sandbox.hook(&["release", target]);
        assert_eq!(outcome.code, Some(2), "{outcome}");
        let words: Vec<String> = outcome.stderr.split_whitespace().map(String::from).collect();
        move |bundle: &str| {
            let place = words.iter().position(|word| word.contains(&format!("{bundle}.bundle)")));
            words[place.unwrap_or_else(|| panic!("{bundle} is not in {words:?}")) - 1].clone()
        }
    };
    let keys = listed(first.id());
    let (of_first, of_twin) = (keys("first"), keys("twin"));
    for verb in ["status", "doctor"] {
        for key in [&of_first, &of_twin] {
            let outcome = sandbox.hook(&[verb, key]);
            assert!(outcome.stderr.is_empty() && outcome.stdout.contains(first.id()), "{outcome}");
        }
    }
    sandbox.hook(&["apply", &of_twin, "--limit", "subflows=6"]).ok();
    assert!(limits(&twin).contains("subflows 6") && limits(&first).contains("subflows 4"));

    let imitator = start("imitator", Some(&of_twin));
    let keys = listed(&of_twin);
    assert_eq!(keys("twin"), of_twin);
    sandbox.hook(&["release", &keys("imitator")]).ok();
    assert!(limits(&imitator).contains("subflows 2") && limits(&twin).contains("subflows 6"));

    twin.kill();
    sandbox.hook(&["release", &of_twin]).ok();
    assert!(limits(&first).contains("subflows 4"));
    sandbox.hook(&["release", first.id()]).ok();
    assert!(limits(&first).contains("subflows 2"));
    sandbox.assert_ledger_is_empty();
}

// --- what the README promises ---------------------------------------------------------------------------------------

/// Each test that the README names as a promise's proof is there, and one of those that every run must pass.
#[test]
fn every_promise_of_the_readme_has_its_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let readme = read(&root.join("README.md"));
    let (_, section) = readme.split_once("\n## What it promises\n").expect("a section of promises");
    let section = section.split("\n## ").next().unwrap_or(section);
    let components = read(&root.join("tests/components.list"));
    let rows = section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| promise"));
    let mut promises = 0;
    for row in rows {
        let named: Vec<&str> = row.split('`').skip(1).step_by(2).filter(|word| word.contains("::")).collect();
        let scripts = ["fuzz/run", "benches/run"].map(|script| (root.join(script), format!("by `{script}`")));
        let runs = scripts.iter().any(|(script, words)| script.exists() && row.contains(words));
        assert!(runs || !named.is_empty(), "nothing shows this: {row}");
        for name in named {
            let (file, test) = name.split_once("::").expect("checked above");
            let source = root.join(format!("tests/{file}.rs"));
            // Unit tests are listed as cargo names them.
            let test = if source.exists() { test } else { name };
            assert!(components.lines().any(|line| line == test), "{name} is not in tests/components.list");
            if source.exists() {
                let function = format!("fn {}(", test.rsplit("::").next().unwrap_or(test));
                assert!(read(&source).contains(&function), "{name} is not in {}", source.display());
            }
        }
        promises += 1;
    }
    assert!(promises >= 10, "{promises} promises");
}
