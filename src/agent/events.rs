//! Handing on the hardware's events, in the application's terms.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_core_sys::{
    IBV_EVENT_COMM_EST, IBV_EVENT_CQ_ERR, IBV_EVENT_PATH_MIG, IBV_EVENT_PATH_MIG_ERR,
    IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_QP_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED,
    IBV_EVENT_QP_REQ_ERR, IBV_EVENT_SQ_DRAINED, IBV_EVENT_SRQ_ERR, IBV_EVENT_SRQ_LIMIT_REACHED,
    ibv_async_event,
};

use crate::control::message::Phase;
use crate::virt::channel::Channel;
use crate::virt::completion_queue::CompletionQueue;
use crate::virt::context::Context;
use crate::virt::process::process;
use crate::virt::queue_pair::QueuePair;
use crate::virt::shared_receive_queue::SharedReceiveQueue;

/// The hardware's event files.
pub(super) fn files() -> Vec<RawFd> {
    let _events = process().events();
    let mut files = Vec::new();
    for context in &process().contexts() {
        // SAFETY: null or open: the hardware goes only under the lock that is held.
        if let Some(hardware) = unsafe { context.hardware().as_ref() } {
            files.push(hardware.async_fd);
        }
    }
    for channel in process().channels().iter() {
        // SAFETY: as above.
        if let Some(hardware) = unsafe { channel.hardware().as_ref() } {
            files.push(hardware.fd);
        }
    }
    files
}

/// Hands on all events there are.
pub(super) fn forward(phase: Phase) {
    let _events = process().events();
    let channels: Vec<Arc<Channel>> = process().channels().clone();
    for channel in channels {
        forward_completions(&channel, phase);
    }
    for context in &process().contexts() {
        forward_asynchronous(context, phase);
    }
}

fn forward_completions(channel: &Channel, phase: Phase) {
    let (Some(verbs), hardware) = (channel.verbs(), channel.hardware()) else {
        return;
    };
    if hardware.is_null() {
        return;
    }
    let (mut queue, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the channel is there while the events lock is held, and does not block; each queue that an event can name
    // still exists, as a queue is destroyed under that lock.
    unsafe {
        while (verbs.ibv_get_cq_event)(hardware, &raw mut queue, &raw mut context) == 0 {
            (verbs.ibv_ack_cq_events)(queue, 1);
            // From Stopped on the hardware also fires for what we flush. Whoever is armed gets an event at Resume.
            if phase < Phase::Stopped {
                (*context.cast::<CompletionQueue>()).notify();
            }
        }
    }
}

fn forward_asynchronous(context: &Context, phase: Phase) {
    let hardware = context.hardware();
    if hardware.is_null() {
        return;
    }
    // SAFETY: zero is valid; the context is there while the events lock is held, and its event file does not block.
    unsafe {
        let mut event: ibv_async_event = std::mem::zeroed();
        while (context.verbs.ibv_get_async_event)(hardware, &raw mut event) == 0 {
            if phase < Phase::Stopped && !is_our_doing(&event) {
                hand_over(context, &event);
            }
            (context.verbs.ibv_ack_async_event)(&raw mut event);
        }
    }
}

/// A queue pair that was connected again meets its first packet again.
fn is_our_doing(event: &ibv_async_event) -> bool {
    event.event_type == IBV_EVENT_COMM_EST && process().translates()
}

/// `struct ib_uverbs_async_event_desc`: the element, the type, four bytes that mean nothing.
unsafe fn hand_over(context: &Context, event: &ibv_async_event) {
    // SAFETY: the objects name ours in their context pointers and exist while the events lock is held.
    let element = unsafe {
        match event.event_type {
            IBV_EVENT_CQ_ERR => {
                let queue = &*(*event.element.cq).cq_context.cast::<CompletionQueue>();
                queue.app().expose_provenance() as u64
            }
            IBV_EVENT_QP_FATAL
            | IBV_EVENT_QP_REQ_ERR
            | IBV_EVENT_QP_ACCESS_ERR
            | IBV_EVENT_COMM_EST
            | IBV_EVENT_SQ_DRAINED
            | IBV_EVENT_PATH_MIG
            | IBV_EVENT_PATH_MIG_ERR
            | IBV_EVENT_QP_LAST_WQE_REACHED => {
                let pair = &*(*event.element.qp).qp_context.cast::<QueuePair>();
                pair.delivered.fetch_add(1, Ordering::Relaxed);
                pair.app().expose_provenance() as u64
            }
            IBV_EVENT_SRQ_ERR | IBV_EVENT_SRQ_LIMIT_REACHED => {
                let queue = &*(*event.element.srq)
                    .srq_context
                    .cast::<SharedReceiveQueue>();
                queue.delivered.fetch_add(1, Ordering::Relaxed);
                queue.app().expose_provenance() as u64
            }
            _ => event.element.port_num as u64,
        }
    };
    let mut record = [0; 16];
    record[..8].copy_from_slice(&element.to_ne_bytes());
    record[8..12].copy_from_slice(&event.event_type.to_ne_bytes());
    if !context.events.write(&record) {
        tracing::warn!(
            device = context.name(),
            kind = event.event_type,
            "an asynchronous event was dropped"
        );
    }
}
