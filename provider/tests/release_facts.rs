//! The release tables against facts derived from rdma-core's sources by `src/release/check-against-sources.sh`.

#![expect(
    clippy::print_stdout,
    reason = "says what was compared, and what was not"
)]

use rdma_core_sys as sys;
use reverbs_provider::release::{
    LAYOUTS, Layout, ListNode, MATCH_DRIVER_ID, MATCH_SENTINEL, VerbsDevice, VerbsDeviceOps,
    VerbsMatchEntry, VerbsMr, VerbsSysfsDevice, layout_of,
};
use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};
use std::path::Path;

type Facts = BTreeMap<String, String>;

#[test]
fn tables_agree_with_the_sources() {
    let Some(folder) = std::env::var_os("REVERBS_RELEASE_FACTS") else {
        println!(
            "skipped: no facts; run provider/src/release/check-against-sources.sh with an rdma-core clone"
        );
        return;
    };
    let files: Vec<_> = std::fs::read_dir(&folder)
        .expect("the folder of facts")
        .collect();
    let mut prototypes = Facts::new();
    let mut checked = BTreeMap::<u16, usize>::new();
    for file in files {
        let path = file.expect("a file of facts").path();
        let facts = read(&path);
        let release = facts["release"]
            .split('.')
            .next()
            .and_then(|major| major.parse().ok())
            .expect("a release");
        let layout = layout_of(release)
            .unwrap_or_else(|| panic!("{}: release {release} is not in the table", path.display()));
        check(&path, &facts, layout);
        check_prototypes(&path, &facts, &mut prototypes);
        *checked.entry(release).or_default() += 1;
    }
    assert!(
        !checked.is_empty(),
        "no facts in {}",
        Path::new(&folder).display()
    );
    let missing: Vec<u16> = LAYOUTS
        .iter()
        .flat_map(|layout| layout.first..=layout.last)
        .filter(|release| !checked.contains_key(release))
        .collect();
    println!("agreed, number of commits by release: {checked:?}; no facts for {missing:?}");
}

fn read(path: &Path) -> Facts {
    let text = std::fs::read_to_string(path).expect("readable facts");
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn check(path: &Path, facts: &Facts, layout: &Layout) {
    let text = |key: &str, ours: String| {
        assert_eq!(
            facts.get(key),
            Some(&ours),
            "{key} in {} (left: source, right: table)",
            path.display()
        );
    };
    let number = |key: &str, ours: usize| text(key, ours.to_string());

    number("suffix", layout.suffix.into());
    text("library", format!("1.{}", layout.public_minor));
    for (index, slot) in layout.slots.iter().enumerate() {
        text(&format!("slot.{index}"), (*slot).to_owned());
    }
    number(
        "size.verbs_context_ops",
        size_of_val(layout.slots) / size_of::<&str>() * size_of::<*const ()>(),
    );
    number("size.verbs_context", layout.verbs_context_size);
    number("offset.verbs_context.context", layout.context_offset());
    number(
        "offset.verbs_context.sz",
        layout.context_offset() - size_of::<usize>(),
    );
    number("size.verbs_qp", layout.verbs_qp_size);
    number(
        "offset.verbs_qp.comp_mask",
        layout.verbs_qp_comp_mask_offset,
    );
    number("offset.verbs_qp.xrcd", layout.verbs_qp_xrcd_offset);
    number("size.ibv_port_attr", layout.port_attr_size);
    for private in [
        "_verbs_init_and_alloc_context",
        "verbs_set_ops",
        "verbs_uninit_context",
    ] {
        text(&format!("private.{private}"), "yes".to_owned());
    }
    for minor in 14..=layout.public_minor {
        assert!(
            facts.contains_key(&format!("symbol.IBVERBS_1.{minor}")),
            "IBVERBS_1.{minor} in {}",
            path.display()
        );
    }
    assert!(
        !facts.contains_key(&format!("symbol.IBVERBS_1.{}", layout.public_minor + 1)),
        "{}",
        path.display()
    );
    for (key, id) in facts.iter().filter(|(key, _)| key.starts_with("driver.")) {
        assert!(
            id.parse::<u32>().is_ok_and(|id| id < 64),
            "{key}={id} in {} is not claimed",
            path.display()
        );
    }
    check_structures(&number);
    check_public_structures(&number);
}

macro_rules! structure {
    ($number:ident, $c:literal = $rust:ty { $($member:literal = $field:ident),* $(,)? }) => {
        $number(concat!("size.", $c), size_of::<$rust>());
        $($number(concat!("offset.", $c, ".", $member), offset_of!($rust, $field));)*
    };
}

fn check_structures(number: &impl Fn(&str, usize)) {
    structure!(number, "verbs_device" = VerbsDevice {
        "device" = device, "ops" = ops, "refcount" = reference_count, "entry" = entry, "sysfs" = sysfs,
        "core_support" = core_support,
    });
    structure!(number, "verbs_device_ops" = VerbsDeviceOps {
        "name" = name, "match_min_abi_version" = match_min_abi_version, "match_max_abi_version" = match_max_abi_version,
        "match_table" = match_table, "static_providers" = static_providers, "match_device" = match_device,
        "alloc_context" = alloc_context, "import_context" = import_context, "alloc_device" = alloc_device,
        "uninit_device" = uninit_device,
    });
    structure!(number, "verbs_match_ent" = VerbsMatchEntry {
        "driver_data" = driver_data, "u" = driver_id, "vendor" = vendor, "device" = device, "kind" = kind,
    });
    structure!(number, "verbs_sysfs_dev" = VerbsSysfsDevice {
        "entry" = entry, "provider_data" = provider_data, "match" = match_entry, "flags" = flags,
        "sysfs_name" = sysfs_name, "sysfs_cdev" = sysfs_cdev, "ibdev_name" = ibdev_name, "ibdev_path" = ibdev_path,
        "modalias" = modalias, "node_guid" = node_guid, "driver_id" = driver_id, "node_type" = node_type,
        "ibdev_idx" = ibdev_index, "num_ports" = port_count, "abi_ver" = abi_version,
    });
    structure!(number, "verbs_mr" = VerbsMr { "mr_type" = mr_type, "access" = access });
    number("value.VERBS_MATCH_SENTINEL", MATCH_SENTINEL.into());
    number("value.VERBS_MATCH_DRIVER_ID", MATCH_DRIVER_ID.into());
    number("value.IBV_MR_TYPE_MR", 0);
    number(
        "offset.verbs_sysfs_dev.provider_data",
        size_of::<ListNode>(),
    );
}

/// The public structures that libibverbs and the provider hand to each other are those of release 44 everywhere, but for
/// the two that the layout names.
fn check_public_structures(number: &impl Fn(&str, usize)) {
    macro_rules! sizes {
        ($($name:ident)*) => { $(number(concat!("size.", stringify!($name)), size_of::<sys::$name>());)* };
    }
    sizes!(
        ibv_ah ibv_ah_attr ibv_async_event ibv_comp_channel ibv_context ibv_cq ibv_cq_ex ibv_cq_init_attr_ex ibv_device
        ibv_device_attr ibv_device_attr_ex ibv_ece ibv_modify_cq_attr ibv_mr ibv_mw ibv_mw_bind
        ibv_parent_domain_init_attr ibv_pd ibv_qp ibv_qp_attr ibv_qp_init_attr ibv_qp_init_attr_ex ibv_recv_wr
        ibv_send_wr ibv_sge ibv_srq ibv_srq_attr ibv_srq_init_attr ibv_srq_init_attr_ex ibv_td_init_attr ibv_wc
    );
    structure!(number, "ibv_context" = sys::ibv_context {
        "ops" = ops, "cmd_fd" = cmd_fd, "async_fd" = async_fd, "num_comp_vectors" = num_comp_vectors, "mutex" = mutex,
        "abi_compat" = abi_compat,
    });
}

/// An operation that has the same name in two releases has the same prototype.
fn check_prototypes(path: &Path, facts: &Facts, known: &mut Facts) {
    for (key, prototype) in facts
        .iter()
        .filter(|(key, _)| key.starts_with("prototype."))
    {
        let first = known
            .entry(key.clone())
            .or_insert_with(|| prototype.clone());
        assert_eq!(prototype, first, "{key} in {}", path.display());
    }
}
