//! What a checkpoint leaves on disk: a private folder that appears by one rename and says what is in it.
//!
//! An image of a job over several nodes is a folder of such folders, one for each node, and `job.json`.
//!
//! `manifest.json` describes the job and lists every other file with its size and checksum; `manifest.sum` guards the
//! manifest; `criu/` has CRIU's images, `files/` the files that CRIU does not carry. docs/image-format.md is the reference.

mod checksum;
mod job;
mod manifest;
mod open;
mod scratch;
mod writer;

pub use job::{JobImage, JobManifest, JobNode};
pub use manifest::{
    BoundAddress, Carried, CarriedKind, CriuFacts, ImageFile, ImageProcess, Library, Manifest,
    OutsidePipe, PhaseTime, TcpConnection, WrittenFile,
};
pub use open::Image;
pub use scratch::ScratchFolder;
pub use writer::{NewImage, NewPart, timestamp};

const MANIFEST: &str = "manifest.json";
const MANIFEST_SUM: &str = "manifest.sum";
/// CRIU's images, below the image's folder.
const CRIU_FOLDER: &str = "criu";
/// Carried files, below the image's folder.
const FILES_FOLDER: &str = "files";
