//! The messages, and the phases an agent goes through.

use serde::{Deserialize, Serialize};

use super::needs::Needs;
use crate::handle::{
    HardwareGid, HardwareKey, HardwareLid, HardwareQpn, Psn, VirtualGid, VirtualKey, VirtualLid,
    VirtualQpn,
};

/// Both ends must speak the same version; a difference is refused at [`Request::Hello`].
pub const PROTOCOL_VERSION: u32 = 3;

/// Where a process stands. Phases are entered in this order and the last leads back to the first; the only ways back
/// are `Closed` to `Running` (nothing was moved yet) and `Connected` to `Running`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Gates open.
    Running,
    /// Gates closed: sends are held, receives still go down.
    Closed,
    /// Queue pairs with sends that could not complete have been moved to the error state; what was flushed is known.
    Stopped,
    /// Every send is known to be executed or not; the network holds nothing of this process.
    Settled,
    /// No hardware object and no RDMA file descriptor is left.
    Released,
    /// Fresh hardware objects exist; their numbers can be asked for.
    Rebuilt,
    /// Queue pairs are connected, receives posted.
    Connected,
}

/// What the orchestrator asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Who is there? Answered by [`Reply::Hello`] in any phase, to any session.
    Hello { version: u32 },
    /// Claims the process for one orchestrator, which every later request must come from. `takeover` replaces a session whose
    /// orchestrator has died. Answered by [`Reply::Done`], or [`Reply::Refused`] naming the owner.
    Begin { session: Session, takeover: bool },
    /// What stands in the way of a checkpoint: see [`Reply::Obstacles`]. Only in [`Phase::Running`] or [`Phase::Closed`].
    Examine,
    /// Running to Closed. Waits at most `limit_ms` for threads that are inside a verb.
    Close { limit_ms: u64 },
    /// Whom the connected queue pairs lead to: [`Reply::Peers`]. Only in Closed.
    Peers,
    /// These queue pairs lead out of the job and shall come back in the error state. Only in Closed.
    GiveUp { queue_pairs: Vec<HardwareQueuePair> },
    /// Polls completions for up to `limit_ms` and says what is outstanding; with `arrivals` also whether anything arrives. Only
    /// in Closed. Asked again while there is progress.
    Drain { limit_ms: u64, arrivals: bool },
    /// Closed to Stopped: moves queue pairs with outstanding sends to the error state and collects what is flushed.
    Stop { limit_ms: u64 },
    /// Polls until nothing more arrives, then answers [`Reply::Responders`]. Only in Stopped, after all processes are.
    Responders,
    /// Stopped to Settled, given what the peers of all processes have executed.
    Settle { responders: Vec<ResponderState> },
    /// Settled to Released.
    Release,
    /// Released to Rebuilt, on the device named for each old one, or the best match where none is named.
    Rebuild { devices: Vec<DeviceChoice> },
    /// Asks a Rebuilt or Connected process for its numbers: [`Reply::Numbers`].
    Publish,
    /// Rebuilt to Connected, given the numbers of all processes of the job.
    Connect { numbers: Vec<ProcessNumbers> },
    /// Connected (or Closed, if nothing was stopped) to Running; the session ends.
    Resume,
    /// State for people: [`Reply::Status`]. In any phase, from anybody of the same user.
    Status,
}

impl Request {
    /// For logs and messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Begin { .. } => "begin",
            Self::Examine => "examine",
            Self::Close { .. } => "close",
            Self::Peers => "peers",
            Self::GiveUp { .. } => "give_up",
            Self::Drain { .. } => "drain",
            Self::Stop { .. } => "stop",
            Self::Responders => "responders",
            Self::Settle { .. } => "settle",
            Self::Release => "release",
            Self::Rebuild { .. } => "rebuild",
            Self::Publish => "publish",
            Self::Connect { .. } => "connect",
            Self::Resume => "resume",
            Self::Status => "status",
        }
    }
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Hello {
        version: u32,
        pid: i32,
        phase: Phase,
        session: Option<Session>,
    },
    /// The request was carried out; where the process stands now.
    Done {
        phase: Phase,
    },
    Obstacles {
        obstacles: Vec<Obstacle>,
        /// Most bytes that the [`ProcessNumbers`] of this process can take in a message.
        numbers_bytes: u64,
    },
    Peers {
        contexts: Vec<ContextPeers>,
    },
    Drained {
        drained: DrainReport,
    },
    Responders {
        responders: Vec<ResponderState>,
    },
    Numbers {
        numbers: ProcessNumbers,
    },
    Status {
        status: ProcessStatus,
    },
    /// Nothing was done, and why. The process is as it was before the request unless `phase` says otherwise.
    Refused {
        phase: Phase,
        reason: String,
    },
}

/// An orchestrator's claim on a process.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Session {
    /// Random; the same in every process of the job.
    pub id: String,
    /// Process id of the orchestrator, to see whether it still lives.
    pub pid: i32,
}

/// One thing that cannot be checkpointed, in words that name it and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Obstacle {
    pub what: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainReport {
    /// Send work requests that have neither completed nor been shown to be executed.
    pub outstanding_sends: u64,
    /// Completions taken from the hardware during this request.
    pub completions: u64,
    /// Completions held back for the application so far.
    pub held_completions: u64,
    /// Where arrivals were asked for and no completion came: the sum of the PSNs that responders expect. It moves while a
    /// message is under way.
    pub expected_psns: Option<u64>,
}

/// How far the responder half of a queue pair came, read after its peer has stopped sending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponderState {
    pub address: PortAddress,
    pub qpn: VirtualQpn,
    /// Whom it is connected to.
    pub peer: Option<VirtualQpn>,
    pub progress: Progress,
}

/// What a responder can tell of how far it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// Since it was made it has never been ready to receive, so it has executed nothing.
    Nothing,
    /// The next PSN it expects (`rq_psn` of `ibv_query_qp`), from a device that was seen to keep this up to date.
    Expects(Psn),
    /// How many messages of this connection have used up a receive, modulo 2^32.
    Received(u32),
    /// Nothing of all this: the receives are those of a shared queue, or were flushed.
    Unknown,
}

/// The queue pairs of a device of one process, and whom they are connected to, all in the hardware's terms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextPeers {
    pub hardware_device: String,
    pub ports: Vec<HardwarePort>,
    pub queue_pairs: Vec<QueuePairPeer>,
}

/// A port as it is addressed now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HardwarePort {
    pub port: u8,
    pub gids: Vec<HardwareGid>,
    pub lid: HardwareLid,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePairPeer {
    pub qpn: VirtualQpn,
    pub hardware_qpn: HardwareQpn,
    pub port: u8,
    /// `None` for one that is not connected, or of a transport without connections.
    pub peer: Option<HardwarePeer>,
}

/// Where a connected queue pair sends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HardwarePeer {
    pub address: HardwareAddress,
    pub qpn: HardwareQpn,
}

/// By GID where the address vector is global, else by LID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HardwareAddress {
    Gid(HardwareGid),
    Lid(HardwareLid),
}

/// A queue pair of a process, by what it is on its device now.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HardwareQueuePair {
    pub pid: i32,
    pub hardware_device: String,
    pub hardware_qpn: HardwareQpn,
}

/// How peers address a port: by GID on RoCE and routed fabrics, by LID within an InfiniBand subnet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortAddress {
    pub gids: Vec<VirtualGid>,
    pub lid: VirtualLid,
}

/// `--device OLD=NEW`, or `--device NEW` for all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceChoice {
    /// The name at the first open; `None` stands for every device of the process.
    pub from: Option<String>,
    pub to: String,
}

/// Old and new numbers of one process, learnt by all at [`Request::Connect`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessNumbers {
    pub pid: i32,
    pub contexts: Vec<ContextNumbers>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextNumbers {
    /// Name of the device as first opened, and of the one below now.
    pub device: String,
    pub hardware_device: String,
    pub ports: Vec<PortNumbers>,
    pub queue_pairs: Vec<QueuePairNumbers>,
    /// Remote keys that peers may hold.
    pub rkeys: Vec<(VirtualKey, HardwareKey)>,
}

impl ContextNumbers {
    /// Most bytes in a message of a context with so many queue pairs, keys, ports, and GIDs on all ports.
    #[must_use]
    pub fn most_bytes(queue_pairs: usize, keys: usize, ports: usize, gids: usize) -> u64 {
        // Names of devices have at most 63 bytes (IB_DEVICE_NAME_MAX).
        let bytes = 256 + 96 * queue_pairs + 24 * keys + 64 * ports + 136 * gids;
        bytes as u64
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortNumbers {
    pub port: u8,
    pub lid: (VirtualLid, HardwareLid),
    /// Every GID the application can have seen, and the one of the same type and role that stands for it now.
    pub gids: Vec<(VirtualGid, HardwareGid)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePairNumbers {
    pub port: u8,
    pub virtual_qpn: VirtualQpn,
    pub hardware_qpn: HardwareQpn,
    /// The PSN this side will send first.
    pub first_psn: Psn,
    /// log2 of the path MTU in bytes that this side can do.
    pub mtu: u8,
}

/// What `reverbs status` and the image's manifest show of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    pub pid: i32,
    pub phase: Phase,
    pub session: Option<Session>,
    /// How often the hardware was replaced since the process started.
    pub rebuilds: u64,
    pub rdma_core: String,
    pub contexts: Vec<ContextStatus>,
    /// Kept for the log: requests flushed because their fate was unknown, queue pairs parked, regions lost.
    pub notes: Vec<String>,
    /// Of a process that replaces its hardware by itself (`REVERBS_CHAOS`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chaos: Option<ChaosStatus>,
}

/// How often a process has replaced its hardware by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChaosStatus {
    pub cycles: u64,
    /// Times at which something stood in the way.
    pub skipped: u64,
    /// What it was, the last time.
    pub last_skip: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextStatus {
    pub device: String,
    pub hardware_device: String,
    /// Whether the device tells how far its responders came (`rq_psn`); `None` before an RC queue pair is connected.
    pub responder_psn_is_live: Option<bool>,
    pub ports: Vec<PortNumbers>,
    pub queue_pairs: Vec<QueuePairStatus>,
    pub memory_regions: Vec<MemoryRegionStatus>,
    pub completion_queues: u64,
    pub shared_receive_queues: u64,
    pub protection_domains: u64,
    pub address_handles: u64,
    pub completion_channels: u64,
    /// Empty in images of earlier releases.
    #[serde(default)]
    pub needs: Needs,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePairStatus {
    pub virtual_qpn: VirtualQpn,
    /// `None` while released.
    pub hardware_qpn: Option<HardwareQpn>,
    /// RC, UC or UD.
    pub transport: String,
    /// RESET, INIT, RTR, RTS, SQD, SQE or ERR.
    pub state: String,
    pub peer: Option<VirtualQpn>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegionStatus {
    pub address: u64,
    /// Bytes.
    pub length: u64,
    pub lkey: (VirtualKey, Option<HardwareKey>),
    pub rkey: (VirtualKey, Option<HardwareKey>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_context_takes_more_bytes_than_it_can() {
        let address = [u8::MAX; 16];
        let context = |queue_pairs, keys, gids| ContextNumbers {
            device: "d".repeat(63),
            hardware_device: "d".repeat(63),
            ports: vec![PortNumbers {
                port: u8::MAX,
                lid: (VirtualLid(u16::MAX), HardwareLid(u16::MAX)),
                gids: vec![(VirtualGid(address), HardwareGid(address)); gids],
            }],
            queue_pairs: vec![
                QueuePairNumbers {
                    port: u8::MAX,
                    virtual_qpn: VirtualQpn(0xff_ffff),
                    hardware_qpn: HardwareQpn(0xff_ffff),
                    first_psn: Psn(0xff_ffff),
                    mtu: u8::MAX,
                };
                queue_pairs
            ],
            rkeys: vec![(VirtualKey(u32::MAX), HardwareKey(u32::MAX)); keys],
        };
        for (queue_pairs, keys, gids) in [(0, 0, 0), (1000, 0, 0), (0, 1000, 0), (0, 0, 1000)] {
            let text = serde_json::to_vec(&context(queue_pairs, keys, gids)).unwrap();
            let most = ContextNumbers::most_bytes(queue_pairs, keys, 1, gids);
            let taken = text.len() as u64;
            assert!(
                taken <= most && most <= taken + taken / 10 + 256,
                "{taken} {most}"
            );
        }
    }
}
