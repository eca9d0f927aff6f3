//! Do the devices of this node offer what the part of an image that comes to it asks of its own? Looked at before anything is
//! restored.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use kmod_compat::devices;
use kmod_compat::ports::{DeviceFacts, Gid, GidEntry, GidType, read_device};
use kmod_compat::sysfs::Sysfs;
use reverbs::control::choice::choose;
use reverbs::control::message::{ContextStatus, DeviceChoice};
use reverbs::control::needs::{Needs, Source};
use reverbs::image::Manifest;

/// # Errors
/// No device here can stand for one of the job's, or it offers too little: named, with the remedy.
pub(super) fn check(manifest: &Manifest, choices: &[DeviceChoice]) -> Result<()> {
    let processes = manifest.processes.iter();
    let contexts = processes.filter_map(|process| process.rdma.as_ref());
    let names: Vec<String> = devices::list(&Sysfs::host())
        .unwrap_or_default()
        .into_iter()
        .filter(|device| device.uverbs.is_some())
        .map(|device| device.name)
        .collect();
    if names.is_empty() {
        // Whatever stands for the job's devices is not the kernel's: it is looked for when they are opened.
        return Ok(());
    }
    // Many processes have used the same few devices, and a large GID table takes long to read.
    let here = LazyCell::new(|| {
        let read = |name: &String| read_device(&Sysfs::host(), name).ok();
        names.iter().filter_map(read).collect::<Vec<_>>()
    });
    let mut by_device: BTreeMap<String, Vec<&ContextStatus>> = BTreeMap::new();
    for context in contexts.flat_map(|rdma| &rdma.contexts) {
        let device = choose(&context.device, choices, &names, |name| {
            let mut named = here.iter().filter(|facts| facts.name == name);
            named.any(|facts| has_address_of(facts, context))
        })
        .map_err(anyhow::Error::msg)?;
        by_device.entry(device).or_default().push(context);
    }
    for (device, contexts) in by_device {
        check_device(&device, &contexts)?;
    }
    Ok(())
}

fn has_address_of(facts: &DeviceFacts, context: &ContextStatus) -> bool {
    let mut known = context.ports.iter().flat_map(|port| &port.gids);
    known.any(|(gid, _)| facts.gids().any(|here| here == Gid(gid.0)))
}

fn check_device(device: &str, contexts: &[&ContextStatus]) -> Result<()> {
    let facts = read_device(&Sysfs::host(), device)
        .with_context(|| format!("there is no device {device} here"))?;
    let mut needs: Vec<&Needs> = Vec::new();
    for context in contexts {
        if !needs.contains(&&context.needs) {
            needs.push(&context.needs);
        }
    }
    let mut lacks: Vec<String> = Vec::new();
    for source in needs.iter().flat_map(|needs| &needs.sources) {
        let said = lacking(source, &facts);
        lacks.extend(said.filter(|said| !lacks.contains(said)));
    }
    lacks.extend(ask(device, &needs)?);
    if lacks.is_empty() {
        return Ok(());
    }
    bail!(
        "device {device} offers less than the job uses of {}; it lacks {}: give the job another one with --device",
        contexts[0].device,
        lacks.join(", ")
    )
}

/// An address that no other can stand for.
fn lacking(source: &Source, facts: &DeviceFacts) -> Option<String> {
    let gid_type = match source.roce_v2 {
        true => GidType::RoceV2,
        false => GidType::InfinibandOrRoceV1,
    };
    let wanted = GidEntry {
        gid: Gid(source.gid.0),
        gid_type: Some(gid_type),
        network_interface: None,
    };
    let port = facts.ports.iter().find(|port| port.number == source.port);
    let found = port.is_some_and(|port| port.gids.iter().any(|entry| entry.has_role_of(&wanted)));
    let kind = gid_type.name();
    (!found).then(|| {
        format!(
            "a GID of the kind of {} ({kind}) on port {}",
            wanted.gid, source.port
        )
    })
}

/// The device's own limits, which only libibverbs tells: `reverbs fits`.
fn ask(device: &str, needs: &[&Needs]) -> Result<Vec<String>> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["fits", device])
        // Not by way of the provider.
        .env_remove("RDMAV_DRIVERS")
        .env_remove("IBV_DRIVERS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("reverbs fits")?;
    let input = serde_json::to_vec(needs)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&input)?;
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "device {device}: {}",
        said.lines().last().unwrap_or("`reverbs fits` has failed")
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[cfg(test)]
mod tests {
    use kmod_compat::devices::NodeType;
    use reverbs::handle::VirtualGid;

    use super::*;

    #[test]
    fn an_address_needs_one_of_its_kind() {
        let ipv4 = |last| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, last];
        let source = |gid, roce_v2| Source {
            port: 1,
            index: 1,
            gid: VirtualGid(gid),
            roce_v2,
        };
        let text = r#"{"number":1,"state":4,"physical_state":5,"link_layer":"Ethernet","lid":0,
            "lid_mask_count":0,"subnet_manager_lid":0,"subnet_manager_service_level":0,"capability_mask":0,"rate":null,
            "gids":[{"gid":"0000:0000:0000:0000:0000:ffff:0a00:0002","gid_type":"RoceV2","network_interface":null}],
            "pkeys":[]}"#;
        let facts = DeviceFacts {
            name: "rxe1".into(),
            node_type: NodeType::CHANNEL_ADAPTER,
            node_guid: String::new(),
            system_image_guid: String::new(),
            node_description: None,
            firmware_version: None,
            ports: vec![serde_json::from_str(text).unwrap()],
        };
        assert_eq!(lacking(&source(ipv4(1), true), &facts), None);
        let said = lacking(&source(ipv4(1), false), &facts).unwrap();
        assert!(said.contains("IB/RoCE v1"), "{said}");
        let mut link_local = [0; 16];
        link_local[..2].copy_from_slice(&[0xfe, 0x80]);
        assert!(lacking(&source(link_local, true), &facts).is_some());
    }
}
