//! What is done while all gates are closed and nothing was moved yet: the way back is still open.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};

use reverbs::control::message::{DrainReport, HardwareQueuePair, Phase, Reply, Request};

use super::{Driver, milliseconds};
use crate::command::job::agents::Agents;
use crate::command::job::outside;
use crate::command::job::place::ProcessId;

/// One round of draining, and all of them together.
const DRAIN_ROUND: Duration = Duration::from_millis(20);
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// Rounds in a row without progress, neither a completion nor a packet that arrived, after which what is outstanding is taken
/// to be stuck (no receive posted, peer not connected).
const STILL_ROUNDS: u32 = 2;

impl<A: Agents> Driver<'_, A> {
    /// Nothing leads out of the job, or may end in error.
    pub(super) fn look_outside(&mut self) -> Result<()> {
        let targets = self.in_phases(&[Phase::Closed]);
        // Whoever catches up with others has peers among them that have no hardware any more.
        if self.tolerant || targets.len() != self.phases.len() {
            return Ok(());
        }
        let peers: Vec<_> = self
            .put(&targets, &Request::Peers)?
            .into_iter()
            .filter_map(|(process, reply)| match reply {
                Reply::Peers { contexts } => Some((process, contexts)),
                _ => None,
            })
            .collect();
        let strays = outside::strays(&peers, |peer, device| self.agents.whose(peer, device))?;
        if strays.is_empty() {
            return Ok(());
        }
        let named =
            |stray: &outside::Stray| format!("{}: {stray}", self.agents.name(stray.process));
        if !self.allow_outside {
            let named: Vec<_> = strays.iter().map(named).collect();
            bail!("cannot be checkpointed: {}", outside::refusal(&named));
        }
        for stray in &strays {
            self.progress
                .note(&format!("{}: it will end in the error state", named(stray)));
        }
        // To each its own: queue pairs of two nodes may bear the same numbers.
        let mut of_process: BTreeMap<ProcessId, Vec<HardwareQueuePair>> = BTreeMap::new();
        for stray in strays {
            of_process
                .entry(stray.process)
                .or_default()
                .push(stray.pair);
        }
        for (process, queue_pairs) in of_process {
            self.put(&[process], &Request::GiveUp { queue_pairs })?;
        }
        Ok(())
    }

    pub(super) fn drain(&mut self) -> Result<()> {
        let began = self.agents.now();
        let mut still = 0;
        let mut before: Option<DrainReport> = None;
        let limit_ms = milliseconds(DRAIN_ROUND);
        let now = loop {
            let targets = self.in_phases(&[Phase::Closed]);
            let mut now = DrainReport::default();
            // Asking the devices costs a verb for each queue pair: only where something does not complete.
            let arrivals = before.is_some();
            for (_, reply) in self.put(&targets, &Request::Drain { limit_ms, arrivals })? {
                if let Reply::Drained { drained } = reply {
                    now.outstanding_sends += drained.outstanding_sends;
                    now.completions += drained.completions;
                    now.held_completions += drained.held_completions;
                    if let Some(psns) = drained.expected_psns {
                        *now.expected_psns.get_or_insert_default() += psns;
                    }
                }
            }
            still = if before.as_ref().is_some_and(|before| is_still(before, &now)) {
                still + 1
            } else {
                0
            };
            let over = still >= STILL_ROUNDS || self.agents.now() - began > DRAIN_LIMIT;
            if now.outstanding_sends == 0 || over {
                break now;
            }
            before = Some(now);
        };
        self.progress.phase(
            "drain",
            self.agents.now() - began,
            &format!(
                "{} completions held, {} sends outstanding",
                now.held_completions, now.outstanding_sends
            ),
        );
        Ok(())
    }
}

/// Whether nothing has happened between two rounds of draining. A long message completes nothing for a while, but its packets
/// arrive; where one round has not asked for them, they do not count.
fn is_still(before: &DrainReport, now: &DrainReport) -> bool {
    let arrived = match (before.expected_psns, now.expected_psns) {
        (Some(before), Some(now)) => before != now,
        _ => false,
    };
    now.completions == 0 && before.outstanding_sends == now.outstanding_sends && !arrived
}
