//! What the agent goes by: which containers it shall follow, and which process it is.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::fcntl::Flock;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use super::{Ledger, files, lock};
use crate::instance::Process;
use crate::kernel::netns::{NetnsId, in_initial_user_namespace, own_user_namespace};

/// The form of the agent's file and of the list's.
const VERSION: u32 = super::record::VERSION;

/// The name of the agent's files in the initial user namespace: it can look into all others of its user's.
const AGENT: &str = "agent";

/// What others are told of the holder of an agent's lock.
const HOLDER: &str = "the agent";

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

/// What the list says of a container.
#[derive(Debug, Serialize, Deserialize)]
struct Listed {
    version: u32,
    /// The name of the agent in the user namespace of the hook, which can look into the container.
    agent: String,
    /// The process that follows this container alone.
    process: Option<AgentProcess>,
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
    /// Leaves the lock to a child that was forked: it ends with the last descriptor. To drop it would be to unlock it in
    /// the child, too, and to keep it would be to hold it beyond the child's end.
    pub fn leave_to_child(self) -> Result<()> {
        let descriptor = self.file.as_raw_fd();
        std::mem::forget(self.file);
        nix::unistd::close(descriptor).with_context(|| format!("cannot leave the lock {} to the agent", self.name))
    }
}

impl Ledger {
    /// Has the agent look after a container, from now on or anew.
    pub fn follow(&self, container: &str) -> Result<()> {
        let directory = self.follow_directory();
        if !directory.exists() {
            files::make_directory(&directory)?;
        }
        let path = directory.join(container);
        let agent = agent_name();
        if self.listed(container).is_none_or(|listed| listed.agent != agent) {
            return files::write(&path, &Listed { version: VERSION, agent, process: None });
        }
        // It is there already: what wakes the agent is its closing after writing, or its time.
        let file = files::open_to_append(&path)?;
        futimens(&file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW)
            .with_context(|| format!("cannot touch {}", path.display()))
    }

    /// Has the agent leave a container alone.
    pub fn unfollow(&self, container: &str) -> Result<()> {
        files::remove(&self.follow_directory().join(container))
    }

    /// The containers that the agent shall follow.
    pub fn followed(&self) -> Result<Vec<String>> {
        files::names(&self.follow_directory())
    }

    /// Whether a container is among them.
    pub fn is_followed(&self, container: &str) -> bool {
        self.follow_directory().join(container).exists()
    }

    /// Those of them that an agent in our user namespace can look into.
    pub fn followed_from_here(&self) -> Result<Vec<String>> {
        let (mut list, own) = (self.followed()?, agent_name());
        list.retain(|container| self.is_followed_by(container, &own));
        Ok(list)
    }

    /// Whether an agent in our user namespace can look into the container. A user's engines have one each, and see
    /// nothing of each other's.
    pub fn is_followed_from_here(&self, container: &str) -> bool {
        self.is_followed_by(container, &agent_name())
    }

    fn is_followed_by(&self, container: &str, own: &str) -> bool {
        own == AGENT || self.listed(container).is_none_or(|listed| listed.agent == own)
    }

    fn listed(&self, container: &str) -> Option<Listed> {
        // What cannot be read is written anew by the next hook, and until then everybody's.
        files::read(&self.follow_directory().join(container)).ok()?
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
        let file = lock::try_take(&self.agent_lock_file(container), HOLDER)?;
        let name = lock_name(container);
        Ok(file.map(|file| AgentLock { file, name, container: container.map(String::from) }))
    }

    /// The lock of the agent for all containers, after the end of whoever has it.
    pub fn wait_for_agent_lock(&self) -> Result<AgentLock> {
        let file = lock::wait_for(&self.agent_lock_file(None), HOLDER)?;
        Ok(AgentLock { file, name: lock_name(None), container: None })
    }

    /// The file of that lock.
    pub fn agent_lock_file(&self, container: Option<&str>) -> PathBuf {
        self.directory.join("locks").join(lock_name(container))
    }

    /// Says that the process with this pid follows. Only the lock's holder may.
    pub fn announce_agent(&self, lock: &AgentLock, pid: u32) -> Result<()> {
        let process = AgentProcess { version: VERSION, pid, start_time: Process::read(pid)?.start_time };
        let Some(container) = &lock.container else { return files::write(&self.directory.join(&lock.name), &process) };
        let agent = self.listed(container).map_or_else(agent_name, |listed| listed.agent);
        let listed = Listed { version: VERSION, agent, process: Some(process) };
        files::write(&self.follow_directory().join(container), &listed)
    }

    /// Takes that back. The lock of the agent for one container is not needed again.
    pub fn forget_agent(&self, lock: &AgentLock) -> Result<()> {
        match &lock.container {
            None => files::remove(&self.directory.join(&lock.name)),
            Some(_) => files::remove(&self.directory.join("locks").join(&lock.name)),
        }
    }

    /// The agent for all containers, if one runs.
    pub fn agent(&self) -> Option<AgentProcess> {
        self.living_agent(&agent_name())
    }

    fn living_agent(&self, name: &str) -> Option<AgentProcess> {
        let agent: AgentProcess = files::read(&self.directory.join(name)).ok()??;
        agent.is_alive().then_some(agent)
    }

    /// The containers that are followed, by whichever process.
    pub fn followers(&self) -> Result<HashSet<String>> {
        let agents = self.living_agents()?;
        Ok(self.followed()?.into_iter().filter(|container| self.has_follower(container, &agents)).collect())
    }

    /// Whether a container that is listed is followed, by whichever process.
    pub fn has_any_follower(&self, container: &str) -> Result<bool> {
        Ok(self.has_follower(container, &self.living_agents()?))
    }

    /// Whether the agent in another user namespace, the container's engine's, follows it.
    pub fn has_agent_of_its_engine(&self, container: &str) -> bool {
        let agent = self.listed(container).map(|listed| listed.agent).filter(|agent| *agent != agent_name());
        agent.is_some_and(|agent| self.living_agent(&agent).is_some())
    }

    /// The names of the agents that run.
    fn living_agents(&self) -> Result<HashSet<String>> {
        let agents = files::names(&self.directory)?.into_iter().filter(|name| is_agent_name(name));
        Ok(agents.filter(|name| self.living_agent(name).is_some()).collect())
    }

    fn has_follower(&self, container: &str, agents: &HashSet<String>) -> bool {
        if agents.contains(AGENT) {
            return true;
        }
        match self.listed(container) {
            Some(Listed { agent, process, .. }) => {
                agents.contains(&agent) || process.is_some_and(|process| process.is_alive())
            }
            None => !agents.is_empty(),
        }
    }
}

impl AgentProcess {
    fn is_alive(&self) -> bool {
        Process::lives(self.pid, self.start_time)
    }
}

/// The name of the agent's files. A user has several engines, each of them perhaps in a user namespace of its own, out of
/// which its agent cannot look.
fn agent_name() -> String {
    let other = if in_initial_user_namespace() { None } else { own_user_namespace() };
    other.map_or_else(|| AGENT.into(), |inode| format!("agent.{inode}"))
}

/// The name of the lock of the agent for all containers, or for one.
fn lock_name(container: Option<&str>) -> String {
    container.map_or_else(agent_name, |container| format!("agent:{container}"))
}

/// Whether a file in the state directory is an agent's.
pub fn is_agent_name(name: &str) -> bool {
    let inode = name.strip_prefix("agent.");
    name == AGENT || inode.is_some_and(|inode| inode.bytes().all(|byte| byte.is_ascii_digit()))
}
