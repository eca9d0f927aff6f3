//! Handles of a job's processes as `reverbs status --json` shows them, before and after.

use std::fs;
use std::net::Ipv6Addr;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// One handle: what the application sees, and what the hardware has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Handle {
    /// Tells it from the others of the job.
    place: String,
    application: String,
    hardware: String,
}

/// All handles of a job at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handles(Vec<Handle>);

impl Handles {
    /// Reads what `reverbs status --json` printed.
    ///
    /// # Errors
    /// When the file is not that, or names no queue pair.
    pub fn read(file: &Path) -> Result<Handles> {
        let text =
            fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Handles::parse(&text).with_context(|| format!("{} is no status", file.display()))
    }

    fn parse(text: &str) -> Result<Handles> {
        let status: Value = serde_json::from_str(text)?;
        let mut handles = Vec::new();
        for process in list(&status)? {
            let pid = number(&process["pid"])?;
            for context in list(&process["contexts"])? {
                collect(&format!("{pid}"), context, &mut handles)?;
            }
        }
        ensure!(
            handles.iter().any(|handle| handle.place.contains("qp")),
            "no queue pair is in it"
        );
        Ok(Handles(handles))
    }

    /// The table of both moments: every handle must be the same for the application, and
    /// those of queue pairs, keys and addresses other ones for the hardware.
    ///
    /// # Errors
    /// When a handle is gone or another one, or no hardware handle changed of some kind.
    pub fn beside(&self, after: &Handles) -> Result<String> {
        let mut table = format!(
            "{:<18} {:<24} {:<24} {}\n",
            "process, handle", "application", "hardware before", "hardware after"
        );
        for handle in &self.0 {
            let Some(now) = after.find(handle) else {
                bail!(
                    "{} is no longer {} for the application",
                    handle.place,
                    handle.application
                );
            };
            table += &format!(
                "{:<18} {:<24} {:<24} {}\n",
                handle.place, handle.application, handle.hardware, now.hardware
            );
        }
        for kind in ["device", "gid", "qp", "rkey"] {
            let changed = self.0.iter().any(|handle| {
                handle.place.ends_with(kind)
                    && after
                        .find(handle)
                        .is_some_and(|now| now.hardware != handle.hardware)
            });
            ensure!(
                changed,
                "no {kind} of the hardware changed: this shows nothing"
            );
        }
        Ok(table)
    }

    fn find(&self, handle: &Handle) -> Option<&Handle> {
        self.0
            .iter()
            .find(|other| other.place == handle.place && other.application == handle.application)
    }
}

fn collect(process: &str, context: &Value, handles: &mut Vec<Handle>) -> Result<()> {
    let queue_pairs = list(&context["queue_pairs"])?;
    // The contexts that libfabric opened and left carry nothing.
    if queue_pairs.is_empty() {
        return Ok(());
    }
    let mut add = |kind: &str, application: String, hardware: String| {
        handles.push(Handle {
            place: format!("{process} {kind}"),
            application,
            hardware,
        });
    };
    let name = |value: &Value| value.as_str().context("no name").map(str::to_owned);
    add(
        "device",
        name(&context["device"])?,
        name(&context["hardware_device"])?,
    );
    for port in list(&context["ports"])? {
        for gid in list(&port["gids"])? {
            add("gid", address(&gid[0])?, address(&gid[1])?);
        }
    }
    for pair in queue_pairs {
        let seen = number(&pair["virtual_qpn"])?;
        add("qp", format!("{seen:#x}"), optional(&pair["hardware_qpn"]));
    }
    for region in list(&context["memory_regions"])? {
        for kind in ["lkey", "rkey"] {
            let seen = number(&region[kind][0])?;
            add(kind, format!("{seen:#010x}"), optional(&region[kind][1]));
        }
    }
    Ok(())
}

fn list(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().context("a list is missing")
}

fn number(value: &Value) -> Result<u64> {
    value.as_u64().context("a number is missing")
}

fn optional(value: &Value) -> String {
    value
        .as_u64()
        .map_or_else(|| "-".to_owned(), |number| format!("{number:#x}"))
}

/// A GID as the application prints it: 16 bytes.
fn address(value: &Value) -> Result<String> {
    let mut bytes = [0; 16];
    let given = list(value)?;
    ensure!(given.len() == bytes.len(), "a GID has 16 bytes");
    for (byte, value) in bytes.iter_mut().zip(given) {
        *byte = u8::try_from(number(value)?)?;
    }
    Ok(Ipv6Addr::from(bytes).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(device: &str, gid: u8, qpn: u32, key: u32) -> Handles {
        let text = format!(
            r#"[{{"pid": 7, "contexts": [
                {{"device": "rxe0", "hardware_device": "x", "ports": [], "queue_pairs": [],
                  "memory_regions": []}},
                {{"device": "rxe0", "hardware_device": "{device}",
                  "ports": [{{"port": 1, "lid": [0, 0], "gids":
                    [[[0,0,0,0,0,0,0,0,0,0,255,255,10,77,0,1],
                      [0,0,0,0,0,0,0,0,0,0,255,255,10,77,0,{gid}]]]}}],
                  "queue_pairs": [{{"virtual_qpn": 17, "hardware_qpn": {qpn}}}],
                  "memory_regions": [{{"lkey": [1, {key}], "rkey": [1, {key}]}}]}}]}}]"#
        );
        Handles::parse(&text).expect("a status")
    }

    #[test]
    fn stable_handles_over_other_hardware_pass() {
        let before = status("rxe0", 1, 17, 1);
        let table = before.beside(&status("rdma9", 9, 18, 2)).expect("a table");
        assert!(table.contains("::ffff:10.77.0.9"), "{table}");
        assert_eq!(table.lines().count(), 6);
    }

    #[test]
    fn unchanged_hardware_fails() {
        let before = status("rxe0", 1, 17, 1);
        assert!(before.beside(&status("rdma9", 9, 17, 2)).is_err());
        assert!(before.beside(&status("rdma9", 9, 18, 1)).is_err());
        assert!(before.beside(&status("rxe0", 9, 18, 2)).is_err());
        assert!(before.beside(&status("rdma9", 1, 18, 2)).is_err());
    }

    #[test]
    fn changed_handles_fail() {
        let before = status("rxe0", 1, 17, 1);
        let mut after = status("rdma9", 9, 18, 2);
        after.0.retain(|handle| !handle.place.ends_with("qp"));
        assert!(before.beside(&after).is_err());
    }
}
