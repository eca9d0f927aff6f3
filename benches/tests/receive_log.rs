//! The receive log against a model that is a list; completions come in any order, as those of a shared queue do.

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use rdma_core_sys::{ibv_recv_wr, ibv_sge};
use reverbs::errno::Errno;
use reverbs::log::{ReceiveRing, ReceiveSlot};

const CAPACITY: u32 = 8;
const MOST: usize = 2 * CAPACITY as usize;

fn log(ring: &mut ReceiveRing, wr_id: u64) -> Result<*mut ReceiveSlot, Errno> {
    let mut element = ibv_sge {
        addr: wr_id,
        length: 8,
        lkey: 7,
    };
    let wr = ibv_recv_wr {
        wr_id,
        next: std::ptr::null_mut(),
        sg_list: &raw mut element,
        num_sge: 1,
    };
    // SAFETY: the request is valid; the entry is the one logged.
    unsafe {
        let slot = ring.log(&raw const wr)?;
        ring.commit(slot);
        Ok(slot)
    }
}

fn posted(ring: &ReceiveRing) -> Vec<(u64, u64)> {
    let slots = ring.posted();
    // SAFETY: entries of the ring.
    let facts = slots
        .iter()
        .map(|slot| unsafe { ((**slot).head.app_wr_id, (**slot).elements()[0].addr) });
    facts.collect()
}

/// What a poll does for the completion of `slot`.
fn complete(slot: *mut ReceiveSlot) {
    // SAFETY: an entry of a ring that is there.
    unsafe {
        let head = &(*slot).head;
        (*head.retire).store(head.wr_id(), Ordering::Release);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Post,
    Refused,
    Complete(prop::sample::Index),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Post),
        1 => Just(Step::Refused),
        6 => any::<prop::sample::Index>().prop_map(Step::Complete),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #[test]
    fn agrees_with_a_list(steps in prop::collection::vec(step(), 1..400)) {
        let mut ring = ReceiveRing::new(CAPACITY, 2, std::ptr::null_mut()).unwrap();
        let mut model: Vec<(u64, *mut ReceiveSlot)> = Vec::new();
        for (wr_id, step) in (1_u64..).zip(steps) {
            match step {
                Step::Post => match log(&mut ring, wr_id) {
                    Ok(slot) => model.push((wr_id, slot)),
                    Err(error) => {
                        prop_assert_eq!(error, Errno::NO_MEMORY);
                        prop_assert_eq!(model.len(), MOST);
                    }
                },
                Step::Refused => {
                    if let Ok(slot) = log(&mut ring, wr_id) {
                        // SAFETY: an entry of the ring, which nobody else has.
                        unsafe { ring.undo(slot) };
                    }
                }
                Step::Complete(index) => {
                    if !model.is_empty() {
                        let (_, slot) = model.remove(index.index(model.len()));
                        complete(slot);
                    }
                }
                Step::Reset => {
                    ring.forget_all();
                    model.clear();
                }
            }
            let expected: Vec<_> = model.iter().map(|(wr_id, _)| (*wr_id, *wr_id)).collect();
            prop_assert_eq!(posted(&ring), expected);
        }
    }
}
