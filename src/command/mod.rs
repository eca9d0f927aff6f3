//! What the `reverbs` command does, one module for each subcommand, over `nodes` (all nodes of a job), `node` (what is done
//! on each), `job` (processes, agents, phases), `reverbs::image` (what a checkpoint leaves on disk), `files` (what CRIU does
//! not carry), `network` (what becomes of TCP) and `criu`.

mod checkpoint;
mod cli;
mod criu;
mod cycle;
mod files;
mod fits;
mod inspect;
mod interrupt;
mod job;
mod network;
mod node;
mod nodes;
mod preflight;
mod progress;
mod requeue;
mod restart;
mod resume;
mod run;
mod secret;
mod status;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

/// Exit status of everything that failed but a command line that could not be read (2, clap's).
const FAILED: u8 = 1;

/// Runs the command line and gives its exit status: 0 if all of what was asked happened.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("REVERBS_LOG"))
        .init();
    let outcome = match cli.command {
        Command::Run(options) => run::run(&options, cli.quiet),
        Command::Checkpoint(options) => checkpoint::checkpoint(&options, cli.quiet),
        Command::Restart(options) => restart::restart(&options, cli.quiet),
        Command::Inspect(options) => inspect::inspect(&options),
        Command::Cycle(options) => cycle::cycle(&options, cli.quiet),
        Command::Resume(options) => resume::resume(&options, cli.quiet),
        Command::Status(options) => status::status(&options),
        Command::Fits { device } => fits::fits(&device),
        Command::Remote { host, command } => nodes::start::remote(&host, &command),
        Command::Node { start: true, .. } => nodes::start::start_here(),
        Command::Node { copy: true, .. } => nodes::serve_copy(),
        Command::Node { .. } => nodes::serve(),
    };
    outcome.unwrap_or_else(|error| {
        // One line: tools and people look for it.
        eprintln!("reverbs: {error:#}");
        ExitCode::from(FAILED)
    })
}
