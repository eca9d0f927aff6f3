//! Takes all agents of a job through the phases, each phase by all before any enters the next.
//!
//! One rule drives it forward: the agents in the *lowest* phase are asked to take the next step. That holds for a
//! job that starts from `Running`, for a process that opened a device in the middle of a checkpoint and has to
//! catch up, and for whatever an orchestrator that was killed has left behind. When something fails, [`Driver::recover`] looks
//! at where everybody is and takes them back to `Running`: backwards if nothing was moved yet, else forwards.

mod closed;
mod recovery;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};

use reverbs::control::message::{DeviceChoice, Phase, ProcessNumbers, Reply, Request, Session};
use reverbs::control::socket::LARGEST_FRAME;

use super::agents::{AgentFailure, Agents};
use super::place::ProcessId;
use crate::command::interrupt::Interrupt;
use crate::command::progress::{Progress, count};

/// How long an agent may wait for threads inside a verb, and for completions of a stop.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Processes that keep opening devices in the middle of a checkpoint are waited for this often.
const MOST_CATCH_UPS: u32 = 32;

/// The orchestrator's view of a job.
#[derive(Debug)]
pub(crate) struct Driver<'a, A> {
    agents: &'a mut A,
    progress: &'a mut Progress,
    interrupt: Interrupt,
    session: Session,
    devices: Vec<DeviceChoice>,
    /// Replace the session of an orchestrator that has died.
    takeover: bool,
    /// What fails is noted, and everybody else is asked all the same.
    tolerant: bool,
    /// Queue pairs that lead out of the job may end in error.
    allow_outside: bool,
    /// Nobody joins any more.
    circle_closed: bool,
    phases: BTreeMap<ProcessId, Phase>,
    /// Those whose session is ours.
    claimed: BTreeSet<ProcessId>,
    /// Those whose session was that of another orchestrator when we found them.
    inherited: BTreeSet<ProcessId>,
    ended: BTreeSet<ProcessId>,
    /// Those that are there but do not answer, or refuse although all is to go on, and why.
    hindered: BTreeMap<ProcessId, String>,
    /// Somebody may have been asked for what has no way back.
    moved: bool,
    /// Most bytes of what everybody has to be told at Connect, without what is fixed.
    numbers_bytes: BTreeMap<ProcessId, u64>,
}

impl<'a, A: Agents> Driver<'a, A> {
    /// A driver that will start from jobs in `Running`.
    pub(crate) fn new(
        agents: &'a mut A,
        progress: &'a mut Progress,
        interrupt: Interrupt,
        session: Session,
        devices: Vec<DeviceChoice>,
    ) -> Self {
        Self {
            agents,
            progress,
            interrupt,
            session,
            devices,
            takeover: false,
            tolerant: false,
            allow_outside: false,
            circle_closed: false,
            phases: BTreeMap::new(),
            claimed: BTreeSet::new(),
            inherited: BTreeSet::new(),
            ended: BTreeSet::new(),
            hindered: BTreeMap::new(),
            moved: false,
            numbers_bytes: BTreeMap::new(),
        }
    }

    /// Queue pairs that lead out of the job end in the error state, instead of being refused.
    pub(crate) fn allow_outside(&mut self, allow: bool) {
        self.allow_outside = allow;
    }

    /// Finds the agents and makes sure that nobody else is driving them. Returns how many there are.
    ///
    /// # Errors
    /// A process does not answer, is driven by another orchestrator, or was left half-way by one that died.
    pub(crate) fn attach(&mut self) -> Result<usize> {
        self.look_around()?;
        if let Some((process, phase)) = self.phases.iter().find(|(_, at)| **at != Phase::Running) {
            let name = self.agents.name(*process);
            bail!("{name} was left in phase {phase:?}: run `reverbs resume` first");
        }
        Ok(self.phases.len())
    }

    /// Finds the agents of a job that its orchestrator has left (or that was saved half-way), to take them over.
    ///
    /// # Errors
    /// A process does not answer, or the other orchestrator lives.
    pub(crate) fn attach_abandoned(&mut self) -> Result<usize> {
        self.takeover = true;
        self.moved = true;
        self.look_around()?;
        Ok(self.phases.len())
    }

    pub(crate) fn agents(&mut self) -> &mut A {
        self.agents
    }

    /// Both at once.
    pub(crate) fn parts(&mut self) -> (&mut A, &mut Progress) {
        (self.agents, self.progress)
    }

    /// Processes that had an agent and ended on the way.
    #[cfg(test)]
    pub(super) fn ended(&self) -> Vec<ProcessId> {
        self.ended.iter().copied().collect()
    }

    /// Takes all agents to `Released`: no RDMA object, mapping or file descriptor is left in the job.
    ///
    /// # Errors
    /// An obstacle (then nothing was moved), a refusal, a time-out, or an interrupt. Follow with [`Driver::recover`].
    pub(crate) fn release(&mut self) -> Result<()> {
        let mut catch_ups = 0;
        loop {
            if !self.tolerant {
                self.interrupt.check()?;
            }
            match self.lowest() {
                Some(Phase::Running) => self.close()?,
                Some(Phase::Closed) => {
                    if self.newcomers(&mut catch_ups)? == 0 {
                        self.look_outside()?;
                        self.drain()?;
                        self.stop()?;
                    }
                }
                Some(Phase::Stopped) => self.settle()?,
                Some(Phase::Settled) => {
                    self.step("release", Phase::Settled, &Request::Release)?;
                }
                _ => {
                    if self.newcomers(&mut catch_ups)? == 0 {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Takes all agents from `Released` to `Running`, on fresh hardware; whoever is not there yet catches up.
    ///
    /// # Errors
    /// A refusal or a time-out. Follow with [`Driver::recover`].
    pub(crate) fn restore_service(&mut self) -> Result<()> {
        let mut catch_ups = 0;
        let numbers = loop {
            // After a restart: processes that went on at once and opened a device before we looked for anybody.
            if self.lowest().is_some_and(|lowest| lowest < Phase::Released) {
                self.release()?;
            }
            let request = Request::Rebuild {
                devices: self.devices.clone(),
            };
            self.step("rebuild", Phase::Released, &request)?;
            let numbers = self.numbers()?;
            self.leave(&numbers)?;
            // Whoever opens a device from here on finds what was left; those before have to catch up.
            if self.newcomers(&mut catch_ups)? == 0 {
                break numbers;
            }
        };
        self.step("connect", Phase::Rebuilt, &Request::Connect { numbers })?;
        self.finish()
    }

    fn numbers(&mut self) -> Result<Vec<ProcessNumbers>> {
        let publishers = self.in_phases(&[Phase::Rebuilt, Phase::Connected]);
        let replies = self.put(&publishers, &Request::Publish)?;
        Ok(replies
            .into_iter()
            .filter_map(|(_, reply)| match reply {
                Reply::Numbers { numbers } => Some(numbers),
                _ => None,
            })
            .collect())
    }

    fn leave(&mut self, numbers: &[ProcessNumbers]) -> Result<()> {
        match self.agents.publish(numbers) {
            Err(error) if self.tolerant => {
                self.progress.note(&format!(
                    "processes that open their first device later will not reach the others: {error:#}"
                ));
                Ok(())
            }
            left => left,
        }
    }

    /// Learns where everybody is. Newly found agents take part from here on.
    fn look_around(&mut self) -> Result<usize> {
        let mut found = 0;
        for found_now in self.agents.scan() {
            let hello = match found_now {
                Ok(hello) => hello,
                Err(silent) if self.tolerant => {
                    self.hindered.insert(silent.process, silent.why);
                    continue;
                }
                Err(silent) => bail!("{}: {}", self.agents.name(silent.process), silent.why),
            };
            let joins = !self.circle_closed || self.phases.contains_key(&hello.process);
            if self.hindered.contains_key(&hello.process) || !joins {
                continue;
            }
            if let Some(owner) = &hello.session
                && owner.id == self.session.id
            {
                self.claimed.insert(hello.process);
            } else if let Some(owner) = &hello.session {
                if self.agents.is_alive(owner) {
                    bail!(
                        "{} is being driven by another reverbs, process {}: wait until it is done",
                        self.agents.name(hello.process),
                        owner.pid
                    );
                }
                if !self.takeover {
                    bail!(
                        "{} was left in phase {:?} by a reverbs that died: run `reverbs resume` first",
                        self.agents.name(hello.process),
                        hello.phase
                    );
                }
                self.inherited.insert(hello.process);
            } else {
                // Resumed already, although the answer to that was lost.
                self.claimed.remove(&hello.process);
            }
            if self.phases.insert(hello.process, hello.phase).is_none() {
                found += 1;
            }
        }
        Ok(found)
    }

    /// Looks for processes that have opened a device since, so that they can catch up.
    fn newcomers(&mut self, catch_ups: &mut u32) -> Result<usize> {
        let found = self.look_around()?;
        if found > 0 {
            *catch_ups += 1;
            if *catch_ups > MOST_CATCH_UPS {
                bail!("processes of the job keep opening RDMA devices; try again later");
            }
        }
        Ok(found)
    }

    fn lowest(&self) -> Option<Phase> {
        self.phases.values().min().copied()
    }

    /// Those that were claimed and never closed: nothing but the claim has to go.
    fn claimed_only(&self) -> Vec<ProcessId> {
        let mut running = self.in_phases(&[Phase::Running]);
        running
            .retain(|process| self.claimed.contains(process) || self.inherited.contains(process));
        running
    }

    fn in_phases(&self, phases: &[Phase]) -> Vec<ProcessId> {
        self.phases
            .iter()
            .filter(|(_, phase)| phases.contains(phase))
            .map(|(process, _)| *process)
            .collect()
    }

    fn close(&mut self) -> Result<()> {
        let began = self.agents.now();
        let targets = self.in_phases(&[Phase::Running]);
        if !self.tolerant {
            let mut obstacles = Vec::new();
            for (process, reply) in self.put(&targets, &Request::Examine)? {
                if let Reply::Obstacles {
                    obstacles: found,
                    numbers_bytes,
                } = reply
                {
                    self.numbers_bytes.insert(process, numbers_bytes);
                    let name = self.agents.name(process);
                    obstacles.extend(
                        found
                            .into_iter()
                            .map(|found| format!("{name}: {}", found.what)),
                    );
                }
            }
            if !obstacles.is_empty() {
                bail!("cannot be checkpointed: {}", obstacles.join("; "));
            }
            self.require_room_for_numbers()?;
        }
        let targets = self.in_phases(&[Phase::Running]);
        let limit_ms = milliseconds(CLOSE_LIMIT);
        self.put(&targets, &Request::Close { limit_ms })?;
        self.say("close", began, targets.len());
        Ok(())
    }

    /// All numbers go to everybody in one message. Without it the job would not come back, so this is looked at before
    /// anything is moved.
    fn require_room_for_numbers(&self) -> Result<()> {
        // Beside the numbers: the name of a process, and of the request.
        const BYTES_OF_A_PROCESS: u64 = 128;
        const BYTES_BESIDES: u64 = 1 << 16;
        let limit = u64::from(LARGEST_FRAME) - BYTES_BESIDES;
        let taken = self.numbers_bytes.values();
        let taken: u64 = taken.map(|bytes| bytes + BYTES_OF_A_PROCESS).sum();
        ensure!(
            taken <= limit,
            "cannot be checkpointed: the queue pairs and memory regions of all {} together take up to {} bytes to connect \
             again, and {limit} can be told: the job has too many of them",
            count(self.phases.len(), "process", "processes"),
            taken
        );
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        let limit_ms = milliseconds(STOP_LIMIT);
        self.moved = true;
        self.step("stop", Phase::Closed, &Request::Stop { limit_ms })
    }

    fn settle(&mut self) -> Result<()> {
        let began = self.agents.now();
        // Some may have settled already under an orchestrator that died; their peers need to know all the same.
        let targets = self.in_phases(&[Phase::Stopped, Phase::Settled]);
        let responders: Vec<_> = self
            .put(&targets, &Request::Responders)?
            .into_iter()
            .flat_map(|(_, reply)| match reply {
                Reply::Responders { responders } => responders,
                _ => Vec::new(),
            })
            .collect();
        let targets = self.in_phases(&[Phase::Stopped]);
        self.put(&targets, &Request::Settle { responders })?;
        self.say("settle", began, targets.len());
        Ok(())
    }

    /// The last step: everybody who stands where nothing is missing runs again, and the session ends.
    fn finish(&mut self) -> Result<()> {
        let began = self.agents.now();
        let mut targets = self.claimed_only();
        targets.extend(self.in_phases(&[Phase::Closed, Phase::Connected]));
        if !targets.is_empty() {
            self.put(&targets, &Request::Resume)?;
            self.say("resume", began, targets.len());
        }
        Ok(())
    }

    /// Sends one request to all that are in `phase`.
    fn step(&mut self, name: &str, phase: Phase, request: &Request) -> Result<()> {
        let began = self.agents.now();
        let targets = self.in_phases(&[phase]);
        if targets.is_empty() {
            return Ok(());
        }
        self.put(&targets, request)?;
        self.say(name, began, targets.len());
        Ok(())
    }

    pub(crate) fn say(&mut self, name: &str, began: Instant, processes: usize) {
        let took = self.agents.now() - began;
        self.progress
            .phase(name, took, &count(processes, "process", "processes"));
    }

    /// Asks all of `targets` at once, those that are not ours yet after claiming them. Returns what the willing answered.
    fn put(&mut self, targets: &[ProcessId], request: &Request) -> Result<Vec<(ProcessId, Reply)>> {
        let unclaimed: Vec<_> = targets
            .iter()
            .filter(|process| !self.claimed.contains(process))
            .copied()
            .collect();
        if !unclaimed.is_empty() {
            let begin = Request::Begin {
                session: self.session.clone(),
                takeover: self.takeover,
            };
            for (process, _) in self.put_claimed(&unclaimed, &begin)? {
                self.claimed.insert(process);
            }
        }
        let willing: Vec<_> = targets
            .iter()
            .filter(|process| self.claimed.contains(process))
            .copied()
            .collect();
        self.put_claimed(&willing, request)
    }

    fn put_claimed(
        &mut self,
        targets: &[ProcessId],
        request: &Request,
    ) -> Result<Vec<(ProcessId, Reply)>> {
        let mut answered = Vec::new();
        let mut failure = None;
        for (process, answer) in self.agents.ask(targets, request) {
            let why = match answer {
                Ok(Reply::Refused { phase, reason }) => {
                    self.phases.insert(process, phase);
                    if phase == Phase::Running && *request == Request::Resume {
                        continue;
                    }
                    reason
                }
                Ok(reply) => {
                    if let Reply::Done { phase } = reply {
                        self.phases.insert(process, phase);
                        if *request == Request::Resume {
                            self.claimed.remove(&process);
                            self.inherited.remove(&process);
                        }
                    }
                    answered.push((process, reply));
                    continue;
                }
                Err(AgentFailure::Ended) => {
                    self.phases.remove(&process);
                    self.claimed.remove(&process);
                    self.ended.insert(process);
                    let name = self.agents.name(process);
                    self.progress
                        .note(&format!("{name} ended; going on without it"));
                    continue;
                }
                Err(AgentFailure::Broken(why)) => {
                    failure.get_or_insert_with(|| anyhow!("{}: {why}", self.agents.name(process)));
                    self.phases.remove(&process);
                    self.hindered.insert(process, why);
                    continue;
                }
            };
            failure.get_or_insert_with(|| anyhow!("{}: {why}", self.agents.name(process)));
            if self.tolerant {
                self.phases.remove(&process);
                self.hindered.insert(process, why);
            }
        }
        if self.phases.is_empty() && !self.ended.is_empty() {
            failure.get_or_insert(anyhow!(
                "no process of the job is left that runs under reverbs"
            ));
        }
        failure.map_or(Ok(answered), Err)
    }

    fn described(&self, processes: &BTreeMap<ProcessId, String>) -> String {
        let each: Vec<_> = processes
            .iter()
            .map(|(process, why)| format!("{}: {why}", self.agents.name(*process)))
            .collect();
        each.join("; ")
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
