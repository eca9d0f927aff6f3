//! Queue pairs of the job that lead out of it. What is beyond cannot be stopped with the job, asked what it has executed, or
//! told new numbers.

use std::collections::HashSet;

use anyhow::Result;

use super::message::{
    ContextPeers, HardwareAddress, HardwarePeer, HardwarePort, HardwareQueuePair,
};
use super::owner::Whose;
use crate::handle::{HardwareQpn, VirtualQpn};

/// Named in an error at most.
const MOST_NAMED: usize = 3;

/// A queue pair whose peer is not part of the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stray<P> {
    pub process: P,
    hardware_device: String,
    hardware_qpn: HardwareQpn,
    qpn: VirtualQpn,
    peer: HardwarePeer,
    whose: Whose,
}

impl<P> Stray<P> {
    /// As it is asked for, where its process has the id `pid`.
    #[must_use]
    pub fn pair(&self, pid: i32) -> HardwareQueuePair {
        HardwareQueuePair {
            pid,
            hardware_device: self.hardware_device.clone(),
            hardware_qpn: self.hardware_qpn,
        }
    }
}

/// Finds them. `whose` is asked for each peer that is none of the job's queue pairs, with the device of the job that has the
/// address, and a process that has opened it, if there is one.
///
/// # Errors
/// Those of `whose`.
pub fn strays<P: Copy>(
    job: &[(P, Vec<ContextPeers>)],
    mut whose: impl FnMut(&HardwarePeer, Option<(P, &str)>) -> Result<Whose>,
) -> Result<Vec<Stray<P>>> {
    let contexts = || {
        job.iter()
            .flat_map(|(process, contexts)| contexts.iter().map(move |context| (*process, context)))
    };
    let members: HashSet<HardwarePeer> = contexts()
        .flat_map(|(_, context)| context.queue_pairs.iter().map(move |pair| (context, pair)))
        .flat_map(|(context, pair)| {
            let ports = context.ports.iter().filter(|port| port.port == pair.port);
            ports.flat_map(addresses).map(|address| HardwarePeer {
                address,
                qpn: pair.hardware_qpn,
            })
        })
        .collect();
    let mut strays = Vec::new();
    for (process, context) in contexts() {
        for pair in &context.queue_pairs {
            let Some(peer) = pair.peer.filter(|peer| !members.contains(peer)) else {
                continue;
            };
            let device = contexts()
                .find(|(_, other)| {
                    other
                        .ports
                        .iter()
                        .flat_map(addresses)
                        .any(|at| at == peer.address)
                })
                .map(|(process, other)| (process, other.hardware_device.as_str()));
            match whose(&peer, device)? {
                Whose::Nobodys => {}
                whose => strays.push(Stray {
                    process,
                    hardware_device: context.hardware_device.clone(),
                    hardware_qpn: pair.hardware_qpn,
                    qpn: pair.qpn,
                    peer,
                    whose,
                }),
            }
        }
    }
    Ok(strays)
}

fn addresses(port: &HardwarePort) -> impl Iterator<Item = HardwareAddress> + '_ {
    let lid = (port.lid.0 != 0).then_some(HardwareAddress::Lid(port.lid));
    port.gids
        .iter()
        .map(|gid| HardwareAddress::Gid(*gid))
        .chain(lid)
}

/// What to tell the user who has not allowed them.
#[must_use]
pub fn refusal(strays: &[String]) -> String {
    let named = &strays[..strays.len().min(MOST_NAMED)];
    let more = match strays.len() - named.len() {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    format!(
        "{}{more}. Start both ends under one `reverbs run`, or give --allow-outside: these queue pairs then end in the error state",
        named.join("; ")
    )
}

impl<P> std::fmt::Display for Stray<P> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "queue pair {:#x} is connected to queue pair {:#x} ",
            self.qpn.0, self.peer.qpn.0
        )?;
        match &self.whose {
            Whose::Process { pid, name } => write!(out, "of process {pid} ({name})")?,
            Whose::Unknown | Whose::Nobodys => write!(out, "of a process that is not known")?,
            Whose::AnotherHosts => match self.peer.address {
                HardwareAddress::Gid(gid) => {
                    write!(out, "at {}", std::net::Ipv6Addr::from(gid.0))?;
                }
                HardwareAddress::Lid(lid) => write!(out, "at LID {}", lid.0)?,
            },
        }
        write!(out, ", which is not part of the job")
    }
}

#[cfg(test)]
mod tests {
    use super::{Whose, refusal, strays};
    use crate::control::message::{
        ContextPeers, HardwareAddress, HardwarePeer, HardwarePort, QueuePairPeer,
    };
    use crate::handle::{HardwareGid, HardwareLid, HardwareQpn, VirtualQpn};

    const HERE: HardwareGid = HardwareGid([1; 16]);
    const ELSEWHERE: HardwareGid = HardwareGid([2; 16]);

    /// A process on `rxe0`, whose queue pairs are connected to those numbers at those addresses.
    fn process(pairs: &[(u32, HardwareGid, u32)]) -> Vec<ContextPeers> {
        let pair = |(own, gid, peer): &(u32, HardwareGid, u32)| QueuePairPeer {
            qpn: VirtualQpn(own + 100),
            hardware_qpn: HardwareQpn(*own),
            port: 1,
            peer: Some(HardwarePeer {
                address: HardwareAddress::Gid(*gid),
                qpn: HardwareQpn(*peer),
            }),
        };
        vec![ContextPeers {
            hardware_device: "rxe0".into(),
            ports: vec![HardwarePort {
                port: 1,
                gids: vec![HERE],
                lid: HardwareLid(0),
            }],
            queue_pairs: pairs.iter().map(pair).collect(),
        }]
    }

    #[test]
    fn what_leads_out_is_named_and_what_was_destroyed_is_not() {
        let job = [
            (7, process(&[(1, HERE, 2), (3, HERE, 9)])),
            (
                8,
                process(&[(2, HERE, 1), (4, HERE, 10), (5, ELSEWHERE, 1)]),
            ),
        ];
        let found = strays(&job, |peer, device| {
            Ok(match (peer.qpn.0, device.map(|(_, name)| name)) {
                (9, Some("rxe0")) => Whose::Nobodys,
                (10, Some("rxe0")) => Whose::Process {
                    pid: 55,
                    name: "stranger".into(),
                },
                (1, None) => Whose::AnotherHosts,
                other => panic!("asked for {other:?}"),
            })
        })
        .unwrap();
        let named: Vec<_> = found
            .iter()
            .map(|stray| format!("process {}: {stray}", stray.process))
            .collect();
        let said = refusal(&named);
        for part in [
            "process 8: queue pair 0x68 is connected to queue pair 0xa of process 55 (stranger)",
            "queue pair 0x69 is connected to queue pair 0x1 at 202:202:",
            "--allow-outside",
        ] {
            assert!(said.contains(part), "{said}");
        }
        let pairs: Vec<_> = found.iter().map(|stray| stray.hardware_qpn.0).collect();
        assert_eq!(pairs, [4, 5]);
    }
}
