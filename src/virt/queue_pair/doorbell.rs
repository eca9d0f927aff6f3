//! Doorbells that the kernel refuses after a restore.
//!
//! A device made of software is rung by a `write` on its command file (rxe), and the kernel takes that only from a thread with
//! the very credentials object that opened the file (`ib_safe_file_access`). All threads of a process share one, until
//! CRIU restores it: then each has an equal one of its own, and whichever opened the device, `write` answers EACCES
//! to the others, after the provider has put the requests into the queue. An `ioctl` is not refused. It can carry the
//! same command (`UVERBS_METHOD_INVOKE_WRITE`), which makes the device look at its queue.

use kmod_compat::devices::DriverId;
use rdma_core_sys::{
    IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_BIND_MW, ibv_qp, ibv_send_wr,
};

use crate::errno::{Errno, Verb};

/// `RDMA_VERBS_IOCTL` of rdma_user_ioctl_cmds.h: `_IOWR(0x1b, 1, struct ib_uverbs_ioctl_hdr)`.
const VERBS_IOCTL: libc::c_ulong = 0xc018_1b01;
/// `UVERBS_OBJECT_DEVICE`, `UVERBS_METHOD_INVOKE_WRITE` and its attributes, of ib_user_ioctl_cmds.h.
const OBJECT_DEVICE: u16 = 0;
const METHOD_INVOKE_WRITE: u16 = 0;
const CORE_IN: u16 = 0;
const CORE_OUT: u16 = 1;
const WRITE_COMMAND: u16 = 2;
/// `UVERBS_ATTR_F_MANDATORY`.
const MANDATORY: u16 = 1;
/// `IB_USER_VERBS_CMD_POST_SEND` of ib_user_verbs.h.
const POST_SEND: u64 = 28;
/// Bytes of a request in the command (`struct ib_uverbs_send_wr`), of which it carries none.
const REQUEST_SIZE: u32 = 128;

/// `struct ib_uverbs_attr`.
#[repr(C)]
struct Attribute {
    id: u16,
    length: u16,
    flags: u16,
    reserved: u16,
    data: u64,
}

/// `struct ib_uverbs_ioctl_hdr`.
#[repr(C)]
struct Command {
    length: u16,
    object: u16,
    method: u16,
    attributes: u16,
    reserved1: u64,
    driver: u32,
    reserved2: u32,
    body: [Attribute; 3],
}

const _: () = assert!(size_of::<Attribute>() == 16 && size_of::<Command>() == 72);

/// `struct ib_uverbs_post_send`, without requests: what is in the queue is meant.
#[repr(C)]
struct PostSend {
    response: u64,
    queue_pair: u32,
    requests: u32,
    elements: u32,
    request_size: u32,
}

/// The device's `post_send`, and another doorbell where the first was refused.
pub(super) unsafe extern "C" fn post_send(
    queue_pair: *mut ibv_qp,
    requests: *mut ibv_send_wr,
    refused: *mut *mut ibv_send_wr,
) -> i32 {
    // SAFETY: as the caller of `ibv_post_send` vouches.
    unsafe {
        let Some(post) = (*(*queue_pair).context).ops.post_send else {
            return libc::EOPNOTSUPP;
        };
        let mut bad = std::ptr::null_mut();
        let code = post(queue_pair, requests, &raw mut bad);
        if code != 0 {
            *refused = bad;
        }
        if code != libc::EACCES {
            return code;
        }
        match ring(queue_pair) {
            Ok(()) if bad.is_null() => 0,
            Ok(()) => why(&*bad).0,
            Err(_) => code,
        }
    }
}

/// Why the device refused a request that our log let pass: the doorbell's error has hidden it (`validate_send_wr` of rxe.c).
fn why(request: &ibv_send_wr) -> Errno {
    // SAFETY: both of the union's fields are plain numbers.
    let immediate = unsafe { request.__bindgen_anon_1.imm_data };
    if request.opcode == IBV_WR_BIND_MW && (request.num_sge != 0 || immediate != 0) {
        return Errno::INVALID;
    }
    let atomic = [IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD];
    if !atomic.contains(&request.opcode) {
        return Errno::NO_MEMORY;
    }
    // SAFETY: the poster vouches for the elements; the opcode says which of the union's fields is meant.
    let (elements, address) = unsafe {
        let count = usize::try_from(request.num_sge).unwrap_or(0);
        let elements = match count {
            0 => &[],
            _ => std::slice::from_raw_parts(request.sg_list, count),
        };
        (elements, request.wr.atomic.remote_addr)
    };
    let bytes: u64 = elements
        .iter()
        .map(|element| u64::from(element.length))
        .sum();
    if bytes < 8 || address % 8 != 0 {
        Errno::INVALID
    } else {
        Errno::NO_MEMORY
    }
}

unsafe fn ring(queue_pair: *mut ibv_qp) -> Verb<()> {
    let mut response = 0_u32;
    // SAFETY: the queue pair is the device's own and alive.
    let (file, handle) = unsafe { ((*(*queue_pair).context).cmd_fd, (*queue_pair).handle) };
    let request = PostSend {
        response: (&raw mut response).expose_provenance() as u64,
        queue_pair: handle,
        requests: 0,
        elements: 0,
        request_size: REQUEST_SIZE,
    };
    let attribute = |id, length: usize, data: u64| Attribute {
        id,
        length: length as u16,
        flags: MANDATORY,
        reserved: 0,
        data,
    };
    let mut command = Command {
        length: size_of::<Command>() as u16,
        object: OBJECT_DEVICE,
        method: METHOD_INVOKE_WRITE,
        attributes: 3,
        reserved1: 0,
        driver: DriverId::RXE.0,
        reserved2: 0,
        body: [
            attribute(WRITE_COMMAND, size_of_val(&POST_SEND), POST_SEND),
            attribute(
                CORE_IN,
                size_of::<PostSend>(),
                (&raw const request).expose_provenance() as u64,
            ),
            attribute(
                CORE_OUT,
                size_of_val(&response),
                (&raw mut response).expose_provenance() as u64,
            ),
        ],
    };
    // SAFETY: the command and what it points at live until the call returns.
    match unsafe { libc::ioctl(file, VERBS_IOCTL, &raw mut command) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}
