//! A `reverbs restart` that is killed, with its CRIU or without, and a CRIU that is killed: the image can be restarted
//! again, or the job that came of it is resumed; the commands say which.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reverbs::control::message::Phase;
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::packets_sent;
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process::{self, Running};
use crate::setup::Deadline;
use crate::stand_in::standing;

/// The time limit of the case.
const LIMIT: Duration = Duration::from_secs(600);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(2);

/// A restart may be done before the blow falls, so it is tried so often.
const TRIES: u32 = 6;

/// The case of this module.
pub fn cases() -> Vec<Case> {
    vec![Case {
        name: "killed-restart".to_owned(),
        needs: Needs::Provider,
        limit: LIMIT,
        action: Action::KilledRestart,
    }]
}

/// Saves a job and has its restart fail in several ways. The remark is what the job checked in the end.
///
/// # Errors
/// When a command does not say what to do, anything of a failed restart is left, or the job loses anything.
pub fn run(job: &Job<'_>) -> Result<String> {
    let mut started = Started::start(job, Kind::TRAFFIC)?;
    started.wait_for_traffic()?;
    let processes = started.pids();
    let image = started.checkpoint(&["--stop"])?;
    let restart = Restart {
        job,
        image,
        root: started.root,
    };

    restart.killed_with_criu().context("killed with its CRIU")?;
    restart
        .outlived_by_criu()
        .context("killed, and CRIU went on")?;
    started.resume()?;
    restart.wait_for_traffic()?;
    started.kill()?;
    restart.without_criu().context("CRIU killed")?;
    started.wait_until_gone(&processes)?;
    restart
        .killed_after_criu(&mut started)
        .context("killed after CRIU")?;
    started.resume()?;
    restart.wait_for_traffic()?;
    started.cycle()?;
    started.finish_adopted()
}

struct Restart<'a> {
    job: &'a Job<'a>,
    image: PathBuf,
    root: u32,
}

impl Restart<'_> {
    /// Nothing was restored yet: another restart finds all as it was, which the next step shows.
    fn killed_with_criu(&self) -> Result<()> {
        let (restart, criu) = self.start_with_held_criu("both-killed")?;
        restart.signal(Signal::KILL)?;
        process::signal_each(&[criu], Signal::KILL);
        Ok(())
    }

    /// CRIU restores the job for nobody; a second restart says what to do.
    fn outlived_by_criu(&self) -> Result<()> {
        let (restart, _) = self.start_with_held_criu("outlived")?;
        restart.signal(Signal::KILL)?;
        fs::write(self.job.folder.join("go"), "")?;
        let deadline = self.deadline();
        while !standing(self.root)
            .is_ok_and(|all| all.len() == 2 && all.values().all(|one| one.phase == Phase::Released))
        {
            ensure!(!deadline.passed(), "CRIU does not restore the job");
            std::thread::sleep(PAUSE);
        }
        let mut command = self.job.setup.reverbs()?;
        command.args(["--quiet", "restart"]).arg(&self.image);
        let said = process::fail(command, &self.job.folder, "second", deadline)?;
        let remedy = format!("`reverbs resume {}`", self.root);
        ensure!(said.contains(&remedy), "no word of {remedy} in: {said}");
        Ok(())
    }

    /// CRIU is killed when the first process is there.
    fn without_criu(&self) -> Result<()> {
        let killed = format!(
            "criu \"$@\" & criu=$!\nuntil [ -e /proc/{} ]; do :; done\nkill -KILL $criu\nkill -KILL $$\n",
            self.root
        );
        let mut command = self.job.setup.reverbs()?;
        command.args(["--quiet", "restart"]).arg(&self.image);
        command.env("REVERBS_CRIU", self.criu("killed-criu", &killed)?);
        let said = process::fail(command, &self.job.folder, "criu-killed", self.deadline())?;
        ensure!(said.contains("CRIU failed (signal: 9"), "it says: {said}");
        Ok(())
    }

    fn killed_after_criu(&self, started: &mut Started<'_>) -> Result<()> {
        for _ in 0..TRIES {
            let mut command = self.job.setup.reverbs()?;
            command.arg("restart").arg(&self.image);
            let mut restart = Running::start(command, &self.job.folder, "killed-after")?;
            while !restart.errors()?.contains("reverbs: restore ") {
                ensure!(restart.ended()?.is_none(), "{}", restart.errors()?);
                std::thread::sleep(PAUSE);
            }
            restart.signal(Signal::KILL)?;
            if !restart.wait(self.deadline())?.success() {
                return Ok(());
            }
            started.kill()?;
        }
        anyhow::bail!("it is always faster");
    }

    /// Gives the restart, and the process id of a CRIU that waits for the file `go`.
    fn start_with_held_criu(&self, name: &str) -> Result<(Running, u32)> {
        let folder = &self.job.folder;
        let (pid, go) = (folder.join(format!("{name}.criu")), folder.join("go"));
        let held = format!(
            "echo $$ > {pid}.fresh && mv {pid}.fresh {pid}\nuntil [ -e {go} ]; do sleep 0.02; done\nexec criu \"$@\"\n",
            pid = pid.display(),
            go = go.display()
        );
        let mut command = self.job.setup.reverbs()?;
        command.arg("restart").arg(&self.image);
        command.env("REVERBS_CRIU", self.criu("held-criu", &held)?);
        let mut restart = Running::start(command, folder, name)?;
        let criu = restart.wait_until(self.deadline(), "it started CRIU", |_| {
            Ok(fs::read_to_string(&pid).ok())
        })?;
        Ok((restart, criu.trim().parse()?))
    }

    /// A command in CRIU's place, which does this when it is to restore.
    fn criu(&self, name: &str, restore: &str) -> Result<PathBuf> {
        // The share has no permissions of its own.
        let path = Path::new("/tmp").join(format!("{name}-{}", self.root));
        fs::write(
            &path,
            format!("#!/bin/sh\n[ \"$1\" = restore ] || exec criu \"$@\"\n{restore}"),
        )?;
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
        Ok(path)
    }

    fn wait_for_traffic(&self) -> Result<()> {
        const PACKETS: u64 = 500;
        let device = &self.job.setup.device;
        let enough = packets_sent(device)? + PACKETS;
        let deadline = self.deadline();
        while packets_sent(device)? < enough {
            ensure!(!deadline.passed(), "the job sends nothing");
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn deadline(&self) -> Deadline {
        self.job.deadline.at_most(COMMAND_LIMIT)
    }
}
