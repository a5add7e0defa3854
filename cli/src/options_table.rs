//! docs/configuration.md, made from the definition of the command line.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Arg, ArgAction, Command, CommandFactory as _};

use crate::args::Cli;

/// Set, the test writes the file instead of comparing it.
const UPDATE: &str = "THROWLINE_UPDATE_DOCS";

const HEAD: &str = "\
# Configuration

Every option of the commands that run until they are stopped: `throwline relay`, `throwline agent` and `throwline proxy`.
`cargo xtask options` writes this file from the definition of the command line.

An option can be set in three places; the first that sets it wins:

1. the command line: `--max-carriers 1000`;
2. the environment: `THROWLINE_MAX_CARRIERS=1000`;
3. a TOML file that `--config FILE` (or `THROWLINE_CONFIG`) names: `max-carriers = 1000`.

In the file, a key is an option's name without its dashes. An option without a value is `true` or `false`; one that may be given
several times is a list. A key that is no option of the command is an error, and so is a file of more than 256 KiB. A duration is a
number with a unit, as `90s`, `5m`, `24h` or `7d`. What conflicts on the command line conflicts in the file.

```toml
# throwline relay --config /etc/throwline/relay.toml
listen = \"0.0.0.0:443\"
public-url = \"https://relay.example.com\"
state-dir = \"/var/lib/throwline\"
trust-proxy = [\"10.0.0.0/24\"]
drain-timeout = \"2m\"
```

Secrets stay out of it: a token and a database's URL have files of their own (`token-file`, `database-file`).
";

fn text() -> String {
    let mut definition = Cli::command();
    definition.build();
    let mut text = HEAD.to_owned();
    for name in ["relay", "agent", "proxy"] {
        let command = definition.find_subcommand(name).expect("a command");
        let _ = write!(text, "\n## throwline {name}\n");
        table(&mut text, command, |arg| !arg.is_global_set());
    }
    text.push_str("\n## All commands\n");
    table(&mut text, &definition, |_| true);
    text
}

fn table(text: &mut String, command: &Command, belongs: impl Fn(&Arg) -> bool) {
    text.push_str("\n| option | environment | default | meaning |\n|---|---|---|---|\n");
    let options = command.get_arguments().filter(|arg| belongs(arg));
    for arg in options.filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version")) {
        let Some(long) = arg.get_long() else { continue };
        let value = arg
            .get_value_names()
            .filter(|_| arg.get_action().takes_values());
        let value = value.map_or_else(String::new, |names| format!(" {}", names.join(" ")));
        let environment = arg
            .get_env()
            .map_or_else(String::new, |name| format!("`{}`", name.to_string_lossy()));
        let _ = writeln!(
            text,
            "| `--{long}{value}` | {environment} | {} | {} |",
            default(arg),
            meaning(arg)
        );
    }
}

fn default(arg: &Arg) -> String {
    if arg.is_required_set() {
        return "required".to_owned();
    }
    let values: Vec<_> = match arg.get_action() {
        ArgAction::SetTrue => Vec::new(),
        _ => arg
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy())
            .collect(),
    };
    match values.is_empty() {
        true => String::new(),
        false => format!("`{}`", values.join(",")),
    }
}

/// The whole help of an option, on one line.
fn meaning(arg: &Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help());
    let help = help.map_or_else(String::new, ToString::to_string);
    help.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace('|', "\\|")
}

#[test]
fn the_document_has_every_option() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let wanted = text();
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, wanted).expect("docs/configuration.md is written");
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "docs/configuration.md is not what the options are; write it with: cargo xtask options"
    );
}

/// One option has one name, one variable, and the same meaning of its value in every command.
#[test]
fn an_option_of_several_commands_is_the_same_in_each() {
    let definition = Cli::command();
    let mut seen = std::collections::HashMap::new();
    for name in ["relay", "agent", "proxy"] {
        let command = definition.find_subcommand(name).expect("a command");
        for arg in command.get_arguments() {
            let Some(long) = arg.get_long() else { continue };
            let kind = (
                arg.get_value_names().map(<[_]>::to_vec),
                arg.get_env().map(ToOwned::to_owned),
            );
            if long == "kubeconfig" {
                // Read by the agent, written by the local proxy.
                continue;
            }
            let before = seen.entry(long.to_owned()).or_insert_with(|| kind.clone());
            assert_eq!(*before, kind, "--{long} of {name}");
        }
    }
}
