//! An interface's name or a glob of names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::shown;

/// `IFNAMSIZ` less the terminating zero.
const NAME_MAX: usize = 15;

/// An interface name in which `*` and `?` stand for any characters and any one character.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(String);

impl Pattern {
    /// Whether it names one interface.
    pub fn is_exact(&self) -> bool {
        !self.0.contains(['*', '?'])
    }

    /// Whether the interface `name` is meant.
    pub fn matches(&self, name: &str) -> bool {
        glob(self.0.as_bytes(), name.as_bytes())
    }

    /// The text as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Glob match with `*` and `?`, linear in the product of the lengths (no backtracking beyond the last star).
pub fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((star_p, star_t)) => {
                    p = star_p + 1;
                    t = star_t + 1;
                    star = Some((star_p, t));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let pattern = Self(text.into());
        let said = shown(text);
        if text.is_empty() || text == "." || text == ".." {
            return Err(format!("\"{said}\" is not an interface name"));
        }
        if let Some(bad) = text.chars().find(|c| c.is_whitespace() || c.is_control() || "/:=,;".contains(*c)) {
            return Err(format!("interface name \"{said}\" has the character {bad:?}"));
        }
        if pattern.is_exact() && text.len() > NAME_MAX || text.len() > 2 * NAME_MAX {
            return Err(format!("interface name \"{said}\" is longer than {NAME_MAX} bytes"));
        }
        if text == "lo" {
            return Err("lo is the loopback interface, which MPTCP never uses as a path".into());
        }
        Ok(pattern)
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        let matches = |pattern: &str, name: &str| pattern.parse::<Pattern>().unwrap().matches(name);
        assert!(matches("eth1", "eth1") && !matches("eth1", "eth10"));
        assert!(matches("eth*", "eth") && matches("eth*", "eth0.100") && !matches("eth*", "wlan0"));
        assert!(matches("*0", "eth0") && matches("e?h?", "eth1") && !matches("e?h?", "eth"));
        assert!(matches("*a*b*", "xxaxxbxx") && !matches("*a*b", "xxaxxbxx"));
    }

    #[test]
    fn names_that_cannot_be() {
        for bad in ["", "..", "a/b", "a b", "eth0\n", "0123456789abcdef", "lo", "eth0=x"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad:?}");
        }
    }
}
