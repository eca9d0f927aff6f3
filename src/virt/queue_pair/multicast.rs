//! Multicast groups. Their addresses belong to no port, so they mean the same on any hardware.

use rdma_core_sys::{ibv_gid, ibv_qp};

use super::QueuePair;
use crate::errno::{Errno, Verb};
use crate::virt::process::lock;

/// A group that a queue pair is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    gid: [u8; 16],
    lid: u16,
}

impl Group {
    unsafe fn of(gid: *const ibv_gid, lid: u16) -> Self {
        // SAFETY: as the caller vouches; both views of a GID are plain bytes.
        let gid = unsafe { (*gid).raw };
        Self { gid, lid }
    }
}

/// `ibv_attach_mcast`.
///
/// # Safety
/// `app` must come from [`super::create`]; `gid` must be valid.
///
/// # Errors
/// What the device answers.
pub unsafe fn attach(app: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> Verb<()> {
    // SAFETY: as the caller vouches; the gate is held, so the hardware is there.
    unsafe {
        let pair = QueuePair::of(app);
        let _inside = pair.context.enter()?;
        let attach = pair.context.verbs.ibv_attach_mcast;
        Errno::check(attach(pair.hardware(), gid, lid))?;
        let group = Group::of(gid, lid);
        let mut groups = lock(&pair.groups);
        // Devices take a second time for the first.
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    Ok(())
}

/// `ibv_detach_mcast`.
///
/// # Safety
/// As of [`attach`].
///
/// # Errors
/// What the device answers.
pub unsafe fn detach(app: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> Verb<()> {
    // SAFETY: as the caller vouches; the gate is held, so the hardware is there.
    unsafe {
        let pair = QueuePair::of(app);
        let _inside = pair.context.enter()?;
        let detach = pair.context.verbs.ibv_detach_mcast;
        Errno::check(detach(pair.hardware(), gid, lid))?;
        let group = Group::of(gid, lid);
        lock(&pair.groups).retain(|known| *known != group);
    }
    Ok(())
}

impl QueuePair {
    /// Attaches fresh hardware to the groups that the old one was attached to.
    pub(super) fn attach_again(&self) -> Verb<()> {
        for group in lock(&self.groups).iter() {
            let gid = ibv_gid { raw: group.gid };
            let attach = self.context.verbs.ibv_attach_mcast;
            // SAFETY: the hardware is there while the gate is closed and it is being connected.
            Errno::check(unsafe { attach(self.hardware(), &raw const gid, group.lid) })?;
        }
        Ok(())
    }

    /// Attached hardware cannot be destroyed. Whether it was attached already does not matter: destroying it will tell.
    pub(super) fn detach_below(&self, hardware: *mut ibv_qp) {
        for group in lock(&self.groups).iter() {
            let gid = ibv_gid { raw: group.gid };
            let detach = self.context.verbs.ibv_detach_mcast;
            // SAFETY: the hardware is there until the caller destroys it.
            unsafe { detach(hardware, &raw const gid, group.lid) };
        }
    }
}
