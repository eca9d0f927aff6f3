//! What a wrapper has below it, what it is to do, and what it has done.

use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rdma_core_sys::ibv_context_ops;
use reverbs::device::Verbs;

use crate::completions::Completions;
use crate::plan::{Plan, When};
use crate::verbs;

/// The wrapper of this process.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) below: Verbs,
    pub(crate) plan: Plan,
    trace: Option<File>,
    failing: AtomicBool,
    random: Mutex<u64>,
    calls: Mutex<HashMap<&'static str, u64>>,
    /// The operations of the contexts below, by their address.
    operations: Mutex<HashMap<usize, ibv_context_ops>>,
    pub(crate) completions: Mutex<Completions>,
}

static STATE: OnceLock<State> = OnceLock::new();

/// Wraps a device. There is one wrapper in a process.
///
/// # Errors
/// The plan, in words; or there is one already.
pub fn wrap(below: &Verbs, plan: Plan) -> Result<Verbs, String> {
    let made = State::new(below.clone(), plan)?;
    STATE.set(made).map_err(|_| "wrapped already".to_owned())?;
    Ok(verbs::table())
}

/// Verbs fail as planned, or not for now. At first they do.
pub fn set_failing(failing: bool) {
    state().failing.store(failing, Ordering::Relaxed);
}

/// The one of the process; around the libibverbs of the link namespace, if nothing was [`wrap`]ped.
pub(crate) fn state() -> &'static State {
    STATE.get_or_init(|| native().unwrap_or_else(|error| panic!("wrapper: {error}")))
}

fn native() -> Result<State, String> {
    let plan = std::env::var("REVERBS_WRAPPER")
        .unwrap_or_default()
        .parse()?;
    // SAFETY: in the namespace of the caller; the constructors are those of libibverbs.
    let handle = unsafe { libc::dlopen(c"libibverbs.so.1".as_ptr(), libc::RTLD_NOW) };
    if handle.is_null() {
        return Err("no libibverbs to wrap".into());
    }
    let find = |name: &CStr| -> Option<*mut c_void> {
        // SAFETY: the handle is open and never closed.
        let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    };
    // SAFETY: names resolve to the verbs they name.
    let below = unsafe { Verbs::load(find, libc::__errno_location) };
    State::new(below.map_err(|name| format!("no {name}"))?, plan)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn new(below: Verbs, plan: Plan) -> Result<Self, String> {
        let open = |path| File::options().append(true).create(true).open(path);
        let trace = plan.trace.as_ref().map(open).transpose();
        Ok(Self {
            below,
            trace: trace.map_err(|error| format!("trace: {error}"))?,
            failing: AtomicBool::new(true),
            random: Mutex::new(plan.seed),
            calls: Mutex::default(),
            operations: Mutex::default(),
            completions: Mutex::default(),
            plan,
        })
    }

    pub(crate) fn completions(&self) -> MutexGuard<'_, Completions> {
        lock(&self.completions)
    }

    /// Below `many`.
    pub(crate) fn random(&self, many: u32) -> u32 {
        // splitmix64
        let mut random = lock(&self.random);
        *random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = *random;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((value ^ (value >> 31)) % u64::from(many.max(1))) as u32
    }

    /// Is this call of a verb one that fails? Then it has not happened.
    pub(crate) fn failure(&self, verb: &'static str) -> Option<c_int> {
        let mut planned = self.plan.failures.iter().filter(|one| one.verb == verb);
        let first = planned.next()?;
        let folder = self.plan.failing_while.as_ref();
        let now = folder.is_none_or(|folder| folder.join(verb).exists());
        if !now || !self.failing.load(Ordering::Relaxed) {
            return None;
        }
        let mut calls = lock(&self.calls);
        let call = calls.entry(verb).or_default();
        *call += 1;
        let failing = std::iter::once(first)
            .chain(planned)
            .find(|one| match one.when {
                When::Always => true,
                When::Call(which) => which == *call,
                When::Percent(percent) => self.random(100) < percent,
            })?;
        self.note(verb, format_args!("injected {}", failing.errno));
        Some(failing.errno)
    }

    /// A line of the trace.
    pub(crate) fn note(&self, verb: &str, outcome: std::fmt::Arguments<'_>) {
        if let Some(mut trace) = self.trace.as_ref() {
            // In one write, as several processes have the file.
            let line = format!("{} {verb} {outcome}\n", std::process::id());
            let _ = trace.write_all(line.as_bytes());
        }
    }

    pub(crate) fn set_errno(&self, errno: c_int) {
        // SAFETY: the calling thread's own.
        unsafe { *(self.below.errno_location)() = errno };
    }

    pub(crate) fn keep_operations(&self, context: usize, operations: ibv_context_ops) {
        lock(&self.operations).insert(context, operations);
    }

    pub(crate) fn forget_operations(&self, context: usize) {
        lock(&self.operations).remove(&context);
    }

    /// What the device below does for a context of it.
    pub(crate) fn operations(&self, context: usize) -> ibv_context_ops {
        let operations = lock(&self.operations);
        *operations.get(&context).expect("a context that was opened")
    }
}
