//! Reading, changing and replacing the file itself.

use super::{Error, lock::Lock};
use serde_norway::{Mapping, Value};
use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

/// Far larger than any kubeconfig; reading more would be reading something else.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// Symbolic links to follow before it is taken for a loop, as Linux does.
const MAX_LINKS: usize = 40;

/// Changes the configuration in `path` under its lock. `change` says what is wrong with a
/// configuration that it cannot work with; the file is then as it was.
pub(super) fn edit(
    path: &Path,
    wait: Duration,
    change: impl FnOnce(&mut Mapping) -> Result<(), String>,
) -> Result<(), Error> {
    let unwritable = |source| Error::Unwritable {
        path: path.to_owned(),
        source,
    };
    let real = follow(path).map_err(unwritable)?;
    for parent in [path.parent(), real.parent()].into_iter().flatten() {
        if !parent.as_os_str().is_empty() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(unwritable)?;
        }
    }
    // kubectl locks the name it was given, so a file with two names has two locks.
    let _lock = Lock::take(path, path, wait)?;
    let _real_lock = (real != path)
        .then(|| Lock::take(path, &real, wait))
        .transpose()?;

    let (before, metadata) = read(path, &real)?;
    let mut config = parse(path, before.as_deref().unwrap_or_default())?;
    let untouched = config.clone();
    change(&mut config).map_err(|what| Error::Broken {
        path: path.to_owned(),
        what,
    })?;
    if config == untouched {
        return Ok(());
    }
    let text = serde_norway::to_string(&Value::Mapping(config)).map_err(|error| Error::Broken {
        path: path.to_owned(),
        what: error.to_string(),
    })?;
    replace(&real, text.as_bytes(), metadata.as_ref()).map_err(unwritable)
}

fn read(path: &Path, real: &Path) -> Result<(Option<String>, Option<fs::Metadata>), Error> {
    let unreadable = |source| Error::Unreadable {
        path: path.to_owned(),
        source,
    };
    let broken = |what: String| Error::Broken {
        path: path.to_owned(),
        what,
    };
    let metadata = match fs::metadata(real) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((None, None)),
        Err(error) => return Err(unreadable(error)),
    };
    // A pipe or a device would be read for ever, or replaced by a file.
    if !metadata.is_file() {
        return Err(broken("it is not a regular file".to_owned()));
    }
    if metadata.len() > MAX_FILE {
        return Err(broken(format!("it is larger than {MAX_FILE} bytes")));
    }
    let bytes = fs::read(real).map_err(unreadable)?;
    let text = String::from_utf8(bytes).map_err(|_| broken("it is not UTF-8 text".to_owned()))?;
    Ok((Some(text), Some(metadata)))
}

fn parse(path: &Path, text: &str) -> Result<Mapping, Error> {
    let broken = |what: String| Error::Broken {
        path: path.to_owned(),
        what,
    };
    match serde_norway::from_str(text).map_err(|error| broken(error.to_string()))? {
        Value::Null => Ok(Mapping::new()),
        Value::Mapping(mapping) => Ok(mapping),
        _ => Err(broken("its top level is not a mapping".to_owned())),
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

fn replace(real: &Path, content: &[u8], metadata: Option<&fs::Metadata>) -> io::Result<()> {
    let dir = match real.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    // A rename needs no right on the file itself; somebody who made it read-only meant it.
    if metadata.is_some() {
        fs::OpenOptions::new().append(true).open(real)?;
    }
    // tempfile makes its files 0600, which is what a new kubeconfig gets.
    let mut file = tempfile::Builder::new()
        .prefix(".throwline-")
        .tempfile_in(dir)?;
    file.write_all(content)?;
    if let Some(metadata) = metadata {
        file.as_file().set_permissions(metadata.permissions())?;
        let ours = file.as_file().metadata()?;
        if (ours.uid(), ours.gid()) != (metadata.uid(), metadata.gid()) {
            std::os::unix::fs::fchown(file.as_file(), Some(metadata.uid()), Some(metadata.gid()))?;
        }
    }
    file.as_file().sync_all()?;
    file.persist(real)?;
    Ok(())
}
