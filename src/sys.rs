//! The system calls that no crate wraps. The only unsafe code of the program.
#![allow(unsafe_code)]

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::unistd::{ForkResult, Pid};

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

/// Has the kernel run a classic BPF program on each packet before it is queued (`SO_ATTACH_FILTER`, socket(7)). It checks
/// the program first.
pub fn attach_filter(socket: BorrowedFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let length = program.len().try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // The kernel only reads it.
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// Has each packet come with the VLAN tag that was taken out of it (`PACKET_AUXDATA`, packet(7)).
pub fn set_packet_auxdata(socket: BorrowedFd) -> io::Result<()> {
    set_option(socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1_i32)
}

fn set_option<T>(socket: BorrowedFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of the live `value`, and of what that points to, which its caller
    // keeps alive; it writes nothing.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), size_of::<T>() as libc::socklen_t)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many rows and columns a terminal has, 0 where it does not know (ioctl_tty(2)); none if it is no terminal.
pub fn terminal_size(terminal: BorrowedFd) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel writes one `winsize` to the live local that the pointer leads to, or nothing.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0).then_some((size.ws_row, size.ws_col))
}

/// Has a packet socket receive from all interfaces of its namespace, now and later (packet(7)).
pub fn bind_to_all_interfaces(socket: BorrowedFd) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::sa_family_t,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: 0,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes of the live `address`, which has that size.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many packets did not fit into a packet socket's buffer since the last call (`PACKET_STATISTICS`, packet(7)).
pub fn dropped_packets(socket: BorrowedFd) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: both pointers are to live locals, and `length` is the size of the one that the kernel writes to.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(statistics.tp_drops) } else { Err(io::Error::last_os_error()) }
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

/// Has a write beyond the caller's limit of a file's size (`RLIMIT_FSIZE`) fail with EFBIG, instead of ending the process
/// without a word.
pub fn survive_file_size_limit() {
    // SAFETY: sets a disposition of the kernel's own; no handler of ours runs.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Makes a second process that goes on from here. None in that one, its pid in the first.
pub fn fork() -> nix::Result<Option<Pid>> {
    // SAFETY: the program has one thread, so that nothing (a lock, the allocator) is left in the middle of something in
    // the child.
    Ok(match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => None,
        ForkResult::Parent { child } => Some(child),
    })
}

/// A descriptor that becomes readable when the process ends (pidfd_open(2), Linux 5.3).
pub fn pidfd_open(pid: u32) -> nix::Result<OwnedFd> {
    // SAFETY: takes two numbers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    // SAFETY: the kernel has just opened it for us, and nobody else knows it.
    nix::errno::Errno::result(result).map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor as RawFd) })
}

/// Closes everything beyond standard input, output and error but `keep`, in a child that was forked and will not use
/// anything of its parent's again: a lock or a namespace must not be held by both.
pub fn close_all_but(keep: BorrowedFd) -> io::Result<()> {
    for descriptor in open_descriptors()?.into_iter().filter(|&descriptor| descriptor != keep.as_raw_fd()) {
        // SAFETY: the owners of these descriptors are the parent's variables, of which this process has copies that it
        // neither uses nor drops any more.
        unsafe {
            libc::close(descriptor);
        }
    }
    Ok(())
}

/// `DN_MODIFY`, `DN_CREATE`, `DN_DELETE`, `DN_RENAME`, `DN_ATTRIB`, and `DN_MULTISHOT`: more than once
/// (`include/uapi/linux/fcntl.h`).
const DIRECTORY_CHANGES: u32 = 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x8000_0000;

/// Has SIGIO come whenever a file in the directory comes, goes or changes, for as long as the directory is open (fcntl(2),
/// `F_NOTIFY`). Unless it is blocked or handled, the signal ends the process. EINVAL where the kernel has it not.
pub fn signal_changes(directory: BorrowedFd) -> nix::Result<()> {
    // SAFETY: takes three numbers and touches no memory.
    let result = unsafe { libc::fcntl(directory.as_raw_fd(), libc::F_NOTIFY, DIRECTORY_CHANGES) };
    nix::errno::Errno::result(result).map(drop)
}

fn close_one_by_one() -> io::Result<()> {
    for descriptor in open_descriptors()? {
        // SAFETY: as above. The directory's own descriptor is closed already, which gives EBADF.
        unsafe {
            libc::close(descriptor);
        }
    }
    Ok(())
}

/// The descriptors from [`FIRST_INHERITED`] on.
fn open_descriptors() -> io::Result<Vec<RawFd>> {
    let names = std::fs::read_dir("/proc/self/fd")?.map(|entry| entry.map(|entry| entry.file_name()));
    // Collected, so that the directory itself is closed before anything else is.
    let names = names.collect::<io::Result<Vec<_>>>()?;
    let descriptors = names.iter().filter_map(|name| name.to_str()?.parse::<RawFd>().ok());
    Ok(descriptors.filter(|&descriptor| descriptor >= FIRST_INHERITED).collect())
}

/// `IPPROTO_MPTCP` (`include/uapi/linux/in.h`).
const IPPROTO_MPTCP: libc::c_int = 262;

/// An MPTCP socket that is being connected to `peer`; it becomes writable when that has succeeded or failed.
pub fn mptcp_connect(peer: SocketAddr) -> io::Result<TcpStream> {
    use nix::sys::socket::{SockaddrIn, SockaddrIn6, connect};
    let family = if peer.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: takes three numbers and touches no memory.
    let result = unsafe { libc::socket(family, kind, IPPROTO_MPTCP) };
    // SAFETY: the kernel has just opened it for us, and nobody else knows it.
    let socket = nix::errno::Errno::result(result).map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) })?;
    let begun = match peer {
        SocketAddr::V4(peer) => connect(socket.as_raw_fd(), &SockaddrIn::from(peer)),
        SocketAddr::V6(peer) => connect(socket.as_raw_fd(), &SockaddrIn6::from(peer)),
    };
    match begun {
        Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}
