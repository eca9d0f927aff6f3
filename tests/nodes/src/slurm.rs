//! A real Slurm on the nodes: munged and slurmd on each, slurmctld on the first.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reverbs_tests::process;
use reverbs_tests::setup::Deadline;

use crate::cluster::Cluster;
use crate::debian::{self, Suite};
use crate::node::Node;

/// The time limit for a command of Slurm's, and for the nodes to be ready.
const LIMIT: Duration = Duration::from_secs(30);

const PAUSE: Duration = Duration::from_millis(200);

/// Seconds until a job that was put back into the queue may start again: the least that Slurm takes. Its own value is 120.
const REQUEUE_DELAY: u32 = 5;

/// They are not what a case has left behind.
const DAEMONS: [&str; 4] = ["munged", "slurmctld-wlm", "slurmscriptd", "slurmd-wlm"];

const PACKAGES: [&str; 5] = [
    "munge",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "slurmctld",
    "slurmd",
];

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// The unpacked packages, fetched when they are not there yet, with clients that find their libraries.
///
/// # Errors
/// When they cannot be fetched.
pub fn get() -> Result<PathBuf> {
    debian::get("slurm", Suite::Own, &PACKAGES)
}

/// A Slurm that is up.
#[derive(Debug)]
pub struct Slurm {
    /// Its configuration, its logs, and what its commands say.
    folder: PathBuf,
    /// Where its users are.
    submit_folder: PathBuf,
    packages: PathBuf,
}

impl Slurm {
    /// Starts it on all nodes that are up.
    ///
    /// # Errors
    /// When a daemon does not start, or a node is not ready in time.
    pub fn start(cluster: &mut Cluster, folder: &Path) -> Result<Self> {
        let slurm = Self {
            folder: folder.join("slurm"),
            submit_folder: folder.to_owned(),
            packages: get()?,
        };
        fs::create_dir_all(&slurm.folder)?;
        slurm.configure(cluster)?;
        slurm.make_clients()?;
        cluster.expect(&DAEMONS);
        for node in cluster.nodes() {
            slurm.start_daemons(node, cluster.first()?.name() == node.name())?;
        }
        slurm.wait_until_ready(cluster)?;
        Ok(slurm)
    }

    fn configure(&self, cluster: &Cluster) -> Result<()> {
        let first = cluster.first()?;
        let mut text = format!(
            "ClusterName=nodes\nSlurmctldHost={}({})\nSlurmUser=root\nSlurmdUser=root\n\
             AuthType=auth/munge\nAuthInfo=cred_expire={REQUEUE_DELAY}\nPluginDir={}\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/affinity\nTaskPluginParam=Threads\nMpiDefault=none\n\
             JobAcctGatherType=jobacct_gather/none\nSelectType=select/linear\n\
             SchedulerParameters=sched_interval=2\n\
             SlurmdParameters=config_overrides\nReturnToService=2\n\
             SlurmctldPidFile=/run/slurmctld.pid\nSlurmdPidFile=/run/slurmd.pid\n\
             SlurmdSpoolDir=/tmp/slurmd\nStateSaveLocation=/tmp/slurmctld\n\
             SlurmctldLogFile={}/slurmctld.log\nSlurmdLogFile={}/slurmd-%n.log\n",
            first.name(),
            first.address(),
            self.packages.join(LIBRARIES).join("slurm-wlm").display(),
            self.folder.display(),
            self.folder.display(),
        );
        for node in cluster.nodes() {
            text.push_str(&format!(
                "NodeName={} NodeAddr={} CPUs=2 RealMemory=1000\n",
                node.name(),
                node.address()
            ));
        }
        text.push_str("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n");
        fs::write(self.configuration(), text)?;
        // There is neither systemd nor a mounted hierarchy.
        let cgroups = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n";
        Ok(fs::write(self.folder.join("cgroup.conf"), cgroups)?)
    }

    fn configuration(&self) -> PathBuf {
        self.folder.join("slurm.conf")
    }

    /// The commands of users: they know where the libraries and the configuration are, and hand nothing of it on to jobs.
    fn make_clients(&self) -> Result<()> {
        let clients = self.clients();
        fs::create_dir_all(&clients)?;
        let loaders = self.folder.join("loaders");
        fs::create_dir_all(&loaders)?;
        for name in ["sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"] {
            // The kernel calls a process by the name of the file that it has started.
            let loader = loaders.join(name);
            let _ = fs::remove_file(&loader);
            std::os::unix::fs::symlink("/lib64/ld-linux-x86-64.so.2", &loader)?;
            let script = clients.join(name);
            fs::write(
                &script,
                format!(
                    "#!/bin/sh\nexport SLURM_CONF='{}'\n\
                     exec '{3}' --library-path '{1}/slurm-wlm:{1}' --argv0 {name} '{2}' \"$@\"\n",
                    self.configuration().display(),
                    self.packages.join(LIBRARIES).display(),
                    self.packages.join("usr/bin").join(name).display(),
                    loader.display(),
                ),
            )?;
            Command::new("chmod").arg("755").arg(&script).status()?;
        }
        Ok(())
    }

    /// For the PATH of users.
    pub fn clients(&self) -> PathBuf {
        self.folder.join("bin")
    }

    fn start_daemons(&self, node: &Node, is_first: bool) -> Result<()> {
        let packages = self.packages.display();
        node.shell(
            "mkdir -p /run/munge /tmp/slurmd /tmp/slurmctld && chmod 755 /run/munge && \
             head -c 128 /dev/zero | tr '\\0' k > /run/munge/munge.key && \
             chmod 600 /run/munge/munge.key",
        )?;
        let daemon = |text: &str| {
            let log = self.folder.join(format!("daemons-{}.log", node.name()));
            node.shell(&format!(
                "export LD_LIBRARY_PATH={packages}/{LIBRARIES}/slurm-wlm:{packages}/{LIBRARIES}; \
                 {text} >>{} 2>&1",
                log.display()
            ))
            .with_context(|| fs::read_to_string(log).unwrap_or_default())
        };
        daemon(&format!(
            "{packages}/usr/sbin/munged --force --key-file /run/munge/munge.key \
             --log-file /run/munge/log --pid-file /run/munge/pid --seed-file /run/munge/seed"
        ))?;
        let configuration = self.configuration();
        let configuration = configuration.display();
        if is_first {
            daemon(&format!(
                "{packages}/usr/sbin/slurmctld-wlm -f {configuration}"
            ))?;
        }
        // Of itself it looks for the steps' program where Debian installs it.
        daemon(&format!(
            "{packages}/usr/sbin/slurmd-wlm -f {configuration} -d {packages}/usr/sbin/slurmstepd-wlm"
        ))?;
        Ok(())
    }

    fn wait_until_ready(&self, cluster: &Cluster) -> Result<()> {
        let deadline = Deadline::after(LIMIT);
        loop {
            // It says nothing while slurmctld is not there.
            let listed = self.run(cluster, "sinfo -h -N -o %T").unwrap_or_default();
            let states: Vec<_> = listed.lines().collect();
            if states.len() == cluster.nodes().len() && states.iter().all(|state| *state == "idle")
            {
                return Ok(());
            }
            ensure!(
                !deadline.passed(),
                "Slurm's nodes are not ready: {states:?}"
            );
            std::thread::sleep(PAUSE);
        }
    }

    /// Runs a command of the shell on the first node, as a user of Slurm does. Gives its output.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, cluster: &Cluster, text: &str) -> Result<String> {
        let mut command = cluster.first()?.command("sh", &self.submit_folder);
        command.args(["-c", text]).env("PATH", self.path());
        let name = text.split(' ').next().unwrap_or_default();
        process::run(command, &self.folder, name, Deadline::after(LIMIT))
            .with_context(|| text.to_owned())
    }

    fn path(&self) -> String {
        let path = std::env::var("PATH").unwrap_or_default();
        format!("{}:{path}", self.clients().display())
    }

    /// Puts a batch script into the queue. Gives the job's number.
    ///
    /// # Errors
    /// When Slurm refuses it.
    pub fn submit(&self, cluster: &Cluster, script: &Path, options: &str) -> Result<u32> {
        let text = format!("sbatch --parsable {options} '{}'", script.display());
        let printed = self.run(cluster, &text)?;
        printed.trim().parse().with_context(|| printed.clone())
    }

    /// What Slurm knows of a job.
    ///
    /// # Errors
    /// When it does not know it.
    pub fn job(&self, cluster: &Cluster, number: u32) -> Result<BatchJob> {
        let text = self.run(cluster, &format!("scontrol show job -o {number}"))?;
        BatchJob::parse(&text)
    }

    /// Waits until a job is as it is wanted.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_for(
        &self,
        cluster: &Cluster,
        number: u32,
        deadline: Deadline,
        wanted: impl Fn(&BatchJob) -> bool,
    ) -> Result<BatchJob> {
        loop {
            let job = self.job(cluster, number)?;
            if wanted(&job) {
                return Ok(job);
            }
            ensure!(!deadline.passed(), "the job is still {job:?}");
            std::thread::sleep(PAUSE);
        }
    }
}

/// A job of Slurm's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BatchJob {
    /// `PENDING`, `RUNNING`, `COMPLETED`, ...
    pub state: String,
    /// How often it was put back into the queue.
    pub restarts: u32,
    /// Status and signal.
    pub exit_code: String,
}

impl BatchJob {
    fn parse(text: &str) -> Result<Self> {
        let fields: BTreeMap<&str, &str> = text
            .split_whitespace()
            .filter_map(|field| field.split_once('='))
            .collect();
        let field = |name: &str| {
            let value = fields.get(name).copied();
            value.with_context(|| format!("no {name} in {text}"))
        };
        Ok(Self {
            state: field("JobState")?.to_owned(),
            restarts: field("Restarts")?.parse()?,
            exit_code: field("ExitCode")?.to_owned(),
        })
    }

    /// It has ended, and will not start again.
    pub fn is_over(&self) -> bool {
        ![
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "CONFIGURING",
            "SUSPENDED",
            "REQUEUED",
        ]
        .contains(&self.state.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_job_is_read() {
        let text = "JobId=2 JobName=a.sh UserId=root(0) JobState=RUNNING Reason=None Requeue=1 \
                    Restarts=1 BatchFlag=2 Reboot=0 ExitCode=0:0 RunTime=00:00:07";
        let job = BatchJob::parse(text).unwrap();
        assert_eq!((job.state.as_str(), job.restarts), ("RUNNING", 1));
        assert!(!job.is_over());
        let over = BatchJob::parse(&text.replace("RUNNING", "FAILED")).unwrap();
        assert!(over.is_over());
        BatchJob::parse("slurm_load_jobs error: Invalid job id specified").unwrap_err();
    }
}
