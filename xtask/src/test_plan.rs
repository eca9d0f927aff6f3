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
    /// The cases, as `guest-tests` filters them; none means all.
    pub cases: &'static [&'static str],
    /// Options of `guest-tests`.
    pub options: &'static [&'static str],
    /// Longest run, in seconds.
    pub timeout: u64,
}

/// All runs, in order.
pub const RUNS: &[Run] = &[
    // Stock clients, own programs, MPI.
    Run {
        name: "provider",
        bare: false,
        long: false,
        cases: &[
            "^pingpong",
            "^send",
            "^write",
            "^read",
            "^atomic",
            "^verbs",
            "^rc-",
            "^ud-srq",
            "^mpi",
        ],
        options: &[],
        timeout: 1500,
    },
    // Fresh hardware under a running job, a few times; checkpoints that fail or meet another.
    Run {
        name: "cycles",
        bare: false,
        long: false,
        cases: &["=cycle-rc", "=fail-no-criu", "=two-checkpoints"],
        options: &["--cycles", "10"],
        timeout: 900,
    },
    Run {
        name: "bare",
        bare: true,
        long: true,
        cases: &[],
        options: &[],
        timeout: 1800,
    },
    Run {
        name: "everything",
        bare: false,
        long: true,
        cases: &[],
        options: &[],
        timeout: 7200,
    },
];
