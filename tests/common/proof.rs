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
    let report = send(paths.address(), 10_000_000, Some(RATE)).finish(LIMIT);
    assert!(report.mptcp);
    assert_eq!(report.subflows, 2);
    assert_eq!(server.wait_received(1), ["received 10000000 bytes mptcp=yes subflows=2"]);
    let join = capture.wait_join(second);
    assert_eq!((join.source, join.backup), (source.into(), true));
    let (main, backup) = (capture.payload_received(first), capture.payload_received(second));
    assert!(main >= 10_000_000, "payload over {first}: {main} bytes");
    assert!(backup * 20 < main, "payload over the backup path {second}: {backup} bytes, over {first}: {main}");
    let (main, backup) = (paths.received(first), paths.received(second));
    assert!(backup * 20 < main, "the interfaces counted {main} bytes on {first}, {backup} on {second}");

    // Slow enough that the cut comes before the end also where starting a program takes long. What had not arrived over
    // the first path by then can only come over the second.
    let before = [first, second].map(|interface| capture.payload_received(interface));
    let mut transfer = send(paths.address(), 8_000_000, Some(2_000_000));
    transfer.wait_sent(1_000_000);
    paths.cut(first);
    assert!(transfer.finish(LIMIT).mptcp);
    let [main, backup] = [first, second].map(|interface| capture.payload_received(interface));
    let left = 8_000_000_u64.saturating_sub(main - before[0]);
    assert!(left > 500_000, "the cut came too late to show anything: only {left} bytes were left");
    let moved = backup - before[1];
    assert!(moved >= left, "{left} bytes were left at the cut, only {moved} went over {second}");
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
