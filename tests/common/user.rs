//! A user without rights, known in the sandbox alone, with what an administrator gives to somebody who shall run
//! containers: a range of ids, veths on br0 and br1 (lxc-user-nic(1)), a cgroup and a runtime directory.

use std::path::Path;

use super::require;
use super::sandbox::Sandbox;

/// The user's uid and gid; nobody real has it, so there are no other processes of this user's.
pub const UID: u32 = 58_731;

/// The first of the ids that the user's containers may use.
pub const FIRST_MAPPED: u32 = 4_000_000;

const NAME: &str = "mptcp-test";

/// Makes the user, unless the user is there.
#[track_caller]
pub fn add(sandbox: &Sandbox, home: &Path) {
    if sandbox.outside(&runtime_directory()).exists() {
        return;
    }
    require("setpriv", "util-linux");
    require("newuidmap", "uidmap");
    for file in ["/etc/subuid", "/etc/subgid"] {
        sandbox.write(file, &format!("{NAME}:{FIRST_MAPPED}:65536\n"));
    }
    sandbox.write("/etc/lxc/lxc-usernet", &format!("{NAME} veth br0 4\n{NAME} veth br1 4\n"));
    sandbox.sh(&format!(
        "echo '{NAME}:x:{UID}:{UID}::{home}:/bin/sh' >>/etc/passwd
         echo '{NAME}:x:{UID}:' >>/etc/group
         install -d -m 755 /run/user {cgroup}
         install -d -m 700 -o {UID} -g {UID} {runtime}
         chown {UID}:{UID} {cgroup} {cgroup}/cgroup.procs {cgroup}/cgroup.subtree_control",
        home = home.display(),
        cgroup = cgroup(sandbox),
        runtime = runtime_directory(),
    ));
}

/// `XDG_RUNTIME_DIR` of the user.
pub fn runtime_directory() -> String {
    format!("/run/user/{UID}")
}

/// The user's ledger.
pub fn state_directory() -> String {
    format!("{}/mptcp-hook", runtime_directory())
}

/// The cgroup that belongs to the user, as systemd would give one.
pub fn cgroup(sandbox: &Sandbox) -> String {
    format!("/sys/fs/cgroup/{}", sandbox.name("user"))
}

/// A command line that runs `argv` as the user, without privileges.
pub fn command(home: &Path, argv: &[&str]) -> Vec<String> {
    let user = UID.to_string();
    let home = format!("HOME={}", home.display());
    let runtime = format!("XDG_RUNTIME_DIR={}", runtime_directory());
    let mut all = vec!["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "env", "--ignore-environment"];
    all.extend(["--chdir=/", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", &home, &runtime]);
    all.extend(argv);
    all.into_iter().map(str::to_owned).collect()
}
