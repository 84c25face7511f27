//! The door of LXC: hook versions 0 and 1, start-host and post-stop (lxc.container.conf(5), "HOOKS").

use std::path::Path;

use anyhow::Result;

use super::{Apply, Call, ContainerFiles, Place, gateways};
use crate::error::{shown, usage};
use crate::instance::{ContainerId, Door};
use crate::policy::Policy;
use crate::policy::container_file::Name;
use crate::request::{Request, What, Wish};

/// The variables that LXC sets for its hooks.
#[derive(Debug, Default)]
pub struct Variables(pub(crate) Vec<(&'static str, String)>);

impl Variables {
    const NAMES: [&'static str; 5] = ["LXC_NAME", "LXC_PID", "LXC_CONFIG_FILE", "LXC_HOOK_VERSION", "LXC_HOOK_TYPE"];

    /// Reads them out of the environment, and nothing else.
    pub fn take() -> Self {
        let read = |name| std::env::var_os(name).map(|value| (name, value.to_string_lossy().into_owned()));
        Self(Self::NAMES.into_iter().filter_map(read).collect())
    }

    /// The container's name, for messages before anything else is known.
    pub fn name(&self) -> Option<String> {
        self.get("LXC_NAME")
    }

    fn get(&self, name: &str) -> Option<String> {
        self.0.iter().find(|(known, value)| *known == name && !value.is_empty()).map(|(_, value)| value.clone())
    }
}

/// What LXC says about the container.
pub struct Environment {
    name: String,
    pid: Option<String>,
    config_file: String,
    kind: String,
}

impl Environment {
    /// Reads LXC's variables, and with hook version 0 the three words that LXC appends to the hook's line:
    /// NAME SECTION TYPE.
    pub fn read(variables: &Variables, words: &[String]) -> Result<Self> {
        let text = |name: &str| variables.get(name);
        let version_1 = text("LXC_HOOK_VERSION").as_deref() == Some("1");
        let (named, kind) = match words {
            [] => (None, text("LXC_HOOK_TYPE")),
            [name, section, kind, ..] if !version_1 && section == "lxc" => (Some(name.clone()), Some(kind.clone())),
            [word, ..] => {
                return Err(usage(format!(
                    "unexpected argument \"{}\" after the options; LXC appends NAME lxc TYPE in hook version 0 and nothing in version 1",
                    shown(word)
                )));
            }
        };
        let Some(kind) = kind else {
            return Err(usage(
                "this is no LXC hook: neither LXC_HOOK_TYPE nor the words NAME lxc TYPE are there; for use by hand see mptcp-hook apply --help",
            ));
        };
        let Some(name) = text("LXC_NAME").or(named) else {
            return Err(usage("LXC_NAME is not set; is this called by lxc.hook.start-host?"));
        };
        Ok(Self { name, pid: text("LXC_PID"), config_file: text("LXC_CONFIG_FILE").unwrap_or_default(), kind })
    }

    /// The container, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Turns it into a call. `arguments` are the wishes on the hook's line.
    pub fn into_call(self, arguments: Vec<Wish>, policy: &Policy, containers: &ContainerFiles) -> Result<Call> {
        // LXCPATH/NAME/config: two containers of one name can exist in two paths. With lxc-start -f it is any file.
        let file = Path::new(&self.config_file);
        let lxcpath = match file.parent() {
            Some(directory) if directory.ends_with(&self.name) => directory.parent().unwrap_or(directory),
            _ => file,
        };
        let container = ContainerId::new(Door::Lxc, lxcpath.to_string_lossy(), &self.name)?;
        match self.kind.as_str() {
            "start-host" => {}
            "post-stop" => return Ok(Call::Release(container)),
            other => {
                return Err(usage(format!(
                    "lxc.hook.{} is not a place for this hook; use lxc.hook.start-host and lxc.hook.post-stop",
                    shown(other)
                )));
            }
        }
        let mut request = Request::default();
        let given = arguments.iter().find_map(|wish| match &wish.what {
            What::Name(name) => Some(name.clone()),
            _ => None,
        });
        let mut names = vec![Name::Trusted(&container.id)];
        names.extend(given.as_deref().map(Name::Trusted));
        let found = containers.load(&names, |_| None)?;
        request.extend(arguments)?;
        request.extend(found.wishes)?;
        request.extend(policy.defaults.iter().cloned())?;
        gateways::add(&mut request, &container, &[], containers.initial_user_namespace);
        let pid = match self.pid.as_deref().map(str::parse::<u32>) {
            Some(Ok(pid)) if pid > 0 => pid,
            Some(_) => return Err(usage(format!("LXC_PID is \"{}\"", shown(&self.pid.unwrap_or_default())))),
            None => return Err(usage("LXC_PID is not set; LXC sets it for lxc.hook.start-host")),
        };
        let place = Place::Process(pid);
        Ok(Call::Apply(Box::new(Apply { container, place, netns_path: None, request, notes: found.notes })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&'static str, &str)], words: &[&str]) -> Result<Environment> {
        let words: Vec<String> = words.iter().map(|w| w.to_string()).collect();
        let variables = Variables(variables.iter().map(|(name, value)| (*name, value.to_string())).collect());
        Environment::read(&variables, &words)
    }

    fn call(variables: &[(&'static str, &str)], words: &[&str]) -> Result<Call> {
        let directory = "/nonexistent/containers.d".into();
        let files = ContainerFiles { directory, initial_user_namespace: true };
        read(variables, words)?.into_call(Vec::new(), &Policy::default(), &files)
    }

    const COMMON: [(&str, &str); 3] =
        [("LXC_NAME", "web"), ("LXC_PID", "77"), ("LXC_CONFIG_FILE", "/var/lib/lxc/web/config")];

    #[test]
    fn both_versions_are_understood() {
        let v1 = [&COMMON[..], &[("LXC_HOOK_VERSION", "1"), ("LXC_HOOK_TYPE", "start-host")]].concat();
        let Call::Apply(apply) = call(&v1, &[]).unwrap() else { panic!("not an apply") };
        assert_eq!(apply.place, Place::Process(77));
        assert_eq!((apply.container.id.as_str(), apply.container.engine.as_str()), ("web", "/var/lib/lxc"));
        let v0 = [&COMMON[..], &[("LXC_HOOK_VERSION", "0")]].concat();
        assert!(matches!(call(&v0, &["web", "lxc", "start-host"]).unwrap(), Call::Apply(_)));
        // At post-stop LXC_PID is still set and stale.
        assert!(matches!(call(&v0, &["web", "lxc", "post-stop"]).unwrap(), Call::Release(id) if id == apply.container));
    }

    #[test]
    fn other_callers_are_told() {
        let error =
            |variables: &[(&'static str, &str)], words: &[&str]| format!("{:#}", call(variables, words).err().unwrap());
        assert!(error(&[], &[]).contains("no LXC hook"));
        assert!(error(&COMMON, &["web", "lxc", "pre-start"]).contains("start-host and lxc.hook.post-stop"));
        assert!(error(&[("LXC_NAME", "web")], &["web", "lxc", "start-host"]).contains("LXC_PID is not set"));
        assert!(error(&[("LXC_NAME", "web"), ("LXC_PID", "x")], &["web", "lxc", "start-host"]).contains("LXC_PID is"));
        let v1 = [&COMMON[..], &[("LXC_HOOK_VERSION", "1"), ("LXC_HOOK_TYPE", "start-host")]].concat();
        assert!(error(&v1, &["eth1=backup"]).contains("unexpected argument"));
    }
}
