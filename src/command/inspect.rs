//! `reverbs inspect`: what is in an image.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use super::cli::InspectOptions;
use super::progress::{bytes, count};
use super::status::describe;
use reverbs::image::{Image, JobImage, JobManifest, Manifest};

/// # Errors
/// It is no image of this version and this user, or it is damaged.
#[expect(clippy::print_stdout)]
pub(crate) fn inspect(options: &InspectOptions) -> Result<ExitCode> {
    if JobImage::is_at(&options.image) {
        return inspect_job(options);
    }
    let image = Image::open(&options.image)?;
    if !options.trust {
        image.verify()?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&image.manifest)?);
    } else {
        print!("{}", summary(&image.manifest));
    }
    Ok(ExitCode::SUCCESS)
}

/// A job, and what each of its nodes has.
#[derive(Serialize)]
struct WholeJob {
    job: JobManifest,
    /// In the order of the job's nodes.
    parts: Vec<Manifest>,
}

#[expect(clippy::print_stdout)]
fn inspect_job(options: &InspectOptions) -> Result<ExitCode> {
    let job = JobImage::open(&options.image)?;
    let mut parts = Vec::new();
    for node in &job.manifest.nodes {
        let part = Image::open(&job.node_folder(node))?;
        if !options.trust {
            part.verify()?;
        }
        parts.push(part.manifest);
    }
    let whole = WholeJob {
        job: job.manifest,
        parts,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&whole)?);
        return Ok(ExitCode::SUCCESS);
    }
    let size = whole.job.nodes.iter().map(|node| node.bytes).sum();
    println!(
        "{}, {}, {}",
        count(whole.job.nodes.len(), "node", "nodes"),
        bytes(size),
        if whole.job.stopped {
            "stopped"
        } else {
            "ran on"
        }
    );
    for (node, part) in whole.job.nodes.iter().zip(&whole.parts) {
        println!("\nnode {}", node.name);
        print!("{}", summary(part));
    }
    Ok(ExitCode::SUCCESS)
}

fn summary(manifest: &Manifest) -> String {
    let mut lines = vec![
        format!(
            "job {} of user {} on {} ({}), {}{}",
            manifest.root,
            manifest.user,
            manifest.host,
            manifest.kernel,
            manifest.created,
            if manifest.stopped {
                ", stopped"
            } else {
                ", ran on"
            }
        ),
        format!(
            "reverbs {}, CRIU {} {}",
            manifest.reverbs,
            manifest.criu.version,
            manifest.criu.options.join(" ")
        ),
        format!(
            "{} in {}",
            bytes(manifest.bytes()),
            count(manifest.contents.len(), "file", "files")
        ),
    ];
    for process in &manifest.processes {
        lines.push(format!(
            "process {} (parent {}): {}",
            process.pid,
            process.parent,
            if process.command_line.is_empty() {
                process.name.clone()
            } else {
                process.command_line.join(" ")
            }
        ));
    }
    for item in &manifest.carried {
        lines.push(format!("carries {}", item.path.display()));
    }
    for file in &manifest.written_files {
        lines.push(format!(
            "expects {} with {} bytes",
            file.path.display(),
            file.length
        ));
    }
    for pipe in &manifest.outside_pipes {
        lines.push(format!(
            "process {} {} a pipe from outside as file descriptor {}",
            pipe.process,
            if pipe.written {
                "writes to"
            } else {
                "reads from"
            },
            pipe.descriptor
        ));
    }
    for phase in &manifest.phases {
        lines.push(format!("{:<10} {:8.3} s", phase.phase, phase.seconds));
    }
    let mut text = lines.join("\n") + "\n";
    for status in manifest
        .processes
        .iter()
        .filter_map(|process| process.rdma.as_ref())
    {
        text.push_str(&describe(status));
    }
    text
}
