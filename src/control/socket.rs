//! Where an agent listens, and how a message is framed.
//!
//! Sockets live in a folder that only its user can enter: `$REVERBS_RUNTIME_DIR`, or `/tmp/reverbs-UID`. The name is the
//! process id, so that a process restored by CRIU under its old id is found under its old name.

use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};

/// A frame larger than this is refused: 10,000 queue pairs and 10,000 keys in each of 100 processes stay below it.
pub const LARGEST_FRAME: u32 = 512 << 20;

/// The name of the agent's thread, as `ps -L` shows it.
pub const AGENT_THREAD: &str = "reverbs";

/// The folder of this user's agents; made, mode 0700, if it is not there.
///
/// # Errors
/// It cannot be made, or it is not a folder that belongs to this user alone: then somebody else could listen in our name.
pub fn runtime_dir() -> io::Result<PathBuf> {
    // SAFETY: geteuid cannot fail and touches no memory.
    let user = unsafe { libc::geteuid() };
    let dir = std::env::var_os("REVERBS_RUNTIME_DIR").map_or_else(
        || PathBuf::from(format!("/tmp/reverbs-{user}")),
        PathBuf::from,
    );
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = std::fs::symlink_metadata(&dir)?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "{} must be a folder of user {user} with mode 0700; remove it or set REVERBS_RUNTIME_DIR",
                dir.display()
            ),
        ));
    }
    Ok(dir)
}

/// The socket of the agent in process `pid`.
#[must_use]
pub fn agent_socket(runtime_dir: &Path, pid: i32) -> PathBuf {
    runtime_dir.join(format!("{pid}.sock"))
}

/// Writes one message.
///
/// # Errors
/// Those of the stream.
pub fn send<T: Serialize>(stream: &mut impl Write, message: &T) -> io::Result<()> {
    send_frame(stream, &serde_json::to_vec(message)?)
}

/// Writes the bytes of one message.
///
/// # Errors
/// Those of the stream.
pub fn send_frame(stream: &mut impl Write, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len())
        .ok()
        .filter(|length| *length <= LARGEST_FRAME)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "message too large"))?;
    stream.write_all(&length.to_le_bytes())?;
    stream.write_all(body)?;
    stream.flush()
}

/// Reads one message; `None` if the other end closed before one began.
///
/// # Errors
/// Those of the stream; a frame over the limit; bytes that are not this message.
pub fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<Option<T>> {
    Incoming::default().receive(stream)
}

/// A message that may arrive in pieces.
#[derive(Debug, Default)]
pub struct Incoming {
    /// Of one frame, with its length in front.
    bytes: Vec<u8>,
}

impl Incoming {
    const LENGTH: usize = size_of::<u32>();

    /// Nothing of the next message has arrived yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Reads the rest of a message; `None` if the other end closed before one began.
    ///
    /// # Errors
    /// Those of the stream; a frame over the limit; bytes that are not this message. After `WouldBlock` and `TimedOut` it can
    /// be called again, and goes on where it was.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        stream: &mut impl Read,
    ) -> io::Result<Option<T>> {
        match self.frame(stream)? {
            Some(body) => Ok(Some(serde_json::from_slice(&body)?)),
            None => Ok(None),
        }
    }

    /// As [`Incoming::receive`], but gives the bytes of the message.
    ///
    /// # Errors
    /// As there.
    pub fn frame(&mut self, stream: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
        loop {
            let have = self.bytes.len();
            let missing = self.frame_length()? - have;
            if missing == 0 {
                let mut frame = std::mem::take(&mut self.bytes);
                frame.drain(..Self::LENGTH);
                return Ok(Some(frame));
            }
            // Memory is taken as bytes arrive, whatever length was announced. Before an error, too, what has arrived is kept.
            let read = stream
                .by_ref()
                .take(missing as u64)
                .read_to_end(&mut self.bytes)?;
            match read {
                0 if have == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => {}
            }
        }
    }

    /// As far as it is known: at least that of the length itself.
    fn frame_length(&self) -> io::Result<usize> {
        let Some(length) = self.bytes.first_chunk() else {
            return Ok(Self::LENGTH);
        };
        let length = u32::from_le_bytes(*length);
        if length > LARGEST_FRAME {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a message of {length} bytes is over the limit of {LARGEST_FRAME}"),
            ));
        }
        Ok(Self::LENGTH + length as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives what it has in pieces of that many bytes, and blocks after each.
    struct Drips<'a>(&'a [u8], usize, bool);

    impl Read for Drips<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.2 = !self.2;
            if self.2 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let piece = self.1.min(buffer.len()).min(self.0.len());
            buffer[..piece].copy_from_slice(&self.0[..piece]);
            self.0 = &self.0[piece..];
            Ok(piece)
        }
    }

    fn frame(message: &str) -> Vec<u8> {
        let mut frame = Vec::new();
        send(&mut frame, &message).unwrap();
        frame
    }

    #[test]
    fn messages_that_arrive_in_pieces_are_whole_and_in_order() {
        let long = "x".repeat(100_000);
        let both = [frame(&long), frame("next")].concat();
        for piece in [1, 3, 7, 50_000, usize::MAX] {
            let mut stream = Drips(&both, piece, false);
            let mut incoming = Incoming::default();
            let mut received = Vec::new();
            while received.len() < 3 {
                match incoming.receive::<String>(&mut stream) {
                    Ok(message) => received.push(message),
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
            assert_eq!(
                received,
                [Some(long.clone()), Some("next".to_owned()), None],
                "{piece}"
            );
        }
    }

    #[test]
    fn a_frame_that_breaks_off_or_means_nothing_is_an_error() {
        let kind = |bytes: &[u8]| receive::<String>(&mut &bytes[..]).unwrap_err().kind();
        let whole = frame("whole");
        for length in 1..whole.len() {
            assert_eq!(kind(&whole[..length]), io::ErrorKind::UnexpectedEof);
        }
        assert_eq!(kind(&[0; 4]), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(&u32::MAX.to_le_bytes()), io::ErrorKind::InvalidData);
        assert_eq!(kind(b"\x02\0\0\0{]"), io::ErrorKind::InvalidData);
    }

    #[test]
    fn an_announced_length_takes_no_memory() {
        let mut incoming = Incoming::default();
        let announced = LARGEST_FRAME.to_le_bytes();
        let mut stream = Drips(&announced, announced.len(), true);
        let blocked = incoming.receive::<String>(&mut stream).unwrap_err();
        assert_eq!(blocked.kind(), io::ErrorKind::WouldBlock);
        assert!(incoming.bytes.capacity() <= 64 << 10);
    }
}
