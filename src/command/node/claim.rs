//! What comes before a restart: nobody else restores that part here, and there is a place for it.

use std::path::Path;

use super::message::ImagePart;
use crate::command::job::JobLock;
use reverbs::image::ScratchFolder;

/// A part of an image that this node is to restore, and nobody else meanwhile.
#[derive(Debug)]
pub(super) struct Claim {
    part: ImagePart,
    /// Where it comes to be if this node does not see the image.
    copy: Option<ScratchFolder>,
    pub(super) lock: Option<JobLock>,
    pub(super) several_nodes: bool,
}

impl Claim {
    pub(super) fn new(part: ImagePart, several_nodes: bool, lock: JobLock) -> Self {
        let is_here = part.folder.is_dir();
        Self {
            copy: (several_nodes && !is_here).then(|| ScratchFolder::reserve(part.copy.clone())),
            part,
            lock: Some(lock),
            several_nodes,
        }
    }

    pub(super) fn is_here(&self) -> bool {
        self.copy.is_none()
    }

    pub(super) fn folder(&self) -> &Path {
        match &self.copy {
            Some(copy) => copy.path(),
            None => &self.part.folder,
        }
    }

    pub(super) fn label(&self) -> &str {
        &self.part.label
    }

    /// The image is not needed here any more.
    pub(super) fn remove_copy(&mut self) {
        self.copy = None;
    }
}
