//! Moves a known number of bytes over a real Multipath TCP connection and says whether it really was Multipath TCP.
//!
//! Linked statically it needs nothing else in a container's root filesystem. The receiver answers with the number of
//! bytes that it got, so a sender that reports `done` knows that all of them arrived.
//!
//! ```text
//! mptcp-traffic serve --port 5000 --once
//! mptcp-traffic send 10.0.0.1:5000 --bytes 10000000 --rate 5000000
//! ```

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::socket::{Backlog, SockaddrIn, SockaddrIn6, bind, connect, listen, setsockopt, sockopt};

const USAGE: &str = "\
usage: mptcp-traffic serve [--port PORT] [--bytes N] [--once] [--timeout SECONDS]
       mptcp-traffic send HOST:PORT --bytes N [--rate BYTES_PER_SECOND] [--hold SECONDS] [--timeout SECONDS]

serve  prints `listening PORT`, then `received N bytes mptcp=yes|no subflows=N` for every connection. A connection
       ends with its sender's end of file, or after --bytes. --once: exit after the first connection.
send   HOST is an address; IPv6 as [ADDRESS]:PORT. Prints `sent N` twice a second and at the end
       `done N bytes in S s mptcp=yes|no subflows=N`. --hold keeps the connection open that long after the last byte.
       --timeout (default 60) ends everything with exit status 1.

exit   0 everything arrived | 1 it did not | 2 wrong usage";

/// `IPPROTO_MPTCP` of include/uapi/linux/in.h.
const IPPROTO_MPTCP: i32 = 262;
/// `SOL_MPTCP` of include/linux/socket.h.
const SOL_MPTCP: i32 = 284;
/// `MPTCP_INFO` of include/uapi/linux/mptcp.h.
const MPTCP_INFO: i32 = 1;
/// `MPTCP_INFO_FLAG_FALLBACK`: the connection went on as plain TCP.
const FLAG_FALLBACK: u32 = 1;

/// Bytes per write; small enough that a rate is kept smoothly, large enough to fill a segment.
const CHUNK: usize = 16 * 1024;

enum Action {
    Serve { port: u16, bytes: Option<u64>, once: bool, timeout: Option<Duration> },
    Send { to: SocketAddr, bytes: u64, rate: Option<u64>, hold: Duration, timeout: Duration },
    Help,
}

fn main() -> ExitCode {
    let action = match parse(lexopt::Parser::from_env()) {
        Ok(action) => action,
        Err(error) => {
            eprintln!("mptcp-traffic: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let result = match action {
        Action::Serve { port, bytes, once, timeout } => {
            if let Some(limit) = timeout {
                give_up_after(limit);
            }
            serve(port, bytes, once)
        }
        Action::Send { to, bytes, rate, hold, timeout } => {
            give_up_after(timeout);
            send(to, bytes, rate, hold)
        }
        Action::Help => {
            println!("{USAGE}");
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mptcp-traffic: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut parser: lexopt::Parser) -> Result<Action, lexopt::Error> {
    use lexopt::prelude::*;

    let mut verb = None;
    let mut to = None;
    let mut port = 0;
    let mut bytes = None;
    let mut rate = None;
    let mut once = false;
    let mut hold = 0;
    let mut timeout = None;
    while let Some(arg) = parser.next()? {
        match arg {
            Long("port") => port = parser.value()?.parse()?,
            Long("bytes") => bytes = Some(parser.value()?.parse()?),
            Long("rate") => rate = Some(parser.value()?.parse::<std::num::NonZeroU64>()?.get()),
            Long("once") => once = true,
            Long("hold") => hold = parser.value()?.parse()?,
            Long("timeout") => timeout = Some(Duration::from_secs(parser.value()?.parse()?)),
            Long("help") | Short('h') => return Ok(Action::Help),
            Value(word) if verb.is_none() => verb = Some(word.string()?),
            Value(address) if to.is_none() && verb.as_deref() == Some("send") => to = Some(address.parse()?),
            other => return Err(other.unexpected()),
        }
    }
    match verb.as_deref() {
        Some("serve") => Ok(Action::Serve { port, bytes, once, timeout }),
        Some("send") => Ok(Action::Send {
            to: to.ok_or("send: HOST:PORT is missing")?,
            bytes: bytes.ok_or("send: --bytes is missing")?,
            rate,
            hold: Duration::from_secs(hold),
            timeout: timeout.unwrap_or(Duration::from_secs(60)),
        }),
        Some(other) => Err(format!("`{other}` is neither serve nor send").into()),
        None => Err("serve or send is missing".into()),
    }
}

/// Ends the program with exit status 1 once `limit` has passed: a blocked connect, write or read must not hang a caller.
fn give_up_after(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!("mptcp-traffic: not finished within {} s", limit.as_secs());
        std::process::exit(1);
    });
}

fn serve(port: u16, bytes: Option<u64>, once: bool) -> io::Result<()> {
    let listener = listen_on(port)?;
    say(&format!("listening {}", listener.local_addr()?.port()))?;
    if once {
        return receive(listener.accept()?.0, bytes);
    }
    loop {
        let (connection, peer) = listener.accept()?;
        std::thread::spawn(move || {
            if let Err(error) = receive(connection, bytes) {
                eprintln!("mptcp-traffic: connection from {peer}: {error}");
            }
        });
    }
}

fn receive(mut connection: TcpStream, bytes: Option<u64>) -> io::Result<()> {
    let limit = bytes.unwrap_or(u64::MAX);
    let mut buffer = vec![0; 4 * CHUNK];
    let mut received = 0;
    while received < limit {
        match connection.read(&mut buffer)? {
            0 => break,
            n => received += n as u64,
        }
    }
    // The line stands before the sender learns that it is finished: who waits for the sender can read it.
    say(&format!("received {received} bytes {}", described(multipath(&connection))))?;
    connection.write_all(&received.to_be_bytes())
}

fn send(to: SocketAddr, bytes: u64, rate: Option<u64>, hold: Duration) -> io::Result<()> {
    let mut connection = connect_to(to)?;
    let start = Instant::now();
    // The beginning of what `rate` is about.
    let mut paced = start;
    let chunk = [b'm'; CHUNK];
    let mut sent = 0;
    let mut next_line = Duration::from_millis(500);
    while sent < bytes {
        let n = (bytes - sent).min(CHUNK as u64);
        connection.write_all(&chunk[..n as usize])?;
        sent += n;
        if let Some(rate) = rate {
            let due = Duration::from_secs_f64(sent as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(paced.elapsed()));
            // Time that the machine had no processor for us is not made up for by a burst.
            let late = paced.elapsed().saturating_sub(due);
            if late > Duration::from_millis(100) {
                paced += late;
            }
        }
        if start.elapsed() >= next_line {
            say(&format!("sent {sent}"))?;
            next_line = start.elapsed() + Duration::from_millis(500);
        }
    }
    if !hold.is_zero() {
        say(&format!("holding {} s", hold.as_secs()))?;
        std::thread::sleep(hold);
    }
    // The peer closes its subflows once it has answered.
    let before = multipath(&connection);
    connection.shutdown(std::net::Shutdown::Write)?;
    let mut answer = [0; 8];
    connection.read_exact(&mut answer)?;
    let arrived = u64::from_be_bytes(answer);
    if arrived != bytes {
        return Err(io::Error::other(format!("sent {bytes} bytes, the receiver got {arrived}")));
    }
    let now = multipath(&connection).map(|now| now.max(before.unwrap_or(0)));
    say(&format!("done {bytes} bytes in {:.3} s {}", start.elapsed().as_secs_f64(), described(now)))
}

/// One line on stdout, at once: the reader is usually a program that waits for it.
fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn listen_on(port: u16) -> io::Result<TcpListener> {
    // Without IPv6 in the kernel the wildcard of IPv4 has to do.
    let socket = match mptcp_socket(libc::AF_INET6) {
        Ok(socket) => {
            setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            let any = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
            bind(socket.as_raw_fd(), &SockaddrIn6::from(any))?;
            socket
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let socket = mptcp_socket(libc::AF_INET)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
            bind(socket.as_raw_fd(), &SockaddrIn::from(any))?;
            socket
        }
        Err(error) => return Err(error),
    };
    listen(&socket, Backlog::new(16)?)?;
    Ok(TcpListener::from(socket))
}

fn connect_to(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = match to {
        SocketAddr::V4(to) => {
            let socket = mptcp_socket(libc::AF_INET)?;
            connect(socket.as_raw_fd(), &SockaddrIn::from(to)).map(|()| socket)
        }
        SocketAddr::V6(to) => {
            let socket = mptcp_socket(libc::AF_INET6)?;
            connect(socket.as_raw_fd(), &SockaddrIn6::from(to)).map(|()| socket)
        }
    };
    let socket = socket.map_err(|errno| io::Error::other(format!("connecting to {to}: {}", errno.desc())))?;
    Ok(TcpStream::from(socket))
}

/// A stream socket of Multipath TCP; neither std nor nix knows the protocol number.
#[allow(unsafe_code)]
fn mptcp_socket(family: i32) -> io::Result<OwnedFd> {
    // SAFETY: socket() takes three integers and touches no memory of ours.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, IPPROTO_MPTCP) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EPROTONOSUPPORT | libc::EINVAL) => {
                Err(io::Error::other("this kernel has no IPPROTO_MPTCP sockets (upstream Linux has them from 5.6)"))
            }
            Some(libc::ENOPROTOOPT) => {
                Err(io::Error::other("Multipath TCP is off in this network namespace: sysctl net.mptcp.enabled=1"))
            }
            _ => Err(error),
        };
    }
    // SAFETY: fd is a fresh descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `mptcp=yes subflows=N`, or `mptcp=no` for plain TCP.
fn described(subflows: Option<u32>) -> String {
    subflows.map_or_else(|| "mptcp=no".to_owned(), |subflows| format!("mptcp=yes subflows={subflows}"))
}

/// The number of subflows. None for plain TCP, by fallback or because the peer never asked for more.
#[allow(unsafe_code)]
fn multipath(connection: &TcpStream) -> Option<u32> {
    // The start of struct mptcp_info: eight bytes of counters, then the flags.
    let mut info = [0u8; 12];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: both pointers are to live variables, and len says how much the kernel may write to info.
    let rc =
        unsafe { libc::getsockopt(connection.as_raw_fd(), SOL_MPTCP, MPTCP_INFO, info.as_mut_ptr().cast(), &mut len) };
    let flags = u32::from_ne_bytes([info[8], info[9], info[10], info[11]]);
    if rc != 0 || (len as usize) < info.len() || flags & FLAG_FALLBACK != 0 {
        return None;
    }
    // mptcpi_subflows counts the additional ones only.
    Some(u32::from(info[0]) + 1)
}
