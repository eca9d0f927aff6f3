//! Jobs on a device that does not behave: below the provider is the library of `tests/wrappers` instead of libibverbs.
//!
//! It writes down what it was called for, so that each of these cases can also say that it was there, and that of the hardware nothing
//! was left.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::case::{Action, Case, Job, Needs};
use crate::cycles::{self, Cycled, CycledJob};
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::mpi::Library;
use crate::process::{self, Running};
use crate::setup::{Setup, WRAPPER};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(1800);

/// A job on a wrapped device.
#[derive(Debug)]
pub struct Wrapped {
    /// What the wrapper does.
    plan: &'static str,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// The job is cycled.
    Cycled(Cycled),
    /// Each of these verbs fails while a cycle makes fresh hardware.
    Failing(&'static [Failing]),
}

/// A verb that fails, and what the command must say of it.
#[derive(Debug)]
struct Failing {
    verb: &'static str,
    said: &'static str,
}

const LATE: &str = "delay=6 reorder=yes";

const fn failing(verb: &'static str, said: &'static str) -> Failing {
    Failing { verb, said }
}

const WRAPPED: &[Wrapped] = &[
    Wrapped {
        plan: LATE,
        work: Work::Cycled(Cycled {
            name: "wrapped-rc",
            job: CycledJob::Own {
                program: "rc_traffic",
                options: "--seed 41",
            },
            share: 4,
        }),
    },
    Wrapped {
        plan: LATE,
        work: Work::Cycled(Cycled {
            name: "wrapped-rc-events",
            job: CycledJob::Own {
                program: "rc_traffic",
                options: "--seed 42 --events --qps 2 --window 8",
            },
            share: 4,
        }),
    },
    Wrapped {
        plan: "delay=6 reorder=yes lose=2",
        work: Work::Cycled(Cycled {
            name: "wrapped-ud-srq",
            job: CycledJob::Own {
                program: "ud_srq",
                options: "--seed 43",
            },
            share: 4,
        }),
    },
    Wrapped {
        plan: LATE,
        work: Work::Cycled(Cycled {
            name: "wrapped-mpi-np2",
            job: CycledJob::Mpi {
                library: Library::OpenMpi,
                ranks: 2,
            },
            share: 8,
        }),
    },
    Wrapped {
        plan: "fail=open_device:EIO fail=alloc_pd:ENOMEM fail=reg_mr:ENOMEM fail=create_cq:ENOMEM \
            fail=create_qp:ENOMEM fail=modify_qp:EINVAL",
        work: Work::Failing(&[
            failing("open_device", "cannot open device"),
            failing("alloc_pd", "protection domain"),
            failing("reg_mr", "memory region"),
            failing("create_cq", "completion queue"),
            failing("create_qp", "queue pair 0x"),
            failing("modify_qp", "cannot connect queue pair 0x"),
        ]),
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    WRAPPED
        .iter()
        .map(|wrapped| Case {
            name: match &wrapped.work {
                Work::Cycled(cycled) => cycled.name.to_owned(),
                Work::Failing(_) => "wrapped-failing".to_owned(),
            },
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Wrapped(wrapped),
        })
        .collect()
}

/// Runs a job on a wrapped device.
///
/// # Errors
/// When it suffers, a command does not say what has failed, or hardware is left.
pub fn run(wrapped: &Wrapped, job: &Job<'_>) -> Result<String> {
    let library = job.setup.programs.join(WRAPPER);
    ensure!(library.is_file(), "{} does not exist", library.display());
    let path = job.folder.join("trace");
    let faults = job.folder.join("faults");
    fs::create_dir(&faults)?;
    let setup = Setup {
        wrapper: Some(format!(
            "{} seed=1 trace={} while={}",
            wrapped.plan,
            path.display(),
            faults.display()
        )),
        ..job.setup.clone()
    };
    let wrapped_job = Job {
        setup: &setup,
        ..job.clone()
    };
    let mut remark = match &wrapped.work {
        Work::Cycled(cycled) => cycles::run(cycled, &wrapped_job)?,
        Work::Failing(verbs) => fail_each(verbs, &faults, &wrapped_job)?,
    };
    let trace = Trace::read(&path)?;
    if wrapped.plan.contains("lose=") {
        let lost = trace.count("post_send lost");
        ensure!(lost > 0, "no message was lost");
        remark += &format!(", {lost} lost on purpose");
    }
    if let Work::Failing(verbs) = &wrapped.work {
        for Failing { verb, .. } in *verbs {
            let injected = trace.count(&format!("{verb} injected"));
            ensure!(injected > 0, "{verb} never failed");
        }
    }
    Ok(format!("{remark}; {}", trace.check_balance(&wrapped.work)?))
}

/// Lets each verb fail under a cycle, and brings the job back when the fault is gone.
fn fail_each(verbs: &[Failing], faults: &Path, job: &Job<'_>) -> Result<String> {
    let mut started = Started::start(job, Kind::TRAFFIC)?;
    started.wait_for_traffic()?;
    for failing in verbs {
        let fault = faults.join(failing.verb);
        fs::write(&fault, "")?;
        fail(failing, started.root, job)?;
        fs::remove_file(&fault)?;
        let after = || format!("after {} failed", failing.verb);
        let mut command = job.setup.reverbs()?;
        command.arg("resume").arg(started.root.to_string());
        let deadline = job.deadline.at_most(COMMAND_LIMIT);
        process::run(command, &job.folder, "resume", deadline).with_context(after)?;
        started.wait_for_traffic().with_context(after)?;
    }
    let done = started.finish()?;
    Ok(format!("{done}; {} verbs failed", verbs.len()))
}

/// A cycle that cannot succeed.
fn fail(failing: &Failing, root: u32, job: &Job<'_>) -> Result<()> {
    let Failing { verb, said } = failing;
    let mut command = job.setup.reverbs()?;
    command.arg("cycle").arg(root.to_string());
    let mut cycle = Running::start(command, &job.folder, &format!("cycle-{verb}"))?;
    let status = cycle.wait(job.deadline.at_most(COMMAND_LIMIT))?;
    let errors = cycle.errors()?;
    ensure!(
        status.code() == Some(1),
        "{verb}: {status} instead of exit status 1"
    );
    ensure!(
        errors.contains(said),
        "{verb}: no word of \"{said}\" in: {errors}"
    );
    Ok(())
}

/// What the wrapper has written down: how often each verb ended in which way.
#[derive(Debug)]
struct Trace(BTreeMap<String, u64>);

impl Trace {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let mut counts = BTreeMap::new();
        for line in text.lines() {
            let mut words = line.split_whitespace().skip(1);
            let what = words.next().zip(words.next());
            let (verb, outcome) = what.with_context(|| format!("not a trace: {line}"))?;
            *counts.entry(format!("{verb} {outcome}")).or_default() += 1;
        }
        Ok(Self(counts))
    }

    fn count(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    /// Whatever was made was also destroyed; but libfabric, which Open MPI asks for devices, keeps two open to the end.
    fn check_balance(&self, work: &Work) -> Result<String> {
        const PAIRS: &[(&str, &str)] = &[
            ("open_device", "close_device"),
            ("alloc_pd", "dealloc_pd"),
            ("reg_mr", "dereg_mr"),
            ("create_comp_channel", "destroy_comp_channel"),
            ("create_cq", "destroy_cq"),
            ("create_srq", "destroy_srq"),
            ("create_qp", "destroy_qp"),
            ("create_ah", "destroy_ah"),
        ];
        let keeps_devices = matches!(
            work,
            Work::Cycled(Cycled {
                job: CycledJob::Mpi { .. },
                ..
            })
        );
        for (make, destroy) in &PAIRS[usize::from(keeps_devices)..] {
            let made = self.count(&format!("{make} ok"));
            let destroyed = self.count(&format!("{destroy} ok"));
            ensure!(
                made == destroyed,
                "{make} {made} times, {destroy} {destroyed} times"
            );
        }
        let pairs = self.count("create_qp ok");
        ensure!(pairs > 0, "the device was not wrapped");
        Ok(format!("{pairs} queue pairs made and destroyed"))
    }
}

#[cfg(test)]
mod tests {
    use super::{Trace, Work};

    #[test]
    fn what_is_left_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        let whole = "7 create_qp ok\n8 create_qp injected 12\n7 destroy_qp ok\n";
        std::fs::write(&path, whole).unwrap();
        Trace::read(&path)
            .unwrap()
            .check_balance(&Work::Failing(&[]))
            .unwrap();
        std::fs::write(&path, format!("{whole}7 create_cq ok\n")).unwrap();
        Trace::read(&path)
            .unwrap()
            .check_balance(&Work::Failing(&[]))
            .unwrap_err();
    }
}
