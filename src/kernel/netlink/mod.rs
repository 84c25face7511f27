//! Netlink, synchronously: one socket, one request at a time, each answer read to its end.
//!
//! Framing is that of `include/uapi/linux/netlink.h`. Nothing that arrives is trusted: lengths are checked before they
//! are used, and a malformed message is an error.

pub mod diag;
pub mod events;
pub mod mptcp_pm;
pub mod neighbours;
pub mod route;
pub mod routing;
pub mod ways;

use std::fmt;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::fd::AsFd;

use anyhow::{Context, Result, anyhow, bail, ensure};
use netlink_packet_core::{
    NLA_F_NESTED, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, NetlinkBuffer, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::deadline::Deadline;

/// Room for one datagram. The kernel never builds a dump's parts larger than 32 KiB (`netlink_recvmsg`).
const RECEIVE_BUFFER: usize = 32 * 1024;
/// How often a dump is started before a table that keeps changing counts as an error.
const DUMP_ATTEMPTS: usize = 5;
/// `struct nlmsghdr`.
const HEADER_LENGTH: usize = 16;
/// `NLMSGERR_ATTR_MSG`: the text of an extended acknowledgement (Linux 4.12).
const ATTR_EXTENDED_ACK_TEXT: u16 = 1;
/// The kernel's own port number.
const KERNEL: u32 = 0;
const TIMED_OUT: &str = "the kernel did not answer a netlink request within the deadline";

/// The kernel's own refusal of a request. Callers find it with `downcast_ref` beneath the context that says what was
/// attempted.
#[derive(Debug)]
pub struct KernelError {
    /// The error number; `UnknownErrno` for numbers that user space has no name for.
    pub errno: Errno,
    /// The text of the extended acknowledgement, if there is one.
    pub message: Option<String>,
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.errno.desc(), self.errno)?;
        match &self.message {
            Some(message) => write!(f, ": {message:?}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for KernelError {}

/// The kernel's error number in `error`, if it was the kernel that refused.
pub fn errno(error: &anyhow::Error) -> Option<Errno> {
    error.downcast_ref::<KernelError>().map(|e| e.errno)
}

/// A netlink socket. It stays in the network namespace in which it was opened, and keeps that namespace alive.
pub struct Connection {
    socket: Socket,
    port: u32,
    sequence: u32,
    deadline: Deadline,
    buffer: Vec<u8>,
}

impl Connection {
    /// Opens a socket for `protocol` (`NETLINK_ROUTE`, `NETLINK_GENERIC`) in the calling thread's network namespace.
    /// `deadline` bounds every wait for an answer.
    pub fn open(protocol: isize, deadline: Deadline) -> Result<Self> {
        let mut socket = Socket::new(protocol).context("cannot open a netlink socket")?;
        let port = socket.bind_auto().context("cannot bind a netlink socket")?.port_number();
        for (option, outcome) in
            [("NETLINK_EXT_ACK", socket.set_ext_ack(true)), ("NETLINK_CAP_ACK", socket.set_cap_ack(true))]
        {
            match outcome {
                // An old kernel: it then sends no text, or the request in full, and both are understood.
                Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
                outcome => outcome.with_context(|| format!("cannot set {option}"))?,
            }
        }
        Ok(Self { socket, port, sequence: 0, deadline, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// Sends a request that is answered by an acknowledgement alone.
    pub fn command(&mut self, kind: u16, body: &Body) -> Result<()> {
        self.command_with(kind, 0, body)
    }

    /// The same with more flags (`NLM_F_CREATE`, ...).
    pub fn command_with(&mut self, kind: u16, flags: u16, body: &Body) -> Result<()> {
        self.exchange(kind, NLM_F_ACK | flags, body, |_| Ok(None::<()>)).map(drop)
    }

    /// Sends a request and returns what `parse` made of each message that came before the acknowledgement.
    ///
    /// # Errors
    /// [`KernelError`] when the kernel refuses; others when it does not answer in time or its answer is malformed.
    pub fn request<T>(&mut self, kind: u16, body: &Body, parse: impl Fn(&[u8]) -> Result<Option<T>>) -> Result<Vec<T>> {
        Ok(self.exchange(kind, NLM_F_ACK, body, parse)?.found)
    }

    /// Reads a whole table: what `parse` made of each of its entries. A table that changes while it is read is read
    /// again from the start (`NLM_F_DUMP_INTR`), a few times.
    ///
    /// # Errors
    /// As [`Connection::request`], and when the table never held still.
    pub fn dump<T>(&mut self, kind: u16, body: &Body, parse: impl Fn(&[u8]) -> Result<Option<T>>) -> Result<Vec<T>> {
        settled(|| self.exchange(kind, NLM_F_DUMP, body, &parse))
    }

    fn exchange<T>(
        &mut self,
        kind: u16,
        flags: u16,
        body: &Body,
        parse: impl Fn(&[u8]) -> Result<Option<T>>,
    ) -> Result<Answer<T>> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = frame(kind, NLM_F_REQUEST | flags, self.sequence, self.port, body);
        while let Err(error) = self.socket.send_to(&message, &SocketAddr::new(KERNEL, 0), 0) {
            if error.kind() != ErrorKind::Interrupted {
                return Err(error).context("cannot send a netlink request");
            }
        }
        let mut answer = Answer::default();
        while !answer.complete {
            self.receive()?;
            answer.read(&self.buffer, self.sequence, self.port, &parse)?;
        }
        match answer.bad_entry.take() {
            Some(error) => Err(error),
            None => Ok(answer),
        }
    }

    /// Puts the next datagram from the kernel into the buffer. The kernel has nearly always answered by the time that
    /// the request is sent, so waiting comes second, and an answer that is there counts even after the deadline.
    fn receive(&mut self) -> Result<()> {
        loop {
            self.buffer.clear();
            let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
            match self.socket.recv_from(&mut self.buffer, flags) {
                Ok((_, sender)) if sender.port_number() != KERNEL => {
                    // Any process of the namespace can write to this port.
                    ensure!(!self.deadline.over(), TIMED_OUT);
                }
                Ok((length, _)) => {
                    ensure!(
                        length <= self.buffer.len(),
                        "the kernel's netlink answer of {length} bytes does not fit into {RECEIVE_BUFFER}"
                    );
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait()?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot receive a netlink answer"),
            }
        }
    }

    fn wait(&self) -> Result<()> {
        let timeout = PollTimeout::try_from(self.deadline.remaining()).unwrap_or(PollTimeout::MAX);
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut sockets, timeout) {
            Ok(0) => bail!(TIMED_OUT),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait for a netlink answer"),
        }
    }
}

/// Repeats `read` until the kernel calls the result consistent.
fn settled<T>(mut read: impl FnMut() -> Result<Answer<T>>) -> Result<Vec<T>> {
    for _ in 0..DUMP_ATTEMPTS {
        match read() {
            Ok(answer) if answer.inconsistent => {}
            Err(error) if errno(&error) == Some(Errno::EINTR) => {}
            outcome => return Ok(outcome?.found),
        }
    }
    bail!("the kernel's table changed during each of {DUMP_ATTEMPTS} readings; try again")
}

/// What has arrived of the answer to one request.
pub(crate) struct Answer<T> {
    /// What was made of its entries.
    pub(crate) found: Vec<T>,
    /// The first entry that made no sense. The rest is read nevertheless, or it would be in the next request's way.
    bad_entry: Option<anyhow::Error>,
    inconsistent: bool,
    /// Whether the message has come that ends it.
    pub(crate) complete: bool,
}

impl<T> Default for Answer<T> {
    fn default() -> Self {
        Self { found: Vec::new(), bad_entry: None, inconsistent: false, complete: false }
    }
}

impl<T> Answer<T> {
    /// Takes in one datagram, skipping messages that answer something else.
    pub(crate) fn read(
        &mut self,
        mut datagram: &[u8],
        sequence: u32,
        port: u32,
        parse: impl Fn(&[u8]) -> Result<Option<T>>,
    ) -> Result<()> {
        while !datagram.is_empty() {
            let message = NetlinkBuffer::new_checked(datagram).map_err(|e| anyhow!("malformed netlink answer: {e}"))?;
            let end = (message.length() as usize).next_multiple_of(4);
            datagram = datagram.get(end..).unwrap_or_default();
            if message.sequence_number() != sequence || message.port_number() != port {
                continue;
            }
            self.inconsistent |= message.flags() & NLM_F_DUMP_INTR != 0;
            match message.message_type() {
                NLMSG_NOOP => {}
                NLMSG_OVERRUN => bail!("the kernel lost a part of its netlink answer"),
                NLMSG_ERROR | NLMSG_DONE => {
                    self.complete = true;
                    return check_status(&message);
                }
                _ => match parse(message.payload()) {
                    Ok(entry) => self.found.extend(entry),
                    Err(error) => {
                        self.bad_entry.get_or_insert(error);
                    }
                },
            }
        }
        Ok(())
    }
}

/// Reads the status that ends an answer: `NLMSG_ERROR` (code 0 is an acknowledgement) or `NLMSG_DONE`.
fn check_status(message: &NetlinkBuffer<&[u8]>) -> Result<()> {
    let payload = message.payload();
    let failed = message.message_type() == NLMSG_ERROR;
    if payload.is_empty() && !failed {
        return Ok(());
    }
    let (code, mut details) = header::<4>(payload).context("malformed netlink status")?;
    let code = i32::from_ne_bytes(*code);
    // The end of a dump may carry a count instead.
    if code == 0 || (code > 0 && !failed) {
        return Ok(());
    }
    ensure!(code < 0, "malformed netlink status: error number {code}");
    if failed {
        // The request comes first: only its header if NLM_F_CAPPED, otherwise all of it.
        let request_length = match header::<4>(details) {
            Ok((length, _)) if message.flags() & NLM_F_CAPPED == 0 => {
                (u32::from_ne_bytes(*length) as usize).saturating_add(3) & !3
            }
            _ => HEADER_LENGTH,
        };
        details = details.get(request_length..).unwrap_or_default();
    }
    let errno = Errno::from_raw(code.saturating_neg());
    let message = (message.flags() & NLM_F_ACK_TLVS != 0)
        .then(|| attributes(details).map_while(Result::ok).find(|(kind, _)| *kind == ATTR_EXTENDED_ACK_TEXT))
        .flatten()
        .map(|(_, value)| text(value));
    let unnamed = || (errno == Errno::UnknownErrno).then(|| format!("error number {}", code.unsigned_abs()));
    Err(KernelError { errno, message: message.or_else(unnamed) }.into())
}

fn frame(kind: u16, flags: u16, sequence: u32, port: u32, body: &Body) -> Vec<u8> {
    let length = HEADER_LENGTH + body.0.len();
    let mut message = vec![0; length];
    let mut header = NetlinkBuffer::new(&mut message);
    header.set_length(length as u32);
    header.set_message_type(kind);
    header.set_flags(flags);
    header.set_sequence_number(sequence);
    header.set_port_number(port);
    header.payload_mut().copy_from_slice(&body.0);
    message
}

/// A request's payload: the family's fixed header, and attributes after it.
pub struct Body(Vec<u8>);

impl Body {
    /// Starts with `header`, a multiple of four bytes long.
    pub fn new(header: &[u8]) -> Self {
        Self(header.to_vec())
    }

    /// Appends an attribute. All values sent here are a few bytes long.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (value.len() + 4) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Appends an attribute that holds attributes.
    pub fn nested(self, kind: u16, inner: &Body) -> Self {
        self.attribute(kind | NLA_F_NESTED, &inner.0)
    }

    /// Appends an address in network byte order.
    pub fn address(self, kind: u16, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.attribute(kind, &address.octets()),
            IpAddr::V6(address) => self.attribute(kind, &address.octets()),
        }
    }
}

/// The attributes in `buffer` as (type without its flag bits, value).
pub fn attributes(buffer: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8])>> {
    NlasIterator::new(buffer).map(|attribute| {
        let attribute = attribute.map_err(|e| anyhow!("malformed netlink attribute: {e}"))?;
        let (kind, length) = (attribute.kind(), attribute.length() as usize);
        Ok((kind, &attribute.into_inner()[4..length]))
    })
}

/// Splits a message's fixed header of `N` bytes from what follows it.
pub fn header<const N: usize>(payload: &[u8]) -> Result<(&[u8; N], &[u8])> {
    payload
        .split_first_chunk()
        .with_context(|| format!("malformed netlink message: {} bytes where {N} belong", payload.len()))
}

/// The first `N` bytes of an attribute's value.
pub fn array<const N: usize>(value: &[u8]) -> Result<[u8; N]> {
    header(value).map(|(bytes, _)| *bytes)
}

/// The text of an attribute, without the NUL byte at its end.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// An address in network byte order, of the family that its length tells.
pub fn ip(value: &[u8]) -> Result<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(value) {
        return Ok(octets.into());
    }
    if let Ok(octets) = <[u8; 16]>::try_from(value) {
        return Ok(octets.into());
    }
    bail!("malformed netlink attribute: an address of {} bytes", value.len())
}

#[cfg(test)]
pub(crate) mod testing {
    //! Network namespaces of their own for tests that ask the real kernel.

    use std::io::Write;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use nix::sched::{CloneFlags, unshare};

    use crate::deadline::Deadline;

    /// Runs `test` on a thread in a new network namespace, which vanishes with the thread.
    pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root, for network namespaces of their own");
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    /// Runs each line of `script` as a command of ip(8), in the calling thread's namespace; those that begin with `-6`
    /// come last.
    pub(crate) fn ip(script: &str) {
        let (v6, rest): (Vec<_>, Vec<_>) = script.lines().partition(|line| line.starts_with("-6 "));
        for (arguments, lines) in [(&["-batch", "-"][..], rest), (&["-6", "-batch", "-"], v6)] {
            let mut child = Command::new("ip")
                .args(arguments)
                .stdin(Stdio::piped())
                .spawn()
                .expect("these tests need ip(8): apt install iproute2");
            let lines: String = lines.iter().map(|line| format!("{}\n", line.trim_start_matches("-6 "))).collect();
            child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
            assert!(child.wait().unwrap().success(), "ip failed on\n{lines}");
        }
    }

    /// What a command of ip(8) prints.
    pub(crate) fn ip_output(arguments: &str) -> String {
        let output = Command::new("ip").args(arguments.split(' ')).output().expect("apt install iproute2");
        assert!(output.status.success(), "ip {arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(600))
    }

    /// The payload of a message, for parsers that take it from there.
    pub(crate) fn payload(body: super::Body) -> Vec<u8> {
        body.0
    }

    /// Calls `parse` on every truncation of `message` and with every byte of it changed in several ways. Whatever
    /// comes, it must return.
    pub(crate) fn torment(message: &[u8], parse: impl Fn(&[u8])) {
        for length in 0..message.len() {
            parse(&message[..length]);
        }
        for at in 0..message.len() {
            for value in [0, 1, 2, 3, 4, 7, 15, 16, 17, 0x7f, 0x80, 0xfe, 0xff] {
                let mut message = message.to_vec();
                message[at] = value;
                parse(&message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use netlink_packet_core::NLM_F_MULTIPART;
    use netlink_sys::protocols::NETLINK_ROUTE;

    use super::testing::{in_namespace, soon, torment};
    use super::*;

    const SEQUENCE: u32 = 7;
    const PORT: u32 = 4711;
    const ENTRY: u16 = 100;

    fn message(kind: u16, flags: u16, body: Body) -> Vec<u8> {
        frame(kind, flags, SEQUENCE, PORT, &body)
    }

    fn read(datagram: &[u8]) -> Result<Answer<Vec<u8>>> {
        let mut answer = Answer::default();
        answer.read(datagram, SEQUENCE, PORT, |payload| Ok(Some(payload.to_vec())))?;
        Ok(answer)
    }

    /// A refusal whose copy of the request is followed by `text`.
    fn refusal(code: i32, flags: u16, request: &[u8], text: Option<&[u8]>) -> Vec<u8> {
        let mut body = Body(code.to_ne_bytes().to_vec());
        body.0.extend(request);
        if let Some(text) = text {
            body = body.attribute(4, &[0; 4]).attribute(ATTR_EXTENDED_ACK_TEXT, text);
        }
        message(NLMSG_ERROR, flags, body)
    }

    fn refused(datagram: &[u8]) -> String {
        let Err(error) = read(datagram) else { panic!("accepted") };
        error.downcast_ref::<KernelError>().expect("not the kernel's error").to_string()
    }

    #[test]
    fn extended_acknowledgement() {
        let request = message(ENTRY, NLM_F_REQUEST, Body::new(&[9; 8]));
        let text = Some(&b"duplicate address\0"[..]);
        let expected = "File exists (EEXIST): \"duplicate address\"";
        let code = -libc::EEXIST;
        assert_eq!(refused(&refusal(code, NLM_F_CAPPED | NLM_F_ACK_TLVS, &request[..16], text)), expected);
        assert_eq!(refused(&refusal(code, NLM_F_ACK_TLVS, &request, text)), expected);
        // Without the flag, what follows is not an attribute.
        assert_eq!(refused(&refusal(code, 0, &request, text)), "File exists (EEXIST)");
        assert_eq!(refused(&refusal(code, 0, &[], None)), "File exists (EEXIST)");
        assert!(refused(&refusal(-524, 0, &[], None)).ends_with(": \"error number 524\""));
        assert!(refused(&refusal(i32::MIN, 0, &[], None)).ends_with(": \"error number 2147483648\""));
    }

    #[test]
    fn end_of_a_dump() {
        let done = |code: i32, flags| message(NLMSG_DONE, flags, Body::new(&code.to_ne_bytes()));
        assert!(read(&done(0, 0)).unwrap().complete);
        assert!(read(&done(3, 0)).unwrap().complete);
        assert!(read(&message(NLMSG_DONE, 0, Body::new(&[]))).unwrap().complete);
        assert!(read(&done(0, NLM_F_DUMP_INTR)).unwrap().inconsistent);
        let failed = Body::new(&(-libc::EPERM).to_ne_bytes()).attribute(ATTR_EXTENDED_ACK_TEXT, b"no");
        assert_eq!(refused(&message(NLMSG_DONE, NLM_F_ACK_TLVS, failed)), "Operation not permitted (EPERM): \"no\"");
    }

    #[test]
    fn only_the_awaited_answer_counts() {
        let body = || Body::new(&[1, 2, 3, 4]);
        let mut datagram = frame(ENTRY, NLM_F_MULTIPART, SEQUENCE - 1, PORT, &Body::new(&[0; 4]));
        datagram.extend(frame(ENTRY, NLM_F_MULTIPART, SEQUENCE, PORT + 1, &Body::new(&[0; 4])));
        datagram.extend(frame(NLMSG_ERROR, 0, SEQUENCE - 1, PORT, &Body::new(&(-1i32).to_ne_bytes())));
        datagram.extend(message(NLMSG_NOOP, 0, Body::new(&[])));
        datagram.extend(message(ENTRY, NLM_F_MULTIPART, body()));
        let answer = read(&datagram).unwrap();
        assert_eq!(answer.found, [[1, 2, 3, 4]]);
        assert!(!answer.complete && !answer.inconsistent);
        assert!(read(&message(NLMSG_OVERRUN, 0, Body::new(&[]))).is_err());
    }

    #[test]
    fn malformed_answers_are_errors() {
        assert!(read(&[0; 16]).is_err(), "length 0");
        assert!(read(&[16, 0, 0, 0]).is_err(), "half a header");
        let mut long = message(ENTRY, 0, Body::new(&[0; 4]));
        long[0] += 1;
        assert!(read(&long).is_err(), "longer than the datagram");
        assert!(read(&refusal(5, 0, &[0; 16], None)).is_err(), "a positive error number");
        assert!(read(&message(NLMSG_ERROR, 0, Body::new(&[]))).is_err(), "no error number");
        assert!(attributes(&[3, 0, 1, 0]).next().unwrap().is_err(), "shorter than its header");
        assert!(attributes(&[9, 0, 1, 0, 0, 0, 0, 0]).next().unwrap().is_err(), "longer than the message");
        assert!(ip(&[1, 2, 3]).is_err());
        assert!(array::<4>(&[1, 2, 3]).is_err());
        let request = message(ENTRY, NLM_F_REQUEST, Body::new(&[9; 8]));
        let mut datagram = message(ENTRY, NLM_F_MULTIPART, Body::new(&[0; 4]).attribute(1, b"x"));
        datagram.extend(refusal(-1, NLM_F_ACK_TLVS, &request, Some(b"text\0")));
        torment(&datagram, |datagram| drop(read(datagram)));
    }

    #[test]
    fn a_bad_entry_does_not_stop_the_reading() {
        let mut datagram = message(ENTRY, NLM_F_MULTIPART, Body::new(&[1; 4]));
        datagram.extend(message(NLMSG_DONE, 0, Body::new(&[0; 4])));
        let mut answer = Answer::<()>::default();
        answer.read(&datagram, SEQUENCE, PORT, |_| bail!("bad")).unwrap();
        assert!(answer.complete && answer.bad_entry.is_some());
    }

    #[test]
    fn a_changing_table_is_read_again_but_not_for_ever() {
        let mut readings = 0;
        let mut reading = |bad: usize| {
            readings = 0;
            let outcome = settled(|| {
                readings += 1;
                if readings == 2 && bad >= 2 {
                    return Err(KernelError { errno: Errno::EINTR, message: None }.into());
                }
                Ok(Answer { found: vec![readings], inconsistent: readings <= bad, ..Answer::default() })
            });
            (outcome.ok(), readings)
        };
        assert_eq!(reading(0), (Some(vec![1]), 1));
        assert_eq!(reading(4), (Some(vec![5]), 5));
        assert_eq!(reading(5), (None, 5));
    }

    #[test]
    fn text_ends_at_its_nul() {
        assert_eq!(text(b"veth\0\0junk"), "veth");
        assert_eq!(text(b"veth"), "veth");
        assert_eq!(text(b"\xff\0"), "\u{fffd}");
    }

    #[test]
    fn waiting_ends_with_the_deadline() {
        in_namespace(|| {
            // A slow machine gets another try.
            let is_in_time = |_| {
                let start = Instant::now();
                let deadline = Deadline::after(Duration::from_millis(50));
                let mut connection = Connection::open(NETLINK_ROUTE, deadline).unwrap();
                let error = connection.receive().unwrap_err();
                assert_eq!(error.to_string(), TIMED_OUT);
                let took = start.elapsed().as_millis();
                assert!(took >= 40, "{took} ms");
                took < 1000
            };
            assert!((0..10).any(is_in_time), "it waits for longer than the deadline");
        });
    }

    #[test]
    fn other_processes_are_not_listened_to() {
        in_namespace(|| {
            let mut connection = Connection::open(NETLINK_ROUTE, soon()).unwrap();
            let stranger = Socket::new(NETLINK_ROUTE).unwrap();
            let forged = frame(NLMSG_ERROR, 0, 1, connection.port, &Body::new(&(-1i32).to_ne_bytes()));
            stranger.send_to(&forged, &SocketAddr::new(connection.port, 0), 0).unwrap();
            connection
                .command(libc::RTM_GETLINK, &Body::new(&[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]))
                .unwrap();
        });
    }

    #[test]
    fn the_kernel_refuses_with_its_own_error() {
        in_namespace(|| {
            let mut connection = Connection::open(NETLINK_ROUTE, soon()).unwrap();
            let error = connection.command(libc::RTM_DELLINK, &Body::new(&[0; 16])).context("trying").unwrap_err();
            assert_eq!(errno(&error), Some(Errno::EINVAL));
            // The connection serves on.
            connection.dump(libc::RTM_GETLINK, &Body::new(&[0; 16]), |_| Ok(Some(()))).unwrap();
        });
    }
}
