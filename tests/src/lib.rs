//! The runner of the tests that need an RDMA device.
//!
//! `guest-tests` runs inside the test machine (`cargo xtask vm`). It starts stock RDMA programs and
//! the C programs of `tests/programs/`, either on the bare device or through the provider, and
//! checks what they did. LEDGER.md says which promise each case proves.

pub mod abandoned;
pub mod case;
pub mod chaos;
pub mod checkpoints;
pub mod clients;
pub mod command_line;
pub mod connections;
pub mod corners;
pub mod costs;
pub mod cycles;
pub mod dead;
pub mod drain;
pub mod evidence;
pub mod facts;
pub mod failures;
pub mod faults;
pub mod hardware;
pub mod interposer;
pub mod jobs;
pub mod killed;
pub mod killed_criu;
pub mod killed_restart;
pub mod leaks;
pub mod matrix;
pub mod moments;
pub mod mpi;
pub mod outside;
pub mod own_programs;
pub mod process;
pub mod programs;
pub mod report;
pub mod rivals;
pub mod setup;
pub mod smaller;
pub mod stale;
pub mod stand_in;
pub mod stock;
pub mod stopped;
pub mod strangers;
pub mod suite;
pub mod tree;
pub mod wrapped;
