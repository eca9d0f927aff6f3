//! The kernel's tables of sockets, as the processes of a job see them: in their network namespace, which need not be ours.

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

/// Connections in TIME-WAIT keep the ports of the image's listening sockets for a minute. Without `ss` or the privilege,
/// CRIU's own message about the address has to do.
pub(crate) fn forget_closed_connections(namespace: &Namespace, ports: &[u16]) {
    for port in ports {
        let _ = namespace
            .command("ss")
            .args(["-K", "-tan", "state", "time-wait", "sport", "="])
            .arg(port.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}
