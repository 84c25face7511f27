//! What each kernel is expected to be like: the one table of the versions. `tests/kernels.rs` holds the running kernel
//! against it, the other tests ask it where kernels differ, and docs/kernels.md is written from it.
//!
//! A behaviour has a list of [`Observed`] values, oldest first, each from the version on that it was seen with. Between
//! two that were seen, either is accepted: nobody has looked at the versions in between.

use nix::errno::Errno;

/// Major and minor number of a kernel.
pub type Version = (u32, u32);

/// Which MPTCP a kernel has, as `mptcp-hook status` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Linux's own.
    Upstream,
    /// That of multipath-tcp.org, v0.
    MptcpOrg,
    /// None.
    None,
}

impl Kind {
    /// Its name in `status --json` and in a guest's plan.
    pub fn name(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::MptcpOrg => "mptcp.org",
            Self::None => "none",
        }
    }
}

/// A kernel of Debian that the suite boots.
#[derive(Debug)]
pub struct Guest {
    /// The release of Debian, as apt knows it.
    pub debian: &'static str,
    /// The series that it ships. Sid moves on: its minor number is the least.
    pub version: Version,
    /// Which MPTCP it has.
    pub kind: Kind,
}

/// Every kernel that the suite boots, oldest first.
pub const GUESTS: &[Guest] = &[
    Guest { debian: "bullseye", version: (5, 10), kind: Kind::None },
    Guest { debian: "bookworm", version: (6, 1), kind: Kind::Upstream },
    Guest { debian: "trixie", version: (6, 12), kind: Kind::Upstream },
    Guest { debian: "sid", version: (7, 2), kind: Kind::Upstream },
];

/// Who can change a sysctl in a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The namespace's administrator.
    Write,
    /// Nobody: it is a list.
    Read,
}

/// A sysctl below net.mptcp.
#[derive(Debug)]
pub struct Sysctl {
    /// Its name.
    pub name: &'static str,
    /// The first version that has it.
    pub since: Version,
    /// Whether it can be written.
    pub access: Access,
    /// What a fresh namespace has.
    pub default: &'static str,
}

const fn sysctl(name: &'static str, since: Version, access: Access, default: &'static str) -> Sysctl {
    Sysctl { name, since, access, default }
}

/// All of net.mptcp on upstream kernels.
pub const SYSCTLS: &[Sysctl] = &[
    sysctl("enabled", (5, 6), Access::Write, "1"),
    sysctl("add_addr_timeout", (5, 11), Access::Write, "120"),
    sysctl("checksum_enabled", (5, 14), Access::Write, "0"),
    sysctl("allow_join_initial_addr_port", (5, 14), Access::Write, "1"),
    sysctl("stale_loss_cnt", (5, 15), Access::Write, "4"),
    sysctl("pm_type", (5, 19), Access::Write, "0"),
    sysctl("scheduler", (6, 6), Access::Write, "default"),
    sysctl("close_timeout", (6, 7), Access::Write, "60"),
    sysctl("available_schedulers", (6, 10), Access::Read, "default"),
    sysctl("blackhole_timeout", (6, 12), Access::Write, "3600"),
    sysctl("syn_retrans_before_tcp_fallback", (6, 14), Access::Write, "2"),
    sysctl("path_manager", (6, 15), Access::Write, "kernel"),
    sysctl("available_path_managers", (6, 15), Access::Read, "kernel userspace"),
    sysctl("add_addr_v6_port_drop_ts", (7, 2), Access::Write, "1"),
];

/// A flag of an endpoint.
#[derive(Debug)]
pub struct Flag {
    /// Its name in ip-mptcp(8).
    pub name: &'static str,
    /// `MPTCP_PM_ADDR_FLAG_*`.
    pub bit: u32,
    /// The first version that acts on it.
    pub since: Version,
}

const fn flag(name: &'static str, bit: u32, since: Version) -> Flag {
    Flag { name, bit, since }
}

/// The flags that can be asked for.
pub const FLAGS: &[Flag] = &[
    flag("signal", 1, (5, 7)),
    flag("subflow", 2, (5, 7)),
    flag("backup", 4, (5, 7)),
    flag("fullmesh", 8, (5, 15)),
    flag("laminar", 32, (6, 18)),
];

/// A value, and the version from which on it was seen.
#[derive(Debug)]
pub struct Observed<T: 'static> {
    /// The version.
    pub version: Version,
    /// The value.
    pub value: T,
}

const fn seen<T>(version: Version, value: T) -> Observed<T> {
    Observed { version, value }
}

/// Every value that `version` may show: the last that was seen before it, and the next where that was later.
pub fn accepted<T: Copy + PartialEq>(list: &[Observed<T>], version: Version) -> Vec<T> {
    let before = list.iter().rfind(|seen| seen.version <= version);
    let exact = before.is_some_and(|seen| seen.version == version);
    let next = list.iter().find(|seen| seen.version > version).filter(|_| !exact);
    let mut values: Vec<T> = before.into_iter().chain(next).map(|seen| seen.value).collect();
    values.dedup();
    values
}

/// What becomes of a flag bit that a kernel does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// It is listed as if it had a meaning.
    Stored,
    /// It is gone.
    Dropped,
}

/// What upstream kernels do with a flag bit that they do not know. None of them refuses it.
pub const UNKNOWN_FLAG: &[Observed<Unknown>] = &[seen((6, 1), Unknown::Dropped)];

/// A kernel's mistake with backup paths, as `mptcp-hook doctor` names it (`kernel-backup-bug`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupBug {
    /// `signal` with `backup` is not honoured.
    Signal,
    /// The same before this third number of the version; none from it on.
    SignalBefore(u32),
    /// The sender's own flag is not.
    Sender,
    /// None.
    None,
}

impl BackupBug {
    /// Of the kernel whose version has this third number.
    pub fn of(self, patch: u32) -> Self {
        match self {
            Self::SignalBefore(mended) if patch < mended => Self::Signal,
            Self::SignalBefore(_) => Self::None,
            other => other,
        }
    }
}

/// What the doctor of a host names. Of the versions that the suite does not boot the sources say it.
pub const BACKUP_BUG: &[Observed<BackupBug>] = &[
    seen((5, 7), BackupBug::Signal),
    seen((6, 1), BackupBug::SignalBefore(192)),
    seen((6, 2), BackupBug::Signal),
    seen((6, 6), BackupBug::Sender),
    seen((6, 11), BackupBug::None),
];

/// A request that the path manager refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// One endpoint more than [`ENDPOINTS_MAX`].
    EndpointTooMany,
    /// A limit above [`LIMIT_MAX`].
    LimitTooHigh,
    /// The same address again.
    Duplicate,
    /// `signal` and `fullmesh` together.
    SignalFullmesh,
    /// `implicit`, which is the kernel's own.
    Implicit,
    /// A port without `signal`.
    PortWithoutSignal,
}

/// Every refusal with its errors.
pub const REFUSALS: &[(Refused, &str, &[Observed<Errno>])] = &[
    (Refused::EndpointTooMany, "an endpoint too many", &[seen((6, 1), Errno::EINVAL), seen((6, 12), Errno::ERANGE)]),
    (Refused::LimitTooHigh, "a limit that is too high", &[seen((6, 1), Errno::EINVAL)]),
    (Refused::Duplicate, "an address twice", &[seen((6, 1), Errno::EINVAL), seen((6, 12), Errno::EEXIST)]),
    (Refused::SignalFullmesh, "signal with fullmesh", &[seen((6, 1), Errno::EINVAL)]),
    (Refused::Implicit, "implicit", &[seen((6, 1), Errno::EINVAL)]),
    (Refused::PortWithoutSignal, "a port without signal", &[seen((6, 1), Errno::EINVAL)]),
];

/// How many endpoints a namespace can have.
pub const ENDPOINTS_MAX: &[Observed<u32>] = &[seen((6, 1), 8), seen((6, 18), 8), seen((7, 2), 255)];

/// The highest limit on subflows that a namespace can have.
pub const LIMIT_MAX: &[Observed<u32>] = &[seen((6, 1), 8), seen((6, 18), 8), seen((7, 2), 64)];

/// The first version that can change an endpoint's flags.
pub const SET_FLAGS_SINCE: Version = (5, 12);

/// The first version in which root of a user namespace may change endpoints and limits of its own network namespaces.
pub const USER_NAMESPACE_SINCE: Version = (6, 1);

/// The first version that shows net.core.{r,w}mem_{max,default}, read-only, in every network namespace.
pub const RMEM_IN_NAMESPACES_SINCE: Version = (6, 12);

/// Limits of a fresh namespace: subflows, add_addr_accepted.
pub const LIMITS: [u32; 2] = [2, 0];

/// net.mptcp of a multipath-tcp.org kernel, all of it the host's alone.
pub const MPTCP_ORG_SYSCTLS: &[&str] = &[
    "mptcp_enabled",
    "mptcp_version",
    "mptcp_checksum",
    "mptcp_debug",
    "mptcp_syn_retries",
    "mptcp_path_manager",
    "mptcp_scheduler",
];

/// The interface flags that a multipath-tcp.org kernel keeps, one at a time: off and backup.
pub const MPTCP_ORG_LINK_FLAGS: [u32; 2] = [0x8_0000, 0x10_0000];

/// The running kernel, as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// Which MPTCP it has.
    pub kind: Kind,
    /// Major and minor number.
    pub version: Version,
    /// The third number. Debian's `uname -r` has none; it stands in `uname -v`.
    pub patch: u32,
    /// `uname -r`.
    pub release: String,
}

impl Running {
    /// Looks, in the calling thread's network namespace.
    pub fn look() -> Self {
        let names = nix::sys::utsname::uname().expect("uname");
        let release = names.release().to_string_lossy().into_owned();
        let there = |path: &str| std::path::Path::new(path).exists();
        let kind = if there("/proc/thread-self/net/mptcp_net") {
            Kind::MptcpOrg
        } else if there("/proc/sys/net/mptcp/enabled") {
            Kind::Upstream
        } else {
            Kind::None
        };
        let built = names.version().to_string_lossy();
        let whole = built.split_once("Debian ").map_or(release.as_str(), |(_, version)| version);
        let patch = whole.split(|c: char| !c.is_ascii_digit()).nth(2).and_then(|number| number.parse().ok());
        Self { kind, version: version(&release), patch: patch.unwrap_or(0), release }
    }

    /// Whether it is at least `since`.
    pub fn has(&self, since: Version) -> bool {
        self.version >= since
    }

    /// Whether it acts on the endpoint flag `name`.
    pub fn has_flag(&self, name: &str) -> bool {
        FLAGS.iter().any(|flag| flag.name == name && self.has(flag.since))
    }

    /// Whether it has the sysctl net.mptcp.`name`.
    pub fn has_sysctl(&self, name: &str) -> bool {
        SYSCTLS.iter().any(|sysctl| sysctl.name == name && self.has(sysctl.since))
    }
}

/// The first two numbers of a release such as `6.1.0-50-amd64`.
pub fn version(release: &str) -> Version {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().expect("a kernel's number"));
    (numbers.next().expect("a major number"), numbers.next().expect("a minor number"))
}
