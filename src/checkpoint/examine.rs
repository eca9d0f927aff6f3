//! What stands in the way, before anything is touched.

use std::collections::BTreeSet;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kmod_compat::connections;
use kmod_compat::devices::{self, NodeType};
use kmod_compat::fds::{
    self, DescriptorKind, FdError, Process as Whose, RdmaDescriptor, rdma_descriptors,
    rdma_mappings,
};
use kmod_compat::netlink::Connection;
use kmod_compat::restrack::live_connection_ids;
use kmod_compat::sysfs::Sysfs;

use crate::control::message::{ContextNumbers, Obstacle};
use crate::device as hardware;
use crate::virt::context::Context;
use crate::virt::ports;
use crate::virt::process::process;

/// Everything that a checkpoint cannot carry, by name.
pub(crate) fn examine() -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    let mut say = |what: String| obstacles.push(Obstacle { what });
    let is_fine = |descriptor: &RdmaDescriptor| match &descriptor.kind {
        DescriptorKind::ConnectionManager | DescriptorKind::Events => true,
        DescriptorKind::Verbs { .. } => is_ours(descriptor.number),
        _ => false,
    };
    match settled_descriptors(is_fine) {
        Err(error) => say(format!("cannot look at the file descriptors: {error}")),
        // What was ours when it was looked at may have been closed since, so nothing is asked again.
        Ok((known, unknown)) => {
            for descriptor in unknown {
                say(format!(
                    "file descriptor {} is open on {} past reverbs; close it, or start the program under `reverbs run`",
                    descriptor.number, descriptor.target
                ));
            }
            let connection_managers: Vec<_> = known
                .iter()
                .filter(|descriptor| matches!(descriptor.kind, DescriptorKind::ConnectionManager))
                .map(|descriptor| descriptor.number)
                .collect();
            examine_connections(&connection_managers, &mut say);
        }
    }
    // iWARP needs its connection manager to connect, so its queue pairs cannot be connected again.
    let devices = devices::list(&Sysfs::host()).unwrap_or_default();
    for name in process()
        .contexts()
        .iter()
        .map(|context| context.hardware_name())
    {
        if devices
            .iter()
            .any(|device| device.name == name && device.node_type == NodeType::RNIC)
        {
            say(format!(
                "device {name} is iWARP, whose connections cannot be made again"
            ));
        }
    }
    memory_windows().into_iter().for_each(&mut say);
    // The hardware's own mappings go with its contexts; a process that has no context must have none.
    if process().contexts().is_empty()
        && let Ok(mappings) = rdma_mappings(Whose::Own)
        && let Some(mapping) = mappings.first()
    {
        say(format!(
            "{} is mapped at {:#x} past reverbs",
            mapping.path, mapping.start
        ));
    }
    obstacles
}

/// Most bytes that the numbers of this process can take when it is connected again.
pub(crate) fn numbers_bytes() -> u64 {
    let of = |context: Arc<Context>| {
        // A device that cannot be asked is refused where its ports are needed.
        let (ports, gids) = ports::first_seen(&context).map_or((0, 0), |facts| {
            let gids = facts
                .ports
                .iter()
                .map(|port| ports::port_address(port).gids.len());
            (facts.ports.len(), gids.sum())
        });
        let objects = context.objects();
        ContextNumbers::most_bytes(
            objects.queue_pairs.len(),
            objects.regions.len(),
            ports,
            gids,
        )
    };
    process().contexts().into_iter().map(of).sum()
}

/// Windows are bound by requests, and no verb tells to what. In words.
pub(super) fn memory_windows() -> Vec<String> {
    let mut windows = Vec::new();
    for context in process().contexts() {
        for (_, window) in &context.objects().windows {
            // SAFETY: it is in the registry, which is locked.
            let rkey = unsafe { window.get() }.rkey().0;
            windows.push(format!(
                "memory window with rkey {rkey:#x} on {} is allocated; windows cannot be bound again",
                context.name()
            ));
        }
    }
    windows
}

/// The RDMA descriptors of this process: those that are fine, and the others. For a moment within `ibv_open_device` and `ibv_close_device` libibverbs has one that we
/// do not know (yet, or any more): such are looked at again before they are believed. While we open or close a device ourselves nothing
/// is believed: after a restart opening takes long, as the kernel's files of all addresses are read.
pub(super) fn settled_descriptors(
    is_fine: impl Fn(&RdmaDescriptor) -> bool,
) -> Result<(Vec<RdmaDescriptor>, Vec<RdmaDescriptor>), FdError> {
    const LOOKS: u32 = 20;
    const PAUSE: Duration = Duration::from_millis(50);
    const LIMIT: Duration = Duration::from_secs(10);
    let began = Instant::now();
    let mut looks = 0;
    loop {
        let before = process().is_unsettled();
        let found = rdma_descriptors(&Sysfs::host(), Whose::Own)?;
        let is_settled = !before && !process().is_unsettled();
        looks = match is_settled || began.elapsed() > LIMIT {
            true => looks + 1,
            false => 0,
        };
        let (known, unknown): (Vec<_>, Vec<_>) = found.into_iter().partition(&is_fine);
        if looks > LOOKS || unknown.is_empty() {
            return Ok((known, unknown));
        }
        std::thread::sleep(PAUSE);
    }
}

/// A command file, or a duplicate that the application has made of one.
fn is_ours(number: RawFd) -> bool {
    let ours = our_descriptors();
    let is_duplicate = |file: &RawFd| fds::duplicates(*file).is_ok_and(|all| all.contains(&number));
    ours.contains(&number) || ours.iter().any(is_duplicate)
}

/// Command files of the hardware and those that the application sees.
fn our_descriptors() -> Vec<RawFd> {
    let contexts = process().contexts();
    let files = contexts.iter().flat_map(|context| {
        // SAFETY: both contexts are open; only numbers are read.
        unsafe {
            [
                (*context.app()).cmd_fd,
                hardware::command_fd(context.hardware()),
            ]
        }
    });
    files.collect()
}

/// Ids of the connection manager on these descriptors. The files are asked; the kernel's lists say more of those they have, and
/// stand in for a file that does not answer.
fn examine_connections(descriptors: &[RawFd], say: &mut impl FnMut(String)) {
    let mut silent = false;
    let mut numbers = BTreeSet::new();
    for descriptor in descriptors {
        // SAFETY: it was just found open; an application that closes it meanwhile has the kernel answer with an error.
        match connections::ids(unsafe { BorrowedFd::borrow_raw(*descriptor) }) {
            Ok(ids) => numbers.extend(ids),
            Err(_) => silent = true,
        }
    }
    if numbers.is_empty() && !silent {
        return;
    }
    let listed = Connection::open()
        .map_err(|error| error.to_string())
        .and_then(|mut kernel| {
            live_connection_ids(&mut kernel, &Sysfs::host(), std::process::id())
                .map_err(|error| error.to_string())
        });
    let listed = match listed {
        Ok(ids) => ids,
        Err(error) => return say(format!("cannot see whether rdma_cm is idle: {error}")),
    };
    for id in &listed {
        say(format!(
            "rdma_cm: {id} is in use and cannot be made again: end it before a checkpoint"
        ));
    }
    // A listener on all addresses is one id, and in the lists one on each device.
    if listed.is_empty() && !numbers.is_empty() {
        let ids = match numbers.len() {
            1 => "1 id that is".into(),
            count => format!("{count} ids that are"),
        };
        say(format!(
            "rdma_cm: {ids} bound to no device, and would be lost: destroy before a checkpoint"
        ));
    }
}
