//! Tasks of the project, and the test machine as a library: see `vm`.

pub mod command;
pub mod demo;
pub mod device;
pub mod fuzz;
pub mod guest_io;
pub mod handles;
pub mod initramfs;
pub mod kernel;
pub mod network;
pub mod nodes;
pub mod paths;
pub mod setup;
pub mod stage;
pub mod test;
pub mod test_plan;
pub mod vm;
