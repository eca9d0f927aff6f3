//! `reverbs status`: the processes of a job as their agents describe them.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde::Serialize;

use reverbs::control::message::{ContextStatus, PortNumbers, ProcessStatus, Reply, Request};
use reverbs::control::socket::runtime_dir;

use super::cli::StatusOptions;
use super::job::{AgentFailure, Agents, ask_once, listening, root_of};
use super::nodes::Ensemble;
use super::progress::count;

/// # Errors
/// There is no such job, none of its processes runs under reverbs, or one does not answer.
#[expect(clippy::print_stdout)]
pub(crate) fn status(options: &StatusOptions) -> Result<ExitCode> {
    let found = match options.pid {
        Some(pid) => of_job(pid)?,
        None => of_this_host()?,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        for process in &found {
            if let Some(node) = &process.node {
                print!("{node}: ");
            }
            print!("{}", describe(&process.status));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A process, and its node where there are several.
#[derive(Debug, Serialize)]
struct Found {
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    #[serde(flatten)]
    status: ProcessStatus,
}

fn of_job(pid: i32) -> Result<Vec<Found>> {
    let mut job = Ensemble::look_at(root_of(pid)?)?;
    let mut agents = Vec::new();
    for agent in job.scan() {
        match agent {
            Ok(hello) => agents.push(hello.process),
            Err(silent) => bail!("{}: {}", job.name(silent.process), silent.why),
        }
    }
    let mut found = Vec::new();
    for (process, answer) in job.ask(&agents, &Request::Status) {
        let said = match answer {
            Ok(Reply::Status { status }) => {
                let node = job.node_name(process.node).map(str::to_owned);
                found.push(Found { node, status });
                continue;
            }
            Ok(Reply::Refused { reason, .. }) => reason,
            Ok(other) => format!("it answers Status with {other:?}"),
            Err(AgentFailure::Broken(why)) => why,
            Err(AgentFailure::Ended) => continue,
        };
        bail!("{}: {said}", job.name(process));
    }
    if found.is_empty() {
        bail!("no process of job {pid} runs under reverbs");
    }
    Ok(found)
}

fn of_this_host() -> Result<Vec<Found>> {
    let runtime_dir = runtime_dir()?;
    let mut found = Vec::new();
    for pid in listening(&runtime_dir)? {
        match ask_once(&runtime_dir, pid, &Request::Status)? {
            Some(Reply::Status { status }) => found.push(Found { node: None, status }),
            Some(Reply::Refused { reason, .. }) => bail!("process {pid}: {reason}"),
            Some(other) => bail!("process {pid} answers Status with {other:?}"),
            None => {}
        }
    }
    Ok(found)
}

/// The process for people: what the application sees beside what the hardware calls it now.
pub(crate) fn describe(process: &ProcessStatus) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "process {}  {:?}  {}  rdma-core {}",
        process.pid,
        process.phase,
        count(
            usize::try_from(process.rebuilds).unwrap_or(usize::MAX),
            "rebuild",
            "rebuilds"
        ),
        process.rdma_core
    );
    for context in &process.contexts {
        describe_context(&mut text, context);
    }
    if let Some(chaos) = &process.chaos {
        let (cycles, skipped) = (chaos.cycles, chaos.skipped);
        let _ = write!(text, "  chaos: {cycles} cycles, {skipped} skipped");
        let last = chaos.last_skip.as_ref();
        let _ = writeln!(
            text,
            "{}",
            last.map_or_else(String::new, |why| format!(", the last: {why}"))
        );
    }
    for note in &process.notes {
        let _ = writeln!(text, "  note: {note}");
    }
    text
}

fn describe_context(text: &mut String, context: &ContextStatus) {
    use std::fmt::Write as _;
    let _ = writeln!(
        text,
        "  device {} on {}: {} queue pairs, {} regions, {} CQs, {} SRQs, {} PDs, {} AHs, {} channels",
        context.device,
        context.hardware_device,
        context.queue_pairs.len(),
        context.memory_regions.len(),
        context.completion_queues,
        context.shared_receive_queues,
        context.protection_domains,
        context.address_handles,
        context.completion_channels
    );
    if context.responder_psn_is_live == Some(false) {
        let _ = writeln!(
            text,
            "    this device does not tell how far responders came: messages are counted"
        );
    }
    for port in &context.ports {
        describe_port(text, port);
    }
    if !context.queue_pairs.is_empty() {
        let mut table = plain_table(&["queue pair", "hardware", "type", "state", "peer"]);
        for pair in &context.queue_pairs {
            table.add_row([
                format!("{:#08x}", pair.virtual_qpn.0),
                or_dash(pair.hardware_qpn.map(|number| format!("{:#08x}", number.0))),
                pair.transport.clone(),
                pair.state.clone(),
                or_dash(pair.peer.map(|number| format!("{:#08x}", number.0))),
            ]);
        }
        indent(text, &table);
    }
    if !context.memory_regions.is_empty() {
        let mut table = plain_table(&["address", "bytes", "lkey", "hardware", "rkey", "hardware"]);
        for region in &context.memory_regions {
            table.add_row([
                format!("{:#x}", region.address),
                region.length.to_string(),
                format!("{:#010x}", region.lkey.0.0),
                or_dash(region.lkey.1.map(|key| format!("{:#010x}", key.0))),
                format!("{:#010x}", region.rkey.0.0),
                or_dash(region.rkey.1.map(|key| format!("{:#010x}", key.0))),
            ]);
        }
        indent(text, &table);
    }
}

fn describe_port(text: &mut String, port: &PortNumbers) {
    use std::fmt::Write as _;
    let (lid, hardware_lid) = (port.lid.0.0, port.lid.1.0);
    let _ = writeln!(text, "    port {}  lid {lid} on {hardware_lid}", port.port);
    for (gid, hardware) in &port.gids {
        let _ = writeln!(
            text,
            "      gid {} on {}",
            std::net::Ipv6Addr::from(gid.0),
            std::net::Ipv6Addr::from(hardware.0)
        );
    }
}

fn plain_table(header: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table
        .load_style(comfy_table::presets::NOTHING)
        .set_header(header);
    table
}

fn indent(text: &mut String, table: &comfy_table::Table) {
    for line in table.lines() {
        text.push_str("   ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}
