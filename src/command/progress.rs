//! What a person sees on standard error while phases go by.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use reverbs::image::PhaseTime;

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

    /// A phase is over that took so long; `detail` says how much it dealt with.
    pub(crate) fn phase(&mut self, phase: &str, took: Duration, detail: &str) {
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

    /// On a terminal: a bar that follows the bytes below `folder` until the watch is dropped.
    pub(crate) fn watch_growth(&self, folder: &Path, expected: u64) -> Watch {
        let folder = folder.to_owned();
        self.watch("save", expected, move || bytes_below(&folder))
    }

    /// On a terminal: a bar that follows the bytes that `position` gives until the watch is dropped.
    pub(crate) fn watch(
        &self,
        phase: &str,
        expected: u64,
        position: impl Fn() -> u64 + Send + 'static,
    ) -> Watch {
        let bar = if self.quiet {
            ProgressBar::hidden()
        } else {
            // Draws nothing where standard error is no terminal.
            ProgressBar::new(expected)
        };
        bar.set_style(
            ProgressStyle::with_template(
                "reverbs: {msg} [{bar:30}] {bytes} of about {total_bytes}",
            )
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_message(phase.to_owned());
        let over = Arc::new(AtomicBool::new(false));
        let watcher = (!bar.is_hidden()).then(|| {
            let (bar, over) = (bar.clone(), Arc::clone(&over));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    bar.set_position(position());
                    std::thread::sleep(Duration::from_millis(100));
                }
            })
        });
        Watch { bar, over, watcher }
    }

    pub(crate) fn times(&self) -> &[PhaseTime] {
        &self.times
    }
}

/// Ends the bar when dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    bar: ProgressBar,
    over: Arc<AtomicBool>,
    watcher: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        self.bar.finish_and_clear();
    }
}

/// "1.50 MiB"
pub(crate) fn bytes(number: u64) -> String {
    HumanBytes(number).to_string()
}

/// The sizes of all files below a folder; what cannot be read counts nothing.
pub(crate) fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let found = entry.metadata().ok()?;
            Some(if found.is_dir() {
                bytes_below(&entry.path())
            } else {
                found.len()
            })
        })
        .sum()
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// "1 process", "3 processes": the count with its noun.
pub(crate) fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
