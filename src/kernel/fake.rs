//! Kernels for tests: one of multipath-tcp.org and one of upstream, behaving as they were seen to behave, what they
//! accept silently included. A [`FakeHost`] is one machine: all [`FakeKernel`]s of it share the values that the kernel
//! has once, and each sees its own network namespace.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::panic::resume_unwind;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;

use super::netlink::KernelError;
use super::{
    Address, Change, ENDPOINTS_MAX, Endpoint, Facts, Kernel, Kind, Limits, Link, RouteState, Routing, Seen,
    SeenSetting, TableRoute,
};
use crate::request::LIMIT_MAX;
use crate::request::flags::{EndpointFlags, IFF_HANDOVER, IFF_MPBACKUP, IFF_NOMULTIPATH};
use crate::request::setting::{self, SettingKey};

/// The host's own network namespace, by the inode number that it has here.
pub const HOME: u64 = 0;
/// What `ip link` shows of an ordinary interface: UP, BROADCAST, MULTICAST.
pub const ORDINARY: u32 = 0x1003;

/// Who has a sysctl.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// The host; other namespaces do not have the file.
    HostOnly,
    /// The host; other namespaces have the file without a write bit.
    HostReadOnlyElsewhere,
    /// The host, although the file is writable everywhere.
    HostWritableElsewhere,
    /// Each network namespace for itself.
    Namespace,
}

/// What the kernel's parser makes of a write.
#[derive(Clone, PartialEq, Eq)]
enum Form {
    /// Integers, base 0, stored in decimal; what follows the last of them is ignored.
    Numbers { count: usize, low: i128, high: i128 },
    /// `Y` or `N`.
    Truth,
    /// One of these names, each with the module that choosing it loads.
    Name(Vec<(&'static str, Option<&'static str>)>),
}

#[derive(Clone)]
struct Definition {
    owner: Owner,
    form: Form,
    initial: String,
}

/// One network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Netns {
    /// Its interfaces.
    pub links: Vec<Link>,
    /// Their addresses.
    pub addresses: Vec<Address>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Its limits; None on multipath-tcp.org kernels.
    pub limits: Option<Limits>,
    /// The interfaces that default routes use.
    pub default_route_links: Vec<u32>,
    /// The interfaces without any usable route.
    pub no_route: BTreeSet<u32>,
    /// Its routing tables and rules; of tables only those that nothing else here names.
    pub routing: Routing,
    /// The sysctls that it owns.
    pub sysctls: BTreeMap<SettingKey, String>,
}

/// Everything that can be changed, to be compared with what it was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// What the kernel has once: sysctls of the host and parameters of the loaded modules.
    pub settings: BTreeMap<SettingKey, String>,
    /// The namespaces, by inode number.
    pub namespaces: BTreeMap<u64, Netns>,
}

/// What goes wrong with a change.
pub enum Fault {
    /// The kernel refuses it.
    Refused,
    /// The kernel reports success and does nothing.
    Ignored,
    /// The hook is killed before it.
    KilledBefore,
    /// The hook is killed after it.
    KilledAfter,
    /// Somebody else does this right before it.
    After(Box<dyn FnOnce(&FakeHost)>),
}

/// What unwinds from a hook that was killed. No panic message is printed for it.
#[derive(Debug)]
pub struct Killed;

thread_local! {
    static KILLED_AT: Cell<usize> = const { Cell::new(0) };
}

/// The thread's hook is killed at the `number`th point from now on, counted from 1: before and after each change to the
/// kernel, when it reads back, and at each change to the ledger's files. 0 is never. What was asked for before is
/// forgotten; false if it had not come to that.
pub fn kill_at(number: usize) -> bool {
    KILLED_AT.replace(number) == 0
}

/// A point at which a hook can be killed.
pub fn kill_point() {
    let left = KILLED_AT.get();
    KILLED_AT.set(left.saturating_sub(1));
    if left == 1 {
        resume_unwind(Box::new(Killed));
    }
}

struct Machine {
    kind: Kind,
    release: &'static str,
    definitions: BTreeMap<SettingKey, Definition>,
    modules: BTreeMap<&'static str, Vec<(&'static str, &'static str, Form)>>,
    state: State,
    /// The bits above the lowest 16 that interface flags keep.
    link_bits: u32,
    next_id: BTreeMap<u64, u8>,
    congestion_allowed: Vec<&'static str>,
    initial_user_namespace: bool,
    host_reachable: bool,
    changes: Vec<String>,
    faults: BTreeMap<usize, Fault>,
    killed_at_confirm: bool,
    subflows_closed: usize,
}

/// One machine.
#[derive(Clone)]
pub struct FakeHost(Rc<RefCell<Machine>>);

/// A kernel as [`Kernel`] shows it to the hook, from one namespace.
pub struct FakeKernel {
    host: FakeHost,
    inode: u64,
}

fn key(path: &str) -> SettingKey {
    SettingKey::Sysctl(path.into())
}

fn number(low: i128, high: i128) -> Form {
    Form::Numbers { count: 1, low, high }
}

fn any_number() -> Form {
    number(i32::MIN.into(), i32::MAX.into())
}

fn os_error(errno: i32) -> anyhow::Error {
    anyhow!(io::Error::from_raw_os_error(errno))
}

fn netlink_error(errno: Errno) -> anyhow::Error {
    anyhow!(KernelError { errno, message: None })
}

impl FakeHost {
    fn new(kind: Kind, release: &'static str, link_bits: u32) -> Self {
        let host = Self(Rc::new(RefCell::new(Machine {
            kind,
            release,
            definitions: BTreeMap::new(),
            modules: BTreeMap::new(),
            state: State::default(),
            link_bits,
            next_id: BTreeMap::new(),
            congestion_allowed: vec!["reno", "cubic"],
            initial_user_namespace: true,
            host_reachable: true,
            changes: Vec::new(),
            faults: BTreeMap::new(),
            killed_at_confirm: false,
            subflows_closed: 0,
        })));
        let huge = number(0, i32::MAX.into());
        host.define("net/core/netdev_max_backlog", Owner::HostOnly, huge.clone(), "1000");
        host.define("net/core/rmem_max", Owner::HostReadOnlyElsewhere, huge, "212992");
        host.define("net/netfilter/nf_hooks_lwtunnel", Owner::HostWritableElsewhere, number(0, 1), "0");
        host.define("net/ipv4/tcp_syn_retries", Owner::Namespace, number(1, 127), "6");
        let triple = Form::Numbers { count: 3, low: 1, high: i32::MAX.into() };
        host.define("net/ipv4/tcp_rmem", Owner::Namespace, triple, "4096\t131072\t6291456");
        let controls = vec![("reno", None), ("cubic", None), ("bbr", Some("tcp_bbr")), ("lia", Some("mptcp_coupled"))];
        host.define("net/ipv4/tcp_congestion_control", Owner::Namespace, Form::Name(controls), "cubic");
        host
    }

    /// multipath-tcp.org v0.96 (Linux 5.4.188), as it is after booting.
    pub fn mptcp_org() -> Self {
        let host = Self::new(Kind::MptcpOrg, "5.4.188.mptcp", IFF_NOMULTIPATH | IFF_MPBACKUP);
        let managers = vec![
            ("default", None),
            ("fullmesh", Some("mptcp_fullmesh")),
            ("ndiffports", Some("mptcp_ndiffports")),
            ("binder", Some("mptcp_binder")),
            ("netlink", Some("mptcp_netlink")),
        ];
        let schedulers = vec![
            ("default", None),
            ("roundrobin", Some("mptcp_rr")),
            ("redundant", Some("mptcp_redundant")),
            ("blest", Some("mptcp_blest")),
            ("ecf", Some("mptcp_ecf")),
        ];
        for (name, form, initial) in [
            ("mptcp_enabled", any_number(), "1"),
            ("mptcp_version", number(0, 1), "0"),
            ("mptcp_checksum", any_number(), "1"),
            ("mptcp_debug", any_number(), "0"),
            ("mptcp_syn_retries", any_number(), "3"),
            ("mptcp_path_manager", Form::Name(managers), "default"),
            ("mptcp_scheduler", Form::Name(schedulers), "default"),
        ] {
            host.define(&format!("net/mptcp/{name}"), Owner::HostOnly, form, initial);
        }
        {
            let mut machine = host.0.borrow_mut();
            let modules = &mut machine.modules;
            modules.insert(
                "mptcp_fullmesh",
                vec![("num_subflows", "1", any_number()), ("create_on_err", "0", any_number())],
            );
            modules.insert("mptcp_ndiffports", vec![("num_subflows", "2", any_number())]);
            modules.insert("mptcp_rr", vec![("num_segments", "1", number(0, 255)), ("cwnd_limited", "Y", Form::Truth)]);
        }
        host
    }

    /// The same with the bits that OpenMPTCProuter's patches add.
    pub fn open_mptcp_router() -> Self {
        let host = Self::mptcp_org();
        host.0.borrow_mut().link_bits |= IFF_HANDOVER;
        host
    }

    /// A kernel that reports a multipath-tcp.org's success and drops the bits, as upstream does.
    pub fn that_drops_link_bits() -> Self {
        let host = Self::mptcp_org();
        host.0.borrow_mut().link_bits = 0;
        host
    }

    /// Upstream Linux 6.18.
    pub fn upstream() -> Self {
        let host = Self::new(Kind::Upstream, "6.18.0", 0);
        for (name, form, initial) in [
            ("enabled", number(0, 255), "1"),
            ("checksum_enabled", number(0, 255), "0"),
            ("stale_loss_cnt", number(0, i32::MAX.into()), "4"),
            ("pm_type", number(0, 1), "0"),
            ("path_manager", Form::Name(vec![("kernel", None), ("userspace", None)]), "kernel"),
            ("scheduler", Form::Name(vec![("default", None)]), "default"),
        ] {
            host.define(&format!("net/mptcp/{name}"), Owner::Namespace, form, initial);
        }
        host
    }

    fn define(&self, path: &str, owner: Owner, form: Form, initial: &str) {
        let mut machine = self.0.borrow_mut();
        if owner != Owner::Namespace {
            machine.state.settings.insert(key(path), initial.into());
        }
        let definition = Definition { owner, form, initial: initial.into() };
        machine.definitions.insert(key(path), definition);
        machine.state.namespaces.entry(HOME).or_default();
        let defaults = machine.defaults();
        machine.state.namespaces.get_mut(&HOME).expect("was just made").sysctls = defaults;
    }

    /// A release before 6.15, which has `pm_type` alone.
    pub fn without_path_manager_sysctl(self) -> Self {
        let mut machine = self.0.borrow_mut();
        machine.release = "6.12.0";
        machine.definitions.remove(&key("net/mptcp/path_manager"));
        for netns in machine.state.namespaces.values_mut() {
            netns.sysctls.remove(&key("net/mptcp/path_manager"));
        }
        drop(machine);
        self
    }

    /// As a hook in a user namespace sees it.
    pub fn in_user_namespace(self) -> Self {
        self.0.borrow_mut().initial_user_namespace = false;
        self
    }

    /// As a createContainer hook sees it.
    pub fn from_inside(self) -> Self {
        self.0.borrow_mut().host_reachable = false;
        self
    }

    /// A new network namespace, with `lo` and nothing else.
    pub fn add_netns(&self, inode: u64) {
        let mut machine = self.0.borrow_mut();
        let limits = (machine.kind == Kind::Upstream).then_some(Limits { subflows: 2, add_addr_accepted: 0 });
        let lo = Link { index: 1, name: "lo".into(), flags: 0x49, kind: None, mtu: 65536 };
        let sysctls = machine.defaults();
        let netns = Netns { links: vec![lo], limits, sysctls, ..Netns::default() };
        assert!(machine.state.namespaces.insert(inode, netns).is_none(), "namespace {inode} is there already");
    }

    /// A namespace with `eth0` (index 2, with the default route) and `eth1` (index 3), an IPv4 address each.
    pub fn add_two_paths(&self, inode: u64) {
        self.add_netns(inode);
        self.add_link(inode, 2, "eth0", &["10.0.1.2"]);
        self.add_link(inode, 3, "eth1", &["10.0.2.2"]);
        self.netns(inode, |netns| netns.default_route_links = vec![2]);
    }

    /// Adds an interface.
    pub fn add_link(&self, inode: u64, index: u32, name: &str, addresses: &[&str]) {
        self.netns(inode, |netns| {
            netns.links.push(Link { index, name: name.into(), flags: ORDINARY, kind: Some("veth".into()), mtu: 1500 });
        });
        for address in addresses {
            self.add_address(inode, index, address);
        }
    }

    /// Adds a global, permanent address.
    pub fn add_address(&self, inode: u64, index: u32, address: &str) {
        let ip: IpAddr = address.parse().expect("an address");
        let prefix = if ip.is_ipv4() { 24 } else { 64 };
        let address = Address { ifindex: index, ip, prefix, scope: 0, flags: libc::IFA_F_PERMANENT };
        self.netns(inode, |netns| netns.addresses.push(address));
    }

    /// The namespace's last process and last file are gone.
    pub fn remove_netns(&self, inode: u64) {
        self.0.borrow_mut().state.namespaces.remove(&inode);
    }

    /// Whether the namespace is there.
    pub fn has_netns(&self, inode: u64) -> bool {
        self.0.borrow().state.namespaces.contains_key(&inode)
    }

    /// Looks at a namespace, or changes it behind the hook's back.
    pub fn netns<T>(&self, inode: u64, with: impl FnOnce(&mut Netns) -> T) -> T {
        with(self.0.borrow_mut().state.namespaces.get_mut(&inode).expect("the namespace is there"))
    }

    /// Which kind of kernel it has.
    pub fn kind(&self) -> Kind {
        self.0.borrow().kind
    }

    /// The kernel, seen from a namespace.
    pub fn kernel(&self, inode: u64) -> FakeKernel {
        assert!(self.has_netns(inode), "there is no namespace {inode}");
        FakeKernel { host: self.clone(), inode }
    }

    /// Everything that can be changed. The order of endpoints says nothing.
    pub fn state(&self) -> State {
        let mut state = self.0.borrow().state.clone();
        state.namespaces.values_mut().for_each(|netns| netns.endpoints.sort_by_key(|endpoint| endpoint.id));
        state
    }

    /// A value that the host has once. None if the file is not there.
    pub fn value(&self, key: &str) -> Option<String> {
        let key = SettingKey::try_from(key.to_string()).expect("a key");
        self.0.borrow().state.settings.get(&key).cloned()
    }

    /// A value of a namespace.
    pub fn netns_value(&self, inode: u64, key: &str) -> String {
        let key = SettingKey::try_from(key.to_string()).expect("a key");
        self.netns(inode, |netns| netns.sysctls.get(&key).cloned()).expect("the namespace owns it")
    }

    /// Somebody writes a file in a namespace: a sysctl there, or a module's parameter.
    pub fn set(&self, inode: u64, key: &str, value: &str) {
        let key = SettingKey::try_from(key.to_string()).expect("a key");
        self.0.borrow_mut().write(inode, &key, value).expect("the kernel takes the value");
    }

    /// Makes fullmesh the path manager, which loads its module.
    pub fn with_fullmesh(self) -> Self {
        self.set(HOME, "net.mptcp.mptcp_path_manager", "fullmesh");
        self
    }

    /// The interface flags.
    pub fn link_flags(&self, inode: u64, index: u32) -> u32 {
        self.netns(inode, |netns| {
            netns.links.iter().find(|link| link.index == index).expect("the interface is there").flags
        })
    }

    /// RTM_SETLINK. A mask of 0 means all bits.
    pub fn set_link_flags(&self, inode: u64, index: u32, bits: u32, mask: u32) -> Result<()> {
        let mut machine = self.0.borrow_mut();
        let kept = machine.link_bits | 0xffff;
        let mask = if mask == 0 { u32::MAX } else { mask };
        let netns = machine.state.namespaces.get_mut(&inode).context("no such namespace")?;
        let link =
            netns.links.iter_mut().find(|link| link.index == index).ok_or_else(|| netlink_error(Errno::ENODEV))?;
        link.flags = (link.flags & !mask | bits & mask) & kept;
        Ok(())
    }

    /// SIOCSIFFLAGS, as busybox's `ifconfig eth1 up` has it: its flags are a short, and the bits above it are cleared.
    pub fn ioctl_up(&self, inode: u64, index: u32) {
        self.netns(inode, |netns| {
            for link in netns.links.iter_mut().filter(|link| link.index == index) {
                // The carrier is the kernel's own.
                let carrier = link.flags & libc::IFF_LOWER_UP as u32;
                link.flags = (link.flags | libc::IFF_UP as u32) & 0xffff | carrier;
            }
        });
    }

    /// `/proc/net/mptcp_fullmesh`: interface, whether it is a backup, address. At most 8 of a family; a ninth is
    /// ignored.
    pub fn fullmesh_table(&self, inode: u64) -> Vec<(u32, bool, IpAddr)> {
        if self.value("net.mptcp.mptcp_path_manager").as_deref() != Some("fullmesh") {
            return Vec::new();
        }
        self.netns(inode, |netns| {
            let mut table = Vec::new();
            for is_v4 in [true, false] {
                let rows =
                    netns.addresses.iter().filter(|a| a.ip.is_ipv4() == is_v4 && a.is_usable()).filter_map(|a| {
                        let link = netns.links.iter().find(|link| link.index == a.ifindex)?;
                        let used = link.flags & IFF_NOMULTIPATH == 0;
                        used.then_some((link.index, link.flags & IFF_MPBACKUP != 0, a.ip))
                    });
                table.extend(rows.take(ENDPOINTS_MAX));
            }
            table
        })
    }

    /// Something goes wrong with the `number`th change from now on, counted from 1.
    pub fn fault(&self, number: usize, fault: Fault) {
        let mut machine = self.0.borrow_mut();
        let at = machine.changes.len() + number;
        machine.faults.insert(at, fault);
    }

    /// The next hook is killed when it reads back.
    pub fn kill_at_confirm(&self) {
        self.0.borrow_mut().killed_at_confirm = true;
    }

    /// Nothing goes wrong any more. Whether something that was asked for has not happened yet.
    pub fn forget_faults(&self) -> bool {
        let mut machine = self.0.borrow_mut();
        let pending = !machine.faults.is_empty() || machine.killed_at_confirm;
        machine.faults.clear();
        machine.killed_at_confirm = false;
        pending
    }

    /// The changes that hooks tried so far, as [`Change`] shows them.
    pub fn changes(&self) -> Vec<String> {
        self.0.borrow().changes.clone()
    }

    /// How often fullmesh was taken from an endpoint, which closes its live subflows.
    pub fn subflows_closed(&self) -> usize {
        self.0.borrow().subflows_closed
    }
}

impl Machine {
    fn defaults(&self) -> BTreeMap<SettingKey, String> {
        let own = self.definitions.iter().filter(|(_, definition)| definition.owner == Owner::Namespace);
        own.map(|(key, definition)| (key.clone(), definition.initial.clone())).collect()
    }

    fn see(&self, inode: u64, key: &SettingKey) -> Seen {
        let global = || self.state.settings.get(key).cloned();
        if key.sysctl_path().is_none() {
            return global().map_or(Seen::Absent, Seen::Writable);
        }
        let Some(definition) = self.definitions.get(key) else { return Seen::Absent };
        let value = match definition.owner {
            Owner::Namespace => self.state.namespaces.get(&inode).and_then(|netns| netns.sysctls.get(key).cloned()),
            _ => global(),
        };
        let Some(value) = value else { return Seen::Absent };
        match definition.owner {
            Owner::HostOnly if inode != HOME => Seen::Absent,
            Owner::HostReadOnlyElsewhere if inode != HOME => Seen::ReadOnly(value),
            _ => Seen::Writable(value),
        }
    }

    fn write(&mut self, inode: u64, key: &SettingKey, text: &str) -> Result<()> {
        match self.see(inode, key) {
            Seen::Writable(_) => {}
            Seen::Absent => return Err(os_error(libc::ENOENT)),
            Seen::ReadOnly(_) | Seen::Unreadable => return Err(os_error(libc::EACCES)),
        }
        let definition = match key {
            SettingKey::Module(module, param) => {
                let parameters = self.modules.iter().find(|(name, _)| *name == module).map(|(_, p)| p);
                let form = parameters.and_then(|p| p.iter().find(|(name, ..)| name == param)).map(|(.., form)| form);
                let form = form.context("the module has the parameter")?.clone();
                Definition { owner: Owner::HostOnly, form, initial: String::new() }
            }
            SettingKey::Sysctl(_) => self.definitions[key].clone(),
        };
        let is_congestion_control = key.sysctl_path() == Some("net/ipv4/tcp_congestion_control");
        let value = match &definition.form {
            Form::Numbers { count, low, high } => {
                let numbers: Option<Vec<i128>> = text.split_whitespace().take(*count).map(setting::integer).collect();
                let numbers = numbers.filter(|n| n.len() == *count && n.iter().all(|n| (low..=high).contains(&n)));
                let numbers = numbers.ok_or_else(|| os_error(libc::EINVAL))?;
                numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join("\t")
            }
            Form::Truth => match text {
                "Y" | "y" | "1" => "Y".into(),
                "N" | "n" | "0" => "N".into(),
                _ => return Err(os_error(libc::EINVAL)),
            },
            Form::Name(names) => {
                let (name, module) =
                    names.iter().find(|(name, _)| *name == text).ok_or_else(|| os_error(libc::ENOENT))?;
                if is_congestion_control && inode != HOME && !self.congestion_allowed.contains(name) {
                    return Err(os_error(libc::EPERM));
                }
                let (name, module) = (*name, *module);
                module.into_iter().for_each(|module| self.load(module));
                name.into()
            }
        };
        if definition.owner == Owner::Namespace {
            let netns = self.state.namespaces.get_mut(&inode).context("the namespace is there")?;
            netns.sysctls.insert(key.clone(), value.clone());
            // Two names of one value.
            let twin = match (key.sysctl_path(), value.as_str()) {
                (Some("net/mptcp/pm_type"), "0") => Some(("path_manager", "kernel")),
                (Some("net/mptcp/pm_type"), "1") => Some(("path_manager", "userspace")),
                (Some("net/mptcp/path_manager"), "kernel") => Some(("pm_type", "0")),
                (Some("net/mptcp/path_manager"), "userspace") => Some(("pm_type", "1")),
                _ => None,
            };
            if let Some((name, value)) = twin {
                netns.sysctls.entry(self::key(&format!("net/mptcp/{name}"))).and_modify(|v| *v = value.into());
            }
        } else {
            self.state.settings.insert(key.clone(), value);
        }
        Ok(())
    }

    /// Loads a module, which makes its parameters appear. Nothing unloads it again.
    fn load(&mut self, module: &str) {
        let parameters = self.modules.get(module).into_iter().flatten();
        for (param, initial, _) in parameters {
            let key = SettingKey::Module(module.into(), (*param).into());
            self.state.settings.entry(key).or_insert_with(|| (*initial).into());
        }
    }

    fn add_endpoint(&mut self, inode: u64, endpoint: &Endpoint) -> Result<()> {
        let flags = EndpointFlags(endpoint.flags);
        let has = |flag| flags.contains(flag);
        if has(EndpointFlags::SIGNAL) && has(EndpointFlags::FULLMESH)
            || has(EndpointFlags::IMPLICIT)
            || endpoint.port.is_some() && (!has(EndpointFlags::SIGNAL) || has(EndpointFlags::SUBFLOW))
        {
            return Err(netlink_error(Errno::EINVAL));
        }
        let next_id = self.next_id.entry(inode).or_insert(1);
        let netns = self.state.namespaces.get_mut(&inode).context("the namespace is there")?;
        let same = |e: &Endpoint| e.address == endpoint.address && e.port == endpoint.port;
        match netns.endpoints.iter().position(same) {
            Some(at) if EndpointFlags(netns.endpoints[at].flags).contains(EndpointFlags::IMPLICIT) => {
                netns.endpoints.remove(at);
            }
            Some(_) => return Err(netlink_error(Errno::EEXIST)),
            None => {}
        }
        if netns.endpoints.len() >= ENDPOINTS_MAX {
            return Err(netlink_error(Errno::ERANGE));
        }
        let taken = |id: u8| id == 0 || netns.endpoints.iter().any(|e| e.id == id);
        let id = match endpoint.id {
            0 => {
                while taken(*next_id) {
                    *next_id = next_id.wrapping_add(1);
                }
                *next_id
            }
            id if taken(id) => return Err(netlink_error(Errno::EBUSY)),
            id => id,
        };
        // The address need not be assigned, nor the interface exist.
        netns.endpoints.push(Endpoint { id, ..endpoint.clone() });
        Ok(())
    }

    /// Changes backup and fullmesh, ignores every other bit, and reports success.
    fn set_endpoint_flags(&mut self, inode: u64, id: u8, flags: u32) -> Result<()> {
        let netns = self.state.namespaces.get_mut(&inode).context("the namespace is there")?;
        let found = netns.endpoints.iter_mut().find(|e| e.id == id).ok_or_else(|| netlink_error(Errno::EINVAL))?;
        let changeable = EndpointFlags::CHANGEABLE.0;
        let new = found.flags & !changeable | flags & changeable;
        if found.flags & !new & EndpointFlags::FULLMESH.0 != 0 {
            self.subflows_closed += 1;
        }
        found.flags = new;
        Ok(())
    }

    fn delete_endpoint(&mut self, inode: u64, endpoint: &Endpoint) -> Result<()> {
        let netns = self.state.namespaces.get_mut(&inode).context("the namespace is there")?;
        let wanted = |e: &Endpoint| match endpoint.id {
            0 => e.address == endpoint.address && e.port == endpoint.port,
            id => e.id == id,
        };
        match netns.endpoints.iter().position(wanted) {
            Some(at) => {
                netns.endpoints.remove(at);
                Ok(())
            }
            None => bail!("there is no endpoint {} to delete", endpoint.address),
        }
    }

    fn set_limits(&mut self, inode: u64, limits: Limits) -> Result<()> {
        if limits.subflows > LIMIT_MAX || limits.add_addr_accepted > LIMIT_MAX {
            return Err(netlink_error(Errno::EINVAL));
        }
        self.state.namespaces.get_mut(&inode).context("the namespace is there")?.limits = Some(limits);
        Ok(())
    }
}

impl FakeKernel {
    /// These settings from here and from the host's namespace.
    fn see_all(&self, machine: &Machine, keys: &[SettingKey]) -> BTreeMap<SettingKey, SeenSetting> {
        let see = |key: &SettingKey| {
            let is_sysctl = key.sysctl_path().is_some();
            let target = if is_sysctl { machine.see(self.inode, key) } else { Seen::Absent };
            let host = if machine.host_reachable || !is_sysctl { machine.see(HOME, key) } else { Seen::Absent };
            SeenSetting { target, host }
        };
        keys.iter().map(|key| (key.clone(), see(key))).collect()
    }

    /// What the kernel makes of a change when nothing goes wrong.
    fn change(&self, change: &Change) -> Result<()> {
        let kind = self.host.0.borrow().kind;
        match (change, kind) {
            (Change::HostSetting { key, value }, _) => {
                let mut machine = self.host.0.borrow_mut();
                if key.sysctl_path().is_some() && !machine.host_reachable {
                    bail!("the host's network namespace cannot be reached from inside the container");
                }
                machine.write(HOME, key, value)
            }
            (Change::NetnsSysctl { key, value, .. }, _) => self.host.0.borrow_mut().write(self.inode, key, value),
            (Change::LinkFlags { index, bits, mask, .. }, Kind::MptcpOrg) => {
                self.host.set_link_flags(self.inode, *index, *bits, *mask)
            }
            (Change::Limits(limits), Kind::Upstream) => self.host.0.borrow_mut().set_limits(self.inode, *limits),
            (Change::AddEndpoint(e), Kind::Upstream) => self.host.0.borrow_mut().add_endpoint(self.inode, e),
            (Change::DeleteEndpoint(e), Kind::Upstream) => self.host.0.borrow_mut().delete_endpoint(self.inode, e),
            (Change::SetEndpointFlags(e), Kind::Upstream) => {
                self.host.0.borrow_mut().set_endpoint_flags(self.inode, e.id, e.flags)
            }
            (Change::AddRoute(..) | Change::DeleteRoute(..) | Change::AddRule(_) | Change::DeleteRule(_), _) => {
                self.host.netns(self.inode, |netns| change_routing(&mut netns.routing, change))
            }
            (other, _) => bail!("this kernel kind has nothing to do {other} with"),
        }
        .with_context(|| format!("cannot {change}"))
    }

    fn read_back(&self, change: &Change, changes: &[&Change]) -> Result<()> {
        let machine = self.host.0.borrow();
        let netns = &machine.state.namespaces[&self.inode];
        let compare = |inode: u64, key: &SettingKey, value: &str| match machine.see(inode, key).value() {
            Some(now) if setting::same(key, now, value) => Ok(()),
            now => Err(anyhow!("{key} was written as {value} and reads back as {now:?}")),
        };
        match change {
            Change::HostSetting { key, value } => compare(HOME, key, value),
            Change::NetnsSysctl { key, value, host } => {
                compare(self.inode, key, value)?;
                let now = machine.see(HOME, key);
                match (host, now.value()) {
                    (Some(host), Some(now)) if self.inode != HOME && !setting::same(key, host, now) => {
                        bail!("writing {key} changed the host's value from {host} to {now}")
                    }
                    _ => Ok(()),
                }
            }
            Change::LinkFlags { index, name, bits, mask } => match netns.links.iter().find(|l| l.index == *index) {
                Some(link) if link.flags & mask == *bits => Ok(()),
                Some(link) => bail!(
                    "the flags of {name} were set to {bits:#x} and read back as {:#x}; this kernel does not keep these bits",
                    link.flags & mask
                ),
                None => bail!("the interface {name} is gone"),
            },
            Change::AddEndpoint(wanted) | Change::SetEndpointFlags(wanted) => {
                match netns.endpoints.iter().find(|e| e.address == wanted.address) {
                    Some(found) if found.flags == wanted.flags && found.ifindex == wanted.ifindex => Ok(()),
                    found => bail!("the kernel accepted the endpoint {wanted:?} and lists {found:?}"),
                }
            }
            Change::DeleteEndpoint(gone) => {
                let added = changes.iter().any(|c| matches!(c, Change::AddEndpoint(e) if e.address == gone.address));
                let there = netns.endpoints.iter().any(|e| e.address == gone.address && e.id == gone.id);
                if there && !added { Err(anyhow!("the endpoint {} is still there", gone.address)) } else { Ok(()) }
            }
            Change::Limits(wanted) if netns.limits != Some(*wanted) => {
                bail!("the limits were set to {wanted:?} and read back as {:?}", netns.limits)
            }
            Change::Limits(_) => Ok(()),
            Change::AddRoute(new, by) if !netns.routing.routes.contains(new) => {
                bail!("the route {} is not there", new.by(by))
            }
            Change::DeleteRoute(old, by) if netns.routing.routes.contains(old) => {
                bail!("the route {} is there", old.by(by))
            }
            Change::AddRule(new) if !netns.routing.rules.contains(new) => bail!("the {new} is not there"),
            Change::DeleteRule(old) if netns.routing.rules.contains(old) => bail!("the {old} is there"),
            Change::AddRoute(..) | Change::DeleteRoute(..) | Change::AddRule(_) | Change::DeleteRule(_) => Ok(()),
        }
    }
}

impl Kernel for FakeKernel {
    fn default_route_links(&mut self) -> Result<Vec<u32>> {
        Ok(self.facts(&[])?.default_route_links)
    }

    fn settings(&mut self, keys: &[SettingKey]) -> Result<BTreeMap<SettingKey, SeenSetting>> {
        Ok(self.see_all(&self.host.0.borrow(), keys))
    }

    fn facts(&mut self, keys: &[SettingKey]) -> Result<Facts> {
        let machine = self.host.0.borrow();
        let always: &[&str] = match machine.kind {
            Kind::MptcpOrg => &["mptcp_enabled", "mptcp_path_manager", "mptcp_scheduler"],
            _ => &["enabled", "path_manager", "pm_type"],
        };
        let keys: Vec<SettingKey> =
            keys.iter().cloned().chain(always.iter().map(|name| key(&format!("net/mptcp/{name}")))).collect();
        let settings = self.see_all(&machine, &keys);
        let netns = &machine.state.namespaces[&self.inode];
        let control_asked = settings.keys().any(|k| k.sysctl_path() == Some("net/ipv4/tcp_congestion_control"));
        let controls = if control_asked { vec!["reno".into(), "cubic".into()] } else { Vec::new() };
        Ok(Facts {
            kind: machine.kind,
            release: machine.release.into(),
            initial_user_namespace: machine.initial_user_namespace,
            host_reachable: machine.host_reachable,
            target_is_host: self.inode == HOME,
            links: netns.links.clone(),
            addresses: netns.addresses.clone(),
            endpoints: netns.endpoints.clone(),
            limits: netns.limits,
            default_route_links: netns.default_route_links.clone(),
            settings,
            congestion_controls: controls,
            routes: BTreeMap::new(),
            elsewhere: BTreeSet::new(),
            routing: None,
        })
    }

    fn perform(&mut self, change: &Change) -> Result<()> {
        let fault = {
            let mut machine = self.host.0.borrow_mut();
            machine.changes.push(change.to_string());
            let number = machine.changes.len();
            machine.faults.remove(&number)
        };
        kill_point();
        let done = match fault {
            None => self.change(change),
            Some(Fault::Refused) => bail!("cannot {change}: the kernel refuses it"),
            Some(Fault::Ignored) => Ok(()),
            Some(Fault::KilledBefore) => resume_unwind(Box::new(Killed)),
            Some(Fault::KilledAfter) => {
                self.change(change)?;
                resume_unwind(Box::new(Killed))
            }
            Some(Fault::After(somebody)) => {
                somebody(&self.host);
                self.change(change)
            }
        };
        kill_point();
        done
    }

    fn confirm(&mut self, changes: &[&Change]) -> Result<()> {
        let killed = std::mem::take(&mut self.host.0.borrow_mut().killed_at_confirm);
        if killed {
            resume_unwind(Box::new(Killed));
        }
        kill_point();
        changes.iter().try_for_each(|change| self.read_back(change, changes))
    }

    fn endpoints(&mut self) -> Result<Vec<Endpoint>> {
        Ok(self.host.netns(self.inode, |netns| netns.endpoints.clone()))
    }

    fn routing(&mut self) -> Result<Routing> {
        let mut routing = self.host.netns(self.inode, |netns| netns.routing.clone());
        routing.tables.extend(routing.routes.iter().map(|route| route.table));
        routing.tables.extend(routing.rules.iter().map(|rule| rule.table));
        Ok(routing)
    }

    fn route(&mut self, address: IpAddr, index: u32) -> Result<RouteState> {
        let missing = self.host.netns(self.inode, |netns| {
            let leads = |table| {
                let mut routes = netns.routing.routes.iter();
                routes.any(|route| route.is_default() && route.table == table && route.ifindex == index)
            };
            let ruled = netns.routing.rules.iter().any(|rule| rule.from == Some(address) && leads(rule.table));
            netns.no_route.contains(&index) && !ruled
        });
        Ok(if missing { RouteState::Missing } else { RouteState::Ok })
    }

    fn leaves_elsewhere(&mut self, address: IpAddr, index: u32) -> Result<bool> {
        Ok(self.route(address, index)? == RouteState::Missing)
    }
}

fn change_routing(routing: &mut Routing, change: &Change) -> Result<()> {
    let is_there = match change {
        // Whatever its next hop, a table has one route to a destination.
        Change::AddRoute(route, _) => {
            let same = |other: &TableRoute| {
                (other.table, other.destination, other.prefix) == (route.table, route.destination, route.prefix)
            };
            routing.routes.iter().any(same)
        }
        Change::DeleteRoute(route, _) => routing.routes.contains(route),
        Change::AddRule(rule) | Change::DeleteRule(rule) => routing.rules.contains(rule),
        _ => false,
    };
    match change {
        Change::AddRoute(..) | Change::AddRule(_) if is_there => bail!("it is there already (EEXIST)"),
        Change::DeleteRoute(..) | Change::DeleteRule(_) if !is_there => bail!("it is not there (ENOENT)"),
        Change::AddRoute(route, _) => routing.routes.push(route.clone()),
        Change::AddRule(rule) => routing.rules.push(rule.clone()),
        Change::DeleteRoute(route, _) => routing.routes.retain(|other| other != route),
        Change::DeleteRule(rule) => routing.rules.retain(|other| other != rule),
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NS: u64 = 7;

    fn endpoint(address: &str, flags: u32) -> Endpoint {
        Endpoint { id: 0, address: address.parse().unwrap(), port: None, ifindex: 3, flags }
    }

    #[test]
    fn mptcp_org_values_are_the_hosts_and_absent_in_containers() {
        let host = FakeHost::mptcp_org();
        host.add_two_paths(NS);
        let scheduler = key("net/mptcp/mptcp_scheduler");
        let facts = host.kernel(NS).facts(std::slice::from_ref(&scheduler)).unwrap();
        assert_eq!(facts.settings[&scheduler].target, Seen::Absent);
        assert_eq!(facts.settings[&scheduler].host, Seen::Writable("default".into()));
        let change = Change::HostSetting { key: scheduler, value: "nope".into() };
        let error = host.kernel(NS).perform(&change).unwrap_err();
        let io = error.downcast_ref::<io::Error>().expect("the kernel's own error");
        assert_eq!(io.raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn module_parameters_appear_with_their_module() {
        let host = FakeHost::mptcp_org();
        assert_eq!(host.value("module:mptcp_fullmesh.num_subflows"), None);
        let host = host.with_fullmesh();
        assert_eq!(host.value("module:mptcp_fullmesh.num_subflows").as_deref(), Some("1"));
        host.set(HOME, "net.mptcp.mptcp_path_manager", "default");
        assert_eq!(host.value("module:mptcp_fullmesh.num_subflows").as_deref(), Some("1"), "nothing unloads it");
    }

    #[test]
    fn the_fullmesh_table_follows_the_flags() {
        let host = FakeHost::mptcp_org();
        host.add_two_paths(NS);
        assert!(host.fullmesh_table(NS).is_empty(), "only fullmesh reads them");
        let host = host.with_fullmesh();
        host.set_link_flags(NS, 3, IFF_MPBACKUP, 0x18_0000).unwrap();
        assert_eq!(host.link_flags(NS, 3), 0x10_1003);
        let backups = |host: &FakeHost| -> Vec<bool> { host.fullmesh_table(NS).iter().map(|row| row.1).collect() };
        assert_eq!(backups(&host), [false, true]);
        host.set_link_flags(NS, 2, IFF_NOMULTIPATH, 0x18_0000).unwrap();
        assert_eq!(backups(&host), [true]);
        host.ioctl_up(NS, 3);
        assert_eq!(host.link_flags(NS, 3), ORDINARY);
        for n in 3..12 {
            host.add_address(NS, 3, &format!("10.0.2.{n}"));
        }
        assert_eq!(host.fullmesh_table(NS).len(), 8);
        host.set_link_flags(NS, 3, IFF_HANDOVER, IFF_HANDOVER).unwrap();
        assert_eq!(host.link_flags(NS, 3), ORDINARY, "handover is dropped in silence");
        host.set_link_flags(NS, 3, 0, 0).unwrap();
        assert_eq!(host.link_flags(NS, 3), 0, "a mask of 0 means all bits");
        let router = FakeHost::open_mptcp_router();
        router.add_two_paths(NS);
        router.set_link_flags(NS, 3, IFF_HANDOVER, IFF_HANDOVER).unwrap();
        assert_eq!(router.link_flags(NS, 3), 0x20_1003);
    }

    #[test]
    fn numbers_are_stored_as_the_kernel_stores_them() {
        let host = FakeHost::upstream();
        host.add_netns(NS);
        host.set(NS, "net.mptcp.stale_loss_cnt", "0x10 junk");
        assert_eq!(host.netns_value(NS, "net.mptcp.stale_loss_cnt"), "16");
        host.set(NS, "net.ipv4.tcp_rmem", "1 010 3");
        assert_eq!(host.netns_value(NS, "net.ipv4.tcp_rmem"), "1\t8\t3");
        host.set(NS, "net.mptcp.pm_type", "1");
        assert_eq!(host.netns_value(NS, "net.mptcp.path_manager"), "userspace");
        assert_eq!(host.netns_value(HOME, "net.mptcp.stale_loss_cnt"), "4");
    }

    #[test]
    fn upstream_rejects_and_accepts_what_linux_does() {
        let host = FakeHost::upstream();
        host.add_two_paths(NS);
        let mut kernel = host.kernel(NS);
        let mut add = |e: Endpoint| kernel.perform(&Change::AddEndpoint(e));
        for bad in [1 | 8, 16] {
            assert!(add(endpoint("10.0.2.2", bad)).is_err());
        }
        assert!(add(Endpoint { port: Some(9), ..endpoint("10.0.2.2", 2) }).is_err());
        add(endpoint("10.0.2.2", 2)).unwrap();
        assert!(add(endpoint("10.0.2.2", 2)).is_err(), "a duplicate");
        for n in 0..7 {
            add(Endpoint { ifindex: 99, ..endpoint(&format!("192.0.2.{n}"), 0) }).expect("accepted silently");
        }
        assert!(add(endpoint("10.0.1.2", 2)).is_err(), "a ninth");
        let id = kernel.endpoints().unwrap()[0].id;
        let set = |flags| Change::SetEndpointFlags(Endpoint { id, ..endpoint("10.0.2.2", flags) });
        kernel.perform(&set(2 | 8)).unwrap();
        kernel.perform(&set(1)).unwrap();
        assert_eq!(kernel.endpoints().unwrap()[0].flags, 2, "signal is ignored with success");
        assert_eq!(host.subflows_closed(), 1);
        assert!(kernel.perform(&Change::Limits(Limits { subflows: 9, add_addr_accepted: 0 })).is_err());
    }
}
