//! Chains of work requests of every shape, with numbers that differ from the hardware's, and during further restarts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reverbs_fuzz::application::with_application;
use reverbs_fuzz::input::Input;

fuzz_target!(|input: Input| with_application(true, |application| {
    application.run(&input);
}));
