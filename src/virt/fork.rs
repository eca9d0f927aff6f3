//! Forks. A child owns nothing of its parent's hardware; it begins with a virtual device of its own. docs/fork-and-limits.md.

use std::ffi::c_int;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use kmod_compat::fds::{DescriptorKind, Process as Whose, rdma_descriptors, rdma_mappings};
use kmod_compat::sysfs::Sysfs;
use rdma_core_sys::{ibv_cq, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_srq, ibv_wc};

use super::context::Context;
use super::process::{Still, process, start_anew};
use crate::agent;

/// From before a fork until after it, in the thread that forks: what the child needs is not being changed, and no lock that it
/// needs is another thread's, which would never give it back there. In the parent it is only dropped.
#[derive(Debug)]
pub struct Fork {
    still: Still,
    agent: agent::Still,
}

impl Fork {
    /// Waits until events are handed on and lists are changed; never for a checkpoint.
    #[must_use]
    pub fn begin() -> Self {
        Self {
            still: process().still(),
            agent: agent::still(),
        }
    }

    /// In the child: lets go of all that leads to the parent's hardware, so that it is neither used nor kept alive.
    pub fn end_in_child(self) {
        let Self { still, agent } = self;
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.ok();
        for context in still.contexts.iter() {
            refuse_data_path(context);
            context.events.abandon(null.as_ref());
        }
        for channel in still.channels.iter() {
            channel.pipe.abandon(null.as_ref());
        }
        agent.abandon();
        // Also those that another thread was about to close or to take over.
        for descriptor in rdma_descriptors(&Sysfs::host(), Whose::Own).unwrap_or_default() {
            if let DescriptorKind::Verbs { .. } | DescriptorKind::Events = descriptor.kind {
                put_in_place(null.as_ref(), descriptor.number);
            }
        }
        for mapping in rdma_mappings(Whose::Own).unwrap_or_default() {
            // SAFETY: the device's queues and doorbells, which only the parent's native library uses, and it is not called here.
            unsafe {
                libc::munmap(
                    std::ptr::with_exposed_provenance_mut(mapping.start as usize),
                    (mapping.end - mapping.start) as usize,
                );
            }
        }
        drop(still);
        start_anew();
    }
}

/// The application may name the number, so something has to be there.
pub(super) fn put_in_place(null: Option<&File>, number: RawFd) {
    // SAFETY: the number of a file that the child has inherited and cannot use.
    unsafe {
        match null {
            Some(null) => libc::dup3(null.as_raw_fd(), number, libc::O_CLOEXEC),
            None => libc::close(number),
        };
    }
}

/// The inline functions of verbs.h go through this table, so nothing has to be asked on the way of a request.
fn refuse_data_path(context: &Context) {
    // SAFETY: the context is open, and the child has one thread.
    let ops = unsafe { &mut (*context.app()).ops };
    ops.post_send = Some(refuse_send);
    ops.post_recv = Some(refuse_receive);
    ops.post_srq_recv = Some(refuse_shared_receive);
    ops.poll_cq = Some(refuse_poll);
    ops.req_notify_cq = Some(refuse_notification);
}

unsafe extern "C" fn refuse_send(
    _: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: as the caller of `ibv_post_send` vouches.
    unsafe { *bad = request };
    libc::EIO
}

unsafe extern "C" fn refuse_receive(
    _: *mut ibv_qp,
    request: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as the caller of `ibv_post_recv` vouches.
    unsafe { *bad = request };
    libc::EIO
}

unsafe extern "C" fn refuse_shared_receive(
    _: *mut ibv_srq,
    request: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as the caller of `ibv_post_srq_recv` vouches.
    unsafe { *bad = request };
    libc::EIO
}

unsafe extern "C" fn refuse_poll(_: *mut ibv_cq, _: c_int, _: *mut ibv_wc) -> c_int {
    -libc::EIO
}

unsafe extern "C" fn refuse_notification(_: *mut ibv_cq, _: c_int) -> c_int {
    libc::EIO
}
