//! What is asked for: wishes that keep their source, merged into one request.

pub mod annotations;
pub mod flags;
pub mod pattern;
pub mod setting;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::error::{shown, usage};
use flags::InterfaceFlags;
use pattern::Pattern;
use setting::SettingKey;

/// The most that `subflows` and `add_addr_accepted` can be (`MPTCP_PM_ADDR_MAX` in the kernel's `net/mptcp/protocol.h`).
pub const LIMIT_MAX: u32 = 8;

/// The most wishes that one container may have. An annotation has room for tens of thousands; each of them costs time in the
/// container's start and stands in the ledger.
pub const WISHES_MAX: usize = 256;

/// Who may say something, from the least to the most weighty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rank {
    /// `linux.sysctl` of the bundle: the runtime writes it (runc after the hook), whatever we do. And gateways that an
    /// engine has written down.
    Runtime,
    /// `defaults` of the policy file.
    PolicyDefault,
    /// The container author's annotations.
    Annotation,
    /// Arguments on the hook's line or in its JSON.
    HookArgument,
    /// `/etc/mptcp-hook/containers.d/NAME.toml`.
    ContainerFile,
    /// `mptcp-hook apply` by hand.
    CommandLine,
}

impl Rank {
    /// Whether the administrator said it; annotations are the container author's.
    pub fn is_administrator(self) -> bool {
        self != Self::Annotation
    }
}

/// Where a wish comes from, with the words for people: `annotation mptcp-hook/interface.eth1`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Weight and trust.
    pub rank: Rank,
    /// Where exactly, for messages.
    pub place: String,
}

impl Source {
    /// A source of `rank` at `place`.
    pub fn new(rank: Rank, place: impl Into<String>) -> Self {
        Self { rank, place: place.into() }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)
    }
}

/// A limit of the in-kernel path manager, per network namespace (ip-mptcp(8)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Additional subflows per connection.
    Subflows,
    /// ADD_ADDR suboptions accepted per connection.
    AddAddrAccepted,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Subflows => "subflows",
            Self::AddAddrAccepted => "add_addr_accepted",
        })
    }
}

/// What happens when a shared setting is held at another value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnConflict {
    /// The container does not start (exit 3).
    Refuse,
    /// The value stays, nothing is claimed, the container starts.
    Warn,
    /// The value changes; every holder is named and keeps its claim.
    Override,
}

impl fmt::Display for OnConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refuse => "refuse",
            Self::Warn => "warn",
            Self::Override => "override",
        })
    }
}

impl std::str::FromStr for OnConflict {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "warn" => Ok(Self::Warn),
            "override" => Ok(Self::Override),
            _ => Err(format!("\"{}\" is not refuse, warn or override", shown(text))),
        }
    }
}

/// Whether the agent keeps a container as it was asked for while links and addresses come and go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Follow {
    /// Where something is pending, or an address may go or change.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// Not at all.
    Never,
}

impl Follow {
    /// The words, for messages.
    pub const WORDS: &'static str = "auto, always or never";
}

impl fmt::Display for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        })
    }
}

impl std::str::FromStr for Follow {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err(format!("\"{}\" is not {}", shown(text), Self::WORDS)),
        }
    }
}

/// Whether interfaces get a way out of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Routes {
    /// Where packets from an interface's address would not leave by it.
    Auto,
    /// No.
    #[default]
    Off,
}

impl Routes {
    /// The words, for messages.
    pub const WORDS: &'static str = "auto or off";
}

impl fmt::Display for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Off => "off",
        })
    }
}

impl std::str::FromStr for Routes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => Err(format!("\"{}\" is not {}", shown(text), Self::WORDS)),
        }
    }
}

/// One thing asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Flags for the interfaces of that name or glob.
    Interface(Pattern, #[serde(with = "as_text")] InterfaceFlags),
    /// A limit, 0 to [`LIMIT_MAX`].
    Limit(Limit, u32),
    /// A sysctl's or module parameter's value.
    Setting(SettingKey, String),
    /// What to do on a conflict.
    OnConflict(OnConflict),
    /// The next hop of the interfaces of that name or glob.
    Gateway(Pattern, IpAddr),
    /// Whether interfaces get a way out of their own.
    Routes(Routes),
    /// Whether the agent follows it.
    Follow(Follow),
    /// The name to show.
    Name(String),
}

impl What {
    /// What two wishes must have in common to contradict each other.
    pub fn subject(&self) -> String {
        match self {
            Self::Interface(pattern, _) => format!("interface {pattern}"),
            Self::Limit(limit, _) => format!("limit {limit}"),
            Self::Setting(key, _) => key.to_string(),
            Self::OnConflict(_) => "on-conflict".into(),
            Self::Gateway(pattern, gateway) => {
                format!("{} gateway of {pattern}", if gateway.is_ipv4() { "IPv4" } else { "IPv6" })
            }
            Self::Routes(_) => "routes".into(),
            Self::Follow(_) => "follow".into(),
            Self::Name(_) => "name".into(),
        }
    }

    /// The value, for messages.
    pub fn value(&self) -> String {
        match self {
            Self::Interface(_, flags) => flags.to_string(),
            Self::Limit(_, n) => n.to_string(),
            Self::Setting(key, value) => setting::describe(key, value),
            Self::OnConflict(what) => what.to_string(),
            Self::Gateway(_, gateway) => gateway.to_string(),
            Self::Routes(routes) => routes.to_string(),
            Self::Follow(follow) => follow.to_string(),
            Self::Name(name) => name.clone(),
        }
    }

    fn agrees(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Setting(key, a), Self::Setting(_, b)) => setting::same(key, a, b),
            _ => self == other,
        }
    }
}

/// A wish and whose it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// What is asked.
    pub what: What,
    /// Who asks.
    pub source: Source,
}

impl Wish {
    /// A wish of `source`.
    pub fn new(what: What, source: Source) -> Self {
        Self { what, source }
    }
}

/// All wishes of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    wishes: Vec<Wish>,
}

impl Request {
    /// Gives back the memory that reading has set aside for more.
    pub fn shrink(&mut self) {
        self.wishes.shrink_to_fit();
    }

    /// Adds a wish. Two of the same rank about the same thing must agree, and there are at most [`WISHES_MAX`], else it is a
    /// wrong usage (exit 2).
    pub fn add(&mut self, wish: Wish) -> anyhow::Result<()> {
        let subject = wish.what.subject();
        let twin =
            self.wishes.iter().find(|other| other.source.rank == wish.source.rank && other.what.subject() == subject);
        match twin {
            Some(other) if other.what.agrees(&wish.what) => Ok(()),
            Some(other) => Err(usage(format!(
                "{subject} is asked to be {} by {} and {} by {}; they must agree",
                other.what.value(),
                other.source,
                wish.what.value(),
                wish.source
            ))),
            None if self.wishes.len() == WISHES_MAX => Err(usage(format!(
                "more than {WISHES_MAX} things are asked for; the first too many is {} by {}",
                shown(&subject),
                wish.source
            ))),
            None => {
                self.wishes.push(wish);
                Ok(())
            }
        }
    }

    /// Adds all wishes.
    pub fn extend(&mut self, wishes: impl IntoIterator<Item = Wish>) -> anyhow::Result<()> {
        wishes.into_iter().try_for_each(|wish| self.add(wish))
    }

    /// This request on top of what the same instance asked for before. What is said again by hand, in a file or in
    /// the policy replaces what was said there; hook entries and annotations of one instance have to agree.
    pub fn on_top_of(self, earlier: &Request) -> anyhow::Result<Request> {
        let mut merged = Request::default();
        let replaces =
            |rank: Rank| matches!(rank, Rank::CommandLine | Rank::ContainerFile | Rank::PolicyDefault | Rank::Runtime);
        for old in &earlier.wishes {
            let said_again = self.wishes.iter().any(|new| {
                new.source.rank == old.source.rank
                    && replaces(new.source.rank)
                    && new.what.subject() == old.what.subject()
            });
            if !said_again {
                merged.wishes.push(old.clone());
            }
        }
        merged.extend(self.wishes)?;
        Ok(merged)
    }

    /// All wishes, as they were added.
    pub fn wishes(&self) -> &[Wish] {
        &self.wishes
    }

    /// Whether nothing is asked that would need anything done: how to go about it changes nothing by itself, and what
    /// the runtime writes is not ours.
    pub fn is_empty(&self) -> bool {
        let does_something = |what: &What| matches!(what, What::Interface(..) | What::Limit(..) | What::Setting(..));
        !self.wishes.iter().any(|wish| wish.source.rank != Rank::Runtime && does_something(&wish.what))
    }

    /// Whether only the policy's defaults ask for anything.
    pub fn is_only_defaults(&self) -> bool {
        self.wishes.iter().all(|wish| wish.source.rank <= Rank::PolicyDefault)
    }

    /// The wish for the interface `name`: the weightiest source; in it an exact name before a glob; globs must agree.
    pub fn interface(&self, name: &str) -> anyhow::Result<Option<(&Wish, InterfaceFlags)>> {
        let mut best: Option<(&Wish, InterfaceFlags, &Pattern)> = None;
        for wish in &self.wishes {
            let What::Interface(pattern, flags) = &wish.what else { continue };
            if !pattern.matches(name) {
                continue;
            }
            let weight = |wish: &Wish, pattern: &Pattern| (wish.source.rank, pattern.is_exact());
            match &best {
                Some((other, other_flags, other_pattern)) => {
                    let (new, old) = (weight(wish, pattern), weight(other, other_pattern));
                    if new == old && flags != other_flags {
                        return Err(usage(format!(
                            "interface {name} matches {other_pattern}={other_flags} ({}) and {pattern}={flags} ({}); name it exactly in one of them",
                            other.source, wish.source
                        )));
                    }
                    if new > old {
                        best = Some((wish, *flags, pattern));
                    }
                }
                None => best = Some((wish, *flags, pattern)),
            }
        }
        Ok(best.map(|(wish, flags, _)| (wish, flags)))
    }

    /// The interface patterns that are asked for, the weightiest wish of each.
    pub fn patterns(&self) -> BTreeMap<&Pattern, (&Wish, InterfaceFlags)> {
        let mut patterns: BTreeMap<&Pattern, (&Wish, InterfaceFlags)> = BTreeMap::new();
        for wish in &self.wishes {
            if let What::Interface(pattern, flags) = &wish.what {
                let entry = patterns.entry(pattern).or_insert((wish, *flags));
                if wish.source.rank > entry.0.source.rank {
                    *entry = (wish, *flags);
                }
            }
        }
        patterns
    }

    /// The next hop of an interface that is asked for by those who `may` name one: the weightiest source; in it an exact
    /// name before a glob.
    pub fn gateway(&self, name: &str, is_v4: bool, may: impl Fn(&Source) -> bool) -> Option<(&Wish, IpAddr)> {
        self.next_hop(name, is_v4, |source| source.rank != Rank::Runtime && may(source))
    }

    /// The next hop of an interface that the engine has written down.
    pub fn engines_gateway(&self, name: &str, is_v4: bool) -> Option<IpAddr> {
        self.next_hop(name, is_v4, |source| source.rank == Rank::Runtime).map(|(_, gateway)| gateway)
    }

    fn next_hop(&self, name: &str, is_v4: bool, of: impl Fn(&Source) -> bool) -> Option<(&Wish, IpAddr)> {
        let asked = self.wishes.iter().filter(|wish| of(&wish.source)).filter_map(|wish| match &wish.what {
            What::Gateway(pattern, gateway) if pattern.matches(name) && gateway.is_ipv4() == is_v4 => {
                Some(((wish.source.rank, pattern.is_exact()), (wish, *gateway)))
            }
            _ => None,
        });
        asked.max_by_key(|(weight, _)| *weight).map(|(_, found)| found)
    }

    /// The wish for ways out, if there is one.
    pub fn asked_routes(&self) -> Option<(&Wish, Routes)> {
        self.weightiest(|what| match what {
            What::Routes(routes) => Some(*routes),
            _ => None,
        })
    }

    /// The weightiest wish for a limit.
    pub fn limit(&self, limit: Limit) -> Option<(&Wish, u32)> {
        self.weightiest(|what| match what {
            What::Limit(which, n) if *which == limit => Some(*n),
            _ => None,
        })
    }

    /// The weightiest wish for each setting. What the runtime will write comes apart: see [`Request::runtime_settings`].
    pub fn settings(&self) -> BTreeMap<&SettingKey, (&Wish, &str)> {
        let mut settings: BTreeMap<&SettingKey, (&Wish, &str)> = BTreeMap::new();
        for wish in self.wishes.iter().filter(|wish| wish.source.rank != Rank::Runtime) {
            if let What::Setting(key, value) = &wish.what {
                let entry = settings.entry(key).or_insert((wish, value));
                if wish.source.rank > entry.0.source.rank {
                    *entry = (wish, value);
                }
            }
        }
        settings
    }

    /// The settings that the runtime itself writes (`linux.sysctl`).
    pub fn runtime_settings(&self) -> impl Iterator<Item = (&SettingKey, &Wish, &str)> {
        self.wishes.iter().filter(|wish| wish.source.rank == Rank::Runtime).filter_map(|wish| match &wish.what {
            What::Setting(key, value) => Some((key, wish, value.as_str())),
            _ => None,
        })
    }

    /// What `on-conflict` says of a wish of `rank`. An administrator's wish is never steered by an annotation.
    pub fn on_conflict(&self, rank: Rank) -> Option<(&Wish, OnConflict)> {
        self.weightiest_of(
            |what| match what {
                What::OnConflict(what) => Some(*what),
                _ => None,
            },
            |wish| wish.source.rank.is_administrator() || !rank.is_administrator(),
        )
    }

    /// Whether the agent shall follow the container.
    pub fn follow(&self) -> Follow {
        let asked = self.weightiest(|what| match what {
            What::Follow(follow) => Some(*follow),
            _ => None,
        });
        asked.map(|(_, follow)| follow).unwrap_or_default()
    }

    /// The name to show, if one was given.
    pub fn name(&self) -> Option<&str> {
        self.asked_name().and_then(|wish| match &wish.what {
            What::Name(name) => Some(name.as_str()),
            _ => None,
        })
    }

    /// Whether the name to show is the container author's word alone.
    pub fn is_named_by_annotation(&self) -> bool {
        self.asked_name().is_some_and(|wish| !wish.source.rank.is_administrator())
    }

    fn asked_name(&self) -> Option<&Wish> {
        self.weightiest(|what| matches!(what, What::Name(_)).then_some(())).map(|(wish, ())| wish)
    }

    fn weightiest<T>(&self, pick: impl Fn(&What) -> Option<T>) -> Option<(&Wish, T)> {
        self.weightiest_of(pick, |_| true)
    }

    fn weightiest_of<T>(
        &self,
        pick: impl Fn(&What) -> Option<T>,
        counts: impl Fn(&Wish) -> bool,
    ) -> Option<(&Wish, T)> {
        self.wishes
            .iter()
            .filter(|wish| counts(wish))
            .filter_map(|wish| pick(&wish.what).map(|value| (wish, value)))
            .max_by_key(|(wish, _)| wish.source.rank)
    }
}

/// Reads one `limit`.
pub fn limit(name: &str, value: &str) -> Result<What, String> {
    let which = match name {
        "subflows" => Limit::Subflows,
        "add_addr_accepted" => Limit::AddAddrAccepted,
        _ => return Err(unknown("limit", name, ["subflows", "add_addr_accepted"])),
    };
    match setting::integer(value.trim()) {
        Some(n) if (0..=LIMIT_MAX.into()).contains(&n) => Ok(What::Limit(which, n as u32)),
        _ => Err(format!(
            "limit {which}=\"{}\" is not a number from 0 to {LIMIT_MAX} (the kernel's maximum)",
            shown(value)
        )),
    }
}

/// Reads the wishes for an interface: `NAME` and `FLAG[,FLAG...][,gateway=ADDRESS]`, with a gateway for each family. Blanks
/// separate as well: podman before 5.0 splits an annotation at its commas.
pub fn interface(name: &str, flags: &str) -> Result<Vec<What>, String> {
    let pattern: Pattern = name.trim().parse()?;
    let mut words = Vec::new();
    let mut gateways = Vec::new();
    for word in flags::words(flags) {
        let Some(text) = word.strip_prefix("gateway=") else {
            words.push(word);
            continue;
        };
        let gateway: IpAddr = text
            .trim()
            .parse()
            .map_err(|_| format!("interface {pattern}: gateway=\"{}\" is not an IP address", shown(text)))?;
        if gateway.is_unspecified() || gateway.is_multicast() || gateway.is_loopback() {
            return Err(format!("interface {pattern}: gateway={gateway} cannot be a next hop"));
        }
        if gateways.iter().any(|known: &IpAddr| known.is_ipv4() == gateway.is_ipv4()) {
            return Err(format!("interface {pattern} has two gateways of one family"));
        }
        gateways.push(gateway);
    }
    let flags = words.join(",").parse().map_err(|e| format!("interface {pattern}: {e}"))?;
    let gateways = gateways.into_iter().map(|gateway| What::Gateway(pattern.clone(), gateway));
    Ok([What::Interface(pattern.clone(), flags)].into_iter().chain(gateways).collect())
}

/// Reads one sysctl wish.
pub fn sysctl(key: &str, value: &str) -> Result<What, String> {
    let key = SettingKey::sysctl(key.trim())?;
    let value = setting::value(&key, value)?;
    Ok(What::Setting(key, value))
}

/// Reads one module parameter wish.
pub fn module(key: &str, value: &str) -> Result<What, String> {
    let key = SettingKey::module(key.trim())?;
    let value = setting::value(&key, value)?;
    Ok(What::Setting(key, value))
}

/// Reads the name to show.
pub fn name(text: &str) -> Result<What, String> {
    if text.is_empty() || text.len() > 200 || text.chars().any(|c| c.is_control() || c == '/') {
        return Err(format!("name \"{}\" is empty, too long, or has a / or control character", shown(text)));
    }
    Ok(What::Name(text.into()))
}

/// An option of which this version has one value alone.
pub struct PartlyBuilt {
    name: &'static str,
    built: &'static str,
    known: &'static [&'static str],
}

const PARTLY_BUILT: [PartlyBuilt; 1] =
    [PartlyBuilt { name: "mptcp", built: "default", known: &["default", "off", "force"] }];

/// The partly built option of that name, if there is one.
pub fn partly_built(name: &str) -> Option<&'static PartlyBuilt> {
    PARTLY_BUILT.iter().find(|option| option.name == name)
}

impl PartlyBuilt {
    /// Checks a value: what is not built says so instead of pretending.
    pub fn check(&self, value: &str) -> Result<(), String> {
        let Self { name, built, .. } = self;
        if value == *built {
            Ok(())
        } else if self.known.contains(&value) {
            Err(format!("{name}={value} is not in this version yet; it knows only {name}={built}"))
        } else {
            Err(format!("{name}=\"{}\" is not one of {}", shown(value), self.values()))
        }
    }

    /// All its values, for messages.
    pub fn values(&self) -> String {
        self.known.join(", ")
    }
}

/// "unknown THING" with the nearest known one.
pub fn unknown<const N: usize>(thing: &str, word: &str, known: [&str; N]) -> String {
    let said = shown(word);
    match nearest(word, known) {
        Some(near) => format!("unknown {thing} \"{said}\"; did you mean {near}?"),
        None => format!("unknown {thing} \"{said}\"; known are {}", known.join(", ")),
    }
}

/// The known word nearest to `word`, if one is near enough to be what was meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= 2.max(candidate.len() / 3))
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance; hostile lengths are cut, since nothing long is near anything known.
pub fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let next = (diagonal + usize::from(ca != *cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()] + a.chars().count().saturating_sub(64)
}

/// Flags as the text that people write, so that records stay readable.
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use std::fmt::Display;
    use std::str::FromStr;

    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err = String>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(what: Result<What, String>, rank: Rank) -> Wish {
        Wish::new(what.unwrap(), Source::new(rank, format!("{rank:?}")))
    }

    fn interface(name: &str, flags: &str) -> Result<What, String> {
        super::interface(name, flags).map(|mut wishes| wishes.remove(0))
    }

    #[test]
    fn gateways_are_wishes_of_their_own() {
        let read = |flags: &str| super::interface("eth1", flags);
        let wishes = read("backup, gateway=10.0.2.1,gateway=fd00:2::1").unwrap();
        let said: Vec<String> = wishes.iter().map(|what| format!("{}={}", what.subject(), what.value())).collect();
        assert_eq!(
            said,
            ["interface eth1=subflow,backup", "IPv4 gateway of eth1=10.0.2.1", "IPv6 gateway of eth1=fd00:2::1"]
        );
        for bad in ["backup,gateway=", "backup,gateway=x", "backup,gateway=0.0.0.0", "backup,gateway=224.0.0.1"] {
            assert!(read(bad).unwrap_err().contains("gateway="), "{bad}");
        }
        assert!(read("backup,gateway=10.0.2.1,gateway=10.0.2.2").unwrap_err().contains("two gateways"));
        assert!(read("gateway=10.0.2.1").unwrap_err().contains("empty flag"));
        let asked = request(vec![
            wish(Ok(What::Gateway("eth*".parse().unwrap(), "10.0.0.1".parse().unwrap())), Rank::HookArgument),
            wish(Ok(What::Gateway("eth1".parse().unwrap(), "10.0.2.1".parse().unwrap())), Rank::HookArgument),
            wish(Ok(What::Gateway("eth2".parse().unwrap(), "10.0.3.1".parse().unwrap())), Rank::Annotation),
        ]);
        let gateway = |name| asked.gateway(name, true, |_| true).map(|(_, gateway)| gateway.to_string());
        assert_eq!((gateway("eth1").as_deref(), gateway("eth2").as_deref()), (Some("10.0.2.1"), Some("10.0.0.1")));
        assert_eq!(asked.gateway("eth1", false, |_| true), None);
        let authors = asked.gateway("eth2", true, |source| !source.rank.is_administrator());
        assert_eq!(authors.map(|(_, gateway)| gateway.to_string()).as_deref(), Some("10.0.3.1"));
    }

    fn request(wishes: Vec<Wish>) -> Request {
        let mut request = Request::default();
        request.extend(wishes).unwrap();
        request
    }

    #[test]
    fn the_weightier_source_wins_even_with_a_glob() {
        let request = request(vec![
            wish(interface("eth1", "subflow"), Rank::Annotation),
            wish(interface("eth*", "backup"), Rank::HookArgument),
        ]);
        let (winner, flags) = request.interface("eth1").unwrap().unwrap();
        assert_eq!(winner.source.rank, Rank::HookArgument);
        assert_eq!(flags.to_string(), "subflow,backup");
        assert!(request.interface("wlan0").unwrap().is_none());
    }

    #[test]
    fn within_a_source_exact_beats_glob_and_globs_must_agree() {
        let mut request = request(vec![
            wish(interface("eth*", "backup"), Rank::Annotation),
            wish(interface("eth1", "signal"), Rank::Annotation),
        ]);
        assert_eq!(request.interface("eth1").unwrap().unwrap().1.to_string(), "signal");
        request.add(wish(interface("e*", "subflow"), Rank::Annotation)).unwrap();
        assert_eq!(request.interface("eth1").unwrap().unwrap().1.to_string(), "signal");
        assert!(request.interface("eth0").unwrap_err().to_string().contains("e*=subflow"));
    }

    #[test]
    fn one_rank_cannot_contradict_itself() {
        let mut request = request(vec![wish(sysctl("scheduler", "default"), Rank::HookArgument)]);
        assert!(request.add(wish(sysctl("net/mptcp/scheduler", "default"), Rank::HookArgument)).is_ok());
        assert!(request.add(wish(sysctl("net.mptcp.scheduler", "burst"), Rank::HookArgument)).is_err());
        assert!(request.add(wish(sysctl("scheduler", "burst"), Rank::CommandLine)).is_ok());
        assert_eq!(request.settings().into_values().next().unwrap().1, "burst");
        assert_eq!(request.wishes().len(), 2);
    }

    #[test]
    fn a_later_command_replaces_and_a_second_hook_adds() {
        let first = request(vec![
            wish(interface("eth1", "backup"), Rank::HookArgument),
            wish(interface("eth2", "backup"), Rank::CommandLine),
        ]);
        let by_hand = request(vec![wish(interface("eth2", "subflow"), Rank::CommandLine)]).on_top_of(&first).unwrap();
        assert_eq!(by_hand.interface("eth1").unwrap().unwrap().1.to_string(), "subflow,backup");
        assert_eq!(by_hand.interface("eth2").unwrap().unwrap().1.to_string(), "subflow");
        let second = request(vec![wish(interface("eth3", "off"), Rank::HookArgument)]).on_top_of(&first).unwrap();
        assert_eq!(second.wishes().len(), 3);
        let disagreeing = request(vec![wish(interface("eth1", "off"), Rank::HookArgument)]);
        assert!(disagreeing.on_top_of(&first).is_err());
    }

    #[test]
    fn an_annotation_never_steers_an_administrators_wish() {
        let request = request(vec![
            wish(Ok(What::OnConflict(OnConflict::Override)), Rank::Annotation),
            wish(Ok(What::OnConflict(OnConflict::Warn)), Rank::PolicyDefault),
        ]);
        assert_eq!(request.on_conflict(Rank::HookArgument).unwrap().1, OnConflict::Warn);
        assert_eq!(request.on_conflict(Rank::Annotation).unwrap().1, OnConflict::Override);
    }

    #[test]
    fn nearest_word() {
        assert_eq!(nearest("subflow", ["subflows", "add_addr_accepted"]), Some("subflows"));
        assert_eq!(nearest("zzzzzzzz", ["subflows"]), None);
        assert_eq!(distance("mptcp_hook", "mptcp-hook"), 1);
        assert!(distance(&"x".repeat(100_000), "mptcp-hook") > 1000);
    }

    #[test]
    fn limits_are_bounded() {
        assert!(limit("subflows", "9").is_err());
        assert!(limit("subflows", "-1").is_err());
        assert!(limit("subflow", "2").unwrap_err().contains("subflows"));
        assert_eq!(limit("add_addr_accepted", "0x2"), Ok(What::Limit(Limit::AddAddrAccepted, 2)));
    }

    #[test]
    fn a_request_survives_the_record() {
        let request = request(vec![
            wish(interface("eth*", "0x301003"), Rank::CommandLine),
            wish(module("mptcp_fullmesh.num_subflows", "2"), Rank::ContainerFile),
            wish(sysctl("net/ipv4/conf/eth0.100/rp_filter", "2"), Rank::Annotation),
            wish(limit("subflows", "4"), Rank::PolicyDefault),
        ]);
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }
}
