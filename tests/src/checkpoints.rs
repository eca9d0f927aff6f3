//! `reverbs checkpoint` and `reverbs restart` under jobs that check everything they see.
//!
//! The job is saved in mid-run, all its processes end, and it comes back from the image: with the
//! same numbers in the application's eyes and others in the hardware's (the kernel is asked, not
//! only the provider). Then it runs on, and must end by itself with its own account.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use serde_json::Value;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::{Numbers, packets_sent};
use crate::process::{self, Running};
use crate::setup::{Deadline, Setup};
use crate::{evidence, mpi, own_programs, tree};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(600);

/// The time limit of a single command. Under emulation CRIU takes seconds.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// How long a job may take to end once it is told to.
const END_LIMIT: Duration = Duration::from_secs(120);

/// So many packets more show that the job is at work: a round of `mpi_check` takes fewer.
const PACKETS: u64 = 500;

/// The device to which a job is brought back that leaves its own.
const OTHER_DEVICE: &str = "rxe1";

/// Between two looks at processes that are ending.
const PAUSE: Duration = Duration::from_millis(20);

/// A job that is saved and brought back.
#[derive(Debug)]
pub struct Saved {
    name: &'static str,
    kind: Kind,
    how: How,
}

#[derive(Debug, Eq, PartialEq)]
enum How {
    /// `checkpoint --stop`, then back on the device it had.
    Stopped,
    /// `checkpoint --stop`, then back on the other device.
    OtherDevice,
    /// The job runs on after the checkpoint and is killed later.
    RunsOn,
}

/// The program of a job.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `rc_traffic`; SIGTERM makes it finish.
    Traffic,
    /// `mpi_check`; a file makes it finish.
    Mpi { ranks: u32 },
}

const SAVED: &[Saved] = &[
    Saved {
        name: "restart-rc",
        kind: Kind::Traffic,
        how: How::Stopped,
    },
    Saved {
        name: "restart-mpi-np2",
        kind: Kind::Mpi { ranks: 2 },
        how: How::Stopped,
    },
    Saved {
        name: "restart-mpi-np2-other-device",
        kind: Kind::Mpi { ranks: 2 },
        how: How::OtherDevice,
    },
    Saved {
        name: "restart-mpi-np4",
        kind: Kind::Mpi { ranks: 4 },
        how: How::Stopped,
    },
    Saved {
        name: "checkpoint-runs-on",
        kind: Kind::Mpi { ranks: 2 },
        how: How::RunsOn,
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    SAVED
        .iter()
        .map(|saved| Case {
            name: saved.name.to_owned(),
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Saved(saved),
        })
        .collect()
}

/// Saves a job, ends it, brings it back, and lets it finish. The remark is what it checked.
///
/// # Errors
/// When a command fails, a number is not as promised, or the job finds anything wrong.
pub fn run(saved: &Saved, job: &Job<'_>) -> Result<String> {
    let other = saved.how == How::OtherDevice;
    let device = if other {
        OTHER_DEVICE
    } else {
        &job.setup.device
    };
    let mut started = Started::start(job, saved.kind)?;
    started.wait_for_traffic()?;
    let before = status(job, started.root, "before")?;
    ensure!(!before.pairs.is_empty(), "the job has no queue pair");
    let keys = Numbers::on(&job.setup.device)?.keys;
    if other {
        use_up_numbers(job, &before.hardware())?;
    }

    let image = if saved.how == How::RunsOn {
        let image = started.checkpoint(&[])?;
        started.wait_for_traffic()?;
        started.kill()?;
        image
    } else {
        started.checkpoint(&["--stop"])?
    };
    ensure!(
        Numbers::on(&job.setup.device)?.queue_pairs.is_empty(),
        "the job has ended and the hardware still has its queue pairs"
    );

    let mut command = job.setup.reverbs()?;
    command.arg("restart").arg(&image).arg("--wait");
    if other {
        command.args(["--device", &format!("{}={device}", job.setup.device)]);
    }
    let mut restart = Running::start(command, &job.folder, "restart")?;
    restart.wait_for_line(
        job.deadline.at_most(COMMAND_LIMIT),
        &started.root.to_string(),
    )?;
    wait_for_traffic(&mut restart, device, job.deadline)?;
    let after = status(job, started.root, "after")?;
    after.check_against(&before, &job.setup.device, device)?;
    if !other {
        let now = Numbers::on(device)?.keys;
        ensure!(
            keys.is_disjoint(&now),
            "the hardware has keys of before: {keys:?} and {now:?}"
        );
    }
    started.finish_in(&mut restart)
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
        let command = match kind {
            Kind::Traffic => {
                let mut command = own_programs::command(job.setup, "rc_traffic")?;
                command.args(["--seed", "21"]);
                command
            }
            Kind::Mpi { ranks } => {
                let mut command = mpi::mpirun(job.setup, ranks, "mpi_check")?;
                command.arg("--until").arg(until(&job.folder));
                command
            }
        };
        let pid_file = job.folder.join("job.pid");
        let command = under_run(job.setup, &command, &pid_file)?;
        let mut runner = Running::start(command, &job.folder, "job")?;
        runner.wait_for_line(job.deadline, "ready")?;
        let root = fs::read_to_string(&pid_file)?.trim().parse()?;
        let found = match kind {
            Kind::Traffic => vec![root],
            Kind::Mpi { ranks } => {
                let found = mpi::processes_called(root, "mpi_check");
                ensure!(found.len() == ranks as usize, "ranks found: {found:?}");
                found
            }
        };
        for pid in found {
            evidence::check_mode(pid, &job.setup.mode)?;
        }
        Ok(Self {
            job,
            kind,
            runner,
            root,
        })
    }

    /// Waits until the job has visibly sent more.
    ///
    /// # Errors
    /// When it ends or time runs out first.
    pub fn wait_for_traffic(&mut self) -> Result<()> {
        wait_for_traffic(&mut self.runner, &self.job.setup.device, self.job.deadline)
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
            reap(&pids);
            std::thread::sleep(PAUSE);
        }
        checkpoint
            .wait_for_success(deadline)
            .context(checkpoint.errors()?)?;
        if options.contains(&"--stop") {
            reap(&pids);
            let left: Vec<_> = pids.iter().filter(|pid| exists(**pid)).collect();
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

    /// Lets the job end, and checks its account.
    ///
    /// # Errors
    /// When it fails, or found anything wrong.
    pub fn finish(mut self) -> Result<String> {
        self.tell_to_finish()?;
        let deadline = self.job.deadline.at_most(END_LIMIT);
        self.runner.wait_for_success(deadline)?;
        self.account()
    }

    /// The same for a job that is now below a `reverbs restart --wait`.
    fn finish_in(&self, restart: &mut Running) -> Result<String> {
        self.tell_to_finish()?;
        restart.wait_for_success(self.job.deadline.at_most(END_LIMIT))?;
        self.account()
    }

    fn tell_to_finish(&self) -> Result<()> {
        match self.kind {
            Kind::Traffic => process::signal_each(&[self.root], Signal::TERM),
            Kind::Mpi { .. } => fs::write(until(&self.job.folder), "")?,
        }
        Ok(())
    }

    fn account(&self) -> Result<String> {
        let output = self.runner.output()?;
        match self.kind {
            Kind::Traffic => {
                own_programs::check_account(&output).map(|count| format!("{count} messages"))
            }
            Kind::Mpi { ranks } => {
                mpi::check_account(&output, ranks).map(|count| format!("{count} rounds"))
            }
        }
    }

    /// Kills every process of the job.
    fn kill(&mut self) -> Result<()> {
        let pids = self.pids();
        process::signal_each(&pids, Signal::KILL);
        let deadline = self.job.deadline.at_most(END_LIMIT);
        while pids.iter().any(|pid| exists(*pid)) {
            ensure!(!deadline.passed(), "killed processes do not end");
            reap(&pids);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn pids(&self) -> Vec<u32> {
        std::iter::once(self.root)
            .chain(tree::descendants(self.root))
            .collect()
    }
}

/// The file whose existence makes `mpi_check` finish.
fn until(folder: &Path) -> PathBuf {
    folder.join("enough")
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

fn wait_for_traffic(root: &mut Running, device: &str, deadline: Deadline) -> Result<()> {
    let enough = packets_sent(device)? + PACKETS;
    root.wait_until(
        deadline.at_most(COMMAND_LIMIT),
        "it sent more packets",
        |_| Ok((packets_sent(device)? > enough).then_some(())),
    )
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Takes note of the end of those that are our children by now.
fn reap(pids: &[u32]) {
    for pid in pids
        .iter()
        .filter_map(|pid| Pid::from_raw(pid.cast_signed()))
    {
        // Not our child, or not at its end: then it is not for us to do anything.
        let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

/// Makes the other device give out numbers until it is beyond those of the job, so that the job
/// cannot get the same ones again: Soft-RoCE counts from the same number on each device.
fn use_up_numbers(job: &Job<'_>, taken: &BTreeSet<u64>) -> Result<()> {
    let highest = taken.last().copied().unwrap_or_default();
    for _ in 0..16 {
        let mut command = Command::new(job.setup.own_program("rc_traffic")?);
        command.env_remove("RDMAV_DRIVERS");
        command.args(["--device", OTHER_DEVICE, "--qps", "16"]);
        command.args(["--gid-index", &job.setup.gid_index.to_string()]);
        let mut user = Running::start(command, &job.folder, "user")?;
        user.wait_for_line(job.deadline.at_most(COMMAND_LIMIT), "ready")?;
        let now = Numbers::on(OTHER_DEVICE)?.queue_pairs;
        if now.last().is_some_and(|number| *number >= highest) {
            return Ok(());
        }
    }
    anyhow::bail!("{OTHER_DEVICE} does not reach the number {highest}")
}

/// What `reverbs status --json` says of a job.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Status {
    /// Hardware number of each queue pair, by process and virtual number.
    pairs: BTreeMap<(u64, u64), Option<u64>>,
    /// Name of each device in the application's eyes and, for those with queue pairs, the name of
    /// the hardware behind it.
    devices: BTreeSet<(String, String)>,
    phases: BTreeSet<String>,
}

fn status(job: &Job<'_>, root: u32, when: &str) -> Result<Status> {
    let mut command = job.setup.reverbs()?;
    command.args(["status", "--json"]).arg(root.to_string());
    let name = format!("status-{when}");
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    Status::parse(&process::run(command, &job.folder, &name, deadline)?)
}

impl Status {
    fn parse(text: &str) -> Result<Self> {
        let mut found = Self::default();
        for process in list(&serde_json::from_str(text)?)? {
            let pid = process["pid"].as_u64().context("no pid")?;
            found
                .phases
                .insert(process["phase"].as_str().context("no phase")?.to_owned());
            for context in list(&process["contexts"])? {
                let pairs = list(&context["queue_pairs"])?;
                for pair in pairs {
                    let number = pair["virtual_qpn"].as_u64().context("no virtual_qpn")?;
                    let earlier = found
                        .pairs
                        .insert((pid, number), pair["hardware_qpn"].as_u64());
                    ensure!(earlier.is_none(), "{number} twice in process {pid}");
                }
                if !pairs.is_empty() {
                    let name = |key: &str| context[key].as_str().map(str::to_owned);
                    found.devices.insert((
                        name("device").context("no device")?,
                        name("hardware_device").context("no hardware_device")?,
                    ));
                }
            }
        }
        Ok(found)
    }

    fn hardware(&self) -> BTreeSet<u64> {
        self.pairs.values().flatten().copied().collect()
    }

    /// After a restart on `hardware_device`: all numbers of `earlier`, over hardware that the
    /// kernel confirms and that has none of the earlier numbers.
    fn check_against(&self, earlier: &Self, device: &str, hardware_device: &str) -> Result<()> {
        self.check_numbers(earlier, device, hardware_device)?;
        let listed = Numbers::on(hardware_device)?.queue_pairs;
        ensure!(
            listed == self.hardware(),
            "status tells of the queue pairs {:?}, the kernel of {listed:?}",
            self.hardware()
        );
        Ok(())
    }

    fn check_numbers(&self, earlier: &Self, device: &str, hardware_device: &str) -> Result<()> {
        ensure!(
            self.phases == BTreeSet::from(["running".to_owned()]),
            "phases after the restart: {:?}",
            self.phases
        );
        ensure!(
            self.devices == BTreeSet::from([(device.to_owned(), hardware_device.to_owned())]),
            "{device} should be on {hardware_device}: {:?}",
            self.devices
        );
        ensure!(
            self.pairs.keys().eq(earlier.pairs.keys()),
            "the application had the queue pairs (process, number) {:?} and has {:?}",
            earlier.pairs.keys(),
            self.pairs.keys()
        );
        ensure!(
            self.pairs.values().all(Option::is_some),
            "queue pairs without hardware: {:?}",
            self.pairs
        );
        ensure!(
            self.hardware().is_disjoint(&earlier.hardware()),
            "the hardware's queue pair numbers were {:?} and are {:?}",
            earlier.hardware(),
            self.hardware()
        );
        Ok(())
    }
}

fn list(value: &Value) -> Result<&Vec<Value>> {
    value
        .as_array()
        .with_context(|| format!("not a list: {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = r#"[{"pid":9,"phase":"running","contexts":[
        {"device":"rxe1","hardware_device":"rxe1","queue_pairs":[]},
        {"device":"rxe0","hardware_device":"rxe0","queue_pairs":[
            {"virtual_qpn":17,"hardware_qpn":17},{"virtual_qpn":18,"hardware_qpn":18}]}]}]"#;

    fn check(edit: impl Fn(&str) -> String) -> Result<()> {
        let good = BEFORE
            .replace(r#""hardware_qpn":17"#, r#""hardware_qpn":33"#)
            .replace(r#""hardware_qpn":18"#, r#""hardware_qpn":34"#);
        let before = Status::parse(BEFORE)?;
        Status::parse(&edit(&good))?.check_numbers(&before, "rxe0", "rxe0")
    }

    #[test]
    fn a_restart_that_changes_the_wrong_numbers_is_found() {
        check(str::to_owned).unwrap();
        check(|text| text.replace(":33", ":17")).unwrap_err();
        check(|text| text.replace(":33", ":18")).unwrap_err();
        check(|text| text.replace(":33", ":null")).unwrap_err();
        check(|text| text.replace(r#""virtual_qpn":17"#, r#""virtual_qpn":19"#)).unwrap_err();
        check(|text| text.replace(r#""pid":9"#, r#""pid":8"#)).unwrap_err();
        check(|text| text.replace("running", "released")).unwrap_err();
        check(|text| text.replace("rxe0", "rxe2")).unwrap_err();
    }
}
