//! The per-container file, `/etc/mptcp-hook/containers.d/NAME.toml`: the administrator's wishes for one container.
//!
//! ```toml
//! on-conflict = "warn"
//! [match]                      # applies only to a container that has all of these annotations
//! "org.example.tier" = "web*"
//! [interfaces]
//! eth1 = "backup"
//! [limits]
//! subflows = 2
//! [sysctls]
//! "net.mptcp.scheduler" = "default"
//! [modules]
//! "mptcp_fullmesh.num_subflows" = 2
//! ```

use std::path::Path;

use super::toml_walk::{Document, Entry, entries};
use super::trusted;
use crate::request::pattern::glob;
use crate::request::{self, Follow, Rank, Routes, Source, What, Wish, unknown};

/// The longest name, in bytes, that is looked for; a file name's limit is 255.
const NAME_MAX: usize = 200;

/// A name by which a container's file is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name<'n> {
    /// The OCI id, the LXC name, or `--name` of the hook's arguments.
    Trusted(&'n str),
    /// What an annotation calls the container: its author could pick any file with it. A file found by it counts only
    /// if the file itself says by `[match]` which annotations it is for.
    FromAnnotation(&'n str),
}

/// What the files say.
#[derive(Debug, Default, PartialEq)]
pub struct Found {
    /// Wishes of [`Rank::ContainerFile`], each with its `PATH:LINE`. Two files of one container can disagree here;
    /// the request that they are added to says so.
    pub wishes: Vec<Wish>,
    /// For each file that is there and does not apply, one line that says why.
    pub notes: Vec<String>,
}

/// Reads the file of each name in `directory`; `annotation` gives the value of the container's annotation of that key.
/// The directory is not listed, so the cost does not grow with the number of files. Names that cannot be a file's name
/// are not looked for. `initial_user_namespace`: see [`trusted::read`].
///
/// What is wrong in a file, or with its owner and mode, is a wrong usage (exit 2); what cannot be read a failure.
pub fn load<'a>(
    directory: &Path,
    names: &[Name<'_>],
    annotation: impl Fn(&str) -> Option<&'a str>,
    initial_user_namespace: bool,
) -> anyhow::Result<Found> {
    let mut found = Found::default();
    for (i, name) in names.iter().enumerate() {
        let (text, trusted_name) = match *name {
            Name::Trusted(text) => (text, true),
            Name::FromAnnotation(text) => (text, false),
        };
        // One file counts once, and by its most trusted name.
        let seen = names[..i].contains(name) || !trusted_name && names.contains(&Name::Trusted(text));
        if seen || !is_file_name(text) {
            continue;
        }
        let path = directory.join(format!("{text}.toml"));
        if let Some(content) = trusted::read(&path, initial_user_namespace)? {
            match parse(&path, &content, trusted_name, &annotation)? {
                Ok(wishes) => found.wishes.extend(wishes),
                Err(note) => found.notes.push(note),
            }
        }
    }
    Ok(found)
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_MAX
        && !name.starts_with('.')
        && !name.chars().any(|c| c == '/' || c.is_control())
}

/// The file's wishes, or (the inner error) why it is not for this container; then the rest of it is not looked at.
pub(crate) fn parse<'a>(
    path: &Path,
    text: &str,
    trusted_name: bool,
    annotation: &impl Fn(&str) -> Option<&'a str>,
) -> anyhow::Result<Result<Vec<Wish>, String>> {
    let (mut document, root) = Document::parse(path, text)?;
    let entries = entries(&root);
    match entries.iter().find(|entry| entry.key == "match") {
        Some(table) => {
            if let Some(note) = mismatch(&mut document, table, annotation) {
                document.finish()?;
                return Ok(Err(note));
            }
        }
        None if !trusted_name => {
            return Ok(Err(format!(
                "{} does not apply: the container's name comes from an annotation, and the file has no [match]",
                path.display()
            )));
        }
        None => {}
    }
    let mut wishes = Vec::new();
    for entry in &entries {
        match option(&mut document, entry) {
            Some(Some(what)) => {
                wishes.push(Wish::new(what, Source::new(Rank::ContainerFile, document.place(entry.at))));
            }
            Some(None) => {}
            None => match document.wishes(entry, Rank::ContainerFile) {
                Some(more) => wishes.extend(more),
                None => {
                    let known = [
                        "match",
                        "interfaces",
                        "limits",
                        "sysctls",
                        "modules",
                        "on-conflict",
                        "name",
                        "routes",
                        "mptcp",
                        "follow",
                    ];
                    document.mistake(entry.at, unknown("key", &entry.key, known));
                }
            },
        }
    }
    document.finish()?;
    Ok(Ok(wishes))
}

/// What one of the options at the top of the file asks for; None if the entry is none of them. `[match]` asks for
/// nothing and was read before.
fn option(document: &mut Document, entry: &Entry<'_>) -> Option<Option<What>> {
    if let Some(option) = request::partly_built(entry.key.as_str()) {
        document.parsed(entry, &option.values(), |text| option.check(text));
        return Some(None);
    }
    match entry.key.as_str() {
        "match" => Some(None),
        "name" => Some(document.parsed(entry, "a string", request::name)),
        "on-conflict" => {
            Some(document.parsed(entry, "refuse, warn or override", |text| text.parse().map(What::OnConflict)))
        }
        "routes" => Some(document.parsed(entry, Routes::WORDS, |text| text.parse().map(What::Routes))),
        "follow" => Some(document.parsed(entry, Follow::WORDS, |text| text.parse().map(What::Follow))),
        _ => None,
    }
}

/// Why the `[match]` table does not hold for the container, or None if it holds.
fn mismatch<'a>(
    document: &mut Document,
    table: &Entry<'_>,
    annotation: &impl Fn(&str) -> Option<&'a str>,
) -> Option<String> {
    let conditions = document.dotted_entries(table);
    if conditions.is_empty() {
        // It would hold for everybody, also for whoever picks the file by an annotation.
        document.mistake(table.at, "match has no condition; write \"ANNOTATION\" = \"GLOB\", or leave [match] out");
    }
    let mut note = None;
    for condition in conditions {
        let Some(wanted) = document.scalar(&condition) else { continue };
        let key = condition.key.escape_debug();
        let place = document.place(condition.at);
        let why = match annotation(&condition.key) {
            Some(value) if glob(wanted.as_bytes(), value.as_bytes()) => continue,
            Some(value) => {
                format!("annotation {key} is \"{}\", not \"{}\"", value.escape_debug(), wanted.escape_debug())
            }
            None => format!("the container has no annotation {key}"),
        };
        note.get_or_insert(format!("{place} does not apply: {why}"));
    }
    note
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::super::trusted::testing::root_directory;
    use super::*;
    use crate::error::exit_status;
    use crate::request::Request;

    const EXAMPLE: &str = include_str!("../../examples/containers.d/web.toml");

    /// What `text` says for a container with these annotations, found by its id.
    fn read(text: &str, annotations: &[(&str, &str)]) -> Result<Result<Vec<String>, String>, String> {
        let annotations: BTreeMap<&str, &str> = annotations.iter().copied().collect();
        match parse(Path::new("web.toml"), text, true, &|key: &str| annotations.get(key).copied()) {
            Ok(Ok(wishes)) => Ok(Ok(wishes
                .iter()
                .map(|wish| {
                    assert_eq!(wish.source.rank, Rank::ContainerFile);
                    format!("{} {}", wish.source, wish.what.value())
                })
                .collect())),
            Ok(Err(note)) => Ok(Err(note)),
            Err(e) => {
                assert_eq!(exit_status(&e), 2);
                Err(e.to_string())
            }
        }
    }

    #[test]
    fn everything_is_read() {
        let text = "on-conflict = \"warn\"\nname = \"shop\"\nroutes = \"off\"\nmptcp = \"default\"\nfollow = \"never\"\n\
                    [interfaces]\neth1 = \"backup\"\n[limits]\nsubflows = 3\n[sysctls]\nnet.mptcp.enabled = 1\n\
                    [modules]\n\"mptcp_rr.num_segments\" = 2\n";
        assert_eq!(
            read(text, &[]).unwrap().unwrap(),
            [
                "web.toml:1 warn",
                "web.toml:2 shop",
                "web.toml:3 off",
                "web.toml:5 never",
                "web.toml:7 subflow,backup",
                "web.toml:9 3",
                "web.toml:11 1",
                "web.toml:13 2",
            ]
        );
    }

    #[test]
    fn mistakes_have_their_line_and_the_nearest_key() {
        for (text, expected) in [
            ("\n[interface]\neth1 = \"backup\"", "web.toml:2: unknown key \"interface\"; did you mean interfaces?"),
            ("on_conflict = \"warn\"", "web.toml:1: unknown key \"on_conflict\"; did you mean on-conflict?"),
            ("\nroutes = true", "web.toml:2: routes is true or false; write auto or off"),
            ("mptcp = \"forced\"", "web.toml:1: mptcp=\"forced\" is not one of default, off, force"),
            ("follow = true", "web.toml:1: follow is true or false; write auto, always or never"),
            ("name = \"a/b\"", "web.toml:1: name \"a/b\" is empty, too long, or has a / or control character"),
            ("[match]\n", "web.toml:1: match has no condition; write \"ANNOTATION\" = \"GLOB\", or leave [match] out"),
            ("[match]\n\"a\" = [\"b\"]", "web.toml:2: a is a list; write one string or whole number"),
            (
                "[limits]\nsubflows = 9",
                "web.toml:2: limit subflows=\"9\" is not a number from 0 to 8 (the kernel's maximum)",
            ),
        ] {
            assert_eq!(read(text, &[("a", "b")]).unwrap_err(), expected);
        }
    }

    #[test]
    fn all_conditions_must_hold() {
        let text = "[match]\n\"org.example/tier\" = \"web*\"\nio.example.zone = 1\n[interfaces]\neth1 = \"backup\"\n";
        let tier = ("org.example/tier", "web-1");
        assert_eq!(read(text, &[tier, ("io.example.zone", "1")]).unwrap().unwrap().len(), 1);
        assert_eq!(
            read(text, &[tier]).unwrap().unwrap_err(),
            "web.toml:3 does not apply: the container has no annotation io.example.zone"
        );
        assert_eq!(
            read(text, &[("org.example/tier", "db"), ("io.example.zone", "1")]).unwrap().unwrap_err(),
            "web.toml:2 does not apply: annotation org.example/tier is \"db\", not \"web*\""
        );
        // An empty value is not a missing one.
        assert!(read("[match]\nx = \"*\"", &[("x", "")]).unwrap().is_ok());
        assert!(read("[match]\nx = \"*\"", &[]).unwrap().is_err());
    }

    fn write(directory: &Path, name: &str, text: &str) {
        fs::write(directory.join(format!("{name}.toml")), text).unwrap();
    }

    #[test]
    fn a_name_from_an_annotation_opens_only_a_file_that_matches_by_itself() {
        let dir = root_directory();
        let load = |names: &[Name<'_>]| {
            load(dir.path(), names, |key| (key == "tier").then_some("web"), true).expect("no mistake")
        };
        write(dir.path(), "web", "[interfaces]\neth1 = \"backup\"\n");
        assert_eq!(load(&[Name::Trusted("web")]).wishes.len(), 1);
        let refused = load(&[Name::FromAnnotation("web")]);
        assert!(refused.wishes.is_empty());
        assert!(refused.notes[0].contains("web.toml does not apply") && refused.notes[0].contains("[match]"));

        write(dir.path(), "web", "[match]\ntier = \"web\"\n[interfaces]\neth1 = \"backup\"\n");
        assert_eq!(load(&[Name::FromAnnotation("web")]).wishes.len(), 1);
        write(dir.path(), "web", "[match]\ntier = \"db\"\n[interfaces]\neth1 = \"backup\"\n");
        assert!(load(&[Name::FromAnnotation("web")]).wishes.is_empty());
        assert!(load(&[Name::Trusted("web")]).wishes.is_empty());

        // The same name from both sides is trusted, and counts once, in either order.
        write(dir.path(), "web", "[interfaces]\neth1 = \"backup\"\n");
        let (trusted, annotated) = (Name::Trusted("web"), Name::FromAnnotation("web"));
        for names in [[trusted, annotated], [annotated, trusted], [trusted, trusted]] {
            let found = load(&names);
            assert_eq!((found.wishes.len(), found.notes.len()), (1, 0), "{names:?}");
        }
    }

    #[test]
    fn two_files_both_count_and_must_agree() {
        let dir = root_directory();
        let load = || load(dir.path(), &[Name::Trusted("0123abc"), Name::Trusted("web")], |_| None, true).unwrap();
        write(dir.path(), "0123abc", "[interfaces]\neth1 = \"backup\"\n");
        assert_eq!(load().wishes.len(), 1);
        write(dir.path(), "web", "\n[interfaces]\neth2 = \"off\"\n");
        assert!(Request::default().extend(load().wishes).is_ok());
        write(dir.path(), "web", "\n[interfaces]\neth1 = \"off\"\n");
        let error = Request::default().extend(load().wishes).unwrap_err().to_string();
        assert!(error.contains("0123abc.toml:2") && error.contains("web.toml:3"), "{error}");
    }

    #[test]
    fn names_that_cannot_be_a_files_are_never_opened() {
        let dir = root_directory();
        let inner = dir.path().join("containers.d");
        fs::create_dir(&inner).unwrap();
        let text = "[interfaces]\neth1 = \"backup\"\n";
        write(dir.path(), "secret", text);
        write(&inner, "", text);
        write(&inner, ".hidden", text);
        write(&inner, "new\nline", text);
        let long = "x".repeat(NAME_MAX + 1);
        write(&inner, &long, text);
        let absolute = dir.path().join("secret");
        for name in [
            "",
            ".",
            "..",
            ".hidden",
            "../secret",
            "x/../../secret",
            absolute.to_str().unwrap(),
            "new\nline",
            "a\0b",
            &long,
        ] {
            let found = load(&inner, &[Name::Trusted(name)], |_| None, true).unwrap();
            assert_eq!(found, Found::default(), "{name:?}");
        }
        let longest = "x".repeat(NAME_MAX);
        write(&inner, &longest, text);
        assert_eq!(load(&inner, &[Name::Trusted(&longest)], |_| None, true).unwrap().wishes.len(), 1);
    }

    #[test]
    fn a_file_or_directory_that_others_can_write_is_refused() {
        let dir = root_directory();
        let load = || load(dir.path(), &[Name::Trusted("web")], |_| None, true);
        assert_eq!(load().unwrap(), Found::default());
        write(dir.path(), "web", "");
        assert!(load().is_ok());
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = load().unwrap_err();
        assert_eq!(exit_status(&error), 2);
        assert!(error.to_string().contains("chmod go-w"), "{error}");
    }

    #[test]
    fn the_shipped_example_is_read() {
        let wishes = read(EXAMPLE, &[("org.example.tier", "web")]).unwrap().unwrap();
        assert!(wishes.iter().any(|wish| wish.ends_with("subflow,backup")), "{wishes:?}");
        // `# ` begins a sentence, `#` alone a line to be switched on.
        let switch = |line: &str| match line.strip_prefix('#') {
            Some(code) if !code.is_empty() && !code.starts_with(' ') => code.to_string(),
            _ => line.to_string(),
        };
        let switched_on: String = EXAMPLE.lines().map(|line| switch(line) + "\n").collect();
        assert!(read(&switched_on, &[("org.example.tier", "web-1")]).unwrap().unwrap().len() > wishes.len());
        assert!(read(&switched_on, &[("org.example.tier", "db")]).unwrap().is_err());
    }
}
