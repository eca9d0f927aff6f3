//! IP addresses that sockets of a job are bound to, and hosts that do not have them.

use std::net::{IpAddr, UdpSocket};
use std::path::PathBuf;

use anyhow::{Result, bail};
use procfs::net::TcpState;

use reverbs::image::BoundAddress;

use super::Tables;
use crate::command::files::Held;

/// What sockets of the tree are bound to, beyond loopback and "any".
pub(crate) fn of_tree(tables: &Tables, held: &Held) -> Vec<BoundAddress> {
    let tcp = tables.tcp.iter().map(|entry| {
        let connected = entry.state == TcpState::Established;
        (entry.inode, entry.local_address.ip(), connected)
    });
    let udp = tables
        .udp
        .iter()
        .map(|entry| (entry.inode, entry.local_address.ip(), false));
    let mut found: Vec<BoundAddress> = Vec::new();
    for (inode, address, connected) in tcp.chain(udp) {
        let address = address.to_canonical();
        if address.is_loopback() || address.is_unspecified() || !held.sockets.contains(&inode) {
            continue;
        }
        match found.iter_mut().find(|known| known.address == address) {
            Some(known) => known.connected |= connected,
            None => found.push(BoundAddress { address, connected }),
        }
    }
    found
}

/// While it lives, sockets can be bound to addresses that this host does not have.
#[derive(Debug)]
pub(crate) struct ForeignBinds {
    /// Settings that were changed, with what they were.
    changed: Vec<(PathBuf, String)>,
}

impl ForeignBinds {
    /// Lets CRIU bind sockets that listen at an address of the old host: nobody will reach them there ([`unreachable`] says
    /// so), and what matters is that they exist.
    ///
    /// # Errors
    /// A *connection* goes through an address that is not here: it would be dead.
    pub(crate) fn allow(addresses: &[BoundAddress]) -> Result<Self> {
        let mut allowed = Self {
            changed: Vec::new(),
        };
        for bound in addresses.iter().filter(|bound| !is_here(bound.address)) {
            let address = bound.address;
            if bound.connected {
                let bits = if address.is_ipv4() { 32 } else { 128 };
                bail!(
                    "the job has TCP connections at the address {address}, which this host does not have: give it that \
                     address (`ip address add {address}/{bits} dev lo`, if no other host has it any more)"
                );
            }
            let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
            let setting = PathBuf::from(format!("/proc/sys/net/{family}/ip_nonlocal_bind"));
            if let Ok(before) = std::fs::read_to_string(&setting)
                && before.trim() == "0"
                && std::fs::write(&setting, "1").is_ok()
            {
                allowed.changed.push((setting, before));
            }
        }
        Ok(allowed)
    }
}

impl Drop for ForeignBinds {
    fn drop(&mut self) {
        for (setting, before) in &self.changed {
            // It could be written a moment ago.
            let _ = std::fs::write(setting, before);
        }
    }
}

/// What to tell of sockets that will listen at addresses of another host.
pub(crate) fn unreachable(addresses: &[BoundAddress]) -> Vec<String> {
    addresses
        .iter()
        .filter(|bound| !bound.connected && !is_here(bound.address))
        .map(|bound| {
            format!(
                "sockets of the job listen at {}, which this host does not have: nobody will reach them",
                bound.address
            )
        })
        .collect()
}

/// Whether this host has an address.
pub(crate) fn is_here(address: IpAddr) -> bool {
    !matches!(
        UdpSocket::bind((address, 0)),
        Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable
    )
}

#[cfg(test)]
mod tests {
    use super::{BoundAddress, ForeignBinds, is_here};

    #[test]
    fn a_connection_at_a_foreign_address_is_refused_with_the_remedy() {
        // TEST-NET-1, RFC 5737: nobody's.
        let address = "192.0.2.1".parse().unwrap();
        assert!(is_here("127.0.0.1".parse().unwrap()));
        assert!(!is_here(address));
        let bound = [BoundAddress {
            address,
            connected: true,
        }];
        let error = ForeignBinds::allow(&bound).unwrap_err();
        assert!(error.to_string().contains("192.0.2.1/32 dev lo"), "{error}");
    }
}
