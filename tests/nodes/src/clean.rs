//! What must not be there when a case is over.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use reverbs_tests::setup::Deadline;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::node::{INTERFACE, Node};

/// How long a process may take to end that has nothing more to do.
const LIMIT: Duration = Duration::from_secs(5);

const PAUSE: Duration = Duration::from_millis(50);

/// Tables that the command `iptables` makes by being asked; they hold no rule.
const EMPTY_TABLES: [&str; 1] = ["filter"];

/// Nothing of a job or of the command is left: no process (running or stopped), no rule in a firewall, no network device,
/// and in the folders of images nothing that is not complete.
///
/// # Errors
/// When there is; the error names it.
pub fn check(cluster: &Cluster, images: &[PathBuf]) -> Result<()> {
    check_within(cluster, images, LIMIT)
}

/// The same where somebody has to notice first that there is nothing more to do.
///
/// # Errors
/// When something stays.
pub fn check_within(cluster: &Cluster, images: &[PathBuf], limit: Duration) -> Result<()> {
    for node in cluster.nodes() {
        no_process(node, limit)?;
        no_rule(node)?;
        no_device(node)?;
    }
    for folder in images {
        no_partial_image(folder)?;
    }
    Ok(())
}

/// # Errors
/// When the node has processes that do not end.
pub fn no_process(node: &Node, limit: Duration) -> Result<()> {
    let deadline = Deadline::after(limit);
    loop {
        let left = node.processes();
        if left.is_empty() {
            return Ok(());
        }
        if deadline.passed() {
            bail!("left on {}: {left:?}", node.name());
        }
        std::thread::sleep(PAUSE);
    }
}

/// # Errors
/// When the node has a process that is stopped.
pub fn no_stopped_process(node: &Node) -> Result<()> {
    match node.processes().iter().find(|process| process.is_stopped()) {
        Some(process) => bail!("stopped on {}: {process:?}", node.name()),
        None => Ok(()),
    }
}

/// # Errors
/// When the node's firewall has rules, in either of its two languages.
pub fn no_rule(node: &Node) -> Result<()> {
    let saved = node.shell("iptables-legacy-save; ip6tables-legacy-save")?;
    if let Some(rule) = saved.lines().find(|line| line.starts_with("-A")) {
        bail!("{} has the rule {rule}", node.name());
    }
    match first_rule(&node.shell("nft -j list ruleset")?)? {
        Some(found) => bail!("{} has {found}", node.name()),
        None => Ok(()),
    }
}

fn first_rule(ruleset: &str) -> Result<Option<String>> {
    let ruleset: Value = serde_json::from_str(ruleset)?;
    let entries = ruleset["nftables"].as_array().context("no ruleset")?;
    let is_empty_table = |table: &Value| {
        let name = table["name"].as_str().unwrap_or_default();
        EMPTY_TABLES.contains(&name)
    };
    let found = entries.iter().find(|entry| {
        entry.get("rule").is_some()
            || entry
                .get("table")
                .is_some_and(|table| !is_empty_table(table))
    });
    Ok(found.map(Value::to_string))
}

/// # Errors
/// When the node has another network device than its own.
pub fn no_device(node: &Node) -> Result<()> {
    let listed: Value = serde_json::from_str(&node.shell("ip -j link")?)?;
    let devices = listed.as_array().context("no list of devices")?;
    for device in devices {
        let name = device["ifname"].as_str().unwrap_or_default();
        ensure!(
            name == "lo" || name == INTERFACE,
            "{} has the network device {name}",
            node.name()
        );
    }
    Ok(())
}

/// # Errors
/// When the folder has one. Images appear by a rename; in the making they are hidden.
pub fn no_partial_image(folder: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries {
        let name = entry?.file_name();
        ensure!(
            !name.to_string_lossy().starts_with('.'),
            "a partial image: {}",
            folder.join(name).display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_and_tables_are_found() {
        let table = |name: &str, more: &str| {
            format!(r#"{{"nftables":[{{"metainfo":{{}}}},{{"table":{{"name":"{name}"}}}}{more}]}}"#)
        };
        assert_eq!(first_rule(&table("filter", "")).unwrap(), None);
        assert!(first_rule(&table("reverbs", "")).unwrap().is_some());
        let rule = r#",{"rule":{"table":"filter"}}"#;
        assert!(first_rule(&table("filter", rule)).unwrap().is_some());
        first_rule("{}").unwrap_err();
    }

    #[test]
    fn partial_images_are_found() {
        let folder = tempfile::tempdir().unwrap();
        no_partial_image(folder.path()).unwrap();
        fs::create_dir(folder.path().join("reverbs-7-1")).unwrap();
        no_partial_image(folder.path()).unwrap();
        fs::create_dir(folder.path().join(".reverbs-7-2@n1")).unwrap();
        no_partial_image(folder.path()).unwrap_err();
    }
}
