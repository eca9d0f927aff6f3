//! Registration with the libibverbs that loaded us, and the life of its contexts.
//!
//! The constructor of the library registers one driver that claims every kernel RDMA device. libibverbs is reached only
//! through `dlsym`: nothing here is bound to one release, or keeps a program from starting that has no libibverbs.

use crate::release::{
    Detected, Layout, MATCH_DRIVER_ID, MATCH_SENTINEL, Refusal, VerbsDevice, VerbsDeviceOps,
    VerbsMatchEntry, VerbsSysfsDevice, detect,
};
use crate::verbs;
use rdma_core_sys::{ibv_context, ibv_device};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::Write;
use std::mem::{size_of, transmute};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::OnceLock;

/// What libibverbs knows of the kernel device of a context.
#[derive(Debug, Clone, Copy)]
pub struct SysfsFacts<'a> {
    /// The device's name: `mlx5_0`, `rxe0`.
    pub ibdev_name: &'a CStr,
    /// The device's folder in sysfs: a zero-terminated string in an array of [`IBDEV_PATH_SIZE`] bytes that the provider
    /// may rewrite. libibverbs reads P_Keys, and GIDs of contexts without GID ioctls, from the folder that it names. The
    /// array belongs to the device, so all contexts of the device share it.
    pub ibdev_path: *mut c_char,
    /// The kernel driver's number (`enum rdma_driver_id`).
    pub driver_id: u32,
}

/// Size of the array behind [`SysfsFacts::ibdev_path`], in bytes, terminating zero included.
pub const IBDEV_PATH_SIZE: usize = 256;

/// The layout of the release that this library is registered with.
///
/// # Panics
///
/// Before the registration; no operation can be called then.
pub fn layout() -> &'static Layout {
    registered().detected.layout
}

/// What libibverbs knows of the device of a context.
///
/// # Safety
///
/// `context` must be a live context that [`verbs::opened`] was called for.
pub unsafe fn sysfs_facts<'a>(context: *mut ibv_context) -> SysfsFacts<'a> {
    // SAFETY: a live context has its device, which this library allocated as a VerbsDevice, and a device of the kernel
    // has its sysfs record for as long as the context holds the device.
    let sysfs = unsafe { (*(*context).device.cast::<VerbsDevice>()).sysfs };
    // SAFETY: as above; libibverbs terminates the name, and never changes it or the driver id after the match.
    unsafe {
        SysfsFacts {
            ibdev_name: CStr::from_ptr((&raw const (*sysfs).ibdev_name).cast()),
            ibdev_path: (&raw mut (*sysfs).ibdev_path).cast(),
            driver_id: (*sysfs).driver_id,
        }
    }
}

/// The one pointer that each context carries for the provider; null until the provider sets it.
///
/// # Safety
///
/// `context` must be a context that [`verbs::opened`] was called for, and not yet have been given to [`uninit_context`].
pub unsafe fn provider_data(context: *mut ibv_context) -> *mut *mut c_void {
    // SAFETY: ibv_context is the last member of verbs_context, and alloc_context asked for one pointer behind that.
    unsafe { context.add(1).cast() }
}

/// Ends a context: closes `cmd_fd` and `async_fd`, lets go of the device and frees the memory. The last thing that the
/// `free_context` operation does.
///
/// # Safety
///
/// `context` must be a live context of this provider; it is gone afterwards.
pub unsafe fn uninit_context(context: *mut ibv_context) {
    let registered = registered();
    // SAFETY: ibv_context is the last member of the verbs_context at the head of the allocation.
    let verbs_context =
        unsafe { context.byte_sub(registered.detected.layout.context_offset()) }.cast::<c_void>();
    // SAFETY: verbs_context was made by _verbs_init_and_alloc_context, which allocates with the C library's calloc.
    unsafe {
        (registered.functions.uninit_context)(verbs_context);
        libc::free(verbs_context);
    }
}

/// The rdma-core release that loaded us, as its file name has it: `44.0`.
pub(crate) fn release_name() -> &'static str {
    &registered().detected.version
}

/// A public function of the libibverbs that loaded us, as of version 1.1 of its interface.
pub(crate) fn public_function(name: &'static CStr) -> Option<*const c_void> {
    registered().detected.public_function(name)
}

/// The functions of libibverbs that the provider calls.
#[derive(Debug)]
struct Functions {
    init_and_alloc_context:
        unsafe extern "C" fn(*mut ibv_device, c_int, usize, *mut c_void, u32) -> *mut c_void,
    set_ops: unsafe extern "C" fn(*mut c_void, *const *const c_void),
    uninit_context: unsafe extern "C" fn(*mut c_void),
}

impl Functions {
    fn of(detected: &Detected) -> Result<Self, Refusal> {
        let init_and_alloc_context = detected.private_function(c"_verbs_init_and_alloc_context")?;
        let set_ops = detected.private_function(c"verbs_set_ops")?;
        let uninit_context = detected.private_function(c"verbs_uninit_context")?;
        // SAFETY: these are the prototypes in driver.h of every release in the table (abi-probe.c asserts it); structures
        // that differ between releases are void here.
        unsafe {
            Ok(Self {
                init_and_alloc_context: transmute::<
                    *const c_void,
                    unsafe extern "C" fn(
                        *mut ibv_device,
                        c_int,
                        usize,
                        *mut c_void,
                        u32,
                    ) -> *mut c_void,
                >(init_and_alloc_context),
                set_ops: transmute::<
                    *const c_void,
                    unsafe extern "C" fn(*mut c_void, *const *const c_void),
                >(set_ops),
                uninit_context: transmute::<*const c_void, unsafe extern "C" fn(*mut c_void)>(
                    uninit_context,
                ),
            })
        }
    }
}

#[derive(Debug)]
struct Registered {
    detected: Detected,
    functions: Functions,
}

static REGISTERED: OnceLock<Registered> = OnceLock::new();

fn registered() -> &'static Registered {
    REGISTERED
        .get()
        .expect("libibverbs calls a driver only after its registration")
}

/// Runs when the dynamic loader has mapped the library. `.init_array` by hand, as the one line that it is.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

extern "C" fn constructor() {
    let result = catch_unwind(|| {
        if in_base_namespace() {
            register()
        } else {
            Ok(())
        }
    });
    let message = match result {
        Ok(Ok(())) => return,
        Ok(Err(refusal)) => refusal.to_string(),
        Err(_) => "internal error while registering".to_owned(),
    };
    // Nothing else can carry this: the application has not called anything yet. If stderr is closed, so be it.
    let _ = writeln!(
        std::io::stderr(),
        "reverbs: not active in this process: {message}"
    );
}

/// Whether this copy of the library is in the namespace of the application. The second libibverbs, in a namespace of its
/// own, reads the same environment as the first and loads us again; there the real drivers have to win.
fn in_base_namespace() -> bool {
    // SAFETY: all-zero is a valid Dl_info.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    let mut link_map = null_mut::<c_void>();
    let mut namespace: libc::Lmid_t = -1;
    let own_address = constructor as *const c_void;
    // SAFETY: dladdr1 looks an address up and writes to info and link_map; a link map is a handle to dlinfo, which writes
    // to namespace.
    unsafe {
        libc::dladdr1(
            own_address,
            &raw mut info,
            &raw mut link_map,
            RTLD_DL_LINKMAP,
        ) != 0
            && libc::dlinfo(link_map, libc::RTLD_DI_LMID, (&raw mut namespace).cast()) == 0
            && namespace == libc::LM_ID_BASE
    }
}

/// `RTLD_DL_LINKMAP` of glibc's dlfcn.h.
const RTLD_DL_LINKMAP: c_int = 2;

fn register() -> Result<(), Refusal> {
    let Some(detected) = detect()? else {
        return Ok(());
    };
    let functions = Functions::of(&detected)?;
    let address = detected.register_function()?;
    // SAFETY: the prototype in driver.h of every release in the table.
    let register_driver =
        unsafe { transmute::<*const c_void, unsafe extern "C" fn(*const VerbsDeviceOps)>(address) };
    if REGISTERED
        .set(Registered {
            detected,
            functions,
        })
        .is_ok()
    {
        // SAFETY: DRIVER is immutable and lives as long as the library, which libibverbs never unloads.
        unsafe { register_driver(&raw const DRIVER) };
    }
    Ok(())
}

static DRIVER: VerbsDeviceOps = VerbsDeviceOps {
    name: c"reverbs".as_ptr(),
    // The kernel driver's own ABI is between it and the real provider; ours is libibverbs' public API.
    match_min_abi_version: 0,
    match_max_abi_version: u32::MAX,
    match_table: (&raw const MATCH_TABLE).cast(),
    static_providers: std::ptr::null(),
    match_device: None,
    alloc_context: Some(alloc_context),
    import_context: None,
    alloc_device: Some(alloc_device),
    uninit_device: Some(uninit_device),
};

/// Greater than every number in `enum rdma_driver_id` (22 in rdma-core 65), so that newer kernel drivers are claimed too.
const DRIVER_IDS: usize = 64;

/// Every driver id but 0, which is `RDMA_DRIVER_UNKNOWN` and never matches, then the sentinel.
static MATCH_TABLE: [VerbsMatchEntry; DRIVER_IDS] = {
    const SENTINEL: VerbsMatchEntry = VerbsMatchEntry {
        driver_data: null_mut(),
        driver_id: 0,
        vendor: 0,
        device: 0,
        kind: MATCH_SENTINEL,
    };
    let mut table = [SENTINEL; DRIVER_IDS];
    let mut index = 0;
    while index < DRIVER_IDS - 1 {
        table[index].driver_id = index as u64 + 1;
        table[index].kind = MATCH_DRIVER_ID;
        index += 1;
    }
    table
};

/// libibverbs fills in the rest.
unsafe extern "C" fn alloc_device(_sysfs: *mut VerbsSysfsDevice) -> *mut VerbsDevice {
    // SAFETY: calloc has no precondition; libibverbs handles null.
    let device = unsafe { libc::calloc(1, size_of::<VerbsDevice>()) }.cast::<VerbsDevice>();
    if !device.is_null() {
        // SAFETY: device is ours, zeroed, and all-zero is a valid VerbsDevice.
        unsafe { (*device).core_support = CORE_SUPPORT_OPTIONAL_MR_ACCESS };
    }
    device
}

/// `IB_UVERBS_CORE_SUPPORT_OPTIONAL_MR_ACCESS` of rdma/ib_user_ioctl_verbs.h. With it, `ibv_reg_mr` hands optional access
/// flags (relaxed ordering) on to us, and the libibverbs below, which knows its device, takes them off where it must.
const CORE_SUPPORT_OPTIONAL_MR_ACCESS: u64 = 1;

unsafe extern "C" fn uninit_device(device: *mut VerbsDevice) {
    // SAFETY: device is from alloc_device and libibverbs is done with it.
    unsafe { libc::free(device.cast()) }
}

/// Opens a context on a device of ours. Owns `cmd_fd`, which is closed if this fails (`verbs_open_device`).
unsafe extern "C" fn alloc_context(
    device: *mut ibv_device,
    cmd_fd: c_int,
    _private_data: *mut c_void,
) -> *mut c_void {
    let Registered {
        detected: Detected { layout, .. },
        functions,
    } = registered();
    // SAFETY: libibverbs opens a device only after it has set the sysfs record that it matched.
    let driver_id = unsafe { (*(*device.cast::<VerbsDevice>()).sysfs).driver_id };
    // The provider's one pointer follows the context.
    let size = layout.verbs_context_size + size_of::<*mut c_void>();
    // SAFETY: the prototype is this release's; a null context_offset puts verbs_context at the head of the allocation,
    // which holds it. On failure cmd_fd is closed and errno set.
    let verbs_context =
        unsafe { (functions.init_and_alloc_context)(device, cmd_fd, size, null_mut(), driver_id) };
    if verbs_context.is_null() {
        return null_mut();
    }
    // SAFETY: ibv_context is the last member of verbs_context.
    let context = unsafe { verbs_context.byte_add(layout.context_offset()) }.cast::<ibv_context>();
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let operations = layout.operations(verbs::OPS);
        // SAFETY: verbs_context is initialised and operations is a verbs_context_ops of this release, which is copied.
        unsafe { (functions.set_ops)(verbs_context, operations.as_ptr()) };
        // SAFETY: context is live and its device is ours.
        let facts = unsafe { sysfs_facts(context) };
        verbs::opened(context, facts.ibdev_name)
    }));
    let error = match opened {
        Ok(Ok(())) => return verbs_context,
        Ok(Err(error)) => error,
        Err(_) => libc::EIO,
    };
    // SAFETY: nobody else has seen context; this closes cmd_fd. errno is this thread's own.
    unsafe {
        uninit_context(context);
        *libc::__errno_location() = error;
    }
    null_mut()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::release::LAYOUTS;

    #[test]
    fn every_driver_id_but_unknown_matches() {
        let (sentinel, entries) = MATCH_TABLE.split_last().expect("not empty");
        assert_eq!(sentinel.kind, MATCH_SENTINEL);
        for (index, entry) in entries.iter().enumerate() {
            assert_eq!(
                (entry.kind, entry.driver_id),
                (MATCH_DRIVER_ID, index as u64 + 1)
            );
        }
    }

    #[test]
    fn a_device_is_zero_but_for_what_the_core_supports() {
        // SAFETY: the argument is not used.
        let device = unsafe { alloc_device(null_mut()) };
        // SAFETY: device is a fresh VerbsDevice, which libibverbs asserts to hold no old operations.
        unsafe {
            assert!((*device).ops.is_null() && (*device).sysfs.is_null());
            assert!(
                (*device).device._ops._dummy1.is_none() && (*device).device._ops._dummy2.is_none()
            );
            assert_eq!((*device).core_support, 1);
            uninit_device(device);
        }
    }

    #[test]
    fn every_operation_is_a_slot_of_every_release_or_came_later() {
        let newest = &LAYOUTS[LAYOUTS.len() - 1];
        for (name, function) in verbs::OPS {
            assert!(
                newest.slot(name).is_some(),
                "{name} is not a member of verbs_context_ops"
            );
            assert!(!function.is_null(), "{name}");
        }
    }
}
