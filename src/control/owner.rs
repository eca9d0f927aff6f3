//! What this host knows of queue pairs that are none of the job's.

use anyhow::{Context, Result};
use kmod_compat::netlink::Connection;
use kmod_compat::ports::{PortFacts, read_device};
use kmod_compat::restrack::{self, ObjectKind, Owner};
use kmod_compat::sysfs::Sysfs;
use procfs::process::Process;
use serde::{Deserialize, Serialize};

use super::message::{HardwareAddress, HardwarePeer};

/// Who has a queue pair that is none of the job's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Whose {
    /// It was destroyed, or its process has ended. Or it is one that reverbs itself keeps in the job.
    Nobodys,
    Process {
        pid: i32,
        name: String,
    },
    /// Of a process whose thread that made it has ended, or of the kernel.
    Unknown,
    /// No device of this host has the address.
    AnotherHosts,
}

/// Who has a queue pair on this host, for a job of these processes. `device` has its address; if it is not known which has, all
/// are looked at.
///
/// # Errors
/// The kernel cannot be asked.
pub fn whose(peer: &HardwarePeer, device: Option<&str>, job: &[i32]) -> Result<Whose> {
    let found;
    let device = match device {
        Some(device) => device,
        None => match device_at(peer.address)? {
            Some(device) => {
                found = device;
                &found
            }
            None => return Ok(Whose::AnotherHosts),
        },
    };
    let mut kernel = Connection::open().context("cannot ask the kernel for queue pairs")?;
    let pairs = restrack::list(&mut kernel, &[ObjectKind::QueuePair])
        .context("cannot ask the kernel for queue pairs")?;
    let pair = pairs
        .into_iter()
        .find(|pair| pair.device == device && pair.number == Some(peer.qpn.0));
    Ok(match pair.map(|pair| pair.owner) {
        None => Whose::Nobodys,
        Some(Owner::Thread(thread)) => match process_of(thread) {
            Some((pid, _)) if job.contains(&pid) => Whose::Nobodys,
            Some((pid, name)) => Whose::Process { pid, name },
            None => Whose::Unknown,
        },
        Some(Owner::Kernel(_) | Owner::Unknown) => Whose::Unknown,
    })
}

/// The process of a thread, and its name.
fn process_of(thread: u32) -> Option<(i32, String)> {
    let status = Process::new(thread.cast_signed()).ok()?.status().ok()?;
    Some((status.tgid, status.name))
}

/// The device of this host that has an address.
fn device_at(address: HardwareAddress) -> Result<Option<String>> {
    let sysfs = Sysfs::host();
    for device in kmod_compat::devices::list(&sysfs).context("cannot list the RDMA devices")? {
        let facts = read_device(&sysfs, &device.name)
            .with_context(|| format!("cannot read the addresses of {}", device.name))?;
        if facts.ports.iter().any(|port| has(port, address)) {
            return Ok(Some(device.name));
        }
    }
    Ok(None)
}

fn has(port: &PortFacts, address: HardwareAddress) -> bool {
    match address {
        HardwareAddress::Gid(gid) => port.gids.iter().any(|entry| entry.gid.0 == gid.0),
        HardwareAddress::Lid(lid) => port.lid == u32::from(lid.0),
    }
}
