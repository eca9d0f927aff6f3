//! The numbers of a job as they are left in the runtime folder, with anything in them.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use reverbs::control::job_numbers;
use reverbs::translate::Directory;
use tempfile::TempDir;

/// The folder, and the file's text before and after the numbers of this process.
static LEFT: LazyLock<(TempDir, std::path::PathBuf, String)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let pid = std::process::id().cast_signed();
    job_numbers::publish(folder.path(), pid, &[]).expect("the file");
    let file = folder.path().join(format!("job-{pid}.numbers"));
    let text = fs::read_to_string(&file).expect("the file");
    (folder, file, text)
});

fuzz_target!(|numbers: &[u8]| {
    let (folder, file, text) = &*LEFT;
    let (before, after) = text.split_once("[]").expect("an empty list");
    let text = [before.as_bytes(), numbers, after.as_bytes()].concat();
    fs::write(file, text).expect("the file");
    let pid = std::process::id().cast_signed();
    if let Some(found) = job_numbers::find(folder.path(), pid) {
        let directory = Directory::new(&found);
        for process in &found {
            for context in &process.contexts {
                for port in &context.ports {
                    for (old, _) in &port.gids {
                        assert!(directory.gid(*old).is_some());
                    }
                }
            }
        }
    }
});
