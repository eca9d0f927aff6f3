//! A connection between two nodes, over the standard input and output of a command that a launcher has started.
//!
//! Each frame carries an HMAC-SHA256 (RFC 2104) over its number, under a key of its own for each direction of each
//! connection: what somebody else has written, or has recorded and repeats, is refused. Both ends send a beat every two
//! seconds, so an end that has said nothing for [`SILENCE`] is gone or cut off.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use rustix::event::PollFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use reverbs::control::socket::{Incoming, send_frame};

use super::stream::{SILENCE, is_ready, never_block, wait_for};
use crate::command::secret::Secret;

const BEAT: Duration = Duration::from_secs(2);
const MAC_BYTES: usize = 32;

/// What both ends have told each other before the first frame, so that no two connections have the same keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    pub(super) from_parent: String,
    pub(super) from_child: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Nearer to the first node.
    Parent,
    Child,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Frame<T> {
    Message { message: T },
    Beat { beat: bool },
}

/// One direction: its key, and the number of the next frame.
struct Sealer {
    key: Hmac<Sha256>,
    number: u64,
}

impl Sealer {
    fn new(secret: &Secret, greeting: &Greeting, from: End) -> Self {
        let Greeting {
            from_parent,
            from_child,
        } = greeting;
        Self {
            key: secret.key(&format!("{from:?} {from_parent} {from_child}")),
            number: 0,
        }
    }

    fn next(&mut self, body: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.key.clone();
        mac.update(&self.number.to_le_bytes());
        mac.update(body);
        self.number += 1;
        mac
    }
}

/// The end that reads.
pub(super) struct Reader {
    stream: File,
    incoming: Incoming,
    sealer: Sealer,
}

/// The end that writes, also from other threads.
#[derive(Clone)]
pub(super) struct Writer(Arc<Mutex<WriterEnd>>);

struct WriterEnd {
    /// `None` once it is closed.
    stream: Option<File>,
    sealer: Sealer,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Writer").finish_non_exhaustive()
    }
}

/// Begins frames on two streams that have carried greetings.
///
/// # Errors
/// The streams do not support polling.
pub(super) fn begin(
    us: End,
    input: OwnedFd,
    output: OwnedFd,
    secret: &Secret,
    greeting: &Greeting,
) -> io::Result<(Reader, Writer)> {
    for stream in [input.as_fd(), output.as_fd()] {
        never_block(stream)?;
    }
    let them = match us {
        End::Parent => End::Child,
        End::Child => End::Parent,
    };
    let reader = Reader {
        stream: input.into(),
        incoming: Incoming::default(),
        sealer: Sealer::new(secret, greeting, them),
    };
    let writer = WriterEnd {
        stream: Some(output.into()),
        sealer: Sealer::new(secret, greeting, us),
    };
    Ok((reader, Writer(Arc::new(Mutex::new(writer)))))
}

impl Reader {
    /// The next message; `None` when the other end has closed.
    ///
    /// # Errors
    /// It has been silent for too long, or says what is not ours.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        loop {
            let Some(frame) = self.frame()? else {
                return Ok(None);
            };
            let Some((mac, body)) = frame.split_at_checked(MAC_BYTES) else {
                return Err(ErrorKind::InvalidData.into());
            };
            if self.sealer.next(body).verify_slice(mac).is_err() {
                return Err(io::Error::new(
                    ErrorKind::PermissionDenied,
                    "a message that was not made with the secret of the job",
                ));
            }
            if let Frame::Message { message } = serde_json::from_slice(body)? {
                return Ok(Some(message));
            }
        }
    }

    fn frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        let until = Instant::now() + SILENCE;
        loop {
            match self.incoming.frame(&mut self.stream) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
            wait_for(&self.stream, PollFlags::IN, until)?;
        }
    }
}

impl Writer {
    /// # Errors
    /// The other end takes nothing any more.
    pub(super) fn send<T: Serialize>(&self, message: &T) -> io::Result<()> {
        self.lock().write(&Frame::Message { message })
    }

    /// Where nobody reads, as they have other things to do, nobody misses a beat: nothing that was begun may wait.
    fn beat(&self) -> io::Result<()> {
        let mut end = self.lock();
        let Some(stream) = &end.stream else {
            return Err(ErrorKind::BrokenPipe.into());
        };
        match is_ready(stream, PollFlags::OUT)? {
            true => end.write::<()>(&Frame::Beat { beat: true }),
            false => Ok(()),
        }
    }

    /// The other end reads an end of file.
    pub(super) fn close(&self) {
        self.lock().stream = None;
    }

    fn lock(&self) -> MutexGuard<'_, WriterEnd> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WriterEnd {
    fn write<T: Serialize>(&mut self, frame: &Frame<T>) -> io::Result<()> {
        let body = serde_json::to_vec(frame)?;
        let mut sealed = self.sealer.next(&body).finalize().into_bytes().to_vec();
        sealed.extend_from_slice(&body);
        let mut bytes = Vec::with_capacity(sealed.len() + size_of::<u32>());
        send_frame(&mut bytes, &sealed)?;
        let mut left = bytes.as_slice();
        let stream = self.stream.as_mut().ok_or(ErrorKind::BrokenPipe)?;
        while !left.is_empty() {
            match stream.write(left) {
                Ok(written) => left = &left[written..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait_for(stream, PollFlags::OUT, Instant::now() + SILENCE)?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Sends beats on a connection while it lives.
#[derive(Debug)]
pub(super) struct Keeper {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(super) fn of(writer: Writer) -> Self {
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(BEAT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                // One that is gone is noticed by who waits for its answer.
                let _ = writer.beat();
            }
        });
        Self {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(secrets: [&Secret; 2]) -> (Reader, Writer) {
        let greeting = Greeting {
            from_parent: "one".into(),
            from_child: "two".into(),
        };
        let (reader, writer) = io::pipe().unwrap();
        let (unread, unwritten) = io::pipe().unwrap();
        let (_, writer) = begin(
            End::Parent,
            unread.into(),
            writer.into(),
            secrets[0],
            &greeting,
        )
        .unwrap();
        let (reader, _) = begin(
            End::Child,
            reader.into(),
            unwritten.into(),
            secrets[1],
            &greeting,
        )
        .unwrap();
        (reader, writer)
    }

    #[test]
    fn messages_arrive_in_order_and_beats_do_not_count() {
        let secret = Secret::fresh().unwrap();
        let (mut reader, writer) = pair([&secret, &secret]);
        let long = "x".repeat(1 << 20);
        let sender = std::thread::spawn({
            let (long, writer) = (long.clone(), writer);
            move || {
                writer.send(&"first").unwrap();
                writer.beat().unwrap();
                writer.send(&long).unwrap();
            }
        });
        assert_eq!(
            reader.receive::<String>().unwrap().as_deref(),
            Some("first")
        );
        assert_eq!(reader.receive::<String>().unwrap(), Some(long));
        sender.join().unwrap();
        assert_eq!(reader.receive::<String>().unwrap(), None);
    }

    #[test]
    fn what_was_made_with_another_secret_or_is_repeated_is_refused() {
        let (ours, other) = (Secret::fresh().unwrap(), Secret::fresh().unwrap());
        let (mut reader, writer) = pair([&other, &ours]);
        writer.send(&"stranger").unwrap();
        let refused = reader.receive::<String>().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);

        let (mut reader, writer) = pair([&ours, &ours]);
        writer.send(&"once").unwrap();
        writer.lock().sealer.number = 0;
        writer.send(&"once").unwrap();
        assert!(reader.receive::<String>().unwrap().is_some());
        let refused = reader.receive::<String>().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    }
}
