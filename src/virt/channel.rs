//! How events reach the application: through pipes of our own, which outlive the hardware.
//!
//! `ibv_create_comp_channel` has no provider hook: the application gets the kernel's file. When a completion queue first
//! uses the channel, a pipe takes that file's place under the same number (docs/events.md). From then on a pipe is known
//! by its inode, not by the channel's address, as channels are freed without our hearing of it.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use rdma_core_sys::ibv_comp_channel;

use super::context::Context;
use super::fork::put_in_place;
use super::process::{lock, process};
use crate::device::Verbs;
use crate::errno::{Errno, Verb};

/// What a pipe holds at most (`pipe(7)`: 16 pages).
const PIPE_BYTES: usize = 65_536;

/// A pipe of records of a fixed size.
#[derive(Debug)]
pub struct EventPipe {
    writer: Mutex<Option<File>>,
    /// The number the application reads from.
    read_fd: AtomicI32,
    /// Which file it is; `None` once the application is known to have closed it. A restore makes another file of it.
    inode: Mutex<Option<Inode>>,
    record: usize,
}

/// Which file a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Inode(u64, u64);

impl EventPipe {
    /// A pipe whose read end is the application's from now on.
    ///
    /// # Errors
    /// Those of `pipe2`.
    pub fn new(record: usize) -> Verb<Self> {
        let mut fds = [-1; 2];
        // SAFETY: `fds` has room for two.
        if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(Errno::last());
        }
        // SAFETY: just made, and nobody else's.
        let writer = unsafe { File::from_raw_fd(fds[1]) };
        set_nonblocking(fds[1]);
        Ok(Self {
            writer: Mutex::new(Some(writer)),
            read_fd: AtomicI32::new(fds[0]),
            inode: Mutex::new(Some(inode(fds[0])?)),
            record,
        })
    }

    /// A pipe whose read end takes the place of `number`.
    fn under(number: RawFd, record: usize) -> Verb<Self> {
        let pipe = Self::new(record)?;
        // SAFETY: the read end made above, not handed out yet.
        let reader = unsafe { OwnedFd::from_raw_fd(pipe.read_fd()) };
        kmod_compat::substitute::substitute(number, reader).map_err(|error| {
            tracing::error!(fd = number, %error, "cannot replace an event file");
            Errno::IO
        })?;
        pipe.read_fd.store(number, Ordering::Release);
        Ok(pipe)
    }

    #[must_use]
    pub fn read_fd(&self) -> RawFd {
        self.read_fd.load(Ordering::Acquire)
    }

    /// Hands one record to the application. Events that nobody ever reads stop at the pipe's size, as they are dropped by
    /// the kernel's own limits.
    pub(crate) fn write(&self, record: &[u8]) -> bool {
        debug_assert_eq!(record.len(), self.record);
        lock(&self.writer)
            .as_mut()
            .is_some_and(|writer| writer.write_all(record).is_ok())
    }

    /// Takes back the unread records that `matches`; gives their number. The caller holds `Process::events`.
    pub(crate) fn purge(&self, matches: impl Fn(&[u8]) -> bool) -> u32 {
        let fd = self.read_fd();
        if !self.is_open() {
            return 0;
        }
        // A thread of the application may be reading too, and a read must not block: splice never does.
        let Ok((mut taken, aside)) = std::io::pipe() else {
            return 0;
        };
        // SAFETY: moves bytes between two pipes; no memory is involved.
        let moved = unsafe {
            libc::splice(
                fd,
                std::ptr::null_mut(),
                aside.as_raw_fd(),
                std::ptr::null_mut(),
                PIPE_BYTES,
                libc::SPLICE_F_NONBLOCK,
            )
        };
        let mut records = vec![0; usize::try_from(moved).unwrap_or(0)];
        if std::io::Read::read_exact(&mut taken, &mut records).is_err() {
            return 0;
        }
        let (purged, kept): (Vec<&[u8]>, Vec<&[u8]>) = records
            .chunks_exact(self.record)
            .partition(|record| matches(record));
        for record in kept {
            self.write(record);
        }
        purged.len() as u32
    }

    /// The reader will find the end of the file.
    pub(crate) fn close_writer(&self) {
        lock(&self.writer).take();
    }

    /// In a forked child: the events are its parent's. The caller has begun the fork, so nobody was writing.
    pub(super) fn abandon(&self, null: Option<&File>) {
        self.close_writer();
        let number = self.read_fd();
        // Whoever has the lock is not in this process; then the file stays, and its events are still not read by us.
        if self
            .inode
            .try_lock()
            .is_ok_and(|known| known.is_some() && *known == inode(number).ok())
        {
            put_in_place(null, number);
        }
    }

    /// The application still has the read end under the number we know.
    fn is_open(&self) -> bool {
        self.is(inode(self.read_fd()).ok())
    }

    fn is(&self, file: Option<Inode>) -> bool {
        file.is_some() && *lock(&self.inode) == file
    }

    /// Before the process is saved: notes whether the application still has the read end.
    pub(crate) fn before_save(&self) {
        if !self.is_open() {
            lock(&self.inode).take();
        }
    }

    /// The process may have been restored, with another file under the same number.
    pub(crate) fn after_save(&self) {
        let mut known = lock(&self.inode);
        if known.is_some() {
            *known = inode(self.read_fd()).ok();
        }
    }
}

/// A completion channel that a completion queue has used.
#[derive(Debug)]
pub struct Channel {
    /// Unknown for a channel that no completion queue had used when the hardware was let go of.
    context: OnceLock<Arc<Context>>,
    pub(crate) pipe: EventPipe,
    /// The hardware's channel; null while released.
    hardware: AtomicPtr<ibv_comp_channel>,
}

impl Channel {
    /// The channel behind the application's object, taken over from the kernel if this is its first use.
    ///
    /// # Safety
    /// `app` must be a completion channel of `context`, whose hardware is there: the gate is held.
    pub(crate) unsafe fn of(context: &Arc<Context>, app: *mut ibv_comp_channel) -> Verb<Arc<Self>> {
        // SAFETY: as the caller vouches.
        let fd = unsafe { (*app).fd };
        let mut channels = process().channels();
        channels.retain(|channel| channel.pipe.is_open() || Arc::strong_count(channel) > 1);
        let file = inode(fd)?;
        if let Some(channel) = channels.iter().find(|channel| channel.pipe.is(Some(file))) {
            if channel.context.set(Arc::clone(context)).is_ok() {
                channel.rebuild()?;
                crate::agent::wake();
            }
            return Ok(Arc::clone(channel));
        }
        let hardware = Self::create_hardware(context)?;
        let pipe = match EventPipe::under(fd, size_of::<u64>()) {
            Ok(pipe) => pipe,
            Err(error) => {
                // SAFETY: made above, used by nobody.
                unsafe { (context.verbs.ibv_destroy_comp_channel)(hardware) };
                return Err(error);
            }
        };
        let channel = Arc::new(Self {
            context: OnceLock::from(Arc::clone(context)),
            pipe,
            hardware: AtomicPtr::new(hardware),
        });
        channels.push(Arc::clone(&channel));
        crate::agent::wake();
        Ok(channel)
    }

    /// A channel that no completion queue has used yet still has the kernel's file; a pipe takes its place.
    pub(crate) fn adopt_unused(fd: RawFd) -> Verb<()> {
        let pipe = EventPipe::under(fd, size_of::<u64>())?;
        process().channels().push(Arc::new(Self {
            context: OnceLock::new(),
            pipe,
            hardware: AtomicPtr::default(),
        }));
        Ok(())
    }

    fn create_hardware(context: &Context) -> Verb<*mut ibv_comp_channel> {
        // SAFETY: the gate is held or closed, so the hardware's context is open.
        unsafe {
            let channel = context
                .verbs
                .pointer((context.verbs.ibv_create_comp_channel)(context.hardware()))?;
            set_nonblocking((*channel).fd);
            Ok(channel)
        }
    }

    pub(crate) fn hardware(&self) -> *mut ibv_comp_channel {
        self.hardware.load(Ordering::Acquire)
    }

    pub(crate) fn belongs_to(&self, context: &Context) -> bool {
        self.context
            .get()
            .is_some_and(|own| std::ptr::eq(Arc::as_ptr(own), context))
    }

    pub(crate) fn verbs(&self) -> Option<&'static Verbs> {
        self.context.get().map(|context| context.verbs)
    }

    /// Lets go of the hardware's channel. Its completion queues are gone.
    pub(crate) fn release(&self) {
        let hardware = self.hardware.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if let Some(verbs) = self.verbs().filter(|_| !hardware.is_null()) {
            // SAFETY: the device's own, without users.
            unsafe { (verbs.ibv_destroy_comp_channel)(hardware) };
        }
    }

    /// Takes a fresh one.
    pub(crate) fn rebuild(&self) -> Verb<()> {
        if let Some(context) = self.context.get() {
            self.hardware
                .store(Self::create_hardware(context)?, Ordering::Release);
        }
        Ok(())
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.release();
    }
}

/// Waits until the application has acknowledged as many events of an object as it has got (`ibv_ack_cq_events`,
/// `ibv_ack_async_event`): it may touch the object until then.
///
/// # Safety
/// The three must be those of the application's object, initialized; nobody else may free it.
pub(super) unsafe fn wait_until_acknowledged(
    mutex: *mut libc::pthread_mutex_t,
    condition: *mut libc::pthread_cond_t,
    acknowledged: *const u32,
    got: u32,
) {
    // SAFETY: as the caller vouches; the counter is changed under the mutex.
    unsafe {
        libc::pthread_mutex_lock(mutex);
        while acknowledged.read_volatile() != got {
            libc::pthread_cond_wait(condition, mutex);
        }
        libc::pthread_mutex_unlock(mutex);
    }
}

pub(crate) fn set_nonblocking(fd: RawFd) {
    // SAFETY: only a file descriptor number is involved.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
    }
}

fn inode(fd: RawFd) -> Verb<Inode> {
    // SAFETY: all zeroes is a valid `stat`, and fstat only writes into it.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        match libc::fstat(fd, &raw mut stat) {
            0 => Ok(Inode(stat.st_dev, stat.st_ino)),
            _ => Err(Errno::last()),
        }
    }
}
