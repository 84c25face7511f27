//! Plain files, written whole or not at all.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::plain;
use crate::kernel::netns::in_initial_user_namespace;

/// The largest file of ours, in bytes. What is larger is not written: it could not be read again.
const SIZE_MAX: u64 = 1024 * 1024;

/// The mode bits that open a file to others.
const OTHERS: u32 = 0o077;

/// Those by which they could change it.
const OTHERS_WRITE: u32 = 0o022;

/// How a file of [`super::record::VERSION`] begins.
const THIS_VERSION: &str = "{\"version\":1,";

/// The prefix of a file that is being written. A crash leaves it behind; it is never read.
pub const TEMPORARY: &str = ".tmp-";

/// Why a file of ours cannot be taken at its word.
#[derive(Debug)]
pub enum Fault {
    /// It is not what this program writes.
    Damaged(String),
    /// A newer version of this program wrote it.
    Newer(String),
    /// Somebody else may have written it.
    NotOurs(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Damaged(text) | Self::Newer(text) | Self::NotOurs(text)) = self;
        f.write_str(text)
    }
}

impl std::error::Error for Fault {}

impl Fault {
    fn damaged(path: &Path, why: impl fmt::Display) -> anyhow::Error {
        let why = plain(why);
        let text = format!("the ledger's file {} is damaged ({why}); run mptcp-hook repair", path.display());
        Self::Damaged(text).into()
    }

    /// Whether the file can be read, but only by a newer version.
    pub fn is_newer(error: &anyhow::Error) -> bool {
        matches!(error.downcast_ref(), Some(Self::Newer(_)))
    }

    /// Whether there is nothing to be read in the file, by anybody.
    pub fn is_damaged(error: &anyhow::Error) -> bool {
        matches!(error.downcast_ref(), Some(Self::Damaged(_)))
    }
}

/// Writes `value` to `path`: to a temporary file beside it, renamed. /run is memory, so nothing is synced to disk.
pub fn write<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec(value)?;
    let attempt = || format!("cannot write {}", path.display());
    if text.len() as u64 > SIZE_MAX {
        bail!("{}: {} bytes are more than the {SIZE_MAX} that a file of the ledger may have", attempt(), text.len());
    }
    write_bytes(path, &text).with_context(attempt)
}

fn write_bytes(path: &Path, bytes: &[u8]) -> io::Result<()> {
    #[cfg(test)]
    crate::kernel::fake::kill_point();
    let temporary = temporary(path)?;
    let create =
        || OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&temporary);
    let mut file = match create() {
        // A process with our pid was killed here.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            std::fs::remove_file(&temporary)?;
            create()?
        }
        other => other?,
    };
    #[cfg(test)]
    crate::kernel::fake::kill_point();
    let result = file.write_all(bytes).and_then(|()| std::fs::rename(&temporary, path));
    if result.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    result
}

fn temporary(path: &Path) -> io::Result<PathBuf> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // Short, because the name itself may be as long as the file system allows.
    let tail: String = name.to_string_lossy().chars().rev().take(32).collect();
    Ok(parent.join(format!("{TEMPORARY}{}-{tail}", std::process::id())))
}

/// Reads a file of ours; None if it is not there. A [`Fault`] says that it cannot be taken at its word: its content, or
/// that others could have written it.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    parse_file(open(path), || path.into(), |metadata| not_ours(metadata, OTHERS_WRITE, me()))
}

/// Reads a file to show what it says, whoever may have written it, and what is wrong with it.
pub fn read_to_show<T: DeserializeOwned>(path: &Path) -> (Option<T>, Option<anyhow::Error>) {
    to_show(me(), || open(path), || path.into())
}

fn to_show<T: DeserializeOwned>(
    me: u32,
    open: impl Fn() -> io::Result<File>,
    path: impl Fn() -> PathBuf,
) -> (Option<T>, Option<anyhow::Error>) {
    match parse_file(open(), &path, |metadata| not_ours(metadata, OTHERS, me)) {
        Ok(content) => (content, None),
        Err(error) if matches!(error.downcast_ref(), Some(Fault::NotOurs(_))) => {
            match parse_file(open(), path, |_| None) {
                Ok(content) => (content, Some(error)),
                Err(worse) => (None, Some(worse)),
            }
        }
        Err(error) => (None, Some(error)),
    }
}

/// Nothing that lies in a file's place leads elsewhere or makes the caller wait.
const CAREFULLY: i32 = libc::O_NOFOLLOW | libc::O_NONBLOCK;

/// Opens a file of the ledger for reading.
pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(CAREFULLY).open(path)
}

/// A directory in which thousands of files are opened: the kernel does not look for their directory each time, and is asked
/// once who we are.
pub struct Directory {
    file: File,
    path: PathBuf,
    me: u32,
}

impl Directory {
    /// Opens it; None if it is not there.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        match OpenOptions::new().read(true).custom_flags(CAREFULLY | libc::O_DIRECTORY).open(path) {
            Ok(file) => Ok(Some(Self { file, path: path.into(), me: me() })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot open {}", path.display())),
        }
    }

    /// As the function of that name.
    pub fn read_to_show<T: DeserializeOwned>(&self, name: &str) -> (Option<T>, Option<anyhow::Error>) {
        let flags = OFlag::from_bits_retain(CAREFULLY) | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        to_show(self.me, || Ok(openat(&self.file, name, flags, Mode::empty())?.into()), || self.path.join(name))
    }
}

fn parse_file<T: DeserializeOwned>(
    opened: io::Result<File>,
    path: impl Fn() -> PathBuf,
    wrong: impl Fn(&Metadata) -> Option<String>,
) -> Result<Option<T>> {
    let attempt = || format!("cannot read the ledger's file {}", path().display());
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if is_of_another_kind(&error) => return Err(Fault::damaged(&path(), error)),
        Err(error) => return Err(error).with_context(attempt),
    };
    let metadata = file.metadata().with_context(attempt)?;
    if !metadata.is_file() {
        return Err(Fault::damaged(&path(), "it is not a plain file"));
    }
    if let Some(wrong) = wrong(&metadata) {
        return Err(
            Fault::NotOurs(format!("the ledger's file {} {wrong}; run mptcp-hook repair", path().display())).into()
        );
    }
    // It is never written in place, so that this is its length: one read.
    let mut text = vec![0; metadata.len().min(SIZE_MAX) as usize];
    match file.read_exact(&mut text) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Fault::damaged(&path(), error)),
        other => other.with_context(attempt)?,
    }
    let text = std::str::from_utf8(&text).map_err(|e| Fault::damaged(&path(), e))?;
    // Nearly always; a field that stands twice is an error below.
    if text.starts_with(THIS_VERSION) {
        return serde_json::from_str(text).map(Some).map_err(|e| Fault::damaged(&path(), e));
    }
    // Look at the version first: a newer file may have any form.
    #[derive(serde::Deserialize)]
    struct Version {
        version: Option<u32>,
    }
    let known = super::record::VERSION;
    match serde_json::from_str(text) {
        Ok(Version { version: Some(version) }) if version > known => {
            let path = path();
            let path = path.display();
            let text = format!(
                "the ledger's file {path} has version {version} and this program knows {known}; use the newer mptcp-hook"
            );
            return Err(Fault::Newer(text).into());
        }
        Ok(Version { version: Some(version) }) if version < known => {
            return Err(Fault::damaged(
                &path(),
                format_args!("it has version {version}; {known} is the oldest there is"),
            ));
        }
        _ => {}
    }
    serde_json::from_str(text).map(Some).map_err(|e| Fault::damaged(&path(), e))
}

/// A link, a directory, a socket: no plain file of ours.
fn is_of_another_kind(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ELOOP | libc::EISDIR | libc::ENOTDIR | libc::ENXIO))
}

/// Removes a file; that it is gone already is fine.
pub fn remove(path: &Path) -> Result<()> {
    #[cfg(test)]
    crate::kernel::fake::kill_point();
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Makes a directory of ours; that it is there already is fine.
pub fn make_directory(path: &Path) -> Result<()> {
    #[cfg(test)]
    crate::kernel::fake::kill_point();
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make the directory {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The names in a directory, sorted, temporary files left out. A directory that is not there is empty.
pub fn names(path: &Path) -> Result<Vec<String>> {
    let mut names = each_name(path)?.collect::<Result<Vec<String>>>()?;
    names.sort_unstable();
    Ok(names)
}

/// The same one by one, in no order.
pub fn each_name(path: &Path) -> Result<impl Iterator<Item = Result<String>>> {
    let attempt = || format!("cannot list {}", path.display());
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(attempt),
    };
    Ok(entries.into_iter().flatten().filter_map(move |entry| match entry.with_context(attempt) {
        Ok(entry) => entry.file_name().into_string().ok().filter(|name| !name.starts_with(TEMPORARY)).map(Ok),
        Err(error) => Some(Err(error)),
    }))
}

/// How many damaged files are kept.
const ASIDE_MAX: usize = 64;

/// Moves what is damaged out of the way, into `damaged/`, under a name that tells where it was. Returns what to say
/// about it. Of very many the oldest is dropped, which is said as well.
pub fn move_aside(state: &Path, path: &Path) -> Result<String> {
    let directory = state.join("damaged");
    make_directory(&directory)?;
    let mut kept = Vec::new();
    for name in names(&directory)? {
        let path = directory.join(name);
        kept.extend(std::fs::symlink_metadata(&path).and_then(|meta| meta.modified()).map(|time| (time, path)));
    }
    kept.sort();
    let mut dropped = String::new();
    if kept.len() >= ASIDE_MAX {
        let oldest = &kept[0].1;
        let gone = if oldest.is_dir() && !oldest.is_symlink() {
            std::fs::remove_dir_all(oldest)
        } else {
            std::fs::remove_file(oldest)
        };
        gone.with_context(|| format!("cannot remove {}", oldest.display()))?;
        dropped = format!(" (of {ASIDE_MAX} there the oldest, {}, was dropped)", oldest.display());
    }
    // A name may be as long as the file system allows; the end tells more than the beginning.
    let was: String = path.strip_prefix(state).unwrap_or(path).to_string_lossy().replace('/', "~");
    let skip = was.chars().count().saturating_sub(128);
    let was: String = was.chars().skip(skip).collect();
    let mut to = directory.join(&was);
    for number in 1.. {
        if std::fs::symlink_metadata(&to).is_err() {
            break;
        }
        to = directory.join(format!("{was}.{number}"));
    }
    std::fs::rename(path, &to).with_context(|| format!("cannot move {} to {}", path.display(), to.display()))?;
    Ok(format!("moved to {}{dropped}", to.display()))
}

/// What is wrong with a file's owner or mode.
pub fn wrong_owner(metadata: &Metadata) -> Option<String> {
    not_ours(metadata, OTHERS, me())
}

/// Who we are. In a user namespace that was entered meanwhile, both we and the files have other numbers.
fn me() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// What is wrong with a file's owner, or with its mode if that has one of the bits `open`.
fn not_ours(metadata: &Metadata, open: u32, me: u32) -> Option<String> {
    if metadata.uid() != me {
        return Some(format!("belongs to uid {} and not to uid {me}", metadata.uid()));
    }
    let is_open = !metadata.is_symlink() && metadata.mode() & open != 0;
    is_open.then(|| format!("is open to others (mode {:o})", metadata.mode() & 0o7777))
}

/// Makes a file or a directory ours alone. Somebody else's file is replaced by a copy, which takes no capability.
pub fn take_back(path: &Path) -> Result<()> {
    let attempt = || format!("cannot take {} back", path.display());
    let metadata = std::fs::symlink_metadata(path).with_context(attempt)?;
    if metadata.uid() == me() {
        let mode = if metadata.is_dir() { 0o700 } else { 0o600 };
        return std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).with_context(attempt);
    }
    if !metadata.is_file() || metadata.len() > SIZE_MAX {
        bail!("{}: chown it", attempt());
    }
    std::fs::read(path).and_then(|bytes| write_bytes(path, &bytes)).with_context(attempt)
}

/// The temporary files in a directory, and for how long each has been there.
pub fn temporaries(directory: &Path) -> Result<Vec<(PathBuf, Duration)>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", directory.display())),
    };
    let temporary = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(TEMPORARY.as_bytes()));
    // One that is gone by now was somebody's at work.
    let with_age = temporary.filter_map(|entry| {
        let age = SystemTime::now().duration_since(entry.metadata().ok()?.modified().ok()?).unwrap_or_default();
        Some((entry.path(), age))
    });
    Ok(with_age.collect())
}

/// Checks that a state directory is safe to use: ours, closed to others, reached by no symbolic link, and below
/// directories in which nobody else can replace it. False if it is not there.
pub fn check_state_directory(path: &Path) -> Result<bool> {
    if !path.is_absolute() {
        bail!("the state directory {} must be an absolute path", path.display());
    }
    let me = nix::unistd::geteuid().as_raw();
    for ancestor in path.ancestors() {
        let metadata = match std::fs::symlink_metadata(ancestor) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound && ancestor == path => return Ok(false),
            Err(error) => return Err(error).with_context(|| format!("cannot look at {}", ancestor.display())),
        };
        let shown = ancestor.display();
        if metadata.is_symlink() {
            bail!(
                "the state directory {} is reached by the symbolic link {shown}; name the real directory",
                path.display()
            );
        }
        if !metadata.is_dir() {
            bail!("{shown} is not a directory; the ledger is kept in {}", path.display());
        }
        if ancestor == path {
            if metadata.uid() != me {
                bail!(
                    "the state directory {shown} belongs to uid {} and not to uid {me}; remove it or chown it",
                    metadata.uid()
                );
            }
            if metadata.mode() & 0o077 != 0 {
                bail!(
                    "the state directory {shown} is open to others (mode {:o}); chmod 0700 it",
                    metadata.mode() & 0o7777
                );
            }
            continue;
        }
        if metadata.mode() & 0o022 != 0 && metadata.mode() & 0o1000 == 0 {
            bail!(
                "{shown}, above the state directory, can be written by others (mode {:o}); chmod go-w it or use another",
                metadata.mode() & 0o7777
            );
        }
        // In a user namespace the host's root is nobody we know.
        let is_safe = [me, 0].contains(&metadata.uid()) || !in_initial_user_namespace();
        if !is_safe {
            bail!(
                "{shown}, above the state directory, belongs to uid {}, who could put another in its place; chown it or use another",
                metadata.uid()
            );
        }
    }
    Ok(true)
}

/// Whether the last line of a file is whole: a disk that was full may have cut it short.
pub fn ends_with_line(file: &File) -> io::Result<bool> {
    let Some(last) = file.metadata()?.len().checked_sub(1) else { return Ok(true) };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte == *b"\n")
}

/// Opens a file to append to, for its owner alone.
pub fn open_to_append(path: &Path) -> Result<File> {
    #[cfg(test)]
    crate::kernel::fake::kill_point();
    let attempt = || format!("cannot open {}", path.display());
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .with_context(attempt)?;
    if !file.metadata().with_context(attempt)?.is_file() {
        return Err(Fault::damaged(path, "it is not a plain file"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_begin_with_their_version() {
        let text = format!("{{\"version\":{},", super::super::record::VERSION);
        assert_eq!(text, THIS_VERSION);
    }
}
