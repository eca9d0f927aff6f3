//! A network for a job that came back on other nodes: each node's processes keep their old addresses in a namespace of their
//! own, and a VXLAN between the nodes joins these (RFC 7348). RDMA does not go through it.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::Namespace;

/// VXLAN's own port, so that firewalls know what it is.
const PORT: u16 = 4789;
const DEVICE: &str = "reverbs0";

/// One node of the overlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OverlayNode {
    /// As the launcher calls it now; resolved where the overlay is made.
    pub(crate) host: String,
    /// Those of the job's part.
    pub(crate) addresses: Vec<IpAddr>,
}

/// All nodes of it, the same on each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Overlay {
    /// 24 bits: tells jobs that share nodes apart.
    pub(crate) network: u32,
    pub(crate) nodes: Vec<OverlayNode>,
}

impl Overlay {
    /// Makes the namespace of one of the nodes.
    ///
    /// # Errors
    /// A host cannot be found, or the kernel refuses.
    pub(crate) fn enter(&self, own: usize) -> Result<Namespace> {
        let ours = Namespace::default();
        let fresh = Namespace::fresh()?;
        let keeper = fresh
            .keeper()
            .context("the namespace has no keeper")?
            .to_string();
        fresh.run("ip", &["link", "set", "lo", "up"])?;
        let others = (0..self.nodes.len()).filter(|node| *node != own);
        let others = others
            .map(|node| Ok((node, resolve(&self.nodes[node].host)?)))
            .collect::<Result<Vec<_>>>()?;
        let Some((_, towards)) = others.first() else {
            // All that its connections lead to is here.
            for address in &self.nodes[own].addresses {
                fresh.run(
                    "ip",
                    &["address", "add", &with_prefix(*address), "dev", "lo"],
                )?;
            }
            return Ok(fresh);
        };
        let here = source_towards(*towards)?.to_string();
        let (network, port) = (self.network.to_string(), PORT.to_string());
        // Made here, where the nodes reach each other, and moved: its outer side stays.
        let name = format!("rv{:06x}", self.network);
        ours.run(
            "ip",
            &[
                "link",
                "add",
                &name,
                "type",
                "vxlan",
                "id",
                &network,
                "local",
                &here,
                "dstport",
                &port,
                "nolearning",
            ],
        )?;
        let moved = ours.run(
            "ip",
            &["link", "set", &name, "netns", &keeper, "name", DEVICE],
        );
        if moved.is_err() {
            let _ = ours.run("ip", &["link", "delete", &name]);
        }
        moved?;
        let hardware = hardware_address(own);
        fresh.run("ip", &["link", "set", DEVICE, "address", &hardware])?;
        for address in &self.nodes[own].addresses {
            let address = with_prefix(*address);
            fresh.run("ip", &["address", "add", &address, "dev", DEVICE])?;
        }
        fresh.run("ip", &["link", "set", DEVICE, "up"])?;
        for (other, host) in others {
            let (hardware, host) = (hardware_address(other), host.to_string());
            fresh.run(
                "bridge",
                &["fdb", "append", &hardware, "dev", DEVICE, "dst", &host],
            )?;
            for address in &self.nodes[other].addresses {
                let (plain, prefixed) = (address.to_string(), with_prefix(*address));
                fresh.run("ip", &["route", "replace", &prefixed, "dev", DEVICE])?;
                fresh.run(
                    "ip",
                    &[
                        "neighbor",
                        "replace",
                        &plain,
                        "lladdr",
                        &hardware,
                        "dev",
                        DEVICE,
                        "nud",
                        "permanent",
                    ],
                )?;
            }
        }
        Ok(fresh)
    }
}

/// Locally administered; known to all nodes, so that nobody has to ask who has an address.
fn hardware_address(node: usize) -> String {
    let [_, _, _, _, a, b, c, d] = (node as u64).to_be_bytes();
    format!("02:52:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn with_prefix(address: IpAddr) -> String {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    format!("{address}/{bits}")
}

fn resolve(host: &str) -> Result<IpAddr> {
    // ssh knows users, the resolver does not.
    let plain = host.rsplit_once('@').map_or(host, |(_, plain)| plain);
    let found = std::net::ToSocketAddrs::to_socket_addrs(&(plain, 0))
        .with_context(|| format!("cannot find the address of node {host}"))?
        .map(|found| found.ip())
        .find(|ip| !ip.is_loopback());
    match found {
        Some(ip) => Ok(ip),
        None => bail!(
            "node {host} has only loopback addresses here: the other nodes could not reach it; give its address with --node"
        ),
    }
}

/// Our own address on the way to a host.
fn source_towards(host: IpAddr) -> Result<IpAddr> {
    let any: SocketAddr = match host {
        IpAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        IpAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket
        .connect((host, PORT))
        .with_context(|| format!("there is no way to {host}"))?;
    let ours = socket.local_addr()?.ip();
    ensure!(
        !ours.is_loopback(),
        "{host} is this very host: two parts of a job cannot share it"
    );
    Ok(ours)
}
