//! An application that posts whatever it is told, and knows what the verbs must answer.
//!
//! Every pointer comes from the verbs called here and is used by one thread: the SAFETY argument where no other is given.

mod post;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::c_int;
use std::os::fd::IntoRawFd;

use rdma_core_sys::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_ATOMIC, IBV_ACCESS_REMOTE_READ,
    IBV_ACCESS_REMOTE_WRITE, IBV_MTU_1024, IBV_QP_STATE, IBV_QPS_ERR, IBV_QPS_RESET, IBV_QPT_RC,
    IBV_QPT_UD, IBV_WC_SUCCESS, ibv_ah, ibv_ah_attr, ibv_context, ibv_cq, ibv_mr, ibv_pd, ibv_qp,
    ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_srq, ibv_srq_attr, ibv_srq_init_attr, ibv_wc,
};
use reverbs::control::message::{Reply, Request};
use reverbs::virt::{
    address_handle, completion_queue, context, memory_region, protection_domain, queue_pair,
    shared_receive_queue,
};
use reverbs_benches::application::CONNECT;
use reverbs_benches::null_device::{GID, NAME};
use reverbs_benches::restart::{Agent, Machine};

use crate::device::device;
use crate::input::{Act, Control, Input, Step};
use crate::orchestrator::{self, Conversation};
use crate::outcome::Sends;
use crate::verbs::verbs;

/// Requests that a queue takes.
const DEPTH: u32 = 8;
/// Elements that a request may have.
const ELEMENTS: u32 = 3;
/// Bytes that may be inline.
const INLINE: u32 = 40;
/// The queue pairs: two connected to each other; two more, of which the second has the shared receive queue; one for datagrams.
const PAIRS: usize = 5;
const WITH_SHARED: usize = 3;
const DATAGRAM: usize = 4;
/// Receive queues: one for each pair, but the shared one for [`WITH_SHARED`].
const QUEUES: usize = PAIRS;
/// Phases, and one moment more.
const MOMENTS: usize = 10;

/// The application, for as long as the process.
#[derive(Debug)]
pub struct Application {
    machine: Machine,
    domain: *mut ibv_pd,
    completions: *mut ibv_cq,
    shared: *mut ibv_srq,
    handle: *mut ibv_ah,
    pairs: [*mut ibv_qp; PAIRS],
    regions: [*mut ibv_mr; 2],
    old_key: u32,
    memory: Box<[u8]>,
    sends: [Sends; PAIRS],
    /// Of the queue pairs' own queues, in order; of the shared queue, in any order.
    receives: [VecDeque<u64>; QUEUES],
    next: u32,
    /// Virtual numbers and the hardware's differ.
    restarted: bool,
    /// Posts are held.
    closed: bool,
    runtime_dir: std::path::PathBuf,
}

impl Application {
    /// Opens the device, and replaces it once if `restarted`.
    ///
    /// # Panics
    /// A verb fails.
    #[must_use]
    pub fn new(restarted: bool) -> Self {
        let machine = Machine::new();
        let runtime_dir = reverbs::control::socket::runtime_dir().expect("the machine's folder");
        device().tolerates_keys = true;
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        let memory: Box<[u8]> = vec![0; 1 << 17].into();
        // SAFETY: see the top; zero is valid for a context and an address.
        unsafe {
            let app: &mut ibv_context = Box::leak(Box::new(std::mem::zeroed()));
            app.cmd_fd = null.into_raw_fd();
            let opened = context::open(app, NAME, verbs(), |_, _| Ok(())).expect("open");
            app.async_fd = opened.async_fd;
            let domain = protection_domain::alloc(app).expect("alloc_pd");
            (*domain).context = app;
            let completions =
                completion_queue::create(app, 4096, std::ptr::null_mut(), 0).expect("create_cq");
            (*completions).context = app;
            let mut init = ibv_srq_init_attr {
                srq_context: std::ptr::null_mut(),
                attr: ibv_srq_attr {
                    max_wr: DEPTH,
                    max_sge: ELEMENTS,
                    srq_limit: 0,
                },
            };
            let shared = shared_receive_queue::create(domain, &raw mut init).expect("create_srq");
            let mut to: ibv_ah_attr = std::mem::zeroed();
            (to.is_global, to.port_num, to.grh.dgid.raw) = (1, 1, GID);
            let handle = address_handle::create(domain, &raw mut to).expect("create_ah");
            let pairs = std::array::from_fn(|index| {
                let srq = match index {
                    WITH_SHARED => shared,
                    _ => std::ptr::null_mut(),
                };
                let mut init = ibv_qp_init_attr {
                    qp_context: std::ptr::null_mut(),
                    send_cq: completions,
                    recv_cq: completions,
                    srq,
                    cap: ibv_qp_cap {
                        max_send_wr: DEPTH,
                        max_recv_wr: DEPTH,
                        max_send_sge: ELEMENTS,
                        max_recv_sge: ELEMENTS,
                        max_inline_data: INLINE,
                    },
                    qp_type: match index {
                        DATAGRAM => IBV_QPT_UD,
                        _ => IBV_QPT_RC,
                    },
                    sq_sig_all: 0,
                };
                queue_pair::create(domain, &raw mut init).expect("create_qp")
            });
            let mut made = Self {
                machine,
                domain,
                completions,
                shared,
                handle,
                pairs,
                regions: [std::ptr::null_mut(); 2],
                old_key: u32::MAX,
                memory,
                sends: Default::default(),
                receives: Default::default(),
                next: 1,
                restarted: false,
                closed: false,
                runtime_dir,
            };
            made.regions = [made.register(), made.register()];
            for pair in [0, 2, DATAGRAM] {
                made.connect(pair);
            }
            if restarted {
                made.machine.replace_hardware();
                made.restarted = true;
                device().tolerates_keys = false;
            }
            made
        }
    }

    fn register(&mut self) -> *mut ibv_mr {
        let access = IBV_ACCESS_LOCAL_WRITE
            | IBV_ACCESS_REMOTE_WRITE
            | IBV_ACCESS_REMOTE_READ
            | IBV_ACCESS_REMOTE_ATOMIC;
        let start = self.memory.as_mut_ptr();
        let iova = start.expose_provenance() as u64;
        // SAFETY: see the top.
        let region = unsafe {
            let length = self.memory.len();
            memory_region::register(self.domain, start.cast(), length, iova, access as i32)
        };
        region.expect("reg_mr")
    }

    fn number(&self, pair: usize) -> u32 {
        // SAFETY: see the top.
        unsafe { (*self.pairs[pair]).qp_num }
    }

    /// Connects a pair with its peer, both from RESET.
    fn connect(&mut self, pair: usize) {
        let first = pair & !1;
        let ends: &[usize] = match pair {
            DATAGRAM => &[DATAGRAM],
            _ => &[first, first + 1],
        };
        for &end in ends {
            // SAFETY: see the top; zero is valid.
            unsafe {
                let mut attr: ibv_qp_attr = std::mem::zeroed();
                attr.port_num = 1;
                attr.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
                attr.path_mtu = IBV_MTU_1024;
                attr.dest_qp_num = self.number(end ^ usize::from(end != DATAGRAM));
                (attr.sq_psn, attr.rq_psn) = (0xff_fff0, 0xff_fff0);
                attr.ah_attr.is_global = 1;
                attr.ah_attr.port_num = 1;
                attr.ah_attr.grh.dgid.raw = GID;
                for (state, mask) in CONNECT {
                    attr.qp_state = state;
                    let done = queue_pair::modify(self.pairs[end], &raw mut attr, mask as c_int);
                    done.expect("modify_qp");
                }
            }
        }
    }

    fn set_state(&mut self, pair: usize, state: u32) {
        // SAFETY: see the top; zero is valid.
        unsafe {
            let mut attr: ibv_qp_attr = std::mem::zeroed();
            attr.qp_state = state;
            let mask = IBV_QP_STATE as c_int;
            queue_pair::modify(self.pairs[pair], &raw mut attr, mask).expect("modify_qp");
        }
    }

    /// Takes all steps, then sees to it that nothing is outstanding.
    ///
    /// # Panics
    /// Anything is not as it must be.
    pub fn run(&mut self, input: &Input) {
        // More cycles in one input only make it slower.
        let mut cycles = 2;
        for step in &input.steps {
            match step {
                Step::Act(act) => self.act(act),
                Step::Control(control) => self.control(control),
                Step::Cycle(between) if self.restarted && cycles > 0 => {
                    cycles -= 1;
                    self.cycle(between);
                }
                Step::Cycle(_) => {}
            }
        }
        self.finish();
    }

    /// Has requests of every kind of fate outstanding, lets somebody talk to the agent, and brings the process back.
    ///
    /// # Panics
    /// It does not come back, or a request does not complete.
    pub fn talk(&mut self, conversation: &Conversation) {
        for pair in 0..PAIRS {
            self.send(pair, &post::plain_chain());
        }
        conversation.hold(&self.runtime_dir);
        for sends in &mut self.sends {
            (sends.excused, sends.unproven) = (true, true);
        }
        device().eager = true;
        orchestrator::bring_back(&self.runtime_dir, conversation.tells_numbers());
        // Wrong numbers lead to wrong places, which the device has noticed.
        device().violations.clear();
        self.finish();
        device().eager = false;
    }

    fn control(&mut self, control: &Control) {
        match *control {
            Control::Fail { pair } => {
                let pair = usize::from(pair) % PAIRS;
                self.sends[pair].excused = true;
                self.set_state(pair, IBV_QPS_ERR);
            }
            Control::Reset { pair } => self.reset(usize::from(pair) % PAIRS),
            Control::Register => {
                // SAFETY: see the top.
                unsafe {
                    self.old_key = (*self.regions[1]).lkey;
                    memory_region::deregister(self.regions[1]).expect("dereg_mr");
                }
                // Requests that name it cannot succeed any more; one that was held is not given to the device.
                self.regions[1] = self.register();
            }
        }
    }

    /// Both ends, as their PSNs must fit.
    fn reset(&mut self, pair: usize) {
        let first = pair & !1;
        let ends = match pair {
            DATAGRAM => vec![DATAGRAM],
            _ => vec![first, first + 1],
        };
        for &end in &ends {
            self.set_state(end, IBV_QPS_RESET);
        }
        // What had completed is still there to be polled; the rest is gone without a word.
        self.poll(usize::MAX);
        for &end in &ends {
            self.sends[end].outstanding.clear();
            self.sends[end].excused = false;
            if end != WITH_SHARED {
                self.receives[end].clear();
            }
        }
        self.connect(pair);
    }

    fn act(&mut self, act: &Act) {
        let hardware = |pair: u8| {
            let numbers = device().numbers();
            numbers
                .get(usize::from(pair) % numbers.len().max(1))
                .copied()
        };
        match act {
            Act::Send { pair, chain } => self.send(usize::from(*pair) % PAIRS, &chain.0),
            Act::Receive { queue, chain } => self.receive(usize::from(*queue) % QUEUES, &chain.0),
            Act::Execute { pair, count } => {
                for _ in 0..*count % 8 {
                    hardware(*pair).map(|number| device().execute(number));
                }
            }
            Act::Acknowledge { pair, count } => {
                for _ in 0..*count % 8 {
                    hardware(*pair).map(|number| device().acknowledge(number));
                }
            }
            Act::Poll { count } => self.poll(usize::from(*count)),
            Act::Refuse { after } => device().refuse_after = Some(u32::from(*after)),
        }
    }

    /// Takes up to `most` completions, in the order in which they come.
    fn poll(&mut self, most: usize) {
        let mut left = most;
        while left > 0 {
            let room = left.min(7);
            // SAFETY: see the top; zero is a valid completion.
            let (got, found) = unsafe {
                let mut found: [ibv_wc; 7] = std::mem::zeroed();
                let room = room as c_int;
                let got = completion_queue::poll(self.completions, room, found.as_mut_ptr());
                (got, found)
            };
            assert!((0..=room as c_int).contains(&got), "poll: {got}");
            if got == 0 {
                return;
            }
            left -= got as usize;
            for completion in &found[..got as usize] {
                self.take(completion);
            }
        }
    }

    fn take(&mut self, completion: &ibv_wc) {
        let (is_receive, queue) = post::queue_of(completion.wr_id);
        assert_eq!(completion.qp_num, self.number(queue), "of {queue}");
        if !is_receive {
            self.sends[queue].complete(completion);
            return;
        }
        let posted = &mut self.receives[queue];
        let place = posted.iter().position(|wr_id| *wr_id == completion.wr_id);
        let Some(place) = place else {
            panic!("no such receive is posted: {:#x}", completion.wr_id)
        };
        assert!(
            queue == WITH_SHARED || place == 0,
            "receives complete in order"
        );
        assert!(
            completion.status == IBV_WC_SUCCESS || self.sends[queue].excused,
            "receive of {queue}: status {}",
            completion.status
        );
        posted.remove(place);
    }

    fn cycle(&mut self, between: &[(u8, Act)]) {
        let mut agent = Agent::begin(&self.runtime_dir);
        let mut moment = 0;
        let mut at = |this: &mut Self| {
            for (when, act) in between {
                if usize::from(*when) % MOMENTS == moment {
                    this.act(act);
                }
            }
            moment += 1;
        };
        at(self);
        agent.ask(Request::Close { limit_ms: 1000 });
        self.closed = true;
        at(self);
        agent.ask(Request::Drain {
            limit_ms: 0,
            arrivals: true,
        });
        at(self);
        self.excuse_losses();
        agent.ask(Request::Stop { limit_ms: 1000 });
        at(self);
        let Reply::Responders { responders } = agent.ask(Request::Responders) else {
            panic!("responders are answered by responders");
        };
        at(self);
        agent.ask(Request::Settle { responders });
        at(self);
        agent.ask(Request::Release);
        at(self);
        agent.ask(Request::Rebuild { devices: vec![] });
        at(self);
        let Reply::Numbers { numbers } = agent.ask(Request::Publish) else {
            panic!("numbers are answered by numbers");
        };
        agent.ask(Request::Connect {
            numbers: vec![numbers],
        });
        at(self);
        // It may be meant for a request that the agent posts, which must not fail.
        device().refuse_after = None;
        agent.ask(Request::Resume);
        self.closed = false;
        at(self);
    }

    /// Answers that are on the way when a queue pair is stopped are lost, and datagrams that are may be.
    fn excuse_losses(&mut self) {
        let answers = device().unanswered();
        let unreliable = device().unreliable();
        for sends in &mut self.sends {
            for sent in &mut sends.outstanding {
                sends.excused |= answers.contains(&sent.token);
                sent.may_be_lost |= unreliable.contains(&sent.token);
            }
        }
    }

    /// Lets everything complete that can, and the rest come back flushed.
    fn finish(&mut self) {
        device().refuse_after = None;
        self.settle();
        for pair in 0..PAIRS {
            self.sends[pair].excused = true;
            self.set_state(pair, IBV_QPS_ERR);
        }
        self.poll(usize::MAX);
        for pair in 0..PAIRS {
            self.sends[pair].check_end();
            assert!(
                pair == WITH_SHARED || self.receives[pair].is_empty(),
                "receives of {pair} never completed: {:?}",
                self.receives[pair]
            );
        }
        for pair in [0, 2, DATAGRAM] {
            self.reset(pair);
        }
        self.empty_shared_queue();
        assert_eq!(device().violations, [""; 0]);
        let mut agent = Agent::begin(&self.runtime_dir);
        agent.ask(Request::Close { limit_ms: 1000 });
        let Reply::Drained { drained } = agent.ask(Request::Drain {
            limit_ms: 0,
            arrivals: true,
        }) else {
            panic!("drain is answered by a report");
        };
        agent.ask(Request::Resume);
        assert_eq!(
            (drained.outstanding_sends, drained.held_completions),
            (0, 0)
        );
        let mut device = device();
        device.executed.clear();
        device.inline.clear();
    }
}

/// Does something with the one application of this process.
pub fn with_application(restarted: bool, work: impl FnOnce(&mut Application)) {
    thread_local! {
        static APPLICATION: RefCell<Option<Application>> = const { RefCell::new(None) };
    }
    APPLICATION.with_borrow_mut(|application| {
        work(application.get_or_insert_with(|| Application::new(restarted)));
    });
}
