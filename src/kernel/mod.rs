//! The kernel behind one small trait: what it is like now, one change at a time, and reading back.
//!
//! [`upstream`] is Linux's own MPTCP, [`mptcp_org`] the out-of-tree kernel of multipath-tcp.org. Both work inside the
//! container's network namespace ([`netns`]); settings are plain files ([`sysctl`]).

#[cfg(test)]
pub mod fake;
pub mod mptcp_org;
pub mod netlink;
pub mod netns;
mod routing;
pub mod sysctl;
pub mod upstream;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub use netlink::mptcp_pm::{Endpoint, Limits};
pub use netlink::route::{Address, Link};
pub use netlink::routing::{Rule, TableRoute};
pub use netlink::ways::RouteState;

use crate::deadline::Deadline;
use crate::request::setting::SettingKey;
use netlink::route::Route;
use netns::{Visit, in_initial_user_namespace};

/// The most endpoints that a namespace can have (`MPTCP_PM_ADDR_MAX`), and addresses per family on mptcp.org kernels.
pub const ENDPOINTS_MAX: usize = 8;

/// Which MPTCP the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Linux 5.6 and later: generic netlink `mptcp_pm`.
    #[serde(rename = "upstream")]
    Upstream,
    /// multipath-tcp.org v0.9x: interface flags, host-wide sysctls.
    #[serde(rename = "mptcp.org")]
    MptcpOrg,
    /// No MPTCP.
    #[serde(rename = "none")]
    None,
}

impl Kind {
    /// The kind as `status` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::MptcpOrg => "mptcp.org",
            Self::None => "none",
        }
    }

    /// Looks at the calling thread's network namespace.
    pub fn detect() -> Self {
        let exists = |path: &str| std::path::Path::new(path).exists();
        if exists("/proc/thread-self/net/mptcp_net") {
            Self::MptcpOrg
        } else if exists("/proc/sys/net/mptcp/enabled") {
            Self::Upstream
        } else {
            Self::None
        }
    }
}

/// The running kernel: its release (`uname -r`) and, where that does not tell it, the version that Debian made it of.
pub fn release() -> String {
    match nix::sys::utsname::uname() {
        Ok(names) => with_version(&names.release().to_string_lossy(), &names.version().to_string_lossy()),
        Err(_) => "unknown".into(),
    }
}

/// What stands between a release and Debian's version of it.
const DEBIAN: &str = ", Debian ";

/// Debian's releases are names of interfaces (6.1.0-56-amd64), and the version is in `uname -v`
/// (`#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-10-24)`).
fn with_version(release: &str, built: &str) -> String {
    let version = built.split_once(" Debian ").and_then(|(_, rest)| rest.split(' ').next());
    match version.filter(|version| version.starts_with(|c: char| c.is_ascii_digit())) {
        Some(version) => format!("{release}{DEBIAN}{version}"),
        None => release.into(),
    }
}

/// The name of the kernel in what [`release`] gives, as files are named by it.
pub fn release_name(release: &str) -> &str {
    release.split_once(DEBIAN).map_or(release, |(name, _)| name)
}

/// The first three numbers of the version in what [`release`] gives; 0 where there are fewer.
pub fn version(release: &str) -> (u32, u32, u32) {
    let version = release.split_once(DEBIAN).map_or(release, |(_, version)| version);
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

/// What is missing on a kernel of [`Kind::None`], and what to do about it.
pub fn without_mptcp() -> String {
    format!(
        "this kernel (Linux {}) has no MPTCP: neither /proc/sys/net/mptcp/enabled nor /proc/net/mptcp_net is there; {GET_MPTCP}",
        release()
    )
}

/// What to do about a kernel without MPTCP.
pub const GET_MPTCP: &str =
    "boot one that has it: Linux 5.7 or later built with CONFIG_MPTCP=y (Debian 12 or later), or multipath-tcp.org's";

/// Whether what [`release`] gives is at least this version of Linux.
pub fn is_at_least(release: &str, wanted: (u32, u32)) -> bool {
    let (major, minor, _) = version(release);
    (major, minor) >= wanted
}

/// A setting's file, seen from one network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Seen {
    /// Not there.
    #[default]
    Absent,
    /// There, without any write bit.
    ReadOnly(String),
    /// There, with a write bit.
    Writable(String),
    /// There, but it cannot be read (write-only, or the kernel said no).
    Unreadable,
}

impl Seen {
    /// The value, where it can be read.
    pub fn value(&self) -> Option<&str> {
        match self {
            Self::ReadOnly(value) | Self::Writable(value) => Some(value),
            Self::Absent | Self::Unreadable => None,
        }
    }
}

/// A setting, seen from the container's namespace and from the hook's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenSetting {
    /// From the container's network namespace. Module parameters have no namespace and are absent here.
    pub target: Seen,
    /// From the namespace that the hook was started in.
    pub host: Seen,
}

/// What the kernel is like now.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Which MPTCP it has.
    pub kind: Kind,
    /// What [`release`] says of it.
    pub release: String,
    /// Whether we are in the initial user namespace, where host-wide values are ours to change.
    pub initial_user_namespace: bool,
    /// Whether the host's network namespace can be reached from here (not from a createContainer hook).
    pub host_reachable: bool,
    /// Whether the target is the namespace that the hook was started in.
    pub target_is_host: bool,
    /// The interfaces of the container.
    pub links: Vec<Link>,
    /// Their addresses.
    pub addresses: Vec<Address>,
    /// The endpoints (upstream).
    pub endpoints: Vec<Endpoint>,
    /// The limits (upstream).
    pub limits: Option<Limits>,
    /// The interfaces by which packets to nowhere in particular leave; looked up only if it matters.
    pub default_route_links: Vec<u32>,
    /// Every setting that was asked about, and those that decide whether MPTCP works.
    pub settings: BTreeMap<SettingKey, SeenSetting>,
    /// The congestion controls that are loaded; naming another one would load a module.
    pub congestion_controls: Vec<String>,
    /// The ways out of usable addresses that have no endpoint yet, if the plan needs them.
    pub routes: BTreeMap<(IpAddr, u32), RouteState>,
    /// The addresses whose packets leave by another interface where no socket is bound to theirs, if the plan needs them.
    pub elsewhere: BTreeSet<(IpAddr, u32)>,
    /// The routing tables and rules, if the plan needs them.
    pub routing: Option<Routing>,
}

/// The routing tables and rules of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    /// The tables that any route or rule names, whatever it is like.
    pub tables: BTreeSet<u32>,
    /// The unicast routes of all tables.
    pub routes: Vec<TableRoute>,
    /// The rules that have no conditions but ours.
    pub rules: Vec<Rule>,
}

impl Facts {
    /// Reads what both kinds of kernels have, from inside; `settings` have been looked at already.
    fn read(kind: Kind, visit: &Visit, route: &mut Route, settings: BTreeMap<SettingKey, SeenSetting>) -> Result<Self> {
        Ok(Self {
            kind,
            release: release(),
            initial_user_namespace: in_initial_user_namespace(),
            host_reachable: visit.host_reachable(),
            target_is_host: visit.target_is_host(),
            links: route.links()?,
            addresses: route.addresses()?,
            endpoints: Vec::new(),
            limits: None,
            default_route_links: Vec::new(),
            congestion_controls: sysctl::congestion_controls(&settings),
            routes: BTreeMap::new(),
            elsewhere: BTreeSet::new(),
            routing: None,
            settings,
        })
    }

    /// The endpoint of an address; one with a port of its own is another one.
    pub fn endpoint(&self, address: IpAddr) -> Option<&Endpoint> {
        self.endpoints.iter().find(|endpoint| endpoint.address == address && endpoint.port.is_none())
    }

    /// Whether an address has an endpoint.
    pub fn has_endpoint(&self, address: IpAddr) -> bool {
        self.endpoint(address).is_some()
    }

    /// The interface of that name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// The interface of that index.
    pub fn link_at(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }
}

/// One change to the kernel. Each is small enough to be undone by another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Write a value that the kernel has once for the host.
    HostSetting {
        /// Which.
        key: SettingKey,
        /// The value.
        value: String,
    },
    /// Write a value that belongs to the container's network namespace.
    NetnsSysctl {
        /// Which.
        key: SettingKey,
        /// The value.
        value: String,
        /// The host's value, which must not change with it.
        host: Option<String>,
    },
    /// Add a route to a table of ours, by the interface of this name.
    AddRoute(TableRoute, String),
    /// Delete a route of ours, by the interface of this name.
    DeleteRoute(TableRoute, String),
    /// Add a rule that leads to a table of ours.
    AddRule(Rule),
    /// Delete a rule of ours.
    DeleteRule(Rule),
    /// Set both limits.
    Limits(Limits),
    /// Add an endpoint; id 0 lets the kernel choose.
    AddEndpoint(Endpoint),
    /// Change `backup` and `fullmesh` of an endpoint, on its live connections too.
    SetEndpointFlags(Endpoint),
    /// Delete an endpoint.
    DeleteEndpoint(Endpoint),
    /// Set the interface flags in `mask` to `bits`.
    LinkFlags {
        /// The interface.
        index: u32,
        /// Its name, for messages.
        name: String,
        /// The bits to set.
        bits: u32,
        /// The bits to change.
        mask: u32,
    },
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use crate::request::flags::EndpointFlags;
        let flags = |endpoint: &Endpoint| EndpointFlags(endpoint.flags).names().join(" ");
        match self {
            Self::HostSetting { key, value } => write!(f, "write {key} = {value} (the whole host's)"),
            Self::NetnsSysctl { key, value, .. } => write!(f, "write {key} = {value}"),
            Self::AddRoute(route, by) => write!(f, "add the route {}", route.by(by)),
            Self::DeleteRoute(route, by) => write!(f, "delete the route {}", route.by(by)),
            Self::AddRule(rule) => write!(f, "add the {rule}"),
            Self::DeleteRule(rule) => write!(f, "delete the {rule}"),
            Self::Limits(limits) => {
                write!(f, "set limits subflows {} add_addr_accepted {}", limits.subflows, limits.add_addr_accepted)
            }
            Self::AddEndpoint(endpoint) => {
                write!(f, "add endpoint {} {} dev index {}", endpoint.address, flags(endpoint), endpoint.ifindex)
            }
            Self::SetEndpointFlags(endpoint) => {
                write!(f, "change endpoint {} id {} to {}", endpoint.address, endpoint.id, flags(endpoint))
            }
            Self::DeleteEndpoint(endpoint) => write!(f, "delete endpoint {} id {}", endpoint.address, endpoint.id),
            Self::LinkFlags { name, bits, mask, .. } => write!(f, "set flags of {name} to {bits:#x} (mask {mask:#x})"),
        }
    }
}

/// One kernel, looked at and changed for one container.
pub trait Kernel {
    /// Reads what the plan needs; `keys` are the settings that were asked for.
    fn facts(&mut self, keys: &[SettingKey]) -> Result<Facts>;

    /// Reads these settings alone.
    fn settings(&mut self, keys: &[SettingKey]) -> Result<BTreeMap<SettingKey, SeenSetting>>;

    /// Makes one change.
    fn perform(&mut self, change: &Change) -> Result<()>;

    /// Reads back that all `changes` are in force. The error names the first that is not.
    fn confirm(&mut self, changes: &[&Change]) -> Result<()>;

    /// The interfaces by which packets to nowhere in particular leave.
    fn default_route_links(&mut self) -> Result<Vec<u32>>;

    /// The endpoints as they are now.
    fn endpoints(&mut self) -> Result<Vec<Endpoint>>;

    /// The routing tables and rules as they are now.
    fn routing(&mut self) -> Result<Routing>;

    /// Looks up the route of packets from `address` out of the interface `index`.
    fn route(&mut self, address: IpAddr, index: u32) -> Result<RouteState>;

    /// Whether packets from `address` leave by another interface than `index`, or not at all, where nobody binds them to
    /// it: answers of a listening socket, and what a strict `rp_filter` asks about.
    fn leaves_elsewhere(&mut self, address: IpAddr, index: u32) -> Result<bool>;
}

/// The kernel as seen from the namespace of `visit`. None if it has no MPTCP.
pub fn open(mut visit: Visit, deadline: Deadline) -> Result<Option<(Kind, Box<dyn Kernel>)>> {
    visit.inside()?;
    let kind = Kind::detect();
    let kernel: Option<Box<dyn Kernel>> = match kind {
        Kind::Upstream => Some(Box::new(upstream::Upstream::open(visit, deadline)?)),
        Kind::MptcpOrg => Some(Box::new(mptcp_org::MptcpOrg::open(visit, deadline)?)),
        Kind::None => None,
    };
    Ok(kernel.map(|kernel| (kind, kernel)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_says_its_versions_elsewhere() {
        let all = [
            ("6.1.0-56-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-10-24)", (6, 1, 192)),
            ("5.10.0-42-amd64", "#1 SMP Debian 5.10.262-1 (2026-10-01)", (5, 10, 262)),
            ("6.12.95+deb13-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1 (2026-11-02)", (6, 12, 117)),
            ("6.18.44-fc-v669", "#1 SMP PREEMPT_DYNAMIC @0", (6, 18, 44)),
            ("5.4.188", "#1 SMP Debian package by somebody", (5, 4, 188)),
            ("7.0", "", (7, 0, 0)),
        ];
        for (name, built, numbers) in all {
            let release = with_version(name, built);
            assert_eq!((release_name(&release), version(&release)), (name, numbers), "{release}");
        }
    }
}
