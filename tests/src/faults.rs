//! Are our own programs able to fail? A preloaded library breaks one promise, and they must notice.
//!
//! These cases always run on the bare device: it is the programs that are tested here.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::case::{Action, Case, Job, Needs};
use crate::process::Running;
use crate::setup::{Mode, Setup};
use crate::{own_programs, tree};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(120);

/// How long a program is watched that shows what it misses by waiting for it.
const HANG: Duration = Duration::from_secs(10);

/// A promise that is broken under a program.
#[derive(Debug)]
pub struct Fault {
    /// What `faults.c` calls it; the name of the case has `fault-` before it.
    name: &'static str,
    program: &'static str,
    options: &'static str,
    noticed: Noticed,
}

#[derive(Debug)]
enum Noticed {
    /// The program ends with an error that has one of these texts.
    Says(&'static [&'static str]),
    /// The program waits for what does not come.
    Hangs,
}

const RC: &str = "--messages 2000";

const fn rc(name: &'static str, texts: &'static [&'static str]) -> Fault {
    Fault {
        name,
        program: "rc_traffic",
        options: RC,
        noticed: Noticed::Says(texts),
    }
}

const fn ud(name: &'static str, texts: &'static [&'static str]) -> Fault {
    Fault {
        name,
        program: "ud_srq",
        options: RC,
        noticed: Noticed::Says(texts),
    }
}

/// A thread that stands still for want of a completion takes a while to say so.
const OWN: &str = "--patience 5 --messages 2000 --qps 1";
const SHARED_CQS: &str = "--patience 5 --messages 2000 --threads 3 --share cqs --unsignaled 4";
const SHARED_QPS: &str = "--patience 5 --messages 2000 --threads 3 --share qps --unsignaled 4";
const UC: &str = "--patience 5 --messages 2000 --transport uc";
const UD: &str = "--patience 5 --messages 2000 --transport ud";

const fn matrix(
    name: &'static str,
    options: &'static str,
    texts: &'static [&'static str],
) -> Fault {
    Fault {
        name,
        program: "matrix",
        options,
        noticed: Noticed::Says(texts),
    }
}

const FAULTS: &[(&str, Fault)] = &[
    (
        "fault-rc-lost-send",
        rc("lost-send-completion", &["lost, doubled"]),
    ),
    (
        "fault-rc-lost-receive",
        rc("lost-receive-completion", &["lost, doubled"]),
    ),
    (
        "fault-rc-doubled-send",
        rc("doubled-send-completion", &["doubled"]),
    ),
    (
        "fault-rc-doubled-receive",
        rc("doubled-receive-completion", &["doubled"]),
    ),
    (
        "fault-rc-swapped",
        rc("swapped-completions", &["out of order"]),
    ),
    (
        "fault-rc-wrong-number",
        rc("wrong-queue-pair-number", &["not ours", "doubled"]),
    ),
    ("fault-rc-wrong-byte", rc("wrong-byte", &["is 0x"])),
    (
        "fault-rc-wrong-byte-written",
        rc("wrong-byte-written", &["WRITE"]),
    ),
    (
        "fault-rc-changed-handle",
        rc("changed-handle", &["qp_num", "not ours"]),
    ),
    (
        "fault-rc-lost-message",
        rc(
            "lost-message",
            &["lost, doubled", "opcode", "flags", "byte"],
        ),
    ),
    (
        "fault-rc-doubled-message",
        rc(
            "doubled-message",
            &["lost, doubled", "opcode", "flags", "byte"],
        ),
    ),
    (
        "fault-rc-doubled-atomic",
        rc("doubled-atomic", &["fetch and add", "counter"]),
    ),
    (
        "fault-rc-lost-event",
        Fault {
            name: "lost-event",
            program: "rc_traffic",
            options: "--messages 2000 --events --qps 1 --window 8",
            noticed: Noticed::Hangs,
        },
    ),
    (
        "fault-ud-srq-lost-send",
        ud("lost-send-completion", &["lost, doubled"]),
    ),
    (
        "fault-ud-srq-doubled-receive",
        ud("doubled-receive-completion", &["doubled"]),
    ),
    (
        "fault-ud-srq-wrong-byte",
        ud("wrong-byte", &["is 0x", "header", "number"]),
    ),
    (
        "fault-ud-srq-doubled-message",
        ud("doubled-message", &["doubled"]),
    ),
    (
        "fault-ud-srq-changed-handle",
        ud("changed-handle", &["qp_num", "not ours"]),
    ),
    (
        "fault-matrix-lost-send-cqs",
        matrix("lost-send-completion", SHARED_CQS, &["lost"]),
    ),
    (
        "fault-matrix-lost-send-qps",
        matrix("lost-send-completion", SHARED_QPS, &["lost"]),
    ),
    (
        "fault-matrix-doubled-send-cqs",
        matrix("doubled-send-completion", SHARED_CQS, &["doubled"]),
    ),
    (
        "fault-matrix-lost-receive-own",
        matrix("lost-receive-completion", OWN, &["lost"]),
    ),
    (
        "fault-matrix-lost-receive-cqs",
        matrix("lost-receive-completion", SHARED_CQS, &["lost"]),
    ),
    (
        "fault-matrix-doubled-receive-qps",
        matrix("doubled-receive-completion", SHARED_QPS, &["doubled"]),
    ),
    (
        "fault-matrix-swapped-qps",
        matrix("swapped-completions", SHARED_QPS, &["out of order"]),
    ),
    (
        "fault-matrix-lost-message-qps",
        matrix("lost-message", SHARED_QPS, &["lost"]),
    ),
    (
        "fault-matrix-doubled-message-qps",
        matrix("doubled-message", SHARED_QPS, &["doubled"]),
    ),
    (
        "fault-matrix-doubled-message-uc",
        matrix("doubled-message", UC, &["doubled"]),
    ),
    (
        "fault-matrix-doubled-message-ud",
        matrix("doubled-message", UD, &["doubled"]),
    ),
    (
        "fault-matrix-wrong-byte",
        matrix("wrong-byte", OWN, &["is 0x", "names lane", "doubled"]),
    ),
    (
        "fault-matrix-wrong-byte-written-uc",
        matrix("wrong-byte-written", UC, &["WRITE"]),
    ),
    (
        "fault-matrix-wrong-immediate",
        matrix(
            "wrong-immediate",
            OWN,
            &["immediate data", "out of order", "opcode", "flags"],
        ),
    ),
    (
        "fault-matrix-doubled-atomic",
        matrix("doubled-atomic", OWN, &["fetch_add", "counter"]),
    ),
    (
        "fault-matrix-doubled-swap",
        matrix("doubled-swap", OWN, &["chain of tickets"]),
    ),
    (
        "fault-matrix-wrong-swap",
        matrix("wrong-swap", OWN, &["chain of tickets"]),
    ),
    (
        "fault-matrix-changed-handle",
        matrix(
            "changed-handle",
            SHARED_QPS,
            &["qp_num", "not ours", "names QP"],
        ),
    ),
    (
        "fault-matrix-lost-event",
        Fault {
            name: "lost-event",
            program: "matrix",
            options: "--messages 20000 --events --qps 1 --window 8",
            noticed: Noticed::Hangs,
        },
    ),
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    FAULTS
        .iter()
        .map(|(name, fault)| Case {
            name: (*name).to_owned(),
            needs: Needs::AnyMode,
            limit: LIMIT,
            action: Action::Fault(fault),
        })
        .collect()
}

/// Breaks a promise under a program.
///
/// # Errors
/// When the program does not notice.
pub fn run(fault: &Fault, job: &Job<'_>) -> Result<String> {
    let setup = Setup {
        mode: Mode::Bare,
        ..job.setup.clone()
    };
    let library = setup.own_program("libfaults.so")?;
    let mut command = own_programs::command(&setup, fault.program)?;
    command.args(fault.options.split_whitespace());
    command.env("LD_PRELOAD", library).env("FAULT", fault.name);
    let mut program = Running::start(command, &job.folder, fault.program)?;
    program.wait_for_line(job.deadline, "ready")?;
    let noticed = check(fault, &mut program, job);
    // The other process of the program is still there, and that is no fault of this case.
    drop(program);
    tree::end_all();
    noticed
}

fn check(fault: &Fault, program: &mut Running, job: &Job<'_>) -> Result<String> {
    match fault.noticed {
        Noticed::Hangs => {
            ensure!(
                program.wait(job.deadline.at_most(HANG)).is_err(),
                "it did not wait"
            );
            own_programs::ask_for_report(program, &job.folder);
            let report = program.errors()?;
            ensure!(
                report.contains("owed 1") || report.contains("owed 0 1"),
                "it waits for something else: {report}"
            );
            Ok("waits, as it must".to_owned())
        }
        Noticed::Says(texts) => {
            let status = program.wait(job.deadline)?;
            let errors = program.errors()?;
            let Some(line) = errors.lines().find(|line| line.starts_with("ERROR")) else {
                bail!("it noticed nothing ({status})");
            };
            ensure!(
                !status.success(),
                "it says \"{line}\" and ends with status 0"
            );
            ensure!(
                texts.iter().any(|text| errors.contains(text)),
                "it notices another: {line}"
            );
            Ok(line.to_owned())
        }
    }
}
