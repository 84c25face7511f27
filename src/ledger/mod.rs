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
//! follow/KEY                         whom which agent shall follow, and the process that does it for this one alone
//! agent, agent.USERNS                which process the agent is; in another user namespace: its inode
//! damaged/                           what `repair` moved out of the way
//! locks/{agent,agent.USERNS,agent:KEY,container:KEY,netns:NETNS,setting:SETTING}
//! ```
//!
//! This module and those below it are the only ones that write there.

mod files;
mod following;
mod lock;
pub mod parallel;
pub mod record;
pub mod setting;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::deadline::Deadline;
use crate::error::shortened;
use crate::kernel::netns::NetnsId;
use crate::request::setting::SettingKey;
pub use files::Fault;
pub use files::TEMPORARY;
pub use following::{AgentLock, Following};
pub use lock::Locks;
use record::{Conflict, Failure, Record};

/// When a history is larger than this, in bytes, it becomes the old one and the one before is dropped.
const HISTORY_MAX: u64 = 256 * 1024;

/// What one file of a history is read of, in bytes: more than one hook's lines on top of [`HISTORY_MAX`].
const HISTORY_READ_MAX: u64 = 4 * 1024 * 1024;

/// The longest value and the longest reason in a line of the history, in bytes. A value may have thousands.
const HISTORY_VALUE_MAX: usize = 256;
const HISTORY_REASON_MAX: usize = 1024;

/// How long a hook waits for another one that moves a history away.
const HISTORY_PATIENCE: Duration = Duration::from_secs(1);

/// The plain files directly in the state directory.
const FILES: [&str; 4] = ["conflicts", "conflicts.old", "failures", "failures.old"];

/// Something in the state directory that should not be there as it is.
#[derive(Debug)]
pub struct Oddity {
    /// Where.
    pub path: PathBuf,
    /// What is wrong.
    pub trouble: Trouble,
}

/// What the ledger has under a name.
#[derive(Clone, Copy)]
enum Expected {
    Directory,
    File,
    Anything,
    Nothing,
}

/// What is wrong with a file or directory, its content aside.
#[derive(Debug)]
pub enum Trouble {
    /// The ledger has nothing of that name or kind.
    Stranger,
    /// It has another owner, or is open to others.
    NotOurs(String),
}

impl std::fmt::Display for Oddity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.trouble {
            Trouble::Stranger => write!(f, "{} does not belong in the ledger", self.path.display()),
            Trouble::NotOurs(wrong) => write!(f, "{} {wrong}", self.path.display()),
        }
    }
}

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
            ledger.make_directories()?;
        }
        Ok(ledger)
    }

    /// Opens the ledger if there is one; changes nothing.
    pub fn open(directory: &Path) -> Result<Option<Self>> {
        Ok(files::check_state_directory(directory)?.then(|| Self { directory: directory.into() }))
    }

    /// The state directory.
    pub fn directory(&self) -> &Path {
        &self.directory
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
        Locks::take(&self.directory.join("locks"), &names, container, deadline, |held| {
            // A container that never gets to start: nobody will release it.
            if !self.has_record(container) {
                let _ = held.discard(&format!("container:{container}"));
                if let Some(id) = netns {
                    let _ = self.discard_netns_lock(held, id);
                }
                let _ = self.discard_setting_locks(held, settings);
            }
        })
    }

    /// Forgets the locks of a container that is gone, and of its namespace if nobody is left in it.
    pub fn discard_locks(&self, locks: &Locks, container: &str, netns: &NetnsId) -> Result<()> {
        locks.discard(&format!("container:{container}"))?;
        self.discard_netns_lock(locks, netns)
    }

    /// Forgets the lock of a namespace if nobody is in it.
    pub fn discard_netns_lock(&self, locks: &Locks, netns: &NetnsId) -> Result<()> {
        // An empty list is removed; to look that there is none takes no descriptor, of which there may be none left.
        if !self.members_directory(netns).exists() || self.members(netns)?.is_empty() {
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

    /// Whether there is a record of a container, whatever it says.
    pub fn has_record(&self, container: &str) -> bool {
        self.record_path(container).exists()
    }

    /// The record of a container.
    pub fn record(&self, container: &str) -> Result<Option<Record>> {
        files::read(&self.directory.join("containers").join(container))
    }

    /// All records; what cannot be read comes as its error, and the rest all the same.
    pub fn records(&self) -> Result<Vec<Result<Record>>> {
        let directory = self.directory.join("containers");
        let read = |name: String| files::read(&directory.join(name)).transpose();
        let records = parallel::map(files::names(&directory)?, read);
        Ok(records.into_iter().flatten().collect())
    }

    /// All records to be shown, whoever may have written them, and what is wrong with them.
    pub fn records_to_show(&self) -> Result<(Vec<Box<Record>>, Vec<anyhow::Error>)> {
        let path = self.directory.join("containers");
        let Some(directory) = files::Directory::open(&path)? else { return Ok(Default::default()) };
        let told = parallel::map(files::names(&path)?, |name| {
            let (mut record, error): (Option<Box<Record>>, _) = directory.read_to_show(&name);
            // At once, for the next one to use.
            record.iter_mut().for_each(|record| record.shrink());
            (record, error)
        });
        let (mut records, mut errors) = (Vec::with_capacity(told.len()), Vec::new());
        for (record, error) in told {
            records.extend(record);
            errors.extend(error);
        }
        Ok((records, errors))
    }

    /// Writes a record and enters it into its namespace's list.
    pub fn write_record(&self, record: &Record) -> Result<()> {
        // The truth first: an entry in the list alone would be found by nobody.
        files::write(&self.record_path(&record.instance.container.key()), record)?;
        self.enter_namespace(record)
    }

    /// Removes a record and takes it off its namespace's list.
    pub fn remove_record(&self, record: &Record) -> Result<()> {
        let container = record.instance.container.key();
        self.leave_namespace(&container, &record.instance.netns)?;
        self.unfollow(&container)?;
        files::remove(&self.directory.join("containers").join(container))
    }

    /// Takes a container off a namespace's list.
    pub fn leave_namespace(&self, container: &str, netns: &NetnsId) -> Result<()> {
        let members = self.members_directory(netns);
        files::remove(&members.join(container))?;
        // Fails as long as others are in it, which is right.
        let _ = std::fs::remove_dir(&members);
        Ok(())
    }

    /// The keys of the containers in a namespace.
    pub fn members(&self, netns: &NetnsId) -> Result<Vec<String>> {
        files::names(&self.members_directory(netns))
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

    /// All host-wide settings that the ledger knows, and what cannot be read of them; to be
    /// shown.
    pub fn settings(&self) -> Result<(Vec<setting::Setting>, Vec<anyhow::Error>)> {
        let directory = self.directory.join("settings");
        let mut settings = Vec::new();
        let mut errors = Vec::new();
        for name in files::names(&directory)?.into_iter().filter(|name| setting::key_of(name).is_some()) {
            let survey = setting::Page::at(directory.join(name)).survey_to_show();
            let claims = survey.claims.into_iter().map(|(_, claim)| claim);
            settings.extend(survey.setting.map(|setting| setting::Setting { claims: claims.collect(), ..setting }));
            errors.extend(survey.faults.into_iter().map(|(_, error)| error));
        }
        Ok((settings, errors))
    }

    /// The settings that the ledger has a page on.
    pub fn setting_keys(&self) -> Result<Vec<SettingKey>> {
        Ok(files::names(&self.directory.join("settings"))?.iter().filter_map(|name| setting::key_of(name)).collect())
    }

    /// The names of all records.
    pub fn containers(&self) -> Result<Vec<String>> {
        files::names(&self.directory.join("containers"))
    }

    /// The namespaces that have a list, by their file names, and who is on it.
    pub fn namespaces(&self) -> Result<Vec<(String, Vec<String>)>> {
        let directory = self.directory.join("namespaces");
        let names = files::names(&directory)?.into_iter().filter(|name| directory.join(name).is_dir());
        names.map(|name| Ok((name.clone(), files::names(&directory.join(name))?))).collect()
    }

    /// Takes locks by the names of their files, for what is not tied to one container.
    pub fn lock_by_name(&self, names: &[String], holder: &str, deadline: Deadline) -> Result<Locks> {
        Locks::take(&self.directory.join("locks"), names, holder, deadline, |_| {})
    }

    /// Enters a record into its namespace's list.
    pub fn enter_namespace(&self, record: &Record) -> Result<()> {
        let members = self.members_directory(&record.instance.netns);
        let member = members.join(record.instance.container.key());
        if !member.exists() {
            files::make_directory(&members)?;
            drop(files::open_to_append(&member)?);
        }
        Ok(())
    }

    /// Takes a container off a list that has this file name, and removes the list if it is empty.
    pub fn strike_member(&self, netns: &str, container: Option<&str>) -> Result<()> {
        let members = self.directory.join("namespaces").join(netns);
        if let Some(container) = container {
            files::remove(&members.join(container))?;
        }
        let _ = std::fs::remove_dir(&members);
        Ok(())
    }

    /// Makes the directories that are missing.
    pub fn make_directories(&self) -> Result<()> {
        ["containers", "namespaces", "settings", "locks"]
            .iter()
            .try_for_each(|name| files::make_directory(&self.directory.join(name)))
    }

    /// Moves a damaged file out of the way and returns what to say about it.
    pub fn move_aside(&self, path: &Path) -> Result<String> {
        files::move_aside(&self.directory, path)
    }

    /// Where a container's record is.
    pub fn record_path(&self, container: &str) -> PathBuf {
        self.directory.join("containers").join(container)
    }

    /// What should not be there as it is, as far as that is seen without looking at every file: owner and mode of what
    /// has a content are found where it is read, those of locks and of the lists of namespaces (nobody reads them, and
    /// there are several for each container) by [`Ledger::oddities`].
    pub fn oddities_at_a_glance(&self) -> Result<Vec<Oddity>> {
        let mut odd = self.strangers()?;
        for name in files::names(&self.directory.join("settings"))? {
            let path = self.directory.join("settings").join(&name);
            odd.extend(look_at_page(&path, setting::key_of(&name).is_some())?.1);
        }
        Ok(odd)
    }

    /// The oddities directly in the state directory.
    fn strangers(&self) -> Result<Vec<Oddity>> {
        let mut odd = Vec::new();
        for name in files::names(&self.directory)? {
            let expected = match name.as_str() {
                "containers" | "namespaces" | "settings" | "follow" | "locks" | "damaged" => Expected::Directory,
                other if FILES.contains(&other) || following::is_agent_name(other) => Expected::File,
                _ => Expected::Nothing,
            };
            odd.extend(look(&self.directory.join(&name), expected).1);
        }
        Ok(odd)
    }

    /// What should not be there as it is; files whose content alone is wrong are not looked for.
    pub fn oddities(&self) -> Result<Vec<Oddity>> {
        let mut odd = self.strangers()?;
        // The locks first: they are needed to mend the others.
        for list in ["locks", "containers", "follow"] {
            // Not a file: its content cannot be read, which is said elsewhere.
            odd.extend(look_at_all(&self.directory.join(list), Expected::Anything)?);
        }
        let namespaces = self.directory.join("namespaces");
        for found in parallel::map(files::names(&namespaces)?, |name| -> Result<Vec<Oddity>> {
            let path = namespaces.join(name);
            let (is_open, odd) = look(&path, Expected::Directory);
            let mut odd = Vec::from_iter(odd);
            if is_open {
                odd.extend(look_at_all(&path, Expected::File)?);
            }
            Ok(odd)
        }) {
            odd.extend(found?);
        }
        let settings = self.directory.join("settings");
        for name in files::names(&settings)? {
            let path = settings.join(&name);
            let (is_page, found) = look_at_page(&path, setting::key_of(&name).is_some())?;
            odd.extend(found);
            if is_page {
                for file in ["value", "intent"] {
                    odd.extend(look(&path.join(file), Expected::Anything).1);
                }
                odd.extend(look_at_all(&path.join("claims"), Expected::Anything)?);
            }
        }
        Ok(odd)
    }

    /// The lock under which a file of the ledger is written, by its name; none if there is none, or not one alone.
    pub fn lock_of(&self, path: &Path) -> Option<String> {
        let mut names = path.strip_prefix(&self.directory).ok()?.iter().map(|name| name.to_string_lossy());
        match (names.next()?.as_ref(), names.next()?) {
            ("containers", name) => Some(format!("container:{name}")),
            ("namespaces", name) => Some(format!("netns:{name}")),
            ("settings", name) => Some(format!("setting:{name}")),
            _ => None,
        }
    }

    /// Makes what has a wrong owner or mode ours alone again.
    pub fn take_back(&self, path: &Path) -> Result<()> {
        files::take_back(path)
    }

    /// Removes the temporary files of killed writers from these directories (of the ledger itself and its records if
    /// none are given), those that are `age` old. Returns their number.
    pub fn remove_temporaries(&self, directories: &[PathBuf], age: Duration) -> Result<usize> {
        let own = [self.directory.clone(), self.directory.join("containers")];
        let directories = if directories.is_empty() { &own[..] } else { directories };
        let mut removed = 0;
        for directory in directories {
            for (path, _) in files::temporaries(directory)?.into_iter().filter(|(_, old)| *old >= age) {
                files::remove(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Appends conflicts to the history, which is bounded: the oldest half is dropped when it has grown too long.
    pub fn record_conflicts(&self, conflicts: &[Conflict]) -> Result<()> {
        if conflicts.is_empty() {
            return Ok(());
        }
        let short = |conflict: &Conflict| Conflict {
            wanted: shortened(&conflict.wanted, HISTORY_VALUE_MAX),
            kept: shortened(&conflict.kept, HISTORY_VALUE_MAX),
            reason: shortened(&conflict.reason, HISTORY_REASON_MAX),
            ..conflict.clone()
        };
        self.append("conflicts", &conflicts.iter().map(short).collect::<Vec<_>>())
    }

    /// Appends a failure to the history, which is bounded like the conflicts'.
    pub fn record_failure(&self, failure: &Failure) -> Result<()> {
        self.append(
            "failures",
            &[Failure { reason: shortened(&failure.reason, HISTORY_REASON_MAX), ..failure.clone() }],
        )
    }

    fn append<T: Serialize>(&self, name: &str, items: &[T]) -> Result<()> {
        let path = self.directory.join(name);
        let mut lines = Vec::new();
        for item in items {
            serde_json::to_writer(&mut lines, item)?;
            lines.push(b'\n');
        }
        let is_full = || std::fs::metadata(&path).is_ok_and(|meta| meta.len() > HISTORY_MAX);
        if is_full() {
            // Looked at again under a lock: of two hooks that see it full, the second must not drop what the first kept.
            let locks = self.directory.join("locks");
            let deadline = Deadline::after(HISTORY_PATIENCE);
            let _lock = Locks::take(&locks, &[format!("history:{name}")], "a history", deadline, |_| {})?;
            if !is_full() {
                return self.append(name, items);
            }
            let old = self.directory.join(format!("{name}.old"));
            let before: History<IgnoredAny> = read_history(&path)?;
            let dropped = Dropped { dropped: before.dropped + read_history::<IgnoredAny>(&old)?.items.len() };
            std::fs::rename(&path, &old).with_context(|| format!("cannot move {} away", path.display()))?;
            if dropped.dropped > 0 {
                lines.splice(0..0, serde_json::to_vec(&dropped)?.into_iter().chain(*b"\n"));
            }
        }
        let mut file = files::open_to_append(&path)?;
        let attempt = || format!("cannot write {}", path.display());
        if !files::ends_with_line(&file).with_context(attempt)? {
            lines.insert(0, b'\n');
        }
        // One write in append mode: lines of several hooks do not mix.
        file.write_all(&lines).with_context(attempt)
    }

    /// The history of conflicts, oldest first. Lines that a full disk cut short are passed over.
    pub fn conflicts(&self) -> Result<History<Conflict>> {
        self.history("conflicts")
    }

    /// The history of failures, oldest first.
    pub fn failures(&self) -> Result<History<Failure>> {
        self.history("failures")
    }

    fn history<T: DeserializeOwned>(&self, name: &str) -> Result<History<T>> {
        let mut history = read_history(&self.directory.join(format!("{name}.old")))?;
        let newer = read_history(&self.directory.join(name))?;
        history.items.extend(newer.items);
        history.dropped = newer.dropped;
        Ok(history)
    }
}

/// What is remembered of a history.
#[derive(Debug)]
pub struct History<T> {
    /// Its lines, oldest first.
    pub items: Vec<T>,
    /// How many older ones were dropped, because it had grown too long.
    pub dropped: usize,
}

/// The first line of a file of a history of which something was dropped.
#[derive(Serialize, Deserialize)]
struct Dropped {
    dropped: usize,
}

/// Reads one file of a history; one that is not there is empty.
fn read_history<T: DeserializeOwned>(path: &Path) -> Result<History<T>> {
    let mut history = History { items: Vec::new(), dropped: 0 };
    let file = match files::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(history),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    for line in BufReader::new(file.take(HISTORY_READ_MAX)).split(b'\n') {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        match serde_json::from_slice(&line) {
            Ok(Dropped { dropped }) => history.dropped = dropped,
            Err(_) => history.items.extend(serde_json::from_slice::<T>(&line)),
        }
    }
    Ok(history)
}

/// Whether it is a directory that is to be looked into, and what is wrong with it. What is gone meanwhile was no oddity.
fn look(path: &Path, expected: Expected) -> (bool, Option<Oddity>) {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return (false, None) };
    let belongs = match expected {
        Expected::Directory => metadata.is_dir(),
        Expected::File => metadata.is_file(),
        Expected::Anything => true,
        Expected::Nothing => false,
    };
    let trouble = match belongs {
        true => files::wrong_owner(&metadata).map(Trouble::NotOurs),
        false => Some(Trouble::Stranger),
    };
    (belongs && metadata.is_dir(), trouble.map(|trouble| Oddity { path: path.into(), trouble }))
}

/// Whether it is a setting's page, and the oddities of the page without its files.
fn look_at_page(path: &Path, is_a_setting: bool) -> Result<(bool, Vec<Oddity>)> {
    let (is_page, odd) = look(path, if is_a_setting { Expected::Directory } else { Expected::Nothing });
    let mut odd = Vec::from_iter(odd);
    for name in if is_page { files::names(path)? } else { Vec::new() } {
        let expected = match name.as_str() {
            "claims" => Expected::Directory,
            "value" | "intent" => continue,
            _ => Expected::Nothing,
        };
        odd.extend(look(&path.join(&name), expected).1);
    }
    Ok((is_page, odd))
}

/// The oddities directly in a directory.
fn look_at_all(directory: &Path, expected: Expected) -> Result<Vec<Oddity>> {
    let odd = parallel::map(files::names(directory)?, |name| look(&directory.join(name), expected).1);
    Ok(odd.into_iter().flatten().collect())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Nanoseconds since 1970, and later than the newest of those who were there before, whoever set the clock back since:
/// the order of claims and of a namespace's members.
pub fn nanoseconds_after(newest: u64) -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = since.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    now.max(newest.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::record::ConflictOutcome;
    use super::*;

    /// A container may have hundreds of wishes with the longest values, and be refused again and again.
    #[test]
    fn the_history_stays_small_however_much_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().canonicalize().unwrap().join("state");
        let ledger = Ledger::create(&state).unwrap();
        let conflict = |n: usize| Conflict {
            time: 1,
            container: format!("c{n}"),
            key: "net.ipv4.tcp_ecn".into(),
            wanted: "ä".repeat(2000),
            kept: "1".into(),
            holders: Vec::new(),
            outcome: ConflictOutcome::Refused,
            reason: "ö".repeat(3000),
        };
        let most: Vec<Conflict> = (0..256).map(conflict).collect();
        for _ in 0..6 {
            ledger.record_conflicts(&most).unwrap();
        }
        let size = |name: &str| std::fs::metadata(state.join(name)).unwrap().len();
        assert!(size("conflicts") + size("conflicts.old") < 2 * 1024 * 1024);
        let history = ledger.conflicts().unwrap();
        assert_eq!(history.items.len() + history.dropped, 6 * 256);
        let last = history.items.last().unwrap();
        assert_eq!((last.container.as_str(), last.wanted.len(), last.reason.chars().last()), ("c255", 259, Some('…')));
    }
}
