//! `node-tests`: runs jobs over several nodes that are namespaces of this machine; see `--help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    match reverbs_node_tests::command_line::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("node-tests: {error:#}");
            ExitCode::from(2)
        }
    }
}
