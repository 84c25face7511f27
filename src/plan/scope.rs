//! Does the container's namespace own a setting, or has the kernel one value for the host? Found by looking, never by
//! writing.

use crate::kernel::{Kind, Seen, SeenSetting};
use crate::ledger::record::Scope;
use crate::request::setting::SettingKey;

/// Families of sysctls that are the namespace's own wherever they are present there with a write bit. `*` stands for
/// any part of one name. Being writable in a namespace proves nothing: some that are writable there are global.
pub const NETNS_FAMILIES: &[&str] = &[
    "net/ipv4/conf/*/*",
    "net/ipv6/conf/*/*",
    "net/ipv4/neigh/*/*",
    "net/ipv6/neigh/*/*",
    "net/ipv4/tcp_*",
    "net/ipv4/ip_*",
    "net/ipv4/icmp_*",
    "net/ipv4/igmp_*",
    "net/ipv4/udp_*",
    "net/ipv4/fib_*",
    "net/ipv4/fwmark_reflect",
    "net/ipv4/ping_group_range",
    "net/ipv6/icmp/*",
    "net/ipv6/bindv6only",
    "net/ipv6/fwmark_reflect",
    "net/ipv6/ip_nonlocal_bind",
    "net/core/somaxconn",
    "net/unix/max_dgram_qlen",
];

/// The same on upstream kernels alone: on multipath-tcp.org kernels net.mptcp.* is the host's.
const NETNS_FAMILY_MPTCP: &str = "net/mptcp/*";

/// The release in which a net.mptcp key came, where that was later than MPTCP itself (5.6).
const SINCE: &[(&str, &str)] = &[
    ("add_addr_timeout", "5.11"),
    ("checksum_enabled", "5.14"),
    ("allow_join_initial_addr_port", "5.14"),
    ("stale_loss_cnt", "5.15"),
    ("pm_type", "5.19"),
    ("scheduler", "6.6"),
    ("close_timeout", "6.7"),
    ("available_schedulers", "6.10"),
    ("blackhole_timeout", "6.12"),
    ("syn_retrans_before_tcp_fallback", "6.14"),
    ("path_manager", "6.15"),
    ("available_path_managers", "6.15"),
    ("add_addr_v6_port_drop_ts", "7.2"),
];

/// Whether a key belongs to a known per-namespace family of this kernel kind.
pub fn is_known_per_namespace(path: &str, kind: Kind) -> bool {
    let own = kind == Kind::Upstream && family_matches(NETNS_FAMILY_MPTCP, path);
    own || NETNS_FAMILIES.iter().any(|family| family_matches(family, path))
}

fn family_matches(family: &str, path: &str) -> bool {
    let (mut family, mut path) = (family.split('/'), path.split('/'));
    loop {
        match (family.next(), path.next()) {
            (None, None) => return true,
            (Some(pattern), Some(part)) if crate::request::pattern::glob(pattern.as_bytes(), part.as_bytes()) => {}
            _ => return false,
        }
    }
}

/// Whether the write of `key` may have to go to the host: it decides which locks are taken before anything is read.
pub fn may_be_host(key: &SettingKey, kind: Kind) -> bool {
    key.sysctl_path().is_none_or(|path| !is_known_per_namespace(path, kind))
}

/// The scope of `key`. The error says which kernel, module or namespace would have it.
pub fn of(key: &SettingKey, kind: Kind, release: &str, seen: &SeenSetting) -> Result<Scope, String> {
    let Some(path) = key.sysctl_path() else {
        return match seen.host {
            Seen::Absent => Err(format!(
                "{key} does not exist: the module is not loaded, or not with this parameter (it appears once the path manager or scheduler that needs it is in use)"
            )),
            _ => Ok(Scope::Host),
        };
    };
    match &seen.target {
        Seen::Writable(_) if is_known_per_namespace(path, kind) => Ok(Scope::Netns),
        Seen::Writable(_) | Seen::ReadOnly(_) => Ok(Scope::Host),
        Seen::Unreadable => Err(format!("{key} cannot be read, so it could not be checked after writing")),
        Seen::Absent => match &seen.host {
            Seen::Absent => Err(absent(key, path, kind, release)),
            Seen::Unreadable => Err(format!("{key} cannot be read, so it could not be checked after writing")),
            _ => Ok(Scope::Host),
        },
    }
}

fn absent(key: &SettingKey, path: &str, kind: Kind, release: &str) -> String {
    if let Some(name) = path.strip_prefix("net/mptcp/") {
        if name.starts_with("mptcp_") && kind != Kind::MptcpOrg {
            return format!("{key} exists on multipath-tcp.org kernels alone; this is {release}");
        }
        if kind == Kind::MptcpOrg {
            return format!(
                "{key} does not exist on this multipath-tcp.org kernel; its keys begin with mptcp_, such as mptcp_{name}"
            );
        }
        if let Some((_, since)) = SINCE.iter().find(|(known, _)| *known == name) {
            return format!("{key} exists since Linux {since}; this is {release}");
        }
        let known: Vec<&str> = SINCE.iter().map(|(known, _)| *known).chain(["enabled"]).collect();
        if let Some(near) = crate::request::nearest(name, known) {
            return format!("{key} does not exist on this kernel ({release}); did you mean net.mptcp.{near}?");
        }
    }
    if path.starts_with("net/netfilter/") || path.starts_with("net/bridge/") {
        return format!("{key} does not exist here: its kernel module (nf_conntrack, br_netfilter, ...) is not loaded");
    }
    format!(
        "{key} does not exist here ({release}), neither in the container's namespace nor in the hook's own; host-only keys exist in the initial network namespace alone"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(key: &str, kind: Kind, target: Seen, host: Seen) -> Result<Scope, String> {
        of(&SettingKey::try_from(key.to_string()).unwrap(), kind, "5.10.0", &SeenSetting { target, host })
    }

    fn writable() -> Seen {
        Seen::Writable("1".into())
    }

    fn read_only() -> Seen {
        Seen::ReadOnly("1".into())
    }

    #[test]
    fn the_namespace_owns_only_what_is_known_and_writable() {
        let up = Kind::Upstream;
        assert_eq!(scope("net.mptcp.enabled", up, writable(), writable()), Ok(Scope::Netns));
        assert_eq!(scope("net/ipv4/conf/eth0.100/rp_filter", up, writable(), Seen::Absent), Ok(Scope::Netns));
        assert_eq!(scope("net.ipv4.tcp_rmem", up, read_only(), writable()), Ok(Scope::Host));
        assert_eq!(scope("net.netfilter.nf_hooks_lwtunnel", up, writable(), writable()), Ok(Scope::Host));
        assert_eq!(scope("net.core.rmem_max", up, read_only(), writable()), Ok(Scope::Host));
        assert_eq!(scope("net.core.netdev_max_backlog", up, Seen::Absent, writable()), Ok(Scope::Host));
        assert!(
            scope("net.core.nope", up, Seen::Absent, Seen::Absent).unwrap_err().contains("initial network namespace")
        );
    }

    #[test]
    fn on_mptcp_org_every_mptcp_key_is_the_hosts() {
        let org = Kind::MptcpOrg;
        assert_eq!(scope("net.mptcp.mptcp_enabled", org, Seen::Absent, writable()), Ok(Scope::Host));
        assert_eq!(scope("net.mptcp.mptcp_enabled", org, writable(), writable()), Ok(Scope::Host));
        assert_eq!(scope("module:mptcp_fullmesh.num_subflows", org, Seen::Absent, writable()), Ok(Scope::Host));
        let error = scope("module:mptcp_rr.cwnd_limited", org, Seen::Absent, Seen::Absent).unwrap_err();
        assert!(error.contains("not loaded"), "{error}");
        let error = scope("net.mptcp.enabled", org, Seen::Absent, Seen::Absent).unwrap_err();
        assert!(error.contains("mptcp_enabled"), "{error}");
    }

    #[test]
    fn absent_keys_say_who_would_have_them() {
        let error = |key: &str| scope(key, Kind::Upstream, Seen::Absent, Seen::Absent).unwrap_err();
        assert!(error("net.mptcp.scheduler").contains("since Linux 6.6"));
        assert!(error("net.mptcp.mptcp_path_manager").contains("multipath-tcp.org"));
        assert!(error("net.mptcp.schedular").contains("did you mean net.mptcp.scheduler"));
        assert!(error("net.netfilter.nf_conntrack_max").contains("module"));
    }
}
