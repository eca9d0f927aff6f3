//! The channels between QEMU and us: the console, the job's two outputs, and its status.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use command_fds::{CommandFdExt, FdMapping};

/// The initramfs, the channels in the order of [`PORTS`], and the cable, as QEMU finds them.
const FIRST_FD: usize = 10;

/// The console is the serial line; the others are virtio ports, numbered by their place here
/// (guest/main.sh knows the numbers).
const PORTS: [&str; 4] = ["console", "out", "err", "control"];

/// What QEMU calls the cable of a network.
pub const CABLE: &str = "cable";

/// How much of the console is kept for an error message, in bytes.
const CONSOLE_KEPT: usize = 4096;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Our ends. Each reads end-of-file when QEMU has ended.
#[derive(Debug)]
pub struct Channels {
    pub console: UnixStream,
    pub out: UnixStream,
    pub err: UnixStream,
    pub control: UnixStream,
}

impl Channels {
    /// Adds the channels, the initramfs, and the cable of a network to QEMU's arguments and
    /// inherited descriptors.
    ///
    /// # Errors
    /// When the system refuses more descriptors.
    pub fn attach(
        command: &mut Command,
        archive: File,
        cable: Option<OwnedFd>,
    ) -> Result<Channels> {
        let mut child_fd = FIRST_FD;
        let mut mappings = vec![mapping(archive.into(), child_fd)?];
        command.args(["-initrd", &format!("/proc/self/fd/{child_fd}")]);
        command.args(["-serial", "chardev:console"]);
        command.args(["-device", "virtio-serial-pci"]);
        let mut ours = Vec::new();
        for (number, name) in PORTS.iter().enumerate() {
            child_fd += 1;
            let (near, far) = UnixStream::pair().context("cannot make a socket pair")?;
            ours.push(near);
            mappings.push(mapping(far.into(), child_fd)?);
            command.args(["-chardev", &format!("socket,id={name},fd={child_fd}")]);
            if number > 0 {
                let port = format!("virtserialport,chardev={name},nr={number}");
                command.args(["-device", &port]);
            }
        }
        if let Some(cable) = cable {
            child_fd += 1;
            mappings.push(mapping(cable, child_fd)?);
            let end = format!("dgram,id={CABLE},local.type=fd,local.str={child_fd}");
            command.args(["-netdev", &end]);
        }
        command.fd_mappings(mappings)?;
        let [console, out, err, control] =
            <[UnixStream; 4]>::try_from(ours).map_err(|_| anyhow!("one stream for each port"))?;
        Ok(Channels {
            console,
            out,
            err,
            control,
        })
    }
}

fn mapping(parent_fd: OwnedFd, child_fd: usize) -> Result<FdMapping> {
    Ok(FdMapping {
        parent_fd,
        child_fd: i32::try_from(child_fd)?,
    })
}

/// What the guest tells on the control channel.
#[derive(Debug)]
pub enum Event {
    /// The devices are there; the job starts.
    Up,
    /// The job has ended with this status and its output is out.
    Exit(u8),
}

/// Reads the control channel; the receiver is disconnected when QEMU has ended.
pub fn listen(control: UnixStream) -> Receiver<Event> {
    let (events, inbox) = mpsc::channel();
    thread::spawn(move || forward(control, &events));
    inbox
}

fn forward(control: UnixStream, events: &Sender<Event>) {
    for line in BufReader::new(control).lines().map_while(Result::ok) {
        let event = match line.split_once(' ') {
            None if line == "up" => Some(Event::Up),
            Some(("exit", status)) => status.parse().ok().map(Event::Exit),
            _ => None,
        };
        // What is not an event is noise: without an exit the run fails at the end anyway.
        if let Some(event) = event
            && events.send(event).is_err()
        {
            return;
        }
    }
}

/// What happens to bytes from the guest.
#[allow(missing_debug_implementations, reason = "holds any writer")]
pub struct Sink {
    through: Option<Box<dyn Write + Send>>,
    kept: Vec<u8>,
    limit: usize,
}

impl Sink {
    /// Passes them on at once.
    pub fn through(writer: impl Write + Send + 'static) -> Sink {
        Sink {
            through: Some(Box::new(writer)),
            kept: Vec::new(),
            limit: 0,
        }
    }

    /// Keeps them all, and passes them on if asked.
    pub fn keep(through: Option<Box<dyn Write + Send>>) -> Sink {
        Sink {
            through,
            kept: Vec::new(),
            limit: usize::MAX,
        }
    }

    /// Keeps the last few, and shows them on stderr if asked.
    pub fn tail(shown: bool) -> Sink {
        Sink {
            through: shown.then(|| Box::new(std::io::stderr()) as Box<dyn Write + Send>),
            kept: Vec::new(),
            limit: CONSOLE_KEPT,
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        if let Some(writer) = &mut self.through {
            // A closed pipe (`| head`) must not block the guest: the rest is dropped.
            if writer
                .write_all(bytes)
                .and_then(|()| writer.flush())
                .is_err()
            {
                self.through = None;
            }
        }
        self.kept.extend_from_slice(bytes);
        let surplus = self.kept.len().saturating_sub(self.limit);
        self.kept.drain(..surplus);
    }
}

/// A thread that takes a channel's bytes to a sink.
#[derive(Debug)]
pub struct Relay(JoinHandle<Vec<u8>>);

impl Relay {
    /// Starts relaying.
    pub fn start(mut channel: UnixStream, mut sink: Sink) -> Relay {
        Relay(thread::spawn(move || {
            let mut buffer = [0; 16384];
            while let Ok(length @ 1..) = channel.read(&mut buffer) {
                sink.take(&buffer[..length]);
            }
            sink.kept
        }))
    }

    /// Waits for the end of the channel and returns what the sink kept.
    pub fn join(self) -> Vec<u8> {
        self.0.join().unwrap_or_default()
    }
}

/// Makes Ctrl-C and SIGTERM something to ask for, instead of our end.
///
/// # Errors
/// When the handler cannot be installed.
pub fn watch_signals() -> Result<()> {
    static WATCHED: OnceLock<bool> = OnceLock::new();
    let watched = WATCHED
        .get_or_init(|| ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed)).is_ok());
    watched
        .then_some(())
        .context("cannot install a signal handler")
}

/// Whether such a signal came.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
