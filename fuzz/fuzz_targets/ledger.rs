//! The ledger's files, NUL between them: a record, a setting's value, a claim on it, an intent, and a history.
#![no_main]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use invariants as must;
use libfuzzer_sys::fuzz_target;
use mptcp_hook::context::Context;
use mptcp_hook::deadline::Deadline;
use mptcp_hook::front::ContainerFiles;
use mptcp_hook::ledger::record::Record;
use mptcp_hook::ledger::{Fault, Following, Ledger};
use mptcp_hook::policy::Policy;
use mptcp_hook::request::setting::SettingKey;
use mptcp_hook::{report, status};

const FILES: [&str; 5] = [
    "containers/x",
    "settings/net~core~rmem_max/value",
    "settings/net~core~rmem_max/claims/x",
    "settings/net~core~rmem_max/intent",
    "conflicts",
];

fuzz_target!(|input: &[u8]| {
    let directory = must::scratch();
    let ledger = Ledger::create(directory).expect("a ledger in the scratch directory");
    let claims = directory.join("settings/net~core~rmem_max/claims");
    if !claims.exists() {
        fs::create_dir_all(&claims).expect("the scratch directory can be written");
    }
    let mut parts = input.splitn(FILES.len(), |byte| *byte == 0);
    for file in FILES {
        let part = parts.next().unwrap_or_default();
        put(&directory.join(file), part);
        if file == "conflicts" {
            // Both histories are read alike.
            put(&directory.join("failures"), part);
        }
    }
    for record in ledger.records().expect("the directory can be listed") {
        match record {
            Ok(record) => same_again(&record),
            Err(error) => fault(&error),
        }
    }
    let (settings, errors) = ledger.settings().expect("the directory can be listed");
    errors.iter().for_each(fault);
    for setting in &settings {
        must::key(&setting.key);
        assert!(setting.claims.is_sorted_by_key(|claim| claim.time));
        // Where nobody who is alive relies on it, it goes back to what was there before.
        assert_eq!(setting.left_behind("another boot"), Some(setting.original.as_str()));
    }
    // What is whole for those who act on it is whole for those who show what can be read, and the other way round.
    match ledger.setting(&SettingKey::Sysctl("net/core/rmem_max".into())).read() {
        Ok(Some(setting)) => assert!(errors.is_empty() && settings == [setting]),
        // Without a value nobody looks at the claims.
        Ok(None) => assert!(settings.is_empty()),
        Err(_) => assert!(!errors.is_empty()),
    }
    for conflict in ledger.conflicts().map(|history| history.items).unwrap_or_default() {
        assert!(serde_json::to_string(&conflict).is_ok());
    }
    shown(directory);
});

/// `status` shows whatever is there, and obeys nothing of it.
fn shown(directory: &Path) {
    let context = Context {
        policy: Policy::default(),
        state_dir: directory.into(),
        containers: ContainerFiles { directory: directory.join("none"), initial_user_namespace: true },
        deadline: Deadline::after(Duration::from_secs(5)),
    };
    let status = status::status(&context, None).expect("shows what it can");
    must::lines(&report::text::status(&status));
    let text = report::json::status(&status).expect("can be said in JSON");
    serde_json::from_str::<serde_json::Value>(&text).expect("is JSON");
}

/// An empty part is no file.
fn put(path: &Path, bytes: &[u8]) {
    if bytes.is_empty() {
        let _ = fs::remove_file(path);
        return;
    }
    let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    open.and_then(|mut file| file.write_all(bytes)).expect("the scratch directory can be written");
}

fn same_again(record: &Record) {
    let text = serde_json::to_string(record).expect("serializes");
    assert_eq!(serde_json::from_str::<Record>(&text).expect("is read back"), *record);
    assert!(record.says_the_same(&Record { time: 0, ..record.clone() }));
    record.settings.iter().for_each(|own| must::key(&own.key));
    for following in [Following::Yes, Following::NotNeeded, Following::No("why".into())] {
        let _ = report::text::applied(record, true, &following);
    }
}

/// Trouble with a file's content is one line that names what to do.
fn fault(error: &anyhow::Error) {
    must::one_line_error(error);
    let text = format!("{error:#}");
    assert!(Fault::is_damaged(error) != Fault::is_newer(error), "{text}");
    assert!(text.contains("mptcp-hook"), "{text}");
}
