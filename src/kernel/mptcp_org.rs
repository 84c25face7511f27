//! multipath-tcp.org kernels v0.94 to v0.96: `IFF_NOMULTIPATH` and `IFF_MPBACKUP` of the interface, by RTM_SETLINK with
//! a change mask. Endpoints and limits do not exist; every net.mptcp.* value is the whole host's.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Result, bail};

use super::netlink::route::{Link, Route};
use super::netlink::routing::PROTOCOL;
use super::netns::Visit;
use super::{
    Change, Endpoint, Facts, Kernel, Kind, RouteState, Routing, SeenSetting, is_at_least, release, routing, sysctl,
};
use crate::deadline::Deadline;
use crate::request::setting::SettingKey;

/// A multipath-tcp.org kernel, seen from one namespace.
pub struct MptcpOrg {
    visit: Visit,
    route: Route,
}

impl MptcpOrg {
    /// Opens the socket; the thread is inside already.
    pub fn open(visit: Visit, deadline: Deadline) -> Result<Self> {
        Ok(Self { visit, route: Route::open(deadline)? })
    }
}

impl Kernel for MptcpOrg {
    fn facts(&mut self, keys: &[SettingKey]) -> Result<Facts> {
        let mut keys = keys.to_vec();
        for key in ["mptcp_enabled", "mptcp_path_manager", "mptcp_scheduler"] {
            keys.extend(SettingKey::sysctl(key));
        }
        keys.sort();
        keys.dedup();
        let settings = self.settings(&keys)?;
        Facts::read(Kind::MptcpOrg, &self.visit, &mut self.route, settings)
    }

    fn settings(&mut self, keys: &[SettingKey]) -> Result<BTreeMap<SettingKey, SeenSetting>> {
        sysctl::look_around(&mut self.visit, keys)
    }

    fn perform(&mut self, change: &Change) -> Result<()> {
        if sysctl::perform(&mut self.visit, change)? || routing::perform(&mut self.route, change)? {
            return Ok(());
        }
        match change {
            Change::LinkFlags { index, bits, mask, .. } => self.route.set_link_flags(*index, *bits, *mask),
            other => bail!("cannot {other}: multipath-tcp.org kernels have neither endpoints nor limits"),
        }
    }

    fn confirm(&mut self, changes: &[&Change]) -> Result<()> {
        if changes.iter().any(|change| matches!(change, Change::LinkFlags { .. })) {
            confirm_links(&self.route.links()?, changes)?;
        }
        routing::confirm(&mut self.route, changes)?;
        sysctl::confirm(&mut self.visit, changes)
    }

    fn default_route_links(&mut self) -> Result<Vec<u32>> {
        self.route.default_interfaces()
    }

    fn endpoints(&mut self) -> Result<Vec<Endpoint>> {
        Ok(Vec::new())
    }

    fn routing(&mut self) -> Result<Routing> {
        Ok(with_makers(routing::read(&mut self.route)?, &release()))
    }

    fn route(&mut self, address: IpAddr, index: u32) -> Result<RouteState> {
        self.route.usable_route(address, index)
    }

    fn leaves_elsewhere(&mut self, address: IpAddr, index: u32) -> Result<bool> {
        self.route.leaves_elsewhere(address, index)
    }
}

/// Before Linux 4.17 the kernel takes no word of who made a rule (`FRA_PROTOCOL`) and gives none back. Such a rule is ours
/// if it is so in all else: it has the number of ours, and leads to a table that nobody else has.
fn with_makers(mut routing: Routing, release: &str) -> Routing {
    if !is_at_least(release, (4, 17)) {
        for rule in &mut routing.rules {
            rule.protocol = PROTOCOL;
        }
    }
    routing
}

/// Compares the interface flags with what was written. An upstream kernel takes the write and drops the bits.
fn confirm_links(links: &[Link], changes: &[&Change]) -> Result<()> {
    for change in changes {
        let Change::LinkFlags { index, name, bits, mask } = change else { continue };
        let Some(link) = links.iter().find(|link| link.index == *index) else {
            bail!("the interface {name} is gone after its flags were set");
        };
        if link.flags & mask != *bits {
            bail!(
                "the flags of {name} were set to {bits:#x} and read back as {:#x}; this kernel ({}) does not keep these bits",
                link.flags & mask,
                release()
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Rule;
    use super::super::netlink::testing::{in_namespace, ip, soon};
    use super::*;

    /// Rules as they look on 4.14, where nobody can say whose they are.
    #[test]
    fn rules_without_a_maker_are_known_again() {
        in_namespace(|| {
            ip("rule add from 10.0.2.2 lookup 7800 priority 32000 protocol 0\n\
                rule add from 10.0.2.3 lookup 7800 priority 32000 protocol 0\n");
            let routing = routing::read(&mut Route::open(soon()).unwrap()).unwrap();
            let ours = Rule {
                is_v4: true,
                priority: 32_000,
                from: Some([10, 0, 2, 2].into()),
                oif: None,
                table: 7800,
                protocol: PROTOCOL,
            };
            for old in ["4.14.24", "4.16.0-mptcp"] {
                let rules = with_makers(routing.clone(), old).rules;
                assert_eq!(rules.iter().filter(|rule| **rule == ours).count(), 1, "{old}: {rules:?}");
            }
            for new in ["4.17.0", "4.19.160", "5.4.188"] {
                assert_eq!(with_makers(routing.clone(), new), routing, "{new}");
            }
        });
    }
}
