//! An application of two sides that knows what must have happened.
//!
//! Each end of a link posts numbered operations. What a request completes with, what arrives, in which order, and what memory must
//! hold follow from that. Every pointer comes from the verbs called here and is used by one thread: the SAFETY argument where no
//! other is given.

mod arena;
mod builders;
mod check;
mod link;
mod post;
mod queues;

use std::collections::BTreeSet;
use std::os::fd::IntoRawFd;

use rdma_core_sys::{ibv_context, ibv_pd};
use reverbs::device::Verbs;
use reverbs::virt::{context, protection_domain};
use reverbs_benches::null_device::NAME;

use self::check::Account;
use self::link::{Below, Link};
pub use self::link::{Plan, Transport};
pub use self::post::Wish;
use self::queues::{Queue, Shared};

/// Requests that a queue takes.
pub const DEPTH: u32 = 16;
/// Elements of a request, and bytes of an inline one, at most.
pub const ELEMENTS: u32 = 3;
pub const INLINE: u32 = 64;
/// Bytes of the longest message: three packets.
pub const LONGEST: u32 = 3000;
/// Unsignaled requests in a row.
const LONGEST_RUN: usize = 6;
/// Marks the `wr_id` of a receive.
const RECEIVE: u64 = 1 << 63;
/// Polls after which a device shows whatever there is.
pub const LONGEST_DELAY: u32 = 8;
/// Where WRITEs go, in turn.
const TARGETS: usize = 4;

/// What an end asks of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Send,
    SendWithImmediate,
    Write,
    WriteWithImmediate,
    /// Of the other's counter and what is behind it.
    Read,
    /// One more, to the other's counter.
    Add,
    /// The same, if it is what it must be.
    CompareAndSwap,
}

impl Kind {
    fn answers(self) -> bool {
        self.is_atomic() || self == Self::Read
    }

    fn is_atomic(self) -> bool {
        matches!(self, Self::Add | Self::CompareAndSwap)
    }

    fn has_immediate(self) -> bool {
        matches!(self, Self::SendWithImmediate | Self::WriteWithImmediate)
    }

    fn takes_receive(self) -> bool {
        self == Self::Send || self.has_immediate()
    }
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    /// What the payload begins with, and the `wr_id`.
    name: u64,
    number: u64,
    kind: Kind,
    signaled: bool,
    length: u32,
    /// What a READ or an atomic must bring back.
    counter: u64,
}

/// Where the completions of one end of each link go.
#[derive(Debug)]
struct Side {
    send_queue: Queue,
    receive_queue: Queue,
    shared: Shared,
}

/// The application.
#[derive(Debug)]
pub struct Program {
    context: *mut ibv_context,
    domain: *mut ibv_pd,
    sides: [Side; 2],
    links: Vec<Link>,
    /// Distinguishes the messages of this program from those of others.
    base: u64,
    serials: u64,
    /// Serials of links that were destroyed, and what became of their messages.
    gone: BTreeSet<u64>,
    closed_accounts: Vec<Account>,
}

impl Program {
    /// # Panics
    /// A verb fails.
    #[must_use]
    pub fn new(base: u64, plans: &[Plan], verbs: &'static Verbs) -> Self {
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        // SAFETY: see the top; zero is valid for a context.
        let mut program = unsafe {
            let app: &mut ibv_context = Box::leak(Box::new(std::mem::zeroed()));
            app.cmd_fd = null.into_raw_fd();
            let opened = context::open(app, NAME, verbs, |_, _| Ok(())).expect("open");
            app.async_fd = opened.async_fd;
            let domain = protection_domain::alloc(app).expect("alloc_pd");
            (*domain).context = app;
            let app = &raw mut *app;
            let extended = plans.first().is_some_and(|plan| plan.extended);
            Self {
                context: app,
                domain,
                sides: [(); 2].map(|()| Side {
                    send_queue: Queue::new(app, extended),
                    receive_queue: Queue::new(app, extended),
                    shared: Shared::new(domain),
                }),
                links: Vec::new(),
                base,
                serials: 0,
                gone: BTreeSet::new(),
                closed_accounts: Vec::new(),
            }
        };
        for plan in plans {
            let link = program.new_link(*plan);
            program.links.push(link);
        }
        program
    }

    fn new_link(&mut self, plan: Plan) -> Link {
        self.serials += 1;
        let domain = self.domain;
        let below = [0, 1].map(|side| {
            let side: &Side = &self.sides[side];
            Below {
                domain,
                send_queue: side.send_queue.object,
                receive_queue: side.receive_queue.object,
                shared: side.shared.object,
            }
        });
        // SAFETY: see the top.
        let mut link = unsafe { Link::new(plan, self.serials, below) };
        for (end, stage) in plan.stages.into_iter().enumerate() {
            (0..stage).for_each(|_| link.advance(end));
        }
        link
    }

    /// How many links there are.
    #[must_use]
    pub fn links(&self) -> usize {
        self.links.len()
    }

    /// The number by which an end's queue pair is known to the application.
    #[must_use]
    pub fn number(&self, link: usize, end: usize) -> u32 {
        self.links[link].number(end)
    }

    /// Posts a receive in so many elements, if the queue has room.
    ///
    /// # Panics
    /// It is refused.
    pub fn receive(&mut self, link: usize, end: usize, elements: u32) {
        let link = link % self.links.len();
        let Self { links, sides, .. } = self;
        let link = &mut links[link];
        if link.plan.shared {
            sides[end].shared.post(elements);
        } else if link.ends[end].stage > 0 {
            let end = &mut link.ends[end];
            // SAFETY: see the top.
            unsafe { end.receives.post(end.pair, elements) };
        }
    }

    /// Takes an end nearer to sending.
    pub fn advance(&mut self, link: usize, end: usize) {
        let link = link % self.links.len();
        self.links[link].advance(end);
    }

    /// Moves an end to the error state, unless it is there.
    pub fn fail(&mut self, link: usize, end: usize) {
        let link = link % self.links.len();
        let link = &mut self.links[link];
        if link.ends[end].stage > 0 && !link.ends[end].failed {
            link.fail(end);
        }
    }

    /// Destroys both ends and makes others, whose connection is as the first was. Who is polite waits for what is flushed first.
    pub fn recreate(&mut self, link: usize, polite: bool) {
        let link = link % self.links.len();
        // Receives of a shared queue that are being filled come back no other way.
        if polite || self.links[link].plan.shared {
            (0..2).for_each(|end| self.fail(link, end));
            self.poll_until_silent();
        }
        let old = &self.links[link];
        self.gone.insert(old.serial);
        self.closed_accounts.extend(old.closed_account());
        old.destroy();
        let plan = old.plan;
        self.links[link] = self.new_link(plan);
    }

    /// Asks for events where none is on its way, and polls, as programs do that are about to wait.
    pub fn arm(&mut self, side: usize) {
        let Side {
            send_queue,
            receive_queue,
            ..
        } = &mut self.sides[side];
        let armed = [send_queue.arm(), receive_queue.arm()];
        self.poll(side);
        let Side {
            send_queue,
            receive_queue,
            ..
        } = &mut self.sides[side];
        for (queue, _) in [send_queue, receive_queue]
            .into_iter()
            .zip(armed)
            .filter(|(_, armed)| *armed)
        {
            queue.has_polled_after_arming();
        }
    }

    /// Takes the events there are; waits for those that are `due`, as they must be while the gates are open.
    pub fn take_events(&mut self, side: usize, due: bool) {
        let side = &mut self.sides[side];
        for queue in [&mut side.send_queue, &mut side.receive_queue] {
            match due {
                true => queue.take_owed_event(),
                false => queue.take_event(),
            }
        }
    }

    /// What has become of an end: nothing is known of the other's answers from here on.
    pub fn break_down(&mut self, link: usize, end: usize) {
        self.links[link].ends[end].broken = true;
    }

    /// The program has moved this end to the error state.
    #[must_use]
    pub fn has_failed(&self, link: usize, end: usize) -> bool {
        self.links[link].ends[end].failed
    }

    /// One of the ends is in the error state.
    #[must_use]
    pub fn is_down(&self, link: usize) -> bool {
        self.links[link].is_down()
    }

    fn check_account(&self) {
        let open = self.links.iter().flat_map(Link::account);
        open.chain(self.closed_accounts.iter().copied())
            .for_each(|account| account.check());
    }
}

impl Drop for Program {
    /// Also after a failure, so that the next program finds nothing of this one.
    fn drop(&mut self) {
        self.links.iter().for_each(Link::destroy);
        for side in &self.sides {
            side.send_queue.destroy();
            side.receive_queue.destroy();
            side.shared.destroy();
        }
        // SAFETY: see the top; all that used them is gone.
        unsafe {
            protection_domain::dealloc(self.domain).expect("dealloc_pd");
            context::close(self.context).expect("close");
        }
    }
}
