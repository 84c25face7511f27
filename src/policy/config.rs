//! The policy file: what the administrator allows containers to ask for, and what all of them get.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::toml_walk::{Document, Entry, entries};
use super::trusted;
use crate::error::usage;
use crate::request::pattern::{Pattern, glob};
use crate::request::setting::{self, SettingKey};
use crate::request::{Follow, OnConflict, Rank, Routes, Source, What, Wish, unknown};

/// The longest time, in seconds, that a container's start may be held up.
const DEADLINE_MAX: f64 = 60.0;

/// What the policy file says. The default is what holds without one.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// What happens on a conflict over a shared setting, where the wish itself does not say.
    pub on_conflict: Option<OnConflict>,
    /// What a failure (exit 1) means for the container.
    pub on_error: OnError,
    /// The time after which the hook gives up, undoes what it did and fails.
    pub deadline: Duration,
    /// Whether the host's own network namespace may be a target.
    pub host_namespace: bool,
    /// What the container author's wishes may be.
    pub annotations: AnnotationPolicy,
    /// Wishes for every container, of [`Rank::PolicyDefault`], each with its `PATH:LINE`.
    pub defaults: Vec<Wish>,
    /// The file that said so; None if there is none.
    pub path: Option<PathBuf>,
}

/// What a failure (exit 1) means for the container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// It does not start.
    #[default]
    Fail,
    /// It starts without what was asked for, and a warning says so.
    Continue,
}

/// What annotations may ask for.
#[derive(Clone, Debug, PartialEq)]
pub struct AnnotationPolicy {
    /// The interfaces whose flags they may set.
    pub interfaces: Vec<Pattern>,
    /// Whether they may set the path manager's limits.
    pub limits: bool,
    /// Whether they may set those net.mptcp.* keys that the container's own namespace has.
    pub mptcp_sysctls: bool,
    /// Other sysctls that they may set, of the namespace or the host, with their values.
    pub sysctls: Vec<Allowed>,
    /// Module parameters that they may set, with their values.
    pub modules: Vec<Allowed>,
    /// Whether they may ask for routes, and name gateways.
    pub routes: bool,
    /// Whether `on-conflict = override` of an annotation is obeyed.
    pub overrides: bool,
}

/// A setting, or a glob of settings, that annotations may set to the listed values. Several of these that cover the
/// same setting add up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    key: KeyGlob,
    /// The allowed values; `*` is any.
    pub values: Vec<String>,
}

/// A setting's name in which `*` stands for any characters within one part of it. It does not reach over a `/` of the
/// slash form: `net.ipv4.conf.*.rp_filter` is every interface's key, and `net.ipv4.*` is not the interfaces' keys,
/// so that a star can be read for what it opens.
#[derive(Clone, Debug, PartialEq, Eq)]
enum KeyGlob {
    /// Parts of the path below `/proc/sys`.
    Sysctl(Vec<String>),
    /// Module and parameter.
    Module(String, String),
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            on_conflict: None,
            on_error: OnError::Fail,
            deadline: Duration::from_secs(5),
            host_namespace: false,
            annotations: AnnotationPolicy::default(),
            defaults: Vec::new(),
            path: None,
        }
    }
}

impl Default for AnnotationPolicy {
    fn default() -> Self {
        Self {
            interfaces: vec!["*".parse().expect("a star is a pattern")],
            limits: true,
            mptcp_sysctls: true,
            sysctls: Vec::new(),
            modules: Vec::new(),
            routes: false,
            overrides: false,
        }
    }
}

/// Reads the policy file at `path`. Without one the default holds, unless it `must_exist` because somebody named it.
/// `initial_user_namespace`: see [`trusted::read`].
///
/// What is wrong in the file, or with its owner and mode, is a wrong usage (exit 2); what cannot be read a failure.
pub fn load(path: &Path, must_exist: bool, initial_user_namespace: bool) -> anyhow::Result<Policy> {
    match trusted::read(path, initial_user_namespace)? {
        Some(text) => parse(path, &text),
        None if must_exist => Err(usage(format!("{} does not exist; --config names the policy file", path.display()))),
        None => Ok(Policy::default()),
    }
}

/// Reads a policy from the `text` of the file at `path`.
pub(crate) fn parse(path: &Path, text: &str) -> anyhow::Result<Policy> {
    let (mut document, root) = Document::parse(path, text)?;
    let mut policy = Policy { path: Some(path.into()), ..Policy::default() };
    for entry in entries(&root) {
        match entry.key.as_str() {
            "on-conflict" => policy.on_conflict = document.parsed(&entry, "refuse, warn or override", str::parse),
            "on-error" => {
                let read = |text: &str| match text {
                    "fail" => Ok(OnError::Fail),
                    "continue" => Ok(OnError::Continue),
                    _ => Err(unknown("on-error", text, ["fail", "continue"])),
                };
                policy.on_error = document.parsed(&entry, "fail or continue", read).unwrap_or_default();
            }
            "host-namespace" => {
                let read = |text: &str| match text {
                    "refuse" => Ok(false),
                    "allow" => Ok(true),
                    _ => Err(unknown("host-namespace", text, ["refuse", "allow"])),
                };
                policy.host_namespace = document.parsed(&entry, "refuse or allow", read).unwrap_or_default();
            }
            "deadline" => policy.deadline = deadline(&mut document, &entry).unwrap_or(policy.deadline),
            "annotations" => policy.annotations = annotations(&mut document, &entry),
            "defaults" => {
                for inner in document.entries(&entry) {
                    let option = match inner.key.as_str() {
                        "follow" => Some(document.parsed(&inner, Follow::WORDS, |text| text.parse().map(What::Follow))),
                        "routes" => Some(document.parsed(&inner, Routes::WORDS, |text| text.parse().map(What::Routes))),
                        _ => None,
                    };
                    if let Some(what) = option {
                        let source = Source::new(Rank::PolicyDefault, document.place(inner.at));
                        policy.defaults.extend(what.map(|what| Wish::new(what, source)));
                        continue;
                    }
                    match document.wishes(&inner, Rank::PolicyDefault) {
                        Some(wishes) => policy.defaults.extend(wishes),
                        None => {
                            let known = ["interfaces", "limits", "sysctls", "modules", "routes", "follow"];
                            document.mistake(inner.at, format!("[defaults]: {}", unknown("key", &inner.key, known)));
                        }
                    }
                }
            }
            other => {
                let known = ["on-conflict", "on-error", "deadline", "host-namespace", "annotations", "defaults"];
                document.mistake(entry.at, unknown("key", other, known));
            }
        }
    }
    document.finish()?;
    Ok(policy)
}

fn deadline(document: &mut Document, entry: &Entry<'_>) -> Option<Duration> {
    let seconds = document.number(entry, "seconds, such as 5 or 2.5")?;
    let duration = Duration::try_from_secs_f64(seconds).ok();
    match duration.filter(|duration| !duration.is_zero() && seconds <= DEADLINE_MAX) {
        Some(duration) => Some(duration),
        None => {
            document.mistake(entry.at, format!("deadline is not above 0 and at most {DEADLINE_MAX} seconds"));
            None
        }
    }
}

fn annotations(document: &mut Document, table: &Entry<'_>) -> AnnotationPolicy {
    let mut policy = AnnotationPolicy::default();
    for entry in document.entries(table) {
        match entry.key.as_str() {
            "interfaces" => {
                policy.interfaces.clear();
                for (at, text) in document.scalars(&entry) {
                    match text.parse() {
                        Ok(pattern) => policy.interfaces.push(pattern),
                        Err(e) => document.mistake(at, e),
                    }
                }
            }
            "limits" => policy.limits = document.boolean(&entry).unwrap_or_default(),
            "mptcp-sysctls" => policy.mptcp_sysctls = document.boolean(&entry).unwrap_or_default(),
            "routes" => policy.routes = document.boolean(&entry).unwrap_or_default(),
            "override" => policy.overrides = document.boolean(&entry).unwrap_or_default(),
            "sysctls" => policy.sysctls = allowed(document, &entry, KeyGlob::sysctl),
            "modules" => policy.modules = allowed(document, &entry, KeyGlob::module),
            other => {
                let known = ["interfaces", "limits", "mptcp-sysctls", "routes", "override", "sysctls", "modules"];
                document.mistake(entry.at, format!("[annotations]: {}", unknown("key", other, known)));
            }
        }
    }
    policy
}

/// A glob of names, and a key that has the names' form, by which values are checked.
type ReadGlob = fn(&str) -> Result<(KeyGlob, SettingKey), String>;

fn allowed(document: &mut Document, table: &Entry<'_>, read: ReadGlob) -> Vec<Allowed> {
    let mut list = Vec::new();
    for entry in document.dotted_entries(table) {
        let (key, example) = match read(&entry.key) {
            Ok(key) => key,
            Err(e) => {
                document.mistake(entry.at, e);
                continue;
            }
        };
        let mut values = Vec::new();
        let texts = document.scalars(&entry);
        for (at, text) in &texts {
            match setting::value(&example, text) {
                Ok(value) => values.push(value),
                Err(e) => document.mistake(*at, show_stars(e)),
            }
        }
        if texts.is_empty() {
            let key = entry.key.escape_debug();
            document.mistake(entry.at, format!("{key} allows no value; list values, \"*\" for any, or leave it out"));
        }
        list.push(Allowed { key, values });
    }
    list
}

/// Stands for a star while the reader of exact names looks at a glob; interface names in keys do not have it.
const STAND_IN: &str = "@";

fn show_stars(text: String) -> String {
    text.replace(STAND_IN, "*")
}

impl KeyGlob {
    fn sysctl(text: &str) -> Result<(Self, SettingKey), String> {
        let text = text.trim();
        if !text.contains('*') {
            let key = SettingKey::sysctl(text)?;
            return Ok((Self::parts(&key, str::to_string), key));
        }
        if text.contains(STAND_IN) {
            return Err(format!("sysctl key \"{}\" has both * and {STAND_IN}", text.escape_debug()));
        }
        let key = SettingKey::sysctl(&text.replace('*', STAND_IN)).map_err(show_stars)?;
        Ok((Self::parts(&key, |part| show_stars(part.into())), key))
    }

    fn parts(key: &SettingKey, show: impl Fn(&str) -> String) -> Self {
        Self::Sysctl(key.sysctl_path().unwrap_or_default().split('/').map(show).collect())
    }

    fn module(text: &str) -> Result<(Self, SettingKey), String> {
        let text = text.trim();
        // Any character that a module's name can have serves, since only the form is looked at.
        let key = SettingKey::module(&text.replace('*', "_")).map_err(|e| match text.contains('*') {
            true => format!("\"{}\" is not MODULE.PARAM of mptcp or mptcp_* modules", text.escape_debug()),
            false => e,
        })?;
        let (module, param) = text.split_once('.').unwrap_or_default();
        Ok((Self::Module(module.into(), param.into()), key))
    }

    fn covers(&self, key: &SettingKey) -> bool {
        let part = |glob_part: &str, part: &str| match glob_part.contains('*') {
            true => glob(glob_part.as_bytes(), part.as_bytes()),
            false => glob_part == part,
        };
        match (self, key) {
            (Self::Sysctl(parts), SettingKey::Sysctl(path)) => {
                parts.len() == path.split('/').count() && parts.iter().zip(path.split('/')).all(|(g, p)| part(g, p))
            }
            (Self::Module(module, param), SettingKey::Module(m, p)) => part(module, m) && part(param, p),
            _ => false,
        }
    }
}

impl Allowed {
    /// Whether `key` is meant, whatever its value.
    pub fn covers(&self, key: &SettingKey) -> bool {
        self.key.covers(key)
    }

    /// Whether `key` may be set to `value`. Values are compared as the kernel reads them.
    pub fn allows(&self, key: &SettingKey, value: &str) -> bool {
        self.covers(key) && self.values.iter().any(|listed| listed == "*" || setting::same(key, listed, value))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::super::trusted::testing::root_directory;
    use super::*;
    use crate::error::exit_status;

    const EXAMPLE: &str = include_str!("../../examples/config.toml");

    fn read(text: &str) -> Result<Policy, String> {
        parse(Path::new("/etc/mptcp-hook/config.toml"), text).map_err(|e| {
            assert_eq!(exit_status(&e), 2);
            let text = e.to_string();
            assert!(!text.contains('\n'), "{text}");
            text.strip_prefix("/etc/mptcp-hook/config.toml:").expect("starts with file and line").to_string()
        })
    }

    #[test]
    fn everything_is_read() {
        let policy = read(
            r#"
            on-conflict = "warn"
            on-error = "continue"
            deadline = 2.5
            host-namespace = "allow"
            [annotations]
            interfaces = ["eth*", "wwan0"]
            limits = false
            mptcp-sysctls = false
            override = true
            [annotations.sysctls]
            "net.mptcp.scheduler" = ["default", "burst"]
            "net.core.rmem_max" = 0x1000
            [annotations.modules]
            "mptcp_fullmesh.num_subflows" = [1, 2]
            [defaults.interfaces]
            "wwan*" = "backup"
            [defaults.limits]
            subflows = 4
            [defaults.sysctls]
            "net.mptcp.stale_loss_cnt" = 2
            [defaults.modules]
            "mptcp_rr.cwnd_limited" = "Y"
            "#,
        )
        .unwrap();
        assert_eq!(policy.on_conflict, Some(OnConflict::Warn));
        assert_eq!(policy.on_error, OnError::Continue);
        assert_eq!(policy.deadline, Duration::from_millis(2500));
        assert!(policy.host_namespace);
        let annotations = &policy.annotations;
        assert_eq!(annotations.interfaces.iter().map(Pattern::as_str).collect::<Vec<_>>(), ["eth*", "wwan0"]);
        assert!(!annotations.limits && !annotations.mptcp_sysctls && annotations.overrides);
        assert_eq!(annotations.sysctls[0].values, ["default", "burst"]);
        assert_eq!(annotations.sysctls[1].values, ["0x1000"]);
        assert_eq!(annotations.modules[0].values, ["1", "2"]);
        let defaults: Vec<String> =
            policy.defaults.iter().map(|wish| format!("{}={}", wish.source, wish.what.value())).collect();
        let place = |line: u32, value: &str| format!("/etc/mptcp-hook/config.toml:{line}={value}");
        assert_eq!(defaults, [place(17, "subflow,backup"), place(19, "4"), place(21, "2"), place(23, "Y")]);
        assert!(policy.defaults.iter().all(|wish| wish.source.rank == Rank::PolicyDefault));
        assert_eq!(policy.path.as_deref(), Some(Path::new("/etc/mptcp-hook/config.toml")));
    }

    #[test]
    fn unknown_keys_have_their_line_and_the_nearest_known_one() {
        for (text, expected) in [
            ("\n\non-conflct = \"warn\"", "3: unknown key \"on-conflct\"; did you mean on-conflict?"),
            ("deadline = 5\n[anotations]\n", "2: unknown key \"anotations\"; did you mean annotations?"),
            ("[annotations]\nlimit = true", "2: [annotations]: unknown key \"limit\"; did you mean limits?"),
            (
                "[annotations]\nmptcp_sysctls = true",
                "2: [annotations]: unknown key \"mptcp_sysctls\"; did you mean mptcp-sysctls?",
            ),
            (
                "[defaults]\n[defaults.interface]\neth0 = \"off\"",
                "2: [defaults]: unknown key \"interface\"; did you mean interfaces?",
            ),
            ("[defaults.limits]\nsubflow = 2", "2: unknown limit \"subflow\"; did you mean subflows?"),
            (
                "[defaults.interfaces]\n\"eth0\" = \"bakup\"",
                "2: interface eth0: unknown flag \"bakup\"; did you mean backup?",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), expected);
        }
        assert!(read("zzz = 1").unwrap_err().starts_with("1: unknown key \"zzz\"; known are on-conflict, on-error,"));
    }

    #[test]
    fn wrong_types_and_values_have_their_line() {
        for (text, expected) in [
            ("\non-conflict = \"stop\"", "2: \"stop\" is not refuse, warn or override"),
            ("on-conflict = 1", "1: on-conflict is a whole number; write refuse, warn or override"),
            ("on-error = \"contine\"", "1: unknown on-error \"contine\"; did you mean continue?"),
            ("host-namespace = true", "1: host-namespace is true or false; write refuse or allow"),
            ("deadline = \"5s\"", "1: deadline is a string; write seconds, such as 5 or 2.5"),
            ("annotations = true", "1: annotations is true or false; write a table"),
            ("[annotations]\nlimits = \"yes\"", "2: limits is a string; write true or false"),
            ("[annotations]\ninterfaces = [\n\"eth*\",\n\"a/b\"]", "4: interface name \"a/b\" has the character '/'"),
            (
                "[annotations]\ninterfaces = [1.5]",
                "2: interfaces has a number with a fraction in its list; write a string, a whole number or a list of them",
            ),
            (
                "[annotations.sysctls]\nscheduler = []",
                "2: scheduler allows no value; list values, \"*\" for any, or leave it out",
            ),
            (
                "[annotations.sysctls]\n\"kernel.*\" = 1",
                "2: kernel.* is not a net.* sysctl; only those and MPTCP module parameters may be set here",
            ),
            ("[annotations.sysctls]\n\"net.mptcp.*\" = \"\"", "2: the value for net.mptcp.* is empty"),
            (
                "[annotations.modules]\n\"tcp_*.x\" = 1",
                "2: \"tcp_*.x\" is not MODULE.PARAM of mptcp or mptcp_* modules",
            ),
            (
                "[annotations.modules]\n\"mptcp_rr\" = 1",
                "2: \"mptcp_rr\" is not MODULE.PARAM, such as mptcp_fullmesh.num_subflows",
            ),
            (
                "[defaults.sysctls]\n\"net.mptcp.enabled\" = \"1\\n0\"",
                "2: the value \"1\\n0\" for net.mptcp.enabled has a line break or control character",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), expected);
        }
        for bad in ["0", "-1", "0.0", "60.5", "61", "nan", "inf", "1e-12", "1e300"] {
            let error = read(&format!("deadline = {bad}")).unwrap_err();
            assert_eq!(error, "1: deadline is not above 0 and at most 60 seconds", "{bad}");
        }
        assert_eq!(read("deadline = 60").unwrap().deadline, Duration::from_secs(60));
    }

    fn allows(table: &str, entry: &str, key: &SettingKey, value: &str) -> bool {
        let policy = read(&format!("[annotations.{table}]\n{entry}")).unwrap().annotations;
        policy.sysctls.iter().chain(&policy.modules).any(|allowed| allowed.allows(key, value))
    }

    #[test]
    fn listed_sysctls_are_found_in_any_spelling() {
        let key = |key: &str| SettingKey::sysctl(key).unwrap();
        for entry in ["scheduler", "\"net.mptcp.scheduler\"", "\"net/mptcp/scheduler\"", "net.mptcp.scheduler", "\"*\""]
        {
            let entry = format!("{entry} = [\"default\", \"burst\"]");
            assert!(allows("sysctls", &entry, &key("net.mptcp.scheduler"), "burst"), "{entry}");
            assert!(!allows("sysctls", &entry, &key("net.mptcp.scheduler"), "rr"), "{entry}");
            assert!(!allows("sysctls", &entry, &key("net.core.rmem_max"), "burst"), "{entry}");
        }
        assert!(allows("sysctls", "\"net.core.rmem_max\" = 4096", &key("net.core.rmem_max"), "0x1000"));
        assert!(allows("sysctls", "\"net.core.rmem_max\" = \"*\"", &key("net.core.rmem_max"), "7"));
        let rmem = "\"net.ipv4.tcp_rmem\" = \"4096 131072 6291456\"";
        assert!(allows("sysctls", rmem, &key("net.ipv4.tcp_rmem"), "4096\t0x20000\t6291456"));
    }

    #[test]
    fn a_star_stays_within_its_part() {
        let key = |key: &str| SettingKey::sysctl(key).unwrap();
        let conf = "\"net.ipv4.conf.*.rp_filter\" = [0, 2]";
        assert!(allows("sysctls", conf, &key("net/ipv4/conf/eth0.100/rp_filter"), "2"));
        assert!(!allows("sysctls", conf, &key("net/ipv4/conf/eth0/rp_filter"), "1"));
        assert!(!allows("sysctls", conf, &key("net/ipv4/conf/eth0/forwarding"), "0"));
        let vlan = "\"net/ipv4/conf/eth0.*/rp_filter\" = 0";
        assert!(allows("sysctls", vlan, &key("net/ipv4/conf/eth0.100/rp_filter"), "0"));
        assert!(!allows("sysctls", vlan, &key("net/ipv4/conf/eth1.100/rp_filter"), "0"));
        let ipv4 = "\"net.ipv4.*\" = \"*\"";
        assert!(allows("sysctls", ipv4, &key("net.ipv4.tcp_sack"), "0"));
        assert!(!allows("sysctls", ipv4, &key("net.ipv4.conf.all.forwarding"), "1"));
        assert!(read("[annotations.sysctls]\n\"net.x.*@\" = 1").unwrap_err().contains("both * and @"));
    }

    #[test]
    fn listed_module_parameters() {
        let key = |key: &str| SettingKey::module(key).unwrap();
        assert!(allows("modules", "mptcp_rr.cwnd_limited = 1", &key("mptcp_rr.cwnd_limited"), "Y"));
        let subflows = "\"mptcp_*.num_subflows\" = [1, 2]";
        assert!(allows("modules", subflows, &key("mptcp_fullmesh.num_subflows"), "2"));
        assert!(!allows("modules", subflows, &key("mptcp_fullmesh.num_subflows"), "3"));
        assert!(!allows("modules", subflows, &key("mptcp_rr.num_segments"), "1"));
        assert!(!allows("modules", subflows, &SettingKey::sysctl("num_subflows").unwrap(), "1"));
    }

    #[test]
    fn load_reads_a_real_file_and_defaults_without_one() {
        let dir = root_directory();
        let path = dir.path().join("config.toml");
        assert_eq!(load(&path, false, true).unwrap(), Policy::default());
        let error = load(&path, true, true).unwrap_err();
        assert_eq!(exit_status(&error), 2);
        assert!(error.to_string().contains("does not exist"), "{error}");
        fs::write(&path, "[annotations]\ninterfaces = []\n").unwrap();
        let policy = load(&path, false, true).unwrap();
        assert_eq!(policy.path.as_deref(), Some(path.as_path()));
        assert!(policy.annotations.interfaces.is_empty());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(exit_status(&load(&path, false, true).unwrap_err()), 2);
    }

    #[test]
    fn the_shipped_example_is_the_default_and_its_suggestions_are_read() {
        let policy = read(EXAMPLE).unwrap();
        assert_eq!(policy, Policy { path: policy.path.clone(), ..Policy::default() });
        // `# ` begins a sentence, `#` alone a line to be switched on.
        let switch = |line: &str| match line.strip_prefix('#') {
            Some(code) if !code.is_empty() && !code.starts_with(' ') => code.to_string(),
            _ => line.to_string(),
        };
        let switched_on: String = EXAMPLE.lines().map(|line| switch(line) + "\n").collect();
        let policy = read(&switched_on).unwrap();
        assert_eq!(policy.on_conflict, Some(OnConflict::Refuse));
        assert!(policy.annotations.sysctls.len() > 1 && !policy.annotations.modules.is_empty());
        assert!(policy.defaults.len() > 3);
    }
}
