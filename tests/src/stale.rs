//! Files of earlier processes under the ids of those that are there now: sockets, numbers of a job, a lock.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reverbs::control::socket::{agent_socket, runtime_dir};
use serde_json::Value;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::Numbers;
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::{mpi, process};

/// The time limit of the case.
const LIMIT: Duration = Duration::from_secs(600);

/// No process has this id.
const NOBODY: i32 = i32::MAX;

/// No limit of the protocol may have to run out for `reverbs status`.
const PROMPT: Duration = Duration::from_secs(8);

/// Between two looks at the ranks.
const PAUSE: Duration = Duration::from_millis(20);

const RANKS: u32 = 2;

/// The case of this module.
pub fn cases() -> Vec<Case> {
    vec![Case {
        name: "stale-files".to_owned(),
        needs: Needs::Provider,
        limit: LIMIT,
        action: Action::Stale,
    }]
}

/// Leaves files under the ids of a job before its second process opens its device. The remark is what the job checked.
///
/// # Errors
/// When anything is taken for what it is not, or the job loses anything.
pub fn run(job: &Job<'_>) -> Result<String> {
    let folder = runtime_dir()?;
    let mut started = Started::launch(job, Kind::Starting { ranks: RANKS })?;
    started.wait_for_device()?;
    let root = started.root.cast_signed();
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    let (ranks, late) = loop {
        let ranks = mpi::processes_called(started.root, "mpi_check");
        let has_agent = |rank: &u32| agent_socket(&folder, rank.cast_signed()).exists();
        let (early, late): (Vec<u32>, Vec<u32>) = ranks.iter().partition(|rank| has_agent(rank));
        if let ([_], [late]) = (&early[..], &late[..]) {
            break (ranks, late.cast_signed());
        }
        ensure!(!deadline.passed(), "ranks {ranks:?}, with agents {early:?}");
        std::thread::sleep(PAUSE);
    };

    // Of a process that is not there, of one that has no agent, of one that will have one.
    for pid in [NOBODY, root, late] {
        drop(UnixListener::bind(agent_socket(&folder, pid))?);
    }
    let numbers = folder.join(format!("job-{root}.numbers"));
    fs::write(
        &numbers,
        "{\"root_started\":\"1 of another boot\",\"processes\":[]}",
    )?;
    let lock = folder.join(format!("job-{root}.lock"));
    fs::write(&lock, NOBODY.to_string())?;

    started.let_all_in()?;
    started.wait_until_ready()?;
    started.wait_for_traffic()?;
    started.cycle()?;
    ensure!(!lock.exists(), "the lock is still there");
    let written: Value = serde_json::from_str(&fs::read_to_string(&numbers)?)?;
    let processes = written["processes"].as_array().map_or(0, Vec::len);
    ensure!(
        processes == RANKS as usize,
        "the numbers left for the job: {written}"
    );
    listed_are(&ranks, job)?;
    started.wait_for_traffic()?;

    without_its_socket(&agent_socket(&folder, late), &started, job)?;
    started.cycle()?;
    started.wait_for_traffic()?;
    started.tell_to_finish()?;
    let done = started.wait_for_end()?;
    for pid in [NOBODY, root] {
        fs::remove_file(agent_socket(&folder, pid))?;
    }
    Ok(done)
}

/// A process that cannot be reached is not one that has no agent.
fn without_its_socket(path: &Path, started: &Started<'_>, job: &Job<'_>) -> Result<()> {
    let aside = path.with_extension("aside");
    fs::rename(path, &aside)?;
    let before = Numbers::on(&job.setup.device)?;
    let mut command = job.setup.reverbs()?;
    command.arg("cycle").arg(started.root.to_string());
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    let said = process::fail(command, &job.folder, "without", deadline)?;
    let name = path.to_str().context("name of a socket")?;
    ensure!(said.contains(name), "no word of {name} in: {said}");
    ensure!(
        Numbers::on(&job.setup.device)? == before,
        "the job was touched"
    );
    Ok(fs::rename(&aside, path)?)
}

/// `reverbs status` without a job shows these processes and no others, and does not wait for those that are not there.
fn listed_are(ranks: &[u32], job: &Job<'_>) -> Result<()> {
    let mut command = job.setup.reverbs()?;
    command.args(["status", "--json"]);
    let began = Instant::now();
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    let listed: Value =
        serde_json::from_str(&process::run(command, &job.folder, "status", deadline)?)?;
    let took = began.elapsed();
    ensure!(took < PROMPT, "it took {took:?}");
    let mut pids: Vec<_> = listed
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|process| process["pid"].as_u64())
        .collect();
    let mut expected: Vec<_> = ranks.iter().map(|rank| u64::from(*rank)).collect();
    pids.sort_unstable();
    expected.sort_unstable();
    ensure!(pids == expected, "listed are {pids:?}, not {expected:?}");
    Ok(())
}
