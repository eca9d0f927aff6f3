//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use reverbs::control::message::DeviceChoice;

use super::files::FilePolicy;

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
    Run(RunOptions),
    Checkpoint(CheckpointOptions),
    Restart(RestartOptions),
    Cycle(CycleOptions),
    Resume(ResumeOptions),
    Status(StatusOptions),
    Inspect(InspectOptions),

    /// Called by mpirun in a job that `reverbs run` has started, as it would call ssh.
    #[command(hide = true)]
    Remote {
        host: String,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },

    /// Asked by a restart about a device of its node.
    #[command(hide = true)]
    Fits {
        device: String,
    },

    /// Started by `reverbs` on the other nodes of a job.
    #[command(hide = true)]
    Node {
        #[arg(long)]
        start: bool,

        #[arg(long, conflicts_with = "start")]
        copy: bool,
    },
}

/// Start a job so that it can be checkpointed, and wait for it.
///
/// The job gets reverbs as its RDMA provider (RDMAV_DRIVERS), a session of its own, /dev/null as standard input, and
/// pipes instead of terminals. UCX_TLS=^sysv is set unless UCX_TLS is: System V shared memory cannot be restored. Signals
/// are passed on; the exit status is the job's, or 128 and the number of the signal that ended it.
#[derive(Debug, Args)]
pub(crate) struct RunOptions {
    /// Folder for images of this job, where `reverbs checkpoint` is not told another.
    #[arg(long, value_name = "DIR")]
    pub(crate) images: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) remote: RemoteShell,

    /// For a batch script of Slurm: on SIGTERM, which `#SBATCH --signal=B:TERM@SECONDS` sends before the time limit, save the
    /// job into --images, end it and put it back into the queue. Where a complete image is in --images, go on from the newest
    /// instead of starting COMMAND.
    #[arg(long)]
    pub(crate) requeue: bool,

    /// Write the job's process id to FILE.
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,

    /// Let the job read our standard input. A job with a terminal as input cannot be checkpointed.
    #[arg(long)]
    pub(crate) stdin: bool,

    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

/// Save a job into an image, and let it run on (or end it).
///
/// Prints the path of the image, and nothing else, on standard output. The image is a folder that holds the memory of
/// all processes; nobody else can enter it. It appears when it is complete and on disk. If anything fails, the job runs on.
#[derive(Debug, Args)]
pub(crate) struct CheckpointOptions {
    /// Root of the job's process tree.
    pub(crate) pid: i32,

    /// Folder in which the image appears. Otherwise the one given to `reverbs run`, or else the current folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) images: Option<PathBuf>,

    /// End the job once its image is on disk.
    #[arg(long)]
    pub(crate) stop: bool,

    #[command(flatten)]
    pub(crate) outside: Outside,

    /// Deleted files that the job still holds go into the image; refuse those with more bytes than this.
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 30)]
    pub(crate) largest_deleted: u64,
}

/// Bring a job back from an image.
///
/// The image is verified first; files that it carries are put back; the processes come back under their old ids, get
/// fresh RDMA hardware, and run on. Prints the root process id. The image can be used again.
#[derive(Debug, Args)]
pub(crate) struct RestartOptions {
    /// The image, as `reverbs checkpoint` printed it.
    pub(crate) image: PathBuf,

    #[command(flatten)]
    pub(crate) devices: Devices,

    /// What to do with files that are not as they were at the checkpoint.
    ///
    /// A file that the job was writing to and that has grown is cut back; what it had beyond goes to
    /// FILE.reverbs-tail-IMAGE. A file on a volatile file system that was changed is put back; what was there goes to
    /// FILE.reverbs-kept-IMAGE.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) files: FilePolicy,

    /// Where output goes that the job wrote to a pipe. Otherwise to where this command's own output goes.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,

    /// Wait for the job, and end with its exit status.
    #[arg(long)]
    pub(crate) wait: bool,

    /// For a job over several nodes: what was on node OLD comes to NEW. Both as mpirun and ssh call them; the first node is
    /// always this one. Can be given more than once.
    #[arg(long = "node", value_name = "OLD=NEW", value_parser = moved_node)]
    pub(crate) nodes: Vec<MovedNode>,

    #[command(flatten)]
    pub(crate) remote: RemoteShell,
}

/// Check an image and show what is in it.
#[derive(Debug, Args)]
pub(crate) struct InspectOptions {
    /// The image, as `reverbs checkpoint` printed it.
    pub(crate) image: PathBuf,

    /// The manifest, as one JSON document on standard output.
    #[arg(long)]
    pub(crate) json: bool,

    /// Do not compare the files with their checksums.
    #[arg(long)]
    pub(crate) trust: bool,
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
    pub(crate) outside: Outside,

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

    /// Give up a node that cannot be reached any more: the others go on without its processes. Can be given more than once.
    #[arg(long, value_name = "NODE")]
    pub(crate) without: Vec<String>,
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
pub(crate) struct Outside {
    /// Go on although queue pairs of the job are connected to processes that are not part of it. These queue pairs end in the
    /// error state.
    #[arg(long = "allow-outside")]
    pub(crate) allowed: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct RemoteShell {
    /// What reaches other nodes, called like ssh with a host and a command. Otherwise $REVERBS_RSH; else srun inside a Slurm
    /// allocation; else ssh.
    #[arg(long = "rsh", value_name = "PROGRAM")]
    pub(crate) program: Option<String>,
}

/// A node of the image, and what takes its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MovedNode {
    pub(crate) from: String,
    pub(crate) to: String,
}

fn moved_node(text: &str) -> Result<MovedNode, String> {
    match text.split_once('=') {
        Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok(MovedNode {
            from: from.to_owned(),
            to: to.to_owned(),
        }),
        _ => Err("give OLD=NEW, names as ssh knows them".to_owned()),
    }
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
