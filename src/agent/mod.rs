//! The agent: one process per host that keeps running containers as they were asked for while links and addresses come
//! and go (upstream kernels: an endpoint is an address), and lets them go when their init has ended.
//!
//! It sleeps until the kernel says that something has changed, then reads everything that matters anew and compares: a
//! lost message costs nothing, and neither does being killed. It changes only what the ledger says is ours.

mod parent;
pub mod start;
mod watch;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::inotify::{AddWatchFlags, WatchDescriptor};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::apply::{self, Followed};
use crate::cli::Globals;
use crate::context::Context;
use crate::deadline::Deadline;
use crate::instance::{self, Instance, Process};
use crate::kernel::netlink::events::Events;
use crate::kernel::netns::{Namespace, Visit, in_initial_user_namespace};
use crate::kernel::sysctl;
use crate::ledger::record::{Conflict, ConflictOutcome, Record};
use crate::ledger::{self, AgentLock, Ledger, TEMPORARY};
use crate::release::{self, Cause};
use crate::report::{self, journal::Priority};
use crate::request::setting;
use crate::sys;
use watch::{Watch, Woken};

/// How long the agent stays when nobody needs it any more.
const LINGER: Duration = Duration::from_secs(60);
/// How long it waits for a lock. Others wait for it meanwhile.
const PATIENCE: Duration = Duration::from_millis(20);
/// How long a new address waits for its link and its way out. What gives an interface an address gives it those, too.
const GRACE: Duration = Duration::from_millis(50);
/// When the settings are looked at again: the runtime writes `linux.sysctl` after the hook.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// The first pause after something did not work; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// After how many tries it is said that something does not work.
const TRIES_MAX: u32 = 8;
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often processes are looked at where the kernel has no pidfd (before Linux 5.3).
const PROCESS_POLL: Duration = Duration::from_millis(20);

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
    /// A hook, as its child, in the engine's cgroups.
    Hook,
}

/// A container that is followed.
struct Container {
    instance: Instance,
    name: String,
    number: u64,
    /// None for one that a process of its own follows.
    events: Option<Events>,
    /// Its init, or the process that follows it; None where the kernel has no pidfd.
    process: Option<OwnedFd>,
    /// The process that follows it.
    worker: Option<Pid>,
    /// The list of those who share its namespace.
    members: WatchDescriptor,
    /// Since when an address waits for its link or its way out.
    waiting: Option<Instant>,
    /// Whether a killed hook was found at work on it, which is said once.
    interrupted: bool,
    /// The settings that are known to have drifted, with their values.
    drifted: BTreeMap<String, String>,
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

/// A task for later, and how often it was tried.
struct Later {
    when: Instant,
    key: String,
    task: Task,
    tries: u32,
}

/// Follows containers until nobody has needed it for a minute.
pub fn run(globals: &Globals, stance: Stance, mut lock: AgentLock, origin: Origin) -> Result<()> {
    let ledger = Ledger::create(&Context::state_dir(globals)?)?;
    raise_descriptor_limit();
    let mut way = parent::Way::default();
    loop {
        let mut agent = Agent::new(globals, &stance, ledger.clone(), way, origin)?;
        ledger.announce_agent(&lock)?;
        let ended = agent.run();
        way = agent.way;
        drop(agent);
        if let Ok(End::Move) = ended {
            if sys::fork().context("cannot fork")?.is_some() {
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
        if ledger.followed()?.is_empty() || matches!(stance, Stance::Inside(_)) {
            return Ok(());
        }
        match ledger.try_agent_lock(None)? {
            Some(again) => lock = again,
            None => return Ok(()),
        }
    }
}

/// Two descriptors for each container. Where the hard limit is low, it says so when it is reached.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// What becomes readable when a process ends; None where the kernel has no pidfd.
fn open_process(pid: u32) -> Result<Option<OwnedFd>> {
    match sys::pidfd_open(pid) {
        Ok(process) => Ok(Some(process)),
        Err(Errno::ENOSYS) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot wait for the end of process {pid}")),
    }
}

struct Agent<'a> {
    globals: &'a Globals,
    stance: &'a Stance,
    ledger: Ledger,
    boot_id: String,
    watch: Watch,
    /// The ledger's list of those who are to be followed.
    list: WatchDescriptor,
    containers: BTreeMap<String, Container>,
    numbers: BTreeMap<u64, String>,
    next_number: u64,
    tasks: VecDeque<(String, Task, u32)>,
    later: Vec<Later>,
    /// Since when nobody is followed.
    idle: Option<Instant>,
    /// The last complaint about the policy file.
    policy_error: Option<String>,
    /// How to keep out of the way of a parent that may wait for us.
    way: parent::Way,
    /// Whether it is still where the engine put the hook.
    in_hooks_cgroups: bool,
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
        let watch = Watch::new()?;
        let list = watch.directory(&ledger.follow_directory())?;
        Ok(Self {
            globals,
            stance,
            ledger,
            boot_id: instance::boot_id()?,
            watch,
            list,
            containers: BTreeMap::new(),
            numbers: BTreeMap::new(),
            next_number: 0,
            tasks: VecDeque::new(),
            later: Vec::new(),
            idle: Some(Instant::now()),
            policy_error: None,
            way,
            in_hooks_cgroups: origin == Origin::Hook,
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
                if self.way.due().is_none() && std::mem::take(&mut self.in_hooks_cgroups) {
                    start::leave_cgroups();
                }
            }
            for woken in self.watch.wait(self.timeout())? {
                match woken {
                    Woken::Ended(number) => self.ended(number),
                    Woken::Changed(number) => self.changed(number),
                    Woken::Ledger => self.ledger_changed()?,
                }
            }
            self.poll_processes();
            self.take_up_what_is_due();
            // One at a time: whoever ends meanwhile comes first.
            if let Some((key, task, tries)) = self.tasks.pop_front() {
                self.perform(&key, task, tries);
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
        let next =
            due.chain(end).chain(self.way.due()).min().map(|when| when.saturating_duration_since(Instant::now()));
        let polls = self.containers.values().any(|container| container.process.is_none());
        if polls { Some(next.map_or(PROCESS_POLL, |next| next.min(PROCESS_POLL))) } else { next }
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
            Stance::Home(_) | Stance::Apart(_) => true,
            Stance::Inside(own) => own == key,
        }
    }

    fn queue(&mut self, key: &str, task: Task) {
        if !self.tasks.iter().any(|(queued, what, _)| queued == key && *what == task) {
            self.tasks.push_back((key.into(), task, 0));
        }
    }

    fn queue_later(&mut self, key: &str, task: Task, pause: Duration, tries: u32) {
        self.later.push(Later { when: Instant::now() + pause, key: key.into(), task, tries });
    }

    fn take_up_what_is_due(&mut self) {
        let now = Instant::now();
        let mut position = 0;
        while position < self.later.len() {
            if self.later[position].when > now {
                position += 1;
                continue;
            }
            let Later { key, task, tries, .. } = self.later.swap_remove(position);
            if !self.tasks.iter().any(|(queued, what, _)| *queued == key && *what == task) {
                self.tasks.push_back((key, task, tries));
            }
        }
    }

    // --- what wakes it ----------------------------------------------------------------------------------------------

    /// Nothing of a dead container's namespace may be held: the sockets first, the ledger afterwards.
    fn ended(&mut self, number: u64) {
        let Some(key) = self.numbers.get(&number).cloned() else { return };
        let worker = self.containers.get(&key).and_then(|container| container.worker);
        self.drop_container(&key);
        self.container_ended();
        if let Some(worker) = worker {
            // It has released the container, or was killed.
            let _ = waitpid(worker, None);
            self.queue(&key, Task::Begin);
            return;
        }
        if let Stance::Inside(_) = self.stance {
            if let Err(error) = leave_namespace() {
                report::say(Priority::Warning, None, &format!("{error:#}"));
            }
        }
        self.tasks.push_front((key, Task::Release, 0));
    }

    fn changed(&mut self, number: u64) {
        let Some(key) = self.numbers.get(&number).cloned() else { return };
        let events = self.containers.get_mut(&key).and_then(|container| container.events.as_mut());
        if events.is_some_and(Events::drain) {
            self.queue(&key, Task::Look);
        }
    }

    fn ledger_changed(&mut self) -> Result<()> {
        for event in self.watch.ledger_events()? {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                // Something was lost: everything is looked at anew.
                self.read_list()?;
                for key in self.containers.keys().cloned().collect::<Vec<_>>() {
                    self.queue(&key, Task::Look);
                    self.queue(&key, Task::Settings);
                }
            } else if event.wd == self.list {
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
                let sharing = self.containers.iter().filter(|(_, container)| container.members == event.wd);
                for key in sharing.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
                    self.queue(&key, Task::Look);
                    self.queue(&key, Task::Settings);
                }
            }
        }
        Ok(())
    }

    fn read_list(&mut self) -> Result<()> {
        let list = self.ledger.followed()?;
        for key in self.containers.keys().filter(|key| !list.contains(key)).cloned().collect::<Vec<_>>() {
            self.drop_container(&key);
        }
        for key in list {
            if self.is_mine(&key) {
                self.queue(&key, Task::Begin);
            }
        }
        Ok(())
    }

    fn poll_processes(&mut self) {
        let ended = |container: &&Container| {
            container.process.is_none()
                && match container.worker {
                    Some(worker) => !Process::read(worker.as_raw() as u32).is_ok_and(|process| process.alive),
                    None => !container.instance.is_alive(&self.boot_id),
                }
        };
        let numbers: Vec<u64> = self.containers.values().filter(ended).map(|container| container.number).collect();
        for number in numbers {
            self.ended(number);
        }
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
        if !self.containers.values().any(|other| other.members == container.members) {
            self.watch.forget_directory(container.members);
        }
    }

    // --- what it does -----------------------------------------------------------------------------------------------

    fn perform(&mut self, key: &str, task: Task, tries: u32) {
        let done = match task {
            Task::Begin => self.begin(key),
            Task::Look => self.look(key),
            Task::Settings => self.look_at_settings(key),
            Task::Release => self.release(key),
        };
        self.go_home();
        let Err(error) = done else { return };
        let pause = (FIRST_PAUSE * 2_u32.pow(tries.min(TRIES_MAX))).min(LONGEST_PAUSE);
        if self.policy_error.is_some() {
            // That was said once, and nothing is forgotten over it.
            self.queue_later(key, task, LONGEST_PAUSE.min(pause), tries.min(TRIES_MAX - 1) + 1);
            return;
        }
        if tries != TRIES_MAX {
            self.queue_later(key, task, pause, tries + 1);
            return;
        }
        let name = self.containers.get(key).map_or(key, |container| &container.name);
        let attempt = match task {
            Task::Begin => "cannot be followed",
            Task::Look => "its interfaces could not be brought to what was asked for",
            Task::Settings => "its settings could not be looked at",
            Task::Release => "its init has ended, and it could not be let go (mptcp-hook release --stale tries again)",
        };
        report::say(Priority::Error, Some(name), &format!("{attempt}: {error:#}"));
        match task {
            // Nobody is to wait for it; status shows that it is not followed.
            Task::Begin => {
                let _ = self.ledger.unfollow(key);
            }
            // What it held holds others back.
            Task::Release => self.queue_later(key, task, pause, tries + 1),
            // The next event is the next try.
            Task::Look | Task::Settings => {}
        }
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
        match Context::new(self.globals) {
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
                // Released, or its hook has failed. Looked at again under its lock, which that hook may still hold.
                let names = [format!("container:{key}")];
                let locks = self.ledger.lock_by_name(&names, key, Deadline::after(PATIENCE))?;
                if self.ledger.record(key)?.is_none() {
                    self.ledger.unfollow(key)?;
                    locks.discard(&names[0])?;
                }
                return Ok(());
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
                self.queue_later(key, Task::Settings, SECOND_LOOK, 0);
            }
        }
        self.queue(key, Task::Look);
        Ok(())
    }

    fn open(&mut self, record: Record) -> Result<Container> {
        let Record { instance, name, .. } = record;
        let pid = instance.pid.context("it has no process")?;
        let process = open_process(pid)?;
        let mut visit = self.visit(&instance)?;
        if visit.id()? != instance.netns {
            bail!("process {pid} is in another network namespace by now");
        }
        let events = Events::open()?;
        drop(visit);
        let members = self.watch.directory(&self.ledger.members_directory(&instance.netns))?;
        let number = self.next_number;
        self.next_number += 1;
        if let Some(process) = &process {
            self.watch.process(number, process)?;
        }
        self.watch.changes(number, &events)?;
        // Whatever the pid stands for by now, the start time tells.
        if !instance.is_alive(&self.boot_id) {
            bail!("process {pid} has ended");
        }
        let events = Some(events);
        Ok(Container {
            instance,
            name,
            number,
            events,
            process,
            worker: None,
            members,
            waiting: None,
            interrupted: false,
            drifted: BTreeMap::new(),
        })
    }

    /// Starts the process that follows one container from inside. None if there is one that a hook has started: it is
    /// looked at again later.
    fn open_apart(&mut self, key: &str, record: Record) -> Result<Option<Container>> {
        let Record { instance, name, .. } = record;
        let Some(lock) = self.ledger.try_agent_lock(Some(key))? else {
            self.queue_later(key, Task::Begin, LINGER / 2, 0);
            return Ok(None);
        };
        let globals = Globals { state_dir: Some(self.ledger.directory().into()), ..self.globals.clone() };
        let Some(worker) = sys::fork().context("cannot fork")? else {
            let done = sys::close_all_but(lock.as_fd())
                .context("cannot let go of the agent's descriptors")
                .and_then(|()| self.enter(&instance))
                .and_then(|()| run(&globals, Stance::Inside(key.into()), lock, Origin::Command));
            if let Err(error) = &done {
                report::say(Priority::Error, Some(&name), &format!("it is not followed any more: {error:#}"));
            }
            std::process::exit(i32::from(done.is_err()));
        };
        lock.leave_to_child();
        let members = self.watch.directory(&self.ledger.members_directory(&instance.netns))?;
        let process = open_process(worker.as_raw() as u32)?;
        let number = self.next_number;
        self.next_number += 1;
        if let Some(process) = &process {
            self.watch.process(number, process)?;
        }
        let worker = Some(worker);
        Ok(Some(Container {
            instance,
            name,
            number,
            events: None,
            process,
            worker,
            members,
            waiting: None,
            interrupted: false,
            drifted: BTreeMap::new(),
        }))
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
        let Some(container) = self.containers.get(key).filter(|container| container.events.is_some()) else {
            return Ok(());
        };
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
                    if let Some(events) = &mut container.events {
                        events.hear_of_routes(wants_routes)?;
                    }
                }
                if let Some(since) = since {
                    self.queue_later(key, Task::Look, GRACE.saturating_sub(since.elapsed()), 0);
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
        let Some(container) = self.containers.get(key).filter(|container| container.events.is_some()) else {
            return Ok(());
        };
        let instance = container.instance.clone();
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
        let Some(container) = self.containers.get_mut(key) else { return Ok(()) };
        let mut conflicts = Vec::new();
        for (own, seen) in owned.iter().zip(&seen) {
            let Some(value) = seen.value() else { continue };
            if setting::same(&own.key, value, &own.value) {
                container.drifted.remove(&own.key.to_string());
            } else if container.drifted.insert(own.key.to_string(), value.into()).as_deref() != Some(value) {
                conflicts.push(Conflict {
                    time: ledger::now(),
                    container: instance.container.id.clone(),
                    key: own.key.to_string(),
                    wanted: own.value.clone(),
                    kept: value.into(),
                    holders: vec![instance.container.id.clone()],
                    outcome: ConflictOutcome::Drift,
                    reason: format!(
                        "{} was set to {} in the container's namespace and is {value} now; the runtime's linux.sysctl or somebody in the namespace changed it, and it is left so",
                        own.key, own.value
                    ),
                });
            }
        }
        // A restarted agent does not say it again.
        if !conflicts.is_empty() {
            let known = self.ledger.conflicts()?.items;
            conflicts.retain(|new| !known.iter().any(|old| Conflict { time: new.time, ..old.clone() } == *new));
        }
        self.ledger.record_conflicts(&conflicts)?;
        for conflict in &conflicts {
            report::say(Priority::Warning, Some(&record.name), &conflict.reason);
        }
        Ok(())
    }

    fn release(&mut self, key: &str) -> Result<()> {
        let Some(record) = self.ledger.record(key)? else { return self.ledger.unfollow(key) };
        let context = self.context()?;
        match release::release(&record.instance.container, &context, Cause::Stale)? {
            release::Done::Unknown => self.ledger.unfollow(key)?,
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
