//! `reverbs cycle`: fresh hardware under a running job.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::cli::CycleOptions;
use super::interrupt::Interrupt;
use super::job::{Driver, ProcessTree, new_session, root_of};
use super::nodes::Ensemble;
use super::progress::{Progress, count};

/// # Errors
/// A cycle failed: the job runs on, unless the error says otherwise.
pub(crate) fn cycle(options: &CycleOptions, quiet: bool) -> Result<ExitCode> {
    let root = root_of(options.pid)?;
    ProcessTree::of(root)?.require_user()?;
    let interrupt = Interrupt::install()?;
    let every = Duration::from_millis(options.every);
    let many = options.until_end || options.count > 1;
    let mut agents = Ensemble::attach(root, &[])?;
    let mut took = Vec::new();
    while options.until_end || (took.len() as u64) < options.count {
        let began = Instant::now();
        // A line for each phase of each of hundreds of cycles tells nobody anything.
        let mut progress = Progress::new(quiet || many);
        let outcome = once(&mut agents, &mut progress, &interrupt, options);
        let over = ProcessTree::of(root).is_err();
        match outcome {
            Ok(()) => took.push(began.elapsed()),
            Err(_) if over && options.until_end && !took.is_empty() => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cycle {}", took.len() + 1));
            }
        }
        if over {
            if !options.until_end && (took.len() as u64) < options.count {
                bail!(
                    "job {root} ended after {} of {} cycles",
                    took.len(),
                    options.count
                );
            }
            break;
        }
        if interrupt.is_set() {
            break;
        }
        std::thread::sleep(every.saturating_sub(began.elapsed()));
    }
    if !quiet {
        summarize(&mut took);
    }
    Ok(ExitCode::SUCCESS)
}

fn once(
    agents: &mut Ensemble,
    progress: &mut Progress,
    interrupt: &Interrupt,
    options: &CycleOptions,
) -> Result<()> {
    let mut driver = Driver::new(
        agents,
        progress,
        interrupt.clone(),
        new_session()?,
        options.devices.choices.clone(),
    );
    driver.allow_outside(options.outside.allowed);
    if driver.attach()? == 0 {
        bail!("no process of the job runs under reverbs: start it with `reverbs run`");
    }
    let outcome = driver.release().and_then(|()| driver.restore_service());
    outcome.map_err(|error| driver.recover(error, "the job runs on as it was"))
}

/// To standard output: it is what the command is for.
#[expect(clippy::print_stdout)]
fn summarize(took: &mut [Duration]) {
    took.sort_unstable();
    if let (Some(median), Some(longest)) = (took.get(took.len() / 2), took.last()) {
        println!(
            "{}, {:.3} s median, {:.3} s longest",
            count(took.len(), "cycle", "cycles"),
            median.as_secs_f64(),
            longest.as_secs_f64()
        );
    }
}
