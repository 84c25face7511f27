//! Settings as files: `/proc/sys` follows the network namespace of the thread that opens it, `/sys/module` has none.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};

use super::netns::Visit;
use super::{Change, Seen, SeenSetting};
use crate::request::setting::{self, SettingKey};

/// The longest value that is read; the kernel's own buffer is a page.
const READ_MAX: u64 = 16 * 1024;

/// Reads a small file, the last line break cut off. None if it is not there or cannot be read.
pub fn read_text(path: &str) -> Option<String> {
    read(Path::new(path)).ok()
}

/// The same, with the reason why it cannot be read.
pub fn read(path: &Path) -> io::Result<String> {
    read_value(open(path)?)
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

fn read_value(file: File) -> io::Result<String> {
    let mut text = String::from_utf8(read_small(file, READ_MAX)?).map_err(|_| io::ErrorKind::InvalidData)?;
    text.truncate(text.trim_end().len());
    Ok(text)
}

/// Reads a file of the kernel's, at most `max` bytes. Nearly all of them come whole with the first read, and most of the
/// others say so by being longer than that.
pub fn read_small(mut file: File, max: u64) -> io::Result<Vec<u8>> {
    let mut first = [0; 2048];
    let length = file.read(&mut first)?;
    let mut bytes = first[..length].to_vec();
    if length == first.len() {
        file.take(max.saturating_sub(length as u64)).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// Looks at a setting's file from where the thread is now. Nothing is written to find anything out.
pub fn look(key: &SettingKey) -> Seen {
    let path = key.path();
    // Opened before it is looked at: the walk through /proc/sys costs more than all the rest.
    let file = match open(&path) {
        Ok(file) => file,
        Err(_) if path.is_file() => return Seen::Unreadable,
        Err(_) => return Seen::Absent,
    };
    let Ok(metadata) = file.metadata() else { return Seen::Absent };
    if !metadata.is_file() {
        return Seen::Absent;
    }
    let writable = metadata.permissions().mode() & 0o222 != 0;
    match read_value(file) {
        Ok(value) if writable => Seen::Writable(value),
        Ok(value) => Seen::ReadOnly(value),
        Err(_) => Seen::Unreadable,
    }
}

/// Looks at the settings from outside before a visit from which there may be no way back.
pub fn look_before(visit: &mut Visit, keys: impl Iterator<Item = SettingKey>) {
    if visit.may_be_one_way() {
        visit.remember_outside(keys.map(|key| (key.clone(), look(&key))).collect());
    }
}

/// Looks at the settings from outside and from inside; the thread is inside afterwards.
pub fn look_around(visit: &mut Visit, keys: &[SettingKey]) -> Result<BTreeMap<SettingKey, SeenSetting>> {
    let mut settings: BTreeMap<SettingKey, SeenSetting> = BTreeMap::new();
    if visit.host_reachable() {
        visit.outside()?;
        for key in keys {
            settings.entry(key.clone()).or_default().host = look(key);
        }
    }
    visit.inside()?;
    for key in keys {
        let entry = settings.entry(key.clone()).or_default();
        if !visit.host_reachable() {
            entry.host = visit.seen_outside(key);
        }
        match key {
            SettingKey::Sysctl(_) => entry.target = look(key),
            // One for the kernel, whatever namespace looks at it.
            SettingKey::Module(..) if !visit.host_reachable() => entry.host = look(key),
            SettingKey::Module(..) => {}
        }
    }
    Ok(settings)
}

/// The loaded congestion controls, if somebody asks for one.
pub fn congestion_controls(settings: &BTreeMap<SettingKey, SeenSetting>) -> Vec<String> {
    let asked = settings.keys().any(|key| key.sysctl_path() == Some("net/ipv4/tcp_congestion_control"));
    let list = if asked { read_text("/proc/sys/net/ipv4/tcp_available_congestion_control") } else { None };
    list.map(|list| list.split_whitespace().map(String::from).collect()).unwrap_or_default()
}

/// Writes a value from where the thread is now.
fn write(key: &SettingKey, value: &str) -> Result<()> {
    let path = key.path();
    let attempt = || format!("cannot write \"{value}\" to {}", path.display());
    let mut file = File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .map_err(|e| explain(e, key))
        .with_context(attempt)?;
    // One write: the kernel takes each as a whole value. An empty one has to have a line's end, or nothing is written.
    let value = if value.is_empty() { "\n" } else { value };
    let written = file.write(value.as_bytes()).map_err(|e| explain(e, key)).with_context(attempt)?;
    if written != value.len() {
        bail!("{}: the kernel took {written} of {} bytes", attempt(), value.len());
    }
    Ok(())
}

fn explain(error: io::Error, key: &SettingKey) -> anyhow::Error {
    let errno = error.raw_os_error();
    let what_to_do = match errno {
        Some(libc::EROFS) if key.sysctl_path().is_some() => {
            "/proc/sys is mounted read-only here; run the hook where it is not (createRuntime, start-host)"
        }
        Some(libc::EROFS) => "/sys is mounted read-only here; run the hook where it is not (createRuntime, start-host)",
        Some(libc::EACCES) => "the file's mode or the mount forbids it here, although the hook has the rights",
        Some(libc::EPERM) if key.sysctl_path() == Some("net/ipv4/tcp_congestion_control") => {
            "the host must list it in net.ipv4.tcp_allowed_congestion_control"
        }
        Some(libc::ENOENT) => "the kernel knows no such name; its module may be missing",
        Some(libc::EINVAL | libc::ERANGE) => "the kernel rejects the value",
        _ => return anyhow!(error),
    };
    anyhow!("{error}: {what_to_do}")
}

/// Makes a change if it is one of a setting; false if it is not.
pub fn perform(visit: &mut Visit, change: &Change) -> Result<bool> {
    match change {
        Change::HostSetting { key, value } => {
            if key.sysctl_path().is_some() {
                visit.outside()?;
            }
            write(key, value)?;
        }
        Change::NetnsSysctl { key, value, .. } => {
            visit.inside()?;
            write(key, value)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Reads back the settings among `changes`, those of the namespace first.
pub fn confirm(visit: &mut Visit, changes: &[&Change]) -> Result<()> {
    for change in changes {
        if let Change::NetnsSysctl { key, value, .. } = change {
            visit.inside()?;
            compare(key, value)?;
        }
    }
    for change in changes {
        match change {
            Change::HostSetting { key, value } => {
                if key.sysctl_path().is_some() {
                    visit.outside()?;
                }
                compare(key, value)?;
            }
            Change::NetnsSysctl { key, value, host: Some(host) }
                if visit.host_reachable() && !visit.target_is_host() =>
            {
                visit.outside()?;
                let now = look(key);
                if now.value().is_some_and(|now| !setting::same(key, now, host)) {
                    bail!(
                        "writing {key} = {value} in the container's namespace changed the host's value from {host} to {}; this kernel does not keep it per namespace",
                        now.value().unwrap_or_default()
                    );
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn compare(key: &SettingKey, value: &str) -> Result<()> {
    match look(key).value() {
        Some(now) if setting::same(key, now, value) => Ok(()),
        Some(now) => bail!("{key} was written as {value} and reads back as {now}"),
        None => bail!("{key} was written and cannot be read back"),
    }
}
