//! Folders of a node that does not see those of the first.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::writer::{make_private, remove_abandoned};

/// A hidden folder that this node alone needs, for as long as it works on its part of an image. Removed when dropped.
#[derive(Debug)]
pub struct ScratchFolder {
    path: PathBuf,
}

impl ScratchFolder {
    /// Makes the folder in which an image is made, as the first node has it, here too. What a checkpoint of the same job has left
    /// beside it that was killed goes.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(hidden: &Path) -> Result<Self> {
        let make = || -> std::io::Result<()> {
            if let Some(parent) = hidden.parent() {
                std::fs::create_dir_all(parent)?;
                if let Some((beginning, end)) = job_and_host(hidden) {
                    remove_abandoned(parent, &beginning, &end);
                }
            }
            make_private(hidden)
        };
        make().with_context(|| format!("cannot make the folder {}", hidden.display()))?;
        Ok(Self {
            path: hidden.to_owned(),
        })
    }

    /// For what will come to `path`. What is there of another time goes.
    #[must_use]
    pub fn reserve(path: PathBuf) -> Self {
        // Where it cannot be removed, making it anew says why.
        let _ = std::fs::remove_dir_all(&path);
        Self { path }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchFolder {
    fn drop(&mut self) {
        // Nothing better can be done here; the folder is hidden and private.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// How the names of all images in the making of the same job begin and end: `.reverbs-ROOT-` and `@HOST`.
fn job_and_host(hidden: &Path) -> Option<(String, String)> {
    let (name, host) = hidden.file_name()?.to_str()?.split_once('@')?;
    let (job, _) = name.rsplit_once('-')?;
    Some((format!("{job}-"), format!("@{host}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_checkpoint_of_the_same_job_has_left_goes_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let images = parent.path().join("not-there-yet");
        let of = |name: &str| images.join(name);
        let left = ScratchFolder::create(&of(".reverbs-7-20260101T000000Z@n-1")).unwrap();
        let other = ScratchFolder::create(&of(".reverbs-77-20260101T000000Z@n-1")).unwrap();
        let elsewhere = ScratchFolder::create(&of(".reverbs-7-20260101T000000Z@n-2")).unwrap();
        let fresh = ScratchFolder::create(&of(".reverbs-7-20260101T000001Z@n-1")).unwrap();
        assert!(!left.path().exists());
        for there in [&other, &elsewhere, &fresh] {
            assert!(there.path().exists());
        }
        let gone = fresh.path().to_owned();
        drop(fresh);
        assert!(!gone.exists());
    }
}
