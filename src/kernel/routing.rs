//! Routes and rules, which both kinds of kernels have alike: read, changed, read back.

use anyhow::{Result, bail};

use super::netlink::route::Route;
use super::{Change, Routing, Rule};

/// Reads the tables and rules.
pub fn read(route: &mut Route) -> Result<Routing> {
    Ok(Routing { routes: route.table_routes()?, rules: route.rules()? })
}

/// Makes a change of routes or rules; false if it is another one.
pub fn perform(route: &mut Route, change: &Change) -> Result<bool> {
    match change {
        Change::AddRoute(new) => route.add_route(new)?,
        Change::DeleteRoute(old) => route.delete_route(old)?,
        Change::AddRule(new) => route.add_rule(new)?,
        Change::DeleteRule(old) => route.delete_rule(old)?,
        _ => return Ok(false),
    }
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
        matches!(change, AddRoute(_) | DeleteRoute(_) | AddRule(_) | DeleteRule(_))
    };
    let changes: Vec<&&Change> = changes.iter().filter(is_ours).collect();
    if changes.is_empty() {
        return Ok(());
    }
    let Routing { routes, rules } = read(route)?;
    // What was deleted and added again is what was asked for.
    for (position, change) in changes.iter().enumerate() {
        let later = &changes[position + 1..];
        match change {
            Change::AddRoute(new) if !routes.contains(new) && !later.contains(&&&Change::DeleteRoute(new.clone())) => {
                bail!("the route {new} was added and is not there")
            }
            Change::DeleteRoute(old) if routes.contains(old) && !later.contains(&&&Change::AddRoute(old.clone())) => {
                bail!("the route {old} was deleted and is still there")
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
