//! Settings that the kernel keeps once for the whole host: who may change them, who is told, and what they are
//! afterwards. The values are this machine's own; each test has one for itself and puts it back.

mod common;

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::expectations::{RMEM_IN_NAMESPACES_SINCE, Running};
use common::*;
use serde_json::{Value, json};

/// Present in the initial network namespace alone.
const BACKLOG: &str = "net.core.netdev_max_backlog";

/// Present in every namespace, read-only and shared.
const RMEM: &str = "net.core.rmem_max";

/// A value of the machine, and a sandbox in the machine's own network namespace.
struct Host {
    // Dropped in this order: nobody is left to write the value when it is restored.
    sandbox: Sandbox,
    value: HostValue,
    key: &'static str,
}

impl Host {
    fn of(key: &'static str) -> Self {
        let value = HostValue::of_sysctl(&key.replace('.', "/"));
        Self { sandbox: Sandbox::host_network(), value, key }
    }

    fn original(&self) -> &str {
        self.value.original()
    }

    /// Another valid value; a different one for each `n`.
    fn another(&self, n: u64) -> String {
        (self.original().parse::<u64>().expect("a number") + n * 4096).to_string()
    }

    /// `--sysctl KEY=VALUE`.
    fn wish(&self, value: &str) -> [String; 2] {
        ["--sysctl".into(), format!("{}={value}", self.key)]
    }

    /// The hook for `container` with a wish of the administrator for `value`, and further arguments.
    #[track_caller]
    fn ask(&self, container: &Bare, value: &str, more: &[&str]) -> Outcome {
        let wish = self.wish(value);
        let arguments: Vec<&str> = wish.iter().map(String::as_str).chain(more.iter().copied()).collect();
        container.oci(&arguments)
    }

    #[track_caller]
    fn assert_value(&self, expected: &str) {
        assert_eq!(self.value.current(), expected, "{}; status: {:#}", self.key, self.sandbox.status());
    }

    /// The setting in `status --json`.
    #[track_caller]
    fn page(&self) -> Value {
        let status = self.sandbox.status();
        let settings = status["settings"].as_array().expect("settings is a list");
        assert_eq!(settings.len(), 1, "{status:#}");
        assert_eq!((&settings[0]["scope"], &settings[0]["key"]), (&json!("host"), &json!(self.key)));
        settings[0].clone()
    }

    /// The ids of those who have a claim, with their values, sorted.
    #[track_caller]
    fn claims(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().expect("a string").to_owned();
        let page = self.page();
        let claims = page["claims"].as_array().expect("claims is a list");
        let mut claims: Vec<_> =
            claims.iter().map(|claim| (text(&claim["container"]), text(&claim["value"]))).collect();
        claims.sort();
        claims
    }

    /// What became of the wish of the container `id`.
    #[track_caller]
    fn outcome(&self, id: &str) -> String {
        let container = self.sandbox.status_of(id);
        let settings = container["settings"].as_array().expect("settings is a list");
        let own = settings.iter().find(|setting| setting["key"] == self.key);
        let own = own.unwrap_or_else(|| panic!("no {} in {container:#}", self.key));
        assert_eq!(own["scope"], "host", "{container:#}");
        own["outcome"].as_str().expect("an outcome").to_owned()
    }

    /// The last conflict, which must be of this container, wish and outcome.
    #[track_caller]
    fn assert_conflict(&self, container: &str, wanted: &str, kept: &str, holders: &[&str], outcome: &str) {
        let conflicts = self.sandbox.conflicts();
        let last = conflicts.last().expect("a conflict");
        assert_eq!(last["container"], container, "{last:#}");
        assert_eq!(last["key"], self.key, "{last:#}");
        assert_eq!(last["wanted"], wanted, "{last:#}");
        assert_eq!(last["kept"], kept, "{last:#}");
        assert_eq!(last["holders"], json!(holders), "{last:#}");
        assert_eq!(last["outcome"], outcome, "{last:#}");
        assert!(last["time"].is_u64(), "{last:#}");
        assert!(last["reason"].as_str().is_some_and(|reason| reason.contains(self.key)), "{last:#}");
    }

    /// Nobody relies on anything, and the value is what it was.
    #[track_caller]
    fn assert_as_before(&self) {
        self.assert_value(self.original());
        self.sandbox.assert_ledger_is_empty();
    }

    /// A runc bundle whose hook asks for `value`, with further arguments.
    fn bundle(&self, what: &str, value: &str, more: &[&str]) -> Bundle<'_> {
        let wish = self.wish(value);
        let arguments: Vec<&str> = wish.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Bundle::new(&self.sandbox, what)
            .hook(Stage::CreateRuntime, HookEntry::oci(&arguments))
            .hook(Stage::Poststop, HookEntry::oci(&[]))
    }
}

/// One line for people, and nothing but that.
#[track_caller]
fn one_line(outcome: &Outcome) -> String {
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    assert_eq!(outcome.stdout, "", "{outcome}");
    outcome.stderr.trim().to_owned()
}

// --- alone, and sharing ---------------------------------------------------------------------------------------------

#[test]
fn runc_changes_a_host_value_and_restores_it_in_the_end() {
    let host = Host::of(BACKLOG);
    let value = host.another(1);
    let container = host.bundle("first", &value, &[]).start(Runtime::Runc);
    host.assert_value(&value);
    assert_eq!(host.outcome(container.id()), "applied");
    let page = host.page();
    assert_eq!((&page["value"], &page["original"]), (&json!(value), &json!(host.original())));
    assert_eq!(host.claims(), [(container.id().to_owned(), value.clone())]);
    let warnings = host.sandbox.status_of(container.id())["warnings"].to_string();
    assert!(warnings.contains("whole host"), "{warnings}");

    container.delete();
    host.assert_as_before();
    assert_eq!(host.sandbox.conflicts(), [] as [Value; 0]);
}

#[test]
fn runc_shares_an_equal_value_and_the_last_one_restores_it() {
    let host = Host::of(BACKLOG);
    let value = host.another(1);
    let first = host.bundle("first", &value, &[]).start(Runtime::Runc);
    let second = host.bundle("second", &value, &[]).start(Runtime::Runc);
    assert_eq!(host.outcome(second.id()), "shared");
    assert_eq!(host.claims().len(), 2);

    first.delete();
    host.assert_value(&value);
    assert_eq!(host.claims(), [(second.id().to_owned(), value)]);
    second.delete();
    host.assert_as_before();
    assert_eq!(host.sandbox.conflicts(), [] as [Value; 0]);
}

/// Also where the namespace shows the value itself, read-only.
#[test]
fn a_present_value_is_claimed_without_a_write_and_holds_others() {
    let host = Host::of(RMEM);
    let original = host.original().to_owned();
    let mut first = Bare::new(&host.sandbox, "first");
    let is_shown = Running::look().has(RMEM_IN_NAMESPACES_SINCE);
    assert_eq!(host.sandbox.sysctl(&first.netns(), "net/core/rmem_max"), is_shown.then(|| original.clone()));
    // 0x10 is 16, as the kernel reads it.
    let in_hex = format!("{:#x}", original.parse::<u64>().expect("a number"));
    host.ask(&first, &in_hex, &[]).ok();
    assert_eq!(host.outcome(first.id()), "shared");
    host.assert_value(&original);

    let mut second = Bare::new(&host.sandbox, "second");
    let refused = host.ask(&second, &host.another(1), &[]);
    assert_eq!(refused.code, Some(3), "{refused}");
    let line = one_line(&refused);
    for part in [second.id(), first.id(), RMEM, &host.another(1)] {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
    host.assert_value(&original);

    first.stop().ok();
    // Nobody is left who relies on it.
    host.ask(&second, &host.another(1), &[]).ok();
    host.assert_value(&host.another(1));
    assert_eq!(host.sandbox.sysctl(&second.netns(), "net/core/rmem_max"), is_shown.then(|| host.another(1)));
    second.stop().ok();
    host.assert_as_before();
}

#[test]
fn the_same_wish_again_changes_nothing() {
    let host = Host::of(BACKLOG);
    let value = host.another(1);
    let mut container = Bare::new(&host.sandbox, "again");
    host.ask(&container, &value, &[]).ok();
    let before = host.sandbox.status();
    for _ in 0..2 {
        host.ask(&container, &value, &[]).ok();
        assert_eq!(host.sandbox.status(), before);
    }
    container.stop().ok();
    host.assert_as_before();
}

// --- conflicts ------------------------------------------------------------------------------------------------------

#[test]
fn runc_is_refused_a_different_value_and_does_not_start() {
    let host = Host::of(BACKLOG);
    let (held, other) = (host.another(1), host.another(2));
    let holder = host.bundle("holder", &held, &[]).start(Runtime::Runc);
    let late = host.bundle("late", &other, &[]).write(Runtime::Runc);
    let message = late.create().expect_err("a value that somebody else relies on");
    assert!(message.contains("exit status 3"), "{message}");
    for part in [late.id(), holder.id(), BACKLOG, held.as_str(), other.as_str()] {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    assert_ne!(late.runtime(&["state", late.id()]).code, Some(0), "the container exists");
    host.assert_value(&held);
    host.assert_conflict(late.id(), &other, &held, &[holder.id()], "refused");
    assert_eq!(host.claims(), [(holder.id().to_owned(), held)]);
    let status = host.sandbox.status();
    assert_eq!(status["containers"].as_array().map(Vec::len), Some(1), "{status:#}");

    holder.delete();
    host.assert_as_before();
}

#[test]
fn runc_with_warn_starts_and_the_value_stays() {
    let host = Host::of(BACKLOG);
    let (held, other) = (host.another(1), host.another(2));
    let holder = host.bundle("holder", &held, &[]).start(Runtime::Runc);
    let late = host.bundle("late", &other, &["--on-conflict", "warn"]).start(Runtime::Runc);
    host.assert_value(&held);
    assert_eq!(host.outcome(late.id()), "kept");
    host.assert_conflict(late.id(), &other, &held, &[holder.id()], "warned");
    assert_eq!(host.claims(), [(holder.id().to_owned(), held.clone())]);

    // Without a claim of its own it holds nobody back, nor the value.
    holder.delete();
    host.assert_value(host.original());
    late.delete();
    host.assert_as_before();
}

#[test]
fn runc_with_override_changes_it_and_the_newest_remaining_claim_comes_back() {
    let host = Host::of(BACKLOG);
    let (held, other) = (host.another(1), host.another(2));
    let holder = host.bundle("holder", &held, &[]).start(Runtime::Runc);
    let late = host.bundle("late", &other, &["--on-conflict", "override"]).start(Runtime::Runc);
    host.assert_value(&other);
    assert_eq!(host.outcome(late.id()), "overrode");
    assert_eq!(host.outcome(holder.id()), "overridden");
    host.assert_conflict(late.id(), &other, &held, &[holder.id()], "overrode");
    let mut claims = [(holder.id().to_owned(), held.clone()), (late.id().to_owned(), other)];
    claims.sort();
    assert_eq!(host.claims(), claims);
    let warnings = host.sandbox.status_of(late.id())["warnings"].to_string();
    assert!(warnings.contains(holder.id()), "the holder is not named: {warnings}");

    late.delete();
    host.assert_value(&held);
    assert_eq!(host.outcome(holder.id()), "applied");
    holder.delete();
    host.assert_as_before();
}

#[test]
fn of_several_overridden_claims_the_newest_comes_back() {
    let host = Host::of(BACKLOG);
    let values: Vec<String> = (1..=4).map(|n| host.another(n)).collect();
    let mut members: Vec<Bare> = (1..=4).map(|n| Bare::new(&host.sandbox, &format!("m{n}"))).collect();
    for (member, value) in members.iter().zip(&values) {
        host.ask(member, value, &["--on-conflict", "override"]).ok();
        host.assert_value(value);
    }
    let outcomes: Vec<String> = members.iter().map(|member| host.outcome(member.id())).collect();
    assert_eq!(outcomes, ["overridden", "overridden", "overridden", "overrode"]);

    // One in the middle leaves: its value is not in force, nothing changes.
    members[2].stop().ok();
    host.assert_value(&values[3]);
    members[3].stop().ok();
    host.assert_value(&values[1]);
    assert_eq!(host.outcome(members[0].id()), "overridden");
    members[0].stop().ok();
    host.assert_value(&values[1]);
    members[1].stop().ok();
    host.assert_as_before();
}

/// The clock was an hour ahead when the first claim was made, and has been set right since.
#[test]
fn the_newest_claim_comes_back_whatever_the_clock_says() {
    // Whether the second one's value is left to another one that shares it.
    for is_shared in [false, true] {
        let host = Host::of(BACKLOG);
        let values: Vec<String> = (1..=3).map(|n| host.another(n)).collect();
        let mut members: Vec<Bare> = (1..=4).map(|n| Bare::new(&host.sandbox, &format!("m{n}"))).collect();
        host.ask(&members[0], &values[0], &[]).ok();
        host.sandbox.sh("f=$(ls /run/mptcp-hook/settings/*/claims/*)
            jq -c '.time += 3600000000000' $f >/run/edited; cat /run/edited >$f");
        host.ask(&members[1], &values[1], &["--on-conflict", "override"]).ok();
        if is_shared {
            host.ask(&members[3], &values[1], &[]).ok();
        }
        host.ask(&members[2], &values[2], &["--on-conflict", "override"]).ok();
        if is_shared {
            members[1].stop().ok();
        }
        members[2].stop().ok();
        host.assert_value(&values[1]);
        members[if is_shared { 3 } else { 1 }].stop().ok();
        host.assert_value(&values[0]);
        members[0].stop().ok();
        host.assert_as_before();
    }
}

/// Back to a value that an overridden one had asked for: that one has it again.
#[test]
fn an_overridden_value_that_comes_back_is_no_longer_overridden() {
    let host = Host::of(BACKLOG);
    let (first_value, other) = (host.another(1), host.another(2));
    let mut members: Vec<Bare> = (1..=3).map(|n| Bare::new(&host.sandbox, &format!("m{n}"))).collect();
    host.ask(&members[0], &first_value, &[]).ok();
    host.ask(&members[1], &other, &["--on-conflict", "override"]).ok();
    host.ask(&members[2], &first_value, &["--on-conflict", "override"]).ok();
    host.assert_value(&first_value);
    assert_eq!(host.outcome(members[0].id()), "applied");
    assert_eq!(host.outcome(members[1].id()), "overridden");
    members[2].stop().ok();
    host.assert_value(&first_value);
    members[0].stop().ok();
    host.assert_value(&other);
    members[1].stop().ok();
    host.assert_as_before();
}

/// Two values in one request: the one that fits is not applied without the one that does not.
#[test]
fn a_refusal_applies_nothing_else_of_the_request() {
    let host = Host::of(BACKLOG);
    let mut holder = Bare::new(&host.sandbox, "holder");
    host.ask(&holder, &host.another(1), &[]).ok();
    let mut late = Bare::new(&host.sandbox, "late");
    let before = host.sandbox.sysctl(&late.netns(), "net/mptcp/stale_loss_cnt");
    let more = ["--sysctl", "stale_loss_cnt=9", "--limit", "subflows=7"];
    assert_eq!(host.ask(&late, &host.another(2), &more).code, Some(3));
    assert_eq!(host.sandbox.sysctl(&late.netns(), "net/mptcp/stale_loss_cnt"), before);
    let limits = host.sandbox.sh_in(&late.netns(), "ip mptcp limits show");
    assert!(limits.contains("subflows 2"), "{limits}");
    holder.stop().ok();
    late.stop().ok();
    host.assert_as_before();
}

// --- the dead hold nothing ------------------------------------------------------------------------------------------

#[test]
fn a_dead_holder_holds_nothing() {
    let host = Host::of(BACKLOG);
    let mut dead = Bare::new(&host.sandbox, "dead");
    host.ask(&dead, &host.another(1), &[]).ok();
    dead.kill();
    assert_eq!(host.sandbox.status_of(dead.id())["live"], false);
    assert_eq!(host.claims(), []);

    let mut next = Bare::new(&host.sandbox, "next");
    host.ask(&next, &host.another(2), &[]).ok();
    host.assert_value(&host.another(2));
    assert_eq!(host.page()["original"], host.original());
    assert_eq!(host.claims(), [(next.id().to_owned(), host.another(2))]);

    // Late news of the dead one takes nothing from the living.
    dead.poststop().ok();
    host.assert_value(&host.another(2));
    next.stop().ok();
    host.assert_as_before();
}

/// A namespace without a process that was deleted, and another one that has its name, and its inode number where the kernel
/// gives that away again.
#[test]
fn a_namespace_of_the_same_name_and_inode_is_another_one() {
    let host = Host::of(BACKLOG);
    let value = host.another(1);
    let wish = host.wish(&value);
    let apply = |value: &str| {
        let wish = host.wish(value);
        host.sandbox.hook(&["apply", "--netns", "/run/netns/lab", &wish[0], &wish[1]])
    };
    host.sandbox.sh("ip netns add lab");
    host.sandbox.hook(&["apply", "--netns", "/run/netns/lab", &wish[0], &wish[1]]).ok();
    assert_eq!(host.sandbox.status_of("lab")["live"], true);
    let inode = || host.sandbox.sh("stat -L -c %i /run/netns/lab");
    let before = inode();
    for _ in 0..50 {
        host.sandbox.sh("ip netns del lab; ip netns add lab");
        if inode() == before {
            break;
        }
    }
    assert_eq!(host.sandbox.status_of("lab")["live"], false, "inode {before}, now {}", inode());
    assert_eq!(host.claims(), []);
    // The new one may ask for something else, and the value of before the first of ours is still known.
    apply(&host.another(2)).ok();
    host.assert_value(&host.another(2));
    assert_eq!(host.page()["original"], host.original());
    assert_eq!(host.sandbox.status_of("lab")["live"], true);
    host.sandbox.sh("ip netns del lab; ip netns add lab");
    host.sandbox.hook(&["release", "--stale"]).ok();
    host.assert_as_before();
}

/// A release where the host's value cannot be read, as in a namespace for management: nothing is forgotten, and repair puts
/// it back in the host's.
#[test]
fn a_value_that_cannot_be_read_from_there_keeps_its_original() {
    let host = Host::of(BACKLOG);
    let first = Bare::new(&host.sandbox, "first");
    host.ask(&first, &host.another(1), &[]).ok();
    let program = hook().display().to_string();
    let elsewhere = |arguments: &[&str]| {
        let argv = [&["unshare", "--net", program.as_str()], arguments].concat();
        host.sandbox.run(&argv)
    };
    let outcome = elsewhere(&["release", first.id()]);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    let said = one_line(&outcome);
    for part in [first.id(), BACKLOG, "cannot be read from here", host.original(), "mptcp-hook repair"] {
        assert!(said.contains(part), "`{part}` is not in {said}");
    }
    host.assert_value(&host.another(1));
    host.assert_conflict(first.id(), host.original(), &host.another(1), &[], "drift");
    assert_eq!(host.page()["original"], host.original());
    assert_eq!(host.claims(), []);
    let said = elsewhere(&["repair"]).fails_with(1);
    assert!(said.contains("cannot be read from here"), "{said}");
    assert_eq!(host.page()["original"], host.original());
    host.sandbox.hook(&["repair"]).ok();
    host.assert_as_before();
}

#[test]
fn release_stale_restores_what_a_killed_container_left() {
    let host = Host::of(BACKLOG);
    let mut dead = Bare::new(&host.sandbox, "dead");
    let mut alive = Bare::new(&host.sandbox, "alive");
    host.ask(&alive, &host.another(1), &[]).ok();
    host.ask(&dead, &host.another(2), &["--on-conflict", "override"]).ok();
    dead.kill();
    host.assert_value(&host.another(2));
    host.sandbox.hook(&["release", "--stale"]).ok();
    host.assert_value(&host.another(1));
    assert_eq!(host.outcome(alive.id()), "applied");

    alive.kill();
    host.sandbox.hook(&["release", "--stale"]).ok();
    host.assert_as_before();
}

/// What a dead container left behind must not pass for the value that was asked for.
#[test]
fn shared_means_that_the_value_is_in_force() {
    let host = Host::of(BACKLOG);
    let mut dead = Bare::new(&host.sandbox, "dead");
    host.ask(&dead, &host.another(1), &[]).ok();
    dead.kill();
    let mut next =
        Bare::new(&host.sandbox, "next").annotation(&format!("mptcp-hook/sysctl.{BACKLOG}"), host.original());
    let outcome = next.oci(&[]);
    match outcome.code {
        Some(0) => host.assert_value(host.original()),
        code => assert_eq!(code, Some(3), "{outcome}"),
    }
    next.stop().ok();
    host.sandbox.hook(&["release", "--stale"]).ok();
    host.assert_as_before();
}

#[test]
fn a_poststop_for_an_id_that_lives_again_does_nothing_and_says_so() {
    let host = Host::of(BACKLOG);
    let mut container = Bare::new(&host.sandbox, "web");
    host.ask(&container, &host.another(1), &[]).ok();
    let outcome = container.poststop();
    assert!(outcome.stderr.contains("alive"), "{outcome}");
    outcome.ok();
    host.assert_value(&host.another(1));
    container.stop().ok();
    host.assert_as_before();
}

#[test]
fn a_new_life_of_an_id_carries_the_original_over() {
    let host = Host::of(BACKLOG);
    let first = Bare::new(&host.sandbox, "web");
    host.ask(&first, &host.another(1), &[]).ok();
    let second = first.restarted();
    host.ask(&second, &host.another(2), &[]).ok();
    host.assert_value(&host.another(2));
    assert_eq!(host.page()["original"], host.original());
    assert_eq!(host.claims(), [(second.id().to_owned(), host.another(2))]);

    // A third life that does not ask for it any more gives it back.
    let mut third = second.restarted();
    third.oci(&["--limit", "subflows=4"]).ok();
    host.assert_value(host.original());
    third.stop().ok();
    host.assert_as_before();
}

// --- somebody else changes it ---------------------------------------------------------------------------------------

#[test]
fn a_foreign_change_is_shown_and_left_alone() {
    let host = Host::of(BACKLOG);
    let (ours, foreign) = (host.another(1), host.another(5));
    let mut container = Bare::new(&host.sandbox, "web");
    host.ask(&container, &ours, &[]).ok();
    host.value.set(&foreign);
    let page = host.page();
    assert_eq!((&page["drifted"], &page["present"]), (&json!(true), &json!(foreign)), "{page:#}");
    let table = host.sandbox.hook(&["status"]).ok();
    assert!(table.contains(&foreign), "{table}");

    let outcome = container.stop();
    assert!(outcome.stderr.contains(&foreign), "{outcome}");
    outcome.ok();
    host.assert_value(&foreign);
    host.assert_conflict(container.id(), &ours, &foreign, &[], "drift");
    host.sandbox.assert_ledger_is_empty();
}

#[test]
fn a_foreign_change_is_the_original_of_what_comes_next() {
    let host = Host::of(BACKLOG);
    let foreign = host.another(5);
    let mut first = Bare::new(&host.sandbox, "first");
    host.ask(&first, &host.another(1), &[]).ok();
    host.value.set(&foreign);
    let mut second = Bare::new(&host.sandbox, "second");
    host.ask(&second, &host.another(1), &[]).ok();
    host.assert_value(&host.another(1));
    first.stop().ok();
    host.assert_value(&host.another(1));
    second.stop().ok();
    host.assert_value(&foreign);
    host.sandbox.assert_ledger_is_empty();
}

/// Whoever relies on it or overrides it and leaves does not put an older claim in its place.
#[test]
fn an_older_claim_does_not_come_back_over_a_foreign_change() {
    let host = Host::of(BACKLOG);
    let (ours, foreign, other) = (host.another(1), host.another(5), host.another(2));
    let mut first = Bare::new(&host.sandbox, "first");
    host.ask(&first, &ours, &[]).ok();
    host.value.set(&foreign);

    let mut second = Bare::new(&host.sandbox, "second");
    host.ask(&second, &foreign, &[]).ok();
    host.assert_conflict(second.id(), &ours, &foreign, &[first.id()], "drift");
    assert_eq!(host.outcome(first.id()), "overridden");
    assert_eq!(host.outcome(second.id()), "shared");
    assert_eq!((&host.page()["value"], &host.page()["drifted"]), (&json!(foreign), &json!(false)));
    let again = host.ask(&second, &foreign, &[]);
    assert!(again.stderr.contains("nothing had to be changed"), "{again}");
    assert_eq!(host.sandbox.conflicts().len(), 1);

    let overridden_for_a_while = |name: &str| {
        let mut third = Bare::new(&host.sandbox, name);
        host.ask(&third, &other, &["--on-conflict", "override"]).ok();
        host.assert_value(&other);
        third.stop().ok();
    };
    overridden_for_a_while("third");
    host.assert_value(&foreign);
    second.stop().ok();
    host.assert_value(&foreign);
    overridden_for_a_while("fourth");
    host.assert_value(&foreign);

    // Asked for again, it is no older one.
    let again = Bare::new(&host.sandbox, "again");
    host.ask(&again, &ours, &[]).ok();
    host.assert_value(&ours);
    overridden_for_a_while("fifth");
    host.assert_value(&ours);
    { again }.stop().ok();
    host.assert_value(&ours);
    first.stop().ok();
    host.assert_value(&foreign);
    host.sandbox.assert_ledger_is_empty();
}

// --- whose wish it is -----------------------------------------------------------------------------------------------

fn annotation_for(key: &str) -> String {
    format!("mptcp-hook/sysctl.{key}")
}

/// The container's author gets what is there already, and holds nobody back with it.
#[test]
fn an_annotation_that_the_policy_does_not_list_only_shares() {
    let host = Host::of(BACKLOG);
    let refused = Bare::new(&host.sandbox, "greedy").annotation(&annotation_for(BACKLOG), &host.another(1)).oci(&[]);
    assert_eq!(refused.code, Some(3), "{refused}");
    let line = one_line(&refused);
    for part in ["greedy", BACKLOG, "config.toml", "[annotations.sysctls]"] {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
    host.assert_as_before();
    host.assert_conflict(&host.sandbox.name("greedy"), &host.another(1), host.original(), &[], "refused");

    let mut humble = Bare::new(&host.sandbox, "humble").annotation(&annotation_for(BACKLOG), host.original());
    humble.oci(&[]).ok();
    assert_eq!(host.outcome(humble.id()), "shared");
    assert_eq!(host.sandbox.status()["settings"], json!([]), "a claim without the policy's word");

    let mut admin = Bare::new(&host.sandbox, "admin");
    host.ask(&admin, &host.another(1), &[]).ok();
    host.assert_value(&host.another(1));
    humble.stop().ok();
    host.assert_value(&host.another(1));
    admin.stop().ok();
    host.assert_as_before();
}

#[test]
fn a_listed_value_is_allowed_to_annotations_and_claimed() {
    let host = Host::of(BACKLOG);
    let (listed, other) = (host.another(1), host.another(2));
    host.sandbox.patient_policy(&format!("[annotations.sysctls]\n\"{BACKLOG}\" = [{listed}]\n"));
    let mut web = Bare::new(&host.sandbox, "web").annotation(&annotation_for(BACKLOG), &listed);
    web.oci(&[]).ok();
    host.assert_value(&listed);
    assert_eq!(host.claims(), [(web.id().to_owned(), listed.clone())]);

    let greedy = Bare::new(&host.sandbox, "greedy").annotation(&annotation_for(BACKLOG), &other);
    let refused = greedy.oci(&[]);
    assert_eq!(refused.code, Some(3), "{refused}");
    // It is held now, so that the administrator too has to say what shall happen.
    let admin = Bare::new(&host.sandbox, "admin");
    assert_eq!(host.ask(&admin, &other, &[]).code, Some(3));
    host.assert_conflict(admin.id(), &other, &listed, &[web.id()], "refused");
    web.stop().ok();
    host.assert_as_before();
}

#[test]
fn an_annotation_overrides_only_with_the_policys_word_and_value() {
    let host = Host::of(BACKLOG);
    let (held, wanted) = (host.another(1), host.another(2));
    let mut holder = Bare::new(&host.sandbox, "holder");
    host.ask(&holder, &held, &[]).ok();
    let mut late = Bare::new(&host.sandbox, "late")
        .annotation(&annotation_for(BACKLOG), &wanted)
        .annotation("mptcp-hook/on-conflict", "override");
    let key = |value: &str| format!("[annotations.sysctls]\n\"{BACKLOG}\" = [{value}]\n");
    for policy in [
        String::new(),
        "[annotations]\noverride = true\n".into(),
        key(&wanted),
        format!("[annotations]\noverride = true\n{}", key(&host.another(3))),
        // The administrator's default says what happens on conflicts, not that authors may do it.
        format!("on-conflict = \"override\"\n{}", key(&wanted)),
    ] {
        host.sandbox.patient_policy(&policy);
        let outcome = late.oci(&[]);
        assert_eq!(outcome.code, Some(3), "with the policy\n{policy}\n{outcome}");
        host.assert_value(&held);
    }
    host.assert_conflict(late.id(), &wanted, &held, &[holder.id()], "refused");
    // Nor does the administrator's word on the hook's line act for the author's wish.
    host.sandbox.patient_policy(&key(&wanted));
    assert_eq!(late.oci(&["--on-conflict", "override"]).code, Some(3));
    host.assert_value(&held);

    host.sandbox.patient_policy(&format!("[annotations]\noverride = true\n{}", key(&wanted)));
    late.oci(&[]).ok();
    host.assert_value(&wanted);
    assert_eq!(host.outcome(holder.id()), "overridden");
    late.stop().ok();
    host.assert_value(&held);
    holder.stop().ok();
    host.assert_as_before();
}

/// The container's author cannot turn the administrator's wish into a weapon.
#[test]
fn an_annotations_on_conflict_never_steers_an_administrators_wish() {
    let host = Host::of(BACKLOG);
    host.sandbox.patient_policy("[annotations]\noverride = true\n");
    let held = host.another(1);
    let mut holder = Bare::new(&host.sandbox, "holder");
    host.ask(&holder, &held, &[]).ok();
    for word in ["override", "warn"] {
        let late = Bare::new(&host.sandbox, "late").annotation("mptcp-hook/on-conflict", word);
        assert_eq!(host.ask(&late, &host.another(2), &[]).code, Some(3), "{word}");
        host.assert_value(&held);
    }
    holder.stop().ok();
    host.assert_as_before();
}

#[test]
fn the_policys_on_conflict_stands_where_nobody_says_otherwise() {
    let host = Host::of(BACKLOG);
    host.sandbox.patient_policy("on-conflict = \"warn\"\n");
    let held = host.another(1);
    let mut holder = Bare::new(&host.sandbox, "holder");
    host.ask(&holder, &held, &[]).ok();
    let mut late = Bare::new(&host.sandbox, "late");
    host.ask(&late, &host.another(2), &[]).ok();
    assert_eq!(host.outcome(late.id()), "kept");
    let strict = Bare::new(&host.sandbox, "strict");
    assert_eq!(host.ask(&strict, &host.another(2), &["--on-conflict", "refuse"]).code, Some(3));
    host.assert_value(&held);
    late.stop().ok();
    holder.stop().ok();
    host.assert_as_before();
}

/// `linux.sysctl` is written by the runtime after the hook.
#[test]
fn runc_linux_sysctl_that_differs_is_a_conflict_before_anything_is_applied() {
    let host = Host::of(BACKLOG);
    let message = host
        .bundle("split", &host.another(1), &["--sysctl", "stale_loss_cnt=4"])
        .runtime_sysctl("net.mptcp.stale_loss_cnt", "6")
        .refused(Runtime::Runc);
    assert!(message.contains("exit status 3"), "{message}");
    assert!(message.contains("stale_loss_cnt"), "{message}");
    host.assert_as_before();
}

// --- by hand --------------------------------------------------------------------------------------------------------

#[test]
fn another_value_by_hand_replaces_the_claim_and_keeps_the_original() {
    let host = Host::of(BACKLOG);
    let mut container = Bare::new(&host.sandbox, "web");
    host.ask(&container, &host.another(1), &[]).ok();
    let [flag, wish] = host.wish(&host.another(2));
    host.sandbox.hook(&["apply", container.id(), &flag, &wish]).ok();
    host.assert_value(&host.another(2));
    assert_eq!(host.claims(), [(container.id().to_owned(), host.another(2))]);
    assert_eq!(host.page()["original"], host.original());

    // The hook, called again, keeps to what was said by hand.
    host.ask(&container, &host.another(1), &[]).ok();
    host.assert_value(&host.another(2));
    container.stop().ok();
    host.assert_as_before();
}

#[test]
fn release_by_hand_lets_a_living_container_go() {
    let host = Host::of(BACKLOG);
    let container = Bare::new(&host.sandbox, "web");
    host.ask(&container, &host.another(1), &[]).ok();
    host.sandbox.hook(&["release", container.id()]).ok();
    host.assert_as_before();
}

#[test]
fn dry_run_names_the_holder_and_writes_nothing() {
    let host = Host::of(BACKLOG);
    let mut holder = Bare::new(&host.sandbox, "holder");
    host.ask(&holder, &host.another(1), &[]).ok();
    let before = host.sandbox.status();
    let late = Bare::new(&host.sandbox, "late");
    let [flag, wish] = host.wish(&host.another(2));
    let pid = late.pid().to_string();
    let outcome = host.sandbox.hook(&["apply", "--pid", &pid, &flag, &wish, "--dry-run"]);
    assert_eq!(outcome.code, Some(3), "{outcome}");
    assert!(outcome.stdout.contains(holder.id()) && outcome.stdout.contains(BACKLOG), "{outcome}");
    assert_eq!(host.sandbox.status(), before);
    host.assert_value(&host.another(1));
    holder.stop().ok();
    host.assert_as_before();
}

// --- failures -------------------------------------------------------------------------------------------------------

/// The kernel takes no rmem_max this small. What was done before it is undone, and nothing after it is begun.
#[test]
fn a_value_that_the_kernel_rejects_undoes_the_steps_before_it() {
    let host = Host::of(BACKLOG);
    let rmem = HostValue::of_sysctl("net/core/rmem_max");
    let container = Bare::new(&host.sandbox, "web");
    let more = ["--sysctl", &format!("{RMEM}=1"), "--sysctl", "stale_loss_cnt=9", "--limit", "subflows=5"];
    let outcome = host.ask(&container, &host.another(1), &more);
    assert_eq!(outcome.code, Some(1), "{outcome}");
    let line = one_line(&outcome);
    for part in [container.id(), "rmem_max", "nothing was changed"] {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
    host.assert_as_before();
    assert_eq!(rmem.current(), rmem.original());
    let limits = host.sandbox.sh_in(&container.netns(), "ip mptcp limits show");
    assert!(limits.contains("subflows 2"), "{limits}");

    // The claim that another one has is not lost by it, either.
    let mut holder = Bare::new(&host.sandbox, "holder");
    host.ask(&holder, &host.another(1), &[]).ok();
    let more = ["--sysctl", &format!("{RMEM}=1"), "--on-conflict", "override"];
    assert_eq!(host.ask(&container, &host.another(2), &more).code, Some(1));
    host.assert_value(&host.another(1));
    assert_eq!(host.outcome(holder.id()), "applied");
    assert_eq!(host.claims(), [(holder.id().to_owned(), host.another(1))]);
    holder.stop().ok();
    host.assert_as_before();
}

/// A setting of the namespace that fails after the host's: both are as before, the container's own claim included.
#[test]
fn a_failure_in_the_namespace_puts_the_hosts_value_and_claim_back() {
    let host = Host::of(BACKLOG);
    let mut container = Bare::new(&host.sandbox, "web");
    host.ask(&container, &host.another(1), &[]).ok();
    let before = host.sandbox.status();
    let [flag, wish] = host.wish(&host.another(2));
    let arguments = ["apply", container.id(), &flag, &wish, "--sysctl", "scheduler=none_such"];
    let outcome = host.sandbox.hook(&arguments);
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(one_line(&outcome).contains("scheduler"), "{outcome}");
    host.assert_value(&host.another(1));
    assert_eq!(host.sandbox.status(), before);
    container.stop().ok();
    host.assert_as_before();
}

#[test]
fn a_module_parameter_that_is_not_there_is_a_clear_error() {
    let host = Host::of(BACKLOG);
    let container = Bare::new(&host.sandbox, "web");
    let outcome = host.ask(&container, &host.another(1), &["--module", "mptcp_fullmesh.num_subflows=2"]);
    assert_eq!(outcome.code, Some(1), "{outcome}");
    let line = one_line(&outcome);
    for part in [container.id(), "mptcp_fullmesh.num_subflows", "not loaded"] {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
    host.assert_as_before();
}

/// A user namespace of its own has no say over the host's values, whatever the hook's arguments are.
#[test]
fn in_a_user_namespace_the_hosts_values_are_out_of_reach() {
    let host = Host::of(RMEM);
    let before = host.value.current();
    let script = format!(
        "printf '{{\"ociVersion\":\"1.0.2\",\"id\":\"rootless\",\"status\":\"created\",\"pid\":%s,\"bundle\":\"/b\"}}' $pid |
           {} oci --state-dir /run/user-ledger --sysctl {RMEM}={}",
        hook().display(),
        host.another(1)
    );
    let outcome = in_user_namespace(&host.sandbox, &script);
    assert_eq!(outcome.code, Some(3), "{outcome}");
    assert!(outcome.stderr.contains("user namespace"), "{outcome}");
    assert_eq!(host.value.current(), before);
}

// --- a hook that is killed ------------------------------------------------------------------------------------------

/// The system calls by which the hook changes something.
const CHANGING: [&str; 6] = ["write", "rename", "unlink", "mkdir", "flock", "setns"];

/// Whatever the moment at which a hook is killed: the next one finishes or undoes its work, and no original is lost.
#[test]
fn a_hook_killed_at_any_moment_loses_no_original() {
    require("strace", "strace");
    let host = Host::of(BACKLOG);
    let holder_value = host.another(1);
    let mut moments = 0;
    for call in CHANGING {
        for count in 1.. {
            let mut holder = Bare::new(&host.sandbox, "holder");
            host.ask(&holder, &holder_value, &[]).ok();
            let mut victim = Bare::new(&host.sandbox, "victim");
            let inject = format!("inject={call}:signal=KILL:when={count}");
            let program = hook().display().to_string();
            let wish = host.wish(&host.another(2));
            let argv = [
                "strace",
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                &inject,
                &program,
                "oci",
                &wish[0],
                &wish[1],
                "--on-conflict",
                "override",
                "--sysctl",
                "stale_loss_cnt=9",
            ];
            let outcome = host.sandbox.run_with_input(&argv, victim.state().to_string().as_bytes());
            let killed = outcome.code != Some(0);
            host.sandbox.hook(&["status"]).ok();
            if count % 2 == 0 {
                // The next start of the same container finishes it.
                host.ask(&victim, &host.another(2), &["--on-conflict", "override"]).ok();
                host.assert_value(&host.another(2));
                victim.stop().ok();
            } else {
                // Nobody comes: the container is dead, and somebody tidies up.
                victim.kill();
                host.sandbox.hook(&["release", "--stale"]).ok();
            }
            let value = host.value.current();
            assert_eq!(value, holder_value, "killed at {call} {count}: {:#}", host.sandbox.status());
            assert_eq!(host.outcome(holder.id()), "applied", "killed at {call} {count}");
            holder.stop().ok();
            assert_eq!(host.value.current(), host.original(), "killed at {call} {count}");
            host.sandbox.assert_ledger_is_empty();
            if !killed {
                break;
            }
            moments += 1;
        }
    }
    assert!(moments > 20, "the hook was killed at {moments} moments only");
}

/// A release that is killed is finished by the next one.
#[test]
fn a_release_killed_at_any_moment_is_finished_by_the_next() {
    require("strace", "strace");
    let host = Host::of(BACKLOG);
    let mut moments = 0;
    for call in CHANGING {
        for count in 1.. {
            let mut container = Bare::new(&host.sandbox, "web");
            host.ask(&container, &host.another(1), &[]).ok();
            container.kill();
            let inject = format!("inject={call}:signal=KILL:when={count}");
            let program = hook().display().to_string();
            let argv = ["strace", "-qq", "-o", "/dev/null", "-e", &inject, &program, "release", "--stale"];
            let outcome = host.sandbox.run(&argv);
            host.sandbox.hook(&["status"]).ok();
            host.sandbox.hook(&["release", "--stale"]).ok();
            assert_eq!(host.value.current(), host.original(), "killed at {call} {count}");
            host.sandbox.assert_ledger_is_empty();
            if outcome.code == Some(0) {
                break;
            }
            moments += 1;
        }
    }
    assert!(moments > 10, "the release was killed at {moments} moments only");
}

// --- many at once ---------------------------------------------------------------------------------------------------

/// Twelve hooks that want two values at the same time: the first to come decides, nobody hangs, nothing is left.
#[test]
fn hooks_at_the_same_time_agree_on_one_value() {
    let host = Host::of(BACKLOG);
    let values = [host.another(1), host.another(2)];
    let mut members: Vec<Bare> = (0..12).map(|n| Bare::new(&host.sandbox, &format!("m{n}"))).collect();
    let states = host.sandbox.dir();
    for member in &members {
        std::fs::write(states.join(member.id()), member.state().to_string()).expect("writing a state");
    }
    let mut script = String::new();
    for (n, member) in members.iter().enumerate() {
        let (program, state) = (hook(), states.join(member.id()));
        let wish = host.wish(&values[n % 2]).join(" ");
        script += &format!(
            "{{ {} oci {wish} <{} 2>/dev/null && echo 0 || echo $?; }} >{}.code &\n",
            program.display(),
            state.display(),
            state.display()
        );
    }
    host.sandbox.sh(&(script + "wait"));
    let code = |member: &Bare| {
        let text = std::fs::read_to_string(states.join(format!("{}.code", member.id()))).expect("an exit status");
        text.trim().to_owned()
    };
    let present = host.value.current();
    let winner = values.iter().position(|value| *value == present).expect("one of the two values");
    for (n, member) in members.iter().enumerate() {
        assert_eq!(code(member), if n % 2 == winner { "0" } else { "3" }, "{}", member.id());
    }
    assert_eq!(host.claims().len(), 6);
    for member in &mut members {
        member.stop().ok();
    }
    host.assert_as_before();
}

/// A claim as the test expects it: member, value, number of the step in which it was made.
struct Expected {
    claims: Vec<(usize, String, usize)>,
    in_force: String,
    original: String,
}

impl Expected {
    fn claim(&mut self, member: usize, value: &str, step: usize) {
        self.claims.retain(|(other, ..)| *other != member);
        self.claims.push((member, value.to_owned(), step));
        self.in_force = value.to_owned();
    }

    /// The value of the one who leaves stays while somebody else has it, else the newest claim comes back.
    fn leave(&mut self, member: usize) {
        let before = self.claims.len();
        self.claims.retain(|(other, ..)| *other != member);
        let held = self.claims.iter().any(|(_, value, _)| *value == self.in_force);
        if before != self.claims.len() && !held {
            let newest = self.claims.iter().max_by_key(|(.., step)| *step);
            self.in_force = newest.map_or_else(|| self.original.clone(), |(_, value, _)| value.clone());
        }
    }
}

/// Some hundred steps in an order that nobody thought of, each held against a model of a page.
#[test]
fn any_order_of_steps_ends_where_it_should() {
    let host = Host::of(BACKLOG);
    let values: Vec<String> = (0..4).map(|n| host.another(n)).collect();
    for seed in 1..=3_u64 {
        let mut random = seed;
        // Knuth, The Art of Computer Programming, volume 2, 3.3.4: the multiplier of MMIX.
        let mut next = |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % below
        };
        let start = |n: usize| Bare::new(&host.sandbox, &format!("s{seed}m{n}"));
        let mut members: Vec<Option<Bare>> = (0..4).map(|n| Some(start(n))).collect();
        let original = host.original().to_owned();
        let mut expected = Expected { claims: Vec::new(), in_force: original.clone(), original };
        let mut story = Vec::new();
        for step in 0..60 {
            let n = next(members.len());
            let member = members[n].take().expect("every member is there between two steps");
            let value = &values[next(values.len())];
            let others_differ = expected.claims.iter().any(|(other, held, _)| *other != n && held != value);
            let differs = *value != expected.in_force;
            let (what, member) = match next(6) {
                0 | 1 => {
                    let outcome = host.ask(&member, value, &[]);
                    // Several hook entries of one instance have to agree.
                    let known = expected.claims.iter().find(|(other, ..)| *other == n).map(|(_, held, _)| held.clone());
                    let code = match known {
                        Some(held) if held != *value => 2,
                        _ if differs && others_differ => 3,
                        _ => 0,
                    };
                    assert_eq!(outcome.code, Some(code), "seed {seed} {story:#?}\n{n} asks for {value}: {outcome}");
                    if code == 0 && !expected.claims.iter().any(|(other, ..)| *other == n) {
                        expected.claim(n, value, step);
                    }
                    (format!("asks for {value}: {code}"), member)
                }
                2 => {
                    let [flag, wish] = host.wish(value);
                    let pid = member.pid().to_string();
                    let arguments = ["apply", "--pid", &pid, &flag, &wish, "--on-conflict", "override"];
                    // Unknown to the ledger it would get another id.
                    if expected.claims.iter().any(|(other, ..)| *other == n) {
                        host.sandbox.hook(&arguments).ok();
                        expected.claim(n, value, step);
                    }
                    (format!("by hand {value}"), member)
                }
                3 => {
                    let mut member = member;
                    member.stop().ok();
                    expected.leave(n);
                    ("stops".to_owned(), start(n))
                }
                4 => {
                    let mut member = member;
                    member.kill();
                    host.sandbox.hook(&["release", "--stale"]).ok();
                    expected.leave(n);
                    ("is killed".to_owned(), start(n))
                }
                _ => {
                    // The new life comes before anybody has said that the old one is over.
                    let member = member.restarted();
                    host.ask(&member, value, &["--on-conflict", "override"]).ok();
                    expected.leave(n);
                    expected.claim(n, value, step);
                    (format!("is restarted and overrides with {value}"), member)
                }
            };
            members[n] = Some(member);
            story.push(format!("{n} {what}"));
            let now = host.value.current();
            assert_eq!(now, expected.in_force, "seed {seed} {story:#?}; {:#}", host.sandbox.status());
            let mut claims: Vec<_> = expected
                .claims
                .iter()
                .map(|(n, value, _)| (host.sandbox.name(&format!("s{seed}m{n}")), value.clone()))
                .collect();
            claims.sort();
            let status = host.sandbox.status();
            if claims.is_empty() {
                assert_eq!(status["settings"], json!([]), "seed {seed} {story:#?}");
            } else {
                assert_eq!(host.claims(), claims, "seed {seed} {story:#?}");
                assert_eq!(host.page()["original"], host.original(), "seed {seed} {story:#?}");
            }
        }
        for member in members.iter_mut().flatten() {
            member.stop().ok();
        }
        host.assert_as_before();
    }
}

/// The engine's patience counts from the hook's start, and so does the deadline: beside a held lock, a hook that got its
/// state late waits for what is left of it alone.
#[test]
fn a_state_that_comes_late_leaves_less_of_the_deadline() {
    const DEADLINE: Duration = Duration::from_millis(3500);
    const LATE: Duration = Duration::from_millis(3000);
    let host = Host::of(BACKLOG);
    let mut holder = Bare::new(&host.sandbox, "holder");
    host.ask(&holder, &host.another(1), &[]).ok();
    host.sandbox.policy("deadline = 3.5\n");
    let held = hold_lock(&host);
    let container = Bare::new(&host.sandbox, "web");
    let network = host.sandbox.open_netns(&Netns::Host);
    let program = hook().display().to_string();
    let wish = host.wish(&host.another(1));
    let argv: Vec<&str> = [&program, "oci"].into_iter().chain(wish.iter().map(String::as_str)).collect();
    // One that began to count with the state waits the whole deadline from there, however fast the machine is. A slow one
    // gets another try.
    let is_in_time = |_| {
        let start = Instant::now();
        let mut hook = host.sandbox.start_in(&network, &argv, |command| {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        });
        let mut stdin = hook.stdin.take().expect("a pipe");
        std::thread::sleep(LATE);
        let late = Instant::now();
        let given = stdin.write_all(container.state().to_string().as_bytes());
        drop(stdin);
        let (code, _, said) = hook.output();
        let (waited, took) = (late.elapsed(), start.elapsed());
        assert_eq!(code, Some(1), "{said}");
        let is_taken = given.is_ok() && !said.contains("was not closed in time");
        assert!(!is_taken || said.contains("in use by") && said.contains("deadline"), "{said}");
        assert!(!is_taken || took >= DEADLINE, "it gave up after {took:?}: {said}");
        is_taken && waited < DEADLINE
    };
    assert!((0..10).any(is_in_time), "the deadline counts from the state's arrival");
    drop(held);
    host.sandbox.patient_policy("");
    holder.stop().ok();
    host.assert_as_before();
}

/// Holds the lock of the host's setting until it is dropped.
fn hold_lock(host: &Host) -> impl Sized {
    let lock = "/run/mptcp-hook/locks/setting:net~core~netdev_max_backlog";
    let held = host.sandbox.spawn(&["flock", "--close", lock, "sh", "-c", "echo locked >/run/locked; sleep 1000"]);
    wait_until("the lock", LIMIT, || host.sandbox.outside("/run/locked").exists());
    held
}

/// A lock that somebody holds for ever ends in an error at the deadline, not in a container that never starts.
#[test]
fn a_lock_that_is_held_ends_in_an_error_at_the_deadline() {
    let host = Host::of(BACKLOG);
    let mut holder = Bare::new(&host.sandbox, "holder");
    host.ask(&holder, &host.another(1), &[]).ok();
    host.sandbox.policy("deadline = 7.0\n");
    let held = hold_lock(&host);
    let container = Bare::new(&host.sandbox, "web");
    // Without the policy's word it would have been five seconds. A slow machine gets another try.
    let is_in_time = |_| {
        let start = Instant::now();
        let outcome = host.ask(&container, &host.another(1), &[]);
        let took = start.elapsed();
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert!(took >= Duration::from_secs(7), "it took {took:?}");
        let line = one_line(&outcome);
        assert!(line.contains("in use by") && line.contains("deadline"), "{line}");
        took < Duration::from_secs(9)
    };
    assert!((0..10).any(is_in_time), "it waits for longer than the deadline");
    assert_eq!(host.claims(), [(holder.id().to_owned(), host.another(1))]);
    drop(held);
    host.sandbox.patient_policy("");
    holder.stop().ok();
    host.assert_as_before();
}
