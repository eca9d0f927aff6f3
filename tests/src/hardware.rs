//! The numbers that the hardware uses, as the kernel tells them: not what the provider says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// The numbers of all objects that programs hold on a device.
///
/// The kernel lists an object under the *thread* that made it, and under nobody once that thread
/// has ended, so they are not told apart by process: only one job at a time uses the device here.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Numbers {
    pub queue_pairs: BTreeSet<u64>,
    /// Local keys.
    pub keys: BTreeSet<u64>,
}

impl Numbers {
    /// What the kernel lists for this device (`rdma resource show`).
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn on(device: &str) -> Result<Self> {
        let is_there = |object: &&Value| object["ifname"] == device;
        // The kernel has queue pairs of its own.
        let is_of_program = |object: &&Value| object["type"] != "GSI" && object["type"] != "SMI";
        let queue_pairs = list("qp")?
            .iter()
            .filter(is_there)
            .filter(is_of_program)
            .filter_map(|object| object["lqpn"].as_u64())
            .collect();
        let keys = list("mr")?
            .iter()
            .filter(is_there)
            .filter_map(|object| hexadecimal(object["lkey"].as_str()?))
            .collect();
        Ok(Self { queue_pairs, keys })
    }

    /// Checks that there are numbers and that none of them is also in `earlier`.
    ///
    /// # Errors
    /// When a number has stayed, or there is none.
    pub fn check_all_new(&self, earlier: &Self) -> Result<()> {
        check_disjoint("queue pair number", &self.queue_pairs, &earlier.queue_pairs)?;
        check_disjoint("key", &self.keys, &earlier.keys)
    }

    /// Checks that there are as many as `earlier`: for jobs that make all their objects at the start.
    ///
    /// # Errors
    /// When there are more or fewer.
    pub fn check_as_many(&self, earlier: &Self) -> Result<()> {
        check_number("queue pair number", &self.queue_pairs, &earlier.queue_pairs)?;
        check_number("key", &self.keys, &earlier.keys)
    }
}

/// How many objects of each kind programs hold on a device, as the kernel lists them.
///
/// # Errors
/// When it cannot be asked.
pub fn count_objects(device: &str) -> Result<BTreeMap<&'static str, usize>> {
    ["ctx", "pd", "mr", "cq", "srq", "qp"]
        .into_iter()
        .map(|kind| {
            let objects = list(kind)?;
            // The kernel's own have the name of a module instead of a process; it shows it in brackets.
            let is_of_program = |object: &&Value| {
                object["ifname"] == device
                    && object["comm"]
                        .as_str()
                        .is_none_or(|name| !name.starts_with("ib_"))
            };
            Ok((kind, objects.iter().filter(is_of_program).count()))
        })
        .collect()
}

fn check_disjoint(what: &str, now: &BTreeSet<u64>, earlier: &BTreeSet<u64>) -> Result<()> {
    ensure!(
        !now.is_empty(),
        "the hardware has no {what} of the job at all"
    );
    if let Some(number) = now.intersection(earlier).next() {
        anyhow::bail!("the hardware's {what} 0x{number:x} has not changed");
    }
    Ok(())
}

fn check_number(what: &str, now: &BTreeSet<u64>, earlier: &BTreeSet<u64>) -> Result<()> {
    ensure!(
        now.len() == earlier.len(),
        "the hardware has {} of kind {what}, it had {}",
        now.len(),
        earlier.len()
    );
    Ok(())
}

/// How often a device is open (`rdma resource show`).
///
/// # Errors
/// When the kernel cannot be asked.
pub fn contexts(device: &str) -> Result<u64> {
    list("")?
        .iter()
        .find(|found| found["ifname"] == device)
        .and_then(|found| found["ctx"].as_u64())
        .with_context(|| format!("rdma does not say how often {device} is open"))
}

/// The states of all connections on a device that are made by `rdma_cm`.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn connection_states(device: &str) -> Result<Vec<String>> {
    let connections = list("cm_id")?;
    let there = connections.iter().filter(|id| id["ifname"] == device);
    Ok(there
        .filter_map(|id| id["state"].as_str().map(str::to_owned))
        .collect())
}

/// The kernel's numbers of all open contexts of a device.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn context_numbers(device: &str) -> Result<BTreeSet<u64>> {
    let contexts = list("ctx")?;
    let there = contexts
        .iter()
        .filter(|context| context["ifname"] == device);
    Ok(there
        .filter_map(|context| context["ctxn"].as_u64())
        .collect())
}

/// The objects of a kind; how many there are of each for "".
fn list(kind: &str) -> Result<Vec<Value>> {
    let output = Command::new("rdma")
        .args(["-j", "-dd", "resource", "show"])
        .args(Some(kind).filter(|kind| !kind.is_empty()))
        .output()
        .context("cannot start rdma (package iproute2)")?;
    ensure!(
        output.status.success(),
        "rdma resource show {kind}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    // Nothing at all is printed when there is no object.
    if output.stdout.trim_ascii().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("answer of rdma, {kind}"))
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

/// How many packets the device has sent so far.
///
/// # Errors
/// When the device has no such counter.
pub fn packets_sent(device: &str) -> Result<u64> {
    counter(device, "sent_pkts")
}

/// A counter of the device's port.
///
/// # Errors
/// When the device has no such counter.
pub fn counter(device: &str, name: &str) -> Result<u64> {
    let path = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/{name}");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    text.trim().parse().with_context(|| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(pairs: &[u64], keys: &[u64]) -> Numbers {
        let set = |list: &[u64]| list.iter().copied().collect();
        Numbers {
            queue_pairs: set(pairs),
            keys: set(keys),
        }
    }

    #[test]
    fn a_number_that_stays_is_found() {
        let earlier = numbers(&[17, 18], &[5]);
        numbers(&[19, 20], &[6]).check_all_new(&earlier).unwrap();
        numbers(&[17, 20], &[6])
            .check_all_new(&earlier)
            .unwrap_err();
        numbers(&[19, 20], &[5])
            .check_all_new(&earlier)
            .unwrap_err();
        numbers(&[19], &[6]).check_as_many(&earlier).unwrap_err();
        numbers(&[19, 20], &[6]).check_as_many(&earlier).unwrap();
        numbers(&[], &[]).check_all_new(&earlier).unwrap_err();
    }
}
