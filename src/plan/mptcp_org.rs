//! Interface flags of multipath-tcp.org kernels.

use std::net::IpAddr;

use anyhow::{Result, bail};

use super::{Draft, following, routes, undo};
use crate::error::usage;
use crate::kernel::{Change, ENDPOINTS_MAX};
use crate::ledger::record::{OwnedLink, Record, State};
use crate::request::Limit;
use crate::request::flags::{IFF_MPBACKUP, IFF_NOMULTIPATH};
use crate::request::setting::{self, SettingKey};

pub fn plan<'a>(draft: &mut Draft<'a>) -> Result<()> {
    let input = draft.input;
    for limit in [Limit::Subflows, Limit::AddAddrAccepted] {
        if let Some((wish, _)) = input.request.limit(limit) {
            return Err(usage(format!(
                "{} asks for the limit {limit}, which upstream kernels alone have; here the path manager's module parameters decide (mptcp_fullmesh.num_subflows)",
                wish.source
            )));
        }
    }
    let wanted = draft.wanted_interfaces()?;
    if wanted.is_empty() {
        give_back_others(draft);
        return Ok(());
    }
    let will_be = |name: &str| -> Option<String> {
        let key = SettingKey::Sysctl(format!("net/mptcp/{name}"));
        let asked = draft.plan.settings.iter().find(|s| s.key == key && s.claimed).map(|s| s.value.clone());
        asked.or_else(|| {
            let seen = input.facts.settings.get(&key)?;
            seen.host.value().or(seen.target.value()).map(String::from)
        })
    };
    let (enabled, path_manager, scheduler) =
        (will_be("mptcp_enabled"), will_be("mptcp_path_manager"), will_be("mptcp_scheduler"));
    if enabled.as_deref().and_then(setting::integer) == Some(0) {
        bail!("net.mptcp.mptcp_enabled is 0 on this host: interface flags would do nothing; enable MPTCP first");
    }
    let asked = routes::asked(draft);
    let mut any_backup = false;
    for one in wanted {
        let Some((bits, mask)) = one.flags.link_bits() else {
            return Err(usage(format!(
                "{} asks for {} on {}: on multipath-tcp.org kernels the path manager decides that; only subflow, backup, off and default can be asked for",
                one.wish.source, one.flags, one.name
            )));
        };
        let Some(index) = one.index else {
            let pending = one.entry(State::Pending, Some("no such interface yet".into()));
            draft.plan.interfaces.push(pending);
            continue;
        };
        if draft.is_held_otherwise(&one) {
            continue;
        }
        let Some(link) = input.facts.link_at(index) else { continue };
        // Whoever of us came first knows what was there before, and what else of it is ours.
        let links = |record: &'a Record| {
            record.versions().flat_map(|version| &version.interfaces).filter_map(|interface| interface.link.as_ref())
        };
        let living = input.previous.into_iter().chain(input.siblings).flat_map(links);
        let departed = input.departed.iter().flat_map(links).filter(|own| link.flags & own.mask == own.bits);
        let known = living.chain(departed).find(|owned| owned.index == index);
        let mask = mask | known.map_or(0, |owned| owned.mask);
        let now = link.flags & mask;
        let original = known.map_or(now, |owned| owned.original);
        let addresses: Vec<IpAddr> = match one.flags.is_off() {
            true => Vec::new(),
            false => {
                let usable = input.facts.addresses.iter().filter(|a| a.ifindex == index && a.is_usable());
                usable.map(|address| address.ip).collect()
            }
        };
        let ways = routes::plan(draft, &link.name, index, &addresses, asked);
        let mut entry = one.entry(State::Applied, None);
        // busybox's ifconfig clears both bits with whatever else it sets.
        let is_cleared = now == 0;
        let is_changed = following::recorded(input, &link.name).is_some_and(|own| own.link.is_some()) && now != bits;
        let stays = is_changed && !is_cleared && !following::puts_back(input, &mut entry, "the interface's flags");
        if now != bits && !stays {
            let set = |bits| Change::LinkFlags { index, name: link.name.clone(), bits, mask };
            draft.step(set(bits), Some(set(now)), one.wish.source.place.clone());
        }
        any_backup |= bits & IFF_MPBACKUP != 0;
        if bits & IFF_NOMULTIPATH != 0 && input.facts.default_route_links.contains(&index) {
            draft.warn(format!(
                "{} is off and the default route leaves by it: connections over it will be plain TCP",
                link.name
            ));
        }
        ways.enter(input, &mut entry);
        entry.link = Some(OwnedLink { index, mask, bits, original });
        draft.plan.interfaces.push(entry);
    }
    give_back_others(draft);
    if let Some(path_manager) = path_manager.filter(|name| name != "fullmesh") {
        draft.warn(format!(
            "the path manager is {path_manager}: only fullmesh reads interface flags, so they do nothing until net.mptcp.mptcp_path_manager = fullmesh"
        ));
    }
    match scheduler.as_deref() {
        Some("roundrobin") if any_backup => {
            draft.warn("the scheduler roundrobin ignores backup: it sends on backup paths too");
        }
        Some(name @ ("blest" | "ecf")) if any_backup => {
            draft.warn(format!("the scheduler {name} stalls with an idle backup path; use default or redundant"));
        }
        _ => {}
    }
    for (family, is_v4) in [("IPv4", true), ("IPv6", false)] {
        let usable = input.facts.addresses.iter().filter(|a| a.ip.is_ipv4() == is_v4 && a.is_usable()).count();
        if usable > ENDPOINTS_MAX {
            draft.warn(format!(
                "{usable} {family} addresses: the kernel uses {ENDPOINTS_MAX} per namespace and silently ignores the others"
            ));
        }
    }
    Ok(())
}

/// Gives the bits back of interfaces that were set and are no longer asked for: a renamed one keeps its bits.
fn give_back_others(draft: &mut Draft) {
    let input = draft.input;
    let Some(previous) = input.previous else { return };
    for (_, owned) in previous.all_links() {
        let mut kept = draft.plan.interfaces.iter().filter_map(|interface| interface.link.as_ref());
        if kept.any(|kept| kept.index == owned.index) {
            continue;
        }
        let Some(link) = input.facts.link_at(owned.index) else { continue };
        let Some(change) = undo::link(previous, &link.name, owned, input.siblings, input.facts) else { continue };
        let now = link.flags & owned.mask;
        let reverse = Change::LinkFlags { index: link.index, name: link.name.clone(), bits: now, mask: owned.mask };
        draft.step(change, Some(reverse), format!("{} is no longer asked for", link.name));
    }
}
