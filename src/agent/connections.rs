//! Those who ask. Whoever is slow, silent or talks nonsense does not keep the agent from its work for the others.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::net::RecvFlags;

use super::serve::State;
use crate::control::message::{Phase, Reply};
use crate::control::socket::{self, Incoming};

/// How long a message may take to arrive once it has begun, the first one of a connection to begin and arrive, and a reply
/// to be taken.
const FRAME_LIMIT: Duration = Duration::from_secs(10);
/// More are not kept: they are descriptors of the application's process.
const MOST: usize = 32;
/// For at most so long nobody new is let in after a failure to do so.
const REST: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Connections {
    listener: UnixListener,
    list: Vec<Connection>,
    /// No descriptor was left for a new one. Not a moment in time: the process may wake up under another clock.
    rests: bool,
}

impl Connections {
    pub(super) fn new(listener: UnixListener) -> Self {
        Self {
            listener,
            list: Vec::new(),
            rests: false,
        }
    }

    /// What to wait for: the listener (or -1 while it rests), then each connection.
    pub(super) fn files(&self) -> Vec<RawFd> {
        let listener = if self.rests {
            -1
        } else {
            self.listener.as_raw_fd()
        };
        let connections = self.list.iter().map(|one| one.stream.as_raw_fd());
        std::iter::once(listener).chain(connections).collect()
    }

    /// When something has to be done although nobody says anything.
    pub(super) fn next_limit(&self) -> Option<Instant> {
        let frames = self.list.iter().filter_map(|one| one.must_arrive_by);
        let rest = self.rests.then(|| Instant::now() + REST);
        frames.chain(rest).min()
    }

    /// All that is open.
    pub(super) fn open_files(&self) -> Vec<RawFd> {
        let connections = self.list.iter().map(|one| one.stream.as_raw_fd());
        connections.chain([self.listener.as_raw_fd()]).collect()
    }

    /// Answers whoever has asked; `ready` is about the files of [`Connections::files`]. Gives the connections that are to be
    /// closed.
    #[must_use]
    pub(super) fn serve(&mut self, ready: &[bool], state: &mut State) -> Vec<Connection> {
        let now = Instant::now();
        let mut released_for = None;
        let mut ended = Vec::new();
        let mut stay = Vec::new();
        for (mut connection, is_ready) in self.list.drain(..).zip(&ready[1..]) {
            let was_released = state.phase() >= Phase::Released;
            let stays = if *is_ready {
                connection.serve(state)
            } else {
                connection.must_arrive_by.is_none_or(|limit| now < limit)
            };
            if !was_released && state.phase() >= Phase::Released {
                released_for = Some(connection.stream.as_raw_fd());
            }
            match stays {
                true => stay.push(connection),
                false => ended.push(connection),
            }
        }
        if let Some(orchestrator) = released_for {
            // A process with a connection to the outside cannot be dumped.
            let others = |one: &mut Connection| one.stream.as_raw_fd() != orchestrator;
            ended.extend(stay.extract_if(.., others));
        }
        self.list = stay;
        self.rests = false;
        ended
    }

    /// Lets in whoever is `waiting`.
    pub(super) fn accept(&mut self, waiting: bool) {
        while waiting && !self.rests {
            match self.listener.accept() {
                Ok((stream, _)) => self.add(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {}
                Err(error) => {
                    // Waiting for the listener would not wait at all.
                    tracing::warn!(%error, "cannot let anybody in");
                    self.rests = true;
                }
            }
        }
    }

    fn add(&mut self, stream: UnixStream) {
        if !is_same_user(&stream) || stream.set_write_timeout(Some(FRAME_LIMIT)).is_err() {
            return;
        }
        if self.list.len() >= MOST {
            let silent = self.list.iter().position(|one| !one.has_asked);
            self.list.remove(silent.unwrap_or(0));
        }
        self.list.push(Connection {
            stream,
            incoming: Incoming::default(),
            must_arrive_by: Some(Instant::now() + FRAME_LIMIT),
            has_asked: false,
        });
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    incoming: Incoming,
    /// The limit of a message that has begun, or of the first.
    must_arrive_by: Option<Instant>,
    has_asked: bool,
}

impl Connection {
    /// Answers a request that is there; `false` if the connection is at its end.
    fn serve(&mut self, state: &mut State) -> bool {
        let request = match self.incoming.receive(&mut WhatIsThere(&self.stream)) {
            Ok(Some(request)) => request,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let limit = || Instant::now() + FRAME_LIMIT;
                let limit = *self.must_arrive_by.get_or_insert_with(limit);
                return Instant::now() < limit;
            }
            Ok(None) | Err(_) => return false,
        };
        self.must_arrive_by = None;
        self.has_asked = true;
        // What an orchestrator wanted that is not there any more is not begun: who takes over asks again.
        if self.is_closed() {
            return false;
        }
        let reply =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| state.answer(request)));
        let reply = reply.unwrap_or_else(|_| Reply::Refused {
            phase: Phase::Running,
            reason: "the agent met a defect of its own; see its log".into(),
        });
        socket::send(&mut self.stream, &reply).is_ok()
    }

    fn is_closed(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut next = [0];
        match rustix::net::recv(&self.stream, &mut next, flags) {
            Ok((_, read)) => read == 0,
            Err(error) => error != rustix::io::Errno::AGAIN,
        }
    }
}

/// Reading without waiting, from a stream whose writing waits.
struct WhatIsThere<'a>(&'a UnixStream);

impl Read for WhatIsThere<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (_, read) = rustix::net::recv(self.0, buffer, RecvFlags::DONTWAIT)?;
        Ok(read)
    }
}

fn is_same_user(connection: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(connection)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::control::message::{PROTOCOL_VERSION, Request, Session};

    struct Agent {
        folder: tempfile::TempDir,
        connections: Connections,
        state: State,
    }

    impl Agent {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
            listener.set_nonblocking(true).unwrap();
            Self {
                folder,
                connections: Connections::new(listener),
                state: State::default(),
            }
        }

        fn connect(&mut self) -> UnixStream {
            let client = UnixStream::connect(self.folder.path().join("socket")).unwrap();
            client.set_nonblocking(true).unwrap();
            self.turn();
            client
        }

        fn turn(&mut self) {
            let ready = vec![true; self.connections.files().len()];
            drop(self.connections.serve(&ready, &mut self.state));
            self.connections.accept(true);
        }

        fn answers(&mut self, client: &mut UnixStream) -> bool {
            let version = PROTOCOL_VERSION;
            socket::send(client, &Request::Hello { version }).unwrap();
            self.turn();
            matches!(socket::receive(client), Ok(Some(Reply::Hello { .. })))
        }
    }

    fn begin() -> Request {
        let id = "of a test".to_owned();
        Request::Begin {
            session: Session { id, pid: 1 },
            takeover: false,
        }
    }

    #[test]
    fn half_a_message_keeps_nobody_waiting_and_is_completed_later() {
        let mut agent = Agent::new();
        let mut frame = Vec::new();
        socket::send(&mut frame, &begin()).unwrap();
        let (first, second) = frame.split_at(frame.len() / 2);
        let mut slow = agent.connect();
        slow.write_all(first).unwrap();
        let mut other = agent.connect();
        assert!(agent.answers(&mut other));
        slow.write_all(second).unwrap();
        agent.turn();
        let reply: Option<Reply> = socket::receive(&mut slow).unwrap();
        assert!(matches!(reply, Some(Reply::Done { .. })), "{reply:?}");
    }

    #[test]
    fn a_request_of_one_who_has_gone_is_not_begun() {
        let mut agent = Agent::new();
        let mut dead = agent.connect();
        socket::send(&mut dead, &begin()).unwrap();
        drop(dead);
        agent.turn();
        assert!(agent.connections.list.is_empty());
        let mut other = agent.connect();
        let version = PROTOCOL_VERSION;
        socket::send(&mut other, &Request::Hello { version }).unwrap();
        agent.turn();
        let reply: Option<Reply> = socket::receive(&mut other).unwrap();
        let Some(Reply::Hello { session, .. }) = reply else {
            panic!("{reply:?}");
        };
        assert_eq!(session, None);
    }

    #[test]
    fn of_too_many_the_silent_ones_go_first() {
        let mut agent = Agent::new();
        let mut first = agent.connect();
        assert!(agent.answers(&mut first));
        let crowd: Vec<_> = (0..3 * MOST).map(|_| agent.connect()).collect();
        assert_eq!(agent.connections.list.len(), MOST);
        assert!(agent.answers(&mut first));
        drop(crowd);
        agent.turn();
        assert_eq!(agent.connections.list.len(), 1);
    }

    #[test]
    fn silence_and_unfinished_messages_have_a_limit() {
        let mut agent = Agent::new();
        let silent = agent.connect();
        assert!(agent.connections.next_limit().is_some());
        let past = Instant::now().checked_sub(FRAME_LIMIT).unwrap();
        agent.connections.list[0].must_arrive_by = Some(past);
        agent.turn();
        assert!(agent.connections.list.is_empty());
        drop(silent);

        let mut asked = agent.connect();
        assert!(agent.answers(&mut asked));
        assert_eq!(agent.connections.next_limit(), None);
        asked.write_all(&[1]).unwrap();
        agent.turn();
        assert!(agent.connections.next_limit().is_some());
    }
}
