//! What holds on any kernel, with RDMA or without, and the numbers of the kernel's headers.

use std::fs;
use std::os::fd::AsRawFd;

use kmod_compat::devices;
use kmod_compat::fds::{self, DescriptorKind, FdError, Process};
use kmod_compat::netlink::{Connection, NetlinkError};
use kmod_compat::sysfs::Sysfs;

/// Shows up as soon as ib_core is loaded.
fn kernel_has_rdma() -> bool {
    fs::exists("/sys/class/infiniband").unwrap()
}

#[test]
fn a_kernel_without_rdma_is_named_as_such() {
    match Connection::open() {
        Err(NetlinkError::NoRdma) => {
            assert!(!kernel_has_rdma());
            let text = NetlinkError::NoRdma.to_string();
            assert!(
                text.contains("no RDMA netlink") && text.contains("ib_core"),
                "{text}"
            );
        }
        Err(other) => panic!("{other:?}"),
        Ok(mut connection) => {
            let mut found = devices::list(&Sysfs::host()).unwrap();
            devices::identify(&mut found, &mut connection).unwrap();
            assert!(
                found.iter().all(|device| device.index.is_some()),
                "{found:?}"
            );
        }
    }
}

#[test]
fn the_hosts_own_devices_can_be_listed() {
    let found = devices::list(&Sysfs::host()).unwrap();
    assert!(kernel_has_rdma() || found.is_empty());
}

#[test]
fn a_char_device_is_known_by_its_number() {
    // /dev/zero plays the device: its numbers lead to an entry of class infiniband_verbs.
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("dev/char")).unwrap();
    let link = root.path().join("dev/char/1:5");
    let zero = fs::File::open("/dev/zero").unwrap();
    let kind_in = |class: &str, name: &str| {
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(format!("../../devices/{class}/{name}"), &link).unwrap();
        let found = fds::rdma_descriptors(&Sysfs::at(root.path()), Process::Own).unwrap();
        let of_zero = found
            .into_iter()
            .find(|found| found.number == zero.as_raw_fd());
        of_zero.map(|found| (found.kind, found.target))
    };
    let target = "/dev/zero".to_owned();
    let verbs = DescriptorKind::Verbs {
        device: "uverbs7".to_owned(),
    };
    assert_eq!(
        kind_in("infiniband_verbs", "uverbs7"),
        Some((verbs, target.clone()))
    );
    let manager = DescriptorKind::ConnectionManager;
    assert_eq!(kind_in("misc", "rdma_cm"), Some((manager, target.clone())));
    let management = DescriptorKind::Other {
        device: "umad0".to_owned(),
    };
    assert_eq!(
        kind_in("infiniband_mad", "umad0"),
        Some((management, target))
    );
    assert_eq!(kind_in("mem", "zero"), None);
    assert_eq!(kind_in("misc", "rdma_cm_or_so"), None);
}

#[test]
fn a_process_without_rdma_holds_none() {
    assert_eq!(
        fds::rdma_descriptors(&Sysfs::host(), Process::Own).unwrap(),
        []
    );
    assert_eq!(fds::rdma_mappings(Process::Own).unwrap(), []);
}

#[test]
fn a_process_that_is_gone_is_named() {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let error = fds::rdma_descriptors(&Sysfs::host(), Process::Id(child.id())).unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("/proc/{}/fd", child.id())),
        "{error}"
    );
}

#[test]
fn duplicates_are_found_by_open_file() {
    let file = fs::File::open("/proc/self/status").unwrap();
    let same = file.try_clone().unwrap();
    let other = fs::File::open("/proc/self/status").unwrap();
    let found = fds::duplicates(file.as_raw_fd()).unwrap();
    assert_eq!(found, [same.as_raw_fd()]);
    assert!(!found.contains(&other.as_raw_fd()));
    drop(same);
    assert!(fds::duplicates(file.as_raw_fd()).unwrap().is_empty());
    let error = fds::duplicates(900_000).unwrap_err();
    assert!(
        matches!(error, FdError::Compare { first: 900_000, .. }),
        "{error:?}"
    );
}
