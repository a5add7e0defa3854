//! The TOML file of a long-running command: each key is an option's name without its dashes.
//!
//! The file's values become arguments of the command, but for options that the command line or the
//! environment sets. So a value is checked in one way, wherever it is set, and what conflicts on the
//! command line conflicts here.

use std::ffi::OsString;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Command};
use toml::{Table, Value};

/// A file is not larger: 256 KiB.
const LARGEST: u64 = 256 * 1024;

/// The option that names the file.
const OPTION: &str = "config";

/// What is wrong with a file. The messages name it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the configuration file {} is larger than {LARGEST} bytes", path.display())]
    TooLarge { path: PathBuf },
    #[error("the configuration file {} is not valid TOML", path.display())]
    Syntax {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error(
        "the configuration file {} has the key {key:?}, which is no option of \"throwline {command}\"{}",
        path.display(),
        .similar.as_ref().map(|name| format!("; did you mean {name:?}?")).unwrap_or_default()
    )]
    UnknownKey {
        path: PathBuf,
        key: String,
        command: String,
        similar: Option<String>,
    },
    #[error("the configuration file {}: {key:?} must be {expected}", path.display())]
    Type {
        path: PathBuf,
        key: String,
        expected: &'static str,
    },
}

/// What is wrong with the file of a command.
#[derive(Debug)]
pub(crate) struct Rejected {
    /// The command's name.
    pub(crate) command: String,
    pub(crate) source: Error,
}

/// Arguments with those of the configuration file among them.
pub(crate) struct Arguments {
    pub(crate) all: Vec<OsString>,
    /// The file, if one was read.
    pub(crate) file: Option<PathBuf>,
}

/// Adds the options of the file that `--config` of the command names, if it does.
///
/// # Errors
///
/// The file cannot be read, is larger than 256 KiB, is not TOML, or has a key or a type that does not
/// belong to the command.
pub(crate) fn arguments(definition: &Command, given: Vec<OsString>) -> Result<Arguments, Rejected> {
    let unchanged = |all| Arguments { all, file: None };
    // What is required may be in the file, and what is wrong is reported by the parse that follows.
    let lenient = definition.clone().ignore_errors(true);
    let Ok(matches) = lenient.try_get_matches_from(&given) else {
        return Ok(unchanged(given));
    };
    let Some((name, own)) = matches.subcommand() else {
        return Ok(unchanged(given));
    };
    let Some(command) = definition.find_subcommand(name) else {
        return Ok(unchanged(given));
    };
    let path = own.try_get_one::<PathBuf>(OPTION).ok().flatten();
    let Some(path) = path.cloned() else {
        return Ok(unchanged(given));
    };
    let added = added(definition, command, own, &path).map_err(|source| Rejected {
        command: name.to_owned(),
        source,
    })?;
    Ok(Arguments {
        all: with(given, added),
        file: Some(path),
    })
}

/// The file's options, but for those that are `given`.
fn added(
    definition: &Command,
    command: &Command,
    given: &ArgMatches,
    path: &Path,
) -> Result<Vec<OsString>, Error> {
    let table = read(path)?;
    let mut added = Vec::new();
    for (key, value) in &table {
        let option = options(definition, command).find(|option| is_named(option, key));
        let Some(option) = option.filter(|_| key != OPTION) else {
            return Err(unknown(definition, command, path, key));
        };
        let values = values(option, value).map_err(|expected| Error::Type {
            path: path.to_owned(),
            key: key.clone(),
            expected,
        })?;
        if !is_given(given, option.get_id().as_str()) {
            added.extend(values.into_iter().map(OsString::from));
        }
    }
    Ok(added)
}

/// The command's options, and those of every command.
fn options<'c>(
    definition: &'c Command,
    command: &'c Command,
) -> impl Iterator<Item = &'c clap::Arg> {
    let global = definition.get_arguments().filter(|arg| arg.is_global_set());
    command.get_arguments().chain(global)
}

/// By its name, or by one that it had in an older version.
fn is_named(option: &clap::Arg, key: &str) -> bool {
    let older = option.get_all_aliases().unwrap_or_default();
    option.get_long() == Some(key) || older.contains(&key)
}

fn is_given(matches: &ArgMatches, id: &str) -> bool {
    matches!(
        matches.value_source(id),
        Some(ValueSource::CommandLine | ValueSource::EnvVariable)
    )
}

fn read(path: &Path) -> Result<Table, Error> {
    let read = || {
        let mut text = String::new();
        let file = std::fs::File::open(path)?;
        file.take(LARGEST + 1).read_to_string(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    if text.len() as u64 > LARGEST {
        return Err(Error::TooLarge {
            path: path.to_owned(),
        });
    }
    text.parse().map_err(|source| Error::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// The arguments that set an option to the file's value; what was expected of it otherwise.
fn values(option: &clap::Arg, value: &Value) -> Result<Vec<String>, &'static str> {
    let long = option.get_long().unwrap_or_default();
    if !option.get_action().takes_values() {
        return match value {
            Value::Boolean(true) => Ok(vec![format!("--{long}")]),
            Value::Boolean(false) => Ok(Vec::new()),
            _ => Err("true or false"),
        };
    }
    let set = |value: &Value| match value {
        // One argument, so that a value which begins with a dash is not taken for an option.
        Value::String(text) => Some(format!("--{long}={text}")),
        Value::Integer(number) => Some(format!("--{long}={number}")),
        Value::Boolean(truth) => Some(format!("--{long}={truth}")),
        _ => None,
    };
    match (value, option.get_action()) {
        (Value::Array(list), ArgAction::Append) => list
            .iter()
            .map(|value| set(value).ok_or("a list of strings"))
            .collect(),
        (value, ArgAction::Append) => Ok(vec![set(value).ok_or("a string or a list of them")?]),
        (value, _) => Ok(vec![set(value).ok_or("a string or a whole number")?]),
    }
}

/// Before what follows `--`, which is not ours.
fn with(mut given: Vec<OsString>, added: Vec<OsString>) -> Vec<OsString> {
    let end = given.iter().position(|argument| argument == "--");
    let end = end.unwrap_or(given.len());
    given.splice(end..end, added);
    given
}

fn unknown(definition: &Command, command: &Command, path: &Path, key: &str) -> Error {
    let plain = |text: &str| text.replace(['-', '_'], "").to_lowercase();
    let similar = options(definition, command)
        .filter_map(clap::Arg::get_long)
        .find(|long| plain(long) == plain(key));
    Error::UnknownKey {
        path: path.to_owned(),
        key: key.to_owned(),
        command: command.get_name().to_owned(),
        similar: similar.map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;
    use crate::args::{self, Cli};

    const RELAY: &str = r#"
        listen = "[::]:8443"
        public-url = "https://relay.example.com"
        state-dir = "/var/lib/throwline"
        drain-timeout = "7m"
        max-carriers = 12
        trust-proxy = ["10.0.0.5", "10.1.0.0/16"]
        proxy-protocol = true
        plaintext = false
        log-format = "json"
    "#;

    fn parsed(file: &str, words: &str) -> Result<Cli, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("throwline.toml");
        std::fs::write(&path, file).unwrap();
        let words = words.replace("FILE", path.to_str().unwrap());
        let given = words.split(' ').map(OsString::from).collect();
        let arguments = arguments(&Cli::command(), given);
        let arguments = arguments.map_err(|rejected| rejected.source.to_string())?;
        assert_eq!(arguments.file.as_deref(), Some(path.as_path()));
        Cli::try_parse_from(arguments.all).map_err(|error| error.to_string())
    }

    #[test]
    fn a_key_of_an_older_version_is_accepted() {
        let file = "registry-belief = \"3m\"\nlisten = \"[::]:1\"\npublic-url = \"https://r\"\nstate-dir = \"d\"";
        let args = relay(file, "throwline relay --config FILE").unwrap();
        assert_eq!(args.registry_max_staleness.as_secs(), 180);
    }

    fn relay(file: &str, words: &str) -> Result<Box<args::Relay>, String> {
        match parsed(file, words)?.command {
            args::Command::Relay(relay) => Ok(relay),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_sets_what_the_command_line_does_not() {
        let read = relay(RELAY, "throwline relay --config FILE").unwrap();
        assert_eq!(read.listen.port(), 8443);
        assert_eq!(read.drain_timeout.as_secs(), 420);
        assert_eq!(read.max_carriers, Some(12));
        assert_eq!(read.trusted_proxies.len(), 2);
        assert!(read.proxy_protocol && !read.plaintext);
        let cli = parsed(RELAY, "throwline relay --config FILE").unwrap();
        assert!(matches!(cli.global.log_format, args::LogFormat::Json));

        let flags =
            "throwline --log-format text relay --config=FILE --max-carriers 3 --trust-proxy ::1";
        let read = relay(RELAY, flags).unwrap();
        assert_eq!(read.max_carriers, Some(3));
        assert_eq!(read.trusted_proxies.len(), 1);
        let cli = parsed(RELAY, flags).unwrap();
        assert!(matches!(cli.global.log_format, args::LogFormat::Text));
    }

    #[test]
    fn what_conflicts_on_the_command_line_conflicts_in_a_file() {
        let file = format!("{RELAY}\ntls-cert = \"a\"\ntls-key = \"b\"");
        let error = relay(&file, "throwline relay --config FILE --plaintext").unwrap_err();
        assert!(error.contains("cannot be used with"), "{error}");
        let file = format!("{RELAY}\ntls-cert = \"a\"");
        let error = relay(&file, "throwline relay --config FILE").unwrap_err();
        assert!(error.contains("--tls-key"), "{error}");
    }

    #[test]
    fn a_wrong_file_is_refused_with_its_name() {
        for (file, told) in [
            ("max_carriers = 3", "did you mean \"max-carriers\"?"),
            ("flux-capacitor = 1", "no option of \"throwline relay\""),
            ("config = \"other\"", "no option"),
            ("max-carriers = ", "not valid TOML"),
            ("plaintext = \"yes\"", "must be true or false"),
            (
                "max-carriers = [1, 2]",
                "must be a string or a whole number",
            ),
            ("max-carriers = 1.5", "must be a string or a whole number"),
            ("trust-proxy = [[1]]", "must be a list of strings"),
            ("[relay]\nlisten = 1", "no option"),
        ] {
            let error = relay(file, "throwline relay --config FILE").unwrap_err();
            assert!(
                error.contains(told) && error.contains("throwline.toml"),
                "{file}: {error}"
            );
        }
        let error = relay("listen = \"--plaintext\"", "throwline relay --config FILE");
        assert!(error.unwrap_err().contains("--listen"));
        let large = "#".repeat(300 * 1024);
        let error = relay(&large, "throwline relay --config FILE").unwrap_err();
        assert!(error.contains("larger than"), "{error}");
    }

    #[test]
    fn without_a_file_nothing_changes() {
        for words in [
            "throwline relay --listen [::]:1",
            "throwline clusters",
            "throwline --help",
            "throwline",
            "throwline nonsense",
        ] {
            let given: Vec<OsString> = words.split(' ').map(OsString::from).collect();
            let arguments = arguments(&Cli::command(), given.clone()).unwrap();
            assert_eq!((arguments.all, arguments.file), (given, None));
        }
        let given = ["throwline", "agent", "--config", "/nonexistent/file"];
        let given = given.map(OsString::from).to_vec();
        let rejected = arguments(&Cli::command(), given).err().unwrap();
        assert_eq!(rejected.command, "agent");
        assert!(matches!(rejected.source, Error::Read { .. }));
    }
}
