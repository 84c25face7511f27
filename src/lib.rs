//! `mptcp-hook` sets containers up for Multipath TCP: a hook for LXC and OCI runtimes, and a command for people.
//!
//! Data flows one way through these modules, in this order:
//!
//! | module | what it answers |
//! |---|---|
//! | [`cli`] | which verb, with which words? |
//! | [`front`] | who calls (OCI runtime, LXC, a person), on which container? |
//! | [`request`] | what is asked for, and by whom? |
//! | [`policy`] | may it? |
//! | [`plan`] | what is there to do? (pure) |
//! | [`kernel`] | do it in the container's network namespace, read it back |
//! | [`ledger`] | remember it |
//! | [`report`] | say it |
//!
//! The verbs [`apply`], [`release`], [`status`] and [`repair`] take data through them, and the [`agent`] takes it there again
//! when links and addresses change. [`doctor`] looks for what is wrong, [`capture`] shows packets; both change nothing.
//! [`instance`] tells one life of a container from another, [`context`] holds what a
//! run needs to know about itself.

pub mod agent;
pub mod apply;
pub mod capture;
pub mod cli;
pub mod context;
pub mod deadline;
pub mod doctor;
pub mod error;
pub mod front;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod instance;
pub mod kernel;
pub mod ledger;
pub mod plan;
pub mod policy;
pub mod privileges;
pub mod release;
pub mod repair;
pub mod report;
pub mod request;
pub mod status;
mod sys;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use agent::start::Position;
use cli::{Action, Globals, Verb};
use context::Context;
use deadline::Deadline;
use front::{Apply, Call, command, lxc, oci};
use kernel::Kind;
use kernel::netns::own_user_namespace;
use ledger::record::Failure;
use ledger::{Following, Ledger};
use policy::OnError;
use privileges::Work;
use report::journal::Priority;

/// How long standard input is waited for, before the policy (and with it the deadline) is read.
const STDIN_PATIENCE: Duration = Duration::from_secs(5);

/// How often `status --watch` looks.
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// Runs one command line and reports. The exit status: 0 done, 1 failed and undone, 2 wrong usage, 3 refused.
///
/// This is the whole program: call it before anything else, in a process of its own. It closes every descriptor beyond
/// standard input, output and error, forgets the environment and gives up all capabilities.
pub fn run(arguments: Vec<OsString>) -> ExitCode {
    let start = Instant::now();
    let verb = cli::peek(&arguments);
    // Only LXC speaks through the environment. Gone is gone: no library reads it behind our back either.
    let variables = if verb == Some(Verb::Lxc) { lxc::Variables::take() } else { lxc::Variables::default() };
    sys::clear_environment();
    sys::survive_file_size_limit();
    let begun = begin(if verb == Some(Verb::Capture) { Work::Capture } else { Work::SetUp });
    // Whatever else is wrong, the runtime must be able to write the state to the end.
    let stdin = (verb == Some(Verb::Oci)).then(|| oci::drain_stdin(Deadline::since(start, STDIN_PATIENCE)));
    let mut run = Run { start, container: None, may_continue: false, hook_state_dir: None };
    match run.verb(arguments, stdin, &variables, begun) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<error::Found>() => ExitCode::FAILURE,
        Err(error) => run.failed(&error),
    }
}

/// Shows the ledger in place until the reader goes away.
fn watch_status(globals: &Globals, name: Option<&str>) -> Result<()> {
    loop {
        let status = status::status(&Context::new(globals, Instant::now())?, name)?;
        if !report::terminal::print_in_place(&report::text::status(&status)) {
            return Ok(());
        }
        std::thread::sleep(WATCH_PAUSE);
    }
}

/// At a container's end, whatever comes of that: the agent may have ended for it. The others' following must not make this
/// end fail; status shows that nobody follows them.
fn follow_others(globals: &Globals) {
    let _ = agent::start::make_sure_for_others(globals);
}

/// Lets go of what the caller gave and the work does not need, before any input is read.
fn begin(work: Work) -> Result<()> {
    sys::close_inherited_descriptors().context("cannot close the descriptors that the caller left open")?;
    privileges::begin(work)
}

/// What is known about the run when it ends.
struct Run {
    /// When it began.
    start: Instant,
    /// The container's id, once it is known.
    container: Option<String>,
    /// Whether a hook's failure may let the container start.
    may_continue: bool,
    /// The ledger's place, if this is a hook: nobody may read what a hook prints.
    hook_state_dir: Option<PathBuf>,
}

impl Run {
    fn verb(
        &mut self,
        arguments: Vec<OsString>,
        stdin: Option<Result<Vec<u8>>>,
        variables: &lxc::Variables,
        begun: Result<()>,
    ) -> Result<()> {
        // The container's name first: whatever is wrong then, the message has it.
        let state = stdin.map(|text| text.and_then(|text| oci::parse(&text)));
        self.container = match &state {
            Some(state) => state.as_ref().ok().map(|state| state.id().into()),
            None => variables.name(),
        };
        let (globals, action) = cli::parse(arguments)?;
        if let Action::Print(text) = action {
            report::print(&text);
            return Ok(());
        }
        begun?;
        match action {
            Action::Print(_) => Ok(()),
            Action::Oci(wishes) => {
                let state = state.unwrap_or_else(|| oci::parse(&[]));
                let has_stopped = state.as_ref().is_ok_and(oci::Checked::has_stopped);
                let context = self.hook_context(&globals).inspect_err(|_| {
                    if has_stopped {
                        follow_others(&globals);
                    }
                })?;
                let state = state?;
                let call = state.into_call(wishes, &context.policy, &context.containers)?;
                self.hook(call, &context, &globals)
            }
            Action::Lxc(wishes, words) => {
                let context = self.hook_context(&globals)?;
                let environment = lxc::Environment::read(variables, &words)?;
                self.container = Some(environment.name().into());
                let call = environment.into_call(wishes, &context.policy, &context.containers)?;
                self.hook(call, &context, &globals)
            }
            Action::Apply { target, wishes, dry_run, json } => {
                let context = Context::new(&globals, self.start)?;
                let ledger = Ledger::open(&context.state_dir)?;
                let call = command::apply(&target, wishes, &context.policy, &context.containers, ledger.as_ref())?;
                self.container = Some(call.container.id.clone());
                self.apply(call, &context, &globals, dry_run, json)
            }
            Action::Release(target) => {
                let context = Context::new(&globals, self.start)?;
                let ledger = Ledger::open(&context.state_dir)?;
                let container = command::release(&target, ledger.as_ref())?;
                self.container = Some(container.id.clone());
                let done = release::release(&container, &context, release::Cause::Person)?;
                self.released(done)
            }
            Action::ReleaseStale => self.release_stale(&Context::new(&globals, self.start)?),
            Action::Repair => self.repair(&Context::new(&globals, self.start)?),
            Action::Agent { wait } => self.agent(&globals, wait),
            Action::Doctor { target, probe, json } => {
                let diagnosis = doctor::doctor(target.as_ref(), probe, &Context::new(&globals, self.start)?, &globals)?;
                privileges::end()?;
                report::print(&if json { report::json::doctor(&diagnosis)? } else { report::text::doctor(&diagnosis) });
                match diagnosis.count(doctor::finding::Severity::Problem) {
                    0 => Ok(()),
                    _ => Err(error::Found.into()),
                }
            }
            Action::Capture(asked) => capture::run(&asked, &Context::state_dir(&globals)?),
            Action::Status { name, watch: true, .. } => watch_status(&globals, name.as_deref()),
            Action::Status { name, json, .. } => {
                let status = status::status(&Context::new(&globals, self.start)?, name.as_deref())?;
                privileges::end()?;
                report::print(&if json { report::json::status(&status)? } else { report::text::status(&status) });
                // The process ends here: to free ten thousand containers one by one would take as long as to list them.
                std::mem::forget(status);
                Ok(())
            }
        }
    }

    fn hook_context(&mut self, globals: &Globals) -> Result<Context> {
        let context = Context::new(globals, self.start)?;
        self.may_continue = context.policy.on_error == OnError::Continue;
        self.hook_state_dir = Some(context.state_dir.clone());
        Ok(context)
    }

    fn hook(&mut self, call: Call, context: &Context, globals: &Globals) -> Result<()> {
        match call {
            Call::Apply(call) => self.apply(*call, context, globals, false, false),
            Call::Release(container) => {
                let done = release::release(&container, context, release::Cause::Hook);
                follow_others(globals);
                self.released(done?)
            }
        }
    }

    fn apply(&mut self, call: Apply, context: &Context, globals: &Globals, dry_run: bool, json: bool) -> Result<()> {
        let by_hand = call.container.door == instance::Door::Command;
        let notes = call.notes.clone();
        let starts_inside = matches!(call.place, front::Place::Inside(_));
        let user_namespace = own_user_namespace();
        let done = apply::apply(call, context, dry_run)?;
        let position = match starts_inside {
            true => Position::StartedInside,
            false if own_user_namespace() != user_namespace => Position::Entered,
            false => Position::Outside,
        };
        // Forked, the agent has the capabilities that are given up next.
        let following = match &done {
            apply::Done::Applied(record, _) => agent::start::make_sure(record, position, context, globals),
            _ => Following::NotNeeded,
        };
        privileges::end()?;
        match done {
            apply::Done::Nothing(reason) => {
                // Every container's start comes here: nothing is said unless there is something to say.
                let mut words = notes;
                words.extend(reason);
                if words.is_empty() && by_hand {
                    words.push("nothing is asked for; see mptcp-hook apply --help".into());
                }
                if !words.is_empty() {
                    self.say(Priority::Info, &words.join("; "));
                }
            }
            apply::Done::Planned(request, plan) => {
                report::print(&if json {
                    serde_json::to_string(&plan.shown(&request))? + "\n"
                } else {
                    report::text::plan(&request, &plan)
                });
                if let Some(reason) = plan.refusal() {
                    return Err(error::refused(format!("it would be refused: {reason}")));
                }
            }
            apply::Done::Applied(record, changed) => {
                let priority = if record.warnings.is_empty() { Priority::Info } else { Priority::Warning };
                self.say(priority, &report::text::applied(&record, changed, &following));
                if json {
                    report::print(&(serde_json::to_string(&record)? + "\n"));
                }
            }
        }
        Ok(())
    }

    fn released(&mut self, done: release::Done) -> Result<()> {
        privileges::end()?;
        self.say_released(&done);
        Ok(())
    }

    fn release_stale(&mut self, context: &Context) -> Result<()> {
        let mut failed = 0;
        let all = release::stale(context)?;
        privileges::end()?;
        if all.is_empty() {
            self.say(Priority::Info, "no dead container is in the ledger");
        }
        for done in all {
            match done {
                Ok(done) => {
                    if let release::Done::Released(record, _) | release::Done::Alive(record) = &done {
                        self.container = Some(record.instance.container.id.clone());
                    }
                    self.say_released(&done);
                }
                Err(error) => {
                    failed += 1;
                    self.container = None;
                    self.say(Priority::Error, &format!("{error:#}"));
                }
            }
        }
        self.container = None;
        if failed > 0 { Err(anyhow::anyhow!("{failed} could not be released")) } else { Ok(()) }
    }

    fn repair(&mut self, context: &Context) -> Result<()> {
        let repaired = repair::repair(context)?;
        privileges::end()?;
        for line in &repaired.lines {
            self.say(Priority::Warning, line);
        }
        for failure in &repaired.failures {
            self.say(Priority::Error, failure);
        }
        match repaired.failures.len() {
            0 => {
                self.say(Priority::Info, &repaired.summary());
                Ok(())
            }
            failed => Err(anyhow::anyhow!("{failed} could not be repaired; the rest of the ledger is in order")),
        }
    }

    fn agent(&self, globals: &Globals, wait: bool) -> Result<()> {
        let ledger = Ledger::create(&Context::state_dir(globals)?)?;
        // Those of an earlier boot, on another kernel, it lets go.
        if Kind::detect() == Kind::None && ledger.followed()?.is_empty() {
            bail!("there is nobody to follow: {}", kernel::without_mptcp());
        }
        let lock = match ledger.try_agent_lock(None)? {
            Some(lock) => lock,
            None => {
                let pid = ledger.agent().map_or("unknown".into(), |agent| agent.pid.to_string());
                let then = if wait { "; its end is waited for" } else { "" };
                self.say(Priority::Info, &format!("an agent runs already (pid {pid}){then}"));
                if !wait {
                    return Ok(());
                }
                ledger.wait_for_agent_lock()?
            }
        };
        agent::run(globals, agent::Stance::home()?, lock, agent::Origin::Command)
    }

    fn say_released(&self, done: &release::Done) {
        match done {
            release::Done::Unknown => {}
            release::Done::Alive(record) => {
                let pid = record.instance.pid.map_or("unknown".into(), |pid| pid.to_string());
                let message =
                    format!("its id is in use by a container that is alive (pid {pid}): nothing was released");
                self.say(Priority::Info, &message);
            }
            release::Done::Released(_, notes) if notes.is_empty() => self.say(Priority::Info, "released"),
            release::Done::Released(_, notes) => {
                self.say(Priority::Warning, &format!("released; {}", notes.join("; ")))
            }
        }
    }

    fn say(&self, priority: Priority, message: &str) {
        report::say(priority, self.container.as_deref(), message);
    }

    /// Enters a hook's failure into the ledger, if there is one; a ledger that failed cannot remember it.
    fn remember_failure(&self, status: u8, reason: &str) {
        let (Some(directory), Some(container)) = (&self.hook_state_dir, &self.container) else { return };
        if let Ok(Some(ledger)) = Ledger::open(directory) {
            let failure = Failure { time: ledger::now(), container: container.clone(), status, reason: reason.into() };
            let _ = ledger.record_failure(&failure);
        }
    }

    /// Reports an error and gives the exit status.
    fn failed(&self, error: &anyhow::Error) -> ExitCode {
        let status = error::exit_status(error);
        let mut message = format!("{error:#}");
        // Before the ledger hears of it, too: that one's files are our own.
        if let Err(error) = privileges::end() {
            message += &format!("; {error:#}");
        }
        let continues = status == 1 && self.may_continue;
        if status != 3 {
            // A refusal is among the conflicts already.
            self.remember_failure(if continues { 0 } else { status }, &message);
        }
        if continues {
            let message = format!("{message}; the container starts without (on-error = \"continue\")");
            self.say(Priority::Warning, &message);
            return ExitCode::SUCCESS;
        }
        let message = if status == 3 { format!("refused: {message}") } else { message };
        self.say(Priority::Error, &message);
        ExitCode::from(status)
    }
}
