//! An orchestrator that dies inside a phase: when it has asked some, when nobody heard the answer, in the middle of a
//! word. `reverbs resume` brings the job back; and where nothing was moved yet, nothing is.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reverbs::control::message::Phase;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::Numbers;
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process;
use crate::stand_in::{Death, StandIn, Step, standing};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(900);

/// A job that its orchestrator leaves in each step.
#[derive(Debug)]
pub struct Abandoned {
    name: &'static str,
    kind: Kind,
    deaths: &'static [Death],
}

const ABANDONED: &[Abandoned] = &[
    Abandoned {
        name: "killed-inside",
        kind: Kind::TRAFFIC,
        deaths: &[Death::SomeAsked],
    },
    Abandoned {
        name: "killed-inside-more",
        kind: Kind::TRAFFIC,
        deaths: &[Death::Unheard, Death::HalfSaid],
    },
    Abandoned {
        name: "killed-inside-mpi",
        kind: Kind::Mpi { ranks: 2 },
        deaths: &[Death::SomeAsked],
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    ABANDONED
        .iter()
        .map(|abandoned| Case {
            name: abandoned.name.to_owned(),
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Abandoned(abandoned),
        })
        .collect()
}

/// Leaves a running job in each step, and resumes it. The remark says how often.
///
/// # Errors
/// When the job is not where it was left, cannot be resumed, has old numbers or new ones where it should not, or loses
/// anything.
pub fn run(abandoned: &Abandoned, job: &Job<'_>) -> Result<String> {
    let mut started = Started::start(job, abandoned.kind)?;
    started.wait_for_traffic()?;
    let mut left = 0;
    for step in Step::ALL {
        for death in abandoned.deaths {
            leave_and_resume(&mut started, job, step, *death)
                .with_context(|| format!("{step:?}, {death:?}"))?;
            left += 1;
        }
    }
    let done = started.finish()?;
    Ok(format!("{done}; left and resumed {left} times"))
}

fn leave_and_resume(
    started: &mut Started<'_>,
    job: &Job<'_>,
    step: Step,
    death: Death,
) -> Result<()> {
    let root = started.root;
    let before = Numbers::on(&job.setup.device)?;
    let mut orchestrator = StandIn::meet(root)?;
    for earlier in Step::ALL.into_iter().filter(|earlier| *earlier < step) {
        orchestrator.take(earlier)?;
    }
    orchestrator.vanish(step, death)?;
    let claimed = check_where_left(root, step, death)?;

    if claimed && death == Death::SomeAsked {
        let mut command = job.setup.reverbs()?;
        command.arg("cycle").arg(root.to_string());
        let deadline = job.deadline.at_most(COMMAND_LIMIT);
        let refused = process::fail(command, &job.folder, "refused", deadline)?;
        ensure!(
            refused.contains("run `reverbs resume` first"),
            "a cycle of a job that was left says: {refused}"
        );
    }
    started.resume()?;

    for (pid, now) in standing(root)? {
        ensure!(
            now.phase == Phase::Running && now.session.is_none(),
            "process {pid} was resumed: {now:?}"
        );
    }
    let after = Numbers::on(&job.setup.device)?;
    let moved = step > Step::Stop || (step == Step::Stop && death != Death::HalfSaid);
    if moved {
        after.check_all_new(&before)?;
        after.check_as_many(&before)?;
    } else {
        ensure!(
            after == before,
            "nothing was moved, and the numbers changed: {before:?}, {after:?}"
        );
    }
    started.wait_for_traffic()
}

/// Says whether anybody is still claimed.
fn check_where_left(root: u32, step: Step, death: Death) -> Result<bool> {
    let standing = standing(root)?;
    let done = match death {
        Death::SomeAsked => standing.len() / 2,
        Death::Unheard => standing.len(),
        Death::HalfSaid => 0,
    };
    let expected = |index: usize| match index < done {
        true => step.leads_to(),
        false => step.starts_from(),
    };
    for (index, (pid, found)) in standing.iter().enumerate() {
        ensure!(
            found.phase == expected(index),
            "process {pid} is in {:?} and not in {:?}",
            found.phase,
            expected(index)
        );
    }
    Ok(standing.values().any(|one| one.session.is_some()))
}
