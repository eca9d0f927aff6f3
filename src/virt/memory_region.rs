//! Memory regions.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use rdma_core_sys::{
    IBV_ACCESS_REMOTE_ATOMIC, IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE, ibv_mr, ibv_pd,
};

use super::AppMr;
use super::context::Context;
use super::ports::PortMap;
use super::process::{Registered, lock, process};
use super::protection_domain::ProtectionDomain;
use crate::errno::{Errno, Verb};
use crate::handle::{HardwareKey, VirtualKey};

const REMOTE_ACCESS: i32 =
    (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC) as i32;

/// A memory region; the application's object is its first field.
#[derive(Debug)]
#[repr(C)]
pub struct MemoryRegion {
    app: AppMr,
    pub(crate) context: Arc<Context>,
    domain: *const ProtectionDomain,
    iova: u64,
    hardware: AtomicPtr<ibv_mr>,
    index: AtomicUsize,
}

// SAFETY: the application's fields are written before the region is handed out, and only read after.
unsafe impl Sync for MemoryRegion {}

/// `ibv_reg_mr` and its kin; `address` is `None` for a region that is not backed by memory of the process.
///
/// # Safety
/// `pd` must come from us.
///
/// # Errors
/// What the device answers; `EOPNOTSUPP` for on-demand paging, which is not there yet.
pub unsafe fn register(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: i32,
) -> Verb<*mut ibv_mr> {
    // SAFETY: as the caller vouches.
    let domain = unsafe { ProtectionDomain::of(pd) };
    let context = Arc::clone(&domain.context);
    let _inside = context.enter()?;
    if access & rdma_core_sys::IBV_ACCESS_ON_DEMAND as i32 != 0 {
        return Err(Errno::NOT_SUPPORTED);
    }
    let region = Box::new(MemoryRegion {
        app: AppMr {
            public: ibv_mr {
                context: context.app(),
                pd,
                addr,
                length,
                handle: 0,
                lkey: 0,
                rkey: 0,
            },
            kind: 0,
            access,
        },
        context: Arc::clone(&context),
        domain,
        iova,
        hardware: AtomicPtr::default(),
        index: AtomicUsize::new(0),
    });
    let hardware = region.register_hardware(|hardware| collides(&context, hardware))?;
    let region = Box::leak(region);
    // SAFETY: the device's own object, just made.
    unsafe {
        region.app.public.handle = (*hardware).handle;
        region.app.public.lkey = (*hardware).lkey;
        region.app.public.rkey = (*hardware).rkey;
    }
    if process().translates() {
        context.lkeys.insert(region.lkey().0, region.lkey().0);
    }
    let index = context
        .objects()
        .regions
        .insert(Registered((&*region).into()));
    region.index.store(index, Ordering::Relaxed);
    Ok(&raw mut region.app.public)
}

/// Does a fresh region's key equal one that the application or its peers hold for another?
fn collides(context: &Context, hardware: &ibv_mr) -> bool {
    context.lkeys.get(hardware.lkey).is_some() || is_reserved(context, VirtualKey(hardware.rkey))
}

/// Is this a remote key that the job knows at an address of this device?
pub(crate) fn is_reserved(context: &Context, rkey: VirtualKey) -> bool {
    process().directory().is_some_and(|directory| {
        let ports = lock(&context.ports);
        let mut addresses = ports.iter().flat_map(PortMap::addresses);
        addresses.any(|address| directory.has_key_at(address, rkey))
    })
}
/// `ibv_dereg_mr`.
///
/// # Safety
/// `app` must come from [`register`] and not be used after success.
///
/// # Errors
/// What the device answers.
pub unsafe fn deregister(app: *mut ibv_mr) -> Verb<()> {
    // SAFETY: as the caller vouches.
    unsafe {
        let region = &*app.cast::<MemoryRegion>();
        let _inside = region.context.enter()?;
        if !region.hardware().is_null() {
            Errno::check((region.context.verbs.ibv_dereg_mr)(region.hardware()))?;
        }
        region
            .context
            .objects()
            .regions
            .remove(region.index.load(Ordering::Relaxed));
        if process().translates() {
            region.context.lkeys.remove(region.lkey().0);
        }
        drop(Box::from_raw(app.cast::<MemoryRegion>()));
    }
    Ok(())
}

impl MemoryRegion {
    /// # Safety
    /// `app` must come from [`register`] and not be deregistered while the reference is used.
    pub(crate) unsafe fn of<'a>(app: *mut ibv_mr) -> &'a Self {
        // SAFETY: as the caller vouches; `app` is the first field.
        unsafe { &*app.cast::<Self>() }
    }

    #[must_use]
    pub fn lkey(&self) -> VirtualKey {
        VirtualKey(self.app.public.lkey)
    }

    #[must_use]
    pub fn rkey(&self) -> VirtualKey {
        VirtualKey(self.app.public.rkey)
    }

    /// Address and length in bytes.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        (
            self.app.public.addr.addr() as u64,
            self.app.public.length as u64,
        )
    }

    /// As it was registered.
    pub(crate) fn access(&self) -> u32 {
        self.app.access.cast_unsigned()
    }

    /// May peers hold its key?
    pub(crate) fn is_remote(&self) -> bool {
        self.app.access & REMOTE_ACCESS != 0
    }

    pub(crate) fn hardware(&self) -> *mut ibv_mr {
        self.hardware.load(Ordering::Acquire)
    }

    /// The hardware's lkey and rkey; `None` while released, or if the memory was gone at the restart.
    #[must_use]
    pub fn hardware_keys(&self) -> Option<(HardwareKey, HardwareKey)> {
        // SAFETY: null or the device's own, alive under the gate.
        unsafe { self.hardware().as_ref() }
            .map(|region| (HardwareKey(region.lkey), HardwareKey(region.rkey)))
    }

    pub(crate) fn release(&self) -> Verb<()> {
        let hardware = self.hardware.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if hardware.is_null() {
            return Ok(());
        }
        // SAFETY: the device's own; nothing is outstanding on it.
        Errno::check(unsafe { (self.context.verbs.ibv_dereg_mr)(hardware) })
    }

    /// Registers the same memory again.
    pub(crate) fn rebuild(&self) -> Verb<()> {
        // A fresh key that equals a live virtual one is no harm here: every key that predates the restart goes through
        // the tables.
        self.register_hardware(|_| false).map(drop)
    }

    /// Registers until a key comes that `refuse` lets pass, and gives back the others: burn and retry.
    fn register_hardware(&self, refuse: impl Fn(&ibv_mr) -> bool) -> Verb<*mut ibv_mr> {
        let verbs = self.context.verbs;
        let mut burnt = Vec::new();
        let result = loop {
            // SAFETY: the domain outlives its regions; the gate is held or closed by us.
            let tried = verbs.pointer(unsafe {
                (verbs.ibv_reg_mr_iova2)(
                    (*self.domain).hardware(),
                    self.app.public.addr,
                    self.app.public.length,
                    self.iova,
                    self.app.access as u32,
                )
            });
            match tried {
                // SAFETY: the device's own object, just made.
                Ok(hardware) if refuse(unsafe { &*hardware }) => burnt.push(hardware),
                other => break other,
            }
        };
        for hardware in burnt {
            // SAFETY: made above, never handed out.
            unsafe { (verbs.ibv_dereg_mr)(hardware) };
        }
        self.hardware.store(result?, Ordering::Release);
        result
    }
}
