//! The structures of `libibverbs/driver.h` that the provider shares with libibverbs and that are the same in every
//! supported release. `check-against-sources.sh` compares each size and offset with each release's own header.

use rdma_core_sys::{ibv_device, ibv_mr};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::{offset_of, size_of};

/// `VERBS_MATCH_SENTINEL`: ends a match table.
pub const MATCH_SENTINEL: u8 = 0;
/// `VERBS_MATCH_DRIVER_ID`: match by the kernel driver's number.
pub const MATCH_DRIVER_ID: u8 = 3;

/// `struct list_node` of ccan: what libibverbs links its lists with.
#[repr(C)]
#[derive(Debug)]
pub struct ListNode {
    /// The next node.
    pub next: *mut ListNode,
    /// The previous node.
    pub previous: *mut ListNode,
}

/// `struct verbs_match_ent`: one way in which a driver recognises a device.
#[repr(C)]
#[derive(Debug)]
pub struct VerbsMatchEntry {
    /// For the driver's own use.
    pub driver_data: *mut c_void,
    /// The union's `driver_id`.
    pub driver_id: u64,
    /// PCI vendor, for `VERBS_MATCH_PCI`.
    pub vendor: u16,
    /// PCI device, for `VERBS_MATCH_PCI`.
    pub device: u16,
    /// How to match: one of the `MATCH_*` constants.
    pub kind: u8,
}

/// `struct verbs_sysfs_dev`: what libibverbs knows of a kernel device before a driver has it.
#[repr(C)]
#[derive(Debug)]
pub struct VerbsSysfsDevice {
    /// In libibverbs' list of devices without a driver.
    pub entry: ListNode,
    /// For the driver's own use.
    pub provider_data: *mut c_void,
    /// The entry of the match table that matched.
    pub match_entry: *const VerbsMatchEntry,
    /// `VSYSFS_READ_*`.
    pub flags: c_uint,
    /// `uverbsN`, zero-terminated.
    pub sysfs_name: [c_char; 64],
    /// The number of the character device.
    pub sysfs_cdev: u64,
    /// The device's name, zero-terminated.
    pub ibdev_name: [c_char; 64],
    /// The device's folder in sysfs, zero-terminated. P_Key queries, and GID queries that do not go by ioctl, read here.
    pub ibdev_path: [c_char; 256],
    /// Cached `device/modalias`.
    pub modalias: [c_char; 512],
    /// In host byte order.
    pub node_guid: u64,
    /// The kernel driver's number (`enum rdma_driver_id`), as netlink told it; 0 if it did not.
    pub driver_id: u32,
    /// `enum ibv_node_type`.
    pub node_type: c_int,
    /// The kernel's index of the device, or -1.
    pub ibdev_index: c_int,
    /// As netlink told it; 0 if it did not.
    pub port_count: u32,
    /// The kernel driver's own ABI version.
    pub abi_version: u32,
    /// Modification time of the sysfs folder.
    pub time_created: libc::timespec,
}

/// `struct verbs_device`: a device that has a driver. The driver allocates it, libibverbs fills it.
#[repr(C)]
pub struct VerbsDevice {
    /// What the application sees.
    pub device: ibv_device,
    /// The driver.
    pub ops: *const VerbsDeviceOps,
    /// Changed atomically by libibverbs.
    pub reference_count: c_int,
    /// In libibverbs' list of devices.
    pub entry: ListNode,
    /// Owned by libibverbs, which frees it before it calls `uninit_device`.
    pub sysfs: *mut VerbsSysfsDevice,
    /// `IB_UVERBS_CORE_SUPPORT_*` of the kernel. libibverbs strips optional access flags where the bit for them is absent.
    pub core_support: u64,
}

impl std::fmt::Debug for VerbsDevice {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("VerbsDevice")
            .field("sysfs", &self.sysfs)
            .finish_non_exhaustive()
    }
}

/// `struct verbs_device_ops`: a driver, as it registers itself.
#[repr(C)]
#[derive(Debug)]
pub struct VerbsDeviceOps {
    /// The driver's name in libibverbs' messages.
    pub name: *const c_char,
    /// Least kernel driver ABI version, inclusive.
    pub match_min_abi_version: u32,
    /// Greatest kernel driver ABI version, inclusive.
    pub match_max_abi_version: u32,
    /// Ends with an entry of kind [`MATCH_SENTINEL`].
    pub match_table: *const VerbsMatchEntry,
    /// For static linking only.
    pub static_providers: *const *const VerbsDeviceOps,
    /// Asked after the match table; may overrule it.
    pub match_device: Option<unsafe extern "C" fn(*mut VerbsSysfsDevice) -> bool>,
    /// Opens a device. Owns the descriptor from the call on, whatever it answers.
    pub alloc_context:
        Option<unsafe extern "C" fn(*mut ibv_device, c_int, *mut c_void) -> *mut c_void>,
    /// Opens a device on another context's descriptor (`ibv_import_device`).
    pub import_context: Option<unsafe extern "C" fn(*mut ibv_device, c_int) -> *mut c_void>,
    /// Allocates the `verbs_device` of a device that matched.
    pub alloc_device: Option<unsafe extern "C" fn(*mut VerbsSysfsDevice) -> *mut VerbsDevice>,
    /// Frees it.
    pub uninit_device: Option<unsafe extern "C" fn(*mut VerbsDevice)>,
}

// SAFETY: libibverbs only reads these two through the pointer it is given at registration; ours are immutable statics.
unsafe impl Sync for VerbsDeviceOps {}
// SAFETY: as above; ours hold no pointers.
unsafe impl Sync for VerbsMatchEntry {}

/// `struct verbs_mr`: what the `dereg_mr` and `rereg_mr` operations are given.
#[repr(C)]
pub struct VerbsMr {
    /// What the application sees.
    pub mr: ibv_mr,
    /// `enum ibv_mr_type` of `driver.h`: 0 is an ordinary region.
    pub mr_type: c_uint,
    /// The access flags that it was registered with.
    pub access: c_int,
}

impl std::fmt::Debug for VerbsMr {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("VerbsMr")
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

// The literal numbers are those of the C structures, for 64-bit targets.
const _: () = {
    assert!(size_of::<VerbsMatchEntry>() == 24 && offset_of!(VerbsMatchEntry, kind) == 20);
    assert!(size_of::<VerbsDeviceOps>() == 72 && offset_of!(VerbsDeviceOps, uninit_device) == 64);
    assert!(size_of::<VerbsDevice>() == 712 && offset_of!(VerbsDevice, sysfs) == 696);
    assert!(size_of::<VerbsSysfsDevice>() == 992 && offset_of!(VerbsSysfsDevice, driver_id) == 952);
    assert!(size_of::<VerbsMr>() == 56 && offset_of!(VerbsMr, mr_type) == 48);
};
