//! Stands between an agent and whoever asks it, so that something happens at an exact moment of a real `reverbs`.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reverbs::control::socket;
use rustix::net::sockopt::socket_peercred;
use serde_json::Value;

/// Between two looks for a new connection.
const PAUSE: Duration = Duration::from_millis(2);

/// When something happens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Moment {
    /// The agent is about to be asked.
    Asked,
    /// The agent has answered, and nobody has heard it yet.
    Answered,
}

/// What happens; it is told the process id of the one who asks.
pub type Event = Box<dyn Fn(u32) + Send + Sync>;

/// Takes the place of an agent's socket until it is dropped. It must not outlive the job.
#[derive(Debug)]
pub struct Interposer {
    path: PathBuf,
    agent: PathBuf,
    over: Arc<AtomicBool>,
    happened: Arc<AtomicBool>,
    listening: Option<JoinHandle<()>>,
}

struct Plan {
    agent: PathBuf,
    request: &'static str,
    moment: Moment,
    event: Event,
    happened: Arc<AtomicBool>,
}

impl Interposer {
    /// The first time that the agent of process `pid` is asked `request`, `event` happens at that moment.
    ///
    /// # Errors
    /// When the process has no agent.
    pub fn put_before(
        pid: u32,
        request: &'static str,
        moment: Moment,
        event: Event,
    ) -> Result<Self> {
        let path = socket::agent_socket(&socket::runtime_dir()?, pid.cast_signed());
        let agent = path.with_extension("agent");
        fs::rename(&path, &agent).with_context(|| format!("agent of process {pid}"))?;
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        let (over, happened) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let plan = Arc::new(Plan {
            agent: agent.clone(),
            request,
            moment,
            event,
            happened: Arc::clone(&happened),
        });
        let ends = Arc::clone(&over);
        let listening = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((client, _)) => {
                        let plan = Arc::clone(&plan);
                        // It ends with its connection.
                        std::thread::spawn(move || plan.pass_on(client));
                    }
                    Err(_) => std::thread::sleep(PAUSE),
                }
            }
        });
        Ok(Self {
            path,
            agent,
            over,
            happened,
            listening: Some(listening),
        })
    }

    /// # Errors
    /// When the moment has not come.
    pub fn check_happened(&self) -> Result<()> {
        ensure!(
            self.happened.load(Ordering::Acquire),
            "nobody asked the agent what was waited for"
        );
        Ok(())
    }
}

impl Drop for Interposer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(listening) = self.listening.take() {
            // A panic there shows as a moment that has not come.
            let _ = listening.join();
        }
        // Nothing to put back if somebody has removed what the process left.
        let _ = fs::rename(&self.agent, &self.path);
    }
}

impl Plan {
    fn pass_on(&self, client: UnixStream) {
        // Either end has closed: so do we, with both.
        let _ = self.pass_all(client);
    }

    fn pass_all(&self, mut client: UnixStream) -> io::Result<()> {
        let asker = socket_peercred(&client)?.pid.as_raw_nonzero().get();
        client.set_nonblocking(false)?;
        let mut agent = UnixStream::connect(&self.agent)?;
        loop {
            let request = frame(&mut client)?;
            let named: Value = serde_json::from_slice(&request[4..])?;
            let is_it = named["request"] == self.request && !self.happened.load(Ordering::Acquire);
            let happen = |now: Moment| {
                if is_it && self.moment == now {
                    (self.event)(asker.cast_unsigned());
                    self.happened.store(true, Ordering::Release);
                }
            };
            happen(Moment::Asked);
            agent.write_all(&request)?;
            let reply = frame(&mut agent)?;
            happen(Moment::Answered);
            client.write_all(&reply)?;
        }
    }
}

/// A message with its length in front.
fn frame(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    stream.read_exact(&mut frame)?;
    let length = u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]);
    frame.resize(4 + length as usize, 0);
    stream.read_exact(&mut frame[4..])?;
    Ok(frame)
}
