//! docs/kernels.md holds the table of versions; here it is written from the expectations and compared.

use std::path::Path;

use super::common::expectations::{
    BACKUP_BUG, BackupBug, ENDPOINTS_MAX, FLAGS, GUESTS, Guest, Kind, LIMIT_MAX, REFUSALS, RMEM_IN_NAMESPACES_SINCE,
    SYSCTLS, UNKNOWN_FLAG, USER_NAMESPACE_SINCE, Unknown, Version, accepted,
};

const BEGIN: &str = "<!-- tests/kernels/expectations.rs, as a table -->\n";
const END: &str = "<!-- end of the table -->\n";

/// A row: what it is about, and a cell for each guest.
fn row(what: &str, cell: impl Fn(&Guest) -> String) -> String {
    let cells: Vec<String> = GUESTS.iter().map(cell).collect();
    format!("| {what} | {} |\n", cells.join(" | "))
}

/// A row of an upstream kernel's; the others have a dash.
fn upstream_row(what: &str, cell: impl Fn(Version) -> String) -> String {
    row(what, |guest| if guest.kind == Kind::Upstream { cell(guest.version) } else { "-".into() })
}

fn since(version: Version) -> impl Fn(Version) -> String {
    move |running| if running >= version { "yes".into() } else { "no".into() }
}

fn dotted((major, minor): Version) -> String {
    format!("{major}.{minor}")
}

fn table() -> String {
    let mut table = row("", |guest| format!("{} ({})", dotted(guest.version), guest.debian));
    table += &format!("|---|{}\n", "---|".repeat(GUESTS.len()));
    table += &row("MPTCP", |guest| guest.kind.name().into());
    for flag in FLAGS {
        let what = format!("flag `{}` (since {})", flag.name, dotted(flag.since));
        table += &upstream_row(&what, since(flag.since));
    }
    table += &upstream_row("a flag it does not know", |version| {
        let word = |fate: Unknown| match fate {
            Unknown::Stored => "stored, inert",
            Unknown::Dropped => "dropped",
        };
        accepted(UNKNOWN_FLAG, version).into_iter().map(word).collect::<Vec<_>>().join(" or ")
    });
    for sysctl in SYSCTLS {
        let what = format!("`net.mptcp.{}` (since {})", sysctl.name, dotted(sysctl.since));
        table += &upstream_row(&what, since(sysctl.since));
    }
    for (what, list) in [("endpoints at most", ENDPOINTS_MAX), ("limits at most", LIMIT_MAX)] {
        table += &upstream_row(what, |version| {
            let numbers: Vec<String> = accepted(list, version).iter().map(u32::to_string).collect();
            numbers.join(" or ")
        });
    }
    for (_, what, errors) in REFUSALS {
        table += &upstream_row(&format!("refuses {what} with"), |version| {
            let errors: Vec<String> = accepted(errors, version).iter().map(|errno| format!("{errno:?}")).collect();
            errors.join(" or ")
        });
    }
    table += &upstream_row("what `doctor` names as its bug with backup paths", |version| {
        let word = |bug| match bug {
            BackupBug::Signal => "`signal` with `backup`".into(),
            BackupBug::SignalBefore(mended) => format!("`signal` with `backup` before {}.{mended}", dotted(version)),
            BackupBug::Sender => "the sender's own flag".into(),
            BackupBug::None => "none".into(),
        };
        accepted(BACKUP_BUG, version).into_iter().map(word).collect::<Vec<String>>().join(" or ")
    });
    let what = format!("root of a user namespace may (since {})", dotted(USER_NAMESPACE_SINCE));
    table += &upstream_row(&what, since(USER_NAMESPACE_SINCE));
    table += &row("`net.core.rmem_max` and its like are shown in containers", |guest| {
        since(RMEM_IN_NAMESPACES_SINCE)(guest.version)
    });
    table
}

#[test]
fn docs_kernels_md_is_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kernels.md");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let inside = text.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END)).map(|(inside, _)| inside);
    let table = table();
    assert_eq!(inside, Some(table.as_str()), "between the comments of docs/kernels.md has to stand:\n{table}");
}
