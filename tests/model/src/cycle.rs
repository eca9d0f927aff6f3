//! A checkpoint without an image: the agent of this process is taken through the phases, as `reverbs cycle` does.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use reverbs::control::message::{ProcessStatus, Reply, Request};
use reverbs_benches::restart::Agent;

/// A moment between two phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    Begun,
    Closed,
    Drained,
    Stopped,
    Asked,
    Settled,
    Released,
    Rebuilt,
    Connected,
    Resumed,
}

/// Replaces the hardware; `between` does what it likes at each moment. If it panics, that goes on when the gates are open again.
///
/// # Panics
/// The agent refuses a phase.
pub fn cycle(runtime_dir: &Path, mut between: impl FnMut(Moment)) -> ProcessStatus {
    let mut failed = None;
    let mut between = |moment| {
        if failed.is_none() {
            failed = catch_unwind(AssertUnwindSafe(|| between(moment))).err();
        }
    };
    let mut agent = Agent::begin(runtime_dir);
    let mut ask = |request| agent.ask(request);
    between(Moment::Begun);
    ask(Request::Close { limit_ms: 1000 });
    between(Moment::Closed);
    ask(Request::Drain { limit_ms: 0 });
    between(Moment::Drained);
    ask(Request::Stop { limit_ms: 1000 });
    between(Moment::Stopped);
    let Reply::Responders { responders } = ask(Request::Responders) else {
        panic!("responders are answered by responders");
    };
    between(Moment::Asked);
    ask(Request::Settle { responders });
    between(Moment::Settled);
    ask(Request::Release);
    between(Moment::Released);
    ask(Request::Rebuild { devices: vec![] });
    between(Moment::Rebuilt);
    let Reply::Numbers { numbers } = ask(Request::Publish) else {
        panic!("numbers are answered by numbers");
    };
    ask(Request::Connect {
        numbers: vec![numbers],
    });
    between(Moment::Connected);
    ask(Request::Resume);
    between(Moment::Resumed);
    if let Some(failed) = failed {
        resume_unwind(failed);
    }
    match ask(Request::Status) {
        Reply::Status { status } => status,
        other => panic!("status is answered by {other:?}"),
    }
}
