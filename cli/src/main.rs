//! The one binary, `throwline`: parses what a person typed, calls one part, and turns its outcome
//! into an exit code: 0, 1 for a failure, 2 for wrong usage.

mod args;
mod commands;
mod config_file;
mod memory;
#[cfg(test)]
mod options_table;
mod output;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::args::{Cli, LogFormat};

fn main() -> ExitCode {
    let given = std::env::args_os().collect();
    let arguments = match config_file::arguments(&Cli::command(), given) {
        Ok(arguments) => arguments,
        Err(error) => {
            let component = format!("throwline {}", error.command);
            output::failure(&component, &error.source.into());
            return ExitCode::from(2);
        }
    };
    let cli = match Cli::try_parse_from(arguments.all) {
        Ok(cli) => cli,
        // Help and the version too: clap prints them, or what is wrong, and has the exit code.
        Err(error) => {
            let _ = error.print();
            if let (Some(file), true) = (arguments.file, error.use_stderr()) {
                eprintln!("\nSome of these options are from {}.", file.display());
            }
            return u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
        }
    };
    let component = commands::component(&cli.command);
    let format = match cli.global.log_format {
        LogFormat::Text => throwline_ops::telemetry::LogFormat::Text,
        LogFormat::Json => throwline_ops::telemetry::LogFormat::Json,
    };
    let filter = cli
        .global
        .log
        .clone()
        .unwrap_or_else(|| commands::default_filter(&cli.command).to_owned());
    if let Err(error) = throwline_ops::telemetry::init(format, &filter) {
        output::failure(
            component,
            &anyhow::Error::new(error).context("cannot set up logging"),
        );
        return ExitCode::from(2);
    }
    if !cli.global.core_dumps {
        throwline_ops::core_dumps::forbid();
    }
    throwline_certs::tls::provide_to_libraries();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = commands::threads(&cli.command) {
        runtime.worker_threads(threads.into());
    }
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::failure(
                component,
                &anyhow::Error::new(error).context("cannot start the runtime"),
            );
            return ExitCode::FAILURE;
        }
    };
    runtime.spawn(memory::give_back_regularly());
    let outcome = runtime.block_on(commands::run(cli.command));
    // Nothing that still runs may hold up the exit, such as a read of standard input.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(error) => {
            output::failure(component, &error);
            ExitCode::FAILURE
        }
    }
}
