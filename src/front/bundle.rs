//! `config.json` of an OCI bundle: what the runtime itself will write, and the network namespace's path.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::request::setting::{self, SettingKey};
use crate::request::{Rank, Source, What, Wish};

/// Engines write some tens of kilobytes.
const SIZE_MAX: u64 = 4 * 1024 * 1024;

/// The parts of config.json that matter here (OCI runtime-spec, config-linux.md).
#[derive(Debug, Default, Deserialize)]
pub struct Bundle {
    #[serde(default)]
    linux: Linux,
}

#[derive(Debug, Default, Deserialize)]
struct Linux {
    #[serde(default)]
    sysctl: BTreeMap<String, String>,
    #[serde(default)]
    namespaces: Vec<Namespace>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    path: Option<String>,
}

impl Bundle {
    /// Reads `DIRECTORY/config.json`, never anything of the container's own file system. A bundle without one has no
    /// wishes: a state that a person wrote need not come with a bundle.
    pub fn read(directory: &Path) -> Result<Self> {
        if !directory.is_absolute() {
            return Ok(Self::default());
        }
        let path = directory.join("config.json");
        let attempt = || format!("cannot read {}", path.display());
        let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error).with_context(attempt),
        };
        let metadata = file.metadata().with_context(attempt)?;
        if !metadata.is_file() {
            bail!("{} is not a regular file", path.display());
        }
        let mut text = Vec::with_capacity(metadata.len().min(SIZE_MAX) as usize + 1);
        file.take(SIZE_MAX + 1).read_to_end(&mut text).with_context(attempt)?;
        if text.len() as u64 > SIZE_MAX {
            bail!("{} is larger than {SIZE_MAX} bytes", path.display());
        }
        serde_json::from_slice(&text)
            .map_err(|e| anyhow::anyhow!("cannot understand {}: {}", path.display(), crate::error::plain(e)))
    }

    /// `linux.sysctl` as wishes of the runtime. What is not ours to judge (kernel.*, a key that no kernel has) is the
    /// runtime's business.
    pub fn wishes(&self) -> Vec<Wish> {
        let read = |(key, value): (&String, &String)| {
            let key = SettingKey::sysctl(key).ok()?;
            let value = setting::value(&key, value).ok()?;
            let source = Source::new(Rank::Runtime, "linux.sysctl of the container's config.json");
            Some(Wish::new(What::Setting(key, value), source))
        };
        let mut seen = BTreeSet::new();
        // `net.a` and `net/a` may both stand there; the runtime writes both, and the first is as good as the second.
        self.linux.sysctl.iter().filter_map(read).filter(|wish| seen.insert(wish.what.subject())).collect()
    }

    /// The path of the network namespace, if it is shared or was made beforehand.
    pub fn netns_path(&self) -> Option<&str> {
        self.namespace("network").and_then(|namespace| namespace.path.as_deref()).filter(|path| path.starts_with('/'))
    }

    /// Whether the container has a network namespace that is not the host's.
    pub fn has_netns(&self) -> bool {
        self.namespace("network").is_some()
    }

    /// Whether the container has a user namespace.
    pub fn has_user_namespace(&self) -> bool {
        self.namespace("user").is_some()
    }

    fn namespace(&self, kind: &str) -> Option<&Namespace> {
        self.linux.namespaces.iter().find(|namespace| namespace.kind == kind)
    }
}
