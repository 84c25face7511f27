//! What the agent's plan has of its own: it keeps to what was decided on when somebody asked, undoes a foreign change
//! once, and notes what happened.

use super::{Draft, Input};
use crate::kernel::{Address, Change, RouteState};
use crate::ledger::record::{Conflict, ConflictOutcome, Event, Interface, LimitPair, OwnedLimits, Record, State};
use crate::request::Request;

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
    let first = is_first(input, &entry.name);
    if first {
        entry.corrected = Some(input.time)
    } else {
        leave(entry, what)
    }
    first
}

/// Whether nothing of an interface was put back yet.
pub fn is_first(input: &Input, name: &str) -> bool {
    recorded(input, name).is_none_or(|own| own.corrected.is_none())
}

/// Says that `what` is left as somebody else has made it.
fn leave(entry: &mut Interface, what: &str) {
    entry.state = State::Drifted;
    entry.reason = Some(format!("somebody changed {what} again after it was put back; mptcp-hook apply sets it anew"));
}

/// The entry of an interface that came after somebody asked, and for which no wish can be told from the others. What was
/// there before does not suffer for it.
pub fn ignored(request: &Request, name: &str, why: &anyhow::Error) -> Interface {
    let patterns = request.patterns();
    let source = patterns.iter().find(|(pattern, _)| pattern.matches(name)).map(|(_, (wish, _))| &wish.source.place);
    Interface::new(name, Vec::new(), source.map_or("", |place| place), State::Ignored, Some(why.to_string()))
}

/// What is recorded of the limits, if they are followed.
pub fn recorded_limits(input: &Input) -> Option<OwnedLimits> {
    input.previous.filter(|_| input.follows)?.versions().last()?.limits
}

/// Leaves the limits as somebody has set them again after they were put back, and says so once.
pub fn leave_limits(draft: &mut Draft, own: OwnedLimits, now: LimitPair) {
    let reason = format!(
        "somebody has set the limits to {now} again after they were put back to {}, and they are left so; mptcp-hook apply sets them anew",
        own.set
    );
    draft.plan.limits = Some(own);
    if !draft.input.previous.is_some_and(|record| record.warnings.contains(&reason)) {
        draft.plan.conflicts.push(Conflict {
            time: draft.input.time,
            container: draft.input.container.into(),
            key: "limits".into(),
            wanted: own.set.to_string(),
            kept: now.to_string(),
            holders: vec![draft.input.container.into()],
            outcome: ConflictOutcome::Drift,
            reason: reason.clone(),
        });
    }
    draft.warn(reason);
}

/// Whether the agent waits a moment with a new address. The kernel opens the subflows of live connections at once and
/// only once, and a program that gives an interface an address brings up its link and its routes right after that.
pub fn waits(input: &Input, address: &Address) -> bool {
    if !input.follows || input.hurries {
        return false;
    }
    let facts = input.facts;
    let link = facts.link_at(address.ifindex);
    let way_out = facts.routes.get(&(address.ip, address.ifindex));
    is_new(input, address) && (link.is_none_or(|link| !link.is_running()) || way_out == Some(&RouteState::Missing))
}

/// Whether a new address stands behind as many others as can have an endpoint, so that nobody has looked for its way out.
/// Where those wait it does, too.
pub fn is_behind(input: &Input, address: &Address) -> bool {
    let is_looked_at = input.facts.routes.contains_key(&(address.ip, address.ifindex));
    input.follows && !input.hurries && !is_looked_at && is_new(input, address)
}

/// Whether an address has had no endpoint yet. One whose endpoint is gone is not new.
fn is_new(input: &Input, address: &Address) -> bool {
    let before = input.previous.and_then(|record| record.versions().last());
    let mut known = before.into_iter().flat_map(|record| &record.interfaces).flat_map(|interface| &interface.endpoints);
    !input.facts.has_endpoint(address.ip) && !known.any(|own| own.address == address.ip)
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
    let is_news = match before {
        Some(before) => before.state != entry.state || before.reason != entry.reason,
        None => entry.state == State::Ignored,
    };
    if said.is_empty() && is_news {
        said.extend(entry.reason.clone().or_else(|| Some(entry.state.name().into())));
    }
    (!said.is_empty()).then(|| Event { time: input.time, what: said.join(", ") })
}
