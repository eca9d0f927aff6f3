//! The manifest of an image.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use reverbs::control::message::ProcessStatus;

use crate::command::addresses::BoundAddress;
use crate::command::files::{Carried, WrittenFile};
use crate::command::progress::PhaseTime;

pub(super) const FORMAT: &str = "reverbs-image";
/// Raised by every change that an older command would misread.
pub(super) const VERSION: u32 = 1;

/// What has to be understood before anything else in the manifest can be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) format: String,
    pub(super) version: u32,
}

/// Everything there is to know about an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: String,
    pub(crate) version: u32,
    /// Release of the command that wrote it.
    pub(crate) reverbs: String,
    /// UTC, ISO 8601.
    pub(crate) created: String,
    pub(crate) host: String,
    pub(crate) kernel: String,
    /// The user whose memory this is.
    pub(crate) user: u32,
    /// Root of the process tree.
    pub(crate) root: i32,
    /// Whether the job ended with the checkpoint.
    pub(crate) stopped: bool,
    pub(crate) processes: Vec<ImageProcess>,
    pub(crate) criu: CriuFacts,
    /// Where sockets of the runtime folder are expected.
    pub(crate) runtime_folder: PathBuf,
    /// Ports that processes listen on: nothing else may hold them at a restart.
    pub(crate) listening_ports: Vec<u16>,
    /// Addresses of the host that sockets are bound to.
    pub(crate) addresses: Vec<BoundAddress>,
    pub(crate) outside_pipes: Vec<OutsidePipe>,
    pub(crate) carried: Vec<Carried>,
    pub(crate) written_files: Vec<WrittenFile>,
    pub(crate) phases: Vec<PhaseTime>,
    /// Every other file of the image.
    pub(crate) contents: Vec<ImageFile>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ImageProcess {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    pub(crate) group: i32,
    pub(crate) session: i32,
    pub(crate) name: String,
    /// Ids of all its threads, which have to be free at a restart.
    pub(crate) threads: Vec<i32>,
    pub(crate) executable: Option<PathBuf>,
    pub(crate) command_line: Vec<String>,
    pub(crate) working_folder: Option<PathBuf>,
    /// What its agent said before the checkpoint; `None` for a process that uses no RDMA.
    pub(crate) rdma: Option<ProcessStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CriuFacts {
    pub(crate) version: String,
    /// Options of the dump that the restore needs as well.
    pub(crate) options: Vec<String>,
}

/// A pipe whose other end is outside the tree: its end inside is led to the restart's own output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OutsidePipe {
    pub(crate) inode: u64,
    /// The lowest descriptor under which a process has it.
    pub(crate) descriptor: i32,
    pub(crate) process: i32,
    /// The process writes to it (else it reads from it).
    pub(crate) written: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageFile {
    /// Below the image's folder.
    pub(crate) path: PathBuf,
    pub(crate) size: u64,
    pub(crate) crc32: u32,
}

impl Manifest {
    pub(crate) fn format() -> String {
        FORMAT.to_owned()
    }

    pub(crate) const fn version() -> u32 {
        VERSION
    }

    /// Bytes of the image without the manifest.
    pub(crate) fn bytes(&self) -> u64 {
        self.contents.iter().map(|file| file.size).sum()
    }

    /// Every id that a restart needs free: of processes and of threads.
    pub(crate) fn ids(&self) -> Vec<i32> {
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
