//! The process tree of a job, from /proc.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail};
use procfs::process::{Process, Stat};

use reverbs::control::socket;

/// One process of the tree.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    pub(crate) group: i32,
    pub(crate) session: i32,
    /// Device number of the controlling terminal, 0 for none.
    pub(crate) terminal: i32,
    pub(crate) zombie: bool,
    /// Effective user.
    pub(crate) user: u32,
    /// The name of the thread group leader, as `ps -o comm` shows it.
    pub(crate) name: String,
}

/// A root and all its descendants.
#[derive(Clone, Debug)]
pub(crate) struct ProcessTree {
    /// The root first, parents before children.
    pub(crate) members: Vec<Member>,
}

impl ProcessTree {
    /// # Errors
    /// There is no process `root`, or /proc cannot be read.
    pub(crate) fn of(root: i32) -> Result<Self> {
        let mut children: BTreeMap<i32, BTreeSet<i32>> = BTreeMap::new();
        let mut stats: BTreeMap<i32, (Stat, u32)> = BTreeMap::new();
        for process in procfs::process::all_processes().context("cannot read /proc")? {
            // Whoever ends meanwhile is not part of the tree any more.
            let Ok(process) = process else { continue };
            let (Ok(stat), Ok(user)) = (process.stat(), process.uid()) else {
                continue;
            };
            children.entry(stat.ppid).or_default().insert(stat.pid);
            stats.insert(stat.pid, (stat, user));
        }
        let mut members = Vec::new();
        let mut next = vec![root];
        while let Some(pid) = next.pop() {
            let Some((stat, user)) = stats.remove(&pid) else {
                continue;
            };
            next.extend(children.get(&pid).into_iter().flatten());
            members.push(Member {
                pid,
                parent: stat.ppid,
                group: stat.pgrp,
                session: stat.session,
                terminal: stat.tty_nr,
                zombie: stat.state == 'Z',
                user,
                name: stat.comm,
            });
        }
        match members.first() {
            None => bail!("there is no process {root}"),
            Some(member) if member.zombie => bail!("process {root} has ended"),
            Some(_) => Ok(Self { members }),
        }
    }

    pub(crate) fn root(&self) -> i32 {
        self.members.first().map_or(0, |root| root.pid)
    }

    pub(crate) fn pids(&self) -> Vec<i32> {
        self.members.iter().map(|member| member.pid).collect()
    }

    /// A debugger or CRIU holds a process of the tree.
    pub(crate) fn is_traced(&self) -> bool {
        self.members
            .iter()
            .any(|member| tracer_of(member.pid).is_some())
    }

    /// # Errors
    /// A process of the tree belongs to another user.
    pub(crate) fn require_user(&self) -> Result<()> {
        let us = rustix::process::geteuid().as_raw();
        match self.members.iter().find(|member| member.user != us) {
            Some(other) => bail!(
                "process {} ({}) belongs to user {}, and this command runs as user {us}: run it as the owner of the job",
                other.pid,
                other.name,
                other.user
            ),
            None => Ok(()),
        }
    }
}

/// The root of a job, from what a person calls its process id: that of `reverbs run` stands for the one process it started.
///
/// # Errors
/// There is no such process.
pub(crate) fn root_of(pid: i32) -> Result<i32> {
    if pid <= 1 {
        bail!("process {pid} cannot be the root of a job");
    }
    let process = Process::new(pid).map_err(|_| anyhow::anyhow!("there is no process {pid}"))?;
    let arguments = process.cmdline().unwrap_or_default();
    if is_reverbs(pid) && arguments.iter().any(|argument| argument == "run") {
        let tree = ProcessTree::of(pid)?;
        // The job leads a session; launchers that stay (srun) are in ours.
        let mut children = tree
            .members
            .iter()
            .filter(|member| member.parent == pid && member.session == member.pid);
        if let (Some(child), None) = (children.next(), children.next()) {
            return Ok(child.pid);
        }
    }
    Ok(pid)
}

/// Whether the process is another instance of this command.
pub(crate) fn is_reverbs(pid: i32) -> bool {
    let executable = |path: &str| std::fs::metadata(path).map(|file| (file.dev(), file.ino()));
    match (
        executable(&format!("/proc/{pid}/exe")),
        executable("/proc/self/exe"),
    ) {
        (Ok(theirs), Ok(ours)) if theirs == ours => state(pid) != Some('Z'),
        // Another installed version, or one whose file was replaced meanwhile.
        _ => Process::new(pid)
            .and_then(|process| process.stat())
            .is_ok_and(|stat| stat.comm == "reverbs" && stat.state != 'Z'),
    }
}

/// The state letter of /proc/PID/stat.
fn state(pid: i32) -> Option<char> {
    Some(Process::new(pid).ok()?.stat().ok()?.state)
}

/// Whether the process has ended, is ending, or has become another program: then nobody in it will ever answer.
pub(crate) fn agent_is_gone(pid: i32) -> bool {
    // linux/sched.h
    const PF_EXITING: u32 = 4;
    let Ok(threads) = Process::new(pid).and_then(|process| process.tasks()) else {
        return true;
    };
    !threads.flatten().any(|thread| {
        // The first thread is not the agent's, but may be this very command.
        thread.tid != pid
            && thread.stat().is_ok_and(|stat| {
                stat.comm == socket::AGENT_THREAD
                    && stat.flags & PF_EXITING == 0
                    && !matches!(stat.state, 'Z' | 'X')
            })
    })
}

fn tracer_of(pid: i32) -> Option<i32> {
    let tracer = Process::new(pid).ok()?.status().ok()?.tracerpid;
    (tracer != 0).then_some(tracer)
}

/// By SIGSTOP or its like; not by a tracer.
pub(crate) fn is_stopped(pid: i32) -> bool {
    state(pid) == Some('T')
}

/// What may keep a process that lives from answering, and what to do about it.
pub(crate) fn why_silent(pid: i32) -> String {
    if let Some(tracer) = tracer_of(pid) {
        let name = Process::new(tracer)
            .and_then(|tracer| tracer.stat())
            .map_or_else(|_| "?".to_owned(), |stat| stat.comm);
        return format!("process {tracer} ({name}) holds it, wait until that is done");
    }
    if is_stopped(pid) {
        return format!("it is stopped, `kill -CONT {pid}` lets it go on");
    }
    match state(pid) {
        Some('Z') | None => "it has ended".to_owned(),
        Some(_) => "it may still be busy with what it was asked before".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::ProcessTree;

    #[test]
    fn a_tree_has_its_descendants_and_not_its_parent() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "sleep 60 & echo ready; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let root = child.id().cast_signed();
        let tree = loop {
            let tree = ProcessTree::of(root).unwrap();
            assert_eq!(tree.members.len(), 2, "{tree:?}");
            // Until it has become another program the child has its parent's name.
            if tree.members[1].name != "sh" {
                break tree;
            }
        };
        assert_eq!(tree.members[0].pid, root);
        assert_eq!(tree.members[1].name, "sleep");
        tree.require_user().unwrap();
        for pid in tree.pids() {
            rustix::process::kill_process(
                rustix::process::Pid::from_raw(pid).unwrap(),
                rustix::process::Signal::KILL,
            )
            .unwrap();
        }
        // Until it is waited for it stays a zombie, which is not a job.
        rustix::process::waitid(
            rustix::process::WaitId::Pid(rustix::process::Pid::from_raw(root).unwrap()),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        )
        .unwrap();
        assert!(ProcessTree::of(root).is_err());
        child.wait().unwrap();
    }
}
