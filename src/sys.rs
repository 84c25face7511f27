//! The system calls that no crate wraps. The only unsafe code of the program.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

/// The first descriptor that is not standard input, output or error.
const FIRST_INHERITED: RawFd = 3;

/// `SO_NETNS_COOKIE` of a socket (socket(7), Linux 5.14): a number that no other network namespace of this boot has or
/// will have. None where the kernel does not know the option.
pub fn netns_cookie(socket: RawFd) -> Option<u64> {
    let mut cookie: u64 = 0;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to live locals, and `length` is the size of the one that the kernel writes to.
    let result = unsafe {
        libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut length)
    };
    (result == 0 && length as usize == size_of::<u64>()).then_some(cookie)
}

/// Forgets the environment. The program starts with what the runtime, and at createContainer the container's author,
/// put there.
pub fn clear_environment() {
    // SAFETY: called first of all, while the program has one thread and nobody holds a pointer into the environment.
    unsafe {
        libc::clearenv();
    }
}

/// Closes what the caller left open beyond standard input, output and error: a runtime's pipes, sockets and
/// directories are none of ours, and whoever waits for their other ends must not wait for us. (Where one of 0 to 2 is
/// closed, Rust's runtime has opened /dev/null in its place by now.)
pub fn close_inherited_descriptors() -> io::Result<()> {
    // SAFETY: called first of all, while the program has one thread and has opened nothing: no descriptor from 3 on has
    // an owner in it.
    let result = unsafe { libc::syscall(libc::SYS_close_range, FIRST_INHERITED, libc::c_uint::MAX, 0) };
    // Linux before 5.9, or a seccomp filter that does not know the call.
    if result == 0 { Ok(()) } else { close_one_by_one() }
}

fn close_one_by_one() -> io::Result<()> {
    let names = std::fs::read_dir("/proc/self/fd")?.map(|entry| entry.map(|entry| entry.file_name()));
    // Collected, so that the directory itself is closed before anything else is.
    let names = names.collect::<io::Result<Vec<_>>>()?;
    let descriptors = names.iter().filter_map(|name| name.to_str()?.parse::<RawFd>().ok());
    for descriptor in descriptors.filter(|&descriptor| descriptor >= FIRST_INHERITED) {
        // SAFETY: as above. The directory's own descriptor is closed already, which gives EBADF.
        unsafe {
            libc::close(descriptor);
        }
    }
    Ok(())
}
