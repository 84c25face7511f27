//! A hook that is killed at every system call, at its entry and at its exit: whatever it leaves behind can be read, is
//! said, and the next apply or release brings everything to where it would be without the kill.
//!
//! Each scenario runs once unkilled under a tracer, which counts, and then once per stop. What must come out of a kill
//! is not written down here: it is what the same calls give when nobody is killed.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::tracer::{Ended, Launcher};
use common::*;
use mptcp_hook::deadline::Deadline;
use mptcp_hook::kernel::netlink::mptcp_pm::PathManager;
use mptcp_hook::kernel::netlink::route::Route;
use mptcp_hook::kernel::netlink::routing::{Entry, PROTOCOL};
use mptcp_hook::kernel::{Rule, TableRoute};
use mptcp_hook::ledger::record::{Conflict, Failure, Interface, OwnedLimits, Record};
use mptcp_hook::ledger::setting::{Claim, Intent};
use nix::sched::{CloneFlags, setns};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Values of the machine that exist in the initial network namespace alone, one for each worker.
const KEYS: [&str; 4] =
    ["net.core.netdev_max_backlog", "net.core.netdev_budget", "net.core.message_burst", "net.core.message_cost"];

/// A setting of the container's namespace that nothing in the tests depends on.
const OWN_KEY: &str = "net.mptcp.stale_loss_cnt";

/// The containers: the one whose hook is killed, and another.
const WEB: usize = 0;
const DB: usize = 1;

/// For all that the test itself asks the kernel.
const PATIENCE: Duration = Duration::from_secs(3600);

// --- scenarios ------------------------------------------------------------------------------------------------------

/// One thing that happens to a container.
#[derive(Clone, Copy)]
enum Call {
    /// createRuntime, with these arguments; `{1}` and `{2}` are two values for the worker's host-wide setting. A
    /// container that is not running is started first.
    Apply(usize, &'static [&'static str]),
    /// `release ID`, by hand.
    Release(usize),
    /// The container's process ends, and poststop runs.
    Stop(usize),
    /// The container's process ends, and nobody is told.
    Die(usize),
    /// The container's eth1 gets another address instead of the one that it has.
    Readdress(usize),
}

/// A history, the call that is killed, and what may come next.
struct Scenario {
    name: &'static str,
    before: &'static [Call],
    killed: Call,
    /// What settles it: after a kill at an entry the first, at an exit the second. The kernel does nothing between
    /// the exit from one call and the entry to the next, so that each gets to see every state.
    settle: [Call; 2],
}

const EVERYTHING: &[&str] = &[
    "--interface",
    "eth1=backup",
    "--limit",
    "subflows=4",
    "--sysctl",
    "net.mptcp.stale_loss_cnt=3",
    "--sysctl",
    "{1}",
];
// What else EVERYTHING asks for goes back.
const LESS: &[&str] = &["--interface", "eth1=backup"];
const FIRST_VALUE: &[&str] = &["--sysctl", "{1}"];
const REFUSED: &[&str] = &["--sysctl", "{2}"];
const WARNED: &[&str] = &["--sysctl", "{2}", "--on-conflict", "warn"];
const OVERRIDING: &[&str] = &["--sysctl", "{2}", "--on-conflict", "override"];
const OVERRIDING_AND_MORE: &[&str] = &["--sysctl", "{2}", "--on-conflict", "override", "--interface", "eth1=backup"];
// An agent would do it instead of the hook, and not always at the same moment.
const ROUTES: &[&str] =
    &["--interface", "eth1=backup", "--interface", "eth2=subflow", "--routes", "auto", "--follow", "never"];
const ONE_ROUTE: &[&str] = &["--interface", "eth1=backup", "--routes", "auto", "--follow", "never"];
const ANOTHER_GATEWAY: &[&str] =
    &["--interface", "eth1=backup,gateway=10.0.1.7", "--routes", "auto", "--follow", "never"];
const INTERFACES: &[&str] = &["--interface", "eth*=subflow", "--interface", "eth1=backup"];

#[test]
fn a_first_apply() {
    Scenario {
        name: "first apply",
        before: &[],
        killed: Call::Apply(WEB, EVERYTHING),
        settle: [Call::Apply(WEB, EVERYTHING), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn a_release() {
    Scenario {
        name: "release",
        before: &[Call::Apply(WEB, EVERYTHING)],
        killed: Call::Release(WEB),
        settle: [Call::Apply(WEB, EVERYTHING), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn a_poststop() {
    Scenario {
        name: "poststop",
        before: &[Call::Apply(WEB, EVERYTHING)],
        killed: Call::Stop(WEB),
        settle: [Call::Apply(WEB, EVERYTHING), Call::Stop(WEB)],
    }
    .run();
}

#[test]
fn another_life_of_a_container_that_nobody_released() {
    Scenario {
        name: "another life",
        before: &[Call::Apply(WEB, EVERYTHING), Call::Die(WEB)],
        killed: Call::Apply(WEB, EVERYTHING),
        settle: [Call::Apply(WEB, EVERYTHING), Call::Release(WEB)],
    }
    .run();
}

/// What the last life changed and this one does not ask for goes back, whether the killed hook had come to that or not.
#[test]
fn another_life_that_asks_for_less() {
    Scenario {
        name: "another life that asks for less",
        before: &[Call::Apply(WEB, EVERYTHING), Call::Die(WEB)],
        killed: Call::Apply(WEB, LESS),
        settle: [Call::Apply(WEB, LESS), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn a_shared_claim() {
    Scenario {
        name: "shared claim",
        before: &[Call::Apply(DB, FIRST_VALUE)],
        killed: Call::Apply(WEB, FIRST_VALUE),
        settle: [Call::Apply(WEB, FIRST_VALUE), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn the_release_of_a_shared_claim() {
    Scenario {
        name: "release of a shared claim",
        before: &[Call::Apply(DB, FIRST_VALUE), Call::Apply(WEB, FIRST_VALUE)],
        killed: Call::Release(WEB),
        settle: [Call::Apply(WEB, FIRST_VALUE), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn a_refusal() {
    Scenario {
        name: "refuse",
        before: &[Call::Apply(DB, FIRST_VALUE)],
        killed: Call::Apply(WEB, REFUSED),
        settle: [Call::Apply(WEB, REFUSED), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn a_warning() {
    Scenario {
        name: "warn",
        before: &[Call::Apply(DB, FIRST_VALUE)],
        killed: Call::Apply(WEB, WARNED),
        settle: [Call::Apply(WEB, WARNED), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn an_override() {
    Scenario {
        name: "override",
        before: &[Call::Apply(DB, FIRST_VALUE)],
        killed: Call::Apply(WEB, OVERRIDING_AND_MORE),
        settle: [Call::Apply(WEB, OVERRIDING_AND_MORE), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn the_overrider_leaves() {
    Scenario {
        name: "overrider leaving",
        before: &[Call::Apply(DB, FIRST_VALUE), Call::Apply(WEB, OVERRIDING)],
        killed: Call::Release(WEB),
        settle: [Call::Apply(WEB, OVERRIDING), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn several_interfaces() {
    Scenario {
        name: "several interfaces",
        before: &[],
        killed: Call::Apply(WEB, INTERFACES),
        settle: [Call::Apply(WEB, INTERFACES), Call::Release(WEB)],
    }
    .run();
}

#[test]
fn routes_of_their_own() {
    Scenario {
        name: "routes, applied",
        before: &[],
        killed: Call::Apply(WEB, ROUTES),
        settle: [Call::Apply(WEB, ROUTES), Call::Release(WEB)],
    }
    .run();
    Scenario {
        name: "routes, released",
        before: &[Call::Apply(WEB, ROUTES)],
        killed: Call::Release(WEB),
        settle: [Call::Apply(WEB, ROUTES), Call::Stop(WEB)],
    }
    .run();
}

/// What was there before goes, whether the killed hook had come to that or not.
#[test]
fn another_address_and_gateway() {
    Scenario {
        name: "address and gateway replaced",
        before: &[Call::Apply(WEB, ONE_ROUTE), Call::Readdress(WEB)],
        killed: Call::Apply(WEB, ANOTHER_GATEWAY),
        settle: [Call::Apply(WEB, ANOTHER_GATEWAY), Call::Release(WEB)],
    }
    .run();
}

impl Scenario {
    /// Kills it everywhere. The stops are shared out among workers, each with a sandbox and a host-wide setting of its
    /// own: deleting an endpoint waits for the kernel far more than it computes.
    fn run(&self) {
        let begin = Instant::now();
        let (hit, counted): (Vec<usize>, BTreeSet<usize>) = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..KEYS.len()).map(|number| scope.spawn(move || self.work(number))).collect();
            workers.into_iter().map(|worker| worker.join().expect("a worker's test failed, see above")).unzip()
        });
        assert_eq!(counted.len(), 1, "{}: the workers count differently: {counted:?}", self.name);
        let counted = counted.into_iter().next().expect("a count");
        let hit: usize = hit.into_iter().sum();
        assert_eq!(hit, counted, "{}: not every kill point was hit", self.name);
        assert!(counted > 100, "{}: a hook makes more than {counted} / 2 system calls", self.name);
        // Not by println, which a test that passes shows to nobody.
        let line = format!("{}: {hit} of {counted} kill points hit in {:.1?}\n", self.name, begin.elapsed());
        std::io::stderr().write_all(line.as_bytes()).expect("saying how many there were");
    }

    /// One worker's share: how many kill points were hit, and how many there are for all workers.
    fn work(&self, number: usize) -> (usize, usize) {
        let value = HostValue::of_sysctl(&KEYS[number].replace('.', "/"));
        let sandbox = Sandbox::host_network();
        let mut world = World::new(&sandbox, &value, KEYS[number]);
        let references = [0, 1].map(|settle| {
            self.prepare(&mut world);
            world.call(self.killed);
            world.check("unkilled");
            let code = world.call(self.settle[settle]).code;
            let seen = world.seen();
            world.clean_up("unkilled");
            (code, seen)
        });
        self.prepare(&mut world);
        let count = world.traced(self.killed, None).stops;
        world.clean_up("counting");

        let mut hit = 0;
        let mut ready = None;
        let mut unchanged_before = false;
        for stop in (number..count).step_by(KEYS.len()) {
            let ready_image = match ready.take() {
                Some(image) => image,
                None => {
                    self.prepare(&mut world);
                    world.image()
                }
            };
            let traced = world.traced(self.killed, Some(stop));
            let Some(call) = traced.killed_at else { continue };
            hit += 1;
            if world.image() == ready_image {
                // Killed before it had done anything. Every byte is as it was, so the first such kill speaks for all.
                if std::mem::replace(&mut unchanged_before, true) {
                    ready = Some(ready_image);
                    continue;
                }
            }
            let side = ["entry", "exit"][stop % 2];
            let at = format!("{}: killed at stop {stop} of {count}, the {side} of system call {call}", self.name);
            world.check(&at);
            world.check_status(&at);
            if (hit / 2) % 3 == 0 {
                // After a repair as well as without one.
                world.repair(&at);
            }
            let settle = self.settle[stop % 2];
            let (code, expected) = &references[stop % 2];
            let code = match settle {
                // Usage: killed before it had written a record, or after it had removed it.
                Call::Release(guest) => Some(if world.knows(guest) { 0 } else { 2 }),
                _ => *code,
            };
            let ended = world.call(settle);
            assert_eq!(ended.code, code, "{at}: {ended:?}");
            let left = world.check(&at);
            assert!(left.intents.is_empty(), "{at}: {:?}", left.intents);
            let at_work = left.records.values().any(|record| record.at_work.is_some());
            assert!(!at_work, "{at}: a record is still at work: {:#?}", left.records);
            let mut seen = world.seen();
            if !matches!(settle, Call::Apply(..)) && seen.conflicts.is_subset(&expected.conflicts) {
                // Nobody asks any more; killed before it had written the conflict down, it had done nothing to anybody.
                seen.conflicts.clone_from(&expected.conflicts);
            }
            assert!(seen == *expected, "{at}: it is now\n{seen:#?}\nand without the kill it is\n{expected:#?}");
            world.clean_up(&at);
        }
        if ready.is_some() {
            world.clean_up("the last stop");
        }
        (hit, count)
    }

    fn prepare(&self, world: &mut World) {
        for guest in &mut world.guests {
            guest.start(&world.launcher);
        }
        for call in self.before {
            let ended = world.call(*call);
            assert_eq!(ended.code, Some(0), "{}: {ended:?}", self.name);
        }
    }
}

// --- the world ------------------------------------------------------------------------------------------------------

/// A host with two containers, and a ledger.
struct World<'a> {
    launcher: Launcher,
    guests: [Guest; 2],
    value: &'a HostValue,
    key: &'static str,
    state_dir: PathBuf,
    own_netns: File,
}

/// A container: a process in a network namespace that outlives it.
struct Guest {
    id: &'static str,
    bundle: PathBuf,
    netns: File,
    path_manager: PathManager,
    route: Route,
    process: Option<Child>,
    /// In the sandbox.
    pid: String,
    /// Its namespace before the hook did anything to it.
    pristine: InNamespace,
    /// Whether eth1 has its other address.
    is_moved: bool,
}

/// What is set in a container's namespace.
#[derive(Clone, Debug, PartialEq)]
struct InNamespace {
    endpoints: BTreeSet<(IpAddr, u32, u32)>,
    limits: (u32, u32),
    setting: String,
    /// By priority; those of one priority are about different addresses.
    rules: Vec<Rule>,
    /// Of IPv4; the kernel makes some of IPv6 by itself at any time.
    routes: Vec<Entry>,
}

/// What a ledger's record says, as far as it does not differ from life to life.
#[derive(Debug, PartialEq)]
struct InRecord {
    interfaces: Vec<Value>,
    limits: Option<OwnedLimits>,
    settings: Value,
}

/// Everything together, without pids, times and the numbers of endpoints.
#[derive(Debug, PartialEq)]
struct Seen {
    value: String,
    namespaces: Vec<InNamespace>,
    records: BTreeMap<String, InRecord>,
    /// Original and value of the host-wide setting.
    page: BTreeMap<String, (String, String)>,
    /// Container, value, overridden.
    claims: BTreeSet<(String, String, bool)>,
    conflicts: BTreeSet<String>,
}

/// Everything as it is, to be compared with itself.
#[derive(PartialEq)]
struct Image {
    files: BTreeMap<PathBuf, Option<Vec<u8>>>,
    value: String,
    namespaces: Vec<InNamespace>,
}

/// The ledger's files.
#[derive(Default)]
struct Files {
    records: BTreeMap<String, Record>,
    members: BTreeSet<String>,
    pages: BTreeMap<String, (String, String)>,
    claims: Vec<(String, Claim)>,
    intents: BTreeMap<String, Intent>,
    conflicts: Vec<Conflict>,
}

impl<'a> World<'a> {
    fn new(sandbox: &Sandbox, value: &'a HostValue, key: &'static str) -> Self {
        // All pids with as many digits: a record's length decides how often the hook asks for memory.
        sandbox.sh("echo 10000 >/proc/sys/kernel/ns_last_pid");
        let own_netns = File::open("/proc/thread-self/ns/net").expect("the test's own network namespace");
        let guests = ["web", "db"].map(|id| Guest::new(sandbox, id, &own_netns));
        let state_dir = sandbox.dir().join("state");
        Self { launcher: Launcher::new(sandbox), guests, value, key, state_dir, own_netns }
    }

    /// Runs one call to its end.
    fn call(&mut self, call: Call) -> Ended {
        match self.command(call) {
            Some(command) => self.launcher.run(command),
            None => Ended { code: Some(0), stdout: String::new(), stderr: String::new() },
        }
    }

    fn traced(&mut self, call: Call, kill_at: Option<usize>) -> tracer::Traced {
        let command = self.command(call).expect("a call that runs the hook");
        self.launcher.trace(command, kill_at)
    }

    /// The hook's command line for a call; what happens to the container itself happens now.
    fn command(&mut self, call: Call) -> Option<Command> {
        let mut command = Command::new(hook());
        command.arg("--state-dir").arg(&self.state_dir).env_clear().stdin(Stdio::null());
        match call {
            Call::Apply(guest, arguments) => {
                self.guests[guest].start(&self.launcher);
                command.arg("oci").args(arguments.iter().map(|argument| self.argument(argument)));
                command.stdin(self.guests[guest].state("created"));
            }
            Call::Release(guest) => {
                command.args(["release", self.guests[guest].id]);
            }
            Call::Stop(guest) => {
                self.guests[guest].end();
                command.arg("oci").stdin(self.guests[guest].state("stopped"));
            }
            Call::Die(guest) => {
                self.guests[guest].end();
                return None;
            }
            Call::Readdress(guest) => {
                self.guests[guest].readdress(&self.launcher, &self.own_netns);
                return None;
            }
        }
        Some(command)
    }

    fn argument(&self, text: &str) -> String {
        let original: u64 = self.value.original().parse().expect("a number");
        match text {
            "{1}" => format!("{}={}", self.key, original + 1),
            "{2}" => format!("{}={}", self.key, original + 2),
            other => other.to_owned(),
        }
    }

    /// Whether the ledger has a record of a container.
    fn knows(&self, guest: usize) -> bool {
        let records = Files::read(&self.state_dir).records;
        records.values().any(|record| record.instance.container.id == self.guests[guest].id)
    }

    /// Everything, byte by byte.
    fn image(&mut self) -> Image {
        let mut files = BTreeMap::new();
        let mut left = vec![self.state_dir.clone()];
        while let Some(path) = left.pop() {
            let contents = match fs::read_dir(&path) {
                Ok(entries) => {
                    left.extend(entries.map(|entry| entry.expect("an entry of the ledger").path()));
                    None
                }
                Err(_) => fs::read(&path).ok(),
            };
            files.insert(path, contents);
        }
        let guests = self.guests.iter_mut();
        let namespaces = guests.map(|guest| guest.in_namespace(&self.own_netns)).collect();
        Image { files, value: self.value.current(), namespaces }
    }

    /// What holds at any time, also right after a kill.
    #[track_caller]
    fn check(&mut self, at: &str) -> Files {
        let files = Files::read(&self.state_dir);
        let (original, value) = (self.value.original(), self.value.current());
        for (setting, page) in &files.pages {
            assert_eq!(page.0, original, "{at}: the original in the page of {setting}");
        }
        let known = !files.pages.is_empty() || !files.intents.is_empty();
        assert!(value == original || known, "{at}: {} is {value} and the ledger does not know why", self.key);
        for (owner, claim) in &files.claims {
            let record = files.records.get(owner);
            let record = record.unwrap_or_else(|| panic!("{at}: {owner} has a claim and no record"));
            assert_eq!(&claim.instance.container, &record.instance.container, "{at}");
        }
        for guest in &mut self.guests {
            let now = guest.in_namespace(&self.own_netns);
            let has_record = files.records.values().any(|record| record.instance.container.id == guest.id);
            assert!(now == guest.pristine || has_record, "{at}: {} has no record and is {now:#?}", guest.id);
        }
        files
    }

    /// `status` works and says what is interrupted.
    #[track_caller]
    fn check_status(&mut self, at: &str) {
        let mut command = Command::new(hook());
        command.arg("--state-dir").arg(&self.state_dir).args(["status", "--json"]).env_clear().stdin(Stdio::null());
        let ended = self.launcher.run(command);
        assert_eq!(ended.code, Some(0), "{at}: {ended:?}");
        let status: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{at}: {e} in {ended:?}"));
        assert_eq!(status["problems"], json!([]), "{at}");
        let list = |what: &str| status[what].as_array().unwrap_or_else(|| panic!("{at}: {what} is no list")).clone();
        let files = Files::read(&self.state_dir);
        assert_eq!(list("containers").len(), files.records.len(), "{at}: {status:#}");
        for record in files.records.values() {
            let id = &record.instance.container.id;
            let shown = list("containers").into_iter().find(|container| container["id"] == **id);
            let shown = shown.unwrap_or_else(|| panic!("{at}: {id} is not in {status:#}"));
            assert_eq!(shown["interrupted"], record.at_work.is_some(), "{at}: {status:#}");
            if record.at_work.is_none() {
                continue;
            }
            let interfaces = shown["interfaces"].as_array().expect("interfaces is a list");
            assert!(interfaces.iter().all(|interface| interface["state"] == "interrupted"), "{at}: {status:#}");
        }
        let interrupted = list("settings").iter().filter(|setting| setting["interrupted"] == true).count();
        assert_eq!(interrupted, files.intents.len(), "{at}: {status:#}");
    }

    /// `repair` mends the index, and leaves what apply or release has to finish.
    #[track_caller]
    fn repair(&mut self, at: &str) {
        let mut command = Command::new(hook());
        command.arg("--state-dir").arg(&self.state_dir).arg("repair").env_clear().stdin(Stdio::null());
        let ended = self.launcher.run(command);
        assert_eq!(ended.code, Some(0), "{at}, then repair: {ended:?}");
        let left = self.check(&format!("{at}, then repair"));
        assert!(left.intents.is_empty(), "{at}: repair left {:?}", left.intents);
    }

    /// Kernel and ledger together.
    fn seen(&mut self) -> Seen {
        let files = Files::read(&self.state_dir);
        let mut namespaces = Vec::new();
        for guest in &mut self.guests {
            namespaces.push(guest.in_namespace(&self.own_netns));
            let kernel = guest.path_manager.endpoints().expect("the endpoints");
            let records = files.records.values().filter(|record| record.instance.container.id == guest.id);
            for owned in records.flat_map(Record::endpoints) {
                let found = kernel.iter().any(|e| (e.address, e.id) == (owned.address, owned.id));
                assert!(found, "{}: the record has {owned:?} and the kernel {kernel:?}", guest.id);
            }
            let records = files.records.values().filter(|record| record.instance.container.id == guest.id);
            let owned = records.flat_map(|record| &record.interfaces).filter_map(|i| i.routing.as_ref());
            let (mut rules, mut routes) = (Vec::new(), Vec::new());
            for owned in owned {
                rules.extend(owned.rules.iter().cloned());
                routes.extend(owned.routes.iter().cloned());
            }
            let now = namespaces.last().expect("this namespace");
            let marked = now.rules.iter().filter(|rule| rule.protocol == PROTOCOL);
            assert_same(guest.id, marked.cloned().collect(), rules);
            let marked = now.routes.iter().flat_map(TableRoute::of).filter(|route| route.protocol == PROTOCOL);
            assert_same(guest.id, marked.collect(), routes);
        }
        let conflict =
            |c: &Conflict| format!("{} {} {} {} {:?} {:?}", c.container, c.key, c.wanted, c.kept, c.holders, c.outcome);
        assert_eq!(files.members, files.records.keys().cloned().collect(), "members of namespaces and records");
        Seen {
            value: self.value.current(),
            namespaces,
            records: files.records.iter().map(|(key, record)| (key.clone(), InRecord::of(record))).collect(),
            page: files.pages,
            claims: files.claims.into_iter().map(|(owner, claim)| (owner, claim.value, claim.overridden)).collect(),
            conflicts: files.conflicts.iter().map(conflict).collect(),
        }
    }

    /// Everybody leaves: nothing may be left. The next run begins with an empty ledger.
    #[track_caller]
    fn clean_up(&mut self, at: &str) {
        for guest in [WEB, DB] {
            if self.knows(guest) {
                let ended = self.call(Call::Release(guest));
                assert_eq!(ended.code, Some(0), "{at}: {ended:?}");
            }
        }
        let files = Files::read(&self.state_dir);
        assert!(files.records.is_empty() && files.members.is_empty(), "{at}: {:#?}", files.records);
        assert!(
            files.pages.is_empty() && files.claims.is_empty() && files.intents.is_empty(),
            "{at}: {:?}",
            files.pages
        );
        assert_eq!(self.value.current(), self.value.original(), "{at}: {}", self.key);
        for guest in &mut self.guests {
            assert_eq!(guest.in_namespace(&self.own_netns), guest.pristine, "{at}: {}", guest.id);
            if guest.is_moved {
                guest.readdress(&self.launcher, &self.own_netns);
            }
        }
        if self.state_dir.exists() {
            fs::remove_dir_all(&self.state_dir).expect("removing the ledger");
        }
    }
}

impl Guest {
    fn new(sandbox: &Sandbox, id: &'static str, own_netns: &File) -> Self {
        let name = Netns::named(id);
        sandbox.sh(&format!("ip netns add {id}"));
        sandbox.sh_in(
            &name,
            "ip link set lo up
            echo 1 >/proc/sys/net/ipv4/conf/all/promote_secondaries
            for n in 0 1 2; do
                ip link add eth$n type veth peer name peer$n
                ip address add 10.0.$n.2/24 dev eth$n
                ip link set peer$n up
                ip link set eth$n up
                ip route add default via 10.0.$n.1 metric 10$n
            done",
        );
        let bundle = sandbox.dir().join(id);
        fs::create_dir(&bundle).expect("the bundle's directory");
        let config = json!({ "linux": { "namespaces": [{ "type": "network", "path": name.path() }] } });
        fs::write(bundle.join("config.json"), config.to_string()).expect("writing config.json");
        let netns = File::open(sandbox.netns_path(&name)).expect("a container's network namespace");
        let path_manager = inside(&netns, own_netns, || PathManager::open(Deadline::after(PATIENCE)));
        let path_manager = path_manager.expect("asking for mptcp_pm").expect("a kernel with mptcp_pm");
        let route = inside(&netns, own_netns, || Route::open(Deadline::after(PATIENCE))).expect("rtnetlink");
        let pristine = InNamespace {
            endpoints: BTreeSet::new(),
            limits: (0, 0),
            setting: String::new(),
            rules: Vec::new(),
            routes: Vec::new(),
        };
        let (process, pid, is_moved) = (None, String::new(), false);
        let mut guest = Self { id, bundle, netns, path_manager, route, process, pid, pristine, is_moved };
        guest.pristine = guest.in_namespace(own_netns);
        assert_eq!(guest.pristine.endpoints, BTreeSet::new());
        guest
    }

    /// Starts its process if there is none.
    fn start(&mut self, launcher: &Launcher) {
        if self.process.is_some() {
            return;
        }
        let mut command = Command::new("sleep");
        command.arg("1000").stdin(Stdio::null()).stdout(Stdio::null());
        let process = launcher.spawn(command, Some(&self.netns), false);
        let status = fs::read_to_string(format!("/proc/{}/status", process.id())).expect("a process's status");
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("its pids");
        self.pid = pids.split_whitespace().last().expect("its pid in the sandbox").to_owned();
        self.process = Some(process);
    }

    /// Gives eth1 10.0.1.3 instead of 10.0.1.2, or that again.
    fn readdress(&mut self, launcher: &Launcher, own_netns: &File) {
        let (new, old) = if self.is_moved { (2, 3) } else { (3, 2) };
        let mut command = Command::new("sh");
        command.args(["-ec", "ip address add 10.0.1.$1/24 dev eth1; ip address del 10.0.1.$2/24 dev eth1", "sh"]);
        command.args([new, old].map(|number| number.to_string()));
        let ended = launcher.spawn(command, Some(&self.netns), false).wait().expect("giving eth1 another address");
        assert!(ended.success(), "{ended:?}");
        self.is_moved = !self.is_moved;
        let mut routes = self.in_namespace(own_netns).routes;
        routes.retain(|route| route.protocol != PROTOCOL);
        self.pristine.routes = routes;
    }

    /// Ends its process.
    fn end(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().and_then(|()| process.wait()).expect("ending a container's process");
        }
    }

    /// The state of the OCI runtime specification, as a hook's input.
    fn state(&self, status: &str) -> Stdio {
        let mut state = json!({ "ociVersion": "1.0.2", "id": self.id, "status": status, "bundle": self.bundle });
        if status != "stopped" {
            state["pid"] = json!(self.pid.parse::<u32>().expect("a pid"));
        }
        let mut file = tempfile::tempfile().expect("a file for the state");
        file.write_all(state.to_string().as_bytes()).and_then(|()| file.rewind()).expect("writing the state");
        file.into()
    }

    fn in_namespace(&mut self, own_netns: &File) -> InNamespace {
        let endpoints = self.path_manager.endpoints().expect("the endpoints");
        let limits = self.path_manager.limits().expect("the limits");
        let path = format!("/proc/sys/{}", OWN_KEY.replace('.', "/"));
        let setting = inside(&self.netns, own_netns, || fs::read_to_string(path)).expect("a setting of the namespace");
        let routes = self.route.entries().expect("the routes");
        let rules = self.route.rules().expect("the rules").into_iter();
        let mut rules: Vec<Rule> = rules.filter_map(|(_, rule)| rule).collect();
        rules.sort_by_key(|rule| (rule.is_v4, rule.priority, rule.from, rule.oif.clone()));
        InNamespace {
            endpoints: endpoints.iter().map(|e| (e.address, e.flags, e.ifindex)).collect(),
            limits: (limits.subflows, limits.add_addr_accepted),
            setting: setting.trim().to_owned(),
            rules,
            routes: routes.into_iter().filter(|route| route.destination.is_ipv4()).collect(),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// What is marked as ours in the kernel is what the record has.
#[track_caller]
fn assert_same<T: std::fmt::Debug>(id: &str, kernel: Vec<T>, record: Vec<T>) {
    let sorted = |all: Vec<T>| all.iter().map(|one| format!("{one:?}")).collect::<BTreeSet<_>>();
    assert_eq!(sorted(kernel), sorted(record), "{id}: the kernel and the record");
}

/// Does something in another network namespace, on this thread.
fn inside<T>(netns: &File, own: &File, what: impl FnOnce() -> T) -> T {
    setns(netns, CloneFlags::CLONE_NEWNET).expect("entering a container's network namespace");
    let done = what();
    setns(own, CloneFlags::CLONE_NEWNET).expect("coming back to the test's own network namespace");
    done
}

impl InRecord {
    fn of(record: &Record) -> Self {
        let interface = |interface: &Interface| {
            let endpoints: Vec<_> =
                interface.endpoints.iter().map(|e| (e.address, e.index, e.flags, e.original)).collect();
            let Interface { name, flags, state, reason, route, routing, .. } = interface;
            json!([name, flags, state, reason, route, routing, endpoints])
        };
        Self {
            interfaces: record.interfaces.iter().map(interface).collect(),
            limits: record.limits,
            settings: json!(record.settings),
        }
    }
}

impl Files {
    /// Reads all of them; one that cannot be read, or that does not belong there, is a panic.
    #[track_caller]
    fn read(directory: &Path) -> Self {
        let mut files = Self::default();
        let mut left = vec![directory.to_owned()];
        while let Some(parent) = left.pop() {
            for entry in fs::read_dir(&parent).into_iter().flatten() {
                let entry = entry.expect("an entry of the ledger");
                let name = entry.file_name().into_string().expect("a name in the ledger");
                if entry.file_type().expect("the type of a ledger's file").is_dir() {
                    left.push(entry.path());
                } else if !name.starts_with(".tmp-") {
                    files.enter(directory, &entry.path(), name);
                }
            }
        }
        files
    }

    #[track_caller]
    fn enter(&mut self, directory: &Path, path: &Path, name: String) {
        let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("reading {}: {e}", path.display()));
        let place: Vec<&str> = path
            .strip_prefix(directory)
            .expect("a path below")
            .iter()
            .map(|part| part.to_str().expect("UTF-8"))
            .collect();
        match place[..] {
            ["containers", _] => drop(self.records.insert(name, parsed(path, &text))),
            ["namespaces", _, _] => assert!(text.is_empty() && self.members.insert(name), "{}", path.display()),
            ["settings", setting, "value"] => {
                let value: Value = parsed(path, &text);
                let field =
                    |field: &str| value[field].as_str().unwrap_or_else(|| panic!("no {field}: {text}")).to_owned();
                self.pages.insert(setting.to_owned(), (field("original"), field("value")));
            }
            ["settings", _, "claims", _] => self.claims.push((name, parsed(path, &text))),
            ["settings", setting, "intent"] => drop(self.intents.insert(setting.to_owned(), parsed(path, &text))),
            ["conflicts"] => self.conflicts = text.lines().map(|line| parsed(path, line)).collect(),
            ["failures"] => text.lines().for_each(|line| drop(parsed::<Failure>(path, line))),
            ["locks", _] => {}
            _ => panic!("{} does not belong into a ledger", path.display()),
        }
    }
}

#[track_caller]
fn parsed<T: DeserializeOwned>(path: &Path, text: &str) -> T {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{} does not parse ({e}): {text:?}", path.display()))
}
