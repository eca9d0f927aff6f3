//! Can a device say how far its responders came? Tried with a queue pair of our own. docs/checkpoint.md, "Is the counter live?".

use std::time::{Duration, Instant};

use rdma_core_sys::{
    IBV_MTU_256, IBV_QP_RQ_PSN, IBV_QP_STATE, IBV_QPS_ERR, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS,
    IBV_SEND_SIGNALED, IBV_WC_SUCCESS, IBV_WR_SEND, ibv_qp_attr, ibv_qp_init_attr, ibv_recv_wr,
    ibv_send_wr, ibv_wc,
};

use super::context::Context;
use super::own_pair::OwnPair;
use super::process::lock;
use super::queue_pair::{RC_TO_INIT, RC_TO_RTR, RC_TO_RTS, hardware_post_send};
use crate::errno::{Errno, Verb};
use crate::handle::Psn;

/// The first PSN of the attempt: the next one does not fit 24 bits, so that the counter has to wrap.
const FIRST: Psn = Psn(0x00ff_ffff);
/// A message from a port to itself takes microseconds; emulated, milliseconds.
const LIMIT: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_micros(50);
/// 4.096 us times 2^14: 67 ms for each of a few tries (IBTA 9.7.6.1.3).
const TIMEOUT: u8 = 14;
const RETRIES: u8 = 3;

impl Context {
    /// Does `ibv_query_qp` of this device tell the PSN that a responder expects now (`rq_psn`), also in the error state?
    /// Found out when the first queue pair is connected, whose attributes are `like`, and again after each rebuild.
    pub(crate) fn responder_psn_is_live(&self, like: &ibv_qp_attr) -> bool {
        let mut known = lock(&self.responder_psn_is_live);
        *known.get_or_insert_with(|| match expected_after_one_message(self, like) {
            Ok(psn) if psn == FIRST.advance(1) => true,
            Ok(psn) => {
                tracing::warn!(
                    device = self.hardware_name(),
                    told = psn.0,
                    "this device does not tell how far a responder came; messages are counted instead"
                );
                false
            }
            Err(error) => {
                tracing::warn!(
                    device = self.hardware_name(),
                    %error,
                    "cannot find out whether this device tells how far a responder came; messages are counted instead"
                );
                false
            }
        })
    }
}

/// Sends one message of no bytes from a queue pair to itself, and says what its responder expects then.
fn expected_after_one_message(context: &Context, like: &ibv_qp_attr) -> Verb<Psn> {
    let own = OwnPair::new(context)?;
    let verbs = context.verbs;
    let modify = |attr: ibv_qp_attr, mask: u32| {
        let mut attr = attr;
        // SAFETY: the device's own queue pair.
        Errno::check(unsafe { (verbs.ibv_modify_qp)(own.pair(), &raw mut attr, mask as i32) })
    };
    // SAFETY: zero is valid.
    let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
    attr.pkey_index = like.pkey_index;
    attr.port_num = like.ah_attr.port_num;
    attr.ah_attr = context.to_itself(&like.ah_attr)?;
    attr.path_mtu = IBV_MTU_256;
    attr.dest_qp_num = own.number().0;
    (attr.rq_psn, attr.sq_psn) = (FIRST.0, FIRST.0);
    (attr.max_dest_rd_atomic, attr.max_rd_atomic) = (1, 1);
    (attr.timeout, attr.retry_cnt, attr.rnr_retry) = (TIMEOUT, RETRIES, RETRIES);
    attr.qp_state = IBV_QPS_INIT;
    modify(attr, RC_TO_INIT)?;
    attr.qp_state = IBV_QPS_RTR;
    modify(attr, RC_TO_RTR)?;
    attr.qp_state = IBV_QPS_RTS;
    modify(attr, RC_TO_RTS)?;
    send_to_itself(context, &own)?;
    attr.qp_state = IBV_QPS_ERR;
    modify(attr, IBV_QP_STATE)?;
    // SAFETY: zero is valid for both; the device's own queue pair.
    unsafe {
        let mut init: ibv_qp_init_attr = std::mem::zeroed();
        attr = std::mem::zeroed();
        Errno::check((verbs.ibv_query_qp)(
            own.pair(),
            &raw mut attr,
            IBV_QP_RQ_PSN as i32,
            &raw mut init,
        ))?;
    }
    Ok(Psn(0).advance(attr.rq_psn))
}

/// Posts a receive and a SEND without elements, and waits for both.
fn send_to_itself(context: &Context, own: &OwnPair) -> Verb<()> {
    // SAFETY: zero is valid for the requests, which need no memory; the device's own objects, used by nobody else.
    unsafe {
        let ops = &(*context.hardware()).ops;
        let (post_receive, poll) = (
            ops.post_recv.ok_or(Errno::NOT_SUPPORTED)?,
            ops.poll_cq.ok_or(Errno::NOT_SUPPORTED)?,
        );
        let mut receive: ibv_recv_wr = std::mem::zeroed();
        let mut bad_receive = std::ptr::null_mut();
        Errno::check(post_receive(
            own.pair(),
            &raw mut receive,
            &raw mut bad_receive,
        ))?;
        let mut send: ibv_send_wr = std::mem::zeroed();
        (send.opcode, send.send_flags) = (IBV_WR_SEND, IBV_SEND_SIGNALED);
        let mut bad_send = std::ptr::null_mut();
        let post_send = hardware_post_send(context)?;
        Errno::check(post_send(own.pair(), &raw mut send, &raw mut bad_send))?;
        let until = Instant::now() + LIMIT;
        let mut outstanding = 2;
        while outstanding > 0 {
            let mut completion: ibv_wc = std::mem::zeroed();
            match poll(own.completions(), 1, &raw mut completion) {
                1 if completion.status == IBV_WC_SUCCESS => outstanding -= 1,
                0 if Instant::now() < until => std::thread::sleep(PAUSE),
                0 => return Err(Errno(libc::ETIMEDOUT)),
                _ => return Err(Errno::IO),
            }
        }
    }
    Ok(())
}
