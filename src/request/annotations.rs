//! Annotations under `mptcp-hook/`: the container author's wishes.

use crate::error::shown;

use super::{Rank, Source, What, Wish};

/// The prefix of every annotation that is ours.
pub const PREFIX: &str = "mptcp-hook";

/// The keys as people write them, for the nearest-key message.
const KEYS: [&str; 11] = [
    "interface.NAME",
    "interfaces",
    "limit.subflows",
    "limit.add_addr_accepted",
    "sysctl.KEY",
    "sysctls",
    "module.MODULE.PARAM",
    "routes",
    "mptcp",
    "follow",
    "on-conflict",
];

/// Reads the wishes out of a container's annotations. Foreign keys are not ours to judge, unless their prefix is so
/// near to ours that somebody must have meant it.
pub fn wishes<'a>(annotations: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Vec<Wish>, String> {
    let mut sorted: Vec<(&str, &str)> = annotations.into_iter().collect();
    // The order of a JSON object is nobody's wish; messages should not depend on it.
    sorted.sort_unstable();
    let mut wishes = Vec::new();
    for (key, value) in sorted {
        let Some((prefix, name)) = key.split_once('/') else { continue };
        if prefix == PREFIX {
            let source = Source::new(Rank::Annotation, format!("annotation {}", shown(key)));
            let asked = annotation(name, value).map_err(|e| format!("annotation {}: {e}", shown(key)))?;
            wishes.extend(asked.into_iter().map(|what| Wish::new(what, source.clone())));
        } else if super::distance(&prefix.to_ascii_lowercase(), PREFIX) <= 2 {
            return Err(format!("annotation {}: did you mean {PREFIX}/{}?", shown(key), shown(name)));
        }
    }
    Ok(wishes)
}

/// One annotation's wishes; `name` is the key without our prefix.
fn annotation(name: &str, value: &str) -> Result<Vec<What>, String> {
    let one = |what: Result<What, String>| what.map(|what| vec![what]);
    if let Some(interface) = name.strip_prefix("interface.") {
        return super::interface(interface, value);
    }
    if let Some(limit) = name.strip_prefix("limit.") {
        return one(super::limit(limit, value));
    }
    if let Some(key) = name.strip_prefix("sysctl.") {
        return one(super::sysctl(key, value));
    }
    if let Some(key) = name.strip_prefix("module.") {
        return one(super::module(key, value));
    }
    if let Some(option) = super::partly_built(name) {
        return option.check(value).map(|()| Vec::new());
    }
    match name {
        "interfaces" => list(value, "NAME=FLAGS", super::interface),
        "sysctls" => list(value, "KEY=VALUE", |key, value| super::sysctl(key, value).map(|what| vec![what])),
        "on-conflict" => one(value.parse().map(What::OnConflict)),
        "follow" => one(value.parse().map(What::Follow)),
        "routes" => one(value.parse().map(What::Routes)),
        "name" => one(super::name(value)),
        _ => {
            // `interface.` stands for all its names: compare the word before the first dot, too.
            let head = name.split('.').next().unwrap_or(name);
            let near = super::nearest(name, KEYS).or_else(|| {
                KEYS.iter().copied().find(|key| key.split('.').next().is_some_and(|k| super::distance(head, k) <= 2))
            });
            Err(match near {
                Some(near) => format!("unknown key; did you mean {PREFIX}/{near}?"),
                None => format!("unknown key; known are {}", KEYS.map(|key| format!("{PREFIX}/{key}")).join(", ")),
            })
        }
    }
}

/// `a=b; c=d`, each read by `item`. A semicolon at the end is no wish.
fn list(value: &str, form: &str, item: fn(&str, &str) -> Result<Vec<What>, String>) -> Result<Vec<What>, String> {
    let mut wishes = Vec::new();
    for part in value.split(';').filter(|part| !part.trim().is_empty()) {
        match part.split_once('=') {
            Some((key, value)) => wishes.extend(item(key.trim(), value.trim())?),
            None => return Err(format!("\"{}\" is not {form}", shown(part.trim()))),
        }
    }
    Ok(wishes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(annotations: &[(&str, &str)]) -> Result<Vec<String>, String> {
        wishes(annotations.iter().copied())
            .map(|wishes| wishes.iter().map(|wish| format!("{}={}", wish.what.subject(), wish.what.value())).collect())
    }

    #[test]
    fn every_form_is_read() {
        let got = read(&[
            ("mptcp-hook/interface.eth1", "backup"),
            ("mptcp-hook/interfaces", "eth*=subflow; wlan?=signal;"),
            ("mptcp-hook/limit.subflows", "4"),
            ("mptcp-hook/module.mptcp_fullmesh.num_subflows", "2"),
            ("mptcp-hook/name", "web"),
            ("mptcp-hook/on-conflict", "warn"),
            ("mptcp-hook/routes", "off"),
            ("mptcp-hook/sysctl.net.mptcp.scheduler", "default"),
            ("mptcp-hook/sysctls", "net/mptcp/enabled=1; stale_loss_cnt=4"),
            ("io.podman.annotations.x", "1"),
            ("org.example/interface.eth1", "off"),
        ]);
        assert_eq!(
            got.unwrap(),
            [
                "interface eth1=subflow,backup",
                "interface eth*=subflow",
                "interface wlan?=signal",
                "limit subflows=4",
                "module:mptcp_fullmesh.num_subflows=2",
                "name=web",
                "on-conflict=warn",
                "routes=off",
                "net.mptcp.scheduler=default",
                "net.mptcp.enabled=1",
                "net.mptcp.stale_loss_cnt=4",
            ]
        );
    }

    #[test]
    fn misspelt_keys_name_the_nearest() {
        let error = |key: &str| read(&[(key, "backup")]).unwrap_err();
        assert!(error("mptcp_hook/interface.eth1").contains("did you mean mptcp-hook/interface.eth1?"));
        assert!(error("MPTCP-hook/interface.eth1").contains("did you mean mptcp-hook/interface.eth1?"));
        assert!(error("mptcp-hook/interfaces.eth1").contains("mptcp-hook/interface"));
        assert!(error("mptcp-hook/intreface.eth1").contains("mptcp-hook/interface"));
        assert!(error("mptcp-hook/sysctl").contains("mptcp-hook/sysctls"));
        assert!(error("mptcp-hook/zzz").contains("known are"));
        assert!(error("mptcp-hook/").contains("known are"));
    }

    #[test]
    fn values_that_are_not_built_say_so() {
        assert!(read(&[("mptcp-hook/routes", "on")]).unwrap_err().contains("is not auto or off"));
        assert!(read(&[("mptcp-hook/mptcp", "force")]).unwrap_err().contains("not in this version yet"));
        assert!(read(&[("mptcp-hook/follow", "sometimes")]).unwrap_err().contains("is not auto, always or never"));
        assert!(read(&[("mptcp-hook/interface.eth1", "backup,gateway=x")]).unwrap_err().contains("gateway"));
    }

    #[test]
    fn hostile_values_are_errors() {
        for (key, value) in [
            ("mptcp-hook/interfaces", "eth1"),
            ("mptcp-hook/sysctls", "kernel.core_pattern=|/x"),
            ("mptcp-hook/sysctl.net/../kernel/x", "1"),
            ("mptcp-hook/sysctl.net.mptcp.scheduler", "a\nb"),
            ("mptcp-hook/name", "a/b"),
        ] {
            assert!(read(&[(key, value)]).is_err(), "{key}");
        }
    }
}
