//! Two uplinks and one default route, with real engines: `doctor` names what is missing, `routes=auto` mends it, the
//! packets show it, and after `release` all rules and routes are as they were.
//!
//! What was before is written down by a hook of the administrator's own, which stands before ours. It also takes the
//! kernel's own IPv6 addresses away, which would come to the routes at any moment.

mod common;

use std::cell::Cell;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use common::*;
use serde_json::{Value, json};

/// Slow enough to last through a test, in bytes per second.
const SLOW: u64 = 20_000;

/// Annotations may ask for routes, which they may not without the administrator's word.
const POLICY: &str = "[annotations]\nroutes = true\n";

/// The kernel has noticed that the links are up; no IPv6 address is its own, and none has to prove itself.
const SETTLE: &str = "for i in eth0 eth1; do
  until ip -o link show dev $i | grep -q \"state UP\"; do sleep 0.05; done
  ip link set $i addrgenmode none; ip -6 addr flush dev $i scope link
done
until [ -z \"$(ip -6 addr show tentative)\" ]; do sleep 0.05; done";

/// Drops what arrives where answers would not leave.
const STRICT: &str = "for i in all eth0 eth1; do echo 1 >/proc/sys/net/ipv4/conf/$i/rp_filter; done";

/// Everything that `routes=auto` could change.
const ROUTING: &str = "ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all
grep . /proc/sys/net/ipv4/conf/*/rp_filter";

with_each_runtime! {
    two_uplinks_second_path_works_by_routes_auto,
    two_uplinks_server_with_strict_rp_filter_gets_its_second_subflow,
    two_uplinks_of_podman_second_path_works_by_routes_auto,
    two_uplinks_of_podman_server_with_strict_rp_filter_gets_its_second_subflow,
}

// --- the engines ----------------------------------------------------------------------------------------------------

/// What a container asks for.
#[derive(Clone, Copy)]
struct Wish<'a> {
    interfaces: &'a str,
    auto: bool,
}

/// A container of some engine.
trait Uplinked {
    /// By which its users know it, and the ledger too.
    fn name(&self) -> String;
    fn netns(&self) -> Netns;
    /// A program in the container.
    fn exec(&self, argv: &[&str]) -> Running;
    /// `mptcp-hook` as whoever started the container.
    fn hook(&self, arguments: &[&str]) -> Running;
    /// Its regular end.
    fn end(&self);
}

/// A container of crun's or runc's.
struct Oci<'a> {
    sandbox: &'a Sandbox,
    container: Container<'a>,
}

impl Uplinked for Oci<'_> {
    fn name(&self) -> String {
        self.container.id().to_owned()
    }

    fn netns(&self) -> Netns {
        self.container.netns()
    }

    fn exec(&self, argv: &[&str]) -> Running {
        self.container.exec(argv)
    }

    fn hook(&self, arguments: &[&str]) -> Running {
        spawn_hook(self.sandbox, arguments)
    }

    fn end(&self) {
        self.container.delete();
    }
}

/// A container of podman's.
struct OfPodman<'a> {
    sandbox: &'a Sandbox,
    member: Member<'a>,
}

impl Uplinked for OfPodman<'_> {
    fn name(&self) -> String {
        self.member.id().to_owned()
    }

    fn netns(&self) -> Netns {
        self.member.netns()
    }

    fn exec(&self, argv: &[&str]) -> Running {
        self.member.exec(argv)
    }

    fn hook(&self, arguments: &[&str]) -> Running {
        spawn_hook(self.sandbox, arguments)
    }

    fn end(&self) {
        self.member.remove();
    }
}

impl Uplinked for Lxc<'_> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn netns(&self) -> Netns {
        Lxc::netns(self)
    }

    fn exec(&self, argv: &[&str]) -> Running {
        self.attach(argv)
    }

    fn hook(&self, arguments: &[&str]) -> Running {
        self.spawn_hook(arguments)
    }

    fn end(&self) {
        self.stop();
    }
}

fn spawn_hook(sandbox: &Sandbox, arguments: &[&str]) -> Running {
    let program = hook().display().to_string();
    sandbox.spawn(&[&[program.as_str()], arguments].concat())
}

/// The container's side and the server's.
struct World<'a> {
    sandbox: &'a Sandbox,
    paths: TwoPaths<'a>,
    /// The server's interfaces on the two paths.
    ends: [&'static str; 2],
    /// The container's addresses of both families where it has both.
    dual_stack: bool,
}

impl World<'_> {
    /// Where the earlier hook writes what it finds; everybody may write there.
    fn before_file(&self) -> PathBuf {
        let directory = self.sandbox.dir().join("before");
        if !directory.exists() {
            std::fs::create_dir(&directory).expect("a directory for all");
            std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o777)).expect("the directory's mode");
        }
        directory.join("routing")
    }

    /// What the earlier hook runs in the container's network namespace.
    fn early_script(&self, more: &str) -> String {
        format!("{SETTLE}\n{more}\nfile={}\nrm -f $file\n{{ {ROUTING}; }} >$file", self.before_file().display())
    }

    /// The earlier hook for OCI engines.
    fn early_program(&self, more: &str) -> PathBuf {
        let file = self.sandbox.dir().join("early");
        let text = format!(
            "#!/bin/sh\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
             pid=$(tr -d '\\n' | sed -n 's/.*\"pid\" *: *\\([0-9]*\\).*/\\1/p')\n\
             exec nsenter --target $pid --net sh -ec '{}'\n",
            self.early_script(more)
        );
        self.sandbox.write_program(&file, &text);
        file
    }

    /// What the earlier hook has found.
    fn before(&self) -> String {
        std::fs::read_to_string(self.before_file()).expect("the earlier hook has run").trim().to_owned()
    }

    /// The same now.
    #[track_caller]
    fn routing(&self, container: &dyn Uplinked) -> String {
        self.sandbox.sh_in(&container.netns(), ROUTING)
    }

    #[track_caller]
    fn address(&self, container: &dyn Uplinked, interface: &str) -> IpAddr {
        let json = self.sandbox.run_in(&container.netns(), &["ip", "-j", "-4", "address", "show", interface]).ok();
        let links: Value = serde_json::from_str(&json).unwrap_or_else(|e| panic!("addresses {json}: {e}"));
        links[0]["addr_info"][0]["local"].as_str().and_then(|a| a.parse().ok()).expect("an address")
    }

    #[track_caller]
    fn doctor(&self, container: &dyn Uplinked, more: &[&str]) -> Diagnosis {
        let name = container.name();
        let arguments = [&["doctor", &name, "--json"], more].concat();
        Diagnosis::read(container.hook(&arguments).wait(LIMIT))
    }

    /// Lets it go by hand, looks that all is as before, and ends it.
    #[track_caller]
    fn release_restores(&self, container: &dyn Uplinked) {
        assert_ne!(self.routing(container), self.before(), "there is nothing to take back");
        container.hook(&["release", &container.name()]).wait(ENGINE_LIMIT).ok();
        assert_eq!(self.routing(container), self.before());
        let json = container.hook(&["status", "--json"]).wait(ENGINE_LIMIT).ok();
        let status: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!((&status["containers"], &status["settings"]), (&json!([]), &json!([])), "{status:#}");
        container.end();
    }
}

/// `mptcp-hook capture` beside something else.
struct Watching {
    running: Running,
}

impl Watching {
    #[track_caller]
    fn start(container: &dyn Uplinked) -> Self {
        let mut running = container.hook(&["capture", &container.name(), "--json"]);
        wait_until("a capture", LIMIT, || {
            assert!(running.is_running(), "{}", running.stderr());
            running.stderr().contains("capturing")
        });
        Self { running }
    }

    /// The MP_JOINs of packets with these flags, on these interfaces: (interface, direction, source, destination,
    /// backup).
    fn joins(&self, flags: &Value) -> Vec<(String, String, String, String, bool)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let lines = self.running.lines();
        let packets = lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let joins = packets.filter(|packet| packet["flags"] == *flags).filter_map(|packet| {
            let options = packet["options"].as_array()?;
            let join = options.iter().find(|option| option["subtype"] == "MP_JOIN")?;
            let [interface, direction, source, destination] =
                ["interface", "direction", "source", "destination"].map(|key| text(&packet[key]));
            Some((interface, direction, source, destination, join["backup"] == true))
        });
        joins.collect()
    }

    /// Waits until a further path has been opened and answered, and gives the SYN's MP_JOIN.
    #[track_caller]
    fn wait_join(&self) -> (String, String, String, String, bool) {
        wait_for("an answered MP_JOIN", LIMIT, || {
            let (asked, answered) = (self.joins(&json!(["SYN"])), self.joins(&json!(["SYN", "ACK"])));
            let asked = asked.into_iter().next()?;
            let is_answer = |other: &(String, String, String, String, bool)| {
                other.0 == asked.0 && other.1 != asked.1 && other.2 == asked.3 && other.3 == asked.2
            };
            answered.iter().any(is_answer).then_some(asked)
        })
    }
}

/// The subflow of an interface among those that the doctor lists.
#[track_caller]
fn subflow_by<'a>(list: &'a Value, interface: &str) -> &'a Value {
    let list = list.as_array().expect("a list of subflows");
    list.iter().find(|subflow| subflow["interface"] == interface).unwrap_or_else(|| panic!("{list:#?}"))
}

// --- a client -------------------------------------------------------------------------------------------------------

/// eth1 as a backup path: without a route it is dead and the doctor says why; with `routes=auto` nothing is wrong, it is
/// established, takes over when eth0 is cut, and becomes a normal path by `apply`.
fn second_path_works_by_routes_auto<'a>(world: &World, start: impl Fn(Wish) -> Box<dyn Uplinked + 'a>) {
    let (sandbox, paths, [first_end, second_end]) = (world.sandbox, &world.paths, world.ends);
    let server = Server::start(sandbox, paths.server());
    let wire = Capture::start(sandbox, paths.server());
    let gateways = if world.dual_stack { "gateway=10.0.2.1,gateway=fd00:2::1" } else { "gateway=10.0.2.1" };
    let peers: &[&str] = if world.dual_stack { &["10.0.0.1:5000", "[fd00::1]:5000"] } else { &["10.0.0.1:5000"] };
    let backup = format!("eth1=backup,{gateways}");
    let wish = |auto| Wish { interfaces: if auto { &backup } else { "eth1=backup" }, auto };

    let web = start(wish(false));
    let missing = vec!["route-missing"; peers.len()];
    let found = world.doctor(&*web, &[]);
    found.is(&missing, 1);
    assert_eq!(found.finding("route-missing")["interface"], "eth1");
    for peer in peers {
        let found = world.doctor(&*web, &["--probe", peer]);
        found.is(&[&missing[..], &["probe-subflow-missing"]].concat(), 1);
        assert_eq!(found.finding("probe-subflow-missing")["interface"], "eth1");
    }
    assert_eq!(wire.joins(), []);
    if !world.dual_stack {
        // What the doctor names mends it, also in a container that runs.
        let command = found.command("route-missing").replace("GATEWAY", "10.0.2.1");
        let words: Vec<&str> = command.split(' ').collect();
        assert_eq!(words[..2], ["mptcp-hook", "apply"], "{command}");
        web.hook(&words[1..]).wait(ENGINE_LIMIT).ok();
        world.doctor(&*web, &["--probe", peers[0]]).is_clean();
    }
    web.end();

    let web = start(wish(true));
    world.doctor(&*web, &[]).is_clean();
    for peer in peers {
        let found = world.doctor(&*web, &["--probe", peer]);
        found.is_clean();
        let subflows = &found.json["probe"]["subflows"];
        for (interface, backup) in [("eth0", false), ("eth1", true)] {
            let subflow = subflow_by(subflows, interface);
            assert_eq!((&subflow["state"], &subflow["backup"]), (&json!("ESTAB"), &json!(backup)), "{subflow:#}");
        }
    }
    let text = web.hook(&["doctor", &web.name(), "--probe", peers[0]]).wait(LIMIT).ok();
    assert!(text.contains("Nothing is wrong.") && text.contains("ESTAB"), "{text}");

    let source = world.address(&*web, "eth1");
    let send = |bytes, rate| {
        let argv = traffic::send_arguments(traffic::PROGRAM, paths.address(), bytes, Some(rate));
        Sender::attach(web.exec(&argv.iter().map(String::as_str).collect::<Vec<_>>()))
    };
    // As a normal path first: the same route, and no backup bit.
    web.hook(&["apply", &web.name(), "--interface", &format!("eth1=subflow,{gateways}")]).wait(ENGINE_LIMIT).ok();
    for backup in [false, true] {
        if backup {
            web.hook(&["apply", &web.name(), "--interface", &format!("eth1=backup,{gateways}")])
                .wait(ENGINE_LIMIT)
                .ok();
        }
        let seen = wire.joins().len();
        let watching = Watching::start(&*web);
        let mut transfer = send(1 << 30, SLOW);
        transfer.wait_sent(1);
        let join = watching.wait_join();
        let expected = ("eth1", "out", &source.to_string(), &paths.address().to_string(), backup);
        assert_eq!((join.0.as_str(), join.1.as_str(), &join.2, &join.3, join.4), expected);
        // The packet socket of the tests says the same at the other end, where a bridge's port sees it once more.
        let joins = || wire.joins().into_iter().skip(seen).find(|join| join.interface == second_end);
        let join = wait_for("the join at the server", LIMIT, joins);
        assert_eq!((join.source, join.backup), (source, backup));
        let found = world.doctor(&*web, &[]);
        found.is_clean();
        let subflow = subflow_by(&found.json["subflows"], "eth1");
        assert_eq!((&subflow["state"], &subflow["backup"]), (&json!("ESTAB"), &json!(backup)), "{subflow:#}");
    }

    // To ask an engine takes its time.
    let netns = web.netns();
    let counted = || [sandbox.counters(&netns, "eth1").sent, paths.received(second_end)];
    let before = Cell::new([0; 2]);
    let send = |bytes, rate| {
        before.set(counted());
        send(bytes, rate)
    };
    let looks = || {
        let left = counted()[0] - before.get()[0];
        assert!(left < 100_000, "{left} bytes left by the backup path");
    };
    let seen = assert_fails_over(paths, &wire, world.ends, send, looks);
    wait_until("the server's word", LIMIT, || {
        server.received().iter().any(|line| line.starts_with("received 8000000 bytes mptcp=yes"))
    });
    let [inside, outside] = [0, 1].map(|side| counted()[side] - before.get()[side]);
    for (who, bytes) in [("the container's", inside), ("the server's", outside)] {
        assert!((seen..seen + seen / 5).contains(&bytes), "{seen} bytes seen, {who} interface counted {bytes}");
    }
    paths.mend(first_end);
    wait_until("the carrier", LIMIT, || !world.routing(&*web).contains("linkdown"));

    world.release_restores(&*web);
}

// --- a server -------------------------------------------------------------------------------------------------------

/// A server that announces both its addresses and drops what it would not answer by the same interface: the client's
/// join to the second address hangs without a route, and is established with it.
fn server_gets_its_second_subflow<'a>(world: &World, start: impl Fn(Wish) -> Box<dyn Uplinked + 'a>) {
    let (sandbox, paths, [first_end, second_end]) = (world.sandbox, &world.paths, world.ends);
    let client = paths.server();
    let serve = |web: &dyn Uplinked| Server::attach(web.exec(&[traffic::PROGRAM, "serve", "--port", "5000"]));
    // The client asks from an address that is on neither link, as clients do that are further away.
    let connect = |web: &dyn Uplinked, bytes, rate| {
        sandbox.sh_in(
            client,
            &format!(
                "ip route change 10.0.1.0/24 dev {first_end} proto kernel scope link src 10.0.0.1
                 ip route change 10.0.2.0/24 dev {second_end} proto kernel scope link src 10.0.0.1"
            ),
        );
        paths.knows_neighbour(second_end, &web.netns(), "eth1", world.address(web, "eth1"));
        Sender::start(sandbox, client, world.address(web, "eth0"), bytes, Some(rate))
    };

    let web = start(Wish { interfaces: "eth0=signal; eth1=signal", auto: false });
    let server = serve(&*web);
    let mut sender = connect(&*web, 1 << 30, SLOW);
    sender.wait_sent(1);
    let second = world.address(&*web, "eth1").to_string();
    wait_until("a join that hangs", LIMIT, || {
        let sockets = sandbox.sh_in(client, "ss -tanH");
        sockets.lines().any(|line| line.starts_with("SYN-SENT") && line.contains(&second))
    });
    let found = world.doctor(&*web, &[]);
    found.is(&["rp-filter-strict"], 1);
    assert_eq!(found.finding("rp-filter-strict")["interface"], "eth1");
    found.says("rp-filter-strict", "evidence", "conf.all 1");
    drop((sender, server));
    web.end();

    let web = start(Wish { interfaces: "eth0=signal; eth1=signal,gateway=10.0.2.1", auto: true });
    world.doctor(&*web, &[]).is_clean();
    let server = serve(&*web);
    let watching = Watching::start(&*web);
    let second = world.address(&*web, "eth1").to_string();
    // It goes on for as long as anybody looks.
    let mut sender = connect(&*web, 1 << 30, SLOW);
    sender.wait_sent(1);
    let join = watching.wait_join();
    assert_eq!((join.0.as_str(), join.1.as_str(), join.2.as_str(), &join.3), ("eth1", "in", "10.0.0.1", &second));
    let found = world.doctor(&*web, &[]);
    found.is_clean();
    assert_eq!(subflow_by(&found.json["subflows"], "eth1")["state"], "ESTAB");
    drop(sender);
    // Whoever was so busy that it was over before the join sends once more, and takes half a minute.
    let is_joined = [600_000, 100_000].into_iter().enumerate().any(|(number, rate)| {
        connect(&*web, 3_000_000, rate).finish(LIMIT);
        // A runtime may pass on what a program prints after the program's peer has gone.
        let said = wait_for("the server's word", LIMIT, || {
            server.received().into_iter().filter(|line| line.starts_with("received 3000000 bytes")).nth(number)
        });
        said == "received 3000000 bytes mptcp=yes subflows=2"
    });
    assert!(is_joined, "{:?}", server.received());
    drop((server, watching));
    world.release_restores(&*web);
}

// --- crun and runc --------------------------------------------------------------------------------------------------

/// A namespace that outlives its containers, wired with one default route for each family.
fn oci_world<'a>(sandbox: &'a Sandbox, wiring: &Wiring, dual_stack: bool) -> World<'a> {
    sandbox.patient_policy(POLICY);
    let paths = TwoPaths::with_container_netns(sandbox, &wiring.clone().without_second_route());
    World { sandbox, paths, ends: ["eth0", "eth1"], dual_stack }
}

fn start_oci<'a>(world: &World<'a>, runtime: Runtime, wish: Wish, early: &str) -> Box<dyn Uplinked + 'a> {
    let early = world.early_program(early).display().to_string();
    let mut bundle = Bundle::new(world.sandbox, if wish.auto { "with" } else { "without" })
        .in_netns("ctr")
        .annotation("mptcp-hook/name", "web")
        .annotation("mptcp-hook/interfaces", wish.interfaces)
        .hook(Stage::CreateRuntime, HookEntry::program(&early))
        .mptcp_hook(Stage::CreateRuntime);
    if wish.auto {
        bundle = bundle.annotation("mptcp-hook/routes", "auto");
    }
    Box::new(Oci { sandbox: world.sandbox, container: bundle.start(runtime) })
}

fn two_uplinks_second_path_works_by_routes_auto(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let world = oci_world(&sandbox, &Wiring::new().dual_stack(), true);
    second_path_works_by_routes_auto(&world, |wish| start_oci(&world, runtime, wish, ""));
    // The hook at poststop does what release does.
    let web = start_oci(&world, runtime, Wish { interfaces: "eth1=backup,gateway=10.0.2.1", auto: true }, "");
    assert_ne!(world.routing(&*web), world.before());
    web.end();
    assert_eq!(sandbox.sh_in(&Netns::named("ctr"), ROUTING), world.before());
    sandbox.assert_ledger_is_empty();
}

fn two_uplinks_server_with_strict_rp_filter_gets_its_second_subflow(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let world = oci_world(&sandbox, &Wiring::new(), false);
    server_gets_its_second_subflow(&world, |wish| start_oci(&world, runtime, wish, STRICT));
}

// --- podman ---------------------------------------------------------------------------------------------------------

/// net1 has no default route.
fn podman_world<'a>(sandbox: &'a Sandbox, runtime: Runtime, early: &str) -> (World<'a>, Podman<'a>) {
    sandbox.patient_policy(POLICY);
    let world = World { sandbox, paths: TwoPaths::at_host(sandbox), ends: ["br0", "br1"], dual_stack: false };
    let podman = Podman::new(sandbox, runtime);
    podman::write_network(sandbox, "net1", 2, DefaultRoute::None);
    podman.add_hook("10-early.json", &world.early_program(early));
    (world, podman)
}

fn start_podman<'a>(podman: &'a Podman<'a>, wish: Wish) -> Box<dyn Uplinked + 'a> {
    let interfaces = podman.annotation("mptcp-hook/interfaces", wish.interfaces);
    let mut options = vec![interfaces.as_str()];
    if wish.auto {
        options.push("--annotation=mptcp-hook/routes=auto");
    }
    let member = podman.start_on_both(if wish.auto { "with" } else { "without" }, &options);
    let routes = podman.sandbox.sh_in(&member.netns(), "ip -4 route show default");
    assert!(routes.lines().count() == 1 && routes.contains("dev eth0"), "not one default route by eth0: {routes}");
    Box::new(OfPodman { sandbox: podman.sandbox, member })
}

fn two_uplinks_of_podman_second_path_works_by_routes_auto(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let (world, podman) = podman_world(&sandbox, runtime, "");
    second_path_works_by_routes_auto(&world, |wish| start_podman(&podman, wish));
}

fn two_uplinks_of_podman_server_with_strict_rp_filter_gets_its_second_subflow(runtime: Runtime) {
    let sandbox = Sandbox::new();
    let (world, podman) = podman_world(&sandbox, runtime, STRICT);
    server_gets_its_second_subflow(&world, |wish| start_podman(&podman, wish));
}

// --- LXC ------------------------------------------------------------------------------------------------------------

fn start_lxc<'a>(world: &World<'a>, starter: Starter, wish: Wish, early: &str) -> Box<dyn Uplinked + 'a> {
    let interfaces: String = wish.interfaces.split(';').map(|one| format!("--interface {} ", one.trim())).collect();
    let routes = if wish.auto { "--routes auto" } else { "" };
    let mut lines = [vec!["ipv4.address = 10.0.1.2/24", "ipv4.gateway = 10.0.1.1"], vec!["ipv4.address = 10.0.2.2/24"]];
    if world.dual_stack {
        lines[0].extend(["ipv6.address = fd00:1::2/64", "ipv6.gateway = fd00:1::1"]);
        lines[1].push("ipv6.address = fd00:2::2/64");
    }
    let container = Lxc::started_by(world.sandbox, if wish.auto { "with" } else { "without" }, starter)
        .hook_version(1)
        .veth(0, &lines[0])
        .veth(1, &lines[1])
        .script("start-host", &world.early_script(early))
        .start_host(&format!("{interfaces}{routes}"))
        .post_stop();
    container.start();
    Box::new(container)
}

fn lxc_world(sandbox: &Sandbox, dual_stack: bool) -> World<'_> {
    let paths = two_bridges(sandbox);
    if dual_stack {
        sandbox.sh("ip addr add fd00:1::1/64 dev br0 nodad; ip addr add fd00:2::1/64 dev br1 nodad");
    }
    World { sandbox, paths, ends: ["br0", "br1"], dual_stack }
}

#[test]
fn two_uplinks_of_lxc_second_path_works_by_routes_auto() {
    let sandbox = Sandbox::new();
    let world = lxc_world(&sandbox, true);
    second_path_works_by_routes_auto(&world, |wish| start_lxc(&world, Starter::Root, wish, ""));
}

#[test]
fn two_uplinks_of_an_unprivileged_user_of_lxc_second_path_works_by_routes_auto() {
    let sandbox = Sandbox::new();
    let world = lxc_world(&sandbox, false);
    second_path_works_by_routes_auto(&world, |wish| start_lxc(&world, Starter::User, wish, ""));
}

#[test]
fn two_uplinks_of_lxc_server_with_strict_rp_filter_gets_its_second_subflow() {
    let sandbox = Sandbox::new();
    let world = lxc_world(&sandbox, false);
    server_gets_its_second_subflow(&world, |wish| start_lxc(&world, Starter::Root, wish, STRICT));
}
