//! The state of the process, for people and for the image's manifest.

use rdma_core_sys::{
    IBV_QPS_INIT, IBV_QPS_RESET, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPS_SQE, ibv_qp_state,
};

use super::needs::needs;
use crate::control::message::{
    ContextStatus, MemoryRegionStatus, Phase, ProcessStatus, QueuePairStatus, Session,
};
use crate::virt::context::Context;
use crate::virt::ports;
use crate::virt::process::{lock, process};
use crate::virt::queue_pair::QueuePair;

/// The registry must hold still: the caller is inside the gate, or has closed it.
pub(crate) fn status(phase: Phase, session: Option<Session>, notes: &[String]) -> ProcessStatus {
    ProcessStatus {
        pid: std::process::id().cast_signed(),
        phase,
        session,
        rebuilds: process().rebuilds(),
        rdma_core: crate::agent::rdma_core().into(),
        contexts: process()
            .contexts()
            .into_iter()
            .map(|context| context_status(&context))
            .collect(),
        notes: notes.to_vec(),
        chaos: None,
    }
}

fn context_status(context: &Context) -> ContextStatus {
    // SAFETY: the caller keeps the registry still.
    let needs = unsafe { needs(context) };
    let objects = context.objects();
    // SAFETY: the caller keeps the registry still.
    unsafe {
        ContextStatus {
            device: context.name(),
            hardware_device: context.hardware_name(),
            responder_psn_is_live: *lock(&context.responder_psn_is_live),
            ports: ports::numbers(context),
            queue_pairs: objects
                .queue_pairs
                .iter()
                .map(|(_, pair)| queue_pair_status(pair.get()))
                .collect(),
            memory_regions: objects
                .regions
                .iter()
                .map(|(_, region)| {
                    let region = region.get();
                    let (address, length) = region.range();
                    let keys = region.hardware_keys();
                    MemoryRegionStatus {
                        address,
                        length,
                        lkey: (region.lkey(), keys.map(|keys| keys.0)),
                        rkey: (region.rkey(), keys.map(|keys| keys.1)),
                    }
                })
                .collect(),
            completion_queues: objects.completion_queues.len() as u64,
            shared_receive_queues: objects.shared_queues.len() as u64,
            protection_domains: objects.domains.len() as u64,
            address_handles: objects.address_handles.len() as u64,
            completion_channels: process()
                .channels()
                .iter()
                .filter(|channel| channel.belongs_to(context))
                .count() as u64,
            needs,
        }
    }
}

fn queue_pair_status(pair: &QueuePair) -> QueuePairStatus {
    let hardware_qpn = pair.hardware_number();
    let state = if hardware_qpn.is_some() {
        pair.hardware_state().ok()
    } else {
        Some(pair.state_to_restore())
    };
    QueuePairStatus {
        virtual_qpn: pair.number(),
        hardware_qpn,
        transport: pair.transport().into(),
        state: state.map_or("UNKNOWN", state_name).into(),
        peer: pair.peer_name().map(|(_, qpn)| qpn),
    }
}

fn state_name(state: ibv_qp_state) -> &'static str {
    match state {
        IBV_QPS_RESET => "RESET",
        IBV_QPS_INIT => "INIT",
        IBV_QPS_RTR => "RTR",
        IBV_QPS_RTS => "RTS",
        IBV_QPS_SQD => "SQD",
        IBV_QPS_SQE => "SQE",
        _ => "ERR",
    }
}
