//! Another file under the number of a descriptor of this process, while the application uses it.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use rustix::fs::OFlags;
use rustix::io::{DupFlags, Errno, FdFlags};

use crate::epoll::{self, Registration, TakeOffError, Watcher};
use crate::fds::FdError;

/// Why a descriptor could not be replaced. Except for [`SubstituteError::RegistrationLost`]
/// nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum SubstituteError {
    /// There is nothing to replace.
    #[error("file descriptor {number} is not open")]
    NotOpen {
        /// The descriptor.
        number: RawFd,
    },
    /// The epoll registrations of the descriptor are not known.
    #[error("cannot find the epoll registrations of file descriptor {number}; is /proc mounted?")]
    Inspect {
        /// The descriptor.
        number: RawFd,
        /// What could not be read.
        source: FdError,
    },
    /// The descriptor is watched by epoll and its replacement cannot be.
    #[error(
        "file descriptor {number} is watched by epoll descriptor {epoll}, \
         and the file to put there cannot be watched"
    )]
    NotWatchable {
        /// The descriptor.
        number: RawFd,
        /// An epoll instance that watches it.
        epoll: RawFd,
    },
    /// A system call failed before anything was replaced.
    #[error("cannot {action} file descriptor {number}")]
    Failed {
        /// The descriptor.
        number: RawFd,
        /// What was tried.
        action: &'static str,
        /// What the system call answered.
        source: io::Error,
    },
    /// Epoll instances that watched the descriptor do not any more, and did not take the
    /// registration back.
    #[error(
        "epoll descriptors {epolls:?} no longer watch file descriptor {number}, which holds its \
         {} file; see fs.epoll.max_user_watches", if *replaced { "new" } else { "old" }
    )]
    RegistrationLost {
        /// The descriptor.
        number: RawFd,
        /// The epoll instances.
        epolls: Vec<RawFd>,
        /// Whether the new file is under the number.
        replaced: bool,
        /// What the last of them answered.
        source: io::Error,
    },
}

/// Puts `new` under `number`, a descriptor of this process, for all its threads at once.
///
/// The number keeps its close-on-exec flag, O_NONBLOCK, O_ASYNC with owner and signal, and its
/// registrations with every epoll instance that this process has open. The status flags are set
/// on `new`'s open file, so on its duplicates too. If `number` was the last descriptor of its old
/// file, that file is closed.
///
/// A thread that is already blocked in `read` or `poll` on the old file stays there; one blocked
/// in `epoll_wait` goes on with the new file. Between the removal of a registration and its
/// return an `epoll_ctl` of another thread on this number can be answered ENOENT.
/// Duplicates of the old file under other numbers are untouched: see [`crate::fds::duplicates`].
///
/// # Errors
/// Each names the number. Unless it is [`SubstituteError::RegistrationLost`], the old file is
/// still there with all that belongs to it.
pub fn substitute(number: RawFd, new: OwnedFd) -> Result<(), SubstituteError> {
    if number == new.as_raw_fd() {
        // It is there already; dropping it would close the application's descriptor.
        let _ = new.into_raw_fd();
        return Ok(());
    }
    if number < 0 {
        return Err(SubstituteError::NotOpen { number });
    }
    // SAFETY: not -1; all that is done with it before dup3 is asking, and the kernel answers
    // EBADF for a closed number, which is handled.
    let old = unsafe { BorrowedFd::borrow_raw(number) };
    let descriptor_flags = rustix::io::fcntl_getfd(old).map_err(|error| match error {
        Errno::BADF => SubstituteError::NotOpen { number },
        other => failed(number, "read the flags of")(other.into()),
    })?;

    let watchers =
        epoll::watchers_of(number).map_err(|source| SubstituteError::Inspect { number, source })?;
    if let Some(watcher) = watchers.first()
        && !epoll::can_be_watched(new.as_fd()).map_err(failed(number, "try the new file for"))?
    {
        return Err(SubstituteError::NotWatchable {
            number,
            epoll: watcher.epoll_number,
        });
    }
    copy_status(old, new.as_fd()).map_err(failed(number, "carry over the status flags of"))?;

    let taken = take_off(number, old, watchers)?;
    if let Err(error) = replace(number, new.as_fd(), descriptor_flags) {
        put_back(number, old, &taken, false)?;
        return Err(failed(number, "replace")(error));
    }
    put_back(number, old, &taken, true)
}

/// Takes all registrations off; if one resists, those taken before it are put back.
fn take_off(
    number: RawFd,
    old: BorrowedFd<'_>,
    watchers: Vec<Watcher>,
) -> Result<Vec<Registration>, SubstituteError> {
    let mut taken = Vec::new();
    for watcher in watchers {
        let epoll_number = watcher.epoll_number;
        match watcher.take_off(old) {
            Ok(registration) => taken.extend(registration),
            Err(TakeOffError::Refused(error)) => {
                put_back(number, old, &taken, false)?;
                return Err(failed(number, "take an epoll registration off")(error));
            }
            Err(TakeOffError::Lost(error)) => {
                put_back(number, old, &taken, false)?;
                return Err(SubstituteError::RegistrationLost {
                    number,
                    epolls: vec![epoll_number],
                    replaced: false,
                    source: io::Error::other(error),
                });
            }
        }
    }
    Ok(taken)
}

/// Registers whatever is under `number` now; goes on over failures so that as few as possible
/// are lost.
fn put_back(
    number: RawFd,
    watched: BorrowedFd<'_>,
    taken: &[Registration],
    replaced: bool,
) -> Result<(), SubstituteError> {
    let mut epolls = Vec::new();
    let mut last = None;
    for registration in taken {
        if let Err(error) = registration.put_back(watched) {
            epolls.push(registration.epoll_number);
            last = Some(error);
        }
    }
    match last {
        None => Ok(()),
        Some(source) => Err(SubstituteError::RegistrationLost {
            number,
            epolls,
            replaced,
            source,
        }),
    }
}

/// The exchange itself: for other threads the number is never closed.
fn replace(number: RawFd, new: BorrowedFd<'_>, flags: FdFlags) -> io::Result<()> {
    let flags = if flags.contains(FdFlags::CLOEXEC) {
        DupFlags::CLOEXEC
    } else {
        DupFlags::empty()
    };
    // SAFETY: the number is open, and replacing what is under it is what the caller asked for;
    // ManuallyDrop keeps it from being closed here.
    let mut target = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    Ok(rustix::io::retry_on_intr(|| {
        rustix::io::dup3(new, &mut target, flags)
    })?)
}

/// Gives `new` the status flags that applications set with F_SETFL.
fn copy_status(old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
    let settable = OFlags::NONBLOCK | OFlags::from_bits_retain(libc::O_ASYNC as u32);
    let wanted = rustix::fs::fcntl_getfl(old)?;
    if wanted.intersects(OFlags::from_bits_retain(libc::O_ASYNC as u32)) {
        copy_signal_owner(old, new)?;
    }
    let present = rustix::fs::fcntl_getfl(new)?;
    if (present ^ wanted).intersects(settable) {
        rustix::fs::fcntl_setfl(new, present.difference(settable) | (wanted & settable))?;
    }
    Ok(())
}

/// Who gets the signal of O_ASYNC, and which signal.
fn copy_signal_owner(old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
    /// `struct f_owner_ex` of `asm-generic/fcntl.h`.
    #[repr(C)]
    struct Owner {
        kind: libc::c_int,
        id: libc::pid_t,
    }
    const F_SETSIG: libc::c_int = 10;
    const F_GETSIG: libc::c_int = 11;
    const F_SETOWN_EX: libc::c_int = 15;
    const F_GETOWN_EX: libc::c_int = 16;

    let checked = |answer: libc::c_int| {
        if answer < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(answer)
        }
    };
    let mut owner = Owner { kind: 0, id: 0 };
    // SAFETY: the kernel fills in an f_owner_ex, which `owner` is.
    checked(unsafe { libc::fcntl(old.as_raw_fd(), F_GETOWN_EX, &mut owner) })?;
    // SAFETY: the kernel reads an f_owner_ex.
    checked(unsafe { libc::fcntl(new.as_raw_fd(), F_SETOWN_EX, &owner) })?;
    // SAFETY: no argument but integers.
    let signal = checked(unsafe { libc::fcntl(old.as_raw_fd(), F_GETSIG) })?;
    // SAFETY: no argument but integers.
    checked(unsafe { libc::fcntl(new.as_raw_fd(), F_SETSIG, signal) })?;
    Ok(())
}

fn failed(number: RawFd, action: &'static str) -> impl FnOnce(io::Error) -> SubstituteError {
    move |source| SubstituteError::Failed {
        number,
        action,
        source,
    }
}
