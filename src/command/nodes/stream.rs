//! Standard input and output of commands on other nodes: nobody waits for them without an end.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::command::interrupt::Interrupt;

/// How long the other end may say nothing.
pub(super) const SILENCE: Duration = Duration::from_secs(20);

pub(super) fn never_block(stream: BorrowedFd<'_>) -> io::Result<()> {
    Ok(fcntl_setfl(
        stream,
        fcntl_getfl(stream)? | OFlags::NONBLOCK,
    )?)
}

pub(super) fn is_ready(stream: &File, what: PollFlags) -> io::Result<bool> {
    match poll(&mut [PollFd::new(stream, what)], Some(&Timespec::default())) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn wait_for(stream: &File, what: PollFlags, until: Instant) -> io::Result<()> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(stream, what)], Some(&left)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads a line of at most `limit` bytes, and no byte more.
///
/// # Errors
/// Those of the stream; a longer line; nothing for [`SILENCE`].
pub(super) fn read_line(stream: &mut File, limit: usize) -> io::Result<String> {
    let mut line = Vec::new();
    let until = Instant::now() + SILENCE;
    loop {
        wait_for(stream, PollFlags::IN, until)?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) if byte[0] == b'\n' => break,
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if line.len() > limit {
            return Err(ErrorKind::InvalidData.into());
        }
    }
    String::from_utf8(line).map_err(|_| ErrorKind::InvalidData.into())
}

/// Much data on a stream: each wait for more ends after [`SILENCE`], or with Ctrl-C.
#[derive(Debug)]
pub(super) struct Flow<'a> {
    stream: File,
    interrupt: &'a Interrupt,
    /// Bytes that went through.
    count: &'a AtomicU64,
}

impl<'a> Flow<'a> {
    /// # Errors
    /// The stream does not support polling.
    pub(super) fn over(
        stream: File,
        interrupt: &'a Interrupt,
        count: &'a AtomicU64,
    ) -> io::Result<Self> {
        use std::os::fd::AsFd;
        never_block(stream.as_fd())?;
        Ok(Self {
            stream,
            interrupt,
            count,
        })
    }

    fn pass(
        &mut self,
        what: PollFlags,
        mut some: impl FnMut(&mut File) -> io::Result<usize>,
    ) -> io::Result<usize> {
        const LOOK: Duration = Duration::from_millis(200);
        let until = Instant::now() + SILENCE;
        loop {
            match some(&mut self.stream) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                passed => {
                    self.count
                        .fetch_add(*passed.as_ref().unwrap_or(&0) as u64, Ordering::Relaxed);
                    return passed;
                }
            }
            if self.interrupt.is_set() {
                return Err(io::Error::other("interrupted"));
            }
            match wait_for(&self.stream, what, until.min(Instant::now() + LOOK)) {
                Err(error) if error.kind() == ErrorKind::TimedOut && Instant::now() < until => {}
                other => other?,
            }
        }
    }
}

impl Read for Flow<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.pass(PollFlags::IN, |stream| stream.read(buffer))
    }
}

impl Write for Flow<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pass(PollFlags::OUT, |stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
