//! Rules 5 to 7 as properties: any sequence of starts, ends, releases, crashes and foreign writes, held against a small
//! model of the rules after every step. The kernel is a fake one, the ledger is a real directory, and a container is a
//! thread in a real network namespace: `/proc` shows it like any process, and it costs next to nothing.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::ensure;
use nix::sched::{CloneFlags, setns, unshare};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::*;
use crate::deadline::Deadline;
use crate::front::ContainerFiles;
use crate::instance::{ContainerId, Door};
use crate::kernel::fake::{FakeHost, Fault, HOME, Killed, kill_at};
use crate::ledger::record::Scope;
use crate::policy::{Policy, config};
use crate::release::{Cause, Reach, release_by};
use crate::repair::repair;
use crate::request::{self, OnConflict, Rank, Source, What, Wish};
use crate::status::status;

/// How many sequences are tried, and how long each is.
const CASES: u32 = 200;
const STEPS: usize = 20;

/// The containers; the first two share a network namespace.
const CONTAINERS: [&str; 4] = ["web", "db", "cache", "proxy"];
const GROUPS: [usize; 4] = [0, 0, 1, 2];

/// One of [`SETTINGS`], by its number.
type Key = usize;

/// What is contended, each with the value that it has at first and three others. The first [`HOST_WIDE`] are the
/// host's, the others a namespace's.
const SETTINGS: [(&str, [&str; 4]); 5] = [
    ("net.mptcp.mptcp_scheduler", ["default", "redundant", "blest", "ecf"]),
    ("net.mptcp.mptcp_enabled", ["1", "5", "9", "3"]),
    ("module:mptcp_fullmesh.num_subflows", ["1", "2", "3", "4"]),
    ("net.ipv4.tcp_syn_retries", ["6", "3", "4", "5"]),
    ("interface.eth1", ["default", "backup", "off", "backup"]),
];
const HOST_WIDE: Key = 3;
const RETRIES: Key = 3;
const ETH1: Key = 4;

/// What annotations may do.
const POLICIES: [&str; 4] = [
    "",
    "[annotations]\noverride = true\n",
    "on-conflict = \"warn\"\n[annotations.sysctls]\n\"net.mptcp.mptcp_scheduler\" = \"*\"\n",
    "[annotations]\noverride = true\n[annotations.sysctls]\n\"net.mptcp.mptcp_scheduler\" = [\"default\", \"redundant\", \"ecf\"]\n\
     \"net.ipv4.tcp_syn_retries\" = \"*\"\n[annotations.modules]\n\"mptcp_fullmesh.num_subflows\" = [2, 3]\n",
];

fn name_of(key: &SettingKey) -> Key {
    (0..ETH1).find(|k| real(*k) == *key).expect("one of the settings")
}

fn real(key: Key) -> SettingKey {
    SettingKey::try_from(SETTINGS[key].0.to_string()).expect("a key")
}

// What can happen.

/// Somebody's wishes in one apply.
#[derive(Clone, Debug)]
struct Asked {
    /// By whether the administrator asks (else the container's author), and what.
    wishes: BTreeMap<(bool, Key), usize>,
    on_conflict: Option<(bool, OnConflict)>,
}

/// What goes wrong with a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nothing,
    /// It is killed at this point.
    Killed(usize),
    /// The kernel refuses this change.
    Refused(usize),
}

#[derive(Clone, Debug)]
enum Step {
    /// The container is started if it is not alive, and its hook runs.
    Apply(usize, Asked, Trouble),
    Release(usize, Trouble),
    /// A late or early poststop hook.
    Stopped(usize),
    /// It ends and nobody says so.
    Die(usize),
    ReleaseStale(Trouble),
    /// Somebody writes the host's value.
    Foreign(Key, usize),
    Repair,
    Status,
}

fn asked() -> impl Strategy<Value = Asked> {
    // One setting is asked for more than the others: it takes three to see who of two comes after the third.
    let key = prop_oneof![4 => Just(0), 1 => 1..SETTINGS.len()];
    let wish = ((prop::bool::weighted(0.7), key), 0..4_usize);
    let conflict =
        prop_oneof![1 => Just(OnConflict::Refuse), 1 => Just(OnConflict::Warn), 3 => Just(OnConflict::Override)];
    let on_conflict = prop::option::weighted(0.6, (prop::bool::weighted(0.6), conflict));
    (prop::collection::btree_map(wish.0, wish.1, 1..4), on_conflict).prop_map(|(wishes, on_conflict)| {
        // Only the administrator's, so that the policy's word on a value does not hang on what the dead left there.
        let wishes = wishes.into_iter().map(|((admin, key), value)| ((admin || key == RETRIES, key), value)).collect();
        Asked { wishes, on_conflict }
    })
}

fn trouble(crashes: bool) -> BoxedStrategy<Trouble> {
    if !crashes {
        return Just(Trouble::Nothing).boxed();
    }
    prop_oneof![
        3 => Just(Trouble::Nothing),
        3 => (1..40_usize).prop_map(Trouble::Killed),
        1 => (1..4_usize).prop_map(Trouble::Refused),
    ]
    .boxed()
}

fn step(crashes: bool) -> impl Strategy<Value = Step> {
    let who = 0..CONTAINERS.len();
    prop_oneof![
        60 => (who.clone(), asked(), trouble(crashes)).prop_map(|(who, asked, t)| Step::Apply(who, asked, t)),
        15 => (who.clone(), trouble(crashes)).prop_map(|(who, t)| Step::Release(who, t)),
        1 => who.clone().prop_map(Step::Stopped),
        15 => who.prop_map(Step::Die),
        6 => trouble(crashes).prop_map(Step::ReleaseStale),
        8 => (0..HOST_WIDE, 0..4_usize).prop_map(|(key, value)| Step::Foreign(key, value)),
        4 => Just(Step::Repair),
        4 => Just(Step::Status),
    ]
}

// The model.

/// One container's reliance on a host-wide value.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HeldClaim {
    who: usize,
    life: usize,
    value: String,
    /// Whether somebody else has changed the value since.
    overtaken: bool,
}

/// What is known about a host-wide setting.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    original: String,
    value: String,
    /// Whether there is more than an intent.
    firm: bool,
    /// The oldest first.
    claims: Vec<HeldClaim>,
    /// What a killed hook was about to write.
    intent: Option<Intended>,
}

/// A write that was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Intended {
    before: String,
    wanted: String,
    /// Whose claims somebody else's change before it has overtaken, if there was one.
    overtook: Option<BTreeSet<usize>>,
}

impl Held {
    /// Somebody else's later change is what there was before ours; what was claimed until then does not come back.
    fn meet(&mut self, actual: &str) {
        self.original = actual.into();
        self.claims.iter_mut().for_each(|claim| claim.overtaken = true);
    }
}

/// A namespace's value that is relied on, and what it was before.
type Own = (String, String);

/// What is known about a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    life: usize,
    space: u64,
    /// Whether it is on its namespace's list; a hook can be killed before that.
    listed: bool,
    wishes: BTreeMap<(bool, Key), String>,
    on_conflict: BTreeMap<bool, OnConflict>,
    /// The host-wide settings that it has a claim on.
    claims: BTreeSet<Key>,
    /// The values of its namespace that it relies on; those before, too, if hooks were killed, the newest first.
    own: BTreeMap<Key, Own>,
    before: Option<Vec<BTreeMap<Key, Own>>>,
}

impl Entry {
    /// What it may have set a value of its namespace to, the newest first.
    fn versions(&self, key: Key) -> impl Iterator<Item = &Own> {
        let all = std::iter::once(&self.own).chain(self.before.iter().flatten());
        all.filter_map(move |own| own.get(&key))
    }
}

/// Kernel and ledger, as the rules see them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model {
    /// The host's values.
    values: BTreeMap<Key, String>,
    pages: BTreeMap<Key, Held>,
    records: BTreeMap<usize, Entry>,
    /// The containers in the ledger, the one that was set up last at the end.
    order: Vec<usize>,
    /// The values of the namespaces, by cookie.
    spaces: BTreeMap<u64, BTreeMap<Key, String>>,
}

/// A conflict that has to be recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Expected {
    key: Key,
    wanted: String,
    outcome: ConflictOutcome,
}

/// How an apply ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Applied,
    Failed(u8),
}

/// What is given for one prediction.
struct Given<'a> {
    policy: &'a Policy,
    is_alive: &'a dyn Fn(usize) -> bool,
}

impl Model {
    /// Rule 7, recovery: "value = original, drop the intent; value = wanted, it is ours; else drift, left alone".
    fn recover(&mut self, key: Key) {
        let Some(page) = self.pages.get_mut(&key) else { return };
        let Some(Intended { before, wanted, overtook }) = page.intent.take() else { return };
        if self.values[&key] == wanted {
            if let Some(overtook) = overtook {
                page.meet(&before);
                page.claims.iter_mut().for_each(|claim| claim.overtaken = overtook.contains(&claim.who));
            }
            page.value = wanted;
            page.firm = true;
        } else if !page.firm {
            self.pages.remove(&key);
        }
    }

    /// Rule 5: "when the overrider leaves, the newest remaining claim is put back; when no claim is left the original
    /// is restored, each only if the value is still the one that we wrote". Without `own` only the dead leave.
    fn leave(&mut self, key: Key, own: Option<usize>, given: &Given, conflicts: &mut Vec<Expected>) {
        self.recover(key);
        let actual = self.values[&key].clone();
        let Some(page) = self.pages.get_mut(&key) else { return };
        let stays = |claim: &HeldClaim| Some(claim.who) != own && (given.is_alive)(claim.life);
        if own.is_some() && page.value == actual && page.claims.iter().any(|c| stays(c) && c.value == actual) {
            page.claims.retain(|claim| Some(claim.who) != own);
            return;
        }
        page.claims.retain(stays);
        if page.value != actual {
            conflicts.push(Expected { key, wanted: page.value.clone(), outcome: ConflictOutcome::Drift });
        } else {
            let newest = page.claims.last().filter(|claim| !claim.overtaken);
            page.value = newest.map_or(&page.original, |claim| &claim.value).clone();
            self.values.insert(key, page.value.clone());
        }
        if page.claims.is_empty() {
            self.pages.remove(&key);
        }
    }

    fn siblings(&self, who: usize, space: u64, given: &Given) -> Vec<usize> {
        let in_it = |other: &&usize| {
            let entry = &self.records[*other];
            **other != who && entry.listed && entry.space == space && (given.is_alive)(entry.life)
        };
        self.order.iter().filter(in_it).copied().collect()
    }

    /// Rule 6: "the first to leave does not tear down what its siblings rely on".
    fn leave_space(&mut self, who: usize, key: Key, given: &Given, conflicts: &mut Vec<Expected>) {
        let entry = self.records[&who].clone();
        let Some((value, original)) = entry.versions(key).next() else { return };
        let siblings = self.siblings(who, entry.space, given);
        let theirs = siblings.iter().rev().find_map(|other| self.records[other].own.get(&key));
        let back = theirs.map_or(original, |own| &own.0).clone();
        let Some(space) = self.spaces.get_mut(&entry.space) else { return };
        let now = &space[&key];
        if *now == back {
        } else if entry.versions(key).any(|own| own.0 == *now) {
            space.insert(key, back);
        } else if key == RETRIES {
            conflicts.push(Expected { key, wanted: value.clone(), outcome: ConflictOutcome::Drift });
        }
    }

    fn release(&mut self, who: usize, given: &Given) -> Vec<Expected> {
        let mut conflicts = Vec::new();
        let Some(entry) = self.records.get(&who).cloned() else { return conflicts };
        // The namespace of a dead one is found by its siblings alone.
        if (given.is_alive)(entry.life) || !self.siblings(who, entry.space, given).is_empty() {
            for key in [ETH1, RETRIES] {
                self.leave_space(who, key, given, &mut conflicts);
            }
        }
        for key in entry.claims {
            self.leave(key, Some(who), given, &mut conflicts);
        }
        self.records.remove(&who);
        self.order.retain(|other| *other != who);
        conflicts
    }

    fn stale(&mut self, given: &Given) {
        let dead: Vec<usize> =
            self.records.keys().copied().filter(|who| !(given.is_alive)(self.records[who].life)).collect();
        for who in dead {
            self.release(who, given);
        }
    }

    /// What the author may do, and what is done about a conflict.
    fn decide(entry: &Entry, given: &Given, admin: bool, key: Key, value: &str, can_override: bool) -> OnConflict {
        let annotations = &given.policy.annotations;
        let theirs = entry.on_conflict.get(&true).or_else(|| entry.on_conflict.get(&false).filter(|_| !admin));
        let asked = theirs.copied().or(given.policy.on_conflict).unwrap_or(OnConflict::Refuse);
        let listed = key == ETH1 || given.policy.lists(&real(key), value);
        let given = can_override && (admin || annotations.overrides && listed);
        if asked == OnConflict::Override && !given { OnConflict::Refuse } else { asked }
    }

    /// Rules 5 to 7 for an apply. `restamped` says whether the record was written anew, which is for the order alone.
    fn apply(&mut self, who: usize, new: &Entry, given: &Given, restamped: bool) -> (End, Vec<Expected>) {
        let earlier = self.records.get(&who).cloned();
        let mut entry = new.clone();
        if let Some(earlier) = earlier.as_ref().filter(|earlier| earlier.life == new.life) {
            // What is said again by hand replaces what was said; annotations of one life have to agree.
            let disagrees = |(subject, value): (&(bool, Key), &String)| {
                !subject.0 && new.wishes.get(subject).is_some_and(|again| again != value)
            };
            let authors = (earlier.on_conflict.get(&false), new.on_conflict.get(&false));
            if earlier.wishes.iter().any(disagrees) || matches!(authors, (Some(a), Some(b)) if a != b) {
                return (End::Failed(2), Vec::new());
            }
            entry.wishes = earlier.wishes.clone().into_iter().chain(new.wishes.clone()).collect();
            entry.on_conflict = earlier.on_conflict.clone().into_iter().chain(new.on_conflict.clone()).collect();
        }
        let mut wanted: BTreeMap<Key, (bool, String)> = BTreeMap::new();
        for ((admin, key), value) in &entry.wishes {
            wanted.insert(*key, (*admin, value.clone()));
        }
        let mut conflicts = Vec::new();
        let unsettled = self.clone();
        // "Dead instances hold nothing from the moment anybody looks."
        for (key, (admin, value)) in wanted.iter().filter(|(key, _)| **key < HOST_WIDE) {
            self.recover(*key);
            let Some(page) = self.pages.get(key) else { continue };
            let held = page.claims.iter().any(|claim| claim.value == page.value && (given.is_alive)(claim.life));
            // What an earlier life brought and this one may not ask for is on its way out.
            let source = Source::new(rank(*admin), "");
            let is_leaving = page.claims.iter().any(|claim| claim.who == who && claim.life != entry.life)
                && given.policy.allows_setting(&source, &real(*key), value, Scope::Host).is_err();
            if !held && (self.values[key] != *value || is_leaving) {
                self.leave(*key, None, given, &mut conflicts);
            }
        }
        let mut settled = self.clone();
        let siblings = self.siblings(who, entry.space, given);
        let mut refused = false;
        let mut drifts = Vec::new();
        let mut clash = |key: Key, wanted: &str, decided: OnConflict| {
            let outcome = match decided {
                OnConflict::Refuse => ConflictOutcome::Refused,
                OnConflict::Warn => ConflictOutcome::Warned,
                OnConflict::Override => ConflictOutcome::Overrode,
            };
            refused |= decided == OnConflict::Refuse;
            conflicts.push(Expected { key, wanted: wanted.into(), outcome });
            decided == OnConflict::Override
        };
        for (key, (admin, value)) in &wanted {
            let (key, admin) = (*key, *admin);
            let decide = |can_override| Self::decide(&entry, given, admin, key, value, can_override);
            let scope = if key < HOST_WIDE { Scope::Host } else { Scope::Netns };
            let source = Source::new(rank(admin), "");
            let allowed = key == ETH1 || given.policy.allows_setting(&source, &real(key), value, scope).is_ok();
            if scope == Scope::Host {
                let actual = self.values[&key].clone();
                let others: Vec<HeldClaim> = self.pages.get(&key).map_or(Vec::new(), |page| {
                    page.claims.iter().filter(|c| c.who != who && (given.is_alive)(c.life)).cloned().collect()
                });
                if actual != *value && (!allowed || others.iter().any(|other| other.value != *value)) {
                    if !clash(key, value, decide(allowed)) {
                        continue;
                    }
                } else if !allowed {
                    // Equal, and the policy does not list it: nobody is held back.
                    continue;
                }
                entry.claims.insert(key);
                let page = self.pages.entry(key).or_insert_with(|| Held {
                    original: actual.clone(),
                    value: actual.clone(),
                    firm: true,
                    claims: Vec::new(),
                    intent: None,
                });
                let is_drift = page.value != actual;
                if is_drift && others.iter().any(|other| other.value != actual) {
                    drifts.push(Expected { key, wanted: page.value.clone(), outcome: ConflictOutcome::Drift });
                }
                if is_drift {
                    page.meet(&actual);
                }
                page.value.clone_from(value);
                if actual != *value || is_drift {
                    page.claims.retain(|claim| claim.who == who || (given.is_alive)(claim.life));
                }
                let claim = HeldClaim { who, life: entry.life, value: value.clone(), overtaken: false };
                match page.claims.iter_mut().find(|claim| claim.who == who) {
                    Some(own) if !restamped => *own = HeldClaim { overtaken: own.overtaken, ..claim },
                    _ => {
                        page.claims.retain(|claim| claim.who != who);
                        page.claims.push(claim);
                    }
                }
                self.values.insert(key, value.clone());
            } else {
                let now = self.spaces[&entry.space][&key].clone();
                if !allowed {
                    if now != *value {
                        clash(key, value, decide(false));
                    }
                    continue;
                }
                let relied = |other: &usize| self.records[other].own.get(&key).is_some_and(|own| own.0 != *value);
                if siblings.iter().any(relied) && !clash(key, value, decide(true)) {
                    continue;
                }
                // It is ours as long as it is what one of us wrote.
                let ours = [who].into_iter().chain(siblings.iter().copied()).chain(self.order.iter().copied());
                let known = ours.filter_map(|other| self.records.get(&other)).filter(|r| r.space == entry.space);
                let original = known.flat_map(|r| r.versions(key)).find(|own| own.0 == now);
                let original = original.map_or(now, |own| own.1.clone());
                entry.own.insert(key, (value.clone(), original));
                self.spaces.get_mut(&entry.space).expect("it is there").insert(key, value.clone());
            }
        }
        conflicts.extend(drifts);
        // Old wishes that come to nothing again are no reason to settle anything.
        for key in wanted.keys().copied().filter(|key| *key < HOST_WIDE && !entry.claims.contains(key)) {
            let asked = new.wishes.keys().any(|subject| subject.1 == key);
            if asked || earlier.as_ref().is_some_and(|earlier| earlier.claims.contains(&key)) {
                continue;
            }
            for model in [&mut *self, &mut settled] {
                model.values.insert(key, unsettled.values[&key].clone());
                model.pages.remove(&key);
                model.pages.extend(unsettled.pages.get(&key).map(|page| (key, page.clone())));
            }
            conflicts.retain(|conflict| conflict.key != key || conflict.outcome != ConflictOutcome::Drift);
        }
        if refused {
            *self = settled;
            return (End::Failed(3), conflicts);
        }
        // What the container relied on before and does not any more.
        if let Some(earlier) = &earlier {
            for key in earlier.claims.difference(&entry.claims) {
                self.leave(*key, Some(who), given, &mut conflicts);
            }
            for key in [ETH1, RETRIES].into_iter().filter(|key| !entry.own.contains_key(key)) {
                self.leave_space(who, key, given, &mut conflicts);
            }
        }
        if restamped {
            self.order.retain(|other| *other != who);
            self.order.push(who);
        }
        self.records.insert(who, entry);
        (End::Applied, conflicts)
    }
}

fn rank(admin: bool) -> Rank {
    if admin { Rank::CommandLine } else { Rank::Annotation }
}

// The world.

/// One life of a container.
struct Life {
    who: usize,
    instance: Instance,
    end: Cell<Option<mpsc::Sender<()>>>,
    thread: Cell<Option<JoinHandle<()>>>,
}

impl Life {
    fn start(who: usize, group: &Group) -> Self {
        let namespace = group.namespace.try_clone().expect("a descriptor");
        let (end, ended) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("a namespace of ours");
            tell.send(nix::unistd::gettid().as_raw() as u32).expect("somebody waits");
            // An error is the end as well.
            let _ = ended.recv();
        });
        let pid = told.recv().expect("the thread's id");
        let instance = Instance {
            container: ContainerId::new(Door::Oci, "/bundle", CONTAINERS[who]).expect("an id"),
            boot_id: instance::boot_id().expect("a boot id"),
            pid: Some(pid),
            start_time: Some(Process::read(pid).expect("a process").start_time),
            netns: group.id(),
            netns_path: None,
        };
        Self { who, instance, end: Cell::new(Some(end)), thread: Cell::new(Some(thread)) }
    }

    fn end(&self) {
        self.end.take();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it only waits");
        }
    }

    fn is_alive(&self) -> bool {
        let thread = self.thread.take();
        let alive = thread.is_some();
        self.thread.set(thread);
        alive
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.end();
    }
}

/// A place for a network namespace: a real one, which the fake kernel knows by its inode.
struct Group {
    namespace: File,
    inode: u64,
    /// Tells the namespaces that have this inode one after the other.
    cookie: Cell<u64>,
}

impl Group {
    fn new() -> Self {
        let maker = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root, for network namespaces");
            File::open("/proc/thread-self/ns/net").expect("a namespace")
        });
        let namespace = maker.join().expect("a namespace");
        let inode = namespace.metadata().expect("an inode").ino();
        Self { namespace, inode, cookie: Cell::new(0) }
    }

    fn id(&self) -> NetnsId {
        NetnsId { inode: self.inode, cookie: Some(self.cookie.get()) }
    }
}

/// What lasts longer than one sequence.
struct Stage {
    groups: [Group; 3],
    policies: Vec<Policy>,
    cookies: Cell<u64>,
    steps: Cell<usize>,
    kills: Cell<usize>,
}

impl Stage {
    fn new() -> Self {
        let directory = tempfile::tempdir_in("/run").expect("these tests need files of root's: run them as root");
        let read = |text: &&str| {
            let path = directory.path().join("config.toml");
            fs::write(&path, text).expect("a file");
            config::load(&path, true, true).expect("a policy")
        };
        Self {
            groups: std::array::from_fn(|_| Group::new()),
            policies: POLICIES.iter().map(read).collect(),
            cookies: Cell::new(0),
            steps: Cell::new(0),
            kills: Cell::new(0),
        }
    }
}

/// One machine, its containers and its ledger.
struct World<'a> {
    stage: &'a Stage,
    policy: &'a Policy,
    host: FakeHost,
    state_dir: tempfile::TempDir,
    lives: Vec<Life>,
    /// The values that each host-wide setting had at first or got from outside.
    foreign: BTreeMap<Key, BTreeSet<String>>,
    /// The namespaces, by cookie, that nobody of us could enter any more to put anything back.
    out_of_reach: RefCell<BTreeSet<u64>>,
    /// The model, after the last step.
    model: Model,
}

/// Everything below a directory.
type Tree = BTreeMap<PathBuf, (u64, u32, i64, i64, Vec<u8>)>;

fn tree(directory: &Path) -> Tree {
    let mut all = BTreeMap::new();
    let mut left = vec![directory.to_path_buf()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path).expect("it is there");
        let mut content = Vec::new();
        if meta.is_dir() {
            left.extend(fs::read_dir(&path).expect("a directory").map(|entry| entry.expect("an entry").path()));
        } else {
            content = fs::read(&path).expect("a file");
        }
        all.insert(path, (meta.ino(), meta.mode(), meta.mtime(), meta.mtime_nsec(), content));
    }
    all
}

impl<'a> World<'a> {
    fn new(stage: &'a Stage, policy: usize) -> Self {
        let closed = fs::Permissions::from_mode(0o700);
        let state_dir = tempfile::Builder::new().permissions(closed).tempdir_in("/dev/shm").expect("a directory");
        let host = FakeHost::mptcp_org().with_fullmesh();
        let foreign = (0..HOST_WIDE).map(|key| (key, BTreeSet::from([SETTINGS[key].1[0].into()]))).collect();
        let policy = &stage.policies[policy];
        let (lives, out_of_reach, model) = Default::default();
        let mut world = Self { stage, policy, host, state_dir, lives, foreign, out_of_reach, model };
        world.model = world.seen().expect("an empty ledger");
        world
    }

    fn context(&self) -> Context {
        Context {
            policy: self.policy.clone(),
            state_dir: self.state_dir.path().into(),
            containers: ContainerFiles { directory: "/nonexistent".into(), initial_user_namespace: true },
            deadline: Deadline::after(Duration::from_secs(600)),
        }
    }

    fn ledger(&self) -> Result<Ledger> {
        Ledger::create(self.state_dir.path())
    }

    fn is_alive(&self, life: usize) -> bool {
        self.lives[life].is_alive()
    }

    fn life_of(&self, who: usize) -> Option<usize> {
        (0..self.lives.len()).rev().find(|life| self.lives[*life].who == who).filter(|life| self.is_alive(*life))
    }

    /// The container's present life, begun if need be.
    fn alive(&mut self, who: usize) -> usize {
        if let Some(life) = self.life_of(who) {
            return life;
        }
        let group = &self.stage.groups[GROUPS[who]];
        if !self.host.has_netns(group.inode) {
            self.stage.cookies.set(self.stage.cookies.get() + 1);
            group.cookie.set(self.stage.cookies.get());
            self.host.add_two_paths(group.inode);
        }
        self.lives.push(Life::start(who, group));
        self.lives.len() - 1
    }

    /// Its process ends, and with the last one of a namespace that.
    fn die(&self, who: usize) {
        let Some(life) = self.life_of(who) else { return };
        self.lives[life].end();
        let group = GROUPS[who];
        if !(0..CONTAINERS.len()).any(|other| GROUPS[other] == group && self.life_of(other).is_some()) {
            self.host.remove_netns(self.stage.groups[group].inode);
        }
    }

    /// Kernel and ledger, as the model sees them.
    fn seen(&self) -> Result<Model> {
        let ledger = self.ledger()?;
        let mut model = Model::default();
        let life = |instance: &Instance| {
            (0..self.lives.len()).find(|life| self.lives[*life].instance == *instance).context("nobody's life")
        };
        let who =
            |instance: &Instance| CONTAINERS.iter().position(|id| *id == instance.container.id).context("nobody's id");
        for (key, setting) in SETTINGS.iter().enumerate().take(HOST_WIDE) {
            model.values.insert(key, self.host.value(setting.0).context("it is there")?);
            let page = ledger.setting(&real(key));
            let firm = page.directories()[0].join("value").exists();
            let Some(page) = page.read()? else { continue };
            let claims = page.claims.iter().map(|claim| {
                let (who, life) = (who(&claim.instance)?, life(&claim.instance)?);
                Ok(HeldClaim { who, life, value: claim.value.clone(), overtaken: claim.time <= page.original_since })
            });
            let overtaken = |since: u64| {
                let claims = page.claims.iter().filter(|claim| claim.time <= since);
                claims.map(|claim| who(&claim.instance)).collect::<Result<_>>()
            };
            let intent = match &page.intent {
                Some(intent) => Some(Intended {
                    before: intent.original.clone(),
                    wanted: intent.wanted.clone(),
                    overtook: intent.overtook.map(overtaken).transpose()?,
                }),
                None => None,
            };
            let held = Held {
                original: page.original,
                value: page.value,
                firm,
                claims: claims.collect::<Result<_>>()?,
                intent,
            };
            model.pages.insert(key, held);
        }
        let mut times = Vec::new();
        for record in ledger.records()? {
            let record = record?;
            let number = who(&record.instance)?;
            times.push((record.time, number));
            let mut entry = Entry {
                life: life(&record.instance)?,
                space: record.instance.netns.cookie.context("a cookie")?,
                listed: ledger.members(&record.instance.netns)?.contains(&record.instance.container.key()),
                claims: record.host_claims().map(name_of).collect(),
                own: own(&record),
                before: record.at_work.as_ref().map(|_| record.versions().skip(1).map(own).collect()),
                ..Entry::default()
            };
            for wish in record.request.wishes() {
                let admin = wish.source.rank == Rank::CommandLine;
                match &wish.what {
                    What::Setting(key, value) => entry.wishes.insert((admin, name_of(key)), value.clone()).map(|_| ()),
                    What::Interface(_, flags) => {
                        let (bits, _) = flags.link_bits().context("flags that this kernel has")?;
                        entry.wishes.insert((admin, ETH1), flags_of(bits).into()).map(|_| ())
                    }
                    What::OnConflict(what) => entry.on_conflict.insert(admin, *what).map(|_| ()),
                    other => bail!("nobody asked for {other:?}"),
                };
            }
            model.records.insert(number, entry);
        }
        times.sort_unstable();
        model.order = times.into_iter().map(|(_, who)| who).collect();
        for group in self.stage.groups.iter().filter(|group| self.host.has_netns(group.inode)) {
            let bits = flags_of(self.host.link_flags(group.inode, 3));
            let retries = self.host.netns_value(group.inode, SETTINGS[RETRIES].0);
            model.spaces.insert(group.cookie.get(), BTreeMap::from([(RETRIES, retries), (ETH1, bits.into())]));
        }
        Ok(model)
    }

    /// What must come of it, from the model after the last step.
    fn predict<T>(&self, what: impl FnOnce(&mut Model, &Given) -> T) -> (Model, T) {
        let mut model = self.model.clone();
        let is_alive = |life| self.is_alive(life);
        let answer = what(&mut model, &Given { policy: self.policy, is_alive: &is_alive });
        (model, answer)
    }

    /// Runs a hook. None if it was killed.
    fn hook<T>(&self, trouble: Trouble, work: impl FnOnce() -> T) -> Option<T> {
        match trouble {
            Trouble::Killed(at) => drop(kill_at(at)),
            Trouble::Refused(at) => self.host.fault(at, Fault::Refused),
            Trouble::Nothing => {}
        }
        let done = catch_unwind(AssertUnwindSafe(work));
        kill_at(0);
        self.host.forget_faults();
        match done {
            Ok(done) => Some(done),
            Err(reason) if reason.is::<Killed>() => {
                self.stage.kills.set(self.stage.kills.get() + 1);
                None
            }
            Err(reason) => std::panic::resume_unwind(reason),
        }
    }

    fn apply(&self, life: usize, asked: &Asked) -> Result<Done> {
        let instance = self.lives[life].instance.clone();
        let mut request = Request::default();
        for ((admin, key), value) in &asked.wishes {
            let (name, value) = (SETTINGS[*key].0, SETTINGS[*key].1[*value]);
            let what = match name.split_once([':', '.']) {
                Some(("module", parameter)) => request::module(parameter, value),
                Some(("interface", name)) => request::interface(name, value).map(|mut wishes| wishes.remove(0)),
                _ => request::sysctl(name, value),
            };
            request.add(Wish::new(what.expect("a wish"), Source::new(rank(*admin), "somebody")))?;
        }
        if let Some((admin, what)) = asked.on_conflict {
            request.add(Wish::new(What::OnConflict(what), Source::new(rank(admin), "somebody")))?;
        }
        let call = Apply {
            container: instance.container.clone(),
            place: Place::Process(instance.pid.expect("a pid")),
            netns_path: None,
            request,
            notes: Vec::new(),
        };
        let kernel = Box::new(self.host.kernel(instance.netns.inode));
        Work { call, context: &self.context(), instance, kernel, kind: self.host.kind(), follows: None }
            .run(&self.ledger()?)
    }

    fn release(&self, who: usize, cause: Cause) -> Result<release::Done> {
        let find = |record: &Record, siblings: &[Record]| {
            let alive = record.instance.is_alive(&instance::boot_id()?) || !siblings.is_empty();
            let group = self.stage.groups.iter().find(|group| group.id() == record.instance.netns);
            let group = group.filter(|group| alive && self.host.has_netns(group.inode));
            if group.is_none() {
                self.out_of_reach.borrow_mut().extend(record.instance.netns.cookie);
            }
            let kernel = Box::new(self.host.kernel(group.map_or(HOME, |group| group.inode)));
            Ok(Some(Reach { kernel, inside: group.is_some() }))
        };
        let container = ContainerId::new(Door::Oci, "/bundle", CONTAINERS[who])?;
        release_by(&container, &self.context(), cause, &find)
    }

    fn release_stale(&self) -> Result<()> {
        let records = self.ledger()?.records()?.into_iter().collect::<Result<Vec<Record>>>()?;
        let boot_id = instance::boot_id()?;
        for record in records.iter().filter(|record| !record.instance.is_alive(&boot_id)) {
            let who = CONTAINERS.iter().position(|id| *id == record.instance.container.id).context("nobody's id")?;
            self.release(who, Cause::Stale)?;
        }
        Ok(())
    }

    /// One step, and what must be true after it.
    fn step(&mut self, step: &Step) -> Result<()> {
        self.stage.steps.set(self.stage.steps.get() + 1);
        match step {
            Step::Apply(who, asked, trouble) => self.step_apply(*who, asked, *trouble)?,
            Step::Release(who, trouble) => {
                let (expected, conflicts) = self.predict(|model, given| model.release(*who, given));
                let done = self.hook(*trouble, || self.release(*who, Cause::Person));
                self.left(*trouble, done.map(|done| done.map(|_| ())), &expected)?;
                if *trouble == Trouble::Nothing {
                    self.every_conflict_is_recorded(*who, &conflicts)?;
                }
            }
            Step::Stopped(who) => {
                let alive = self.model.records.get(who).is_some_and(|entry| self.is_alive(entry.life));
                let (released, _) = self.predict(|model, given| model.release(*who, given));
                let expected = if alive { self.model.clone() } else { released };
                let done = self.release(*who, Cause::Hook);
                self.left(Trouble::Nothing, Some(done.map(|_| ())), &expected)?;
            }
            Step::Die(who) => {
                self.die(*who);
                self.model = self.seen()?;
            }
            Step::ReleaseStale(trouble) => {
                let (expected, ()) = self.predict(|model, given| model.stale(given));
                let done = self.hook(*trouble, || self.release_stale());
                self.left(*trouble, done, &expected)?;
                if *trouble == Trouble::Nothing {
                    self.no_claim_without_its_instance()?;
                }
            }
            Step::Foreign(key, value) => {
                let value = SETTINGS[*key].1[*value];
                self.host.set(HOME, SETTINGS[*key].0, value);
                self.foreign.entry(*key).or_default().insert(value.into());
                self.model = self.seen()?;
            }
            Step::Repair => self.repair_keeps_what_is_known()?,
            Step::Status => self.status_changes_nothing()?,
        }
        self.originals_are_never_ours()?;
        self.a_changed_value_has_a_claim_or_an_intent()
    }

    /// After whatever lets containers go.
    fn left(&mut self, trouble: Trouble, done: Option<Result<()>>, expected: &Model) -> Result<()> {
        let seen = self.seen()?;
        if trouble == Trouble::Nothing {
            done.context("killed by nobody")??;
            same(&seen, expected)?;
        }
        self.model = seen;
        Ok(())
    }

    fn step_apply(&mut self, who: usize, asked: &Asked, trouble: Trouble) -> Result<()> {
        let life = self.alive(who);
        self.model.spaces = self.seen()?.spaces;
        let value = |(subject, value): (&(bool, Key), &usize)| (*subject, SETTINGS[subject.1].1[*value].to_string());
        let new = Entry {
            life,
            space: self.lives[life].instance.netns.cookie.context("a cookie")?,
            listed: true,
            wishes: asked.wishes.iter().map(value).collect(),
            on_conflict: asked.on_conflict.into_iter().collect(),
            ..Entry::default()
        };
        let time = |world: &Self| -> Result<Option<u64>> {
            let key = world.lives[life].instance.container.key();
            Ok(world.ledger()?.record(&key)?.map(|record| record.time))
        };
        // What a new life finds may go with what the dead one had claimed.
        let known = self.ledger()?.conflicts()?.items.len();
        let before = time(self)?;
        let done = self.hook(trouble, || self.apply(life, asked));
        let restamped = time(self)? != before;
        let seen = self.seen()?;
        let Some(done) = done else {
            self.model = seen;
            return Ok(());
        };
        let end = match &done {
            Ok(_) => End::Applied,
            Err(error) => End::Failed(exit_status(error)),
        };
        let (expected, (expected_end, conflicts)) =
            self.predict(|model, given| model.apply(who, &new, given, restamped));
        if end == End::Failed(1) && matches!(trouble, Trouble::Refused(_)) {
            self.model = seen;
            return Ok(());
        }
        if matches!(trouble, Trouble::Refused(_)) {
            // The kernel's refusal may only have cost a warning.
            self.model = seen;
            return Ok(());
        }
        if let Err(error) = &done {
            ensure!(end == expected_end, "{error:#}; it should be {expected_end:?}");
        }
        ensure!(end == expected_end, "{end:?} instead of {expected_end:?} because of {conflicts:?}");
        same(&seen, &expected)?;
        self.model = seen;
        self.nobody_is_refused_for_the_dead(known)?;
        match end {
            End::Applied => {
                if restamped {
                    self.every_conflict_is_recorded(who, &conflicts)?;
                }
                self.the_same_apply_again_changes_nothing(life, asked)
            }
            End::Failed(3) => self.every_conflict_is_recorded(who, &conflicts),
            End::Failed(_) => Ok(()),
        }
    }

    // The rules, in their own words.

    /// Rule 7: "`original` never lost nor overwritten with a value of ours": it is what the host had at first, or what
    /// somebody else has written.
    fn originals_are_never_ours(&self) -> Result<()> {
        for (key, page) in &self.model.pages {
            let known = &self.foreign[key];
            ensure!(known.contains(&page.original), "the original of {} is {}", SETTINGS[*key].0, page.original);
        }
        Ok(())
    }

    /// Rules 5 and 7: no changed host-wide value without a claim or an intent; else it is as it was at first, or as
    /// somebody else wrote it.
    fn a_changed_value_has_a_claim_or_an_intent(&self) -> Result<()> {
        for (key, value) in &self.model.values {
            let is_known = self.model.pages.get(key).is_some_and(|page| {
                page.intent.is_some() || !page.claims.is_empty() || page.value == page.original
                    // Of a killed hook whose record says so.
                    || self.model.records.values().any(|entry| entry.before.is_some() && entry.claims.contains(key))
                    || self.model.records.values().any(|entry| entry.claims.contains(key))
            });
            ensure!(
                is_known || self.foreign[key].contains(value),
                "{} is {value} and nobody relies on it",
                SETTINGS[*key].0
            );
        }
        Ok(())
    }

    /// Rule 7: "dead instances hold nothing from the moment anybody looks."
    fn nobody_is_refused_for_the_dead(&self, known: usize) -> Result<()> {
        for conflict in self.ledger()?.conflicts()?.items.iter().skip(known) {
            for holder in &conflict.holders {
                let who = CONTAINERS.iter().position(|id| id == holder).context("nobody's id")?;
                ensure!(self.life_of(who).is_some(), "{} is held back by {holder}, which is dead", conflict.container);
            }
        }
        Ok(())
    }

    /// Rule 5: "everything of this is recorded in `conflicts`."
    fn every_conflict_is_recorded(&self, who: usize, expected: &[Expected]) -> Result<()> {
        let recorded = self.ledger()?.conflicts()?;
        for conflict in expected {
            let name = if conflict.key == ETH1 { SETTINGS[ETH1].0.to_string() } else { real(conflict.key).to_string() };
            let found = recorded.items.iter().any(|there| {
                there.container == CONTAINERS[who]
                    && there.key == name
                    && (conflict.key == ETH1 || there.wanted == conflict.wanted)
                    && there.outcome == conflict.outcome
            });
            ensure!(found, "{conflict:?} of {} is not recorded: {recorded:?}", CONTAINERS[who]);
        }
        Ok(())
    }

    /// Rule 2: "the same apply twice changes nothing."
    fn the_same_apply_again_changes_nothing(&self, life: usize, asked: &Asked) -> Result<()> {
        let before = (self.host.state(), self.host.changes().len(), self.seen()?);
        match self.apply(life, asked).context("the same apply again")? {
            Done::Applied(_, changed) => ensure!(!changed, "the same apply again changed something"),
            _ => bail!("the same apply again did nothing"),
        }
        ensure!(self.host.changes().len() == before.1, "{:?}", &self.host.changes()[before.1..]);
        ensure!(self.host.state() == before.0, "the same apply again changed the kernel");
        same(&self.seen()?, &before.2).context("the same apply again")
    }

    /// Rule 7: "status takes no lock, changes nothing." All locks are held by somebody else meanwhile.
    fn status_changes_nothing(&self) -> Result<()> {
        let ledger = self.ledger()?;
        let names =
            fs::read_dir(self.state_dir.path().join("locks"))?.map(|entry| Ok(entry?.file_name().into_string()));
        let names: Vec<String> = names.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let _locks = ledger.lock_by_name(&names, "somebody", Deadline::after(Duration::ZERO))?;
        let before = (tree(self.state_dir.path()), self.host.state());
        let status = status(&self.context(), None)?;
        ensure!(before == (tree(self.state_dir.path()), self.host.state()), "status changed something");
        ensure!(status.problems.is_empty(), "{:?}", status.problems);
        for container in &status.containers {
            let who = CONTAINERS.iter().position(|id| *id == container.record.instance.container.id);
            let entry = &self.model.records[&who.context("nobody's id")?];
            ensure!(container.live == self.is_alive(entry.life), "status of {}", container.record.name);
        }
        for setting in &status.settings {
            let page = &self.model.pages[&name_of(&setting.key)];
            let living = page.claims.iter().filter(|claim| self.is_alive(claim.life)).count();
            ensure!(setting.claims.len() == living, "status shows the claims of the dead");
            ensure!(setting.interrupted == page.intent.is_some(), "status of {}", setting.key);
        }
        Ok(())
    }

    /// Rule 7: repair takes nothing from the living, and leaves the originals alone.
    fn repair_keeps_what_is_known(&mut self) -> Result<()> {
        let values = self.host.state();
        let repaired = repair(&self.context())?;
        // It looks at this machine's kernel, which does not have these settings.
        let other: Vec<_> =
            repaired.failures.iter().filter(|f| !f.contains("it cannot be read; load its module")).collect();
        ensure!(other.is_empty(), "{other:?}");
        ensure!(self.host.state() == values, "repair wrote to a kernel that it does not know");
        let seen = self.seen()?;
        let unlisted = |model: &Model| -> BTreeMap<usize, Entry> {
            let entries = model.records.iter().map(|(who, entry)| (*who, Entry { listed: true, ..entry.clone() }));
            entries.collect()
        };
        ensure!(unlisted(&seen) == unlisted(&self.model), "repair changed records");
        for (key, before) in &self.model.pages {
            let after = seen.pages.get(key);
            ensure!(after.is_none_or(|page| page.original == before.original), "repair changed an original");
            let relied = |claim: &&HeldClaim| {
                let entry = self.model.records.get(&claim.who);
                entry.is_some_and(|e| e.life == claim.life && e.before.is_none() && e.claims.contains(key))
            };
            for claim in before.claims.iter().filter(relied) {
                ensure!(after.is_some_and(|page| page.claims.contains(claim)), "repair struck {claim:?}");
            }
        }
        self.model = seen;
        Ok(())
    }

    /// Rule 7: no claim without its instance once all dead have been released.
    fn no_claim_without_its_instance(&self) -> Result<()> {
        for (key, page) in &self.model.pages {
            // A killed hook's next run settles its container's earlier life.
            let interrupted = |who: usize| self.model.records.get(&who).is_some_and(|entry| entry.before.is_some());
            for claim in page.claims.iter().filter(|claim| !interrupted(claim.who)) {
                ensure!(self.is_alive(claim.life), "{claim:?} on {} is a dead one's", SETTINGS[*key].0);
            }
        }
        Ok(())
    }

    /// Rule 5: "when no claim is left the `original` is restored [...] only if the value is still the one that we
    /// wrote"; rule 7: nothing is left of those who have left. One half is released, the others die; of two that share
    /// a namespace both are released now and then.
    fn when_the_last_leaves_all_is_as_it_was(&mut self, both: bool) -> Result<()> {
        for who in [0, 3].into_iter().chain(both.then_some(1)) {
            self.release(who, Cause::Person)?;
        }
        self.namespaces_that_all_have_left_are_as_they_were()?;
        for who in 0..CONTAINERS.len() {
            self.die(who);
        }
        self.release_stale()?;
        let model = self.seen()?;
        ensure!(model.records.is_empty(), "left: {:?}", model.records);
        ensure!(model.pages.is_empty(), "left: {:?}", model.pages);
        for (key, value) in &model.values {
            ensure!(self.foreign[key].contains(value), "{} is {value} when all have left", SETTINGS[*key].0);
        }
        Ok(())
    }

    /// Rule 6, and rule 1 wherever a hook was killed: nobody else writes there.
    fn namespaces_that_all_have_left_are_as_they_were(&self) -> Result<()> {
        let model = self.seen()?;
        let is_left = |cookie: &u64| !model.records.values().any(|entry| entry.space == *cookie);
        let reached = |cookie: &u64| !self.out_of_reach.borrow().contains(cookie);
        for (_, space) in model.spaces.iter().filter(|(cookie, _)| is_left(cookie) && reached(cookie)) {
            for (key, value) in space {
                ensure!(*value == SETTINGS[*key].1[0], "{} is {value} when all have left", SETTINGS[*key].0);
            }
        }
        Ok(())
    }

    fn run(mut self, steps: &[Step]) -> Result<()> {
        for (number, step) in steps.iter().enumerate() {
            self.step(step).with_context(|| format!("step {}", number + 1))?;
        }
        self.when_the_last_leaves_all_is_as_it_was(steps.len() % 2 == 0).context("at the end")
    }
}

/// The interface flags' name.
fn flags_of(bits: u32) -> &'static str {
    match bits & 0x18_0000 {
        0 => "default",
        0x10_0000 => "backup",
        0x8_0000 => "off",
        _ => "contradictory",
    }
}

/// The namespace's values that a record relies on.
fn own(record: &Record) -> BTreeMap<Key, Own> {
    let settings = record.settings.iter().filter(|s| s.scope == Scope::Netns && s.claimed);
    let mut own: BTreeMap<Key, Own> =
        settings.map(|s| (name_of(&s.key), (s.value.clone(), s.original.clone().unwrap_or_default()))).collect();
    let links = record.interfaces.iter().filter_map(|interface| interface.link.as_ref());
    own.extend(links.map(|link| (ETH1, (flags_of(link.bits).into(), flags_of(link.original).into()))));
    own
}

fn same(seen: &Model, expected: &Model) -> Result<()> {
    ensure!(seen.values == expected.values, "values {:?} instead of {:?}", seen.values, expected.values);
    ensure!(seen.pages == expected.pages, "pages {:?} instead of {:?}", seen.pages, expected.pages);
    ensure!(seen.spaces == expected.spaces, "namespaces {:?} instead of {:?}", seen.spaces, expected.spaces);
    ensure!(seen.order == expected.order, "order {:?} instead of {:?}", seen.order, expected.order);
    ensure!(seen == expected, "{:?} instead of {:?}", seen.records, expected.records);
    Ok(())
}

/// Tries sequences, the same ones in every run.
fn hold(name: &str, crashes: bool) {
    let stage = Stage::new();
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let sequences = (0..POLICIES.len(), prop::collection::vec(step(crashes), 1..STEPS));
    let outcome = TestRunner::new_with_rng(config, rng).run(&sequences, |(policy, steps)| {
        World::new(&stage, policy).run(&steps).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    println!("{name}: {CASES} sequences, {} steps, {} hooks killed", stage.steps.get(), stage.kills.get());
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

#[test]
fn rules_5_to_7_hold_in_any_order_of_events() {
    hold("in any order", false);
}

#[test]
fn rules_5_to_7_hold_wherever_hooks_are_killed() {
    hold("with crashes", true);
}

/// A hook was killed after it had written the value and before it claimed it; then the kernel does not take the former
/// value back. Whoever comes next has to find that in the ledger.
#[test]
fn a_value_that_a_killed_hook_left_and_the_kernel_keeps_stays_on_record() {
    let stage = Stage::new();
    let wish = |key: Key| Asked { wishes: BTreeMap::from([((true, key), 1)]), on_conflict: None };
    for killed in 1..40 {
        for refused in 1..4 {
            let steps = [
                Step::Apply(2, wish(1), Trouble::Killed(killed)),
                Step::Die(2),
                Step::Apply(2, wish(0), Trouble::Refused(refused)),
            ];
            World::new(&stage, 0).run(&steps).unwrap_or_else(|error| panic!("{killed}, {refused}: {error:#}"));
        }
    }
}

/// A container that starts anew in a namespace that is still there gives back what its last life set and it does not
/// ask for, whichever hooks were killed meanwhile: one that sets other values, and one that asks for none.
#[test]
fn what_killed_hooks_had_to_give_back_goes_back() {
    let stage = Stage::new();
    let wishes = |keys: &[Key], value: usize| Asked {
        wishes: keys.iter().map(|key| ((true, *key), value)).collect(),
        on_conflict: None,
    };
    let (host, own) = ([0], [ETH1, RETRIES]);
    let mut kills = 0;
    // With no kill, with one and with two.
    for set in 0..14 {
        for given_back in 0..14 {
            kills = stage.kills.get();
            let trouble = |at: usize| if at == 0 { Trouble::Nothing } else { Trouble::Killed(at) };
            let steps = [
                // It keeps the namespace.
                Step::Apply(1, wishes(&host, 0), Trouble::Nothing),
                Step::Apply(0, wishes(&own, 1), Trouble::Nothing),
                Step::Die(0),
                Step::Apply(0, wishes(&own, 2), trouble(set)),
                Step::Die(0),
                Step::Apply(0, wishes(&host, 0), trouble(given_back)),
                Step::Status,
                Step::Release(0, Trouble::Nothing),
            ];
            World::new(&stage, 0).run(&steps).unwrap_or_else(|error| panic!("{set}, {given_back}: {error:#}"));
        }
    }
    assert_eq!(stage.kills.get(), kills, "the hooks can be killed at more points than were tried");
}
