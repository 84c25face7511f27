//! What the doctor can find: one table of causes, from which the documentation comes, and the findings themselves.

use serde::Serialize;

/// How much a finding matters. Only problems make the exit status 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// MPTCP does not work as it was asked for, or will not for the next container.
    Problem,
    /// It works, and something is likely to surprise.
    Warning,
    /// Good to know.
    Note,
}

impl Severity {
    /// The word in both forms of the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Problem => "problem",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

/// A kind of finding.
#[derive(Debug, PartialEq, Eq)]
pub struct Cause {
    /// Its name for programs; it stays as it is.
    pub id: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// Why it matters.
    pub why: &'static str,
}

macro_rules! causes {
    ($($name:ident = $severity:ident $id:literal: $why:literal;)*) => {
        $(#[doc = $why] pub const $name: Cause = Cause { id: $id, severity: Severity::$severity, why: $why };)*
        /// All of them, those that explain others first.
        pub const CAUSES: &[&Cause] = &[$(&$name),*];
    };
}

causes! {
    KERNEL_WITHOUT = Problem "kernel-without-mptcp": "No connection of this machine can be Multipath TCP.";
    MPTCP_OFF = Problem "mptcp-disabled": "New sockets become plain TCP, whatever endpoints there are.";
    LEDGER_PROBLEM = Problem "ledger-problem": "What a damaged record says cannot be undone when its container ends.";
    HOST_INTERRUPTED = Problem "setting-interrupted": "Whether the value is ours or somebody else's is not decided yet.";
    HOST_DRIFTED = Problem "host-setting-drifted": "The containers that rely on the value run with another one.";
    HOOK_PATH = Problem "hook-path-missing": "Engines pass over a hook whose program is not there, without a word, and start the container without it.";
    HOOK_UNREADABLE = Problem "hook-unreadable": "An engine that cannot read a hook's file ignores it or starts no container at all.";
    HOOK_UNSEEN = Problem "hook-dir-unseen": "The engine looks for hooks in other directories alone, so that this one never runs.";
    HOOK_INCOMPLETE = Warning "hook-incomplete": "A stage at which nothing runs either sets nothing up or leaves it behind.";
    HOOK_NONE = Warning "hook-none": "No container is set up by itself; everything has to be done by hand.";
    CONTAINER_DEAD = Problem "container-dead": "Nothing of it is left to look at; what it held on the host waits to be let go.";
    LEDGER_STALE = Warning "ledger-stale": "A container that ended without its hook still stands in the ledger, with what it changed on the host.";
    CONTAINER_AMISS = Warning "container-amiss": "What this container asked for is not in force.";
    INTERRUPTED = Problem "container-interrupted": "A hook was killed at work: what it was doing is neither done nor undone.";
    CONTAINER_UNKNOWN = Note "container-unknown": "What was asked for is not known, so that only the kernel's own state can be judged.";
    PM_USERSPACE = Problem "path-manager-userspace": "The kernel does nothing with the endpoints: a daemon has to.";
    PM_IGNORES = Problem "path-manager-ignores-flags": "On this kernel only the path manager fullmesh reads the interface flags.";
    SETTING_DRIFTED = Problem "setting-drifted": "The container runs with another value than it asked for.";
    INTERFACE_MISSING = Problem "interface-missing": "There is no such path yet.";
    INTERFACE_DOWN = Problem "interface-down": "No packet passes: subflows there hang or are closed.";
    INTERFACE_IGNORED = Warning "interface-ignored": "The interface is not used as asked for, on purpose.";
    INTERFACE_DRIFTED = Problem "interface-drifted": "The interface is not as it was asked for any more.";
    ADDRESS_MISSING = Problem "address-missing": "The kernel keeps an endpoint whose address is not there, and no subflow can come from it.";
    ADDRESS_NONE = Problem "address-none": "Without a usable address the interface is no path.";
    ADDRESS_UNUSED = Problem "address-unused": "Connections get no subflow from this address.";
    ENDPOINT_MISSING = Problem "endpoint-missing": "Connections get no subflow from this address.";
    ENDPOINT_FLAGS = Problem "endpoint-flags": "The path is used in another way than it was asked for.";
    ENDPOINT_INERT = Warning "endpoint-inert": "The kernel takes such an endpoint and never uses it.";
    ENDPOINT_DEVICE = Problem "endpoint-wrong-device": "Subflows are bound to an interface that does not have their address.";
    ENDPOINT_UNBOUND = Problem "endpoint-unbound": "Subflows look healthy and leave by another interface: there is no second path.";
    LIMITS_LOW = Problem "limits-low": "The kernel makes no further subflow once the limit is reached.";
    RP_FILTER = Problem "rp-filter-strict": "The kernel drops what arrives there, because answers would leave by another interface: subflows stay in SYN-SENT on one side.";
    ROUTE_MISSING = Problem "route-missing": "A subflow from this address hangs in SYN-SENT, where ss -M counts it, and comes up never.";
    ROUTE_PARTIAL = Warning "route-partial": "Subflows from this address come up to those peers alone to which a route leads by its interface.";
    REPLY_ELSEWHERE = Warning "reply-elsewhere": "Answers to subflows that arrive there leave by another interface, which networks that check sources drop.";
    GATEWAY_SILENT = Problem "gateway-silent": "Packets of this path go nowhere.";
    SUBFLOW_STUCK = Problem "subflow-stuck": "The connection has not got this path, although ss -M counts it.";
    SUBFLOW_ELSEWHERE = Problem "subflow-wrong-interface": "Two subflows share one path: when it fails, both do.";
    SUBFLOW_LACKING = Problem "connection-lacks-subflow": "The kernel tries each endpoint once per connection, and not again when its address or route comes later.";
    SUBFLOW_BACKUP = Problem "subflow-backup-differs": "The subflow carries data when it should not, or does not when it should.";
    TCP_ONLY = Problem "tcp-only": "The endpoints do nothing for sockets that are plain TCP: a program has to ask for IPPROTO_MPTCP.";
    TCP_MIXED = Note "tcp-mixed": "These connections use one path only.";
    FALLBACKS = Warning "fallbacks": "These connections went on as plain TCP: the peer or something on the way does not let MPTCP's options pass.";
    NOT_FOLLOWED = Problem "agent-needed": "Addresses and links that come later are not used.";
    OTHER_MANAGER = Warning "other-manager": "Two programs that manage endpoints undo each other's work.";
    BACKUP_BUG = Warning "kernel-backup-bug": "A backup path may carry data although the others are fine.";
    HOOK_WARNING = Warning "hook-warning": "The hook could not do it quite as asked for.";
    HOOK_FAILED = Note "hook-failed": "The container of a hook that fails does not start, or starts without its paths.";
    MTU_DIFFERS = Note "mtu-differs": "Segments are as large as the smallest path allows, or have to be cut again when a path fails.";
    SOCKETS_UNREADABLE = Note "sockets-unreadable": "Whether the connections are MPTCP cannot be told.";
    NOT_JUDGED = Note "not-judged": "On this kernel endpoints, routes and subflows are not looked at.";
    PROBE_FAILED = Problem "probe-failed": "No connection at all, so that nothing can be said of its paths.";
    PROBE_IMPOSSIBLE = Problem "probe-impossible": "Nothing is known of connections to this peer.";
    PROBE_PLAIN = Problem "probe-plain-tcp": "The connection is plain TCP and has one path.";
    PROBE_SUBFLOW = Problem "probe-subflow-missing": "A connection to this peer does not get the path.";
    PROBE_CLOSED = Warning "probe-peer-closed": "Nothing can be said of the paths that had not come up by then.";
    PROBE_FINE = Note "probe-established": "A connection to this peer has every path.";
    HOST_MPTCP_OFF = Note "host-mptcp-disabled": "Programs of the host itself get plain TCP; containers have their own switch.";
    GATEWAY_WAS_SILENT = Note "gateway-was-silent": "Nobody has had anything to send by it since, so that it may answer now.";
    HEALTHY_AGENT = Note "agent-running": "Containers are kept as they were asked for.";
}

/// Something found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The cause's name.
    pub id: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// The interface that it is about.
    pub interface: Option<String>,
    /// What is wrong.
    pub what: String,
    /// The value that was read.
    pub evidence: String,
    /// Why it matters.
    pub why: &'static str,
    /// What mends it.
    pub mend: Option<String>,
    /// The command that does; words in capitals are to be filled in.
    pub command: Option<String>,
    /// Commands that do the same without the hook, for who wants to see to it.
    pub by_hand: Option<String>,
}

impl Finding {
    /// A finding with what was read.
    pub fn new(cause: &Cause, what: impl Into<String>, evidence: impl Into<String>) -> Self {
        Self {
            id: cause.id,
            severity: cause.severity,
            interface: None,
            what: what.into(),
            evidence: evidence.into(),
            why: cause.why,
            mend: None,
            command: None,
            by_hand: None,
        }
    }

    /// On which interface.
    pub fn on(self, interface: &str) -> Self {
        Self { interface: Some(interface.into()), ..self }
    }

    /// How to mend it.
    pub fn mend(self, how: impl Into<String>) -> Self {
        Self { mend: Some(how.into()), ..self }
    }

    /// The command that mends it.
    pub fn by(self, command: impl Into<String>) -> Self {
        Self { command: Some(command.into()), ..self }
    }

    /// The commands that mend it as well, without the hook.
    pub fn or_by_hand(self, commands: impl Into<String>) -> Self {
        Self { by_hand: Some(commands.into()), ..self }
    }
}

/// Puts them in order: by how much they matter, then causes before effects.
pub fn sort(findings: &mut [Finding]) {
    let place = |id: &str| CAUSES.iter().position(|cause| cause.id == id);
    findings.sort_by_key(|finding| (finding.severity, place(finding.id)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_exactly_these_causes() {
        let documented = include_str!("../../docs/doctor.md");
        let lines: Vec<&str> = documented.lines().filter(|line| line.starts_with("| `")).collect();
        let expected: Vec<String> =
            CAUSES.iter().map(|c| format!("| `{}` | {} | {} |", c.id, c.severity.name(), c.why)).collect();
        for line in &expected {
            assert!(
                lines.contains(&line.as_str()),
                "docs/doctor.md lacks\n{line}\nall of them:\n{}",
                expected.join("\n")
            );
        }
        assert_eq!(lines.len(), expected.len(), "docs/doctor.md has a cause that does not exist");
    }

    /// Where findings are judged their names stand in tests alone.
    #[test]
    fn every_cause_is_named_by_a_test() {
        let judges = [
            include_str!("container.rs"),
            include_str!("host.rs"),
            include_str!("probe.rs"),
            include_str!("sockets.rs"),
            include_str!("../../tests/doctor.rs"),
        ];
        let is_named = |id: &str| judges.iter().any(|source| source.contains(&format!("\"{id}\"")));
        let nameless: Vec<&str> = CAUSES.iter().map(|cause| cause.id).filter(|id| !is_named(id)).collect();
        assert_eq!(nameless, [""; 0]);
    }

    #[test]
    fn names_are_unique() {
        let mut ids: Vec<&str> = CAUSES.iter().map(|cause| cause.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), CAUSES.len());
    }

    #[test]
    fn problems_come_first_and_causes_before_effects() {
        let mut findings = [&TCP_MIXED, &SUBFLOW_STUCK, &HOOK_NONE, &ROUTE_MISSING].map(|c| Finding::new(c, "", ""));
        sort(&mut findings);
        let order = findings.map(|finding| finding.id);
        assert_eq!(order, ["route-missing", "subflow-stuck", "hook-none", "tcp-mixed"]);
    }
}
