//! Bringing back the processes of this node from its part of an image.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use procfs::process::Process;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use reverbs::control::message::{DeviceChoice, PROTOCOL_VERSION, Phase, Reply, Request};
use reverbs::control::socket::agent_socket;
use reverbs::image::{Image, Manifest};

use super::claim::Claim;
use super::message::NodeReply;
use super::{devices, requirements};
use crate::command::criu::{Criu, RestoreFailure, WorkFolder};
use crate::command::files::{FilePolicy, cut_back, put_back};
use crate::command::job::{JobLock, NodeId, ProcessTree, ask_once};
use crate::command::network::{
    ForeignBinds, Hold, Namespace, Overlay, forget_closed_connections, is_here, unreachable,
};

/// What is in the way passes within about a second where init is slow to reap; a few more for a busy machine.
const ATTEMPTS: u32 = 8;
const BETWEEN_ATTEMPTS: Duration = Duration::from_secs(1);

/// A part of an image on its way back to life. When this is dropped on the way, what was restored is ended.
#[derive(Debug)]
pub(super) struct Restoring {
    image: Image,
    claim: Claim,
    files: FilePolicy,
    runtime_folder: std::path::PathBuf,
    overlay: Option<Namespace>,
    hold: Option<Hold>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    NothingChanged,
    /// CRIU was started.
    Restored,
    /// The processes are nobody's but their own.
    Kept,
}

impl Restoring {
    /// Checks the image, and that it can be restored here.
    ///
    /// # Errors
    /// It is damaged, or something is in its way: named with the remedy.
    pub(super) fn open(
        claim: Claim,
        files: FilePolicy,
        choices: &[DeviceChoice],
        runtime_folder: &Path,
    ) -> Result<Self> {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        let image = Image::open(claim.folder())?;
        image.verify()?;
        let manifest = &image.manifest;
        Criu::find()?;
        if runtime_folder != manifest.runtime_folder {
            bail!(
                "the job's agents listen in {}: set REVERBS_RUNTIME_DIR to that",
                manifest.runtime_folder.display()
            );
        }
        refuse_half_restored(manifest, runtime_folder)?;
        wait_for_ids(&manifest.ids())?;
        requirements::check(manifest, claim.several_nodes)?;
        devices::check(manifest, choices)?;
        Ok(Self {
            claim,
            files,
            runtime_folder: runtime_folder.to_owned(),
            overlay: None,
            hold: None,
            stage: Stage::NothingChanged,
            image,
        })
    }

    pub(super) fn facts(&self) -> NodeReply {
        let manifest = &self.image.manifest;
        let connected = manifest.addresses.iter().filter(|bound| bound.connected);
        NodeReply::Opened {
            bytes: manifest.bytes(),
            files: manifest.contents.len(),
            processes: manifest.processes.len(),
            agents: self.image.manifest.processes_with_agents(),
            carried: manifest.carried.len(),
            foreign: connected
                .map(|bound| bound.address)
                .filter(|address| !is_here(*address))
                .collect(),
            addresses: manifest
                .addresses
                .iter()
                .map(|bound| bound.address)
                .collect(),
        }
    }

    pub(super) fn root(&self) -> i32 {
        self.image.manifest.root
    }

    pub(super) fn take_lock(&mut self) -> Result<JobLock> {
        self.claim
            .lock
            .take()
            .context("the job is restored already")
    }

    pub(super) fn join(&mut self, overlay: &Overlay, node: NodeId) -> Result<()> {
        self.overlay = Some(overlay.enter(usize::try_from(node.0)?)?);
        Ok(())
    }

    pub(super) fn put_files(&mut self) -> Result<NodeReply> {
        let manifest = &self.image.manifest;
        let mut notes = match self.overlay {
            Some(_) => Vec::new(),
            None => unreachable(&manifest.addresses),
        };
        cut_back(
            &manifest.written_files,
            self.files,
            self.claim.label(),
            &mut notes,
        )?;
        let restored = put_back(
            &manifest.carried,
            &self.image.files_folder(),
            self.files,
            self.claim.label(),
            &mut notes,
        )?;
        for process in &manifest.processes {
            // Left by a process of that id; the restored one binds the name again.
            let _ = std::fs::remove_file(agent_socket(&self.runtime_folder, process.pid));
        }
        Ok(NodeReply::Files { restored, notes })
    }

    pub(super) fn hold(&mut self) -> Result<()> {
        let ours = Namespace::default();
        let manifest = &self.image.manifest;
        self.hold = Some(Hold::on(
            self.overlay.as_ref().unwrap_or(&ours),
            manifest.root,
            &manifest.connections,
        )?);
        Ok(())
    }

    pub(super) fn let_arrive(&mut self) {
        self.hold = None;
    }

    pub(super) fn restore(&mut self, outputs: &Outputs) -> Result<()> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .context("cannot become the parent of the restored job")?;
        let work = WorkFolder::create(&self.runtime_folder, self.image.manifest.root)?;
        let _foreign_binds = match self.overlay {
            Some(_) => None,
            None => Some(ForeignBinds::allow(&self.image.manifest.addresses)?),
        };
        let namespace = self.overlay.take().unwrap_or_default();
        let criu = Criu::find_in(namespace)?;
        self.stage = Stage::Restored;
        let manifest = &self.image.manifest;
        let inherit: Vec<(String, BorrowedFd<'_>)> = manifest
            .outside_pipes
            .iter()
            .map(|pipe| {
                let to = outputs.of(pipe.written, pipe.descriptor);
                (format!("pipe:[{}]", pipe.inode), to)
            })
            .collect();
        for attempt in 1.. {
            forget_closed_connections(
                criu.namespace(),
                &manifest.listening_ports,
                &manifest.connections,
            );
            let folder = self.image.criu_folder();
            match criu.restore(&folder, &work, &manifest.criu.options, &inherit) {
                Ok(()) => break,
                Err(RestoreFailure { may_pass: true, .. }) if attempt < ATTEMPTS => {
                    std::thread::sleep(BETWEEN_ATTEMPTS);
                }
                Err(failure) => bail!(
                    "{}; the job was not restarted, the image is as it was",
                    failure.reason
                ),
            }
        }
        Ok(())
    }

    /// Ends what was restored, and what that has started. It is below us, as we are the nearest subreaper; another process that
    /// happens to have an id of the image is not.
    pub(super) fn kill(&mut self) {
        if self.stage != Stage::Restored {
            return;
        }
        self.stage = Stage::NothingChanged;
        let Ok(tree) = ProcessTree::of(std::process::id().cast_signed()) else {
            return;
        };
        let mut restored: BTreeSet<i32> = self.image.manifest.ids().into_iter().collect();
        // Parents come before their children.
        for member in &tree.members {
            if restored.contains(&member.parent) {
                restored.insert(member.pid);
            }
            if restored.contains(&member.pid)
                && let Some(pid) = Pid::from_raw(member.pid)
            {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }

    pub(super) fn keep(&mut self) {
        self.stage = Stage::Kept;
        self.claim.remove_copy();
    }

    /// Returns when none of the restored processes is left.
    pub(super) fn await_end(&self) {
        const LOOK: Duration = Duration::from_millis(500);
        let ids = self.image.manifest.ids();
        while ids.iter().any(|pid| {
            let state = Process::new(*pid).and_then(|process| process.stat());
            state.is_ok_and(|stat| stat.state != 'Z')
        }) {
            std::thread::sleep(LOOK);
        }
    }

    /// We are the nearest subreaper of what CRIU restored, so its root is our child now.
    pub(super) fn wait_for_root(&self, outputs: &mut Outputs) -> Result<u8> {
        let root = Pid::from_raw(self.root()).context("process id 0")?;
        loop {
            match waitpid(Some(root), WaitOptions::empty()) {
                Ok(Some((_, status))) => {
                    let code = status
                        .exit_status()
                        .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
                        .unwrap_or(1);
                    outputs.finish()?;
                    return Ok(u8::try_from(code).unwrap_or(1));
                }
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait for the job"),
            }
        }
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        // A CRIU that was killed leaves what it had begun, and a first node that is gone leaves us with our part.
        self.kill();
    }
}

/// A restart that was killed behind CRIU's back has left the whole job, waiting for its hardware.
fn refuse_half_restored(manifest: &Manifest, runtime_folder: &Path) -> Result<()> {
    let hello = Request::Hello {
        version: PROTOCOL_VERSION,
    };
    for process in manifest.processes.iter().filter(|one| one.rdma.is_some()) {
        // Whoever does not answer is in the way of the restart as any other process of that id.
        if let Ok(Some(Reply::Hello { phase, .. })) = ask_once(runtime_folder, process.pid, &hello)
            && phase != Phase::Running
        {
            bail!(
                "process {} of the image is there already, in phase {phase:?}: after a restart that was killed, \
                 `reverbs resume {}` lets the job run on",
                process.pid,
                manifest.root
            );
        }
    }
    Ok(())
}

/// Every id of the image must be free. One of a process that is just ending may take a moment.
fn wait_for_ids(ids: &[i32]) -> Result<()> {
    let us = std::process::id().cast_signed();
    if ids.contains(&us) {
        bail!(
            "process id {us} of the image is that of this very command: run it once more, it will get another"
        );
    }
    let taken = |id: &i32| Path::new(&format!("/proc/{id}")).exists();
    for attempt in 1..=ATTEMPTS {
        let Some(id) = ids.iter().find(|id| taken(id)) else {
            break;
        };
        if attempt == ATTEMPTS {
            let name = std::fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
            bail!(
                "process id {id} of the image is taken by \"{}\": end it (does the job still run, or is it just being \
                 restored?), or restart on another host",
                name.trim()
            );
        }
        std::thread::sleep(BETWEEN_ATTEMPTS);
    }
    if let Some(highest) = ids.iter().max() {
        // So that CRIU's own helpers do not take ids of the image. Needs the same privilege as CRIU does.
        let last = "/proc/sys/kernel/ns_last_pid";
        let now = std::fs::read_to_string(last)
            .ok()
            .and_then(|text| text.trim().parse::<i32>().ok());
        let range = ids.first().copied().unwrap_or(0) - 100..=*highest;
        if now.is_none_or(|now| range.contains(&now)) {
            let _ = std::fs::write(last, highest.to_string());
        }
    }
    Ok(())
}

/// Where what the job wrote to pipes goes from now on. Pipes again, since CRIU opens anew what it inherits, which only a
/// pipe survives: a file would be written from its beginning. `cat` empties them for as long as the job lives.
#[derive(Debug)]
pub(crate) struct Outputs {
    output: Option<File>,
    error: Option<File>,
    nothing: File,
    copiers: Vec<Child>,
}

impl Outputs {
    /// Drops everything.
    ///
    /// # Errors
    /// There is no /dev/null.
    pub(crate) fn none() -> Result<Self> {
        Ok(Self {
            output: None,
            error: None,
            nothing: File::options().read(true).write(true).open("/dev/null")?,
            copiers: Vec::new(),
        })
    }

    /// Into a file, or to where this command's own output goes.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn to(path: Option<&Path>) -> Result<Self> {
        let (output, error) = match path {
            Some(path) => {
                let file = File::options()
                    .append(true)
                    .create(true)
                    .open(path)
                    .with_context(|| format!("cannot write to {}", path.display()))?;
                (file.try_clone()?, file)
            }
            None => (
                std::io::stdout().as_fd().try_clone_to_owned()?.into(),
                std::io::stderr().as_fd().try_clone_to_owned()?.into(),
            ),
        };
        let mut outputs = Self::none()?;
        outputs.output = Some(pipe_to(output, &mut outputs.copiers)?);
        outputs.error = Some(pipe_to(error, &mut outputs.copiers)?);
        Ok(outputs)
    }

    fn of(&self, written: bool, descriptor: i32) -> BorrowedFd<'_> {
        let to = match (written, descriptor) {
            (false, _) => None,
            (true, 2) => self.error.as_ref(),
            (true, _) => self.output.as_ref(),
        };
        to.unwrap_or(&self.nothing).as_fd()
    }

    /// Waits until everything is written.
    fn finish(&mut self) -> Result<()> {
        (self.output, self.error) = (None, None);
        for mut copier in self.copiers.drain(..) {
            copier.wait()?;
        }
        Ok(())
    }
}

fn pipe_to(target: File, copiers: &mut Vec<Child>) -> Result<File> {
    let (reader, writer) = std::io::pipe()?;
    let copier = Command::new("cat")
        .stdin(reader)
        .stdout(target)
        .stderr(Stdio::null())
        // Ctrl-C ends this command, and not the output of the job.
        .process_group(0)
        .spawn()
        .context("cannot start `cat` for the output of the job")?;
    copiers.push(copier);
    Ok(OwnedFd::from(writer).into())
}
