//! Two machines joined by a network: a network card in each, and a cable between them.
//!
//! The cable is a socket pair that the two QEMU processes inherit: nobody else can reach the network.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, anyhow};

use crate::device::Device;
use crate::kernel::Kernel;
use crate::vm::{self, Machine, Outcome};
use crate::{paths, setup};

/// In the share: tells the second machine to power off.
const OFF: &str = "off";

/// One machine of the network.
#[derive(Clone, Debug)]
pub struct Node {
    /// The host name.
    pub name: String,
    /// The RDMA device, which is on the network card. Its address is the host's.
    pub device: Device,
    /// The card's own address, as `52:54:00:99:00:01`. The first of the device's GIDs comes from it.
    pub mac: String,
}

/// A machine's end of the cable.
#[derive(Clone, Debug)]
pub struct Card {
    /// The card's own address.
    pub mac: String,
    /// Shared, because a boot may have to be tried again.
    pub cable: Arc<OwnedFd>,
}

/// Boots both, runs the script on the first when the second can be reached, and powers both off when it has ended.
///
/// `ssh NAME COMMAND` works from each to each, as root. Both see `share` as [`vm::SHARE`].
///
/// # Errors
/// When one of the machines cannot be started or ends before it is told to.
pub fn run(machine: &Machine, share: &Path, nodes: &[Node; 2], script: &str) -> Result<Outcome> {
    // Once, before both want it.
    setup::ensure()?;
    Kernel::get()?;
    let share = paths::make(share.to_owned())?;
    let off = share.join(OFF);
    if off.exists() {
        fs::remove_file(&off)?;
    }
    let (near, far) = UnixDatagram::pair().context("cannot make a socket pair")?;
    let [first, second] = nodes;
    let hosts = hosts(nodes);
    let prepare = |node: &Node, end: UnixDatagram| {
        machine
            .clone()
            .share(&share)
            .name(&node.name)
            .hosts(&hosts)
            .devices(vec![node.device.clone()])
            .card(Card {
                mac: node.mac.clone(),
                cable: Arc::new(end.into()),
            })
    };
    let (leading, following) = (prepare(first, near), prepare(second, far));
    let wait = format!("until [ -e {}/{OFF} ]; do sleep 0.5; done\n", vm::SHARE);
    let reach = format!(
        "until ssh -o ConnectTimeout=2 {} true 2>/dev/null; do sleep 0.2; done\n",
        second.name
    );
    thread::scope(|scope| {
        let follower = scope.spawn(|| following.run_script(&wait));
        let outcome = leading.run_script(&(reach + script));
        fs::write(&off, [])?;
        let followed = follower
            .join()
            .map_err(|_| anyhow!("the thread of {} died", second.name))?;
        let outcome = outcome.with_context(|| first.name.clone())?;
        followed.with_context(|| second.name.clone())?;
        Ok(outcome)
    })
}

/// Lines for `/etc/hosts`.
fn hosts(nodes: &[Node]) -> String {
    nodes
        .iter()
        .map(|node| format!("{} {}\n", node.device.ip(), node.name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_names_and_addresses() -> Result<()> {
        let node = Node {
            name: "n1".to_owned(),
            device: "rxe0@10.99.0.1/24".parse()?,
            mac: "52:54:00:99:00:01".to_owned(),
        };
        assert_eq!(hosts(&[node]), "10.99.0.1 n1\n");
        Ok(())
    }
}
