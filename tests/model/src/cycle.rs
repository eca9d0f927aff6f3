//! A checkpoint without an image: the agent of this process is taken through the phases, as `reverbs cycle` does.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use reverbs::control::message::{Phase, ProcessStatus, Reply, Request};
use reverbs_benches::restart::Agent;

/// How often a step is tried on a device that fails.
const TRIES: u32 = 3;

/// A moment between two phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    Begun,
    Closed,
    Drained,
    Stopped,
    Asked,
    Settled,
    Released,
    Rebuilt,
    Connected,
    Resumed,
}

impl Moment {
    /// In order.
    pub const ALL: [Self; 10] = [
        Self::Begun,
        Self::Closed,
        Self::Drained,
        Self::Stopped,
        Self::Asked,
        Self::Settled,
        Self::Released,
        Self::Rebuilt,
        Self::Connected,
        Self::Resumed,
    ];

    /// Verbs that change objects do not wait for the end of the checkpoint.
    #[must_use]
    pub fn has_open_gates(self) -> bool {
        [Self::Begun, Self::Resumed].contains(&self)
    }
}

/// How a checkpoint goes.
#[derive(Debug)]
pub struct Cycled {
    pub status: ProcessStatus,
    /// The hardware was replaced. It was not if the orchestrator died before anything was moved: the next one goes back.
    pub replaced: bool,
}

/// An orchestrator at work.
struct Orchestrator<'a> {
    agent: Agent,
    runtime_dir: &'a Path,
    /// Verbs may fail while hardware is made.
    fails: bool,
    /// The moments at which it dies and another takes over.
    deaths: Vec<Moment>,
    sessions: u32,
}

/// Replaces the hardware; `between` does what it likes at each moment. If it panics, that goes on when the gates are open again.
///
/// # Panics
/// The agent refuses a phase.
pub fn cycle(
    runtime_dir: &Path,
    fails: bool,
    deaths: Vec<Moment>,
    mut between: impl FnMut(Moment),
) -> Cycled {
    let mut failed = None;
    let mut between = |moment| {
        if failed.is_none() {
            failed = catch_unwind(AssertUnwindSafe(|| between(moment))).err();
        }
    };
    let (agent, _) = Agent::connect(runtime_dir);
    let mut orchestrator = Orchestrator {
        agent,
        runtime_dir,
        fails,
        deaths,
        sessions: 0,
    };
    orchestrator.claim(false);
    let replaced = orchestrator.drive(&mut between);
    between(Moment::Resumed);
    if let Some(failed) = failed {
        resume_unwind(failed);
    }
    match orchestrator.agent.ask(Request::Status) {
        Reply::Status { status } => Cycled { status, replaced },
        other => panic!("status is answered by {other:?}"),
    }
}

impl Orchestrator<'_> {
    fn claim(&mut self, takeover: bool) {
        let id = format!("session {}", self.sessions);
        self.agent.ask(Agent::claim(&id, takeover));
    }

    /// Whoever asks the lowest phase for the next step gets everywhere; `true` if the hardware is another afterwards.
    fn drive(&mut self, between: &mut impl FnMut(Moment)) -> bool {
        let (mut at, mut abandoned) = (Phase::Running, false);
        if self.passes(Moment::Begun, between) {
            abandoned = true;
        }
        loop {
            if abandoned && at <= Phase::Closed {
                self.agent.ask(Request::Resume);
                return false;
            }
            abandoned = match at {
                Phase::Running => {
                    self.agent.ask(Request::Close { limit_ms: 1000 });
                    self.passes(Moment::Closed, between) || {
                        self.agent.ask(Request::Drain {
                            limit_ms: 0,
                            arrivals: true,
                        });
                        self.passes(Moment::Drained, between)
                    }
                }
                Phase::Closed => {
                    self.agent.ask(Request::Stop { limit_ms: 1000 });
                    self.passes(Moment::Stopped, between)
                }
                Phase::Stopped => {
                    let Reply::Responders { responders } = self.agent.ask(Request::Responders)
                    else {
                        panic!("responders are answered by responders");
                    };
                    self.passes(Moment::Asked, between) || {
                        self.agent.ask(Request::Settle { responders });
                        self.passes(Moment::Settled, between)
                    }
                }
                Phase::Settled => {
                    self.agent.ask(Request::Release);
                    self.passes(Moment::Released, between)
                }
                Phase::Released => {
                    self.ask_in_spite_of_failures(&Request::Rebuild { devices: vec![] }, at);
                    self.passes(Moment::Rebuilt, between)
                }
                Phase::Rebuilt => {
                    let Reply::Numbers { numbers } = self.agent.ask(Request::Publish) else {
                        panic!("numbers are answered by numbers");
                    };
                    let numbers = vec![numbers];
                    self.ask_in_spite_of_failures(&Request::Connect { numbers }, at);
                    self.passes(Moment::Connected, between)
                }
                Phase::Connected => {
                    self.agent.ask(Request::Resume);
                    return true;
                }
            };
            let (agent, phase) = Agent::connect(self.runtime_dir);
            drop(agent);
            at = phase;
        }
    }

    /// A step that may be refused because the device failed, and is tried again as `reverbs resume` does.
    fn ask_in_spite_of_failures(&mut self, request: &Request, phase: Phase) {
        if self.fails {
            reverbs_wrappers::set_failing(true);
            let refused = (0..TRIES).all(|_| match self.agent.try_ask(request.clone()) {
                Ok(_) => false,
                Err((at, _)) => {
                    assert_eq!(at, phase, "where a step that failed leaves the process");
                    true
                }
            });
            reverbs_wrappers::set_failing(false);
            if !refused {
                return;
            }
        }
        self.agent.ask(request.clone());
    }

    /// Lets happen what happens at a moment; `true` if the orchestrator has died then, and another is in its place.
    fn passes(&mut self, moment: Moment, between: &mut impl FnMut(Moment)) -> bool {
        between(moment);
        let Some(death) = self.deaths.iter().position(|death| *death == moment) else {
            return false;
        };
        // The next one passes here again, and lives.
        self.deaths.remove(death);
        self.agent = Agent::connect(self.runtime_dir).0;
        self.sessions += 1;
        let id = format!("session {}", self.sessions);
        let refused = self.agent.try_ask(Agent::claim(&id, false));
        assert!(refused.is_err(), "two orchestrators at {moment:?}");
        self.claim(true);
        true
    }
}
