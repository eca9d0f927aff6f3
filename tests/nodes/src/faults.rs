//! Something breaks at a chosen phase of a checkpoint or a restart of a job over several nodes.
//!
//! Whatever breaks: the job runs on correct, or it can be restarted from the last complete image; and nothing stays behind
//! that was there only for the checkpoint.

use std::time::Duration;

use anyhow::{Result, ensure};
use reverbs_tests::process::{Running, signal_each};
use reverbs_tests::setup::Deadline;
use rustix::process::Signal;

use crate::case::{Action, Case, Context};
use crate::clean;
use crate::cluster::{Cluster, usual};
use crate::launched::{Launched, images, newest_image, wait_for_phase};
use crate::library::Library;
use crate::processes::Process;

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(180);

/// How long a command may take to notice that something is broken. A node that is cut off says nothing.
const NOTICE: Duration = Duration::from_secs(60);

/// For so long a slow node does nothing, or a cable is out.
const PAUSE: Duration = Duration::from_secs(3);

/// Kilobytes for the part of a node that has too little room: an image of it has some megabytes.
const ROOM: u32 = 1024;

/// The node to which it happens; commands are given on the first.
const VICTIM: &str = "n2";

const NODES: u8 = 3;

/// What breaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The command's part on one node is killed.
    NodePart,
    /// The command itself is killed.
    Orchestrator,
    /// One node loses its power.
    PowerOff,
    /// One node is cut off until the command has ended.
    Cut,
    /// One node is cut off for a moment.
    Blink,
    /// One node stands still for a while.
    Slow,
    /// One node has no room for its part of the image.
    FullDisk,
}

impl Fault {
    const ALL: [(Self, &'static str); 7] = [
        (Self::NodePart, "node-part"),
        (Self::Orchestrator, "orchestrator"),
        (Self::PowerOff, "power-off"),
        (Self::Cut, "cut"),
        (Self::Blink, "blink"),
        (Self::Slow, "slow"),
        (Self::FullDisk, "full-disk"),
    ];

    /// Does the damage while `command` runs, and makes sure that there was something to damage.
    ///
    /// # Errors
    /// When there was not.
    pub fn happen(self, cluster: &mut Cluster, command: &Running) -> Result<()> {
        let node = cluster.node(VICTIM)?;
        match self {
            Self::NodePart => {
                let killed = node.signal(Signal::KILL, is_node_part);
                ensure!(killed > 0, "the command has no part on {VICTIM}");
            }
            Self::Orchestrator => {
                // The program below `nsenter`, and nothing of what it has started.
                let killed = cluster.first()?.signal(Signal::KILL, |process| {
                    process.parent == command.pid() && process.name == "reverbs"
                });
                ensure!(killed == 1, "the command has ended already");
            }
            Self::PowerOff => cluster.power_off(VICTIM)?,
            Self::Cut => cluster.cut(VICTIM)?,
            Self::Blink => {
                cluster.cut(VICTIM)?;
                std::thread::sleep(PAUSE);
                cluster.join(VICTIM)?;
            }
            Self::Slow => {
                let slow: Vec<u32> = node
                    .processes()
                    .into_iter()
                    .filter(is_node_part)
                    .map(|process| process.pid)
                    .collect();
                ensure!(!slow.is_empty(), "the command has no part on {VICTIM}");
                signal_each(&slow, Signal::STOP);
                std::thread::sleep(PAUSE);
                signal_each(&slow, Signal::CONT);
            }
            // It was seen to beforehand.
            Self::FullDisk => {}
        }
        Ok(())
    }

    /// Puts right what can be, when the command has ended.
    ///
    /// # Errors
    /// When that fails.
    pub fn mend(self, cluster: &mut Cluster, context: &Context<'_>) -> Result<()> {
        match self {
            Self::NodePart | Self::Orchestrator | Self::Blink | Self::Slow => Ok(()),
            Self::Cut => cluster.join(VICTIM),
            Self::PowerOff => {
                cluster.power_off_all()?;
                cluster.boot(&usual(NODES))
            }
            Self::FullDisk => {
                let text = format!("umount '{}'", images(context).display());
                cluster.node(VICTIM)?.shell(&text).map(drop)
            }
        }
    }

    /// The command may come to a good end all the same.
    fn is_bearable(self) -> bool {
        matches!(self, Self::Blink | Self::Slow)
    }
}

/// The command's part on a node, or what that has started.
fn is_node_part(process: &Process) -> bool {
    process.name == "reverbs" && process.command.split(' ').any(|word| word == "node")
}

/// The phases of a checkpoint of a job without RDMA devices, as the command names them at the end of each.
const CHECKPOINT_PHASES: [&str; 3] = ["examine", "save", LAST_OF_CHECKPOINT];

const LAST_OF_CHECKPOINT: &str = "publish";

/// The same of a restart.
const RESTART_PHASES: [&str; 2] = ["verify", "restore"];

/// Where images are on disks that the first node does not see: they are fetched after the one and were sent before the other.
const OWN_DISKS_PHASES: [(During, &str); 2] =
    [(During::Checkpoint, "save"), (During::Restart, "send")];

/// A fault in one phase.
#[derive(Clone, Copy, Debug)]
pub struct Broken {
    fault: Fault,
    /// It happens when this phase is over.
    phase: &'static str,
    during: During,
    /// The images are on each node's own disk.
    own_disks: bool,
}

impl Broken {
    fn mend(&self, cluster: &mut Cluster, context: &Context<'_>, job: &Launched<'_>) -> Result<()> {
        self.fault.mend(cluster, context)?;
        if self.own_disks && self.fault == Fault::PowerOff {
            job.keep_images_apart(cluster)?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum During {
    Checkpoint,
    Restart,
}

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (fault, name) in Fault::ALL {
        let during_checkpoint = CHECKPOINT_PHASES.map(|phase| (During::Checkpoint, phase));
        let during_restart = RESTART_PHASES.map(|phase| (During::Restart, phase));
        for (during, phase) in during_checkpoint.into_iter().chain(during_restart) {
            // A restart writes no image, and room is needed once.
            if fault != Fault::FullDisk || phase == CHECKPOINT_PHASES[0] {
                cases.push(case(fault, name, during, phase, false));
            }
        }
        if fault != Fault::FullDisk {
            cases.extend(
                OWN_DISKS_PHASES.map(|(during, phase)| case(fault, name, during, phase, true)),
            );
        }
    }
    cases
}

fn case(fault: Fault, name: &str, during: During, phase: &'static str, own_disks: bool) -> Case {
    let verb = match during {
        During::Checkpoint => "checkpoint",
        During::Restart => "restart",
    };
    let disks = if own_disks { "own-disks-" } else { "" };
    Case {
        name: format!("fault-{name}-{disks}{verb}-{phase}"),
        needs_reverbs: true,
        limit: LIMIT,
        action: Action::Broken(Broken {
            fault,
            phase,
            during,
            own_disks,
        }),
    }
}

/// Runs a case.
///
/// # Errors
/// When the job is lost, or something stays behind.
pub fn run(broken: &Broken, context: &Context<'_>) -> Result<String> {
    let mut cluster = context.cluster(&usual(NODES))?;
    let mut job = Launched::start(context, &cluster, Library::OpenMpi4)?;
    if broken.own_disks {
        job.keep_images_apart(&cluster)?;
    }
    let remark = match broken.during {
        During::Checkpoint => in_checkpoint(broken, context, &mut cluster, &mut job)?,
        During::Restart => in_restart(broken, context, &mut cluster, &mut job)?,
    };
    if broken.own_disks {
        job.nothing_apart(&cluster)?;
    }
    let rounds = job.finish(&cluster)?;
    Ok(format!("{rounds} rounds; {remark}"))
}

fn in_checkpoint(
    broken: &Broken,
    context: &Context<'_>,
    cluster: &mut Cluster,
    job: &mut Launched<'_>,
) -> Result<String> {
    let complete = job.checkpoint(cluster)?;
    if broken.fault == Fault::FullDisk {
        cluster.node(VICTIM)?.limit_room(&images(context), ROOM)?;
    }
    let mut command = job.begin(cluster, "checkpoint", &[])?;
    wait_for_phase(&mut command, broken.phase, context.deadline)?;
    broken.fault.happen(cluster, &command)?;
    let succeeded = command.wait(Deadline::after(NOTICE))?.success();
    let may_succeed = broken.fault.is_bearable() || broken.phase == LAST_OF_CHECKPOINT;
    ensure!(
        may_succeed || !succeeded,
        "{:?} and yet it succeeded",
        broken.fault
    );
    if broken.fault == Fault::PowerOff {
        // What is left of the job may wait for long for what is gone: it is not up to the checkpoint to end it.
        job.wait_until_free(cluster, NOTICE)?;
        let newest = newest_image(context)?;
        ensure!(
            succeeded || newest == complete,
            "{} is complete",
            newest.display()
        );
        broken.mend(cluster, context, job)?;
        job.restart(cluster, &newest, &[])?;
        return Ok("restarted".to_owned());
    }
    if broken.fault == Fault::FullDisk {
        let errors = command.errors()?;
        ensure!(
            errors.contains("No space left"),
            "another failure: {errors}"
        );
    }
    broken.mend(cluster, context, job)?;
    if broken.fault == Fault::Orchestrator {
        let mut resume = job.begin(cluster, "resume", &[])?;
        resume.wait_for_success(Deadline::after(NOTICE))?;
    } else {
        clean::no_partial_image(&images(context))?;
    }
    job.wait_until_free(cluster, NOTICE)?;
    job.wait_for_progress()?;
    // It is a job like any other: it can be saved, and that takes away what a killed command has left.
    job.checkpoint(cluster)?;
    Ok(format!(
        "the checkpoint {}",
        if succeeded { "succeeded" } else { "failed" }
    ))
}

fn in_restart(
    broken: &Broken,
    context: &Context<'_>,
    cluster: &mut Cluster,
    job: &mut Launched<'_>,
) -> Result<String> {
    let image = job.checkpoint_and_stop(cluster)?;
    let mut command = job.begin_restart(cluster, &image, &[], &["--wait"])?;
    wait_for_phase(&mut command, broken.phase, context.deadline)?;
    broken.fault.happen(cluster, &command)?;
    if broken.fault.is_bearable() {
        job.follow(cluster, command)?;
        return Ok("the restart succeeded".to_owned());
    }
    let status = command.wait(Deadline::after(NOTICE))?;
    ensure!(!status.success(), "{:?} and yet it succeeded", broken.fault);
    broken.mend(cluster, context, job)?;
    // Nothing of the attempt is in the way of the next.
    clean::check_within(cluster, &[images(context)], NOTICE)?;
    job.restart(cluster, &image, &[])?;
    Ok("restarted once more".to_owned())
}
