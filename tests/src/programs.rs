//! How the C programs of `tests/programs/` are compiled.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// One program: its compiler, sources, and libraries or other options.
struct Program {
    name: &'static str,
    compiler: &'static str,
    sources: &'static [&'static str],
    libraries: &'static [&'static str],
}

const PROGRAMS: &[Program] = &[
    Program {
        name: "rc_traffic",
        compiler: "gcc",
        sources: &[
            "rc_traffic.c",
            "rc_setup.c",
            "rc_stream.c",
            "rc_send.c",
            "rc_receive.c",
            "notify.c",
            "messages.c",
            "common.c",
            "handles.c",
        ],
        libraries: &["-libverbs"],
    },
    Program {
        name: "ud_srq",
        compiler: "gcc",
        sources: &[
            "ud_srq.c",
            "ud_srq_setup.c",
            "ud_srq_receive.c",
            "common.c",
            "handles.c",
        ],
        libraries: &["-libverbs"],
    },
    Program {
        name: "survivor",
        compiler: "gcc",
        sources: &["survivor.c", "common.c"],
        libraries: &["-libverbs"],
    },
    Program {
        name: "matrix",
        compiler: "gcc",
        sources: &[
            "matrix.c",
            "matrix_setup.c",
            "matrix_lane.c",
            "matrix_send.c",
            "matrix_receive.c",
            "extended.c",
            "messages.c",
            "notify.c",
            "common.c",
            "handles.c",
        ],
        libraries: &["-pthread", "-libverbs"],
    },
    Program {
        name: "verbs_facts",
        compiler: "gcc",
        sources: &[
            "verbs_facts.c",
            "facts.c",
            "facts_objects.c",
            "facts_traffic.c",
            "common.c",
        ],
        libraries: &["-libverbs"],
    },
    Program {
        name: "corners",
        compiler: "gcc",
        sources: &[
            "corners.c",
            "corners_states.c",
            "corners_posts.c",
            "corners_events.c",
            "corners_threads.c",
            "corners_forks.c",
            "corners_objects.c",
            "extended.c",
            "stream.c",
            "facts.c",
            "common.c",
        ],
        libraries: &["-libverbs", "-pthread"],
    },
    Program {
        name: "libfaults.so",
        compiler: "gcc",
        sources: &["faults.c"],
        libraries: &["-shared", "-fPIC"],
    },
    Program {
        name: "verb_costs",
        compiler: "gcc",
        sources: &["verb_costs.c", "common.c"],
        libraries: &["-libverbs"],
    },
    Program {
        name: "leaks",
        compiler: "gcc",
        sources: &["leaks.c", "common.c"],
        libraries: &["-libverbs"],
    },
    Program {
        name: "in_flight",
        compiler: "gcc",
        sources: &["in_flight.c", "common.c"],
        libraries: &["-libverbs"],
    },
    Program {
        name: "holds",
        compiler: "gcc",
        sources: &["holds.c"],
        libraries: &[],
    },
    Program {
        name: "mpi_check",
        compiler: "mpicc.openmpi",
        sources: &["mpi_check.c"],
        libraries: &[],
    },
    Program {
        name: "mpi_check_mpich",
        compiler: "mpicc.mpich",
        sources: &["mpi_check.c"],
        libraries: &[],
    },
    Program {
        name: "connections",
        compiler: "gcc",
        sources: &["connections.c", "common.c"],
        libraries: &["-lrdmacm", "-libverbs"],
    },
];

const FLAGS: &[&str] = &["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-g"];

/// Compiles all programs into `folder`.
///
/// # Errors
/// When a compiler is missing or refuses a program.
pub fn build(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    PROGRAMS.iter().try_for_each(|program| {
        program.compile(Path::new(program.compiler), &folder.join(program.name))
    })
}

/// Compiles `mpi_check` for an MPI library that is not installed.
///
/// # Errors
/// As [`build`].
pub fn build_mpi_check(compiler: &Path, to: &Path) -> Result<()> {
    let program = PROGRAMS.iter().find(|program| program.name == "mpi_check");
    program.context("no mpi_check")?.compile(compiler, to)
}

impl Program {
    fn compile(&self, compiler: &Path, to: &Path) -> Result<()> {
        let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs");
        let status = Command::new(compiler)
            .args(FLAGS)
            .args(self.sources.iter().map(|name| sources.join(name)))
            .args(self.libraries)
            .arg("-o")
            .arg(to)
            .status()
            .with_context(|| format!("cannot start {}", compiler.display()))?;
        if !status.success() {
            bail!("{} refused {}", compiler.display(), to.display());
        }
        Ok(())
    }
}
