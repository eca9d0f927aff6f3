//! The image of a job over several nodes: a folder with an image of each node, and what joins them.

use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::manifest::VERSION;
use super::open::{read_guarded, require_private_folder};
use super::writer::{sync_folder, write_guarded};

const FORMAT: &str = "reverbs-job-image";
const JOB: &str = "job.json";
const JOB_SUM: &str = "job.sum";

/// What joins the nodes of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobManifest {
    pub format: String,
    pub version: u32,
    /// Release of the command that wrote it.
    pub reverbs: String,
    /// UTC, ISO 8601.
    pub created: String,
    /// The same for all images of the job.
    pub id: String,
    /// Whether the job ended with the checkpoint.
    pub stopped: bool,
    /// The first is where the job was started.
    pub nodes: Vec<JobNode>,
}

/// One node of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobNode {
    /// As the launcher calls it.
    pub name: String,
    /// Its image, below the job's.
    pub folder: PathBuf,
    /// Root of its process tree.
    pub root: i32,
    /// Bytes of its image.
    pub bytes: u64,
}

/// An image whose description of the job holds.
#[derive(Clone, Debug)]
pub struct JobImage {
    pub folder: PathBuf,
    pub manifest: JobManifest,
}

impl JobManifest {
    pub fn new(id: String, stopped: bool, nodes: Vec<JobNode>) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            reverbs: env!("CARGO_PKG_VERSION").to_owned(),
            created: super::timestamp(),
            id,
            stopped,
            nodes,
        }
    }

    /// Writes it into the folder of an image in the making.
    ///
    /// # Errors
    /// It cannot be brought to disk.
    pub fn write(&self, folder: &Path) -> Result<()> {
        write_guarded(folder, JOB, JOB_SUM, self)?;
        sync_folder(folder)
    }
}

impl JobImage {
    /// Whether there is one, and not the image of a single node.
    pub fn is_at(folder: &Path) -> bool {
        folder.join(JOB).exists()
    }

    /// # Errors
    /// It is no image of a job, or one of another user, open to others, of another version, or damaged.
    pub fn open(folder: &Path) -> Result<Self> {
        let folder = folder
            .canonicalize()
            .with_context(|| format!("there is no image {}", folder.display()))?;
        let read = || -> Result<JobManifest> {
            require_private_folder(&folder)?;
            let manifest: JobManifest = read_guarded(&folder, JOB, JOB_SUM, FORMAT)?;
            ensure!(!manifest.nodes.is_empty(), "{JOB} names no node");
            for node in &manifest.nodes {
                let mut parts = node.folder.components();
                ensure!(
                    matches!(
                        (parts.next(), parts.next()),
                        (Some(Component::Normal(_)), None)
                    ),
                    "{JOB} names {}, which is outside of it",
                    node.folder.display()
                );
            }
            Ok(manifest)
        };
        let manifest = read().with_context(|| format!("image {}", folder.display()))?;
        Ok(Self { folder, manifest })
    }

    pub fn node_folder(&self, node: &JobNode) -> PathBuf {
        self.folder.join(&node.folder)
    }

    /// Where a node gets its part that does not see the image: beside where it would be, and hidden.
    pub fn copied_folder(&self, node: &JobNode) -> PathBuf {
        let image = self.folder.file_name().unwrap_or_default();
        let name = format!(".{}.{}", image.display(), node.folder.display());
        self.folder.with_file_name(name)
    }
}
