//! What the ledger remembers of one instance. The record is the truth; the directories beside it are an index.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::instance::Instance;
use crate::kernel::{Kind, Limits, RouteState, Rule, TableRoute};
use crate::request::setting::SettingKey;
use crate::request::{Follow, Request};

/// The form of the files. A program that finds a newer one says so and leaves it alone.
pub const VERSION: u32 = 1;

/// Everything about one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// Which life of which container.
    pub instance: Instance,
    /// The name to show.
    pub name: String,
    /// Who called us: `oci`, `lxc`, `command`.
    pub runtime: String,
    /// The kernel kind that it was applied on.
    pub kernel: Kind,
    /// All wishes so far.
    pub request: Request,
    /// While a hook is at work: who. Left behind by a hook that was killed.
    pub at_work: Option<Writer>,
    /// The interfaces asked for.
    pub interfaces: Vec<Interface>,
    /// Endpoints of ours that are being deleted.
    pub leaving: Vec<OwnedEndpoint>,
    /// Tables of ours that are being emptied.
    #[serde(default)]
    pub leaving_tables: BTreeSet<u32>,
    /// The limits, if they are ours to care about.
    pub limits: Option<OwnedLimits>,
    /// The settings asked for.
    pub settings: Vec<OwnedSetting>,
    /// What was said about them.
    pub warnings: Vec<String>,
    /// How many of the warnings, from the first on, do not depend on interfaces, addresses and routes.
    #[serde(default)]
    pub lasting_warnings: usize,
    /// Whether an interface or address may still come or change: what `follow = auto` goes by, beside ways out.
    #[serde(default)]
    pub unsettled: bool,
    /// When it was written, in nanoseconds since 1970: the order of a namespace's members.
    pub time: u64,
}

impl Record {
    /// This record and, while a hook is at work on it, the ones before, the newest first: the kernel may be as any of them
    /// says.
    pub fn versions(&self) -> impl Iterator<Item = &Self> {
        let earlier = self.at_work.iter().flat_map(|work| work.killed.iter().chain(work.before.as_deref()));
        std::iter::once(self).chain(earlier)
    }

    /// Whether the same things are ours by both.
    pub fn owns_the_same(&self, other: &Self) -> bool {
        let same = |(a, b): (&Interface, &Interface)| {
            (&a.endpoints, &a.link, &a.routing) == (&b.endpoints, &b.link, &b.routing)
        };
        self.interfaces.len() == other.interfaces.len()
            && self.interfaces.iter().zip(&other.interfaces).all(same)
            && (&self.leaving, &self.leaving_tables) == (&other.leaving, &other.leaving_tables)
            && (self.limits, &self.settings) == (other.limits, &other.settings)
    }

    /// Its endpoints, those included that are being deleted, in all versions.
    pub fn endpoints(&self) -> impl Iterator<Item = &OwnedEndpoint> {
        self.versions().flat_map(|record| {
            record.interfaces.iter().flat_map(|interface| &interface.endpoints).chain(&record.leaving)
        })
    }

    /// The host-wide settings that this instance has a claim on, in any version, each once.
    pub fn host_claims(&self) -> impl Iterator<Item = &SettingKey> {
        let settings = self.versions().flat_map(|version| &version.settings);
        let claimed = settings.filter(|owned| owned.scope == Scope::Host && owned.claimed).map(|owned| &owned.key);
        claimed.collect::<BTreeSet<_>>().into_iter()
    }

    /// The settings of its namespace that this instance relies on.
    pub fn netns_claims(&self) -> impl Iterator<Item = &OwnedSetting> {
        self.settings.iter().filter(|owned| owned.scope == Scope::Netns && owned.claimed)
    }

    /// The same of all versions, each setting once, as the newest version that relies on it has it.
    pub fn all_netns_claims(&self) -> impl Iterator<Item = &OwnedSetting> {
        let mut seen = BTreeSet::new();
        self.versions()
            .flat_map(|version| version.settings.iter().rev())
            .filter(move |owned| owned.scope == Scope::Netns && owned.claimed && seen.insert(&owned.key))
    }

    /// The interface flags that are ours in any version, each interface once, as the newest version has it, with the
    /// interface's name.
    pub fn all_links(&self) -> impl Iterator<Item = (&str, &OwnedLink)> {
        let mut seen = BTreeSet::new();
        let interfaces = self.versions().flat_map(|version| version.interfaces.iter().rev());
        let links = interfaces.filter_map(|interface| Some((&*interface.name, interface.link.as_ref()?)));
        links.filter(move |(_, link)| seen.insert(link.index))
    }

    /// The tables that are ours, those included that are being emptied, in all versions.
    pub fn tables(&self) -> BTreeSet<u32> {
        let of = |version: &Self| {
            let routing = version.interfaces.iter().filter_map(|interface| interface.routing.as_ref());
            routing.map(|owned| owned.table).chain(version.leaving_tables.iter().copied()).collect::<Vec<_>>()
        };
        self.versions().flat_map(of).collect()
    }

    /// Whether an interface has a way out of its own, in any version.
    pub fn has_routing(&self) -> bool {
        !self.tables().is_empty()
    }

    /// Whether the agent has to follow it. The kernel drops a way out with its link, for good, whatever else is settled;
    /// without a process nobody can do anything about it.
    pub fn needs_agent(&self) -> bool {
        match self.request.follow() {
            Follow::Always => true,
            Follow::Auto => self.unsettled || self.has_routing() && self.instance.pid.is_some(),
            Follow::Never => false,
        }
    }

    /// Gives back the memory that reading has set aside for more.
    pub fn shrink(&mut self) {
        for interface in &mut self.interfaces {
            interface.flags.shrink_to_fit();
            interface.endpoints.shrink_to_fit();
        }
        self.interfaces.shrink_to_fit();
        self.settings.shrink_to_fit();
        self.request.shrink();
    }

    /// Whether only the time differs.
    pub fn says_the_same(&self, other: &Self) -> bool {
        Self { time: other.time, ..self.clone() } == *other
    }
}

/// The process that is changing the kernel for a record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Writer {
    /// Its pid.
    pub pid: u32,
    /// Its start time, in clock ticks since boot.
    pub start_time: u64,
    /// Whether it is the agent, which changes nothing but endpoints, limits, interface flags and ways out.
    #[serde(default)]
    pub follows: bool,
    /// What was in force before it began. Its originals are the new record's, too.
    pub before: Option<Box<Record>>,
    /// What hooks were about since then that were killed themselves, the newest first: something of it may be in force.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub killed: Vec<Record>,
}

/// How far an interface has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// In force, read back.
    Applied,
    /// Its interface or address is not there yet.
    Pending,
    /// Somebody changed it.
    Drifted,
    /// Not done, with a reason.
    Ignored,
    /// A hook was killed while it did it.
    Interrupted,
}

impl State {
    /// The word in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Pending => "pending",
            Self::Drifted => "drifted",
            Self::Ignored => "ignored",
            Self::Interrupted => "interrupted",
        }
    }
}

/// One interface that was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interface {
    /// The interface's name, or the glob that no interface matches yet.
    pub name: String,
    /// Its flags, as `status` shows them.
    pub flags: Vec<String>,
    /// Who asked.
    pub source: String,
    /// How far it has come.
    pub state: State,
    /// Why, where that is not obvious.
    pub reason: Option<String>,
    /// Whether packets find their way out.
    pub route: RouteState,
    /// Its endpoints (upstream).
    pub endpoints: Vec<OwnedEndpoint>,
    /// Its interface flags (multipath-tcp.org).
    pub link: Option<OwnedLink>,
    /// Its way out, where it got one of its own.
    #[serde(default)]
    pub routing: Option<OwnedRouting>,
    /// When the agent undid somebody else's change, in seconds since 1970. It does so once.
    #[serde(default)]
    pub corrected: Option<u64>,
    /// What the agent saw or did last.
    #[serde(default)]
    pub last: Option<Event>,
}

impl Interface {
    /// One that owns nothing yet.
    pub fn new(name: &str, flags: Vec<String>, source: &str, state: State, reason: Option<String>) -> Self {
        Self {
            name: name.into(),
            flags,
            source: source.into(),
            state,
            reason,
            route: RouteState::Unknown,
            endpoints: Vec::new(),
            link: None,
            routing: None,
            corrected: None,
            last: None,
        }
    }
}

/// Something that happened to an interface while the agent followed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// In seconds since 1970.
    pub time: u64,
    /// What, for people: `10.0.2.7 came`.
    pub what: String,
}

/// An endpoint that we rely on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedEndpoint {
    /// The kernel's id; 0 until it is known.
    pub id: u8,
    /// The address.
    pub address: IpAddr,
    /// The interface's index.
    pub index: u32,
    /// The flags that it shall have.
    pub flags: u32,
    /// The flags that it had, if it was somebody else's before: given back, never deleted.
    pub original: Option<u32>,
}

/// The interface flags that we set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedLink {
    /// The interface's index.
    pub index: u32,
    /// Which bits.
    pub mask: u32,
    /// What they are now.
    pub bits: u32,
    /// What they were.
    pub original: u32,
}

/// A table that has the way out by one interface, and the rules that lead there. All of it is ours, and so is what else bears
/// our mark in the table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedRouting {
    /// The table's number.
    pub table: u32,
    /// Its routes.
    pub routes: Vec<TableRoute>,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// The limits, before and now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedLimits {
    /// Before the first of ours.
    pub original: LimitPair,
    /// What this instance needs.
    pub needed: LimitPair,
    /// What was set.
    pub set: LimitPair,
    /// When the agent undid somebody else's change, in seconds since 1970. It does so once.
    #[serde(default)]
    pub corrected: Option<u64>,
}

/// Both limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitPair {
    /// Additional subflows.
    pub subflows: u32,
    /// Accepted ADD_ADDR.
    pub add_addr_accepted: u32,
}

impl std::fmt::Display for LimitPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "subflows {} add_addr_accepted {}", self.subflows, self.add_addr_accepted)
    }
}

impl From<Limits> for LimitPair {
    fn from(limits: Limits) -> Self {
        Self { subflows: limits.subflows, add_addr_accepted: limits.add_addr_accepted }
    }
}

impl From<LimitPair> for Limits {
    fn from(pair: LimitPair) -> Self {
        Self { subflows: pair.subflows, add_addr_accepted: pair.add_addr_accepted }
    }
}

impl LimitPair {
    /// The larger of each.
    pub fn max(self, other: Self) -> Self {
        Self {
            subflows: self.subflows.max(other.subflows),
            add_addr_accepted: self.add_addr_accepted.max(other.add_addr_accepted),
        }
    }
}

/// Where a value lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// In the container's network namespace.
    Netns,
    /// Once, for the whole host.
    Host,
}

impl Scope {
    /// The word in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Netns => "netns",
            Self::Host => "host",
        }
    }
}

/// What became of a wish for a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// In force.
    Applied,
    /// It was so already.
    Shared,
    /// The other value was kept, with a warning.
    Kept,
    /// In force, over somebody's claim.
    Overrode,
    /// Somebody else overrode it.
    Overridden,
}

impl Outcome {
    /// The word in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Shared => "shared",
            Self::Kept => "kept",
            Self::Overrode => "overrode",
            Self::Overridden => "overridden",
        }
    }
}

/// A setting that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedSetting {
    /// Which.
    pub key: SettingKey,
    /// The value asked for.
    pub value: String,
    /// Where it lives.
    pub scope: Scope,
    /// What became of it.
    pub outcome: Outcome,
    /// The value before ours, where a release has to put it back in this namespace. Of a host-wide value that is
    /// claimed: the value before the first claim; the setting's own page counts, and this restores it if it is lost.
    pub original: Option<String>,
    /// Whether it holds others back.
    pub claimed: bool,
    /// Who asked.
    pub source: String,
}

/// What was done about a conflict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConflictOutcome {
    /// The container did not start.
    Refused,
    /// It started without.
    Warned,
    /// The others lost.
    Overrode,
    /// Somebody outside changed it; left alone.
    Drift,
}

impl ConflictOutcome {
    /// The word in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Warned => "warned",
            Self::Overrode => "overrode",
            Self::Drift => "drift",
        }
    }
}

/// A wish for a shared setting that differed from what others rely on or the policy allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// In seconds since 1970.
    pub time: u64,
    /// The container's id.
    pub container: String,
    /// The setting.
    pub key: String,
    /// The value asked for.
    pub wanted: String,
    /// The value that was in force.
    pub kept: String,
    /// The ids of the containers that rely on it.
    pub holders: Vec<String>,
    /// What was done.
    pub outcome: ConflictOutcome,
    /// Why.
    pub reason: String,
}

/// A hook that failed: everything was undone, and the container did not start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// In seconds since 1970.
    pub time: u64,
    /// The container's id.
    pub container: String,
    /// The exit status: 1 failed, 2 wrong usage; 0 if the policy let the container start all the same.
    pub status: u8,
    /// What went wrong.
    pub reason: String,
}
