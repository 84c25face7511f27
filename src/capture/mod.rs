//! The verb `capture`: what the peers of a container's connections tell each other about Multipath TCP, packet by packet.
//!
//! The kernel filters ([`filter`]), a [`socket`] brings what passes, [`packet`] and [`option`] read it, [`pcap`] keeps it.
//! Capabilities are needed to enter the namespace and to open the socket, and are given up before the first packet is read.

pub mod filter;
pub mod option;
pub mod packet;
pub mod pcap;
pub mod socket;

use std::collections::HashMap;
use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use crate::cli::{Capture, Target};
use crate::deadline::Deadline;
use crate::error::plain;
use crate::front::command;
use crate::instance::Lifeline;
use crate::kernel::Kind;
use crate::kernel::netlink::events::Events;
use crate::kernel::netlink::route::Route;
use crate::ledger::Ledger;
use crate::privileges::{self, Work};
use crate::report::text::utc;
use crate::{apply, kernel};

use option::MptcpOption;
use packet::Packet;
use pcap::PcapFile;
use socket::{Captured, Direction, PacketSocket};

/// How long the kernel may take to list the interfaces.
const LIST_PATIENCE: Duration = Duration::from_secs(2);
/// The longest wait at once; poll(2) takes milliseconds in 32 bits.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// The same where the kernel has no pidfd (before Linux 5.3), so that the container's process has to be looked at.
const PROCESS_POLL: Duration = Duration::from_millis(20);

/// How long packets are shown without a look at what ends the capture: they may come faster than they are shown.
const TURN: Duration = Duration::from_millis(50);
/// How long packets that wait are shown when the capture has come to its end.
const LAST_TURN: Duration = Duration::from_millis(500);
/// How often the kernel is asked what it had to drop while packets wait.
const COUNT_PAUSE: Duration = Duration::from_secs(1);

/// Captures until there is an end: of what was asked for, of the container, or of the reader.
pub fn run(capture: &Capture, state_dir: &Path) -> Result<()> {
    let deadline = Deadline::after(capture.duration.unwrap_or(Duration::MAX));
    let ledger = match &capture.target {
        Target::Known(_) => Ledger::open(state_dir)?,
        Target::Pid(_) | Target::Netns(_) => None,
    };
    let (name, place) = command::look(&capture.target, ledger.as_ref())?;
    let (visit, process) = apply::open(&place)?;
    let mut visit = visit.for_work(Work::Capture);
    // The namespace would live on with us when its container has ended.
    let init = process.map(|(pid, _)| Lifeline::of(pid)).transpose()?;
    // Before going in: the user of a rootless container is another one inside.
    let file = capture.write.as_deref().map(PcapFile::open).transpose()?;
    visit.inside()?;
    let kind = Kind::detect();
    let mut session = Session {
        capture,
        socket: PacketSocket::open(capture.dss)?,
        events: Events::open()?,
        names: Names::default(),
        file,
        left: capture.count,
        next_count: Deadline::after(COUNT_PAUSE),
    };
    session.events.hear_of_routes(false)?;
    privileges::end()?;
    session.names.refresh();
    if let Some(file) = &mut session.file {
        file.begin().context(WRITE_FAILED)?;
    }
    let notice = match kind {
        Kind::None => {
            format!(", and only what others send through here can have its options: {}", kernel::without_mptcp())
        }
        _ => String::new(),
    };
    complain(&format!("{name}: capturing{notice}"));
    let has_to_ask = init.as_ref().is_some_and(|init| init.pidfd().is_none());
    let longest = if has_to_ask { PROCESS_POLL } else { WAIT_MAX };
    loop {
        let timeout = PollTimeout::try_from(deadline.remaining().min(longest)).unwrap_or(PollTimeout::MAX);
        let woken = session.wait(timeout, init.as_ref())?;
        let is_last = woken.is_over() || deadline.over();
        let turn = Deadline::after(if is_last { LAST_TURN } else { TURN });
        if session.take_waiting(turn)?.is_over() || is_last {
            session.say_dropped();
            return Ok(());
        }
    }
}

const WRITE_FAILED: &str = "cannot write the capture file";

/// A line for the person who started it; nothing for the system's log.
fn complain(message: &str) {
    let _ = writeln!(std::io::stderr(), "mptcp-hook: {}", plain(message));
}

/// Whether there is anything left to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    GoOn,
    End,
}

impl Next {
    fn is_over(self) -> bool {
        self == Self::End
    }
}

/// A capture under way.
struct Session<'a> {
    capture: &'a Capture,
    socket: PacketSocket,
    events: Events,
    names: Names,
    file: Option<PcapFile>,
    /// How many packets are left to show.
    left: Option<u64>,
    /// When the kernel is asked next what it had to drop, while packets wait.
    next_count: Deadline,
}

impl Session<'_> {
    /// Waits for packets and for news of interfaces.
    fn wait(&mut self, timeout: PollTimeout, init: Option<&Lifeline>) -> Result<Next> {
        let output = std::io::stdout();
        // Of standard output only what cannot be left out: its reader has gone.
        let mut ready = vec![
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.events.as_fd(), PollFlags::POLLIN),
            PollFd::new(output.as_fd(), PollFlags::empty()),
        ];
        ready.extend(init.and_then(Lifeline::pidfd).map(|init| PollFd::new(init.as_fd(), PollFlags::POLLIN)));
        match poll(&mut ready, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for packets"),
        }
        let any = |at: usize| ready.get(at).and_then(PollFd::revents).is_some_and(|events| !events.is_empty());
        let (news, gone, ended) = (any(1), any(2), any(3) || init.is_some_and(Lifeline::is_cut));
        if news && self.events.drain() {
            self.names.refresh();
        }
        if ended {
            complain("the container's first process has ended");
        }
        Ok(if gone || ended { Next::End } else { Next::GoOn })
    }

    /// Shows the packets that wait, until the turn is over.
    fn take_waiting(&mut self, turn: Deadline) -> Result<Next> {
        let mut is_behind = false;
        while let Some(captured) = self.socket.receive().context("cannot receive packets")? {
            let packet = Packet::parse(&captured.frame()).filter(|packet| packet.matters(self.capture.dss));
            let next = packet.map_or(Ok(Next::GoOn), |packet| self.show(&captured, &packet))?;
            if next.is_over() {
                return Ok(Next::End);
            }
            is_behind = turn.over();
            if is_behind {
                break;
            }
        }
        if !is_behind || self.next_count.over() {
            self.say_dropped();
        }
        Ok(Next::GoOn)
    }

    fn say_dropped(&mut self) {
        self.next_count = Deadline::after(COUNT_PAUSE);
        match self.socket.dropped() {
            0 => {}
            dropped => complain(&format!("the kernel had to drop {dropped} packets: there are too many to show")),
        }
    }

    fn show(&mut self, captured: &Captured, packet: &Packet) -> Result<Next> {
        // The file first: whoever reads the line may look into it.
        if let Some(file) = &mut self.file {
            file.write(captured).context(WRITE_FAILED)?;
        }
        let shown = Shown::new(captured, packet, self.names.of(captured.ifindex));
        let line = if self.capture.json { serde_json::to_string(&shown)? } else { shown.text() };
        let mut output = std::io::stdout().lock();
        match output.write_all(format!("{line}\n").as_bytes()).and_then(|()| output.flush()) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(Next::End),
            Err(error) => return Err(error).context("cannot write to standard output"),
        }
        if let Some(left) = &mut self.left {
            *left -= 1;
            if *left == 0 {
                return Ok(Next::End);
            }
        }
        Ok(Next::GoOn)
    }
}

/// The interfaces' names by index, those of interfaces that are gone included: their packets may still wait.
#[derive(Default)]
struct Names(HashMap<u32, String>);

impl Names {
    /// Asks the kernel. Without an answer the numbers have to do.
    fn refresh(&mut self) {
        let links = Route::open(Deadline::after(LIST_PATIENCE)).and_then(|mut route| route.links());
        self.0.extend(links.into_iter().flatten().map(|link| (link.index, plain(link.name))));
    }

    fn of(&mut self, index: u32) -> &str {
        if !self.0.contains_key(&index) {
            self.refresh();
        }
        self.0.entry(index).or_insert_with(|| format!("#{index}"))
    }
}

/// A packet with everything that is printed of it. Its `Serialize` is a line of `--json`; docs/capture.md has its fields.
#[derive(Serialize)]
struct Shown<'a> {
    time: String,
    interface: &'a str,
    ifindex: u32,
    direction: Direction,
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    vlans: &'a [u16],
    source: IpAddr,
    source_port: u16,
    destination: IpAddr,
    destination_port: u16,
    flags: Vec<&'static str>,
    payload: usize,
    options: &'a [MptcpOption],
}

impl<'a> Shown<'a> {
    fn new(captured: &Captured, packet: &'a Packet, interface: &'a str) -> Self {
        Self {
            // RFC 3339.
            time: format!("{}.{:09}Z", utc(captured.seconds).replace(' ', "T"), captured.nanoseconds),
            interface,
            ifindex: captured.ifindex,
            direction: captured.direction,
            vlans: &packet.vlans,
            source: packet.source.ip(),
            source_port: packet.source.port(),
            destination: packet.destination.ip(),
            destination_port: packet.destination.port(),
            flags: packet.flags(),
            payload: packet.payload,
            options: &packet.options,
        }
    }

    /// `12:34:56.123456 eth1 out 10.0.2.2:40000 > 10.0.0.1:5000 SYN MP_JOIN id 1 backup token 0x1a2b3c4d`
    fn text(&self) -> String {
        let time = self.time.get(11..26).unwrap_or_default();
        let vlans: String = self.vlans.iter().map(|vlan| format!(" vlan {vlan}")).collect();
        let from = std::net::SocketAddr::new(self.source, self.source_port);
        let to = std::net::SocketAddr::new(self.destination, self.destination_port);
        let options: Vec<String> = self.options.iter().map(ToString::to_string).collect();
        format!(
            "{time} {}{vlans} {} {from} > {to} {} {}",
            self.interface,
            self.direction.word(),
            self.flags.join(","),
            options.join("; ")
        )
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Packets made by hand.

    use super::packet::Frame;

    /// MP_PRIO with the backup bit, and padding, in hexadecimal.
    pub(crate) const PRIO: &str = "1e0351 01";

    /// The bytes of a text in hexadecimal, with spaces anywhere.
    pub(crate) fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.chars().filter_map(|c| Some(c.to_digit(16)? as u8)).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    /// A SYN/ACK from port 40000 to 5000 with these options, filled up with zeros, and so much data.
    pub(crate) fn tcp(options: &str, payload: usize) -> Vec<u8> {
        let mut options = bytes(options);
        options.resize(options.len().next_multiple_of(4), 0);
        let mut segment = bytes("9c40 1388 00000001 00000002 00 12 ffff 0000 0000");
        segment[12] = ((20 + options.len()) / 4) as u8 * 16;
        segment.extend(options);
        segment.resize(segment.len() + payload, 0xdd);
        segment
    }

    /// From 10.0.2.2 to 10.0.0.1.
    pub(crate) fn ipv4(segment: &[u8]) -> Vec<u8> {
        let mut packet = bytes("45 00 0000 0001 4000 40 06 0000 0a000202 0a000001");
        packet[2..4].copy_from_slice(&((20 + segment.len()) as u16).to_be_bytes());
        packet.extend(segment);
        packet
    }

    /// From fd00:2::2 to fd00::1.
    pub(crate) fn ipv6(segment: &[u8]) -> Vec<u8> {
        ipv6_with(6, segment)
    }

    /// With `next` as the number of what follows.
    pub(crate) fn ipv6_with(next: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = bytes("60000000 0000 00 40 fd000002000000000000000000000002 fd000000000000000000000000000001");
        packet[4..6].copy_from_slice(&(rest.len() as u16).to_be_bytes());
        packet[6] = next;
        packet.extend(rest);
        packet
    }

    /// An extension header of the common form, `more` bytes longer than the shortest, before `rest` and its number.
    pub(crate) fn extension(number: u8, (next, rest): &(u8, Vec<u8>), more: usize) -> (u8, Vec<u8>) {
        let mut header = vec![*next, (more / 8) as u8];
        header.resize(8 + more, 0);
        header.extend(rest);
        (number, header)
    }

    /// A fragment header, with the offset in bytes.
    pub(crate) fn fragment(offset: u16, (next, rest): &(u8, Vec<u8>)) -> (u8, Vec<u8>) {
        let mut header = vec![*next, 0];
        header.extend((offset | 1).to_be_bytes());
        header.extend([0, 0, 0, 9]);
        header.extend(rest);
        (44, header)
    }

    /// An Ethernet frame around a packet.
    pub(crate) fn ethernet(packet: &[u8]) -> Vec<u8> {
        let mut frame = bytes("020000000002 020000000001");
        frame.extend(if packet[0] >> 4 == 6 { [0x86, 0xdd] } else { [8, 0] });
        frame.extend(packet);
        frame
    }

    /// A tag more, outside of those that are there.
    pub(crate) fn vlan(frame: &[u8], protocol: u16, control: u16) -> Vec<u8> {
        [&frame[..12], &protocol.to_be_bytes(), &control.to_be_bytes(), &frame[12..]].concat()
    }

    /// As a packet socket would give it on an Ethernet interface.
    pub(crate) fn frame(bytes: &[u8]) -> Frame<'_> {
        Frame { hardware: 1, tag: None, bytes, length: bytes.len() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::testing::{bytes, ethernet, ipv4, ipv6, tcp, vlan};
    use super::*;

    fn captured(frame: Vec<u8>) -> (Captured, Packet) {
        let captured = Captured {
            seconds: 1_798_761_599,
            nanoseconds: 12_345_678,
            ifindex: 3,
            hardware: 1,
            direction: Direction::Out,
            address: [0; 8],
            address_length: 6,
            tag: None,
            length: frame.len(),
            bytes: frame,
        };
        let packet = Packet::parse(&captured.frame()).expect("a packet of ours");
        (captured, packet)
    }

    #[test]
    fn a_line_and_its_json() {
        let (captured, packet) = captured(ethernet(&ipv4(&tcp("1e0c 1101 1a2b3c4d 00000005", 0))));
        let shown = Shown::new(&captured, &packet, "eth1");
        assert_eq!(
            shown.text(),
            "23:59:59.012345 eth1 out 10.0.2.2:40000 > 10.0.0.1:5000 SYN,ACK MP_JOIN id 1 backup token 0x1a2b3c4d"
        );
        assert_eq!(
            serde_json::to_value(&shown).unwrap(),
            json!({
                "time": "2026-12-31T23:59:59.012345678Z", "interface": "eth1", "ifindex": 3, "direction": "out",
                "source": "10.0.2.2", "source_port": 40000, "destination": "10.0.0.1", "destination_port": 5000,
                "flags": ["SYN", "ACK"], "payload": 0,
                "options": [{ "subtype": "MP_JOIN", "backup": true, "address_id": 1, "token": "0x1a2b3c4d",
                              "nonce": "0x00000005" }]
            })
        );
    }

    #[test]
    fn tags_ipv6_and_several_options() {
        let frame = vlan(&ethernet(&ipv6(&tcp("1e0351 1e048003 1e0c 11", 7))), 0x8100, 5);
        let (captured, packet) = captured(frame);
        let shown = Shown::new(&captured, &packet, "eth0");
        assert_eq!(
            shown.text(),
            "23:59:59.012345 eth0 vlan 5 out [fd00:2::2]:40000 > [fd00::1]:5000 SYN,ACK \
             MP_PRIO backup; MP_TCPRST reason 3 (administratively prohibited); \
             malformed MP_JOIN (its length is 12, with 5 bytes left)"
        );
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!((&json["vlans"], &json["payload"]), (&json!([5]), &json!(7)));
        assert_eq!(
            json["options"][2],
            json!({ "subtype": "malformed", "number": 1, "reason": "its length is 12, with 5 bytes left" })
        );
        assert_eq!(bytes("0a 0b"), [10, 11]);
    }
}
