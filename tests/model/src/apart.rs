//! A process of its own for each program: what a restart teaches a process stays with it, and a program may be its first.

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A program that takes longer hangs, in seconds.
const LIMIT: u32 = 60;

/// Runs `work` in a child of this process.
///
/// # Panics
/// It does, in its words; or it hangs.
pub fn apart(work: impl FnOnce()) {
    let (mut said, say) = std::io::pipe().expect("a pipe");
    // SAFETY: the other threads of a test wait for this one, so they hold no lock that the child would miss; glibc takes care of
    // its own. The child ends by `_exit`, so that nothing of the parent is torn down.
    let child = unsafe { libc::fork() };
    assert_ne!(child, -1, "fork");
    if child == 0 {
        drop(said);
        // SAFETY: the two standard files become the pipe; an alarm that nobody handles ends the process.
        unsafe {
            libc::dup2(say.as_raw_fd(), libc::STDOUT_FILENO);
            libc::dup2(say.as_raw_fd(), libc::STDERR_FILENO);
            libc::alarm(LIMIT);
        }
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // Past the capture of the test's own output.
            // SAFETY: a duplicate that is closed at once.
            let out = unsafe { libc::dup(libc::STDERR_FILENO) };
            // SAFETY: as above.
            let mut out = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(out) });
            let _ = std::io::Write::write_all(&mut out, format!("{panic}\n").as_bytes());
        }));
        let failed = catch_unwind(AssertUnwindSafe(work)).is_err();
        drop(default);
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(failed)) };
    }
    drop(say);
    let mut words = String::new();
    let _ = said.read_to_string(&mut words);
    let mut status = 0;
    // SAFETY: our child, which nobody else waits for.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert!(status == 0, "status {status:#x}\n{words}");
}
