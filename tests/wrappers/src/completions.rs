//! Completions on their way up: held for a while, and overtaking each other.

use std::collections::HashMap;

use rdma_core_sys::{IBV_WC_RECV, IBV_WC_SUCCESS, ibv_wc};

use crate::state::State;

/// What each completion queue holds, by its address.
#[derive(Debug, Default)]
pub(crate) struct Completions {
    queues: HashMap<usize, Vec<Held>>,
    /// Opcodes of the UC sends that were turned into something that nobody receives, by queue pair and `wr_id`.
    pub(crate) lost: HashMap<(u32, u64), u32>,
}

#[derive(Clone, Copy)]
struct Held {
    completion: ibv_wc,
    /// Polls that do not see it yet.
    polls: u32,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{:#x}, {} polls", self.completion.wr_id, self.polls)
    }
}

impl Held {
    /// Must it stay behind an earlier one? The opcode of one that failed does not say of which queue it is.
    fn follows(&self, earlier: &Self) -> bool {
        let (this, that) = (&self.completion, &earlier.completion);
        let failed = [this, that].iter().any(|one| one.status != IBV_WC_SUCCESS);
        let receives = |one: &ibv_wc| one.opcode & IBV_WC_RECV != 0;
        this.qp_num == that.qp_num && (failed || receives(this) == receives(that))
    }
}

impl Completions {
    pub(crate) fn add(&mut self, queue: usize, mut completion: ibv_wc, polls: u32) {
        if let Some(opcode) = self.lost.remove(&(completion.qp_num, completion.wr_id)) {
            completion.opcode = opcode;
        }
        let held = Held { completion, polls };
        self.queues.entry(queue).or_default().push(held);
    }

    /// A poll has come by.
    pub(crate) fn ripen(&mut self, queue: usize) {
        for held in self.queues.entry(queue).or_default() {
            held.polls = held.polls.saturating_sub(1);
        }
    }

    /// Whatever is held is seen by the next poll: the queue is armed, or a queue pair goes.
    pub(crate) fn ripen_all(&mut self, wanted: impl Fn(usize) -> bool) {
        for (_, queue) in self.queues.iter_mut().filter(|(queue, _)| wanted(**queue)) {
            queue.iter_mut().for_each(|held| held.polls = 0);
        }
    }

    pub(crate) fn forget(&mut self, queue: usize) {
        self.queues.remove(&queue);
    }

    /// The next one of a queue: the first that may, or one of those that may.
    pub(crate) fn take(&mut self, queue: usize, state: &State) -> Option<ibv_wc> {
        let held = self.queues.get_mut(&queue)?;
        let may: Vec<usize> = (0..held.len())
            .filter(|at| {
                held[*at].polls == 0
                    && !held[..*at].iter().any(|earlier| held[*at].follows(earlier))
            })
            .collect();
        let which = match state.plan.reorder {
            true => state.random(may.len() as u32) as usize,
            false => 0,
        };
        may.get(which).map(|at| held.remove(*at).completion)
    }
}
