//! The manifest of an image.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::control::message::ProcessStatus;

pub(crate) const FORMAT: &str = "reverbs-image";
/// Raised by every change that an older command would misread.
pub(crate) const VERSION: u32 = 2;

/// What has to be understood before anything else in the manifest can be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    pub(crate) format: String,
    pub(crate) version: u32,
}

/// Everything there is to know about an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: String,
    pub version: u32,
    /// Release of the command that wrote it.
    pub reverbs: String,
    /// UTC, ISO 8601.
    pub created: String,
    pub host: String,
    pub kernel: String,
    /// The user whose memory this is.
    pub user: u32,
    /// Root of the process tree.
    pub root: i32,
    /// Whether the job ended with the checkpoint.
    pub stopped: bool,
    pub processes: Vec<ImageProcess>,
    /// Programs and libraries that the processes execute, which a restart maps again.
    pub libraries: Vec<Library>,
    pub criu: CriuFacts,
    /// Where sockets of the runtime folder are expected.
    pub runtime_folder: PathBuf,
    /// Ports that processes listen on: nothing else may hold them at a restart.
    pub listening_ports: Vec<u16>,
    /// Addresses of the host that sockets are bound to.
    pub addresses: Vec<BoundAddress>,
    pub outside_pipes: Vec<OutsidePipe>,
    pub carried: Vec<Carried>,
    pub written_files: Vec<WrittenFile>,
    /// TCP connections that lead to another host.
    pub connections: Vec<TcpConnection>,
    pub phases: Vec<PhaseTime>,
    /// Every other file of the image.
    pub contents: Vec<ImageFile>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageProcess {
    pub pid: i32,
    pub parent: i32,
    pub group: i32,
    pub session: i32,
    pub name: String,
    /// Ids of all its threads, which have to be free at a restart.
    pub threads: Vec<i32>,
    pub executable: Option<PathBuf>,
    pub command_line: Vec<String>,
    pub working_folder: Option<PathBuf>,
    /// What its agent said before the checkpoint; `None` for a process that uses no RDMA.
    pub rdma: Option<ProcessStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Library {
    pub path: PathBuf,
    /// Bytes. CRIU looks at the build id as well, but only when it is about to map the file.
    pub size: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CriuFacts {
    pub version: String,
    /// Options of the dump that the restore needs as well.
    pub options: Vec<String>,
}

/// A pipe whose other end is outside the tree: its end inside is led to the restart's own output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutsidePipe {
    pub inode: u64,
    /// The lowest descriptor under which a process has it.
    pub descriptor: i32,
    pub process: i32,
    /// The process writes to it (else it reads from it).
    pub written: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Below the image's folder.
    pub path: PathBuf,
    pub size: u64,
    pub crc32: u32,
}

/// An address of the host at the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundAddress {
    pub address: IpAddr,
    /// A connection uses it, not only a socket that listens.
    pub connected: bool,
}

/// Both ends of a TCP connection, as the process has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpConnection {
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// One thing that the image carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    pub path: PathBuf,
    pub kind: CarriedKind,
    /// Permission bits.
    pub mode: u32,
    pub user: u32,
    pub group: u32,
    /// Last modification, seconds since 1970 and nanoseconds.
    pub modified: (i64, i64),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CarriedKind {
    Folder,
    Fifo,
    /// Contents are in the image's `files/` under this name.
    File {
        stored: String,
        size: u64,
    },
}

/// A file that a process writes to and that lasts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenFile {
    pub path: PathBuf,
    /// Bytes at the checkpoint.
    pub length: u64,
}

/// One phase that is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseTime {
    pub phase: String,
    pub seconds: f64,
}

impl Manifest {
    pub fn format() -> String {
        FORMAT.to_owned()
    }

    pub const fn version() -> u32 {
        VERSION
    }

    /// Bytes of the image without the manifest.
    pub fn bytes(&self) -> u64 {
        self.contents
            .iter()
            .fold(0, |sum, file| sum.saturating_add(file.size))
    }

    /// Processes that use RDMA.
    pub fn processes_with_agents(&self) -> usize {
        let with = self.processes.iter().filter(|one| one.rdma.is_some());
        with.count()
    }

    /// Every id that a restart needs free: of processes and of threads.
    pub fn ids(&self) -> Vec<i32> {
        let mut ids: Vec<i32> = self
            .processes
            .iter()
            .flat_map(|process| process.threads.iter().copied().chain([process.pid]))
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}
