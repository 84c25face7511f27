//! multipath-tcp.org kernels v0.94 to v0.96: `IFF_NOMULTIPATH` and `IFF_MPBACKUP` of the interface, by RTM_SETLINK with
//! a change mask. Endpoints and limits do not exist; every net.mptcp.* value is the whole host's.

use std::net::IpAddr;

use anyhow::{Result, bail};

use super::netlink::route::{Link, Route};
use super::netns::Visit;
use super::{Change, Endpoint, Facts, Kernel, Kind, RouteState, Routing, routing, sysctl};
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
        let settings = sysctl::look_around(&mut self.visit, &keys)?;
        Facts::read(Kind::MptcpOrg, &self.visit, &mut self.route, settings)
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
        routing::read(&mut self.route)
    }

    fn route(&mut self, address: IpAddr, index: u32) -> Result<RouteState> {
        Ok(self.route.usable_route(address, index)?.into())
    }
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
                super::release()
            );
        }
    }
    Ok(())
}
