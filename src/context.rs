//! What every verb needs to know about the run itself.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::cli::Globals;
use crate::deadline::Deadline;
use crate::front::ContainerFiles;
use crate::kernel::netns::in_initial_user_namespace;
use crate::policy::{self, Policy, config};

/// The policy, the ledger's place and the time that is left.
pub struct Context {
    /// What the administrator allows.
    pub policy: Policy,
    /// Where the ledger is.
    pub state_dir: PathBuf,
    /// Where the per-container files are.
    pub containers: ContainerFiles,
    /// When the run has to be over.
    pub deadline: Deadline,
}

impl Context {
    /// Reads the policy. Nothing comes from the environment. The policy's deadline counts from `start`: for a hook, that is
    /// its own, since the engine's patience counts from there.
    pub fn new(globals: &Globals, start: Instant) -> Result<Self> {
        let initial_user_namespace = in_initial_user_namespace();
        let path = globals.config.as_deref().unwrap_or(Path::new(policy::CONFIG_FILE));
        let policy = config::load(path, globals.config.is_some(), initial_user_namespace)?;
        let state_dir = Self::state_dir(globals)?;
        let directory = path.parent().unwrap_or(Path::new("/")).join("containers.d");
        let containers = ContainerFiles { directory, initial_user_namespace };
        Ok(Self { deadline: Deadline::since(start, policy.deadline), policy, state_dir, containers })
    }

    /// The ledger's place, which no policy decides.
    pub fn state_dir(globals: &Globals) -> Result<PathBuf> {
        match &globals.state_dir {
            Some(directory) => Ok(directory.clone()),
            None => state_directory(in_initial_user_namespace()),
        }
    }
}

/// Where the ledger is: host root's in /run, everybody else's in their own runtime directory.
fn state_directory(initial_user_namespace: bool) -> Result<PathBuf> {
    let euid = nix::unistd::geteuid();
    if initial_user_namespace {
        return Ok(match euid.is_root() {
            true => "/run/mptcp-hook".into(),
            false => format!("/run/user/{euid}/mptcp-hook").into(),
        });
    }
    let map = std::fs::read_to_string("/proc/self/uid_map").context("cannot read /proc/self/uid_map")?;
    match outside_uid(&map, euid.as_raw()) {
        Some(uid) => Ok(format!("/run/user/{uid}/mptcp-hook").into()),
        None => bail!(
            "uid {euid} has no mapping outside this user namespace, so the ledger's directory cannot be told; use --state-dir"
        ),
    }
}

/// The uid outside that `uid` stands for (user_namespaces(7), "uid_map").
fn outside_uid(map: &str, uid: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut fields = line.split_whitespace().map(|field| field.parse::<u32>().ok());
        let (inside, outside, length) = (fields.next()??, fields.next()??, fields.next()??);
        let offset = uid.checked_sub(inside)?;
        (offset < length).then(|| outside.checked_add(offset)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uid_outside() {
        let rootless = "         0       1000          1\n         1     100000      65536\n";
        assert_eq!(outside_uid(rootless, 0), Some(1000));
        assert_eq!(outside_uid(rootless, 1), Some(100_000));
        assert_eq!(outside_uid(rootless, 70_000), None);
        assert_eq!(outside_uid("", 0), None);
        assert_eq!(outside_uid("x y z\n0 5 1", 0), Some(5));
    }
}
