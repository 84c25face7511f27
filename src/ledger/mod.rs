//! What is remembered, for the whole host. Everything is a plain JSON file below the state directory:
//!
//! ```text
//! containers/KEY                     a record per instance: the truth (KEY = door.id.hash of the engine)
//! namespaces/NETNS/KEY               who is in a network namespace (empty files; NETNS = inode-cookie)
//! settings/SETTING/value             a host-wide setting that containers rely on: its original and its value
//! settings/SETTING/claims/KEY        who relies on it at which value
//! settings/SETTING/intent            a write that is under way
//! conflicts                          a line per conflict
//! failures                           a line per hook that failed
//! locks/{container:KEY,netns:NETNS,setting:SETTING}
//! ```
//!
//! This module and those below it are the only ones that write there.

mod files;
mod lock;
pub mod record;
pub mod setting;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::deadline::Deadline;
use crate::kernel::netns::NetnsId;
use crate::request::setting::SettingKey;
pub use lock::Locks;
use record::{Conflict, Failure, Record};

/// When a history is larger than this, in bytes, it becomes the old one and the one before is dropped.
const HISTORY_MAX: u64 = 256 * 1024;

/// The ledger in one state directory.
#[derive(Clone, Debug)]
pub struct Ledger {
    directory: PathBuf,
}

impl Ledger {
    /// Opens the ledger and makes its directories.
    pub fn create(directory: &Path) -> Result<Self> {
        if !files::check_state_directory(directory)? {
            files::make_directory(directory)?;
            files::check_state_directory(directory)?;
        }
        let ledger = Self { directory: directory.into() };
        // The one that is made last tells whether all are there.
        if !ledger.directory.join("locks").exists() {
            for name in ["containers", "namespaces", "settings", "locks"] {
                files::make_directory(&ledger.directory.join(name))?;
            }
        }
        Ok(ledger)
    }

    /// Opens the ledger if there is one; changes nothing.
    pub fn open(directory: &Path) -> Result<Option<Self>> {
        Ok(files::check_state_directory(directory)?.then(|| Self { directory: directory.into() }))
    }

    /// Takes the locks for one piece of work.
    pub fn lock(
        &self,
        container: &str,
        netns: Option<&NetnsId>,
        settings: &[SettingKey],
        deadline: Deadline,
    ) -> Result<Locks> {
        let mut names = vec![format!("container:{container}")];
        names.extend(netns.map(|id| format!("netns:{}", id.file_name())));
        names.extend(settings.iter().map(|key| format!("setting:{}", setting::directory_name(key))));
        names.sort_unstable();
        names.dedup();
        Locks::take(&self.directory.join("locks"), &names, container, deadline)
    }

    /// Forgets the locks of a container that is gone, and of its namespace if nobody is left in it.
    pub fn discard_locks(&self, locks: &Locks, container: &str, netns: &NetnsId) -> Result<()> {
        locks.discard(&format!("container:{container}"))?;
        if self.members(netns)?.is_empty() {
            locks.discard(&format!("netns:{}", netns.file_name()))?;
        }
        Ok(())
    }

    /// Forgets the locks of settings that nobody relies on: their names may come from anybody's annotations.
    pub fn discard_setting_locks(&self, locks: &Locks, keys: &[SettingKey]) -> Result<()> {
        for key in keys.iter().filter(|key| !self.setting(key).exists()) {
            locks.discard(&format!("setting:{}", setting::directory_name(key)))?;
        }
        Ok(())
    }

    /// The record of a container.
    pub fn record(&self, container: &str) -> Result<Option<Record>> {
        files::read(&self.directory.join("containers").join(container))
    }

    /// All records; what cannot be read comes as its error, and the rest all the same.
    pub fn records(&self) -> Result<Vec<Result<Record>>> {
        let directory = self.directory.join("containers");
        Ok(files::names(&directory)?.iter().filter_map(|name| files::read(&directory.join(name)).transpose()).collect())
    }

    /// Writes a record and enters it into its namespace's list.
    pub fn write_record(&self, record: &Record) -> Result<()> {
        let container = record.instance.container.key();
        let members = self.directory.join("namespaces").join(record.instance.netns.file_name());
        let member = members.join(&container);
        if !member.exists() {
            files::make_directory(&members)?;
            drop(files::open_to_append(&member)?);
        }
        files::write(&self.directory.join("containers").join(container), record)
    }

    /// Removes a record and takes it off its namespace's list.
    pub fn remove_record(&self, record: &Record) -> Result<()> {
        let container = record.instance.container.key();
        self.leave_namespace(&container, &record.instance.netns)?;
        files::remove(&self.directory.join("containers").join(container))
    }

    /// Takes a container off a namespace's list.
    pub fn leave_namespace(&self, container: &str, netns: &NetnsId) -> Result<()> {
        let members = self.directory.join("namespaces").join(netns.file_name());
        files::remove(&members.join(container))?;
        // Fails as long as others are in it, which is right.
        let _ = std::fs::remove_dir(&members);
        Ok(())
    }

    /// The keys of the containers in a namespace.
    pub fn members(&self, netns: &NetnsId) -> Result<Vec<String>> {
        files::names(&self.directory.join("namespaces").join(netns.file_name()))
    }

    /// The records of the others in a namespace, those of the living and those of the dead.
    pub fn others(&self, container: &str, netns: &NetnsId, boot_id: &str) -> Result<(Vec<Record>, Vec<Record>)> {
        let mut others = Vec::new();
        for member in self.members(netns)? {
            if member == container {
                continue;
            }
            if let Some(record) = self.record(&member)? {
                if record.instance.netns == *netns {
                    others.push(record);
                }
            }
        }
        Ok(others.into_iter().partition(|record| record.instance.is_alive(boot_id)))
    }

    /// The ledger's page on a host-wide setting.
    pub fn setting(&self, key: &SettingKey) -> setting::Page {
        setting::Page::new(&self.directory.join("settings"), key)
    }

    /// All host-wide settings that the ledger knows; what cannot be read comes as its error.
    pub fn settings(&self) -> Result<Vec<Result<setting::Setting>>> {
        let directory = self.directory.join("settings");
        Ok(files::names(&directory)?
            .iter()
            .filter_map(|name| setting::Page::at(directory.join(name)).read().transpose())
            .collect())
    }

    /// Appends conflicts to the history, which is bounded: the oldest half is dropped when it has grown too long.
    pub fn record_conflicts(&self, conflicts: &[Conflict]) -> Result<()> {
        if conflicts.is_empty() {
            return Ok(());
        }
        self.append("conflicts", conflicts)
    }

    /// Appends a failure to the history, which is bounded like the conflicts'.
    pub fn record_failure(&self, failure: &Failure) -> Result<()> {
        self.append("failures", std::slice::from_ref(failure))
    }

    fn append<T: Serialize>(&self, name: &str, items: &[T]) -> Result<()> {
        let path = self.directory.join(name);
        let mut lines = Vec::new();
        for item in items {
            serde_json::to_writer(&mut lines, item)?;
            lines.push(b'\n');
        }
        if std::fs::metadata(&path).is_ok_and(|meta| meta.len() > HISTORY_MAX) {
            std::fs::rename(&path, self.directory.join(format!("{name}.old")))
                .with_context(|| format!("cannot move {} away", path.display()))?;
        }
        // One write in append mode: lines of several hooks do not mix.
        files::open_to_append(&path)?.write_all(&lines).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The history of conflicts, oldest first. Lines that a full disk cut short are passed over.
    pub fn conflicts(&self) -> Result<Vec<Conflict>> {
        self.history("conflicts")
    }

    /// The history of failures, oldest first.
    pub fn failures(&self) -> Result<Vec<Failure>> {
        self.history("failures")
    }

    fn history<T: DeserializeOwned>(&self, name: &str) -> Result<Vec<T>> {
        let mut items = Vec::new();
        for name in [format!("{name}.old"), name.into()] {
            let path = self.directory.join(name);
            let file = match std::fs::File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
            };
            for line in BufReader::new(file).lines() {
                let line = line.with_context(|| format!("cannot read {}", path.display()))?;
                items.extend(serde_json::from_str::<T>(&line));
            }
        }
        Ok(items)
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Nanoseconds since 1970: the order of claims and of a namespace's members.
pub fn nanoseconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}
