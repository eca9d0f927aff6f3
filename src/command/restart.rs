//! `reverbs restart`: a job from its image.

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use reverbs::image::{Image, JobImage};

use super::cli::RestartOptions;
use super::interrupt::Interrupt;
use super::job::{Driver, NodeId, new_session};
use super::network::{Overlay, OverlayNode};
use super::node::{ImagePart, NodeReply, NodeRequest, Outputs};
use super::nodes::{Direction, Ensemble, JobRecord, Launcher, Parcel, RecordedNode, copy_all};
use super::progress::{Progress, bytes, count};
use super::secret::Secret;

/// # Errors
/// The image is refused, or the job could not be brought back. The image stays as it is.
#[expect(clippy::print_stdout)]
pub(crate) fn restart(options: &RestartOptions, quiet: bool) -> Result<ExitCode> {
    let mut restarted = restart_job(options, quiet)?;
    println!("{}", restarted.root());
    if options.wait {
        return restarted.wait();
    }
    Ok(ExitCode::SUCCESS)
}

/// A job that runs again.
#[derive(Debug)]
pub(crate) struct Restarted {
    job: Ensemble,
    plan: Plan,
}

impl Restarted {
    /// Root of its process tree on this node.
    pub(crate) fn root(&self) -> i32 {
        self.plan.root
    }

    /// Waits for it. Gives its exit status.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub(crate) fn wait(&mut self) -> Result<ExitCode> {
        let status = self.job.own_part().wait_for_root()?;
        self.plan.launcher.let_command_finish(self.plan.root)?;
        if self.plan.launcher.is_step {
            // Ending before that, the steps would take along what is left on their nodes.
            self.job.tell(NodeRequest::AwaitEnd);
        }
        Ok(ExitCode::from(status))
    }
}

/// Brings a job back, and leaves it running.
///
/// # Errors
/// As [`restart`].
pub(crate) fn restart_job(options: &RestartOptions, quiet: bool) -> Result<Restarted> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let mut progress = Progress::new(quiet);
    let plan = Plan::of(options)?;
    let interrupt = Interrupt::install()?;
    let outputs = Outputs::to(options.output.as_deref())?;
    let mut job = Ensemble::for_restart(
        plan.root,
        plan.nodes.iter().map(|node| node.now.clone()).collect(),
        plan.launcher.clone(),
        outputs,
    )?;
    let restarted = bring_back(&mut job, &plan, options, &mut progress, &interrupt);
    if let Err(error) = restarted {
        job.tell(NodeRequest::Kill);
        return Err(error.context("the job was not restarted; the image is as it was"));
    }
    if !plan.launcher.is_step {
        job.hang_up();
    }
    Ok(Restarted { job, plan })
}

/// What is restored where.
#[derive(Debug)]
struct Plan {
    root: i32,
    /// Of a job over several nodes.
    job: Option<String>,
    nodes: Vec<PlannedNode>,
    launcher: Launcher,
}

#[derive(Debug)]
struct PlannedNode {
    part: ImagePart,
    bytes: u64,
    /// The node that takes its place.
    now: String,
}

impl Plan {
    fn of(options: &RestartOptions) -> Result<Self> {
        let launcher = Launcher::find(options.remote.program.as_deref());
        let label = |name: &std::path::Path| {
            let name = name.file_name().unwrap_or_default();
            name.to_string_lossy().into_owned()
        };
        if !JobImage::is_at(&options.image) {
            ensure!(
                options.nodes.is_empty(),
                "{} is the image of a job of one node: --node has no meaning for it",
                options.image.display()
            );
            let image = Image::open(&options.image)?;
            let root = image.manifest.root;
            let bytes = image.manifest.bytes();
            let part = ImagePart {
                label: label(&image.folder),
                // There is no other node.
                copy: image.folder.clone(),
                folder: image.folder,
                root,
            };
            return Ok(Self {
                root,
                job: None,
                nodes: vec![PlannedNode {
                    part,
                    bytes,
                    now: String::new(),
                }],
                launcher,
            });
        }
        ensure!(
            options.wait || !launcher.is_step,
            "what {} has started on the other nodes ends with it: use --wait, or give --rsh another program",
            launcher.name()
        );
        let image = JobImage::open(&options.image)?;
        let mut nodes: Vec<PlannedNode> = Vec::new();
        for known in &image.manifest.nodes {
            nodes.push(PlannedNode {
                part: ImagePart {
                    folder: image.node_folder(known),
                    copy: image.copied_folder(known),
                    label: format!("{}.{}", label(&image.folder), known.name),
                    root: known.root,
                },
                bytes: known.bytes,
                now: known.name.clone(),
            });
        }
        if let Some(first) = nodes.first_mut() {
            // The command is used on what is to be the first node, whatever it is called.
            let system = rustix::system::uname();
            first.now = system.nodename().to_string_lossy().into_owned();
        }
        for moved in &options.nodes {
            let mut places = image.manifest.nodes.iter();
            let Some(place) = places.position(|node| node.name == moved.from) else {
                let names: Vec<_> = image
                    .manifest
                    .nodes
                    .iter()
                    .map(|node| &*node.name)
                    .collect();
                bail!(
                    "the job had no node {}; it had {}",
                    moved.from,
                    names.join(", ")
                );
            };
            nodes[place].now.clone_from(&moved.to);
        }
        let root = nodes.first().context("an image without nodes")?.part.root;
        Ok(Self {
            root,
            job: Some(image.manifest.id),
            nodes,
            launcher,
        })
    }

    /// Parts that their nodes do not see.
    fn parcels(&self, claimed: &[(NodeId, NodeReply)]) -> Result<Vec<Parcel>> {
        let mut parcels = Vec::new();
        for ((node, reply), planned) in claimed.iter().zip(&self.nodes) {
            if !matches!(reply, NodeReply::Claimed { here: false }) {
                continue;
            }
            let here = planned.part.folder.clone();
            ensure!(
                *node != NodeId::FIRST && here.is_dir(),
                "{} is missing: the image is damaged, use another one",
                here.display()
            );
            parcels.push(Parcel {
                node: planned.now.clone(),
                there: planned.part.copy.clone(),
                here,
                bytes: planned.bytes,
            });
        }
        Ok(parcels)
    }
}

fn bring_back(
    job: &mut Ensemble,
    plan: &Plan,
    options: &RestartOptions,
    progress: &mut Progress,
    interrupt: &Interrupt,
) -> Result<()> {
    let claimed = job.all(NodeRequest::Claim {
        parts: plan.nodes.iter().map(|node| node.part.clone()).collect(),
    })?;
    let parcels = plan.parcels(&claimed)?;
    copy_all(
        &plan.launcher,
        Direction::Send,
        &parcels,
        progress,
        interrupt,
    )?;

    let began = Instant::now();
    let files = options.files;
    let devices = options.devices.choices.clone();
    let opened = Opened::of(job.all(NodeRequest::Open { files, devices })?);
    progress.phase(
        "verify",
        began.elapsed(),
        &format!(
            "{}, {}",
            bytes(opened.bytes),
            count(opened.files, "file", "files")
        ),
    );
    join_networks(job, plan, &opened, progress)?;

    let began = Instant::now();
    let mut restored = 0;
    for (node, reply) in job.all(NodeRequest::PutFiles)? {
        if let NodeReply::Files {
            restored: here,
            notes,
        } = reply
        {
            restored += here;
            for note in notes {
                match job.node_name(node) {
                    Some(name) => progress.note(&format!("node {name}: {note}")),
                    None => progress.note(&note),
                }
            }
        }
    }
    progress.phase(
        "files",
        began.elapsed(),
        &format!("{restored} of {} carried put back", opened.carried),
    );
    interrupt.check()?;

    let began = Instant::now();
    if job.has_others() {
        job.all(NodeRequest::Hold)?;
    }
    job.all(NodeRequest::Restore)?;
    progress.phase(
        "restore",
        began.elapsed(),
        &count(opened.processes, "process", "processes"),
    );
    job.all(NodeRequest::LetArrive)?;
    leave_record(plan)?;

    let mut driver = Driver::new(
        job,
        progress,
        Interrupt::default(),
        new_session()?,
        options.devices.choices.clone(),
    );
    let found = driver.attach_abandoned()?;
    if found < opened.agents {
        bail!(
            "only {found} of {} processes that used RDMA answer",
            opened.agents
        );
    }
    driver.restore_service()?;
    let secret = plan.job.iter().map(|id| Ok((id.clone(), Secret::fresh()?)));
    let secret = secret.collect::<Result<Vec<_>>>()?.pop();
    job.all(NodeRequest::Keep { secret })?;
    Ok(())
}

/// What the nodes say of their parts, all together.
#[derive(Debug, Default)]
struct Opened {
    bytes: u64,
    files: usize,
    processes: usize,
    agents: usize,
    carried: usize,
    /// Addresses that are needed and not there.
    foreign: Vec<IpAddr>,
    /// By node.
    addresses: Vec<Vec<IpAddr>>,
}

impl Opened {
    fn of(replies: Vec<(NodeId, NodeReply)>) -> Self {
        let mut sum = Self::default();
        for (_, reply) in replies {
            if let NodeReply::Opened {
                bytes,
                files,
                processes,
                agents,
                carried,
                foreign,
                addresses,
            } = reply
            {
                sum.bytes += bytes;
                sum.files += files;
                sum.processes += processes;
                sum.agents += agents;
                sum.carried += carried;
                sum.foreign.extend(foreign);
                sum.addresses.push(addresses);
            }
        }
        sum
    }
}

/// Where addresses of the job are not there any more, its processes get a network in which they are.
fn join_networks(
    job: &mut Ensemble,
    plan: &Plan,
    opened: &Opened,
    progress: &Progress,
) -> Result<()> {
    let Some(foreign) = opened.foreign.first() else {
        return Ok(());
    };
    progress.note(&format!(
        "the job has TCP connections at {foreign}, which is not there: it gets a network of its own, with its old addresses"
    ));
    let nodes = plan.nodes.iter().zip(&opened.addresses);
    let overlay = Overlay {
        network: network_number(plan),
        nodes: nodes
            .map(|(node, addresses)| OverlayNode {
                host: node.now.clone(),
                addresses: addresses.clone(),
            })
            .collect(),
    };
    job.all(NodeRequest::Join { overlay })?;
    Ok(())
}

/// 24 bits that tell this job from others on the same nodes.
fn network_number(plan: &Plan) -> u32 {
    let text = plan.job.clone().unwrap_or_else(|| plan.root.to_string());
    crc32fast::hash(text.as_bytes()) & 0x00ff_ffff
}

/// The job can be found again under its new nodes.
fn leave_record(plan: &Plan) -> Result<()> {
    let Some(id) = &plan.job else {
        return Ok(());
    };
    let record = JobRecord {
        id: id.clone(),
        launcher: plan.launcher.clone(),
        nodes: plan
            .nodes
            .iter()
            .map(|node| RecordedNode {
                name: node.now.clone(),
                root: node.part.root,
            })
            .collect(),
        starting: Vec::new(),
    };
    record.write(&reverbs::control::socket::runtime_dir()?)
}
