//! Routes and rules, which both kinds of kernels have alike: read, changed, read back.

use anyhow::{Context, Result, bail};

use super::netlink::route::Route;
use super::{Change, Routing, Rule, TableRoute};

/// Reads the tables and rules.
pub fn read(route: &mut Route) -> Result<Routing> {
    let (entries, rules) = (route.entries()?, route.rules()?);
    let tables = entries.iter().map(|entry| entry.table).chain(rules.iter().map(|(table, _)| *table)).collect();
    let routes = entries.iter().flat_map(TableRoute::of).collect();
    Ok(Routing { tables, routes, rules: rules.into_iter().filter_map(|(_, rule)| rule).collect() })
}

/// Makes a change of routes or rules; false if it is another one.
pub fn perform(route: &mut Route, change: &Change) -> Result<bool> {
    let done = match change {
        Change::AddRoute(new, _) => route.add_route(new),
        Change::DeleteRoute(old, _) => route.delete_route(old),
        Change::AddRule(new) => route.add_rule(new),
        Change::DeleteRule(old) => route.delete_rule(old),
        _ => return Ok(false),
    };
    done.with_context(|| format!("cannot {change}"))?;
    Ok(true)
}

/// Whether a rule is there as it was asked for. Before Linux 4.17 the kernel does not keep who made it.
fn same(asked: &Rule, seen: &Rule) -> bool {
    *asked == Rule { protocol: asked.protocol, ..seen.clone() }
}

/// Reads back what was changed.
pub fn confirm(route: &mut Route, changes: &[&Change]) -> Result<()> {
    let is_ours = |change: &&&Change| {
        use Change::{AddRoute, AddRule, DeleteRoute, DeleteRule};
        matches!(change, AddRoute(..) | DeleteRoute(..) | AddRule(_) | DeleteRule(_))
    };
    let changes: Vec<&&Change> = changes.iter().filter(is_ours).collect();
    if changes.is_empty() {
        return Ok(());
    }
    let Routing { routes, rules, .. } = read(route)?;
    // What was deleted and added again is what was asked for.
    for (position, change) in changes.iter().enumerate() {
        let later = &changes[position + 1..];
        let is_added = |old| later.iter().any(|change| matches!(change, Change::AddRoute(new, _) if new == old));
        let is_deleted = |new| later.iter().any(|change| matches!(change, Change::DeleteRoute(old, _) if old == new));
        match change {
            Change::AddRoute(new, by) if !routes.contains(new) && !is_deleted(new) => {
                bail!("the route {} was added and is not there", new.by(by))
            }
            Change::DeleteRoute(old, by) if routes.contains(old) && !is_added(old) => {
                bail!("the route {} was deleted and is still there", old.by(by))
            }
            Change::AddRule(new) if !rules.iter().any(|rule| same(new, rule)) => {
                bail!("the {new} was added and is not there")
            }
            Change::DeleteRule(old) if rules.iter().any(|rule| same(old, rule)) => {
                bail!("the {old} was deleted and is still there")
            }
            _ => {}
        }
    }
    Ok(())
}
