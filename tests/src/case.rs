//! A test case, and the list of all of them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::mpi::Library;
use crate::report::{Place, Test};
use crate::setup::{Deadline, Mode, Setup};
use crate::{
    abandoned, chaos, checkpoints, clients, connections, corners, costs, cycles, dead, drain,
    facts, failures, faults, killed, killed_criu, killed_restart, leaks, matrix, moments, outside,
    own_programs, rivals, smaller, stale, stock, stopped, strangers, suite, wrapped,
};

/// In which modes a case makes sense.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Needs {
    /// Runs in both modes; on the bare device it shows what is to be expected.
    AnyMode,
    /// Needs the provider and the `reverbs` command.
    Provider,
    /// Also needs a clock that counts instructions (`cargo xtask vm -i`).
    Counting,
}

impl Needs {
    /// What of it a run lacks.
    pub fn lacking(self, setup: &Setup) -> Option<&'static str> {
        match self {
            Self::Provider | Self::Counting if setup.mode == Mode::Bare => {
                Some("the provider (--stage DIR)")
            }
            Self::Counting if !setup.counting => {
                Some("a machine that counts instructions (cargo xtask vm -i) and --counting")
            }
            _ => None,
        }
    }
}

/// What a case gets to work with.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    pub setup: &'a Setup,
    /// The case's own folder for captured output; it exists.
    pub folder: PathBuf,
    pub deadline: Deadline,
    /// A TCP port that no other case of this run uses.
    pub port: u16,
}

/// One named test.
#[derive(Debug)]
pub struct Case {
    pub name: String,
    pub needs: Needs,
    /// A case that takes longer is ended and has failed.
    pub limit: Duration,
    pub action: Action,
}

/// What a case runs.
#[derive(Debug)]
pub enum Action {
    /// A stock server and client.
    Pair(&'static stock::Pair),
    /// A stock server and client of a layer above verbs.
    Client(&'static clients::Client),
    /// Connections made by `rdma_cm`.
    Connections(connections::Connections),
    /// rdma-core's own tests.
    Suite,
    /// The same, on hardware that is replaced all the time.
    SuiteUnderChaos,
    /// `verbs_facts`.
    Facts,
    /// One of our own programs.
    Own(&'static own_programs::Own),
    /// `mpi_check` with this many ranks and rounds.
    Mpi {
        library: Library,
        ranks: u32,
        rounds: u32,
    },
    /// A program that must notice a broken promise.
    Fault(&'static faults::Fault),
    /// A job under `reverbs cycle`.
    Cycled(&'static cycles::Cycled),
    /// `matrix`, to its end, and under cycles.
    Matrix(&'static matrix::Row),
    CycledMatrix(&'static matrix::Row),
    /// What the provider adds to a loop of one process.
    Loop,
    /// Cycles of a process with many bytes in flight.
    DrainTime,
    /// A cycle of a process with many objects.
    Objects(&'static costs::Objects),
    /// A job that is saved and brought back.
    Saved(&'static checkpoints::Saved),
    /// A job that is saved while it starts or ends.
    Moment(&'static moments::Moment),
    /// Objects and threads in every situation, under cycles.
    Corners(&'static corners::Part),
    /// An orchestrator that dies.
    Killed(&'static killed::Killed),
    /// A job that is connected to a process that is not part of it.
    Outside,
    /// An orchestrator that dies inside a phase.
    Abandoned(&'static abandoned::Abandoned),
    /// Processes that are killed during cycles.
    Dead(&'static dead::Dead),
    /// A process that is stopped during a cycle.
    Stopped(&'static stopped::Stopped),
    /// Two orchestrators at once.
    Rivals,
    /// Clients of the agents that are no orchestrators.
    Strangers,
    /// Files of earlier processes.
    Stale,
    /// A CRIU that is killed.
    KilledCriu(&'static killed_criu::KilledCriu),
    /// Restarts that are killed.
    KilledRestart,
    /// A job on a device that does not behave.
    Wrapped(&'static wrapped::Wrapped),
    /// Objects that come and go, and what is left of them.
    Leaks(&'static leaks::Leaks),
    /// A checkpoint that cannot succeed, under a running job.
    Failing(&'static failures::Failing),
    Smaller,
}

/// A case with the settings of the run.
#[derive(Debug)]
pub struct Prepared<'a> {
    case: &'a Case,
    setup: &'a Setup,
}

impl Test for Prepared<'_> {
    fn name(&self) -> &str {
        &self.case.name
    }

    fn lacking(&self) -> Option<&'static str> {
        self.case.needs.lacking(self.setup)
    }

    fn limit(&self) -> Duration {
        self.case.limit
    }

    fn run(&self, place: Place) -> Result<String> {
        self.case.run(&Job {
            setup: self.setup,
            folder: place.folder,
            deadline: place.deadline,
            port: place.port,
        })
    }
}

impl Case {
    pub fn prepared<'a>(&'a self, setup: &'a Setup) -> Prepared<'a> {
        Prepared { case: self, setup }
    }

    /// Runs the case. The text is a remark for the report, "" for none.
    ///
    /// # Errors
    /// When anything is not as promised; the error says what.
    pub fn run(&self, job: &Job<'_>) -> Result<String> {
        match &self.action {
            Action::Pair(pair) => stock::run(pair, job).map(|()| String::new()),
            Action::Client(client) => clients::run(client, job).map(|()| String::new()),
            Action::Connections(connections) => connections::run(*connections, job),
            Action::Suite => suite::run(job),
            Action::SuiteUnderChaos => chaos::run_suite(job),
            Action::Facts => facts::run(job),
            Action::Own(own) => own_programs::run(own, job),
            Action::Mpi {
                library,
                ranks,
                rounds,
            } => own_programs::run_mpi(*library, *ranks, *rounds, job),
            Action::Fault(fault) => faults::run(fault, job),
            Action::Cycled(cycled) => cycles::run(cycled, job),
            Action::Matrix(row) => matrix::run(row, job),
            Action::CycledMatrix(row) => matrix::run_cycled(row, job),
            Action::Loop => costs::run_loop(job),
            Action::DrainTime => drain::run(job),
            Action::Objects(objects) => costs::run_objects(objects, job),
            Action::Saved(saved) => checkpoints::run(saved, job),
            Action::Moment(moment) => moments::run(moment, job),
            Action::Corners(part) => corners::run(part, job),
            Action::Killed(killed) => killed::run(killed, job),
            Action::Outside => outside::run(job),
            Action::Abandoned(abandoned) => abandoned::run(abandoned, job),
            Action::Dead(dead) => dead::run(dead, job),
            Action::Stopped(stopped) => stopped::run(stopped, job),
            Action::Rivals => rivals::run(job),
            Action::Strangers => strangers::run(job),
            Action::Stale => stale::run(job),
            Action::KilledCriu(killed) => killed_criu::run(killed, job),
            Action::KilledRestart => killed_restart::run(job),
            Action::Leaks(leaks) => leaks::run(leaks, job),
            Action::Failing(failing) => failures::run(failing, job),
            Action::Smaller => smaller::run(job),
            Action::Wrapped(wrapped) => wrapped::run(wrapped, job),
        }
    }
}

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    let mut cases = stock::cases();
    cases.extend(clients::cases());
    cases.extend(suite::cases());
    cases.extend(chaos::cases());
    cases.extend(own_programs::cases());
    cases.extend(faults::cases());
    cases.extend(cycles::cases());
    cases.extend(corners::cases());
    cases.extend(matrix::cases());
    cases.extend(costs::cases());
    cases.extend(drain::cases());
    cases.extend(checkpoints::cases());
    cases.extend(moments::cases());
    cases.extend(killed::cases());
    cases.extend(abandoned::cases());
    cases.extend(dead::cases());
    cases.extend(stopped::cases());
    cases.extend(rivals::cases());
    cases.extend(strangers::cases());
    cases.extend(stale::cases());
    cases.extend(killed_criu::cases());
    cases.extend(killed_restart::cases());
    cases.extend(leaks::cases());
    cases.extend(failures::cases());
    cases.extend(smaller::cases());
    cases.extend(outside::cases());
    cases.extend(connections::cases());
    cases.extend(wrapped::cases());
    cases
}
