//! A test case over several nodes, and the list of all of them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reverbs_tests::report::{Place, Test};
use reverbs_tests::setup::Deadline;

use crate::cluster::{Cluster, Identity};
use crate::library::Library;
use crate::{bare, debian, faults, saved, slurm_cases};

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where the `reverbs` command and the provider are laid out.
    pub stage: Option<PathBuf>,
    /// Folder of the compiled test programs.
    pub programs: PathBuf,
    /// Folder for the captured output.
    pub output: PathBuf,
    /// The `criu` command of the nodes.
    pub criu: PathBuf,
}

impl Setup {
    /// The path of one of our own programs.
    ///
    /// # Errors
    /// When it was not compiled.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = self.programs.join(name);
        ensure!(
            path.is_file(),
            "{} does not exist: run `node-tests --build {}` first",
            path.display(),
            self.programs.display()
        );
        Ok(path)
    }

    /// The `reverbs` command.
    ///
    /// # Errors
    /// When the run has none.
    pub fn reverbs(&self) -> Result<PathBuf> {
        let stage = self.stage.as_ref().context("no --stage DIR")?;
        Ok(stage.join("bin/reverbs"))
    }
}

/// What a case gets to work with.
#[derive(Debug)]
pub struct Context<'a> {
    pub setup: &'a Setup,
    /// The case's own folder for captured output; all nodes have it at the same place.
    pub folder: PathBuf,
    pub deadline: Deadline,
}

impl Context<'_> {
    /// Nodes on a network of their own.
    ///
    /// # Errors
    /// When they do not come up.
    pub fn cluster(&self, identities: &[Identity]) -> Result<Cluster> {
        let setup = self.setup;
        let program = std::env::current_exe()?;
        let mut bound = vec![debian::folder()?];
        bound.extend(program.parent().map(PathBuf::from));
        let mut cluster = Cluster::new(&self.folder, &setup.criu, &bound)?;
        cluster.boot(identities)?;
        Ok(cluster)
    }
}

/// One named test.
#[derive(Debug)]
pub struct Case {
    pub name: String,
    /// Without it, the case shows that nodes, launcher and CRIU do what is expected of them.
    pub needs_reverbs: bool,
    /// A case that takes longer is ended and has failed.
    pub limit: Duration,
    pub action: Action,
}

impl Case {
    pub fn needs_slurm(&self) -> bool {
        matches!(self.action, Action::Batch(_))
    }

    pub fn library(&self) -> Library {
        match &self.action {
            Action::Saved(saved) => saved.library(),
            Action::Bare(_) | Action::Broken(_) | Action::Batch(_) => Library::OpenMpi4,
        }
    }
}

/// What a case runs.
#[derive(Debug)]
pub enum Action {
    Bare(bare::Bare),
    /// A job below `reverbs run`.
    Saved(&'static saved::Saved),
    /// The same while something breaks.
    Broken(faults::Broken),
    /// A job of Slurm's.
    Batch(slurm_cases::Batch),
}

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    let mut cases = bare::cases();
    cases.extend(saved::cases());
    cases.extend(slurm_cases::cases());
    cases.extend(faults::cases());
    cases
}

/// A case with the settings of the run.
#[derive(Debug)]
pub struct Prepared<'a> {
    pub case: &'a Case,
    pub setup: &'a Setup,
}

impl Test for Prepared<'_> {
    fn name(&self) -> &str {
        &self.case.name
    }

    fn lacking(&self) -> Option<&'static str> {
        (self.case.needs_reverbs && self.setup.stage.is_none())
            .then_some("the reverbs command (--stage DIR)")
    }

    fn limit(&self) -> Duration {
        self.case.limit
    }

    fn run(&self, place: Place) -> Result<String> {
        let context = Context {
            setup: self.setup,
            folder: place.folder,
            deadline: place.deadline,
        };
        match &self.case.action {
            Action::Bare(bare) => bare::run(*bare, &context),
            Action::Saved(saved) => saved::run(saved, &context),
            Action::Broken(broken) => faults::run(broken, &context),
            Action::Batch(batch) => slurm_cases::run(*batch, &context),
        }
    }
}
