//! Programs that are killed at a chosen system call, by ptrace(2).
#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::enter::Namespaces;
use super::sandbox::Sandbox;

/// The way into a sandbox, also for programs that are traced.
pub struct Launcher(Namespaces);

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit status; none after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// How a traced program ended.
#[derive(Debug)]
pub struct Traced {
    /// How often it stopped: at the entry and at the exit of each system call after its execve.
    pub stops: usize,
    /// Where it was killed: the line of `/proc/PID/syscall`, the call's number first. None if it came to its end.
    pub killed_at: Option<String>,
    /// How it ended.
    pub ended: Ended,
}

impl Launcher {
    /// Into `sandbox`, which it may outlive.
    pub fn new(sandbox: &Sandbox) -> Self {
        Self(sandbox.namespaces())
    }

    /// Starts a program in the sandbox, in the network namespace `netns` if there is one.
    pub fn spawn(&self, mut command: Command, netns: Option<&File>, traced: bool) -> Child {
        if traced {
            // SAFETY: nothing but a system call.
            unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
        }
        let child = self.0.start(&mut command, netns);
        child.unwrap_or_else(|e| panic!("starting {command:?} in the sandbox: {e}"))
    }

    /// Runs a program to its end.
    pub fn run(&self, mut command: Command) -> Ended {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.spawn(command, None, false).wait_with_output().expect("waiting for a program");
        Ended::new(Some(output.status), &output.stdout, &output.stderr)
    }

    /// Runs a program stop by stop and ends it with SIGKILL at the stop number `kill_at`, counted from 0. A program that
    /// starts threads or other processes is not followed: that is a panic.
    pub fn trace(&self, mut command: Command, kill_at: Option<usize>) -> Traced {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut tracee = Tracee(self.spawn(command, None, true), false);
        let pid = tracee.pid();
        // The stop after execve.
        assert_eq!(tracee.wait(), WaitStatus::Stopped(pid, Signal::SIGTRAP));
        let options = ptrace::Options::PTRACE_O_TRACESYSGOOD
            | ptrace::Options::PTRACE_O_EXITKILL
            | ptrace::Options::PTRACE_O_TRACECLONE
            | ptrace::Options::PTRACE_O_TRACEFORK
            | ptrace::Options::PTRACE_O_TRACEVFORK
            | ptrace::Options::PTRACE_O_TRACEEXEC;
        ptrace::setoptions(pid, options).expect("the options of ptrace");
        let mut stops = 0;
        let mut killed_at = None;
        let mut signal = None;
        let status = loop {
            ptrace::syscall(pid, signal.take()).expect("resuming a traced program");
            match tracee.wait() {
                WaitStatus::PtraceSyscall(_) => {
                    if kill_at == Some(stops) {
                        let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
                        killed_at = Some(call.trim().to_owned());
                        kill(pid, Signal::SIGKILL).expect("killing a traced program");
                        break tracee.wait();
                    }
                    stops += 1;
                }
                WaitStatus::Stopped(_, other) => signal = Some(other),
                end @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => break end,
                other => panic!("the traced program is to have one thread and no children: {other:?}"),
            }
        };
        let code = match status {
            WaitStatus::Exited(_, code) => Some(code),
            WaitStatus::Signaled(_, Signal::SIGKILL, _) if killed_at.is_some() => None,
            other => panic!("the traced program ended otherwise than expected: {other:?}"),
        };
        let mut texts = [Vec::new(), Vec::new()];
        let child = &mut tracee.0;
        child.stdout.take().expect("stdout is a pipe").read_to_end(&mut texts[0]).expect("reading a program's output");
        child.stderr.take().expect("stderr is a pipe").read_to_end(&mut texts[1]).expect("reading a program's output");
        Traced { stops, killed_at, ended: Ended { code, ..Ended::new(None, &texts[0], &texts[1]) } }
    }
}

impl Ended {
    fn new(status: Option<ExitStatus>, stdout: &[u8], stderr: &[u8]) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: status.and_then(|status| status.code()), stdout: text(stdout), stderr: text(stderr) }
    }
}

/// A traced program, and whether it is over. It does not outlive a panic: what is left in it would hold the sandbox.
struct Tracee(Child, bool);

impl Tracee {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).expect("a pid"))
    }

    fn wait(&mut self) -> WaitStatus {
        let status = waitpid(self.pid(), None).expect("waiting for a traced program");
        self.1 = matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..));
        status
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if !self.1 {
            let _ = kill(self.pid(), Signal::SIGKILL);
            while matches!(waitpid(self.pid(), None), Ok(status) if status.pid().is_some() && !matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..)))
            {
            }
        }
    }
}
