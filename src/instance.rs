//! Which life of which container: ids, pids and namespace inodes are used again, all of them together are not.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::deadline::Deadline;
use crate::error::{shown, usage};
use crate::kernel::netns::{Namespace, NetnsId};
use crate::kernel::sysctl;
use crate::sys;

/// The longest container id that is taken; engines use 64 hexadecimal digits, LXC a file name.
const ID_MAX: usize = 128;

/// The process is exiting (kernel `include/linux/sched.h`); field 9 of `/proc/PID/stat`.
const PF_EXITING: u32 = 4;

/// How long a container may show no sign of dying after its hook has said that it has stopped: the moment between the
/// kernel's taking up SIGKILL and its marking the process.
const DYING_GRACE: Duration = Duration::from_millis(20);

/// Who called us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Door {
    /// An OCI runtime's hook.
    Oci,
    /// An LXC hook.
    Lxc,
    /// A person.
    Command,
}

impl Door {
    /// The word in the ledger and in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Oci => "oci",
            Self::Lxc => "lxc",
            Self::Command => "command",
        }
    }
}

/// A container, whichever life it is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerId {
    /// Who called us.
    pub door: Door,
    /// What tells two containers of the same id apart: the bundle (OCI), the lxcpath (LXC).
    pub engine: String,
    /// The runtime's id or LXC's name.
    pub id: String,
}

impl ContainerId {
    /// Checks the id: it becomes part of a file name and of log lines.
    pub fn new(door: Door, engine: impl Into<String>, id: &str) -> Result<Self> {
        let said = shown(id);
        if id.is_empty() || id.len() > ID_MAX {
            return Err(usage(format!(
                "the container id \"{said}\" has {} bytes; 1 to {ID_MAX} are allowed",
                id.len()
            )));
        }
        if let Some(bad) = id.chars().find(|c| !(c.is_ascii_alphanumeric() || "_-.+@:".contains(*c))) {
            return Err(usage(format!("the container id \"{said}\" has the character {bad:?}")));
        }
        if id == "." || id == ".." {
            return Err(usage(format!("\"{id}\" is not a container id")));
        }
        Ok(Self { door, engine: engine.into(), id: id.into() })
    }

    /// The name of the container's record in the ledger.
    pub fn key(&self) -> String {
        // FNV-1a: short, stable between versions, and only there to tell engines apart, never to prove anything.
        let hash = self
            .engine
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        format!("{}.{}.{:08x}", self.door.name(), self.id, hash as u32 ^ (hash >> 32) as u32)
    }
}

/// One life of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Which container.
    pub container: ContainerId,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Its init process; none for a namespace that was given by path.
    pub pid: Option<u32>,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot.
    pub start_time: Option<u64>,
    /// Its network namespace.
    pub netns: NetnsId,
    /// A bind mount of the namespace, where one is known.
    pub netns_path: Option<String>,
}

impl Instance {
    /// Whether it is still alive. A zombie is not: its namespaces are gone.
    pub fn is_alive(&self, boot_id: &str) -> bool {
        if self.boot_id != boot_id {
            return false;
        }
        match (self.pid, &self.netns_path) {
            (Some(pid), _) => Process::read(pid).is_ok_and(|process| {
                process.alive
                    && Some(process.start_time) == self.start_time
                    // Not readable for everybody; then pid and start time have to do.
                    && netns_inode(&format!("/proc/{pid}/ns/net")).is_none_or(|inode| inode == self.netns.inode)
            }),
            (None, Some(path)) => self.netns.is_at(Path::new(path)),
            (None, None) => false,
        }
    }

    /// Waits for the end of an instance that has been killed; false if it was not. Runtimes send SIGKILL and run their
    /// poststop hooks without waiting for it to take effect.
    pub fn is_gone_soon(&self, boot_id: &str, deadline: Deadline) -> bool {
        let begin = Instant::now();
        while self.is_alive(boot_id) {
            let killed = self.pid.is_some_and(is_being_killed);
            if deadline.over() || !killed && begin.elapsed() > DYING_GRACE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Whether both are one life of one container. The path of the namespace does not matter: not every hook knows it.
    pub fn is_same_life(&self, other: &Self) -> bool {
        self.container == other.container
            && self.boot_id == other.boot_id
            && self.netns == other.netns
            && self.pid == other.pid
            && self.start_time == other.start_time
    }

    /// The places where its namespace can be opened, the best first. The caller compares the identity.
    pub fn netns_places(&self) -> Vec<String> {
        self.pid.map(|pid| format!("/proc/{pid}/ns/net")).into_iter().chain(self.netns_path.clone()).collect()
    }
}

/// The inode number of the network namespace at this path, if it can be seen.
pub fn netns_inode(path: &str) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).ok().map(|meta| meta.ino())
}

/// This boot's id. A ledger of an earlier boot holds nothing.
pub fn boot_id() -> Result<String> {
    sysctl::read(Path::new("/proc/sys/kernel/random/boot_id"))
        .context("cannot read /proc/sys/kernel/random/boot_id; is /proc mounted?")
}

/// What tells one process from another with the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Neither a zombie nor dead, nor on its way there.
    pub alive: bool,
    /// In clock ticks since boot.
    pub start_time: u64,
}

impl Process {
    /// Reads `/proc/PID/stat` (proc(5)).
    pub fn read(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/stat");
        let text = File::open(&path)
            .and_then(|file| sysctl::read_small(file, 4096))
            .with_context(|| format!("there is no process {pid} (reading {path})"))?;
        Self::parse(&String::from_utf8_lossy(&text)).with_context(|| format!("{path} has an unknown form"))
    }

    /// Whether the process with this pid is alive and is the one that started then.
    pub fn lives(pid: u32, start_time: u64) -> bool {
        Self::read(pid).is_ok_and(|process| process.alive && process.start_time == start_time)
    }

    /// The calling process, with its pid as `/proc` has it: inside a container's pid namespace that is another one
    /// than it has for itself.
    pub fn own() -> Result<(u32, Self)> {
        let seen = std::fs::read_link("/proc/self").context("cannot read /proc/self; is /proc mounted?")?;
        let pid = seen.to_string_lossy().parse().context("/proc/self does not lead to a pid")?;
        Ok((pid, Self::read(pid)?))
    }

    fn parse(stat: &str) -> Option<Self> {
        // The command name may hold spaces and parentheses: what follows the last one is regular.
        let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
        let state = fields.next()?;
        let flags: u32 = fields.nth(5)?.parse().ok()?;
        let start_time = fields.nth(12)?.parse().ok()?;
        Some(Self { alive: !matches!(state, "Z" | "X" | "x") && flags & PF_EXITING == 0, start_time })
    }
}

/// The pids that there are now; None if they cannot be listed.
pub fn processes() -> Option<HashSet<u32>> {
    let entries = std::fs::read_dir("/proc").ok()?;
    Some(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Tells of the end of one process, whoever has its pid afterwards.
#[derive(Debug)]
pub enum Lifeline {
    /// Becomes readable then (pidfd_open(2), Linux 5.3).
    Pidfd(OwnedFd),
    /// `/proc/PID/stat`, which has to be read now and then: an open one belongs to the process, not to the pid.
    Stat(File),
}

impl Lifeline {
    /// The process's that has the pid now. Without a pidfd (an older kernel, or a filter of system calls that is older than
    /// the program) it is the file.
    pub fn of(pid: u32) -> Result<Self> {
        let attempt = || format!("cannot wait for the end of process {pid}");
        match sys::pidfd_open(pid) {
            Ok(process) => Ok(Self::Pidfd(process)),
            Err(Errno::ENOSYS | Errno::EPERM) => {
                File::open(format!("/proc/{pid}/stat")).map(Self::Stat).with_context(attempt)
            }
            Err(error) => Err(error).with_context(attempt),
        }
    }

    /// What to wait for; None if it has to be asked.
    pub fn pidfd(&self) -> Option<&OwnedFd> {
        match self {
            Self::Pidfd(process) => Some(process),
            Self::Stat(_) => None,
        }
    }

    /// Whether the file says that the process has ended. Of a pidfd, poll(2) tells.
    pub fn is_cut(&self) -> bool {
        let Self::Stat(file) = self else { return false };
        let mut text = [0; 1024];
        // ESRCH: it is not even a zombie any more.
        let length = file.read_at(&mut text, 0).unwrap_or(0);
        !Process::parse(&String::from_utf8_lossy(&text[..length])).is_some_and(|process| process.alive)
    }
}

/// Whether SIGKILL is on its way to the process (`/proc/PID/status`, proc(5)).
fn is_being_killed(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let kill = 1 << (libc::SIGKILL - 1);
    ["SigPnd:", "ShdPnd:"].into_iter().filter_map(pending).any(|signals| signals & kill != 0)
}

/// The pid of the parent of a process (a pid or `self`) as `/proc` has it, whatever pid namespace we are in. At
/// createContainer our own is the container's init.
pub fn parent_of(process: &str) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok().filter(|pid| *pid > 0)
}

/// Opens the namespace of a process and makes sure that it is the process's all along.
pub fn open_netns_of(pid: u32) -> Result<(Namespace, Process)> {
    let before = Process::read(pid)?;
    if !before.alive {
        bail!("process {pid} is dead (a zombie)");
    }
    let path = format!("/proc/{pid}/ns/net");
    let namespace = Namespace::open(Path::new(&path)).with_context(|| {
        format!("cannot open {path} (CAP_SYS_PTRACE is needed for other users' processes; run as root)")
    })?;
    if Process::read(pid)? != before {
        bail!("process {pid} ended while its namespace was opened");
    }
    Ok((namespace, before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_name() {
        let stat =
            format!("12 (a) S (b) ) R {} 4242 0", (0..18).map(|_| "0".to_string()).collect::<Vec<_>>().join(" "));
        assert_eq!(Process::parse(&stat), Some(Process { alive: true, start_time: 4242 }));
        assert_eq!(Process::parse("12 (x) Z"), None);
        assert_eq!(Process::parse(""), None);
        assert!(Process::read(std::process::id()).unwrap().alive);
    }

    #[test]
    fn the_end_of_a_process_is_told_without_a_pidfd() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let path = format!("/proc/{}/stat", child.id());
        let line = Lifeline::Stat(File::open(path).unwrap());
        assert!(!line.is_cut());
        assert!(!Lifeline::of(child.id()).unwrap().is_cut());
        child.kill().unwrap();
        let zombie = std::time::Instant::now();
        while !line.is_cut() {
            assert!(zombie.elapsed() < Duration::from_secs(5));
        }
        child.wait().unwrap();
        assert!(line.is_cut());
        assert!(Lifeline::of(child.id()).is_err());
    }

    #[test]
    fn hostile_ids_are_refused() {
        for bad in ["", ".", "..", "a/b", "../x", "a\nb", "a b", "\u{202e}x", &"x".repeat(4096)] {
            assert!(ContainerId::new(Door::Oci, "/b", bad).is_err(), "{bad:?}");
        }
        let id = ContainerId::new(Door::Lxc, "/var/lib/lxc", "web-1.a").unwrap();
        assert!(id.key().starts_with("lxc.web-1.a."));
        assert_ne!(id.key(), ContainerId::new(Door::Lxc, "/home/u/lxc", "web-1.a").unwrap().key());
    }

    #[test]
    fn another_life_is_not_alive() {
        let me = std::process::id();
        let process = Process::read(me).unwrap();
        let netns = NetnsId { inode: Namespace::own().unwrap().inode(), cookie: None };
        let container = ContainerId::new(Door::Command, "", "x").unwrap();
        let boot = boot_id().unwrap();
        let live = Instance {
            container,
            boot_id: boot.clone(),
            pid: Some(me),
            start_time: Some(process.start_time),
            netns,
            netns_path: None,
        };
        assert!(live.is_alive(&boot));
        assert!(!live.is_alive("another boot"));
        assert!(!Instance { start_time: Some(process.start_time + 1), ..live.clone() }.is_alive(&boot));
        assert!(!Instance { pid: None, ..live.clone() }.is_alive(&boot));
        let other = NetnsId { inode: live.netns.inode + 1, cookie: None };
        assert!(!Instance { netns: other, ..live }.is_alive(&boot));
    }

    #[test]
    fn a_killed_instance_is_waited_for_and_a_living_one_is_not() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::read(child.id()).unwrap();
        let instance = Instance {
            container: ContainerId::new(Door::Command, "", "x").unwrap(),
            boot_id: boot_id().unwrap(),
            pid: Some(child.id()),
            start_time: Some(process.start_time),
            netns: NetnsId { inode: Namespace::own().unwrap().inode(), cookie: None },
            netns_path: None,
        };
        let soon = Deadline::after(Duration::from_secs(5));
        assert!(!instance.is_gone_soon(&instance.boot_id, soon));
        child.kill().unwrap();
        assert!(instance.is_gone_soon(&instance.boot_id, soon));
        child.wait().unwrap();
    }
}
