//! Whole lives of containers: apply and release over a fake kernel, with a real ledger and real processes.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::ensure;
use nix::sched::{CloneFlags, setns, unshare};

use super::*;
use crate::deadline::Deadline;
use crate::error::exit_status;
use crate::front::ContainerFiles;
use crate::instance::{ContainerId, Door};
use crate::kernel::Endpoint;
use crate::kernel::Limits;
use crate::kernel::fake::{FakeHost, Fault, HOME, Killed, Netns, State};
use crate::ledger::record::{Conflict, ConflictOutcome, Outcome};
use crate::policy::{Policy, config};
use crate::release::{Cause, Reach, release_by};
use crate::request::{self, OnConflict, Rank, Source, What, Wish};

const ADMIN: Rank = Rank::CommandLine;
const AUTHOR: Rank = Rank::Annotation;
const SCHEDULER: &str = "net.mptcp.mptcp_scheduler";
const ENABLED: &str = "net.mptcp.mptcp_enabled";
const SUBFLOWS: &str = "module:mptcp_fullmesh.num_subflows";

type Asked = (Rank, Result<What, String>);

fn interface(name: &str, flags: &str) -> Asked {
    (ADMIN, request::interface(name, flags).map(|mut wishes| wishes.remove(0)))
}

/// A sysctl or a module's parameter.
fn set(key: &str, value: &str) -> Asked {
    (
        ADMIN,
        match key.strip_prefix("module:") {
            Some(key) => request::module(key, value),
            None => request::sysctl(key, value),
        },
    )
}

fn limit(name: &str, value: &str) -> Asked {
    (ADMIN, request::limit(name, value))
}

fn on_conflict(what: OnConflict) -> Asked {
    (ADMIN, Ok(What::OnConflict(what)))
}

/// One machine and its ledger.
struct World {
    host: FakeHost,
    state_dir: tempfile::TempDir,
    policy: Policy,
}

/// A container: a real process in a real network namespace of its own, which the fake kernel knows by its inode.
struct Container {
    id: ContainerId,
    process: RefCell<Child>,
    start_time: u64,
    netns: NetnsId,
    /// Keeps the namespace, so that its inode number is not used again.
    _namespace: File,
}

impl Drop for Container {
    fn drop(&mut self) {
        self.die();
    }
}

impl Container {
    fn start(id: &str, neighbour: Option<&Container>, cookies: bool) -> Self {
        let beside = neighbour.map(|other| format!("/proc/{}/ns/net", other.process.borrow().id()));
        let starter = std::thread::spawn(move || {
            match beside {
                Some(path) => setns(File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap(),
                None => unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root, for network namespaces"),
            }
            let mut sleep = Command::new("sleep");
            let sleep = sleep.arg("600").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let process = sleep.spawn().unwrap();
            (process, Namespace::own().unwrap().inode(), File::open("/proc/thread-self/ns/net").unwrap())
        });
        let (process, inode, namespace) = starter.join().unwrap();
        Self {
            id: ContainerId::new(Door::Oci, "/bundle", id).unwrap(),
            start_time: Process::read(process.id()).unwrap().start_time,
            process: RefCell::new(process),
            netns: NetnsId { inode, cookie: cookies.then_some(inode) },
            _namespace: namespace,
        }
    }

    /// Its process ends. Its namespace stays.
    fn die(&self) {
        let mut process = self.process.borrow_mut();
        process.kill().and_then(|()| process.wait()).expect("a process of ours can be killed");
    }

    fn instance(&self) -> Instance {
        Instance {
            container: self.id.clone(),
            boot_id: instance::boot_id().unwrap(),
            pid: Some(self.process.borrow().id()),
            start_time: Some(self.start_time),
            netns: self.netns.clone(),
            netns_path: None,
        }
    }
}

impl World {
    fn new(host: FakeHost) -> Self {
        let closed = fs::Permissions::from_mode(0o700);
        let state_dir = tempfile::Builder::new().permissions(closed).tempdir().unwrap();
        Self { host, state_dir, policy: Policy::default() }
    }

    fn mptcp_org() -> Self {
        Self::new(FakeHost::mptcp_org().with_fullmesh())
    }

    fn upstream() -> Self {
        Self::new(FakeHost::upstream())
    }

    fn policy(mut self, text: &str) -> Self {
        let directory = tempfile::tempdir_in("/run").expect("these tests need files of root's: run them as root");
        let path = directory.path().join("config.toml");
        fs::write(&path, text).unwrap();
        self.policy = config::load(&path, true, true).unwrap();
        self
    }

    /// A container with `eth0` and `eth1`.
    fn container(&self, id: &str) -> Container {
        // Kernels of multipath-tcp.org are older than SO_NETNS_COOKIE.
        let container = Container::start(id, None, self.host.kind() == kernel::Kind::Upstream);
        self.host.add_two_paths(container.netns.inode);
        container
    }

    /// Another one in the same namespace.
    fn member(&self, id: &str, neighbour: &Container) -> Container {
        let container = Container::start(id, Some(neighbour), neighbour.netns.cookie.is_some());
        assert_eq!(container.netns, neighbour.netns);
        container
    }

    /// It ends, and its namespace with it.
    fn end(&self, container: &Container) {
        container.die();
        self.host.remove_netns(container.netns.inode);
    }

    fn context(&self) -> Context {
        Context {
            policy: self.policy.clone(),
            state_dir: self.state_dir.path().into(),
            containers: ContainerFiles { directory: "/nonexistent".into(), initial_user_namespace: true },
            deadline: Deadline::after(Duration::from_secs(600)),
        }
    }

    fn apply(&self, container: &Container, asked: &[Asked]) -> Result<Done> {
        let mut request = Request::default();
        for (rank, what) in asked {
            request.add(Wish::new(what.clone().unwrap(), Source::new(*rank, format!("the {rank:?}"))))?;
        }
        let instance = container.instance();
        let call = Apply {
            container: container.id.clone(),
            place: Place::Process(container.process.borrow().id()),
            netns_path: None,
            request,
            notes: Vec::new(),
        };
        let context = self.context();
        let ledger = Ledger::create(&context.state_dir)?;
        let kernel = Box::new(self.host.kernel(container.netns.inode));
        Work { call, context: &context, instance, kernel, kind: self.host.kind(), follows: None }.run(&ledger)
    }

    /// The agent looks at it, in a hurry.
    fn follow(&self, container: &Container) -> Result<Followed> {
        let call = Apply {
            container: container.id.clone(),
            place: Place::Inside(None),
            netns_path: None,
            request: Request::default(),
            notes: Vec::new(),
        };
        let context = self.context();
        let ledger = Ledger::create(&context.state_dir)?;
        let kernel = Box::new(self.host.kernel(container.netns.inode));
        let (instance, follows) =
            (container.instance(), Some(Pace { hurries: true, ways_patience: Duration::from_secs(600) }));
        Work { call, context: &context, instance, kernel, kind: self.host.kind(), follows }.follow(&ledger)
    }

    /// Applies what must succeed. Whether anything was changed.
    fn applied(&self, container: &Container, asked: &[Asked]) -> (Record, bool) {
        match self.apply(container, asked).unwrap() {
            Done::Applied(record, changed) => (*record, changed),
            _ => panic!("not applied"),
        }
    }

    /// Applies what must fail with this exit status and leave everything as it is. The error's text.
    fn fails(&self, container: &Container, asked: &[Asked], status: u8) -> String {
        let before = (self.host.state(), self.files());
        let error = self.apply(container, asked).map(|_| ()).expect_err("succeeded");
        let text = format!("{error:#}");
        assert_eq!(exit_status(&error), status, "{text}");
        same_state(&self.host.state(), &before.0).expect(&text);
        assert_eq!(self.files(), before.1, "{text}");
        text
    }

    /// Applies until the hook is killed. False if it was not.
    fn killed(&self, work: impl FnOnce(&Self)) -> bool {
        match catch_unwind(AssertUnwindSafe(|| work(self))) {
            Ok(()) => false,
            Err(reason) if reason.is::<Killed>() => true,
            Err(reason) => std::panic::resume_unwind(reason),
        }
    }

    fn release(&self, container: &Container, cause: Cause) -> Result<release::Done> {
        let find = |record: &Record, siblings: &[Record]| {
            let inode = record.instance.netns.inode;
            let alive = record.instance.is_alive(&instance::boot_id()?) || !siblings.is_empty();
            let inside = alive && self.host.has_netns(inode);
            let kernel = Box::new(self.host.kernel(if inside { inode } else { HOME }));
            Ok(Some(Reach { kernel, inside }))
        };
        release_by(&container.id, &self.context(), cause, &find)
    }

    /// Releases by hand what must be released; what is said about it.
    fn released(&self, container: &Container) -> Vec<String> {
        match self.release(container, Cause::Person).unwrap() {
            release::Done::Released(_, notes) => notes,
            release::Done::Unknown => panic!("{} is unknown", container.id.id),
            release::Done::Alive(_) => panic!("{} was left alone", container.id.id),
        }
    }

    /// The ledger's files, without locks and histories.
    fn files(&self) -> BTreeMap<PathBuf, String> {
        let mut files = BTreeMap::new();
        let mut directories: Vec<PathBuf> =
            ["containers", "namespaces", "settings"].iter().map(|name| self.state_dir.path().join(name)).collect();
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else {
                    files.insert(path.clone(), fs::read_to_string(path).unwrap());
                }
            }
        }
        files
    }

    fn assert_nothing_left(&self, pristine: &State) {
        same_state(&self.host.state(), pristine).unwrap();
        assert_eq!(self.files(), BTreeMap::new());
    }

    fn ledger(&self) -> Ledger {
        Ledger::create(self.state_dir.path()).unwrap()
    }

    fn page(&self, setting: &str) -> Option<Setting> {
        self.ledger().setting(&SettingKey::try_from(setting.to_string()).unwrap()).read().unwrap()
    }

    fn conflicts(&self) -> Vec<Conflict> {
        self.ledger().conflicts().unwrap().items
    }

    fn value(&self, setting: &str) -> String {
        self.host.value(setting).expect("the setting is there")
    }

    fn link(&self, container: &Container, index: u32) -> u32 {
        self.host.link_flags(container.netns.inode, index) & 0x38_0000
    }
}

/// Host-wide settings of a multipath-tcp.org kernel, each with its original value and two others.
const HOST_WIDE: [(&str, [&str; 3]); 3] =
    [(SCHEDULER, ["default", "redundant", "blest"]), (ENABLED, ["1", "5", "9"]), (SUBFLOWS, ["1", "2", "3"])];

// Whole lives.

#[test]
fn a_life_on_mptcp_org() {
    let world = World::mptcp_org();
    let web = world.container("web");
    let pristine = world.host.state();
    let (record, changed) = world.applied(&web, &[interface("eth1", "backup")]);
    assert!(changed && record.at_work.is_none() && record.warnings.is_empty(), "{record:?}");
    assert_eq!(world.link(&web, 3), 0x10_0000);
    let table: Vec<_> = world.host.fullmesh_table(web.netns.inode).iter().map(|row| (row.0, row.1)).collect();
    assert_eq!(table, [(2, false), (3, true)]);
    let files = world.files();
    let (_, changed) = world.applied(&web, &[interface("eth1", "backup")]);
    assert!(!changed);
    assert_eq!(world.files(), files, "the same apply twice changes nothing");
    assert!(matches!(world.release(&web, Cause::Hook).unwrap(), release::Done::Alive(_)));
    assert_eq!(world.files(), files);
    assert_eq!(world.released(&web), Vec::<String>::new());
    world.assert_nothing_left(&pristine);
    assert!(matches!(world.release(&web, Cause::Person).unwrap(), release::Done::Unknown));
}

#[test]
fn flags_are_switched_on_a_running_container_and_given_back() {
    let world = World::mptcp_org();
    let web = world.container("web");
    world.host.set_link_flags(web.netns.inode, 3, 0x10_0000, 0x18_0000).unwrap();
    let pristine = world.host.state();
    for (flags, bits) in [("off", 0x8_0000), ("backup", 0x10_0000), ("default", 0), ("0x81003", 0x8_0000)] {
        world.applied(&web, &[interface("eth1", flags)]);
        assert_eq!(world.link(&web, 3), bits, "{flags}");
    }
    world.released(&web);
    world.assert_nothing_left(&pristine);
}

#[test]
fn flags_that_somebody_changed_since_are_theirs() {
    let world = World::mptcp_org();
    let web = world.container("web");
    let pristine = world.host.state();
    world.applied(&web, &[interface("eth1", "backup")]);
    world.host.ioctl_up(web.netns.inode, 3);
    assert_eq!(world.host.state(), pristine, "busybox's ifconfig wiped them");
    world.applied(&web, &[interface("eth1", "backup")]);
    assert_eq!(world.link(&web, 3), 0x10_0000);
    world.host.set_link_flags(web.netns.inode, 3, 0x8_0000, 0x18_0000).unwrap();
    world.released(&web);
    assert_eq!(world.link(&web, 3), 0x8_0000);
}

#[test]
fn a_life_upstream() {
    let world = World::upstream();
    let web = world.container("web");
    let foreign = Endpoint { id: 9, address: "10.0.1.2".parse().unwrap(), port: None, ifindex: 2, flags: 2 };
    world.host.netns(web.netns.inode, |netns| netns.endpoints.push(foreign));
    let pristine = world.host.state();
    let asked = [
        interface("eth0", "fullmesh"),
        interface("eth1", "backup"),
        set("stale_loss_cnt", "3"),
        set("net.core.rmem_max", "4194304"),
        limit("subflows", "4"),
    ];
    let (record, changed) = world.applied(&web, &asked);
    assert!(changed);
    let endpoints: Vec<_> = record.interfaces.iter().flat_map(|i| &i.endpoints).map(|e| (e.id, e.flags)).collect();
    assert_eq!(endpoints, [(9, 10), (1, 6)]);
    let files = world.files();
    assert!(!world.applied(&web, &asked).1);
    assert_eq!(world.files(), files);
    world.released(&web);
    world.assert_nothing_left(&pristine);
}

#[test]
fn a_container_whose_namespace_is_gone_gives_the_hosts_values_back() {
    let world = World::mptcp_org();
    let home = world.host.state();
    let web = world.container("web");
    world.applied(&web, &[interface("eth1", "backup"), set(SCHEDULER, "redundant"), set(SUBFLOWS, "2")]);
    world.end(&web);
    assert!(matches!(world.release(&web, Cause::Hook).unwrap(), release::Done::Released(..)));
    world.assert_nothing_left(&home);
}

#[test]
fn a_path_manager_and_its_parameter_come_in_one_go() {
    let world = World::new(FakeHost::mptcp_org());
    let web = world.container("web");
    let manager = "net.mptcp.mptcp_path_manager";
    world.applied(&web, &[set(manager, "fullmesh"), set(SUBFLOWS, "3"), interface("eth1", "backup")]);
    assert_eq!((world.value(manager), world.value(SUBFLOWS)), ("fullmesh".into(), "3".into()));
    world.released(&web);
    assert_eq!((world.value(manager), world.value(SUBFLOWS)), ("default".into(), "1".into()));
    assert_eq!(world.files(), BTreeMap::new());
}

// Host-wide values of several containers.

#[test]
fn host_wide_values_are_shared_and_the_last_one_restores_them() {
    for (key, [original, value, _]) in HOST_WIDE {
        let world = World::mptcp_org();
        let (web, db) = (world.container("web"), world.container("db"));
        let pristine = world.host.state();
        let (first, _) = world.applied(&web, &[set(key, value)]);
        assert_eq!(first.settings[0].outcome, Outcome::Applied);
        let files = world.files();
        assert!(!world.applied(&web, &[set(key, value)]).1);
        assert_eq!(world.files(), files, "{key}: the same apply twice changes nothing");
        let (second, changed) = world.applied(&db, &[set(key, value)]);
        assert_eq!((second.settings[0].outcome, changed), (Outcome::Shared, false));
        assert_eq!(world.page(key).unwrap().original, original);
        assert_eq!(world.page(key).unwrap().claims.len(), 2);
        world.released(&web);
        assert_eq!(world.value(key), value);
        world.released(&db);
        world.assert_nothing_left(&pristine);
    }
}

#[test]
fn host_wide_values_of_others_are_not_changed_behind_their_backs() {
    for (key, [_, value, other]) in HOST_WIDE {
        let world = World::mptcp_org();
        let (web, db) = (world.container("web"), world.container("db"));
        world.applied(&web, &[set(key, value)]);
        let reason = world.fails(&db, &[set(key, other), interface("eth1", "backup")], 3);
        assert!(reason.contains("web") && reason.contains(key), "{reason}");
        let conflict = world.conflicts().pop().unwrap();
        assert_eq!((conflict.container.as_str(), conflict.outcome), ("db", ConflictOutcome::Refused));
        assert_eq!(conflict.holders, ["web"]);
        let (record, _) =
            world.applied(&db, &[set(key, other), interface("eth1", "backup"), on_conflict(OnConflict::Warn)]);
        assert_eq!(record.settings[0].outcome, Outcome::Kept);
        assert_eq!((world.value(key), world.link(&db, 3)), (value.into(), 0x10_0000));
        assert_eq!(world.page(key).unwrap().claims.len(), 1);
        assert_eq!(world.conflicts().pop().unwrap().outcome, ConflictOutcome::Warned);
    }
}

#[test]
fn an_overrider_leaves() {
    for (key, [original, value, other]) in HOST_WIDE {
        let world = World::mptcp_org();
        let (web, db) = (world.container("web"), world.container("db"));
        let pristine = world.host.state();
        world.applied(&web, &[set(key, value)]);
        let (record, _) = world.applied(&db, &[set(key, other), on_conflict(OnConflict::Override)]);
        assert_eq!(record.settings[0].outcome, Outcome::Overrode);
        assert!(record.warnings.iter().any(|warning| warning.contains("web")), "{:?}", record.warnings);
        assert_eq!(world.value(key), other);
        let page = world.page(key).unwrap();
        let overridden: Vec<_> = page.claims.iter().map(|claim| (claim.value.as_str(), claim.overridden)).collect();
        assert_eq!(overridden, [(value, true), (other, false)]);
        assert_eq!(page.original, original);
        world.released(&db);
        assert_eq!(world.value(key), value, "the newest claim that is left");
        let page = world.page(key).unwrap();
        assert!(page.claims.len() == 1 && !page.claims[0].overridden);
        world.released(&web);
        world.assert_nothing_left(&pristine);
    }
}

#[test]
fn the_overridden_leave_first() {
    for (key, [_, value, other]) in HOST_WIDE {
        let world = World::mptcp_org();
        let (web, db) = (world.container("web"), world.container("db"));
        let pristine = world.host.state();
        world.applied(&web, &[set(key, value)]);
        world.applied(&db, &[set(key, other), on_conflict(OnConflict::Override)]);
        world.released(&web);
        assert_eq!(world.value(key), other);
        world.released(&db);
        world.assert_nothing_left(&pristine);
    }
}

#[test]
fn three_override_one_another_and_leave_in_every_order() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let world = World::mptcp_org();
        let containers = ["a", "b", "c"].map(|id| world.container(id));
        let values = ["redundant", "blest", "ecf"];
        let pristine = world.host.state();
        for (container, value) in containers.iter().zip(values) {
            world.applied(container, &[set(SCHEDULER, value), on_conflict(OnConflict::Override)]);
        }
        let mut left = vec![0, 1, 2];
        for leaving in order {
            left.retain(|n| *n != leaving);
            world.released(&containers[leaving]);
            // Only the newest that is left matters, because each overrode the one before.
            assert_eq!(world.value(SCHEDULER), left.last().map_or("default", |n| values[*n]), "{order:?}: {leaving}");
        }
        world.assert_nothing_left(&pristine);
    }
}

#[test]
fn an_unlisted_annotation_shares_without_holding_anybody_back() {
    let world = World::mptcp_org();
    let (web, db) = (world.container("web"), world.container("db"));
    let pristine = world.host.state();
    let (record, _) = world.applied(&web, &[(AUTHOR, request::sysctl("mptcp_scheduler", "default"))]);
    assert_eq!(record.settings[0].outcome, Outcome::Shared);
    assert_eq!(world.page(SCHEDULER), None);
    world.applied(&db, &[set(SCHEDULER, "redundant")]);
    world.fails(&web, &[(AUTHOR, request::sysctl("mptcp_scheduler", "default"))], 3);
    world.released(&db);
    world.released(&web);
    world.assert_nothing_left(&pristine);
}

#[test]
fn a_listed_annotation_holds_others_back() {
    let world = World::mptcp_org().policy("[annotations.sysctls]\n\"net.mptcp.mptcp_scheduler\" = \"redundant\"\n");
    let (web, db) = (world.container("web"), world.container("db"));
    let pristine = world.host.state();
    world.applied(&web, &[(AUTHOR, request::sysctl("mptcp_scheduler", "redundant"))]);
    world.fails(&db, &[set(SCHEDULER, "blest")], 3);
    world.fails(&db, &[(AUTHOR, request::sysctl("mptcp_scheduler", "blest"))], 3);
    world.released(&web);
    world.assert_nothing_left(&pristine);
}

#[test]
fn somebodys_later_change_stays_and_is_recorded() {
    for (key, [_, value, other]) in HOST_WIDE {
        let world = World::mptcp_org();
        let web = world.container("web");
        world.applied(&web, &[set(key, value)]);
        world.host.set(HOME, key, other);
        let notes = world.released(&web);
        assert_eq!(world.value(key), other);
        assert!(notes.iter().any(|note| note.contains(key) && note.contains(other)), "{notes:?}");
        let conflict = world.conflicts().pop().unwrap();
        assert_eq!((conflict.outcome, conflict.kept.as_str()), (ConflictOutcome::Drift, other));
        assert_eq!(world.files(), BTreeMap::new());
    }
}

#[test]
fn a_new_wish_of_the_same_container_replaces_its_old_one() {
    let world = World::mptcp_org();
    let web = world.container("web");
    let pristine = world.host.state();
    world.applied(&web, &[set(SCHEDULER, "redundant")]);
    world.applied(&web, &[set(SCHEDULER, "blest")]);
    let page = world.page(SCHEDULER).unwrap();
    assert_eq!((page.original.as_str(), page.claims.len()), ("default", 1));
    world.released(&web);
    world.assert_nothing_left(&pristine);
}

// The dead.

#[test]
fn the_dead_hold_nobody_and_what_they_changed_goes_back() {
    let world = World::mptcp_org();
    let home = world.host.state();
    let web = world.container("web");
    world.applied(&web, &[set(SCHEDULER, "redundant")]);
    world.end(&web);
    let db = world.container("db");
    let (record, _) = world.applied(&db, &[set(SCHEDULER, "blest")]);
    assert_eq!(record.settings[0].outcome, Outcome::Applied);
    assert_eq!(world.page(SCHEDULER).unwrap().original, "default");
    world.end(&db);
    world.release(&db, Cause::Hook).unwrap();
    assert_eq!(world.value(SCHEDULER), "default");
    world.release(&web, Cause::Stale).unwrap();
    world.assert_nothing_left(&home);
}

#[test]
fn an_annotation_gets_the_original_that_the_dead_had_changed() {
    let world = World::mptcp_org();
    let web = world.container("web");
    world.applied(&web, &[set(SCHEDULER, "redundant")]);
    world.end(&web);
    let db = world.container("db");
    world.applied(&db, &[(AUTHOR, request::sysctl("mptcp_scheduler", "default"))]);
    assert_eq!(world.value(SCHEDULER), "default");
}

#[test]
fn a_dead_overrider_gives_way_to_the_living() {
    for rank in [ADMIN, AUTHOR] {
        let world = World::mptcp_org();
        let web = world.container("web");
        let db = world.container("db");
        world.applied(&web, &[set(SCHEDULER, "redundant")]);
        world.applied(&db, &[set(SCHEDULER, "blest"), on_conflict(OnConflict::Override)]);
        world.end(&db);
        // As web relies on. Nobody alive wants anything else.
        let cache = world.container("cache");
        world.applied(&cache, &[(rank, request::sysctl("mptcp_scheduler", "redundant"))]);
        assert_eq!(world.value(SCHEDULER), "redundant");
    }
}

#[test]
fn an_id_used_again_settles_the_dead_one_first() {
    for again in [vec![set(SCHEDULER, "redundant")], vec![set(SCHEDULER, "blest")], vec![interface("eth1", "backup")]] {
        let world = World::mptcp_org();
        let home = world.host.state();
        let first = world.container("web");
        world.applied(&first, &[set(SCHEDULER, "redundant"), set(SUBFLOWS, "2"), interface("eth1", "off")]);
        world.end(&first);
        let second = world.container("web");
        let pristine = world.host.netns(second.netns.inode, |netns| netns.clone());
        world.applied(&second, &again);
        assert_eq!(world.value(SUBFLOWS), "1", "nobody alive wants another value");
        // A late poststop hook of the first life.
        assert!(matches!(world.release(&first, Cause::Hook).unwrap(), release::Done::Alive(_)));
        world.released(&second);
        assert_eq!(world.host.netns(second.netns.inode, |netns| netns.clone()), pristine);
        world.end(&second);
        world.assert_nothing_left(&home);
    }
}

#[test]
fn an_id_of_a_living_container_is_not_taken_over() {
    let world = World::mptcp_org();
    let first = world.container("web");
    world.applied(&first, &[set(SCHEDULER, "redundant")]);
    let second = world.container("web");
    let error = world.fails(&second, &[set(SCHEDULER, "redundant")], 1);
    assert!(error.contains("alive"), "{error}");
}

// Rule 6: shared namespaces.

#[test]
fn members_of_a_namespace_leave_in_any_order() {
    let kinds: [fn() -> World; 2] = [World::upstream, World::mptcp_org];
    for (world, first_leaves) in kinds.into_iter().flat_map(|world| [(world, true), (world, false)]) {
        let world = world();
        let web = world.container("web");
        let db = world.member("db", &web);
        let pristine = world.host.state();
        let mut asked = vec![interface("eth1", "backup"), set("net.ipv4.tcp_syn_retries", "3")];
        if world.host.kind() == kernel::Kind::Upstream {
            asked.push(limit("subflows", "5"));
        }
        world.applied(&web, &asked);
        let in_force = world.host.state();
        assert!(!world.applied(&db, &asked).1);
        let (leaving, staying) = if first_leaves { (&web, &db) } else { (&db, &web) };
        world.released(leaving);
        assert_eq!(world.host.state(), in_force, "the first to leave tears nothing down");
        world.released(staying);
        world.assert_nothing_left(&pristine);
    }
}

#[test]
fn members_with_different_limits_leave_in_any_order() {
    for first_leaves in [true, false] {
        let world = World::upstream();
        let web = world.container("web");
        let db = world.member("db", &web);
        let pristine = world.host.state();
        world.applied(&web, &[limit("subflows", "6")]);
        world.applied(&db, &[limit("add_addr_accepted", "4"), interface("eth1", "subflow")]);
        let (leaving, staying) = if first_leaves { (&web, &db) } else { (&db, &web) };
        world.released(leaving);
        let left = world.host.netns(web.netns.inode, |netns| netns.limits).unwrap();
        let needed = if first_leaves { (2, 4) } else { (6, 0) };
        assert!(left.subflows >= needed.0 && left.add_addr_accepted >= needed.1, "{left:?}");
        world.released(staying);
        world.assert_nothing_left(&pristine);
    }
}

#[test]
fn a_member_that_needs_less_leaves_last() {
    let world = World::upstream();
    let web = world.container("web");
    world.host.add_link(web.netns.inode, 4, "eth2", &["10.0.3.2"]);
    let db = world.member("db", &web);
    let pristine = world.host.state();
    world.applied(&web, &[limit("subflows", "4")]);
    world.applied(&db, &[interface("eth*", "subflow")]);
    world.released(&web);
    assert!(world.host.netns(web.netns.inode, |netns| netns.limits).unwrap().subflows >= 3);
    world.released(&db);
    world.assert_nothing_left(&pristine);
}

#[test]
fn a_member_that_overrides_leaves() {
    let retries = "net.ipv4.tcp_syn_retries";
    for (flags, other) in [("backup", "subflow"), ("backup", "off"), ("subflow", "signal"), ("signal", "backup")] {
        for first_leaves in [true, false] {
            let world = World::upstream();
            let web = world.container("web");
            let db = world.member("db", &web);
            let pristine = world.host.state();
            world.applied(&web, &[interface("eth1", flags), set(retries, "3")]);
            let webs = world.host.netns(web.netns.inode, |netns| netns.endpoints[0].flags);
            let asked = [interface("eth1", other), set(retries, "4"), on_conflict(OnConflict::Override)];
            world.applied(&db, &asked);
            assert_eq!(world.host.netns_value(web.netns.inode, retries), "4");
            let (leaving, staying) = if first_leaves { (&web, &db) } else { (&db, &web) };
            world.released(leaving);
            if !first_leaves {
                let now: Vec<u32> =
                    world.host.netns(web.netns.inode, |netns| netns.endpoints.iter().map(|e| e.flags).collect());
                assert_eq!(now, [webs], "{flags} is what web still relies on, {other} has left");
                assert_eq!(world.host.netns_value(web.netns.inode, retries), "3");
            }
            world.released(staying);
            world.assert_nothing_left(&pristine);
        }
    }
}

#[test]
fn a_member_that_overrides_flags_on_mptcp_org_leaves() {
    for first_leaves in [true, false] {
        let world = World::mptcp_org();
        let web = world.container("web");
        let db = world.member("db", &web);
        let pristine = world.host.state();
        world.applied(&web, &[interface("eth1", "backup")]);
        world.applied(&db, &[interface("eth1", "off"), on_conflict(OnConflict::Override)]);
        let (leaving, staying, left) = if first_leaves { (&web, &db, 0x8_0000) } else { (&db, &web, 0x10_0000) };
        world.released(leaving);
        assert_eq!(world.link(&web, 3), left);
        world.released(staying);
        world.assert_nothing_left(&pristine);
    }
}

#[test]
fn what_a_dead_member_left_is_not_taken_for_somebody_elses() {
    let kinds: [fn() -> World; 2] = [World::upstream, World::mptcp_org];
    for (world, stale_first) in kinds.into_iter().flat_map(|world| [(world, true), (world, false)]) {
        let world = world();
        let pause = world.container("pause");
        let web = world.member("web", &pause);
        let db = world.member("db", &pause);
        let pristine = world.host.state();
        let asked = [interface("eth1", "backup"), set("net.ipv4.tcp_syn_retries", "3")];
        world.applied(&web, &asked);
        // No hook says so.
        web.die();
        world.applied(&db, &asked);
        if stale_first {
            world.release(&web, Cause::Stale).unwrap();
            assert_eq!(world.link(&pause, 3) == 0x10_0000, world.host.kind() == kernel::Kind::MptcpOrg);
        }
        world.released(&db);
        world.release(&web, Cause::Stale).unwrap();
        world.assert_nothing_left(&pristine);
    }
}

// Rule 1: nothing half done.

#[test]
fn dropped_bits_are_an_error_and_undone() {
    let world = World::new(FakeHost::that_drops_link_bits().with_fullmesh());
    let web = world.container("web");
    let error = world.fails(&web, &[set(SCHEDULER, "redundant"), interface("eth1", "backup")], 1);
    assert!(error.contains("eth1") && error.contains("read back"), "{error}");
    let error = world.fails(&web, &[interface("eth1", "0x81003")], 1);
    assert!(error.contains("eth1"), "{error}");
}

#[test]
fn handover_is_an_error_unless_it_reads_back() {
    let world = World::mptcp_org();
    let web = world.container("web");
    for asked in ["0x201003", "0x301003"] {
        let error = world.fails(&web, &[interface("eth0", "off"), interface("eth1", asked)], 1);
        assert!(error.contains("eth1") && error.contains("read back"), "{error}");
    }
    let world = World::new(FakeHost::open_mptcp_router().with_fullmesh());
    let web = world.container("web");
    let pristine = world.host.state();
    world.applied(&web, &[interface("eth1", "0x201003")]);
    assert_eq!(world.link(&web, 3), 0x20_0000);
    world.applied(&web, &[interface("eth1", "default")]);
    world.released(&web);
    world.assert_nothing_left(&pristine);
}

#[test]
fn a_name_that_the_kernel_does_not_know_is_an_error() {
    let world = World::mptcp_org();
    let web = world.container("web");
    let asked = [set(SCHEDULER, "nope"), set("net.core.netdev_max_backlog", "2000"), interface("eth1", "off")];
    let error = world.fails(&web, &asked, 1);
    assert!(error.contains("nope") && error.contains("mptcp_scheduler"), "{error}");
    let error = world.fails(&web, &[set("net.ipv4.tcp_congestion_control", "lia"), set(SCHEDULER, "redundant")], 1);
    assert!(error.contains("lia"), "{error}");
}

/// One apply in the middle of a life: what came before, and what is asked now.
struct Moment {
    name: &'static str,
    world: fn() -> World,
    /// What somebody else in the same namespace asked before.
    sibling: Vec<Asked>,
    /// What somebody in another namespace asked before.
    stranger: Vec<Asked>,
    /// What the container itself asked before.
    earlier: Vec<Asked>,
    asked: Vec<Asked>,
}

impl Moment {
    fn new(name: &'static str, world: fn() -> World, asked: Vec<Asked>) -> Self {
        Self { name, world, sibling: vec![], stranger: vec![], earlier: vec![], asked }
    }
}

fn moments() -> Vec<Moment> {
    let retries = "net.ipv4.tcp_syn_retries";
    let all_org = || {
        vec![
            interface("eth0", "off"),
            interface("eth1", "backup"),
            set(SCHEDULER, "redundant"),
            set(ENABLED, "5"),
            set(SUBFLOWS, "2"),
            set(retries, "3"),
        ]
    };
    let all_up = || {
        vec![
            interface("eth0", "fullmesh"),
            interface("eth1", "backup"),
            set("net.core.rmem_max", "4194304"),
            set("stale_loss_cnt", "3"),
            set(retries, "3"),
            limit("subflows", "4"),
        ]
    };
    let overriding = |mut asked: Vec<Asked>| {
        asked.push(on_conflict(OnConflict::Override));
        asked
    };
    let other_org = || {
        vec![
            interface("eth0", "backup"),
            interface("eth1", "off"),
            set(SCHEDULER, "blest"),
            set(ENABLED, "9"),
            set(SUBFLOWS, "3"),
            set(retries, "4"),
        ]
    };
    let other_up = || {
        vec![
            interface("eth0", "signal"),
            interface("eth1", "subflow"),
            set("net.core.rmem_max", "8388608"),
            set("stale_loss_cnt", "2"),
            set(retries, "4"),
            limit("subflows", "6"),
        ]
    };
    vec![
        Moment::new("first, mptcp.org", World::mptcp_org, all_org()),
        Moment::new("first, upstream", World::upstream, all_up()),
        Moment { earlier: all_org(), ..Moment::new("again, mptcp.org", World::mptcp_org, other_org()) },
        Moment { earlier: all_up(), ..Moment::new("again, upstream", World::upstream, other_up()) },
        Moment { stranger: all_org(), ..Moment::new("override, mptcp.org", World::mptcp_org, overriding(other_org())) },
        Moment { stranger: all_up(), ..Moment::new("override, upstream", World::upstream, overriding(other_up())) },
        Moment { stranger: all_org(), ..Moment::new("share, mptcp.org", World::mptcp_org, all_org()) },
        Moment { sibling: all_org(), ..Moment::new("beside, mptcp.org", World::mptcp_org, overriding(other_org())) },
        Moment { sibling: all_up(), ..Moment::new("beside, upstream", World::upstream, overriding(other_up())) },
    ]
}

/// A moment that has come.
struct Scene {
    world: World,
    pristine: State,
    stranger: Container,
    sibling: Container,
    web: Container,
}

impl Moment {
    fn come(&self) -> Box<Scene> {
        let world = (self.world)();
        let stranger = world.container("stranger");
        let sibling = world.container("sibling");
        let web = world.member("web", &sibling);
        let pristine = world.host.state();
        for (container, asked) in [(&stranger, &self.stranger), (&sibling, &self.sibling), (&web, &self.earlier)] {
            if !asked.is_empty() {
                world.applied(container, asked);
            }
        }
        Box::new(Scene { world, pristine, stranger, sibling, web })
    }

    /// The changes of the apply, and what is in force after it.
    fn goes_well(&self) -> (usize, State) {
        let Scene { world, web, stranger, sibling, .. } = &*self.come();
        let before = world.host.changes().len();
        world.applied(web, &self.asked);
        let count = world.host.changes().len() - before;
        (count, by_role(world, stranger, sibling))
    }

    /// The changes of the release after it.
    fn is_released_well(&self) -> Result<usize> {
        let scene = self.come();
        let Scene { world, web, .. } = &*scene;
        world.applied(web, &self.asked);
        let before = world.host.changes().len();
        world.release(web, Cause::Person)?;
        let count = world.host.changes().len() - before;
        scene.all_leave().map(|()| count)
    }
}

/// The machine's state with the containers' namespaces under numbers that are the same in every run, and without the
/// kernel's ids of endpoints.
fn by_role(world: &World, stranger: &Container, sibling: &Container) -> State {
    let mut state = world.host.state();
    for (number, container) in [(1, stranger), (2, sibling)] {
        let mut netns = state.namespaces.remove(&container.netns.inode).unwrap();
        netns.endpoints.iter_mut().for_each(|endpoint| endpoint.id = 0);
        netns.endpoints.sort_by_key(|endpoint| endpoint.address);
        state.namespaces.insert(number, netns);
    }
    state
}

impl Scene {
    /// Everybody leaves; nothing of anybody must be left.
    fn all_leave(&self) -> Result<()> {
        for container in [&self.web, &self.sibling, &self.stranger] {
            self.world.release(container, Cause::Person)?;
        }
        same_state(&self.world.host.state(), &self.pristine).context("when all have left")?;
        ensure!(self.world.files().is_empty(), "left in the ledger: {:?}", self.world.files());
        Ok(())
    }
}

/// What differs, in few words.
fn same_state(now: &State, wanted: &State) -> Result<()> {
    for (key, value) in &wanted.settings {
        ensure!(now.settings.get(key) == Some(value), "{key} is {:?} instead of {value}", now.settings.get(key));
    }
    for (inode, netns) in &wanted.namespaces {
        let now = now.namespaces.get(inode).context("a namespace is gone")?;
        let flags = |netns: &Netns| -> Vec<_> { netns.links.iter().map(|l| (l.name.clone(), l.flags)).collect() };
        ensure!(flags(now) == flags(netns), "flags {:x?} instead of {:x?}", flags(now), flags(netns));
        ensure!(now.limits == netns.limits, "{:?} instead of {:?}", now.limits, netns.limits);
        ensure!(now.endpoints == netns.endpoints, "{:?} instead of {:?}", now.endpoints, netns.endpoints);
        for (key, value) in &netns.sysctls {
            ensure!(now.sysctls.get(key) == Some(value), "{key} is {:?} instead of {value}", now.sysctls.get(key));
        }
    }
    ensure!(now == wanted, "{now:?} instead of {wanted:?}");
    Ok(())
}

/// Several cases of one rule: all of them are tried before the test fails.
#[derive(Default)]
struct Cases(Vec<String>);

impl Cases {
    fn case(&mut self, name: &str, outcome: Result<()>) {
        if let Err(error) = outcome {
            self.0.push(format!("{name}: {error:#}"));
        }
    }

    fn all_right(self) {
        assert!(self.0.is_empty(), "{} cases:\n{}", self.0.len(), self.0.join("\n"));
    }
}

#[test]
fn whatever_step_fails_everything_is_as_before() {
    let mut cases = Cases::default();
    for moment in moments() {
        let (count, _) = moment.goes_well();
        for (number, silently) in (1..=count).flat_map(|number| [(number, false), (number, true)]) {
            let name = format!("{}, change {number} of {count}, silently: {silently}", moment.name);
            let Scene { ref world, ref web, .. } = *moment.come();
            let before = (world.host.state(), world.files());
            world.host.fault(number, if silently { Fault::Ignored } else { Fault::Refused });
            let error = world.apply(web, &moment.asked).map(|_| ()).expect_err(&name);
            assert!(!world.host.forget_faults(), "{name}: it did not come to that");
            assert_eq!(exit_status(&error), 1, "{name}");
            let as_before = || {
                let text = format!("{error:#}");
                ensure!(text.contains("nothing was changed"), "{text}");
                same_state(&world.host.state(), &before.0)?;
                ensure!(world.files() == before.1, "ledger {:#?} instead of {:#?}", world.files(), before.1);
                Ok(())
            };
            cases.case(&name, as_before());
        }
    }
    cases.all_right();
}

#[test]
fn whatever_step_of_a_release_fails_the_next_one_finishes_it() {
    let mut cases = Cases::default();
    for moment in moments() {
        let count = match moment.is_released_well() {
            Ok(count) => count,
            Err(error) => {
                cases.case(moment.name, Err(error));
                continue;
            }
        };
        for number in 1..=count {
            let name = format!("{}, change {number} of {count}", moment.name);
            let scene = moment.come();
            scene.world.applied(&scene.web, &moment.asked);
            scene.world.host.fault(number, Fault::Refused);
            assert!(scene.world.release(&scene.web, Cause::Person).is_err(), "{name}");
            cases.case(&name, scene.all_leave());
        }
    }
    cases.all_right();
}

// Rule 7: interrupted work.

/// Where a hook is killed.
#[derive(Clone, Copy, Debug)]
enum When {
    Before(usize),
    After(usize),
    ReadingBack,
}

impl When {
    fn all(count: usize) -> Vec<Self> {
        let each = (1..=count).flat_map(|number| [Self::Before(number), Self::After(number)]);
        each.chain([Self::ReadingBack]).collect()
    }

    fn arrange(self, host: &FakeHost) {
        match self {
            Self::Before(number) => host.fault(number, Fault::KilledBefore),
            Self::After(number) => host.fault(number, Fault::KilledAfter),
            Self::ReadingBack => host.kill_at_confirm(),
        }
    }
}

/// Every moment and every point at which its apply can be killed; `then` gets what is in force if it is not.
fn interrupted(then: impl Fn(&Moment, &Scene, &State) -> Result<()>) {
    let mut cases = Cases::default();
    for moment in &moments() {
        let (count, well) = moment.goes_well();
        for when in When::all(count) {
            let name = format!("{}, killed {when:?} of {count}", moment.name);
            let scene = moment.come();
            when.arrange(&scene.world.host);
            let killed = scene.world.killed(|world| {
                world.applied(&scene.web, &moment.asked);
            });
            assert!(killed, "{name}");
            let record = scene.world.ledger().record(&scene.web.id.key()).unwrap().expect("a record");
            assert!(record.at_work.is_some(), "{name}: status can say `interrupted`");
            cases.case(&name, then(moment, &scene, &well));
        }
    }
    cases.all_right();
}

#[test]
fn the_next_apply_finishes_what_was_interrupted() {
    interrupted(|moment, scene, well| {
        match scene.world.apply(&scene.web, &moment.asked)? {
            Done::Applied(record, _) => ensure!(record.at_work.is_none(), "still at work"),
            _ => bail!("nothing was done"),
        }
        same_state(&by_role(&scene.world, &scene.stranger, &scene.sibling), well).context("after the next apply")?;
        scene.all_leave()
    });
}

#[test]
fn the_next_release_undoes_what_was_interrupted() {
    interrupted(|_, scene, _| scene.all_leave());
}

#[test]
fn a_killed_release_is_finished_by_the_next_one() {
    let mut cases = Cases::default();
    for moment in moments() {
        let count = match moment.is_released_well() {
            Ok(count) => count,
            Err(error) => {
                cases.case(moment.name, Err(error));
                continue;
            }
        };
        for when in When::all(count) {
            let name = format!("{}, release killed {when:?} of {count}", moment.name);
            let scene = moment.come();
            scene.world.applied(&scene.web, &moment.asked);
            when.arrange(&scene.world.host);
            let killed = scene.world.killed(|world| {
                world.released(&scene.web);
            });
            assert!(killed, "{name}");
            cases.case(&name, scene.all_leave());
        }
    }
    cases.all_right();
}

#[test]
fn somebody_else_takes_over_after_an_interrupted_write() {
    for when in [When::Before(1), When::After(1), When::ReadingBack] {
        let world = World::mptcp_org();
        let (web, db) = (world.container("web"), world.container("db"));
        let pristine = world.host.state();
        when.arrange(&world.host);
        assert!(world.killed(|world| {
            world.applied(&web, &[set(SCHEDULER, "redundant")]);
        }));
        assert_eq!(world.page(SCHEDULER).unwrap().intent.unwrap().original, "default", "{when:?}");
        web.die();
        world.applied(&db, &[set(SCHEDULER, "blest")]);
        assert_eq!(world.page(SCHEDULER).unwrap().original, "default", "{when:?}");
        assert_eq!(world.page(SCHEDULER).unwrap().intent, None);
        world.released(&db);
        assert_eq!(world.value(SCHEDULER), "default", "{when:?}");
        world.release(&web, Cause::Stale).unwrap();
        world.assert_nothing_left(&pristine);
    }
}

#[test]
fn a_third_value_after_an_interrupted_write_is_left_alone() {
    for when in [When::Before(1), When::After(1)] {
        let world = World::mptcp_org();
        let web = world.container("web");
        when.arrange(&world.host);
        assert!(world.killed(|world| {
            world.applied(&web, &[set(SCHEDULER, "redundant")]);
        }));
        world.host.set(HOME, SCHEDULER, "ecf");
        world.released(&web);
        assert_eq!(world.value(SCHEDULER), "ecf", "{when:?}");
        assert_eq!(world.files(), BTreeMap::new());
    }
}

#[test]
fn a_failure_after_an_interrupted_write_forgets_nothing() {
    let world = World::mptcp_org();
    let (web, db) = (world.container("web"), world.container("db"));
    let pristine = world.host.state();
    When::After(1).arrange(&world.host);
    assert!(world.killed(|world| {
        world.applied(&web, &[set(SCHEDULER, "redundant")]);
    }));
    world.host.fault(1, Fault::Refused);
    assert!(world.apply(&db, &[set(SCHEDULER, "blest"), on_conflict(OnConflict::Override)]).is_err());
    world.host.forget_faults();
    world.released(&web);
    world.assert_nothing_left(&pristine);
}

#[test]
fn a_failure_does_not_make_somebodys_change_ours() {
    let world = World::mptcp_org();
    let (web, db) = (world.container("web"), world.container("db"));
    world.applied(&web, &[set(SCHEDULER, "redundant")]);
    world.host.set(HOME, SCHEDULER, "ecf");
    world.host.fault(2, Fault::Refused);
    let asked = [set(SCHEDULER, "blest"), interface("eth1", "backup"), on_conflict(OnConflict::Override)];
    world.fails(&db, &asked, 1);
    world.released(&web);
    assert_eq!(world.value(SCHEDULER), "ecf", "somebody else's later change stays");
}

#[test]
fn undoing_leaves_an_endpoint_that_somebody_else_was_faster_with() {
    let world = World::upstream();
    let web = world.container("web");
    let inode = web.netns.inode;
    let theirs = Endpoint { id: 77, address: "10.0.2.2".parse().unwrap(), port: None, ifindex: 3, flags: 1 };
    let faster = theirs.clone();
    world.host.fault(1, Fault::After(Box::new(move |host| host.netns(inode, |netns| netns.endpoints.push(faster)))));
    assert!(world.apply(&web, &[interface("eth1", "backup")]).is_err());
    assert_eq!(world.host.netns(inode, |netns| netns.endpoints.clone()), [theirs]);
    assert_eq!(world.files(), BTreeMap::new());
}

#[test]
fn a_ledger_that_cannot_be_written_changes_nothing() {
    let world = World::mptcp_org();
    let (web, db) = (world.container("web"), world.container("db"));
    world.applied(&web, &[set(SCHEDULER, "redundant")]);
    // Nobody can append to a directory.
    let conflicts = world.state_dir.path().join("conflicts");
    if conflicts.exists() {
        fs::remove_file(&conflicts).unwrap();
    }
    fs::create_dir(&conflicts).unwrap();
    let asked = [set(SCHEDULER, "blest"), interface("eth1", "backup"), on_conflict(OnConflict::Override)];
    world.fails(&db, &asked, 1);
}

#[test]
fn limits_that_somebody_changed_since_are_theirs() {
    let world = World::upstream();
    let web = world.container("web");
    world.applied(&web, &[limit("subflows", "5")]);
    let theirs = Limits { subflows: 7, add_addr_accepted: 3 };
    world.host.netns(web.netns.inode, |netns| netns.limits = Some(theirs));
    world.released(&web);
    assert_eq!(world.host.netns(web.netns.inode, |netns| netns.limits), Some(theirs));
}

#[test]
fn the_agent_stops_in_the_middle_when_the_container_ends() {
    let world = World::upstream();
    let web = world.container("web");
    let inode = web.netns.inode;
    for last in 3..8 {
        world.host.add_address(inode, 3, &format!("10.0.2.{last}"));
    }
    world.applied(&web, &[interface("eth1", "backup")]);
    // All addresses go, and with the second endpoint the container.
    world.host.netns(inode, |netns| netns.addresses.retain(|address| address.ifindex != 3));
    let pid = web.process.borrow().id();
    let end = move |_: &FakeHost| {
        let start_time = Process::read(pid).unwrap().start_time;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
        while Process::lives(pid, start_time) {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    world.host.fault(2, Fault::After(Box::new(end)));
    let done = world.host.changes().len();
    assert!(matches!(world.follow(&web).unwrap(), Followed::Gone));
    let changes = world.host.changes().split_off(done);
    assert_eq!(changes.len(), 2, "nothing more, and nothing is undone: {changes:?}");
    // The rest goes with the namespace, and the record with the release.
    world.host.remove_netns(inode);
    assert!(matches!(world.release(&web, Cause::Stale).unwrap(), release::Done::Released(..)));
    assert_eq!(world.files(), BTreeMap::new());
}
