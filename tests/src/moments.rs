//! Checkpoints at moments that are easy to forget: while a job starts up, and while it comes down.
//!
//! The job must end right from where it was, and again from the image. That the image was made at the
//! moment meant is seen in what the job had written by then: a restart cuts its output back to that.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::case::{Action, Case, Job, Needs};
use crate::jobs::{COMMAND_LIMIT, Kind, Started, wait_for_traffic};
use crate::process::Running;

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(600);

/// A moment.
#[derive(Debug)]
pub struct Moment {
    name: &'static str,
    when: When,
}

#[derive(Debug)]
enum When {
    /// In `MPI_Init`: a rank has opened a device, and the ranks have not met.
    Init,
    /// In `MPI_Finalize`.
    Finalize,
}

const RANKS: u32 = 2;

const MOMENTS: &[Moment] = &[
    Moment {
        name: "checkpoint-in-init",
        when: When::Init,
    },
    Moment {
        name: "checkpoint-in-finalize",
        when: When::Finalize,
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    MOMENTS
        .iter()
        .map(|moment| Case {
            name: moment.name.to_owned(),
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Moment(moment),
        })
        .collect()
}

/// Saves a job at that moment, lets it end, and lets it end once more from the image.
///
/// # Errors
/// When a command fails, the moment was missed, or the job finds anything wrong.
pub fn run(moment: &Moment, job: &Job<'_>) -> Result<String> {
    let (mut started, image) = match moment.when {
        When::Init => {
            // The others open their devices after the checkpoint, so they also have to learn its numbers.
            let mut started = Started::launch(job, Kind::Starting { ranks: RANKS })?;
            started.wait_for_device()?;
            let image = started.checkpoint(&[])?;
            started.let_all_in()?;
            started.wait_until_ready()?;
            (started, image)
        }
        When::Finalize => {
            let kind = Kind::Finalizing {
                ranks: RANKS,
                milliseconds: 3000,
            };
            let mut started = Started::start(job, kind)?;
            started.wait_for_traffic()?;
            started.tell_to_finish()?;
            started.wait_for_line("finalizing")?;
            let image = started.checkpoint(&[])?;
            (started, image)
        }
    };
    let written = written(&image, &job.folder.join("job.out"))?;
    let has = |line: &str| written.lines().any(|written| written == line);
    let met = match moment.when {
        When::Init => !has("ready"),
        When::Finalize => has("finalizing") && !has("ok"),
    };
    ensure!(
        met,
        "the image was made when the job had written: {written}"
    );
    if let When::Init = moment.when {
        started.tell_to_finish()?;
    }
    let first = started.wait_for_end().context("after the checkpoint")?;

    if let When::Init = moment.when {
        started.forget_to_finish()?;
    }
    let mut command = job.setup.reverbs()?;
    command.arg("restart").arg(&image).arg("--wait");
    let mut restart = Running::start(command, &job.folder, "restart")?;
    let again = match moment.when {
        When::Init => {
            wait_for_traffic(&mut restart, &job.setup.device, job.deadline)?;
            started.finish_in(&mut restart)
        }
        When::Finalize => {
            restart.wait_for_success(job.deadline.at_most(COMMAND_LIMIT))?;
            started.account()
        }
    }
    .context("after the restart")?;
    Ok(format!("{first}, from the image {again}"))
}

/// What a file held when the image was made.
fn written(image: &Path, file: &Path) -> Result<String> {
    let manifest: Value = serde_json::from_str(&fs::read_to_string(image.join("manifest.json"))?)?;
    let length = manifest["written_files"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|written| written["path"].as_str().map(Path::new) == Some(file))
        .and_then(|written| written["length"].as_u64())
        .with_context(|| format!("{} is not in the manifest", file.display()))?;
    let text = fs::read_to_string(file)?;
    let length = usize::try_from(length)?;
    Ok(text
        .get(..length)
        .context("the file is shorter")?
        .to_owned())
}
