//! A whole job as the commands see it: the parts on all its nodes, and the agents in them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Result, bail, ensure};

use reverbs::control::message::{HardwarePeer, ProcessNumbers, Reply, Request, Session};

use super::launcher::Launcher;
use super::reach::{Handle, Reach};
use super::record::JobRecord;
use super::relay::{Answers, Call, Launched, NodeFailure, Relay, Subtree, runtime_folder};
use crate::command::job::{
    AgentFailure, Agents, Hello, NodeId, ProcessId, Unreachable, Whose, is_reverbs,
};
use crate::command::node::{NodeReply, NodeRequest, Outputs, Part};
use crate::command::secret::{Handover, Secret};

/// Connections that one node has to others. Below that, the first reaches all itself.
pub(super) const FAN_OUT: usize = 16;
/// Another number, for tests with few nodes.
const FAN_OUT_VARIABLE: &str = "REVERBS_FAN_OUT";

/// All nodes of a job. Whatever its parts hold they let go of when this is dropped.
#[derive(Debug)]
pub(crate) struct Ensemble<P = Part, R: Reach = Launched> {
    relay: Relay<P, R>,
    /// By place in the job's list.
    names: Vec<String>,
    record: Option<JobRecord>,
    root: i32,
    /// Processes with an agent, for nodes that cannot be asked any more.
    known: BTreeMap<NodeId, BTreeSet<i32>>,
}

impl Ensemble {
    /// Takes the job whose root on this node is process `root`, on all its nodes but those named in `without`.
    ///
    /// # Errors
    /// A node cannot be reached, or another command drives the job.
    pub(crate) fn attach(root: i32, without: &[String]) -> Result<Self> {
        Self::take(root, without, true)
    }

    /// As [`Ensemble::attach`], only to look at it: another command may drive it.
    ///
    /// # Errors
    /// A node cannot be reached.
    pub(crate) fn look_at(root: i32) -> Result<Self> {
        Self::take(root, &[], false)
    }

    fn take(root: i32, without: &[String], driving: bool) -> Result<Self> {
        let record = JobRecord::of(&runtime_folder()?, root)?;
        let (names, roots) = match &record {
            None => (Vec::new(), vec![root]),
            Some(record) => (
                record.nodes.iter().map(|node| node.name.clone()).collect(),
                record.nodes.iter().map(|node| node.root).collect(),
            ),
        };
        let mut left_out = BTreeSet::new();
        for name in without {
            match names
                .iter()
                .skip(1)
                .position(|known: &String| known == name)
            {
                Some(place) => left_out.insert(place + 1),
                None => bail!(
                    "the job has no other node {name}; it has {}",
                    names.join(", ")
                ),
            };
        }
        let job = record.as_ref().map(|record| record.id.clone());
        let mut ensemble = match &record {
            None => Self::open(vec![String::new()], &left_out, None, Outputs::none()?)?,
            Some(record) => {
                let secret = Secret::kept(&runtime_folder()?, &record.id)?;
                let handover = Handover::Kept {
                    job: record.id.clone(),
                };
                let reach = (record.launcher.clone(), secret, handover);
                Self::open(names, &left_out, Some(reach), Outputs::none()?)?
            }
        };
        (ensemble.record, ensemble.root) = (record, root);
        ensemble.all(NodeRequest::Attach {
            roots,
            job,
            driving,
        })?;
        Ok(ensemble)
    }

    /// Reaches the nodes on which an image is to be restored; the first is this one.
    ///
    /// # Errors
    /// A node cannot be reached.
    pub(crate) fn for_restart(
        root: i32,
        names: Vec<String>,
        launcher: Launcher,
        outputs: Outputs,
    ) -> Result<Self> {
        let reach = if names.len() > 1 {
            let secret = Secret::fresh()?;
            let handover = secret.for_handover();
            Some((launcher, secret, handover))
        } else {
            None
        };
        let mut ensemble = Self::open(names, &BTreeSet::new(), reach, outputs)?;
        ensemble.root = root;
        Ok(ensemble)
    }

    fn open(
        names: Vec<String>,
        left_out: &BTreeSet<usize>,
        reach: Option<(Launcher, Secret, Handover)>,
        outputs: Outputs,
    ) -> Result<Self> {
        let part = Part::new(NodeId::FIRST, runtime_folder()?, outputs);
        let (launcher, secret, handover) = match reach {
            Some(reach) => reach,
            // Nobody to reach.
            None => {
                let secret = Secret::fresh()?;
                let handover = Handover::Given {
                    secret: secret.clone(),
                };
                (Launcher::find(None), secret, handover)
            }
        };
        let behind: Vec<(NodeId, String)> = (0..)
            .zip(&names)
            .skip(1)
            .filter(|(place, _)| !left_out.contains(&(*place as usize)))
            .map(|(place, name)| (NodeId(place), name.clone()))
            .collect();
        let fan_out = std::env::var(FAN_OUT_VARIABLE).ok();
        let subtree = Subtree {
            own: NodeId::FIRST,
            name: names.first().cloned().unwrap_or_default(),
            launcher,
            fan_out: fan_out
                .and_then(|text| text.parse().ok())
                .unwrap_or(FAN_OUT),
            handover,
            behind,
        };
        let (relay, opened) = Relay::open(part, &subtree, &secret);
        Self::of(relay, opened, names)
    }

    /// The part on this node.
    pub(crate) fn own_part(&mut self) -> &mut Part {
        self.relay.part()
    }
}

impl<P: Handle, R: Reach> Ensemble<P, R> {
    /// All that a relay has reached.
    ///
    /// # Errors
    /// It has not reached one.
    pub(super) fn of(relay: Relay<P, R>, opened: Answers, names: Vec<String>) -> Result<Self> {
        let ensemble = Self {
            relay,
            names,
            record: None,
            root: 0,
            known: BTreeMap::new(),
        };
        ensemble.require(opened)?;
        Ok(ensemble)
    }

    /// Whether there are other nodes than this one.
    pub(crate) fn has_others(&self) -> bool {
        self.names.len() > 1
    }

    pub(crate) fn record(&self) -> Option<&JobRecord> {
        self.record.as_ref()
    }

    /// Asks all nodes at the same time.
    ///
    /// # Errors
    /// What the nodes say that did not do it, each with its name.
    pub(crate) fn all(&mut self, request: NodeRequest) -> Result<Vec<(NodeId, NodeReply)>> {
        let answers = self.relay.call(&Call { to: None, request });
        self.require(answers)
    }

    /// Asks all nodes, and goes on whatever they say.
    pub(crate) fn tell(&mut self, request: NodeRequest) {
        if let Err(error) = self.all(request) {
            tracing::warn!("{error:#}");
        }
    }

    /// Lets go of the other nodes: nothing of ours is left there.
    pub(crate) fn hang_up(&mut self) {
        self.relay.hang_up();
    }

    fn require(&self, answers: Answers) -> Result<Vec<(NodeId, NodeReply)>> {
        let (mut done, mut failed) = (Vec::new(), Vec::new());
        for (node, answer) in answers {
            match answer {
                Ok(reply) => done.push((node, reply)),
                Err(NodeFailure::Refused(why) | NodeFailure::Lost(why)) => {
                    failed.push(self.attributed(node, &why));
                }
            }
        }
        // Several nodes behind one that is lost say the same.
        failed.dedup();
        ensure!(failed.is_empty(), "{}", failed.join("; "));
        done.sort_by_key(|(node, _)| *node);
        Ok(done)
    }

    fn attributed(&self, node: NodeId, why: &str) -> String {
        match self.node_name(node) {
            Some(name) if !why.contains(name) => format!("node {name}: {why}"),
            _ => why.to_owned(),
        }
    }

    /// `None` where there is only one.
    pub(crate) fn node_name(&self, node: NodeId) -> Option<&str> {
        let place = usize::try_from(node.0).ok()?;
        self.names
            .get(place)
            .filter(|_| self.has_others())
            .map(String::as_str)
    }
}

impl<P: Handle, R: Reach> Agents for Ensemble<P, R> {
    fn scan(&mut self) -> Vec<Result<Hello, Unreachable>> {
        let request = NodeRequest::Scan;
        let answers = self.relay.call(&Call { to: None, request });
        let mut found = Vec::new();
        for (node, answer) in answers {
            let why = match answer {
                Ok(NodeReply::Agents { agents }) => {
                    let pids = agents.iter().map(|agent| match agent {
                        Ok(hello) => hello.process.pid,
                        Err(silent) => silent.process.pid,
                    });
                    self.known.insert(node, pids.collect());
                    found.extend(agents);
                    continue;
                }
                Ok(other) => format!("it answers Scan with {other:?}"),
                Err(NodeFailure::Refused(why) | NodeFailure::Lost(why)) => why,
            };
            // Nobody may go on without those that were there. A node without any stands for itself.
            let mut pids: Vec<i32> = self
                .known
                .get(&node)
                .into_iter()
                .flatten()
                .copied()
                .collect();
            if pids.is_empty() {
                pids.push(0);
            }
            found.extend(pids.into_iter().map(|pid| {
                Err(Unreachable {
                    process: ProcessId { node, pid },
                    why: why.clone(),
                })
            }));
        }
        found
    }

    fn ask(
        &mut self,
        targets: &[ProcessId],
        request: &Request,
    ) -> Vec<(ProcessId, Result<Reply, AgentFailure>)> {
        if targets.is_empty() {
            return Vec::new();
        }
        let call = Call {
            to: Some(targets.iter().map(|process| process.node).collect()),
            request: NodeRequest::Ask {
                targets: targets.to_vec(),
                request: Arc::new(request.clone()),
            },
        };
        let mut answered = Vec::new();
        for (node, answer) in self.relay.call(&call) {
            let why = match answer {
                Ok(NodeReply::Answers { answers }) => {
                    answered.extend(answers);
                    continue;
                }
                Ok(other) => format!("its node answers with {other:?}"),
                Err(NodeFailure::Refused(why) | NodeFailure::Lost(why)) => why,
            };
            let there = targets.iter().filter(|process| process.node == node);
            answered
                .extend(there.map(|process| (*process, Err(AgentFailure::Broken(why.clone())))));
        }
        answered.sort_by_key(|(process, _)| *process);
        answered
    }

    fn name(&self, process: ProcessId) -> String {
        match (self.node_name(process.node), process.pid) {
            (Some(node), 0) => format!("node {node}"),
            (Some(node), pid) => format!("process {pid} on {node}"),
            (None, pid) => format!("process {pid}"),
        }
    }

    fn is_alive(&self, session: &Session) -> bool {
        // Orchestrators run on the first node of their job, as we do.
        is_reverbs(session.pid)
    }

    fn publish(&mut self, numbers: &[ProcessNumbers]) -> Result<()> {
        self.all(NodeRequest::Leave {
            numbers: numbers.to_vec(),
        })?;
        Ok(())
    }

    fn whose(&mut self, peer: &HardwarePeer, device: Option<(NodeId, &str)>) -> Result<Whose> {
        let call = Call {
            to: device.map(|(node, _)| BTreeSet::from([node])),
            request: NodeRequest::Whose {
                peer: *peer,
                device: device.map(|(_, name)| name.to_owned()),
            },
        };
        let answers = self.relay.call(&call);
        let found = self
            .require(answers)?
            .into_iter()
            .find_map(|(_, reply)| match reply {
                NodeReply::Whose { whose } if whose != Whose::AnotherHosts => Some(whose),
                _ => None,
            });
        Ok(found.unwrap_or(Whose::AnotherHosts))
    }
}
