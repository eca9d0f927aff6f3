//! Connections between simulated nodes, and what a node does there.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde::Serialize;

use reverbs::control::message::Request;

use super::super::reach::{Ask, Handle, Reach};
use super::super::relay::{Answers, Call, Relay};
use super::super::stream::SILENCE;
use super::cluster::{Cluster, Fault, Node, index};
use crate::command::job::{AgentFailure, Agents, NodeId, Whose, patience};
use crate::command::node::{NodeReply, NodeRequest};

/// One way of a message over the management network.
pub(super) const LATENCY: Duration = Duration::from_micros(50);
/// All connections of a node share it.
const BYTES_PER_SECOND: f64 = 1e9;
/// To make a message or to read it: half of what JSON and HMAC take at both ends together (`numbers` measures that).
const SECONDS_PER_BYTE: f64 = 10e-9;
/// A launcher has to start a command.
const LAUNCH: Duration = Duration::from_millis(300);
/// Around a message in a frame: its length, the HMAC, `{"message":}`.
const ENVELOPE: u64 = 4 + 32 + 12;
/// A launcher that leads to a silent node gets so long to end by itself.
const LETTING_GO: Duration = Duration::from_secs(5);
/// A process that is stopped is waited for so long, where its patience is longer.
const STOPPED: Duration = Duration::from_secs(20);

/// A node of the cluster, as the tree asks it to do something.
#[derive(Debug)]
pub(super) struct Host {
    cluster: Arc<Cluster>,
    node: NodeId,
    is_attached: bool,
}

/// What a node has to reach others.
#[derive(Debug)]
pub(super) struct Wire {
    cluster: Arc<Cluster>,
    node: NodeId,
    /// How many connections it has.
    shared_by: usize,
}

#[derive(Debug)]
pub(super) struct Connection {
    cluster: Arc<Cluster>,
    above: NodeId,
    node: NodeId,
    shared_by: usize,
    opened: Duration,
    relay: Relay<Host, Wire>,
}

/// What runs on a node, with all behind it.
pub(super) fn start(
    cluster: &Arc<Cluster>,
    node: NodeId,
    behind: &[(NodeId, String)],
) -> (Relay<Host, Wire>, Answers) {
    let host = Host {
        cluster: Arc::clone(cluster),
        node,
        is_attached: false,
    };
    let wire = Wire {
        cluster: Arc::clone(cluster),
        node,
        shared_by: behind.len().min(cluster.fan_out),
    };
    Relay::over(node, host, wire, behind, cluster.fan_out)
}

impl Handle for Host {
    fn handle(&mut self, request: &NodeRequest) -> Result<NodeReply> {
        let clock = self.cluster.clock(self.node);
        let mut node = self.cluster.node(self.node);
        ensure!(
            self.is_attached || matches!(request, NodeRequest::Attach { .. }),
            "no job is attached"
        );
        let (took, reply) = match request {
            NodeRequest::Attach { .. } => {
                self.is_attached = true;
                (Duration::ZERO, NodeReply::Done)
            }
            NodeRequest::Scan => {
                let hello = Request::Hello { version: 0 };
                let agents = node.job.scan();
                let times = agents.iter().map(|agent| match agent {
                    Ok(_) => node.sample(&hello),
                    Err(_) => patience(&hello),
                });
                (
                    times.max().unwrap_or_default(),
                    NodeReply::Agents { agents },
                )
            }
            NodeRequest::Ask { targets, request } => {
                let here = targets.iter().filter(|process| process.node == self.node);
                let here: Vec<_> = here.copied().collect();
                let answers = node.job.ask(&here, request);
                let times = answers.iter().map(|(_, answer)| match answer {
                    Err(AgentFailure::Broken(why)) if why == "stopped" => {
                        patience(request).min(STOPPED)
                    }
                    Err(AgentFailure::Broken(_)) => patience(request),
                    Ok(_) | Err(AgentFailure::Ended) => node.sample(request),
                });
                (
                    times.max().unwrap_or_default(),
                    NodeReply::Answers { answers },
                )
            }
            NodeRequest::Leave { numbers } => {
                node.job.publish(numbers)?;
                (Duration::ZERO, NodeReply::Done)
            }
            NodeRequest::Whose { .. } => {
                let whose = Whose::Nobodys;
                (Duration::ZERO, NodeReply::Whose { whose })
            }
            other => bail!("\"{}\" is not simulated", other.name()),
        };
        clock.busy_until(clock.begun() + took);
        let mut slowest = self.cluster.slowest.lock().unwrap();
        *slowest = took.max(*slowest);
        Ok(reply)
    }
}

impl Reach for Wire {
    type Connection = Connection;

    fn open(&self, chunk: &[(NodeId, String)]) -> Result<(Connection, Answers)> {
        let ((node, _), behind) = chunk.split_first().unwrap();
        let (above, clock) = (self.cluster.clock(self.node), self.cluster.clock(*node));
        let began = above.begun_by_this_thread();
        let silent = {
            let node = self.cluster.node(*node);
            node.is_off || node.is_cut
        };
        if silent {
            above.opened_by_this_thread(began + SILENCE);
            bail!("no answer within {} s", SILENCE.as_secs());
        }
        // The greetings go to and fro before the first message does.
        clock.ask_at(began + LAUNCH + 3 * LATENCY);
        let (relay, answers) = start(&self.cluster, *node, behind);
        let connection = Connection {
            cluster: Arc::clone(&self.cluster),
            above: self.node,
            node: *node,
            shared_by: self.shared_by,
            opened: clock.done() + LATENCY,
            relay,
        };
        above.opened_by_this_thread(connection.opened);
        Ok((connection, answers))
    }
}

impl Ask for Connection {
    fn ask(&mut self, call: &Call) -> io::Result<Answers> {
        let cluster = Arc::clone(&self.cluster);
        let (above, clock) = (cluster.clock(self.above), cluster.clock(self.node));
        let began = match call.request {
            // To one that was opened anew, while others still are.
            NodeRequest::Attach { .. } => above.asked().max(self.opened),
            _ => above.begun(),
        };
        let bytes = self.size_of(call);
        cluster.traffic(self.above).count(bytes);
        let fault = self.node().fault_at(call.request.name());
        if matches!(fault, Some(Fault::CutBefore | Fault::CutAfter)) {
            self.node().is_cut = true;
        }
        if fault == Some(Fault::KilledBefore) {
            above.busy_until(began + LATENCY);
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let is_dumb = self.node().is_off || self.node().is_cut;
        if is_dumb && fault != Some(Fault::CutAfter) {
            above.busy_until(began + SILENCE + LETTING_GO);
            return Err(io::ErrorKind::TimedOut.into());
        }
        clock.ask_at(began + time_of(bytes, self.shared_by));
        let answers = self.relay.call(call);
        if is_dumb {
            above.busy_until(clock.done() + SILENCE + LETTING_GO);
            return Err(io::ErrorKind::TimedOut.into());
        }
        if fault == Some(Fault::KilledAfter) {
            above.busy_until(clock.done() + LATENCY);
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let bytes = size(&answers);
        cluster.traffic(self.node).count(bytes);
        if self.above == NodeId::FIRST {
            cluster.to_first.count(bytes);
        }
        above.busy_until(clock.done() + time_of(bytes, self.shared_by));
        Ok(answers)
    }
}

impl Connection {
    fn node(&self) -> std::sync::MutexGuard<'_, Node> {
        self.cluster.node(self.node)
    }

    /// What everybody gets a node passes on as it got it, so it need not be counted again; what connects it anew is not that.
    fn size_of(&self, call: &Call) -> u64 {
        let as_got = matches!(call.request, NodeRequest::Leave { .. });
        let bytes = match as_got && self.above != NodeId::FIRST {
            true => *self.cluster.calls[index(self.above)].lock().unwrap(),
            false => size(call),
        };
        *self.cluster.calls[index(self.node)].lock().unwrap() = bytes;
        bytes
    }
}

/// Of a message one way, where all connections of a node carry about as much at the same time.
pub(super) fn time_of(bytes: u64, shared_by: usize) -> Duration {
    #[expect(clippy::cast_precision_loss)]
    let (bytes, shared_by) = (bytes as f64, shared_by as f64);
    let seconds = bytes * (shared_by / BYTES_PER_SECOND + 2.0 * SECONDS_PER_BYTE);
    LATENCY + Duration::from_secs_f64(seconds)
}

/// Of a message as it goes over a connection.
fn size<T: Serialize>(message: &T) -> u64 {
    struct Count(u64);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len() as u64;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(ENVELOPE);
    serde_json::to_writer(&mut count, message).unwrap();
    count.0
}
