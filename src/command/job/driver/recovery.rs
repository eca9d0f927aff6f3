//! Bringing a job back to `Running` from wherever it stands.

use anyhow::{Error, Result, bail};

use reverbs::control::message::{Phase, Request};

use super::Driver;
use crate::command::job::agents::Agents;

impl<A: Agents> Driver<'_, A> {
    /// After a failure: brings everybody back to `Running`, on the device where they were, or one that fits. Gives what to
    /// end with: `error`, and either `outcome` or why the job is not back.
    pub(crate) fn recover(&mut self, error: Error, outcome: &'static str) -> Error {
        // The device asked for may be what has failed.
        self.devices.clear();
        match self.bring_back() {
            Err(worse) => worse.context(format!("after \"{error:#}\"")),
            // A job without RDMA has no agents at all.
            Ok(()) if self.phases.is_empty() && !self.ended.is_empty() => {
                error.context("the job has ended")
            }
            Ok(()) => error.context(outcome),
        }
    }

    /// Brings a job that stands anywhere back to `Running`.
    ///
    /// Backwards where nothing was moved yet. Else forwards, with one exception: where some are `Rebuilt` or later, those
    /// in `Running` have already finished (or have just been started) and are left alone, since taking their
    /// hardware away would cut the connections of the others.
    ///
    /// Nobody goes on without a process that is there but does not answer, or refuses: what its peers send meanwhile would be
    /// lost to it. Only where nothing was moved the others need not wait.
    ///
    /// # Errors
    /// A process refuses or does not answer, and the others wait where they are.
    pub(crate) fn bring_back(&mut self) -> Result<()> {
        self.tolerant = true;
        self.takeover = true;
        self.hindered.clear();
        self.look_around()?;
        let outcome = match self.hindered.is_empty() {
            true => self.backwards_or_forwards(),
            false => Ok(()),
        };
        if self.hindered.is_empty() {
            return outcome;
        }
        if !self.moved {
            // Whoever refuses that as well is among the hindered.
            let _ = self.finish();
        }
        let hindered = self.described(&self.hindered);
        if self.phases.values().any(|phase| *phase != Phase::Running) {
            bail!(
                "{hindered}; the others wait: make it answer, or end it, and run `reverbs resume`"
            );
        }
        bail!("{hindered}; the others run: `reverbs resume` when it answers again");
    }

    fn backwards_or_forwards(&mut self) -> Result<()> {
        if !self.phases.values().any(|phase| *phase > Phase::Closed) {
            return self.finish();
        }
        if self.phases.values().any(|phase| *phase >= Phase::Rebuilt) {
            let claimed_only = self.claimed_only();
            self.put(&claimed_only, &Request::Resume)?;
            self.phases.retain(|_, phase| *phase != Phase::Running);
            self.circle_closed = true;
        }
        self.release()?;
        self.restore_service()
    }
}
