//! Which RDMA objects the kernel counts for a process.
//!
//! The kernel notes, with every object, the *thread* that created it, and answers with that
//! thread's id; once the thread has ended it answers without any id. So a process is matched by
//! all its threads, and objects without an owner are reported apart instead of being lost.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::devices;
use crate::fds::{self, DescriptorKind, FdError, Process};
use crate::netlink::{Attributes, Command, Connection, NetlinkError, attribute};
use crate::sysfs::Sysfs;

/// A kind of object that the kernel tracks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    /// An open device (`ibv_open_device`).
    Context,
    /// A protection domain.
    ProtectionDomain,
    /// A completion queue.
    CompletionQueue,
    /// A shared receive queue; older kernels refuse to list these (6.1 does list them).
    SharedReceiveQueue,
    /// A memory region.
    MemoryRegion,
    /// A queue pair.
    QueuePair,
    /// An identifier of the RDMA connection manager (`rdma_create_id`) bound to a device.
    ConnectionId,
}

impl ObjectKind {
    /// All kinds, in the order in which objects depend on each other.
    pub const ALL: [Self; 7] = [
        Self::Context,
        Self::ProtectionDomain,
        Self::CompletionQueue,
        Self::SharedReceiveQueue,
        Self::MemoryRegion,
        Self::QueuePair,
        Self::ConnectionId,
    ];

    /// The short name that `rdma resource show` uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Context => "ctx",
            Self::ProtectionDomain => "pd",
            Self::CompletionQueue => "cq",
            Self::SharedReceiveQueue => "srq",
            Self::MemoryRegion => "mr",
            Self::QueuePair => "qp",
            Self::ConnectionId => "cm_id",
        }
    }

    fn command(self) -> Command {
        match self {
            Self::Context => Command::Contexts,
            Self::ProtectionDomain => Command::ProtectionDomains,
            Self::CompletionQueue => Command::CompletionQueues,
            Self::SharedReceiveQueue => Command::SharedReceiveQueues,
            Self::MemoryRegion => Command::MemoryRegions,
            Self::QueuePair => Command::QueuePairs,
            Self::ConnectionId => Command::ConnectionIds,
        }
    }

    /// The attribute that wraps the answer to a listing command.
    fn table_attribute(self) -> u16 {
        match self {
            Self::Context => attribute::CONTEXT_TABLE,
            Self::ProtectionDomain => attribute::PD_TABLE,
            Self::CompletionQueue => attribute::CQ_TABLE,
            Self::SharedReceiveQueue => attribute::SRQ_TABLE,
            Self::MemoryRegion => attribute::MR_TABLE,
            Self::QueuePair => attribute::QP_TABLE,
            Self::ConnectionId => attribute::CM_ID_TABLE,
        }
    }

    /// The attribute that holds the kernel's number of an object.
    fn number_attribute(self) -> u16 {
        match self {
            Self::Context => attribute::CONTEXT_NUMBER,
            Self::ProtectionDomain => attribute::PD_NUMBER,
            Self::CompletionQueue => attribute::CQ_NUMBER,
            Self::SharedReceiveQueue => attribute::SRQ_NUMBER,
            Self::MemoryRegion => attribute::MR_NUMBER,
            Self::QueuePair => attribute::LOCAL_QPN,
            Self::ConnectionId => attribute::CM_ID_NUMBER,
        }
    }
}

/// One tracked object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// What it is.
    pub kind: ObjectKind,
    /// The device that it belongs to.
    pub device: String,
    /// The kernel's number of it: the queue pair number of a queue pair, otherwise a number
    /// that only restrack uses.
    pub number: Option<u32>,
    /// Who created it.
    pub owner: Owner,
    /// The queue pair of a connection id.
    pub queue_pair_number: Option<u32>,
    /// State of a queue pair (`enum ib_qp_state`) or a connection id (`enum rdma_cm_state`).
    pub state: Option<u8>,
    /// Local address of a connection id.
    pub source: Option<SocketAddr>,
    /// Remote address of a connection id.
    pub destination: Option<SocketAddr>,
}

/// Who created an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// The thread with this id, in the reader's PID namespace.
    Thread(u32),
    /// A part of the kernel.
    Kernel(String),
    /// A thread that has ended or lives in another PID namespace.
    Unknown,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        if let Some(number) = self.number {
            write!(f, " {number}")?;
        }
        write!(f, " on {}", self.device)?;
        let mut details = Vec::new();
        if let Some(number) = self.queue_pair_number {
            details.push(format!("qpn {number}"));
        }
        if let Some(name) = self.state_name() {
            details.push(name.to_owned());
        }
        if let Some(source) = self.source {
            details.push(format!("local {source}"));
        }
        if let Some(destination) = self.destination {
            details.push(format!("remote {destination}"));
        }
        if details.is_empty() {
            Ok(())
        } else {
            write!(f, " ({})", details.join(", "))
        }
    }
}

impl Object {
    /// The name of [`Object::state`].
    pub fn state_name(&self) -> Option<&'static str> {
        const QUEUE_PAIR: [&str; 7] = ["RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR"];
        const CONNECTION_ID: [&str; 11] = [
            "IDLE",
            "ADDR_QUERY",
            "ADDR_RESOLVED",
            "ROUTE_QUERY",
            "ROUTE_RESOLVED",
            "CONNECT",
            "DISCONNECT",
            "ADDR_BOUND",
            "LISTEN",
            "DEVICE_REMOVAL",
            "DESTROYING",
        ];
        let names: &[&str] = match self.kind {
            ObjectKind::QueuePair => &QUEUE_PAIR,
            ObjectKind::ConnectionId => &CONNECTION_ID,
            _ => return None,
        };
        names.get(usize::from(self.state?)).copied()
    }

    fn parse(kind: ObjectKind, device: &str, entry: Attributes<'_>) -> Self {
        let owner = if let Some(thread) = entry.u32(attribute::PID) {
            Owner::Thread(thread)
        } else if let Some(name) = entry.text(attribute::KERNEL_NAME) {
            Owner::Kernel(name)
        } else {
            Owner::Unknown
        };
        let of_connection = kind == ObjectKind::ConnectionId;
        Self {
            kind,
            device: device.to_owned(),
            number: entry.u32(kind.number_attribute()),
            owner,
            queue_pair_number: entry.u32(attribute::LOCAL_QPN).filter(|_| of_connection),
            state: entry.u8(attribute::STATE),
            source: entry
                .bytes(attribute::SOURCE_ADDRESS)
                .and_then(parse_address),
            destination: entry
                .bytes(attribute::DESTINATION_ADDRESS)
                .and_then(parse_address),
        }
    }
}

/// What the kernel counts for one process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Objects made by threads of the process that still run.
    pub owned: Vec<Object>,
    /// Objects of user space that no running thread made. Each may belong to the process or to
    /// any other; a caller that must not miss one counts them in.
    pub unattributed: Vec<Object>,
}

/// Why a process's objects are not known.
#[derive(Debug, thiserror::Error)]
pub enum RestrackError {
    /// The kernel could not be asked.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The process's descriptors could not be listed.
    #[error(transparent)]
    Descriptors(#[from] FdError),
    /// The process is gone or hidden.
    #[error("cannot list the threads of process {pid}; does it still run?")]
    Threads {
        /// The process.
        pid: u32,
        /// What reading `/proc` answered.
        source: io::Error,
    },
}

/// Lists the objects of the given kinds on all devices that this network namespace sees.
///
/// # Errors
/// When the kernel cannot be asked, or does not know one of the kinds.
pub fn list(
    connection: &mut Connection,
    kinds: &[ObjectKind],
) -> Result<Vec<Object>, NetlinkError> {
    let mut objects = Vec::new();
    for (index, device) in devices::indexes(connection)? {
        for kind in kinds {
            for answer in connection.dump(kind.command(), Some(index))? {
                let table = answer.attributes().nested(kind.table_attribute());
                let entries = table.into_iter().flat_map(Attributes::entries);
                objects.extend(entries.map(|entry| Object::parse(*kind, &device, entry)));
            }
        }
    }
    Ok(objects)
}

/// The objects of the given kinds that belong to process `pid`, by all of its threads.
///
/// Objects that forked children inherited count for the process that made them. A connection id
/// that is not bound to a device yet (`rdma_create_id` and nothing more) is not listed by the
/// kernel at all.
///
/// # Errors
/// When the kernel cannot be asked or the process does not exist.
pub fn holdings(
    connection: &mut Connection,
    pid: u32,
    kinds: &[ObjectKind],
) -> Result<Holdings, RestrackError> {
    // Objects first: a thread that starts in between cannot have made one of them.
    let objects = list(connection, kinds)?;
    let threads = threads_of(pid).map_err(|source| RestrackError::Threads { pid, source })?;
    Ok(attribute_objects(objects, &threads))
}

/// The connection ids that process `pid` has or may have: those of its threads, and, if it holds
/// a descriptor of the connection manager, those without an owner.
///
/// Empty means that the process's descriptors of the connection manager are idle and can be let
/// go, but for ids that are not bound to a device (see [`holdings`]).
///
/// # Errors
/// When the kernel cannot be asked, or the process is gone or belongs to somebody else.
pub fn live_connection_ids(
    connection: &mut Connection,
    sysfs: &Sysfs,
    pid: u32,
) -> Result<Vec<Object>, RestrackError> {
    let Holdings {
        mut owned,
        unattributed,
    } = holdings(connection, pid, &[ObjectKind::ConnectionId])?;
    if !unattributed.is_empty()
        && fds::rdma_descriptors(sysfs, Process::Id(pid))?
            .iter()
            .any(|descriptor| descriptor.kind == DescriptorKind::ConnectionManager)
    {
        owned.extend(unattributed);
    }
    Ok(owned)
}

fn attribute_objects(objects: Vec<Object>, threads: &[u32]) -> Holdings {
    let mut holdings = Holdings::default();
    for object in objects {
        match object.owner {
            Owner::Thread(id) if threads.contains(&id) => holdings.owned.push(object),
            Owner::Thread(_) | Owner::Kernel(_) => {}
            Owner::Unknown => holdings.unattributed.push(object),
        }
    }
    holdings
}

fn threads_of(pid: u32) -> io::Result<Vec<u32>> {
    let mut threads = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Some(id) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            threads.push(id);
        }
    }
    Ok(threads)
}

/// An IPv4 or IPv6 `sockaddr_storage`; `None` for other families and unset addresses.
fn parse_address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    let address: IpAddr = match i32::from(family) {
        libc::AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(4..8)?).ok()?).into(),
        libc::AF_INET6 => Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(8..24)?).ok()?).into(),
        _ => return None,
    };
    let unset = address.is_unspecified() && port == 0;
    (!unset).then_some(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(number: u32, owner: Owner) -> Object {
        Object {
            kind: ObjectKind::ConnectionId,
            device: "rxe0".to_owned(),
            number: Some(number),
            owner,
            queue_pair_number: None,
            state: Some(8),
            source: None,
            destination: None,
        }
    }

    #[test]
    fn objects_are_matched_by_every_thread() {
        let objects = vec![
            object(1, Owner::Thread(100)),
            object(2, Owner::Thread(101)),
            object(3, Owner::Thread(200)),
            object(4, Owner::Kernel("nvmet".to_owned())),
            object(5, Owner::Unknown),
        ];
        let holdings = attribute_objects(objects, &[100, 101]);
        let numbers = |objects: &[Object]| -> Vec<_> {
            objects.iter().filter_map(|object| object.number).collect()
        };
        assert_eq!(numbers(&holdings.owned), [1, 2]);
        assert_eq!(numbers(&holdings.unattributed), [5]);
    }

    #[test]
    fn addresses_of_both_families() {
        let mut four = vec![0; 128];
        four[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        four[2..8].copy_from_slice(&[0x1c, 0x06, 10, 77, 0, 1]);
        assert_eq!(
            parse_address(&four),
            Some("10.77.0.1:7174".parse().unwrap())
        );
        let mut six = vec![0; 128];
        six[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        six[23] = 1;
        six[3] = 9;
        assert_eq!(parse_address(&six), Some("[::1]:9".parse().unwrap()));
        assert_eq!(parse_address(&[0; 128]), None);
        assert_eq!(parse_address(&four[..6]), None);
    }

    #[test]
    fn an_error_can_name_the_object() {
        let mut listening = object(3, Owner::Thread(1));
        listening.source = Some("10.77.0.1:7174".parse().unwrap());
        assert_eq!(
            listening.to_string(),
            "cm_id 3 on rxe0 (LISTEN, local 10.77.0.1:7174)"
        );
    }
}
