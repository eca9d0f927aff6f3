//! How the processes of a job get to its other nodes.
//!
//! mpirun is told to use `reverbs remote` where it would use ssh (`hooks.rs`). That asks `reverbs run`, the parent of mpirun,
//! to start the remote part, and ends: so no client of ssh or srun is in a process tree that will be saved. On the other node
//! `reverbs node --start` puts the part into a session of its own, whose root is what a checkpoint of that node saves.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use procfs::process::Process;
use serde::{Deserialize, Serialize};

use reverbs::control::socket;

use super::hooks;
use super::launcher::Launcher;
use super::record::{JobRecord, RecordedNode};
use super::relay::{MAGIC, runtime_folder};
use super::stream::read_line;
use crate::command::node::JOB_VARIABLE;
use crate::command::secret::Secret;

/// Where `reverbs remote` finds `reverbs run`.
const SOCKET_VARIABLE: &str = "REVERBS_START";
const LONGEST_LINE: usize = 1 << 20;

/// What `reverbs remote` asks of `reverbs run`.
#[derive(Debug, Serialize, Deserialize)]
struct Wish {
    host: String,
    /// For a shell there.
    command: String,
}

/// What `reverbs run` tells `reverbs node --start`.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    job: String,
    secret: Secret,
    environment: Vec<(String, String)>,
    command: String,
    /// Stay as its parent: what a step of the cluster's engine has started ends with the step.
    stay: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Started {
    Pid(i32),
    Failed(String),
}

/// Serves the wishes of `reverbs remote` while the job runs.
#[derive(Debug)]
pub(crate) struct Starter {
    shared: Arc<Shared>,
    socket: PathBuf,
}

#[derive(Debug)]
struct Shared {
    runtime_folder: PathBuf,
    secret: Secret,
    environment: Vec<(String, String)>,
    record: Mutex<JobRecord>,
    /// Launchers that last as long as what they have started.
    steps: Mutex<Vec<Child>>,
}

impl Starter {
    /// Listens. `environment` is what the job gets from `reverbs run` on every node.
    ///
    /// # Errors
    /// The runtime folder cannot be written to.
    pub(crate) fn listen(
        launcher: Launcher,
        id: String,
        environment: Vec<(String, String)>,
    ) -> Result<Self> {
        let runtime_folder = runtime_folder()?;
        let socket = runtime_folder.join(format!("start-{id}.sock"));
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen at {}", socket.display()))?;
        let host = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        let secret = Secret::fresh()?;
        secret.keep(&runtime_folder, &id)?;
        let shared = Arc::new(Shared {
            runtime_folder,
            secret,
            environment,
            record: Mutex::new(JobRecord {
                id,
                launcher,
                nodes: vec![RecordedNode {
                    name: host,
                    root: 0,
                }],
                starting: Vec::new(),
            }),
            steps: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(std::io::Result::ok) {
                let serving = Arc::clone(&serving);
                // All nodes are started at the same time.
                std::thread::spawn(move || serving.serve(stream));
            }
        });
        Ok(Self { shared, socket })
    }

    /// What makes launchers use us, for the environment of the job.
    ///
    /// # Errors
    /// We do not know where we are.
    pub(crate) fn variables(&self) -> Result<Vec<(String, String)>> {
        let us = std::env::current_exe().context("cannot find this command itself")?;
        let us = us
            .to_str()
            .context("the path of this command is not UTF-8")?;
        let mut variables = vec![
            (
                JOB_VARIABLE.to_owned(),
                lock(&self.shared.record).id.clone(),
            ),
            (
                SOCKET_VARIABLE.to_owned(),
                self.socket.to_string_lossy().into_owned(),
            ),
        ];
        variables.extend(hooks::variables(us, |name| {
            std::env::var_os(name).is_some()
        }));
        Ok(variables)
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        let record = lock(&self.shared.record);
        JobRecord::remove(&self.shared.runtime_folder, &record.id);
        for step in lock(&self.shared.steps).iter_mut() {
            let _ = step.kill();
            let _ = step.wait();
        }
    }
}

impl Shared {
    fn serve(&self, mut stream: UnixStream) {
        let asked: std::io::Result<Option<Wish>> = socket::receive(&mut stream);
        let Ok(Some(wish)) = asked else { return };
        let started = match self.start(&wish) {
            Ok(pid) => Started::Pid(pid),
            Err(error) => Started::Failed(format!("{error:#}")),
        };
        // If `reverbs remote` is gone, mpirun knows that this node failed.
        let _ = socket::send(&mut stream, &started);
    }

    /// What is started may be at work before we hear of it, and somebody may want to save the job then.
    fn start(&self, wish: &Wish) -> Result<i32> {
        self.note(|record| record.starting.push(wish.host.clone()))?;
        let started = self.launch(wish);
        self.note(|record| {
            if let Some(place) = record.starting.iter().position(|name| *name == wish.host) {
                record.starting.remove(place);
            }
            if let Ok(root) = started {
                let name = wish.host.clone();
                record.nodes.push(RecordedNode { name, root });
            }
        })?;
        started
    }

    fn note(&self, change: impl FnOnce(&mut JobRecord)) -> Result<()> {
        let mut record = lock(&self.record);
        change(&mut record);
        record.write(&self.runtime_folder)
    }

    fn launch(&self, wish: &Wish) -> Result<i32> {
        let (launcher, job) = {
            let record = lock(&self.record);
            (record.launcher.clone(), record.id.clone())
        };
        let order = Order {
            job: job.clone(),
            secret: self.secret.clone(),
            environment: [
                self.environment.clone(),
                vec![(JOB_VARIABLE.to_owned(), job.clone())],
            ]
            .concat(),
            command: wish.command.clone(),
            stay: launcher.is_step,
        };
        let mut child = launcher
            .command(&wish.host, &["node", "--start"])?
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot start `{}`", launcher.name()))?;
        let mut line = serde_json::to_vec(&order)?;
        line.push(b'\n');
        let mut input = child.stdin.take().context("no pipe to it")?;
        let said = input
            .write_all(&line)
            .and_then(|()| input.flush())
            .map_err(anyhow::Error::from)
            .and_then(|()| answer(&mut child));
        let outcome = match said {
            Ok(Started::Pid(pid)) => Ok(pid),
            Ok(Started::Failed(why)) => Err(anyhow!(why)),
            Err(error) => Err(error.context(format!("{} to {}", launcher.name(), wish.host))),
        };
        if launcher.is_step && outcome.is_ok() {
            // Its standard input stays open as long as it lives.
            child.stdin = Some(input);
            lock(&self.steps).push(child);
        } else {
            drop(input);
            let _ = child.wait();
        }
        outcome
    }
}

fn answer(child: &mut Child) -> Result<Started> {
    let output = child.stdout.take().context("no pipe from it")?;
    for line in BufReader::new(output).lines() {
        if let Some(answer) = line?.strip_prefix(MAGIC) {
            return Ok(serde_json::from_str(answer)?);
        }
    }
    bail!("it ended without an answer")
}

/// `reverbs remote HOST COMMAND...`: called by mpirun as it would call ssh.
///
/// # Errors
/// The node cannot be reached, or the command not be started there.
pub(crate) fn remote(host: &str, words: &[String]) -> Result<ExitCode> {
    let socket = std::env::var_os(SOCKET_VARIABLE)
        .context("this is called by mpirun in a job that `reverbs run` has started, not by hand")?;
    let mut stream = UnixStream::connect(&socket).with_context(|| {
        format!(
            "the `reverbs run` that started the job is gone ({}): processes can be put on further nodes only while it runs",
            Path::new(&socket).display()
        )
    })?;
    let wish = Wish {
        host: host.to_owned(),
        command: in_foreground(&words.join(" ")),
    };
    socket::send(&mut stream, &wish)?;
    match socket::receive(&mut stream)? {
        Some(Started::Pid(_)) => Ok(ExitCode::SUCCESS),
        Some(Started::Failed(why)) => bail!("node {host}: {why}"),
        None => bail!("node {host}: `reverbs run` has ended"),
    }
}

/// orted and prted are told to leave the session that they are started in, for which they fork. What we start has one of
/// its own, and the root of a tree has to stay. prted forks unless it is told not to.
fn in_foreground(command: &str) -> String {
    let is_prted = |word: &str| Path::new(word).ends_with("prted");
    let attached = match command.split(' ').any(is_prted) {
        true => "--leave-session-attached",
        false => "",
    };
    let words: Vec<&str> = command
        .split(' ')
        .map(|word| match word {
            "--daemonize" => attached,
            word => word,
        })
        .collect();
    words.join(" ")
}

/// `reverbs node --start`: the other end of it.
///
/// # Errors
/// The command cannot be started here.
#[expect(clippy::print_stdout)]
pub(crate) fn start_here() -> Result<ExitCode> {
    let mut input = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let line = read_line(&mut input, LONGEST_LINE).context("nobody has said what to start")?;
    let order: Order = serde_json::from_str(&line)
        .context("this is started by `reverbs run` on another node, not by hand")?;
    let started = spawn(&order);
    let said = match &started {
        Ok(child) => Started::Pid(child.id().cast_signed()),
        Err(error) => Started::Failed(format!("{error:#}")),
    };
    println!("{MAGIC}{}", serde_json::to_string(&said)?);
    std::io::stdout().flush()?;
    let mut child = started?;
    if order.stay {
        let status = child.wait()?;
        return Ok(crate::command::run::exit_code(status));
    }
    Ok(ExitCode::SUCCESS)
}

fn spawn(order: &Order) -> Result<Child> {
    /// A command that cannot be found ends at once.
    const LOOK: Duration = Duration::from_millis(100);
    for (name, value) in &order.environment {
        // SAFETY: no other thread was started yet.
        unsafe { std::env::set_var(name, value) };
    }
    let folder = runtime_folder()?;
    order.secret.keep(&folder, &order.job)?;
    let log = folder.join(format!("job-{}.log", order.job));
    let output = File::options()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("cannot write {}", log.display()))?;
    crate::command::run::leave_low_ids();
    let mut command = Command::new("/bin/sh");
    command
        .arg("-c")
        .arg(without_shell(&order.command))
        .stdin(Stdio::null())
        .stderr(output.try_clone()?)
        .stdout(output);
    // SAFETY: setsid is async-signal-safe and touches no memory; it cannot fail in a child that was just forked.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = command.spawn().context("cannot start /bin/sh")?;
    std::thread::sleep(LOOK);
    let is_hydra = is_hydra(&order.command);
    if is_hydra {
        await_children(&mut child)?;
    }
    match child.try_wait()? {
        // A job can be as short as that.
        Some(status) if is_hydra && status.success() => {}
        Some(status) => {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            let last = said.lines().next_back().unwrap_or_default().trim();
            bail!("the command ended at once ({status}): {last}");
        }
        None => {}
    }
    Ok(child)
}

/// Its proxies are `hydra_pmi_proxy`, and Intel's `hydra_bstrap_proxy`.
fn is_hydra(command: &str) -> bool {
    let first = command.split_whitespace().next().unwrap_or_default();
    let name = Path::new(first.trim_matches('"')).file_name();
    name.and_then(OsStr::to_str)
        .is_some_and(|name| name.starts_with("hydra_"))
}

/// Hydra takes it for a failure when what it has called like ssh ends before its proxy has reported. One that has is told
/// at once to start processes.
fn await_children(child: &mut Child) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(30);
    const PAUSE: Duration = Duration::from_millis(10);
    let pid = child.id().cast_signed();
    let deadline = Instant::now() + LIMIT;
    while child.try_wait()?.is_none() && Instant::now() < deadline {
        let children = Process::new(pid)?.task_main_thread()?.children()?;
        if !children.is_empty() {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// One plain command needs no shell above it.
fn without_shell(command: &str) -> String {
    let mut quote = None;
    let plain = command.chars().filter(|letter| {
        let quoted = quote.is_some();
        match (quote, letter) {
            (None, '"' | '\'') => quote = Some(*letter),
            (Some(open), letter) if open == *letter => quote = None,
            _ => {}
        }
        !quoted
    });
    let plain: String = plain.collect();
    let first = plain.split_whitespace().next().unwrap_or_default();
    match plain.contains(['\n', ';', '&', '|']) || first.contains(['=', '(']) {
        true => command.to_owned(),
        false => format!("exec {command}"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{in_foreground, is_hydra, without_shell};

    #[test]
    fn a_shell_stays_only_where_it_has_more_to_do() {
        for (asked, done) in [
            (" orted -mca a \"b(2);c\"", "exec  orted -mca a \"b(2);c\""),
            (
                "PATH=/opt/bin:$PATH ; export PATH ; orted",
                "PATH=/opt/bin:$PATH ; export PATH ; orted",
            ),
            ("A=b orted", "A=b orted"),
        ] {
            assert_eq!(without_shell(asked), done);
        }
    }

    #[test]
    fn the_proxies_of_hydra_are_known() {
        assert!(is_hydra("\"/usr/bin/hydra_pmi_proxy\" --control-port n1:7"));
        assert!(!is_hydra("/opt/hydra_4/orted -mca a hydra_b"));
    }

    #[test]
    fn a_daemon_stays_the_process_that_was_started() {
        for (asked, done) in [
            (
                "A=b ; /opt/bin/prted --daemonize --prtemca a \"b  c\"",
                "A=b ; /opt/bin/prted --leave-session-attached --prtemca a \"b  c\"",
            ),
            ("orted --daemonize -mca a b", "orted  -mca a b"),
            ("sh -c 'a --daemonized'", "sh -c 'a --daemonized'"),
        ] {
            assert_eq!(in_foreground(asked), done);
        }
    }
}
