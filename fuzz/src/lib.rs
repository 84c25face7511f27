//! What has to hold whatever comes in; shared by the fuzz targets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use mptcp_hook::error::exit_status;
use mptcp_hook::front::Apply;
use mptcp_hook::instance::{ContainerId, Door, Instance};
use mptcp_hook::kernel::netns::NetnsId;
use mptcp_hook::kernel::{Address, Change, Facts, Kind, Limits, Link, RouteState, Routing, Seen, SeenSetting};
use mptcp_hook::ledger::record::{
    ConflictOutcome, Interface, Outcome, OwnedEndpoint, OwnedSetting, Record, Scope, State, VERSION,
};
use mptcp_hook::plan::{Holder, HostSetting, Input, Plan, scope};
use mptcp_hook::policy::Policy;
use mptcp_hook::report;
use mptcp_hook::request::pattern::Pattern;
use mptcp_hook::request::setting::{self, SettingKey};
use mptcp_hook::request::{LIMIT_MAX, Rank, Request, What, Wish};

/// The longest message that a person has to read, in bytes. What is quoted in it is cut to a line.
const MESSAGE_MAX: usize = 4096;

/// A directory of this process alone, below TMPDIR, whose owner is to remove it.
pub fn scratch() -> &'static Path {
    static SCRATCH: OnceLock<PathBuf> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("mptcp-hook-fuzz.{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path).expect("TMPDIR can be written");
        path
    })
}

/// Some text for a person is one line, without anything that a terminal obeys.
pub fn one_line(text: &str) {
    assert!(!text.contains(char::is_control), "a control character in {text:?}");
    assert!(text.len() <= MESSAGE_MAX, "a message of {} bytes: {text:?}", text.len());
}

/// An error of a parser is wrong usage, refused or failed, and one line.
pub fn one_line_error(error: &anyhow::Error) {
    let text = format!("{error:#}");
    assert!(!text.is_empty());
    one_line(&text);
}

/// An error that must be wrong usage: nothing but the input was looked at.
pub fn usage_error(error: &anyhow::Error) {
    one_line_error(error);
    assert_eq!(exit_status(error), 2, "{error:#}");
}

/// Several lines for a person, without anything else that a terminal obeys.
pub fn lines(text: &str) {
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "a control character in {text:?}");
}

/// A key names one file below `/proc/sys/net` or in an MPTCP module's parameters, and is read back from its own words.
pub fn key(key: &SettingKey) {
    let path = key.path();
    let below = match key {
        SettingKey::Sysctl(_) => path.starts_with("/proc/sys/net"),
        SettingKey::Module(module, _) => {
            assert!(module == "mptcp" || module.starts_with("mptcp_"), "{module}");
            path.starts_with(format!("/sys/module/{module}/parameters")) && path.components().count() == 6
        }
    };
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    // `components` folds what is doubled; the text must not have needed that.
    assert!(below && plain && path.components().collect::<PathBuf>().as_os_str() == path.as_os_str(), "{path:?}");
    assert_eq!(SettingKey::try_from(key.to_string()).as_ref(), Ok(key));
}

/// One thing asked for is within bounds, can be said in one line, and comes back from the ledger as it went in.
pub fn what(what: &What) {
    one_line(&what.subject());
    if !matches!(what, What::Setting(..)) {
        one_line(&what.value());
    }
    match what {
        What::Interface(pattern, flags) => {
            assert_eq!(pattern.as_str().parse::<Pattern>().as_ref(), Ok(pattern));
            assert_eq!(flags.to_string().parse().as_ref(), Ok(flags), "{flags:?}");
            assert!(pattern.as_str() != "lo" && !pattern.as_str().contains('/'));
        }
        What::Limit(_, n) => assert!(*n <= LIMIT_MAX),
        What::Setting(name, value) => {
            key(name);
            assert!(!value.contains(char::is_control), "{value:?}");
            assert_eq!(setting::value(name, value).as_ref(), Ok(value));
            assert!(setting::same(name, value, value));
        }
        What::OnConflict(word) => assert_eq!(word.to_string().parse().as_ref(), Ok(word)),
        What::Gateway(pattern, gateway) => {
            assert_eq!(pattern.as_str().parse::<Pattern>().as_ref(), Ok(pattern));
            assert!(!gateway.is_unspecified() && !gateway.is_multicast() && !gateway.is_loopback(), "{gateway}");
        }
        What::Routes(word) => assert_eq!(word.to_string().parse().as_ref(), Ok(word)),
        What::Follow(word) => assert_eq!(word.to_string().parse().as_ref(), Ok(word)),
        What::Name(name) => assert!(!name.is_empty() && !name.contains('/')),
    }
    let text = serde_json::to_string(what).expect("serializes");
    assert_eq!(serde_json::from_str::<What>(&text).expect("is read back"), *what);
}

/// Wishes as above, each of a rank that its source can have.
pub fn wishes(wishes: &[Wish], ranks: &[Rank]) {
    for wish in wishes {
        what(&wish.what);
        one_line(&wish.source.to_string());
        assert!(ranks.contains(&wish.source.rank), "{:?}", wish.source);
    }
}

/// A request comes back from the ledger as it went in, and adding its wishes again changes nothing.
pub fn request(request: &Request) {
    let text = serde_json::to_string(request).expect("serializes");
    assert_eq!(serde_json::from_str::<Request>(&text).expect("is read back"), *request);
    let mut again = request.clone();
    again.extend(request.wishes().iter().cloned()).expect("agrees with itself");
    assert_eq!(again, *request);
    assert_eq!(request.clone().on_top_of(request).expect("agrees with itself").wishes().len(), request.wishes().len());
}

/// A call's request, container and namespace.
pub fn apply(call: &Apply) {
    request(&call.request);
    container(&call.container);
    call.notes.iter().for_each(|note| one_line(note));
    if let Some(path) = &call.netns_path {
        assert!(path.starts_with('/'));
    }
}

/// A container's id is part of a file name and of log lines.
pub fn container(container: &ContainerId) {
    let name = container.key();
    one_line(&name);
    assert!(!name.contains('/') && !name.starts_with('.') && name.len() < 200, "{name:?}");
}

/// What a container's author asks for on a host without a policy file stays in the container: whatever the kernel and
/// the ledger are like, the plan changes nothing of the host's, nothing of another container's, and of the namespace's
/// own settings net.mptcp.* alone.
pub fn author_stays_inside(request: &Request) {
    wishes(request.wishes(), &[Rank::Annotation, Rank::Runtime]);
    let policy = Policy::default();
    for world in worlds(request) {
        let input = Input {
            request,
            policy: &policy,
            facts: &world.facts,
            container: "ours",
            previous: None,
            siblings: &world.siblings,
            departed: &[],
            host: &world.host,
            time: 0,
            follows: false,
            hurries: false,
        };
        match Plan::make(&input) {
            Ok(plan) => stays_inside(request, &plan, &world),
            Err(error) => one_line_error(&error),
        }
    }
}

fn stays_inside(request: &Request, plan: &Plan, world: &World) {
    let kind = world.facts.kind;
    let held = |key: &SettingKey| {
        world.siblings.iter().flat_map(|record| &record.settings).any(|own| own.claimed && own.key == *key)
    };
    for step in &plan.steps {
        match &step.change {
            Change::HostSetting { key, .. } => panic!("the author writes the host's {key}"),
            Change::NetnsSysctl { key, .. } => {
                let path = key.sysctl_path().expect("a sysctl");
                assert!(path.starts_with("net/mptcp/") && kind == Kind::Upstream, "the author writes {key}");
                assert!(scope::is_known_per_namespace(path, kind) && !held(key), "the author writes {key}");
            }
            Change::AddRoute(..) | Change::DeleteRoute(..) | Change::AddRule(_) | Change::DeleteRule(_) => {
                panic!("the author gets routes: {}", step.change);
            }
            Change::Limits(limits) => {
                assert!(limits.subflows <= LIMIT_MAX && limits.add_addr_accepted <= LIMIT_MAX, "{limits:?}");
            }
            Change::AddEndpoint(endpoint) | Change::SetEndpointFlags(endpoint) | Change::DeleteEndpoint(endpoint) => {
                assert!(kind == Kind::Upstream && endpoint.ifindex != SIBLINGS_LINK, "{}", step.change);
            }
            Change::LinkFlags { index, mask, bits, .. } => {
                assert!(kind == Kind::MptcpOrg && *index != SIBLINGS_LINK, "{}", step.change);
                assert!(mask & !0x38_0000 == 0 && bits & !mask == 0, "{}", step.change);
            }
        }
    }
    assert!(plan.claims.is_empty(), "the author holds the host's {:?}", plan.claims);
    for own in &plan.settings {
        assert!(!matches!(own.outcome, Outcome::Overrode | Outcome::Overridden), "{own:?}");
        let is_ours = own.scope == Scope::Netns && own.key.sysctl_path().is_some_and(|p| p.starts_with("net/mptcp/"));
        assert!(!own.claimed || is_ours, "{own:?}");
    }
    for conflict in &plan.conflicts {
        assert!(conflict.outcome != ConflictOutcome::Overrode, "{conflict:?}");
    }
    lines(&report::text::plan(request, plan));
    serde_json::to_string(&plan.shown(request)).expect("serializes");
}

/// Something that a plan may meet.
struct World {
    facts: Facts,
    siblings: Vec<Record>,
    host: BTreeMap<SettingKey, HostSetting>,
}

/// The interface that a sibling relies on.
const SIBLINGS_LINK: u32 = 9;

/// Where the value of a setting can be seen and written.
fn seen(key: &SettingKey, kind: Kind, all_writable: bool) -> impl Fn(&str) -> SeenSetting {
    let in_target = key.sysctl_path().is_some_and(|path| all_writable || scope::is_known_per_namespace(path, kind));
    move |value| {
        let host = Seen::Writable(value.into());
        SeenSetting { target: if in_target { host.clone() } else { Seen::Absent }, host }
    }
}

fn worlds(request: &Request) -> Vec<World> {
    let mut worlds = Vec::new();
    // Kernel, everything writable in the namespace, host root, somebody else there.
    for (kind, all_writable, is_root, shared) in [
        (Kind::Upstream, false, true, false),
        (Kind::Upstream, true, true, true),
        (Kind::Upstream, true, false, false),
        (Kind::MptcpOrg, false, true, true),
    ] {
        let mut settings = BTreeMap::new();
        let mut host = BTreeMap::new();
        let mut held = Vec::new();
        let names = ["pm_type", "path_manager", "enabled", "mptcp_enabled"];
        for name in names.iter().filter(|name| name.starts_with("mptcp_") == (kind == Kind::MptcpOrg)) {
            let key = SettingKey::Sysctl(format!("net/mptcp/{name}"));
            let seen = seen(&key, kind, all_writable)(if *name == "path_manager" { "kernel" } else { "1" });
            settings.insert(key, seen);
        }
        for (key, (_, wanted)) in request.settings() {
            // Of the same form, so that the plan comes to the question who may.
            let other = vec!["other"; wanted.split_whitespace().count()].join(" ");
            settings.entry(key.clone()).or_insert_with(|| seen(key, kind, all_writable)(&other));
            let claims = vec![Holder { container: "oci.a.0".into(), id: "a".into(), value: other.clone() }];
            let page = HostSetting { original: other.clone(), value: other.clone(), claims, dead: Vec::new() };
            host.insert(key.clone(), page);
            held.push((key.clone(), other));
        }
        let facts = Facts {
            kind,
            release: "6.18.0".into(),
            initial_user_namespace: is_root,
            host_reachable: true,
            target_is_host: false,
            links: [(1, "lo"), (2, "eth0"), (3, "eth1"), (4, "eth0.100"), (SIBLINGS_LINK, "eth9")]
                .map(|(index, name)| Link {
                    index,
                    name: name.into(),
                    flags: if name == "lo" { libc::IFF_LOOPBACK as u32 } else { 0x1003 },
                    kind: None,
                    mtu: 1500,
                })
                .into(),
            addresses: [
                (2, "10.0.1.2"),
                (3, "10.0.2.2"),
                (3, "fd00:2::2"),
                (4, "10.0.4.2"),
                (SIBLINGS_LINK, "10.0.9.2"),
            ]
            .map(|(ifindex, ip)| Address { ifindex, ip: ip.parse().unwrap(), prefix: 24, scope: 0, flags: 0x80 })
            .into(),
            endpoints: Vec::new(),
            limits: Some(Limits { subflows: 2, add_addr_accepted: 0 }),
            default_route_links: vec![2],
            settings,
            congestion_controls: vec!["cubic".into()],
            elsewhere: Default::default(),
            routes: BTreeMap::new(),
            routing: Some(Routing::default()),
        };
        let siblings = if shared { vec![sibling(kind, &held)] } else { Vec::new() };
        let mut world = World { facts, siblings, host };
        if shared && kind == Kind::Upstream {
            // What the sibling relies on is in force.
            let own = world.siblings[0].interfaces[0].endpoints[0].clone();
            world.facts.endpoints.push(mptcp_hook::kernel::Endpoint {
                id: own.id,
                address: own.address,
                port: None,
                ifindex: own.index,
                flags: own.flags,
            });
        }
        if !shared {
            world.facts.links.retain(|link| link.index != SIBLINGS_LINK);
            world.facts.addresses.retain(|address| address.ifindex != SIBLINGS_LINK);
        }
        worlds.push(world);
    }
    worlds
}

/// Another container in the same namespace: eth9 is never a path for it (raw number, which no wish but an equal one has),
/// and it relies on the present value of everything that is asked for.
fn sibling(kind: Kind, held: &[(SettingKey, String)]) -> Record {
    let setting = |(key, value): &(SettingKey, String)| OwnedSetting {
        key: key.clone(),
        value: value.clone(),
        scope: Scope::Netns,
        outcome: Outcome::Applied,
        original: Some(value.clone()),
        claimed: true,
        source: "the hook argument".into(),
    };
    let endpoint =
        OwnedEndpoint { id: 3, address: "10.0.9.2".parse().unwrap(), index: SIBLINGS_LINK, flags: 2, original: None };
    let interface = Interface {
        name: "eth9".into(),
        // As no wish has it.
        flags: vec!["held".into()],
        source: "the hook argument".into(),
        state: State::Applied,
        reason: None,
        route: RouteState::Ok,
        endpoints: if kind == Kind::Upstream { vec![endpoint] } else { Vec::new() },
        link: None,
        routing: None,
        corrected: None,
        last: None,
    };
    Record {
        version: VERSION,
        instance: instance("sibling"),
        name: "sibling".into(),
        runtime: "oci".into(),
        kernel: kind,
        request: Request::default(),
        at_work: None,
        interfaces: vec![interface],
        leaving: Vec::new(),
        leaving_tables: BTreeSet::new(),
        limits: None,
        settings: held.iter().map(setting).collect(),
        warnings: Vec::new(),
        lasting_warnings: 0,
        unsettled: false,
        time: 1,
    }
}

/// An instance that is not alive on this machine.
fn instance(id: &str) -> Instance {
    Instance {
        container: ContainerId { door: Door::Oci, engine: "/b".into(), id: id.into() },
        boot_id: "another boot".into(),
        pid: Some(1),
        start_time: Some(1),
        netns: NetnsId { inode: 1, cookie: None },
        netns_path: None,
    }
}
