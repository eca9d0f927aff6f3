//! `guest-tests`: runs the device tests inside the test machine; see `--help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    match reverbs_tests::command_line::run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("guest-tests: {error:#}");
            ExitCode::from(2)
        }
    }
}
