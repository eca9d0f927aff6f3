//! `cargo xtask nodes`: an MPI job over two machines is saved in mid-run, and finished on two other
//! pairs of machines: one with the same addresses, one with other names and addresses.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::demo::{bytes_below, empty, finished, phases, share_path};
use crate::handles::Handles;
use crate::network::{self, Node};
use crate::vm::Machine;
use crate::{command, paths, setup, stage};

const FIRST: &str = concat!(
    include_str!("guest/nodes-common.sh"),
    include_str!("guest/nodes-first.sh")
);
const SECOND: &str = concat!(
    include_str!("guest/nodes-common.sh"),
    include_str!("guest/nodes-second.sh")
);

/// The longest that one of the pairs may take.
const LIMIT: Duration = Duration::from_secs(600);

/// Two machines of the same kind.
struct Pair {
    /// Names the folder of what is seen on them.
    name: &'static str,
    hosts: [&'static str; 2],
    devices: [&'static str; 2],
    /// The fifth byte of the network cards' addresses.
    series: u8,
    /// Options of `reverbs restart`.
    renamed: &'static str,
}

const FIRST_PAIR: Pair = Pair {
    name: "first",
    hosts: ["n1", "n2"],
    devices: ["rxe0@10.99.0.1/24", "rxe0@10.99.0.2/24"],
    series: 0,
    renamed: "",
};

/// With other network cards, so that the GIDs made of their addresses are others.
const LATER_PAIRS: [Pair; 2] = [
    Pair {
        name: "same-addresses",
        hosts: ["n1", "n2"],
        devices: ["rdma9@10.99.0.1/24", "rdma9@10.99.0.2/24"],
        series: 1,
        renamed: "",
    },
    Pair {
        name: "other-addresses",
        hosts: ["m1", "m2"],
        devices: ["rdma9@10.98.0.1/24", "rdma9@10.98.0.2/24"],
        series: 2,
        renamed: "--node n1=m1 --node n2=m2",
    },
];

impl Pair {
    fn nodes(&self) -> Result<[Node; 2]> {
        let node = |index: usize| -> Result<Node> {
            Ok(Node {
                name: self.hosts[index].to_owned(),
                device: self.devices[index].parse()?,
                mac: format!("52:54:00:99:{:02x}:{:02x}", self.series, index + 1),
            })
        };
        Ok([node(0)?, node(1)?])
    }
}

/// What runs, and where.
struct Job {
    reverbs: PathBuf,
    check: PathBuf,
    share: PathBuf,
}

/// Runs all of it so many times, and prints what happened on stdout.
///
/// # Errors
/// When something cannot be built or started, the job does not finish or has wrong results, its
/// handles are not as they must be, or something of it is left on a machine.
pub fn run(times: u32) -> Result<()> {
    setup::ensure()?;
    let target = paths::target()?;
    let staged = target.join("stage");
    stage::stage(&staged)?;
    let programs = target.join("test-programs");
    stage::programs(&programs)?;
    let job = Job {
        reverbs: staged.join("bin/reverbs"),
        check: programs.join("mpi_check"),
        share: target.join("vm/nodes"),
    };
    for time in 1..=times {
        job.save_and_finish()
            .with_context(|| format!("time {time} of {times}; files: {}", job.share.display()))?;
    }
    Ok(())
}

impl Job {
    fn save_and_finish(&self) -> Result<()> {
        let begin = Instant::now();
        empty(&self.share)?;
        paths::make(self.share.join("images"))?;
        say("first pair: four ranks over n1 and n2, rxe0 of each on the network");
        self.boot(&FIRST_PAIR, FIRST)?;
        let image = fs::read_to_string(self.folder().join("image"))?;
        let image = share_path(&self.share, image.trim())?;
        let mut report = self.phases(&FIRST_PAIR, "checkpoint")?;
        report += &format!("image: {} bytes\n", bytes_below(&image)?);
        for pair in &LATER_PAIRS {
            say(&format!(
                "the job is saved, the machines are off. Others: {}",
                pair.name
            ));
            self.boot(pair, SECOND)?;
            let output = fs::read_to_string(self.folder().join("job.out"))?;
            let rounds = self.check_results(&output)?;
            report += &format!("\n{}: right after {rounds} rounds\n", pair.name);
            report += &self.phases(pair, "restart")?;
            for node in [1, 2] {
                let before = self.handles(&FIRST_PAIR, node)?;
                report += &format!(
                    "node {node}\n{}",
                    before.beside(&self.handles(pair, node)?)?
                );
            }
        }
        report += &format!("\nall of it: {:.0} s\n", begin.elapsed().as_secs_f64());
        std::io::stdout().write_all(report.as_bytes())?;
        Ok(())
    }

    /// What the machines see as the job's folder.
    fn folder(&self) -> PathBuf {
        self.share.join("job")
    }

    fn boot(&self, pair: &Pair, script: &str) -> Result<()> {
        paths::make(self.folder().join(pair.name))?;
        let machine = Machine::default()
            // Two machines share the host's processors.
            .cpus(1)
            .timeout(LIMIT)
            .folder(Path::new("/"))
            .environment("REVERBS", text(&self.reverbs)?)
            .environment("CHECK", text(&self.check)?)
            .environment("NODES", &pair.hosts.join(" "))
            .environment("WHERE", pair.name)
            .environment("RENAMED", pair.renamed);
        finished(&network::run(
            &machine,
            &self.share,
            &pair.nodes()?,
            script,
        )?)
        .with_context(|| format!("the pair {}", pair.name))
    }

    fn handles(&self, pair: &Pair, node: usize) -> Result<Handles> {
        let status = format!("{}/status-{node}.json", pair.name);
        Handles::read(&self.folder().join(status))
    }

    fn phases(&self, pair: &Pair, moment: &str) -> Result<String> {
        let log = self.folder().join(format!("{}/{moment}.log", pair.name));
        let lines = phases(&fs::read_to_string(log)?);
        Ok(lines
            .iter()
            .map(|(phase, seconds)| format!("{:<18} {seconds:>7.3}\n", format!("{moment} {phase}")))
            .collect())
    }

    /// The ranks must say what they say when they do as many rounds on this host, without RDMA and
    /// without an interruption. Gives the number of rounds.
    fn check_results(&self, output: &str) -> Result<u64> {
        let found = results(output);
        let rounds = found
            .first()
            .and_then(|line| line.rsplit_once(" rounds ")?.1.parse().ok())
            .with_context(|| format!("the job did not finish:\n{output}"))?;
        let expected = command::output(
            Command::new("mpirun")
                .args(["-np", "4", "--oversubscribe", "--mca", "pml", "ob1"])
                .args(["--mca", "btl", "self,vader"])
                .args(["--mca", "mpi_yield_when_idle", "1"])
                .arg(&self.check)
                .args(["--iterations", &format!("{rounds}")])
                .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
                .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        )?;
        let expected = results(&expected);
        ensure!(
            expected.len() == 5 && found == expected,
            "the ranks say {found:#?} instead of {expected:#?}"
        );
        Ok(rounds)
    }
}

/// What the ranks account for, in order of the ranks, and the `ok` of the first.
fn results(output: &str) -> Vec<&str> {
    let mut lines: Vec<_> = output
        .lines()
        .filter(|line| line.starts_with("rank ") || *line == "ok")
        .collect();
    lines.sort_unstable_by_key(|line| (*line == "ok", *line));
    lines
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a name is not UTF-8")
}

fn say(text: &str) {
    eprintln!("xtask: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order() {
        let output = "ready\nrank 2 done sum 7 rounds 3\nok\nrank 0 done sum 7 rounds 3\n";
        let expected = [
            "rank 0 done sum 7 rounds 3",
            "rank 2 done sum 7 rounds 3",
            "ok",
        ];
        assert_eq!(results(output), expected);
    }

    #[test]
    fn pairs_are_networks_of_their_own() -> Result<()> {
        let [first, second] = LATER_PAIRS[1].nodes()?;
        assert_eq!(
            (first.name.as_str(), first.device.ip()),
            ("m1", "10.98.0.1")
        );
        assert_eq!(second.mac, "52:54:00:99:02:02");
        Ok(())
    }
}
