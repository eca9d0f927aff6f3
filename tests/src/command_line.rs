//! The command line of `guest-tests`.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;

use crate::setup::{Mode, Setup};
use crate::{case, programs, report};

/// Run the device tests; meant for the test machine (`cargo xtask vm -- guest-tests ...`).
#[derive(Debug, Parser)]
#[command(name = "guest-tests", version)]
struct Arguments {
    /// Run on the bare device, without the provider
    #[arg(long, conflicts_with = "stage")]
    bare: bool,
    /// Run through the provider of this folder (made by `cargo xtask stage DIR`)
    #[arg(long, value_name = "DIR")]
    stage: Option<PathBuf>,
    /// Name the cases and do nothing
    #[arg(long)]
    list: bool,
    /// Compile the test programs into this folder and do nothing else (on the host: it is slow in
    /// the test machine)
    #[arg(long, value_name = "DIR")]
    build: Option<PathBuf>,
    /// Folder of the compiled test programs
    #[arg(long, value_name = "DIR", default_value = "target/test-programs")]
    programs: PathBuf,
    /// Folder for the captured output, one folder a case
    #[arg(long, value_name = "DIR", default_value = "/tmp/guest-tests")]
    output: PathBuf,
    /// RDMA device
    #[arg(long, default_value = "rxe0")]
    device: String,
    /// GID index on the device
    #[arg(long, default_value_t = 1)]
    gid_index: u32,
    /// How often the cycle cases cycle
    #[arg(long, default_value_t = 200)]
    cycles: u32,
    /// Milliseconds from the start of one cycle to the start of the next
    #[arg(long, default_value_t = 100)]
    pace: u64,
    /// Seed of the matrix cases: content of messages, moments of cycles (default: from the clock; shown with each case)
    #[arg(long)]
    seed: Option<u64>,
    /// The machine's clock counts instructions (`cargo xtask vm -i`)
    #[arg(long)]
    counting: bool,
    /// Only cases whose name contains one of these (`^PART`: begins with, `=NAME`: is)
    filter: Vec<String>,
}

/// Does what the command line says. True when all cases passed.
///
/// # Errors
/// When the arguments make no sense, or nothing could be run.
pub fn run() -> Result<bool> {
    let arguments = Arguments::parse();
    let mut out = std::io::stdout().lock();
    if let Some(folder) = &arguments.build {
        programs::build(folder)?;
        return Ok(true);
    }
    let mut cases = case::all();
    if !arguments.filter.is_empty() {
        cases.retain(|case| {
            arguments
                .filter
                .iter()
                .any(|part| report::matches(&case.name, part))
        });
    }
    if arguments.list {
        for case in &cases {
            writeln!(out, "{}", case.name)?;
        }
        return Ok(true);
    }
    if cases.is_empty() {
        bail!("no case has such a name; --list shows them");
    }
    let mode = match (arguments.bare, arguments.stage) {
        (true, _) => Mode::Bare,
        (false, Some(stage)) => Mode::Provider {
            stage: std::path::absolute(stage)?,
        },
        (false, None) => bail!("say --bare, or --stage DIR for the provider to test"),
    };
    let setup = Setup {
        mode,
        device: arguments.device,
        gid_index: arguments.gid_index,
        programs: std::path::absolute(arguments.programs)?,
        output: std::path::absolute(arguments.output)?,
        cycles: arguments.cycles,
        pace: Duration::from_millis(arguments.pace),
        seed: arguments
            .seed
            .unwrap_or_else(|| fastrand::u64(1..1_000_000)),
        counting: arguments.counting,
        wrapper: None,
        chaos: None,
    };
    let prepared: Vec<_> = cases.iter().map(|case| case.prepared(&setup)).collect();
    report::run_all(&prepared, &setup.output, &mut out)
}
