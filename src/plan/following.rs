//! What the agent's plan has of its own: it keeps to what was decided on when somebody asked, undoes a foreign change
//! once, and notes what happened.

use super::{Draft, Input};
use crate::kernel::{Address, Change, RouteState};
use crate::ledger::record::{Event, Interface, Record, State};

/// Settings are the hook's and people's to change: the agent carries over what is recorded of them.
pub fn keep_settings(draft: &mut Draft, previous: &Record) {
    draft.plan.settings = previous.settings.clone();
    draft.plan.warnings = previous.warnings.iter().take(previous.lasting_warnings).cloned().collect();
}

/// What is recorded of an interface that is followed, as it was before any work that was interrupted.
pub fn recorded<'a>(input: &Input<'a>, name: &str) -> Option<&'a Interface> {
    input.previous.filter(|_| input.follows).and_then(|record| find(record, name))
}

fn find<'a>(record: &'a Record, name: &str) -> Option<&'a Interface> {
    record.versions().last()?.interfaces.iter().find(|interface| interface.name == name)
}

/// Whether somebody else's change to `what` is undone. It is once; after that it is theirs until somebody asks again.
pub fn puts_back(input: &Input, entry: &mut Interface, what: &str) -> bool {
    let first = recorded(input, &entry.name).is_none_or(|own| own.corrected.is_none());
    if first {
        entry.corrected = Some(input.time);
    } else {
        entry.state = State::Drifted;
        entry.reason =
            Some(format!("somebody changed {what} again after it was put back; mptcp-hook apply sets it anew"));
    }
    first
}

/// Whether the agent waits a moment with a new address. The kernel opens the subflows of live connections at once and
/// only once, and a program that gives an interface an address brings up its link and its routes right after that.
pub fn waits(input: &Input, address: &Address) -> bool {
    if !input.follows || input.hurries {
        return false;
    }
    let facts = input.facts;
    let has_endpoint = facts.endpoints.iter().any(|endpoint| endpoint.address == address.ip && endpoint.port.is_none());
    // One that is gone is not new.
    let before = input.previous.and_then(|record| record.versions().last());
    let mut known = before.into_iter().flat_map(|record| &record.interfaces).flat_map(|interface| &interface.endpoints);
    let is_known = known.any(|own| own.address == address.ip);
    let link = facts.links.iter().find(|link| link.index == address.ifindex);
    let way_out = facts.routes.get(&(address.ip, address.ifindex));
    !has_endpoint && !is_known && (link.is_none_or(|link| !link.is_running()) || way_out == Some(&RouteState::Missing))
}

/// Carries over what happened, notes what happens now, and whether anything may still come.
pub fn finish(draft: &mut Draft) {
    let input = draft.input;
    for position in 0..draft.plan.interfaces.len() {
        let entry = &draft.plan.interfaces[position];
        let before = input.previous.and_then(|record| find(record, &entry.name));
        let event = input.follows.then(|| event(draft, entry, before)).flatten();
        let unsettled = is_unsettled(input, entry);
        let entry = &mut draft.plan.interfaces[position];
        entry.last = event.or_else(|| before?.last.clone());
        if input.follows {
            entry.corrected = entry.corrected.or_else(|| before?.corrected);
        }
        draft.plan.unsettled |= unsettled;
    }
}

/// Whether the interface or an address of it is not there yet, or may go or change by itself.
fn is_unsettled(input: &Input, entry: &Interface) -> bool {
    let settled = |address: &&Address| address.is_usable() && address.is_settled();
    match (entry.state, &entry.link) {
        (State::Pending, _) => true,
        // A client will come and give it an address, perhaps by a program that clears the flags.
        (State::Applied, Some(link)) => {
            !input.facts.addresses.iter().filter(settled).any(|address| address.ifindex == link.index)
        }
        _ => {
            let on_it = |address: &&Address| entry.endpoints.iter().any(|own| own.address == address.ip);
            !input.facts.addresses.iter().filter(on_it).all(Address::is_settled)
        }
    }
}

/// What happened to an interface since it was recorded.
fn event(draft: &Draft, entry: &Interface, before: Option<&Interface>) -> Option<Event> {
    let input = draft.input;
    let mut said = Vec::new();
    let has = |interface: &Interface, other| interface.endpoints.iter().any(|own| own.address == other);
    for gone in before.into_iter().flat_map(|before| &before.endpoints).filter(|own| !has(entry, own.address)) {
        let duplicate = input.facts.addresses.iter().any(|a| a.ip == gone.address && a.is_duplicate());
        let how = if duplicate { "is a duplicate (DAD failed) and is not used" } else { "went" };
        said.push(format!("{} {how}", gone.address));
    }
    let new = entry.endpoints.iter().filter(|own| before.is_none_or(|before| !has(before, own.address)));
    said.extend(new.map(|own| format!("{} came", own.address)));
    let was = |state: State| before.is_some_and(|before| before.state == state);
    if entry.corrected.is_some() {
        said.push("put back after somebody changed it".into());
    } else if entry.state == State::Drifted && !was(State::Drifted) {
        said.push("changed by somebody again, left alone".into());
    } else if draft
        .plan
        .steps
        .iter()
        .any(|s| matches!(&s.change, Change::LinkFlags { name, .. } if *name == entry.name))
    {
        let same = before.is_some_and(|before| before.link.is_some());
        said.push(if same { "flags set again after something cleared them" } else { "flags set" }.into());
    }
    if said.is_empty() && before.is_some_and(|before| before.state != entry.state || before.reason != entry.reason) {
        said.extend(entry.reason.clone().or_else(|| Some(entry.state.name().into())));
    }
    (!said.is_empty()).then(|| Event { time: input.time, what: said.join(", ") })
}
