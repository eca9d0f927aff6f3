//! MPI jobs: how they are started, and who their ranks are.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::case::Job;
use crate::process::Running;
use crate::setup::{Deadline, Setup};
use crate::{evidence, tree};

/// Debian's MPI libraries. Both use UCX.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Library {
    OpenMpi,
    Mpich,
}

impl Library {
    /// `mpi_check` as it is compiled for it.
    pub fn program(self) -> &'static str {
        match self {
            Self::OpenMpi => "mpi_check",
            Self::Mpich => "mpi_check_mpich",
        }
    }
}

/// A command that runs `mpi_check` over UCX's RC transport on the device of the run.
///
/// # Errors
/// When it was not compiled.
pub fn mpirun(setup: &Setup, library: Library, ranks: u32) -> Result<Command> {
    let mut command = setup.command(match library {
        Library::OpenMpi => "mpirun",
        Library::Mpich => "mpiexec.mpich",
    });
    command
        .env("UCX_TLS", "rc,self")
        .env("UCX_NET_DEVICES", format!("{}:1", setup.device))
        .env("UCX_IB_GID_INDEX", setup.gid_index.to_string())
        // Soft-RoCE's own GRHs do not pass this check, with or without the provider.
        .env("UCX_UD_VERBS_ETH_DGID_CHECK", "n")
        .args(["-np", &ranks.to_string()]);
    if library == Library::OpenMpi {
        command
            .args(["--allow-run-as-root", "--oversubscribe"])
            .args(["--mca", "pml", "ucx", "--mca", "btl", "^openib"])
            // More ranks than processors: a rank that waits must give way.
            .args(["--mca", "mpi_yield_when_idle", "1"]);
    }
    command.arg(setup.own_program(library.program())?);
    Ok(command)
}

/// Starts `mpi_check` and waits until its ranks have met.
///
/// # Errors
/// When they do not, or do not drive the device in the wanted way.
pub fn start_check(
    job: &Job<'_>,
    library: Library,
    ranks: u32,
    options: &[&str],
) -> Result<Running> {
    let mut command = mpirun(job.setup, library, ranks)?;
    command.args(options);
    let mut mpirun = Running::start(command, &job.folder, "mpirun")?;
    mpirun.wait_for_line(job.deadline, "ready")?;
    let found = processes_called(mpirun.pid(), library.program());
    ensure!(
        found.len() == ranks as usize,
        "{} ranks instead of {ranks}",
        found.len()
    );
    for rank in found {
        evidence::check_mode(rank, &job.setup.mode)?;
    }
    Ok(mpirun)
}

/// Waits for the end of `mpi_check` and checks what its ranks say. Gives the number of rounds.
///
/// # Errors
/// When the job fails, or the ranks do not agree.
pub fn finish_check(mpirun: &mut Running, ranks: u32, deadline: Deadline) -> Result<u64> {
    mpirun.wait_for_success(deadline)?;
    check_account(&mpirun.output()?, ranks)
}

/// Reads `rank R done sum S rounds N` from each rank and `ok`, and gives the number of rounds.
///
/// # Errors
/// When one is missing, or the ranks do not agree.
pub fn check_account(output: &str, ranks: u32) -> Result<u64> {
    ensure!(
        output.lines().any(|line| line == "ok"),
        "the job did not say ok"
    );
    let mut accounts: Vec<_> = output
        .lines()
        .filter_map(|line| line.strip_prefix("rank ")?.split_once(" done "))
        .collect();
    accounts.sort_unstable();
    accounts.dedup_by_key(|(rank, _)| *rank);
    ensure!(
        accounts.len() == ranks as usize,
        "{} ranks accounted",
        accounts.len()
    );
    let (_, first) = accounts[0];
    ensure!(
        accounts.iter().all(|(_, account)| *account == first),
        "ranks differ: {accounts:?}"
    );
    let rounds: u64 = first
        .rsplit(' ')
        .next()
        .unwrap_or_default()
        .parse()
        .context(first.to_owned())?;
    ensure!(rounds > 0, "no round was done");
    Ok(rounds)
}

/// The processes below `root` that run a program of this name.
pub fn processes_called(root: u32, name: &str) -> Vec<u32> {
    let is_called = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    tree::descendants(root)
        .into_iter()
        .filter(is_called)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_must_all_agree() {
        let good = "ready\nrank 1 done sum 5 rounds 3\nrank 0 done sum 5 rounds 3\nok\n";
        assert_eq!(check_account(good, 2).unwrap(), 3);
        check_account(good, 3).unwrap_err();
        check_account(&good.replacen("sum 5", "sum 6", 1), 2).unwrap_err();
        check_account(&good.replace("ok\n", ""), 2).unwrap_err();
        check_account(&good.replace("rounds 3", "rounds 0"), 2).unwrap_err();
    }
}
