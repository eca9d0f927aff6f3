//! Which runs of `guest-tests` make up `cargo xtask test`. Each is one boot of the machine.

/// One boot.
#[derive(Debug)]
pub struct Run {
    /// Names the run and the folder of its output in the share.
    pub name: &'static str,
    /// Without the provider: shows that the device and the programs do what is expected of them.
    pub bare: bool,
    /// Only with `--long`.
    pub long: bool,
    /// In a machine whose clock counts instructions.
    pub counted: bool,
    /// The cases, as `guest-tests` filters them; none means all.
    pub cases: &'static [&'static str],
    /// Options of `guest-tests`.
    pub options: &'static [&'static str],
    /// Longest run, in seconds.
    pub timeout: u64,
}

/// All runs, in order.
pub const RUNS: &[Run] = &[
    // rdma-core's own tests, stock clients of verbs and of the layers above, own programs, MPI.
    Run {
        name: "provider",
        cases: &[
            "=python-suite",
            "^pingpong",
            "^send",
            "^write",
            "^read",
            "^atomic",
            "^cm-",
            "^qperf",
            "^libfabric",
            "^ucx",
            "^verbs",
            "^rc-",
            "^ud-srq",
            "^mpi",
        ],
        timeout: 1500,
        ..RUN
    },
    // Fresh hardware under a running job, a few times; checkpoints that fail or meet another.
    Run {
        name: "cycles",
        cases: &[
            "^cycle-rc",
            "^cycle-ud",
            "^cycle-mpi",
            "=killed-cycle",
            "=killed-checkpoint",
            "^fail",
            "=two-checkpoints",
            "=outside",
        ],
        options: &["--cycles", "10"],
        timeout: 1200,
        ..RUN
    },
    // Whoever takes part in a checkpoint dies, falls silent, or meets another.
    Run {
        name: "orchestration",
        cases: &[
            "=killed-inside",
            "=killed-criu",
            "=killed-restart",
            "=two-orchestrators",
            "=strangers",
            "=stale-files",
        ],
        timeout: 900,
        ..RUN
    },
    // The same on a device that does not behave.
    Run {
        name: "wrapped",
        cases: &["=wrapped-rc", "=wrapped-ud-srq", "=wrapped-failing"],
        options: &["--cycles", "12"],
        timeout: 900,
        ..RUN
    },
    // Objects, threads and forked children in every situation.
    Run {
        name: "corners",
        cases: &["^corner", "=fork-plain"],
        timeout: 900,
        ..RUN
    },
    // The traffic program over all its options: by itself, and a hundred times under fresh hardware at random moments.
    Run {
        name: "matrix",
        cases: &["^matrix", "^cycle-matrix"],
        options: &["--cycles", "100"],
        timeout: 1200,
        ..RUN
    },
    // Objects that come and go.
    Run {
        name: "leaks",
        cases: &["^leak"],
        options: &["--cycles", "60"],
        timeout: 600,
        ..RUN
    },
    // Saved and brought back.
    Run {
        name: "restarts",
        cases: &[
            "=restart-rc",
            "=restart-ud-srq-other-device",
            "=restart-matrix-mix-extended",
            "=restart-objects",
            "=restart-mpi-np2-other-device",
            "=restart-deleted-file",
            "=checkpoint-runs-on",
            "=checkpoint-in-init",
        ],
        timeout: 1200,
        ..RUN
    },
    Run {
        name: "counted",
        cases: &["=cost-loop"],
        options: &["--counting"],
        counted: true,
        timeout: 300,
        ..RUN
    },
    Run {
        name: "bare",
        bare: true,
        long: true,
        timeout: 1800,
        ..RUN
    },
    Run {
        name: "matrix-long",
        cases: &["^cycle-matrix"],
        options: &["--cycles", "1000"],
        long: true,
        timeout: 7200,
        ..RUN
    },
    // Processes that replace their own hardware all the time.
    Run {
        name: "chaos",
        cases: &["=python-suite-chaos"],
        long: true,
        timeout: 900,
        ..RUN
    },
    // A hundred cycles under valgrind, which gets one in twenty.
    Run {
        name: "leaks-long",
        cases: &["=leak-valgrind"],
        options: &["--cycles", "2000"],
        long: true,
        timeout: 1800,
        ..RUN
    },
    Run {
        name: "everything",
        long: true,
        timeout: 10_800,
        ..RUN
    },
];

/// The cases of `node-tests` without `--long`, as it filters them: jobs over nodes that are namespaces of this machine.
pub const NODE_CASES: &[&str] = &[
    "^bare",
    "^run",
    "=checkpoint-runs-on-3",
    "=checkpoint-starting-3",
    "=restart-fresh-3",
    "=restart-others-2",
    "=restart-replaced-3",
    "=restart-unattended-2",
    "=own-disks-3",
    "=restart-after-death-3",
    "=openmpi5-restart-others-2",
    "=mpich-restart-others-2",
    "=mpich-restart-fresh-1",
    "=slurm-requeue",
    "=slurm-steps",
    "=slurm-srun-refused",
    "=fault-node-part-checkpoint-save",
    "=fault-orchestrator-checkpoint-examine",
];

/// What is not said of a run.
const RUN: Run = Run {
    name: "",
    bare: false,
    long: false,
    counted: false,
    cases: &[],
    options: &[],
    timeout: 0,
};
