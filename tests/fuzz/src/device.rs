//! A device that looks closely at what it is given.
//!
//! It refuses what hardware refuses, executes when it is told to, and writes down what must never reach it. It touches no memory
//! of a request but inline bytes.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rdma_core_sys::{
    IBV_QPS_ERR, IBV_QPS_RESET, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPT_RC, IBV_QPT_UD, IBV_SEND_INLINE,
    IBV_SEND_SIGNALED, IBV_WC_LOC_PROT_ERR, IBV_WC_RECV, IBV_WC_RETRY_EXC_ERR, IBV_WC_SEND,
    IBV_WC_SUCCESS, IBV_WC_WR_FLUSH_ERR, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD,
    IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, ibv_qp_cap, ibv_qp_type,
    ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wc,
};

use crate::requests::{brings_back, completion, elements, gather, is_offered, takes_inline};

/// Numbers of queue pairs and keys are below this, so that old ones come again soon.
const POOL: u32 = 48;
/// PSNs have 24 bits.
const PSNS: u32 = 1 << 24;
/// Bytes that a packet has room for. A device may refuse more at once.
pub(crate) const LONGEST_DATAGRAM: u64 = 1024;
/// No more packets are on the way than this (IBTA 9.7.2).
const WINDOW: u32 = PSNS / 2;

/// A request in a send queue.
#[derive(Clone, Debug)]
struct Request {
    wr_id: u64,
    /// By which the application knows it again: its immediate data.
    token: u32,
    opcode: u32,
    signaled: bool,
    to: u32,
    first_psn: u32,
    packets: u32,
    executed: bool,
    /// Its elements name memory that is not registered.
    forbidden: bool,
}

/// A queue pair.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) kind: ibv_qp_type,
    pub(crate) capacity: ibv_qp_cap,
    pub(crate) signal_all: bool,
    pub(crate) send_completions: usize,
    pub(crate) receive_completions: usize,
    /// Address of a shared receive queue, or 0.
    pub(crate) shared: usize,
    pub(crate) state: u32,
    pub(crate) peer: u32,
    pub(crate) next_psn: u32,
    pub(crate) expected: u32,
    pub(crate) mtu: u32,
    sends: VecDeque<Request>,
    receives: VecDeque<u64>,
}

impl Pair {
    /// One in RESET.
    pub(crate) fn new(
        kind: ibv_qp_type,
        capacity: ibv_qp_cap,
        signal_all: bool,
        completions: (usize, usize),
        shared: usize,
    ) -> Self {
        Self {
            kind,
            capacity,
            signal_all,
            send_completions: completions.0,
            receive_completions: completions.1,
            shared,
            state: IBV_QPS_RESET,
            peer: 0,
            next_psn: 0,
            expected: 0,
            mtu: 1024,
            sends: VecDeque::new(),
            receives: VecDeque::new(),
        }
    }
}

/// A shared receive queue.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) max_wr: u32,
    pub(crate) max_sge: u32,
    pub(crate) receives: VecDeque<u64>,
}

/// All there is.
#[derive(Debug, Default)]
pub struct Device {
    pub(crate) pairs: BTreeMap<u32, Pair>,
    pub(crate) shared: BTreeMap<usize, Shared>,
    pub(crate) keys: BTreeSet<u32>,
    pub(crate) handles: BTreeSet<usize>,
    pub(crate) completions: BTreeMap<usize, VecDeque<ibv_wc>>,
    random: u32,
    /// How often each request was executed, by its token.
    pub executed: HashMap<u32, u32>,
    /// The inline bytes that each request was posted with.
    pub inline: HashMap<u32, Vec<u8>>,
    /// What must never reach a device.
    pub violations: Vec<String>,
    /// Requests that are still taken before one is refused for want of room.
    pub refuse_after: Option<u32>,
    /// Keys that are not registered may come: the application's own mistakes are passed on before the first restart.
    pub tolerates_keys: bool,
    /// Everything is executed and acknowledged as soon as somebody polls.
    pub eager: bool,
}

static DEVICE: Mutex<Option<Device>> = Mutex::new(None);

/// The device, for as long as it is held.
#[derive(Debug)]
pub struct Held(MutexGuard<'static, Option<Device>>);

impl std::ops::Deref for Held {
    type Target = Device;
    fn deref(&self) -> &Device {
        self.0.as_ref().expect("made when it is taken")
    }
}

impl std::ops::DerefMut for Held {
    fn deref_mut(&mut self) -> &mut Device {
        self.0.as_mut().expect("made when it is taken")
    }
}

/// Takes the device.
#[must_use]
pub fn device() -> Held {
    let mut guard = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    guard.get_or_insert_default();
    Held(guard)
}

impl Device {
    /// A number that is not taken.
    pub(crate) fn number(&mut self, taken: impl Fn(&Self, u32) -> bool) -> u32 {
        loop {
            // Numerical Recipes' generator; its high bits are good enough.
            self.random = self
                .random
                .wrapping_mul(1_664_525)
                .wrapping_add(1_013_904_223);
            let number = 1 + (self.random >> 16) % POOL;
            if !taken(self, number) {
                return number;
            }
        }
    }

    /// The hardware's numbers of the queue pairs there are.
    #[must_use]
    pub fn numbers(&self) -> Vec<u32> {
        self.pairs.keys().copied().collect()
    }

    fn complete(&mut self, queue: usize, completion: ibv_wc) {
        if let Some(queue) = self.completions.get_mut(&queue) {
            queue.push_back(completion);
        }
    }

    /// # Safety
    /// `wr` must be a request as `ibv_post_send` demands.
    pub(crate) unsafe fn post_send(&mut self, number: u32, wr: &ibv_send_wr) -> Result<(), i32> {
        // SAFETY: as the caller vouches.
        let request = unsafe { self.check_send(number, wr)? };
        let pair = self.pairs.get_mut(&number).ok_or(libc::EINVAL)?;
        if pair.kind == IBV_QPT_RC && pair.peer == number {
            // Not the application's: it is being found out what the device tells. The message is there at once.
            pair.sends.push_back(request);
            self.execute(number);
            self.acknowledge(number);
            return Ok(());
        }
        match &mut self.refuse_after {
            Some(0) => {
                self.refuse_after = None;
                return Err(libc::ENOMEM);
            }
            Some(left) => *left -= 1,
            None => {}
        }
        if wr.send_flags & IBV_SEND_INLINE != 0 {
            // SAFETY: as the caller vouches: inline bytes can be read.
            let bytes = unsafe { gather(elements(wr.sg_list, wr.num_sge)) };
            self.inline.insert(request.token, bytes);
        }
        let pair = self.pairs.get_mut(&number).ok_or(libc::EINVAL)?;
        pair.next_psn = (pair.next_psn + request.packets) % PSNS;
        pair.sends.push_back(request);
        if pair.state == IBV_QPS_ERR {
            self.flush(number);
        }
        Ok(())
    }

    /// # Safety
    /// As [`Self::post_send`].
    unsafe fn check_send(&mut self, number: u32, wr: &ibv_send_wr) -> Result<Request, i32> {
        let pair = self.pairs.get(&number).ok_or(libc::EINVAL)?;
        if wr.opcode > IBV_WR_ATOMIC_FETCH_AND_ADD {
            let what = format!("an opcode that is not offered: {}", wr.opcode);
            self.violations.push(what);
            return Err(libc::EINVAL);
        }
        if ![IBV_QPS_RTS, IBV_QPS_ERR].contains(&pair.state)
            || !is_offered(pair.kind, wr.opcode)
            || !(0..=pair.capacity.max_send_sge as i32).contains(&wr.num_sge)
        {
            return Err(libc::EINVAL);
        }
        // SAFETY: as the caller vouches; the number was looked at.
        let list = unsafe { elements(wr.sg_list, wr.num_sge) };
        let length: u64 = list.iter().map(|element| u64::from(element.length)).sum();
        let inline = wr.send_flags & IBV_SEND_INLINE != 0;
        let most = u64::from(pair.capacity.max_inline_data);
        if inline && (!takes_inline(wr.opcode) || length > most)
            || wr.opcode >= IBV_WR_ATOMIC_CMP_AND_SWP && length < 8
            || length > 1 << 31
            || pair.kind == IBV_QPT_UD && length > LONGEST_DATAGRAM
        {
            return Err(libc::EINVAL);
        }
        if pair.sends.len() >= pair.capacity.max_send_wr as usize {
            return Err(libc::ENOMEM);
        }
        let to = match pair.kind {
            IBV_QPT_UD => {
                // SAFETY: a SEND on a datagram queue pair names where it goes.
                let (handle, number) = unsafe { (wr.wr.ud.ah, wr.wr.ud.remote_qpn) };
                if !self.handles.contains(&handle.addr()) {
                    let what = "an address handle that is not the device's";
                    self.violations.push(what.into());
                    return Err(libc::EINVAL);
                }
                number
            }
            _ => pair.peer,
        };
        let mut forbidden = false;
        for element in list {
            if !inline && element.length > 0 && !self.keys.contains(&element.lkey) {
                forbidden = true;
                if !self.tolerates_keys {
                    let what = format!("key {:#x} is not registered", element.lkey);
                    self.violations.push(what);
                }
            }
        }
        let packets = match wr.opcode {
            IBV_WR_ATOMIC_CMP_AND_SWP | IBV_WR_ATOMIC_FETCH_AND_ADD => 1,
            _ => (length.div_ceil(u64::from(pair.mtu)) as u32).max(1),
        };
        Ok(Request {
            wr_id: wr.wr_id,
            // SAFETY: both of the union's fields are numbers.
            token: unsafe { wr.__bindgen_anon_1.imm_data },
            opcode: wr.opcode,
            signaled: pair.signal_all || wr.send_flags & IBV_SEND_SIGNALED != 0,
            to,
            first_psn: pair.next_psn,
            packets,
            executed: false,
            forbidden,
        })
    }

    /// # Safety
    /// `wr` must be a request as `ibv_post_recv` demands.
    pub(crate) unsafe fn post_receive(&mut self, number: u32, wr: &ibv_recv_wr) -> Result<(), i32> {
        let pair = self.pairs.get(&number).ok_or(libc::EINVAL)?;
        let capacity = (pair.capacity.max_recv_wr, pair.capacity.max_recv_sge);
        if pair.state == IBV_QPS_RESET || pair.shared != 0 {
            return Err(libc::EINVAL);
        }
        // SAFETY: as the caller vouches.
        unsafe { self.check_receive(wr, pair.receives.len(), capacity)? };
        let pair = self.pairs.get_mut(&number).ok_or(libc::EINVAL)?;
        pair.receives.push_back(wr.wr_id);
        if pair.state == IBV_QPS_ERR {
            self.flush(number);
        }
        Ok(())
    }

    /// # Safety
    /// As [`Self::post_receive`].
    pub(crate) unsafe fn post_shared(&mut self, queue: usize, wr: &ibv_recv_wr) -> Result<(), i32> {
        let shared = self.shared.get(&queue).ok_or(libc::EINVAL)?;
        let capacity = (shared.max_wr, shared.max_sge);
        // SAFETY: as the caller vouches.
        unsafe { self.check_receive(wr, shared.receives.len(), capacity)? };
        if let Some(shared) = self.shared.get_mut(&queue) {
            shared.receives.push_back(wr.wr_id);
        }
        Ok(())
    }

    /// # Safety
    /// As [`Self::post_receive`].
    unsafe fn check_receive(
        &self,
        wr: &ibv_recv_wr,
        posted: usize,
        (max_wr, max_sge): (u32, u32),
    ) -> Result<(), i32> {
        if !(0..=max_sge as i32).contains(&wr.num_sge) {
            return Err(libc::EINVAL);
        }
        if posted >= max_wr as usize {
            return Err(libc::ENOMEM);
        }
        // SAFETY: as the caller vouches; the number was looked at.
        let list = unsafe { elements(wr.sg_list, wr.num_sge) };
        let unknown = |element: &&ibv_sge| element.length > 0 && !self.keys.contains(&element.lkey);
        match list.iter().find(unknown) {
            Some(element) if !self.tolerates_keys => {
                // Not by way of `violations`: nothing here may be changed.
                panic!("key {:#x} of a receive is not registered", element.lkey)
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn set_state(&mut self, number: u32, state: u32) {
        let Some(pair) = self.pairs.get_mut(&number) else {
            return;
        };
        pair.state = state;
        match state {
            IBV_QPS_ERR => self.flush(number),
            // Completions stay where they are, as on Soft-RoCE.
            IBV_QPS_RESET => {
                pair.sends.clear();
                pair.receives.clear();
            }
            _ => {}
        }
    }

    fn flush(&mut self, number: u32) {
        let Some(pair) = self.pairs.get_mut(&number) else {
            return;
        };
        let (send_to, receive_to) = (pair.send_completions, pair.receive_completions);
        let sends: Vec<_> = pair.sends.drain(..).map(|request| request.wr_id).collect();
        let receives: Vec<_> = pair.receives.drain(..).collect();
        let sends = sends.into_iter().map(|wr_id| (send_to, wr_id));
        let receives = receives.into_iter().map(|wr_id| (receive_to, wr_id));
        for (queue, wr_id) in sends.chain(receives) {
            // The opcode of a failed completion means nothing.
            let flushed = completion(wr_id, IBV_WC_WR_FLUSH_ERR, u32::MAX, number);
            self.complete(queue, flushed);
        }
    }

    /// The next request of `number` arrives at its peer and is executed. `false` if there is none, or it has to wait.
    pub fn execute(&mut self, number: u32) -> bool {
        let Some(pair) = self.pairs.get(&number) else {
            return false;
        };
        if pair.state != IBV_QPS_RTS {
            return false;
        }
        let next = pair.sends.iter().position(|request| !request.executed);
        let Some((index, request)) = next.map(|index| (index, pair.sends[index].clone())) else {
            return false;
        };
        let on_the_way: u32 = pair.sends.iter().take(index).map(|sent| sent.packets).sum();
        let kind = pair.kind;
        if kind == IBV_QPT_RC && on_the_way + request.packets > WINDOW {
            return false;
        }
        if request.forbidden {
            // After those before it: they have been executed, and are acknowledged.
            while self.acknowledge(number) {}
            self.fail(number, IBV_WC_LOC_PROT_ERR);
            return true;
        }
        if kind == IBV_QPT_RC {
            match self.arrive(number, &request) {
                Arrival::Executed => {}
                Arrival::Waits => return false,
                Arrival::NobodyThere => {
                    while self.acknowledge(number) {}
                    self.fail(number, IBV_WC_RETRY_EXC_ERR);
                    return true;
                }
            }
        }
        // A datagram has left, and nobody is there to take it.
        *self.executed.entry(request.token).or_default() += 1;
        if let Some(pair) = self.pairs.get_mut(&number) {
            pair.sends[index].executed = true;
        }
        true
    }

    fn arrive(&mut self, number: u32, request: &Request) -> Arrival {
        let Some(peer) = self.pairs.get_mut(&request.to) else {
            return Arrival::NobodyThere;
        };
        if peer.state == IBV_QPS_RESET {
            return Arrival::NobodyThere;
        }
        if ![IBV_QPS_RTR, IBV_QPS_RTS].contains(&peer.state) || peer.peer != number {
            return Arrival::Waits;
        }
        if request.first_psn != peer.expected {
            let what = format!(
                "{:#x} expects PSN {:#x}, and {:#x} comes",
                request.to, peer.expected, request.first_psn
            );
            self.violations.push(what);
            return Arrival::Waits;
        }
        let takes = [
            IBV_WR_SEND,
            IBV_WR_SEND_WITH_IMM,
            IBV_WR_RDMA_WRITE_WITH_IMM,
        ];
        if takes.contains(&request.opcode) {
            let receives = match self.shared.get_mut(&peer.shared) {
                Some(shared) => &mut shared.receives,
                None => &mut peer.receives,
            };
            let Some(wr_id) = receives.pop_front() else {
                return Arrival::Waits;
            };
            let queue = peer.receive_completions;
            peer.expected = (peer.expected + request.packets) % PSNS;
            let received = completion(wr_id, IBV_WC_SUCCESS, IBV_WC_RECV, request.to);
            self.complete(queue, received);
        } else {
            peer.expected = (peer.expected + request.packets) % PSNS;
        }
        Arrival::Executed
    }

    /// The oldest request fails, and with it the queue pair.
    fn fail(&mut self, number: u32, status: u32) {
        let Some(pair) = self.pairs.get_mut(&number) else {
            return;
        };
        let queue = pair.send_completions;
        if let Some(request) = pair.sends.pop_front() {
            self.complete(queue, completion(request.wr_id, status, u32::MAX, number));
        }
        self.set_state(number, IBV_QPS_ERR);
    }

    /// The oldest request of `number` is acknowledged, if it was executed.
    pub fn acknowledge(&mut self, number: u32) -> bool {
        let Some(pair) = self.pairs.get_mut(&number) else {
            return false;
        };
        let queue = pair.send_completions;
        let Some(done) = pair.sends.pop_front_if(|request| request.executed) else {
            return false;
        };
        if done.signaled {
            let completion = completion(done.wr_id, IBV_WC_SUCCESS, IBV_WC_SEND, number);
            self.complete(queue, completion);
        }
        true
    }

    /// Requests whose answer carries data that the requester does not have yet, by their tokens.
    #[must_use]
    pub fn unanswered(&self) -> BTreeSet<u32> {
        self.pairs
            .values()
            .flat_map(|pair| &pair.sends)
            .filter(|request| request.executed && brings_back(request.opcode))
            .map(|request| request.token)
            .collect()
    }

    /// Requests of unreliable queue pairs that have not completed, by their tokens.
    #[must_use]
    pub fn unreliable(&self) -> BTreeSet<u32> {
        self.pairs
            .values()
            .filter(|pair| pair.kind != IBV_QPT_RC)
            .flat_map(|pair| &pair.sends)
            .map(|request| request.token)
            .collect()
    }

    /// Everything that can happen happens.
    pub fn settle(&mut self) {
        let numbers = self.numbers();
        while numbers
            .iter()
            .any(|number| self.execute(*number) || self.acknowledge(*number))
        {}
    }
}

enum Arrival {
    Executed,
    Waits,
    NobodyThere,
}
