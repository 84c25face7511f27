//! May it? What the administrator allows, per wish and its source.

pub mod config;
pub mod container_file;
mod toml_walk;
pub mod trusted;

pub use config::{OnError, Policy};

/// The policy file, unless `--config` names another.
pub const CONFIG_FILE: &str = "/etc/mptcp-hook/config.toml";

use std::net::IpAddr;

use crate::ledger::record::Scope;
use crate::request::pattern::Pattern;
use crate::request::setting::SettingKey;
use crate::request::{OnConflict, Rank, Request, Source, What, Wish};

/// A gateway that is not to be had.
pub struct Barred<'a> {
    /// The wish for it.
    pub wish: &'a Wish,
    /// The interfaces that it is named for.
    pub pattern: &'a Pattern,
    /// The next hop.
    pub gateway: IpAddr,
    /// Why not.
    pub reason: String,
}

impl Policy {
    /// Whether the interface `name` may be asked for by `source`. The error is the reason.
    pub fn allows_interface(&self, source: &Source, name: &str) -> Result<(), String> {
        if source.rank.is_administrator() || self.annotations.interfaces.iter().any(|p| p.matches(name)) {
            return Ok(());
        }
        Err(format!(
            "annotations may not ask for {name}: [annotations] interfaces in {} does not list it",
            self.place()
        ))
    }

    /// Whether interfaces of this pattern that are not there yet may be asked for by `source`. Each one that a glob matches
    /// is judged by its own name when it comes.
    pub fn allows_pattern(&self, source: &Source, pattern: &Pattern) -> Result<(), String> {
        if !pattern.is_exact() && !self.annotations.interfaces.is_empty() {
            return Ok(());
        }
        self.allows_interface(source, pattern.as_str())
    }

    /// Whether limits may be asked for by `source`.
    pub fn allows_limit(&self, source: &Source) -> Result<(), String> {
        if source.rank.is_administrator() || self.annotations.limits {
            return Ok(());
        }
        Err(format!("annotations may not ask for limits: [annotations] limits = false in {}", self.place()))
    }

    /// Whether routes may be asked for, and gateways named, by `source`.
    pub fn allows_routes(&self, source: &Source) -> Result<(), String> {
        if source.rank.is_administrator() || self.annotations.routes {
            return Ok(());
        }
        Err(format!(
            "annotations may not ask for routes or name gateways: [annotations] routes = true in {} would allow it",
            self.place()
        ))
    }

    /// The next hop of the interface `name`, of those who may name one.
    pub fn gateway(&self, request: &Request, name: &str, is_v4: bool) -> Option<IpAddr> {
        let may = |source: &Source| self.allows_routes(source).is_ok();
        request.gateway(name, is_v4, may).map(|(_, gateway)| gateway)
    }

    /// The gateways that nobody weightier outweighs and that are named by those who may not, each with the reason.
    pub fn barred_gateways<'a>(&self, request: &'a Request) -> Vec<Barred<'a>> {
        let barred = |wish: &'a Wish| {
            let What::Gateway(pattern, gateway) = &wish.what else { return None };
            let reason = self.allows_routes(&wish.source).err()?;
            let (counts, _) = request.gateway(pattern.as_str(), gateway.is_ipv4(), |_| true)?;
            (counts.source.rank == wish.source.rank).then_some(Barred { wish, pattern, gateway: *gateway, reason })
        };
        request.wishes().iter().filter_map(barred).collect()
    }

    /// Whether `key` may become `value` for `source`.
    pub fn allows_setting(&self, source: &Source, key: &SettingKey, value: &str, scope: Scope) -> Result<(), String> {
        if source.rank.is_administrator() || self.lists(key, value) {
            return Ok(());
        }
        let own = key.sysctl_path().is_some_and(|path| path.starts_with("net/mptcp/"));
        if own && scope == Scope::Netns && self.annotations.mptcp_sysctls {
            return Ok(());
        }
        let table = if key.sysctl_path().is_some() { "annotations.sysctls" } else { "annotations.modules" };
        Err(format!("annotations may not set {key} = {value}: [{table}] in {} does not list it", self.place()))
    }

    /// Whether the policy names the key with this value for annotations.
    pub fn lists(&self, key: &SettingKey, value: &str) -> bool {
        let list = match key {
            SettingKey::Sysctl(_) => &self.annotations.sysctls,
            SettingKey::Module(..) => &self.annotations.modules,
        };
        list.iter().any(|allowed| allowed.allows(key, value))
    }

    /// What to do about a conflict over a wish of `source`. An override never acts above the trust of the wish itself:
    /// for an annotation's wish it needs the policy's word, on the value too where the wish is for a setting.
    pub fn on_conflict(&self, request: &Request, source: &Source, setting: Option<(&SettingKey, &str)>) -> OnConflict {
        let asked =
            request.on_conflict(source.rank).map(|(_, what)| what).or(self.on_conflict).unwrap_or(OnConflict::Refuse);
        let given = source.rank != Rank::Annotation
            || self.annotations.overrides && setting.is_none_or(|(key, value)| self.lists(key, value));
        match asked {
            OnConflict::Override if !given => OnConflict::Refuse,
            other => other,
        }
    }

    fn place(&self) -> String {
        match &self.path {
            Some(path) => path.display().to_string(),
            None => format!("{} (which does not exist)", CONFIG_FILE),
        }
    }
}
