//! What is done while all gates are closed and nothing was moved yet: the way back is still open.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use reverbs::control::drain::Rounds;
use reverbs::control::message::{DrainReport, HardwareQueuePair, Phase, Reply, Request};
use reverbs::control::outside::{self, Stray};

use super::Driver;
use crate::command::job::agents::Agents;
use crate::command::job::place::ProcessId;

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
        let strays = outside::strays(&peers, |peer, device| {
            let device = device.map(|(process, name)| (process.node, name));
            self.agents.whose(peer, device)
        })?;
        if strays.is_empty() {
            return Ok(());
        }
        let named =
            |stray: &Stray<ProcessId>| format!("{}: {stray}", self.agents.name(stray.process));
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
                .push(stray.pair(stray.process.pid));
        }
        for (process, queue_pairs) in of_process {
            self.put(&[process], &Request::GiveUp { queue_pairs })?;
        }
        Ok(())
    }

    pub(super) fn drain(&mut self) -> Result<()> {
        let began = self.agents.now();
        let mut rounds = Rounds::default();
        let now = loop {
            let targets = self.in_phases(&[Phase::Closed]);
            let mut now = DrainReport::default();
            for (_, reply) in self.put(&targets, &rounds.request())? {
                if let Reply::Drained { drained } = reply {
                    now.outstanding_sends += drained.outstanding_sends;
                    now.completions += drained.completions;
                    now.held_completions += drained.held_completions;
                    if let Some(psns) = drained.expected_psns {
                        *now.expected_psns.get_or_insert_default() += psns;
                    }
                }
            }
            if rounds.is_over(now.clone(), self.agents.now() - began) {
                break now;
            }
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
