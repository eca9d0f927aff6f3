//! A job below `reverbs run`, and what is done to it from the first node.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reverbs_tests::process::Running;
use reverbs_tests::setup::Deadline;

use crate::case::Context;
use crate::clean;
use crate::cluster::Cluster;
use crate::job::{Job, Tree, still_runs};
use crate::library::Library;

/// The time limit of a single command.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// How a shell sees a process that SIGKILL has ended: so ends `reverbs run` when CRIU has ended the job.
const KILLED: i32 = 137;

const PAUSE: Duration = Duration::from_millis(20);

/// A job that was started with `reverbs run`, and may have been restarted since.
#[derive(Debug)]
pub struct Launched<'a> {
    context: &'a Context<'a>,
    job: Job,
    /// `reverbs run`, or after a restart `reverbs restart --wait`.
    runner: Running,
    /// Where the job's output goes, also after a restart.
    output: PathBuf,
    /// mpirun's id on the first node.
    root: u32,
    /// Commands so far: each has output files of its own.
    commands: u32,
}

impl<'a> Launched<'a> {
    /// Starts a job over all nodes that are up, and waits until it is at work.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn start(context: &'a Context<'a>, cluster: &Cluster, library: Library) -> Result<Self> {
        let job = Job::over(cluster, context, library)?;
        let pid_file = context.folder.join("job.pid");
        let mut command = reverbs(context, cluster)?;
        command
            .args(["run", "--images"])
            .arg(images(context))
            .arg("--pid-file")
            .arg(&pid_file)
            .arg("--");
        let mpirun = job.mpirun()?;
        command.arg(mpirun.get_program()).args(mpirun.get_args());
        let mut runner = cluster.first()?.start(&command, &context.folder, "job")?;
        runner.wait_for_line(context.deadline, "ready")?;
        let root = fs::read_to_string(&pid_file)?.trim().parse()?;
        let output = runner.output_file().to_owned();
        let mut launched = Self {
            context,
            job,
            runner,
            output,
            root,
            commands: 0,
        };
        launched.wait_for_progress()?;
        Ok(launched)
    }

    pub fn job(&self) -> &Job {
        &self.job
    }

    /// mpirun's id on the first node.
    pub fn root(&self) -> u32 {
        self.root
    }

    /// What the job was started by.
    pub fn runner(&mut self) -> &mut Running {
        &mut self.runner
    }

    /// The command on the first node, for `reverbs VERB ROOT OPTIONS...`.
    ///
    /// # Errors
    /// When there is no command, or no node.
    pub fn command(&self, cluster: &Cluster, verb: &str, options: &[&str]) -> Result<Command> {
        let mut command = reverbs(self.context, cluster)?;
        command.arg(verb).arg(self.root.to_string()).args(options);
        Ok(command)
    }

    /// Starts such a command.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn begin(&mut self, cluster: &Cluster, verb: &str, options: &[&str]) -> Result<Running> {
        self.commands += 1;
        let command = self.command(cluster, verb, options)?;
        let name = format!("{verb}-{}", self.commands);
        cluster
            .first()?
            .start(&command, &self.context.folder, &name)
    }

    /// Runs such a command to its end, and gives its output.
    ///
    /// # Errors
    /// When it fails, or leaves anything behind.
    pub fn run(&mut self, cluster: &Cluster, verb: &str, options: &[&str]) -> Result<String> {
        let mut running = self.begin(cluster, verb, options)?;
        let ended = running.wait_for_success(self.context.deadline.at_most(COMMAND_LIMIT));
        ended.with_context(|| running.errors().unwrap_or_default())?;
        self.left_alone(cluster)?;
        Ok(running.output()?)
    }

    /// From now on each node but the first has a disk of its own where the images are.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn keep_images_apart(&self, cluster: &Cluster) -> Result<()> {
        let folder = images(self.context);
        fs::create_dir_all(&folder)?;
        for node in cluster.nodes().iter().skip(1) {
            node.shell(&format!("mount -t tmpfs own '{}'", folder.display()))?;
        }
        Ok(())
    }

    /// On those disks is nothing: what was made there is on the first node's, and what came there is not needed any more.
    ///
    /// # Errors
    /// When there is something.
    pub fn nothing_apart(&self, cluster: &Cluster) -> Result<()> {
        for node in cluster.nodes().iter().skip(1) {
            let left = node.shell(&format!("ls -A '{}'", images(self.context).display()))?;
            ensure!(left.is_empty(), "{} has {left}", node.name());
        }
        Ok(())
    }

    /// The last command has said that this phase is over.
    ///
    /// # Errors
    /// When it has not.
    pub fn require_phase(&self, phase: &str) -> Result<()> {
        let mut errors = String::new();
        for verb in ["checkpoint", "restart"] {
            let file = self
                .context
                .folder
                .join(format!("{verb}-{}.err", self.commands));
            errors += &fs::read_to_string(file).unwrap_or_default();
        }
        ensure!(
            errors.contains(&format!("reverbs: {phase} ")),
            "no phase {phase}: {errors}"
        );
        Ok(())
    }

    /// Nobody of the job is stopped, no packet of it is dropped, and no partial image is there.
    ///
    /// # Errors
    /// When that is not so.
    pub fn left_alone(&self, cluster: &Cluster) -> Result<()> {
        Self::runs_freely(cluster)?;
        clean::no_partial_image(&images(self.context))
    }

    fn runs_freely(cluster: &Cluster) -> Result<()> {
        for node in cluster.nodes() {
            clean::no_stopped_process(node)?;
            clean::no_rule(node)?;
        }
        Ok(())
    }

    /// Waits until the job runs freely, and nobody is there any more who was working on it: somebody may have to notice first
    /// that a checkpoint has failed.
    ///
    /// # Errors
    /// When something stays.
    pub fn wait_until_free(&self, cluster: &Cluster, limit: Duration) -> Result<()> {
        let deadline = Deadline::after(limit);
        loop {
            let free = Self::runs_freely(cluster).and_then(|()| self.job.nothing_else(cluster));
            match free {
                Err(_) if !deadline.passed() => std::thread::sleep(PAUSE),
                settled => return settled,
            }
        }
    }

    /// A checkpoint under which the job runs on. Gives the image.
    ///
    /// # Errors
    /// When it fails, the image is not complete, or the job does not run on.
    pub fn checkpoint(&mut self, cluster: &Cluster) -> Result<PathBuf> {
        let trees = self.job.trees(cluster)?;
        let output = self.run(cluster, "checkpoint", &[])?;
        let image = self.image(cluster, &output)?;
        self.wait_for_progress()?;
        let after = self.job.trees(cluster)?;
        ensure!(
            ids(&trees) == ids(&after),
            "{trees:?} have become {after:?}"
        );
        Ok(image)
    }

    /// A checkpoint that ends the job. Gives the image.
    ///
    /// # Errors
    /// When it fails, the image is not complete, or the job has not ended everywhere.
    pub fn checkpoint_and_stop(&mut self, cluster: &Cluster) -> Result<PathBuf> {
        let output = self.run(cluster, "checkpoint", &["--stop"])?;
        let image = self.image(cluster, &output)?;
        let status = self
            .runner
            .wait(self.context.deadline.at_most(COMMAND_LIMIT))?;
        ensure!(
            status.code() == Some(KILLED),
            "the job is to be ended by CRIU, and ended with {status}"
        );
        clean::check(cluster, &[images(self.context)])?;
        Ok(image)
    }

    /// The path that `checkpoint` has printed, of a complete image.
    ///
    /// # Errors
    /// When it is no path, or the image is not complete.
    pub fn image(&self, cluster: &Cluster, output: &str) -> Result<PathBuf> {
        let image = PathBuf::from(output.trim_end());
        ensure!(
            output.lines().count() == 1 && image.is_absolute(),
            "the output of `checkpoint` is to be a path: {output}"
        );
        let nodes = self.job.hosts().len();
        let manifest = if nodes == 1 {
            "manifest.json"
        } else {
            "job.json"
        };
        ensure!(
            image.join(manifest).is_file(),
            "{} has no {manifest}",
            image.display()
        );
        let parts = fs::read_dir(&image)?.flatten();
        let parts = parts.filter(|entry| entry.path().is_dir()).count();
        ensure!(
            nodes == 1 || parts == nodes,
            "{} has {parts} parts",
            image.display()
        );
        let mut inspect = reverbs(self.context, cluster)?;
        inspect.arg("inspect").arg(&image);
        let mut inspect = cluster
            .first()?
            .start(&inspect, &self.context.folder, "inspect")?;
        inspect.wait_for_success(self.context.deadline.at_most(COMMAND_LIMIT))?;
        Ok(image)
    }

    /// Begins to restart the job from an image, where nothing of it runs any more.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn begin_restart(
        &mut self,
        cluster: &Cluster,
        image: &Path,
        moves: &[(String, String)],
        options: &[&str],
    ) -> Result<Running> {
        self.commands += 1;
        let mut command = reverbs(self.context, cluster)?;
        command.arg("restart").arg(image).args(options);
        for (old, new) in moves {
            command.arg("--node").arg(format!("{old}={new}"));
        }
        let name = format!("restart-{}", self.commands);
        cluster
            .first()?
            .start(&command, &self.context.folder, &name)
    }

    /// Restarts the job from an image. `moves` are old and new names of nodes.
    ///
    /// # Errors
    /// When that fails, or the job does not go on from there.
    pub fn restart(
        &mut self,
        cluster: &Cluster,
        image: &Path,
        moves: &[(String, String)],
    ) -> Result<()> {
        let command = self.begin_restart(cluster, image, moves, &["--wait"])?;
        self.follow(cluster, command)
    }

    /// From here on the job is below this restart, which has to bring it back.
    ///
    /// # Errors
    /// When it does not, or the job does not go on from there.
    pub fn follow(&mut self, cluster: &Cluster, restart: Running) -> Result<()> {
        self.runner = restart;
        let deadline = self.context.deadline.at_most(COMMAND_LIMIT);
        let begun = self.runner.wait_for_line(deadline, &self.root.to_string());
        begun.with_context(|| self.runner.errors().unwrap_or_default())?;
        self.wait_for_progress()?;
        let trees = self.job.trees(cluster)?;
        ensure!(
            trees.first().map(|tree| tree.root.inner) == Some(self.root),
            "mpirun was {} and is {:?}",
            self.root,
            trees.first()
        );
        self.left_alone(cluster)
    }

    /// Restarts the job with nobody to wait for it, lets it end, and checks what it says. Gives the number of rounds.
    ///
    /// # Errors
    /// When anything is wrong, or left while it runs or afterwards.
    pub fn restart_unattended(mut self, cluster: &Cluster, image: &Path) -> Result<u64> {
        let mut command = self.begin_restart(cluster, image, &[], &[])?;
        let deadline = self.context.deadline.at_most(COMMAND_LIMIT);
        let ended = command.wait_for_success(deadline);
        ended.with_context(|| command.errors().unwrap_or_default())?;
        self.job.wait_for_progress(deadline, || Ok(()))?;
        self.job.nothing_else(cluster)?;
        self.left_alone(cluster)?;
        self.job.tell_to_finish()?;
        let rounds = self.job.wait_for_account(&self.output, deadline)?;
        clean::check(cluster, &[images(self.context)])?;
        Ok(rounds)
    }

    /// Waits until the job has done some more rounds.
    ///
    /// # Errors
    /// When it ends, or stands still.
    pub fn wait_for_progress(&mut self) -> Result<()> {
        let deadline = self.context.deadline.at_most(COMMAND_LIMIT);
        let runner = &mut self.runner;
        self.job.wait_for_progress(deadline, || still_runs(runner))
    }

    /// Lets the job end, checks what it says, and that nothing is left of it. Gives the number of rounds.
    ///
    /// # Errors
    /// When anything is wrong or left.
    pub fn finish(mut self, cluster: &Cluster) -> Result<u64> {
        self.job.tell_to_finish()?;
        let deadline = self.context.deadline.at_most(COMMAND_LIMIT);
        let ended = self.runner.wait_for_success(deadline);
        ended.with_context(|| self.runner.errors().unwrap_or_default())?;
        let rounds = self.job.account(&fs::read_to_string(&self.output)?)?;
        clean::check(cluster, &[images(self.context)])?;
        Ok(rounds)
    }

    /// Waits until a job has ended that cannot go on.
    ///
    /// # Errors
    /// When it does not end, or ends well.
    pub fn wait_for_failure(&mut self) -> Result<()> {
        let deadline = self.context.deadline.at_most(COMMAND_LIMIT);
        let status = self.runner.wait(deadline)?;
        ensure!(!status.success(), "the job cannot have ended well");
        Ok(())
    }
}

/// The ids of a job's processes: they stay the same ones in a job that runs on.
fn ids(trees: &[Tree]) -> Vec<u32> {
    trees.iter().flat_map(Tree::pids).collect()
}

/// Where the images of a case's job go: a folder that all nodes share.
pub fn images(context: &Context<'_>) -> PathBuf {
    context.folder.join("images")
}

/// The complete image that was made last.
///
/// # Errors
/// When there is none.
pub fn newest_image(context: &Context<'_>) -> Result<PathBuf> {
    let mut complete: Vec<_> = fs::read_dir(images(context))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("job.json").is_file())
        .collect();
    complete.sort_by_key(|path| path.metadata().and_then(|data| data.modified()).ok());
    complete.pop().context("there is no complete image")
}

/// The `reverbs` command, told how other nodes are reached.
fn reverbs(context: &Context<'_>, cluster: &Cluster) -> Result<Command> {
    let mut command = Command::new(context.setup.reverbs()?);
    command.env("REVERBS_RSH", cluster.rsh());
    Ok(command)
}

/// Waits until a command has written on standard error that a phase is over.
///
/// # Errors
/// When it ends or time runs out first.
pub fn wait_for_phase(command: &mut Running, phase: &str, deadline: Deadline) -> Result<()> {
    let line = format!("reverbs: {phase}");
    loop {
        let ended = command.ended()?;
        let errors = command.errors()?;
        let found = errors.lines().any(|text| {
            text.strip_prefix(&line)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
        });
        if found {
            return Ok(());
        }
        ensure!(ended.is_none(), "it ended before \"{phase}\": {errors}");
        ensure!(
            !deadline.passed(),
            "time ran out before \"{phase}\": {errors}"
        );
        std::thread::sleep(PAUSE);
    }
}
