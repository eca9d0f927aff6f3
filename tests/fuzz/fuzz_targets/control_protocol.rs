//! Whatever is said to an agent: it answers, and another orchestrator brings the process back with all requests accounted for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reverbs_fuzz::application::with_application;
use reverbs_fuzz::orchestrator::Conversation;

fuzz_target!(
    |conversation: Conversation| with_application(true, |application| {
        application.talk(&conversation);
    })
);
