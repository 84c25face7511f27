//! Fills a ledger with containers, in its own format: copies of a record that the hook itself has written.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use mptcp_hook::instance::{ContainerId, Door, Instance, Process, boot_id};
use mptcp_hook::kernel::netns::{Namespace, NetnsId};
use mptcp_hook::ledger::Ledger;
use mptcp_hook::ledger::record::Record;
use mptcp_hook::ledger::setting::Claim;
use mptcp_hook::request::setting::SettingKey;

use crate::world::HOST_SYSCTL;

/// No process has it: one more than the kernel's largest (`PID_MAX_LIMIT`).
const NOBODY: u32 = 4 * 1024 * 1024 + 1;

/// Enters `count` containers that all rely on the same host-wide value, as the one does that is entered already: each
/// with its record, its claim, its place on the list of a namespace of its own and the files of its locks, written
/// directly, each file once. They live in the process `pid`, all of them, for the ledger does not know better; without
/// one they are dead.
pub fn fill(directory: &Path, count: u64, pid: Option<u32>) {
    let (template, claim) = template(directory);
    let boot_id = boot_id().expect("the boot id");
    let (inode, start_time) = match pid {
        Some(pid) => {
            let netns = Namespace::open(Path::new(&format!("/proc/{pid}/ns/net"))).expect("a network namespace");
            (netns.inode(), Process::read(pid).expect("a process").start_time)
        }
        None => (template.instance.netns.inode, 1),
    };
    let claims = directory.join("settings").join(HOST_SYSCTL.replace('/', "~")).join("claims");
    let (records, locks) = (directory.join("containers"), directory.join("locks"));
    for number in 0..count {
        let container = ContainerId::new(Door::Oci, format!("/run/bundle-{number}"), &format!("{number:064x}"));
        let instance = Instance {
            container: container.expect("an id"),
            boot_id: boot_id.clone(),
            pid: pid.or_else(|| Some(NOBODY + u32::try_from(number).expect("a pid"))),
            start_time: Some(start_time),
            netns: NetnsId { inode, cookie: Some(1_000_000 + number) },
            ..template.instance.clone()
        };
        let (key, netns) = (instance.container.key(), instance.netns.file_name());
        let record = Record { instance: instance.clone(), name: instance.container.id.clone(), ..template.clone() };
        let list = directory.join("namespaces").join(&netns);
        fs::DirBuilder::new().mode(0o700).create(&list).expect("a namespace's list");
        write(&records.join(&key), &serde_json::to_vec(&record).expect("a record"));
        write(&claims.join(&key), &serde_json::to_vec(&Claim { instance, ..claim.clone() }).expect("a claim"));
        write(&list.join(&key), b"");
        write(&locks.join(format!("container:{key}")), key.as_bytes());
        write(&locks.join(format!("netns:{netns}")), key.as_bytes());
    }
}

fn template(directory: &Path) -> (Record, Claim) {
    let ledger = Ledger::open(directory).expect("the ledger").expect("the ledger is there");
    let mut records = ledger.records().expect("the ledger's records");
    assert_eq!(records.len(), 1, "one record to copy");
    let template = records.remove(0).expect("a record");
    let key = SettingKey::sysctl(HOST_SYSCTL).expect("a sysctl's name");
    let claim = ledger.setting(&key).claim_of(&template.instance.container.key()).expect("a claim");
    (template, claim.expect("the claim is there"))
}

fn write(path: &Path, text: &[u8]) {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text)).unwrap_or_else(|e| panic!("writing {}: {e}", path.display()));
}
