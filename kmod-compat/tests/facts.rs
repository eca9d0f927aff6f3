//! Devices and ports read from a made-up sysfs, and the tree written from them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use kmod_compat::devices::{self, DriverId, NodeType, UverbsDevice};
use kmod_compat::ports::{self, DeviceFacts, GidType, LinkLayer, PortState};
use kmod_compat::sysfs::{Sysfs, SysfsError};
use kmod_compat::sysfs_tree::{self, TreeError};

const EMPTY_GID: &str = "0000:0000:0000:0000:0000:0000:0000:0000";
const LINK_LOCAL_GID: &str = "fe80:0000:0000:0000:4028:75ff:fe1a:0c2b";
const IPV4_GID: &str = "0000:0000:0000:0000:0000:ffff:0a4d:0001";
const GID_TABLE_LENGTH: usize = 8;

fn put(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("{text}\n")).unwrap();
}

/// A sysfs with one device as Soft-RoCE shows it.
fn fake_sysfs(root: &Path, name: &str, uverbs: &str, minor: u32) {
    let device = format!("class/infiniband/{name}");
    put(root, &format!("{device}/node_type"), "1: CA");
    put(root, &format!("{device}/node_guid"), "4028:75ff:fe1a:0c2b");
    put(
        root,
        &format!("{device}/sys_image_guid"),
        "4028:75ff:fe1a:0c2b",
    );
    put(root, &format!("{device}/node_desc"), "a node");
    put(root, &format!("{device}/fw_ver"), "");
    let port = format!("{device}/ports/1");
    for (file, text) in [
        ("state", "4: ACTIVE"),
        ("phys_state", "5: LinkUp"),
        ("link_layer", "Ethernet"),
        ("lid", "0x0"),
        ("lid_mask_count", "0"),
        ("sm_lid", "0x0"),
        ("sm_sl", "0"),
        ("cap_mask", "0x00010000"),
        ("rate", "2.5 Gb/sec (1X SDR)"),
        ("pkeys/0", "0xffff"),
    ] {
        put(root, &format!("{port}/{file}"), text);
    }
    for index in 0..GID_TABLE_LENGTH {
        let gid = [LINK_LOCAL_GID, IPV4_GID]
            .get(index)
            .copied()
            .unwrap_or(EMPTY_GID);
        put(root, &format!("{port}/gids/{index}"), gid);
        // A file that is absent stands for the kernel's EINVAL.
        if index < 2 {
            put(root, &format!("{port}/gid_attrs/types/{index}"), "RoCE v2");
            put(root, &format!("{port}/gid_attrs/ndevs/{index}"), "d0");
        }
    }
    put(root, "class/infiniband_verbs/abi_version", "6");
    put(
        root,
        &format!("class/infiniband_verbs/{uverbs}/ibdev"),
        name,
    );
    put(
        root,
        &format!("class/infiniband_verbs/{uverbs}/dev"),
        &format!("231:{minor}"),
    );
    put(
        root,
        &format!("class/infiniband_verbs/{uverbs}/abi_version"),
        "1",
    );
}

fn facts() -> DeviceFacts {
    let root = tempfile::tempdir().unwrap();
    fake_sysfs(root.path(), "rxe0", "uverbs0", 192);
    ports::read_device(&Sysfs::at(root.path()), "rxe0").unwrap()
}

/// A private folder to write trees in, inside a temporary one.
fn tree_folder() -> (tempfile::TempDir, std::path::PathBuf) {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("tree");
    (outer, folder)
}

#[test]
fn devices_are_listed_with_their_char_devices() {
    let root = tempfile::tempdir().unwrap();
    fake_sysfs(root.path(), "rxe1", "uverbs0", 192);
    fake_sysfs(root.path(), "rxe0", "uverbs1", 193);
    let devices = devices::list(&Sysfs::at(root.path())).unwrap();
    let names: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["rxe0", "rxe1"]);
    assert_eq!(devices[0].node_type, NodeType::CHANNEL_ADAPTER);
    assert_eq!(devices[0].ports, [1]);
    assert_eq!(
        devices[0].uverbs,
        Some(UverbsDevice {
            name: "uverbs1".to_owned(),
            major: 231,
            minor: 193,
            abi_version: 1
        })
    );
    assert_eq!(devices[0].driver, None);
}

#[test]
fn a_host_without_rdma_has_no_devices() {
    let root = tempfile::tempdir().unwrap();
    assert_eq!(devices::list(&Sysfs::at(root.path())).unwrap(), []);
}

#[test]
fn a_device_without_uverbs_is_listed() {
    let root = tempfile::tempdir().unwrap();
    fake_sysfs(root.path(), "rxe0", "uverbs0", 192);
    fs::remove_dir_all(root.path().join("class/infiniband_verbs")).unwrap();
    assert_eq!(
        devices::list(&Sysfs::at(root.path())).unwrap()[0].uverbs,
        None
    );
}

#[test]
fn driver_names() {
    assert_eq!(DriverId(1).to_string(), "mlx5");
    assert_eq!(DriverId(14).to_string(), "rxe");
    assert_eq!(DriverId(18).to_string(), "siw");
    assert_eq!(DriverId(999).to_string(), "driver 999");
}

#[test]
fn port_facts_are_complete() {
    let facts = facts();
    assert_eq!(facts.name, "rxe0");
    assert_eq!(facts.firmware_version, None);
    let port = &facts.ports[0];
    assert_eq!(
        (port.number, port.state, port.lid),
        (1, PortState::ACTIVE, 0)
    );
    assert_eq!(port.link_layer, LinkLayer::Ethernet);
    assert_eq!(port.capability_mask, 0x10000);
    assert_eq!(port.pkeys, [0xffff]);
    assert_eq!(port.gids.len(), GID_TABLE_LENGTH);
    assert_eq!(port.gids[1].gid.to_string(), IPV4_GID);
    assert_eq!(port.gids[1].gid.0[10..], [0xff, 0xff, 10, 77, 0, 1]);
    assert_eq!(port.gids[1].gid_type, Some(GidType::RoceV2));
    assert_eq!(port.gids[1].network_interface.as_deref(), Some("d0"));
    assert!(port.gids[2].gid.is_zero());
    assert_eq!(
        (port.gids[2].gid_type, &port.gids[2].network_interface),
        (None, &None)
    );
}

#[test]
fn facts_survive_serialization() {
    let facts = facts();
    let text = serde_json::to_string(&facts).unwrap();
    assert!(
        text.contains(IPV4_GID),
        "a GID should be readable in {text}"
    );
    assert_eq!(serde_json::from_str::<DeviceFacts>(&text).unwrap(), facts);
    let broken = text.replace(IPV4_GID, "10.77.0.1");
    assert!(serde_json::from_str::<DeviceFacts>(&broken).is_err());
}

#[test]
fn what_is_not_understood_is_named() {
    for (file, text) in [
        ("ports/1/state", "ACTIVE"),
        ("ports/1/lid", "none"),
        ("ports/1/link_layer", "Carrier pigeon"),
        ("ports/1/gids/1", "10.77.0.1"),
        ("ports/1/gid_attrs/types/1", "RoCE v3"),
        ("ports/1/pkeys/0", "0x1ffff"),
        ("node_type", "CA"),
    ] {
        let root = tempfile::tempdir().unwrap();
        fake_sysfs(root.path(), "rxe0", "uverbs0", 192);
        put(root.path(), &format!("class/infiniband/rxe0/{file}"), text);
        let error = ports::read_device(&Sysfs::at(root.path()), "rxe0").unwrap_err();
        assert!(
            matches!(error, SysfsError::Unexpected { .. }),
            "{file}: {error:?}"
        );
        assert!(
            error.to_string().contains(file) && error.to_string().contains(text),
            "{error}"
        );
    }
}

#[test]
fn a_gap_in_a_table_is_refused() {
    let root = tempfile::tempdir().unwrap();
    fake_sysfs(root.path(), "rxe0", "uverbs0", 192);
    fs::remove_file(root.path().join("class/infiniband/rxe0/ports/1/gids/1")).unwrap();
    let error = ports::read_device(&Sysfs::at(root.path()), "rxe0").unwrap_err();
    assert!(error.to_string().contains("entry 2"), "{error}");
}

#[test]
fn a_device_that_does_not_exist_is_named() {
    let root = tempfile::tempdir().unwrap();
    let error = ports::read_device(&Sysfs::at(root.path()), "rxe7").unwrap_err();
    assert!(matches!(error, SysfsError::Read { .. }));
    assert!(error.to_string().contains("rxe7"), "{error}");
}

#[test]
fn the_tree_has_the_texts_of_the_kernel() {
    let facts = facts();
    let (_outer, folder) = tree_folder();
    let path = sysfs_tree::write(&folder, &facts, |_| true).unwrap();
    assert_eq!(path, folder.join("rxe0"));
    let original = tempfile::tempdir().unwrap();
    fake_sysfs(original.path(), "rxe0", "uverbs0", 192);
    let original = original.path().join("class/infiniband/rxe0");
    let mut compared = 0;
    for_each_file(&original, &mut |file| {
        let relative = file.strip_prefix(&original).unwrap();
        let expected = fs::read_to_string(file).unwrap();
        if expected != "\n" {
            let written = fs::read_to_string(path.join(relative)).unwrap();
            assert_eq!(written, expected, "{}", relative.display());
            compared += 1;
        }
    });
    assert!(compared > 25, "{compared}");
}

fn for_each_file(folder: &Path, visit: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            for_each_file(&path, visit)
        } else {
            visit(&path)
        }
    }
}

#[test]
fn every_gid_entry_has_a_type_or_libibverbs_drops_the_table() {
    let (_outer, folder) = tree_folder();
    let path = sysfs_tree::write(&folder, &facts(), |_| true).unwrap();
    for index in 0..GID_TABLE_LENGTH {
        let read = |what: &str| fs::read_to_string(path.join(format!("ports/1/{what}/{index}")));
        // The buffers of cmd_device.c: 41 bytes with, 11 bytes without room for a final zero.
        assert_eq!(read("gids").unwrap().len(), 40);
        let text = read("gid_attrs/types").unwrap();
        assert_eq!(
            text,
            if index < 2 {
                "RoCE v2\n"
            } else {
                "IB/RoCE v1\n"
            }
        );
        assert!(text.len() <= 11);
    }
    // The empty ones share their files, the others do not.
    let inode = |index: u32| {
        fs::metadata(path.join(format!("ports/1/gids/{index}")))
            .unwrap()
            .ino()
    };
    assert_eq!(inode(2), inode(7));
    assert_ne!(inode(0), inode(1));
    assert_ne!(inode(1), inode(2));
}

#[test]
fn an_interface_that_is_not_here_is_left_out() {
    let (_outer, folder) = tree_folder();
    let path = sysfs_tree::write(&folder, &facts(), |name| name != "d0").unwrap();
    assert_eq!(
        fs::read_dir(path.join("ports/1/gid_attrs/ndevs"))
            .unwrap()
            .count(),
        0
    );
    assert!(sysfs_tree::host_has_interface("lo"));
    assert!(!sysfs_tree::host_has_interface("no-such-if"));
}

#[test]
fn the_tree_is_private_and_is_replaced_as_a_whole() {
    let (_outer, folder) = tree_folder();
    let mut facts = facts();
    let path = sysfs_tree::write(&folder, &facts, |_| true).unwrap();
    assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
    facts.ports[0].pkeys = vec![0x8001, 0x7fff];
    facts.ports[0].gids.truncate(1);
    sysfs_tree::write(&folder, &facts, |_| true).unwrap();
    assert_eq!(
        fs::read_to_string(path.join("ports/1/pkeys/1")).unwrap(),
        "0x7fff\n"
    );
    assert!(!path.join("ports/1/gids/1").exists());
    let left: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(left, [path]);
}

#[test]
fn a_folder_open_to_others_is_refused() {
    let (outer, folder) = tree_folder();
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    let error = sysfs_tree::write(&folder, &facts(), |_| true).unwrap_err();
    assert!(matches!(error, TreeError::NotPrivate { .. }), "{error}");
    let private = outer.path().join("private");
    fs::create_dir(&private).unwrap();
    fs::set_permissions(&private, fs::Permissions::from_mode(0o700)).unwrap();
    symlink(&private, outer.path().join("link")).unwrap();
    let error = sysfs_tree::write(&outer.path().join("link"), &facts(), |_| true).unwrap_err();
    assert!(matches!(error, TreeError::NotPrivate { .. }), "{error}");
    assert!(sysfs_tree::write(&private, &facts(), |_| true).is_ok());
}

#[test]
fn names_that_would_leave_the_folder_are_refused() {
    let (_outer, folder) = tree_folder();
    for name in ["", "..", "a/b", ".hidden", "tab\there", &"x".repeat(64)] {
        let mut device = facts();
        device.name = name.to_owned();
        let error = sysfs_tree::write(&folder, &device, |_| true).unwrap_err();
        assert!(
            matches!(error, TreeError::BadName { .. }),
            "{name:?}: {error}"
        );
    }
    let mut device = facts();
    device.ports[0].gids[0].network_interface = Some("../../etc/x".to_owned());
    let error = sysfs_tree::write(&folder, &device, |_| true).unwrap_err();
    assert!(matches!(error, TreeError::BadName { .. }), "{error}");
    assert_eq!(
        fs::read_dir(&folder).unwrap().count(),
        0,
        "a failed attempt is left"
    );
}

#[test]
fn a_path_too_long_for_libibverbs_is_refused() {
    let (outer, _) = tree_folder();
    let folder = outer
        .path()
        .join("x".repeat(255 - outer.path().as_os_str().len() - 1 - 5));
    let error = sysfs_tree::write(&folder.join("y"), &facts(), |_| true).unwrap_err();
    assert!(matches!(error, TreeError::PathTooLong { .. }), "{error}");
    // Exactly as long as allowed: "/rxe0" is five bytes.
    let path = sysfs_tree::write(&folder, &facts(), |_| true).unwrap();
    assert_eq!(path.as_os_str().len(), sysfs_tree::LONGEST_PATH);
}
