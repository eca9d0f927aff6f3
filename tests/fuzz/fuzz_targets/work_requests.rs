//! Chains of work requests of every shape, before the first restart.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reverbs_fuzz::application::with_application;
use reverbs_fuzz::input::Input;

fuzz_target!(|input: Input| with_application(false, |application| {
    application.run(&input);
}));
