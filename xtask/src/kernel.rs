//! The stock Debian kernel, unpacked (not installed) for the test machine.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{command, paths, setup};

/// Names the kernel that the machine boots; the `-cloud-` flavour has no Soft-RoCE.
const META_PACKAGE: &str = "linux-image-amd64";

/// Parts of the package that no test machine has a device for: three quarters of its size.
const LEFT_OUT: &[&str] = &[
    "drivers/gpu",
    "drivers/media",
    "drivers/scsi",
    "drivers/staging",
    "drivers/net/wireless",
    "drivers/net/ethernet",
    "drivers/iio",
    "drivers/hwmon",
    "drivers/input",
    "sound",
];

/// An unpacked kernel.
#[derive(Debug)]
pub struct Kernel {
    folder: PathBuf,
    version: String,
}

impl Kernel {
    /// Takes the kernel unpacked earlier, or fetches the one Debian names now.
    ///
    /// # Errors
    /// When the package cannot be found, fetched or unpacked.
    pub fn get() -> Result<Kernel> {
        let folder = paths::machine()?.join("kernel");
        if !folder.exists() {
            fetch(&folder).context("cannot get the stock kernel for the test machine")?;
        }
        let modules = folder.join("lib/modules");
        let version = fs::read_dir(&modules)
            .ok()
            .and_then(|mut entries| entries.next()?.ok()?.file_name().into_string().ok())
            .with_context(|| format!("{} holds no kernel: remove the folder", folder.display()))?;
        Ok(Kernel { folder, version })
    }

    /// The uncompressed image.
    pub fn image(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    /// The folder that belongs at `/lib/modules`.
    pub fn all_modules(&self) -> PathBuf {
        self.folder.join("lib/modules")
    }

    /// The folder with this version's `modules.dep`.
    pub fn modules(&self) -> PathBuf {
        self.all_modules().join(&self.version)
    }
}

/// Unpacks beside the final place and renames, so that a half kernel is never taken for one.
fn fetch(folder: &Path) -> Result<()> {
    setup::ensure_lists()?;
    let scratch = tempfile::tempdir_in(paths::machine()?)?;
    let package = download(scratch.path()).or_else(|_| {
        // A list that names a version the archive no longer has.
        setup::update_lists()?;
        download(scratch.path())
    })?;
    eprintln!("xtask: unpacking {}", package.display());
    let unpacked = scratch.path().join("kernel");
    fs::create_dir(&unpacked)?;
    unpack(&package, &unpacked)?;
    let version = only_entry(&unpacked.join("lib/modules"))?;
    let version = version.file_name().context("no version")?;
    command::run(Command::new("depmod").arg("-b").arg(&unpacked).arg(version))?;
    let compressed = only_entry(&unpacked.join("boot"))?;
    decompress(&compressed, &unpacked.join("vmlinux"))?;
    fs::remove_dir_all(unpacked.join("boot"))?;
    match fs::rename(&unpacked, folder) {
        Err(_) if folder.exists() => Ok(()), // somebody else was faster
        done => done.with_context(|| format!("cannot rename to {}", folder.display())),
    }
}

fn download(scratch: &Path) -> Result<PathBuf> {
    let listed = command::output(Command::new("apt-cache").args(["depends", META_PACKAGE]))?;
    let package = listed
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{META_PACKAGE} depends on no kernel"))?;
    eprintln!("xtask: fetching {package}");
    command::output(
        Command::new("apt-get")
            .args(["-q", "download", package])
            .current_dir(scratch),
    )?;
    only_entry(scratch)
}

fn unpack(package: &Path, unpacked: &Path) -> Result<()> {
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start `dpkg-deb`")?;
    let stream = archive.stdout.take().context("dpkg-deb has no stdout")?;
    let left_out = LEFT_OUT
        .iter()
        .map(|folder| format!("--exclude=./lib/modules/*/kernel/{folder}"));
    let extracted = command::run(
        Command::new("tar")
            .args(["-x", "--no-same-owner", "--wildcards", "-C"])
            .arg(unpacked)
            .args(left_out)
            .args(["./boot/vmlinuz-*", "./lib/modules"])
            .stdin(stream),
    );
    let status = archive.wait()?;
    extracted?;
    ensure!(status.success(), "`dpkg-deb` failed: {status}");
    Ok(())
}

/// Takes the ELF image out of a bzImage: under emulation the kernel would need seven seconds
/// to decompress itself. The offsets are those of the x86 boot protocol (setup_sects,
/// payload_offset, payload_length).
fn decompress(image: &Path, elf: &Path) -> Result<()> {
    let bytes = fs::read(image)?;
    let word = |at: usize| -> Result<usize> {
        let field = bytes.get(at..at + 4).context("the kernel image is short")?;
        Ok(u32::from_le_bytes(field.try_into()?) as usize)
    };
    let setup_sectors = (word(0x1f1)? & 0xff) + 1;
    let start = setup_sectors * 512 + word(0x248)?;
    let end = start + word(0x24c)?;
    // The last four bytes are the uncompressed size, after the end of the stream.
    let payload = bytes
        .get(start..end.saturating_sub(4))
        .context("the kernel image is short")?;
    if !payload.starts_with(b"\xfd7zXZ\0") {
        bail!("{} is not compressed with xz", image.display());
    }
    let stream = elf.with_extension("xz");
    fs::write(&stream, payload)?;
    command::run(
        // busybox's own cannot undo the x86 filter
        Command::new("xz")
            .args(["-d", "-c"])
            .arg(&stream)
            .stdout(File::create(elf)?),
    )?;
    fs::remove_file(&stream)?;
    Ok(())
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(folder)?;
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry?.path()),
        _ => bail!("{} does not hold exactly one entry", folder.display()),
    }
}
