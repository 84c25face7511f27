//! Network namespaces: which one it is, going in, coming back.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use super::Seen;
use crate::privileges::{self, Work};
use crate::request::setting::SettingKey;

/// The inode number of the initial user namespace (`PROC_USER_INIT_INO`, kernel `include/linux/proc_ns.h`).
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;

/// Which network namespace: inode numbers are used again at once, cookies are not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsId {
    /// Inode number on nsfs, as `lsns` shows it.
    pub inode: u64,
    /// `SO_NETNS_COOKIE` (5.14); none on older kernels.
    pub cookie: Option<u64>,
}

impl NetnsId {
    /// A name for files: unique where the kernel has cookies.
    pub fn file_name(&self) -> String {
        match self.cookie {
            Some(cookie) => format!("{}-{cookie:x}", self.inode),
            None => self.inode.to_string(),
        }
    }
}

impl NetnsId {
    /// Whether this is the namespace at `path`. The cookie tells it from a later one with the same inode number; where the
    /// caller may not go in and come back, the number has to do.
    pub fn is_at(&self, path: &Path) -> bool {
        let Ok(namespace) = Namespace::open(path) else { return false };
        if namespace.inode != self.inode || self.cookie.is_none() {
            return namespace.inode == self.inode;
        }
        match Visit::to(namespace, None) {
            Ok(mut visit) if visit.host_reachable() => visit.id().map_or(true, |id| id == *self),
            _ => true,
        }
    }
}

/// An open network namespace. It stays alive as long as this does.
pub struct Namespace {
    file: File,
    path: PathBuf,
    inode: u64,
}

impl Namespace {
    /// The namespace of the calling thread.
    pub fn own() -> Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net")).context("cannot open the hook's own network namespace")
    }

    /// Opens `/proc/PID/ns/net` or a bind mount of one. Anything that is not a namespace is an error.
    pub fn open(path: &Path) -> io::Result<Self> {
        // O_NONBLOCK: a fifo that somebody put there must not block a container's start.
        let file = nix::fcntl::open(
            path,
            nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK,
            nix::sys::stat::Mode::empty(),
        )
        .map(File::from)?;
        let filesystem = nix::sys::statfs::fstatfs(&file)?;
        if filesystem.filesystem_type() != nix::sys::statfs::NSFS_MAGIC {
            return Err(io::Error::other("it is not a namespace file"));
        }
        let inode = file.metadata()?.ino();
        Ok(Self { file, path: path.into(), inode })
    }

    /// Moves the calling thread there.
    pub fn enter(&self) -> Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter the network namespace {}", self.path.display()))
    }

    /// The inode number, enough to compare namespaces that are both open.
    pub fn inode(&self) -> u64 {
        self.inode
    }
}

/// Whether the caller is in the initial user namespace.
pub fn in_initial_user_namespace() -> bool {
    own_user_namespace() == Some(INITIAL_USER_NAMESPACE)
}

/// The inode number of the caller's user namespace.
pub fn own_user_namespace() -> Option<u64> {
    std::fs::metadata("/proc/self/ns/user").ok().map(|meta| meta.ino())
}

/// A visit of the calling thread to a container's namespace and back. Dropping it comes back if it can.
pub struct Visit {
    host: Option<Namespace>,
    target: Namespace,
    /// The process that owns the namespace, for its user namespace.
    pid: Option<u32>,
    inside: bool,
    /// There is no way back: after joining another user namespace, or out of a rootless engine's.
    one_way: bool,
    /// What the capabilities of a user namespace are for.
    work: Work,
    /// What was seen outside before going in, where there is no way back.
    seen_outside: BTreeMap<SettingKey, Seen>,
}

impl Visit {
    /// A visit to `target`; `pid` is the container's init, if there is one.
    pub fn to(target: Namespace, pid: Option<u32>) -> Result<Self> {
        let host = Namespace::own()?;
        let inside = host.inode == target.inode;
        // The host's namespace belongs to the initial user namespace, and only its root may enter it.
        let one_way = !inside && !in_initial_user_namespace();
        Ok(Self { host: Some(host), target, pid, inside, one_way, work: Work::SetUp, seen_outside: BTreeMap::new() })
    }

    /// A visit that begins and ends inside: the host's namespace is out of reach (createContainer).
    pub fn already_inside() -> Result<Self> {
        let target = Namespace::own()?;
        Ok(Self {
            host: None,
            target,
            pid: None,
            inside: true,
            one_way: true,
            work: Work::SetUp,
            seen_outside: BTreeMap::new(),
        })
    }

    /// The same visit for other work than setting a container up.
    pub fn for_work(mut self, work: Work) -> Self {
        self.work = work;
        self
    }

    /// Whether host-wide values can be read and written, now or after coming back.
    pub fn host_reachable(&self) -> bool {
        self.host.is_some() && !self.one_way
    }

    /// Whether the target is the hook's own namespace.
    pub fn target_is_host(&self) -> bool {
        self.host.as_ref().is_some_and(|host| host.inode == self.target.inode)
    }

    /// The target's inode number.
    pub fn inode(&self) -> u64 {
        self.target.inode
    }

    /// Whether there may be no way back, so that what is outside has to be looked at before going in.
    pub fn may_be_one_way(&self) -> bool {
        let is_host_root = in_initial_user_namespace() && nix::unistd::geteuid().is_root();
        !self.inside && !is_host_root
    }

    /// Keeps what was seen outside before going in.
    pub fn remember_outside(&mut self, seen: BTreeMap<SettingKey, Seen>) {
        self.seen_outside = seen;
    }

    /// What was seen of a setting before going in.
    pub fn seen_outside(&self, key: &SettingKey) -> Seen {
        self.seen_outside.get(key).cloned().unwrap_or_default()
    }

    /// Goes in.
    pub fn inside(&mut self) -> Result<()> {
        if self.inside {
            return Ok(());
        }
        match setns(self.target.file.as_fd(), CloneFlags::CLONE_NEWNET) {
            Ok(()) => {}
            // An unprivileged user's container: its user namespace gives the rights, and takes the way back.
            Err(nix::Error::EPERM) if self.pid.is_some() && !nix::unistd::geteuid().is_root() => {
                self.enter_by_user_namespace()?;
            }
            Err(error) => {
                return Err(error).with_context(|| {
                    format!(
                        "cannot enter the network namespace {} (CAP_SYS_ADMIN is needed; run as root)",
                        self.target.path.display()
                    )
                });
            }
        }
        self.inside = true;
        Ok(())
    }

    fn enter_by_user_namespace(&mut self) -> Result<()> {
        let pid = self.pid.context("the namespace has no process")?;
        let path = format!("/proc/{pid}/ns/user");
        let user = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        setns(user.as_fd(), CloneFlags::CLONE_NEWUSER)
            .with_context(|| format!("cannot enter the user namespace {path} (only its owner and root may)"))?;
        self.one_way = true;
        setns(self.target.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter the network namespace {}", self.target.path.display()))?;
        // The user namespace gave all of its capabilities.
        privileges::begin(self.work)
    }

    /// Comes back to the hook's own namespace.
    pub fn outside(&mut self) -> Result<()> {
        if !self.inside || self.target_is_host() {
            return Ok(());
        }
        match &self.host {
            Some(host) if !self.one_way => {
                setns(host.file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .context("cannot come back to the host's network namespace")?;
                self.inside = false;
                Ok(())
            }
            _ => bail!("the host's network namespace cannot be reached from inside the container; use createRuntime"),
        }
    }

    /// Whether the thread is inside now.
    pub fn is_inside(&self) -> bool {
        self.inside
    }

    /// Which namespace the target is. The thread goes in for it.
    pub fn id(&mut self) -> Result<NetnsId> {
        self.inside()?;
        Ok(NetnsId { inode: self.target.inode, cookie: cookie()? })
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if self.host_reachable() {
            // There is nobody left to tell; a later visit compares inodes and would notice.
            let _ = self.outside();
        }
    }
}

/// The cookie of the calling thread's network namespace; None before Linux 5.14.
fn cookie() -> Result<Option<u64>> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .context("cannot open a socket in the container's network namespace")?;
    Ok(crate::sys::netns_cookie(socket.as_raw_fd()))
}
