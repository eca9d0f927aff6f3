//! Agents without processes: they follow the rules of `reverbs::control::message` and keep a list of every rule that
//! the driver broke.

use std::collections::BTreeMap;

use reverbs::control::message::{
    DrainReport, HardwarePeer, Phase, ProcessNumbers, Reply, Request, ResponderState, Session,
};
use reverbs::control::owner::Whose;

use super::agents::{AgentFailure, Agents, Hello, Unreachable};
use super::place::{NodeId, ProcessId};

/// What happens to an agent when it is asked a certain thing for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mishap {
    Refuses,
    /// Does not do it and does not answer.
    Hangs,
    /// Does it, and the answer is lost.
    AnswerLost,
    /// Does not do it, and answers nothing any more.
    Stops,
    Dies,
}

#[derive(Clone, Debug)]
pub(crate) struct FakeAgent {
    pub(crate) phase: Phase,
    pub(crate) session: Option<Session>,
    pub(crate) mishap: Option<(&'static str, Mishap)>,
    /// Refuses for ever what the mishap names.
    pub(crate) stubborn: bool,
    /// Answers nothing.
    pub(crate) stopped: bool,
    /// Sends outstanding when closed, and how many complete in each round of draining.
    pub(crate) outstanding: u64,
    pub(crate) per_round: u64,
    /// Packets that still arrive, one in each round.
    pub(crate) arriving: u64,
    pub(crate) rebuilds: u64,
    /// Of its numbers at most.
    pub(crate) numbers_bytes: u64,
    pub(crate) resumed: u64,
}

/// A process of the first node.
pub(crate) fn process(pid: i32) -> ProcessId {
    ProcessId {
        node: NodeId::FIRST,
        pid,
    }
}

impl FakeAgent {
    pub(crate) fn at(phase: Phase) -> Self {
        Self {
            phase,
            session: None,
            mishap: None,
            stubborn: false,
            stopped: false,
            outstanding: 0,
            per_round: 1,
            arriving: 0,
            rebuilds: 0,
            numbers_bytes: 0,
            resumed: 0,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct FakeJob {
    pub(crate) agents: BTreeMap<ProcessId, FakeAgent>,
    /// Agents that appear when the named request has been answered by all.
    pub(crate) appear_after: Option<(&'static str, ProcessId, FakeAgent)>,
    /// Process ids of orchestrators that live.
    pub(crate) alive: Vec<i32>,
    pub(crate) asked: Vec<&'static str>,
    /// Whose numbers were left for later processes.
    pub(crate) published: Vec<i32>,
    pub(crate) broken_rules: Vec<String>,
    /// Whether agents in phases far from each other are a broken rule: not where a test set them up so.
    pub(crate) strict_barriers: bool,
}

impl FakeJob {
    pub(crate) fn of(phases: &[Phase]) -> Self {
        Self {
            agents: (100..)
                .zip(phases)
                .map(|(pid, phase)| (process(pid), FakeAgent::at(*phase)))
                .collect(),
            strict_barriers: true,
            ..Self::default()
        }
    }

    /// Everybody must have passed `phase` before anybody goes on from there.
    fn check_barrier(&mut self, name: &str, phase: Phase) {
        for (process, agent) in &self.agents {
            if self.strict_barriers && agent.phase < phase {
                let at = agent.phase;
                self.broken_rules
                    .push(format!("{name} while {process} is {at:?}"));
            }
        }
    }

    fn answer(&mut self, process: ProcessId, request: &Request) -> Result<Reply, AgentFailure> {
        let name = request.name();
        let Some(agent) = self.agents.get_mut(&process) else {
            return Err(AgentFailure::Ended);
        };
        if agent.stopped {
            return Err(AgentFailure::Broken("stopped".into()));
        }
        let mishap = agent.mishap.filter(|(at, _)| *at == name);
        if mishap.is_some() && !agent.stubborn {
            agent.mishap = None;
        }
        match mishap.map(|(_, what)| what) {
            Some(Mishap::Refuses) => {
                return Ok(Reply::Refused {
                    phase: agent.phase,
                    reason: "told to".into(),
                });
            }
            Some(Mishap::Hangs) => return Err(AgentFailure::Broken("told to".into())),
            Some(Mishap::Stops) => {
                agent.stopped = true;
                return Err(AgentFailure::Broken("stopped".into()));
            }
            Some(Mishap::Dies) => {
                self.agents.remove(&process);
                return Err(AgentFailure::Ended);
            }
            Some(Mishap::AnswerLost) => {
                agent.carry_out(request);
                return Err(AgentFailure::Broken("lost".into()));
            }
            None => {}
        }
        let mut reply = agent.carry_out(request);
        if let Reply::Numbers { numbers } = &mut reply {
            numbers.pid = process.pid;
        }
        if let Reply::Refused { reason, .. } = &reply {
            self.broken_rules
                .push(format!("{name} refused by {process}: {reason}"));
        }
        Ok(reply)
    }
}

/// The phase that everybody must have reached before anybody is asked this.
pub(crate) fn barrier_before(request: &Request) -> Option<Phase> {
    match request {
        Request::Stop { .. } => Some(Phase::Closed),
        Request::Responders => Some(Phase::Stopped),
        Request::Release => Some(Phase::Settled),
        Request::Rebuild { .. } => Some(Phase::Released),
        Request::Connect { .. } => Some(Phase::Rebuilt),
        _ => None,
    }
}

impl FakeAgent {
    fn carry_out(&mut self, request: &Request) -> Reply {
        let (from, to) = match request {
            Request::Begin { session, takeover } => {
                if self.session.is_some() && !takeover {
                    return self.refuse("owned");
                }
                self.session = Some(session.clone());
                return Reply::Done { phase: self.phase };
            }
            _ if self.session.is_none() => return self.refuse("no session"),
            Request::Examine if self.phase <= Phase::Closed => {
                return Reply::Obstacles {
                    obstacles: vec![],
                    numbers_bytes: self.numbers_bytes,
                };
            }
            Request::Peers if self.phase == Phase::Closed => {
                return Reply::Peers { contexts: vec![] };
            }
            Request::Drain { arrivals, .. } if self.phase == Phase::Closed => {
                let done = self.outstanding.min(self.per_round);
                self.outstanding -= done;
                self.arriving = self.arriving.saturating_sub(1);
                return Reply::Drained {
                    drained: DrainReport {
                        outstanding_sends: self.outstanding,
                        completions: done,
                        held_completions: 0,
                        expected_psns: arrivals.then_some(self.arriving),
                    },
                };
            }
            Request::Responders if matches!(self.phase, Phase::Stopped | Phase::Settled) => {
                return Reply::Responders {
                    responders: Vec::<ResponderState>::new(),
                };
            }
            Request::Publish if self.phase >= Phase::Rebuilt => {
                return Reply::Numbers {
                    numbers: ProcessNumbers {
                        pid: 0,
                        contexts: vec![],
                    },
                };
            }
            Request::Resume if matches!(self.phase, Phase::Running | Phase::Closed) => {
                (self.phase, Phase::Running)
            }
            Request::Close { .. } => (Phase::Running, Phase::Closed),
            Request::Stop { .. } => (Phase::Closed, Phase::Stopped),
            Request::Settle { .. } => (Phase::Stopped, Phase::Settled),
            Request::Release => (Phase::Settled, Phase::Released),
            Request::Rebuild { .. } => (Phase::Released, Phase::Rebuilt),
            Request::Connect { .. } => (Phase::Rebuilt, Phase::Connected),
            Request::Resume => (Phase::Connected, Phase::Running),
            _ => return self.refuse("not in this phase"),
        };
        if self.phase != from {
            return self.refuse("not in this phase");
        }
        self.phase = to;
        match request {
            Request::Rebuild { .. } => self.rebuilds += 1,
            Request::Resume => {
                self.session = None;
                self.resumed += 1;
            }
            _ => {}
        }
        Reply::Done { phase: to }
    }

    fn refuse(&self, reason: &str) -> Reply {
        Reply::Refused {
            phase: self.phase,
            reason: format!("{reason} ({:?})", self.phase),
        }
    }
}

impl Agents for FakeJob {
    fn scan(&mut self) -> Vec<Result<Hello, Unreachable>> {
        self.agents
            .iter()
            .map(|(process, agent)| match agent.stopped {
                true => Err(Unreachable {
                    process: *process,
                    why: "stopped".into(),
                }),
                false => Ok(Hello {
                    process: *process,
                    phase: agent.phase,
                    session: agent.session.clone(),
                }),
            })
            .collect()
    }

    fn ask(
        &mut self,
        targets: &[ProcessId],
        request: &Request,
    ) -> Vec<(ProcessId, Result<Reply, AgentFailure>)> {
        if targets.is_empty() {
            return Vec::new();
        }
        let name = request.name();
        self.asked.push(name);
        if let Some(phase) = barrier_before(request) {
            self.check_barrier(name, phase);
        }
        let answers = targets
            .iter()
            .map(|process| (*process, self.answer(*process, request)))
            .collect();
        if let Some((_, process, agent)) = self.appear_after.take_if(|(after, ..)| *after == name) {
            self.agents.insert(process, agent);
        }
        answers
    }

    fn name(&self, process: ProcessId) -> String {
        process.to_string()
    }

    fn is_alive(&self, session: &Session) -> bool {
        self.alive.contains(&session.pid)
    }

    fn publish(&mut self, numbers: &[ProcessNumbers]) -> anyhow::Result<()> {
        self.published = numbers.iter().map(|process| process.pid).collect();
        Ok(())
    }

    fn whose(&mut self, _: &HardwarePeer, _: Option<(NodeId, &str)>) -> anyhow::Result<Whose> {
        Ok(Whose::Nobodys)
    }
}
