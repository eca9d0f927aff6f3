//! How many of the outstanding requests the peer has executed. docs/checkpoint.md, "Settling", has the argument.

use rdma_core_sys::{
    IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_RDMA_READ, ibv_wr_opcode,
};

use crate::control::message::Progress;
use crate::handle::Psn;
use crate::log::{is_local, takes_receive};

/// A device has no more packets on the way than this (IBTA 9.7.2), though more may be posted.
const HALF_OF_PSNS: u64 = 1 << 23;

/// A request of a reliable connection that has not completed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outstanding {
    pub(super) opcode: ibv_wr_opcode,
    pub(super) packets: u32,
    /// The PSN after its last packet.
    pub(super) psn_after: Psn,
    /// Receives of the peer used up by the time it is executed; `None` where they are not counted.
    pub(super) receives_after: Option<u32>,
}

impl Outstanding {
    /// Something comes back.
    pub(super) fn is_answered(&self) -> bool {
        self.is_read()
            || [IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD].contains(&self.opcode)
    }

    /// Nothing of it reaches the peer.
    fn is_local(&self) -> bool {
        is_local(self.opcode)
    }

    pub(super) fn is_read(&self) -> bool {
        self.opcode == IBV_WR_RDMA_READ
    }

    /// The PSN of its first packet.
    fn psn_before(&self) -> Psn {
        self.psn_after.advance(self.packets.wrapping_neg())
    }
}

/// How many of `requests` were executed, given that the first `acknowledged` were, and what the peer's responder says.
///
/// # Errors
/// In words: it cannot be told, or the two ends contradict each other.
pub(super) fn executed(
    requests: &[Outstanding],
    acknowledged: usize,
    responder: Option<Progress>,
) -> Result<usize, String> {
    match responder {
        _ if requests.is_empty() => Ok(0),
        Some(Progress::Nothing) if acknowledged == 0 => Ok(0),
        Some(Progress::Nothing) => Err("the peer was never ready, but has answered".into()),
        Some(Progress::Expects(expected)) => by_psn(requests, acknowledged, expected),
        _ if acknowledged == requests.len() => Ok(acknowledged),
        Some(Progress::Received(received)) => by_count(requests, acknowledged, received),
        Some(Progress::Unknown) => Err(
            "the peer's device does not tell how far its responder came, and its receives are shared or were flushed"
                .into(),
        ),
        None => Err("the peer did not say how far it came".into()),
    }
}

/// The distance is taken from what was acknowledged, not from what was posted last, which may be more than the PSN space ahead.
fn by_psn(requests: &[Outstanding], acknowledged: usize, expected: Psn) -> Result<usize, String> {
    let from = match requests.get(acknowledged) {
        Some(next) => next.psn_before(),
        None => requests[acknowledged - 1].psn_after,
    };
    let arrived = u64::from(expected.since(from));
    let (mut packets, mut executed) = (0, acknowledged);
    for (index, request) in requests.iter().enumerate().skip(acknowledged) {
        packets += u64::from(request.packets);
        // Of what takes no packet and lies behind the last one nobody knows whether the device came to it. It may be done again.
        if packets <= arrived && !request.is_local() {
            executed = index + 1;
        }
    }
    if arrived > HALF_OF_PSNS.min(packets) {
        return Err(format!(
            "the peer expects PSN {:#x}, which does not fit the {} requests outstanding",
            expected.0,
            requests.len()
        ));
    }
    Ok(executed)
}

/// Exact for what uses up a receive, and for all that is before it. Of what lies behind the last such request that was executed
/// and before the next one, a count says nothing: a READ may be asked again there, as nothing was executed after it, but
/// nothing else.
fn by_count(requests: &[Outstanding], acknowledged: usize, received: u32) -> Result<usize, String> {
    let is_received = |request: &Outstanding| {
        let after = request
            .receives_after
            .ok_or("the peer's device counts messages, and ours did not")?;
        Ok::<_, String>(after.wrapping_sub(received).cast_signed() <= 0)
    };
    let (mut executed, mut next) = (0, requests.len());
    let mut sent = None;
    for (index, request) in requests.iter().enumerate() {
        if !takes_receive(request.opcode) {
            continue;
        }
        sent = request.receives_after;
        if is_received(request)? {
            executed = index + 1;
        } else {
            next = index;
            break;
        }
    }
    let more_than_sent = next == requests.len() && sent.is_some_and(|sent| sent != received);
    if next < acknowledged || more_than_sent {
        return Err(format!(
            "the peer has received {received} messages, which does not fit the {} requests outstanding",
            requests.len()
        ));
    }
    let executed = executed.max(acknowledged);
    match requests[executed..next]
        .iter()
        .find(|request| !request.is_read())
    {
        None => Ok(executed),
        Some(request) => Err(format!(
            "the peer's device only counts messages, which does not tell whether a request of opcode {} was executed",
            request.opcode
        )),
    }
}

#[cfg(test)]
mod tests {
    use rdma_core_sys::{
        IBV_WR_ATOMIC_FETCH_AND_ADD as ADD, IBV_WR_LOCAL_INV as INVALIDATE,
        IBV_WR_RDMA_READ as READ, IBV_WR_RDMA_WRITE as WRITE,
        IBV_WR_RDMA_WRITE_WITH_IMM as WRITE_WITH_IMM, IBV_WR_SEND as SEND,
    };

    use super::{Outstanding, executed};
    use crate::control::message::Progress;
    use crate::handle::Psn;

    /// One packet each, from PSN 2^24 - 2 and message 2^32 - 2 on.
    fn outstanding(opcodes: &[u32]) -> Vec<Outstanding> {
        let (mut psn, mut messages) = (Psn(0x00ff_fffe), u32::MAX - 1);
        let request = |opcode: &u32| {
            psn = psn.advance(1);
            messages = messages.wrapping_add([SEND, WRITE_WITH_IMM].contains(opcode).into());
            Outstanding {
                opcode: *opcode,
                packets: 1,
                psn_after: psn,
                receives_after: Some(messages),
            }
        };
        opcodes.iter().map(request).collect()
    }

    fn by_psn(opcodes: &[u32], acknowledged: usize, expected: u32) -> Option<usize> {
        let progress = Progress::Expects(Psn(expected));
        executed(&outstanding(opcodes), acknowledged, Some(progress)).ok()
    }

    fn by_count(opcodes: &[u32], acknowledged: usize, received: u32) -> Option<usize> {
        let progress = Progress::Received(received);
        executed(&outstanding(opcodes), acknowledged, Some(progress)).ok()
    }

    #[test]
    fn a_psn_tells_of_every_kind_and_around_zero() {
        let opcodes = [SEND, WRITE, ADD, READ];
        assert_eq!(by_psn(&opcodes, 0, 0x00ff_fffe), Some(0));
        assert_eq!(by_psn(&opcodes, 0, 0x00ff_ffff), Some(1));
        assert_eq!(by_psn(&opcodes, 2, 1), Some(3));
        assert_eq!(by_psn(&opcodes, 4, 2), Some(4));
        // Less than was acknowledged, and more than was sent.
        assert_eq!(by_psn(&opcodes, 2, 0x00ff_ffff), None);
        assert_eq!(by_psn(&opcodes, 0, 3), None);
    }

    #[test]
    fn more_may_be_posted_than_the_psn_space_holds() {
        let mut requests = outstanding(&[WRITE; 20]);
        let from = Psn(0x00ff_fffe);
        for (index, request) in (1..).zip(&mut requests) {
            // 2 GiB each, at an MTU of 1,024.
            (request.packets, request.psn_after) = (1 << 21, from.advance(index << 21));
        }
        let executed = |acknowledged, packets| {
            let expected = Progress::Expects(from.advance(packets));
            executed(&requests, acknowledged, Some(expected)).ok()
        };
        assert_eq!(executed(0, 0), Some(0));
        assert_eq!(executed(0, (1 << 21) - 1), Some(0));
        assert_eq!(executed(0, 3 << 21), Some(3));
        assert_eq!(executed(9, 10 << 21), Some(10));
        assert_eq!(executed(20, 20 << 21), Some(20));
        // Less than was acknowledged, more than may be on the way, and more than was sent.
        assert_eq!(executed(9, 8 << 21), None);
        assert_eq!(executed(9, 14 << 21), None);
        assert_eq!(executed(19, 21 << 21), None);
    }

    #[test]
    fn what_the_device_does_by_itself_is_done_again_unless_something_behind_it_was_executed() {
        let mut requests = outstanding(&[SEND, INVALIDATE, SEND, INVALIDATE]);
        for index in [1, 3] {
            requests[index].psn_after = requests[index - 1].psn_after;
            requests[index].packets = 0;
        }
        requests[2].psn_after = Psn(0);
        requests[3].psn_after = Psn(0);
        let executed = |acknowledged, expected| {
            executed(
                &requests,
                acknowledged,
                Some(Progress::Expects(Psn(expected))),
            )
            .ok()
        };
        assert_eq!(executed(0, 0x00ff_ffff), Some(1));
        assert_eq!(executed(2, 0x00ff_ffff), Some(2));
        assert_eq!(executed(0, 0), Some(3));
        assert_eq!(executed(4, 0), Some(4));
        assert_eq!(executed(3, 0x00ff_ffff), None);
    }

    #[test]
    fn a_count_tells_of_what_takes_a_receive_and_what_is_before_it() {
        let opcodes = [SEND, WRITE, SEND, WRITE_WITH_IMM];
        assert_eq!(by_count(&opcodes, 0, u32::MAX - 1), Some(0));
        assert_eq!(by_count(&opcodes, 0, 0), Some(3));
        assert_eq!(by_count(&opcodes, 0, 1), Some(4));
        // Of the WRITE between the two SENDs nobody knows, unless it was acknowledged.
        assert_eq!(by_count(&opcodes, 0, u32::MAX), None);
        assert_eq!(by_count(&opcodes, 2, u32::MAX), Some(2));
        // Less than was acknowledged, and more than was sent.
        assert_eq!(by_count(&opcodes, 3, u32::MAX), None);
        assert_eq!(by_count(&opcodes, 0, 2), None);
    }

    #[test]
    fn a_count_does_not_tell_of_atomics_and_lets_reads_be_asked_again() {
        assert_eq!(by_count(&[SEND, ADD], 0, u32::MAX), None);
        assert_eq!(by_count(&[SEND, READ, READ], 0, u32::MAX), Some(1));
        assert_eq!(by_count(&[READ, READ], 1, u32::MAX - 1), Some(1));
    }

    #[test]
    fn without_an_answer_only_what_was_acknowledged_is_known() {
        let requests = outstanding(&[SEND, SEND]);
        assert_eq!(executed(&requests, 2, None), Ok(2));
        assert!(executed(&requests, 1, None).is_err());
        assert!(executed(&requests, 0, Some(Progress::Unknown)).is_err());
        assert_eq!(executed(&requests, 0, Some(Progress::Nothing)), Ok(0));
        assert!(executed(&requests, 1, Some(Progress::Nothing)).is_err());
    }
}
