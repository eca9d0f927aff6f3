//! Whom the connected queue pairs lead to, and those that lead out of the job.

use std::collections::HashSet;

use super::Phase;
use super::drain::{each_pair, fail};
use crate::control::message::{
    ContextPeers, HardwarePort, HardwareQueuePair, PortNumbers, QueuePairPeer,
};
use crate::translate::Address;
use crate::virt::context::Context;
use crate::virt::ports;
use crate::virt::process::process;

/// Whom the queue pairs of this process lead to. The gate is closed.
pub(crate) fn peers() -> Phase<Vec<ContextPeers>> {
    let mut contexts: Vec<_> = process()
        .contexts()
        .into_iter()
        .map(|context| {
            let described = described(&context);
            (context, described)
        })
        .collect();
    each_pair(|context, pair| {
        let (Some(hardware_qpn), Some((_, peers))) = (
            pair.hardware_number(),
            contexts
                .iter_mut()
                .find(|(known, _)| std::ptr::eq(&raw const **known, context)),
        ) else {
            return Ok(());
        };
        peers.queue_pairs.push(QueuePairPeer {
            qpn: pair.number(),
            hardware_qpn,
            port: pair.port(),
            peer: pair
                .hardware_peer()
                .map_err(|error| fail("query", pair, error))?,
        });
        Ok(())
    })?;
    Ok(contexts.into_iter().map(|(_, peers)| peers).collect())
}

/// Every address handle leads to a port of this process, or to a group. The gate is closed.
pub(crate) fn require_datagrams_inside() -> Phase<()> {
    let contexts = process().contexts();
    let own: HashSet<Address> = contexts
        .iter()
        .flat_map(|context| ports::numbers(context))
        .flat_map(|port| {
            let gids = port.gids.into_iter().map(|(gid, _)| Address::Gid(gid));
            gids.chain([Address::Lid(port.lid.0)])
        })
        .collect();
    for context in &contexts {
        for (_, handle) in &context.objects().address_handles {
            // SAFETY: the gate is closed, so nothing is destroyed.
            let destination = unsafe { handle.get() }.destination();
            if destination.is_some_and(|address| !own.contains(&address)) {
                return Err(format!(
                    "an address handle of {} leads to another address",
                    context.name()
                ));
            }
        }
    }
    Ok(())
}

fn described(context: &Context) -> ContextPeers {
    let port = |port: PortNumbers| HardwarePort {
        port: port.port,
        gids: port.gids.into_iter().map(|(_, gid)| gid).collect(),
        lid: port.lid.1,
    };
    ContextPeers {
        hardware_device: context.hardware_name(),
        ports: ports::numbers(context).into_iter().map(port).collect(),
        queue_pairs: Vec::new(),
    }
}

/// Queue pairs that lead out of the job, by address.
#[derive(Debug, Default)]
pub(crate) struct Outside(HashSet<usize>);

impl Outside {
    /// Those of `queue_pairs` that are this process's.
    pub(crate) fn of(queue_pairs: &[HardwareQueuePair]) -> Phase<Self> {
        let mut outside = HashSet::new();
        let pid = std::process::id().cast_signed();
        each_pair(|context, pair| {
            let named = |known: &&HardwareQueuePair| {
                known.pid == pid
                    && Some(known.hardware_qpn) == pair.hardware_number()
                    && known.hardware_device == context.hardware_name()
            };
            if queue_pairs.iter().any(|known| named(&known)) {
                outside.insert(std::ptr::from_ref(pair).addr());
            }
            Ok(())
        })?;
        Ok(Self(outside))
    }

    /// They come back in the error state. Gives what is to be told to the user.
    pub(crate) fn give_up(&self) -> Phase<Vec<String>> {
        let mut notes = Vec::new();
        each_pair(|_, pair| {
            if self.0.contains(&std::ptr::from_ref(pair).addr()) {
                pair.give_up();
                notes.push(format!(
                    "queue pair {:#x} ends in the error state: its peer is not part of the job",
                    pair.number().0
                ));
            }
            Ok(())
        })?;
        Ok(notes)
    }
}
