//! A program that posts and polls, as through libibverbs: control verbs once, then `context->ops`.
//!
//! Every pointer comes from the verbs just called and is used by one thread: the SAFETY argument where no other is given.

use std::ffi::{c_int, c_void};
use std::os::fd::IntoRawFd;

use rdma_core_sys::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_WRITE, IBV_QP_ACCESS_FLAGS, IBV_QP_AV,
    IBV_QP_DEST_QPN, IBV_QP_MAX_DEST_RD_ATOMIC, IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER,
    IBV_QP_PATH_MTU, IBV_QP_PKEY_INDEX, IBV_QP_PORT, IBV_QP_RETRY_CNT, IBV_QP_RNR_RETRY,
    IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE, IBV_QP_TIMEOUT, IBV_QPS_INIT, IBV_QPS_RTR,
    IBV_QPS_RTS, IBV_QPT_RC, IBV_SEND_INLINE, IBV_SEND_SIGNALED, IBV_WC_SUCCESS, IBV_WR_RDMA_WRITE,
    IBV_WR_SEND, ibv_context, ibv_cq, ibv_mr, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_cap,
    ibv_qp_init_attr, ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_srq, ibv_srq_attr, ibv_srq_init_attr,
    ibv_wc,
};
use reverbs::virt;

use crate::door;
use crate::extended;
use crate::null_device::{self, GID, NAME};
use crate::restart::Machine;
use crate::shape::{BATCH, Route, Shape};

const ELEMENTS: usize = 4;
const DEPTH: u32 = 128;
const MESSAGE: u32 = 32;

/// The states through which an RC queue pair is connected, and what is set on the way to each (`ibv_modify_qp(3)`).
pub const CONNECT: [(u32, u32); 3] = [
    (
        IBV_QPS_INIT,
        IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
    ),
    (
        IBV_QPS_RTR,
        IBV_QP_STATE
            | IBV_QP_AV
            | IBV_QP_PATH_MTU
            | IBV_QP_DEST_QPN
            | IBV_QP_RQ_PSN
            | IBV_QP_MAX_DEST_RD_ATOMIC
            | IBV_QP_MIN_RNR_TIMER,
    ),
    (
        IBV_QPS_RTS,
        IBV_QP_STATE
            | IBV_QP_SQ_PSN
            | IBV_QP_TIMEOUT
            | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY
            | IBV_QP_MAX_QP_RD_ATOMIC,
    ),
];

/// An application, connected to itself and ready to post.
#[derive(Debug)]
pub struct Application {
    context: *mut ibv_context,
    completions: *mut ibv_cq,
    pairs: Vec<*mut ibv_qp>,
    shared: *mut ibv_srq,
    shape: Shape,
    route: Route,
    sends: Vec<ibv_send_wr>,
    receives: Vec<ibv_recv_wr>,
    next_pair: usize,
    /// What the requests point at.
    _elements: Box<[ibv_sge]>,
    _memory: Box<[u8]>,
}

impl Application {
    /// Opens the null device by `route` and makes what `shape` needs. For [`Route::After`] somebody has to call
    /// [`Machine::replace_hardware`] before it posts.
    ///
    /// # Panics
    /// A verb fails.
    #[must_use]
    pub fn new(_: &Machine, route: Route, shape: Shape) -> Self {
        let control = Control { route };
        let memory: Box<[u8]> = vec![0; 4096].into();
        // SAFETY: see the top.
        unsafe {
            let context = control.open();
            let domain = control.alloc_pd(context);
            let region = control.reg_mr(domain, memory.as_ptr().cast_mut().cast(), memory.len());
            let completions = match control.is_virtual(shape, &[Shape::Readers]) {
                true => extended::create_cq(context),
                false => control.create_cq(context),
            };
            let shared = match shape {
                Shape::SharedReceive => control.create_srq(domain),
                _ => std::ptr::null_mut(),
            };
            let pairs: Vec<_> = (0..shape.pairs())
                .map(|_| {
                    let built = [Shape::Builders, Shape::BuildersOf16];
                    let pair = match control.is_virtual(shape, &built) {
                        true => extended::create_qp(domain, completions, &control.capacity()),
                        false => control.create_qp(domain, completions, shared),
                    };
                    control.connect_to_itself(pair);
                    pair
                })
                .collect();
            let elements: Box<[ibv_sge]> = (0..ELEMENTS)
                .map(|index| ibv_sge {
                    addr: memory.as_ptr().expose_provenance() as u64 + 64 * index as u64,
                    length: MESSAGE,
                    lkey: (*region).lkey,
                })
                .collect();
            let mut made = Self {
                context,
                completions,
                pairs,
                shared,
                shape,
                route,
                sends: Vec::new(),
                receives: Vec::new(),
                next_pair: 0,
                _elements: elements,
                _memory: memory,
            };
            made.prepare((*region).rkey);
            made
        }
    }

    /// Writes the requests, which stay the same but for their `wr_id`.
    fn prepare(&mut self, rkey: u32) {
        let shape = self.shape;
        let sg_list = self._elements.as_mut_ptr();
        let num_sge = if shape == Shape::FourElements { 4 } else { 1 };
        for index in 1..=BATCH {
            // SAFETY: zero is a valid request.
            let mut send: ibv_send_wr = unsafe { std::mem::zeroed() };
            send.sg_list = sg_list;
            send.num_sge = num_sge;
            send.opcode = IBV_WR_SEND;
            if shape == Shape::Write {
                send.opcode = IBV_WR_RDMA_WRITE;
                // SAFETY: element 0 is there.
                send.wr.rdma.remote_addr = unsafe { (*sg_list).addr };
                send.wr.rdma.rkey = rkey;
            }
            if index % shape.signaled_every() == 0 {
                send.send_flags |= IBV_SEND_SIGNALED;
            }
            if shape == Shape::Inline32 {
                send.send_flags |= IBV_SEND_INLINE;
            }
            self.sends.push(send);
            self.receives.push(ibv_recv_wr {
                wr_id: 0,
                next: std::ptr::null_mut(),
                sg_list,
                num_sge,
            });
        }
        for chain in self.sends.chunks_mut(shape.chain()) {
            for index in 1..chain.len() {
                chain[index - 1].next = &raw mut chain[index];
            }
        }
    }

    /// Posts and polls at least `operations` requests, in whole batches; says how many it were.
    ///
    /// # Panics
    /// A post fails, or a completion is not the one that is due.
    #[inline(never)]
    pub fn run(&mut self, operations: u64) -> u64 {
        let batches = operations.div_ceil(BATCH as u64);
        for batch in 0..batches {
            let first = batch * BATCH as u64;
            // SAFETY: see the top.
            unsafe {
                match self.shape {
                    Shape::Receive => self.post_receives(first),
                    Shape::SharedReceive => self.post_shared_receives(first),
                    Shape::Builders | Shape::BuildersOf16 if self.route != Route::Direct => {
                        extended::send(self.pairs[0], &mut self.sends, self.shape.chain(), first);
                    }
                    _ => self.post_sends(first),
                }
                match self.shape {
                    Shape::Readers if self.route != Route::Direct => {
                        extended::look(self.completions, first);
                    }
                    _ => self.poll(first),
                }
            }
        }
        batches * BATCH as u64
    }

    #[inline(always)]
    unsafe fn post_sends(&mut self, first: u64) {
        let chain = self.shape.chain();
        for (index, send) in self.sends.iter_mut().enumerate() {
            send.wr_id = first + index as u64;
        }
        // SAFETY: see the top.
        unsafe {
            for index in (0..BATCH).step_by(chain) {
                let pair = *self.pairs.get_unchecked(self.next_pair);
                self.next_pair = (self.next_pair + 1) & (self.pairs.len() - 1);
                let mut bad = std::ptr::null_mut();
                let post = (*(*pair).context).ops.post_send.unwrap_unchecked();
                let code = post(pair, self.sends.as_mut_ptr().add(index), &raw mut bad);
                assert_eq!(code, 0);
            }
        }
    }

    #[inline(always)]
    unsafe fn post_receives(&mut self, first: u64) {
        // SAFETY: see the top.
        unsafe {
            let pair = self.pairs[0];
            for (index, receive) in self.receives.iter_mut().enumerate() {
                receive.wr_id = first + index as u64;
                let mut bad = std::ptr::null_mut();
                let post = (*(*pair).context).ops.post_recv.unwrap_unchecked();
                assert_eq!(post(pair, receive, &raw mut bad), 0);
            }
        }
    }

    #[inline(always)]
    unsafe fn post_shared_receives(&mut self, first: u64) {
        // SAFETY: see the top.
        unsafe {
            for (index, receive) in self.receives.iter_mut().enumerate() {
                receive.wr_id = first + index as u64;
                let mut bad = std::ptr::null_mut();
                let post = (*self.context).ops.post_srq_recv.unwrap_unchecked();
                assert_eq!(post(self.shared, receive, &raw mut bad), 0);
            }
        }
    }

    #[inline(always)]
    unsafe fn poll(&mut self, first: u64) {
        let every = self.shape.signaled_every() as u64;
        let room = match self.shape {
            Shape::OneAtATime | Shape::Readers => 1,
            _ => BATCH,
        };
        let mut due = first + every - 1;
        // SAFETY: see the top; zero is a valid completion.
        unsafe {
            let mut found: [ibv_wc; BATCH] = std::mem::MaybeUninit::zeroed().assume_init();
            while due < first + BATCH as u64 {
                let poll = (*(*self.completions).context)
                    .ops
                    .poll_cq
                    .unwrap_unchecked();
                let got = poll(self.completions, room as c_int, found.as_mut_ptr());
                assert!(got > 0, "nothing is there, {due} is due");
                for completion in &found[..got as usize] {
                    assert_eq!(completion.status, IBV_WC_SUCCESS);
                    assert_eq!(completion.wr_id, due);
                    due += every;
                }
            }
        }
    }
}

/// The verbs that are called once: the device's own, or the virtual device's as libibverbs calls them.
struct Control {
    route: Route,
}

impl Control {
    fn is_direct(&self) -> bool {
        self.route == Route::Direct
    }

    /// Is this one of the shapes that go another way through the virtual device?
    fn is_virtual(&self, shape: Shape, shapes: &[Shape]) -> bool {
        !self.is_direct() && shapes.contains(&shape)
    }

    fn capacity(&self) -> ibv_qp_cap {
        ibv_qp_cap {
            max_send_wr: DEPTH,
            max_recv_wr: DEPTH,
            max_send_sge: ELEMENTS as u32,
            max_recv_sge: ELEMENTS as u32,
            max_inline_data: 64,
        }
    }

    unsafe fn open(&self) -> *mut ibv_context {
        let verbs = null_device::verbs();
        if self.is_direct() {
            return verbs.open(NAME).expect("open");
        }
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        // SAFETY: zero is valid; the context is never freed.
        unsafe {
            let context: &mut ibv_context = Box::leak(Box::new(std::mem::zeroed()));
            context.cmd_fd = null.into_raw_fd();
            door::set_operations(&mut context.ops);
            let opened = virt::context::open(context, NAME, verbs, |_, _| Ok(())).expect("open");
            context.async_fd = opened.async_fd;
            context.num_comp_vectors = opened.completion_vectors;
            context
        }
    }

    unsafe fn alloc_pd(&self, context: *mut ibv_context) -> *mut ibv_pd {
        // SAFETY: see the top.
        unsafe {
            let domain = match self.is_direct() {
                true => (null_device::verbs().ibv_alloc_pd)(context),
                false => virt::protection_domain::alloc(context).expect("alloc_pd"),
            };
            (*domain).context = context;
            domain
        }
    }

    unsafe fn reg_mr(&self, pd: *mut ibv_pd, addr: *mut c_void, length: usize) -> *mut ibv_mr {
        let iova = addr.expose_provenance() as u64;
        let access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
        // SAFETY: see the top.
        unsafe {
            match self.is_direct() {
                true => (null_device::verbs().ibv_reg_mr_iova2)(pd, addr, length, iova, access),
                false => virt::memory_region::register(pd, addr, length, iova, access as i32)
                    .expect("reg_mr"),
            }
        }
    }

    unsafe fn create_cq(&self, context: *mut ibv_context) -> *mut ibv_cq {
        let none = std::ptr::null_mut();
        let entries = 2048;
        // SAFETY: see the top.
        unsafe {
            let queue = match self.is_direct() {
                true => (null_device::verbs().ibv_create_cq)(
                    context,
                    entries,
                    std::ptr::null_mut(),
                    none,
                    0,
                ),
                false => virt::completion_queue::create(context, entries, none, 0).expect("cq"),
            };
            (*queue).context = context;
            queue
        }
    }

    unsafe fn create_srq(&self, pd: *mut ibv_pd) -> *mut ibv_srq {
        let mut init = ibv_srq_init_attr {
            srq_context: std::ptr::null_mut(),
            attr: ibv_srq_attr {
                max_wr: DEPTH,
                max_sge: ELEMENTS as u32,
                srq_limit: 0,
            },
        };
        // SAFETY: see the top.
        unsafe {
            match self.is_direct() {
                true => (null_device::verbs().ibv_create_srq)(pd, &raw mut init),
                false => virt::shared_receive_queue::create(pd, &raw mut init).expect("srq"),
            }
        }
    }

    unsafe fn create_qp(&self, pd: *mut ibv_pd, cq: *mut ibv_cq, srq: *mut ibv_srq) -> *mut ibv_qp {
        let mut init = ibv_qp_init_attr {
            qp_context: std::ptr::null_mut(),
            send_cq: cq,
            recv_cq: cq,
            srq,
            cap: self.capacity(),
            qp_type: IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: see the top.
        unsafe {
            match self.is_direct() {
                true => (null_device::verbs().ibv_create_qp)(pd, &raw mut init),
                false => virt::queue_pair::create(pd, &raw mut init).expect("create_qp"),
            }
        }
    }

    unsafe fn connect_to_itself(&self, pair: *mut ibv_qp) {
        // SAFETY: see the top; zero is valid.
        unsafe {
            let mut attr: ibv_qp_attr = std::mem::zeroed();
            attr.port_num = 1;
            attr.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
            attr.path_mtu = rdma_core_sys::IBV_MTU_1024;
            attr.dest_qp_num = (*pair).qp_num;
            attr.ah_attr.is_global = 1;
            attr.ah_attr.port_num = 1;
            attr.ah_attr.grh.dgid.raw = GID;
            for (state, mask) in CONNECT {
                attr.qp_state = state;
                let mask = mask as c_int;
                match self.is_direct() {
                    true => {
                        let code = (null_device::verbs().ibv_modify_qp)(pair, &raw mut attr, mask);
                        assert_eq!(code, 0);
                    }
                    false => virt::queue_pair::modify(pair, &raw mut attr, mask).expect("modify"),
                }
            }
        }
    }
}
