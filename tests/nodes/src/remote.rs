//! The nodes' remote shell: what `rsh HOST COMMAND...` and the first process of HOST say to each other.
//!
//! It is ssh as far as its users can tell. The words are joined by spaces and read by the remote shell; standard input,
//! output, error and the exit status are passed through; 255 means that the way is broken. The bytes take the nodes' own
//! network, so that a node that is cut off cannot be reached by it either.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};

/// Where the first process of each node listens.
pub const PORT: u16 = 514;

/// What ssh answers for its own failures.
pub const BROKEN: u8 = 255;

const LARGEST: usize = 64 << 10;

/// What a frame carries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    Command = 1,
    /// For the command's standard input; an empty one is its end.
    Input,
    Output,
    Errors,
    /// One byte, the last frame.
    Status,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [
            Self::Command,
            Self::Input,
            Self::Output,
            Self::Errors,
            Self::Status,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// Writes one frame.
///
/// # Errors
/// When the other end is gone.
pub fn send(to: &mut impl Write, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut frame = vec![kind as u8];
    frame.extend(length.to_be_bytes());
    frame.extend(bytes);
    to.write_all(&frame)
}

/// Reads one frame.
///
/// # Errors
/// When the other end is gone, or speaks another language.
pub fn receive(from: &mut impl Read) -> Result<(Kind, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let kind = Kind::of(kind).with_context(|| format!("a frame of kind {kind}"))?;
    let length = u32::from_be_bytes(length) as usize;
    ensure!(length <= LARGEST, "a frame of {length} bytes");
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok((kind, bytes))
}

/// Hands on what can be read as frames of this kind, until the end.
///
/// # Errors
/// When either side breaks.
pub fn pump(
    mut from: impl Read,
    kind: Kind,
    mut send: impl FnMut(Kind, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; LARGEST];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            read => send(kind, &buffer[..read])?,
        }
    }
}

/// `rsh HOST COMMAND...`
pub fn run(words: &[String]) -> ExitCode {
    let [host, words @ ..] = words else {
        eprintln!("rsh: usage: rsh HOST COMMAND...");
        return ExitCode::from(BROKEN);
    };
    match talk(host, &words.join(" ")) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("rsh: {host}: {error:#}");
            ExitCode::from(BROKEN)
        }
    }
}

fn talk(host: &str, command: &str) -> Result<u8> {
    let mut stream = TcpStream::connect((host, PORT))?;
    stream.set_nodelay(true)?;
    send(&mut stream, Kind::Command, command.as_bytes())?;
    let mut input = stream.try_clone()?;
    // It ends with this process: nobody waits for it.
    std::thread::spawn(move || {
        // The other end may have ended without reading all of it.
        let _ = pump(io::stdin(), Kind::Input, |kind, bytes| {
            send(&mut input, kind, bytes)
        });
        let _ = send(&mut input, Kind::Input, &[]);
    });
    loop {
        match receive(&mut stream)? {
            (Kind::Output, bytes) => {
                let mut out = io::stdout().lock();
                out.write_all(&bytes).and_then(|()| out.flush())?;
            }
            (Kind::Errors, bytes) => io::stderr().write_all(&bytes)?,
            (Kind::Status, bytes) => return bytes.first().copied().context("an empty status"),
            (kind, _) => bail!("an answer of kind {kind:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_arrive_as_they_were_sent() {
        let mut bytes = Vec::new();
        send(&mut bytes, Kind::Output, b"some text").unwrap();
        send(&mut bytes, Kind::Input, b"").unwrap();
        let mut reader = bytes.as_slice();
        assert_eq!(
            receive(&mut reader).unwrap(),
            (Kind::Output, b"some text".to_vec())
        );
        assert_eq!(receive(&mut reader).unwrap(), (Kind::Input, Vec::new()));
        receive(&mut reader).unwrap_err();
        receive(&mut [9_u8, 0, 0, 0, 0].as_slice()).unwrap_err();
        receive(&mut [1_u8, 255, 0, 0, 0].as_slice()).unwrap_err();
    }
}
