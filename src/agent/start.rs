//! Making sure that an agent runs when a container needs one, without holding its start up.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::{Origin, Stance};
use crate::cli::Globals;
use crate::context::Context;
use crate::kernel::netns::in_initial_user_namespace;
use crate::ledger::record::Record;
use crate::ledger::{AgentLock, Following, Ledger};
use crate::request::Follow;
use crate::sys;

/// The unit that starts the agent under systemd when the list of containers to follow is not empty.
pub const UNIT: &str = "mptcp-hook-agent.path";

/// systemd is the init system if this is there (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";

/// Where `systemctl enable` puts its links.
const ENABLED: [&str; 2] = ["/etc/systemd", "/run/systemd"];

/// Nothing tells when a namespace that is only bound to a path is not needed any more.
const NO_PROCESS: &str = "only containers with a process can be followed";

/// Why nobody follows a container that needs it; None if somebody is about to.
pub fn why_not(ledger: &Ledger, record: &Record) -> Option<String> {
    if record.instance.pid.is_none() {
        return Some(NO_PROCESS.into());
    }
    match systemd_trouble(ledger.directory()) {
        Some(trouble) => trouble,
        None => Some("no agent runs; start mptcp-hook agent, or apply again".into()),
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
/// because the agent had to end for it.
pub fn make_sure_for_others(context: &Context, globals: &Globals) -> Result<()> {
    let Some(ledger) = Ledger::open(&context.state_dir)? else { return Ok(()) };
    let list = ledger.followed()?;
    if list.is_empty() || systemd_trouble(&context.state_dir).is_some() {
        return Ok(());
    }
    let followers = ledger.followers()?;
    if list.iter().all(|key| followers.contains(key)) {
        return Ok(());
    }
    match ledger.try_agent_lock(None)? {
        Some(lock) => start(lock, context, globals, Stance::home),
        None => Ok(()),
    }
}

fn begin(ledger: &Ledger, key: &str, position: Position, context: &Context, globals: &Globals) -> Result<Following> {
    ledger.follow(key)?;
    // Whoever has gone into the container's user namespace for good can follow this one alone.
    let only = (position == Position::Entered).then_some(key);
    let Some(lock) = ledger.try_agent_lock(only)? else { return Ok(Following::Yes) };
    if let Some(trouble) = systemd_trouble(&context.state_dir) {
        return Ok(trouble.map_or(Following::Yes, Following::No));
    }
    match position {
        Position::Outside => start(lock, context, globals, Stance::home),
        Position::Entered => start(lock, context, globals, || Ok(Stance::Inside(key.into()))),
        Position::StartedInside => {
            let reason = "no agent runs, and a createContainer hook cannot start one; start mptcp-hook agent";
            return Ok(Following::No(reason.into()));
        }
    }?;
    Ok(Following::Yes)
}

/// Under systemd the unit starts the agent, and nobody else: None where systemd is not the init system, else why the
/// unit will not.
fn systemd_trouble(state_dir: &Path) -> Option<Option<String>> {
    if !Path::new(SYSTEMD).is_dir() {
        return None;
    }
    let is_host_root = in_initial_user_namespace() && nix::unistd::geteuid().is_root();
    let (scope, units, command) = match is_host_root {
        true => ("system", "hooks/systemd", "systemctl"),
        false => ("user", "hooks/systemd/user", "systemctl --user"),
    };
    if is_host_root && state_dir != Path::new("/run/mptcp-hook") {
        return Some(Some(format!(
            "no agent runs, and {UNIT} watches /run/mptcp-hook alone; start mptcp-hook agent --state-dir {}",
            state_dir.display()
        )));
    }
    let wanted = |directory: PathBuf| {
        let entries = std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
        entries.map(|entry| entry.path().join(UNIT)).any(|link| link.symlink_metadata().is_ok())
    };
    if ENABLED.iter().any(|directory| wanted(Path::new(directory).join(scope))) {
        return Some(None);
    }
    Some(Some(format!(
        "no agent runs: {UNIT} is not enabled ({command} enable --now {UNIT}; make install puts it in place, or copy {units} to /etc/systemd/{scope})"
    )))
}

/// Forks the agent. It is out of the engine's reach: in a session of its own, with nothing of the caller's open, and
/// out of the cgroups of the container and the runtime where it may leave them.
fn start(lock: AgentLock, context: &Context, globals: &Globals, stance: impl FnOnce() -> Result<Stance>) -> Result<()> {
    // What has to be read or opened from outside, and what is derived from who we are.
    let config = globals.config.as_ref().map(std::path::absolute).transpose().context("cannot tell where we are")?;
    let globals = Globals { config, state_dir: Some(context.state_dir.clone()) };
    if sys::fork().context("cannot fork")?.is_some() {
        lock.leave_to_child();
        return Ok(());
    }
    let done = detach().and_then(|()| super::run(&globals, stance()?, lock, Origin::Hook));
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
