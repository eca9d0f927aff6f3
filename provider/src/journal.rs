//! The log of a process, where `REVERBS_LOG` asks for one: never on the application's own streams.
//!
//! `REVERBS_LOG` is a filter as `tracing` knows it (`warn`, `reverbs=debug`). The file is `PID.log` beside the agent's socket.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Once};

use reverbs::control::socket::runtime_dir;
use tracing_subscriber::EnvFilter;

/// Opens the file and starts logging, once, if it is asked for. What cannot be logged is no reason to fail.
pub(crate) fn start() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let Ok(filter) = EnvFilter::try_from_env("REVERBS_LOG") else {
            return;
        };
        let Ok(folder) = runtime_dir() else { return };
        let path = folder.join(format!("{}.log", std::process::id()));
        let Ok(file) = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
        else {
            return;
        };
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            // Each line is one write, so no lock is needed, which a forked child could find taken for ever.
            .with_writer(Arc::new(file))
            .try_init();
    });
}
