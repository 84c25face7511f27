//! Plain files, written whole or not at all.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::kernel::netns::in_initial_user_namespace;

/// No file of ours is near this.
const READ_MAX: u64 = 1024 * 1024;

/// The prefix of a file that is being written. A crash leaves it behind; it is never read.
pub const TEMPORARY: &str = ".tmp-";

/// Writes `value` to `path`: to a temporary file beside it, renamed. /run is memory, so nothing is synced to disk.
pub fn write<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec(value)?;
    write_bytes(path, &text).with_context(|| format!("cannot write {}", path.display()))
}

fn write_bytes(path: &Path, bytes: &[u8]) -> io::Result<()> {
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

/// Reads a file of ours; None if it is not there.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let mut file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read the ledger's file {}", path.display())),
    };
    // Room for a record: one read, and one that finds the end.
    let mut text = Vec::with_capacity(4096);
    Read::by_ref(&mut file)
        .take(READ_MAX)
        .read_to_end(&mut text)
        .with_context(|| format!("cannot read the ledger's file {}", path.display()))?;
    // Look at the version first: a newer file may have any form.
    #[derive(serde::Deserialize)]
    struct Version {
        version: Option<u32>,
    }
    if let Ok(Version { version: Some(version) }) = serde_json::from_slice(&text) {
        if version > super::record::VERSION {
            bail!(
                "the ledger's file {} has version {version} and this program knows {}; use the newer mptcp-hook",
                path.display(),
                super::record::VERSION
            );
        }
    }
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| anyhow!("the ledger's file {} is damaged ({e}); move it away to go on without it", path.display()))
}

/// Removes a file; that it is gone already is fine.
pub fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Makes a directory of ours; that it is there already is fine.
pub fn make_directory(path: &Path) -> Result<()> {
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

/// Opens a file to append to, for its owner alone.
pub fn open_to_append(path: &Path) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}
