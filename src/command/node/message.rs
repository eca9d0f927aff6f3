//! What the first node asks of all, itself included.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use reverbs::control::message::{DeviceChoice, HardwarePeer, ProcessNumbers, Reply, Request};
use reverbs::image::PhaseTime;

use crate::command::files::FilePolicy;
use crate::command::job::{AgentFailure, Hello, ProcessId, Unreachable, Whose};
use crate::command::network::Overlay;
use crate::command::secret::Secret;

/// Asked of one node, or of all at the same time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub(crate) enum NodeRequest {
    /// Takes the part of a job that runs here: [`NodeReply::Done`]. Nobody else can drive it until the connection ends.
    Attach {
        /// Roots of the trees, by node.
        roots: Vec<i32>,
        /// `None` for a job of one node.
        job: Option<String>,
        /// Not only to look at it.
        driving: bool,
    },
    /// The agents there are: [`NodeReply::Agents`].
    Scan,
    /// Asks those of the targets that are here: [`NodeReply::Answers`].
    Ask {
        targets: Vec<ProcessId>,
        /// Shared, since each connection carries targets of its own.
        request: Arc<Request>,
    },
    /// Leaves the numbers of the job for younger processes.
    Leave { numbers: Vec<ProcessNumbers> },
    /// [`NodeReply::Whose`].
    Whose {
        peer: HardwarePeer,
        device: Option<String>,
    },
    /// Undoes what a CRIU that was killed has left.
    Unlock,
    /// Can it be saved? [`NodeReply::Examined`].
    Examine { largest_deleted: u64 },
    /// Saves the tree below `parts`, in a folder named after the node's number. Answered when everything is written; the
    /// processes stay frozen until [`NodeRequest::Decide`].
    Save {
        parts: PathBuf,
        /// Where the image will appear: if the connection is lost, this tells whether the checkpoint was done.
        image: PathBuf,
        /// Whether each node has a folder of its own below `parts`.
        divided: bool,
        /// They shall end.
        stop: bool,
    },
    /// Brings what was saved to disk and describes it: [`NodeReply::Sealed`].
    Seal { phases: Vec<PhaseTime> },
    /// Lets go of the frozen processes: to run, or to end where that was asked for and `done`.
    Decide { done: bool },
    /// From here on nobody else restores that part, by node: [`NodeReply::Claimed`].
    Claim { parts: Vec<ImagePart> },
    /// Checks the part and whether it can be restored here: [`NodeReply::Opened`]. Nothing is changed.
    Open {
        files: FilePolicy,
        devices: Vec<DeviceChoice>,
    },
    /// The processes will live in a network of their own.
    Join { overlay: Overlay },
    /// Puts files back: [`NodeReply::Files`].
    PutFiles,
    /// From here on nothing arrives on the connections of the job.
    Hold,
    /// Restores the processes.
    Restore,
    /// Lets arrive what was held back.
    LetArrive,
    /// The restart has failed: what was restored is ended.
    Kill,
    /// The restart is done: the processes stay. The secret is for later commands, under the id of the job.
    Keep { secret: Option<(String, Secret)> },
    /// Waits until the restored processes have ended.
    AwaitEnd,
}

/// One node's part of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImagePart {
    pub(crate) folder: PathBuf,
    /// Where it is brought on a node that does not see that folder.
    pub(crate) copy: PathBuf,
    /// Root of its process tree.
    pub(crate) root: i32,
    /// Names files that are kept when others are put in their place.
    pub(crate) label: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(crate) enum NodeReply {
    Done,
    Agents {
        agents: Vec<Result<Hello, Unreachable>>,
    },
    Answers {
        answers: Vec<(ProcessId, Result<Reply, AgentFailure>)>,
    },
    Whose {
        whose: Whose,
    },
    Examined {
        processes: usize,
        /// Of memory, roughly what has to be written.
        bytes: u64,
    },
    Saved {
        processes: usize,
        /// Files carried.
        carried: usize,
        /// On a disk of this node: it does not see the folder that the first has made.
        apart: bool,
    },
    Sealed {
        bytes: u64,
    },
    Claimed {
        /// This node sees the part.
        here: bool,
    },
    Opened {
        bytes: u64,
        files: usize,
        processes: usize,
        /// Of these, with an agent.
        agents: usize,
        carried: usize,
        /// Addresses of this part that are not here, but connections use them.
        foreign: Vec<IpAddr>,
        /// All addresses of this part.
        addresses: Vec<IpAddr>,
    },
    Files {
        restored: usize,
        notes: Vec<String>,
    },
}

impl NodeRequest {
    /// For messages.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Attach { .. } => "attach",
            Self::Scan => "scan",
            Self::Ask { request, .. } => request.name(),
            Self::Leave { .. } => "leave",
            Self::Whose { .. } => "whose",
            Self::Unlock => "unlock",
            Self::Examine { .. } => "examine",
            Self::Save { .. } => "save",
            Self::Seal { .. } => "seal",
            Self::Decide { .. } => "decide",
            Self::Claim { .. } => "claim",
            Self::Open { .. } => "open",
            Self::Join { .. } => "join",
            Self::PutFiles => "put files",
            Self::Hold => "hold",
            Self::Restore => "restore",
            Self::LetArrive => "let arrive",
            Self::Kill => "kill",
            Self::Keep { .. } => "keep",
            Self::AwaitEnd => "await the end",
        }
    }
}
