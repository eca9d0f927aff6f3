//! Stock clients of the layers above verbs: librdmacm's programs, qperf, libfabric, UCX.
//!
//! Each case is a server and a client on one device. Both are looked at while they have the device open; and the device must
//! have sent at least as many packets as messages were asked for.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::{self, packets_sent};
use crate::process::Running;
use crate::setup::Setup;
use crate::{evidence, tree};

/// The time limit of each of these cases; the slowest takes a tenth of it under emulation.
const LIMIT: Duration = Duration::from_secs(90);

/// Between two looks at processes that open the device.
const PAUSE: Duration = Duration::from_millis(5);

/// A server, its client, and how both say that all went well.
///
/// In the command lines `ADDRESS` is the device's own, `PORT` a free port, `DEVICE` the name, and `COUNT` the number of messages.
#[derive(Debug)]
pub struct Client {
    name: &'static str,
    server: &'static str,
    client: &'static str,
    variables: &'static [(&'static str, &'static str)],
    listens: Listens,
    count: u32,
    said: Said,
}

/// How it is known that a server can be reached.
#[derive(Clone, Copy, Debug)]
enum Listens {
    /// On a TCP port.
    Tcp,
    /// By an `rdma_cm` id.
    Connections,
    /// In a multicast group.
    Group,
}

/// What the output of a successful run has.
#[derive(Clone, Copy, Debug)]
enum Said {
    /// `rping -v`: a line for each message, and -V compares them.
    Pings,
    /// The last line of both.
    Last(&'static str),
    /// A line `NAME = NUMBER UNIT` with a number above zero; the server waits for another client.
    Measure(&'static str),
    /// fi_pingpong's table: sent, and acknowledged as `=sent`.
    Row,
    /// The table of ucx_perftest.
    Final,
}

/// The Ethernet address of the group 239.1.1.1, as Soft-RoCE makes it.
const GROUP_ON_INTERFACE: &str = "3333ef010101";

const CLIENT: Client = Client {
    name: "",
    server: "",
    client: "",
    variables: &[],
    listens: Listens::Connections,
    count: 100,
    said: Said::Last("return status 0"),
};

const fn rping(name: &'static str, server: &'static str, client: &'static str) -> Client {
    Client {
        name,
        server,
        client,
        said: Said::Pings,
        ..CLIENT
    }
}

const fn qperf(name: &'static str, client: &'static str, measure: &'static str) -> Client {
    Client {
        name,
        server: "qperf -lp PORT",
        client,
        listens: Listens::Tcp,
        // It is told a time, a second.
        count: 20,
        said: Said::Measure(measure),
        ..CLIENT
    }
}

const fn libfabric(name: &'static str, server: &'static str, client: &'static str) -> Client {
    Client {
        name,
        server,
        client,
        listens: Listens::Tcp,
        count: 20,
        said: Said::Row,
        ..CLIENT
    }
}

const fn ucx(
    name: &'static str,
    variables: &'static [(&'static str, &'static str)],
    client: &'static str,
) -> Client {
    Client {
        name,
        server: "ucx_perftest -p PORT",
        client,
        variables,
        listens: Listens::Tcp,
        count: 200,
        said: Said::Final,
    }
}

/// UCX 1.13 takes the kind of a datagram's header from the service level, where mlx5 has it. Soft-RoCE has 0 there, and so UCX
/// looks for an IPv6 address in an IPv4 header, and drops the datagram.
pub const IPV4: &[(&str, &str)] = &[
    ("UCX_IB_GID_INDEX", "1"),
    ("UCX_UD_VERBS_ETH_DGID_CHECK", "n"),
    ("UCX_TLS", "rc,self"),
];

/// The GID that is an IPv6 address, with which UCX can check where a datagram was sent to.
pub const IPV6: &[(&str, &str)] = &[("UCX_IB_GID_INDEX", "0")];

const CLIENTS: &[Client] = &[
    rping(
        "cm-rping",
        "rping -s -a ADDRESS -p PORT -C COUNT -v -V",
        "rping -c -a ADDRESS -p PORT -C COUNT -v -V",
    ),
    rping(
        "cm-rping-own-qp",
        "rping -s -a ADDRESS -p PORT -C COUNT -v -V -q",
        "rping -c -a ADDRESS -p PORT -C COUNT -v -V -q",
    ),
    Client {
        name: "cm-ucmatose",
        server: "ucmatose -b ADDRESS -c 2 -C COUNT",
        client: "ucmatose -s ADDRESS -c 2 -C COUNT",
        ..CLIENT
    },
    Client {
        name: "cm-ucmatose-other-channel",
        server: "ucmatose -b ADDRESS -C COUNT -m",
        client: "ucmatose -s ADDRESS -C COUNT -m",
        ..CLIENT
    },
    Client {
        name: "cm-udaddy",
        server: "udaddy -b ADDRESS -C COUNT",
        client: "udaddy -s ADDRESS -C COUNT",
        ..CLIENT
    },
    Client {
        name: "cm-rdma-client",
        server: "rdma_server -s ADDRESS -p PORT",
        client: "rdma_client -s ADDRESS -p PORT",
        count: 2,
        said: Said::Last("end 0"),
        ..CLIENT
    },
    Client {
        name: "cm-rdma-xclient",
        server: "rdma_xserver -p PORT",
        client: "rdma_xclient -s ADDRESS -p PORT",
        count: 1,
        said: Said::Last("end 0"),
        ..CLIENT
    },
    Client {
        name: "cm-mckey",
        server: "mckey -b ADDRESS -m 239.1.1.1 -C COUNT",
        client: "mckey -b ADDRESS -m 239.1.1.1 -C COUNT -s",
        listens: Listens::Group,
        count: 10,
        ..CLIENT
    },
    qperf(
        "qperf-rc-lat",
        "qperf -lp PORT -cm1 -t 1 ADDRESS rc_lat",
        "latency",
    ),
    qperf(
        "qperf-rc-bw",
        "qperf -lp PORT -cm1 -t 1 -m 4096 ADDRESS rc_bw",
        "bw",
    ),
    qperf(
        "qperf-rc-rdma-write-lat",
        "qperf -lp PORT -cm1 -t 1 ADDRESS rc_rdma_write_lat",
        "latency",
    ),
    qperf(
        "qperf-rc-fetch-add",
        "qperf -lp PORT -cm1 -t 1 ADDRESS ver_rc_fetch_add",
        "msg_rate",
    ),
    libfabric(
        "libfabric-msg",
        "fi_pingpong -p verbs -e msg -c -I COUNT -S 1024 -B PORT",
        "fi_pingpong -p verbs -e msg -c -I COUNT -S 1024 -P PORT ADDRESS",
    ),
    libfabric(
        "libfabric-dgram",
        "fi_pingpong -p verbs -e dgram -c -I COUNT -S 1024 -B PORT",
        "fi_pingpong -p verbs -e dgram -c -I COUNT -S 1024 -P PORT ADDRESS",
    ),
    ucx(
        "ucx-rc-tag",
        IPV4,
        "ucx_perftest -p PORT -n COUNT -w 20 -t tag_lat ADDRESS",
    ),
    ucx(
        "ucx-rc-put",
        IPV4,
        "ucx_perftest -p PORT -n COUNT -w 20 -d DEVICE:1 -x rc_verbs -t put_bw -s 1024 -D zcopy ADDRESS",
    ),
    ucx(
        "ucx-ud-am",
        IPV4,
        "ucx_perftest -p PORT -n COUNT -w 20 -d DEVICE:1 -x ud_verbs -t am_lat ADDRESS",
    ),
    ucx(
        "ucx-ud-am-checked",
        IPV6,
        "ucx_perftest -p PORT -n COUNT -w 20 -d DEVICE:1 -x ud_verbs -t am_lat ADDRESS",
    ),
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    CLIENTS
        .iter()
        .map(|client| Case {
            name: client.name.to_owned(),
            needs: Needs::AnyMode,
            limit: LIMIT,
            action: Action::Client(client),
        })
        .collect()
}

/// Runs a server and its client, and checks what both say.
///
/// # Errors
/// When one of them fails, says anything else, or did not drive the device in the wanted way.
pub fn run(client: &Client, job: &Job<'_>) -> Result<()> {
    let setup = job.setup;
    let sent = packets_sent(&setup.device)?;
    let mut server = Running::start(client.command(client.server, job)?, &job.folder, "server")?;
    match client.listens {
        Listens::Tcp => server.wait_until(job.deadline, "it listened", |_| {
            Ok(evidence::is_listening(job.port)?.then_some(()))
        })?,
        Listens::Connections => server.wait_until(job.deadline, "it listened", |_| {
            let states = hardware::connection_states(&setup.device)?;
            Ok(states.iter().any(|state| state == "LISTEN").then_some(()))
        })?,
        // Soft-RoCE takes the group's address at the network interface when a queue pair is attached.
        Listens::Group => server.wait_until(job.deadline, "it was attached", |_| {
            let taken = fs::read_to_string("/proc/net/dev_mcast")?.contains(GROUP_ON_INTERFACE);
            Ok(taken.then_some(()))
        })?,
    }
    let mut other = Running::start(client.command(client.client, job)?, &job.folder, "client")?;
    check_use(&mut [&mut server, &mut other], job)?;

    other.wait_for_success(job.deadline).context("client")?;
    match client.said {
        Said::Measure(_) => end(&mut server, job)?,
        _ => server.wait_for_success(job.deadline).context("server")?,
    }
    let now = packets_sent(&setup.device)?;
    ensure!(
        now - sent >= u64::from(client.count),
        "the device sent {} packets for {} messages",
        now - sent,
        client.count
    );
    check(client, &other.output()?).context("client")?;
    match client.said {
        Said::Pings | Said::Last(_) => check(client, &server.output()?).context("server"),
        _ => Ok(()),
    }
}

/// Waits until each of the programs, or a process below it, has the device open, and checks how. None can be stopped meanwhile: some
/// open it only when the other side has told them something.
fn check_use(programs: &mut [&mut Running], job: &Job<'_>) -> Result<()> {
    let mut left: Vec<_> = programs.iter_mut().collect();
    while !left.is_empty() {
        let mut unseen = Vec::new();
        for program in left {
            let ended = program.ended()?;
            let opened = with_descendants(program.pid())
                .into_iter()
                .find(|pid| evidence::has_device_open(*pid));
            // The file is open a little before the provider gets to drive it.
            let found = opened.map(|pid| evidence::check_mode(pid, &job.setup.mode));
            match (found, ended) {
                (Some(Ok(())), _) => continue,
                (Some(found), _) if job.deadline.passed() => return found,
                (_, Some(status)) => bail!(
                    "process {} ended ({status}) before it was seen to use the device",
                    program.pid()
                ),
                _ => unseen.push(program),
            }
        }
        left = unseen;
        ensure!(
            left.is_empty() || !job.deadline.passed(),
            "not all have opened the device"
        );
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Ends a server that waits for more clients, and waits for what it has started for one.
fn end(server: &mut Running, job: &Job<'_>) -> Result<()> {
    let below = tree::descendants(server.pid());
    server.signal(Signal::TERM)?;
    server.wait(job.deadline)?;
    tree::wait_until_gone(&below, job.deadline)
}

fn with_descendants(pid: u32) -> Vec<u32> {
    std::iter::once(pid).chain(tree::descendants(pid)).collect()
}

impl Client {
    fn command(&self, line: &str, job: &Job<'_>) -> Result<Command> {
        let address = address(job.setup)?.to_string();
        let line = line
            .replace("ADDRESS", &address)
            .replace("PORT", &job.port.to_string())
            .replace("DEVICE", &job.setup.device)
            .replace("COUNT", &self.count.to_string());
        let mut words = line.split_whitespace();
        let mut command = job.setup.command(words.next().context("no program")?);
        command
            .args(words)
            .env("UCX_NET_DEVICES", format!("{}:1", job.setup.device))
            .envs(self.variables.iter().copied());
        Ok(command)
    }
}

/// The IPv4 address that the device's GID stands for.
///
/// # Errors
/// When it stands for none.
pub fn address(setup: &Setup) -> Result<Ipv4Addr> {
    let path = format!(
        "/sys/class/infiniband/{}/ports/1/gids/{}",
        setup.device, setup.gid_index
    );
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let gid: Ipv6Addr = text.trim().parse().with_context(|| path.clone())?;
    gid.to_ipv4_mapped()
        .with_context(|| format!("{path} is not an IPv4 address: {gid}"))
}

/// Whether the output of a program says that all messages went well.
fn check(client: &Client, output: &str) -> Result<()> {
    let count = client.count;
    match client.said {
        Said::Pings => {
            let last = format!("ping data: rdma-ping-{}: ", count - 1);
            let done = output
                .lines()
                .filter(|line| line.contains("ping data: "))
                .count();
            ensure!(
                done == count as usize && output.contains(&last),
                "{done} messages instead of {count}"
            );
        }
        Said::Last(wanted) => {
            let last = output.lines().last().unwrap_or_default();
            ensure!(
                last.ends_with(wanted),
                "the last line is {last:?} instead of {wanted:?}"
            );
        }
        Said::Measure(name) => {
            let value = output.lines().find_map(|line| {
                let (left, right) = line.split_once('=')?;
                (left.trim() == name).then_some(right.trim())
            });
            let value = value.with_context(|| format!("no {name}"))?;
            let number = value.split_whitespace().next().unwrap_or_default();
            let number: f64 = number.parse().with_context(|| format!("{name}: {value}"))?;
            ensure!(number > 0.0, "{name} is {value}");
        }
        Said::Row => {
            let row = words_below(output, "bytes").context("no result")?;
            let sent = format!("{count}");
            ensure!(
                row.get(1) == Some(&sent.as_str())
                    && row.get(2) == Some(&format!("={sent}").as_str()),
                "{row:?} instead of {count} messages each way"
            );
        }
        Said::Final => check_perftest(output, &count.to_string())?,
    }
    Ok(())
}

/// The last row of the table that `ucx_perftest` prints has the number of messages.
///
/// # Errors
/// When it does not.
pub fn check_perftest(output: &str, count: &str) -> Result<()> {
    let row = output.lines().find_map(|line| line.strip_prefix("Final: "));
    let done = row
        .and_then(|row| row.split_whitespace().next())
        .context("no result")?;
    ensure!(done == count, "{done} messages instead of {count}");
    Ok(())
}

/// The words of the line below the one that starts with `heading`.
fn words_below<'a>(output: &'a str, heading: &str) -> Option<Vec<&'a str>> {
    let mut lines = output
        .lines()
        .skip_while(|line| !line.starts_with(heading))
        .skip(1);
    Some(lines.next()?.split_whitespace().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(said: Said, output: &str) -> bool {
        let client = Client {
            count: 2,
            said,
            ..CLIENT
        };
        check(&client, output).is_ok()
    }

    #[test]
    fn a_run_that_did_less_is_found() {
        let pings = "ping data: rdma-ping-0: A\nping data: rdma-ping-1: B\n";
        assert!(says(Said::Pings, pings));
        assert!(!says(Said::Pings, "ping data: rdma-ping-0: A\n"));
        let last = Said::Last("return status 0");
        assert!(says(last, "test complete\nreturn status 0\n"));
        assert!(!says(last, "test complete\nreturn status -1\n"));
        assert!(!says(last, ""));
        let measure = Said::Measure("bw");
        assert!(says(measure, "rc_bw:\n    bw  =  19.6 MB/sec\n"));
        assert!(!says(measure, "rc_bw:\n    bw  =  0 bytes/sec\n"));
        assert!(!says(measure, "rc_bw:\n"));
        let head = "bytes   #sent   #ack     total\n";
        assert!(says(Said::Row, &format!("{head}1k  2  =2  40k\n")));
        assert!(!says(Said::Row, &format!("{head}1k  2  =1  40k\n")));
        assert!(!says(Said::Row, head));
        assert!(says(
            Said::Final,
            "[thread 0]  1  5.0\nFinal:   2   69.000  1551.185\n"
        ));
        assert!(!says(
            Said::Final,
            "[thread 0]  2  5.0\nFinal:   1   69.000  1551.185\n"
        ));
        assert!(!says(Said::Final, "+---+\n"));
    }
}
