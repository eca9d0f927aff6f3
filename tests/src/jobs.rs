//! Jobs that are checkpointed: how they are started, told to finish, and what they account for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use crate::case::Job;
use crate::hardware::{Numbers, packets_sent};
use crate::mpi::Library;
use crate::process::{self, Running};
use crate::setup::{Deadline, Setup};
use crate::{clients, evidence, mpi, own_programs, tree};

/// The time limit of a single command. Under emulation CRIU takes seconds.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// How long a job may take to end once it is told to.
const END_LIMIT: Duration = Duration::from_secs(120);

/// So many packets more show that the job is at work: a round of `mpi_check` takes fewer.
const PACKETS: u64 = 500;

/// Between two looks at processes that are ending.
const PAUSE: Duration = Duration::from_millis(20);

/// The program of a job.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A program of its own that tells its account; SIGTERM makes it finish.
    Own {
        program: &'static str,
        options: &'static str,
    },
    /// `rc_traffic` below `holds`, which has something besides.
    Beside { what: &'static str },
    /// `survivor` with children that may be killed; SIGTERM makes it finish.
    Survivor { peers: u32 },
    /// `mpi_check`; a file makes it finish.
    Mpi { ranks: u32 },
    /// `mpi_check` of which only rank 0 is in `MPI_Init`, until the others are let in.
    Starting { ranks: u32 },
    /// `mpi_check` that stays inside of `MPI_Finalize` for a while.
    Finalizing { ranks: u32, milliseconds: u32 },
    /// `ucx_perftest`, server and client; it ends after so many messages.
    Perftest(&'static Perftest),
}

/// A test of `ucx_perftest`.
#[derive(Debug)]
pub struct Perftest {
    pub transport: &'static str,
    pub test: &'static str,
    /// Some seconds' worth.
    pub messages: &'static str,
    pub variables: &'static [(&'static str, &'static str)],
}

/// Both sides of `ucx_perftest`, of which the second is started when the first listens. Arguments: the port, the same in
/// hexadecimal, the options.
const PERFTEST: &str = r#"
port=$1 listening=":$2 00000000:0000 0A"
shift 2
ucx_perftest -p $port &
until grep -q "$listening" /proc/net/tcp; do sleep 0.1; done
echo ready
ucx_perftest -p $port "$@" 127.0.0.1 && wait $!
"#;

impl Kind {
    /// `rc_traffic`, as most jobs are.
    pub const TRAFFIC: Self = Self::Own {
        program: "rc_traffic",
        options: "--seed 21",
    };

    fn command(self, job: &Job<'_>) -> Result<Command> {
        let mpi = |ranks| {
            let mut command = mpi::mpirun(job.setup, Library::OpenMpi, ranks)?;
            command.arg("--until").arg(until(&job.folder));
            Ok(command)
        };
        match self {
            Self::Own { program, options } => {
                let mut command = own_programs::command(job.setup, program)?;
                command.args(options.split_whitespace());
                Ok(command)
            }
            Self::Beside { what } => {
                let traffic = Self::TRAFFIC.command(job)?;
                let mut command = job.setup.command(job.setup.own_program("holds")?);
                command.arg(what).arg(traffic.get_program());
                command.args(traffic.get_args());
                Ok(command)
            }
            Self::Survivor { peers } => {
                let mut command = own_programs::command(job.setup, "survivor")?;
                command.args(["--peers", &peers.to_string()]);
                Ok(command)
            }
            Self::Mpi { ranks } => mpi(ranks),
            Self::Starting { ranks } => {
                let mut command = mpi(ranks)?;
                command.arg("--late").arg(all_in(&job.folder));
                Ok(command)
            }
            Self::Finalizing {
                ranks,
                milliseconds,
            } => {
                let mut command = mpi(ranks)?;
                command.args(["--linger", &milliseconds.to_string()]);
                Ok(command)
            }
            Self::Perftest(test) => {
                let device = format!("{}:1", job.setup.device);
                let mut command = job.setup.command("sh");
                command
                    .args(["-c", PERFTEST, "sh"])
                    .args([job.port.to_string(), format!("{:04X}", job.port)])
                    .args(["-n", test.messages, "-w", "0", "-t", test.test])
                    .args(["-x", test.transport, "-d", &device])
                    .env("UCX_NET_DEVICES", device)
                    .envs(test.variables.iter().copied());
                Ok(command)
            }
        }
    }
}

/// A job of its own session, started by `reverbs run`. Its output is in `FOLDER/job.out`, also
/// after a restart.
#[derive(Debug)]
pub struct Started<'a> {
    job: &'a Job<'a>,
    kind: Kind,
    runner: Running,
    /// The root of the job's tree, which is below `runner`.
    pub root: u32,
}

impl<'a> Started<'a> {
    /// Starts a job and waits until its processes have met.
    ///
    /// # Errors
    /// When they do not, or do not drive the device through the provider.
    pub fn start(job: &'a Job<'a>, kind: Kind) -> Result<Self> {
        let mut started = Self::launch(job, kind)?;
        started.wait_until_ready()?;
        Ok(started)
    }

    /// Starts a job and waits for nothing but its process id.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn launch(job: &'a Job<'a>, kind: Kind) -> Result<Self> {
        let pid_file = job.folder.join("job.pid");
        let command = under_run(job.setup, &kind.command(job)?, &pid_file)?;
        let mut runner = Running::start(command, &job.folder, "job")?;
        let deadline = job.deadline.at_most(COMMAND_LIMIT);
        let root = runner.wait_until(deadline, "it noted its process id", |_| {
            Ok(fs::read_to_string(&pid_file)
                .ok()
                .and_then(|text| text.trim().parse().ok()))
        })?;
        Ok(Self {
            job,
            kind,
            runner,
            root,
        })
    }

    /// Waits until the processes of the job have met.
    ///
    /// # Errors
    /// When they do not, or do not drive the device through the provider.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        self.wait_for_line("ready")?;
        if let Kind::Perftest(_) = self.kind {
            // That says only that one of both is there.
            self.wait_for_traffic()?;
        }
        for pid in self.workers()? {
            evidence::check_mode(pid, &self.job.setup.mode)?;
        }
        Ok(())
    }

    /// Waits until the job has written such a line.
    ///
    /// # Errors
    /// When it ends or time runs out first.
    pub fn wait_for_line(&mut self, line: &str) -> Result<()> {
        self.runner.wait_for_line(self.job.deadline, line).map(drop)
    }

    /// The same within `limit`; a job that does not is made to say where it stands.
    ///
    /// # Errors
    /// When it ends or time runs out first.
    pub fn wait_for_line_or_report(&mut self, line: &str, limit: Duration) -> Result<()> {
        let deadline = self.job.deadline.at_most(limit);
        let found = self.runner.wait_for_line(deadline, line);
        if found.is_err() {
            own_programs::ask_for_report(&mut self.runner, &self.job.folder);
        }
        found.map(drop)
    }

    /// The processes that drive the device; for those that are no MPI job the parent stands for all.
    fn workers(&self) -> Result<Vec<u32>> {
        let (name, count) = match self.kind {
            Kind::Own { .. } | Kind::Survivor { .. } => return Ok(vec![self.root]),
            Kind::Beside { .. } => ("rc_traffic", 2),
            Kind::Mpi { ranks } | Kind::Starting { ranks } | Kind::Finalizing { ranks, .. } => {
                ("mpi_check", ranks as usize)
            }
            Kind::Perftest(_) => ("ucx_perftest", 2),
        };
        let mut found = mpi::processes_called(self.root, name);
        ensure!(found.len() == count, "processes found: {found:?}");
        found.sort_unstable();
        if let Kind::Beside { .. } = self.kind {
            found.truncate(1);
        }
        Ok(found)
    }

    /// Waits until a process of the job has a device open.
    ///
    /// # Errors
    /// When it ends or time runs out first.
    pub fn wait_for_device(&mut self) -> Result<()> {
        let root = self.root;
        self.runner.wait_until(
            self.job.deadline.at_most(COMMAND_LIMIT),
            "it opened a device",
            |_| {
                let open = tree::descendants(root).into_iter().any(has_device);
                Ok(open.then_some(()))
            },
        )
    }

    /// Waits until the job has visibly sent more.
    ///
    /// # Errors
    /// When it ends or time runs out first.
    pub fn wait_for_traffic(&mut self) -> Result<()> {
        wait_for_traffic(&mut self.runner, &self.job.setup.device, self.job.deadline)
    }

    /// Waits until the job has sent anything.
    ///
    /// # Errors
    /// When it ends or time runs out first.
    pub fn wait_for_packet(&mut self) -> Result<()> {
        let device = &self.job.setup.device;
        let sent = packets_sent(device)?;
        self.runner.wait_until(
            self.job.deadline.at_most(COMMAND_LIMIT),
            "it sent anything again",
            |_| Ok((packets_sent(device)? > sent).then_some(())),
        )
    }

    /// A `reverbs checkpoint` of this job.
    ///
    /// # Errors
    /// When there is no `reverbs`.
    pub fn checkpoint_command(&self, images: &Path) -> Result<Command> {
        let mut command = self.job.setup.reverbs()?;
        command.arg("checkpoint").arg(self.root.to_string());
        command.arg("--images").arg(images);
        Ok(command)
    }

    /// Takes a checkpoint and gives the path of the image. After one with `--stop` no process of
    /// the job is left.
    ///
    /// # Errors
    /// When it fails, there is no image, or a process lives that should not.
    pub fn checkpoint(&mut self, options: &[&str]) -> Result<PathBuf> {
        let pids = self.pids();
        let mut command = self.checkpoint_command(&self.job.folder.join("images"))?;
        command.args(options);
        let mut checkpoint = Running::start(command, &self.job.folder, "checkpoint")?;
        let deadline = self.job.deadline.at_most(COMMAND_LIMIT);
        while checkpoint.ended()?.is_none() && !deadline.passed() {
            // Ids of ended processes are free only when their parent took note, and orphans are ours.
            tree::reap(&pids);
            std::thread::sleep(PAUSE);
        }
        checkpoint
            .wait_for_success(deadline)
            .context(checkpoint.errors()?)?;
        if options.contains(&"--stop") {
            tree::reap(&pids);
            let left: Vec<_> = pids.iter().filter(|pid| tree::exists(**pid)).collect();
            ensure!(left.is_empty(), "the job has ended, but not {left:?}");
        }
        let image = PathBuf::from(checkpoint.output()?.trim_end());
        ensure!(
            image.join("manifest.json").is_file(),
            "no image at \"{}\"",
            image.display()
        );
        Ok(image)
    }

    /// Puts fresh hardware under the job.
    ///
    /// # Errors
    /// When that fails, or the hardware has a number that it had before.
    pub fn cycle(&self) -> Result<()> {
        let before = Numbers::on(&self.job.setup.device)?;
        let mut command = self.job.setup.reverbs()?;
        command.arg("cycle").arg(self.root.to_string());
        let deadline = self.job.deadline.at_most(COMMAND_LIMIT);
        process::run(command, &self.job.folder, "cycle", deadline)?;
        Numbers::on(&self.job.setup.device)?.check_all_new(&before)
    }

    /// Brings back a job that its orchestrator has left.
    ///
    /// # Errors
    /// When that fails.
    pub fn resume(&self) -> Result<()> {
        let mut command = self.job.setup.reverbs()?;
        command.arg("resume").arg(self.root.to_string());
        let deadline = self.job.deadline.at_most(COMMAND_LIMIT);
        process::run(command, &self.job.folder, "resume", deadline).map(drop)
    }

    /// Lets the job end, and checks its account.
    ///
    /// # Errors
    /// When it fails, or found anything wrong.
    pub fn finish(mut self) -> Result<String> {
        self.tell_to_finish()?;
        self.wait_for_end()
    }

    /// The same for a job that is now below a `reverbs restart --wait`.
    ///
    /// # Errors
    /// When it fails, or found anything wrong.
    pub fn finish_in(&self, restart: &mut Running) -> Result<String> {
        self.tell_to_finish()?;
        restart.wait_for_success(self.job.deadline.at_most(END_LIMIT))?;
        self.account()
    }

    /// The same for a job that was restored and has no parent but us.
    ///
    /// # Errors
    /// When it does not end, or found anything wrong.
    pub fn finish_adopted(&self) -> Result<String> {
        self.tell_to_finish()?;
        self.wait_until_gone(&self.pids())?;
        self.account()
    }

    /// Lets the job end of itself.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn tell_to_finish(&self) -> Result<()> {
        match self.kind {
            Kind::Own { .. } | Kind::Beside { .. } | Kind::Survivor { .. } => {
                process::signal_each(&[self.root], Signal::TERM);
            }
            Kind::Mpi { .. } | Kind::Starting { .. } | Kind::Finalizing { .. } => {
                fs::write(until(&self.job.folder), "")?
            }
            Kind::Perftest(_) => {}
        }
        Ok(())
    }

    /// Lets the ranks that are late into `MPI_Init`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn let_all_in(&self) -> Result<()> {
        Ok(fs::write(all_in(&self.job.folder), "")?)
    }

    /// A job of MPI that is brought back is not to finish at once.
    ///
    /// # Errors
    /// When it was not told to finish.
    pub fn forget_to_finish(&self) -> Result<()> {
        Ok(fs::remove_file(until(&self.job.folder))?)
    }

    /// Waits for the end of a job that needs no telling, and checks its account.
    ///
    /// # Errors
    /// When it fails, or found anything wrong.
    pub fn wait_for_end(&mut self) -> Result<String> {
        let deadline = self.job.deadline.at_most(END_LIMIT);
        self.runner.wait_for_success(deadline)?;
        self.account()
    }

    /// What the job says it checked.
    ///
    /// # Errors
    /// When it found anything wrong.
    pub fn account(&self) -> Result<String> {
        let output = self.runner.output()?;
        match self.kind {
            Kind::Own { .. } | Kind::Beside { .. } | Kind::Survivor { .. } => {
                own_programs::check_account(&output).map(|count| format!("{count} messages"))
            }
            Kind::Mpi { ranks } | Kind::Starting { ranks } | Kind::Finalizing { ranks, .. } => {
                mpi::check_account(&output, ranks).map(|count| format!("{count} rounds"))
            }
            Kind::Perftest(test) => {
                clients::check_perftest(&output, test.messages)?;
                Ok(format!("{} messages", test.messages))
            }
        }
    }

    /// Kills every process of the job.
    ///
    /// # Errors
    /// When they do not end.
    pub fn kill(&mut self) -> Result<()> {
        let pids = self.pids();
        process::signal_each(&pids, Signal::KILL);
        self.wait_until_gone(&pids)
    }

    /// Waits until none of these processes is there any more.
    ///
    /// # Errors
    /// When one stays.
    pub fn wait_until_gone(&self, pids: &[u32]) -> Result<()> {
        tree::wait_until_gone(pids, self.job.deadline.at_most(END_LIMIT))
    }

    /// All processes of the job.
    pub fn pids(&self) -> Vec<u32> {
        std::iter::once(self.root)
            .chain(tree::descendants(self.root))
            .collect()
    }
}

/// The file whose existence makes `mpi_check` finish.
fn until(folder: &Path) -> PathBuf {
    folder.join("enough")
}

/// The file whose existence lets all ranks start.
fn all_in(folder: &Path) -> PathBuf {
    folder.join("all-in")
}

/// `reverbs run` for a command, with the command's own environment.
fn under_run(setup: &Setup, command: &Command, pid_file: &Path) -> Result<Command> {
    let mut run = setup.reverbs()?;
    run.arg("run").arg("--pid-file").arg(pid_file).arg("--");
    run.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => run.env(name, value),
            None => run.env_remove(name),
        };
    }
    Ok(run)
}

/// Waits until a device has sent more packets while `root` runs.
///
/// # Errors
/// When it ends or time runs out first.
pub fn wait_for_traffic(root: &mut Running, device: &str, deadline: Deadline) -> Result<()> {
    let enough = packets_sent(device)? + PACKETS;
    root.wait_until(
        deadline.at_most(COMMAND_LIMIT),
        "it sent more packets",
        |_| Ok((packets_sent(device)? > enough).then_some(())),
    )
}

fn has_device(pid: u32) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd"));
    files.into_iter().flatten().flatten().any(|file| {
        fs::read_link(file.path()).is_ok_and(|target| target.starts_with("/dev/infiniband"))
    })
}
