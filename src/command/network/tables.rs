//! The kernel's tables of sockets, as the processes of a job see them: in their network namespace, which need not be ours.

use std::net::SocketAddr;
use std::process::Stdio;

use procfs::net::{TcpNetEntry, TcpState, UdpNetEntry};
use procfs::process::Process;

use reverbs::image::TcpConnection;

use super::Namespace;
use crate::command::files::Held;

/// All TCP and UDP sockets of one namespace.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub(super) tcp: Vec<TcpNetEntry>,
    pub(super) udp: Vec<UdpNetEntry>,
}

impl Tables {
    /// Of the namespace of a process. What cannot be read is left out.
    pub(crate) fn of(pid: i32) -> Self {
        let Ok(process) = Process::new(pid) else {
            return Self::default();
        };
        Self {
            tcp: [process.tcp(), process.tcp6()]
                .into_iter()
                .flatten()
                .flatten()
                .collect(),
            udp: [process.udp(), process.udp6()]
                .into_iter()
                .flatten()
                .flatten()
                .collect(),
        }
    }

    /// Ports on which sockets that are `held` listen.
    pub(crate) fn listening_ports(&self, held: &Held) -> Vec<u16> {
        let mut ports: Vec<u16> = self
            .tcp
            .iter()
            .filter(|entry| entry.state == TcpState::Listen && held.sockets.contains(&entry.inode))
            .map(|entry| entry.local_address.port())
            .collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// Connections of sockets that are `held` to what is not this very host.
    pub(crate) fn connections(&self, held: &Held) -> Vec<TcpConnection> {
        self.tcp
            .iter()
            .filter(|entry| entry.remote_address.port() != 0 && held.sockets.contains(&entry.inode))
            .filter(|entry| {
                let (ours, theirs) = (entry.local_address.ip(), entry.remote_address.ip());
                !ours.to_canonical().is_loopback() && ours != theirs
            })
            .map(|entry| TcpConnection {
                local: entry.local_address,
                remote: entry.remote_address,
            })
            .collect()
    }
}

/// Closes what is left in the kernel of connections that nobody has any more: in TIME-WAIT they keep the ports of the image's
/// listening sockets for a minute, and those of an attempt to restart that was given up are in the way of the next. Without `ss` or the
/// privilege, CRIU's own message about the address has to do.
pub(crate) fn forget_closed_connections(
    namespace: &Namespace,
    ports: &[u16],
    connections: &[TcpConnection],
) {
    /// Of one command line.
    const MOST: usize = 100;
    for ports in ports.chunks(MOST) {
        let each: Vec<_> = ports.iter().map(|port| format!("sport = {port}")).collect();
        close(namespace, &["state", "time-wait"], &each.join(" or "));
    }
    for connections in connections.chunks(MOST) {
        let each: Vec<_> = connections
            .iter()
            .map(|connection| {
                let (local, remote) = (plain(connection.local), plain(connection.remote));
                format!("( src = {local} and dst = {remote} )")
            })
            .collect();
        close(namespace, &[], &each.join(" or "));
    }
}

fn close(namespace: &Namespace, states: &[&str], which: &str) {
    let _ = namespace
        .command("ss")
        .args(["-K", "-tan"])
        .args(states)
        .arg(which)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// IPv4 in the clothes of IPv6 is IPv4 to the kernel's tools.
pub(super) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
