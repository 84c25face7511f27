//! What the hook adds to a container's start: whole processes, from start to end, beside an empty one and beside a shell
//! script that does the same work. Prints one table. Needs root; run it by `benches/run`, which builds what is needed.
//!
//! Everything happens in mount, network, pid and ipc namespaces of its own and is gone with them. The rows take turns
//! sample by sample, so that whatever else the machine does falls on all of them alike.

mod ledger;
mod process;
mod world;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use world::{Container, HOST_SYSCTL};

/// Samples per row; fewer only if that takes longer than [`TIME_MAX`].
const ROUNDS: usize = 200;

/// Rounds that are not counted: caches become warm, results are checked.
const WARM_UP: usize = 3;

/// The longest that the measuring may take.
const TIME_MAX: Duration = Duration::from_secs(90);

/// Containers in the full ledger, and in the fullest.
const MANY: u64 = 10_000;
const MOST: u64 = 100_000;

/// Samples of each `status`, which takes a hundred times as long as a hook.
const STATUS_ROUNDS: usize = 20;

/// One thing measured.
struct Row {
    name: &'static str,
    times: Vec<Duration>,
    processor: Vec<Duration>,
}

impl Row {
    fn quantile(&self, part: f64) -> f64 {
        quantile(&self.times, part)
    }

    fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

/// In milliseconds.
fn quantile(times: &[Duration], part: f64) -> f64 {
    let mut times = times.to_vec();
    times.sort_unstable();
    let index = ((times.len() - 1) as f64 * part).round() as usize;
    times[index].as_secs_f64() * 1000.0
}

/// The rows, in the table's order.
#[derive(Clone, Copy)]
enum Which {
    Empty,
    Drain,
    Nothing,
    Apply,
    ApplyMany,
    ApplyMost,
    Again,
    AgainMany,
    AgainMost,
    Gone,
    GoneMany,
    GoneMost,
    ByHand,
    Script,
    StatusNone,
    StatusLive,
    StatusLiveJson,
    StatusDead,
    StatusDeadJson,
}

const NAMES: [&str; 19] = [
    "empty static process",
    "static process that drains standard input",
    "hook, the container asks for nothing",
    "hook, full apply, 0 containers in the ledger",
    "hook, full apply, 10,000 containers in the ledger",
    "hook, full apply, 100,000 containers in the ledger",
    "hook, the same apply again, 0 containers",
    "hook, the same apply again, 10,000 containers",
    "hook, the same apply again, 100,000 containers",
    "hook, release after the container's end, 0 containers",
    "hook, release after the container's end, 10,000 containers",
    "hook, release after the container's end, 100,000 containers",
    "release by hand of a running container",
    "shell script, the same full apply",
    "status, 0 containers",
    "status, 10,000 containers that live in one namespace",
    "status --json, the same",
    "status, 10,000 containers that are dead",
    "status --json, the same",
];

struct Bench {
    rows: [Row; NAMES.len()],
    hook: PathBuf,
    /// The host's value of [`HOST_SYSCTL`], which all containers share.
    shared: String,
}

impl Bench {
    fn time(&mut self, which: Which, program: &Path, arguments: &[String], input: &[u8]) -> u64 {
        let run = process::run(program, arguments, input);
        self.rows[which as usize].times.push(run.time);
        self.rows[which as usize].processor.push(run.processor);
        run.peak
    }

    fn oci(&self, ledger: &Path) -> Vec<String> {
        let wish = format!("{}={}", HOST_SYSCTL.replace('/', "."), self.shared);
        ["oci", "--state-dir", &ledger.display().to_string(), "--sysctl", &wish].map(String::from).into()
    }

    fn median(&self, which: Which) -> f64 {
        self.rows[which as usize].median()
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let inside = arguments.iter().any(|argument| argument == "inside");
    if !inside && !arguments.iter().any(|argument| argument == "--bench") {
        // `cargo test --all-targets` starts benchmarks, too.
        println!("nothing is measured; use benches/run");
        return;
    }
    let path = |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name}: use benches/run")));
    let hook = path("BENCH_HOOK");
    let (empty, drain, script) = (path("BENCH_EMPTY"), path("BENCH_DRAIN"), path("BENCH_SCRIPT"));
    if !inside {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--net", "--pid", "--ipc", "--propagation=private", "--mount-proc"]);
        unshare.args(["--fork", "--kill-child", "--"]).arg(std::env::current_exe().expect("the program's own path"));
        panic!("cannot run unshare: {}", unshare.arg("inside").exec());
    }

    let journal = world::prepare();
    let mut container = Container::new("c", 1, &drain);
    let others = Container::new("o", 2, &drain);
    let shared = std::fs::read_to_string(format!("/proc/sys/{HOST_SYSCTL}")).expect("a host-wide sysctl");
    let mut bench = Bench {
        rows: NAMES.map(|name| Row { name, times: Vec::new(), processor: Vec::new() }),
        hook: hook.clone(),
        shared: shared.trim().into(),
    };
    let (none, many) = (world::state_directory("/run/none"), world::state_directory("/run/many"));
    let (most, dead) = (world::state_directory("/run/most"), world::state_directory("/run/dead"));
    let (for_none, for_many, for_most) = (bench.oci(&none), bench.oci(&many), bench.oci(&most));
    let for_script = vec!["/run/script".into(), format!("{HOST_SYSCTL}={}", bench.shared)];
    let by_hand = |ledger: &Path, id: String| {
        ["release", "--state-dir", &ledger.display().to_string(), &id].map(String::from).to_vec()
    };

    // The first apply is copied to fill a ledger; a later one into a full ledger tells the peak memory.
    for (ledger, count, pid) in
        [(&many, MANY, Some(others.pid())), (&most, MOST, Some(others.pid())), (&dead, MANY, None)]
    {
        process::output(&hook, &bench.oci(ledger), &others.state());
        others.check("the first apply");
        assert_eq!(world::empty_journal(&journal), 1, "the hook's message in the journal");
        ledger::fill(ledger, count, pid);
        process::run(&hook, &by_hand(ledger, others.id()), b"");
        world::empty_journal(&journal);
    }
    process::forget_peak();
    let peak = process::run(&hook, &for_many, &container.state()).peak;
    process::run(&hook, &by_hand(&many, container.id()), b"");

    let begin = Instant::now();
    let mut rounds = 0;
    for round in 0..WARM_UP + ROUNDS {
        if round == WARM_UP {
            bench.rows.iter_mut().for_each(|row| row.times.clear());
        }
        if begin.elapsed() > TIME_MAX {
            break;
        }
        let first = round == 0;
        bench.time(Which::Empty, &empty, &[], b"");
        bench.time(Which::Drain, &drain, &[], &container.state());
        bench.time(Which::Nothing, &hook, &for_none[..3], &container.state_without_wishes());
        let mut ledgers = [
            (&for_none, Which::Apply, Which::Again, Which::Gone),
            (&for_many, Which::ApplyMany, Which::AgainMany, Which::GoneMany),
            (&for_most, Which::ApplyMost, Which::AgainMost, Which::GoneMost),
        ];
        // What ran just before counts (caches); none of them may always come first.
        ledgers.rotate_left(round % 3);
        for (arguments, apply, again, gone) in ledgers {
            bench.time(apply, &hook, arguments, &container.state());
            bench.time(again, &hook, arguments, &container.state());
            if first {
                container.check(NAMES[apply as usize]);
            }
            container.stop();
            bench.time(gone, &hook, arguments, &container.stopped_state());
            container.restart();
            container.reset();
        }
        process::run(&hook, &for_none, &container.state());
        bench.time(Which::ByHand, &hook, &by_hand(&none, container.id()), b"");
        bench.time(Which::Script, &script, &for_script, &container.state());
        if first {
            container.check(NAMES[Which::Script as usize]);
        }
        container.reset();
        std::fs::remove_dir_all("/run/script").expect("removing the script's records");
        world::empty_journal(&journal);
        rounds = round + 1;
    }
    // What the ten thousand living containers asked for is in force.
    process::run(&hook, &bench.oci(&world::state_directory("/run/others")), &others.state());
    // After the others: one `status` goes through more memory than the processor's caches hold.
    for round in 0..=STATUS_ROUNDS {
        for (ledger, text, json) in [
            (&none, Which::StatusNone, None),
            (&many, Which::StatusLive, Some(Which::StatusLiveJson)),
            (&dead, Which::StatusDead, Some(Which::StatusDeadJson)),
        ] {
            let arguments = ["status", "--state-dir", &ledger.display().to_string()].map(String::from).to_vec();
            let as_json = [&arguments[..], &["--json".into()]].concat();
            if let (0, Some(_)) = (round, json) {
                let shown = process::output(&hook, &as_json, b"");
                let shown: serde_json::Value = serde_json::from_str(&shown).expect("what status shows");
                let containers = shown["containers"].as_array().expect("containers");
                assert_eq!(containers.len() as u64, MANY, "containers in status");
                let live = containers.iter().filter(|container| container["live"] == true).count() as u64;
                assert_eq!(live, if *ledger == dead { 0 } else { MANY }, "living containers in status");
                let interfaces =
                    containers.iter().flat_map(|container| container["interfaces"].as_array().expect("a list"));
                assert!(interfaces.into_iter().all(|interface| interface["state"] == "applied"), "a state in status");
                assert_eq!(shown["problems"], serde_json::json!([]));
            }
            if round > 0 {
                bench.time(text, &hook, &arguments, b"");
                json.map(|json| bench.time(json, &hook, &as_json, b""));
            }
        }
    }
    report(&bench, rounds.saturating_sub(WARM_UP), peak);
}

fn report(bench: &Bench, rounds: usize, peak: u64) {
    let (empty, apply) = (bench.median(Which::Empty), bench.median(Which::Apply));
    println!("{rounds} samples of each, taking turns; of status {STATUS_ROUNDS}\n");
    println!("| whole process | median ms | p95 ms | times empty | times full apply |");
    println!("|---|---:|---:|---:|---:|");
    for row in &bench.rows {
        let median = row.median();
        println!(
            "| {} | {median:.2} | {:.2} | {:.1} | {:.2} |",
            row.name,
            row.quantile(0.95),
            median / empty,
            median / apply
        );
    }
    let size = std::fs::metadata(&bench.hook).expect("the hook's program").len() as f64 / 1e6;
    println!("\nprogram: {size:.2} MB; peak memory of a full apply: at most {:.2} MB\n", peak as f64 * 1024.0 / 1e6);
    let aim = |what: &str, value: f64, reached: bool| {
        println!("{} {what}: {value:.2}", if reached { "reached:" } else { "MISSED: " });
    };
    let value = apply / empty;
    aim("full apply at most 3 times the empty process", value, value <= 3.0);
    let value = bench.median(Which::Script) / apply;
    aim("full apply at least 20 times faster than the script", value, value >= 20.0);
    let value = bench.median(Which::ApplyMany) / apply;
    aim("10,000 containers at most 1.2 times none", value, value <= 1.2);
    let value = bench.median(Which::ApplyMost) / apply;
    aim("100,000 containers at most 1.2 times none", value, value <= 1.2);
    for which in [Which::StatusLive, Which::StatusLiveJson, Which::StatusDead, Which::StatusDeadJson] {
        let value = bench.median(which);
        let processor = quantile(&bench.rows[which as usize].processor, 0.5);
        let what = format!("{} under 200 ms (it takes {processor:.0} ms of processors' time)", NAMES[which as usize]);
        aim(&what, value, value < 200.0);
    }
    aim("program under 3 MB", size, size < 3.0);
    let value = peak as f64 * 1024.0 / 1e6;
    aim("peak memory under 4 MB", value, value < 4.0);
}
