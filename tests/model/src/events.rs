//! Completion channels of the fabric: a pipe, and the queues that use it.
//!
//! Callers keep the rules of the verbs: that is the SAFETY argument of every block that has no other.

use std::ffi::{c_int, c_void};
use std::io::{PipeReader, PipeWriter, Read};
use std::os::fd::{AsRawFd, RawFd};

use rdma_core_sys::{ibv_comp_channel, ibv_context, ibv_cq};

/// A channel; the public object is its first field.
#[repr(C)]
struct Channel {
    public: ibv_comp_channel,
    /// One byte an event, the place of its queue.
    reader: PipeReader,
    writer: PipeWriter,
    queue: *mut ibv_cq,
}

pub(crate) extern "C" fn create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    let Ok((reader, writer)) = std::io::pipe() else {
        return std::ptr::null_mut();
    };
    let public = ibv_comp_channel {
        context,
        fd: reader.as_raw_fd(),
        refcnt: 0,
    };
    Box::into_raw(Box::new(Channel {
        public,
        reader,
        writer,
        queue: std::ptr::null_mut(),
    }))
    .cast()
}

pub(crate) extern "C" fn destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: made by `create_comp_channel`.
    drop(unsafe { Box::from_raw(channel.cast::<Channel>()) });
    0
}

/// Where the events of a queue are written. A channel is for one queue here.
///
/// # Safety
/// `channel` must be null or come from [`create_comp_channel`].
pub(crate) unsafe fn attach(channel: *mut ibv_comp_channel, queue: *mut ibv_cq) -> Option<RawFd> {
    // SAFETY: as the caller vouches.
    let channel = unsafe { channel.cast::<Channel>().as_mut() }?;
    assert!(channel.queue.is_null(), "a second queue on a channel");
    channel.queue = queue;
    Some(channel.writer.as_raw_fd())
}

/// # Safety
/// As [`attach`]: the queue is about to go.
pub(crate) unsafe fn detach(channel: *mut ibv_comp_channel, queue: *mut ibv_cq) {
    // SAFETY: as the caller vouches.
    if let Some(channel) = unsafe { channel.cast::<Channel>().as_mut() } {
        assert_eq!(channel.queue, queue);
        channel.queue = std::ptr::null_mut();
    }
}

pub(crate) extern "C" fn get_cq_event(
    channel: *mut ibv_comp_channel,
    queue: *mut *mut ibv_cq,
    context: *mut *mut c_void,
) -> c_int {
    // SAFETY: see the top; an unread event goes with its queue.
    unsafe {
        let channel = &mut *channel.cast::<Channel>();
        match channel.reader.read(&mut [0]) {
            Ok(1) if !channel.queue.is_null() => {
                (*queue, *context) = (channel.queue, (*channel.queue).cq_context);
                0
            }
            _ => -1,
        }
    }
}

pub(crate) extern "C" fn ack_cq_events(_: *mut ibv_cq, _: u32) {}
