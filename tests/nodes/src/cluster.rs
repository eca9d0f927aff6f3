//! Nodes, and the network between them.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reverbs_tests::process::{Running, signal_each};
use reverbs_tests::setup::Deadline;
use reverbs_tests::tree;
use rustix::process::Signal;

use crate::node::{INTERFACE, Node};
use crate::node_init::UP;

/// What joins the nodes, in the namespace of the run.
const BRIDGE: &str = "nodes";

/// All addresses that nodes have.
const EVERYBODY: &str = "10.0.0.0/8";

const BOOT_LIMIT: Duration = Duration::from_secs(20);

const OFF_LIMIT: Duration = Duration::from_secs(20);

const PAUSE: Duration = Duration::from_millis(10);

/// The name and the address of a node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    pub name: String,
    pub address: Ipv4Addr,
}

/// `n1` at 10.50.0.1 and so on.
pub fn usual(count: u8) -> Vec<Identity> {
    identities("n", 50, count)
}

/// As many that have nothing in common with the usual ones: `m1` at 10.60.0.1 and so on.
pub fn others(count: u8) -> Vec<Identity> {
    identities("m", 60, count)
}

fn identities(prefix: &str, subnet: u8, count: u8) -> Vec<Identity> {
    (1..=count)
        .map(|number| Identity {
            name: format!("{prefix}{number}"),
            address: Ipv4Addr::new(10, subnet, 0, number),
        })
        .collect()
}

/// Some nodes on one network.
#[derive(Debug)]
pub struct Cluster {
    folder: PathBuf,
    criu: PathBuf,
    /// Seen by the nodes at the same place.
    bound: Vec<PathBuf>,
    nodes: Vec<Node>,
    /// Nodes that were ever started.
    started: u32,
}

impl Cluster {
    /// A network without nodes. `folder` is for what belongs to it.
    ///
    /// # Errors
    /// When the network cannot be made.
    pub fn new(folder: &Path, criu: &Path, bound: &[PathBuf]) -> Result<Self> {
        let folder = folder.join("cluster");
        fs::create_dir_all(&folder)?;
        ip(&["link", "add", BRIDGE, "type", "bridge"])?;
        ip(&["link", "set", BRIDGE, "up"])?;
        let cluster = Self {
            folder,
            criu: criu.to_owned(),
            bound: bound.to_vec(),
            nodes: Vec::new(),
            started: 0,
        };
        fs::write(cluster.hosts(), "")?;
        cluster.write_rsh("exec", "")?;
        Ok(cluster)
    }

    /// The program that runs a command on another node, called like ssh.
    pub fn rsh(&self) -> PathBuf {
        self.folder.join("rsh")
    }

    fn write_rsh(&self, before: &str, after: &str) -> Result<()> {
        let rsh = self.rsh();
        let program = std::env::current_exe()?;
        fs::write(
            &rsh,
            format!(
                "#!/bin/sh\n{before} '{}' rsh \"$@\" {after}\n",
                program.display()
            ),
        )?;
        Ok(fs::set_permissions(
            &rsh,
            fs::Permissions::from_mode(0o755),
        )?)
    }

    /// What remote commands say does not arrive until [`Self::let_answers_arrive`].
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn hold_answers(&self) -> Result<()> {
        self.write_rsh(
            "",
            &format!(
                "| {{ until [ -e '{}' ]; do sleep 0.05; done; exec cat; }}",
                self.arriving().display()
            ),
        )
    }

    /// # Errors
    /// When that cannot be written down.
    pub fn let_answers_arrive(&self) -> Result<()> {
        Ok(fs::write(self.arriving(), "")?)
    }

    fn arriving(&self) -> PathBuf {
        self.folder.join("arriving")
    }

    fn hosts(&self) -> PathBuf {
        self.folder.join("hosts")
    }

    /// The node with this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        let found = self.nodes.iter().find(|node| node.name == name);
        found.with_context(|| format!("there is no node {name}"))
    }

    /// Those that are up.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The one where commands are given.
    ///
    /// # Errors
    /// When all are off.
    pub fn first(&self) -> Result<&Node> {
        self.nodes.first().context("all nodes are off")
    }

    /// Starts nodes that have never run before.
    ///
    /// # Errors
    /// When they do not come up.
    pub fn boot(&mut self, identities: &[Identity]) -> Result<()> {
        for identity in identities {
            let node = self.start(identity)?;
            self.nodes.push(node);
        }
        self.write_hosts()
    }

    fn start(&mut self, identity: &Identity) -> Result<Node> {
        let Identity { name, address } = identity;
        ensure!(self.node(name).is_err(), "{name} is up already");
        self.started += 1;
        let scratch = self.folder.join(format!("{name}-{}", self.started));
        fs::create_dir(&scratch)?;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--uts", "--ipc", "--net", "--pid"])
            .args(["--fork", "--kill-child"])
            .arg(std::env::current_exe()?)
            .args(["node-init", "--name", name])
            .arg("--scratch")
            .arg(scratch)
            .arg("--hosts")
            .arg(self.hosts())
            .arg("--criu")
            .arg(&self.criu);
        for folder in &self.bound {
            command.arg("--bind").arg(folder);
        }
        let label = format!("{name}-{}", self.started);
        let mut runner = Running::start(command, &self.folder, &label)?;
        runner.wait_for_line(Deadline::after(BOOT_LIMIT), UP)?;
        let init = *tree::descendants(runner.pid())
            .first()
            .context("a node without a process")?;
        let port = format!("port{}", self.started);
        let node = Node {
            name: name.clone(),
            address: *address,
            port,
            init,
            daemons: &[],
            runner,
        };
        self.plug_in(&node)?;
        Ok(node)
    }

    fn plug_in(&self, node: &Node) -> Result<()> {
        let [a, b, c, d] = node.address.octets();
        // Part of the address: the others are not to look for a new node at the hardware address of the old one.
        let hardware = format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
        let init = node.init.to_string();
        let near = ["link", "add", &node.port, "type", "veth", "peer"];
        let far = ["name", INTERFACE, "address", &hardware, "netns", &init];
        ip(&[&near[..], &far[..]].concat())?;
        ip(&["link", "set", &node.port, "master", BRIDGE, "up"])?;
        // Whoever has an address of another network can be reached as well.
        node.shell(&format!(
            "ip link set lo up && ip address add {}/24 dev {INTERFACE} && \
             ip link set {INTERFACE} up && ip route add {EVERYBODY} dev {INTERFACE}",
            node.address
        ))
        .map(drop)
    }

    /// Everybody knows the names of those that are up: the file stays the same one, which the nodes have bound.
    fn write_hosts(&self) -> Result<()> {
        let mut text = "127.0.0.1 localhost\n".to_owned();
        for node in &self.nodes {
            text.push_str(&format!("{} {}\n", node.address, node.name));
        }
        Ok(fs::write(self.hosts(), text)?)
    }

    /// Takes the power from a node: nothing of it is left, and nobody hears of it.
    ///
    /// # Errors
    /// When there is no such node, or it does not end.
    pub fn power_off(&mut self, name: &str) -> Result<()> {
        let found = self.nodes.iter().position(|node| node.name == name);
        let mut node = self
            .nodes
            .remove(found.with_context(|| format!("there is no node {name}"))?);
        // First the cable: processes that are killed say goodbye to their peers.
        ip(&["link", "delete", &node.port])?;
        let pids: Vec<u32> = node.processes().iter().map(|found| found.pid).collect();
        signal_each(&[node.init], Signal::KILL);
        let deadline = Deadline::after(OFF_LIMIT);
        while node.runner.ended()?.is_none() {
            ensure!(!deadline.passed(), "{name} does not end");
            // What a command of ours had started in the node is our child once that command has ended, and the node
            // does not end before somebody has taken note of each of its processes.
            tree::reap(&pids);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// The same for all.
    ///
    /// # Errors
    /// When one does not end.
    pub fn power_off_all(&mut self) -> Result<()> {
        while let Some(node) = self.nodes.last() {
            self.power_off(&node.name.clone())?;
        }
        Ok(())
    }

    /// Daemons with these names belong to the nodes.
    pub fn expect(&mut self, daemons: &'static [&'static str]) {
        for node in &mut self.nodes {
            node.daemons = daemons;
        }
    }

    /// Pulls the cable out of a node.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn cut(&self, name: &str) -> Result<()> {
        ip(&["link", "set", &self.node(name)?.port, "down"])
    }

    /// Puts it back.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn join(&self, name: &str) -> Result<()> {
        ip(&["link", "set", &self.node(name)?.port, "up"])
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // What does not end is found by the report; the bridge ends with the run at the latest.
        let _ = self.power_off_all();
        let _ = ip(&["link", "delete", BRIDGE]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    xtask::command::output(Command::new("ip").args(arguments)).map(drop)
}
