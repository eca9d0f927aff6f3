//! Packets that arrive, and answers to them.

use rdma_core_sys::{
    IBV_QPS_ERR, IBV_QPS_RTR, IBV_QPS_RTS, IBV_WC_COMP_SWAP, IBV_WC_FETCH_ADD, IBV_WC_GRH,
    IBV_WC_RDMA_READ, IBV_WC_RDMA_WRITE, IBV_WC_RECV, IBV_WC_RECV_RDMA_WITH_IMM, IBV_WC_SEND,
    IBV_WC_SUCCESS, IBV_WC_WITH_IMM, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD,
    IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM,
};
use reverbs_benches::null_device::GID;

use super::memory::{check, get, put, scatter};
use super::{Fabric, PSNS, Pair, Receive, Request, completion};

/// What a datagram has in front of it in the receive buffer (IBTA 11.4.1.1).
pub(crate) const GRH_BYTES: usize = 40;

impl Fabric {
    /// The next packet of `number` leaves and arrives at its peer, unless the wire `loses` it, which one that is not reliable does
    /// for good. `false` if nothing has moved: there is no packet, or the peer cannot take it yet.
    pub fn deliver(&mut self, number: u32, loses: bool) -> bool {
        let Some(mut pair) = self.pairs.remove(&number) else {
            return false;
        };
        let moved = match pair.is_reliable() {
            true => !loses && self.deliver_reliably(number, &mut pair),
            false => self.deliver_or_lose(number, &mut pair, loses),
        };
        self.pairs.insert(number, pair);
        moved
    }

    fn deliver_reliably(&mut self, number: u32, pair: &mut Pair) -> bool {
        let (peer_number, mtu) = (pair.peer, pair.mtu);
        let on_the_way = match pair.state {
            IBV_QPS_RTS => &mut pair.sends,
            IBV_QPS_ERR => &mut pair.strays,
            _ => return false,
        };
        let Some(request) = on_the_way.iter_mut().find(|request| !request.is_executed()) else {
            return false;
        };
        let Some(mut peer) = self.pairs.remove(&peer_number) else {
            return false;
        };
        let executed = is_ready(&peer)
            && peer.peer == number
            && {
                let psn = (request.first_psn + request.done) % PSNS;
                if (psn, mtu) == (peer.expected, peer.mtu) {
                    self.execute(number, request, (peer_number, &mut peer), mtu)
                } else {
                    self.violations.push(format!(
                    "queue pair {number} sends PSN {psn:#x} in packets of {mtu}, its peer {peer_number} expects {:#x} of {}",
                    peer.expected, peer.mtu
                ));
                    false
                }
            };
        self.pairs.insert(peer_number, peer);
        executed
    }

    /// Of a transport that does not acknowledge. A message is done when its last packet has left, and completes a moment later.
    fn deliver_or_lose(&mut self, number: u32, pair: &mut Pair, loses: bool) -> bool {
        if pair.state != IBV_QPS_RTS {
            return false;
        }
        let (datagram, mtu) = (pair.is_datagram(), pair.mtu);
        let Some(mut request) = pair.sends.pop_front() else {
            return false;
        };
        if request.is_executed() {
            self.complete_send(pair.send_completions, number, &request);
            return true;
        }
        let peer_number = match datagram {
            true => request.target.number,
            false => pair.peer,
        };
        request.damaged |= loses;
        let mut strange = false;
        if !request.damaged {
            let peer = self.pairs.remove(&peer_number);
            strange = !peer.as_ref().is_some_and(|peer| match datagram {
                true => !is_ready(peer) || peer.is_datagram() && peer.key == request.target.key,
                false => !is_ready(peer) || peer.peer == number && peer.mtu == mtu,
            });
            if let Some(mut peer) = peer {
                let takes = !strange
                    && is_ready(&peer)
                    && self.execute(number, &mut request, (peer_number, &mut peer), mtu);
                request.damaged = !takes;
                self.pairs.insert(peer_number, peer);
            }
        }
        if request.damaged {
            request.done += 1;
        }
        if strange {
            // Neither executed nor lost: a message that the wire has not touched went astray.
            request.done = request.packets;
        }
        if request.is_executed() && request.damaged && !strange {
            self.lose(&request);
        }
        pair.sends.push_front(request);
        true
    }

    pub(super) fn lose(&mut self, request: &Request) {
        *self.losses.entry(name(&request.bytes())).or_default() += 1;
    }

    /// One packet, by a responder that expects it. `false` if it has no receive for it.
    fn execute(
        &mut self,
        number: u32,
        request: &mut Request,
        (peer_number, peer): (u32, &mut Pair),
        mtu: u32,
    ) -> bool {
        let last = request.done + 1 == request.packets;
        let write_with_immediate = request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
        let takes_receive = request.is_send() || write_with_immediate && last;
        // RNR: no receive is posted.
        if takes_receive && !self.take_receive(peer) {
            return false;
        }
        let bytes = request.bytes();
        let (from, to) = match peer.is_datagram() {
            true => (0, bytes.len()),
            false => (
                (request.done * mtu) as usize,
                (request.done as usize + 1) * mtu as usize,
            ),
        };
        let part = bytes.get(from..bytes.len().min(to)).unwrap_or(&[]);
        let length = bytes.len() as u64;
        if request.is_send() {
            let into = peer.filling.as_ref().expect("taken above");
            let at = match peer.is_datagram() {
                true => {
                    scatter(&into.1, 0, &grh());
                    GRH_BYTES
                }
                false => from,
            };
            scatter(&into.1, at, part);
        } else {
            self.execute_remote(request, part, from, length);
        }
        let now = match request.opcode {
            IBV_WR_RDMA_READ => request.packets,
            _ => 1,
        };
        request.done += now;
        peer.expected = (peer.expected + now) % PSNS;
        if !request.is_executed() {
            return true;
        }
        if !request.has_response() {
            *self.executions.entry(name(&bytes)).or_default() += 1;
        }
        if takes_receive && let Some((wr_id, _)) = peer.filling.take() {
            let opcode = if request.is_send() {
                IBV_WC_RECV
            } else {
                IBV_WC_RECV_RDMA_WITH_IMM
            };
            let mut received = completion(wr_id, IBV_WC_SUCCESS, opcode, peer_number);
            received.byte_len = length as u32;
            if request.has_immediate() {
                received.wc_flags |= IBV_WC_WITH_IMM;
                received.__bindgen_anon_1.imm_data = request.immediate;
            }
            if peer.is_datagram() {
                received.byte_len += GRH_BYTES as u32;
                received.wc_flags |= IBV_WC_GRH;
                received.src_qp = number;
            }
            self.complete(peer.receive_completions, received);
        }
        true
    }

    /// The receive that is being filled, or the next.
    fn take_receive(&mut self, peer: &mut Pair) -> bool {
        if peer.filling.is_none() {
            let next = |queue: &mut std::collections::VecDeque<Receive>| queue.pop_front();
            peer.filling = match self.shared.get_mut(&peer.shared) {
                Some(shared) => next(shared),
                None => next(&mut peer.receives),
            };
        }
        peer.filling.is_some()
    }

    /// A packet of a WRITE, a READ or an atomic.
    fn execute_remote(&mut self, request: &mut Request, part: &[u8], from: usize, length: u64) {
        let target = request.target;
        if let Err(what) = check(&self.regions, target.rkey, target.remote, length) {
            self.violations.push(what);
            return;
        }
        match request.opcode {
            IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => {
                put(target.remote + from as u64, part);
            }
            IBV_WR_RDMA_READ => request.response = get(target.remote, length as usize),
            opcode => {
                request.response = get(target.remote, 8);
                let old = name(&request.response);
                let new = match opcode {
                    IBV_WR_ATOMIC_FETCH_AND_ADD => old.wrapping_add(target.compare_add),
                    _ if old == target.compare_add => target.swap,
                    _ => old,
                };
                put(target.remote, &new.to_ne_bytes());
            }
        }
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
        self.complete_send(queue, number, &request);
        true
    }

    fn complete_send(&mut self, queue: usize, number: u32, request: &Request) {
        if !request.signaled {
            return;
        }
        let opcode = match request.opcode {
            IBV_WR_RDMA_READ => IBV_WC_RDMA_READ,
            IBV_WR_ATOMIC_FETCH_AND_ADD => IBV_WC_FETCH_ADD,
            IBV_WR_ATOMIC_CMP_AND_SWP => IBV_WC_COMP_SWAP,
            IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => IBV_WC_RDMA_WRITE,
            _ => IBV_WC_SEND,
        };
        self.complete(
            queue,
            completion(request.wr_id, IBV_WC_SUCCESS, opcode, number),
        );
    }
}

fn is_ready(pair: &Pair) -> bool {
    [IBV_QPS_RTR, IBV_QPS_RTS].contains(&pair.state)
}

/// The number that each payload begins with.
fn name(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes[..8].try_into().expect("payloads have a number"))
}

/// From the one address there is to itself.
fn grh() -> [u8; GRH_BYTES] {
    let mut header = [0; GRH_BYTES];
    header[0] = 0x60;
    header[8..24].copy_from_slice(&GID);
    header[24..].copy_from_slice(&GID);
    header
}
