//! The system calls that no crate wraps. The only unsafe code of the program.
#![allow(unsafe_code)]

use std::os::fd::RawFd;

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
