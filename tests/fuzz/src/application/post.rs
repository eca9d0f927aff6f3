//! Posting, and what the verbs must answer to it.

use rdma_core_sys::{
    IBV_SEND_INLINE, IBV_SEND_SIGNALED, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD,
    IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, ibv_recv_wr, ibv_send_wr, ibv_sge,
};
use reverbs::virt::{queue_pair, shared_receive_queue};

use super::{Application, DATAGRAM, DEPTH, ELEMENTS, INLINE, WITH_SHARED};
use crate::device::{LONGEST_DATAGRAM, device};
use crate::input::{Element, Key, Length, MOST_ELEMENTS, Receive, Send};
use crate::outcome::Sent;
use crate::requests::takes_inline;

const RECEIVE: u64 = 1 << 40;

fn name(queue: usize, number: u32) -> u64 {
    (queue as u64) << 32 | u64::from(number)
}

/// Whether a `wr_id` is that of a receive, and of which queue.
pub(super) fn queue_of(wr_id: u64) -> (bool, usize) {
    (wr_id & RECEIVE != 0, (wr_id >> 32) as usize & 0xff)
}

/// Why a request may be refused.
#[derive(Debug, Default, PartialEq, Eq)]
struct Reasons {
    /// Always: it does not even come into the log.
    at_once: Vec<i32>,
    /// By the device, when it is given the request.
    by_device: Vec<i32>,
}

impl Application {
    fn key(&self, key: Key) -> u32 {
        // SAFETY: the regions are there.
        unsafe {
            match key {
                Key::First => (*self.regions[0]).lkey,
                Key::Second => (*self.regions[1]).lkey,
                Key::Old => self.old_key,
                Key::Any(key) => key,
            }
        }
    }

    fn is_known(&self, key: u32) -> bool {
        [Key::First, Key::Second]
            .into_iter()
            .any(|known| self.key(known) == key)
    }

    fn elements(&self, elements: &[Element; MOST_ELEMENTS]) -> [ibv_sge; MOST_ELEMENTS] {
        elements.map(|element| ibv_sge {
            addr: self.memory.as_ptr().expose_provenance() as u64,
            length: element.length.bytes(),
            lkey: self.key(element.key),
        })
    }

    fn has_unknown_key(&self, elements: &[ibv_sge]) -> bool {
        elements
            .iter()
            .any(|element| element.length > 0 && !self.is_known(element.lkey))
    }

    fn reasons(&self, pair: usize, send: &Send, elements: &[ibv_sge]) -> Reasons {
        let mut reasons = Reasons::default();
        if send.opcode > IBV_WR_ATOMIC_FETCH_AND_ADD {
            reasons.at_once.push(libc::EOPNOTSUPP);
        }
        let Some(elements) = usize::try_from(send.count)
            .ok()
            .filter(|count| *count <= ELEMENTS as usize)
            .map(|count| &elements[..count])
        else {
            reasons.at_once.push(libc::EINVAL);
            return reasons;
        };
        let length = total(elements);
        let inline = send.flags & IBV_SEND_INLINE != 0;
        let is_send = [IBV_WR_SEND, IBV_WR_SEND_WITH_IMM].contains(&send.opcode);
        if inline && length > u64::from(INLINE)
            || length > 1 << 31
            || pair == DATAGRAM && !is_send
            || self.restarted && !inline && self.has_unknown_key(elements)
        {
            reasons.at_once.push(libc::EINVAL);
        }
        if inline && !takes_inline(send.opcode)
            || send.opcode >= IBV_WR_ATOMIC_CMP_AND_SWP && length < 8
            || pair == DATAGRAM && length > LONGEST_DATAGRAM
        {
            reasons.by_device.push(libc::EINVAL);
        }
        reasons
    }

    /// Posts a chain of sends.
    ///
    /// # Panics
    /// The answer is not what it must be.
    pub(super) fn send(&mut self, pair: usize, chain: &[Send]) {
        let pattern = self.next as u8;
        self.memory[..INLINE as usize].fill(pattern);
        let mut elements: Vec<_> = chain
            .iter()
            .map(|send| self.elements(&send.elements))
            .collect();
        let mut requests: Vec<ibv_send_wr> = Vec::with_capacity(chain.len());
        for (send, elements) in chain.iter().zip(&mut elements) {
            // SAFETY: zero is valid; what is set of the unions fits the opcode.
            unsafe {
                let mut request: ibv_send_wr = std::mem::zeroed();
                request.wr_id = name(pair, self.next);
                request.__bindgen_anon_1.imm_data = self.next;
                request.sg_list = elements.as_mut_ptr();
                request.num_sge = send.count;
                request.opcode = send.opcode;
                request.send_flags = send.flags;
                if pair == DATAGRAM && send.opcode & !1 == IBV_WR_SEND {
                    request.wr.ud.ah = self.handle;
                    request.wr.ud.remote_qpn = self.number(pair);
                } else if send.opcode >= IBV_WR_ATOMIC_CMP_AND_SWP {
                    request.wr.atomic.remote_addr = 8;
                    request.wr.atomic.rkey = self.key(send.remote_key);
                } else {
                    request.wr.rdma.remote_addr = 8;
                    request.wr.rdma.rkey = self.key(send.remote_key);
                }
                self.next += 1;
                requests.push(request);
            }
        }
        for index in 1..requests.len() {
            requests[index - 1].next = &raw mut requests[index];
        }
        let mut bad = std::ptr::null_mut();
        let can_be_refused = device().refuse_after.is_some();
        // SAFETY: the chain is valid, and so are its elements.
        let code =
            unsafe { queue_pair::post_send(self.pairs[pair], &raw mut requests[0], &raw mut bad) };
        // Inline bytes have been taken.
        self.memory[..INLINE as usize].fill(!pattern);
        let refused = match code {
            0 => requests.len(),
            _ => requests
                .iter_mut()
                .position(|request| std::ptr::eq(request, bad))
                .expect("bad_wr is one of the chain"),
        };
        for (index, (send, elements)) in chain.iter().zip(&elements).enumerate() {
            let reasons = self.reasons(pair, send, elements);
            let full = self.sends[pair].outstanding.len() >= DEPTH as usize;
            if index == refused {
                let expected = [reasons.at_once, reasons.by_device].concat();
                assert!(
                    expected.contains(&code) || code == libc::ENOMEM && (full || can_be_refused),
                    "{code} for {send:?}, not one of {expected:?}"
                );
                break;
            }
            assert_eq!(reasons.at_once, [0; 0], "accepted: {send:?}");
            assert!(
                self.closed || reasons.by_device.is_empty(),
                "accepted: {send:?}"
            );
            let count = send.count as usize;
            let inline = send.flags & IBV_SEND_INLINE != 0;
            let sent = Sent {
                wr_id: requests[index].wr_id,
                token: requests[index].wr_id as u32,
                signaled: send.flags & IBV_SEND_SIGNALED != 0,
                doomed: !reasons.by_device.is_empty()
                    || !inline && self.has_unknown_key(&elements[..count]),
                may_be_lost: false,
                inline: inline.then(|| vec![pattern; total(&elements[..count]) as usize]),
            };
            self.sends[pair].accept(sent);
        }
    }

    /// Posts a chain of receives.
    ///
    /// # Panics
    /// The answer is not what it must be.
    pub(super) fn receive(&mut self, queue: usize, chain: &[Receive]) {
        let mut elements: Vec<_> = chain
            .iter()
            .map(|receive| self.elements(&receive.elements))
            .collect();
        let mut requests: Vec<ibv_recv_wr> = Vec::with_capacity(chain.len());
        for (receive, elements) in chain.iter().zip(&mut elements) {
            requests.push(ibv_recv_wr {
                wr_id: RECEIVE | name(queue, self.next),
                next: std::ptr::null_mut(),
                sg_list: elements.as_mut_ptr(),
                num_sge: receive.count,
            });
            self.next += 1;
        }
        for index in 1..requests.len() {
            requests[index - 1].next = &raw mut requests[index];
        }
        let mut bad = std::ptr::null_mut();
        let first = &raw mut requests[0];
        // SAFETY: the chain is valid.
        let code = unsafe {
            match queue {
                WITH_SHARED => shared_receive_queue::post(self.shared, first, &raw mut bad),
                _ => queue_pair::post_receive(self.pairs[queue], first, &raw mut bad),
            }
        };
        let refused = match code {
            0 => requests.len(),
            _ => requests
                .iter_mut()
                .position(|request| std::ptr::eq(request, bad))
                .expect("bad_wr is one of the chain"),
        };
        for (index, (receive, elements)) in chain.iter().zip(&elements).enumerate() {
            let mut expected = Vec::new();
            match usize::try_from(receive.count) {
                Ok(count) if count <= ELEMENTS as usize => {
                    if self.restarted && self.has_unknown_key(&elements[..count]) {
                        expected.push(libc::EINVAL);
                    }
                }
                _ => expected.push(libc::EINVAL),
            }
            let full = self.receives[queue].len() >= DEPTH as usize;
            if full {
                expected.push(libc::ENOMEM);
            }
            if index == refused {
                assert!(
                    expected.contains(&code),
                    "{code} for {receive:?}, not one of {expected:?}"
                );
                break;
            }
            // A queue pair that has failed gives receives back at once: only the device knows how many it still has.
            if queue != WITH_SHARED && self.sends[queue].excused {
                expected.retain(|code| *code != libc::ENOMEM);
            }
            assert_eq!(expected, [0; 0], "accepted: {receive:?}");
            self.receives[queue].push_back(requests[index].wr_id);
        }
    }

    /// Everything that can complete does, and is polled.
    pub(super) fn settle(&mut self) {
        let empty = Receive {
            count: 0,
            elements: [Element {
                key: Key::First,
                length: Length::None,
            }; MOST_ELEMENTS],
        };
        loop {
            let before = self.outstanding();
            for queue in 0..=WITH_SHARED {
                if self.receives[queue].is_empty() {
                    self.receive(queue, std::slice::from_ref(&empty));
                }
            }
            device().settle();
            self.poll(usize::MAX);
            if self.outstanding() == before {
                return;
            }
        }
    }

    fn outstanding(&self) -> usize {
        self.sends.iter().map(|sends| sends.outstanding.len()).sum()
    }

    /// The shared queue cannot be reset, so messages take what is left in it.
    pub(super) fn empty_shared_queue(&mut self) {
        let message = Send {
            opcode: IBV_WR_SEND,
            flags: IBV_SEND_SIGNALED,
            count: 0,
            elements: [Element {
                key: Key::First,
                length: Length::None,
            }; MOST_ELEMENTS],
            remote_key: Key::First,
        };
        while !self.receives[WITH_SHARED].is_empty() {
            self.send(WITH_SHARED - 1, std::slice::from_ref(&message));
            device().settle();
            self.poll(usize::MAX);
        }
        assert!(self.sends[WITH_SHARED - 1].outstanding.is_empty());
    }
}

/// Bytes of all elements.
fn total(elements: &[ibv_sge]) -> u64 {
    elements.iter().map(|one| u64::from(one.length)).sum()
}

/// Two requests that nothing is wrong with.
pub(super) fn plain_chain() -> [Send; 2] {
    let element = Element {
        key: Key::First,
        length: Length::Few(64),
    };
    let send = |opcode, flags| Send {
        opcode,
        flags,
        count: 1,
        elements: [element; MOST_ELEMENTS],
        remote_key: Key::Second,
    };
    [send(IBV_WR_SEND, 0), send(IBV_WR_SEND, IBV_SEND_SIGNALED)]
}
