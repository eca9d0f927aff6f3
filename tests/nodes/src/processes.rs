//! The processes of a node, seen from outside of it.

use std::fs;
use std::path::PathBuf;

/// A process as /proc shows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Process {
    /// Its id in our eyes.
    pub pid: u32,
    /// Its id in the node's.
    pub inner: u32,
    /// Of its parent, in our eyes.
    pub parent: u32,
    /// What the kernel calls it.
    pub name: String,
    /// `R`, `S`, `T`, ...
    pub state: char,
    pub command: String,
}

impl Process {
    /// `None` when it has ended.
    pub fn read(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Self::parse(pid, &status, &command)
    }

    fn parse(pid: u32, status: &str, command: &[u8]) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim())
        };
        Some(Self {
            pid,
            inner: field("NSpid:")?
                .split_whitespace()
                .next_back()?
                .parse()
                .ok()?,
            parent: field("PPid:")?.parse().ok()?,
            name: field("Name:")?.to_owned(),
            state: field("State:")?.chars().next()?,
            command: String::from_utf8_lossy(command)
                .split('\0')
                .collect::<Vec<_>>()
                .join(" ")
                .trim_end()
                .to_owned(),
        })
    }

    /// It has ended, and its parent has not noticed yet.
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }

    /// Stopped by a signal or by a tracer.
    pub fn is_stopped(&self) -> bool {
        matches!(self.state, 'T' | 't')
    }
}

/// Its parent, the parent of that, and so on.
pub fn ancestors(process: &Process) -> Vec<u32> {
    let mut found = Vec::new();
    let mut parent = process.parent;
    while parent != 0 {
        found.push(parent);
        parent = Process::read(parent).map_or(0, |process| process.parent);
    }
    found
}

/// The namespace in which a process counts processes.
pub fn namespace(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

/// All processes of this namespace and of those below it.
pub fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_a_node_has_an_id_there() {
        let status = "Name:\tsleep\nState:\tS (sleeping)\nPPid:\t7\nNSpid:\t812\t40\t3\n";
        let process = Process::parse(812, status, b"sleep\x0060\0").unwrap();
        assert_eq!((process.pid, process.inner, process.parent), (812, 3, 7));
        assert_eq!((process.state, process.command.as_str()), ('S', "sleep 60"));
        assert!(!process.is_stopped() && !process.is_zombie());
        assert_eq!(Process::parse(812, "Name:\tsleep\n", b""), None);
    }
}
