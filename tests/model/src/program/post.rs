//! Posting sends: chains, inline bytes, several elements, and what must be refused.

use rdma_core_sys::{
    IBV_SEND_INLINE, IBV_SEND_SIGNALED, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD,
    IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND,
    IBV_WR_SEND_WITH_IMM, ibv_send_wr, ibv_sge,
};
use reverbs::virt::queue_pair;

use super::arena::{SLOT, SLOTS};
use super::builders;
use super::link::{COUNTER, OUT, RESULT, TARGET, Transport};
use super::{DEPTH, ELEMENTS, INLINE, Kind, LONGEST, LONGEST_RUN, Operation, Program, TARGETS};

/// The most that one datagram can carry: a packet.
const LONGEST_DATAGRAM: u32 = 1024;

/// A request as the test wants it; what the transport does not have becomes a SEND.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    pub kind: Kind,
    pub length: u32,
    pub signaled: bool,
    pub inline: bool,
    pub elements: u32,
}

impl Wish {
    fn fit(self, transport: Transport, signal_all: bool) -> Self {
        let kind = match (transport, self.kind) {
            (Transport::Datagram, Kind::WriteWithImmediate) => Kind::SendWithImmediate,
            (Transport::Datagram, Kind::Write) => Kind::Send,
            (Transport::Unreliable | Transport::Datagram, kind) if kind.answers() => Kind::Send,
            (_, kind) => kind,
        };
        let longest = match transport {
            Transport::Datagram => LONGEST_DATAGRAM,
            _ => LONGEST,
        };
        let inline = self.inline && !kind.answers();
        Self {
            kind,
            length: match kind {
                Kind::Add | Kind::CompareAndSwap => 8,
                _ if inline => self.length.clamp(8, INLINE),
                _ => self.length.clamp(8, longest),
            },
            signaled: self.signaled || signal_all,
            inline,
            elements: match kind {
                Kind::Add | Kind::CompareAndSwap => 1,
                _ => self.elements.clamp(1, ELEMENTS),
            },
        }
    }
}

/// A message's content.
pub(super) fn content(name: u64, length: u32) -> Vec<u8> {
    let mut bytes = name.to_ne_bytes().to_vec();
    bytes.extend((8..u64::from(length)).map(|index| (name.wrapping_mul(31) + index * 7) as u8));
    bytes.truncate(length as usize);
    bytes
}

impl Program {
    /// Posts a chain as far as the queue has room; `spoiled` is the place of a request in it that must be refused.
    ///
    /// # Panics
    /// Something is refused for another reason, or another request is named.
    pub fn post(&mut self, link: usize, end: usize, wishes: &[Wish], spoiled: Option<usize>) {
        let link = link % self.links.len();
        if self.links[link].ends[end].stage < 3 {
            return;
        }
        let room = DEPTH as usize - self.links[link].ends[end].posted.len();
        let count = wishes.len().min(room);
        let mut chain: Vec<(Operation, _)> = Vec::with_capacity(count);
        for (index, wish) in wishes[..count].iter().enumerate() {
            let ahead = chain.iter().filter(|(before, _)| before.kind.is_atomic());
            let ahead = ahead.count() as u64;
            let operation = self.prepare(link, end, *wish, index, ahead);
            chain.push((operation, self.request(link, end, &operation, *wish)));
        }
        if chain.is_empty() {
            return;
        }
        let spoiled = spoiled.filter(|at| *at < count);
        let mut requests: Vec<ibv_send_wr> = chain.iter().map(|(_, (wr, _))| *wr).collect();
        for (index, (_, (_, elements))) in chain.iter_mut().enumerate() {
            requests[index].sg_list = elements.as_mut_ptr();
            requests[index].num_sge = elements.len() as i32;
            if spoiled == Some(index) {
                // More than a queue takes, inline or not.
                elements.resize(ELEMENTS as usize + 1, elements[0]);
                elements[0].length += INLINE;
                requests[index].sg_list = elements.as_mut_ptr();
                requests[index].num_sge = elements.len() as i32;
            }
        }
        for index in 1..count {
            requests[index - 1].next = &raw mut requests[index];
        }
        let mut bad = std::ptr::null_mut();
        let pair = self.links[link].ends[end].pair;
        // SAFETY: see the top of the module; the chain lives until the post returns.
        let code = unsafe {
            match self.links[link].plan.extended {
                true => builders::post(pair, &requests),
                false => queue_pair::post_send(pair, &raw mut requests[0], &raw mut bad),
            }
        };
        let first_bad = requests
            .iter()
            .position(|request| std::ptr::eq(request, bad));
        let taken = match (code, spoiled) {
            (0, None) => count,
            // All of a batch or nothing.
            (libc::ENOMEM, _) | (libc::EINVAL, Some(_)) if self.links[link].plan.extended => 0,
            (libc::ENOMEM, _) if first_bad <= spoiled.or(Some(count)) => {
                first_bad.expect("it says which")
            }
            (libc::EINVAL, Some(at)) if first_bad == Some(at) => at,
            _ => panic!("post: {code}, bad {first_bad:?}, spoiled {spoiled:?}"),
        };
        for (operation, _) in &chain[..taken] {
            self.note(link, end, operation);
        }
        // Inline bytes are not looked at after the post.
        for (operation, (wr, _)) in &chain {
            if wr.send_flags & IBV_SEND_INLINE != 0 {
                let at = OUT + operation.slot() * SLOT;
                let junk = vec![0xee; operation.length as usize];
                self.links[link].ends[end].arena.fill(at, &junk);
            }
        }
    }

    /// What it will be as the `index`th of a chain, behind so many atomics.
    fn prepare(
        &self,
        link: usize,
        end: usize,
        wish: Wish,
        index: usize,
        atomics: u64,
    ) -> Operation {
        let Self { links, base, .. } = self;
        let (link, this) = (&links[link], &links[link].ends[end]);
        let wish = wish.fit(link.plan.transport, link.plan.signal_all);
        // A queue of nothing but unsignaled requests would never be seen to have room again.
        let unsignaled = this.posted.iter().rev().take_while(|last| !last.signaled);
        let signaled = wish.signaled || unsignaled.count() + index >= LONGEST_RUN;
        let number = this.next + index as u64;
        Operation {
            name: base + (link.serial << 24) + ((end as u64) << 23) + number,
            number,
            kind: wish.kind,
            signaled,
            length: wish.length,
            counter: this.counter + atomics,
        }
    }

    /// The request, and its elements, of what [`Self::prepare`] says.
    fn request(
        &mut self,
        link: usize,
        end: usize,
        operation: &Operation,
        wish: Wish,
    ) -> (ibv_send_wr, Vec<ibv_sge>) {
        let link = &mut self.links[link];
        let wish = wish.fit(link.plan.transport, link.plan.signal_all);
        let (peer, handle, number) = (&link.ends[1 - end].arena, link.handle, link.number(1 - end));
        let target = peer.address(TARGET) + (operation.target() * SLOT) as u64;
        let (counter, rkey) = (peer.address(COUNTER), peer.remote_key());
        let datagram = link.plan.transport == Transport::Datagram;
        let this = &mut link.ends[end];
        let at = match operation.kind.answers() {
            true => RESULT + operation.slot() * SLOT,
            false => {
                let at = OUT + operation.slot() * SLOT;
                let bytes = content(operation.name, operation.length);
                this.arena.fill(at, &bytes);
                at
            }
        };
        // SAFETY: zero is a valid request.
        let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = operation.name;
        request.send_flags = match operation.signaled && !link.plan.signal_all {
            true => IBV_SEND_SIGNALED,
            false => 0,
        };
        if wish.inline {
            request.send_flags |= IBV_SEND_INLINE;
        }
        request.__bindgen_anon_1.imm_data = operation.immediate();
        request.opcode = match operation.kind {
            Kind::Send => IBV_WR_SEND,
            Kind::SendWithImmediate => IBV_WR_SEND_WITH_IMM,
            Kind::Write => IBV_WR_RDMA_WRITE,
            Kind::WriteWithImmediate => IBV_WR_RDMA_WRITE_WITH_IMM,
            Kind::Read => IBV_WR_RDMA_READ,
            Kind::Add => IBV_WR_ATOMIC_FETCH_AND_ADD,
            Kind::CompareAndSwap => IBV_WR_ATOMIC_CMP_AND_SWP,
        };
        match operation.kind {
            _ if datagram => {
                request.wr.ud.ah = handle;
                request.wr.ud.remote_qpn = number;
                request.wr.ud.remote_qkey = super::link::QKEY;
            }
            Kind::Send | Kind::SendWithImmediate => {}
            Kind::Write | Kind::WriteWithImmediate | Kind::Read => {
                request.wr.rdma.remote_addr = match operation.kind {
                    Kind::Read => counter,
                    _ => target,
                };
                request.wr.rdma.rkey = rkey;
            }
            Kind::Add => {
                request.wr.atomic.remote_addr = counter;
                request.wr.atomic.compare_add = 1;
                request.wr.atomic.rkey = rkey;
            }
            // The comparison holds if all before it was executed, once.
            Kind::CompareAndSwap => {
                request.wr.atomic.remote_addr = counter;
                request.wr.atomic.compare_add = operation.counter;
                request.wr.atomic.swap = operation.counter + 1;
                request.wr.atomic.rkey = rkey;
            }
        }
        (
            request,
            this.arena.elements(at, operation.length, wish.elements),
        )
    }

    /// The request was taken.
    fn note(&mut self, link: usize, end: usize, operation: &Operation) {
        let ends = &mut self.links[link].ends;
        let this = &mut ends[end];
        this.next += 1;
        this.posted.push_back(*operation);
        match operation.kind {
            Kind::Add | Kind::CompareAndSwap => this.counter += 1,
            Kind::Read => {}
            _ => this.names.push(operation.name),
        }
        if let Kind::Write | Kind::WriteWithImmediate = operation.kind {
            this.written[operation.target()] = Some(*operation);
        }
        if operation.kind.takes_receive() {
            ends[1 - end].due.push_back(*operation);
        }
    }
}

impl Operation {
    fn slot(&self) -> usize {
        self.number as usize % SLOTS
    }

    pub(super) fn target(&self) -> usize {
        self.number as usize % TARGETS
    }

    pub(super) fn result(&self) -> usize {
        RESULT + self.slot() * SLOT
    }

    pub(super) fn immediate(&self) -> u32 {
        (self.number as u32).to_be()
    }
}
