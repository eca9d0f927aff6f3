//! Where an agent listens, and how a message is framed.
//!
//! Sockets live in a folder that only its user can enter: `$REVERBS_RUNTIME_DIR`, or `/tmp/reverbs-UID`. The name is the
//! process id, so that a process restored by CRIU under its old id is found under its old name.

use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};

/// A frame larger than this is refused: 10,000 queue pairs and 10,000 keys in each of 100 processes stay below it.
const LARGEST_FRAME: u32 = 512 << 20;

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
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|length| *length <= LARGEST_FRAME)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "message too large"))?;
    stream.write_all(&length.to_le_bytes())?;
    stream.write_all(&body)?;
    stream.flush()
}

/// Reads one message; `None` if the other end closed before one began.
///
/// # Errors
/// Those of the stream; a frame over the limit; bytes that are not this message.
pub fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u32::from_le_bytes(length);
    if length > LARGEST_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {length} bytes is over the limit of {LARGEST_FRAME}"),
        ));
    }
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}
