//! The hold that CRIU takes on TCP connections while it dumps, for the case that it is killed before it lets go.
//!
//! It drops their packets by rules of the firewall, and puts the sockets into repair mode. Neither ends with CRIU: the
//! connections of the job, and the rules of the host, would stay so.

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Stdio;

use procfs::net::TcpNetEntry;
use procfs::process::{FDTarget, Process};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::{Namespace, Tables};

/// The mark of the packets that CRIU itself lets pass, as `iptables -S` prints its rules.
const MARK: &str = "-m mark ! --mark 0xc114";

/// Lets go of the connections of these processes. What cannot be undone is said in the log.
pub(crate) fn release(root: i32, processes: &[i32]) {
    let held = HeldConnections::of(root, processes);
    held.remove_rules();
    for pid in processes {
        end_repairs(*pid, &held.connections);
    }
}

/// Connections of which CRIU has taken hold. A dump that ends the processes leaves its rules for the restore, which may be
/// on another host, or never.
#[derive(Debug)]
pub(crate) struct HeldConnections {
    root: i32,
    namespace: Namespace,
    connections: Vec<TcpNetEntry>,
}

impl HeldConnections {
    /// While the processes are there.
    pub(crate) fn of(root: i32, processes: &[i32]) -> Self {
        Self {
            root,
            // One that cannot be found is that of nobody any more.
            namespace: Namespace::of(root).unwrap_or_default(),
            connections: connections(root, processes),
        }
    }

    /// Removes CRIU's rules about them.
    pub(crate) fn remove_rules(&self) {
        if !self.connections.is_empty() {
            remove_rules(self.root, &self.namespace, &self.connections);
        }
    }
}

fn remove_rules(root: i32, namespace: &Namespace, connections: &[TcpNetEntry]) {
    for firewall in ["iptables", "ip6tables"] {
        for rule in rules(namespace, firewall) {
            if connections.iter().any(|one| is_about(&rule, one)) {
                let deleted = rule.replacen("-A ", "-D ", 1);
                run(namespace, firewall, deleted.split_whitespace());
            }
        }
    }
    // Younger releases of CRIU have a table of their own instead.
    let table = format!("delete table inet CRIU-{root}");
    run(namespace, "nft", table.split_whitespace());
}

fn connections(root: i32, processes: &[i32]) -> Vec<TcpNetEntry> {
    let sockets: Vec<u64> = processes
        .iter()
        .flat_map(|pid| sockets(*pid))
        .map(|(_, inode)| inode)
        .collect();
    Tables::of(root)
        .tcp
        .into_iter()
        .filter(|entry| sockets.contains(&entry.inode) && entry.remote_address.port() != 0)
        .collect()
}

/// Descriptors and inodes.
fn sockets(pid: i32) -> Vec<(i32, u64)> {
    let descriptors = Process::new(pid).and_then(|process| process.fd());
    descriptors
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|descriptor| match descriptor.target {
            FDTarget::Socket(inode) => Some((descriptor.fd, inode)),
            _ => None,
        })
        .collect()
}

fn rules(namespace: &Namespace, firewall: &str) -> Vec<String> {
    let listed = namespace
        .command(firewall)
        .arg("-S")
        .stdin(Stdio::null())
        .output();
    let text = listed.map_or_else(|_| Vec::new(), |listed| listed.stdout);
    String::from_utf8_lossy(&text)
        .lines()
        .filter(|line| line.starts_with("-A ") && line.contains(MARK))
        .map(str::to_owned)
        .collect()
}

/// In either direction.
fn is_about(rule: &str, connection: &TcpNetEntry) -> bool {
    let (ours, theirs) = (connection.local_address, connection.remote_address);
    let from_to = |from: SocketAddr, to: SocketAddr| {
        [
            format!("-s {}/", from.ip().to_canonical()),
            format!("-d {}/", to.ip().to_canonical()),
            format!("--sport {} ", from.port()),
            format!("--dport {} ", to.port()),
        ]
    };
    [from_to(ours, theirs), from_to(theirs, ours)]
        .iter()
        .any(|parts| parts.iter().all(|part| rule.contains(part.as_str())))
}

fn end_repairs(pid: i32, connections: &[TcpNetEntry]) {
    let opened = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let Some(process) = opened else { return };
    for (descriptor, inode) in sockets(pid) {
        if !connections.iter().any(|entry| entry.inode == inode) {
            continue;
        }
        let ended = pidfd_getfd(process.as_fd(), descriptor, PidfdGetfdFlags::empty())
            .map_err(std::io::Error::from)
            .and_then(|socket| end_repair(&socket));
        if let Err(error) = ended {
            tracing::warn!(pid, descriptor, %error, "a TCP connection may still be in repair mode");
        }
    }
}

fn end_repair(socket: &impl AsRawFd) -> std::io::Result<()> {
    let mut repair: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    let (level, option) = (libc::IPPROTO_TCP, libc::TCP_REPAIR);
    // SAFETY: the kernel writes at most `length` bytes into an int.
    let answer = unsafe {
        let value = (&raw mut repair).cast();
        libc::getsockopt(socket.as_raw_fd(), level, option, value, &raw mut length)
    };
    check(answer)?;
    if repair == 0 {
        return Ok(());
    }
    repair = 0;
    // SAFETY: the kernel reads an int.
    check(unsafe {
        let value = (&raw const repair).cast();
        libc::setsockopt(socket.as_raw_fd(), level, option, value, length)
    })
}

fn check(answer: libc::c_int) -> std::io::Result<()> {
    match answer {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn run<'a>(namespace: &Namespace, program: &str, arguments: impl Iterator<Item = &'a str>) {
    let mut command = namespace.command(program);
    command.args(arguments).stdin(Stdio::null());
    // Not there, or no such table: then there is nothing to undo.
    let done = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    tracing::debug!(?command, ?done, "undone");
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::{connections, is_about, sockets};

    #[test]
    fn rules_about_connections_of_the_job_are_found_and_no_others() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = listener.local_addr().unwrap().port();
        let stream = TcpStream::connect(("127.0.0.1", there)).unwrap();
        let here = stream.local_addr().unwrap().port();
        let us = std::process::id().cast_signed();
        assert!(sockets(us).len() >= 2);
        let ours = connections(us, &[us]);
        let rule = |from, to| {
            format!(
                "-A INPUT -s 127.0.0.1/32 -d 127.0.0.1/32 -p tcp -m mark ! --mark 0xc114 -m tcp \
                 --sport {from} --dport {to} -j DROP"
            )
        };
        let concerns = |from, to| ours.iter().any(|one| is_about(&rule(from, to), one));
        assert!(concerns(here, there) && concerns(there, here));
        assert!(!concerns(here, there + 1) && !concerns(here, here));
    }
}
