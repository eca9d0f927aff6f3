//! The command line of `node-tests`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser;
use reverbs_tests::{programs, report};

use crate::case::{self, Prepared, Setup};
use crate::{criu, enclosure, node_init, remote, slurm};

/// Run jobs over several nodes that are namespaces of this machine; needs root, changes nothing.
#[derive(Debug, Parser)]
#[command(name = "node-tests", version)]
struct Arguments {
    /// Folder with the `reverbs` command and the provider (made by `cargo xtask stage DIR`)
    #[arg(long, value_name = "DIR")]
    stage: Option<PathBuf>,
    /// Name the cases and do nothing
    #[arg(long)]
    list: bool,
    /// Compile the test programs into this folder and do nothing else
    #[arg(long, value_name = "DIR")]
    build: Option<PathBuf>,
    /// Folder of the compiled test programs
    #[arg(long, value_name = "DIR", default_value = "target/test-programs")]
    programs: PathBuf,
    /// Folder for the captured output, one folder a case
    #[arg(long, value_name = "DIR", default_value = "target/node-tests")]
    output: PathBuf,
    /// Only cases whose name contains one of these (`^PART`: begins with, `=NAME`: is)
    filter: Vec<String>,
}

/// Does what the command line says. The status tells whether all cases passed.
///
/// # Errors
/// When the arguments make no sense, or nothing could be run.
pub fn run() -> Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("rsh") => return Ok(remote::run(&words[1..])),
        Some("node-init") => {
            node_init::run(&node_init::Options::parse_from(&words))?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let arguments = Arguments::parse();
    if let Some(folder) = &arguments.build {
        programs::build(folder)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut cases = case::all();
    if !arguments.filter.is_empty() {
        cases.retain(|case| {
            arguments
                .filter
                .iter()
                .any(|filter| report::matches(&case.name, filter))
        });
    }
    let mut out = std::io::stdout().lock();
    if arguments.list {
        for case in &cases {
            writeln!(out, "{}", case.name)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if cases.is_empty() {
        bail!("no case has such a name; --list shows them");
    }
    // Inside there is no network to fetch them.
    let criu = criu::get()?;
    if cases.iter().any(|case| case.needs_slurm()) {
        slurm::get()?;
    }
    if !enclosure::is_inside() {
        for case in &cases {
            case.library().get(&arguments.programs)?;
        }
        drop(out);
        return enclosure::enter();
    }
    std::fs::create_dir_all(&arguments.output)?;
    let stage = arguments.stage.as_deref();
    let setup = Setup {
        stage: stage
            .map(|stage| enclosure::share(stage, "stage"))
            .transpose()?,
        programs: enclosure::share(&arguments.programs, "programs")?,
        output: enclosure::share(&arguments.output, "output")?,
        criu,
    };
    let prepared: Vec<_> = cases
        .iter()
        .map(|case| Prepared {
            case,
            setup: &setup,
        })
        .collect();
    match report::run_all(&prepared, &setup.output, &mut out)? {
        true => Ok(ExitCode::SUCCESS),
        false => Ok(ExitCode::FAILURE),
    }
}
