//! The provider.

pub mod register;
pub mod release;

mod verbs {
    //! No operations yet: a device can be seen, and opening it is refused.

    use rdma_core_sys::ibv_context;
    use std::ffi::{CStr, c_int, c_void};

    pub(crate) const OPS: &[(&str, *const c_void)] = &[];

    pub(crate) fn opened(
        _context: *mut ibv_context,
        _device_name: &CStr,
        _cmd_fd: c_int,
    ) -> Result<(), c_int> {
        Err(libc::EOPNOTSUPP)
    }
}
