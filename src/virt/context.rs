//! An open device.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex};

use kmod_compat::ports::DeviceFacts;
use rdma_core_sys::{ibv_context, ibv_device_attr_ex, ibv_port_attr, ibv_query_device_ex_input};
use slab::Slab;

use super::address_handle::AddressHandle;
use super::channel::EventPipe;
use super::completion_queue::CompletionQueue;
use super::gate::Inside;
use super::memory_region::MemoryRegion;
use super::memory_window::MemoryWindow;
use super::own_pair::OwnPair;
use super::ports::{self, PortMap};
use super::process::{Process, Registered, lock, process};
use super::protection_domain::ProtectionDomain;
use super::queue_pair::QueuePair;
use super::shared_receive_queue::SharedReceiveQueue;
use crate::control::job_numbers;
use crate::control::socket::runtime_dir;
use crate::device::{self, Verbs};
use crate::errno::{Errno, Verb};
use crate::translate::{Directory, KeyTable};

/// An open device, from `ibv_open_device` to `ibv_close_device`.
#[derive(Debug)]
pub struct Context {
    app: *mut ibv_context,
    /// Who opened it: after a fork, the parent.
    process: &'static Process,
    pub(crate) verbs: &'static Verbs,
    hardware: AtomicPtr<ibv_context>,
    pub(crate) objects: Mutex<Objects>,
    /// Where asynchronous events are handed to the application.
    pub(crate) events: EventPipe,
    names: Mutex<Names>,
    /// What the device said of itself at the first open, as the application goes on being told; `None` if it says nothing.
    pub(super) attributes: Option<ibv_device_attr_ex>,
    /// Local keys, from the first restart on: every live one is here.
    pub(crate) lkeys: KeyTable,
    /// Keys of memory windows, without the byte that changes.
    pub(crate) window_keys: KeyTable,
    /// Hardware queue pair numbers back to virtual ones, for completions of shared receive queues.
    pub(crate) qpns_back: Mutex<std::sync::Arc<KeyTable>>,
    /// The device as the application first saw it; noted when it is first let go of.
    pub(crate) first_seen: Mutex<Option<Arc<DeviceFacts>>>,
    /// Ports as first seen beside as they are now; empty before the first restart.
    pub(crate) ports: Mutex<Vec<PortMap>>,
    /// Where queue pairs whose peer is gone are parked.
    pub(crate) dead_end: Mutex<Option<OwnPair>>,
    /// Whether the device below tells how far a responder came; `None` before that was tried (`super::responder`).
    pub(crate) responder_psn_is_live: Mutex<Option<bool>>,
    /// The device below was opened after a restart, and is of the kind whose doorbell may be refused (`queue_pair::doorbell`).
    pub(crate) rings_by_write: AtomicBool,
    /// Leads the queries that libibverbs answers past the provider to a folder of ours.
    pub(crate) lead_queries: LeadQueries,
}

// SAFETY: `app` is libibverbs' object, used for its identity and its file descriptor number only; the rest is shared by
// its own types.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

#[derive(Clone, Debug)]
struct Names {
    /// At the first open; never changes.
    first: CString,
    /// Of the device below now.
    hardware: CString,
}

/// All objects of a context.
#[derive(Debug, Default)]
pub struct Objects {
    pub(crate) domains: Slab<Registered<ProtectionDomain>>,
    pub(crate) regions: Slab<Registered<MemoryRegion>>,
    pub(crate) windows: Slab<Registered<MemoryWindow>>,
    pub(crate) completion_queues: Slab<Registered<CompletionQueue>>,
    pub(crate) shared_queues: Slab<Registered<SharedReceiveQueue>>,
    pub(crate) queue_pairs: Slab<Registered<QueuePair>>,
    pub(crate) address_handles: Slab<Registered<AddressHandle>>,
}

/// Makes libibverbs answer what it answers past the provider (GIDs, P_Keys) from the folder of a device tree.
/// Called while the context's command file is `/dev/null`.
///
/// # Safety
/// The context must be open.
pub type LeadQueries = unsafe fn(*mut ibv_context, &Path) -> Verb<()>;

/// What `ibv_open_device` must find in the context it returns.
#[derive(Debug)]
pub struct Opened {
    /// For `context->async_fd`.
    pub async_fd: RawFd,
    /// For `context->num_comp_vectors`.
    pub completion_vectors: i32,
}

/// Opens the device `name` below `app`, whose command file is replaced by the hardware's under the same number, so that
/// what libibverbs asks the kernel past the provider is answered by the device below.
///
/// # Safety
/// `app` must be the context that libibverbs is opening, with `cmd_fd` set.
///
/// # Errors
/// Those of the device.
pub unsafe fn open(
    app: *mut ibv_context,
    name: &CStr,
    verbs: &'static Verbs,
    lead_queries: LeadQueries,
) -> Verb<Opened> {
    let process = process();
    // The file that libibverbs opened is not needed, and while we wait for the gate a checkpoint may have to let go of it.
    // SAFETY: libibverbs has opened it and is waiting for us.
    put_aside(unsafe { (*app).cmd_fd })?;
    // Before the job's numbers are looked for: an orchestrator that is about to leave them has to see us.
    crate::agent::start();
    let _inside = process.gate.enter();
    let _unsettled = process.unsettle();
    let hardware = verbs.open(name)?;
    let result = (|| {
        let events = EventPipe::new(size_of::<[u64; 2]>())?;
        let async_fd = events.read_fd();
        // SAFETY: both contexts are open.
        unsafe { replace_command_file((*app).cmd_fd, device::command_fd(hardware))? };
        let names = Names {
            first: name.to_owned(),
            hardware: name.to_owned(),
        };
        let context = Arc::new(Context {
            app,
            process,
            verbs,
            hardware: AtomicPtr::new(hardware),
            objects: Mutex::default(),
            events,
            names: Mutex::new(names),
            // SAFETY: the hardware was opened just now.
            attributes: unsafe { device::attributes(hardware) }.ok(),
            lkeys: KeyTable::default(),
            window_keys: KeyTable::default(),
            qpns_back: Mutex::default(),
            first_seen: Mutex::default(),
            ports: Mutex::default(),
            dead_end: Mutex::default(),
            responder_psn_is_live: Mutex::default(),
            rings_by_write: AtomicBool::new(false),
            lead_queries,
        });
        // SAFETY: the context is open.
        let completion_vectors = unsafe { (*hardware).num_comp_vectors };
        join_restarted_job(&context)?;
        context.watch_hardware_events();
        process.add_context(&context);
        Ok(Opened {
            async_fd,
            completion_vectors,
        })
    })();
    if result.is_err() {
        // SAFETY: opened above, not used any more.
        unsafe { (verbs.ibv_close_device)(hardware) };
    }
    result
}

/// A device opened after a restart of the job: peers name old things by old numbers (docs/identity.md, "Younger processes").
fn join_restarted_job(context: &Context) -> Verb<()> {
    let process = process();
    if process.directory().is_none()
        && let Ok(folder) = runtime_dir()
        && let Some(numbers) = job_numbers::find(&folder, std::process::id().cast_signed())
    {
        process.learn(Arc::new(Directory::new(&numbers)));
    }
    match process.directory() {
        Some(_) => ports::map_ports(context, &*ports::first_seen(context)?),
        None => Ok(()),
    }
}

/// Puts a duplicate of `from` under the number `to`, keeping close-on-exec.
pub(crate) fn replace_command_file(to: RawFd, from: RawFd) -> Verb<()> {
    // SAFETY: only file descriptor numbers are involved.
    match unsafe { libc::dup3(from, to, libc::O_CLOEXEC) } {
        -1 => Err(Errno::last()),
        _ => Ok(()),
    }
}

/// Puts something that can be saved under the number of a command file.
pub(crate) fn put_aside(command_file: RawFd) -> Verb<()> {
    let stand_in = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| error.raw_os_error().map_or(Errno::IO, Errno))?;
    replace_command_file(command_file, stand_in.as_raw_fd())
}

/// Closes the hardware below `app` and forgets the context. What libibverbs made is the caller's to free.
///
/// # Errors
/// `EINVAL` if `app` is not one of ours.
pub fn close(app: *mut ibv_context) -> Verb<()> {
    let process = process();
    if process.has_inherited(app) {
        return Ok(());
    }
    let context = process.context(app)?;
    let _inside = context.enter()?;
    let _unsettled = process.unsettle();
    let _events = process.events();
    process.remove_context(&context);
    process
        .channels()
        .retain(|channel| !channel.belongs_to(&context));
    // SAFETY: the application has no object of this context any more, or may not use it; nobody finds it in the registry.
    // libibverbs closes the command file's number after us; nothing of the hardware may be seen there until then.
    unsafe {
        lock(&context.dead_end).take();
        (context.verbs.ibv_close_device)(context.hardware());
        if let Err(error) = put_aside((*context.app()).cmd_fd) {
            tracing::warn!(%error, "a closed device stays open until libibverbs closes its file");
        }
    }
    context.set_hardware(std::ptr::null_mut());
    // It goes when the last that looks at it, the agent or an object that the application has left, is done.
    context.events.close_writer();
    crate::agent::wake();
    Ok(())
}

impl Context {
    #[must_use]
    pub fn app(&self) -> *mut ibv_context {
        self.app
    }

    /// Enters the gate of the control verbs.
    ///
    /// # Errors
    /// `EIO` in a forked child, which owns nothing of its parent's hardware.
    pub(crate) fn enter(&self) -> Verb<Inside<'static>> {
        match std::ptr::eq(self.process, process()) {
            true => Ok(self.process.gate.enter()),
            false => Err(Errno::IO),
        }
    }

    /// The context of the device below; null while released.
    #[must_use]
    pub fn hardware(&self) -> *mut ibv_context {
        self.hardware.load(Ordering::Acquire)
    }

    pub(crate) fn set_hardware(&self, hardware: *mut ibv_context) {
        self.hardware.store(hardware, Ordering::Release);
    }

    /// The name at the first open.
    #[must_use]
    pub fn name(&self) -> String {
        lock(&self.names).first.to_string_lossy().into_owned()
    }

    /// The name of the device below.
    #[must_use]
    pub fn hardware_name(&self) -> String {
        lock(&self.names).hardware.to_string_lossy().into_owned()
    }

    pub(crate) fn set_hardware_name(&self, name: &CStr) {
        lock(&self.names).hardware = name.to_owned();
    }

    pub(crate) fn objects(&self) -> std::sync::MutexGuard<'_, Objects> {
        lock(&self.objects)
    }

    /// The agent reads the hardware's events; a read must never block it.
    pub(crate) fn watch_hardware_events(&self) {
        // SAFETY: the context is open and its event file is its own.
        unsafe { super::channel::set_nonblocking((*self.hardware()).async_fd) };
        crate::agent::wake();
    }
}

/// `ibv_query_device_ex`. The answer stays what it was at the first open, GUIDs and limits included, whatever the device
/// below is now.
///
/// # Safety
/// As `ibv_query_device_ex` demands of its arguments; `attr` has room for `size` bytes.
///
/// # Errors
/// What the device answers.
pub unsafe fn query_device(
    app: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    size: usize,
) -> Verb<()> {
    let context = process().context(app)?;
    let _inside = context.enter()?;
    // SAFETY: as the caller vouches; the gate is held, so the hardware is there.
    unsafe {
        device::query_device_ex(context.hardware(), input, attr, size)?;
        if let Some(known) = &context.attributes {
            let size = size.min(size_of_val(known));
            std::ptr::copy_nonoverlapping((&raw const *known).cast::<u8>(), attr.cast(), size);
        }
    }
    Ok(())
}

/// `ibv_query_port`.
///
/// # Safety
/// `attr` must be valid for writes.
///
/// # Errors
/// What the device answers.
pub unsafe fn query_port(app: *mut ibv_context, port: u8, attr: *mut ibv_port_attr) -> Verb<()> {
    let context = process().context(app)?;
    let _inside = context.enter()?;
    // SAFETY: as the caller vouches; the gate is held, so the hardware is there.
    unsafe { device::query_port(context.hardware(), port, attr)? };
    if let Some(known) = lock(&context.ports)
        .iter()
        .find(|known| known.numbers.port == port)
    {
        // SAFETY: written by the device just now.
        unsafe {
            (*attr).lid = known.numbers.lid.0.0;
            (*attr).gid_tbl_len = known.table_length;
        }
    }
    Ok(())
}
