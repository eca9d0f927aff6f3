//! Emptying the network: waiting, stopping, and finding out what was executed.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rdma_core_sys::{IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD, IBV_WC_SUCCESS};

use super::Phase;
use crate::control::message::{DrainReport, PortAddress, Progress, ResponderState};
use crate::errno::Errno;
use crate::log::SlotHead;
use crate::translate::Address;
use crate::virt::completion_queue::{CompletionQueue, SHARED, is_flushed};
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
    /// Of these queue pairs, those that had failed on their own account a moment before, as another completion shows.
    failed: HashSet<usize>,
}

/// Takes completions from the hardware until nothing is outstanding or `limit` is over; where there are none, `arrivals` asks
/// whether packets arrive. `forward` hands on events meanwhile.
pub(crate) fn drain(limit: Duration, arrivals: bool, forward: impl Fn()) -> DrainReport {
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
                expected_psns: (arrivals && completions == 0).then(expected_psns),
            };
        }
        std::thread::sleep(PAUSE);
    }
}

/// Moves the queue pairs that still have sends outstanding to the error state, and collects what that flushes.
///
/// After an error the others are stopped all the same; whatever was not, [`responders`] stops.
pub(crate) fn stop(stopped: &mut Stopped, limit: Duration) -> Phase<()> {
    let mut outcome = Ok(());
    each_pair(|_, pair| {
        if pair.outstanding() == 0 {
            return Ok(());
        }
        let moved = match pair.note_state() {
            Ok(()) if can_send(pair) => stopped.move_to_error(pair),
            noted => noted.map_err(|error| fail("query", pair, error)),
        };
        outcome = std::mem::replace(&mut outcome, Ok(())).and(moved);
        Ok(())
    })?;
    stopped.collect_until_silent(limit);
    outcome
}

fn can_send(pair: &QueuePair) -> bool {
    [IBV_QPS_RTS, IBV_QPS_SQD].contains(&pair.state_to_restore())
}

/// How far each responder came. All processes have stopped sending, but a packet may still be on the way; so responders are
/// moved to the error state first, where nothing is executed any more.
pub(crate) fn responders(stopped: &mut Stopped) -> Phase<Vec<ResponderState>> {
    const LIMIT: Duration = Duration::from_millis(200);
    stopped.collect_until_silent(LIMIT);
    each_pair(|_, pair| {
        if stopped.has(pair) {
            return Ok(());
        }
        // Stop may not have got as far as this one.
        pair.note_state()
            .map_err(|error| fail("query", pair, error))?;
        let responds = pair.is_reliable()
            && [IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD].contains(&pair.state_to_restore());
        let sends = can_send(pair) && pair.outstanding() > 0;
        if responds || sends {
            stopped.move_to_error(pair)?;
        }
        Ok(())
    })?;
    stopped.collect_until_silent(LIMIT);
    let mut states = Vec::new();
    each_pair(|context, pair| {
        if !pair.is_reliable() {
            return Ok(());
        }
        let progress = pair.progress();
        if let Some(progress) = progress.map_err(|error| fail("query", pair, error))? {
            states.push(ResponderState {
                address: address(context, pair.port().max(1))?,
                qpn: pair.number(),
                peer: pair.peer_name().map(|(_, qpn)| qpn),
                progress,
            });
        }
        Ok(())
    })?;
    Ok(states)
}

pub(super) fn fail(what: &str, pair: &QueuePair, error: Errno) -> String {
    format!("cannot {what} queue pair {:#x}: {error}", pair.number().0)
}

/// Decides what became of every outstanding send. Gives what is to be told to the user.
pub(crate) fn settle(stopped: &Stopped, responders: &[ResponderState]) -> Phase<Vec<String>> {
    let mut notes = Vec::new();
    each_pair(|_, pair| {
        if !stopped.has(pair) {
            return Ok(());
        }
        let peer = pair.peer_name();
        let responder = peer.and_then(|(address, qpn)| {
            let peer = responders
                .iter()
                .find(|state| state.qpn == qpn && is_at(&state.address, address))?;
            // What it executed for somebody else tells nothing.
            let ours = peer.peer == Some(pair.number()) || peer.progress == Progress::Nothing;
            ours.then_some(peer.progress)
        });
        if stopped.failed.contains(&std::ptr::from_ref(pair).addr()) {
            pair.give_up();
        }
        match pair.settle(&stopped.flushed, responder) {
            Fate::Known { again } => tracing::debug!(qpn = pair.number().0, again, "settled"),
            Fate::MayBeLost { count } => notes.push(format!(
                "queue pair {:#x}, whose transport is not reliable: {count} messages were still in the device and may be lost",
                pair.number().0
            )),
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

impl Stopped {
    fn has(&self, pair: &QueuePair) -> bool {
        self.pairs.contains(&std::ptr::from_ref(pair).addr())
    }

    /// Takes the flushed completions at once: with many queue pairs they need not all fit the completion queues.
    fn move_to_error(&mut self, pair: &QueuePair) -> Phase<()> {
        self.pairs.insert(std::ptr::from_ref(pair).addr());
        self.numbers
            .extend(pair.hardware_number().map(|number| number.0));
        if let Err(error) = pair.move_to_error() {
            self.pairs.remove(&std::ptr::from_ref(pair).addr());
            return Err(fail("stop", pair, error));
        }
        self.collect();
        Ok(())
    }

    fn collect_until_silent(&mut self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut silent_since = Instant::now();
        while silent_since.elapsed() < SILENCE && Instant::now() < until {
            if self.collect() > 0 {
                silent_since = Instant::now();
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Holds back what is the application's, and notes what was flushed because of us.
    fn collect(&mut self) -> u64 {
        let Self {
            pairs,
            numbers,
            flushed,
            failed,
        } = self;
        poll_all(|completion| {
            // SAFETY: a completion of ours, whose entry is not retired yet.
            let head = unsafe { SlotHead::of(completion.wr_id) };
            let stopped_by_us = match head.owner.addr() & SHARED {
                0 => pairs.contains(&head.owner.addr()),
                _ => numbers.contains(&completion.qp_num),
            };
            let ours = is_flushed(completion) && stopped_by_us;
            if ours {
                flushed.insert(completion.wr_id);
            } else if completion.status != IBV_WC_SUCCESS && stopped_by_us {
                failed.insert(head.owner.addr());
            }
            ours
        })
    }
}

/// Over all reliable connections. A device that does not answer is taken to expect 0: it only shows no progress.
fn expected_psns() -> u64 {
    let mut sum = 0;
    let counted = each_pair(|_, pair| {
        if pair.is_reliable() && pair.peer_name().is_some() {
            sum += pair.expected_psn().map_or(0, |psn| u64::from(psn.0));
        }
        Ok(())
    });
    debug_assert!(counted.is_ok());
    sum
}

fn poll_all(mut ours: impl FnMut(&rdma_core_sys::ibv_wc) -> bool) -> u64 {
    let mut completions = 0;
    each_completion_queue(|queue| completions += queue.drain(&mut ours));
    completions
}

fn held() -> u64 {
    let mut sum = 0;
    each_completion_queue(|queue| sum += queue.held());
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
pub(super) fn each_pair(mut visit: impl FnMut(&Context, &QueuePair) -> Phase<()>) -> Phase<()> {
    for context in &process().contexts() {
        // Not under the lock: a visit may look at the completion queues.
        let pairs: Vec<_> = context
            .objects()
            .queue_pairs
            .iter()
            .map(|(_, pair)| *pair)
            .collect();
        for pair in pairs {
            // SAFETY: the gate is closed, so nothing is destroyed.
            visit(context, unsafe { pair.get() })?;
        }
    }
    Ok(())
}

/// Visits every completion queue. Only while the gate is closed.
pub(super) fn each_completion_queue(mut visit: impl FnMut(&CompletionQueue)) {
    for context in &process().contexts() {
        for (_, queue) in &context.objects().completion_queues {
            // SAFETY: the gate is closed, so nothing is destroyed.
            visit(unsafe { queue.get() });
        }
    }
}
