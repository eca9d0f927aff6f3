//! One node in the tree of connections: it does what is asked of it, and passes it on to the nodes behind it.
//!
//! A request goes down the tree once along each connection, with what concerns the nodes behind it, and the answers of a whole subtree come back in one message. So
//! the time of a phase grows with the depth of the tree, and no node speaks with more than `fan_out` others.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::channel::{self, End, Greeting, Keeper, Reader, Writer};
use super::launcher::{LastLine, Launcher};
use super::reach::{Ask, Handle, Reach};
use super::stream::{SILENCE, read_line};
use crate::command::job::NodeId;
use crate::command::node::{NodeReply, NodeRequest, Part};
use crate::command::secret::{Handover, Secret, hexadecimal};

/// Begins the first line that `reverbs node` prints; a login shell may print others before.
pub(super) const MAGIC: &str = "reverbs-node ";
/// Raised by every change that the other end would misread.
pub(super) const NODES_VERSION: u32 = 3;
const LONGEST_LINE: usize = 1 << 16;
/// How long a launcher that has ended may take to pass on why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The first line that a parent writes, in clear.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HelloChild {
    pub(super) version: u32,
    pub(super) nonce: String,
    pub(super) handover: Handover,
    /// Variables of ours that the other node shall have, too.
    pub(super) environment: Vec<(String, String)>,
}

/// And the answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HelloParent {
    pub(super) version: u32,
    pub(super) nonce: String,
    /// Why it will not take part.
    pub(super) refused: Option<String>,
}

/// The first message on a connection: what the child is, and whom it has behind it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Subtree {
    pub(super) own: NodeId,
    pub(super) name: String,
    pub(super) behind: Vec<(NodeId, String)>,
    pub(super) launcher: Launcher,
    pub(super) fan_out: usize,
    pub(super) handover: Handover,
}

/// What goes down the tree.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Call {
    /// `None` for all.
    pub(super) to: Option<BTreeSet<NodeId>>,
    pub(super) request: NodeRequest,
}

impl Call {
    /// What of it concerns these nodes.
    fn for_nodes(&self, nodes: &BTreeSet<NodeId>) -> Cow<'_, Self> {
        let NodeRequest::Ask { targets, request } = &self.request else {
            return Cow::Borrowed(self);
        };
        let among = |node: &NodeId| nodes.contains(node);
        let to = self.to.as_ref();
        Cow::Owned(Self {
            to: to.map(|to| to.iter().copied().filter(among).collect()),
            request: NodeRequest::Ask {
                targets: targets
                    .iter()
                    .copied()
                    .filter(|process| among(&process.node))
                    .collect(),
                request: Arc::clone(request),
            },
        })
    }
}

/// Why a node has not answered as it should.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum NodeFailure {
    /// It says why.
    Refused(String),
    /// It cannot be reached any more.
    Lost(String),
}

pub(crate) type Answers = Vec<(NodeId, Result<NodeReply, NodeFailure>)>;

/// Reaches them by a launcher.
#[derive(Debug)]
pub(crate) struct Launched {
    subtree: Subtree,
    secret: Secret,
}

#[derive(Debug)]
pub(crate) struct Relay<P = Part, R: Reach = Launched> {
    own: NodeId,
    part: P,
    reach: R,
    links: Vec<Link<R::Connection>>,
    /// For a node whose connection is opened anew.
    attach: Option<NodeRequest>,
}

impl Relay {
    /// As [`Relay::over`], by a launcher.
    pub(super) fn open(part: Part, subtree: &Subtree, secret: &Secret) -> (Self, Answers) {
        let reach = Launched {
            subtree: subtree.clone(),
            secret: secret.clone(),
        };
        Self::over(subtree.own, part, reach, &subtree.behind, subtree.fan_out)
    }
}

impl<P: Handle, R: Reach> Relay<P, R> {
    /// Reaches all nodes behind this one. Gives also what failed: those nodes, and those behind them, are not there.
    pub(super) fn over(
        own: NodeId,
        part: P,
        reach: R,
        behind: &[(NodeId, String)],
        fan_out: usize,
    ) -> (Self, Answers) {
        let chunks = chunks(behind, fan_out);
        let opened: Vec<_> = std::thread::scope(|scope| {
            let opening: Vec<_> = chunks
                .iter()
                .map(|chunk| scope.spawn(|| reach.open(chunk)))
                .collect();
            opening
                .into_iter()
                .map(|one| {
                    one.join()
                        .unwrap_or_else(|_| Err(anyhow!("opening a connection panicked")))
                })
                .collect()
        });
        let (mut links, mut answers) = (Vec::new(), vec![(own, Ok(NodeReply::Done))]);
        for (chunk, opened) in chunks.into_iter().zip(opened) {
            let (link, behind) = Link::opened(chunk, opened);
            links.push(link);
            answers.extend(behind);
        }
        let relay = Self {
            own,
            part,
            reach,
            links,
            attach: None,
        };
        (relay, answers)
    }

    /// A connection that was lost may be the only thing that was: `reverbs node` was killed, not its node.
    fn open_lost_anew(&mut self) {
        let (reach, attach) = (&self.reach, &self.attach);
        std::thread::scope(|scope| {
            // At the same time: one that is off takes as long as it may be silent.
            for link in self.links.iter_mut().filter(|link| link.lost.is_some()) {
                scope.spawn(move || {
                    let chunk = link.chunk.clone();
                    let opened = reach.open(&chunk);
                    let (fresh, _) = Link::opened(chunk, opened);
                    *link = fresh;
                    if let Some(attach) = attach {
                        link.call(&Call {
                            to: None,
                            request: attach.clone(),
                        });
                    }
                });
            }
        });
    }

    pub(super) fn hang_up(&mut self) {
        self.links.clear();
    }

    pub(super) fn part(&mut self) -> &mut P {
        &mut self.part
    }

    /// Asks this node and those behind it, all at the same time.
    pub(super) fn call(&mut self, call: &Call) -> Answers {
        match &call.request {
            NodeRequest::Attach { .. } => self.attach = Some(call.request.clone()),
            NodeRequest::Scan => self.open_lost_anew(),
            _ => {}
        }
        let asked = |node: &NodeId| call.to.as_ref().is_none_or(|to| to.contains(node));
        let part = &mut self.part;
        let own = self.own;
        std::thread::scope(|scope| {
            let waiting: Vec<_> = self
                .links
                .iter_mut()
                .filter(|link| link.nodes().any(|node| asked(&node)))
                .map(|link| {
                    let nodes: BTreeSet<NodeId> = link.nodes().collect();
                    let call = call.for_nodes(&nodes);
                    (nodes, scope.spawn(move || link.call(&call)))
                })
                .collect();
            let mut answers = Vec::new();
            if asked(&own) {
                let answer = part.handle(&call.request);
                answers.push((
                    own,
                    answer.map_err(|error| NodeFailure::Refused(format!("{error:#}"))),
                ));
            }
            for (nodes, one) in waiting {
                let answered = one.join().unwrap_or_else(|_| {
                    let lost = || Err(NodeFailure::Lost("asking panicked".into()));
                    nodes.iter().map(|node| (*node, lost())).collect()
                });
                answers.extend(answered.into_iter().filter(|(node, _)| asked(node)));
            }
            answers
        })
    }
}

/// Splits the nodes behind one into at most `fan_out` groups, each of which begins with the one to be reached directly.
pub(super) fn chunks<T: Clone>(behind: &[T], fan_out: usize) -> Vec<Vec<T>> {
    let groups = fan_out.max(1).min(behind.len());
    let mut chunks = Vec::with_capacity(groups);
    let mut rest = behind;
    for left in (1..=groups).rev() {
        let (chunk, others) = rest.split_at(rest.len().div_ceil(left));
        chunks.push(chunk.to_vec());
        rest = others;
    }
    chunks
}

/// A node that is reached directly, and those behind it.
#[derive(Debug)]
struct Link<C> {
    chunk: Vec<(NodeId, String)>,
    connection: Option<C>,
    /// Why there is no connection.
    lost: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Connection {
    child: Child,
    reader: Reader,
    writer: Writer,
    keeper: Option<Keeper>,
    errors: LastLine,
}

impl Reach for Launched {
    type Connection = Connection;

    fn open(&self, chunk: &[(NodeId, String)]) -> Result<(Connection, Answers)> {
        let (above, secret) = (&self.subtree, &self.secret);
        let ((own, name), behind) = chunk.split_first().context("no node to reach")?;
        let mut child = above
            .launcher
            .command(name, &["node"])?
            .spawn()
            .with_context(|| format!("cannot start `{}`", above.launcher.name()))?;
        let errors = LastLine::of(child.stderr.take());
        let (reader, writer) = match greet(&mut child, above, secret) {
            Ok(streams) => streams,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = errors.wait();
                return Err(match said.is_empty() {
                    true => error,
                    false => anyhow!("{}: {said}", above.launcher.name()),
                });
            }
        };
        let mut connection = Connection {
            child,
            keeper: Some(Keeper::of(writer.clone())),
            reader,
            writer,
            errors,
        };
        let subtree = Subtree {
            own: *own,
            name: name.clone(),
            behind: behind.to_vec(),
            ..above.clone()
        };
        connection.writer.send(&subtree)?;
        match connection.reader.receive()? {
            Some(answers) => Ok((connection, answers)),
            None => bail!("it ended while it reached the nodes behind it"),
        }
    }
}

impl<C: Ask> Link<C> {
    /// With the answers of all nodes that it is to reach.
    fn opened(chunk: Vec<(NodeId, String)>, opened: Result<(C, Answers)>) -> (Self, Answers) {
        let (connection, lost, answers) = match opened {
            Ok((connection, answers)) => (Some(connection), None, answers),
            Err(error) => (None, Some(format!("{error:#}")), Answers::new()),
        };
        let link = Self {
            chunk,
            connection,
            lost,
        };
        let lost = link.lost_answers();
        (link, if answers.is_empty() { lost } else { answers })
    }

    fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.chunk.iter().map(|(node, _)| *node)
    }

    fn call(&mut self, call: &Call) -> Answers {
        if let Some(connection) = &mut self.connection {
            match connection.ask(call) {
                Ok(answers) => return answers,
                Err(error) => {
                    let name = self.chunk.first().map_or("", |(_, name)| name);
                    self.lost = Some(explain(&error, name, call.request.name()));
                    self.connection = None;
                }
            }
        }
        self.lost_answers()
    }

    fn lost_answers(&self) -> Answers {
        let why = self.lost.clone().unwrap_or_default();
        let lost = |node| (node, Err(NodeFailure::Lost(why.clone())));
        self.nodes().map(lost).collect()
    }
}

impl Ask for Connection {
    fn ask(&mut self, call: &Call) -> io::Result<Answers> {
        let asked = self.writer.send(call).and_then(|()| self.reader.receive());
        let ended = match asked {
            Ok(Some(answers)) => return Ok(answers),
            Ok(None) => io::ErrorKind::UnexpectedEof.into(),
            Err(error) => error,
        };
        if !has_ended(&ended) {
            return Err(ended);
        }
        // Why, the other end may have said.
        match self.errors.within(LAST_WORDS) {
            said if said.is_empty() => Err(ended),
            said => Err(io::Error::new(ended.kind(), said)),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        const LIMIT: Duration = Duration::from_secs(5);
        // The other end sees the end of its input, lets go of what it holds, and ends.
        self.keeper = None;
        self.writer.close();
        let began = Instant::now();
        while began.elapsed() < LIMIT {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn greet(child: &mut Child, above: &Subtree, secret: &Secret) -> Result<(Reader, Writer)> {
    let input = child.stdin.take().context("no pipe to it")?;
    let output = child.stdout.take().context("no pipe from it")?;
    let nonce = nonce()?;
    let hello = HelloChild {
        version: NODES_VERSION,
        nonce: nonce.clone(),
        handover: above.handover.clone(),
        environment: own_variables(),
    };
    let mut input = File::from(OwnedFd::from(input));
    let mut line = serde_json::to_vec(&hello)?;
    line.push(b'\n');
    input.write_all(&line).context("it does not listen")?;
    let mut output = File::from(OwnedFd::from(output));
    let answer = loop {
        let line = read_line(&mut output, LONGEST_LINE).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => anyhow!("it ended without an answer"),
            io::ErrorKind::TimedOut => anyhow!("no answer within {} s", SILENCE.as_secs()),
            _ => anyhow!(error),
        })?;
        if let Some(answer) = line.strip_prefix(MAGIC) {
            break serde_json::from_str::<HelloParent>(answer)?;
        }
    };
    if let Some(refused) = answer.refused {
        bail!(refused);
    }
    let greeting = Greeting {
        from_parent: nonce,
        from_child: answer.nonce,
    };
    Ok(channel::begin(
        End::Parent,
        output.into(),
        input.into(),
        secret,
        &greeting,
    )?)
}

pub(super) fn nonce() -> Result<String> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(hexadecimal(&bytes))
}

/// Every node works with the same runtime folder, CRIU and log level as the first.
fn own_variables() -> Vec<(String, String)> {
    ["REVERBS_RUNTIME_DIR", "REVERBS_CRIU", "REVERBS_LOG"]
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)))
        .collect()
}

fn has_ended(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe
    )
}

fn explain(error: &io::Error, name: &str, what: &str) -> String {
    let said = match error.get_ref() {
        Some(said) => format!(": {said}"),
        None => String::new(),
    };
    match error.kind() {
        _ if has_ended(error) => {
            format!("the connection to node {name} ended at \"{what}\"{said}")
        }
        io::ErrorKind::TimedOut => format!(
            "node {name} has said nothing for {} s at \"{what}\": is it off, or cut from the network?",
            SILENCE.as_secs()
        ),
        _ => format!("node {name} at \"{what}\": {error}"),
    }
}

/// Where the runtime folder of a node is told in its environment.
pub(super) fn runtime_folder() -> Result<PathBuf> {
    Ok(reverbs::control::socket::runtime_dir()?)
}

#[cfg(test)]
mod tests {
    use super::chunks;

    #[test]
    fn every_node_is_in_one_group_and_groups_differ_by_one_at_most() {
        for nodes in 0..70 {
            let behind: Vec<u32> = (1..=nodes).collect();
            for fan_out in [1, 2, 16] {
                let groups = chunks(&behind, fan_out);
                assert!(groups.len() <= fan_out);
                assert_eq!(groups.concat(), behind);
                let sizes: Vec<usize> = groups.iter().map(Vec::len).collect();
                let (least, most) = (sizes.iter().min(), sizes.iter().max());
                assert!(most.copied().unwrap_or(0) - least.copied().unwrap_or(0) <= 1);
                assert!(least.is_none_or(|least| *least > 0));
            }
        }
    }
}
