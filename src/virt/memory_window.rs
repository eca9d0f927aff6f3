//! Memory windows. They are bound by requests, whose effect the hardware does not tell, so a process that has any is not
//! checkpointed: docs/verbs.md, "Memory windows". Until they are gone, their keys are the hardware's.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rdma_core_sys::{
    IBV_ACCESS_ZERO_BASED, IBV_WR_BIND_MW, ibv_mw, ibv_mw_bind, ibv_mw_type, ibv_pd, ibv_qp,
    ibv_send_wr, ibv_send_wr__bindgen_ty_4__bindgen_ty_1 as BindRequest,
};

use super::context::Context;
use super::memory_region::{MemoryRegion, is_reserved};
use super::process::Registered;
use super::protection_domain::ProtectionDomain;
use super::queue_pair::post_send;
use crate::errno::{Errno, Verb};
use crate::handle::VirtualKey;

/// The lowest byte of a window's key changes with each binding; that of one of type 2 is the application's to choose.
const VARIANT: u32 = 0xff;

/// A memory window; the application's object is its first field.
#[derive(Debug)]
#[repr(C)]
pub struct MemoryWindow {
    app: ibv_mw,
    context: Arc<Context>,
    hardware: *mut ibv_mw,
    index: AtomicUsize,
}

/// `ibv_alloc_mw`.
///
/// # Safety
/// `pd` must come from us.
///
/// # Errors
/// What the device answers; `EOPNOTSUPP` where it has no such verb.
pub unsafe fn alloc(pd: *mut ibv_pd, kind: ibv_mw_type) -> Verb<*mut ibv_mw> {
    // SAFETY: as the caller vouches.
    let domain = unsafe { ProtectionDomain::of(pd) };
    let context = Arc::clone(&domain.context);
    let _inside = context.enter()?;
    // SAFETY: the gate is held, so the hardware is there.
    let ops = unsafe { &(*context.hardware()).ops };
    let alloc = ops.alloc_mw.ok_or(Errno::NOT_SUPPORTED)?;
    let dealloc = ops.dealloc_mw.ok_or(Errno::NOT_SUPPORTED)?;
    let mut burnt = Vec::new();
    let made = loop {
        // SAFETY: as above; what was made is the device's own object.
        unsafe {
            let made = context.verbs.pointer(alloc(domain.hardware(), kind));
            match made {
                Ok(window) if collides(&context, (*window).rkey) => burnt.push(window),
                other => break other,
            }
        }
    };
    for window in burnt {
        // SAFETY: made above, never handed out.
        unsafe { dealloc(window) };
    }
    let hardware = made?;
    // SAFETY: the device's own object, just made.
    let (rkey, handle) = unsafe { ((*hardware).rkey, (*hardware).handle) };
    let window = Box::leak(Box::new(MemoryWindow {
        app: ibv_mw {
            context: context.app(),
            pd,
            rkey,
            handle,
            type_: kind,
        },
        context: Arc::clone(&context),
        hardware,
        index: AtomicUsize::new(0),
    }));
    context.window_keys.insert(rkey & !VARIANT, rkey);
    let index = context
        .objects()
        .windows
        .insert(Registered((&*window).into()));
    window.index.store(index, Ordering::Relaxed);
    Ok(&raw mut window.app)
}

/// Can a key of this window come to equal one that is known in the job?
fn collides(context: &Context, rkey: u32) -> bool {
    (0..=VARIANT).any(|variant| is_reserved(context, VirtualKey(rkey & !VARIANT | variant)))
}

/// `ibv_dealloc_mw`.
///
/// # Safety
/// `app` must come from [`alloc`] and not be used after success.
///
/// # Errors
/// What the device answers.
pub unsafe fn dealloc(app: *mut ibv_mw) -> Verb<()> {
    // SAFETY: as the caller vouches; the gate is held, so the hardware is there.
    unsafe {
        let window = &*app.cast::<MemoryWindow>();
        let _inside = window.context.enter()?;
        let ops = &(*window.context.hardware()).ops;
        Errno::check(ops.dealloc_mw.ok_or(Errno::NOT_SUPPORTED)?(window.hardware))?;
        let context = &window.context;
        context.window_keys.remove(window.rkey().0 & !VARIANT);
        let index = window.index.load(Ordering::Relaxed);
        context.objects().windows.remove(index);
        drop(Box::from_raw(app.cast::<MemoryWindow>()));
    }
    Ok(())
}

/// `ibv_bind_mw`, for windows of type 1: a request like any other, with the next key.
///
/// # Safety
/// As `ibv_bind_mw` demands.
///
/// # Errors
/// Those of `ibv_post_send`.
pub unsafe fn bind(pair: *mut ibv_qp, app: *mut ibv_mw, bind: &ibv_mw_bind) -> Verb<()> {
    if bind.bind_info.mw_access_flags & IBV_ACCESS_ZERO_BASED != 0 {
        return Err(Errno::INVALID);
    }
    // SAFETY: as the caller vouches; zero is a valid request.
    unsafe {
        let old = (*app).rkey;
        let rkey = old & !VARIANT | old.wrapping_add(1) & VARIANT;
        let mut request: ibv_send_wr = std::mem::zeroed();
        request.wr_id = bind.wr_id;
        request.send_flags = bind.send_flags;
        request.opcode = IBV_WR_BIND_MW;
        request.__bindgen_anon_2.bind_mw = BindRequest {
            mw: app,
            rkey,
            bind_info: bind.bind_info,
        };
        let mut bad = std::ptr::null_mut();
        Errno::check(post_send(pair, &raw mut request, &raw mut bad))?;
        (*app).rkey = rkey;
    }
    Ok(())
}

/// A request to bind, in the hardware's terms. It goes down on the hardware that it was logged for, or not at all.
///
/// # Safety
/// The objects that it names must be ours.
///
/// # Errors
/// `EINVAL`: no window, or the region's memory was gone at the last restart.
pub(crate) unsafe fn below(request: &BindRequest) -> Verb<BindRequest> {
    let mut below = *request;
    if request.mw.is_null() {
        return Err(Errno::INVALID);
    }
    // SAFETY: as the caller vouches.
    unsafe {
        let window = &*request.mw.cast::<MemoryWindow>();
        // Devices take the key that is bound anew from there, and an application writes it into its own object.
        (*window.hardware).rkey = (*request.mw).rkey;
        below.mw = window.hardware;
        if !request.bind_info.mr.is_null() {
            below.bind_info.mr = MemoryRegion::of(request.bind_info.mr).hardware();
            if below.bind_info.mr.is_null() {
                return Err(Errno::INVALID);
            }
        }
    }
    Ok(below)
}

/// Is this a key of a window of the context? Nothing else can be invalidated.
pub(crate) fn is_window(context: &Context, rkey: u32) -> bool {
    context.window_keys.get(rkey & !VARIANT).is_some()
}

impl MemoryWindow {
    /// As the application knows it.
    pub(crate) fn rkey(&self) -> VirtualKey {
        VirtualKey(self.app.rkey)
    }
}
