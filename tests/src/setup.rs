//! What all cases share: the mode, the device, and where programs and output are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::chaos;

/// Whether programs run on the device itself or through the provider.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Mode {
    /// No provider: shows what the device and the programs do on their own.
    Bare,
    /// Through the provider of this stage folder (`cargo xtask stage`).
    Provider { stage: PathBuf },
}

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Setup {
    pub mode: Mode,
    /// Name of the RDMA device, as `ibv_devices` shows it.
    pub device: String,
    /// Index of the GID that programs use; 1 is the IPv4 one on Soft-RoCE.
    pub gid_index: u32,
    /// Folder of the compiled test programs.
    pub programs: PathBuf,
    /// Folder for the captured output; each case makes one of its own in it.
    pub output: PathBuf,
    /// How often the cycle cases cycle.
    pub cycles: u32,
    /// Pace of the cycle cases: from the start of one cycle to the start of the next.
    pub pace: Duration,
    /// Of what is random: the content of messages, the moments of cycles.
    pub seed: u64,
    /// The machine's clock counts instructions.
    pub counting: bool,
    /// What a wrapper around the device below the provider is to do, in the words of `tests/wrappers`.
    pub wrapper: Option<String>,
    /// Processes replace their own hardware all the time, and keep their logs in this folder (`crate::chaos`).
    pub chaos: Option<PathBuf>,
}

impl Setup {
    /// A command whose RDMA devices are driven as the mode says.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        match &self.mode {
            Mode::Bare => command.env_remove("RDMAV_DRIVERS"),
            Mode::Provider { stage } => command.env("RDMAV_DRIVERS", stage.join("lib/libreverbs")),
        };
        if let Some(plan) = &self.wrapper {
            command.env("REVERBS_LIBIBVERBS", self.programs.join(WRAPPER));
            command.env("REVERBS_WRAPPER", plan);
        }
        if let Some(folder) = &self.chaos
            && self.mode != Mode::Bare
        {
            chaos::ask_for(&mut command, folder);
        }
        command
    }

    /// The path of one of our own programs.
    ///
    /// # Errors
    /// When it was not compiled.
    pub fn own_program(&self, name: &str) -> Result<PathBuf> {
        let path = self.programs.join(name);
        if !path.is_file() {
            bail!(
                "{} does not exist: run `guest-tests --build {}` on the host first",
                path.display(),
                self.programs.display()
            );
        }
        Ok(path)
    }

    /// The `reverbs` command of the stage folder.
    ///
    /// # Errors
    /// In bare mode, or when the stage folder has no such command.
    pub fn reverbs(&self) -> Result<Command> {
        let Mode::Provider { stage } = &self.mode else {
            bail!("this case needs the provider: give --stage DIR");
        };
        let path = stage.join("bin/reverbs");
        path.metadata()
            .with_context(|| format!("no reverbs command at {}", path.display()))?;
        Ok(Command::new(path))
    }
}

/// The library of `tests/wrappers`, among the programs.
pub const WRAPPER: &str = "libreverbs_wrappers.so";

/// The moment at which a case has taken too long.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// A deadline that far from now.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit)
    }

    /// What is left; zero when it has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// The earlier of this deadline and one that far from now.
    pub fn at_most(self, limit: Duration) -> Self {
        Self(self.0.min(Instant::now() + limit))
    }

    /// Whether it has passed.
    pub fn passed(self) -> bool {
        self.remaining().is_zero()
    }
}
