//! Hundreds of hooks at once on a few settings of the machine: what comes out is what some order, one after the other,
//! would have given, and nobody waits for a lock past the deadline.
//!
//! The ledger says in which order claims and conflicts were made. The test puts the hooks into such an order and runs
//! them through a model of the rules, which has to give every exit status, outcome and conflict that was seen.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::*;
use serde_json::{Value, json};

/// Containers, and thereby hooks at once.
const CONTAINERS: usize = 300;

/// Settings of the initial network namespace alone, which may be a little larger for a minute.
const KEYS: [&str; 5] = [
    "net.core.dev_weight",
    "net.core.message_burst",
    "net.core.message_cost",
    "net.core.netdev_budget",
    "net.core.netdev_budget_usecs",
];

/// How long all hooks of a phase may take. Two that wait for each other's locks give up at their deadline, which is an error
/// where none is expected.
const PHASE_LIMIT: Duration = LIMIT;

/// Where the hook keeps its ledger in a sandbox.
const STATE_DIR: &str = "/run/mptcp-hook";

/// What `--on-conflict` can be.
const MODES: [&str; 3] = ["refuse", "warn", "override"];

/// A wish of one container for one or two of [`KEYS`]; none are asked for twice.
#[derive(Clone, Debug)]
struct Wish {
    container: usize,
    values: BTreeMap<usize, String>,
    mode: &'static str,
}

/// A line of the history of conflicts, without the words.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Clash {
    wanted: String,
    kept: String,
    holders: BTreeSet<String>,
    outcome: String,
}

/// What became of a wish: all of it, by setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Answer {
    refused: bool,
    /// Empty if it was refused.
    outcomes: BTreeMap<usize, String>,
    clashes: BTreeMap<usize, Clash>,
}

// --- the model ------------------------------------------------------------------------------------------------------

/// A setting by the rules: its value, and who relies on it at which value, the oldest first. The dead are not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    original: String,
    value: String,
    claims: Vec<(usize, String)>,
}

impl Setting {
    /// Whether the value is one that only the dead had wanted.
    fn is_left_behind(&self) -> bool {
        self.value != self.rightful()
    }

    /// The present value if somebody relies on it, else that of the newest claim, else the original.
    fn rightful(&self) -> String {
        let is_held = self.claims.iter().any(|(_, value)| *value == self.value);
        let newest = self.claims.last().map_or(&self.original, |(_, value)| value);
        if is_held { self.value.clone() } else { newest.clone() }
    }

    /// Whether a wish needs nobody's leave.
    fn is_granted(&self, container: usize, wanted: &str) -> bool {
        let is_against = |claim: &(usize, String)| claim.0 != container && claim.1 != wanted;
        [&self.value, &self.rightful()].iter().any(|value| *value == wanted) || !self.claims.iter().any(is_against)
    }

    fn settle(&mut self) {
        self.value = self.rightful();
    }

    fn leave(&mut self, container: usize) {
        self.claims.retain(|(holder, _)| *holder != container);
    }
}

/// All settings, one after the other.
#[derive(Clone, Debug)]
struct Model {
    settings: Vec<Setting>,
    ids: Vec<String>,
}

impl Model {
    /// A container dies: it holds nothing any more, and its value stays until somebody looks.
    fn die(&mut self, container: usize) {
        self.settings.iter_mut().for_each(|setting| setting.leave(container));
    }

    /// Carries a wish out by the rules.
    fn apply(&mut self, wish: &Wish) -> Answer {
        let mut answer = Answer::default();
        for (&key, wanted) in &wish.values {
            let setting = &mut self.settings[key];
            if setting.value != *wanted {
                setting.settle();
            }
            let outcome = if setting.value == *wanted {
                "shared"
            } else {
                let others =
                    setting.claims.iter().filter(|(holder, value)| *holder != wish.container && value != wanted);
                let holders: BTreeSet<String> = others.map(|(holder, _)| self.ids[*holder].clone()).collect();
                if holders.is_empty() {
                    "applied"
                } else {
                    let (conflict, outcome) = match wish.mode {
                        "refuse" => ("refused", "refused"),
                        "warn" => ("warned", "kept"),
                        _ => ("overrode", "overrode"),
                    };
                    let (wanted, kept) = (wanted.clone(), setting.value.clone());
                    answer.clashes.insert(key, Clash { wanted, kept, holders, outcome: conflict.into() });
                    outcome
                }
            };
            answer.refused |= outcome == "refused";
            answer.outcomes.insert(key, outcome.into());
        }
        if answer.refused {
            answer.outcomes.clear();
        }
        for (key, outcome) in &answer.outcomes {
            let setting = &mut self.settings[*key];
            setting.leave(wish.container);
            if outcome == "kept" {
                setting.settle();
            } else {
                setting.value = wish.values[key].clone();
                setting.claims.push((wish.container, setting.value.clone()));
            }
        }
        answer
    }
}

/// What is known of one wish afterwards.
struct Seen {
    wish: Wish,
    answer: Answer,
    /// Wishes that were carried out before this one, as the ledger says.
    after: BTreeSet<usize>,
}

/// Looks for an order of all of `seen` that the model agrees with, and gives the model as it is then. Releases of
/// dead containers change something only where they are the first to look at what the dead left behind.
fn serial_order(model: Model, seen: &[Seen]) -> Result<Model, String> {
    let mut attempts = 20_000;
    search(model, seen, BTreeSet::new(), &mut attempts)
}

fn search(mut model: Model, seen: &[Seen], mut done: BTreeSet<usize>, attempts: &mut usize) -> Result<Model, String> {
    let mut problems;
    // Those that may come next and take the moment away into which one that was refused would fit.
    let mut harmful;
    loop {
        problems = Vec::new();
        harmful = Vec::new();
        let mut ready: Vec<usize> =
            (0..seen.len()).filter(|n| !done.contains(n) && seen[*n].after.is_subset(&done)).collect();
        // Those without a claim come first: they can only lose the moment that they fit into.
        ready.sort_by_key(|n| seen[*n].answer.outcomes.values().any(|outcome| outcome != "kept"));
        let next = ready.into_iter().find_map(|n| {
            let mut then = model.clone();
            let answer = then.apply(&seen[n].wish);
            if answer != seen[n].answer {
                problems.push(format!("{:?}\n  has got {:?}\n  and not {answer:?}", seen[n].wish, seen[n].answer));
                return None;
            }
            let mut waiting = (0..seen.len()).filter(|other| *other != n && !done.contains(other));
            if waiting.any(|other| seen[other].loses_its_moment(&model, &then)) {
                harmful.push((n, then));
                return None;
            }
            Some((n, then))
        });
        let Some((n, then)) = next else { break };
        model = then;
        done.insert(n);
    }
    if done.len() == seen.len() {
        return Ok(model);
    }
    let left = seen.len() - done.len();
    let mut error = format!("no order explains {left} of {}; next could be\n{}", seen.len(), problems.join("\n"));
    let after_a_release = (0..KEYS.len()).filter(|key| model.settings[*key].is_left_behind()).map(|key| {
        let mut released = model.clone();
        released.settings[key].settle();
        (released, done.clone())
    });
    let after_another = harmful.into_iter().map(|(n, then)| (then, done.iter().copied().chain([n]).collect()));
    for (model, done) in after_another.chain(after_a_release) {
        if *attempts == 0 {
            break;
        }
        *attempts -= 1;
        match search(model, seen, done, attempts) {
            Ok(model) => return Ok(model),
            Err(later) => error = later,
        }
    }
    Err(error)
}

impl Seen {
    /// Whether this was refused because of one setting while another would have been given, and that other one would
    /// have been given in the state `now` and not in the state `then`.
    fn loses_its_moment(&self, now: &Model, then: &Model) -> bool {
        self.answer.refused
            && self.wish.values.iter().filter(|(key, _)| !self.answer.clashes.contains_key(key)).any(|(key, value)| {
                let is_granted = |model: &Model| model.settings[*key].is_granted(self.wish.container, value);
                is_granted(now) && !is_granted(then)
            })
    }
}

#[test]
fn the_model_finds_an_order_only_where_there_is_one() {
    let setting = Setting { original: "1".into(), value: "1".into(), claims: Vec::new() };
    let model = Model { settings: vec![setting; KEYS.len()], ids: ["a", "b"].map(String::from).to_vec() };
    let wish = |container, value: &str| Wish { container, values: BTreeMap::from([(0, value.into())]), mode: "refuse" };
    let (first, second) = (wish(0, "2"), wish(1, "3"));
    let mut then = model.clone();
    let answers = [then.apply(&first), then.apply(&second)];
    assert_eq!(answers.clone().map(|answer| answer.refused), [false, true]);
    let seen = |answers: [Answer; 2]| {
        let [a, b] = answers;
        let seen = |wish: &Wish, answer| Seen { wish: wish.clone(), answer, after: BTreeSet::new() };
        // The refused one stands first: it has to be put behind the other.
        [seen(&second, b), seen(&first, a)]
    };
    let found = serial_order(model.clone(), &seen(answers.clone())).expect("an order");
    assert_eq!(found.settings, then.settings);
    // Both have their value at once, or neither.
    for wrong in [[answers[0].clone(), answers[0].clone()], [answers[1].clone(), answers[1].clone()]] {
        serial_order(model.clone(), &seen(wrong)).expect_err("no order");
    }
}

// --- the real ones --------------------------------------------------------------------------------------------------

/// A call of the hook.
struct Call {
    arguments: Vec<String>,
    stdin: String,
}

impl Call {
    fn of(arguments: &[&str]) -> Self {
        Self { arguments: arguments.iter().map(|a| (*a).to_owned()).collect(), stdin: String::new() }
    }
}

/// How a call ended.
struct Ended {
    outcome: Outcome,
    /// From the signal to start, which all are given at once, to its end.
    took: Duration,
}

/// A sandbox with processes in network namespaces of their own, and the machine's values.
struct Crowd {
    /// The processes' parent.
    _parent: Running,
    // Dropped before the values: nobody is left to write them when they are restored.
    sandbox: Sandbox,
    values: Vec<HostValue>,
    /// By the id in its name.
    pids: Vec<u32>,
    ids: Vec<String>,
}

impl Crowd {
    fn of(size: usize) -> Self {
        let values = KEYS.map(|key| HostValue::of_sysctl(&key.replace('.', "/"))).into();
        let sandbox = Sandbox::host_network();
        let script = r#"n=0
            while [ $n -lt "$1" ]; do
              unshare --net sh -c 'echo "$0 $$"; exec sleep 1000' $n &
              n=$((n + 1))
            done
            wait"#;
        let parent = sandbox.spawn(&["sh", "-ec", script, "sh", &size.to_string()]);
        let lines = wait_for("processes in namespaces", LIMIT, || {
            let out = parent.stdout();
            (out.ends_with('\n') && out.lines().count() == size).then_some(out)
        });
        let mut pids = vec![0; size];
        for line in lines.lines() {
            let (number, pid) = line.split_once(' ').expect("a number and a pid");
            pids[number.parse::<usize>().expect("a number")] = pid.parse().expect("a pid");
        }
        // All of one length: none is the beginning of another.
        let ids = (0..size).map(|n| sandbox.name(&format!("c{n:03}"))).collect();
        Self { sandbox, values, pids, ids, _parent: parent }
    }

    /// One of the two values of a setting that are asked for.
    fn value(&self, key: usize, choice: u64) -> String {
        let original: u64 = self.values[key].original().parse().expect("a number");
        (original + 1 + choice).to_string()
    }

    fn model(&self) -> Model {
        let setting = |value: &HostValue| Setting {
            original: value.original().into(),
            value: value.current(),
            claims: Vec::new(),
        };
        Model { settings: self.values.iter().map(setting).collect(), ids: self.ids.clone() }
    }

    /// The hook as a runtime calls it for a container.
    fn oci(&self, container: usize, status: &str, arguments: &[String]) -> Call {
        let mut state = json!({
            "ociVersion": "1.0.2",
            "id": self.ids[container],
            "status": status,
            "bundle": self.sandbox.dir(),
            "annotations": {},
        });
        if status != "stopped" {
            state["pid"] = json!(self.pids[container]);
        }
        let arguments = [&["oci".to_owned()], arguments].concat();
        Call { arguments, stdin: state.to_string() }
    }

    /// The call for a wish: by the runtime, or by hand for a container that is known already.
    fn ask(&self, wish: &Wish, by_hand: bool) -> Call {
        let settings = wish.values.iter().map(|(key, value)| format!("--sysctl={}={value}", KEYS[*key]));
        let mut arguments: Vec<String> = settings.chain([format!("--on-conflict={}", wish.mode)]).collect();
        if wish.container % 2 == 1 {
            // Two settings are asked for in either order.
            arguments.reverse();
        }
        if !by_hand {
            return self.oci(wish.container, "created", &arguments);
        }
        let arguments = [&["apply".to_owned(), self.ids[wish.container].clone()], &arguments[..]].concat();
        Call { arguments, stdin: String::new() }
    }

    /// Starts all calls, holds them until every one is there, and lets them go together.
    fn at_once(&self, what: &str, calls: &[Call]) -> Vec<Ended> {
        let directory = self.sandbox.dir().join(what);
        std::fs::create_dir(&directory).expect("a directory for outputs");
        let file = |n: usize, kind: &str| directory.join(format!("{n}.{kind}"));
        let create = |path: PathBuf| File::create(path).expect("a file for an output");
        let mut children: Vec<_> = (0..calls.len())
            .map(|n| {
                // The shell's read takes no more than its line; the rest of stdin is the hook's.
                let ready = file(n, "ready").display().to_string();
                let mut argv = ["sh", "-c", r#": >"$0"; read -r go; exec "$@""#, &ready].map(String::from).to_vec();
                argv.push(hook().display().to_string());
                argv.extend(calls[n].arguments.iter().cloned());
                self.sandbox.start_in(&self.sandbox.open_netns(&Netns::Host), &argv, |command| {
                    command.stdin(Stdio::piped()).stdout(create(file(n, "out"))).stderr(create(file(n, "err")));
                })
            })
            .collect();
        wait_until("all hooks at the start", LIMIT, || (0..calls.len()).all(|n| file(n, "ready").exists()));
        let mut pipes: Vec<_> = children.iter_mut().map(|child| child.stdin.take().expect("stdin is a pipe")).collect();
        let begin = Instant::now();
        for (pipe, call) in pipes.iter_mut().zip(calls) {
            write!(pipe, "go\n{}", call.stdin).expect("writing to a hook's stdin");
        }
        drop(pipes);
        let mut ends = vec![None; children.len()];
        while ends.iter().any(Option::is_none) {
            for (child, end) in children.iter_mut().zip(&mut ends) {
                if end.is_none() {
                    let status = child.try_wait().expect("waiting for a hook");
                    *end = status.map(|status| (status.code(), begin.elapsed()));
                }
            }
            let left: Vec<_> =
                ends.iter().zip(calls).filter(|(end, _)| end.is_none()).map(|(_, c)| &c.arguments).collect();
            assert!(begin.elapsed() < PHASE_LIMIT, "{what}: a deadlock? still running: {left:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        let ended = ends.into_iter().flatten().enumerate().map(|(n, (code, took))| {
            let read = |kind| std::fs::read_to_string(file(n, kind)).expect("reading an output");
            let command = calls[n].arguments.join(" ");
            Ended { outcome: Outcome { command, code, stdout: read("out"), stderr: read("err") }, took }
        });
        let ended: Vec<Ended> = ended.collect();
        let longest = ended.iter().map(|ended| ended.took).max().unwrap_or_default();
        eprintln!("{what}: {} hooks in {longest:.2?}, which is also the longest wait", calls.len());
        ended
    }

    fn state_dir(&self) -> PathBuf {
        self.sandbox.outside(STATE_DIR)
    }

    /// Everything in the ledger is whole: each file is JSON, empty (in a namespace's list), or a lock. Whoever looks at the
    /// end of a history while another one writes finds half a line there, and leaves an empty one.
    fn assert_ledger_is_whole(&self) {
        for path in files_below(&self.state_dir()) {
            let shown = path.display();
            let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("reading {shown}: {e}"));
            let inside = path.strip_prefix(self.state_dir()).expect("below the state directory");
            assert!(!shown.to_string().contains("/.tmp-"), "{shown} was left behind");
            match inside.components().next().and_then(|first| first.as_os_str().to_str()) {
                Some("locks") => {}
                Some("namespaces") => assert_eq!(text, "", "{shown}"),
                Some("conflicts" | "conflicts.old") => {
                    text.lines().filter(|line| !line.is_empty()).for_each(|line| drop(parsed(&path, line)));
                }
                _ => drop(parsed(&path, &text)),
            }
        }
    }

    /// The conflicts by container, and the containers by setting in the order of their conflicts; begins a new history.
    fn take_conflicts(&self) -> Conflicts {
        let mut conflicts = Conflicts::default();
        for line in self.sandbox.conflicts() {
            let text = |field: &str| line[field].as_str().unwrap_or_else(|| panic!("no {field} in {line}")).to_owned();
            let container = self.number(&text("container"));
            let key = key_number(&text("key"));
            let holders = line["holders"].as_array().expect("a list").iter();
            let clash = Clash {
                wanted: text("wanted"),
                kept: text("kept"),
                holders: holders.map(|id| id.as_str().expect("an id").to_owned()).collect(),
                outcome: text("outcome"),
            };
            conflicts.order.entry(key).or_default().push(container);
            let twice = conflicts.clashes.entry(container).or_default().insert(key, clash);
            assert_eq!(twice, None, "two conflicts of one hook about one setting: {line}");
        }
        for name in ["conflicts", "conflicts.old"] {
            let _ = std::fs::remove_file(self.state_dir().join(name));
        }
        conflicts
    }

    fn number(&self, id: &str) -> usize {
        self.ids.iter().position(|other| other == id).unwrap_or_else(|| panic!("no container {id}"))
    }

    /// The claims of each setting, the oldest first, as the ledger's files say.
    fn claims(&self) -> Vec<Vec<(usize, String)>> {
        let claims = KEYS.map(|key| {
            let directory = self.state_dir().join("settings").join(key.replace('.', "~")).join("claims");
            let mut claims: Vec<_> = files_below(&directory)
                .iter()
                .map(|path| {
                    let claim = parsed(path, &std::fs::read_to_string(path).expect("reading a claim"));
                    let time = claim["time"].as_u64().expect("a time");
                    let id = claim["instance"]["container"]["id"].as_str().expect("an id");
                    (time, (self.number(id), claim["value"].as_str().expect("a value").to_owned()))
                })
                .collect();
            claims.sort();
            claims.into_iter().map(|(_, claim)| claim).collect()
        });
        claims.into()
    }

    /// What the records say became of each wish, as it was when it was carried out.
    fn outcomes(&self) -> BTreeMap<usize, BTreeMap<usize, String>> {
        let mut outcomes = BTreeMap::new();
        for path in files_below(&self.state_dir().join("containers")) {
            let record = parsed(&path, &std::fs::read_to_string(&path).expect("reading a record"));
            assert_eq!(record["at_work"], Value::Null, "{}", path.display());
            let number = self.number(record["instance"]["container"]["id"].as_str().expect("an id"));
            let settings = record["settings"].as_array().expect("a list").iter();
            let settings = settings.map(|setting| {
                let key = key_number(
                    &serde_json::from_value::<BTreeMap<String, String>>(setting["key"].clone()).map_or_else(
                        |_| setting["key"].as_str().expect("a key").to_owned(),
                        |key| key.into_values().collect(),
                    ),
                );
                (key, setting["outcome"].as_str().expect("an outcome").to_owned())
            });
            outcomes.insert(number, settings.collect());
        }
        outcomes
    }

    /// Compares kernel, ledger and `status` with the model.
    #[track_caller]
    fn assert_is(&self, model: &Model) {
        let status = self.sandbox.status();
        let claims = self.claims();
        for (key, setting) in model.settings.iter().enumerate() {
            let shown = KEYS[key];
            assert_eq!(self.values[key].current(), setting.value, "{shown}: {setting:?}");
            assert_eq!(claims[key], setting.claims, "{shown}");
            let settings = status["settings"].as_array().expect("a list");
            let page = settings.iter().find(|page| page["key"] == shown);
            assert_eq!(page.is_some(), !setting.claims.is_empty(), "{shown}: {page:?}");
            let Some(page) = page else { continue };
            assert_eq!((&page["value"], &page["original"]), (&json!(setting.value), &json!(setting.original)));
            assert_eq!((&page["drifted"], &page["interrupted"]), (&json!(false), &json!(false)), "{page}");
        }
        for container in status["containers"].as_array().expect("a list") {
            let number = self.number(container["id"].as_str().expect("an id"));
            for setting in container["settings"].as_array().expect("a list") {
                let page = &model.settings[key_number(setting["key"].as_str().expect("a key"))];
                let claim = page.claims.iter().find(|(holder, _)| *holder == number);
                let is_over = claim.is_some_and(|(_, value)| *value != page.value);
                assert_eq!(setting["outcome"] == "overridden", is_over, "{container:#}");
                assert_eq!(setting["outcome"] == "kept", claim.is_none(), "{container:#}");
            }
        }
    }

    /// Puts together what was seen of the wishes, all of one phase, each of another container; `before` is the model
    /// at its beginning.
    fn seen(&self, before: &Model, wishes: &[Wish], ended: &[Ended]) -> Vec<Seen> {
        let mut conflicts = self.take_conflicts();
        let outcomes = self.outcomes();
        let mut seen: Vec<Seen> = Vec::new();
        for (wish, ended) in wishes.iter().zip(ended) {
            let refused = match ended.outcome.code {
                Some(0) => false,
                Some(3) => true,
                // With its deadline of a minute nobody gives up here.
                _ => panic!("neither done nor refused: {}", ended.outcome),
            };
            let outcomes = if refused { None } else { outcomes.get(&wish.container).cloned() };
            let clashes = conflicts.clashes.remove(&wish.container).unwrap_or_default();
            assert!(!refused || !clashes.is_empty(), "refused and not among the conflicts: {}", ended.outcome);
            let answer = Answer { refused, outcomes: outcomes.unwrap_or_default(), clashes };
            seen.push(Seen { wish: wish.clone(), answer, after: BTreeSet::new() });
        }
        assert_eq!(conflicts.clashes, BTreeMap::new(), "conflicts of nobody");
        let by_container: BTreeMap<usize, usize> = wishes.iter().enumerate().map(|(n, w)| (w.container, n)).collect();
        let chain = |seen: &mut [Seen], containers: &[usize]| {
            for pair in containers.windows(2) {
                seen[by_container[&pair[1]]].after.insert(by_container[&pair[0]]);
            }
        };
        conflicts.order.values().for_each(|containers| chain(&mut seen, containers));
        let done: BTreeSet<usize> = wishes
            .iter()
            .zip(ended)
            .filter(|(_, ended)| ended.outcome.code == Some(0))
            .map(|(wish, _)| wish.container)
            .collect();
        for (key, claims) in self.claims().into_iter().enumerate() {
            // Who was refused now may have a claim of before.
            let claims: Vec<_> = claims.into_iter().filter(|(container, _)| done.contains(container)).collect();
            chain(&mut seen, &claims.iter().map(|(container, _)| *container).collect::<Vec<_>>());
            // Whose conflict names a holder came after that claim, and before it if it does not; the other way round
            // for a claim that was given up for another value.
            for (container, value) in claims {
                let claimant = by_container[&container];
                let had_one = before.settings[key].claims.iter().any(|(holder, _)| *holder == container);
                for n in (0..seen.len()).filter(|n| *n != claimant) {
                    let Some(clash) = seen[n].answer.clashes.get(&key) else { continue };
                    let is_named = clash.holders.contains(&self.ids[container]);
                    let is_first = match clash.wanted == value {
                        false => is_named,
                        true if had_one => !is_named,
                        true => continue,
                    };
                    let (first, second) = if is_first { (claimant, n) } else { (n, claimant) };
                    seen[second].after.insert(first);
                }
            }
        }
        seen
    }
}

/// The history, see [`Crowd::take_conflicts`].
#[derive(Default)]
struct Conflicts {
    clashes: BTreeMap<usize, BTreeMap<usize, Clash>>,
    order: BTreeMap<usize, Vec<usize>>,
}

fn key_number(name: &str) -> usize {
    let name = name.replace('/', ".");
    KEYS.iter().position(|key| *key == name).unwrap_or_else(|| panic!("nobody has asked for {name}"))
}

#[track_caller]
fn parsed(path: &Path, text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{}: {e}: {text}", path.display()))
}

/// All files below a directory, sorted; none if it is not there.
fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.expect("an entry of a directory").path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

/// Numbers that look random and are the same in every run (xorshift, Marsaglia 2003).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % limit
    }
}

#[track_caller]
fn assert_status(ended: &Ended) {
    let outcome = &ended.outcome;
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{outcome}");
    let status = parsed(Path::new("status --json"), &outcome.stdout);
    assert!(status["problems"].as_array().is_none_or(Vec::is_empty), "{status:#}");
}

#[test]
fn three_hundred_hooks_at_once_are_as_if_one_came_after_the_other() {
    let crowd = Crowd::of(CONTAINERS);
    crowd.sandbox.policy("deadline = 60\n");
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let model = crowd.model();
    let status = || Call::of(&["status", "--json"]);

    // A third asks for two settings.
    let wishes: Vec<Wish> = (0..CONTAINERS)
        .map(|container| {
            let keys = if container % 3 == 0 { 2 } else { 1 };
            let mut values = BTreeMap::new();
            while values.len() < keys {
                let key = numbers.below(KEYS.len());
                values.insert(key, crowd.value(key, numbers.below(2) as u64));
            }
            Wish { container, values, mode: MODES[numbers.below(MODES.len())] }
        })
        .collect();
    let calls: Vec<Call> = wishes.iter().map(|wish| crowd.ask(wish, false)).chain((0..10).map(|_| status())).collect();
    let ended = crowd.at_once("apply", &calls);
    ended[CONTAINERS..].iter().for_each(assert_status);
    crowd.assert_ledger_is_whole();
    let seen = crowd.seen(&model, &wishes, &ended);
    let refused = seen.iter().filter(|seen| seen.answer.refused).count();
    assert!((1..CONTAINERS).contains(&refused), "no contention: {refused} refused");
    let mut model = serial_order(model, &seen).unwrap_or_else(|e| panic!("{e}"));
    crowd.assert_is(&model);

    // One third is killed and released, one asks for the other values, one looks.
    let known = crowd.outcomes();
    let (dying, rest): (Vec<usize>, Vec<usize>) = (0..CONTAINERS).partition(|n| n % 9 < 3);
    let (again, looking): (Vec<usize>, Vec<usize>) = rest.into_iter().partition(|n| n % 9 < 6);
    let pids: Vec<String> = dying.iter().map(|n| crowd.pids[*n].to_string()).collect();
    crowd.sandbox.sh(&format!("kill -KILL {}", pids.join(" ")));
    wait_until("the end of the killed", LIMIT, || {
        pids.iter().all(|pid| !crowd.sandbox.outside(&format!("/proc/{pid}")).exists())
    });
    dying.iter().for_each(|container| model.die(*container));
    let wishes: Vec<Wish> = again
        .iter()
        .map(|&container| {
            let other = |key: usize, value: &String| crowd.value(key, u64::from(*value == crowd.value(key, 0)));
            let values = wishes[container].values.iter().map(|(key, value)| (*key, other(*key, value))).collect();
            Wish { container, values, mode: MODES[numbers.below(MODES.len())] }
        })
        .collect();
    let calls: Vec<Call> = wishes
        .iter()
        .map(|wish| crowd.ask(wish, known.contains_key(&wish.container)))
        .chain(dying.iter().map(|container| crowd.oci(*container, "stopped", &[])))
        .chain(looking.iter().map(|_| status()))
        .collect();
    let ended = crowd.at_once("mixed", &calls);
    let (asked, others) = ended.split_at(wishes.len());
    let (released, looked) = others.split_at(dying.len());
    released.iter().for_each(|ended| assert_eq!(ended.outcome.code, Some(0), "{}", ended.outcome));
    looked.iter().for_each(assert_status);
    crowd.assert_ledger_is_whole();
    let mut model = serial_order(model.clone(), &crowd.seen(&model, &wishes, asked)).unwrap_or_else(|e| panic!("{e}"));
    model.settings.iter_mut().for_each(Setting::settle);
    crowd.assert_is(&model);

    // All that are left leave, alive, so that each has something to put back.
    let known = crowd.outcomes();
    let calls: Vec<Call> =
        known.keys().map(|n| Call::of(&["release", &crowd.ids[*n]])).chain((0..10).map(|_| status())).collect();
    let ended = crowd.at_once("release", &calls);
    let (released, looked) = ended.split_at(known.len());
    released.iter().for_each(|ended| assert_eq!(ended.outcome.code, Some(0), "{}", ended.outcome));
    looked.iter().for_each(assert_status);
    for (key, value) in KEYS.iter().zip(&crowd.values) {
        assert_eq!(value.current(), value.original(), "{key}");
    }
    crowd.sandbox.assert_ledger_is_empty();
    assert_eq!(crowd.sandbox.conflicts(), [] as [Value; 0]);
    assert_eq!(files_below(&crowd.state_dir()), [] as [PathBuf; 0]);
}

#[test]
fn whoever_waits_for_a_stopped_hook_gives_up_at_the_deadline_and_names_it() {
    require("strace", "strace");
    let crowd = Crowd::of(6);
    crowd.sandbox.policy("deadline = 6\n");
    crowd.sandbox.write("/etc/mptcp-hook/patient.toml", "deadline = 60\n");
    let wish = |container: usize, keys: &[usize], mode| {
        let values = keys.iter().map(|key| (*key, crowd.value(*key, container as u64 % 2))).collect();
        Wish { container, values, mode }
    };

    // The first file that it puts into place is its record: it has its locks then. It stops itself there.
    let call = crowd.ask(&wish(0, &[0], "refuse"), false);
    let state = crowd.sandbox.dir().join("state");
    std::fs::write(&state, &call.stdin).expect("writing a state");
    let script = r#"log=$1 state=$2; shift 2
        renames='?rename,?renameat,?renameat2'
        exec strace -qq -o "$log" -e "trace=$renames" -e "inject=$renames:signal=SIGSTOP:when=1" "$@" <"$state""#;
    let (log, hook) = (crowd.sandbox.dir().join("strace"), hook());
    let paths = [&log, &state, &hook].map(|path| path.display().to_string());
    let mut argv = ["sh", "-ec", script, "sh"].map(String::from).to_vec();
    argv.extend(paths.into_iter().chain(["--config", "/etc/mptcp-hook/patient.toml"].map(String::from)));
    argv.extend(call.arguments);
    let stopped = crowd.sandbox.spawn(&argv);
    let lock = crowd.state_dir().join("locks").join(format!("setting:{}", KEYS[0].replace('.', "~")));
    let pid = wait_for("a hook that has stopped with its locks", LIMIT, || {
        let has_stopped = std::fs::read_to_string(&log).is_ok_and(|log| log.contains("stopped by SIGSTOP"));
        let holder = std::fs::read_to_string(&lock).ok().filter(|_| has_stopped)?;
        Some(holder.trim().strip_suffix(')')?.rsplit_once("(pid ")?.1.to_owned())
    });
    let free = crowd.ids[5].clone();
    let unchanged = || -> Vec<(PathBuf, String)> {
        let is_others = |path: &&PathBuf| {
            let path = path.to_string_lossy();
            !["/locks/", "/failures", &free, &KEYS[1].replace('.', "~")].iter().any(|part| path.contains(part))
        };
        let files = files_below(&crowd.state_dir());
        files.iter().filter(is_others).map(|p| (p.clone(), std::fs::read_to_string(p).expect("reading it"))).collect()
    };
    let before = unchanged();

    let calls = [
        crowd.ask(&wish(1, &[0], "refuse"), false),
        crowd.ask(&wish(2, &[0], "warn"), false),
        // It must not keep the other setting to itself while it waits for this one.
        crowd.ask(&wish(3, &[0, 1], "override"), false),
        Call::of(&["release", &crowd.ids[0]]),
        crowd.ask(&wish(5, &[1], "refuse"), false),
        Call::of(&["status", "--json"]),
    ];
    let ended = crowd.at_once("stopped", &calls);
    for ended in &ended[..4] {
        let outcome = &ended.outcome;
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""), "{outcome}");
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        for part in [crowd.ids[0].as_str(), &format!("(pid {pid})"), "deadline"] {
            assert!(outcome.stderr.contains(part), "`{part}` is not in: {outcome}");
        }
        // A process that gets no processor for a while notices late; without the policy's word it would be five seconds.
        let limits = Duration::from_secs(6)..Duration::from_secs(50);
        assert!(limits.contains(&ended.took), "after {:?}: {outcome}", ended.took);
    }
    assert_eq!(ended[4].outcome.code, Some(0), "{}", ended[4].outcome);
    assert_status(&ended[5]);
    assert_eq!(unchanged(), before);
    assert_eq!(crowd.values[0].current(), crowd.values[0].original());
    assert_eq!(crowd.sandbox.conflicts(), [] as [Value; 0]);

    // It goes on as if nothing had been.
    crowd.sandbox.sh(&format!("kill -CONT {pid}"));
    stopped.wait(LIMIT).ok();
    assert_eq!(crowd.values[0].current(), crowd.value(0, 0));
    let late = crowd.at_once("late", &[crowd.ask(&wish(1, &[0], "refuse"), false)]);
    assert_eq!(late[0].outcome.code, Some(3), "{}", late[0].outcome);
    for container in [0, 5] {
        crowd.sandbox.hook(&["release", &crowd.ids[container]]).ok();
    }
    for (key, value) in KEYS.iter().zip(&crowd.values) {
        assert_eq!(value.current(), value.original(), "{key}");
    }
    crowd.sandbox.assert_ledger_is_empty();
}
