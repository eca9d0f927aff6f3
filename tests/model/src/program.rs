//! An application of two ends that knows what must have happened.
//!
//! Each end posts numbered operations. What a request completes with, what arrives, in which order, and what memory must hold
//! follow from that. Every pointer comes from the verbs called here and is used by one thread: the SAFETY argument where no other
//! is given.

use std::collections::VecDeque;
use std::ffi::c_int;
use std::os::fd::IntoRawFd;

use rdma_core_sys::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_ATOMIC, IBV_ACCESS_REMOTE_READ,
    IBV_ACCESS_REMOTE_WRITE, IBV_MTU_1024, IBV_QPT_RC, IBV_SEND_SIGNALED, IBV_WC_RECV,
    IBV_WC_SUCCESS, IBV_WC_WR_FLUSH_ERR, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_RDMA_READ,
    IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, ibv_context, ibv_cq, ibv_mr,
    ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_recv_wr, ibv_send_wr, ibv_sge,
    ibv_wc,
};
use reverbs::virt::{completion_queue, context, memory_region, protection_domain, queue_pair};
use reverbs_benches::application::CONNECT;
use reverbs_benches::null_device::{GID, NAME};

use crate::fabric::fabric;
use crate::verbs::verbs;

/// Requests that a queue takes.
pub const DEPTH: u32 = 16;
/// Unsignaled requests in a row.
const LONGEST_RUN: usize = 6;
/// Bytes of the longest message: three packets.
pub const LONGEST: u32 = 3000;
/// Bytes that each message has for itself.
const SLOT: usize = 4096;
/// Message buffers of an end, more than can be under way.
const SLOTS: usize = 64;
/// Marks the `wr_id` of a receive.
const RECEIVE: u64 = 1 << 32;
/// Where WRITEs go, in turn.
const TARGETS: usize = 4;

/// What an end asks of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Send,
    Write,
    WriteWithImmediate,
    /// Of the other's counter.
    Read,
    /// One more, to the other's counter.
    Add,
}

impl Kind {
    fn answers(self) -> bool {
        matches!(self, Self::Read | Self::Add)
    }
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    number: u64,
    kind: Kind,
    signaled: bool,
    length: u32,
    /// What a READ or an Add must bring back.
    counter: u64,
}

/// One end.
#[derive(Debug)]
struct End {
    pair: *mut ibv_qp,
    queue: *mut ibv_cq,
    memory: Box<[u8]>,
    region: *mut ibv_mr,
    next: u64,
    /// Posted and not seen to be done.
    posted: VecDeque<Operation>,
    adds: u64,
    /// Buffers of receives that are posted.
    receives: VecDeque<usize>,
    next_receive: usize,
    /// What the other has sent that takes a receive, in order.
    due: VecDeque<Operation>,
    /// The last WRITE to each target of the other.
    written: [Option<Operation>; TARGETS],
    /// All messages posted, by name.
    names: Vec<u64>,
    /// The connection ended in error: the rest must come back flushed.
    broken: bool,
    /// Sends have begun to.
    flushed: bool,
}

// An end's memory: message buffers, receive buffers, targets, results, counter.
const OUT: usize = 0;
const IN: usize = OUT + SLOTS * SLOT;
const TARGET: usize = IN + SLOTS * SLOT;
const RESULT: usize = TARGET + TARGETS * SLOT;
const COUNTER: usize = RESULT + SLOTS * 8;
const MEMORY: usize = COUNTER + 8;

impl End {
    fn address(&self, at: usize) -> u64 {
        self.memory.as_ptr().expose_provenance() as u64 + at as u64
    }

    fn word(&self, at: usize) -> u64 {
        let place = self.memory[at..].as_ptr().cast::<u64>();
        // SAFETY: within the memory; the fabric writes there behind the compiler's back.
        unsafe { place.read_unaligned() }
    }

    fn bytes(&self, at: usize, length: usize) -> Vec<u8> {
        (at..at + length)
            // SAFETY: as in `word`.
            .map(|at| unsafe { (&raw const self.memory[at]).read_volatile() })
            .collect()
    }
}

/// The application.
#[derive(Debug)]
pub struct Program {
    context: *mut ibv_context,
    domain: *mut ibv_pd,
    ends: [End; 2],
    /// Distinguishes the messages of this program from those of others.
    base: u64,
}

/// A message's content.
fn content(name: u64, length: u32) -> Vec<u8> {
    let mut bytes = name.to_ne_bytes().to_vec();
    bytes.extend((8..u64::from(length)).map(|index| (name.wrapping_mul(31) + index * 7) as u8));
    bytes.truncate(length as usize);
    bytes
}

impl Program {
    /// Two ends that are connected.
    ///
    /// # Panics
    /// A verb fails.
    #[must_use]
    pub fn new(base: u64) -> Self {
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        // SAFETY: see the top; zero is valid for a context.
        unsafe {
            let app: &mut ibv_context = Box::leak(Box::new(std::mem::zeroed()));
            app.cmd_fd = null.into_raw_fd();
            let opened = context::open(app, NAME, verbs(), |_, _| Ok(())).expect("open");
            app.async_fd = opened.async_fd;
            let domain = protection_domain::alloc(app).expect("alloc_pd");
            (*domain).context = app;
            let ends = [End::new(app, domain), End::new(app, domain)];
            connect(ends[0].pair, ends[1].pair, 100);
            connect(ends[1].pair, ends[0].pair, 0xff_fff0);
            Self {
                context: app,
                domain,
                ends,
                base,
            }
        }
    }

    /// The number by which an end's queue pair is known to the application.
    #[must_use]
    pub fn number(&self, end: usize) -> u32 {
        // SAFETY: see the top.
        unsafe { (*self.ends[end].pair).qp_num }
    }

    /// Posts an operation, if the queue has room.
    ///
    /// # Panics
    /// It is refused for another reason.
    pub fn post(&mut self, end: usize, kind: Kind, length: u32, signaled: bool) {
        let peer = &self.ends[1 - end];
        let (peer_target, peer_counter) = (peer.address(TARGET), peer.address(COUNTER));
        // SAFETY: see the top.
        let rkey = unsafe { (*peer.region).rkey };
        let this = &mut self.ends[end];
        if this.posted.len() >= DEPTH as usize {
            return;
        }
        // A queue of nothing but unsignaled requests would never be seen to have room again.
        let unsignaled = this.posted.iter().rev().take_while(|last| !last.signaled);
        let signaled = signaled || unsignaled.count() >= LONGEST_RUN;
        let number = this.next;
        let slot = number as usize % SLOTS;
        let name = self.base + ((end as u64) << 32) + number;
        let length = match kind {
            Kind::Read | Kind::Add => 8,
            _ => length.clamp(8, LONGEST),
        };
        let target = number as usize % TARGETS;
        let place = match kind {
            Kind::Read | Kind::Add => RESULT + slot * 8,
            _ => {
                let at = OUT + slot * SLOT;
                this.memory[at..at + length as usize].copy_from_slice(&content(name, length));
                at
            }
        };
        let mut element = ibv_sge {
            addr: this.address(place),
            length,
            // SAFETY: see the top.
            lkey: unsafe { (*this.region).lkey },
        };
        // SAFETY: zero is a valid request.
        let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = number;
        request.sg_list = &raw mut element;
        request.num_sge = 1;
        request.send_flags = if signaled { IBV_SEND_SIGNALED } else { 0 };
        request.opcode = match kind {
            Kind::Send => IBV_WR_SEND,
            Kind::Write => IBV_WR_RDMA_WRITE,
            Kind::WriteWithImmediate => IBV_WR_RDMA_WRITE_WITH_IMM,
            Kind::Read => IBV_WR_RDMA_READ,
            Kind::Add => IBV_WR_ATOMIC_FETCH_AND_ADD,
        };
        match kind {
            Kind::Send => {}
            Kind::Write | Kind::WriteWithImmediate => {
                request.wr.rdma.remote_addr = peer_target + (target * SLOT) as u64;
                request.wr.rdma.rkey = rkey;
            }
            Kind::Read => {
                request.wr.rdma.remote_addr = peer_counter;
                request.wr.rdma.rkey = rkey;
            }
            Kind::Add => {
                request.wr.atomic.remote_addr = peer_counter;
                request.wr.atomic.compare_add = 1;
                request.wr.atomic.rkey = rkey;
            }
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: see the top.
        match unsafe { queue_pair::post_send(this.pair, &raw mut request, &raw mut bad) } {
            0 => {}
            libc::ENOMEM => return,
            code => panic!("post of {kind:?}: {code}"),
        }
        this.next += 1;
        let operation = Operation {
            number,
            kind,
            signaled,
            length,
            counter: this.adds,
        };
        this.posted.push_back(operation);
        match kind {
            Kind::Add => this.adds += 1,
            Kind::Read => {}
            _ => this.names.push(name),
        }
        if let Kind::Write | Kind::WriteWithImmediate = kind {
            this.written[target] = Some(operation);
        }
        if let Kind::Send | Kind::WriteWithImmediate = kind {
            self.ends[1 - end].due.push_back(operation);
        }
    }

    /// Posts a receive, if the queue has room.
    ///
    /// # Panics
    /// It is refused.
    pub fn receive(&mut self, end: usize) {
        let this = &mut self.ends[end];
        if this.receives.len() >= DEPTH as usize {
            return;
        }
        let slot = this.next_receive % SLOTS;
        this.next_receive += 1;
        let mut element = ibv_sge {
            addr: this.address(IN + slot * SLOT),
            length: SLOT as u32,
            // SAFETY: see the top.
            lkey: unsafe { (*this.region).lkey },
        };
        let mut request = ibv_recv_wr {
            wr_id: RECEIVE | slot as u64,
            next: std::ptr::null_mut(),
            sg_list: &raw mut element,
            num_sge: 1,
        };
        let mut bad = std::ptr::null_mut();
        // SAFETY: see the top.
        let code = unsafe { queue_pair::post_receive(this.pair, &raw mut request, &raw mut bad) };
        assert_eq!(code, 0, "post of a receive");
        this.receives.push_back(slot);
    }

    /// Takes completions and checks each of them.
    ///
    /// # Panics
    /// One is not what is due.
    pub fn poll(&mut self, end: usize) {
        loop {
            // SAFETY: see the top; zero is a valid completion.
            let (got, completion) = unsafe {
                let mut completion: ibv_wc = std::mem::zeroed();
                let got = completion_queue::poll(self.ends[end].queue, 1, &raw mut completion);
                (got, completion)
            };
            match got {
                0 => return,
                1 => self.take(end, &completion),
                code => panic!("poll: {code}"),
            }
        }
    }

    fn take(&mut self, end: usize, completion: &ibv_wc) {
        assert_eq!(
            completion.qp_num,
            self.number(end),
            "queue pair of a completion"
        );
        let (base, status) = (self.base, completion.status);
        let this = &mut self.ends[end];
        if status == IBV_WC_WR_FLUSH_ERR {
            assert!(
                this.broken,
                "end {end}: flushed, and its connection is fine"
            );
            // Their opcode means nothing; each kind comes in its order.
            if completion.wr_id & RECEIVE == 0 {
                // What was done and not signaled is not heard of.
                while let Some(done) = this.posted.pop_front_if(|done| {
                    !done.signaled && done.number < completion.wr_id && !this.flushed
                }) {
                    let name = base + ((end as u64) << 32) + done.number;
                    let fabric = fabric();
                    let executed = fabric.executions.contains_key(&name);
                    assert!(
                        executed || done.kind.answers(),
                        "end {end}: {done:?} is missing"
                    );
                }
                this.flushed = true;
                let due = this.posted.pop_front().map(|due| due.number);
                assert_eq!(due, Some(completion.wr_id), "end {end}: flushed send");
            } else {
                let due = this.receives.pop_front().map(|slot| RECEIVE | slot as u64);
                assert_eq!(due, Some(completion.wr_id), "end {end}: flushed receive");
            }
            return;
        }
        assert_eq!(status, IBV_WC_SUCCESS, "end {end}: status");
        if completion.opcode & IBV_WC_RECV != 0 {
            let slot = this.receives.pop_front().expect("a receive is posted");
            assert_eq!(
                completion.wr_id,
                RECEIVE | slot as u64,
                "end {end}: order of receives"
            );
            let due = this
                .due
                .pop_front()
                .expect("the other end has sent something");
            if due.kind == Kind::Send {
                let name = base + ((1 - end as u64) << 32) + due.number;
                let bytes = this.bytes(IN + slot * SLOT, due.length as usize);
                assert!(
                    bytes == content(name, due.length),
                    "end {end}: message {}",
                    due.number
                );
            }
            return;
        }
        // What was not signaled is done with the next that is.
        loop {
            let done = this.posted.pop_front().expect("something is posted");
            if let Kind::Read | Kind::Add = done.kind {
                let slot = done.number as usize % SLOTS;
                let found = this.word(RESULT + slot * 8);
                assert_eq!(
                    found, done.counter,
                    "end {end}: {:?} {}",
                    done.kind, done.number
                );
            }
            if done.number == completion.wr_id {
                assert!(done.signaled, "end {end}: completion of {}", done.number);
                return;
            }
            assert!(!done.signaled, "end {end}: {} never completed", done.number);
        }
    }

    /// The connection of an end has ended in error, and so nothing more arrives at either end.
    pub fn break_down(&mut self, end: usize) {
        self.ends[end].broken = true;
    }

    /// Lets everything happen that is still to happen, and checks what is left behind.
    ///
    /// # Panics
    /// Anything is missing, or there is too much of it.
    pub fn finish(mut self) {
        let broken = self.ends.iter().any(|end| end.broken);
        if !broken {
            // So that tails that nobody asked about are seen to be done, too.
            for end in 0..2 {
                while self.ends[end].posted.len() >= DEPTH as usize {
                    self.turn();
                }
                self.post(end, Kind::Send, 8, true);
            }
        }
        for _ in 0..200 {
            self.turn();
        }
        for (index, end) in self.ends.iter().enumerate() {
            if end.broken || !broken {
                assert!(end.posted.is_empty(), "end {index}: left {:?}", end.posted);
            }
            let executions = |name: &u64| fabric().executions.get(name).copied().unwrap_or(0);
            for name in &end.names {
                let times = executions(name);
                assert!(
                    times == 1 || broken && times == 0,
                    "message {name:#x}: executed {times} times"
                );
            }
            let other = &self.ends[1 - index];
            if !broken {
                assert!(
                    other.due.is_empty(),
                    "end {index}: not received {:?}",
                    other.due
                );
                assert_eq!(
                    other.word(COUNTER),
                    end.adds,
                    "end {index}: counter of the other"
                );
                for (target, last) in end.written.iter().enumerate() {
                    let Some(last) = last else { continue };
                    let name = self.base + ((index as u64) << 32) + last.number;
                    let bytes = other.bytes(TARGET + target * SLOT, last.length as usize);
                    assert!(
                        bytes == content(name, last.length),
                        "end {index}: target {target}"
                    );
                }
            }
        }
        assert_eq!(fabric().violations, [""; 0]);
        drop(self);
        let fabric = fabric();
        assert!(
            fabric.pairs.is_empty() && fabric.regions.is_empty() && fabric.completions.is_empty(),
            "hardware is left behind: {fabric:?}"
        );
    }

    fn turn(&mut self) {
        for end in 0..2 {
            self.receive(end);
        }
        let numbers: Vec<u32> = fabric().pairs.keys().copied().collect();
        for number in numbers {
            for _ in 0..4 {
                fabric().deliver(number);
                fabric().acknowledge(number);
            }
        }
        for end in 0..2 {
            self.poll(end);
        }
    }
}

impl Drop for Program {
    /// Also after a failure, so that the next program finds nothing of this one.
    fn drop(&mut self) {
        // SAFETY: see the top; in the order of use.
        unsafe {
            for end in &self.ends {
                queue_pair::destroy(end.pair).expect("destroy_qp");
            }
            for end in &self.ends {
                completion_queue::destroy(end.queue).expect("destroy_cq");
                memory_region::deregister(end.region).expect("dereg_mr");
            }
            protection_domain::dealloc(self.domain).expect("dealloc_pd");
            context::close(self.context).expect("close");
        }
    }
}

impl End {
    unsafe fn new(app: *mut ibv_context, domain: *mut ibv_pd) -> Self {
        let memory: Box<[u8]> = vec![0; MEMORY].into();
        // SAFETY: see the top.
        unsafe {
            let queue = completion_queue::create(app, 256, std::ptr::null_mut(), 0).expect("cq");
            (*queue).context = app;
            let start = memory.as_ptr().cast_mut();
            let access = IBV_ACCESS_LOCAL_WRITE
                | IBV_ACCESS_REMOTE_WRITE
                | IBV_ACCESS_REMOTE_READ
                | IBV_ACCESS_REMOTE_ATOMIC;
            let iova = start.expose_provenance() as u64;
            let region = memory_region::register(domain, start.cast(), MEMORY, iova, access as i32);
            let mut init = ibv_qp_init_attr {
                qp_context: std::ptr::null_mut(),
                send_cq: queue,
                recv_cq: queue,
                srq: std::ptr::null_mut(),
                cap: ibv_qp_cap {
                    max_send_wr: DEPTH,
                    max_recv_wr: DEPTH,
                    max_send_sge: 1,
                    max_recv_sge: 1,
                    max_inline_data: 64,
                },
                qp_type: IBV_QPT_RC,
                sq_sig_all: 0,
            };
            Self {
                pair: queue_pair::create(domain, &raw mut init).expect("create_qp"),
                queue,
                region: region.expect("reg_mr"),
                memory,
                next: 0,
                posted: VecDeque::new(),
                adds: 0,
                receives: VecDeque::new(),
                next_receive: 0,
                due: VecDeque::new(),
                written: [None; TARGETS],
                names: Vec::new(),
                broken: false,
                flushed: false,
            }
        }
    }
}

/// `psn`: the first that `pair` sends; its peer sends the other of the two first.
unsafe fn connect(pair: *mut ibv_qp, peer: *mut ibv_qp, psn: u32) {
    // SAFETY: see the top; zero is valid.
    unsafe {
        let mut attr: ibv_qp_attr = std::mem::zeroed();
        attr.port_num = 1;
        attr.qp_access_flags =
            IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;
        attr.path_mtu = IBV_MTU_1024;
        attr.dest_qp_num = (*peer).qp_num;
        attr.sq_psn = psn;
        attr.rq_psn = 100 + 0xff_fff0 - psn;
        attr.ah_attr.is_global = 1;
        attr.ah_attr.port_num = 1;
        attr.ah_attr.grh.dgid.raw = GID;
        for (state, mask) in CONNECT {
            attr.qp_state = state;
            queue_pair::modify(pair, &raw mut attr, mask as c_int).expect("modify");
        }
    }
}
