//! A lock that admits one local proxy for each state directory. Two would write the same entries into
//! the kubeconfig, and after the first stops, they would point to a port without a listener. For the
//! same reason a proxy of another state directory does not change entries whose own proxy is running.

use std::io::{Read as _, Seek as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

const LOCK: &str = "proxy.lock";

/// The lock. The kernel releases it with the process, however that ends.
pub(crate) struct InstanceLock(fs::File);

#[derive(Debug)]
pub(crate) enum LockError {
    /// Another process has it; `holder` is its process and address.
    Held {
        holder: String,
    },
    Io(io::Error),
}

impl InstanceLock {
    /// The lock file of a state directory.
    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join(LOCK)
    }

    /// Blocks for a moment at most.
    pub(crate) fn acquire(path: &Path) -> Result<Self, LockError> {
        let file = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(LockError::Io)?;
        match file.try_lock() {
            Ok(()) => {
                let mut lock = Self(file);
                lock.write_holder(&format!("process {}", std::process::id()));
                Ok(lock)
            }
            Err(fs::TryLockError::WouldBlock) => Err(LockError::Held {
                holder: read_holder(file),
            }),
            Err(fs::TryLockError::Error(source)) => Err(LockError::Io(source)),
        }
    }

    /// Records the address, for the error message of a second proxy.
    pub(crate) fn set_address(&mut self, addr: SocketAddr) {
        self.write_holder(&format!("process {}, on {addr}", std::process::id()));
    }

    fn write_holder(&mut self, text: &str) {
        let mut write = || -> io::Result<()> {
            self.0.rewind()?;
            self.0.set_len(0)?;
            self.0.write_all(text.as_bytes())
        };
        if let Err(error) = write() {
            tracing::debug!(%error, "cannot record the holder of the lock");
        }
    }
}

/// Process and address of the local proxy that runs with this state directory. `None` if there is
/// none, or if we may not enter the directory: then our kubectl cannot read its keys, either.
pub(crate) fn running(dir: &Path) -> Option<String> {
    let path = InstanceLock::path(dir);
    // Opening a pipe would block.
    if !fs::metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
        return None;
    }
    let file = fs::File::open(&path).ok()?;
    match file.try_lock_shared() {
        // A proxy that starts at this moment retries.
        Ok(()) => None,
        Err(_) => Some(read_holder(file)),
    }
}

/// For messages only, so errors are ignored.
fn read_holder(file: fs::File) -> String {
    let mut holder = String::new();
    let _ = file.take(256).read_to_string(&mut holder);
    holder.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_hears_of_the_first_and_may_follow_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = InstanceLock::path(dir.path());
        let mut first = InstanceLock::acquire(&path).unwrap();
        first.set_address("127.0.0.1:47611".parse().unwrap());
        let Err(LockError::Held { holder }) = InstanceLock::acquire(&path) else {
            panic!("a second holder");
        };
        assert!(holder.contains("127.0.0.1:47611"), "{holder}");
        assert!(holder.contains(&std::process::id().to_string()), "{holder}");
        let seen = running(dir.path()).unwrap();
        assert!(seen.contains("127.0.0.1:47611"), "{seen}");
        drop(first);
        assert_eq!(running(dir.path()), None);
        InstanceLock::acquire(&path).unwrap();
    }

    #[test]
    fn where_no_proxy_ever_was_none_runs() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(running(dir.path()), None);
        assert_eq!(running(&dir.path().join("absent")), None);
        fs::create_dir(dir.path().join(LOCK)).unwrap();
        assert_eq!(running(dir.path()), None);
    }
}
