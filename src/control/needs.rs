//! What the objects of a process ask of their device. Another device has to offer as much, or the job is not restarted on it.

use serde::{Deserialize, Serialize};

use crate::handle::VirtualGid;

/// Of one context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// Every kind of queue pair that there is, once.
    pub queue_pairs: Vec<QueuePairNeeds>,
    /// Entries of the largest completion queue.
    pub completions: u32,
    /// Requests of the largest shared receive queue.
    pub shared_requests: u32,
    /// Most elements of a request in one.
    pub shared_elements: u32,
    /// Bytes of the largest memory region.
    pub region_bytes: u64,
    /// A memory region or a queue pair lets atomics in.
    pub atomics: bool,
    /// Bytes that a datagram may have (the path MTU of the port); 0 without datagram queue pairs.
    pub datagram_bytes: u32,
    /// Addresses that packets leave from.
    pub sources: Vec<Source>,
}

/// Of one queue pair: what it was granted, and reads and atomics under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePairNeeds {
    /// RC, UC or UD.
    pub transport: String,
    pub send_requests: u32,
    pub receive_requests: u32,
    pub send_elements: u32,
    pub receive_elements: u32,
    pub inline_bytes: u32,
    /// At the same time, as the one who asks (`max_rd_atomic`).
    pub reads_asked: u8,
    /// As the one who answers (`max_dest_rd_atomic`).
    pub reads_answered: u8,
}

/// An entry of a port's GID table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub port: u32,
    pub index: u32,
    pub gid: VirtualGid,
    /// Packets go as RoCE version 2, in UDP.
    pub roce_v2: bool,
}
