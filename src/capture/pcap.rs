//! Files for tshark and others: classic pcap with nanoseconds (draft-ietf-opsawg-pcap, section 4). The link type is
//! `LINKTYPE_LINUX_SLL2` (276), which has the interface's number and the direction for each packet and one form for all
//! types of interfaces.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::filter;
use super::packet::Frame;
use super::socket::Captured;

const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const LINKTYPE_LINUX_SLL2: u32 = 276;
/// The header of that link type.
const HEADER: u32 = 20;
/// A VLAN tag.
const TAG: u32 = 4;
/// The most that a packet takes: what was kept of it, without a link layer of its own where the interface has none, and
/// the tag that the kernel had taken out.
const SNAPLEN: u32 = filter::KEPT + HEADER + TAG;

/// A capture file. Each packet is in it as soon as [`PcapFile::write`] is back.
pub struct PcapFile {
    file: File,
}

impl PcapFile {
    /// Opens a file that is new or the caller's own. Nothing is lost of it before [`PcapFile::begin`].
    ///
    /// # Errors
    /// For a symbolic link, anything that is not a regular file, and a file that belongs to somebody else or has a second
    /// name: in a directory in which others can write, it might be anybody's.
    pub fn open(path: &Path) -> Result<Self> {
        // O_NONBLOCK: a fifo must not keep us waiting for a reader.
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = match open(path, flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from) {
            Ok(file) => file,
            Err(nix::Error::ELOOP) => bail!("cannot write {}: it is a symbolic link", path.display()),
            Err(nix::Error::EACCES) if nix::unistd::geteuid().is_root() => bail!(
                "cannot write {}: permission denied; mptcp-hook gives up root's right to write everywhere \
                 (CAP_DAC_OVERRIDE), so name a file in a directory that belongs to root",
                path.display()
            ),
            Err(error) => return Err(error).with_context(|| format!("cannot write {}", path.display())),
        };
        let found = file.metadata().with_context(|| format!("cannot look at {}", path.display()))?;
        if !found.is_file() {
            bail!("cannot write {}: it is not a regular file", path.display());
        }
        if found.uid() != nix::unistd::geteuid().as_raw() || found.nlink() != 1 {
            bail!("cannot write {}: it belongs to another user or has a second name; remove it first", path.display());
        }
        Ok(Self { file })
    }

    /// Empties it and writes the header.
    pub fn begin(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        let mut header = MAGIC_NANOSECONDS.to_le_bytes().to_vec();
        // Version 2.4; two reserved words.
        header.extend([2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        header.extend(SNAPLEN.to_le_bytes());
        header.extend(LINKTYPE_LINUX_SLL2.to_le_bytes());
        self.file.write_all(&header)
    }

    /// Appends a packet.
    pub fn write(&mut self, captured: &Captured) -> io::Result<()> {
        self.file.write_all(&record(captured))
    }
}

/// A record with its header. What is not IP has none; it does not come here.
fn record(captured: &Captured) -> Vec<u8> {
    let frame: Frame = captured.frame();
    let Some(network) = frame.network() else { return Vec::new() };
    let mut protocols = network.tags.iter().map(|tag| tag.protocol).chain([network.protocol]);
    let mut packet = Vec::with_capacity(SNAPLEN as usize);
    packet.extend(protocols.next().unwrap_or(network.protocol).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(captured.ifindex.to_be_bytes());
    packet.extend(captured.hardware.to_be_bytes());
    packet.extend([captured.direction.number(), captured.address_length]);
    packet.extend(captured.address);
    for (tag, protocol) in network.tags.iter().zip(protocols) {
        packet.extend(tag.control.to_be_bytes());
        packet.extend(protocol.to_be_bytes());
    }
    packet.extend(network.bytes);
    let cut = frame.length.saturating_sub(frame.bytes.len());
    let mut record = Vec::with_capacity(16 + packet.len());
    // The seconds are unsigned: they last until 2106.
    for word in [captured.seconds as u32, captured.nanoseconds, packet.len() as u32, (packet.len() + cut) as u32] {
        record.extend(word.to_le_bytes());
    }
    record.extend(packet);
    record
}

#[cfg(test)]
mod tests {
    use super::super::socket::Direction;
    use super::super::testing::{PRIO, ethernet, ipv4, tcp, vlan};
    use super::*;
    use crate::capture::packet::Tag;

    fn captured(bytes: Vec<u8>) -> Captured {
        Captured {
            seconds: 1_800_000_000,
            nanoseconds: 5,
            ifindex: 7,
            hardware: 1,
            direction: Direction::Out,
            address: [2, 0, 0, 0, 0, 1, 0, 0],
            address_length: 6,
            tag: None,
            length: bytes.len(),
            bytes,
        }
    }

    #[test]
    fn the_link_layer_becomes_that_of_all_interfaces() {
        let ip = ipv4(&tcp(PRIO, 0));
        let mut whole = captured(ethernet(&ip));
        whole.length += 100;
        let record = record(&whole);
        let word = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (1_800_000_000, 5));
        assert_eq!((word(8) as usize, word(12) as usize), (20 + ip.len(), 20 + ip.len() + 100));
        assert_eq!(&record[16..36], [8, 0, 0, 0, 0, 0, 0, 7, 0, 1, 4, 6, 2, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(&record[36..], ip);
    }

    #[test]
    fn tags_come_back_into_the_packet() {
        let ip = ipv4(&tcp(PRIO, 0));
        let mut tagged = captured(vlan(&ethernet(&ip), 0x8100, 5));
        tagged.tag = Some(Tag { protocol: 0x88a8, control: 6 });
        let record = record(&tagged);
        assert_eq!(&record[16..18], [0x88, 0xa8]);
        assert_eq!(&record[36..44], [0, 6, 0x81, 0, 0, 5, 8, 0]);
        assert_eq!(&record[44..], ip);
    }

    #[test]
    fn no_packet_is_longer_than_the_header_says() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        PcapFile::open(&path).unwrap().begin().unwrap();
        let header = std::fs::read(&path).unwrap();
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        // Without a link layer, and with one and both kinds of tags.
        let mut raw = captured(ipv4(&tcp(PRIO, filter::KEPT as usize - 44)));
        raw.hardware = 65534;
        let mut tagged = captured(vlan(&ethernet(&ipv4(&tcp(PRIO, filter::KEPT as usize - 62))), 0x8100, 5));
        let tag = Some(Tag { protocol: 0x88a8, control: 6 });
        (raw.tag, tagged.tag) = (tag, tag);
        for packet in [raw, tagged] {
            assert_eq!(packet.bytes.len(), filter::KEPT as usize);
            let record = record(&packet);
            assert!(word(&record, 8) > filter::KEPT && word(&record, 8) <= word(&header, 16), "{}", word(&record, 8));
        }
    }

    #[test]
    fn only_a_file_of_ones_own_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let refused = |name: &str| format!("{:#}", PcapFile::open(&path(name)).err().expect(name));
        std::fs::write(path("old"), "what was there before").unwrap();
        std::os::unix::fs::symlink(path("old"), path("link")).unwrap();
        std::fs::write(path("one"), "").unwrap();
        std::fs::hard_link(path("one"), path("two")).unwrap();
        nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
        assert!(refused("link").contains("symbolic link"));
        assert!(refused("two").contains("second name"));
        assert!(refused("fifo").contains("cannot write"));
        assert!(refused(".").contains("cannot write"));
        assert!(refused("nowhere/x").contains("cannot write"));

        let mut file = PcapFile::open(&path("old")).unwrap();
        assert_eq!(std::fs::read_to_string(path("old")).unwrap(), "what was there before");
        file.begin().unwrap();
        file.write(&captured(ethernet(&ipv4(&tcp(PRIO, 0))))).unwrap();
        let written = std::fs::read(path("old")).unwrap();
        assert_eq!(&written[..4], [0x4d, 0x3c, 0xb2, 0xa1]);
        assert_eq!(written.len(), 24 + 16 + 20 + 44);
        PcapFile::open(&path("new")).unwrap();
        assert_eq!(std::fs::metadata(path("new")).unwrap().mode() & 0o777, 0o600);
    }
}
