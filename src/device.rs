//! The boundary to the device below: the public verbs, as a table of functions.
//!
//! The native device fills the table from a second libibverbs in a link namespace of its own; a device made of software
//! fills it with its own functions. The data path is not in the table: as in libibverbs it is called through
//! `context->ops` of the objects that the table hands out.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::RawFd;

use rdma_core_sys::{
    ibv_ah, ibv_ah_attr, ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq,
    ibv_cq_init_attr_ex, ibv_device, ibv_device_attr_ex, ibv_gid, ibv_gid_entry, ibv_mr, ibv_pd,
    ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_qp_init_attr_ex,
    ibv_query_device_ex_input, ibv_srq, ibv_srq_attr, ibv_srq_init_attr, verbs_context,
};

use crate::errno::{Errno, Verb};

macro_rules! table {
    ($($name:ident ( $($arg:ident : $kind:ty),* ) $(-> $result:ty)?;)*) => {
        /// The verbs of a device, with the signatures and conventions of `<infiniband/verbs.h>`.
        #[derive(Clone, Debug)]
        #[allow(missing_docs, reason = "each is the verb of that name in verbs.h")]
        pub struct Verbs {
            $(pub $name: unsafe extern "C" fn($($kind),*) $(-> $result)?,)*
            /// Address of the calling thread's `errno` in the C library that the device lives in.
            pub errno_location: unsafe extern "C" fn() -> *mut c_int,
        }

        impl Verbs {
            /// Fills the table by name.
            ///
            /// # Safety
            /// What `resolve` returns for a name must be the verb of that name.
            ///
            /// # Errors
            /// The first name that is not there.
            pub unsafe fn load(
                resolve: impl Fn(&CStr) -> Option<*mut c_void>,
                errno_location: unsafe extern "C" fn() -> *mut c_int,
            ) -> Result<Self, String> {
                let find = |name: &str| {
                    let name = CString::new(name).map_err(|error| error.to_string())?;
                    resolve(&name).ok_or_else(|| name.to_string_lossy().into_owned())
                };
                Ok(Self {
                    $(
                        // SAFETY: the caller vouches that the address is that of the verb with this name, whose
                        // signature is fixed by the public header.
                        $name: unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($kind),*) $(-> $result)?>(
                                find(stringify!($name))?,
                            )
                        },
                    )*
                    errno_location,
                })
            }
        }
    };
}

table! {
    ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device;
    ibv_free_device_list(list: *mut *mut ibv_device);
    ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
    ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
    ibv_close_device(context: *mut ibv_context) -> c_int;
    ibv_get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
    ibv_ack_async_event(event: *mut ibv_async_event);
    _ibv_query_gid_table(context: *mut ibv_context, entries: *mut ibv_gid_entry, room: usize, flags: u32,
        entry_size: usize) -> isize;
    ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
    ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int;
    ibv_reg_mr_iova2(pd: *mut ibv_pd, addr: *mut c_void, length: usize, iova: u64, access: u32) -> *mut ibv_mr;
    ibv_dereg_mr(mr: *mut ibv_mr) -> c_int;
    ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
    ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
    ibv_create_cq(context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void, channel: *mut ibv_comp_channel,
        vector: c_int) -> *mut ibv_cq;
    ibv_resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int;
    ibv_destroy_cq(cq: *mut ibv_cq) -> c_int;
    ibv_get_cq_event(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, context: *mut *mut c_void) -> c_int;
    ibv_ack_cq_events(cq: *mut ibv_cq, count: u32);
    ibv_create_srq(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq;
    ibv_modify_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int;
    ibv_query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int;
    ibv_destroy_srq(srq: *mut ibv_srq) -> c_int;
    ibv_create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    ibv_query_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int, init: *mut ibv_qp_init_attr) -> c_int;
    ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int;
    ibv_destroy_qp(qp: *mut ibv_qp) -> c_int;
    ibv_attach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int;
    ibv_detach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int;
    ibv_create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah;
    ibv_destroy_ah(ah: *mut ibv_ah) -> c_int;
}

impl Verbs {
    /// The device's own `errno`, to be read right after a verb returned null.
    #[must_use]
    pub fn errno(&self) -> Errno {
        // SAFETY: the function returns the address of this thread's errno, valid for the life of the thread.
        Errno(unsafe { *(self.errno_location)() })
    }

    /// A verb that returns a pointer, or null and `errno`.
    ///
    /// # Errors
    /// The device's `errno` where the pointer is null.
    pub fn pointer<T>(&self, result: *mut T) -> Verb<*mut T> {
        if result.is_null() {
            Err(self.errno())
        } else {
            Ok(result)
        }
    }

    /// Names of the devices there are now.
    ///
    /// # Errors
    /// The device's `errno`.
    pub fn device_names(&self) -> Verb<Vec<String>> {
        let mut names = Vec::new();
        self.with_devices(|_, name| {
            names.push(name.to_string_lossy().into_owned());
            Ok(())
        })?;
        Ok(names)
    }

    /// Opens the device called `name`.
    ///
    /// # Errors
    /// `ENODEV` if there is none of that name, else the device's `errno`.
    pub fn open(&self, name: &CStr) -> Verb<*mut ibv_context> {
        self.open_where(|_, candidate| candidate == name)
    }

    /// Opens the device whose char device is called `node` (`uverbs0`). libibverbs keeps its list across a restore on
    /// another boot and takes a device of the same number there for the one it knew, name and all (`same_sysfs_dev`).
    ///
    /// # Errors
    /// `ENODEV` if there is none, else the device's `errno`.
    pub fn open_node(&self, node: &CStr) -> Verb<*mut ibv_context> {
        // SAFETY: the array holds a C string (`try_driver` of libibverbs copies one).
        self.open_where(|device, _| unsafe { CStr::from_ptr((*device).dev_name.as_ptr()) == node })
    }

    fn open_where(
        &self,
        wanted: impl Fn(*mut ibv_device, &CStr) -> bool,
    ) -> Verb<*mut ibv_context> {
        let mut found = Err(Errno::NO_DEVICE);
        self.with_devices(|device, name| {
            if wanted(device, name) {
                // SAFETY: `device` comes from the list, which is freed only after this call.
                found = self.pointer(unsafe { (self.ibv_open_device)(device) });
            }
            Ok(())
        })?;
        found
    }

    fn with_devices(&self, mut visit: impl FnMut(*mut ibv_device, &CStr) -> Verb<()>) -> Verb<()> {
        let mut count = 0;
        // SAFETY: the list holds `count` devices, each with a NUL-terminated name, until it is freed below.
        unsafe {
            let list = self.pointer((self.ibv_get_device_list)(&raw mut count))?;
            let mut result = Ok(());
            for index in 0..usize::try_from(count).unwrap_or(0) {
                let device = *list.add(index);
                let name = CStr::from_ptr((self.ibv_get_device_name)(device));
                result = result.and_then(|()| visit(device, name));
            }
            (self.ibv_free_device_list)(list);
            result
        }
    }
}

/// The extended part in front of a context that the device handed out (`verbs_get_ctx` of verbs.h).
///
/// # Safety
/// `context` must come from `ibv_open_device` of a libibverbs with extended operations (all since 1.1.7).
#[must_use]
pub unsafe fn extended(context: *mut ibv_context) -> *mut verbs_context {
    // `verbs_context` grows at its head, so the distance from its end is the same in every release.
    context
        .wrapping_byte_sub(std::mem::offset_of!(verbs_context, context))
        .cast()
}

/// `ibv_query_device_ex`.
///
/// # Safety
/// `context` as for [`extended`]; `attr` must have room for `size` bytes.
///
/// # Errors
/// What the device answers; `EOPNOTSUPP` where it has no such verb.
pub unsafe fn query_device_ex(
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    size: usize,
) -> Verb<()> {
    // SAFETY: as the caller vouches.
    unsafe {
        let query = (*extended(context))
            .query_device_ex
            .ok_or(Errno::NOT_SUPPORTED)?;
        Errno::check(query(context, input, attr, size))
    }
}

/// `ibv_query_port`, with all the fields of `ibv_port_attr`.
///
/// # Safety
/// `context` as for [`extended`]; `attr` must be valid for writes.
///
/// # Errors
/// What the device answers.
pub unsafe fn query_port(
    context: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
) -> Verb<()> {
    // SAFETY: as the caller vouches.
    unsafe {
        let query = (*extended(context))
            .query_port
            .ok_or(Errno::NOT_SUPPORTED)?;
        Errno::check(query(context, port, attr, size_of::<ibv_port_attr>()))
    }
}

/// All attributes of a device.
///
/// # Safety
/// `context` as for [`extended`].
///
/// # Errors
/// What the device answers; `EOPNOTSUPP` where it has no such verb.
pub unsafe fn attributes(context: *mut ibv_context) -> Verb<ibv_device_attr_ex> {
    // SAFETY: as the caller vouches; zero is valid for the attributes, and all of it may be written to.
    unsafe {
        let mut attributes: ibv_device_attr_ex = std::mem::zeroed();
        let size = size_of_val(&attributes);
        query_device_ex(context, std::ptr::null(), &raw mut attributes, size)?;
        Ok(attributes)
    }
}

/// All attributes of a port.
///
/// # Safety
/// `context` as for [`extended`].
///
/// # Errors
/// What the device answers.
pub unsafe fn port_attributes(context: *mut ibv_context, port: u8) -> Verb<ibv_port_attr> {
    // SAFETY: as the caller vouches; zero is valid for the attributes.
    unsafe {
        let mut attributes: ibv_port_attr = std::mem::zeroed();
        query_port(context, port, &raw mut attributes)?;
        Ok(attributes)
    }
}

/// log2 of a port's path MTU in bytes: `enum ibv_mtu` counts from 256 bytes, log2 8, as 1.
#[must_use]
pub fn mtu_bits(port: &ibv_port_attr) -> u8 {
    port.active_mtu as u8 + 7
}

impl Verbs {
    /// `ibv_create_cq_ex`.
    ///
    /// # Safety
    /// `context` as for [`extended`]; `attr` must be valid.
    ///
    /// # Errors
    /// What the device answers; `EOPNOTSUPP` where it has no such verb.
    pub unsafe fn create_cq_ex(
        &self,
        context: *mut ibv_context,
        attr: &mut ibv_cq_init_attr_ex,
    ) -> Verb<*mut ibv_cq> {
        // SAFETY: as the caller vouches. An extended queue begins as a queue does (`ibv_cq_ex_to_cq`).
        unsafe {
            let create = (*extended(context))
                .create_cq_ex
                .ok_or(Errno::NOT_SUPPORTED)?;
            self.pointer(create(context, attr).cast())
        }
    }

    /// `ibv_create_qp_ex`.
    ///
    /// # Safety
    /// `context` as for [`extended`]; `attr` must be valid.
    ///
    /// # Errors
    /// What the device answers; `EOPNOTSUPP` where it has no such verb.
    pub unsafe fn create_qp_ex(
        &self,
        context: *mut ibv_context,
        attr: &mut ibv_qp_init_attr_ex,
    ) -> Verb<*mut ibv_qp> {
        // SAFETY: as the caller vouches.
        unsafe {
            let create = (*extended(context))
                .create_qp_ex
                .ok_or(Errno::NOT_SUPPORTED)?;
            self.pointer(create(context, attr))
        }
    }
}

/// The file behind a device's context.
///
/// # Safety
/// `context` must be open.
#[must_use]
pub unsafe fn command_fd(context: *mut ibv_context) -> RawFd {
    // SAFETY: as the caller vouches.
    unsafe { (*context).cmd_fd }
}

impl Verbs {
    /// The GIDs there are on all ports of a device (`ibv_query_gid_table`).
    ///
    /// # Safety
    /// `context` must be open.
    ///
    /// # Errors
    /// What the device answers.
    pub unsafe fn gid_table(&self, context: *mut ibv_context) -> Verb<Vec<ibv_gid_entry>> {
        /// The most the kernel takes: the length of an ioctl's attribute has 16 bits. rxe has 1,024 on its one port.
        const ROOM: usize = u16::MAX as usize / size_of::<ibv_gid_entry>();
        let mut entries = Vec::<ibv_gid_entry>::with_capacity(ROOM);
        // SAFETY: as the caller vouches; there is room for as many entries as is said, and as many as are answered are
        // initialized.
        unsafe {
            let size = size_of::<ibv_gid_entry>();
            let count = (self._ibv_query_gid_table)(context, entries.as_mut_ptr(), ROOM, 0, size);
            let count = usize::try_from(count).map_err(|_| Errno(count.unsigned_abs() as i32))?;
            entries.set_len(count);
        }
        Ok(entries)
    }
}
