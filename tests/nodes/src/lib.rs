//! The runner of the tests that need several nodes and no RDMA device.
//!
//! `node-tests` runs on the build machine's own kernel, as root. Each node is a set of namespaces: network, processes,
//! mounts, host name. They are joined by a bridge that is itself in a namespace of the run, so nothing of the machine is
//! changed, and nothing is left when the run ends, in whatever way. CRIU is fetched: Debian 12's does not know new kernels.

pub mod bare;
pub mod case;
pub mod clean;
pub mod cluster;
pub mod command_line;
pub mod criu;
pub mod debian;
pub mod enclosure;
pub mod faults;
pub mod job;
pub mod launched;
pub mod library;
pub mod node;
pub mod node_init;
pub mod processes;
pub mod pypi;
pub mod remote;
pub mod saved;
pub mod slurm;
pub mod slurm_cases;
pub mod slurm_steps;
