//! The barrier of a restart over several nodes: until all processes are back, no packet of a restored connection gets in.
//!
//! A restored connection whose peer is not there yet would be answered by a reset, and the job would die. So each node drops
//! what comes in on these connections; TCP sends it again. The rules are a table of nftables with an owner: the kernel
//! removes it when its owner closes its netlink socket, whatever that dies of. The owner is an `nft` that reads commands from
//! a pipe of ours, so it ends when we do.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, ChildStdin, Stdio};

use anyhow::{Context, Result, bail};

use reverbs::image::TcpConnection;

use super::Namespace;
use super::tables::plain;

/// Lets the packets in again when dropped.
#[derive(Debug)]
pub(crate) struct Hold {
    nft: Child,
    commands: Option<ChildStdin>,
}

impl Hold {
    /// Holds these connections back in `namespace`.
    ///
    /// # Errors
    /// There is no `nft`, or it refuses.
    pub(crate) fn on(
        namespace: &Namespace,
        root: i32,
        connections: &[TcpConnection],
    ) -> Result<Self> {
        let mut nft = namespace
            .command("nft")
            .arg("-i")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start `nft` (Debian: `apt install nftables`), which holds connections until all nodes are restored")?;
        let mut commands = nft.stdin.take().context("no pipe to nft")?;
        let output = nft.stdout.take().context("no pipe from nft")?;
        let mut hold = Self {
            nft,
            commands: None,
        };
        let table = format!("reverbs-{root}");
        commands.write_all(script(&table, connections).as_bytes())?;
        hold.commands = Some(commands);
        let mut chain_is_there = false;
        let mut listed = false;
        for line in BufReader::new(output).lines() {
            let line = line.context("cannot read what nft says")?;
            listed |= line.contains(&format!("table inet {table} "));
            chain_is_there |= listed && line.contains("hook input");
            // The end of the listing.
            if listed && line == "}" {
                break;
            }
        }
        if !chain_is_there {
            // It has ended, or refused a line: what it said of it is all there is to tell.
            drop(hold.commands.take());
            let _ = hold.nft.kill();
            let mut said = String::new();
            if let Some(mut errors) = hold.nft.stderr.take() {
                let _ = std::io::Read::read_to_string(&mut errors, &mut said);
            }
            bail!(
                "nft cannot hold the connections of the job: {}",
                said.lines().next().unwrap_or("it ended")
            );
        }
        Ok(hold)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        drop(self.commands.take());
        let _ = self.nft.kill();
        let _ = self.nft.wait();
    }
}

/// Drops what comes in on each connection; at last lists the table, which shows that it is there.
fn script(table: &str, connections: &[TcpConnection]) -> String {
    let mut script = format!("add table inet {table} {{ flags owner; }}\n");
    let mut add = |rest: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(script, "add {rest}");
    };
    for (family, name) in [("ip", "four"), ("ip6", "six")] {
        add(&format!(
            "set inet {table} {name} {{ typeof {family} saddr . tcp sport . {family} daddr . tcp dport; }}"
        ));
    }
    for connection in connections {
        let (from, to) = (plain(connection.remote), plain(connection.local));
        let name = if from.is_ipv4() { "four" } else { "six" };
        add(&format!(
            "element inet {table} {name} {{ {} . {} . {} . {} }}",
            from.ip(),
            from.port(),
            to.ip(),
            to.port()
        ));
    }
    add(&format!(
        "chain inet {table} arriving {{ type filter hook input priority -300; }}"
    ));
    for (family, name) in [("ip", "four"), ("ip6", "six")] {
        add(&format!(
            "rule inet {table} arriving {family} saddr . tcp sport . {family} daddr . tcp dport @{name} drop"
        ));
    }
    let _ = writeln!(script, "list table inet {table}");
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_is_held_in_the_direction_in_which_packets_arrive() {
        let connections = [TcpConnection {
            local: "[::ffff:10.0.0.1]:80".parse().unwrap(),
            remote: "[::ffff:10.0.0.2]:4000".parse().unwrap(),
        }];
        let script = script("reverbs-7", &connections);
        assert!(script.contains("flags owner"), "{script}");
        assert!(
            script.contains("element inet reverbs-7 four { 10.0.0.2 . 4000 . 10.0.0.1 . 80 }"),
            "{script}"
        );
    }
}
