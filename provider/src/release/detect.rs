//! Finding out, at run time, which rdma-core release the process has loaded.
//!
//! Three witnesses, none of which is enough alone: the name of the file that is mapped (`libibverbs.so.1.14.44.0` ends in
//! the package version), the number in `verbs_register_driver_NN`, and the newest public symbol version. They have to agree.

use super::{LAYOUTS, Layout, layout_of};
use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A libibverbs that is in the table.
#[derive(Debug)]
pub struct Detected {
    /// The package version, as the file name has it: `44.0`.
    pub version: String,
    /// How its private ABI is laid out.
    pub layout: &'static Layout,
    library: LoadedLibrary,
}

impl Detected {
    /// The address of a function that libibverbs exports to providers under `IBVERBS_PRIVATE_NN`.
    ///
    /// # Errors
    ///
    /// [`Refusal::MissingSymbol`], if this libibverbs does not have it.
    pub fn private_function(&self, name: &'static CStr) -> Result<*const c_void, Refusal> {
        let version = CString::new(format!("IBVERBS_PRIVATE_{}", self.layout.suffix))
            .expect("digits hold no zero byte");
        self.library
            .versioned_symbol(name, &version)
            .ok_or_else(|| Refusal::MissingSymbol {
                file: self.library.file.clone(),
                symbol: name.to_string_lossy().into_owned(),
            })
    }

    /// A function of libibverbs' public interface, as of version 1.1.
    pub fn public_function(&self, name: &'static CStr) -> Option<*const c_void> {
        self.library.versioned_symbol(name, c"IBVERBS_1.1")
    }

    /// The address of `verbs_register_driver_NN`.
    ///
    /// # Errors
    ///
    /// [`Refusal::MissingSymbol`], if this libibverbs does not have it.
    pub fn register_function(&self) -> Result<*const c_void, Refusal> {
        self.library
            .register_function(self.layout.suffix)
            .ok_or_else(|| Refusal::MissingSymbol {
                file: self.library.file.clone(),
                symbol: format!("verbs_register_driver_{}", self.layout.suffix),
            })
    }
}

/// Why a libibverbs is not driven.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// More than one libibverbs in the namespace: which one loaded us cannot be told.
    #[error("two libibverbs are loaded, {first} and {second}; keep one of them out of the process", first = .first.display(), second = .second.display())]
    TwoLibraries {
        /// One of them.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// The dynamic loader's answers about libibverbs could not be used.
    #[error("cannot examine {}: {reason}", .file.display())]
    Unreadable {
        /// As the loader names it.
        file: PathBuf,
        /// What failed.
        reason: &'static str,
    },
    /// The file name does not end in a version.
    #[error("{} has no rdma-core version in its name (expected libibverbs.so.1.N.RELEASE.MINOR); {}", .file.display(), Supported)]
    UnversionedFile {
        /// The mapped file.
        file: PathBuf,
    },
    /// A release that is not in the table.
    #[error("{} is rdma-core {version}, which is not supported; {}", .file.display(), Supported)]
    UnknownRelease {
        /// The mapped file.
        file: PathBuf,
        /// The package version in its name.
        version: String,
    },
    /// The file name says one release and its contents another.
    #[error(
        "{} claims to be rdma-core {version} (driver interface {expected_suffix}, IBVERBS_1.{expected_minor}), but has driver \
         interface {found_suffix} and {found_minor}; {}", .file.display(), Supported,
        found_suffix = Found(.found_suffix.as_ref(), ""), found_minor = Found(.found_minor.as_ref(), "IBVERBS_1.")
    )]
    Contradiction {
        /// The mapped file.
        file: PathBuf,
        /// The package version in its name.
        version: String,
        /// What that release has after `verbs_register_driver_`.
        expected_suffix: u16,
        /// What that release has after `IBVERBS_1.`.
        expected_minor: u16,
        /// What was found, if anything.
        found_suffix: Option<u16>,
        /// What was found, if anything.
        found_minor: Option<u16>,
    },
    /// A function that every known release has is not there.
    #[error("{} does not export {symbol}; {}", .file.display(), Supported)]
    MissingSymbol {
        /// The mapped file.
        file: PathBuf,
        /// The function.
        symbol: String,
    },
}

/// Finds the libibverbs of the caller's link namespace and identifies it.
///
/// `Ok(None)`: there is none, so nothing can want a driver (this library was preloaded into some other program).
///
/// # Errors
///
/// [`Refusal`], if it is not exactly one libibverbs of exactly one known release.
pub fn detect() -> Result<Option<Detected>, Refusal> {
    let mut candidates = loaded_libraries();
    let Some(first) = candidates.pop() else {
        return Ok(None);
    };
    if let Some(second) = candidates.pop() {
        return Err(Refusal::TwoLibraries { first, second });
    }
    let path =
        CString::new(first.as_os_str().as_encoded_bytes()).map_err(|_| Refusal::Unreadable {
            file: first.clone(),
            reason: "its path holds a zero byte",
        })?;
    // SAFETY: dlopen with RTLD_NOLOAD maps nothing and runs no constructor. The reference it takes is never given back:
    // the functions found here are called for the life of the process.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if handle.is_null() {
        return Err(Refusal::Unreadable {
            file: first,
            reason: "the dynamic loader does not find it again",
        });
    }
    // SAFETY: handle is a valid handle of dlopen and stays open.
    unsafe { detect_in(handle) }.map(Some)
}

/// Identifies the libibverbs behind a handle.
///
/// # Errors
///
/// As [`detect`].
///
/// # Safety
///
/// `handle` must come from `dlopen` and stay open for the life of the result.
pub unsafe fn detect_in(handle: *mut c_void) -> Result<Detected, Refusal> {
    // SAFETY: the caller's promise about handle.
    let library = unsafe { LoadedLibrary::new(handle) }?;
    let Some((file_minor, version)) = version_in(&library.file) else {
        return Err(Refusal::UnversionedFile { file: library.file });
    };
    let release = version
        .split('.')
        .next()
        .and_then(|major| major.parse().ok());
    let Some(layout) = release.and_then(layout_of) else {
        return Err(Refusal::UnknownRelease {
            file: library.file,
            version,
        });
    };
    let found_suffix = library.driver_interface();
    let found_minor = library.public_minor();
    if found_suffix != Some(layout.suffix)
        || found_minor != Some(layout.public_minor)
        || file_minor != layout.public_minor
    {
        return Err(Refusal::Contradiction {
            file: library.file,
            version,
            expected_suffix: layout.suffix,
            expected_minor: layout.public_minor,
            found_suffix,
            found_minor,
        });
    }
    Ok(Detected {
        version,
        layout,
        library,
    })
}

/// `libibverbs.so.1.14.44.0` is `(14, "44.0")`. Wheels put a hash before `.so`, which does not matter here.
fn version_in(file: &Path) -> Option<(u16, String)> {
    let name = file.file_name()?.to_str()?;
    let (_, version) = name.split_once(".so.1.")?;
    let (public_minor, package) = version.split_once('.')?;
    package
        .split('.')
        .all(|part| part.parse::<u16>().is_ok())
        .then_some(())?;
    Some((public_minor.parse().ok()?, package.to_owned()))
}

/// The files of the caller's link namespace whose name says libibverbs.
fn loaded_libraries() -> Vec<PathBuf> {
    unsafe extern "C" fn collect(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        found: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader hands in a valid info for the duration of the call, and found is the vector below.
        let (info, found) = unsafe { (&*info, &mut *found.cast::<Vec<PathBuf>>()) };
        if !info.dlpi_name.is_null() {
            // SAFETY: not null, and the loader's names are zero-terminated.
            let name = unsafe { CStr::from_ptr(info.dlpi_name) };
            let path = Path::new(std::str::from_utf8(name.to_bytes()).unwrap_or_default());
            let file = path
                .file_name()
                .and_then(|file| file.to_str())
                .unwrap_or_default();
            if file.starts_with("libibverbs") && file.contains(".so") {
                found.push(path.to_owned());
            }
        }
        0
    }
    let mut found: Vec<PathBuf> = Vec::new();
    // SAFETY: collect keeps to the callback's contract and does not unwind: it allocates and compares, nothing else.
    unsafe { libc::dl_iterate_phdr(Some(collect), (&raw mut found).cast()) };
    found
}

/// One public symbol of each version from the oldest supported on: whether it is there tells the version.
const PUBLIC_SYMBOLS: [(u16, &CStr, &CStr); 5] = [
    (14, c"ibv_query_qp_data_in_order", c"IBVERBS_1.14"),
    (15, c"ibv_alloc_dmah", c"IBVERBS_1.15"),
    (16, c"ibv_dm_export_dmabuf_fd", c"IBVERBS_1.16"),
    (17, c"ibv_alloc_buf", c"IBVERBS_1.17"),
    (18, c"_ibv_query_comp_cntr_caps", c"IBVERBS_1.18"),
];

/// A symbol that every libibverbs has, to find out where the library is mapped.
const ANCHOR: &CStr = c"ibv_get_device_list";

/// A libibverbs in this process.
#[derive(Debug)]
struct LoadedLibrary {
    handle: *mut c_void,
    /// Where it is mapped.
    base: *const c_void,
    /// What is mapped: symbolic links resolved, and right even if the link has since been moved by an upgrade.
    file: PathBuf,
}

// SAFETY: handle and base are addresses that the loader keeps valid for the life of the process; dlsym is thread-safe.
unsafe impl Send for LoadedLibrary {}
// SAFETY: as above; nothing here is ever written.
unsafe impl Sync for LoadedLibrary {}

impl LoadedLibrary {
    /// # Safety
    ///
    /// `handle` must come from `dlopen` and stay open for the life of the value.
    unsafe fn new(handle: *mut c_void) -> Result<Self, Refusal> {
        let unreadable = |reason| Refusal::Unreadable {
            file: PathBuf::from("libibverbs.so.1"),
            reason,
        };
        // SAFETY: handle is valid (the caller's promise) and the name is zero-terminated.
        let anchor = unsafe { libc::dlsym(handle, ANCHOR.as_ptr()) };
        if anchor.is_null() {
            return Err(unreadable("it does not export ibv_get_device_list"));
        }
        let base = base_of(anchor)
            .ok_or_else(|| unreadable("the dynamic loader does not know its address"))?;
        let file = mapped_file(anchor as usize)
            .ok_or_else(|| unreadable("/proc/self/maps does not name its file"))?;
        Ok(Self { handle, base, file })
    }

    fn versioned_symbol(&self, name: &CStr, version: &CStr) -> Option<*const c_void> {
        // SAFETY: the handle stays open and both names are zero-terminated.
        let address = unsafe { libc::dlvsym(self.handle, name.as_ptr(), version.as_ptr()) };
        self.own(address)
    }

    fn register_function(&self, suffix: u16) -> Option<*const c_void> {
        let name = CString::new(format!("verbs_register_driver_{suffix}"))
            .expect("digits hold no zero byte");
        // SAFETY: the handle stays open and the name is zero-terminated.
        let address = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        self.own(address)
    }

    /// Not null, and of this library rather than of one that it depends on.
    fn own(&self, address: *mut c_void) -> Option<*const c_void> {
        (!address.is_null() && base_of(address) == Some(self.base)).then_some(address.cast_const())
    }

    /// NN of `verbs_register_driver_NN`. Numbers beyond the table are tried so that a refusal can name them.
    fn driver_interface(&self) -> Option<u16> {
        (17..200).find(|&suffix| self.register_function(suffix).is_some())
    }

    /// N of the newest `IBVERBS_1.N` that is known and there.
    fn public_minor(&self) -> Option<u16> {
        let present = |&&(_, symbol, version): &&(u16, &CStr, &CStr)| {
            self.versioned_symbol(symbol, version).is_some()
        };
        PUBLIC_SYMBOLS
            .iter()
            .rev()
            .find(present)
            .map(|&(minor, ..)| minor)
    }
}

/// Where the object that holds an address is mapped.
fn base_of(address: *const c_void) -> Option<*const c_void> {
    // SAFETY: all-zero is a valid Dl_info.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: dladdr only looks the address up, and info is ours to write.
    let found = unsafe { libc::dladdr(address, &raw mut info) };
    (found != 0).then_some(info.dli_fbase.cast_const())
}

/// The file that is mapped at an address, as the kernel names it.
fn mapped_file(address: usize) -> Option<PathBuf> {
    std::fs::read_to_string("/proc/self/maps")
        .ok()?
        .lines()
        .find_map(|line| file_if_mapped_at(line, address))
}

/// A line of /proc/self/maps is `START-END PERMISSIONS OFFSET DEVICE INODE PATH`.
fn file_if_mapped_at(line: &str, address: usize) -> Option<PathBuf> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
    let path = &line[line.find('/')?..];
    range
        .contains(&address)
        .then(|| PathBuf::from(path.strip_suffix(" (deleted)").unwrap_or(path)))
}

/// "supported: ...", for messages.
struct Supported;

impl fmt::Display for Supported {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (LAYOUTS[0].first, LAYOUTS[LAYOUTS.len() - 1].last);
        write!(formatter, "supported are rdma-core {first} to {last}")
    }
}

/// What was found, or that nothing known was.
struct Found<'a>(Option<&'a u16>, &'static str);

impl fmt::Display for Found<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => write!(formatter, "{}{number}", self.1),
            None => formatter.write_str("none that is known"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_file_names() {
        let version = |name: &str| version_in(Path::new(name));
        assert_eq!(
            version("/lib/x86_64-linux-gnu/libibverbs.so.1.14.44.0"),
            Some((14, "44.0".to_owned()))
        );
        assert_eq!(
            version("libibverbs-4f0e2a.so.1.18.65.0"),
            Some((18, "65.0".to_owned()))
        );
        assert_eq!(version("/lib/libibverbs.so.1"), None);
        assert_eq!(version("/lib/libibverbs.so.1.14"), None);
        assert_eq!(version("/lib/libibverbs.so.1.14.44.0-local"), None);
    }

    #[test]
    fn lines_of_maps_are_read() {
        let line = "7f00aa000000-7f00aa002000 r-xp 00001000 08:01 1234    /opt/a b/libibverbs.so.1.14.44.0 (deleted)";
        assert_eq!(
            file_if_mapped_at(line, 0x7f00_aa00_1fff),
            Some(PathBuf::from("/opt/a b/libibverbs.so.1.14.44.0"))
        );
        assert_eq!(file_if_mapped_at(line, 0x7f00_aa00_2000), None);
        assert_eq!(
            file_if_mapped_at(
                "7f00aa000000-7f00aa002000 rw-p 00000000 00:00 0",
                0x7f00_aa00_0000
            ),
            None
        );
    }

    #[test]
    fn refusals_name_what_was_found_and_what_is_supported() {
        let refusal = Refusal::Contradiction {
            file: PathBuf::from("/x/libibverbs.so.1.14.57.0"),
            version: "57.0".to_owned(),
            expected_suffix: 57,
            expected_minor: 14,
            found_suffix: Some(34),
            found_minor: None,
        };
        assert_eq!(
            refusal.to_string(),
            "/x/libibverbs.so.1.14.57.0 claims to be rdma-core 57.0 (driver interface 57, IBVERBS_1.14), but has driver \
             interface 34 and none that is known; supported are rdma-core 36 to 65"
        );
    }
}
