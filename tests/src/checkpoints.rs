//! `reverbs checkpoint` and `reverbs restart` under jobs that check everything they see.
//!
//! The job is saved in mid-run, all its processes end, and it comes back from the image: with the
//! same numbers in the application's eyes and others in the hardware's (the kernel is asked, not
//! only the provider). Then it runs on, and must end by itself with its own account.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::case::{Action, Case, Job, Needs};
use crate::clients::{IPV4, IPV6};
use crate::hardware::Numbers;
use crate::jobs::{COMMAND_LIMIT, Kind, Perftest, Started, wait_for_traffic};
use crate::process::{self, Running};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(600);

/// The device to which a job is brought back that leaves its own.
const OTHER_DEVICE: &str = "rxe1";

/// A job that is saved and brought back.
#[derive(Debug)]
pub struct Saved {
    name: &'static str,
    kind: Kind,
    how: How,
}

#[derive(Debug, Eq, PartialEq)]
enum How {
    /// `checkpoint --stop`, then back on the device it had.
    Stopped,
    /// `checkpoint --stop`, then back on the other device.
    OtherDevice,
    /// The job runs on after the checkpoint and is killed later.
    RunsOn,
}

const SAVED: &[Saved] = &[
    Saved {
        name: "restart-rc",
        kind: Kind::TRAFFIC,
        how: How::Stopped,
    },
    // UC and UD beside RC, and shared receive queues; datagrams get other senders' addresses.
    Saved {
        name: "restart-ud-srq-other-device",
        kind: Kind::Own {
            program: "ud_srq",
            options: "--seed 22",
        },
        how: How::OtherDevice,
    },
    // All operations on all transports, by the second way to post and to poll.
    Saved {
        name: "restart-matrix-mix-extended",
        kind: Kind::Own {
            program: "matrix",
            options: "--seed 23 --messages 0 --transport mix --share cqs --processes 2 --threads 2 --qps 4 --sges 4 \
                      --unsignaled 6 --chain 4 --inline --events --extended",
        },
        how: How::Stopped,
    },
    Saved {
        name: "restart-mpi-np2",
        kind: Kind::Mpi { ranks: 2 },
        how: How::Stopped,
    },
    Saved {
        name: "restart-mpi-np2-other-device",
        kind: Kind::Mpi { ranks: 2 },
        how: How::OtherDevice,
    },
    Saved {
        name: "restart-ucx-rc-other-device",
        kind: Kind::Perftest(&Perftest {
            transport: "rc_verbs",
            test: "am_lat",
            messages: "60000",
            variables: IPV4,
        }),
        how: How::OtherDevice,
    },
    Saved {
        name: "restart-ucx-ud-other-device",
        kind: Kind::Perftest(&Perftest {
            transport: "ud_verbs",
            test: "am_lat",
            messages: "40000",
            variables: IPV4,
        }),
        how: How::OtherDevice,
    },
    Saved {
        name: "restart-ucx-ud-checked-other-device",
        kind: Kind::Perftest(&Perftest {
            transport: "ud_verbs",
            test: "am_lat",
            messages: "40000",
            variables: IPV6,
        }),
        how: How::OtherDevice,
    },
    Saved {
        name: "restart-mpi-np4",
        kind: Kind::Mpi { ranks: 4 },
        how: How::Stopped,
    },
    Saved {
        name: "restart-deleted-file",
        kind: Kind::Beside { what: "deleted" },
        how: How::Stopped,
    },
    Saved {
        name: "checkpoint-runs-on",
        kind: Kind::Mpi { ranks: 2 },
        how: How::RunsOn,
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    SAVED
        .iter()
        .map(|saved| Case {
            name: saved.name.to_owned(),
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Saved(saved),
        })
        .collect()
}

/// Saves a job, ends it, brings it back, and lets it finish. The remark is what it checked.
///
/// # Errors
/// When a command fails, a number is not as promised, or the job finds anything wrong.
pub fn run(saved: &Saved, job: &Job<'_>) -> Result<String> {
    let other = saved.how == How::OtherDevice;
    let device = if other {
        OTHER_DEVICE
    } else {
        &job.setup.device
    };
    let mut started = Started::start(job, saved.kind)?;
    started.wait_for_traffic()?;
    let before = status(job, started.root, "before")?;
    ensure!(!before.pairs.is_empty(), "the job has no queue pair");
    let keys = Numbers::on(&job.setup.device)?.keys;
    if other {
        use_up_numbers(job, &before.hardware())?;
    }

    let image = if saved.how == How::RunsOn {
        let image = started.checkpoint(&[])?;
        started.wait_for_traffic()?;
        started.kill()?;
        image
    } else {
        started.checkpoint(&["--stop"])?
    };
    ensure!(
        Numbers::on(&job.setup.device)?.queue_pairs.is_empty(),
        "the job has ended and the hardware still has its queue pairs"
    );

    let mut command = job.setup.reverbs()?;
    command.arg("restart").arg(&image).arg("--wait");
    if other {
        command.args(["--device", &format!("{}={device}", job.setup.device)]);
    }
    let mut restart = Running::start(command, &job.folder, "restart")?;
    restart.wait_for_line(
        job.deadline.at_most(COMMAND_LIMIT),
        &started.root.to_string(),
    )?;
    wait_for_traffic(&mut restart, device, job.deadline)?;
    let after = status(job, started.root, "after")?;
    after.check_against(&before, &job.setup.device, device)?;
    if !other {
        let now = Numbers::on(device)?.keys;
        ensure!(
            keys.is_disjoint(&now),
            "the hardware has keys of before: {keys:?} and {now:?}"
        );
    }
    started.finish_in(&mut restart)
}

/// Makes the other device give out numbers until it is beyond those of the job, so that the job
/// cannot get the same ones again: Soft-RoCE counts from the same number on each device.
fn use_up_numbers(job: &Job<'_>, taken: &BTreeSet<u64>) -> Result<()> {
    let highest = taken.last().copied().unwrap_or_default();
    for _ in 0..64 {
        let mut command = Command::new(job.setup.own_program("rc_traffic")?);
        command.env_remove("RDMAV_DRIVERS");
        command.args(["--device", OTHER_DEVICE, "--qps", "32"]);
        command.args(["--gid-index", &job.setup.gid_index.to_string()]);
        let mut user = Running::start(command, &job.folder, "user")?;
        user.wait_for_line(job.deadline.at_most(COMMAND_LIMIT), "ready")?;
        let now = Numbers::on(OTHER_DEVICE)?.queue_pairs;
        if now.last().is_some_and(|number| *number >= highest) {
            return Ok(());
        }
    }
    anyhow::bail!("{OTHER_DEVICE} does not reach the number {highest}")
}

/// What `reverbs status --json` says of a job.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Status {
    /// Hardware number of each queue pair, by process and virtual number.
    pairs: BTreeMap<(u64, u64), Option<u64>>,
    /// Name of each device in the application's eyes and, for those with queue pairs, the name of
    /// the hardware behind it.
    devices: BTreeSet<(String, String)>,
    phases: BTreeSet<String>,
    /// What was found out of the devices with queue pairs of RC: that they tell how far a responder came.
    live_psns: BTreeSet<Option<bool>>,
}

fn status(job: &Job<'_>, root: u32, when: &str) -> Result<Status> {
    let mut command = job.setup.reverbs()?;
    command.args(["status", "--json"]).arg(root.to_string());
    let name = format!("status-{when}");
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    Status::parse(&process::run(command, &job.folder, &name, deadline)?)
}

impl Status {
    fn parse(text: &str) -> Result<Self> {
        let mut found = Self::default();
        for process in list(&serde_json::from_str(text)?)? {
            let pid = process["pid"].as_u64().context("no pid")?;
            found
                .phases
                .insert(process["phase"].as_str().context("no phase")?.to_owned());
            for context in list(&process["contexts"])? {
                let pairs = list(&context["queue_pairs"])?;
                for pair in pairs {
                    let number = pair["virtual_qpn"].as_u64().context("no virtual_qpn")?;
                    let earlier = found
                        .pairs
                        .insert((pid, number), pair["hardware_qpn"].as_u64());
                    ensure!(earlier.is_none(), "{number} twice in process {pid}");
                }
                if !pairs.is_empty() {
                    let name = |key: &str| context[key].as_str().map(str::to_owned);
                    found.devices.insert((
                        name("device").context("no device")?,
                        name("hardware_device").context("no hardware_device")?,
                    ));
                    // It is found out when one of RC is connected.
                    if pairs.iter().any(|pair| pair["transport"] == "RC") {
                        let live = context["responder_psn_is_live"].as_bool();
                        found.live_psns.insert(live);
                    }
                }
            }
        }
        Ok(found)
    }

    fn hardware(&self) -> BTreeSet<u64> {
        self.pairs.values().flatten().copied().collect()
    }

    /// After a restart on `hardware_device`: all numbers of `earlier`, over hardware that the
    /// kernel confirms and that has none of the earlier numbers.
    fn check_against(&self, earlier: &Self, device: &str, hardware_device: &str) -> Result<()> {
        self.check_numbers(earlier, device, hardware_device)?;
        let listed = Numbers::on(hardware_device)?.queue_pairs;
        ensure!(
            listed == self.hardware(),
            "status tells of the queue pairs {:?}, the kernel of {listed:?}",
            self.hardware()
        );
        Ok(())
    }

    fn check_numbers(&self, earlier: &Self, device: &str, hardware_device: &str) -> Result<()> {
        ensure!(
            self.phases == BTreeSet::from(["running".to_owned()]),
            "phases after the restart: {:?}",
            self.phases
        );
        ensure!(
            self.live_psns.iter().all(|live| *live == Some(true)),
            "Soft-RoCE tells how far a responder came, and status says {:?}",
            self.live_psns
        );
        ensure!(
            self.devices == BTreeSet::from([(device.to_owned(), hardware_device.to_owned())]),
            "{device} should be on {hardware_device}: {:?}",
            self.devices
        );
        ensure!(
            self.pairs.keys().eq(earlier.pairs.keys()),
            "the application had the queue pairs (process, number) {:?} and has {:?}",
            earlier.pairs.keys(),
            self.pairs.keys()
        );
        ensure!(
            self.pairs.values().all(Option::is_some),
            "queue pairs without hardware: {:?}",
            self.pairs
        );
        ensure!(
            self.hardware().is_disjoint(&earlier.hardware()),
            "the hardware's queue pair numbers were {:?} and are {:?}",
            earlier.hardware(),
            self.hardware()
        );
        Ok(())
    }
}

fn list(value: &Value) -> Result<&Vec<Value>> {
    value
        .as_array()
        .with_context(|| format!("not a list: {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = r#"[{"pid":9,"phase":"running","contexts":[
        {"device":"rxe1","hardware_device":"rxe1","queue_pairs":[]},
        {"device":"rxe0","hardware_device":"rxe0","responder_psn_is_live":true,"queue_pairs":[
            {"transport":"RC","virtual_qpn":17,"hardware_qpn":17},
            {"transport":"RC","virtual_qpn":18,"hardware_qpn":18}]}]}]"#;

    fn check(edit: impl Fn(&str) -> String) -> Result<()> {
        let good = BEFORE
            .replace(r#""hardware_qpn":17"#, r#""hardware_qpn":33"#)
            .replace(r#""hardware_qpn":18"#, r#""hardware_qpn":34"#);
        let before = Status::parse(BEFORE)?;
        Status::parse(&edit(&good))?.check_numbers(&before, "rxe0", "rxe0")
    }

    #[test]
    fn a_restart_that_changes_the_wrong_numbers_is_found() {
        check(str::to_owned).unwrap();
        check(|text| text.replace(":33", ":17")).unwrap_err();
        check(|text| text.replace(":33", ":18")).unwrap_err();
        check(|text| text.replace(":33", ":null")).unwrap_err();
        check(|text| text.replace(r#""virtual_qpn":17"#, r#""virtual_qpn":19"#)).unwrap_err();
        check(|text| text.replace(r#""pid":9"#, r#""pid":8"#)).unwrap_err();
        check(|text| text.replace("running", "released")).unwrap_err();
        check(|text| text.replace("rxe0", "rxe2")).unwrap_err();
        check(|text| text.replace(r#"live":true"#, r#"live":null"#)).unwrap_err();
    }
}
