//! Upstream Linux: endpoints and limits by generic netlink `mptcp_pm`, everything per network namespace.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;

use super::netlink::mptcp_pm::PathManager;
use super::netlink::route::Route;
use super::netlink::{self};
use super::netns::{Visit, in_initial_user_namespace};
use super::{Change, Endpoint, Facts, Kernel, Kind, RouteState, Routing, SeenSetting, is_at_least, routing, sysctl};
use crate::deadline::Deadline;
use crate::request::flags::EndpointFlags;
use crate::request::setting::SettingKey;

/// An upstream kernel, seen from one namespace.
pub struct Upstream {
    visit: Visit,
    path_manager: PathManager,
    route: Route,
}

impl Upstream {
    /// Opens the sockets; the thread is inside already.
    pub fn open(visit: Visit, deadline: Deadline) -> Result<Self> {
        let path_manager = PathManager::open(deadline)?.with_context(|| no_path_manager(&super::release()))?;
        Ok(Self { visit, path_manager, route: Route::open(deadline)? })
    }
}

impl Upstream {
    /// Deletes an endpoint by the kernel's id. With id 0 the kernel would look for something else and report success.
    fn delete(&mut self, endpoint: &Endpoint) -> Result<()> {
        let same = |e: &&Endpoint| e.address == endpoint.address && e.port == endpoint.port;
        let id = match endpoint.id {
            0 => self.path_manager.endpoints()?.iter().find(same).map(|found| found.id),
            id => Some(id),
        };
        match id {
            Some(id) => self.path_manager.delete(id, endpoint.address),
            None => bail!("there is no endpoint {} to delete", endpoint.address),
        }
    }
}

impl Kernel for Upstream {
    fn facts(&mut self, keys: &[SettingKey]) -> Result<Facts> {
        let mut settings = self.settings(keys)?;
        // What decides whether MPTCP works is the namespace's own; the host's does not matter.
        for key in ["enabled", "path_manager", "pm_type"].into_iter().filter_map(|key| SettingKey::sysctl(key).ok()) {
            let look = || SeenSetting { target: sysctl::look(&key), ..SeenSetting::default() };
            settings.entry(key.clone()).or_insert_with(look);
        }
        let facts = Facts::read(Kind::Upstream, &self.visit, &mut self.route, settings)?;
        Ok(Facts { endpoints: self.path_manager.endpoints()?, limits: Some(self.path_manager.limits()?), ..facts })
    }

    fn settings(&mut self, keys: &[SettingKey]) -> Result<BTreeMap<SettingKey, SeenSetting>> {
        sysctl::look_around(&mut self.visit, keys)
    }

    fn perform(&mut self, change: &Change) -> Result<()> {
        if sysctl::perform(&mut self.visit, change)? || routing::perform(&mut self.route, change)? {
            return Ok(());
        }
        match change {
            Change::Limits(limits) => self.path_manager.set_limits(*limits),
            Change::AddEndpoint(endpoint) => self.path_manager.add(endpoint),
            Change::SetEndpointFlags(endpoint) => self.path_manager.set_flags(endpoint.id, endpoint.flags),
            Change::DeleteEndpoint(endpoint) => self.delete(endpoint),
            other => bail!("cannot {other}: an upstream kernel takes such a write and drops the bits"),
        }
        .map_err(explain)
    }

    fn confirm(&mut self, changes: &[&Change]) -> Result<()> {
        let any = |wanted: fn(&Change) -> bool| changes.iter().any(|change| wanted(change));
        let endpoints =
            if any(|c| matches!(c, Change::AddEndpoint(_) | Change::SetEndpointFlags(_) | Change::DeleteEndpoint(_))) {
                self.path_manager.endpoints()?
            } else {
                Vec::new()
            };
        let limits = if any(|c| matches!(c, Change::Limits(_))) { Some(self.path_manager.limits()?) } else { None };
        for change in changes {
            match change {
                Change::AddEndpoint(wanted) | Change::SetEndpointFlags(wanted) => {
                    confirm_endpoint(&endpoints, wanted)?;
                }
                Change::DeleteEndpoint(gone) => {
                    // Deleted and added again with other flags is what was asked for.
                    let added = changes.iter().any(
                        |c| matches!(c, Change::AddEndpoint(e) if e.address == gone.address && e.port == gone.port),
                    );
                    let same = |e: &Endpoint| {
                        e.address == gone.address && e.port == gone.port && (gone.id == 0 || e.id == gone.id)
                    };
                    if !added && endpoints.iter().any(same) {
                        bail!("the endpoint {} was deleted and is still there", gone.address);
                    }
                }
                Change::Limits(wanted) if limits != Some(*wanted) => {
                    bail!("the limits were set to {wanted:?} and read back as {limits:?}");
                }
                _ => {}
            }
        }
        routing::confirm(&mut self.route, changes)?;
        sysctl::confirm(&mut self.visit, changes)
    }

    fn default_route_links(&mut self) -> Result<Vec<u32>> {
        self.route.default_interfaces()
    }

    fn endpoints(&mut self) -> Result<Vec<Endpoint>> {
        self.path_manager.endpoints()
    }

    fn routing(&mut self) -> Result<Routing> {
        routing::read(&mut self.route)
    }

    fn route(&mut self, address: IpAddr, index: u32) -> Result<RouteState> {
        self.route.usable_route(address, index)
    }

    fn leaves_elsewhere(&mut self, address: IpAddr, index: u32) -> Result<bool> {
        self.route.leaves_elsewhere(address, index)
    }
}

fn confirm_endpoint(endpoints: &[Endpoint], wanted: &Endpoint) -> Result<()> {
    let Some(found) = endpoints.iter().find(|e| e.address == wanted.address && e.port == wanted.port) else {
        bail!("the kernel accepted the endpoint {} and does not list it", wanted.address);
    };
    if found.flags != wanted.flags || found.ifindex != wanted.ifindex {
        let show = |e: &Endpoint| {
            let names = EndpointFlags(e.flags).names().join(",");
            format!("{} dev index {}", if names.is_empty() { "no flag" } else { &names }, e.ifindex)
        };
        bail!(
            "the kernel accepted the endpoint {} as {} and lists it as {}; this kernel ({}) may not know a flag",
            wanted.address,
            show(wanted),
            show(found),
            super::release()
        );
    }
    Ok(())
}

fn explain(error: anyhow::Error) -> anyhow::Error {
    match what_to_do(&error, &super::release(), in_initial_user_namespace()) {
        Some(advice) => anyhow!("{error:#}: {advice}"),
        None => error,
    }
}

/// What to do when the path manager refuses a change.
fn what_to_do(error: &anyhow::Error, release: &str, initial_user_namespace: bool) -> Option<String> {
    Some(match netlink::errno(error)? {
        // GENL_ADMIN_PERM became GENL_UNS_ADMIN_PERM.
        Errno::EPERM if !initial_user_namespace && !is_at_least(release, (6, 1)) => format!(
            "this kernel (Linux {release}) lets only the initial user namespace change endpoints and limits, and this is another one (a rootless container's); run Linux 6.1 or later, or run the engine as root"
        ),
        Errno::EPERM if !initial_user_namespace => {
            "CAP_NET_ADMIN is needed in the user namespace that owns the container's network namespace".into()
        }
        Errno::EPERM => "CAP_NET_ADMIN is needed: run as root".into(),
        Errno::EOPNOTSUPP => format!("this kernel (Linux {release}) has no such command"),
        _ => return None,
    })
}

/// Linux 5.6 has MPTCP without a path manager: one path, whatever is asked for.
fn no_path_manager(release: &str) -> String {
    format!(
        "this kernel (Linux {release}) has MPTCP but no path manager (generic netlink mptcp_pm), so that connections have one path; run Linux 5.7 or later"
    )
}

/// What older kernels do not do about `backup`; mended in 6.11 and stable backports, of which 6.1.192 is one.
pub fn backup_bug(release: &str, flags: EndpointFlags) -> Option<&'static str> {
    let (major, minor, patch) = super::version(release);
    if (major, minor) >= (6, 11) || (major, minor) == (6, 1) && patch >= 192 {
        None
    } else if (major, minor) <= (6, 5) && flags.contains(EndpointFlags::SIGNAL) {
        Some("may not honour backup together with signal (mended in Linux 6.11 and later stable releases)")
    } else {
        Some(
            "may ignore its own backup flag when it sends; the peer honours it (mended in Linux 6.11 and later stable releases)",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_which_kernel_is_needed() {
        let refused =
            |errno| anyhow::Error::from(netlink::KernelError { errno, message: None }).context("cannot add it");
        let advice = |errno, release, initial| what_to_do(&refused(errno), release, initial).unwrap_or_default();
        let old = advice(Errno::EPERM, "5.15.0-91-generic", false);
        assert!(old.contains("Linux 5.15.0-91-generic") && old.contains("Linux 6.1 or later"), "{old}");
        assert!(advice(Errno::EPERM, "6.1.0-37-amd64", false).starts_with("CAP_NET_ADMIN is needed in the user"));
        assert!(advice(Errno::EPERM, "5.15.0", true).ends_with("run as root"));
        assert!(advice(Errno::EOPNOTSUPP, "5.10.0", true).contains("Linux 5.10.0"));
        assert_eq!(what_to_do(&refused(Errno::EEXIST), "6.1.0", true), None);
        assert_eq!(what_to_do(&anyhow!("no answer"), "6.1.0", true), None);
        let said = format!("{:#}", explain(refused(Errno::EOPNOTSUPP)));
        assert!(said.starts_with("cannot add it: ") && said.ends_with("has no such command"), "{said}");
    }

    #[test]
    fn kernels_that_do_not_keep_to_backup_are_known() {
        let backup = EndpointFlags::SUBFLOW.union(EndpointFlags::BACKUP);
        let signal = EndpointFlags::SIGNAL.union(EndpointFlags::BACKUP);
        for mended in ["6.11.0", "6.12.1-amd64", "7.0.0-rc1", "6.1.0-56-amd64, Debian 6.1.192-2", "6.18.44-fc-v669"] {
            assert_eq!(backup_bug(mended, backup), None, "{mended}");
        }
        for old in ["6.1.0-37-amd64", "6.1.0-37-amd64, Debian 6.1.140-1", "6.10.14", "5.10.0", "6.6.3"] {
            assert!(backup_bug(old, backup).is_some_and(|bug| bug.contains("ignore its own")), "{old}");
        }
        assert!(backup_bug("6.5.1", signal).is_some_and(|bug| bug.contains("signal")));
        assert!(backup_bug("6.6.1", signal).is_some_and(|bug| bug.contains("ignore its own")));
    }
}
