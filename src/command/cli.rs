//! The command line.

use clap::{Args, Parser, Subcommand};

use reverbs::control::message::DeviceChoice;

/// Checkpoint and restart of RDMA applications, without their help.
///
/// A job that was started with `reverbs run` can be saved at any moment (`reverbs checkpoint`) and continued later from
/// the image, on this host or another, on the same RDMA device or another (`reverbs restart`). PID is always the root
/// of the job's process tree, as `reverbs run` prints it; for an MPI job that is mpirun. The id of `reverbs run` itself
/// does as well.
///
/// Exit status 0 means that all of what was asked happened. Anything else means that nothing is lost: the job runs on,
/// or the image is as it was, and the last line on standard error says what to do.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// No progress on standard error, only errors.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Cycle(CycleOptions),
    Resume(ResumeOptions),
    Status(StatusOptions),
}

/// Put fresh hardware under a running job: a checkpoint and restart without an image.
///
/// The network is drained, every hardware object is destroyed and made anew, and the job runs on. Needs neither root
/// nor CRIU. Prints how many cycles there were and how long they took.
#[derive(Debug, Args)]
pub(crate) struct CycleOptions {
    /// Root of the job's process tree.
    pub(crate) pid: i32,

    /// How many cycles.
    #[arg(long, default_value_t = 1, conflicts_with = "until_end")]
    pub(crate) count: u64,

    /// Cycle until the job ends, which then is no error.
    #[arg(long)]
    pub(crate) until_end: bool,

    /// From the start of a cycle to the start of the next, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub(crate) every: u64,

    #[command(flatten)]
    pub(crate) devices: Devices,
}

/// Let a job run on after a checkpoint, restart or cycle that was killed half-way.
///
/// Asks every process how far it came, and takes all of them forward from there until they run. Refused while the
/// command that was driving the job is still alive.
#[derive(Debug, Args)]
pub(crate) struct ResumeOptions {
    /// Root of the job's process tree.
    pub(crate) pid: i32,

    #[command(flatten)]
    pub(crate) devices: Devices,
}

/// Show the processes of a job, their phase, and the handles they hold beside the hardware's.
///
/// Without PID: every process of this user that runs under reverbs.
#[derive(Debug, Args)]
pub(crate) struct StatusOptions {
    /// Root of the job's process tree.
    pub(crate) pid: Option<i32>,

    /// One JSON document on standard output: a list of processes.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Devices {
    /// Device to rebuild on: NEW for all, or OLD=NEW for the device first opened as OLD. Can be given more than once.
    ///
    /// What is not named goes to the device of the same name if there is one, else to the one that fits best.
    #[arg(long = "device", value_name = "[OLD=]NEW", value_parser = device_choice)]
    pub(crate) choices: Vec<DeviceChoice>,
}

fn device_choice(text: &str) -> Result<DeviceChoice, String> {
    let (from, to) = match text.split_once('=') {
        Some((from, to)) => (Some(from), to),
        None => (None, text),
    };
    if to.is_empty() || from.is_some_and(str::is_empty) {
        return Err("give NEW or OLD=NEW, names as `ibv_devices` prints them".to_owned());
    }
    Ok(DeviceChoice {
        from: from.map(str::to_owned),
        to: to.to_owned(),
    })
}
