//! The administrator's files: config.toml (first byte even) and containers.d/NAME.toml (odd).
#![no_main]

use std::path::Path;
use std::time::Duration;

use invariants as must;
use libfuzzer_sys::fuzz_target;
use mptcp_hook::fuzzing;
use mptcp_hook::policy::Policy;
use mptcp_hook::request::setting::{self, SettingKey};
use mptcp_hook::request::{Rank, Request};

const ANNOTATIONS: [(&str, &str); 2] = [("org.example.tier", "web1"), ("a", "")];

fuzz_target!(|input: &[u8]| {
    let Some((first, text)) = input.split_first() else { return };
    // The reader of files has refused anything else.
    let Ok(text) = std::str::from_utf8(text) else { return };
    if first % 2 == 0 { policy(text) } else { container_file(text) }
});

fn policy(text: &str) {
    let path = Path::new("/etc/mptcp-hook/config.toml");
    let policy = match fuzzing::policy(path, text) {
        Ok(policy) => policy,
        Err(error) => return file_error(path, &error),
    };
    only_known_keys(text, &["on-conflict", "on-error", "deadline", "host-namespace", "annotations", "defaults"]);
    assert!(policy.deadline > Duration::ZERO && policy.deadline <= Duration::from_secs(60));
    must::wishes(&policy.defaults, &[Rank::PolicyDefault]);
    let nothing_said = Policy { path: Some(path.into()), ..Policy::default() };
    if !text.contains('=') && !text.contains('[') {
        assert_eq!(policy, nothing_said);
    }
    // What has no list opens nothing; what a list allows is covered by one of its entries.
    for key in [
        SettingKey::Sysctl("net/core/rmem_max".into()),
        SettingKey::Sysctl("net/ipv4/conf/eth0/rp_filter".into()),
        SettingKey::Module("mptcp_fullmesh".into(), "num_subflows".into()),
    ] {
        let is_sysctl = key.sysctl_path().is_some();
        let list = if is_sysctl { &policy.annotations.sysctls } else { &policy.annotations.modules };
        let listed = list.iter().any(|allowed| {
            let value = |listed: &String| listed == "*" || setting::same(&key, listed, "1");
            allowed.covers(&key) && allowed.values.iter().any(value)
        });
        assert_eq!(policy.lists(&key, "1"), listed);
        assert!(!listed || text.contains("sysctls") == is_sysctl || text.contains("modules") || text.contains('\\'));
    }
    for allowed in policy.annotations.sysctls.iter().chain(&policy.annotations.modules) {
        assert!(!allowed.values.is_empty());
        // Whatever is listed, it is settings of the network alone.
        assert!(!allowed.covers(&SettingKey::Sysctl("kernel/core_pattern".into())));
        assert!(!allowed.covers(&SettingKey::Module("tcp_bbr".into(), "x".into())));
    }
}

fn container_file(text: &str) {
    let path = Path::new("web.toml");
    let annotation = |key: &str| ANNOTATIONS.iter().find(|(known, _)| *known == key).map(|(_, value)| *value);
    let trusted = match fuzzing::container_file(path, text, true, annotation) {
        Ok(found) => found,
        Err(error) => return file_error(path, &error),
    };
    // By a name from an annotation a file says the same or nothing.
    let by_annotation = fuzzing::container_file(path, text, false, annotation).expect("as right as before");
    let found = match trusted {
        Ok(wishes) => wishes,
        Err(note) => {
            assert_eq!(by_annotation, Err(note.clone()));
            return must::one_line(&note);
        }
    };
    only_known_keys(
        text,
        &["match", "interfaces", "limits", "sysctls", "modules", "on-conflict", "name", "routes", "mptcp", "follow"],
    );
    match by_annotation {
        Ok(same) => assert!(same == found && text.contains("match") || text.contains('\\')),
        Err(note) => must::one_line(&note),
    }
    must::wishes(&found, &[Rank::ContainerFile]);
    let mut request = Request::default();
    match request.extend(found) {
        Ok(()) => must::request(&request),
        Err(error) => must::usage_error(&error),
    }
}

/// It names the file, and the line where there is one.
fn file_error(path: &Path, error: &anyhow::Error) {
    must::usage_error(error);
    assert!(error.to_string().starts_with(&format!("{}:", path.display())), "{error:#}");
}

/// Looked at with another eye than the program's own.
fn only_known_keys(text: &str, known: &[&str]) {
    // This one refuses numbers beyond 64 bits, which the program leaves to the kernel.
    let Ok(table) = text.parse::<toml::Table>() else { return };
    assert!(table.keys().all(|key| known.contains(&key.as_str())), "{table:?}");
}
