//! What is done on each node of a job: the same on the only one, on the first of many, and on the others (there by
//! `reverbs node`). `part` answers requests; `save` and `restore` are the long ones.

mod claim;
mod devices;
mod message;
mod part;
mod requirements;
mod restore;
mod save;

pub(crate) use message::{ImagePart, NodeReply, NodeRequest};
pub(crate) use part::{JOB_VARIABLE, Part};
pub(crate) use restore::Outputs;
