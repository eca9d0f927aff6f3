//! The job of most cases: `mpi_check` over several nodes, launched by a stock MPI library over TCP.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use reverbs_tests::mpi;
use reverbs_tests::process::Running;
use reverbs_tests::setup::Deadline;

use crate::case::Context;
use crate::cluster::Cluster;
use crate::library::Library;
use crate::node::Node;
use crate::processes::{self, Process};

/// Ranks of each node.
pub const RANKS: usize = 2;

/// So many rounds more show that the job is at work.
const ROUNDS: u64 = 3;

const PAUSE: Duration = Duration::from_millis(20);

/// What a job was started with; it is the same job after a restart.
#[derive(Clone, Debug)]
pub struct Job {
    library: Library,
    /// For its output and for the files by which it is steered; the same on all nodes.
    folder: PathBuf,
    /// The names that mpirun was given.
    hosts: Vec<String>,
    program: PathBuf,
}

impl Job {
    /// A job over all nodes that are up.
    ///
    /// # Errors
    /// When the program was not compiled.
    pub fn over(cluster: &Cluster, context: &Context<'_>, library: Library) -> Result<Self> {
        let nodes = cluster.nodes().iter();
        Ok(Self {
            library,
            folder: context.folder.clone(),
            hosts: nodes.map(|node| node.name().to_owned()).collect(),
            program: context.setup.program(library.program())?,
        })
    }

    pub fn ranks(&self) -> usize {
        self.hosts.len() * RANKS
    }

    /// The names that mpirun was given, first the node that it runs on.
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// The command that a user would give.
    ///
    /// # Errors
    /// When there is no place for what is not installed.
    pub fn mpirun(&self) -> Result<Command> {
        let mut command = self.library.mpirun(&self.hosts, RANKS)?;
        command
            .arg(&self.program)
            .arg("--until")
            .arg(self.until())
            .arg("--progress")
            .arg(self.progress_file());
        Ok(command)
    }

    /// Its existence makes the job finish.
    fn until(&self) -> PathBuf {
        self.folder.join("enough")
    }

    fn progress_file(&self) -> PathBuf {
        self.folder.join("progress")
    }

    /// Rounds that all ranks have done.
    ///
    /// # Errors
    /// When the file holds something else.
    pub fn progress(&self) -> Result<u64> {
        // Just made, it is empty.
        let text = fs::read_to_string(self.progress_file()).unwrap_or_default();
        match text.trim() {
            "" => Ok(0),
            number => number.parse().with_context(|| text.clone()),
        }
    }

    /// Waits until it has done some more rounds.
    ///
    /// # Errors
    /// When it does none, or `alive` says that it has ended.
    pub fn wait_for_progress(
        &self,
        deadline: Deadline,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let before = self.progress()?;
        while self.progress()? < before + ROUNDS {
            alive()?;
            ensure!(!deadline.passed(), "the job stands still at round {before}");
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Lets the job end of itself.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn tell_to_finish(&self) -> Result<()> {
        Ok(fs::write(self.until(), "")?)
    }

    /// Waits until a job that nobody waits for has accounted for itself.
    ///
    /// # Errors
    /// When it does not, or found anything wrong.
    pub fn wait_for_account(&self, output: &Path, deadline: Deadline) -> Result<u64> {
        loop {
            let text = fs::read_to_string(output)?;
            if text.lines().any(|line| line == "ok") {
                return self.account(&text);
            }
            ensure!(!deadline.passed(), "the job does not end: {text}");
            std::thread::sleep(PAUSE);
        }
    }

    /// Reads what all ranks say at their end. Gives the number of rounds.
    ///
    /// # Errors
    /// When one is missing, or the ranks do not agree.
    pub fn account(&self, output: &str) -> Result<u64> {
        let rounds = mpi::check_account(output, u32::try_from(self.ranks())?)?;
        let noted = self.progress()?;
        ensure!(rounds == noted, "{rounds} rounds done and {noted} noted");
        Ok(rounds)
    }

    /// The processes of the job: on the first node mpirun, on the others the daemon of its library, and the ranks below them.
    ///
    /// # Errors
    /// When a node has others, or what is below a root is anything else (a remote shell, above all).
    pub fn trees(&self, cluster: &Cluster) -> Result<Vec<Tree>> {
        let mut trees = Vec::new();
        for node in cluster.nodes() {
            let path = self.library.path_to_ranks(trees.is_empty());
            trees.push(self.tree(node, path)?);
        }
        Ok(trees)
    }

    /// `path`: the names from the root to the parent of the ranks.
    fn tree(&self, node: &Node, path: &[&str]) -> Result<Tree> {
        let name = path[0];
        let roots = node.called(name);
        let [root] = roots.as_slice() else {
            bail!("{} has as {name}: {roots:?}", node.name());
        };
        let members = reverbs_tests::tree::descendants(root.pid);
        let mut below: Vec<Process> = node.processes();
        // Who has ended holds nothing. Hydra does not ask how `reverbs remote` has ended before it ends itself.
        below.retain(|process| members.contains(&process.pid) && !process.is_zombie());
        let mut daemons = Vec::new();
        let mut parent = root.pid;
        for name in &path[1..] {
            let found = below
                .iter()
                .position(|process| process.name == *name && process.parent == parent);
            let found = found.with_context(|| format!("{} has no {name}", node.name()))?;
            parent = below[found].pid;
            daemons.push(below.remove(found));
        }
        let program = self.library.program();
        let strange = below
            .iter()
            .find(|process| process.name != program || process.parent != parent);
        if let Some(strange) = strange {
            bail!("{} has {strange:?} below {name}", node.name());
        }
        ensure!(
            below.len() == RANKS,
            "{} has {} ranks",
            node.name(),
            below.len()
        );
        Ok(Tree {
            host: node.name().to_owned(),
            root: root.clone(),
            daemons,
            ranks: below,
        })
    }

    /// While the job runs, nobody else does: no remote shell, no daemon. What it was started by is on the first node.
    ///
    /// # Errors
    /// When somebody does.
    pub fn nothing_else(&self, cluster: &Cluster) -> Result<()> {
        let first = cluster.first()?.name();
        for (node, tree) in cluster.nodes().iter().zip(self.trees(cluster)?) {
            let mut others = node.processes();
            let own = tree.pids();
            others.retain(|process| {
                let ended_below = process.is_zombie() && own.contains(&process.parent);
                !own.contains(&process.pid) && !ended_below
            });
            if node.name() == first {
                // Also who empties the pipes of a job that was brought back.
                let above = processes::ancestors(&tree.root);
                others.retain(|process| !above.contains(&process.pid) && process.name != "cat");
            }
            ensure!(others.is_empty(), "{} has besides: {others:?}", node.name());
        }
        Ok(())
    }
}

/// What a job has on one node.
#[derive(Clone, Debug)]
pub struct Tree {
    pub host: String,
    pub root: Process,
    /// Between the root and the ranks.
    pub daemons: Vec<Process>,
    pub ranks: Vec<Process>,
}

impl Tree {
    /// Of all its processes, the root first.
    pub fn pids(&self) -> Vec<u32> {
        let below = self.daemons.iter().chain(&self.ranks);
        std::iter::once(&self.root)
            .chain(below)
            .map(|process| process.pid)
            .collect()
    }
}

/// The program below which a job runs must not have ended.
///
/// # Errors
/// When it has.
pub fn still_runs(runner: &mut Running) -> Result<()> {
    match runner.ended()? {
        Some(status) => bail!("the job has ended ({status}): {}", runner.errors()?.trim()),
        None => Ok(()),
    }
}
