//! A queue pair of our own on the device below, which the application does not know of.

use rdma_core_sys::{IBV_QPT_RC, ibv_cq, ibv_pd, ibv_qp, ibv_qp_init_attr};

use super::context::Context;
use crate::device::Verbs;
use crate::errno::Verb;
use crate::handle::HardwareQpn;

/// An RC queue pair in RESET, for one request each way, with what it needs. Destroyed when dropped, which has to be before
/// the device is closed.
#[derive(Debug)]
pub(crate) struct OwnPair {
    verbs: &'static Verbs,
    domain: *mut ibv_pd,
    completions: *mut ibv_cq,
    pair: *mut ibv_qp,
}

// SAFETY: the device's own objects, used by whoever has this.
unsafe impl Send for OwnPair {}

impl OwnPair {
    /// # Errors
    /// What the device answers.
    pub(crate) fn new(context: &Context) -> Verb<Self> {
        let verbs = context.verbs;
        let mut own = Self {
            verbs,
            domain: std::ptr::null_mut(),
            completions: std::ptr::null_mut(),
            pair: std::ptr::null_mut(),
        };
        // SAFETY: the gate is held or closed, so the context is open; zero is valid for the attributes. What was made goes with
        // `own` if the next step fails.
        unsafe {
            own.domain = verbs.pointer((verbs.ibv_alloc_pd)(context.hardware()))?;
            own.completions = verbs.pointer((verbs.ibv_create_cq)(
                context.hardware(),
                2,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                0,
            ))?;
            let mut init: ibv_qp_init_attr = std::mem::zeroed();
            init.send_cq = own.completions;
            init.recv_cq = own.completions;
            init.cap.max_send_wr = 1;
            init.cap.max_recv_wr = 1;
            init.cap.max_send_sge = 1;
            init.cap.max_recv_sge = 1;
            init.qp_type = IBV_QPT_RC;
            own.pair = verbs.pointer((verbs.ibv_create_qp)(own.domain, &raw mut init))?;
        }
        Ok(own)
    }

    pub(crate) fn number(&self) -> HardwareQpn {
        // SAFETY: the device's own object.
        HardwareQpn(unsafe { (*self.pair).qp_num })
    }

    pub(super) fn pair(&self) -> *mut ibv_qp {
        self.pair
    }

    pub(super) fn completions(&self) -> *mut ibv_cq {
        self.completions
    }
}

impl Drop for OwnPair {
    fn drop(&mut self) {
        // SAFETY: made in `new`, or null where that did not get so far; nobody else has them.
        unsafe {
            if !self.pair.is_null() {
                (self.verbs.ibv_destroy_qp)(self.pair);
            }
            if !self.completions.is_null() {
                (self.verbs.ibv_destroy_cq)(self.completions);
            }
            if !self.domain.is_null() {
                (self.verbs.ibv_dealloc_pd)(self.domain);
            }
        }
    }
}
