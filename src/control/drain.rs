//! How long to drain.

use std::time::Duration;

use super::message::{DrainReport, Request};

/// One round of draining, and all of them together.
const ROUND: Duration = Duration::from_millis(20);
const LIMIT: Duration = Duration::from_secs(30);
/// Rounds in a row without progress, neither a completion nor a packet that arrived, after which what is outstanding is taken
/// to be stuck (no receive posted, peer not connected).
const STILL_ROUNDS: u32 = 2;

/// Rounds of draining.
#[derive(Debug, Default)]
pub struct Rounds {
    before: Option<DrainReport>,
    still: u32,
}

impl Rounds {
    /// The next round, for each process.
    #[must_use]
    pub fn request(&self) -> Request {
        Request::Drain {
            limit_ms: ROUND.as_millis() as u64,
            // Asking the devices costs a verb for each queue pair: only where something does not complete.
            arrivals: self.before.is_some(),
        }
    }

    /// Whether the round that brought `now`, over all processes, was the last; `took` is the time since the first began.
    pub fn is_over(&mut self, now: DrainReport, took: Duration) -> bool {
        let before = self.before.as_ref();
        self.still = match before.is_some_and(|before| is_still(before, &now)) {
            true => self.still + 1,
            false => 0,
        };
        let over = now.outstanding_sends == 0 || self.still >= STILL_ROUNDS || took > LIMIT;
        self.before = Some(now);
        over
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

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outstanding_sends: u64, completions: u64, psns: Option<u64>) -> DrainReport {
        DrainReport {
            outstanding_sends,
            completions,
            held_completions: 0,
            expected_psns: psns,
        }
    }

    #[test]
    fn nothing_outstanding_ends_it_at_once() {
        assert!(Rounds::default().is_over(report(0, 7, None), Duration::ZERO));
    }

    #[test]
    fn two_still_rounds_end_it_and_arrivals_or_completions_begin_anew() {
        let mut rounds = Rounds::default();
        let mut is_over = |completions, psns| {
            rounds.is_over(report(3, completions, psns), Duration::from_millis(1))
        };
        assert!(!is_over(0, None));
        assert!(!is_over(0, Some(5)));
        assert!(!is_over(0, Some(6)));
        assert!(!is_over(0, Some(6)));
        assert!(!is_over(1, None));
        assert!(!is_over(0, Some(6)));
        assert!(is_over(0, Some(6)));
    }

    #[test]
    fn it_does_not_go_on_for_ever() {
        let mut rounds = Rounds::default();
        assert!(!rounds.is_over(report(3, 9, None), LIMIT));
        assert!(rounds.is_over(report(3, 9, None), LIMIT + Duration::from_millis(1)));
    }
}
