//! The project's own tasks: `cargo xtask help` lists them.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use xtask::device::Device;
use xtask::vm::{self, Machine};
use xtask::{demo, fuzz, nodes, setup, stage, test};

/// Tasks of the reverbs project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that building and testing need
    Setup,
    /// Run a command in the test machine and pass its exit status on
    ///
    /// The machine is the stock Debian kernel under software emulation, over this host's own
    /// root file system, with Soft-RoCE devices. What the command writes is lost at power-off,
    /// save in the share (/mnt/share). 124 means that the time was over.
    Vm(VmArgs),
    /// Build the release artifacts and lay out what a package would install
    Stage {
        /// Where to: DIR/bin, DIR/lib, DIR/etc
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Save an MPI benchmark in mid-run, and finish it in a second machine on another device
    Demo,
    /// Save an MPI job over two machines in mid-run, and finish it on two other pairs of machines
    Nodes {
        /// How often
        #[arg(long, value_name = "N", default_value_t = 1)]
        times: u32,
    },
    /// Run the fuzz targets of tests/fuzz, with AddressSanitizer
    Fuzz {
        /// How long to run each
        #[arg(long, value_name = "S", default_value_t = 60)]
        seconds: u64,
        /// Afterwards put into the kept corpus what was found beyond it
        #[arg(long)]
        keep: bool,
        /// Only this one
        target: Option<String>,
    },
    /// Run all tests, on the host and in the test machine
    Test {
        /// Also those that take long
        #[arg(long)]
        long: bool,
        /// Only tests whose name contains this
        filter: Option<String>,
    },
}

#[derive(Args)]
struct VmArgs {
    /// Let guest time count instructions (one processor): repeatable timings of one process
    #[arg(short, long)]
    instructions: bool,
    /// Processors of the machine [default: the host's, at most 4]
    #[arg(long, value_name = "N")]
    cpus: Option<usize>,
    /// Memory of the machine, in MiB
    #[arg(long, value_name = "MiB", default_value_t = 3072)]
    memory: u32,
    /// RDMA devices, as NAME@ADDRESS/PREFIX,... or `none`
    /// [default: rxe0@10.77.0.1/24,rxe1@10.78.0.1/24]
    #[arg(long, value_name = "SPEC", value_delimiter = ',')]
    devices: Option<Vec<String>>,
    /// Longest run, boot and power-off included, in seconds
    #[arg(long, value_name = "S", default_value_t = 600)]
    timeout: u64,
    /// Host folder that the machine writes to as /mnt/share [default: vm/share in the build
    /// folder]
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// Host folder under /tmp, /run or /dev/shm to be seen in the machine (may be repeated)
    #[arg(long, value_name = "DIR")]
    bind: Vec<PathBuf>,
    /// Variable for the command (may be repeated)
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Show the kernel's console and the times on stderr
    #[arg(short, long)]
    verbose: bool,
    /// The command with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Setup => setup::ensure().map(|()| ExitCode::SUCCESS),
        Task::Vm(arguments) => run_in_machine(&arguments),
        Task::Stage { folder } => stage::stage(&folder).map(|()| ExitCode::SUCCESS),
        Task::Demo => demo::run().map(|()| ExitCode::SUCCESS),
        Task::Nodes { times } => nodes::run(times).map(|()| ExitCode::SUCCESS),
        Task::Fuzz {
            seconds,
            keep,
            target,
        } => run_fuzz(seconds, keep, target).map(|()| ExitCode::SUCCESS),
        Task::Test { long, filter } => test::run(long, filter.as_deref()).map(status_of),
    };
    done.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::from(125)
    })
}

fn run_fuzz(seconds: u64, keep: bool, target: Option<String>) -> Result<()> {
    setup::ensure()?;
    let targets = target.map_or_else(fuzz::targets, |target| Ok(vec![target]))?;
    for target in targets {
        fuzz::run(&target, seconds)?;
        if keep {
            fuzz::keep(&target)?;
        }
    }
    Ok(())
}

fn run_in_machine(arguments: &VmArgs) -> Result<ExitCode> {
    let mut machine = Machine::default()
        .counted(arguments.instructions)
        .memory(arguments.memory)
        .timeout(Duration::from_secs(arguments.timeout))
        .console(arguments.verbose);
    if let Some(cpus) = arguments.cpus {
        machine = machine.cpus(cpus);
    }
    if let Some(devices) = &arguments.devices {
        machine = machine.devices(devices_of(devices)?);
    }
    if let Some(share) = &arguments.share {
        machine = machine.share(share);
    }
    for folder in &arguments.bind {
        machine = machine.bind(&folder.canonicalize()?);
    }
    for variable in &arguments.env {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        machine = machine.environment(name, value);
    }
    let outcome = machine.run(&arguments.command)?;
    if let vm::End::Timeout = outcome.end {
        eprintln!("xtask: stopped after {} s", arguments.timeout);
    }
    if arguments.verbose {
        let boot = outcome.boot.unwrap_or_default();
        eprintln!(
            "xtask: up after {boot:.1?}, off after {:.1?}",
            outcome.total
        );
    }
    Ok(ExitCode::from(outcome.status()))
}

fn status_of(count: test::Count) -> ExitCode {
    if count.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn devices_of(texts: &[String]) -> Result<Vec<Device>> {
    if texts == ["none"] {
        return Ok(Vec::new());
    }
    texts.iter().map(|text| text.parse()).collect()
}
