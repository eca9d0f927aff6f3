//! The hardware's queue pair below: made, let go of, made again, connected again.

use std::ffi::c_void;
use std::sync::atomic::Ordering;

use rdma_core_sys::{
    IBV_QP_ACCESS_FLAGS, IBV_QP_AV, IBV_QP_CAP, IBV_QP_DEST_QPN, IBV_QP_PKEY_INDEX, IBV_QP_PORT,
    IBV_QP_QKEY, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE, IBV_QPS_ERR, IBV_QPS_INIT,
    IBV_QPS_RESET, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPS_SQE, ibv_pd, ibv_qp, ibv_qp_attr,
    ibv_qp_init_attr, ibv_qp_init_attr_ex, ibv_qp_state, ibv_recv_wr,
};

use super::address::translate_address;
use super::attributes::{Attributes, RC_TO_RTR, RC_TO_RTS, UC_TO_RTR, UC_TO_RTS, path_mtu};
use super::doorbell;
use super::send_queue::PostSend;
use super::{Extended, QueuePair};
use crate::control::message::{HardwareAddress, HardwarePeer, Progress, QueuePairNumbers};
use crate::errno::{Errno, Verb};
use crate::handle::{HardwareGid, HardwareLid, HardwareQpn, Psn};
use crate::log::SlotHead;
use crate::translate::Directory;
use crate::virt::context::Context;
use crate::virt::process::lock;
use crate::virt::receive_queue::PostReceive;

impl QueuePair {
    /// Creates the hardware's queue pair, again and again until `refuse` lets its number pass; then gives back the others.
    /// At most one more than there are numbers to refuse, as those refused are held meanwhile.
    pub(super) fn create_hardware(&mut self, refuse: impl Fn(HardwareQpn) -> bool) -> Verb<()> {
        let mut burnt = Vec::new();
        let result = loop {
            match self.create_one() {
                // SAFETY: the device's own object, just made.
                Ok((made, _)) if refuse(HardwareQpn(unsafe { (*made).qp_num })) => burnt.push(made),
                other => break other,
            }
        };
        for made in burnt {
            // SAFETY: made above, never handed out.
            unsafe { (self.context.verbs.ibv_destroy_qp)(made) };
        }
        let (made, init) = result?;
        self.capacity = init.cap;
        self.hardware.store(made, Ordering::Release);
        Ok(())
    }

    fn create_one(&self) -> Verb<(*mut ibv_qp, ibv_qp_init_attr)> {
        let verbs = self.context.verbs;
        // SAFETY: the objects named outlive the queue pair; the gate is held or closed by us.
        unsafe {
            let mut init = ibv_qp_init_attr {
                qp_context: std::ptr::from_ref(self).cast_mut().cast::<c_void>(),
                send_cq: (*self.send_completions).hardware(),
                recv_cq: (*self.receive_completions).hardware(),
                srq: self
                    .shared
                    .as_ref()
                    .map_or(std::ptr::null_mut(), |shared| shared.hardware()),
                cap: self.capacity,
                qp_type: self.kind,
                sq_sig_all: i32::from(self.signal_all),
            };
            let domain = (*self.domain).hardware();
            let made = match self.extended {
                None => verbs.pointer((verbs.ibv_create_qp)(domain, &raw mut init))?,
                Some(extended) => {
                    let mut all = extended.attributes(domain, init);
                    let made = verbs.create_qp_ex(self.context.hardware(), &mut all)?;
                    init.cap = all.cap;
                    made
                }
            };
            Ok((made, init))
        }
    }

    pub(super) fn attach_send_queue(&self) -> Verb<()> {
        self.send
            .attach(self.hardware(), hardware_post_send(&self.context)?);
        Ok(())
    }

    pub(super) fn attach_receive_queue(&self) -> Verb<()> {
        self.receive
            .attach(self.hardware().cast(), self.hardware_post_receive()?);
        Ok(())
    }

    fn hardware_post_receive(&self) -> Verb<PostReceive> {
        // SAFETY: the hardware is there. The two signatures differ in the type of the queue alone.
        unsafe {
            let post = (*(*self.hardware()).context)
                .ops
                .post_recv
                .ok_or(Errno::NOT_SUPPORTED)?;
            Ok(std::mem::transmute::<
                unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> i32,
                PostReceive,
            >(post))
        }
    }

    /// The state the hardware is in.
    pub(crate) fn hardware_state(&self) -> Verb<ibv_qp_state> {
        self.query_hardware(IBV_QP_STATE).map(|attr| attr.qp_state)
    }

    /// How far the responder came; `None` if that cannot be told any more, as the application has reset it.
    pub(crate) fn progress(&self) -> Verb<Option<Progress>> {
        let attributes = *lock(&self.attributes);
        if !attributes.was_ready {
            return Ok(Some(Progress::Nothing));
        }
        if attributes.peer().is_none() {
            return Ok(None);
        }
        if self.context.responder_psn_is_live(&attributes.all().0) {
            return Ok(Some(Progress::Expects(self.expected_psn()?)));
        }
        // In the error state receives complete without a message.
        let failed = attributes.released_state == IBV_QPS_ERR;
        Ok(Some(match self.shared.is_null() && !failed {
            true => Progress::Received(self.receive.completed()),
            false => Progress::Unknown,
        }))
    }

    /// The PSN that the responder expects next, if the device tells.
    pub(crate) fn expected_psn(&self) -> Verb<Psn> {
        let attr = self.query_hardware(IBV_QP_RQ_PSN)?;
        Ok(Psn(0).advance(attr.rq_psn))
    }

    /// A connection is being made: where the device cannot tell how far a responder came, messages are counted.
    pub(super) fn choose_counting(&self, attributes: &Attributes) {
        if self.is_reliable() {
            let live = self.context.responder_psn_is_live(&attributes.all().0);
            self.send.count_receives(!live);
        }
    }

    /// Where the hardware sends to; `None` if it is not connected, or has no connections.
    pub(crate) fn hardware_peer(&self) -> Verb<Option<HardwarePeer>> {
        if self.is_datagram() {
            return Ok(None);
        }
        let attr = self.query_hardware(IBV_QP_STATE | IBV_QP_AV | IBV_QP_DEST_QPN)?;
        if ![IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPS_SQE].contains(&attr.qp_state) {
            return Ok(None);
        }
        let vector = &attr.ah_attr;
        let address = match vector.is_global {
            0 => HardwareAddress::Lid(HardwareLid(vector.dlid)),
            // SAFETY: both views of a GID are plain bytes.
            _ => HardwareAddress::Gid(HardwareGid(unsafe { vector.grh.dgid.raw })),
        };
        let qpn = HardwareQpn(attr.dest_qp_num);
        Ok(Some(HardwarePeer { address, qpn }))
    }

    fn query_hardware(&self, mask: u32) -> Verb<ibv_qp_attr> {
        // SAFETY: zero is valid for both; the hardware is there while the gate is held or closed and not released.
        unsafe {
            let (mut attr, mut init): (ibv_qp_attr, ibv_qp_init_attr) =
                (std::mem::zeroed(), std::mem::zeroed());
            let verbs = self.context.verbs;
            Errno::check((verbs.ibv_query_qp)(
                self.hardware(),
                &raw mut attr,
                mask as i32,
                &raw mut init,
            ))?;
            Ok(attr)
        }
    }

    pub(crate) fn move_to_error(&self) -> Verb<()> {
        // SAFETY: zero is valid.
        let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = IBV_QPS_ERR;
        self.modify_hardware(attr, IBV_QP_STATE)
    }

    /// Forgets what a connect that failed has done.
    fn reset(&self) -> Verb<()> {
        self.receive.detach();
        // SAFETY: zero is valid.
        let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = IBV_QPS_RESET;
        self.modify_hardware(attr, IBV_QP_STATE)?;
        // If it had got to the error state its receives are flushed, and will be once more.
        let own = std::ptr::from_ref(self).addr();
        self.each_completion_queue(|queue| {
            // SAFETY: a completion of this device, polled just now.
            queue.drain(|completion| unsafe { SlotHead::of(completion.wr_id).owner.addr() == own });
        });
        Ok(())
    }

    fn modify_hardware(&self, mut attr: ibv_qp_attr, mask: u32) -> Verb<()> {
        // SAFETY: the hardware is there; `attr` is ours.
        Errno::check(unsafe {
            (self.context.verbs.ibv_modify_qp)(self.hardware(), &raw mut attr, mask as i32)
        })
    }

    /// Keeps the state to come back to, before anything of ours changes it.
    pub(crate) fn note_state(&self) -> Verb<()> {
        let now = self.query_hardware(IBV_QP_STATE | IBV_QP_CAP)?;
        let mut attributes = lock(&self.attributes);
        attributes.released_state = now.qp_state;
        attributes.shown_capacity.get_or_insert(now.cap);
        Ok(())
    }

    /// It comes back in the error state, as a broken fabric would leave it.
    pub(crate) fn give_up(&self) {
        lock(&self.attributes).released_state = IBV_QPS_ERR;
    }

    pub(crate) fn state_to_restore(&self) -> ibv_qp_state {
        lock(&self.attributes).released_state
    }

    pub(crate) fn release(&self) -> Verb<()> {
        self.send.detach();
        self.receive.detach();
        let hardware = self.hardware.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if hardware.is_null() {
            return Ok(());
        }
        self.detach_below(hardware);
        // SAFETY: the device's own; its queues are detached.
        Errno::check(unsafe { (self.context.verbs.ibv_destroy_qp)(hardware) })
    }

    /// Takes a fresh one, in RESET.
    ///
    /// # Errors
    /// What the device answers; `ENOMEM` if it grants less than the application was promised.
    pub(crate) fn rebuild(&self) -> Verb<()> {
        let (made, init) = self.create_one()?;
        let (had, got) = (&self.capacity, &init.cap);
        if got.max_send_wr < had.max_send_wr
            || got.max_recv_wr < had.max_recv_wr
            || got.max_inline_data < had.max_inline_data
        {
            // SAFETY: made above, used by nobody.
            unsafe { (self.context.verbs.ibv_destroy_qp)(made) };
            return Err(Errno::NO_MEMORY);
        }
        self.hardware.store(made, Ordering::Release);
        let mut random = [0_u8; 4];
        // SAFETY: `random` has room for the bytes asked for.
        unsafe {
            libc::getrandom(
                random.as_mut_ptr().cast(),
                random.len(),
                libc::GRND_NONBLOCK,
            )
        };
        let mut attributes = lock(&self.attributes);
        attributes.fresh_psn = Some(Psn(0).advance(u32::from_ne_bytes(random)));
        (attributes.connecting, attributes.was_ready) = (false, false);
        Ok(())
    }

    /// What peers must know of the fresh one. `mtu` is log2 of the most the port can do, in bytes.
    pub(crate) fn numbers(&self, mtu: u8) -> Option<QueuePairNumbers> {
        let attributes = lock(&self.attributes);
        Some(QueuePairNumbers {
            port: attributes.port().max(1),
            virtual_qpn: self.number,
            hardware_qpn: self.hardware_number()?,
            first_psn: attributes.fresh_psn?,
            mtu: attributes.mtu().map_or(mtu, |own| own.min(mtu)),
        })
    }

    /// Brings the fresh one to the state the old one was in, with its receives posted.
    ///
    /// # Errors
    /// What the device answers.
    pub(crate) fn connect(&self, directory: &Directory, mtu: u8) -> Verb<Connected> {
        let attributes = *lock(&self.attributes);
        if attributes.connecting {
            self.reset()?;
        }
        lock(&self.attributes).connecting = true;
        let target = attributes.released_state;
        let first_psn = attributes.fresh_psn.ok_or(Errno::INVALID)?;
        self.send.translate();
        self.receive.translate();
        self.attach_again()?;
        if target == IBV_QPS_RESET {
            return Ok(Connected::AsBefore);
        }
        let (known, set) = attributes.all();
        self.modify_hardware(
            ibv_qp_attr {
                qp_state: IBV_QPS_INIT,
                ..known
            },
            (IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT)
                | set & (IBV_QP_QKEY | IBV_QP_ACCESS_FLAGS),
        )?;
        self.attach_send_queue()?;
        if self.shared.is_null() {
            let post = self.hardware_post_receive()?;
            self.receive
                .restart(&self.context, self.hardware().cast(), post, true)?;
        }
        if target == IBV_QPS_INIT {
            return Ok(Connected::AsBefore);
        }
        if target == IBV_QPS_ERR {
            self.move_to_error()?;
            return Ok(Connected::AsBefore);
        }
        let outcome = if self.is_datagram() {
            self.modify_hardware(
                ibv_qp_attr {
                    qp_state: IBV_QPS_RTR,
                    ..known
                },
                IBV_QP_STATE,
            )?;
            if target != IBV_QPS_RTR {
                self.modify_hardware(
                    ibv_qp_attr {
                        qp_state: IBV_QPS_RTS,
                        sq_psn: first_psn.0,
                        ..known
                    },
                    IBV_QP_STATE | IBV_QP_SQ_PSN,
                )?;
            }
            Connected::AsBefore
        } else {
            self.connect_to_peer(&attributes, first_psn, directory, mtu)?
        };
        if target == IBV_QPS_SQD {
            self.modify_hardware(
                ibv_qp_attr {
                    qp_state: IBV_QPS_SQD,
                    ..known
                },
                IBV_QP_STATE,
            )?;
        }
        Ok(outcome)
    }

    fn connect_to_peer(
        &self,
        attributes: &Attributes,
        first_psn: Psn,
        directory: &Directory,
        mtu: u8,
    ) -> Verb<Connected> {
        let (known, set) = attributes.all();
        let found = attributes.peer().and_then(|(address, qpn)| {
            let vector = translate_address(&self.context, directory, &known.ah_attr)?;
            Some((directory.peer(address, qpn)?, vector))
        });
        let mut ready = ibv_qp_attr {
            qp_state: IBV_QPS_RTR,
            ..known
        };
        let own = attributes.mtu().unwrap_or(mtu).min(mtu);
        let outcome = if let Some((peer, vector)) = found {
            ready.ah_attr = vector;
            ready.dest_qp_num = peer.qpn.0;
            ready.rq_psn = peer.first_psn.0;
            ready.path_mtu = path_mtu(own.min(peer.mtu));
            self.send
                .set_peer_keys(Some(std::sync::Arc::clone(&peer.keys)));
            Connected::AsBefore
        } else {
            let (vector, number) = self.context.dead_end(&known.ah_attr)?;
            ready.ah_attr = vector;
            ready.dest_qp_num = number.0;
            ready.path_mtu = path_mtu(own);
            self.send.set_peer_keys(None);
            Connected::Parked
        };
        self.choose_counting(attributes);
        self.receive.start_counting();
        let (to_rtr, to_rts) = if self.is_reliable() {
            (RC_TO_RTR, RC_TO_RTS)
        } else {
            (UC_TO_RTR, UC_TO_RTS)
        };
        self.modify_hardware(ready, to_rtr | set & IBV_QP_ACCESS_FLAGS)?;
        let mut noted = lock(&self.attributes);
        (noted.was_ready, noted.mtu_below) = (true, ready.path_mtu);
        drop(noted);
        if attributes.released_state == IBV_QPS_RTR {
            return Ok(outcome);
        }
        self.modify_hardware(
            ibv_qp_attr {
                qp_state: IBV_QPS_RTS,
                sq_psn: first_psn.0,
                ..known
            },
            to_rts,
        )?;
        self.send.start(first_psn, 128 << ready.path_mtu);
        Ok(outcome)
    }

    /// Opens the gate of the send queue, after what is outstanding or held went down.
    ///
    /// # Errors
    /// What the device answers; then the queue pair is in the error state.
    pub(crate) fn open(&self) -> Verb<()> {
        self.send.open(&self.context, || self.move_to_error())
    }

    /// Closes it; `false` if a thread stays inside.
    pub(crate) fn close(&self, limit: std::time::Instant) -> bool {
        self.send.close(limit) && self.receive.check(limit)
    }
}

impl Extended {
    /// How to make the hardware's queue pair.
    fn attributes(self, domain: *mut ibv_pd, init: ibv_qp_init_attr) -> ibv_qp_init_attr_ex {
        ibv_qp_init_attr_ex {
            qp_context: init.qp_context,
            send_cq: init.send_cq,
            recv_cq: init.recv_cq,
            srq: init.srq,
            cap: init.cap,
            qp_type: init.qp_type,
            sq_sig_all: init.sq_sig_all,
            comp_mask: self.comp_mask,
            pd: domain,
            create_flags: self.create_flags,
            send_ops_flags: self.send_ops,
            // SAFETY: zero is valid, and no bit of the mask names the rest.
            ..unsafe { std::mem::zeroed() }
        }
    }
}

/// How a queue pair came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connected {
    AsBefore,
    /// Its peer is gone. It is connected to a queue pair that answers nobody, so that what is sent ends as it would have
    /// ended: in retries that run out.
    Parked,
}

/// How sends are given to the device below.
pub(crate) fn hardware_post_send(context: &Context) -> Verb<PostSend> {
    if context.rings_by_write.load(Ordering::Relaxed) {
        return Ok(doorbell::post_send);
    }
    // SAFETY: the gate is held or closed, so the hardware is there.
    unsafe {
        (*context.hardware())
            .ops
            .post_send
            .ok_or(Errno::NOT_SUPPORTED)
    }
}
