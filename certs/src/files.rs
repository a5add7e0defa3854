//! State files: private, whole or absent, and clear about what is wrong with them.
//!
//! The one place that makes, replaces and reads files of the state directories and files with
//! secrets that an operator names. A file is read only if no other user can have written it, as
//! OpenSSH has it for `~/.ssh`; a secret must not be readable by others either, by PostgreSQL's
//! rule for `ssl_key_file`, which a Kubernetes Secret in a pod can meet: 0600 for a file of one's
//! own, 0640 for one of root's.

use crate::{Error, error::Damage};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// Far above any state file of ours; a larger one is not ours.
const MAX_STATE_FILE: u64 = 4 * 1024 * 1024;

const WRITABLE: &str = "make the directory writable for this user, or choose another one";
const READABLE: &str = "make the file readable for this user";

/// What a file or directory holds, and so which access of others is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    /// State files. Others must not be able to replace them.
    Directory,
    /// What we act on: CA certificates, the relay's address. Others must not write it.
    Trusted,
    /// Keys, tokens, passwords. Others must not read it either.
    Secret,
}

/// What is wrong with the owner or the mode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exposed {
    /// Its owner, neither this process' user nor root, can change it at any time.
    Owner(u32),
    /// Group or others can write it.
    Writable(u32),
    /// Group or others can read it.
    Readable(u32),
}

impl Holds {
    /// Whether a file of user `owner` with the permission bits `mode` is fit for the user `us`.
    fn check(self, owner: u32, mode: u32, us: u32) -> Result<(), Exposed> {
        let mode = mode & 0o7777;
        if owner != us && owner != 0 {
            return Err(Exposed::Owner(owner));
        }
        if mode & 0o022 != 0 {
            return Err(Exposed::Writable(mode));
        }
        // Root's group is how a service is given a key that is not its own.
        let readable = if owner == us && owner != 0 {
            0o044
        } else {
            0o004
        };
        if self == Self::Secret && mode & readable != 0 {
            return Err(Exposed::Readable(mode));
        }
        Ok(())
    }
}

/// Makes `dir` and its parents if need be; what is made is open to its owner alone.
///
/// # Errors
/// [`Error::Exposed`] when `dir` is there already and other users could replace what is in it.
pub fn private_dir(dir: &Path) -> Result<(), Error> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder
        .create(dir)
        .map_err(|source| failed("create the directory", dir, source, WRITABLE))?;
    check_dir(dir)
}

/// The same check of a directory that need not be there.
///
/// # Errors
/// [`Error::Exposed`], as [`private_dir`]; or the directory cannot be looked at.
pub fn check_dir(dir: &Path) -> Result<(), Error> {
    match fs::metadata(dir) {
        Ok(metadata) => check(dir, &metadata, Holds::Directory),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(failed("look at", dir, source, READABLE)),
    }
}

/// Opens, and if need be makes, a file that only its owner can read. For locks and databases,
/// which are not replaced as a whole.
///
/// # Errors
/// [`Error::Exposed`] when the file is there already and is another user's, or open to others.
pub fn open_private(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let cannot_open = |source| failed("open", path, source, WRITABLE);
    let file = options.open(path).map_err(cannot_open)?;
    check(path, &file.metadata().map_err(cannot_open)?, Holds::Secret)?;
    Ok(file)
}

/// Replaces `path` with a file that only its owner can read. A reader, and a crash, see the old
/// file or the new one, never a part.
///
/// # Errors
/// The directory is missing, full or not writable; `path` is then as it was.
pub fn write_private(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let temporary = temporary_beside(path);
    let written = write_new(&temporary, contents).and_then(|()| {
        fs::rename(&temporary, path).inspect_err(|_| {
            // The first failure is the one to report.
            let _ = fs::remove_file(&temporary);
        })
    });
    written.map_err(|source| failed("write", path, source, WRITABLE))?;
    if let Some(dir) = path.parent().and_then(|dir| File::open(dir).ok()) {
        // The file is whole either way; not every file system can sync a directory.
        let _ = dir.sync_all();
    }
    Ok(())
}

/// Writes a secret to a path that an operator named: 0600, and never over a file that is there.
///
/// # Errors
/// There is such a file, or it cannot be made.
pub fn write_new_private(path: &Path, contents: &[u8]) -> Result<(), Error> {
    write_new(path, contents).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => {
            failed("write", path, source, "move it away, or name another file")
        }
        _ => failed("write", path, source, WRITABLE),
    })
}

/// The text in `path`, at most 4 MiB, or `None` when there is no such file.
///
/// # Errors
/// [`Error::Exposed`] when others can write the file; [`Error::Corrupt`] when it is too large.
pub fn read_text(path: &Path) -> Result<Option<String>, Error> {
    read(path, Holds::Trusted).map(|text| text.map(|mut text| std::mem::take(&mut *text)))
}

/// The same of a file with a secret, wiped from memory when it is dropped.
///
/// # Errors
/// [`Error::Exposed`] when others can read or write the file; [`Error::Corrupt`] when it is too
/// large.
pub fn read_secret(path: &Path) -> Result<Option<Zeroizing<String>>, Error> {
    read(path, Holds::Secret)
}

/// Whether others can read or write a file with secrets that is not ours to be strict about, such
/// as a kubeconfig: in words for a warning.
pub fn exposure(path: &Path) -> Option<Error> {
    let metadata = fs::metadata(path).ok()?;
    check(path, &metadata, Holds::Secret).err()
}

fn read(path: &Path, holds: Holds) -> Result<Option<Zeroizing<String>>, Error> {
    let unreadable = |source| failed("read", path, source, READABLE);
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(unreadable(source)),
    };
    // Of what was opened, not of what has the name by now.
    let metadata = file.metadata().map_err(unreadable)?;
    // A pipe, such as a shell's <(…), cannot be opened by another user.
    if metadata.is_file() {
        check(path, &metadata, holds)?;
    }
    let too_large = |length: u64| Error::Corrupt {
        path: path.to_owned(),
        source: Box::new(Damage::TooLarge { bytes: length }),
        hint: "this is not a file of Throwline's; move it away",
    };
    if metadata.len() > MAX_STATE_FILE {
        return Err(too_large(metadata.len()));
    }
    // Room for all of it, so that no smaller buffer with a part of a secret is given back unwiped.
    let room = usize::try_from(metadata.len())
        .unwrap_or_default()
        .max(4096)
        + 1;
    let mut text = Zeroizing::new(String::with_capacity(room));
    let mut bounded = (&mut file).take(MAX_STATE_FILE + 1);
    let length = bounded.read_to_string(&mut text).map_err(unreadable)?;
    if length as u64 > MAX_STATE_FILE {
        return Err(too_large(length as u64));
    }
    Ok(Some(text))
}

#[cfg(unix)]
fn check(path: &Path, metadata: &fs::Metadata, holds: Holds) -> Result<(), Error> {
    use std::os::unix::fs::MetadataExt;
    let us = rustix::process::geteuid().as_raw();
    holds
        .check(metadata.uid(), metadata.mode(), us)
        .map_err(|exposed| exposed.of(path, us, holds))
}

#[cfg(not(unix))]
fn check(_: &Path, _: &fs::Metadata, _: Holds) -> Result<(), Error> {
    Ok(())
}

impl Exposed {
    fn of(self, path: &Path, us: u32, holds: Holds) -> Error {
        let quoted = shell_quoted(&path.display().to_string());
        let mode = if holds == Holds::Directory {
            "700"
        } else {
            "600"
        };
        let (what, remedy) = match self {
            Self::Owner(owner) => (
                format!("belongs to another user (uid {owner}), and this process runs as uid {us}"),
                format!("run 'chown {us} {quoted}' if you trust what is in it"),
            ),
            Self::Writable(found) => (
                format!("can be written by other users (mode {found:04o})"),
                format!("run 'chmod {mode} {quoted}' if you trust what is in it"),
            ),
            Self::Readable(found) => (
                format!("holds a secret and can be read by other users (mode {found:04o})"),
                format!("run 'chmod {mode} {quoted}'"),
            ),
        };
        let remedy = match holds {
            // As an emptyDir of Kubernetes, which is root's with mode 0777.
            Holds::Directory => format!("{remedy}, or name a new directory inside it"),
            Holds::Trusted | Holds::Secret => remedy,
        };
        Error::Exposed {
            path: path.to_owned(),
            what,
            remedy,
        }
    }
}

/// As a shell takes it for one word.
fn shell_quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            quoted.push('?');
            continue;
        }
        if !c.is_alphanumeric() && !"/._-+=:@%,".contains(c) {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted
}

/// An [`Error::Io`] of this file.
pub fn failed(action: &'static str, path: &Path, source: io::Error, hint: &'static str) -> Error {
    Error::Io {
        action,
        path: path.to_owned(),
        source,
        hint,
    }
}

/// Leaves no part of it behind.
fn write_new(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    let written = file.write_all(contents).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written
}

fn temporary_beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{:016x}.tmp", rand::random::<u64>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_and_mode_decide() {
        use Exposed::{Owner, Readable, Writable};
        use Holds::{Directory, Secret, Trusted};
        const US: u32 = 1000;
        for (holds, owner, mode, want) in [
            (Directory, US, 0o40700, Ok(())),
            (Directory, US, 0o40755, Ok(())),
            // A Secret's mount in a pod: root's, and not writable for others.
            (Directory, 0, 0o40755, Ok(())),
            (Directory, US, 0o40777, Err(Writable(0o777))),
            (Directory, US, 0o40770, Err(Writable(0o770))),
            (Directory, 0, 0o41777, Err(Writable(0o1777))),
            (Directory, 1001, 0o40700, Err(Owner(1001))),
            (Trusted, US, 0o644, Ok(())),
            (Trusted, 0, 0o644, Ok(())),
            (Trusted, US, 0o664, Err(Writable(0o664))),
            (Trusted, 1001, 0o644, Err(Owner(1001))),
            (Secret, US, 0o600, Ok(())),
            (Secret, US, 0o400, Ok(())),
            (Secret, 0, 0o440, Ok(())),
            (Secret, 0, 0o640, Ok(())),
            (Secret, 0, 0o644, Err(Readable(0o644))),
            (Secret, US, 0o640, Err(Readable(0o640))),
            (Secret, US, 0o604, Err(Readable(0o604))),
            (Secret, US, 0o620, Err(Writable(0o620))),
            (Secret, US, 0o602, Err(Writable(0o602))),
            (Secret, 1001, 0o600, Err(Owner(1001))),
        ] {
            assert_eq!(
                holds.check(owner, mode, US),
                want,
                "{holds:?} {owner} {mode:o}"
            );
        }
        assert_eq!(Secret.check(0, 0o640, 0), Ok(()));
        assert_eq!(Secret.check(US, 0o600, 0), Err(Owner(US)));
    }

    #[cfg(unix)]
    fn with_mode(path: &Path, mode: u32) {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn what_others_can_change_or_read_is_refused_with_the_command_that_mends_it() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        private_dir(&dir).unwrap();
        let path = dir.join("a key");
        write_private(&path, b"secret").unwrap();
        for (mode, what, mended) in [
            (0o644, "can be read by other users (mode 0644)", 0o600),
            (0o660, "can be written by other users (mode 0660)", 0o600),
        ] {
            with_mode(&path, mode);
            for refused in [read_secret(&path).map(drop), open_private(&path).map(drop)] {
                let error = refused.unwrap_err().to_string();
                assert!(error.contains(what), "{error}");
                let remedy = format!("run 'chmod 600 {}/a\\ key'", dir.display());
                assert!(error.contains(&remedy), "{error}");
            }
            with_mode(&path, mended);
            assert_eq!(read_secret(&path).unwrap().unwrap().as_str(), "secret");
        }
        // What is no secret may be read by others, and not written.
        with_mode(&path, 0o644);
        assert!(read_text(&path).unwrap().is_some());
        with_mode(&path, 0o646);
        assert!(matches!(read_text(&path), Err(Error::Exposed { .. })));

        for (mode, is_fit) in [
            (0o755, true),
            (0o700, true),
            (0o777, false),
            (0o1777, false),
        ] {
            with_mode(&dir, mode);
            assert_eq!(private_dir(&dir).is_ok(), is_fit, "{mode:o}");
            assert_eq!(check_dir(&dir).is_ok(), is_fit, "{mode:o}");
        }
        let error = check_dir(&dir).unwrap_err().to_string();
        assert!(
            error.contains(&format!("chmod 700 {}", dir.display())),
            "{error}"
        );
        check_dir(&root.path().join("absent")).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn a_new_secret_replaces_nothing_and_a_pipe_is_read() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("token");
        write_new_private(&path, b"one").unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
        let error = write_new_private(&path, b"two").unwrap_err().to_string();
        assert!(error.contains("move it away"), "{error}");
        assert_eq!(read_secret(&path).unwrap().unwrap().as_str(), "one");

        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"piped").unwrap();
        drop(writer);
        let name = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        let piped = read_secret(Path::new(&name)).unwrap().unwrap();
        assert_eq!(piped.as_str(), "piped");
    }

    #[cfg(unix)]
    #[test]
    fn files_and_directories_are_private_and_leave_nothing_else() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        private_dir(&dir).unwrap();
        private_dir(&dir).unwrap();
        let path = dir.join("x");
        for text in ["one", "two"] {
            write_private(&path, text.as_bytes()).unwrap();
            assert_eq!(read_text(&path).unwrap().as_deref(), Some(text));
        }
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&path), 0o600);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_names_the_file_and_a_remedy() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("no/such/file");
        assert!(read_text(&missing).unwrap().is_none());
        let error = write_private(&missing, b"").unwrap_err().to_string();
        assert!(
            error.contains("no/such/file") && error.contains("writable"),
            "{error}"
        );
        let huge = root.path().join("huge");
        File::create(&huge)
            .unwrap()
            .set_len(MAX_STATE_FILE + 1)
            .unwrap();
        assert!(matches!(read_text(&huge), Err(Error::Corrupt { .. })));
    }
}
