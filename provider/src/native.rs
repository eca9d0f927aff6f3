//! The native device: a second libibverbs, in a link namespace of its own, with the real providers below it.
//!
//! Its C library is its own too: an `errno` of its own (`Verbs::errno`), and an environment of its own, from which we take
//! what would lead it back to us.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use reverbs::device::Verbs;

/// Must not reach the inner libibverbs: the first two would load us again, the others would count fork protection of the
/// same memory twice (the outer libibverbs keeps that count).
const HIDDEN: [&str; 4] = [
    "RDMAV_DRIVERS=",
    "IBV_DRIVERS=",
    "RDMAV_FORK_SAFE=",
    "IBV_FORK_SAFE=",
];

/// Names another library than the host's libibverbs for the devices below; for tests, which put a device of their own in between.
const LIBRARY: &str = "REVERBS_LIBIBVERBS";

type Loaded = Option<Result<&'static Verbs, &'static str>>;

static VERBS: Mutex<Loaded> = Mutex::new(None);

/// The verbs of the devices of this host.
///
/// # Errors
/// In words: the dynamic loader's, or the verb that is missing.
pub(crate) fn verbs() -> Result<&'static Verbs, &'static str> {
    *still().0.get_or_insert_with(|| match load() {
        Ok(verbs) => Ok(Box::leak(Box::new(verbs))),
        Err(what) => Err(what.leak()),
    })
}

/// Nobody is loading the library.
#[derive(Debug)]
pub(crate) struct Still(MutexGuard<'static, Loaded>);

pub(crate) fn still() -> Still {
    Still(VERBS.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Still {
    /// In a forked child the parent's library may be in any state: other threads were inside, and its C library has heard nothing
    /// of the fork. If the child opens a device, it gets another.
    pub(crate) fn forget_in_child(mut self) {
        *self.0 = None;
    }
}

fn load() -> Result<Verbs, String> {
    let library = std::env::var_os(LIBRARY).unwrap_or_else(|| "libibverbs.so.1".into());
    let library = CString::new(library.into_encoded_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: a new namespace; the library's constructors are those of libibverbs and libc.
    let handle = unsafe {
        libc::dlmopen(
            libc::LM_ID_NEWLM,
            library.as_ptr(),
            libc::RTLD_NOW | libc::RTLD_LOCAL,
        )
    };
    if handle.is_null() {
        return Err(format!("no second libibverbs: {}", loader_error()));
    }
    let find = |name: &CStr| {
        // SAFETY: the handle is open and never closed.
        let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    };
    hide_environment(find)?;
    let location =
        find(c"__errno_location").ok_or("no __errno_location beside the second libibverbs")?;
    // SAFETY: the C library's `int *__errno_location(void)`; and names resolve to the verbs they name.
    unsafe {
        let location =
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> *mut c_int>(location);
        Verbs::load(find, location).map_err(|name| format!("the second libibverbs has no {name}"))
    }
}

/// Gives the inner C library an environment without what is [`HIDDEN`].
fn hide_environment(find: impl Fn(&CStr) -> Option<*mut c_void>) -> Result<(), String> {
    let environ = find(c"environ")
        .ok_or("no environ beside the second libibverbs")?
        .cast::<*mut *mut c_char>();
    let mut kept = Vec::new();
    // SAFETY: `environ` of a C library that nobody else uses yet: null, or an array of strings that ends in null. The new
    // array is leaked, its strings are those of the process.
    unsafe {
        let mut at = *environ;
        while !at.is_null() && !(*at).is_null() {
            let entry = CStr::from_ptr(*at).to_string_lossy();
            if !HIDDEN.iter().any(|hidden| entry.starts_with(hidden)) {
                kept.push(*at);
            }
            at = at.add(1);
        }
        kept.push(std::ptr::null_mut());
        *environ = Vec::leak(kept).as_mut_ptr();
    }
    Ok(())
}

fn loader_error() -> String {
    // SAFETY: dlerror gives null or a string that is valid until the next call of this thread.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "unknown".into()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}
