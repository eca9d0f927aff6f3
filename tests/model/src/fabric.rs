//! What the fabric knows, and what happens on it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rdma_core_sys::{
    IBV_QPS_ERR, IBV_QPS_RESET, IBV_QPS_RTR, IBV_QPS_RTS, IBV_SEND_INLINE, IBV_SEND_SIGNALED,
    IBV_WC_FETCH_ADD, IBV_WC_RDMA_READ, IBV_WC_RDMA_WRITE, IBV_WC_RECV, IBV_WC_RECV_RDMA_WITH_IMM,
    IBV_WC_SEND, IBV_WC_SUCCESS, IBV_WC_WR_FLUSH_ERR, IBV_WR_ATOMIC_FETCH_AND_ADD,
    IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, ibv_recv_wr,
    ibv_send_wr, ibv_sge, ibv_wc,
};

/// Numbers of queue pairs and keys are below this, so that they come again soon.
const POOL: u32 = 24;

/// PSNs have 24 bits.
const PSNS: u32 = 1 << 24;

/// A request in a send queue.
#[derive(Debug)]
struct Request {
    wr_id: u64,
    opcode: u32,
    signaled: bool,
    elements: Vec<ibv_sge>,
    /// Inline bytes, which are taken when the request is posted.
    inline: Option<Vec<u8>>,
    remote: u64,
    rkey: u32,
    add: u64,
    first_psn: u32,
    packets: u32,
    /// Packets that the peer has executed.
    done: u32,
    response: Vec<u8>,
}

impl Request {
    fn is_executed(&self) -> bool {
        self.done == self.packets
    }

    fn has_response(&self) -> bool {
        [IBV_WR_RDMA_READ, IBV_WR_ATOMIC_FETCH_AND_ADD].contains(&self.opcode)
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
    pub(crate) peer: u32,
    pub(crate) next_psn: u32,
    /// The PSN that the responder expects.
    pub(crate) expected: u32,
    /// The one it was told to expect first.
    pub(crate) first_expected: u32,
    pub(crate) mtu: u32,
    send_completions: usize,
    receive_completions: usize,
    signal_all: bool,
    sends: VecDeque<Request>,
    /// What was in the send queue when the pair was moved to the error state: packets of it may still be on the way.
    strays: VecDeque<Request>,
    receives: VecDeque<(u64, Vec<ibv_sge>)>,
}

impl Pair {
    /// One in RESET, whose completions go to the queues at these addresses.
    pub(crate) fn new(
        send_completions: usize,
        receive_completions: usize,
        signal_all: bool,
    ) -> Self {
        Self {
            send_completions,
            receive_completions,
            signal_all,
            ..Self::default()
        }
    }
}

/// A memory region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) address: u64,
    pub(crate) length: u64,
}

/// All there is.
#[derive(Debug, Default)]
pub struct Fabric {
    pub(crate) pairs: BTreeMap<u32, Pair>,
    pub(crate) regions: BTreeMap<u32, Region>,
    pub(crate) completions: BTreeMap<usize, VecDeque<ibv_wc>>,
    random: u64,
    /// Queries show the PSN that a responder was once told to expect, not the one it expects now.
    pub(crate) stale: bool,
    /// How often each payload (by its first eight bytes) was executed from its first packet to its last.
    pub executions: BTreeMap<u64, u32>,
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
        self.violations.clear();
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

    /// A number that is not taken.
    pub(crate) fn number(&mut self, taken: impl Fn(&Self, u32) -> bool) -> u32 {
        loop {
            let number = 1 + (self.next_random() % u64::from(POOL)) as u32;
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
        if let Some(queue) = self.completions.get_mut(&queue) {
            queue.push_back(completion);
        }
    }

    /// # Safety
    /// The request's memory must be valid until it completes.
    pub(crate) unsafe fn post_send(&mut self, number: u32, wr: &ibv_send_wr) {
        // SAFETY: the caller vouches for the elements; the opcode says which of the union's fields is meant.
        let (elements, remote, rkey, add) = unsafe {
            let atomic = wr.opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
            let (remote, rkey) = match atomic {
                true => (wr.wr.atomic.remote_addr, wr.wr.atomic.rkey),
                false => (wr.wr.rdma.remote_addr, wr.wr.rdma.rkey),
            };
            let add = if atomic { wr.wr.atomic.compare_add } else { 0 };
            (list(wr.sg_list, wr.num_sge), remote, rkey, add)
        };
        let inline = (wr.send_flags & IBV_SEND_INLINE != 0).then(|| gather(&elements));
        let length: u32 = elements.iter().map(|element| element.length).sum();
        let pair = self.pair(number);
        let packets = match wr.opcode {
            IBV_WR_ATOMIC_FETCH_AND_ADD => 1,
            _ => length.div_ceil(pair.mtu.max(256)).max(1),
        };
        let request = Request {
            wr_id: wr.wr_id,
            opcode: wr.opcode,
            signaled: pair.signal_all || wr.send_flags & IBV_SEND_SIGNALED != 0,
            elements,
            inline,
            remote,
            rkey,
            add,
            first_psn: pair.next_psn,
            packets,
            done: 0,
            response: Vec::new(),
        };
        pair.next_psn = (pair.next_psn + packets) % PSNS;
        if pair.peer == number {
            self.turn_around(number, &request);
            return;
        }
        pair.sends.push_back(request);
        if pair.state == IBV_QPS_ERR {
            self.flush(number);
        }
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
        let pair = self.pair(number);
        pair.receives.push_back((wr.wr_id, elements));
        if pair.state == IBV_QPS_ERR {
            self.flush(number);
        }
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
        pair.strays.extend(pair.sends.drain(..));
        let receives: Vec<_> = pair.receives.drain(..).map(|(wr_id, _)| wr_id).collect();
        for (queue, wr_id) in sends
            .into_iter()
            .map(|wr_id| (send_to, wr_id))
            .chain(receives.into_iter().map(|wr_id| (receive_to, wr_id)))
        {
            // The opcode of a failed completion means nothing.
            self.complete(
                queue,
                completion(wr_id, IBV_WC_WR_FLUSH_ERR, u32::MAX, number),
            );
        }
    }

    /// The next packet of `number` arrives at its peer and is executed. `false` if there is none, or the peer cannot take it.
    pub fn deliver(&mut self, number: u32) -> bool {
        let Some(mut pair) = self.pairs.remove(&number) else {
            return false;
        };
        let executed = self.deliver_from(number, &mut pair);
        self.pairs.insert(number, pair);
        executed
    }

    fn deliver_from(&mut self, number: u32, pair: &mut Pair) -> bool {
        let (peer_number, mtu) = (pair.peer, pair.mtu);
        let on_the_way = match pair.state {
            IBV_QPS_RTS => &mut pair.sends,
            IBV_QPS_ERR => &mut pair.strays,
            _ => return false,
        };
        let Some(request) = on_the_way.iter_mut().find(|request| !request.is_executed()) else {
            return false;
        };
        let Some(peer) = self.pairs.get_mut(&peer_number) else {
            return false;
        };
        if ![IBV_QPS_RTR, IBV_QPS_RTS].contains(&peer.state) || peer.peer != number {
            return false;
        }
        if (request.first_psn + request.done) % PSNS != peer.expected {
            let what = format!(
                "queue pair {number} sends PSN {:#x}, its peer {peer_number} expects {:#x}",
                (request.first_psn + request.done) % PSNS,
                peer.expected
            );
            self.violations.push(what);
            return false;
        }
        let last = request.done + 1 == request.packets;
        let is_send = request.opcode == IBV_WR_SEND;
        let takes_receive = is_send || request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM && last;
        // RNR: no receive is posted.
        if takes_receive && peer.receives.is_empty() {
            return false;
        }
        let bytes = request.bytes();
        let from = (request.done * mtu) as usize;
        let part = bytes
            .get(from..bytes.len().min(from + mtu as usize))
            .unwrap_or(&[]);
        let length = bytes.len() as u64;
        match request.opcode {
            IBV_WR_SEND => scatter(&peer.receives[0].1, from, part),
            IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => {
                match check(&self.regions, request.rkey, request.remote, length) {
                    Ok(()) => put(request.remote + from as u64, part),
                    Err(what) => self.violations.push(what),
                }
            }
            IBV_WR_RDMA_READ => match check(&self.regions, request.rkey, request.remote, length) {
                Ok(()) => request.response = get(request.remote, length as usize),
                Err(what) => self.violations.push(what),
            },
            _ => match check(&self.regions, request.rkey, request.remote, 8) {
                Ok(()) => {
                    request.response = get(request.remote, 8);
                    let old =
                        u64::from_ne_bytes(request.response[..].try_into().expect("eight bytes"));
                    put(request.remote, &old.wrapping_add(request.add).to_ne_bytes());
                }
                Err(what) => self.violations.push(what),
            },
        }
        let now = match request.opcode {
            IBV_WR_RDMA_READ => request.packets,
            _ => 1,
        };
        request.done += now;
        peer.expected = (peer.expected + now) % PSNS;
        if last && !request.has_response() {
            let name = u64::from_ne_bytes(bytes[..8].try_into().expect("payloads have a number"));
            *self.executions.entry(name).or_default() += 1;
        }
        if last && takes_receive {
            let (wr_id, _) = peer.receives.pop_front().expect("looked at above");
            let opcode = if is_send {
                IBV_WC_RECV
            } else {
                IBV_WC_RECV_RDMA_WITH_IMM
            };
            let queue = peer.receive_completions;
            self.complete(
                queue,
                completion(wr_id, IBV_WC_SUCCESS, opcode, peer_number),
            );
        }
        true
    }

    /// The oldest request of `number` is acknowledged. `false` if it is not executed.
    pub fn acknowledge(&mut self, number: u32) -> bool {
        let Some(pair) = self.pairs.get_mut(&number) else {
            return false;
        };
        if pair.state != IBV_QPS_RTS || !pair.sends.front().is_some_and(Request::is_executed) {
            return false;
        }
        let queue = pair.send_completions;
        let Some(request) = pair.sends.pop_front() else {
            return false;
        };
        if request.has_response() {
            scatter(&request.elements, 0, &request.response);
        }
        if request.signaled {
            let opcode = match request.opcode {
                IBV_WR_RDMA_READ => IBV_WC_RDMA_READ,
                IBV_WR_ATOMIC_FETCH_AND_ADD => IBV_WC_FETCH_ADD,
                IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => IBV_WC_RDMA_WRITE,
                _ => IBV_WC_SEND,
            };
            self.complete(
                queue,
                completion(request.wr_id, IBV_WC_SUCCESS, opcode, number),
            );
        }
        true
    }

    /// What has become of `number`, if nothing more of it is executed.
    #[must_use]
    pub fn truth(&self, number: u32) -> Truth {
        let Some(pair) = self.pairs.get(&number) else {
            return Truth::Known;
        };
        let requests: Vec<_> = pair.strays.iter().chain(&pair.sends).collect();
        let takes_receive = |request: &&Request| {
            [IBV_WR_SEND, IBV_WR_RDMA_WRITE_WITH_IMM].contains(&request.opcode)
        };
        let mut executed = requests
            .iter()
            .take_while(|request| request.is_executed())
            .count();
        if self.stale {
            // The peer counts receives. What is between the last that it knows of and the next, nobody can tell.
            executed = requests[..executed]
                .iter()
                .rposition(takes_receive)
                .map_or(0, |last| last + 1);
            let mut between = requests[executed..]
                .iter()
                .take_while(|request| !takes_receive(request));
            if between.any(|request| request.opcode != IBV_WR_RDMA_READ) {
                return Truth::Lost;
            }
        }
        let lost = requests[..executed]
            .iter()
            .skip_while(|request| !request.has_response())
            .any(|request| request.opcode != IBV_WR_RDMA_READ);
        if lost { Truth::Lost } else { Truth::Known }
    }
}

fn completion(wr_id: u64, status: u32, opcode: u32, qp_num: u32) -> ibv_wc {
    // SAFETY: zero is a valid completion.
    let mut completion: ibv_wc = unsafe { std::mem::zeroed() };
    (completion.wr_id, completion.status) = (wr_id, status);
    (completion.opcode, completion.qp_num) = (opcode, qp_num);
    completion
}

/// A remote access is within a region of that key.
fn check(
    regions: &BTreeMap<u32, Region>,
    key: u32,
    address: u64,
    length: u64,
) -> Result<(), String> {
    let inside = regions.get(&key).is_some_and(|region| {
        address >= region.address && address + length <= region.address + region.length
    });
    inside
        .then_some(())
        .ok_or_else(|| format!("no region of key {key:#x} has {length} bytes at {address:#x}"))
}

/// # Safety
/// `elements` must have `count` elements.
unsafe fn list(elements: *const ibv_sge, count: i32) -> Vec<ibv_sge> {
    (0..usize::try_from(count).unwrap_or(0))
        // SAFETY: as the caller vouches.
        .map(|index| unsafe { *elements.add(index) })
        .collect()
}

fn get(address: u64, length: usize) -> Vec<u8> {
    let from = std::ptr::with_exposed_provenance::<u8>(address as usize);
    // SAFETY: memory of the program, which waits meanwhile.
    unsafe { std::slice::from_raw_parts(from, length).to_vec() }
}

fn put(address: u64, bytes: &[u8]) {
    let to = std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
    // SAFETY: as in `get`.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
}

fn gather(elements: &[ibv_sge]) -> Vec<u8> {
    elements
        .iter()
        .flat_map(|element| get(element.addr, element.length as usize))
        .collect()
}

/// Puts bytes at an offset into what the elements describe.
fn scatter(elements: &[ibv_sge], offset: usize, bytes: &[u8]) {
    let (mut skip, mut left) = (offset, bytes);
    for element in elements {
        let length = element.length as usize;
        if skip >= length {
            skip -= length;
            continue;
        }
        let now = left.len().min(length - skip);
        put(element.addr + skip as u64, &left[..now]);
        (skip, left) = (0, &left[now..]);
    }
}
