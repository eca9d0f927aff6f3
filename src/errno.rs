//! Error numbers, as the verbs return them.

use std::fmt;

/// A positive `errno` value. The inner C library keeps its own `errno`, so a value is carried, never left in a global.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

/// What a verb answers.
pub type Verb<T> = Result<T, Errno>;

impl Errno {
    pub const AGAIN: Self = Self(libc::EAGAIN);
    pub const BAD_ADDRESS: Self = Self(libc::EFAULT);
    pub const BUSY: Self = Self(libc::EBUSY);
    pub const INVALID: Self = Self(libc::EINVAL);
    pub const IO: Self = Self(libc::EIO);
    pub const NO_DEVICE: Self = Self(libc::ENODEV);
    pub const NO_MEMORY: Self = Self(libc::ENOMEM);
    pub const NOT_SUPPORTED: Self = Self(libc::EOPNOTSUPP);

    /// What the calling thread's last failed system call left.
    #[must_use]
    pub fn last() -> Self {
        std::io::Error::last_os_error()
            .raw_os_error()
            .map_or(Self::IO, Self)
    }

    /// Verbs that return an `int` give 0, or a positive errno.
    ///
    /// # Errors
    /// The number, if it is not 0.
    pub fn check(code: i32) -> Verb<()> {
        match code {
            0 => Ok(()),
            code => Err(Self(code.abs())),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(out)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}
