//! Fills a ledger with containers, in its own format: copies of a record that the hook itself has written.

use std::path::Path;

use mptcp_hook::instance::{ContainerId, Door, Instance, Process, boot_id};
use mptcp_hook::kernel::netns::{Namespace, NetnsId};
use mptcp_hook::ledger::Ledger;
use mptcp_hook::ledger::setting::Claim;
use mptcp_hook::request::setting::SettingKey;

use crate::world::HOST_SYSCTL;

/// Enters `count` containers that are alive and all rely on the same host-wide value, as the one does that is entered
/// already. All of them live in the process `pid`: the ledger does not know better.
pub fn fill(directory: &Path, count: u64, pid: u32) {
    let ledger = Ledger::open(directory).expect("the ledger").expect("the ledger is there");
    let mut records = ledger.records().expect("the ledger's records");
    assert_eq!(records.len(), 1, "one record to copy");
    let template = records.remove(0).expect("a record");
    let key = SettingKey::sysctl(HOST_SYSCTL).expect("a sysctl's name");
    let page = ledger.setting(&key);
    let claim = page.claim_of(&template.instance.container.key()).expect("a claim").expect("the claim is there");
    let netns = Namespace::open(Path::new(&format!("/proc/{pid}/ns/net"))).expect("a network namespace");
    let process = Process::read(pid).expect("a process");
    for number in 0..count {
        let container = ContainerId::new(Door::Oci, format!("/run/bundle-{number}"), &format!("{number:064x}"));
        let instance = Instance {
            container: container.expect("an id"),
            boot_id: boot_id().expect("the boot id"),
            pid: Some(pid),
            start_time: Some(process.start_time),
            netns: NetnsId { inode: netns.inode(), cookie: Some(1_000_000 + number) },
            ..template.instance.clone()
        };
        let mut record = template.clone();
        record.instance = instance.clone();
        record.name = instance.container.id.clone();
        ledger.write_record(&record).expect("writing a record");
        page.claim(&Claim { instance, ..claim.clone() }).expect("writing a claim");
    }
}
