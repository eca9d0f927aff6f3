//! Reading an image back: everything is checked before anything is believed.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;

use super::checksum::{self, Durability};
use super::manifest::{CarriedKind, FORMAT, Header, Manifest, VERSION};
use super::writer::sync_folder;
use super::{CRIU_FOLDER, FILES_FOLDER, MANIFEST, MANIFEST_SUM};

/// An image whose manifest holds.
#[derive(Debug)]
pub struct Image {
    pub folder: PathBuf,
    pub manifest: Manifest,
}

impl Image {
    /// Reads the manifest.
    ///
    /// # Errors
    /// It is no image, or one of another user, open to others, of another version, or damaged.
    pub fn open(folder: &Path) -> Result<Self> {
        let folder = folder
            .canonicalize()
            .with_context(|| format!("there is no image {}", folder.display()))?;
        let manifest =
            read_manifest(&folder).with_context(|| format!("image {}", folder.display()))?;
        Ok(Self { folder, manifest })
    }

    /// Compares every file with what the manifest says of it.
    ///
    /// # Errors
    /// A file is missing or is not what was written.
    pub fn verify(&self) -> Result<()> {
        self.compare(Durability::ReadOnly)
    }

    /// The same for one that was just copied here, and brings it to disk.
    ///
    /// # Errors
    /// As [`Image::verify`]; it cannot be brought to disk.
    pub fn settle(&self) -> Result<()> {
        self.compare(Durability::Sync)?;
        for name in [MANIFEST, MANIFEST_SUM] {
            std::fs::File::open(self.folder.join(name))
                .and_then(|file| file.sync_all())
                .with_context(|| format!("cannot bring {name} to disk"))?;
        }
        for folder in [&self.criu_folder(), &self.files_folder(), &self.folder] {
            sync_folder(folder)?;
        }
        Ok(())
    }

    fn compare(&self, durability: Durability) -> Result<()> {
        let check = || -> Result<()> {
            for expected in &self.manifest.contents {
                let found = std::fs::symlink_metadata(self.folder.join(&expected.path))
                    .with_context(|| format!("{} is missing", expected.path.display()))?;
                require_private_file(&found)
                    .with_context(|| expected.path.display().to_string())?;
            }
            let paths: Vec<PathBuf> = self
                .manifest
                .contents
                .iter()
                .map(|file| file.path.clone())
                .collect();
            let found = checksum::measure(&self.folder, &paths, durability)?;
            let mut expected = self.manifest.contents.clone();
            expected.sort_unstable_by(|one, other| one.path.cmp(&other.path));
            for (expected, found) in expected.iter().zip(&found) {
                let path = expected.path.display();
                ensure!(
                    expected.size == found.size,
                    "{path} has {} bytes instead of {}",
                    found.size,
                    expected.size
                );
                ensure!(
                    expected.crc32 == found.crc32,
                    "{path} was changed (checksum)"
                );
            }
            Ok(())
        };
        check().with_context(|| {
            format!(
                "image {} is damaged, use another one",
                self.folder.display()
            )
        })
    }

    pub fn criu_folder(&self) -> PathBuf {
        self.folder.join(CRIU_FOLDER)
    }

    pub fn files_folder(&self) -> PathBuf {
        self.folder.join(FILES_FOLDER)
    }

    /// The last part of its path.
    pub fn name(&self) -> String {
        self.folder.file_name().map_or_else(
            || "image".into(),
            |name| name.to_string_lossy().into_owned(),
        )
    }
}

fn read_manifest(folder: &Path) -> Result<Manifest> {
    require_private_folder(folder)?;
    let manifest: Manifest = read_guarded(folder, MANIFEST, MANIFEST_SUM, FORMAT)?;
    let us = rustix::process::geteuid().as_raw();
    ensure!(
        manifest.user == us,
        "was made by user {}, and this command runs as user {us}: restart it as that user",
        manifest.user
    );
    let listed = manifest.contents.iter().map(|file| file.path.as_path());
    // A stored file has no folder of its own.
    let stored = manifest.carried.iter().filter_map(|item| match &item.kind {
        CarriedKind::File { stored, .. } => Some(Path::new(stored)),
        CarriedKind::Folder | CarriedKind::Fifo => None,
    });
    for path in listed.chain(stored) {
        let mut parts = path.components().peekable();
        ensure!(
            parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_))),
            "lists {}, which is outside of it",
            path.display()
        );
    }
    Ok(manifest)
}

pub(super) fn require_private_folder(folder: &Path) -> Result<()> {
    let found = std::fs::symlink_metadata(folder)?;
    ensure!(found.is_dir(), "is no folder");
    require_ours(&found)?;
    ensure!(
        found.mode() & 0o077 == 0,
        "can be entered by others (mode {:o}) and may have been changed: if you trust it, `chmod 700` it",
        found.mode() & 0o777
    );
    Ok(())
}

/// Reads a description that is guarded by a checksum beside it.
pub(super) fn read_guarded<T: DeserializeOwned>(
    folder: &Path,
    name: &str,
    sum_name: &str,
    format: &str,
) -> Result<T> {
    let path = folder.join(name);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("has no {name}: it is no image of reverbs, or was never finished")
        }
        Err(error) => return Err(error).context(name.to_owned()),
    };
    // The version first: an image of another one is not damaged.
    if let Ok(header) = serde_json::from_slice::<Header>(&text) {
        ensure!(
            header.format == format,
            "{name} is not that of a reverbs image"
        );
        ensure!(
            header.version == VERSION,
            "has format version {}, this command reads version {VERSION}: use the reverbs that wrote it",
            header.version
        );
    }
    let sum = std::fs::read_to_string(folder.join(sum_name))
        .with_context(|| format!("{sum_name}: the image is damaged, use another one"))?;
    ensure!(
        sum == format!("{:08x} {}\n", crc32fast::hash(&text), text.len()),
        "{name} was changed (checksum): the image is damaged, use another one"
    );
    serde_json::from_slice(&text).context(name.to_owned())
}

fn require_ours(found: &Metadata) -> Result<()> {
    let us = rustix::process::geteuid().as_raw();
    ensure!(
        found.uid() == us,
        "belongs to user {}, and this command runs as user {us}: restart it as that user",
        found.uid()
    );
    Ok(())
}

fn require_private_file(found: &Metadata) -> Result<()> {
    ensure!(found.is_file(), "is no regular file");
    require_ours(found)?;
    ensure!(found.mode() & 0o022 == 0, "can be written by others");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::{Path, PathBuf};

    use super::Image;
    use crate::image::{CriuFacts, Manifest, NewImage, NewPart};

    fn publish(parent: &Path) -> PathBuf {
        let mut new = NewImage::create(parent, 42).unwrap();
        let part = NewPart::create(new.folder()).unwrap();
        for (name, text) in [("pages-1.img", "pages"), ("core-42.img", "core")] {
            std::fs::write(part.criu_folder().join(name), text).unwrap();
            private(&part.criu_folder().join(name), 0o600);
        }
        let manifest = Manifest {
            format: Manifest::format(),
            version: Manifest::version(),
            reverbs: "0".into(),
            created: String::new(),
            host: "here".into(),
            kernel: String::new(),
            user: rustix::process::geteuid().as_raw(),
            root: 42,
            stopped: false,
            processes: vec![],
            libraries: vec![],
            criu: CriuFacts {
                version: "4".into(),
                options: vec![],
            },
            runtime_folder: PathBuf::new(),
            listening_ports: vec![],
            addresses: vec![],
            outside_pipes: vec![],
            carried: vec![],
            written_files: vec![],
            connections: vec![],
            phases: vec![],
            contents: vec![],
        };
        part.seal(manifest).unwrap();
        new.publish().unwrap();
        new.path().to_owned()
    }

    fn private(path: &Path, mode: u32) {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    fn refusal(folder: &Path) -> String {
        let error = match Image::open(folder) {
            Ok(image) => image.verify().unwrap_err(),
            Err(error) => error,
        };
        format!("{error:#}")
    }

    #[test]
    fn what_was_published_is_read_back_and_nothing_else_is_left() {
        let parent = tempfile::tempdir().unwrap();
        let (one, other) = (publish(parent.path()), publish(parent.path()));
        assert_ne!(one, other);
        for path in [one, other] {
            let image = Image::open(&path).unwrap();
            image.verify().unwrap();
            assert_eq!(image.manifest.contents.len(), 2);
            assert_eq!(image.manifest.bytes(), 9);
        }
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 2);
    }

    #[test]
    fn an_image_that_is_not_finished_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let abandoned = parent.path().join(format!(
            ".reverbs-42-19990101T000000Z@{}",
            rustix::system::uname().nodename().to_string_lossy()
        ));
        std::fs::create_dir(&abandoned).unwrap();
        drop(NewImage::create(parent.path(), 42).unwrap());
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn damage_is_named() {
        type Damage = fn(&Path);
        let cases: [(&str, Damage); 7] = [
            ("pages-1.img was changed", |image| {
                std::fs::write(image.join("criu/pages-1.img"), "pagez").unwrap();
            }),
            ("core-42.img has 5 bytes instead of 4", |image| {
                std::fs::write(image.join("criu/core-42.img"), "cores").unwrap();
            }),
            ("core-42.img is missing", |image| {
                std::fs::remove_file(image.join("criu/core-42.img")).unwrap();
            }),
            ("core-42.img: can be written by others", |image| {
                private(&image.join("criu/core-42.img"), 0o622);
            }),
            ("never finished", |image| {
                std::fs::remove_file(image.join("manifest.json")).unwrap();
            }),
            ("manifest.json was changed", |image| {
                edit(image, "\"here\"", "\"there\"")
            }),
            ("format version 9", |image| {
                edit(image, "\"version\": 2", "\"version\": 9")
            }),
        ];
        let parent = tempfile::tempdir().unwrap();
        for (expected, damage) in cases {
            let image = publish(parent.path());
            damage(&image);
            let refused = refusal(&image);
            assert!(refused.contains(expected), "{expected}: {refused}");
        }
    }

    #[test]
    fn an_image_that_others_can_enter_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let image = publish(parent.path());
        private(&image, 0o750);
        assert!(refusal(&image).contains("can be entered by others"));
    }

    fn edit(image: &Path, from: &str, to: &str) {
        let path = image.join("manifest.json");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        std::fs::write(&path, text.replace(from, to)).unwrap();
    }
}
