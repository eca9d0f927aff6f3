//! Completion queues, their events, and receives: what the queue pairs of one side share.

use std::collections::VecDeque;
use std::os::fd::IntoRawFd;

use rdma_core_sys::{
    ibv_comp_channel, ibv_context, ibv_cq, ibv_cq_ex, ibv_cq_init_attr_ex, ibv_pd,
    ibv_poll_cq_attr, ibv_qp, ibv_recv_wr, ibv_srq, ibv_srq_attr, ibv_srq_init_attr, ibv_wc,
};
use reverbs::virt::{completion_queue, queue_pair, shared_receive_queue};

use super::arena::{Arena, SLOT, SLOTS};
use super::{DEPTH, RECEIVE};

/// How long an event may take that has to come, in milliseconds. It is waited for only when it is due.
const PATIENCE: i32 = 5000;

/// A completion queue and its channel.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) object: *mut ibv_cq,
    channel: Box<ibv_comp_channel>,
    /// An event was asked for and has not come.
    armed: bool,
    /// And a completion has, since.
    owed: bool,
    /// Completions are looked at one by one; whether that has begun.
    extended: bool,
    polling: bool,
}

impl Queue {
    /// # Safety
    /// `app` must be open.
    pub(super) unsafe fn new(app: *mut ibv_context, extended: bool) -> Self {
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        let mut channel = Box::new(ibv_comp_channel {
            context: app,
            fd: null.into_raw_fd(),
            refcnt: 0,
        });
        // SAFETY: as the caller vouches.
        unsafe {
            let object = match extended {
                true => {
                    let mut attr: ibv_cq_init_attr_ex = std::mem::zeroed();
                    (attr.cqe, attr.channel) = (256, &raw mut *channel);
                    completion_queue::create_extended(app, &attr).map(|made| made.cast())
                }
                false => completion_queue::create(app, 256, &raw mut *channel, 0),
            };
            let object = object.expect("cq");
            (*object).context = app;
            Self {
                object,
                channel,
                armed: false,
                owed: false,
                extended,
                polling: false,
            }
        }
    }

    pub(super) fn poll(&mut self) -> Option<ibv_wc> {
        // SAFETY: the queue is there; zero is a valid completion.
        let (got, completion) = unsafe {
            let mut completion: ibv_wc = std::mem::zeroed();
            let got = match self.extended {
                true => self.advance(&mut completion),
                false => completion_queue::poll(self.object, 1, &raw mut completion),
            };
            (got, completion)
        };
        self.owed |= got > 0 && self.armed;
        match got {
            0 => None,
            1 => Some(completion),
            code => panic!("poll: {code}"),
        }
    }

    /// As a poll of one.
    unsafe fn advance(&mut self, completion: &mut ibv_wc) -> i32 {
        let queue: *mut ibv_cq_ex = self.object.cast();
        let attr = ibv_poll_cq_attr { comp_mask: 0 };
        // SAFETY: the queue is there, and is one that is looked at so.
        unsafe {
            let code = match self.polling {
                true => completion_queue::next_poll(queue),
                false => completion_queue::start_poll(queue, &raw const attr),
            };
            if code == libc::ENOENT {
                if std::mem::take(&mut self.polling) {
                    completion_queue::end_poll(queue);
                }
                return 0;
            }
            assert_eq!(code, 0, "start or next");
            self.polling = true;
            *completion = *completion_queue::current(queue);
            let shown = ((*queue).wr_id, (*queue).status);
            assert_eq!(shown, (completion.wr_id, completion.status));
        }
        1
    }

    /// Asks for an event. What is found by polling right afterwards may have come before.
    pub(super) fn arm(&mut self) -> bool {
        if self.armed {
            return false;
        }
        // SAFETY: the queue is there.
        let code = unsafe { completion_queue::request_notification(self.object, 0) };
        assert_eq!(code, 0, "request_notification");
        self.armed = true;
        true
    }

    pub(super) fn has_polled_after_arming(&mut self) {
        self.owed = false;
    }

    /// Takes an event if there is one.
    pub(super) fn take_event(&mut self) {
        self.wait_for_event(0);
    }

    /// A completion that came after an event was asked for must bring it.
    pub(super) fn take_owed_event(&mut self) {
        if self.owed {
            assert!(self.wait_for_event(PATIENCE), "an event is missing");
        }
    }

    fn wait_for_event(&mut self, milliseconds: i32) -> bool {
        let mut file = libc::pollfd {
            fd: self.channel.fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut event = 0_usize;
        // SAFETY: one file; an event is the address of the queue.
        unsafe {
            if libc::poll(&raw mut file, 1, milliseconds) != 1 {
                return false;
            }
            let got = libc::read(file.fd, (&raw mut event).cast(), size_of::<usize>());
            assert_eq!(got as usize, size_of::<usize>(), "half an event");
            assert_eq!(event, self.object.addr(), "an event of another queue");
            assert!(self.armed, "an event that nobody has asked for");
            (self.armed, self.owed) = (false, false);
            // What ibv_ack_cq_events does.
            (*self.object).comp_events_completed += 1;
        }
        true
    }

    pub(super) fn destroy(&self) {
        // SAFETY: no queue pair uses it any more; the channel's number is ours.
        unsafe {
            completion_queue::destroy(self.object).expect("destroy_cq");
            libc::close(self.channel.fd);
        }
    }
}

/// Where receives are posted, in turn.
#[derive(Debug)]
pub(super) struct Receives {
    pub(super) arena: Arena,
    /// Slots that are posted, in order.
    pub(super) posted: VecDeque<usize>,
    tag: u64,
    next: usize,
}

impl Receives {
    /// # Safety
    /// `domain` must come from the virtual device.
    pub(super) unsafe fn new(domain: *mut ibv_pd, serial: u64) -> Self {
        Self {
            // SAFETY: as the caller vouches.
            arena: unsafe { Arena::new(domain, SLOTS * SLOT) },
            posted: VecDeque::new(),
            tag: RECEIVE | serial << 32,
            next: 0,
        }
    }

    /// Posts another by `post`, in so many elements, if the queue has room.
    fn post_another(&mut self, elements: u32, post: impl FnOnce(&mut ibv_recv_wr) -> i32) {
        if self.posted.len() >= DEPTH as usize {
            return;
        }
        let slot = self.next % SLOTS;
        self.next += 1;
        let mut elements = self.arena.elements(slot * SLOT, SLOT as u32, elements);
        // The first holds less than what a datagram has in front of it.
        if let [first, second] = &mut elements[..] {
            let moved = first.length - 24;
            first.length -= moved;
            second.addr -= u64::from(moved);
            second.length += moved;
        }
        let mut request = ibv_recv_wr {
            wr_id: self.tag | slot as u64,
            next: std::ptr::null_mut(),
            sg_list: elements.as_mut_ptr(),
            num_sge: elements.len() as i32,
        };
        assert_eq!(post(&mut request), 0, "post of a receive");
        self.posted.push_back(slot);
    }

    /// # Safety
    /// The queue pair must be there.
    pub(super) unsafe fn post(&mut self, pair: *mut ibv_qp, elements: u32) {
        let mut bad = std::ptr::null_mut();
        self.post_another(elements, |request| {
            // SAFETY: as the caller vouches.
            unsafe { queue_pair::post_receive(pair, request, &raw mut bad) }
        });
    }

    /// The slot of a `wr_id`, which must be posted.
    pub(super) fn take(&mut self, wr_id: u64) -> usize {
        let slot = (wr_id & 0xffff_ffff) as usize;
        assert_eq!(wr_id, self.tag | slot as u64, "a receive of another queue");
        let place = self.posted.iter().position(|posted| *posted == slot);
        self.posted.remove(place.expect("it is posted"));
        slot
    }
}

/// A shared receive queue.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) object: *mut ibv_srq,
    pub(super) receives: Receives,
}

impl Shared {
    /// The serial that no queue pair has.
    pub(super) const SERIAL: u64 = 0xffff;

    /// # Safety
    /// `domain` must come from the virtual device.
    pub(super) unsafe fn new(domain: *mut ibv_pd) -> Self {
        let mut init = ibv_srq_init_attr {
            srq_context: std::ptr::null_mut(),
            attr: ibv_srq_attr {
                max_wr: DEPTH,
                max_sge: 2,
                srq_limit: 0,
            },
        };
        // SAFETY: as the caller vouches.
        unsafe {
            Self {
                object: shared_receive_queue::create(domain, &raw mut init).expect("create_srq"),
                receives: Receives::new(domain, Self::SERIAL),
            }
        }
    }

    pub(super) fn post(&mut self, elements: u32) {
        let (object, mut bad) = (self.object, std::ptr::null_mut());
        self.receives.post_another(elements, |request| {
            // SAFETY: the queue is there.
            unsafe { shared_receive_queue::post(object, request, &raw mut bad) }
        });
    }

    pub(super) fn destroy(&self) {
        // SAFETY: no queue pair uses it any more.
        unsafe { shared_receive_queue::destroy(self.object).expect("destroy_srq") };
        self.receives.arena.deregister();
    }
}
