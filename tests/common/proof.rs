//! What every runtime has to show: the endpoint in the kernel, the entry in `status`, and that eth1 really is a backup
//! path.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;

use super::{Capture, LIMIT, Netns, Outcome, Prio, Sandbox, Sender, Server, TwoPaths, wait_for};

/// Slow enough that the second subflow is there long before the end, in bytes per second.
pub const RATE: u64 = 20_000_000;

/// The kernel has exactly one endpoint there: `address` on eth1 with `names` as its flags.
#[track_caller]
pub fn assert_only_endpoint(sandbox: &Sandbox, netns: &Netns, address: impl Into<IpAddr>, names: &[&str]) {
    let endpoints = sandbox.endpoints(netns);
    assert_eq!(endpoints.len(), 1, "{endpoints:?}");
    assert_eq!(endpoints[0].address, address.into());
    assert_eq!(endpoints[0].flags, names);
    assert_eq!(endpoints[0].dev.as_deref(), Some("eth1"));
}

/// eth1 of a container's entry in `status --json`, which has it in `state`.
#[track_caller]
pub fn eth1_of(container: &Value, state: &str) -> Value {
    let interfaces = container["interfaces"].as_array().expect("interfaces is a list");
    let eth1 = interfaces.iter().find(|interface| interface["name"] == "eth1");
    let eth1 = eth1.unwrap_or_else(|| panic!("no eth1 in {container:#}"));
    assert_eq!(eth1["state"], state, "{container:#}");
    eth1.clone()
}

/// Sends real Multipath TCP: the join on the second path has the backup bit, next to nothing goes there while the first
/// works, and a transfer during which the first is cut ends over the second. `first` and `second` are the server's
/// interfaces, `send` sends from inside the container, `source` is its address on the second path.
#[track_caller]
pub fn assert_backup_path(
    paths: &TwoPaths,
    server: &Server,
    capture: &Capture,
    [first, second]: [&str; 2],
    source: impl Into<IpAddr>,
    send: impl Fn(IpAddr, u64, Option<u64>) -> Sender,
) {
    // Whoever was so busy that the transfer was over before the join sends once more, and takes half a minute.
    for (number, rate) in [RATE, 350_000].into_iter().enumerate() {
        let report = send(paths.address(), 10_000_000, Some(rate)).finish(LIMIT);
        assert!(report.mptcp);
        let said = server.wait_received(number + 1).remove(number);
        let is_joined = report.subflows == 2 && said == "received 10000000 bytes mptcp=yes subflows=2";
        if is_joined {
            break;
        }
        assert!(number == 0, "{report:?}, {said}");
    }
    let join = capture.wait_join(second);
    assert_eq!((join.source, join.backup), (source.into(), true));
    let (main, backup) = (capture.payload_received(first), capture.payload_received(second));
    assert!(main >= 10_000_000, "payload over {first}: {main} bytes");
    assert!(backup * 20 < main, "payload over the backup path {second}: {backup} bytes, over {first}: {main}");
    let (main, backup) = (paths.received(first), paths.received(second));
    assert!(backup * 20 < main, "the interfaces counted {main} bytes on {first}, {backup} on {second}");

    assert_fails_over(paths, capture, [first, second], |bytes, rate| send(paths.address(), bytes, Some(rate)), || {});
}

/// A transfer during which the first path is cut ends over the second; gives the bytes of payload that went there. `send`
/// starts one; when it is well under way and before the cut, `looks` looks at whatever else matters.
///
/// What had not arrived over the first path at the cut can only come over the second. Whoever was so busy that next to
/// nothing was left has another one, which takes more than a minute.
#[track_caller]
pub fn assert_fails_over(
    paths: &TwoPaths,
    capture: &Capture,
    [first, second]: [&str; 2],
    send: impl Fn(u64, u64) -> Sender,
    looks: impl Fn(),
) -> u64 {
    const BYTES: u64 = 8_000_000;
    let arrived = || [first, second].map(|interface| capture.payload_received(interface));
    for rate in [2_000_000, 100_000] {
        let before = arrived();
        let mut transfer = send(BYTES, rate);
        transfer.wait_sent(BYTES / 8);
        looks();
        paths.cut(first);
        assert!(transfer.finish(LIMIT).mptcp);
        let [main, moved] = [0, 1].map(|path| arrived()[path] - before[path]);
        let left = BYTES.saturating_sub(main);
        assert!(moved >= left, "{left} bytes were left at the cut, only {moved} went over {second}");
        if left > BYTES / 4 {
            return moved;
        }
        paths.mend(first);
    }
    panic!("the cut came too late to show anything");
}

/// Live connections learn of each change by MP_PRIO, in both directions, and the endpoint stays the same. `apply` asks for
/// what it is given.
#[track_caller]
pub fn assert_switches(
    sandbox: &Sandbox,
    netns: &Netns,
    limit: Duration,
    prios: impl Fn() -> Vec<Prio>,
    apply: impl Fn(&str) -> Outcome,
) {
    assert_eq!(prios(), []);
    let id = sandbox.endpoints(netns)[0].id;
    for (wish, names, backup) in
        [("eth1=subflow", &["subflow"][..], false), ("eth1=backup", &["backup", "subflow"][..], true)]
    {
        let seen = prios().len();
        apply(wish).ok();
        assert_only_endpoint(sandbox, netns, [10, 0, 2, 2], names);
        let prio = wait_for("an MP_PRIO option", limit, || prios().get(seen).cloned());
        assert_eq!(prio.backup, backup, "after {wish}: {prio:?}");
        assert!(prio.source.to_string().ends_with(".2"), "the container sends it: {prio:?}");
    }
    assert_eq!(sandbox.endpoints(netns)[0].id, id, "the endpoint was replaced");
}
