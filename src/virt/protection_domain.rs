//! Protection domains.

use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use rdma_core_sys::{ibv_context, ibv_pd};

use super::context::Context;
use super::process::{Registered, process};
use crate::errno::{Errno, Verb};

/// A protection domain; the application's object is its first field.
#[derive(Debug)]
#[repr(C)]
pub struct ProtectionDomain {
    app: ibv_pd,
    pub(crate) context: Arc<Context>,
    hardware: AtomicPtr<ibv_pd>,
    index: AtomicUsize,
}

/// `ibv_alloc_pd`.
///
/// # Errors
/// What the device answers.
pub fn alloc(app: *mut ibv_context) -> Verb<*mut ibv_pd> {
    let context = process().context(app)?;
    let _inside = context.enter()?;
    // SAFETY: the gate is held, so the hardware is there.
    let hardware = context
        .verbs
        .pointer(unsafe { (context.verbs.ibv_alloc_pd)(context.hardware()) })?;
    // SAFETY: the device's own object, just made.
    let handle = unsafe { (*hardware).handle };
    let domain = Box::leak(Box::new(ProtectionDomain {
        app: ibv_pd {
            context: app,
            handle,
        },
        context: Arc::clone(&context),
        hardware: AtomicPtr::new(hardware),
        index: AtomicUsize::new(0),
    }));
    let index = context
        .objects()
        .domains
        .insert(Registered((&*domain).into()));
    domain.index.store(index, Ordering::Relaxed);
    Ok(&raw mut domain.app)
}

/// `ibv_dealloc_pd`.
///
/// # Safety
/// `app` must come from [`alloc`] and not be used after success.
///
/// # Errors
/// What the device answers: `EBUSY` while something uses it.
pub unsafe fn dealloc(app: *mut ibv_pd) -> Verb<()> {
    // SAFETY: as the caller vouches.
    unsafe {
        let domain = ProtectionDomain::of(app);
        let _inside = domain.context.enter()?;
        Errno::check((domain.context.verbs.ibv_dealloc_pd)(domain.hardware()))?;
        domain
            .context
            .objects()
            .domains
            .remove(domain.index.load(Ordering::Relaxed));
        drop(Box::from_raw(app.cast::<ProtectionDomain>()));
    }
    Ok(())
}

impl ProtectionDomain {
    /// # Safety
    /// `app` must come from [`alloc`] and not be deallocated while the reference is used.
    pub(crate) unsafe fn of<'a>(app: *mut ibv_pd) -> &'a Self {
        // SAFETY: as the caller vouches; `app` is the first field.
        unsafe { &*app.cast::<Self>() }
    }

    pub(crate) fn hardware(&self) -> *mut ibv_pd {
        self.hardware.load(Ordering::Acquire)
    }

    /// Lets go of the hardware.
    pub(crate) fn release(&self) -> Verb<()> {
        let hardware = self.hardware.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if hardware.is_null() {
            return Ok(());
        }
        // SAFETY: the device's own; all that used it is released before.
        Errno::check(unsafe { (self.context.verbs.ibv_dealloc_pd)(hardware) })
    }

    /// Takes a fresh one.
    pub(crate) fn rebuild(&self) -> Verb<()> {
        let verbs = self.context.verbs;
        // SAFETY: the context is open again.
        let hardware = verbs.pointer(unsafe { (verbs.ibv_alloc_pd)(self.context.hardware()) })?;
        self.hardware.store(hardware, Ordering::Release);
        Ok(())
    }
}
