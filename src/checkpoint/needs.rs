//! What the objects of a context ask of its device, for whoever looks for another one.

use std::collections::BTreeSet;

use rdma_core_sys::IBV_ACCESS_REMOTE_ATOMIC;

use kmod_compat::ports::GidType;

use crate::control::needs::{Needs, Source};
use crate::handle::VirtualGid;
use crate::virt::context::Context;
use crate::virt::ports;

/// # Safety
/// The registry must hold still.
pub(super) unsafe fn needs(context: &Context) -> Needs {
    let mut needs = Needs::default();
    let mut sources = BTreeSet::new();
    let mut datagram_ports = BTreeSet::new();
    let objects = context.objects();
    // SAFETY: as the caller vouches.
    unsafe {
        for (_, pair) in &objects.queue_pairs {
            let pair = pair.get();
            let of_pair = pair.needs();
            if of_pair.transport == "UD" {
                datagram_ports.insert(pair.port().max(1));
            }
            if !needs.queue_pairs.contains(&of_pair) {
                needs.queue_pairs.push(of_pair);
            }
            needs.atomics |= pair.lets_atomics_in();
            sources.extend(pair.source());
        }
        for (_, handle) in &objects.address_handles {
            sources.extend(handle.get().source());
        }
        for (_, queue) in &objects.completion_queues {
            needs.completions = needs.completions.max(queue.get().entries());
        }
        for (_, queue) in &objects.shared_queues {
            let (requests, elements) = queue.get().size();
            needs.shared_requests = needs.shared_requests.max(requests);
            needs.shared_elements = needs.shared_elements.max(elements);
        }
        for (_, region) in &objects.regions {
            let region = region.get();
            needs.region_bytes = needs.region_bytes.max(region.range().1);
            needs.atomics |= region.access() & IBV_ACCESS_REMOTE_ATOMIC != 0;
        }
    }
    // The application waits for nothing that is read from here on.
    drop(objects);
    let sizes = datagram_ports.iter().map(|port| ports::mtu(context, *port));
    needs.datagram_bytes = sizes.max().unwrap_or(0);
    needs.sources = named(context, &sources);
    needs
}

/// The addresses behind ports and indexes.
fn named(context: &Context, sources: &BTreeSet<(u8, u8)>) -> Vec<Source> {
    if sources.is_empty() {
        return Vec::new();
    }
    let facts = match ports::first_seen(context) {
        Ok(facts) => facts,
        Err(error) => {
            tracing::warn!(device = context.name(), %error, "nothing is known of the device's addresses");
            return Vec::new();
        }
    };
    let source = |(port, index): &(u8, u8)| {
        let port = facts
            .ports
            .iter()
            .find(|known| known.number == u32::from(*port))?;
        let entry = port.gids.get(usize::from(*index))?;
        Some(Source {
            port: port.number,
            index: u32::from(*index),
            gid: VirtualGid(entry.gid.0),
            roce_v2: entry.gid_type == Some(GidType::RoceV2),
        })
    };
    sources.iter().filter_map(source).collect()
}
