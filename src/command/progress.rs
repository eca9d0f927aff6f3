//! What a person sees on standard error while phases go by.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// One phase that is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PhaseTime {
    pub(crate) phase: String,
    pub(crate) seconds: f64,
}

/// Prints a line for each phase as it ends, and remembers how long each took.
#[derive(Debug)]
pub(crate) struct Progress {
    quiet: bool,
    times: Vec<PhaseTime>,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            times: Vec::new(),
        }
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// A phase that began at `began` is over; `detail` says how much it dealt with.
    pub(crate) fn phase(&mut self, phase: &str, began: Instant, detail: &str) {
        let took = began.elapsed();
        self.times.push(PhaseTime {
            phase: phase.to_owned(),
            seconds: took.as_secs_f64(),
        });
        if !self.quiet {
            eprintln!("reverbs: {phase:<10} {:8.3} s  {detail}", seconds(took));
        }
    }

    /// Something worth knowing that is no error.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            eprintln!("reverbs: {text}");
        }
    }

    /// Something that did not go as asked; said even if quiet.
    pub(crate) fn warn(&self, text: &str) {
        eprintln!("reverbs: {text}");
    }

    pub(crate) fn times(&self) -> &[PhaseTime] {
        &self.times
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// "1 process", "3 processes": the count with its noun.
pub(crate) fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
