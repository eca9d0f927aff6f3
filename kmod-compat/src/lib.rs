//! The kernel side of RDMA, as seen from user space.
//!
//! Everything here reads or changes facts that the kernel owns, and nothing else in the project
//! does: which RDMA devices exist ([`devices`]), what their ports say ([`ports`]), which objects
//! the kernel counts for a process ([`restrack`]), which connections a file has ([`connections`]), which file descriptors and mappings of a
//! process lead to RDMA ([`fds`]), and how one of those descriptors is replaced under a running
//! application ([`substitute`]). [`sysfs_tree`] writes the private copy of a device's sysfs
//! folder that libibverbs is led to.
//!
//! The crate is used inside application processes: it prints nothing, keeps no state, and every
//! failure is an error value that names its object. `docs/kernel-side.md` has the facts and
//! their sources.

pub mod connections;
pub mod devices;
mod epoll;
pub mod fds;
pub mod netlink;
pub mod ports;
pub mod restrack;
pub mod substitute;
pub mod sysfs;
pub mod sysfs_tree;
