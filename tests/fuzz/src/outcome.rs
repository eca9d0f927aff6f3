//! What must become of requests that were accepted: each completes once, in order.

use std::collections::VecDeque;

use rdma_core_sys::{IBV_WC_SUCCESS, ibv_wc};

use crate::device::device;

/// A send that was accepted.
#[derive(Clone, Debug)]
pub struct Sent {
    pub wr_id: u64,
    pub token: u32,
    pub signaled: bool,
    /// Accepted, but it cannot succeed.
    pub doomed: bool,
    /// An unreliable one that was in the device when its queue pair was stopped.
    pub may_be_lost: bool,
    pub inline: Option<Vec<u8>>,
}

/// The sends of a queue pair that were accepted and are not known to be done.
#[derive(Debug, Default)]
pub struct Sends {
    pub outstanding: VecDeque<Sent>,
    /// Something has happened that ends it in the error state, or may.
    pub excused: bool,
    /// An orchestrator may have lied about what was executed.
    pub unproven: bool,
}

fn executions(token: u32) -> u32 {
    device().executed.get(&token).copied().unwrap_or(0)
}

impl Sent {
    fn check_done(&self, unproven: bool) {
        if unproven {
            return;
        }
        assert!(!self.doomed, "it cannot succeed: {self:?}");
        let times = executions(self.token);
        if times == 0 && self.may_be_lost {
            return;
        }
        assert_eq!(times, 1, "executions of {self:?}");
        if let Some(bytes) = &self.inline {
            assert_eq!(device().inline.get(&self.token), Some(bytes), "{self:?}");
        }
    }
}

impl Sends {
    /// One was accepted.
    pub fn accept(&mut self, sent: Sent) {
        self.excused |= sent.doomed;
        self.outstanding.push_back(sent);
    }

    /// A completion of one has come.
    ///
    /// # Panics
    /// It is not the one that is due.
    pub fn complete(&mut self, completion: &ibv_wc) {
        loop {
            let next = self.outstanding.pop_front();
            let Some(next) = next else {
                panic!("nothing such is outstanding: {:#x}", completion.wr_id)
            };
            if next.wr_id != completion.wr_id {
                assert!(!next.signaled, "it never completed: {next:?}");
                next.check_done(self.unproven);
                continue;
            }
            if completion.status == IBV_WC_SUCCESS {
                assert!(next.signaled, "nobody asked for its completion: {next:?}");
                next.check_done(self.unproven);
            } else {
                assert!(self.excused, "status {}: {next:?}", completion.status);
                let times = executions(next.token);
                assert!(times <= 1 || self.unproven, "executed twice: {next:?}");
            }
            return;
        }
    }

    /// The queue pair was moved to the error state, and polled until nothing came.
    ///
    /// # Panics
    /// Something that was accepted has not come back.
    pub fn check_end(&mut self) {
        for left in self.outstanding.drain(..) {
            assert!(!left.signaled, "it never completed: {left:?}");
            left.check_done(self.unproven);
        }
        self.excused = false;
        self.unproven = false;
    }
}
