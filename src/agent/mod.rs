//! The agent: one process per host that keeps running containers as they were asked for while links and addresses come
//! and go (upstream kernels: an endpoint is an address), and lets them go when their init has ended.
//!
//! It sleeps until the kernel says that something has changed, then reads everything that matters anew and compares: a
//! lost message costs nothing, and neither does being killed. It changes only what the ledger says is ours.

mod pace;
mod parent;
pub mod start;
mod watch;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::inotify::AddWatchFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::apply::{self, Followed};
use crate::cli::Globals;
use crate::context::Context;
use crate::deadline::Deadline;
use crate::instance::{self, Instance, Lifeline, Process};
use crate::kernel::netlink::events::{Events, EventsOfMany, Nsid};
use crate::kernel::netns::{Namespace, Visit, in_initial_user_namespace};
use crate::kernel::sysctl;
use crate::ledger::record::{Conflict, ConflictOutcome, Record};
use crate::ledger::{self, AgentLock, Ledger, TEMPORARY};
use crate::release::{self, Cause};
use crate::report::{self, journal::Priority};
use crate::request::setting;
use crate::sys;
use pace::Pace;
use watch::{Change, Directory, Watch, Woken};

/// How long the agent stays when nobody needs it any more.
const LINGER: Duration = Duration::from_secs(60);
/// How long it waits for a lock. Others wait for it meanwhile.
const PATIENCE: Duration = Duration::from_millis(20);
/// How long a new address waits for its link and its way out. What gives an interface an address gives it those, too.
const GRACE: Duration = Duration::from_millis(50);
/// When the settings are looked at again: the runtime writes `linux.sysctl` after the hook.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// The first pause after something did not work; then it is as long as that has lasted.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// After how long it is said.
const BEARABLE: Duration = Duration::from_secs(10);
/// The longest such pause, and the least time from the start of a process for one container that was killed or failed to
/// the start of the next.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often processes are looked at where the kernel has no pidfd (before Linux 5.3).
const PROCESS_POLL: Duration = Duration::from_millis(20);
/// The least time between two of these looks for each process: it takes about a fiftieth of it.
const PROCESS_SHARE: Duration = Duration::from_micros(200);

/// From where the agent goes into namespaces.
pub enum Stance {
    /// From its own one into those of all containers, and back.
    Home(Namespace),
    /// From outside, as a user who cannot come back: each container gets a process of its own, that stays inside.
    Apart(Namespace),
    /// From inside the namespaces of one container: an unprivileged user's, out of which there is no way.
    Inside(String),
}

impl Stance {
    /// Where the calling process can be: in a user namespace it makes itself a network namespace to come back to.
    pub fn home() -> Result<Self> {
        if !in_initial_user_namespace() {
            leave_namespace()?;
        } else if !nix::unistd::geteuid().is_root() {
            return Namespace::own().map(Self::Apart);
        }
        Namespace::own().map(Self::Home)
    }
}

/// Goes to a network namespace of its own, which takes rights over the user namespace.
fn leave_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("the agent cannot make a network namespace of its own")
}

/// Who started the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A person, systemd, or another agent: it is where it belongs.
    Command,
    /// A hook, as its child, in the engine's cgroups; its pid.
    Hook(Pid),
}

impl Origin {
    /// Whether the hook is still there.
    fn is_parent(self) -> bool {
        matches!(self, Self::Hook(pid) if nix::unistd::getppid() == pid)
    }
}

/// How it is heard of changes in a container's namespace.
enum Source {
    /// By the agent's one socket. `routes`: whether routes are needed, too.
    Shared { nsid: Nsid, routes: bool },
    /// By a socket in there.
    Own(Events),
    /// Not at all: a process of its own follows it.
    Worker(Worker),
}

/// A process that follows one container from inside.
#[derive(Clone, Copy)]
struct Worker {
    pid: Pid,
    since: Instant,
}

impl Worker {
    fn started(pid: Pid) -> Self {
        Self { pid, since: Instant::now() }
    }

    /// Waits for its end. Gives until when there shall not be another one for the same container; None if it has done
    /// its work.
    fn reap(self) -> Option<Instant> {
        match waitpid(self.pid, None) {
            Ok(WaitStatus::Exited(_, 0)) => None,
            _ => Some(self.since + LONGEST_PAUSE),
        }
    }
}

/// A container that is followed.
struct Container {
    instance: Instance,
    name: String,
    number: u64,
    source: Source,
    /// Its init, or the process that follows it.
    process: Lifeline,
    /// The list of those who share its namespace.
    members: Directory,
    /// Since when an address waits for its link or its way out.
    waiting: Option<Instant>,
    /// How often it is looked at.
    pace: Pace,
    /// Whether a killed hook was found at work on it, which is said once.
    interrupted: bool,
    /// Whether its settings were looked at for the first time, so that there is a second time.
    seen: bool,
    /// The settings that are known to have drifted, with their values.
    drifted: BTreeMap<String, String>,
}

impl Container {
    fn has_worker(&self) -> bool {
        matches!(self.source, Source::Worker(_))
    }
}

/// What is to be done about a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    /// Find out whether to follow it, and begin.
    Begin,
    /// Bring its interfaces back to what was asked for.
    Look,
    /// Hold its settings against what was asked for.
    Settings,
    /// Let it go: its init has ended.
    Release,
}

/// A task for later.
struct Later {
    when: Instant,
    key: String,
    task: Task,
    trouble: Option<Trouble>,
}

/// A task does not work, however often it is tried and whatever for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trouble {
    /// When that was found first.
    since: Instant,
    /// Whether it was said.
    is_said: bool,
}

impl Later {
    fn is_for(&self, key: &str, task: Task) -> bool {
        self.key == key && self.task == task
    }
}

impl Trouble {
    /// That of a task which is to be done for two reasons.
    fn of_both(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        let both = one.into_iter().chain(other);
        both.reduce(|one, other| Self { since: one.since.min(other.since), is_said: one.is_said || other.is_said })
    }
}

/// Follows containers until nobody has needed it for a minute.
pub fn run(globals: &Globals, stance: Stance, mut lock: AgentLock, origin: Origin) -> Result<()> {
    let ledger = Ledger::create(&Context::state_dir(globals)?)?;
    raise_descriptor_limit();
    let mut way = parent::Way::default();
    loop {
        let mut agent = Agent::new(globals, &stance, ledger.clone(), way, origin)?;
        ledger.announce_agent(&lock, Process::own()?.0)?;
        let ended = agent.run();
        way = agent.way;
        drop(agent);
        if let Ok(End::Move) = ended {
            if !fork(&ledger, &lock)? {
                // The lock stays with the child.
                std::process::exit(0);
            }
            nix::unistd::setsid().context("cannot begin a session")?;
            continue;
        }
        ledger.forget_agent(&lock)?;
        if let End::Leave = ended? {
            return Ok(());
        }
        drop(lock);
        // A hook that found the lock taken while we were about to end relies on us.
        if ledger.followed_from_here()?.is_empty() || matches!(stance, Stance::Inside(_)) {
            return Ok(());
        }
        match ledger.try_agent_lock(None)? {
            Some(again) => lock = again,
            None => return Ok(()),
        }
    }
}

/// Forks, and says that the child is the agent now: whoever asks next shall not have to wait for it to come so far. True in
/// the child.
fn fork(ledger: &Ledger, lock: &AgentLock) -> Result<bool> {
    let (said, saying) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
    if let Some(agent) = sys::fork().context("cannot fork")? {
        // What cannot be written here the agent cannot write either, and says why.
        let _ = ledger.announce_agent(lock, agent.as_raw().unsigned_abs());
        return Ok(false);
    }
    drop(saying);
    // It ends with the other one's descriptor: what the agent writes must not be written over.
    let _ = File::from(said).read(&mut [0]);
    Ok(true)
}

/// Up to three descriptors for each container. Where the hard limit is low, it says so when it is reached.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

struct Agent<'a> {
    globals: &'a Globals,
    stance: &'a Stance,
    ledger: Ledger,
    boot_id: String,
    watch: Watch,
    /// The ledger's list of those who are to be followed.
    list: Directory,
    /// The socket that tells of the namespaces of all containers. None where there cannot be one.
    events: Option<EventsOfMany>,
    containers: BTreeMap<String, Container>,
    numbers: BTreeMap<u64, String>,
    /// The processes of containers that are not followed any more, until they have ended.
    leaving: BTreeMap<u64, (Worker, Lifeline)>,
    /// Until when a container gets no other process, whose last one was killed or failed.
    resting: BTreeMap<String, Instant>,
    next_number: u64,
    tasks: VecDeque<(String, Task, Option<Trouble>)>,
    later: Vec<Later>,
    /// When processes without a pidfd are looked at again.
    next_poll: Instant,
    /// Since when nobody is followed.
    idle: Option<Instant>,
    /// The last complaint about the policy file.
    policy_error: Option<String>,
    /// How to keep out of the way of a parent that may wait for us.
    way: parent::Way,
    /// Since when it is where the engine put the hook; None when it has left.
    in_hooks_cgroups: Option<Instant>,
    origin: Origin,
}

/// Why the loop has ended.
enum End {
    /// Nobody needs the agent.
    Idle,
    /// It has to go on as another process.
    Move,
    /// It has to end for a parent that waits for it; the hook that runs then starts another one if need be.
    Leave,
}

impl<'a> Agent<'a> {
    fn new(globals: &'a Globals, stance: &'a Stance, ledger: Ledger, way: parent::Way, origin: Origin) -> Result<Self> {
        ledger.make_follow_directory()?;
        let (watch, list) = Watch::new(parent::may_wait(), &ledger.follow_directory())?;
        // Whatever hinders: a socket in each namespace does, too.
        let events = matches!(stance, Stance::Home(_)).then(EventsOfMany::open).and_then(Result::ok);
        if let Some(events) = &events {
            watch.changes_of_many(events)?;
        }
        Ok(Self {
            globals,
            stance,
            ledger,
            boot_id: instance::boot_id()?,
            watch,
            list,
            events,
            containers: BTreeMap::new(),
            numbers: BTreeMap::new(),
            leaving: BTreeMap::new(),
            resting: BTreeMap::new(),
            next_number: 0,
            tasks: VecDeque::new(),
            later: Vec::new(),
            next_poll: Instant::now(),
            idle: Some(Instant::now()),
            policy_error: None,
            way,
            in_hooks_cgroups: matches!(origin, Origin::Hook(_)).then(Instant::now),
            origin,
        })
    }

    fn run(&mut self) -> Result<End> {
        self.read_list()?;
        loop {
            if self.tasks.is_empty() {
                if let Some(end) = self.way.clear() {
                    return Ok(end);
                }
                // That takes the kernel longer than all else; and nothing if this is the end already.
                let since = self.in_hooks_cgroups.filter(|_| self.way.due().is_none());
                if since.is_some_and(|since| since.elapsed() >= parent::time_in_hooks_cgroups()) {
                    self.in_hooks_cgroups = None;
                    start::leave_cgroups();
                    self.watch_closely()?;
                }
            }
            for woken in self.watch.wait(self.timeout())? {
                match woken {
                    Woken::Ended(number) => self.ended(number),
                    Woken::Changed(number) => self.changed(number),
                    Woken::ManyChanged => self.many_changed(),
                    Woken::Ledger => self.ledger_changed()?,
                }
            }
            self.poll_processes();
            self.take_up_what_is_due();
            // One at a time: whoever ends meanwhile comes first.
            if let Some((key, task, trouble)) = self.tasks.pop_front() {
                self.perform(&key, task, trouble);
            } else if self.may_end() {
                return Ok(End::Idle);
            }
        }
    }

    /// How long there is nothing to do.
    fn timeout(&self) -> Option<Duration> {
        if !self.tasks.is_empty() {
            return Some(Duration::ZERO);
        }
        let due = self.later.iter().map(|later| later.when);
        let end = self.idle.map(|since| since + self.linger());
        // Before that it is looked at the parent first.
        let parent = self.way.due().or(self.in_hooks_cgroups.map(|since| since + parent::CRUN_CGROUPS));
        let next = due.chain(end).chain(parent).min().map(|when| when.saturating_duration_since(Instant::now()));
        let polls = self.processes().any(|(_, process)| process.pidfd().is_none());
        let poll = polls.then(|| self.next_poll.saturating_duration_since(Instant::now()));
        next.into_iter().chain(poll).min()
    }

    /// One that is inside a container's namespace would keep it alive.
    fn linger(&self) -> Duration {
        if matches!(self.stance, Stance::Inside(_)) { Duration::ZERO } else { LINGER }
    }

    fn may_end(&mut self) -> bool {
        if !self.containers.is_empty() || !self.later.is_empty() {
            self.idle = None;
            return false;
        }
        self.idle.get_or_insert_with(Instant::now).elapsed() >= self.linger()
    }

    fn is_mine(&self, key: &str) -> bool {
        match self.stance {
            Stance::Home(_) | Stance::Apart(_) => self.ledger.is_followed_from_here(key),
            Stance::Inside(own) => own == key,
        }
    }

    fn queue(&mut self, key: &str, task: Task) {
        if task == Task::Look {
            // Whoever changes all the time lets the others go first.
            let pause = self.containers.get(key).map(|container| container.pace.pause(Instant::now()));
            if let Some(pause) = pause.filter(|pause| !pause.is_zero()) {
                return self.queue_later(key, task, pause, None);
            }
        }
        if !self.tasks.iter().any(|(queued, what, _)| queued == key && *what == task) {
            self.tasks.push_back((key.into(), task, None));
        }
    }

    /// Instead of the same task at another time: each of them would be tried again by itself.
    fn queue_later(&mut self, key: &str, task: Task, pause: Duration, trouble: Option<Trouble>) {
        let position = self.later.iter().position(|later| later.is_for(key, task));
        let before = position.and_then(|position| self.later.swap_remove(position).trouble);
        let trouble = Trouble::of_both(trouble, before);
        self.later.push(Later { when: Instant::now() + pause, key: key.into(), task, trouble });
    }

    fn take_up_what_is_due(&mut self) {
        let now = Instant::now();
        let mut position = 0;
        while position < self.later.len() {
            if self.later[position].when > now {
                position += 1;
                continue;
            }
            let Later { key, task, trouble, .. } = self.later.swap_remove(position);
            match self.tasks.iter_mut().find(|(queued, what, _)| *queued == key && *what == task) {
                Some((_, _, queued)) => *queued = Trouble::of_both(trouble, *queued),
                None => self.tasks.push_back((key, task, trouble)),
            }
        }
    }

    /// It may take its time to end when nobody waits for it, and hear what exactly has changed.
    fn watch_closely(&mut self) -> Result<()> {
        if parent::may_wait() {
            if self.origin.is_parent() {
                // Who is the parent after the hook is not known yet.
                self.in_hooks_cgroups = Some(Instant::now());
            }
            return Ok(());
        }
        match self.watch.watch_closely(&self.ledger.follow_directory()) {
            Ok(Some(list)) => self.list = list,
            Ok(None) => return Ok(()),
            Err(error) => {
                let line =
                    format!("{error:#}; until the agent's end all containers are looked at when one comes or goes");
                report::say(Priority::Warning, None, &line);
                return Ok(());
            }
        }
        let mut unwatched = Vec::new();
        for (key, container) in &mut self.containers {
            match self.watch.directory(&self.ledger.members_directory(&container.instance.netns)) {
                Ok(members) => container.members = members,
                Err(_) => unwatched.push(key.clone()),
            }
        }
        // It has been released, or what hinders is found out when it is begun again.
        for key in unwatched {
            self.drop_container(&key);
        }
        // What came in between.
        self.look_at_all()
    }

    // --- what wakes it ----------------------------------------------------------------------------------------------

    /// Nothing of a dead container's namespace may be held: the sockets first, the ledger afterwards.
    fn ended(&mut self, number: u64) {
        let key = self.numbers.get(&number).cloned();
        if let Some(key) = &key {
            self.drop_container(key);
            self.container_ended();
        }
        let worker = self.leaving.remove(&number).map(|(worker, _)| worker);
        let rests = worker.and_then(Worker::reap);
        let Some(key) = key else { return };
        if worker.is_some() {
            // It has released the container, or was killed.
            if let Some(until) = rests {
                self.resting.retain(|_, until| *until > Instant::now());
                self.resting.insert(key.clone(), until);
            }
            self.queue(&key, Task::Begin);
            return;
        }
        if let Stance::Inside(_) = self.stance {
            if let Err(error) = leave_namespace() {
                report::say(Priority::Warning, None, &format!("{error:#}"));
            }
        }
        self.tasks.push_front((key, Task::Release, None));
    }

    fn changed(&mut self, number: u64) {
        let Some(key) = self.numbers.get(&number).cloned() else { return };
        let source = self.containers.get_mut(&key).map(|container| &mut container.source);
        if let Some(Source::Own(events)) = source {
            if events.drain() {
                self.queue(&key, Task::Look);
            }
        }
    }

    /// A number may be that of a namespace which is gone, and of another one meanwhile: only until the end of the container
    /// is heard of, and who is looked at is told by its process.
    fn many_changed(&mut self) {
        let Some(heard) = self.events.as_ref().map(EventsOfMany::drain) else { return };
        let concerned = self.containers.iter().filter(|(_, container)| match &container.source {
            Source::Shared { nsid, .. } => heard.lost || heard.namespaces.contains(nsid),
            Source::Own(_) | Source::Worker(_) => false,
        });
        for key in concerned.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.queue(&key, Task::Look);
        }
    }

    fn ledger_changed(&mut self) -> Result<()> {
        for change in self.watch.ledger_changes()? {
            let event = match change {
                Change::Anything => {
                    self.look_at_all()?;
                    continue;
                }
                Change::Name(event) => event,
            };
            if self.list.is(event.wd) {
                let Some(key) = event.name.and_then(|name| name.into_string().ok()) else { continue };
                if key.starts_with(TEMPORARY) {
                    continue;
                }
                if event.mask.contains(AddWatchFlags::IN_DELETE) {
                    self.drop_container(&key);
                    self.container_ended();
                } else if self.is_mine(&key) {
                    self.queue(&key, Task::Begin);
                }
            } else {
                // Somebody came into a namespace or left it, and took what was his.
                let sharing = self.containers.iter().filter(|(_, container)| container.members.is(event.wd));
                for key in sharing.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
                    self.queue(&key, Task::Look);
                    self.queue(&key, Task::Settings);
                }
            }
        }
        Ok(())
    }

    /// It is not known what has changed.
    fn look_at_all(&mut self) -> Result<()> {
        self.read_list()?;
        for key in self.containers.keys().cloned().collect::<Vec<_>>() {
            self.queue(&key, Task::Look);
            self.queue(&key, Task::Settings);
        }
        Ok(())
    }

    fn read_list(&mut self) -> Result<()> {
        let list = self.ledger.followed()?;
        for key in self.containers.keys().filter(|key| !list.contains(key)).cloned().collect::<Vec<_>>() {
            self.drop_container(&key);
            self.container_ended();
        }
        for key in list {
            if self.is_mine(&key) {
                self.queue(&key, Task::Begin);
            }
        }
        Ok(())
    }

    /// Looks for those that have ended where the kernel does not say so by itself.
    fn poll_processes(&mut self) {
        if self.next_poll > Instant::now() {
            return;
        }
        let ended = self.processes().filter(|(_, process)| process.is_cut());
        let numbers: Vec<u64> = ended.map(|(number, _)| number).collect();
        let count = u32::try_from(self.processes().count()).unwrap_or(u32::MAX);
        self.next_poll = Instant::now() + PROCESS_POLL.max(PROCESS_SHARE.saturating_mul(count));
        for number in numbers {
            self.ended(number);
        }
    }

    /// The processes whose ends are waited for.
    fn processes(&self) -> impl Iterator<Item = (u64, &Lifeline)> {
        let followed = self.containers.values().map(|container| (container.number, &container.process));
        followed.chain(self.leaving.iter().map(|(number, (_, process))| (*number, process)))
    }

    /// A container has ended, perhaps before it could be followed: its engine may wait for us now.
    fn container_ended(&mut self) {
        if let Stance::Home(_) = self.stance {
            self.way.container_ended();
        }
    }

    fn drop_container(&mut self, key: &str) {
        self.tasks.retain(|(queued, ..)| queued != key);
        self.later.retain(|later| later.key != key);
        let Some(container) = self.containers.remove(key) else { return };
        self.numbers.remove(&container.number);
        if !self.containers.values().any(|other| other.members.is_watched_as(&container.members)) {
            self.watch.forget_directory(container.members);
        }
        if let Source::Worker(worker) = container.source {
            self.leaving.insert(container.number, (worker, container.process));
        }
    }

    // --- what it does -----------------------------------------------------------------------------------------------

    fn perform(&mut self, key: &str, task: Task, trouble: Option<Trouble>) {
        let begin = Instant::now();
        let done = match task {
            Task::Begin => self.begin(key),
            Task::Look => self.look(key),
            Task::Settings => self.look_at_settings(key),
            Task::Release => self.release(key),
        };
        self.go_home();
        if let (Task::Look, Some(container)) = (task, self.containers.get_mut(key)) {
            container.pace.worked(begin.elapsed(), Instant::now());
        }
        let again = self.later.iter_mut().find(|later| later.is_for(key, task));
        let Err(error) = done else {
            if let Some(later) = again {
                later.trouble = None;
            }
            return;
        };
        let now = Instant::now();
        let trouble = Trouble::of_both(trouble, again.and_then(|later| later.trouble));
        let mut trouble = trouble.unwrap_or(Trouble { since: now, is_said: false });
        let lasted = now.duration_since(trouble.since);
        // What is wrong with the policy was said once.
        let says = lasted >= BEARABLE && !trouble.is_said && self.policy_error.is_none();
        trouble.is_said |= says;
        self.queue_later(key, task, lasted.clamp(FIRST_PAUSE, LONGEST_PAUSE), Some(trouble));
        if !says {
            return;
        }
        let name = self.containers.get(key).map_or(key, |container| &container.name);
        let attempt = match task {
            Task::Begin => "cannot be followed",
            Task::Look => "its interfaces could not be brought to what was asked for",
            Task::Settings => "its settings could not be looked at",
            Task::Release => "its init has ended, and it could not be let go",
        };
        let line = format!("{attempt}: {error:#}; it is tried again every {} seconds", LONGEST_PAUSE.as_secs());
        report::say(Priority::Error, Some(name), &line);
    }

    /// A visit comes back by itself where it can.
    fn go_home(&self) {
        if let Stance::Home(home) = self.stance {
            if let Err(error) = home.enter() {
                // Here we would keep a container's namespace alive. The next hook starts another agent.
                report::say(Priority::Error, None, &format!("the agent ends: {error:#}"));
                std::process::exit(1);
            }
        }
    }

    /// The policy as it is now, with a deadline that does not keep others waiting.
    fn context(&mut self) -> Result<Context> {
        match Context::new(self.globals, Instant::now()) {
            Ok(context) => {
                self.policy_error = None;
                Ok(Context { deadline: Deadline::after(PATIENCE), ..context })
            }
            Err(error) => {
                let text = format!("{error:#}");
                if self.policy_error.as_ref() != Some(&text) {
                    report::say(Priority::Error, None, &format!("nothing is followed until this is mended: {text}"));
                    self.policy_error = Some(text);
                }
                Err(error)
            }
        }
    }

    fn begin(&mut self, key: &str) -> Result<()> {
        let record = match self.ledger.record(key)? {
            Some(record) => record,
            None => {
                self.container_ended();
                return self.forget(key, false);
            }
        };
        if !record.instance.is_alive(&self.boot_id) {
            self.drop_container(key);
            self.container_ended();
            self.queue(key, Task::Release);
            return Ok(());
        }
        match self.containers.get(key) {
            Some(known) if known.instance == record.instance => {}
            _ => {
                self.drop_container(key);
                let inside = matches!(self.stance, Stance::Inside(_));
                if inside && Visit::already_inside()?.id()? != record.instance.netns {
                    // Another life of it, where this process cannot go: it ends, and another one begins.
                    return Ok(());
                }
                let instance = record.instance.clone();
                let opened = match self.stance {
                    Stance::Apart(_) => self.open_apart(key, record),
                    Stance::Home(_) | Stance::Inside(_) => self.open(record).map(Some),
                };
                let container = match opened {
                    Ok(Some(container)) => container,
                    Ok(None) => return Ok(()),
                    // It has ended while it was looked at.
                    Err(_) if !instance.is_alive(&self.boot_id) => {
                        self.container_ended();
                        self.queue(key, Task::Release);
                        return Ok(());
                    }
                    Err(error) => return Err(error),
                };
                self.numbers.insert(container.number, key.into());
                self.containers.insert(key.into(), container);
                self.idle = None;
                self.queue(key, Task::Settings);
            }
        }
        self.queue(key, Task::Look);
        Ok(())
    }

    /// Takes a container off the list that the ledger does not know: released, or its hook has failed; and one that is dead
    /// if it is `left` to others. That is looked at under its lock, which a hook may hold that brings it back.
    fn forget(&self, key: &str, left: bool) -> Result<()> {
        let names = [format!("container:{key}")];
        let locks = self.ledger.lock_by_name(&names, key, Deadline::after(PATIENCE))?;
        match self.ledger.record(key)? {
            Some(record) if !left || record.instance.is_alive(&self.boot_id) => Ok(()),
            Some(_) => self.ledger.unfollow(key),
            None => {
                self.ledger.unfollow(key)?;
                locks.discard(&names[0])
            }
        }
    }

    fn open(&mut self, record: Record) -> Result<Container> {
        let Record { instance, name, .. } = record;
        let pid = instance.pid.context("it has no process")?;
        let process = Lifeline::of(pid)?;
        let mut visit = self.visit(&instance)?;
        if visit.id()? != instance.netns {
            bail!("process {pid} is in another network namespace by now");
        }
        let elsewhere = !visit.target_is_host();
        drop(visit);
        let source = self.source(&instance, elsewhere)?;
        let members = self.watch.directory(&self.ledger.members_directory(&instance.netns))?;
        let container = self.container(instance, name, source, process, members)?;
        // Whatever the pid stands for by now, the start time tells.
        if !container.instance.is_alive(&self.boot_id) {
            bail!("process {pid} has ended");
        }
        Ok(container)
    }

    /// Begins to wait for the end of a container's process and for changes in its namespace.
    fn container(
        &mut self,
        instance: Instance,
        name: String,
        source: Source,
        process: Lifeline,
        members: Directory,
    ) -> Result<Container> {
        let number = self.next_number;
        self.next_number += 1;
        if let Some(process) = process.pidfd() {
            self.watch.process(number, process)?;
        }
        if let Source::Own(events) = &source {
            self.watch.changes(number, events)?;
        }
        Ok(Container {
            instance,
            name,
            number,
            source,
            process,
            members,
            waiting: None,
            pace: Pace::new(Instant::now()),
            interrupted: false,
            seen: false,
            drifted: BTreeMap::new(),
        })
    }

    /// The agent's socket at home, or where that does not reach one in the container's namespace. `elsewhere`: it is not
    /// at home itself.
    fn source(&mut self, instance: &Instance, elsewhere: bool) -> Result<Source> {
        self.go_home();
        if let (Some(events), Some(pid), true) = (&mut self.events, instance.pid, elsewhere) {
            if let Ok(nsid) = events.number_of(pid, Deadline::after(PATIENCE)) {
                // Before it is looked at, so that nothing is missed.
                events.hear_of_routes(true)?;
                return Ok(Source::Shared { nsid, routes: true });
            }
        }
        let mut visit = self.visit(instance)?;
        visit.inside()?;
        Events::open().map(Source::Own)
    }

    /// Has the socket for all hear what any of them needs.
    fn choose_what_to_hear(&mut self) -> Result<()> {
        let wants_routes = |container: &Container| matches!(container.source, Source::Shared { routes: true, .. });
        let routes = self.containers.values().any(wants_routes);
        self.events.as_mut().map_or(Ok(()), |events| events.hear_of_routes(routes))
    }

    /// Starts the process that follows one container from inside. None if a hook has started one, or its engine's agent, or
    /// if the last one has ended too soon: it is looked at again later.
    fn open_apart(&mut self, key: &str, record: Record) -> Result<Option<Container>> {
        let Record { instance, name, .. } = record;
        let rests = self.resting.get(key).map(|until| until.saturating_duration_since(Instant::now()));
        if let Some(rest) = rests.filter(|rest| !rest.is_zero()) {
            self.queue_later(key, Task::Begin, rest, None);
            return Ok(None);
        }
        let lock = match self.ledger.has_agent_of_its_engine(key) {
            true => None,
            false => self.ledger.try_agent_lock(Some(key))?,
        };
        let Some(lock) = lock else {
            self.queue_later(key, Task::Begin, LINGER / 2, None);
            return Ok(None);
        };
        let members = self.watch.directory(&self.ledger.members_directory(&instance.netns))?;
        let globals = Globals { state_dir: Some(self.ledger.directory().into()), ..self.globals.clone() };
        let Some(pid) = sys::fork().context("cannot fork")? else {
            let done = sys::close_all_but(lock.as_fd())
                .context("cannot let go of the agent's descriptors")
                .and_then(|()| self.enter(&instance))
                .and_then(|()| run(&globals, Stance::Inside(key.into()), lock, Origin::Command));
            if let Err(error) = &done {
                report::say(Priority::Error, Some(&name), &format!("it is not followed any more: {error:#}"));
            }
            std::process::exit(i32::from(done.is_err()));
        };
        let worker = Worker::started(pid);
        let process = lock.leave_to_child().and_then(|()| Lifeline::of(pid.as_raw() as u32));
        let begun =
            process.and_then(|process| self.container(instance, name, Source::Worker(worker), process, members));
        if begun.is_err() {
            // Nobody would hear of its end.
            let _ = kill(pid, Signal::SIGKILL);
            worker.reap();
        }
        begun.map(Some)
    }

    /// Enters a container's namespaces for good.
    fn enter(&self, instance: &Instance) -> Result<()> {
        let mut visit = self.visit(instance)?;
        visit.inside()?;
        // There is no way back that it could take.
        drop(visit);
        Ok(())
    }

    fn visit(&self, instance: &Instance) -> Result<Visit> {
        match self.stance {
            Stance::Home(_) | Stance::Apart(_) => {
                let pid = instance.pid.context("it has no process")?;
                let (namespace, process) = instance::open_netns_of(pid)?;
                if Some(process.start_time) != instance.start_time {
                    bail!("process {pid} is another one by now");
                }
                Visit::to(namespace, Some(pid))
            }
            Stance::Inside(_) => Visit::already_inside(),
        }
    }

    fn look(&mut self, key: &str) -> Result<()> {
        let Some(container) = self.containers.get(key).filter(|container| !container.has_worker()) else {
            return Ok(());
        };
        // Taken off the list before what has led here, perhaps, and heard of afterwards.
        if !self.ledger.is_followed(key) {
            return Ok(());
        }
        let (instance, name, waiting) = (container.instance.clone(), container.name.clone(), container.waiting);
        let visit = match self.visit(&instance) {
            // Its end is on its way to us.
            Err(_) if !instance.is_alive(&self.boot_id) => return Ok(()),
            visit => visit?,
        };
        let context = self.context()?;
        let hurries = waiting.is_some_and(|since| since.elapsed() >= GRACE);
        match apply::follow(&instance, visit, hurries, &context, &self.ledger)? {
            Followed::Kept { news, waits, wants_routes } => {
                for line in news {
                    report::say(Priority::Info, Some(&name), &line);
                }
                let since = waits.then(|| waiting.unwrap_or_else(Instant::now));
                if let Some(container) = self.containers.get_mut(key) {
                    container.waiting = since;
                    container.interrupted = false;
                    match &mut container.source {
                        Source::Shared { routes, .. } => *routes = wants_routes,
                        Source::Own(events) => events.hear_of_routes(wants_routes)?,
                        Source::Worker(_) => {}
                    }
                }
                self.choose_what_to_hear()?;
                if let Some(since) = since {
                    self.queue_later(key, Task::Look, GRACE.saturating_sub(since.elapsed()), None);
                }
            }
            // The ledger's list says the rest.
            Followed::Gone => {}
            Followed::Interrupted => {
                let container = self.containers.get_mut(key);
                if container.is_some_and(|container| !std::mem::replace(&mut container.interrupted, true)) {
                    let line = "a hook was killed while it set this container up; apply or release finishes it";
                    report::say(Priority::Warning, Some(&name), line);
                }
            }
        }
        Ok(())
    }

    /// Notes the settings of the namespace that somebody has changed; they are left as they are.
    fn look_at_settings(&mut self, key: &str) -> Result<()> {
        let Some(container) = self.containers.get(key).filter(|container| !container.has_worker()) else {
            return Ok(());
        };
        let instance = container.instance.clone();
        let pid = instance.pid.context("it has no process")?;
        let Some(record) = self.ledger.record(key)?.filter(|record| record.instance == instance) else { return Ok(()) };
        let owned: Vec<_> = record.netns_claims().collect();
        if owned.is_empty() || !instance.is_alive(&self.boot_id) {
            return Ok(());
        }
        let mut visit = self.visit(&instance)?;
        visit.inside()?;
        let seen: Vec<_> = owned.iter().map(|own| sysctl::look(&own.key)).collect();
        drop(visit);
        self.go_home();
        let Some(mut drifted) = self.containers.get(key).map(|container| container.drifted.clone()) else {
            return Ok(());
        };
        let mut conflicts = Vec::new();
        for (own, seen) in owned.iter().zip(&seen) {
            let Some(value) = seen.value() else { continue };
            if setting::same(&own.key, value, &own.value) {
                drifted.remove(&own.key.to_string());
            } else if drifted.insert(own.key.to_string(), value.into()).as_deref() != Some(value) {
                conflicts.push(Conflict {
                    time: ledger::now(),
                    container: instance.container.id.clone(),
                    key: own.key.to_string(),
                    wanted: own.value.clone(),
                    kept: value.into(),
                    holders: vec![instance.container.id.clone()],
                    outcome: ConflictOutcome::Drift,
                    reason: format!(
                        "{} was set to {} in the namespace of the container's process {pid} and is {value} now; the runtime's linux.sysctl or somebody in the namespace changed it, and it is left so",
                        own.key, own.value
                    ),
                });
            }
        }
        // A restarted agent does not say it again; of another life, with another process, it is said.
        if !conflicts.is_empty() {
            let known = self.ledger.conflicts()?.items;
            conflicts.retain(|new| !known.iter().any(|old| Conflict { time: new.time, ..old.clone() } == *new));
        }
        self.ledger.record_conflicts(&conflicts)?;
        for conflict in &conflicts {
            report::say(Priority::Warning, Some(&record.name), &conflict.reason);
        }
        if let Some(container) = self.containers.get_mut(key) {
            container.drifted = drifted;
            if !std::mem::replace(&mut container.seen, true) {
                self.queue_later(key, Task::Settings, SECOND_LOOK, None);
            }
        }
        Ok(())
    }

    fn release(&mut self, key: &str) -> Result<()> {
        let Some(record) = self.ledger.record(key)? else { return self.forget(key, false) };
        let context = self.context()?;
        let done = match release::release(&record.instance.container, &context, Cause::Agent) {
            Err(error) if error.is::<release::OutOfReach>() => {
                self.forget(key, true)?;
                let line = format!(
                    "its init has ended, and {error:#}: it is left to the poststop hook, or mptcp-hook release --stale in the host's"
                );
                report::say(Priority::Warning, Some(&record.name), &line);
                return Ok(());
            }
            done => done?,
        };
        match done {
            release::Done::Unknown => self.forget(key, false)?,
            // Its id is in use by a new life.
            release::Done::Alive(_) => self.queue(key, Task::Begin),
            release::Done::Released(record, notes) => {
                let mut line = String::from("its init has ended: released");
                for note in notes {
                    line += &format!("; {note}");
                }
                report::say(Priority::Info, Some(&record.name), &line);
            }
        }
        Ok(())
    }
}
