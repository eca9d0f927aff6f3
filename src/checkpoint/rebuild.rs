//! Fresh hardware under the same handles.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kmod_compat::devices::{self, DriverId, RdmaDevice};
use kmod_compat::netlink::Connection;
use kmod_compat::ports::DeviceFacts;
use kmod_compat::substitute::substitute;
use kmod_compat::sysfs::Sysfs;
use kmod_compat::sysfs_tree;

use super::Phase;
use super::release::{Let, undo_rebuild};
use crate::control::choice::choose;
use crate::control::message::{ContextNumbers, DeviceChoice, ProcessNumbers};
use crate::device;
use crate::errno::Errno;
use crate::translate::{Directory, KeyTable};
use crate::virt::context::{Context, replace_command_file};
use crate::virt::ports;
use crate::virt::process::{lock, process};
use crate::virt::queue_pair::Connected;

/// Opens devices and makes every object again, but leaves queue pairs unconnected. If it fails, nothing of it is left.
pub(crate) fn rebuild(choices: &[DeviceChoice], left: &Let) -> Phase<()> {
    make_all(choices, left).map_err(|what| match undo_rebuild() {
        Ok(()) => what,
        Err(error) => format!("{what}; and letting go of the rest: {error}"),
    })
}

fn make_all(choices: &[DeviceChoice], left: &Let) -> Phase<()> {
    for context in &process().contexts() {
        context.events.after_save();
        open_device(context, choices)?;
    }
    for channel in process().channels().iter() {
        channel.pipe.after_save();
        channel
            .rebuild()
            .map_err(|error| format!("completion channel: {error}"))?;
    }
    for context in &process().contexts() {
        let name = context.hardware_name();
        rebuild_objects(context).map_err(|what| format!("device {name}: {what}"))?;
        context.watch_hardware_events();
    }
    for number in &left.connection_managers {
        let path = "/dev/infiniband/rdma_cm";
        match File::options().read(true).write(true).open(path) {
            Ok(file) => {
                substitute(*number, OwnedFd::from(file)).map_err(|error| error.to_string())?
            }
            // It was idle, and a host without a connection manager has nothing better than what is there now.
            Err(error) => {
                tracing::warn!(fd = number, %error, "{path} is not there; the descriptor stays closed")
            }
        }
    }
    put_duplicates_back(left)?;
    process().count_rebuild();
    Ok(())
}

/// Unless the application has closed them, or put something else there.
fn put_duplicates_back(left: &Let) -> Phase<()> {
    for context in &process().contexts() {
        let of_context = |duplicate: &&(usize, RawFd)| duplicate.0 == Arc::as_ptr(context).addr();
        for (_, number) in left.duplicates.iter().filter(of_context) {
            let there = std::fs::read_link(format!("/proc/self/fd/{number}"));
            if there.is_ok_and(|file| file == Path::new("/dev/null")) {
                // SAFETY: the hardware was opened just now; only its file number is read.
                let command_file = unsafe { device::command_fd(context.hardware()) };
                replace_command_file(*number, command_file)
                    .map_err(|error| format!("file descriptor {number}: {error}"))?;
            }
        }
    }
    Ok(())
}

fn open_device(context: &Context, choices: &[DeviceChoice]) -> Phase<()> {
    let name = choose_device(context, choices)?;
    let cname = CString::new(name.clone()).map_err(|error| error.to_string())?;
    let known = kernel_devices()
        .into_iter()
        .find(|device| device.name == name);
    context.rings_by_write.store(
        known
            .as_ref()
            .is_some_and(|device| device.driver == Some(DriverId::RXE)),
        Ordering::Relaxed,
    );
    let node = known.and_then(|device| CString::new(device.uverbs?.name).ok());
    let hardware = match node {
        Some(node) => context.verbs.open_node(&node),
        // A device that the kernel does not know.
        None => context.verbs.open(&cname),
    };
    let hardware = hardware.map_err(|error| format!("cannot open device {name}: {error}"))?;
    context.set_hardware(hardware);
    lock(&context.responder_psn_is_live).take();
    let same_device = context.hardware_name() == name;
    context.set_hardware_name(&cname);
    let first_seen = lock(&context.first_seen)
        .clone()
        .ok_or("the device was never let go of")?;
    ports::map_ports(context, &first_seen)
        .map_err(|error| format!("ports of device {name}: {error}"))?;
    lead_queries(context, &first_seen, same_device)?;
    // SAFETY: both contexts are open.
    unsafe { replace_command_file((*context.app()).cmd_fd, device::command_fd(hardware)) }
        .map_err(|error| format!("command file of {name}: {error}"))
}

fn choose_device(context: &Context, choices: &[DeviceChoice]) -> Phase<String> {
    let mut names: Vec<String> = kernel_devices()
        .into_iter()
        .map(|device| device.name)
        .collect();
    if names.is_empty() {
        names = context
            .verbs
            .device_names()
            .map_err(|error| format!("cannot list devices: {error}"))?;
    }
    let wanted = lock(&context.first_seen).clone();
    choose(&context.name(), choices, &names, |name| {
        let (Some(wanted), Ok(now)) = (&wanted, ports::facts(name)) else {
            return false;
        };
        wanted
            .gids()
            .any(|gid| now.gids().any(|other| other == gid))
    })
}

/// The kernel is asked for what there is: the inner libibverbs may remember another boot.
fn kernel_devices() -> Vec<RdmaDevice> {
    let mut devices = devices::list(&Sysfs::host()).unwrap_or_default();
    let identified =
        Connection::open().and_then(|mut kernel| devices::identify(&mut devices, &mut kernel));
    if let Err(error) = identified {
        tracing::warn!(%error, "cannot ask for the drivers of the devices");
    }
    devices
        .into_iter()
        .filter(|device| device.uverbs.is_some())
        .collect()
}

/// What libibverbs answers past the provider comes from a tree of the device as first seen.
fn lead_queries(context: &Context, first_seen: &DeviceFacts, same_device: bool) -> Phase<()> {
    let folder = context.tree_folder().map_err(|error| error.to_string())?;
    let mut tree = folder.join(&first_seen.name);
    // The interfaces that the tree may name depend on the host.
    if !(same_device && tree.exists()) {
        tree = sysfs_tree::write(&folder, first_seen, sysfs_tree::host_has_interface)
            .map_err(|error| error.to_string())?;
    }
    // SAFETY: the application's context is open, and its command file is still the stand-in.
    unsafe { (context.lead_queries)(context.app(), &tree) }
        .map_err(|error| format!("queries past the provider: {error}"))
}

/// What is used before its users.
fn rebuild_objects(context: &Context) -> Result<(), String> {
    let objects = context.objects();
    // SAFETY: the gate is closed, so nothing is destroyed.
    unsafe {
        for (_, domain) in &objects.domains {
            domain
                .get()
                .rebuild()
                .map_err(|error| format!("protection domain: {error}"))?;
        }
        for (_, region) in &objects.regions {
            let region = region.get();
            let (address, length) = region.range();
            match region.rebuild() {
                // The memory is gone: natively the pages would have stayed pinned. The handle stays, without access.
                Err(Errno::BAD_ADDRESS) => {
                    tracing::warn!(address, length, "memory of a region is not mapped any more");
                }
                made => made.map_err(|error| {
                    format!("memory region of {length} bytes at {address:#x}: {error}")
                })?,
            }
        }
        for (_, queue) in &objects.completion_queues {
            queue
                .get()
                .rebuild()
                .map_err(|error| format!("completion queue: {error}"))?;
        }
        for (_, queue) in &objects.shared_queues {
            queue
                .get()
                .rebuild()
                .map_err(|error| format!("shared receive queue: {error}"))?;
        }
        for (_, pair) in &objects.queue_pairs {
            let pair = pair.get();
            pair.rebuild()
                .map_err(|error| format!("queue pair {:#x}: {error}", pair.number().0))?;
        }
    }
    Ok(())
}

/// Old and new numbers of this process.
pub(crate) fn numbers() -> ProcessNumbers {
    let contexts = process().contexts().into_iter().map(|context| {
        let ports = lock(&context.ports)
            .iter()
            .map(|port| port.numbers.clone())
            .collect();
        let objects = context.objects();
        // SAFETY: the gate is closed, so nothing is destroyed.
        unsafe {
            let regions = objects
                .regions
                .iter()
                .map(|(_, region)| region.get())
                .filter(|region| region.is_remote());
            let pairs = objects.queue_pairs.iter().map(|(_, pair)| pair.get());
            ContextNumbers {
                device: context.name(),
                hardware_device: context.hardware_name(),
                ports,
                queue_pairs: pairs
                    .filter_map(|pair| pair.numbers(context.largest_mtu(pair.port())))
                    .collect(),
                rkeys: regions
                    .filter_map(|region| Some((region.rkey(), region.hardware_keys()?.1)))
                    .collect(),
            }
        }
    });
    ProcessNumbers {
        pid: std::process::id().cast_signed(),
        contexts: contexts.collect(),
    }
}

/// Learns the numbers of the job and connects. Gives what is to be told to the user.
pub(crate) fn connect(job: &[ProcessNumbers]) -> Phase<Vec<String>> {
    let directory = Arc::new(Directory::new(job));
    process().learn(Arc::clone(&directory));
    let mut notes = Vec::new();
    for context in &process().contexts() {
        learn_own_numbers(context);
        let objects = context.objects();
        // SAFETY: the gate is closed, so nothing is destroyed.
        unsafe {
            for (_, handle) in &objects.address_handles {
                let handle = handle.get();
                if let Err(error) = handle.rebuild() {
                    if let Err(error) = handle.park() {
                        tracing::warn!(%error, "datagrams to an address that is gone are refused");
                    }
                    notes.push(format!(
                        "an address handle of {} leads nowhere now: {error}",
                        context.name()
                    ));
                }
            }
            for (_, queue) in &objects.shared_queues {
                queue
                    .get()
                    .repost()
                    .map_err(|error| format!("receives of a shared queue: {error}"))?;
            }
            for (_, pair) in &objects.queue_pairs {
                let pair = pair.get();
                let outcome = pair
                    .connect(&directory, context.largest_mtu(pair.port()))
                    .map_err(|error| {
                        format!("cannot connect queue pair {:#x}: {error}", pair.number().0)
                    })?;
                if outcome == Connected::Parked {
                    notes.push(format!(
                        "queue pair {:#x} has no peer in the job and is parked",
                        pair.number().0
                    ));
                }
            }
        }
    }
    Ok(notes)
}

/// Fills the tables of what is local: keys, and numbers that completions name.
fn learn_own_numbers(context: &Context) {
    let objects = context.objects();
    // SAFETY: the gate is closed, so nothing is destroyed.
    unsafe {
        for (_, region) in &objects.regions {
            let region = region.get();
            match region.hardware_keys() {
                Some((lkey, _)) => context.lkeys.insert(region.lkey().0, lkey.0),
                None => context.lkeys.remove(region.lkey().0),
            }
        }
        let back: KeyTable = objects
            .queue_pairs
            .iter()
            .filter_map(|(_, pair)| Some((pair.get().hardware_number()?.0, pair.get().number().0)))
            .collect();
        *lock(&context.qpns_back) = Arc::new(back);
    }
}
