//! The part of a job on one node, and what is asked of it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use procfs::process::Process;

use reverbs::control::message::{ProcessStatus, Reply, Request};

use super::claim::Claim;
use super::message::{NodeReply, NodeRequest};
use super::restore::{Outputs, Restoring};
use super::save::{Findings, Saving};
use crate::command::job::{JobLock, NodeId, ProcessTree, SocketAgents};
use crate::command::network::tcp_lock;
use crate::command::preflight;

/// How long a node may take to notice that the first one is gone.
const LETTING_GO: Duration = Duration::from_secs(30);

/// Names the job in the environment of all its processes.
pub(crate) const JOB_VARIABLE: &str = "REVERBS_JOB";

/// One node of a job. What it holds it lets go of when dropped: frozen processes run on, held connections go on, and the job
/// can be driven by others.
#[derive(Debug)]
pub(crate) struct Part {
    node: NodeId,
    runtime_folder: PathBuf,
    attached: Option<Attached>,
    claim: Option<Claim>,
    restoring: Option<Restoring>,
    outputs: Outputs,
}

/// A tree of processes that runs here.
#[derive(Debug)]
struct Attached {
    root: i32,
    agents: SocketAgents,
    findings: Option<Findings>,
    saving: Option<Saving>,
    /// While it is driven, and not only looked at.
    _lock: Option<JobLock>,
}

impl Part {
    /// `outputs` is where restored processes write what they wrote to pipes.
    pub(crate) fn new(node: NodeId, runtime_folder: PathBuf, outputs: Outputs) -> Self {
        Self {
            node,
            runtime_folder,
            attached: None,
            claim: None,
            restoring: None,
            outputs,
        }
    }

    /// Does what is asked.
    ///
    /// # Errors
    /// Why it was not done, for people.
    pub(crate) fn handle(&mut self, request: &NodeRequest) -> Result<NodeReply> {
        match request {
            NodeRequest::Attach {
                roots,
                job,
                driving,
            } => self.attach(roots, job.as_deref(), *driving)?,
            NodeRequest::Claim { parts } => {
                let index = usize::try_from(self.node.0)?;
                let part = parts.get(index).context("the image has no such part")?;
                let lock = self.lock(part.root)?;
                let claim = Claim::new(part.clone(), parts.len() > 1, lock);
                let here = claim.is_here();
                self.claim = Some(claim);
                return Ok(NodeReply::Claimed { here });
            }
            NodeRequest::Open { files, devices } => {
                let claim = self.claim.take().context("nobody has claimed a part")?;
                let restoring = Restoring::open(claim, *files, devices, &self.runtime_folder)?;
                let opened = restoring.facts();
                self.restoring = Some(restoring);
                return Ok(opened);
            }
            NodeRequest::Join { .. }
            | NodeRequest::PutFiles
            | NodeRequest::Hold
            | NodeRequest::Restore
            | NodeRequest::LetArrive
            | NodeRequest::Kill
            | NodeRequest::Keep { .. }
            | NodeRequest::AwaitEnd => return self.restore(request),
            _ => return self.attached()?.handle(request),
        }
        Ok(NodeReply::Done)
    }

    /// The first node has the lock of the whole job. On the others a command that was killed there may not be noticed yet.
    fn lock(&self, root: i32) -> Result<JobLock> {
        let patience = match self.node {
            NodeId::FIRST => Duration::ZERO,
            _ => LETTING_GO,
        };
        JobLock::take_within(patience, &self.runtime_folder, root)
    }

    fn attached(&mut self) -> Result<&mut Attached> {
        self.attached.as_mut().context("no job is attached")
    }

    fn attach(&mut self, roots: &[i32], job: Option<&str>, driving: bool) -> Result<()> {
        let index = usize::try_from(self.node.0)?;
        let root = *roots.get(index).context("the job has no such node")?;
        let tree = ProcessTree::of(root)?;
        tree.require_user()?;
        if let Some(job) = job {
            let environment = Process::new(root)?.environ()?;
            let found = environment.get(std::ffi::OsStr::new(JOB_VARIABLE));
            ensure!(
                found.is_some_and(|found| found == job),
                "process {root} is not the one that was started for the job: that one has ended"
            );
        }
        self.attached = Some(Attached {
            root,
            agents: SocketAgents::new(self.node, root, self.runtime_folder.clone()),
            findings: None,
            saving: None,
            _lock: match driving {
                true => Some(self.lock(root)?),
                false => None,
            },
        });
        Ok(())
    }

    fn restore(&mut self, request: &NodeRequest) -> Result<NodeReply> {
        let node = self.node;
        let Some(restoring) = self.restoring.as_mut() else {
            // Where nothing was opened, nothing has to be ended.
            ensure!(*request == NodeRequest::Kill, "no image is open");
            self.claim = None;
            return Ok(NodeReply::Done);
        };
        match request {
            NodeRequest::Join { overlay } => restoring.join(overlay, node)?,
            NodeRequest::PutFiles => return restoring.put_files(),
            NodeRequest::Hold => restoring.hold()?,
            NodeRequest::Restore => {
                restoring.restore(&self.outputs)?;
                let root = restoring.root();
                self.attached = Some(Attached {
                    root,
                    agents: SocketAgents::new(node, root, self.runtime_folder.clone()),
                    findings: None,
                    saving: None,
                    _lock: Some(restoring.take_lock()?),
                });
            }
            NodeRequest::LetArrive => restoring.let_arrive(),
            NodeRequest::Kill => {
                restoring.kill();
                self.restoring = None;
            }
            NodeRequest::Keep { secret } => {
                if let Some((job, secret)) = secret {
                    secret.keep(&self.runtime_folder, job)?;
                }
                restoring.keep();
                // The job can be checkpointed again, while somebody waits for it.
                self.attached = None;
            }
            NodeRequest::AwaitEnd => restoring.await_end(),
            _ => bail!("\"{}\" is no step of a restart", request.name()),
        }
        Ok(NodeReply::Done)
    }

    /// The exit status of the restored root, which is a child of ours; only after [`NodeRequest::Keep`].
    ///
    /// # Errors
    /// It cannot be waited for.
    pub(crate) fn wait_for_root(&mut self) -> Result<u8> {
        let restoring = self.restoring.as_mut().context("no image is open")?;
        restoring.wait_for_root(&mut self.outputs)
    }
}

impl Attached {
    fn handle(&mut self, request: &NodeRequest) -> Result<NodeReply> {
        Ok(match request {
            NodeRequest::Scan => NodeReply::Agents {
                agents: self.agents.scan(),
            },
            NodeRequest::Ask { targets, request } => {
                let node = self.agents.node();
                let here: Vec<i32> = targets
                    .iter()
                    .filter(|process| process.node == node)
                    .map(|process| process.pid)
                    .collect();
                NodeReply::Answers {
                    answers: self.agents.ask_all(&here, request),
                }
            }
            NodeRequest::Leave { numbers } => {
                self.agents.publish(numbers)?;
                NodeReply::Done
            }
            NodeRequest::Whose { peer, device } => NodeReply::Whose {
                whose: self.agents.whose(peer, device.as_deref())?,
            },
            NodeRequest::Unlock => {
                let tree = ProcessTree::of(self.root)?;
                if !tree.is_traced() {
                    // A CRIU that was killed together with the command, and not one that is still at work.
                    tcp_lock::release(self.root, &tree.pids());
                }
                NodeReply::Done
            }
            NodeRequest::Examine { largest_deleted } => {
                let statuses = self.statuses()?;
                let findings = Findings::of(self.root, *largest_deleted, statuses)?;
                let examined = NodeReply::Examined {
                    processes: findings.processes(),
                    bytes: findings.resident_bytes(),
                };
                self.findings = Some(findings);
                examined
            }
            NodeRequest::Save {
                parts,
                image,
                divided,
                stop,
            } => {
                self.agents.hang_up()?;
                let findings = self.findings.take().context("nobody has examined it")?;
                let folder = match divided {
                    true => parts.join(self.agents.node().0.to_string()),
                    false => parts.clone(),
                };
                let (saving, saved) = Saving::begin(findings, parts, &folder, image, *stop)?;
                self.saving = Some(saving);
                saved
            }
            NodeRequest::Seal { phases } => NodeReply::Sealed {
                bytes: self.saving()?.seal(phases)?,
            },
            NodeRequest::Decide { done } => {
                if let Some(saving) = &mut self.saving {
                    saving.decide(*done)?;
                }
                NodeReply::Done
            }
            _ => bail!("\"{}\" is no step of a checkpoint", request.name()),
        })
    }

    fn saving(&mut self) -> Result<&mut Saving> {
        self.saving.as_mut().context("nothing was saved")
    }

    /// As the agents describe themselves, before anything is released.
    fn statuses(&mut self) -> Result<Vec<ProcessStatus>> {
        let mut pids = Vec::new();
        for found in self.agents.scan() {
            match found {
                Ok(hello) => pids.push(hello.process.pid),
                Err(silent) => bail!("process {}: {}", silent.process.pid, silent.why),
            }
        }
        let mut statuses = Vec::new();
        for (process, answer) in self.agents.ask_all(&pids, &Request::Status) {
            match answer {
                Ok(Reply::Status { status }) => statuses.push(status),
                Ok(other) => bail!("process {}: it answers Status with {other:?}", process.pid),
                // Ended meanwhile.
                Err(crate::command::job::AgentFailure::Ended) => {}
                Err(crate::command::job::AgentFailure::Broken(why)) => {
                    bail!("process {}: {why}", process.pid)
                }
            }
        }
        Ok(statuses)
    }
}

/// What a tree has that its restart will need, looked at before and while it is saved.
pub(super) fn examine(
    root: i32,
    largest_deleted: u64,
) -> Result<(
    ProcessTree,
    crate::command::files::Held,
    preflight::Findings,
)> {
    let tree = ProcessTree::of(root)?;
    let held = crate::command::files::survey(&tree.pids());
    let findings = preflight::examine(&tree, &held, largest_deleted)?;
    Ok((tree, held, findings))
}
