//! The agent: one thread in every process that has opened a device.
//!
//! It hands on the hardware's events and answers the orchestrator. Started at the first open, it sleeps in `poll` until one
//! of the two has something; it owns all that happens during a checkpoint.

mod chaos;
mod connections;
mod events;
mod serve;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Instant;

use self::chaos::Chaos;
use self::connections::Connections;
use self::serve::State;
use crate::control::socket;
use crate::virt::process::lock;

#[derive(Debug)]
pub(crate) struct Handle {
    /// A byte here makes the thread look again at what it waits for.
    waker: File,
    /// What else it has open: its end of the pipe, the socket, connections. Changed only while the thread has this locked.
    files: Vec<RawFd>,
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
    if agent.is_some() {
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

/// Nobody starts, wakes or ends anything of the agent's: held around a fork.
#[derive(Debug)]
pub(crate) struct Still(MutexGuard<'static, Option<Handle>>);

pub(crate) fn still() -> Still {
    Still(lock(&AGENT))
}

impl Still {
    /// In a forked child: the thread is not there. Its connections must not look open when the parent has gone.
    pub(crate) fn abandon(mut self) {
        for file in self.0.take().into_iter().flat_map(|agent| agent.files) {
            // SAFETY: files whose only user is a thread that does not exist here.
            unsafe { libc::close(file) };
        }
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
    let files = vec![woken, listener.as_raw_fd()];
    with_signals_blocked(|| {
        std::thread::Builder::new()
            .name(socket::AGENT_THREAD.into())
            .spawn(move || {
                // SAFETY: the read end belongs to this thread from here on.
                let woken = unsafe { File::from_raw_fd(woken) };
                Agent {
                    connections: Connections::new(listener),
                    woken,
                    state: State::default(),
                    chaos: Chaos::from_environment(),
                }
                .run();
            })
    })?;
    Ok(Handle { waker, files })
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
    connections: Connections,
    woken: File,
    state: State,
    chaos: Option<Chaos>,
}

impl Agent {
    fn run(mut self) {
        loop {
            let mut waiting = vec![self.woken.as_raw_fd()];
            waiting.extend(self.connections.files());
            let events_from = waiting.len();
            waiting.extend(events::files());
            let limits = [
                self.connections.next_limit(),
                self.chaos.as_ref().map(Chaos::next),
            ];
            let Some(ready) = wait_for(&waiting, limits.into_iter().flatten().min()) else {
                continue;
            };
            if ready[0] {
                let mut drained = [0; 64];
                let _ = std::io::Read::read(&mut self.woken, &mut drained);
            }
            if ready[events_from..].contains(&true) {
                events::forward(self.state.phase());
            }
            let ended = self
                .connections
                .serve(&ready[1..events_from], &mut self.state);
            if ready[1] || !ended.is_empty() {
                let mut agent = lock(&AGENT);
                drop(ended);
                self.connections.accept(ready[1]);
                if let Some(agent) = agent.as_mut() {
                    agent.files = self.connections.open_files();
                    agent.files.push(self.woken.as_raw_fd());
                }
            }
            if let Some(chaos) = &mut self.chaos {
                chaos.turn(&mut self.state);
            }
        }
    }
}

/// Which of the files have something to read, of which negative ones have nothing; `None` if the wait was cut short.
fn wait_for(files: &[RawFd], until: Option<Instant>) -> Option<Vec<bool>> {
    let mut polled: Vec<_> = files
        .iter()
        .map(|fd| libc::pollfd {
            fd: *fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let timeout = until.map_or(-1, |until| {
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up: not again and again in the last millisecond.
        i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
    });
    // SAFETY: `polled` has as many entries as is said.
    let answer = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) };
    (answer >= 0).then(|| polled.iter().map(|file| file.revents != 0).collect())
}
