//! What the hook does with either Multipath TCP, whichever the kernel has: multipath-tcp.org's interface flags and
//! host-wide settings, or upstream's endpoints and settings of the namespace.

use serde_json::json;

use super::common::expectations::{Kind, Running};
use super::common::*;

/// What multipath-tcp.org's kernels show of an interface that is a backup, of those bits that are MPTCP's.
const BACKUP_BIT: u32 = 0x10_0000;

/// The path manager of multipath-tcp.org's kernels, a setting of the host; upstream there is none.
fn path_manager(name: &str) -> Option<HostValue> {
    (Running::look().kind == Kind::MptcpOrg).then(|| {
        let value = HostValue::of_sysctl("net/mptcp/mptcp_path_manager");
        value.set(name);
        value
    })
}

/// multipath-tcp.org's settings can be seen in the machine's own namespace alone.
impl World<'_> {
    /// A script where /sys shows the container's interfaces: it belongs to the namespace that it was mounted in.
    #[track_caller]
    fn with_sysfs(&self, script: &str) -> String {
        let script = format!("mount -t sysfs sysfs /sys; {script}");
        self.sandbox.run_in(&ctr(), &["unshare", "--mount", "sh", "-ec", &script]).ok()
    }

    /// What the kernel has of eth1: the endpoint's flags, or the interface's.
    #[track_caller]
    fn in_force(&self) -> String {
        if Running::look().kind == Kind::Upstream {
            let endpoints = self.sandbox.endpoints_on(&ctr(), "eth1");
            return endpoints.iter().map(|endpoint| endpoint.flags.join(" ")).collect::<Vec<_>>().join(", ");
        }
        let flags = self.with_sysfs("cat /sys/class/net/eth1/flags");
        let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).expect("an interface's flags");
        match flags & 0x18_0000 {
            0 => String::new(),
            BACKUP_BIT => "backup".into(),
            other => format!("{other:#x}"),
        }
    }

    /// [`World::in_force`] when eth1 is a backup.
    fn backup(&self) -> &'static str {
        if Running::look().kind == Kind::Upstream { "backup subflow" } else { "backup" }
    }

    /// Somebody else takes the flag away.
    fn wipe(&self) {
        if Running::look().kind == Kind::Upstream {
            let id = self.sandbox.endpoints_on(&ctr(), "eth1")[0].id;
            // The kernel says nothing of endpoints: it is seen when something else changes.
            let commands = format!("mptcp endpoint change id {id} nobackup\nlink set eth1 mtu 1400");
            self.sandbox.ip_in(&ctr(), &commands);
        } else {
            self.with_sysfs("echo 0x1003 >/sys/class/net/eth1/flags");
        }
    }
}

/// Whether multipath-tcp.org's path manager uses the address, as a backup: the line of it in mptcp_fullmesh.
fn is_backup_in_fullmesh(sandbox: &Sandbox, address: &str) -> bool {
    let table = sandbox.inside(&ctr(), || std::fs::read_to_string("/proc/thread-self/net/mptcp_fullmesh"));
    // Index, address id, backup, address, interface.
    table.expect("mptcp_fullmesh").lines().any(|line| {
        let fields: Vec<&str> = line.split([',', ' ', '\t']).filter(|field| !field.is_empty()).collect();
        let address = fields.iter().position(|field| field.split(':').next() == Some(address));
        address.and_then(|at| fields.get(at.checked_sub(1)?)) == Some(&"1")
    })
}

#[test]
fn a_backup_path_is_set_shown_and_taken_back() {
    let _path_manager = path_manager("fullmesh");
    let sandbox = Sandbox::host_network();
    let world = World::new(&sandbox);
    assert_eq!(world.in_force(), "");
    for _ in 0..2 {
        let outcome = world.web.oci(&["--interface", "eth1=backup"]);
        assert!(!outcome.stderr.contains("do nothing"), "{outcome}");
        outcome.ok();
        assert_eq!(world.in_force(), world.backup());
    }
    if Running::look().kind == Kind::MptcpOrg {
        wait_until("the path manager's word", LIMIT, || is_backup_in_fullmesh(&sandbox, "10.0.2.2"));
    }
    assert_eq!(sandbox.status()["kernel"], Running::look().kind.name());
    eth1_of(&sandbox.status_of(world.web.id()), "applied");
    sandbox.hook(&["release", world.web.id()]).ok();
    assert_eq!(world.in_force(), "");
    sandbox.assert_ledger_is_empty();
}

#[test]
fn the_agent_sets_a_flag_again_that_somebody_wiped() {
    let _path_manager = path_manager("fullmesh");
    let sandbox = Sandbox::host_network();
    let mut world = World::new(&sandbox);
    world.web.oci(&["--interface", "eth1=backup", "--follow", "always"]).ok();
    wait_until("it is followed", LIMIT, || sandbox.status_of(world.web.id())["followed"] == true);
    world.wipe();
    wait_until("the flag is there again", LIMIT, || world.in_force() == world.backup());
    let says = if Running::look().kind == Kind::Upstream { "put back" } else { "set again" };
    wait_until("status says so", LIMIT, || {
        let eth1 = eth1_of(&sandbox.status_of(world.web.id()), "applied");
        eth1["last"]["what"].as_str().is_some_and(|what| what.contains(says))
    });
    world.web.stop().ok();
    sandbox.assert_ledger_is_empty();
}

#[test]
fn the_doctor_names_a_path_manager_that_ignores_what_is_set() {
    let path_manager = path_manager("default");
    let sandbox = Sandbox::host_network();
    let world = World::new(&sandbox);
    let said = world.web.oci(&["--interface", "eth1=backup"]);
    let (finding, set) = match &path_manager {
        None => {
            let set = |name: &str| {
                let number = if name == "fullmesh" { "0" } else { "1" };
                sandbox.sh_in(&ctr(), &format!("echo {number} >/proc/sys/net/mptcp/pm_type"));
            };
            ("path-manager-userspace", Box::new(set) as Box<dyn Fn(&str)>)
        }
        Some(value) => {
            assert!(said.stderr.contains("only fullmesh reads interface flags"), "{said}");
            ("path-manager-ignores-flags", Box::new(|name: &str| value.set(name)) as Box<dyn Fn(&str)>)
        }
    };
    said.ok();
    let found = |sandbox: &Sandbox| {
        let of_host = Diagnosis::of(sandbox, &[]);
        of_host.has(finding) || Diagnosis::of(sandbox, &[world.web.id()]).has(finding)
    };
    set("default");
    assert!(found(&sandbox), "{finding}");
    set("fullmesh");
    assert!(!found(&sandbox), "{finding}");
    sandbox.hook(&["release", world.web.id()]).ok();
}

#[test]
fn a_setting_of_the_host_is_claimed_refused_and_restored() {
    let key = match Running::look().kind {
        Kind::MptcpOrg => "net.mptcp.mptcp_syn_retries",
        Kind::Upstream | Kind::None => "net.core.netdev_budget",
    };
    let value = HostValue::of_sysctl(&key.replace('.', "/"));
    let sandbox = Sandbox::host_network();
    let number: u64 = value.original().parse().expect("a number");
    let wish = |more: u64| format!("{key}={}", number + more);
    let mut first = Bare::new(&sandbox, "first");
    let second = Bare::new(&sandbox, "second");
    first.oci(&["--sysctl", &wish(1)]).ok();
    assert_eq!(value.current(), (number + 1).to_string());
    let refused = second.oci(&["--sysctl", &wish(2)]).fails_with(3);
    assert!(refused.contains(key) && refused.contains(first.id()), "{refused}");
    assert_eq!(value.current(), (number + 1).to_string());
    let status = sandbox.status();
    let claims = json!([{ "container": first.id(), "value": (number + 1).to_string() }]);
    assert_eq!((&status["settings"][0]["key"], &status["settings"][0]["claims"]), (&json!(key), &claims), "{status:#}");
    first.stop().ok();
    assert_eq!(value.current(), value.original());
    sandbox.assert_ledger_is_empty();
}
