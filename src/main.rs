//! The `reverbs` command: it starts jobs under the provider, and takes their processes through checkpoint and restart.

mod command;

use std::process::ExitCode;

fn main() -> ExitCode {
    command::main()
}
