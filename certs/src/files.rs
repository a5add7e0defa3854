//! State files: private, whole or absent, and clear about what is wrong with them.

use crate::Error;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Far above any state file of ours; a larger one is not ours.
const MAX_STATE_FILE: u64 = 1024 * 1024;

const WRITABLE: &str = "make the directory writable for this user, or choose another one";
const READABLE: &str = "make the file readable for this user";

/// Makes `dir` and its parents if need be; what is made is open to its owner alone.
pub(crate) fn private_dir(dir: &Path) -> Result<(), Error> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder
        .create(dir)
        .map_err(|source| failed("create the directory", dir, source, WRITABLE))
}

/// Opens, and if need be makes, a file that only its owner can read.
pub(crate) fn open_private(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
        .open(path)
        .map_err(|source| failed("open", path, source, WRITABLE))
}

/// Replaces `path` with a file that only its owner can read. A reader, and a crash, see the old
/// file or the new one, never a part.
pub(crate) fn write_private(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let temporary = temporary_beside(path);
    let written = write_new(&temporary, contents).and_then(|()| fs::rename(&temporary, path));
    if let Err(source) = written {
        // The first failure is the one to report.
        let _ = fs::remove_file(&temporary);
        return Err(failed("write", path, source, WRITABLE));
    }
    if let Some(dir) = path.parent().and_then(|dir| File::open(dir).ok()) {
        // The file is whole either way; not every file system can sync a directory.
        let _ = dir.sync_all();
    }
    Ok(())
}

/// The text in `path`, or `None` when there is no such file.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>, Error> {
    let length = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed("read", path, source, READABLE)),
    };
    if length > MAX_STATE_FILE {
        return Err(Error::Corrupt {
            path: path.to_owned(),
            what: format!("it has {length} bytes"),
            hint: "this is not a file of Throwline's; move it away",
        });
    }
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) => Err(failed("read", path, source, READABLE)),
    }
}

pub(crate) fn failed(
    action: &'static str,
    path: &Path,
    source: io::Error,
    hint: &'static str,
) -> Error {
    Error::Io {
        action,
        path: path.to_owned(),
        source,
        hint,
    }
}

/// A time as people and logs read it.
pub(crate) fn show(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    });
    time::OffsetDateTime::from_unix_timestamp(seconds)
        .ok()
        .and_then(|time| {
            time.format(&time::format_description::well_known::Rfc3339)
                .ok()
        })
        .unwrap_or_else(|| format!("{seconds} s after 1970"))
}

/// A span of time as people read it: `9 min 40 s`, `3 h 5 min`, `2 d 1 h`.
pub(crate) fn show_span(span: Duration) -> String {
    let seconds = span.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

fn write_new(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(contents)?;
    file.sync_all()
}

fn temporary_beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{:016x}.tmp", rand::random::<u64>()))
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn spans_read_well() {
        for (seconds, text) in [
            (5, "5 s"),
            (600, "10 min 0 s"),
            (7260, "2 h 1 min"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(show_span(Duration::from_secs(seconds)), text);
        }
    }
}
