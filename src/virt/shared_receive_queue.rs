//! Shared receive queues.

use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rdma_core_sys::{
    IBV_SRQ_LIMIT, IBV_SRQ_MAX_WR, ibv_pd, ibv_recv_wr, ibv_srq, ibv_srq_attr, ibv_srq_init_attr,
};

use super::AppSrq;
use super::channel::wait_until_acknowledged;
use super::completion_queue::SHARED;
use super::context::Context;
use super::process::{Registered, lock, process};
use super::protection_domain::ProtectionDomain;
use super::receive_queue::{PostReceive, ReceiveQueue};
use crate::errno::{Errno, Verb};

/// A shared receive queue; the application's object is its first field.
#[derive(Debug)]
#[repr(C)]
pub struct SharedReceiveQueue {
    app: AppSrq,
    pub(crate) context: Arc<Context>,
    pub(crate) queue: ReceiveQueue,
    domain: *const ProtectionDomain,
    hardware: AtomicPtr<ibv_srq>,
    /// As asked for, and as changed since.
    attr: Mutex<ibv_srq_attr>,
    /// Asynchronous events written for it. Changed under `Process::events` only.
    pub(crate) delivered: AtomicU32,
    index: AtomicUsize,
}

// SAFETY: `domain` is only followed under the gate; the application's fields are libibverbs' business.
unsafe impl Sync for SharedReceiveQueue {}

/// `ibv_create_srq`.
///
/// # Safety
/// `pd` must come from us; `init` must be valid. The attributes are updated to what was granted.
///
/// # Errors
/// What the device answers.
pub unsafe fn create(pd: *mut ibv_pd, init: *mut ibv_srq_init_attr) -> Verb<*mut ibv_srq> {
    // SAFETY: as the caller vouches.
    let (domain, init) = unsafe { (ProtectionDomain::of(pd), &mut *init) };
    let context = Arc::clone(&domain.context);
    let _inside = context.enter()?;
    let queue = Box::new(SharedReceiveQueue {
        app: AppSrq::default(),
        context: Arc::clone(&context),
        queue: ReceiveQueue::default(),
        domain,
        hardware: AtomicPtr::default(),
        attr: Mutex::new(init.attr),
        delivered: AtomicU32::new(0),
        index: AtomicUsize::new(0),
    });
    let owner = std::ptr::from_ref(&*queue)
        .cast_mut()
        .map_addr(|address| address | SHARED)
        .cast();
    queue.create_hardware(&mut init.attr)?;
    let post = queue.hardware_post()?;
    if let Err(error) = queue
        .queue
        .allocate(init.attr.max_wr, init.attr.max_sge, owner)
    {
        // SAFETY: made above, used by nobody.
        unsafe { (context.verbs.ibv_destroy_srq)(queue.hardware()) };
        return Err(error);
    }
    queue.queue.attach(queue.hardware().cast(), post);
    let queue = Box::leak(queue);
    let index = context
        .objects()
        .shared_queues
        .insert(Registered((&*queue).into()));
    queue.index.store(index, Ordering::Relaxed);
    // SAFETY: the hardware's object was made just now.
    queue.app.public.handle = unsafe { (*queue.hardware()).handle };
    Ok(&raw mut queue.app.public)
}

/// `ibv_destroy_srq`.
///
/// # Safety
/// `app` must come from [`create`] and not be used after success.
///
/// # Errors
/// What the device answers: `EBUSY` while a queue pair uses it.
pub unsafe fn destroy(app: *mut ibv_srq) -> Verb<()> {
    // SAFETY: as the caller vouches.
    let queue = unsafe { SharedReceiveQueue::of(app) };
    let delivered = {
        let _inside = queue.context.enter()?;
        let _events = process().events();
        // SAFETY: the device's own.
        Errno::check(unsafe { (queue.context.verbs.ibv_destroy_srq)(queue.hardware()) })?;
        queue
            .context
            .objects()
            .shared_queues
            .remove(queue.index.load(Ordering::Relaxed));
        let unread = super::queue_pair::purge_events(&queue.context, app.expose_provenance());
        queue.delivered.load(Ordering::Relaxed).wrapping_sub(unread)
    };
    // SAFETY: libibverbs initialized mutex and condition when the queue was created.
    unsafe {
        wait_until_acknowledged(
            &raw mut (*app).mutex,
            &raw mut (*app).cond,
            &raw const (*app).events_completed,
            delivered,
        );
        drop(Box::from_raw(app.cast::<SharedReceiveQueue>()));
    }
    Ok(())
}

/// `ibv_modify_srq`. Changing the size is not there yet.
///
/// # Safety
/// `app` must come from [`create`]; `attr` must be valid.
///
/// # Errors
/// What the device answers.
pub unsafe fn modify(app: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: i32) -> Verb<()> {
    // SAFETY: as the caller vouches; the gate is held.
    unsafe {
        let queue = SharedReceiveQueue::of(app);
        let _inside = queue.context.enter()?;
        if mask as u32 & IBV_SRQ_MAX_WR != 0 {
            return Err(Errno::NOT_SUPPORTED);
        }
        Errno::check((queue.context.verbs.ibv_modify_srq)(
            queue.hardware(),
            attr,
            mask,
        ))?;
        if mask as u32 & IBV_SRQ_LIMIT != 0 {
            lock(&queue.attr).srq_limit = (*attr).srq_limit;
        }
    }
    Ok(())
}

/// `ibv_query_srq`.
///
/// # Safety
/// `app` must come from [`create`]; `attr` must be valid for writes.
///
/// # Errors
/// What the device answers.
pub unsafe fn query(app: *mut ibv_srq, attr: *mut ibv_srq_attr) -> Verb<()> {
    // SAFETY: as the caller vouches; the gate is held.
    unsafe {
        let queue = SharedReceiveQueue::of(app);
        let _inside = queue.context.enter()?;
        Errno::check((queue.context.verbs.ibv_query_srq)(queue.hardware(), attr))
    }
}

/// `ibv_post_srq_recv`.
///
/// # Safety
/// As `ibv_post_srq_recv` demands.
#[inline]
pub unsafe fn post(app: *mut ibv_srq, first: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> i32 {
    // SAFETY: as the caller vouches.
    unsafe {
        let queue = SharedReceiveQueue::of(app);
        queue.queue.post(&queue.context, first, bad)
    }
}

impl SharedReceiveQueue {
    /// Requests that it has room for, and elements of one.
    pub(crate) fn size(&self) -> (u32, u32) {
        let attr = lock(&self.attr);
        (attr.max_wr, attr.max_sge)
    }

    /// # Safety
    /// `app` must come from [`create`] and not be destroyed while the reference is used.
    #[inline(always)]
    pub(crate) unsafe fn of<'a>(app: *mut ibv_srq) -> &'a Self {
        // SAFETY: as the caller vouches; `app` is the first field.
        unsafe { &*app.cast::<Self>() }
    }

    pub(crate) fn app(&self) -> *mut ibv_srq {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    pub(crate) fn hardware(&self) -> *mut ibv_srq {
        self.hardware.load(Ordering::Acquire)
    }

    fn create_hardware(&self, attr: &mut ibv_srq_attr) -> Verb<()> {
        let verbs = self.context.verbs;
        let context = std::ptr::from_ref(self).cast_mut().cast::<c_void>();
        let mut init = ibv_srq_init_attr {
            srq_context: context,
            attr: *attr,
        };
        // SAFETY: the domain outlives its queues; the gate is held or closed by us.
        unsafe {
            let hardware = verbs.pointer((verbs.ibv_create_srq)(
                (*self.domain).hardware(),
                &raw mut init,
            ))?;
            self.hardware.store(hardware, Ordering::Release);
        }
        *attr = init.attr;
        Ok(())
    }

    fn hardware_post(&self) -> Verb<PostReceive> {
        // SAFETY: the hardware is there. The two signatures differ in the type of the queue alone.
        unsafe {
            let post = (*(*self.hardware()).context)
                .ops
                .post_srq_recv
                .ok_or(Errno::NOT_SUPPORTED)?;
            Ok(std::mem::transmute::<
                unsafe extern "C" fn(*mut ibv_srq, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> i32,
                PostReceive,
            >(post))
        }
    }

    pub(crate) fn release(&self) -> Verb<()> {
        self.queue.detach();
        let hardware = self.hardware.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if hardware.is_null() {
            return Ok(());
        }
        // The limit may have fired, which disarms it: what it is now is what the fresh queue must have.
        let mut now = ibv_srq_attr {
            max_wr: 0,
            max_sge: 0,
            srq_limit: 0,
        };
        // SAFETY: the device's own, which nobody can reach any more.
        unsafe {
            if (self.context.verbs.ibv_query_srq)(hardware, &raw mut now) == 0 {
                lock(&self.attr).srq_limit = now.srq_limit;
            }
            Errno::check((self.context.verbs.ibv_destroy_srq)(hardware))
        }
    }

    /// Takes a fresh one.
    pub(crate) fn rebuild(&self) -> Verb<()> {
        let mut attr = *lock(&self.attr);
        self.create_hardware(&mut attr)
    }

    /// Posts again what was posted; then the limit, which must not fire for an empty queue.
    pub(crate) fn repost(&self) -> Verb<()> {
        let (hardware, post) = (self.hardware().cast(), self.hardware_post()?);
        self.queue.restart(&self.context, hardware, post, false)?;
        let mut attr = *lock(&self.attr);
        if attr.srq_limit > 0 {
            // SAFETY: rebuilt, so the hardware is there.
            Errno::check(unsafe {
                (self.context.verbs.ibv_modify_srq)(
                    self.hardware(),
                    &raw mut attr,
                    IBV_SRQ_LIMIT as i32,
                )
            })?;
        }
        Ok(())
    }
}
