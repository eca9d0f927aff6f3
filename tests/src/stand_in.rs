//! A stand-in for the orchestrator: it takes a job through the phases as `reverbs` does, and vanishes where it is told to.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use reverbs::control::message::{
    PROTOCOL_VERSION, Phase, ProcessNumbers, Reply, Request, ResponderState, Session,
};
use reverbs::control::socket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::tree;

/// How long an agent may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What an orchestrator asks all agents before it asks any of them the next.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Step {
    Begin,
    Examine,
    Close,
    Drain,
    Stop,
    Responders,
    Settle,
    Release,
    Rebuild,
    Publish,
    Connect,
    Resume,
}

impl Step {
    /// In their order.
    pub const ALL: [Self; 12] = [
        Self::Begin,
        Self::Examine,
        Self::Close,
        Self::Drain,
        Self::Stop,
        Self::Responders,
        Self::Settle,
        Self::Release,
        Self::Rebuild,
        Self::Publish,
        Self::Connect,
        Self::Resume,
    ];

    /// Where a process stands that has carried out all steps up to and with this one.
    pub fn leads_to(self) -> Phase {
        match self {
            Self::Begin | Self::Examine | Self::Resume => Phase::Running,
            Self::Close | Self::Drain => Phase::Closed,
            Self::Stop | Self::Responders => Phase::Stopped,
            Self::Settle => Phase::Settled,
            Self::Release => Phase::Released,
            Self::Rebuild | Self::Publish => Phase::Rebuilt,
            Self::Connect => Phase::Connected,
        }
    }

    /// Where a process stands that has carried out all steps before this one.
    pub fn starts_from(self) -> Phase {
        let before = Self::ALL.into_iter().rev().find(|step| *step < self);
        before.map_or(Phase::Running, Self::leads_to)
    }
}

/// How an orchestrator dies in the middle of a step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Death {
    /// Half of the agents, those with the lower ids, have carried the step out; the others were not asked.
    SomeAsked,
    /// All have carried it out, and nobody heard.
    Unheard,
    /// Half of the request has arrived at each.
    HalfSaid,
}

/// An orchestrator with connections to all agents of a job.
#[derive(Debug)]
pub struct StandIn {
    session: Session,
    agents: Vec<UnixStream>,
    responders: Vec<ResponderState>,
    numbers: Vec<ProcessNumbers>,
}

impl StandIn {
    /// Connects to the agents of the job below `root`.
    ///
    /// # Errors
    /// When there are fewer than two.
    pub fn meet(root: u32) -> Result<Self> {
        let agents: Vec<_> = agents_of(root)?
            .into_iter()
            .map(|(_, stream)| stream)
            .collect();
        ensure!(agents.len() > 1, "agents found: {}", agents.len());
        Ok(Self {
            session: Session {
                id: format!("stand-in of {root}"),
                // Not a `reverbs`, so it is taken for dead by whoever looks.
                pid: std::process::id().cast_signed(),
            },
            agents,
            responders: Vec::new(),
            numbers: Vec::new(),
        })
    }

    /// Has a step carried out by all.
    ///
    /// # Errors
    /// When one refuses or does not answer.
    pub fn take(&mut self, step: Step) -> Result<()> {
        let request = self.request(step);
        for agent in &mut self.agents {
            socket::send(agent, &request)?;
        }
        for agent in &mut self.agents {
            match answer(agent, step)? {
                Reply::Responders { responders } => self.responders.extend(responders),
                Reply::Numbers { numbers } => self.numbers.push(numbers),
                Reply::Obstacles { obstacles, .. } => {
                    ensure!(obstacles.is_empty(), "{obstacles:?}")
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Dies in the middle of a step.
    ///
    /// # Errors
    /// When an agent that is to carry it out does not.
    pub fn vanish(mut self, step: Step, death: Death) -> Result<()> {
        let request = self.request(step);
        match death {
            Death::SomeAsked => {
                let half = self.agents.len() / 2;
                for agent in &mut self.agents[..half] {
                    socket::send(agent, &request)?;
                    answer(agent, step)?;
                }
            }
            Death::Unheard => {
                for agent in &mut self.agents {
                    socket::send(agent, &request)?;
                }
                for agent in &self.agents {
                    let limit = Timespec::try_from(ANSWER_LIMIT)?;
                    let answered = poll(&mut [PollFd::new(agent, PollFlags::IN)], Some(&limit))?;
                    ensure!(answered == 1, "no answer to {step:?}");
                }
            }
            Death::HalfSaid => {
                let mut frame = Vec::new();
                socket::send(&mut frame, &request)?;
                for agent in &mut self.agents {
                    agent.write_all(&frame[..frame.len() / 2])?;
                }
            }
        }
        Ok(())
    }

    fn request(&self, step: Step) -> Request {
        let limit_ms = 10_000;
        match step {
            Step::Begin => Request::Begin {
                session: self.session.clone(),
                takeover: false,
            },
            Step::Examine => Request::Examine,
            Step::Close => Request::Close { limit_ms },
            Step::Drain => Request::Drain {
                limit_ms: 20,
                arrivals: true,
            },
            Step::Stop => Request::Stop { limit_ms },
            Step::Responders => Request::Responders,
            Step::Settle => Request::Settle {
                responders: self.responders.clone(),
            },
            Step::Release => Request::Release,
            Step::Rebuild => Request::Rebuild {
                devices: Vec::new(),
            },
            Step::Publish => Request::Publish,
            Step::Connect => Request::Connect {
                numbers: self.numbers.clone(),
            },
            Step::Resume => Request::Resume,
        }
    }
}

/// What an agent says of itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Standing {
    pub phase: Phase,
    pub session: Option<Session>,
}

/// Where the processes of a job stand, as each of them says.
///
/// # Errors
/// When one does not answer.
pub fn standing(root: u32) -> Result<BTreeMap<u32, Standing>> {
    let mut found = BTreeMap::new();
    for (pid, mut stream) in agents_of(root)? {
        let hello = Request::Hello {
            version: PROTOCOL_VERSION,
        };
        socket::send(&mut stream, &hello)?;
        match socket::receive(&mut stream)? {
            Some(Reply::Hello { phase, session, .. }) => {
                found.insert(pid, Standing { phase, session })
            }
            other => bail!("process {pid} answers Hello with {other:?}"),
        };
    }
    Ok(found)
}

/// A connection to the agent of a process; `None` if it has none.
///
/// # Errors
/// When there is no folder of sockets.
pub fn connect(pid: u32) -> Result<Option<UnixStream>> {
    let path = socket::agent_socket(&socket::runtime_dir()?, pid.cast_signed());
    let Ok(stream) = UnixStream::connect(path) else {
        return Ok(None);
    };
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    Ok(Some(stream))
}

/// By their process ids.
fn agents_of(root: u32) -> Result<Vec<(u32, UnixStream)>> {
    let mut found = Vec::new();
    for pid in std::iter::once(root).chain(tree::descendants(root)) {
        if let Some(stream) = connect(pid)? {
            found.push((pid, stream));
        }
    }
    found.sort_by_key(|(pid, _)| *pid);
    Ok(found)
}

fn answer(agent: &mut UnixStream, step: Step) -> Result<Reply> {
    match socket::receive(agent).with_context(|| format!("answer to {step:?}"))? {
        Some(Reply::Refused { phase, reason }) => bail!("{step:?} refused in {phase:?}: {reason}"),
        Some(reply) => Ok(reply),
        None => bail!("no answer to {step:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_the_phases() {
        assert_eq!(Step::Begin.starts_from(), Phase::Running);
        assert_eq!(Step::Settle.starts_from(), Phase::Stopped);
        assert_eq!(Step::Resume.starts_from(), Phase::Connected);
        assert!(Step::ALL.is_sorted());
        for pair in Step::ALL.windows(2) {
            assert_eq!(pair[1].starts_from(), pair[0].leads_to());
        }
    }
}
