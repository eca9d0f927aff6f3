//! An orchestrator that says anything, and one that brings the process back afterwards.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use arbitrary::{Arbitrary, Result, Unstructured};
use reverbs::control::message::{
    ContextNumbers, DeviceChoice, HardwareQueuePair, PROTOCOL_VERSION, Phase, PortAddress,
    PortNumbers, ProcessNumbers, Progress, QueuePairNumbers, Reply, Request, ResponderState,
    Session,
};
use reverbs::control::socket;
use reverbs::handle::{
    HardwareGid, HardwareKey, HardwareLid, HardwareQpn, Psn, VirtualGid, VirtualKey, VirtualLid,
    VirtualQpn,
};
use reverbs_benches::null_device::{GID, NAME};

/// How long the agent may take for what it was sent.
const LIMIT: Duration = Duration::from_secs(30);
/// The phases, and Resume once more.
const STEPS: usize = 8;

/// What is said on one connection.
#[derive(Clone, Debug)]
pub struct Conversation {
    messages: Vec<Message>,
}

#[derive(Clone, Debug)]
enum Message {
    /// A request that is well formed.
    Request(Box<Request>),
    /// A frame of the right length with something in it.
    Frame(Vec<u8>),
    /// Anything.
    Bytes(Vec<u8>),
}

impl<'a> Arbitrary<'a> for Conversation {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> Result<Self> {
        let mut messages = Vec::new();
        while !bytes.is_empty() && messages.len() < 24 {
            messages.push(match bytes.arbitrary::<u8>()? {
                0 => Message::Frame(bytes.arbitrary()?),
                1 => Message::Bytes(bytes.arbitrary()?),
                // The requests of a cycle in their order: the next of them is often the one that is let pass.
                2..=99 => Message::Request(Box::new(request(bytes, messages.len() % 13)?)),
                kind => Message::Request(Box::new(request(bytes, usize::from(kind))?)),
            });
        }
        Ok(Self { messages })
    }
}

impl Conversation {
    /// Whether the process was told numbers, which may be wrong.
    #[must_use]
    pub fn tells_numbers(&self) -> bool {
        self.messages.iter().any(|message| match message {
            Message::Request(request) => matches!(**request, Request::Connect { .. }),
            Message::Frame(_) | Message::Bytes(_) => true,
        })
    }

    /// Says it all, and reads what comes back.
    ///
    /// # Panics
    /// The agent answers something that is no reply, more than it was asked, or not in time.
    pub fn hold(&self, runtime_dir: &Path) {
        let mut stream = connect(runtime_dir);
        for message in &self.messages {
            // The agent may have hung up, which is its answer to what is no request.
            let _ = match message {
                Message::Request(request) => socket::send(&mut stream, &**request),
                Message::Frame(body) => stream
                    .write_all(&(body.len() as u32).to_le_bytes())
                    .and_then(|()| stream.write_all(body)),
                Message::Bytes(bytes) => stream.write_all(bytes),
            };
        }
        let _ = stream.shutdown(Shutdown::Write);
        let mut replies = 0;
        loop {
            match socket::receive::<Reply>(&mut stream) {
                Ok(Some(_)) => replies += 1,
                Ok(None) => break,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                Err(error) => panic!("the agent's answer: {error}"),
            }
        }
        let framed = |message: &&Message| !matches!(message, Message::Bytes(_));
        let bytes = self.messages.iter().any(|message| !framed(&message));
        let asked = self.messages.iter().filter(framed).count();
        assert!(replies <= asked || bytes, "{replies} replies to {asked}");
    }
}

fn connect(runtime_dir: &Path) -> UnixStream {
    let pid = std::process::id().cast_signed();
    let stream = UnixStream::connect(socket::agent_socket(runtime_dir, pid)).expect("the agent");
    stream.set_read_timeout(Some(LIMIT)).expect("a limit");
    stream
}

/// Takes the process over and drives it to Running, through fresh hardware once more if `again`.
///
/// # Panics
/// The agent refuses.
pub fn bring_back(runtime_dir: &Path, again: bool) {
    let mut stream = connect(runtime_dir);
    let mut ask = |request: Request| {
        socket::send(&mut stream, &request).expect("the agent listens");
        let reply = socket::receive(&mut stream).expect("the agent answers");
        match reply.expect("the agent stays") {
            Reply::Refused { phase, reason } => {
                panic!("{} in {phase:?}: {reason}", request.name())
            }
            reply => reply,
        }
    };
    let session = Session {
        id: "the one that brings it back".into(),
        pid: std::process::id().cast_signed(),
    };
    ask(Request::Begin {
        session,
        takeover: true,
    });
    let version = PROTOCOL_VERSION;
    let mut left = if again { 2 * STEPS } else { STEPS };
    let mut again = again;
    loop {
        let Reply::Hello { phase, .. } = ask(Request::Hello { version }) else {
            panic!("hello is answered by hello");
        };
        match phase {
            Phase::Running if !again => {
                // The session ends.
                ask(Request::Resume);
                return;
            }
            Phase::Running => {
                again = false;
                ask(Request::Close { limit_ms: 1000 });
                ask(Request::Drain {
                    limit_ms: 0,
                    arrivals: true,
                });
                ask(Request::Stop { limit_ms: 1000 });
            }
            Phase::Closed | Phase::Connected => {
                ask(Request::Resume);
            }
            Phase::Stopped => {
                let Reply::Responders { responders } = ask(Request::Responders) else {
                    panic!("responders are answered by responders");
                };
                ask(Request::Settle { responders });
            }
            Phase::Settled => {
                ask(Request::Release);
            }
            Phase::Released => {
                ask(Request::Rebuild { devices: vec![] });
            }
            Phase::Rebuilt => {
                let Reply::Numbers { numbers } = ask(Request::Publish) else {
                    panic!("numbers are answered by numbers");
                };
                let numbers = vec![numbers];
                ask(Request::Connect { numbers });
            }
        }
        left -= 1;
        assert!(left > 0, "it does not come back from {phase:?}");
    }
}

/// The request of that place in a cycle.
fn request(bytes: &mut Unstructured<'_>, kind: usize) -> Result<Request> {
    Ok(match kind % 14 {
        0 => Request::Begin {
            session: Session {
                id: bytes.arbitrary()?,
                pid: bytes.arbitrary()?,
            },
            takeover: bytes.arbitrary()?,
        },
        1 => Request::Examine,
        2 => Request::Close {
            limit_ms: limit(bytes)?,
        },
        3 => Request::Drain {
            limit_ms: limit(bytes)?,
            arrivals: bytes.arbitrary()?,
        },
        4 => Request::Stop {
            limit_ms: limit(bytes)?,
        },
        5 => Request::Responders,
        6 => Request::Settle {
            responders: list(bytes, |bytes| {
                Ok(ResponderState {
                    address: PortAddress {
                        gids: list(bytes, |bytes| Ok(VirtualGid(gid(bytes)?)))?,
                        lid: VirtualLid(bytes.arbitrary()?),
                    },
                    qpn: VirtualQpn(number(bytes)?),
                    peer: match bytes.arbitrary()? {
                        true => Some(VirtualQpn(number(bytes)?)),
                        false => None,
                    },
                    progress: progress(bytes)?,
                })
            })?,
        },
        7 => Request::Release,
        8 => Request::Rebuild {
            devices: list(bytes, |bytes| {
                Ok(DeviceChoice {
                    from: bytes.arbitrary()?,
                    to: match bytes.arbitrary()? {
                        true => name(),
                        false => bytes.arbitrary()?,
                    },
                })
            })?,
        },
        9 => Request::Publish,
        10 => Request::Connect {
            numbers: list(bytes, process_numbers)?,
        },
        11 => Request::Resume,
        12 => Request::Status,
        13 => Request::Peers,
        14 => Request::GiveUp {
            queue_pairs: list(bytes, |bytes| {
                Ok(HardwareQueuePair {
                    pid: std::process::id().cast_signed(),
                    hardware_device: name(),
                    hardware_qpn: HardwareQpn(number(bytes)?),
                })
            })?,
        },
        _ => Request::Hello {
            version: bytes.arbitrary()?,
        },
    })
}

fn process_numbers(bytes: &mut Unstructured<'_>) -> Result<ProcessNumbers> {
    Ok(ProcessNumbers {
        pid: bytes.arbitrary()?,
        contexts: list(bytes, |bytes| {
            Ok(ContextNumbers {
                device: name(),
                hardware_device: name(),
                ports: list(bytes, |bytes| {
                    Ok(PortNumbers {
                        port: bytes.int_in_range(0..=2)?,
                        lid: (
                            VirtualLid(bytes.arbitrary()?),
                            HardwareLid(bytes.arbitrary()?),
                        ),
                        gids: list(bytes, |bytes| {
                            Ok((VirtualGid(gid(bytes)?), HardwareGid(gid(bytes)?)))
                        })?,
                    })
                })?,
                queue_pairs: list(bytes, |bytes| {
                    Ok(QueuePairNumbers {
                        port: bytes.int_in_range(0..=2)?,
                        virtual_qpn: VirtualQpn(number(bytes)?),
                        hardware_qpn: HardwareQpn(number(bytes)?),
                        // The device refuses more than 24 bits; that is a Connect that cannot be done.
                        first_psn: Psn(bytes.arbitrary::<u32>()? & 0xff_ffff),
                        mtu: bytes.arbitrary()?,
                    })
                })?,
                rkeys: list(bytes, |bytes| {
                    Ok((VirtualKey(number(bytes)?), HardwareKey(number(bytes)?)))
                })?,
            })
        })?,
    })
}

/// Some requests wait that long whenever a message finds no receive.
fn limit(bytes: &mut Unstructured<'_>) -> Result<u64> {
    bytes.int_in_range(0..=10)
}

fn name() -> String {
    NAME.to_string_lossy().into_owned()
}

/// Often the one there is.
fn gid(bytes: &mut Unstructured<'_>) -> Result<[u8; 16]> {
    match bytes.arbitrary::<u8>()? {
        0..=200 => Ok(GID),
        _ => bytes.arbitrary(),
    }
}

/// Often one of those that the device hands out.
fn number(bytes: &mut Unstructured<'_>) -> Result<u32> {
    match bytes.arbitrary::<u8>()? {
        255 => bytes.arbitrary(),
        small => Ok(u32::from(small) % 64),
    }
}

fn list<T>(
    bytes: &mut Unstructured<'_>,
    one: impl Fn(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let length = bytes.int_in_range(0..=4)?;
    (0..length).map(|_| one(bytes)).collect()
}

fn progress(bytes: &mut Unstructured<'_>) -> Result<Progress> {
    Ok(match bytes.int_in_range(0..=3)? {
        0 => Progress::Nothing,
        1 => Progress::Expects(Psn(bytes.arbitrary()?)),
        2 => Progress::Received(bytes.arbitrary()?),
        _ => Progress::Unknown,
    })
}
