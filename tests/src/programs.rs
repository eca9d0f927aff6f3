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
];

const FLAGS: &[&str] = &["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-g"];

/// Compiles all programs into `folder`.
///
/// # Errors
/// When a compiler is missing or refuses a program.
pub fn build(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs");
    for program in PROGRAMS {
        let status = Command::new(program.compiler)
            .args(FLAGS)
            .args(program.sources.iter().map(|name| sources.join(name)))
            .args(program.libraries)
            .arg("-o")
            .arg(folder.join(program.name))
            .status()
            .with_context(|| format!("cannot start {}", program.compiler))?;
        if !status.success() {
            bail!("{} refused {}", program.compiler, program.name);
        }
    }
    Ok(())
}
