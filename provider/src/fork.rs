//! The handlers around a fork: `reverbs::virt::fork` says what they are for.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use reverbs::virt::fork::Fork;

use crate::native;

thread_local! {
    /// Of the fork that this thread has under way.
    static UNDER_WAY: RefCell<Option<(Fork, native::Still)>> = const { RefCell::new(None) };
}

/// Registers the handlers, once.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    // SAFETY: the handlers have the signature asked for and live as long as the library, which is never unloaded.
    ONCE.call_once(|| unsafe {
        libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child));
    });
}

unsafe extern "C" fn before() {
    guarded(|slot| *slot = Some((Fork::begin(), native::still())));
}

unsafe extern "C" fn in_parent() {
    guarded(|slot| *slot = None);
}

unsafe extern "C" fn in_child() {
    guarded(|slot| {
        if let Some((fork, native)) = slot.take() {
            fork.end_in_child();
            native.forget_in_child();
        }
    });
}

/// A panic has nowhere to go here. A thread that is about to end has no place to keep anything in; its child is not told.
fn guarded(work: impl FnOnce(&mut Option<(Fork, native::Still)>)) {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        let _ = UNDER_WAY.try_with(|slot| work(&mut slot.borrow_mut()));
    }));
}
