//! Stock clients: the ping-pong examples of rdma-core, and perftest.
//!
//! Each case is a server and a client on one device. They exchange their connection data over TCP,
//! and that is used to look at both while they are certain to have the device open: the server when
//! it listens, the client while the server is stopped and cannot answer.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::evidence;
use crate::process::Running;

/// The time limit of each of these cases; the slowest takes a tenth of it under emulation.
const LIMIT: Duration = Duration::from_secs(90);

/// A server and a client that are started with the same options.
#[derive(Debug)]
pub struct Pair {
    name: &'static str,
    suite: Suite,
    program: &'static str,
    options: &'static str,
    /// Number of exchanges.
    iterations: u32,
}

/// How options are spelled and results are read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Suite {
    /// `ibv_*_pingpong`; they check the bytes received with -c.
    PingPong,
    /// `ib_*_{lat,bw}` with `--use_old_post_send`: `ibv_post_send`.
    PerfTest,
    /// The same as perftest 4.5 posts unless told otherwise: through `ibv_wr_*`.
    PerfTestBuilders,
}

const fn pingpong(name: &'static str, program: &'static str, options: &'static str) -> Pair {
    Pair {
        name,
        suite: Suite::PingPong,
        program,
        options,
        iterations: 100,
    }
}

const fn perftest(name: &'static str, program: &'static str, options: &'static str) -> Pair {
    Pair {
        name,
        suite: Suite::PerfTest,
        program,
        options,
        iterations: 50,
    }
}

const fn builders(name: &'static str, program: &'static str, options: &'static str) -> Pair {
    Pair {
        suite: Suite::PerfTestBuilders,
        ..perftest(name, program, options)
    }
}

const PAIRS: &[Pair] = &[
    pingpong("pingpong-rc", "ibv_rc_pingpong", ""),
    pingpong("pingpong-rc-events", "ibv_rc_pingpong", "-e"),
    pingpong("pingpong-uc", "ibv_uc_pingpong", ""),
    pingpong("pingpong-uc-events", "ibv_uc_pingpong", "-e"),
    pingpong("pingpong-ud", "ibv_ud_pingpong", "-s 1024"),
    pingpong("pingpong-ud-events", "ibv_ud_pingpong", "-s 1024 -e"),
    pingpong("pingpong-srq", "ibv_srq_pingpong", "-q 4"),
    pingpong("pingpong-srq-events", "ibv_srq_pingpong", "-q 4 -e"),
    perftest("send-lat-rc", "ib_send_lat", "-c RC -s 64"),
    perftest("send-lat-uc", "ib_send_lat", "-c UC -s 64"),
    perftest("send-lat-ud", "ib_send_lat", "-c UD -s 64"),
    perftest("send-bw-rc", "ib_send_bw", "-c RC -s 4096"),
    perftest("send-bw-uc", "ib_send_bw", "-c UC -s 4096"),
    perftest("send-bw-ud", "ib_send_bw", "-c UD -s 1024"),
    perftest("write-lat-rc", "ib_write_lat", "-c RC -s 64"),
    perftest("write-lat-uc", "ib_write_lat", "-c UC -s 64"),
    perftest("write-bw-rc", "ib_write_bw", "-c RC -s 4096"),
    perftest("write-bw-uc", "ib_write_bw", "-c UC -s 4096"),
    perftest("read-lat", "ib_read_lat", "-s 64"),
    perftest("read-bw", "ib_read_bw", "-s 4096"),
    perftest("atomic-lat-fetch-add", "ib_atomic_lat", "-A FETCH_AND_ADD"),
    perftest("atomic-bw-compare-swap", "ib_atomic_bw", "-A CMP_AND_SWAP"),
    perftest("write-bw-many-qps", "ib_write_bw", "-q 16 -s 1024"),
    perftest("send-bw-many-qps", "ib_send_bw", "-q 8 -s 1024"),
    perftest("send-lat-inline", "ib_send_lat", "-I 64 -s 64"),
    perftest("write-lat-inline", "ib_write_lat", "-I 64 -s 64"),
    perftest("send-bw-events", "ib_send_bw", "-e -s 1024"),
    perftest("send-lat-events", "ib_send_lat", "-e -s 64"),
    perftest("read-lat-events", "ib_read_lat", "-e -s 64"),
    perftest("send-bw-srq", "ib_send_bw", "--use-srq -q 4 -s 1024"),
    perftest("send-lat-srq-ud", "ib_send_lat", "--use-srq -c UD -s 64"),
    perftest("send-bw-bidirectional", "ib_send_bw", "-b -s 1024"),
    perftest("write-bw-bidirectional", "ib_write_bw", "-b -q 4 -s 1024"),
    perftest("read-bw-bidirectional", "ib_read_bw", "-b -s 1024"),
    builders("send-lat-rc-builders", "ib_send_lat", "-c RC -s 64"),
    builders("send-lat-uc-builders", "ib_send_lat", "-c UC -s 64"),
    builders("send-lat-ud-builders", "ib_send_lat", "-c UD -s 64"),
    builders("send-bw-rc-builders", "ib_send_bw", "-c RC -s 4096"),
    builders("write-lat-rc-builders", "ib_write_lat", "-c RC -s 64"),
    builders("write-bw-many-qps-builders", "ib_write_bw", "-q 16 -s 1024"),
    builders("read-lat-builders", "ib_read_lat", "-s 64"),
    builders(
        "atomic-lat-fetch-add-builders",
        "ib_atomic_lat",
        "-A FETCH_AND_ADD",
    ),
    builders(
        "atomic-bw-compare-swap-builders",
        "ib_atomic_bw",
        "-A CMP_AND_SWAP",
    ),
    builders("send-lat-inline-builders", "ib_send_lat", "-I 64 -s 64"),
    builders("send-lat-events-builders", "ib_send_lat", "-e -s 64"),
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    PAIRS
        .iter()
        .map(|pair| Case {
            name: pair.name.to_owned(),
            needs: Needs::AnyMode,
            limit: LIMIT,
            action: Action::Pair(pair),
        })
        .collect()
}

/// Runs a pair and checks what both report.
///
/// # Errors
/// When one of them fails, reports nothing, or did not drive the device in the wanted way.
pub fn run(pair: &Pair, job: &Job<'_>) -> Result<()> {
    let mode = &job.setup.mode;
    let mut server = Running::start(command(pair, job), &job.folder, "server")?;
    server.wait_until(job.deadline, "it listened", |pid| {
        Ok((evidence::has_device_open(pid) && evidence::is_listening(job.port)?).then_some(()))
    })?;
    evidence::check_mode(server.pid(), mode).context("server")?;

    // A stopped server does not answer, so the client cannot get past its connection.
    server.signal(Signal::STOP)?;
    let mut client = command(pair, job);
    client.arg("127.0.0.1");
    let mut client = Running::start(client, &job.folder, "client")?;
    evidence::wait_for_mode(&mut client, mode, job.deadline).context("client")?;
    server.signal(Signal::CONT)?;

    client.wait_for_success(job.deadline)?;
    server.wait_for_success(job.deadline)?;
    match pair.suite {
        Suite::PingPong => {
            check_pingpong(&client.output()?, pair).context("client")?;
            check_pingpong(&server.output()?, pair).context("server")
        }
        Suite::PerfTest | Suite::PerfTestBuilders => {
            check_perftest(&client.output()?, pair).context("client")
        }
    }
}

fn command(pair: &Pair, job: &Job<'_>) -> Command {
    let setup = job.setup;
    let mut command = setup.command(pair.program);
    command.args(["-d", &setup.device, "-p", &job.port.to_string()]);
    command.args(["-n", &pair.iterations.to_string()]);
    let index = setup.gid_index.to_string();
    match pair.suite {
        Suite::PingPong => command.args(["-c", "-g", &index]),
        Suite::PerfTest => command.args(["-F", "--use_old_post_send", "-x", &index]),
        Suite::PerfTestBuilders => command.args(["-F", "-x", &index]),
    };
    command.args(pair.options.split_whitespace());
    command
}

/// `409600 bytes in 0.10 seconds = ...`, `100 iters in 0.10 seconds = ...`
fn check_pingpong(output: &str, pair: &Pair) -> Result<()> {
    ensure!(!output.contains("invalid data"), "wrong bytes received");
    let wanted = " iters in ";
    let Some(line) = output.lines().find(|line| line.contains(wanted)) else {
        bail!("no result");
    };
    let done: u32 = line
        .split(wanted)
        .next()
        .unwrap_or_default()
        .trim()
        .parse()?;
    ensure!(
        done >= pair.iterations,
        "{done} exchanges instead of {}",
        pair.iterations
    );
    Ok(())
}

/// A line of headings that starts with `#bytes #iterations`, and the numbers below it.
fn check_perftest(output: &str, pair: &Pair) -> Result<()> {
    let mut lines = output
        .lines()
        .skip_while(|line| !line.trim_start().starts_with("#bytes"));
    lines.next().context("no result")?;
    let row = lines.next().context("no result below the headings")?;
    let done = row
        .split_whitespace()
        .nth(1)
        .context("no number of iterations")?;
    let done: u32 = done.parse().with_context(|| format!("result is {row:?}"))?;
    ensure!(
        done >= pair.iterations,
        "{done} exchanges instead of {}",
        pair.iterations
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: Pair = pingpong("p", "ibv_rc_pingpong", "");

    #[test]
    fn pingpong_with_wrong_bytes_fails() {
        let good = "  local address\n819200 bytes in 0.1 seconds = 1 Mbit/sec\n\
                    100 iters in 0.10 seconds = 1 usec/iter\n";
        check_pingpong(good, &PAIR).unwrap();
        check_pingpong(&format!("invalid data in page 0\n{good}"), &PAIR).unwrap_err();
        check_pingpong("  local address\n", &PAIR).unwrap_err();
    }

    #[test]
    fn perftest_without_numbers_fails() {
        let head = " #bytes     #iterations    BW peak[MB/sec]\n";
        check_perftest(&format!("{head} 64      100     0.5\n"), &PAIR).unwrap();
        check_perftest(&format!("{head} 64      99     0.5\n"), &PAIR).unwrap_err();
        check_perftest(head, &PAIR).unwrap_err();
        check_perftest("", &PAIR).unwrap_err();
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = crate::case::all()
            .into_iter()
            .map(|case| case.name)
            .collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
