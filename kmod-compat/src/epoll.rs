//! Epoll registrations of one descriptor number: found, taken off, put back.
//!
//! The kernel keys a registration by (open file, number). Once another file is under the number,
//! `epoll_ctl` can no longer name the old registration; so it has to come off first.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

use crate::fds::{self, FdError, Process};

/// An epoll instance that has entries for a number.
#[derive(Debug)]
pub(crate) struct Watcher {
    /// The application's number of the instance, for messages.
    pub(crate) epoll_number: RawFd,
    /// Our own hold on the instance: its number may be closed or reused meanwhile.
    epoll: OwnedFd,
    /// More than one when an entry is left over from an earlier file under the number.
    entries: Vec<Entry>,
}

/// What an instance watches for, and what it answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    events: EventFlags,
    data: u64,
}

/// A registration that was taken off and can be put back.
#[derive(Debug)]
pub(crate) struct Registration {
    /// The application's number of the instance, for messages.
    pub(crate) epoll_number: RawFd,
    epoll: OwnedFd,
    entry: Entry,
}

impl Watcher {
    /// Takes off the registration of the file that is under `watched` now, if there is one.
    ///
    /// There is none when the application took it off meanwhile, when the same instance was
    /// already served under another of its numbers, or when all entries are left over.
    pub(crate) fn take_off(
        mut self,
        watched: BorrowedFd<'_>,
    ) -> Result<Option<Registration>, TakeOffError> {
        match epoll::delete(&self.epoll, watched) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(TakeOffError::Refused(error.into())),
        }
        // Only the entry of this file is gone; the others do not belong to it.
        if self.entries.len() > 1 {
            for left in
                read_entries(&self.epoll, watched.as_raw_fd()).map_err(TakeOffError::Lost)?
            {
                if self.entries.len() > 1
                    && let Some(position) = self.entries.iter().position(|entry| *entry == left)
                {
                    self.entries.remove(position);
                }
            }
        }
        let Self {
            epoll_number,
            epoll,
            entries,
        } = self;
        Ok(entries.first().map(|entry| Registration {
            epoll_number,
            epoll,
            entry: *entry,
        }))
    }
}

/// Why a registration was not taken off, or cannot be put back.
#[derive(Debug)]
pub(crate) enum TakeOffError {
    /// It is still there.
    Refused(io::Error),
    /// It is off, and what it was cannot be read.
    Lost(FdError),
}

impl Registration {
    /// Registers the file that is under the number now, with the same events and data.
    pub(crate) fn put_back(&self, watched: BorrowedFd<'_>) -> io::Result<()> {
        let Entry { events, data } = self.entry;
        match epoll::add(&self.epoll, watched, EventData::new_u64(data), events) {
            // Somebody else registered it in between: the application, which then means it.
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// All epoll instances of this process that have an entry for `number`.
///
/// An instance that only another process holds cannot be seen.
pub(crate) fn watchers_of(number: RawFd) -> Result<Vec<Watcher>, FdError> {
    let mut found = Vec::new();
    for (epoll_number, target) in fds::open_files(Process::Own)? {
        if target != "anon_inode:[eventpoll]" {
            continue;
        }
        // SAFETY: the number is only used for this one call, which copes with a closed one.
        let borrowed = unsafe { BorrowedFd::borrow_raw(epoll_number) };
        let epoll = match rustix::io::fcntl_dupfd_cloexec(borrowed, 0) {
            Ok(epoll) => epoll,
            // The application closed it.
            Err(Errno::BADF) => continue,
            Err(error) => {
                return Err(FdError::Duplicate {
                    number: epoll_number,
                    source: error.into(),
                });
            }
        };
        let entries = read_entries(&epoll, number)?;
        if !entries.is_empty() {
            found.push(Watcher {
                epoll_number,
                epoll,
                entries,
            });
        }
    }
    Ok(found)
}

/// The entries of one epoll instance for `number`.
fn read_entries(epoll: &OwnedFd, number: RawFd) -> Result<Vec<Entry>, FdError> {
    let path = format!("/proc/thread-self/fdinfo/{}", epoll.as_raw_fd());
    let info = fs::read_to_string(&path).map_err(|source| FdError::Read {
        path: path.into(),
        source,
    })?;
    Ok(info
        .lines()
        .filter_map(parse_entry)
        .filter_map(|(found, entry)| (found == number).then_some(entry))
        .collect())
}

/// Whether `file` can be watched by epoll at all (a regular file or `/dev/null` cannot).
pub(crate) fn can_be_watched(file: BorrowedFd<'_>) -> io::Result<bool> {
    let scratch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    match epoll::add(&scratch, file, EventData::new_u64(0), EventFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::PERM) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// `tfd: 5 events: 80000019 data: deadbeefcafe1234  pos:0 ino:1a sdev:d` of an epoll's fdinfo.
fn parse_entry(line: &str) -> Option<(RawFd, Entry)> {
    let mut fields = line.strip_prefix("tfd:")?.split_ascii_whitespace();
    let number = fields.next()?.parse().ok()?;
    let mut hexadecimal = |name: &str| {
        (fields.next()? == name).then(|| u64::from_str_radix(fields.next()?, 16).ok())?
    };
    let events = EventFlags::from_bits_retain(u32::try_from(hexadecimal("events:")?).ok()?);
    let data = hexadecimal("data:")?;
    Some((number, Entry { events, data }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_fdinfo() {
        let line = "tfd:       15 events: 80000019 data: deadbeefcafe1234  pos:0 ino:1a sdev:d";
        let (number, Entry { events, data }) = parse_entry(line).unwrap();
        assert_eq!(
            (number, events.bits(), data),
            (15, 0x8000_0019, 0xdead_beef_cafe_1234)
        );
        assert!(parse_entry("pos:\t0").is_none());
        assert!(parse_entry("tfd: x events: 19 data: 0").is_none());
        assert!(parse_entry("tfd: 5 data: 0 events: 19").is_none());
    }
}
