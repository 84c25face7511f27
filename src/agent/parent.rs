//! Keeping out of the way of a parent that waits for all of its children. The hook that forks the agent ends at once, and
//! the agent goes to the nearest subreaper (prctl(2), PR_SET_CHILD_SUBREAPER) above it, which may be a program of the
//! engine that ends only when its last child has ended:
//!
//! - conmon is none any more once its container has ended: a child that the agent makes then belongs to somebody else.
//! - `crun run` in the foreground stays one: the agent has to end, and at once. The poststop hook that crun runs next starts
//!   another agent if other containers need it, and crun does not wait for that one.

use std::time::{Duration, Instant};

use super::End;
use crate::instance::parent_of;
use crate::kernel::sysctl::read_text;

/// How long after the end of a container conmon is where it waits; it doubles with each try, each of which costs a new
/// process that reads everything anew. Mostly the first one is enough.
const CONMON_PAUSE: Duration = Duration::from_millis(2);
/// The same for crun, which is only looked at. It reaps the container's init at once.
const CRUN_PAUSE: Duration = Duration::from_millis(1);
/// How long the agent stays in the cgroups of a `crun run` in the foreground. To leave them takes the kernel an RCU grace
/// period, 10-25 ms in which the agent cannot end and crun, if its container ends then, waits for it.
pub const CRUN_CGROUPS: Duration = Duration::from_secs(1);
/// For how long in all it is tried.
const LONGEST_PAUSE: Duration = Duration::from_secs(6);

/// Whether the parent may wait, and when to look at it.
#[derive(Clone, Copy, Default)]
pub struct Way {
    due: Option<Instant>,
    tries: u32,
}

impl Way {
    /// A container has ended, and its engine with it.
    pub fn container_ended(&mut self) {
        self.tries = 0;
        self.look_later();
    }

    /// When the parent is to be looked at.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// How to get out of the parent's way, if that has to be now.
    pub fn clear(&mut self) -> Option<End> {
        self.due.filter(|due| *due <= Instant::now())?;
        self.tries += 1;
        self.look_later();
        let parent = nix::unistd::getppid().as_raw();
        match parent_name().as_deref() {
            Some("conmon") => Some(End::Move),
            Some("crun") if is_only_child_of(parent) => Some(End::Leave),
            _ => None,
        }
    }

    fn look_later(&mut self) {
        let first = match parent_name().as_deref() {
            Some("conmon") => Some(CONMON_PAUSE),
            Some("crun") => Some(CRUN_PAUSE),
            _ => None,
        };
        let pause = first.map(|first| first * 2_u32.pow(self.tries)).filter(|pause| *pause < LONGEST_PAUSE);
        self.due = pause.map(|pause| Instant::now() + pause);
    }
}

/// How long the agent stays in the cgroups of the hook that has started it.
pub fn time_in_hooks_cgroups() -> Duration {
    match parent_name().as_deref() {
        Some("crun") => CRUN_CGROUPS,
        _ => Duration::ZERO,
    }
}

/// Whether crun may wait for the end of this process, now or when the hook that has forked it has ended.
pub fn may_wait() -> bool {
    let mut pid = u32::try_from(nix::unistd::getppid().as_raw()).ok();
    while let Some(process) = pid.filter(|pid| *pid > 1) {
        if name_of(process).as_deref() == Some("crun") {
            return true;
        }
        pid = parent_of(&process.to_string());
    }
    false
}

fn parent_name() -> Option<String> {
    name_of(nix::unistd::getppid())
}

fn name_of(pid: impl std::fmt::Display) -> Option<String> {
    read_text(&format!("/proc/{pid}/comm"))
}

/// Whether a process has no child but us. Where the kernel does not list them (CONFIG_PROC_CHILDREN), it may be so.
fn is_only_child_of(parent: i32) -> bool {
    let own = std::process::id().to_string();
    let children = read_text(&format!("/proc/{parent}/task/{parent}/children"));
    children.is_none_or(|children| children.split_whitespace().all(|child| child == own))
}
