//! The library as libibverbs loads it: in which libibverbs it registers, and what it says where it does not.
//!
//! Each case runs in a child process (this program again), since a constructor runs once and leaves its mark.

#![expect(
    clippy::print_stdout,
    reason = "the child reports on stdout; skips are said aloud"
)]

use reverbs_provider::release::{LAYOUTS, Layout};
use std::ffi::{CString, c_void};
use std::fmt::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const LIBRARIES: &str = "REVERBS_TEST_LIBIBVERBS";
const NAMESPACE: &str = "REVERBS_TEST_NAMESPACE";

#[test]
fn registers_with_every_supported_release() {
    for layout in &LAYOUTS {
        for release in [layout.first, layout.last] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let library = Fake::of(layout, release).build(folder.path());
            let output = load(&[&library], "base");
            let expected = [
                "registered reverbs".to_owned(),
                "claims driver 15".to_owned(),
                format!(
                    "context of {} bytes at 0 for driver 15",
                    layout.verbs_context_size + 8
                ),
                "operations".to_owned(),
                // There is no fake0 to open below.
                "closing: 0".to_owned(),
                "alloc_context: null".to_owned(),
                "descriptor: closed".to_owned(),
            ];
            assert_eq!(
                said(&output),
                expected,
                "release {release}, stderr: {}",
                stderr(&output)
            );
        }
    }
}

#[test]
fn refuses_releases_outside_the_table() {
    for (release, suffix, minor) in [(35, 34, 14), (66, 66, 18), (66, 65, 18)] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let fake = Fake {
            release,
            suffix,
            file_minor: minor,
            public_minor: minor,
            context_offset: 368,
        };
        let output = load(&[&fake.build(folder.path())], "base");
        assert_eq!(said(&output), Vec::<String>::new());
        assert_refused(
            &output,
            &format!(
                "is rdma-core {release}.0, which is not supported; supported are rdma-core 36 to 65"
            ),
        );
    }
}

#[test]
fn refuses_evidence_that_contradicts_itself() {
    let right = Fake::of(&LAYOUTS[1], 44);
    let wrong = [
        Fake {
            suffix: 57,
            ..right
        },
        Fake {
            public_minor: 15,
            ..right
        },
        Fake {
            file_minor: 15,
            ..right
        },
        Fake {
            release: 59,
            ..right
        },
    ];
    for fake in wrong {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let output = load(&[&fake.build(folder.path())], "base");
        assert_eq!(said(&output), Vec::<String>::new(), "{fake:?}");
        assert_refused(
            &output,
            &format!("claims to be rdma-core {}.0", fake.release),
        );
    }
}

#[test]
fn refuses_two_libraries_and_a_nameless_one() {
    let folders = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
    let [first, second] = [(&folders[0], 44), (&folders[1], 65)].map(|(folder, release)| {
        let layout = LAYOUTS
            .iter()
            .find(|layout| layout.first == release)
            .expect("a first release");
        Fake::of(layout, release).build(folder.path())
    });
    assert_refused(
        &load(&[&first, &second], "base"),
        "two libibverbs are loaded",
    );

    let nameless = folders[0].path().join("libibverbs.so");
    std::fs::rename(
        std::fs::canonicalize(&first).expect("the library"),
        &nameless,
    )
    .expect("renamed");
    assert_refused(
        &load(&[&nameless], "base"),
        "has no rdma-core version in its name",
    );
}

#[test]
fn registers_nothing_outside_the_base_namespace() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let library = Fake::of(&LAYOUTS[1], 44).build(folder.path());
    let output = load(&[&library], "inner");
    assert_eq!(
        (said(&output), stderr(&output)),
        (Vec::new(), String::new())
    );
}

#[test]
fn is_silent_without_libibverbs() {
    let output = load(&[], "base");
    assert_eq!(
        (said(&output), stderr(&output)),
        (Vec::new(), String::new())
    );
}

#[test]
fn knows_the_installed_libibverbs_and_refuses_it_under_a_false_name() {
    let Some(installed) = [
        "/usr/lib/x86_64-linux-gnu/libibverbs.so.1",
        "/usr/lib64/libibverbs.so.1",
    ]
    .iter()
    .find_map(|path| std::fs::canonicalize(path).ok()) else {
        println!("skipped: no libibverbs.so.1 is installed (Debian: libibverbs1)");
        return;
    };
    assert_eq!(
        stderr(&load(&[&installed], "base")),
        "",
        "{}",
        installed.display()
    );

    // The next release by name: some of what is inside cannot be of that release, or that release is unknown.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let copy = folder.path().join("libibverbs.so.1.15.59.0");
    std::fs::copy(&installed, &copy).expect("a copy");
    assert_refused(&load(&[&copy], "base"), "claims to be rdma-core 59.0");
}

/// A stand-in for libibverbs; see fake_libibverbs.c.
#[derive(Debug, Clone, Copy)]
struct Fake {
    release: u16,
    suffix: u16,
    file_minor: u16,
    public_minor: u16,
    context_offset: usize,
}

impl Fake {
    fn of(layout: &Layout, release: u16) -> Self {
        Self {
            release,
            suffix: layout.suffix,
            file_minor: layout.public_minor,
            public_minor: layout.public_minor,
            context_offset: layout.context_offset(),
        }
    }

    /// The path that libibverbs' users load: a symbolic link to the file with the versions in its name.
    fn build(&self, folder: &Path) -> PathBuf {
        let newer = [
            "ibv_alloc_dmah",
            "ibv_dm_export_dmabuf_fd",
            "ibv_alloc_buf",
            "_ibv_query_comp_cntr_caps",
        ];
        let mut versions = String::from(
            "IBVERBS_1.14 { global: ibv_get_device_list; ibv_query_qp_data_in_order; fake_open; local: *; };\n",
        );
        for (minor, symbol) in (15..=self.public_minor).zip(newer) {
            writeln!(
                versions,
                "IBVERBS_1.{minor} {{ global: {symbol}; }} IBVERBS_1.{};",
                minor - 1
            )
            .expect("a string");
        }
        let suffix = self.suffix;
        writeln!(
            versions,
            "IBVERBS_PRIVATE_{suffix} {{ global: _verbs_init_and_alloc_context; verbs_set_ops; verbs_uninit_context; \
             verbs_register_driver_{suffix}; }};"
        )
        .expect("a string");
        let script = folder.join("versions");
        std::fs::write(&script, versions).expect("the version script");
        let file = folder.join(format!(
            "libibverbs.so.1.{}.{}.0",
            self.file_minor, self.release
        ));
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-Wl,-soname,libibverbs.so.1"])
            .arg(format!("-DSUFFIX={suffix}"))
            .arg(format!("-DCONTEXT_OFFSET={}", self.context_offset))
            .arg(format!("-Wl,--version-script={}", script.display()))
            .arg("-o")
            .arg(&file)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_libibverbs.c"))
            .status()
            .expect("a C compiler, cc");
        assert!(status.success(), "cc failed");
        let link = folder.join("libibverbs.so.1");
        symlink(&file, &link).expect("a link");
        link
    }
}

fn said(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    // Around it is what the test harness of the child says.
    text.lines()
        .skip_while(|line| *line != "LOADED")
        .skip(1)
        .take_while(|line| *line != "DONE")
        .map(str::to_owned)
        .collect()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn assert_refused(output: &Output, reason: &str) {
    let said = stderr(output);
    assert!(
        said.starts_with("reverbs: not active in this process: "),
        "{said}"
    );
    assert!(said.contains(reason), "{reason:?} is not in {said:?}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// Loads these libraries and then ours in a child, and opens the fake device of the first.
fn load(libraries: &[&PathBuf], namespace: &str) -> Output {
    let list = std::env::join_paths(libraries).expect("paths without colons");
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(LIBRARIES, list)
        .env(NAMESPACE, namespace)
        .output()
        .expect("the child");
    assert!(output.status.success(), "{output:?}");
    output
}

#[test]
#[ignore = "runs as a child of the others"]
fn child() {
    let libraries = std::env::var_os(LIBRARIES).expect("run by another test");
    let inner = std::env::var(NAMESPACE).expect("run by another test") == "inner";
    // Cargo builds every crate type of the library into the folder of the tests.
    let ours = std::env::current_exe()
        .expect("this program")
        .with_file_name("libreverbs_provider.so");
    println!("LOADED");
    let mut namespace = libc::LM_ID_BASE;
    let mut first = std::ptr::null_mut::<c_void>();
    for library in std::env::split_paths(&libraries).filter(|path| !path.as_os_str().is_empty()) {
        let handle = open(&library, if inner { libc::LM_ID_NEWLM } else { namespace });
        if first.is_null() {
            first = handle;
        }
    }
    if inner {
        // SAFETY: first is a handle of dlmopen, and dlinfo writes a namespace.
        unsafe { libc::dlinfo(first, libc::RTLD_DI_LMID, (&raw mut namespace).cast()) };
    }
    open(&ours, namespace);
    // SAFETY: first is null, which is the global scope, or a handle; the name is zero-terminated.
    let fake_open = unsafe { libc::dlsym(first, c"fake_open".as_ptr()) };
    if !fake_open.is_null() {
        // SAFETY: the only fake_open there is has this type.
        unsafe { std::mem::transmute::<*mut c_void, extern "C" fn()>(fake_open)() };
    }
    println!("DONE");
}

fn open(library: &Path, namespace: libc::Lmid_t) -> *mut c_void {
    let path = CString::new(library.as_os_str().as_encoded_bytes()).expect("no zero byte");
    // SAFETY: the path is zero-terminated; the constructors are ours or libibverbs'.
    let handle =
        unsafe { libc::dlmopen(namespace, path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "{} does not load", library.display());
    handle
}
