//! A manifest whose checksum is right, with anything in it: it is refused, or all that it lists lies in the image.
#![no_main]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use reverbs::image::{CarriedKind, Image};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir()
        .expect("a private folder");
    let stored = folder.path().join("criu");
    fs::create_dir(&stored).expect("a folder");
    fs::write(stored.join("pages-1.img"), "pages").expect("a file");
    folder
});

fn lies_inside(path: &Path) -> bool {
    path.components()
        .all(|part| matches!(part, Component::Normal(_)))
}

fuzz_target!(|text: &[u8]| {
    let folder = FOLDER.path();
    fs::write(folder.join("manifest.json"), text).expect("manifest.json");
    let sum = format!("{:08x} {}\n", crc32fast::hash(text), text.len());
    fs::write(folder.join("manifest.sum"), sum).expect("manifest.sum");
    let Ok(image) = Image::open(folder) else {
        return;
    };
    for file in &image.manifest.contents {
        assert!(lies_inside(&file.path), "{}", file.path.display());
    }
    for item in &image.manifest.carried {
        if let CarriedKind::File { stored, .. } = &item.kind {
            assert!(lies_inside(Path::new(stored)), "{stored}");
        }
    }
    if image.verify().is_ok() {
        let bytes = image.manifest.bytes();
        assert_eq!(bytes, 5 * image.manifest.contents.len() as u64);
    }
    let ids = image.manifest.ids();
    assert!(ids.is_sorted_by(|one, next| one < next));
    // What is written back is what was read.
    let again = serde_json::to_vec(&image.manifest).expect("a manifest");
    let again = serde_json::from_slice(&again).expect("a manifest");
    assert_eq!(image.manifest, again);
});
