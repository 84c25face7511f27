//! What the agent sleeps on: one epoll(7) instance for the sockets and processes of all containers, and the ledger's
//! directories by inotify(7).

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

/// How many descriptors are looked at in one go; the rest comes with the next.
const EVENTS_MAX: usize = 64;
/// The inotify descriptor's number; containers are numbered from 0 on.
const LEDGER: u64 = u64::MAX;

/// Why the agent woke up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Woken {
    /// The init process of the container of that number has ended.
    Ended(u64),
    /// Links or addresses of its namespace have changed.
    Changed(u64),
    /// A directory of the ledger has changed.
    Ledger,
}

/// Everything that is waited for.
pub struct Watch {
    epoll: Epoll,
    inotify: Inotify,
}

impl Watch {
    /// Waits for nothing yet.
    pub fn new() -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll instance")?;
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .context("cannot make an inotify instance (fs.inotify.max_user_instances may be used up)")?;
        let watch = Self { epoll, inotify };
        watch.add(&watch.inotify, LEDGER)?;
        Ok(watch)
    }

    /// Waits for a process, by its pidfd, too.
    pub fn process(&self, number: u64, process: &impl AsFd) -> Result<()> {
        self.add(process, number << 1)
    }

    /// Waits for changes in a namespace, too.
    pub fn changes(&self, number: u64, events: &impl AsFd) -> Result<()> {
        self.add(events, number << 1 | 1)
    }

    fn add(&self, descriptor: &impl AsFd, data: u64) -> Result<()> {
        // A descriptor that is closed is forgotten by itself.
        self.epoll.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, data)).context("cannot wait for a descriptor")
    }

    /// Watches a directory of the ledger for names that come and go.
    pub fn directory(&self, path: &Path) -> Result<WatchDescriptor> {
        let what = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ONLYDIR;
        self.inotify
            .add_watch(path, what)
            .with_context(|| format!("cannot watch {} (fs.inotify.max_user_watches may be used up)", path.display()))
    }

    /// Stops watching it. One that is gone is not watched any more.
    pub fn forget_directory(&self, directory: WatchDescriptor) {
        let _ = self.inotify.rm_watch(directory);
    }

    /// What has happened in the directories.
    pub fn ledger_events(&self) -> Result<Vec<InotifyEvent>> {
        let mut all = Vec::new();
        loop {
            match self.inotify.read_events() {
                Ok(events) => all.extend(events),
                Err(Errno::EAGAIN) => return Ok(all),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("cannot read what happened in the ledger"),
            }
        }
    }

    /// Sleeps until something happens or `time` has passed; for ever without one. Ends come first.
    pub fn wait(&self, time: Option<Duration>) -> Result<Vec<Woken>> {
        // Rounded up: a moment too early would only lead to another wait.
        let timeout = match time {
            None => EpollTimeout::NONE,
            Some(time) => EpollTimeout::try_from(time.as_micros().div_ceil(1000)).unwrap_or(EpollTimeout::MAX),
        };
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error).context("cannot wait for events"),
        };
        let mut woken: Vec<Woken> = events[..count]
            .iter()
            .map(|event| match event.data() {
                LEDGER => Woken::Ledger,
                data if data & 1 == 0 => Woken::Ended(data >> 1),
                data => Woken::Changed(data >> 1),
            })
            .collect();
        woken.sort_unstable();
        Ok(woken)
    }
}
