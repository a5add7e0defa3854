//! kubectl's own lock: a file `FILE.lock` made with O_EXCL, removed when done (client-go,
//! `tools/clientcmd/loader.go`).

use super::Error;
use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

/// How often to look whether the other program is done.
const POLL: Duration = Duration::from_millis(25);

/// Held while it lives.
#[derive(Debug)]
pub(super) struct Lock(PathBuf);

impl Lock {
    /// Locks `file`; errors speak of `shown`, the name the user gave. Blocks for at most `wait`.
    pub(super) fn take(shown: &Path, file: &Path, wait: Duration) -> Result<Self, Error> {
        let lock = lock_name(file);
        let deadline = Instant::now() + wait;
        loop {
            let made = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&lock);
            match made {
                Ok(_) => return Ok(Self(lock)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => {
                    let path = shown.to_owned();
                    return Err(Error::Unwritable { path, source });
                }
            }
            if Instant::now() >= deadline {
                let age = age(&lock).unwrap_or_default();
                let path = shown.to_owned();
                return Err(Error::Locked { path, lock, age });
            }
            thread::sleep(POLL);
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(lock = %self.0.display(), %error, "cannot remove the kubeconfig's lock");
        }
    }
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
