//! Letting go of the hardware: every object, then every file descriptor.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use kmod_compat::fds::{
    self, DescriptorKind, Process as Whose, RdmaDescriptor, rdma_descriptors, rdma_mappings,
};
use kmod_compat::substitute::substitute;
use kmod_compat::sysfs::Sysfs;

use super::Phase;
use super::examine::settled_descriptors;
use crate::device as hardware;
use crate::errno::Verb;
use crate::virt::channel::Channel;
use crate::virt::context::{Context, put_aside};
use crate::virt::ports;
use crate::virt::process::{lock, process};

/// What has to be put back at the rebuild besides verbs objects.
#[derive(Clone, Debug, Default)]
pub(crate) struct Let {
    /// Numbers under which `/dev/infiniband/rdma_cm` was open, idle.
    pub(super) connection_managers: Vec<RawFd>,
    /// Command files that the application has duplicated: whose they are, by address, and the number.
    pub(super) duplicates: Vec<(usize, RawFd)>,
}

/// Destroys all hardware objects, closes all devices, and puts something that can be saved under the number of every RDMA
/// file descriptor. `left` has what an attempt that failed has noted already.
pub(crate) fn release(left: &mut Let) -> Phase<()> {
    // No event may be on its way while what it names goes.
    let _events = process().events();
    for context in &process().contexts() {
        ports::first_seen(context)
            .map_err(|error| format!("device {}: {error}", context.hardware_name()))?;
        release_objects(context)
            .map_err(|error| format!("device {}: {error}", context.hardware_name()))?;
    }
    for channel in process().channels().iter() {
        channel.release();
        channel.pipe.before_save();
    }
    for context in &process().contexts() {
        context.events.before_save();
        put_command_file_aside(context)?;
        for number in duplicates(context) {
            put_aside(number).map_err(|error| format!("file descriptor {number}: {error}"))?;
            left.duplicates.push((Arc::as_ptr(context).addr(), number));
        }
        close_device(context)?;
    }
    let (known, unknown) = settled_descriptors(|descriptor| {
        matches!(
            descriptor.kind,
            DescriptorKind::ConnectionManager | DescriptorKind::Events
        )
    })
    .map_err(|error| error.to_string())?;
    for descriptor in known.into_iter().chain(unknown) {
        match descriptor.kind {
            DescriptorKind::ConnectionManager => {
                substitute(descriptor.number, silent_file()?).map_err(|error| error.to_string())?;
                left.connection_managers.push(descriptor.number);
            }
            DescriptorKind::Events => {
                Channel::adopt_unused(descriptor.number).map_err(|error| {
                    format!(
                        "completion channel with file descriptor {}: {error}",
                        descriptor.number
                    )
                })?
            }
            DescriptorKind::Verbs { .. } | DescriptorKind::Devx | DescriptorKind::Other { .. } => {
                return Err(format!(
                    "file descriptor {} is still open on {}",
                    descriptor.number, descriptor.target
                ));
            }
        }
    }
    match rdma_mappings(Whose::Own)
        .map_err(|error| error.to_string())?
        .first()
    {
        Some(mapping) => Err(format!(
            "{} is still mapped at {:#x}",
            mapping.path, mapping.start
        )),
        None => Ok(()),
    }
}

/// Lets go of the fresh hardware that a rebuild which failed has made, so that it can be tried again.
pub(super) fn undo_rebuild() -> Phase<()> {
    let _events = process().events();
    for context in &process().contexts() {
        release_objects(context)
            .map_err(|error| format!("device {}: {error}", context.hardware_name()))?;
    }
    process()
        .channels()
        .iter()
        .for_each(|channel| channel.release());
    process()
        .contexts()
        .iter()
        .try_for_each(|context| close_device(context))
}

/// Closes the device, if it is open, and puts its command file aside.
fn close_device(context: &Context) -> Phase<()> {
    let hardware = context.hardware();
    if hardware.is_null() {
        return Ok(());
    }
    context.set_hardware(std::ptr::null_mut());
    // SAFETY: the device's own; all its objects are gone.
    unsafe { (context.verbs.ibv_close_device)(hardware) };
    put_command_file_aside(context)
}

fn put_command_file_aside(context: &Context) -> Phase<()> {
    // SAFETY: the application's context is open; only its file number is read.
    let number = unsafe { (*context.app()).cmd_fd };
    put_aside(number).map_err(|error| format!("file descriptor {number}: {error}"))
}

/// Other numbers of the hardware's command file. The application's own is aside already, so there will be no more of them.
fn duplicates(context: &Context) -> Vec<RawFd> {
    let hardware = context.hardware();
    if hardware.is_null() {
        return Vec::new();
    }
    // SAFETY: the hardware is there; only its file number is read.
    let number = unsafe { hardware::command_fd(hardware) };
    let found = fds::duplicates(number).and_then(|mut found| {
        if !found.is_empty() {
            // A device that the kernel does not know may have any file as its command file.
            let is_verbs =
                |known: &RdmaDescriptor| matches!(known.kind, DescriptorKind::Verbs { .. });
            let mut verbs = rdma_descriptors(&Sysfs::host(), Whose::Own)?;
            verbs.retain(is_verbs);
            found.retain(|number| verbs.iter().any(|known| known.number == *number));
        }
        Ok(found)
    });
    found.unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot look for duplicates of a command file");
        Vec::new()
    })
}

/// A file that can be saved, that epoll accepts, and that never has anything to say.
fn silent_file() -> Phase<OwnedFd> {
    // SAFETY: makes a descriptor, which is owned from here on.
    match unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) } {
        -1 => Err(format!("eventfd: {}", std::io::Error::last_os_error())),
        // SAFETY: just made, and nobody else's.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

/// Users before what they use.
fn release_objects(context: &Context) -> Verb<()> {
    let objects = context.objects();
    // SAFETY: the gate is closed, so nothing is destroyed.
    unsafe {
        for (_, pair) in &objects.queue_pairs {
            pair.get().release()?;
        }
        lock(&context.dead_end).take();
        for (_, handle) in &objects.address_handles {
            handle.get().release();
        }
        for (_, queue) in &objects.shared_queues {
            queue.get().release()?;
        }
        for (_, queue) in &objects.completion_queues {
            queue.get().release()?;
        }
        for (_, region) in &objects.regions {
            region.get().release()?;
        }
        for (_, domain) in &objects.domains {
            domain.get().release()?;
        }
    }
    Ok(())
}
