//! `mptcp-hook repair`: the index is rebuilt from the records, what is damaged is moved aside, and until then `status`
//! shows the rest and `apply` touches nothing.

mod common;

use common::*;
use serde_json::{Value, json};

const KEY: &str = "net.core.rmem_max";
const STATE: &str = "/run/mptcp-hook";
const PAGE: &str = "/run/mptcp-hook/settings/net~core~rmem_max";

/// A value of the machine, two containers that rely on another one, and their ledger.
struct World {
    // Dropped in this order: nobody is left to write the value when it is restored.
    sandbox: Sandbox,
    value: HostValue,
}

impl World {
    fn new() -> Self {
        let value = HostValue::of_sysctl("net/core/rmem_max");
        Self { sandbox: Sandbox::host_network(), value }
    }

    fn another(&self, n: u64) -> String {
        (self.value.original().parse::<u64>().expect("a number") + n * 4096).to_string()
    }

    #[track_caller]
    fn ask(&self, container: &Bare, n: u64) -> Outcome {
        container.oci(&["--sysctl", &format!("{KEY}={}", self.another(n))])
    }

    /// A container that relies on the value `n`.
    #[track_caller]
    fn holder(&self, what: &str, n: u64) -> Bare<'_> {
        let container = Bare::new(&self.sandbox, what);
        self.ask(&container, n).ok();
        container
    }

    fn file(&self, pattern: &str) -> String {
        self.sandbox.sh(&format!("ls -d {pattern}"))
    }

    fn record(&self, container: &Bare) -> String {
        self.file(&format!("{STATE}/containers/*{}*", container.id()))
    }

    fn claim(&self, container: &Bare) -> String {
        self.file(&format!("{PAGE}/claims/*{}*", container.id()))
    }

    fn write(&self, path: &str, text: &str) {
        std::fs::write(self.sandbox.outside(path), text).expect("damaging a file");
    }

    /// Changes a file of JSON by a filter of jq.
    fn edit(&self, path: &str, filter: &str) {
        self.sandbox.sh(&format!("jq -c '{filter}' {path} >/run/edited; cat /run/edited >{path}; rm /run/edited"));
    }

    #[track_caller]
    fn repair(&self, says: &[&str]) -> String {
        let outcome = self.sandbox.hook(&["repair"]);
        let said = outcome.stderr.clone();
        outcome.ok();
        says.iter().for_each(|word| assert!(said.contains(word), "no \"{word}\" in\n{said}"));
        said
    }

    /// What is wrong as `status` has it, which shows `containers` containers and goes well.
    #[track_caller]
    fn problems(&self, containers: usize) -> String {
        let status = self.sandbox.status();
        assert_eq!(status["containers"].as_array().map(Vec::len), Some(containers), "{status:#}");
        let text = self.sandbox.hook(&["status"]).ok();
        let problems = status["problems"].as_array().expect("problems is a list");
        for problem in problems {
            assert!(text.contains(problem.as_str().expect("a string")), "{text}");
        }
        status["problems"].to_string()
    }

    /// The page is whole: this value, the machine's own before it, and these claims.
    #[track_caller]
    fn assert_page(&self, value: &str, holders: &[&Bare]) {
        let status = self.sandbox.status();
        assert_eq!(status["problems"], json!([]), "{status:#}");
        let page = &status["settings"][0];
        assert_eq!((&page["key"], &page["value"]), (&json!(KEY), &json!(value)), "{status:#}");
        assert_eq!(page["original"], self.value.original(), "{status:#}");
        let claims = page["claims"].as_array().expect("claims is a list");
        let ids: Vec<&Value> = claims.iter().map(|claim| &claim["container"]).collect();
        assert_eq!(ids, holders.iter().map(|holder| holder.id()).collect::<Vec<_>>(), "{status:#}");
    }

    /// All leave, and everything is as it was.
    #[track_caller]
    fn leave(&self, containers: Vec<Bare>) {
        for mut container in containers {
            container.stop().ok();
        }
        assert_eq!(self.value.current(), self.value.original());
        self.sandbox.assert_ledger_is_empty();
    }
}

#[test]
fn repair_rebuilds_the_index_from_the_records() {
    let world = World::new();
    let (first, second) = (world.holder("first", 1), world.holder("second", 1));
    let before = world.sandbox.sh(&format!("cd {STATE}; find namespaces settings | sort"));
    world.sandbox.sh(&format!("rm -r {STATE}/namespaces {STATE}/settings"));
    world.repair(&[first.id(), second.id(), KEY, "written anew", "2 containers"]);
    assert_eq!(world.sandbox.sh(&format!("cd {STATE}; find namespaces settings | sort")), before);
    world.assert_page(&world.another(1), &[&first, &second]);
    // They hold others back as before.
    let third = Bare::new(&world.sandbox, "third");
    world.ask(&third, 2).fails_with(3);
    let said = world.repair(&["nothing had to be mended"]);
    assert_eq!(said.lines().count(), 1, "{said}");
    world.leave(vec![first, second, third]);
}

#[test]
fn repair_mends_every_file_of_a_page() {
    let world = World::new();
    let (first, second) = (world.holder("first", 1), world.holder("second", 1));
    let third = Bare::new(&world.sandbox, "third");
    let files = [format!("{PAGE}/value"), format!("{PAGE}/intent"), world.claim(&first)];
    for (number, damage) in ["", "{", "null", "\u{0}\u{0}", "{\"version\":0}"].into_iter().enumerate() {
        for file in &files {
            world.write(file, damage);
            let problems = world.problems(2);
            assert!(problems.contains(file) && problems.contains("mptcp-hook repair"), "{problems}");
            // Closed, with one line, and nothing is changed.
            let refused = world.ask(&third, 2);
            assert_eq!((refused.code, refused.stderr.lines().count()), (Some(1), 1), "{refused}");
            assert!(refused.stderr.contains(file) && refused.stderr.contains("run mptcp-hook repair"), "{refused}");
            assert_eq!(world.value.current(), world.another(1));
            let said = world.repair(&[file, "damaged/"]);
            assert_eq!(said.matches("moved to").count(), 1, "{said}");
            world.assert_page(&world.another(1), &[&first, &second]);
            let kept = world.sandbox.sh(&format!("ls {STATE}/damaged | wc -l"));
            assert_eq!(kept, (number * files.len() + files.iter().position(|f| f == file).unwrap() + 1).to_string());
        }
    }
    world.leave(vec![first, second, third]);
}

/// The claim of a container alone is damaged: the others and the value are shown.
#[test]
fn repair_leaves_a_page_readable_around_a_damaged_claim() {
    let world = World::new();
    let (first, second) = (world.holder("first", 1), world.holder("second", 1));
    world.write(&world.claim(&first), "{");
    let status = world.sandbox.status();
    assert_eq!(status["settings"][0]["claims"][0]["container"], second.id(), "{status:#}");
    assert_eq!(status["settings"][0]["claims"].as_array().map(Vec::len), Some(1), "{status:#}");
    world.repair(&[first.id(), "written anew from its record"]);
    world.leave(vec![first, second]);
}

#[test]
fn repair_says_that_an_original_is_lost_and_invents_none() {
    let world = World::new();
    let mut only = world.holder("only", 1);
    world.edit(&world.record(&only), ".settings[].original = null");
    world.write(&format!("{PAGE}/value"), "");
    let said = world.repair(&[KEY, "what it was before is lost", &world.another(1)]);
    assert!(!said.contains(world.value.original()), "{said}");
    only.stop().ok();
    assert_eq!(world.value.current(), world.another(1), "it stays, as was said");
    world.sandbox.assert_ledger_is_empty();
}

#[test]
fn repair_of_a_damaged_record() {
    let world = World::new();
    let (mut first, second) = (world.holder("first", 1), world.holder("second", 1));
    let record = world.record(&second);
    world.write(&record, "{\"version\":1}");
    assert!(world.problems(1).contains(&record));
    world.repair(&[&record, "moved to", second.id(), "apply it again"]);
    // It is alive, so its claim counts; and the same hook gives it a record again.
    world.assert_page(&world.another(1), &[&first, &second]);
    world.ask(&second, 1).ok();
    assert_eq!(world.sandbox.status_of(second.id())["live"], true);
    // Dead and without a record nobody could ever let it go.
    first.stop().ok();
    let mut second = second;
    second.kill();
    world.write(&record, "");
    world.repair(&[&record, "struck", world.value.original()]);
    assert_eq!(world.value.current(), world.value.original());
    world.sandbox.assert_ledger_is_empty();
}

#[test]
fn repair_finishes_a_write_that_was_interrupted() {
    let world = World::new();
    let only = world.holder("only", 1);
    let intent = |original: u64, wanted: u64| {
        let (original, wanted) = (world.another(original), world.another(wanted));
        let filter = format!("{{version, instance, key: \"{KEY}\", original: \"{original}\", wanted: \"{wanted}\"}}");
        world.sandbox.sh(&format!("jq -c '{filter}' {} >{PAGE}/intent", world.claim(&only)));
    };
    // It did not happen: the intent goes.
    intent(1, 2);
    world.repair(&[KEY, "killed while it wrote"]);
    world.assert_page(&world.another(1), &[&only]);
    // It happened: the value is ours, so that the last to leave restores what was there before.
    intent(1, 2);
    world.value.set(&world.another(2));
    world.repair(&[KEY, "killed while it wrote"]);
    world.assert_page(&world.another(2), &[&only]);
    assert_eq!(world.sandbox.sh(&format!("ls {PAGE}")), "claims\nvalue");
    world.leave(vec![only]);
}

#[test]
fn repair_and_files_that_do_not_belong_or_are_not_ours() {
    let world = World::new();
    let (first, second) = (world.holder("first", 1), world.holder("second", 1));
    let (record, claim) = (world.record(&first), world.claim(&second));
    let strangers = [format!("{STATE}/notes"), format!("{PAGE}/notes"), format!("{STATE}/settings/no such")];
    strangers.iter().for_each(|path| world.write(path, "?"));
    world.sandbox.sh(&format!("chmod 666 {record}; chown 65534 {claim}"));
    let problems = world.problems(2);
    for word in strangers.iter().map(String::as_str).chain([&*record, "mode 666", &*claim, "uid 65534"]) {
        assert!(problems.contains(word), "no {word} in {problems}");
    }
    world.repair(&[&strangers[0], &strangers[1], &strangers[2], "does not belong", "taken back"]);
    world.assert_page(&world.another(1), &[&first, &second]);
    let owners = world.sandbox.sh(&format!("stat -c %u:%a {record} {claim}"));
    assert_eq!(owners, "0:600\n0:600");
    world.leave(vec![first, second]);
}

#[test]
fn repair_leaves_what_a_newer_version_wrote() {
    let world = World::new();
    let (first, second) = (world.holder("first", 1), world.holder("second", 1));
    let (record, value) = (world.record(&first), format!("{PAGE}/value"));
    let text = std::fs::read_to_string(world.sandbox.outside(&record)).expect("the record");
    world.write(&record, "{\"version\":99}");
    assert!(world.problems(1).contains("version 99"));
    let said = world.sandbox.hook(&["repair"]).fails_with(1);
    assert!(said.contains(&record) && said.contains("newer"), "{said}");
    assert_eq!(world.sandbox.sh(&format!("cat {record}")), "{\"version\":99}");
    // Nothing is known about it, so nothing of it is struck.
    let claims = world.sandbox.status()["settings"][0]["claims"].as_array().map(Vec::len);
    assert_eq!(claims, Some(2));
    world.write(&record, &text);
    let page = std::fs::read_to_string(world.sandbox.outside(&value)).expect("the value");
    world.write(&value, "{\"version\":99,\"value\":[]}");
    assert!(world.problems(2).contains(&value));
    let refused = world.ask(&Bare::new(&world.sandbox, "third"), 2).fails_with(1);
    assert!(refused.contains(&value) && refused.contains("version 99"), "{refused}");
    world.sandbox.hook(&["repair"]).fails_with(1);
    world.write(&value, &page);
    world.assert_page(&world.another(1), &[&first, &second]);
    world.leave(vec![first, second]);
}

/// A format from before the first one that there is: named as such, and out of the way after a repair.
#[test]
fn a_record_of_an_older_version_is_named_and_moved_aside() {
    let world = World::new();
    let (first, second) = (world.holder("first", 1), world.holder("second", 1));
    let record = world.record(&first);
    world.write(&record, "{\"version\":0,\"id\":\"first\"}");
    let problems = world.problems(1);
    assert!(problems.contains(&record) && problems.contains("version 0; 1 is the oldest"), "{problems}");
    let said = world.ask(&first, 1).fails_with(1);
    assert!(said.contains(&record) && said.contains("mptcp-hook repair"), "{said}");
    world.repair(&[&record, "moved to"]);
    world.ask(&first, 1).ok();
    world.assert_page(&world.another(1), &[&second, &first]);
    world.leave(vec![first, second]);
}

#[test]
fn repair_removes_what_killed_writers_left() {
    let world = World::new();
    let only = world.holder("only", 1);
    let list = format!("{STATE}/namespaces/1-2");
    // The new one's time is ahead: it stays young on a slow machine, too.
    world.sandbox.sh(&format!(
        "cd {STATE}; echo x >{PAGE}/.tmp-1-eulav; echo x >{PAGE}/claims/.tmp-1-x; echo x >containers/.tmp-1-new; \
         echo x >containers/.tmp-1-old; touch -d '1 minute ago' containers/.tmp-1-old; \
         touch -d '1 hour' containers/.tmp-1-new; \
         mkdir -m 700 {list}; umask 077; : >{list}/oci.gone.00000000"
    ));
    assert_eq!(world.problems(1), "[]");
    world.repair(&["half-written", "oci.gone", "1-2", "struck"]);
    // The young one may be somebody's who is at work.
    let left = world.sandbox.sh(&format!("cd {STATE}; find . -name '.tmp-*'; ls namespaces | wc -l"));
    assert_eq!(left, "./containers/.tmp-1-new\n1");
    world.sandbox.sh(&format!("rm {STATE}/containers/.tmp-1-new"));
    world.leave(vec![only]);
}

/// After a reboot whose /run was kept, nobody in the ledger holds anything.
#[test]
fn repair_keeps_the_dead_of_an_earlier_boot_for_release() {
    let world = World::new();
    let (first, other) = (world.holder("first", 1), Bare::new(&world.sandbox, "other"));
    world.edit(&world.record(&first), ".instance.boot_id = \"another\"");
    world.edit(&world.claim(&first), ".instance.boot_id = \"another\"");
    assert_eq!(world.sandbox.status_of(first.id())["live"], false);
    world.repair(&["1 container", "1 is dead", "release --stale"]);
    assert_eq!(world.sandbox.status_of(first.id())["live"], false);
    world.ask(&other, 2).ok();
    assert_eq!(world.value.current(), world.another(2));
    world.sandbox.hook(&["release", "--stale"]).ok();
    world.assert_page(&world.another(2), &[&other]);
    world.leave(vec![other]);
}

#[test]
fn repair_keeps_a_bounded_number_of_damaged_files() {
    let sandbox = Sandbox::new();
    let other = Bare::new(&sandbox, "other");
    other.oci(&["--limit", "subflows=4"]).ok();
    sandbox.sh(&format!("cd {STATE}; umask 077; for n in $(seq 70); do echo $n >containers/oci.x$n.0; done"));
    let outcome = sandbox.hook(&["repair"]);
    assert_eq!(outcome.stderr.matches("moved to").count(), 70, "{outcome}");
    assert_eq!(outcome.stderr.matches("was dropped").count(), 6, "{outcome}");
    outcome.ok();
    assert_eq!(sandbox.sh(&format!("ls {STATE}/damaged | wc -l; ls {STATE}/containers | wc -l")), "64\n1");
    assert_eq!(sandbox.status()["problems"], json!([]));
}

/// Whatever has become of a history, what can be read of it is shown, and what happens next is recorded.
#[test]
fn a_damaged_history_loses_its_damaged_lines_alone() {
    let sandbox = Sandbox::new();
    sandbox.patient_policy("[annotations]\ninterfaces = []\n");
    let refuse = |what: &str| {
        let container = Bare::new(&sandbox, what).annotation("mptcp-hook/interface.eth1", "backup");
        container.oci(&[]).fails_with(3);
        container.id().to_owned()
    };
    let shown = || -> Vec<String> {
        let conflicts = sandbox.conflicts();
        conflicts.iter().map(|conflict| conflict["container"].as_str().expect("an id").to_owned()).collect()
    };
    let (first, file) = (refuse("first"), format!("{STATE}/conflicts"));
    // A disk was full in the middle of a line, and somebody has written what is no text.
    sandbox.sh(&format!("printf '{{\"time\":17,\"contai' >>{file}"));
    let second = refuse("second");
    sandbox.sh(&format!("printf '\\377\\376\\n{{}}\\n' >>{file}"));
    let third = refuse("third");
    assert_eq!(shown(), [&first, &second, &third].map(String::clone));
    assert_eq!(sandbox.status()["problems"], json!([]));
    // What is no plain file stops what it would have to record, is named, and repair moves it aside.
    sandbox.sh(&format!("mv {file} /run/real; ln -s /run/real {file}"));
    let said = Bare::new(&sandbox, "fourth").annotation("mptcp-hook/interface.eth1", "backup").oci(&[]).fails_with(3);
    assert!(said.contains("could not be recorded") && said.contains(&file), "{said}");
    let problems = sandbox.status()["problems"].to_string();
    assert!(problems.contains(&file) && problems.contains("mptcp-hook repair"), "{problems}");
    let said = sandbox.hook(&["repair"]);
    assert!(said.stderr.contains(&file) && said.stderr.contains("moved to"), "{said}");
    said.ok();
    let fifth = refuse("fifth");
    assert_eq!(shown(), [fifth]);
}

#[test]
fn repair_waits_for_locks_until_the_deadline() {
    let world = World::new();
    let only = world.holder("only", 1);
    world.sandbox.policy("deadline = 0.5\n");
    let lock = format!("{STATE}/locks/setting:net~core~rmem_max");
    let held = world.sandbox.spawn(&["flock", "--no-fork", &lock, "sleep", "1000"]);
    wait_until("the lock", LIMIT, || world.sandbox.run(&["flock", "--nonblock", &lock, "true"]).code != Some(0));
    let said = world.sandbox.hook(&["repair"]).fails_with(1);
    assert!(said.contains("in use by") && said.contains("net~core~rmem_max"), "{said}");
    drop(held);
    world.sandbox.patient_policy("");
    world.leave(vec![only]);
}

#[test]
fn repair_without_a_ledger_makes_none() {
    let sandbox = Sandbox::new();
    let outcome = sandbox.hook(&["repair"]);
    assert!(outcome.stderr.contains("nothing had to be mended"), "{outcome}");
    outcome.ok();
    assert!(!sandbox.outside(STATE).exists());
}
