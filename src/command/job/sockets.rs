//! The agents in the processes of this node: how they are found and spoken to.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use reverbs::control::message::{HardwarePeer, PROTOCOL_VERSION, ProcessNumbers, Reply, Request};
use reverbs::control::owner::{self, Whose};
use reverbs::control::{job_numbers, socket};

use super::agents::{AgentFailure, Hello, Unreachable};
use super::place::{NodeId, ProcessId};
use super::tree::{self, ProcessTree};

/// The agents in the processes of a tree, over their sockets.
#[derive(Debug)]
pub(crate) struct SocketAgents {
    node: NodeId,
    root: i32,
    runtime_dir: PathBuf,
    connections: BTreeMap<i32, UnixStream>,
}

impl SocketAgents {
    pub(crate) fn new(node: NodeId, root: i32, runtime_dir: PathBuf) -> Self {
        Self {
            node,
            root,
            runtime_dir,
            connections: BTreeMap::new(),
        }
    }

    /// Closes all connections, and waits until the agents have closed their ends: a process with an open connection to
    /// the outside cannot be dumped.
    ///
    /// # Errors
    /// An agent keeps its end open.
    pub(crate) fn hang_up(&mut self) -> Result<()> {
        self.connections.clear();
        for _ in 0..200 {
            if !self.any_open_end()? {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!(
            "an agent keeps a connection in {} open",
            self.runtime_dir.display()
        )
    }

    /// Connected sockets that bear the name of an agent of ours: ends of closed connections that are not closed yet.
    fn any_open_end(&self) -> Result<bool> {
        const CONNECTED: &str = "03";
        let members = ProcessTree::of(self.root)?;
        let paths: Vec<_> = members
            .members
            .iter()
            .map(|member| socket::agent_socket(&self.runtime_dir, member.pid))
            .collect();
        // Num RefCount Protocol Flags Type St Inode Path
        let table =
            std::fs::read_to_string("/proc/net/unix").context("cannot read /proc/net/unix")?;
        Ok(table.lines().any(|line| {
            let mut fields = line.split_ascii_whitespace().skip(5);
            fields.next() == Some(CONNECTED)
                && fields
                    .nth(1)
                    .is_some_and(|path| paths.iter().any(|ours| ours == Path::new(path)))
        }))
    }

    fn hello(&mut self, pid: i32) -> Result<Option<Hello>> {
        if !self.connections.contains_key(&pid) {
            match connect(&self.runtime_dir, pid)? {
                Some(stream) => self.connections.insert(pid, stream),
                None => match silence(&self.runtime_dir, pid) {
                    AgentFailure::Ended => return Ok(None),
                    AgentFailure::Broken(why) => bail!(why),
                },
            };
        }
        let request = Request::Hello {
            version: PROTOCOL_VERSION,
        };
        let Some((_, answer)) = self.ask(&[pid], &request).pop() else {
            return Ok(None);
        };
        match answer {
            Ok(Reply::Hello {
                version,
                pid: said,
                phase,
                session,
            }) => {
                if version != PROTOCOL_VERSION {
                    bail!(
                        "it runs with a reverbs that speaks protocol {version}, this command speaks \
                         {PROTOCOL_VERSION}: use the command that came with the job's reverbs"
                    );
                }
                if said != pid {
                    bail!("the agent that listens for it says that it is in process {said}");
                }
                Ok(Some(Hello {
                    process: self.process(pid),
                    phase,
                    session,
                }))
            }
            Ok(Reply::Refused { reason, .. }) => bail!(reason),
            Ok(other) => bail!("it answers Hello with {other:?}"),
            Err(AgentFailure::Ended) => Ok(None),
            Err(AgentFailure::Broken(why)) => bail!(why),
        }
    }

    fn process(&self, pid: i32) -> ProcessId {
        ProcessId {
            node: self.node,
            pid,
        }
    }

    /// All agents of the tree that there are now; or why one that is there cannot be spoken to.
    pub(crate) fn scan(&mut self) -> Vec<Result<Hello, Unreachable>> {
        // A root that has ended may leave children behind, which then are those that are known already.
        let pids = match ProcessTree::of(self.root) {
            Ok(tree) => tree.pids(),
            Err(_) => self.connections.keys().copied().collect(),
        };
        pids.into_iter()
            .filter_map(|pid| {
                self.hello(pid)
                    .map_err(|error| Unreachable {
                        process: self.process(pid),
                        why: format!("{error:#}"),
                    })
                    .transpose()
            })
            .collect()
    }

    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    /// Asks these processes the same, at the same time.
    pub(crate) fn ask_all(
        &mut self,
        targets: &[i32],
        request: &Request,
    ) -> Vec<(ProcessId, Result<Reply, AgentFailure>)> {
        let answers = self.ask(targets, request);
        answers
            .into_iter()
            .map(|(pid, answer)| (self.process(pid), answer))
            .collect()
    }

    fn ask(
        &mut self,
        targets: &[i32],
        request: &Request,
    ) -> Vec<(i32, Result<Reply, AgentFailure>)> {
        let runtime_dir = &self.runtime_dir;
        let mut streams: Vec<_> = targets
            .iter()
            .map(|pid| (*pid, self.connections.remove(pid)))
            .collect();
        let answers: Vec<_> = std::thread::scope(|scope| {
            let waiting: Vec<_> = streams
                .iter_mut()
                .map(|(pid, stream)| {
                    let pid = *pid;
                    let asking = scope.spawn(move || {
                        if stream.is_none() {
                            *stream = connect(runtime_dir, pid)
                                .map_err(|error| AgentFailure::Broken(format!("{error:#}")))?;
                        }
                        let Some(stream) = stream.as_mut() else {
                            return Err(silence(runtime_dir, pid));
                        };
                        exchange(pid, stream, request)
                    });
                    (pid, asking)
                })
                .collect();
            waiting
                .into_iter()
                .map(|(pid, asking)| {
                    let answer = asking
                        .join()
                        .unwrap_or_else(|_| Err(AgentFailure::Broken("asking panicked".into())));
                    (pid, answer)
                })
                .collect()
        });
        for ((pid, stream), (_, answer)) in streams.into_iter().zip(&answers) {
            // After a failure the stream may stand in the middle of a message.
            if let (Some(stream), Ok(_)) = (stream, answer) {
                self.connections.insert(pid, stream);
            }
        }
        answers
    }

    /// Leaves the numbers of the job for processes of this node that open their first device later.
    ///
    /// # Errors
    /// They cannot be left.
    pub(crate) fn publish(&self, numbers: &[ProcessNumbers]) -> Result<()> {
        job_numbers::publish(&self.runtime_dir, self.root, numbers)
            .with_context(|| format!("cannot write into {}", self.runtime_dir.display()))
    }

    /// Who has a queue pair that is none of the job's. `device` is the one that has its address, if that is known.
    ///
    /// # Errors
    /// The host cannot be asked.
    pub(crate) fn whose(&self, peer: &HardwarePeer, device: Option<&str>) -> Result<Whose> {
        owner::whose(peer, device, &ProcessTree::of(self.root)?.pids())
    }
}

/// Every agent of this user, in any job.
///
/// # Errors
/// The runtime folder cannot be read.
pub(crate) fn listening(runtime_dir: &Path) -> Result<Vec<i32>> {
    let entries = std::fs::read_dir(runtime_dir)
        .with_context(|| format!("cannot list {}", runtime_dir.display()))?;
    let mut pids: Vec<i32> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_suffix(".sock")?.parse().ok()
        })
        // What a process has left that was killed.
        .filter(|pid| !tree::agent_is_gone(*pid))
        .collect();
    pids.sort_unstable();
    Ok(pids)
}

/// Asks one agent one thing, over a connection of its own. `None` if there is no agent.
///
/// # Errors
/// It does not answer.
pub(crate) fn ask_once(runtime_dir: &Path, pid: i32, request: &Request) -> Result<Option<Reply>> {
    let Some(mut stream) = connect(runtime_dir, pid)? else {
        return Ok(None);
    };
    match exchange(pid, &mut stream, request) {
        Ok(reply) => Ok(Some(reply)),
        Err(AgentFailure::Ended) => Ok(None),
        Err(AgentFailure::Broken(why)) => bail!("process {pid}: {why}"),
    }
}

/// `None` if nobody listens: no socket, or one that a process of the same id has left.
fn connect(runtime_dir: &Path, pid: i32) -> Result<Option<UnixStream>> {
    let path = socket::agent_socket(runtime_dir, pid);
    let stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot connect to {}", path.display()));
        }
    };
    // The folder is private already; this holds where somebody has changed its mode since.
    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
    if peer.uid != rustix::process::geteuid() {
        bail!(
            "{} is answered by a process of another user",
            path.display()
        );
    }
    Ok(Some(stream))
}

/// Nobody listens. That is as it should be where there is no agent.
fn silence(runtime_dir: &Path, pid: i32) -> AgentFailure {
    if tree::agent_is_gone(pid) {
        return AgentFailure::Ended;
    }
    AgentFailure::Broken(format!(
        "it runs under reverbs, but nobody listens at {}: was that removed? It can be neither checkpointed nor resumed",
        socket::agent_socket(runtime_dir, pid).display()
    ))
}

fn exchange(pid: i32, stream: &mut UnixStream, request: &Request) -> Result<Reply, AgentFailure> {
    let began = Instant::now();
    let outcome = say_and_hear(pid, stream, request);
    outcome.map_err(|error| explain(pid, &error, request, began.elapsed()))
}

fn say_and_hear(pid: i32, stream: &mut UnixStream, request: &Request) -> io::Result<Reply> {
    const FRAME_LIMIT: Duration = Duration::from_secs(10);
    stream.set_write_timeout(Some(FRAME_LIMIT))?;
    stream.set_read_timeout(Some(FRAME_LIMIT))?;
    socket::send(stream, request)?;
    wait_for_reply(pid, stream, patience(request))?;
    socket::receive(stream)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Returns when there is something to read, or nothing to come: the end of the process is watched too, since a child that it
/// has forked keeps its end of the connection open. A process that is stopped all the time is not waited for as long as one
/// that is at work.
fn wait_for_reply(pid: i32, stream: &UnixStream, limit: Duration) -> io::Result<()> {
    const STOPPED_LIMIT: Duration = Duration::from_secs(20);
    const LOOK: Duration = Duration::from_secs(1);
    let process = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let process = match pidfd_open(process, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(()),
        opened => opened?,
    };
    let look = Timespec::try_from(LOOK).map_err(io::Error::other)?;
    let (began, mut seen_at_work) = (Instant::now(), Instant::now());
    let mut files = [
        PollFd::new(stream, PollFlags::IN),
        PollFd::new(&process, PollFlags::IN),
    ];
    loop {
        if !tree::is_stopped(pid) {
            seen_at_work = Instant::now();
        }
        if began.elapsed() >= limit || seen_at_work.elapsed() >= STOPPED_LIMIT {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match poll(&mut files, Some(&look)) {
            Ok(0) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) if files[0].revents().is_empty() => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(_) => return Ok(()),
        }
    }
}

/// How long an answer may take. What the agent bounds itself gets a margin; rebuilding registers memory, which takes
/// about 0.3 s a GiB, and emulated machines are fifty times slower than real ones.
pub(crate) fn patience(request: &Request) -> Duration {
    const MARGIN: Duration = Duration::from_secs(20);
    match request {
        Request::Hello { .. } | Request::Begin { .. } => Duration::from_secs(10),
        Request::Close { limit_ms }
        | Request::Drain { limit_ms, .. }
        | Request::Stop { limit_ms } => Duration::from_millis(*limit_ms) + MARGIN,
        Request::Examine
        | Request::Peers
        | Request::GiveUp { .. }
        | Request::Responders
        | Request::Settle { .. }
        | Request::Publish
        | Request::Resume
        | Request::Status => Duration::from_secs(60),
        Request::Release | Request::Rebuild { .. } | Request::Connect { .. } => {
            Duration::from_secs(600)
        }
    }
}

fn explain(pid: i32, error: &io::Error, request: &Request, waited: Duration) -> AgentFailure {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => {
            if tree::agent_is_gone(pid) {
                AgentFailure::Ended
            } else {
                AgentFailure::Broken(format!(
                    "its agent has closed the connection in the middle of \"{}\"",
                    request.name()
                ))
            }
        }
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => AgentFailure::Broken(format!(
            "no answer to \"{}\" within {} s: {}",
            request.name(),
            waited.as_secs(),
            tree::why_silent(pid)
        )),
        _ => AgentFailure::Broken(format!("cannot speak with its agent: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::{Child, Command};

    use rustix::process::{Signal, kill_process};

    use super::*;

    /// A process in whose name somebody listens who never answers, as a forked child of a dead process would.
    fn mute() -> (Child, i32, tempfile::TempDir, UnixListener) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(socket::agent_socket(folder.path(), pid)).unwrap();
        (child, pid, folder, listener)
    }

    fn signal(pid: i32, signal: Signal) {
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    #[test]
    fn the_end_of_a_process_ends_the_wait_for_its_answer() {
        let (mut child, pid, folder, _listener) = mute();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            signal(pid, Signal::KILL);
            child.wait().unwrap();
        });
        let began = Instant::now();
        let mut agents = SocketAgents::new(NodeId::FIRST, pid, folder.path().to_owned());
        let answers = agents.ask(&[pid], &Request::Release);
        assert_eq!(answers, [(pid, Err(AgentFailure::Ended))]);
        assert!(began.elapsed() < Duration::from_secs(10));
        killer.join().unwrap();
    }

    #[test]
    fn one_that_is_stopped_is_named_with_the_remedy() {
        let (mut child, pid, folder, _listener) = mute();
        signal(pid, Signal::STOP);
        let hello = Request::Hello {
            version: PROTOCOL_VERSION,
        };
        let error = ask_once(folder.path(), pid, &hello)
            .unwrap_err()
            .to_string();
        let told = format!(
            "process {pid}: no answer to \"hello\" within 10 s: it is stopped, `kill -CONT {pid}`"
        );
        assert!(error.starts_with(&told), "{error}");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_with_an_agent_that_cannot_be_reached_is_not_one_without() {
        let folder = tempfile::tempdir().unwrap();
        let us = std::process::id().cast_signed();
        let (started, ready) = std::sync::mpsc::channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let agent = std::thread::Builder::new().name(socket::AGENT_THREAD.into());
        let agent = agent.spawn(move || {
            started.send(()).unwrap();
            let _ = ends.recv();
        });
        ready.recv().unwrap();
        let mut agents = SocketAgents::new(NodeId::FIRST, us, folder.path().to_owned());
        let failure = agents.hello(us).unwrap_err().to_string();
        assert!(failure.contains("was that removed?"), "{failure}");
        drop(end);
        agent.unwrap().join().unwrap();
        assert_eq!(agents.hello(us).unwrap(), None);
    }
}
