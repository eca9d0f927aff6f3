//! The archive that the kernel unpacks at boot: a static busybox, the modules in loading
//! order, two scripts, and what this one run is to do.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kernel::Kernel;

/// Loaded at boot; everything else comes through modprobe when the kernel asks for it.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "dummy",
    // rdma_rxe looks these up by name when a device is made: nothing depends on them
    "crc32_generic",
    "rdma_rxe",
    "ib_uverbs",
    "rdma_ucm",
    // criu: sockets of every kind, and what it locks connections with
    "unix_diag",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "af_packet_diag",
    "netlink_diag",
    "tun",
    "veth",
    "crc32c_generic",
    "nf_tables",
    "nft_compat",
    "xt_mark",
    "xt_tcpudp",
    "xt_conntrack",
    "ip_tables",
    "iptable_filter",
];

const FIRST_STAGE: &str = include_str!("guest/init.sh");
const SECOND_STAGE: &str = include_str!("guest/main.sh");

/// Writes the archive. `settings` and `job` are shell text: the variables that the scripts
/// read, and the program to run.
///
/// # Errors
/// When a file of the kernel or busybox cannot be read, or the archive not be written.
pub fn write(out: impl Write, kernel: &Kernel, settings: &str, job: &str) -> Result<()> {
    let mut archive = Archive { out, entries: 0 };
    for folder in [
        "bin", "dev", "lower", "modules", "plain", "proc", "reverbs", "root", "sys", "upper",
    ] {
        archive.add(folder, FOLDER, &[])?;
    }
    let busybox = fs::read("/bin/busybox").context("/bin/busybox (busybox-static) is missing")?;
    archive.add("bin/busybox", PROGRAM, &busybox)?;
    archive.add("init", PROGRAM, FIRST_STAGE.as_bytes())?;
    archive.add("reverbs/main", PROGRAM, SECOND_STAGE.as_bytes())?;
    archive.add("reverbs/settings", PROGRAM, settings.as_bytes())?;
    archive.add("reverbs/job", PROGRAM, job.as_bytes())?;
    for (position, module) in loading_order(&kernel.modules())?.iter().enumerate() {
        let content =
            fs::read(module).with_context(|| format!("cannot read {}", module.display()))?;
        let name = module.file_stem().unwrap_or_default().to_string_lossy();
        archive.add(
            &format!("modules/{position:02}-{name}.ko"),
            PROGRAM,
            &content,
        )?;
    }
    archive.finish()?;
    Ok(())
}

/// The wanted modules, each after what it depends on, as `modules.dep` tells it.
fn loading_order(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("modules.dep");
    let index =
        fs::read_to_string(&index).with_context(|| format!("cannot read {}", index.display()))?;
    let lines: HashMap<String, (&str, &str)> = index
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| (module_name(path), (path, needs)))
        .collect();
    let mut seen = HashSet::new();
    let mut order = Vec::new();
    for module in MODULES {
        let (path, needs) = lines
            .get(*module)
            .with_context(|| format!("the kernel has no module {module}"))?;
        // The list is complete, the deepest dependency last.
        for path in needs.split_whitespace().rev().chain([*path]) {
            if seen.insert(path) {
                order.push(folder.join(path));
            }
        }
    }
    Ok(order)
}

/// The name the kernel uses: file names have dashes or underscores as their authors liked.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// A cpio archive of the "newc" kind (initramfs buffer format of the kernel's documentation).
struct Archive<W> {
    out: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let links = 1;
        write!(self.out, "070701")?;
        for field in [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ] {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(6 + 13 * 8 + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.add("TRAILER!!!", 0, &[])?;
        self.out.flush()
    }

    /// Fills up to a multiple of four after `written` bytes.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.out
            .write_all(&[0; 4][..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names_are_the_kernels() {
        assert_eq!(module_name("kernel/crypto/crc32-pclmul.ko"), "crc32_pclmul");
        assert_eq!(module_name("kernel/fs/9p/9p.ko.xz"), "9p");
    }

    #[test]
    fn dependencies_come_first_and_once() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut index = String::from("kernel/a.ko: kernel/c.ko kernel/b.ko\nkernel/b.ko:\n");
        for module in MODULES {
            index += &format!("kernel/{module}.ko: kernel/a.ko kernel/c.ko kernel/b.ko\n");
        }
        fs::write(folder.path().join("modules.dep"), index)?;
        let order = loading_order(folder.path())?;
        let names: Vec<_> = order
            .iter()
            .take(4)
            .map(|path| module_name(&path.to_string_lossy()))
            .collect();
        assert_eq!(names, ["b", "c", "a", MODULES[0]]);
        assert_eq!(order.len(), 3 + MODULES.len());
        Ok(())
    }

    #[test]
    fn cpio_reads_the_archive() -> Result<()> {
        let mut archive = Archive {
            out: Vec::new(),
            entries: 0,
        };
        archive.add("folder", FOLDER, &[])?;
        archive.add("folder/abc", PROGRAM, b"hello")?;
        archive.finish()?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("archive");
        fs::write(&file, &archive.out)?;
        let shown = std::process::Command::new("busybox")
            .args(["cpio", "-i", "--to-stdout", "folder/abc"])
            .stdin(fs::File::open(&file)?)
            .output()?;
        assert_eq!(shown.stdout, b"hello");
        Ok(())
    }
}
