//! Without reverbs: nodes, launcher and CRIU do what the other cases take for granted.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use reverbs_tests::process::Running;

use crate::case::{Action, Case, Context};
use crate::cluster::{Cluster, usual};
use crate::job::{Job, still_runs};
use crate::library::Library;
use crate::{clean, criu};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(90);

/// What is there to be found is there at once.
const NOTICE: Duration = Duration::from_millis(300);

/// Ids of restored processes begin here, beyond those of the tools.
const FIRST_ID: u32 = 5000;

/// What a case shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bare {
    /// Nodes have what is theirs, and reach each other by the remote shell until they are cut off.
    Nodes,
    /// What a case must not leave behind is found.
    Clean,
    /// A job runs over as many nodes.
    Job(u8),
    /// Both trees of a job are saved and restored by hand.
    Criu,
}

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    [
        ("bare-nodes", Bare::Nodes),
        ("bare-clean", Bare::Clean),
        ("bare-job-2", Bare::Job(2)),
        ("bare-job-3", Bare::Job(3)),
        ("bare-job-8", Bare::Job(8)),
        ("bare-criu", Bare::Criu),
    ]
    .into_iter()
    .map(|(name, bare)| Case {
        name: name.to_owned(),
        needs_reverbs: false,
        limit: LIMIT,
        action: Action::Bare(bare),
    })
    .collect()
}

/// Runs a case.
///
/// # Errors
/// When anything is not as expected.
pub fn run(bare: Bare, context: &Context<'_>) -> Result<String> {
    match bare {
        Bare::Nodes => nodes(context),
        Bare::Clean => leftovers(context),
        Bare::Job(count) => job(count, context),
        Bare::Criu => by_hand(context),
    }
}

fn nodes(context: &Context<'_>) -> Result<String> {
    let mut cluster = context.cluster(&usual(3))?;
    let rsh = cluster.rsh().display().to_string();
    let first = cluster.first()?;
    let own = "hostname; ls /tmp /dev/shm; cat /proc/1/comm; wc -l < /proc/net/dev";
    for node in cluster.nodes() {
        let inside = node.shell(own)?;
        let far = first.shell(&format!("{rsh} {} '{own}'", node.name()))?;
        ensure!(inside == far, "{inside} and by the remote shell {far}");
        ensure!(
            inside.starts_with(&format!("{}\n", node.name())),
            "{inside}"
        );
    }
    // Words are joined and read by the remote shell; input, both outputs, and the status pass through.
    let passed = first.shell(&format!(
        "echo in | {rsh} n2 'read word; echo \"$word\" to $(hostname); echo err >&2;' exit 7 2>/tmp/err; echo $?; cat /tmp/err"
    ))?;
    ensure!(passed == "in to n2\n7\nerr\n", "{passed}");
    let bytes = first.shell(&format!(
        "head -c 3000000 /dev/zero | {rsh} n3 'cat; cat < /dev/null' | wc -c"
    ))?;
    ensure!(bytes == "3000000\n", "{bytes}");
    // A session of its own without anybody's descriptors, which may outlive the connection.
    let listed = first.shell(&format!(
        "{rsh} n2 'ls /proc/self/fd; ps -o sid= $$; echo $$'"
    ))?;
    let lines: Vec<&str> = listed.lines().map(str::trim).collect();
    ensure!(
        // The last is that of `ls` itself.
        lines.len() == 6 && lines[..4] == ["0", "1", "2", "3"] && lines[4] == lines[5],
        "{listed}"
    );
    first.shell(&format!("{rsh} n2 'sleep 77 </dev/null >/dev/null 2>&1 &'"))?;
    cluster.node("n2")?.wait_for("sleep", 1, context.deadline)?;
    // Whoever is cut off is not reached, whoever is off is forgotten.
    cluster.cut("n2")?;
    let reach = |node: &str| first_status(&cluster, &format!("{rsh} {node} true"));
    let answers = (reach("n2")?, reach("n3")?);
    ensure!(
        answers.0 != 0 && answers.1 == 0,
        "a cut cuts wrongly: {answers:?}"
    );
    cluster.join("n2")?;
    ensure!(reach("n2")? == 0, "n2 does not come back");
    cluster.power_off("n2")?;
    ensure!(
        first_status(&cluster, &format!("{rsh} n2 true"))? != 0,
        "n2 is off and answers"
    );
    cluster.boot(&usual(2)[1..])?;
    let second = cluster.node("n2")?;
    ensure!(second.processes().is_empty(), "n2 is not a fresh one");
    ensure!(
        first_status(&cluster, &format!("{rsh} n2 true"))? == 0,
        "the fresh n2 does not answer"
    );
    Ok(String::new())
}

/// Of a command of the shell on the first node.
fn first_status(cluster: &Cluster, text: &str) -> Result<i32> {
    let text = format!("timeout 2 {text} >/dev/null 2>&1; echo $?");
    Ok(cluster.first()?.shell(&text)?.trim().parse()?)
}

fn leftovers(context: &Context<'_>) -> Result<String> {
    let cluster = context.cluster(&usual(2))?;
    let second = cluster.node("n2")?;
    clean::check(&cluster, &[])?;
    for (make, remove) in [
        ("iptables -A INPUT -p tcp --dport 9 -j DROP", "iptables -F"),
        (
            "iptables-legacy -A INPUT -p tcp --dport 9 -j DROP",
            "iptables-legacy -F",
        ),
        (
            "nft add table inet reverbs",
            "nft delete table inet reverbs",
        ),
        ("ip link add some type bridge", "ip link delete some"),
        (
            "exec >/dev/null 2>&1; setsid sleep 66 & echo $! > /tmp/pid; kill -STOP $(cat /tmp/pid)",
            "kill -KILL $(cat /tmp/pid)",
        ),
    ] {
        second.shell(make)?;
        ensure!(
            clean::check_within(&cluster, &[], NOTICE).is_err(),
            "`{make}` is not found"
        );
        ensure!(
            clean::no_stopped_process(second).is_err() == make.contains("STOP"),
            "`{make}`: what is stopped is not told from what runs"
        );
        second.shell(remove)?;
        clean::check(&cluster, &[])?;
    }
    Ok(String::new())
}

/// Starts mpirun by hand: its remote start must leave no process of its own in any tree.
fn start(cluster: &Cluster, context: &Context<'_>, job: &Job) -> Result<Running> {
    let agent = context.folder.join("agent");
    fs::write(
        &agent,
        format!(
            "#!/bin/bash\nhost=$1; shift\n\
             exec '{}' \"$host\" \"setsid -f sh -c $(printf %q \"exec $*\") </dev/null >/tmp/orted.log 2>&1\"\n",
            cluster.rsh().display()
        ),
    )?;
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755))?;
    let stock = job.mpirun()?;
    let mut command = Command::new("setsid");
    command
        .arg(stock.get_program())
        .args(["--mca", "plm", "rsh", "--mca", "plm_rsh_no_tree_spawn", "1"])
        .args(["--mca", "plm_rsh_agent"])
        .arg(&agent)
        .args(stock.get_args());
    for node in cluster.nodes() {
        node.leave_low_ids(FIRST_ID)?;
    }
    let mut runner = cluster.first()?.start(&command, &context.folder, "job")?;
    runner.wait_for_line(context.deadline, "ready")?;
    job.wait_for_progress(context.deadline, || still_runs(&mut runner))?;
    Ok(runner)
}

fn job(count: u8, context: &Context<'_>) -> Result<String> {
    let cluster = context.cluster(&usual(count))?;
    let job = Job::over(&cluster, context, Library::OpenMpi4)?;
    let mut runner = start(&cluster, context, &job)?;
    let trees = job.trees(&cluster)?;
    ensure!(trees.len() == usize::from(count), "{} trees", trees.len());
    job.nothing_else(&cluster)?;
    job.tell_to_finish()?;
    runner.wait_for_success(context.deadline)?;
    let rounds = job.account(&runner.output()?)?;
    clean::check(&cluster, &[])?;
    Ok(format!("{rounds} rounds"))
}

fn by_hand(context: &Context<'_>) -> Result<String> {
    let cluster = context.cluster(&usual(2))?;
    let job = Job::over(&cluster, context, Library::OpenMpi4)?;
    let mut runner = start(&cluster, context, &job)?;
    let trees = job.trees(&cluster)?;
    let mut dumps = Vec::new();
    for tree in &trees {
        let images = context.folder.join(format!("image-{}", tree.host));
        let node = cluster.node(&tree.host)?;
        dumps.push(criu::dump(node, tree.root.inner, &images)?);
    }
    for dump in &mut dumps {
        dump.wait_for_success(context.deadline)?;
    }
    let status = runner.wait(context.deadline)?;
    ensure!(
        !status.success(),
        "the dump was to end the job, which ended with {status}"
    );
    let saved = job.progress()?;
    for tree in &trees {
        let images = context.folder.join(format!("image-{}", tree.host));
        criu::restore(cluster.node(&tree.host)?, &images)?;
    }
    let back = job.trees(&cluster)?;
    for (tree, before) in back.iter().zip(&trees) {
        ensure!(
            tree.root.inner == before.root.inner && tree.root.pid != before.root.pid,
            "{before:?} came back as {tree:?}"
        );
    }
    job.wait_for_progress(context.deadline, || Ok(()))?;
    job.tell_to_finish()?;
    let rounds = job.wait_for_account(Path::new(runner.output_file()), context.deadline)?;
    ensure!(rounds > saved, "{rounds} rounds, {saved} at the dump");
    clean::check(&cluster, &[])?;
    Ok(format!("{rounds} rounds, {saved} of them before the dump"))
}
