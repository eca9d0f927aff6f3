//! Which ids of the connection manager a file of `/dev/infiniband/rdma_cm` has.
//!
//! The kernel's lists ([`crate::restrack`]) leave out ids that are bound to no device, and do not say whose an id is once the
//! thread that made it has ended. The file itself knows its ids, and tells of one that it is asked for by number.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

/// `RDMA_USER_CM_CMD_QUERY` of rdma_user_cm.h.
const QUERY: u32 = 19;

/// None of `enum rdma_ucm_query`'s: the id is looked up, and nothing is answered or changed.
const NO_QUESTION: u32 = u32::MAX;

/// Numbers that are asked for. The kernel gives the lowest that is free on the whole host (`xa_alloc`), so one above it
/// exists only where so many ids exist at once.
const NUMBERS: u32 = 1 << 14;

/// `struct rdma_ucm_cmd_hdr` and `struct rdma_ucm_query`.
#[repr(C)]
struct Query {
    command: u32,
    length: u16,
    answer_length: u16,
    answer: u64,
    id: u32,
    option: u32,
}

const _: () = assert!(size_of::<Query>() == 24);

/// The numbers of the ids that were made on this file of the connection manager.
///
/// # Errors
/// When the kernel does not answer: EACCES, for one, to a thread whose credentials are not those that opened the file.
pub fn ids(file: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for id in 0..NUMBERS {
        let query = Query {
            command: QUERY,
            length: 16,
            answer_length: 0,
            answer: 0,
            id,
            option: NO_QUESTION,
        };
        // SAFETY: plain numbers without padding.
        let bytes = unsafe {
            std::slice::from_raw_parts((&raw const query).cast::<u8>(), size_of::<Query>())
        };
        match rustix::io::write(file, bytes) {
            // No id of that number; one of another file.
            Err(Errno::NOENT | Errno::INVAL) => {}
            // It is looked up before the question is.
            Ok(_) | Err(Errno::NOSYS) => found.push(id),
            // Under way to its end.
            Err(Errno::NXIO | Errno::IO) => found.push(id),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}
