//! kubectl's own lock: a file `FILE.lock` made with O_EXCL, removed when done (client-go,
//! `tools/clientcmd/loader.go`).
//!
//! Such a file outlives a process that was killed, and then blocks every writer. Ours therefore holds
//! a marker and is locked with flock(2) as well, which the kernel releases when the process ends: a
//! file with our marker that is not locked is taken over.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};
use std::{fs, io, thread};

use super::error::Error;

/// How often to look whether the other program is done.
const POLL: Duration = Duration::from_millis(25);
/// How the content of our lock files begins. kubectl's are empty.
const OURS: &str = "throwline ";

/// How long to wait for the lock of another program.
pub(super) struct LockWait<'a> {
    pub(super) limit: Duration,
    pub(super) stop: &'a AtomicBool,
}

/// Held while it lives.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    /// Holds the flock.
    file: fs::File,
}

impl Lock {
    /// Locks `file`; errors name `shown`, the name the user gave. Blocks as long as `wait` allows.
    pub(super) fn take(shown: &Path, file: &Path, wait: &LockWait<'_>) -> Result<Self, Error> {
        let path = lock_name(file);
        let deadline = Instant::now() + wait.limit;
        let unwritable = |source| Error::Unwritable {
            path: shown.to_owned(),
            source,
        };
        loop {
            match Self::make(&path) {
                Ok(lock) => return Ok(lock),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(unwritable(source)),
            }
            if let Some(lock) = Self::take_over(&path) {
                tracing::debug!(lock = %path.display(), "a lock of a process that was killed is taken over");
                return Ok(lock);
            }
            if wait.stop.load(Ordering::Acquire) {
                return Err(Error::Stopped);
            }
            if Instant::now() >= deadline {
                let age = age(&path).unwrap_or_default();
                return Err(Error::Locked {
                    path: shown.to_owned(),
                    lock: path,
                    age,
                });
            }
            thread::sleep(POLL);
        }
    }

    /// The file appears with its content and its flock, so it is never an unlocked file with our marker.
    fn make(path: &Path) -> io::Result<Self> {
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        // Most of the time that others hold it.
        if fs::symlink_metadata(path).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let mut temporary = tempfile::Builder::new()
            .prefix(".throwline-")
            .tempfile_in(dir)?;
        claim(temporary.as_file_mut())?;
        match fs::hard_link(temporary.path(), path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(error),
            // A file system without hard links: a process that is killed before the next line has
            // run leaves a lock for the user to remove.
            Err(_) => {
                let mut file = fs::OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(path)?;
                claim(&mut file)?;
                return Ok(Self {
                    path: path.to_owned(),
                    file,
                });
            }
        }
        Ok(Self {
            path: path.to_owned(),
            file: temporary.into_file(),
        })
    }

    /// Takes a lock file with our marker that is not locked.
    fn take_over(path: &Path) -> Option<Self> {
        let file = fs::OpenOptions::new().read(true).open(path).ok()?;
        let mut content = String::new();
        (&file).take(64).read_to_string(&mut content).ok()?;
        if !content.starts_with(OURS) || file.try_lock().is_err() {
            return None;
        }
        let lock = Self {
            path: path.to_owned(),
            file,
        };
        // The previous holder may have removed it before it released it; then this file is no lock any more.
        if lock.is_there() {
            return Some(lock);
        }
        None
    }

    fn is_there(&self) -> bool {
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let there = fs::symlink_metadata(&self.path).map(id);
        let ours = self.file.metadata().map(id);
        matches!((there, ours), (Ok(there), Ok(ours)) if there == ours)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // If ours was removed by hand, the file there belongs to another process.
        if !self.is_there() {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(lock = %self.path.display(), %error, "cannot remove the kubeconfig's lock");
        }
    }
}

fn claim(file: &mut fs::File) -> io::Result<()> {
    file.lock()?;
    writeln!(file, "{OURS}{}", std::process::id())
}

fn lock_name(file: &Path) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(".lock");
    PathBuf::from(name)
}

fn age(lock: &Path) -> Option<Duration> {
    let made = fs::metadata(lock).ok()?.modified().ok()?;
    let age = SystemTime::now().duration_since(made).ok()?;
    Some(Duration::from_secs(age.as_secs()))
}
