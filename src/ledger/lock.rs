//! Locks with a deadline: one per container, per network namespace, per setting.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::deadline::Deadline;
use crate::error::beginning;

/// The first pause after a lock was found busy; a hook that holds one needs about as long.
const FIRST_PAUSE: Duration = Duration::from_micros(300);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(8);
/// Room for the holder's name in the lock file.
const HOLDER_MAX: usize = 192;

/// Locks that are held; dropping them lets go.
pub struct Locks(Vec<(PathBuf, Flock<File>)>);

impl Locks {
    /// Takes all locks `names` in `directory` or none: nothing is held while another container is waited for, so that
    /// two hooks can never wait for each other. `holder` is what others are told while we hold them. At the deadline, and
    /// where one cannot be taken at all, `give_up` sees those that are held, to discard what nobody else will.
    pub fn take(
        directory: &Path,
        names: &[String],
        holder: &str,
        deadline: Deadline,
        give_up: impl Fn(&Self),
    ) -> Result<Self> {
        let mut paths: Vec<PathBuf> = names.iter().map(|name| directory.join(name)).collect();
        let mut pause = FIRST_PAUSE;
        loop {
            let mut held = Self(Vec::with_capacity(paths.len()));
            let mut busy = None;
            for (position, path) in paths.iter().enumerate() {
                match try_take(path, holder) {
                    Ok(Some(lock)) => held.0.push((path.clone(), lock)),
                    Ok(None) => {
                        busy = Some(position);
                        break;
                    }
                    Err(error) => {
                        // Perhaps for want of descriptors, and to give up takes one.
                        let last = held.0.pop().map(|(path, _)| path);
                        give_up(&held);
                        drop(held);
                        if let Some((path, Ok(Some(lock)))) = last.map(|path| (path.clone(), try_take(&path, holder))) {
                            give_up(&Self(vec![(path, lock)]));
                        }
                        return Err(error);
                    }
                }
            }
            let Some(position) = busy else { return Ok(held) };
            if deadline.over() {
                for path in &paths[position + 1..] {
                    held.0.extend(try_take(path, holder).ok().flatten().map(|lock| (path.clone(), lock)));
                }
                give_up(&held);
                bail!(
                    "{} is in use by {}; gave up at the deadline (deadline in config.toml)",
                    paths[position].display(),
                    read_holder(&paths[position]).unwrap_or_else(|| "another process".into())
                );
            }
            drop(held);
            // It comes first from now on: as long as it is busy, nothing else is touched.
            let path = paths.remove(position);
            paths.insert(0, path);
            std::thread::sleep(pause.min(deadline.remaining()));
            // Odd steps by pid, so that many that were started at once do not keep step with each other.
            let step = 1.3 + f64::from(std::process::id() % 8) / 10.0;
            pause = pause.mul_f64(step).min(LONGEST_PAUSE);
        }
    }

    /// Removes the file of a lock that is held and will not be needed again. Whoever waits for it notices.
    pub fn discard(&self, name: &str) -> Result<()> {
        for (path, _) in &self.0 {
            if path.file_name().is_some_and(|file| file == name) {
                super::files::remove(path)?;
            }
        }
        Ok(())
    }
}

/// Takes one lock if it is free.
pub fn try_take(path: &Path, holder: &str) -> Result<Option<Flock<File>>> {
    take_one(path, holder, FlockArg::LockExclusiveNonblock)
}

/// Takes one lock, and sleeps until it is free.
pub fn wait_for(path: &Path, holder: &str) -> Result<Flock<File>> {
    let lock = take_one(path, holder, FlockArg::LockExclusive)?;
    lock.with_context(|| format!("the lock {} is busy", path.display()))
}

fn take_one(path: &Path, holder: &str, how: FlockArg) -> Result<Option<Flock<File>>> {
    loop {
        // 0600: whoever can open a file for reading can lock it for ever.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .with_context(|| format!("cannot open the lock {}", path.display()))?;
        let lock = match Flock::lock(file, how) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(errno).with_context(|| format!("cannot lock {}", path.display())),
        };
        if lock.metadata().is_ok_and(|meta| meta.nlink() == 0) {
            // Discarded by its last holder after we opened it.
            continue;
        }
        let mut line = format!("{holder} (pid {})", std::process::id());
        line.truncate(beginning(&line, HOLDER_MAX).len());
        // Only for messages: a failure (a full disk) must not keep us from the lock.
        let _ = lock.write_at(format!("{line:HOLDER_MAX$}").as_bytes(), 0);
        return Ok(Some(lock));
    }
}

fn read_holder(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(HOLDER_MAX as u64).read_to_string(&mut text).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_lock_names_its_holder_at_the_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["a".to_string(), "b".to_string()];
        let held = Locks::take(directory.path(), &names[1..], "web", Deadline::after(Duration::ZERO), |_| {}).unwrap();
        let error = Locks::take(directory.path(), &names, "db", Deadline::after(Duration::from_millis(5)), |_| {})
            .err()
            .unwrap();
        assert!(error.to_string().contains("in use by web (pid"), "{error}");
        // `a` was not kept while `b` was waited for.
        drop(Locks::take(directory.path(), &names[..1], "x", Deadline::after(Duration::ZERO), |_| {}).unwrap());
        drop(held);
        Locks::take(directory.path(), &names, "db", Deadline::after(Duration::ZERO), |_| {}).unwrap();
    }

    #[test]
    fn a_discarded_lock_is_taken_anew() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["a".to_string()];
        let held = Locks::take(directory.path(), &names, "web", Deadline::after(Duration::ZERO), |_| {}).unwrap();
        held.discard("a").unwrap();
        assert!(!directory.path().join("a").exists());
        // The name is free although the old file is still locked.
        Locks::take(directory.path(), &names, "db", Deadline::after(Duration::ZERO), |_| {}).unwrap();
    }

    #[test]
    fn locks_exclude_each_other() {
        let directory = tempfile::tempdir().unwrap();
        let counter = std::sync::Mutex::new(0_u32);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (directory, counter) = (directory.path(), &counter);
                scope.spawn(move || {
                    for _ in 0..20 {
                        let mut names = ["a".to_string(), "b".to_string()];
                        names.rotate_left(thread % 2);
                        let locks =
                            Locks::take(directory, &names, "t", Deadline::after(Duration::from_secs(600)), |_| {})
                                .unwrap();
                        let seen = *counter.lock().unwrap();
                        std::thread::yield_now();
                        *counter.lock().unwrap() = seen + 1;
                        drop(locks);
                    }
                });
            }
        });
        assert_eq!(*counter.lock().unwrap(), 160);
    }
}
