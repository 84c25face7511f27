//! What is wrong with the host: its kernel, the engines' hooks, the ledger, other managers of endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::container::{backup_bug, not_followed, other_manager};
use super::finding::{self, Finding};
use super::seen::shell_word;
use crate::error::plain;
use crate::instance;
use crate::kernel::sysctl::read_text;
use crate::kernel::{self, Kind, RouteState};
use crate::ledger::record::State;
use crate::request::flags::EndpointFlags;
use crate::request::setting;
use crate::status::{Container, Status};

/// What names our program in other programs' files.
const PROGRAM: &str = "mptcp-hook";
/// Where podman and CRI-O look for hooks unless they are told otherwise.
const HOOKS_D: &str = "/usr/share/containers/oci/hooks.d";
/// Where administrators put hooks as well, and where an engine looks only if it is told to.
const ETC_HOOKS_D: &str = "/etc/containers/oci/hooks.d";
/// podman's settings, the later before the earlier; those in the directory come last.
const PODMAN: Engine = Engine {
    name: "podman",
    files: &["/usr/share/containers/containers.conf", "/etc/containers/containers.conf"],
    directory: "/etc/containers/containers.conf.d",
    table: &["engine"],
};
/// CRI-O's.
const CRIO: Engine = Engine {
    name: "CRI-O",
    files: &["/etc/crio/crio.conf"],
    directory: "/etc/crio/crio.conf.d",
    table: &["crio", "runtime"],
};
/// Where LXC's templates and new containers get their settings from.
const LXC: [&str; 2] = ["/usr/share/lxc/config/common.conf.d", "/etc/lxc/default.conf"];
/// The largest file of somebody else's that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;
/// The modules by which the kernel lists sockets.
const DIAG: [&str; 2] = ["tcp_diag", "mptcp_diag"];
/// Programs that manage MPTCP endpoints by themselves.
const MANAGERS: [&str; 2] = ["NetworkManager", "mptcpd"];

struct Engine {
    name: &'static str,
    files: &'static [&'static str],
    directory: &'static str,
    /// Where `hooks_dir` stands in them.
    table: &'static [&'static str],
}

/// Everything that was read.
pub struct Seen {
    /// How the hook is called with the same global options.
    pub program: String,
    /// Which MPTCP.
    pub kind: Kind,
    /// `uname -r`.
    pub release: String,
    /// What the kernel says about itself, by what it is about.
    pub kernel: Vec<(&'static str, String)>,
    /// The inode number of the host's own network namespace.
    pub own_netns: Option<u64>,
    /// Whether MPTCP is switched on here.
    pub enabled: Option<String>,
    /// The engines' hooks.
    pub hooks: Vec<Hook>,
    /// Where the engines look, if they are told: engine, directories, the file that says so.
    pub told: Vec<Told>,
    /// Files that make no sense: path and reason.
    pub unreadable: Vec<(PathBuf, String)>,
    /// Other managers of endpoints in this network namespace.
    pub managers: Vec<(String, u32)>,
    /// The agent's pid.
    pub agent: Option<u32>,
}

/// An entry that has an engine start our program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Whose.
    pub engine: &'static str,
    /// The file that it stands in.
    pub file: PathBuf,
    /// Our program, as it is named there.
    pub program: PathBuf,
    /// Whether it can be executed.
    pub is_there: bool,
    /// At which stages.
    pub stages: BTreeSet<String>,
}

/// Where an engine looks for hooks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Whose.
    pub engine: &'static str,
    /// Where it looks.
    pub directories: Vec<PathBuf>,
    /// Who says so; none if that is the default.
    pub file: Option<PathBuf>,
}

impl Told {
    /// What an engine does by itself. CRI-O does the same as podman.
    fn nothing() -> Self {
        Self { engine: PODMAN.name, directories: vec![HOOKS_D.into()], file: None }
    }
}

/// Reads it all. Nothing that cannot be read is an error: it is found, or it is not there.
pub fn look(agent: Option<u32>, own_netns: Option<u64>, program: String) -> Seen {
    let kind = Kind::detect();
    let release = kernel::release();
    let mut seen = Seen {
        program,
        kind,
        kernel: kernel_facts(Path::new("/"), kind, &release),
        enabled: read_text(match kind {
            Kind::MptcpOrg => "/proc/sys/net/mptcp/mptcp_enabled",
            _ => "/proc/sys/net/mptcp/enabled",
        }),
        release,
        hooks: Vec::new(),
        told: Vec::new(),
        unreadable: Vec::new(),
        managers: own_netns.map(managers).unwrap_or_default(),
        own_netns,
        agent,
    };
    for engine in [PODMAN, CRIO] {
        look_for_directories(&engine, &mut seen);
    }
    for file in hook_files(&lists(&seen.told), |directory| files_in(directory, ".json")) {
        look_for_oci(file, &mut seen);
    }
    for place in LXC {
        look_for_lxc(Path::new(place), &mut seen);
    }
    seen
}

fn kernel_facts(root: &Path, kind: Kind, release: &str) -> Vec<(&'static str, String)> {
    let mut facts = vec![("kernel", format!("{} MPTCP, Linux {release}", kind.name()))];
    let name = kernel::release_name(release);
    let modules = root.join("lib/modules").join(name);
    let built = match kind {
        Kind::None => "not there",
        _ => "built in (MPTCP itself is never a module)",
    };
    facts.push(("MPTCP", built.into()));
    let configs = [root.join(format!("boot/config-{name}")), modules.join("config")];
    let config = configs.iter().find_map(|path| {
        let text = read_file(path).ok()?;
        let options = text.lines().filter(|line| line.contains("MPTCP"));
        Some(format!("{} ({})", options.collect::<Vec<_>>().join(" "), path.display()))
    });
    // It is compressed, and what it would tell shows in the kernel itself.
    let compressed = || root.join("proc/config.gz").exists().then(|| "zgrep MPTCP /proc/config.gz shows it".to_owned());
    facts.extend(config.or_else(compressed).map(|config| ("configuration", config)));
    let loaded = file_names(&root.join("sys/module"));
    let known: Vec<&str> = loaded.iter().map(String::as_str).filter(|name| name.contains("mptcp")).collect();
    if !known.is_empty() {
        facts.push(("modules", known.join(" ")));
    }
    let [built_in, separate] =
        ["modules.builtin", "modules.dep"].map(|file| read_file(&modules.join(file)).unwrap_or_default());
    let is_listed = |text: &str, module: &str| {
        // A path, before a colon where others follow on which it depends.
        let paths = text.lines().filter_map(|line| line.split(':').next()?.rsplit('/').next());
        paths.filter_map(|name| name.split(".ko").next()).any(|name| name == module)
    };
    let diag = DIAG.iter().filter_map(|module| match *module {
        module if is_listed(&built_in, module) => Some(format!("{module} built in")),
        module if loaded.iter().any(|name| name == module) => Some(format!("{module} loaded")),
        module if is_listed(&separate, module) => Some(format!("{module} a module, not loaded")),
        _ => None,
    });
    let diag: Vec<String> = diag.collect();
    if !diag.is_empty() {
        facts.push(("lists of sockets", diag.join(", ")));
    }
    let files: &[(&str, &str)] = match kind {
        Kind::MptcpOrg => &[
            ("enabled", "net/mptcp/mptcp_enabled"),
            ("path manager", "net/mptcp/mptcp_path_manager"),
            ("scheduler", "net/mptcp/mptcp_scheduler"),
        ],
        _ => &[
            ("enabled", "net/mptcp/enabled"),
            ("path manager", "net/mptcp/path_manager"),
            ("path managers", "net/mptcp/available_path_managers"),
            ("scheduler", "net/mptcp/scheduler"),
            ("schedulers", "net/mptcp/available_schedulers"),
        ],
    };
    let common = [
        ("congestion control", "net/ipv4/tcp_congestion_control"),
        ("congestion controls", "net/ipv4/tcp_available_congestion_control"),
    ];
    for (name, path) in files.iter().chain(&common) {
        let path = root.join("proc/sys").join(path);
        facts.extend(read_text(&path.display().to_string()).map(|value| (*name, value)));
    }
    facts
}

/// A file of somebody else's: small, regular text, or why not.
fn read_file(path: &Path) -> Result<String, String> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let open = || {
        // A fifo must not hold us up.
        let file = std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let mut text = String::new();
        file.take(FILE_MAX).read_to_string(&mut text).map(|_| text)
    };
    open().map_err(|error: std::io::Error| error.to_string())
}

fn file_names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The files in a directory that end so.
fn files_in(directory: &Path, ending: &str) -> Vec<PathBuf> {
    file_names(directory).into_iter().filter(|name| name.ends_with(ending)).map(|name| directory.join(name)).collect()
}

fn look_for_directories(engine: &Engine, seen: &mut Seen) {
    let files = engine.files.iter().map(PathBuf::from).chain(files_in(Path::new(engine.directory), ".conf"));
    let mut told = Told { engine: engine.name, ..Told::nothing() };
    let mut appends = false;
    for file in files {
        let Ok(text) = read_file(&file) else { continue };
        match hooks_dir(&text, engine.table) {
            Ok(None) => {}
            Ok(Some(list)) => {
                // Once said, it is for later files, too.
                appends = list.append.unwrap_or(appends);
                if !appends {
                    // The last one counts.
                    told.directories.clear();
                }
                told.directories.extend(list.directories);
                told.file = Some(file);
            }
            Err(error) => seen.unreadable.push((file, error)),
        }
    }
    if told.file.is_some() {
        seen.told.push(told);
    }
}

/// What stands under `hooks_dir`.
#[derive(Debug, PartialEq, Eq)]
struct HooksDir {
    directories: Vec<PathBuf>,
    /// Whether they come behind those that are known before, the default's included (podman 5), if that is said.
    append: Option<bool>,
}

/// `hooks_dir` of a table of containers.conf(5) or crio.conf(5).
fn hooks_dir(text: &str, table: &[&str]) -> Result<Option<HooksDir>, String> {
    let document: toml::Table = text.parse().map_err(|e: toml::de::Error| plain(e.message()))?;
    let mut inner = Some(&document);
    for name in table {
        inner = inner.and_then(|table| table.get(*name)).and_then(toml::Value::as_table);
    }
    let list = inner.and_then(|table| table.get("hooks_dir")).and_then(toml::Value::as_array);
    Ok(list.map(|list| HooksDir {
        directories: list.iter().filter_map(toml::Value::as_str).map(PathBuf::from).collect(),
        append: list.iter().filter_map(|entry| entry.get("append")?.as_bool()).next_back(),
    }))
}

/// A hook's file (oci-hooks(5), version 1.0.0).
#[derive(Deserialize)]
struct OciHook {
    hook: OciProgram,
    #[serde(default)]
    stages: BTreeSet<String>,
}

#[derive(Deserialize)]
struct OciProgram {
    path: PathBuf,
    #[serde(default)]
    args: Vec<String>,
}

/// The lists of directories in which hooks may be: those that the engines go by, and each place by itself into which none
/// of them looks.
fn lists(told: &[Told]) -> Vec<Vec<PathBuf>> {
    let mut lists: Vec<Vec<PathBuf>> = told.iter().map(|told| told.directories.clone()).collect();
    if !told.iter().any(|told| told.engine == PODMAN.name) {
        lists.push(Told::nothing().directories);
    }
    for place in [HOOKS_D, ETC_HOOKS_D].map(PathBuf::from) {
        if !lists.iter().any(|list| list.contains(&place)) {
            lists.push(vec![place]);
        }
    }
    lists
}

/// The hooks' files of lists of directories: of two with one name the later in a list overrides the earlier. One that
/// counts in any of the lists is used by some engine.
fn hook_files(lists: &[Vec<PathBuf>], files_in: impl Fn(&Path) -> Vec<PathBuf>) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for directories in lists {
        let files = directories.iter().flat_map(|directory| files_in(directory));
        let by_name: BTreeMap<_, _> = files.map(|file| (file.file_name().map(ToOwned::to_owned), file)).collect();
        all.extend(by_name.into_values());
    }
    all
}

fn look_for_oci(file: PathBuf, seen: &mut Seen) {
    let text = read_file(&file).unwrap_or_default();
    match serde_json::from_str::<OciHook>(&text) {
        Ok(OciHook { hook, stages }) => {
            let is_ours = hook.path.to_string_lossy().contains(PROGRAM)
                || hook.args.first().is_some_and(|name| name.contains(PROGRAM));
            if is_ours {
                let is_there = is_program(&hook.path);
                seen.hooks.push(Hook { engine: "OCI", file, program: hook.path, is_there, stages });
            }
        }
        Err(error) if text.contains(PROGRAM) || file.to_string_lossy().contains(PROGRAM) => {
            seen.unreadable.push((file, plain(error)));
        }
        Err(_) => {}
    }
}

fn look_for_lxc(place: &Path, seen: &mut Seen) {
    let files = if place.is_dir() { files_in(place, ".conf") } else { vec![place.into()] };
    for file in files {
        let Ok(text) = read_file(&file) else { continue };
        let mut programs: BTreeMap<PathBuf, BTreeSet<String>> = BTreeMap::new();
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else { continue };
            let Some(stage) = key.trim().strip_prefix("lxc.hook.") else { continue };
            let mut words = value.split_whitespace();
            if let Some(program) = words.find(|word| Path::new(word).ends_with(PROGRAM)) {
                programs.entry(program.into()).or_default().insert(stage.into());
            }
        }
        for (program, stages) in programs {
            let is_there = is_program(&program);
            seen.hooks.push(Hook { engine: "LXC", file: file.clone(), program, is_there, stages });
        }
    }
}

fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// The other managers of endpoints in the network namespace with that inode number: name and pid.
pub fn managers(netns: u64) -> Vec<(String, u32)> {
    let manager = |pid: u32| {
        let name = read_text(&format!("/proc/{pid}/comm")).filter(|name| MANAGERS.contains(&name.as_str()))?;
        (instance::netns_inode(&format!("/proc/{pid}/ns/net")) == Some(netns)).then_some((name, pid))
    };
    let mut found: Vec<(String, u32)> =
        instance::processes().unwrap_or_default().into_iter().filter_map(manager).collect();
    found.sort();
    found
}

/// All that is wrong.
pub fn judge(seen: &Seen, status: &Status) -> Vec<Finding> {
    let mut found = Vec::new();
    judge_kernel(seen, status, &mut found);
    judge_hooks(seen, &mut found);
    judge_ledger(seen, status, &mut found);
    found.extend(seen.managers.iter().map(other_manager));
    finding::sort(&mut found);
    found
}

fn judge_kernel(seen: &Seen, status: &Status, found: &mut Vec<Finding>) {
    let release = &seen.release;
    let fact = |name: &str| seen.kernel.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str());
    match seen.kind {
        Kind::None => {
            let evidence = format!(
                "no /proc/sys/net/mptcp/enabled on {release}; {}",
                fact("configuration").unwrap_or("no /boot/config of it")
            );
            let finding = Finding::new(&finding::KERNEL_WITHOUT, "this kernel has no MPTCP", evidence);
            found.push(finding.mend(kernel::GET_MPTCP));
        }
        Kind::Upstream => {
            found.extend(backup_bug(release, EndpointFlags::BACKUP.union(EndpointFlags::SIGNAL)));
        }
        Kind::MptcpOrg => {
            if let Some(other) = fact("path manager").filter(|name| *name != "fullmesh") {
                let finding = Finding::new(
                    &finding::PM_IGNORES,
                    format!("the path manager is {other}"),
                    format!("net.mptcp.mptcp_path_manager = {other}"),
                );
                found.push(finding.mend("use fullmesh").by("sysctl -w net.mptcp.mptcp_path_manager=fullmesh"));
            }
        }
    }
    if let Some(off) = seen.enabled.as_deref().filter(|value| setting::integer(value) == Some(0)) {
        let own = "in the host's own network namespace";
        let is_a_containers =
            |container: &Container| container.live && Some(container.record.instance.netns.inode) == seen.own_netns;
        let here = status.containers.iter().find(|container| is_a_containers(container));
        let (cause, key, whose) = match (seen.kind, here) {
            (Kind::MptcpOrg, _) => (&finding::MPTCP_OFF, "net.mptcp.mptcp_enabled", "on this host".into()),
            (_, Some(container)) => {
                (&finding::MPTCP_OFF, "net.mptcp.enabled", format!("{own}, which is that of {}", container.record.name))
            }
            (_, None) => (&finding::HOST_MPTCP_OFF, "net.mptcp.enabled", own.into()),
        };
        let finding = Finding::new(cause, format!("MPTCP is switched off {whose}"), format!("{key} = {off}"));
        found.push(finding.mend("switch it on").by(format!("sysctl -w {key}=1")));
    }
}

fn judge_hooks(seen: &Seen, found: &mut Vec<Finding>) {
    for (file, reason) in &seen.unreadable {
        let what = format!("{} cannot be read as what it is", file.display());
        found.push(Finding::new(&finding::HOOK_UNREADABLE, what, reason).mend("correct it"));
    }
    for hook in &seen.hooks {
        let (file, program) = (hook.file.display(), hook.program.display());
        if !hook.is_there {
            let what = format!("the {} hook in {file} starts {program}, which is not there", hook.engine);
            let finding = Finding::new(&finding::HOOK_PATH, what, format!("no executable file {program}"));
            let own = std::env::current_exe().map_or_else(|_| PROGRAM.into(), |path| path.display().to_string());
            let [own, place] = [own, program.to_string()].map(|path| shell_word(&path));
            found.push(
                finding
                    .mend("install the program there, or name its place in the file")
                    .by(format!("install -D -m 755 {own} {place}")),
            );
        }
    }
    let told = if seen.told.is_empty() { vec![Told::nothing()] } else { seen.told.clone() };
    let is_told_of = |place: &Path| told.iter().any(|told| told.directories.iter().any(|seen| seen == place));
    for told in &told {
        for hook in seen.hooks.iter().filter(|hook| hook.engine == "OCI") {
            let Some(directory) = hook.file.parent() else { continue };
            let is_default = directory == Path::new(HOOKS_D);
            // What another engine was told of is that one's.
            let is_nobodys = directory == Path::new(ETC_HOOKS_D) && !is_told_of(directory);
            if !is_default && !is_nobodys || told.directories.iter().any(|seen| seen == directory) {
                continue;
            }
            let (directory, place) = (directory.to_path_buf(), directory.display());
            let wanted: Vec<PathBuf> = told.directories.iter().cloned().chain([directory.clone()]).collect();
            let (who, by, mend) = match &told.file {
                Some(file) => (
                    format!("{} does not look", told.engine),
                    format!("in {}", file.display()),
                    format!(
                        "write hooks_dir = {wanted:?} there, or {}",
                        if is_default { "take the line out" } else { "move the file" }
                    ),
                ),
                None => (
                    "no engine looks".into(),
                    "by default".into(),
                    format!(
                        "move the file to {HOOKS_D}, or write hooks_dir = {wanted:?} below [engine] in {} (CRI-O: below [crio.runtime] in {})",
                        PODMAN.files[1], CRIO.files[0]
                    ),
                ),
            };
            let what = format!("{who} into {place}, where {} is", hook.file.display());
            let evidence = format!("hooks_dir = {:?} {by}", told.directories);
            found.push(Finding::new(&finding::HOOK_UNSEEN, what, evidence).mend(mend));
        }
    }
    for (engine, begin, end) in [
        ("OCI", &["createRuntime", "prestart", "createContainer"][..], "poststop"),
        ("LXC", &["start-host"], "post-stop"),
    ] {
        let hooks: Vec<&Hook> = seen.hooks.iter().filter(|hook| hook.engine == engine).collect();
        let Some(first) = hooks.first() else { continue };
        let has = |stage: &str| hooks.iter().any(|hook| hook.stages.contains(stage));
        let lacking = if !begin.iter().any(|stage| has(stage)) {
            begin[0]
        } else if !has(end) {
            end
        } else {
            continue;
        };
        let stages: BTreeSet<&str> = hooks.iter().flat_map(|hook| &hook.stages).map(String::as_str).collect();
        let what = format!("the {engine} hook does not run at {lacking}");
        let evidence = format!("{}: {}", first.file.display(), Vec::from_iter(stages).join(", "));
        found.push(Finding::new(&finding::HOOK_INCOMPLETE, what, evidence).mend(format!("add {lacking} to it")));
    }
    if seen.hooks.is_empty() {
        let evidence = format!("nothing of ours in {HOOKS_D}, {ETC_HOOKS_D}, {}", LXC[0]);
        let finding = Finding::new(&finding::HOOK_NONE, "no engine has the hook", evidence);
        found.push(finding.mend("install one from the directory hooks/ of the distribution (see its README)"));
    }
}

fn judge_ledger(seen: &Seen, status: &Status, found: &mut Vec<Finding>) {
    let program = &seen.program;
    for problem in &status.problems {
        let finding = Finding::new(&finding::LEDGER_PROBLEM, problem, "the ledger");
        found.push(
            finding.mend("what is damaged is moved aside, the rest is put in order").by(format!("{program} repair")),
        );
    }
    for setting in &status.settings {
        let key = &setting.key;
        if setting.interrupted {
            let what = format!("a hook was killed while it wrote {key}");
            let finding = Finding::new(&finding::HOST_INTERRUPTED, what, setting.present.clone().unwrap_or_default());
            found.push(finding.mend("decide it").by(format!("{program} repair")));
        } else if setting.drifted {
            let now = setting.present.clone().unwrap_or_default();
            let what = format!("somebody changed {key} from {} to {now}", setting.value);
            let holders: Vec<&str> = setting.claims.iter().map(|claim| claim.container.as_str()).collect();
            let evidence = format!("{key} = {now}; {} rely on {}", holders.join(", "), setting.value);
            let [value, path] = [setting.value.clone(), key.path().display().to_string()].map(|word| shell_word(&word));
            let command = format!("printf '%s\\n' {value} >{path}");
            found.push(Finding::new(&finding::HOST_DRIFTED, what, evidence).mend("write it again").by(command));
        }
    }
    let dead: Vec<&str> = status.containers.iter().filter(|c| !c.live).map(|c| c.record.name.as_str()).collect();
    if !dead.is_empty() {
        let what = format!("{} dead containers are in the ledger", dead.len());
        let finding = Finding::new(&finding::LEDGER_STALE, what, dead.join(", "));
        found.push(finding.mend("let them go").by(format!("{program} release --stale")));
    }
    for container in status.containers.iter().filter(|container| container.live) {
        let record = &container.record;
        let id = &record.instance.container.id;
        found.extend(container.not_followed.as_ref().map(|why| not_followed(&record.name, why, program)));
        let amiss = record.interfaces.iter().find(|interface| {
            !matches!(interface.state, State::Applied | State::Ignored) || interface.route == RouteState::Missing
        });
        let evidence = match (amiss, container.drifted.first()) {
            (Some(interface), _) if interface.route == RouteState::Missing => {
                format!("{}: route missing", interface.name)
            }
            (Some(interface), _) => {
                format!(
                    "{} is {}: {}",
                    interface.name,
                    interface.state.name(),
                    interface.reason.as_deref().unwrap_or_default()
                )
            }
            (None, Some((key, now))) => format!("{key} is {now} now"),
            (None, None) => continue,
        };
        let finding =
            Finding::new(&finding::CONTAINER_AMISS, format!("{} is not as it was asked for", record.name), evidence);
        found.push(finding.mend("look at it").by(format!("{program} doctor {id}")));
    }
    if let Some(last) = status.failures.last() {
        let what = format!(
            "{} hooks failed, the last for {}",
            status.failures.len() + status.failures_dropped,
            last.container
        );
        found.push(Finding::new(&finding::HOOK_FAILED, what, &last.reason));
    }
    if let Some(pid) = seen.agent {
        let followed = status.containers.iter().filter(|container| container.followed).count();
        let what = format!("the agent follows {followed} containers");
        found.push(Finding::new(&finding::HEALTHY_AGENT, what, format!("pid {pid}")));
    }
}

#[cfg(test)]
mod tests {
    use super::finding::Severity;
    use super::*;
    use crate::ledger::record::Failure;
    use crate::request::setting::SettingKey;
    use crate::status::{Claim, HostSetting};

    fn hook(stages: &[&str], is_there: bool) -> Hook {
        Hook {
            engine: "OCI",
            file: format!("{HOOKS_D}/mptcp-hook.json").into(),
            program: "/usr/local/bin/mptcp-hook".into(),
            is_there,
            stages: stages.iter().map(|stage| stage.to_string()).collect(),
        }
    }

    fn seen(kind: Kind, hooks: Vec<Hook>) -> Seen {
        Seen {
            program: "mptcp-hook".into(),
            kind,
            release: "6.18.0".into(),
            kernel: vec![("path manager", "kernel".into())],
            own_netns: None,
            enabled: Some("1".into()),
            hooks,
            told: Vec::new(),
            unreadable: Vec::new(),
            managers: Vec::new(),
            agent: None,
        }
    }

    #[test]
    fn what_is_said_of_a_kernel() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let facts = || kernel_facts(root, Kind::Upstream, "6.1.0-37-amd64, Debian 6.1.140-1");
        let says = |about: &str| facts().into_iter().find(|(name, _)| *name == about).map(|(_, value)| value);
        for about in ["configuration", "modules", "lists of sockets", "scheduler"] {
            assert_eq!(says(about), None, "{about}");
        }
        write("proc/config.gz", "");
        assert_eq!(says("configuration").unwrap(), "zgrep MPTCP /proc/config.gz shows it");
        let config = |place: &str| format!("CONFIG_MPTCP=y CONFIG_INET_MPTCP_DIAG=m ({})", root.join(place).display());
        for place in ["lib/modules/6.1.0-37-amd64/config", "boot/config-6.1.0-37-amd64"] {
            write(place, "CONFIG_TCP=y\nCONFIG_MPTCP=y\nCONFIG_INET_MPTCP_DIAG=m\n");
            assert_eq!(says("configuration").unwrap(), config(place));
        }
        write("sys/module/mptcp_rr/x", "");
        write("sys/module/tcp_cubic/x", "");
        assert_eq!(says("modules").unwrap(), "mptcp_rr");
        write("lib/modules/6.1.0-37-amd64/modules.builtin", "kernel/net/ipv4/tcp_diag.ko\nkernel/net/x/y.ko\n");
        let mptcp_diag = "kernel/net/mptcp/mptcp_diag.ko.xz: kernel/net/ipv4/inet_diag.ko.xz\n";
        write("lib/modules/6.1.0-37-amd64/modules.dep", mptcp_diag);
        assert_eq!(says("lists of sockets").unwrap(), "tcp_diag built in, mptcp_diag a module, not loaded");
        write("sys/module/mptcp_diag/x", "");
        assert_eq!(says("lists of sockets").unwrap(), "tcp_diag built in, mptcp_diag loaded");
        write("proc/sys/net/mptcp/scheduler", "default\n");
        assert_eq!(says("scheduler").unwrap(), "default");
    }

    #[test]
    fn host_wide_settings_and_failed_hooks() {
        let setting = |drifted, interrupted| HostSetting {
            key: SettingKey::Sysctl("net/core/netdev_max_backlog".into()),
            value: "2000".into(),
            original: "1000".into(),
            present: Some("3000".into()),
            drifted,
            interrupted,
            claims: vec![Claim { container: "web".into(), value: "2000".into() }],
        };
        let judged = |change: &dyn Fn(&mut Status)| {
            let mut status = empty();
            change(&mut status);
            let whole = vec![hook(&["createRuntime", "poststop"], true)];
            let mut found =
                judge(&Seen { program: "mptcp-hook --state-dir /x".into(), ..seen(Kind::Upstream, whole) }, &status);
            assert_eq!(found.len(), 1, "{found:#?}");
            found.remove(0)
        };
        let drifted = judged(&|status| status.settings.push(setting(true, false)));
        assert_eq!((drifted.id, drifted.severity), ("host-setting-drifted", Severity::Problem));
        assert!(drifted.evidence.contains("= 3000; web rely on 2000"), "{}", drifted.evidence);
        assert_eq!(drifted.command.unwrap(), r"printf '%s\n' 2000 >/proc/sys/net/core/netdev_max_backlog");
        let interrupted = judged(&|status| status.settings.push(setting(false, true)));
        assert_eq!((interrupted.id, interrupted.severity), ("setting-interrupted", Severity::Problem));
        assert_eq!(interrupted.command.unwrap(), "mptcp-hook --state-dir /x repair");
        let failed = judged(&|status| {
            let failure = |container: &str, reason: &str| Failure {
                time: 1,
                container: container.into(),
                status: 1,
                reason: reason.into(),
            };
            status.failures = vec![failure("web", "no such key"), failure("db", "no such interface")];
            status.failures_dropped = 3;
        });
        assert_eq!((failed.id, failed.severity), ("hook-failed", Severity::Note));
        assert_eq!(
            (failed.what.as_str(), failed.evidence.as_str()),
            ("5 hooks failed, the last for db", "no such interface")
        );
    }

    #[test]
    fn other_managers() {
        let managers = vec![("NetworkManager".into(), 7)];
        let whole = vec![hook(&["createRuntime", "poststop"], true)];
        let found = judge(&Seen { managers, ..seen(Kind::Upstream, whole) }, &empty());
        assert_eq!(found.iter().map(|finding| finding.id).collect::<Vec<_>>(), ["other-manager"]);
        assert_eq!(found[0].evidence, "pid 7");
        assert!(found[0].mend.as_ref().unwrap().contains("connection.mptcp-flags"), "{:?}", found[0].mend);
    }

    fn empty() -> Status {
        Status::of_nobody(Kind::Upstream, false)
    }

    fn ids(seen: &Seen) -> Vec<&'static str> {
        judge(seen, &empty()).iter().map(|finding| finding.id).collect()
    }

    #[test]
    fn a_host_that_is_set_up() {
        let whole = ["createRuntime", "poststop"];
        assert!(ids(&seen(Kind::Upstream, vec![hook(&whole, true)])).is_empty());
        assert_eq!(ids(&seen(Kind::Upstream, vec![hook(&whole, false)])), ["hook-path-missing"]);
        assert_eq!(ids(&seen(Kind::Upstream, vec![hook(&["createRuntime"], true)])), ["hook-incomplete"]);
        assert_eq!(ids(&seen(Kind::Upstream, vec![hook(&["prestart"], true), hook(&["poststop"], true)])), [""; 0]);
        assert_eq!(ids(&seen(Kind::Upstream, Vec::new())), ["hook-none"]);
    }

    #[test]
    fn kernels() {
        let whole = || vec![hook(&["createRuntime", "poststop"], true)];
        assert_eq!(ids(&seen(Kind::None, whole())), ["kernel-without-mptcp"]);
        let old = Seen { release: "6.1.0-37-amd64".into(), ..seen(Kind::Upstream, whole()) };
        assert_eq!(ids(&old), ["kernel-backup-bug"]);
        let off = Seen { enabled: Some("0".into()), ..seen(Kind::Upstream, whole()) };
        // Containers have their own switch.
        assert_eq!(ids(&off), ["host-mptcp-disabled"]);
        let off = Seen { kind: Kind::MptcpOrg, kernel: Vec::new(), ..off };
        assert_eq!(ids(&off), ["mptcp-disabled"]);
        let v0 = Seen { kernel: vec![("path manager", "default".into())], ..seen(Kind::MptcpOrg, whole()) };
        assert_eq!(ids(&v0), ["path-manager-ignores-flags"]);
        let v0 = Seen { kernel: vec![("path manager", "fullmesh".into())], ..v0 };
        assert_eq!(ids(&v0), [""; 0]);
    }

    #[test]
    fn a_directory_that_the_engine_does_not_look_into() {
        let told = |engine, directories: &[&str]| Told {
            engine,
            directories: directories.iter().map(PathBuf::from).collect(),
            file: Some("/etc/containers/containers.conf".into()),
        };
        let podman = |directories: &[&str]| vec![told("podman", directories)];
        let whole = || seen(Kind::Upstream, vec![hook(&["createRuntime", "poststop"], true)]);
        assert_eq!(ids(&Seen { told: podman(&["/opt/hooks"]), ..whole() }), ["hook-dir-unseen"]);
        assert_eq!(ids(&Seen { told: podman(&["/opt/hooks", HOOKS_D]), ..whole() }), [""; 0]);
        // Into the administrator's directory nobody looks by himself.
        let in_etc = || {
            let mut seen = whole();
            seen.hooks[0].file = format!("{ETC_HOOKS_D}/mptcp-hook.json").into();
            seen
        };
        assert_eq!(ids(&in_etc()), ["hook-dir-unseen"]);
        assert_eq!(ids(&Seen { told: podman(&[HOOKS_D]), ..in_etc() }), ["hook-dir-unseen"]);
        assert_eq!(ids(&Seen { told: podman(&[HOOKS_D, ETC_HOOKS_D]), ..in_etc() }), [""; 0]);
        let both = vec![told("podman", &["/opt/hooks"]), told("CRI-O", &[ETC_HOOKS_D])];
        assert_eq!(ids(&Seen { told: both, ..in_etc() }), [""; 0]);
    }

    #[test]
    fn where_hooks_may_be() {
        let all = |told: &[(&'static str, &[&str])]| {
            let told = told.iter().map(|(engine, directories)| Told {
                engine,
                directories: directories.iter().map(PathBuf::from).collect(),
                file: Some("/x".into()),
            });
            let shown = lists(&told.collect::<Vec<_>>()).into_iter().map(|list| format!("{list:?}"));
            shown.collect::<Vec<_>>().join(" ").replace(HOOKS_D, "usr").replace(ETC_HOOKS_D, "etc").replace('"', "")
        };
        assert_eq!(all(&[]), "[usr] [etc]");
        assert_eq!(all(&[("podman", &[HOOKS_D, ETC_HOOKS_D])]), "[usr, etc]");
        assert_eq!(all(&[("podman", &["/a"])]), "[/a] [usr] [etc]");
        assert_eq!(all(&[("CRI-O", &[ETC_HOOKS_D])]), "[etc] [usr]");
    }

    #[test]
    fn a_later_directory_overrides_an_earlier_one() {
        let files = |lists: &[&[&str]]| {
            let lists: Vec<Vec<PathBuf>> = lists.iter().map(|list| list.iter().map(PathBuf::from).collect()).collect();
            let names = |directory: &Path| {
                let both = [directory.join("ours.json"), directory.join("x.json")];
                if directory == Path::new("/usr") { both.to_vec() } else { both[..1].to_vec() }
            };
            let found = hook_files(&lists, names).into_iter();
            found.map(|file| file.display().to_string()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(files(&[&["/usr", "/etc"]]), "/etc/ours.json /usr/x.json");
        // One engine is told the other order, or of one alone.
        assert_eq!(files(&[&["/usr", "/etc"], &["/etc", "/usr"]]), "/etc/ours.json /usr/ours.json /usr/x.json");
        assert_eq!(files(&[&["/usr", "/etc"], &["/usr"]]), "/etc/ours.json /usr/ours.json /usr/x.json");
    }

    #[test]
    fn hooks_dir_is_read_as_the_engines_do() {
        let read = |text: &str, table: &[&str]| hooks_dir(text, table);
        let expected = |append| Ok(Some(HooksDir { directories: vec!["/a".into(), "/b".into()], append }));
        let list = |last: &str| read(&format!("[engine]\nhooks_dir = [\"/a\", \"/b\"{last}]\n"), &["engine"]);
        assert_eq!(list(""), expected(None));
        assert_eq!(list(", {append = true}"), expected(Some(true)));
        assert_eq!(list(", {append = false}"), expected(Some(false)));
        assert_eq!(read("[crio.runtime]\nhooks_dir = [\"/a\", \"/b\"]\n", &["crio", "runtime"]), expected(None));
        assert_eq!(read("[engine]\nruntime = \"crun\"\n", &["engine"]), Ok(None));
        assert_eq!(read("engine = 5\n", &["engine"]), Ok(None));
        assert!(read("[engine\n", &["engine"]).is_err());
    }
}
