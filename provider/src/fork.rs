//! A forked child owns nothing of its parent's hardware.
//!
//! The inner C library's own handlers never run in a child, so a child must never call inside: its verbs fail with EIO. It
//! also lets go of the inner files and mappings, which would keep the parent's device busy and the tree from being saved.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Once;

use kmod_compat::fds::{Process, rdma_mappings};
use reverbs::virt::process::process;

/// Registers the handler, once.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    // SAFETY: the handler has the signature asked for and lives as long as the library, which is never unloaded.
    ONCE.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(in_child));
    });
}

unsafe extern "C" fn in_child() {
    // A panic here has nowhere to go, and the child can live without what follows.
    let _ = std::panic::catch_unwind(|| {
        process().disown();
        reverbs::agent::forget_after_fork();
        let null = File::options().read(true).write(true).open("/dev/null");
        for file in process().hardware_files_in_child() {
            // SAFETY: numbers of files that the child inherited and cannot use.
            unsafe {
                match (&null, file.seen_by_application) {
                    (Ok(null), true) => libc::dup3(null.as_raw_fd(), file.number, libc::O_CLOEXEC),
                    _ => libc::close(file.number),
                };
            }
        }
        for mapping in rdma_mappings(Process::Own).unwrap_or_default() {
            // SAFETY: the device's queues and doorbells, which only the inner library uses, and it is not called here.
            unsafe {
                libc::munmap(
                    std::ptr::with_exposed_provenance_mut(mapping.start as usize),
                    (mapping.end - mapping.start) as usize,
                );
            }
        }
    });
}
