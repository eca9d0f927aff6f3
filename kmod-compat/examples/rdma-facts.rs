//! Prints what the kernel tells about RDMA: devices, ports, and for each PID given its objects,
//! descriptors and mappings.
//!
//! `rdma-facts [--tree FOLDER] [PID...]`; with `--tree` each device's sysfs folder is copied.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use kmod_compat::fds::{self, Process};
use kmod_compat::netlink::Connection;
use kmod_compat::restrack::{self, ObjectKind};
use kmod_compat::sysfs::Sysfs;
use kmod_compat::{devices, ports, sysfs_tree};

#[allow(clippy::print_stdout)]
fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).peekable();
    let mut tree = None;
    if arguments.next_if(|argument| argument == "--tree").is_some() {
        tree = Some(PathBuf::from(
            arguments.next().context("--tree needs a folder")?,
        ));
    }

    let sysfs = Sysfs::host();
    let mut devices = devices::list(&sysfs)?;
    let mut connection = Connection::open()?;
    devices::identify(&mut devices, &mut connection)?;
    for device in &devices {
        println!("{device:?}");
        if let Some(driver) = device.driver {
            println!("  driver {driver}");
        }
        let start = Instant::now();
        let facts = ports::read_device(&sysfs, &device.name)?;
        println!("  ports read in {:?}", start.elapsed());
        for port in &facts.ports {
            let used: Vec<_> = port
                .gids
                .iter()
                .filter(|entry| !entry.gid.is_zero())
                .collect();
            println!(
                "  port {} {} {} lid {:#x} gids {} pkeys {:x?}",
                port.number,
                port.state.name(),
                port.link_layer.name(),
                port.lid,
                port.gids.len(),
                port.pkeys
            );
            for entry in used {
                println!("    {entry:?}");
            }
        }
        if let Some(folder) = &tree {
            let start = Instant::now();
            let path = sysfs_tree::write(folder, &facts, sysfs_tree::host_has_interface)?;
            println!("  copied to {} in {:?}", path.display(), start.elapsed());
        }
    }
    for pid in arguments {
        let pid: u32 = pid
            .parse()
            .with_context(|| format!("{pid:?} is not a PID"))?;
        println!("process {pid}");
        let holdings = restrack::holdings(&mut connection, pid, &ObjectKind::ALL)?;
        for object in &holdings.owned {
            println!("  owns {object}");
        }
        for object in &holdings.unattributed {
            println!("  may own {object}");
        }
        let live = restrack::live_connection_ids(&mut connection, &sysfs, pid)?;
        println!("  live connection ids: {}", live.len());
        for descriptor in fds::rdma_descriptors(&sysfs, Process::Id(pid))? {
            println!("  fd {descriptor:?}");
        }
        for mapping in fds::rdma_mappings(Process::Id(pid))? {
            println!("  mapping {mapping:x?}");
        }
    }
    Ok(())
}
