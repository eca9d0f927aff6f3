//! Whoever else talks to an agent: nonsense, silence, many at once, another version. The job does not notice, and the agent
//! answers the others.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reverbs::control::message::{PROTOCOL_VERSION, Phase, Reply, Request};
use reverbs::control::socket;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::Numbers;
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process;
use crate::stand_in::connect;
use crate::tree;

/// The time limit of the case.
const LIMIT: Duration = Duration::from_secs(600);

/// While a stranger holds its end, others are answered in this time: well before the stranger is given up.
const PROMPT: Duration = Duration::from_secs(5);

/// An agent gives a stranger up after 10 s.
const GIVEN_UP: Duration = Duration::from_secs(20);

/// How many connect at once, and how many connections an agent keeps.
const CROWD: usize = 100;
const KEPT: usize = 32;

/// The case of this module.
pub fn cases() -> Vec<Case> {
    vec![Case {
        name: "strangers".to_owned(),
        needs: Needs::Provider,
        limit: LIMIT,
        action: Action::Strangers,
    }]
}

/// Bothers the agents of a running job. The remark is what the job checked.
///
/// # Errors
/// When one is not dropped or not refused, keeps the agent from its work, or the job loses anything.
pub fn run(job: &Job<'_>) -> Result<String> {
    let mut started = Started::start(job, Kind::TRAFFIC)?;
    started.wait_for_traffic()?;
    let before = Numbers::on(&job.setup.device)?;
    let child = *tree::descendants(started.root)
        .first()
        .context("no child")?;
    for pid in [started.root, child] {
        nonsense_is_dropped(pid)?;
        other_command_is_refused(pid)?;
    }
    other_agent_is_refused(child, &started, job)?;
    ensure!(
        Numbers::on(&job.setup.device)? == before,
        "the job was touched"
    );
    started.wait_for_traffic()?;

    // Half a message, for as long as it lasts.
    let mut half = connect(child)?.context("no agent")?;
    half.write_all(&[200, 0, 0, 0, b'{'])?;
    answers_promptly(child)?;
    started.cycle()?;
    is_given_up(half).context("half a message")?;

    let descriptors = descriptors_of(child)?;
    let crowd = (0..CROWD)
        .map(|_| connect(child)?.context("no agent"))
        .collect::<Result<Vec<_>>>()?;
    answers_promptly(child)?;
    let kept = descriptors_of(child)?.saturating_sub(descriptors);
    ensure!(kept <= KEPT, "the agent keeps {kept} connections");
    started.cycle()?;
    for silent in crowd {
        is_given_up(silent).context("silence")?;
    }
    answers_promptly(child)?;
    // That of the question before may still be open.
    let left = descriptors_of(child)?;
    ensure!(
        left <= descriptors + 1,
        "{descriptors} descriptors became {left}"
    );

    // A process with a connection to somebody outside cannot be dumped.
    let _silent = connect(child)?.context("no agent")?;
    started.checkpoint(&[])?;
    started.wait_for_traffic()?;
    started.finish()
}

fn nonsense_is_dropped(pid: u32) -> Result<()> {
    let framed = |text: &str| [&u32::to_le_bytes(text.len() as u32), text.as_bytes()].concat();
    for nonsense in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 4],
        vec![0xff; 64],
        framed("release"),
        framed("{\"request\":\"explode\"}"),
        framed("{\"request\":\"close\"}"),
        framed("{\"request\":\"close\",\"limit_ms\":-1}"),
    ] {
        let mut stream = connect(pid)?.context("no agent")?;
        stream.write_all(&nonsense)?;
        let what = String::from_utf8_lossy(&nonsense).into_owned();
        is_given_up(stream).with_context(|| format!("after {what:?}"))?;
    }
    answers_promptly(pid)
}

fn other_command_is_refused(pid: u32) -> Result<()> {
    let mut stream = connect(pid)?.context("no agent")?;
    let hello = Request::Hello {
        version: PROTOCOL_VERSION + 1,
    };
    socket::send(&mut stream, &hello)?;
    match socket::receive(&mut stream)? {
        Some(Reply::Refused { phase, reason }) => {
            ensure!(phase == Phase::Running, "it is in {phase:?}");
            ensure!(
                reason.contains("use the command that belongs to the provider"),
                "it says: {reason}"
            );
            Ok(())
        }
        other => anyhow::bail!("another version is answered with {other:?}"),
    }
}

/// The commands meet an agent that speaks another version.
fn other_agent_is_refused(pid: u32, started: &Started<'_>, job: &Job<'_>) -> Result<()> {
    let path = socket::agent_socket(&socket::runtime_dir()?, pid.cast_signed());
    let aside = path.with_extension("aside");
    fs::rename(&path, &aside)?;
    let listener = UnixListener::bind(&path)?;
    let commands = ["cycle", "resume"];
    let answering = std::thread::spawn(move || -> Result<()> {
        for _ in commands {
            let (mut stream, _) = listener.accept()?;
            let _: Option<Request> = socket::receive(&mut stream)?;
            let hello = Reply::Hello {
                version: PROTOCOL_VERSION + 1,
                pid: pid.cast_signed(),
                phase: Phase::Running,
                session: None,
            };
            socket::send(&mut stream, &hello)?;
        }
        Ok(())
    });
    for name in commands {
        let mut command = job.setup.reverbs()?;
        command.arg(name).arg(started.root.to_string());
        let deadline = job.deadline.at_most(COMMAND_LIMIT);
        let said = process::fail(command, &job.folder, "other-version", deadline)?;
        ensure!(
            said.contains(&format!("process {pid}: "))
                && said.contains("use the command that came with the job's reverbs"),
            "{name} meets another version and says: {said}"
        );
    }
    answering
        .join()
        .map_err(|_| anyhow::anyhow!("the agent of another version panicked"))??;
    Ok(fs::rename(&aside, &path)?)
}

fn answers_promptly(pid: u32) -> Result<()> {
    let began = Instant::now();
    let mut stream = connect(pid)?.context("no agent")?;
    let hello = Request::Hello {
        version: PROTOCOL_VERSION,
    };
    socket::send(&mut stream, &hello)?;
    let answer: Option<Reply> = socket::receive(&mut stream)?;
    ensure!(
        matches!(answer, Some(Reply::Hello { .. })),
        "Hello is answered with {answer:?}"
    );
    let took = began.elapsed();
    ensure!(took < PROMPT, "it took {took:?}");
    Ok(())
}

/// Waits until the other end is closed.
fn is_given_up(mut stream: UnixStream) -> Result<()> {
    stream.set_read_timeout(Some(GIVEN_UP))?;
    // What was not read when it was closed shows as a reset.
    match stream.read(&mut [0; 64]) {
        Ok(0) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
        other => anyhow::bail!("the agent does not close the connection: {other:?}"),
    }
}

fn descriptors_of(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}
