//! What CRIU could not save, or not restore: found and named before anything is touched.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use procfs::process::{FDPermissions, FDTarget, Process};

use super::files::Held;
use super::job::{ProcessTree, is_reverbs};
use reverbs::image::OutsidePipe;

/// What the dump has to be told about the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Findings {
    /// Options for dump and restore.
    pub(crate) options: Vec<String>,
    /// Bytes that the largest deleted file has, with room to grow.
    pub(crate) ghost_limit: u64,
    pub(crate) outside_pipes: Vec<OutsidePipe>,
}

/// CRIU's own default for deleted files.
const LEAST_GHOST_LIMIT: u64 = 1 << 20;

/// Looks through the tree for what stands in the way. `largest_deleted`: bytes that a deleted file may have.
///
/// # Errors
/// All that was found, each with the process and the remedy.
pub(crate) fn examine(tree: &ProcessTree, held: &Held, largest_deleted: u64) -> Result<Findings> {
    let mut obstacles = terminals(tree, held);
    obstacles.extend(system_v(held));
    obstacles.extend(remote_shells(tree));
    obstacles.extend(remote_starts(tree));
    let mut ghost_limit = LEAST_GHOST_LIMIT;
    for file in held.deleted.values() {
        // CRIU's limit is for the length, and it may grow until it is dumped.
        ghost_limit = ghost_limit.max(file.found.len().saturating_mul(2));
        // What was never written is not in the image.
        let bytes = file.found.blocks() * 512;
        if bytes > largest_deleted {
            obstacles.push(format!(
                "process {} holds {} with {bytes} bytes, which would go into the image: allow it with \
                 --largest-deleted {bytes}",
                file.process,
                file.path.display()
            ));
        }
    }
    if !obstacles.is_empty() {
        bail!("cannot be checkpointed: {}", obstacles.join("; "));
    }
    let mut options = Vec::new();
    if needs_shell_job(tree) {
        options.push("--shell-job".to_owned());
    }
    Ok(Findings {
        options,
        ghost_limit,
        outside_pipes: outside_pipes(tree, held),
    })
}

/// Terminals whose other end is not in the tree cannot be restored: there is nobody to serve them.
fn terminals(tree: &ProcessTree, held: &Held) -> Vec<String> {
    const REMEDY: &str = "start the job with `reverbs run`, which keeps terminals away from it";
    let mut obstacles = Vec::new();
    let mut named = BTreeSet::new();
    for device in &held.devices {
        let path = device.path.to_string_lossy();
        let inside = path
            .strip_prefix("/dev/pts/")
            .and_then(|index| index.parse().ok())
            .is_some_and(|index| held.terminal_masters.contains(&index));
        let terminal = path == "/dev/console"
            || path == "/dev/tty"
            || path.starts_with("/dev/pts/") && !path.ends_with("ptmx")
            || path.starts_with("/dev/tty");
        if terminal && !inside && named.insert((device.process, device.path.clone())) {
            obstacles.push(format!(
                "process {} has the terminal {path} as file descriptor {}: {REMEDY}",
                device.process, device.descriptor
            ));
        }
    }
    for member in &tree.members {
        // Numbers of /dev/pts are spread over majors 136 to 143, 2^20 minors in the encoding of stat(5).
        let minor = (member.terminal & 0xff) | ((member.terminal >> 12) & 0xf_ff00);
        let inside = u32::try_from(minor).is_ok_and(|index| held.terminal_masters.contains(&index));
        if member.terminal != 0 && !inside {
            obstacles.push(format!(
                "process {} ({}) has a controlling terminal: {REMEDY}",
                member.pid, member.name
            ));
        }
    }
    obstacles
}

/// Clients of another host's server, which a restore cannot bring back.
fn remote_shells(tree: &ProcessTree) -> Vec<String> {
    const CLIENTS: [&str; 3] = ["ssh", "rsh", "srun"];
    tree.members
        .iter()
        .filter(|member| CLIENTS.contains(&member.name.as_str()))
        .map(|member| {
            format!(
                "process {} ({}) leads out of the job: let mpirun or mpiexec start the ranks, which `reverbs run` lets reach \
                 other nodes without it (docs/nodes.md)",
                member.pid, member.name
            )
        })
        .collect()
}

/// mpirun is about to put processes on another node: that is over in a moment, or not at all.
fn remote_starts(tree: &ProcessTree) -> Vec<String> {
    const LIMIT: Duration = Duration::from_secs(5);
    const PAUSE: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut starts = tree.pids();
        starts.retain(|pid| is_remote_start(*pid));
        if starts.is_empty() || Instant::now() >= deadline {
            let obstacle = |pid| {
                format!(
                    "process {pid} is starting processes of the job on another node: try again later"
                )
            };
            return starts.into_iter().map(obstacle).collect();
        }
        std::thread::sleep(PAUSE);
    }
}

fn is_remote_start(pid: i32) -> bool {
    is_reverbs(pid)
        && Process::new(pid)
            .and_then(|process| process.cmdline())
            .is_ok_and(|words| words.get(1).is_some_and(|word| word == "remote"))
}

/// CRIU saves System V shared memory only with the IPC namespace that it lives in.
fn system_v(held: &Held) -> Vec<String> {
    let ours = ipc_namespace("self");
    let processes: BTreeSet<i32> = held.system_v.iter().copied().collect();
    processes
        .into_iter()
        .filter(|pid| ipc_namespace(&pid.to_string()) == ours)
        .map(|pid| {
            format!(
                "process {pid} maps System V shared memory: start the job with UCX_TLS=^sysv (as `reverbs run` does), \
                 or in an IPC namespace of its own (`unshare --ipc`)"
            )
        })
        .collect()
}

fn ipc_namespace(process: &str) -> Option<u64> {
    let found = std::fs::metadata(format!("/proc/{process}/ns/ipc")).ok()?;
    Some(found.ino())
}

/// A root that is no session leader can be dumped only as a part of somebody else's session, whose place the restore takes.
fn needs_shell_job(tree: &ProcessTree) -> bool {
    tree.members
        .first()
        .is_some_and(|root| root.session != root.pid)
}

/// Pipes of which the tree has one end and somebody else the other. (One whose other end is closed stays as it is.)
fn outside_pipes(tree: &ProcessTree, held: &Held) -> Vec<OutsidePipe> {
    let mut found = one_ended(held);
    if found.is_empty() {
        return found;
    }
    let members = tree.pids();
    let others = procfs::process::all_processes()
        .into_iter()
        .flatten()
        .flatten()
        .map(|process| process.pid)
        .filter(|pid| !members.contains(pid));
    let elsewhere: BTreeSet<(u64, bool)> = others.flat_map(pipe_ends).collect();
    found.retain(|pipe| elsewhere.contains(&(pipe.inode, !pipe.written)));
    found
}

/// Inode, and whether it is the writing end, of every pipe that a process holds.
fn pipe_ends(pid: i32) -> Vec<(u64, bool)> {
    let Ok(descriptors) = Process::new(pid).and_then(|process| process.fd()) else {
        return Vec::new();
    };
    descriptors
        .flatten()
        .filter_map(|descriptor| match descriptor.target {
            FDTarget::Pipe(inode) => {
                Some((inode, descriptor.mode().contains(FDPermissions::WRITE)))
            }
            _ => None,
        })
        .collect()
}

/// Pipes of which the tree has only one end.
fn one_ended(held: &Held) -> Vec<OutsidePipe> {
    let mut found: Vec<OutsidePipe> = Vec::new();
    for pipe in &held.pipes {
        let other_end = held
            .pipes
            .iter()
            .any(|other| other.inode == pipe.inode && other.written != pipe.written);
        if other_end {
            continue;
        }
        match found.iter_mut().find(|known| known.inode == pipe.inode) {
            Some(known) if known.descriptor <= pipe.descriptor => {}
            Some(known) => known.descriptor = pipe.descriptor,
            None => found.push(OutsidePipe {
                inode: pipe.inode,
                descriptor: pipe.descriptor,
                process: pipe.process,
                written: pipe.written,
            }),
        }
    }
    found
}

/// RDMA file descriptors in processes that have no agent: nobody can let go of them.
///
/// # Errors
/// There are some; they are named.
pub(crate) fn require_agents(held: &Held, agents: &[i32]) -> Result<()> {
    let foreign: Vec<String> = held
        .devices
        .iter()
        .filter(|device| is_rdma(&device.path) && !agents.contains(&device.process))
        .map(|device| {
            format!(
                "process {} has {} as file descriptor {} and does not run under reverbs",
                device.process,
                device.path.display(),
                device.descriptor
            )
        })
        .collect();
    if foreign.is_empty() {
        return Ok(());
    }
    bail!(
        "cannot be checkpointed: {}: start the job with `reverbs run`",
        foreign.join("; ")
    )
}

/// After all agents have released: whatever RDMA descriptor is left belongs to something that nobody accounts for.
///
/// # Errors
/// There are some; they are named.
pub(crate) fn require_no_rdma(held: &Held) -> Result<()> {
    let left: Vec<String> = held
        .devices
        .iter()
        .filter(|device| is_rdma(&device.path))
        .map(|device| {
            format!(
                "process {} still has {} as file descriptor {}",
                device.process,
                device.path.display(),
                device.descriptor
            )
        })
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    bail!(
        "cannot be checkpointed: {}, which was not opened through reverbs",
        left.join("; ")
    )
}

fn is_rdma(path: &Path) -> bool {
    path.starts_with("/dev/infiniband")
}

#[cfg(test)]
mod tests {
    use super::{examine, one_ended, require_no_rdma};
    use crate::command::files::{Held, HeldDevice, HeldPipe};
    use crate::command::job::{Member, ProcessTree};

    fn tree(session: i32, terminal: i32) -> ProcessTree {
        ProcessTree {
            members: vec![Member {
                pid: 10,
                parent: 1,
                group: session,
                session,
                terminal,
                zombie: false,
                user: 0,
                name: "job".into(),
            }],
        }
    }

    fn device(path: &str) -> HeldDevice {
        HeldDevice {
            process: 10,
            descriptor: 5,
            path: path.into(),
        }
    }

    #[test]
    fn terminals_of_others_are_obstacles_and_own_ones_are_not() {
        let mut held = Held::default();
        held.devices.push(device("/dev/pts/3"));
        let error = examine(&tree(10, 0), &held, 0).unwrap_err().to_string();
        assert!(
            error.contains("/dev/pts/3") && error.contains("reverbs run"),
            "{error}"
        );
        held.terminal_masters.push(3);
        // 136:3, a controlling terminal whose master is in the tree.
        let findings = examine(&tree(10, 136 << 8 | 3), &held, 0).unwrap();
        assert_eq!(findings.options, [""; 0]);
        assert!(examine(&tree(10, 136 << 8 | 4), &held, 0).is_err());
        assert!(examine(&tree(10, 0), &Held::default(), 0).is_ok());
    }

    #[test]
    fn an_ssh_client_in_the_tree_is_named() {
        let mut tree = tree(10, 0);
        tree.members[0].name = "ssh".into();
        let error = examine(&tree, &Held::default(), 0).unwrap_err().to_string();
        assert!(error.contains("process 10 (ssh)"), "{error}");
    }

    #[test]
    fn a_root_in_a_foreign_session_is_a_shell_job() {
        let findings = examine(&tree(7, 0), &Held::default(), 0).unwrap();
        assert_eq!(findings.options, ["--shell-job"]);
    }

    #[test]
    fn a_pipe_with_one_end_in_the_tree_is_found_by_its_lowest_number() {
        let pipe = |inode, descriptor, written| HeldPipe {
            process: 10,
            descriptor,
            inode,
            written,
        };
        let held = Held {
            pipes: vec![
                pipe(1, 7, true),
                pipe(1, 8, false),
                pipe(2, 9, true),
                pipe(2, 1, true),
            ],
            ..Held::default()
        };
        let found = one_ended(&held);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].inode, found[0].descriptor), (2, 1));
    }

    #[test]
    fn a_left_over_rdma_descriptor_is_named() {
        let held = Held {
            devices: vec![device("/dev/null"), device("/dev/infiniband/uverbs0")],
            ..Held::default()
        };
        let error = require_no_rdma(&held).unwrap_err().to_string();
        assert!(
            error.contains("uverbs0") && !error.contains("/dev/null"),
            "{error}"
        );
    }
}
