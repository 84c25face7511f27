//! Programs that are killed at a chosen system call, by ptrace(2).
#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sched::{CloneFlags, setns};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::sandbox::{Netns, Sandbox};

/// The way into a sandbox without nsenter(1): thousands of programs are started by it.
pub struct Launcher {
    mount: File,
    pid: File,
    own_pid: File,
}

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
    /// Into `sandbox`, in its host's network namespace, which must be the test's own.
    pub fn new(sandbox: &Sandbox) -> Self {
        let namespace = |name| {
            let path = sandbox.netns_path(&Netns::Host).with_file_name(name);
            File::open(&path).unwrap_or_else(|e| panic!("opening {}: {e}", path.display()))
        };
        Self {
            mount: namespace("mnt"),
            pid: namespace("pid_for_children"),
            own_pid: File::open("/proc/thread-self/ns/pid_for_children").expect("the test's own pid namespace"),
        }
    }

    /// Starts a program in the sandbox, in the network namespace `netns` if there is one.
    pub fn spawn(&self, mut command: Command, netns: Option<&File>, traced: bool) -> Child {
        let copy = |file: &File| file.try_clone().expect("a second descriptor of a namespace");
        let (mount, netns) = (copy(&self.mount), netns.map(copy));
        // SAFETY: nothing but system calls on descriptors that live as long as the closure.
        unsafe {
            command.pre_exec(move || {
                setns(mount.as_fd(), CloneFlags::CLONE_NEWNS)?;
                if let Some(netns) = &netns {
                    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
                }
                if traced {
                    ptrace::traceme()?;
                }
                Ok(())
            });
        }
        // It counts for the children of this thread alone.
        setns(self.pid.as_fd(), CloneFlags::CLONE_NEWPID).expect("entering the sandbox's pid namespace");
        let child = command.spawn();
        setns(self.own_pid.as_fd(), CloneFlags::CLONE_NEWPID).expect("coming back from the sandbox's pid namespace");
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
