//! What is wrong with the host: its kernel, the engines' hooks, the ledger, other managers of endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::container::manager_advice;
use super::finding::{self, Finding};
use crate::error::plain;
use crate::kernel::sysctl::read_text;
use crate::kernel::{self, Kind, RouteState, upstream};
use crate::ledger::record::State;
use crate::request::flags::EndpointFlags;
use crate::request::setting;
use crate::status::Status;

/// What names our program in other programs' files.
const PROGRAM: &str = "mptcp-hook";
/// Where podman and CRI-O look for hooks unless they are told otherwise, the later before the earlier.
const HOOKS_D: [&str; 2] = ["/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d"];
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
    /// Which MPTCP.
    pub kind: Kind,
    /// `uname -r`.
    pub release: String,
    /// What the kernel says about itself, by what it is about.
    pub kernel: Vec<(&'static str, String)>,
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
    /// Who says so.
    pub file: PathBuf,
}

/// Reads it all. Nothing that cannot be read is an error: it is found, or it is not there.
pub fn look(agent: Option<u32>, own_netns: Option<u64>) -> Seen {
    let kind = Kind::detect();
    let release = kernel::release();
    let mut seen = Seen {
        kind,
        kernel: kernel_facts(kind, &release),
        enabled: read_text(match kind {
            Kind::MptcpOrg => "/proc/sys/net/mptcp/mptcp_enabled",
            _ => "/proc/sys/net/mptcp/enabled",
        }),
        release,
        hooks: Vec::new(),
        told: Vec::new(),
        unreadable: Vec::new(),
        managers: own_netns.map(managers).unwrap_or_default(),
        agent,
    };
    for engine in [PODMAN, CRIO] {
        look_for_directories(&engine, &mut seen);
    }
    // The directories that an engine was told of may hold more.
    let told = seen.told.iter().flat_map(|told| told.directories.clone());
    let directories: BTreeSet<PathBuf> = HOOKS_D.iter().map(PathBuf::from).chain(told).collect();
    for directory in &directories {
        look_for_oci(directory, &mut seen);
    }
    for place in LXC {
        look_for_lxc(Path::new(place), &mut seen);
    }
    seen
}

fn kernel_facts(kind: Kind, release: &str) -> Vec<(&'static str, String)> {
    let mut facts = vec![("kernel", format!("{} MPTCP, Linux {release}", kind.name()))];
    let path = format!("/boot/config-{release}");
    let config = read_file(Path::new(&path)).ok().map(|text| {
        let options = text.lines().filter(|line| line.contains("MPTCP"));
        format!("{} ({path})", options.collect::<Vec<_>>().join(" "))
    });
    let built = match kind {
        Kind::None => "not there",
        _ => "built in (MPTCP itself is never a module)",
    };
    facts.push(("MPTCP", built.into()));
    facts.extend(config.map(|config| ("configuration", config)));
    let modules = file_names(Path::new("/sys/module"));
    let modules: Vec<String> = modules.into_iter().filter(|name| name.contains("mptcp")).collect();
    if !modules.is_empty() {
        facts.push(("modules", modules.join(" ")));
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
        facts.extend(read_text(&format!("/proc/sys/{path}")).map(|value| (*name, value)));
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
    for file in files {
        let Ok(text) = read_file(&file) else { continue };
        match hooks_dir(&text, engine.table) {
            Ok(None) => {}
            Ok(Some(directories)) => {
                // The last one counts.
                seen.told.retain(|told| told.engine != engine.name);
                seen.told.push(Told { engine: engine.name, directories, file });
            }
            Err(error) => seen.unreadable.push((file, error)),
        }
    }
}

/// `hooks_dir` of a table of containers.conf(5) or crio.conf(5).
fn hooks_dir(text: &str, table: &[&str]) -> Result<Option<Vec<PathBuf>>, String> {
    let document: toml::Table = text.parse().map_err(|e: toml::de::Error| plain(e.message()))?;
    let mut inner = Some(&document);
    for name in table {
        inner = inner.and_then(|table| table.get(*name)).and_then(toml::Value::as_table);
    }
    let list = inner.and_then(|table| table.get("hooks_dir")).and_then(toml::Value::as_array);
    // Beside strings there may be { append = true }.
    Ok(list.map(|list| list.iter().filter_map(toml::Value::as_str).map(PathBuf::from).collect()))
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

fn look_for_oci(directory: &Path, seen: &mut Seen) {
    for file in files_in(directory, ".json") {
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
    use std::os::unix::fs::MetadataExt;
    let pids = file_names(Path::new("/proc")).into_iter().filter_map(|name| name.parse::<u32>().ok());
    let mut found: Vec<(String, u32)> = pids
        .filter_map(|pid| {
            let name = read_text(&format!("/proc/{pid}/comm")).filter(|name| MANAGERS.contains(&name.as_str()))?;
            let is_here = std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|file| file.ino() == netns);
            is_here.then_some((name, pid))
        })
        .collect();
    found.sort();
    found
}

/// All that is wrong.
pub fn judge(seen: &Seen, status: &Status) -> Vec<Finding> {
    let mut found = Vec::new();
    judge_kernel(seen, &mut found);
    judge_hooks(seen, &mut found);
    judge_ledger(seen, status, &mut found);
    for (name, pid) in &seen.managers {
        let what = format!("{name} runs in this network namespace");
        let finding = Finding::new(&finding::OTHER_MANAGER, what, format!("pid {pid}"));
        found.push(finding.mend(manager_advice(name)));
    }
    finding::sort(&mut found);
    found
}

fn judge_kernel(seen: &Seen, found: &mut Vec<Finding>) {
    let release = &seen.release;
    let fact = |name: &str| seen.kernel.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str());
    match seen.kind {
        Kind::None => {
            let evidence = format!(
                "no /proc/sys/net/mptcp/enabled on {release}; {}",
                fact("configuration").unwrap_or("no /boot/config of it")
            );
            let finding = Finding::new(&finding::KERNEL_WITHOUT, "this kernel has no MPTCP", evidence);
            found.push(finding.mend("boot a kernel that was built with CONFIG_MPTCP=y (Linux 5.6 or newer)"));
        }
        Kind::Upstream => {
            let flags = EndpointFlags::BACKUP.union(EndpointFlags::SIGNAL);
            if let Some(bug) = upstream::backup_bug(release, flags) {
                let finding = Finding::new(&finding::BACKUP_BUG, format!("this kernel {bug}"), release);
                found.push(finding.mend("run Linux 6.11 or newer"));
            }
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
        let (key, whose) = match seen.kind {
            Kind::MptcpOrg => ("net.mptcp.mptcp_enabled", "on this host"),
            _ => ("net.mptcp.enabled", "in the host's own network namespace (containers have their own switch)"),
        };
        let finding =
            Finding::new(&finding::MPTCP_OFF, format!("MPTCP is switched off {whose}"), format!("{key} = {off}"));
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
            found.push(
                finding
                    .mend("install the program there, or name its place in the file")
                    .by(format!("install -D -m 755 {own} {program}")),
            );
        }
    }
    for told in &seen.told {
        for hook in seen.hooks.iter().filter(|hook| hook.engine == "OCI") {
            let Some(directory) = hook.file.parent() else { continue };
            // What another engine was told of is that one's.
            let is_default = HOOKS_D.iter().any(|default| Path::new(default) == directory);
            if is_default && !told.directories.iter().any(|seen| seen == directory) {
                let what = format!(
                    "{} does not look into {}, where {} is",
                    told.engine,
                    directory.display(),
                    hook.file.display()
                );
                let show = |all: &[PathBuf]| format!("{all:?}");
                let evidence = format!("hooks_dir = {} in {}", show(&told.directories), told.file.display());
                let wanted: Vec<PathBuf> = told.directories.iter().cloned().chain([directory.into()]).collect();
                let mend = format!("write hooks_dir = {} there, or take the line out", show(&wanted));
                found.push(Finding::new(&finding::HOOK_UNSEEN, what, evidence).mend(mend));
            }
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
        let evidence = format!("nothing of ours in {}, {}, {}", HOOKS_D[0], HOOKS_D[1], LXC[0]);
        let finding = Finding::new(&finding::HOOK_NONE, "no engine has the hook", evidence);
        found.push(finding.mend("install one from the directory hooks/ of the distribution (see its README)"));
    }
}

fn judge_ledger(seen: &Seen, status: &Status, found: &mut Vec<Finding>) {
    for problem in &status.problems {
        let finding = Finding::new(&finding::LEDGER_PROBLEM, problem, "the ledger");
        found.push(finding.mend("what is damaged is moved aside, the rest is put in order").by("mptcp-hook repair"));
    }
    for setting in &status.settings {
        let key = &setting.key;
        if setting.interrupted {
            let what = format!("a hook was killed while it wrote {key}");
            let finding = Finding::new(&finding::HOST_INTERRUPTED, what, setting.present.clone().unwrap_or_default());
            found.push(finding.mend("decide it").by("mptcp-hook repair"));
        } else if setting.drifted {
            let now = setting.present.clone().unwrap_or_default();
            let what = format!("somebody changed {key} from {} to {now}", setting.value);
            let holders: Vec<&str> = setting.claims.iter().map(|claim| claim.container.as_str()).collect();
            let evidence = format!("{key} = {now}; {} rely on {}", holders.join(", "), setting.value);
            let path = key.path().display().to_string();
            let command = format!("printf '%s\\n' '{}' >{path}", setting.value);
            found.push(Finding::new(&finding::HOST_DRIFTED, what, evidence).mend("write it again").by(command));
        }
    }
    let dead: Vec<&str> = status.containers.iter().filter(|c| !c.live).map(|c| c.record.name.as_str()).collect();
    if !dead.is_empty() {
        let what = format!("{} dead containers are in the ledger", dead.len());
        let finding = Finding::new(&finding::LEDGER_STALE, what, dead.join(", "));
        found.push(finding.mend("let them go").by("mptcp-hook release --stale"));
    }
    for container in status.containers.iter().filter(|container| container.live) {
        let record = &container.record;
        let id = &record.instance.container.id;
        if let Some(why) = &container.not_followed {
            let finding = Finding::new(&finding::NOT_FOLLOWED, format!("nobody follows {}", record.name), why);
            found.push(
                finding.mend("start the agent: enable its unit where systemd runs, else").by("mptcp-hook agent &"),
            );
        }
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
        found.push(finding.mend("look at it").by(format!("mptcp-hook doctor {id}")));
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
    use super::*;

    fn hook(stages: &[&str], is_there: bool) -> Hook {
        Hook {
            engine: "OCI",
            file: "/etc/containers/oci/hooks.d/mptcp-hook.json".into(),
            program: "/usr/local/bin/mptcp-hook".into(),
            is_there,
            stages: stages.iter().map(|stage| stage.to_string()).collect(),
        }
    }

    fn seen(kind: Kind, hooks: Vec<Hook>) -> Seen {
        Seen {
            kind,
            release: "6.18.0".into(),
            kernel: vec![("path manager", "kernel".into())],
            enabled: Some("1".into()),
            hooks,
            told: Vec::new(),
            unreadable: Vec::new(),
            managers: Vec::new(),
            agent: None,
        }
    }

    fn empty() -> Status {
        Status {
            kernel: Kind::Upstream,
            containers: Vec::new(),
            settings: Vec::new(),
            conflicts: Vec::new(),
            conflicts_dropped: 0,
            failures: Vec::new(),
            failures_dropped: 0,
            problems: Vec::new(),
            rootless: false,
        }
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
        assert_eq!(ids(&off), ["mptcp-disabled"]);
        let v0 = Seen { kernel: vec![("path manager", "default".into())], ..seen(Kind::MptcpOrg, whole()) };
        assert_eq!(ids(&v0), ["path-manager-ignores-flags"]);
        let v0 = Seen { kernel: vec![("path manager", "fullmesh".into())], ..v0 };
        assert_eq!(ids(&v0), [""; 0]);
    }

    #[test]
    fn a_directory_that_the_engine_does_not_look_into() {
        let told = |directories: &[&str]| Told {
            engine: "podman",
            directories: directories.iter().map(PathBuf::from).collect(),
            file: "/etc/containers/containers.conf".into(),
        };
        let whole = || seen(Kind::Upstream, vec![hook(&["createRuntime", "poststop"], true)]);
        assert_eq!(ids(&Seen { told: vec![told(&["/opt/hooks"])], ..whole() }), ["hook-dir-unseen"]);
        assert_eq!(ids(&Seen { told: vec![told(&["/opt/hooks", HOOKS_D[1]])], ..whole() }), [""; 0]);
    }

    #[test]
    fn hooks_dir_is_read_as_the_engines_do() {
        let read = |text: &str, table: &[&str]| hooks_dir(text, table);
        let expected = Ok(Some(vec![PathBuf::from("/a"), PathBuf::from("/b")]));
        assert_eq!(read("[engine]\nhooks_dir = [\"/a\", \"/b\", {append = true}]\n", &["engine"]), expected);
        assert_eq!(read("[crio.runtime]\nhooks_dir = [\"/a\", \"/b\"]\n", &["crio", "runtime"]), expected);
        assert_eq!(read("[engine]\nruntime = \"crun\"\n", &["engine"]), Ok(None));
        assert_eq!(read("engine = 5\n", &["engine"]), Ok(None));
        assert!(read("[engine\n", &["engine"]).is_err());
    }
}
