//! What completions must say, and what must be left at the end.

use rdma_core_sys::{
    IBV_WC_COMP_SWAP, IBV_WC_FETCH_ADD, IBV_WC_GRH, IBV_WC_RDMA_READ, IBV_WC_RDMA_WRITE,
    IBV_WC_RECV, IBV_WC_SEND, IBV_WC_SUCCESS, IBV_WC_WITH_IMM, IBV_WC_WR_FLUSH_ERR, ibv_wc,
};
use reverbs_benches::null_device::GID;

use super::arena::SLOT;
use super::link::{COUNTER, End, Link, TARGET, Transport, constant};
use super::post::content;
use super::queues::{Receives, Shared};
use super::{Kind, LONGEST_DELAY, Operation, Program, RECEIVE};
use crate::fabric::{GRH_BYTES, fabric};

impl Program {
    /// Takes completions of a side and checks each of them.
    ///
    /// # Panics
    /// One is not what is due.
    pub fn poll(&mut self, side: usize) {
        while let Some(completion) = self.sides[side].send_queue.poll() {
            assert!(
                completion.wr_id & RECEIVE == 0,
                "a receive in the queue for sends"
            );
            self.take(side, &completion);
        }
        while let Some(completion) = self.sides[side].receive_queue.poll() {
            assert!(
                completion.wr_id & RECEIVE != 0,
                "a send in the queue for receives"
            );
            self.take(side, &completion);
        }
    }

    fn take(&mut self, side: usize, completion: &ibv_wc) {
        let serial = match completion.wr_id & RECEIVE {
            0 => (completion.wr_id - self.base) >> 24,
            _ => (completion.wr_id & !RECEIVE) >> 32,
        };
        let of_shared = completion.wr_id & RECEIVE != 0 && serial == Shared::SERIAL;
        let found = self.links.iter().position(|link| match of_shared {
            true => link.number(side) == completion.qp_num && link.plan.shared,
            false => link.serial == serial,
        });
        let Some(link) = found else {
            assert!(!of_shared, "of queue pair {:#x}", completion.qp_num);
            assert!(
                self.gone.contains(&serial),
                "of no queue pair there ever was"
            );
            return;
        };
        let Self { links, sides, .. } = self;
        let link = &mut links[link];
        assert_eq!(
            completion.qp_num,
            link.number(side),
            "queue pair of a completion"
        );
        if completion.wr_id & RECEIVE == 0 {
            link.take_send(side, completion);
        } else if of_shared {
            link.take_receive(side, completion, Some(&mut sides[side].shared.receives));
        } else {
            link.take_receive(side, completion, None);
        }
    }

    /// Lets everything happen that is still to happen, and checks what is left behind.
    ///
    /// # Panics
    /// Anything is missing, or there is too much of it.
    pub fn finish(mut self) {
        for link in 0..self.links.len() {
            for _ in 0..3 {
                (0..2).for_each(|end| self.links[link].advance(end));
            }
        }
        // So that tails that nobody asked about are seen to be done, too.
        let last = super::Wish {
            kind: Kind::Send,
            length: 8,
            signaled: true,
            inline: false,
            elements: 1,
        };
        for link in 0..self.links.len() {
            for end in 0..2 {
                let mut turns = 0;
                while !self.links[link].is_down() && self.links[link].ends[end].is_full() {
                    assert!(turns < 400, "link {link}, end {end}: nothing moves");
                    turns += 1;
                    self.turn();
                }
                if !self.links[link].is_down() {
                    self.post(link, end, &[last], None);
                }
            }
        }
        for _ in 0..400 {
            if !self.links.iter().any(Link::is_busy) {
                break;
            }
            self.turn();
        }
        for side in &mut self.sides {
            side.send_queue.take_owed_event();
            side.receive_queue.take_owed_event();
        }
        for link in 0..self.links.len() {
            if self.links[link].is_down() {
                (0..2).for_each(|end| self.fail(link, end));
            }
        }
        self.poll_until_silent();
        self.links.iter().for_each(Link::check_end);
        self.check_account();
        assert_eq!(fabric().violations, [""; 0]);
        drop(self);
        let fabric = fabric();
        assert!(fabric.is_empty(), "hardware is left behind: {fabric:?}");
    }

    /// A device may hold completions back for a few polls.
    pub(super) fn poll_until_silent(&mut self) {
        for _ in 0..LONGEST_DELAY {
            (0..2).for_each(|side| self.poll(side));
        }
    }

    fn turn(&mut self) {
        for link in 0..self.links.len() {
            (0..2).for_each(|end| self.receive(link, end, 1));
        }
        let pairs = fabric().pairs();
        for number in pairs {
            for _ in 0..4 {
                let mut fabric = fabric();
                fabric.deliver(number, false);
                fabric.acknowledge(number);
            }
        }
        (0..2).for_each(|side| self.poll(side));
    }
}

impl End {
    fn is_full(&self) -> bool {
        self.posted.len() >= super::DEPTH as usize
    }
}

impl Link {
    /// Something is to come yet.
    fn is_busy(&self) -> bool {
        let reliable = self.plan.transport == Transport::Reliable;
        !self.is_down()
            && self
                .ends
                .iter()
                .any(|end| !end.posted.is_empty() || reliable && !end.due.is_empty())
    }

    fn take_send(&mut self, end: usize, completion: &ibv_wc) {
        let this = &mut self.ends[end];
        if completion.status == IBV_WC_WR_FLUSH_ERR {
            assert!(this.is_down(), "flushed, and its connection is fine");
            // What was done and not signaled is not heard of.
            while let Some(done) = this.posted.pop_front_if(|done| {
                !done.signaled && done.name < completion.wr_id && !this.flushed
            }) {
                assert!(
                    done.kind.answers() || has_left(done.name),
                    "{done:?} is missing"
                );
            }
            this.flushed = true;
            let due = this.posted.pop_front().map(|due| due.name);
            assert_eq!(due, Some(completion.wr_id), "flushed send");
            return;
        }
        assert_eq!(completion.status, IBV_WC_SUCCESS, "status of a send");
        assert!(!this.flushed, "success after a flush");
        // What was not signaled is done with the next that is.
        loop {
            let done = this.posted.pop_front().expect("something is posted");
            this.check_result(&done);
            if done.name == completion.wr_id {
                assert!(done.signaled, "completion of {done:?}");
                assert_eq!(completion.opcode, done.kind.completion(), "{done:?}");
                return;
            }
            assert!(!done.signaled, "{done:?} never completed");
        }
    }

    fn take_receive(&mut self, end: usize, completion: &ibv_wc, shared: Option<&mut Receives>) {
        let sender = self.number(1 - end);
        let this = &mut self.ends[end];
        let own = shared.is_none();
        let receives = shared.unwrap_or(&mut this.receives);
        let first = receives.posted.front().copied();
        let slot = receives.take(completion.wr_id);
        assert!(!own || first == Some(slot), "order of receives");
        if completion.status == IBV_WC_WR_FLUSH_ERR {
            assert!(
                this.failed || this.broken,
                "a receive is flushed, and its connection is fine"
            );
            return;
        }
        assert_eq!(completion.status, IBV_WC_SUCCESS, "status of a receive");
        let header = match self.plan.transport {
            Transport::Datagram => GRH_BYTES,
            _ => 0,
        };
        let at = slot * SLOT;
        let mut due = this.due.pop_front().expect("the other end has sent");
        if self.plan.transport != Transport::Reliable {
            // Those before it may be lost, which is counted at the end.
            let name = receives.arena.word(at + header);
            let is_meant = |due: &Operation| match completion.opcode {
                IBV_WC_RECV => due.name == name,
                _ => completion_immediate(completion) == due.immediate(),
            };
            while !is_meant(&due) {
                due = this.due.pop_front().expect("a message that was sent");
            }
        }
        assert_eq!(completion.opcode & IBV_WC_RECV, IBV_WC_RECV, "{due:?}");
        assert_eq!(completion.byte_len, due.length + header as u32, "{due:?}");
        let immediate = completion.wc_flags & IBV_WC_WITH_IMM != 0;
        assert_eq!(immediate, due.kind.has_immediate(), "{due:?}");
        if immediate {
            assert_eq!(completion_immediate(completion), due.immediate(), "{due:?}");
        }
        if header > 0 {
            assert!(completion.wc_flags & IBV_WC_GRH != 0);
            assert_eq!(completion.src_qp, sender, "sender of a datagram");
            let grh = receives.arena.bytes(at, header);
            assert_eq!((&grh[8..24], &grh[24..]), (&GID[..], &GID[..]), "GRH");
        }
        if let Kind::Send | Kind::SendWithImmediate = due.kind {
            let bytes = receives.arena.bytes(at + header, due.length as usize);
            assert!(bytes == content(due.name, due.length), "bytes of {due:?}");
        }
    }

    /// Nothing is left that was posted; reliable links have left the right things behind.
    fn check_end(&self) {
        let down = self.is_down();
        for (index, end) in self.ends.iter().enumerate() {
            let what = format!("{:?}, end {index}", self.plan);
            // Of what was done and not signaled nothing is heard if what is behind it was not posted.
            let unheard = |done: &Operation| {
                down && !end.flushed
                    && !done.signaled
                    && (done.kind.answers() || has_left(done.name))
            };
            let left: Vec<_> = end.posted.iter().filter(|done| !unheard(done)).collect();
            assert!(left.is_empty(), "{what}: left {left:?}");
            if down {
                assert!(end.receives.posted.is_empty(), "{what}: receives are left");
            }
            if down || self.plan.transport != Transport::Reliable {
                continue;
            }
            let other = &self.ends[1 - index];
            assert!(other.due.is_empty(), "{what}: not received {:?}", other.due);
            assert_eq!(other.arena.word(COUNTER), end.counter, "{what}: counter");
            for last in end.written.iter().flatten() {
                let at = TARGET + last.target() * SLOT;
                let bytes = other.arena.bytes(at, last.length as usize);
                assert!(bytes == content(last.name, last.length), "{what}: {last:?}");
            }
        }
    }

    /// What was posted was executed once, or lost by the wire, which may happen only to what is not reliable.
    pub(super) fn account(&self) -> Vec<Account> {
        self.account_if(self.is_down())
    }

    /// The same of a link that is about to be destroyed.
    pub(super) fn closed_account(&self) -> Vec<Account> {
        self.account_if(true)
    }

    fn account_if(&self, down: bool) -> Vec<Account> {
        let names = self.ends.iter().flat_map(|end| &end.names);
        names
            .map(|name| Account {
                name: *name,
                reliable: self.plan.transport == Transport::Reliable,
                down,
            })
            .collect()
    }
}

/// A message whose fate is to be checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Account {
    name: u64,
    reliable: bool,
    /// Its connection ended before it was sure to arrive.
    down: bool,
}

impl Account {
    pub(super) fn check(&self) {
        let fabric = fabric();
        let times = |of: &std::collections::BTreeMap<u64, u32>| of.get(&self.name).copied();
        let executed = times(&fabric.executions).unwrap_or(0);
        let lost = times(&fabric.losses).unwrap_or(0);
        let fates = executed + lost;
        assert!(
            (fates == 1 || self.down && fates == 0) && !(self.reliable && lost > 0),
            "executed {executed} times, lost {lost} times: {self:x?}"
        );
    }
}

impl End {
    /// What a READ or an atomic brought back.
    fn check_result(&self, done: &Operation) {
        if !done.kind.answers() {
            return;
        }
        let found = self.arena.word(done.result());
        assert_eq!(found, done.counter, "{done:?}");
        if done.kind == Kind::Read {
            let length = done.length as usize - 8;
            let behind = self.arena.bytes(done.result() + 8, length);
            assert!(behind == constant()[..length], "bytes of {done:?}");
        }
    }
}

impl Kind {
    fn completion(self) -> u32 {
        match self {
            Self::Send | Self::SendWithImmediate => IBV_WC_SEND,
            Self::Write | Self::WriteWithImmediate => IBV_WC_RDMA_WRITE,
            Self::Read => IBV_WC_RDMA_READ,
            Self::Add => IBV_WC_FETCH_ADD,
            Self::CompareAndSwap => IBV_WC_COMP_SWAP,
        }
    }
}

fn has_left(name: u64) -> bool {
    let fabric = fabric();
    fabric.executions.contains_key(&name) || fabric.losses.contains_key(&name)
}

fn completion_immediate(completion: &ibv_wc) -> u32 {
    // SAFETY: plain bytes.
    unsafe { completion.__bindgen_anon_1.imm_data }
}
