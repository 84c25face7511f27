//! MPTCP options as they stand in a TCP header: version 0 (RFC 6824, section 3) and version 1 (RFC 8684, section 3).
//! Nothing is trusted: what does not have the form that its subtype asks for is [`MptcpOption::Malformed`].

use std::fmt;
use std::net::IpAddr;

use serde::{Serialize, Serializer};

/// The number of MPTCP among TCP's options (RFC 6824, section 8).
pub const KIND: u8 = 30;
/// The subtype of DSS, which nearly every packet with data has.
pub const SUBTYPE_DSS: u8 = 2;
/// End of the list of options, and one byte of padding (RFC 9293, section 3.1): the two without a length.
pub const KIND_END: u8 = 0;
/// See [`KIND_END`].
pub const KIND_PADDING: u8 = 1;

/// The subtypes by number (RFC 8684, section 7.2; 0 to 7 as in RFC 6824).
const SUBTYPES: [&str; 9] =
    ["MP_CAPABLE", "MP_JOIN", "DSS", "ADD_ADDR", "REMOVE_ADDR", "MP_PRIO", "MP_FAIL", "MP_FASTCLOSE", "MP_TCPRST"];

/// The reasons of MP_TCPRST by number (RFC 8684, section 3.6).
const RESET_REASONS: [&str; 7] = [
    "unspecified",
    "MPTCP-specific error",
    "lack of resources",
    "administratively prohibited",
    "too much outstanding data",
    "unacceptable performance",
    "middlebox interference",
];

/// Bytes that are a number or a secret to the peers, for people: `0x0a1b`. In JSON they are the same text, as 64 bits do
/// not fit into every reader's numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hex(pub Vec<u8>);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0x")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An MPTCP option. Its `Display` is what `capture` prints, its `Serialize` an element of `options` in `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "subtype")]
pub enum MptcpOption {
    /// Opens a connection.
    #[serde(rename = "MP_CAPABLE")]
    Capable {
        /// The protocol's version.
        version: u8,
        /// A: data is checksummed.
        checksum_required: bool,
        /// C (version 1): open no subflows to this address and port.
        deny_join: bool,
        /// The sender's key.
        #[serde(skip_serializing_if = "Option::is_none")]
        sender_key: Option<Hex>,
        /// The receiver's key.
        #[serde(skip_serializing_if = "Option::is_none")]
        receiver_key: Option<Hex>,
        /// The data-level length of a first packet with data (version 1), in bytes.
        #[serde(skip_serializing_if = "Option::is_none")]
        data_length: Option<u16>,
        /// Its checksum.
        #[serde(skip_serializing_if = "Option::is_none")]
        checksum: Option<Hex>,
    },
    /// Opens a further subflow. Of its three packets the SYN has token and nonce, the SYN/ACK HMAC and nonce, the ACK
    /// the HMAC alone.
    #[serde(rename = "MP_JOIN")]
    Join {
        /// B: use this subflow as a backup only. None on the ACK.
        #[serde(skip_serializing_if = "Option::is_none")]
        backup: Option<bool>,
        /// The sender's address id. None on the ACK.
        #[serde(skip_serializing_if = "Option::is_none")]
        address_id: Option<u8>,
        /// Which connection it joins.
        #[serde(skip_serializing_if = "Option::is_none")]
        token: Option<Hex>,
        /// The sender's random number.
        #[serde(skip_serializing_if = "Option::is_none")]
        nonce: Option<Hex>,
        /// The sender's HMAC, of 8 bytes on the SYN/ACK, of 20 on the ACK.
        #[serde(skip_serializing_if = "Option::is_none")]
        hmac: Option<Hex>,
    },
    /// Data sequence numbers.
    #[serde(rename = "DSS")]
    Dss {
        /// F: no data comes after this.
        data_fin: bool,
        /// The data ACK, of 4 or 8 bytes.
        #[serde(skip_serializing_if = "Option::is_none")]
        data_ack: Option<Hex>,
        /// What the packet's data is.
        #[serde(skip_serializing_if = "Option::is_none")]
        mapping: Option<Mapping>,
    },
    /// Announces an address, or (echo) confirms an announcement.
    #[serde(rename = "ADD_ADDR")]
    AddAddr {
        /// The protocol's version, which the option's form shows.
        version: u8,
        /// The address's id.
        address_id: u8,
        /// The address.
        address: IpAddr,
        /// The port, where it is another than the connection's.
        #[serde(skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
        /// E (version 1): the receiver's confirmation.
        echo: bool,
        /// The announcer's HMAC (version 1).
        #[serde(skip_serializing_if = "Option::is_none")]
        hmac: Option<Hex>,
    },
    /// Takes addresses back.
    #[serde(rename = "REMOVE_ADDR")]
    RemoveAddr {
        /// Their ids.
        address_ids: Vec<u8>,
    },
    /// Changes the priority of a subflow.
    #[serde(rename = "MP_PRIO")]
    Prio {
        /// B: it is a backup from now on, or a normal path.
        backup: bool,
        /// Which address's subflows (version 0); none: this packet's.
        #[serde(skip_serializing_if = "Option::is_none")]
        address_id: Option<u8>,
    },
    /// A checksum was wrong.
    #[serde(rename = "MP_FAIL")]
    Fail {
        /// The data sequence number up to which everything was good.
        data_sequence: Hex,
    },
    /// Ends the whole connection at once.
    #[serde(rename = "MP_FASTCLOSE")]
    Fastclose {
        /// The receiver's key.
        receiver_key: Hex,
    },
    /// Says why a subflow is reset (version 1).
    #[serde(rename = "MP_TCPRST")]
    Reset {
        /// T: it may work later.
        transient: bool,
        /// The reason's number.
        reason: u8,
    },
    /// A subtype that neither version has.
    #[serde(rename = "unknown")]
    Unknown {
        /// Its number, 9 to 15.
        number: u8,
    },
    /// It has not the form of its subtype.
    #[serde(rename = "malformed")]
    Malformed {
        /// The subtype's number, where there is one to be seen.
        #[serde(skip_serializing_if = "Option::is_none")]
        number: Option<u8>,
        /// What is wrong.
        reason: String,
    },
}

/// Which data of the connection a packet has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// The data sequence number, of 4 or 8 bytes.
    pub data_sequence: Hex,
    /// The sequence number in the subflow, relative to its start.
    pub subflow_sequence: u32,
    /// How much, in bytes.
    pub data_length: u16,
    /// The checksum, if it is in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksum: Option<Hex>,
}

/// The MPTCP options among `options`, all of a TCP header's beyond its first 20 bytes. The walk ends where a length leads
/// nowhere.
pub fn all(mut options: &[u8]) -> Vec<MptcpOption> {
    let mut found = Vec::new();
    loop {
        let length = match *options {
            [] | [KIND_END, ..] => return found,
            [KIND_PADDING, ..] => 1,
            [KIND] => {
                found.push(malformed(None, "it has no length"));
                return found;
            }
            [_] => return found,
            [KIND, length, ..] => {
                found.push(one(options, length.into()));
                length.into()
            }
            [_, length, ..] => usize::from(length),
        };
        // A length counts itself and the kind.
        if length == 0 || options[0] != KIND_PADDING && length < 2 || length > options.len() {
            return found;
        }
        options = &options[length..];
    }
}

impl MptcpOption {
    /// The subtype's number, also of a malformed option if it can be seen.
    pub fn number(&self) -> Option<u8> {
        Some(match self {
            Self::Capable { .. } => 0,
            Self::Join { .. } => 1,
            Self::Dss { .. } => SUBTYPE_DSS,
            Self::AddAddr { .. } => 3,
            Self::RemoveAddr { .. } => 4,
            Self::Prio { .. } => 5,
            Self::Fail { .. } => 6,
            Self::Fastclose { .. } => 7,
            Self::Reset { .. } => 8,
            Self::Unknown { number } => *number,
            Self::Malformed { number, .. } => return *number,
        })
    }
}

fn malformed(number: Option<u8>, reason: impl Into<String>) -> MptcpOption {
    MptcpOption::Malformed { number, reason: reason.into() }
}

/// The option at the start of `rest`, which says that it has `length` bytes.
fn one(rest: &[u8], length: usize) -> MptcpOption {
    // With a length below 3 this byte is the next option's.
    let number = rest.get(2).filter(|_| length >= 3).map(|byte| byte >> 4);
    match rest.get(..length) {
        Some(option) if length >= 3 => {
            decode(option).unwrap_or_else(|| malformed(number, format!("it has {length} bytes")))
        }
        Some(_) => malformed(number, format!("its length is {length}")),
        None => malformed(number, format!("its length is {length}, with {} bytes left", rest.len())),
    }
}

/// A whole option of three bytes at least. None: its length is not one of its subtype's.
fn decode(option: &[u8]) -> Option<MptcpOption> {
    let (subtype, low) = (option[2] >> 4, option[2] & 0x0f);
    let bit = |bit: u8| low & bit != 0;
    let mut rest = Rest(&option[3..]);
    let decoded = match subtype {
        0 => capable(low, &mut rest)?,
        1 => join(bit(1), &mut rest)?,
        SUBTYPE_DSS => dss(&mut rest)?,
        3 => add_addr(low, &mut rest)?,
        4 => {
            let address_ids = rest.take_all();
            (!address_ids.is_empty()).then(|| MptcpOption::RemoveAddr { address_ids: address_ids.into() })?
        }
        5 => MptcpOption::Prio { backup: bit(1), address_id: rest.byte() },
        6 => {
            // Between the subtype and the number there are 12 reserved bits.
            rest.byte()?;
            MptcpOption::Fail { data_sequence: rest.hex(8)? }
        }
        7 => {
            rest.byte()?;
            MptcpOption::Fastclose { receiver_key: rest.hex(8)? }
        }
        8 => MptcpOption::Reset { transient: bit(1), reason: rest.byte()? },
        number => {
            rest.take_all();
            MptcpOption::Unknown { number }
        }
    };
    rest.0.is_empty().then_some(decoded)
}

/// RFC 6824 and RFC 8684, section 3.1.
fn capable(version: u8, rest: &mut Rest) -> Option<MptcpOption> {
    let flags = rest.byte()?;
    // Version 1's SYN has no key: it would be one of a later fallback.
    let sender_key = if version == 0 { Some(rest.hex(8)?) } else { rest.hex(8) };
    let receiver_key = rest.hex(8);
    let (mut data_length, mut checksum) = (None, None);
    if version > 0 && receiver_key.is_some() {
        data_length = rest.u16();
        checksum = rest.hex(2);
    }
    if version > 1 {
        // Of a later version only the start is sure to be as it was.
        rest.take_all();
    }
    Some(MptcpOption::Capable {
        version,
        checksum_required: flags & 0x80 != 0,
        deny_join: version > 0 && flags & 0x20 != 0,
        sender_key,
        receiver_key,
        data_length,
        checksum,
    })
}

/// Section 3.2 of both.
fn join(backup: bool, rest: &mut Rest) -> Option<MptcpOption> {
    let address_id = rest.byte()?;
    let (mut token, mut nonce, mut hmac) = (None, None, None);
    match rest.0.len() {
        8 => (token, nonce) = (rest.hex(4), rest.hex(4)),
        12 => (hmac, nonce) = (rest.hex(8), rest.hex(4)),
        20 => {
            // The bits that the others have backup and address id in are reserved here.
            let hmac = rest.hex(20);
            return Some(MptcpOption::Join { backup: None, address_id: None, token, nonce, hmac });
        }
        _ => return None,
    }
    Some(MptcpOption::Join { backup: Some(backup), address_id: Some(address_id), token, nonce, hmac })
}

/// Section 3.3 of both.
fn dss(rest: &mut Rest) -> Option<MptcpOption> {
    let flags = rest.byte()?;
    let has = |bit: u8| flags & bit != 0;
    let data_ack = match has(0x01) {
        true => Some(rest.hex(if has(0x02) { 8 } else { 4 })?),
        false => None,
    };
    let mapping = match has(0x04) {
        true => Some(Mapping {
            data_sequence: rest.hex(if has(0x08) { 8 } else { 4 })?,
            subflow_sequence: rest.u32()?,
            data_length: rest.u16()?,
            // Only the length tells whether there is one.
            checksum: rest.hex(2),
        }),
        false => None,
    };
    Some(MptcpOption::Dss { data_fin: has(0x10), data_ack, mapping })
}

/// Section 3.4.1 of both. Version 0 has the IP version, 4 or 6, where version 1 has the E bit and three reserved ones.
fn add_addr(low: u8, rest: &mut Rest) -> Option<MptcpOption> {
    let version = if matches!(low, 4 | 6) { 0 } else { 1 };
    let echo = version == 1 && low & 1 != 0;
    let address_id = rest.byte()?;
    let has_hmac = version == 1 && !echo;
    let length = rest.0.len().checked_sub(if has_hmac { 8 } else { 0 })?;
    let (is_v6, has_port) = match length {
        4 => (false, false),
        6 => (false, true),
        16 => (true, false),
        18 => (true, true),
        _ => return None,
    };
    if version == 0 && is_v6 != (low == 6) {
        return None;
    }
    let address = match is_v6 {
        true => IpAddr::from(rest.array::<16>()?),
        false => IpAddr::from(rest.array::<4>()?),
    };
    let port = if has_port { rest.u16() } else { None };
    let hmac = if has_hmac { rest.hex(8) } else { None };
    Some(MptcpOption::AddAddr { version, address_id, address, port, echo, hmac })
}

/// What is left of an option. Each method takes from its start, or nothing if there is not enough.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (start, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*start)
    }

    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn hex(&mut self, length: usize) -> Option<Hex> {
        let (start, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(Hex(start.into()))
    }

    fn take_all(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}

/// The subtype's name, or its number where it has none.
fn name(number: u8) -> String {
    SUBTYPES.get(usize::from(number)).map_or_else(|| format!("subtype {number}"), |name| (*name).to_string())
}

impl fmt::Display for MptcpOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Words(f);
        if let Self::Malformed { number, reason } = self {
            let name = number.map_or_else(|| "MPTCP option".into(), name);
            return write!(words.0, "malformed {name} ({reason})");
        }
        words.0.write_str(&self.number().map(name).unwrap_or_default())?;
        match self {
            Self::Capable { version, checksum_required, deny_join, data_length, .. } => {
                write!(words.0, " v{version}")?;
                words.flag("checksum", Some(*checksum_required))?;
                words.flag("deny-join", Some(*deny_join))?;
                words.value("length", data_length.as_ref())
            }
            Self::Join { backup, address_id, token, .. } => {
                words.value("id", address_id.as_ref())?;
                words.flag("backup", *backup)?;
                words.value("token", token.as_ref())
            }
            Self::Dss { data_fin, data_ack, mapping } => {
                words.value("ack", data_ack.as_ref())?;
                if let Some(mapping) = mapping {
                    words.value("seq", Some(&mapping.data_sequence))?;
                    words.value("subflow-seq", Some(&mapping.subflow_sequence))?;
                    words.value("length", Some(&mapping.data_length))?;
                    words.value("checksum", mapping.checksum.as_ref())?;
                }
                words.flag("fin", Some(*data_fin))
            }
            Self::AddAddr { version, address_id, address, port, echo, .. } => {
                words.flag("v0", Some(*version == 0))?;
                write!(words.0, " id {address_id} {address}")?;
                words.value("port", port.as_ref())?;
                words.flag("(echo)", Some(*echo))
            }
            Self::RemoveAddr { address_ids } => address_ids.iter().try_for_each(|id| words.value("id", Some(id))),
            Self::Prio { backup, address_id } => {
                words.0.write_str(if *backup { " backup" } else { " normal" })?;
                words.value("id", address_id.as_ref())
            }
            Self::Fail { data_sequence } => words.value("seq", Some(data_sequence)),
            Self::Reset { transient, reason } => {
                let said = RESET_REASONS.get(usize::from(*reason)).unwrap_or(&"unknown");
                write!(words.0, " reason {reason} ({said})")?;
                words.flag("transient", Some(*transient))
            }
            Self::Fastclose { .. } | Self::Unknown { .. } | Self::Malformed { .. } => Ok(()),
        }
    }
}

/// Words after an option's name.
struct Words<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Words<'_, '_> {
    fn flag(&mut self, word: &str, is_set: Option<bool>) -> fmt::Result {
        if is_set == Some(true) { write!(self.0, " {word}") } else { Ok(()) }
    }

    fn value(&mut self, word: &str, value: Option<impl fmt::Display>) -> fmt::Result {
        value.map_or(Ok(()), |value| write!(self.0, " {word} {value}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::bytes;
    use super::*;
    use crate::kernel::netlink::testing::torment;

    /// Options of real packets and of the RFCs' drawings: hexadecimal, as text, as JSON without the subtype.
    fn known() -> Vec<(&'static str, &'static str, serde_json::Value)> {
        vec![
            // Version 1: SYN, SYN/ACK, ACK, first data, first data with checksum.
            ("1e04 0101", "MP_CAPABLE v1", json!({ "version": 1, "checksum_required": false, "deny_join": false })),
            (
                "1e0c 01a1 0102030405060708",
                "MP_CAPABLE v1 checksum deny-join",
                json!({ "version": 1, "checksum_required": true, "deny_join": true, "sender_key": "0x0102030405060708" }),
            ),
            (
                "1e14 0101 0102030405060708 1112131415161718",
                "MP_CAPABLE v1",
                json!({ "version": 1, "checksum_required": false, "deny_join": false,
                        "sender_key": "0x0102030405060708", "receiver_key": "0x1112131415161718" }),
            ),
            (
                "1e16 0101 0102030405060708 1112131415161718 0400",
                "MP_CAPABLE v1 length 1024",
                json!({ "version": 1, "checksum_required": false, "deny_join": false, "data_length": 1024,
                        "sender_key": "0x0102030405060708", "receiver_key": "0x1112131415161718" }),
            ),
            (
                "1e18 0181 0102030405060708 1112131415161718 0400 abcd",
                "MP_CAPABLE v1 checksum length 1024",
                json!({ "version": 1, "checksum_required": true, "deny_join": false, "data_length": 1024,
                        "sender_key": "0x0102030405060708", "receiver_key": "0x1112131415161718", "checksum": "0xabcd" }),
            ),
            // Version 0: SYN and SYN/ACK, ACK. 0x20 is not a flag there.
            (
                "1e0c 00a1 0102030405060708",
                "MP_CAPABLE v0 checksum",
                json!({ "version": 0, "checksum_required": true, "deny_join": false, "sender_key": "0x0102030405060708" }),
            ),
            (
                "1e14 0001 0102030405060708 1112131415161718",
                "MP_CAPABLE v0",
                json!({ "version": 0, "checksum_required": false, "deny_join": false,
                        "sender_key": "0x0102030405060708", "receiver_key": "0x1112131415161718" }),
            ),
            // A version that nobody has yet.
            (
                "1e06 02a1 abcd",
                "MP_CAPABLE v2 checksum deny-join",
                json!({ "version": 2, "checksum_required": true, "deny_join": true }),
            ),
            (
                "1e0c 1101 1a2b3c4d 00000005",
                "MP_JOIN id 1 backup token 0x1a2b3c4d",
                json!({ "backup": true, "address_id": 1, "token": "0x1a2b3c4d", "nonce": "0x00000005" }),
            ),
            (
                "1e10 1000 0102030405060708 00000005",
                "MP_JOIN id 0",
                json!({ "backup": false, "address_id": 0, "hmac": "0x0102030405060708", "nonce": "0x00000005" }),
            ),
            (
                "1e18 1000 000102030405060708090a0b0c0d0e0f10111213",
                "MP_JOIN",
                json!({ "hmac": "0x000102030405060708090a0b0c0d0e0f10111213" }),
            ),
            ("1e08 2001 00000007", "DSS ack 0x00000007", json!({ "data_fin": false, "data_ack": "0x00000007" })),
            (
                "1e1a 201f 0000000000000007 0000000000000009 00000001 0000",
                "DSS ack 0x0000000000000007 seq 0x0000000000000009 subflow-seq 1 length 0 fin",
                json!({ "data_fin": true, "data_ack": "0x0000000000000007",
                        "mapping": { "data_sequence": "0x0000000000000009", "subflow_sequence": 1, "data_length": 0 } }),
            ),
            (
                "1e10 2004 00000009 00000001 0064 beef",
                "DSS seq 0x00000009 subflow-seq 1 length 100 checksum 0xbeef",
                json!({ "data_fin": false, "mapping":
                        { "data_sequence": "0x00000009", "subflow_sequence": 1, "data_length": 100, "checksum": "0xbeef" } }),
            ),
            // Version 1: with HMAC, its echo without, both families, with port.
            (
                "1e10 3002 0a000202 0102030405060708",
                "ADD_ADDR id 2 10.0.2.2",
                json!({ "version": 1, "address_id": 2, "address": "10.0.2.2", "echo": false, "hmac": "0x0102030405060708" }),
            ),
            (
                "1e08 3102 0a000202",
                "ADD_ADDR id 2 10.0.2.2 (echo)",
                json!({ "version": 1, "address_id": 2, "address": "10.0.2.2", "echo": true }),
            ),
            (
                "1e1e 3003 fd000000000000000000000000000002 1388 0102030405060708",
                "ADD_ADDR id 3 fd00::2 port 5000",
                json!({ "version": 1, "address_id": 3, "address": "fd00::2", "port": 5000, "echo": false,
                        "hmac": "0x0102030405060708" }),
            ),
            (
                "1e16 3103 fd000000000000000000000000000002 1388",
                "ADD_ADDR id 3 fd00::2 port 5000 (echo)",
                json!({ "version": 1, "address_id": 3, "address": "fd00::2", "port": 5000, "echo": true }),
            ),
            // Version 0 has the IP version instead.
            (
                "1e0a 3402 0a000202 1388",
                "ADD_ADDR v0 id 2 10.0.2.2 port 5000",
                json!({ "version": 0, "address_id": 2, "address": "10.0.2.2", "port": 5000, "echo": false }),
            ),
            (
                "1e14 3603 fd000000000000000000000000000002",
                "ADD_ADDR v0 id 3 fd00::2",
                json!({ "version": 0, "address_id": 3, "address": "fd00::2", "echo": false }),
            ),
            ("1e04 4002", "REMOVE_ADDR id 2", json!({ "address_ids": [2] })),
            ("1e06 4002 0305", "REMOVE_ADDR id 2 id 3 id 5", json!({ "address_ids": [2, 3, 5] })),
            ("1e03 51", "MP_PRIO backup", json!({ "backup": true })),
            ("1e03 50", "MP_PRIO normal", json!({ "backup": false })),
            ("1e04 5102", "MP_PRIO backup id 2", json!({ "backup": true, "address_id": 2 })),
            (
                "1e0c 6000 0102030405060708",
                "MP_FAIL seq 0x0102030405060708",
                json!({ "data_sequence": "0x0102030405060708" }),
            ),
            ("1e0c 7000 0102030405060708", "MP_FASTCLOSE", json!({ "receiver_key": "0x0102030405060708" })),
            (
                "1e04 8103",
                "MP_TCPRST reason 3 (administratively prohibited) transient",
                json!({ "transient": true, "reason": 3 }),
            ),
            ("1e04 80c8", "MP_TCPRST reason 200 (unknown)", json!({ "transient": false, "reason": 200 })),
        ]
    }

    #[test]
    fn every_option_of_both_versions() {
        for (hex, text, mut fields) in known() {
            let [option] = &all(&bytes(hex))[..] else { panic!("{hex}: not one option") };
            assert_eq!(option.to_string(), text, "{hex}");
            fields["subtype"] = text.split(' ').next().into();
            assert_eq!(serde_json::to_value(option).unwrap(), fields, "{hex}");
        }
    }

    #[test]
    fn a_length_that_the_subtype_does_not_have_is_malformed() {
        let any: Vec<usize> = (4..=36).collect();
        // The two bytes after the length, and the lengths that belong to them.
        let table: [([u8; 2], &[usize]); 20] = [
            ([0x00, 0x01], &[12, 20]),
            ([0x01, 0x01], &[4, 12, 20, 22, 24]),
            ([0x10, 1], &[12, 16, 24]),
            ([0x11, 1], &[12, 16, 24]),
            ([0x20, 0x00], &[4]),
            ([0x20, 0x01], &[8]),
            ([0x20, 0x03], &[12]),
            ([0x20, 0x04], &[14, 16]),
            ([0x20, 0x0c], &[18, 20]),
            ([0x20, 0x05], &[18, 20]),
            ([0x20, 0x1f], &[26, 28]),
            ([0x30, 2], &[16, 18, 28, 30]),
            ([0x31, 2], &[8, 10, 20, 22]),
            ([0x34, 2], &[8, 10]),
            ([0x36, 2], &[20, 22]),
            ([0x40, 2], &any),
            ([0x50, 2], &[3, 4]),
            ([0x60, 0], &[12]),
            ([0x70, 0], &[12]),
            ([0x80, 0], &[4]),
        ];
        for (start, lengths) in table {
            for length in 3..=36 {
                let mut option = vec![KIND, length as u8, start[0], start[1]];
                option.resize(length, 0xee);
                let [found] = &all(&option)[..] else { panic!("{start:x?} of {length}") };
                let is_malformed = matches!(found, MptcpOption::Malformed { .. });
                assert_eq!(is_malformed, !lengths.contains(&length), "{start:x?} with {length} bytes: {found}");
                let number = start[0] >> 4;
                assert_eq!(found.number(), Some(number));
                if is_malformed {
                    assert_eq!(found.to_string(), format!("malformed {} (it has {length} bytes)", name(number)));
                }
            }
        }
    }

    #[test]
    fn subtypes_of_the_future_are_said_by_number() {
        for number in 9..16u8 {
            let option = [KIND, 4, number << 4, 0];
            assert_eq!(all(&option), [MptcpOption::Unknown { number }]);
            assert_eq!(all(&option)[0].to_string(), format!("subtype {number}"));
        }
    }

    #[test]
    fn among_others_and_until_the_end() {
        // Maximum segment size, padding, MP_PRIO, timestamps, MP_TCPRST, end, MP_PRIO.
        let options = bytes("020405b4 0101 1e0351 080a0000000100000002 1e048000 00 1e0351");
        let words: Vec<String> = all(&options).iter().map(ToString::to_string).collect();
        assert_eq!(words, ["MP_PRIO backup", "MP_TCPRST reason 0 (unspecified)"]);
    }

    #[test]
    fn lengths_that_lead_nowhere() {
        for (hex, words) in [
            ("1e", vec!["malformed MPTCP option (it has no length)"]),
            ("1e00 1e0351", vec!["malformed MPTCP option (its length is 0)"]),
            ("1e01 1e0351", vec!["malformed MPTCP option (its length is 1)"]),
            ("1e02 1e0351", vec!["malformed MPTCP option (its length is 2)", "MP_PRIO backup"]),
            ("1e03", vec!["malformed MPTCP option (its length is 3, with 2 bytes left)"]),
            ("1e0c 1101 1a2b", vec!["malformed MP_JOIN (its length is 12, with 6 bytes left)"]),
            ("1eff 2000", vec!["malformed DSS (its length is 255, with 4 bytes left)"]),
            // Others' lengths end the walk without a word.
            ("0500 1e0351", vec![]),
            ("0501 1e0351", vec![]),
            ("05ff 1e0351", vec![]),
            ("05", vec![]),
        ] {
            let found: Vec<String> = all(&bytes(hex)).iter().map(ToString::to_string).collect();
            assert_eq!(found, words, "{hex}");
        }
    }

    #[test]
    fn torn_and_flipped_options_are_survived() {
        for (hex, ..) in known() {
            torment(&bytes(hex), |options| {
                for option in all(options) {
                    assert!(!option.to_string().is_empty());
                    assert!(serde_json::to_string(&option).is_ok());
                }
            });
        }
    }
}
