//! May it? What the administrator allows, per wish and its source.

pub mod config;
pub mod container_file;
mod toml_walk;
pub mod trusted;

pub use config::{OnError, Policy};

/// The policy file, unless `--config` names another.
pub const CONFIG_FILE: &str = "/etc/mptcp-hook/config.toml";

use crate::ledger::record::Scope;
use crate::request::setting::SettingKey;
use crate::request::{OnConflict, Rank, Request, Source};

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

    /// Whether limits may be asked for by `source`.
    pub fn allows_limit(&self, source: &Source) -> Result<(), String> {
        if source.rank.is_administrator() || self.annotations.limits {
            return Ok(());
        }
        Err(format!("annotations may not ask for limits: [annotations] limits = false in {}", self.place()))
    }

    /// Whether routes may be asked for by `source`.
    pub fn allows_routes(&self, source: &Source) -> Result<(), String> {
        if source.rank.is_administrator() || self.annotations.routes {
            return Ok(());
        }
        Err(format!(
            "annotations may not ask for routes: [annotations] routes = true in {} would allow it",
            self.place()
        ))
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
