//! Reads a file that only the host's root can have written.
//!
//! Whoever can write the policy, or a directory on the way to it, decides what containers may do to the host. So the
//! file, every directory above it and every symbolic link on the way must belong to root and be writable by nobody
//! else. The path is walked from `/`, link by link, and once every step is found to be root's, nobody but root can
//! change what the checked path leads to before it is opened.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

use crate::error::usage;

/// The largest file that is read, in bytes.
const SIZE_MAX: u64 = 1 << 20;
/// As many symbolic links as the kernel itself would follow (path_resolution(7)).
const LINKS_MAX: usize = 40;
/// `DEFAULT_OVERFLOWUID` of the kernel (`include/linux/highuid.h`), where /proc does not say it.
const OVERFLOW_UID: u32 = 65534;

/// The text of the file at `path`, or None if there is none, which costs one lstat(2).
///
/// `initial_user_namespace` says whether this process is in it. In any other one the host's root is not mapped and its
/// files show as the overflow uid; as do those of every other user who is not mapped, so that there the check is only
/// as good as the namespace's owner, who decides what runs in it anyway.
///
/// A file or directory that somebody else could have written, a file that is not a regular one, over 1 MiB, or not
/// UTF-8 is a wrong usage (exit 2); what the kernel answers to reading is a failure (exit 1).
pub fn read(path: &Path, initial_user_namespace: bool) -> Result<Option<String>> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot look at {}", path.display())),
        Ok(_) => {}
    }
    let root = Root::seen_from(initial_user_namespace);
    let real = resolve(path, &root)?;
    let mut file = open(&real).with_context(|| format!("cannot open {}", path.display()))?;
    let metadata = file.metadata().with_context(|| format!("cannot look at {}", path.display()))?;
    root.must_own(&real, &metadata)?;
    let mut bytes = Vec::with_capacity(metadata.len().min(SIZE_MAX) as usize + 1);
    file.by_ref()
        .take(SIZE_MAX + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {}", path.display()))?;
    if bytes.len() as u64 > SIZE_MAX {
        return Err(usage(format!("{} is larger than {SIZE_MAX} bytes", path.display())));
    }
    String::from_utf8(bytes).map(Some).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
        usage(format!("{}:{line}: not UTF-8 text", path.display()))
    })
}

/// Opens for reading, without following a link or waiting for a FIFO's writer, should root have put one there since.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// The path without any symbolic link, each of its steps checked.
fn resolve(path: &Path, root: &Root) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).with_context(|| format!("cannot resolve {}", path.display()))?;
    let mut real = PathBuf::from("/");
    let mut steps = Vec::new();
    push(&mut steps, &absolute);
    let look = |at: &Path| fs::symlink_metadata(at).with_context(|| format!("cannot look at {}", at.display()));
    root.must_own(&real, &look(&real)?)?;
    let mut links = 0;
    while let Some(step) = steps.pop() {
        if step == ".." {
            // `real` has no link in it, so its parent is the directory above it.
            real.pop();
            continue;
        }
        let next = real.join(&step);
        let metadata = look(&next).with_context(|| format!("on the way to {}", path.display()))?;
        if steps.is_empty() && !metadata.is_file() && !metadata.is_symlink() {
            // Before anybody is told to chmod a device.
            return Err(usage(format!("{} is not a regular file", path.display())));
        }
        root.must_own(&next, &metadata)?;
        if metadata.is_symlink() {
            links += 1;
            if links > LINKS_MAX {
                return Err(usage(format!("{} goes through more than {LINKS_MAX} symbolic links", path.display())));
            }
            let target = fs::read_link(&next).with_context(|| format!("cannot read the link {}", next.display()))?;
            if target.is_absolute() {
                real = PathBuf::from("/");
            }
            push(&mut steps, &target);
        } else if !steps.is_empty() && !metadata.is_dir() {
            return Err(usage(format!("{} is not a directory, on the way to {}", next.display(), path.display())));
        } else {
            real = next;
        }
    }
    Ok(real)
}

/// Puts the steps of `path` on the stack, the first one on top.
fn push(steps: &mut Vec<OsString>, path: &Path) {
    steps.extend(path.components().rev().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    }));
}

/// The host's root, as this process sees it.
struct Root {
    uid: u32,
    initial_user_namespace: bool,
}

impl Root {
    fn seen_from(initial_user_namespace: bool) -> Self {
        let overflow = || {
            let text = fs::read_to_string("/proc/sys/kernel/overflowuid").ok()?;
            text.trim().parse().ok()
        };
        let uid = if initial_user_namespace { 0 } else { overflow().unwrap_or(OVERFLOW_UID) };
        Self { uid, initial_user_namespace }
    }

    /// Whether `path` is this root's and nobody else can write it. The mode of a link says nothing. An access control
    /// list that lets somebody write shows in the group's bits.
    fn must_own(&self, path: &Path, metadata: &Metadata) -> Result<()> {
        let shown = path.display();
        let (uid, mode) = (metadata.uid(), metadata.mode());
        if uid != self.uid {
            let no_follow = if metadata.is_symlink() { "-h " } else { "" };
            return Err(usage(if self.initial_user_namespace {
                format!(
                    "{shown} belongs to uid {uid}, but only what root owns is trusted here: chown {no_follow}root {shown}"
                )
            } else {
                format!(
                    "{shown} belongs to uid {uid} of this user namespace, but only what the host's root owns (seen here as \
                     uid {}) is trusted here: on the host, chown {no_follow}root {shown}",
                    self.uid
                )
            }));
        }
        if !metadata.is_symlink() && mode & 0o022 != 0 {
            let who = match mode & 0o022 {
                0o020 => "its group",
                0o002 => "everybody",
                _ => "its group and everybody",
            };
            let mend = if metadata.is_dir() && mode & 0o1000 != 0 {
                // /tmp and its kin are meant to be like that.
                "keep the file in a directory that only root can write, such as /etc/mptcp-hook".to_string()
            } else {
                format!("chmod go-w {shown}")
            };
            return Err(usage(format!("{shown} is writable by {who} (mode {:04o}): {mend}", mode & 0o7777)));
        }
        Ok(())
    }
}

/// What the tests of this directory share.
#[cfg(test)]
pub(super) mod testing {
    /// A directory that only root can write, all the way up; /tmp is not.
    pub fn root_directory() -> tempfile::TempDir {
        tempfile::Builder::new()
            .prefix("mptcp-hook-test-")
            .tempdir_in("/run")
            .expect("these tests need files of root's: run them as root")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
    use std::process::Command;

    use super::testing::root_directory;
    use super::*;
    use crate::error::exit_status;

    /// Set for the copy of this test program that runs in a user namespace.
    const INSIDE: &str = "MPTCP_HOOK_TEST_TRUSTED_FILE";

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// The error that reading ends in, which must be one line and exit 2.
    fn refusal(path: &Path) -> String {
        let error = read(path, true).expect_err("was trusted");
        assert_eq!(exit_status(&error), 2, "{error:#}");
        let text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    }

    #[test]
    fn a_file_of_roots_is_read_and_a_missing_one_is_none() {
        let dir = root_directory();
        let path = dir.path().join("config.toml");
        assert_eq!(read(&path, true).unwrap(), None);
        assert_eq!(read(&dir.path().join("no/such/config.toml"), true).unwrap(), None);
        fs::write(&path, "x = 1\n").unwrap();
        mode(&path, 0o644);
        assert_eq!(read(&path, true).unwrap().as_deref(), Some("x = 1\n"));
        let dotted = dir.path().join("../").join(dir.path().file_name().unwrap()).join("./config.toml");
        assert_eq!(read(&dotted, true).unwrap().as_deref(), Some("x = 1\n"));
    }

    #[test]
    fn a_file_that_others_can_write_is_refused_with_the_command_that_mends_it() {
        let dir = root_directory();
        let path = dir.path().join("config.toml");
        fs::write(&path, "").unwrap();
        for (bits, who) in [(0o664, "its group ("), (0o646, "everybody"), (0o666, "its group and everybody")] {
            mode(&path, bits);
            let text = refusal(&path);
            assert!(text.contains(&format!("writable by {who}")), "{text}");
            assert!(text.contains(&format!("mode {bits:04o}")), "{text}");
            assert!(text.ends_with(&format!("chmod go-w {}", path.display())), "{text}");
        }
        mode(&path, 0o644);
        chown(&path, Some(1000), None).unwrap();
        let text = refusal(&path);
        assert!(text.contains("belongs to uid 1000"), "{text}");
        assert!(text.ends_with(&format!("chown root {}", path.display())), "{text}");
    }

    #[test]
    fn every_directory_above_counts() {
        let dir = root_directory();
        let outer = dir.path().join("outer");
        let path = outer.join("inner/config.toml");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        assert!(read(&path, true).unwrap().is_some());
        mode(&outer, 0o775);
        assert!(refusal(&path).ends_with(&format!("chmod go-w {}", outer.display())));
        mode(&outer, 0o1777);
        assert!(refusal(&path).contains("keep the file in a directory that only root can write"));
        mode(&outer, 0o755);
        chown(&outer, Some(1000), None).unwrap();
        assert!(refusal(&path).contains("outer belongs to uid 1000"));
    }

    #[test]
    fn links_are_followed_only_through_what_is_roots() {
        let dir = root_directory();
        let real = dir.path().join("real");
        fs::create_dir(&real).unwrap();
        fs::write(real.join("config.toml"), "x = 1\n").unwrap();
        // A directory that is a link, and a relative link to the file.
        symlink("real", dir.path().join("etc")).unwrap();
        symlink("../etc/config.toml", real.join("link.toml")).unwrap();
        let link = dir.path().join("etc/link.toml");
        assert_eq!(read(&link, true).unwrap().as_deref(), Some("x = 1\n"));

        // Somebody else's link, to a file of root's.
        lchown(real.join("link.toml"), Some(1000), None).unwrap();
        let text = refusal(&link);
        assert!(text.contains("link.toml belongs to uid 1000") && text.contains("chown -h root"), "{text}");

        // Root's link in a directory that others can write.
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        mode(&open, 0o777);
        symlink(real.join("config.toml"), open.join("config.toml")).unwrap();
        assert!(refusal(&open.join("config.toml")).contains("open is writable by"));

        // Root's link into a directory that others can write.
        fs::write(open.join("theirs.toml"), "x = 2\n").unwrap();
        symlink(open.join("theirs.toml"), real.join("out.toml")).unwrap();
        assert!(refusal(&real.join("out.toml")).contains("open is writable by"));
    }

    #[test]
    fn links_that_lead_nowhere_are_errors_not_absence() {
        let dir = root_directory();
        symlink("nowhere", dir.path().join("dangling.toml")).unwrap();
        let error = read(&dir.path().join("dangling.toml"), true).unwrap_err();
        assert!(format!("{error:#}").contains("nowhere"), "{error:#}");
        symlink("loop.toml", dir.path().join("loop.toml")).unwrap();
        assert!(refusal(&dir.path().join("loop.toml")).contains("symbolic links"));
    }

    #[test]
    fn what_is_not_a_bounded_text_file_is_refused() {
        let dir = root_directory();
        assert!(refusal(dir.path()).contains("not a regular file"));
        assert!(refusal(Path::new("/dev/null")).contains("not a regular file"));
        let fifo = dir.path().join("fifo.toml");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        assert!(refusal(&fifo).contains("not a regular file"));
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(read(&file.join("config.toml"), true).is_err());
        fs::write(&file, b"ok\n\xff\n").unwrap();
        assert!(refusal(&file).ends_with("file:2: not UTF-8 text"));
        fs::write(&file, vec![b'#'; SIZE_MAX as usize]).unwrap();
        assert!(read(&file, true).unwrap().is_some());
        fs::write(&file, vec![b'#'; SIZE_MAX as usize + 1]).unwrap();
        assert!(refusal(&file).contains("larger than"));
    }

    #[test]
    fn in_a_user_namespace_the_hosts_root_is_the_overflow_uid() {
        if let Some(path) = std::env::var_os(INSIDE) {
            let path = Path::new(&path);
            assert_eq!(read(path, false).unwrap().as_deref(), Some("x = 1\n"));
            assert!(refusal(path).contains("belongs to uid"));
            return;
        }
        let dir = root_directory();
        let path = dir.path().join("config.toml");
        fs::write(&path, "x = 1\n").unwrap();
        // Here, in the initial one, the same file is root's and so is not the overflow uid's.
        let text = read(&path, false).unwrap_err().to_string();
        assert!(
            text.contains("belongs to uid 0 of this user namespace") && text.contains("on the host, chown"),
            "{text}"
        );
        let (_, module) = module_path!().split_once("::").unwrap();
        let output = Command::new("unshare")
            .args(["--user", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{module}::in_a_user_namespace_the_hosts_root_is_the_overflow_uid")])
            .env(INSIDE, &path)
            .output()
            .expect("unshare(1) is missing: apt-get install util-linux");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
    }
}
