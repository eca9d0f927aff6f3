//! The objects the application holds pointers to: public types first, room for what libibverbs keeps behind them.
//!
//! libibverbs casts an object to the private type around it (`verbs_qp`, `verbs_cq`, ...), whose size depends on the
//! release. Each object here starts with the public type and is followed by enough zeroes for the largest release known,
//! so that every private field reads as "not there" (no XRC domain; no `VERBS_QP_EX` until the provider sets it). The provider's release tables are
//! checked against these sizes.

use rdma_core_sys::{ibv_cq, ibv_mr, ibv_qp, ibv_srq};

macro_rules! room {
    ($(#[$doc:meta])* $name:ident($public:ty, $bytes:literal)) => {
        $(#[$doc])*
        #[repr(C)]
        pub struct $name {
            pub public: $public,
            room: [u64; ($bytes - size_of::<$public>()) / 8],
        }

        impl $name {
            /// Bytes there are for the private type.
            pub const SIZE: usize = size_of::<Self>();
        }

        impl Default for $name {
            fn default() -> Self {
                // SAFETY: C's own structures, of pointers and numbers; all zeroes is what calloc gives a provider.
                unsafe { std::mem::zeroed() }
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str(concat!(stringify!($name), "(..)"))
            }
        }
    };
}

room!(
    /// `verbs_qp`: `ibv_qp_ex` with 22 function pointers at most, a mask, an XRC domain.
    AppQp(ibv_qp, 512)
);
room!(
    /// `verbs_cq`: `ibv_cq_ex`.
    AppCq(ibv_cq, 512)
);
room!(
    /// `verbs_srq`.
    AppSrq(ibv_srq, 256)
);

/// `verbs_mr`, the same in every release known.
#[derive(Debug)]
#[repr(C)]
pub struct AppMr {
    pub public: ibv_mr,
    /// `enum ibv_mr_type`; 0 is an ordinary region.
    pub kind: u32,
    pub access: i32,
}
