//! Which rdma-core release the process runs, and how its private ABI is laid out.
//!
//! libibverbs promises its providers nothing across releases: the structures of `libibverbs/driver.h` may change whenever
//! the number in `-rdmavNN.so` does, and what a provider sees of the public structures changed more often than that
//! number. So one binary carries a table by release, [`detect`] finds out at run time which row applies, and a release
//! that is not in the table, or evidence that contradicts itself, is refused. `docs/private-abi.md` argues why that is
//! enough; `check-against-sources.sh` derives every number here from the sources of each release.

mod detect;
mod layout;
mod slots;

pub use detect::{Detected, Refusal, detect, detect_in};
pub use layout::{
    ListNode, MATCH_DRIVER_ID, MATCH_SENTINEL, VerbsDevice, VerbsDeviceOps, VerbsMatchEntry,
    VerbsMr, VerbsSysfsDevice,
};

use slots::{SLOTS_36, SLOTS_59, SLOTS_62, SLOTS_64, SLOTS_65};
use std::ffi::c_void;
use std::mem::size_of;

/// The private ABI of a run of rdma-core releases. All sizes and offsets are in bytes, for 64-bit targets.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    /// The first release of the run (the major number of the package version; minor releases never moved anything).
    pub first: u16,
    /// The last release of the run, inclusive.
    pub last: u16,
    /// NN of `-rdmavNN.so`, `verbs_register_driver_NN` and `IBVERBS_PRIVATE_NN`.
    pub suffix: u16,
    /// N of the newest public symbol version, `IBVERBS_1.N`, which is also in the library's file name.
    pub public_minor: u16,
    /// The members of `struct verbs_context_ops`, in order: nothing but function pointers.
    pub slots: &'static [&'static str],
    /// Size of `struct verbs_context`; `struct ibv_context` is its last member.
    pub verbs_context_size: usize,
    /// Size of `struct verbs_qp`.
    pub verbs_qp_size: usize,
    /// Offset of `comp_mask` in `struct verbs_qp`, behind the union of `ibv_qp` and `ibv_qp_ex`.
    pub verbs_qp_comp_mask_offset: usize,
    /// Offset of `xrcd` in `struct verbs_qp`.
    pub verbs_qp_xrcd_offset: usize,
    /// Size of `struct ibv_port_attr` (it grew in 49; see `__lib_query_port`).
    pub port_attr_size: usize,
}

impl Layout {
    /// Offset of `struct ibv_context` in `struct verbs_context`.
    pub const fn context_offset(&self) -> usize {
        self.verbs_context_size - size_of::<rdma_core_sys::ibv_context>()
    }

    /// The index of an operation in `struct verbs_context_ops`; `None` if this release does not have it.
    pub fn slot(&self, name: &str) -> Option<usize> {
        self.slots.binary_search(&name).ok()
    }

    /// A `struct verbs_context_ops` of this release with the named operations filled in and all others empty, which
    /// libibverbs answers with EOPNOTSUPP. Operations that this release does not have are left out.
    pub fn operations(&self, named: &[(&str, *const c_void)]) -> Box<[*const c_void]> {
        let mut table = vec![std::ptr::null(); self.slots.len()].into_boxed_slice();
        for &(name, function) in named {
            if let Some(index) = self.slot(name) {
                table[index] = function;
            }
        }
        table
    }
}

/// Every run of releases with one layout, oldest first, without gaps.
pub static LAYOUTS: [Layout; 9] = [
    Layout {
        first: 36,
        last: 43,
        ..BASE
    },
    // ibv_qp_ex: +wr_atomic_write.
    Layout {
        first: 44,
        last: 44,
        ..with_qp_ex_pointers(BASE, 1)
    },
    // ibv_qp_ex: +wr_flush.
    Layout {
        first: 45,
        last: 48,
        ..with_qp_ex_pointers(BASE, 2)
    },
    // ibv_port_attr: +active_speed_ex.
    Layout {
        first: 49,
        last: 56,
        ..BASE_49
    },
    // The argument lists of ibv_cmd_get_context and others, which the provider does not call.
    Layout {
        first: 57,
        last: 58,
        suffix: 57,
        ..BASE_49
    },
    Layout {
        first: 59,
        last: 61,
        suffix: 59,
        public_minor: 15,
        slots: &SLOTS_59,
        verbs_context_size: 672,
        ..BASE_49
    },
    Layout {
        first: 62,
        last: 63,
        suffix: 59,
        public_minor: 16,
        slots: &SLOTS_62,
        verbs_context_size: 680,
        ..BASE_49
    },
    Layout {
        first: 64,
        last: 64,
        suffix: 64,
        public_minor: 17,
        slots: &SLOTS_64,
        verbs_context_size: 696,
        ..BASE_49
    },
    Layout {
        first: 65,
        last: 65,
        suffix: 65,
        public_minor: 18,
        slots: &SLOTS_65,
        verbs_context_size: 696,
        ..BASE_49
    },
];

/// The layout of a release, by the major number of its package version.
pub fn layout_of(release: u16) -> Option<&'static Layout> {
    LAYOUTS
        .iter()
        .find(|layout| (layout.first..=layout.last).contains(&release))
}

const POINTER: usize = size_of::<*const c_void>();

const BASE: Layout = Layout {
    first: 36,
    last: 36,
    suffix: 34,
    public_minor: 14,
    slots: &SLOTS_36,
    verbs_context_size: 648,
    verbs_qp_size: 360,
    verbs_qp_comp_mask_offset: 344,
    verbs_qp_xrcd_offset: 352,
    port_attr_size: 52,
};

const BASE_49: Layout = Layout {
    port_attr_size: 56,
    ..with_qp_ex_pointers(BASE, 2)
};

/// `ibv_qp_ex` grows at its end and is the larger member of the union at the head of `verbs_qp`.
const fn with_qp_ex_pointers(base: Layout, added: usize) -> Layout {
    Layout {
        verbs_qp_size: base.verbs_qp_size + added * POINTER,
        verbs_qp_comp_mask_offset: base.verbs_qp_comp_mask_offset + added * POINTER,
        verbs_qp_xrcd_offset: base.verbs_qp_xrcd_offset + added * POINTER,
        ..base
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runs_are_gapless() {
        assert_eq!(
            (LAYOUTS[0].first, LAYOUTS[LAYOUTS.len() - 1].last),
            (36, 65)
        );
        for pair in LAYOUTS.windows(2) {
            assert_eq!(pair[0].last + 1, pair[1].first);
        }
    }

    #[test]
    fn releases_outside_the_table_have_no_layout() {
        assert_eq!(layout_of(35), None);
        assert_eq!(layout_of(66), None);
        assert_eq!(layout_of(50).map(|layout| layout.first), Some(49));
    }

    #[test]
    fn slots_are_sorted_and_counted() {
        for (layout, expected) in LAYOUTS.iter().zip([76, 76, 76, 76, 76, 79, 81, 83, 93]) {
            assert_eq!(layout.slots.len(), expected, "release {}", layout.first);
            assert!(
                layout.slots.windows(2).all(|pair| pair[0] < pair[1]),
                "release {}",
                layout.first
            );
        }
    }

    #[test]
    fn operations_land_in_their_slots_and_unknown_ones_are_left_out() {
        let function = std::ptr::dangling::<c_void>();
        let named = [("alloc_pd", function), ("free_buf", function)];
        let table_of = |release| {
            layout_of(release)
                .expect("a known release")
                .operations(&named)
        };
        assert_eq!(
            table_of(44).iter().filter(|slot| !slot.is_null()).count(),
            1
        );
        assert_eq!(table_of(44)[5], function);
        assert_eq!(table_of(64)[7], function);
        assert_eq!(
            table_of(64).iter().filter(|slot| !slot.is_null()).count(),
            2
        );
    }

    #[test]
    fn release_44_agrees_with_the_public_types() {
        let layout = layout_of(44).expect("a known release");
        assert_eq!(
            layout.verbs_context_size,
            size_of::<rdma_core_sys::verbs_context>()
        );
        assert_eq!(
            layout.context_offset(),
            std::mem::offset_of!(rdma_core_sys::verbs_context, context)
        );
        assert_eq!(
            layout.verbs_qp_comp_mask_offset,
            size_of::<rdma_core_sys::ibv_qp_ex>()
        );
        assert_eq!(
            layout.port_attr_size,
            size_of::<rdma_core_sys::ibv_port_attr>()
        );
    }
}
