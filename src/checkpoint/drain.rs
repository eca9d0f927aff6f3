//! Emptying the network: waiting, stopping, and finding out what was executed.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rdma_core_sys::{IBV_QPS_RTS, IBV_QPS_SQD};

use super::Phase;
use crate::control::message::{DrainReport, PortAddress, ResponderState};
use crate::log::SlotHead;
use crate::translate::Address;
use crate::virt::completion_queue::{SHARED, is_flushed};
use crate::virt::context::Context;
use crate::virt::ports;
use crate::virt::process::process;
use crate::virt::queue_pair::{Fate, QueuePair};

/// Between two looks at the completion queues.
const PAUSE: Duration = Duration::from_micros(200);
/// The stopped hardware has given all its completions when it has been silent for this long.
const SILENCE: Duration = Duration::from_millis(3);

/// What is known after the hardware was stopped.
#[derive(Debug, Default)]
pub(crate) struct Stopped {
    /// Queue pairs that we moved to the error state, by address.
    pairs: HashSet<usize>,
    /// And by the hardware's number, for receives of shared queues.
    numbers: HashSet<u32>,
    /// Requests that came back flushed because of it, by the `wr_id` they went down with.
    flushed: HashSet<u64>,
}

/// Takes completions from the hardware until nothing is outstanding or `limit` is over. `forward` hands on events meanwhile.
pub(crate) fn drain(limit: Duration, forward: impl Fn()) -> DrainReport {
    let until = Instant::now() + limit;
    let mut completions = 0;
    loop {
        forward();
        completions += poll_all(|_| false);
        let outstanding = outstanding();
        if outstanding == 0 || Instant::now() >= until {
            // A completion that arrived fires its event a moment later.
            forward();
            return DrainReport {
                outstanding_sends: outstanding,
                completions,
                held_completions: held(),
            };
        }
        std::thread::sleep(PAUSE);
    }
}

/// Moves the queue pairs that still have sends outstanding to the error state, and collects what that flushes.
pub(crate) fn stop(limit: Duration) -> Phase<Stopped> {
    let mut stopped = Stopped::default();
    each_pair(|_, pair| {
        let fail =
            |what, error| format!("cannot {what} queue pair {:#x}: {error}", pair.number().0);
        pair.note_state().map_err(|error| fail("query", error))?;
        let moving = [IBV_QPS_RTS, IBV_QPS_SQD].contains(&pair.state_to_restore());
        if moving && pair.outstanding() > 0 {
            stopped.pairs.insert(std::ptr::from_ref(pair).addr());
            stopped
                .numbers
                .extend(pair.hardware_number().map(|number| number.0));
            pair.move_to_error().map_err(|error| fail("stop", error))?;
        }
        Ok(())
    })?;
    poll_until_silent(&mut stopped, limit);
    Ok(stopped)
}

/// How far each responder came. All processes have stopped, so nothing moves any more.
pub(crate) fn responders(stopped: &mut Stopped) -> Phase<Vec<ResponderState>> {
    poll_until_silent(stopped, Duration::from_millis(200));
    let mut states = Vec::new();
    each_pair(|context, pair| {
        if pair.is_reliable() && pair.peer_name().is_some() {
            let expected = pair.expected_psn().map_err(|error| {
                format!("cannot query queue pair {:#x}: {error}", pair.number().0)
            })?;
            states.push(ResponderState {
                address: address(context, pair.port())?,
                qpn: pair.number(),
                expected,
            });
        }
        Ok(())
    })?;
    Ok(states)
}

/// Decides what became of every outstanding send. Gives what is to be told to the user.
pub(crate) fn settle(stopped: &Stopped, responders: &[ResponderState]) -> Phase<Vec<String>> {
    let mut notes = Vec::new();
    each_pair(|_, pair| {
        if !stopped.pairs.contains(&std::ptr::from_ref(pair).addr()) {
            return Ok(());
        }
        let peer = pair.peer_name();
        let expected = peer.and_then(|(address, qpn)| {
            let peer = responders
                .iter()
                .find(|state| state.qpn == qpn && is_at(&state.address, address));
            peer.map(|state| state.expected)
        });
        match pair.settle(&stopped.flushed, expected) {
            Fate::Known { again } => tracing::debug!(qpn = pair.number().0, again, "settled"),
            Fate::Unknown { why } => {
                pair.give_up();
                notes.push(format!(
                    "queue pair {:#x} ends in the error state: {why}",
                    pair.number().0
                ));
            }
        }
        Ok(())
    })?;
    Ok(notes)
}

fn is_at(port: &PortAddress, address: Address) -> bool {
    match address {
        Address::Gid(gid) => port.gids.contains(&gid),
        Address::Lid(lid) => port.lid == lid,
    }
}

/// A port's address in the application's terms.
fn address(context: &Context, port: u8) -> Phase<PortAddress> {
    let facts = ports::first_seen(context)
        .map_err(|error| format!("device {}: {error}", context.hardware_name()))?;
    let known = facts
        .ports
        .iter()
        .find(|known| known.number == u32::from(port));
    known
        .map(ports::port_address)
        .ok_or_else(|| format!("device {} has no port {port}", context.name()))
}

fn poll_until_silent(stopped: &mut Stopped, limit: Duration) {
    let until = Instant::now() + limit;
    let mut silent_since = Instant::now();
    while silent_since.elapsed() < SILENCE && Instant::now() < until {
        let Stopped {
            pairs,
            numbers,
            flushed,
        } = stopped;
        let found = poll_all(|completion| {
            // SAFETY: a completion of ours, whose entry is not retired yet.
            let head = unsafe { SlotHead::of(completion.wr_id) };
            let stopped_by_us = match head.owner.addr() & SHARED {
                0 => pairs.contains(&head.owner.addr()),
                _ => numbers.contains(&completion.qp_num),
            };
            let ours = is_flushed(completion) && stopped_by_us;
            if ours {
                flushed.insert(completion.wr_id);
            }
            ours
        });
        if found > 0 {
            silent_since = Instant::now();
        }
        std::thread::sleep(PAUSE);
    }
}

fn poll_all(mut ours: impl FnMut(&rdma_core_sys::ibv_wc) -> bool) -> u64 {
    let mut completions = 0;
    for context in process().contexts() {
        for (_, queue) in &context.objects().completion_queues {
            // SAFETY: the gate is closed, so nothing is destroyed.
            let queue = unsafe { queue.get() };
            completions += queue.drain(&mut ours);
        }
    }
    completions
}

fn held() -> u64 {
    let mut sum = 0;
    for context in process().contexts() {
        for (_, queue) in &context.objects().completion_queues {
            // SAFETY: the gate is closed, so nothing is destroyed.
            sum += unsafe { queue.get().held() };
        }
    }
    sum
}

fn outstanding() -> u64 {
    let mut sum = 0;
    let counted = each_pair(|_, pair| {
        sum += pair.outstanding();
        Ok(())
    });
    debug_assert!(counted.is_ok());
    sum
}

/// Visits every queue pair. Only while the gate is closed.
pub(super) fn each_pair(
    mut visit: impl FnMut(&'static Context, &QueuePair) -> Phase<()>,
) -> Phase<()> {
    for context in process().contexts() {
        for (_, pair) in &context.objects().queue_pairs {
            // SAFETY: the gate is closed, so nothing is destroyed.
            visit(context, unsafe { pair.get() })?;
        }
    }
    Ok(())
}
