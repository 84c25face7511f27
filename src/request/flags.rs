//! What is asked of one interface: the flag names of ip-mptcp(8), `off`, `default`, or a raw interface flags number.

use std::fmt;
use std::str::FromStr;

use crate::error::shown;

/// `IFF_NOMULTIPATH` of multipath-tcp.org kernels (`include/uapi/linux/if.h` there): the interface is not used.
pub const IFF_NOMULTIPATH: u32 = 0x8_0000;
/// `IFF_MPBACKUP` of multipath-tcp.org kernels: the interface is a backup path.
pub const IFF_MPBACKUP: u32 = 0x10_0000;
/// OpenMPTCProuter's handover bit, which only its patched kernels keep.
pub const IFF_HANDOVER: u32 = 0x20_0000;

/// Endpoint flags, with the values of `MPTCP_PM_ADDR_FLAG_*` in the kernel's `include/uapi/linux/mptcp_pm.h`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct EndpointFlags(pub u32);

impl EndpointFlags {
    /// Announce the address to the peer (ADD_ADDR).
    pub const SIGNAL: Self = Self(1);
    /// Create a subflow from this address.
    pub const SUBFLOW: Self = Self(2);
    /// Subflows from this address carry data only when no other path is left.
    pub const BACKUP: Self = Self(4);
    /// Create a subflow to each address that the peer announced (5.15).
    pub const FULLMESH: Self = Self(8);
    /// Made by the kernel for a subflow on an address without endpoint (5.18).
    pub const IMPLICIT: Self = Self(16);
    /// Use this address for subflows in reply to a received ADD_ADDR (6.18).
    pub const LAMINAR: Self = Self(32);
    /// The flags that SET_FLAGS changes; the kernel ignores the others and reports success.
    pub const CHANGEABLE: Self = Self(4 | 8);

    const NAMES: [(&'static str, Self); 6] = [
        ("signal", Self::SIGNAL),
        ("subflow", Self::SUBFLOW),
        ("backup", Self::BACKUP),
        ("fullmesh", Self::FULLMESH),
        ("implicit", Self::IMPLICIT),
        ("laminar", Self::LAMINAR),
    ];

    /// Whether every bit of `other` is set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits of both.
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The names of the bits that are set, in the order in which people write them.
    pub fn names(self) -> Vec<String> {
        const SHOWN: [usize; 6] = [1, 0, 2, 3, 5, 4];
        let mut names: Vec<String> = SHOWN
            .iter()
            .map(|&i| Self::NAMES[i])
            .filter(|(_, flag)| self.contains(*flag))
            .map(|(name, _)| name.to_string())
            .collect();
        let unknown = self.0 & !0x3f;
        if unknown != 0 {
            names.push(format!("{unknown:#x}"));
        }
        names
    }
}

/// What one interface shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterfaceFlags {
    /// Nothing of ours: as the kernel treats an interface that nobody mentioned.
    Default,
    /// Never a path.
    Off,
    /// A path, with these endpoint flags (completed: `backup` alone stands as `subflow,backup`).
    Endpoint(EndpointFlags),
    /// A raw number that has OpenMPTCProuter's handover bit; only the three MPTCP bits are kept.
    Handover(u32),
}

impl InterfaceFlags {
    /// The interface bits that a multipath-tcp.org kernel shall have, and the mask of those that are ours to change.
    /// None for flags that only an upstream endpoint can have.
    pub fn link_bits(self) -> Option<(u32, u32)> {
        let mask = IFF_NOMULTIPATH | IFF_MPBACKUP;
        match self {
            Self::Default => Some((0, mask)),
            Self::Off => Some((IFF_NOMULTIPATH, mask)),
            Self::Handover(bits) => Some((bits, mask | IFF_HANDOVER)),
            Self::Endpoint(flags) => {
                let link = EndpointFlags::SUBFLOW.union(EndpointFlags::BACKUP);
                if !link.contains(flags) {
                    None
                } else if flags.contains(EndpointFlags::BACKUP) {
                    Some((IFF_MPBACKUP, mask))
                } else {
                    Some((0, mask))
                }
            }
        }
    }

    /// Whether the interface shall never be a path.
    pub fn is_off(self) -> bool {
        match self {
            Self::Off => true,
            Self::Handover(bits) => bits & IFF_NOMULTIPATH != 0,
            Self::Default | Self::Endpoint(_) => false,
        }
    }

    /// The names as `status` shows them: `["subflow","backup"]`, `["off"]`, `["default"]`.
    pub fn names(self) -> Vec<String> {
        match self {
            Self::Default => vec!["default".into()],
            Self::Off => vec!["off".into()],
            Self::Endpoint(flags) => flags.names(),
            Self::Handover(bits) => vec![format!("{bits:#x}")],
        }
    }
}

impl fmt::Display for InterfaceFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(","))
    }
}

/// The words of a list with commas or blanks between them; where nothing stands between two commas, an empty one.
pub fn words(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').flat_map(|part| {
        let empty = part.trim().is_empty().then_some("");
        empty.into_iter().chain(part.split_whitespace())
    })
}

impl FromStr for InterfaceFlags {
    type Err = String;

    /// Reads `FLAG[,FLAG...]` or a raw number. The error is one sentence without a full stop.
    fn from_str(text: &str) -> Result<Self, String> {
        let said = shown(text);
        let words: Vec<&str> = words(text).collect();
        if words.iter().any(|word| word.is_empty()) {
            return Err(format!(
                "\"{said}\" has an empty flag; write subflow, signal, backup, fullmesh, laminar, off, default or a number such as 0x101003"
            ));
        }
        if words[0].starts_with(|c: char| c.is_ascii_digit()) {
            return match words.as_slice() {
                [word] => raw(word),
                _ => Err(format!("\"{said}\" mixes a raw number with other flags")),
            };
        }
        if words.len() == 1 {
            match words[0] {
                "off" => return Ok(Self::Off),
                "default" => return Ok(Self::Default),
                _ => {}
            }
        }
        let mut flags = EndpointFlags::default();
        for word in words {
            match word {
                "off" | "default" => {
                    return Err(format!("\"{said}\": {word} cannot stand beside other flags"));
                }
                "implicit" => return Err("implicit endpoints are made by the kernel alone".into()),
                "nofullmesh" | "nobackup" => {
                    return Err(format!("\"{word}\": leave the flag out instead; what is not asked for is not set"));
                }
                _ => match EndpointFlags::NAMES.iter().find(|(name, _)| *name == word) {
                    Some((_, flag)) => flags = flags.union(*flag),
                    None => {
                        let known = ["subflow", "signal", "backup", "fullmesh", "laminar", "off", "default"];
                        return Err(super::unknown("flag", word, known));
                    }
                },
            }
        }
        if flags.contains(EndpointFlags::SIGNAL) && flags.contains(EndpointFlags::FULLMESH) {
            return Err("signal and fullmesh exclude each other (the kernel rejects an endpoint with both)".into());
        }
        let purpose = flags.0 & (EndpointFlags::SIGNAL.0 | EndpointFlags::SUBFLOW.0 | EndpointFlags::LAMINAR.0);
        if purpose == 0 {
            // The kernel accepts a lone `backup` and then never uses the endpoint.
            flags = flags.union(EndpointFlags::SUBFLOW);
        }
        Ok(Self::Endpoint(flags))
    }
}

/// A number as in `echo 0x101003 > /sys/class/net/eth0/flags`; every bit but MPTCP's is ignored.
fn raw(word: &str) -> Result<InterfaceFlags, String> {
    let number = super::setting::integer(word).and_then(|n| u32::try_from(n).ok()).ok_or_else(|| {
        format!("\"{}\" is not a number of 32 bits; a raw flags value looks like 0x101003", shown(word))
    })?;
    let bits = number & (IFF_NOMULTIPATH | IFF_MPBACKUP | IFF_HANDOVER);
    if bits & (IFF_NOMULTIPATH | IFF_MPBACKUP) == IFF_NOMULTIPATH | IFF_MPBACKUP {
        return Err(format!("{word} has both 0x80000 (off) and 0x100000 (backup); they exclude each other"));
    }
    Ok(match bits {
        0 => InterfaceFlags::Default,
        IFF_MPBACKUP => InterfaceFlags::Endpoint(EndpointFlags::SUBFLOW.union(EndpointFlags::BACKUP)),
        IFF_NOMULTIPATH => InterfaceFlags::Off,
        _ => InterfaceFlags::Handover(bits),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, String> {
        text.parse::<InterfaceFlags>().map(|flags| flags.to_string())
    }

    #[test]
    fn what_is_quoted_has_no_control_characters() {
        for bad in ["\u{1b}[2J,", "\n,", "0x\u{7}", "5,\u{1b}", "\u{1b}", "off,\u{1b}"] {
            let error = bad.parse::<InterfaceFlags>().unwrap_err();
            assert!(!error.contains(char::is_control), "{error:?}");
        }
    }

    #[test]
    fn names_are_completed_to_what_the_kernel_uses() {
        assert_eq!(parse("backup"), Ok("subflow,backup".into()));
        assert_eq!(parse("signal,backup"), Ok("signal,backup".into()));
        assert_eq!(parse("fullmesh"), Ok("subflow,fullmesh".into()));
        assert_eq!(parse("laminar"), Ok("laminar".into()));
        for list in ["subflow,signal", "subflow, signal", "subflow signal", " subflow\tsignal "] {
            assert_eq!(parse(list), Ok("subflow,signal".into()), "{list}");
        }
        assert_eq!(parse("off"), Ok("off".into()));
    }

    #[test]
    fn raw_numbers_follow_the_interface_bits() {
        assert_eq!(parse("0x101003"), Ok("subflow,backup".into()));
        assert_eq!(parse("0x1003"), Ok("default".into()));
        assert_eq!(parse("0x81003"), Ok("off".into()));
        assert_eq!(parse("1052675"), parse("0x101003"));
        assert_eq!(parse("0x301003"), Ok("0x300000".into()));
        assert!(parse("0x181003").unwrap_err().contains("exclude"));
        assert!(parse("0xZZ").is_err());
        assert!(parse("0x100000000").is_err());
        assert!(parse("0x101003,backup").is_err());
    }

    #[test]
    fn contradictions_and_typos_are_errors() {
        for bad in ["signal,fullmesh", "off,backup", "default,subflow", "", "backup,", "implicit", "backup ,, subflow"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse("bakup").unwrap_err().contains("did you mean backup"));
    }

    #[test]
    fn link_bits_exist_only_for_what_an_interface_can_say() {
        let bits = |text: &str| text.parse::<InterfaceFlags>().unwrap().link_bits();
        assert_eq!(bits("backup"), Some((IFF_MPBACKUP, 0x18_0000)));
        assert_eq!(bits("subflow"), Some((0, 0x18_0000)));
        assert_eq!(bits("off"), Some((IFF_NOMULTIPATH, 0x18_0000)));
        assert_eq!(bits("0x200000"), Some((IFF_HANDOVER, 0x38_0000)));
        assert_eq!(bits("signal"), None);
        assert_eq!(bits("fullmesh"), None);
    }
}
