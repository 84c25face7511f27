//! Programs started in other namespaces, by setns(2) between fork and exec: thousands are, and another program in
//! between, such as nsenter(1), would cost more than most of them. Kernels before 5.8 cannot do it by a pidfd, so the
//! namespaces are opened one by one.
#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::ffi::CStr;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::{Deref, DerefMut};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// How long a program may be held open for writing by others that are being started.
const BUSY_LIMIT: Duration = Duration::from_secs(60);

/// The namespaces of a process, held open.
pub struct Namespaces {
    mount: File,
    ipc: File,
    uts: File,
    network: File,
    pid: PidNamespace,
}

impl Namespaces {
    /// Those of the process `pid`.
    pub fn of(pid: u32) -> Self {
        let namespace = |name| open(Path::new(&format!("/proc/{pid}/ns/{name}")));
        Self {
            mount: namespace("mnt"),
            ipc: namespace("ipc"),
            uts: namespace("uts"),
            network: namespace("net"),
            pid: PidNamespace { of_children: namespace("pid"), own: open(Path::new("/proc/thread-self/ns/pid")) },
        }
    }

    /// Starts `command` in them, with `network` instead of their own network namespace if there is one.
    pub fn start(&self, command: &mut Command, network: Option<&File>) -> std::io::Result<Child> {
        let copy = |file: &File| file.try_clone().expect("a second descriptor of a namespace");
        let network = copy(network.unwrap_or(&self.network));
        let (mount, ipc, uts) = (copy(&self.mount), copy(&self.ipc), copy(&self.uts));
        // SAFETY: nothing but system calls on descriptors that live as long as the closure.
        unsafe {
            command.pre_exec(move || {
                setns(ipc.as_fd(), CloneFlags::CLONE_NEWIPC)?;
                setns(uts.as_fd(), CloneFlags::CLONE_NEWUTS)?;
                setns(network.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(setns(mount.as_fd(), CloneFlags::CLONE_NEWNS)?)
            });
        }
        let _entered = self.pid.enter();
        let begin = Instant::now();
        loop {
            match command.spawn() {
                // Another thread has forked while the program was being written, and not come to its exec yet.
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && begin.elapsed() < BUSY_LIMIT => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                outcome => return outcome,
            }
        }
    }
}

/// A pid namespace, and the one to come back to.
struct PidNamespace {
    of_children: File,
    own: File,
}

impl PidNamespace {
    /// Has the children of this thread, and of no other one, start in the namespace until the guard is dropped.
    fn enter(&self) -> Entered<'_> {
        setns(self.of_children.as_fd(), CloneFlags::CLONE_NEWPID).expect("entering a pid namespace");
        Entered(self)
    }
}

struct Entered<'a>(&'a PidNamespace);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        setns(self.0.own.as_fd(), CloneFlags::CLONE_NEWPID).expect("coming back from a pid namespace");
    }
}

/// A started program. Dropping it ends it and waits for its end: a pid namespace does not end before its last process
/// is reaped, by whoever started that.
pub struct Process(Child);

impl From<Child> for Process {
    fn from(child: Child) -> Self {
        Self(child)
    }
}

impl Process {
    /// Its pid in the pid namespace that it is in.
    pub fn inner_pid(&self) -> u32 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).expect("a process's status");
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("its pids");
        pids.split_whitespace().last().and_then(|pid| pid.parse().ok()).expect("its pid in the sandbox")
    }

    /// Waits until it has ended and all of its output, to pipes, is read: exit status, stdout, stderr.
    pub fn output(mut self) -> (Option<i32>, String, String) {
        let mut bytes = [Vec::new(), Vec::new()];
        // One after the other is enough for a program that says less than a pipe holds.
        if let Some(mut stdout) = self.0.stdout.take() {
            stdout.read_to_end(&mut bytes[0]).expect("reading a program's output");
        }
        if let Some(mut stderr) = self.0.stderr.take() {
            stderr.read_to_end(&mut bytes[1]).expect("reading a program's output");
        }
        let status = self.0.wait().expect("waiting for a program");
        let [stdout, stderr] = bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        (status.code(), stdout, stderr)
    }
}

impl Deref for Process {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nothing is sent to one that was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A new network namespace, which is there as long as the descriptor or a process in it.
pub fn new_network() -> File {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("making a network namespace");
        open(Path::new("/proc/thread-self/ns/net"))
    };
    std::thread::spawn(make).join().expect("the thread that makes a network namespace")
}

/// Has `command`, which becomes the first process of a pid namespace, mount that namespace's procfs.
pub fn with_proc(command: &mut Command) {
    // SAFETY: nothing but a system call.
    unsafe { command.pre_exec(|| Ok(mount(Some(c"proc"), c"/proc", Some(c"proc"), MsFlags::empty(), None::<&CStr>)?)) };
}

fn open(namespace: &Path) -> File {
    File::open(namespace).unwrap_or_else(|e| panic!("opening {}: {e}", namespace.display()))
}
