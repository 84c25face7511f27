//! Making sure that an agent runs when a container needs one, without holding its start up.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Origin, Stance};
use crate::cli::Globals;
use crate::context::Context;
use crate::kernel::netns::in_initial_user_namespace;
use crate::ledger::record::Record;
use crate::ledger::{AgentLock, Following, Ledger};
use crate::request::Follow;

/// The unit that starts the agent under systemd when the list of containers to follow is not empty.
pub const UNIT: &str = "mptcp-hook-agent.path";

/// What it starts.
const SERVICE: &str = "mptcp-hook-agent.service";

/// systemd is the init system if this is there (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";

/// Where `systemctl enable` puts its links for all.
const ENABLED: [&str; 2] = ["/etc/systemd", "/run/systemd"];

/// How long a hook waits before it looks again what becomes of a lock that is held and no agent has yet announced itself by.
const LOCK_PAUSE: Duration = Duration::from_millis(1);

/// Nothing tells when a namespace that is only bound to a path is not needed any more.
const NO_PROCESS: &str = "only containers with a process can be followed";

/// Why nobody follows a container that needs it; `starter` is the one for the ledger's directory.
pub fn why_not(ledger: &Ledger, record: &Record, starter: &Starter) -> String {
    if record.instance.pid.is_none() {
        return NO_PROCESS.into();
    }
    if !ledger.is_followed(&record.instance.container.key()) {
        return "it is not on the agent's list (the hook was killed, or could not write there); mptcp-hook apply puts it there".into();
    }
    match starter {
        Starter::Hook => "no agent runs; start mptcp-hook agent, or apply again".into(),
        Starter::Unit(systemctl) => format!(
            "no agent runs although {UNIT} is enabled, which starts one unless it is stopped ({systemctl} start {UNIT}) or the agent fails ({systemctl} status {SERVICE})"
        ),
        Starter::Nobody(why) => why.clone(),
    }
}

/// Where the process is that has set a container up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Where it was started.
    Outside,
    /// In the container's user and network namespace for good (an unprivileged user's container).
    Entered,
    /// It was started inside the container's namespaces (createContainer).
    StartedInside,
}

/// Has a container that was set up looked after, if it needs that.
pub fn make_sure(record: &Record, position: Position, context: &Context, globals: &Globals) -> Following {
    let Ok(Some(ledger)) = Ledger::open(&context.state_dir) else { return Following::NotNeeded };
    let key = record.instance.container.key();
    if !record.needs_agent() {
        if record.request.follow() == Follow::Never {
            // What an earlier apply asked for. If it cannot be taken back, the agent goes on, which harms nobody.
            let _ = ledger.unfollow(&key);
            return Following::No("follow=never".into());
        }
        return Following::NotNeeded;
    }
    if record.instance.pid.is_none() {
        return Following::No(NO_PROCESS.into());
    }
    match begin(&ledger, &key, position, context, globals) {
        Ok(following) => following,
        Err(error) => Following::No(format!("no agent could be started: {error:#}")),
    }
}

/// Starts another agent if containers are to be followed and none runs: one of them has just been released, perhaps
/// because the agent had to end for it. No policy is needed for that: whatever is wrong with it, an agent waits for its end.
pub fn make_sure_for_others(globals: &Globals) -> Result<()> {
    let Some(ledger) = Ledger::open(&Context::state_dir(globals)?)? else { return Ok(()) };
    let list = ledger.followed_from_here()?;
    if list.is_empty() || !matches!(Starter::of(ledger.directory()), Starter::Hook) {
        return Ok(());
    }
    let followers = ledger.followers()?;
    if list.iter().all(|key| followers.contains(key)) {
        return Ok(());
    }
    match ledger.try_agent_lock(None)? {
        Some(lock) => start(lock, &ledger, globals, Stance::home),
        None => Ok(()),
    }
}

fn begin(ledger: &Ledger, key: &str, position: Position, context: &Context, globals: &Globals) -> Result<Following> {
    ledger.follow(key)?;
    // Perhaps by one outside of this user namespace, which looks into it, too.
    if ledger.has_any_follower(key)? {
        return Ok(Following::Yes);
    }
    match Starter::of(&context.state_dir) {
        Starter::Hook => {}
        Starter::Unit(_) => return Ok(Following::Yes),
        Starter::Nobody(why) => return Ok(Following::No(why)),
    }
    if position == Position::StartedInside {
        let reason = "no agent runs, and a createContainer hook cannot start one; start mptcp-hook agent";
        return Ok(Following::No(reason.into()));
    }
    // Whoever has gone into the container's user namespace for good can follow this one alone.
    let only = (position == Position::Entered).then_some(key);
    let lock = loop {
        if let Some(lock) = ledger.try_agent_lock(only)? {
            break lock;
        }
        // An agent that is about to say that it runs, or one that has just ended.
        if ledger.has_any_follower(key)? {
            return Ok(Following::Yes);
        }
        if context.deadline.over() {
            return Ok(Following::No(format!(
                "no agent runs, and none can be started while another process holds the lock {} (fuser -v shows it)",
                ledger.agent_lock_file(only).display()
            )));
        }
        std::thread::sleep(LOCK_PAUSE);
    };
    start(lock, ledger, globals, || only.map_or_else(Stance::home, |key| Ok(Stance::Inside(key.into()))))?;
    Ok(Following::Yes)
}

/// Who starts an agent if none runs.
pub enum Starter {
    /// The hook.
    Hook,
    /// The unit, which is this command's to look at.
    Unit(&'static str),
    /// Nobody, and why.
    Nobody(String),
}

impl Starter {
    /// Under systemd it is the unit, and nobody else.
    pub fn of(state_dir: &Path) -> Self {
        if !Path::new(SYSTEMD).is_dir() {
            return Self::Hook;
        }
        let is_host_root = in_initial_user_namespace() && nix::unistd::geteuid().is_root();
        let uid = user_of(state_dir);
        let (scope, systemctl, watched) = match is_host_root {
            true => ("system", "systemctl", (state_dir == Path::new("/run/mptcp-hook")).then_some(None)),
            false => ("user", "systemctl --user", uid.map(Some)),
        };
        let Some(uid) = watched else {
            let usual = if is_host_root { "/run/mptcp-hook" } else { "/run/user/UID/mptcp-hook" };
            return Self::Nobody(format!(
                "no agent runs, and {UNIT} watches {usual} alone; start mptcp-hook agent --state-dir {}",
                state_dir.display()
            ));
        };
        let mut places = ENABLED.map(PathBuf::from).to_vec();
        let home = uid.and_then(home_of);
        places.extend(uid.map(|uid| format!("/run/user/{uid}/systemd").into()));
        places.extend(home.iter().map(|home| home.join(".config/systemd")));
        let wanted = |directory: PathBuf| {
            let entries = std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
            entries.map(|entry| entry.path().join(UNIT)).any(|link| link.symlink_metadata().is_ok())
        };
        if places.iter().any(|place| wanted(place.join(scope))) {
            return Self::Unit(systemctl);
        }
        let (is_it, units, more) = match (uid, home) {
            (None, _) => ("is not enabled".into(), "hooks/systemd", ""),
            (Some(_), Some(_)) => {
                ("is not enabled".into(), "hooks/systemd/user", "; for all users: systemctl --global enable")
            }
            // Whoever is not there keeps what he has enabled nobody knows where.
            (Some(uid), None) => (
                format!(
                    "is not enabled for all users (systemctl --global enable {UNIT}), and uid {uid}, who may have enabled it alone, is not in /etc/passwd"
                ),
                "hooks/systemd/user",
                "",
            ),
        };
        Self::Nobody(format!(
            "no agent runs: {UNIT} {is_it} ({systemctl} enable --now {UNIT}{more}; make install puts it in place, or copy {units} to /etc/systemd/{scope})"
        ))
    }
}

/// Whose the usual state directory of a user is.
fn user_of(state_dir: &Path) -> Option<u32> {
    state_dir.strip_prefix("/run/user").ok()?.to_str()?.strip_suffix("/mptcp-hook")?.parse().ok()
}

/// A user's home, where `systemctl --user enable` puts its links. No environment is believed, and what is not in the
/// file (LDAP) would take a library's plugins.
fn home_of(uid: u32) -> Option<PathBuf> {
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    // passwd(5): name:password:UID:GID:GECOS:directory:shell
    let mut fields = users.lines().map(|line| line.split(':').skip(2));
    fields.find_map(|mut fields| (fields.next()?.parse() == Ok(uid)).then(|| fields.nth(2).map(PathBuf::from))?)
}

/// Forks the agent. It is out of the engine's reach: in a session of its own, with nothing of the caller's open, and
/// out of the cgroups of the container and the runtime where it may leave them.
fn start(lock: AgentLock, ledger: &Ledger, globals: &Globals, stance: impl FnOnce() -> Result<Stance>) -> Result<()> {
    // What has to be read or opened from outside, and what is derived from who we are.
    let config = globals.config.as_ref().map(std::path::absolute).transpose().context("cannot tell where we are")?;
    let globals = Globals { config, state_dir: Some(ledger.directory().into()) };
    let hook = nix::unistd::getpid();
    if !super::fork(ledger, &lock)? {
        return lock.leave_to_child();
    }
    let done = detach().and_then(|()| super::run(&globals, stance()?, lock, Origin::Hook(hook)));
    if let Err(error) = &done {
        crate::report::say(crate::report::journal::Priority::Error, None, &format!("the agent ends: {error:#}"));
    }
    // Nothing of the hook's goes on here.
    std::process::exit(i32::from(done.is_err()));
}

fn detach() -> Result<()> {
    nix::unistd::setsid().context("cannot begin a session")?;
    nix::unistd::chdir("/").context("cannot leave the working directory")?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
    nix::unistd::dup2_stdin(&null).context("cannot let go of standard input")?;
    nix::unistd::dup2_stdout(&null).context("cannot let go of standard output")?;
    nix::unistd::dup2_stderr(&null).context("cannot let go of standard error")?;
    nix::sys::prctl::set_name(c"mptcp-agent").context("cannot name the process")?;
    Ok(())
}

/// Goes to the root of each hierarchy: an engine ends what it finds in its container's cgroup. Where that is not
/// allowed (a user's), the agent stays where it is.
pub(super) fn leave_cgroups() {
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo") else { return };
    for line in mounts.lines() {
        // proc(5): ... root mount-point options... - type source options
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let is_cgroup = ["cgroup ", "cgroup2 "].iter().any(|kind| right.starts_with(kind));
        let Some(point) = left.split(' ').nth(4).filter(|_| is_cgroup) else { continue };
        if let Ok(mut file) = OpenOptions::new().write(true).open(Path::new(point).join("cgroup.procs")) {
            let _ = file.write_all(b"0");
        }
    }
}
