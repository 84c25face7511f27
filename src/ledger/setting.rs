//! The ledger's page on one host-wide setting: its value, who relies on it, and a write that is under way.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::files;
use super::parallel;
use super::record::VERSION;
use crate::instance::Instance;
use crate::request::setting::{self, SettingKey};

/// What the page says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Which setting.
    pub key: SettingKey,
    /// The value before the first of ours.
    pub original: String,
    /// The value that we wrote last, or found and relied on.
    pub value: String,
    /// When it became so, as [`Claim::time`] has it: no claim was newer then.
    pub since: u64,
    /// When the original became it, because somebody else had changed what was ours; the claims that were there then do
    /// not come back over it. 0 if it is from before the first of ours.
    pub original_since: u64,
    /// Who relies on it, the oldest first.
    pub claims: Vec<Claim>,
    /// A write that was begun.
    pub intent: Option<Intent>,
}

/// One container's reliance on a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// [`VERSION`].
    pub version: u32,
    /// Who.
    pub instance: Instance,
    /// At which value.
    pub value: String,
    /// When it was made, in nanoseconds since 1970; decides which claim is the newest. Where the clock was set back it is
    /// ahead of that: a claim that is made later is always newer.
    pub time: u64,
    /// Somebody else overrode it.
    pub overridden: bool,
}

/// A claim on a host-wide value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostClaim {
    /// Which setting.
    pub key: SettingKey,
    /// The value that we rely on.
    pub value: String,
    /// The value before the first of ours.
    pub original: String,
    /// Whether that is somebody else's change to what was ours.
    pub is_foreign: bool,
    /// Whether the steps write it.
    pub written: Option<Written>,
    /// The containers whose claims are overridden with it.
    pub overridden: Vec<String>,
    /// The dead containers whose claims are struck.
    pub dead: Vec<String>,
}

/// A write of a host-wide value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The value right before.
    pub before: String,
}

/// A write to the kernel that is about to happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// [`VERSION`].
    pub version: u32,
    /// Who writes.
    pub instance: Instance,
    /// Which setting.
    pub key: SettingKey,
    /// The value before.
    pub original: String,
    /// The value to be written.
    pub wanted: String,
    /// If the value before is somebody else's change to what was ours: the time of the newest claim that it overtook.
    #[serde(default)]
    pub overtook: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct Value {
    version: u32,
    key: SettingKey,
    original: String,
    value: String,
    #[serde(default)]
    since: u64,
    #[serde(default)]
    original_since: u64,
}

/// The name of a setting's directory and lock.
pub fn directory_name(key: &SettingKey) -> String {
    // `/` cannot stand in a name, and `~` cannot stand in a key.
    match key {
        SettingKey::Sysctl(path) => path.replace('/', "~"),
        SettingKey::Module(..) => key.to_string(),
    }
}

/// The setting whose directory has this name.
pub fn key_of(directory: &str) -> Option<SettingKey> {
    let key = match directory.contains('~') {
        true => SettingKey::sysctl(&directory.replace('~', "/")),
        false => SettingKey::module(directory.strip_prefix("module:")?),
    };
    key.ok().filter(|key| directory_name(key) == directory)
}

/// What a file says, and what is wrong with it.
type Told<T> = (Option<T>, Option<anyhow::Error>);

fn split<T>(read: Result<Option<T>>) -> Told<T> {
    match read {
        Ok(content) => (content, None),
        Err(error) => (None, Some(error)),
    }
}

/// What can be read of a page, and what cannot.
#[derive(Debug, Default)]
pub struct Survey {
    /// What the page says, without what cannot be read, and without the claims. None without a value.
    pub setting: Option<Setting>,
    /// Whether the value's own file is there and can be read.
    pub has_value: bool,
    /// The write under way, also where the value is lost.
    pub intent: Option<Intent>,
    /// The claims, by the names of their files.
    pub claims: Vec<(String, Claim)>,
    /// The files that cannot be read, and why.
    pub faults: Vec<(PathBuf, anyhow::Error)>,
}

/// The files of one setting.
#[derive(Clone, Debug)]
pub struct Page {
    directory: PathBuf,
}

impl Page {
    /// The page of `key`.
    pub fn new(settings: &Path, key: &SettingKey) -> Self {
        Self { directory: settings.join(directory_name(key)) }
    }

    /// The page in `directory`.
    pub fn at(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Whether anything is written about the setting.
    pub fn exists(&self) -> bool {
        self.directory.exists()
    }

    /// Reads all of it; None if nobody relies on the setting.
    pub fn read(&self) -> Result<Option<Setting>> {
        let Some(mut setting) = self.read_value()? else { return Ok(None) };
        let claims = self.directory.join("claims");
        for name in files::names(&claims)? {
            setting.claims.extend(files::read::<Claim>(&claims.join(name))?);
        }
        setting.claims.sort_by_key(|claim| claim.time);
        Ok(Some(setting))
    }

    /// Reads the value alone, which costs the same however many rely on it.
    pub fn read_value(&self) -> Result<Option<Setting>> {
        let value: Option<Value> = files::read(&self.directory.join("value"))?;
        let intent: Option<Intent> = files::read(&self.directory.join("intent"))?;
        Ok(match (value, intent) {
            (None, None) => None,
            (Some(value), intent) => Some(value.setting(intent)),
            // The first writer of all was killed before it wrote the value's file.
            (None, Some(intent)) => Some(intent.setting()),
        })
    }

    /// Reads what can be read.
    pub fn survey(&self) -> Survey {
        let claims = self.directory.join("claims");
        self.survey_by(
            |path| split(files::read(path)),
            |path| split(files::read(path)),
            |name| split(files::read(&claims.join(name))),
        )
    }

    /// The same to be shown, whoever may have written it; that is then among the faults.
    pub fn survey_to_show(&self) -> Survey {
        let claims = self.directory.join("claims");
        let directory = files::Directory::open(&claims).ok().flatten();
        self.survey_by(files::read_to_show, files::read_to_show, |name| match &directory {
            Some(directory) => directory.read_to_show(name),
            None => files::read_to_show(&claims.join(name)),
        })
    }

    fn survey_by(
        &self,
        read_value: fn(&Path) -> Told<Value>,
        read_intent: fn(&Path) -> Told<Intent>,
        read_claim: impl Fn(&str) -> Told<Claim> + Sync,
    ) -> Survey {
        let mut survey = Survey::default();
        let path = self.directory.join("value");
        let (value, fault) = read_value(&path);
        survey.faults.extend(fault.map(|fault| (path, fault)));
        let path = self.directory.join("intent");
        let (intent, fault) = read_intent(&path);
        survey.intent = intent;
        survey.faults.extend(fault.map(|fault| (path, fault)));
        let claims = self.directory.join("claims");
        match files::names(&claims) {
            Ok(names) => {
                let read = |name: String| {
                    let told = read_claim(&name);
                    (name, told)
                };
                for (name, (claim, fault)) in parallel::map(names, read) {
                    survey.faults.extend(fault.map(|fault| (claims.join(&name), fault)));
                    survey.claims.extend(claim.map(|claim| (name, claim)));
                }
            }
            Err(error) => survey.faults.push((claims, error)),
        }
        survey.claims.sort_by_key(|(_, claim)| claim.time);
        survey.has_value = value.is_some();
        let value_is_lost = survey.faults.iter().any(|(path, _)| path.ends_with("value"));
        survey.setting = match (value, survey.intent.clone()) {
            (Some(value), intent) => Some(value.setting(intent)),
            // As in `read_value`; not where the value was there once.
            (None, Some(intent)) if !value_is_lost => Some(intent.setting()),
            _ => None,
        };
        survey
    }

    /// The directories of the page.
    pub fn directories(&self) -> [PathBuf; 2] {
        [self.directory.clone(), self.directory.join("claims")]
    }

    /// Makes the page's directory.
    pub fn make(&self) -> Result<()> {
        files::make_directory(&self.directory)
    }

    /// Announces a write, before the kernel is written.
    pub fn intend(
        &self,
        instance: &Instance,
        key: &SettingKey,
        original: &str,
        wanted: &str,
        overtook: Option<u64>,
    ) -> Result<()> {
        files::make_directory(&self.directory)?;
        let intent = Intent {
            version: VERSION,
            instance: instance.clone(),
            key: key.clone(),
            original: original.into(),
            wanted: wanted.into(),
            overtook,
        };
        files::write(&self.directory.join("intent"), &intent)
    }

    /// Withdraws an intent: nothing was written, or it was undone.
    pub fn withdraw(&self) -> Result<()> {
        files::remove(&self.directory.join("intent"))?;
        self.tidy()
    }

    /// Sets down the value that is in force now, what it was before, and since when. The claims are not touched.
    pub fn set_value(&self, now: &Setting) -> Result<()> {
        files::make_directory(&self.directory)?;
        let value = Value {
            version: VERSION,
            key: now.key.clone(),
            original: now.original.clone(),
            value: now.value.clone(),
            since: now.since,
            original_since: now.original_since,
        };
        files::write(&self.directory.join("value"), &value)
    }

    /// Enters a claim, or replaces the container's earlier one.
    pub fn claim(&self, claim: &Claim) -> Result<()> {
        let claims = self.directory.join("claims");
        files::make_directory(&claims)?;
        files::write(&claims.join(claim.instance.container.key()), claim)
    }

    /// Strikes a container's claim.
    pub fn unclaim(&self, container: &str) -> Result<()> {
        files::remove(&self.directory.join("claims").join(container))
    }

    /// Enters what a plan says: the value, who was overridden, our claim. The write's intent is fulfilled with it.
    pub fn enter(&self, claim: &HostClaim, instance: &Instance) -> Result<()> {
        // Who else relies on it matters only where it has changed.
        let has_changed = claim.written.is_some() || claim.is_foreign;
        let before = if has_changed { self.read()? } else { self.read_value()? };
        let newest = before.as_ref().map_or(0, Setting::newest);
        let time = super::nanoseconds_after(newest);
        let is_known =
            before.as_ref().is_some_and(|b| b.original == claim.original && b.is(&claim.value) && b.intent.is_none());
        if !is_known {
            let original_since = before.as_ref().map_or(0, |before| before.original_since);
            self.set_value(&Setting {
                key: claim.key.clone(),
                original: claim.original.clone(),
                value: claim.value.clone(),
                since: newest,
                original_since: if claim.is_foreign { newest } else { original_since },
                claims: Vec::new(),
                intent: None,
            })?;
        }
        if let Some(before) = &before {
            // Others may have wanted this very value and been overridden before.
            self.mark_overridden(&claim.key, &before.claims, &claim.value)?;
        }
        for dead in &claim.dead {
            self.unclaim(dead)?;
        }
        self.claim(&Claim {
            version: VERSION,
            instance: instance.clone(),
            value: claim.value.clone(),
            time,
            overridden: false,
        })?;
        if claim.written.is_some() { self.fulfil() } else { Ok(()) }
    }

    /// Strikes the intent of a write that is done and set down: from now on the value's file alone speaks.
    pub fn fulfil(&self) -> Result<()> {
        files::remove(&self.directory.join("intent"))
    }

    /// Takes back what [`Page::enter`] may have written: the kernel has its former value again. `before` is what the
    /// page said (its claims do not matter), `own` the claim that the container had.
    pub fn leave_as_before(&self, instance: &Instance, before: Option<&Setting>, own: Option<&Claim>) -> Result<()> {
        match own {
            Some(own) => self.claim(own)?,
            None => self.unclaim(&instance.container.key())?,
        }
        match before {
            Some(before) => {
                self.set_value(before)?;
                if let Some(now) = self.read()? {
                    self.mark_overridden(&before.key, &now.claims, &before.value)?;
                }
            }
            None => self.forget()?,
        }
        self.withdraw()
    }

    /// Whether a claim of another container passes the test. It stops at the first, so that leaving a setting that many
    /// rely on costs as little as entering it.
    pub fn any_other_claim(&self, container: &str, test: impl Fn(&Claim) -> bool) -> Result<bool> {
        let claims = self.directory.join("claims");
        for name in files::each_name(&claims)? {
            let name = name?;
            if name != container {
                if let Some(claim) = files::read::<Claim>(&claims.join(&name))? {
                    if test(&claim) {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    /// A container's claim.
    pub fn claim_of(&self, container: &str) -> Result<Option<Claim>> {
        files::read(&self.directory.join("claims").join(container))
    }

    /// Marks the claims whose value is not the one in force.
    pub fn mark_overridden<'a>(
        &self,
        key: &SettingKey,
        claims: impl IntoIterator<Item = &'a Claim>,
        in_force: &str,
    ) -> Result<()> {
        for claim in claims {
            let overridden = !setting::same(key, &claim.value, in_force);
            if claim.overridden != overridden {
                self.claim(&Claim { overridden, ..claim.clone() })?;
            }
        }
        Ok(())
    }

    /// Settles a write that a killed hook had begun; `actual` is the value now. The setting's lock is held.
    pub fn recover(&self, actual: &str) -> Result<()> {
        let Some(setting) = self.read_value()? else { return Ok(()) };
        let Some(intent) = &setting.intent else { return Ok(()) };
        // The write happened: the value is ours. Whether anybody still wants it is for the next step to see.
        if setting::same(&intent.key, actual, &intent.wanted) {
            if let Some(setting) = self.read()? {
                let mut now = setting.at(&intent.wanted);
                if let Some(newest) = intent.overtook {
                    now.original.clone_from(&intent.original);
                    now.original_since = newest;
                }
                self.set_value(&now)?;
                self.mark_overridden(&setting.key, &setting.claims, &intent.wanted)?;
            }
        }
        // It did not, or somebody else has written since: nothing to do about it.
        self.withdraw()
    }

    /// Forgets the setting: nobody relies on it any more.
    pub fn forget(&self) -> Result<()> {
        files::remove(&self.directory.join("value"))?;
        self.tidy()
    }

    /// Removes directories that have become empty; full ones stay.
    pub fn tidy(&self) -> Result<()> {
        let _ = std::fs::remove_dir(self.directory.join("claims"));
        let _ = std::fs::remove_dir(&self.directory);
        Ok(())
    }
}

impl Value {
    fn setting(self, intent: Option<Intent>) -> Setting {
        let Self { key, original, value, since, original_since, .. } = self;
        Setting { key, original, value, since, original_since, claims: Vec::new(), intent }
    }
}

impl Intent {
    /// What the page says where there is nothing but a write under way: the first of all.
    fn setting(self) -> Setting {
        Setting {
            key: self.key.clone(),
            original: self.original.clone(),
            value: self.original.clone(),
            since: 0,
            original_since: 0,
            claims: Vec::new(),
            intent: Some(self),
        }
    }
}

impl Setting {
    /// Where nobody who is alive relies on the value: what it goes back to, the newest living claim's value or else
    /// the one before ours.
    pub fn left_behind(&self, boot_id: &str) -> Option<&str> {
        let living: Vec<&Claim> = self.claims.iter().filter(|claim| claim.instance.is_alive(boot_id)).collect();
        let is_held = living.iter().any(|claim| self.is(&claim.value));
        (!is_held).then(|| self.back_to(&living))
    }

    /// What it goes back to where these claims are left, the oldest first, and none has the value in force: the newest's
    /// value, unless somebody else has changed it since that was made, or else the one before ours.
    pub fn back_to<'a>(&'a self, left: &[&'a Claim]) -> &'a str {
        let newest = left.last().filter(|claim| claim.time > self.original_since);
        newest.map_or(&self.original, |claim| &claim.value)
    }

    /// The same with another value from now on, without the claims.
    pub fn at(&self, value: &str) -> Self {
        Self {
            key: self.key.clone(),
            original: self.original.clone(),
            value: value.into(),
            since: self.newest(),
            original_since: self.original_since,
            claims: Vec::new(),
            intent: None,
        }
    }

    /// The time of the newest claim, as far as they have been read, and no earlier than the value became what it is.
    pub fn newest(&self) -> u64 {
        self.claims.iter().map(|claim| claim.time).fold(self.since, u64::max)
    }

    /// Whether `value` is the setting's.
    pub fn is(&self, value: &str) -> bool {
        setting::same(&self.key, &self.value, value)
    }
}
