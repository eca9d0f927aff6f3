//! The agent: one thread in every process that has opened a device.
//!
//! It hands on the hardware's events and answers the orchestrator. Started at the first open, it sleeps in `poll` until one
//! of the two has something; it owns all that happens during a checkpoint.

mod events;
mod serve;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use self::serve::State;
use crate::control::message::{Phase, Reply};
use crate::control::socket;
use crate::virt::process::{lock, process};

/// How long a frame that has begun may take to arrive.
const FRAME_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Handle {
    /// A byte here makes the thread look again at what it waits for.
    waker: File,
    woken: RawFd,
}

static AGENT: Mutex<Option<Handle>> = Mutex::new(None);
static RDMA_CORE: OnceLock<String> = OnceLock::new();

/// Which rdma-core release we are in, for `status`.
pub fn set_rdma_core(release: &str) {
    let _ = RDMA_CORE.set(release.into());
}

pub(crate) fn rdma_core() -> &'static str {
    RDMA_CORE.get().map_or("unknown", String::as_str)
}

/// Starts the agent, if there is none in this process.
pub(crate) fn start() {
    let mut agent = lock(&AGENT);
    if agent.is_some() || process().is_disowned() {
        return;
    }
    match start_thread() {
        Ok(handle) => *agent = Some(handle),
        Err(error) => {
            tracing::error!(%error, "no agent: this process cannot be checkpointed, and gets no events")
        }
    }
}

/// Makes the agent look again at what it waits for.
pub(crate) fn wake() {
    if let Some(agent) = lock(&AGENT).as_mut() {
        // A full pipe means that it is about to wake up anyway.
        let _ = agent.waker.write(&[0]);
    }
}

/// In a forked child: the thread is not there, its files are the parent's.
pub fn forget_after_fork() {
    if let Some(agent) = lock(&AGENT).take() {
        // SAFETY: the pipe's read end, whose only user is a thread that does not exist here.
        unsafe { libc::close(agent.woken) };
    }
}

fn start_thread() -> std::io::Result<Handle> {
    let path = socket::agent_socket(&socket::runtime_dir()?, std::process::id().cast_signed());
    // A file left by an earlier process of this id.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    listener.set_nonblocking(true)?;
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for two.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else's.
    let waker = unsafe { File::from_raw_fd(fds[1]) };
    let woken = fds[0];
    with_signals_blocked(|| {
        std::thread::Builder::new()
            .name("reverbs".into())
            .spawn(move || {
                // SAFETY: the read end belongs to this thread from here on.
                let woken = unsafe { File::from_raw_fd(woken) };
                Agent {
                    listener,
                    woken,
                    connections: Vec::new(),
                    state: State::default(),
                }
                .run();
            })
    })?;
    Ok(Handle { waker, woken })
}

/// Signals are the application's: a thread inherits the mask it is made under.
fn with_signals_blocked<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are initialized before they are read.
    unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) =
            (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let result = work();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        result
    }
}

#[derive(Debug)]
struct Agent {
    listener: UnixListener,
    woken: File,
    connections: Vec<UnixStream>,
    state: State,
}

impl Agent {
    fn run(mut self) {
        loop {
            let connections = self.connections.len();
            let mut waiting = vec![self.listener.as_raw_fd(), self.woken.as_raw_fd()];
            waiting.extend(self.connections.iter().map(AsRawFd::as_raw_fd));
            waiting.extend(events::files());
            let Some(ready) = wait_for(&waiting) else {
                continue;
            };
            if ready[1] {
                let mut drained = [0; 64];
                let _ = std::io::Read::read(&mut self.woken, &mut drained);
            }
            if ready[2 + connections..].contains(&true) {
                events::forward(self.state.phase());
            }
            let mut index = 0;
            self.connections.retain_mut(|connection| {
                index += 1;
                !ready[1 + index] || answer(connection, &mut self.state)
            });
            if ready[0] {
                self.accept();
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((connection, _)) = self.listener.accept() {
            if is_same_user(&connection) && connection.set_read_timeout(Some(FRAME_LIMIT)).is_ok() {
                self.connections.push(connection);
            }
        }
    }
}

/// Answers one request; `false` if the connection is at its end.
fn answer(connection: &mut UnixStream, state: &mut State) -> bool {
    match socket::receive(connection) {
        Ok(Some(request)) => {
            let reply =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| state.answer(request)));
            let reply = reply.unwrap_or_else(|_| Reply::Refused {
                phase: Phase::Running,
                reason: "the agent met a defect of its own; see its log".into(),
            });
            socket::send(connection, &reply).is_ok()
        }
        Ok(None) | Err(_) => false,
    }
}

/// Which of the files have something to read; `None` if the wait was cut short.
fn wait_for(files: &[RawFd]) -> Option<Vec<bool>> {
    let mut polled: Vec<_> = files
        .iter()
        .map(|fd| libc::pollfd {
            fd: *fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: `polled` has as many entries as is said.
    let answer = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
    (answer > 0).then(|| polled.iter().map(|file| file.revents != 0).collect())
}

fn is_same_user(connection: &UnixStream) -> bool {
    // SAFETY: the kernel writes at most `length` bytes into the structure.
    unsafe {
        let mut peer: libc::ucred = std::mem::zeroed();
        let mut length = size_of::<libc::ucred>() as libc::socklen_t;
        let answer = libc::getsockopt(
            connection.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        );
        answer == 0 && (peer.uid == libc::geteuid() || peer.uid == 0)
    }
}
