//! One process from start to end: how long it took, how it ended, how much memory it touched.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A finished process.
pub struct Run {
    /// From before the start until its end was noticed.
    pub time: Duration,
    /// The processors' time that it took, on all of them together: waiting for a processor is not in it.
    pub processor: Duration,
    /// Peak resident memory, in KiB; never less than this process has itself (see [`forget_peak`]).
    pub peak: u64,
}

/// Runs `program` with `arguments` to its end; `input` is in the pipe before it starts, as with a container runtime.
/// The environment holds nothing but a PATH.
///
/// The standard library starts programs by posix_spawn(3), which shares the memory until exec: the starter's size does
/// not matter. Panics unless the program succeeds.
#[expect(clippy::zombie_processes, reason = "wait4 gives the memory, too")]
pub fn run(program: &Path, arguments: &[String], input: &[u8]) -> Run {
    let mut command = command(program, arguments, filled_pipe(input));
    let begin = Instant::now();
    let child = command.spawn().unwrap_or_else(|e| panic!("starting {}: {e}", program.display()));
    let (status, usage) = wait(&child);
    let time = begin.elapsed();
    assert_eq!(status, 0, "{} {arguments:?} ended with wait status {status:#x}", program.display());
    let duration = |time: libc::timeval| {
        let seconds = u64::try_from(time.tv_sec).expect("seconds");
        Duration::from_secs(seconds) + Duration::from_micros(u64::try_from(time.tv_usec).expect("microseconds"))
    };
    Run {
        time,
        processor: duration(usage.ru_utime) + duration(usage.ru_stime),
        peak: u64::try_from(usage.ru_maxrss).expect("a size"),
    }
}

/// [`run`] where the output matters and time does not; gives both streams.
pub fn output(program: &Path, arguments: &[String], input: &[u8]) -> String {
    let mut command = command(program, arguments, filled_pipe(input));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = command.output().unwrap_or_else(|e| panic!("starting {}: {e}", program.display()));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{} {arguments:?}: {}\n{text}", program.display(), output.status);
    text
}

/// A pipe that has everything in it already; the kernel's default is room for 64 KiB.
fn filled_pipe(input: &[u8]) -> OwnedFd {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("a pipe");
    File::from(write).write_all(input).expect("filling a pipe");
    read
}

fn command(program: &Path, arguments: &[String], stdin: OwnedFd) -> Command {
    let null = || File::options().write(true).open("/dev/null").expect("/dev/null");
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.stdin(stdin).stdout(null()).stderr(null());
    command
}

/// Waits for a process; gives its wait status and what it used.
#[allow(unsafe_code)]
fn wait(child: &Child) -> (i32, libc::rusage) {
    let pid = libc::pid_t::try_from(child.id()).expect("a pid");
    let mut status = 0;
    // SAFETY: all zeroes is a valid rusage, which consists of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals of the types that wait4(2) fills.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    assert_eq!(waited, pid, "waiting for a process: {}", std::io::Error::last_os_error());
    (status, usage)
}

/// Makes the kernel forget this process's own peak memory, with which its children's begins: until exec they share its
/// memory (proc(5), `clear_refs`). What is left of it is its present size.
pub fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").expect("resetting the peak memory");
}
