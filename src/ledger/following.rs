//! What the agent goes by: which containers it shall follow, and which process it is.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use super::{Ledger, files, lock};
use crate::instance::Process;
use crate::kernel::netns::{NetnsId, in_initial_user_namespace, own_user_namespace};

/// The form of the agent's file.
const VERSION: u32 = super::record::VERSION;

/// Whether a container is followed, or why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Following {
    /// Nothing is expected to change.
    NotNeeded,
    /// An agent looks after it.
    Yes,
    /// Nobody does.
    No(String),
}

/// The process that follows, for `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentProcess {
    version: u32,
    /// Its pid.
    pub pid: u32,
    /// Its start time, in clock ticks since boot.
    pub start_time: u64,
}

/// The lock that makes an agent the only one: for all containers, or for one that only a process inside its namespaces
/// can follow. It goes to a forked child with the open file.
pub struct AgentLock {
    file: Flock<File>,
    /// The name of its file.
    name: String,
    /// The one container.
    container: Option<String>,
}

impl AsFd for AgentLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AgentLock {
    /// Leaves the lock to a child that was forked: dropping it here would unlock it there, too.
    pub fn leave_to_child(self) {
        std::mem::forget(self.file);
    }
}

impl Ledger {
    /// Has the agent look after a container, from now on or anew.
    pub fn follow(&self, container: &str) -> Result<()> {
        let directory = self.follow_directory();
        if !directory.exists() {
            files::make_directory(&directory)?;
        }
        // Closing it after writing is what the agent is woken by, also where it is there already.
        drop(files::open_to_append(&directory.join(container))?);
        Ok(())
    }

    /// Has the agent leave a container alone.
    pub fn unfollow(&self, container: &str) -> Result<()> {
        files::remove(&self.follow_directory().join(container))
    }

    /// The containers that the agent shall follow.
    pub fn followed(&self) -> Result<Vec<String>> {
        files::names(&self.follow_directory())
    }

    /// Where they are listed. The agent watches it, and so does the unit that starts the agent under systemd.
    pub fn follow_directory(&self) -> PathBuf {
        self.directory.join("follow")
    }

    /// Where the members of a namespace are listed.
    pub fn members_directory(&self, netns: &NetnsId) -> PathBuf {
        self.directory.join("namespaces").join(netns.file_name())
    }

    /// Makes the directory that the agent watches.
    pub fn make_follow_directory(&self) -> Result<()> {
        files::make_directory(&self.follow_directory())
    }

    /// The lock of the agent for all containers, or for one; None if another one runs.
    pub fn try_agent_lock(&self, container: Option<&str>) -> Result<Option<AgentLock>> {
        let name = container.map_or_else(agent_name, |container| format!("agent:{container}"));
        let file = lock::try_take(&self.directory.join("locks").join(&name), "the agent")?;
        Ok(file.map(|file| AgentLock { file, name, container: container.map(String::from) }))
    }

    /// Says which process follows. Only the lock's holder may.
    pub fn announce_agent(&self, lock: &AgentLock) -> Result<()> {
        let (pid, process) = Process::own()?;
        files::write(&self.agent_file(lock), &AgentProcess { version: VERSION, pid, start_time: process.start_time })
    }

    /// Takes that back. The lock of the agent for one container is not needed again.
    pub fn forget_agent(&self, lock: &AgentLock) -> Result<()> {
        match &lock.container {
            None => files::remove(&self.agent_file(lock)),
            Some(_) => files::remove(&self.directory.join("locks").join(&lock.name)),
        }
    }

    /// The agent for all containers, if one runs.
    pub fn agent(&self) -> Option<AgentProcess> {
        read_process(&self.directory.join(agent_name()))
    }

    /// The containers that are followed, by whichever process.
    pub fn followers(&self) -> Result<HashSet<String>> {
        let agents = files::names(&self.directory)?.into_iter().filter(|name| is_agent_name(name));
        let for_all = agents.map(|name| self.directory.join(name)).any(|file| read_process(&file).is_some());
        let directory = self.follow_directory();
        let names = self.followed()?.into_iter();
        Ok(names.filter(|name| for_all || read_process(&directory.join(name)).is_some()).collect())
    }

    fn agent_file(&self, lock: &AgentLock) -> PathBuf {
        match &lock.container {
            None => self.directory.join(&lock.name),
            Some(container) => self.follow_directory().join(container),
        }
    }
}

/// The name of the agent's files. A user has several engines, each of them perhaps in a user namespace of its own, out of
/// which its agent cannot look.
fn agent_name() -> String {
    match own_user_namespace() {
        Some(inode) if !in_initial_user_namespace() => format!("agent.{inode}"),
        _ => "agent".into(),
    }
}

/// Whether a file in the state directory is an agent's.
pub fn is_agent_name(name: &str) -> bool {
    let inode = name.strip_prefix("agent.");
    name == "agent" || inode.is_some_and(|inode| inode.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The process that a file names, if it is alive.
fn read_process(file: &Path) -> Option<AgentProcess> {
    let agent: AgentProcess = files::read(file).ok()??;
    let process = Process::read(agent.pid).ok()?;
    (process.alive && process.start_time == agent.start_time).then_some(agent)
}
