//! `reverbs cycle`, over and over, under jobs that check everything they see.
//!
//! A cycle must end with status 0, every queue pair number and key of the hardware must be another
//! one afterwards, and the job must have sent packets before the next one starts. Whether the
//! application noticed anything is the job's to find out.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::clients::{IPV4, IPV6};
use crate::hardware::{Numbers, packets_sent};
use crate::jobs::{Kind, Perftest, Started};
use crate::mpi::Library;
use crate::process::{self, Running};
use crate::setup::Deadline;
use crate::{evidence, mpi, own_programs};

/// The time limit of each of these cases: 200 cycles of four ranks on two emulated processors.
const LIMIT: Duration = Duration::from_secs(3600);

/// The time limit of a single cycle.
const CYCLE_LIMIT: Duration = Duration::from_secs(60);

/// How long a job may take to end once it is told to.
const END_LIMIT: Duration = Duration::from_secs(120);

/// `ucx_perftest` does a fixed number of messages: so many cycles, and pauses in between, are over before it is.
const PERFTEST_CYCLES: u32 = 5;
const PERFTEST_PAUSE: Duration = Duration::from_millis(50);

/// A job to cycle under.
#[derive(Debug)]
pub struct Cycled {
    pub name: &'static str,
    pub job: CycledJob,
    /// One in this many of the cycles that the command line asks for.
    pub share: u32,
}

/// What is cycled.
#[derive(Debug)]
pub enum CycledJob {
    /// One of our verbs programs; SIGTERM makes it finish.
    Own {
        program: &'static str,
        options: &'static str,
    },
    /// `rc_traffic`, whose second process opens its device after the first has had its hardware
    /// replaced: it is told numbers that the hardware does not know any more.
    Late,
    /// `ucx_perftest`, which ends by itself, under a few cycles.
    Perftest(&'static Perftest),
    /// `mpi_check`; a file makes it finish.
    Mpi { library: Library, ranks: u32 },
}

const CYCLED: &[Cycled] = &[
    Cycled {
        name: "cycle-rc",
        job: CycledJob::Own {
            program: "rc_traffic",
            options: "--seed 11",
        },
        share: 1,
    },
    Cycled {
        name: "cycle-rc-events",
        job: CycledJob::Own {
            program: "rc_traffic",
            options: "--seed 12 --events --qps 2 --window 8",
        },
        share: 4,
    },
    Cycled {
        name: "cycle-rc-slow-receiver",
        job: CycledJob::Own {
            program: "rc_traffic",
            options: "--seed 13 --rnr",
        },
        share: 4,
    },
    Cycled {
        name: "cycle-rc-late",
        job: CycledJob::Late,
        share: 20,
    },
    Cycled {
        name: "cycle-ud-srq",
        job: CycledJob::Own {
            program: "ud_srq",
            options: "--seed 14",
        },
        share: 1,
    },
    Cycled {
        name: "cycle-mpi-np2",
        job: CycledJob::Mpi {
            library: Library::OpenMpi,
            ranks: 2,
        },
        share: 8,
    },
    Cycled {
        name: "cycle-mpi",
        job: CycledJob::Mpi {
            library: Library::OpenMpi,
            ranks: 4,
        },
        share: 1,
    },
    Cycled {
        name: "cycle-mpich-np2",
        job: CycledJob::Mpi {
            library: Library::Mpich,
            ranks: 2,
        },
        share: 2,
    },
    Cycled {
        name: "cycle-ucx-rc",
        job: CycledJob::Perftest(&Perftest {
            transport: "rc_verbs",
            test: "am_lat",
            messages: "30000",
            variables: IPV4,
        }),
        share: 1,
    },
    Cycled {
        name: "cycle-ucx-rc-put",
        job: CycledJob::Perftest(&Perftest {
            transport: "rc_verbs",
            test: "put_bw",
            messages: "300000",
            variables: IPV4,
        }),
        share: 1,
    },
    Cycled {
        name: "cycle-ucx-ud",
        job: CycledJob::Perftest(&Perftest {
            transport: "ud_verbs",
            test: "am_lat",
            messages: "20000",
            variables: IPV6,
        }),
        share: 1,
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    CYCLED
        .iter()
        .map(|cycled| Case {
            name: cycled.name.to_owned(),
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Cycled(cycled),
        })
        .collect()
}

/// Runs a job under cycles.
///
/// # Errors
/// When a cycle fails or changes nothing, or the job finds anything wrong.
pub fn run(cycled: &Cycled, job: &Job<'_>) -> Result<String> {
    let cycles = (job.setup.cycles / cycled.share).max(1);
    match &cycled.job {
        CycledJob::Own { program, options } => {
            let options: Vec<_> = options.split_whitespace().collect();
            let mut running = own_programs::start(job, program, &options)?;
            let outcome = cycle_own(&mut running, job, cycles);
            if outcome.is_err() {
                own_programs::ask_for_report(&mut running, &job.folder);
            }
            outcome
        }
        CycledJob::Late => cycle_late(job, cycles),
        CycledJob::Perftest(test) => cycle_perftest(job, test, cycles.min(PERFTEST_CYCLES)),
        CycledJob::Mpi { library, ranks } => cycle_mpi(job, *library, *ranks, cycles),
    }
}

fn cycle_own(running: &mut Running, job: &Job<'_>, cycles: u32) -> Result<String> {
    running.wait_for_line(job.deadline, "ready")?;
    evidence::check_mode(running.pid(), &job.setup.mode)?;
    let times = cycle(running, job, cycles, Objects::MadeAtTheStart, steady(job))?;
    running.signal(Signal::TERM)?;
    running.wait_for_success(job.deadline.at_most(END_LIMIT))?;
    let messages = own_programs::check_account(&running.output()?)?;
    Ok(format!("{times}, {messages} messages"))
}

fn cycle_late(job: &Job<'_>, cycles: u32) -> Result<String> {
    let now = job.folder.join("now");
    let options = ["--seed", "15", "--late", &now.display().to_string()];
    let mut running = own_programs::start(job, "rc_traffic", &options)?;
    running.wait_for_line(job.deadline, "waiting")?;
    let before = Numbers::on(&job.setup.device)?;
    replace_hardware(&running, job)?.check_all_new(&before)?;
    fs::write(&now, "")?;
    cycle_own(&mut running, job, cycles)
}

fn cycle_perftest(job: &Job<'_>, test: &'static Perftest, cycles: u32) -> Result<String> {
    let mut started = Started::start(job, Kind::Perftest(test))?;
    for number in 1..=cycles {
        std::thread::sleep(PERFTEST_PAUSE);
        started
            .cycle()
            .and_then(|()| started.wait_for_packet())
            .with_context(|| format!("cycle {number} of {cycles}"))?;
    }
    let done = started.finish()?;
    Ok(format!("{cycles} cycles, {done}"))
}

fn cycle_mpi(job: &Job<'_>, library: Library, ranks: u32, cycles: u32) -> Result<String> {
    let until = Until::new(&job.folder);
    let mut mpirun = mpi::start_check(job, library, ranks, &["--until", &until.path()])?;
    let times = cycle(&mut mpirun, job, cycles, Objects::ComeAndGo, steady(job))?;
    until.now()?;
    let rounds = mpi::finish_check(&mut mpirun, ranks, job.deadline.at_most(END_LIMIT))?;
    Ok(format!("{times}, {rounds} rounds"))
}

/// When a job makes its objects.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Objects {
    MadeAtTheStart,
    /// UCX connects when a rank is first spoken to, and registers what is first sent.
    ComeAndGo,
}

/// From the start of one cycle to the start of the next; a cycle that takes longer must not leave the job without time to run.
fn steady(job: &Job<'_>) -> impl FnMut(Duration) -> Duration {
    let pace = job.setup.pace;
    move |took| pace.saturating_sub(took).max(pace / 2)
}

/// Cycles the tree below and including `root`; says how long the cycles took. `pause` says how long the job runs after a cycle that took
/// so long, and before the first one.
///
/// # Errors
/// When a cycle fails or changes nothing, or the job ends or sends nothing any more.
pub fn cycle(
    root: &mut Running,
    job: &Job<'_>,
    cycles: u32,
    objects: Objects,
    mut pause: impl FnMut(Duration) -> Duration,
) -> Result<String> {
    let mut times = Vec::new();
    let mut numbers = Numbers::on(&job.setup.device)?;
    let_run(root, pause(Duration::ZERO))?;
    for number in 1..=cycles {
        let start = Instant::now();
        numbers = once(root, job, &numbers, objects)
            .with_context(|| format!("cycle {number} of {cycles}"))?;
        times.push(start.elapsed());
        let_run(root, pause(start.elapsed()))?;
    }
    times.sort_unstable();
    Ok(format!(
        "{cycles} cycles, median {:.2} s, longest {:.2} s",
        times[times.len() / 2].as_secs_f64(),
        times[times.len() - 1].as_secs_f64()
    ))
}

/// One cycle of hardware that has the numbers `before`; gives those it has then.
fn once(root: &mut Running, job: &Job<'_>, before: &Numbers, objects: Objects) -> Result<Numbers> {
    let device = &job.setup.device;
    let after = replace_hardware(root, job)?;
    after.check_all_new(before)?;
    if objects == Objects::MadeAtTheStart {
        after.check_as_many(before)?;
    }
    let sent = packets_sent(device)?;
    root.wait_until(
        job.deadline.at_most(CYCLE_LIMIT),
        "it sent anything again",
        |_| Ok((packets_sent(device)? > sent).then_some(())),
    )?;
    Ok(after)
}

/// `reverbs cycle`; gives the numbers of the hardware after it.
///
/// # Errors
/// When it fails.
pub fn replace_hardware(root: &Running, job: &Job<'_>) -> Result<Numbers> {
    let mut command = job.setup.reverbs()?;
    command.arg("cycle").arg(root.pid().to_string());
    process::run(
        command,
        &job.folder,
        "cycle",
        job.deadline.at_most(CYCLE_LIMIT),
    )?;
    Numbers::on(&job.setup.device)
}

/// Lets the job run; an early end is an error.
fn let_run(root: &mut Running, pause: Duration) -> Result<()> {
    match root.wait(Deadline::after(pause)) {
        Ok(status) => anyhow::bail!("the job ended too early: {status}"),
        Err(_) => Ok(()),
    }
}

/// The file whose existence makes `mpi_check` finish.
struct Until(PathBuf);

impl Until {
    fn new(folder: &Path) -> Self {
        Self(folder.join("enough"))
    }

    fn path(&self) -> String {
        self.0.display().to_string()
    }

    fn now(&self) -> Result<()> {
        fs::write(&self.0, "").with_context(|| self.path())
    }
}
