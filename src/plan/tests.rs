//! What is planned for every rule, on both kernel kinds, without touching any kernel but a fake one.

use super::*;
use crate::error::exit_status;
use crate::instance::{ContainerId, Door, Instance};
use crate::kernel::fake::{FakeHost, HOME};
use crate::kernel::netns::NetnsId;
use crate::kernel::{Endpoint, Kernel, Limits, Rule, TableRoute};
use crate::ledger::record::{LimitPair, Outcome, OwnedLink, Scope, VERSION, Writer};
use crate::ledger::setting::Written;
use crate::policy::config;
use crate::request::{self, What};

const NS: u64 = 7;
const ADMIN: Rank = Rank::HookArgument;
const AUTHOR: Rank = Rank::Annotation;

type Asked = Result<What, String>;

fn interface(name: &str, flags: &str) -> Asked {
    request::interface(name, flags).map(|mut wishes| wishes.remove(0))
}

fn sysctl(key: &str, value: &str) -> Asked {
    request::sysctl(key, value)
}

fn module(key: &str, value: &str) -> Asked {
    request::module(key, value)
}

fn limit(name: &str, value: &str) -> Asked {
    request::limit(name, value)
}

fn on_conflict(what: OnConflict) -> Asked {
    Ok(What::OnConflict(what))
}

fn key(text: &str) -> SettingKey {
    SettingKey::try_from(text.to_string()).unwrap()
}

fn address(text: &str) -> std::net::IpAddr {
    text.parse().unwrap()
}

/// Everything that a plan is made from.
struct Scene {
    host: FakeHost,
    request: Request,
    policy: Policy,
    previous: Option<Record>,
    siblings: Vec<Record>,
    pages: BTreeMap<SettingKey, HostSetting>,
    follows: bool,
}

impl Scene {
    /// A container with `eth0` and `eth1`.
    fn on(host: FakeHost) -> Self {
        host.add_two_paths(NS);
        Self::in_namespace_of(host)
    }

    fn in_namespace_of(host: FakeHost) -> Self {
        Self {
            host,
            request: Request::default(),
            policy: Policy::default(),
            previous: None,
            siblings: Vec::new(),
            pages: BTreeMap::new(),
            follows: false,
        }
    }

    /// The other ends of all links are up.
    fn carriers(&self) {
        let up = |link: &mut Link| link.flags |= libc::IFF_LOWER_UP as u32;
        self.host.netns(NS, |netns| netns.links.iter_mut().for_each(up));
    }

    /// Makes plans as the agent from now on.
    fn followed(mut self) -> Self {
        self.follows = true;
        self
    }

    fn mptcp_org() -> Self {
        Self::on(FakeHost::mptcp_org().with_fullmesh())
    }

    fn upstream() -> Self {
        Self::on(FakeHost::upstream())
    }

    fn ask(mut self, rank: Rank, asked: Asked) -> Self {
        self.request.add(Wish::new(asked.unwrap(), Source::new(rank, format!("the {rank:?}")))).unwrap();
        self
    }

    fn policy(mut self, text: &str) -> Self {
        let directory = tempfile::tempdir_in("/run").expect("these tests need files of root's: run them as root");
        let path = directory.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        self.policy = config::load(&path, true, true).unwrap();
        self
    }

    /// Somebody else's claims on a host-wide value.
    fn held(mut self, setting: &str, original: &str, value: &str, claims: &[(&str, &str)]) -> Self {
        let claims = claims
            .iter()
            .map(|(id, value)| Holder { container: format!("oci.{id}"), id: (*id).into(), value: (*value).into() })
            .collect();
        let page = HostSetting { original: original.into(), value: value.into(), claims, dead: Vec::new() };
        self.pages.insert(key(setting), page);
        self
    }

    fn sibling(mut self, id: &str, rank: Rank, asked: Asked) -> Self {
        let mut other = Self::in_namespace_of(self.host.clone()).ask(rank, asked);
        other.siblings = self.siblings.clone();
        let plan = other.plan().unwrap();
        other.perform(&plan);
        self.siblings.push(other.record(id, &plan));
        self
    }

    fn plan(&self) -> Result<Plan> {
        let mut keys: Vec<SettingKey> = self.request.settings().into_keys().cloned().collect();
        keys.extend(self.previous.iter().flat_map(Record::all_netns_claims).map(|owned| owned.key.clone()));
        let mut facts = self.host.kernel(NS).facts(&keys)?;
        let mut kernel = self.host.kernel(NS);
        let wants_routes = self.request.asked_routes().is_some();
        if wants_routes {
            facts.routing = Some(kernel.routing()?);
        }
        if self.follows || wants_routes {
            for (ip, index) in to_look_up(&self.request, &facts) {
                facts.routes.insert((ip, index), kernel.route(ip, index)?);
            }
        }
        Plan::make(&Input {
            request: &self.request,
            policy: &self.policy,
            facts: &facts,
            container: "web",
            previous: self.previous.as_ref(),
            siblings: &self.siblings,
            departed: &[],
            host: &self.pages,
            time: 1,
            follows: self.follows,
            hurries: false,
        })
    }

    /// The error, which must be one line and of this exit status.
    fn error(&self, status: u8) -> String {
        let error = self.plan().map(|plan| plan.steps).expect_err("was planned");
        let text = format!("{error:#}");
        assert_eq!(exit_status(&error), status, "{text}");
        assert!(!text.contains('\n'), "{text}");
        text
    }

    /// Does what the plan says.
    fn perform(&self, plan: &Plan) {
        let mut kernel = self.host.kernel(NS);
        for step in &plan.steps {
            kernel.perform(&step.change).unwrap();
        }
        kernel.confirm(&plan.steps.iter().map(|step| &step.change).collect::<Vec<_>>()).unwrap();
    }

    fn undo(&self, plan: &Plan) {
        let mut kernel = self.host.kernel(NS);
        for step in plan.steps.iter().rev() {
            kernel.perform(step.undo.as_ref().expect("a step that is undone")).unwrap();
        }
    }

    fn record(&self, id: &str, plan: &Plan) -> Record {
        let instance = Instance {
            container: ContainerId::new(Door::Oci, "", id).unwrap(),
            boot_id: "this".into(),
            pid: Some(1),
            start_time: Some(1),
            netns: NetnsId { inode: NS, cookie: Some(1) },
            netns_path: None,
        };
        Record {
            version: VERSION,
            instance,
            name: id.into(),
            runtime: "oci".into(),
            kernel: Kind::Upstream,
            request: self.request.clone(),
            at_work: None,
            interfaces: plan.interfaces.clone(),
            leaving: Vec::new(),
            leaving_tables: BTreeSet::new(),
            limits: plan.limits,
            settings: plan.settings.clone(),
            warnings: plan.warnings.clone(),
            time: 1,
            lasting_warnings: plan.lasting_warnings,
            unsettled: plan.unsettled,
        }
    }

    /// Does it and makes it what the ledger knows, as after an apply.
    fn applied(mut self) -> Self {
        let plan = self.plan().unwrap();
        assert_eq!(plan.refusal(), None);
        self.perform(&plan);
        for claim in &plan.claims {
            let page =
                HostSetting { original: claim.original.clone(), value: claim.value.clone(), ..HostSetting::default() };
            let known = self.pages.remove(&claim.key);
            self.pages.insert(claim.key.clone(), HostSetting { claims: known.map_or(vec![], |k| k.claims), ..page });
        }
        self.previous = Some(self.record("web", &plan));
        self
    }
}

fn changes(plan: &Plan) -> Vec<String> {
    plan.steps.iter().map(|step| step.change.to_string()).collect()
}

fn entry<'a>(plan: &'a Plan, name: &str) -> &'a Interface {
    plan.interfaces.iter().find(|interface| interface.name == name).expect("the interface is in the plan")
}

fn owned<'a>(plan: &'a Plan, setting: &str) -> &'a OwnedSetting {
    plan.settings.iter().find(|owned| owned.key == key(setting)).expect("the setting is in the plan")
}

fn warned(plan: &Plan, words: &[&str]) -> bool {
    plan.warnings.iter().any(|warning| words.iter().all(|word| warning.contains(word)))
}

fn link_bits(plan: &Plan) -> Vec<(u32, u32)> {
    let bits = |step: &Step| match step.change {
        Change::LinkFlags { bits, mask, .. } => Some((bits, mask)),
        _ => None,
    };
    plan.steps.iter().filter_map(bits).collect()
}

fn endpoint_flags(plan: &Plan) -> Vec<(String, u32)> {
    let flags = |step: &Step| match &step.change {
        Change::AddEndpoint(e) => Some((e.address.to_string(), e.flags)),
        _ => None,
    };
    plan.steps.iter().filter_map(flags).collect()
}

// Rule 3: flags.

#[test]
fn flags_on_mptcp_org_are_interface_bits() {
    for (flags, bits) in [("backup", 0x10_0000), ("subflow,backup", 0x10_0000), ("off", 0x8_0000)] {
        let plan = Scene::mptcp_org().ask(AUTHOR, interface("eth1", flags)).plan().unwrap();
        assert_eq!(link_bits(&plan), [(bits, 0x18_0000)], "{flags}");
        assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
        let link = entry(&plan, "eth1").link.clone().unwrap();
        assert_eq!(link, OwnedLink { index: 3, mask: 0x18_0000, bits, original: 0 });
    }
    for (raw, bits) in [("0x101003", 0x10_0000), ("0x81003", 0x8_0000), ("1052675", 0x10_0000)] {
        let plan = Scene::mptcp_org().ask(AUTHOR, interface("eth1", raw)).plan().unwrap();
        assert_eq!(link_bits(&plan), [(bits, 0x18_0000)], "{raw}");
    }
    for flags in ["subflow", "default", "0x1003"] {
        let scene = Scene::mptcp_org().ask(AUTHOR, interface("eth1", flags));
        assert!(scene.plan().unwrap().steps.is_empty(), "{flags} is what it is already");
        scene.host.set_link_flags(NS, 3, 0x10_0000, 0x18_0000).unwrap();
        let plan = scene.plan().unwrap();
        assert_eq!(link_bits(&plan), [(0, 0x18_0000)], "{flags} clears both bits");
        assert_eq!(entry(&plan, "eth1").link.as_ref().unwrap().original, 0x10_0000);
    }
}

#[test]
fn what_mptcp_orgs_path_manager_decides_cannot_be_asked_for() {
    for flags in ["signal", "fullmesh", "laminar", "subflow,signal", "signal,backup", "backup,fullmesh"] {
        let error = Scene::mptcp_org().ask(ADMIN, interface("eth1", flags)).error(2);
        assert!(error.contains("path manager") && error.contains("eth1"), "{error}");
    }
    for name in ["subflows", "add_addr_accepted"] {
        let error = Scene::mptcp_org().ask(ADMIN, limit(name, "2")).error(2);
        assert!(error.contains("num_subflows"), "{error}");
    }
}

#[test]
fn handover_is_written_where_it_may_be_kept_and_an_error_upstream() {
    let plan = Scene::on(FakeHost::open_mptcp_router().with_fullmesh()).ask(ADMIN, interface("eth1", "0x201003"));
    assert_eq!(link_bits(&plan.plan().unwrap()), [(0x20_0000, 0x38_0000)]);
    let both = Scene::on(FakeHost::open_mptcp_router().with_fullmesh()).ask(ADMIN, interface("eth1", "0x301003"));
    assert_eq!(link_bits(&both.plan().unwrap()), [(0x30_0000, 0x38_0000)]);
    let error = Scene::upstream().ask(ADMIN, interface("eth1", "0x201003")).error(2);
    assert!(error.contains("handover") && error.contains("OpenMPTCProuter"), "{error}");
}

#[test]
fn default_takes_a_handover_bit_of_ours_back() {
    let mut scene = Scene::on(FakeHost::open_mptcp_router().with_fullmesh())
        .ask(Rank::CommandLine, interface("eth1", "0x201003"))
        .applied();
    scene.request = Request::default();
    let scene = scene.ask(Rank::CommandLine, interface("eth1", "default"));
    scene.perform(&scene.plan().unwrap());
    assert_eq!(scene.host.link_flags(NS, 3), 0x1003);
}

#[test]
fn flags_upstream_are_endpoint_flags() {
    for (asked, flags) in [
        ("backup", 2 | 4),
        ("subflow", 2),
        ("signal", 1),
        ("signal,backup", 1 | 4),
        ("subflow,signal", 1 | 2),
        ("fullmesh", 2 | 8),
        ("fullmesh,backup", 2 | 4 | 8),
        ("laminar", 32),
        ("0x101003", 2 | 4),
    ] {
        let plan = Scene::upstream().ask(AUTHOR, interface("eth1", asked)).plan().unwrap();
        assert_eq!(endpoint_flags(&plan), [("10.0.2.2".to_string(), flags)], "{asked}");
        let Change::AddEndpoint(endpoint) = &plan.steps.last().unwrap().change else { panic!("{:?}", plan.steps) };
        assert_eq!((endpoint.ifindex, endpoint.port), (3, None));
        assert_eq!(entry(&plan, "eth1").state, State::Applied);
    }
    for asked in ["off", "default", "0x81003", "0x1003"] {
        let plan = Scene::upstream().ask(AUTHOR, interface("eth1", asked)).plan().unwrap();
        assert!(plan.steps.is_empty() && plan.warnings.is_empty(), "{asked}: {plan:?}");
    }
}

#[test]
fn off_upstream_says_what_still_uses_the_interface() {
    let scene = Scene::upstream().ask(ADMIN, interface("eth0", "off"));
    let plan = scene.plan().unwrap();
    assert!(warned(&plan, &["eth0 is off", "default route"]), "{:?}", plan.warnings);
    let foreign = Endpoint { id: 1, address: address("10.0.1.2"), port: None, ifindex: 2, flags: 2 };
    scene.host.netns(NS, |netns| netns.endpoints.push(foreign));
    let plan = scene.plan().unwrap();
    assert!(warned(&plan, &["eth0 is off", "10.0.1.2", "somebody else"]), "{:?}", plan.warnings);
    assert!(plan.steps.is_empty(), "somebody else's endpoint is theirs");
}

#[test]
fn off_on_mptcp_org_says_that_connections_become_plain_tcp() {
    let plan = Scene::mptcp_org().ask(ADMIN, interface("eth0", "off")).plan().unwrap();
    assert!(warned(&plan, &["eth0", "default route", "plain TCP"]), "{:?}", plan.warnings);
}

#[test]
fn other_flags_give_back_an_endpoint_of_ours() {
    for other in ["off", "default"] {
        let mut scene = Scene::upstream().ask(Rank::CommandLine, interface("eth1", "backup")).applied();
        scene.request = Request::default();
        let scene = scene.ask(Rank::CommandLine, interface("eth1", other));
        let plan = scene.plan().unwrap();
        assert!(matches!(plan.steps.as_slice(), [Step { change: Change::DeleteEndpoint(_), .. }]), "{plan:?}");
        assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
    }
}

#[test]
fn other_flags_are_changed_in_place_where_the_kernel_can() {
    let mut scene = Scene::upstream().ask(Rank::CommandLine, interface("eth1", "backup")).applied();
    scene.request = Request::default();
    let scene = scene.ask(Rank::CommandLine, interface("eth1", "subflow"));
    let plan = scene.plan().unwrap();
    let [Step { change: Change::SetEndpointFlags(set), undo: Some(Change::SetEndpointFlags(back)), .. }] =
        plan.steps.as_slice()
    else {
        panic!("{plan:?}")
    };
    assert_eq!((set.flags, back.flags), (2, 6));
    assert!(set.id != 0);
    // subflow and signal cannot be exchanged in place: SET_FLAGS ignores them.
    let mut scene = scene;
    scene.request = Request::default();
    let scene = scene.ask(Rank::CommandLine, interface("eth1", "signal"));
    let plan = scene.plan().unwrap();
    assert!(matches!(plan.steps[0].change, Change::DeleteEndpoint(_)), "{plan:?}");
    assert!(matches!(plan.steps[1].change, Change::AddEndpoint(_)), "{plan:?}");
    let before = scene.host.state();
    scene.perform(&plan);
    scene.undo(&plan);
    assert_eq!(scene.host.state(), before);
}

// Warnings where flags cannot work.

#[test]
fn only_fullmesh_reads_the_flags() {
    for name in ["default", "ndiffports", "binder", "netlink"] {
        let scene = Scene::on(FakeHost::mptcp_org()).ask(AUTHOR, interface("eth1", "backup"));
        scene.host.set(HOME, "net.mptcp.mptcp_path_manager", name);
        assert!(warned(&scene.plan().unwrap(), &["path manager", name, "fullmesh"]), "{name}");
        let cured = scene.ask(ADMIN, sysctl("mptcp_path_manager", "fullmesh")).plan().unwrap();
        assert!(!warned(&cured, &["do nothing"]), "{:?}", cured.warnings);
    }
}

#[test]
fn schedulers_that_do_not_get_on_with_backup_are_named() {
    for (name, word) in [
        ("roundrobin", Some("ignores backup")),
        ("blest", Some("stalls")),
        ("ecf", Some("stalls")),
        ("redundant", None),
    ] {
        let scene = Scene::mptcp_org();
        scene.host.set(HOME, "net.mptcp.mptcp_scheduler", name);
        let backup = scene.ask(AUTHOR, interface("eth1", "backup"));
        let plan = backup.plan().unwrap();
        match word {
            Some(word) => assert!(warned(&plan, &[name, word]), "{name}: {:?}", plan.warnings),
            None => assert!(plan.warnings.is_empty(), "{:?}", plan.warnings),
        }
        let other = Scene::in_namespace_of(backup.host).ask(AUTHOR, interface("eth1", "off")).plan().unwrap();
        assert!(other.warnings.is_empty(), "{name} without backup: {:?}", other.warnings);
    }
    let asked = Scene::mptcp_org().ask(ADMIN, interface("eth1", "backup")).ask(ADMIN, sysctl("mptcp_scheduler", "ecf"));
    assert!(warned(&asked.plan().unwrap(), &["ecf", "stalls"]));
}

#[test]
fn disabled_mptcp_is_an_error() {
    let scene = Scene::mptcp_org().ask(ADMIN, interface("eth1", "backup"));
    scene.host.set(HOME, "net.mptcp.mptcp_enabled", "0");
    assert!(scene.error(1).contains("mptcp_enabled is 0"));
    let scene = Scene::upstream().ask(ADMIN, interface("eth1", "backup"));
    scene.host.set(NS, "net.mptcp.enabled", "0");
    assert!(scene.error(1).contains("net.mptcp.enabled is 0"));
    let plan = scene.ask(ADMIN, sysctl("enabled", "1")).plan().unwrap();
    assert_eq!(plan.steps[0].change.to_string(), "write net.mptcp.enabled = 1");
}

#[test]
fn a_ninth_address_on_mptcp_org_is_said() {
    let scene = Scene::mptcp_org().ask(ADMIN, interface("eth1", "backup"));
    (3..9).for_each(|n| scene.host.add_address(NS, 3, &format!("10.0.2.{n}")));
    assert!(scene.plan().unwrap().warnings.is_empty());
    scene.host.add_address(NS, 3, "10.0.2.9");
    let plan = scene.plan().unwrap();
    assert!(warned(&plan, &["9 IPv4", "8"]), "{:?}", plan.warnings);
}

#[test]
fn an_interface_that_is_not_there_is_pending() {
    for scene in [Scene::upstream(), Scene::mptcp_org()] {
        let plan = scene.ask(AUTHOR, interface("wlan*", "backup")).plan().unwrap();
        assert!(plan.steps.is_empty());
        assert_eq!(entry(&plan, "wlan*").state, State::Pending);
        assert!(entry(&plan, "wlan*").reason.is_some());
    }
    let scene = Scene::upstream().ask(AUTHOR, interface("eth2", "backup"));
    scene.host.add_link(NS, 4, "eth2", &[]);
    let plan = scene.plan().unwrap();
    assert_eq!(entry(&plan, "eth2").state, State::Pending, "it has no address yet");
    let plan = Scene::upstream().ask(Rank::PolicyDefault, interface("wlan*", "backup")).plan().unwrap();
    assert!(plan.interfaces.is_empty(), "a default asks for nothing that is not there");
}

#[test]
fn a_renamed_interface_gets_its_flags_back() {
    let scene = Scene::mptcp_org().ask(ADMIN, interface("eth1", "backup")).applied();
    scene.host.netns(NS, |netns| netns.links.iter_mut().filter(|l| l.index == 3).for_each(|l| l.name = "wan".into()));
    let plan = scene.plan().unwrap();
    assert_eq!(entry(&plan, "eth1").state, State::Pending);
    scene.perform(&plan);
    let given_back = scene.host.link_flags(NS, 3) == 0x1003;
    let remembered = plan.interfaces.iter().filter_map(|i| i.link.as_ref()).any(|link| link.index == 3);
    assert!(given_back || remembered, "nobody would give it back any more");
}

/// Its bits stand only in what was in force before a hook that was killed.
#[test]
fn what_a_killed_hook_had_to_give_back_is_given_back() {
    let mut scene = Scene::mptcp_org()
        .ask(ADMIN, interface("eth1", "backup"))
        .ask(ADMIN, sysctl("net.ipv4.tcp_syn_retries", "3"))
        .applied();
    let original = |scene: &Scene| {
        (scene.host.link_flags(NS, 3), scene.host.netns_value(NS, "net.ipv4.tcp_syn_retries")) == (0x1003, "6".into())
    };
    assert!(!original(&scene));
    let before = scene.previous.take().map(Box::new);
    scene.request = Request::default();
    scene = scene.ask(ADMIN, interface("eth0", "backup"));
    let writer = Writer { pid: 1, start_time: 1, follows: false, before, killed: Vec::new() };
    let killed = Record { at_work: Some(writer), ..scene.record("web", &scene.plan().unwrap()) };
    let keys = [key("net.ipv4.tcp_syn_retries")];
    let facts = scene.host.kernel(NS).facts(&keys).unwrap();
    let undone = undo::in_namespace(&killed, &[], &facts, 1, &mut Vec::new());
    assert_eq!(undone.len(), 2, "{undone:?}");
    scene.previous = Some(killed);
    let plan = scene.plan().unwrap();
    assert_eq!(link_bits(&plan), [(0x10_0000, 0x18_0000), (0, 0x18_0000)]);
    scene.perform(&plan);
    assert!(original(&scene), "{:?}", changes(&plan));
}

// Order of steps.

#[test]
fn steps_come_in_order() {
    let plan = Scene::mptcp_org()
        .ask(ADMIN, interface("eth1", "backup"))
        .ask(ADMIN, sysctl("net.ipv4.tcp_syn_retries", "3"))
        .ask(ADMIN, module("mptcp_fullmesh.num_subflows", "2"))
        .ask(ADMIN, sysctl("net.core.netdev_max_backlog", "2000"))
        .ask(ADMIN, sysctl("mptcp_scheduler", "redundant"))
        .plan()
        .unwrap();
    let expected = [
        "write net.core.netdev_max_backlog = 2000 (the whole host's)",
        "write net.mptcp.mptcp_scheduler = redundant (the whole host's)",
        "write module:mptcp_fullmesh.num_subflows = 2 (the whole host's)",
        "write net.ipv4.tcp_syn_retries = 3",
        "set flags of eth1 to 0x100000 (mask 0x180000)",
    ];
    assert_eq!(changes(&plan), expected);
    let plan = Scene::upstream()
        .ask(ADMIN, interface("eth1", "fullmesh"))
        .ask(ADMIN, sysctl("stale_loss_cnt", "3"))
        .ask(ADMIN, sysctl("net.core.netdev_max_backlog", "2000"))
        .plan()
        .unwrap();
    let expected = [
        "write net.core.netdev_max_backlog = 2000 (the whole host's)",
        "write net.mptcp.stale_loss_cnt = 3",
        "set limits subflows 2 add_addr_accepted 1",
        "add endpoint 10.0.2.2 subflow fullmesh dev index 3",
    ];
    assert_eq!(changes(&plan), expected);
}

#[test]
fn a_module_that_stays_loaded_is_reported() {
    let plan = Scene::on(FakeHost::mptcp_org()).ask(ADMIN, sysctl("mptcp_path_manager", "fullmesh")).plan().unwrap();
    assert!(warned(&plan, &["fullmesh", "module"]), "{:?}", plan.warnings);
}

#[test]
fn every_step_can_be_undone() {
    for scene in [
        Scene::upstream()
            .ask(ADMIN, interface("eth*", "fullmesh"))
            .ask(ADMIN, sysctl("scheduler", "default"))
            .ask(ADMIN, sysctl("net.ipv4.tcp_rmem", "4096 0x20000 8388608"))
            .ask(ADMIN, limit("subflows", "5")),
        Scene::mptcp_org()
            .ask(ADMIN, interface("eth0", "off"))
            .ask(ADMIN, interface("eth1", "backup"))
            .ask(ADMIN, sysctl("mptcp_enabled", "5"))
            .ask(ADMIN, module("mptcp_fullmesh.num_subflows", "2")),
    ] {
        let before = scene.host.state();
        let plan = scene.plan().unwrap();
        assert!(plan.steps.len() >= 4);
        scene.perform(&plan);
        assert_ne!(scene.host.state(), before);
        scene.undo(&plan);
        assert_eq!(scene.host.state(), before);
    }
}

// Rule 2: idempotent.

#[test]
fn the_same_again_is_no_step() {
    let other_end = address("10.0.1.2");
    let adopted = Scene::upstream().ask(ADMIN, interface("eth*", "backup"));
    let foreign = Endpoint { id: 9, address: other_end, port: None, ifindex: 2, flags: 2 };
    adopted.host.netns(NS, |netns| netns.endpoints.push(foreign));
    for scene in [
        adopted,
        Scene::upstream()
            .ask(AUTHOR, interface("eth*", "fullmesh"))
            .ask(AUTHOR, limit("subflows", "6"))
            .ask(AUTHOR, sysctl("stale_loss_cnt", "0x10"))
            .ask(ADMIN, sysctl("pm_type", "0"))
            .ask(ADMIN, sysctl("net.ipv4.tcp_rmem", "4096 131072 8388608"))
            .ask(ADMIN, sysctl("net.core.rmem_max", "4194304")),
        Scene::mptcp_org()
            .ask(ADMIN, interface("eth0", "subflow"))
            .ask(ADMIN, interface("eth1", "backup"))
            .ask(ADMIN, sysctl("mptcp_enabled", "9"))
            .ask(ADMIN, sysctl("mptcp_scheduler", "redundant"))
            .ask(ADMIN, module("mptcp_fullmesh.create_on_err", "1")),
    ] {
        let first = scene.plan().unwrap();
        let scene = scene.applied();
        let second = scene.plan().unwrap();
        assert_eq!(changes(&second), Vec::<String>::new());
        assert!(second.conflicts.is_empty(), "{:?}", second.conflicts);
        assert_eq!(second.settings, first.settings);
        assert_eq!(second.limits, first.limits);
        assert_eq!(second.warnings, first.warnings);
        let states = |plan: &Plan| -> Vec<_> {
            plan.interfaces.iter().map(|i| (i.name.clone(), i.state, i.link.clone())).collect()
        };
        assert_eq!(states(&second), states(&first));
        let originals = |plan: &Plan| -> Vec<_> {
            plan.interfaces.iter().flat_map(|i| &i.endpoints).map(|e| (e.address, e.flags, e.original)).collect()
        };
        assert_eq!(originals(&second), originals(&first));
    }
}

#[test]
fn an_equal_value_is_not_rewritten() {
    let plan = Scene::upstream()
        .ask(ADMIN, sysctl("stale_loss_cnt", "0x4"))
        .ask(ADMIN, sysctl("net.ipv4.tcp_rmem", "0x1000  131072 6291456"))
        .ask(ADMIN, sysctl("net.core.rmem_max", "0x34000"))
        .plan()
        .unwrap();
    assert!(plan.steps.is_empty(), "{:?}", changes(&plan));
}

#[test]
fn values_of_another_form_are_refused_before_writing() {
    for (setting, value) in [
        ("stale_loss_cnt", "5 junk"),
        ("stale_loss_cnt", "yes"),
        ("net.ipv4.tcp_rmem", "4096"),
        ("net.core.rmem_max", "1 2"),
        ("net.core.netdev_max_backlog", "0xZZ"),
    ] {
        Scene::upstream().ask(ADMIN, sysctl(setting, value)).error(2);
    }
}

#[test]
fn an_equal_foreign_endpoint_is_adopted_and_keeps_its_owner() {
    let foreign = Endpoint { id: 9, address: address("10.0.2.2"), port: None, ifindex: 3, flags: 6 };
    let scene = Scene::upstream().ask(ADMIN, interface("eth1", "backup"));
    scene.host.netns(NS, |netns| netns.endpoints.push(foreign.clone()));
    let plan = scene.plan().unwrap();
    assert!(plan.steps.is_empty(), "{:?}", changes(&plan));
    let adopted = &entry(&plan, "eth1").endpoints[0];
    assert_eq!((adopted.id, adopted.original), (9, Some(6)));
    // Other changeable flags are changed in place, and the owner's are remembered.
    scene.host.netns(NS, |netns| netns.endpoints[0].flags = 2);
    let plan = scene.plan().unwrap();
    assert!(matches!(&plan.steps[0].change, Change::SetEndpointFlags(e) if e.id == 9 && e.flags == 6));
    assert_eq!(entry(&plan, "eth1").endpoints[0].original, Some(2));
    // What SET_FLAGS would ignore with success is an error.
    scene.host.netns(NS, |netns| netns.endpoints[0].flags = 1);
    let error = scene.error(1);
    assert!(error.contains("10.0.2.2") && error.contains("ip mptcp endpoint delete id 9"), "{error}");
}

#[test]
fn fullmesh_of_somebody_elses_endpoint_is_not_left_out() {
    let scene = Scene::upstream().ask(ADMIN, interface("eth1", "backup"));
    let foreign = Endpoint { id: 9, address: address("10.0.2.2"), port: None, ifindex: 3, flags: 2 | 8 };
    scene.host.netns(NS, |netns| netns.endpoints.push(foreign));
    scene.perform(&scene.plan().unwrap());
    assert_eq!(scene.host.subflows_closed(), 0);
    assert_eq!(scene.host.netns(NS, |netns| netns.endpoints[0].flags), 2 | 4 | 8);
}

#[test]
fn an_implicit_endpoint_is_replaced() {
    let scene = Scene::upstream().ask(ADMIN, interface("eth1", "backup"));
    let implicit = Endpoint { id: 9, address: address("10.0.2.2"), port: None, ifindex: 0, flags: 16 };
    scene.host.netns(NS, |netns| netns.endpoints.push(implicit));
    let plan = scene.plan().unwrap();
    scene.perform(&plan);
    assert_eq!(scene.host.netns(NS, |netns| netns.endpoints.iter().map(|e| e.flags).collect::<Vec<_>>()), [6]);
    assert_eq!(entry(&plan, "eth1").endpoints[0].original, None);
}

// Rule 4: limits and more than eight addresses.

fn limits_after(scene: &Scene) -> Option<(u32, u32)> {
    let plan = scene.plan().unwrap();
    plan.steps.iter().find_map(|step| match step.change {
        Change::Limits(limits) => Some((limits.subflows, limits.add_addr_accepted)),
        _ => None,
    })
}

fn many(count: u32, flags: &str) -> Scene {
    let scene = Scene::upstream();
    (0..count).for_each(|n| scene.host.add_link(NS, 10 + n, &format!("wan{n}"), &[&format!("10.1.{n}.2")]));
    scene.ask(ADMIN, interface("wan*", flags))
}

#[test]
fn limits_are_raised_to_what_is_needed() {
    assert_eq!(limits_after(&many(1, "subflow")), None, "2 are there already");
    assert_eq!(limits_after(&many(2, "backup")), None);
    assert_eq!(limits_after(&many(3, "backup")), Some((3, 0)));
    assert_eq!(limits_after(&many(4, "signal")), Some((4, 0)));
    assert_eq!(limits_after(&many(1, "fullmesh")), Some((2, 1)));
    assert_eq!(limits_after(&many(8, "subflow")), Some((8, 0)));
    let both = many(3, "subflow").ask(ADMIN, interface("eth*", "signal"));
    assert_eq!(limits_after(&both), Some((3, 0)), "the larger of subflow endpoints and signal addresses");
    assert_eq!(limits_after(&many(3, "subflow").ask(AUTHOR, limit("subflows", "6"))), Some((6, 0)));
    assert_eq!(limits_after(&many(1, "subflow").ask(AUTHOR, limit("add_addr_accepted", "4"))), Some((2, 4)));
    let raised = many(4, "subflow").ask(AUTHOR, limit("subflows", "3"));
    assert_eq!(limits_after(&raised), Some((4, 0)));
    assert!(warned(&raised.plan().unwrap(), &["subflows = 3", "raised to 4"]));
    let present = many(1, "subflow");
    present.host.netns(NS, |netns| netns.limits = Some(Limits { subflows: 7, add_addr_accepted: 3 }));
    assert_eq!(limits_after(&present), None);
}

#[test]
fn a_limit_below_the_present_one_is_a_conflict() {
    let asked = |rank, what: Option<OnConflict>| {
        let scene = Scene::upstream().ask(rank, limit("subflows", "1"));
        match what {
            Some(what) => scene.ask(rank, on_conflict(what)),
            None => scene,
        }
    };
    let refused = asked(ADMIN, None).plan().unwrap();
    assert!(refused.refusal().unwrap().contains("subflows = 1"));
    assert!(refused.steps.is_empty());
    let conflict = &refused.conflicts[0];
    assert_eq!((conflict.wanted.as_str(), conflict.kept.as_str()), ("1", "2"));
    let kept = asked(ADMIN, Some(OnConflict::Warn)).plan().unwrap();
    assert_eq!((kept.refusal(), kept.steps.len()), (None, 0));
    assert!(warned(&kept, &["subflows = 1", "kept"]));
    assert_eq!(limits_after(&asked(ADMIN, Some(OnConflict::Override))), Some((1, 0)));
    assert!(asked(AUTHOR, Some(OnConflict::Override)).plan().unwrap().refusal().is_some());
    let zero = Scene::upstream().ask(ADMIN, limit("subflows", "0")).ask(ADMIN, on_conflict(OnConflict::Override));
    assert_eq!(zero.plan().unwrap().conflicts[0].outcome, ConflictOutcome::Overrode);
    assert_eq!(limits_after(&zero), Some((0, 0)));
}

#[test]
fn limits_of_annotations_need_the_policy() {
    let policy = "[annotations]\nlimits = false\n";
    let plan = Scene::upstream().ask(AUTHOR, limit("subflows", "4")).policy(policy).plan().unwrap();
    assert!(plan.refusal().unwrap().contains("limits"), "{plan:?}");
    let plan = Scene::upstream().ask(ADMIN, limit("subflows", "4")).policy(policy).plan().unwrap();
    assert_eq!(plan.refusal(), None);
}

fn addresses(plan: &Plan) -> Vec<String> {
    endpoint_flags(plan).into_iter().map(|(address, _)| address).collect()
}

#[test]
fn eight_endpoints_go_to_exact_names_first() {
    let scene = many(8, "subflow").ask(ADMIN, interface("eth1", "backup"));
    let plan = scene.plan().unwrap();
    assert_eq!(endpoint_flags(&plan).len(), 8);
    assert!(addresses(&plan).contains(&"10.0.2.2".to_string()), "{:?}", addresses(&plan));
    let ignored: Vec<&Interface> = plan.interfaces.iter().filter(|i| i.state == State::Ignored).collect();
    assert_eq!(ignored.len(), 1);
    assert!(ignored[0].name.starts_with("wan") && ignored[0].reason.as_ref().unwrap().contains("10.1."));
    assert!(warned(&plan, &["10.1.", "at most 8"]));
    scene.perform(&plan);
}

#[test]
fn eight_endpoints_go_to_one_address_per_interface_and_family() {
    let scene = Scene::upstream().ask(ADMIN, interface("eth*", "subflow"));
    (3..12).for_each(|n| scene.host.add_address(NS, 2, &format!("10.0.1.{n}")));
    scene.host.add_address(NS, 2, "2001:db8::2");
    let plan = scene.plan().unwrap();
    let chosen = addresses(&plan);
    assert_eq!(chosen.len(), 8);
    for first in ["10.0.1.2", "2001:db8::2", "10.0.2.2"] {
        assert!(chosen.contains(&first.to_string()), "{first}: {chosen:?}");
    }
    assert_eq!(entry(&plan, "eth0").state, State::Applied);
    assert!(entry(&plan, "eth0").reason.as_ref().unwrap().contains("10.0.1.11"));
    scene.perform(&plan);
}

#[test]
fn somebody_elses_endpoints_count_among_the_eight() {
    let scene = many(4, "subflow");
    for n in 0..6 {
        let foreign =
            Endpoint { id: 20 + n, address: address(&format!("192.0.2.{n}")), port: None, ifindex: 0, flags: 1 };
        scene.host.netns(NS, |netns| netns.endpoints.push(foreign));
    }
    let plan = scene.plan().unwrap();
    assert_eq!(endpoint_flags(&plan).len(), 2);
    scene.perform(&plan);
}

#[test]
fn a_newcomer_by_its_exact_name_takes_the_place_of_a_globs_address() {
    let scene = many(8, "subflow").applied().ask(ADMIN, interface("eth1", "backup"));
    let plan = scene.plan().unwrap();
    scene.perform(&plan);
    let there = scene.host.netns(NS, |netns| netns.endpoints.iter().map(|e| e.address).collect::<Vec<_>>());
    assert!(there.contains(&address("10.0.2.2")), "{there:?}");
    assert_eq!(plan.interfaces.iter().filter(|i| i.state == State::Ignored).count(), 1);
    let recorded: Vec<_> = plan.interfaces.iter().flat_map(|i| &i.endpoints).map(|e| e.address).collect();
    assert!(there.iter().all(|address| recorded.contains(address)), "an endpoint of ours that no record knows");
}

#[test]
fn an_address_that_went_takes_its_endpoint_along() {
    let scene = Scene::upstream().ask(ADMIN, interface("eth1", "backup")).applied();
    scene.host.netns(NS, |netns| netns.addresses.retain(|a| a.ifindex != 3));
    scene.host.add_address(NS, 3, "10.0.2.77");
    scene.perform(&scene.plan().unwrap());
    let there = scene.host.netns(NS, |netns| netns.endpoints.iter().map(|e| e.address).collect::<Vec<_>>());
    assert_eq!(there, [address("10.0.2.77")]);
}

// Rule 5: host scope.

const SCHEDULER: &str = "net.mptcp.mptcp_scheduler";
const LISTED: &str = "[annotations]\noverride = true\n[annotations.sysctls]\n\"net.mptcp.mptcp_scheduler\" = [\"default\", \"redundant\"]\n";

fn wants(rank: Rank, value: &str, what: Option<OnConflict>) -> Scene {
    let scene = Scene::mptcp_org().ask(rank, sysctl("mptcp_scheduler", value));
    match what {
        Some(what) => scene.ask(rank, on_conflict(what)),
        None => scene,
    }
}

#[test]
fn an_equal_value_is_shared() {
    for (scene, claimed) in [
        (wants(ADMIN, "default", None), true),
        (wants(AUTHOR, "default", None), false),
        (wants(AUTHOR, "default", None).policy(LISTED), true),
        (wants(ADMIN, "default", None).held(SCHEDULER, "default", "default", &[("db", "default")]), true),
    ] {
        let plan = scene.plan().unwrap();
        assert!(plan.steps.is_empty() && plan.conflicts.is_empty() && plan.warnings.is_empty(), "{plan:?}");
        let own = owned(&plan, SCHEDULER);
        assert_eq!((own.scope, own.outcome, own.claimed), (Scope::Host, Outcome::Shared, claimed));
        assert_eq!(plan.claims.len(), usize::from(claimed));
        assert!(plan.claims.iter().all(|claim| claim.written.is_none() && claim.original == "default"));
    }
}

#[test]
fn a_different_value_without_a_live_claim_is_written_where_allowed() {
    for scene in [wants(ADMIN, "redundant", None), wants(AUTHOR, "redundant", None).policy(LISTED)] {
        let plan = scene.plan().unwrap();
        assert_eq!(changes(&plan), ["write net.mptcp.mptcp_scheduler = redundant (the whole host's)"]);
        assert!(warned(&plan, &["whole host", "default"]), "{:?}", plan.warnings);
        assert_eq!(owned(&plan, SCHEDULER).outcome, Outcome::Applied);
        let [claim] = plan.claims.as_slice() else { panic!("{:?}", plan.claims) };
        assert_eq!(claim.original, "default");
        assert_eq!(claim.written, Some(Written { before: "default".into() }));
    }
}

#[test]
fn a_different_value_of_an_annotation_needs_the_policy() {
    for policy in ["", LISTED] {
        for (what, refused) in [
            (None, true),
            (Some(OnConflict::Refuse), true),
            (Some(OnConflict::Override), true),
            (Some(OnConflict::Warn), false),
        ] {
            let scene = Scene::mptcp_org().ask(AUTHOR, sysctl("mptcp_scheduler", "roundrobin")).policy(policy);
            let scene = match what {
                Some(what) => scene.ask(AUTHOR, on_conflict(what)),
                None => scene,
            };
            let plan = scene.plan().unwrap();
            assert_eq!(plan.refusal().is_some(), refused, "{what:?}");
            assert!(plan.steps.is_empty() && plan.claims.is_empty());
            assert_eq!(plan.conflicts.len(), 1);
            let own = owned(&plan, SCHEDULER);
            assert_eq!((own.outcome, own.claimed), (Outcome::Kept, false));
        }
    }
}

#[test]
fn a_different_value_with_a_live_claim_is_a_conflict() {
    let held = |scene: Scene| {
        scene.host.set(HOME, SCHEDULER, "redundant");
        scene.held(SCHEDULER, "default", "redundant", &[("db", "redundant"), ("cache", "redundant")])
    };
    for (rank, policy) in [(ADMIN, ""), (AUTHOR, LISTED)] {
        for refusing in [None, Some(OnConflict::Refuse)] {
            let plan = held(wants(rank, "default", refusing).policy(policy)).plan().unwrap();
            let reason = plan.refusal().expect("a refusal");
            assert!(reason.contains("db") && reason.contains("cache") && reason.contains("redundant"), "{reason}");
            assert!(plan.steps.is_empty());
            let conflict = &plan.conflicts[0];
            assert_eq!(conflict.holders, ["db", "cache"]);
            assert_eq!((conflict.wanted.as_str(), conflict.kept.as_str()), ("default", "redundant"));
            assert_eq!(conflict.outcome, ConflictOutcome::Refused);
        }
        let plan = held(wants(rank, "default", Some(OnConflict::Warn)).policy(policy)).plan().unwrap();
        assert_eq!((plan.refusal(), plan.steps.len(), plan.claims.len()), (None, 0, 0));
        assert_eq!(plan.conflicts[0].outcome, ConflictOutcome::Warned);
        assert_eq!(owned(&plan, SCHEDULER).outcome, Outcome::Kept);
        let plan = held(wants(rank, "default", Some(OnConflict::Override)).policy(policy)).plan().unwrap();
        assert_eq!((plan.refusal(), plan.steps.len()), (None, 1));
        assert_eq!(plan.conflicts[0].outcome, ConflictOutcome::Overrode);
        assert_eq!(owned(&plan, SCHEDULER).outcome, Outcome::Overrode);
        assert!(warned(&plan, &["db", "cache", "overridden"]), "{:?}", plan.warnings);
        assert_eq!(plan.claims[0].original, "default");
        assert_eq!(plan.claims[0].overridden, ["oci.db", "oci.cache"]);
    }
    // Without the policy's word an annotation overrides nothing.
    let no_override = LISTED.replace("override = true", "override = false");
    let plan = held(wants(AUTHOR, "default", Some(OnConflict::Override)).policy(&no_override)).plan().unwrap();
    assert!(plan.refusal().is_some() && plan.steps.is_empty());
}

#[test]
fn the_policys_on_conflict_counts_where_the_wish_says_nothing() {
    let held = |policy: &str, what| {
        let scene = wants(ADMIN, "redundant", what).policy(policy);
        scene.held(SCHEDULER, "default", "default", &[("db", "default")]).plan().unwrap()
    };
    assert_eq!(held("on-conflict = \"warn\"\n", None).conflicts[0].outcome, ConflictOutcome::Warned);
    assert_eq!(held("on-conflict = \"override\"\n", None).conflicts[0].outcome, ConflictOutcome::Overrode);
    let said = held("on-conflict = \"override\"\n", Some(OnConflict::Refuse));
    assert_eq!(said.conflicts[0].outcome, ConflictOutcome::Refused);
}

#[test]
fn an_annotation_does_not_steer_an_administrators_conflict() {
    let plan = wants(ADMIN, "redundant", None)
        .ask(AUTHOR, on_conflict(OnConflict::Override))
        .held(SCHEDULER, "default", "default", &[("db", "default")])
        .plan()
        .unwrap();
    assert!(plan.refusal().is_some());
}

#[test]
fn bits_of_mptcp_enabled_are_compared_and_named() {
    let scene = Scene::mptcp_org().ask(ADMIN, sysctl("mptcp_enabled", "0x1"));
    assert!(scene.plan().unwrap().steps.is_empty());
    let scene = Scene::mptcp_org().ask(ADMIN, sysctl("mptcp_enabled", "5"));
    let held = scene.held("net.mptcp.mptcp_enabled", "1", "1", &[("db", "1")]).plan().unwrap();
    let reason = held.refusal().unwrap();
    assert!(reason.contains("5 (on, no clients)") && reason.contains("1 (on)"), "{reason}");
}

#[test]
fn module_parameters_are_the_hosts() {
    let asked = |rank| Scene::mptcp_org().ask(rank, module("mptcp_fullmesh.num_subflows", "2"));
    let plan = asked(ADMIN).plan().unwrap();
    assert_eq!(owned(&plan, "module:mptcp_fullmesh.num_subflows").scope, Scope::Host);
    assert!(asked(AUTHOR).plan().unwrap().refusal().is_some());
    let policy = "[annotations.modules]\n\"mptcp_fullmesh.num_subflows\" = [1, 2]\n";
    assert_eq!(asked(AUTHOR).policy(policy).plan().unwrap().refusal(), None);
    let error = Scene::mptcp_org().ask(ADMIN, module("mptcp_rr.num_segments", "2")).error(1);
    assert!(error.contains("not loaded"), "{error}");
}

#[test]
fn a_drifted_value_becomes_the_original() {
    let drifted = |scene: Scene| {
        scene.host.set(HOME, SCHEDULER, "blest");
        scene.held(SCHEDULER, "default", "redundant", &[("db", "redundant")])
    };
    // As db relies on: nobody stands against it.
    let plan = drifted(wants(ADMIN, "redundant", None)).plan().unwrap();
    assert_eq!(plan.refusal(), None);
    assert_eq!(plan.claims[0].original, "blest");
    // Otherwise than db relies on, although the value is not db's now.
    assert!(drifted(wants(ADMIN, "default", None)).plan().unwrap().refusal().is_some());
    // As it is now.
    let plan = drifted(wants(ADMIN, "blest", None)).plan().unwrap();
    assert_eq!((plan.refusal(), plan.steps.len(), plan.claims[0].is_foreign), (None, 0, true));
    let met = &plan.conflicts[0];
    assert_eq!((met.outcome, &*met.wanted, &*met.kept), (ConflictOutcome::Drift, "redundant", "blest"));
    assert!(met.holders == ["db"] && met.reason.contains("from now on blest"), "{met:?}");
}

#[test]
fn the_original_is_carried_over() {
    let scene = wants(ADMIN, "redundant", Some(OnConflict::Override));
    scene.host.set(HOME, SCHEDULER, "ecf");
    let plan = scene.held(SCHEDULER, "default", "ecf", &[("db", "ecf")]).plan().unwrap();
    assert_eq!(plan.claims[0].original, "default");
    assert_eq!(plan.claims[0].written, Some(Written { before: "ecf".into() }));
}

#[test]
fn claims_of_the_dead_hold_nobody() {
    let mut scene = wants(ADMIN, "redundant", None).held(SCHEDULER, "default", "ecf", &[]);
    scene.host.set(HOME, SCHEDULER, "ecf");
    scene.pages.get_mut(&key(SCHEDULER)).unwrap().dead = vec!["oci.dead".into()];
    let plan = scene.plan().unwrap();
    assert_eq!(plan.refusal(), None);
    assert_eq!(plan.claims[0].original, "default");
    assert_eq!(plan.claims[0].dead, ["oci.dead"]);
}

#[test]
fn host_values_cannot_be_changed_from_a_user_namespace() {
    for rank in [ADMIN, AUTHOR] {
        let scene = |value: &str| {
            Scene::on(FakeHost::mptcp_org().with_fullmesh().in_user_namespace())
                .ask(rank, sysctl("mptcp_scheduler", value))
                .policy(LISTED)
        };
        let plan = scene("redundant").ask(rank, on_conflict(OnConflict::Override)).plan().unwrap();
        let reason = plan.refusal().expect("refused");
        assert!(reason.contains("user namespace") && reason.contains("whole host"), "{reason}");
        assert!(plan.steps.is_empty() && plan.claims.is_empty());
        let plan = scene("default").plan().unwrap();
        assert_eq!((plan.refusal(), plan.claims.len()), (None, 0));
        assert_eq!(owned(&plan, SCHEDULER).outcome, Outcome::Shared);
    }
    let own =
        Scene::on(FakeHost::mptcp_org().with_fullmesh().in_user_namespace()).ask(AUTHOR, interface("eth1", "backup"));
    assert_eq!(own.plan().unwrap().steps.len(), 1, "what the namespace owns is not the host's");
}

#[test]
fn host_values_are_out_of_reach_from_inside() {
    let error = Scene::on(FakeHost::mptcp_org().with_fullmesh().from_inside())
        .ask(ADMIN, sysctl("mptcp_scheduler", "redundant"))
        .error(1);
    assert!(error.contains("net.mptcp.mptcp_scheduler"), "{error}");
    let shared =
        |value: &str| Scene::on(FakeHost::upstream().from_inside()).ask(ADMIN, sysctl("net.core.rmem_max", value));
    assert!(shared("212992").plan().unwrap().steps.is_empty());
    assert!(shared("4194304").error(1).contains("createRuntime"));
}

#[test]
fn scope_is_seen_and_not_guessed() {
    let plan = Scene::upstream()
        .ask(ADMIN, sysctl("net.netfilter.nf_hooks_lwtunnel", "1"))
        .ask(ADMIN, sysctl("net.core.rmem_max", "4194304"))
        .ask(ADMIN, sysctl("net.ipv4.tcp_syn_retries", "4"))
        .plan()
        .unwrap();
    assert_eq!(owned(&plan, "net.netfilter.nf_hooks_lwtunnel").scope, Scope::Host, "writable and yet global");
    assert_eq!(owned(&plan, "net.core.rmem_max").scope, Scope::Host);
    assert_eq!(owned(&plan, "net.ipv4.tcp_syn_retries").scope, Scope::Netns);
    for (scene, setting) in [
        (Scene::upstream(), "net.mptcp.mptcp_scheduler"),
        (Scene::mptcp_org(), "net.mptcp.scheduler"),
        (Scene::upstream(), "net.core.nope"),
    ] {
        let error = scene.ask(ADMIN, sysctl(setting, "1")).error(1);
        assert!(error.contains(setting), "{error}");
    }
}

// linux.sysctl of the bundle.

#[test]
fn what_the_runtime_writes_afterwards_must_agree() {
    let scene = |ours: &str, theirs: &str| {
        Scene::upstream()
            .ask(Rank::Runtime, sysctl("net.ipv4.tcp_syn_retries", theirs))
            .ask(ADMIN, sysctl("net.ipv4.tcp_syn_retries", ours))
    };
    let plan = scene("4", "0x4").plan().unwrap();
    assert!(plan.conflicts.is_empty());
    let plan = scene("4", "5").plan().unwrap();
    assert!(plan.refusal().unwrap().contains("runtime"));
    assert!(plan.steps.is_empty());
    let plan = scene("4", "5").ask(ADMIN, on_conflict(OnConflict::Override)).plan().unwrap();
    assert!(plan.refusal().is_some(), "the runtime has the last word whatever we do");
    let plan = scene("4", "5").ask(ADMIN, on_conflict(OnConflict::Warn)).plan().unwrap();
    assert_eq!((plan.refusal(), plan.steps.len()), (None, 0));
    assert!(!owned(&plan, "net.ipv4.tcp_syn_retries").claimed);
}

#[test]
fn the_runtimes_pm_type_is_our_path_manager() {
    for (theirs, ours) in [
        (sysctl("pm_type", "1"), sysctl("path_manager", "kernel")),
        (sysctl("path_manager", "userspace"), sysctl("pm_type", "0")),
    ] {
        let plan = Scene::upstream().ask(Rank::Runtime, theirs).ask(ADMIN, ours).plan().unwrap();
        assert!(plan.refusal().is_some(), "they are one setting and differ");
    }
    let plan = Scene::upstream()
        .ask(Rank::Runtime, sysctl("pm_type", "0"))
        .ask(ADMIN, sysctl("path_manager", "kernel"))
        .plan()
        .unwrap();
    assert!(plan.conflicts.is_empty());
}

#[test]
fn what_the_runtime_writes_must_suit_the_siblings() {
    let scene = Scene::upstream().sibling("db", ADMIN, sysctl("net.ipv4.tcp_syn_retries", "3"));
    let plan = scene
        .ask(Rank::Runtime, sysctl("net.ipv4.tcp_syn_retries", "5"))
        .ask(ADMIN, interface("eth1", "backup"))
        .plan()
        .unwrap();
    let reason = plan.refusal().unwrap();
    assert!(reason.contains("db") && reason.contains("tcp_syn_retries"), "{reason}");
}

#[test]
fn pm_type_and_path_manager_are_one_setting() {
    let scene = |first: Asked, second: Asked| Scene::upstream().ask(ADMIN, first).ask(ADMIN, second);
    let error = scene(sysctl("pm_type", "1"), sysctl("path_manager", "kernel")).error(2);
    assert!(error.contains("pm_type") && error.contains("path_manager"), "{error}");
    let plan = scene(sysctl("pm_type", "1"), sysctl("path_manager", "userspace")).plan().unwrap();
    assert_eq!(changes(&plan), ["write net.mptcp.path_manager = userspace"]);
    let weightier = Scene::upstream()
        .ask(AUTHOR, sysctl("pm_type", "1"))
        .ask(ADMIN, sysctl("path_manager", "kernel"))
        .plan()
        .unwrap();
    assert!(weightier.steps.is_empty(), "{:?}", changes(&weightier));
    let older = Scene::on(FakeHost::upstream().without_path_manager_sysctl())
        .ask(ADMIN, sysctl("path_manager", "userspace"))
        .plan()
        .unwrap();
    assert_eq!(changes(&older), ["write net.mptcp.pm_type = 1"]);
}

// Settings of the namespace.

#[test]
fn annotations_may_set_mptcp_keys_of_their_namespace_alone() {
    let plan = Scene::upstream().ask(AUTHOR, sysctl("stale_loss_cnt", "3")).plan().unwrap();
    assert_eq!((plan.refusal(), plan.steps.len()), (None, 1));
    assert_eq!(owned(&plan, "net.mptcp.stale_loss_cnt").original.as_deref(), Some("4"));
    let plan = Scene::upstream().ask(AUTHOR, sysctl("net.ipv4.tcp_syn_retries", "3")).plan().unwrap();
    assert!(plan.refusal().is_some() && plan.steps.is_empty());
    let policy = "[annotations.sysctls]\n\"net.ipv4.tcp_syn_retries\" = [3]\n";
    let plan = Scene::upstream().ask(AUTHOR, sysctl("net.ipv4.tcp_syn_retries", "3")).policy(policy).plan().unwrap();
    assert_eq!((plan.refusal(), plan.steps.len()), (None, 1));
    let plan = Scene::upstream().ask(AUTHOR, sysctl("net.ipv4.tcp_syn_retries", "4")).policy(policy).plan().unwrap();
    assert!(plan.refusal().is_some());
}

#[test]
fn annotations_may_be_kept_from_interfaces() {
    let policy = "[annotations]\ninterfaces = [\"eth1\"]\n";
    let scene = |name: &str, rank| Scene::upstream().policy(policy).ask(rank, interface(name, "backup"));
    assert_eq!(scene("eth1", AUTHOR).plan().unwrap().refusal(), None);
    let plan = scene("eth0", AUTHOR).plan().unwrap();
    assert!(plan.refusal().unwrap().contains("eth0"));
    assert_eq!(entry(&plan, "eth0").state, State::Ignored);
    assert!(plan.steps.is_empty());
    assert_eq!(scene("eth0", ADMIN).plan().unwrap().refusal(), None);
}

#[test]
fn a_congestion_control_can_load_a_module() {
    let control = "net.ipv4.tcp_congestion_control";
    let plan = Scene::upstream().ask(ADMIN, sysctl(control, "reno")).plan().unwrap();
    assert!(plan.warnings.is_empty());
    let plan = Scene::upstream().ask(ADMIN, sysctl(control, "bbr")).plan().unwrap();
    assert!(warned(&plan, &["bbr", "module"]), "{:?}", plan.warnings);
    let plan = Scene::upstream().ask(AUTHOR, sysctl(control, "bbr")).plan().unwrap();
    assert!(plan.refusal().is_some());
    let rootless = Scene::on(FakeHost::upstream().in_user_namespace()).ask(ADMIN, sysctl(control, "bbr"));
    assert!(rootless.plan().unwrap().refusal().unwrap().contains("module"));
}

// Rule 6: siblings in one namespace.

#[test]
fn siblings_flags_are_respected() {
    for scene in [Scene::upstream(), Scene::mptcp_org()] {
        let scene = scene.sibling("db", ADMIN, interface("eth1", "backup"));
        let host = scene.host.clone();
        let same = scene.ask(ADMIN, interface("eth1", "backup"));
        let plan = same.plan().unwrap();
        assert_eq!((plan.refusal(), plan.steps.len()), (None, 0), "{:?}", changes(&plan));
        assert_eq!(entry(&plan, "eth1").state, State::Applied);
        let other = |what: Option<OnConflict>| {
            let mut scene = Scene::in_namespace_of(host.clone()).ask(ADMIN, interface("eth1", "off"));
            scene.siblings = same.siblings.clone();
            match what {
                Some(what) => scene.ask(ADMIN, on_conflict(what)),
                None => scene,
            }
        };
        let plan = other(None).plan().unwrap();
        assert!(plan.refusal().unwrap().contains("db"), "{:?}", plan.conflicts);
        assert_eq!(plan.conflicts[0].holders, ["db"]);
        let plan = other(Some(OnConflict::Warn)).plan().unwrap();
        assert_eq!((plan.refusal(), plan.steps.len()), (None, 0));
        assert_eq!(entry(&plan, "eth1").state, State::Ignored);
        let plan = other(Some(OnConflict::Override)).plan().unwrap();
        assert_eq!(plan.refusal(), None);
        assert_eq!(plan.conflicts[0].outcome, ConflictOutcome::Overrode);
    }
}

#[test]
fn siblings_flags_have_the_original_of_the_first() {
    let scene = Scene::mptcp_org().sibling("db", ADMIN, interface("eth1", "backup"));
    let plan = scene.ask(ADMIN, interface("eth1", "backup")).plan().unwrap();
    assert_eq!(entry(&plan, "eth1").link.as_ref().unwrap().original, 0);
    let scene = Scene::upstream().sibling("db", ADMIN, interface("eth1", "backup"));
    let plan = scene.ask(ADMIN, interface("eth1", "backup")).plan().unwrap();
    assert_eq!(entry(&plan, "eth1").endpoints[0].original, None, "ours, whoever of us made it");
}

#[test]
fn siblings_sysctls_are_respected() {
    let retries = "net.ipv4.tcp_syn_retries";
    let scene = |value: &str| {
        let scene = Scene::upstream().sibling("db", ADMIN, sysctl(retries, "3"));
        scene.ask(ADMIN, sysctl(retries, value))
    };
    let plan = scene("0x3").plan().unwrap();
    assert_eq!((plan.refusal(), plan.steps.len()), (None, 0));
    assert_eq!(owned(&plan, retries).outcome, Outcome::Shared);
    assert_eq!(owned(&plan, retries).original.as_deref(), Some("6"));
    let plan = scene("5").plan().unwrap();
    assert!(plan.refusal().unwrap().contains("db"));
    let plan = scene("5").ask(ADMIN, on_conflict(OnConflict::Warn)).plan().unwrap();
    assert_eq!((plan.refusal(), plan.steps.len(), owned(&plan, retries).claimed), (None, 0, false));
    let plan = scene("5").ask(ADMIN, on_conflict(OnConflict::Override)).plan().unwrap();
    assert_eq!((plan.refusal(), plan.steps.len()), (None, 1));
    assert_eq!(owned(&plan, retries).original.as_deref(), Some("6"));
}

#[test]
fn siblings_limits_are_respected() {
    let scene = Scene::upstream().sibling("db", ADMIN, limit("subflows", "6"));
    let plan = scene.ask(ADMIN, limit("subflows", "4")).plan().unwrap();
    assert!(plan.refusal().is_some());
    assert_eq!(plan.conflicts[0].holders, ["db"]);
    let scene = Scene::upstream().sibling("db", ADMIN, limit("subflows", "6")).ask(ADMIN, limit("subflows", "8"));
    let plan = scene.plan().unwrap();
    let expected = LimitPair { subflows: 2, add_addr_accepted: 0 };
    assert_eq!(plan.limits.unwrap().original, expected, "what was there before the first of us");
    assert_eq!(limits_after(&scene), Some((8, 0)));
}

// Rule 13 and rule 2: the agent.

#[test]
fn the_agent_adds_and_moves_endpoints_with_their_addresses() {
    let scene = Scene::on(FakeHost::upstream()).ask(AUTHOR, interface("eth2", "backup")).applied();
    assert!(scene.previous.as_ref().unwrap().unsettled, "eth2 is not there yet");
    let mut scene = scene.followed();
    let plan = scene.plan().unwrap();
    assert!(plan.steps.is_empty() && entry(&plan, "eth2").last.is_none(), "{:?}", changes(&plan));
    scene.host.add_link(NS, 9, "eth2", &["10.0.3.2"]);
    scene.carriers();
    let plan = scene.plan().unwrap();
    assert_eq!(endpoint_flags(&plan), [("10.0.3.2".into(), 6)]);
    assert_eq!(entry(&plan, "eth2").last.as_ref().unwrap().what, "10.0.3.2 came");
    assert!(!plan.unsettled);
    scene = scene.applied();
    assert!(scene.plan().unwrap().steps.is_empty());
    scene.host.netns(NS, |netns| netns.addresses.retain(|address| address.ifindex != 9));
    scene.host.add_address(NS, 9, "10.0.3.7");
    let plan = scene.plan().unwrap();
    assert_eq!(entry(&plan, "eth2").last.as_ref().unwrap().what, "10.0.3.2 went, 10.0.3.7 came");
    let done = changes(&plan).join("\n");
    assert!(done.contains("delete endpoint 10.0.3.2") && done.contains("add endpoint 10.0.3.7"), "{done}");
}

#[test]
fn the_agent_undoes_a_foreign_change_once() {
    let scene = Scene::upstream().ask(AUTHOR, interface("eth1", "backup")).applied().followed();
    let flush = |scene: &Scene| scene.host.netns(NS, |netns| netns.endpoints.clear());
    flush(&scene);
    let plan = scene.plan().unwrap();
    assert_eq!(endpoint_flags(&plan), [("10.0.2.2".into(), 6)]);
    assert!(entry(&plan, "eth1").last.as_ref().unwrap().what.contains("put back"));
    let scene = scene.applied();
    flush(&scene);
    let plan = scene.plan().unwrap();
    assert!(plan.steps.is_empty(), "{:?}", changes(&plan));
    assert_eq!(entry(&plan, "eth1").state, State::Drifted);
    // Who asks again has it anew.
    let asked = Scene { follows: false, ..scene };
    assert_eq!(endpoint_flags(&asked.plan().unwrap()), [("10.0.2.2".into(), 6)]);
    assert!(entry(&asked.plan().unwrap(), "eth1").corrected.is_none());
}

#[test]
fn for_the_agent_an_interface_that_cannot_be_had_stands_in_nobodys_way() {
    let asked = |scene: Scene| scene.ask(ADMIN, interface("eth*", "backup")).ask(ADMIN, interface("*9", "subflow"));
    let scene = asked(Scene::upstream()).applied().followed();
    // Somebody has an endpoint there that cannot become ours, and two globs disagree about another interface.
    scene.host.add_link(NS, 8, "eth8", &["10.0.8.2"]);
    let theirs = Endpoint { id: 77, address: address("10.0.8.2"), port: None, ifindex: 8, flags: 1 };
    scene.host.netns(NS, |netns| netns.endpoints.push(theirs.clone()));
    scene.host.add_link(NS, 9, "eth9", &["10.0.9.2"]);
    scene.host.add_address(NS, 3, "10.0.2.7");
    scene.carriers();
    let plan = scene.plan().unwrap();
    assert_eq!(endpoint_flags(&plan), [("10.0.2.7".into(), 6)]);
    for (name, reason) in [("eth8", "ip mptcp endpoint delete id 77"), ("eth9", "name it exactly in one of them")] {
        let entry = entry(&plan, name);
        assert_eq!((entry.state, entry.endpoints.len()), (State::Ignored, 0), "{entry:?}");
        assert!(entry.reason.as_ref().unwrap().contains(reason), "{entry:?}");
        assert!(entry.last.as_ref().unwrap().what.contains(reason), "it is said: {entry:?}");
    }
    // It is said once, and taken up when there is nothing in the way any more.
    let scene = scene.applied();
    let plan = scene.plan().unwrap();
    let said = |all: &[Interface]| all.iter().map(|one| (one.state, one.last.clone())).collect::<Vec<_>>();
    assert_eq!(said(&plan.interfaces), said(&scene.previous.as_ref().unwrap().interfaces));
    assert!(plan.steps.is_empty(), "{:?}", changes(&plan));
    scene.host.netns(NS, |netns| netns.endpoints.retain(|endpoint| *endpoint != theirs));
    assert_eq!(endpoint_flags(&scene.plan().unwrap()), [("10.0.8.2".into(), 6)]);
    // Whoever asks is told, and nothing is done.
    let asked = Scene { follows: false, ..scene };
    assert_eq!(exit_status(&asked.plan().unwrap_err()), 2);
}

#[test]
fn the_agent_undoes_a_foreign_change_of_the_limits_once() {
    let scene = Scene::upstream().ask(ADMIN, interface("eth1", "backup")).ask(ADMIN, limit("subflows", "5"));
    let mut scene = scene.applied().followed();
    let lower = |scene: &Scene, subflows| {
        scene.host.netns(NS, |netns| netns.limits = Some(Limits { subflows, add_addr_accepted: 0 }));
    };
    lower(&scene, 1);
    let plan = scene.plan().unwrap();
    assert_eq!(limits_after(&scene), Some((5, 0)));
    assert!(plan.conflicts.is_empty() && plan.limits.unwrap().corrected.is_some());
    scene = scene.applied();
    assert!(scene.plan().unwrap().steps.is_empty());
    lower(&scene, 0);
    let plan = scene.plan().unwrap();
    assert!(plan.steps.is_empty(), "{:?}", changes(&plan));
    let drift: Vec<_> = plan.conflicts.iter().map(|c| (c.outcome, c.wanted.as_str(), c.kept.as_str())).collect();
    let pairs = ("subflows 5 add_addr_accepted 0", "subflows 0 add_addr_accepted 0");
    assert_eq!(drift, [(ConflictOutcome::Drift, pairs.0, pairs.1)]);
    assert!(plan.warnings.iter().any(|warning| warning.contains("mptcp-hook apply")), "{:?}", plan.warnings);
    // It is said once.
    scene = scene.applied();
    let plan = scene.plan().unwrap();
    assert!(plan.steps.is_empty() && plan.conflicts.is_empty() && plan.warnings.len() == 1, "{:?}", plan.warnings);
    // What the container itself needs by now is no change of somebody's.
    let asked = Scene { follows: false, ..scene };
    assert_eq!(limits_after(&asked), Some((5, 0)));
    let mut scene = asked.applied().followed();
    assert!(scene.previous.as_ref().unwrap().limits.unwrap().corrected.is_none());
    for last in 2..8 {
        scene.host.add_address(NS, 3, &format!("10.0.9.{last}"));
    }
    scene.carriers();
    scene = scene.applied();
    assert_eq!(scene.previous.as_ref().unwrap().limits.unwrap().corrected, None);
    assert_eq!(scene.host.netns(NS, |netns| netns.limits.map(|limits| limits.subflows)), Some(7));
}

#[test]
fn the_agent_sets_cleared_flags_again_and_others_once() {
    let mut scene = Scene::mptcp_org().ask(AUTHOR, interface("eth1", "backup")).applied().followed();
    for _ in 0..3 {
        scene.host.ioctl_up(NS, 3);
        let plan = scene.plan().unwrap();
        assert_eq!(link_bits(&plan), [(0x10_0000, 0x18_0000)], "as often as ifconfig clears them");
        scene = scene.applied();
    }
    let off = |scene: &Scene| scene.host.set_link_flags(NS, 3, 0x8_0000, 0x18_0000).unwrap();
    off(&scene);
    assert_eq!(link_bits(&scene.plan().unwrap()), [(0x10_0000, 0x18_0000)]);
    scene = scene.applied();
    off(&scene);
    let plan = scene.plan().unwrap();
    assert!(plan.steps.is_empty(), "somebody wants it so");
    assert_eq!(entry(&plan, "eth1").state, State::Drifted);
}

#[test]
fn the_agent_leaves_settings_and_conflicts_alone() {
    let scene = Scene::upstream()
        .ask(ADMIN, interface("eth1", "backup"))
        .ask(ADMIN, sysctl("net.mptcp.stale_loss_cnt", "2"))
        .applied()
        .followed();
    scene.host.set(NS, "net.mptcp.stale_loss_cnt", "7");
    let plan = scene.plan().unwrap();
    assert!(plan.steps.is_empty() && plan.conflicts.is_empty(), "{:?}", changes(&plan));
    assert_eq!(owned(&plan, "net.mptcp.stale_loss_cnt").value, "2");
    // Whatever the policy says by now: the container runs.
    let scene = scene.policy("[annotations]\ninterfaces = []\nlimits = false\n");
    let plan = scene.plan().unwrap();
    assert!(plan.refusal().is_none() && plan.conflicts.is_empty());
}

/// The policy's list is held against an interface's own name, when it is there.
#[test]
fn a_glob_of_an_annotation_waits_for_interfaces_that_the_policy_gives() {
    for host in [FakeHost::upstream(), FakeHost::mptcp_org().with_fullmesh()] {
        host.add_netns(NS);
        let mut scene = Scene::in_namespace_of(host)
            .policy("[annotations]\ninterfaces = [\"eth0\", \"eth1\"]\n")
            .ask(AUTHOR, interface("eth*", "backup"));
        let plan = scene.plan().unwrap();
        assert_eq!(plan.refusal(), None);
        assert_eq!(entry(&plan, "eth*").state, State::Pending);
        scene = scene.applied().followed();
        // One that is not given does not end the waiting, and is left alone.
        let links = |scene: &Scene| {
            let plan = scene.plan().unwrap();
            let states = plan.interfaces.iter().map(|interface| (interface.name.clone(), interface.state));
            (states.collect::<BTreeMap<_, _>>(), plan)
        };
        scene.host.add_link(NS, 7, "eth7", &["10.0.7.2"]);
        scene.carriers();
        let (states, plan) = links(&scene);
        let expected = [("eth*".to_string(), State::Pending), ("eth7".into(), State::Ignored)];
        assert_eq!(states, BTreeMap::from(expected));
        assert!(plan.steps.is_empty() && plan.unsettled, "{:?}", changes(&plan));
        scene.host.add_link(NS, 3, "eth1", &["10.0.2.2"]);
        scene.carriers();
        let (states, plan) = links(&scene);
        assert_eq!(states, BTreeMap::from([("eth1".to_string(), State::Applied), ("eth7".into(), State::Ignored)]));
        let done = changes(&plan).join("; ");
        assert!(!done.is_empty() && !done.contains("eth7") && !done.contains("10.0.7.2"), "{done}");
        // Asked for anew it is refused, by its own name.
        scene.follows = false;
        let refusal = scene.plan().unwrap().refusal().unwrap();
        assert!(refusal.contains("may not ask for eth7") && !refusal.contains("eth*"), "{refusal}");
    }
    for (policy, name) in [("[]", "eth*"), ("[\"eth0\"]", "eth1")] {
        let host = FakeHost::upstream();
        host.add_netns(NS);
        let scene = Scene::in_namespace_of(host)
            .policy(&format!("[annotations]\ninterfaces = {policy}\n"))
            .ask(AUTHOR, interface(name, "backup"));
        let refusal = scene.plan().unwrap().refusal().unwrap();
        assert!(refusal.contains(&format!("may not ask for {name}")), "{refusal}");
    }
}

#[test]
fn the_agent_waits_for_a_new_addresss_link() {
    let scene = Scene::upstream().ask(AUTHOR, interface("eth2", "backup")).applied().followed();
    scene.host.add_link(NS, 9, "eth2", &["10.0.3.2"]);
    let plan = scene.plan().unwrap();
    assert!(plan.steps.is_empty());
    assert_eq!(plan.put_off, [address("10.0.3.2")]);
    assert!(entry(&plan, "eth2").reason.as_ref().unwrap().contains("way out"));
    scene.carriers();
    assert_eq!(endpoint_flags(&scene.plan().unwrap()), [("10.0.3.2".into(), 6)]);
}

/// However many addresses there are, few ways out are looked up, and which of them get endpoints is the same.
#[test]
fn of_very_many_addresses_those_that_can_have_an_endpoint_are_looked_at() {
    let scene = Scene::upstream().ask(AUTHOR, interface("eth2", "backup")).applied().followed();
    let all: Vec<String> = (0..20_000).map(|n| format!("10.{}.{}.2", 100 + n / 250, n % 250)).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    scene.host.add_link(NS, 9, "eth2", &all);
    scene.host.add_link(NS, 10, "other0", &["10.0.9.2", "fd00:9::2"]);
    let facts = scene.host.kernel(NS).facts(&[]).unwrap();
    let first: Vec<(IpAddr, u32)> = all[..8].iter().map(|ip| (address(ip), 9)).collect();
    assert_eq!(to_look_up(&scene.request, &facts), first);
    // Those behind wait with the first, whose ways out are known.
    let plan = scene.plan().unwrap();
    assert!(plan.steps.is_empty(), "{:?}", changes(&plan));
    scene.carriers();
    let plan = scene.plan().unwrap();
    let chosen: Vec<IpAddr> = entry(&plan, "eth2").endpoints.iter().map(|own| own.address).collect();
    assert_eq!(chosen, all[..8].iter().map(|ip| address(ip)).collect::<Vec<_>>());
    let reason = entry(&plan, "eth2").reason.clone().unwrap();
    assert!(reason.contains(all[8]) && reason.contains(" and 19976 more: a namespace has at most 8"), "{reason}");
    // What has an endpoint keeps it wherever it stands.
    let scene = scene.applied();
    scene.host.netns(NS, |netns| netns.addresses.rotate_left(10_000));
    let facts = scene.host.kernel(NS).facts(&[]).unwrap();
    let looked_at = to_look_up(&scene.request, &facts);
    assert!(looked_at.len() == 16 && first.iter().all(|first| looked_at.contains(first)), "{looked_at:?}");
}

// routes=auto.

fn two_uplinks(author: Rank) -> Scene {
    let scene =
        Scene::upstream().ask(author, interface("eth1", "backup")).ask(author, Ok(What::Routes(request::Routes::Auto)));
    scene.host.netns(NS, |netns| {
        netns.no_route.insert(3);
    });
    scene
}

#[test]
fn an_interface_gets_a_way_out_by_the_gateway_that_is_known() {
    let plan = two_uplinks(ADMIN).plan().unwrap();
    let pending = entry(&plan, "eth1");
    assert_eq!((pending.state, pending.routing.as_ref()), (State::Pending, None));
    assert!(pending.reason.as_ref().unwrap().contains("gateway="), "{pending:?}");

    let asked = two_uplinks(ADMIN).ask(ADMIN, Ok(What::Gateway("eth*".parse().unwrap(), address("10.0.2.1"))));
    let done = changes(&asked.plan().unwrap()).join("\n");
    let order = [
        "add the route 10.0.2.0/24",
        "add the route default via 10.0.2.1",
        "IPv4 rule from 10.0.2.2",
        "oif eth1",
        "add endpoint",
    ];
    let positions: Vec<usize> =
        order.iter().map(|word| done.find(word).unwrap_or_else(|| panic!("{word}: {done}"))).collect();
    assert!(positions.is_sorted(), "{done}");
    let asked = asked.applied();
    assert!(asked.plan().unwrap().steps.is_empty(), "{:?}", changes(&asked.plan().unwrap()));

    let scene = two_uplinks(ADMIN);
    let route = |table, protocol| crate::kernel::TableRoute {
        table,
        destination: address("0.0.0.0"),
        prefix: 0,
        gateway: Some(address("10.0.2.9")),
        onlink: false,
        ifindex: 3,
        protocol,
    };
    scene.host.netns(NS, |netns| netns.routing.routes.push(route(7800, 4)));
    let plan = scene.plan().unwrap();
    let owned = entry(&plan, "eth1").routing.clone().unwrap();
    assert_eq!(owned.table, 7801, "somebody else's table is not taken");
    assert!(owned.routes.iter().any(|route| route.gateway == Some(address("10.0.2.9"))));
}

#[test]
fn an_interface_that_has_a_way_out_gets_none() {
    let scene =
        Scene::upstream().ask(ADMIN, interface("eth1", "backup")).ask(ADMIN, Ok(What::Routes(request::Routes::Auto)));
    let plan = scene.plan().unwrap();
    assert!(entry(&plan, "eth1").routing.is_none() && entry(&plan, "eth1").state == State::Applied);
}

#[test]
fn annotations_need_the_policys_word_for_routes() {
    let plan = two_uplinks(AUTHOR).plan().unwrap();
    assert!(plan.refusal().unwrap().contains("[annotations] routes = true"));
    let scene = two_uplinks(AUTHOR).policy("[annotations]\nroutes = true\n");
    assert!(scene.plan().unwrap().refusal().is_none());
}

#[test]
fn annotations_need_the_policys_word_for_gateways() {
    let scene = || two_uplinks(ADMIN).ask(AUTHOR, gateway("66"));
    let refused = scene().plan().unwrap();
    let reason = refused.refusal().unwrap();
    assert!(reason.contains("the gateway 10.0.2.66 for eth1") && reason.contains("[annotations] routes = true"));
    let uses = |scene: &Scene, last: &str| {
        let plan = scene.plan().unwrap();
        assert_eq!(plan.refusal(), None);
        let routes = entry(&plan, "eth1").routing.iter().flat_map(|routing| &routing.routes);
        let hops: Vec<_> = routes.filter_map(|route| route.gateway).collect();
        assert!(!changes(&plan).join("\n").contains("10.0.2.66") || last == "66", "{:?}", changes(&plan));
        assert_eq!(hops, [address(&format!("10.0.2.{last}"))]);
    };
    uses(&scene().policy("[annotations]\nroutes = true\n"), "66");
    // What somebody weightier says counts, also of a glob; what somebody lighter says does where it is left out.
    let all: Asked = Ok(What::Gateway("eth*".parse().unwrap(), address("10.0.2.1")));
    uses(&scene().ask(ADMIN, all), "1");
    let lenient = || scene().ask(AUTHOR, on_conflict(OnConflict::Warn));
    uses(&lenient().ask(Rank::PolicyDefault, gateway("1")), "1");
    let plan = lenient().plan().unwrap();
    assert!(plan.refusal().is_none() && entry(&plan, "eth1").state == State::Pending, "{:?}", changes(&plan));
    assert!(warned(&plan, &["10.0.2.66", "kept as it is"]), "{:?}", plan.warnings);
    // The agent can refuse nothing any more; it leaves it out all the same.
    let plan = scene().followed().plan().unwrap();
    assert!(plan.refusal().is_none() && entry(&plan, "eth1").routing.is_none(), "{:?}", changes(&plan));
}

#[test]
fn a_gateway_that_may_not_be_named_stands_against_no_sibling() {
    let first = two_uplinks(ADMIN).ask(AUTHOR, gateway("66")).ask(AUTHOR, on_conflict(OnConflict::Warn));
    let learnt = |last: &str| {
        let gateway = Some(address(&format!("10.0.2.{last}")));
        let destination = address("0.0.0.0");
        let route = TableRoute { table: 254, destination, prefix: 0, gateway, onlink: false, ifindex: 3, protocol: 4 };
        first.host.netns(NS, |netns| {
            netns.routing.routes.retain(|route| route.table != 254);
            netns.routing.routes.push(route);
        });
    };
    learnt("9");
    let plan = first.plan().unwrap();
    first.perform(&plan);
    learnt("7");
    let mut second = Scene::in_namespace_of(first.host.clone())
        .ask(ADMIN, interface("eth1", "backup"))
        .ask(ADMIN, Ok(What::Routes(request::Routes::Auto)));
    second.siblings.push(first.record("db", &plan));
    assert_eq!(second.plan().unwrap().refusal(), None);
}

#[test]
fn what_routes_brought_goes_with_the_wish() {
    let scene =
        two_uplinks(ADMIN).ask(ADMIN, Ok(What::Gateway("eth1".parse().unwrap(), address("10.0.2.1")))).applied();
    let record = scene.previous.clone().unwrap();
    let mut facts = scene.host.kernel(NS).facts(&[]).unwrap();
    facts.routing = Some(scene.host.kernel(NS).routing().unwrap());
    let undone = undo::in_namespace(&record, &[], &facts, 1, &mut Vec::new());
    let words: Vec<String> = undone.iter().map(ToString::to_string).collect();
    assert_eq!(words.iter().filter(|word| word.contains("rule")).count(), 2, "{words:?}");
    assert_eq!(words.iter().filter(|word| word.contains("delete the route")).count(), 2, "{words:?}");
    // A sibling that relies on the same table keeps it.
    let kept = undo::in_namespace(&record, std::slice::from_ref(&record), &facts, 1, &mut Vec::new());
    assert!(!kept.iter().any(|change| matches!(change, Change::DeleteRule(_) | Change::DeleteRoute(..))));
    // Off again, by hand: rules first.
    let off = scene.ask(Rank::CommandLine, Ok(What::Routes(request::Routes::Off)));
    let plan = off.plan().unwrap();
    assert!(matches!(plan.steps[0].change, Change::DeleteRule(_)), "{:?}", changes(&plan));
    assert_eq!(plan.steps.iter().filter(|step| matches!(step.change, Change::DeleteRoute(..))).count(), 2);
}

#[test]
fn two_in_one_namespace_agree_on_the_gateway() {
    let gateway = |last: &str| Ok(What::Gateway("eth1".parse().unwrap(), address(&format!("10.0.2.{last}"))));
    let mut first = two_uplinks(ADMIN).ask(ADMIN, gateway("1")).applied();
    let sibling = Record { name: "db".into(), ..first.previous.take().unwrap() };
    let second = |last: &str| {
        let mut scene = Scene::in_namespace_of(first.host.clone())
            .ask(ADMIN, interface("eth1", "backup"))
            .ask(ADMIN, Ok(What::Routes(request::Routes::Auto)))
            .ask(ADMIN, gateway(last));
        scene.siblings.push(sibling.clone());
        scene
    };
    let plan = second("1").plan().unwrap();
    assert!(plan.refusal().is_none() && plan.steps.is_empty(), "{:?}", changes(&plan));
    let refused = second("9").plan().unwrap();
    assert!(refused.refusal().unwrap().contains("rely on 10.0.2.1"), "{:?}", refused.refusal());
    let warned = second("9").ask(ADMIN, on_conflict(OnConflict::Warn)).plan().unwrap();
    assert!(warned.refusal().is_none() && warned.steps.is_empty(), "{:?}", changes(&warned));
}

/// eth1 has another address instead of one that it has.
fn readdress(scene: &Scene, old: &str, new: &str) {
    scene.host.netns(NS, |netns| {
        let moved = netns.addresses.iter_mut().find(|own| own.ip == address(old)).expect("eth1's address");
        moved.ip = address(new);
    });
}

/// What is left in the namespace once everything has been performed and taken back.
fn left_by(scene: &Scene, record: &Record, siblings: &[Record]) -> Vec<String> {
    let mut kernel = scene.host.kernel(NS);
    let facts = Facts { routing: Some(kernel.routing().unwrap()), ..kernel.facts(&[]).unwrap() };
    for change in undo::in_namespace(record, siblings, &facts, 1, &mut Vec::new()) {
        kernel.perform(&change).unwrap();
    }
    let routing = kernel.routing().unwrap();
    let routes = routing.routes.iter().map(|route| route.by("it"));
    routes.chain(routing.rules.iter().map(ToString::to_string)).collect()
}

fn gateway(last: &str) -> Asked {
    Ok(What::Gateway("eth1".parse().unwrap(), address(&format!("10.0.2.{last}"))))
}

/// The kernel gives a new endpoint any free id, that of one which is gone and known by it, too.
#[test]
fn the_id_of_an_endpoint_that_is_gone_may_go_to_a_new_one() {
    let mut scene = Scene::upstream().ask(ADMIN, interface("eth1", "backup")).applied();
    // What the kernel gives first.
    scene.previous.as_mut().unwrap().interfaces[0].endpoints[0].id = 1;
    scene.host.netns(NS, |netns| netns.endpoints.clear());
    let with_eth0 = scene.ask(Rank::CommandLine, interface("eth0", "subflow"));
    let plan = with_eth0.plan().unwrap();
    with_eth0.perform(&plan);
    assert_eq!(with_eth0.host.kernel(NS).facts(&[]).unwrap().endpoints.len(), 2, "{:?}", changes(&plan));
}

/// Two that are gone may have had one id, one after the other.
#[test]
fn two_endpoints_that_are_gone_and_had_one_id_get_two() {
    let mut scene = Scene::upstream().ask(ADMIN, interface("eth*", "backup")).applied();
    for interface in &mut scene.previous.as_mut().unwrap().interfaces {
        interface.endpoints.iter_mut().for_each(|endpoint| endpoint.id = 7);
    }
    scene.host.netns(NS, |netns| netns.endpoints.clear());
    let plan = scene.plan().unwrap();
    scene.perform(&plan);
    assert_eq!(scene.host.kernel(NS).facts(&[]).unwrap().endpoints.len(), 2);
}

/// However far the hooks had come that were killed.
#[test]
fn what_was_there_before_killed_hooks_goes() {
    let mut scene = two_uplinks(ADMIN).ask(ADMIN, gateway("1")).applied();
    let applied = scene.previous.take().unwrap();
    let killed = |scene: &Scene, plan: &Plan| {
        let writer = Writer {
            pid: 1,
            start_time: 1,
            follows: false,
            before: Some(Box::new(applied.clone())),
            killed: Vec::new(),
        };
        Some(Record { at_work: Some(writer), ..scene.record("web", plan) })
    };
    readdress(&scene, "10.0.2.2", "10.0.2.9");
    scene = scene.ask(Rank::CommandLine, gateway("7"));
    scene.previous = Some(applied.clone());
    // One before it has done anything.
    scene.previous = killed(&scene, &scene.plan().unwrap());
    let plan = scene.plan().unwrap();
    let done = changes(&plan).join("\n");
    assert!(done.contains("delete the IPv4 rule from 10.0.2.2"), "{done}");
    let (deleted, added) = (done.find("delete the route default via 10.0.2.1"), done.find("add the route default"));
    assert!(deleted.is_some() && deleted < added, "{done}");
    // One when it has done everything, and one more before it has done anything: of two that were interrupted, the last
    // and what was in force before both are on record.
    scene.perform(&plan);
    readdress(&scene, "10.0.2.9", "10.0.2.5");
    scene.previous = killed(&scene, &plan);
    scene.previous = killed(&scene, &scene.plan().unwrap());
    let plan = scene.plan().unwrap();
    assert!(changes(&plan).join("\n").contains("delete the IPv4 rule from 10.0.2.9"), "{:?}", changes(&plan));
    scene.perform(&plan);
    assert_eq!(left_by(&scene, &scene.record("web", &plan), &[]), [""; 0]);
}

/// A table that nobody has any more is known until it is empty, whoever is killed and asks for other things then.
#[test]
fn a_table_that_is_being_emptied_is_not_forgotten() {
    let mut scene = two_uplinks(ADMIN).ask(ADMIN, gateway("1")).applied();
    scene = scene.ask(Rank::CommandLine, interface("eth1", "off"));
    let plan = scene.plan().unwrap();
    assert_eq!(plan.leaving_tables, [7800].into());
    let killed = Record { leaving_tables: plan.leaving_tables.clone(), ..scene.record("web", &plan) };
    assert_eq!(killed.tables(), [7800].into());
    assert_eq!(left_by(&scene, &killed, &[]), [""; 0]);
}

/// Nobody takes away what another one's record has, and what neither has any more goes with the one who looks last.
#[test]
fn two_in_one_namespace_follow_an_address_together() {
    let mut web = two_uplinks(ADMIN).ask(ADMIN, gateway("1")).applied();
    let mut db = Scene::in_namespace_of(web.host.clone());
    db.request = web.request.clone();
    db.previous = web.previous.clone();
    db.siblings = web.previous.iter().cloned().collect();
    web.siblings = db.previous.iter().cloned().collect();
    readdress(&web, "10.0.2.2", "10.0.2.9");
    let plan = web.plan().unwrap();
    web.perform(&plan);
    let rules = |scene: &Scene| scene.host.kernel(NS).routing().unwrap().rules;
    let old = |rule: &Rule| rule.from == Some(address("10.0.2.2"));
    assert!(rules(&web).iter().any(old), "db's record still has it");
    let web_now = web.record("web", &plan);
    db.siblings = vec![web_now.clone()];
    let plan = db.plan().unwrap();
    db.perform(&plan);
    assert!(!rules(&db).iter().any(old), "{:?}", rules(&db));
    let db_now = db.record("db", &plan);
    assert_eq!(left_by(&db, &web_now, std::slice::from_ref(&db_now)).len(), 4, "db has the way out still");
    assert_eq!(left_by(&db, &db_now, &[]), [""; 0]);
}

/// The kernel has dropped everything; the record has not.
#[test]
fn the_table_of_an_interface_that_is_down_stays_its_own() {
    let scene = two_uplinks(ADMIN).ask(ADMIN, gateway("1")).applied();
    let up = scene.previous.as_ref().unwrap().interfaces[0].routing.clone();
    scene.host.netns(NS, |netns| {
        netns.routing = Default::default();
        netns.no_route.insert(2);
        let link = netns.links.iter_mut().find(|link| link.name == "eth1").unwrap();
        link.flags &= !(libc::IFF_UP as u32);
    });
    let eth0: Asked = Ok(What::Gateway("eth0".parse().unwrap(), address("10.0.1.1")));
    let plan = scene.ask(ADMIN, interface("eth0", "subflow")).ask(ADMIN, eth0).plan().unwrap();
    assert_eq!(entry(&plan, "eth0").routing.as_ref().unwrap().table, 7801, "{:?}", changes(&plan));
    let down = entry(&plan, "eth1");
    assert_eq!((down.state, &down.routing), (State::Pending, &up));
    assert!(down.reason.as_ref().unwrap().contains("eth1 is down"), "{down:?}");
}
