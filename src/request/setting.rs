//! A kernel setting: a net.* sysctl or an MPTCP module's parameter, its name, its file and its values.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::shown;

/// The longest value that is passed on; the kernel's own buffers for these files are one page.
const VALUE_MAX: usize = 4096;

/// The longest sysctl key, in bytes: the name of its lock in the ledger, which has some more, has to be a file's name.
const KEY_MAX: usize = 240;

/// What people are shown of a value, in characters.
const SHOWN_MAX: usize = 160;

/// The name of one setting. It serializes as its `Display` form, which `parse` reads back.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SettingKey {
    /// Path below `/proc/sys`, slash form: `net/ipv4/conf/eth0.100/rp_filter`.
    Sysctl(String),
    /// `/sys/module/MODULE/parameters/PARAM`.
    Module(String, String),
}

impl SettingKey {
    /// Reads a sysctl key: a short name (`scheduler` = `net.mptcp.scheduler`), dotted, or slash form; the separator
    /// that comes first decides, and the other one is literal or means a dot, as sysctl(8) has it.
    pub fn sysctl(key: &str) -> Result<Self, String> {
        let path = match key.find(['.', '/']) {
            None => format!("net/mptcp/{key}"),
            Some(at) if key.as_bytes()[at] == b'/' => {
                key.trim_start_matches('/').trim_start_matches("proc/sys/").to_string()
            }
            Some(_) if key.contains('/') => key
                .chars()
                .map(|c| match c {
                    '.' => '/',
                    '/' => '.',
                    other => other,
                })
                .collect(),
            Some(_) => key.replace('.', "/"),
        };
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(format!("sysctl key \"{}\" has an empty, \".\" or \"..\" part", shown(key)));
        }
        let is_fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '@' | '/');
        if let Some(bad) = path.chars().find(|&c| !is_fine(c)) {
            return Err(format!("sysctl key \"{}\" has the character {bad:?}", shown(key)));
        }
        if path.len() > KEY_MAX {
            return Err(format!("the sysctl key is longer than {KEY_MAX} characters"));
        }
        if !path.starts_with("net/") {
            return Err(format!("{key} is not a net.* sysctl; only those and MPTCP module parameters may be set here"));
        }
        let dotted = !key.contains('/') && path.bytes().filter(|&byte| byte == b'/').count() > 4;
        let parts: Vec<&str> = if dotted { path.split('/').collect() } else { Vec::new() };
        if dotted && matches!(parts[2], "conf" | "neigh") {
            let name = parts[3..parts.len() - 1].join(".");
            return Err(format!(
                "{key} could be two files; for the interface {name} write {}/{name}/{}",
                parts[..3].join("/"),
                parts[parts.len() - 1]
            ));
        }
        Ok(Self::Sysctl(path))
    }

    /// Reads `MODULE.PARAM` of an MPTCP module.
    pub fn module(key: &str) -> Result<Self, String> {
        let word = |text: &str| {
            !text.is_empty() && text.len() <= 64 && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        match key.split_once('.') {
            Some((module, param)) if word(module) && word(param) => {
                if module == "mptcp" || module.starts_with("mptcp_") {
                    Ok(Self::Module(module.into(), param.into()))
                } else {
                    Err(format!(
                        "{module} is not an MPTCP module; only mptcp and mptcp_* modules' parameters may be set here"
                    ))
                }
            }
            _ => Err(format!("\"{}\" is not MODULE.PARAM, such as mptcp_fullmesh.num_subflows", shown(key))),
        }
    }

    /// The file of the setting. A sysctl's file follows the network namespace of the thread that opens it.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Sysctl(path) => PathBuf::from(format!("/proc/sys/{path}")),
            Self::Module(module, param) => PathBuf::from(format!("/sys/module/{module}/parameters/{param}")),
        }
    }

    /// The sysctl's path below `/proc/sys`, if it is one.
    pub fn sysctl_path(&self) -> Option<&str> {
        match self {
            Self::Sysctl(path) => Some(path),
            Self::Module(..) => None,
        }
    }
}

impl fmt::Display for SettingKey {
    /// Dotted where that is unambiguous, else the slash form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl(path) if path.contains('.') || SettingKey::sysctl(&path.replace('/', ".")).is_err() => {
                f.write_str(path)
            }
            Self::Sysctl(path) => f.write_str(&path.replace('/', ".")),
            Self::Module(module, param) => write!(f, "module:{module}.{param}"),
        }
    }
}

impl From<SettingKey> for String {
    fn from(key: SettingKey) -> Self {
        key.to_string()
    }
}

impl TryFrom<String> for SettingKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.strip_prefix("module:") {
            Some(key) => Self::module(key),
            None => Self::sysctl(&text),
        }
    }
}

/// Checks a value before anything else looks at it. White space is folded, because the kernel reads any as a separator.
pub fn value(key: &SettingKey, text: &str) -> Result<String, String> {
    if text.len() > VALUE_MAX {
        return Err(format!("the value for {key} is longer than {VALUE_MAX} bytes"));
    }
    if text.chars().any(|c| c.is_control() && c != '\t') {
        return Err(format!("the value \"{}\" for {key} has a line break or control character", shown(text)));
    }
    let folded = fold(text);
    if folded.is_empty() {
        return Err(format!("the value for {key} is empty"));
    }
    Ok(folded)
}

/// White space folded to single spaces, none at the ends.
pub fn fold(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// An integer as the kernel's `kstrtol` with base 0 reads it: decimal, 0x hexadecimal, 0 octal, with an optional sign.
pub fn integer(text: &str) -> Option<i128> {
    let (sign, digits) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    let number = if let Some(hex) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        plain(hex, 16)?
    } else if digits.len() > 1 && digits.starts_with('0') {
        plain(&digits[1..], 8)?
    } else {
        plain(digits, 10)?
    };
    Some(sign * number)
}

fn plain(digits: &str, radix: u32) -> Option<i128> {
    // from_str_radix would take a second sign.
    if digits.starts_with(['+', '-']) {
        return None;
    }
    i128::from_str_radix(digits, radix).ok()
}

/// Whether two values of `key` are the same to the kernel: field by field, integers by their value.
pub fn same(key: &SettingKey, a: &str, b: &str) -> bool {
    if a == b {
        return true;
    }
    let (a, b): (Vec<&str>, Vec<&str>) = (a.split_whitespace().collect(), b.split_whitespace().collect());
    a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| same_field(key, a, b))
}

fn same_field(key: &SettingKey, a: &str, b: &str) -> bool {
    match (integer(a), integer(b)) {
        (Some(a), Some(b)) if is_enabled_bits(key) => a & 0xf == b & 0xf,
        (Some(a), Some(b)) => a == b,
        _ if matches!(key, SettingKey::Module(..)) => {
            let truth = |text: &str| match text {
                "Y" | "y" | "1" => Some(true),
                "N" | "n" | "0" => Some(false),
                _ => None,
            };
            a == b || truth(a).is_some() && truth(a) == truth(b)
        }
        _ => a == b,
    }
}

/// Whether `wanted` has the form of the `present` value: as many fields, numbers where numbers stand. The kernel would
/// take `5 junk` as 5 and report success.
pub fn fits(key: &SettingKey, wanted: &str, present: &str) -> Result<(), String> {
    let (w, p): (Vec<&str>, Vec<&str>) = (wanted.split_whitespace().collect(), present.split_whitespace().collect());
    // A file that is empty now (an unset string) says nothing of its form.
    if p.is_empty() {
        return Ok(());
    }
    if w.len() != p.len() {
        return Err(format!("{key} has {} and \"{wanted}\" has {}", count(p.len(), "field"), count(w.len(), "field")));
    }
    for (w, p) in w.iter().zip(&p) {
        // A list or range of numbers (ports) may follow a single one; the kernel judges it.
        let is_list = w.chars().all(|c| c.is_ascii_digit() || c == ',' || c == '-');
        if integer(p).is_some() && integer(w).is_none() && !is_list {
            return Err(format!("{key} is a number (now {present}) and \"{w}\" is none"));
        }
    }
    Ok(())
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// `net.mptcp.mptcp_enabled` of multipath-tcp.org kernels is a field of bits (v0.96, `include/net/mptcp.h`).
pub fn is_enabled_bits(key: &SettingKey) -> bool {
    key.sysctl_path() == Some("net/mptcp/mptcp_enabled")
}

/// A value for people: the bits of `mptcp_enabled` by name, everything else as it is, cut where nobody would read on.
pub fn describe(key: &SettingKey, value: &str) -> String {
    match integer(value) {
        Some(bits) if is_enabled_bits(key) => {
            let names: Vec<&str> = [(1, "on"), (2, "by socket option only"), (4, "no clients"), (8, "no servers")]
                .iter()
                .filter(|(bit, _)| bits & bit != 0)
                .map(|(_, name)| *name)
                .collect();
            format!("{value} ({})", if names.is_empty() { "off".into() } else { names.join(", ") })
        }
        _ => match value.char_indices().nth(SHOWN_MAX) {
            Some((end, _)) => format!("{}…", &value[..end]),
            None => value.into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysctl(key: &str) -> String {
        match SettingKey::sysctl(key) {
            Ok(SettingKey::Sysctl(path)) => path,
            other => panic!("{key}: {other:?}"),
        }
    }

    #[test]
    fn keys_name_one_file() {
        assert_eq!(sysctl("scheduler"), "net/mptcp/scheduler");
        assert_eq!(sysctl("net.ipv4.tcp_rmem"), "net/ipv4/tcp_rmem");
        assert_eq!(sysctl("net/ipv4/conf/eth0.100/rp_filter"), "net/ipv4/conf/eth0.100/rp_filter");
        assert_eq!(sysctl("net.ipv4.conf.eth0/100.rp_filter"), "net/ipv4/conf/eth0.100/rp_filter");
        assert_eq!(sysctl("/proc/sys/net/core/rmem_max"), "net/core/rmem_max");
        let error = SettingKey::sysctl("net.ipv4.conf.eth0.100.rp_filter").unwrap_err();
        assert!(error.contains("net/ipv4/conf/eth0.100/rp_filter"), "{error}");
    }

    #[test]
    fn keys_outside_are_refused() {
        for bad in [
            "kernel.hostname",
            "net.ipv4..x",
            "net/../kernel/hostname",
            "../x",
            "net/ipv4/\n",
            "vm.swappiness",
            "",
            "net.mptcp.a b",
            "net/..",
            "...",
        ] {
            assert!(SettingKey::sysctl(bad).is_err(), "{bad:?}");
        }
        for bad in ["mptcp_fullmesh", "tcp_bbr.x", "mptcp_x/..y.z", "mptcp_fullmesh.", ".x", "mptcp_a.b.c"] {
            assert!(SettingKey::module(bad).is_err(), "{bad:?}");
        }
        assert!(SettingKey::module("mptcp_fullmesh.num_subflows").is_ok());
    }

    #[test]
    fn display_is_read_back() {
        for key in [
            "net.mptcp.scheduler",
            "net/ipv4/conf/eth0.100/rp_filter",
            "net/ipv4/conf/a/b/c",
            "module:mptcp_rr.cwnd_limited",
        ] {
            assert_eq!(SettingKey::try_from(key.to_string()).unwrap().to_string(), key);
        }
    }

    #[test]
    fn integers_as_the_kernel_reads_them() {
        assert_eq!(integer("0x10"), Some(16));
        assert_eq!(integer("010"), Some(8));
        assert_eq!(integer("-1"), Some(-1));
        assert_eq!(integer("0"), Some(0));
        for bad in ["", "-", "0x", "5x", "--5", "0x-5", "09"] {
            assert_eq!(integer(bad), None, "{bad}");
        }
    }

    #[test]
    fn values_are_compared_by_field() {
        let rmem = SettingKey::sysctl("net.ipv4.tcp_rmem").unwrap();
        assert!(same(&rmem, "4096 0x20000 6291456", "4096\t131072\t6291456"));
        assert!(!same(&rmem, "4096 131072", "4096\t131072\t6291456"));
        assert!(fits(&rmem, "1 2", "4096\t131072\t6291456").is_err());
        let enabled = SettingKey::sysctl("net.mptcp.enabled").unwrap();
        assert!(fits(&enabled, "1 junk", "1").is_err());
        assert!(fits(&enabled, "yes", "1").is_err());
        assert!(fits(&enabled, "0x1", "0").is_ok());
        assert!(value(&enabled, "1\n0").is_err());
        assert!(value(&enabled, " ").is_err());
        let param = SettingKey::module("mptcp_rr.cwnd_limited").unwrap();
        assert!(same(&param, "1", "Y"));
        assert!(!same(&param, "0", "Y"));
    }

    #[test]
    fn mptcp_enabled_is_compared_and_named_by_its_bits() {
        let key = SettingKey::sysctl("mptcp_enabled").unwrap();
        assert!(same(&key, "1", "0x11"));
        assert!(!same(&key, "1", "5"));
        assert_eq!(describe(&key, "5"), "5 (on, no clients)");
        assert_eq!(describe(&key, "0"), "0 (off)");
        assert_eq!(describe(&key, &"ä".repeat(4000)), format!("{}…", "ä".repeat(160)));
    }
}
