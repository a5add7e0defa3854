//! The one binary, `throwline`: parses what a person typed, calls one part, and turns its outcome
//! into an exit code: 0, 1 for a failure, 2 for wrong usage.

mod args;
mod commands;
mod output;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, LogFormat};

fn main() -> ExitCode {
    // Wrong usage ends in here: clap prints what is wrong and exits with 2.
    let cli = Cli::parse();
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
        output::failure(&anyhow::Error::new(error).context("cannot set up logging"));
        return ExitCode::from(2);
    }
    throwline_ops::memory::keep_freed();
    throwline_certs::tls::provide_to_libraries();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = commands::threads(&cli.command) {
        runtime.worker_threads(threads.into());
    }
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::failure(&anyhow::Error::new(error).context("cannot start the runtime"));
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(commands::run(cli.command));
    // Nothing that still runs may hold up the exit, such as a read of standard input.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(error) => {
            output::failure(&error);
            ExitCode::FAILURE
        }
    }
}
