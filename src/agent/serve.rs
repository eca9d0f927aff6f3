//! Answering the orchestrator: which request is allowed in which phase, and what it leads to.

use std::time::Duration;

use crate::checkpoint::{self, Let, Outside, Stopped};
use crate::control::message::{
    ChaosStatus, PROTOCOL_VERSION, Phase, Reply, Request, ResponderState, Session,
};
use crate::virt::process::process;

/// The agent answers nobody else meanwhile, so whoever asks cannot make it wait for longer.
const LONGEST: Duration = Duration::from_secs(60);

fn limit(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds).min(LONGEST)
}

/// Where the process stands.
#[derive(Debug)]
pub(super) struct State {
    phase: Phase,
    session: Option<Session>,
    outside: Outside,
    stopped: Stopped,
    /// As this process said them last.
    responders: Vec<ResponderState>,
    left: Let,
    notes: Vec<String>,
    chaos: Option<ChaosStatus>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            phase: Phase::Running,
            session: None,
            outside: Outside::default(),
            stopped: Stopped::default(),
            responders: Vec::new(),
            left: Let::default(),
            notes: Vec::new(),
            chaos: None,
        }
    }
}

impl State {
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// An orchestrator has claimed the process.
    pub(super) fn has_session(&self) -> bool {
        self.session.is_some()
    }

    pub(super) fn show_chaos(&mut self, status: &ChaosStatus) {
        self.chaos = Some(status.clone());
    }

    /// Carries out a request.
    pub(super) fn answer(&mut self, request: Request) -> Reply {
        let name = request.name();
        match self.carry_out(request) {
            Ok(reply) => {
                tracing::debug!(request = name, phase = ?self.phase, "done");
                reply
            }
            Err(reason) => {
                tracing::warn!(request = name, phase = ?self.phase, reason, "refused");
                Reply::Refused {
                    phase: self.phase,
                    reason,
                }
            }
        }
    }

    fn carry_out(&mut self, request: Request) -> Result<Reply, String> {
        match request {
            Request::Hello { version } => self.hello(version),
            Request::Begin { session, takeover } => self.begin(session, takeover),
            Request::Status => Ok(self.status()),
            Request::Examine => {
                self.require(&[Phase::Running, Phase::Closed])?;
                Ok(Reply::Obstacles {
                    obstacles: checkpoint::examine(),
                    numbers_bytes: checkpoint::numbers_bytes(),
                })
            }
            Request::Close { limit_ms } => {
                self.require(&[Phase::Running])?;
                checkpoint::close(limit(limit_ms))?;
                self.enter(Phase::Closed)
            }
            Request::Peers => {
                self.require(&[Phase::Closed])?;
                Ok(Reply::Peers {
                    contexts: checkpoint::peers()?,
                })
            }
            Request::GiveUp { queue_pairs } => {
                self.require(&[Phase::Closed])?;
                self.outside = Outside::of(&queue_pairs)?;
                self.enter(Phase::Closed)
            }
            Request::Drain { limit_ms, arrivals } => {
                self.require(&[Phase::Closed])?;
                let forward = || super::events::forward(Phase::Closed);
                Ok(Reply::Drained {
                    drained: checkpoint::drain(limit(limit_ms), arrivals, forward),
                })
            }
            Request::Stop { limit_ms } => {
                self.require(&[Phase::Closed])?;
                super::events::forward(self.phase);
                // Once one queue pair has been moved there is no way back to Closed.
                self.phase = Phase::Stopped;
                checkpoint::stop(&mut self.stopped, limit(limit_ms))?;
                self.enter(Phase::Stopped)
            }
            Request::Responders => {
                self.require(&[Phase::Stopped, Phase::Settled])?;
                // In Settled nothing has moved since they were read: for peers that an orchestrator who died left behind.
                if self.phase == Phase::Stopped {
                    self.responders = checkpoint::responders(&mut self.stopped)?;
                }
                Ok(Reply::Responders {
                    responders: self.responders.clone(),
                })
            }
            Request::Settle { responders } => {
                self.require(&[Phase::Stopped])?;
                let notes = checkpoint::settle(&self.stopped, &responders)?;
                self.note(notes);
                let notes = self.outside.give_up()?;
                self.note(notes);
                self.enter(Phase::Settled)
            }
            Request::Release => {
                self.require(&[Phase::Settled])?;
                checkpoint::release(&mut self.left)?;
                self.enter(Phase::Released)
            }
            Request::Rebuild { devices } => {
                self.require(&[Phase::Released])?;
                checkpoint::rebuild(&devices, &self.left)?;
                self.enter(Phase::Rebuilt)
            }
            Request::Publish => {
                self.require(&[Phase::Rebuilt, Phase::Connected])?;
                Ok(Reply::Numbers {
                    numbers: checkpoint::numbers(),
                })
            }
            Request::Connect { numbers } => {
                self.require(&[Phase::Rebuilt])?;
                let notes = checkpoint::connect(&numbers)?;
                self.note(notes);
                self.enter(Phase::Connected)
            }
            Request::Resume => self.resume(),
        }
    }

    fn hello(&self, version: u32) -> Result<Reply, String> {
        if version != PROTOCOL_VERSION {
            return Err(format!(
                "this process speaks version {PROTOCOL_VERSION} of the protocol, the command version {version}; \
                 use the command that belongs to the provider it was started with"
            ));
        }
        Ok(Reply::Hello {
            version: PROTOCOL_VERSION,
            pid: std::process::id().cast_signed(),
            phase: self.phase,
            session: self.session.clone(),
        })
    }

    fn begin(&mut self, session: Session, takeover: bool) -> Result<Reply, String> {
        match &self.session {
            Some(owner) if owner.id != session.id && !takeover => Err(format!(
                "another reverbs, process {}, is at work on this process",
                owner.pid
            )),
            _ => {
                self.session = Some(session);
                Ok(Reply::Done { phase: self.phase })
            }
        }
    }

    fn resume(&mut self) -> Result<Reply, String> {
        self.require(&[Phase::Running, Phase::Closed, Phase::Connected])?;
        let opened = match self.phase {
            Phase::Closed => checkpoint::reopen(),
            Phase::Connected => checkpoint::resume(),
            _ => Ok(()),
        };
        // What could not be posted is said, but the gates are open: the process runs.
        if let Err(what) = opened {
            self.note(vec![what]);
        }
        self.session = None;
        self.outside = Outside::default();
        self.stopped = Stopped::default();
        self.responders = Vec::new();
        self.left = Let::default();
        self.enter(Phase::Running)
    }

    fn status(&self) -> Reply {
        // Only this thread closes the gate, so while Running it can be entered without waiting.
        let _inside = (self.phase == Phase::Running).then(|| process().gate.enter());
        let mut status = checkpoint::status(self.phase, self.session.clone(), &self.notes);
        status.chaos.clone_from(&self.chaos);
        Reply::Status { status }
    }

    fn require(&self, allowed: &[Phase]) -> Result<(), String> {
        if allowed.contains(&self.phase) {
            return Ok(());
        }
        Err(format!("the process is in phase {:?}", self.phase))
    }

    fn enter(&mut self, phase: Phase) -> Result<Reply, String> {
        self.phase = phase;
        Ok(Reply::Done { phase })
    }

    fn note(&mut self, notes: Vec<String>) {
        for note in notes {
            tracing::warn!(note);
            // What is so after each of many cycles is said once.
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
    }
}
