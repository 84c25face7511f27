//! The command line: one table of flags, from which the parser and the help texts come.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use lexopt::Arg;

use crate::error::{shown, usage};
use crate::request::{self, Rank, Source, What, Wish};

/// What a person names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A name, an id, or the beginning of one that is unique in the ledger.
    Known(String),
    /// `--pid`.
    Pid(u32),
    /// `--netns`.
    Netns(PathBuf),
}

/// What is to be captured, and until when.
#[derive(Debug)]
pub struct Capture {
    /// Where.
    pub target: Target,
    /// As JSON.
    pub json: bool,
    /// Packets with no MPTCP option but DSS, too.
    pub dss: bool,
    /// After so many packets it ends.
    pub count: Option<u64>,
    /// After this time it ends.
    pub duration: Option<Duration>,
    /// A file for the packets.
    pub write: Option<PathBuf>,
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Print this text.
    Print(String),
    /// An OCI hook; the wishes of its entry.
    Oci(Vec<Wish>),
    /// An LXC hook; the wishes on its line, and the words that LXC appended.
    Lxc(Vec<Wish>, Vec<String>),
    /// Set a container up by hand.
    Apply {
        /// Which.
        target: Target,
        /// What is asked for.
        wishes: Vec<Wish>,
        /// Only say what would be done.
        dry_run: bool,
        /// As JSON.
        json: bool,
    },
    /// Let a container go by hand.
    Release(Target),
    /// Let all containers go that are dead.
    ReleaseStale,
    /// Mend the ledger.
    Repair,
    /// Follow containers. With `wait`, after the end of an agent that runs already.
    Agent {
        /// `--wait`.
        wait: bool,
    },
    /// Look for what is wrong.
    Doctor {
        /// With which container; none for the host.
        target: Option<Target>,
        /// A peer to connect to from inside.
        probe: Option<SocketAddr>,
        /// As JSON.
        json: bool,
    },
    /// Show packets.
    Capture(Capture),
    /// Show the ledger.
    Status {
        /// Only this container.
        name: Option<String>,
        /// As JSON.
        json: bool,
        /// Again and again.
        watch: bool,
    },
}

/// Options that stand before or after any verb.
#[derive(Clone, Debug, Default)]
pub struct Globals {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--state-dir`.
    pub state_dir: Option<PathBuf>,
}

/// The verbs that are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// OCI hook.
    Oci,
    /// LXC hook.
    Lxc,
    /// By hand.
    Apply,
    /// By hand.
    Release,
    /// The ledger.
    Status,
    /// The ledger, mended.
    Repair,
    /// Keeps containers as they were asked for.
    Agent,
    /// What is wrong.
    Doctor,
    /// Shows what peers tell each other.
    Capture,
}

struct VerbHelp {
    verb: Verb,
    name: &'static str,
    usage: &'static str,
    what: &'static str,
    example: &'static str,
}

const VERBS: [VerbHelp; 9] = [
    VerbHelp {
        verb: Verb::Oci,
        name: "oci",
        usage: "mptcp-hook oci [REQUEST]",
        what: "OCI hook: reads the container's state from standard input. Sets the container up at prestart,\n\
               createRuntime, createContainer and poststart, and lets it go at poststop. The container's annotations\n\
               under mptcp-hook/ and the REQUEST on the hook's line say what is wanted.",
        example: "Example, in a bundle's config.json (or see hooks/ for podman and CRI-O):\n  \
                  \"hooks\": {\"createRuntime\": [{\"path\": \"/usr/local/bin/mptcp-hook\",\n    \
                  \"args\": [\"mptcp-hook\", \"oci\", \"--interface\", \"eth1=backup\"]}]}",
    },
    VerbHelp {
        verb: Verb::Lxc,
        name: "lxc",
        usage: "mptcp-hook lxc [REQUEST]",
        what: "LXC hook, versions 0 and 1: sets the container up at start-host and lets it go at post-stop.",
        example: "Example, in the container's configuration:\n  \
                  lxc.hook.start-host = /usr/local/bin/mptcp-hook lxc --interface eth1=backup\n  \
                  lxc.hook.post-stop = /usr/local/bin/mptcp-hook lxc",
    },
    VerbHelp {
        verb: Verb::Apply,
        name: "apply",
        usage: "mptcp-hook apply TARGET [REQUEST] [--dry-run] [--json]",
        what: "Sets a running container up by hand, or changes what it was set up with: what is asked for here comes on\n\
               top of what its hook asked for.",
        example: "Example: make eth1 of the container \"web\" a normal path; its live connections switch at once:\n  \
                  mptcp-hook apply web --interface eth1=subflow",
    },
    VerbHelp {
        verb: Verb::Release,
        name: "release",
        usage: "mptcp-hook release TARGET | --stale",
        what: "Undoes everything that was set up for a container, and puts host-wide values back that only it relied on.",
        example: "Example: let go of what containers left behind that were killed with their runtime:\n  \
                  mptcp-hook release --stale",
    },
    VerbHelp {
        verb: Verb::Status,
        name: "status",
        usage: "mptcp-hook status [NAME] [--json | --watch]",
        what: "Shows which containers are set up how, which rely on which host-wide setting, and who was refused and why.\n\
               Takes no lock and changes nothing.",
        example: "Example:\n  mptcp-hook status web --json",
    },
    VerbHelp {
        verb: Verb::Repair,
        name: "repair",
        usage: "mptcp-hook repair",
        what: "Rebuilds what the ledger knows about settings and namespaces from its records of the containers. What cannot\n\
               be read is moved to the directory damaged/ beside it and named. Containers that are dead stay in it:\n\
               mptcp-hook release --stale lets them go.",
        example: "Example, when status or a hook says that a file of the ledger is damaged:\n  mptcp-hook repair",
    },
    VerbHelp {
        verb: Verb::Agent,
        name: "agent",
        usage: "mptcp-hook agent [--wait]",
        what: "Keeps running containers as they were asked for while links and addresses come and go, and lets them go when\n\
               their init has ended. One for the host; a hook starts it where it is needed (--follow), under systemd its\n\
               unit does. It ends by itself a minute after the last container that needs it.",
        example: "Example, to see what it does:\n  mptcp-hook agent",
    },
    VerbHelp {
        verb: Verb::Doctor,
        name: "doctor",
        usage: "mptcp-hook doctor [TARGET] [--json] [--probe HOST:PORT]",
        what: "Looks for what keeps MPTCP from working as asked, on the host or in one container: addresses, flags, limits,\n\
               routes, gateways, filters, settings, and what has become of live connections' subflows. Each finding comes\n\
               with what was read and what mends it. Exit 0 if there is no problem, else 1. Takes no lock, changes nothing.",
        example: "Example, with a real connection from inside the container \"web\":\n  \
                  mptcp-hook doctor web --probe 192.0.2.10:80",
    },
    VerbHelp {
        verb: Verb::Capture,
        name: "capture",
        usage: "mptcp-hook capture TARGET [--json] [--dss] [--count N] [--duration S] [--write FILE.pcap]",
        what: "Shows each TCP packet of the container that says something about Multipath TCP, as it passes: connections\n\
               and subflows that are opened or closed, addresses, priorities. On all interfaces, those that come later\n\
               included, until it is interrupted or the container ends. Times are UTC. Changes nothing.",
        example: "Example: is eth1 of the container \"web\" a backup path? Its SYN must say \"MP_JOIN id 1 backup\":\n  \
                  mptcp-hook capture web",
    },
];

/// The words of the contract that this version does not have.
const NOT_BUILT: [&str; 1] = ["install"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Id {
    Interface,
    Limit,
    Sysctl,
    Module,
    OnConflict,
    Routes,
    Follow,
    Name,
    /// Only one of its values is in this version.
    PartlyBuilt,
    Pid,
    Netns,
    DryRun,
    Json,
    Dss,
    Count,
    Duration,
    Write,
    Stale,
    Watch,
    Wait,
    Probe,
    Config,
    StateDir,
    Help,
    Version,
    /// In the contract, but not in this version.
    NotBuilt,
}

struct Flag {
    id: Id,
    long: &'static str,
    value: Option<&'static str>,
    verbs: &'static [Verb],
    what: &'static str,
}

const REQUEST: &[Verb] = &[Verb::Oci, Verb::Lxc, Verb::Apply];
const TARGET: &[Verb] = &[Verb::Apply, Verb::Release, Verb::Doctor, Verb::Capture];
const CAPTURE: &[Verb] = &[Verb::Capture];
const ALL: &[Verb] = &[
    Verb::Oci,
    Verb::Lxc,
    Verb::Apply,
    Verb::Release,
    Verb::Status,
    Verb::Repair,
    Verb::Agent,
    Verb::Doctor,
    Verb::Capture,
];

const fn flag(
    id: Id,
    long: &'static str,
    value: Option<&'static str>,
    verbs: &'static [Verb],
    what: &'static str,
) -> Flag {
    Flag { id, long, value, verbs, what }
}

const FLAGS: &[Flag] = &[
    flag(
        Id::Interface,
        "interface",
        Some("NAME=FLAG[,FLAG...][,gateway=ADDRESS]"),
        REQUEST,
        "subflow, signal, backup, fullmesh, laminar, off, default, or a number as in\n/sys/class/net/eth0/flags (0x101003 = backup). NAME may hold * and ?. Repeatable.",
    ),
    flag(Id::Limit, "limit", Some("LIMIT=N"), REQUEST, "subflows or add_addr_accepted, 0 to 8. Repeatable."),
    flag(
        Id::Sysctl,
        "sysctl",
        Some("KEY=VALUE"),
        REQUEST,
        "A net.* sysctl; a KEY without dot or slash is net.mptcp.KEY. Repeatable.",
    ),
    flag(
        Id::Module,
        "module",
        Some("MODULE.PARAM=VALUE"),
        REQUEST,
        "An MPTCP module's parameter, such as mptcp_fullmesh.num_subflows=2. Repeatable.",
    ),
    flag(
        Id::OnConflict,
        "on-conflict",
        Some("refuse|warn|override"),
        REQUEST,
        "What to do where others rely on another value; refuse if not said.",
    ),
    flag(Id::Name, "name", Some("NAME"), REQUEST, "The name to show, and of the file in containers.d."),
    flag(
        Id::Routes,
        "routes",
        Some("auto|off"),
        REQUEST,
        "auto: a rule and a table of its own for each interface whose packets would not leave by it;\noff if not said.",
    ),
    flag(Id::PartlyBuilt, "mptcp", Some("default"), REQUEST, "off and force are not in this version yet."),
    flag(
        Id::Follow,
        "follow",
        Some("auto|always|never"),
        REQUEST,
        "Whether the agent keeps it so while links and addresses come and go; auto if not said:\nwhere something is pending, or an address may go or change.",
    ),
    flag(Id::Pid, "pid", Some("PID"), TARGET, "TARGET: the namespace of this process."),
    flag(
        Id::Netns,
        "netns",
        Some("PATH"),
        TARGET,
        "TARGET: the namespace bound to this path, such as /run/netns/NAME.",
    ),
    flag(Id::DryRun, "dry-run", None, &[Verb::Apply], "Say what would be done and why, and do nothing."),
    flag(
        Id::Json,
        "json",
        None,
        &[Verb::Apply, Verb::Status, Verb::Doctor, Verb::Capture],
        "Print JSON; capture: an object per line.",
    ),
    flag(Id::Dss, "dss", None, CAPTURE, "Packets with data, too (the option DSS): nearly all of a connection."),
    flag(Id::Count, "count", Some("N"), CAPTURE, "End after N packets."),
    flag(Id::Duration, "duration", Some("S"), CAPTURE, "End after S seconds."),
    flag(
        Id::Write,
        "write",
        Some("FILE.pcap"),
        CAPTURE,
        "Write the packets to a file for tshark or Wireshark, too, the first 512 bytes of each. A file of your\n\
         own is overwritten; a link, or a file of somebody else's, is refused.",
    ),
    flag(Id::Stale, "stale", None, &[Verb::Release], "All containers that are dead."),
    flag(Id::Watch, "watch", None, &[Verb::Status], "Update in place, once a second."),
    flag(
        Id::Wait,
        "wait",
        None,
        &[Verb::Agent],
        "If an agent runs already, wait for its end and take over, as systemd's unit does, instead of ending.",
    ),
    flag(
        Id::Probe,
        "probe",
        Some("HOST:PORT"),
        &[Verb::Doctor],
        "Open an MPTCP connection from inside the container to this address, such as\n192.0.2.10:80 or [2001:db8::10]:80, and see which paths come up. It sends one line break.",
    ),
    flag(Id::Config, "config", Some("FILE"), ALL, "The policy file (/etc/mptcp-hook/config.toml)."),
    flag(Id::StateDir, "state-dir", Some("DIR"), ALL, "The ledger's directory (/run/mptcp-hook)."),
    flag(Id::Help, "help", None, ALL, "Print this help."),
    flag(Id::Version, "version", None, ALL, "Print the version."),
    flag(Id::NotBuilt, "prometheus", None, &[Verb::Status], ""),
];

/// The verb among the arguments, without judging them: an OCI hook has to drain standard input even if its arguments
/// are wrong. None for a call for help.
pub fn peek(arguments: &[OsString]) -> Option<Verb> {
    let mut arguments = arguments.iter().map(|argument| argument.to_string_lossy());
    let mut verb = None;
    let named = |word: &str| VERBS.iter().find(|v| v.name == word).map(|v| v.verb);
    while let Some(argument) = arguments.next() {
        match argument.strip_prefix("--") {
            // What follows are words, whatever they look like.
            Some("") => return verb.or_else(|| named(&arguments.next()?)),
            Some("help" | "version") => return None,
            // `--config FILE oci`: the value is no verb.
            Some(long) if FLAGS.iter().any(|flag| flag.long == long && flag.value.is_some()) => {
                arguments.next();
            }
            Some(_) => {}
            None if argument == "-h" || argument == "-V" => return None,
            None if verb.is_none() => verb = named(&argument),
            None => {}
        }
    }
    verb
}

/// Reads the command line (without the program's name).
pub fn parse(arguments: Vec<OsString>) -> Result<(Globals, Action)> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut globals = Globals::default();
    let mut verb: Option<Verb> = None;
    let mut given: Vec<(&Flag, String)> = Vec::new();
    let mut words: Vec<String> = Vec::new();
    while let Some(argument) = parser.next().map_err(|e| usage(e.to_string()))? {
        match argument {
            Arg::Long(_) | Arg::Short('h' | 'V') => {
                let name = match argument {
                    Arg::Short('h') => "help".to_string(),
                    Arg::Short(_) => "version".to_string(),
                    Arg::Long(name) => name.to_string(),
                    Arg::Value(_) => unreachable!("matched above"),
                };
                let flag = find_flag(&name)?;
                let value = match flag.value {
                    Some(form) => match parser.value() {
                        Ok(value) => {
                            value.into_string().map_err(|_| usage(format!("--{name}: the value is not UTF-8")))?
                        }
                        Err(_) => return Err(usage(format!("--{name} needs a value: --{name} {form}"))),
                    },
                    None => String::new(),
                };
                given.push((flag, value));
            }
            Arg::Short(c) => return Err(usage(format!("unknown option -{}; see mptcp-hook --help", c.escape_debug()))),
            Arg::Value(value) => {
                let word = value.into_string().map_err(|_| usage("an argument is not UTF-8"))?;
                if verb.is_none() {
                    verb = Some(find_verb(&word)?);
                } else {
                    words.push(word);
                }
            }
        }
    }
    if given.iter().any(|(flag, _)| flag.id == Id::Help) {
        return Ok((globals, Action::Print(help(verb))));
    }
    if given.iter().any(|(flag, _)| flag.id == Id::Version) {
        return Ok((globals, Action::Print(format!("mptcp-hook {}\n", env!("CARGO_PKG_VERSION")))));
    }
    let Some(verb) = verb else {
        return Err(usage(format!("say what to do: {}; see mptcp-hook --help", VERBS.map(|v| v.name).join(", "))));
    };
    let rank = if verb == Verb::Apply { Rank::CommandLine } else { Rank::HookArgument };
    let mut read = Read { rank, ..Read::default() };
    for (flag, value) in given {
        if !flag.verbs.contains(&verb) {
            let verb = name_of(verb);
            return Err(usage(format!("--{} does not belong to {verb}; see mptcp-hook {verb} --help", flag.long)));
        }
        match flag.id {
            Id::Config => globals.config = Some(value.into()),
            Id::StateDir => globals.state_dir = Some(value.into()),
            Id::NotBuilt => return Err(usage(format!("--{} is not in this version yet", flag.long))),
            _ => read.flag(flag, &value)?,
        }
    }
    let action = read.into_action(verb, words)?;
    Ok((globals, action))
}

/// What the flags of one verb add up to.
struct Read {
    rank: Rank,
    wishes: Vec<Wish>,
    target: Option<Target>,
    dry_run: bool,
    json: bool,
    dss: bool,
    count: Option<u64>,
    duration: Option<Duration>,
    write: Option<PathBuf>,
    stale: bool,
    watch: bool,
    wait: bool,
    probe: Option<SocketAddr>,
}

impl Default for Read {
    fn default() -> Self {
        Self {
            rank: Rank::CommandLine,
            wishes: Vec::new(),
            target: None,
            dry_run: false,
            json: false,
            dss: false,
            count: None,
            duration: None,
            write: None,
            stale: false,
            watch: false,
            wait: false,
            probe: None,
        }
    }
}

impl Read {
    fn flag(&mut self, flag: &Flag, value: &str) -> Result<()> {
        let said = || format!("--{} {}", flag.long, shown(value));
        let pair =
            || value.split_once('=').ok_or_else(|| format!("it has the form {}", flag.value.unwrap_or_default()));
        let wish = match flag.id {
            Id::Interface => {
                let wishes = pair().and_then(|(name, flags)| request::interface(name, flags));
                return self.wish(&said(), wishes);
            }
            Id::Limit => pair().and_then(|(name, n)| request::limit(name, n)),
            Id::Sysctl => pair().and_then(|(key, value)| request::sysctl(key, value)),
            Id::Module => pair().and_then(|(key, value)| request::module(key, value)),
            Id::OnConflict => value.parse().map(What::OnConflict),
            Id::Routes => value.parse().map(What::Routes),
            Id::Follow => value.parse().map(What::Follow),
            Id::Name => request::name(value),
            Id::PartlyBuilt => {
                let option = request::partly_built(flag.long);
                return option.map_or(Ok(()), |option| option.check(value)).map_err(usage);
            }
            Id::Pid => return self.pid(value),
            Id::Netns => return self.set_target(Target::Netns(value.into())),
            Id::DryRun => {
                self.dry_run = true;
                return Ok(());
            }
            Id::Json => {
                self.json = true;
                return Ok(());
            }
            Id::Dss => {
                self.dss = true;
                return Ok(());
            }
            Id::Count => {
                self.count = Some(positive(flag, value)?);
                return Ok(());
            }
            Id::Duration => {
                self.duration = Some(Duration::from_secs(positive(flag, value)?));
                return Ok(());
            }
            Id::Write => {
                self.write = Some(value.into());
                return Ok(());
            }
            Id::Stale => {
                self.stale = true;
                return Ok(());
            }
            Id::Watch => {
                self.watch = true;
                return Ok(());
            }
            Id::Wait => {
                self.wait = true;
                return Ok(());
            }
            Id::Probe => {
                let address: SocketAddr = value.parse().map_err(|_| {
                    usage(format!(
                        "{}: it has the form ADDRESS:PORT, such as 192.0.2.10:80 or [2001:db8::10]:80; names are not looked up",
                        said()
                    ))
                })?;
                let ip = address.ip().to_canonical();
                if matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
                    return Err(usage(format!(
                        "{}: a link-local address is on one link alone, and there is one path to it; name an address that all paths lead to",
                        said()
                    )));
                }
                self.probe = Some(SocketAddr::new(ip, address.port()));
                return Ok(());
            }
            Id::Config | Id::StateDir | Id::Help | Id::Version | Id::NotBuilt => return Ok(()),
        };
        self.wish(&said(), wish.map(|what| vec![what]))
    }

    fn wish(&mut self, said: &str, asked: Result<Vec<What>, String>) -> Result<()> {
        let asked = asked.map_err(|e| usage(format!("{said}: {e}")))?;
        let place = if self.rank == Rank::CommandLine { "the command line's" } else { "the hook argument" };
        let source = Source::new(self.rank, format!("{place} {said}"));
        self.wishes.extend(asked.into_iter().map(|what| Wish::new(what, source.clone())));
        Ok(())
    }

    fn pid(&mut self, value: &str) -> Result<()> {
        match value.parse() {
            Ok(pid) if pid > 0 => self.set_target(Target::Pid(pid)),
            _ => Err(usage(format!("--pid \"{}\" is not a process id", shown(value)))),
        }
    }

    fn set_target(&mut self, target: Target) -> Result<()> {
        match self.target.replace(target) {
            None => Ok(()),
            Some(_) => Err(usage("name one TARGET: NAME, --pid or --netns")),
        }
    }

    fn into_action(mut self, verb: Verb, words: Vec<String>) -> Result<Action> {
        if verb == Verb::Lxc {
            return Ok(Action::Lxc(self.wishes, words));
        }
        let mut words = words.into_iter();
        match verb {
            Verb::Apply | Verb::Release | Verb::Doctor | Verb::Capture => {
                if let Some(word) = words.next() {
                    self.set_target(Target::Known(word))?;
                }
            }
            Verb::Status | Verb::Repair | Verb::Agent | Verb::Oci | Verb::Lxc => {}
        }
        let name = if verb == Verb::Status { words.next() } else { None };
        if let Some(word) = words.next() {
            return Err(usage(format!("unexpected argument \"{}\"; usage: {}", shown(&word), describe(verb).usage)));
        }
        let no_target = || usage("name the container: NAME (see mptcp-hook status), --pid PID or --netns PATH");
        Ok(match verb {
            Verb::Oci | Verb::Lxc => Action::Oci(self.wishes),
            Verb::Apply => Action::Apply {
                target: self.target.ok_or_else(no_target)?,
                wishes: self.wishes,
                dry_run: self.dry_run,
                json: self.json,
            },
            Verb::Release => match (self.target, self.stale) {
                (None, true) => Action::ReleaseStale,
                (Some(target), false) => Action::Release(target),
                (None, false) => return Err(no_target()),
                (Some(_), true) => return Err(usage("--stale stands alone: it lets all dead containers go")),
            },
            Verb::Status if self.json && self.watch => return Err(usage("choose one: --json or --watch")),
            Verb::Status => Action::Status { name, json: self.json, watch: self.watch },
            Verb::Agent => Action::Agent { wait: self.wait },
            Verb::Doctor if self.probe.is_some() && self.target.is_none() => {
                return Err(usage(format!("--probe opens a connection from inside a container: {}", no_target())));
            }
            Verb::Doctor => Action::Doctor { target: self.target, probe: self.probe, json: self.json },
            Verb::Capture => Action::Capture(Capture {
                target: self.target.ok_or_else(no_target)?,
                json: self.json,
                dss: self.dss,
                count: self.count,
                duration: self.duration,
                write: self.write,
            }),
            Verb::Repair => Action::Repair,
        })
    }
}

/// A number from 1 on.
fn positive(flag: &Flag, value: &str) -> Result<u64> {
    let number = value.parse::<NonZero<u64>>().map(NonZero::get);
    number.map_err(|_| usage(format!("--{} \"{}\" is not a number from 1 on", flag.long, shown(value))))
}

fn find_flag(name: &str) -> Result<&'static Flag> {
    FLAGS.iter().find(|flag| flag.long == name).ok_or_else(|| {
        let known = FLAGS.iter().map(|flag| flag.long);
        let name = shown(name);
        usage(match request::nearest(&name, known) {
            Some(near) => format!("unknown option --{name}; did you mean --{near}?"),
            None => format!("unknown option --{name}; see mptcp-hook --help"),
        })
    })
}

fn find_verb(word: &str) -> Result<Verb> {
    if NOT_BUILT.contains(&word) {
        return Err(usage(format!("{word} is not in this version yet")));
    }
    VERBS.iter().find(|v| v.name == word).map(|v| v.verb).ok_or_else(|| {
        let word = shown(word);
        usage(match request::nearest(&word, VERBS.map(|v| v.name)) {
            Some(near) => format!("unknown verb \"{word}\"; did you mean {near}?"),
            None => format!("unknown verb \"{word}\"; see mptcp-hook --help"),
        })
    })
}

fn describe(verb: Verb) -> &'static VerbHelp {
    VERBS.iter().find(|v| v.verb == verb).unwrap_or(&VERBS[0])
}

fn name_of(verb: Verb) -> &'static str {
    describe(verb).name
}

fn help(verb: Option<Verb>) -> String {
    let mut text = String::new();
    match verb {
        Some(verb) => {
            let VerbHelp { usage, what, example, .. } = describe(verb);
            text += &format!("usage: {usage}\n\n{what}\n\n{example}\n");
        }
        None => {
            text += "mptcp-hook sets a container's interfaces up for Multipath TCP.\n\nusage:\n";
            for VerbHelp { usage, .. } in &VERBS {
                text += &format!("  {usage}\n");
            }
            text += "\nTARGET is a NAME or id that mptcp-hook status shows, --pid PID or --netns PATH.\n\
                     mptcp-hook VERB --help shows an example.\n";
        }
    }
    text += "\nOptions:\n";
    for flag in FLAGS.iter().filter(|f| f.id != Id::NotBuilt && verb.is_none_or(|v| f.verbs.contains(&v))) {
        let form = match flag.value {
            Some(value) => format!("--{} {value}", flag.long),
            None => format!("--{}", flag.long),
        };
        text += &format!("  {form}\n      {}\n", flag.what.replace('\n', "\n      "));
    }
    text += "\nExit status: 0 done, warnings included; 1 failed, everything undone; 2 wrong usage; 3 refused by policy or conflict.\n";
    if verb.is_none_or(|verb| verb == Verb::Doctor) {
        text += "doctor exits with 1 when it finds a problem.\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<(Globals, Action)> {
        parse(line.split_whitespace().map(OsString::from).collect())
    }

    fn error(line: &str) -> String {
        let error = read(line).expect_err(line);
        assert!(error.is::<crate::error::Usage>(), "{line}: exit status is not 2");
        error.to_string()
    }

    #[test]
    fn global_options_stand_before_or_after_the_verb() {
        for line in ["--state-dir /run/x status --json", "status --json --state-dir=/run/x"] {
            let (globals, action) = read(line).unwrap();
            assert_eq!(globals.state_dir, Some("/run/x".into()));
            assert!(matches!(action, Action::Status { name: None, json: true, watch: false }));
        }
    }

    #[test]
    fn the_verb_is_seen_through_wrong_arguments() {
        let verb = |line: &str| peek(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(verb("oci --nonsense"), Some(Verb::Oci));
        assert_eq!(verb("--config /x oci"), Some(Verb::Oci));
        assert_eq!(verb("--state-dir=/x oci --interface eth1=x"), Some(Verb::Oci));
        assert_eq!(verb("status oci"), Some(Verb::Status));
        assert_eq!(verb("apply --name oci x"), Some(Verb::Apply));
        assert_eq!(verb("oci --help"), None);
        assert_eq!(verb("oci -- -h"), Some(Verb::Oci));
        assert_eq!(verb("-- oci --help"), Some(Verb::Oci));
    }

    #[test]
    fn targets() {
        let target = |line: &str| match read(line).unwrap().1 {
            Action::Apply { target, .. } | Action::Release(target) => target,
            other => panic!("{other:?}"),
        };
        assert_eq!(target("apply web --interface eth1=backup"), Target::Known("web".into()));
        assert_eq!(target("release --pid 12"), Target::Pid(12));
        assert_eq!(target("apply --netns /run/netns/a"), Target::Netns("/run/netns/a".into()));
        assert!(error("apply").contains("name the container"));
        assert!(error("apply web --pid 12").contains("one TARGET"));
        assert!(error("release --pid 0").contains("not a process id"));
        assert!(error("release web --stale").contains("alone"));
        assert!(matches!(read("release --stale").unwrap().1, Action::ReleaseStale));
    }

    #[test]
    fn the_doctor_takes_a_target_or_the_host() {
        let doctor = |line: &str| match read(line).unwrap().1 {
            Action::Doctor { target, probe, json } => (target, probe, json),
            other => panic!("{other:?}"),
        };
        assert_eq!(doctor("doctor"), (None, None, false));
        assert_eq!(doctor("doctor --pid 12 --json"), (Some(Target::Pid(12)), None, true));
        let (target, probe, _) = doctor("doctor web --probe [2001:db8::1]:80");
        assert_eq!((target, probe), (Some(Target::Known("web".into())), Some("[2001:db8::1]:80".parse().unwrap())));
        // As the kernel lists it.
        let (_, probe, _) = doctor("doctor web --probe [::ffff:10.0.0.1]:80");
        assert_eq!(probe, Some("10.0.0.1:80".parse().unwrap()));
        for on_one_link in ["[fe80::1%2]:80", "[fe80::1]:80"] {
            assert!(error(&format!("doctor web --probe {on_one_link}")).contains("link-local"), "{on_one_link}");
        }
        assert!(error("doctor --probe 10.0.0.1:80").contains("name the container"));
        for wrong in ["10.0.0.1", "example.org:80", "10.0.0.1:99999", ":80"] {
            assert!(error(&format!("doctor web --probe {wrong}")).contains("ADDRESS:PORT"), "{wrong}");
        }
        assert!(error("doctor web other").contains("unexpected argument"));
        assert!(error("doctor web --pid 5").contains("one TARGET"));
        assert!(error("status --probe 10.0.0.1:80").contains("does not belong"));
    }

    #[test]
    fn lxc_takes_the_words_that_lxc_appends() {
        let Action::Lxc(wishes, words) = read("lxc --interface eth1=backup web lxc start-host").unwrap().1 else {
            panic!("not lxc")
        };
        assert_eq!((wishes.len(), words.len()), (1, 3));
        assert!(error("oci web").contains("unexpected argument"));
    }

    #[test]
    fn mistakes_name_what_was_meant() {
        assert!(error("aply x").contains("did you mean apply"));
        assert!(error("apply x --inteface eth1=backup").contains("--interface"));
        assert!(error("status --dry-run").contains("does not belong to status"));
        assert!(error("apply x --interface eth1").contains("NAME=FLAG"));
        assert!(error("apply x --interface").contains("needs a value"));
        assert!(error("oci --limit subflows=9").contains("0 to 8"));
        assert!(error("").contains("say what to do"));
    }

    #[test]
    fn what_is_not_built_never_pretends() {
        for word in NOT_BUILT {
            assert!(error(word).contains("not in this version yet"));
        }
        for line in ["status --prometheus", "oci --mptcp force"] {
            assert!(error(line).contains("not in this version yet"), "{line}");
        }
        assert!(read("oci --routes off --mptcp default --follow never").is_ok());
    }

    #[test]
    fn what_capture_takes() {
        let Action::Capture(capture) =
            read("capture web --dss --json --count 3 --duration 20 --write /tmp/x.pcap").unwrap().1
        else {
            panic!("not capture")
        };
        assert_eq!(capture.target, Target::Known("web".into()));
        assert_eq!((capture.json, capture.dss, capture.count), (true, true, Some(3)));
        assert_eq!((capture.duration, capture.write), (Some(Duration::from_secs(20)), Some("/tmp/x.pcap".into())));
        let Action::Capture(capture) = read("capture --pid 7").unwrap().1 else { panic!("not capture") };
        assert_eq!((capture.target, capture.count, capture.duration), (Target::Pid(7), None, None));
        assert!(error("capture").contains("name the container"));
        for value in ["0", "-1", "x", "1.5", "99999999999999999999"] {
            assert!(error(&format!("capture web --count {value}")).contains("from 1 on"), "{value}");
            assert!(error(&format!("capture web --duration {value}")).contains("from 1 on"), "{value}");
        }
        assert!(error("apply web --dss").contains("does not belong to apply"));
    }

    #[test]
    fn every_verb_has_help_with_an_example() {
        for verb in VERBS {
            let Action::Print(text) = read(&format!("{} --help", verb.name)).unwrap().1 else { panic!("no help") };
            assert!(text.contains("Example") && text.contains(verb.usage), "{text}");
        }
    }
}
