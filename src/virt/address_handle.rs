//! Address handles: where a datagram goes.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use rdma_core_sys::{ibv_ah, ibv_ah_attr, ibv_pd};

use super::context::Context;
use super::process::{Registered, lock, process};
use super::protection_domain::ProtectionDomain;
use crate::errno::{Errno, Verb};
use crate::handle::{VirtualGid, VirtualLid};
use crate::translate::{Address, KeyTable};

/// An address handle; the application's object is its first field.
#[derive(Debug)]
#[repr(C)]
pub struct AddressHandle {
    app: ibv_ah,
    pub(crate) context: Arc<Context>,
    domain: *const ProtectionDomain,
    /// In the application's terms.
    attr: ibv_ah_attr,
    hardware: AtomicPtr<ibv_ah>,
    /// Queue pair numbers at the destination; from the first restart on.
    qpns: AtomicPtr<KeyTable>,
    /// Where datagrams go instead, if nobody is at the address any more; else 0.
    dead_end: AtomicU32,
    /// Keeps `qpns` alive.
    qpns_owner: Mutex<Option<Arc<KeyTable>>>,
    index: AtomicUsize,
}

/// `ibv_create_ah`.
///
/// # Safety
/// `pd` must come from us; `attr` must be valid.
///
/// # Errors
/// What the device answers.
pub unsafe fn create(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> Verb<*mut ibv_ah> {
    // SAFETY: as the caller vouches.
    let (domain, attr) = unsafe { (ProtectionDomain::of(pd), *attr) };
    let _inside = domain.context.enter()?;
    let handle = Box::new(AddressHandle {
        app: ibv_ah {
            context: domain.context.app(),
            pd,
            handle: 0,
        },
        context: Arc::clone(&domain.context),
        domain,
        attr,
        hardware: AtomicPtr::default(),
        qpns: AtomicPtr::default(),
        dead_end: AtomicU32::new(0),
        qpns_owner: Mutex::default(),
        index: AtomicUsize::new(0),
    });
    handle.rebuild()?;
    let handle = Box::leak(handle);
    let index = domain
        .context
        .objects()
        .address_handles
        .insert(Registered((&*handle).into()));
    handle.index.store(index, Ordering::Relaxed);
    Ok(&raw mut handle.app)
}

/// `ibv_destroy_ah`.
///
/// # Safety
/// `app` must come from [`create`] and not be used after success.
///
/// # Errors
/// What the device answers.
pub unsafe fn destroy(app: *mut ibv_ah) -> Verb<()> {
    // SAFETY: as the caller vouches.
    unsafe {
        let handle = AddressHandle::of(app);
        let _inside = handle.context.enter()?;
        if !handle.hardware().is_null() {
            Errno::check((handle.context.verbs.ibv_destroy_ah)(handle.hardware()))?;
        }
        handle
            .context
            .objects()
            .address_handles
            .remove(handle.index.load(Ordering::Relaxed));
        drop(Box::from_raw(app.cast::<AddressHandle>()));
    }
    Ok(())
}

impl AddressHandle {
    /// Port and index of the address that datagrams leave from, where the application has named one.
    pub(crate) fn source(&self) -> Option<(u8, u8)> {
        (self.attr.is_global != 0).then_some((self.attr.port_num, self.attr.grh.sgid_index))
    }

    /// # Safety
    /// `app` must come from [`create`] and not be destroyed while the reference is used.
    #[inline(always)]
    pub(crate) unsafe fn of<'a>(app: *mut ibv_ah) -> &'a Self {
        // SAFETY: as the caller vouches; `app` is the first field.
        unsafe { &*app.cast::<Self>() }
    }

    #[inline(always)]
    pub(crate) fn hardware(&self) -> *mut ibv_ah {
        self.hardware.load(Ordering::Acquire)
    }

    /// The hardware's number for a queue pair at the destination. One that is in no table is younger than the last
    /// restart and means itself.
    pub(crate) fn remote_qpn(&self, qpn: u32) -> u32 {
        match self.dead_end.load(Ordering::Relaxed) {
            0 => {}
            dead_end => return dead_end,
        }
        // SAFETY: null or kept alive by `qpns_owner` until the gate is closed.
        unsafe { self.qpns.load(Ordering::Acquire).as_ref() }
            .and_then(|qpns| qpns.get(qpn))
            .unwrap_or(qpn)
    }

    /// Where it leads, in the application's terms; `None` for a group.
    pub(crate) fn destination(&self) -> Option<Address> {
        super::queue_pair::leads_to_a_port(&self.attr).then(|| address_of(&self.attr))
    }

    pub(crate) fn release(&self) {
        let hardware = self.hardware.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if !hardware.is_null() {
            // SAFETY: the device's own; no send that names it is outstanding.
            unsafe { (self.context.verbs.ibv_destroy_ah)(hardware) };
        }
    }

    /// Makes the hardware's object, for the address as it is now.
    pub(crate) fn rebuild(&self) -> Verb<()> {
        // There is one if a connect has failed half-way.
        self.release();
        let directory = process().directory();
        let mut attr = self.attr;
        if let Some(directory) = &directory {
            attr = super::queue_pair::translate_address(&self.context, directory, &attr)
                .ok_or(Errno::INVALID)?;
            let qpns = directory.qpns_at(address_of(&self.attr));
            self.qpns.store(
                qpns.as_ref()
                    .map_or(std::ptr::null_mut(), |qpns| Arc::as_ptr(qpns).cast_mut()),
                Ordering::Release,
            );
            *lock(&self.qpns_owner) = qpns;
        }
        self.dead_end.store(0, Ordering::Relaxed);
        self.make(&mut attr)
    }

    /// Nobody is at the address any more: what is sent there goes to a queue pair that takes nothing, and is lost, as on a wire
    /// that leads nowhere.
    pub(crate) fn park(&self) -> Verb<()> {
        let (mut own, number) = self.context.dead_end(&self.attr)?;
        self.dead_end.store(number.0, Ordering::Relaxed);
        self.make(&mut own)
    }

    fn make(&self, attr: &mut ibv_ah_attr) -> Verb<()> {
        let verbs = self.context.verbs;
        // SAFETY: the domain outlives its handles; the gate is held or closed by us.
        let hardware =
            verbs.pointer(unsafe { (verbs.ibv_create_ah)((*self.domain).hardware(), attr) })?;
        self.hardware.store(hardware, Ordering::Release);
        Ok(())
    }
}

/// How the destination of an address vector is known in the job.
pub(crate) fn address_of(attr: &ibv_ah_attr) -> Address {
    if attr.is_global != 0 {
        // SAFETY: both views of a GID are plain bytes.
        Address::Gid(VirtualGid(unsafe { attr.grh.dgid.raw }))
    } else {
        Address::Lid(VirtualLid(attr.dlid))
    }
}
