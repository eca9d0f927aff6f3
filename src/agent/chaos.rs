//! Fresh hardware again and again, without an orchestrator: `REVERBS_CHAOS=cycle:20ms`. docs/chaos.md.
//!
//! The agent takes its own process through the phases, as the command does with those of a job, and answers nobody meanwhile.
//! So whoever asks finds the process running.

use std::time::{Duration, Instant};

use super::serve::State;
use crate::checkpoint;
use crate::control::drain::Rounds;
use crate::control::message::{ChaosStatus, ContextPeers, Phase, Reply, Request};
use crate::control::outside;
use crate::control::owner;
use crate::virt::process::process;

const VARIABLE: &str = "REVERBS_CHAOS";

/// How long to wait for threads inside a verb, and for what a stop flushes.
const LIMIT: Duration = Duration::from_secs(10);

/// When the hardware is replaced next.
#[derive(Debug)]
pub(super) struct Chaos {
    /// From the end of a cycle to the begin of the next.
    every: Duration,
    next: Instant,
    status: ChaosStatus,
    /// Of what stood in the way and was logged.
    said: Option<String>,
}

impl Chaos {
    /// `None` if nobody asks for it, or in words that nobody understands.
    pub(super) fn from_environment() -> Option<Self> {
        let asked = std::env::var_os(VARIABLE)?;
        match asked.to_str().and_then(every) {
            Some(every) => Some(Self {
                every,
                next: Instant::now() + every,
                status: ChaosStatus::default(),
                said: None,
            }),
            None => {
                tracing::error!(
                    ?asked,
                    "{VARIABLE} is not understood, and nothing is done; it is cycle:DURATION, as in cycle:20ms or cycle:1s"
                );
                None
            }
        }
    }

    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Replaces the hardware if it is time.
    pub(super) fn turn(&mut self, state: &mut State) {
        let now = Instant::now();
        // A process that was saved may wake up under another clock.
        self.next = self.next.min(now + self.every);
        if now < self.next {
            return;
        }
        if !state.has_session() && !process().contexts().is_empty() {
            match cycle(state) {
                Ok(()) => {
                    self.status.cycles += 1;
                    self.said = None;
                    let ChaosStatus {
                        cycles, skipped, ..
                    } = self.status;
                    tracing::info!(cycles, skipped, "hardware replaced");
                }
                Err(why) => self.skip(state, why),
            }
            state.show_chaos(&self.status);
        }
        self.next = Instant::now() + self.every;
    }

    /// What was begun and moved nothing is undone; else the next turn goes on where this one has ended.
    fn skip(&mut self, state: &mut State, why: String) {
        if state.phase() == Phase::Closed {
            // Gates open again whatever it answers.
            let _ = state.answer(Request::Resume);
        }
        self.status.skipped += 1;
        // The same again and again would fill the log.
        if self.said.as_ref() == Some(&why) {
            tracing::debug!(why, "hardware not replaced");
        } else {
            tracing::warn!(why, "hardware not replaced");
        }
        self.said = Some(why.clone());
        self.status.last_skip = Some(why);
    }
}

/// The duration in `cycle:DURATION`.
fn every(asked: &str) -> Option<Duration> {
    let duration = asked.strip_prefix("cycle:")?;
    let digits = duration.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = duration.split_at(digits);
    let number: u32 = number.parse().ok()?;
    let every = match unit {
        "ms" => Duration::from_millis(number.into()),
        "s" => Duration::from_secs(number.into()),
        _ => return None,
    };
    (!every.is_zero()).then_some(every)
}

/// From the phase the process is in to `Running`, on fresh hardware.
fn cycle(state: &mut State) -> Result<(), String> {
    loop {
        match state.phase() {
            Phase::Running => close(state)?,
            Phase::Closed => {
                require_peers_inside(state)?;
                drain(state)?;
                done(state.answer(Request::Stop {
                    limit_ms: milliseconds(LIMIT),
                }))?;
            }
            Phase::Stopped => {
                let responders = match state.answer(Request::Responders) {
                    Reply::Responders { responders } => responders,
                    other => return Err(refusal(other)),
                };
                done(state.answer(Request::Settle { responders }))?;
            }
            Phase::Settled => done(state.answer(Request::Release))?,
            Phase::Released => done(state.answer(Request::Rebuild {
                devices: Vec::new(),
            }))?,
            Phase::Rebuilt => {
                let numbers = match state.answer(Request::Publish) {
                    Reply::Numbers { numbers } => vec![numbers],
                    other => return Err(refusal(other)),
                };
                done(state.answer(Request::Connect { numbers }))?;
            }
            Phase::Connected => return done(state.answer(Request::Resume)),
        }
    }
}

fn close(state: &mut State) -> Result<(), String> {
    match state.answer(Request::Examine) {
        Reply::Obstacles { obstacles, .. } if obstacles.is_empty() => {}
        Reply::Obstacles { obstacles, .. } => {
            let what: Vec<_> = obstacles.into_iter().map(|found| found.what).collect();
            return Err(what.join("; "));
        }
        other => return Err(refusal(other)),
    }
    done(state.answer(Request::Close {
        limit_ms: milliseconds(LIMIT),
    }))
}

/// Others would not be told the new numbers.
fn require_peers_inside(state: &mut State) -> Result<(), String> {
    let contexts = match state.answer(Request::Peers) {
        Reply::Peers { contexts } => contexts,
        other => return Err(refusal(other)),
    };
    let pid = std::process::id().cast_signed();
    let job: [(i32, Vec<ContextPeers>); 1] = [(pid, contexts)];
    let strays = outside::strays(&job, |peer, device| {
        owner::whose(peer, device.map(|(_, name)| name), &[pid])
    });
    match strays {
        Ok(strays) => match strays.first() {
            None => {}
            Some(stray) => return Err(stray.to_string()),
        },
        Err(error) => return Err(format!("{error:#}")),
    }
    checkpoint::require_datagrams_inside()
}

fn drain(state: &mut State) -> Result<(), String> {
    let began = Instant::now();
    let mut rounds = Rounds::default();
    loop {
        let drained = match state.answer(rounds.request()) {
            Reply::Drained { drained } => drained,
            other => return Err(refusal(other)),
        };
        if rounds.is_over(drained, began.elapsed()) {
            return Ok(());
        }
    }
}

fn done(reply: Reply) -> Result<(), String> {
    match reply {
        Reply::Done { .. } => Ok(()),
        other => Err(refusal(other)),
    }
}

fn refusal(reply: Reply) -> String {
    match reply {
        Reply::Refused { reason, .. } => reason,
        other => format!("an answer that does not belong here: {other:?}"),
    }
}

fn milliseconds(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_has_a_unit_and_is_not_zero() {
        assert_eq!(every("cycle:20ms"), Some(Duration::from_millis(20)));
        assert_eq!(every("cycle:3s"), Some(Duration::from_secs(3)));
        for wrong in [
            "",
            "20ms",
            "cycle",
            "cycle:",
            "cycle:20",
            "cycle:0ms",
            "cycle:-1ms",
            "cycle:1.5s",
            "cycle:20 ms",
            "cycle:1h",
            "cycle:99999999999s",
        ] {
            assert_eq!(every(wrong), None, "{wrong:?}");
        }
    }
}
