//! What the fuzz targets share: a strict device, and an application that knows what must become of what it posts.

pub mod application;
pub mod device;
pub mod input;
pub mod orchestrator;
pub mod outcome;
pub mod requests;
pub mod verbs;
