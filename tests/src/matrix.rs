//! `matrix` over its options, by itself and under `reverbs cycle` at random moments.
//!
//! The rows are chosen so that each two settings that make sense together meet in one of them.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::case::{Action, Case, Job, Needs};
use crate::cycles::{self, Objects};
use crate::hardware::counter;
use crate::process::Running;
use crate::{evidence, own_programs};

/// The time limit of a row without cycles.
const LIMIT: Duration = Duration::from_secs(180);

/// The time limit of a row with cycles: a thousand over all rows.
const CYCLED_LIMIT: Duration = Duration::from_secs(1800);

/// How long a job may take to end once it is told to.
const END_LIMIT: Duration = Duration::from_secs(120);

/// Operations of each lane where there are no cycles.
const MESSAGES: u32 = 200;

/// The most that a UC or UD lane may lose on the loopback path, of what it sends: nothing is dropped there but by a queue
/// that runs over.
const MOST_LOST: f64 = 0.05;

/// One choice of options.
#[derive(Debug)]
pub struct Row {
    transport: Transport,
    sharing: Sharing,
    events: bool,
    receiver: Receiver,
    processes: u32,
    threads: u32,
    /// Of each thread to each other process; of all threads where they share them.
    queue_pairs: u32,
    inlined: bool,
    elements: u32,
    /// Longest run of requests without a completion.
    unsignaled: u32,
    /// Longest chain.
    chain: u32,
    /// `ibv_wr_*`, and completions that are read field by field.
    extended: bool,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Transport {
    Rc,
    Uc,
    Ud,
    /// RC on a shared receive queue.
    Srq,
    /// One queue pair of each.
    Mix,
}

/// What the threads of a process share.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Sharing {
    Nothing,
    CompletionQueues,
    QueuePairs,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Receiver {
    Quick,
    Slow,
    /// Has too few receives posted, and late.
    NotReady,
}

use Receiver::{NotReady, Quick, Slow};
use Sharing::{CompletionQueues, Nothing, QueuePairs};
use Transport::{Mix, Rc, Srq, Uc, Ud};

#[rustfmt::skip]
const ROWS: &[Row] = &[
    row(Rc,  Nothing,          true,  Quick,    (3, 1, 2), true,  4, 8, 1),
    row(Rc,  CompletionQueues, false, NotReady, (2, 3, 1), false, 1, 8, 6),
    row(Rc,  CompletionQueues, true,  Slow,     (2, 2, 2), true,  4, 0, 1),
    row(Rc,  QueuePairs,       true,  NotReady, (3, 2, 1), false, 1, 0, 1),
    row(Uc,  Nothing,          true,  Quick,    (3, 2, 1), true,  1, 0, 1),
    row(Uc,  CompletionQueues, true,  Quick,    (2, 2, 2), true,  4, 8, 1),
    row(Uc,  QueuePairs,       false, Slow,     (3, 2, 1), false, 4, 0, 6),
    row(Ud,  Nothing,          true,  Slow,     (2, 1, 4), false, 4, 0, 6),
    row(Ud,  CompletionQueues, false, Slow,     (3, 2, 1), true,  1, 8, 1),
    row(Ud,  QueuePairs,       true,  Quick,    (2, 3, 1), false, 1, 8, 1),
    row(Srq, Nothing,          true,  NotReady, (3, 2, 1), true,  4, 0, 1),
    row(Srq, CompletionQueues, false, Slow,     (2, 3, 2), false, 4, 8, 1),
    row(Srq, QueuePairs,       true,  Quick,    (2, 3, 2), false, 1, 0, 6),
    row(Mix, Nothing,          false, Slow,     (2, 2, 4), true,  4, 0, 6),
    row(Mix, CompletionQueues, true,  Slow,     (2, 2, 4), false, 4, 0, 6),
    row(Mix, QueuePairs,       false, Quick,    (3, 2, 4), true,  1, 8, 1),
];

/// The second way to post and to poll, through the provider alone: rxe's own (rdma-core 44) adds up the first element's length for
/// all of a list, and skips a completion when `ibv_next_poll` finds nothing and `ibv_end_poll` follows.
#[rustfmt::skip]
const EXTENDED: &[Row] = &[
    extended(row(Rc,  CompletionQueues, true,  NotReady, (2, 2, 2), true,  1, 8, 6)),
    extended(row(Mix, Nothing,          false, Slow,     (2, 2, 4), true,  1, 0, 6)),
    extended(row(Mix, QueuePairs,       true,  Quick,    (3, 2, 4), false, 1, 8, 1)),
    extended(row(Srq, Nothing,          true,  Slow,     (2, 2, 2), true,  4, 8, 6)),
];

const fn extended(row: Row) -> Row {
    Row {
        extended: true,
        ..row
    }
}

#[expect(clippy::too_many_arguments, reason = "a table is read by columns")]
const fn row(
    transport: Transport,
    sharing: Sharing,
    events: bool,
    receiver: Receiver,
    (processes, threads, queue_pairs): (u32, u32, u32),
    inlined: bool,
    elements: u32,
    unsignaled: u32,
    chain: u32,
) -> Row {
    Row {
        transport,
        sharing,
        events,
        receiver,
        processes,
        threads,
        queue_pairs,
        inlined,
        elements,
        unsignaled,
        chain,
        extended: false,
    }
}

fn rows() -> impl Iterator<Item = &'static Row> {
    ROWS.iter().chain(EXTENDED)
}

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    let whole = rows().map(|row| Case {
        name: row.to_string(),
        needs: match row.extended {
            true => Needs::Provider,
            false => Needs::AnyMode,
        },
        limit: LIMIT,
        action: Action::Matrix(row),
    });
    let cycled = rows().map(|row| Case {
        name: format!("cycle-{row}"),
        needs: Needs::Provider,
        limit: CYCLED_LIMIT,
        action: Action::CycledMatrix(row),
    });
    whole.chain(cycled).collect()
}

/// Runs the program to its end.
///
/// # Errors
/// When it finds anything wrong, or did not do what its options ask for.
pub fn run(row: &Row, job: &Job<'_>) -> Result<String> {
    row.run(job, MESSAGES, |running| {
        running.wait_for_success(job.deadline)?;
        Ok(String::new())
    })
}

/// Runs the program under cycles at random moments, its share of those that are asked for.
///
/// # Errors
/// When a cycle fails or changes nothing, or the program finds anything wrong.
pub fn run_cycled(row: &Row, job: &Job<'_>) -> Result<String> {
    let cycles = job.setup.cycles.div_ceil(rows().count() as u32);
    let mut random = fastrand::Rng::with_seed(job.setup.seed);
    let most = 2 * job.setup.pace;
    row.run(job, 0, |running| {
        let moments = |_| most.mul_f64(random.f64());
        let times = cycles::cycle(running, job, cycles, Objects::MadeAtTheStart, moments)?;
        running.signal(Signal::TERM)?;
        running.wait_for_success(job.deadline.at_most(END_LIMIT))?;
        Ok(format!("{times}, "))
    })
}

impl Row {
    /// Runs the program, checks its account, and says what was checked. With 0 messages it goes on until it is told to end.
    fn run(
        &self,
        job: &Job<'_>,
        messages: u32,
        until_its_end: impl FnOnce(&mut Running) -> Result<String>,
    ) -> Result<String> {
        let seed = job.setup.seed;
        let refused = counter(&job.setup.device, "rcvd_rnr_err")?;
        let options = self.options(job, messages);
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let mut running = own_programs::start(job, "matrix", &options)?;
        let ended = self
            .check_start(&mut running, job)
            .and_then(|()| until_its_end(&mut running))
            .with_context(|| format!("seed {seed}"));
        if ended.is_err() {
            own_programs::ask_for_report(&mut running, &job.folder);
        }
        let account = own_programs::account(&running.output()?);
        let remark = ended?;
        let account = account?;
        self.check(&account)
            .with_context(|| format!("seed {seed}"))?;
        let refused = counter(&job.setup.device, "rcvd_rnr_err")? - refused;
        ensure!(
            self.receiver != NotReady || refused > 0,
            "every message found a receive"
        );
        let messages = &account["messages"];
        let lost = &account["lost"];
        Ok(format!(
            "{remark}{messages} messages, {lost} lost by UC and UD, {refused} times not ready, seed {seed}"
        ))
    }

    fn check_start(&self, running: &mut Running, job: &Job<'_>) -> Result<()> {
        running.wait_for_line(job.deadline, "ready")?;
        evidence::check_mode(running.pid(), &job.setup.mode)
    }

    fn options(&self, job: &Job<'_>, messages: u32) -> Vec<String> {
        let mut options: Vec<String> = Vec::new();
        let mut set = |name: &str, value: &dyn fmt::Display| {
            options.extend([format!("--{name}"), value.to_string()]);
        };
        set("seed", &job.setup.seed);
        set("messages", &messages);
        set("transport", &self.transport.name());
        set(
            "share",
            &match self.sharing {
                Nothing => "nothing",
                CompletionQueues => "cqs",
                QueuePairs => "qps",
            },
        );
        set("processes", &self.processes);
        set("threads", &self.threads);
        set("qps", &self.queue_pairs);
        set("sges", &self.elements);
        set("unsignaled", &self.unsignaled);
        set("chain", &self.chain);
        let flags = [
            ("inline", self.inlined),
            ("events", self.events),
            ("slow-receiver", self.receiver == Slow),
            ("rnr", self.receiver == NotReady),
            ("extended", self.extended),
        ];
        options.extend(
            flags
                .iter()
                .filter(|(_, on)| *on)
                .map(|(name, _)| format!("--{name}")),
        );
        options
    }

    /// What was asked for must have happened.
    fn check(&self, account: &Value) -> Result<()> {
        let mut wanted = vec!["messages", "send", "send_imm"];
        if self.transport != Ud {
            wanted.extend(["write", "write_imm"]);
        }
        if !matches!(self.transport, Uc | Ud) {
            wanted.extend(["read", "fetch_add", "cmp_swap", "swapped"]);
        }
        let chosen = [
            ("inline", self.inlined),
            ("events", self.events),
            ("scattered", self.elements > 1),
            ("unsignaled", self.unsignaled > 0),
            ("chains", self.chain > 1),
            ("late_receives", self.receiver == NotReady),
        ];
        wanted.extend(chosen.iter().filter(|(_, on)| *on).map(|(name, _)| *name));
        let number = |name: &str| account[name].as_u64().unwrap_or_default();
        for name in wanted {
            ensure!(number(name) > 0, "no {name} in {account}");
        }
        let (lost, received) = (number("lost"), number("messages"));
        ensure!(
            lost as f64 <= MOST_LOST * (lost + received) as f64,
            "{lost} messages of UC or UD were lost, {received} received"
        );
        Ok(())
    }
}

impl Transport {
    fn name(self) -> &'static str {
        match self {
            Rc => "rc",
            Uc => "uc",
            Ud => "ud",
            Srq => "srq",
            Mix => "mix",
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sharing = match self.sharing {
            Nothing => "own",
            CompletionQueues => "cqs",
            QueuePairs => "qps",
        };
        let events = if self.events { "events" } else { "polled" };
        let extended = if self.extended { "-extended" } else { "" };
        write!(
            formatter,
            "matrix-{}-{sharing}-{events}{extended}",
            self.transport.name()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The settings of a row, as what is paired.
    fn settings(row: &Row) -> Vec<(usize, String)> {
        let several = |number: u32| format!("{}", number > 1);
        let texts = [
            format!("{:?}", row.transport),
            format!("{:?}", row.sharing),
            format!("{:?}", row.receiver),
            row.events.to_string(),
            row.inlined.to_string(),
            several(row.elements),
            several(row.unsignaled),
            several(row.chain),
            several(row.processes - 1),
        ];
        texts.into_iter().enumerate().collect()
    }

    #[test]
    fn each_two_settings_meet_in_a_row() {
        let mut single: HashSet<_> = HashSet::new();
        let mut met = HashSet::new();
        for row in ROWS {
            let settings = settings(row);
            for one in &settings {
                for other in &settings {
                    met.insert((one.clone(), other.clone()));
                }
            }
            single.extend(settings);
        }
        let lossy = ["Uc", "Ud", "Mix"].map(str::to_owned);
        for one in &single {
            for other in &single {
                let impossible = lossy.contains(&one.1) && other.1 == "NotReady";
                if one.0 < other.0 && !impossible {
                    assert!(
                        met.contains(&(one.clone(), other.clone())),
                        "{one:?} {other:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn names_differ_and_threads_that_share_are_several() {
        let names: HashSet<_> = rows().map(Row::to_string).collect();
        assert_eq!(names.len(), rows().count());
        assert!(rows().all(|row| row.sharing == Nothing || row.threads > 1));
        assert!(
            ROWS.iter()
                .any(|row| row.sharing == Nothing && row.threads > 1)
        );
    }
}
