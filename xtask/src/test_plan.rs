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
    /// The cases, by parts of their names; none means all.
    pub cases: &'static [&'static str],
    /// Options of `guest-tests`.
    pub options: &'static [&'static str],
    /// Longest run, in seconds.
    pub timeout: u64,
}

/// All runs, in order.
pub const RUNS: &[Run] = &[
    Run {
        name: "provider",
        bare: false,
        long: false,
        cases: &[],
        options: &[],
        timeout: 2400,
    },
    Run {
        name: "bare",
        bare: true,
        long: true,
        cases: &[],
        options: &[],
        timeout: 1800,
    },
];
