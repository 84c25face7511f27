//! What the agent sleeps on: one epoll(7) instance for the sockets and processes of all containers, and the ledger's
//! directories.
//!
//! Those it watches by inotify(7), which says what has changed. To close an instance that watches something takes the
//! kernel an SRCU grace period (8-20 ms), and so does the end of a process that has one. Where somebody waits for that
//! end it is dnotify (fcntl(2), F_NOTIFY) instead, which costs nothing to close and says only that something has changed.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::sys;

/// How many descriptors are looked at in one go; the rest comes with the next.
const EVENTS_MAX: usize = 64;
/// The number of the descriptor that tells of the ledger; containers are numbered from 0 on.
const LEDGER: u64 = u64::MAX;
/// The number of the descriptor that tells of many namespaces.
const MANY: u64 = u64::MAX - 1;

/// Why the agent woke up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Woken {
    /// The init process of the container of that number has ended.
    Ended(u64),
    /// Links or addresses of its namespace have changed.
    Changed(u64),
    /// Links or addresses of some namespaces have changed.
    ManyChanged,
    /// A directory of the ledger has changed.
    Ledger,
}

/// How it is told that a directory of the ledger has changed.
enum Notice {
    /// By inotify, with what has changed.
    Inotify(Inotify),
    /// By dnotify: SIGIO, which is blocked and read from here.
    Signal(SignalFd),
}

impl Notice {
    fn inotify() -> Result<Self> {
        Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .map(Self::Inotify)
            .context("cannot make an inotify instance (fs.inotify.max_user_instances may be used up)")
    }

    /// Not without CONFIG_DNOTIFY, or where fs.dir-notify-enable is 0, which the first directory tells.
    fn signal() -> Result<Self> {
        block_and_read(Signal::SIGIO).map(Self::Signal).context("cannot wait for SIGIO")
    }

    fn directory(&self, path: &Path) -> Result<Directory> {
        let attempt = || format!("cannot watch {}", path.display());
        let inotify = match self {
            Self::Signal(_) => {
                let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
                let directory = OpenOptions::new().read(true).custom_flags(flags).open(path).with_context(attempt)?;
                sys::signal_changes(directory.as_fd()).with_context(attempt)?;
                return Ok(Directory::Open(directory));
            }
            Self::Inotify(inotify) => inotify,
        };
        let what = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ONLYDIR;
        inotify
            .add_watch(path, what)
            .map(Directory::Marked)
            .with_context(|| format!("{} (fs.inotify.max_user_watches may be used up)", attempt()))
    }
}

/// A directory that is watched.
#[derive(Debug)]
pub enum Directory {
    /// By inotify.
    Marked(WatchDescriptor),
    /// By dnotify, for as long as it is open.
    Open(#[expect(dead_code, reason = "held open")] File),
}

impl Directory {
    /// Whether inotify means this one.
    pub fn is(&self, mark: WatchDescriptor) -> bool {
        matches!(self, Self::Marked(own) if *own == mark)
    }

    /// Whether to forget the other one would be to forget this one.
    pub fn is_watched_as(&self, other: &Self) -> bool {
        matches!(other, Self::Marked(mark) if self.is(*mark))
    }
}

/// What has changed in the ledger.
pub enum Change {
    /// Anything may have: it is not known what.
    Anything,
    /// A name in a directory.
    Name(InotifyEvent),
}

/// Everything that is waited for.
pub struct Watch {
    epoll: Epoll,
    notice: Notice,
}

impl Watch {
    /// Waits for changes of a directory of the ledger. `ends_at_once`: somebody waits for the end of this process. Where
    /// the kernel does not give the one way, it is the other.
    pub fn new(ends_at_once: bool, directory: &Path) -> Result<(Self, Directory)> {
        let [first, second]: [fn() -> Result<Notice>; 2] =
            if ends_at_once { [Notice::signal, Notice::inotify] } else { [Notice::inotify, Notice::signal] };
        let with = |way: fn() -> Result<Notice>| way().and_then(|notice| Self::with(notice, directory));
        with(first).or_else(|error| with(second).map_err(|_| error))
    }

    fn with(notice: Notice, directory: &Path) -> Result<(Self, Directory)> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll instance")?;
        let directory = notice.directory(directory)?;
        let watch = Self { epoll, notice };
        watch.add_notice(&watch.notice)?;
        Ok((watch, directory))
    }

    /// Watches by inotify from now on: this directory, and no other yet. None if it does already; after an error all is
    /// as before.
    pub fn watch_closely(&mut self, directory: &Path) -> Result<Option<Directory>> {
        if let Notice::Inotify(_) = self.notice {
            return Ok(None);
        }
        let notice = Notice::inotify()?;
        let directory = notice.directory(directory)?;
        self.add_notice(&notice)?;
        // The old one is forgotten with its descriptor.
        self.notice = notice;
        Ok(Some(directory))
    }

    fn add_notice(&self, notice: &Notice) -> Result<()> {
        match notice {
            Notice::Inotify(inotify) => self.add(inotify, LEDGER),
            Notice::Signal(signals) => self.add(signals, LEDGER),
        }
    }

    /// Waits for a process, by its pidfd, too.
    pub fn process(&self, number: u64, process: &impl AsFd) -> Result<()> {
        self.add(process, number << 1)
    }

    /// Waits for changes in a namespace, too.
    pub fn changes(&self, number: u64, events: &impl AsFd) -> Result<()> {
        self.add(events, number << 1 | 1)
    }

    /// Waits for changes in many namespaces, too.
    pub fn changes_of_many(&self, events: &impl AsFd) -> Result<()> {
        self.add(events, MANY)
    }

    fn add(&self, descriptor: &impl AsFd, data: u64) -> Result<()> {
        // A descriptor that is closed is forgotten by itself.
        self.epoll.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, data)).context("cannot wait for a descriptor")
    }

    /// Watches a directory of the ledger for names that come and go.
    pub fn directory(&self, path: &Path) -> Result<Directory> {
        self.notice.directory(path)
    }

    /// Stops watching one that nobody else watches. One that is gone is not watched any more.
    pub fn forget_directory(&self, directory: Directory) {
        if let (Notice::Inotify(inotify), Directory::Marked(mark)) = (&self.notice, directory) {
            let _ = inotify.rm_watch(mark);
        }
    }

    /// What has happened in the directories.
    pub fn ledger_changes(&self) -> Result<Vec<Change>> {
        let mut all = Vec::new();
        loop {
            let read = match &self.notice {
                Notice::Inotify(inotify) => {
                    inotify.read_events().map(|events| all.extend(events.into_iter().map(name)))
                }
                Notice::Signal(signals) => match signals.read_signal() {
                    Ok(Some(_)) => {
                        all.push(Change::Anything);
                        Ok(())
                    }
                    Ok(None) => Err(Errno::EAGAIN),
                    Err(error) => Err(error),
                },
            };
            match read {
                Ok(()) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(all),
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
                MANY => Woken::ManyChanged,
                data if data & 1 == 0 => Woken::Ended(data >> 1),
                data => Woken::Changed(data >> 1),
            })
            .collect();
        woken.sort_unstable();
        Ok(woken)
    }
}

/// Something was lost if the queue was too short.
fn name(event: InotifyEvent) -> Change {
    if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) { Change::Anything } else { Change::Name(event) }
}

/// A descriptor from which a signal is read instead of doing what it does.
fn block_and_read(signal: Signal) -> nix::Result<SignalFd> {
    let signals = SigSet::from(signal);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}
