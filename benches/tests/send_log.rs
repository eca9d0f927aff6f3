//! The send log against a model that is a list.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use rdma_core_sys::{
    IBV_SEND_INLINE, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_SEND, ibv_send_wr, ibv_sge,
};
use reverbs::errno::Errno;
use reverbs::handle::Psn;
use reverbs::log::{SendRing, SendSlot};

const CAPACITY: u32 = 8;
const MTU: u32 = 1024;
/// The ring has twice the capacity, less the entry that tells full from empty.
const MOST: usize = 2 * CAPACITY as usize - 1;

fn ring() -> SendRing {
    let mut ring = SendRing::new(CAPACITY, 2, 64, std::ptr::null_mut()).unwrap();
    ring.start(Psn(0), MTU);
    ring
}

fn request(wr_id: u64, elements: &mut [ibv_sge]) -> ibv_send_wr {
    // SAFETY: zero is a valid request.
    let mut wr: ibv_send_wr = unsafe { std::mem::zeroed() };
    wr.wr_id = wr_id;
    wr.sg_list = elements.as_mut_ptr();
    wr.num_sge = elements.len() as i32;
    wr.opcode = IBV_WR_SEND;
    wr
}

fn element(length: u32) -> ibv_sge {
    ibv_sge {
        addr: 0x1000,
        length,
        lkey: 7,
    }
}

/// Logs as the hot path does where it can, else as the general one.
fn log(ring: &mut SendRing, wr_id: u64, length: u32) -> Result<*mut SendSlot, Errno> {
    let mut elements = [element(length)];
    let wr = request(wr_id, &mut elements);
    if ring.is_at_limit() {
        ring.make_room()?;
    }
    // SAFETY: the request is valid and there is room.
    unsafe {
        let slot = if ring.takes_plain(&wr) && wr_id.is_multiple_of(2) {
            let packets = if ring.is_one_packet(length) {
                1
            } else {
                ring.packets(wr.opcode, length)
            };
            ring.log_one(&raw const wr, wr.sg_list, packets)
        } else {
            ring.log(&raw const wr)?
        };
        ring.commit(slot);
        Ok(slot)
    }
}

fn outstanding(ring: &SendRing) -> Vec<u64> {
    // SAFETY: entries of the ring.
    ring.outstanding()
        .map(|slot| unsafe { (*slot).head.app_wr_id })
        .collect()
}

/// What a poll does for the completion of `slot`.
fn complete(slot: *mut SendSlot) {
    // SAFETY: an entry of a ring that is there.
    unsafe {
        let head = &(*slot).head;
        (*head.retire).store(head.wr_id(), Ordering::Release);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Post(u32),
    /// A post that the device refuses.
    Refused(u32),
    /// The completion of one of those outstanding, which retires those before it.
    Complete(prop::sample::Index),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0_u32..4 * MTU).prop_map(Step::Post),
        2 => (0_u32..4 * MTU).prop_map(Step::Refused),
        5 => any::<prop::sample::Index>().prop_map(Step::Complete),
        1 => Just(Step::Reset),
    ]
}

fn packets(length: u32) -> u32 {
    length.div_ceil(MTU).max(1)
}

proptest! {
    #[test]
    fn agrees_with_a_list(steps in prop::collection::vec(step(), 1..400)) {
        let mut ring = ring();
        let mut model: VecDeque<(u64, *mut SendSlot, u32)> = VecDeque::new();
        let mut psn = 0_u32;
        for (wr_id, step) in (1_u64..).zip(steps) {
            match step {
                Step::Post(length) => match log(&mut ring, wr_id, length) {
                    Ok(slot) => {
                        psn += packets(length);
                        model.push_back((wr_id, slot, psn));
                    }
                    Err(error) => {
                        prop_assert_eq!(error, Errno::NO_MEMORY);
                        prop_assert_eq!(model.len(), MOST);
                    }
                },
                Step::Refused(length) => {
                    if log(&mut ring, wr_id, length).is_ok() {
                        // SAFETY: the entry was committed just now.
                        unsafe { ring.undo_last() };
                    }
                }
                Step::Complete(index) => {
                    if !model.is_empty() {
                        let done = index.index(model.len());
                        complete(model[done].1);
                        model.drain(..=done);
                    }
                }
                Step::Reset => {
                    ring.forget_all();
                    model.clear();
                }
            }
            let expected: Vec<_> = model.iter().map(|(wr_id, ..)| *wr_id).collect();
            prop_assert_eq!(outstanding(&ring), expected);
            prop_assert_eq!(ring.raw_psn(), psn);
            for (_, slot, after) in &model {
                // SAFETY: entries of the ring.
                prop_assert_eq!(unsafe { (**slot).psn_after }, *after);
            }
        }
    }
}

#[test]
fn a_full_ring_refuses_and_takes_again_after_a_completion() {
    let mut ring = ring();
    let slots: Vec<_> = (0..MOST as u64)
        .map(|id| log(&mut ring, id, 8).unwrap())
        .collect();
    assert_eq!(log(&mut ring, 99, 8), Err(Errno::NO_MEMORY));
    complete(slots[2]);
    assert!(log(&mut ring, 100, 8).is_ok());
    assert_eq!(outstanding(&ring).len(), MOST - 2);
}

#[test]
fn inline_bytes_are_kept() {
    let mut ring = ring();
    let mut bytes = [1_u8, 2, 3, 4, 5, 6];
    let address = bytes.as_ptr().expose_provenance() as u64;
    let mut elements = [
        ibv_sge {
            addr: address,
            length: 2,
            lkey: 0,
        },
        ibv_sge {
            addr: address + 2,
            length: 4,
            lkey: 0,
        },
    ];
    let mut wr = request(1, &mut elements);
    wr.send_flags = IBV_SEND_INLINE;
    // SAFETY: the request is valid and the ring empty.
    unsafe {
        let slot = ring.log(&raw const wr).unwrap();
        bytes.fill(0);
        let kept = *(*slot).wr.sg_list;
        assert_eq!(((*slot).wr.num_sge, kept.length), (1, 6));
        let kept = std::ptr::with_exposed_provenance::<[u8; 6]>(kept.addr as usize);
        assert_eq!(*kept, [1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn too_many_elements_or_inline_bytes_are_refused() {
    let mut ring = ring();
    let mut elements = [element(1); 3];
    let wr = request(1, &mut elements);
    // SAFETY: the requests are valid and the ring empty; what is refused is not read.
    unsafe {
        assert!(
            ring.log(&raw const wr)
                .is_err_and(|error| error == Errno::INVALID)
        )
    };
    let mut elements = [element(65)];
    let mut wr = request(1, &mut elements);
    wr.send_flags = IBV_SEND_INLINE;
    // SAFETY: as above.
    unsafe {
        assert!(
            ring.log(&raw const wr)
                .is_err_and(|error| error == Errno::INVALID)
        )
    };
}

#[test]
fn packets_are_counted_at_the_edges() {
    let ring = ring();
    for (length, expected) in [(0, 1), (1, 1), (MTU, 1), (MTU + 1, 2), (1 << 31, 1 << 21)] {
        assert_eq!(
            ring.packets(IBV_WR_SEND, length),
            expected,
            "{length} bytes"
        );
        assert_eq!(
            ring.packets(IBV_WR_ATOMIC_FETCH_AND_ADD, length),
            1,
            "{length} bytes"
        );
        assert_eq!(ring.is_one_packet(length), expected == 1, "{length} bytes");
    }
}
