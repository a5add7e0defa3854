//! Reading, locking and replacing the files themselves.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::error::{Error, Fault};
use super::lock::{Lock, LockWait};

/// Far larger than any kubeconfig; reading more would be reading something else.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// Symbolic links to follow before it is taken for a loop, as Linux does.
const MAX_LINKS: usize = 40;
/// What the file beside a kubeconfig that has what was in it before the last change is called.
const BACKUP: &str = ".throwline-backup";

/// Files that are locked against other writers while this lives, as far as they can be locked.
pub(super) struct Locked {
    /// What each file really is, or why it cannot be changed.
    files: HashMap<PathBuf, Result<PathBuf, Error>>,
    _locks: Vec<Lock>,
}

/// Locks all files that exist, and the one that will be created. Another file that cannot be locked
/// is an error only when it must be changed.
pub(super) fn lock(
    paths: &[PathBuf],
    default: usize,
    wait: &LockWait<'_>,
) -> Result<Locked, Error> {
    let mut files = HashMap::new();
    let mut locks = Vec::new();
    // Always in the same order, as kubectl does, so that two do not wait for one another.
    let mut order: Vec<usize> = (0..paths.len()).collect();
    order.sort_by_key(|at| &paths[*at]);
    for at in order {
        let path = &paths[at];
        if at != default && !path.exists() {
            continue;
        }
        match lock_one(path, at == default, wait) {
            Ok((real, new)) => {
                locks.extend(new);
                files.insert(path.clone(), Ok(real));
            }
            Err(error @ Error::Unwritable { .. }) if at != default => {
                files.insert(path.clone(), Err(error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Locked {
        files,
        _locks: locks,
    })
}

fn lock_one(path: &Path, make: bool, wait: &LockWait<'_>) -> Result<(PathBuf, Vec<Lock>), Error> {
    let unwritable = |source| Error::Unwritable {
        path: path.to_owned(),
        source,
    };
    let real = follow(path).map_err(unwritable)?;
    for parent in [path.parent(), real.parent()].into_iter().flatten() {
        if make && !parent.as_os_str().is_empty() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(unwritable)?;
        }
    }
    // kubectl locks the name it was given, so a file with two names has two locks.
    let mut locks = vec![Lock::take(path, path, wait)?];
    if real != path {
        locks.push(Lock::take(path, &real, wait)?);
    }
    Ok((real, locks))
}

impl Locked {
    /// The file's text; nothing if it is not there.
    pub(super) fn read(&self, path: &Path) -> Result<String, Error> {
        let real = match self.files.get(path) {
            Some(Ok(real)) => real,
            Some(Err(_)) => path,
            None => return Ok(String::new()),
        };
        let unreadable = |source| Error::Unreadable {
            path: path.to_owned(),
            source,
        };
        let broken = |fault| Error::Broken {
            path: path.to_owned(),
            source: Box::new(fault),
        };
        let metadata = match fs::metadata(real) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
            Err(error) => return Err(unreadable(error)),
        };
        // A read of a pipe or a device might never end, and the rename would replace it by a file.
        if !metadata.is_file() {
            return Err(broken(Fault::NotAFile));
        }
        if metadata.len() > MAX_FILE {
            return Err(broken(Fault::TooLarge { limit: MAX_FILE }));
        }
        let bytes = fs::read(real).map_err(unreadable)?;
        String::from_utf8(bytes).map_err(|_| broken(Fault::NotText))
    }

    /// Puts another content into the file. What was in it is kept beside it: where, if it was there.
    pub(super) fn replace(&self, path: &Path, content: &str) -> Result<Option<PathBuf>, Error> {
        let unwritable = |source| Error::Unwritable {
            path: path.to_owned(),
            source,
        };
        let real = match self.files.get(path) {
            Some(Ok(real)) => real,
            Some(Err(Error::Unwritable { source, .. })) => {
                return Err(unwritable(io::Error::new(
                    source.kind(),
                    source.to_string(),
                )));
            }
            _ => return Err(unwritable(io::Error::other("it is not locked"))),
        };
        replace(real, content.as_bytes()).map_err(unwritable)
    }
}

/// The file at the end of the symbolic links, which need not exist: renaming over a link would
/// replace the link and leave the file.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.file_type().is_symlink() => {
                let target = fs::read_link(&path)?;
                path = match path.parent() {
                    Some(parent) => parent.join(target),
                    None => target,
                };
            }
            Ok(_) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path),
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

fn replace(real: &Path, content: &[u8]) -> io::Result<Option<PathBuf>> {
    let dir = match real.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let metadata = match fs::metadata(real) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Not over a file that another program has made since the check.
            written(dir, content)?.persist_noclobber(real)?;
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // A rename needs no permission on the file itself, but a read-only file must stay unchanged.
    let mut old = fs::OpenOptions::new().read(true).write(true).open(real)?;
    let mut backup = OsString::from(real);
    backup.push(BACKUP);
    let backup = PathBuf::from(backup);
    // 0600, whatever the mode of the original: only its owner needs the backup.
    let mut copy = written(dir, &[])?;
    io::copy(&mut old, copy.as_file_mut())?;
    copy.as_file().sync_all()?;
    // Durable before the file itself is touched, so that one whole copy exists at each moment.
    copy.persist(&backup)?;

    let file = written(dir, content)?;
    file.as_file().set_permissions(metadata.permissions())?;
    let ours = file.as_file().metadata()?;
    let (uid, gid) = (metadata.uid(), metadata.gid());
    // A file of another user that we may write keeps its owner.
    let stays = (ours.uid(), ours.gid()) == (uid, gid)
        || std::os::unix::fs::fchown(file.as_file(), Some(uid), Some(gid)).is_ok();
    file.as_file().sync_all()?;
    // A file of several names keeps them, as with kubectl.
    if !stays || metadata.nlink() > 1 {
        write_in_place(&mut old, content)?;
        return Ok(Some(backup));
    }
    match file.persist(real) {
        Ok(_) => {}
        // The file is a mount point, as in containers, and cannot be replaced by a rename.
        Err(error) if error.error.kind() == io::ErrorKind::ResourceBusy => {
            write_in_place(&mut old, content)?;
        }
        Err(error) => return Err(error.error),
    }
    Ok(Some(backup))
}

/// A new file, 0600, on its way to its name.
fn written(dir: &Path, content: &[u8]) -> io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::Builder::new()
        .prefix(".throwline-")
        .tempfile_in(dir)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// As kubectl writes: a reader that does not take the lock may see a part of it.
fn write_in_place(file: &mut fs::File, content: &[u8]) -> io::Result<()> {
    file.rewind()?;
    file.write_all(content)?;
    file.set_len(content.len() as u64)?;
    file.sync_all()
}
