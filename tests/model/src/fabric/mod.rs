//! What the fabric knows, and what happens on it.

mod memory;
mod transfer;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rdma_core_sys::{
    IBV_QPS_ERR, IBV_QPS_RESET, IBV_QPT_RC, IBV_QPT_UD, IBV_SEND_INLINE, IBV_SEND_SIGNALED,
    IBV_WC_RECV, IBV_WC_SEND, IBV_WC_SUCCESS, IBV_WC_WR_FLUSH_ERR, IBV_WR_ATOMIC_CMP_AND_SWP,
    IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND,
    IBV_WR_SEND_WITH_IMM, ibv_qp_init_attr, ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wc,
};

pub(crate) use self::memory::Region;
use self::memory::{check, gather, length, list};
pub(crate) use self::transfer::GRH_BYTES;

/// Numbers of queue pairs, and keys, are below these, so that they come again soon.
pub(crate) const NUMBERS: u32 = 24;
pub(crate) const KEYS: u32 = 48;

/// PSNs have 24 bits.
const PSNS: u32 = 1 << 24;

/// A receive that is posted: its `wr_id`, and where the message goes.
type Receive = (u64, Vec<ibv_sge>);

/// A request in a send queue.
#[derive(Debug)]
struct Request {
    wr_id: u64,
    opcode: u32,
    signaled: bool,
    elements: Vec<ibv_sge>,
    /// Inline bytes, which are taken when the request is posted.
    inline: Option<Vec<u8>>,
    immediate: u32,
    target: Target,
    first_psn: u32,
    packets: u32,
    /// Packets that have been executed by the peer, or, where nothing is acknowledged, have left.
    done: u32,
    /// Of an unreliable message: a packet was lost.
    damaged: bool,
    response: Vec<u8>,
}

/// Where a request goes, besides to the peer.
#[derive(Clone, Copy, Debug)]
struct Target {
    remote: u64,
    rkey: u32,
    compare_add: u64,
    swap: u64,
    /// Of a datagram.
    number: u32,
    key: u32,
}

impl Request {
    fn is_executed(&self) -> bool {
        self.done == self.packets
    }

    fn has_response(&self) -> bool {
        self.is_atomic() || self.opcode == IBV_WR_RDMA_READ
    }

    fn is_atomic(&self) -> bool {
        [IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_ATOMIC_CMP_AND_SWP].contains(&self.opcode)
    }

    fn is_send(&self) -> bool {
        [IBV_WR_SEND, IBV_WR_SEND_WITH_IMM].contains(&self.opcode)
    }

    fn has_immediate(&self) -> bool {
        [IBV_WR_SEND_WITH_IMM, IBV_WR_RDMA_WRITE_WITH_IMM].contains(&self.opcode)
    }

    fn bytes(&self) -> Vec<u8> {
        self.inline
            .clone()
            .unwrap_or_else(|| gather(&self.elements))
    }
}

/// A queue pair.
#[derive(Debug, Default)]
pub(crate) struct Pair {
    pub(crate) state: u32,
    pub(crate) transport: u32,
    pub(crate) peer: u32,
    pub(crate) next_psn: u32,
    /// The PSN that the responder expects.
    pub(crate) expected: u32,
    /// The one it was told to expect first; `None` if it has never been ready.
    pub(crate) first_expected: Option<u32>,
    pub(crate) mtu: u32,
    /// What datagrams must name.
    pub(crate) key: u32,
    capacity: u32,
    signal_all: bool,
    pub(crate) send_completions: usize,
    pub(crate) receive_completions: usize,
    /// Address of the shared receive queue; 0 for none.
    pub(crate) shared: usize,
    sends: VecDeque<Request>,
    /// What was in the send queue when the pair was moved to the error state: packets of it may still be on the way.
    strays: VecDeque<Request>,
    receives: VecDeque<Receive>,
    /// The receive that is being filled.
    filling: Option<Receive>,
}

impl Pair {
    /// One in RESET.
    pub(crate) fn new(init: &ibv_qp_init_attr) -> Self {
        Self {
            transport: init.qp_type,
            capacity: init.cap.max_send_wr,
            signal_all: init.sq_sig_all != 0,
            send_completions: init.send_cq.addr(),
            receive_completions: init.recv_cq.addr(),
            shared: init.srq.addr(),
            ..Self::default()
        }
    }

    fn is_reliable(&self) -> bool {
        self.transport == IBV_QPT_RC
    }

    fn is_datagram(&self) -> bool {
        self.transport == IBV_QPT_UD
    }
}

/// A completion queue.
#[derive(Debug, Default)]
pub(crate) struct Completions {
    pub(crate) entries: VecDeque<ibv_wc>,
    pub(crate) armed: bool,
    /// Where an event goes; none where the queue has no channel.
    pub(crate) events: Option<std::os::fd::RawFd>,
}

/// All there is.
#[derive(Debug, Default)]
pub struct Fabric {
    pub(crate) pairs: BTreeMap<u32, Pair>,
    pub(crate) regions: BTreeMap<u32, Region>,
    pub(crate) completions: BTreeMap<usize, Completions>,
    pub(crate) shared: BTreeMap<usize, VecDeque<Receive>>,
    pub(crate) handles: BTreeSet<usize>,
    random: u64,
    /// Queries show the PSN that a responder was once told to expect, not the one it expects now.
    pub(crate) stale: bool,
    /// A queue pair that is connected to itself was asked how far it came, and has told; since the device was opened.
    pub(crate) has_told: bool,
    /// How often each payload (by its first eight bytes) was executed from its first packet to its last.
    pub executions: BTreeMap<u64, u32>,
    /// The same of unreliable messages that were lost on the way, or found nobody who takes them, or were flushed before they had left.
    pub losses: BTreeMap<u64, u32>,
    /// What must never happen on a healthy connection.
    pub violations: Vec<String>,
}

// SAFETY: addresses are those of the program's memory, used by the thread that has the fabric.
unsafe impl Send for Fabric {}

static FABRIC: Mutex<Option<Fabric>> = Mutex::new(None);

/// The fabric, for as long as it is held.
#[derive(Debug)]
pub struct Held(MutexGuard<'static, Option<Fabric>>);

impl std::ops::Deref for Held {
    type Target = Fabric;
    fn deref(&self) -> &Fabric {
        self.0.as_ref().expect("made when it is taken")
    }
}

impl std::ops::DerefMut for Held {
    fn deref_mut(&mut self) -> &mut Fabric {
        self.0.as_mut().expect("made when it is taken")
    }
}

/// Takes the fabric.
#[must_use]
pub fn fabric() -> Held {
    let mut guard = FABRIC.lock().unwrap_or_else(PoisonError::into_inner);
    guard.get_or_insert_default();
    Held(guard)
}

/// What would become of a queue pair that is stopped now, by one who knows everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// Every request can be told to be executed or not, and none needs data that was lost.
    Known,
    /// The answer to an executed request was lost and cannot be asked for again.
    Lost,
}

impl Fabric {
    /// Numbers are handed out in another order from here on, and nothing is known of earlier payloads.
    ///
    /// `stale`: the device cannot tell how far a responder came.
    pub fn begin(&mut self, seed: u64, stale: bool) {
        (self.random, self.stale) = (seed, stale);
        self.executions.clear();
        self.losses.clear();
        self.violations.clear();
    }

    /// Nothing of the hardware is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
            && self.regions.is_empty()
            && self.completions.is_empty()
            && self.shared.is_empty()
            && self.handles.is_empty()
    }

    /// Numbers of the queue pairs there are.
    pub fn pairs(&self) -> impl Iterator<Item = u32> + use<> {
        self.pairs.keys().copied().collect::<Vec<_>>().into_iter()
    }

    fn next_random(&mut self) -> u64 {
        // splitmix64
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.random;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// One of so many numbers that is not taken.
    pub(crate) fn number(&mut self, many: u32, taken: impl Fn(&Self, u32) -> bool) -> u32 {
        loop {
            let number = 1 + (self.next_random() % u64::from(many)) as u32;
            if !taken(self, number) {
                return number;
            }
        }
    }

    fn pair(&mut self, number: u32) -> &mut Pair {
        self.pairs
            .get_mut(&number)
            .expect("a queue pair of the fabric")
    }

    fn complete(&mut self, queue: usize, completion: ibv_wc) {
        let Some(queue) = self.completions.get_mut(&queue) else {
            return;
        };
        queue.entries.push_back(completion);
        if let Some(events) = queue.events.filter(|_| std::mem::take(&mut queue.armed)) {
            // SAFETY: the channel's pipe, which outlives its queues. What is written means nothing to it.
            unsafe { libc::write(events, [0_u8].as_ptr().cast(), 1) };
        }
    }

    /// Local memory must be registered, under the keys that are named.
    fn check_local(&mut self, elements: &[ibv_sge]) {
        for element in elements {
            let length = u64::from(element.length);
            if let Err(what) = check(&self.regions, element.lkey, element.addr, length) {
                self.violations.push(what);
            }
        }
    }

    /// Gives what the device answers.
    ///
    /// # Safety
    /// The request's memory must be valid until it completes.
    pub(crate) unsafe fn post_send(&mut self, number: u32, wr: &ibv_send_wr) -> i32 {
        let pair = self.pair(number);
        if pair.sends.len() >= pair.capacity as usize {
            return libc::ENOMEM;
        }
        let datagram = pair.is_datagram();
        // SAFETY: the caller vouches for the elements; transport and opcode say which of the union's fields is meant.
        let (elements, target) = unsafe {
            let target = Target::of(wr, datagram);
            if datagram && !self.handles.contains(&wr.wr.ud.ah.addr()) {
                self.violations.push("no such address handle".to_owned());
            }
            (list(wr.sg_list, wr.num_sge), target)
        };
        let inline = (wr.send_flags & IBV_SEND_INLINE != 0).then(|| gather(&elements));
        if inline.is_none() {
            self.check_local(&elements);
        }
        let pair = self.pair(number);
        let atomic = [IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_ATOMIC_CMP_AND_SWP].contains(&wr.opcode);
        let packets = match atomic || datagram {
            true => 1,
            false => length(&elements).div_ceil(pair.mtu.max(256)).max(1),
        };
        let request = Request {
            wr_id: wr.wr_id,
            opcode: wr.opcode,
            signaled: pair.signal_all || wr.send_flags & IBV_SEND_SIGNALED != 0,
            elements,
            inline,
            // SAFETY: plain bytes; they mean something if the opcode says so.
            immediate: unsafe { wr.__bindgen_anon_1.imm_data },
            target,
            first_psn: pair.next_psn,
            packets,
            done: 0,
            damaged: false,
            response: Vec::new(),
        };
        pair.next_psn = (pair.next_psn + packets) % PSNS;
        if pair.peer == number {
            self.turn_around(number, &request);
            return 0;
        }
        pair.sends.push_back(request);
        if pair.state == IBV_QPS_ERR {
            self.flush(number);
        }
        0
    }

    /// A SEND to the queue pair itself is there at once.
    fn turn_around(&mut self, number: u32, request: &Request) {
        let pair = self.pair(number);
        let (send_to, receive_to) = (pair.send_completions, pair.receive_completions);
        pair.expected = (pair.expected + request.packets) % PSNS;
        let (receive, _) = pair.receives.pop_front().expect("a receive is posted");
        let done = |wr_id, opcode| completion(wr_id, IBV_WC_SUCCESS, opcode, number);
        self.complete(send_to, done(request.wr_id, IBV_WC_SEND));
        self.complete(receive_to, done(receive, IBV_WC_RECV));
    }

    /// # Safety
    /// As [`Self::post_send`].
    pub(crate) unsafe fn post_receive(&mut self, number: u32, wr: &ibv_recv_wr) {
        // SAFETY: as the caller vouches.
        let elements = unsafe { list(wr.sg_list, wr.num_sge) };
        self.check_local(&elements);
        let pair = self.pair(number);
        pair.receives.push_back((wr.wr_id, elements));
        if pair.state == IBV_QPS_ERR {
            self.flush(number);
        }
    }

    /// # Safety
    /// As [`Self::post_send`].
    pub(crate) unsafe fn post_shared_receive(&mut self, queue: usize, wr: &ibv_recv_wr) {
        // SAFETY: as the caller vouches.
        let elements = unsafe { list(wr.sg_list, wr.num_sge) };
        self.check_local(&elements);
        let queue = self.shared.get_mut(&queue).expect("a queue of the fabric");
        queue.push_back((wr.wr_id, elements));
    }

    pub(crate) fn set_state(&mut self, number: u32, state: u32) {
        self.pair(number).state = state;
        match state {
            IBV_QPS_ERR => self.flush(number),
            IBV_QPS_RESET => {
                self.pair(number).sends.clear();
                self.pair(number).receives.clear();
            }
            _ => {}
        }
    }

    fn flush(&mut self, number: u32) {
        let pair = self.pair(number);
        let (send_to, receive_to) = (pair.send_completions, pair.receive_completions);
        let sends: Vec<_> = pair.sends.iter().map(|request| request.wr_id).collect();
        let mut left_behind = Vec::new();
        match pair.is_reliable() {
            true => pair.strays.extend(pair.sends.drain(..)),
            false => left_behind.extend(pair.sends.drain(..)),
        }
        let receives = pair.filling.take().into_iter();
        let receives: Vec<_> = receives.chain(pair.receives.drain(..)).collect();
        for (queue, wr_id) in sends
            .into_iter()
            .map(|wr_id| (send_to, wr_id))
            .chain(receives.into_iter().map(|(wr_id, _)| (receive_to, wr_id)))
        {
            // The opcode of a failed completion means nothing.
            self.complete(
                queue,
                completion(wr_id, IBV_WC_WR_FLUSH_ERR, u32::MAX, number),
            );
        }
        for request in left_behind.iter().filter(|request| !request.is_executed()) {
            self.lose(request);
        }
    }

    /// What has become of `number`, if nothing more of it is executed. `peer_failed`: the application has moved its peer to the
    /// error state.
    #[must_use]
    pub fn truth(&self, number: u32, peer_failed: bool) -> Truth {
        let Some(pair) = self.pairs.get(&number).filter(|pair| pair.is_reliable()) else {
            return Truth::Known;
        };
        let requests: Vec<_> = pair.strays.iter().chain(&pair.sends).collect();
        let mut executed = requests
            .iter()
            .take_while(|request| request.is_executed())
            .count();
        if !self.has_told {
            match self.known_by_count(pair, peer_failed, &requests[..], executed) {
                Some(known) => executed = known,
                None => return Truth::Lost,
            }
        }
        let lost = requests[..executed]
            .iter()
            .skip_while(|request| !request.has_response())
            .any(|request| request.opcode != IBV_WR_RDMA_READ);
        if lost { Truth::Lost } else { Truth::Known }
    }

    /// How many of the `executed` can be told to be so by a peer that counts receives; `None` if there are others of which it
    /// cannot be told.
    fn known_by_count(
        &self,
        pair: &Pair,
        peer_failed: bool,
        requests: &[&Request],
        executed: usize,
    ) -> Option<usize> {
        let takes_receive = |request: &&Request| request.is_send() || request.has_immediate();
        let peer = self.pairs.get(&pair.peer);
        if requests.is_empty() || peer.is_some_and(|peer| peer.first_expected.is_none()) {
            return Some(0);
        }
        if peer_failed || peer.is_some_and(|peer| peer.shared != 0) {
            return None;
        }
        let known = requests[..executed]
            .iter()
            .rposition(takes_receive)
            .map_or(0, |last| last + 1);
        let mut between = requests[known..]
            .iter()
            .take_while(|request| !takes_receive(request));
        between
            .all(|request| request.opcode == IBV_WR_RDMA_READ)
            .then_some(known)
    }
}

impl Target {
    /// # Safety
    /// The request must be one for the transport.
    unsafe fn of(wr: &ibv_send_wr, datagram: bool) -> Self {
        let none = Self {
            remote: 0,
            rkey: 0,
            compare_add: 0,
            swap: 0,
            number: 0,
            key: 0,
        };
        // SAFETY: transport and opcode say which field of the union is meant.
        unsafe {
            match wr.opcode {
                _ if datagram => Self {
                    number: wr.wr.ud.remote_qpn,
                    key: wr.wr.ud.remote_qkey,
                    ..none
                },
                IBV_WR_ATOMIC_FETCH_AND_ADD | IBV_WR_ATOMIC_CMP_AND_SWP => Self {
                    remote: wr.wr.atomic.remote_addr,
                    rkey: wr.wr.atomic.rkey,
                    compare_add: wr.wr.atomic.compare_add,
                    swap: wr.wr.atomic.swap,
                    ..none
                },
                _ => Self {
                    remote: wr.wr.rdma.remote_addr,
                    rkey: wr.wr.rdma.rkey,
                    ..none
                },
            }
        }
    }
}

fn completion(wr_id: u64, status: u32, opcode: u32, qp_num: u32) -> ibv_wc {
    // SAFETY: zero is a valid completion.
    let mut completion: ibv_wc = unsafe { std::mem::zeroed() };
    (completion.wr_id, completion.status) = (wr_id, status);
    (completion.opcode, completion.qp_num) = (opcode, qp_num);
    completion
}
